"""Check a client of the hub, in any language: `python -m clients.conformance --client 'node worker.mjs'`.

The runner plays the hub. For each check it starts the command with AGENTHUB_URL set to a hub of its own, which
the command must join as an agent with these capabilities:

    echo    returns its input
    sleep   returns its input, a number of seconds, after so long
    fail    fails with the code `own`
    relay   delegates a task for the capability `elsewhere` with its own input, and returns what that returns

Checks of questions and pieces are skipped for a client that does not offer the capabilities for them:

    ask     asks its requester each of the texts in its input, one after the other, and returns the answers
    answer  like relay, but answers each question of that task with the question's own text
    stream  sends each item of its input, a list, as a piece (but not null), and returns the input

It prints a line for each check, and exits with 0 if the client did all of them right that were not skipped.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import os
import shlex
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, NamedTuple

Message = dict[str, Any]

JOIN_S = 15.0  # For the command to start and register.
WAIT_S = 8.0  # For anything else that must happen.
QUIET_S = 0.6  # In which something must not happen: longer than the pause before the first attempt to reconnect.
HEARTBEAT_S = 0.3  # In the checks about heartbeats.
PARALLEL = 4  # Checks at a time.
MESSAGE_BYTES_MAX = 1_048_576
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
CAPABILITIES = {"echo", "sleep", "fail", "relay"}
FEATURES = ["ask", "stream", "trace"]
VALUES: list[Any] = [
    None,
    True,
    0,
    -1.5,
    "",
    "Grüße 世界 😀 \u2028",
    [],
    [None, [{}]],
    {"a": {"b": [1, "2"]}},
    "x" * 70_000,
]


class Wrong(Exception):
    """The client did something else than it must."""


class Skipped(Exception):
    """The client does not claim to do this."""


def expect(condition: object, what: str) -> None:
    if not condition:
        raise Wrong(what)


class Line:
    """One connection of the client: a WebSocket with just what the checks need."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.pongs: list[bytes] = []
        self.skipped: list[Message] = []

    async def handshake(self, status: int = 101) -> None:
        """Read the request, and answer it."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        headers = dict(line.split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
        key = {name.strip().lower(): value.strip() for name, value in headers.items()}[b"sec-websocket-key"]
        accept = base64.b64encode(hashlib.sha1(key + GUID).digest())
        upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: " + accept
        other = b"Content-Length: 0\r\nConnection: close"
        self._writer.write(b"HTTP/1.1 %d -\r\n%b\r\n\r\n" % (status, upgrade if status == 101 else other))

    async def send(self, message: Message, parts: int = 1) -> None:
        """Send a message, in so many fragments."""
        raw = json.dumps(message).encode()
        size = -(-len(raw) // parts)
        for part in range(parts):
            opcode = (TEXT if part == 0 else 0) | (0x80 if part == parts - 1 else 0)
            self._frame(opcode, raw[part * size : (part + 1) * size])
        await self._writer.drain()

    def ping(self, payload: bytes) -> None:
        self._frame(0x80 | PING, payload)

    def close(self, code: int) -> None:
        """Close as a hub does: with a close frame, and then the connection."""
        self._frame(0x80 | CLOSE, struct.pack("!H", code))
        self._writer.close()

    def cut(self) -> None:
        """Lose the connection without a word."""
        self._writer.transport.abort()

    def _frame(self, first: int, payload: bytes) -> None:
        if len(payload) < 126:
            header = struct.pack("!BB", first, len(payload))
        elif len(payload) < 65_536:
            header = struct.pack("!BBH", first, 126, len(payload))
        else:
            header = struct.pack("!BBQ", first, 127, len(payload))
        self._writer.write(header + payload)

    async def receive(self) -> Message:
        """Return the next message. Raises Wrong for a close and for what is none, IncompleteReadError at the end."""
        whole = b""
        while True:
            first, second = await self._reader.readexactly(2)
            expect(second & 0x80, "a client must mask its frames")
            length = second & 127
            if length >= 126:
                length = int.from_bytes(await self._reader.readexactly(2 if length == 126 else 8), "big")
            expect(length <= MESSAGE_BYTES_MAX, "a message is longer than max_bytes")
            mask = await self._reader.readexactly(4)
            masked = await self._reader.readexactly(length)
            payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(masked))
            if first & 15 == PONG:
                self.pongs.append(payload)
            elif first & 15 == PING:
                self._frame(0x80 | PONG, payload)
            elif first & 15 == CLOSE:
                raise asyncio.IncompleteReadError(b"", 1)
            else:
                whole += payload
                if first & 0x80:
                    message: Message = json.loads(whole)
                    return message

    async def until(self, wanted: Callable[[Message], object], what: str) -> Message:
        """Return the first message that is wanted, answering heartbeats; keep the others in `skipped`."""
        for index, message in enumerate(self.skipped):
            if wanted(message):
                return self.skipped.pop(index)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WAIT_S):
                while True:
                    message = await self.receive()
                    if message.get("type") == "heartbeat" and "id" in message:
                        await self.send({"type": "heartbeat_ack", "reply_to": message["id"]})
                    if wanted(message):
                        return message
                    self.skipped.append(message)
        raise Wrong(f"no {what} within {WAIT_S:g} s; it sent {[one.get('type') for one in self.skipped]}")

    async def result(self, task_id: str, *, is_acknowledged: bool = True) -> Message:
        """Return the result of a task, and acknowledge it."""
        found = await self.until(lambda one: one.get("type") == "result" and one.get("task_id") == task_id, "result")
        expect(isinstance(found.get("id"), str), "a result needs an id, to be acknowledged")
        if is_acknowledged:
            await self.send(acknowledgement(found, "completed" if found.get("success") else "failed"))
        return found

    async def no_result(self, task_id: str) -> None:
        """Assert that the client is quiet about a task."""
        await asyncio.sleep(QUIET_S)
        probe = {**delegation("probe"), "input": "probe"}
        await self.send(probe)
        await self.result("probe")
        about = [one for one in self.skipped if one.get("type") == "result" and one.get("task_id") == task_id]
        expect(not about, f"a result of {task_id}, which must not come")


def acknowledgement(request: Message, state: str) -> Message:
    return {"type": "status", "reply_to": request["id"], "task_id": request["task_id"], "state": state, "attempt": 1}


def delegation(task_id: str, capability: str = "echo", given: Any = None, **more: Any) -> Message:
    """Return a task as a hub assigns it."""
    terms = {"ttl": 60.0, "priority": 0, "max_retries": 0, "parent_id": None, "attempt": 1}
    ids = {"task_id": task_id, "sender": "checker-1", "agent_id": "checked-1"}
    return {"type": "delegate", **ids, "capability": capability, "input": given, **terms, **more}


class Play:
    """A hub of one client, and the process of that client."""

    def __init__(self) -> None:
        self.lines: asyncio.Queue[Line] = asyncio.Queue()
        self.open: list[Line] = []  # Those that are cut at the end.
        self.url = ""
        self.statuses: list[int] = []  # With which the next handshakes are answered.
        self.agent_id, self.resume = "checked-1", "secret-1"
        self.heartbeat_s = 30.0
        self.registration: Message = {}
        self.process: asyncio.subprocess.Process | None = None

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = Line(reader, writer)
        self.open.append(line)
        status = self.statuses.pop() if self.statuses else 101
        try:
            await line.handshake(status)
        except (asyncio.IncompleteReadError, KeyError, ConnectionError):
            return  # It is no WebSocket, such as the probe of a port.
        if status == 101:
            self.lines.put_nowait(line)
        else:
            writer.close()

    async def next_line(self, within_s: float | None = None) -> Line:
        """Return the client's next connection, within WAIT_S by default."""
        within_s = WAIT_S if within_s is None else within_s
        try:
            async with asyncio.timeout(within_s):
                return await self.lines.get()
        except TimeoutError:
            raise Wrong(f"it did not connect within {within_s:g} s") from None

    async def join(self, tasks: Iterable[Message] = (), within_s: float | None = None, **more: Any) -> Line:
        """Return the next connection, on which the client has registered."""
        line = await self.next_line(within_s)
        message = await line.until(lambda one: one.get("type") == "register", "register")
        self.registration = message
        reply = {"type": "register", "reply_to": message.get("id"), "agent_id": self.agent_id, "resume": self.resume}
        limits = {"heartbeat_s": self.heartbeat_s, "max_bytes": MESSAGE_BYTES_MAX, "tasks": list(tasks)}
        await line.send({**reply, **limits, "features": FEATURES, **more})
        return line

    def needs(self, capability: str) -> None:
        """Skip the check if the client does not offer a capability."""
        if capability not in self.offered:
            raise Skipped(f"it does not offer {capability}")

    @property
    def offered(self) -> set[str]:
        return {one["name"] if isinstance(one, dict) else one for one in self.registration.get("capabilities", [])}

    async def no_line(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        expect(self.lines.empty(), "it connected again")


CHECKS: dict[str, Callable[[Play, Line], Awaitable[None]]] = {}


def check(function: Callable[[Play, Line], Awaitable[None]]) -> Callable[[Play, Line], Awaitable[None]]:
    """Add a check; its docstring says what the client must do. It begins when the client has registered."""
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


# Joining


@check
async def check_register(play: Play, line: Line) -> None:
    """registers first, with an id and its capabilities"""
    expect(not line.skipped, "another message came before register")
    registration = play.registration
    expect(isinstance(registration.get("id"), str), "register has no id, a string")
    expect(isinstance(registration.get("name"), str) and registration["name"], "register has no name")
    expect(play.offered >= CAPABILITIES, f"capabilities: {sorted(play.offered)}, must have {sorted(CAPABILITIES)}")
    expect("resume" not in registration or registration["resume"] is None, "it resumes a session that it cannot have")


@check
async def check_unknown(play: Play, line: Line) -> None:
    """ignores unknown fields, unknown types, and replies to nothing"""
    await line.send({"type": "weather", "forecast": [1, {"a": None}]})
    await line.send({"type": "status", "reply_to": "no-such-request", "future": True})
    await line.send({"type": "error", "code": "unheard_of", "message": "about nothing", "future": [1]})
    await line.send({**delegation("t", given=1), "future": {"a": [1]}, "trace": {"traceparent": "x"}})
    expect((await line.result("t")).get("output") == 1, "another output than its input")


@check
async def check_ping(play: Play, line: Line) -> None:
    """answers a ping, and reads a message in fragments"""
    line.ping(b"are you there")
    await line.send(delegation("t", given="Grüße 世界" * 100), parts=7)
    expect((await line.result("t")).get("output") == "Grüße 世界" * 100, "another output than its input")
    expect(line.pongs == [b"are you there"], "no pong")


# Working


@check
async def check_echo(play: Play, line: Line) -> None:
    """returns any JSON, with task_id, attempt and success"""
    for number, value in enumerate(VALUES):
        await line.send(delegation(f"t-{number}", given=value, attempt=number + 1))
        result = await line.result(f"t-{number}")
        expect(result.get("success") is True, "success is not true")
        expect(result.get("attempt", number + 1) == number + 1, f"attempt {result.get('attempt')}, not {number + 1}")
        expect(result.get("output") == value, f"output {str(result.get('output'))[:50]}, not {str(value)[:50]}")


@check
async def check_order(play: Play, line: Line) -> None:
    """goes on reading while it works"""
    await line.send(delegation("slow", "sleep", 1.0))
    await line.send(delegation("quick"))
    await line.result("quick")
    slow = [one for one in line.skipped if one.get("task_id") == "slow" and one.get("type") == "result"]
    expect(not slow, "the slow task ended first")
    await line.result("slow")


@check
async def check_twice(play: Play, line: Line) -> None:
    """works once on a task that is assigned twice"""
    await line.send(delegation("t", "sleep", 0.3))
    await line.send(delegation("t", "sleep", 0.3))
    await line.result("t")
    await line.no_result("t")


@check
async def check_failure(play: Play, line: Line) -> None:
    """reports a failure with its code"""
    await line.send(delegation("t", "fail"))
    result = await line.result("t")
    error = result.get("error")
    expect(result.get("success") is False, "success is not false")
    expect(isinstance(error, dict) and error.get("code") == "own", f"error {error}, must have the code own")


@check
async def check_no_handler(play: Play, line: Line) -> None:
    """fails a task for a capability that it does not have"""
    await line.send(delegation("t", "no-such-capability"))
    expect((await line.result("t")).get("success") is False, "success is not false")


@check
async def check_stop(play: Play, line: Line) -> None:
    """sends no result of a task that has ended without it"""
    await line.send(delegation("t", "sleep", 0.5))
    await line.send({"type": "status", "task_id": "t", "state": "timeout", "attempt": 1})
    await line.no_result("t")


@check
async def check_rejected(play: Play, line: Line) -> None:
    """discards a result that is rejected"""
    await line.send(delegation("t"))
    result = await line.result("t", is_acknowledged=False)
    error = {"type": "error", "reply_to": result["id"], "code": "task_over", "message": "it has ended", "task_id": "t"}
    await line.send(error)
    line.cut()
    line = await play.join([{"task_id": "other", "attempt": 1}])
    await line.result("other")
    await line.no_result("t")


# Sessions


@check
async def check_heartbeat(play: Play, line: Line) -> None:
    """sends heartbeats at the interval of the hub"""
    for _ in range(3):
        await line.until(lambda one: one.get("type") == "heartbeat", "heartbeat")


@check
async def check_silence(play: Play, line: Line) -> None:
    """leaves a hub that is silent for three intervals, and resumes"""
    await play.join()
    expect(play.registration.get("agent_id") == "checked-1", "it did not resume its session")


@check
async def check_resume(play: Play, line: Line) -> None:
    """resumes its session after a lost connection"""
    line.cut()
    line = await play.join()
    expect(play.registration.get("agent_id") == "checked-1", "register has another agent_id")
    expect(play.registration.get("resume") == "secret-1", "register has another resume")
    await line.send(delegation("t"))
    await line.result("t")


@check
async def check_renewed(play: Play, line: Line) -> None:
    """takes the agent_id and the secret of a hub that has forgotten it"""
    play.agent_id, play.resume = "checked-2", "secret-2"
    line.cut()
    line = await play.join()
    line.cut()
    await play.join()
    expect(play.registration.get("agent_id") == "checked-2", "register has the former agent_id")
    expect(play.registration.get("resume") == "secret-2", "register has the former secret")


@check
async def check_restart(play: Play, line: Line) -> None:
    """reconnects after a close with 1001, and after a 503"""
    play.statuses = [503]
    line.close(1001)
    await play.join()


@check
async def check_retained(play: Play, line: Line) -> None:
    """sends a result again that was not acknowledged"""
    await line.send(delegation("t", given=7))
    first = await line.result("t", is_acknowledged=False)
    line.cut()
    line = await play.join([{"task_id": "t", "attempt": 1}])
    again = await line.result("t")
    expect((again.get("success"), again.get("output")) == (first.get("success"), 7), "another result than before")
    line.cut()
    line = await play.join()
    await line.no_result("t")


@check
async def check_dropped(play: Play, line: Line) -> None:
    """drops a result that the hub does not wait for"""
    await line.send(delegation("t"))
    await line.result("t", is_acknowledged=False)
    line.cut()
    line = await play.join()
    await line.no_result("t")


@check
async def check_continues(play: Play, line: Line) -> None:
    """works on without a connection"""
    await line.send(delegation("t", "sleep", 1.0))
    await line.send(delegation("first"))
    await line.result("first")
    line.cut()
    line = await play.join([{"task_id": "t", "attempt": 1}])
    expect((await line.result("t")).get("success") is True, "success is not true")


@check
async def check_unassigned(play: Play, line: Line) -> None:
    """stops a task that the hub no longer assigns to it"""
    await line.send(delegation("t", "sleep", 0.8))
    await line.send(delegation("first"))
    await line.result("first")
    line.cut()
    line = await play.join()
    await line.no_result("t")


@check
async def check_agent_lost(play: Play, line: Line) -> None:
    """reports a task that it does not have as agent_lost"""
    line.cut()
    line = await play.join([{"task_id": "unknown", "attempt": 3}])
    result = await line.result("unknown")
    expect((result.get("error") or {}).get("code") == "agent_lost", f"error {result.get('error')}")
    expect(result.get("attempt", 3) == 3, f"attempt {result.get('attempt')}, not 3")


@check
async def check_replaced(play: Play, line: Line) -> None:
    """stays away after a close with 4000"""
    line.close(4000)
    await play.no_line(3 * QUIET_S)


@check
async def check_not_allowed(play: Play, line: Line) -> None:
    """stays away after a close with 1008"""
    line.close(1008)
    await play.no_line(3 * QUIET_S)


# Delegating


async def relayed(line: Line, given: Any = 7) -> Message:
    """Return the task that the client delegates when it works on `relay`."""
    found = await line.until(lambda one: one.get("type") == "delegate", "delegate")
    expect(isinstance(found.get("id"), str), "delegate has no id, a string")
    expect(isinstance(found.get("task_id"), str) and found["task_id"], "delegate has no task_id")
    expect(found.get("capability") == "elsewhere", f"capability {found.get('capability')}, not elsewhere")
    expect(found.get("input") == given, f"input {found.get('input')}, not {given}")
    return found


def outcome(task: Message, output: Any) -> Message:
    base = {"type": "result", "task_id": task["task_id"], "sender": "other-1", "success": True, "state": "completed"}
    return {**base, "output": output, "error": None, "attempt": 1}


def content(task: Message) -> Message:
    return {name: value for name, value in task.items() if name != "id" and value is not None}


@check
async def check_delegate(play: Play, line: Line) -> None:
    """delegates a task, and takes its result"""
    await line.send(delegation("t", "relay", 7))
    task = await relayed(line)
    await line.send(acknowledgement(task, "in_progress"))
    report = {"type": "status", "task_id": task["task_id"], "state": "in_progress", "attempt": 1, "sender": "other-1"}
    await line.send({**report, "seq": 1, "progress": 0.5, "detail": "half"})
    await line.send(outcome(task, [8]))
    expect((await line.result("t")).get("output") == [8], "another output")


@check
async def check_at_once(play: Play, line: Line) -> None:
    """takes a result that follows right behind the acknowledgement"""
    await line.send(delegation("t", "relay", 7))
    task = await relayed(line)
    await asyncio.gather(line.send(acknowledgement(task, "completed")), line.send(outcome(task, 8)))
    expect((await line.result("t")).get("output") == 8, "another output")


@check
async def check_refused(play: Play, line: Line) -> None:
    """fails if the hub rejects its task"""
    await line.send(delegation("t", "relay", 7))
    task = await relayed(line)
    error = {"code": "no_agent", "message": "no online agent offers it", "task_id": task["task_id"]}
    await line.send({"type": "error", "reply_to": task["id"], **error})
    expect((await line.result("t")).get("success") is False, "success is not false")


@check
async def check_overloaded(play: Play, line: Line) -> None:
    """delegates again if the hub is overloaded"""
    await line.send(delegation("t", "relay", 7))
    task = await relayed(line)
    error = {"code": "overloaded", "message": "later", "task_id": task["task_id"]}
    await line.send({"type": "error", "reply_to": task["id"], **error})
    task = await relayed(line)
    await line.send(acknowledgement(task, "in_progress"))
    await line.send(outcome(task, 8))
    expect((await line.result("t")).get("output") == 8, "another output")


@check
async def check_unacknowledged(play: Play, line: Line) -> None:
    """delegates the same task again if it was not acknowledged"""
    await line.send(delegation("t", "relay", 7))
    task = await relayed(line)
    line.cut()
    line = await play.join([{"task_id": "t", "attempt": 1}])
    again = await relayed(line)
    expect(content(again) == content(task), f"another content: {content(again)}, not {content(task)}")
    await line.send(acknowledgement(again, "in_progress"))
    await line.send(outcome(again, 8))
    expect((await line.result("t")).get("output") == 8, "another output")


@check
async def check_missed(play: Play, line: Line) -> None:
    """asks for the status of its tasks after a reconnect"""
    await line.send(delegation("t", "relay", 7))
    task = await relayed(line)
    await line.send(acknowledgement(task, "in_progress"))
    await asyncio.sleep(0.1)
    line.cut()
    line = await play.join([{"task_id": "t", "attempt": 1}])
    asked = await line.until(
        lambda one: one.get("type") == "status" and one.get("task_id") == task["task_id"], "status"
    )
    reply = {"type": "status", "reply_to": asked.get("id"), "task_id": task["task_id"], "state": "completed"}
    more = {"requester": play.agent_id, "agent_id": "other-1", "capability": "elsewhere", "attempt": 1, "output": 8}
    await line.send({**reply, **more})
    expect((await line.result("t")).get("output") == 8, "another output")


# Questions


def news(task: Message, **fields: Any) -> Message:
    return {"type": "status", "task_id": task["task_id"], "state": "in_progress", "attempt": 1, **fields}


async def asked(line: Line, text: str = "which?") -> Message:
    """Return the next question of the client."""
    found = await line.until(lambda one: one.get("type") == "status" and one.get("question"), "question")
    expect(isinstance(found.get("id"), str), "a question needs an id, to be acknowledged and repeated")
    expect(found["question"].get("text") == text, f"question {found['question']}, must have the text {text}")
    return found


def answer(question: Message, ask: int, value: Any) -> Message:
    return news(question, sender="checker-1", ask=ask, answer=value)


@check
async def check_ask(play: Play, line: Line) -> None:
    """asks its requester, and takes the answers"""
    play.needs("ask")
    await line.send(delegation("t", "ask", ["main?", "sure?"], answers=True))
    for ask, (text, value) in enumerate([("main?", {"branch": "main"}), ("sure?", None)], 1):
        question = await asked(line, text)
        await line.send(news(question, reply_to=question["id"], ask=ask))
        await line.send(answer(question, ask, value))
    expect((await line.result("t")).get("output") == [{"branch": "main"}, None], "other answers")


@check
async def check_ask_again(play: Play, line: Line) -> None:
    """asks again with the same id if its question was not acknowledged"""
    play.needs("ask")
    await line.send(delegation("t", "ask", ["which?"], answers=True))
    first = await asked(line)
    line.cut()
    line = await play.join([{"task_id": "t", "attempt": 1}])
    again = await asked(line)
    expect(again["id"] == first["id"], "it asked again with another id, which is another question")
    await line.send(news(again, reply_to=again["id"], ask=1))
    await line.send(answer(again, 1, "main"))
    expect((await line.result("t")).get("output") == ["main"], "another answer")


@check
async def check_answer_first(play: Play, line: Line) -> None:
    """takes an answer that is redelivered before its question is acknowledged"""
    play.needs("ask")
    await line.send(delegation("t", "ask", ["which?"], answers=True))
    first = await asked(line)
    line.cut()
    line = await play.join([{"task_id": "t", "attempt": 1}])
    await line.send(answer(first, 1, "main"))
    again = await asked(line)
    await line.send(news(again, reply_to=again["id"], ask=1))
    expect((await line.result("t")).get("output") == ["main"], "another answer")


@check
async def check_answer_missed(play: Play, line: Line) -> None:
    """takes the answer to an acknowledged question after a reconnect"""
    play.needs("ask")
    await line.send(delegation("t", "ask", ["which?"], answers=True))
    question = await asked(line)
    await line.send(news(question, reply_to=question["id"], ask=1))
    await line.send(delegation("other"))
    await line.result("other")
    line.cut()
    line = await play.join([{"task_id": "t", "attempt": 1}])
    await line.send(answer(question, 1, "main"))
    expect((await line.result("t")).get("output") == ["main"], "another answer")


@check
async def check_answer_twice(play: Play, line: Line) -> None:
    """takes each answer for its own question, even if one comes twice"""
    play.needs("ask")
    await line.send(delegation("t", "ask", ["first?", "second?"], answers=True))
    for ask, text in enumerate(["first?", "second?"], 1):
        question = await asked(line, text)
        await line.send(answer(question, 1, "one"))
        await line.send(news(question, reply_to=question["id"], ask=ask))
    await line.send(answer(question, 2, "two"))
    expect((await line.result("t")).get("output") == ["one", "two"], "an answer to another question")


@check
async def check_no_answers(play: Play, line: Line) -> None:
    """fails a task whose requester cannot be asked, instead of waiting"""
    play.needs("ask")

    def is_question_or_result(message: Message) -> bool:
        return message.get("task_id") == "t" and bool(message.get("type") == "result" or message.get("question"))

    await line.send(delegation("t", "ask", ["which?"], answers=False))
    found = await line.until(is_question_or_result, "result")
    if found["type"] == "result":
        line.skipped.append(found)
    else:
        error = {"type": "error", "reply_to": found.get("id"), "code": "no_answers", "task_id": "t"}
        await line.send({**error, "message": "the requester of this task cannot be asked"})
    expect((await line.result("t")).get("success") is False, "success is not false")


@check
async def check_stop_asking(play: Play, line: Line) -> None:
    """sends no result of a task that has ended while its question waited"""
    play.needs("ask")
    await line.send(delegation("t", "ask", ["which?"], answers=True))
    question = await asked(line)
    await line.send(news(question, reply_to=question["id"], ask=1))
    await line.send({"type": "status", "task_id": "t", "state": "failed", "attempt": 1})
    await line.send(answer(question, 1, "main"))
    await line.no_result("t")


async def question_relayed(line: Line) -> Message:
    """Have the client delegate a task, and ask it something about that; return the task."""
    await line.send(delegation("t", "answer", 7))
    task = await relayed(line)
    expect(task.get("answers") is True, "delegate must say answers")
    await line.send(acknowledgement(task, "in_progress"))
    await line.send(news(task, sender="other-1", ask=1, question={"text": "which?"}))
    return task


async def given(line: Line, task: Message) -> Message:
    """Return the client's next answer."""
    found = await line.until(lambda one: one.get("task_id") == task["task_id"] and one.get("ask"), "answer")
    expect(isinstance(found.get("id"), str), "an answer needs an id, to be acknowledged")
    expect((found["ask"], found.get("answer")) == (1, "which?"), f"answer {found.get('answer')} to {found['ask']}")
    return found


@check
async def check_answer(play: Play, line: Line) -> None:
    """answers a question of its worker"""
    play.needs("answer")
    task = await question_relayed(line)
    await line.send(acknowledgement(await given(line, task), "in_progress"))
    await line.send(outcome(task, 8))
    expect((await line.result("t")).get("output") == 8, "another output")


@check
async def check_answer_again(play: Play, line: Line) -> None:
    """answers again if its answer was not acknowledged, and takes no_question for a yes"""
    play.needs("answer")
    task = await question_relayed(line)
    await given(line, task)
    line.cut()
    line = await play.join([{"task_id": "t", "attempt": 1}])
    again = await given(line, task)
    error = {"code": "no_question", "message": "it was answered before", "task_id": task["task_id"]}
    await line.send({"type": "error", "reply_to": again["id"], **error})
    await line.send(outcome(task, 8))
    expect((await line.result("t")).get("output") == 8, "another output")


# Pieces


def pieces_in(line: Line) -> list[Any]:
    return [one["piece"] for one in line.skipped if one.get("piece") is not None]


@check
async def check_stream(play: Play, line: Line) -> None:
    """sends pieces in order, and all of them as the output"""
    play.needs("stream")
    items = [{"line": number} for number in range(20)]
    await line.send(delegation("t", "stream", [*items, None]))
    expect((await line.result("t")).get("output") == [*items, None], "the output is not the whole")
    expect(pieces_in(line) == items, f"pieces {str(pieces_in(line))[:50]}, not {str(items)[:50]}")


@check
async def check_no_stream(play: Play, line: Line) -> None:
    """sends no pieces to a hub without that feature"""
    play.needs("stream")
    line.cut()
    line = await play.join(features=[])
    await line.send(delegation("t", "stream", [1, 2]))
    expect((await line.result("t")).get("output") == [1, 2], "the output is not the whole")
    expect(not pieces_in(line), "it sent a piece")


# Running them


class Verdict(NamedTuple):
    """What a check found: `fault` is empty if the client did it right, or if it was skipped."""

    name: str
    duty: str
    fault: str
    skipped: str = ""


async def run_check(name: str, command: str) -> Verdict:
    """Run a check with a process of the client of its own."""
    function = CHECKS[name]
    play = Play()
    play.heartbeat_s = HEARTBEAT_S if name in ("heartbeat", "silence") else 30.0
    fault = skipped = ""
    async with serving(play), running(play, command):
        try:
            line = await play.join(within_s=JOIN_S)
            await function(play, line)
        except Skipped as reason:
            skipped = str(reason)
        except (Wrong, json.JSONDecodeError) as wrong:
            fault = str(wrong)
        except (asyncio.IncompleteReadError, ConnectionError):
            fault = "it closed the connection"
    return Verdict(name, function.__doc__ or "", fault, skipped)


@contextlib.asynccontextmanager
async def serving(play: Play) -> AsyncIterator[None]:
    server = await asyncio.start_server(play.accept, "127.0.0.1", 0, limit=2 * MESSAGE_BYTES_MAX)
    play.url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield
    finally:
        server.close()
        for line in play.open:
            line.cut()
        await asyncio.sleep(0)  # A transport that was aborted is closed in the next step of the loop.


@contextlib.asynccontextmanager
async def running(play: Play, command: str) -> AsyncIterator[None]:
    environment = {**os.environ, "AGENTHUB_URL": play.url}
    environment.pop("AGENTHUB_TOKEN", None)
    process = await asyncio.create_subprocess_exec(
        *shlex.split(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        yield
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def run_checks(command: str, names: Iterable[str], parallel: int = PARALLEL) -> list[Verdict]:
    """Run checks, so many at a time; return their verdicts in order."""
    slots = asyncio.Semaphore(parallel)

    async def run(name: str) -> Verdict:
        async with slots:
            return await run_check(name, command)

    return await asyncio.gather(*map(run, names))


def table(verdicts: Iterable[Verdict]) -> str:
    """Return a line for each verdict, and the sum."""
    verdicts = list(verdicts)
    width = max(len(one.name) for one in verdicts)
    lines = [
        f"{'wrong' if one.fault else 'skip ' if one.skipped else 'right'}  {one.name:{width}}  "
        f"{one.duty}{': ' if one.fault or one.skipped else ''}{one.fault or one.skipped}"
        for one in verdicts
    ]
    skipped = sum(bool(one.skipped) for one in verdicts)
    right = sum(not one.fault and not one.skipped for one in verdicts)
    total = f"{right} of {len(verdicts) - skipped} right"
    return "\n".join([*lines, f"{total}, {skipped} skipped" if skipped else total])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m clients.conformance", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--client", required=True, metavar="COMMAND", help="the client's program, without a shell")
    parser.add_argument("--parallel", type=int, default=PARALLEL, metavar="N", help="checks at a time (default: 4)")
    parser.add_argument("check", nargs="*", help="names of checks; all by default")
    args = parser.parse_args(argv)
    if unknown := set(args.check) - set(CHECKS):
        parser.error(f"no such check: {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    try:
        verdicts = asyncio.run(run_checks(args.client, args.check or CHECKS, max(1, args.parallel)))
    except OSError as error:
        parser.error(f"the client cannot be started: {error}")
    print(table(verdicts))
    return 1 if any(one.fault for one in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
