"""Clients that put load on a real hub, and the ledger of the tasks among them: see tests/soak.py.

The clients speak the protocol by hand: a WebSocket made here is cheap enough for thousands of messages a second, can be
cut, can stop reading and send garbage, and shares no code, and so no misunderstanding, with the hub. Some are real
Agents. Clients do not see in which order the hub acts: a task is judged when it is over and all have entered what they
saw of it. A driver that calls the hub itself sees more, and uses tests/ledger.py.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import itertools
import json
import math
import random
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from agenthub import Agent, Disconnected, Refused, Task, TaskFailed, TaskTimeout
from tests.raw_websocket import BINARY, CLOSE, CONTINUATION, HANDSHAKE, PING, TEXT, frame, take_frames
from tests.support import WAIT_S

FINAL = ("completed", "failed", "timeout")
FLOOD_MESSAGES = 6000  # In about a second: more than the hub takes of one connection in that time.
WAITING_TASKS = 5000
CROWD = 4  # So many times WAITING_TASKS at once.
RESTART_NOTICED_S = 1.0  # After a restart of the hub, for clients to notice that they have lost their connections.
EARLY_S = 0.05  # How much too early a timeout may seem to come: timers and clocks have a resolution.
TOO_LATE = (
    "task_over",
    "stale_attempt",
    "not_assigned",
    "unknown_task",
)  # The codes with which a worker's message may be refused.
# Payloads that take more memory than their size says, if they are held as objects.
INPUT_SHAPES: list[Any] = [[{}] * 3000, [[1, 2, 3]] * 1000, {f"key-{n}": n for n in range(500)}, "\u00e9\u20ac" * 3000]
UNHEARD = "unheard"  # The id of a message whose sender is cut before the reply.


class Lost(ConnectionError):
    """The connection is gone."""


# The wire


class Wire(asyncio.Protocol):
    """A WebSocket to the hub. `on_lost` is called once with the close code, 1006 if there was none."""

    def __init__(self, on_message: Callable[[dict[str, Any]], None], on_lost: Callable[[int], None]) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost = asyncio.Event()
        self.writable = asyncio.Event()
        self.writable.set()
        self.sent_at = 0.0
        self._on_message, self._on_lost = on_message, on_lost
        self._waiting: dict[str, Callable[[dict[str, Any] | None], None]] = {}
        self._ids = itertools.count(1)
        self._buffer = bytearray()
        self._close_code = 1006

    @classmethod
    async def open(
        cls,
        port: int,
        on_message: Callable[[dict[str, Any]], None],
        on_lost: Callable[[int], None],
        receive_bytes: int | None = None,
    ) -> Wire:
        """Connect. Raises Lost if the hub does not take it. `receive_bytes` makes the buffer of the socket small."""
        loop = asyncio.get_running_loop()
        one = socket.socket()
        one.setblocking(False)
        if receive_bytes is not None:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        try:
            await loop.sock_connect(one, ("127.0.0.1", port))
        except BaseException:
            one.close()
            raise
        async with asyncio.timeout(WAIT_S):
            _, wire = await loop.create_connection(lambda: cls(on_message, on_lost), sock=one)
            await wire.opened
        return wire

    # asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(HANDSHAKE)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self.opened.done():
            head, found, rest = self._buffer.partition(b"\r\n\r\n")
            if not found:
                return
            self._buffer = rest
            if head.split()[1] == b"101":
                self.opened.set_result(None)
            else:
                self.opened.set_exception(Lost(f"no WebSocket: {bytes(head)!r}"))
                return
        for opcode, payload, _ in take_frames(self._buffer):
            if opcode == TEXT:
                self._receive(json.loads(payload))
            elif opcode == CLOSE:
                self._close_code = int.from_bytes(payload[:2], "big")
                self.transport.write(frame(payload[:2], CLOSE))
                self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(Lost("no WebSocket"))
        self.lost.set()
        self.writable.set()
        waiting, self._waiting = self._waiting, {}
        for then in waiting.values():
            then(None)
        self._on_lost(self._close_code)

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def _receive(self, message: dict[str, Any]) -> None:
        then = self._waiting.pop(message.get("reply_to") or "", None)
        if then is not None:
            then(message)
        else:
            self._on_message(message)

    # Messages

    def send(self, **message: Any) -> None:
        """Send, unless the connection is gone or going."""
        self.sent_at = time.monotonic()
        self.write(frame(json.dumps(message).encode()))

    def write(self, raw: bytes) -> None:
        """Send bytes as they are, which need not be a frame."""
        if not self.transport.is_closing():
            self.transport.write(raw)

    def ask(self, then: Callable[[dict[str, Any] | None], None], **message: Any) -> None:
        """Send with an id; `then` gets the reply, or None when the connection is lost before it."""
        if self.lost.is_set():
            then(None)
            return
        message_id = str(next(self._ids))
        self._waiting[message_id] = then
        self.send(id=message_id, **message)

    async def request(self, at_once: Callable[[dict[str, Any]], None] | None = None, **message: Any) -> dict[str, Any]:
        """Return the reply; `at_once` sees it before what came in after it.

        Raises Lost, or TimeoutError if there is no reply within WAIT_S.
        """
        answered: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()

        def then(reply: dict[str, Any] | None) -> None:
            if reply is not None and at_once is not None:
                at_once(reply)
            if not answered.done():
                answered.set_result(reply)

        self.ask(then, **message)
        async with asyncio.timeout(WAIT_S):
            reply = await answered
        if reply is None:
            raise Lost(f"before the reply to {message['type']}, with {self._close_code}")
        return reply

    def abort(self) -> None:
        """Abort the connection, without a close."""
        self.transport.abort()


# The ledger


@dataclass(slots=True, eq=False)
class ClientEntry:
    """What the clients know of one task. `outcome` is the first one that its requester got."""

    task_id: str
    input: Any
    ttl: float
    max_retries: int
    sent_at: float
    is_acknowledged: bool = False
    is_excused: bool = False  # Its requester has left for good and needs no outcome.
    is_cancelled: bool = False
    deliveries: int = 0  # Of its outcome.
    deliveries_max: int = 1  # One more for each repeated delegate.
    outcome: dict[str, Any] | None = None
    attempts: set[int] = field(default_factory=set)  # Delivered.
    runs: int = 0  # The same, also of hubs that have forgotten each other's.
    is_forgotten: bool = False  # A hub without a journal has restarted since.
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)  # Of its workers, by attempt.
    accepted: int | None = None  # The attempt whose result the hub acknowledged as the outcome.
    history: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.history.append(f"{time.monotonic() - self.sent_at:.3f} {text}")


class ClientLedger:
    """Every task from its delegate until some time after its outcome, when it is judged and dropped.

    `hold_s` is that time: longer than the hub keeps a record, so that nothing about it comes later. A restart of a hub
    without a journal makes it forget its tasks: they run at most as often as before, and may end with `hub_lost`.
    """

    def __init__(self, marker: str, hold_s: float, *, is_journaled: bool = True) -> None:
        self.problems: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self._marker = marker
        self._hold_s = hold_s
        self.is_journaled = is_journaled
        self.entries: dict[str, ClientEntry] = {}
        self._to_judge: collections.deque[tuple[float, ClientEntry]] = collections.deque()
        self._numbers = itertools.count(1)

    def open(self, name: str, ttl: float, max_retries: int) -> ClientEntry:
        """Enter a task that is about to be delegated, with a unique input."""
        number = next(self._numbers)
        entry = ClientEntry(f"{name}-{number}", self.payload(number), ttl, max_retries, time.monotonic())
        self.entries[entry.task_id] = entry
        self.counts["asked"] += 1
        return entry

    def payload(self, about: Any, padding: int = 0) -> dict[str, Any]:
        """Return a unique input or output with the marker, which no log may show."""
        return {"about": about, "marker": self._marker, "padding": "x" * padding}

    def acknowledged(self, entry: ClientEntry) -> None:
        if not entry.is_acknowledged:
            entry.is_acknowledged = True
            self.counts["acknowledged"] += 1
            entry.note("acknowledged")

    def refused(self, entry: ClientEntry, code: str, also: tuple[str, ...] = ()) -> None:
        """Drop a task that the hub rejected: any later message about it is a problem."""
        self.counts[f"refused {code}"] += 1
        del self.entries[entry.task_id]
        if code not in ("no_agent", "unknown_agent", "overloaded", *also):
            self._add_problem(entry, f"refused with {code}")
        if entry.outcome is not None or entry.attempts:
            self._add_problem(entry, f"refused with {code}, but it had begun")

    def hub_restarted(self) -> None:
        """Expect that outcomes are redelivered, and of a hub without a journal that it has forgotten all tasks."""
        for entry in self.entries.values():
            entry.note("the hub restarted")
            entry.deliveries_max += 1
            entry.is_forgotten = not self.is_journaled

    def excuse(self, entry: ClientEntry, why: str) -> None:
        """Require no outcome: the requester has left."""
        if entry.outcome is None and not entry.is_excused:
            entry.is_excused = True
            self.counts["excused" if entry.is_acknowledged else "not followed"] += 1
            entry.note(why)
            self._to_judge.append((time.monotonic() + self._hold_s, entry))

    def delivered(self, message: dict[str, Any], agent_id: str) -> None:
        entry = self.entries.get(message["task_id"])
        if entry is None:
            self.problems.append(f"a task that no requester has open was handed to {agent_id}: {message['task_id']}")
            return
        attempt = message["attempt"]
        entry.note(f"attempt {attempt} at {agent_id}")
        entry.runs += 1
        if attempt in entry.attempts and not entry.is_forgotten:
            self._add_problem(entry, f"attempt {attempt} was handed out twice")
        if max(attempt, entry.runs) > 1 + entry.max_retries:
            self._add_problem(entry, f"attempt {attempt}, run {entry.runs}, with max_retries {entry.max_retries}")
        if message["input"] != entry.input:
            self._add_problem(entry, "its input has changed")
        entry.attempts.add(attempt)

    def answered(self, task_id: str, attempt: int, **answer: Any) -> None:
        """Enter the result that a worker is about to send."""
        entry = self.entries.get(task_id)
        if entry is not None:
            entry.answers[attempt] = answer
            entry.note(f"attempt {attempt} answered")

    def accepted(self, task_id: str, attempt: int, state: str) -> None:
        """Enter that the hub has acknowledged a worker's result."""
        entry = self.entries.get(task_id)
        if entry is not None:
            entry.note(f"attempt {attempt} accepted as {state}")
            if state in FINAL:
                entry.accepted = attempt

    def outcome(self, task_id: str, message: dict[str, Any], by_result: bool = True) -> None:
        """Enter an outcome that the requester got, by a `result` or when it asked with `status`."""
        entry = self.entries.get(task_id)
        if entry is None:
            self.problems.append(f"an outcome came long after the first one: {task_id}")
            return
        outcome = {name: message.get(name) for name in ("state", "attempt", "output", "error")}
        when_asked = "" if by_result else " when asked"
        entry.note(f"outcome {outcome['state']} of attempt {outcome['attempt']}{when_asked}")
        entry.deliveries += by_result
        if entry.outcome is None:
            entry.outcome = outcome
            if not entry.is_excused:
                self.acknowledged(entry)  # A requester may be cut between the two.
                self.counts[f"ended {outcome['state']}"] += 1
                self._to_judge.append((time.monotonic() + self._hold_s, entry))
            if outcome["state"] == "timeout" and time.monotonic() - entry.sent_at < entry.ttl - EARLY_S:
                self._add_problem(entry, "it timed out too early")
        elif entry.outcome != outcome:
            self._add_problem(entry, f"two outcomes: {entry.outcome} and {outcome}")

    def unaccounted(self, entry: ClientEntry, what_the_hub_says: str) -> None:
        self.counts["unaccounted"] += 1
        self._add_problem(entry, f"unaccounted for; the hub says {what_the_hub_says}")
        self.excuse(entry, "unaccounted for")

    def judge(self, now: float) -> None:
        """Judge and drop all that have been over for long enough."""
        while self._to_judge and self._to_judge[0][0] <= now:
            entry = self._to_judge.popleft()[1]
            problem = self._problem(entry)
            if problem is not None:
                self._add_problem(entry, problem)
            self.entries.pop(entry.task_id, None)

    def close(self) -> None:
        """Judge all; nothing may be left open."""
        self.judge(float("inf"))
        for entry in list(self.entries.values()):
            self.unaccounted(entry, "nothing")

    def _problem(self, entry: ClientEntry) -> str | None:
        """Return what is wrong with the outcome of a task, if anything is."""
        outcome = entry.outcome
        if outcome is None:
            return None
        state, attempt = outcome["state"], outcome["attempt"]
        code = (outcome["error"] or {}).get("code")
        answer = entry.answers.get(attempt, {})
        if entry.deliveries > entry.deliveries_max:
            return f"its outcome was delivered {entry.deliveries} times"
        if entry.is_forgotten:
            return None  # The attempts of two hubs have the same numbers.
        if state == "completed" and (answer.get("success") is not True or answer["output"] != outcome["output"]):
            return f"completed with another result than its worker sent: {outcome}, {entry.answers}"
        if entry.accepted is not None and (state == "timeout" or attempt != entry.accepted):
            return f"the result of attempt {entry.accepted} was accepted, and its requester got {outcome}"
        if code == "cancelled":
            return None if entry.is_cancelled else "cancelled by no client"
        if state == "failed" and code != "agent_lost" and answer.get("code") != code:
            return f"failed with another error than its worker sent: {outcome}, {entry.answers}"
        return None

    def _add_problem(self, entry: ClientEntry, what: str) -> None:
        self.problems.append(f"{entry.task_id} (ttl {entry.ttl}): {what}; history: {'; '.join(entry.history)}")


# The clients


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The hub's settings, and the pace of its clients, who count in units of `unit_s`."""

    retention_s: float = 5.0
    grace_s: float = 2.0
    heartbeat_s: float = 2.0
    unit_s: float = 1.0
    sample_s: float = 2.0
    restart_s: float = 20.0  # From one restart of the hub to the next.

    @property
    def ttl_max_s(self) -> float:
        return 6 * self.unit_s


class LoadClients:
    """All clients of a run: the hub's port, the end of the run, and the problems they found."""

    def __init__(self, port: int, seed: int, pace: Pace, ledger: ClientLedger) -> None:
        self.port, self.seed, self.pace, self.ledger = port, seed, pace, ledger
        self.problems: list[str] = []
        self.lives: collections.Counter[str] = collections.Counter()
        self.closes: collections.Counter[Any] = collections.Counter()  # Of clients that expect it, by code.
        self.latencies_s: list[float] = []  # Of the bystanders.
        self.counts: collections.Counter[str] = collections.Counter()
        self.online: set[Client] = set()
        self._over_at = 0.0
        self._is_stopped = False
        self._is_restarting = False
        self._restarted_at = self._hub_left_at = self._hub_returned_at = -math.inf

    def restarting(self) -> None:
        """Excuse the loss of connections from now on."""
        self._is_restarting = True
        self.hub_left()

    def restarted(self) -> None:
        self._is_restarting, self._restarted_at = False, time.monotonic()
        self.hub_returned()

    def hub_left(self) -> None:
        """Note that the hub does not answer any more: it is stopped, or restarts."""
        self._hub_left_at, self._hub_returned_at = time.monotonic(), math.inf

    def hub_returned(self) -> None:
        self._hub_returned_at = time.monotonic()

    def has_hub_been_away(self, since: float) -> bool:
        return self._hub_returned_at > since

    @property
    def heard_until(self) -> float:
        """Until when the hub has surely heard what was sent: until now, or until it left if it is just back."""
        now = time.monotonic()
        return self._hub_left_at if now < self._hub_returned_at + RESTART_NOTICED_S else now

    @property
    def is_hub_lost(self) -> bool:
        """Whether the hub restarts, or has a moment ago, so that clients may not have noticed the loss before now."""
        return self._is_restarting or time.monotonic() < self._restarted_at + RESTART_NOTICED_S

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def is_over(self) -> bool:
        return self._is_stopped or time.monotonic() >= self._over_at

    def stop(self) -> None:
        self._is_stopped = True

    async def rest(self, units: float) -> None:
        """Sleep, at most until the run is over."""
        until = min(time.monotonic() + units * self.pace.unit_s, self._over_at)
        while not self.is_over and (left_s := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, 0.5))

    async def churn(self, for_s: float) -> None:
        """Keep the whole population busy for so long."""
        self._over_at = time.monotonic() + for_s
        beating = asyncio.create_task(self._beat())
        lives = [self._live(life, number) for life, count in POPULATION.items() for number in range(count)]
        try:
            async with asyncio.timeout(for_s + self.pace.ttl_max_s + 3 * WAIT_S):
                await asyncio.gather(*lives)
        except TimeoutError:
            self.problems.append("some clients do not end")
        finally:
            beating.cancel()

    async def _live(self, life: Callable[[LoadClients, random.Random], Any], number: int) -> None:
        """Run one life after the other."""
        for count in itertools.count():
            rng = random.Random(f"{self.seed} {life.__name__} {number} {count}")
            await self._live_once(life, rng)
            await self.rest(rng.uniform(0, 0.3))
            if self.is_over:
                return

    async def _live_once(self, life: Callable[[LoadClients, random.Random], Any], rng: random.Random) -> None:
        try:
            await life(self, rng)
        except Lost:
            pass  # A client that did not expect this has reported it.
        except (OSError, Disconnected) as error:
            if not self.is_hub_lost:
                self.problems.append(f"{life.__name__}: {error!r}")
        except Exception as error:
            self.problems.append(f"{life.__name__}: {error!r}")
        self.lives[life.__name__] += 1

    async def crowd(self) -> None:
        """Have more tasks at once than the population ever has by chance."""
        rngs = [random.Random(f"{self.seed} crowd {number}") for number in range(CROWD)]
        await asyncio.gather(*(self._live_once(fair_share_life, rng) for rng in rngs))

    async def _beat(self) -> None:
        """Send a heartbeat for each client that has sent nothing for a while."""
        while True:
            silent_since = time.monotonic() - self.pace.heartbeat_s / 2
            for client in list(self.online):
                if client.wire.sent_at < silent_since:
                    client.wire.send(type="heartbeat")
            await asyncio.sleep(self.pace.heartbeat_s / 4)


class Client:
    """An agent on a wire of its own. After `join` it is online, and sends heartbeats, until it is cut or leaves."""

    wire: Wire

    def __init__(
        self, load: LoadClients, rng: random.Random, name: str, *capabilities: str, max_tasks: int = 16
    ) -> None:
        self.load, self.rng = load, rng
        self.ledger = load.ledger
        self.name = name
        self.identity: dict[str, str] = {}
        self.expects_end = False
        self.expects_errors = False
        self.is_hub_lost = False  # It has lost its connection to a restart of the hub.
        self.description = {"name": name, "capabilities": list(capabilities), "max_tasks": max_tasks}

    @property
    def agent_id(self) -> str:
        return self.identity["agent_id"]

    async def join(self, receive_bytes: int | None = None) -> dict[str, Any]:
        """Connect and register, resuming its session if it has one; return the reply."""
        self.expects_end = self.is_hub_lost = False
        self.wire = await Wire.open(self.load.port, self.on_message, self._on_lost, receive_bytes)
        reply = await self.wire.request(self._on_registered, type="register", **self.description, **self.identity)
        if reply["type"] != "register":
            self.expects_end = True
            self.wire.abort()
            raise AssertionError(f"not registered: {reply}")
        return reply

    def _on_registered(self, reply: dict[str, Any]) -> None:
        if reply["type"] == "register":
            self.identity = {"agent_id": reply["agent_id"], "resume": reply["resume"]}
            self.load.online.add(self)

    def cut(self) -> None:
        """Abort the connection, without a close."""
        self.expects_end = True
        self.load.online.discard(self)
        self.wire.abort()

    async def came_back(self) -> bool:
        """Resume the session after a restart of the hub; return False if the connection was lost for another reason."""
        if not (self.is_hub_lost or self.load.is_hub_lost):
            return False
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    await self.join()
                except OSError:  # Lost is one too.
                    await asyncio.sleep(self.rng.uniform(0, 0.2))
                else:
                    return True

    async def stay(self, units: float) -> None:
        """Stay online for so long, also if the hub restarts meanwhile."""
        until = time.monotonic() + units * self.load.pace.unit_s
        while not self.load.is_over and (left_s := until - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, 0.5)):
                    await self.wire.lost.wait()
                if not await self.came_back():
                    return

    async def leave(self, drain: bool = False) -> None:
        self.expects_end = True
        try:
            reply = await self.wire.request(type="deregister", drain=drain)
            if reply["type"] != "deregister":
                raise AssertionError(f"could not leave: {reply}")
            async with asyncio.timeout(WAIT_S):
                await self.wire.lost.wait()
        finally:
            self.load.online.discard(self)
            self.wire.abort()

    def on_message(self, message: dict[str, Any]) -> None:
        if message["type"] == "error" and not self.expects_errors and message.get("reply_to") != UNHEARD:
            self.load.problems.append(f"{self.name} got an error: {message['code']}: {message['message']}")

    def _on_lost(self, code: int) -> None:
        self.load.online.discard(self)
        if self.expects_end:
            self.load.closes[code] += 1
        elif self.load.is_hub_lost:
            self.is_hub_lost = True
            self.load.closes[f"{code} of a restart"] += 1
        else:
            self.load.problems.append(f"{self.name} lost its connection with {code}")


class Worker(Client):
    """Completes or fails its tasks after a while, and hangs on some."""

    def __init__(
        self, *args: Any, hangs: float = 0.0, fails: float = 0.1, work_s: float = 0.02, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.hangs, self.fails, self.work_s = hangs, fails, work_s  # The first two are probabilities.
        self.jobs: dict[str, int] = {}  # The attempt of each task that it has begun and not answered.
        self.results: dict[str, dict[str, Any]] = {}  # Answered, but not acknowledged.

    def on_message(self, message: dict[str, Any]) -> None:
        if message["type"] == "delegate":
            self._begin(message)
        elif message["type"] == "status":
            self.jobs.pop(message["task_id"], None)
        elif message.get("code") not in TOO_LATE:  # Its progress report has crossed the outcome.
            super().on_message(message)

    def _begin(self, message: dict[str, Any]) -> None:
        self.ledger.delivered(message, self.agent_id)
        self.jobs[message["task_id"]] = message["attempt"]
        if self.rng.random() < 0.1:
            detail = self.ledger.payload("half of it")
            self.wire.send(type="status", task_id=message["task_id"], progress=0.5, detail=detail)
        if self.rng.random() >= self.hangs:
            delay_s = self.rng.expovariate(1 / self.work_s) if self.work_s else 0.0
            asyncio.get_running_loop().call_later(delay_s, self._finish, message["task_id"], message["attempt"])

    def _finish(self, task_id: str, attempt: int) -> None:
        if self.jobs.get(task_id) != attempt:
            return  # It was cancelled, or retried elsewhere.
        del self.jobs[task_id]
        if self.rng.random() >= self.fails:
            answer = {"success": True, "output": self.ledger.payload([task_id, attempt], self.rng.choice((0, 900)))}
            self.ledger.answered(task_id, attempt, **answer)
        else:
            answer = {"success": False, "error": {"code": "unlucky", "message": self.ledger.payload(0)["marker"]}}
            self.ledger.answered(task_id, attempt, success=False, code="unlucky")
        self.results[task_id] = {"type": "result", "task_id": task_id, "attempt": attempt, **answer}
        self._send_result(self.results[task_id])

    def _send_result(self, result: dict[str, Any]) -> None:
        def then(reply: dict[str, Any] | None) -> None:
            if reply is None:
                return  # It is sent again after a reconnect.
            self.results.pop(result["task_id"], None)
            if reply["type"] == "status":
                self.ledger.accepted(result["task_id"], result["attempt"], reply["state"])
            elif reply["code"] not in TOO_LATE:
                self.load.problems.append(f"a result was refused: {reply}")

        self.wire.ask(then, **result)

    def _on_registered(self, reply: dict[str, Any]) -> None:
        """Reconcile its tasks with the hub's after a reconnect: docs/protocol.md, step 9."""
        known = self.identity.get("agent_id")
        super()._on_registered(reply)
        is_known = self.identity.get("agent_id") == known
        held = {one["task_id"]: one["attempt"] for one in reply.get("tasks", ()) if is_known}
        self.jobs = {task_id: attempt for task_id, attempt in self.jobs.items() if held.get(task_id) == attempt}
        results, self.results = self.results, {}
        for task_id, attempt in held.items():
            if task_id in results and results[task_id]["attempt"] == attempt:
                self.results[task_id] = results[task_id]
                self._send_result(results[task_id])
            elif task_id not in self.jobs:
                error = {"code": "agent_lost", "message": "it never arrived"}
                lost = {"type": "result", "task_id": task_id, "attempt": attempt, "success": False, "error": error}
                self._send_result(lost)

    async def drop_out(self) -> None:
        """Send and read nothing more on an open connection; then be cut."""
        self.load.online.discard(self)
        self.expects_end = True
        self.jobs.clear()
        self.wire.transport.pause_reading()
        await self.load.rest(self.rng.uniform(1, 9))
        self.cut()


class Requester(Client):
    """Delegates in many ways, and follows its tasks to their outcomes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.open: dict[str, tuple[ClientEntry, dict[str, Any]]] = {}  # With the delegate.
        self.idle = asyncio.Event()
        self._left_at: float | None = None  # Since when it gets no outcomes; None while it is online.

    def on_message(self, message: dict[str, Any]) -> None:
        if message["type"] == "result":
            self.ledger.outcome(message["task_id"], message)
            self._forget(message["task_id"])
        elif message["type"] != "status":  # Of progress.
            super().on_message(message)

    def _forget(self, task_id: str) -> None:
        self.open.pop(task_id, None)
        if not self.open:
            self.idle.set()

    def prepare(self, **fields: Any) -> tuple[ClientEntry, dict[str, Any]]:
        """Return a new task and the delegate of it."""
        ttl, max_retries = fields.pop("ttl"), fields.pop("max_retries", 0)
        entry = self.ledger.open(self.name, ttl, max_retries)
        if self.rng.random() < 0.02:
            entry.input["shape"] = self.rng.choice(INPUT_SHAPES)
        message = {"type": "delegate", "task_id": entry.task_id, "input": entry.input, "ttl": ttl, **fields}
        self.open[entry.task_id] = entry, {**message, "max_retries": max_retries}
        self.idle.clear()
        return self.open[entry.task_id]

    async def delegate(self, entry: ClientEntry, message: dict[str, Any]) -> bool:
        """Send a delegate; return whether the hub accepted it."""
        reply = await self.wire.request(**message)
        if reply["type"] == "status":
            self.ledger.acknowledged(entry)
            return True
        self.ledger.refused(entry, reply["code"], ("shutting_down",) if self.load.is_hub_lost else ())
        self._forget(entry.task_id)
        return False

    async def ask(self) -> None:
        """Delegate a task, and perhaps cancel it."""
        entry, message = self.prepare(**self._choice())
        if await self.delegate(entry, message) and self.rng.random() < 0.08:
            await self.load.rest(self.rng.uniform(0, 0.1))
            if entry.outcome is None:
                entry.is_cancelled = True
                reason = self.ledger.payload("cancelled")["marker"]
                await self.wire.request(type="result", task_id=entry.task_id, success=False, error=reason)

    def _choice(self) -> dict[str, Any]:
        rng, unit_s = self.rng, self.load.pace.unit_s
        kind = rng.choices(("work", "named", "sdk", "nobody-yet", "nobody"), (80, 7, 8, 3, 2))[0]
        workers = [
            client.agent_id for client in self.load.online if isinstance(client, Worker) and client.name != "calm"
        ]
        target = {"agent_id": rng.choice(workers)} if kind == "named" and workers else {"capability": kind}
        return {
            **target,
            "ttl": rng.choice((0.3, 1, 2, 6)) * unit_s,
            "priority": rng.randint(-100, 100),
            "max_retries": rng.choice((0, 0, 1, 3)),
            "wait": kind == "nobody-yet" or rng.random() < 0.5,
        }

    async def go_and_come_back(self) -> None:
        """Be cut, perhaps before an acknowledgement, and return before the hub forgets ended tasks."""
        _, message = self.prepare(**self._choice())
        self.wire.send(id=UNHEARD, **message)
        if self.rng.random() < 0.5:
            await asyncio.sleep(self.rng.uniform(0, 0.01))
        self.cut()
        await asyncio.sleep(self.rng.uniform(0.01, 0.7) * self.load.pace.retention_s)
        await self._return(self.join)

    async def came_back(self) -> bool:
        """Resume the session after a restart of the hub, and ask for the outcomes that are due."""
        if not (self.is_hub_lost or self.load.is_hub_lost):
            return False
        await self._return(super().came_back)
        return True

    def _on_lost(self, code: int) -> None:
        super()._on_lost(code)
        self._left_at = self._left_at or self.load.heard_until

    async def _return(self, join: Callable[[], Awaitable[Any]]) -> None:
        known, pace = self.agent_id, self.load.pace
        left_at = self._left_at or self.load.heard_until
        await join()
        if self.agent_id != known and not self.ledger.is_journaled:
            self.excuse("the hub has forgotten it")
        if time.monotonic() - left_at > 0.9 * pace.retention_s:
            self.excuse("its requester was disconnected for too long")  # On a busy machine.
        if self.agent_id != known and any(one.is_acknowledged for one, _ in self.open.values()):
            self.load.problems.append(f"the session of {known} was forgotten, with open tasks: {list(self.open)}")
        for entry, message in [one for one in self.open.values() if one[0].outcome is None]:
            await self._refresh(entry, message, left_at)
        self._left_at = None  # Not before: the hub may restart meanwhile.

    async def _refresh(self, entry: ClientEntry, message: dict[str, Any], left_at: float) -> None:
        """Ask for an outcome again, as in step 11 of docs/protocol.md."""
        if not entry.is_acknowledged:
            entry.deliveries_max += 1
            entry.note("delegated again")
            await self.delegate(entry, message)
            return
        report = await self.wire.request(type="status", task_id=entry.task_id)
        if report["type"] == "error":
            if time.monotonic() - left_at > 0.9 * self.load.pace.retention_s:
                self.ledger.excuse(entry, "its requester was disconnected for too long")
            elif entry.outcome is None:
                self.ledger.unaccounted(entry, json.dumps(report))
            self._forget(entry.task_id)
        elif report["state"] in FINAL:
            self.ledger.outcome(entry.task_id, report, by_result=False)
            self._forget(entry.task_id)

    async def await_outcomes(self) -> None:
        """Wait until all tasks have ended; those that have not in time are unaccounted for. Raises Lost."""
        last = time.monotonic() + self.load.pace.ttl_max_s + WAIT_S / 2
        while self.open and time.monotonic() < last:
            if self.wire.lost.is_set():
                raise Lost("before all outcomes came")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await self.idle.wait()
        for entry, _ in list(self.open.values()):
            self.ledger.unaccounted(entry, json.dumps(await self.wire.request(type="status", task_id=entry.task_id)))

    def excuse(self, why: str) -> None:
        """Give up all open tasks."""
        for entry, _ in self.open.values():
            self.ledger.excuse(entry, why)
        self.open.clear()
        self.idle.set()


# The lives


async def worker_life(load: LoadClients, rng: random.Random) -> None:
    """Join, work, and deregister."""
    worker = Worker(load, rng, "worker", "work", max_tasks=rng.choice((1, 4, 16)))
    await worker.join()
    await worker.stay(rng.uniform(1, 6))
    await worker.leave(drain=rng.random() < 0.5)


async def hanging_life(load: LoadClients, rng: random.Random) -> None:
    """Take tasks, and complete few of them."""
    worker = Worker(load, rng, "hanger", "work", max_tasks=3, hangs=0.8)
    await worker.join()
    await load.rest(rng.uniform(1, 5))
    if rng.random() < 0.5:
        worker.cut()
    else:
        await worker.leave()


async def unreliable_worker_life(load: LoadClients, rng: random.Random) -> None:
    """Be cut during tasks, and come back in time, too late, or never."""
    worker = Worker(load, rng, "unreliable", "work", max_tasks=8, work_s=0.1 * load.pace.unit_s)
    await worker.join()
    for _ in range(rng.randint(1, 4)):
        await load.rest(rng.uniform(0.3, 2))
        if rng.random() < 0.2:
            await worker.drop_out()
        worker.cut()
        fate = rng.choices(("in time", "late", "never"), (6, 2, 2))[0]
        if fate == "never" or load.is_over:
            return
        await asyncio.sleep(load.pace.grace_s * (rng.uniform(0, 0.7) if fate == "in time" else rng.uniform(1.1, 2)))
        await worker.join()
    await load.rest(rng.uniform(0.3, 2))
    await worker.leave()


async def requester_life(load: LoadClients, rng: random.Random) -> None:
    """Delegate, and stay, come back, or leave for good."""
    requester = Requester(load, rng, "requester")
    await requester.join()
    fate = rng.choices(("stays", "comes back", "is cut", "leaves"), (4, 3, 1, 1))[0]
    try:
        for _ in range(rng.randint(5, 40)):
            await through_restarts(requester, functools.partial(ask_for_some, requester, fate))
            await load.rest(rng.expovariate(1 / 0.1))
            if load.is_over:
                break
        if fate in ("stays", "comes back"):
            await through_restarts(requester, requester.await_outcomes)
    finally:
        requester.excuse("its requester has left")
        requester.cut() if fate == "is cut" else await requester.leave()


async def ask_for_some(requester: Requester, fate: str) -> None:
    asked = await asyncio.gather(*(requester.ask() for _ in range(requester.rng.randint(1, 8))), return_exceptions=True)
    for error in asked:
        if isinstance(error, BaseException):
            raise error
    if fate == "comes back" and requester.rng.random() < 0.1:
        await requester.go_and_come_back()


async def through_restarts(client: Client, act: Callable[[], Awaitable[Any]]) -> None:
    """Call `act`, and again each time that a restart of the hub has interrupted it. Raises Lost for another reason."""
    while True:
        try:
            await act()
        except OSError:
            if not await client.came_back():
                raise
        else:
            return


async def slow_consumer_life(load: LoadClients, rng: random.Random) -> None:
    """Never read, while others broadcast to it; some still send heartbeats, some take tasks too."""
    capabilities = ["slow-consumer", "work"] if rng.random() < 0.3 else ["slow-consumer"]
    consumer = Worker(load, rng, "slow-consumer", *capabilities, max_tasks=4)
    await consumer.join(receive_bytes=4096)
    consumer.expects_end = True
    consumer.wire.transport.pause_reading()
    if rng.random() < 0.3:
        load.online.discard(consumer)
    for _ in range(rng.randint(10, 30)):
        await load.rest(0.5)
        if consumer.wire.lost.is_set():
            load.closes["slow-consumer"] += 1
            break
    consumer.cut()


async def broadcaster_life(load: LoadClients, rng: random.Random) -> None:
    """Broadcast, mostly to the slow consumers."""
    broadcaster = Client(load, rng, "broadcaster")
    await broadcaster.join()
    for _ in range(rng.randint(20, 100)):
        for _ in range(10):
            broadcaster.wire.send(
                type="broadcast", message=load.ledger.payload("news", 4096), capability="slow-consumer"
            )
        if load.is_over:
            break
        if rng.random() < 0.1:
            await broadcaster.wire.request(type="broadcast", message=load.ledger.payload("news"))
        await load.rest(0.1)
    await broadcaster.leave()


async def flood_life(load: LoadClients, rng: random.Random) -> None:
    """Send for a second as much as the connection takes, then require that the hub still answers."""
    flooder = Client(load, rng, "flooder")
    await flooder.join()
    news = load.ledger.payload("flood", 1024)
    messages = [
        {"type": "heartbeat"},
        {"type": "heartbeat", "id": "h"},
        {"type": "discover", "id": "d", "capability": "work", "limit": 3},
        {"type": "broadcast", "message": news, "capability": "slow-consumer"},
    ]
    last = time.monotonic() + load.pace.unit_s
    for _ in range(FLOOD_MESSAGES // 50):
        for message in rng.choices(messages, (60, 10, 20, 10), k=50):
            flooder.wire.send(**message)
        await flooder.wire.writable.wait()
        await asyncio.sleep(0)
        if time.monotonic() > last:
            break
    await flooder.wire.request(type="status")
    await flooder.leave()
    await load.rest(rng.uniform(4, 8))


async def observer_life(load: LoadClients, rng: random.Random) -> None:
    """Ask for the status and the agents without registering."""
    wire = await Wire.open(load.port, lambda _: None, lambda _: None)
    for _ in range(rng.randint(1, 5)):
        await wire.request(type="status")
        await wire.request(type="status", tasks=True)
        await wire.request(type="discover", capability=rng.choice(("", "work", "nothing")), limit=20)
        await load.rest(rng.uniform(0.1, 1))
    wire.abort()


def shapes(rng: random.Random) -> list[bytes]:
    """Return messages that cost a hub more than their size says."""
    empty = b"{}," * rng.choice((1000, 100_000)) + b"{}"
    deep = b",".join([b"[" * 62 + b"]" * 62] * rng.choice((10, 1000)))
    too_deep = b"[" * 199 * 50 + b"]" * 199 * 50
    not_finite = b",".join([b"[" * 60 + b"NaN" + b"]" * 60] * 200)
    begin = b'{"type":"delegate","id":"1","task_id":"shape","capability":"none","input":['
    lists = [b'{"type":"status","id":"1","tasks":true}', b'{"type":"discover","id":"1","capability":"o"}']
    return [*lists, b"{" + b"," * 60_000, *(begin + one + b"]}" for one in (empty, deep, too_deep, not_finite))]


async def bad_neighbour_life(load: LoadClients, rng: random.Random) -> None:
    """Open ten connections, send the same costly messages on all, and hang up, mostly before the answers."""
    wires = [await Wire.open(load.port, lambda _: None, lambda _: None) for _ in range(10)]
    for _ in range(rng.randint(1, 3)):
        raw = frame(rng.choice(shapes(rng)))
        for wire in wires:
            wire.write(raw * max(1, min(100, 200_000 // len(raw))))
        await load.rest(rng.uniform(0, 2))
    for wire in wires:
        wire.abort() if rng.random() < 0.5 else wire.transport.close()
    await load.rest(rng.uniform(1, 4))


async def cancelled_identities_life(load: LoadClients, rng: random.Random) -> None:
    """Register, delegate, cancel and hang up, a hundred times under another identity."""
    for _ in range(100):
        requester = Requester(load, rng, "passer-by")
        await requester.join()
        try:
            entry, message = requester.prepare(capability="nobody-yet", ttl=load.pace.unit_s, wait=True)
            if await requester.delegate(entry, message):
                entry.is_cancelled = True
                await requester.wire.request(type="result", task_id=entry.task_id, success=False, error="cancelled")
        finally:
            requester.excuse("its requester has hung up")
            requester.cut()
    await load.rest(rng.uniform(2, 6))


async def churn_life(load: LoadClients, rng: random.Random) -> None:
    """Register and deregister on one connection, with many words to index, a hundred times."""
    wire = await Wire.open(load.port, lambda _: None, lambda _: None)
    words = " ".join(f"{load.ledger.payload(0)['marker']}-{number}" for number in range(60))
    for number in range(100):
        capability = {"name": f"churn-{number % 7}", "description": words}
        await wire.request(type="register", name="churn", capabilities=[capability] if number % 2 else ["churn"])
        await wire.request(type="deregister")
        await wire.lost.wait()  # The hub closes the connection of an agent that has left.
        wire = await Wire.open(load.port, lambda _: None, lambda _: None)
    wire.abort()
    await load.rest(rng.uniform(2, 6))


class Counting(Client):
    """Completes tasks that are in no ledger, and counts them by their input."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.counts: collections.Counter[str] = collections.Counter()

    def on_message(self, message: dict[str, Any]) -> None:
        if message["type"] == "delegate":
            self.counts[message["input"]] += 1
            self.wire.send(
                type="result",
                task_id=message["task_id"],
                attempt=message["attempt"],
                success=True,
                output=message["input"],
            )


async def crashed_requester_life(load: LoadClients, rng: random.Random) -> None:
    """Have large outcomes made for a requester that crashes before it reads them."""
    worker = Counting(load, rng, "for-the-crashed", f"crash-{rng.random()}")
    requester = Client(load, rng, "crashes")
    worker.expects_errors = requester.expects_errors = True
    await asyncio.gather(worker.join(), requester.join(receive_bytes=4096))
    requester.expects_end = True
    requester.wire.transport.pause_reading()
    capability = worker.description["capabilities"][0]
    fields = {"type": "delegate", "capability": capability, "input": "x" * 10_000, "ttl": load.pace.ttl_max_s}
    for number in range(50):
        requester.wire.send(task_id=f"{capability}-{number}", **fields)
    await load.rest(rng.uniform(0.2, 1))
    requester.cut()
    await worker.stay(rng.uniform(0, 1))
    await worker.leave()


async def fair_share_life(load: LoadClients, rng: random.Random) -> None:
    """Have 5,000 tasks of one requester wait, and require that another's single one is next but one."""
    capability = f"fair-{rng.random()}"
    many, single = (Client(load, rng, name) for name in ("many", "single"))
    many.expects_errors = single.expects_errors = True  # The hub may shut down.
    await asyncio.gather(many.join(), single.join())
    options = {"type": "delegate", "capability": capability, "wait": True, "ttl": load.pace.ttl_max_s}
    for number in range(WAITING_TASKS):
        many.wire.send(task_id=f"{capability}-{number}", input="many", **options)
        if number % 500 == 0:
            await many.wire.writable.wait()
    await many.wire.request(task_id=f"{capability}-last", input="many", **options)
    expires_at = time.monotonic() + 8 * load.pace.unit_s - EARLY_S
    reply = await single.wire.request(
        task_id=f"{capability}-single", input="single", **{**options, "ttl": 8 * load.pace.unit_s}
    )
    is_waiting = reply["type"] == "status"
    if not is_waiting and reply["code"] != "shutting_down":
        load.problems.append(f"a requester's only task was rejected: {reply}")
    worker = Counting(load, rng, "fair", capability, max_tasks=1)
    worker.expects_errors = True
    await worker.join()
    await load.rest(1)
    if is_waiting and time.monotonic() < expires_at and worker.counts.total() > 3 and not worker.counts["single"]:
        load.problems.append(f"a requester's only task waits for those of another: {worker.counts}")
    load.counts["tasks in fair turns"] += worker.counts.total()
    await asyncio.gather(worker.leave(), single.leave())
    await many.leave() if rng.random() < 0.5 else many.cut()
    await load.rest(rng.uniform(6, 12))


async def stopped_life(load: LoadClients, rng: random.Random) -> None:
    """Work, and be stopped now and then for less than the silence, as by SIGSTOP: read and send nothing."""
    worker = Worker(load, rng, "stopped", "work", max_tasks=2)
    await worker.join()
    for _ in range(rng.randint(1, 3)):
        await load.rest(rng.uniform(0.3, 2))
        load.online.discard(worker)
        worker.wire.transport.pause_reading()
        await load.rest(rng.uniform(0.1, 1))
        worker.wire.transport.resume_reading()
        worker.wire.send(type="heartbeat")
        load.online.add(worker)
    await worker.leave()


NO_HANDSHAKES = (
    b"",
    b"GET / HT",
    HANDSHAKE[:-2],
    HANDSHAKE.replace(b"13", b"12"),
    HANDSHAKE.replace(b"127.0.0.1", b"elsewhere.example"),
    HANDSHAKE + frame(b'{"type": "register"')[:9],
    b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4\r\n\r\nMARK",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: " + b"MARK" * 5000,
    b"MARK\n" * 100,
)


async def half_open_life(load: LoadClients, rng: random.Random) -> None:
    """Connect without a WebSocket handshake, or send nothing after it; leave, or wait for the hub's close."""
    reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
    writer.write(rng.choice((*NO_HANDSHAKES, HANDSHAKE)).replace(b"MARK", load.ledger.payload(0)["marker"].encode()))
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(load.pace.unit_s * rng.choice((0.01, 1, 15))):
            while not load.is_over:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        if not await reader.read(4096):
                            break
    writer.transport.abort()


def garbage(marker: str, rng: random.Random) -> list[bytes]:
    """Return bytes that no well-behaved client sends after the handshake."""
    marked = marker.encode()
    big = {"type": "delegate", "id": "1", "task_id": "t", "capability": "c", "input": marker + "x" * 1_100_000}
    return [
        frame(b'{"type": "delegate", ' + marked),
        frame(json.dumps({"type": marker, "id": "1"}).encode()),
        frame(json.dumps({"type": "delegate", "id": "1", "task_id": 7, "input": marker}).encode()),
        frame(json.dumps({"type": "delegate", "id": "1", "task_id": "t", "capability": "c"}).encode()),
        frame(b'{"type": "register", "id": "1", "name": "x", "metadata": ' + b"[" * 100_000),
        frame(b'{"type": "register", "id": "1", "name": "x", "metadata": {"x": NaN}}'),
        frame(b"\xff\xfe" + marked),
        frame(marked, BINARY),
        frame(marked, CONTINUATION),
        frame(b'{"type": "regi', fin=False),  # The rest never comes.
        frame(json.dumps(big).encode()),
        frame(marked, 3),
        frame(b"p" * 126, PING),
        frame(marked, rsv=7),
        frame(marked, key=b""),  # Not masked.
        b"\x81\xff" + b"\x7f" * 8,
        frame(b"\x03", CLOSE),
        rng.randbytes(rng.randint(1, 3000)),
    ]


async def garbage_life(load: LoadClients, rng: random.Random) -> None:
    """Send garbage on a WebSocket, as an observer or as an agent, until it is closed or time is up."""
    client = Worker(load, rng, "garbage", "work", max_tasks=2)
    client.expects_errors = True
    if rng.random() < 0.5:
        await client.join()
        load.online.discard(client)
    else:
        client.wire = await Wire.open(load.port, client.on_message, client._on_lost)
    client.expects_end = True
    for raw in rng.sample(garbage(load.ledger.payload(0)["marker"], rng), k=rng.randint(1, 8)):
        client.wire.write(raw)
        await asyncio.sleep(rng.choice((0, 0.01)))
    await load.rest(rng.choice((0.05, 1)))
    client.cut()


async def sdk_worker_life(load: LoadClients, rng: random.Random) -> None:
    """Be an Agent that works, and delegates subtasks."""
    ledger = load.ledger
    agent = Agent("sdk-worker", url=load.url, max_tasks=8)

    @agent.capability("sdk")
    async def work(task: Task) -> Any:
        ledger.delivered({"task_id": task.task_id, "attempt": task.attempt, "input": task.input}, "an SDK worker")
        subtask = None
        if rng.random() < 0.3:
            subtask = await sdk_subtask(load, task)
        await asyncio.sleep(rng.expovariate(1 / 0.02))
        output = ledger.payload([task.task_id, task.attempt, subtask])
        ledger.answered(task.task_id, task.attempt, success=True, output=output)
        return output

    async with agent:
        await load.rest(rng.uniform(1, 6))
        await agent.stop(drain_s=rng.choice((0, 1)))


async def sdk_subtask(load: LoadClients, task: Task) -> Any:
    """Delegate a subtask; its outcome is not required, because the parent task may end first."""
    ttl = max(0.1, task.remaining_s)
    entry = load.ledger.open("subtask", ttl, 0)
    entry.is_cancelled = True
    load.ledger.excuse(entry, "it is a subtask")
    try:
        return await task.delegate("work", entry.input, ttl=ttl, task_id=entry.task_id)
    except (TaskFailed, Refused) as error:
        return error.code


async def sdk_requester_life(load: LoadClients, rng: random.Random) -> None:
    """Be an Agent that delegates, a few tasks at a time."""
    async with Agent("sdk-requester", url=load.url) as agent:
        await asyncio.gather(*(sdk_ask(load, agent, rng) for _ in range(4)))


async def sdk_ask(load: LoadClients, agent: Agent, rng: random.Random) -> None:
    for _ in range(rng.randint(3, 20)):
        ttl, max_retries = rng.choice((1, 3)) * load.pace.unit_s, rng.choice((0, 2))
        entry = load.ledger.open("sdk", ttl, max_retries)
        options = {"ttl": ttl, "max_retries": max_retries, "wait": True, "task_id": entry.task_id}
        try:
            handle = await agent.submit(rng.choice(("work", "sdk")), entry.input, **options)
        except TaskFailed as error:  # On a busy machine. It may have been accepted all the same, and is then cancelled.
            if not (entry.is_forgotten or isinstance(error, TaskTimeout)):
                raise
            entry.is_cancelled = True
            load.ledger.excuse(entry, "not acknowledged in time")
            continue
        except Refused as refusal:
            if not (refusal.code == "shutting_down" and load.is_hub_lost):
                raise
            load.ledger.refused(entry, refusal.code, (refusal.code,))
            await load.rest(1)
            continue
        load.ledger.acknowledged(entry)
        if rng.random() < 0.1:
            entry.is_cancelled = True
            await handle.cancel()
        code = None
        try:
            await handle.result()
        except TaskFailed as error:
            code = error.code
        if code == "hub_lost" and load.has_hub_been_away(entry.sent_at):
            # Its deadline passed without a connection, or the hub has no journal.
            load.ledger.counts["hub_lost"] += 1
            load.ledger.excuse(entry, "the hub was away")
            continue
        if handle.outcome is None:
            load.ledger.unaccounted(entry, "nothing: its handle has no outcome")
            continue
        outcome = handle.outcome
        error = None if outcome.error is None else {"code": outcome.error.code, "message": outcome.error.message}
        received = {"state": str(outcome.state), "attempt": outcome.attempt, "output": outcome.output, "error": error}
        load.ledger.outcome(entry.task_id, received)
        if load.is_over:
            break


async def bystanders_life(load: LoadClients, rng: random.Random) -> None:
    """Be a calm pair: the load must not keep any of its tasks from being completed."""
    worker = Worker(load, rng, "calm", "calm", fails=0.0, work_s=0.0)
    requester = Requester(load, rng, "bystander")
    await asyncio.gather(worker.join(), requester.join())
    while not load.is_over:
        entry, message = requester.prepare(capability="calm", ttl=WAIT_S)
        try:
            if not await requester.delegate(entry, message) and load.is_hub_lost:
                await load.rest(0.1)
                continue
            await requester.await_outcomes()
        except Lost:
            if not (await worker.came_back() and await requester.came_back()):
                raise
            requester.excuse("the hub restarted, and its worker may have lost it")
            continue
        load.latencies_s.append(time.monotonic() - entry.sent_at)
        if entry.outcome is None or entry.outcome["state"] != "completed":
            load.problems.append(f"a bystander's task was not completed: {'; '.join(entry.history)}")
        await load.rest(0.05)
    await asyncio.gather(worker.leave(), requester.leave())


POPULATION: dict[Callable[[LoadClients, random.Random], Any], int] = {
    worker_life: 16,
    hanging_life: 2,
    unreliable_worker_life: 6,
    requester_life: 36,
    slow_consumer_life: 4,
    broadcaster_life: 1,
    flood_life: 1,
    bad_neighbour_life: 1,
    churn_life: 1,
    crashed_requester_life: 1,
    fair_share_life: 1,
    cancelled_identities_life: 1,
    stopped_life: 2,
    observer_life: 1,
    half_open_life: 6,
    garbage_life: 3,
    sdk_worker_life: 2,
    sdk_requester_life: 2,
    bystanders_life: 1,
}
