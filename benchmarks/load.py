"""Load drivers: cheap agents on picows, uvloop and orjson.

Closed loops keep a number of tasks open. Open loops send on a schedule, independent of results, and measure latency
from the scheduled start. All agents run in this process, so that its CPU time can be compared with the hub's: `limit`
names the bottleneck. Figures limited by the `driver` say little about the hub.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import gc
import itertools
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
import uvloop
from picows import WSError, WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from benchmarks.measure import Options, Row, Server, Unavailable, cpu_s, hub, memory_bytes, queued_s, server

WARM_UP_S = 20.0  # Timeout of the warm-up of a closed loop.
REST_S = 20.0  # Timeout for the hub to finish all tasks after a load.
WAIT_S = 30.0  # Timeout of each other wait for the hub.
CONNECTING_MAX = 64  # Concurrent handshakes.
READ_WHOLE_BYTES = 4096  # Only the head of a longer message is parsed.
HEAD = re.compile(rb'"type": ?"(\w+)".*?"task_id": ?"([^"]+)"')
BUSY_HUB_CORES, BUSY_DRIVER_CORES = 0.85, 0.9  # Above these shares of a core, a process counts as saturated.
QUEUED_MAX = 0.15  # Above this share of time spent waiting for a core, a note is added.
OPEN_MAX = 20_000  # An open loop ends with more open tasks, because the hub has not kept up.


logging.getLogger("picows").setLevel(logging.ERROR)  # It warns about each slow consumer.


class LoadFailed(Unavailable):
    """The hub rejected a message or closed a connection, so there are no figures."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A load: each of some requesters keeps `open_each` tasks open, with inputs and outputs of `payload_bytes`.

    Tasks are assigned `by` agent, in turn, or by capability, where the hub chooses the agent. The payload is one
    `string`, or `objects`: records with numbers, Unicode text, lists and nulls.
    """

    requesters: int = 8
    open_each: int = 16
    payload_bytes: int = 100
    by: str = "capability"
    workers: int = 8
    payload: str = "string"

    def payload_json(self) -> bytes:
        """Return the payload: `objects` are as many whole records as fit into `payload_bytes`."""
        if self.payload == "string":
            return orjson.dumps("x" * self.payload_bytes)
        count = self.payload_bytes // len(orjson.dumps(record(self.payload_bytes)))
        return orjson.dumps([record(number) for number in range(count)])


def record(number: int) -> dict[str, Any]:
    """Return an object as programs send them, with a value of each kind that JSON has."""
    return {
        "id": 1_000_000 + number,
        "name": f"Zoë 東京 {number:06}",
        "score": 0.1234567890123 + number,
        "is_active": number % 2 == 0,
        "tags": ["red", "grün", "blue"],
        "position": {"latitude": 52.520008, "longitude": -13.404954},
        "parent": None,
    }


def contestants(*options: str) -> dict[str, Callable[[], contextlib.AbstractContextManager[Server]]]:
    """Return functions that start the compared servers.

    These are the relay, the hub with these options on each event loop, and the hub on asyncio without packages.
    """
    return {
        "asyncio": lambda: hub(*options, loop="asyncio"),
        "uvloop": lambda: hub(*options, loop="uvloop"),
        "built in": lambda: hub(*options, loop="asyncio", is_bare=True),
        "relay": lambda: server(sys.executable, "-m", "benchmarks.relay"),
    }


def drive(coroutine: Coroutine[Any, Any, Row]) -> Row:
    """Run a load to its end on a new event loop, without pauses for garbage collections."""
    gc.collect()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(coroutine)
    finally:
        gc.enable()


class Client(WSListener):
    """One connection. It passes messages to `on_message(client, type, fields)`, except replies to `register`."""

    def __init__(self, owner: Clients, on_message: Callable[[Client, str, Any], None]) -> None:
        self.owner = owner
        self.on_message = on_message
        self.agent_id = ""
        self.registered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self.owner.fail("the hub closed a connection")

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.CLOSE:
            self.owner.fail(f"the hub closed a connection: {frame.get_close_code()} {frame.get_close_message()!r}")
            transport.disconnect()
        elif frame.msg_type == WSMsgType.TEXT:
            message = read(frame.get_payload_as_memoryview())
            if message["type"] == "register":
                self.agent_id = message["agent_id"]
                self.registered.set_result(None)
            elif message["type"] == "error":
                self.owner.fail(f"the hub rejected a message: {message}")
            else:
                self.on_message(self, message["type"], message)

    def send(self, raw: bytes) -> None:
        self.transport.send(WSMsgType.TEXT, raw)


def read(raw: memoryview) -> dict[str, Any]:
    """Parse a message; of a long one only `type` and `task_id`, which precede the payload."""
    if len(raw) <= READ_WHOLE_BYTES:
        message: dict[str, Any] = orjson.loads(raw)
        return message
    found = HEAD.search(bytes(raw[:512]))
    if found is None:
        raise LoadFailed("a long message does not begin with type and task_id")
    return {"type": found[1].decode(), "task_id": found[2].decode()}


class Clients:
    """The connections of one load, which close when its block ends. `wait` raises their first failure."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.clients: list[Client] = []
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._slots = asyncio.Semaphore(CONNECTING_MAX)

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Deregister all agents, so that the hub does not keep their sessions for the grace period."""
        self.failure.cancel()
        for client in self.clients:
            client.send(b'{"type":"deregister","id":"bye"}')
        left = [asyncio.ensure_future(client.transport.wait_disconnected()) for client in self.clients]
        await asyncio.wait(left, timeout=REST_S)
        for client in self.clients:
            client.transport.disconnect()
        await asyncio.wait(left)

    def fail(self, reason: str) -> None:
        if not self.failure.done():
            self.failure.set_exception(LoadFailed(reason))

    async def wait(self, seconds: float) -> None:
        """Wait for some seconds, or raise LoadFailed at the first failure."""
        await asyncio.wait([self.failure], timeout=seconds)
        if self.failure.done():
            self.failure.result()

    async def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait at most some seconds for a condition; return whether it holds."""
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            await self.wait(0.01)
        return condition()

    async def join(
        self, count: int, on_message: Callable[[Client, str, Any], None], capabilities: tuple[str, ...] = ()
    ) -> list[Client]:
        """Connect and register `count` agents."""
        joining = [self._join(f"agent-{number}", on_message, capabilities) for number in range(count)]
        joined = await asyncio.gather(*joining)
        await self.wait(0)
        return joined

    async def _join(self, name: str, on_message: Any, capabilities: tuple[str, ...]) -> Client:
        async with self._slots:
            try:
                _, client = await ws_connect(
                    lambda: Client(self, on_message), self.url, max_frame_size=2**24, read_buffer_init_size=2048
                )
            except (OSError, WSError) as error:
                raise LoadFailed(f"the hub did not accept a connection: {error}") from error
            self.clients.append(client)
            register = {"type": "register", "id": "r", "name": name, "capabilities": capabilities, "max_tasks": 1000}
            client.send(orjson.dumps(register))
            await asyncio.wait([client.registered, self.failure], timeout=WAIT_S, return_when="FIRST_COMPLETED")
            return client


class Traffic:
    """Requesters, workers and their tasks. It calls `on_end(requester, began)` at the end of each task."""

    def __init__(self, clients: Clients, shape: Shape) -> None:
        self.clients = clients
        self.shape = shape
        self.payload = shape.payload_json()
        self.open: dict[str, float] = {}  # The (scheduled) start of each open task.
        self.ended = 0
        self.on_end: Callable[[Client, float], None] = lambda requester, began: None
        self._numbers = itertools.count()
        self._run = os.urandom(4).hex()  # Makes task ids unique, because a hub remembers the tasks of earlier loads.

    async def join(self) -> None:
        workers = await self.clients.join(self.shape.workers, self._work, ("work",))
        self.requesters = await self.clients.join(self.shape.requesters, self._take)
        self._targets = itertools.cycle(
            [b'"capability":"work"']
            if self.shape.by == "capability"
            else [b'"agent_id":"%s"' % worker.agent_id.encode() for worker in workers]
        )

    def begin(self, requester: Client, at: float) -> None:
        """Delegate one task, whose latency is measured from `at`."""
        task_id = f"{self._run}-{next(self._numbers)}"
        self.open[task_id] = at
        task = task_id.encode()
        requester.send(
            b'{"type":"delegate","id":"%s","task_id":"%s",%s,"input":%s}'
            % (task, task, next(self._targets), self.payload)
        )

    def _work(self, worker: Client, kind: str, message: Any) -> None:
        if kind == "delegate":
            task = message["task_id"].encode()
            worker.send(
                b'{"type":"result","id":"%s","task_id":"%s","success":true,"output":%s}' % (task, task, self.payload)
            )

    def _take(self, requester: Client, kind: str, message: Any) -> None:
        if kind == "result":
            self.ended += 1
            self.on_end(requester, self.open.pop(message["task_id"]))


class Meter:
    """Measures the CPU time of the hub's process and of this one, from its creation until `stop`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._began = self._now()

    def _now(self) -> tuple[float, ...]:
        return time.monotonic(), cpu_s(self._pid), time.process_time(), queued_s(self._pid), queued_s(os.getpid())

    def stop(self) -> None:
        passed = [now - began for now, began in zip(self._now(), self._began, strict=True)]
        self.passed_s, self.hub_cpu_s, self.driver_cpu_s, self._hub_queued_s, self._driver_queued_s = passed

    def cores(self) -> Row:
        """Return the share of time that each process ran on a core, and waited for one because the machine was busy."""
        return {
            "hub_cores": self.hub_cpu_s / self.passed_s,
            "driver_cores": self.driver_cpu_s / self.passed_s,
            "hub_queued": self._hub_queued_s / self.passed_s,
            "driver_queued": self._driver_queued_s / self.passed_s,
        }


def note_contention(cores: Row, options: Options) -> None:
    """Add a note if the hub or the driver waited for a core, because other processes used them."""
    if max(cores["hub_queued"], cores["driver_queued"]) > QUEUED_MAX:
        options.note(
            "other processes used this machine: trust the CPU time per task, not tasks per second or latencies"
        )


def limit_of(cores: Row) -> str:
    """Return the bottleneck: the hub, or the driver, whose speed is then the result of the measurement.

    Waiting for a core counts as being busy.
    """
    if cores["hub_cores"] + cores["hub_queued"] >= BUSY_HUB_CORES:
        return "hub"
    return "driver" if cores["driver_cores"] + cores["driver_queued"] > BUSY_DRIVER_CORES else "neither"


async def closed_loop(url: str, pid: int, shape: Shape, seconds: float) -> Row:
    """Keep `shape.open_each` tasks of each requester open; return the throughput and its cost."""
    async with Clients(url) as clients:
        traffic = Traffic(clients, shape)
        await traffic.join()
        traffic.on_end = lambda requester, began: traffic.begin(requester, 0.0)
        for requester in traffic.requesters:
            for _ in range(shape.open_each):
                traffic.begin(requester, 0.0)
        # The load is steady only after all first tasks have ended.
        await clients.until(lambda: traffic.ended >= shape.requesters * shape.open_each, WARM_UP_S)
        await clients.wait(min(0.3, seconds))
        meter, before = Meter(pid), traffic.ended
        await clients.wait(seconds)
        meter.stop()
        ended = traffic.ended - before
        traffic.on_end = lambda requester, began: None
        await clients.until(lambda: not traffic.open, REST_S)
        if not ended:
            raise LoadFailed("no task ended")
        return {
            "tasks_per_s": ended / meter.passed_s,
            "hub_cpu_us_per_task": meter.hub_cpu_s / ended * 1e6,
            **meter.cores(),
        }


async def open_loop(url: str, pid: int, shape: Shape, tasks_per_s: float, seconds: float) -> Row:
    """Start tasks at a constant rate; return the share of completed ones, their `latencies_s`, and the cost."""
    async with Clients(url) as clients:
        traffic = Traffic(clients, shape)
        await traffic.join()
        latencies: list[float] = []
        traffic.on_end = lambda requester, began: latencies.append(time.monotonic() - began)
        turns, late_s = itertools.cycle(traffic.requesters), 0.0

        def send(scheduled: float) -> None:
            nonlocal late_s
            late_s = max(late_s, time.monotonic() - scheduled)
            traffic.begin(next(turns), scheduled)

        meter = Meter(pid)
        with Pace(tasks_per_s, send):
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and len(traffic.open) < OPEN_MAX:
                await clients.wait(0.01)
        meter.stop()
        completed = traffic.ended
        if not await clients.until(lambda: not traffic.open, WAIT_S):
            raise LoadFailed(f"{len(traffic.open)} tasks did not end")
        return {
            "latencies_s": sorted(latencies),
            "completed_share": completed / (meter.passed_s * tasks_per_s),
            "sent_late_s": late_s,
            **meter.cores(),
        }


async def idle(url: str, pid: int, agents: int, heartbeats_per_s: float, seconds: float) -> Row:
    """Register agents that only send heartbeats, in turn; return the cost of registrations and heartbeats."""
    async with Clients(url) as clients:
        answered = 0

        def count(client: Client, kind: str, message: Any) -> None:
            nonlocal answered
            answered += 1

        before_bytes, joining = memory_bytes(pid), Meter(pid)
        turns = itertools.cycle(await clients.join(agents, count, ("work",)))
        joining.stop()
        await clients.wait(min(1.0, seconds))
        after_bytes, beating = memory_bytes(pid), Meter(pid)
        with Pace(heartbeats_per_s, lambda scheduled: next(turns).send(b'{"type":"heartbeat","id":"h"}')):
            await clients.wait(seconds)
        beating.stop()
        if not answered:
            raise LoadFailed("no heartbeat was answered")
        return {
            "hub_bytes_per_agent": (after_bytes - before_bytes) / agents,
            "join_hub_cpu_us": joining.hub_cpu_s / agents * 1e6,
            "heartbeat_hub_cpu_us": beating.hub_cpu_s / answered * 1e6,
        }


async def broadcasts(url: str, pid: int, recipients: int, seconds: float) -> Row:
    """Send broadcasts, each after all agents have received the previous one; return the cost per recipient."""
    async with Clients(url) as clients:
        received = rounds = 0
        message = b'{"type":"broadcast","message":"%s"}' % (b"x" * 100)

        def count(client: Client, kind: str, fields: Any) -> None:
            nonlocal received, rounds
            received += 1
            if received == (rounds + 1) * recipients:
                rounds += 1
                sender.send(message)

        await clients.join(recipients, count)
        (sender,) = await clients.join(1, count)
        sender.send(message)
        await clients.until(lambda: rounds > 1, WAIT_S)
        before, meter = received, Meter(pid)
        await clients.wait(seconds)
        await clients.until(lambda: received > before, WAIT_S)
        meter.stop()
        reached = received - before
        return {
            "hub_cpu_us_per_recipient": meter.hub_cpu_s / reached * 1e6,
            "recipients_per_s": reached / meter.passed_s,
            **meter.cores(),
        }


async def fill(url: str, payload: bytes, tasks: int, memory: Callable[[], int]) -> Row:
    """Submit tasks that wait for an absent agent; return how much `memory` and the hub's own count grew."""
    async with Clients(url) as clients:
        replies: list[Any] = []
        (requester,) = await clients.join(1, lambda client, kind, fields: replies.append(fields))

        async def submit(first: int, last: int) -> Row:
            """Submit these tasks, and return the hub's status."""
            for number in range(first, last):
                requester.send(
                    b'{"type":"delegate","id":"r","task_id":"t%d","capability":"absent","wait":true,"ttl":3600,"input":%s}'
                    % (number, payload)
                )
                if number % 16 == 0:
                    await clients.until(lambda number=number: len(replies) >= number - 48, WAIT_S)
            requester.send(b'{"type":"status","id":"s"}')
            if not await clients.until(lambda: bool(replies) and "hub" in replies[-1], WAIT_S):
                raise LoadFailed("the hub did not accept all tasks")
            hub: Row = replies.pop()["hub"]
            return hub

        before, began = await submit(0, 1), memory()
        after = await submit(1, tasks + 1)
        return {
            "tasks": tasks,
            "payload_bytes": len(payload),
            "memory_bytes": memory() - began,
            "counted_bytes": after["records_bytes"] - before["records_bytes"],
        }


class TimerSpec(ctypes.Structure):
    """struct itimerspec of timerfd_settime(2)."""

    _fields_ = [(name, ctypes.c_long) for name in ("interval_s", "interval_ns", "value_s", "value_ns")]


class Pace:
    """Calls `send(scheduled)` at a constant rate while its block runs; `scheduled` is a time of time.monotonic().

    It uses Linux's timerfd, because the timers of the event loop have a resolution of a millisecond. Late calls follow
    as soon as possible, with their scheduled times.
    """

    def __init__(self, per_s: float, send: Callable[[float], None]) -> None:
        self._interval_ns = round(1e9 / per_s)
        self._send = send
        self._sent = 0

    def __enter__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._timer = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        self._first_ns = time.monotonic_ns() + self._interval_ns
        spec = TimerSpec(*divmod(self._interval_ns, 10**9), *divmod(self._first_ns, 10**9))
        if self._timer < 0 or libc.timerfd_settime(self._timer, 1, ctypes.byref(spec), None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd")
        asyncio.get_running_loop().add_reader(self._timer, self._on_time)

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._timer)
        os.close(self._timer)

    def _on_time(self) -> None:
        for _ in range(int.from_bytes(os.read(self._timer, 8), "little")):
            self._send((self._first_ns + self._sent * self._interval_ns) / 1e9)
            self._sent += 1
