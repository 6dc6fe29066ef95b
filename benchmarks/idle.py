"""Cost of idle agents: the hub's memory for each, and its CPU time for registrations and heartbeats."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import Options, Row, alternate, medians, progress, require

NAME = "idle"
AGENTS = (1_000, 10_000)
HEARTBEAT_S = 30.0  # The hub's default.
BEATS_PER_S = 10_000 / HEARTBEAT_S
SECONDS_EACH = 5  # Times the duration of a load: the kernel counts CPU time in hundredths of a second.
SPARE_FILES = 200


def run(options: Options) -> list[Row]:
    """Register the agents at a new server each time, and send heartbeats from each in turn.

    The rate of heartbeats is always that of 10,000 agents with the default interval, because the CPU time for fewer is
    too short to be measured; `heartbeats_percent_of_core` is scaled to the default interval.
    """
    require("pydantic", "websockets", "picows", "uvloop", "orjson")
    options.note(
        f"idle: measured with {BEATS_PER_S:.0f} heartbeats per second, scaled to one per agent every {HEARTBEAT_S:g} s"
    )
    rows = []
    for agents in (100,) if options.quick else AGENTS:
        if not allow_files(agents + SPARE_FILES):
            options.note(f"idle: {agents} agents are skipped: the hard limit of `ulimit -n` is too low")
            continue
        rows += _compare(agents, options)
    return rows


def allow_files(needed: int) -> bool:
    """Raise the limit on open files for this process and its children; return whether it suffices."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        return False
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return True


def _compare(agents: int, options: Options) -> list[Row]:
    from benchmarks.load import contestants

    capacity = str(agents + 10)
    options_of_hub = (
        "--max-connections",
        capacity,
        "--max-connections-per-address",
        capacity,
        "--max-agents",
        capacity,
    )
    starts = contestants(*options_of_hub)
    turns = {name: _turn(name, start, agents, options) for name, start in starts.items()}
    measured = alternate(options.rounds, turns)
    rows = []
    for name, results in measured.items():
        middle = medians([row for row in results if row is not None])
        cost_us = middle.get("heartbeat_hub_cpu_us")
        share = None if cost_us is None else cost_us / 1e6 * agents / HEARTBEAT_S * 100
        columns = ("hub_bytes_per_agent", "join_hub_cpu_us", "heartbeat_hub_cpu_us")
        figures = {column: middle.get(column) for column in columns}
        rows.append({"server": name, "agents": agents, **figures, "heartbeats_percent_of_core": share})
    return rows


def _turn(name: str, start: Callable[[], Any], agents: int, options: Options) -> Callable[[], Row | None]:
    from benchmarks.load import LoadFailed, drive, idle

    def turn() -> Row | None:
        progress(f"idle: {agents} agents at {name}")
        with start() as server:
            try:
                return drive(idle(server.url, server.pid, agents, BEATS_PER_S, options.seconds * SECONDS_EACH))
            except LoadFailed as failure:
                options.note(f"idle: {name}, {agents} agents: {failure}")
                return None

    return turn


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Draw the memory per agent and the CPU time of heartbeats side by side."""
    from benchmarks.plots import SERVER_COLORS, bars, figure, save

    canvas, (panels,) = figure(1, 2)
    groups = [f"{agents:,} agents" for agents in sorted({row["agents"] for row in rows})]
    columns = {
        "hub_bytes_per_agent": "memory per agent (bytes)",
        "heartbeats_percent_of_core": "heartbeats (% of a core)",
    }
    for panel, (column, title) in zip(panels, columns.items(), strict=True):
        heights = {server: [row[column] for row in rows if row["server"] == server] for server in SERVER_COLORS}
        bars(panel, groups, heights)
        panel.set_title(title)
    panels[1].legend()
    return [save(canvas, folder / "idle.png", "Cost of idle agents for the hub")]
