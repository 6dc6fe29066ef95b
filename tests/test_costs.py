"""The costs of the hot path, counted rather than timed, so that a regression fails on any machine.

The tests count encodings, writes, and instructions of the interpreter (`sys.settrace`). Instructions differ between
Python versions, so they are compared with the same work in a smaller hub.
"""

from __future__ import annotations

import asyncio
import collections
import gc
import json
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import agenthub
from agenthub import (
    Broadcast,
    Capability,
    Delegate,
    Discover,
    Heartbeat,
    LocalHub,
    PackageMissing,
    Register,
    Result,
    ServerLink,
    run_loop,
)
from tests.harness import Client, HubHarness, rank_of
from tests.raw_websocket import frame

FEW, MANY = 10, 1000
OPEN = 2000
GROWTH_MAX = 1.3


def instructions(act: Callable[[], None]) -> int:
    """Return the number of instructions of agenthub.py that a call runs."""
    counted = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal counted
        if frame.f_code.co_filename != agenthub.__file__:
            return None
        frame.f_trace_opcodes = True
        counted += event == "opcode"
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(former)
    return counted


class Filled:
    """Return a hub with so many agents, five of which have a rare capability, and so many open tasks."""

    def __init__(self, agents: int, open_tasks: int) -> None:
        self.world = HubHarness(open_tasks_max=10**6)
        share = open_tasks // agents
        names = ["rare-work"] * 5 + [f"common-{number}" for number in range(agents - 5)]
        for name in names:
            self.world.join("worker", name, "work", max_tasks=share + 10, description=f"Does {name} well")
        self.requester = self.world.join("requester")
        for number in range(open_tasks):
            capability = "work" if number % 2 else "nobody"
            self.requester.ask(Delegate(task_id=f"open-{number}", capability=capability, wait=True, ttl=1000.0))
        for program in self.world.clients.values():
            program.inbox.clear()
        self.serial = 0

    def whole_life(self) -> None:
        self.serial += 1
        self.requester.ask(Delegate(task_id=f"t{self.serial}", capability="work", input="x"))
        (worker,) = [one for one in self.world.clients.values() if one.inbox and one is not self.requester]
        worker.ask(Result(task_id=f"t{self.serial}", success=True, output="x"))
        worker.inbox.clear()
        self.requester.inbox.clear()


@pytest.fixture(scope="module")
def filled() -> tuple[Filled, Filled]:
    hubs = Filled(FEW, 0), Filled(MANY, OPEN)
    for hub in hubs:
        instructions(hub.whole_life)  # CPython 3.12 reports no instruction to the first trace of a process.
    return hubs


OPERATIONS: dict[str, Callable[[Filled], object]] = {
    "a task's life": lambda hub: hub.whole_life(),
    "discover by name": lambda hub: hub.requester.ask(Discover(capability="rare-work")),
    "discover by a part": lambda hub: hub.requester.ask(Discover(capability="are-w")),
    "discover by a word of a description": lambda hub: hub.requester.ask(Discover(capability="rare")),
    "heartbeat": lambda hub: hub.requester.ask(Heartbeat()),
    "broadcast to five": lambda hub: hub.requester.ask(Broadcast(message="x", capability="rare-work")),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_cost_does_not_grow_with_the_hub(filled: tuple[Filled, Filled], operation: str) -> None:
    costs = []
    for hub in filled:
        OPERATIONS[operation](hub)  # One-time work is not counted.
        costs.append(sum(instructions(lambda hub=hub: OPERATIONS[operation](hub)) for _ in range(5)))
    small, large = costs
    assert 0 < large <= GROWTH_MAX * small


def test_tick_touches_what_is_due_and_nothing_else(filled: tuple[Filled, Filled]) -> None:
    costs = []
    for hub in filled:
        hub.requester.ask(Delegate(task_id="short", capability="nobody", wait=True, ttl=0.001))
        hub.world.now += 0.002
        costs.append(instructions(lambda hub=hub: hub.world.tick()))
        assert [message.state for message in hub.requester.inbox if message.type == "result"] == ["timeout"]
    small, large = costs
    assert 0 < large <= GROWTH_MAX * small


class Sink:
    """A transport that discards what is written."""

    link: ServerLink

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def write(self, raw: bytes) -> None:
        self.writes.append(raw)

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        asyncio.get_running_loop().call_soon(self.link.connection_lost, None)

    abort = close


REQUEST = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Wire:
    """A server's link to a hub, fed by hand."""

    def __init__(self, hub: LocalHub) -> None:
        self.sink = Sink()
        self.link = ServerLink(hub, lambda link, request: None, message_bytes_max=2**20, backlog_bytes_max=2**23)
        self.sink.link = self.link
        self.link.connection_made(self.sink)
        self.link.data_received(REQUEST)

    def say(self, *messages: agenthub.AgentMessage) -> None:
        """Receive messages in one chunk."""
        frames = (frame(agenthub.encode(message)) for message in messages)
        self.link.data_received(b"".join(frames))


@pytest.fixture
async def hub() -> AsyncIterator[LocalHub]:
    async with LocalHub() as hub:
        yield hub
        for link in list(hub.links):
            link.abort()


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """The number of encodings of each type of message."""
    counts: collections.Counter[str] = collections.Counter()
    encode = agenthub.encode

    def counting(message: Any) -> bytes:
        counts[type(message).__name__] += 1
        return encode(message)

    monkeypatch.setattr(agenthub, "encode", counting)
    return counts


async def test_task_is_four_encodings_and_its_messages_share_writes(
    hub: LocalHub, encoded: collections.Counter[str]
) -> None:
    worker, requester = Wire(hub), Wire(hub)
    worker.say(Register(id="r", name="w", capabilities=["work"], max_tasks=100))
    requester.say(Register(id="r", name="r"))
    await asyncio.sleep(0)
    encoded.clear()
    for wire in (worker, requester):
        wire.sink.writes.clear()
    tasks = [Delegate(id=f"d{number}", task_id=f"t{number}", capability="work") for number in range(8)]
    requester.say(*tasks)
    await asyncio.sleep(0)
    assert (len(requester.sink.writes), len(worker.sink.writes)) == (1, 1)  # Eight messages in each.
    worker.say(*(Result(id=f"r{task.task_id}", task_id=task.task_id, success=True) for task in tasks))
    await asyncio.sleep(0)
    assert (len(requester.sink.writes), len(worker.sink.writes)) == (2, 2)
    of_the_hub = {name: count for name, count in encoded.items() if name not in ("Delegate", "Result")}
    assert of_the_hub == {"TaskAck": 16, "Delegated": 8, "TaskOutcome": 8}


async def test_what_is_much_together_does_not_wait_for_the_turn_to_end(hub: LocalHub) -> None:
    wire = Wire(hub)
    await asyncio.sleep(0)
    wire.sink.writes.clear()
    wire.link.send(b"x" * (agenthub.OUT_BYTES_MAX // 2))
    assert wire.sink.writes == []
    wire.link.send(b"x" * agenthub.OUT_BYTES_MAX)
    assert len(wire.sink.writes) == 1
    await asyncio.sleep(0)
    assert len(wire.sink.writes) == 1


async def test_broadcast_is_encoded_once(hub: LocalHub, encoded: collections.Counter[str]) -> None:
    wires = [Wire(hub) for _ in range(20)]
    for number, wire in enumerate(wires):
        wire.say(Register(id="r", name=f"a{number}"))
    encoded.clear()
    wires[0].say(Broadcast(id="b", message={"deploy": "v2"}))
    assert encoded == {"Broadcast": 1, "BroadcastDelivery": 1, "BroadcastReply": 1}
    await asyncio.sleep(0)
    assert all(b'"deploy":"v2"' in wire.sink.writes[-1] for wire in wires[1:])


async def test_many_messages_arm_the_timer_once(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    armed = 0
    next_deadline = hub.hub.next_deadline

    def counting() -> float:
        nonlocal armed
        armed += 1
        return next_deadline()

    monkeypatch.setattr(hub.hub, "next_deadline", counting)
    wire = Wire(hub)
    wire.say(Register(id="r", name="r"))
    await asyncio.sleep(0)
    armed = 0
    wire.say(*(Heartbeat(id=str(number)) for number in range(100)))
    await asyncio.sleep(0)
    assert armed == 1


async def test_idle_agent_takes_little_memory(hub: LocalHub) -> None:
    def join(number: int) -> Wire:
        wire = Wire(hub)
        wire.say(Register(id="r", name=f"agent-{number}", capabilities=[f"work-{number % 7}"]))
        return wire

    wires = [join(number) for number in range(50)]  # Shared by all agents.
    await asyncio.sleep(0)
    gc.collect()
    tracemalloc.start()
    try:
        wires += [join(number) for number in range(300)]
        await asyncio.sleep(0)
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / 300 < 10_000  # Without the socket, its transport, and memory that the interpreter does not count.


async def test_flag_wakes_who_waits_and_forgets_who_does_not() -> None:
    flag = agenthub.LightEvent()
    waiting = [asyncio.create_task(flag.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    assert len(flag.waiters) == 2
    waiting[1].cancel()
    flag.set()  # Before the one that was cancelled has noticed.
    flag.clear()
    await asyncio.wait(waiting)
    assert [task.cancelled() for task in waiting] == [True, True, False]
    assert not flag.is_set()


# Discovery scans few agents, and finds what a scan of all finds


WORDS = st.sampled_from(["test", "tests", "run-test", "Run", "te", "t", "a_b", "latest", "sing", "Ära", "x.y"])
NAMES = st.lists(WORDS, min_size=1, max_size=3).map("-".join)
AGENTS = st.lists(
    st.tuples(st.lists(NAMES, max_size=3, unique=True), st.lists(WORDS, max_size=3).map(" ".join)), max_size=6
)


@given(AGENTS, NAMES, st.lists(st.integers(0, 5), max_size=3))
def test_finder_agrees_with_looking_at_all(
    agents: list[tuple[list[str], str]], keyword: str, leaving: list[int]
) -> None:
    world = HubHarness()
    there: list[tuple[Client, list[str], str]] = []
    for number, (names, description) in enumerate(agents):
        program = world.join(f"a{number}", *(Capability(name, "") for name in names), description=description)
        there.append((program, names, description))
    for number in leaving:
        if number < len(there):
            there.pop(number)[0].ask(agenthub.Deregister())
    expected = {}
    for program, names, description in there:
        ranks = [agenthub.match_rank(keyword.lower(), name.lower(), agenthub.words_of(name)) for name in names]
        ranks += [3] if keyword.lower() in agenthub.words_of(description) else []
        found = [rank for rank in ranks if rank is not None]
        if found:
            expected[program.agent_id] = min(found)
    ranks_found = world.hub.directory.index.ranks(keyword.lower())
    assert {agent.agent_id: rank for agent, rank in ranks_found.items()} == expected


@pytest.mark.parametrize("index_max", [0, 20, 250_000])
def test_index_is_bounded_and_finds_what_is_not_in_it(index_max: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "INDEX_MAX", index_max)
    world = HubHarness()
    programs = [world.join(f"a{number}", f"translate-{number}", description=f"word{number}") for number in range(20)]
    assert world.hub.directory.index.by_part.listed_count <= index_max
    assert world.hub.directory.index.by_word.listed_count <= index_max
    for number, program in enumerate(programs):
        assert rank_of(world, f"translate-{number}", program) == 0
        assert rank_of(world, f"word{number}", program) == 3
    for program in programs[::-1]:
        program.ask(agenthub.Deregister())
    assert len(world.hub.directory.index) == 0


def test_index_is_empty_when_all_have_left() -> None:
    world = HubHarness()
    programs = [world.join("a", f"work-{number}", description="Does it") for number in range(5)]
    programs[0].register("a", "other", description="Changed")
    assert len(world.hub.directory.index) > 0
    for program in programs:
        program.ask(agenthub.Deregister())
    assert len(world.hub.directory.index) == 0


# Lazy imports


@pytest.mark.parametrize("program", ["import agenthub", "import agenthub; agenthub.argument_parser([]).format_help()"])
def test_import_and_help_bring_in_nothing_heavy(program: str) -> None:
    heavy = ["asyncio", "ssl", "sqlite3", "pydantic", "websockets", "uvloop", "concurrent.futures", "tomllib", "http"]
    program += f"\nimport json, sys; print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []


COMPILED_MAX = 180  # Functions that dataclasses and named tuples compile on import; each takes 0.1 ms.


def test_import_compiles_few_functions() -> None:
    program = (
        "import logging, sys, json, inspect, dataclasses, heapq\n"
        "compiled = []\n"
        "sys.addaudithook(lambda event, args: event == 'compile' and args[1] == '<string>' and compiled.append(args))\n"
        "import agenthub\n"
        "print(len(compiled))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(found.stdout) <= COMPILED_MAX


def test_program_runs_the_file_once() -> None:
    program = (
        "import runpy, sys, agenthub\n"
        "sys.argv = ['agenthub', '--version']\n"
        "try:\n    runpy.run_module('agenthub', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as ended:\n    print(ended.code)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [f"agenthub {agenthub.__version__}", "0"]


# Event loops


async def loop_name() -> str:
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


def test_loop_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_loop(loop_name(), "asyncio") == "asyncio"
    monkeypatch.setitem(sys.modules, "uvloop", None)  # As if it were not installed.
    assert run_loop(loop_name()) == "asyncio"
    with pytest.raises(PackageMissing, match="pip install uvloop"):
        run_loop(loop_name(), "uvloop")
    with pytest.raises(ValueError, match="must be one of auto, asyncio, uvloop"):
        run_loop(loop_name(), "trio")


def test_uvloop_is_used_where_it_is_installed() -> None:
    pytest.importorskip("uvloop")
    assert run_loop(loop_name()) == run_loop(loop_name(), "uvloop") == "uvloop"
