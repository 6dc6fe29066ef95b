"""Real faults: processes killed by SIGKILL or paused by SIGSTOP, and connections that break in transit."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agenthub
from agenthub import Agent, Task, TaskFailed
from tests.support import WAIT_S, RawClient, raw_client, running

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL, SIGSTOP and SIGCONT")

RETRIES_MAX = 100
RUNS = [(3, 400), pytest.param(20, 5000, marks=pytest.mark.long)]  # Kills and tasks of a run.
UNLUCKY = 13  # Tasks whose number ends with it fail, as they should.
RUN_S = 4 * WAIT_S  # The limit of a whole run.
HASTE = {"BACKOFF_FIRST_S": 0.02, "BACKOFF_MAX_S": 0.1}  # Reconnecting would otherwise take most of the time.

WORKER = f"""
import asyncio, os
import agenthub
from agenthub import Agent, Task

agenthub.BACKOFF_FIRST_S, agenthub.BACKOFF_MAX_S = {HASTE["BACKOFF_FIRST_S"]}, {HASTE["BACKOFF_MAX_S"]}
BEGUN = os.open(os.environ["BEGUN"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

class Worker(Agent):
    pass

def note(task, word="begun"):
    os.write(BEGUN, f"{{word}} {{task.task_id}} {{task.attempt}} {{os.getpid()}}\\n".encode())

worker = Worker("worker", max_tasks=16)

@worker.capability
async def square(task: Task):
    note(task)
    await asyncio.sleep(0.02)
    return task.input["number"] ** 2

@worker.capability
async def held(task: Task):
    note(task)
    while not os.path.exists(task.input["gate"]):
        await asyncio.sleep(0.02)
    note(task, "done")
    return os.getpid()
"""


# Helpers


@pytest.fixture
def port() -> int:
    """Return a port below the ephemeral range: it stays free while the hub is down.

    An outgoing connection could take an ephemeral port, even an agent that then connects to itself.
    """
    for _ in range(100):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", random.randrange(20_000, 32_000)))
            return int(one.getsockname()[1])
    raise AssertionError("no port is free")


@pytest.fixture
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the agents of this process reconnect almost immediately."""
    for name, value in HASTE.items():
        monkeypatch.setattr(agenthub, name, value)


# Imports before it is told to start, so that a restart does not cost the import time.
READY = "import sys, agenthub; agenthub.codec(); sys.stdin.readline(); sys.exit(agenthub.main(sys.argv[1:]))"


class Mortal:
    """A command of agenthub in a process that is killed by SIGKILL and restarted. The block's end kills it for good."""

    def __init__(self, *args: str, log: Path, env: dict[str, str] | None = None) -> None:
        self.args = args
        self.log = log
        self._env = env or {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Mortal:
        self._log_file = self._stack.enter_context(self.log.open("ab"))
        self._spare = self._prepared()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _prepared(self) -> Any:
        return self._stack.enter_context(running("-c", READY, *self.args, stderr=self._log_file, env=self._env))

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def start(self) -> None:
        """Start the next process; wait until a hub listens."""
        self.process = self._spare
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        if self.args[0] == "hub":
            line = self.process.stdout.readline()
            assert line.startswith("listening on ws://"), f"the hub did not start:\n{self.log.read_text()[-2000:]}"
        self._spare = self._prepared()

    def kill(self) -> None:
        assert self.process.poll() is None, f"it had ended before it was killed:\n{self.log.read_text()[-2000:]}"
        self.process.kill()
        self.process.wait(WAIT_S)

    async def replace(self) -> None:
        """Kill the process, and start the next."""
        self.kill()
        await asyncio.to_thread(self.start)

    def check_log(self) -> None:
        """Assert that its log holds no error and no traceback."""
        text = self.log.read_text()
        found = [line for line in text.splitlines() if " ERROR " in line or line.startswith("Traceback")]
        assert not found, f"{self.args[0]} has logged:\n{text[-4000:]}"


def hub_url(port: int) -> str:
    return f"ws://127.0.0.1:{port}"


def mortal_hub(tmp_path: Path, port: int, *args: str) -> Mortal:
    """Return a hub with a journal, always on the same port."""
    return Mortal("hub", "--port", str(port), "--db", str(tmp_path / "hub.db"), *args, log=tmp_path / "hub.log")


def mortal_worker(tmp_path: Path, port: int, code: str = WORKER, *args: str) -> Mortal:
    """Return a process with this module's worker, which records the attempts that it begins; see `noted`."""
    path = tmp_path / "worker.py"
    path.write_text(code)
    env = {"BEGUN": str(tmp_path / "begun"), "AGENTHUB_URL": hub_url(port)}
    return Mortal("agent", str(path), *args, log=tmp_path / "worker.log", env=env)


def noted(tmp_path: Path, word: str = "begun") -> list[tuple[str, int, int]]:
    """Return the task, attempt and process of each line that the workers have recorded."""
    path = tmp_path / "begun"
    lines = path.read_text().splitlines() if path.exists() else []
    fields = [line.split() for line in lines]
    return [(task_id, int(attempt), int(pid)) for kind, task_id, attempt, pid in fields if kind == word]


async def until(condition: Callable[[], Any], what: str) -> None:
    """Wait up to WAIT_S until a condition holds."""
    last = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < last, f"still not so: {what}"
        await asyncio.sleep(0.01)


async def until_state(client: RawClient, task_id: str, state: str, attempt: int) -> None:
    """Wait until the hub reports this state and attempt of a task."""
    last = time.monotonic() + WAIT_S
    while True:
        report = await client.request(type="status", task_id=task_id)
        if (report.get("state"), report.get("attempt")) == (state, attempt):
            return
        assert time.monotonic() < last, f"{task_id} should be {state} in attempt {attempt}: {report}"
        await asyncio.sleep(0.01)


class Moments:
    """Count events, so that faults happen at a point of the run and not at a time."""

    def __init__(self) -> None:
        self.count = 0
        self._awaited: tuple[int, asyncio.Event] | None = None

    def __call__(self) -> None:
        self.count += 1
        if self._awaited is not None and self.count >= self._awaited[0]:
            self._awaited[1].set()

    async def reach(self, count: int) -> None:
        if self.count < count:
            self._awaited = (count, asyncio.Event())
            await self._awaited[1].wait()


class Requester(Agent):
    """An agent that delegates squares, and records every outcome that is delivered to it."""

    def __init__(self, name: str, moments: Moments, **options: Any) -> None:
        super().__init__(name, **options)
        self.moments = moments
        self.told: dict[str, list[agenthub.TaskOutcome]] = collections.defaultdict(list)
        self.ends: dict[int, agenthub.TaskOutcome] = {}
        self.troubles: list[str] = []

    def _on_message(self, message: Any) -> None:
        if isinstance(message, agenthub.TaskOutcome):
            self.told[message.task_id].append(message)
        super()._on_message(message)

    async def ask(self, numbers: Iterator[int], max_retries: Callable[[int], int]) -> None:
        """Delegate the squares of the numbers, one after the other."""
        for number in numbers:
            options = {"task_id": f"task-{number}", "max_retries": max_retries(number), "wait": True}
            try:
                handle = await self.submit("square", {"number": number}, **options)
                self.moments()
                with contextlib.suppress(TaskFailed):
                    await handle.result()
            except Exception as error:
                self.troubles.append(f"task-{number}: {error!r}")
                continue
            self.moments()
            if handle.outcome is not None:
                self.ends[number] = handle.outcome

    def contradictions(self) -> list[str]:
        """Return the tasks with a delivered outcome that differs from the final one."""
        ends = {f"task-{number}": end for number, end in self.ends.items()}
        return [
            f"{task_id}: {[ends.get(task_id), *told]}"
            for task_id, told in self.told.items()
            if any(one != ends.get(task_id) for one in told)
        ]


class Squarer(Agent):
    """A worker in this process that counts how often it begins each task."""

    def __init__(self, name: str, moments: Moments, begun: collections.Counter[str], **options: Any) -> None:
        super().__init__(name, **options)
        self.moments = moments
        self.begun = begun

    @agenthub.capability
    async def square(self, task: Task) -> int:
        self.begun[task.task_id] += 1
        self.moments()
        number: int = task.input["number"]
        await asyncio.sleep(number % 5 / 1000)
        if is_unlucky(number):
            raise TaskFailed("of all numbers", code="unlucky")
        if has_part(number):
            output: int = await task.delegate(
                "square", {"number": 10 * number}, task_id=f"part-of-{task.task_id}", max_retries=RETRIES_MAX
            )
            return output // 100
        self.moments()
        return number**2


def is_unlucky(number: int) -> bool:
    return number % 100 == UNLUCKY


def has_part(number: int) -> bool:
    """Return whether a task delegates a subtask: only tasks that are retried do."""
    return number % 20 == 7


async def run_through(
    requesters: list[Requester],
    count: int,
    max_retries: Callable[[int], int],
    *faults: Coroutine[Any, Any, None],
    at_once: int = 40,
) -> None:
    """Let all requesters delegate, `at_once` squares at a time each, while the faults happen, for up to RUN_S.

    Asserts that each task has one outcome; the tests assert which.
    """
    numbers = iter(range(count))
    asking = [asyncio.create_task(one.ask(numbers, max_retries)) for one in requesters for _ in range(at_once)]
    failing = [asyncio.create_task(one) for one in faults]
    try:
        await asyncio.wait([*asking, *failing], timeout=RUN_S, return_when=asyncio.FIRST_EXCEPTION)
        for one in failing:
            assert one.done(), "not all faults have happened in time"
            one.result()
    finally:
        for one in [*asking, *failing]:
            one.cancel()
        await asyncio.gather(*asking, *failing, return_exceptions=True)
    troubles = [trouble for one in requesters for trouble in one.troubles]
    assert not troubles, f"{len(troubles)} tasks could not be delegated, among them {troubles[:5]}"
    lost = set(range(count)) - {number for one in requesters for number in one.ends}
    assert not lost, (
        f"{len(lost)} tasks have no outcome, among them {[await fate(requesters, one) for one in sorted(lost)[:5]]}"
    )
    contradictions = [text for one in requesters for text in one.contradictions()]
    assert not contradictions, f"requesters received different outcomes of {len(contradictions)}: {contradictions[:3]}"


async def fate(requesters: list[Requester], number: int) -> str:
    """Return what the hub knows of a task whose outcome did not reach its requester."""
    task_id = f"task-{number}"
    told = [one.told[task_id] for one in requesters if one.told[task_id]]
    try:
        async with asyncio.timeout(1):
            report = await requesters[0].status(task_id)
    except (agenthub.AgentHubError, TimeoutError) as error:
        return f"{task_id}: {error!r}, told {told}"
    return f"{task_id}: {report.state} attempt {report.attempt} at {report.agent_id}, told {told}"


def wrong_ends(requesters: Iterable[Requester], unlucky: bool = True) -> tuple[list[str], list[int]]:
    """Return the tasks with a wrong outcome, and the numbers of those that failed with `agent_lost`."""
    wrong, lost = [], []
    for requester in requesters:
        for number, end in requester.ends.items():
            code = end.error.code if end.error is not None else None
            if code == "agent_lost":
                lost.append(number)
            elif unlucky and is_unlucky(number) and code == "unlucky":
                continue
            elif (end.success, end.output, end.state) != (True, number**2, "completed"):
                wrong.append(f"task-{number}: {end}")
    return wrong, lost


async def totals(agent: Agent) -> dict[str, int]:
    hub = (await agent.status()).hub
    assert hub is not None
    counts: dict[str, int] = hub["tasks"]
    return counts


# Hubs killed


@pytest.mark.parametrize(("kills", "count"), RUNS)
async def test_hub_killed_again_and_again_loses_no_task(
    kills: int, count: int, tmp_path: Path, port: int, haste: None
) -> None:
    moments, begun = Moments(), collections.Counter[str]()
    url = hub_url(port)

    def max_retries(number: int) -> int:
        return RETRIES_MAX if number % 2 or has_part(number) else 0

    async def kill_the_hub() -> None:
        """Kill it at points spread over the run; each fifth time once more, as soon as it is back."""
        for kill in range(kills):
            await moments.reach((kill + 1 - (kill % 5 == 4)) * 4 * count // (kills + 1))
            await hub.replace()

    with mortal_hub(tmp_path, port) as hub:
        hub.start()
        async with contextlib.AsyncExitStack() as stack:
            for name in ("one", "other"):
                await stack.enter_async_context(Squarer(name, moments, begun, url=url, max_tasks=200))
            requesters = [Requester(f"requester{number}", moments, url=url) for number in range(3)]
            for requester in requesters:
                await stack.enter_async_context(requester)
            await run_through(requesters, count, max_retries, kill_the_hub())
            counts = await totals(requesters[0])
        hub.check_log()

    wrong, lost = wrong_ends(requesters)
    assert not wrong, f"{len(wrong)} tasks ended wrong: {wrong[:5]}"
    # The one permitted loss: the hub was killed after it assigned the task and before it sent it.
    assert not [one for one in lost if max_retries(one)], f"lost in spite of retries: {lost}"
    assert not [one for one in lost if begun[f"task-{one}"]], "failed as lost, but had begun"
    expected = {f"task-{number}" for number in set(range(count)) - set(lost)}
    expected |= {f"part-of-task-{number}" for number in range(count) if has_part(number)}
    assert begun == collections.Counter(expected), f"begun twice or never: {begun - collections.Counter(expected)}"
    failed = sum(map(is_unlucky, range(count))) + len(lost)
    completed = count + sum(map(has_part, range(count))) - failed
    assert counts == {"pending": 0, "in_progress": 0, "completed": completed, "failed": failed, "timeout": 0}


async def lost_connection(client: RawClient) -> None:
    """Wait until a connection to a killed hub is closed."""
    async with asyncio.timeout(WAIT_S):
        await client.connection.wait_closed()


def identity(registered: dict[str, Any]) -> dict[str, str]:
    return {"agent_id": registered["agent_id"], "resume": registered["resume"]}


@pytest.mark.parametrize("ends", ["before the kill", "after the kill"])
async def test_requester_who_was_away_when_the_hub_was_killed_gets_its_result(
    tmp_path: Path, port: int, ends: str
) -> None:
    url = hub_url(port)
    with mortal_hub(tmp_path, port) as hub:
        hub.start()
        async with raw_client(url) as worker:
            async with raw_client(url) as requester:
                me = identity(await requester.register("requester"))
                it = identity(await worker.register("worker", "work"))
                assert (await requester.delegate("task", capability="work", input=1))["state"] == "in_progress"
                await worker.message("delegate", task_id="task")
            if ends == "before the kill":
                reply = await worker.request(type="result", task_id="task", success=True, output="kept", attempt=1)
                assert reply["state"] == "completed"
            await hub.replace()
            await lost_connection(worker)
        async with raw_client(url) as worker:
            tasks = (await worker.register("worker", "work", **it))["tasks"]
            if ends == "after the kill":
                assert tasks == [{"task_id": "task", "attempt": 1}], "the hub forgot what its agent was working on"
                reply = await worker.request(type="result", task_id="task", success=True, output="kept", attempt=1)
                assert reply["state"] == "completed", f"the result was not taken: {reply}"
            else:
                assert tasks == [], "the hub gave its agent back a task that had ended"
            await hub.replace()  # The undelivered outcome survives too.
        async with raw_client(url) as requester:
            assert (await requester.register("requester", **me))["agent_id"] == me["agent_id"], "its session was lost"
            result = await requester.message("result", task_id="task")
            assert (result["output"], result["sender"], result["state"]) == ("kept", it["agent_id"], "completed")
            await requester.nothing_else()


async def test_worker_who_was_away_when_the_hub_was_killed_goes_on_with_its_tasks(tmp_path: Path, port: int) -> None:
    url = hub_url(port)
    with mortal_hub(tmp_path, port) as hub:
        hub.start()
        async with raw_client(url) as requester:
            me = identity(await requester.register("requester"))
            async with raw_client(url) as worker:
                it = identity(await worker.register("worker", "work", max_tasks=2))
                for task_id in ("first", "second", "waiting"):
                    await requester.delegate(task_id, capability="work", input=task_id)
                for task_id in ("first", "second"):
                    await worker.message("delegate", task_id=task_id)
            await hub.replace()
            await lost_connection(requester)
        async with raw_client(url) as requester, raw_client(url) as worker:
            await requester.register("requester", **me)
            registered = await worker.register("worker", "work", max_tasks=2, **it)
            held = [(task["task_id"], task["attempt"]) for task in registered["tasks"]]
            assert sorted(held) == [("first", 1), ("second", 1)], "the hub forgot what its agent was working on"
            for task_id in ("first", "second", "waiting"):
                if task_id == "waiting":
                    delivery = await worker.message("delegate", task_id=task_id)
                    assert (delivery["input"], delivery["attempt"]) == ("waiting", 1)
                await worker.request(type="result", task_id=task_id, success=True, output=task_id.upper(), attempt=1)
                result = await requester.message("result", task_id=task_id)
                assert (result["success"], result["output"]) == (True, task_id.upper())
            await requester.nothing_else()


async def test_worker_who_does_not_come_back_to_a_restarted_hub_is_lost_after_its_grace_time(
    tmp_path: Path, port: int
) -> None:
    url = hub_url(port)
    with mortal_hub(tmp_path, port, "--grace", "0.5") as hub:
        hub.start()
        async with raw_client(url) as requester, raw_client(url) as worker:
            me = identity(await requester.register("requester"))
            await worker.register("worker", "work")
            await requester.delegate("once", capability="work")
            await requester.delegate("again", capability="work", max_retries=1)
            await hub.replace()
            await lost_connection(requester)
        async with raw_client(url) as requester, raw_client(url) as other:
            await requester.register("requester", **me)
            await other.register("other", "work")
            result = await requester.message("result", task_id="once")
            assert (result["state"], result["error"]["code"]) == ("failed", "agent_lost")
            delivery = await other.message("delegate", task_id="again")
            assert delivery["attempt"] == 2, "the attempt of before the kill was not counted"
            assert (await requester.message("status", task_id="again"))["attempt"] == 2
            await other.request(type="result", task_id="again", success=True, output=2, attempt=2)
            assert (await requester.message("result", task_id="again"))["output"] == 2
            await requester.nothing_else()


# Agents killed


@pytest.mark.parametrize(("kills", "count"), RUNS)
async def test_workers_killed_again_and_again_leave_no_task_without_its_end(
    kills: int, count: int, tmp_path: Path, port: int, haste: None
) -> None:
    moments = Moments()
    url = hub_url(port)
    killed: set[int] = set()

    def max_retries(number: int) -> int:
        return (0, 1, 3, RETRIES_MAX)[number % 4]

    async def kill_workers(workers: list[Mortal]) -> None:
        for kill in range(kills):
            await moments.reach((kill + 1) * 2 * count // (kills + 1))
            killed.add(workers[kill % 2].pid)
            await workers[kill % 2].replace()

    with contextlib.ExitStack() as processes:
        hub = processes.enter_context(mortal_hub(tmp_path, port, "--grace", "0.2"))
        hub.start()
        workers = [processes.enter_context(mortal_worker(tmp_path, port)) for _ in range(2)]
        for worker in workers:
            worker.start()
        async with contextlib.AsyncExitStack() as stack:
            requesters = [Requester(f"requester{number}", moments, url=url) for number in range(2)]
            for requester in requesters:
                await stack.enter_async_context(requester)
            await run_through(requesters, count, max_retries, kill_workers(workers))
            counts = await totals(requesters[0])
        for process in (hub, *workers):
            process.check_log()

    executions = collections.defaultdict(list)
    for task_id, attempt, pid in noted(tmp_path):
        executions[int(task_id.removeprefix("task-"))].append((attempt, pid))
    too_often = {one: runs for one, runs in executions.items() if len(runs) > 1 + max_retries(one)}
    assert not too_often, f"ran more often than 1 + max_retries: {too_often}"
    twice = {one: runs for one, runs in executions.items() if len({attempt for attempt, _ in runs}) < len(runs)}
    assert not twice, f"the same attempt ran twice: {twice}"
    wrong, lost = wrong_ends(requesters, unlucky=False)
    assert not wrong, f"{len(wrong)} tasks ended wrong: {wrong[:5]}"
    ends = {number: end for requester in requesters for number, end in requester.ends.items()}
    too_early = {one: ends[one] for one in lost if ends[one].attempt != 1 + max_retries(one)}
    assert not too_early, f"given up before their last attempt: {too_early}"
    groundless = {one: executions[one] for one in lost if not {pid for _, pid in executions[one]} <= killed}
    assert not groundless, f"failed as lost, but their agents live: {groundless}"
    assert any(max_retries(one) == 0 for one in lost), "no kill has hit a running task that is not retried"
    assert any(len(runs) > 1 for runs in executions.values()), "no kill has hit a running task that is retried"
    unexecuted = {one for one in range(count) if not executions[one]} - set(lost)
    assert not unexecuted, f"completed without having run: {sorted(unexecuted)[:5]}"
    completed = count - len(lost)
    assert counts == {"pending": 0, "in_progress": 0, "completed": completed, "failed": len(lost), "timeout": 0}


# The network breaks


class Proxy:
    """Forward bytes between agents and a hub, and break each connection sooner or later.

    After some bytes, often within a message, a connection is cut, half-closed, stalled for a while, or stalled until
    its sender has given up: then the bytes that it held arrive late. The faults depend on the bytes and on the seed
    only, and not on time, so that a seed replays them.
    """

    def __init__(self, port: int, chance: random.Random) -> None:
        self.faults: collections.Counter[str] = collections.Counter()
        self._far_port = port
        self._chance = chance
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for one in self._serving:
            one.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving = asyncio.create_task(self._serve(reader, writer))
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._far_port)
            writers.append(far_writer)
            faulty = self._chance.random() < 0.5
            pumps = [
                asyncio.create_task(self._pump(reader, far_writer, faulty)),
                asyncio.create_task(self._pump(far_reader, writer, not faulty)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # The cut is intended.
        finally:
            for one in writers:
                one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_faulty: bool) -> None:
        """Forward one direction of a connection. Raises OSError to cut the whole connection."""
        left = self._chance.randrange(400, 12_000) if is_faulty else sys.maxsize
        while chunk := await reader.read(4096):
            if len(chunk) >= left:
                writer.write(chunk[:left])
                await writer.drain()
                await self._harm(reader, writer)
                chunk, left = chunk[left:], self._chance.randrange(400, 12_000) + len(chunk)
            left -= len(chunk)
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()

    async def _harm(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = self._chance.choices(["cut", "half-closed", "stalled", "stalled for good"], [6, 3, 4, 1])[0]
        self.faults[fault] += 1
        if fault == "cut":
            raise ConnectionAbortedError
        if fault == "stalled":
            await asyncio.sleep(self._chance.uniform(0.01, 0.2))
        elif fault == "half-closed":
            writer.write_eof()
            await reader.read()  # The other direction stays open until its sender closes it.
            raise ConnectionAbortedError
        else:
            held = await reader.read()
            writer.write(held)
            writer.write_eof()
            await writer.drain()
            raise ConnectionAbortedError


SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3))]
if "FAULTS_SEED" in os.environ:
    SEEDS = [int(os.environ["FAULTS_SEED"])]


@pytest.mark.parametrize("seed", SEEDS)
async def test_broken_connections_lose_nothing_and_double_nothing(
    tmp_path: Path, port: int, haste: None, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    count = 600
    replay = f"replay with FAULTS_SEED={seed} pytest tests/test_faults.py -k broken_connections"
    moments, begun = Moments(), collections.Counter[str]()
    monkeypatch.setattr(agenthub, "REPLY_S", 1.0)
    monkeypatch.setattr(agenthub, "CLOSING_S", 0.2)

    def max_retries(number: int) -> int:
        return 100 if number % 2 or has_part(number) else 0

    with mortal_hub(tmp_path, port, "--heartbeat", "0.3") as hub:
        hub.start()
        async with contextlib.AsyncExitStack() as stack:
            proxy = await stack.enter_async_context(Proxy(port, random.Random(seed)))
            for name in ("one", "other"):
                await stack.enter_async_context(Squarer(name, moments, begun, url=proxy.url, max_tasks=100))
            requesters = [Requester(f"requester{number}", moments, url=proxy.url) for number in range(2)]
            for requester in requesters:
                await stack.enter_async_context(requester)
            try:
                await run_through(requesters, count, max_retries, at_once=10)
            except AssertionError as error:
                raise AssertionError(f"{error}\nafter {dict(proxy.faults)}; {replay}") from error
            async with raw_client(hub_url(port)) as observer:
                counts = (await observer.request(type="status"))["hub"]["tasks"]
        hub.check_log()

    wrong, lost = wrong_ends(requesters)
    assert not wrong, f"{len(wrong)} tasks ended wrong: {wrong[:5]}; {replay}"
    # A connection may break before the task has reached its agent; then it has not begun.
    assert not [one for one in lost if max_retries(one)], f"lost in spite of retries: {lost}; {replay}"
    assert not [one for one in lost if begun[f"task-{one}"]], f"failed as lost, but had begun: {lost}; {replay}"
    twice = {task_id: times for task_id, times in begun.items() if times > 1}
    assert not twice, f"ran more than once: {twice}; {replay}"
    ended = count + sum(map(has_part, range(count)))
    failed = sum(map(is_unlucky, range(count))) + len(lost)
    assert counts == {
        "pending": 0,
        "in_progress": 0,
        "completed": ended - failed,
        "failed": failed,
        "timeout": 0,
    }, replay
    missing = {"cut", "half-closed", "stalled"} - set(proxy.faults)
    assert not missing, f"the run was too short for {missing}: {dict(proxy.faults)}; {replay}"


async def test_registration_that_arrives_late_does_not_end_its_agent(
    port: int, tmp_path: Path, haste: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registration on an abandoned connection arrives after the agent has reconnected.

    The hub takes the late one for the newer connection, and closes the one in use with 4000.
    """
    monkeypatch.setattr(agenthub, "REPLY_S", 0.5)
    monkeypatch.setattr(agenthub, "CLOSING_S", 0.2)
    moments, begun = Moments(), collections.Counter[str]()
    with mortal_hub(tmp_path, port) as hub:
        hub.start()
        async with (
            HoldingProxy(port) as proxy,
            Squarer("worker", moments, begun, url=hub_url(port)),
            Requester("requester", moments, url=proxy.url) as requester,
        ):
            agent_id = requester.agent_id
            handle = await requester.submit("square", {"number": 2}, ttl=WAIT_S)
            proxy.hold_registrations.set()
            proxy.cut()
            await asyncio.wait_for(proxy.held.wait(), WAIT_S)  # The agent waits for the reply to its registration.
            proxy.hold_registrations.clear()
            await requester.connected(WAIT_S)  # It has timed out, and reconnected.
            proxy.release.set()  # Now the hub reads the late registration.
            await until(lambda: proxy.released, "the late registration has reached the hub")
            assert await handle.result(WAIT_S) == 4
            output = await requester.delegate("square", {"number": 3}, ttl=WAIT_S)
            assert (output, requester.agent_id) == (9, agent_id), "it has another identity now"
        hub.check_log()


class HoldingProxy(Proxy):
    """A proxy without random faults that can hold back the bytes after an agent's handshake until released."""

    def __init__(self, port: int) -> None:
        super().__init__(port, random.Random(0))
        self.hold_registrations = asyncio.Event()
        self.held, self.release = asyncio.Event(), asyncio.Event()
        self.released = False
        self._open: list[asyncio.StreamWriter] = []

    def cut(self) -> None:
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_faulty: bool) -> None:
        self._open.append(writer)
        is_first = True
        while chunk := await reader.read(4096):
            is_upgrade = is_first and chunk.startswith(b"GET ")
            is_first = False
            writer.write(chunk)
            await writer.drain()
            if is_upgrade and self.hold_registrations.is_set():
                late = await reader.readexactly(1)
                self.held.set()
                late += await reader.read()  # Until the agent closes the connection.
                await self.release.wait()
                writer.write(late)
                await writer.drain()
                self.released = True
        writer.write_eof()


# An agent paused, and continued much later

STUBBORN = """
def send_all(self, tasks):
    for result in list(self._results.values()):
        self._send(result)
    return True

def write_down(self, result, reply):
    if isinstance(reply, agenthub.Disconnected):
        return  # It is sent again.
    self._results.pop(result.task_id, None)
    note_line = f"{getattr(reply, 'code', 'taken')} {result.task_id} {result.attempt} {os.getpid()}\\n"
    os.write(BEGUN, note_line.encode())

# Sends its result whatever the hub says that it should be working on.
agenthub.Worker.reconcile, agenthub.Worker._on_reply = send_all, write_down
"""


@pytest.mark.parametrize("is_stubborn", [pytest.param(False, marks=pytest.mark.long), True], ids=["polite", "stubborn"])
async def test_agent_that_was_stopped_for_too_long_changes_nothing_and_works_again(
    tmp_path: Path, port: int, is_stubborn: bool
) -> None:
    gate = tmp_path / "gate"
    task = {"capability": "held", "input": {"gate": str(gate)}}
    with contextlib.ExitStack() as processes:
        hub = processes.enter_context(mortal_hub(tmp_path, port, "--heartbeat", "0.3", "--grace", "0.2"))
        hub.start()
        worker = processes.enter_context(mortal_worker(tmp_path, port, WORKER + STUBBORN * is_stubborn))
        worker.start()
        async with beating_client(hub_url(port)) as requester:
            await requester.register("requester")
            await requester.delegate("retried", max_retries=1, wait=True, **task)
            await requester.delegate("not-retried", max_retries=0, wait=True, **task)
            await until(lambda: len(noted(tmp_path)) == 2, "both tasks have begun at the worker")
            os.kill(worker.pid, signal.SIGSTOP)
            try:
                end = await requester.message("result", task_id="not-retried")
                assert (end["state"], end["error"]["code"]) == ("failed", "agent_lost")
                async with beating_client(hub_url(port)) as other:
                    await other.register("other", "held")
                    delivery = await other.message("delegate", task_id="retried")
                    assert delivery["attempt"] == 2
                    gate.touch()
                    os.kill(worker.pid, signal.SIGCONT)
                    if is_stubborn:  # It reported attempt 1 while attempt 2 was in progress.
                        await until(lambda: noted(tmp_path, "stale_attempt"), "its late result is refused")
                        await until(lambda: noted(tmp_path, "task_over"), "its other late result is refused")
                        assert noted(tmp_path, "taken") == [], "a late result was taken"
                    await until_there(requester, "worker")
                    await until_state(requester, "retried", "in_progress", 2)
                    reply = await other.request(type="result", task_id="retried", success=True, output="o", attempt=2)
                    assert reply["state"] == "completed", f"the retried task was not left alone: {reply}"
                end = await requester.message("result", task_id="retried")
                assert (end["output"], end["attempt"]) == ("o", 2)
                await requester.delegate("new", agent_id=await until_there(requester, "worker"), **task)
                end = await requester.message("result", task_id="new")
                assert (end["output"], end["attempt"]) == (worker.pid, 1), "it did not work again"
                for task_id, state in (("retried", "completed"), ("not-retried", "failed"), ("new", "completed")):
                    assert (await requester.request(type="status", task_id=task_id))["state"] == state
                again = [message for message in requester.seen if message["type"] == "result"]
                assert not again, f"the requester was told more than once: {again}"
            finally:
                os.kill(worker.pid, signal.SIGCONT)
        begun = sorted((task_id, attempt) for task_id, attempt, _ in noted(tmp_path))
        assert begun == [("new", 1), ("not-retried", 1), ("retried", 1)]
        hub.check_log()


@contextlib.asynccontextmanager
async def beating_client(url: str) -> AsyncIterator[RawClient]:
    """Open a connection that sends heartbeats."""
    async with raw_client(url) as client:

        async def beat() -> None:
            while True:
                await asyncio.sleep(0.1)
                await client.send(type="heartbeat")

        beating = asyncio.create_task(beat())
        try:
            yield client
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)


async def until_there(client: RawClient, name: str) -> str:
    """Wait until an agent of this name is online; return its id."""
    last = time.monotonic() + WAIT_S
    while True:
        agents = (await client.request(type="discover"))["agents"]
        for agent in agents:
            if agent["name"] == name:
                return str(agent["agent_id"])
        assert time.monotonic() < last, f"{name} did not come back"
        await asyncio.sleep(0.01)


# Two hubs on one file


async def test_second_hub_on_a_journal_is_refused_and_the_first_goes_on(tmp_path: Path, port: int) -> None:
    path = tmp_path / "hub.db"
    with mortal_hub(tmp_path, port) as hub:
        hub.start()
        async with raw_client(hub_url(port)) as client, raw_client(hub_url(port)) as worker:
            await client.register("requester")
            await worker.register("worker", "work")
            for number in range(3):
                await client.delegate(f"task-{number}", capability="work")
                second = ["-m", "agenthub", "hub", "--port", "0", "--db", str(path)]
                with running(*second) as process:
                    output, complaint = await asyncio.to_thread(process.communicate, timeout=WAIT_S)
                assert (process.returncode, output) == (1, ""), f"a second hub has come up: {output}{complaint}"
                assert complaint.startswith(f"agenthub: {path}: another hub uses this journal, or a program reads it;")
                await worker.request(type="result", task_id=f"task-{number}", success=True, output=number)
                result = await client.message("result", task_id=f"task-{number}")
                assert result["output"] == number, "the first hub was disturbed"
        hub.check_log()
        await hub.replace()  # Its journal is intact.
        async with raw_client(hub_url(port)) as client:
            counts = (await client.request(type="status"))["hub"]["tasks"]
            assert counts == {"pending": 0, "in_progress": 0, "completed": 3, "failed": 0, "timeout": 0}


# Everything killed

REQUESTER = """
import asyncio, json, sys
from tests.support import raw_client

async def main(url, gate):
    async with raw_client(url) as client:
        registered = await client.register("requester")
        print(json.dumps(registered), flush=True)
        for task in json.loads(sys.stdin.readline()):
            reply = await client.delegate(**task)
            print(json.dumps(reply), flush=True)
        await client.message("result", task_id="ended")
        print(json.dumps({"heard": "ended"}), flush=True)
        await asyncio.sleep(600)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_full_stop_loses_nothing_that_was_acknowledged(tmp_path: Path, port: int) -> None:
    gate = tmp_path / "gate"
    url = hub_url(port)
    held = {"capability": "held", "input": {"gate": str(gate)}, "wait": True}
    tasks = [
        {"task_id": "ended", "capability": "square", "input": {"number": 7}, "wait": True},
        *({"task_id": f"again-{number}", "max_retries": 1, **held} for number in range(12)),
        *({"task_id": f"once-{number}", "max_retries": 0, **held} for number in range(4)),
        # The worker has its 16 tasks; these wait.
        *({"task_id": f"waiting-{number}", "max_retries": 0, **held} for number in range(5)),
        {"task_id": "nobody", "capability": "nobody-yet", "input": "kept", "wait": True},
    ]
    with contextlib.ExitStack() as processes:
        hub = processes.enter_context(mortal_hub(tmp_path, port, "--grace", "1"))
        worker = processes.enter_context(mortal_worker(tmp_path, port))
        hub.start()
        worker.start()
        requester = processes.enter_context(running("-c", REQUESTER, url, str(gate)))

        def line() -> dict[str, Any]:
            assert requester.stdout is not None
            message: dict[str, Any] = json.loads(requester.stdout.readline())
            return message

        me = identity(await asyncio.to_thread(line))
        assert requester.stdin is not None
        requester.stdin.write(json.dumps(tasks) + "\n")
        requester.stdin.flush()
        for task in tasks:
            reply = await asyncio.to_thread(line)
            assert (reply["type"], reply["task_id"]) == ("status", task["task_id"]), f"not acknowledged: {reply}"
        assert await asyncio.to_thread(line) == {"heard": "ended"}
        await until(lambda: len(noted(tmp_path)) == 17, "the worker has begun all tasks that it can")
        for process in (hub, worker):
            process.kill()
        requester.kill()
        gate.touch()
        hub.start()
        worker.start()
        async with raw_client(url) as client:
            registered = await client.register("requester", **me)
            assert registered["agent_id"] == me["agent_id"], "the requester's session was lost"
            ends = {}
            for task in tasks[1:-1]:
                ends[task["task_id"]] = await client.message("result", task_id=task["task_id"])
            for task_id, end in ends.items():
                if task_id.startswith("once"):
                    assert (end["state"], end["error"]["code"]) == ("failed", "agent_lost"), f"{task_id}: {end}"
                else:
                    assert (end["state"], end["output"]) == ("completed", worker.pid), f"{task_id}: {end}"
                    assert end["attempt"] == (2 if task_id.startswith("again") else 1), f"{task_id}: {end}"
            ended = await client.request(type="status", task_id="ended")
            assert (ended["state"], ended["output"]) == ("completed", 49), "what had ended was lost"
            pending = await client.request(type="status", task_id="nobody")
            assert (pending["state"], pending["input"]) == ("pending", "kept")
            counts = (await client.request(type="status"))["hub"]["tasks"]
            assert counts == {"pending": 1, "in_progress": 0, "completed": 18, "failed": 4, "timeout": 0}
            again = [message for message in client.seen if message["type"] == "result"]
            # An outcome may be redelivered: the hub cannot know that it was received.
            assert all((one["task_id"], one["output"]) == ("ended", 49) for one in again), f"told again: {again}"
        attempts = collections.Counter((task_id, attempt) for task_id, attempt, _ in noted(tmp_path))
        assert set(attempts.values()) == {1}, f"an attempt ran twice: {attempts}"
        hub.check_log()
