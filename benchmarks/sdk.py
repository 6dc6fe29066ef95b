"""Throughput of the SDK: tasks per second of one worker, and of one requester, each in its own process.

The other end is benchmarks/cheap_hub.py, which is so cheap that the agent is the bottleneck: `agent_cores` is then
close to 1. The round trip in memory has hub, worker and requester in one process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable

from benchmarks import measure
from benchmarks.ends import Load
from benchmarks.measure import Options, Row, Unavailable
from benchmarks.peers import LOOPS, Figures, figures_from, load_options, read_line, running_end

NAME = "sdk"
OPEN = (1, 64)
BUILT_IN = "asyncio, built in"  # In place of a loop: asyncio, and an agent without packages.
HANDLERS = {"worker, async handler": "echo", "worker, plain handler": "echo-in-thread"}


def run(options: Options) -> list[Row]:
    """Return a row for each part of the SDK, event loop, and number of open tasks. Raises Unavailable if one fails."""
    measure.require("pydantic", "websockets")
    loops = (*(LOOPS if importlib.util.find_spec("uvloop") is not None else LOOPS[:1]), BUILT_IN)
    loads = (
        [Load(2, 100, min(options.seconds, 0.2), 0.05)]
        if options.quick
        else [Load(tasks_open, 100, options.seconds) for tasks_open in OPEN]
    )
    parts = [(part, loop, load) for load in loads for loop in loops for part in (*HANDLERS, *REQUESTERS)]
    contestants = {key_of(*one): entry(*one) for one in parts}
    results = measure.alternate(options.rounds, contestants)
    options.note("a plain handler runs in a separate thread for each task")
    return [row_of(*one, measure.medians(results[key_of(*one)])) for one in parts]


def key_of(part: str, loop: str, load: Load) -> str:
    return f"{part} on {loop}, {load.tasks_open} open"


def entry(part: str, loop: str, load: Load) -> Callable[[], Figures]:
    """Return a function that measures a part of the SDK once."""

    def run_once() -> Figures:
        measure.progress(f"sdk: {key_of(part, loop, load)}")
        if part in HANDLERS:
            return run_worker(HANDLERS[part], loop, load)
        return REQUESTERS[part](loop, load)

    return run_once


def run_worker(capability: str, loop: str, load: Load) -> Figures:
    """Return the figures of a worker with tasks from the cheap hub."""
    with (
        cheap_hub(loop, "--capability", capability, *load_options(load)) as driver,
        agent("agenthub", "worker", driver.url, loop) as worker,
    ):
        if read_line(worker, measure.START_S) != "ready":
            raise Unavailable("the worker did not start")
        return figures_from(driver.process, load, {"agent_cpu_us": worker.pid})


def run_requester(loop: str, load: Load) -> Figures:
    """Return the figures of a requester with results from the cheap hub."""
    with (
        cheap_hub(loop) as driver,
        agent("agenthub", "requester", driver.url, loop, *load_options(load)) as requester,
    ):
        return as_agent(figures_from(requester, load, {}))


def run_local(loop: str, load: Load) -> Figures:
    """Return the figures of a process that contains hub, worker and requester."""
    with agent("local", "requester", "memory", loop, *load_options(load)) as process:
        return as_agent(figures_from(process, load, {}))


def cheap_hub(loop: str, *options: str) -> contextlib.AbstractContextManager[measure.Server]:
    loop = "asyncio" if loop == BUILT_IN else loop
    return measure.server(sys.executable, "-m", "benchmarks.cheap_hub", "--loop", loop, *options)


def agent(
    end: str, role: str, url: str, loop: str, *options: str
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    is_bare = loop == BUILT_IN
    return running_end(end, role, url, "asyncio" if is_bare else loop, *options, is_bare=is_bare)


REQUESTERS = {"requester": run_requester, "all in memory": run_local}


def as_agent(figures: Figures) -> Figures:
    return {**figures, "agent_cpu_us": figures["requester_cpu_us"]}


def row_of(part: str, loop: str, load: Load, figures: Figures) -> Row:
    return {
        "part": part,
        "loop": loop,
        "open": load.tasks_open,
        "tasks_per_s": round(figures["tasks_per_s"]),
        "agent_cpu_us_per_task": round(figures["agent_cpu_us"], 1),
        "agent_cores": round(figures["tasks_per_s"] * figures["agent_cpu_us"] / 1e6, 2),
        "p50_ms": round(figures["p50_ms"], 3),
        "p99_ms": round(figures["p99_ms"], 3),
    }
