"""The journal of AgentHub in PostgreSQL: when the machine with the hub dies, a hub on another one takes over.

It needs the package `psycopg` (`pip install '.[postgres]'` in a clone) and agenthub.py in the same folder.
The lease is a row of `agenthub_hub`, and its `epoch` is what a hub holds. To take it, a hub deletes the rows that have
its namespace and whose `until` has passed, and inserts its own; the engine's clock decides, and no other. Every write
is one statement that first locks its hub's row. If that row is gone, nothing is written: the hub was replaced, and
`write` raises Fenced. Writer and taker meet at that lock, so a hub whose `until` has passed, but which nobody has
replaced, goes on. A write renews the lease unless it lasts for `lease_s` anyway; then it locks the row FOR SHARE, so
that namespaces do not wait for each other. One process has one lease, which the journals of its namespaces share.
A write whose connection was lost may have been committed or not; written again, it changes nothing. Nothing here
cancels a statement: a commit that is cancelled while it waits for a synchronous replica succeeds, with a warning.
Times in rows are by the engine's clock; where this machine's agrees with it, by that, as in SQLite. When it was set, or
another engine has taken over, all times are moved; `clock_steps` makes sure that none is moved twice.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not __package__:
    import agenthub
else:  # Copied into a package.
    from . import agenthub

try:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict
    from psycopg.types.string import BytesBinaryDumper
except ImportError as error:
    raise agenthub.PackageMissing("'psycopg[binary]>=3.3'", "A journal in PostgreSQL") from error

LEASE_MARGIN = 0.05  # Of the lease: how much longer it lasts in the engine, so that not every write has to renew it.
LOOK_S = 0.2  # Between two attempts to take the lease.
CLOCK_RTT_S = 0.2  # A slower reply says too little about the engine's clock.
# Plans are kept, but made when there are few rows. A hub stopped in a transaction must not keep others from the lease.
SETUP = "SET idle_in_transaction_session_timeout = 2000; SET enable_seqscan = 0; SET jit = 0; SET enable_nestloop = 0"
SCHEMA = "AgentHub journal, version 2"  # The comment of the table `agenthub_hub`.
UPGRADES = {"AgentHub journal, version 1": "ALTER TABLE agenthub_tasks ADD COLUMN life bytea"}
CODES = {"boolean": "?", "bigint": "q", "integer": "i", "float8": "d"}  # Of `struct`; other types have any length.
FAULT = "FATAL(?!.*(the database system is|too many|connection slots))|invalid|SSL was required|certificate"

TASK_KEYS = "arrival bigint, requester text, request bytea, depth integer, accepted_at float8, deadline float8"
TASK_STATE = "bytes bigint, state text, assignee text, attempt integer, told bigint, ended_at float8, outcome bytea"
TASK_STATE += ", life bytea"
AGENT = "agent_id text, resume_hash text, register bytea, there boolean, departed boolean"
# The space left in a page is for the rows with their outcomes: an update that stays in its page needs no index entry.
TABLES = f"""CREATE TABLE agenthub_hub (
        epoch bigserial PRIMARY KEY, holder text NOT NULL, namespaces text[] NOT NULL, until timestamptz NOT NULL);
    CREATE TABLE agenthub_agents (namespace text, {AGENT}, PRIMARY KEY (agent_id, namespace));
    CREATE TABLE agenthub_tasks (namespace text, clock_steps integer NOT NULL, {TASK_KEYS}, {TASK_STATE},
        PRIMARY KEY (arrival, namespace)) WITH (fillfactor = 35)"""
NOW = "extract(epoch FROM clock_timestamp())::float8"
FIND_TABLES = f"""SELECT {NOW}, obj_description(to_regclass('agenthub_hub'), 'pg_class'),
    coalesce(to_regclass('agenthub_hub'), to_regclass('agenthub_tasks'), to_regclass('agenthub_agents')) IS NOT NULL"""
OF_OTHERS = "namespaces @> ARRAY[%(namespace)s::text] AND epoch IS DISTINCT FROM %(epoch)s"
LATER = f"now() + %(lease)s * {1 + LEASE_MARGIN} * interval '1 s'"
TAKE = f"""INSERT INTO agenthub_hub (holder, namespaces, until)
    VALUES (%(holder)s, ARRAY[%(namespace)s::text], {LATER}) RETURNING epoch"""
SHARE = "UPDATE agenthub_hub SET namespaces = namespaces || %(namespace)s::text WHERE epoch = %(epoch)s RETURNING epoch"
CHECK = "SELECT FROM agenthub_hub WHERE epoch = %(epoch)s AND until >= now() + %(lease)s * interval '1 s' FOR SHARE"
RENEW = f"UPDATE agenthub_hub SET until = {LATER} WHERE epoch = %(epoch)s RETURNING epoch"


class BinaryDumper(BytesBinaryDumper):
    oid = 0  # Of no type, so that bytes become what the statement casts them to.


def arrays(part: str, columns: str, rows: list[tuple[Any, ...]]) -> Iterator[tuple[str, bytes]]:
    """Yield `part0` and so on, the columns of rows, in the binary format of arrays: faster than lists in psycopg."""
    for n, (column, values) in enumerate(zip(columns.split(", "), zip(*rows, strict=True), strict=True)):
        kind = column.split()[1]
        item = struct.Struct(f"!i{CODES.get(kind, '')}")  # The length, -1 for None, and the value.
        if kind in CODES:
            items = [item.pack(item.size - 4, value) for value in values]
        else:
            raw = [value.encode() if isinstance(value, str) else value for value in values]
            items = [item.pack(-1) if value is None else item.pack(len(value)) + value for value in raw]
        yield f"{part}{n}", struct.pack("!5i", 1, 1, psycopg.adapters.types[kind].oid, len(values), 1) + b"".join(items)


def names(columns: str, template: str = "{}") -> str:
    """Return a list of columns in SQL. In the template, {} is the name of each, {1} its type, and {n} its number."""
    return ", ".join(template.format(*column.split(), n=n) for n, column in enumerate(columns.split(", ")))


COLUMNS = f"{TASK_KEYS}, {TASK_STATE}", f"{TASK_STATE}, n bigint", "n bigint", AGENT, "n text"
ROWS = [  # If the lease is `mine`, those whose columns are the arrays `a0`, `a1` and so on.
    f"mine, unnest({names(columns, f'%({part}{{n}})b::{{1}}[]')}) AS r({names(columns)})"
    for part, columns in zip("abcde", COLUMNS, strict=True)
]
PARTS = (  # Of the statement of a write, in the order of `Journal._rows_of`. Those without rows are left out.
    f"INSERT INTO agenthub_tasks SELECT %(namespace)s, %(steps)s, r.* FROM {ROWS[0]}",
    f"""UPDATE agenthub_tasks AS t SET ({names(TASK_STATE)}) = ROW({names(TASK_STATE, "r.{}")}) FROM {ROWS[1]}
        WHERE t.namespace = %(namespace)s AND t.arrival = r.n AND t.arrival = ANY(%(b8)b::bigint[])""",
    "DELETE FROM agenthub_tasks USING mine WHERE namespace = %(namespace)s AND arrival = ANY(%(c0)b::bigint[])",
    f"""INSERT INTO agenthub_agents SELECT %(namespace)s, r.* FROM {ROWS[3]}
        ON CONFLICT (namespace, agent_id) DO UPDATE SET ({names(AGENT)}) = ROW({names(AGENT, "excluded.{}")})""",
    "DELETE FROM agenthub_agents USING mine WHERE namespace = %(namespace)s AND agent_id = ANY(%(e0)b::text[])",
)
REDO = f"ON CONFLICT (namespace, arrival) DO UPDATE SET ({names(TASK_STATE)}) = ROW({names(TASK_STATE, 'excluded.{}')})"
MOVE_TIMES = """, moved AS (UPDATE agenthub_tasks SET clock_steps = %(steps)s, accepted_at = accepted_at + %(step)s,
    deadline = deadline + %(step)s, ended_at = CASE WHEN outcome IS NULL THEN 0 ELSE ended_at + %(step)s END
    FROM mine WHERE namespace = %(namespace)s AND clock_steps < %(steps)s)"""


class PostgresJournal(agenthub.Journal):
    """Persists a hub's tasks and agents. With `sync` "normal", a write survives the hub, but perhaps not the engine."""

    lease_s, has_file, unchanged = 5.0, False, "the database was not changed"

    def __init__(self, url: str, *, sync: str = "full") -> None:
        try:
            self._url, self._settings = url, conninfo_to_dict(url)
        except psycopg.Error:  # Whose text may hold the password.
            raise ValueError("not a URL of PostgreSQL; one looks like postgresql://hub@db1/agenthub") from None
        super().__init__(f"postgresql://{self._settings.get('host', '')}/{self._settings.get('dbname', '')}", sync=sync)
        self.namespace = agenthub.NAMESPACE_DEFAULT
        self._first = self  # Of the journals of this process, which hold these three together:
        self.epoch: int | None = None
        self._renewed_at = -math.inf  # By `time.monotonic`.
        self._open_namespaces: set[str] = set()
        self._connection: psycopg.Connection[Any] | None = None
        self._warning = ""  # Of the engine, about the present statement.
        self._in_use, self._closing = threading.Lock(), threading.Event()  # The lock is that of the connection.
        self._engine_ahead_s = math.nan  # The engine's clock minus `time.monotonic`.
        self._steps = 0  # How often the times in the tables were moved.

    def of_namespace(self, namespace: str) -> PostgresJournal:
        """Return the journal of another namespace, with the same lease."""
        journal = PostgresJournal(self._url, sync=self.sync)
        journal.namespace, journal._first, journal.lease_s = namespace, self._first, self.lease_s
        return journal

    def namespaces(self) -> list[str]:
        """Return the namespaces that have agents or tasks, while this journal is open."""
        query = "SELECT namespace FROM agenthub_agents UNION SELECT namespace FROM agenthub_tasks ORDER BY 1"
        return [row[0] for row in self._engine().execute(query)]

    def open(self, *, wait: bool = True) -> None:
        """Take the lease, or share that of this process; wait while another hub holds it, or the engine is away."""
        self._closing.clear()
        logged = ""
        try:
            while obstacle := self._obstacle(is_first=not logged):
                if not wait or self._first.epoch is not None:
                    raise agenthub.JournalError(f"{self.path}: {obstacle}")
                if obstacle != logged:
                    agenthub.log_hub.info("standby: %s", obstacle)
                logged = obstacle
                if self._closing.wait(LOOK_S):
                    raise agenthub.JournalError(f"{self.path}: closed while it waited for the lease")
        except agenthub.JournalError:
            self.close()
            raise

    def _obstacle(self, *, is_first: bool) -> str:
        """Take the lease; return why it cannot be had yet, or nothing. Raises JournalError if waiting is no use."""
        try:
            return self._take()
        except psycopg.Error as error:
            self._disconnect()
            reason = agenthub.one_line(error)
            if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
                reason += "; name all hosts in the URL, with ?target_session_attrs=read-write"
            if is_first and (not isinstance(error, psycopg.OperationalError) or re.search(FAULT, reason)):
                raise agenthub.JournalError(f"{self.path}: cannot be used: {reason}") from error
            return f"the database cannot be used: {reason}"

    def _take(self) -> str:
        """Take the lease, in a transaction that no other hub has at the same time, unless another hub holds it."""
        with self._in_use, self._engine().transaction():
            execute = self._engine().execute
            values = self._values() | {"holder": f"{socket.gethostname()}:{os.getpid()}"}
            execute("SELECT pg_advisory_xact_lock(%s)", [agenthub.JOURNAL_ID])
            now, comment, has_tables = execute(FIND_TABLES).fetchone() or (0.0, None, False)
            self._engine_ahead_s = now - time.monotonic()
            if not has_tables or comment in UPGRADES:
                execute(f"{UPGRADES.get(str(comment), TABLES)}; COMMENT ON TABLE agenthub_hub IS '{SCHEMA}'")
            elif comment != SCHEMA:
                text = f"its tables are of {comment or 'another program'}, but this hub needs those of {SCHEMA}"
                raise agenthub.JournalError(f"{self.path}: {text}: use another database or schema; {self.unchanged}")
            execute(f"DELETE FROM agenthub_hub WHERE {OF_OTHERS} AND until <= now()", values)
            if holder := execute(f"SELECT holder FROM agenthub_hub WHERE {OF_OTHERS}", values).fetchone():
                return f"hub {holder[0]} holds the lease of namespace {self.namespace}"
            taken = execute(TAKE if self._first.epoch is None else SHARE, values).fetchone()
        if taken is None:
            raise agenthub.Fenced(f"{self.path}: another hub has taken over")
        self._first.epoch = taken[0]
        self._first._open_namespaces.add(self.namespace)
        return ""

    def close(self) -> None:
        """Close the connection, cut it if another thread uses it; the last journal of this process ends the lease."""
        self._closing.set()
        first, connection, epoch = self._first, self._connection, None
        first._open_namespaces.discard(self.namespace)
        if not first._open_namespaces:
            epoch, first.epoch = first.epoch, None
        is_ours = self._in_use.acquire(blocking=False)
        with contextlib.suppress(OSError, psycopg.Error):  # Then the lease ends by itself.
            if connection is not None and not is_ours:
                with socket.socket(fileno=os.dup(connection.fileno())) as cut:
                    cut.shutdown(socket.SHUT_RDWR)
            elif connection is not None and epoch is not None:
                connection.execute("DELETE FROM agenthub_hub WHERE epoch = %s", [epoch])
        if is_ours:
            self._disconnect()
            self._in_use.release()

    def _values(self) -> dict[str, Any]:
        return {"namespace": self.namespace, "epoch": self._first.epoch, "lease": self.lease_s, "steps": self._steps}

    def _engine(self) -> psycopg.Connection[Any]:
        """Return the connection, which is made unless there is one."""
        if self._connection is None:
            if self._closing.is_set():
                raise agenthub.JournalError(f"{self.path}: not open; call open() first")
            wait_s = math.ceil(self.lease_s)
            settings: dict[str, Any] = {"connect_timeout": max(2, wait_s), "tcp_user_timeout": 1000 * wait_s}
            settings |= {"keepalives_idle": wait_s, "keepalives_interval": 1, "keepalives_count": 3, **self._settings}
            self._connection = psycopg.connect(**settings | {"client_encoding": "UTF8"}, autocommit=True)
            if self._closing.is_set():  # Meanwhile.
                self._disconnect()
                return self._engine()  # Raises.
            self._connection.execute(SETUP if self.sync == "full" else f"{SETUP}; SET synchronous_commit = off")
            self._connection.adapters.register_dumper(bytes, BinaryDumper)
            self._connection.add_notice_handler(self._on_notice)
        return self._connection

    def _on_notice(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            self._warning = notice.message_primary or "a warning"

    def _disconnect(self) -> None:
        connection, self._connection, self._warning = self._connection, None, ""
        if connection is not None:
            connection.close()

    def _execute(self, parts: str, values: dict[str, Any]) -> None:
        """Execute the parts of a statement that rest on `mine`, the row of the lease. Raises Fenced if it is gone."""
        is_due = time.monotonic() > self._first._renewed_at + self.lease_s * LEASE_MARGIN
        for fence in (RENEW,) if is_due else (CHECK, RENEW):
            started = time.monotonic()
            query = f"WITH mine AS ({fence}){parts} SELECT {NOW} FROM mine"
            try:
                with self._in_use:
                    found = self._engine().execute(query, self._values() | values, binary=True).fetchone()
                if self._warning:  # It was committed, but perhaps not replicated.
                    raise psycopg.OperationalError(self._warning)
            except psycopg.Error:
                self._disconnect()
                raise
            if found is not None:
                if fence is RENEW:
                    self._first._renewed_at = started
                if time.monotonic() - started < CLOCK_RTT_S:
                    self._engine_ahead_s = found[0] - (started + time.monotonic()) / 2
                return
        raise agenthub.Fenced(f"{self.path}: another hub has taken over")

    def _last_write(self) -> int:
        [(number, self._steps)] = self._select("coalesce(max(told), 0), coalesce(max(clock_steps), 0)", "tasks")
        return int(number)

    def _stored(self, table: str) -> list[tuple[Any, ...]]:
        return self._select(names(AGENT if table == "agents" else f"{TASK_KEYS}, {TASK_STATE}"), table)

    def _select(self, columns: str, table: str) -> list[tuple[Any, ...]]:
        query = f"SELECT {columns} FROM agenthub_{table} WHERE namespace = %s ORDER BY 1"
        try:
            with self._in_use:
                return self._engine().execute(query, [self.namespace], binary=True).fetchall()
        except psycopg.Error as error:
            raise agenthub.JournalError(f"{self.path}: cannot be read: {agenthub.one_line(error)}") from error

    def _write_rows(self, rows: list[list[tuple[Any, ...]]], step_s: float) -> None:
        if step_s:
            self._execute(MOVE_TIMES, {"step": step_s, "steps": self._steps + 1})
            self._steps += 1
        values = dict(one for some in zip("abcde", COLUMNS, rows, strict=True) if some[2] for one in arrays(*some))
        parts = "".join(f", {one} AS ({part})" for one, part in zip("abcde", PARTS, strict=True) if f"{one}0" in values)
        try:
            self._execute(parts, values)
        except psycopg.errors.UniqueViolation:  # The last attempt was committed, but its connection was lost.
            self._execute(parts.replace(PARTS[0], f"{PARTS[0]} {REDO}"), values)

    def _row_offset(self, clock_offset: float) -> float:
        """Return the engine's clock minus the hub's: `clock_offset` where this machine's clock agrees with it."""
        measured = self._engine_ahead_s + time.monotonic() - time.time() + clock_offset
        return measured if abs(measured - clock_offset) > agenthub.CLOCK_STEP_S else clock_offset
