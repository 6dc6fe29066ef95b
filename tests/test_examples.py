"""Run the examples like a user: each command in a docstring must print the lines that follow it there."""

from __future__ import annotations

import asyncio
import http.server
import importlib.metadata
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
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from agenthub import URL_DEFAULT, Agent, Code, LocalHub, Task, TaskFailed
from examples import review_folder, two_sites
from examples.claude_code import code_agents as claude_agents
from tests.support import ROOT, WAIT_S, hub_process, running

FOLDER = ROOT / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py") if path.name != "__init__.py")
LINES_MAX = 39
# These run until they are stopped; the output of the other commands shows their effect.
SERVING = ("python -m agenthub hub", "python -m agenthub agent", "python examples/02_greeter.py")


# Shared by all tests.


def transcript(example: str) -> dict[str, str]:
    """Return the commands of an example's docstring with their output: the lines up to an empty one."""
    shown: dict[str, str] = {}
    docstring = (FOLDER / example).read_text(encoding="utf-8").split('"""')[1]
    for paragraph in docstring.split("\n\n"):
        for entry in re.split(r"^\$ ", paragraph, flags=re.MULTILINE)[1:]:
            command, _, printed = entry.partition("\n")
            shown[command] = printed if printed.endswith("\n") or not printed else f"{printed}\n"
    return shown


def environment(url: str = "") -> dict[str, str]:
    """Return an environment in which `python` is this Python, and the default hub is the test's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {"PATH": path, **({"AGENTHUB_URL": url} if url else {})}


def finished(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python ARGS` until it exits."""
    with running(*args, **options) as process:
        stdout, stderr = process.communicate(timeout=WAIT_S)
        return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)


def play(example: str, command: str, url: str = "") -> None:
    """Run a command of an example, and compare its output with the docstring."""
    python, *args = shlex.split(command)
    assert python == "python"
    outcome = finished(*args, env=environment(url))
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, transcript(example)[command], "")


def play_all(example: str, url: str) -> None:
    """Run all commands of an example except those that serve."""
    commands = [command for command in transcript(example) if not command.startswith(SERVING)]
    assert commands
    for command in commands:
        play(example, command, url)


def arguments(example: str, start: str) -> list[str]:
    """Return the arguments of an example's only command with this start."""
    [command] = [command for command in transcript(example) if command.startswith(start)]
    return shlex.split(command)[1:]


def wait_for_lines(process: subprocess.Popen[str], *texts: str) -> None:
    """Read a process's stderr until each text has occurred in a line."""
    assert process.stderr is not None
    watchdog = threading.Timer(WAIT_S, process.kill)
    watchdog.start()
    missing = set(texts)
    for line in process.stderr:
        missing -= {text for text in missing if text in line}
        if not missing:
            break
    watchdog.cancel()
    assert not missing


# The numbered examples.


@pytest.mark.parametrize(
    "example",
    [
        *("01_hello.py", "04_pipeline.py", "05_progress_and_cancel.py", "06_shell_agent.py", "two_sites.py"),
        *("asks_back.py", "streaming_writer.py"),
    ],
)
def test_example_of_one_program_prints_what_it_says(example: str) -> None:
    play(example, f"python examples/{example}")


def test_demo_has_a_dozen_agents_at_work() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    [(command, printed)] = transcript("demo.py").items()
    outcome = finished(*shlex.split(command)[1:], "--port", str(port), "--seed", "1", env=environment())
    assert (outcome.returncode, outcome.stdout) == (0, printed.replace("8765", str(port)))
    assert "Traceback" not in outcome.stderr.replace("handler failed", "")


def test_two_agents_in_two_processes() -> None:
    with hub_process() as (url, _), running("examples/02_greeter.py", env=environment(url)):
        play_all("02_caller.py", url)


def test_requester_may_come_before_the_agent() -> None:
    with (
        hub_process() as (url, _),
        running("examples/02_caller.py", env=environment(url)) as caller,
        running("examples/02_greeter.py", env=environment(url)),
    ):
        printed = transcript("02_caller.py")["python examples/02_caller.py"]
        assert caller.communicate(timeout=WAIT_S) == (printed, "")


@pytest.mark.long
def test_class_style_within_the_hub() -> None:
    options = arguments("03_class_style.py", "python -m agenthub hub")[3:]
    with hub_process(*options, stderr=subprocess.PIPE) as (url, hub):
        wait_for_lines(hub, "joined agent=editor", "joined agent=reader")
        play_all("03_class_style.py", url)


def test_class_style_beside_the_hub() -> None:
    command = "python -m agenthub agent examples/03_class_style.py"
    assert command in (FOLDER / "03_class_style.py").read_text(encoding="utf-8")
    with hub_process() as (url, _), running(*shlex.split(command)[1:], env=environment(url)) as agents:
        wait_for_lines(agents, "joined agent=editor", "joined agent=reader")
        play_all("03_class_style.py", url)


def test_shell_agent_by_hand() -> None:
    args = arguments("06_shell_agent.py", "python -m agenthub agent")
    [call] = [command for command in transcript("06_shell_agent.py") if "agenthub call" in command]
    with hub_process() as (url, _), running(*args, env=environment(url)) as agent:
        wait_for_lines(agent, "joined agent=sorter")
        play("06_shell_agent.py", call, url)


async def test_two_sites_pass_on_progress_questions_trace_failures_and_cancels() -> None:
    stopped = asyncio.Event()
    async with asyncio.timeout(WAIT_S), LocalHub() as one, LocalHub() as other, Agent("worker", hub=other) as worker:

        @worker.capability
        async def talk(task: Task) -> Any:
            task.progress(0.5, "half")
            return [task.input, task.trace, await task.ask("which?", {"type": "string"})]

        @worker.capability
        async def refuse() -> None:
            raise TaskFailed("not today", code="closed")

        @worker.capability
        async def hang(task: Task) -> None:
            task.progress(0.1)
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()

        names = ["talk", "refuse", "hang"]
        gate = asyncio.create_task(two_sites.main(*names, office={"hub": one}, factory={"hub": other}))
        async with Agent("me", hub=one) as me:
            handle = await me.submit("talk", {"a": 1}, trace={"traceparent": "x"}, answers=True, wait=True)
            news = []
            async for event in handle:
                news.append(getattr(event, "detail", None) or getattr(event, "text", None))
                if handle.question is not None:
                    await handle.answer("blue")
            assert news == ["half", "which?"]
            assert await handle.result() == [{"a": 1}, {"traceparent": "x"}, "blue"]
            with pytest.raises(TaskFailed, match="not today") as failed:
                await me.delegate("refuse", wait=True)
            assert failed.value.code == "closed"
            hanging = await me.submit("hang", wait=True)
            async for _ in hanging:
                await hanging.cancel()
            await stopped.wait()
        gate.cancel()
        await asyncio.wait([gate])


# The examples with a language model. A local server takes the place of the model.

ANSWERS = {
    "/v1/messages": {
        "id": "1",
        "type": "message",
        "role": "assistant",
        "model": "claude",
        "content": [{"type": "text", "text": "A hub connects agents and manages their tasks."}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    },
    "/v1/chat/completions": {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "Agenten bei der Arbeit"},
            }
        ],
    },
}


class ModelHandler(http.server.BaseHTTPRequestHandler):
    """Answers each request of an SDK, and keeps it."""

    requests: ClassVar[list[tuple[str, Any]]] = []

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, request))
        body = json.dumps(ANSWERS[self.path]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def model_url() -> Iterator[str]:
    """The URL of a local server that answers like the models."""
    ModelHandler.requests.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), ModelHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(WAIT_S)


@pytest.mark.parametrize(
    ("example", "package", "path", "text"),
    [
        ("07_anthropic_agent.py", "anthropic", "/v1/messages", "at most 20 words:\n\nA hub brings agents together."),
        ("08_openai_agent.py", "openai", "/v1/chat/completions", "Translate into German."),
    ],
)
def test_agent_asks_a_language_model(example: str, package: str, path: str, text: str, model_url: str) -> None:
    pytest.importorskip(package)
    name = package.upper()
    base = model_url + ("/v1" if package == "openai" else "")
    keys = {f"{name}_API_KEY": "none", f"{name}_BASE_URL": base, "NO_PROXY": "127.0.0.1"}
    hub_started = hub_process(stderr=subprocess.PIPE)
    with hub_started as (url, hub), running(f"examples/{example}", env={**environment(url), **keys}):
        wait_for_lines(hub, "joined agent=")
        [call] = [command for command in transcript(example) if command.startswith("python -m agenthub call")]
        play(example, call, url)
    [(asked, request)] = ModelHandler.requests
    assert asked == path
    assert text in "".join(message["content"] for message in request["messages"])


def test_capabilities_are_tools_of_pydantic_ai() -> None:
    pytest.importorskip("pydantic_ai")
    play("pydantic_ai_tool.py", "python examples/pydantic_ai_tool.py")


@pytest.mark.parametrize(
    ("example", "packages"),
    [
        ("pydantic_ai_agent.py", ("pydantic_ai", "fastmcp", "mcp")),
        ("openai_agents_sdk.py", ("agents", "mcp")),
        ("langgraph_agent.py", ("langgraph", "mcp")),
    ],
)
def test_agent_of_a_framework_delegates_over_the_bridge(example: str, packages: tuple[str, ...]) -> None:
    for package in packages:
        pytest.importorskip(package)
    play(example, f"python examples/{example}")


def test_no_example_shadows_a_package() -> None:
    """The folder of a program comes first in its import path."""
    installed = set(importlib.metadata.packages_distributions()) | {"agents", "anthropic", "langgraph", "mcp", "openai"}
    names = {path.stem for path in FOLDER.rglob("*.py")} - {"__init__"}
    assert not names & (installed | sys.stdlib_module_names)


@pytest.mark.parametrize("example", [name for name in EXAMPLES if name[0].isdigit()])
def test_numbered_example_is_short(example: str) -> None:
    assert len((FOLDER / example).read_text(encoding="utf-8").splitlines()) <= LINES_MAX


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_is_in_the_list_and_in_a_test(example: str) -> None:
    [line] = [line for line in (FOLDER / "README.md").read_text("utf-8").splitlines() if f"]({example})" in line]
    assert re.findall(r"`(python [^`]*)`", line)[-1] in transcript(example)
    assert re.search(rf"\b{Path(example).stem}\b", Path(__file__).read_text(encoding="utf-8"))


# claude_code/, the folder for Claude Code.

CLAUDE = FOLDER / "claude_code"
CLAUDE_PAGE = (CLAUDE / "README.md").read_text(encoding="utf-8")
CALLS = re.findall(r"^\$ (agenthub .*)\n((?:[^$`].*\n)+)", CLAUDE_PAGE, re.MULTILINE)
POSIX = os.name == "posix"

TESTS = """
import unittest

class Sums(unittest.TestCase):
    def test_right(self):
        self.assertEqual(1 + 1, 2)

    def test_wrong(self):
        \"""A sum.\"""
        self.assertEqual(1 + 1, 3)

    @unittest.skip("not now")
    def test_skipped(self):
        pass
"""


def command_of(start: str) -> list[str]:
    """Return the arguments of the page's only shell command with this start, without `agenthub`."""
    [command] = re.findall(rf"^ *({start}.*)$", CLAUDE_PAGE, re.MULTILINE)
    return shlex.split(command)[1:]


def expanded(value: Any, variables: Mapping[str, str]) -> Any:
    """Return a part of .mcp.json with ${NAME} and ${NAME:-default} replaced, as Claude Code does."""
    if isinstance(value, dict):
        return {name: expanded(item, variables) for name, item in value.items()}
    if isinstance(value, list):
        return [expanded(item, variables) for item in value]
    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", lambda found: variables.get(found[1], found[2]), value)


def claude_server(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the only MCP server of .mcp.json."""
    document = json.loads((CLAUDE / ".mcp.json").read_text(encoding="utf-8"))
    [(name, server)] = document["mcpServers"].items()
    assert name == "agenthub"
    found: dict[str, Any] = expanded(server, variables)
    return found


def claude_bridge(url: str) -> Any:
    """Return the parameters with which Claude Code starts that server for a hub at `url`."""
    mcp = pytest.importorskip("mcp")
    server = claude_server({"AGENTHUB_URL": url})
    assert server.pop("command") == "agenthub"
    surroundings = {**os.environ, **environment(), "PYTHONPATH": str(ROOT)}
    installed = shutil.which("agenthub", path=surroundings["PATH"])
    command, *args = [installed] if installed else [sys.executable, "-m", "agenthub"]
    return mcp.StdioServerParameters(
        command=command, args=[*args, *server["args"]], env={**surroundings, **server["env"]}, cwd=CLAUDE
    )


@pytest.fixture
def claude_hub() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A hub started with the page's command, on a free port."""
    command, *options = command_of("agenthub hub")
    assert command == "hub"
    with hub_process(*options, cwd=CLAUDE, stderr=subprocess.PIPE) as (url, hub):
        wait_for_lines(hub, "joined agent=reader", "joined agent=tester")
        yield url, hub


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with TODOs, and tests including one that fails."""
    (tmp_path / "test_sums.py").write_text(TESTS)
    (tmp_path / "notes.txt").write_text("first\n  TODO: second\nTODOS\n", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG TODO")
    for folder in (".hidden", "node_modules", "sub"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("x = 1  # FIXME\n")
    return tmp_path


TODOS = [
    {"file": "notes.txt", "line": 2, "text": "TODO: second"},
    {"file": "sub/a.py", "line": 1, "text": "x = 1  # FIXME"},
]


def test_mcp_json_leads_to_the_hub_of_this_machine_or_of_the_environment() -> None:
    assert claude_server({})["env"] == {"AGENTHUB_URL": URL_DEFAULT}
    assert claude_server({"AGENTHUB_URL": "ws://hub"})["env"] == {"AGENTHUB_URL": "ws://hub"}


PLUGIN = CLAUDE / "plugin"
# https://code.claude.com/docs/en/plugins-reference: the fields of a manifest, and what each must be.
MANIFEST_FIELDS = {
    **dict.fromkeys(["name", "version", "description", "homepage", "repository", "license"], str),
    "author": dict,
    "keywords": list,
    **dict.fromkeys(["commands", "agents", "skills", "hooks", "mcpServers", "outputStyles", "lspServers"], str),
}


def test_plugin_has_the_form_that_is_documented() -> None:
    manifest = json.loads((PLUGIN / ".claude-plugin" / "plugin.json").read_text(encoding="utf-8"))
    assert {name: type(value) for name, value in manifest.items()} == {name: MANIFEST_FIELDS[name] for name in manifest}
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", manifest["name"])
    assert manifest["version"] == importlib.import_module("agenthub").__version__
    assert set(manifest["author"]) <= {"name", "email", "url"}
    assert manifest["mcpServers"] == "./.mcp.json"
    assert (PLUGIN / ".mcp.json").read_text("utf-8") == (CLAUDE / ".mcp.json").read_text("utf-8")
    assert [path.name for path in (PLUGIN / ".claude-plugin").iterdir()] == ["plugin.json"]
    (skill,) = PLUGIN.glob("skills/*/SKILL.md")
    _, head, body = skill.read_text(encoding="utf-8").split("---\n", 2)
    fields = dict(line.split(": ", 1) for line in head.splitlines())
    assert set(fields) == {"name", "description"}
    assert fields["name"] == skill.parent.name
    assert len(fields["name"]) <= 64
    assert len(fields["description"]) <= 1024
    assert "$ARGUMENTS" in body


async def test_skill_of_the_plugin_names_tools_and_arguments_that_the_bridge_has() -> None:
    """The bridge that the plugin starts is driven by the tests around this one: its .mcp.json is the folder's."""
    mcp = pytest.importorskip("mcp")
    text = (PLUGIN / "skills" / "delegate" / "SKILL.md").read_text(encoding="utf-8")
    async with asyncio.timeout(3 * WAIT_S), mcp.Client(claude_bridge("ws://127.0.0.1:9")) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", text))
    codes = {code.value for code in Code}
    assert {name for name in named if name in tools} == {"discover_agents", "delegate_task", "get_task_result"}
    assert named - set(tools) - codes == {"task_id"}
    assert {"capability", "input", "ttl"} <= set(tools["delegate_task"].input_schema["properties"])


async def test_what_the_page_says_can_be_asked_is_done(
    claude_hub: tuple[str, subprocess.Popen[str]], project: Path
) -> None:
    mcp = pytest.importorskip("mcp")
    told: list[str | None] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        told.append(message)

    async with asyncio.timeout(3 * WAIT_S), mcp.Client(claude_bridge(claude_hub[0])) as client:

        async def ask(tool: str, **options: Any) -> Any:
            result = await client.call_tool(tool, options, progress_callback=on_progress)
            assert not result.is_error, result.content
            return result.structured_content

        # Which agents are online, and what can they do?
        agents = (await ask("discover_agents"))["agents"]
        offered = {agent["name"]: agent["capabilities"] for agent in agents}
        assert {name: [one["name"] for one in offers] for name, offers in offered.items()} == {
            "reader": ["find_todos"],
            "tester": ["run_tests"],
        }
        for [one] in offered.values():
            assert one["description"].endswith(".")
            assert one["input_schema"]["required"] == ["folder"]
        assert (await ask("hub_status"))["agents"] == 3

        # Have an agent find the TODOs.
        found = await ask("delegate_task", capability="find_todos", input={"folder": str(project)})
        assert (found["state"], found["output"]) == ("completed", {"total": 2, "found": TODOS})

        # Have an agent run the tests, and tell me which fail.
        ran = await ask("delegate_task", capability="run_tests", input={"folder": str(project)}, wait_s=0)
        ran = await ask("get_task_result", task_id=ran["task_id"], wait_s=45)
        assert ran["state"] == "completed"
        assert (ran["output"]["tests"], len(ran["output"]["failed"])) == (3, 1)
        assert ran["output"]["failed"][0].startswith("test_wrong")
        assert "AssertionError: 2 != 3" in ran["output"]["report"]

        # The other two tools.
        assert [task["state"] for task in (await ask("list_tasks"))["tasks"]] == ["completed", "completed"]
        assert (await ask("broadcast_message", message="hello"))["recipients"] == 2

        names = {tool.name for tool in (await client.list_tools()).tools}
    assert names == set(re.findall(r"`((?:\w+_)?(?:agents|status|tasks?|message|result))`", CLAUDE_PAGE))


@pytest.mark.long
async def test_tools_of_an_mcp_server_are_put_on_the_hub(claude_hub: tuple[str, subprocess.Popen[str]]) -> None:
    mcp = pytest.importorskip("mcp")
    url, hub = claude_hub
    serving = running("-m", "agenthub", *command_of("agenthub bridge --serve"), cwd=CLAUDE, env=environment(url))
    with serving:
        await asyncio.to_thread(wait_for_lines, hub, "joined agent=calculator")
        assert len(CALLS) == 2
        for command, printed in CALLS:
            outcome = await asyncio.to_thread(
                finished, "-m", "agenthub", *shlex.split(command)[1:], env=environment(url)
            )
            assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, printed, "")
        async with asyncio.timeout(3 * WAIT_S), mcp.Client(claude_bridge(url)) as client:
            dates = {"first": "2024-02-01", "last": "2024-03-01"}
            result = await client.call_tool("delegate_task", {"capability": "days_between", "input": dates})
            assert (result.is_error, result.structured_content["output"]) == (False, {"result": 29})
            result = await client.call_tool(
                "delegate_task", {"capability": "summarize_numbers", "input": {"numbers": []}}
            )
            assert (result.is_error, result.structured_content["error"]["code"]) == (True, "failed")


async def test_progress_is_told_after_each_test(project: Path) -> None:
    async with LocalHub() as hub, claude_agents.Tester(hub=hub), Agent("me", hub=hub) as me:
        handle = await me.submit("run_tests", str(project))
        async with asyncio.timeout(WAIT_S):
            updates = [update async for update in handle]
        assert [round(update.progress or 0, 2) for update in updates] == [0.33, 0.67, 1.0]
        assert [update.detail.rpartition("... ")[2] for update in updates] == ["ok", "skipped 'not now'", "FAIL"]


@pytest.mark.parametrize(
    ("name", "source", "text"),
    [
        ("test_a.py", "import os\nos._exit(3)\n", "no unittest tests were run to their end"),
        ("other.py", TESTS, "Ran 0 tests"),
        (None, "", "no such folder"),
    ],
)
async def test_tests_that_cannot_be_run_fail_the_task(tmp_path: Path, name: str | None, source: str, text: str) -> None:
    folder = tmp_path if name else tmp_path / "missing"
    if name:
        (tmp_path / name).write_text(source)
    async with LocalHub() as hub, claude_agents.Tester(hub=hub), Agent("me", hub=hub) as me:
        with pytest.raises(TaskFailed, match=text):
            await asyncio.wait_for(me.delegate("run_tests", str(folder)), WAIT_S)


@pytest.mark.skipif(not POSIX, reason="looks for a process by its number")
async def test_tests_that_are_called_off_are_ended(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(
        "import os, pathlib, time, unittest\n"
        "class Slow(unittest.TestCase):\n"
        "    def test_a(self):\n"
        "        pathlib.Path('pid').write_text(str(os.getpid()))\n"
        "    def test_b(self):\n"
        "        time.sleep(60)\n"
    )
    async with LocalHub() as hub, claude_agents.Tester(hub=hub), Agent("me", hub=hub) as me:
        handle = await me.submit("run_tests", str(tmp_path))
        async with asyncio.timeout(WAIT_S):
            async for _ in handle:
                await handle.cancel()
            pid = int((tmp_path / "pid").read_text())
            while True:
                try:
                    os.kill(pid, 0)
                except ProcessLookupError:
                    break
                await asyncio.sleep(0.01)


async def test_another_word_can_be_looked_for(project: Path) -> None:
    async with LocalHub() as hub, claude_agents.Reader(hub=hub), Agent("me", hub=hub) as me:
        found = await me.delegate("find_todos", {"folder": str(project), "word": "second"})
        assert found == {"total": 1, "found": TODOS[:1]}


def test_claude_folder_is_in_the_list_and_its_page_names_its_files() -> None:
    [line] = [line for line in (FOLDER / "README.md").read_text("utf-8").splitlines() if "claude_code" in line]
    assert "](claude_code/README.md)" in line
    assert "`agenthub hub --with examples/claude_code/code_agents.py`" in line
    assert command_of("agenthub hub") == ["hub", "--with", "code_agents.py"]
    files = {path.name for path in CLAUDE.iterdir() if path.suffix != ".pyc"} - {"README.md", "__pycache__"}
    assert files == set(re.findall(r"\]\(([^)]*)\)", CLAUDE_PAGE))


# review_folder.py: its checks.

ALL_CHECKS = {**review_folder.BUGS, **review_folder.RISKS, **review_folder.STYLE}

# One file per check, with all its findings.
WRONG: dict[str, tuple[str, list[tuple[int, str]]]] = {
    "assert-on-tuple": (
        """\
        def check(total):
            assert (total > 0, "nothing there")
        """,
        [(2, "a tuple is always true")],
    ),
    "bare-except": (
        """\
        try:
            answer = 1 / 0
        except:
            answer = None
        """,
        [(3, "catches KeyboardInterrupt and SystemExit too")],
    ),
    "duplicate-key": (
        """\
        PORTS = {
            "http": 80,
            "https": 443,
            "http": 8080,
        }
        """,
        [(4, "'http' is a key of this dict already")],
    ),
    "dynamic-code": (
        """\
        def run(text):
            exec(text)
            return eval(text) + eval("1 + 1")
        """,
        [(2, "exec runs text that is computed"), (3, "eval runs text that is computed")],
    ),
    "empty-f-string": (
        """\
        print(f"no placeholders here")
        """,
        [(1, "an f-string without placeholders")],
    ),
    "long-function": (
        "def count():\n" + "    print()\n" * 100,
        [(1, "count has 101 lines")],
    ),
    "mutable-default": (
        """\
        import collections


        def collect(item, into=[], *, counts=collections.Counter()):
            into.append(item)
            counts[item] += 1


        first = lambda items={}: items
        """,
        [
            (4, "one counts is shared by all calls"),
            (4, "one into is shared by all calls"),
            (9, "one items is shared by all calls"),
        ],
    ),
    "none-comparison": (
        """\
        def known(value):
            if value == None or None != value:
                return False
            return True
        """,
        [(2, "use `is None`"), (2, "use `is not None`")],
    ),
    "secret-in-source": (
        """\
        PASSWORD = "hunter2hunter2"
        KEY = "AKIA" "ABCDEFGHIJKLMNOP"
        """,
        [(1, "PASSWORD is in the source"), (2, "looks like a key or token; keep it out of the source")],
    ),
    "shadowed-builtin": (
        """\
        from dataclasses import dataclass


        def filter(items, id=None):
            list = [item for item in items if item is not id]
            list = list[:]
            return list


        @dataclass
        class Row:
            type: str

            def format(self):
                return self.type
        """,
        [
            (4, "filter is the name of a built-in"),
            (4, "id is the name of a built-in"),
            (5, "list is the name of a built-in"),
        ],
    ),
    "shell-command": (
        """\
        import os
        import subprocess


        def show(folder):
            os.system(f"ls {folder}")
            subprocess.run("ls " + folder, shell=True)
        """,
        [
            (6, "system gives text that is computed to a shell"),
            (7, "run gives text that is computed to a shell"),
        ],
    ),
    "swallowed-exception": (
        """\
        import json


        def load(text):
            try:
                return json.loads(text)
            except (ValueError, Exception):
                pass
        """,
        [(7, "Exception is caught, and nobody is told")],
    ),
    "todo": (
        """\
        # TODO: say hello
        TODO = "FIXME"
        """,
        [(1, "a comment says TODO")],
    ),
    "unreachable-code": (
        """\
        def first(items):
            for item in items:
                if not item:
                    continue
                    print("never")
                return item
                break
            raise LookupError
            return None
        """,
        [
            (5, "never runs, after the continue above it"),
            (7, "never runs, after the return above it"),
            (9, "never runs, after the raise above it"),
        ],
    ),
    "unsafe-load": (
        """\
        import pickle


        def load(file):
            return pickle.load(file)
        """,
        [(5, "pickle runs code that its input contains")],
    ),
    "unused-import": (
        """\
        import json
        import os.path
        from collections.abc import (
            Iterable,
            Mapping as Map,
        )


        def size(items: Iterable[int]) -> int:
            return sum(items)
        """,
        [
            (1, "json is imported and never used"),
            (2, "os is imported and never used"),
            (5, "Map is imported and never used"),
        ],
    ),
    "unused-variable": (
        """\
        def read(path):
            size: int = 0
            text = path.read_text()
            try:
                return path.read_bytes()
            except OSError as error:
                return b""
        """,
        [
            (2, "size is assigned and never used"),
            (3, "text is assigned and never used"),
            (6, "error is never used"),
        ],
    ),
    "unverified-certificate": (
        """\
        def fetch(client, url):
            return client.get(url, verify=False)
        """,
        [(2, "certificates are not verified")],
    ),
}

# Code that a naive check would report.
RIGHT = {
    "the tuple of an assertion's own": "def check(pair):\n    assert pair == (1, 2), 'no'\n    assert ()\n",
    "a bare except that raises again": "try:\n    run = 1\nexcept:\n    run = 2\n    raise\n",
    "a narrow exception is passed over": "try:\n    run = 1\nexcept (KeyError, OSError):\n    pass\n",
    "a broad exception is seen to": "try:\n    run = 1\nexcept Exception:\n    print('no')\n",
    "keys of different types": "TABLE = {1: 'a', '1': 'b', True: 'c', **{1: 'd'}}\n",
    "keys that are computed": "def table(a, b):\n    return {a: 1, b: 2, a + b: 3}\n",
    "a format within an f-string": "def show(number, width):\n    return f'{number:>10} {number:>{width}}'\n",
    "an f-string in parts": "def show(name):\n    return f'hello ' f'{name}'\n",
    "an immutable default": "def call(a=(), b=None, c=frozenset(), *, d='x'):\n    return a, b, c, d\n",
    "compared with is": "def known(value):\n    return value is None or value == 0\n",
    "an empty generator": "def nothing():\n    return\n    yield\n",
    "an abstract generator": "def nothing():\n    raise NotImplementedError\n    yield from ()\n",
    "after a branch that returns": "def sign(n):\n    if n < 0:\n        return -1\n    return 1\n",
    "a class's own names": "class Row:\n    id = 1\n    type: str\n\n    def filter(self):\n        return self.id\n",
    "a given signature": (
        "import typing\n\n\n"
        "class Lock:\n"
        "    def __exit__(self, type, value, traceback):\n        print(type)\n\n"
        "    @typing.override\n    def open(self, dir):\n        print(dir)\n"
    ),
    "an attribute with the name of a built-in": "def fill(row):\n    row.id = 1\n    row['max'] = 2\n",
    "from the future": "from __future__ import annotations\n",
    "for others, by name": "from json import loads as loads\nimport os as os\n",
    "for others, by list": "from json import dumps, loads\n\n__all__ = ['dumps']\n__all__ += ['loads']\n",
    "for others, by a list that grows": "from json import dumps\n\n__all__ = []\n__all__.append('dumps')\n",
    "in a quoted annotation": "import decimal\n\n\ndef pay(sum_due: 'list[decimal.Decimal]'):\n    return sum_due\n",
    "in quotes within quotes": "import decimal\n\n\ndef pay() -> \"list['decimal.Decimal']\": ...\n",
    "in a quoted variable annotation": "import decimal\n\nprice: 'decimal.Decimal'\n",
    "for type checkers only": (
        "import typing\n\nif typing.TYPE_CHECKING:\n    from decimal import Decimal\n\n"
        "Prices = typing.List['Decimal']\nprice = typing.cast('Decimal', 1)\n"
    ),
    "one of two ways, by failure": "try:\n    import ujson as json\nexcept ImportError:\n    import json\n",
    "one of two ways, by condition": (
        "import sys\n\nif sys.version_info >= (3, 12):\n    from typing import override\n"
        "else:\n    from typing_extensions import override\n"
    ),
    "an attribute of a class": "class Message:\n    from email.iterators import walk\n",
    "everything": "from json import *\n",
    "used as part of a package": "import os.path\n\nprint(os.getcwd())\n",
    "used in a decorator only": "import functools\n\n\n@functools.cache\ndef one():\n    return 1\n",
    "removed": "import json\n\ndel json\n",
    "set for another function": "count = 0\n\n\ndef add():\n    global count\n    count = 1\n",
    "used by an inner function": "def outer():\n    n = 1\n\n    def inner():\n        return n\n\n    return inner\n",
    "set for an outer function": (
        "def outer():\n    n = 1\n\n    def inner():\n        nonlocal n\n        n = 2\n\n    return inner\n"
    ),
    "added to": "def add():\n    n = 1\n    n += 1\n",
    "one of a pair": "def head(text):\n    first, rest = text.split(',', 1)\n    return first\n",
    "unused on purpose": "def call(run):\n    _ = run()\n    _answer = run()\n",
    "used by way of locals": "def show(text):\n    name = 'x'\n    return text.format(**locals())\n",
    "an exception that is used": "try:\n    run = 1\nexcept OSError as error:\n    print(error)\n",
    "a marked line": "import json  # noqa: F401\nfrom os import (  # noqa\n    path,\n)\n",
    "a marked file": "# ruff: noqa\nimport json\n",
    "a command that is written out": "import os\n\nos.system('ls')\n",
    "a method with the name of a built-in function": "def run(model):\n    return model.eval(model)\n",
    "json is no pickle": "import json\n\n\ndef load(file):\n    return json.load(file)\n",
    "a secret that is read": "import os\n\npassword = os.environ['PASSWORD']\nsecret = 'ask somebody'\n",
    "nothing at all": "",
}


def found_in(source: str) -> list[tuple[str, int, str]]:
    findings = review_folder.review("a.py", textwrap.dedent(source), ALL_CHECKS)
    return sorted((finding.check, finding.line, finding.message) for finding in findings)


def test_each_check_has_a_file_of_its_own() -> None:
    assert sorted(WRONG) == sorted([*ALL_CHECKS, "todo"])
    assert review_folder.SEVERITY.keys() == {*WRONG, "syntax-error"}


@pytest.mark.parametrize("name", WRONG)
def test_check_finds_what_is_wrong_and_nothing_else(name: str) -> None:
    source, expected = WRONG[name]
    assert found_in(source) == [(name, line, message) for line, message in expected]


@pytest.mark.parametrize("name", RIGHT)
def test_checks_find_nothing_wrong_with(name: str) -> None:
    assert found_in(RIGHT[name]) == []


@pytest.mark.parametrize("source", ["x = = 1\n", "def f():\nreturn 1\n", "x = '\0'\n", "(" * 300])
def test_what_cannot_be_parsed_is_one_finding(source: str) -> None:
    [(check, line, _)] = found_in(source)
    assert (check, line) == ("syntax-error", 2 if "def" in source else 1)


def test_imports_of_a_package_are_for_others() -> None:
    checker = review_folder.StyleChecker()
    source = "from json import loads\nlist = []\n"
    assert [finding["check"] for finding in checker.check_style("a/__init__.py", source)] == ["shadowed-builtin"]
    assert len(checker.check_style("a/b.py", source)) == 2


# review_folder.py: a folder.


def fill(folder: Path) -> None:
    """Create a folder with a file for each check, and others."""
    files = {f"{name.replace('-', '_')}.py": textwrap.dedent(source) for name, (source, _) in WRONG.items()}
    files |= {
        "clean.py": '"""Nothing is wrong here."""\n',
        "deep/er/syntax.py": "x = 1\nx = = 2\n",
        "package/__init__.py": "from json import loads\n",
        "notes.txt": "import json\n",
        ".hidden/a.py": "import json\n",
        "venv/a.py": "import json\n",
        "an_environment/pyvenv.cfg": "",
        "an_environment/a.py": "import json\n",
        "node_modules/a.py": "import json\n",
        "__pycache__/a.py": "import json\n",
        "build/a.py": "import json\n",
        "large.py": "#" * 500_001,
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    (folder / "latin.py").write_bytes("# coding: latin-1\nimport json  # für später\n".encode("latin-1"))
    (folder / "not_utf8.py").write_bytes(b"name = '\xff'\n")
    (folder / "odd_encoding.py").write_bytes(b"# coding: no-such-encoding\n")
    (folder / "folder.py").mkdir()


AGENTS = {"bug-hunter": review_folder.BUGS, "security-scout": review_folder.RISKS}


def found(path: str, line: int, check: str, message: str) -> review_folder.Finding:
    """Return a finding with the severity of its check, and the agent that does this check."""
    agent = next((name for name, checks in AGENTS.items() if check in checks), "style-checker")
    return review_folder.Finding(path, line, check, message, review_folder.SEVERITY[check], agent)


NOT_DECODED = "is not UTF-8, or not in the encoding that it declares"
EXPECTED = sorted(
    [
        *(
            found(f"{name.replace('-', '_')}.py", line, name, message)
            for name, (_, lines) in WRONG.items()
            for line, message in lines
        ),
        found("deep/er/syntax.py", 2, "syntax-error", "invalid syntax")._replace(agent="bug-hunter"),
        found("latin.py", 2, "unused-import", "json is imported and never used"),
        review_folder.Finding("not_utf8.py", 1, "encoding", NOT_DECODED, "high", "requester"),
        review_folder.Finding("odd_encoding.py", 1, "encoding", NOT_DECODED, "high", "requester"),
    ],
    key=review_folder.rank,
)
SKIPPED = "large.py: has more than 500000 bytes"


def printed_by_review(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command of the docstring in a folder."""
    [command] = transcript("review_folder.py")
    return finished(*shlex.split(command.replace("FOLDER", "."))[1:], *options, cwd=folder)


def test_review_of_a_folder_prints_what_matters_most(tmp_path: Path) -> None:
    fill(tmp_path)
    outcome = printed_by_review(tmp_path)
    *findings, empty, summary, hidden, cost = outcome.stdout.splitlines()
    shown = EXPECTED[: review_folder.SHOWN_MAX]
    rest = Counter(one.severity for one in EXPECTED[len(shown) :])
    assert [line.split()[:2] for line in findings] == [[one.severity, f"{one.path}:{one.line}"] for one in shown]
    assert [line.split()[-1] for line in findings] == [one.agent for one in shown]
    assert (empty, summary) == ("", f"{len(EXPECTED)} findings in 22 of 25 files, 1 skipped")
    counts = ", ".join(f"{rest[severity]} {severity}" for severity in review_folder.SEVERITIES)
    assert hidden == f"not shown: {counts} (--all shows them)"
    assert re.fullmatch(r"66 tasks done by 3 agents in \d+\.\d s; to look at the hub yourself, add --keep", cost)
    assert max(map(len, (*findings, summary, hidden, cost))) <= 100
    [hub, *joined, one, two, three, four, skipped] = outcome.stderr.splitlines()
    assert re.fullmatch(r"the hub is at ws://127\.0\.0\.1:\d+", hub)
    assert [line.split(":")[0] for line in joined] == [f"{name} joined" for name in (*AGENTS, "style-checker")]
    assert [one, two, three, four] == [f"reviewed {done} of 25 files" for done in (7, 13, 19, 25)]
    assert skipped == f"skipped {SKIPPED}"
    assert outcome.returncode == 0


def test_review_shows_all_findings_if_asked_to(tmp_path: Path) -> None:
    fill(tmp_path)
    *findings, _, summary, _ = printed_by_review(tmp_path, "--all").stdout.splitlines()
    assert [line.split()[:2] for line in findings] == [[one.severity, f"{one.path}:{one.line}"] for one in EXPECTED]
    assert summary.startswith(f"{len(EXPECTED)} findings")


def test_review_of_a_folder_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    assert review_folder.main(["--json", str(tmp_path)]) == 0
    outcome = json.loads(capsys.readouterr().out)
    root = tmp_path.as_posix()
    assert outcome == {
        "files": 25,
        "findings": [{**one._asdict(), "path": f"{root}/{one.path}"} for one in EXPECTED],
        "skipped": [f"{root}/{SKIPPED}"],
    }


def test_review_of_a_clean_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clean.py").write_text("x = 1\n")
    assert review_folder.main([str(tmp_path), "--fail"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == "0 findings in 0 of 1 file"
    assert last.startswith("3 tasks done by 3 agents in ")


def test_review_of_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert review_folder.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("0 findings in 0 of 0 files\n0 tasks done by 3 agents in ")


def test_review_fails_only_if_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong.py").write_text("import json\n")
    assert review_folder.main([str(tmp_path)]) == 0
    assert review_folder.main([str(tmp_path), "--fail"]) == 1
    assert capsys.readouterr().out.splitlines()[-3:-1] == [
        "1 finding in 1 of 1 file",
        "not shown: 1 minor (--all shows them)",
    ]


@pytest.mark.skipif(not POSIX, reason="sends SIGINT")
def test_review_keeps_the_hub_until_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("import json\n")
    with running("-m", "examples.review_folder", str(tmp_path), "--keep") as process:
        assert process.stderr is not None
        command = next(line for line in process.stderr if line.startswith("python3 -m agenthub"))
        status = finished(*shlex.split(command)[1:])
        assert (status.returncode, status.stderr) == (0, "")
        assert all(name in status.stdout for name in (*AGENTS, "style-checker")), status.stdout
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=WAIT_S)
    assert (process.returncode, errors) == (0, "")
    assert printed.startswith("1 finding in 1 of 1 file\n")


def test_review_of_no_folder_is_a_usage_error(tmp_path: Path) -> None:
    outcome = finished("-m", "examples.review_folder", str(tmp_path / "none"))
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert outcome.stderr.splitlines()[-1] == f"review_folder: error: no such folder: {tmp_path / 'none'}"


async def reviewed(*paths: Path) -> review_folder.Review:
    async with review_folder.network() as (_, me):
        return await review_folder.review_files(me, list(paths))


def test_review_goes_on_when_a_file_is_gone(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("import json\n")
    outcome = asyncio.run(reviewed(tmp_path / "gone.py", tmp_path / "wrong.py"))
    assert [finding.check for finding in outcome.findings] == ["unused-import"]
    assert outcome.skipped == [f"{(tmp_path / 'gone.py').as_posix()}: {os.strerror(2)}"]


def test_review_goes_on_when_an_agent_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(tree: object) -> Iterator[tuple[int, str]]:
        raise RuntimeError("out of order")

    monkeypatch.setitem(review_folder.BUGS, "broken", broken)
    (tmp_path / "a.py").write_text("import json\n")
    assert review_folder.main([str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("0 findings in 0 of 1 file, 1 skipped\n")
    assert printed.err.splitlines()[-1] == f"skipped {tmp_path.as_posix()}/a.py: RuntimeError: out of order"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_has_a_line_for_each_agent_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    progress = review_folder.Progress(["hunter", "style"], 2)
    with progress.task_of("hunter"):
        pass
    with progress.task_of("style"):
        pass
    progress.step()
    frames = terminal.getvalue().split("\x1b[2F")
    assert frames[0] == "\n\n"
    assert frames[-1].split("\x1b[K\n") == [
        "hunter  ###########-----------  0 running     1 of 2 done",
        "style   ###########-----------  0 running     1 of 2 done",
        "",
    ]


@pytest.mark.parametrize("columns", [10, 40, 80])
def test_output_fits_a_terminal_also_with_wide_characters(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    findings = [
        found("源代码/" * 12 + "é.py", 12, "todo", "a comment says TODO"),
        found("a.py", 1, "todo", "审查" * 30),
    ]
    lines = list(review_folder.rows(findings, max(columns, 52), colors=False))
    widths = [review_folder.columns_of(line) for line in lines]
    assert max(widths) <= max(columns, 52)
    assert len({len(line) - len(line.rstrip()) for line in lines}) == 1
    assert lines[0].split("  ")[1].strip().startswith("…")
    assert "é.py:12" in lines[0]
    progress = review_folder.Progress([one.agent for one in findings], 2)
    assert review_folder.columns_of(review_folder.fit(progress._line("style-checker", columns), columns - 1)) < columns


async def test_the_agents_of_a_review_say_what_they_do() -> None:
    async with review_folder.network() as (_, me):
        assert await review_folder.discover_reviewers(me) == {
            "bug-hunter": "find-bugs",
            "security-scout": "find-risks",
            "style-checker": "check-style",
        }
