"""Latency of tasks at 10, 50 and 90 % of each server's throughput, measured from their scheduled start."""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import Options, Row, Server, alternate, medians, percentile, progress, require

if TYPE_CHECKING:
    from benchmarks.load import Shape

NAME = "latency"
LOAD_PERCENTS = (10, 50, 90)
PERCENTILES = {"p50_ms": 50, "p99_ms": 99, "p99_9_ms": 99.9}
SECONDS_EACH = 3  # Times the duration of a load, for enough tasks beyond the 99.9th percentile at 10 %.


def run(options: Options) -> list[Row]:
    """Measure each server's throughput with 8 requesters, 16 open tasks each and 8 workers; then send on a schedule.

    Requesters never wait for a result before they send, so the latency includes the delays that late tasks cause for
    the next ones (no coordinated omission). It also includes the driver's delays; `sent_late_ms` is the largest one.
    """
    require("pydantic", "websockets", "picows", "uvloop", "orjson")
    options.note("latency: measured from the scheduled start; `sent_late_ms` is the driver's largest share of it")
    from benchmarks.load import Shape, closed_loop, contestants, drive
    from benchmarks.throughput import UNLIMITED

    shape = Shape()
    with contextlib.ExitStack() as running:
        servers = {name: running.enter_context(start()) for name, start in contestants(*UNLIMITED).items()}
        progress("latency: throughput of each server")
        peaks = alternate(
            options.rounds,
            {
                name: lambda server=server: drive(closed_loop(server.url, server.pid, shape, options.seconds))
                for name, server in servers.items()
            },
        )
        peak = {name: statistics.median(row["tasks_per_s"] for row in rows) for name, rows in peaks.items()}
        rows = []
        for percent in LOAD_PERCENTS:
            progress(f"latency: {percent} % of the throughput")
            rows += _at(percent, peak, servers, shape, options)
    return rows


def _at(percent: int, peak: dict[str, float], servers: dict[str, Server], shape: Shape, options: Options) -> list[Row]:
    from benchmarks.load import limit_of

    turns = {
        name: lambda name=name: _turn(servers[name], shape, peak[name] * percent / 100, options) for name in servers
    }
    measured = alternate(options.rounds, turns)
    rows = []
    for name, results in measured.items():
        middle = medians([row for row in results if row is not None])
        figures = {column: middle.get(column) for column in (*PERCENTILES, "completed_share", "sent_late_ms")}
        limit = limit_of(middle) if middle else "failed"
        rows.append(
            {
                "server": name,
                "load_percent": percent,
                "tasks_per_s": peak[name] * percent / 100,
                **figures,
                "limit": limit,
            }
        )
    return rows


def _turn(server: Server, shape: Shape, tasks_per_s: float, options: Options) -> Row | None:
    from benchmarks.load import LoadFailed, drive, note_contention, open_loop

    try:
        row = drive(open_loop(server.url, server.pid, shape, tasks_per_s, options.seconds * SECONDS_EACH))
    except LoadFailed as failure:
        options.note(f"latency: {failure}")
        return None
    note_contention(row, options)
    latencies = row.pop("latencies_s")
    row["sent_late_ms"] = row.pop("sent_late_s") * 1e3
    return row | {column: percentile(latencies, percent) * 1e3 for column, percent in PERCENTILES.items()}


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Draw the percentiles over the tasks per second, for each server."""
    from benchmarks.plots import LINES, SERVER_COLORS, SERVER_LABELS, figure, save

    canvas, ((panel,),) = figure(1, 1)
    canvas.set_size_inches(9, 4.5)
    for server, color in SERVER_COLORS.items():
        of_server = [row for row in rows if row["server"] == server and row["p50_ms"] is not None]
        for column, line in zip(PERCENTILES, LINES, strict=False):
            label = f"{SERVER_LABELS[server]}, {column.removesuffix('_ms').replace('_9', '.9')}"
            rates, latencies = [row["tasks_per_s"] for row in of_server], [row[column] for row in of_server]
            panel.plot(rates, latencies, line, color=color, marker="o", markersize=3, label=label)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_xlim(left=0)
    panel.set_xlabel("tasks per second (10 %, 50 % and 90 % of the server's throughput)")
    panel.set_ylabel("latency (ms)")
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return [save(canvas, folder / "latency.png", "Latency of a task from its scheduled start")]
