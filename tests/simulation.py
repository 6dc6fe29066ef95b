"""A seeded simulation that tries to make the hub lose, repeat or change what it has acknowledged.

One thread and virtual time. The real `Hub` and the real `Journal` run between model agents that speak through the
real codec; the server in between is modelled after GroupCommit: effects wait until the changes that they follow from
are written. Connections are cut, agents die, hang and lie, clocks jump, and the hub is killed between any two steps
and restarted from what the disk has kept. Everything that the hub decides and sends is entered in a `Ledger`, which
raises `Violation` at the first effect that breaks a promise.

Three seeds in ten run a hub without a journal. Its death forgets everything, and nothing else may: within one life it
keeps every promise. Its agents then behave like the SDK: they get a new identity, delegate a task again if that was
not acknowledged or has retries left, and give up the others (`hub_lost`).

    python -m tests.simulation --seed 7 --verbose      replays one history
    python -m tests.simulation --seeds 100000          runs many, and stops at the first that fails
    python -m tests.simulation --seeds 10000 --takeovers

With takeovers, the journal is one with a lease, as in PostgreSQL. At most kills the hub's process is not ended, but
stopped, or cut off from the engine, until another hub has taken over; then it goes on for a while and hears, decides
and speaks, if nothing keeps it from that: its writes are refused (the epoch), and it says nothing once its lease may
be over (silence). What it decides then does not count, but what it says is entered in the ledger as any hub's.

The disk: the journal is in memory, and its serialized image is what survives. The end of the process keeps what was
committed. A loss of power keeps what was synced: with sync "full" that is the last commit, so that everything is
promised; with sync "normal" it is the last checkpoint, and by contract the hub may forget what came after. Tasks and
agents with a row written after that checkpoint are then `tainted`: nothing is checked about them any more, but that
the hub forgets them in the end. All others keep every promise. Which of the two the disk does is read from the
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
    Effect,
    Error,
    ErrorInfo,
    Heartbeat,
    HeartbeatAck,
    Hub,
    HubSettings,
    Journal,
    Question,
    Register,
    Registered,
    Result,
    Status,
    StatusReply,
    Step,
    TaskOutcome,
    decoder_from_hub,
    encode,
)
from tests.harness import HubDriver, remembered
from tests.ledger import FINAL, TIMER_LATE_S, Connection, Ledger, Violation

EVENTS = 500  # Before a run comes to rest.
HEARTBEAT_S = 2.0
RETENTION_S = 5000.0  # Longer than a run and all the jumps of its clock forwards.
TTLS_S = (0.3, 1.0, 3.0, 6.0, 12.0)
CAPABILITIES = ("a", "b")
TRIES_TO_REST = 20_000  # Events; more without coming to rest is a violation.

LEASE_S = 1.0
TAKEOVER = 0.6  # How many of the kills are takeovers, where there are any.
FENCES = frozenset({"epoch", "silence"})

OPENED, ENDED = "opened", "ended"  # What a link carries next to messages: its beginning and its end.


# How likely each action of an agent is, relative to the others. Each run leaves some out.
FAULTS = {
    "repeat": 1.0,  # Sends a delegate again, acknowledged or not.
    "contradict": 0.3,  # Sends another delegate with a known task_id.
    "cancel": 0.8,
    "progress": 0.5,
    "question": 3.0,  # Asks the requester of a task that it works on, who may answer late, twice or not at all.
    "answer_wrongly": 0.5,  # Answers a question again, one that it was not asked, or one that nobody has asked.
    "forge": 1.0,  # Sends a result of another agent's task, or of any attempt.
    "answer_again": 0.8,  # Sends another result of a task that it has finished.
    "lie_lost": 0.8,  # Reports a task that it works on as lost.
    "garbage": 0.3,
    "ask": 0.5,
    "register_again": 0.5,  # Perhaps with another `max_tasks`.
    "replace": 0.3,  # Resumes its session on a second connection.
    "impersonate": 0.4,  # Tries to resume another agent's session with a wrong secret.
    "hang": 0.5,
    "cut": 1.2,
    "die": 0.6,
    "deregister": 0.25,
    "drain": 0.3,
}


class Plan:
    """The choices of a seed before the run begins."""

    def __init__(self, random: random.Random) -> None:
        self.is_journaled = random.random() < 0.7
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
        self.kill_soon = random.choice((0.0, 0.3, 0.6))  # Per start: the hub dies again before all agents are back.
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

    def _lock(self) -> None:
        if self._image is not None:
            # Copied, because a deserialized database would switch to WAL, and its image would lack the log.
            with contextlib.closing(sqlite3.connect(":memory:")) as source:
                source.deserialize(self._image)
                source.backup(self._connected())
            self._image = None
        super()._lock()

    def image(self) -> bytes:
        return self._connected().serialize()

    @property
    def syncs_each_write(self) -> bool:
        """Whether SQLite itself reports FULL, which is 2 (https://sqlite.org/pragma.html#pragma_synchronous)."""
        return bool(self._connected().execute("PRAGMA synchronous").fetchone()[0] >= 2)

    def write_or_fail(self, changes: Changes, clock_offset: float, steps: int) -> None:
        """Write, but interrupt SQLite once, after `steps` steps of its machine, if that is before the commit.

        An interrupted COMMIT takes effect all the same, unlike after any error of a disk.
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


# The network.


class Link(Connection):
    """One connection, with the messages on their way in both directions."""

    def __init__(self, number: int, agent: ModelAgent | None, life: Life) -> None:
        super().__init__()
        self.number = number
        self.agent = agent  # None: an observer, or an impostor.
        self.life = life
        self.up: collections.deque[Any] = collections.deque()
        self.down: collections.deque[Any] = collections.deque()
        self.up_due = self.down_due = 0.0
        self.is_open = True  # The agent does not know that it has ended.
        self.is_lost = False  # The server cannot send on it any more.
        self.is_broken = False  # Nothing gets through any more.


# The server.


class Life(HubDriver):
    """One life of the hub, from a start to its death, with the server that carries out its effects.

    What GroupCommit does with a thread and a loop is three events here: changes are taken, are committed, and the
    effects that waited for that are carried out. Between any two the hub may be killed.
    """

    def __init__(self, simulation: Simulation, image: bytes | None) -> None:
        self.simulation = simulation
        self.started = simulation.now
        self._clock_start = simulation.random.uniform(0.0, 100_000.0)
        plan = simulation.plan
        self.journal: DiskJournal | None = None
        restored = Step([])
        self.hub = simulation.hub_class(
            plan.settings, entropy=simulation.random.randbytes, now=self.clock(), is_journaled=plan.is_journaled
        )
        if plan.is_journaled:
            self.journal = simulation.journal_class(image, sync=plan.sync)
            self.journal.open()
            agents, tasks, last = self.journal.load(self._offset())
            restored = self.hub.restore(agents, tasks, last - plan.settings.grace_s)
        self.ledger = simulation.ledger
        self.is_dead = False
        self._changes: Changes | None = None
        self.held: list[tuple[Effect, float]] = []
        self._is_busy = False
        self._armed_for: float | None = None
        self.is_cut_off = False  # It cannot reach the engine, or it is stopped; ...
        self.stopped_until = 0.0
        self.is_replaced = False  # ... so that another hub took over.
        self.renewed_at = simulation.now  # The start of the last write that succeeded.
        self.apply(restored)

    def clock(self) -> float:
        """Return the monotonic clock of this life, which starts anywhere."""
        return self._clock_start + self.simulation.now - self.started

    def _offset(self) -> float:
        return self.simulation.wall() - self.clock()

    # The driver's part.

    def ledger_time(self) -> float:
        return self.simulation.now

    def connection_of(self, handle: Any) -> Connection | None:
        return handle if isinstance(handle, Link) else None

    def disconnected(self, handle: Any) -> None:
        handle.is_lost = True
        super().disconnected(handle)

    def send(self, handle: Any, message: Any, raw: bytes) -> None:
        self.simulation.send_down(handle, message, raw)

    def close(self, handle: Any, effect: Close) -> None:
        handle.is_lost = True
        self.simulation.close(handle, effect.code)

    def take(self, step: Step, sender: Any = None, message: Any = None) -> None:
        if self.is_replaced:
            self.apply(step)
        else:
            super().take(step, sender, message)

    def _lose(self, handle: Any) -> None:
        if not self.is_replaced:
            super()._lose(handle)

    # The lease.

    @property
    def is_silent(self) -> bool:
        has_ended = self.is_cut_off and self.simulation.now > self.renewed_at + 0.9 * LEASE_S
        return has_ended and "silence" in self.simulation.fences

    def is_stopped(self, function: Callable[..., None], *args: Any) -> bool:
        """Return whether the process is stopped; then `function` is called when it goes on."""
        delay_s = self.stopped_until - self.simulation.now
        if delay_s > 0:
            self.simulation.after(delay_s, function, *args)
        return delay_s > 0

    # Effects.

    def apply(self, step: Step) -> None:
        effects, changes = step
        at, is_silent = self.simulation.now, self.is_silent
        if self._changes is None:
            self._changes = changes
        elif changes is not None:
            self._changes.merge(changes)
        if not self._is_busy and self._changes is None and not is_silent:
            self._carry_out_all([(effect, at) for effect in effects])
        else:
            self._carry_out_all([(effect, at) for effect in effects if may_overtake(effect[1], is_silent)])
            self.held += [(effect, at) for effect in effects if not may_overtake(effect[1], is_silent)]
            if not self._is_busy and not self.is_dead:
                self._is_busy = True
                self.simulation.after(self.simulation.latency_s() / 4, self._write)
        self._arm()

    def _write(self) -> None:
        if self.is_dead or self.is_stopped(self._write):
            return
        held, self.held = self.held, []
        changes, self._changes = self._changes, None
        self._try(changes or Changes(), held)

    def _try(self, changes: Changes, held: list[tuple[Effect, float]]) -> None:
        if self.is_dead or self.is_stopped(self._try, changes, held):
            return
        random, plan = self.simulation.random, self.simulation.plan
        duration_s = random.uniform(0.0, 0.5) if random.random() < plan.slow_disk else random.uniform(0.0, 0.005)
        skew_s = self.simulation.skew_s
        started = self.simulation.now
        self.simulation.after(duration_s, self.commit, changes, held, self._offset(), skew_s, started)

    def commit(
        self, changes: Changes, held: list[tuple[Effect, float]], offset: float, skew_s: float, started: float
    ) -> None:
        if self.is_dead or self.journal is None:
            return
        simulation = self.simulation
        if self.is_replaced:
            self._commit_late(changes, held, offset)
            return
        if self.is_cut_off and not self.stopped_until:
            simulation.after(0.1, self._try, changes, held)
            return
        if not simulation.is_calm and simulation.random.random() < simulation.plan.failed_write:
            try:
                self.journal.write_or_fail(changes, offset, simulation.random.randint(1, 400))
            except sqlite3.Error:
                simulation.note("the write failed")
                simulation.seen["failed write"] += 1
                simulation.after(0.0 if not self.hub.is_full else 1.0, self._try, changes, held)
                if not self.hub.is_full:
                    self.hub.is_full = True
                    simulation.after(5.0, self._on_space_freed)
                return
        else:
            self.journal.write(changes, offset)
        self.renewed_at = started
        simulation.wrote(changes, skew_s)
        simulation.after(simulation.random.uniform(0.0, 0.005), self._on_written, held)

    def _commit_late(self, changes: Changes, held: list[tuple[Effect, float]], offset: float) -> None:
        """Write although another hub has taken over: the engine refuses that, and then this hub ends."""
        assert self.journal is not None
        self.simulation.seen["fenced"] += 1
        if "epoch" in self.simulation.fences:
            self.simulation.end(self)
            return
        self.journal.write(changes, offset)  # To an image that nobody will read.
        self.renewed_at = self.simulation.now
        self.simulation.after(0.0, self._on_written, held)

    def _on_space_freed(self) -> None:
        self.hub.is_full = False

    def _on_written(self, held: list[tuple[Effect, float]]) -> None:
        if self.is_dead or self.is_stopped(self._on_written, held):
            return
        if self.is_silent:
            self._try(Changes(), held)
            return
        self._carry_out_all(held)
        if self.held or self._changes is not None:
            self._write()
        else:
            self._is_busy = False

    def _carry_out_all(self, effects: list[tuple[Effect, float]]) -> None:
        """Carry out effects; the hub redelivers an outcome whose connection was lost while it was held back."""
        simulation = self.simulation
        undelivered: list[str] = []
        for (link, action), at in effects:
            if self.is_dead:
                return
            if not self.is_replaced and simulation.may_fail(simulation.plan.kill_between_effects):
                simulation.kill("between two effects")
                return
            if isinstance(action, TaskOutcome) and link.is_lost:
                undelivered.append(action.task_id)
            else:
                self.carry_out(link, action, at)
        for task_id in undelivered:
            if not self.is_replaced:
                simulation.ledger.redelivered(task_id)
            simulation.seen["redelivered"] += 1
            self.take(self.hub.redeliver(task_id, self.clock()))

    @property
    def is_idle(self) -> bool:
        return not self._is_busy and self._changes is None

    @property
    def open_tasks(self) -> int:
        tasks = self.hub.summary()["tasks"]
        return int(tasks["pending"] + tasks["in_progress"])

    # Time.

    def _arm(self) -> None:
        deadline = self.hub.next_deadline()
        if self.is_dead or (self._armed_for is not None and self._armed_for <= deadline):
            return
        self._armed_for = deadline
        delay_s = max(0.0, deadline - self.clock())
        self.simulation.after(delay_s + self.simulation.random.uniform(0.0, TIMER_LATE_S), self._on_timer, deadline)

    def _on_timer(self, deadline: float) -> None:
        if self.is_dead or self._armed_for != deadline or self.is_stopped(self._on_timer, deadline):
            return
        self._armed_for = None
        self.tick(max(self.clock(), deadline))

    def audit(self) -> None:
        """Check all that the hub lists at this moment."""
        tasks = self.observe(Status(id="audit", tasks=True))
        agents = self.observe(Discover(id="audit", limit=1000))
        is_idle = self.hub.next_deadline() > self.clock()  # Nothing is left to be done.
        self.simulation.ledger.audit(tasks, agents, self.simulation.now, self.started, is_idle=is_idle)
        if is_idle:
            self.simulation.ledger.audit_talks(tasks)


def may_overtake(action: Any, is_silent: bool) -> bool:
    """Return whether an effect need not wait for the journal, as GroupCommit does."""
    is_overloaded = isinstance(action, Error) and action.code == Code.OVERLOADED
    return isinstance(action, HeartbeatAck) or (is_overloaded and not is_silent)


# The agents.


class ModelAgent:
    """An agent that requests, works, or both. It keeps its state as the SDK does; `act` does the rest."""

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
        self.memory = 0  # How often it lost its memory: timers of an earlier one have no effect.
        self.running: dict[str, int] = {}  # The attempt, by task_id.
        self.results: dict[str, Result] = {}  # Of tasks done here, until the hub has them.
        self.answered: list[Result] = []
        self.open: dict[str, bool] = {}  # Whether it was acknowledged, by task_id.
        self.mine: dict[str, None] = {}  # All tasks that it delegated under this identity.
        self.asking: dict[str, Status] = {}  # Its questions, until they are answered, by task_id.
        self.replies: dict[str, Status] = {}  # Its answers, until the hub has them, by task_id.

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
        """Send heartbeats on a link; drop one on which the hub has been silent for too long."""
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
        """Reconnect after a link has ended."""
        link.is_open = False
        if self.link is not link:
            return
        self.link, self.is_registered = None, False
        if self.is_leaving and (code == CloseCode.DONE or self.simulation.random.random() < 0.5):
            self.forget()
        self.is_leaving = False
        longest_s = 3.0 if self.simulation.may_fail(0.4) else 0.5
        self.simulation.after(self.simulation.random.uniform(0.0, longest_s), self.connect)

    def forget(self, *, identity: bool = True) -> None:
        """Lose the memory, with or without the identity."""
        self.memory += 1
        self.running.clear()
        self.results.clear()
        self.answered.clear()
        self.open.clear()
        self.asking.clear()
        self.replies.clear()
        for task_id in self.mine:
            self.simulation.ledger.entries[task_id].is_reachable = False
        if identity:
            self.identity = None
            self.mine.clear()

    # What it sends.

    def ask(self, message: AgentMessage, *, again: bool = False) -> None:
        """Send a request, with a new id or `again` with the one that it had."""
        simulation = self.simulation
        if self.link is None:
            return
        if not again:
            message.id = f"m{next(simulation.serial)}"
        simulation.ledger.requested(self.link, message)
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
            task_id=f"t{len(ledger.entries) + 1}",
            agent_id=named[0] if named else None,
            capability=random.choice(CAPABILITIES) if named is None or target < 0.15 else None,
            input={"n": len(ledger.entries)},
            ttl=random.choice(TTLS_S),
            priority=random.choice((0, 0, 5)),
            max_retries=random.choice((0, 1, 2, 3, 3)),
            parent_id=parent_id,
            wait=random.random() < 0.7,
            answers=random.random() < 0.7,
        )
        self.open[request.task_id] = False
        self.mine[request.task_id] = None
        self.ask(request)

    def _send_again(self, task_id: str) -> None:
        """Send the delegate of a task again; to a hub that has forgotten the task, as a new one."""
        if task_id in self.mine:
            ledger = self.simulation.ledger
            entry = ledger.entries[task_id]
            if entry.is_forgotten:
                ledger.renew(task_id, entry.requester, entry.request)
            self.ask(dataclasses.replace(entry.request))

    def _resubmit(self, task_id: str) -> None:
        """Delegate an acknowledged task again that the hub has forgotten, if it has retries left; or give it up."""
        simulation = self.simulation
        entry = simulation.ledger.entries[task_id]
        ttl = (entry.due or 0.0) - simulation.now
        if not entry.is_forgotten or entry.request.max_retries == 0 or entry.request.parent_id is not None or ttl <= 0:
            simulation.seen["hub_lost"] += 1
            del self.open[task_id]
            self.mine.pop(task_id, None)
            return
        simulation.seen["resubmitted"] += 1
        request = dataclasses.replace(entry.request, ttl=ttl, max_retries=entry.request.max_retries - 1)
        simulation.ledger.renew(task_id, entry.requester, request)
        self.open[task_id] = False
        self._send_again(task_id)

    def _do_repeat(self) -> None:
        # Not one that was refused or forgotten: that would be a new one.
        entries = self.simulation.ledger.entries
        known = [one for one in self.mine if not entries[one].is_forgotten]
        task_ids = [one for one in known if one in self.open or entries[one].is_acknowledged]
        if task_ids:
            self._send_again(self.simulation.random.choice(task_ids))

    def _do_contradict(self) -> None:
        known = self.simulation.ledger.entries.values()
        entries = [entry for entry in known if entry.is_acknowledged and not entry.is_unpromised]
        if entries:
            request = self.simulation.random.choice(entries).request
            message = dataclasses.replace(request, input="another", id=f"x{next(self.simulation.serial)}")
            assert self.link is not None
            self.simulation.send(self.link, encode(message))

    def _do_cancel(self) -> None:
        if self.open:
            self.ask(Result(task_id=self.simulation.random.choice([*self.open]), success=False, error="not needed"))

    def _do_progress(self) -> None:
        if self.running:
            self.ask(Status(task_id=self.simulation.random.choice([*self.running]), progress=0.5, detail="half"))

    def _do_question(self) -> None:
        random = self.simulation.random
        free = [task_id for task_id in self.running if task_id not in self.asking or random.random() < 0.1]
        if free:
            self._ask_requester(random.choice(free))

    def _ask_requester(self, task_id: str) -> None:
        message = Status(task_id=task_id, question=Question(f"{self.name} asks {next(self.simulation.serial)}"))
        self.asking[task_id] = message
        self.ask(message)

    def _do_answer_wrongly(self) -> None:
        random, entries = self.simulation.random, self.simulation.ledger.entries
        asked = [task_id for task_id, entry in entries.items() if entry.numbers and entry.final is None]
        if asked:
            task_id = random.choice(asked)
            self._reply(task_id, random.randint(1, max(entries[task_id].numbers) + 1))

    def _reply(self, task_id: str, ask: int) -> Status:
        value = f"{self.name} answers {next(self.simulation.serial)}"
        message = Status(task_id=task_id, ask=ask, answer=value)
        self.ask(message)
        return message

    def _on_question(self, memory: int, task_id: str, ask: int) -> None:
        if memory == self.memory and self.is_registered and task_id in self.open:
            self.replies[task_id] = self._reply(task_id, ask)

    def _do_forge(self) -> None:
        random, entries = self.simulation.random, self.simulation.ledger.entries
        others = [task_id for task_id, one in entries.items() if self.identity and one.requester != self.identity[0]]
        retried = [task_id for task_id in others if entries[task_id].attempt > 1 and entries[task_id].final is None]
        if retried and random.random() < 0.5:
            task_id = random.choice(retried)
            self._answer(task_id, random.randint(1, entries[task_id].attempt), is_kept=False)
        elif others:
            self._answer(random.choice(others[-8:]), random.choice((None, 1, 1, 2, 3)), is_kept=False)

    def _do_answer_again(self) -> None:
        if self.answered:
            former = self.simulation.random.choice(self.answered)
            output = f"{former.output} again"
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
        entries = self.simulation.ledger.entries
        if entries:
            self.ask(Status(task_id=self.simulation.random.choice([*entries])))

    def _do_register_again(self) -> None:
        self.max_tasks = self.simulation.random.randint(1, 3)
        self.register()

    def _do_impersonate(self) -> None:
        """Try to resume the session of any agent with a wrong secret, on a connection of its own."""
        simulation = self.simulation
        if simulation.life is None:
            return
        identities = [agent.identity for agent in simulation.agents if agent.identity is not None]
        agent_id, secret = simulation.random.choice(identities)
        wrong = simulation.random.choice(("", "guessed", secret[:-1], secret.upper() + "0", agent_id))
        message = Register(name="impostor", agent_id=agent_id, resume=wrong, id=f"i{next(simulation.serial)}")
        link = simulation.link(None)
        simulation.ledger.requested(link, message)
        simulation.push_up(link, OPENED)
        simulation.push_up(link, encode(message))
        simulation.after(1.0, simulation.cut, link)

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
        """End with the process: the tasks in progress are lost, and perhaps the rest of its memory."""
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
        for task_id in self.mine:
            self.simulation.ledger.entries[task_id].is_reachable = False
        self.open.clear()
        self.ask(message)

    def leave_for_good(self) -> None:
        self.has_left = True
        self.forget(identity=False)
        if self.link is not None:
            self._leave(Deregister())

    # What it receives.

    def received(self, link: Link, message: Any) -> None:
        self.last_received = self.simulation.now
        if isinstance(message, Registered):
            self._on_registered(message)
        elif isinstance(message, Delegated):
            self._on_delegated(message)
        elif isinstance(message, TaskOutcome):
            self.open.pop(message.task_id, None)
        elif isinstance(message, StatusReply):
            self._on_status(message)
        elif isinstance(message, Error):
            self._on_error(message)
        elif isinstance(message, Deregistered):
            self.forget()

    def _on_registered(self, reply: Registered) -> None:
        if self.identity is not None and self.identity[0] != reply.agent_id:
            self._on_new_identity(self.identity[0], reply.agent_id)
        self.identity = reply.agent_id, reply.resume
        if self.is_registered:  # It only changed its registration.
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
        for task_id, question in list(self.asking.items()):
            if task_id in self.running:
                self.ask(question, again=True)
            else:
                del self.asking[task_id]
        for reply in list(self.replies.values()):
            self.ask(reply)
        for task_id, is_acknowledged in list(self.open.items()):
            if is_acknowledged:
                self.ask(Status(task_id=task_id))
            else:
                self._send_again(task_id)

    def _on_new_identity(self, former_id: str, agent_id: str) -> None:
        """Keep what a hub that does not know this agent may still take."""
        simulation, entries = self.simulation, self.simulation.ledger.entries
        lost = [task_id for task_id, is_acknowledged in self.open.items() if is_acknowledged]
        if any(entries[task_id].is_reachable and not entries[task_id].is_unpromised for task_id in lost):
            simulation.fail(f"{former_id} waits for {lost}, and has become {agent_id}")
        forgotten = {task_id for task_id in lost if entries[task_id].is_reachable and entries[task_id].is_forgotten}
        for task_id in self.mine:
            entries[task_id].is_reachable = task_id in forgotten or self.open.get(task_id) is False
        self.mine = dict.fromkeys(task_id for task_id in self.mine if entries[task_id].is_reachable)
        self.open = {task_id: task_id in forgotten for task_id in self.mine}

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
        self.asking.pop(message.task_id, None)
        if self.simulation.plan.weights["question"] and random.random() < 0.5:
            self._ask_requester(message.task_id)
        duration_s = random.expovariate(1 / self.simulation.plan.work_s)
        self.simulation.after(min(duration_s, 10.0), self._finish, self.memory, message.task_id, message.attempt)

    def _finish(self, memory: int, task_id: str, attempt: int) -> None:
        simulation = self.simulation
        if memory != self.memory:
            return
        if self.hung_until > simulation.now:
            simulation.after(self.hung_until - simulation.now, self._finish, memory, task_id, attempt)
        elif task_id in self.asking and self.running.get(task_id) == attempt and simulation.may_fail(0.8):
            simulation.after(0.3, self._finish, memory, task_id, attempt)  # It waits for the answer.
        elif self.running.get(task_id) == attempt:
            del self.running[task_id]
            self._answer(task_id, attempt, is_kept=True)
        elif simulation.may_fail(0.3):  # It had to stop, or has a newer attempt, and sends a result all the same.
            self._answer(task_id, attempt, is_kept=False)

    def _answer(self, task_id: str, attempt: int | None, *, is_kept: bool) -> None:
        simulation = self.simulation
        text = f"{self.name} {task_id} {attempt} {next(simulation.serial)}"
        result = Result(task_id=task_id, success=simulation.random.random() < 0.8, attempt=attempt)
        if result.success:
            result.output = text
        else:
            result.error = text
        if is_kept:
            self.results[task_id] = result
            self.answered.append(result)
        if self.is_registered:
            self.ask(result)

    def _on_status(self, status: StatusReply) -> None:
        simulation, task_id = self.simulation, status.task_id or ""
        _, request = simulation.ledger.requests.get(status.reply_to or "", (None, None))
        if isinstance(request, Delegate):
            if task_id in self.open:
                self.open[task_id] = True
        elif isinstance(request, Status) and request.ask is not None:
            if self.replies.get(task_id) is request:
                del self.replies[task_id]
        elif isinstance(request, Status):
            if status.state in FINAL and status.requester == (self.identity or [None])[0]:
                self.open.pop(task_id, None)
        elif isinstance(request, Result):
            if self.results.get(task_id) is request:
                del self.results[task_id]
        elif status.question is not None:
            assert status.ask is not None
            delay_s = simulation.random.choice((0.01, 0.3, 2.0))
            simulation.seen["question"] += 1
            simulation.after(delay_s, self._on_question, self.memory, task_id, status.ask)
        elif status.ask is not None:
            simulation.seen["answer"] += 1
            self.asking.pop(task_id, None)
        elif status.seq is None and status.state in FINAL:
            self.running.pop(task_id, None)

    def _on_error(self, error: Error) -> None:
        simulation = self.simulation
        _, request = simulation.ledger.requests.get(error.reply_to or "", (None, None))
        task_id = error.task_id or ""
        if isinstance(request, Result) and self.results.get(task_id) is request:
            del self.results[task_id]
        elif isinstance(request, Status) and request.question is not None:
            if self.asking.get(task_id) is request:
                del self.asking[task_id]
        elif isinstance(request, Status) and request.ask is not None:
            if self.replies.get(task_id) is request:
                del self.replies[task_id]
        elif isinstance(request, Status) and error.code == Code.UNKNOWN_TASK:
            if self.open.get(task_id):
                self._resubmit(task_id)
        elif isinstance(request, Delegate) and task_id in simulation.ledger.entries and task_id in self.mine:
            if error.code == Code.OVERLOADED and not self.open.get(task_id, True):
                simulation.after(1.0, self._retry, self.memory, task_id)
            else:
                self.open.pop(task_id, None)
        elif isinstance(request, Register):
            simulation.fail(f"{self.name} was not registered: {error.code} {error.message}")

    def _retry(self, memory: int, task_id: str) -> None:
        is_forgotten = self.simulation.ledger.entries[task_id].is_forgotten  # Then it is sent after the reconnect.
        if memory == self.memory and self.is_registered and self.open.get(task_id) is False and not is_forgotten:
            self._send_again(task_id)


# The simulation.


class Simulation:
    """One history. `run` it once; raises Violation."""

    def __init__(
        self,
        seed: int,
        *,
        hub_class: type[Hub] = Hub,
        journal_class: type[DiskJournal] = DiskJournal,
        takeovers: bool = False,
        fences: frozenset[str] = FENCES,
        verbose: bool = False,
    ) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.plan = Plan(self.random)
        self.takeovers = takeovers
        self.fences = fences
        self.replaced: list[Life] = []  # That have not ended yet.
        if takeovers:
            self.plan.is_journaled = True
            self.plan.kill = max(self.plan.kill, 0.02)
        self.hub_class = hub_class
        self.journal_class = journal_class
        self.now = 0.0
        self.skew_s = 1.7e9  # How far the wall clock is ahead of virtual time.
        self.events = 0
        self.kills = 0
        self.seen: collections.Counter[str] = collections.Counter()  # How often each case came about.
        self.traffic = hashlib.blake2b(digest_size=16)
        self.is_calm = False
        self.ledger = Ledger(self.fail, grace_s=self.plan.settings.grace_s, skew_s=self.skew_s)
        self.serial = itertools.count(1)
        self.life: Life | None = None
        self.links: list[Link] = []
        self._verbose = verbose
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._synced: bytes | None = None
        self._unsynced: tuple[dict[str, None], dict[str, None]] = ({}, {})  # Tasks and agents written since.
        self._task_ids: dict[int, str] = {}  # By sequence.
        self._jumped_s = 0.0
        self._actions = [name for name, weight in self.plan.weights.items() if weight]
        self._cumulated = list(itertools.accumulate(self.plan.weights[name] for name in self._actions))
        self.agents = [self._agent(number) for number in range(self.plan.agents)]

    def _agent(self, number: int) -> ModelAgent:
        capabilities = [one for one in CAPABILITIES if self.random.random() < 0.6] if number else [*CAPABILITIES]
        return ModelAgent(self, f"agent{number}", capabilities, self.random.randint(1, 3))

    def fail(self, text: str) -> NoReturn:
        raise Violation(f"seed {self.seed}, event {self.events}: {text}\n{self.replay}")

    @property
    def replay(self) -> str:
        """The command that replays this history."""
        options = " --verbose --takeovers" if self.takeovers else " --verbose"
        return f"replay it with: python -m tests.simulation --seed {self.seed}{options}"

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
        """Set the wall clock; forwards by less in all than ended tasks are kept."""
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
        """Cut a connection. Some messages on their way to the hub still arrive; those from the hub are lost."""
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
        if not link.up or life.is_dead or life.is_stopped(self._pump_up, link):
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
        if agent is None:  # The ledger has seen it.
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

    def close(self, link: Link, code: int) -> None:
        self._hash("close", link, b"%d" % code)
        self.seen[f"closed with {code}"] += 1
        self.push_down(link, code)

    def send_down(self, link: Link, message: Any, raw: bytes) -> None:
        """Send from the hub to an agent."""
        self._hash("down", link, raw)
        self.seen[message.code if isinstance(message, Error) else type(message).__name__] += 1
        if isinstance(message, TaskOutcome):
            self.seen[f"{message.state} {message.error.code if message.error else ''}".rstrip()] += 1
        elif isinstance(message, Delegated):
            self.seen[f"attempt {message.attempt}"] += 1
            self.seen["child"] += message.parent_id is not None
        elif isinstance(message, Registered):
            self.seen["session resumed with tasks"] += bool(message.tasks)
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
        if self.may_fail(self.plan.kill_soon):
            self.after(self.random.uniform(0.0, 1.0), self._kill_life, self.life)
        self.note("the hub starts" if self.plan.is_journaled else "the hub starts, without a journal")
        if image is None and self.life.journal is not None:
            self._synced = self.life.journal.image()

    def wrote(self, changes: Changes, skew_s: float) -> None:
        """Enter a commit."""
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
            self._task_ids[row.sequence] = row.request.task_id
        tasks.update((row.request.task_id, None) for row in written)
        tasks.update((self._task_ids[sequence], None) for sequence in changes.deleted)
        agents.update(dict.fromkeys(changes.agents))
        if self.random.random() < self.plan.checkpoint:
            assert self.life is not None
            assert self.life.journal is not None
            self._synced = self.life.journal.image()
            self._unsynced = {}, {}

    def kill(self, where: str = "between two events") -> None:
        """End the hub's process, or the whole machine, here and now."""
        life = self.life
        assert life is not None
        is_process_alone = where == "between two events" and not life.is_cut_off
        if self.takeovers and is_process_alone and self.may_fail(TAKEOVER):
            self._cut_off(life)
            return
        self.life = None
        self.kills += 1
        is_power_loss = self.random.random() < self.plan.power_loss
        self.note(f"the hub is killed {where}" + (", with the machine" if is_power_loss else ""))
        self.ledger.died(self.now, is_journaled=life.journal is not None)
        image = None
        if life.journal is None:
            self.seen["killed without a journal"] += 1
        else:
            self.seen[f"power lost, sync {self.plan.sync}" if is_power_loss else f"killed {where}"] += 1
            self.seen["killed during a write"] += not life.is_idle
            image = self._surviving_image(life.journal, is_power_loss)
        self.end(life)
        outage_s = self.random.uniform(0.01, self.plan.outage_s)
        self.after(outage_s, self._start, image)

    def end(self, life: Life) -> None:
        """End the process of a hub, and with it its connections."""
        if life.is_dead:
            return
        life.is_dead = True
        if life.journal is not None:
            life.journal.close()
        for link in self.links:
            if link.life is life:
                self._strand(link)

    def _cut_off(self, life: Life) -> None:
        """Stop a hub, or cut it off from the engine, until another hub has taken over."""
        life.is_cut_off = True
        is_stopped = self.random.random() < 0.5
        # A hub that has nothing to write renews its lease every fifth of it.
        life.renewed_at = max(life.renewed_at, self.now - self.random.uniform(0.0, LEASE_S / 5))
        delay_s = max(0.0, life.renewed_at + LEASE_S - self.now) + self.random.uniform(0.0, 0.3)
        if is_stopped:
            life.stopped_until = self.now + delay_s + self.random.uniform(0.0, 1.0)
        self.note("the hub is stopped" if is_stopped else "the hub is cut off from the engine")
        self.after(delay_s, self._take_over, life)

    def _take_over(self, life: Life) -> None:
        """Start another hub while the former one, whose lease has ended, goes on."""
        if self.life is not life or life.journal is None:
            return  # It was killed meanwhile.
        if self.now < life.renewed_at + LEASE_S:  # A write that was on its way has renewed it.
            self.after(life.renewed_at + LEASE_S - self.now, self._take_over, life)
            return
        self.kills += 1
        self.seen["taken over from a stopped hub" if life.stopped_until else "taken over from a hub cut off"] += 1
        self.ledger.died(self.now, is_journaled=True)
        life.is_replaced = True
        self.replaced.append(life)
        self.after(max(0.0, life.stopped_until - self.now) + self.random.uniform(0.0, 1.5), self.end, life)
        self._start(life.journal.image())

    def _kill_life(self, life: Life) -> None:
        if self.life is life and not self.is_calm:
            self.kill("soon after its start")

    def _surviving_image(self, journal: DiskJournal, is_power_loss: bool) -> bytes | None:
        """Return the image that the disk keeps; taint the tasks and agents that a loss of power may have undone."""
        image: bytes | None = journal.image()
        if is_power_loss and not journal.syncs_each_write:
            image = self._synced
            if self.plan.sync == "normal":
                self.ledger.taint(*self._unsynced)
        self._unsynced = {}, {}
        self._synced = image
        return image

    def _strand(self, link: Link) -> None:
        """End a connection whose hub is dead: some of the messages in the kernel still arrive."""
        link.is_attended = False
        link.up.clear()
        while link.down and self.random.random() < 0.3:
            link.down.pop()
        self.push_down(link, 1006)
        link.is_broken = True

    # The course of a run.

    def run(self) -> None:
        """Run the whole history, and require that every promise was kept."""
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
        self._check_outcomes()
        self._check_memory()

    def _audit(self) -> None:
        if self.life is not None and not self.life.is_cut_off:
            self.life.audit()
        if not self.is_calm:
            self.after(self.random.uniform(0.2, 1.0), self._audit)

    def _come_to_rest(self) -> None:
        """Let all agents reconnect, and all tasks end."""
        if self.life is not None and self.life.is_cut_off:
            self.kill("while it was cut off")
        for life in self.replaced:
            self.end(life)
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
        if life is None or not life.is_idle or life.open_tasks or any(link.up for link in self.links):
            return False
        if life.hub.next_deadline() <= life.clock():
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
        waiting = {agent.name: [*agent.open, *agent.results] for agent in self.agents if not self._is_done(agent)}
        open_tasks = self.life.open_tasks if self.life else None
        self.fail(f"{text}: the hub has {open_tasks} open tasks, agents wait for {waiting}")

    def _is_done(self, agent: ModelAgent) -> bool:
        return agent.is_registered and not agent.open and not agent.results

    def _check_outcomes(self) -> None:
        """Require that every acknowledged task has one outcome, which its requester was sent and can still fetch."""
        online = {agent.identity[0]: agent for agent in self.agents if agent.identity is not None}
        promised = [one for one in self.ledger.entries.values() if one.is_acknowledged and not one.is_unpromised]
        for entry in promised:
            task_id = entry.request.task_id
            if entry.requester in online:
                if entry.is_reachable and not entry.is_sent:
                    self.fail(f"the outcome of {task_id} was never sent to its requester, which is online")
                online[entry.requester].ask(Status(task_id=task_id))
            elif online:
                next(iter(online.values())).ask(Status(task_id=task_id))
        self._run_until(self._is_quiet, 10.0, "not all requests were answered")
        for entry in promised:
            task_id = entry.request.task_id
            if entry.final is None:
                self.fail(f"{task_id} has no outcome")
            if entry.is_reachable and entry.requester in online and entry.outcome is None:
                self.fail(f"{task_id} is {entry.final}, and its requester did not get its outcome")

    def _is_quiet(self) -> bool:
        return all(not link.up and not link.down for link in self.links) and bool(self.life and self.life.is_idle)

    def _check_memory(self) -> None:
        """Require that the hub forgets ended tasks after their retention, and agents that have left for good."""
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
        if left := remembered(hub):
            self.fail(f"the hub still remembers {left}")
        rows = (0, 0) if journal is None else (journal.rows("tasks"), journal.rows("agents"))
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
            f"seed {seed}, event {simulation.events}: {type(error).__name__}: {error}\n{simulation.replay}"
        ) from error
    finally:
        for life in (simulation.life, *simulation.replaced):
            if life is not None and life.journal is not None:
                life.journal.close()
    return simulation


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError("must be a whole number, 0 or more")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="Try to break the hub.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seed", type=_natural, metavar="N", help="replay one history")
    what.add_argument("--seeds", type=_natural, metavar="COUNT", help="run the histories of this many seeds")
    parser.add_argument("--start", type=_natural, default=0, metavar="N", help="the first of --seeds (default 0)")
    parser.add_argument("--takeovers", action="store_true", help="let another hub take over while the former goes on")
    parser.add_argument("--verbose", action="store_true", help="print what happens")
    args = parser.parse_args(argv)
    logging.getLogger("agenthub").setLevel(logging.CRITICAL)  # A hub among faulty agents refuses much.
    seeds = range(args.start, args.start + args.seeds) if args.seed is None else [args.seed]
    started = time.monotonic()
    events = 0
    for count, seed in enumerate(seeds, 1):
        try:
            events += simulate(seed, takeovers=args.takeovers, verbose=args.verbose).events
        except Violation as violation:
            print(violation, file=sys.stderr)
            return 1
        if count % 100 == 0 or count == len(seeds):
            rate = events / (time.monotonic() - started)
            print(f"{count} seeds, {events} events, {rate:.0f} per second", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
