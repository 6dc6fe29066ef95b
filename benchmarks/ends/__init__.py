"""One end of a benchmark as a process of its own: `python -m benchmarks.ends.NAME worker|requester --url URL`.

The worker prints `ready` and serves until it is told to end. The requester keeps as many tasks open as it is told
to, prints `measuring` after the warm-up, and in the end one line of JSON: `tasks` done in `seconds`, `cpu_s` of this
process in that time, and how long a task took in the middle (`p50_ms`) and of the slow ones (`p99_ms`). A task is
a JSON object that comes back as it went; each end turns it into bytes and back as its users would.
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
END_S = 2.0  # For the last tasks to come back.
TASK_S = 30.0  # For one task to come back, before the run counts as failed.
PARALLEL = 16  # Tasks that a worker has in hand at once, where its client takes one task per call.

Payload = dict[str, str]
Figures = dict[str, float]
Ask = Callable[[Payload], Awaitable[Any]]
Working = Callable[[str], AbstractAsyncContextManager[None]]  # Serves the hub at a URL while it is entered.
Asking = Callable[[str], AbstractAsyncContextManager[Ask]]  # Gives a function that has one task done.


@dataclasses.dataclass(frozen=True)
class Load:
    """What a requester does: `tasks_open` all the time, each with a text of so many bytes."""

    tasks_open: int = 1
    text_bytes: int = 100
    seconds: float = 2.0
    warm_up_s: float = WARM_UP_S

    @property
    def payload(self) -> Payload:
        return {"text": "x" * self.text_bytes}


def run_end(working: Working, asking: Asking, argv: Sequence[str] | None = None) -> int:
    """Run one end, as the command line says. Returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        if args.role == "worker":
            run_loop(serve(working(args.url)), args.loop)
        else:
            print(json.dumps(run_loop(measure(asking(args.url), load_of(args)), args.loop)), flush=True)
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("role", choices=("worker", "requester"))
    parser.add_argument("--url", required=True, help="where the hub, server or broker is")
    add_load_options(parser)
    return parser


def add_load_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio", help="the event loop")
    parser.add_argument("--open", type=int, default=1, metavar="N", help="tasks that a requester has open all the time")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="how long a requester measures")
    parser.add_argument(
        "--warm-up", type=float, default=WARM_UP_S, metavar="S", help="how long it only asks before that"
    )
    parser.add_argument("--bytes", type=int, default=100, metavar="N", help="length of the text in each task")


def load_of(args: argparse.Namespace) -> Load:
    return Load(args.open, args.bytes, args.seconds, args.warm_up)


async def serve(working: AbstractAsyncContextManager[None]) -> None:
    """Work until SIGTERM or SIGINT, having printed `ready` when the server knows of this worker."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with working:
        print("ready", flush=True)
        await stopped.wait()


async def measure(asking: AbstractAsyncContextManager[Ask], load: Load) -> Figures:
    """Return the figures of one requester; raise what a task raises, and RuntimeError for a wrong answer."""
    taken_s: list[float] = []
    stopped = asyncio.Event()
    async with asking as ask:
        await _once(ask, load.payload)
        askers = [asyncio.create_task(_ask_on(ask, load.payload, taken_s, stopped)) for _ in range(load.tasks_open)]
        try:
            await _pause(load.warm_up_s, askers)
            print("measuring", flush=True)
            taken_s.clear()
            began, cpu_began = time.perf_counter(), time.process_time()
            await _pause(load.seconds, askers)
            passed_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
            figures = figures_of(taken_s, passed_s, cpu_s)
        finally:
            stopped.set()
            await asyncio.wait(askers, timeout=END_S)
            for asker in askers:
                asker.cancel()
            await asyncio.gather(*askers, return_exceptions=True)
    return figures


async def _once(ask: Ask, payload: Payload) -> None:
    async with asyncio.timeout(TASK_S):
        answer = await ask(payload)
    if answer != payload:
        raise RuntimeError(f"the answer is not what was sent, but a {type(answer).__name__}")


async def _ask_on(ask: Ask, payload: Payload, taken_s: list[float], stopped: asyncio.Event) -> None:
    while not stopped.is_set():  # A client on `asyncio.wait_for` may swallow being cancelled, before Python 3.12.
        began = time.perf_counter()
        await ask(payload)
        taken_s.append(time.perf_counter() - began)


async def _pause(seconds: float, askers: Sequence[asyncio.Task[None]]) -> None:
    """Wait; raise at once what one of those who ask has raised."""
    done, _ = await asyncio.wait(askers, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for asker in done:
        await asker


def figures_of(taken_s: list[float], passed_s: float, cpu_s: float) -> Figures:
    """Return a requester's figures; raise RuntimeError if nothing came back, so that a mean of nothing has no place."""
    if not taken_s:
        raise RuntimeError(f"no task came back within {passed_s:.1f} s")
    ordered = sorted(taken_s)
    return {
        "tasks": len(ordered),
        "seconds": round(passed_s, 4),
        "cpu_s": round(cpu_s, 4),
        "p50_ms": round(1000 * percentile(ordered, 50), 3),
        "p99_ms": round(1000 * percentile(ordered, 99), 3),
    }


@contextlib.asynccontextmanager
async def side_by_side(work: Callable[[], Awaitable[Any]], count: int = PARALLEL) -> AsyncIterator[None]:
    """Run `work` again and again, `count` times side by side, while this is entered. What it raises ends the process.

    For clients that take one task per call.
    """

    async def go_on() -> None:
        while True:
            await work()

    async with asyncio.TaskGroup() as group:
        loops = [group.create_task(go_on()) for _ in range(count)]
        try:
            yield
        finally:
            for loop in loops:
                loop.cancel()


class Replies:
    """Answers on their way, by the number of the task, for clients whose answers come on a list of the requester's."""

    def __init__(self) -> None:
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._count = 0

    @contextlib.contextmanager
    def expected(self) -> Iterator[tuple[int, asyncio.Future[Any]]]:
        """Give the number of a new task, and what its answer is set in."""
        self._count += 1
        number = self._count
        self._waiting[number] = answer = asyncio.get_running_loop().create_future()
        try:
            yield number, answer
        finally:
            del self._waiting[number]

    def settle(self, number: int, answer: Any) -> None:
        """Pass on an answer; one that nobody waits for any more is dropped."""
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)
