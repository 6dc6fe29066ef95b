"""Shared by all workloads: processes and their costs, fair comparisons, statistics, tables, the environment.

A workload is a module of this package:

    NAME = "throughput"                          its name on the command line
    def run(options: Options) -> list[Row]       measures; the first line of the module's docstring describes it
    def plot(rows: list[Row], folder: Path) -> list[Path]      optional: draws the rows of `run`

A `Row` is a flat mapping of column to text or number, with the unit last in the column's name (`hub_cpu_us_per_task`).
Consecutive rows with the same columns are printed as one table. Figures are medians of `options.rounds` rounds, in
which the compared variants take turns (`alternate`). A workload that cannot run on this machine raises `Unavailable`.
It calls `options.note` for everything that it skips, and for explanations of its figures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import itertools
import math
import os
import platform
import re
import select
import statistics
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import agenthub

Row = dict[str, Any]
Result = TypeVar("Result")
Name = TypeVar("Name", bound=Hashable)

ROOT = Path(agenthub.__file__).parent
START_S = 20.0  # Timeout for the start of a server, and for its end before it is killed.
PACKAGES = ("pydantic", "websockets", "picows", "uvloop", "orjson", "matplotlib")


class Unavailable(Exception):
    """A workload, or a part of one, cannot run on this machine. The text gives the reason and the fix."""


@dataclasses.dataclass
class Options:
    """The options of a run: `rounds` per comparison, `seconds` per load, and a `folder` for temporary files.

    `quick` runs are short enough for tests; their figures mean nothing. `notes` are reported with the figures.
    """

    rounds: int = 5
    seconds: float = 1.0
    quick: bool = False
    folder: Path | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note to the figures, once."""
        if text not in self.notes:
            self.notes.append(text)
            progress(text)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def require(*packages: str) -> None:
    """Raise Unavailable, with the command that installs them, if any of these packages is missing."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise Unavailable(f"it needs {', '.join(missing)}: pip install {' '.join(missing)}")


# Processes


@dataclasses.dataclass(frozen=True)
class Server:
    """A process that listens at `url`."""

    process: subprocess.Popen[str]
    url: str

    @property
    def pid(self) -> int:
        return self.process.pid


@contextlib.contextmanager
def running(*command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a command with its stdout piped, and terminate it when the block ends.

    It runs in a new session, so that only this process receives Ctrl-C and then terminates the other. Python may write
    its bytecode cache, as it does by default.
    """
    python = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **python, **options.pop("env", {})}
    options |= {"stdout": subprocess.PIPE, "text": True, "env": environment, "start_new_session": True}
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(START_S)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def server(*command: str, **options: Any) -> Iterator[Server]:
    """Run a server that prints `listening on URL` once it accepts connections, as a hub does."""
    with running(*command, **options) as process:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_S)
        line = process.stdout.readline() if ready else ""
        if not line.startswith("listening on "):
            raise Unavailable(f"{' '.join(command[1:4])} did not start")
        yield Server(process, line.split()[-1])


@contextlib.contextmanager
def hub(*options: str, loop: str = "asyncio", is_bare: bool = False) -> Iterator[Server]:
    """Run a hub with these options on a free port of 127.0.0.1, on this event loop.

    A bare hub uses the built-in validator and WebSocket protocol instead of `pydantic` and `websockets`.
    """
    command = [sys.executable, "-m", "agenthub", "hub", "--loop", loop]
    environment = {"AGENTHUB_BUILTIN": str(int(is_bare))}
    with server(*command, "--port", "0", "--log-level", "error", *options, env=environment) as started:
        yield started


def cpu_s(pid: int) -> float:
    """Return the CPU time (user and system) that a process and its threads have used so far, in seconds."""
    return parse_cpu_s(Path(f"/proc/{pid}/stat").read_text(), os.sysconf("SC_CLK_TCK"))


def parse_cpu_s(stat: str, ticks_per_s: int) -> float:
    """Return utime + stime from /proc/PID/stat, in which the process name may contain any characters."""
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / ticks_per_s


def queued_s(pid: int) -> float:
    """Return how long a process's main thread has waited for a core, in seconds; 0 if the kernel does not report it."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def memory_bytes(pid: int) -> int:
    """Return the private memory of a process (Private_* in /proc/PID/smaps_rollup), which its end would free."""
    return parse_private_bytes(Path(f"/proc/{pid}/smaps_rollup").read_text())


def parse_private_bytes(rollup: str) -> int:
    return sum(int(kib) * 1024 for kib in re.findall(r"^Private_\w+:\s+(\d+) kB", rollup, re.MULTILINE))


# Comparisons


def alternate(rounds: int, contestants: Mapping[Name, Callable[[], Result]]) -> dict[Name, list[Result]]:
    """Call each contestant once per round, and start each round with the next one; return their results."""
    results: dict[Name, list[Result]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            results[name].append(contestants[name]())
    return results


def medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each column over rows with the same columns."""
    return {column: statistics.median(row[column] for row in rows) for column in rows[0]} if rows else {}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of ascending values."""
    if not ordered:
        raise ValueError("nothing has no percentile")
    return ordered[max(1, math.ceil(round(len(ordered) * percent / 100, 9))) - 1]


def spread(values: Sequence[float]) -> float:
    """Return (largest - smallest) / median, a measure of the variation between rounds."""
    middle = statistics.median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


# Output


def format_table(rows: Sequence[Row]) -> str:
    """Return rows as aligned text: one table for consecutive rows with the same columns, with empty lines between."""
    tables = [list(group) for _, group in itertools.groupby(rows, key=tuple)]
    return "\n\n".join(_one_table(table) for table in tables)


def _one_table(rows: Sequence[Row]) -> str:
    columns = list(rows[0])
    cells = [[to_text(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[at]) for line in (columns, *cells)) for at in range(len(columns))]
    is_number = [all(isinstance(row[column], int | float | None) for row in rows) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in (columns, *cells)
    )


def to_text(value: Any) -> str:
    """Return a float with three significant digits, a dash for None, and other values as text."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}".replace(",", "") if abs(value) >= 100 else f"{value:.3g}"


def describe() -> Row:
    """Return the environment: machine, Python, versions of packages, and the commit."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "system": platform.platform(),
            "architecture": platform.machine(),
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE"),
            "load": os.getloadavg()[0],
        },
        "python": platform.python_version(),
        "packages": {"agenthub": agenthub.__version__} | {package: _version(package) for package in PACKAGES},
        "commit": _commit(),
    }


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit, with a + if tracked files differ from it, or None if it is unknown."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
