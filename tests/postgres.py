"""A PostgreSQL of its own for the tests: started as an unprivileged user, on a free port, in a temporary folder.

With AGENTHUB_TEST_POSTGRES, the URL of a database, that one is used instead, in schemas of its own; tests that stop or
replace the engine are skipped then.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import psycopg

START_S = 60.0
USER = "postgres"
PASSWORD_ROLE = "careful"  # The only role that has to give its password, "s3cret".
SETTINGS = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off", "max_wal_senders": "4"}


def folder_of_programs() -> Path | None:
    """Return the folder with `initdb` and `pg_ctl`; Debian does not have them on the PATH."""
    folders = [Path(path) for path in os.environ.get("PATH", "").split(os.pathsep)]
    folders[:0] = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((one for one in folders if (one / "initdb").exists() and (one / "pg_ctl").exists()), None)


def unprivileged_user() -> str | None:
    """Return a user to run PostgreSQL as, which refuses to be run by root; None: this one."""
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(USER).pw_name
    return "nobody"


def folder_of_engine() -> Path:
    """Return a new folder that the engine's user may write to."""
    folder = Path(tempfile.mkdtemp(prefix="agenthub-pg-"))
    user = unprivileged_user()
    if user is not None:
        shutil.chown(folder, user)
    return folder


class Engine:
    """A database, and the process that serves it if that is ours (`folder` is not None)."""

    def __init__(self, url: str, folder: Path | None = None, port: int = 0) -> None:
        self.url = url
        self.folder = folder
        self.port = port
        self._schemas = itertools.count()

    @classmethod
    def create(cls) -> Engine:
        """Create and start an engine of its own."""
        engine = cls("", folder_of_engine())
        engine.program("initdb", "-D", engine.data, "-A", "trust", "-U", USER, "--no-locale", "-E", "UTF8", "--no-sync")
        rules = (engine.data / "pg_hba.conf").read_text("utf-8")
        careful = f"host all {PASSWORD_ROLE} 127.0.0.1/32 scram-sha-256\n"
        (engine.data / "pg_hba.conf").write_text(careful + rules, "utf-8")
        engine.start()
        engine.execute(f"CREATE ROLE {PASSWORD_ROLE} LOGIN PASSWORD 's3cret'")
        return engine

    @property
    def data(self) -> Path:
        assert self.folder is not None
        return self.folder / "data"

    def program(self, name: str, *args: object) -> None:
        """Run one of PostgreSQL's programs as the unprivileged user."""
        programs = folder_of_programs()
        assert programs is not None
        user = unprivileged_user()
        identity = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user is not None else {}
        log = self.data.parent / f"{name}.log"
        with log.open("ab") as output:
            done = subprocess.run(
                [programs / name, *map(str, args)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                timeout=START_S,
                env={**os.environ, "LC_ALL": "C"},
                **identity,
            )
        assert done.returncode == 0, log.read_text("utf-8", "replace")[-2000:]

    def start(self) -> None:
        if not self.port:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.port = free.getsockname()[1]
            self.url = f"postgresql://{USER}@127.0.0.1:{self.port}/{USER}"
        options = " ".join(f"-c {name}={value!r}" for name, value in {**SETTINGS, "port": str(self.port)}.items())
        self.program(
            "pg_ctl", "-D", self.data, "-w", "-t", START_S, "-l", self.data.parent / "log", "-o", options, "start"
        )

    def stop(self, mode: str = "immediate") -> None:
        self.program("pg_ctl", "-D", self.data, "-w", "-m", mode, "stop")

    def kill(self) -> None:
        """Kill the engine with all its processes, as the loss of its machine would."""
        postmaster = int((self.data / "postmaster.pid").read_text("utf-8").split()[0])
        os.kill(postmaster, signal.SIGKILL)  # The others end when they notice.

    def replica(self) -> Engine:
        """Return a started synchronous replica of this engine."""
        replica = Engine("", folder_of_engine())
        source = f"host=127.0.0.1 port={self.port} user={USER} application_name=replica"
        self.program("pg_basebackup", "-D", replica.data, "-R", "-X", "stream", "-c", "fast", "-d", source)
        replica.start()
        self.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        self.execute("SELECT pg_reload_conf()")
        return replica

    def promote(self) -> None:
        self.program("pg_ctl", "-D", self.data, "-w", "promote")

    def remove(self) -> None:
        assert self.folder is not None
        if (self.data / "postmaster.pid").exists():
            with contextlib.suppress(AssertionError):  # It was killed.
                self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def connect(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(self.url, autocommit=True, connect_timeout=10)

    def execute(self, query: str) -> list[tuple[object, ...]]:
        with self.connect() as connection:
            cursor = connection.execute(query.encode())
            return cursor.fetchall() if cursor.description else []

    def url_of_schema(self, schema: str = "") -> str:
        """Return the URL of a new and empty schema."""
        schema = schema or f"test_{os.getpid()}_{next(self._schemas)}"
        self.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE; CREATE SCHEMA {schema}")
        return f"{self.url}{'&' if '?' in self.url else '?'}options={quote(f'-c search_path={schema}')}"


@contextlib.contextmanager
def running_engine() -> Iterator[Engine]:
    """Yield an engine of its own, which is stopped and removed in the end."""
    engine = Engine.create()
    try:
        yield engine
    finally:
        engine.remove()
