"""Many simulated histories of hubs that die, and proof that the simulation sees a hub that breaks its promises."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import sqlite3
import subprocess
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import agenthub
from agenthub import (
    AgentRecord,
    AgentRow,
    Changes,
    Connection,
    Deregister,
    Hub,
    HubSettings,
    PendingQueue,
    PendingTasks,
    Register,
    Result,
    Status,
    Step,
    TaskOutcome,
    TaskRecord,
    TaskRow,
    TaskState,
    TaskTable,
    hash_of,
)
from tests.ledger import Violation
from tests.simulation import EVENTS, FENCES, DiskJournal, Simulation, main, simulate

SEEDS = int(os.environ.get("SIMULATION_SEEDS", "2000"))
SEEDS_PER_TEST = 100
SHORT_SEEDS = 200  # The others are long; these and the next ones are in each run.
SEEDS_TO_COUNT = range(10_000, 10_300)  # The events in these are counted.
SEEDS_TO_CATCH_FENCE = 1000
SEEDS_TO_CATCH = 300  # Within so many each sabotage must be caught.


@pytest.fixture(autouse=True)
def refusals_are_not_logged() -> Iterator[None]:
    """A hub among faulty agents refuses much."""
    log = logging.getLogger("agenthub")
    level = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(level)


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(first, marks=[pytest.mark.long] if first >= SHORT_SEEDS else [])
        for first in range(0, SEEDS, SEEDS_PER_TEST)
    ],
)
def test_hub_keeps_its_promises_in_every_history(first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        assert simulate(seed).events >= EVENTS >= 200


@pytest.mark.parametrize(
    "first",
    [pytest.param(first, marks=[pytest.mark.long] if first else []) for first in range(0, SEEDS, SEEDS_PER_TEST)],
)
def test_promises_are_kept_while_another_hub_takes_over_from_one_that_goes_on(first: int) -> None:
    takeovers = 0
    for seed in range(first, first + SEEDS_PER_TEST):
        seen = simulate(seed, takeovers=True).seen
        takeovers += seen["taken over from a stopped hub"] + seen["taken over from a hub cut off"]
    assert takeovers > SEEDS_PER_TEST / 2


@pytest.mark.parametrize("missing", ["epoch", pytest.param("silence", marks=pytest.mark.long)])
def test_takeover_without_each_of_its_fences_breaks_promises(missing: str) -> None:
    for seed in range(SEEDS_TO_CATCH_FENCE):
        try:
            simulate(seed, takeovers=True, fences=FENCES - {missing})
        except Violation as violation:
            if f"python -m tests.simulation --seed {seed} --verbose --takeovers" in str(violation):
                return
    pytest.fail(f"a takeover without {missing} kept all promises in {SEEDS_TO_CATCH_FENCE} seeds")


def test_hub_keeps_its_promises_when_its_batches_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "TICK_BATCH", 3)
    for seed in range(SEEDS_PER_TEST):
        simulate(seed)


@pytest.mark.long
def test_simulation_reaches_every_case() -> None:
    seen: collections.Counter[str] = collections.Counter()
    for seed in SEEDS_TO_COUNT:
        seen += simulate(seed).seen
    expected = [
        *("completed", "failed failed", "failed cancelled", "failed agent_lost", "timeout timeout"),
        *("attempt 1", "attempt 2", "attempt 3", "attempt 4", "child", "session resumed with tasks"),
        *("invalid_message", "unknown_agent", "no_agent", "duplicate_task", "not_assigned", "stale_attempt"),
        *("task_over", "overloaded", "closed with 1000", "closed with 4000", "closed with 4001"),
        *("killed between two events", "killed between two effects", "killed during a write", "failed write"),
        *("power lost, sync full", "power lost, sync normal", "clock forwards", "clock backwards"),
        *("killed without a journal", "resubmitted", "hub_lost", "redelivered", "unauthorized"),
        *("question", "answer", "no_answers", "no_question"),
    ]
    assert {name: seen[name] for name in expected if seen[name] < 5} == {}


def test_same_seed_gives_the_same_history() -> None:
    for seed in range(10):
        one, other = simulate(seed), simulate(seed)
        assert one.traffic.hexdigest() == other.traffic.hexdigest()
        assert (one.events, one.now, one.seen) == (other.events, other.now, other.seen)
    assert simulate(1).traffic.hexdigest() != simulate(2).traffic.hexdigest()


def test_history_is_the_same_in_another_process() -> None:
    program = "from tests.simulation import simulate; print(simulate(3).traffic.hexdigest())"
    heard = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert heard[0] == heard[1] == simulate(3).traffic.hexdigest() + "\n"


# Sabotages: hubs and journals that are broken on purpose.


class LosesAWrite(DiskJournal):
    """Every tenth write does nothing."""

    writes = 0

    def write(self, changes: Changes, clock_offset: float) -> None:
        self.writes += 1
        super().write(Changes() if self.writes % 10 == 0 else changes, clock_offset)


class LosesARow(DiskJournal):
    """Every fifth write leaves out one row that it should update."""

    writes = 0

    def write(self, changes: Changes, clock_offset: float) -> None:
        self.writes += 1
        if self.writes % 5 == 0:
            changes = dataclasses.replace(changes, updated=dict(list(changes.updated.items())[1:]))
        super().write(changes, clock_offset)


class ActsBeforeItWrites(Hub):
    """Effects do not wait for small changes."""

    def _take_step(self) -> Step:
        if 0 < len(self.tasks.changed) + len(self.directory.changed) <= 2:
            effects, self._effects = self._effects, []
            return Step(effects)
        return super()._take_step()


class DoesNotSync(DiskJournal):
    """The journal leaves the last writes to the operating system."""

    def open(self) -> None:
        super().open()
        self._connected().execute("PRAGMA synchronous = normal")


class DeliversTwice(Hub):
    def _hand_out(self, task: TaskRecord, agent: AgentRecord) -> None:
        super()._hand_out(task, agent)
        self._effects.append(self._effects[-1])


class DeliversAgainAfterARestart(Hub):
    """Tasks that were in progress when the hub died become pending, as if never handed out."""

    def restore(self, agents: Iterable[AgentRow], tasks: Iterable[TaskRow], redeliver_after: float) -> Step:
        return super().restore(agents, map(self._pending, tasks), redeliver_after)

    @staticmethod
    def _pending(row: TaskRow) -> TaskRow:
        if row.state is TaskState.IN_PROGRESS:
            row = row._replace(state=TaskState.PENDING, assignee=None, attempt=row.attempt - 1)
        return row


class HubWithOtherQueues(Hub):
    pending_class: type[PendingTasks]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pending = self.pending_class(self.directory.agents)


class WithoutRetries(PendingTasks):
    def push(self, task: TaskRecord) -> None:
        if task.attempt == 0:
            super().push(task)

    def discard(self, task: TaskRecord) -> None:
        if task.attempt == 0:
            super().discard(task)


class ForgetsARequeue(HubWithOtherQueues):
    pending_class = WithoutRetries


class MayMissTasks(PendingTasks):
    def discard(self, task: TaskRecord) -> None:
        queue = self.queues.get(task.target)
        if queue is not None and task.requester in queue.by_requester:
            super().discard(task)


class ForgetsTheQueueInARestart(HubWithOtherQueues):
    pending_class = MayMissTasks

    def _restore_open(self, task: TaskRecord) -> None:
        super()._restore_open(task)
        if task.state is TaskState.PENDING:
            self.pending.discard(task)


class AcceptsAnOlderAttempt(Hub):
    def _on_result(self, connection: Connection, message: Result) -> None:
        super()._on_result(connection, dataclasses.replace(message, attempt=None))

    _RECEIVERS: typing.ClassVar[Any] = {**Hub._RECEIVERS, Result: _on_result}


class AcceptsAFormerAssignee(Hub):
    def _on_result(self, connection: Connection, message: Result) -> None:
        task = self.tasks.open.get(message.task_id)
        if (
            task is None
            or message.attempt is None
            or message.attempt >= task.attempt
            or connection.agent is task.requester
        ):
            super()._on_result(connection, message)
            return
        worker = task.assignee
        self._conclude(task, message)
        self._acknowledge(connection, message, task)
        self._follow_up(task, worker)

    _RECEIVERS: typing.ClassVar[dict[type, Callable[..., None]]] = {**Hub._RECEIVERS, Result: _on_result}


class ResurrectsAFinalTask(Hub):
    """A late result overwrites a timeout."""

    def _on_result(self, connection: Connection, message: Result) -> None:
        task = self.tasks.delivered.get(message.task_id)
        if task is None or task.state is not TaskState.TIMEOUT or task.assignee is not connection.agent:
            super()._on_result(connection, message)
            return
        task.state = TaskState.COMPLETED if message.success else TaskState.FAILED
        self.tasks.ended[TaskState.TIMEOUT] -= 1
        self.tasks.ended[task.state] += 1
        task.success, task.output, task.error = message.success, message.output, None
        self.tasks.mark(task)
        self._acknowledge(connection, message, task)
        if task.requester.connection is not None:
            self._send(task.requester.connection, task.outcome())

    _RECEIVERS: typing.ClassVar[dict[type, Callable[..., None]]] = {**Hub._RECEIVERS, Result: _on_result}


class ResurrectsInARestart(Hub):
    """The next hub retries tasks that have failed."""

    def restore(self, agents: Iterable[AgentRow], tasks: Iterable[TaskRow], redeliver_after: float) -> Step:
        return super().restore(agents, map(self._pending, tasks), redeliver_after)

    @staticmethod
    def _pending(row: TaskRow) -> TaskRow:
        if row.state is TaskState.FAILED:
            row = row._replace(state=TaskState.PENDING, assignee=None, end=None, is_delivered=False)
        return row


class ForgetsToRedeliver(Hub):
    """An outcome that must be redelivered is known to this life of the hub, and not to the next."""

    def _restore_ended(self, task: TaskRecord, is_told: bool) -> None:
        super()._restore_ended(task, is_told)
        self.tasks.changed.pop(task, None)


class TrustsTheLastWrite(DiskJournal):
    """Outcomes written as delivered count as delivered, though the hub may have died before it sent them."""

    def load(self, clock_offset: float) -> tuple[list[AgentRow], list[TaskRow], float]:
        agents, tasks, last = super().load(clock_offset)
        told = dict(self._connected().execute("SELECT arrival, told FROM tasks"))
        return agents, [row._replace(is_delivered=told[row.sequence] > 0) for row in tasks], last


class LivesPastItsDeadline(Hub):
    def _restore_open(self, task: TaskRecord) -> None:
        super()._restore_open(task)
        self.deadlines.push(task, task.deadline + 1.0)


class KeepsEndedTasks(DiskJournal):
    def write(self, changes: Changes, clock_offset: float) -> None:
        super().write(dataclasses.replace(changes, deleted=dict(list(changes.deleted.items())[1:])), clock_offset)


class RemembersGoneAgents(Hub):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.directory.forget_unneeded = lambda: None  # type: ignore[method-assign]


class DeliversOutcomesTwiceWhileDraining(Hub):
    """A requester that drains gets the outcomes of its tasks twice."""

    def receive(self, connection: Any, message: Any, now: float, message_bytes: int = 0) -> Step:
        if isinstance(message, Deregister) and message.drain:
            self.draining = {*getattr(self, "draining", ()), connection}
        return self._twice(super().receive(connection, message, now, message_bytes))

    def tick(self, now: float) -> Step:
        return self._twice(super().tick(now))

    def _twice(self, step: Step) -> Step:
        draining = getattr(self, "draining", ())
        again = [one for one in step.effects if one[0] in draining and isinstance(one[1], TaskOutcome)]
        return step._replace(effects=[*again, *step.effects])


class NewestFirst(PendingQueue):
    @staticmethod
    def key_of(task: TaskRecord) -> tuple[int, int]:
        return -task.request.priority, -task.sequence

    def push(self, task: TaskRecord, turn: int) -> None:
        super().push(task, turn)
        self.by_requester[task.requester].push(task, self.key_of(task))
        self._update_head(task.requester, self.by_requester[task.requester])


class WithoutPriorities(NewestFirst):
    @staticmethod
    def key_of(task: TaskRecord) -> tuple[int, int]:
        return 0, task.sequence


class InOtherQueues(PendingTasks):
    def __init__(self, agents: Mapping[str, AgentRecord], queue_class: type[PendingQueue]) -> None:
        super().__init__(agents)
        self.queue_class = queue_class

    def push(self, task: TaskRecord) -> None:
        self.queues.setdefault(task.target, self.queue_class())
        super().push(task)


class AssignsTheNewestFirst(Hub):
    queue_class: type[PendingQueue] = NewestFirst

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pending = InOtherQueues(self.directory.agents, self.queue_class)


class IgnoresPriorities(AssignsTheNewestFirst):
    queue_class = WithoutPriorities


class WithoutTurns(PendingQueue):
    def take_turn(self, requester: AgentRecord, turn: int) -> None:
        pass


class ServesTheSameRequesterFirst(AssignsTheNewestFirst):
    queue_class = WithoutTurns


class AssignsOneTaskTooMany(Hub):
    def receive(self, connection: Any, message: Any, now: float, message_bytes: int = 0) -> Step:
        if isinstance(message, Register):
            message = dataclasses.replace(message, max_tasks=message.max_tasks + 1)
        return super().receive(connection, message, now, message_bytes)


class KeepsTheFirstMaxTasks(Hub):
    """A second registration on a connection does not change `max_tasks`."""

    def receive(self, connection: Any, message: Any, now: float, message_bytes: int = 0) -> Step:
        if isinstance(message, Register):
            self.first: dict[Any, int] = getattr(self, "first", {})
            message = dataclasses.replace(message, max_tasks=self.first.setdefault(connection, message.max_tasks))
        return super().receive(connection, message, now, message_bytes)


class RetriesAtTheRequester(Hub):
    """A task that is retried may go to the agent that delegated it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        free_agent = self.directory.free_agent

        def any_free_agent(task: TaskRecord, avoiding: AgentRecord | None) -> AgentRecord | None:
            pool = self.directory.pools.get(task.request.capability or "")
            if avoiding is None or pool is None or task.request.agent_id is not None:
                return free_agent(task, avoiding)
            return pool.least_loaded(avoiding)

        self.directory.free_agent = any_free_agent  # type: ignore[method-assign]


class AcceptsAnySecretAfterARestart(Hub):
    restored: frozenset[str | None] = frozenset()

    def restore(self, agents: Iterable[AgentRow], tasks: Iterable[TaskRow], redeliver_after: float) -> Step:
        agents = list(agents)
        self.restored = frozenset(row.agent_id for row in agents)
        return super().restore(agents, tasks, redeliver_after)

    def receive(self, connection: Any, message: Any, now: float, message_bytes: int = 0) -> Step:
        agent = self.directory.agents.get(message.agent_id or "") if isinstance(message, Register) else None
        if agent is not None and agent.agent_id in self.restored:
            agent.resume_hash = hash_of(message.resume or "")
        return super().receive(connection, message, now, message_bytes)


class ForgetsSessionsInARestart(DiskJournal):
    """The secrets of all agents are lost."""

    def load(self, clock_offset: float) -> tuple[list[AgentRow], list[TaskRow], float]:
        agents, tasks, last = super().load(clock_offset)
        return [row._replace(resume_hash="") for row in agents], tasks, last


class ForgetsQuestionsInARestart(DiskJournal):
    def load(self, clock_offset: float) -> tuple[list[AgentRow], list[TaskRow], float]:
        agents, tasks, last = super().load(clock_offset)
        return agents, [row._replace(life=row.life._replace(talk=None)) for row in tasks], last


class NumbersQuestionsAnewInARestart(DiskJournal):
    def load(self, clock_offset: float) -> tuple[list[AgentRow], list[TaskRow], float]:
        agents, tasks, last = super().load(clock_offset)
        return agents, [row._replace(life=row.life._replace(asked=0)) for row in tasks], last


class HubWithOtherTasks(Hub):
    tasks_class: type[TaskTable]

    def __init__(self, settings: HubSettings, **options: Any) -> None:
        super().__init__(settings, **options)
        self.tasks = self.tasks_class(settings, self.directory, is_journaled=self._is_journaled)


class TakesAnyAnswer(HubWithOtherTasks):
    class tasks_class(TaskTable):
        def answer(self, task: TaskRecord, message: Status, agent: AgentRecord, now: float, message_bytes: int) -> None:
            if task.talk is not None and task.talk.ask == message.ask:
                task.talk.answer = None
                task.requester.questions[task.task_id] = task
            super().answer(task, message, agent, now, message_bytes)


class TakesAnAnswerToAnyQuestion(HubWithOtherTasks):
    class tasks_class(TaskTable):
        def answer(self, task: TaskRecord, message: Status, agent: AgentRecord, now: float, message_bytes: int) -> None:
            if task.question is not None:
                message = dataclasses.replace(message, ask=task.question.ask)
            super().answer(task, message, agent, now, message_bytes)


class TakesAnAnswerFromAnybody(Hub):
    def _on_talk(self, connection: Connection, message: Status) -> None:
        task = self.tasks.open.get(message.task_id or "")
        agent = connection.agent
        if task is not None and message.ask is not None and agent is not None:
            connection.agent = task.requester
        try:
            super()._on_talk(connection, message)
        finally:
            connection.agent = agent


class KeepsTheQuestionOfALostAttempt(HubWithOtherTasks):
    class tasks_class(TaskTable):
        def forget_talk(self, task: TaskRecord) -> None:
            if task.state is not TaskState.PENDING:
                super().forget_talk(task)


class AsksAnybody(HubWithOtherTasks):
    class tasks_class(TaskTable):
        def ask(self, task: TaskRecord, message: Status, agent: AgentRecord, now: float, message_bytes: int) -> None:
            task.request.answers = True
            super().ask(task, message, agent, now, message_bytes)


class TakesARepeatedQuestionForANewOne(HubWithOtherTasks):
    class tasks_class(TaskTable):
        def ask(self, task: TaskRecord, message: Status, agent: AgentRecord, now: float, message_bytes: int) -> None:
            if task.talk is not None:
                self.forget_talk(task)
            super().ask(task, message, agent, now, message_bytes)


class ForgetsThatItWasAsked(Hub):
    """A requester that is back is not asked again."""

    def _on_register(self, connection: Connection, message: Register) -> None:
        agent = self.directory.agents.get(message.agent_id or "")
        if agent is not None:
            agent.questions.clear()
        super()._on_register(connection, message)

    _RECEIVERS: typing.ClassVar[Any] = {**Hub._RECEIVERS, Register: _on_register}


class DropsAnswersForWorkersThatAreAway(Hub):
    def _on_register(self, connection: Connection, message: Register) -> None:
        agent = self.directory.agents.get(message.agent_id or "")
        for task in agent.running.values() if agent is not None else ():
            if task.has_answer:
                task.talk = None
        super()._on_register(connection, message)

    _RECEIVERS: typing.ClassVar[Any] = {**Hub._RECEIVERS, Register: _on_register}


SABOTAGES: list[tuple[type, str]] = [
    (LosesAWrite, ""),
    (LosesARow, ""),
    (ActsBeforeItWrites, ""),
    (DoesNotSync, ""),
    (DeliversTwice, "was handed out after"),
    (DeliversAgainAfterARestart, "attempt"),
    (ForgetsARequeue, "waits, and"),
    (ForgetsTheQueueInARestart, "waits, and"),
    (AcceptsAnOlderAttempt, "was accepted for"),
    (AcceptsAFormerAssignee, "was accepted for"),
    (ResurrectsAFinalTask, "which is final"),
    (ResurrectsInARestart, "which is final"),
    (ForgetsToRedeliver, "never sent"),
    (TrustsTheLastWrite, "never sent"),
    (LivesPastItsDeadline, "after its deadline"),
    (KeepsEndedTasks, "the journal still has"),
    (RemembersGoneAgents, "the hub still remembers"),
    (DeliversOutcomesTwiceWhileDraining, "was delivered 2 times"),
    (AssignsTheNewestFirst, "which precedes it"),
    (IgnoresPriorities, "which precedes it"),
    (ServesTheSameRequesterFirst, "another requester's turn"),
    (AssignsOneTaskTooMany, "was handed a task and has"),
    (KeepsTheFirstMaxTasks, "max_tasks"),
    (RetriesAtTheRequester, "to its own requester"),
    (AcceptsAnySecretAfterARestart, "was resumed with a wrong secret"),
    (ForgetsSessionsInARestart, "was refused with its right secret"),
    (ForgetsQuestionsInARestart, "was not sent to"),
    (NumbersQuestionsAnewInARestart, "question 1 is"),
    (TakesAnyAnswer, "a second answer to question"),
    (TakesAnAnswerToAnyQuestion, "is not from its requester"),
    (TakesAnAnswerFromAnybody, "is not from its requester"),
    (KeepsTheQuestionOfALostAttempt, "got the answer to a question of attempt"),
    (AsksAnybody, "cannot be asked"),
    (TakesARepeatedQuestionForANewOne, "has another number"),
    (ForgetsThatItWasAsked, "was not sent to"),
    (DropsAnswersForWorkersThatAreAway, "the answer to"),
]


CAUGHT_LATE = {  # Only after hundreds of histories.
    *(ServesTheSameRequesterFirst, ResurrectsAFinalTask, TrustsTheLastWrite, DeliversOutcomesTwiceWhileDraining),
    *(ForgetsToRedeliver,),
}


@pytest.mark.parametrize(
    ("sabotaged", "words"),
    [
        pytest.param(*one, id=one[0].__name__, marks=[pytest.mark.long] if one[0] in CAUGHT_LATE else [])
        for one in SABOTAGES
    ],
)
def test_sabotage_is_caught(sabotaged: type, words: str) -> None:
    options: dict[str, Any] = {"hub_class" if issubclass(sabotaged, Hub) else "journal_class": sabotaged}
    violations = []
    for seed in range(SEEDS_TO_CATCH):
        try:
            simulate(seed, **options)
        except Violation as violation:
            violations.append(str(violation))
            if words in violations[-1] and f"python -m tests.simulation --seed {seed} " in violations[-1]:
                return
    pytest.fail(f"{sabotaged.__name__} was not caught in {SEEDS_TO_CATCH} seeds, or otherwise: {violations[:3]}")


# What the simulation has found.


def test_write_that_is_interrupted_anywhere_leaves_nothing_behind() -> None:
    hub = Hub(HubSettings(), entropy=bytes, now=0.0, is_journaled=True)
    hub.connected("a", 0.0)
    changes = hub.receive("a", Register(name="a"), 0.0).changes
    assert changes is not None
    interrupted = 0
    for steps in range(1, 60):
        journal = DiskJournal(None, sync="full")
        journal.open()
        try:
            journal.write_or_fail(changes, 0.0, steps)
        except sqlite3.OperationalError:
            interrupted += 1
            assert journal.rows("agents") == 0
            journal.write(changes, 0.0)
        assert journal.rows("agents") == 1
        journal.close()
    assert 10 < interrupted < 59


# The command line.


def test_one_seed_is_replayed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "1", "--verbose"]) == 0
    story = capsys.readouterr()
    assert "the hub starts" in story.out
    assert "1 seeds" in story.err


def test_many_seeds_stop_at_the_first_that_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--seeds", "3"]) == 0
    assert capsys.readouterr().err.startswith("3 seeds, ")
    monkeypatch.setattr(Simulation, "_check_memory", lambda simulation: simulation.fail("on purpose"))
    assert main(["--seeds", "50", "--start", "7"]) == 1
    assert "replay it with: python -m tests.simulation --seed 7 " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--seed", "x"], ["--seed", "-1"], ["--seed", "1", "--seeds", "2"], ["x"]])
def test_bad_arguments_are_a_clear_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err
