"""What the journal costs, and how long a hub takes to come back: `python -m benchmarks.journal`.

Round trips (delegate, hand over, result, word of the end) through a hub process of its own, with tasks kept in memory
and in a journal with both sync modes, one after the other in each round; then the start of a hub whose journal holds
many open tasks. Figures of one run may be compared with each other, not with those of another machine or day: the
disk decides. The journals are made in a folder of their own under --folder, and removed.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import agenthub
from agenthub import Delegate, Delegated, Hub, HubSettings, Journal, Register, Result, Session, Settled, Status

MODES = {"memory": [], "normal": ["--sync", "normal"], "full": ["--sync", "full"]}
PAYLOAD = {"code": "print('hello')\n" * 8, "strict": True}


def start_hub(*options: str) -> tuple[subprocess.Popen[str], str]:
    """Start a hub; return its process and URL when it listens."""
    command = [sys.executable, "-m", "agenthub", "hub", "--port", "0", "--log-level", "error", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line.startswith("listening on "):
        raise SystemExit("the hub did not start")
    return process, line.split()[-1]


async def round_trips_per_s(url: str, tasks: int, in_flight: int) -> float:
    """Return how many tasks a second go from a requester to a worker and back, with so many under way at a time."""
    connect = functools.partial(agenthub.connect_websocket, url)
    numbers = itertools.count()
    left = tasks
    done = asyncio.get_running_loop().create_future()

    def work(message: Any) -> None:
        if isinstance(message, Delegated):
            worker.ask(Result(task_id=message.task_id, success=True, output=PAYLOAD, attempt=1), lambda _: None)

    def go_on(message: Any) -> None:
        nonlocal left
        if isinstance(message, Settled):
            left -= 1
            if left == 0:
                done.set_result(None)
            delegate()

    def delegate() -> None:
        number = next(numbers)
        if number < tasks:
            task = Delegate(task_id=f"{in_flight}-{number}", capability="work", input=PAYLOAD)
            requester.ask(task, lambda _: None)

    worker, requester = await Session.open(connect, work), await Session.open(connect, go_on)
    await worker.request(Register(name="worker", capabilities=["work"], max_tasks=1000), agenthub.Registered)
    await requester.request(Register(name="requester"), agenthub.Registered)
    started = time.perf_counter()
    for _ in range(in_flight):
        delegate()
    await done
    passed_s = time.perf_counter() - started
    await asyncio.gather(worker.close(), requester.close())
    return tasks / passed_s


def measure_throughput(folder: Path, rounds: int, tasks: int) -> dict[str, Any]:
    """Return the median tasks per second of each mode, with one and with many tasks under way."""
    measured: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds):
        for mode, options in MODES.items():
            print(f"round {number + 1} of {rounds}: {mode}", file=sys.stderr)
            with_db = ["--db", str(folder / f"{mode}-{number}.db")] if options else []
            for in_flight, count in ((1, max(1, tasks // 20)), (200, tasks)):
                process, url = start_hub(*options, *with_db)
                try:
                    speed = asyncio.run(round_trips_per_s(url, count, in_flight))
                finally:
                    process.terminate()
                    process.wait()
                measured.setdefault((mode, in_flight), []).append(speed)
    medians = {key: statistics.median(speeds) for key, speeds in measured.items()}
    return {
        f"{in_flight}_in_flight": {
            mode: {
                "tasks_per_s": round(medians[mode, in_flight]),
                "of_memory": round(medians[mode, in_flight] / base, 3),
            }
            for mode in MODES
        }
        for in_flight in (1, 200)
        for base in [medians["memory", in_flight]]
    }


def make_journal(path: Path, tasks: int) -> None:
    """Write a journal with that many open tasks, as a hub would have."""
    journal = Journal(path, sync="normal")
    journal.open()
    settings = HubSettings(open_tasks_max=tasks, pending_tasks_max=tasks)
    hub = Hub(settings, entropy=os.urandom, now=0.0, is_journaled=True)
    for connection, register in (("w", Register(name="w", capabilities=["work"])), ("r", Register(name="r"))):
        hub.connected(connection, 0.0)
        hub.receive(connection, register, 0.0)
    for number in range(tasks):
        hub.receive("r", Delegate(task_id=f"t{number}", capability="work", input=PAYLOAD, ttl=80_000.0), 0.0, 200)
        if number % 1000 == 999:
            journal.write(hub.take_changes(), time.time())
    journal.write(hub.take_changes(), time.time())
    journal.close()


async def open_tasks(url: str) -> int:
    session = await Session.open(functools.partial(agenthub.connect_websocket, url), lambda _: None)
    counts = ((await session.request(Status(), agenthub.Reported)).hub or {})["tasks"]
    await session.close()
    return int(counts["pending"] + counts["in_progress"])


def measure_recovery(folder: Path, rounds: int, tasks: int) -> dict[str, Any]:
    """Return the seconds from the start of a hub until it has answered, with an empty journal and with a full one."""
    print(f"making a journal of {tasks} open tasks", file=sys.stderr)
    full = folder / "recovery.db"
    make_journal(full, tasks)
    taken: dict[str, list[float]] = {"empty": [], "full": []}
    for number in range(rounds):
        for name, path, expected in (("empty", folder / f"empty-{number}.db", 0), ("full", full, tasks)):
            print(f"recovery {number + 1} of {rounds}: {name}", file=sys.stderr)
            started = time.perf_counter()
            process, url = start_hub("--db", str(path))
            found = asyncio.run(open_tasks(url))
            taken[name].append(time.perf_counter() - started)
            process.kill()
            process.wait()
            if found != expected:
                raise SystemExit(f"{found} open tasks came back instead of {expected}")
    return {
        "open_tasks": tasks,
        "journal_bytes": full.stat().st_size,
        "start_s": {name: round(statistics.median(times), 2) for name, times in taken.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.journal", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="how often each is measured; the median counts"
    )
    parser.add_argument("--tasks", type=int, default=10_000, metavar="N", help="round trips in each measurement")
    parser.add_argument(
        "--open", type=int, default=100_000, metavar="N", help="open tasks in the journal to come back to"
    )
    parser.add_argument("--folder", default=None, help="where the journals are made: the disk to measure")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if min(args.rounds, args.tasks, args.open) < 1:
        parser.error("there is nothing to measure with less than 1")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        throughput = measure_throughput(Path(folder), args.rounds, args.tasks)
        recovery = measure_recovery(Path(folder), args.rounds, args.open)
    if args.json:
        print(json.dumps({"throughput": throughput, "recovery": recovery}, indent=2))
        return 0
    for under_way, modes in throughput.items():
        for mode, figures in modes.items():
            print(
                f"{under_way:>14} {mode:>7}: {figures['tasks_per_s']:>7} tasks/s, {figures['of_memory']:.2f} of memory"
            )
    start = recovery["start_s"]
    print(
        f"start with {recovery['open_tasks']} open tasks: {start['full']} s; with an empty journal: {start['empty']} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
