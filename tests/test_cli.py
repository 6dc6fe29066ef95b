"""Section 9, the command line: in this process where possible, otherwise as a user starts it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agenthub
from agenthub import Agent, LocalHub, TaskFailed, TaskTimeout
from tests.support import WAIT_S, agenthub_main, hub_process, running

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs signals, process groups or a POSIX shell")

HELPER = """
import asyncio
from agenthub import Agent, Task

agent = Agent("helper", description="Helps \\x1b[31mall\\x1b[0m\\nof us\\x9b1m")

@agent.capability
async def echo(task: Task):
    return task.input

@agent.capability
async def fail():
    raise ValueError("went \\x1b[31mwrong\\nbadly")

@agent.capability
async def slow(task: Task):
    task.progress(0.5, "half\\x1b[2Jway")
    await asyncio.sleep(60)

@agent.capability
async def steps(task: Task):
    task.progress(0.5, "half\\x1b[2Jway")
    task.progress(None, {"left": 1})
    await asyncio.sleep(0.2)
    return "done"
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a hub with the helper in its process; return its URL."""
    path = tmp_path_factory.mktemp("helper") / "helper.py"
    path.write_text(HELPER)
    with hub_process("--with", str(path)) as (url, _):
        yield url


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Point to this module's hub, and undo the imports of agents' files."""
    if "url" in request.fixturenames:
        monkeypatch.setenv("AGENTHUB_URL", request.getfixturevalue("url"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and "site-packages" not in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def complaint_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line on stderr, after checking that stdout is empty."""
    output, complaint = capsys.readouterr()
    assert output == ""
    assert complaint.count("\n") == 1, complaint
    return complaint


def finished(process: subprocess.Popen[str], timeout_s: float = WAIT_S) -> tuple[int, str, str]:
    """Wait until a process ends; return its exit code and what it wrote."""
    output, complaint = process.communicate(timeout=timeout_s)
    return process.returncode, output, complaint or ""


def tasks_at(url: str, capsys: pytest.CaptureFixture[str], capability: str) -> list[dict[str, Any]]:
    """Return the hub's list of the tasks of a capability, newest first."""
    capsys.readouterr()
    assert agenthub_main("status", "--json", "--url", url) == 0
    listed = json.loads(capsys.readouterr().out)["tasks"]
    return [task for task in listed if task["capability"] == capability]


def not_to_be_called(*_: Any, **__: Any) -> None:
    pytest.fail("it has started all the same")


def wait_for(condition: Callable[[], Any]) -> Any:
    """Poll `condition` until it is true, for up to WAIT_S; return its result."""
    last = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < last
        time.sleep(0.02)
    return found


# All commands

COMMANDS = ("hub", "agent", "status", "call", "bridge", "schema", "token")


def test_version_is_that_of_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("--version") == 0
    assert capsys.readouterr().out == f"agenthub {agenthub.__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("--help") == 0
    output = capsys.readouterr().out
    assert re.findall(r"^    (\w+) ", output, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main(command, "--help") == 0
    output = capsys.readouterr().out
    assert f"usage: agenthub {command}" in output
    for option in re.findall(r"^  (-.*)$", output, re.MULTILINE):
        assert re.search(r"\s{2,}\S", option) or f"{option}\n{' ' * 20}" in output, option


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["no-such-command"],
        ["hub", "--no-such-option"],
        ["call"],
        ["hub", "--port", "x"],
        ["hub", "--db"],
        ["hub", "--db", "hub.db", "--sync", "off"],
        ["hub", "--max-connections", "many"],
        ["status", "x"],
        ["bridge", "x"],
        ["bridge", "--http"],
        ["bridge", "--http", "x"],
        ["bridge", "--serve"],
        ["bridge", "--http", "0", "--serve", "x"],
        ["bridge", "--max-tasks", "x"],
    ],
)
def test_wrong_usage_is_exit_code_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main(*argv) == 2
    assert "usage: agenthub" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["hub", "--port", "-1"],
        ["hub", "--port", "65536"],
        ["hub", "--heartbeat", "0"],
        ["hub", "--grace", "-1"],
        ["hub", "--retention", "nan"],
        ["hub", "--max-bytes", "10"],
        ["hub", "--backlog", "-1"],
        ["hub", "--max-open-tasks", "0"],
        ["hub", "--max-pending-tasks", "-1"],
        ["hub", "--max-agents", "0"],
        ["hub", "--max-connections", "0"],
        ["status", "--url", "http://127.0.0.1:1"],
        ["call", "echo", "--url", "127.0.0.1:1"],
        ["agent", "x.py", "--url", ""],
        ["agent"],
        ["agent", "x.py", "--exec", "cat"],
        ["agent", "--exec", "cat"],
        ["agent", "--exec", "cat", "--name", "cat"],
        ["agent", "--exec", "cat", "--capability", "cat"],
        ["agent", "--exec", "cat", "--name", "cat", "--capability", "cat", "--max-tasks", "0"],
        ["call", "echo", "{not json"],
        ["call", "echo", "NaN"],
        ["call", "echo", "[" * 1000],
        ["call", "echo", ""],
        ["call", "echo", "--ttl", "0"],
        ["call", "echo", "--ttl", "nan"],
    ],
)
def test_wrong_value_is_exit_code_two(
    argv: list[str], url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agenthub, "_serve_hub", not_to_be_called)
    assert agenthub_main(*argv) == 2
    assert "agenthub: error: " in capsys.readouterr().err.splitlines()[-1]


def test_bounds_and_the_journal_of_the_command_line_reach_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: list[agenthub.HubServer] = []

    async def note(server: agenthub.HubServer, agents: list[Agent], reload: object) -> None:
        servers.append(server)

    monkeypatch.setattr(agenthub, "_serve_hub", note)
    db = tmp_path / "hub.db"
    bounds = ["--max-open-tasks", "1", "--max-pending-tasks", "2", "--max-agents", "3", "--max-connections", "4"]
    bounds += ["--max-capabilities", "5", "--max-metadata-bytes", "6"]
    assert agenthub_main("hub", *bounds, "--db", str(db), "--sync", "normal") == 0
    assert agenthub_main("hub", "--db", str(db)) == 0
    assert agenthub_main("hub") == 0
    told = agenthub.HubSettings(
        open_tasks_max=1,
        pending_tasks_max=2,
        agents_max=3,
        connections_max=4,
        capabilities_max=5,
        metadata_bytes_max=6,
    )
    assert [server.settings for server in servers] == [told, agenthub.HubSettings(), agenthub.HubSettings()]
    journals = [server._journal and (server._journal.path, server._journal.sync) for server in servers]
    assert journals == [(str(db), "normal"), (str(db), "full"), None]
    assert not db.exists()  # Nothing is created before the hub starts.


@pytest.mark.parametrize("argv", [["status"], ["status", "--json"], ["status", "--watch"], ["call", "echo", "1"]])
def test_hub_that_is_not_there_is_one_line(
    argv: list[str], unused_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert agenthub_main(*argv, "--url", f"ws://127.0.0.1:{unused_port}") == 1
    assert complaint_of(capsys).startswith(f"agenthub: no hub at ws://127.0.0.1:{unused_port}")


def test_environment_says_where_the_hub_is(
    unused_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AGENTHUB_URL", f"ws://127.0.0.1:{unused_port}")
    assert agenthub_main("status") == 1
    assert f":{unused_port}" in complaint_of(capsys)


def test_option_goes_before_the_environment(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AGENTHUB_URL", "ws://127.0.0.1:9")
    assert agenthub_main("call", "echo", "1", "--url", url) == 0
    assert capsys.readouterr().out == "1\n"


@pytest.mark.parametrize("argv", [["status"], ["call", "echo", "1"], ["agent", "helper.py"]])
@pytest.mark.parametrize("token", ["two words", "two\nlines"])
def test_token_that_cannot_be_sent_is_wrong_usage(
    argv: list[str],
    token: str,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "helper.py").write_text(HELPER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGENTHUB_TOKEN", token)
    assert agenthub_main(*argv) == 2
    output, complaint = capsys.readouterr()
    assert output == ""
    usage, error = complaint.splitlines()
    assert usage.startswith("usage: agenthub")
    assert error == "agenthub: error: AGENTHUB_TOKEN: must be printable ASCII without spaces"


def test_token_is_no_obstacle_to_a_hub_that_wants_none(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AGENTHUB_TOKEN", "t0ken")
    assert agenthub_main("call", "echo", "1") == 0
    assert capsys.readouterr().out == "1\n"


def test_schema_is_valid_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"].endswith("2020-12/schema")
    assert {"Register", "Delegate", "TaskOutcome", "HeartbeatAck"} <= set(schema["$defs"])


@posix_only
@pytest.mark.parametrize("argv", [["schema"], ["call", "echo", "1"], ["status"]])
def test_reader_that_goes_away_is_no_traceback(argv: list[str], url: str) -> None:
    with running("-m", "agenthub", *argv, env={"AGENTHUB_URL": url}) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.wait(WAIT_S)
        assert process.stderr.read() == ""
        process.stdout = None


# hub


def test_taken_port_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = url.rpartition(":")[2]
    assert agenthub_main("hub", "--port", port) == 1
    assert (
        complaint_of(capsys)
        == f"agenthub: cannot listen on ws://127.0.0.1:{port}: Address already in use; try another --host or --port\n"
    )


def test_address_that_is_none_is_one_line_that_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("hub", "--host", "no such host", "--insecure", "--port", "0") == 1
    complaint = complaint_of(capsys)
    assert "no such host" in complaint
    assert "Unknown error" not in complaint
    assert "Success" not in complaint


@posix_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_hub(number: signal.Signals) -> None:
    with hub_process(stderr=subprocess.PIPE) as (_, process):
        process.send_signal(number)
        code, output, complaint = finished(process, 5)
        assert (code, output) == (0, "")
        assert "Traceback" not in complaint


@posix_only
@pytest.mark.parametrize("count", [1, 2])
def test_signal_ends_a_hub_with_work_in_progress(tmp_path: Path, count: int) -> None:
    path = tmp_path / "helper.py"
    path.write_text(HELPER)
    with hub_process("--with", str(path), stderr=subprocess.PIPE) as (url, process):
        assert agenthub_main("call", "slow", "--no-wait", "--url", url) == 0
        for _ in range(count):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        code, output, complaint = finished(process, 5)
        assert "Traceback" not in complaint
        assert output == ""
        assert code == (0 if count == 1 else 130)


@posix_only
@pytest.mark.parametrize("has_handlers", [True, False], ids=["unix", "windows"])
async def test_signal_handler_is_called_each_time_and_removed_afterwards(
    has_handlers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loops of Windows have no signal handlers, and not every system has every signal."""

    def not_implemented(*_: Any) -> None:
        raise NotImplementedError

    if not has_handlers:
        monkeypatch.setattr(asyncio.get_running_loop(), "add_signal_handler", not_implemented)
    former = signal.getsignal(signal.SIGUSR1)
    received = asyncio.Event()
    with agenthub.signal_handler(received.set, "SIGNONE", "SIGUSR1"):
        for _ in range(2):
            received.clear()
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.wait_for(received.wait(), WAIT_S)
    assert signal.getsignal(signal.SIGUSR1) == former


async def test_signals_are_left_alone_outside_the_main_thread() -> None:
    async def is_stopped() -> bool:
        with agenthub.stop_signals() as stopped:
            return stopped.is_set()

    assert not await asyncio.to_thread(asyncio.run, is_stopped())


def test_hub_runs_agents_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two files may have the same name in different folders; a NAME picks one of several agents."""
    targets = []
    for folder in ("one", "other"):
        path = tmp_path / folder / "worker.py"
        path.parent.mkdir()
        path.write_text(
            "from agenthub import Agent\n"
            f"first, second = Agent('first-{folder}'), Agent('second-{folder}')\n"
            f"second.capability('{folder}')(lambda: '{folder}')\n"
        )
        targets += ["--with", f"{path}:second"]
    with hub_process(*targets) as (url, _):
        for folder in ("one", "other"):
            wait_for(lambda folder=folder: agenthub_main("call", folder, "--url", url) == 0)
        capsys.readouterr()
        assert agenthub_main("status", "--json", "--url", url) == 0
        agents = json.loads(capsys.readouterr().out)["agents"]
        assert sorted(one["name"] for one in agents) == ["second-one", "second-other"]


def test_file_that_is_not_there_keeps_the_hub_from_starting(capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("hub", "--port", "0", "--with", "no-such-file.py") == 1
    assert complaint_of(capsys) == "agenthub: no-such-file.py: no such file\n"


@posix_only
def test_agent_of_a_file_that_the_hub_refuses_is_told(tmp_path: Path) -> None:
    path = tmp_path / "worker.py"
    path.write_text(
        "from agenthub import Agent\n"
        "agent = Agent('worker', metadata={'too': 'x' * 500})\n"
        "agent.capability('work')(lambda: 1)\n"
    )
    with hub_process("--with", str(path), "--max-metadata-bytes", "100", stderr=subprocess.PIPE) as (_, process):
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, _, complaint = finished(process, 5)
        assert "metadata" in complaint


# agent: finding agents in files

TWO = """
from agenthub import Agent, capability

class First(Agent):
    @capability
    def work(self): ...

class Second(First):
    pass
"""


def names(target: str) -> list[str]:
    return [agent.name for agent in agenthub.load_agents(target)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.py").write_text(TWO)
    (tmp_path / "instances.py").write_text(f"{TWO}\none = Agent('one')\nsame = one\nother = First('other')\n")
    (tmp_path / "imports.py").write_text("import classes\nfrom classes import First\nclass Own(First): ...\n")
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "module.py").write_text("from classes import First\nagent = First('in a package')\n")
    (tmp_path / "broken.py").write_text("import no_such_module_at_all\n")
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("classes.py", ["first", "second"]),
        ("classes.py:First", ["first"]),
        ("./classes.py:Second", ["second"]),
        ("instances.py", ["one", "other"]),
        ("instances.py:other", ["other"]),
        ("instances.py:First", ["first"]),
        ("imports.py", ["own"]),
        ("imports.py:First", ["first"]),
        ("classes", ["first", "second"]),
        ("classes:First", ["first"]),
        ("package.module:agent", ["in a package"]),
        ("package.module", ["in a package"]),
    ],
)
def test_agents_are_found(target: str, found: list[str]) -> None:
    assert names(target) == found


def test_agents_are_found_by_an_absolute_path(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert names(f"{folder}/imports.py:Own") == ["own"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("empty.py", "empty.py: defines no Agent of agenthub, nor a subclass of it"),
        ("empty.py:x", "empty.py:x: defines no Agent of agenthub, nor a subclass of it"),
        ("classes.py:Third", "classes.py:Third: defines no Agent of agenthub, nor a subclass of it"),
        ("no-such-file.py", "no-such-file.py: no such file"),
        ("no-such-file.py:agent", "no-such-file.py: no such file"),
        ("no_such_module:agent", "no_such_module: No module named 'no_such_module'"),
        ("no_such_package.module:agent", "no_such_package.module: No module named 'no_such_package'"),
        ("package", "package: defines no Agent of agenthub, nor a subclass of it"),
        ("", ""),
        (":", ""),
        ("..:x", ""),
        ("folder/", ""),
    ],
)
def test_nothing_found_is_one_line(
    target: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agenthub, "serve", not_to_be_called)
    assert agenthub_main("agent", target) in (1, 2)
    assert text in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("folder")
def test_error_in_a_file_is_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        agenthub_main("agent", "broken.py")


@posix_only
def test_agents_of_a_file_run_until_a_signal(tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "worker.py"
    path.write_text("from agenthub import Agent\nagent = Agent('own')\nagent.capability('own')(lambda: 'mine')\n")
    with running("-m", "agenthub", "agent", str(path), env={"AGENTHUB_URL": url}) as process:
        wait_for(lambda: agenthub_main("call", "own") == 0)
        assert capsys.readouterr().out == '"mine"\n'
        process.send_signal(signal.SIGTERM)
        code, output, complaint = finished(process)
        assert (code, output) == (0, "")
        assert "joined agent=own-" in complaint
        assert "Traceback" not in complaint


# agent --exec


@contextlib.asynccontextmanager
async def shell(command: str, **options: Any) -> AsyncIterator[Agent]:
    """Run an agent with a shell command in this process; yield a requester."""
    async with LocalHub() as hub:
        worker = agenthub.exec_agent(command, "shell", ["run", "walk"], **options)
        worker.use_hub(hub)
        async with worker, Agent("requester", hub=hub) as me:
            yield me


async def ran(command: str, given: Any = None, **options: Any) -> Any:
    async with asyncio.timeout(WAIT_S), shell(command) as me:
        return await me.delegate("run", given, **options)


@posix_only
@pytest.mark.parametrize(
    ("command", "given", "output"),
    [
        ("cat", {"a": [1, None, "é"]}, {"a": [1, None, "é"]}),
        ("cat", None, None),
        ("echo hello", None, "hello\n"),
        ("true", "not read", ""),
        ("true", "not read" * 100_000, ""),
        ("printf NaN", None, "NaN"),
        ("printf '[1, 2'", None, "[1, 2"),
        ("printf '%0.s[' $(seq 200)", None, "[" * 200),
        (r"printf '\377'", None, "\ufffd"),
        ("printf '  7 \n'", None, 7),
        ("wc -c", "x" * 500_000, 500_002),
        ("exec 0<&- ; sleep 0.1; echo 1", "x" * 500_000, 1),
        ("cat >/dev/null; seq 20000 >&2; echo 1", None, 1),
        ('echo "\\"$AGENTHUB_CAPABILITY $AGENTHUB_ATTEMPT\\""', None, "run 1"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_program_does_a_task(command: str, given: Any, output: Any) -> None:
    assert await ran(command, given) == output


@posix_only
async def test_program_is_told_the_id_of_its_task() -> None:
    assert await ran("echo $AGENTHUB_TASK_ID", task_id="this-one") == "this-one\n"


@posix_only
@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("echo wrong >&2; exit 3", "exit code 3: wrong"),
        ("exit 3", "exit code 3"),
        ("no-such-command-at-all 2>/dev/null", "exit code 127"),
        ("kill -9 $$", "exit code -9"),
    ],
)
async def test_program_that_fails_fails_its_task(command: str, text: str) -> None:
    with pytest.raises(TaskFailed) as caught:
        await ran(command)
    assert (caught.value.code, caught.value.message) == ("failed", text)


@posix_only
async def test_end_of_stderr_is_told() -> None:
    with pytest.raises(TaskFailed) as caught:
        await ran("seq 100000 >&2; exit 1")
    assert caught.value.message.endswith("\n99999\n100000")
    assert len(caught.value.message) < 5000


@posix_only
async def test_output_too_large_for_the_hub_fails_the_task() -> None:
    with pytest.raises(TaskFailed) as caught:
        await ran("head -c 2000000 /dev/zero | tr '\\0' x")
    assert caught.value.code == "too_large"


@posix_only
async def test_program_that_says_too_much_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "CLIENT_MESSAGE_BYTES_MAX", 1_000_000)
    with pytest.raises(TaskFailed) as caught:
        await ran("yes")
    assert caught.value.code == "too_large"
    gc.collect()  # A pipe that was left open raises a warning now.


@posix_only
async def test_programs_run_side_by_side(tmp_path: Path) -> None:
    """Both wait for each other."""
    os.mkfifo(tmp_path / "pipe")
    pipe = shlex.quote(str(tmp_path / "pipe"))
    async with shell(f"if [ $AGENTHUB_CAPABILITY = run ]; then echo 1 > {pipe}; else cat {pipe}; fi") as me:
        outputs = await asyncio.wait_for(asyncio.gather(me.delegate("run"), me.delegate("walk")), WAIT_S)
    assert outputs == ["", 1]


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return not state.startswith("Z") and state != ""


async def pid_in(path: Path) -> int:
    return await asyncio.to_thread(
        wait_for, lambda: path.exists() and path.read_text().endswith("\n") and int(path.read_text())
    )


async def until_dead(pid: int) -> None:
    async with asyncio.timeout(5):
        while is_alive(pid):
            await asyncio.sleep(0.02)


# A shell whose child does the work: the child must not outlive the task.
GRANDCHILD = "sleep 60 & echo $! > {path}; wait"
# A process that ignores SIGTERM.
STUBBORN = "trap '' TERM; echo $$ > {path}; while :; do sleep 0.1; done"
# A process that leaves a grandchild behind.
LEAVING = "sleep 60 >/dev/null 2>&1 & echo $! > {path}"


@posix_only
@pytest.mark.parametrize("command", [GRANDCHILD, STUBBORN], ids=["grandchild", "stubborn"])
@pytest.mark.parametrize("ends", ["cancelled", "expired", "stopped"])
async def test_end_of_a_task_ends_its_processes(tmp_path: Path, command: str, ends: str) -> None:
    path = tmp_path / "pid"
    async with shell(command.format(path=shlex.quote(str(path)))) as me:
        handle = await me.submit("run", ttl=0.5 if ends == "expired" else 60)
        pid = await pid_in(path)
        assert is_alive(pid)
        if ends == "cancelled":
            await handle.cancel()
            await until_dead(pid)
        elif ends == "expired":
            with pytest.raises(TaskTimeout):
                await handle.result()
            await until_dead(pid)
    await until_dead(pid)


@posix_only
async def test_agent_that_stops_while_it_ends_a_program_still_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    async with shell(STUBBORN.format(path=shlex.quote(str(path)))) as me:
        handle = await me.submit("run")
        pid = await pid_in(path)
        await handle.cancel()
        await asyncio.sleep(0.1)  # SIGTERM is sent, and SIGKILL is not due yet.
    await until_dead(pid)


@posix_only
async def test_what_a_program_leaves_behind_ends_with_its_task(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    assert await ran(LEAVING.format(path=shlex.quote(str(path)))) == ""
    await until_dead(await pid_in(path))


@posix_only
def test_program_is_run_by_the_command_line(tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pid"
    command = f"echo $$ > {shlex.quote(str(path))}; read line; echo $line; [ $line = 1 ] || sleep 60"
    options = ["--exec", command, "--name", "shell", "--capability", "sh", "--description", "Runs", "--drain", "0.1"]
    with running("-m", "agenthub", "agent", *options, env={"AGENTHUB_URL": url}) as process:
        wait_for(lambda: agenthub_main("call", "sh", "1") == 0)
        assert capsys.readouterr().out == "1\n"
        path.unlink()
        assert agenthub_main("call", "sh", "2", "--no-wait") == 0
        pid = asyncio.run(pid_in(path))
        process.send_signal(signal.SIGINT)
        assert finished(process)[0] == 0
        asyncio.run(until_dead(pid))


@posix_only
async def test_second_signal_does_not_leave_programs_behind(tmp_path: Path, url: str) -> None:
    path = tmp_path / "pid"
    command = GRANDCHILD.format(path=shlex.quote(str(path)))
    options = ["--exec", command, "--name", "shell", "--capability", "sh2"]
    with running("-m", "agenthub", "agent", *options, env={"AGENTHUB_URL": url}) as process:
        async with Agent("me", url=url) as me:
            await asyncio.wait_for(me.submit("sh2", wait=True), WAIT_S)
            pid = await pid_in(path)
            process.send_signal(signal.SIGINT)
            await asyncio.sleep(0.2)
            process.send_signal(signal.SIGINT)
            code, _, complaint = await asyncio.to_thread(finished, process, 5)
            assert "Traceback" not in complaint
            assert code == 130
            await until_dead(pid)


# status


def test_status_shows_two_aligned_tables(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    agenthub_main("call", "echo", "1")
    agenthub_main("call", "fail")
    capsys.readouterr()
    assert agenthub_main("status") == 0
    head, agents, tasks = capsys.readouterr().out.rstrip("\n").split("\n\n")
    assert head.startswith(f"hub {url}, version {agenthub.__version__}, up ")
    assert agents.splitlines()[0].split() == ["AGENT", "RUNNING", "CAPABILITIES", "DESCRIPTION"]
    assert tasks.splitlines()[0].split()[:4] == ["TASK", "STATE", "CAPABILITY", "AGENT"]
    assert "failed (failed)" in tasks
    for table in (agents, tasks):
        header, *rows = table.splitlines()
        starts = [match.start() for match in re.finditer(r"(?<!\S)\S", header)]
        assert rows
        for row in rows:
            assert all(row[start - 2 : start] == "  " for start in starts[1:] if start < len(row)), row


def test_status_escapes_what_others_have_written(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("status") == 0
    output = capsys.readouterr().out
    assert r"Helps \x1b[31mall\x1b[0m\nof us\x9b1m" in output
    assert "\x1b" not in output


def test_status_as_json(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    agenthub_main("call", "echo", "1")
    capsys.readouterr()
    assert agenthub_main("status", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"hub", "agents", "tasks"}
    assert document["hub"]["version"] == agenthub.__version__
    assert [one["name"] for one in document["agents"]] == ["helper"]
    assert document["tasks"][0]["state"] == "completed"


def test_status_of_one_task(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("call", "fail", "--no-wait") == 0
    task_id = capsys.readouterr().out.strip()
    wait_for(lambda: tasks_at(url, capsys, "fail")[0]["state"] == "failed")
    assert agenthub_main("status", "--task", task_id) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (rows["task_id"], rows["state"], rows["capability"]) == (task_id, "failed", "fail")
    assert agenthub_main("status", "--json", "--task", task_id) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["task_id"], document["state"], document["code"]) == (task_id, "failed", "failed")


def test_status_of_a_task_that_is_not_there_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("status", "--task", "no-such-task") == 1
    assert complaint_of(capsys) == "agenthub: task_id: unknown to this hub; its record may have expired\n"


@posix_only
def test_watch_redraws_in_a_terminal_until_ctrl_c(url: str) -> None:
    import pty

    near, far = pty.openpty()
    try:
        with running("-m", "agenthub", "status", "--watch", "--url", url, stdout=far) as process:
            shown = b""
            while shown.count(b"\x1b[H\x1b[J") < 2:
                shown += os.read(near, 65_536)
            process.send_signal(signal.SIGINT)
            code, _, complaint = finished(process)
        assert (code, complaint) == (130, "")
        rows = shown.partition(b"AGENT")[2].partition(b"\x1b[H")[0].split(b"\r\n")
        assert all(len(row) <= 80 for row in rows)
    finally:
        os.close(near)
        os.close(far)


@posix_only
def test_watch_without_a_terminal_says_it_again(url: str) -> None:
    with running("-m", "agenthub", "status", "--watch", "--url", url) as process:
        assert process.stdout is not None
        count = 0
        while count < 2:
            line = process.stdout.readline()
            assert "\x1b" not in line
            count += line.startswith("hub ")
        process.send_signal(signal.SIGINT)
        code, _, complaint = finished(process)
    assert (code, complaint) == (130, "")


# call


@pytest.mark.parametrize("text", ["null", "1", '"é"', "[]", '{\n  "a": [\n    1,\n    2\n  ]\n}'])
def test_call_prints_the_output_as_json(text: str, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("call", "echo", text) == 0
    assert capsys.readouterr() == (f"{text}\n", "")


def test_call_without_input_gives_null(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("call", "echo") == 0
    assert capsys.readouterr().out == "null\n"


def test_call_reads_its_input_from_stdin(url: str) -> None:
    with running("-m", "agenthub", "call", "echo", "-", env={"AGENTHUB_URL": url}) as process:
        output, complaint = process.communicate('{"é": 1}', timeout=WAIT_S)
        assert (process.returncode, json.loads(output), complaint) == (0, {"é": 1}, "")


def test_call_prints_anything_on_any_terminal(url: str) -> None:
    """A terminal that knows only ASCII gets escapes."""
    environment = {"AGENTHUB_URL": url, "PYTHONIOENCODING": "ascii"}
    with running("-m", "agenthub", "call", "echo", '"\\u00e9\\ud83d\\ude00"', env=environment) as process:
        code, output, complaint = finished(process)
        assert (code, complaint) == (0, "")
        assert json.loads(output) == "é😀"


def test_output_cannot_steer_the_terminal(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("call", "echo", r'"\u001b[2J \u009b2J \u007f \u202e"') == 0
    output = capsys.readouterr().out
    assert json.loads(output) == "\x1b[2J \x9b2J \x7f \u202e"
    assert output.rstrip("\n").isprintable()


def test_call_of_one_agent(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    agenthub_main("status", "--json")
    (agent,) = json.loads(capsys.readouterr().out)["agents"]
    assert agenthub_main("call", "echo", "1", "--agent", agent["agent_id"]) == 0
    assert capsys.readouterr().out == "1\n"
    assert agenthub_main("call", "echo", "1", "--agent", "nobody") == 1
    assert complaint_of(capsys) == 'agenthub: no online agent has that agent_id; discover one, or set "wait"\n'


def test_call_of_what_nobody_can_do_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("call", "no-such-thing") == 1
    assert complaint_of(capsys) == 'agenthub: no online agent offers "no-such-thing"; start one, or set "wait"\n'


def test_failed_task_is_one_line_with_its_text(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("call", "fail") == 1
    assert complaint_of(capsys) == "agenthub: ValueError: went \\x1b[31mwrong\\nbadly\n"


def test_expired_task_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("call", "slow", "--ttl", "0.2") == 1
    assert complaint_of(capsys) == "agenthub: its time to live of 0.2 s has expired\n"


def test_call_that_does_not_wait_prints_the_id_and_leaves_the_task(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert agenthub_main("call", "steps", "--no-wait") == 0
    task_id = capsys.readouterr().out.strip()
    task = wait_for(lambda: [one for one in tasks_at(url, capsys, "steps") if one["state"] == "completed"])[0]
    assert task["task_id"] == task_id


@posix_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_calls_the_task_off(number: signal.Signals, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = len(tasks_at(url, capsys, "slow"))
    with running("-m", "agenthub", "call", "slow", env={"AGENTHUB_URL": url}) as process:
        wait_for(lambda: len(tasks_at(url, capsys, "slow")) > before)
        process.send_signal(number)
        assert finished(process) == (130, "", "")
    task = tasks_at(url, capsys, "slow")[0]
    assert (task["state"], task["code"]) == ("failed", "cancelled")


@posix_only
def test_ctrl_c_ends_a_call_that_waits_for_a_hub_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}"
        with running("-m", "agenthub", "call", "echo", env={"AGENTHUB_URL": url}) as process:
            connection, _ = silent.accept()
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            assert finished(process, 3) == (130, "", "")
            connection.close()


@posix_only
def test_hub_that_goes_away_during_a_call_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "helper.py"
    path.write_text(HELPER)
    with hub_process("--with", str(path)) as (url, hub), running("-m", "agenthub", "call", "slow", "--url", url) as one:
        wait_for(lambda: tasks_at(url, capsys, "slow"))
        hub.kill()
        code, output, complaint = finished(one)
        assert (code, output) == (1, "")
        assert re.fullmatch(r"agenthub: .*the hub.*\n", complaint)


@posix_only
def test_progress_is_shown_in_a_terminal_only(url: str) -> None:
    import pty

    near, far = pty.openpty()
    try:
        with running("-m", "agenthub", "call", "steps", env={"AGENTHUB_URL": url}, stderr=far) as process:
            assert finished(process)[:2] == (0, '"done"\n')
        assert os.read(near, 65_536).splitlines() == [b" 50% half\\x1b[2Jway", b'     {"left": 1}']
    finally:
        os.close(near)
        os.close(far)
    with running("-m", "agenthub", "call", "steps", env={"AGENTHUB_URL": url}) as process:
        assert finished(process) == (0, '"done"\n', "")


# bridge: its work is tested in test_mcp.py

TOOLS = shlex.join([sys.executable, "examples/claude_code/tools.py"])


def test_help_of_the_bridge_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("bridge", "--help") == 0
    output = capsys.readouterr().out
    options = re.findall(r"^  (--[\w-]+)", output, re.MULTILINE)
    assert options == [
        "--log-level",
        "--http",
        "--serve",
        "--name",
        "--prefix",
        "--max-tasks",
        "--url",
        "--token-file",
        "--ca-file",
    ]
    assert "[--http PORT | --serve COMMAND]" in " ".join(output.split())


def test_help_of_the_hub_groups_its_options_and_shows_the_defaults_of_its_settings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert agenthub_main("hub", "--help") == 0
    output = capsys.readouterr().out
    groups = ["options", "listening", "access", "persistence", "process", "times", "limits"]
    assert re.findall(r"^(\w+):$", output, re.MULTILINE) == groups
    settings = agenthub.HubSettings()
    names = ["message_bytes", "open_tasks", "pending_tasks", "agents", "connections", "capabilities", "metadata_bytes"]
    limits = [str(getattr(settings, f"{name}_max")) for name in names]
    connection = [str(agenthub.CONNECTIONS_PER_ADDRESS_MAX), str(agenthub.BACKLOG_BYTES_MAX), "2000"]
    shown = re.findall(r"\(default: ([^)]*)\)", " ".join(output.split()))
    assert shown == ["info", "127.0.0.1", "8765", "full", "auto", "30", "60", "3600", *limits, *connection]
    assert output.count("; repeatable") == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_no_default_that_is_none(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AGENTHUB_URL", "ws://127.0.0.1:1/%41")
    assert agenthub_main(command, "--help") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert not re.search(r"\(default: (None|False|\[\]|)\)", output)
    assert ("(default: ws://127.0.0.1:1/%41)" in output) == (command in ("agent", "status", "call", "bridge"))


def test_bridge_goes_one_way_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("bridge", "--http", "0", "--serve", "cat") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "agenthub bridge: error: argument --serve: not allowed with argument --http"


@pytest.mark.parametrize(
    "argv",
    [
        ["--http", "70000"],
        ["--http", "-1"],
        ["--serve", ""],
        ["--serve", "'"],
        ["--url", "http://127.0.0.1:1"],
        ["--http", "0", "--url", "http://127.0.0.1:1"],
        ["--serve", TOOLS, "--url", "http://127.0.0.1:1"],
    ],
)
def test_wrong_value_for_the_bridge_is_wrong_usage(argv: list[str]) -> None:
    pytest.importorskip("mcp")
    with running("-m", "agenthub", "bridge", *argv) as process:
        code, output, complaint = finished(process)
    assert (code, output) == (2, "")
    assert complaint.splitlines()[-1].startswith("agenthub: error: ")
    assert "Traceback" not in complaint


@pytest.mark.parametrize("argv", [[], ["--http", "0"], ["--serve", TOOLS]])
def test_token_that_cannot_be_sent_is_wrong_usage_of_the_bridge(argv: list[str]) -> None:
    pytest.importorskip("mcp")
    with running("-m", "agenthub", "bridge", *argv, env={"AGENTHUB_TOKEN": "two words"}) as process:
        code, output, complaint = finished(process, 5)
    assert (code, output) == (2, "")
    assert complaint.splitlines()[-1] == "agenthub: error: AGENTHUB_TOKEN: must be printable ASCII without spaces"


# The tables.


def test_table_pads_its_columns_and_leaves_no_blanks_at_the_end() -> None:
    assert agenthub.table([["A", "LONG"], ["aaa", "b"], ["a", ""]]) == "A    LONG\naaa  b\na"


@pytest.mark.parametrize(
    ("text", "shown"), [("a\tb", r"a\tb"), ("\x1b[31m", r"\x1b[31m"), ("\u202e", r"\u202e"), ("é 漢", "é 漢")]
)
def test_foreign_text_is_made_printable(text: str, shown: str) -> None:
    assert agenthub.escape_unprintable(text) == shown


def test_journal_in_memory_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("hub", "--port", "0", "--db", ":memory:") == 2
    assert "--db :memory: would persist nothing" in capsys.readouterr().err
