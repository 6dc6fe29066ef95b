"""Check that the comparisons with other systems and the load on the SDK run, and report what they skip."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ends, peers, sdk
from benchmarks.ends import Load
from benchmarks.measure import Options
from tests.support import ROOT, WAIT_S, running

FIGURES = {"tasks_per_s", "requester_cpu_us", "server_cpu_us", "worker_cpu_us", "p50_ms", "p99_ms"}


def quick() -> Options:
    return Options(rounds=1, seconds=0.1, quick=True)


@pytest.mark.long
def test_agenthub_is_measured_with_three_processes() -> None:
    for package in peers.AGENTHUB.packages:
        pytest.importorskip(package)
    options = quick()
    rows = peers.run(options, systems=[peers.AGENTHUB])
    assert {row["loop"] for row in rows} <= {"asyncio", "uvloop"}
    for row in rows:
        assert row["system"] == "agenthub"
        assert row["tasks_per_s"] > 0
        assert row["of_agenthub"] == 1
        assert set(row) >= {f"{one}_cpu_us_per_task" for one in ("requester", "server", "worker")}
    assert json.loads(json.dumps(rows)) == rows
    assert any("--rate 0" in note for note in options.notes)
    assert any(note.startswith("agenthub: ") for note in options.notes)


def test_system_without_its_program_or_package_is_left_out_with_one_line() -> None:
    options = quick()
    missing = [
        dataclasses.replace(peers.AGENTHUB, name="no-program", program="no-such-program"),
        dataclasses.replace(peers.AGENTHUB, name="no-package", packages=("json", "no_such_package")),
    ]
    assert peers.run(options, systems=missing) == []
    assert "no-program is skipped: program no-such-program not found" in options.notes
    assert "no-package is skipped: package no_such_package not found" in options.notes


def test_server_that_does_not_start_is_left_out_after_the_first_round(capfd: pytest.CaptureFixture[str]) -> None:
    @contextlib.contextmanager
    def start(loop: str, folder: Path) -> Any:
        with peers.listening((sys.executable, "-c", "raise SystemExit(1)"), peers.free_port(), "ws") as server:
            yield server

    options = dataclasses.replace(quick(), rounds=2)
    broken = dataclasses.replace(peers.AGENTHUB, name="broken", start=start, packages=())
    assert peers.run(options, systems=[broken]) == []
    lines = [note for note in options.notes if note.startswith("broken on asyncio is skipped: ")]
    assert len(lines) == 1
    assert lines[0].endswith("did not start")
    assert capfd.readouterr().err.count("broken on asyncio\n") == 1


def test_ratio_compares_with_agenthub_on_the_same_loop() -> None:
    figures = dict.fromkeys(FIGURES, 1.0)
    rounds = {"agenthub": [{**figures, "tasks_per_s": speed} for speed in (90.0, 100.0, 900.0)], "other": [], "x": []}
    rounds["other"] = [{**figures, "tasks_per_s": 250.0}]
    rows = peers.rows_of(Load(), "asyncio", rounds)
    assert [(row["system"], row["tasks_per_s"], row["of_agenthub"]) for row in rows] == [
        ("agenthub", 100, 1.0),
        ("other", 250, 2.5),
    ]
    del rounds["agenthub"]
    assert [row["of_agenthub"] for row in peers.rows_of(Load(), "asyncio", rounds)] == [None]


def test_names_of_systems_are_their_own_and_each_has_its_ends() -> None:
    assert len({system.name for system in peers.SYSTEMS}) == len(peers.SYSTEMS)
    for system in peers.SYSTEMS:
        assert (ROOT / "benchmarks" / "ends" / f"{system.end}.py").exists()
        assert system.guarantees


def test_children_of_a_process_count_with_it() -> None:
    child = "import time\nwhile time.process_time() < 0.1: pass\nprint(1, flush=True); input()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with running("-c", program) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        (pid,) = peers.descendants_of(process.pid)
        assert peers.family_cpu_s(process.pid) >= peers.family_cpu_s(pid) > 0
        process.communicate("\n", timeout=WAIT_S)


def test_what_a_worker_prints_that_never_is_ready_is_not_waited_for() -> None:
    with running("-c", "input()") as process:
        assert peers.read_line(process, 0.01) == ""


async def test_wrong_answer_and_failing_task_fail_the_measurement() -> None:
    @contextlib.asynccontextmanager
    async def requester(outputs: list[Any]) -> Any:
        async def delegate(payload: ends.Payload) -> Any:
            await asyncio.sleep(0)
            output = outputs.pop(0) if len(outputs) > 1 else outputs[0]
            if isinstance(output, Exception):
                raise output
            return output

        yield delegate

    load = Load(2, 1, seconds=0.01, warm_up_s=0.01)
    with pytest.raises(RuntimeError, match="not the input"):
        await ends.measure(requester([{"text": "y"}]), load)
    with pytest.raises(KeyError):
        await ends.measure(requester([{"text": "x"}, KeyError("gone")]), load)
    figures = await ends.measure(requester([{"text": "x"}]), load)
    assert set(figures) == {"tasks", "seconds", "cpu_s", "p50_ms", "p99_ms"}


def test_nothing_that_came_back_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no task ended"):
        ends.figures_of([], 1.0, 0.5)


def test_end_says_how_it_is_called() -> None:
    command = [sys.executable, "-m", "benchmarks.ends.agenthub", "requester"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2
    assert "--url" in done.stderr


@pytest.mark.long
def test_sdk_is_measured_at_both_ends_and_in_memory() -> None:
    for package in ("pydantic", "websockets"):
        pytest.importorskip(package, reason="the load on the SDK asks for it")
    rows = sdk.run(quick())
    assert {row["part"] for row in rows} == {*sdk.HANDLERS, *sdk.REQUESTERS}
    assert all(row["tasks_per_s"] > 0 for row in rows)
    assert json.loads(json.dumps(rows)) == rows
