"""What the workloads share: processes and what they cost, fair comparisons, statistics, tables, where it was measured.

A workload is a module of this package:

    NAME = "throughput"                          what it is called on the command line
    def run(options: Options) -> list[Row]       measures; the first line of the module's docstring says what
    def plot(rows: list[Row], folder: Path) -> list[Path]      optional: draws what `run` has returned

A `Row` is a flat mapping of column to text or number, with the unit last in the column's name (`hub_cpu_us_per_task`).
Rows with the same columns that follow each other are printed as one table. Figures are medians of `options.rounds`
rounds in which the things compared take turns (`alternate`). A workload that cannot run here raises `Unavailable`; what
it leaves out, and what a reader has to know, it says with `options.note`.
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
START_S = 20.0  # The bound on the start of a server, and on its end before it is killed.
PACKAGES = ("pydantic", "websockets", "picows", "uvloop", "orjson", "matplotlib")


class Unavailable(Exception):
    """A workload, or a part of one, cannot run here. The text says why, and what would help."""


@dataclasses.dataclass
class Options:
    """How much to measure: `rounds` of each comparison, `seconds` of each load, and in which `folder` files are made.

    `quick` asks for so little that a test can wait for it; its figures mean nothing. `notes` are kept with the figures.
    """

    rounds: int = 5
    seconds: float = 1.0
    quick: bool = False
    folder: Path | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def note(self, text: str) -> None:
        """Say something that belongs to the figures, once."""
        if text not in self.notes:
            self.notes.append(text)
            progress(text)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def require(*packages: str) -> None:
    """Raise Unavailable, with what to install, unless all these packages are there."""
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
    """Run a command with its stdout piped; end it when the block ends, however that comes.

    It has a session of its own, because Ctrl-C is for this process, which then ends it. What Python compiles it may
    keep, as it does by default.
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
    """Run a command that prints `listening on URL`, as a hub does, once it is there."""
    with running(*command, **options) as process:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_S)
        line = process.stdout.readline() if ready else ""
        if not line.startswith("listening on "):
            raise Unavailable(f"{' '.join(command[1:4])} did not start")
        yield Server(process, line.split()[-1])


@contextlib.contextmanager
def hub(*options: str, loop: str = "asyncio", is_bare: bool = False) -> Iterator[Server]:
    """Run a hub with these options on a free port of 127.0.0.1, on this kind of event loop.

    A bare one uses neither `pydantic` nor `websockets`, but what is built in.
    """
    command = [sys.executable, "-m", "agenthub", "hub", "--loop", loop]
    environment = {"AGENTHUB_BUILTIN": str(int(is_bare))}
    with server(*command, "--port", "0", "--log-level", "error", *options, env=environment) as started:
        yield started


def cpu_s(pid: int) -> float:
    """Return the seconds of CPU, user and system, that a process and its threads have used so far."""
    return parse_cpu_s(Path(f"/proc/{pid}/stat").read_text(), os.sysconf("SC_CLK_TCK"))


def parse_cpu_s(stat: str, ticks_per_s: int) -> float:
    """Return utime + stime of a line of /proc/PID/stat; the name of the process in it may hold anything."""
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / ticks_per_s


def queued_s(pid: int) -> float:
    """Return the seconds that a process's main thread has waited for a core so far; 0 if this kernel does not say."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def memory_bytes(pid: int) -> int:
    """Return what a process has to itself (Private_* of /proc/PID/smaps_rollup): what would be free without it."""
    return parse_private_bytes(Path(f"/proc/{pid}/smaps_rollup").read_text())


def parse_private_bytes(rollup: str) -> int:
    return sum(int(kib) * 1024 for kib in re.findall(r"^Private_\w+:\s+(\d+) kB", rollup, re.MULTILINE))


# Comparisons


def alternate(rounds: int, contestants: Mapping[Name, Callable[[], Result]]) -> dict[Name, list[Result]]:
    """Call each contestant once a round, each round beginning with the next one; return what each returned."""
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
    """Return the smallest of these ascending values that so many per cent of them do not exceed (nearest rank)."""
    if not ordered:
        raise ValueError("there is no percentile of nothing")
    return ordered[max(1, math.ceil(round(len(ordered) * percent / 100, 9))) - 1]


def spread(values: Sequence[float]) -> float:
    """Return (largest - smallest) / median: how far apart the rounds were."""
    middle = statistics.median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


# What is printed and written


def format_table(rows: Sequence[Row]) -> str:
    """Return rows as aligned text: one table for each run of rows with the same columns, an empty line between."""
    tables = [list(group) for _, group in itertools.groupby(rows, key=tuple)]
    return "\n\n".join(_one_table(table) for table in tables)


def _one_table(rows: Sequence[Row]) -> str:
    columns = list(rows[0])
    cells = [[shown(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[at]) for line in (columns, *cells)) for at in range(len(columns))]
    is_number = [all(isinstance(row[column], int | float | None) for row in rows) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in (columns, *cells)
    )


def shown(value: Any) -> str:
    """Return a number with three digits that count, all else as it is; nothing for what there is not."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}".replace(",", "") if abs(value) >= 100 else f"{value:.3g}"


def describe() -> Row:
    """Return where and with what is measured: machine, Python, versions of packages, and the commit."""
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
    """Return the commit, with a + when files that are under version control differ from it; None if it is unknown."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
