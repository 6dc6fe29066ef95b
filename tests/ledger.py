"""The ledger: what a hub has promised about each task and each session, and whether its effects keep that.

Every driver of a hub enters two things: what the hub `decided` on one message or at one tick, at once; and each message
when it is `sent`, which with a journal is later, once the changes are on disk. The hub's promises are about what it
sent. Its decisions show which agent runs which task: the order of the queues, the limits of the workers.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
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
    Discovered,
    Error,
    ErrorInfo,
    InvalidMessage,
    Register,
    Registered,
    Result,
    Status,
    StatusReply,
    TaskAck,
    TaskAnswer,
    TaskOutcome,
    TaskState,
)

EPSILON_S = 1e-5  # Times of about 1e9 seconds are stored as floats.
TIMER_LATE_S = 0.05  # A server's timer fires at most this late.
FINAL = frozenset(state.value for state in FINAL_STATES)


class Violation(AssertionError):
    """The hub broke a promise."""


def raise_violation(text: str) -> NoReturn:
    raise Violation(text)


class Connection:
    """One connection as the ledger sees it."""

    session: str | None = None  # The agent_id that was registered on it.
    is_attended = True  # The hub does not know that it has ended.

    def __init__(self) -> None:
        self.released: set[str] = set()  # Tasks that the agent said it does not have; all of them when it leaves.


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """One task: what was asked for, what the hub has said about it, and what it may say."""

    request: Delegate
    requester: str  # Its agent_id.
    parent: Entry | None = None
    sequence: int = 0  # In the order of acceptance.
    is_acknowledged: bool = False  # By the hub; its requester may not have received that.
    is_reachable: bool = True  # Its requester remembers it, and has not left.
    is_tainted: bool = False  # A loss of power may have undone some of it, by contract.
    is_forgotten: bool = False  # Its hub had no journal, and has died.
    is_sent: bool = False  # Its outcome was sent to its requester, who may not have received it.
    due: float | None = None  # Its deadline in virtual time; None while no hub has accepted it.
    due_wall: float | None = None  # The same by the wall clock, as the journal has it; None until it is written.
    attempt: int = 0  # The highest that the hub has mentioned.
    delivered: int = 0  # The last attempt that was handed out.
    deliveries: int = 0
    passed_by: set[str] = dataclasses.field(default_factory=set)  # Requesters whose turns it has waited for.
    holder: Connection | None = None  # Where the last attempt is worked on, as far as the hub knows.
    is_over: bool = False  # The journal has its outcome.
    final: str | None = None  # Its final state, once the hub has mentioned it to anybody.
    outcome: tuple[Any, ...] | None = None  # Success, output, error code and text, once delivered.
    accepted: tuple[Any, ...] | None = None  # The same, of the result whose acceptance its worker was sent.
    answers: list[Any] = dataclasses.field(default_factory=list)  # The outputs that any agent has sent.
    numbers: dict[int, tuple[str, int]] = dataclasses.field(
        default_factory=dict
    )  # Of questions: their text and attempt.
    asked: dict[str, int] = dataclasses.field(default_factory=dict)  # The numbers of questions, by message id.
    replies: dict[int, list[Any]] = dataclasses.field(default_factory=dict)  # What its requester answered, by number.
    replied: dict[int, str] = dataclasses.field(default_factory=dict)  # The message whose answer the hub acknowledged.
    latest: int = 0  # The number of the last question that the hub has taken, acknowledged or not,
    latest_written: int = 0  # ... and of the last one on disk.
    answers_written: set[int] = dataclasses.field(default_factory=set)  # The numbers of those that are on disk.
    told: dict[int, Any] = dataclasses.field(default_factory=dict)  # The answer that its worker got, by number.
    shown: dict[int, Connection] = dataclasses.field(default_factory=dict)  # Where the hub sends a question, by number,
    brought: dict[int, Connection] = dataclasses.field(default_factory=dict)  # ... and an answer.
    outcomes: int = 0  # How often this life of the hub delivered its outcome,
    outcomes_due: int = 1  # and how often it may: once, and once more for each repeated delegate or lost connection.

    @property
    def target(self) -> tuple[str | None, str | None]:
        return self.request.agent_id, self.request.capability

    def precedes(self, other: Entry) -> bool:
        """Return whether this task goes before the other if both wait, whoever's turn it is."""
        if self.request.priority != other.request.priority:
            return self.request.priority > other.request.priority
        return self.requester == other.requester and self.target == other.target and self.sequence < other.sequence

    @property
    def is_unpromised(self) -> bool:
        """Whether the hub owes nothing for this task any more."""
        return self.is_tainted or self.is_forgotten


@dataclasses.dataclass(slots=True, eq=False)
class Worker:
    """One agent as it last registered, and the tasks that the hub holds to be running at it."""

    capabilities: frozenset[str]
    max_tasks: int
    running: dict[str, int]  # The attempt, by task_id. Exact while the agent is online.

    def may_take(self, agent_id: str, entry: Entry) -> bool:
        """Return whether this agent may work on a task: it has the capability, and is named or not the requester."""
        request = entry.request
        is_meant = request.agent_id == agent_id if request.agent_id is not None else agent_id != entry.requester
        return is_meant and (request.capability is None or request.capability in self.capabilities)


class Ledger:
    """The entries of all tasks, and the sessions of all agents. `fail` is called with the first broken promise."""

    def __init__(
        self,
        fail: Callable[[str], NoReturn] = raise_violation,
        *,
        grace_s: float,
        skew_s: float = 0.0,
        keeps_ended: bool = True,
    ) -> None:
        self.fail = fail
        self.entries: dict[str, Entry] = {}
        self.requests: dict[str, tuple[str, AgentMessage]] = {}  # By message id, with the sender.
        self.workers: dict[str, Worker] = {}  # By agent_id.
        self.secrets: dict[str, str] = {}  # The resume secret of each session, by agent_id.
        self.disconnected_since: dict[str, float | None] = {}  # By agent_id; None while it is online.
        self.tainted_agents: set[str] = set()
        self._resumable: dict[str, float] = {}  # Until when a session must be resumed, by agent_id; inf while online.
        self._waiting: dict[str, int] = {}  # Tasks that were pending when last seen, with their attempt.
        self._online: dict[str, Connection] = {}  # The latest connection of each session, by agent_id.
        self._grace_s = grace_s
        self._keeps_ended = keeps_ended  # No ended task is forgotten within the test.
        self._journal_skew_s = skew_s  # What the wall clock of the times in the journal is ahead of virtual time.
        self._sequence = itertools.count(1)

    # What clients send.

    def requested(self, connection: Connection, message: AgentMessage | InvalidMessage) -> None:
        """Enter a message that a client is about to send: what its reply will mean, what its task may end with."""
        if isinstance(message, InvalidMessage):
            return
        agent_id = connection.session or ""
        if message.id is not None:
            self.requests[message.id] = agent_id, message
        if isinstance(message, Delegate):
            entry = self.entries.get(message.task_id)
            if entry is None:
                parent = self.entries.get(message.parent_id or "")
                is_tainted = parent is not None and parent.is_tainted
                self.entries[message.task_id] = Entry(message, agent_id, parent, is_tainted=is_tainted)
            elif is_same(entry.request, message):
                entry.requester = agent_id
        elif isinstance(message, Status) and message.ask is not None:
            entry = self.entries.get(message.task_id or "")
            if entry is not None and entry.requester == agent_id:
                entry.replies.setdefault(message.ask, []).append(message.answer)
        elif isinstance(message, Result) and message.task_id in self.entries:
            if message.success:
                self.entries[message.task_id].answers.append(message.output)
            elif isinstance(message.error, ErrorInfo) and message.error.code == Code.AGENT_LOST:
                connection.released.add(message.task_id)
        elif isinstance(message, Deregister):
            connection.released.update(self.entries)

    # The hub's decisions.

    def decided(
        self,
        connection: Connection | None,
        message: Any,
        effects: Iterable[tuple[Connection, Any]],
        at: float,
        state_of: Callable[[str], tuple[str, int] | None],
    ) -> None:
        """Enter all effects of one message, or of one tick (None). `state_of` asks the hub about one task."""
        effects = list(effects)
        if connection is not None and self._is_accepted(connection, message, effects):
            if isinstance(message, Delegate):
                self._accept(message, effects, at)
            else:
                self._release(connection, message.task_id, message.attempt)
        for to, action in effects:
            if isinstance(action, Registered) and isinstance(message, Register):
                self._begin_session(to, action, message)
            elif isinstance(action, Delegated):
                self._hand_out(action)
            elif isinstance(action, TaskAck):
                if action.reply_to is None and action.state in FINAL:  # Its worker must stop.
                    self._release(to, action.task_id, None)
                self._note_waiting(action.task_id, action.state, action.attempt)
            elif isinstance(action, TaskOutcome):
                self._count_outcome(action)
            elif isinstance(action, StatusReply) and action.task_id is not None:
                self._note_waiting(action.task_id, action.state, action.attempt)
                entry = self.entries[action.task_id]
                entry.latest = max(entry.latest, action.ask or 0)
                if action.reply_to is None and action.ask is not None:
                    entry.shown[action.ask] = to
            elif isinstance(action, TaskAnswer):
                self.entries[action.task_id].brought[action.ask] = to
            elif isinstance(action, Close) and action.code == CloseCode.DONE:  # It has deregistered.
                self._resumable.pop(to.session or "", None)
        self._check_deliveries([action for _, action in effects if isinstance(action, Delegated)], at, state_of)

    def _is_accepted(self, connection: Connection, message: Any, effects: list[tuple[Connection, Any]]) -> bool:
        """Return whether a delegate or a result was accepted: acknowledged, or without an id and not refused."""
        if not isinstance(message, Delegate | Result):
            return False
        replies = [action for to, action in effects if to is connection and isinstance(action, TaskAck | Error)]
        for reply in replies:
            if reply.reply_to == message.id:
                return isinstance(reply, TaskAck)
        return message.id is None and connection.is_attended

    def _accept(self, message: Delegate, effects: list[tuple[Connection, Any]], at: float) -> None:
        """Count the time of an accepted task from here on; a repeated delegate may be answered with its outcome."""
        entry = self.entries[message.task_id]
        if entry.due is None:
            entry.due, entry.sequence = at + message.ttl, next(self._sequence)
            if entry.parent is not None and entry.parent.due is not None:
                entry.due = min(entry.due, entry.parent.due)
            return
        outcomes = [one for _, one in effects if isinstance(one, TaskOutcome) and one.task_id == message.task_id]
        states = [one.state for _, one in effects if isinstance(one, TaskAck) and one.reply_to == message.id]
        entry.outcomes_due += bool(outcomes)
        if not outcomes and FINAL.intersection(states):
            self.fail(f"{message.task_id} has ended, and a repeated delegate was not answered with its outcome")

    def _begin_session(self, connection: Connection, reply: Registered, message: Register) -> None:
        connection.session = reply.agent_id
        self._online[reply.agent_id] = connection
        self.disconnected_since[reply.agent_id] = None
        capabilities = frozenset(one if isinstance(one, str) else one.name for one in message.capabilities)
        running = {ref.task_id: ref.attempt for ref in reply.tasks}
        self.workers[reply.agent_id] = Worker(capabilities, message.max_tasks, running)

    def _hand_out(self, delivery: Delegated) -> None:
        worker, entry = self.workers[delivery.agent_id], self.entries[delivery.task_id]
        worker.running[delivery.task_id] = delivery.attempt
        self._waiting.pop(delivery.task_id, None)
        if entry.is_tainted:
            return
        if entry.request.agent_id is None and delivery.agent_id == entry.requester:
            self.fail(f"{delivery.task_id} was handed to its own requester {delivery.agent_id}")
        if not worker.may_take(delivery.agent_id, entry):
            self.fail(f"{delivery.task_id} was handed to {delivery.agent_id}, which may not take it")

    def _release(self, connection: Connection, task_id: str, attempt: int | None) -> None:
        """Free a worker of a task whose result was accepted, or which has ended otherwise."""
        worker = self.workers.get(connection.session or "")
        if worker is not None and attempt in (None, worker.running.get(task_id)):
            worker.running.pop(task_id, None)

    def _count_outcome(self, outcome: TaskOutcome) -> None:
        self._waiting.pop(outcome.task_id, None)
        entry = self.entries[outcome.task_id]
        entry.outcomes += 1
        if entry.outcomes > entry.outcomes_due and not entry.is_tainted:
            self.fail(f"the outcome of {outcome.task_id} was delivered {entry.outcomes} times")

    def _note_waiting(self, task_id: str, state: str | None, attempt: int | None) -> None:
        if state == TaskState.PENDING:
            if self._waiting.get(task_id) != attempt:
                self.entries[task_id].passed_by.clear()
            self._waiting[task_id] = attempt or 0
        else:
            self._waiting.pop(task_id, None)

    def _check_deliveries(
        self, deliveries: list[Delegated], at: float, state_of: Callable[[str], tuple[str, int] | None]
    ) -> None:
        for agent_id in {delivery.agent_id: None for delivery in deliveries}:
            worker = self.workers[agent_id]
            if len(worker.running) > worker.max_tasks and not self._any_tainted(worker.running):
                self.fail(
                    f"{agent_id} was handed a task and has {[*worker.running]}, with max_tasks {worker.max_tasks}"
                )
        if not deliveries or not self._waiting:
            return
        # An agent whose next task has just come due waits for the tick that ends that one; new tasks may pass both.
        dues = [self.entries[task_id].due for task_id in self._waiting]
        is_due = any(due is not None and due <= at + EPSILON_S for due in dues)
        for delivery in deliveries:
            if not is_due:
                self._check_order(delivery, state_of)
            for task_id in self._waiting:  # Its requester has had its turn: others may have theirs.
                if self.entries[task_id].requester == self.entries[delivery.task_id].requester:
                    self.entries[task_id].passed_by.clear()

    def _check_order(self, delivery: Delegated, state_of: Callable[[str], tuple[str, int] | None]) -> None:
        """Require that no waiting task precedes one that was handed out, and that requesters take turns.

        A task that was pending before, and is pending now with the same attempt, was pending all the time.
        """
        entry, worker = self.entries[delivery.task_id], self.workers[delivery.agent_id]
        for task_id, attempt in list(self._waiting.items()):
            other = self.entries[task_id]
            is_passed = self._is_passed(other, entry)
            if not (is_passed or other.precedes(entry)) or not worker.may_take(delivery.agent_id, other):
                continue
            now = state_of(task_id)
            if now != (TaskState.PENDING, attempt):
                self._note_waiting(task_id, *(now or (None, None)))
            elif other.is_tainted or entry.is_tainted:
                continue
            elif not is_passed:
                self.fail(f"{delivery.task_id} was handed to {delivery.agent_id} before {task_id}, which precedes it")
            elif entry.requester in other.passed_by:
                self.fail(
                    f"{delivery.task_id} was handed out before {task_id}, although it is another requester's turn"
                )
            else:
                other.passed_by.add(entry.requester)

    def _is_passed(self, other: Entry, entry: Entry) -> bool:
        """Return whether a task that waits is passed by one of another requester which precedes it by its turn only."""
        is_equal = other.target == entry.target and other.request.priority == entry.request.priority
        return is_equal and other.requester != entry.requester

    def _any_tainted(self, task_ids: Iterable[str]) -> bool:
        return any(self.entries[task_id].is_tainted for task_id in task_ids)

    # What the hub sent.

    def sent(self, connection: Connection, action: Any, at: float) -> None:
        """Enter a message when it is sent; it was decided at `at`."""
        if isinstance(action, TaskAck):
            self._on_acknowledged(action, at)
        elif isinstance(action, Delegated):
            self._on_delivery(connection, action, at)
        elif isinstance(action, TaskOutcome):
            self._on_outcome(connection, action, at)
        elif isinstance(action, Registered):
            self._on_registered(connection, action, at)
        elif isinstance(action, TaskAnswer):
            self._on_answer(connection, action, at)
        elif isinstance(action, StatusReply):
            self._on_status(action, at)
            if action.ask is not None and not self.entries[action.task_id or ""].is_tainted:
                self._on_question(connection, action)
        elif isinstance(action, Error):
            self._on_error(action)

    def _record_state(self, task_id: str, state: str, attempt: int, at: float) -> Entry:
        """Enter the state of a task as the hub states it."""
        entry = self.entries[task_id]
        if entry.is_tainted:
            return entry
        if entry.is_forgotten:
            self.fail(f"{task_id} was forgotten with its hub, and another hub says it is {state}")
        if entry.final is not None and state != entry.final:
            self.fail(f"{task_id} was {entry.final}, which is final, and now is {state}")
        if attempt < entry.attempt:
            self.fail(f"{task_id} was on attempt {entry.attempt}, and now is on {attempt}")
        if attempt > 1 + entry.request.max_retries:
            self.fail(f"{task_id} is on attempt {attempt} with {entry.request.max_retries} retries")
        entry.attempt = attempt
        if state in FINAL and entry.final is None:
            entry.final = state
            if state == TaskState.TIMEOUT and entry.due is not None and at < entry.due - EPSILON_S:
                self.fail(f"{task_id} timed out {entry.due - at:g} s early")
        return entry

    def _record_outcome(self, entry: Entry, outcome: tuple[Any, ...]) -> None:
        """Enter the outcome of a task as the hub states it."""
        if entry.is_tainted:
            return
        task_id = entry.request.task_id
        if entry.outcome is not None and outcome != entry.outcome:
            self.fail(f"{task_id} ended as {entry.outcome}, and now it ended as {outcome}")
        if entry.accepted is not None and outcome != entry.accepted:
            self.fail(f"{task_id} ended as {outcome}, although the result {entry.accepted} was accepted")
        entry.outcome = outcome
        success, output, code, _ = outcome
        if success is not (entry.final == TaskState.COMPLETED):
            self.fail(f"{task_id} is {entry.final} with success {success}")
        if success and output not in entry.answers:
            self.fail(f"{task_id} has an output that nobody sent: {output}")
        retries = entry.request.max_retries
        if code == Code.AGENT_LOST and retries and entry.attempt <= retries:
            self.fail(f"{task_id} failed after attempt {entry.attempt} with {retries} retries")

    def _on_acknowledged(self, reply: TaskAck, at: float) -> None:
        entry = self._record_state(reply.task_id, reply.state, reply.attempt, at)
        request = self.requests.get(reply.reply_to or "")
        if request is None:
            return
        agent_id, message = request
        if isinstance(message, Delegate):
            entry.is_acknowledged = True
        elif isinstance(message, Status) and message.ask is not None and not entry.is_tainted:
            if entry.replied.setdefault(message.ask, message.id or "") != message.id:
                self.fail(f"{reply.task_id}: a second answer to question {message.ask} was accepted")
        elif isinstance(message, Result) and reply.state in FINAL and not entry.is_tainted:
            if agent_id == entry.requester and not message.success:
                return  # It may have cancelled the task.
            if message.attempt not in (None, reply.attempt):
                self.fail(f"{reply.task_id}: a result of attempt {message.attempt} was accepted for {reply.attempt}")
            if entry.due is not None and at >= entry.due + EPSILON_S:
                self.fail(f"{reply.task_id}: a result was accepted {at - entry.due:g} s after its deadline")
            outcome = outcome_of(message)
            if outcome[2] != Code.AGENT_LOST:
                entry.accepted = outcome
                if entry.outcome is not None and entry.outcome != outcome:
                    self.fail(f"{reply.task_id} ended as {entry.outcome}, and then {outcome} was accepted")

    def _on_delivery(self, connection: Connection, delivery: Delegated, at: float) -> None:
        task_id = delivery.task_id
        entry = self._record_state(task_id, TaskState.IN_PROGRESS, delivery.attempt, at)
        if entry.is_tainted:
            return
        if delivery.attempt <= entry.delivered:
            self.fail(f"{task_id}: attempt {delivery.attempt} was handed out after {entry.delivered}")
        entry.deliveries += 1
        if entry.deliveries > 1 + entry.request.max_retries:
            self.fail(f"{task_id} was handed out {entry.deliveries} times with {entry.request.max_retries} retries")
        if entry.due is not None and at >= entry.due:
            self.fail(f"{task_id} was handed out {at - entry.due:g} s after its deadline")
        if entry.holder is not None and entry.holder.is_attended and task_id not in entry.holder.released:
            self.fail(f"{task_id}: attempt {delivery.attempt} began while {entry.delivered} was in progress")
        if connection.session not in (None, delivery.agent_id):
            self.fail(f"{task_id} was handed to {connection.session} instead of {delivery.agent_id}")
        entry.delivered, entry.holder = delivery.attempt, connection

    def _on_outcome(self, connection: Connection, outcome: TaskOutcome, at: float) -> None:
        entry = self._record_state(outcome.task_id, outcome.state, outcome.attempt, at)
        if not entry.is_tainted and connection.session not in (None, entry.requester):
            text = f"was delivered to {connection.session} instead of {entry.requester}"
            self.fail(f"the outcome of {outcome.task_id} {text}")
        entry.is_sent = True
        self._record_outcome(entry, outcome_of(outcome))

    def _on_question(self, connection: Connection, status: StatusReply) -> None:
        """Enter a question that goes to the requester, or the number that its worker is told."""
        entry, number = self.entries[status.task_id or ""], status.ask or 0
        task_id = entry.request.task_id
        _, message = self.requests.get(status.reply_to or "", ("", None))
        if isinstance(message, Status) and message.question is not None:
            text, attempt = message.question.text, status.attempt or 0
            if entry.asked.setdefault(message.id or "", number) != number:
                self.fail(f"{task_id}: a question sent again has another number, {number}")
        elif status.question is not None:
            text, attempt = status.question.text, status.attempt or 0
            if status.reply_to is None and connection.session not in (None, entry.requester):
                self.fail(f"{task_id}: {connection.session} is asked, and not {entry.requester}")
        else:
            return
        if not entry.request.answers:
            self.fail(f"{task_id}: a question was accepted for a requester that cannot be asked")
        if entry.numbers.setdefault(number, (text, attempt)) != (text, attempt):
            self.fail(f"{task_id}: question {number} is {text!r} of attempt {attempt}, and was {entry.numbers[number]}")

    def _on_answer(self, connection: Connection, answer: TaskAnswer, at: float) -> None:
        entry = self._record_state(answer.task_id, answer.state, answer.attempt, at)
        if entry.is_tainted:
            return
        task_id, number = answer.task_id, answer.ask
        if answer.answer not in entry.replies.get(number, ()):
            self.fail(f"{task_id}: the answer {answer.answer!r} to question {number} is not from its requester")
        if entry.told.setdefault(number, answer.answer) != answer.answer:
            self.fail(f"{task_id}: the answer to question {number} was {entry.told[number]!r}, now {answer.answer!r}")
        _, attempt = entry.numbers.get(number, ("", answer.attempt))
        if attempt != answer.attempt:
            self.fail(f"{task_id}: attempt {answer.attempt} got the answer to a question of attempt {attempt}")

    def _on_registered(self, connection: Connection, reply: Registered, at: float) -> None:
        connection.session = reply.agent_id
        _, message = self.requests.get(reply.reply_to, ("", None))
        if isinstance(message, Register):
            self._check_session(reply, message, at)
        self._resumable[reply.agent_id] = math.inf if self.disconnected_since[reply.agent_id] is None else at
        for ref in reply.tasks:
            entry = self._record_state(ref.task_id, TaskState.IN_PROGRESS, ref.attempt, at)
            if ref.attempt >= entry.delivered:
                entry.holder = connection

    def _check_session(self, reply: Registered, message: Register, at: float) -> None:
        """Require that a session is resumed with its own secret and no other."""
        asked = message.agent_id or ""
        secret = self.secrets.setdefault(reply.agent_id, reply.resume)
        if reply.agent_id == asked and message.resume != secret:
            self.fail(f"the session of {asked} was resumed with a wrong secret")
        if reply.resume != secret:
            self.fail(f"the session of {reply.agent_id} has another secret than before")
        has_secret = asked in self.secrets and message.resume == self.secrets[asked]
        if reply.agent_id != asked and has_secret and at < self._resumable.get(asked, 0.0) - EPSILON_S:
            self.fail(f"the session of {asked} was not resumed, although its secret was right")

    def _on_status(self, status: StatusReply, at: float) -> None:
        for one in status.tasks or ():
            self._record_state(one.task_id, one.state, one.attempt, at)
        if status.task_id is not None:
            entry = self._record_state(status.task_id, status.state or "", status.attempt or 0, at)
            # Agents that neither requested nor ran the task see its state and nothing else.
            if status.state in FINAL and (status.error is not None or status.output is not None):
                self._record_outcome(entry, outcome_of(status))

    def _on_error(self, error: Error) -> None:
        entry = self.entries.get(error.task_id or "")
        if error.code == Code.INTERNAL:
            self.fail(f"the hub failed: {error.message}")
        agent_id, message = self.requests.get(error.reply_to or "", ("", None))
        if isinstance(message, Register) and message.resume == self.secrets.get(message.agent_id or "", ""):
            self.fail(f"{message.agent_id} was refused with its right secret: {error.code} {error.message}")
        if entry is None or not entry.is_acknowledged or entry.is_unpromised:
            return
        if error.code == Code.UNKNOWN_TASK and self._keeps_ended:
            self.fail(f"{error.task_id} was acknowledged, and now it is not known")
        if isinstance(message, Delegate) and agent_id == entry.requester and is_same(entry.request, message):
            self.fail(f"{error.task_id} was acknowledged, and then refused with {error.code}")

    # What the hub noticed by itself.

    def lost(self, connection: Connection, at: float) -> None:
        """Enter that the hub has noticed the end of a connection: the grace time of its agent begins."""
        agent_id = connection.session or ""
        if connection.is_attended and self._online.get(agent_id) is connection:
            self.disconnected_since[agent_id] = at
            if agent_id in self._resumable:
                self._resumable[agent_id] = at + self._grace_s
        connection.is_attended = False

    def redelivered(self, task_id: str) -> None:
        """Enter that an outcome did not reach a connection, so that the hub may deliver it once more."""
        self.entries[task_id].outcomes_due += 1

    # What a restart means.

    def wrote(self, changes: Changes, skew_s: float) -> list[str]:
        """Enter what is on disk from now on; return the tasks whose times were set with the clock."""
        moved = []
        if abs(skew_s - self._journal_skew_s) > CLOCK_STEP_S:
            for task_id, entry in self.entries.items():
                if entry.due_wall is not None:
                    entry.due_wall += skew_s - self._journal_skew_s
                    moved.append(task_id)
            self._journal_skew_s = skew_s
        for row in changes.inserted.values():
            entry = self.entries[row.request.task_id]
            entry.due_wall = None if entry.due is None else entry.due + self._journal_skew_s
        for row in (*changes.inserted.values(), *changes.updated.values()):
            if row.end is not None:
                self.entries[row.request.task_id].is_over = True
            entry = self.entries[row.request.task_id]
            entry.latest_written = row.life.asked
            if row.life.talk is not None and row.life.talk.answer is not None:
                entry.answers_written.add(row.life.talk.ask)
        return moved

    def died(self, at: float, *, is_journaled: bool) -> None:
        """Enter the end of a hub: what it had not written is undone, and without a journal that is everything."""
        for entry in self.entries.values():
            if not is_journaled:
                entry.is_forgotten = entry.is_forgotten or entry.due is not None
            elif entry.due_wall is None:
                entry.due = None
            entry.holder = None
            entry.outcomes, entry.outcomes_due = 0, 1
            entry.latest = entry.latest_written
            entry.shown.clear()
            entry.brought.clear()
        self._waiting.clear()
        self.workers.clear()
        self._online.clear()
        if not is_journaled:
            self._resumable.clear()
            self.disconnected_since.clear()
        self._resumable = {agent_id: until for agent_id, until in self._resumable.items() if until > at + EPSILON_S}

    def restarted(self, now: float, skew_s: float) -> None:
        """Count time on by the wall clock; but nothing lives longer than its ttl from here on."""
        self._journal_skew_s = skew_s
        for entry in self.entries.values():
            if entry.due_wall is not None and not entry.is_over:
                entry.due = min(entry.due_wall - skew_s, now + entry.request.ttl)
        for agent_id in self.disconnected_since:
            self.disconnected_since[agent_id] = now
        self._resumable = dict.fromkeys(self._resumable, now + self._grace_s)

    def taint(self, task_ids: dict[str, None], agent_ids: dict[str, None]) -> None:
        """Ask nothing about these any more: what was written about them last is lost."""
        self.tainted_agents.update(agent_ids)
        for agent_id in agent_ids:
            self._resumable.pop(agent_id, None)
        for task_id, entry in self.entries.items():
            if task_id in task_ids or entry.requester in agent_ids or (entry.parent and entry.parent.is_tainted):
                entry.is_tainted = True

    def renew(self, task_id: str, requester: str, request: Delegate) -> None:
        """Begin a task again that was forgotten with its hub."""
        former = self.entries[task_id]
        self.entries[task_id] = Entry(request, requester, former.parent)

    # What an observer sees.

    def audit(
        self, tasks: StatusReply, agents: Discovered, now: float, started: float, *, is_idle: bool = True
    ) -> None:
        """Check one listing of the hub: no task is overdue, waits needlessly, or is at an agent that is gone.

        A hub that is not idle has left something to its next tick, perhaps tasks for an agent that is free, or those of
        one that is gone.
        """
        listed = {one.task_id: one for one in tasks.tasks or ()}
        is_due = any(one.state == TaskState.PENDING and one.ttl <= 0.001 for one in listed.values())
        running: collections.Counter[str | None] = collections.Counter()
        for one in listed.values():
            self._note_waiting(one.task_id, one.state, one.attempt)
            if one.state in FINAL:
                continue
            entry = self.entries[one.task_id]
            late_s = now - max(entry.due if entry.due is not None else now, started)
            if late_s > TIMER_LATE_S + EPSILON_S and not entry.is_tainted:
                self.fail(f"{one.task_id} is {one.state} {late_s:g} s after its deadline")
            parent = listed.get(one.parent_id or "")
            if one.parent_id is not None and (parent is None or parent.state != TaskState.IN_PROGRESS):
                self.fail(f"{one.task_id} goes on, and its parent task {one.parent_id} does not")
            if one.state == TaskState.IN_PROGRESS:
                running[one.agent_id] += 1
                since = self.disconnected_since.get(one.agent_id or "")
                if is_idle and since is not None and now - since > self._grace_s + TIMER_LATE_S + EPSILON_S:
                    self.fail(f"{one.task_id} is still at {one.agent_id}, disconnected for {now - since:g} s")
            elif is_idle and not is_due:  # An agent whose next task is due waits for the tick that ends that one.
                for agent in agents.agents:
                    is_able = one.capability in (None, *(each.name for each in agent.capabilities))
                    is_meant = agent.agent_id == one.agent_id if one.agent_id else agent.agent_id != one.requester
                    if is_able and is_meant and agent.running < agent.max_tasks:
                        self.fail(f"{one.task_id} waits, and {agent.agent_id}, which could take it, is free")
        for agent in agents.agents:
            if running[agent.agent_id] != agent.running:
                self.fail(f"{agent.agent_id} has {agent.running} tasks, and {running[agent.agent_id]} are listed")
            worker = self.workers.get(agent.agent_id)
            if worker is not None and agent.max_tasks != worker.max_tasks:
                self.fail(f"{agent.agent_id} has max_tasks {agent.max_tasks} instead of {worker.max_tasks}")

    def audit_talks(self, tasks: StatusReply) -> None:
        """Check that each question which waits was sent to its requester, and each answer to its worker."""
        for one in tasks.tasks or ():
            entry = self.entries[one.task_id]
            number = max(entry.asked.values(), default=0)
            if one.state != TaskState.IN_PROGRESS or not number or entry.is_unpromised:
                continue
            if entry.numbers[number][1] != one.attempt or entry.latest > number:
                continue
            if number in entry.replied or number in entry.answers_written:
                self._require(entry.brought.get(number), one.agent_id, f"{one.task_id}: the answer to {number}")
            elif number not in entry.brought:  # An answer may be on its way to the disk.
                self._require(entry.shown.get(number), one.requester, f"{one.task_id}: question {number}")

    def _require(self, sent_on: Connection | None, agent_id: str | None, what: str) -> None:
        connection = self._online.get(agent_id or "")
        is_known = connection is not None and connection.is_attended and agent_id not in self.tainted_agents
        if is_known and sent_on is not connection:
            self.fail(f"{what} was not sent to {agent_id}, which is online")


def is_same(one: Delegate, other: Delegate) -> bool:
    """Return whether two delegates are the same but for their ids."""
    return dataclasses.replace(one, id=None) == dataclasses.replace(other, id=None)


def outcome_of(message: Result | TaskOutcome | StatusReply) -> tuple[Any, ...]:
    """Return the outcome of a task in a form that can be compared."""
    error = message.error
    if isinstance(error, str):
        error = ErrorInfo(Code.FAILED, error)
    success = message.state == TaskState.COMPLETED if isinstance(message, StatusReply) else message.success
    return success, message.output, error.code if error else None, error.message if error else None
