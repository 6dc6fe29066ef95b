"""What authors of clients test theirs with: docs/protocol-vectors.json, and clients/conformance.py."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from typing import Any

import pytest

from agenthub import CloseCode, Code
from clients import conformance
from tests import vectors
from tests.support import ROOT
from tests.test_javascript import MODULES, NODE, needs_node

VECTORS: list[dict[str, Any]] = json.loads(vectors.PATH.read_text(encoding="utf-8"))
JAVASCRIPT = shlex.join([*NODE, str(ROOT / "clients" / "conformance_worker.mjs")])
RUNTIMES = {"deno": ["run", "--allow-net", "--allow-env"], "bun": ["run"]}  # And their flags.
MINIMAL = shlex.join([*NODE, str(ROOT / "tests" / "interop" / "minimal.mjs")])
PYTHON = shlex.join([sys.executable, "-m", "clients.conformance_worker"])
NAIVE = shlex.join([sys.executable, "-m", "tests.naive_client"])
FEW = ["register", "echo", "stop", "retained", "unacknowledged", "missed", "ask_again", "answer_again", "stream"]

# A hub says these only to clients that do what no test of the hub does, or they are the worker's.
NOT_IN_VECTORS = {
    *(Code.INTERNAL, Code.NO_HANDLER, Code.INVALID_INPUT, Code.HUB_LOST, Code.PIECES_LOST),
}


@pytest.fixture(autouse=True)
def _project_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_hub_does_again_what_the_vectors_say() -> None:
    for vector in VECTORS:
        assert vectors.replay(vector) == vector["steps"], vector["name"]


def test_vectors_show_each_code_and_each_type() -> None:
    text = vectors.PATH.read_text(encoding="utf-8")
    codes = {code for code in Code if f'"code": "{code}"' in text}
    assert codes >= set(Code) - NOT_IN_VECTORS
    closes = {step["code"] for vector in VECTORS for step in vector["steps"] if "closed" in step}
    assert closes == {CloseCode.DONE, CloseCode.NOT_ALLOWED, CloseCode.REPLACED, CloseCode.SILENT}
    assert len({vector["name"] for vector in VECTORS}) == len(VECTORS) >= 200


@pytest.mark.long
def test_vectors_are_fresh() -> None:
    assert vectors.page(vectors.recorded()) == vectors.PATH.read_text(encoding="utf-8")


def faults(verdicts: list[conformance.Verdict]) -> dict[str, str]:
    return {one.name: one.fault for one in verdicts if one.fault}


@needs_node
@pytest.mark.parametrize("command", [JAVASCRIPT, MINIMAL], ids=["javascript", "minimal"])
async def test_clients_in_node_conform_in_a_few_checks(command: str) -> None:
    assert faults(await conformance.run_checks(command, FEW)) == {}


@pytest.mark.long
@pytest.mark.parametrize(
    "command",
    [pytest.param(JAVASCRIPT, marks=needs_node), pytest.param(MINIMAL, marks=needs_node), PYTHON],
    ids=["javascript", "minimal", "python"],
)
async def test_clients_conform_in_all_checks(command: str) -> None:
    verdicts = await conformance.run_checks(command, conformance.CHECKS)
    assert faults(verdicts) == {}
    assert [one.name for one in verdicts if one.skipped] == []


@pytest.mark.long
@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_javascript_client_conforms_in_other_runtimes(runtime: str) -> None:
    installed = MODULES / ".bin" / runtime
    program = str(installed) if installed.exists() else shutil.which(runtime)
    if program is None:
        pytest.skip(f"needs npm install --no-save {runtime}")
    command = shlex.join([program, *RUNTIMES[runtime], str(ROOT / "clients" / "conformance_worker.mjs")])
    assert faults(await conformance.run_checks(command, conformance.CHECKS)) == {}


async def test_naive_client_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "WAIT_S", 2.0)
    names = ["register", "ping", "unknown", "failure", "heartbeat", "resume", "agent_lost", "delegate", "ask", "stream"]
    verdicts = await conformance.run_checks(NAIVE, names)
    wrong = faults(verdicts)
    assert set(wrong) == {"failure", "heartbeat", "resume", "agent_lost", "delegate"}
    assert wrong["failure"] == "success is not false"
    assert wrong["resume"] == "it did not connect within 2 s"
    assert [one.name for one in verdicts if one.skipped] == ["ask", "stream"]
    assert conformance.table(verdicts).endswith("\n3 of 8 right, 2 skipped")


def test_command_line_reports_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main(["--client", NAIVE, "register"]) == 0
    assert conformance.main(["--client", NAIVE, "failure"]) == 1
    assert "wrong  failure  reports a failure with its code: success is not false\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        conformance.main(["--client", NAIVE, "nothing"])
    assert "no such check: nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        conformance.main(["--client", str(ROOT / "no-such-program"), "register"])
    assert "the client cannot be started" in capsys.readouterr().err
