"""Shared by the test modules: the command line, processes of it, and a raw client."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import agenthub
from tests.raw_websocket import WAIT_S, Connection, connect

ROOT = Path(__file__).parent.parent


def parsed(message: Any) -> Any:
    """Return a message with its payloads parsed; what is no message, or has none, as it is."""
    if not dataclasses.is_dataclass(message):
        return message
    values = {one.name: getattr(message, one.name) for one in dataclasses.fields(message)}
    payloads = {name: agenthub.value_of(value) for name, value in values.items() if type(value) is bytes}
    if isinstance(message, agenthub.StatusReply) and message.tasks and isinstance(message.tasks[0], bytes):
        payloads["tasks"] = [agenthub.TaskInfo(**agenthub.value_of(one)) for one in message.tasks]  # JSON text.
    return dataclasses.replace(message, **payloads) if payloads else message


def alive(*kinds: type) -> list[Any]:
    """Return the objects of these classes that are still referenced."""
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, kinds)]


@contextlib.contextmanager
def running(*args: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run `python ARGS` from the project's folder, with its output piped; end it when the block ends."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    process = subprocess.Popen(
        [sys.executable, *args],
        stdin=options.pop("stdin", subprocess.PIPE),
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        cwd=options.pop("cwd", ROOT),
        env=environment,
        **options,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=WAIT_S)


# The packages that a hub has to do without, by the codec that it uses then.
CODECS_WITHOUT: dict[str, tuple[str, ...]] = {
    "msgspec": (),
    "pydantic": ("msgspec",),
    "built in": ("msgspec", "pydantic"),
}
# Any JSON, each written as no encoder of ours writes it.
PAYLOADS_AS_WRITTEN = [
    *('"\\u00e4\\/\\ud83d\\ude00"', '"\\"}, \\\\"', '"\N{SNOWMAN}\x7f\\u0000"', "1E2", "1.0", "-0", "-0.0"),
    *("0.10", "1e-400", "18446744073709551615", "-9223372036854775808", "0." + "3" * 400, "[ ]", "{ }"),
    *('{"a":1,"a":[2],"\\u0061":{"b":3,"b":4}}', '{"type":"x","input":null,"output":{"detail":[]}}', "[[null] ]"),
    *("[1 ,2]", '{"b":1, "a":2}', '{"":{"":{"" :""}}}', "[" * 64 + "]" * 64, "false", '["x", ' + '"y" ,' * 3000 + "0]"),
]  # fmt: skip


@contextlib.contextmanager
def hub_process(
    *args: str, without: tuple[str, ...] = (), **options: Any
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a hub on a free port, as if some packages were not installed; yield its URL and its process."""
    options.setdefault("stderr", subprocess.DEVNULL)
    program = f"import sys; sys.modules.update(dict.fromkeys({without})); import agenthub; sys.exit(agenthub.main())"
    start = ("-c", program) if without else ("-m", "agenthub")
    with running(*start, "hub", "--port", "0", *args, **options) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on ws://"), line
        yield line.split()[-1], process


@contextlib.contextmanager
def hub_with(folder: Path, program: str) -> Iterator[str]:
    """Run a hub with the agents of a program in its process; yield its URL."""
    path = folder / "helper.py"
    path.write_text(program)
    with hub_process("--with", str(path)) as (url, _):
        yield url


def agenthub_main(*argv: str) -> int:
    """Run the command line in this process; return its exit code."""
    try:
        return agenthub.main(list(argv))
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        gc.collect()  # Resources that it left open are reported in this test, and not in a later one.


class RawClient:
    """A WebSocket client that speaks JSON, independent of our code. `seen` holds messages skipped while waiting."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.seen: list[dict[str, Any]] = []
        self.count = 0

    async def send(self, **message: Any) -> None:
        await self.connection.send(json.dumps(message))

    async def receive(self) -> dict[str, Any]:
        """Return the next message within WAIT_S. Raises ConnectionClosed when there is none left."""
        async with asyncio.timeout(WAIT_S):
            message: dict[str, Any] = json.loads(await self.connection.recv())
        return message

    async def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the first message, already seen or yet to be received, that is `wanted`."""
        for index, message in enumerate(self.seen):
            if wanted(message):
                return self.seen.pop(index)
        while True:
            message = await self.receive()
            if wanted(message):
                return message
            self.seen.append(message)

    async def request(self, **message: Any) -> dict[str, Any]:
        """Send a message with a new id, and return the reply to it."""
        self.count += 1
        message_id = message.setdefault("id", f"request-{self.count}")
        await self.send(**message)
        return await self.until(lambda reply: reply.get("reply_to") == message_id)

    async def register(self, name: str, *capabilities: Any, **fields: Any) -> dict[str, Any]:
        return await self.request(type="register", name=name, capabilities=list(capabilities), **fields)

    async def delegate(self, task_id: str, **fields: Any) -> dict[str, Any]:
        return await self.request(type="delegate", task_id=task_id, **fields)

    async def message(self, type: str, **fields: Any) -> dict[str, Any]:
        """Return the next message of a type, with these fields, that is not a reply."""
        return await self.until(
            lambda message: (
                message["type"] == type
                and "reply_to" not in message
                and all(message.get(name) == value for name, value in fields.items())
            )
        )

    async def nothing_else(self) -> None:
        """Assert that the hub has sent nothing more: the reply to a further request comes next."""
        assert self.seen == []
        await self.send(type="status", id="nothing-else")
        assert (await self.receive()).get("reply_to") == "nothing-else"

    async def closed(self) -> int:
        """Wait until the connection is closed, discarding messages; return its close code."""
        async with asyncio.timeout(WAIT_S):
            async for _ in self.connection:
                pass
            await self.connection.wait_closed()
        assert self.connection.close_code is not None
        return self.connection.close_code


@contextlib.asynccontextmanager
async def raw_client(url: str, **options: Any) -> AsyncIterator[RawClient]:
    async with connect(url, **options) as connection:
        yield RawClient(connection)


def client_link(owner: agenthub.LinkOwner) -> agenthub.ClientLink:
    """Return an agent's end of a WebSocket that has no socket yet."""
    protocol = agenthub.websockets_used().client("ws://hub/", agenthub.CLIENT_MESSAGE_BYTES_MAX)
    return agenthub.ClientLink(protocol, owner, None)
