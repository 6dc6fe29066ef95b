"""What puts load on a hub: agents that cost little, on picows, uvloop and orjson.

Closed loops keep a number of tasks open; open loops send on a schedule, whatever comes back, and count waiting from the
moment that was planned. Everything runs in this process, so that its CPU can be compared with the hub's: `limit` says
which of the two was busy all the time, and figures with `driver` there say little about the hub.
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

WARM_UP_S = 20.0  # The longest before a closed loop is measured.
REST_S = 20.0  # The longest for the hub to come to rest after a load.
WAIT_S = 30.0  # The bound on each wait for the hub.
CONNECTING_MAX = 64  # Handshakes under way at a time.
READ_WHOLE_BYTES = 4096  # Of a longer message only the head is looked at.
HEAD = re.compile(rb'"type": ?"(\w+)".*?"task_id": ?"([^"]+)"')
BUSY_HUB_CORES, BUSY_DRIVER_CORES = 0.85, 0.9  # From here on a process counts as having no more to give.
QUEUED_MAX = 0.15  # Share of the time that a process may wait for a core before it is worth a note.
OPEN_MAX = 20_000  # Open tasks in an open loop; with more of them the hub has not kept up.


logging.getLogger("picows").setLevel(logging.ERROR)  # It warns of each connection that is slow to take what is sent.


class LoadFailed(Unavailable):
    """The hub refused something or closed a connection: there is no figure."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is asked for: so many requesters with so many `open_each` tasks of `payload_bytes`, there and back.

    `by` is how the worker is chosen: by `agent`, in turn, or by `capability`, which leaves it to the hub.
    """

    requesters: int = 8
    open_each: int = 16
    payload_bytes: int = 100
    by: str = "capability"
    workers: int = 8


def contestants(*options: str) -> dict[str, Callable[[], contextlib.AbstractContextManager[Server]]]:
    """Return what is compared, ready to be started: the relay, and the hub with these options on each event loop and on
    asyncio with nothing but what is built in.
    """
    return {
        "asyncio": lambda: hub(*options, loop="asyncio"),
        "uvloop": lambda: hub(*options, loop="uvloop"),
        "built in": lambda: hub(*options, loop="asyncio", is_bare=True),
        "relay": lambda: server(sys.executable, "-m", "benchmarks.relay"),
    }


def drive(coroutine: Coroutine[Any, Any, Row]) -> Row:
    """Run a load to its end on an event loop of its own, without the pauses of the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(coroutine)
    finally:
        gc.enable()


class Client(WSListener):
    """One connection. What comes in goes to `on_message(client, type, fields)`, replies to register aside."""

    def __init__(self, crowd: Crowd, on_message: Callable[[Client, str, Any], None]) -> None:
        self.crowd = crowd
        self.on_message = on_message
        self.agent_id = ""
        self.registered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self.crowd.fail("the hub closed a connection")

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.CLOSE:
            self.crowd.fail(f"the hub closed a connection: {frame.get_close_code()} {frame.get_close_message()!r}")
            transport.disconnect()
        elif frame.msg_type == WSMsgType.TEXT:
            message = read(frame.get_payload_as_memoryview())
            if message["type"] == "register":
                self.agent_id = message["agent_id"]
                self.registered.set_result(None)
            elif message["type"] == "error":
                self.crowd.fail(f"the hub refused a message: {message}")
            else:
                self.on_message(self, message["type"], message)

    def send(self, raw: bytes) -> None:
        self.transport.send(WSMsgType.TEXT, raw)


def read(raw: memoryview) -> dict[str, Any]:
    """Return a message; of a long one only its type and its task, which stand before the payload."""
    if len(raw) <= READ_WHOLE_BYTES:
        message: dict[str, Any] = orjson.loads(raw)
        return message
    found = HEAD.search(bytes(raw[:512]))
    if found is None:
        raise LoadFailed("a long message has no type and task at its beginning")
    return {"type": found[1].decode(), "task_id": found[2].decode()}


class Crowd:
    """The connections of one load, closed when its block ends. `wait` raises their first failure."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.clients: list[Client] = []
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._slots = asyncio.Semaphore(CONNECTING_MAX)

    async def __aenter__(self) -> Crowd:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Take leave, so that the hub is as it was: it would keep the place of who is just gone."""
        self.failure.cancel()
        for client in self.clients:
            client.send(b'{"type":"deregister","id":"bye"}')
        left = [asyncio.ensure_future(client.transport.wait_disconnected()) for client in self.clients]
        await asyncio.wait(left, timeout=REST_S)
        for client in self.clients:
            client.transport.disconnect()
        await asyncio.wait(left)

    def fail(self, why: str) -> None:
        if not self.failure.done():
            self.failure.set_exception(LoadFailed(why))

    async def wait(self, seconds: float) -> None:
        """Let so much time pass, and raise LoadFailed if something has failed meanwhile."""
        await asyncio.wait([self.failure], timeout=seconds)
        if self.failure.done():
            self.failure.result()

    async def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until a condition holds, but no longer than that; return whether it does."""
        over = time.monotonic() + seconds
        while not condition() and time.monotonic() < over:
            await self.wait(0.01)
        return condition()

    async def join(
        self, count: int, on_message: Callable[[Client, str, Any], None], capabilities: tuple[str, ...] = ()
    ) -> list[Client]:
        """Connect and register so many agents."""
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
                raise LoadFailed(f"the hub did not take a connection: {error}") from error
            self.clients.append(client)
            register = {"type": "register", "id": "r", "name": name, "capabilities": capabilities, "max_tasks": 1000}
            client.send(orjson.dumps(register))
            await asyncio.wait([client.registered, self.failure], timeout=WAIT_S, return_when="FIRST_COMPLETED")
            return client


class Traffic:
    """Requesters and workers, and the tasks between them. `on_end(requester, began)` is called at the end of each."""

    def __init__(self, crowd: Crowd, shape: Shape) -> None:
        self.crowd = crowd
        self.shape = shape
        self.payload = orjson.dumps("x" * shape.payload_bytes)
        self.open: dict[str, float] = {}  # When each open task began, or should have.
        self.ended = 0
        self.on_end: Callable[[Client, float], None] = lambda requester, began: None
        self._numbers = itertools.count()
        self._run = os.urandom(4).hex()  # A hub remembers the tasks of earlier loads.

    async def join(self) -> None:
        workers = await self.crowd.join(self.shape.workers, self._work, ("work",))
        self.requesters = await self.crowd.join(self.shape.requesters, self._take)
        self._targets = itertools.cycle(
            [b'"capability":"work"']
            if self.shape.by == "capability"
            else [b'"agent_id":"%s"' % worker.agent_id.encode() for worker in workers]
        )

    def begin(self, requester: Client, at: float) -> None:
        """Delegate one task that counts from then on."""
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
    """What the hub, a process, and this one use from its making on. Seconds of CPU, and cores: those per second."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._began = self._now()

    def _now(self) -> tuple[float, ...]:
        return time.monotonic(), cpu_s(self._pid), time.process_time(), queued_s(self._pid), queued_s(os.getpid())

    def stop(self) -> None:
        passed = [now - began for now, began in zip(self._now(), self._began, strict=True)]
        self.passed_s, self.hub_cpu_s, self.driver_cpu_s, self._hub_queued_s, self._driver_queued_s = passed

    def cores(self) -> Row:
        """Return the share of a core that each had, and had to wait for because the machine was busy."""
        return {
            "hub_cores": self.hub_cpu_s / self.passed_s,
            "driver_cores": self.driver_cpu_s / self.passed_s,
            "hub_queued": self._hub_queued_s / self.passed_s,
            "driver_queued": self._driver_queued_s / self.passed_s,
        }


def note_crowding(cores: Row, options: Options) -> None:
    """Say so if the hub or the driver had to wait for a core, because other processes had them."""
    if max(cores["hub_queued"], cores["driver_queued"]) > QUEUED_MAX:
        options.note("other processes took a part of this machine: trust CPU per task, not tasks per second or times")


def limit_of(cores: Row) -> str:
    """Return who had no more to give: the hub, or the driver of the load, which is then what was measured.

    Who waits for a core is as busy as who has one.
    """
    if cores["hub_cores"] + cores["hub_queued"] >= BUSY_HUB_CORES:
        return "hub"
    return "driver" if cores["driver_cores"] + cores["driver_queued"] > BUSY_DRIVER_CORES else "neither"


async def closed_loop(url: str, pid: int, shape: Shape, seconds: float) -> Row:
    """Keep `shape.open_each` tasks of each requester open; return what went through in that time, and its cost."""
    async with Crowd(url) as crowd:
        traffic = Traffic(crowd, shape)
        await traffic.join()
        traffic.on_end = lambda requester, began: traffic.begin(requester, 0.0)
        for requester in traffic.requesters:
            for _ in range(shape.open_each):
                traffic.begin(requester, 0.0)
        # Every requester is served at its own pace only when all first tasks have gone through.
        await crowd.until(lambda: traffic.ended >= shape.requesters * shape.open_each, WARM_UP_S)
        await crowd.wait(min(0.3, seconds))
        meter, before = Meter(pid), traffic.ended
        await crowd.wait(seconds)
        meter.stop()
        ended = traffic.ended - before
        traffic.on_end = lambda requester, began: None
        await crowd.until(lambda: not traffic.open, REST_S)
        if not ended:
            raise LoadFailed("no task came to its end")
        return {
            "tasks_per_s": ended / meter.passed_s,
            "hub_cpu_us_per_task": meter.hub_cpu_s / ended * 1e6,
            **meter.cores(),
        }


async def open_loop(url: str, pid: int, shape: Shape, tasks_per_s: float, seconds: float) -> Row:
    """Begin tasks at an even pace; return how many came back, their `waits_s` from the planned moment, and the cost."""
    async with Crowd(url) as crowd:
        traffic = Traffic(crowd, shape)
        await traffic.join()
        waits: list[float] = []
        traffic.on_end = lambda requester, began: waits.append(time.monotonic() - began)
        turns, late_s = itertools.cycle(traffic.requesters), 0.0

        def send(planned: float) -> None:
            nonlocal late_s
            late_s = max(late_s, time.monotonic() - planned)
            traffic.begin(next(turns), planned)

        meter = Meter(pid)
        with Pace(tasks_per_s, send):
            over = time.monotonic() + seconds
            while time.monotonic() < over and len(traffic.open) < OPEN_MAX:
                await crowd.wait(0.01)
        meter.stop()
        came_back = traffic.ended
        if not await crowd.until(lambda: not traffic.open, WAIT_S):
            raise LoadFailed(f"{len(traffic.open)} tasks did not come back")
        return {
            "waits_s": sorted(waits),
            "came_back": came_back / (meter.passed_s * tasks_per_s),
            "sent_late_s": late_s,
            **meter.cores(),
        }


async def idle(url: str, pid: int, agents: int, heartbeats_per_s: float, seconds: float) -> Row:
    """Let agents join and be silent but for their heartbeats, in turn; return what each of the two costs the hub."""
    async with Crowd(url) as crowd:
        answered = 0

        def count(client: Client, kind: str, message: Any) -> None:
            nonlocal answered
            answered += 1

        before_bytes, joining = memory_bytes(pid), Meter(pid)
        turns = itertools.cycle(await crowd.join(agents, count, ("work",)))
        joining.stop()
        await crowd.wait(min(1.0, seconds))
        after_bytes, beating = memory_bytes(pid), Meter(pid)
        with Pace(heartbeats_per_s, lambda planned: next(turns).send(b'{"type":"heartbeat","id":"h"}')):
            await crowd.wait(seconds)
        beating.stop()
        if not answered:
            raise LoadFailed("no heartbeat was answered")
        return {
            "hub_bytes_per_agent": (after_bytes - before_bytes) / agents,
            "join_hub_cpu_us": joining.hub_cpu_s / agents * 1e6,
            "heartbeat_hub_cpu_us": beating.hub_cpu_s / answered * 1e6,
        }


async def broadcasts(url: str, pid: int, recipients: int, seconds: float) -> Row:
    """Send one broadcast after the other, each when everybody has the last one; return what a recipient costs."""
    async with Crowd(url) as crowd:
        received = rounds = 0
        message = b'{"type":"broadcast","message":"%s"}' % (b"x" * 100)

        def count(client: Client, kind: str, fields: Any) -> None:
            nonlocal received, rounds
            received += 1
            if received == (rounds + 1) * recipients:
                rounds += 1
                sender.send(message)

        await crowd.join(recipients, count)
        (sender,) = await crowd.join(1, count)
        sender.send(message)
        await crowd.until(lambda: rounds > 1, WAIT_S)
        before, meter = received, Meter(pid)
        await crowd.wait(seconds)
        await crowd.until(lambda: received > before, WAIT_S)
        meter.stop()
        reached = received - before
        return {
            "hub_cpu_us_per_recipient": meter.hub_cpu_s / reached * 1e6,
            "recipients_per_s": reached / meter.passed_s,
            **meter.cores(),
        }


class TimerSpec(ctypes.Structure):
    """struct itimerspec of timerfd_settime(2)."""

    _fields_ = [(name, ctypes.c_long) for name in ("interval_s", "interval_ns", "value_s", "value_ns")]


class Pace:
    """Calls `send(planned)` so often a second while its block runs, `planned` being the moment by time.monotonic().

    On Linux's timerfd, because the timers of the event loop are no finer than a millisecond. What could not be sent in
    time is sent as soon as possible, each with the moment that was planned for it.
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
