"""Start times of `import agenthub`, `agenthub --help`, and a hub until it listens, and of a bare interpreter."""

from __future__ import annotations

import importlib.util
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Options, Row, Unavailable, alternate, hub, medians, progress, running

NAME = "start"
TIMES_EACH = 5  # Per round, because one start is short.


def run(options: Options) -> list[Row]:
    """Time whole processes, except the first of each, which fills caches."""
    starts: dict[str, Callable[[], None]] = {
        "python -c pass": lambda: finish("-c", "pass"),
        "import agenthub": lambda: finish("-c", "import agenthub"),
        "agenthub --help": lambda: finish("-m", "agenthub", "--help"),
        "hub listens": lambda: listen("asyncio"),
        "hub listens, built in": lambda: listen("asyncio", is_bare=True),
    }
    if importlib.util.find_spec("uvloop") is not None:
        starts["hub listens, uvloop"] = lambda: listen("uvloop")
    else:
        options.note("start: the hub on uvloop is skipped: pip install uvloop")
    for name, start in starts.items():
        progress(f"start: {name}")
        start()
    times = 1 if options.quick else TIMES_EACH
    measured = alternate(
        options.rounds, {name: lambda start=start: timed(start, times) for name, start in starts.items()}
    )
    middles = {name: medians(rows) for name, rows in measured.items()}
    bare = middles["python -c pass"]
    return [
        {
            "start": name,
            "ms": middle["ms"],
            "cpu_ms": middle["cpu_ms"],
            "ms_over_bare": middle["ms"] - bare["ms"],
            "cpu_ms_over_bare": middle["cpu_ms"] - bare["cpu_ms"],
            "of_bare": middle["ms"] / bare["ms"],
        }
        for name, middle in middles.items()
    ]


def finish(*args: str) -> None:
    """Run a Python program to its end."""
    with running(sys.executable, *args) as process:
        process.communicate()
    if process.returncode:
        raise Unavailable(f"python {' '.join(args)} failed")


def listen(loop: str, is_bare: bool = False) -> None:
    """Run a hub until it listens, then kill it."""
    with hub(loop=loop, is_bare=is_bare) as started:
        started.process.kill()


def timed(start: Callable[[], None], times: int) -> Row:
    """Return the wall-clock time of a start, and the CPU time of its processes, in milliseconds."""
    began, cpu_began = time.perf_counter(), children_cpu_s()
    for _ in range(times):
        start()
    return {
        "ms": (time.perf_counter() - began) / times * 1e3,
        "cpu_ms": (children_cpu_s() - cpu_began) / times * 1e3,
    }


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Draw the milliseconds of each start."""
    from benchmarks.plots import figure, save

    canvas, ((panel,),) = figure(1, 1)
    panel.barh([row["start"] for row in rows], [row["ms"] for row in rows], color="#4477aa")
    panel.invert_yaxis()
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    panel.grid(visible=False, axis="y")
    panel.set_xlabel("ms")
    return [save(canvas, folder / "start.png", "Time until exit, or until the hub listens")]
