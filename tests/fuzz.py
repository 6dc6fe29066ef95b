"""Fuzz the three inputs of the hub, and check invariants after each input.

    decode      bytes to both decoders
    bytes       bytes to the links of a HubServer, on an event loop without sockets and with a virtual clock
    sequences   messages with hostile values, from several connections, to a Hub

    python -m tests.fuzz                                        all three, for a minute
    python -m tests.fuzz --target bytes --seconds 600 --seed 7
    python -m tests.fuzz --engine atheris --target decode       guided by coverage, if atheris is installed

A case is a plain Python value, so that a printed finding can be pasted into a test: `check("decode", b"...")`. Cases
are generated from a seed, and a failing one is shrunk here: Hypothesis strategies produced a tenth of the cases in the
same time. tests/test_fuzz.py runs each target briefly, and keeps every case that ever found a bug.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import gc
import itertools
import json
import logging
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import types
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import agenthub
from agenthub import (
    FINAL_STATES,
    AgentRecord,
    BroadcastDelivery,
    Close,
    Code,
    Delegate,
    Delegated,
    Deregister,
    Error,
    HubServer,
    HubSettings,
    InvalidMessage,
    StatusReply,
    TaskOutcome,
    TaskRecord,
    TaskState,
    decoder_from_agent,
    decoder_from_hub,
    encode,
)
from tests.harness import HubHarness, snapshot
from tests.raw_websocket import frame, frames_in
from tests.support import parsed
from tests.test_hub_stateful import HubMachine

CPU_S_MAX = 1.0  # Per input. All inputs are small, so an input that takes longer could stall a hub.
TEXT_MAX = 600  # Characters of an error text, which names a field and lists types, but quotes no input.


class Violation(AssertionError):
    """An invariant does not hold."""


def demand(holds: object, otherwise: str) -> None:
    if not holds:
        raise Violation(otherwise)


@contextlib.contextmanager
def no_input_may_stop_the_hub() -> Iterator[None]:
    """Limit the CPU time, which does not depend on other load on the machine."""
    started = time.thread_time()
    try:
        yield
    finally:
        spent = time.thread_time() - started
        demand(spent < CPU_S_MAX, f"it took {spent:.1f} s of CPU")


# ============================================================================================
# Hostile JSON
#
# A message is a tree of objects (Pairs, which allow duplicate keys), lists and fragments, which are
# raw bytes. It is mutated in some places, serialized, and sometimes damaged.
# ============================================================================================

MARK = "47114711"  # Part of keys, texts and numbers; an error that echoes its input contains it.


class Pairs(list[list[Any]]):
    """A JSON object as [key, value] pairs in order, with serialized keys."""


def text(value: str) -> bytes:
    return json.dumps(value).encode()


NUMBERS = [
    *(b"0", b"-0", b"-0.0", b"-1", b"1", b"1.0", b"1e0", b"0.5", b"2", b"17", b"100", b"101", b"1e15", b"1e22"),
    *(b"%d" % (sign * 2**bits + more) for bits in (31, 32, 53, 63, 64) for sign in (1, -1) for more in (-1, 0, 1)),
    *(b"47114711", b"-47114711", b"47114711.5", b"0.47114711", b"47114711e3", b"47114711" * 5, b"1e400", b"0.1"),
    *(b"9" * 4299, b"9" * 4300, b"9" * 4301, b"9" * 5000, b"0." + b"3" * 5000, b"1" * 400 + b".0"),
    *(b"1e308", b"1e309", b"1e999", b"-1e999", b"1e-999", b"5e-324", b"2.2250738585072014e-308"),
]
NO_NUMBERS = [b"NaN", b"Infinity", b"-Infinity", b"nan", b"01", b"+1", b".5", b"1.", b"0x10", b"1_000", b"--1", b"1e"]
TEXTS = [
    *(text(one) for one in ("", "a", "a b", "v" + MARK, MARK, "1", "true", "null", "NaN", "Infinity", "t0")),
    *(text(character) for character in "\0\x01\x1f\x7f\x85\xad\u200b\u200d\u202e\u2028\u2066\ufeff\ufffe\U000e0041"),
    *(text(MARK + character) for character in "\0\n\u202e\ud800"),
    *(text("x" * length) for length in (127, 128, 129, 4096, 4097, 65_536, 65_537)),
    *(b'"\\ud800"', b'"\\udc00"', b'"\\ud83d\\ude00"', b'"\\ud800\\u0041"', b'"\\ud800\\ud800"', b'"\\udc00\\ud800"'),
    *(b'"\xff' + MARK.encode() + b'"', b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"', b'"\xe2\x82"'),
    *(b'"\x00"', b'"\n"', b'"\t"', b'"\x1f"', b'"\\x"', b'"\\u12"', b'"\\u00zz"', b"'a'", b'"\\/"'),
    *(b'"\\\\"', b'"\\""'),
    *(b'"\\\\u0000"', b'"\\\\\\u0000"', b'"[[[[{{{{"', b'"' + b"[" * 200 + b'"', b'"\\\\\\"[[[["'),
    b'"\xf0\x9f\x98\x80"',
    *(b'"' + b'\\"' * 10_000, b'"' + b"\\" * 10_001, b'"' + b"[" * 30_000, b'"' + b"\\\\" * 10_000 + b'"'),
]  # fmt: skip
KEYS = [
    *(text(one) for one in ("k" + MARK, MARK, "", "__proto__", "constructor", "__class__", "toString", "x")),
    *(text(one) for one in ("sender", "state", "seq", "is_saved", "\0", "\ud800", "\u202e", "k" * 300)),
    *(b'"\xff"', b"unquoted", b"1", b'"\\u0074ype"', b"null"),
]
DEPTHS = (1, 2, 62, 63, 64, 65, 66, 67, 100, 126, 199, 200, 201, 260)
NESTED = [
    *(b"[" * depth + b"]" * depth for depth in DEPTHS),
    *(b'{"":' * depth + b"1" + b"}" * depth for depth in DEPTHS),
    *(b'[{"a":' * (depth // 2) + b'"]"' + b"}]" * (depth // 2) for depth in DEPTHS),
    *(b"[" * 100_000, b'{"":' * 100_000, b"[" * 100_000 + b"]" * 100_000, b"[" * 65 + b"]" * 64, b"[" * 64 + b"]" * 65),
]
OTHERS = [
    *(b"null", b"true", b"false", b"[]", b"{}", b"[null]", b"True", b"None", b"undefined", b"tru", b"", b" ", b"//"),
    *(b'{"k47114711":"v47114711"}', b'["v47114711"]', b'{"a":1,"a":2}', b'{"a":{"b":1,"b":[2]}}', b"[1,]", b"{,}"),
    *(b'{"__proto__":{"k47114711":1}}', b'{"name":"v47114711"}', b'{"name":"a","name":"b"}', b'{"code":"v47114711"}'),
    *(b"[NaN]", b'{"a":[1e999]}', b'["NaN",Infinity]', b'{"NaN":1}', b'[{"name":"a"},1]', b'["a","a"]', b"[1,2,3]"),
    *(b"[" + b",".join([b'"a"'] * count) + b"]" for count in (64, 65, 5000)),
    *(b"{" + b",".join(b'"%d":0' % number for number in range(count)) + b"}" for count in (100, 5000)),
]
HOSTILE = NUMBERS + NO_NUMBERS + TEXTS + NESTED + OTHERS
SMALL = [one for one in HOSTILE if len(one) <= 400]

# One message of each type, with all its fields.
FROM_AGENT: list[dict[str, Any]] = [
    {
        "type": "register",
        "id": "r1",
        "name": "ada",
        "description": "adds",
        "capabilities": [
            "a",
            {"name": "b", "description": "c", "input_schema": {}, "output_schema": {"type": "object"}},
        ],
        "max_tasks": 4,
        "metadata": {"k": [1, None]},
        "agent_id": "ada-1",
        "resume": "secret",
        "token": "token",
    },
    {"type": "deregister", "id": "r1", "drain": True},
    {"type": "discover", "id": "r1", "capability": "a", "limit": 10},
    {
        "type": "delegate",
        "id": "r1",
        "task_id": "t1",
        "agent_id": "ada-1",
        "capability": "a",
        "input": {"x": [1, 2.5, None, "y"]},
        "ttl": 60,
        "priority": -3,
        "max_retries": 2,
        "parent_id": "t0",
        "wait": False,
    },
    {"type": "result", "id": "r1", "task_id": "t1", "success": True, "output": {"x": None}, "attempt": 1},
    {"type": "result", "task_id": "t1", "success": False, "error": {"code": "failed", "message": "no"}},
    {"type": "result", "task_id": "t1", "success": False, "error": "no"},
    {"type": "status", "id": "r1", "task_id": "t1", "tasks": False, "progress": 0.5, "detail": {"x": [None]}},
    {"type": "broadcast", "id": "r1", "message": {"x": 1}, "capability": "a"},
    {"type": "heartbeat", "id": "r1"},
]
FROM_HUB: list[dict[str, Any]] = [
    {
        "type": "register",
        "reply_to": "r1",
        "agent_id": "ada-1",
        "resume": "secret",
        "heartbeat_s": 30.0,
        "max_bytes": 1_048_576,
        "tasks": [{"task_id": "t1", "attempt": 1}],
    },
    {"type": "deregister", "reply_to": "r1"},
    {
        "type": "discover",
        "reply_to": "r1",
        "total": 1,
        "agents": [
            {
                "agent_id": "ada-1",
                "name": "ada",
                "description": "adds",
                "capabilities": [{"name": "a", "description": "b"}],
                "running": 0,
                "max_tasks": 4,
                "metadata": {"k": None},
            }
        ],
    },
    {
        "type": "delegate",
        "task_id": "t1",
        "sender": "bob-1",
        "agent_id": "ada-1",
        "capability": None,
        "input": {"x": None},
        "ttl": 59.9,
        "priority": 0,
        "max_retries": 0,
        "parent_id": None,
        "attempt": 1,
    },
    {
        "type": "result",
        "task_id": "t1",
        "sender": "ada-1",
        "success": False,
        "state": "failed",
        "output": None,
        "error": {"code": "failed", "message": "no"},
        "attempt": 1,
    },
    {"type": "status", "reply_to": "r1", "hub": {"version": "1", "tasks": {"pending": 0}}},
    {
        "type": "status",
        "task_id": "t1",
        "state": "completed",
        "requester": "bob-1",
        "agent_id": "ada-1",
        "attempt": 1,
        "priority": 0,
        "max_retries": 0,
        "ttl": 0.0,
        "age_s": 1.5,
        "seq": 1,
        "progress": 1,
        "detail": [1],
        "input": {"x": 1},
        "output": [None],
    },
    {"type": "broadcast", "sender": "bob-1", "message": None, "capability": "a"},
    {"type": "heartbeat_ack", "reply_to": "r1"},
    {"type": "error", "reply_to": "r1", "code": "no_agent", "message": "nobody is there", "task_id": "t1"},
]


def tree_of(value: Any) -> Any:
    """Return a JSON value as a mutable tree."""
    if isinstance(value, dict):
        return Pairs([text(key), tree_of(item)] for key, item in value.items())
    if isinstance(value, list):
        return [tree_of(item) for item in value]
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def written(tree: Any) -> bytes:
    if isinstance(tree, Pairs):
        return b"{" + b",".join(key + b":" + written(value) for key, value in tree) + b"}"
    if isinstance(tree, list):
        return b"[" + b",".join(map(written, tree)) + b"]"
    return bytes(tree)


def objects_in(tree: Any) -> list[Pairs]:
    """Return the objects of a tree that are not empty, the root first."""
    items = [value for _, value in tree] if isinstance(tree, Pairs) else tree if isinstance(tree, list) else []
    inner = [found for item in items for found in objects_in(item)]
    return [tree, *inner] if isinstance(tree, Pairs) and tree else inner


def payload(rng: Random, depth: int = 3) -> Any:
    """Return a random JSON value."""
    kind = rng.randrange(8 if depth else 6)
    if kind < 2:
        return rng.choice([None, True, False, 0, 1, -1, 0.5, -0.0, 1e15, 2**64 - 1])
    if kind == 2:
        return rng.randint(-(2**70), 2**70)
    if kind == 3:
        return struct.unpack("d", rng.randbytes(8))[0]  # Any float, including those that JSON does not allow.
    if kind < 6:
        return "".join(
            chr(rng.choice([97, 98, 34, 92, 47, 0, 0xE9, 0x202E, 0xD800, 0x1F600])) for _ in range(rng.randrange(5))
        )
    if kind == 6:
        return [payload(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {str(payload(rng, 0)): payload(rng, depth - 1) for _ in range(rng.randrange(4))}


def value(rng: Random, fragments: list[bytes]) -> bytes:
    if rng.randrange(3):
        return rng.choice(fragments)
    return json.dumps(payload(rng), ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")


def change(rng: Random, tree: Any, fragments: list[bytes]) -> None:
    """Mutate a tree in a random place."""
    found = objects_in(tree)
    if not found:
        return
    pairs = rng.choice(found)
    index = rng.randrange(len(pairs))
    how = rng.choice(["replace"] * 6 + ["drop", "repeat", "rename", "add", "wrap"])
    if how == "replace":
        pairs[index][1] = value(rng, fragments)
    elif how == "drop":
        del pairs[index]
    elif how == "repeat":
        pairs.insert(rng.randint(0, len(pairs)), [pairs[index][0], value(rng, fragments)])
    elif how == "rename":
        pairs[index][0] = rng.choice(KEYS)
    elif how == "add":
        pairs.insert(index, [rng.choice(KEYS), value(rng, fragments)])
    else:
        pairs[index][1] = [value(rng, fragments), pairs[index][1]]


SPLINTERS = [
    b"",
    b"\0",
    b'"',
    b"\\",
    b",",
    b"}",
    b"]",
    b"{",
    b"[",
    b":",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b" \r\n\t",
]


def damaged(rng: Random, raw: bytes) -> bytes:
    """Return damaged bytes: truncated, with insertions or deletions, or in another encoding."""
    how = rng.choice(["cut", "insert", "insert", "take out", "byte order mark", "UTF-16", "twice", "spaces"])
    at = rng.randint(0, min(len(raw), 400))
    if how == "cut":
        return raw[:at]
    if how == "insert":
        return raw[:at] + rng.choice([rng.choice(SPLINTERS), rng.randbytes(rng.randint(1, 4))]) + raw[at:]
    if how == "take out":
        return raw[:at] + raw[at + rng.randint(1, 8) :]
    if how == "byte order mark":
        return b"\xef\xbb\xbf" + raw
    if how == "UTF-16":
        return raw.decode("latin-1").encode("utf-16")
    return raw + raw if how == "twice" else b" \n" * at + raw + b"\r\t" * at


def document(rng: Random, templates: list[dict[str, Any]], fragments: list[bytes] = HOSTILE) -> bytes:
    """Return the bytes of a valid message, of an almost valid one, or arbitrary ones."""
    kind = rng.randrange(20)
    if kind == 0:
        return rng.choice([rng.randbytes(rng.randrange(60)), value(rng, fragments)])
    tree = tree_of(rng.choice(templates))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        change(rng, tree, fragments)
    raw = written(tree)
    return damaged(rng, raw) if kind <= 4 else raw


# ============================================================================================
# Target decode
# ============================================================================================


def check_decode(raw: bytes) -> None:
    """Pass some bytes to both decoders."""
    for decode in (decoder_from_agent(), decoder_from_hub()):
        try:
            with no_input_may_stop_the_hub():
                message = decode(raw)
        except InvalidMessage as error:
            check_refusal(error)
        else:
            if decode is decoder_from_agent() or is_plain(json.loads(raw)):
                check_message(raw, message, decode)
            encode(message).decode()  # Not checked further, because agents trust their hub and forward nothing.


def is_plain(value: Any) -> bool:
    """Return whether all parsers agree on a JSON value."""
    if isinstance(value, dict | list):
        return all(map(is_plain, value.values() if isinstance(value, dict) else value))
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or -(2**63) <= value < 2**64


def check_refusal(error: InvalidMessage) -> None:
    """Check that an error reveals nothing of the input but its id, and that the hub can send it."""
    demand(MARK not in error.message, f"the error echoes what came in: {error.message[:200]!r}")
    demand(0 < len(error.message) <= TEXT_MAX, f"the error's text has {len(error.message)} characters")
    demand(error.message.isprintable(), f"the error's text is not printable: {error.message!r}")
    demand(error.code in (Code.INVALID_MESSAGE, Code.UNSUPPORTED_TYPE), f"the error's code is {error.code}")
    reply = Error(reply_to=error.reply_to, code=error.code, message=error.message)
    demand(decoder_from_hub()(encode(reply)) == reply, "the error is decoded differently")


def check_message(raw: bytes, message: Any, decode: Callable[[bytes], Any]) -> None:
    """Check that a message is forwarded unchanged, and that all parsers agree on it."""
    again = encode(message)
    document = strictly(again)
    demand(isinstance(document, dict), "a message is not an object")
    demand(len(dict(document)) == len(document), "it has a duplicate key")
    copy = decode(again)
    demand(copy == message, f"it is decoded differently the second time: {again[:300]!r}")
    demand(repr(copy) == repr(message), f"it is decoded to other types the second time: {again[:300]!r}")
    if decode is decoder_from_agent():
        demand(nesting_depth(document) <= agenthub.DEPTH_MAX + 1, "it is nested too deep")
    # Another parser must agree. The last of duplicate keys counts, as in nearly all languages.
    original, message = json.loads(raw, parse_constant=refuse_constant), parsed(message)
    for name in ("input", "output", "detail", "message", "metadata", "task_id", "id", "reply_to", "sender"):
        if hasattr(message, name) and original.get(name) is not None:
            demand(repr(getattr(message, name)) == repr(original[name]), f"two parsers disagree on {name}")


def refuse_constant(constant: str) -> None:
    raise Violation(f"{constant} is not JSON")


class Fields(dict[str, Any]):
    """An object that remembers how many fields it was written with: in a payload, some may have the same name."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.written = len(pairs)

    def __len__(self) -> int:
        return self.written


def strictly(raw: bytes) -> Any:
    """Parse JSON like the strictest client."""
    return json.loads(raw.decode(), parse_constant=refuse_constant, parse_int=of_64_bits, object_pairs_hook=Fields)


def of_64_bits(digits: str) -> int:
    demand(len(digits) <= 20 and -(2**63) <= int(digits) < 2**64, f"{digits[:30]} does not fit 64 bits")
    return int(digits)


def nesting_depth(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if items is None else 1 + max(map(nesting_depth, items), default=0)


# ============================================================================================
# Target bytes
#
# A case is a list of steps, each a tuple of an event and a connection (modulo their number). The
# server is real; only its event loop and its sockets are simulated.
# ============================================================================================

MESSAGE_BYTES_MAX = 4096
BACKLOG_BYTES_MAX = 65_536
CONNECTIONS_MAX = 3
CHUNK_BYTES_MAX = 65_536  # Bytes of one read.
# Bytes in a link: a message, a chunk, and buffered output. Each may exceed its limit by a message.
HELD_BYTES_MAX = CHUNK_BYTES_MAX + agenthub.OUT_BYTES_MAX + 4 * MESSAGE_BYTES_MAX
UNREAD_BYTES_MAX = BACKLOG_BYTES_MAX + agenthub.OUT_BYTES_MAX + 4 * MESSAGE_BYTES_MAX


BUFFERS = bytes | bytearray | list | collections.deque
PROTOCOL_MODULES = ("agenthub", "websockets")


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop without sockets, whose clock advances only when it is idle."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = self  # BaseEventLoop waits with this.
        self.now = 1000.0
        self.failures: list[str] = []
        self.set_exception_handler(self.on_failure)
        self.sockets: list[Socket] = []

    def time(self) -> float:
        return self.now

    def select(self, timeout: float | None) -> list[Any]:
        demand(timeout is not None, "the loop waits forever")
        self.now += timeout or 0.0
        return []

    def on_failure(self, loop: Any, context: dict[str, Any]) -> None:
        self.failures.append(f"{context.get('message')}: {context.get('exception')!r}")

    async def getaddrinfo(self, *args: Any, **options: Any) -> list[Any]:
        """Return no addresses: connections are made with `connect_accepted_socket`."""
        return []

    async def connect_accepted_socket(self, factory: Callable[[], Any], sock: Any, **options: Any) -> Any:
        self.sockets.append(Socket(self, factory()))

    def _process_events(self, events: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


class Socket(asyncio.Transport):
    """The hub's end of a connection, with asyncio's guarantees to its protocol, and the actions of the peer."""

    def __init__(self, loop: VirtualLoop, link: Any) -> None:
        super().__init__()
        self.loop = loop
        self.link = link
        self.written = bytearray()
        self.high_water_bytes = 65_536
        self.unread_bytes = 0  # Written to a peer that does not read.
        self.is_stuck = self.is_paused = self.is_writing_paused = self.is_ended = self.is_lost = self.is_deaf = False
        self.is_half_closed = False
        self.incoming: collections.deque[bytes | None] = collections.deque()  # None is EOF.
        self.link.connection_made(self)

    # The peer's actions.

    def feed(self, data: bytes | None) -> None:
        if not self.is_deaf:
            self.is_deaf = data is None
            self.incoming.append(data)
            self.hand_over()

    def cut(self) -> None:
        self.lose(ConnectionResetError("reset by peer"))

    def set_stuck(self, is_stuck: bool) -> None:
        self.is_stuck = is_stuck
        if not is_stuck:
            self.unread_bytes = 0
            self.watch_the_backlog()
            if self.is_ended:
                self.lose(None)

    def hand_over(self) -> None:
        while self.incoming and not (self.is_paused or self.is_ended):
            data = self.incoming.popleft()
            if data is None:
                if not self.link.eof_received():
                    self.close()
            elif data:
                with no_input_may_stop_the_hub():
                    self.link.data_received(data)
                held = held_bytes(self.link)
                demand(held <= HELD_BYTES_MAX, f"the link holds {held} bytes after {len(data)} more")
                demand(
                    self.unread_bytes <= UNREAD_BYTES_MAX, f"{self.unread_bytes} bytes wait for a peer that is stuck"
                )

    # asyncio.Transport

    def write(self, data: Any) -> None:
        demand(not (self.is_ended or self.is_half_closed), "the link writes after EOF")
        self.written += data
        if self.is_stuck:
            self.unread_bytes += len(data)
            self.watch_the_backlog()

    def watch_the_backlog(self) -> None:
        if self.unread_bytes > self.high_water_bytes and not self.is_writing_paused:
            self.is_writing_paused = True
            self.link.pause_writing()
        elif not self.unread_bytes and self.is_writing_paused:
            self.is_writing_paused = False
            self.link.resume_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high_water_bytes = 65_536 if high is None else high

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.is_half_closed = True

    def get_write_buffer_size(self) -> int:
        return self.unread_bytes

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 40_000) if name == "peername" else default

    def is_closing(self) -> bool:
        return self.is_ended

    def is_reading(self) -> bool:
        return not (self.is_paused or self.is_ended)

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False
        self.loop.call_soon(self.hand_over)

    def close(self) -> None:
        if not self.is_ended:
            self.is_ended = True
            if not self.unread_bytes:
                self.lose(None)

    def abort(self) -> None:
        self.lose(None)

    def lose(self, error: Exception | None) -> None:
        self.is_ended = True
        if not self.is_lost:
            self.is_lost = True
            self.loop.call_soon(self.link.connection_lost, error)


def held_bytes(link: agenthub.WebSocketLink) -> int:
    """Return how many bytes of what a peer sent a link keeps: in itself, in its protocol, and in what that is made of.

    All that the protocol refers to is searched, and of the link itself only buffers: it also refers to the hub.
    """
    total, seen = 0, set()
    remaining = [link.protocol, *(one for one in gc.get_referents(link) if isinstance(one, BUFFERS))]
    while remaining:
        one = remaining.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, bytes | bytearray):
            total += len(one)
        elif isinstance(one, BUFFERS | dict | tuple) or type(one).__module__.partition(".")[0] in PROTOCOL_MODULES:
            remaining += gc.get_referents(one)
    return total


class WatchedServer(HubServer):
    """The real server, with checks of the order of its links' callbacks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.told: dict[Any, str] = {}

    def opened(self, link: Any) -> None:
        demand(link not in self.told, "a link is opened twice")
        self.told[link] = "opened"
        super().opened(link)

    def received(self, link: Any, message: Any, message_bytes: int) -> None:
        demand(self.told.get(link) == "opened", f"a message comes on a link that is {self.told.get(link)}")
        demand(message_bytes <= MESSAGE_BYTES_MAX, f"a message of {message_bytes} bytes is accepted")
        super().received(link, message, message_bytes)

    def closed(self, link: Any, code: int, reason: str) -> None:
        demand(self.told.get(link) == "opened", f"a link is closed that is {self.told.get(link)}")
        self.told[link] = "closed"
        super().closed(link, code, reason)


class Listener(logging.Handler):
    """Collects logged errors, because the server goes on after a bug and only logs it."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.lines.append(f"{record.getMessage()}: {error!r}")


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    logger, listener = logging.getLogger("agenthub"), Listener()
    level, propagates = logger.level, logger.propagate
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    logger.addHandler(listener)
    try:
        yield listener.lines
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagates


def check_bytes(steps: list[tuple[Any, ...]]) -> None:
    """Run one case on a new event loop."""
    loop = VirtualLoop()
    try:
        with listening() as errors:
            loop.run_until_complete(play_bytes(loop, steps, errors))
    finally:
        loop.close()


async def play_bytes(loop: VirtualLoop, steps: list[tuple[Any, ...]], errors: list[str]) -> None:
    server = WatchedServer(
        HubSettings(message_bytes_max=MESSAGE_BYTES_MAX, connections_max=CONNECTIONS_MAX),
        access=agenthub.Access.of_token("token") if ("guarded",) in steps else None,
        backlog_bytes_max=BACKLOG_BYTES_MAX,
    )
    with unittest.mock.patch("os.urandom", Random(1).randbytes):  # Makes cases repeatable.
        await server.start()
    sockets = loop.sockets
    for what, *details in steps:
        if what == "open":
            no_socket: Any = types.SimpleNamespace(close=lambda: None)
            server.accept(no_socket, "127.0.0.1")
            await asyncio.sleep(0)  # `connect_accepted_socket` is called in a task.
        elif what == "wait":
            await asyncio.sleep(details[0])
        elif sockets:
            socket = sockets[details[0] % len(sockets)]
            if what == "data":
                for start in range(0, len(details[1]), CHUNK_BYTES_MAX):
                    socket.feed(details[1][start : start + CHUNK_BYTES_MAX])
            elif what == "eof":
                socket.feed(None)
            elif what == "cut":
                socket.cut()
            else:
                socket.set_stuck(what == "stuck")
        demand(not errors and not loop.failures, f"{errors + loop.failures}")
    await asyncio.sleep(0)
    await server.stop()
    for _ in range(3):
        await asyncio.sleep(0)
    demand(not errors and not loop.failures, f"{errors + loop.failures}")
    for socket in sockets:
        demand(socket.link.gone.is_set(), "a link outlives its server")
        demand(server.told.get(socket.link) in (None, "closed"), "the owner of a closed link was not notified")
        check_written(bytes(socket.written))
    demand(not server.hub.connections, "the hub remembers a connection that has ended")


def check_written(raw: bytes) -> None:
    """Check the output of a link: an HTTP response and, after 101, whole frames (RFC 6455 §5.2)."""
    if not raw:
        return
    head, end, rest = raw.partition(b"\r\n\r\n")
    status = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [A-Za-z -]+((?:\r\n[A-Za-z-]+: [\x20-\x7e]*)*)", head)
    demand(status and end, f"this is not a response: {head[:200]!r}")
    assert status is not None
    if status[1] != b"101":
        length = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
        demand(length is not None and int(length[1]) == len(rest), f"the Content-Length of the body is wrong: {raw!r}")
        return
    try:
        frames = frames_in(rest)
    except ValueError as error:
        raise Violation(str(error)) from error
    demand(all(one.fin for one in frames), "the hub sends a fragment")
    demand(all(one.opcode < 8 or len(one.data) < 126 for one in frames), "a control frame is too long")
    after_close = itertools.dropwhile(lambda one: one.opcode != 8, frames)
    # Pings are answered until the peer closes too (RFC 6455 §5.5.2).
    demand([one.opcode for one in after_close if one.opcode != 10] in ([], [8]), "a frame follows its close")
    for one in frames:
        if one.opcode == 1:
            demand(len(one.data) <= MESSAGE_BYTES_MAX, f"the hub sends {len(one.data)} bytes")
            message = decoder_from_hub()(one.data)
            strictly(one.data)
            demand(getattr(message, "code", None) != Code.INTERNAL, "the hub fails")
        elif one.opcode == 8 and one.data:
            code = int.from_bytes(one.data[:2], "big")
            one.data[2:].decode()
            demand(code in (*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)), f"it is closed with {code}")
        else:
            demand(one.opcode in (8, 10), f"the hub sends a frame of opcode {one.opcode}")


# Input from a peer.

HANDSHAKE = [
    b"GET / HTTP/1.1",
    b"Host: 127.0.0.1:8765",
    b"Upgrade: websocket",
    b"Connection: Upgrade",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    b"Sec-WebSocket-Version: 13",
]
OPENING = b"\r\n".join([*HANDSHAKE, b"", b""])
REQUEST_LINES = [
    *(b"GET /healthz HTTP/1.1", b"GET /healthz?x HTTP/1.1", b"GET /" + b"x" * 9000 + b" HTTP/1.1", b"GET * HTTP/1.1"),
    *(b"GET / HTTP/1.0", b"POST / HTTP/1.1", b"HEAD /healthz HTTP/1.1", b"GET  / HTTP/1.1", b"GET / HTTP/2", b"GET /"),
    *(b"GET /\xff\x00 HTTP/1.1", b"GET http://[::1/ HTTP/1.1", b"PRI * HTTP/2.0", b"", b"\x16\x03\x01\x02\x00\x01"),
]
HEADER_LINES = [
    *(b"Origin: http://evil.example", b"Origin: null", b"Origin: http://127.0.0.1:8765", b"Origin: \xff"),
    *(b"Host: evil.example", b"Host: ", b"Host: [::1", b"Host: localhost:99999", b"Host: \x80", b"Host: a,b"),
    *(b"Authorization: Bearer token", b"Authorization: Basic \xff", b"Authorization: " + b"x" * 8000),
    *(b"Sec-WebSocket-Key: ", b"Sec-WebSocket-Key: !!!!", b"Sec-WebSocket-Key: AAAA", b"Sec-WebSocket-Key: \xff"),
    *(b"Sec-WebSocket-Version: 8", b"Sec-WebSocket-Version: x", b"Sec-WebSocket-Protocol: a, b", b"Upgrade: h2c"),
    *(b"Sec-WebSocket-Extensions: permessage-deflate", b"Sec-WebSocket-Extensions: ;;;", b"Connection: close"),
    *(b"Content-Length: 5", b"Content-Length: 99999999999999999999", b"Content-Length: -1", b"Content-Length: x"),
    *(
        b"Transfer-Encoding: chunked",
        b"no colon",
        b": empty",
        b" folded",
        b"X: " + b"x" * 9000,
        b"X: \x00",
        b"X\x00: a",
    ),
    b"\r\n".join(b"X-%d: y" % number for number in range(130)),
]


def handshake(rng: Random) -> bytes:
    """Return a handshake, which is usually valid."""
    if rng.randrange(10) < 7:
        return OPENING
    if rng.randrange(10) == 0:
        return rng.randbytes(rng.randrange(40))
    lines = list(HANDSHAKE)
    for _ in range(rng.randint(1, 3)):
        how = rng.choice(["first", "add", "add", "replace", "drop"])
        at = rng.randint(1, len(lines) - 1) if len(lines) > 1 else 0
        if how == "first":
            lines[0] = rng.choice(REQUEST_LINES)
        elif how == "drop":
            del lines[at]
        elif how == "replace" and at:
            lines[at] = rng.choice(HEADER_LINES)
        else:
            lines.insert(at + 1, rng.choice(HEADER_LINES))
    return rng.choice([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r"]).join([*lines, b"", b""])


LENGTHS = [0, 1, 125, 126, 127, 4095, 4096, 4097, 65_535, 65_536, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
CLOSES = [
    b"",
    b"\x03",
    b"\x03\xe8",
    b"\x03\xe8bye",
    b"\x03\xe8\xff",
    b"\x00\x00",
    b"\x03\xed",
    b"\x03\xee",
    b"\x0f\xa0",
    b"\xff\xff",
]
# Messages with long or many replies.
CHATTER = [
    b'{"type":"register","id":"1","name":"a","capabilities":["a"],"metadata":{"x":"' + b"x" * 3000 + b'"}}',
    b'{"type":"register","name":"b","capabilities":["b"],"max_tasks":100}',
    b'{"type":"discover","id":"1"}',
    b'{"type":"status","id":"1","tasks":true}',
    b'{"type":"broadcast","message":"' + b"x" * 2000 + b'"}',
    b'{"type":"delegate","task_id":"t","capability":"a","wait":true,"input":"' + b"x" * 2000 + b'"}',
    b'{"type":"heartbeat","id":"1"}',
]


def some_frames(rng: Random) -> bytes:
    """Return some bytes for after a handshake."""
    kind = rng.choice([*["message"] * 5, *["chatter"] * 3, "parts", "control", "header", "flood", "garbage"])
    key = rng.choice([b"\0\0\0\0", b"\x01\x80\xff\x00"])
    if kind == "message":
        return frame(document(rng, FROM_AGENT, SMALL), key=key)
    if kind == "chatter":
        return frame(rng.choice(CHATTER), key=key)
    if kind == "parts":
        return fragmented(rng, key)
    if kind == "control":
        opcode = rng.choice([8, 8, 9, 9, 10])
        said = rng.choice(CLOSES) if opcode == 8 else b"x" * rng.choice([0, 1, 125, 126])
        return frame(said, opcode, key=key, fin=rng.randrange(10) > 0)
    if kind == "header":
        return frame(
            rng.randbytes(rng.randrange(10)),
            rng.choice([0, 1, 1, 2, 3, 7, 8, 9, 11, 15]),
            fin=rng.random() < 0.5,
            rsv=rng.choice([0, 0, 0, 1, 4, 7]),
            key=rng.choice([key, key, b""]),
            length=rng.choice([None, rng.choice(LENGTHS)]),
            length_bytes=rng.choice([0, 0, 2, 8]),
        )
    if kind == "flood":
        return some_frames(rng)[:20_000] * rng.choice([10, 100, 1000])
    return rng.randbytes(rng.randint(1, 20))


def fragmented(rng: Random, key: bytes) -> bytes:
    """Return a fragmented message, possibly too large, incomplete, or with other frames between its fragments."""
    whole = rng.choice([document(rng, FROM_AGENT, SMALL), b"x" * 4096, b"x" * 4097, b"\xff", b"\xe2\x82\xac" * 9])
    cuts = sorted(rng.randint(0, len(whole)) for _ in range(rng.randrange(4)))
    parts = [whole[start:end] for start, end in itertools.pairwise([0, *cuts, len(whole)])]
    raw = b""
    for index, part in enumerate(parts):
        is_last = index == len(parts) - 1 and rng.randrange(10) > 0
        raw += frame(part, rng.choice([1, 1, 1, 2]) if index == 0 else 0, fin=is_last, key=key)
        if rng.randrange(6) == 0:
            raw += frame(b"between", rng.choice([9, 9, 1]), key=key)
    return raw


def wire(rng: Random) -> list[tuple[Any, ...]]:
    """Return the steps of some peers."""
    steps: list[tuple[Any, ...]] = [("guarded",)] if rng.randrange(3) == 0 else []
    chunks: list[collections.deque[bytes]] = []
    for _ in range(rng.choice([1, 1, 2, 2, 5])):
        steps.append(("open",))
        stream = handshake(rng) + b"".join(some_frames(rng) for _ in range(rng.randrange(7)))
        cuts = sorted(rng.randint(0, len(stream)) for _ in range(rng.randrange(5)))
        if rng.randrange(15) == 0:
            stream, cuts = stream[:300], list(range(min(len(stream), 300)))  # Byte by byte.
        pieces = (stream[start:end] for start, end in itertools.pairwise([0, *cuts, len(stream)]))
        chunks.append(collections.deque(piece for piece in pieces if piece))
    while any(chunks):
        who = rng.choice([index for index, queue in enumerate(chunks) if queue])
        steps.append(("data", who, chunks[who].popleft()))
        happening = rng.randrange(30)
        if happening < 12:
            steps.append(("wait", 0))
        elif happening < 15:
            steps.append(("wait", rng.choice([0.01, 1.0, 5.0, 31.0, 100.0])))
        elif happening < 20:
            steps.append((rng.choice(["eof", "cut", "stuck", "stuck", "reads"]), who))
    return steps


# ============================================================================================
# Target sequences
#
# A case is the hub's settings and a list of steps: connect, send, send an earlier message again,
# disconnect, advance the clock. In messages, @A0@ and @S0@ stand for the id and the secret of an
# agent (modulo their number), and @M@ for a text that only requester and worker may see.
# ============================================================================================

TASK_IDS = [b'"t%d"' % number for number in range(5)]
NAMES = [b'"a"', b'"b"', b'"a"', b'"\xc3\xa4"', b'"A b"', b'"x y-z"']
AGENT_IDS = [b'"@A%d@"' % number for number in range(4)]
PRIVATE = [
    *(b'"@M@"', b'"@M@"', b'{"x":["@M@",null]}', b'["@M@",1e15,-0.0]', b'{"@M@":null}', b'["@M@","\\u0000\\u202e"]'),
    *(b'["@M@","' + b"x" * 700 + b'"]', b'["@M@"' + b",1e15" * 150 + b"]"),
]

FIELDS: dict[str, dict[str, list[bytes]]] = {
    "register": {
        "name": NAMES,
        "capabilities": [b"[]", b'["a"]', b'["a","b"]', b'["b",{"name":"a","description":"x y"}]', b'["a","a"]'],
        "max_tasks": [b"1", b"2", b"100"],
        "metadata": [b"{}", b'{"x":null}', b'{"x":"' + b"x" * 900 + b'"}'],
        "agent_id": AGENT_IDS,
        "resume": [b'"@S0@"', b'"@S1@"', b'"@S2@"', b'"guessed"'],
    },
    "deregister": {"drain": [b"true", b"false", b"true"]},
    "discover": {"capability": [b'""', b'"a"', b'"X"', b'"\xc3\x84"'], "limit": [b"1", b"1000"]},
    "delegate": {
        "task_id": TASK_IDS,
        "agent_id": AGENT_IDS,
        "capability": NAMES,
        "input": PRIVATE,
        "ttl": [b"60", b"1", b"0.001", b"604800", b"5e-324", b"1e-9"],
        "priority": [b"0", b"100", b"-100"],
        "max_retries": [b"0", b"1", b"100"],
        "parent_id": TASK_IDS,
        "wait": [b"true", b"false"],
    },
    "result": {
        "task_id": TASK_IDS,
        "success": [b"true", b"true", b"false"],
        "output": PRIVATE,
        "error": [b'"@M@"', b'{"code":"x","message":"@M@"}', b'{"code":"agent_lost"}', b'""', b"null"],
        "attempt": [b"1", b"1", b"2", b"1000000"],
    },
    "status": {
        "task_id": TASK_IDS,
        "tasks": [b"true", b"false"],
        "progress": [b"0", b"1", b"0.5", b"-0.0", b"null", b"5e-324"],
        "detail": PRIVATE,
    },
    "broadcast": {"message": [b"null", b'{"x":null}', b'"' + b"x" * 900 + b'"'], "capability": NAMES},
    "heartbeat": {},
}  # fmt: skip
ALWAYS = {"name", "capabilities", "task_id", "success", "message", "input", "output"}
SELDOM = {"parent_id", "agent_id", "resume"}
TYPES = (
    ["register"] * 3
    + ["delegate"] * 6
    + ["result"] * 5
    + ["status"] * 3
    + ["broadcast", "heartbeat", "discover", "deregister"]
)


def saying(rng: Random, kind: str | None = None) -> bytes:
    """Return a mostly valid message, with some hostile values."""
    kind = kind or rng.choice(TYPES)
    tree = Pairs([[b'"type"', text(kind)]])
    if rng.randrange(5):
        tree.append([b'"id"', b'"r%d"' % rng.randrange(10)])
    for name, fragments in FIELDS[kind].items():
        chances = 12 if name in ALWAYS else 2 if name in SELDOM else 5
        if rng.randrange(12) < chances:
            tree.append([text(name), rng.choice(fragments)])
    if rng.randrange(8) == 0:
        tree.append([b'"sender"', b'"@A0@"'])
    if rng.randrange(5) == 0:
        change(rng, tree, SMALL)
    return written(tree)


def story(rng: Random) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """Return the settings of a hub, and the steps of a story."""
    options = {
        "grace_s": rng.choice([10.0, 0.0, 100.0]),
        "retention_s": rng.choice([100.0, 5.0]),
        "heartbeat_s": rng.choice([1e5, 1e5, 20.0]),
        "message_bytes_max": rng.choice([4096, 1024, 65_536]),
        "records_bytes_max": rng.choice([1_000_000, 8000]),
        "open_tasks_max": rng.choice([100, 2]),
        "pending_tasks_max": rng.choice([100, 2]),
        "agents_max": rng.choice([100, 3]),
    }
    steps: list[tuple[Any, ...]] = []
    for index in range(rng.randint(2, 3)):
        steps += [("connect",), ("say", index, saying(rng, "register"))]
    for _ in range(rng.randint(1, 60)):
        what = rng.randrange(30)
        who = rng.randrange(5)
        if what < 22:
            steps.append(("say", who, saying(rng)))
        elif what < 24:
            steps.append(("again", who, rng.randrange(20)))
        elif what < 26:
            steps.append(("wait", rng.choice([0.0, 0.001, 1.0, 10.0, 61.0, 120.0])))
        elif what < 28:
            steps += [("connect",), ("say", -1, saying(rng, "register"))]
        else:
            steps.append(("lose", who))
    return options, steps


class Story:
    """A hub, the messages to it, and checks of its output against the protocol's guarantees.

    The harness drives the hub as for all tests. It keeps no ledger here: that looks up tasks and requests by their ids,
    which garbage repeats, also after the hub has purged the first. These checks go by the hub's own records instead.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.harness = HubHarness(**options)
        self.harness.apply = self.look_at  # type: ignore[method-assign]  # it watches the steps
        self.said: list[bytes] = []
        self.secrets: dict[str, str] = {}  # By agent_id.
        self.owners: dict[bytes, list[TaskRecord]] = {}  # The tasks of each private text.
        self.known: dict[int, tuple[TaskRecord, TaskState, bool]] = {}  # By sequence; and whether the hub has it still.
        self.told: collections.Counter[int] = collections.Counter()
        self.asked: collections.Counter[int] = collections.Counter()
        self.draining: set[tuple[str, str]] = set()  # Connections, and the ids of their `deregister`.
        self.effects: list[tuple[str, Any]] = []  # Of this step.
        self.agent_before: dict[str, AgentRecord] = {}  # By connection.
        self.assignee_before: dict[int, AgentRecord | None] = {}  # By sequence.

    def agents(self) -> dict[str, AgentRecord]:
        return self.harness.hub.directory.agents

    def records(self) -> list[TaskRecord]:
        hub = self.harness.hub
        return [*hub.tasks.open.values(), *hub.tasks.delivered.values(), *hub.tasks.undelivered.values()]

    def agents_by_connection(self) -> dict[str, AgentRecord]:
        connections = self.harness.hub.connections.items()
        return {str(link): one.agent for link, one in connections if one.agent is not None}

    def look_at(self, step: agenthub.Step) -> None:
        self.effects += step.effects
        HubHarness.apply(self.harness, step)

    # The steps

    def begin(self) -> None:
        self.effects = []
        self.agent_before = self.agents_by_connection()
        self.assignee_before = {task.sequence: task.assignee for task in self.records()}

    def connection(self, number: int) -> str | None:
        connections = list(self.harness.clients)
        return connections[number % len(connections)] if connections else None

    def say(self, connection: str, template: bytes) -> None:
        raw = self.filled_in(template)
        if len(raw) > self.harness.hub.settings.message_bytes_max:
            return  # A link would have closed the connection.
        self.begin()
        message: Any
        try:
            message = decoder_from_agent()(raw)
        except InvalidMessage as error:
            message = error
        known = None if isinstance(message, InvalidMessage) else self.task_of(message)
        was_over = known is not None and known.state in FINAL_STATES
        memory = snapshot(self.harness.hub)
        self.harness.apply(self.harness.hub.receive(connection, message, self.harness.now, len(raw)))
        is_refused = self.check_replies(connection, message)
        if is_refused and connection in self.harness.clients:  # Unless too many wrong secrets closed it.
            demand(snapshot(self.harness.hub) == memory, "a rejected message changed something")
        else:
            task = known or self.task_of(message)
            if task is not None:
                self.asked[task.sequence] += isinstance(message, Delegate) and was_over
                for private in re.findall(rb"private-\d+-", raw):
                    self.owners.setdefault(private, []).append(task)
        self.end(message)

    def task_of(self, message: Any) -> TaskRecord | None:
        return self.harness.hub.tasks.find(getattr(message, "task_id", None) or "")

    def filled_in(self, template: bytes) -> bytes:
        agents = list(self.secrets.items()) or [("nobody", "nothing")]
        raw = re.sub(rb"@A(\d+)@", lambda match: agents[int(match[1]) % len(agents)][0].encode(), template)
        raw = re.sub(rb"@S(\d+)@", lambda match: agents[int(match[1]) % len(agents)][1].encode(), raw)
        self.said.append(raw.replace(b"@M@", b"private-%d-" % len(self.said)))
        return self.said[-1]

    def step(self, what: str, *details: Any) -> None:
        if what == "wait":
            self.pass_time(details[0])
        elif what == "connect":
            if len(self.harness.clients) < 8:
                self.begin()
                self.harness.connect()
                self.end(None)
        elif (connection := self.connection(details[0])) is not None:
            if what == "lose":
                self.begin()
                self.draining = {one for one in self.draining if one[0] != connection}
                self.harness.clients[connection].lose_connection()
                self.end(None)
            elif what == "say":
                self.say(connection, details[1])
            elif self.said:
                self.say(connection, self.said[details[1] % len(self.said)])

    def pass_time(self, seconds: float) -> None:
        end = self.harness.now + seconds
        ticks = 0
        while (due := self.harness.hub.next_deadline()) <= end:
            ticks += 1
            demand(ticks < 10_000, "the hub does not become idle")
            self.tick(max(self.harness.now, due))
        self.harness.now = end

    def tick(self, now: float) -> None:
        self.begin()
        self.harness.now = now
        self.harness.apply(self.harness.hub.tick(now))
        self.end(None)

    def leave(self) -> None:
        """End the story: all agents leave, and the hub must purge everything that it kept for them."""
        for connection in list(self.harness.clients):
            self.begin()
            self.draining = {one for one in self.draining if one[0] != connection}
            self.harness.clients[connection].lose_connection()
            self.end(None)
        kept = self.harness.hub.settings
        for seconds in (agenthub.TTL_MAX_S, kept.grace_s + 60, kept.retention_s + 60):  # One late tick each.
            self.tick(self.harness.now + seconds)
            self.pass_time(0)
        demand(all(state in FINAL_STATES for _, state, _ in self.known.values()), "a task never ends")
        demand(self.harness.is_empty(), "the hub keeps data of agents that have left")

    # The invariants after each step

    def check_replies(self, connection: str, message: Any) -> bool:
        """Check that a request gets one reply, and other messages none; return whether it was rejected."""
        to_sender = [effect for to, effect in self.effects if to == connection]
        errors = [effect for effect in to_sender if isinstance(effect, Error)]
        message_id = message.reply_to if isinstance(message, InvalidMessage) else message.id
        replies = [effect for effect in to_sender if getattr(effect, "reply_to", None) == message_id]
        demand(
            len(errors) == 1 or not isinstance(message, InvalidMessage), "an invalid message has no error, or several"
        )
        if message_id is None:
            replies = errors
            demand(len(errors) <= 1, "a message has several errors")
        elif isinstance(message, Deregister) and message.drain and not replies:
            self.draining.add((connection, message_id))
        else:
            wished_before = (connection, message_id) in self.draining  # An id may be reused.
            self.draining -= {(connection, message_id)} if wished_before and len(replies) == 2 else set()
            demand(len(replies) in (1, 1 + wished_before), f"{message_id} has {len(replies)} replies")
        for to, effect in self.effects:
            reply_to = getattr(effect, "reply_to", None)
            if reply_to is not None and (to, reply_to) != (connection, message_id):
                demand((to, reply_to) in self.draining, f"{to} gets a reply to {reply_to}, which it did not send")
                self.draining.discard((to, reply_to))
        return bool(errors)

    def end(self, message: Any) -> None:
        """Check all effects of this step."""
        agents = {**self.agent_before, **self.agents_by_connection()}
        for agent in self.agents().values():
            if agent.resume:
                self.secrets[agent.agent_id] = agent.resume
        told_now: set[int] = set()
        for connection, effect in self.effects:
            if isinstance(effect, Close):
                self.draining = {one for one in self.draining if one[0] != connection}
                continue
            raw = encode(effect)
            strictly(raw)
            decoder_from_hub()(raw)
            self.check_who_is_told(raw, effect, agents.get(connection))
            self.check_sender(effect, agents.get(connection), message)
            if isinstance(effect, TaskOutcome):
                told_now.add(self.check_settled(effect))
        self.check_states(told_now)
        self.check_counters()
        if self.harness.hub.next_deadline() > self.harness.now:  # Otherwise a task at its deadline waits for the tick.
            for holds in HUB_INVARIANTS:
                holds(self)

    def check_who_is_told(self, raw: bytes, effect: Any, hearer: AgentRecord | None) -> None:
        """Check that only requester and worker see private texts."""
        for private in set(re.findall(rb"private-\d+-", raw)):
            tasks = self.owners.get(private)
            demand(tasks, f"{private!r} was rejected, but is sent")
            may_hear = [one for task in tasks or () for one in (task.requester, task.assignee)]
            may_hear += [self.assignee_before.get(task.sequence) for task in tasks or ()]
            if isinstance(effect, Delegated):
                may_hear = [hearer] if hearer is not None and hearer.agent_id == effect.agent_id else []
            demand(hearer is not None and hearer in may_hear, f"{private!r} is shown to somebody else")
        for agent_id, secret in self.secrets.items():
            if secret.encode() in raw:
                demand(hearer is not None and hearer.agent_id == agent_id, f"the secret of {agent_id} is leaked")

    def check_sender(self, effect: Any, hearer: AgentRecord | None, message: Any) -> None:
        """Check that `sender` is the agent that sent the message."""
        task = self.task_of(effect)
        if isinstance(effect, Delegated):
            demand(hearer is not None and effect.agent_id == hearer.agent_id, "a task is leaked")
            demand(task is None or effect.sender == task.requester.agent_id, "a task has the wrong sender")
        elif isinstance(effect, BroadcastDelivery):
            demand(effect.sender in [agent.agent_id for agent in self.agent_before.values()], "an unknown sender")
            demand(hearer is not None and effect.sender != hearer.agent_id, "a broadcast is sent to its sender")
        elif isinstance(effect, StatusReply) and effect.sender is not None:
            demand(task is not None and task.assignee is not None, "a report on a task without a worker")
            demand(task is None or task.assignee is None or effect.sender == task.assignee.agent_id, "a wrong reporter")
        elif isinstance(effect, TaskOutcome) and effect.sender is not None:
            by = task.assignee if task is not None else None
            demand(by is not None and effect.sender == by.agent_id, "a result has the wrong sender")

    def check_settled(self, settled: TaskOutcome) -> int:
        task = self.task_of(settled)
        demand(task is not None, "an outcome of a task that the hub does not know")
        assert task is not None
        demand(settled.state == task.state and task.state in FINAL_STATES, "an outcome has the wrong state")
        self.told[task.sequence] += 1
        demand(self.told[task.sequence] <= 1 + self.asked[task.sequence], "an outcome is delivered too often")
        return task.sequence

    def check_states(self, told_now: set[int]) -> None:
        """Check that final states do not change, and that the hub delivers outcomes to online requesters."""
        records = {task.sequence: task for task in self.records()}
        demand(len(records) == len(self.records()), "a task is listed twice")
        for sequence, (task, state, is_kept) in self.known.items():
            demand(task.state is state or state not in FINAL_STATES, f"{state} was final, but is {task.state} now")
            demand(sequence in records or task.state in FINAL_STATES, "an open task was purged")
            demand(is_kept or sequence not in records, "a purged task is kept again")
        for sequence, task in {**{sequence: one[0] for sequence, one in self.known.items()}, **records}.items():
            state = self.known[sequence][1] if sequence in self.known else TaskState.PENDING
            if task.state in FINAL_STATES and state not in FINAL_STATES and task.requester.connection is not None:
                demand(sequence in told_now, f"{task.task_id} has ended without an outcome for its requester")
            self.known[sequence] = task, task.state, sequence in records

    def check_counters(self) -> None:
        hub = self.harness.hub
        records = self.records()
        counted = collections.Counter(task.state for task in records)
        demand(hub.tasks.counts == {state: counted[state] for state in TaskState}, f"the hub counts {hub.tasks.counts}")
        demand(min(hub.tasks.pending_count, *hub.tasks.ended.values()) >= 0, "a counter is negative")
        running = collections.Counter(one.request.capability for one in records if one.state is TaskState.IN_PROGRESS)
        demand(hub.tasks.running == running, f"the hub counts {hub.tasks.running} in progress")
        demand(hub.tasks.bytes == sum(task.bytes for task in records), "the bytes of records are counted wrong")
        demand(
            hub.tasks.ended_bytes
            == sum(task.bytes for task in (*hub.tasks.delivered.values(), *hub.tasks.undelivered.values())),
            "the bytes of ended ones are counted wrong",
        )
        demand(all(task.bytes > 0 for task in records), "a record has no size")
        told = collections.Counter(task.requester for task in hub.tasks.delivered.values())
        demand(
            all(agent.delivered == told[agent] for agent in self.agents().values()),
            "delivered outcomes are counted wrong",
        )


# The invariants of the state machine that need only the hub's own records.
HUB_INVARIANTS: list[Callable[[Any], None]] = [
    HubMachine.agents_hold_what_the_records_say,
    HubMachine.pools_agree_with_the_agents,
    HubMachine.queues_agree_with_the_pending_tasks,
    HubMachine.no_task_waits_while_an_agent_is_free_for_it,
    HubMachine.no_child_outlives_its_parent,
    HubMachine.deadlines_are_those_of_tasks_connections_and_disconnected_agents,
]


def check_sequence(case: tuple[dict[str, Any], list[tuple[Any, ...]]]) -> None:
    """Run one story to its end."""
    options, steps = case
    with listening() as errors, no_input_may_stop_the_hub():
        story = Story(options)
        for step in steps:
            story.step(*step)
        story.leave()
        demand(not errors, f"{errors}")


# ============================================================================================
# The engines
# ============================================================================================


class Target(NamedTuple):
    make: Callable[[Random], Any]
    check: Callable[[Any], None]


TARGETS = {
    "decode": Target(lambda rng: document(rng, rng.choice([FROM_AGENT, FROM_HUB])), check_decode),
    "bytes": Target(wire, check_bytes),
    "sequences": Target(story, check_sequence),
}
SHRINK_S = 60.0  # Time limit for shrinking a finding.
PROGRESS_S = 10.0


def case_of(target: str, seed: int) -> Any:
    """Return the case of a seed, which is the same on every machine."""
    return TARGETS[target].make(Random(seed))


def check(target: str, case: Any) -> None:
    """Replay one case. Raises its violation."""
    TARGETS[target].check(case)


def failure(target: str, case: Any) -> BaseException | None:
    try:
        check(target, case)
    except Exception as error:
        return error
    return None


def smaller(value: Any) -> Iterator[Any]:
    """Yield smaller variants of a case, with one part removed, the largest parts first."""
    if isinstance(value, list | bytes):
        size = len(value)
        while size > 1:
            size = size // 2
            for start in range(0, len(value), size):
                yield value[:start] + value[start + size :]
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if isinstance(item, list | tuple | bytes):
                for less in smaller(item):
                    yield value[:index] + type(value)([less]) + value[index + 1 :]


def smallest(target: str, case: Any, error: BaseException) -> tuple[Any, BaseException]:
    """Shrink a case as long as it fails in the same way, within a time limit."""

    def kind(error: BaseException) -> tuple[type, str]:
        return type(error), re.sub(r"\d+|b['\"].*", "", str(error))[:40]

    last = time.monotonic() + SHRINK_S
    is_smallest = False
    while not is_smallest:
        is_smallest = True
        for less in smaller(case):
            if time.monotonic() > last:
                break
            again = failure(target, less)
            if again is not None and kind(again) == kind(error):
                case, error, is_smallest = less, again, False
                break
    return case, error


class Run:
    """A run of one target until its time is over or a case fails."""

    def __init__(self, target: str, seconds: float) -> None:
        self.target = target
        self.seconds = seconds
        self.started = self.spoke = time.monotonic()
        self.cases = 0
        self.failing: tuple[Any, BaseException] | None = None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def is_over(self) -> bool:
        return self.failing is not None or self.elapsed >= self.seconds

    def one(self, case: Any) -> None:
        self.cases += 1
        error = failure(self.target, case)
        if error is not None:
            self.failing = smallest(self.target, case, error)
        elif time.monotonic() > self.spoke + PROGRESS_S:
            self.spoke = time.monotonic()
            rate = self.cases / self.elapsed
            progress = f"{self.cases} cases, {rate:.0f} per second, {self.elapsed:.0f} of {self.seconds:g} s"
            print(f"{self.target}: {progress}", file=sys.stderr, flush=True)

    def report(self) -> int:
        """Print the result; return the number of findings."""
        found = "nothing found" if self.failing is None else "1 finding"
        print(f"{self.target}: {self.cases} cases in {self.elapsed:.0f} s, {found}")
        if self.failing is not None:
            case, error = self.failing
            print(f"  {type(error).__name__}: {error}")
            print(f"  from tests.fuzz import check; check({self.target!r}, {case!r})")
        sys.stdout.flush()
        return 0 if self.failing is None else 1


def run_seeds(target: str, seconds: float, seed: int) -> Run:
    """Check the cases of consecutive seeds until the time is over or one fails."""
    run = Run(target, seconds)
    for number in itertools.count(seed):
        run.one(case_of(target, number))
        if run.is_over:
            break
    return run


def run_atheris(target: str, seconds: float, seed: int) -> None:
    """Let libFuzzer choose the input by coverage. It never returns: the process exits with the result."""
    import atheris

    instrument(atheris)
    run = Run(target, seconds)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))

    def one(raw: bytes) -> None:
        run.one(raw if target == "decode" else wire_of(raw))
        if run.is_over:
            shutil.rmtree(folder)
            os._exit(run.report())

    words = {word for message in FROM_AGENT + FROM_HUB for word in re.findall(r'"\w+"', json.dumps(message))}
    escaped = (word.replace('"', '\\"') for word in sorted(words))
    (folder / "words").write_text("".join(f'"{word}"\n' for word in escaped), encoding="ascii")
    (folder / "corpus").mkdir()
    for number, message in enumerate(FROM_AGENT + FROM_HUB):
        (folder / "corpus" / f"{number}").write_bytes(json.dumps(message).encode())
    options = [f"-seed={seed + 1}", f"-dict={folder / 'words'}", "-max_len=8192", "-timeout=60", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/", str(folder / "corpus")], one)
    atheris.Fuzz()


def wire_of(raw: bytes) -> list[tuple[Any, ...]]:
    """Return the steps encoded in libFuzzer's input: lines with a message, a frame's head or raw bytes each."""
    steps: list[tuple[Any, ...]] = [("open",), ("data", 0, OPENING)]
    for line in raw.split(b"\n"):
        kind, rest = line[:1], line[1:]
        if kind == b"!":
            steps.append(("data", 0, rest))
        elif kind == b"#" and rest:
            steps.append(("data", 0, frame(rest[1:], rest[0] & 15, fin=rest[0] < 128)))
        else:
            steps.append(("data", 0, frame(line)))
    return steps


def instrument(atheris: Any) -> None:
    """Instrument the hub and the WebSocket library for libFuzzer's coverage."""
    modules = [agenthub, *(module for name, module in sorted(sys.modules.items()) if name.startswith("websockets."))]
    for module in modules:
        scopes = [module, *(one for one in vars(module).values() if isinstance(one, type))]
        for scope in scopes:
            for function in list(vars(scope).values()):
                if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                    atheris.instrument_func(function)


def natural(number: str) -> int:
    if not number.isdecimal():
        raise argparse.ArgumentTypeError("must be a number from 0 on")
    return int(number)


def main(argv: list[str] | None = None) -> int:
    """Run the targets on the command line; return 1 if one found a bug."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Try to break the hub with what comes in."
    )
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together (default 60)")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="the first of the seeds (default 0)")
    parser.add_argument("--engine", choices=["seeds", "atheris"], default="seeds")
    args = parser.parse_args(argv)
    check_decode(b"{}")  # The first use compiles the decoders.
    targets = list(TARGETS) if args.target == "all" else [args.target]
    seconds = args.seconds / len(targets)
    findings = 0
    for target in targets:
        if args.engine == "seeds" or target == "sequences":
            findings += run_seeds(target, seconds, args.seed).report()
        elif args.target == "all":  # libFuzzer needs a separate process.
            options = ["--engine", "atheris", "--target", target, "--seconds", str(seconds), "--seed", str(args.seed)]
            findings += subprocess.run([sys.executable, "-m", "tests.fuzz", *options], check=False).returncode != 0
        else:
            run_atheris(target, seconds, args.seed)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
