"""The same task through this hub and its alternatives, with each system's usual Python client at both ends.

Server, worker and requester are separate processes. The task is a JSON object with one text, which the worker returns
unchanged; the requester keeps `open` tasks open. The systems have different guarantees, see `guarantees`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.ends import Load
from benchmarks.measure import Options, Row, Server, Unavailable

NAME = "peers"
HUB_OPTIONS = ("--rate", "0")  # By default a connection may send 2,000 messages per second.
LOOPS = ("asyncio", "uvloop")
RUN_S = 60.0  # Timeout of a requester beyond the duration of its load.
POLL_S = 0.02  # Interval between attempts to connect to a starting server.
PROGRAM_FOLDERS = ("/usr/local/sbin", "/usr/sbin")  # Often missing from a user's PATH.
Figures = dict[str, float]
Starter = Callable[[str, Path], AbstractContextManager[Server]]  # Starts a server, with a loop and a temporary folder.


@dataclasses.dataclass(frozen=True)
class System:
    """A system that can carry tasks: `end` is the module of its ends in benchmarks.ends, `start` runs its server."""

    name: str
    end: str
    start: Starter
    guarantees: str
    packages: tuple[str, ...] = ()  # By import name.
    program: str | None = None

    def missing(self) -> str | None:
        """Return what is missing on this machine, or None."""
        if self.program is not None and find_program(self.program) is None:
            return f"{self.name} is skipped: program {self.program} not found"
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        return f"{self.name} is skipped: package {', '.join(missing)} not found" if missing else None


def find_program(name: str) -> str | None:
    """Return the path of a program: next to this Python, on PATH, or in PROGRAM_FOLDERS."""
    folders = (str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), *PROGRAM_FOLDERS)
    return shutil.which(name, path=os.pathsep.join(folders))


# Servers


@contextlib.contextmanager
def start_agenthub(loop: str, folder: Path) -> Iterator[Server]:
    with measure.hub(*HUB_OPTIONS, loop=loop) as server:
        yield server


@contextlib.contextmanager
def start_nats(loop: str, folder: Path) -> Iterator[Server]:
    port = free_port()
    command = ("nats-server", "-a", "127.0.0.1", "-p", str(port), "-l", str(folder / "log"))
    with listening(command, port, "nats") as server:
        yield server


@contextlib.contextmanager
def start_redis(loop: str, folder: Path) -> Iterator[Server]:
    port = free_port()
    command = ("redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder))
    with listening((*command, "--logfile", str(folder / "log")), port, "redis") as server:
        yield server


@contextlib.contextmanager
def start_http(loop: str, folder: Path) -> Iterator[Server]:
    with measure.server(sys.executable, "-m", "benchmarks.http_hub", "--loop", loop) as server:
        yield server


@contextlib.contextmanager
def start_wamp(loop: str, folder: Path) -> Iterator[Server]:
    port = free_port()
    (folder / "config.json").write_text(json.dumps(router_config(port)))
    command = ("crossbar", "start", "--cbdir", str(folder), "--loglevel", "none", "--logtofile")
    with listening(command, port, "ws") as server:
        yield server


def router_config(port: int) -> dict[str, Any]:
    """Return the configuration of a Crossbar node with one router on which every client may call and register."""
    permissions = [{"uri": "bench.", "match": "prefix", "allow": {"call": True, "register": True}}]
    realm = {"name": "bench", "roles": [{"name": "anonymous", "permissions": permissions}]}
    transport = {"type": "websocket", "endpoint": {"type": "tcp", "interface": "127.0.0.1", "port": port}}
    router = {"type": "router", "realms": [realm], "transports": [transport]}
    return {"version": 2, "controller": {}, "workers": [router]}


def free_port() -> int:
    """Return a port that was free a moment ago, for servers that cannot choose and report one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def listening(command: Sequence[str], port: int, scheme: str) -> Iterator[Server]:
    """Run a server that listens on a port; end it and its descendants when the block ends.

    Raises Unavailable if it exits, or does not listen within measure.START_S seconds.
    """
    program = find_program(command[0]) or command[0]
    with measure.running(program, *command[1:], stderr=subprocess.DEVNULL) as process, ending_family(process):
        wait_until_listening(process, port)
        yield Server(process, f"{scheme}://127.0.0.1:{port}")


@contextlib.contextmanager
def ending_family(process: subprocess.Popen[str]) -> Iterator[None]:
    """When the block ends, terminate a process, and kill descendants that it leaves behind."""
    try:
        yield
    finally:
        # Pidfds, because a pid may be reused by then.
        family = [os.pidfd_open(child) for child in descendants_of(process.pid)]
        process.terminate()
        for child in family:
            select.select([child], [], [], measure.START_S)  # A server ends its descendants itself.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child, signal.SIGKILL)
            os.close(child)


def wait_until_listening(process: subprocess.Popen[str], port: int) -> None:
    until = time.monotonic() + measure.START_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(POLL_S)
    raise Unavailable(f"{Path(typing.cast(list[str], process.args)[0]).name} did not start")


AGENTHUB = System(
    "agenthub",
    "agenthub",
    start_agenthub,
    "discovery by capability, one deadline and one outcome per task, cancellation, retries, detection of dead workers",
    packages=("pydantic", "websockets"),
)
SYSTEMS = (
    AGENTHUB,
    System(
        "nats",
        "nats",
        start_nats,
        "NATS core: at most once, nothing is stored; after a worker's death the requester's own timeout passes",
        packages=("nats",),
        program="nats-server",
    ),
    System(
        "redis",
        "redis",
        start_redis,
        "tasks wait in lists; a task popped by a worker that dies is lost silently; no deadlines",
        packages=("redis",),
        program="redis-server",
    ),
    System(
        "http",
        "http",
        start_http,
        "FastAPI and long polls: tasks wait in memory; a dead worker's task never ends, and its requester waits",
        packages=("fastapi", "uvicorn", "aiohttp"),
    ),
    System(
        "wamp",
        "wamp",
        start_wamp,
        "Crossbar: no queue; a call fails at once if no worker is online or its worker disconnects; cancellation",
        packages=("autobahn",),
        program="crossbar",
    ),
)
DISTRIBUTIONS = ("nats-py", "redis", "hiredis", "fastapi", "uvicorn", "httptools", "aiohttp", "autobahn")


# Runs


def run(options: Options, systems: Sequence[System] = SYSTEMS) -> list[Row]:
    """Return a row for each system, event loop and load: tasks per second, and the CPU time of each process."""
    loops = LOOPS if importlib.util.find_spec("uvloop") is not None else LOOPS[:1]
    if len(loops) == 1:
        options.note("uvloop is not installed: everything runs on asyncio's own loop")
    present = []
    for system in systems:
        if (reason := system.missing()) is not None:
            options.note(reason)
        else:
            present.append(system)
    if not present:
        return []
    loads = loads_of(options)
    contest = Contest(options, loads)
    contestants = {f"{system.name} {loop}": contest.entry(system, loop) for loop in loops for system in present}
    results = measure.alternate(options.rounds, contestants)
    rows = []
    for index, load in enumerate(loads):
        for loop in loops:
            rounds = {one.name: results[f"{one.name} {loop}"] for one in present}
            rows += rows_of(
                load, loop, {name: [figures[index] for figures in ran if figures] for name, ran in rounds.items()}
            )
    explain(options, present)
    return rows


def loads_of(options: Options) -> list[Load]:
    if options.quick:
        return [Load(2, 100, min(options.seconds, 0.2), 0.05)]
    return [Load(tasks_open, size, options.seconds) for size, tasks_open in ((100, 1), (100, 64), (10_000, 64))]


@dataclasses.dataclass
class Contest:
    """Runs each entry once per round, and skips an entry after its first failure."""

    options: Options
    loads: list[Load]
    failed: set[str] = dataclasses.field(default_factory=set)
    runs: int = 0

    def entry(self, system: System, loop: str) -> Callable[[], list[Figures]]:
        """Return a function that measures a system with each load; its result is empty after a failure."""
        name = f"{system.name} on {loop}"

        def run_once() -> list[Figures]:
            if name in self.failed:
                return []
            self.runs += 1
            measure.progress(f"peers, run {self.runs}: {name}")
            try:
                return run_system(system, loop, self.loads)
            except Unavailable as error:
                self.failed.add(name)
                self.options.note(f"{name} is skipped: {error}")
                return []

        return run_once


def run_system(system: System, loop: str, loads: Sequence[Load]) -> list[Figures]:
    """Return the figures of each load, all with the same server and worker. Raises Unavailable if one fails."""
    with (
        tempfile.TemporaryDirectory() as folder,
        system.start(loop, Path(folder)) as server,
        running_end(system.end, "worker", server.url, loop) as worker,
    ):
        if read_line(worker, measure.START_S) != "ready":
            raise Unavailable("its worker did not start")
        return [run_load(system.end, loop, server, worker, load) for load in loads]


@contextlib.contextmanager
def running_end(
    end: str, role: str, url: str, loop: str, *options: str, is_bare: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Run one end of a system in a separate process; a bare AgentHub uses no packages."""
    command = (sys.executable, "-m", f"benchmarks.ends.{end}", role, "--url", url, "--loop", loop, *options)
    with measure.running(*command, env={"AGENTHUB_BUILTIN": str(int(is_bare))}) as process:
        yield process


def run_load(end: str, loop: str, server: Server, worker: subprocess.Popen[str], load: Load) -> Figures:
    """Return the figures of one requester, and the CPU time of the server and the worker."""
    with running_end(end, "requester", server.url, loop, *load_options(load)) as requester:
        return figures_from(requester, load, {"server_cpu_us": server.pid, "worker_cpu_us": worker.pid})


def load_options(load: Load) -> list[str]:
    """Return the command-line options of a load, for benchmarks.ends."""
    named = {"open": load.tasks_open, "bytes": load.text_bytes, "seconds": load.seconds, "warm-up": load.warm_up_s}
    return [f"--{name}={value}" for name, value in named.items()]


def figures_from(requester: subprocess.Popen[str], load: Load, others: Mapping[str, int]) -> Figures:
    """Return the figures that a process prints after `measuring`, and the CPU time per task of `others` (by pid)."""
    if read_line(requester, measure.START_S + load.warm_up_s) != "measuring":
        raise Unavailable("its requester did not start")
    before = {name: family_cpu_s(pid) for name, pid in others.items()}
    line = read_line(requester, load.seconds + RUN_S)
    spent = {name: family_cpu_s(pid) - before[name] for name, pid in others.items()}
    if not line:
        raise Unavailable("its requester failed")
    figures = json.loads(line)
    tasks = figures["tasks"]
    return {
        "tasks_per_s": tasks / figures["seconds"],
        "requester_cpu_us": 1e6 * figures["cpu_s"] / tasks,
        **{name: 1e6 * cpu_s / tasks for name, cpu_s in spent.items()},
        "p50_ms": figures["p50_ms"],
        "p99_ms": figures["p99_ms"],
    }


def read_line(process: subprocess.Popen[str], within_s: float) -> str:
    """Return the next line of a process's stdout, or "" if it exits or the time is over."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], within_s)
    return process.stdout.readline().rstrip("\n") if ready else ""


def family_cpu_s(pid: int) -> float:
    """Return the CPU time that a process and its living descendants have used so far, in seconds."""
    return sum(map(measure.cpu_s, [pid, *descendants_of(pid)]))


def descendants_of(pid: int) -> list[int]:
    """Return the descendants of a process; none if it has exited."""
    children: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # That thread has just ended.
            children += map(int, thread.read_text().split())
    return [one for child in children for one in (child, *descendants_of(child))]


# Rows


def rows_of(load: Load, loop: str, rounds: Mapping[str, Sequence[Figures]]) -> list[Row]:
    """Return a row for each system with figures, the medians of its rounds; `of_agenthub` compares throughput."""
    middle = {name: measure.medians(figures) for name, figures in rounds.items() if figures}
    own = middle.get(AGENTHUB.name)
    return [
        {
            "system": name,
            "loop": loop,
            "open": load.tasks_open,
            "text_bytes": load.text_bytes,
            "tasks_per_s": round(figures["tasks_per_s"]),
            "of_agenthub": round(figures["tasks_per_s"] / own["tasks_per_s"], 2) if own is not None else None,
            "requester_cpu_us_per_task": round(figures["requester_cpu_us"], 1),
            "server_cpu_us_per_task": round(figures["server_cpu_us"], 1),
            "worker_cpu_us_per_task": round(figures["worker_cpu_us"], 1),
            "p50_ms": round(figures["p50_ms"], 3),
            "p99_ms": round(figures["p99_ms"], 3),
        }
        for name, figures in middle.items()
    ]


def explain(options: Options, systems: Sequence[System]) -> None:
    """Add the notes that explain the table."""
    options.note("the hub runs with --rate 0 (by default a connection may send 2,000 messages per second)")
    for system in systems:
        options.note(f"{system.name}: {system.guarantees}")
    versions = {name: version for name in DISTRIBUTIONS if (version := version_of(name)) is not None}
    options.note("peers with " + ", ".join(f"{name} {version}" for name, version in versions.items()))


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
