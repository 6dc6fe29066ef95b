"""Run as a program, vendored or renamed, the module is imported once, and isinstance works."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import agenthub
from tests.support import ROOT, WAIT_S, hub_process, running

posix_only = pytest.mark.skipif(os.name != "posix", reason="ends the agent with a signal that Windows does not have")

# An agent that reports whether its classes are those of the program that runs it.
WORKER = """
import sys
from {module} import Agent, TaskFailed, capability
import {module} as mine

class Worker(Agent):
    @capability
    def report(self) -> dict:
        copies = [one for one in list(sys.modules.values()) if getattr(one, "__file__", None) == mine.__file__]
        names = sorted({{one.__name__ for one in copies}} - {{"__main__"}})
        return {{"is_agent": isinstance(self, mine.Agent), "names": names, "module": type(self).__mro__[1].__module__}}

    @capability
    def fail(self):
        raise TaskFailed("as it should", code="own-code")
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with hub_process() as (url, _):
        yield url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project with a vendored and a renamed copy, and without access to the original."""
    vendor = tmp_path / "package" / "vendor"
    vendor.mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").touch()
    (vendor / "__init__.py").touch()
    shutil.copy(agenthub.__file__, vendor / "agenthub.py")
    shutil.copy(agenthub.__file__, tmp_path / "renamed_hub.py")
    return tmp_path


def call(url: str, capability: str) -> subprocess.CompletedProcess[str]:
    """Run `call` repeatedly until an agent offers the capability."""
    last = time.monotonic() + WAIT_S
    while True:
        done = subprocess.run(
            [sys.executable, "-m", "agenthub", "call", capability, "--url", url],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            timeout=WAIT_S,
        )
        if "no online agent offers" not in done.stderr or time.monotonic() > last:
            return done


@posix_only
@pytest.mark.parametrize(
    ("start", "module"),
    [
        (["-m", "package.vendor.agenthub"], "package.vendor.agenthub"),
        pytest.param(["-m", "renamed_hub"], "renamed_hub", marks=pytest.mark.long),
        (["renamed_hub.py"], "renamed_hub"),
        pytest.param(["-m", "agenthub"], "agenthub", marks=pytest.mark.long),
        pytest.param([str(ROOT / "agenthub.py")], "agenthub", marks=pytest.mark.long),
    ],
    ids=["vendored", "renamed", "renamed script", "installed", "script"],
)
def test_copy_that_runs_is_the_one_that_is_imported(start: list[str], module: str, folder: Path, url: str) -> None:
    (folder / "worker.py").write_text(WORKER.format(module=module))
    environment: dict[str, Any] = {"AGENTHUB_URL": url}
    if module != "agenthub":
        environment["PYTHONPATH"] = ""
    with running(*start, "agent", "worker.py", cwd=folder, env=environment) as process:
        done = call(url, "report")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"is_agent": True, "names": [module], "module": module}
        done = call(url, "fail")
        assert (done.returncode, done.stderr.partition(" (")[2]) == (1, "own-code): as it should\n")
        process.send_signal(signal.SIGTERM)
        _, complaint = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, complaint


@pytest.mark.parametrize("start", [["-m", "package.vendor.agenthub"], ["renamed_hub.py"]])
def test_copy_runs_a_hub(start: list[str], folder: Path) -> None:
    with running(*start, "hub", "--port", "0", cwd=folder, env={"PYTHONPATH": ""}) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("listening on ws://127.0.0.1:")


@pytest.mark.parametrize("start", [["-S", "agenthub.py"], ["-m", "package.vendor.agenthub"]], ids=["alone", "vendored"])
@pytest.mark.parametrize(
    ("command", "what", "file"), [("bridge", "the bridge", "agenthub_mcp"), ("a2a", "the A2A gateway", "agenthub_a2a")]
)
def test_copy_without_an_extra_says_that_it_is_a_file_of_its_own(
    start: list[str], command: str, what: str, file: str, folder: Path
) -> None:
    """For the lone copy, -S hides an installed extra."""
    shutil.copy(agenthub.__file__, folder / "agenthub.py")
    with running(*start, command, cwd=folder, env={"PYTHONPATH": ""}) as process:
        output, complaint = process.communicate(timeout=WAIT_S)
        assert (process.returncode, output) == (1, "")
        assert complaint == f"agenthub: {what} is a separate file: copy {file}.py next to agenthub.py\n"


@pytest.mark.parametrize(
    "start",
    [
        ["-m", "package.vendor.agenthub", "bridge"],
        pytest.param(["-m", "package.vendor.agenthub_mcp"], marks=pytest.mark.long),
        pytest.param(["-m", "agenthub", "bridge"], marks=pytest.mark.long),
        pytest.param(["-m", "agenthub_mcp"], marks=pytest.mark.long),
        pytest.param(["agenthub.py", "bridge"], marks=pytest.mark.long),
        pytest.param(["agenthub_mcp.py"], marks=pytest.mark.long),
    ],
    ids=" ".join,
)
def test_bridge_beside_a_copy_runs_with_it(start: list[str], folder: Path) -> None:
    pytest.importorskip("mcp")
    bridge = Path(agenthub.__file__).with_name("agenthub_mcp.py")
    for copy in (folder, folder / "package" / "vendor"):
        shutil.copy(agenthub.__file__, copy / "agenthub.py")
        shutil.copy(bridge, copy)
    with running(*start, "--http", "70000", cwd=folder, env={"PYTHONPATH": ""}) as process:
        output, complaint = process.communicate(timeout=WAIT_S)
        assert (process.returncode, output) == (2, "")
        assert "agenthub bridge: error: --http must be from 0 to 65535; " in complaint.splitlines()[-1]


@pytest.mark.parametrize(("command", "package"), [("bridge", "mcp"), ("a2a", "a2a-sdk")])
def test_extra_without_its_package_says_what_to_install(command: str, package: str, folder: Path) -> None:
    for path in (Path(agenthub.__file__), *Path(agenthub.__file__).parent.glob("agenthub_*.py")):
        shutil.copy(path, folder)
    with running("-S", "agenthub.py", command, cwd=folder, env={"PYTHONPATH": ""}) as process:
        output, complaint = process.communicate(timeout=WAIT_S)
        assert (process.returncode, output) == (1, "")
        assert complaint.count("\n") == 1
        assert "pip install" in complaint
        assert package in complaint


def test_agent_of_another_copy_is_not_taken_for_one(folder: Path) -> None:
    """It would not work: the error names the copy whose agents were searched."""
    (folder / "worker.py").write_text("from renamed_hub import Agent\nagent = Agent('other')\n")
    with running("-m", "package.vendor.agenthub", "agent", "worker.py", cwd=folder, env={"PYTHONPATH": ""}) as process:
        _, complaint = process.communicate(timeout=WAIT_S)
        assert process.returncode == 1
        assert complaint == "agenthub: worker.py: defines no Agent of package.vendor.agenthub, nor a subclass of it\n"


def test_agent_runs_itself_with_a_vendored_copy(folder: Path, url: str) -> None:
    (folder / "program.py").write_text(
        "import asyncio\n"
        "from package.vendor.agenthub import Agent\n"
        "async def main():\n"
        "    async with Agent('me') as me:\n"
        "        print(len(await me.discover('me')), type(me).__module__)\n"
        "asyncio.run(main())\n"
    )
    with running("program.py", cwd=folder, env={"PYTHONPATH": "", "AGENTHUB_URL": url}) as process:
        output, complaint = process.communicate(timeout=WAIT_S)
        assert (process.returncode, output, complaint) == (0, "0 package.vendor.agenthub\n", "")
