"""A seeded simulation that tries to make the hub lose, repeat or change what it has acknowledged.

One thread and virtual time. The real `Hub` and the real `Journal` run between model agents that speak through the
real codec; the server in between is modelled after GroupCommit: effects wait until the changes that they follow from
are written. Connections are cut, agents die, hang and lie, clocks jump, and the hub is killed between any two steps
and restarted from what the disk has kept. What the hub says, and what the agents know, is entered in books (`Ledger`),
which raise `Violation` at the first word that breaks a promise.

    python -m tests.simulation --seed 7 --verbose      replays one history
    python -m tests.simulation --seeds 100000          runs many, and stops at the first that fails

The disk: the journal is in memory, and its serialized image is what survives. The end of the process keeps what was
committed. A loss of power keeps what was synced: with sync "full" that is the last commit, so that everything is
promised; with sync "normal" it is the last checkpoint, and by contract the hub may forget what came after. Tasks and
agents with a row written after that checkpoint are then `tainted`, and nothing is asked of them any more but that
their memory is given back at the end; all others keep every promise. Which of the two the disk does is read from the
connection's own `PRAGMA synchronous`, so a journal that only claims to sync is found out.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import heapq
import itertools
import logging
import random
import sqlite3
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from agenthub import (
    CLOCK_STEP_S,
    FINAL_STATES,
    AgentMessage,
    Changes,
    Close,
    CloseCode,
    Code,
    Delegate,
    Delegated,
    Deregister,
    Deregistered,
    Discover,
    Discovered,
    Effect,
    Error,
    ErrorInfo,
    Heartbeat,
    HeartbeatAck,
    Hub,
    HubSettings,
    InvalidMessage,
    Journal,
    Register,
    Registered,
    Result,
    Status,
    StatusReply,
    Step,
    TaskAck,
    TaskOutcome,
    TaskState,
    decoder_from_agent,
    decoder_from_hub,
    encode,
)

EVENTS = 500  # Before a run is let come to rest.
HEARTBEAT_S = 2.0
RETENTION_S = 5000.0  # Longer than a run and all the jumps of its clock forwards.
TTLS_S = (0.3, 1.0, 3.0, 6.0, 12.0)
CAPABILITIES = ("a", "b")
TIMER_LATE_S = 0.05  # The server's timer fires this late at the most.
EPSILON_S = 1e-5  # Times of about 1e9 seconds are stored as floats.
TRIES_TO_REST = 20_000  # Events; more without coming to rest is a violation.
FINAL = frozenset(state.value for state in FINAL_STATES)

OPENED, ENDED = "opened", "ended"  # What a link carries beside messages: its beginning and its end.


class Violation(AssertionError):
    """The hub broke a promise. The text names the seed and the command that replays it."""


# What goes wrong in a run: how likely each action of an agent is, relative to the others. Each run does without some.
FAULTS = {
    "repeat": 1.0,  # Sends a delegate again that was, or was not, acknowledged.
    "contradict": 0.3,  # Sends another delegate under the id of one.
    "cancel": 0.8,
    "progress": 0.5,
    "forge": 1.0,  # Answers for somebody else's task, or for an attempt of any number.
    "answer_again": 0.8,  # Answers once more what it has answered before.
    "lie_lost": 0.8,  # Says that it does not have a task that it works on.
    "garbage": 0.3,
    "ask": 0.5,
    "register_again": 0.3,
    "replace": 0.3,  # Opens a second connection under the same identity.
    "hang": 0.5,
    "cut": 1.2,
    "die": 0.6,
    "deregister": 0.25,
    "drain": 0.3,
}


class Plan:
    """What a seed decides before anything happens."""

    def __init__(self, random: random.Random) -> None:
        self.sync = random.choice(("full", "full", "normal"))
        self.settings = HubSettings(
            heartbeat_s=HEARTBEAT_S,
            grace_s=random.choice((0.0, 0.5, 2.0, 8.0)),
            retention_s=RETENTION_S,
            reap_s=1000.0,
            pending_tasks_max=random.choice((4, 1000, 1000)),
        )
        self.weights = {
            name: 0.0 if random.random() < 0.3 else base * random.uniform(0.3, 2.0) for name, base in FAULTS.items()
        }
        self.weights["delegate"] = 6.0
        self.agents = random.randint(3, 5)
        self.pause_s = random.choice((0.1, 0.3, 0.6))  # Between two actions of an agent, on average.
        self.work_s = random.choice((0.05, 0.5, 2.0))
        self.kill = random.choice((0.0, 0.005, 0.015, 0.03))  # Per event.
        self.kill_between_effects = random.choice((0.0, 0.02, 0.1))
        self.power_loss = random.choice((0.0, 0.5, 1.0))  # Of the deaths of the hub.
        self.cut_in_message = random.choice((0.0, 0.01, 0.03))
        self.delayed = random.choice((0.0, 0.05))  # Per message.
        self.slow_disk = random.choice((0.0, 0.1, 0.5))  # Per write.
        self.failed_write = random.choice((0.0, 0.0, 0.05))
        self.checkpoint = random.choice((0.02, 0.2))  # Per write, with sync "normal".
        self.jump = random.choice((0.0, 0.0, 0.3))  # Of the wall clock, per restart, and a tenth of it per act.
        self.outage_s = random.choice((0.1, 1.0, 5.0))


# The disk.


class DiskJournal(Journal):
    """A journal whose file is an image in memory."""

    def __init__(self, image: bytes | None, *, sync: str) -> None:
        super().__init__(":memory:", sync=sync)
        self._image = image

    def _begin_alone(self) -> None:
        if self._image is not None:
            # Copied, because a deserialized database would take up WAL, and then hide what is in that.
            with contextlib.closing(sqlite3.connect(":memory:")) as source:
                source.deserialize(self._image)
                source.backup(self._connected())
            self._image = None
        super()._begin_alone()

    def image(self) -> bytes:
        return self._connected().serialize()

    @property
    def syncs_each_write(self) -> bool:
        """What SQLite itself says: 2 is FULL (https://sqlite.org/pragma.html#pragma_synchronous)."""
        return bool(self._connected().execute("PRAGMA synchronous").fetchone()[0] >= 2)

    def write_or_fail(self, changes: Changes, clock_offset: float, steps: int) -> None:
        """Write, but let SQLite be interrupted once, after `steps` steps of its machine, if that is before the commit.

        An interrupted COMMIT has taken place all the same, which is so of no error that a disk gives.
        """
        database = self._connected()
        interruptions = [1]
        database.set_progress_handler(lambda: interruptions.pop() if interruptions else 0, steps)
        database.set_trace_callback(lambda statement: interruptions.clear() if statement == "COMMIT" else None)
        try:
            self.write(changes, clock_offset)
        finally:
            database.set_progress_handler(None, 0)
            database.set_trace_callback(None)

    def rows(self, table: str) -> int:
        (count,) = self._connected().execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(count)


# The books.


@dataclasses.dataclass(slots=True, eq=False)
class Book:
    """What is known of one task: what was asked for, what the hub has said of it, and what it may say."""

    request: Delegate
    requester: str  # Its agent_id.
    parent: Book | None
    is_acknowledged: bool = False  # By the hub; its requester need not have heard it.
    is_reachable: bool = True  # Its requester remembers it, and has not left.
    is_tainted: bool = False  # A loss of power may have taken something of it, by contract.
    is_sent: bool = False  # Its end was sent to its requester, who need not have received it.
    due: float | None = None  # Its deadline in virtual time; None while no hub has accepted it.
    due_wall: float | None = None  # The same as the journal has it, by the wall clock; None until it is written.
    attempt: int = 0  # The highest that the hub has spoken of.
    delivered: int = 0  # The last attempt that was handed out.
    deliveries: int = 0
    holder: Link | None = None  # Where the last attempt is worked on, as far as the hub was told.
    is_over: bool = False  # The journal has its end.
    final: str | None = None  # The same as the hub has told to anybody.
    outcome: tuple[Any, ...] | None = None  # Success, output, error code and text, once told.
    accepted: tuple[Any, ...] | None = None  # The same, of the result that its worker was told is accepted.
    answers: set[Any] = dataclasses.field(default_factory=set)  # The outputs that any agent has sent.


class Ledger:
    """The books of all tasks. Every word that the server sends passes through `said`."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self.books: dict[str, Book] = {}
        self.away_since: dict[str, float | None] = {}  # By agent_id; None while it is online.
        self.journal_skew_s = simulation.skew_s  # Of the wall clock by which the times in the journal are.
        self.tainted_agents: set[str] = set()

    def fail(self, text: str) -> NoReturn:
        self._simulation.fail(text)

    def said(self, link: Link, action: Any, at: float) -> None:
        """Enter what the hub said, decided at `at`, at the moment it is sent."""
        if isinstance(action, TaskAck):
            self._on_acknowledged(action, at)
        elif isinstance(action, Delegated):
            self._on_delivery(link, action, at)
        elif isinstance(action, TaskOutcome):
            self._on_settled(link, action, at)
        elif isinstance(action, Registered):
            self._on_registered(link, action)
        elif isinstance(action, StatusReply):
            self._on_reported(action, at)
        elif isinstance(action, Error):
            self._on_error(action)

    def accept(self, message: Delegate, at: float) -> None:
        """Take note that a hub has taken a task in: from here on its time counts."""
        book = self.books[message.task_id]
        if book.due is None:
            book.due = at + message.ttl
            if book.parent is not None and book.parent.due is not None:
                book.due = min(book.due, book.parent.due)

    def see(self, task_id: str, state: str, attempt: int, at: float) -> Book:
        """Take the hub's word for the state of a task."""
        book = self.books[task_id]
        if book.is_tainted:
            return book
        if book.final is not None and state != book.final:
            self.fail(f"{task_id} was {book.final}, which is final, and now is {state}")
        if attempt < book.attempt:
            self.fail(f"{task_id} was on attempt {book.attempt}, and now is on {attempt}")
        if attempt > 1 + book.request.max_retries:
            self.fail(f"{task_id} is on attempt {attempt} with {book.request.max_retries} retries")
        book.attempt = attempt
        if state in FINAL and book.final is None:
            book.final = state
            if state == TaskState.TIMEOUT and book.due is not None and at < book.due - EPSILON_S:
                self.fail(f"{task_id} ran out of time {book.due - at:g} s early")
        return book

    def tell(self, book: Book, outcome: tuple[Any, ...]) -> None:
        """Take the hub's word for how a task ended."""
        if book.is_tainted:
            return
        task_id = book.request.task_id
        if book.outcome is not None and outcome != book.outcome:
            self.fail(f"{task_id} ended as {book.outcome}, and now it ended as {outcome}")
        if book.accepted is not None and outcome != book.accepted:
            self.fail(f"{task_id} was answered, and that accepted, with {book.accepted}; but it ended as {outcome}")
        book.outcome = outcome
        success, output, code, _ = outcome
        if success is not (book.final == TaskState.COMPLETED):
            self.fail(f"{task_id} is {book.final} with success {success}")
        if success and output not in book.answers:
            self.fail(f"{task_id} has an output that nobody sent: {output}")
        retries = book.request.max_retries
        if code == Code.AGENT_LOST and retries and book.attempt <= retries:
            self.fail(f"{task_id} was given up after attempt {book.attempt} with {retries} retries")

    def _on_acknowledged(self, reply: TaskAck, at: float) -> None:
        book = self.see(reply.task_id, reply.state, reply.attempt, at)
        asked = self._simulation.asked.get(reply.reply_to or "")
        if asked is None:
            return
        agent_id, message = asked
        if isinstance(message, Delegate):
            book.is_acknowledged = True
        elif isinstance(message, Result) and reply.state in FINAL and not book.is_tainted:
            if agent_id == book.requester and not message.success:
                return  # It may have called it off.
            if message.attempt not in (None, reply.attempt):
                self.fail(f"{reply.task_id}: a result of attempt {message.attempt} was accepted for {reply.attempt}")
            if book.due is not None and at >= book.due + EPSILON_S:
                self.fail(f"{reply.task_id}: a result was accepted {at - book.due:g} s after its deadline")
            outcome = outcome_of(message)
            if outcome[2] != Code.AGENT_LOST:
                book.accepted = outcome
                if book.outcome is not None and book.outcome != outcome:
                    self.fail(f"{reply.task_id} ended as {book.outcome}, and then {outcome} was accepted")

    def _on_delivery(self, link: Link, delivery: Delegated, at: float) -> None:
        task_id = delivery.task_id
        book = self.see(task_id, TaskState.IN_PROGRESS, delivery.attempt, at)
        if book.is_tainted:
            return
        if delivery.attempt <= book.delivered:
            self.fail(f"{task_id}: attempt {delivery.attempt} was handed out after {book.delivered}")
        book.deliveries += 1
        if book.deliveries > 1 + book.request.max_retries:
            self.fail(f"{task_id} was handed out {book.deliveries} times with {book.request.max_retries} retries")
        if book.due is not None and at >= book.due:
            self.fail(f"{task_id} was handed out {at - book.due:g} s after its deadline")
        if book.holder is not None and book.holder.is_attended and task_id not in book.holder.released:
            self.fail(f"{task_id}: attempt {delivery.attempt} began while {book.delivered} was being worked on")
        if link.agent_id not in (None, delivery.agent_id):
            self.fail(f"{task_id} was handed to {link.agent_id} instead of {delivery.agent_id}")
        book.delivered, book.holder = delivery.attempt, link

    def _on_settled(self, link: Link, settled: TaskOutcome, at: float) -> None:
        book = self.see(settled.task_id, settled.state, settled.attempt, at)
        if not book.is_tainted and link.agent_id not in (None, book.requester):
            self.fail(f"the end of {settled.task_id} was told to {link.agent_id} instead of {book.requester}")
        book.is_sent = True
        self.tell(book, outcome_of(settled))

    def _on_registered(self, link: Link, reply: Registered) -> None:
        link.agent_id = reply.agent_id
        for ref in reply.tasks:
            book = self.see(ref.task_id, TaskState.IN_PROGRESS, ref.attempt, self._simulation.now)
            if ref.attempt >= book.delivered:
                book.holder = link

    def _on_reported(self, report: StatusReply, at: float) -> None:
        for one in report.tasks or ():
            self.see(one.task_id, one.state, one.attempt, at)
        if report.task_id is not None:
            book = self.see(report.task_id, report.state or "", report.attempt or 0, at)
            # Those who did not ask for the task are told its state and no more.
            if report.state in FINAL and (report.error is not None or report.output is not None):
                self.tell(book, outcome_of(report))

    def _on_error(self, error: Error) -> None:
        book = self.books.get(error.task_id or "")
        if error.code == Code.INTERNAL:
            self.fail(f"the hub failed: {error.message}")
        if error.code == Code.UNKNOWN_TASK and book is not None and book.is_acknowledged and not book.is_tainted:
            self.fail(f"{error.task_id} was acknowledged, and now it is not known")
        agent_id, asked = self._simulation.asked.get(error.reply_to or "", ("", None))
        if not isinstance(asked, Delegate) or book is None or book.is_tainted:
            return
        if book.is_acknowledged and agent_id == book.requester:
            self.fail(f"{error.task_id} was acknowledged, and then refused with {error.code}")

    # What a restart means.

    def wrote(self, changes: Changes, skew_s: float) -> list[str]:
        """Take note of what is on disk from now on; return the tasks that were set with the clock."""
        moved = []
        if abs(skew_s - self.journal_skew_s) > CLOCK_STEP_S:
            for task_id, book in self.books.items():
                if book.due_wall is not None:
                    book.due_wall += skew_s - self.journal_skew_s
                    moved.append(task_id)
            self.journal_skew_s = skew_s
        for row in changes.inserted.values():
            book = self.books[row.request.task_id]
            book.due_wall = None if book.due is None else book.due + self.journal_skew_s
        for row in (*changes.inserted.values(), *changes.updated.values()):
            if row.end is not None:
                self.books[row.request.task_id].is_over = True
        return moved

    def died(self) -> None:
        """Forget with the hub what it had not written: nothing was said of it."""
        for book in self.books.values():
            if book.due_wall is None:
                book.due = None
            book.holder = None

    def restarted(self, now: float, skew_s: float) -> None:
        """Count time on by the wall clock; but nothing lives longer than its ttl from here on."""
        self.journal_skew_s = skew_s
        for book in self.books.values():
            if book.due_wall is not None and not book.is_over:
                book.due = min(book.due_wall - skew_s, now + book.request.ttl)
        for agent_id in self.away_since:
            self.away_since[agent_id] = now

    def taint(self, task_ids: dict[str, None], agent_ids: dict[str, None]) -> None:
        self.tainted_agents.update(agent_ids)
        for task_id, book in self.books.items():
            if task_id in task_ids or book.requester in agent_ids or (book.parent and book.parent.is_tainted):
                book.is_tainted = True

    # What an observer sees.

    def audit(self, tasks: StatusReply, agents: Discovered, now: float, life: Life) -> None:
        """Look at what the hub lists at one moment: nothing may be overdue, left lying, or at an agent that is lost."""
        listed = {one.task_id: one for one in tasks.tasks or ()}
        is_due = any(one.state == TaskState.PENDING and one.ttl <= 0.001 for one in listed.values())
        running: collections.Counter[str | None] = collections.Counter()
        for one in listed.values():
            if one.state in FINAL:
                continue
            book = self.books[one.task_id]
            late_s = now - max(book.due if book.due is not None else now, life.started)
            if late_s > TIMER_LATE_S + EPSILON_S and not book.is_tainted:
                self.fail(f"{one.task_id} is {one.state} {late_s:g} s after its deadline")
            parent = listed.get(one.parent_id or "")
            if one.parent_id is not None and (parent is None or parent.state != TaskState.IN_PROGRESS):
                self.fail(f"{one.task_id} goes on, and {one.parent_id}, of which it is a part, does not")
            if one.state == TaskState.IN_PROGRESS:
                running[one.agent_id] += 1
                away_since = self.away_since.get(one.agent_id or "")
                grace_s = life.hub.settings.grace_s
                if away_since is not None and now - away_since > grace_s + TIMER_LATE_S + EPSILON_S:
                    self.fail(f"{one.task_id} is still with {one.agent_id}, away for {now - away_since:g} s")
            elif not is_due:  # An agent whose next task is due waits for the tick that ends that one.
                for agent in agents.agents:
                    is_able = one.capability in (None, *(each.name for each in agent.capabilities))
                    is_meant = agent.agent_id == one.agent_id if one.agent_id else agent.agent_id != one.requester
                    if is_able and is_meant and agent.running < agent.max_tasks:
                        self.fail(f"{one.task_id} waits, and {agent.agent_id}, which could take it, is free")
        for agent in agents.agents:
            if running[agent.agent_id] != agent.running or agent.running > agent.max_tasks:
                self.fail(f"{agent.agent_id} has {agent.running} tasks, and {running[agent.agent_id]} are listed")


def outcome_of(message: Result | TaskOutcome | StatusReply) -> tuple[Any, ...]:
    """Return what a task's requester is told of its end, in a form that can be compared."""
    error = message.error
    if isinstance(error, str):
        error = ErrorInfo(Code.FAILED, error)
    success = message.state == TaskState.COMPLETED if isinstance(message, StatusReply) else message.success
    return success, message.output, error.code if error else None, error.message if error else None


# The network.


class Link:
    """One connection, with what is under way on it in both directions."""

    __slots__ = (
        "agent",
        "agent_id",
        "down",
        "down_due",
        "is_attended",
        "is_broken",
        "is_open",
        "life",
        "number",
        "released",
        "up",
        "up_due",
    )

    def __init__(self, number: int, agent: ModelAgent | None, life: Life) -> None:
        self.number = number
        self.agent = agent  # None: an observer.
        self.agent_id: str | None = None  # Once the hub has said so.
        self.life = life
        self.up: collections.deque[Any] = collections.deque()
        self.down: collections.deque[Any] = collections.deque()
        self.up_due = self.down_due = 0.0
        self.is_attended = True  # The hub does not know that it has ended.
        self.is_open = True  # The agent does not know that it has ended.
        self.is_broken = False  # Nothing gets through any more.
        self.released: set[str] = set()  # Tasks that the agent has said it does not have; all when it leaves.


# The server.


class Life:
    """One life of the hub, from a start to its death, with the server that carries out its effects.

    What GroupCommit does with a thread and a loop is three events here: changes are taken, are committed, and the
    effects that waited for that are carried out. Between any two the hub may be killed.
    """

    def __init__(self, simulation: Simulation, image: bytes | None) -> None:
        self.simulation = simulation
        self.started = simulation.now
        self._clock_start = simulation.random.uniform(0.0, 100_000.0)
        plan = simulation.plan
        self.journal = simulation.journal_class(image, sync=plan.sync)
        self.journal.open()
        self.hub = simulation.hub_class(
            plan.settings, entropy=simulation.random.randbytes, now=self.clock(), is_journaled=True
        )
        agents, tasks, last = self.journal.load(self._offset())
        self.is_dead = False
        self.observer: Link | None = None
        self._changes: Changes | None = None
        self._held: list[tuple[Effect, float]] = []
        self._is_busy = False
        self._armed_for: float | None = None
        self._apply(self.hub.restore(agents, tasks, last - plan.settings.grace_s))

    def clock(self) -> float:
        """Return the monotonic clock of this life, which starts anywhere."""
        return self._clock_start + self.simulation.now - self.started

    def _offset(self) -> float:
        return self.simulation.wall() - self.clock()

    # Facts.

    def connected(self, link: Link) -> None:
        self._apply(self.hub.connected(link, self.clock()))

    def disconnected(self, link: Link) -> None:
        self._note_away(link)
        self._apply(self.hub.disconnected(link, self.clock()))

    def received(self, link: Link, raw: bytes) -> None:
        message: AgentMessage | InvalidMessage
        try:
            message = decoder_from_agent()(raw)
        except InvalidMessage as error:
            message = error
        step = self.hub.receive(link, message, self.clock(), len(raw))
        if isinstance(message, Delegate):
            for _, action in step.effects:
                if isinstance(action, TaskAck) and action.reply_to == message.id:
                    self.simulation.ledger.accept(message, self.simulation.now)
        elif isinstance(message, Register):
            for whom, action in step.effects:
                if isinstance(action, Registered) and whom is link:
                    link.agent_id = action.agent_id
                    self.simulation.ledger.away_since[action.agent_id] = None
        self._apply(step)

    def _note_away(self, link: Link) -> None:
        """Take note that the hub has lost sight of an agent, unless that is there by another link."""
        ledger, agent_id = self.simulation.ledger, link.agent_id
        if link.is_attended and agent_id is not None:
            others = (one for one in self.simulation.links if one.is_attended and one is not link)
            if not any(one.agent_id == agent_id for one in others):
                ledger.away_since[agent_id] = self.simulation.now
        link.is_attended = False

    # Effects.

    def _apply(self, step: Step) -> None:
        effects, changes = step
        at = self.simulation.now
        if self._changes is None:
            self._changes = changes
        elif changes is not None:
            self._changes.merge(changes)
        if not self._is_busy and self._changes is None:
            self._carry_out([(effect, at) for effect in effects])
        else:
            self._carry_out([(effect, at) for effect in effects if may_overtake(effect[1])])
            self._held += [(effect, at) for effect in effects if not may_overtake(effect[1])]
            if not self._is_busy and not self.is_dead:
                self._is_busy = True
                self.simulation.after(self.simulation.latency_s() / 4, self._write)
        for link, action in effects:
            if isinstance(action, Close):
                self._note_away(link)
        self._arm()

    def _write(self) -> None:
        if self.is_dead:
            return
        held, self._held = self._held, []
        changes, self._changes = self._changes, None
        self._try(changes or Changes(), held)

    def _try(self, changes: Changes, held: list[tuple[Effect, float]]) -> None:
        if self.is_dead:
            return
        random, plan = self.simulation.random, self.simulation.plan
        duration_s = random.uniform(0.0, 0.5) if random.random() < plan.slow_disk else random.uniform(0.0, 0.005)
        skew_s = self.simulation.skew_s
        self.simulation.after(duration_s, self._commit, changes, held, self._offset(), skew_s)

    def _commit(self, changes: Changes, held: list[tuple[Effect, float]], offset: float, skew_s: float) -> None:
        if self.is_dead:
            return
        simulation = self.simulation
        if not simulation.is_calm and simulation.random.random() < simulation.plan.failed_write:
            try:
                self.journal.write_or_fail(changes, offset, simulation.random.randint(1, 400))
            except sqlite3.Error:
                simulation.note("the write failed")
                simulation.seen["failed write"] += 1
                simulation.after(0.0 if not self.hub.is_full else 1.0, self._try, changes, held)
                if not self.hub.is_full:
                    self.hub.is_full = True
                    simulation.after(5.0, self._look_for_room)
                return
        else:
            self.journal.write(changes, offset)
        simulation.wrote(changes, skew_s)
        simulation.after(simulation.random.uniform(0.0, 0.005), self._on_written, held)

    def _look_for_room(self) -> None:
        self.hub.is_full = False

    def _on_written(self, held: list[tuple[Effect, float]]) -> None:
        if self.is_dead:
            return
        self._carry_out(held)
        if self._held or self._changes is not None:
            self._write()
        else:
            self._is_busy = False

    def _carry_out(self, effects: list[tuple[Effect, float]]) -> None:
        simulation = self.simulation
        for (link, action), at in effects:
            if self.is_dead:
                return
            if simulation.may_fail(simulation.plan.kill_between_effects):
                simulation.kill("between two effects")
                return
            simulation.carry_out(link, action, at)

    @property
    def is_idle(self) -> bool:
        return not self._is_busy and self._changes is None

    # Time.

    def _arm(self) -> None:
        deadline = self.hub.next_deadline()
        if self.is_dead or (self._armed_for is not None and self._armed_for <= deadline):
            return
        self._armed_for = deadline
        delay_s = max(0.0, deadline - self.clock())
        self.simulation.after(delay_s + self.simulation.random.uniform(0.0, TIMER_LATE_S), self._tick, deadline)

    def _tick(self, deadline: float) -> None:
        if self.is_dead or self._armed_for != deadline:
            return
        self._armed_for = None
        self._apply(self.hub.tick(max(self.clock(), deadline)))

    def audit(self) -> None:
        """Ask as an observer what there is, and see whether it may be so."""
        if self.observer is None or not self.observer.is_attended:
            self.observer = self.simulation.link(None)
            self.connected(self.observer)
        if self.is_dead:
            return
        replies: list[Any] = []
        for question in (Status(id="audit", tasks=True), Discover(id="audit", limit=1000)):
            message = decoder_from_agent()(encode(question))
            step = self.hub.receive(self.observer, message, self.clock(), 50)
            replies += [decoder_from_hub()(encode(one)) for _, one in step.effects if not isinstance(one, Close)]
            self._apply(step)
            if self.is_dead:
                return
        tasks, agents = replies
        self.simulation.ledger.audit(tasks, agents, self.simulation.now, self)


def may_overtake(action: Any) -> bool:
    """Tell what need not wait for the journal, as GroupCommit does."""
    return isinstance(action, HeartbeatAck) or (isinstance(action, Error) and action.code == Code.OVERLOADED)


# The agents.


class ModelAgent:
    """An agent that requests, works, or both. What it keeps until when is as in the SDK; `act` does the rest."""

    def __init__(self, simulation: Simulation, name: str, capabilities: list[str], max_tasks: int) -> None:
        self.simulation = simulation
        self.name = name
        self.capabilities = capabilities
        self.max_tasks = max_tasks
        self.identity: tuple[str, str] | None = None  # Its agent_id and its secret.
        self.link: Link | None = None
        self.is_registered = False
        self.is_leaving = False
        self.has_left = False  # For good.
        self.hung_until = 0.0
        self.last_received = 0.0
        self.memory = 0  # Counts its memories: what an earlier one has started is not known to a later one.
        self.running: dict[str, int] = {}  # The attempt, by task_id.
        self.results: dict[str, Result] = {}  # Of tasks done here, until the hub has them.
        self.answered: list[Result] = []
        self.open: dict[str, bool] = {}  # Whether it was acknowledged, by task_id.
        self.mine: dict[str, None] = {}  # All tasks that it ever asked for under this identity.

    # Its connection.

    def connect(self) -> None:
        simulation = self.simulation
        if self.link is not None or self.has_left:
            return
        if simulation.life is None:
            simulation.after(simulation.random.uniform(0.1, 0.5), self.connect)
            return
        self.link = simulation.link(self)
        simulation.push_up(self.link, OPENED)
        self.last_received = simulation.now
        self.register()
        simulation.after(HEARTBEAT_S, self._beat, self.link)

    def register(self) -> None:
        agent_id, resume = self.identity or (None, None)
        self.ask(
            Register(
                name=self.name,
                capabilities=[*self.capabilities],
                max_tasks=self.max_tasks,
                agent_id=agent_id,
                resume=resume,
            )
        )

    def _beat(self, link: Link) -> None:
        """Keep a link alive; have done with one on which the hub has been silent for too long."""
        if self.link is not link:
            return
        simulation = self.simulation
        if self.hung_until > simulation.now:
            simulation.after(self.hung_until - simulation.now, self._beat, link)
        elif simulation.now - self.last_received > 3 * HEARTBEAT_S:
            simulation.cut(link)
            self.closed(link, 1006)
        else:
            self.ask(Heartbeat())
            simulation.after(HEARTBEAT_S, self._beat, link)

    def closed(self, link: Link, code: int) -> None:
        """Take note that a link has ended, and try to get another."""
        link.is_open = False
        if self.link is not link:
            return
        self.link, self.is_registered = None, False
        if self.is_leaving and (code == CloseCode.DONE or self.simulation.random.random() < 0.5):
            self.forget()
        self.is_leaving = False
        self.simulation.after(self.simulation.random.uniform(0.0, 0.5), self.connect)

    def forget(self, *, identity: bool = True) -> None:
        """Lose the memory; all of it, or all but the identity."""
        self.memory += 1
        self.running.clear()
        self.results.clear()
        self.answered.clear()
        self.open.clear()
        for task_id in self.mine:
            self.simulation.ledger.books[task_id].is_reachable = False
        if identity:
            self.identity = None
            self.mine.clear()

    # What it says.

    def ask(self, message: AgentMessage) -> None:
        simulation = self.simulation
        if self.link is None:
            return
        message.id = f"m{next(simulation.serial)}"
        simulation.asked[message.id] = (self.identity[0] if self.identity else "", message)
        if isinstance(message, Result) and isinstance(message.error, ErrorInfo):  # It says that it lost the task.
            self.link.released.add(message.task_id)
        if isinstance(message, Delegate) and self.identity is not None:
            simulation.ledger.books[message.task_id].requester = self.identity[0]
        simulation.send(self.link, encode(message))

    def act(self) -> None:
        """Do something, right or wrong, and come back for more."""
        simulation = self.simulation
        if simulation.is_calm:
            return
        simulation.after(simulation.random.expovariate(1 / simulation.plan.pause_s), self.act)
        if self.is_registered and self.hung_until <= simulation.now and not self.is_leaving:
            getattr(self, "_do_" + simulation.next_action())()

    def _do_delegate(self) -> None:
        random, ledger = self.simulation.random, self.simulation.ledger
        assert self.identity is not None
        target = random.random()
        named = random.choice(self.simulation.agents).identity if target < 0.35 else None
        parent_id = random.choice([*self.running]) if self.running and random.random() < 0.4 else None
        request = Delegate(
            task_id=f"t{len(ledger.books) + 1}",
            agent_id=named[0] if named else None,
            capability=random.choice(CAPABILITIES) if named is None or target < 0.15 else None,
            input={"n": len(ledger.books)},
            ttl=random.choice(TTLS_S),
            priority=random.choice((0, 0, 5)),
            max_retries=random.randint(0, 3),
            parent_id=parent_id,
            wait=random.random() < 0.7,
        )
        parent = ledger.books.get(parent_id or "")
        book = ledger.books[request.task_id] = Book(request, self.identity[0], parent)
        book.is_tainted = parent is not None and parent.is_tainted
        self.open[request.task_id] = False
        self.mine[request.task_id] = None
        self.ask(dataclasses.replace(request))

    def _resubmit(self, task_id: str) -> None:
        if task_id in self.mine:
            self.ask(dataclasses.replace(self.simulation.ledger.books[task_id].request))

    def _do_repeat(self) -> None:
        # Not one that was refused: that would be a new one.
        task_ids = [one for one in self.mine if one in self.open or self.simulation.ledger.books[one].is_acknowledged]
        if task_ids:
            self._resubmit(self.simulation.random.choice(task_ids))

    def _do_contradict(self) -> None:
        known = self.simulation.ledger.books.values()
        books = [book for book in known if book.is_acknowledged and not book.is_tainted]
        if books:
            request = self.simulation.random.choice(books).request
            message = dataclasses.replace(request, input="another", id=f"x{next(self.simulation.serial)}")
            assert self.link is not None
            self.simulation.send(self.link, encode(message))

    def _do_cancel(self) -> None:
        if self.open:
            self.ask(Result(task_id=self.simulation.random.choice([*self.open]), success=False, error="not needed"))

    def _do_progress(self) -> None:
        if self.running:
            self.ask(Status(task_id=self.simulation.random.choice([*self.running]), progress=0.5, detail="half"))

    def _do_forge(self) -> None:
        random, books = self.simulation.random, self.simulation.ledger.books
        others = [task_id for task_id, book in books.items() if self.identity and book.requester != self.identity[0]]
        retried = [task_id for task_id in others if books[task_id].attempt > 1 and books[task_id].final is None]
        if retried and random.random() < 0.5:
            task_id = random.choice(retried)
            self._answer(task_id, random.randint(1, books[task_id].attempt), is_kept=False)
        elif others:
            self._answer(random.choice(others[-8:]), random.choice((None, 1, 1, 2, 3)), is_kept=False)

    def _do_answer_again(self) -> None:
        if self.answered:
            former = self.simulation.random.choice(self.answered)
            output = f"{former.output} again"
            self.simulation.ledger.books[former.task_id].answers.add(output)
            self.ask(Result(task_id=former.task_id, success=True, output=output, attempt=former.attempt))

    def _do_lie_lost(self) -> None:
        if self.running:
            task_id = self.simulation.random.choice([*self.running])
            self._report_lost(task_id, self.running[task_id])

    def _do_garbage(self) -> None:
        assert self.link is not None
        garbage = (b'{"type": "result", "id": "g", "task_id": "t1"', b"\xff", b'{"type": "delegate", "ttl": -1}', b"[]")
        self.simulation.send(self.link, self.simulation.random.choice(garbage))

    def _do_ask(self) -> None:
        books = self.simulation.ledger.books
        if books:
            self.ask(Status(task_id=self.simulation.random.choice([*books])))

    def _do_register_again(self) -> None:
        self.register()

    def _do_replace(self) -> None:
        old, self.link = self.link, None
        self.is_registered = False
        assert old is not None
        old.is_open = False
        self.connect()

    def _do_hang(self) -> None:
        self.hung_until = self.simulation.now + self.simulation.random.choice((0.5, 3.0, 8.0))

    def _do_cut(self) -> None:
        assert self.link is not None
        self.simulation.cut(self.link)

    def _do_die(self) -> None:
        """End with the process: what it worked on is lost, and perhaps the rest of its memory."""
        assert self.link is not None
        link, random = self.link, self.simulation.random
        self.simulation.cut(link)
        link.is_open = False
        self.link, self.is_registered = None, False
        self.running.clear()
        fate = random.random()
        if fate < 0.6:
            self.forget(identity=fate < 0.3)
        self.simulation.after(random.choice((0.1, 2.0, 6.0)), self.connect)

    def _do_deregister(self) -> None:
        self._leave(Deregister())

    def _do_drain(self) -> None:
        self._leave(Deregister(drain=True))

    def _leave(self, message: Deregister) -> None:
        assert self.link is not None
        self.is_leaving = True
        self.link.released.update(self.simulation.ledger.books)
        for task_id in self.mine:
            self.simulation.ledger.books[task_id].is_reachable = False
        self.open.clear()
        self.ask(message)

    def leave_for_good(self) -> None:
        self.has_left = True
        self.forget(identity=False)
        if self.link is not None:
            self._leave(Deregister())

    # What it hears.

    def received(self, link: Link, message: Any) -> None:
        self.last_received = self.simulation.now
        if isinstance(message, Registered):
            self._on_registered(message)
        elif isinstance(message, Delegated):
            self._on_delegated(message)
        elif isinstance(message, TaskOutcome):
            self.open.pop(message.task_id, None)
        elif isinstance(message, StatusReply):
            self._on_reported(message)
        elif isinstance(message, Error):
            self._on_error(message)
        elif isinstance(message, Deregistered):
            self.forget()

    def _on_registered(self, reply: Registered) -> None:
        simulation = self.simulation
        if self.identity is not None and self.identity[0] != reply.agent_id:
            books = simulation.ledger.books
            lost = [task_id for task_id, is_accepted in self.open.items() if is_accepted]
            if any(books[task_id].is_reachable and not books[task_id].is_tainted for task_id in lost):
                simulation.fail(f"{self.identity[0]} waits for {lost}, and has become {reply.agent_id}")
            for task_id in self.mine:
                books[task_id].is_reachable = self.open.get(task_id) is False
            self.mine = dict.fromkeys(task_id for task_id in self.mine if books[task_id].is_reachable)
            self.open = dict.fromkeys(self.mine, False)
        self.identity = reply.agent_id, reply.resume
        if self.is_registered:  # It registered again: it told something new of itself, and nothing was lost.
            return
        self.is_registered = True
        held = {ref.task_id: ref.attempt for ref in reply.tasks}
        self.running = {task_id: attempt for task_id, attempt in self.running.items() if held.get(task_id) == attempt}
        for result in list(self.results.values()):
            if held.get(result.task_id) == result.attempt:
                self.ask(result)
            else:
                del self.results[result.task_id]
        for task_id, attempt in held.items():
            if task_id not in self.running and task_id not in self.results:
                self._report_lost(task_id, attempt)
        for task_id, is_accepted in self.open.items():
            if is_accepted:
                self.ask(Status(task_id=task_id))
            else:
                self._resubmit(task_id)

    def _report_lost(self, task_id: str, attempt: int) -> None:
        error = ErrorInfo(Code.AGENT_LOST, "the agent does not have this task")
        self.running.pop(task_id, None)
        result = self.results[task_id] = Result(task_id=task_id, success=False, error=error, attempt=attempt)
        self.ask(result)

    def _on_delegated(self, message: Delegated) -> None:
        random = self.simulation.random
        if self.running.get(message.task_id) == message.attempt:
            return
        self.running[message.task_id] = message.attempt
        duration_s = random.expovariate(1 / self.simulation.plan.work_s)
        self.simulation.after(min(duration_s, 10.0), self._finish, self.memory, message.task_id, message.attempt)

    def _finish(self, memory: int, task_id: str, attempt: int) -> None:
        simulation = self.simulation
        if memory != self.memory:
            return
        if self.hung_until > simulation.now:
            simulation.after(self.hung_until - simulation.now, self._finish, memory, task_id, attempt)
        elif self.running.get(task_id) == attempt:
            del self.running[task_id]
            self._answer(task_id, attempt, is_kept=True)
        elif simulation.may_fail(0.3):  # It was told to stop, or it has a newer attempt, and answers all the same.
            self._answer(task_id, attempt, is_kept=False)

    def _answer(self, task_id: str, attempt: int | None, *, is_kept: bool) -> None:
        simulation = self.simulation
        text = f"{self.name} {task_id} {attempt} {next(simulation.serial)}"
        result = Result(task_id=task_id, success=simulation.random.random() < 0.8, attempt=attempt)
        if result.success:
            result.output = text
        else:
            result.error = text
        simulation.ledger.books[task_id].answers.add(text)
        if is_kept:
            self.results[task_id] = result
            self.answered.append(result)
        if self.is_registered:
            self.ask(result)

    def _on_reported(self, report: StatusReply) -> None:
        task_id = report.task_id or ""
        _, asked = self.simulation.asked.get(report.reply_to or "", (None, None))
        if isinstance(asked, Delegate):
            if task_id in self.open:
                self.open[task_id] = True
        elif isinstance(asked, Status):
            if report.state in FINAL and report.requester == (self.identity or [None])[0]:
                self.open.pop(task_id, None)
        elif isinstance(asked, Result):
            if self.results.get(task_id) is asked:
                del self.results[task_id]
        elif report.seq is None and report.state in FINAL:
            self.running.pop(task_id, None)

    def _on_error(self, error: Error) -> None:
        simulation = self.simulation
        _, asked = simulation.asked.get(error.reply_to or "", (None, None))
        task_id = error.task_id or ""
        book = simulation.ledger.books.get(task_id)
        if isinstance(asked, Result) and self.results.get(task_id) is asked:
            del self.results[task_id]
        elif isinstance(asked, Status) and error.code == Code.UNKNOWN_TASK:
            self.open.pop(task_id, None)
        elif isinstance(asked, Delegate) and book is not None and task_id in self.mine:
            if error.code == Code.OVERLOADED and not self.open.get(task_id, True):
                simulation.after(1.0, self._retry, self.memory, task_id)
            else:
                self.open.pop(task_id, None)
        elif isinstance(asked, Register):
            simulation.fail(f"{self.name} was not let in: {error.code} {error.message}")

    def _retry(self, memory: int, task_id: str) -> None:
        if memory == self.memory and self.is_registered and self.open.get(task_id) is False:
            self._resubmit(task_id)


# The whole.


class Simulation:
    """One history. `run` it once; raises Violation."""

    def __init__(
        self,
        seed: int,
        *,
        hub_class: type[Hub] = Hub,
        journal_class: type[DiskJournal] = DiskJournal,
        verbose: bool = False,
    ) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.plan = Plan(self.random)
        self.hub_class = hub_class
        self.journal_class = journal_class
        self.now = 0.0
        self.skew_s = 1.7e9  # What the wall clock is ahead of virtual time.
        self.events = 0
        self.kills = 0
        self.seen: collections.Counter[str] = collections.Counter()  # What came about, by a word for it.
        self.traffic = hashlib.blake2b(digest_size=16)
        self.is_calm = False
        self.ledger = Ledger(self)
        self.serial = itertools.count(1)
        self.asked: dict[str, tuple[str, AgentMessage]] = {}  # By the message's id: whose it is, and what.
        self.life: Life | None = None
        self.links: list[Link] = []
        self._verbose = verbose
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._synced: bytes | None = None
        self._unsynced: tuple[dict[str, None], dict[str, None]] = ({}, {})  # Tasks and agents written since.
        self._task_ids: dict[int, str] = {}  # By arrival.
        self._jumped_s = 0.0
        self._actions = [name for name, weight in self.plan.weights.items() if weight]
        self._cumulated = list(itertools.accumulate(self.plan.weights[name] for name in self._actions))
        self.agents = [self._agent(number) for number in range(self.plan.agents)]

    def _agent(self, number: int) -> ModelAgent:
        capabilities = [one for one in CAPABILITIES if self.random.random() < 0.6] if number else [*CAPABILITIES]
        return ModelAgent(self, f"agent{number}", capabilities, self.random.randint(1, 3))

    def fail(self, text: str) -> NoReturn:
        raise Violation(
            f"seed {self.seed}, event {self.events}: {text}\n"
            f"replay it with: python -m tests.simulation --seed {self.seed} --verbose"
        )

    def note(self, text: str) -> None:
        if self._verbose:
            print(f"{self.now:10.4f}  {text}")

    # Time and chance.

    def after(self, delay_s: float, function: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._queue, (self.now + delay_s, next(self.serial), function, args))

    def step(self) -> None:
        self.now, _, function, args = heapq.heappop(self._queue)
        self.events += 1
        function(*args)

    def wall(self) -> float:
        return self.now + self.skew_s

    def may_fail(self, probability: float) -> bool:
        return probability > 0 and not self.is_calm and self.random.random() < probability

    def latency_s(self) -> float:
        return self.random.uniform(0.1, 3.0) if self.may_fail(self.plan.delayed) else self.random.uniform(0.0005, 0.02)

    def next_action(self) -> str:
        if self.may_fail(self.plan.jump / 10):
            self._jump()
        return self.random.choices(self._actions, cum_weights=self._cumulated)[0]

    def _jump(self) -> None:
        """Set the wall clock, forwards less far in all than ended tasks are kept."""
        jump_s = self.random.choice((0.5, 5.0, 300.0, -0.5, -5.0, -10_000.0))
        if jump_s > 0:
            self._jumped_s += jump_s
        if self._jumped_s < RETENTION_S / 2:
            self.note(f"the wall clock jumps by {jump_s:g} s")
            self.seen["clock forwards" if jump_s > 0 else "clock backwards"] += 1
            self.skew_s += jump_s

    # The network.

    def link(self, agent: ModelAgent | None) -> Link:
        assert self.life is not None
        link = Link(next(self.serial), agent, self.life)
        self.links = [one for one in self.links if one.is_attended or one.is_open]
        self.links.append(link)
        return link

    def send(self, link: Link, raw: bytes) -> None:
        """Send from an agent to the hub; perhaps the connection is cut before, within or after the message."""
        if self.may_fail(self.plan.cut_in_message):
            if self.random.random() < 0.5:
                self.push_up(link, raw)
            self.cut(link)
        else:
            self.push_up(link, raw)

    def push_up(self, link: Link, item: Any) -> None:
        if not link.is_broken:
            link.up.append(item)
            link.up_due = max(link.up_due, self.now + self.latency_s())
            self.after(link.up_due - self.now, self._pump_up, link)

    def push_down(self, link: Link, item: Any) -> None:
        if not link.is_broken:
            link.down.append(item)
            link.down_due = max(link.down_due, self.now + self.latency_s())
            self.after(link.down_due - self.now, self._pump_down, link)

    def cut(self, link: Link) -> None:
        """Cut a connection. What is under way may still arrive at the hub in part; what it sends is lost."""
        if link.is_broken:
            return
        self.note(f"link {link.number} is cut")
        while link.up and self.random.random() < 0.3:
            link.up.pop()
        link.down.clear()
        is_noticed = self.random.random() < 0.7 or self.is_calm
        if is_noticed:
            self.push_up(link, ENDED)
        link.is_broken = True
        if link.agent is not None:
            self.after(self.random.choice((0.0, 0.1, 1.0)), link.agent.closed, link, 1006)

    def _pump_up(self, link: Link) -> None:
        life = link.life
        if not link.up or life.is_dead:
            return
        item = link.up.popleft()
        if item is OPENED:
            life.connected(link)
        elif item is ENDED:
            life.disconnected(link)
        else:
            self._hash("up", link, item)
            life.received(link, item)

    def _pump_down(self, link: Link) -> None:
        agent = link.agent
        if not link.down:
            return
        if agent is None:  # An observer was answered when it asked.
            link.down.popleft()
            return
        if agent.hung_until > self.now and not self.is_calm:
            self.after(agent.hung_until - self.now, self._pump_down, link)
            return
        item = link.down.popleft()
        if not link.is_open:
            return
        if isinstance(item, bytes):
            agent.received(link, decoder_from_hub()(item))
        else:
            agent.closed(link, item)
            self.cut(link)

    def carry_out(self, link: Link, action: Any, at: float) -> None:
        """Do what the hub decided at `at`."""
        if isinstance(action, Close):
            self._hash("close", link, b"%d" % action.code)
            self.seen[f"closed with {action.code}"] += 1
            self.push_down(link, action.code)
            return
        raw = encode(action)
        self._hash("down", link, raw)
        self.seen[action.code if isinstance(action, Error) else type(action).__name__] += 1
        if isinstance(action, TaskOutcome):
            self.seen[f"{action.state} {action.error.code if action.error else ''}".rstrip()] += 1
        elif isinstance(action, Delegated):
            self.seen[f"attempt {action.attempt}"] += 1
            self.seen["child"] += action.parent_id is not None
        elif isinstance(action, Registered):
            self.seen["tasks taken up again"] += bool(action.tasks)
        self.ledger.said(link, action, at)
        self.push_down(link, raw)

    def _hash(self, direction: str, link: Link, raw: bytes) -> None:
        self.traffic.update(b"%s %d %f " % (direction.encode(), link.number, self.now) + raw)
        if self._verbose:
            name = link.agent.name if link.agent else "observer"
            self.note(f"{direction:5} {link.number:4} {name}: {raw.decode(errors='replace')}")

    # The hub's lives.

    def _start(self, image: bytes | None) -> None:
        if self.may_fail(self.plan.jump):
            self._jump()
        self.ledger.restarted(self.now, self.skew_s)
        self.life = Life(self, image)
        self.note("the hub starts")
        if image is None:
            self._synced = self.life.journal.image()

    def wrote(self, changes: Changes, skew_s: float) -> None:
        """Take note of a commit."""
        written = [*changes.inserted.values(), *changes.updated.values()]
        if self._verbose:
            rows = [(row.request.task_id, row.state.value, row.attempt) for row in written]
            self.note(f"write {rows} deleted={list(changes.deleted)} agents={list(changes.agents)}")
        moved = self.ledger.wrote(changes, skew_s)
        if self.plan.sync == "full":
            return
        tasks, agents = self._unsynced
        tasks.update(dict.fromkeys(moved))
        for row in changes.inserted.values():
            self._task_ids[row.arrival] = row.request.task_id
        tasks.update((row.request.task_id, None) for row in written)
        tasks.update((self._task_ids[arrival], None) for arrival in changes.deleted)
        agents.update(dict.fromkeys(changes.agents))
        if self.random.random() < self.plan.checkpoint:
            assert self.life is not None
            self._synced = self.life.journal.image()
            self._unsynced = {}, {}

    def kill(self, where: str = "between two events") -> None:
        """End the hub's process, or all the machine, here and now."""
        life, self.life = self.life, None
        assert life is not None
        self.kills += 1
        image: bytes | None = life.journal.image()
        is_power_loss = self.random.random() < self.plan.power_loss
        self.note(f"the hub is killed {where}" + (", with the machine" if is_power_loss else ""))
        self.seen[f"power lost, sync {self.plan.sync}" if is_power_loss else f"killed {where}"] += 1
        self.seen["killed during a write"] += not life.is_idle
        self.ledger.died()
        if is_power_loss and not life.journal.syncs_each_write:
            image = self._synced
            if self.plan.sync == "normal":
                self.ledger.taint(*self._unsynced)
        self._unsynced = {}, {}
        self._synced = image
        life.journal.close()
        life.is_dead = True
        for link in self.links:
            if link.life is life:
                self._strand(link)
        outage_s = self.random.uniform(0.01, self.plan.outage_s)
        self.after(outage_s, self._start, image)

    def _strand(self, link: Link) -> None:
        """End a connection whose hub is dead: what the kernel had may still arrive, in part."""
        link.is_attended = False
        link.up.clear()
        while link.down and self.random.random() < 0.3:
            link.down.pop()
        self.push_down(link, 1006)
        link.is_broken = True

    # The course of a run.

    def run(self) -> None:
        """Live through it all, and see that every promise was kept."""
        self._start(None)
        for agent in self.agents:
            self.after(self.random.uniform(0.0, 0.2), agent.connect)
            self.after(self.random.uniform(0.1, 0.5), agent.act)
        self.after(0.5, self._audit)
        while self.events < EVENTS:
            self.step()
            if self.life is not None and self.may_fail(self.plan.kill):
                self.kill()
        self._come_to_rest()
        self._check_ends()
        self._check_memory()

    def _audit(self) -> None:
        if self.life is not None:
            self.life.audit()
        if not self.is_calm:
            self.after(self.random.uniform(0.2, 1.0), self._audit)

    def _come_to_rest(self) -> None:
        """Let everybody come back, and everything end."""
        self.note("from here on nothing fails")
        self.is_calm = True
        for agent in self.agents:
            agent.hung_until = 0.0
        for link in self.links:
            if link.is_open and link.is_broken and link.agent is not None:
                link.agent.closed(link, 1006)
        settings = self.plan.settings
        patience_s = max(TTLS_S) + settings.grace_s + settings.silence_s + 20.0
        self._run_until(self._is_at_rest, patience_s, "it does not come to rest")
        self._audit()

    def _is_at_rest(self) -> bool:
        life = self.life
        if life is None or not life.is_idle or life.hub._open or any(link.up for link in self.links):
            return False
        return all(
            agent.is_registered and not agent.open and not agent.results and agent.link and not agent.link.down
            for agent in self.agents
        )

    def _run_until(self, condition: Callable[[], bool], patience_s: float, text: str) -> None:
        until = self.now + patience_s
        for _ in range(TRIES_TO_REST):
            if condition():
                return
            if self._queue[0][0] > until:
                break
            self.step()
        hub = self.life.hub if self.life else None
        waiting = {agent.name: [*agent.open, *agent.results] for agent in self.agents if not self._is_done(agent)}
        self.fail(f"{text}: the hub has {list(hub._open) if hub else None}, agents wait for {waiting}")

    def _is_done(self, agent: ModelAgent) -> bool:
        return agent.is_registered and not agent.open and not agent.results

    def _check_ends(self) -> None:
        """See that every acknowledged task has one end, and that its requester was told and hears it again."""
        here = {agent.identity[0]: agent for agent in self.agents if agent.identity is not None}
        for task_id, book in self.ledger.books.items():
            if not book.is_acknowledged or book.is_tainted:
                continue
            asker = here.get(book.requester)
            if asker is not None:
                if book.is_reachable and not book.is_sent:
                    self.fail(f"the end of {task_id} was never sent to its requester, which is there")
                asker.ask(Status(task_id=task_id))
            elif here:
                next(iter(here.values())).ask(Status(task_id=task_id))
        self._run_until(self._is_quiet, 10.0, "not all are answered")
        for task_id, book in self.ledger.books.items():
            if not book.is_acknowledged or book.is_tainted:
                continue
            if book.final is None:
                self.fail(f"{task_id} has no end")
            if book.is_reachable and book.requester in here and book.outcome is None:
                self.fail(f"{task_id} is {book.final}, and its requester was not told how it ended")

    def _is_quiet(self) -> bool:
        return all(not link.up and not link.down for link in self.links) and bool(self.life and self.life.is_idle)

    def _check_memory(self) -> None:
        """See that nothing is left of ended tasks after their retention, and of agents that have left for good."""
        settings = self.plan.settings
        for agent in self.agents:
            agent.leave_for_good()
        if self.random.random() < 0.5:
            for _ in range(self.random.randint(0, 20)):
                self.step()
            if self.life is not None:
                self.plan.power_loss = 0.0
                self.kill()
        until = self.now + RETENTION_S + settings.grace_s + settings.silence_s + 2 * settings.reap_s
        self._run_until(lambda: self._queue[0][0] > until, 2 * RETENTION_S, "time does not pass")
        assert self.life is not None
        hub, journal = self.life.hub, self.life.journal
        kept = (hub._open, hub._ended, hub._undelivered, hub._agents, hub._gone, hub._queues, hub._pools, hub._peers)
        if any(kept) or len(hub._finder) or hub._records_bytes or hub._ended_bytes:
            self.fail(f"the hub still remembers {[list(one) for one in kept]}, {hub._records_bytes} bytes")
        rows = journal.rows("tasks"), journal.rows("agents")
        if rows != (0, 0):
            self.fail(f"the journal still has {rows[0]} tasks and {rows[1]} agents")


def simulate(seed: int, **options: Any) -> Simulation:
    """Run the history of a seed; raises Violation."""
    simulation = Simulation(seed, **options)
    try:
        simulation.run()
    except Violation:
        raise
    except Exception as error:
        raise Violation(
            f"seed {seed}, event {simulation.events}: {type(error).__name__}: {error}\n"
            f"replay it with: python -m tests.simulation --seed {seed} --verbose"
        ) from error
    finally:
        if simulation.life is not None:
            simulation.life.journal.close()
    return simulation


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError("must be a whole number, 0 or more")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for; return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="Try to break the hub.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seed", type=_natural, metavar="N", help="replay one history")
    what.add_argument("--seeds", type=_natural, metavar="COUNT", help="run the histories of this many seeds")
    parser.add_argument("--start", type=_natural, default=0, metavar="N", help="the first of --seeds (default 0)")
    parser.add_argument("--verbose", action="store_true", help="print what happens")
    args = parser.parse_args(argv)
    logging.getLogger("agenthub").setLevel(logging.CRITICAL)  # A hub that is lied to refuses much.
    seeds = range(args.start, args.start + args.seeds) if args.seed is None else [args.seed]
    started = time.monotonic()
    events = 0
    for count, seed in enumerate(seeds, 1):
        try:
            events += simulate(seed, verbose=args.verbose).events
        except Violation as violation:
            print(violation, file=sys.stderr)
            return 1
        if count % 100 == 0 or count == len(seeds):
            rate = events / (time.monotonic() - started)
            print(f"{count} seeds, {events} events, {rate:.0f} per second", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
