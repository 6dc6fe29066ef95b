"""The JavaScript client, clients/agenthub.mjs: its own tests in Node, conversations with the Python SDK, its types.

They need Node 22, or 20, whose WebSocket is experimental; `npm install --no-save node@22 ws typescript`
in the project's folder brings all of it, and what is missing is skipped.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agenthub import Agent, Piece, Refused, Task, TaskFailed, TaskTimeout
from clients.conformance import CHECKS
from tests.support import ROOT, WAIT_S, hub_process
from tests.test_interop import PageHandler, PageServer, chromium_command, page, started  # noqa: F401  # a fixture

CLIENT = ROOT / "clients" / "agenthub.mjs"
TYPES = ROOT / "clients" / "agenthub.d.mts"
MODULES = ROOT / "node_modules"
PAGE = ROOT / "docs" / "javascript.md"
VECTORS = ROOT / "docs" / "protocol-vectors.json"
TESTS = ROOT / "tests" / "javascript"
TESTS_S = 180.0
TSC_FLAGS = (
    *("--strict", "--checkJs", "--allowJs", "--declaration", "--emitDeclarationOnly", "--stripInternal"),
    *("--target", "es2022", "--lib", "es2022,dom", "--module", "nodenext", "--moduleDetection", "force"),
    *("--types", "", "--outDir"),
)


def node_command() -> list[str] | None:
    """Return the command of a Node that has a WebSocket, the project's own one first; None if there is none."""
    for program in (MODULES / ".bin" / "node", shutil.which("node")):
        if program is None or not Path(program).exists():
            continue
        for flags in ([], ["--no-warnings", "--experimental-websocket"]):
            command = [str(program), *flags]
            if not subprocess.run([*command, "-e", "WebSocket"], capture_output=True).returncode:
                return command
    return None


NODE = node_command() or []
needs_node = pytest.mark.skipif(not NODE, reason="needs Node 22")
WEBSOCKETS = [None, pytest.param("ws", marks=pytest.mark.long)]


def environment(url: str, websocket: str | None) -> dict[str, str]:
    """Return the environment of a test in Node; `websocket` is the package whose WebSocket it uses (None: Node's)."""
    if websocket is not None and not (MODULES / websocket).exists():
        pytest.skip(f"needs npm install --no-save {websocket}")
    chosen = {} if websocket is None else {"AGENTHUB_TEST_WS": websocket}
    return {
        **os.environ,
        **chosen,
        "AGENTHUB_URL": url,
        "AGENTHUB_TEST_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
    }


def run_in_node(name: str, websocket: str | None = None) -> None:
    command = [*NODE, "--test", "--test-reporter=spec", str(TESTS / name)]
    run = subprocess.run(
        command, cwd=ROOT, env=environment("", websocket), capture_output=True, text=True, timeout=TESTS_S
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert re.search(r"^. pass [1-9]\d*$", run.stdout, re.MULTILINE), run.stdout


@needs_node
@pytest.mark.parametrize("websocket", WEBSOCKETS)
def test_client_passes_its_tests_in_node(websocket: str | None) -> None:
    run_in_node("agenthub.test.mjs", websocket)


@needs_node
@pytest.mark.long
@pytest.mark.parametrize("websocket", [None, "ws"])
@pytest.mark.parametrize("name", ["chaos.test.mjs", "hostile.test.mjs"])
def test_client_survives_a_bad_network(name: str, websocket: str | None) -> None:
    run_in_node(name, websocket)


@pytest.fixture
def url() -> Any:
    with hub_process() as (url, _):
        yield url


@needs_node
@pytest.mark.parametrize("websocket", WEBSOCKETS)
async def test_python_delegates_to_javascript(url: str, websocket: str | None) -> None:
    command = [*NODE, str(TESTS / "peer.mjs"), "worker"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, env=environment(url, websocket))
    try:
        assert process.stdout is not None
        async with asyncio.timeout(WAIT_S), Agent("requester", url=url) as me:
            assert await process.stdout.readline() == b"ready\n"
            values = await asyncio.gather(*(me.delegate("double", {"value": number}) for number in range(1000)))
            assert values == [[number, number] for number in range(1000)]
            handle = await me.submit("double", {"value": "Grüße 😀"})
            assert [(one.progress, one.detail) async for one in handle] == [(0.5, "Grüße 😀")]
            assert await handle.result() == ["Grüße 😀"] * 2
            with pytest.raises(TaskFailed, match="not today") as failed:
                await me.delegate("refuse")
            assert failed.value.code == "closed"
            with pytest.raises(TaskTimeout):
                await me.delegate("wait", ttl=0.1)
            (found,) = await me.discover("double")
            assert found.capabilities[0].input_schema == {"type": "object", "required": ["value"]}
            if sys.platform != "win32":
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0
                with pytest.raises(Refused, match="no online agent"):
                    await me.delegate("double", {"value": 1})
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@needs_node
@pytest.mark.parametrize("websocket", WEBSOCKETS)
async def test_javascript_delegates_to_python(url: str, websocket: str | None) -> None:
    worker = Agent("worker", url=url)

    @worker.capability
    async def double(value: Any, task: Task) -> list[Any]:
        task.progress(0.5, value)
        return [value, value]

    @worker.capability
    async def refuse() -> None:
        raise TaskFailed("not today", code="closed")

    @worker.capability
    async def wait() -> None:
        await asyncio.Event().wait()

    command = [*NODE, str(TESTS / "peer.mjs"), "requester"]
    async with asyncio.timeout(WAIT_S), worker:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=subprocess.PIPE, env=environment(url, websocket)
        )
        raw, _ = await process.communicate()
    assert process.returncode == 0
    report = json.loads(raw)
    assert report["doubled"] == [[number, number] for number in range(1000)]
    assert report["events"] == [[0.5, "Grüße 😀"]]
    assert report["output"] == ["Grüße 😀"] * 2
    assert report["failures"] == [
        ["TaskFailed", "closed"],
        ["TaskTimeout", "timeout"],
        ["Refused", "no_agent"],
        ["TaskFailed", "invalid_input"],
    ]


@needs_node
async def test_minimal_client_asks_answers_and_streams(url: str) -> None:
    """The client without our code, as a worker and as a requester of the real hub."""
    me = Agent("requester", url=url)

    @me.capability
    async def elsewhere(task: Task) -> Any:
        return [await task.ask("which?"), task.input]

    command = [*NODE, str(TESTS.parent / "interop" / "minimal.mjs")]
    async with asyncio.timeout(WAIT_S), me, started(*command, env=environment(url, None)):
        answers = await me.delegate(
            "ask", ["main?", "sure?"], wait=True, on_question=lambda question: question.text * 2
        )
        assert answers == ["main?main?", "sure?sure?"]
        assert await me.delegate("answer", 7) == ["which?", 7]
        with pytest.raises(TaskFailed) as failed:
            await me.delegate("ask", ["main?"])
        assert failed.value.code == "no_answers"
        with pytest.raises(TaskFailed) as failed:
            await me.delegate("relay", 7)
        assert failed.value.code == "no_answers"
        items = [{"line": number} for number in range(20)]
        handle = await me.submit("stream", items)
        assert [one.piece async for one in handle if isinstance(one, Piece)] == items
        assert await handle.result() == items
        assert [piece async for piece in me.stream("stream", items)] == items


@needs_node
@pytest.mark.skipif(not (MODULES / ".bin" / "tsc").exists(), reason="needs npm install --no-save typescript")
def test_types_are_strict_and_fresh(tmp_path: Path) -> None:
    """To make them again: the command of this test, with clients as the folder."""
    command = [*NODE, str(MODULES / ".bin" / "tsc"), *TSC_FLAGS, str(tmp_path), str(CLIENT)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert run.stdout == ""
    assert run.returncode == 0
    assert (tmp_path / TYPES.name).read_text() == TYPES.read_text()


def gzip_kb(raw: bytes) -> float:
    return len(gzip.compress(raw, 9)) / 1000


def test_client_is_as_small_as_the_page_says() -> None:
    text = CLIENT.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120
    said = re.search(r"has ([\d.]+) kB gzip", PAGE.read_text(encoding="utf-8"))
    assert said is not None
    assert abs(gzip_kb(text.encode()) - float(said[1])) < 0.1


@needs_node
@pytest.mark.skipif(not (MODULES / ".bin" / "esbuild").exists(), reason="needs npm install --no-save esbuild")
def test_bundle_is_as_small_as_the_page_says() -> None:
    command = [str(MODULES / ".bin" / "esbuild"), "--bundle", "--minify", "--format=esm", str(CLIENT)]
    bundle = subprocess.run(command, capture_output=True, check=True, timeout=WAIT_S).stdout
    said = re.search(r"adds ([\d.]+) kB gzip", PAGE.read_text(encoding="utf-8"))
    assert said is not None
    assert gzip_kb(bundle) <= float(said[1])


@needs_node
def test_examples_of_the_page_greet_ada(url: str, tmp_path: Path) -> None:
    greeter, caller = re.findall(r"^```js\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    shutil.copy(CLIENT, tmp_path)
    (tmp_path / "greeter.mjs").write_text(greeter)
    (tmp_path / "caller.mjs").write_text(caller.replace("ttl: 60", "ttl: 60, wait: true"))
    with subprocess.Popen([*NODE, str(tmp_path / "greeter.mjs")], env=environment(url, None)) as agent:
        try:
            called = subprocess.run(
                [*NODE, str(tmp_path / "caller.mjs")],
                env=environment(url, None),
                capture_output=True,
                text=True,
                timeout=WAIT_S,
            )
            assert called.stdout == "Hello, ADA!\n", called.stderr
        finally:
            agent.terminate()
        assert agent.wait(WAIT_S) == 0 or sys.platform == "win32"


def test_page_counts_the_checks_and_the_vectors() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert f"in {len(CHECKS)}\n  checks" in text
    count = int(re.search(r"has (\d+) exchanges", text)[1])  # type: ignore[index]
    assert 0 <= len(json.loads(VECTORS.read_text(encoding="utf-8"))) - count < 10


# In a browser.

BROWSER_PAGE = """<!doctype html><script type="module">
import { Agent } from "/agenthub.mjs";
const report = (what) => fetch("/report", { method: "POST", body: JSON.stringify(what) });
try {
  const { url, token } = await (await fetch("/plan")).json();
  const agent = new Agent("page", { url, token, log: () => {} });
  let ended;
  const end = new Promise((resolve) => { ended = resolve; });
  agent.capability("ask", async (text, task) => [text, await task.ask("which?")]);
  agent.capability("leave", () => ended());
  await agent.start();
  const numbers = Array.from({ length: 300 }, (_, number) => number);
  const doubled = await Promise.all(numbers.map((value) => agent.delegate("double", { value }, { wait: true })));
  const pieces = [];
  for await (const piece of agent.stream("write")) pieces.push(piece);
  await end;
  await agent.close({ drain: 5 });
  await report({ doubled, text: pieces.join("") });
} catch (error) {
  await report({ error: `${error}` });
}
</script>"""


class BrowserHandler(PageHandler):
    """Serves the client, and a page that uses it."""

    def do_GET(self) -> None:
        if self.path == "/agenthub.mjs":
            self.answer("text/javascript", CLIENT.read_text(encoding="utf-8"))
        elif self.path == "/plan":
            super().do_GET()
        else:
            self.answer("text/html", BROWSER_PAGE)


async def test_client_runs_in_a_page_of_an_allowed_origin(page: PageServer, tmp_path: Path) -> None:  # noqa: F811
    page.RequestHandlerClass = BrowserHandler
    token = "a-token-of-the-page-with-enough-characters"
    (tmp_path / "token").write_text(token)
    (tmp_path / "token").chmod(0o600)
    command = chromium_command(page.origin, tmp_path / "profile")
    with hub_process("--allow-origin", page.origin, "--token-file", str(tmp_path / "token")) as (url, _):
        page.plan = {"url": url, "token": token}
        async with asyncio.timeout(WAIT_S), Agent("worker", url=url, token=token) as worker:

            @worker.capability
            async def double(value: int) -> int:
                return 2 * value

            @worker.capability
            async def write() -> AsyncIterator[str]:
                for word in ("Once ", "upon ", "a time"):
                    yield word

            async with started(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
                answered = await worker.delegate("ask", "Grüße", wait=True, on_question=lambda question: question.text)
                await worker.delegate("leave")
                report = await asyncio.wrap_future(page.report)
    assert answered == ["Grüße", "which?"]
    assert report == {"doubled": [2 * value for value in range(300)], "text": "Once upon a time"}
