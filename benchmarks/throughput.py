"""Tasks per second through a hub process and its CPU time per task, compared with a relay without any logic."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Options, Row, Server, alternate, medians, progress, require

if TYPE_CHECKING:
    from benchmarks.load import Shape

NAME = "throughput"

# With the default rate limit, a single requester would only measure the limit of 2,000 messages per second. With the
# default retention of an hour, each round would start with more memory than the last.
UNLIMITED = ("--rate", "0", "--retention", "1")
FIGURES = ("tasks_per_s", "hub_cpu_us_per_task", "hub_cores", "driver_cores")


def run(options: Options) -> list[Row]:
    require("pydantic", "websockets", "picows", "uvloop", "orjson")
    from benchmarks.load import Shape

    options.note(f"throughput: `options` is the defaults, or `open` for {' '.join(UNLIMITED)}; the relay has none")
    options.note(
        "throughput: with the defaults each connection may send 2,000 messages per second, so 8 requesters 16,000"
    )
    options.note("throughput: `limit` names the bottleneck; figures limited by the `driver` say little about the hub")
    rows = _compare(Shape(), "defaults", options)
    for shape in _shapes(options.quick):
        rows += _compare(shape, "open", options)
    return rows


def _shapes(is_quick: bool) -> list[Shape]:
    from benchmarks.load import Shape

    if is_quick:
        return [Shape(), Shape(payload_bytes=10_000, payload="objects"), Shape(1, 1, 500_000, "agent")]
    sizes, ways = (100, 10_000, 500_000), ("capability", "agent")
    return [
        *(Shape(*shape) for shape in itertools.product((1, 8, 64), (1, 16), sizes, ways)),
        Shape(payload_bytes=10_000, payload="objects"),
    ]


def _compare(shape: Shape, which: str, options: Options) -> list[Row]:
    """Return a row for each server; the servers of a case start together and are measured in turn."""
    from benchmarks.load import contestants, limit_of

    case = {
        "requesters": shape.requesters,
        "open_each": shape.open_each,
        "payload_bytes": shape.payload_bytes,
        "payload": shape.payload,
        "by": shape.by,
        "options": which,
    }
    progress(f"throughput: {' '.join(f'{name}={value}' for name, value in case.items())}")
    with contextlib.ExitStack() as running:
        starts = contestants(*(UNLIMITED if which == "open" else ()))
        servers = {name: running.enter_context(start()) for name, start in starts.items()}
        turns = {name: _turn(name, server, shape, options) for name, server in servers.items()}
        measured = alternate(options.rounds, turns)
    middles = {name: medians([row for row in rows if row is not None]) for name, rows in measured.items()}
    base = middles["relay"]
    return [
        {
            **case,
            "server": name,
            **{column: middle.get(column) for column in FIGURES},
            "of_relay": _ratio(middle, base, "tasks_per_s"),
            "cpu_of_relay": _ratio(middle, base, "hub_cpu_us_per_task"),
            "limit": limit_of(middle) if middle else "failed",
        }
        for name, middle in middles.items()
    ]


def _turn(name: str, server: Server, shape: Shape, options: Options) -> Any:
    """Return a function that measures one server once; it returns None, and adds a note, if the load fails."""
    from benchmarks.load import LoadFailed, closed_loop, drive, note_contention

    def turn() -> Row | None:
        try:
            row = drive(closed_loop(server.url, server.pid, shape, options.seconds))
        except LoadFailed as failure:
            options.note(f"throughput: {name}, {shape}: {failure}")
            return None
        note_contention(row, options)
        return row

    return turn


def _ratio(one: Row, other: Row, column: str) -> float | None:
    return one[column] / other[column] if one and other and other[column] else None


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Draw tasks per second and CPU time per task, with a panel per payload and a group of bars per shape."""
    from benchmarks.plots import SERVER_COLORS, bars, figure, save

    drawn = []
    for by in ("capability", "agent"):
        chosen = [row for row in rows if row["options"] == "open" and row["by"] == by]
        sizes = sorted({(row["payload_bytes"], row["payload"]) for row in chosen})
        if not sizes:
            continue
        canvas, panels = figure(2, len(sizes))
        for (line, column), (at, size) in itertools.product(
            enumerate(("tasks_per_s", "hub_cpu_us_per_task")), enumerate(sizes)
        ):
            panel = panels[line][at]
            of_size = [row for row in chosen if (row["payload_bytes"], row["payload"]) == size]
            shapes = dict.fromkeys((row["requesters"], row["open_each"]) for row in of_size)
            heights = {server: [row[column] for row in of_size if row["server"] == server] for server in SERVER_COLORS}
            bars(panel, [f"{many} x {each}" for many, each in shapes], heights)
            panel.set_title(f"{size[0]:,} bytes, {size[1]}" if line == 0 else "")
            panel.set_xlabel("requesters x open tasks" if line else "")
        panels[0][0].set_ylabel("tasks per second")
        panels[1][0].set_ylabel("CPU time of the server per task (µs)")
        panels[1][0].legend()
        drawn.append(save(canvas, folder / f"throughput-by-{by}.png", f"Throughput, worker chosen by {by}"))
    return drawn
