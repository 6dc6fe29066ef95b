"""Memory of a hub's records, compared with the bytes that it counts for its limit, for ten shapes of payload."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import Options, Row, alternate, hub, medians, memory_bytes, progress, require

NAME = "memory"
TOTAL_BYTES = 32_000_000  # Of all payloads of a shape, unless they are so small that TASKS_MAX comes first.
TASKS_MAX = 20_000
OPTIONS = ("--rate", "0", "--max-open-tasks", str(TASKS_MAX + 1))
SIZE = 10_000  # Bytes of a payload, about, except of those with another size in their name.


def shapes() -> dict[str, bytes]:
    """Return a payload of each shape: what takes the most memory when it is parsed, and what is usual."""
    from benchmarks.load import Shape

    depth = 60
    return {
        "null": b"null",
        "string of 100 B": b'"%s"' % (b"x" * 100),
        "string": b'"%s"' % (b"x" * SIZE),
        "string of 500 kB": b'"%s"' % (b"x" * 500_000),
        "string, Unicode": b'"%s"' % ("東京" * (SIZE // 6)).encode(),
        "objects": Shape(payload_bytes=SIZE, payload="objects").payload_json(),
        "empty objects": b"[%s]" % b",".join([b"{}"] * (SIZE // 3)),
        "numbers": b"[%s]" % b",".join(b"%d.5" % number for number in range(1000, 1000 + SIZE // 7)),
        "many names": b"{%s}" % b",".join(b'"k%d":0' % number for number in range(1000, 1000 + SIZE // 10)),
        "deep": b"[%s]" % b",".join([b"[" * depth + b"]" * depth] * (SIZE // (2 * depth))),
    }


def run(options: Options) -> list[Row]:
    """Fill a new hub with tasks of each shape, which wait for an agent that never comes."""
    require("picows", "uvloop", "orjson")
    total = 200_000 if options.quick else TOTAL_BYTES
    options.note(
        "memory: private memory beyond that of the hub with one task; `counted` is `records_bytes` of its status"
    )

    def measure(payload: bytes) -> Row:
        from benchmarks.load import drive, fill

        tasks = max(1, min(TASKS_MAX, total // len(payload)))
        with hub(*OPTIONS) as started:
            return drive(fill(started.url, payload, tasks, lambda: memory_bytes(started.pid)))

    contestants: dict[str, Callable[[], Row]] = {
        shape: functools.partial(measure, payload) for shape, payload in shapes().items()
    }
    progress(f"memory: {', '.join(contestants)}")
    measured = alternate(options.rounds, contestants)
    return [row_of(shape, medians(rows)) for shape, rows in measured.items()]


def row_of(shape: str, middle: dict[str, Any]) -> Row:
    tasks = middle["tasks"]
    return {
        "payload": shape,
        "payload_bytes": round(middle["payload_bytes"]),
        "tasks": round(tasks),
        "counted_bytes_per_task": middle["counted_bytes"] / tasks,
        "memory_bytes_per_task": middle["memory_bytes"] / tasks,
        "of_counted": middle["memory_bytes"] / middle["counted_bytes"],
    }


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Draw the memory of each shape relative to what is counted."""
    from benchmarks.plots import figure, save

    canvas, ((panel,),) = figure(1, 1)
    panel.barh([row["payload"] for row in rows], [row["of_counted"] for row in rows], color="#4477aa")
    panel.invert_yaxis()
    panel.set_xlabel("memory / counted")
    return [save(canvas, folder / "memory.png", "Memory of records, relative to the bytes counted for the limit")]
