"""Section 9, the command line: in this process where possible, otherwise as a user starts it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import os
import re
import shlex
import shutil
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
from tests.support import WAIT_S, agenthub_main, hub_process, hub_with, running

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
    with hub_with(tmp_path_factory.mktemp("helper"), HELPER) as url:
        yield url


@pytest.fixture(autouse=True)
def _surroundings(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Point to this module's hub and a new state folder, and undo the imports of agents' files."""
    monkeypatch.setenv("AGENTHUB_STATE_DIR", str(tmp_path_factory.mktemp("state") / "agenthub"))
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


def agents_at(url: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Return the hub's list of agents."""
    capsys.readouterr()
    assert agenthub_main("status", "--json", "--url", url) == 0
    agents: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["agents"]
    return agents


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

COMMANDS = (
    "hub",
    "agent",
    "status",
    "top",
    "call",
    "result",
    "cancel",
    "bridge",
    "a2a",
    "schema",
    "token",
    "journal",
    "completion",
)


def test_version_is_that_of_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("--version") == 0
    assert capsys.readouterr().out == f"agenthub {agenthub.__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("--help") == 0
    output = capsys.readouterr().out
    assert re.findall(r"^    (\w+)\s", output, re.MULTILINE) == list(COMMANDS)


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
        ["a2a", "x"],
        ["a2a", "--port", "x"],
    ],
)
def test_wrong_usage_is_exit_code_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main(*argv) == 2
    assert "usage: agenthub" in capsys.readouterr().err


def is_usage_error(line: str, command: str, text: str = "") -> bool:
    """Return whether a line is the error of a command's parser, with a text and a hint."""
    name = f"agenthub {command}"
    is_text = f"error: {text}; " in line if text else "error: " in line
    return line.startswith(f"{name}: ") and is_text and line.endswith(f'; see "{name} --help"')


def test_command_line_without_a_command_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main() == 0
    assert "delegate a task and print its output" in capsys.readouterr().out


def test_options_of_the_hub_and_of_agents_can_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTHUB_HUB_PORT", "1234")
    monkeypatch.setenv("AGENTHUB_HUB_INSECURE", "1")
    monkeypatch.setenv("AGENTHUB_HUB_ALLOW_HOST", "a.example,b.example")
    monkeypatch.setenv("AGENTHUB_HUB_HEARTBEAT", "2.5")
    monkeypatch.setenv("AGENTHUB_AGENT_MAX_TASKS", "7")
    hub = agenthub.argument_parser().parse_args(["hub", "--heartbeat", "3"])
    assert (hub.port, hub.insecure, hub.allow_host, hub.heartbeat_s) == (1234, True, ["a.example", "b.example"], 3.0)
    assert agenthub.argument_parser().parse_args(["hub"]).heartbeat_s == 2.5
    assert agenthub.argument_parser().parse_args(["agent", "x.py"]).max_tasks == 7


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("AGENTHUB_HUB_PORT", "x", "argument --port: invalid int value: 'x'"),
        ("AGENTHUB_HUB_SYNC", "off", "AGENTHUB_HUB_SYNC: must be one of full, normal, not 'off'"),
        ("AGENTHUB_HUB_INSECURE", "maybe", "AGENTHUB_HUB_INSECURE: must be 1 or 0, not 'maybe'"),
    ],
)
def test_wrong_value_in_the_environment_is_wrong_usage(
    name: str, value: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(agenthub, "_serve_hub", not_to_be_called)
    assert agenthub_main("hub") == 2
    assert text in capsys.readouterr().err


def test_log_as_json_has_an_object_for_each_record() -> None:
    with hub_process("--log-format", "json", "--log-level", "debug", stderr=subprocess.PIPE) as (url, hub):
        assert agenthub_main("call", "nothing", "--url", url) == 1
        hub.terminate()
        _, log = hub.communicate(timeout=WAIT_S)
    records = [json.loads(line) for line in log.splitlines()]
    assert {"time", "level", "logger", "message"} == set(records[0])
    (refused,) = [record for record in records if record["message"].startswith("refused code=no_agent")]
    assert refused["level"] == "warning"


def test_debug_log_has_a_line_for_the_end_of_each_task(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text(HELPER)
    with hub_process("--with", str(tmp_path / "helper.py"), "--log-level", "debug", stderr=subprocess.PIPE) as (
        url,
        hub,
    ):
        assert agenthub_main("call", "echo", "1", "--url", url) == 0
        hub.terminate()
        _, log = hub.communicate(timeout=WAIT_S)
    assert re.search(r"DEBUG agenthub.tasks ended task=call-[0-9a-f]+ state=completed code=None capability=", log)


def test_unknown_option_is_reported_by_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("status", "--bogus") == 2
    usage, *_, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: agenthub status")
    assert is_usage_error(error, "status", "unrecognized arguments: --bogus")


@pytest.mark.parametrize(
    "argv",
    [
        ["hub", "--port", "-1"],
        ["hub", "--port", "65536"],
        ["hub", "--heartbeat", "0"],
        ["hub", "--grace", "-1"],
        ["hub", "--retention", "nan"],
        ["hub", "--max-bytes", "10"],
        ["hub", "--trusted-proxy", "proxy.example.org"],
        ["hub", "--trusted-proxy", "10.0.0.1,"],
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
        ["agent", "--exec", " ", "--name", "x", "--capability", "y"],
        ["status", "-n", "-1"],
    ],
)
def test_wrong_value_is_exit_code_two(
    argv: list[str], url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agenthub, "_serve_hub", not_to_be_called)
    assert agenthub_main(*argv) == 2
    (error,) = capsys.readouterr().err.splitlines()  # The usage of a hub would fill the terminal.
    assert is_usage_error(error, *argv[:1])


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["call", "greet", "Ada"], "write a text as '\"text\"', and - to read the input from stdin"),
        (["call", "greet", "[NaN]"], "error: the input holds a number that is not finite; "),
        (["call", "greet", "[" * 99 + "]" * 99], "error: the input is nested more than 64 deep; "),
        (
            ["call", "greet", "{name:", "Ada}"],
            "unrecognized arguments: Ada}; quote JSON for the shell, as one argument",
        ),
        (
            ["call", "echo", "--agent", "helpr"],
            'no online agent has the name or agent_id "helpr"; close matches: helper',
        ),
        (["call", "echo", "--agent", "x"], 'no online agent has the name or agent_id "x"; start one, or use --wait'),
        (["call", "echo", "--agent", "x y"], 'no online agent has the name "x y"; "agenthub status" lists all'),
        (["call", "ecko", "--agent", "helper"], 'that agent does not offer "ecko"; close matches: echo'),
    ],
)
def test_error_says_how_to_go_on(
    argv: list[str], text: str, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agenthub, "serve", not_to_be_called)
    assert agenthub_main(*argv) in (1, 2)
    assert text in capsys.readouterr().err.splitlines()[-1]


@posix_only
@pytest.mark.parametrize(
    ("program", "code", "text"),
    [
        ("{0} status -n 1 >&- 2>&-", 0, ""),
        ("{0} status --json >&-", 0, ""),
        ("{0} call echo - <&-", 2, "the input is not JSON"),
        ("{0} token | true", 0, ""),
        ("{0} status | true", 0, ""),
        ("{0} schema | true", 0, ""),
        ("env -i PATH=$PATH PYTHONPATH=$PWD AGENTHUB_URL=$AGENTHUB_URL {0} status -n 1", 0, ""),
        ("env -u HOME -u AGENTHUB_STATE_DIR XDG_STATE_HOME=$STATE {0} call echo --no-wait", 0, ""),
        ("LC_ALL=C PYTHONIOENCODING=ascii NO_COLOR=1 COLUMNS=20 {0} call echo '\"日本\"'", 0, ""),
    ],
)
def test_surroundings_of_scripts_bring_no_traceback(
    program: str, code: int, text: str, url: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "AGENTHUB_URL": url, "STATE": str(tmp_path)}
    line = program.format(f"{shlex.quote(sys.executable)} -m agenthub")
    shell = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=environment, timeout=WAIT_S)
    assert shell.returncode == code, shell.stderr
    assert text in shell.stderr
    assert len(shell.stderr.splitlines()) <= 1


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
    journals = [server.journal and (server.journal.path, server.journal.sync) for server in servers]
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
    (error,) = complaint.splitlines()
    assert is_usage_error(error, argv[0], "AGENTHUB_TOKEN: must be printable ASCII without spaces")


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


# completion


COMPLETED = [
    ("agenthub st", ["status"]),
    ("agenthub hub --sy", ["--sync"]),
    ("agenthub hub --sync ", ["full", "normal"]),
    ("agenthub hub --sync n", ["normal"]),
    ("agenthub completion ", ["bash", "fish", "zsh"]),
    ("agenthub call hub --no", ["--no-wait"]),
    ("agenthub agent gree", ["greeter.py"]),
    ("agenthub hub --db gree", ["greeter.py"]),
]


def in_shell(shell: str, program: str, *args: str, folder: Path) -> str:
    """Run a program of a shell without startup files; return its output."""
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    (folder / "greeter.py").touch()
    command = [shell, *({"bash": ["--norc"], "fish": ["--no-config"]}[shell]), "-c", program, *args]
    result = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def script_of(shell: str, capsys: pytest.CaptureFixture[str], folder: Path) -> Path:
    assert agenthub_main("completion", shell) == 0
    (folder / "script").write_text(capsys.readouterr().out)
    return folder / "script"


@posix_only
@pytest.mark.parametrize(("line", "found"), COMPLETED)
def test_bash_completes(line: str, found: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the function finds nothing, `complete -o default` completes files."""
    script = script_of("bash", capsys, tmp_path)
    program = """set -u; source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        complete -p agenthub | grep -q -- "-o default"; _agenthub
        (( ${#COMPREPLY[@]} )) || COMPREPLY=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}"))
        printf '%s\n' "${COMPREPLY[@]}" """
    assert sorted(in_shell("bash", program, str(script), *line.split(" "), folder=tmp_path).split()) == found


@posix_only
@pytest.mark.parametrize(("line", "found"), COMPLETED)
def test_fish_completes(line: str, found: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = f"source {script_of('fish', capsys, tmp_path)}; complete -C {shlex.quote(line)}"
    output = in_shell("fish", program, folder=tmp_path)
    assert sorted(row.split("\t")[0] for row in output.splitlines()) == found


@posix_only
def test_zsh_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only its line editor completes, so it runs in a pseudo terminal; the completed lines run a function."""
    import pty

    if shutil.which("zsh") is None:
        pytest.skip("needs zsh")
    (tmp_path / "greeter.py").touch()
    script = script_of("zsh", capsys, tmp_path)
    near, far = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "HOME": str(tmp_path)}
    zsh = subprocess.Popen(["zsh", "-f", "-i"], stdin=far, stdout=far, stderr=far, cwd=tmp_path, env=environment)
    try:
        os.write(near, f"source {script}; agenthub() {{ print -l -- $@ >> ran }}; print RE''ADY\n".encode())
        shown = b""
        while b"READY" not in shown.replace(b"RE''ADY", b""):
            shown += os.read(near, 65_536)
        one_match = [(line, found[0]) for line, found in COMPLETED if len(found) == 1]
        os.write(near, b"".join(line.encode() + b"\t\n" for line, _ in one_match) + b"exit\n")
        zsh.wait(WAIT_S)
        assert [word for word in (tmp_path / "ran").read_text().split("\n") if word] == [
            word for line, found in one_match for word in [*line.split(" ")[1:-1], found]
        ]
    finally:
        zsh.kill()
        zsh.wait()
        os.close(near)
        os.close(far)


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
    (tmp_path / "folder.py").mkdir()
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
        ("folder.py", "folder.py: not a file"),
    ],
)
def test_nothing_found_is_one_line(
    target: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agenthub, "serve", not_to_be_called)
    assert agenthub_main("agent", target) in (1, 2)
    assert text in capsys.readouterr().err.splitlines()[-1]


def test_file_that_runs_its_agents_is_loaded_and_they_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "run_loop", not_to_be_called)
    path = tmp_path / "unguarded.py"
    path.write_text(
        "from agenthub import Agent\nfirst = Agent('first')\nfirst.run()\ndef run(): Agent('second').run()\nrun()\n"
    )
    assert [agent.name for agent in agenthub.load_agents(str(path))] == ["first", "second"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("agent = Agent('x'\n", ["agent = Agent('x'", "^", "SyntaxError: '(' was never closed"]),
        ("from json import x\n", ["{0}, line 2, in <module>", "from json import x", "ImportError: cannot import name"]),
        ("def f():\n    return 1 / 0\nf()\n", ["line 4", "f()", "line 3, in f", "return 1 / 0", "ZeroDivisionError"]),
        ("agent = Agent('x', max_tasks=0)\n", ["line 2", "max_tasks=0", "ValueError: max_tasks"]),
        ("class One(Agent):\n    def __init__(self): 1 / 0\n", ["line 3, in __init__", "1 / 0", "ZeroDivisionError"]),
        (
            "try:\n    Agent('x', max_tasks=0)\nexcept ValueError:\n    1 / 0\n",
            ["max_tasks=0", "During handling", "1 / 0", "Zero"],
        ),
        ("import own\n", ["line 2", "import own", "own.py", "line 1", "1 / 0", "ZeroDivisionError"]),
    ],
)
def test_error_in_a_file_shows_the_lines_of_its_author(
    text: str, shown: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agenthub, "serve", not_to_be_called)
    path = tmp_path / "mine.py"
    path.write_text(f"from agenthub import Agent\n{text}")
    (tmp_path / "own.py").write_text("1 / 0\n")
    assert agenthub_main("agent", str(path)) == 1
    complaint = capsys.readouterr().err
    assert "agenthub.py" not in complaint
    assert "importlib" not in complaint
    assert complaint.endswith(f"\nagenthub: {path}: not loaded because of the error above\n")
    assert re.search(".*".join(re.escape(one.replace("{0}", f'"{path}"')) for one in shown), complaint, re.DOTALL)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("target", ["broken.py", "broken"])
def test_package_that_a_file_misses_is_named_with_the_python_that_lacks_it(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert agenthub_main("agent", target) == 1
    *_, kind, text = capsys.readouterr().err.splitlines()
    assert kind == "ModuleNotFoundError: No module named 'no_such_module_at_all'"
    assert text.endswith(f"; is no_such_module_at_all installed for {sys.executable}?")


@posix_only
def test_ctrl_c_while_a_file_is_loaded_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("print('loading', flush=True)\nimport time\ntime.sleep(60)\n")
    with running("-m", "agenthub", "agent", str(tmp_path / "slow.py")) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        assert finished(process) == (130, "", "")


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


async def ran(command: str, given: Any = None, output: str = "auto", **options: Any) -> Any:
    async with asyncio.timeout(WAIT_S), shell(command, output=output) as me:
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
@pytest.mark.parametrize(
    ("printed", "output", "wanted"),
    [
        ("7821e45", "auto", float("7821e45")),
        ("7821e45", "text", "7821e45"),
        ("1.10", "text", "1.10"),
        ("[1]\n", "text", "[1]\n"),
        (" [1]\n", "json", [1]),
    ],
)
async def test_output_of_a_program_is_read_as_the_option_says(printed: str, output: str, wanted: Any) -> None:
    assert await ran(f"printf '{printed}'", output=output) == wanted


@posix_only
@pytest.mark.parametrize("printed", ["hello", "", "NaN", "1 2"])
async def test_output_that_should_be_json_and_is_not_fails_the_task(printed: str) -> None:
    with pytest.raises(TaskFailed, match=r"^the command's output is not JSON: ") as caught:
        await ran(f"printf '{printed}'", output="json")
    assert caught.value.code == "failed"


@posix_only
def test_option_for_the_output_of_a_program_reaches_its_agent(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--exec", "printf 1.10", "--name", "shell", "--capability", "sh-text", "--output", "text"]
    with running("-m", "agenthub", "agent", *options, env={"AGENTHUB_URL": url}):
        wait_for(lambda: agenthub_main("call", "sh-text") == 0)
    assert capsys.readouterr().out == '"1.10"\n'


@posix_only
@pytest.mark.parametrize("kind", ["in its group", "in a session of its own"])
@pytest.mark.parametrize("loop", agenthub.LOOPS[1:])
def test_task_of_a_program_ends_with_it_though_a_child_holds_its_pipes(tmp_path: Path, kind: str, loop: str) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    if kind != "in its group" and shutil.which("setsid") is None:
        pytest.skip("setsid is not installed")
    start = "" if kind == "in its group" else "setsid "
    path = f"{shlex.quote(str(tmp_path))}/$AGENTHUB_TASK_ID"
    command = f"PID={path}; export PID; {start}sh -c 'echo $$ > $PID; exec sleep 60' & echo '\"out\"'; echo err >&2; "
    command += "while ! [ -s $PID ]; do sleep 0.01; done; "
    assert agenthub.run_loop(ran(command, ttl=60), loop) == "out"
    with pytest.raises(TaskFailed, match=r"^exit code 3: err$"):
        agenthub.run_loop(ran(f"{command}exit 3", ttl=60), loop)
    pids = [int(one.read_text()) for one in tmp_path.iterdir()]
    assert len(pids) == 2
    for pid in pids:
        if kind != "in its group":
            os.kill(pid, signal.SIGKILL)
        asyncio.run(until_dead(pid))


@posix_only
@pytest.mark.parametrize("loop", agenthub.LOOPS[1:])
def test_program_may_close_its_stdin(loop: str) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    for command in ["exec <&-; echo 1; sleep 0.1", "exec <&-; echo 1"] * 5:
        assert agenthub.run_loop(ran(command, ttl=60), loop) == 1


@posix_only
@pytest.mark.parametrize("command", ["no-such-program-at-all x", "./no/such/program", "no-such-program-at-all; true"])
def test_program_that_does_not_exist_is_refused_at_the_start(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agenthub, "serve", not_to_be_called)
    if ";" in command:
        agenthub.check_program(command)  # Its first word is not a plain one.
        return
    assert agenthub_main("agent", "--exec", command, "--name", "x", "--capability", "x") == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert f"there is no program {command.split()[0]!r}; install it, or give its path" in complaint


@posix_only
@pytest.mark.parametrize(
    "command", ["cat", "/bin/cat -", "echo 1", "if true; then cat; fi", "exec cat", "A=1 b", "$HOME/x", "(x)", ""]
)
def test_command_that_may_be_right_is_not_refused(command: str) -> None:
    agenthub.check_program(command)


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
async def test_end_of_a_task_whose_program_is_starting_ends_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport_class = asyncio.base_subprocess.BaseSubprocessTransport
    connect, ended, path = transport_class._connect_pipes, asyncio.Event(), tmp_path / "pid"

    async def connect_late(*arguments: Any) -> None:
        await ended.wait()
        await connect(*arguments)

    monkeypatch.setattr(transport_class, "_connect_pipes", connect_late)
    command = f"[ $AGENTHUB_CAPABILITY = walk ] || {{ {GRANDCHILD.format(path=shlex.quote(str(path)))}; }}"
    async with shell(command, max_tasks=1) as me:
        handle = await me.submit("run")
        pid = await pid_in(path)
        await handle.cancel()
        await asyncio.sleep(0.1)  # The agent has been told.
        ended.set()
        await until_dead(pid)
        with pytest.raises(TaskFailed):
            await handle.result()
        assert await me.delegate("walk", ttl=WAIT_S) == ""  # In the only slot.


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
    assert agents.splitlines()[0].split() == ["NAME", "AGENT", "RUNNING", "CAPABILITIES", "DESCRIPTION"]
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
    assert [one["name"] for one in document["agents"] if one["capabilities"]] == ["helper"]
    assert next(task for task in document["tasks"] if task["capability"] == "echo")["state"] == "completed"


def test_status_shows_the_tasks_and_the_number_of_rows_asked_for(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        agenthub_main("call", "echo", "1")
    task_id = submitted(capsys, "slow")
    assert agenthub_main("status", "--tasks", "open", "--agent", "helper", "--json") == 0
    assert [task["task_id"] for task in json.loads(capsys.readouterr().out)["tasks"]] == [task_id]
    assert agenthub_main("cancel", task_id) == 0
    assert agenthub_main("status", "--tasks", "ended", "-n", "1") == 0
    output = capsys.readouterr().out
    assert re.search(r"\n\.\.\. and \d+ more\n$", output)
    assert agenthub_main("status", "--agent", "nobody", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["agents"], document["tasks"]) == ([], [])


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


class FakeSession:
    """A session with a hub that has 500 agents and 60 tasks; the last agent is the busiest."""

    async def request(self, message: Any, _: type) -> Any:
        names = ("日本語", "🤖🚀", "مرحبا", "e\u0301\u0302x", "देवनागरी", "worker")
        if isinstance(message, agenthub.Discover):
            agents = [
                agenthub.AgentInfo(
                    agent_id=f"a-{number}",
                    name=f"{names[number % 6]}{number}",
                    description="",
                    capabilities=[],
                    running=number,
                    max_tasks=500,
                    metadata={},
                )
                for number in range(500)
            ]
            return agenthub.Discovered(agents=agents, total=500)
        if message.tasks:
            fields: dict[str, Any] = {"requester": "r", "agent_id": "a-499", "attempt": 1, "ttl": 60.0, "age_s": 1.0}
            tasks = [
                agenthub.TaskInfo(task_id=f"t-{number}", state=state, priority=0, max_retries=0, **fields)
                for number, state in enumerate(["in_progress", *["completed"] * 59])
            ]
            return agenthub.StatusReply(tasks=tasks, total=60)
        return agenthub.StatusReply(hub={"version": "1", "uptime_s": 1, "tasks": dict.fromkeys("abcdefghij", 1000)})


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_status(monkeypatch: pytest.MonkeyPatch, *argv: str, terminal: tuple[int, int] | None = None) -> list[str]:
    """Return the lines of `status` at the fake hub, on a terminal of so many columns and lines, else in a pipe."""
    if terminal is not None:
        monkeypatch.setenv("COLUMNS", str(terminal[0]))
        monkeypatch.setenv("LINES", str(terminal[1]))
        monkeypatch.setattr(sys, "stdout", FakeTerminal())
    args = agenthub.argument_parser().parse_args(["status", *argv])
    fake: Any = FakeSession()
    return asyncio.run(agenthub._hub_text(fake, args)).splitlines()


@pytest.mark.parametrize("terminal", [(80, 24), (80, 50), (20, 10), (300, 24), (80, 2)])
def test_status_fits_on_the_terminal_with_the_busiest_first(
    terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = shown_status(monkeypatch, terminal=terminal)
    columns, height = terminal
    assert height - 2 <= len(lines) < max(height, 11)  # The last line is for the shell's prompt.
    assert all(agenthub.display_width(line) <= columns for line in lines)
    agents = lines[4 : lines.index("", 4) - 1]
    assert [re.sub(r"\D", "", line.split()[0]) for line in agents] == [
        str(499 - number) for number in range(len(agents))
    ]
    assert f"... and {500 - len(agents)} more" in lines
    assert lines[-1].startswith("... and ")


def test_status_in_a_pipe_has_all_rows_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown_status(monkeypatch)
    assert len(lines) == 2 + 1 + 501 + 1 + 61
    assert "more" not in "".join(lines)
    assert lines[1].endswith("1000 j")


def test_status_leaves_the_rows_that_one_table_does_not_need_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown_status(monkeypatch, "--agent", "a-499", terminal=(80, 24))
    assert [line.split()[0] for line in lines if line.startswith("t-")] == [f"t-{number}" for number in range(14)]
    assert lines[-1] == "... and 46 more"
    assert len(lines) == 22


def test_rows_asked_for_are_shown_on_any_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown_status(monkeypatch, "-n", "30", "--tasks", "ended", terminal=(80, 24))
    assert len(lines) == 2 + 1 + 32 + 1 + 32
    assert lines[-31].split()[:2] == ["t-1", "completed"]
    assert lines[-1] == "... and 29 more"


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


@posix_only
def test_watch_waits_for_a_hub_that_went_away(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text(HELPER)
    with hub_process() as (url, hub), running("-m", "agenthub", "status", "--watch", "--url", url) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("hub ")
        hub.kill()
        hub.wait()
        assert process.stderr.readline().endswith("; waiting for the hub\n")
        with hub_process("--port", url.rpartition(":")[2], "--with", str(tmp_path / "helper.py")):
            while not process.stdout.readline().startswith("helper"):
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert finished(process)[0] == 130


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


@posix_only
@pytest.mark.parametrize(
    ("raw", "code", "text"),
    [
        (b"\xef\xbb\xbf[1]\r\n", 0, ""),
        (b"\xff\xfe[\x00", 2, "error: the input is not JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"", 2, "error: the input is not JSON: Expecting value"),
    ],
)
def test_input_from_other_programs(
    raw: bytes, code: int, text: str, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Windows' shells begin a pipe with a byte order mark."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
    assert agenthub_main("call", "echo", "-") == code
    assert text in capsys.readouterr().err


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
    (agent,) = [one for one in json.loads(capsys.readouterr().out)["agents"] if one["capabilities"]]
    assert agenthub_main("call", "echo", "1", "--agent", agent["agent_id"]) == 0
    assert capsys.readouterr().out == "1\n"
    assert agenthub_main("call", "echo", "1", "--agent", "nobody") == 1
    text = 'no online agent has the name or agent_id "nobody"; start one, or use --wait'
    assert complaint_of(capsys) == f"agenthub: {text}\n"


def test_call_names_its_agent_by_a_name_that_only_one_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "twins.py"
    one = "{0} = Agent({1!r})\n@{0}.capability\nasync def {0}_echo(task: Task): return task.input\n"
    path.write_text("from agenthub import Agent, Task\n" + "".join(map(one.format, "abc", ("twin", "twin", "single"))))
    with hub_process("--with", str(path)) as (url, _):
        wait_for(lambda: len(agents_at(url, capsys)) == 3)
        assert agenthub_main("call", "c_echo", "1", "--agent", "single", "--url", url) == 0
        assert capsys.readouterr().out == "1\n"
        assert agenthub_main("call", "a_echo", "1", "--agent", "twin", "--url", url) == 1
        complaint = complaint_of(capsys)
        ids = sorted(one["agent_id"] for one in agents_at(url, capsys) if one["name"] == "twin")
    assert complaint.startswith("agenthub: 2 agents are named twin; give the agent_id of one: ")
    assert sorted(complaint.rstrip().partition("one: ")[2].split(", ")) == ids


def test_call_passes_its_options_on_and_waits_for_an_agent(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--wait", "--priority", "7", "--max-retries", "2", "--ttl", "30"]
    with running("-m", "agenthub", "call", "rare", "5", *options, env={"AGENTHUB_URL": url}) as call:
        (task,) = wait_for(lambda: tasks_at(url, capsys, "rare"))
        assert agenthub_main("status", "--json", "--task", task["task_id"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["state"], report["priority"], report["max_retries"]) == ("pending", 7, 2)
        program = ["--exec", "cat", "--name", "late", "--capability", "rare"]
        with running("-m", "agenthub", "agent", *program, env={"AGENTHUB_URL": url}):
            assert finished(call) == (0, "5\n", "")


def test_call_of_what_nobody_can_do_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("call", "no-such-thing") == 1
    assert complaint_of(capsys) == 'agenthub: no online agent offers "no-such-thing"; start one, or use --wait\n'


def test_call_of_a_mistyped_capability_shows_similar_ones(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("call", "ecko") == 1
    assert complaint_of(capsys) == 'agenthub: no online agent offers "ecko"; close matches: echo\n'


def test_failed_task_is_one_line_with_its_text(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("call", "fail") == 1
    text = r"ValueError: went \\x1b\[31mwrong\\nbadly"
    assert re.fullmatch(rf"agenthub: task call-\w+ failed at helper-\w+ \(failed\): {text}\n", complaint_of(capsys))


def test_expired_task_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("call", "slow", "--ttl", "0.2") == 1
    text = r"failed( at helper-\w+)? \(timeout\): its time to live of 0.2 s has expired"
    assert re.fullmatch(rf"agenthub: task call-\w+ {text}\n", complaint_of(capsys))


@pytest.mark.parametrize(
    ("token", "text"), [(None, "authentication required: set"), ("not-the-right-one", "invalid token: check")]
)
def test_hub_that_wants_a_token_says_what_to_set(
    token: str | None, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").touch(0o600)
    (tmp_path / "token").write_text("a-token-that-is-long-enough-to-be-taken")
    (tmp_path / "mine.py").write_text("from agenthub import Agent\nAgent('mine').run()\n")
    if token is not None:
        monkeypatch.setenv("AGENTHUB_TOKEN", token)
    complaint = f"agenthub: {text} AGENTHUB_TOKEN or AGENTHUB_TOKEN_FILE"
    with hub_process("--token-file", str(tmp_path / "token")) as (url, _):
        assert agenthub_main("call", "echo", "--url", url) == 1
        assert complaint_of(capsys) == f"{complaint}, or give --token-file\n"
        with running(str(tmp_path / "mine.py"), env={"AGENTHUB_URL": url, "PYTHONPATH": os.getcwd()}) as program:
            code, output, shown = finished(program)
    assert (code, output, shown.splitlines()[-1]) == (1, "", complaint)
    assert "Traceback" not in shown


def test_wss_url_of_a_hub_without_tls_is_explained(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("call", "echo", "--url", url.replace("ws:", "wss:")) == 1
    assert complaint_of(capsys).endswith("; a hub without --tls-cert speaks ws://, so try that\n")


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


# result and cancel


def submitted(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Delegate a task without waiting for it; return its id."""
    capsys.readouterr()
    assert agenthub_main("call", *argv, "--no-wait") == 0
    return capsys.readouterr().out.strip()


def test_result_prints_what_a_call_did_not_wait_for(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = submitted(capsys, "echo", "1"), submitted(capsys, "steps")
    assert agenthub_main("result", second, "--wait", "30") == 0
    assert capsys.readouterr() == ('"done"\n', "")
    for _ in range(2):
        assert agenthub_main("result", first, "--wait", "30") == 0
        assert capsys.readouterr() == ("1\n", "")


def test_result_of_a_failed_task_names_the_task_and_its_worker(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    task_id = submitted(capsys, "fail")
    assert agenthub_main("result", task_id, "--wait", "30") == 1
    text = r"ValueError: went \\x1b\[31mwrong\\nbadly"
    assert re.fullmatch(rf"agenthub: task {task_id} failed at helper-\w+ \(failed\): {text}\n", complaint_of(capsys))


def test_cancel_ends_a_task_that_has_not_ended(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    task_id = submitted(capsys, "slow")
    assert agenthub_main("result", task_id) == 1
    assert re.fullmatch(rf"agenthub: task {task_id} is \w+; --wait S waits until it has ended\n", complaint_of(capsys))
    assert agenthub_main("cancel", task_id) == 0
    assert agenthub_main("result", task_id) == 1
    assert "(cancelled): cancelled from the command line" in complaint_of(capsys)
    assert agenthub_main("cancel", task_id) == 1
    assert complaint_of(capsys) == f"agenthub: task {task_id}: that task has already ended\n"


@pytest.mark.parametrize("command", ["result", "cancel"])
def test_task_that_the_hub_does_not_know_is_one_line(
    command: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert agenthub_main(command, "no-such-task") == 1
    assert complaint_of(capsys).startswith(
        f"agenthub: task no-such-task: unknown to the hub at {url}: its record expired"
    )


def test_output_is_only_for_its_requester(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task_id = submitted(capsys, "echo", '"secret"')
    monkeypatch.setenv("AGENTHUB_STATE_DIR", str(tmp_path / "other"))
    assert agenthub_main("result", task_id, "--wait", "30") == 1
    assert re.fullmatch(
        rf"agenthub: task {task_id}: only its requester call-\w+ may read its output\n", complaint_of(capsys)
    )


@posix_only
def test_shared_caller_is_one_private_file_and_one_agent(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    task_ids = [submitted(capsys, "echo", str(number)) for number in range(3)]
    (path,) = Path(os.environ["AGENTHUB_STATE_DIR"]).iterdir()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert len({task["requester"] for task in tasks_at(url, capsys, "echo") if task["task_id"] in task_ids}) == 1
    path.chmod(0o644)
    assert agenthub_main("result", task_ids[0]) == 1
    assert complaint_of(capsys) == f"agenthub: {path}: others may read this secret; remove the file\n"


@posix_only
def test_commands_take_turns_with_the_shared_caller(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.ExitStack() as stack:
        argv = ("-m", "agenthub", "call", "echo", "1", "--no-wait")
        calls = [stack.enter_context(running(*argv, env={"AGENTHUB_URL": url})) for _ in range(4)]
        ended = [finished(call) for call in calls]
    assert [(code, complaint) for code, _, complaint in ended] == [(0, "")] * 4
    for _, output, _ in ended:
        assert agenthub_main("result", output.strip(), "--wait", "30") == 0


@posix_only
def test_state_folder_that_cannot_be_written_is_one_line(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AGENTHUB_STATE_DIR", "/dev/null/agenthub")
    assert agenthub_main("call", "echo", "--no-wait") == 1
    assert complaint_of(capsys).endswith("; set AGENTHUB_STATE_DIR to a folder that you may write to\n")


def test_oldest_callers_make_room(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agenthub, "CALLERS_MAX", 2)
    folder = Path(os.environ["AGENTHUB_STATE_DIR"])
    folder.mkdir(mode=0o700)
    for number in range(4):
        (folder / f"{number}.json").touch(0o600)
        os.utime(folder / f"{number}.json", (number, number))
    submitted(capsys, "echo")
    assert {"2.json", "3.json"} < {path.name for path in folder.iterdir()}
    assert not {"0.json", "1.json"} & {path.name for path in folder.iterdir()}


# bridge: its work is tested in test_mcp.py

TOOLS = shlex.join([sys.executable, "examples/claude_code/tools.py"])


def test_help_of_the_bridge_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("bridge", "--help") == 0
    output = capsys.readouterr().out
    options = re.findall(r"^  (--[\w-]+)", output, re.MULTILINE)
    assert options == [
        "--log-level",
        "--log-format",
        "--http",
        "--serve",
        "--name",
        "--prefix",
        "--max-tasks",
        "--channel",
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
    assert shown == ["info", "text", "127.0.0.1", "8765", "full", "auto", "30", "60", "3600", *limits, *connection]
    assert output.count("; repeatable") == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_no_default_that_is_none(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AGENTHUB_URL", "ws://127.0.0.1:1/%41")
    assert agenthub_main(command, "--help") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert not re.search(r"\(default: (None|False|\[\]|)\)", output)
    has_no_url = ("hub", "schema", "token", "journal", "completion")
    assert ("(default: ws://127.0.0.1:1/%41)" in output) == (command not in has_no_url)


def test_bridge_goes_one_way_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("bridge", "--http", "0", "--serve", "cat") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert is_usage_error(error, "bridge", "argument --serve: not allowed with argument --http")


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
    assert is_usage_error(complaint.splitlines()[-1], "bridge")
    assert "Traceback" not in complaint


@pytest.mark.parametrize("argv", [[], ["--http", "0"], ["--serve", TOOLS]])
def test_token_that_cannot_be_sent_is_wrong_usage_of_the_bridge(argv: list[str]) -> None:
    pytest.importorskip("mcp")
    with running("-m", "agenthub", "bridge", *argv, env={"AGENTHUB_TOKEN": "two words"}) as process:
        code, output, complaint = finished(process, 5)
    assert (code, output) == (2, "")
    text = "AGENTHUB_TOKEN: must be printable ASCII without spaces"
    assert is_usage_error(complaint.splitlines()[-1], "bridge", text)


# The tables.


def test_table_is_aligned_by_the_width_on_a_terminal() -> None:
    assert agenthub.table([["A", "B"], ["漢字", "b"], ["e\u0301", "b"]]) == "A     B\n漢字  b\ne\u0301     b"
    assert agenthub.cut_to_width("漢字ab", 5) == "漢字a"
    assert agenthub.cut_to_width("a漢字", 4) == "a漢"


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
