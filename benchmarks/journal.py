"""Cost of the journal with both sync modes, compared with a hub in memory, and the time to load a full journal.

Round trips (delegate, assign, result, outcome) go through a separate hub process, with an agent of the SDK at each end.
Then a hub starts with a journal that holds many open tasks. The results depend on the disk: the journals are created in
a temporary folder under --folder. With AGENTHUB_BENCH_POSTGRES, the URL of a database, a journal there is compared too;
its schema `agenthub_bench` is dropped and created.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import agenthub
from agenthub import (
    Changes,
    Delegate,
    Delegated,
    Hub,
    HubSettings,
    Journal,
    Register,
    Result,
    Session,
    Status,
    TaskOutcome,
)
from benchmarks.measure import Options, Row, Unavailable, alternate, cpu_s, hub, medians, progress

NAME = "journal"
UNLIMITED = ("--rate", "0")  # By default a connection may send 2,000 messages per second.
MODES = ("memory", "normal", "full")  # The latter two are those of `--sync`.
POSTGRES = os.environ.get("AGENTHUB_BENCH_POSTGRES")
SCHEMA = "agenthub_bench"
PAYLOAD = {"code": "print('hello')\n" * 8, "strict": True}
TASKS_PER_S = 10_000  # Times the duration of a load; a twentieth of it with one task in flight.
OPEN_TASKS = 100_000


def run(options: Options) -> list[Row]:
    tasks = 200 if options.quick else round(TASKS_PER_S * options.seconds)
    open_tasks = 200 if options.quick else OPEN_TASKS
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        rows = _compare(folder, 1, max(1, tasks // 20), options)
        rows += _compare(folder, 200, tasks, options) + _compare(folder, 1000, tasks, options)
        return rows + _recover(folder, open_tasks, options)


def _journal(mode: str, path: Path) -> list[str]:
    """Return the hub's options for an empty journal."""
    if mode == "memory":
        return []
    if mode != "postgres":
        return ["--db", str(path), "--sync", mode]
    import psycopg

    assert POSTGRES is not None
    with psycopg.connect(POSTGRES, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE; CREATE SCHEMA {SCHEMA}")
    return ["--db", f"{POSTGRES}{'&' if '?' in POSTGRES else '?'}options={quote(f'-c search_path={SCHEMA}')}"]


def _compare(folder: Path, in_flight: int, tasks: int, options: Options) -> list[Row]:
    """Return a row for each mode, with `in_flight` tasks at a time."""
    progress(f"journal: {in_flight} in flight")
    numbers = itertools.count()

    def turn(mode: str) -> Row:
        with hub(*UNLIMITED, *_journal(mode, folder / f"{in_flight}-{next(numbers)}.db")) as started:
            cpu_before_s = cpu_s(started.pid)
            speed = asyncio.run(round_trips_per_s(started.url, tasks, in_flight))
            return {"tasks_per_s": speed, "hub_cpu_us_per_task": (cpu_s(started.pid) - cpu_before_s) / tasks * 1e6}

    modes = (*MODES, "postgres") if POSTGRES else MODES
    measured = alternate(options.rounds, {mode: functools.partial(turn, mode) for mode in modes})
    middles = {mode: medians(rows) for mode, rows in measured.items()}
    base = middles["memory"]["tasks_per_s"]
    return [
        {"in_flight": in_flight, "tasks_are": mode, **middle, "of_memory": middle["tasks_per_s"] / base}
        for mode, middle in middles.items()
    ]


def _recover(folder: Path, tasks: int, options: Options) -> list[Row]:
    """Compare the time from a hub's start until its first reply, with an empty and a full journal."""
    progress(f"journal: creating one with {tasks} open tasks")
    full = folder / "full.db"
    make_journal(full, tasks)
    numbers = itertools.count()

    def turn(path: Path, expected: int) -> Row:
        began = time.perf_counter()
        with hub("--db", str(path)) as started:
            found = asyncio.run(open_tasks(started.url))
            passed_s = time.perf_counter() - began
            started.process.kill()  # Killed, so that it does not change the journal.
        if found != expected:
            raise Unavailable(f"the hub loaded {found} open tasks instead of {expected}")
        return {"start_s": passed_s}

    progress("journal: starting hubs")
    turns = {"empty": lambda: turn(folder / f"empty-{next(numbers)}.db", 0), "full": lambda: turn(full, tasks)}
    middles = {name: medians(rows) for name, rows in alternate(options.rounds, turns).items()}
    held = {"empty": 0, "full": tasks}
    size = {"empty": None, "full": full.stat().st_size}
    return [
        {"journal": name, "open_tasks": held[name], "journal_bytes": size[name], **middle}
        for name, middle in middles.items()
    ]


async def round_trips_per_s(url: str, tasks: int, in_flight: int) -> float:
    """Return the tasks per second from a requester to a worker and back, with `in_flight` tasks at a time."""
    connect = functools.partial(agenthub.connect_websocket, url)
    numbers = itertools.count()
    left = tasks
    done = asyncio.get_running_loop().create_future()

    def work(message: Any) -> None:
        if isinstance(message, Delegated):
            worker.send_request(
                Result(task_id=message.task_id, success=True, output=PAYLOAD, attempt=1), lambda _: None
            )

    def replace_ended(message: Any) -> None:
        nonlocal left
        if isinstance(message, TaskOutcome):
            left -= 1
            if left == 0:
                done.set_result(None)
            delegate()

    def delegate() -> None:
        number = next(numbers)
        if number < tasks:
            task = Delegate(task_id=f"{in_flight}-{number}", capability="work", input=PAYLOAD)
            requester.send_request(task, lambda _: None)

    worker, requester = await Session.open(connect, work), await Session.open(connect, replace_ended)
    await worker.request(Register(name="worker", capabilities=["work"], max_tasks=1000), agenthub.Registered)
    await requester.request(Register(name="requester"), agenthub.Registered)
    started = time.perf_counter()
    for _ in range(in_flight):
        delegate()
    await done
    passed_s = time.perf_counter() - started
    await asyncio.gather(worker.close(), requester.close())
    return tasks / passed_s


def make_journal(path: Path, tasks: int) -> None:
    """Write the journal of a hub with a number of open tasks."""
    journal = Journal(path, sync="normal")
    journal.open()
    settings = HubSettings(open_tasks_max=tasks, pending_tasks_max=tasks)
    hub = Hub(settings, entropy=os.urandom, now=0.0, is_journaled=True)
    changes = Changes()
    for connection, register in (("w", Register(name="w", capabilities=["work"])), ("r", Register(name="r"))):
        hub.connected(connection, 0.0)
        changes.merge(hub.receive(connection, register, 0.0).changes or Changes())
    for number in range(tasks):
        task = Delegate(task_id=f"t{number}", capability="work", input=PAYLOAD, ttl=80_000.0)
        changes.merge(hub.receive("r", task, 0.0, 200).changes or Changes())
        if number % 1000 == 999:
            journal.write(changes, time.time())
            changes = Changes()
    journal.write(changes, time.time())
    journal.close()


async def open_tasks(url: str) -> int:
    """Return the number of open tasks in a hub's status."""
    session = await Session.open(functools.partial(agenthub.connect_websocket, url), lambda _: None)
    counts = ((await session.request(Status(), agenthub.StatusReply)).hub or {})["tasks"]
    await session.close()
    return int(counts["pending"] + counts["in_progress"])
