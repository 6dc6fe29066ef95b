"""Hostile input: frames, JSON, numbers, floods, hostile hubs, other files.

In each test the hub stays up, other agents are not disturbed, the hub counts the event under one of a few fixed words,
and no log contains the input.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import heapq
import itertools
import json
import logging
import math
import os
import random
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agenthub
from agenthub import (
    Agent,
    Broadcast,
    Capability,
    Code,
    Delegate,
    Disconnected,
    Discover,
    HubServer,
    HubSettings,
    InvalidMessage,
    Journal,
    LogFloodFilter,
    LogFormatter,
    Register,
    Session,
    Status,
)
from tests.harness import HubHarness
from tests.raw_websocket import (
    BINARY,
    CLOSE,
    CONTINUATION,
    HANDSHAKE,
    PING,
    PONG,
    Connection,
    Script,
    frame,
    raw_socket,
    serve,
)
from tests.support import ROOT, WAIT_S, RawClient, agenthub_main, alive, hub_process, raw_client, running
from tests.test_transport import HEARTBEAT, Owner, Pair, Socket

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs signals, or modes of files as on POSIX")
linux_only = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="command lines are read from /proc")

MARK = "s3cr3t-mark"  # Part of all hostile input; must not appear in logs or errors.
BAD_TEXT = "a\nb\rc\x1b[31md\x1b]52;c;ZXZpbA==\x07e\u202ef\u2066g\x9bh"  # Lines, ANSI, OSC 52 and bidi.
NUMBERS = itertools.count(1)  # For the bystanders' task ids, unique because a journal remembers them.
STEERING = "\n\r\x1b\x07\u202e\u2066\x9b"


def is_harmless(text: str, *, lines: bool = False) -> bool:
    """Return whether a text is safe to print on a terminal."""
    return not any(one in text for one in (STEERING[1:] if lines else STEERING))


async def until(condition: Callable[[], Any]) -> Any:
    """Return the value of `condition` once it is true, within WAIT_S."""
    async with asyncio.timeout(WAIT_S):
        while not (found := condition()):
            await asyncio.sleep(0.002)
    return found


async def soon(awaitable: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(awaitable, WAIT_S)


# A hub, two well-behaved agents, and the hub's counts and logs.


class Scene:
    """A listening hub and two bystanders."""

    def __init__(
        self, server: HubServer, requester: RawClient, worker: RawClient, log: pytest.LogCaptureFixture
    ) -> None:
        self.server = server
        self.requester = requester
        self.worker = worker
        self.log = log

    async def bystanders_go_on(self) -> None:
        """Complete a task between the bystanders."""
        task_id = f"bystanders-{next(NUMBERS)}"
        reply = await self.requester.delegate(task_id, capability="bystander", input=task_id)
        assert reply["state"] == "in_progress"
        assert (await self.worker.message("delegate", task_id=task_id))["input"] == task_id
        await self.worker.request(type="result", task_id=task_id, success=True, output="done")
        assert (await self.requester.message("result", task_id=task_id))["output"] == "done"

    async def nobody_noticed(
        self, *, refused: dict[str, int] | None = None, closed: dict[str, int] | None = None
    ) -> None:
        """Assert that the bystanders go on, that exactly this was counted, and that no log contains the input."""
        await self.bystanders_go_on()
        refused, closed = refused or {}, closed or {}
        await until(lambda: sum(self.server.hub.summary()["closed"].values()) >= sum(closed.values()))
        summary = self.server.hub.summary()
        assert (summary["refused"], summary["closed"]) == (refused, closed)
        lines = [record.getMessage() for record in self.log.records]
        for code, number in refused.items():
            assert len([line for line in lines if f"refused code={code} " in line]) == number
        for code, number in closed.items():
            assert len([line for line in lines if f"closed code={code} " in line]) == number
        assert not [line for line in lines if MARK in line]
        assert not [record for record in self.log.records if record.levelno >= logging.ERROR]


@contextlib.asynccontextmanager
async def a_scene(
    log: pytest.LogCaptureFixture, settings: HubSettings | None = None, **options: Any
) -> AsyncIterator[Scene]:
    log.set_level(logging.DEBUG, "agenthub")
    log.clear()  # An earlier hub may have logged.
    async with (
        HubServer(settings, port=0, **options) as server,
        raw_client(server.url) as requester,
        raw_client(server.url) as worker,
    ):
        await requester.register("bystander-requester")
        await worker.register("bystander-worker", "bystander")
        yield Scene(server, requester, worker, log)


@pytest.fixture
async def scene(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Scene]:
    async with a_scene(caplog) as scene:
        yield scene


# 10. Frames.


def message(**fields: Any) -> bytes:
    return frame(json.dumps(fields).encode())


BAD_FRAMES = {
    "a header that claims 1 TiB": (frame(MARK.encode(), length=2**40), 1009),
    "a header that claims 1 byte too many": (frame(length=1_048_577), 1009),
    "a length with its highest bit set": (frame(length=2**63), (1002, 1009)),
    "RSV1": (frame(MARK.encode(), rsv=4), 1002),
    "RSV2": (frame(MARK.encode(), rsv=2), 1002),
    "RSV3": (frame(MARK.encode(), rsv=1), 1002),
    "invalid UTF-8": (frame(MARK.encode() + b"\xff"), 1007),
    "a surrogate in UTF-8": (frame(b'{"type": "\xed\xa0\x80"}'), 1007),
    "invalid UTF-8 in fragments": (frame(b'{"\xc3', fin=False) + frame(b"(", CONTINUATION), 1007),
    "a frame that is not masked": (frame(MARK.encode(), key=b""), 1002),
    "a ping of 126 bytes": (frame(b"x" * 126, PING), 1002),
    "a close of 126 bytes": (frame(b"\x03\xe8" + b"x" * 124, CLOSE), 1002),
    "a pong of 1 TiB": (frame(b"", PONG, length=2**40), (1002, 1009)),
    "a ping in fragments": (frame(b"x", PING, fin=False), 1002),
    "a close of one byte": (frame(b"\x03", CLOSE), 1002),
    "a close with a code that may not be sent": (frame(b"\x03\xee", CLOSE), 1002),
    "the reserved opcode 3": (frame(MARK.encode(), 3), 1002),
    "the reserved opcode 11": (frame(b"", 11), 1002),
    "a continuation of nothing": (frame(MARK.encode(), CONTINUATION), 1002),
    "a message within another": (frame(b"{", fin=False) + frame(b"}"), 1002),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
async def test_frame_that_breaks_the_rules_closes_its_connection_alone(name: str, scene: Scene) -> None:
    raw, codes = BAD_FRAMES[name]
    async with raw_socket(scene.server.url) as client:
        await client.send(raw)
        code = await client.close_code()
        assert code in (codes if isinstance(codes, tuple) else (codes,))
        await client.send(message(type="register", name=MARK))  # The hub ignores messages after its close.
        refused = {"invalid_message": 1} if code == 1007 else {}  # Invalid UTF-8 is an invalid message too.
        await scene.nobody_noticed(refused=refused, closed={str(code): 1})
        assert scene.server.hub.summary()["agents"] == 2


async def test_length_that_is_claimed_takes_no_memory(scene: Scene) -> None:
    async with raw_socket(scene.server.url) as client, raw_socket(scene.server.url) as other:
        tracemalloc.start()
        try:
            await client.send(frame(b"x" * 100_000, length=2**40))
            assert await client.close_code() == 1009
            await other.send(frame(length=1_000_000))  # The payload never follows.
            await scene.bystanders_go_on()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2_000_000


async def test_endless_row_of_fragments_is_closed_at_the_limit_of_a_message(scene: Scene) -> None:
    async with raw_socket(scene.server.url) as client:
        await client.send(frame(b"x" * 60_000, fin=False))
        for _ in range(17):
            await client.send(frame(b"x" * 60_000, CONTINUATION, fin=False))
        assert await client.close_code() == 1009
        await scene.nobody_noticed(closed={"1009": 1})


async def test_300_000_empty_fragments_are_too_many(caplog: pytest.LogCaptureFixture) -> None:
    async with a_scene(caplog, messages_per_s_max=0) as scene, raw_socket(scene.server.url) as client:
        await client.send(frame(b"", fin=False))
        sending = asyncio.create_task(client.send(frame(b"", CONTINUATION, fin=False) * 300_000))
        assert await client.close_code() == 1009
        await sending
        await scene.nobody_noticed(closed={"1009": 1})


async def test_compression_that_is_offered_is_never_used(scene: Scene) -> None:
    async with raw_socket(scene.server.url, handshake=False) as client:
        await client.handshake("Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits")
        assert client.head.startswith(b"HTTP/1.1 101 ")
        assert b"extensions" not in client.head.lower()
        await client.send(frame(b"\xaa\x56\x2a\xa9\x2c\x48\x55\xb2\x52\x00", rsv=4))
        assert await client.close_code() == 1002
        await scene.nobody_noticed(closed={"1002": 1})


async def test_binary_messages_are_refused_and_the_connection_lives_on(scene: Scene) -> None:
    raw = json.dumps({"type": "register", "name": MARK, "id": "1"}).encode()
    async with raw_socket(scene.server.url) as client:
        await client.send(frame(raw, BINARY))
        await client.send(frame(raw, BINARY, fin=False) + frame(b"", CONTINUATION))
        for _ in range(2):
            reply = await client.message()
            assert (reply["type"], reply["code"]) == ("error", "invalid_message")
            assert MARK not in json.dumps(reply)
        await client.send(message(type="status", id="2"))
        assert (await client.message())["reply_to"] == "2"
        await scene.nobody_noticed(refused={"invalid_message": 2})


@pytest.mark.parametrize("path", ["/", "/healthz", "/elsewhere"])
@pytest.mark.parametrize("host", ["127.0.0.1", "evil.example"])
async def test_frames_behind_a_request_that_is_no_handshake_are_not_read(path: str, host: str, scene: Scene) -> None:
    joined = scene.server.hub.summary()["connections"]
    behind = message(type="register", name=MARK) + frame(b"", PING) + frame(b"\xff", 3, key=b"")
    async with raw_socket(scene.server.url, handshake=False) as client:
        request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n"
        if host != "127.0.0.1":  # A valid handshake except for the name.
            request += "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            request += "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        await client.send(f"{request}\r\n".encode() + behind)
        answer = await soon(client.reader.read())
    assert answer.startswith(b"HTTP/1.1 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert not answer.startswith(b"HTTP/1.1 101 ")
    assert MARK.encode() not in answer
    assert scene.server.hub.summary()["connections"] == joined
    await scene.nobody_noticed()
    if host != "127.0.0.1":
        assert scene.server.rejected == {"host": 1}


async def test_first_frames_may_come_with_the_handshake(scene: Scene) -> None:
    async with raw_socket(scene.server.url, handshake=False) as client:
        behind = frame(b"early", PING) + message(type="status", id="1") + message(type="status", id="2")
        await client.handshake(behind=behind)
        assert client.head.startswith(b"HTTP/1.1 101 ")
        assert await client.frame() == (PONG, b"early", True)
        assert [(await client.message())["reply_to"] for _ in range(2)] == ["1", "2"]
        await scene.nobody_noticed()


# 11. JSON.


def nested(depth: int, inner: str = "1") -> str:
    """Return JSON with arrays and objects nested `depth` deep."""
    opening = ["[", '{"a":']
    return (
        "".join(opening[level % 2] for level in range(depth))
        + inner
        + "".join("]}"[level % 2] for level in reversed(range(depth)))
    )


PLACES = {  # Messages with a placeholder, and its depth within the field.
    "input": ('{"id": "x", "type": "delegate", "task_id": "t", "capability": "bystander", "input": %s}', 0),
    "broadcast": ('{"id": "x", "type": "broadcast", "capability": "nobody", "message": %s}', 0),
    "metadata": ('{"id": "x", "type": "register", "name": "n", "metadata": {"a": %s}}', 1),
    "schema": (
        '{"id": "x", "type": "register", "name": "n", "capabilities": [{"name": "c", "input_schema": {"a": %s}}]}',
        3,
    ),
    "unknown field": ('{"id": "x", "type": "status", "unknown": %s}', 0),
    "field in an unknown field": ('{"id": "x", "type": "status", "unknown": {"a": %s}}', 1),
}


@pytest.mark.parametrize("place", PLACES)
async def test_64_levels_are_fine_and_65_are_refused_in_every_place(place: str, scene: Scene) -> None:
    template, depth = PLACES[place]
    async with raw_client(scene.server.url) as client:
        await client.register("deep")
        for inner in ("1", f'"{MARK}[[[[{{"'):
            await client.connection.send(template % nested(64 - depth, inner))
            reply = await client.until(lambda reply: reply.get("reply_to") == "x")
            assert reply["type"] != "error" or reply["code"] == "duplicate_task"
        for deeper in (65, 66, 100, 199):
            await client.connection.send(template % nested(deeper - depth, f'"{MARK}"'))
            reply = await client.until(lambda reply: reply.get("reply_to") == "x")
            assert (reply["type"], reply["code"]) == ("error", "invalid_message")
            assert MARK not in json.dumps(reply)
        duplicates = {"duplicate_task": 1} if place == "input" else {}
        if place == "input":
            await scene.worker.request(type="result", task_id="t", success=True)  # Frees the worker.
    await scene.nobody_noticed(refused={**duplicates, "invalid_message": 4}, closed={"1000": 1})


@pytest.mark.parametrize("place", PLACES)
async def test_100_000_brackets_are_refused_and_the_connection_lives_on(place: str, scene: Scene) -> None:
    template, _ = PLACES[place]
    async with raw_client(scene.server.url) as client:
        await client.register("deep")
        for start, end in (("[", "]"), ('{"a":', "}")):
            many = start * 100_000
            for text in (template % many, template % (many + "1" + end * 100_000), many):
                await client.connection.send(text)
                reply = await client.receive()
                assert (reply["type"], reply["code"]) == ("error", "invalid_message")
        assert (await client.request(type="status"))["type"] == "status"
    await scene.nobody_noticed(refused={"invalid_message": 6}, closed={"1000": 1})


async def test_deepest_agent_that_is_let_in_can_be_read_back(scene: Scene) -> None:
    schema = {"a": json.loads(nested(61))}
    async with raw_client(scene.server.url) as client:
        capability = {"name": "deepest", "input_schema": schema, "output_schema": schema}
        await client.register("deepest", capability, metadata={"a": json.loads(nested(63))})
        await scene.requester.send(type="discover", id="d", capability="deepest")
        raw = await soon(scene.requester.connection.recv())
        found = agenthub.decoder_from_hub()(raw.encode())
        assert found.agents[0].capabilities[0].output_schema == schema
        for task_id, depth in (("deep", 64), ("shallow", 1)):
            value = json.loads(nested(depth))
            await scene.requester.delegate(task_id, capability="deepest", input=value)
            delivered = agenthub.decoder_from_hub()((await soon(client.connection.recv())).encode())
            assert agenthub.value_of(delivered.input) == value
            await client.request(type="result", task_id=task_id, success=True, output=value)
            await scene.requester.send(type="status", id=f"s-{task_id}", task_id=task_id)
            raw = await soon(scene.requester.connection.recv())  # First the outcome, then the reply.
            assert agenthub.value_of(agenthub.decoder_from_hub()(raw.encode()).output) == value
            raw = await soon(scene.requester.connection.recv())
            assert agenthub.value_of(agenthub.decoder_from_hub()(raw.encode()).output) == value
    await scene.nobody_noticed(closed={"1000": 1})


BAD_VALUES = {
    "5,000 digits": "7" * 5000,
    "2**64": str(2**64),
    "below -2**63": str(-(2**63) - 1),
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "1e999": "1e999",
    "-1e999": "-1e999",
    "half a pair": '"\\ud800"',
    "a control character": '"\x01"',
    "a leading zero": "01",
    "a plus": "+1",
    "a hexadecimal number": "0x10",
    "a single quote": "'a'",
    "a trailing comma": "[1,]",
    "a comment": "1 /* one */",
}


async def test_value_that_is_not_json_for_everybody_is_refused_in_payloads(scene: Scene) -> None:
    templates = [PLACES[place][0] for place in ("input", "broadcast", "metadata", "schema")]
    async with raw_client(scene.server.url) as client:
        await client.register("odd")
        for name, bad in BAD_VALUES.items():
            for template, value in itertools.product(templates, (bad, f'[{{"{MARK}": {bad}}}]')):
                await client.connection.send(template % value)
                reply = await client.receive()
                assert (reply["type"], reply["code"]) == ("error", "invalid_message"), (name, template, reply)
                assert MARK not in json.dumps(reply)
                assert "7777" not in json.dumps(reply)
        assert (await client.request(type="status", task_id="t"))["code"] == "unknown_task"
    refused = {"invalid_message": len(BAD_VALUES) * len(templates) * 2, "unknown_task": 1}
    await scene.nobody_noticed(refused=refused, closed={"1000": 1})


@pytest.mark.parametrize("value", ["7" * 5000, "NaN", "Infinity", "-Infinity", '"\\ud800"', "[1,]"])
def test_what_is_not_json_is_refused_in_fields_that_nobody_knows(value: str) -> None:
    for text in ('{"type": "heartbeat", "x": %s}', '{"type": "heartbeat", "id": "NaN", "x": [{"a": %s}]}'):
        with pytest.raises(InvalidMessage) as caught:
            agenthub.decoder_from_agent()((text % value).encode())
        assert "7777" not in caught.value.message


async def test_numbers_at_the_bounds_arrive_as_they_were(scene: Scene) -> None:
    for value in (-(2**63), 2**64 - 1, 0, -0.0, 1.7976931348623157e308, 5e-324, 0.1):
        await scene.requester.delegate(f"number-{value}".replace("+", ""), capability="bystander", input=[value])
        task = await scene.worker.message("delegate")
        assert repr(task["input"]) == repr([value])
        await scene.worker.request(type="result", task_id=task["task_id"], success=True, output=value)
        assert repr((await scene.requester.message("result"))["output"]) == repr(value)
    await scene.nobody_noticed()


WRONG_TYPES = [
    ("delegate", "ttl", True),
    ("delegate", "priority", True),
    ("delegate", "priority", 1.5),
    ("delegate", "max_retries", "1"),
    ("delegate", "wait", 1),
    ("delegate", "task_id", [MARK]),
    ("delegate", "task_id", 7),
    ("delegate", "capability", {MARK: 1}),
    ("register", "max_tasks", True),
    ("register", "max_tasks", "4"),
    ("register", "metadata", [MARK]),
    ("register", "capabilities", MARK),
    ("register", "name", None),
    ("discover", "limit", True),
    ("status", "tasks", "true"),
    ("status", "progress", True),
    ("result", "success", "true"),
    ("result", "attempt", True),
]


VALID = {"register": {"name": "n"}, "delegate": {"task_id": "t"}, "result": {"task_id": "t", "success": True}}


async def all_are_refused(scene: Scene, values: list[tuple[str, str, Any]]) -> None:
    """Send messages with one invalid field each; assert that each error names the field."""
    async with raw_client(scene.server.url) as client:
        await client.register("odd")
        for kind, field, value in values:
            reply = await client.request(**{"type": kind, **VALID.get(kind, {}), field: value})
            assert (reply["type"], reply["code"]) == ("error", "invalid_message"), (kind, field, value, reply)
            assert reply["message"].startswith(f"{field}: ")
            assert MARK not in json.dumps(reply)
        assert (await client.request(type="status", task_id="t"))["code"] == "unknown_task"
    await scene.nobody_noticed(refused={"invalid_message": len(values), "unknown_task": 1}, closed={"1000": 1})


async def test_value_of_another_type_is_refused_and_named(scene: Scene) -> None:
    await all_are_refused(scene, WRONG_TYPES)


async def test_id_and_type_of_another_form_are_refused_without_a_reply_to(scene: Scene) -> None:
    values: list[Any] = [[MARK], {"a": MARK}, 7, True, "", "x" * 129, "a\x00b"]
    codes: list[str] = []
    async with raw_client(scene.server.url) as client:
        for field, value in [*itertools.product(["id", "type"], values), ("type", None)]:
            await client.send(**{"type": "status", field: value})
            reply = await client.receive()
            assert reply["type"] == "error"
            assert reply["code"] in ("invalid_message", "unsupported_type")
            assert "reply_to" not in reply
            assert MARK not in json.dumps(reply)
            codes.append(reply["code"])
    await scene.nobody_noticed(refused={code: codes.count(code) for code in codes}, closed={"1000": 1})


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs), pairs
    return dict(pairs)


async def test_keys_that_come_twice_count_last_and_in_a_payload_are_passed_on(scene: Scene) -> None:
    text = (
        '{"type": "broadcast", "type": "delegate", "id": "x", "task_id": "other", "task_id": "twice", "id": "y",'
        ' "sender": "forged", "attempt": 9, "capability": "bystander",'
        ' "input": {"a": 1, "a": {"b": 1, "b": 2, "\\u0062": 3}, "\\u0061": {"b": 3, "b": 4}}}'
    )
    await scene.requester.connection.send(text)
    reply = await scene.requester.receive()
    assert (reply["reply_to"], reply["task_id"]) == ("y", "twice")
    raw = await soon(scene.worker.connection.recv())
    payload = '{"a": 1, "a": {"b": 1, "b": 2, "\\u0062": 3}, "\\u0061": {"b": 3, "b": 4}}'
    assert raw.count(payload) == 1
    delivered = json.loads(raw.replace(payload, "null"), object_pairs_hook=unique_keys)
    assert delivered["sender"] != "forged"
    assert delivered["attempt"] == 1
    await scene.worker.connection.send(
        '{"type": "result", "task_id": "twice", "success": false, "success": true, "output": {"c": 1, "c": 2}}'
    )
    raw = await soon(scene.requester.connection.recv())
    assert raw.count('{"c": 1, "c": 2}') == 1
    assert json.loads(raw.replace('{"c": 1, "c": 2}', "null"), object_pairs_hook=unique_keys)["success"] is True
    await scene.nobody_noticed()


async def test_names_that_mean_something_to_a_language_are_plain_keys(scene: Scene) -> None:
    value = {"__proto__": {"x": 1}, "constructor": {"prototype": {}}, "__class__": "int", "$ref": "#", "toString": None}
    await scene.requester.delegate("plain", capability="bystander", input=value)
    assert (await scene.worker.message("delegate"))["input"] == value
    await scene.worker.request(type="result", task_id="plain", success=True, output=value)
    assert (await scene.requester.message("result"))["output"] == value
    assert (await scene.requester.request(type="status", __proto__={"admin": True}, constructor=1))["type"] == "status"
    await scene.nobody_noticed()


ENDLESS = ['\\"', "\\", '"', "{", ":", '"a":', '\\\\"', "\\u0022", "\u00e9"]


async def test_60_kb_of_what_never_ends_is_refused(scene: Scene) -> None:
    async with raw_client(scene.server.url) as client:
        for part in ENDLESS:
            text = '{"type": "delegate", "task_id": "' + part * (60_000 // len(part))
            await client.connection.send(text)
            await client.connection.send('{"id": "found", ' + text[1:])
            first, second = await client.receive(), await client.receive()
            assert (first["code"], second["code"]) == ("invalid_message", "invalid_message"), part
            assert "reply_to" not in first
            assert second["reply_to"] == "found"
    await scene.nobody_noticed(refused={"invalid_message": 2 * len(ENDLESS)}, closed={"1000": 1})


def test_string_without_an_end_is_a_single_token() -> None:
    raw = b'{"type": "' + b'\\"' * 30_000
    assert [len(match[0]) for match in agenthub.JSON_TOKENS.finditer(raw)] == [1, 6, 1, 60_001]


ECHOES = [
    MARK,
    f'"{MARK}"',
    f"[{MARK!r}]",
    f'{{"{MARK}": 1}}',
    f'{{"type": "{MARK}"}}',
    f'{{"type": "status", "id": "{MARK}\x00"}}',
    f'{{"type": "status", "task_id": "{MARK} {MARK}"}}',
    f'{{"type": "register", "name": "{MARK}\\u202e"}}',
    f'{{"type": "register", "name": "n", "capabilities": ["{MARK}\\n"]}}',
    f'{{"type": "register", "name": "n", "capabilities": [{{"{MARK}": 1}}]}}',
    f'{{"type": "register", "name": "n", "metadata": "{MARK}"}}',
    f'{{"type": "register", "name": "n", "agent_id": "{MARK} "}}',
    f'{{"type": "delegate", "task_id": "t", "input": {{"{MARK}": NaN}}}}',
    f'{{"type": "delegate", "task_id": "t", "ttl": "{MARK}"}}',
    f'{{"type": "delegate", "task_id": "t", "agent_id": "{MARK}"}}',
    f'{{"type": "delegate", "task_id": "t", "agent_id": "a", "parent_id": "{MARK}"}}',
    f'{{"type": "result", "task_id": "t", "success": false, "error": {{"code": "{MARK}\\n"}}}}',
    f'{{"type": "status", "progress": "{MARK}"}}',
]


async def test_error_never_says_what_it_was_given(scene: Scene) -> None:
    codes: list[str] = []
    async with raw_client(scene.server.url) as client:
        await client.register("odd")
        for text in ECHOES:
            await client.connection.send(text)
            reply = await client.receive()
            assert reply["type"] == "error", text
            assert MARK not in json.dumps(reply), text
            codes.append(reply["code"])
    await scene.nobody_noticed(refused={code: codes.count(code) for code in codes}, closed={"1000": 1})


async def test_error_names_a_capability_that_nobody_offers_and_only_the_start_of_a_long_one(scene: Scene) -> None:
    """The only thing that an error repeats: a name without control characters, and at most 48 characters of it."""
    texts = []
    async with raw_client(scene.server.url) as client:
        await client.register("odd")
        for name in (MARK, MARK + "\U0001f600" * (128 - len(MARK)), f"{MARK}\x1b[31m", f"{MARK}\u202e"):
            reply = await client.request(type="delegate", task_id="t", capability=name)
            texts.append(reply["message"] if reply["code"] == "no_agent" else reply["code"])
    shortened = MARK + "\U0001f600" * (47 - len(MARK)) + "\u2026"
    offers = 'no online agent offers "{}"; start one, or set "wait"'
    assert texts == [offers.format(MARK), offers.format(shortened), "invalid_message", "invalid_message"]
    await scene.nobody_noticed(refused={"no_agent": 2, "invalid_message": 2}, closed={"1000": 1})


# 12. Numbers, and the wall clock.

OUT_OF_RANGE = [
    *(("delegate", "ttl", value) for value in (0, -5, 1e300, "30", 604_801, -0.0)),
    *(("delegate", "priority", value) for value in (-101, 101, 2**63, 1e300)),
    *(("delegate", "max_retries", value) for value in (-1, 101, 2**64 - 1)),
    *(("register", "max_tasks", value) for value in (0, -1, 10_001, 2**63)),
    *(("discover", "limit", value) for value in (0, -1, 1001, 1.5)),
    *(("status", "progress", value) for value in (-0.1, 1.1, 1e300, "1")),
    *(("result", "attempt", value) for value in (0, -1, 1_000_001)),
]


async def test_number_out_of_its_range_is_refused_and_named(scene: Scene) -> None:
    await all_are_refused(scene, OUT_OF_RANGE)


class WallClock:
    """A wall clock that the test can set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead_s = 0.0
        real = time.time
        monkeypatch.setattr(agenthub.time, "time", lambda: real() + self.ahead_s)


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    return WallClock(monkeypatch)


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
@pytest.mark.parametrize("is_journaled", [False, True])
async def test_wall_clock_that_jumps_moves_no_deadline(
    jump_s: float, is_journaled: bool, wall: WallClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "hub.db", sync="normal") if is_journaled else None
    async with a_scene(caplog, journal=journal) as scene:
        await scene.requester.delegate("long", capability="nobody", wait=True, ttl=60)
        await scene.requester.delegate("short", capability="nobody", wait=True, ttl=0.3)
        wall.ahead_s = jump_s
        await scene.requester.delegate("after", capability="nobody", wait=True, ttl=0.2)
        for task_id in ("short", "after"):  # The jump does not extend a TTL ...
            assert (await scene.requester.message("result", task_id=task_id))["state"] == "timeout"
        report = await scene.requester.request(type="status", task_id="long")  # ... nor shorten one.
        assert report["state"] == "pending"
        assert 60 - WAIT_S < report["ttl"] <= 60
        await scene.nobody_noticed()


async def test_wall_clock_set_back_while_the_hub_is_down_gives_nobody_more_than_a_ttl(
    wall: WallClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_scene(caplog, journal=Journal(tmp_path / "hub.db", sync="normal")) as scene:
        await scene.requester.delegate("long", capability="nobody", wait=True, ttl=60)
        await scene.requester.delegate("short", capability="nobody", wait=True, ttl=0.3)
    wall.ahead_s = -3600
    async with a_scene(caplog, journal=Journal(tmp_path / "hub.db", sync="normal")) as scene:
        report = await scene.requester.request(type="status", task_id="long")
        assert (report["state"], report["ttl"] <= 60) == ("pending", True)
        tasks = scene.server.hub.tasks
        await until(lambda: tasks.counts[agenthub.TaskState.TIMEOUT] == 1)
        await scene.nobody_noticed()


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
@pytest.mark.parametrize("is_written", [True, False])
async def test_wall_clock_set_while_the_hub_is_up_moves_no_deadline_over_a_restart(
    is_written: bool, jump_s: float, wall: WallClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_scene(caplog, journal=Journal(tmp_path / "hub.db", sync="normal")) as scene:
        await scene.requester.delegate("long", capability="nobody", wait=True, ttl=60)
        deadline = scene.server.hub.tasks.open[
            "long"
        ].deadline  # Of the monotonic clock, which continues over this restart.
        wall.ahead_s = jump_s
        if is_written:
            await scene.bystanders_go_on()  # This writes to the journal.
    async with a_scene(caplog, journal=Journal(tmp_path / "hub.db", sync="normal")) as scene:
        report = await scene.requester.request(type="status", task_id="long")
        assert report["state"] == "pending"
        assert scene.server.hub.tasks.open["long"].deadline == pytest.approx(deadline, abs=0.5)
        await scene.nobody_noticed()

        await scene.nobody_noticed()


async def test_wall_clock_that_is_set_is_followed_by_the_journal_of_an_idle_hub(
    wall: WallClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a kill after that finds the right times too."""
    monkeypatch.setattr(agenthub, "DISK_CHECK_S", 0.01)
    offsets: list[float] = []
    write = Journal.write

    def writing(journal: Journal, changes: Any, clock_offset: float) -> None:
        offsets.append(clock_offset)
        write(journal, changes, clock_offset)

    monkeypatch.setattr(Journal, "write", writing)
    async with agenthub.LocalHub(journal=Journal(tmp_path / "hub.db", sync="normal")):
        written = len(offsets)
        wall.ahead_s = 3600.0
        await until(lambda: len(offsets) > written)


# 13. Slow consumers.


@contextlib.asynccontextmanager
async def deaf_agent(url: str, name: str) -> AsyncIterator[RawClient]:
    """Register an agent with a minimal receive buffer, which never reads."""
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, _, port = url.removeprefix("ws://").partition(":")
    plain.connect((host, int(port)))
    plain.setblocking(False)
    async with raw_client(url, sock=plain, max_queue=1, max_size=math.inf) as client:
        try:
            await client.register(name, name)
            client.connection.transport.pause_reading()
            yield client
        finally:
            client.connection.transport.abort()


async def test_deaf_connection_is_closed_with_4002_at_the_backlog(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agenthub, "CLOSING_S", 0.1)
    async with a_scene(caplog, backlog_bytes_max=300_000) as scene, deaf_agent(scene.server.url, "deaf"):
        async with asyncio.timeout(WAIT_S):
            while "4002" not in scene.server.hub.summary()["closed"]:
                await scene.requester.request(type="broadcast", capability="deaf", message=MARK * 5000)
        await scene.nobody_noticed(closed={"4002": 1})
        await until(lambda: len(scene.server.sockets) == 2)  # The hub aborts the connection without waiting.


async def test_connection_that_drains_nothing_is_closed_with_4002(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agenthub, "STALLED_S", 0.1)
    async with a_scene(caplog) as scene, deaf_agent(scene.server.url, "deaf"):
        for _ in range(60):  # Less than the backlog limit, more than the socket's buffers hold.
            await scene.requester.request(type="broadcast", capability="deaf", message="x" * 100_000)
        await until(lambda: scene.server.hub.summary()["closed"])
        await scene.nobody_noticed(closed={"4002": 1})
        await until(lambda: len(scene.server.sockets) == 2)


async def open_pair() -> Pair:
    pair = Pair()
    pair.say()
    await pair.heard()
    return pair


async def test_peer_that_has_read_nothing_is_cut_by_an_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "STALLED_S", 0.02)
    pair = await open_pair()
    pair.socket.backlog_bytes = 40_000
    pair.link.send(b"x" * 50_000)
    await until(lambda: pair.owner.ends)
    assert pair.owner.ends == [(4002, "has read nothing for 0.02 s")]
    assert pair.socket.is_aborted


async def test_peer_that_reads_a_byte_now_and_then_is_cut_at_the_bound_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "CLOSING_S", 0.02)
    pair = await open_pair()
    clock = Clock()
    pair.link.loop = clock  # type: ignore[assignment]  # It has as much of a loop as a link needs.
    pair.socket.backlog_bytes = 40_000
    pair.link.send(b"x" * 50_000)
    clock.run_soon()
    for _ in range(20):
        pair.socket.backlog_bytes -= 1
        clock.pass_time(agenthub.STALLED_S)
    assert pair.owner.ends == []
    pair.socket.backlog_bytes = 100_001
    pair.link.send(b"x")
    clock.run_soon()
    clock.run_soon()
    assert pair.owner.ends == [(4002, "does not read")]
    clock.pass_time(agenthub.CLOSING_S)
    assert pair.socket.is_aborted


async def test_peer_that_has_read_all_is_not_stuck() -> None:
    pair = await open_pair()
    clock = Clock()
    pair.link.loop = clock  # type: ignore[assignment]
    for _ in range(5):
        pair.socket.backlog_bytes = 40_000
        pair.link.send(b"x" * 50_000)
        clock.run_soon()
        pair.socket.backlog_bytes = 0
        clock.pass_time(agenthub.STALLED_S)
    assert pair.owner.ends == []


async def test_worker_that_reads_gets_all_the_tasks_that_it_takes_at_once(scene: Scene) -> None:
    for number in range(16):  # Twice the limit of a slow consumer.
        await scene.requester.delegate(f"big-{number}", capability="big", wait=True, input="x" * 1_000_000)
    worker = Agent("big", url=scene.server.url)

    @worker.capability("big")
    async def big(task: agenthub.Task) -> int:
        return len(task.input)

    async with worker:
        for number in range(16):
            assert (await scene.requester.message("result", task_id=f"big-{number}"))["output"] == 1_000_000
    await scene.nobody_noticed(closed={"1000": 1})


async def test_agent_that_reads_gets_all_the_results_that_wait_for_it(scene: Scene) -> None:
    async with raw_client(scene.server.url) as client:
        joined = await client.register("away")
        for number in range(40):
            await client.delegate(f"big-{number}", capability="bystander")
    for number in range(40):  # More than twice the limit of a slow consumer.
        output = f"{number}" * 250_000
        await scene.worker.request(type="result", task_id=f"big-{number}", success=True, output=output)
    scene.worker.seen.clear()
    async with raw_client(scene.server.url) as client:
        await client.register("away", agent_id=joined["agent_id"], resume=joined["resume"])
        for number in range(40):
            assert (await client.message("result", task_id=f"big-{number}"))["output"] == f"{number}" * 250_000
    await scene.nobody_noticed(closed={"1000": 2})


@posix_only
async def test_hub_with_a_full_backlog_still_stops_in_time() -> None:
    with hub_process() as (url, process):
        async with raw_client(url) as requester, deaf_agent(url, "deaf"):
            await requester.register("requester")
            for _ in range(100):  # The limit is 8 MB, in addition to the sockets' buffers.
                await requester.request(type="broadcast", message="x" * 79_000, capability="deaf")
            process.send_signal(signal.SIGTERM)
            # The hub must exit within five seconds: HUB_DRAIN_S, CLOSING_S, and some reserve.
            assert await asyncio.to_thread(process.wait, 5) == 0
    assert agenthub.HUB_DRAIN_S + agenthub.CLOSING_S < 5


@contextlib.asynccontextmanager
async def large_answers(scene: Scene) -> AsyncIterator[tuple[RawClient, Any]]:
    """Register a megabyte of agents; yield a client that does not read replies to `discover`, and its link."""
    big = {"name": "c", "input_schema": {"a": "x" * 65_000}}
    async with contextlib.AsyncExitStack() as stack:
        for number in range(14):
            agent = await stack.enter_async_context(raw_client(scene.server.url))
            await agent.register(f"big-{number}", big)
        before = set(scene.server.links)
        deaf = await stack.enter_async_context(deaf_agent(scene.server.url, "deaf"))
        (link,) = set(scene.server.links) - before
        tracemalloc.start()
        try:
            yield deaf, link
            _, peak = tracemalloc.get_traced_memory()
            assert peak < 4 * agenthub.BACKLOG_BYTES_MAX
            assert link.transport.get_write_buffer_size() <= agenthub.BACKLOG_BYTES_MAX + 2 * agenthub.MESSAGE_BYTES_MAX
        finally:
            tracemalloc.stop()


async def test_requests_of_who_does_not_read_the_answers_are_left_alone(scene: Scene) -> None:
    async with large_answers(scene) as (deaf, link):
        requests = b"".join(message(type="discover", id=f"{number:05}") for number in range(65_536 // 44))
        deaf.connection.transport.write(requests)
        await until(lambda: "slow consumer" in link.pause_reasons)
        await scene.bystanders_go_on()
        assert link.transport.get_write_buffer_size() < agenthub.BACKLOG_BYTES_MAX
        assert link.unread_bytes  # The remaining input waits, because the client may still start to read.
        await scene.nobody_noticed()


class GatedJournal(Journal):
    """A journal on a disk whose writes the test delays."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync="normal")
        self.gate = threading.Event()
        self.gate.set()
        self.is_waiting = False

    def write(self, changes: agenthub.Changes, clock_offset: float) -> None:
        self.is_waiting = not self.gate.is_set()
        assert self.gate.wait(WAIT_S)
        super().write(changes, clock_offset)


async def test_answers_that_waited_for_the_journal_do_not_go_beyond_the_backlog(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = GatedJournal(tmp_path / "hub.db")
    async with a_scene(caplog, journal=journal) as scene, large_answers(scene) as (deaf, link):
        journal.gate.clear()
        deaf.connection.transport.write(message(type="delegate", task_id="t", capability="nobody", wait=True))
        await until(lambda: journal.is_waiting)
        deaf.connection.transport.write(b"".join(message(type="discover", id=str(number)) for number in range(100)))
        commit = scene.server.commit
        assert commit is not None
        await until(lambda: len(commit.held) == 100 or link.pause_reasons)
        journal.gate.set()
        await until(lambda: scene.server.hub.summary()["closed"] or link.pause_reasons)
        await scene.bystanders_go_on()


# 14. Floods.


class Clock:
    """The part of an event loop that a link needs, with a clock that the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now

    def call_later(self, delay_s: float, function: Callable[..., Any], *args: Any) -> Timer:
        timer = Timer(functools.partial(function, *args))
        heapq.heappush(self._timers, (self.now + delay_s, next(self._numbers), timer))
        return timer

    def call_soon(self, function: Callable[..., Any], *args: Any) -> Timer:
        return self.call_later(0.0, function, *args)

    def run_soon(self) -> None:
        self.pass_time(0.0)

    def run_once(self) -> None:
        """Run what is due now, but not what that schedules: one turn of the loop."""
        due = [heapq.heappop(self._timers)[2] for _ in range(sum(at <= self.now for at, *_ in self._timers))]
        for timer in due:
            if not timer.is_cancelled:
                timer.function()

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            self.now, _, timer = heapq.heappop(self._timers)
            if not timer.is_cancelled:
                timer.function()
        self.now = end


@dataclasses.dataclass
class Timer:
    function: Callable[[], Any]
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Rationed:
    """A link with a rate limit and its own clock, whose owner charges each message."""

    def __init__(
        self,
        messages_per_s_max: float,
        effort: float = 1.0,
        clock: Clock | None = None,
        turns: agenthub.Turns | None = None,
    ) -> None:
        self.owner = Owner()
        self.owner.on_message = lambda link: link.charge(effort)
        self.clock = clock or Clock()
        self.link = agenthub.ServerLink(
            self.owner,
            lambda link, request: None,
            message_bytes_max=1_000_000,
            backlog_bytes_max=100_000,
            messages_per_s_max=messages_per_s_max,
            turns=turns or agenthub.Turns(self.clock),  # type: ignore[arg-type]
        )
        self.link.loop = self.clock  # type: ignore[assignment]  # It has as much of a loop as a link needs.
        self.link.connection_made(Socket(self.link))
        self.link.data_received(HANDSHAKE)
        assert self.owner.opened_count == 1

    @property
    def count(self) -> int:
        return len(self.owner.messages)


FLOOD = [json.dumps({"type": "heartbeat", "id": f"{number}"}).encode() for number in range(2000)]


async def test_flood_is_read_at_the_rate_and_none_of_it_is_lost() -> None:
    rationed = Rationed(100)
    rationed.link.data_received(b"".join(map(frame, FLOOD)))
    rationed.clock.run_soon()  # After the turns of other connections.
    burst = int(100 * agenthub.BURST_S)
    assert rationed.count == burst + 1
    assert rationed.link.pause_reasons == {"rate limit"}
    assert rationed.link.transport.is_reading is False
    for second in range(1, 18):
        rationed.clock.pass_time(1.0)
        assert burst + 100 * second <= rationed.count <= burst + 100 * second + 2
    rationed.clock.pass_time(2.0)
    assert [message.id for message in rationed.owner.messages] == [str(number) for number in range(2000)]
    assert rationed.link.pause_reasons == set()
    assert rationed.link.transport.is_reading is True
    assert rationed.owner.ends == []


async def test_silence_earns_one_burst_and_no_more() -> None:
    rationed = Rationed(100)
    rationed.link.data_received(b"".join(map(frame, FLOOD[:150])))
    rationed.clock.pass_time(3600.0)
    rationed.link.data_received(b"".join(map(frame, FLOOD)))
    rationed.clock.run_soon()
    assert rationed.count <= 150 + 2 * int(100 * agenthub.BURST_S) + 1


async def test_what_costs_more_is_read_more_slowly() -> None:
    rationed = Rationed(100, effort=10)
    rationed.link.data_received(b"".join(map(frame, FLOOD)))
    rationed.clock.run_soon()
    assert rationed.count == int(100 * agenthub.BURST_S / 10) + 1
    rationed.clock.pass_time(1.0)
    assert rationed.count in (30, 31, 32)


@pytest.mark.parametrize("raw", [frame(b"", PING), frame(b"", 10), frame(b"", CONTINUATION, fin=False)])
async def test_pings_pongs_and_fragments_are_rationed_too(raw: bytes) -> None:
    rationed = Rationed(100)
    rationed.link.data_received(frame(b"", fin=False) + raw * 10_000 + frame(HEARTBEAT[:0], CONTINUATION))
    rationed.clock.run_soon()
    assert rationed.link.pause_reasons == {"rate limit"}
    rationed.clock.pass_time(10_000 * agenthub.FRAME_COST / 100)
    assert rationed.link.pause_reasons == set()


async def test_rate_of_0_is_no_bound() -> None:
    rationed = Rationed(0, effort=1e6)
    for _ in range(5):
        rationed.link.data_received(b"".join(map(frame, FLOOD)))
        rationed.clock.run_soon()
    assert rationed.count == 10_000
    assert rationed.link.pause_reasons == set()


def effort_of(world: HubHarness, request: Any) -> float:
    world.clients["connection-1"].ask(request)
    return world.hub.cost


def test_effort_grows_with_what_a_request_asks_of_the_hub() -> None:
    world = HubHarness()
    asker = world.join("asker")
    assert effort_of(world, agenthub.Heartbeat()) == 1
    for number in range(199):
        world.join(f"agent-{number}", "work", max_tasks=100)
    assert effort_of(world, Discover(capability="nothing")) == 1
    for keyword in ("", "w", "work"):
        assert effort_of(world, Discover(capability=keyword)) == 1 + 200 // agenthub.COST_AGENTS
    for number in range(100):
        asker.delegate(f"task-{number}", "work")
    assert effort_of(world, Status(tasks=True)) == 1 + 100 // agenthub.COST_TASKS
    assert effort_of(world, Broadcast(message=1)) == 199
    assert effort_of(world, Broadcast(message=1, capability="nobody")) == 1
    large = effort_of(world, Delegate(task_id="large", capability="work", input="x" * 160_000))
    assert large == 1 + 160_000 // agenthub.COST_BYTES
    assert effort_of(world, Register(name="a", capabilities=[f"c{number}" for number in range(64)])) == 65
    world.receive(asker.connection, InvalidMessage("bad"))
    assert world.hub.cost == 1


async def test_bystanders_are_served_while_thousands_of_a_flooders_requests_wait(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_scene(caplog, messages_per_s_max=20) as scene, raw_socket(scene.server.url) as flooder:
        await flooder.send(b"".join(message(type="status", id=str(number)) for number in range(5000)))
        replies = [await flooder.message() for _ in range(40)]
        await scene.nobody_noticed()
        assert [reply["reply_to"] for reply in replies] == [str(number) for number in range(40)]
        (link,) = [one for one in scene.server.links if "rate limit" in one.pause_reasons]
        assert link.unread_bytes
        assert (await flooder.message())["reply_to"] == "40"  # The hub resumes reading where it stopped.


# 15. Limits on counts.


TOO_MUCH: list[tuple[dict[str, Any], str]] = [
    ({"capabilities": [f"c{number}" for number in range(65)]}, "invalid_message"),
    ({"name": "x" * 129}, "invalid_message"),
    ({"name": ""}, "invalid_message"),
    ({"capabilities": ["x" * 129]}, "invalid_message"),
    ({"description": "x" * 4097}, "invalid_message"),
    ({"metadata": {"a": "x" * 4100}}, "invalid_message"),
    ({"metadata": {str(number): 1 for number in range(600)}}, "invalid_message"),
    ({"capabilities": [{"name": "c", "description": "x" * 4097}]}, "invalid_message"),
    ({"capabilities": [{"name": "c", "input_schema": {"a": "x" * 65_540}}]}, "invalid_message"),
    ({"capabilities": [{"name": f"c{n}", "input_schema": {"a": "x" * 8192}} for n in range(8)]}, "too_large"),
]


async def test_agent_that_says_too_much_of_itself_is_refused(scene: Scene) -> None:
    async with raw_client(scene.server.url) as client:
        for fields, code in TOO_MUCH:
            reply = await client.request(**{"type": "register", "name": MARK, **fields})
            assert (reply["type"], reply["code"]) == ("error", code)
            assert MARK not in json.dumps(reply)
        assert scene.server.hub.summary()["agents"] == 2
        most = [{"name": f"{number:0128}", "description": "x" * 900} for number in range(64)]
        joined = await client.register("x" * 128, *most, description="x" * 4096, metadata={"a": "x" * 4080})
        assert joined["type"] == "register"
    await scene.nobody_noticed(refused={"invalid_message": 9, "too_large": 1}, closed={"1000": 1})


@pytest.mark.parametrize("agents", [10_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_nothing_is_left_of_many_agents(agents: int) -> None:
    world = HubHarness()
    hub = world.hub
    numbers = itertools.count()

    def come_and_go(number: int) -> None:
        for _ in range(number):
            index = next(numbers)
            offered = [Capability(f"skill-{index}"), f"other-{index}"]
            hub.connected(index, world.now)
            hub.receive(index, Register(name=f"agent-{index}", capabilities=offered), world.now)
            if index % 100 == 0:  # Some disconnect, and their grace period ends.
                hub.disconnected(index, world.now)
                world.pass_time(hub.settings.grace_s)
            else:
                hub.receive(index, agenthub.Deregister(), world.now)

    come_and_go(1000)
    gc.collect()
    before = sys.getallocatedblocks()
    come_and_go(agents)
    gc.collect()
    assert world.is_empty()
    assert abs(sys.getallocatedblocks() - before) < 2000  # Allocated by counters and caches.


def test_counts_have_keys_from_a_fixed_set_whatever_is_sent() -> None:
    world = HubHarness()
    codes = {str(code) for code in agenthub.CLOSE_CODES} | {"other"}
    for code in range(1000, 5000):
        world.hub.connected(code, world.now)
        world.hub.disconnected(code, world.now, code)
    assert set(world.hub.summary()["closed"]) == codes
    asker = world.join("asker")
    for number in range(1000):
        asker.fail(f"no-{number}", agenthub.ErrorInfo(f"own-code-{number}"))
        asker.delegate("t", f"no-{number}")
        with pytest.raises(InvalidMessage) as caught:
            agenthub.decoder_from_agent()(b'{"type": "own-type-%d"}' % number)
        asker.tell(caught.value)
    assert set(world.hub.summary()["refused"]) == {"unknown_task", "no_agent", "unsupported_type"}
    assert set(world.hub.summary()["refused"]) < set(Code)


@pytest.mark.parametrize(("code", "counted"), [(3999, "other"), (4999, "other"), (4002, "4002"), (1000, "1000")])
async def test_close_with_a_code_and_a_reason_of_ones_own_is_counted_under_ours(
    code: int, counted: str, scene: Scene
) -> None:
    async with raw_client(scene.server.url) as client:
        await client.register("leaves")
        await client.connection.close(code, f"{MARK}\x1b[31m")
    await scene.nobody_noticed(closed={counted: 1})


# 17. A hub that attacks its agents and the command line.

REGISTERED = {"agent_id": "agent-1", "resume": "secret", "heartbeat_s": 30, "max_bytes": 1_048_576, "tasks": []}
hostile_hub = serve  # It runs a script on each WebSocket.


def answering(then: Script | None = None, **replies: Any) -> Script:
    """Return a script that replies to requests by their type, and runs `then` after a registration."""

    async def script(connection: Connection) -> None:
        async for raw in connection:
            asked = json.loads(raw)
            kind = "tasks" if asked.get("tasks") else asked["type"]
            if kind in replies:
                await connection.send(json.dumps({"type": asked["type"], "reply_to": asked["id"], **replies[kind]}))
            if kind == "register" and then is not None:
                await then(connection)

    return script


@contextlib.asynccontextmanager
async def tcp_server(answer: bytes, requests: list[bytes]) -> AsyncIterator[int]:
    """Answer each connection with some bytes, and store its request; yield the port."""

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            requests.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer)
            await writer.drain()
            await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(run, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def command(*argv: str) -> int:
    """Run the command line in a thread of this process; return its exit code."""
    return await soon(asyncio.to_thread(agenthub_main, *argv))


async def open_session(url: str, messages: list[Any] | None = None) -> Session:
    kept: list[Any] = [] if messages is None else messages
    return await soon(Session.open(functools.partial(agenthub.connect_websocket, url, token=MARK), kept.append))


@pytest.mark.parametrize("status", [b"301 Moved", b"302 Found", b"307 Temporary", b"308 Permanent"])
async def test_redirect_is_not_followed_and_the_token_goes_nowhere_else(status: bytes) -> None:
    elsewhere: list[bytes] = []
    asked: list[bytes] = []
    async with tcp_server(b"", elsewhere) as other:
        to = b"Location: ws://127.0.0.1:%d/\r\nContent-Length: 0\r\n\r\n" % other
        async with tcp_server(b"HTTP/1.1 " + status + b"\r\n" + to, asked) as port:
            with pytest.raises(Disconnected, match=status[:3].decode()) as caught:
                await open_session(f"ws://127.0.0.1:{port}")
    assert (len(asked), elsewhere) == (1, [])
    assert MARK.encode() in asked[0]
    assert MARK not in str(caught.value)


BAD_ANSWERS = {
    "nothing": b"",
    "no HTTP": b"\x16\x03\x01\x00\x00\r\n\r\n",
    "a short status line": b"HTTP/1.1\r\n\r\n",
    "a status that is no number": b"HTTP/1.1 abc OK\r\n\r\n",
    "no acceptance": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "the acceptance of another": (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n\r\n"
    ),
    "a length that is no number": b"HTTP/1.1 403 No\r\nContent-Length: many\r\n\r\n",
    "a negative length": b"HTTP/1.1 403 No\r\nContent-Length: -1\r\n\r\n",
    "an endless header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000,
    "an endless body": b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 3_000_000,
    "a body that does not come": b"HTTP/1.1 403 No\r\nContent-Length: 1000000000000\r\n\r\n",
    "chunks": b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffff\r\n",
    "steering": b"HTTP/1.1 403 " + BAD_TEXT.replace("\n", "").replace("\r", "").encode() + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
async def test_answer_that_is_no_handshake_is_no_hub(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agenthub, "HANDSHAKE_S", 0.1)
    async with tcp_server(BAD_ANSWERS[name], []) as port:
        assert await command("status", "--url", f"ws://127.0.0.1:{port}") == 1
    output, complaint = capsys.readouterr()
    assert (output, complaint.count("\n")) == ("", 1)
    assert complaint.startswith("agenthub: no hub")
    assert is_harmless(complaint.rstrip("\n"))


async def test_message_larger_than_a_client_takes_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "CLIENT_MESSAGE_BYTES_MAX", 10_000)
    messages: list[Any] = []

    async def whole(connection: Connection) -> None:
        await connection.send(json.dumps({"type": "broadcast", "message": "x" * 10_000}))
        await connection.wait_closed()

    async def pieces(connection: Connection) -> None:
        await connection.send("x" * 100 for _ in range(200))
        await connection.wait_closed()

    async def crumbs(connection: Connection) -> None:
        await connection.send("" for _ in range(10_000))
        await connection.wait_closed()

    for script in (whole, pieces, crumbs):
        async with hostile_hub(script) as url:
            session = await open_session(url, messages)
            code, _ = await soon(session.close_info)
            assert code == 1009
            await session.close()
    assert messages == []


async def test_hub_that_hands_over_more_tasks_than_the_agent_takes_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    cut = asyncio.Event()
    counts: list[int] = []

    async def flood(connection: Connection) -> None:
        task = {"type": "delegate", "sender": "hub", "agent_id": "agent-1", "capability": "wait", "input": MARK}
        task |= {"ttl": 60, "priority": 0, "max_retries": 0, "parent_id": None, "attempt": 1}
        try:
            for number in range(100_000):
                await connection.send(json.dumps({**task, "task_id": f"task-{number}"}))
        finally:
            cut.set()

    agent = Agent("busy", max_tasks=1)
    running: set[str] = set()

    @agent.capability
    async def wait(task: agenthub.Task) -> None:
        running.add(task.task_id)
        counts.append(len(running))
        try:
            await asyncio.Event().wait()
        finally:
            running.remove(task.task_id)

    async with hostile_hub(answering(flood, register=REGISTERED, deregister={})) as url:
        agent.use_hub(Network(url))
        async with agent:
            await soon(cut.wait())
            assert max(counts) == agent.max_tasks
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert errors
    assert set(errors) == {"the hub assigns more tasks than max_tasks allows: disconnecting agent=agent-1"}


class Network:
    """A hub at a URL, with the interface of a LocalHub."""

    def __init__(self, url: str) -> None:
        self.url = url

    def connect(self, owner: agenthub.LinkOwner) -> Awaitable[agenthub.Link]:
        return agenthub.connect_websocket(self.url, owner)


ODD_TASKS: list[dict[str, Any]] = [
    {"ttl": 1e300},
    {"ttl": -1e300},
    {"attempt": 2**64 - 1},
    {"attempt": -5},
    {"capability": None},
    {"capability": BAD_TEXT},
    {"task_id": BAD_TEXT},
    {"task_id": ""},
    {"task_id": "x" * 2000},
    {"sender": ""},
    {"priority": -(2**63)},
    {"input": {"a": [MARK] * 50_000}},
]
ODD_MESSAGES: list[dict[str, Any]] = [
    {"type": "result", "task_id": "none", "sender": None, "success": True, "state": "no such state"},
    {"type": "result", "task_id": "none", "sender": 1, "success": "yes", "state": [], "output": MARK},
    {"type": "status", "task_id": "task-0", "state": "failed"},
    {"type": "status", "task_id": "none", "seq": -1},
    {"type": "status"},
    {"type": "error", "code": BAD_TEXT, "message": BAD_TEXT},
    {"type": "register", **REGISTERED, "agent_id": "another"},
    {"type": "deregister"},
    {"type": "heartbeat_ack", "reply_to": "none"},
    {"type": "broadcast", "recipients": -5},
    {"type": MARK},
    {},
]


async def test_agent_lives_through_whatever_a_hub_says(caplog: pytest.LogCaptureFixture) -> None:
    before = len(alive(agenthub.Task))
    done: list[str] = []
    finished = asyncio.Event()

    async def talk(connection: Connection) -> None:
        task = {"sender": "hub", "agent_id": "agent-1", "capability": "work", "input": 1, "ttl": 60, "priority": 0}
        task |= {"type": "delegate", "max_retries": 0, "parent_id": None, "attempt": 1}
        for number, odd in enumerate(ODD_TASKS):
            await connection.send(json.dumps({**task, "task_id": f"task-{number}", **odd}))
        for odd in ODD_MESSAGES:
            await connection.send(json.dumps(odd))
        await connection.send(MARK)
        await connection.send(MARK.encode())
        await connection.send(json.dumps({**task, "task_id": "last"}))
        async for raw in connection:
            heard = json.loads(raw)
            if heard["type"] == "result":
                done.append(heard["task_id"])
            if heard.get("task_id") == "last":
                finished.set()
            if heard["type"] == "deregister":
                await connection.send(json.dumps({"type": "deregister", "reply_to": heard["id"]}))

    async with hostile_hub(answering(talk, register=REGISTERED)) as url:
        agent = Agent("calm", url=url, max_tasks=100)

        @agent.capability("work")
        async def work(task: agenthub.Task) -> int:
            return 1

        async with agent:
            await soon(finished.wait())
            assert agent.agent_id == "agent-1"
            await until(lambda: len(alive(agenthub.Task)) <= before)
    assert done[-1] == "last"
    assert {"task-0", "task-2", "", BAD_TEXT} <= set(done)
    lines = [LogFormatter().format(record) for record in caplog.records]
    assert all(is_harmless(line) for line in lines)
    assert not [line for line in lines if MARK in line]


async def test_broadcasts_and_progress_that_nobody_takes_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    let_go = asyncio.Event()
    heard = 0

    async def flood(connection: Connection) -> None:
        raw = await connection.recv()  # The heartbeat ...
        raw = await connection.recv()  # ... and the task.
        asked = json.loads(raw)
        accepted = {"type": "status", "reply_to": asked["id"], "state": "pending", "task_id": "t", "attempt": 0}
        await connection.send(json.dumps(accepted))
        report = {"type": "status", "task_id": "t", "sender": "x", "progress": 0.5, "detail": MARK}
        for number in range(agenthub.UPDATES_MAX + 500):
            await connection.send(json.dumps({"type": "broadcast", "sender": "hub", "message": MARK}))
            await connection.send(json.dumps({**report, "seq": number}))
        outcome = {"success": True, "state": "completed", "output": 1, "error": None, "attempt": 1}
        await connection.send(json.dumps({"type": "result", "task_id": "t", "sender": "x", **outcome}))

    async with hostile_hub(answering(flood, register=REGISTERED, deregister={})) as url:
        agent = Agent("slow", url=url)

        @agent.on_broadcast
        async def hear(message: Any, sender: str) -> None:
            nonlocal heard
            heard += 1
            await let_go.wait()

        async with agent:
            handle = await soon(agent.submit("anything", task_id="t"))
            assert await soon(handle.result()) == 1
            let_go.set()
            await until(lambda: heard >= 1 + agenthub.UPDATES_MAX)
            updates = [update.seq async for update in handle]
            assert updates == list(range(500, agenthub.UPDATES_MAX + 500))
            assert heard == 1 + agenthub.UPDATES_MAX
    assert MARK not in caplog.text


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HANDSHAKE_S", "REPLY_S", "REQUEST_S", "CLOSING_S", "LEAVING_S"):
        monkeypatch.setattr(agenthub, name, 0.1)
    request = functools.partialmethod(Session.request, within_s=0.1)
    monkeypatch.setattr(agenthub.Session, "request", request)


@contextlib.asynccontextmanager
async def mute_hub(has_handshake: bool) -> AsyncIterator[str]:
    """Accept TCP connections, or WebSockets, and never reply."""
    if has_handshake:
        async with hostile_hub(answering()) as url:
            yield url
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            yield f"ws://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.usefixtures("short_patience")
@pytest.mark.parametrize("has_handshake", [False, True])
@pytest.mark.parametrize("argv", [("status",), ("status", "--json"), ("call", "echo", f'"{MARK}"')])
async def test_command_gives_up_on_a_hub_that_never_answers(
    argv: tuple[str, ...], has_handshake: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    async with mute_hub(has_handshake) as url:
        assert await command(*argv, "--url", url) == 1
    output, complaint = capsys.readouterr()
    assert (output, complaint.count("\n")) == ("", 1)
    assert "answer" in complaint
    assert MARK not in complaint


@pytest.mark.usefixtures("short_patience")
@pytest.mark.parametrize("has_handshake", [False, True])
async def test_agent_gives_up_on_a_hub_that_never_answers(has_handshake: bool) -> None:
    async with mute_hub(has_handshake) as url:
        with pytest.raises(Disconnected, match="answer"):
            await soon(Agent("patient", url=url, give_up_after_s=0).start())


@pytest.mark.parametrize(("heartbeat_s", "expected_s"), [(1e-9, 0.01), (5e-324, 0.01), (1e300, 604_800), (30, 30)])
async def test_heartbeat_that_a_hub_asks_for_is_kept_within_reason(
    monkeypatch: pytest.MonkeyPatch, heartbeat_s: float, expected_s: float
) -> None:
    waits = []
    wait = asyncio.wait

    def waiting(futures: Any, **options: Any) -> Any:
        if [*options] == ["timeout"]:  # Until the next heartbeat; connecting waits in another way.
            waits.append(options["timeout"])
        return wait(futures, **options)

    monkeypatch.setattr(asyncio, "wait", waiting)
    script = answering(register={**REGISTERED, "heartbeat_s": heartbeat_s}, heartbeat={}, deregister={})
    async with hostile_hub(script) as url, Agent("beats", url=url) as agent:
        await until(lambda: waits)
        assert agent.is_online
        assert set(waits) == {expected_s}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_bytes", 0),
        ("max_bytes", -1),
        ("max_bytes", 1e6),
        ("max_bytes", "1"),
        ("heartbeat_s", 0),
        ("heartbeat_s", -1),
        ("heartbeat_s", "30"),
        ("heartbeat_s", True),
        ("agent_id", BAD_TEXT),
        ("agent_id", [MARK]),
        ("agent_id", "x" * 129),
        ("resume", BAD_TEXT),
        ("resume", None),
        ("tasks", [{"task_id": MARK, "attempt": "1"}]),
        ("tasks", {MARK: 1}),
        ("tasks", None),
    ],
)
async def test_registration_that_makes_no_sense_is_an_error_that_names_the_field(field: str, value: Any) -> None:
    async with hostile_hub(answering(register={**REGISTERED, field: value})) as url:
        with pytest.raises(InvalidMessage, match=rf"^{field}\b") as caught:
            await soon(Agent("sane", url=url).start())
        assert MARK not in str(caught.value)
        assert is_harmless(str(caught.value))


NO_AGENTS: dict[str, Any] = {"agents": [], "total": 0}
NO_TASKS: dict[str, Any] = {"tasks": [], "total": 0}
GARBAGE: list[dict[str, Any]] = [
    {},
    {"hub": None},
    {"hub": {}},
    {"hub": {"version": [1], "uptime_s": "long", "tasks": "none"}},
    {"hub": {"version": None, "uptime_s": [], "tasks": [1, 2]}},
    {"hub": {"version": {"a": 1}, "uptime_s": 1e300, "tasks": {"pending": [], "failed": {"a": 1}, BAD_TEXT: BAD_TEXT}}},
    {"hub": {"version": BAD_TEXT, "uptime_s": True, "tasks": {"": None}}},
    {"hub": {BAD_TEXT: BAD_TEXT, "uptime_s": -1e308, "tasks": {}}},
    {"hub": {"uptime_s": 2**64 - 1, "tasks": {"pending": -1}}},
]


@pytest.mark.parametrize("is_json", [False, True])
async def test_status_makes_the_best_of_what_a_hub_says_of_itself(
    is_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for garbage in GARBAGE:
        async with hostile_hub(answering(status=garbage, discover=NO_AGENTS, tasks=NO_TASKS)) as url:
            code = await command("status", "--url", url, *(["--json"] if is_json else []))
        output, complaint = capsys.readouterr()
        assert (code, complaint) == (0, ""), garbage
        assert is_harmless(output, lines=True)


@pytest.mark.parametrize(
    "replies",
    [
        {"status": {"hub": [MARK]}},
        {"status": {"hub": MARK}},
        {"status": {"hub": {}}, "discover": {"agents": MARK, "total": 0}},
        {"status": {"hub": {}}, "discover": {"agents": [{"agent_id": [MARK]}], "total": 1}},
        {"status": {"hub": {}}, "discover": {"agents": [], "total": MARK}},
        {"status": {"hub": {}}, "discover": NO_AGENTS, "tasks": {"tasks": {MARK: 1}}},
        {"status": {"hub": {}}, "discover": NO_AGENTS, "tasks": {"tasks": [{"task_id": 1, "ttl": MARK}]}},
        {"status": {"type": "register", **REGISTERED, "agent_id": MARK}},
        {"status": {"type": "error", "code": BAD_TEXT, "message": BAD_TEXT}},
        {"status": {"type": MARK}},
    ],
)
async def test_status_of_wrong_types_is_one_line_and_exit_1(
    replies: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    async with hostile_hub(answering(**replies)) as url:
        assert await command("status", "--url", url) == 1
    output, complaint = capsys.readouterr()
    assert (output, complaint.count("\n")) == ("", 1)
    assert is_harmless(complaint.rstrip("\n"))
    assert MARK not in complaint


BAD_AGENT = {
    "agent_id": BAD_TEXT,
    "name": BAD_TEXT,
    "description": BAD_TEXT,
    "capabilities": [{"name": "c", "description": BAD_TEXT}],
    "running": -(2**63),
    "max_tasks": 2**64 - 1,
    "metadata": {BAD_TEXT: BAD_TEXT},
}
BAD_TASK = {
    "task_id": BAD_TEXT,
    "state": BAD_TEXT,
    "requester": BAD_TEXT,
    "agent_id": BAD_TEXT,
    "capability": BAD_TEXT,
    "code": BAD_TEXT,
    "attempt": -1,
    "priority": 10**18,
    "max_retries": -5,
    "ttl": 1e308,
    "age_s": -1e308,
    "progress": 1e308,
}


@pytest.mark.parametrize("argv", [(), ("--json",), ("--task", "x"), ("--task", "x", "--json")])
async def test_names_that_would_steer_a_terminal_are_shown_escaped(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    status = {**BAD_TASK, "input": BAD_TEXT, "output": {BAD_TEXT: [BAD_TEXT]}} if "--task" in argv else {"hub": {}}
    found, listed = {"agents": [BAD_AGENT], "total": 1}, {"tasks": [BAD_TASK], "total": 1}
    async with hostile_hub(answering(status=status, discover=found, tasks=listed)) as url:
        assert await command("status", "--url", url, *argv) == 0
    output, complaint = capsys.readouterr()
    assert complaint == ""
    assert is_harmless(output, lines=True)
    assert "a\\nb\\rc" in output
    if argv == ():
        assert output.count("\n") == 8  # Two lines for the hub, three per table, and one between them.


async def test_what_a_call_is_told_is_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    end: dict[str, Any] = {}

    async def settle(connection: Connection) -> None:
        async for raw in connection:
            asked = json.loads(raw)
            if asked["type"] == "delegate":
                told = {"type": "status", "reply_to": asked["id"], "task_id": asked["task_id"], "state": "pending"}
                await connection.send(json.dumps({**told, "attempt": 0}))
                await connection.send(json.dumps({**end, "type": "result", "task_id": asked["task_id"]}))
            elif asked["type"] == "deregister":
                await connection.send(json.dumps({"type": "deregister", "reply_to": asked["id"]}))

    whole = {"sender": BAD_TEXT, "attempt": 1, "output": None, "error": None}
    for success, state in ((True, "completed"), (False, "failed"), (False, "timeout")):
        end |= {**whole, "success": success, "state": state, "output": {BAD_TEXT: BAD_TEXT} if success else None}
        end["error"] = None if success else {"code": "failed", "message": BAD_TEXT}
        async with hostile_hub(answering(settle, register=REGISTERED)) as url:
            assert await command("call", "anything", "--url", url) == (0 if success else 1)
        output, complaint = capsys.readouterr()
        assert is_harmless(output + complaint, lines=True)
        assert "a\\nb\\rc\\" in output + complaint
        assert len((output + complaint).splitlines()) == (3 if success else 1)


def test_rows_of_a_hostile_hub_are_cut_before_they_are_laid_out() -> None:
    """All rows are as wide as the widest one, so one cell of megabytes would fill megabytes in each row."""
    wide = agenthub.AgentInfo("x" * 200_000, "wide", "y" * 200_000, [], 0, 1, {})
    rows = [agenthub.agent_row(wide), *(agenthub.agent_row(wide) for _ in range(1000))]
    assert len(agenthub.table(rows)) < 1_000_000


async def test_hostile_hub_does_not_fill_the_log_of_an_agent(caplog: pytest.LogCaptureFixture) -> None:
    sent = asyncio.Event()

    async def flood(connection: Connection) -> None:
        for _ in range(1000):
            await connection.send(MARK)
        sent.set()

    async with hostile_hub(answering(flood, register=REGISTERED, deregister={})) as url, Agent("agent", url=url):
        await soon(sent.wait())
        await until(lambda: len(caplog.records) >= 1000)
    bounded = LogFloodFilter()
    kept = [record for record in caplog.records if bounded.filter(record)]
    assert len(kept) <= agenthub.LOG_LINES_PER_S * len({int(record.created) for record in kept})


async def test_hub_that_claims_more_tasks_than_the_agent_takes_is_cut() -> None:
    before = len(alive(agenthub.Result))
    tasks = [{"task_id": f"t{number}", "attempt": 1} for number in range(5000)]
    async with hostile_hub(answering(register={**REGISTERED, "tasks": tasks}, deregister={})) as url:
        agent = Agent("agent", url=url, give_up_after_s=0)
        with contextlib.suppress(agenthub.AgentHubError):
            await soon(agent.start())
        assert len(alive(agenthub.Result)) <= before + 2 * agent.max_tasks + agenthub.TASKS_OVER
        await agent.stop()


# 18. Output and logs.


@pytest.fixture
def formatted() -> Iterator[list[str]]:
    """The log lines of the hub, formatted as on the command line."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Handler()
    handler.setFormatter(LogFormatter())
    handler.addFilter(LogFloodFilter())
    logger = logging.getLogger("agenthub.hub")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_record_is_one_line_whatever_is_in_it(formatted: list[str]) -> None:
    logging.getLogger("agenthub.hub").warning("refused code=%s agent=%s", BAD_TEXT, BAD_TEXT)
    logging.getLogger("agenthub.hub").warning(BAD_TEXT)
    assert len(formatted) == 2
    assert all(is_harmless(line) for line in formatted)
    assert formatted[0].count(r"a\nb\rc\x1b[31md\x1b]52;c;ZXZpbA==\x07e\u202ef\u2066g\x9bh") == 2


def test_traceback_is_marked_line_by_line(formatted: list[str]) -> None:
    try:
        raise ValueError(f"{BAD_TEXT}\n2026-01-01 00:00:00,000 INFO agenthub.hub joined agent=forged")
    except ValueError:
        logging.getLogger("agenthub.hub").exception("a message was not handled")
    (text,) = formatted
    first, *others = text.splitlines()
    assert first.endswith("ERROR agenthub.hub a message was not handled")
    assert others
    assert all(line.startswith("  | ") and is_harmless(line) for line in others)


def test_flood_of_lines_is_bounded_and_says_how_many_were_dropped() -> None:
    flood = LogFloodFilter()

    def passes(number: int, second: float, level: int = logging.WARNING, name: str = "agenthub.hub") -> list[str]:
        records = [logging.LogRecord(name, level, "", 0, "line %d", (index,), None) for index in range(number)]
        for record in records:
            record.created = second
        return [record.getMessage() for record in records if flood.filter(record)]

    assert passes(10_000, 1.0) == [f"line {index}" for index in range(agenthub.LOG_LINES_PER_S)]
    assert len(passes(300, 1.9, logging.ERROR)) == 300  # A bug is never dropped ...
    assert len(passes(100, 1.9, name="agenthub.agent")) == 100  # ... and each logger has its own limit.
    dropped = 10_000 - agenthub.LOG_LINES_PER_S
    assert passes(2, 2.0) == [f"[{dropped} lines before this were dropped] line 0", "line 1"]
    assert passes(1, 3.0) == ["line 0"]


async def test_flood_of_refusals_is_a_bounded_log(formatted: list[str], caplog: pytest.LogCaptureFixture) -> None:
    async with a_scene(caplog) as scene, raw_socket(scene.server.url) as client:
        await client.send(frame(MARK.encode()) * 3000)
        for _ in range(3000):
            assert (await client.message())["code"] == "invalid_message"
        await scene.nobody_noticed(refused={"invalid_message": 3000})
    seconds = {line.partition(",")[0] for line in formatted}
    assert len(formatted) <= len(seconds) * agenthub.LOG_LINES_PER_S
    assert MARK not in "".join(formatted)


SECRETS = {
    "token": "t0ken-" + "m4rk" * 8,
    "input": "1nput-m4rk",
    "output": "0utput-m4rk",
    "detail": "det4il-m4rk",
    "failure": "f4ilure-m4rk",
    "broadcast": "br0adcast-m4rk",
    "metadata": "met4data-m4rk",
    "wrong secret": "wr0ng-secret-m4rk",
    "wrong token": "wr0ng-token-m4rk",
}

DISCREET_AGENT = """
import sys
from agenthub import Agent, Task, TaskFailed

agent = Agent("discreet", metadata={"x": sys.argv[0] and "met4data-m4rk"})

@agent.capability
async def echo(task: Task):
    task.progress(0.5, "det4il-m4rk")
    return ["0utput-m4rk", agent.resume]

@agent.capability
async def fail(task: Task):
    raise TaskFailed("f4ilure-m4rk")

@agent.capability
def typed(number: int):
    return number

@agent.on_broadcast
async def hear(message, sender):
    pass
"""


async def talk_of_secrets(url: str, token: str) -> list[str]:
    """Send all secrets through a hub and its agent; return those that the hub created."""
    headers = {"Authorization": f"Bearer {token}"}
    async with raw_client(url, additional_headers=headers) as client, raw_client(url) as other:
        joined = await client.register("requester", metadata={"x": SECRETS["metadata"]})
        assert (await other.request(type="status", token=SECRETS["wrong token"]))["code"] == "unauthorized"
        assert (await other.request(type="status", token=token))["type"] == "status"
        stolen = await other.register("thief", agent_id=joined["agent_id"], resume=SECRETS["wrong secret"])
        assert stolen["code"] == "unauthorized"
        async with asyncio.timeout(WAIT_S):
            while not (await client.request(type="discover", capability="echo"))["total"]:
                await asyncio.sleep(0.02)
        await client.delegate("echo", capability="echo", input={"x": SECRETS["input"]})
        output, resume = (await client.message("result", task_id="echo"))["output"]
        assert output == SECRETS["output"]
        await client.delegate("fail", capability="fail", input=[SECRETS["input"]])
        assert (await client.message("result", task_id="fail"))["error"]["message"] == SECRETS["failure"]
        await client.delegate("typed", capability="typed", input={"number": SECRETS["input"]})
        assert (await client.message("result", task_id="typed"))["error"]["code"] == "invalid_input"
        assert (await client.request(type="broadcast", message=SECRETS["broadcast"]))["recipients"] >= 1
        await client.connection.send(f'{{"type": "{SECRETS["input"]}", "x": "{SECRETS["input"]}"')
        await client.connection.send(SECRETS["input"].encode())
        for _ in range(2):
            await client.message("error")
        await client.request(type="status", task_id="echo")
    return [joined["resume"], resume]


def tells_nothing(process: subprocess.Popen[str], secrets: list[str]) -> str:
    """End a process; assert that its output and command line contain no secret. Return its output."""
    if sys.platform == "linux":
        arguments = Path(f"/proc/{process.pid}/cmdline").read_text()
        assert not [one for one in secrets if one in arguments]
    process.terminate()
    said = "".join(process.communicate(timeout=WAIT_S))
    assert not [one for one in secrets if one in said]
    return said


@posix_only
async def test_no_secret_and_no_payload_is_in_a_log_at_any_level(tmp_path: Path) -> None:
    (tmp_path / "discreet.py").write_text(DISCREET_AGENT)
    token_file = tmp_path / "token"
    token_file.write_text(SECRETS["token"])
    token_file.chmod(0o600)
    environment = {"AGENTHUB_TOKEN": SECRETS["token"]}
    database = str(tmp_path / "hub.db")
    loud = ("--log-level", "debug")
    with hub_process(*loud, "--db", database, env=environment, stderr=subprocess.PIPE) as (url, hub):
        arguments = ("agent", str(tmp_path / "discreet.py"), "--url", url, "--token-file", str(token_file))
        call = ("call", "echo", "-", "--url", url)
        with running("-m", "agenthub", *arguments, *loud) as agent:
            made = await talk_of_secrets(url, SECRETS["token"])
            with running("-m", "agenthub", *call, *loud, env=environment) as caller:
                output, said = await asyncio.to_thread(caller.communicate, json.dumps(SECRETS["input"]), WAIT_S)
            assert SECRETS["output"] in output  # The output itself is shown.
            secrets = [*SECRETS.values(), *made]
            assert not [one for one in secrets if one in said]
            agent_said = await asyncio.to_thread(tells_nothing, agent, secrets)
            hub_said = await asyncio.to_thread(tells_nothing, hub, secrets)
    for text in (hub_said, agent_said, said):
        assert "DEBUG" in text
    assert "received type=delegate" in hub_said
    assert agenthub.WIRE_LOGGER.level == logging.WARNING


@posix_only
async def test_bridge_logs_no_secret_and_no_payload() -> None:
    mcp = pytest.importorskip("mcp", reason="the bridge needs it")
    from mcp.client.stdio import StdioServerParameters, stdio_client

    environment = {"AGENTHUB_TOKEN": SECRETS["token"], "PYTHONPATH": str(ROOT)}
    with hub_process(env=environment) as (url, _), tempfile.TemporaryFile("w+") as log:
        arguments = ["-m", "agenthub", "bridge", "--url", url, "--log-level", "debug"]
        parameters = StdioServerParameters(command=sys.executable, args=arguments, env=environment, cwd=ROOT)
        headers = {"Authorization": f"Bearer {SECRETS['token']}"}
        async with raw_client(url, additional_headers=headers) as worker:
            await worker.register("worker", "work")
            async with asyncio.timeout(WAIT_S), mcp.Client(stdio_client(parameters, errlog=log)) as client:
                asked = {"capability": "work", "input": SECRETS["input"]}
                asking = asyncio.create_task(client.call_tool("delegate_task", asked))
                task = await worker.message("delegate")
                await worker.request(type="result", task_id=task["task_id"], success=True, output=SECRETS["output"])
                assert SECRETS["output"] in str(await asking)
                await client.call_tool("broadcast_message", {"message": SECRETS["broadcast"]})
        log.seek(0)
        said = log.read()
    assert "DEBUG" in said
    assert not [one for one in SECRETS.values() if one in said]


@pytest.mark.parametrize("argv", [("status",), ("call", "echo"), ("agent", "x.py"), ("bridge",)])
def test_url_with_a_password_is_refused_and_not_shown(
    argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"ws://ada:{MARK}@127.0.0.1:1/"
    monkeypatch.setenv("AGENTHUB_URL", "ws://127.0.0.1:1")  # Restored after the test.
    for given in (["--url", url], []):
        if not given:
            monkeypatch.setenv("AGENTHUB_URL", url)
        with pytest.raises(SystemExit) as end:
            agenthub.main([*argv, *given])
        assert end.value.code == 2
        output, complaint = capsys.readouterr()
        assert MARK not in output + complaint
        assert "AGENTHUB_TOKEN" in complaint
    with pytest.raises(ValueError, match="AGENTHUB_TOKEN") as caught:
        Agent("agent")
    assert MARK not in str(caught.value)


# 19. The file of --db.


@contextlib.contextmanager
def open_umask() -> Iterator[None]:
    former = os.umask(0)
    try:
        yield
    finally:
        os.umask(former)


@posix_only
async def test_journal_and_what_stands_beside_it_are_for_their_owner_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_umask():
        async with a_scene(caplog, journal=Journal(tmp_path / "hub.db")) as scene:
            await scene.bystanders_go_on()
            await until(lambda: (tmp_path / "hub.db-reserve").exists())
            modes = {name: stat.S_IMODE(seen[0]) for name, seen in scanned(tmp_path).items()}
    assert modes == dict.fromkeys(("hub.db", "hub.db-wal", "hub.db-reserve"), 0o600)


def make_directory(path: Path) -> None:
    path.mkdir()


def make_loop(path: Path) -> None:
    path.with_name("other").symlink_to(path)
    path.symlink_to(path.with_name("other"))


def make_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def make_text(path: Path) -> None:
    path.write_text("dear diary\n" * 500)


def make_short_text(path: Path) -> None:
    path.write_text("x")


def make_noise(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(8192))


def make_other_database(path: Path, id_: int = 0, version: int = 0, mode: str = "delete") -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA journal_mode = {mode}")
        database.execute(f"PRAGMA application_id = {id_}")
        database.execute(f"PRAGMA user_version = {version}")
        database.execute("CREATE TABLE tasks (precious TEXT)")
        database.execute("INSERT INTO tasks VALUES ('data')")
        database.commit()


def make_database_in_wal_mode(path: Path) -> None:
    make_other_database(path, mode="wal")


def make_database_with_a_log_that_was_left(path: Path) -> None:
    living = path.with_name("living.db")
    with contextlib.closing(sqlite3.connect(living)) as database:
        database.execute("PRAGMA journal_mode = wal")
        database.execute("CREATE TABLE tasks (precious TEXT)")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("INSERT INTO tasks VALUES ('data')")
        database.commit()
        for suffix in ("", "-wal"):
            Path(f"{path}{suffix}").write_bytes(Path(f"{living}{suffix}").read_bytes())


def make_journal_of_the_future(path: Path) -> None:
    make_other_database(path, agenthub.JOURNAL_ID, agenthub.JOURNAL_VERSION + 1)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


MAKERS = [
    make_directory,
    make_loop,
    make_dangling_link,
    make_text,
    make_short_text,
    make_noise,
    make_other_database,
    make_database_in_wal_mode,
    make_database_with_a_log_that_was_left,
    make_journal_of_the_future,
    make_fifo,
]


def scanned(folder: Path) -> dict[str, Any]:
    """Return the contents, modes and times of a folder's files."""
    seen: dict[str, Any] = {}
    for path in folder.iterdir():
        about = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(about.st_mode) else None
        seen[path.name] = (about.st_mode, about.st_size, about.st_mtime_ns, about.st_ino, content)
    return seen


@posix_only
@pytest.mark.parametrize("make", MAKERS)
def test_what_is_no_journal_is_refused_with_one_line_and_left_as_it_is(
    make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hub.db"
    make(path)
    before = scanned(tmp_path)
    assert agenthub.main(["hub", "--port", "0", "--db", str(path)]) == 1
    output, complaint = capsys.readouterr()
    assert (output, complaint.count("\n")) == ("", 1)
    assert complaint.startswith(f"agenthub: {path}: ")
    assert scanned(tmp_path) == before


async def test_text_that_is_sql_comes_back_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sql = "'); DROP TABLE tasks; UPDATE agents SET there = 0; --\" ?1 :a $a @a"
    task_id = "DROP-TABLE.tasks:--1"
    fields = {"capability": sql, "input": {sql: [sql, "\x00\u2028"]}}
    async with a_scene(caplog, journal=Journal(tmp_path / "hub.db", sync="normal")) as scene:
        async with raw_client(scene.server.url) as client:
            joined = await client.register(sql, {"name": sql, "description": sql}, metadata={"'": sql})
            assert (await scene.requester.delegate(task_id, **fields))["state"] == "in_progress"
        await scene.nobody_noticed(closed={"1000": 1})
    async with a_scene(caplog, journal=Journal(tmp_path / "hub.db", sync="normal")) as scene:
        async with raw_client(scene.server.url) as client:
            again = {"agent_id": joined["agent_id"], "resume": joined["resume"]}
            back = await client.register(sql, {"name": sql, "description": sql}, metadata={"'": sql}, **again)
            assert (back["agent_id"], back["tasks"]) == (joined["agent_id"], [{"task_id": task_id, "attempt": 1}])
            report = await client.request(type="status", task_id=task_id)
            assert {name: report[name] for name in fields} == fields
            (found,) = (await scene.requester.request(type="discover", capability=sql))["agents"]
            assert (found["name"], found["capabilities"][0]["description"], found["metadata"]) == (sql, sql, {"'": sql})
        await scene.nobody_noticed(closed={"1000": 1})
