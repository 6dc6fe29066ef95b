"""`agenthub_postgres`, with a real PostgreSQL, and what rests on it: a second hub that takes over.

Skipped where neither the package `psycopg` and the programs of PostgreSQL are installed (Debian: `postgresql`) nor
AGENTHUB_TEST_POSTGRES holds the URL of a database. The tests of the seam itself are in test_journal.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agenthub
from agenthub import (
    AgentRow,
    Capability,
    Changes,
    Delegate,
    ErrorInfo,
    Fenced,
    Journal,
    JournalError,
    Question,
    Register,
    Talk,
    TaskLife,
    TaskOutcome,
    TaskRow,
    TaskState,
)
from tests.support import PAYLOADS_AS_WRITTEN, ROOT, WAIT_S, running

psycopg = pytest.importorskip("psycopg", reason="the package psycopg is not installed")

from agenthub_postgres import PostgresJournal  # noqa: E402
from tests.postgres import Engine, folder_of_programs, running_engine  # noqa: E402

OWN_ENGINE = "AGENTHUB_TEST_POSTGRES" not in os.environ
if OWN_ENGINE and folder_of_programs() is None:
    pytest.skip("PostgreSQL is not installed; AGENTHUB_TEST_POSTGRES may name a database", allow_module_level=True)
own_engine_only = pytest.mark.skipif(not OWN_ENGINE, reason="stops or configures the engine")

OFFSET = 1_000_000.0  # Of the clock of hubs; a whole number, so that times come back as they were.


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """One engine for all tests of a process; each test has a schema of its own."""
    if not OWN_ENGINE:
        yield Engine(os.environ["AGENTHUB_TEST_POSTGRES"])
        return
    with running_engine() as engine:
        yield engine


@pytest.fixture
def url(engine: Engine) -> str:
    return engine.url_of_schema()


@pytest.fixture
def opened(url: str) -> Iterator[Callable[..., PostgresJournal]]:
    """Return a function that opens a journal, in the schema of the test, which is closed after the test."""
    journals = []

    def open_one(**options: Any) -> PostgresJournal:
        journal = PostgresJournal(options.pop("url", url), sync=options.pop("sync", "full"))
        journal.lease_s = options.pop("lease_s", journal.lease_s)
        journals.append(journal)
        journal.open(**options)
        return journal

    yield open_one
    for journal in journals:
        journal.close()


# Rows: the same as in SQLite


def random_task(choice: random.Random, sequence: int) -> TaskRow:
    """Return a row with any payload, in any state that a hub writes."""
    payload = choice.choice(PAYLOADS_AS_WRITTEN).encode()
    request = Delegate(task_id=f"t{sequence}", capability="work", input=payload, priority=choice.randint(-100, 100))
    row = TaskRow(sequence, "a", request, 1, 100.0, 400.0, 1100, TaskState.PENDING, None, 0, False, 0.0, None)
    return random_state(choice, row)


def random_state(choice: random.Random, row: TaskRow) -> TaskRow:
    assignee = choice.choice((None, "worker-1", "Arbeiter-2"))
    talk = Talk(
        ask=2,
        message_id="m1",
        question=Question("\u00fcber?", {}),
        answer=choice.choice((None, b'"\\u00fc" ')),
        bytes=60,
    )
    life = choice.choice((TaskLife(), TaskLife((("assigned", "worker-1", 1, 0.5),), 2, talk)))
    attempt, size = choice.randint(0, 40), choice.randint(1, 2**40)
    row = row._replace(state=TaskState.IN_PROGRESS, assignee=assignee, attempt=attempt, bytes=size, end=None, life=life)
    if choice.random() < 0.5:
        return row
    payload = choice.choice(PAYLOADS_AS_WRITTEN).encode()
    end = TaskOutcome(
        task_id=row.request.task_id, state=TaskState.COMPLETED, success=True, output=payload, attempt=attempt
    )
    if choice.random() < 0.5:
        error = ErrorInfo("failed", "ist \u00fcber \N{SNOWMAN}")
        end = TaskOutcome(
            task_id=row.request.task_id, state=TaskState.FAILED, success=False, error=error, attempt=attempt
        )
    ended_at = float(choice.randint(100, 200))
    return row._replace(state=TaskState(end.state), end=end, ended_at=ended_at, is_delivered=choice.random() < 0.5)


def random_changes(choice: random.Random, tasks: dict[int, TaskRow], agents: set[str]) -> Changes:
    """Return changes to what is known, and enter them there."""
    changes = Changes()
    for _ in range(choice.choice((0, 1, 5, 40))):
        sequence = max(tasks, default=0) + 1
        tasks[sequence] = changes.inserted[sequence] = random_task(choice, sequence)
    older = sorted(tasks.keys() - changes.inserted.keys())
    for sequence in choice.sample(older, choice.randint(0, len(older))):
        tasks[sequence] = changes.updated[sequence] = random_state(choice, tasks[sequence])
    for sequence in choice.sample(older, choice.randint(0, len(older) // 3)):
        changes.updated.pop(sequence, None)
        changes.deleted[sequence] = None
        del tasks[sequence]
    for number in choice.sample(range(9), choice.randint(0, 5)):
        name = f"agent-{number}"
        register = Register(name=name, capabilities=[Capability("work")], metadata={"n": choice.random()})
        is_gone = name in agents and choice.random() < 0.3
        changes.agents[name] = None if is_gone else AgentRow(name, "hash", register, choice.random() < 0.5)
        agents.add(name)
    return changes


@pytest.mark.parametrize("seed", range(4))
def test_random_changes_are_read_as_from_sqlite(seed: int, tmp_path: Path, opened: Any) -> None:
    choice, tasks, agents = random.Random(seed), dict[int, TaskRow](), set[str]()
    ours, theirs = opened(), Journal(tmp_path / "hub.db", sync="normal")
    theirs.open()
    for _ in range(12):
        changes = random_changes(choice, tasks, agents)
        for _ in range(choice.choice((1, 1, 2))):  # A commit in doubt is repeated, and changes nothing.
            ours.write(changes, OFFSET)
            theirs.write(changes, OFFSET)
        if choice.random() < 0.5:
            for journal in (ours, theirs):
                journal.close()
                journal.open()
        (our_agents, *our_rest), (their_agents, *their_rest) = ours.load(OFFSET), theirs.load(OFFSET)
        assert sorted(our_agents) == sorted(their_agents)
        assert our_rest == their_rest
    assert len(our_rest[0]) == len(tasks)
    theirs.close()


def one_task(sequence: int = 1, **fields: Any) -> Changes:
    row = random_task(random.Random(1), sequence)._replace(end=None, ended_at=0.0, is_delivered=False, **fields)
    return Changes(inserted={sequence: row})


def test_namespaces_have_rows_of_their_own_and_one_lease(opened: Any, engine: Engine, url: str) -> None:
    journal = opened()
    other = journal.of_namespace("other")
    other.open()
    journal.write(one_task(1), OFFSET)
    other.write(one_task(2), OFFSET)
    assert [row.sequence for row in journal.load(OFFSET)[1]] == [1]
    assert [row.sequence for row in other.load(OFFSET)[1]] == [2]
    assert journal.epoch == other._first.epoch
    journal.close()
    other.write(one_task(3), OFFSET)  # The last one gives the lease back.
    other.close()
    opened(wait=False)


def test_write_reads_no_more_rows_than_it_changes(opened: Any, url: str) -> None:
    """The engine plans a statement when the table is small, and goes on with that plan."""
    journal = opened()
    for batch in range(60):
        rows = [one_task(20 * batch + number).inserted[20 * batch + number] for number in range(20)]
        journal.write(Changes(inserted={row.sequence: row for row in rows}), OFFSET)
        journal.write(Changes(updated={row.sequence: row._replace(attempt=1) for row in rows}), OFFSET)
    journal.close()  # The engine counts the rows that a connection has read when that ends.
    query = """SELECT seq_tup_read, coalesce(idx_tup_fetch, 0) + seq_tup_read, n_tup_upd FROM pg_stat_user_tables
        WHERE relid = 'agenthub_tasks'::regclass"""
    with psycopg.connect(url, autocommit=True) as connection:
        wait_until(lambda: connection.execute(query).fetchone()[2] == 1200)
        read = connection.execute(query).fetchone()[1]
    assert read < 10 * 1200, f"{read} rows were read to update 1200"


def test_outcome_is_written_next_to_its_task(opened: Any, url: str) -> None:
    """An update that moves to another page costs two more records in the log and an entry in the index."""
    journal, payload = opened(), b'"' + b"x" * 300 + b'"'
    for batch in range(20):
        tasks = [random_task(random.Random(1), 20 * batch + number) for number in range(20)]
        tasks = [row._replace(request=dataclasses.replace(row.request, input=payload)) for row in tasks]
        journal.write(Changes(inserted={row.sequence: row for row in tasks}), OFFSET)
        end = TaskOutcome(task_id="t", state=TaskState.COMPLETED, success=True, output=payload, attempt=1)
        ended = [row._replace(state=TaskState.COMPLETED, end=end, ended_at=200.0, life=TaskLife()) for row in tasks]
        journal.write(Changes(updated={row.sequence: row for row in ended}), OFFSET)
    journal.close()  # The engine counts what a connection has done when that ends.
    query = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relid = 'agenthub_tasks'::regclass"
    with psycopg.connect(url, autocommit=True) as connection:
        wait_until(lambda: connection.execute(query).fetchone()[0] == 400)
        assert connection.execute(query).fetchone() == (400, 400)


def test_journal_is_copied_to_the_database_and_back(
    tmp_path: Path, opened: Any, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, back = tmp_path / "hub.db", tmp_path / "back.db"
    for path in (source, tmp_path / "hub.db.bee"):
        journal, tasks = Journal(path, sync="normal"), dict[int, TaskRow]()
        journal.open()
        for seed in range(4):
            journal.write(random_changes(random.Random(seed), tasks, set()), 0.0)
        journal.close()
    for one, other in ((str(source), url), (url, str(back))):
        assert agenthub.main(["journal", "copy", one, other]) == 0
    assert capsys.readouterr().out.count("of namespace bee to ") == 2
    for suffix in ("", ".bee"):
        rows = []
        for path in (source, back):
            journal = Journal(f"{path}{suffix}")
            journal.open()
            agents, tasks, _ = journal.load(0.0)
            journal.close()
            rows.append((sorted(agents), [row._replace(is_delivered=False) for row in tasks]))
        assert rows[0] == rows[1]
    assert agenthub.main(["journal", "copy", str(source), url]) == 1
    assert "already; use another" in capsys.readouterr().err
    opened()
    assert agenthub.main(["journal", "copy", url, str(tmp_path / "late.db")]) == 1
    assert "holds the lease of namespace default" in capsys.readouterr().err


# The lease


def test_other_hub_waits_until_the_lease_is_given_back(opened: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    first = opened()
    second = PostgresJournal(first._url)
    opening = threading.Thread(target=second.open)
    opening.start()
    wait_until(lambda: "standby: hub" in caplog.text)
    first.write(one_task(), OFFSET)
    first.close()
    opening.join(WAIT_S)
    assert len(second.load(OFFSET)[1]) == 1
    second.close()
    assert caplog.text.count("standby:") == 1


def test_hub_that_does_not_wait_says_who_holds_the_lease(opened: Any) -> None:
    opened()
    with pytest.raises(JournalError, match=rf": hub \S+:{os.getpid()} holds the lease of namespace default$"):
        opened(wait=False)


def test_waiting_ends_when_the_journal_is_closed(opened: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    errors: list[JournalError] = []
    second = PostgresJournal(opened()._url)

    def wait() -> None:
        with pytest.raises(JournalError, match="closed while it waited") as caught:
            second.open()
        errors.append(caught.value)

    opening = threading.Thread(target=wait)
    opening.start()
    wait_until(lambda: "standby: hub" in caplog.text)
    second.close()
    opening.join(WAIT_S)
    assert errors


def test_hub_that_was_replaced_writes_nothing(opened: Any) -> None:
    first = opened(lease_s=0.2)
    other = first.of_namespace("other")
    other.open()
    first.write(one_task(1), OFFSET)
    second = opened()  # Once the lease has ended.
    for _ in range(2):
        with pytest.raises(Fenced, match="another hub has taken over"):
            first.write(one_task(2), OFFSET)
        with pytest.raises(Fenced):
            other.write(one_task(3), OFFSET)
    with pytest.raises(Fenced):
        first.of_namespace("third").open()
    assert [row.sequence for row in second.load(OFFSET)[1]] == [1]
    first.close()
    second.write(one_task(4), OFFSET)  # Its lease was not given back by the other.
    other.close()


def test_hub_whose_lease_has_ended_goes_on_until_it_is_replaced(opened: Any) -> None:
    journal = opened(lease_s=0.01)
    for number in range(1, 4):
        time.sleep(0.03)  # The lease ends by the clock of the engine.
        journal.write(one_task(number), OFFSET)
    assert len(journal.load(OFFSET)[1]) == 3


def test_each_write_that_succeeds_leaves_the_lease_its_whole_time(opened: Any, engine: Engine, url: str) -> None:
    journal = opened(lease_s=20.0)
    query = "SELECT extract(epoch FROM until - now())::float8 FROM agenthub_hub"
    with psycopg.connect(url, autocommit=True) as connection:
        renewals = set()
        for number in range(1, 30):
            journal.write(one_task(number), OFFSET)
            (left_s,) = connection.execute(query).fetchone()
            assert left_s > 20.0 - WAIT_S
            renewals.add(connection.execute("SELECT until FROM agenthub_hub").fetchone())
    assert len(renewals) < 15, "each write renews, so that namespaces wait for each other"


def wait_until(condition: Callable[[], bool]) -> None:
    last = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < last
        time.sleep(0.01)


# Errors of a database


def test_tables_of_another_version_are_left_alone(opened: Any, url: str, engine: Engine) -> None:
    opened().close()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("COMMENT ON TABLE agenthub_hub IS 'AgentHub journal, version 3'")
        with pytest.raises(JournalError, match=r"are of AgentHub journal, version 3, but .* version 2: use another"):
            opened()
        assert connection.execute("SELECT count(*) FROM agenthub_hub").fetchone() == (0,)


def test_tables_of_version_1_are_upgraded(opened: Any, url: str) -> None:
    journal = opened()
    journal.write(one_task(1, life=TaskLife()), OFFSET)
    rows = journal.load(OFFSET)
    journal.close()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("COMMENT ON TABLE agenthub_hub IS 'AgentHub journal, version 1'")
        connection.execute("ALTER TABLE agenthub_tasks DROP COLUMN life")
    journal = opened()
    assert journal.load(OFFSET) == rows
    life = TaskLife((("assigned", "worker-1", 1, 0.5),), 1, Talk(ask=1, message_id=None, question=Question("?")))
    journal.write(Changes(updated={1: rows[1][0]._replace(life=life)}), OFFSET)
    assert journal.load(OFFSET)[1][0].life == life


@pytest.mark.parametrize("table", ["agenthub_hub", "agenthub_tasks"])
def test_tables_of_another_program_are_left_alone(table: str, opened: Any, url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {table} (n int)")
    with pytest.raises(JournalError, match=r"tables are of another program.*; the database was not changed"):
        opened()


@own_engine_only
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("postgres@", "careful:wr0ng@"), "password authentication failed"),
        (("postgres@", "nobody@"), 'role "nobody" does not exist'),
        (("/postgres?", "/nope?"), 'database "nope" does not exist'),
        (("?", "?sslmode=require&"), "SSL"),
        (("search_path", "default_transaction_read_only%3Don%20-c%20search_path"), "name all hosts in the URL"),
        (("search_path%3D", "search_path%3Dnowhere_"), "no schema has been selected"),
    ],
)
def test_database_that_cannot_be_used_is_an_error_at_once(change: tuple[str, str], text: str, url: str) -> None:
    journal = PostgresJournal(url.replace(*change))
    with pytest.raises(JournalError, match=text) as caught:
        journal.open()
    assert "\n" not in str(caught.value)
    assert "wr0ng" not in str(caught.value)


@pytest.mark.parametrize("url", ["postgresql://u:s3cret@[h/db", "postgresql://u:s3cret%zz@h/db", "postgres://h?a=1"])
def test_what_is_no_url_is_a_value_error_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="not a URL of PostgreSQL") as caught:
        PostgresJournal(url)
    assert "s3cret" not in str(caught.value)


def test_password_is_not_in_the_path(url: str) -> None:
    assert PostgresJournal("postgresql://u:s3cret@db1,db2/agenthub").path == "postgresql://db1,db2/agenthub"


@own_engine_only
def test_engine_that_is_away_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with running_engine() as engine:
        engine.stop()
        journal = PostgresJournal(engine.url)
        opening = threading.Thread(target=journal.open)
        opening.start()
        wait_until(lambda: "standby: the database cannot be used: " in caplog.text)
        engine.start()
        opening.join(WAIT_S)
        journal.write(one_task(), OFFSET)
        engine.stop()
        with pytest.raises(psycopg.OperationalError):
            journal.write(one_task(2), OFFSET)
        engine.start()
        journal.write(one_task(2), OFFSET)
        assert len(journal.load(OFFSET)[1]) == 2
        journal.close()


# Writes in doubt


def backend_of(journal: PostgresJournal) -> int:
    assert journal._connection is not None
    return journal._connection.info.backend_pid


def test_write_whose_connection_was_cut_may_be_repeated(opened: Any, engine: Engine) -> None:
    journal = opened()
    journal.write(one_task(1), OFFSET)
    engine.execute(f"SELECT pg_terminate_backend({backend_of(journal)}, 10000)")
    with pytest.raises(psycopg.OperationalError):
        journal.write(one_task(2), OFFSET)
    journal.write(one_task(2), OFFSET)
    assert len(journal.load(OFFSET)[1]) == 2


@pytest.fixture
def unreplicated(engine: Engine) -> Iterator[Callable[[], int]]:
    """Have each commit wait for a replica that is not there; yield a function that waits for one to do so."""

    def waiting() -> int:
        query = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        wait_until(lambda: bool(engine.execute(query)))
        return int(str(engine.execute(query)[0][0]))

    def set_replicas(names: str) -> None:
        with engine.connect() as connection:
            connection.execute("SET synchronous_commit = local")
            connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'".encode())
            connection.execute("SELECT pg_reload_conf()")

    set_replicas("nobody")
    yield waiting
    set_replicas("")


def write_on(journal: PostgresJournal) -> None:
    """Write until it fails: the engine learns of its new configuration a moment later."""
    last = time.monotonic() + WAIT_S
    while time.monotonic() < last:
        journal.write(one_task(), OFFSET)


@own_engine_only
def test_commit_whose_wait_for_a_replica_is_cancelled_is_no_success(opened: Any, engine: Engine, request: Any) -> None:
    journal = opened()
    errors: list[BaseException] = []

    def write() -> None:
        with pytest.raises(psycopg.OperationalError, match="canceling wait for synchronous replication") as caught:
            write_on(journal)
        errors.append(caught.value)

    waiting = request.getfixturevalue("unreplicated")
    writing = threading.Thread(target=write)
    writing.start()
    engine.execute(f"SELECT pg_cancel_backend({waiting()})")
    writing.join(WAIT_S)
    assert errors


@own_engine_only
def test_closing_cuts_a_write_that_waits(opened: Any, engine: Engine, request: Any) -> None:
    journal = opened()
    errors: list[BaseException] = []

    def write() -> None:
        with pytest.raises(psycopg.OperationalError) as caught:
            write_on(journal)
        errors.append(caught.value)

    waiting = request.getfixturevalue("unreplicated")
    writing = threading.Thread(target=write)
    writing.start()
    waiting()
    journal.close()
    writing.join(WAIT_S)
    assert errors
    with pytest.raises(JournalError, match="not open"):
        journal.write(one_task(), OFFSET)


def test_closing_while_it_connects_takes_no_lease(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connecting, may_connect = threading.Event(), threading.Event()
    connect, errors = psycopg.connect, []

    def connect_slowly(**settings: Any) -> Any:
        connecting.set()
        assert may_connect.wait(WAIT_S)
        return connect(**settings)

    def open_it() -> None:
        with pytest.raises(JournalError, match="not open") as caught:
            journal.open()
        errors.append(caught.value)

    monkeypatch.setattr(psycopg, "connect", connect_slowly)
    journal = PostgresJournal(url)
    opening = threading.Thread(target=open_it)
    opening.start()
    assert connecting.wait(WAIT_S)
    journal.close()
    may_connect.set()
    opening.join(WAIT_S)
    assert errors
    with contextlib.closing(PostgresJournal(url)) as other:
        other.open(wait=False)  # The lease is free.


# Time


def test_times_move_with_the_clock_of_the_engine_once(opened: Any) -> None:
    journal = opened()
    ended = random_state(random.Random(5), one_task(2).inserted[2])
    assert ended.end is not None
    journal.write(Changes(inserted={**one_task(1).inserted, 2: ended}), OFFSET)
    before = journal.load(OFFSET)[1]
    journal._engine_ahead_s += 1000.0  # As if another engine, whose clock is ahead, had taken over.
    journal.write(Changes(), OFFSET)
    journal._clock_offset -= 1000.0  # The reply to the move was lost, so that it is repeated.
    journal._steps -= 1
    journal._engine_ahead_s += 1000.0
    journal.write(Changes(), OFFSET)
    after = journal.load(OFFSET - 1000.0)[1]
    assert [row._replace(accepted_at=0, deadline=0, ended_at=0) for row in after] == [
        row._replace(accepted_at=0, deadline=0, ended_at=0) for row in before
    ]
    for was, now in zip(before, after, strict=True):
        assert now.accepted_at - was.accepted_at == pytest.approx(2000.0, abs=30)
        assert now.deadline - was.deadline == pytest.approx(2000.0, abs=30)


# Namespaces


async def test_pairs_with_namespaces_of_their_own_share_a_database(url: str) -> None:
    access = agenthub.Access([agenthub.Grant(one, agenthub.hash_of(one * 20), namespace=one) for one in ("ape", "bee")])

    def hub_of(*namespaces: str) -> agenthub.HubServer:
        return agenthub.HubServer(port=0, access=access, journal=PostgresJournal(url), namespaces=namespaces)

    async with hub_of("ape") as ape, hub_of("bee") as bee:
        for hub, token in ((ape, "ape" * 20), (bee, "bee" * 20)):
            async with agenthub.Agent("me", url=hub.url, token=token) as me:
                assert (await me.status()).hub["agents"] == 1
        with pytest.raises(TimeoutError):  # It waits, as a standby of the second pair does.
            await asyncio.wait_for(hub_of("bee").start(), 0.5)
        await ape.stop()
        with pytest.raises(JournalError, match="holds the lease of namespace bee"):  # Which the first pair lacks.
            await asyncio.wait_for(hub_of("ape", "bee").start(), WAIT_S)
        async with asyncio.timeout(WAIT_S), hub_of("ape") as next_one:
            assert list(next_one.namespaces) == ["ape"]


# Whole hubs: agents with a list of two URLs, and what becomes of the tasks

WORKER = """
import asyncio, sys
from agenthub import Agent, Task

agent = Agent("worker", max_tasks=32)

@agent.capability
async def work(n: int) -> int:
    with open(sys.argv[1], "a") as file:
        file.write(f"{n}\\n")
    await asyncio.sleep(0.05)
    return 2 * n

agent.run()
"""
LEASE_S = 1.0  # Of the hubs of these tests, instead of 5.
HUB = f"""
import sys, agenthub, agenthub_postgres
agenthub_postgres.PostgresJournal.lease_s = {LEASE_S}
sys.exit(agenthub.main())
"""


class Hubs:
    """Hub processes on one journal, each on a port of its own; the first of them is active."""

    def __init__(self, url: str, folder: Path, *, lease_s: float = LEASE_S) -> None:
        self.db = url
        self.folder = folder
        self.ports = [free_port(), free_port()]
        self.processes: list[subprocess.Popen[str]] = []
        self.program = HUB.replace(f"{LEASE_S}", f"{lease_s}")

    @property
    def urls(self) -> str:
        return ",".join(f"ws://127.0.0.1:{port}" for port in self.ports)

    def start(self, number: int, *args: str) -> subprocess.Popen[str]:
        log = (self.folder / f"hub{number}.log").open("a")
        command = [sys.executable, "-c", self.program, "hub", "--port", f"{self.ports[number]}", "--db", self.db, *args]
        with log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True, env={**os.environ, **PATHS}
            )
        self.processes.append(process)
        return process

    def status(self, number: int) -> str:
        """Return what /healthz says; empty if the hub does not listen."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[number]}/healthz", timeout=WAIT_S) as reply:
                return str(json.load(reply)["status"])
        except urllib.error.HTTPError as error:
            with error:
                return str(json.load(error)["status"])
        except OSError:
            return ""

    def until(self, number: int, status: str) -> None:
        wait_until(lambda: self.status(number) == status)

    def log(self, number: int) -> str:
        return (self.folder / f"hub{number}.log").read_text("utf-8")

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait(WAIT_S)


PATHS = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def hubs(url: str, tmp_path: Path) -> Iterator[Hubs]:
    """Two hubs: the first is active, the second its standby."""
    hubs = Hubs(url, tmp_path)
    try:
        hubs.start(0)
        hubs.until(0, "ok")
        hubs.start(1)
        hubs.until(1, "standby")
        yield hubs
    finally:
        hubs.end()


class Load:
    """A requester, a worker process, and the outcomes of the tasks. `gap_s` is the longest time without one."""

    def __init__(self, urls: str, folder: Path, max_retries: int = 2) -> None:
        self.urls = urls
        self.max_retries = max_retries
        self.begun = folder / "begun"
        self.begun.touch()
        self.outcomes: dict[int, Any] = {}
        self.gap_s = 0.0

    @contextlib.contextmanager
    def worker(self) -> Iterator[None]:
        environment = {"AGENTHUB_URL": self.urls}
        with running("-c", WORKER, str(self.begun), env=environment, stderr=subprocess.DEVNULL):
            yield

    async def run(self, count: int, event: Callable[[], Any], at: int) -> None:
        """Delegate so many tasks; `event` is called in a thread when `at` of them have ended."""
        limit = asyncio.Semaphore(100)
        last = [0.0]

        async def one(me: agenthub.Agent, n: int) -> None:
            async with limit:
                options = {"max_retries": self.max_retries, "ttl": WAIT_S * 4, "wait": True}
                try:
                    self.outcomes[n] = await me.delegate("work", {"n": n}, **options)
                except agenthub.TaskFailed as error:
                    self.outcomes[n] = error.code
            now = time.monotonic()
            if last[0]:
                self.gap_s = max(self.gap_s, now - last[0])
            last[0] = now
            if len(self.outcomes) == at:
                events.append(asyncio.create_task(asyncio.to_thread(event)))

        events: list[asyncio.Task[Any]] = []
        with self.worker():
            async with agenthub.Agent("requester", url=self.urls) as me:
                await asyncio.gather(*(one(me, n) for n in range(count)))
            await asyncio.gather(*events)

    def check(self, count: int) -> None:
        """Every task has its right outcome; none ran twice, because its worker was never lost.

        Without a retry, one that was assigned but not yet sent when the hub died has failed, and did not run.
        """
        assert self.outcomes.keys() == set(range(count))
        done = {n: outcome for n, outcome in self.outcomes.items() if self.max_retries or outcome != "agent_lost"}
        assert done == {n: 2 * n for n in done}
        begun = self.begun.read_text("utf-8").split()
        assert sorted(map(int, begun)) == sorted(done)


async def test_standby_takes_over_from_a_hub_that_was_killed(hubs: Hubs, tmp_path: Path) -> None:
    load = Load(hubs.urls, tmp_path)
    await load.run(300, hubs.processes[0].kill, at=100)
    load.check(300)
    hubs.until(1, "ok")


async def test_hub_that_is_stopped_by_a_signal_hands_over_at_once(hubs: Hubs, tmp_path: Path) -> None:
    load = Load(hubs.urls, tmp_path)
    await load.run(300, hubs.processes[0].terminate, at=100)
    load.check(300)
    assert hubs.processes[0].wait(WAIT_S) == 0
    assert hubs.status(1) == "ok"


async def test_hub_that_was_suspended_and_replaced_changes_nothing_and_ends(hubs: Hubs, tmp_path: Path) -> None:
    def suspend() -> None:
        hubs.processes[0].send_signal(signal.SIGSTOP)
        hubs.until(1, "ok")
        hubs.processes[0].send_signal(signal.SIGCONT)
        assert hubs.processes[0].wait(WAIT_S) == 1

    load = Load(hubs.urls, tmp_path)
    await load.run(300, suspend, at=100)
    load.check(300)
    assert hubs.log(0).endswith("another hub has taken over\n")
    hubs.start(0)  # As its supervisor does.
    hubs.until(0, "standby")


async def test_connections_that_are_cut_lose_nothing(hubs: Hubs, engine: Engine, tmp_path: Path) -> None:
    def cut_often() -> None:
        for _ in range(5):
            engine.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND query LIKE 'WITH mine%'"
            )
            time.sleep(0.1)  # Of work between two cuts.

    load = Load(hubs.urls, tmp_path)
    await load.run(300, cut_often, at=100)
    load.check(300)


@pytest.mark.long
@pytest.mark.parametrize("max_retries", [0, 2])
@pytest.mark.parametrize("number", range(20))
async def test_nothing_is_lost_however_often_the_hub_is_killed(
    number: int, max_retries: int, hubs: Hubs, tmp_path: Path
) -> None:
    load = Load(hubs.urls, tmp_path, max_retries)
    await load.run(2000, hubs.processes[0].kill, at=random.Random(number).randint(1, 1900))
    load.check(2000)


async def outlive(hubs: Hubs, failure: Callable[[], None], folder: Path) -> None:
    """Have 1,000 tasks done while the engine fails; nothing is lost, and the first hub goes on."""
    load = Load(hubs.urls, folder)
    await load.run(1000, failure, at=200)
    load.check(1000)
    assert hubs.processes[0].poll() is None


@own_engine_only
@pytest.mark.long
async def test_engine_that_restarts_loses_nothing(tmp_path: Path) -> None:
    def restart() -> None:
        engine.stop()
        time.sleep(2.0)  # How long it is away; the hub waits for three leases.
        engine.start()

    with running_engine() as engine:
        hubs = Hubs(engine.url, tmp_path, lease_s=5.0)
        try:
            hubs.start(0)
            hubs.until(0, "ok")
            await outlive(hubs, restart, tmp_path)
        finally:
            hubs.end()


@own_engine_only
@pytest.mark.long
async def test_engine_that_fails_over_to_a_synchronous_replica_loses_nothing(tmp_path: Path) -> None:
    def fail_over() -> None:
        engine.kill()
        replica.promote()

    with running_engine() as engine:
        replica = engine.replica()
        hosts = f"127.0.0.1:{engine.port},127.0.0.1:{replica.port}"
        hubs = Hubs(f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write", tmp_path, lease_s=5.0)
        try:
            hubs.start(0)
            hubs.until(0, "ok")
            wait_until(lambda: bool(engine.execute("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'")))
            await outlive(hubs, fail_over, tmp_path)
        finally:
            hubs.end()
            replica.remove()


@own_engine_only
async def test_hub_ends_when_the_engine_is_away_for_three_leases_and_waits_for_it_when_started(tmp_path: Path) -> None:
    with running_engine() as engine:
        hubs = Hubs(engine.url, tmp_path)
        try:
            hubs.start(0)
            hubs.until(0, "ok")
            engine.stop()
            hubs.until(0, "silent")
            assert hubs.processes[0].wait(WAIT_S) == 1
            assert "could not be written for " in hubs.log(0)
            hubs.start(0)
            hubs.until(0, "standby")
            engine.start()
            hubs.until(0, "ok")
        finally:
            hubs.end()
