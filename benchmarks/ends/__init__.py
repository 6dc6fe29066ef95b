"""One end of a benchmark in its own process: `python -m benchmarks.ends.NAME worker|requester --url URL`.

The worker prints `ready` and serves until SIGTERM. The requester keeps a number of tasks open, prints `measuring` after
its warm-up, and at the end one line of JSON: the number of `tasks` that ended within `seconds`, the `cpu_s` of its
process in that time, and two percentiles of the latency (`p50_ms`, `p99_ms`). A task is a JSON object that the worker
returns unchanged; both ends serialize and parse it as their users would.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from agenthub import run_loop
from benchmarks.measure import percentile

WARM_UP_S = 0.5
END_S = 2.0  # Timeout for the last tasks.
TASK_S = 30.0  # Timeout for one task, after which the run has failed.
PARALLEL = 16  # Concurrent tasks of a worker whose client takes one task per call.

Payload = dict[str, str]
Figures = dict[str, float]
DelegateOne = Callable[[Payload], Awaitable[Any]]
Worker = Callable[[str], AbstractAsyncContextManager[None]]  # Works for the hub at a URL while it is entered.
Requester = Callable[[str], AbstractAsyncContextManager[DelegateOne]]  # Yields a function that delegates one task.


@dataclasses.dataclass(frozen=True)
class Load:
    """The load of a requester: it keeps `tasks_open` tasks open, each with a text of `text_bytes`."""

    tasks_open: int = 1
    text_bytes: int = 100
    seconds: float = 2.0
    warm_up_s: float = WARM_UP_S

    @property
    def payload(self) -> Payload:
        return {"text": "x" * self.text_bytes}


def run_end(worker: Worker, requester: Requester, argv: Sequence[str] | None = None) -> int:
    """Run the end that the command line names. Returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        if args.role == "worker":
            run_loop(serve(worker(args.url)), args.loop)
        else:
            print(json.dumps(run_loop(measure(requester(args.url), load_of(args)), args.loop)), flush=True)
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("role", choices=("worker", "requester"))
    parser.add_argument("--url", required=True, help="the URL of the hub, server or broker")
    add_load_options(parser)
    return parser


def add_load_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio", help="the event loop")
    parser.add_argument("--open", type=int, default=1, metavar="N", help="tasks that a requester keeps open")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="how long a requester measures")
    parser.add_argument(
        "--warm-up", type=float, default=WARM_UP_S, metavar="S", help="how long it delegates before it measures"
    )
    parser.add_argument("--bytes", type=int, default=100, metavar="N", help="length of the text in each task")


def load_of(args: argparse.Namespace) -> Load:
    return Load(args.open, args.bytes, args.seconds, args.warm_up)


async def serve(worker: AbstractAsyncContextManager[None]) -> None:
    """Print `ready` once the server knows this worker, and work until SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with worker:
        print("ready", flush=True)
        await stopped.wait()


async def measure(requester: AbstractAsyncContextManager[DelegateOne], load: Load) -> Figures:
    """Return the figures of one requester. Raises the error of a task, and RuntimeError for a wrong output."""
    latencies_s: list[float] = []
    stopped = asyncio.Event()
    async with requester as delegate:
        await _once(delegate, load.payload)
        loops = [
            asyncio.create_task(_delegate_on(delegate, load.payload, latencies_s, stopped))
            for _ in range(load.tasks_open)
        ]
        try:
            await _pause(load.warm_up_s, loops)
            print("measuring", flush=True)
            latencies_s.clear()
            began, cpu_began = time.perf_counter(), time.process_time()
            await _pause(load.seconds, loops)
            passed_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
            figures = figures_of(latencies_s, passed_s, cpu_s)
        finally:
            stopped.set()
            await asyncio.wait(loops, timeout=END_S)
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
    return figures


async def _once(delegate: DelegateOne, payload: Payload) -> None:
    async with asyncio.timeout(TASK_S):
        output = await delegate(payload)
    if output != payload:
        raise RuntimeError(f"the output is not the input, but a {type(output).__name__}")


async def _delegate_on(
    delegate: DelegateOne, payload: Payload, latencies_s: list[float], stopped: asyncio.Event
) -> None:
    while not stopped.is_set():  # Before Python 3.12, `asyncio.wait_for` may swallow a cancellation.
        began = time.perf_counter()
        await delegate(payload)
        latencies_s.append(time.perf_counter() - began)


async def _pause(seconds: float, loops: Sequence[asyncio.Task[None]]) -> None:
    """Wait for some seconds, or raise the error of a loop at once."""
    done, _ = await asyncio.wait(loops, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for loop in done:
        await loop


def figures_of(latencies_s: list[float], passed_s: float, cpu_s: float) -> Figures:
    """Return a requester's figures. Raises RuntimeError if no task ended, because then there is no percentile."""
    if not latencies_s:
        raise RuntimeError(f"no task ended within {passed_s:.1f} s")
    ordered = sorted(latencies_s)
    return {
        "tasks": len(ordered),
        "seconds": round(passed_s, 4),
        "cpu_s": round(cpu_s, 4),
        "p50_ms": round(1000 * percentile(ordered, 50), 3),
        "p99_ms": round(1000 * percentile(ordered, 99), 3),
    }


@contextlib.asynccontextmanager
async def run_concurrently(work: Callable[[], Awaitable[Any]], count: int = PARALLEL) -> AsyncIterator[None]:
    """Repeat `work` in `count` concurrent loops while this is entered. Its errors end the process.

    For clients that take one task per call.
    """

    async def repeat() -> None:
        while True:
            await work()

    async with asyncio.TaskGroup() as group:
        loops = [group.create_task(repeat()) for _ in range(count)]
        try:
            yield
        finally:
            for loop in loops:
                loop.cancel()


class PendingOutputs:
    """Expected outputs by task number, for clients that get all outputs from one list."""

    def __init__(self) -> None:
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._count = 0

    @contextlib.contextmanager
    def expected(self) -> Iterator[tuple[int, asyncio.Future[Any]]]:
        """Yield the number of a new task and the future of its output."""
        self._count += 1
        number = self._count
        self._waiting[number] = output = asyncio.get_running_loop().create_future()
        try:
            yield number, output
        finally:
            del self._waiting[number]

    def deliver(self, number: int, output: Any) -> None:
        """Set the output of a task; ignore it if nobody waits for it."""
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(output)
