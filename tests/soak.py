"""A hub under clients that come and go, hang, die, flood it and send garbage: `python -m tests.soak --minutes 10`.

The hub is a process of its own, with a journal unless `--no-db` is given, whose records live for seconds, so that
everything in it is replaced many times. In the first third of a run it is restarted by turns with SIGTERM and
SIGKILL, and in all of it stopped now and then for longer than a silence (SIGSTOP), while a program tries to read the
journal. Without `--db` or `--no-db`, two thirds of the time are spent with a journal and the rest without. The soak
checks these promises:

- Every acknowledged task is accounted for: exactly one outcome, delivered to a requester that stayed or came back in
  time, with the result that its worker sent. See `ClientLedger` in tests/load_clients.py.
- Without a journal a restart may lose tasks, but none begins more often than `1 + max_retries` times.
- The hub logs no error and no payload, closes no well-behaved client, and completes every task of a calm pair. A
  requester's only task does not wait for 5,000 of another one.
- Nothing grows. Memory, open files and the numbers in `status` are measured during the whole run. In the second half,
  some time after the last restart, a line is fitted to each by least squares. It is `growing` if over that time the
  line rises by more than a tenth of the mean, and by more than twice the standard deviation of the samples about it;
  else `flat`. A leak that matters passes the first limit within minutes: in ten times the length it would have
  doubled the use. The second is for counts that go up and down: a rise within their scatter means nothing. Memory and
  the journal's file keep the size of the largest crowd so far: so a larger one than chance makes comes before.
- When all clients have left, and retention and grace are over, the hub and its journal are empty, and it has as many
  files open as at the start. Then it ends on SIGTERM within five seconds, with 0.

A failure is printed with its history. The same seed makes the same choices, but not the same history: time is real.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import logging
import math
import os
import random
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.load_clients import FINAL, ClientLedger, LoadClients, Pace, Requester, Wire, Worker
from tests.support import WAIT_S, hub_process

BACKLOG_BYTES = 262_144  # A slow consumer passes it soon.
STOP_S = 5.0
STOP_UNDER_LOAD_S = 9.0  # Containers are killed after 10 s.
STOP_EVERY_S = 60.0  # The hub's process, for a while.
TREND_S = 180.0  # In a shorter run the trends follow the clients' chances: they are shown, but not judged.
PROBLEMS_SHOWN = 20
SHORT = Pace(retention_s=3.0, grace_s=1.0, heartbeat_s=2.0, unit_s=0.3, sample_s=0.5, restart_s=1.5)


# Measuring


class Process:
    """What /proc measures of a process; nothing on systems without /proc."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")

    def measure(self) -> dict[str, float]:
        if not self._folder.exists():
            return {}
        pages = int((self._folder / "statm").read_text().split()[1])
        return {"rss_bytes": pages * os.sysconf("SC_PAGE_SIZE"), "files": self.files()}

    def files(self) -> int:
        return len(list((self._folder / "fd").iterdir())) if self._folder.exists() else 0

    def cpu_s(self) -> float:
        if not self._folder.exists():
            return math.nan
        fields = (self._folder / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class HubRun:
    """The hub's process, which can be replaced by another one at the same port. `start` comes first, `close` last."""

    def __init__(self, folder: Path, pace: Pace, *, is_journaled: bool) -> None:
        options = {
            "--log-level": "info",
            "--retention": pace.retention_s,
            "--grace": pace.grace_s,
            "--heartbeat": pace.heartbeat_s,
            "--backlog": BACKLOG_BYTES,
            **({"--db": folder / "hub.db"} if is_journaled else {}),
        }
        self.port = 0
        self.is_journaled = is_journaled
        self._args = [str(one) for option in options.items() for one in option]
        self._log = (folder / "hub.log").open("w")
        self._running = contextlib.ExitStack()

    def start(self) -> None:
        url, self.process = self._running.enter_context(
            hub_process(*self._args, "--port", str(self.port), stderr=self._log)
        )
        self.port = int(url.rpartition(":")[2])

    def end(self, signal_number: int, within_s: float) -> tuple[int | None, float]:
        """Send a signal; return the exit code, None if it does not come in time, and the seconds until then."""
        started = time.monotonic()
        exit_code = self.process.poll()
        if exit_code is None:
            self.process.send_signal(signal_number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                exit_code = self.process.wait(within_s)
        self._running.close()
        return exit_code, time.monotonic() - started

    def close(self) -> None:
        self._running.close()
        self._log.close()


class Log:
    """The hub's stderr, searched for errors and payloads while it grows."""

    def __init__(self, path: Path, marker: str) -> None:
        self.problems: list[str] = []
        self.lines = 0
        self._file = path.open(errors="replace")
        self._marker = marker
        self._rest = ""
        self._is_in_problem = False

    def look(self) -> None:
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        self.lines += len(lines)
        for line in lines:
            self._judge(line)

    def _judge(self, line: str) -> None:
        if " ERROR " in line or " CRITICAL " in line or (line.startswith("Traceback") and not self._is_in_problem):
            self.problems.append(f"the hub has logged: {line[:300]}")
            self._is_in_problem = True
        elif not re.match(r"\d{4}-\d\d-\d\d ", line) and self._is_in_problem:
            self.problems[-1] += f"\n    {line[:300]}"  # A traceback follows the line that it belongs to.
        else:
            self._is_in_problem = False
        if self._marker in line:
            self.problems.append(f"the hub has logged a payload: {line[:300]}")

    def close(self) -> None:
        self.look()
        self._file.close()


def trend(samples: list[tuple[float, float]]) -> dict[str, Any]:
    """Return the line through samples of (seconds, number), and the verdict: see the module's docstring."""
    times, numbers = [at for at, _ in samples], [number for _, number in samples]
    mean = statistics.fmean(numbers)
    slope, offset = statistics.linear_regression(times, numbers)
    about = statistics.pstdev([number - slope * at - offset for at, number in samples])
    rise = slope * (times[-1] - times[0])
    return {
        "mean": round(mean, 2),
        "least": min(numbers),
        "most": max(numbers),
        "slope_per_minute": round(60 * slope, 4),
        "relative_per_minute": round(60 * slope / mean, 5) if mean else 0.0,
        "verdict": "growing" if rise > max(mean / 10, 2 * about) else "flat",
    }


# The run


class Soak:
    """One run against a running hub: `run` it, then `report`."""

    def __init__(self, hub: HubRun, *, folder: Path, seed: int, for_s: float, pace: Pace) -> None:
        self.for_s, self.pace, self.seed = for_s, pace, seed
        self.marker = f"marker-{random.Random(seed).randbytes(8).hex()}"
        hold_s = pace.ttl_max_s + pace.retention_s + pace.grace_s + WAIT_S / 2
        self.ledger = ClientLedger(self.marker, hold_s, is_journaled=hub.is_journaled)
        self.load = LoadClients(hub.port, seed, pace, self.ledger)
        self.problems: list[str] = []
        self.samples: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
        self.ending: dict[str, Any] = {}
        self.restarts = 0
        self.stops_s: list[float] = []  # What they took.
        self._hub = hub
        self._process = Process(hub.process.pid)
        self._folder = folder
        self._log = Log(folder / "hub.log", self.marker)
        self._cpu: list[tuple[float, float]] = []
        self._shown: set[str] = set()

    async def run(self) -> None:
        self._signalling = asyncio.Lock()  # Either stopped or restarted.
        self._observer = await Wire.open(self.load.port, lambda _: None, lambda _: None)
        files = await self._files_at_start()
        background = [
            asyncio.create_task(one)
            for one in (
                self._beat(),
                self._sample(),
                self._restart_sometimes(),
                self._stop_sometimes(),
                self._read_sometimes(),
            )
        ]
        await self.load.churn(self.for_s)
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        self.ledger.close()
        if not self._observer.lost.is_set():
            await self._require_empty(files)
            self._observer.abort()
        self._log.look()

    async def _beat(self) -> None:
        """Give signs of life while a reply is awaited, which may wait for the journal's disk."""
        while True:
            self._observer.send(type="status")  # Without an id, so without a reply.
            await asyncio.sleep(self.pace.heartbeat_s / 2)

    async def _restart_sometimes(self) -> None:
        """Replace the hub's process in the first third of the run, by turns after SIGTERM and SIGKILL."""
        last = time.monotonic() + self.for_s / 3
        while time.monotonic() + self.pace.restart_s < last:
            await asyncio.sleep(self.pace.restart_s)
            async with self._signalling:
                await self._restart((signal.SIGTERM, signal.SIGKILL)[self.restarts % 2])
        if self.for_s >= TREND_S:
            await self.load.crowd()  # Memory and the journal's file keep the size of the largest crowd so far.

    async def _restart(self, signal_number: int) -> None:
        self.load.restarting()
        self._observer.abort()
        exit_code, took_s = await asyncio.to_thread(self._hub.end, signal_number, STOP_UNDER_LOAD_S)
        self.stops_s.append(round(took_s, 2))
        if exit_code != (0 if signal_number == signal.SIGTERM else -signal_number):
            self.problems.append(f"signal {signal_number} ended the hub with {exit_code} after {took_s:.1f} s")
        self.ledger.hub_restarted()
        await asyncio.to_thread(self._hub.start)
        self._process = Process(self._hub.process.pid)
        self._cpu.clear()
        self._observer = await Wire.open(self.load.port, lambda _: None, lambda _: None)
        self.restarts += 1
        self.load.restarted()

    async def _stop_sometimes(self) -> None:
        """Stop the hub's process for longer than the silence that closes a connection: all heartbeats wait for it."""
        while True:
            await asyncio.sleep(STOP_EVERY_S)
            async with self._signalling:
                process = self._hub.process
                process.send_signal(signal.SIGSTOP)
                self.load.hub_left()
                try:
                    await asyncio.sleep(3.5 * self.pace.heartbeat_s)
                finally:
                    process.send_signal(signal.SIGCONT)
                    self.load.hub_returned()

    async def _read_sometimes(self) -> None:
        """Try to read the journal, as a backup does; the hub holds it exclusively and must not notice."""
        path = self._folder / "hub.db"
        while path.exists():
            async with self._signalling:
                with contextlib.closing(sqlite3.connect(path, timeout=0)) as reader, contextlib.suppress(sqlite3.Error):
                    reader.execute("SELECT count(*) FROM tasks")
                    self.problems.append("the journal could be read while the hub runs")
            await asyncio.sleep(self.pace.sample_s)

    async def _files_at_start(self) -> int:
        """Complete one task, so that the hub has opened all it opens once, and count its open files."""
        clients = [
            Worker(self.load, random.Random(0), "first", "first"),
            Requester(self.load, random.Random(0), "first"),
        ]
        await asyncio.gather(*(client.join() for client in clients))
        worker, requester = clients
        await requester.delegate(*requester.prepare(capability="first", ttl=WAIT_S))
        await requester.await_outcomes()
        await asyncio.gather(worker.leave(), requester.leave())
        await asyncio.sleep(0.5)
        return self._process.files()

    async def _status(self) -> dict[str, float]:
        """Return the numbers in the hub's status, nested ones by both names."""
        hub = (await self._observer.request(type="status"))["hub"]
        nested = {
            f"{one} {two}": number
            for one, two_s in hub.items()
            if isinstance(two_s, dict) and one not in ("waiting", "queues")
            for two, number in two_s.items()
        }
        numbers = {**hub, **nested}
        return {
            name: number
            for name, number in numbers.items()
            if isinstance(number, int | float) and not isinstance(number, bool)
        }

    async def _sample(self) -> None:
        """Measure repeatedly; a hub that does not answer ends the run."""
        started = time.monotonic()
        shown_at = started
        while True:
            try:
                numbers = {**await self._status(), **self._process.measure(), **self._journal_bytes()}
            except (OSError, TimeoutError) as error:
                if self.load.is_hub_lost:
                    await asyncio.sleep(0.1)
                    continue
                self.problems.append(f"the hub does not answer: {error!r}")
                self.load.stop()
                return
            now = time.monotonic()
            for name, number in numbers.items():
                self.samples[name].append((now - started, number))
            self._cpu.append((now, self._process.cpu_s()))
            self.ledger.judge(now)
            self._log.look()
            self._show_problems()
            if now - shown_at >= 10:
                shown_at = now
                self._show_progress(now - started, numbers)
            await asyncio.sleep(self.pace.sample_s)

    def _show_progress(self, passed_s: float, numbers: dict[str, float]) -> None:
        ended = sum(self.ledger.counts[f"ended {state}"] for state in FINAL)
        rss = f"rss {numbers['rss_bytes'] / 1e6:.1f} MB, {numbers['files']} files, " if "rss_bytes" in numbers else ""
        print(
            f"{passed_s:5.0f} s: {ended} tasks ended, {numbers['agents']} agents, {numbers['agents_away']} away, "
            f"{rss}cpu {self._cpu_share():.2f}, {len(self._all_problems())} problems",
            file=sys.stderr,
        )

    def _show_problems(self) -> None:
        """Print the problems since the last time, up to PROBLEMS_SHOWN."""
        for problem in self._all_problems()[:PROBLEMS_SHOWN]:
            if problem not in self._shown:
                self._shown.add(problem)
                print(f"PROBLEM {problem}", file=sys.stderr)

    def _journal_bytes(self) -> dict[str, float]:
        sizes = [path.stat().st_size for path in self._folder.glob("hub.db*") if not path.name.endswith("-reserve")]
        return {"journal_bytes": sum(sizes)} if sizes else {}

    def _cpu_share(self) -> float:
        (from_s, used_s), (to_s, used_until_s) = self._cpu[0], self._cpu[-1]
        return (used_until_s - used_s) / (to_s - from_s) if to_s > from_s else math.nan

    # After the run

    async def _require_empty(self, files: int) -> None:
        """Wait for the end of all tasks, for retention and grace, and require that the hub is empty."""
        started = time.monotonic()
        pace = self.pace
        await self._wait_until(("tasks pending", "tasks in_progress"), pace.ttl_max_s + pace.grace_s + 5)
        sweeps_s = 2 * pace.retention_s / 10
        bound_s = pace.retention_s + pace.grace_s + sweeps_s + 2
        gone = (
            "agents",
            "agents_away",
            "records_bytes",
            *(f"tasks {state}" for state in ("pending", "in_progress", *FINAL)),
        )
        await self._wait_until(gone, bound_s)
        await self._wait_until(("connections",), 1, only=1)
        self.ending = {"empty_after_s": round(time.monotonic() - started, 1), "files": [files, self._process.files()]}
        if self._process.files() > files:
            self.problems.append(f"{self._process.files()} files are open at the end, {files} were at the start")

    async def _wait_until(self, names: tuple[str, ...], within_s: float, only: int = 0) -> None:
        """Wait until these numbers of the hub's status are `only`; add a problem if they are not in time."""
        last = time.monotonic() + within_s
        while left := {
            name: number for name, number in (await self._status()).items() if name in names and number != only
        }:
            if time.monotonic() > last:
                self.problems.append(f"the hub still has, {within_s:.1f} s after all clients have left: {left}")
                return
            await asyncio.sleep(0.1)

    def stop(self) -> None:
        """Stop the hub, and check its exit code, log and journal."""
        exit_code, took_s = self._hub.end(signal.SIGTERM, STOP_S)
        self.ending |= {"stopped_after_s": round(took_s, 2), "exit_code": exit_code}
        if exit_code != 0:
            self.problems.append(f"the hub's exit code is {exit_code}, after {took_s:.1f} s")
        self._log.close()
        if (path := self._folder / "hub.db").exists():
            with contextlib.closing(sqlite3.connect(path)) as database:
                rows = {
                    name: database.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("tasks", "agents")
                }
            self.ending["journal_rows"] = rows
            if any(rows.values()):
                self.problems.append(f"the journal is not empty: {rows}")

    # The report

    def _all_problems(self) -> list[str]:
        return [*self.problems, *self.ledger.problems, *self.load.problems, *self._log.problems]

    def measures(self) -> dict[str, dict[str, Any]]:
        """Return the trend of each number that should not grow, after the warm-up."""
        settled = {
            name: [sample for sample in self.samples[name] if self.for_s / 2 <= sample[0] <= self.for_s]
            for name in GROWTH_WATCHED
        }
        return {name: trend(samples) for name, samples in settled.items() if len(samples) > 2}

    def report(self) -> dict[str, Any]:
        measures = self.measures()
        problems = self._all_problems()
        for name, one in measures.items():
            if self.for_s < TREND_S:
                one["verdict"] = "not judged"
            elif one["verdict"] == "growing":
                problems.append(f"{name} is growing: {one}")
        latencies_ms = sorted(1000 * one for one in self.load.latencies_s)
        return {
            "seed": self.seed,
            "for_s": self.for_s,
            "hub_cpu": round(self._cpu_share(), 3) if self._cpu else None,
            "clients_cpu": round(time.process_time() / max(self.for_s, 0.001), 3),
            "tasks": dict(sorted(self.ledger.counts.items())),
            "lives": dict(self.load.lives),
            "restarts": self.restarts,
            "stops_s": self.stops_s,
            "counts": dict(self.load.counts),
            "closes": {str(code): count for code, count in self.load.closes.items()},
            "log_lines": self._log.lines,
            "bystanders": {
                "tasks": len(latencies_ms),
                "median_ms": round(statistics.median(latencies_ms), 2) if latencies_ms else None,
                "most_ms": round(latencies_ms[-1], 2) if latencies_ms else None,
                "p99_ms": round(latencies_ms[int(0.99 * len(latencies_ms))], 2) if latencies_ms else None,
            },
            "measures": measures,
            "counters": {
                name: samples[-1][1] for name, samples in self.samples.items() if samples and name not in GROWTH_WATCHED
            },
            "end": self.ending,
            "problems": problems,
        }


GROWTH_WATCHED = (
    "rss_bytes",
    "files",
    "journal_bytes",
    "agents",
    "agents_away",
    "connections",
    "records_bytes",
    *(f"tasks {state}" for state in ("pending", "in_progress", *FINAL)),
)


def soak(for_s: float, seed: int, *, pace: Pace | None = None, is_journaled: bool = True) -> dict[str, Any]:
    """Run a hub and its clients, and return the report; the run passed if it has no problems."""
    pace = pace or Pace()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hub = stack.enter_context(contextlib.closing(HubRun(folder, pace, is_journaled=is_journaled)))
        hub.start()
        one = Soak(hub, folder=folder, seed=seed, for_s=for_s, pace=pace)
        asyncio.run(one.run())
        one.stop()
        return one.report()


def text_of(report: dict[str, Any]) -> str:
    """Return a report as text."""
    lines = [f"{'':20}{'mean':>14}{'least':>14}{'most':>14}{'slope/min':>14}{'of mean/min':>13}  verdict"]
    for name, one in report["measures"].items():
        lines.append(
            f"{name:20}{one['mean']:>14,.1f}{one['least']:>14,.0f}{one['most']:>14,.0f}"
            f"{one['slope_per_minute']:>14,.2f}"
            f"{one['relative_per_minute']:>13.2%}  {one['verdict']}"
        )
    for name in (
        "hub_cpu",
        "clients_cpu",
        "tasks",
        "lives",
        "stops_s",
        "counts",
        "closes",
        "bystanders",
        "counters",
        "end",
    ):
        inner = report[name]
        shown = ", ".join(f"{key} {value}" for key, value in inner.items()) if isinstance(inner, dict) else inner
        lines.append(f"{name}: {shown}")
    problems = report["problems"]
    lines += [f"PROBLEM {problem}" for problem in problems[:PROBLEMS_SHOWN]]
    lines.append(f"{len(problems)} problems; {report['log_lines']} lines logged; seed {report['seed']}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=10.0, metavar="N", help="how long the clients run (default 10)"
    )
    parser.add_argument(
        "--seed", type=int, default=None, metavar="N", help="for the clients' choices (default: a random one)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--db",
        action=argparse.BooleanOptionalAction,
        help="only with a journal, in a temporary folder, or only without",
    )
    logging.getLogger("agenthub").setLevel(logging.ERROR)  # Agents log many warnings under this load.
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error("--minutes must be more than 0")
    seed = random.SystemRandom().randrange(1_000_000) if args.seed is None else args.seed
    shares = {True: 2 / 3, False: 1 / 3} if args.db is None else {args.db: 1.0}
    reports = {
        "with a journal" if is_journaled else "without a journal": soak(
            60 * args.minutes * share, seed, is_journaled=is_journaled
        )
        for is_journaled, share in shares.items()
    }
    texts = (f"{name}:\n{text_of(report)}" for name, report in reports.items())
    print(json.dumps(reports, indent=2) if args.json else "\n\n".join(texts))
    return 1 if any(report["problems"] for report in reports.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
