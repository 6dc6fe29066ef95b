"""Section 4 again: a machine that does anything in any order to a Hub, and what must hold after every step.

The machine keeps books of its own from what goes in and what comes out, and compares them with the hub's; the hub's
indexes it makes again from the records and compares them too. Run it harder, for a night, with

    HUB_EXAMPLES=20000 python -m pytest tests/test_hub_stateful.py
"""

from __future__ import annotations

import collections
import dataclasses
import os
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agenthub import (
    FINAL_STATES,
    LEFT_STATES,
    ONLINE,
    TARGET_STATES,
    AgentMessage,
    AgentRecord,
    AgentState,
    Broadcast,
    Delegate,
    Delegated,
    Deregister,
    Deregistered,
    Discover,
    Error,
    ErrorInfo,
    Heartbeat,
    InvalidMessage,
    LazyHeap,
    Register,
    Result,
    Status,
    Step,
    TaskOutcome,
    TaskRecord,
    TaskState,
)
from tests.harness import Program, World, snapshot

DISCONNECTED, INTERRUPTED, DRAINING = AgentState.DISCONNECTED, AgentState.INTERRUPTED, AgentState.DRAINING
Picked = TypeVar("Picked")

FOREVER_S = 1e6  # Longer than everything else that takes time here.
TTL_MAX_S = 60.0
CAPABILITIES = ["a", "b", "c"]
OFFERS = st.lists(st.sampled_from(CAPABILITIES), max_size=3, unique=True)
ANY = st.integers(0, 1000)  # Which one of those there are, modulo their number.


def pick(items: list[Picked], number: int) -> Picked:
    return items[number % len(items)]


@dataclasses.dataclass
class Book:
    """What the machine knows of one task that the hub has accepted."""

    request: Delegate
    requester: str
    parent: Book | None
    deadline: float
    state: TaskState = TaskState.PENDING
    attempts: int = 0
    told: int = 0  # How often its end was told to its requester.
    asked: int = 1  # How often that was asked for: once, and once more for each repetition after its end.
    ended_unseen: bool = False  # Its requester was away, or had left.


class HubMachine(RuleBasedStateMachine):
    """A hub in a world, and the books of what was done to it."""

    @initialize(
        retention_s=st.sampled_from([5.0, FOREVER_S]),
        grace_s=st.sampled_from([0.0, 10.0, 100.0]),
        heartbeat_s=st.sampled_from([5.0, 1e9]),
        joined=st.lists(st.tuples(OFFERS.filter(bool), st.integers(1, 3)), min_size=2, max_size=4),
    )
    def start(self, joined: list[tuple[list[str], int]], **options: float) -> None:
        self.options = options
        self.world = World(**options)
        self.world.apply = self.apply  # type: ignore[method-assign]  # the machine listens in
        self.books: dict[str, Book] = {}
        self.secrets: dict[str, str] = {}  # Each agent's, by its id.
        self.departed: set[str] = set()
        self.delivered: collections.Counter[str] = collections.Counter()  # In this step, by agent.
        self.draining: dict[str, list[str]] = {}  # The requests to drain that wait for a reply, by connection.
        self.asked = 0
        self.actor: str | None = None
        self.message: Any = None
        self.before: dict[str, tuple[str | None, int]] = {}  # The assignee and the attempt of the open tasks.
        for offers, max_tasks in joined:
            self.enter(self.world.connect(), Register(name="x", capabilities=[*offers], max_tasks=max_tasks))

    # The steps

    def do(self, program: Program | None, message: Any, *, quiet: bool = False) -> Any:
        """Send a message as one step; return the reply, if one came. A refusal must change nothing."""
        assert program is not None
        self.begin(getattr(program.registration, "agent_id", None), message)
        reply: Any = None
        memory = snapshot(self.world.hub)
        if quiet or isinstance(message, InvalidMessage):
            program.tell(message)
            reply = next((one for one in program.inbox if isinstance(one, Error)), None)
        elif isinstance(message, Deregister) and message.drain:
            self.asked += 1
            message.id = f"drain-{self.asked}"
            self.draining.setdefault(program.connection, []).append(message.id)
            program.tell(message)
            reply = next((one for one in program.replies_to(message.id) if isinstance(one, Error)), None)
            if reply is not None:
                self.draining[program.connection].remove(message.id)
        else:
            reply = program.ask(message)
        if isinstance(reply, Error):
            assert snapshot(self.world.hub) == memory, f"{reply} changed something"
        self.end()
        return reply

    def begin(self, actor: str | None = None, message: Any = None) -> None:
        self.actor, self.message, self.is_sound = actor, message, False
        self.delivered.clear()
        self.before = {
            task.task_id: (task.assignee.agent_id if task.assignee else None, task.attempt)
            for task in self.world.hub.tasks.open.values()
        }

    def end(self) -> None:
        """Close the step: look at all that the hub did."""
        for program in list(self.world.programs.values()):
            program.received()
        for agent_id, got in self.delivered.items():
            agent = self.agents().get(agent_id)
            assert agent is None or agent.connection is None or len(agent.running) <= agent.max_tasks, f"{got} too many"
        for task in self.records():
            book = self.books.get(task.task_id)
            if book is not None and book.state is not task.state:
                self.check_move(book, task)
                book.state = task.state
                if task.state in FINAL_STATES and book.told == 0:
                    assert self.online(book.requester) is None, f"{task.task_id} has ended and nobody was told"
                    book.ended_unseen = True
        self.is_sound = True

    def apply(self, step: Step) -> None:
        """Hand effects on as the world does, and enter them in the books."""
        for connection, effect in step.effects:
            program = self.world.programs.get(connection)
            World.apply(self.world, Step([(connection, effect)]))
            assert program is not None
            if isinstance(effect, Delegated):
                self.on_delivery(program, effect)
            elif isinstance(effect, TaskOutcome):
                self.on_settled(program, effect)
            elif isinstance(effect, Deregistered) and effect.reply_to in self.draining.get(connection, ()):
                self.draining[connection].remove(str(effect.reply_to))
            elif program.close_code == 1000:
                self.departed.add(program.agent_id)
                assert not self.draining.get(connection), "it left and its wish to drain was not answered"

    def on_delivery(self, program: Program, delivery: Delegated) -> None:
        assert program.registration is None or program.agent_id == delivery.agent_id
        self.delivered[delivery.agent_id] += 1
        book = self.books.get(delivery.task_id)
        attempts = 0 if book is None else book.attempts
        assert delivery.attempt == attempts + 1
        assert delivery.ttl <= TTL_MAX_S
        if book is not None:
            assert delivery.attempt <= 1 + book.request.max_retries
            assert self.world.now < book.deadline
            request = book.request
            assert request.agent_id in (None, delivery.agent_id)
            if delivery.agent_id in self.agents():  # If not, it was lost in the same tick.
                assert request.capability in (None, *self.agents()[delivery.agent_id].capabilities)
            assert request.agent_id is not None or delivery.agent_id != book.requester
            book.attempts = delivery.attempt

    def on_settled(self, program: Program, settled: TaskOutcome) -> None:
        book = self.books[settled.task_id]
        assert program.registration is None or program.agent_id == book.requester
        record = self.world.hub.tasks.find(settled.task_id)
        assert record is not None
        assert settled.state == record.state
        assert book.state in (settled.state, *(state for state in TaskState if state not in FINAL_STATES))
        book.told += 1
        assert book.told <= book.asked

    def check_move(self, book: Book, task: TaskRecord) -> None:
        """See that whoever moved a task to another state was entitled to."""
        assert book.state not in FINAL_STATES, f"{book.state} was final, and now it is {task.state}"
        assignee, attempt = self.before.get(task.task_id, (None, 0))
        code = task.error.code if task.error is not None else None
        result = self.message if isinstance(self.message, Result) and self.message.task_id == task.task_id else None
        from_assignee = result is not None and assignee is not None and self.actor == assignee
        if from_assignee and result is not None:
            from_assignee = result.attempt in (None, attempt)
        if task.state is TaskState.COMPLETED:
            assert from_assignee
            assert result is not None
            assert result.success
        elif task.state is TaskState.TIMEOUT:
            assert self.message == "time"
            assert task.deadline <= self.world.now
        elif task.state is TaskState.FAILED and code == "cancelled":
            by_requester = result is not None and self.actor == book.requester and not result.success
            assert (
                by_requester
                or (task.parent is not None and task.parent.state is not TaskState.IN_PROGRESS)
                or (task.parent is not None and task.parent.attempt != self.before[task.parent.task_id][1])
            )
        elif task.state is TaskState.FAILED and code == "agent_lost":
            assert self.message == "time" or isinstance(self.message, Deregister) or result is not None or self.draining
        elif task.state is TaskState.FAILED:
            assert from_assignee
            assert result is not None
            assert not result.success

    # What there is

    def records(self) -> list[TaskRecord]:
        hub = self.world.hub
        return [*hub.tasks.open.values(), *hub.tasks.delivered.values(), *hub.tasks.undelivered.values()]

    def agents(self) -> dict[str, AgentRecord]:
        return self.world.hub.directory.agents

    def programs(self) -> list[Program]:
        return list(self.world.programs.values())

    def registered(self) -> list[Program]:
        return [program for program in self.programs() if program.registration is not None]

    def online(self, agent_id: str) -> Program | None:
        return next((one for one in self.registered() if one.agent_id == agent_id), None)

    # Connections come and go

    @rule()
    @precondition(lambda self: len(self.world.programs) < 8)
    def connect(self) -> None:
        self.begin()
        self.world.connect()
        self.end()

    @rule(which=ANY, offers=OFFERS, max_tasks=st.integers(1, 3))
    @precondition(lambda self: self.world.programs)
    def register(self, which: int, offers: list[str], max_tasks: int) -> None:
        self.enter(pick(self.programs(), which), Register(name="x", capabilities=[*offers], max_tasks=max_tasks))

    @rule(offers=OFFERS, max_tasks=st.integers(1, 3))
    @precondition(lambda self: len(self.world.programs) < 8)
    def join(self, offers: list[str], max_tasks: int) -> None:
        self.enter(self.world.connect(), Register(name="x", capabilities=[*offers], max_tasks=max_tasks))

    @rule(which=ANY, offers=OFFERS, max_tasks=st.integers(1, 3), is_honest=st.sampled_from([True, True, True, False]))
    @precondition(lambda self: self.secrets and len(self.world.programs) < 12)
    def resume(self, which: int, offers: list[str], max_tasks: int, is_honest: bool) -> None:
        agent_id, secret = pick(list(self.secrets.items()), which)
        secret = secret if is_honest else "guessed"
        message = Register(name="y", capabilities=[*offers], max_tasks=max_tasks, agent_id=agent_id, resume=secret)
        is_known = agent_id in self.agents()
        reply = self.enter(self.world.connect(), message)
        assert isinstance(reply, Error) == (is_known and not is_honest)
        assert isinstance(reply, Error) or (reply.agent_id == agent_id) == is_known

    def enter(self, program: Program, message: Register) -> Any:
        reply = self.do(program, message)
        if not isinstance(reply, Error):
            program.registration = reply
            self.secrets[reply.agent_id] = reply.resume
            self.departed.discard(reply.agent_id)
            refs = {ref.task_id: ref.attempt for ref in reply.tasks}
            running = self.agents()[reply.agent_id].running
            assert refs.items() <= {task_id: task.attempt for task_id, task in running.items()}.items()
        return reply

    @rule(which=ANY)
    @precondition(lambda self: self.world.programs)
    def lose_connection(self, which: int) -> None:
        self.begin()
        program = pick(self.programs(), which)
        self.draining.pop(program.connection, None)
        program.lose_connection()
        self.end()

    @rule(which=ANY, drain=st.booleans())
    @precondition(lambda self: self.world.programs)
    def deregister(self, which: int, drain: bool) -> None:
        self.do(pick(self.programs(), which), Deregister(drain=drain))

    # Tasks

    @rule(
        who=ANY,
        whom=ANY,
        by=st.sampled_from(["capability", "capability", "capability", "agent", "both", "nothing"]),
        capability=st.sampled_from(CAPABILITIES),
        ttl=st.floats(0.5, TTL_MAX_S),
        fields=st.fixed_dictionaries(
            {"wait": st.booleans(), "priority": st.integers(-2, 2), "max_retries": st.integers(0, 2)}
        ),
        parent=st.none() | ANY,
        quiet=st.booleans(),
    )
    @precondition(lambda self: self.world.programs)
    def delegate(
        self, who: int, whom: int, by: str, capability: str, ttl: float, fields: Any, parent: int | None, quiet: bool
    ) -> None:
        program = pick(self.registered() or self.programs(), who)
        request = Delegate(task_id=f"t{len(self.books)}", ttl=ttl, **fields)
        if by in ("agent", "both") and self.secrets:
            request.agent_id = pick(list(self.secrets), whom)
        if by in ("capability", "both"):
            request.capability = capability
        if parent is not None and program.registration is not None:
            mine = list(self.agents()[program.agent_id].running)
            request.parent_id = pick(mine, parent) if mine else pick([*self.books, "t-none"], parent)
        self.books[request.task_id] = book = self.book_of(program, request)
        if isinstance(self.do(program, request, quiet=quiet), Error):
            del self.books[request.task_id]
        else:
            record = self.world.hub.tasks.find(request.task_id)
            assert record is not None
            assert record.deadline == book.deadline

    @rule(
        who=ANY,
        count=st.integers(2, 5),
        capability=st.sampled_from(CAPABILITIES),
        ttl=st.sampled_from([TTL_MAX_S, TTL_MAX_S, 5.0]),
        max_retries=st.integers(0, 2),
    )
    @precondition(lambda self: self.registered())
    def delegate_several(self, who: int, count: int, capability: str, ttl: float, max_retries: int) -> None:
        for _ in range(count):
            fields = {"wait": True, "priority": 0, "max_retries": max_retries}
            self.delegate(who, 0, "capability", capability, ttl, fields, who if who % 3 == 0 else None, quiet=True)

    def book_of(self, program: Program, request: Delegate) -> Book:
        parent = self.books.get(request.parent_id or "")
        deadline = min(self.world.now + request.ttl, parent.deadline if parent is not None else FOREVER_S * 2)
        return Book(request, program.agent_id if program.registration else "", parent, deadline)

    @rule(which=ANY, changed=st.sampled_from([{}, {}, {"priority": 7}, {"input": 1}]), quiet=st.booleans())
    @precondition(lambda self: self.books)
    def delegate_again(self, which: int, changed: dict[str, Any], quiet: bool) -> None:
        task_id, book = pick(list(self.books.items()), which)
        program, record = self.online(book.requester), self.world.hub.tasks.find(task_id)
        if program is None or record is None:
            return
        is_over = record.state in FINAL_STATES
        if is_over and not changed:
            book.asked = book.told + 1
        reply = self.do(program, dataclasses.replace(book.request, **changed, id=None), quiet=quiet)
        assert isinstance(reply, Error) == bool(changed)
        assert not is_over or changed or book.told == book.asked

    @rule(
        which=ANY,
        outcome=st.sampled_from(["success", "success", "success", "error", "agent_lost"]),
        attempt=st.sampled_from([None, 0, 0, -1, 1]),
        quiet=st.booleans(),
    )
    @precondition(lambda self: self.world.hub.in_progress)
    def result_from_its_assignee(self, which: int, outcome: str, attempt: int | None, quiet: bool) -> None:
        tasks = [one for one in self.world.hub.tasks.open.values() if one.assignee is not None]
        task = pick([one for one in tasks if one.attempt > 1 and which % 2] or tasks, which)
        assert task.assignee is not None
        program = self.online(task.assignee.agent_id)
        if program is None:
            return
        number = max(1, task.attempt + attempt) if attempt is not None else None
        is_stale = number not in (None, task.attempt)
        reply = self.do(program, self.result(task.task_id, outcome, number), quiet=quiet)
        assert isinstance(reply, Error) == is_stale

    @rule(
        which=ANY,
        outcomes=st.lists(st.sampled_from(["success", "error", "agent_lost", "agent_lost"]), min_size=1, max_size=4),
        attempt=st.sampled_from([None, 0, -1]),
    )
    @precondition(lambda self: self.world.hub.in_progress)
    def results_from_their_assignees(self, which: int, outcomes: list[str], attempt: int | None) -> None:
        for outcome in outcomes:
            if self.world.hub.in_progress:
                self.result_from_its_assignee(which, outcome, attempt, quiet=False)

    def result(self, task_id: str, outcome: str, attempt: int | None = None) -> Result:
        if outcome == "success":
            return Result(task_id=task_id, success=True, output=[task_id], attempt=attempt)
        error: Any = ErrorInfo("agent_lost") if outcome == "agent_lost" else outcome
        return Result(task_id=task_id, success=False, error=error, attempt=attempt)

    @rule(who=ANY, which=ANY, outcome=st.sampled_from(["success", "error"]), attempt=st.sampled_from([None, 1, 2]))
    @precondition(lambda self: self.world.programs and self.books)
    def result_from_anybody(self, who: int, which: int, outcome: str, attempt: int | None) -> None:
        task_id = pick(list((who % 2 and self.world.hub.tasks.open) or self.books), which)
        self.do(pick(self.programs(), who), self.result(task_id, outcome, attempt))

    @rule(which=ANY)
    @precondition(lambda self: self.world.hub.tasks.open)
    def cancel(self, which: int) -> None:
        task = pick(list(self.world.hub.tasks.open.values()), which)
        program = self.online(task.requester.agent_id)
        if program is not None:
            self.do(program, Result(task_id=task.task_id, success=False))
            assert task.state is TaskState.FAILED

    @rule(who=ANY, which=ANY, progress=st.none() | st.floats(0, 1), detail=st.none() | st.just([1]))
    @precondition(lambda self: self.world.programs and self.books)
    def report_or_ask(self, who: int, which: int, progress: float | None, detail: Any) -> None:
        task_id = pick(list((who % 2 and self.world.hub.tasks.open) or self.books), which)
        message = Status(task_id=task_id, progress=progress, detail=detail)
        self.do(pick(self.programs(), who), message)

    @rule(
        who=ANY,
        message=st.sampled_from(
            [
                Heartbeat(),
                Status(),
                Status(tasks=True),
                Discover(),
                Discover(capability="a"),
                Broadcast(message=1),
                Broadcast(message=1, capability="a"),
                InvalidMessage("nonsense"),
            ]
        ),
        quiet=st.booleans(),
    )
    @precondition(lambda self: self.world.programs)
    def say(self, who: int, message: AgentMessage | InvalidMessage, quiet: bool) -> None:
        if not isinstance(message, InvalidMessage):
            message = dataclasses.replace(message)
        self.do(pick(self.programs(), who), message, quiet=quiet)

    # Time passes

    @rule(seconds=st.floats(0, 40) | st.sampled_from([0.0, 5.0, 10.0, 15.0]))
    def pass_time(self, seconds: float) -> None:
        end = self.world.now + seconds
        while self.world.hub.next_deadline() <= end:
            self.tick()
        self.world.now = end

    @rule()
    def tick(self) -> None:
        """Go to the next deadline, exactly."""
        self.world.now = max(self.world.now, self.world.hub.next_deadline())
        self.begin(None, "time")
        self.world.apply(self.world.hub.tick(self.world.now))
        self.end()
        assert self.world.hub.next_deadline() > self.world.now
        self.no_task_is_open_past_its_deadline()

    @rule(seconds=st.floats(-100, 100))
    @precondition(lambda self: self.world.hub.tasks.open)
    def tick_late_or_in_the_past(self, seconds: float) -> None:
        """Go on as a server does that was held up, with one tick for all that has come due, or whose clock jumped."""
        self.begin(None, "time")
        self.world.apply(self.world.hub.tick(self.world.now + seconds))
        self.world.now = max(self.world.now, self.world.now + seconds)
        self.end()
        self.no_task_is_open_past_its_deadline()

    def no_task_is_open_past_its_deadline(self) -> None:
        assert all(task.deadline > self.world.now for task in self.world.hub.tasks.open.values())

    # What must hold after every step

    @invariant()
    def tasks_stand_as_the_books_say(self) -> None:
        open_books = {task_id for task_id, book in self.books.items() if book.state not in FINAL_STATES}
        assert set(self.world.hub.tasks.open) == open_books
        for task in self.records():
            book = self.books[task.task_id]
            assert (task.state, task.attempt, task.deadline) == (book.state, book.attempts, book.deadline)
            assert (task.state is TaskState.IN_PROGRESS) <= (task.assignee is not None)
            assert task.attempt <= 1 + task.request.max_retries

    @invariant()
    def counters_agree_with_the_records(self) -> None:
        hub = self.world.hub
        assert hub.tasks.counts == {state: sum(one.state is state for one in self.records()) for state in TaskState}
        ended = {state: sum(book.state is state for book in self.books.values()) for state in FINAL_STATES}
        assert hub.tasks.totals == ended
        assert hub.tasks.bytes == sum(task.bytes for task in self.records())
        assert hub.tasks.delivered_bytes == sum(task.bytes for task in hub.tasks.delivered.values())

    @invariant()
    def agents_hold_what_the_records_say(self) -> None:
        agents = self.agents()
        running, awaited, requested, undelivered = (collections.defaultdict(set) for _ in range(4))
        for task in self.world.hub.tasks.open.values():
            requested[task.requester].add(task.task_id)
            if task.assignee is not None:
                running[task.assignee].add(task.task_id)
            elif task.request.agent_id in agents:
                awaited[agents[task.request.agent_id]].add(task.task_id)
        for task in self.world.hub.tasks.undelivered.values():
            undelivered[task.requester].add(task.task_id)
        for agent in {*agents.values(), *running, *awaited, *requested, *undelivered}:
            assert set(agent.running) == running.get(agent, set())
            assert set(agent.awaited) == awaited.get(agent, set())
            assert set(agent.requested) == requested.get(agent, set())
            assert set(agent.undelivered) == undelivered.get(agent, set())
            assert agent.state not in LEFT_STATES or not agent.running
            assert agent.connection is None or not agent.undelivered
        assert set(running) | set(awaited) | set(undelivered) <= set(agents.values())

    @invariant()
    def pools_agree_with_the_agents(self) -> None:
        members: dict[str, set[str]] = collections.defaultdict(set)
        free: dict[str, dict[int, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
        for agent in self.agents().values():
            if agent.state in TARGET_STATES:
                for name in agent.capabilities:
                    members[name].add(agent.agent_id)
                    if agent.is_available:
                        free[name][len(agent.running)].add(agent.agent_id)
        pools = self.world.hub.directory.pools
        assert {name: set(pool.members) for name, pool in pools.items()} == members
        listed = {
            name: {load: set(ids) for load, ids in pool.free.items()} for name, pool in pools.items() if pool.free
        }
        assert listed == free

    @invariant()
    def queues_agree_with_the_pending_tasks(self) -> None:
        pending: dict[Any, dict[AgentRecord, set[TaskRecord]]] = {}
        for task in self.world.hub.tasks.open.values():
            if task.state is TaskState.PENDING:
                queue = pending.setdefault((task.request.agent_id, task.request.capability), {})
                queue.setdefault(task.requester, set()).add(task)
        queues = self.world.hub._queues
        assert {
            target: {requester: set(heap._alive) for requester, heap in queue._by_requester.items()}
            for target, queue in queues.items()
        } == pending
        for target, queue in queues.items():
            heads = {requester: min(task.queue_key for task in tasks) for requester, tasks in pending[target].items()}
            assert alive(queue._heads) == heads

    @invariant()
    def no_task_waits_while_an_agent_is_free_for_it(self) -> None:
        for task in self.world.hub.tasks.open.values():
            if task.state is TaskState.PENDING:
                for agent in self.agents().values():
                    assert not (agent.is_available and may_take(agent, task)), f"{agent.agent_id} for {task.task_id}"

    @invariant()
    def no_child_outlives_its_parent(self) -> None:
        for task in self.world.hub.tasks.open.values():
            if task.parent is not None:
                assert task.parent.state is TaskState.IN_PROGRESS
                assert task.deadline <= task.parent.deadline
                assert (task.parent.children or {})[task.task_id] is task
            assert set(task.children or {}) <= set(self.world.hub.tasks.open)

    @invariant()
    def deadlines_are_those_of_tasks_connections_and_agents_away(self) -> None:
        hub = self.world.hub
        away = {agent for agent in self.agents().values() if agent.state in (DISCONNECTED, INTERRUPTED)}
        deadlines = alive(hub._deadlines)
        assert set(deadlines) == {*hub.tasks.open.values(), *hub._connections.values(), *away}
        assert all(deadlines[task] == task.deadline for task in hub.tasks.open.values())
        assert hub.next_deadline() <= min([task.deadline for task in hub.tasks.open.values()], default=FOREVER_S)

    @invariant()
    def connections_are_those_of_the_world(self) -> None:
        hub = self.world.hub
        assert set(hub._connections) == set(self.world.programs)
        for program in self.programs():
            agent = hub._connections[program.connection].agent
            assert (agent is None) == (program.registration is None)
            assert agent is None or (
                agent.connection is hub._connections[program.connection] and agent.agent_id == program.agent_id
            )
        for agent_id, agent in self.agents().items():
            assert agent.agent_id == agent_id
            assert (agent.connection is not None) == (agent.state in (ONLINE, DRAINING))
            assert (agent_id in hub.directory.gone) == (agent.state in LEFT_STATES)

    # In the end

    def teardown(self) -> None:
        if not getattr(self, "is_sound", False):
            return  # There is a failure to report already.
        self.everybody_comes_back()
        self.pass_time(2 * TTL_MAX_S)
        self.everybody_comes_back()  # Those who were silent for too long.
        for task_id, book in self.books.items():
            assert book.state in FINAL_STATES
            was_dropped = self.world.hub.tasks.find(task_id) is None
            assert book.told == book.asked or (book.ended_unseen and (was_dropped or book.told == book.asked - 1))
            assert book.told or was_dropped or task_id in self.world.hub.tasks.delivered
        assert not any(self.draining.get(program.connection) for program in self.programs())
        for program in self.registered():
            self.do(program, Deregister())
        for program in self.programs():
            program.lose_connection()
        self.pass_time(self.options["grace_s"] + self.options["retention_s"] + 60)
        assert self.world.is_empty()

    def everybody_comes_back(self) -> None:
        for agent_id, secret in list(self.secrets.items()):
            if agent_id in self.agents() and self.online(agent_id) is None:
                self.enter(self.world.connect(), Register(name="z", agent_id=agent_id, resume=secret))


def alive(heap: LazyHeap[Any]) -> dict[Any, Any]:
    return {item: key for key, serial, item in heap._entries if heap._alive.get(item) == serial}


def may_take(agent: AgentRecord, task: TaskRecord) -> bool:
    if task.request.agent_id not in (None, agent.agent_id):
        return False
    if task.request.capability is not None and task.request.capability not in agent.capabilities:
        return False
    return task.request.agent_id is not None or task.requester is not agent


TestHub = HubMachine.TestCase
TestHub.settings = settings(
    max_examples=int(os.environ.get("HUB_EXAMPLES", "150")),
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
