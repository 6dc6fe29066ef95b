"""Cost of the hub's decisions with more agents, open tasks, recipients and deadlines.

It calls the Sans-I/O `Hub` with decoded messages, without a socket, and encodes the hub's messages. The cost of
decoding does not depend on the hub. Each hub has its own process, so that the memory of one does not slow down the
garbage collector of another. The goal is a constant cost: `of_smallest` is the cost relative to the smallest hub.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from agenthub import (
    Broadcast,
    Close,
    Delegate,
    Delegated,
    Discover,
    Effect,
    Hub,
    HubSettings,
    Register,
    Result,
    TaskOutcome,
    encode,
    only_new_objects_collected,
)
from benchmarks.measure import Options, Row, Unavailable, alternate, medians, progress, require, running

NAME = "growth"
AGENTS = (10, 1_000, 10_000)
OPEN_TASKS = 100_000
# The state of the open tasks: they wait for a capability that no agent offers, wait in the queue of the measured
# capability (and as many more keep its agents busy), or run at the agents, evenly distributed.
KINDS = ("none", "waiting elsewhere", "waiting in queue", "running")
RECIPIENTS = (10, 1_000, 5_000)
FOUND = 5  # Agents that `discover` finds, independent of the number of others.
PAYLOAD = "x" * 100
FAR_S = 500_000.0
Case = TypeVar("Case", bound=Hashable)
BUDGET_S = 0.2  # CPU time of one measurement, as a share of the duration of a load.


class FilledHub:
    """A hub in this process with a number of agents and open tasks. Only a workload advances `now`."""

    def __init__(self, agents: int, kind: str, open_tasks: int, retention_s: float = 0.0) -> None:
        self.now = 0.0
        settings = HubSettings(
            heartbeat_s=1e9,
            join_s=1e9,
            retention_s=retention_s,
            open_tasks_max=10**9,
            pending_tasks_max=10**9,
            message_bytes_max=2**24,
            agents_max=10**9,
        )
        self.hub = Hub(settings, entropy=os.urandom, now=self.now)
        self.numbers = itertools.count()
        self.in_queue: list[tuple[str, str]] = []  # The running tasks with their workers, if others wait in the queue.
        share = -(-open_tasks // agents)
        for number in range(agents):
            name, works = ("wanted", "rare-work") if number < FOUND else (f"agent-{number}", f"common-{number % 7}")
            max_tasks = share if kind == "waiting in queue" else share + 100
            self.join(f"a{number}", name, [works, "work"], max_tasks)
        self.join("requester", "requester", [], 1)
        self._fill(agents, kind, open_tasks)

    def _fill(self, agents: int, kind: str, open_tasks: int) -> None:
        if kind == "none":
            return
        busy = -(-open_tasks // agents) * agents if kind == "waiting in queue" else 0
        for number in range(busy + open_tasks):
            wanted = "absent" if kind == "waiting elsewhere" else "work"
            task = Delegate(task_id=f"open-{number}", capability=wanted, input=PAYLOAD, ttl=FAR_S, wait=True)
            assigned = assignments(self.send("requester", task))
            if busy:
                self.in_queue += assigned

    def join(self, connection: str, name: str, capabilities: list[Any], max_tasks: int) -> None:
        self.hub.connected(connection, self.now)
        self.send(connection, Register(name=name, capabilities=capabilities, max_tasks=max_tasks))

    def send(self, connection: str, message: Any) -> list[Effect]:
        """Send the hub a message, and encode its messages, each broadcast once."""
        return carry_out(self.hub.receive(connection, message, self.now, 200).effects)

    def tick(self) -> None:
        """Let the hub purge the records of ended tasks, as its server does."""
        self.now += 1.0
        while self.hub.next_deadline() <= self.now:
            carry_out(self.hub.tick(self.now).effects)


def carry_out(effects: list[Effect]) -> list[Effect]:
    last = None
    for _, action in effects:
        if action is not last and not isinstance(action, Close):
            last = action
            encode(action)
    return effects


def assignments(effects: list[Effect]) -> list[tuple[Any, str]]:
    return [(connection, action.task_id) for connection, action in effects if isinstance(action, Delegated)]


# The measured operations on a filled hub.


def one_task(filled: FilledHub) -> None:
    """Delegate a task, assign it, and end it with its result."""
    if filled.in_queue:
        task_from_queue(filled)
        return
    number = next(filled.numbers)
    task = Delegate(id="1", task_id=f"t{number}", capability="work", input=PAYLOAD, ttl=300.0)
    for worker, task_id in assignments(filled.send("requester", task)):
        filled.send(worker, Result(id="2", task_id=task_id, success=True, output=PAYLOAD))
    if number % 1000 == 999:
        filled.tick()


def task_from_queue(filled: FilledHub) -> None:
    """End the task that has run longest, which assigns the next one from the queue; then delegate another."""
    number = next(filled.numbers)
    worker, task_id = filled.in_queue[number % len(filled.in_queue)]
    (assigned,) = assignments(filled.send(worker, Result(id="2", task_id=task_id, success=True, output=PAYLOAD)))
    filled.in_queue[number % len(filled.in_queue)] = assigned
    filled.send("requester", Delegate(id="1", task_id=f"t{number}", capability="work", input=PAYLOAD, ttl=300.0))
    if number % 1000 == 999:
        filled.tick()


def discover_name(filled: FilledHub) -> None:
    filled.send("requester", Discover(id="1", capability="rare-work"))


def discover_keyword(filled: FilledHub) -> None:
    filled.send("requester", Discover(id="1", capability="rare"))


def broadcast(filled: FilledHub) -> None:
    filled.send("requester", Broadcast(id="1", message=PAYLOAD))


def expire(open_tasks: int) -> Row:
    """Let running tasks time out, with deadlines spread over one second of real time; return the cost.

    `last_late_ms` is the time from the last deadline until the last outcome was encoded.
    """
    filled = FilledHub(1, "none", 0, retention_s=3600.0)
    for number in range(16):
        filled.join(f"w{number}", "worker", ["expiring"], 10_000)
    for number in range(open_tasks):
        ttl = 1.0 + number / open_tasks
        filled.send("requester", Delegate(task_id=f"t{number}", capability="expiring", input=PAYLOAD, ttl=ttl))
    hub, ended, longest_s, last_deadline = filled.hub, 0, 0.0, ttl
    began, cpu_began = time.perf_counter() - 1.0, time.process_time()
    while ended < open_tasks:
        time.sleep(max(0.0, hub.next_deadline() - (time.perf_counter() - began)))
        now = time.perf_counter() - began
        ended += sum(isinstance(action, TaskOutcome) for _, action in carry_out(hub.tick(now).effects))
        longest_s = max(longest_s, time.perf_counter() - began - now)
    return {
        "last_late_ms": (time.perf_counter() - began - last_deadline) * 1e3,
        "longest_tick_ms": longest_s * 1e3,
        "cpu_us_per_task": (time.process_time() - cpu_began) / open_tasks * 1e6,
    }


OPERATIONS: dict[str, Callable[[FilledHub], None]] = {
    "delegate and result": one_task,
    "discover by name": discover_name,
    "discover by keyword": discover_keyword,
    "broadcast": broadcast,
}


# The processes of the hubs, which read function calls from stdin, one JSON array per line.

_filled: list[FilledHub] = []
_pauses_s: list[float] = []  # The duration of each garbage collection.


def fill(agents: int, kind: str, open_tasks: int) -> None:
    _filled[:] = [FilledHub(agents, kind, open_tasks)]


def cost_us(operation: str, budget_s: float) -> float:
    """Return the CPU time of one operation on the filled hub in µs, repeated for `budget_s`."""
    (filled,), act = _filled, OPERATIONS[operation]
    act(filled)
    done, began = 0, time.process_time()
    while (passed_s := time.process_time() - began) < budget_s:
        for _ in range(10):
            act(filled)
        done += 10
    return passed_s / done * 1e6


def pauses(budget_s: float) -> Row:
    """Return the longest pause of the garbage collector while tasks run, and that of a collection of all objects."""
    _pauses_s.clear()
    cost_us("delegate and result", budget_s)
    longest_s = max(_pauses_s, default=0.0)
    gc.unfreeze()
    gc.collect()
    return {"longest_pause_ms": longest_s * 1e3, "full_collection_ms": _pauses_s[-1] * 1e3}


def time_pause(phase: str, info: dict[str, int]) -> None:
    if phase == "start":
        _pauses_s.append(-time.perf_counter())
    else:
        _pauses_s[-1] += time.perf_counter()


def run_calls() -> None:
    """Run the calls from stdin and print their results, with garbage collections as rare as in a hub."""
    gc.callbacks.append(time_pause)
    known = {"fill": fill, "cost_us": cost_us, "pauses": pauses, "expire": expire}
    with only_new_objects_collected():
        for line in sys.stdin:
            name, *args = json.loads(line)
            print(json.dumps(known[name](*args)), flush=True)


@contextlib.contextmanager
def hub_process() -> Iterator[Callable[..., Any]]:
    """Yield a function that calls `fill`, `cost_us`, `pauses` and `expire` by name in a separate process."""
    with running(sys.executable, "-m", "benchmarks.growth", stdin=subprocess.PIPE) as process:

        def call(*request: Any) -> Any:
            print(json.dumps(request), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield call


# The comparisons.


def run(options: Options) -> list[Row]:
    agents = (10, 50) if options.quick else AGENTS
    open_tasks = 200 if options.quick else OPEN_TASKS
    recipients = (10, 50) if options.quick else RECIPIENTS
    rows = _by_open_tasks(agents, open_tasks, options)
    rows += _by_recipients(recipients, options)
    rows += _expiry(open_tasks, options)
    try:
        rows += _broadcast_by_socket(recipients, options)
    except Unavailable as why:
        options.note(f"growth: broadcasts to connections are skipped: {why}")
    return rows


def _by_open_tasks(agents: tuple[int, ...], open_tasks: int, options: Options) -> list[Row]:
    cases = list(itertools.product(agents, KINDS))
    with contextlib.ExitStack() as started:
        hubs = {case: started.enter_context(hub_process()) for case in cases}
        for (many, kind), call in hubs.items():
            progress(f"growth: filling a hub with {many} agents, open tasks: {kind}")
            call("fill", many, kind, open_tasks)
        cost = {}
        for operation in ("delegate and result", "discover by name", "discover by keyword"):
            progress(f"growth: {operation}")
            cost[operation] = _costs(operation, hubs, options)
        progress("growth: pauses")
        turns = {case: functools.partial(call, "pauses", options.seconds * BUDGET_S) for case, call in hubs.items()}
        collected = {case: medians(rows) for case, rows in alternate(options.rounds, turns).items()}
    rows: list[Row] = [
        {
            "operation": operation,
            "agents": many,
            "open_tasks": 0 if kind == "none" else open_tasks,
            "which": kind,
            "cpu_us": figure,
            "of_smallest": figure / costs[cases[0]],
        }
        for operation, costs in cost.items()
        for (many, kind), figure in costs.items()
        if operation == "delegate and result" or kind != "waiting in queue"
    ]
    return rows + [
        {
            "operation": "garbage collection",
            "agents": many,
            "open_tasks": 0 if kind == "none" else open_tasks,
            "in_state": kind,
            **collected[many, kind],
        }
        for many, kind in cases
    ]


def _costs(operation: str, hubs: Mapping[Case, Callable[..., Any]], options: Options) -> dict[Case, float]:
    """Return the CPU time of one operation in µs, for each hub."""
    turns = {
        case: functools.partial(call, "cost_us", operation, options.seconds * BUDGET_S) for case, call in hubs.items()
    }
    return {case: statistics.median(costs) for case, costs in alternate(options.rounds, turns).items()}


def _by_recipients(recipients: tuple[int, ...], options: Options) -> list[Row]:
    progress("growth: broadcast")
    with contextlib.ExitStack() as started:
        hubs = {many: started.enter_context(hub_process()) for many in recipients}
        for many, call in hubs.items():
            call("fill", many, "none", 0)
        each = {many: cost / many for many, cost in _costs("broadcast", hubs, options).items()}
    return [
        {
            "operation": "broadcast, decided",
            "recipients": many,
            "cpu_us_per_recipient": cost,
            "of_smallest": cost / each[recipients[0]],
        }
        for many, cost in each.items()
    ]


def _expiry(open_tasks: int, options: Options) -> list[Row]:
    progress("growth: expiry")
    counts = (open_tasks // 100, open_tasks)
    with hub_process() as call:
        measured = alternate(options.rounds, {many: functools.partial(call, "expire", many) for many in counts})
    return [{"operation": "expiry in one second", "tasks": many, **medians(measured[many])} for many in counts]


def _broadcast_by_socket(recipients: tuple[int, ...], options: Options) -> list[Row]:
    """Compare the hub's CPU time per connected recipient on both event loops."""
    require("pydantic", "websockets", "picows", "uvloop", "orjson")
    from benchmarks.idle import SPARE_FILES, allow_files
    from benchmarks.load import broadcasts, contestants, drive, limit_of

    if not allow_files(max(recipients) + SPARE_FILES):
        raise Unavailable("the hard limit of `ulimit -n` is too low")
    capacity = str(max(recipients) + 10)
    starts = contestants("--max-connections", capacity, "--max-connections-per-address", capacity, "--rate", "0")
    rows = []
    for many in recipients:
        progress(f"growth: broadcast to {many} connections")
        with contextlib.ExitStack() as started:
            hubs = {name: started.enter_context(starts[name]()) for name in ("asyncio", "uvloop")}
            turns = {
                name: lambda hub=hub, many=many: drive(broadcasts(hub.url, hub.pid, many, options.seconds))
                for name, hub in hubs.items()
            }
            middles = {name: medians(results) for name, results in alternate(options.rounds, turns).items()}
        rows += [
            {
                "operation": "broadcast, sent",
                "server": name,
                "recipients": many,
                "hub_cpu_us_per_recipient": middle["hub_cpu_us_per_recipient"],
                "recipients_per_s": middle["recipients_per_s"],
                "limit": limit_of(middle),
            }
            for name, middle in middles.items()
        ]
    return rows


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Draw the cost of each operation over the number of agents, with a line for each kind of open tasks."""
    from benchmarks.plots import LINE_COLORS, LINES, figure, save

    names = list(dict.fromkeys(row["operation"] for row in rows if "which" in row))
    canvas, (panels,) = figure(1, len(names))
    for panel, name in zip(panels, names, strict=True):
        for kind, line, color in zip(KINDS, LINES, LINE_COLORS, strict=True):
            chosen = [row for row in rows if row["operation"] == name and row["which"] == kind]
            if chosen:
                agents, costs = [row["agents"] for row in chosen], [row["cpu_us"] for row in chosen]
                panel.plot(agents, costs, line, color=color, marker="o", markersize=3, label=kind)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_ylim(min(10, panel.get_ylim()[0]), max(1000, panel.get_ylim()[1]))
        panel.set_title(name)
        panel.set_xlabel("agents")
    panels[0].set_ylabel("CPU time per operation (µs)")
    open_tasks = max(row["open_tasks"] for row in rows if "which" in row)
    panels[0].legend(title=f"{open_tasks:,} open tasks:", fontsize=7)
    return [save(canvas, folder / "growth.png", "Costs with more agents and open tasks")]


if __name__ == "__main__":
    run_calls()
