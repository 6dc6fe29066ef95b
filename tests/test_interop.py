"""Other implementations of WebSocket as peers, over real sockets: `websockets`, Node's `ws` and undici, and Chromium.

Each is a client of a hub, and some are a fake hub for an agent; hub and agent run in processes of their own. A missing
implementation is skipped, unless AGENTHUB_PEERS=required is set. The JavaScript is in tests/interop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import http.server
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from agenthub import Agent
from tests.support import WAIT_S, hub_process, running

JAVASCRIPT = Path(__file__).parent / "interop"
INSTALL_S = 60.0
NODE_FLAGS = ["--no-warnings", "--experimental-websocket"]  # Its own WebSocket needs no flag from version 22 on.

INPUTS = ["", "Grüße, 世界 😀 \u2028 \x00", "€😀é" * 100_000, "x" * 900_000]  # The third has 900,000 bytes too.
REGISTER = '{"type": "register", "name": "passer-by"}'
# The input of one further connection each, and how its client closes it, if it does.
ENDINGS: list[dict[str, Any]] = [
    {"texts": [], "close": (1000, "done")},
    {"texts": [REGISTER], "close": (4321, "genug, 足りる 😀")},
    {"texts": [REGISTER, '{"type": "deregister"}']},
    {"texts": ["x" * 1_100_000]},
]
CLOSED = {"1000": 2, "other": 1, "1009": 1}  # The hub's counts afterwards.
# The fields that a hub adds to a task, without nulls.
TERMS = {"ttl": 60.0, "priority": 0, "max_retries": 0, "attempt": 1}
LEAVING, REFUSED = (1001, "going, 行く"), (1008, "not you")  # How a fake hub ends the first and the second connection.

AGENT = """
import sys
from agenthub import Agent, Disconnected, Task

agent = Agent("echoing", url=sys.argv[1])

@agent.capability
async def echo(task: Task):
    return task.input

try:
    agent.run()
except Disconnected as error:
    print(error.close_code)
"""
PAGE = """<!doctype html><script type="module">
const report = (what) => fetch("/report", {method: "POST", body: JSON.stringify(what)});
try {
    const {asClient} = await import("/peer.mjs");
    const plan = await (await fetch("/plan")).json();
    await report(await asClient(plan, () => new WebSocket(plan.url)));
} catch (error) {
    await report({error: `${error}`});
}
</script>"""

Plan = dict[str, Any]
Report = dict[str, Any]
Client = Callable[[Plan], Coroutine[Any, Any, Report]]
FakeHub = Callable[[Plan], contextlib.AbstractAsyncContextManager[tuple[str, Awaitable[Report]]]]


def missing(why: str) -> NoReturn:
    """Skip the test, or fail it if all implementations are required."""
    if os.environ.get("AGENTHUB_PEERS") == "required":
        pytest.fail(f"a required peer is missing: {why}")
    pytest.skip(why)


def program(name: str) -> str:
    return shutil.which(name) or missing(f"{name} is not on the PATH")


def imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing(str(error))


@contextlib.asynccontextmanager
async def started(*command: str, **streams: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program; end it when the block ends."""
    process = await asyncio.create_subprocess_exec(*command, **streams)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), WAIT_S)


@pytest.fixture(
    autouse=True, params=[None, pytest.param("1", marks=pytest.mark.long)], ids=["as installed", "built in"]
)
def _implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let our end use `websockets` if installed, or the built-in implementation."""
    if request.param is None:
        monkeypatch.delenv("AGENTHUB_BUILTIN", raising=False)
    else:
        monkeypatch.setenv("AGENTHUB_BUILTIN", request.param)


# The package `websockets`.


class Line:
    """A connection of `websockets` that speaks JSON, like Line in tests/interop/peer.mjs."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.pings: list[str] = []
        self.pongs: list[str] = []

    async def say(self, message: dict[str, Any], in_fragments: bool = False) -> None:
        """Send a message; in fragments, the first cut within a character, and a ping between them."""
        raw = json.dumps(message, ensure_ascii=False).encode()
        await self.connection.send(self._fragments(raw) if in_fragments else raw, text=True)

    async def _fragments(self, raw: bytes) -> AsyncIterator[bytes]:
        cut = next((index + 1 for index, byte in enumerate(raw) if byte >= 0xC2), len(raw) // 2)
        yield raw[:cut]
        self.pings.append(f"ping {len(self.pings)}")
        await (await self.connection.ping(self.pings[-1]))
        self.pongs.append(self.pings[-1])  # A pong with another payload would not have ended the wait.
        yield raw[cut:]

    async def hear(self, type: str) -> dict[str, Any]:
        """Return the next message of a type, skipping others."""
        while True:
            message: dict[str, Any] = json.loads(await self.connection.recv())
            if message["type"] == type:
                return message
            assert message["type"] != "error", message

    async def echo(self, in_fragments: bool) -> Any:
        """Answer the next task with its own input, and return that."""
        task = await self.hear("delegate")
        result = {"success": True, "output": task["input"], "attempt": task["attempt"]}
        await self.say({"type": "result", "id": "r", "task_id": task["task_id"], **result}, in_fragments)
        return task["input"]

    async def closed(self) -> list[Any]:
        await self.connection.wait_closed()
        return [self.connection.close_code, self.connection.close_reason]

    def report(self, **seen: Any) -> Report:
        extensions = ", ".join(extension.name for extension in self.connection.protocol.extensions)
        return {**seen, "pings": self.pings, "pongs": self.pongs, "extensions": extensions}


@pytest.fixture
def websockets_client() -> Client:
    connect = imported("websockets.asyncio.client").connect
    connection_closed = imported("websockets.exceptions").ConnectionClosed

    async def as_client(plan: Plan) -> Report:
        inputs, outputs, closes = list[Any](), list[Any](), list[Any]()
        async with connect(plan["url"], compression="deflate") as connection:
            assert "permessage-deflate" in connection.request.headers["Sec-WebSocket-Extensions"]
            line = Line(connection)
            await line.say({"type": "register", "id": "first", "name": "peer"})
            agent_id = (await line.hear("register"))["agent_id"]
            for in_fragments in (False, True):
                for text in plan["inputs"]:
                    task = {"task_id": f"own-{len(outputs)}", "agent_id": agent_id, "input": text}
                    await line.say({"type": "delegate", "id": "d", **task}, in_fragments)
                    inputs.append(await line.echo(in_fragments))
                    outputs.append((await line.hear("result"))["output"])
            for ending in plan["endings"]:
                async with connect(plan["url"]) as other:
                    with contextlib.suppress(connection_closed):  # While the oversized message is being sent.
                        for text in ending["texts"]:
                            await other.send(text)
                    if "close" in ending:
                        await other.close(*ending["close"])
                    closes.append(await Line(other).closed())
            await line.say({"type": "register", "id": "second", "name": "peer", "capabilities": ["last"]})
            inputs.append(await line.echo(True))
            closes.append(await line.closed())
        return line.report(inputs=inputs, outputs=outputs, closes=closes)

    return as_client


@pytest.fixture
def websockets_hub() -> FakeHub:
    serve = imported("websockets.asyncio.server").serve

    async def as_hub(plan: Plan, lines: asyncio.Queue[Line]) -> Report:
        registers, outputs, closes = list[dict[str, Any]](), list[Any](), list[Any]()

        async def welcomed(line: Line) -> Line:
            registers.append(await line.hear("register"))
            await line.say({**plan["welcome"], "reply_to": registers[-1]["id"]}, True)
            return line

        line = await welcomed(await lines.get())
        for in_fragments in (False, True):
            for text in plan["inputs"]:
                await line.say({**plan["task"], "task_id": f"task-{len(outputs)}", "input": text}, in_fragments)
                result = await line.hear("result")
                outputs.append(result["output"])
                done = {"task_id": result["task_id"], "state": "completed", "attempt": 1}
                await line.say({"type": "status", "reply_to": result["id"], **done}, in_fragments)
        await line.connection.close(*plan["closes"][0])
        closes.append(await line.closed())
        again = await welcomed(await lines.get())
        await again.connection.close(*plan["closes"][1])
        closes.append(await again.closed())
        return line.report(registers=registers, outputs=outputs, closes=closes)

    @contextlib.asynccontextmanager
    async def served(plan: Plan) -> AsyncIterator[tuple[str, Awaitable[Report]]]:
        lines: asyncio.Queue[Line] = asyncio.Queue()

        async def on_connection(connection: Any) -> None:
            lines.put_nowait(Line(connection))
            await connection.wait_closed()

        async with serve(on_connection, "127.0.0.1", 0, compression="deflate") as server:
            yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", as_hub(plan, lines)

    return served


# Node.


@pytest.fixture(scope="session")
def ws_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package `ws` where pytest keeps its cache, if it is not there yet; return the folder."""
    program("node")
    cache = getattr(request.config, "cache", None)
    folder: Path = tmp_path_factory.mktemp("node") if cache is None else cache.mkdir("node")
    if not (folder / "node_modules" / "ws" / "package.json").exists():
        options = ["--no-audit", "--no-fund", "--no-save", "--ignore-scripts", "--fetch-retries=0"]
        command = [program("npm"), "install", *options, "--prefix", str(folder), "ws@8"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_S)
        except subprocess.TimeoutExpired:
            missing(f"npm install ws has taken more than {INSTALL_S:.0f} s")
        except subprocess.CalledProcessError as error:
            errors = [line for line in error.stderr.splitlines() if line.startswith("npm error")]
            missing(f"npm install ws: {[*errors, f'exit code {error.returncode}'][0]}")  # The last names a log file.
    return folder


@contextlib.asynccontextmanager
async def node(plan: Plan, role: str, folder: Path | str = "") -> AsyncIterator[asyncio.subprocess.Process]:
    """Run tests/interop/node.mjs, with the plan as its input."""
    command = (program("node"), *NODE_FLAGS, str(JAVASCRIPT / "node.mjs"), role, str(folder))
    async with started(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(plan).encode())
        process.stdin.close()
        yield process


async def report_of(process: asyncio.subprocess.Process) -> Report:
    raw, _ = await process.communicate()
    assert process.returncode == 0
    report: Report = json.loads(raw)
    return report


async def node_report(plan: Plan, role: str, folder: Path | str = "") -> Report:
    async with node(plan, role, folder) as process:
        return await report_of(process)


@pytest.fixture
def ws_client(ws_folder: Path) -> Client:
    return lambda plan: node_report(plan, "ws-client", ws_folder)


@pytest.fixture
def undici_client() -> Client:
    if subprocess.run([program("node"), *NODE_FLAGS, "-e", "WebSocket"], capture_output=True).returncode:
        missing("this version of node has no WebSocket of its own")
    return lambda plan: node_report(plan, "undici-client")


@pytest.fixture
def ws_hub(ws_folder: Path) -> FakeHub:
    @contextlib.asynccontextmanager
    async def served(plan: Plan) -> AsyncIterator[tuple[str, Awaitable[Report]]]:
        async with node(plan, "ws-hub", ws_folder) as process:
            assert process.stdout is not None
            yield f"ws://127.0.0.1:{int(await process.stdout.readline())}", report_of(process)

    return served


# A browser.


class PageServer(http.server.ThreadingHTTPServer):
    """Serves the page that is a client of the hub, and its plan; takes its report."""

    plan: Plan

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), PageHandler)
        self.origin = f"http://127.0.0.1:{self.server_port}"
        self.report: concurrent.futures.Future[Report] = concurrent.futures.Future()


class PageHandler(http.server.BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        if self.path == "/plan":
            self.answer("application/json", json.dumps(self.server.plan))
        elif self.path == "/peer.mjs":
            self.answer("text/javascript", (JAVASCRIPT / "peer.mjs").read_text("utf-8"))
        else:
            self.answer("text/html", PAGE)

    def do_POST(self) -> None:
        report = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer("text/plain", "")
        self.server.report.set_result(report)

    def answer(self, content_type: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"{content_type}; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def page() -> Iterator[PageServer]:
    with PageServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def chromium_command(url: str, folder: Path) -> list[str]:
    """Return the command that opens a page in a browser without a window, whose profile is in `folder`."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic"]
    flags += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    return [program("chromium"), *flags, f"--user-data-dir={folder}", url]


@pytest.fixture
def chromium_client(page: PageServer, tmp_path: Path) -> Client:
    command = chromium_command(page.origin, tmp_path)

    async def as_client(plan: Plan) -> Report:
        page.plan = plan
        async with started(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            report = await asyncio.wrap_future(page.report)
        assert "error" not in report, report["error"]
        return report

    return as_client


# Both ends


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal that Windows does not have")
@pytest.mark.parametrize("peer", ["websockets", "ws", "undici", "chromium"])
async def test_foreign_client_and_hub_understand_each_other(
    peer: str, page: PageServer, request: pytest.FixtureRequest
) -> None:
    as_client: Client = request.getfixturevalue(f"{peer}_client")
    with hub_process("--allow-origin", page.origin) as (url, hub):
        async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
            client = group.create_task(as_client({"url": url, "inputs": INPUTS, "endings": ENDINGS}))
            async with Agent("asker", url=url) as asker:
                output = await asker.delegate("last", INPUTS[2], wait=True)
                status = (await asker.status()).hub
            hub.terminate()
        report = client.result()
        assert hub.wait(WAIT_S) == 0
    assert output == INPUTS[2]
    assert report["inputs"] == [*INPUTS, *INPUTS, INPUTS[2]]
    assert report["outputs"] == [*INPUTS, *INPUTS]
    assert report["pongs"] == report["pings"]
    assert bool(report["pings"]) == (peer in ("websockets", "ws"))  # A browser's WebSocket cannot ping.
    assert report["extensions"] == ""
    closed, done, deregistered, too_large, away = report["closes"]
    assert [tuple(closed), tuple(done)] == [ending["close"] for ending in ENDINGS[:2]]
    assert [deregistered[0], too_large[0], away[0]] == [1000, 1009, 1001]
    assert status is not None
    assert status["closed"] == CLOSED
    assert status["ended"]["completed"] == len(report["inputs"])


@pytest.mark.parametrize("peer", ["websockets", "ws"])
async def test_agent_and_foreign_hub_understand_each_other(peer: str, request: pytest.FixtureRequest) -> None:
    """The hub closes with 1001, so that the agent reconnects, and then with 1008."""
    as_hub: FakeHub = request.getfixturevalue(f"{peer}_hub")
    place = {"agent_id": "echoing-1", "resume": "s3cret"}
    plan = {
        "inputs": INPUTS,
        "welcome": {"type": "register", **place, "heartbeat_s": 30.0, "max_bytes": 2**20, "tasks": []},
        "task": {"type": "delegate", "sender": "peer", "agent_id": "echoing-1", "capability": "echo", **TERMS},
        "closes": [LEAVING, REFUSED],
    }
    async with asyncio.timeout(WAIT_S), as_hub(plan) as (url, reporting):
        with running("-c", AGENT, url) as agent:
            report = await reporting
            output, complaint = await asyncio.to_thread(agent.communicate, timeout=WAIT_S)
    assert (agent.returncode, output) == (0, f"{REFUSED[0]}\n"), complaint
    assert str(LEAVING[0]) in complaint  # It is logged.
    assert report["outputs"] == [*INPUTS, *INPUTS]
    assert report["pongs"] == report["pings"] != []
    assert report["extensions"] == ""
    assert [tuple(close) for close in report["closes"]] == [LEAVING, REFUSED]
    first, second = report["registers"]
    assert (first.get("agent_id"), second["agent_id"], second["resume"]) == (None, *place.values())
