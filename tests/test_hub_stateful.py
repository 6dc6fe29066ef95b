"""Section 4 again: a machine that does anything in any order to a Hub, and what must hold after every step.

All that the hub decides is entered in a `Ledger` and must agree with the hub's records; the hub's indexes must agree
with what follows from these records. Each seed makes the same histories everywhere; the first few are in each run, the
others are long. Many more, for a night:

    HUB_SEEDS=2000 python -m pytest -n auto -m "long or not long" tests/test_hub_stateful.py
"""

from __future__ import annotations

import collections
import dataclasses
import os
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

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
    TaskRecord,
    TaskState,
)
from tests.harness import Client, HubHarness, snapshot
from tests.ledger import Entry, Ledger

DISCONNECTED, INTERRUPTED, DRAINING = AgentState.DISCONNECTED, AgentState.INTERRUPTED, AgentState.DRAINING
DISCONNECTED, INTERRUPTED, DRAINING = AgentState.DISCONNECTED, AgentState.INTERRUPTED, AgentState.DRAINING
Picked = TypeVar("Picked")

FOREVER_S = 1e6  # Longer than everything else that takes time here.
TTL_MAX_S = 60.0
CAPABILITIES = ["a", "b", "c"]
OFFERS = st.lists(st.sampled_from(CAPABILITIES), max_size=3, unique=True)
ANY = st.integers(0, 1000)  # The index of one of several, modulo their number.


def pick(items: list[Picked], number: int) -> Picked:
    return items[number % len(items)]


class HubMachine(RuleBasedStateMachine):
    """A hub, its clients, and the ledger of what was done to it."""

    @initialize(
        retention_s=st.sampled_from([5.0, FOREVER_S]),
        grace_s=st.sampled_from([0.0, 10.0, 100.0]),
        heartbeat_s=st.sampled_from([5.0, 1e9]),
        joined=st.lists(st.tuples(OFFERS.filter(bool), st.integers(1, 3)), min_size=2, max_size=4),
    )
    def start(self, joined: list[tuple[list[str], int]], **options: float) -> None:
        self.options = options
        self.ledger = Ledger(grace_s=options["grace_s"], keeps_ended=options["retention_s"] == FOREVER_S)
        self.harness = HubHarness(**options, ledger=self.ledger)
        self.states: dict[str, TaskState] = {}  # Of all tasks that the hub has accepted, after the last step.
        self.ended_unseen: set[str] = set()  # Tasks that ended while their requester was not online.
        self.secrets: dict[str, str] = {}  # Each agent's, by its id.
        self.draining: dict[str, list[str]] = {}  # The requests to drain that wait for a reply, by connection.
        self.drains = 0
        self.actor: str | None = None
        self.message: Any = None
        self.before: dict[str, tuple[str | None, int]] = {}  # The assignee and the attempt of the open tasks.
        for offers, max_tasks in joined:
            self.enter(self.harness.connect(), Register(name="x", capabilities=[*offers], max_tasks=max_tasks))

    # The steps

    def do(self, client: Client | None, message: Any, *, quiet: bool = False) -> Any:
        """Send a message as one step; return the reply, if one came. A refusal must change nothing."""
        assert client is not None
        self.begin(getattr(client.registration, "agent_id", None), message)
        reply: Any = None
        memory = snapshot(self.harness.hub)
        if quiet or isinstance(message, InvalidMessage):
            client.tell(message)
            reply = next((one for one in client.inbox if isinstance(one, Error)), None)
        elif isinstance(message, Deregister) and message.drain:
            self.drains += 1
            message.id = f"drain-{self.drains}"
            self.draining.setdefault(client.connection, []).append(message.id)
            client.tell(message)
            reply = next((one for one in client.replies_to(message.id) if isinstance(one, Error)), None)
            if reply is not None:
                self.draining[client.connection].remove(message.id)
        else:
            reply = client.ask(message)
        if isinstance(reply, Error):
            assert snapshot(self.harness.hub) == memory, f"{reply} changed something"
        self.end()
        return reply

    def begin(self, actor: str | None = None, message: Any = None) -> None:
        self.actor, self.message, self.is_sound = actor, message, False
        self.watched = self.clients()  # Also those that the hub closes in this step.
        self.before = {
            task.task_id: (task.assignee.agent_id if task.assignee else None, task.attempt)
            for task in self.harness.hub.tasks.open.values()
        }

    def end(self) -> None:
        """Close the step: check all that the hub did in it."""
        for client in dict.fromkeys((*self.watched, *self.harness.clients.values())):
            self.read(client)
        for task in self.records():
            state = self.states.get(task.task_id)
            if state is not None and state is not task.state:
                self.check_move(task, state)
                self.states[task.task_id] = task.state
                if task.state in FINAL_STATES and not self.entry(task).outcomes:
                    assert self.online(self.entry(task).requester) is None, f"{task.task_id} was not delivered"
                    self.ended_unseen.add(task.task_id)
        self.is_sound = True

    def read(self, client: Client) -> None:
        waiting = self.draining.get(client.connection, [])
        for message in client.received():
            if isinstance(message, Deregistered) and message.reply_to in waiting:
                waiting.remove(str(message.reply_to))
        assert client.close_code != 1000 or not waiting, "it left and its request to drain was not answered"

    def entry(self, task: TaskRecord) -> Entry:
        return self.ledger.entries[task.task_id]

    def check_move(self, task: TaskRecord, former: TaskState) -> None:
        """Require that the sender of the message was entitled to move a task to another state."""
        assert former not in FINAL_STATES, f"{former} was final, and now it is {task.state}"
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
            assert task.deadline <= self.harness.now
        elif task.state is TaskState.FAILED and code == "cancelled":
            by_requester = result is not None and self.actor == self.entry(task).requester and not result.success
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

    # What the hub has

    def records(self) -> list[TaskRecord]:
        hub = self.harness.hub
        return [*hub.tasks.open.values(), *hub.tasks.delivered.values(), *hub.tasks.undelivered.values()]

    def agents(self) -> dict[str, AgentRecord]:
        return self.harness.hub.directory.agents

    def clients(self) -> list[Client]:
        return list(self.harness.clients.values())

    def registered(self) -> list[Client]:
        return [client for client in self.clients() if client.registration is not None]

    def online(self, agent_id: str) -> Client | None:
        return next((one for one in self.registered() if one.agent_id == agent_id), None)

    # Connections come and go

    @rule()
    @precondition(lambda self: len(self.harness.clients) < 8)
    def connect(self) -> None:
        self.begin()
        self.harness.connect()
        self.end()

    @rule(which=ANY, offers=OFFERS, max_tasks=st.integers(1, 3))
    @precondition(lambda self: self.harness.clients)
    def register(self, which: int, offers: list[str], max_tasks: int) -> None:
        self.enter(pick(self.clients(), which), Register(name="x", capabilities=[*offers], max_tasks=max_tasks))

    @rule(offers=OFFERS, max_tasks=st.integers(1, 3))
    @precondition(lambda self: len(self.harness.clients) < 8)
    def join(self, offers: list[str], max_tasks: int) -> None:
        self.enter(self.harness.connect(), Register(name="x", capabilities=[*offers], max_tasks=max_tasks))

    @rule(which=ANY, offers=OFFERS, max_tasks=st.integers(1, 3), is_honest=st.sampled_from([True, True, True, False]))
    @precondition(lambda self: self.secrets and len(self.harness.clients) < 12)
    def resume(self, which: int, offers: list[str], max_tasks: int, is_honest: bool) -> None:
        agent_id, secret = pick(list(self.secrets.items()), which)
        secret = secret if is_honest else "guessed"
        message = Register(name="y", capabilities=[*offers], max_tasks=max_tasks, agent_id=agent_id, resume=secret)
        is_known = agent_id in self.agents()
        reply = self.enter(self.harness.connect(), message)
        assert isinstance(reply, Error) == (is_known and not is_honest)
        assert isinstance(reply, Error) or (reply.agent_id == agent_id) == is_known

    def enter(self, client: Client, message: Register) -> Any:
        reply = self.do(client, message)
        if not isinstance(reply, Error):
            client.registration = reply
            self.secrets[reply.agent_id] = reply.resume
            refs = {ref.task_id: ref.attempt for ref in reply.tasks}
            running = self.agents()[reply.agent_id].running
            assert refs.items() <= {task_id: task.attempt for task_id, task in running.items()}.items()
        return reply

    @rule(which=ANY)
    @precondition(lambda self: self.harness.clients)
    def lose_connection(self, which: int) -> None:
        self.begin()
        client = pick(self.clients(), which)
        self.draining.pop(client.connection, None)
        client.lose_connection()
        self.end()

    @rule(which=ANY, drain=st.booleans())
    @precondition(lambda self: self.harness.clients)
    def deregister(self, which: int, drain: bool) -> None:
        self.do(pick(self.clients(), which), Deregister(drain=drain))

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
    @precondition(lambda self: self.harness.clients)
    def delegate(
        self, who: int, whom: int, by: str, capability: str, ttl: float, fields: Any, parent: int | None, quiet: bool
    ) -> None:
        client = pick(self.registered() or self.clients(), who)
        request = Delegate(task_id=f"t{len(self.states)}", ttl=ttl, **fields)
        if by in ("agent", "both") and self.secrets:
            request.agent_id = pick(list(self.secrets), whom)
        if by in ("capability", "both"):
            request.capability = capability
        if parent is not None and client.registration is not None:
            mine = list(self.agents()[client.agent_id].running)
            request.parent_id = pick(mine, parent) if mine else pick([*self.states, "t-none"], parent)
        self.states[request.task_id] = TaskState.PENDING
        if isinstance(self.do(client, request, quiet=quiet), Error):
            del self.states[request.task_id], self.ledger.entries[request.task_id]
        else:
            record = self.harness.hub.tasks.find(request.task_id)
            assert record is not None
            assert record.deadline == self.entry(record).due

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

    @rule(which=ANY, changed=st.sampled_from([{}, {}, {"priority": 7}, {"input": 1}]), quiet=st.booleans())
    @precondition(lambda self: self.states)
    def delegate_again(self, which: int, changed: dict[str, Any], quiet: bool) -> None:
        task_id = pick(list(self.states), which)
        entry = self.ledger.entries[task_id]
        client, record = self.online(entry.requester), self.harness.hub.tasks.find(task_id)
        if client is None or record is None:
            return
        expected = entry.outcomes + (record.state in FINAL_STATES and not changed)
        reply = self.do(client, dataclasses.replace(entry.request, **changed, id=None), quiet=quiet)
        assert isinstance(reply, Error) == bool(changed)
        assert entry.outcomes == expected

    @rule(
        which=ANY,
        outcome=st.sampled_from(["success", "success", "success", "error", "agent_lost"]),
        attempt=st.sampled_from([None, 0, 0, -1, 1]),
        quiet=st.booleans(),
    )
    @precondition(lambda self: self.harness.hub.tasks.in_progress)
    def result_from_its_assignee(self, which: int, outcome: str, attempt: int | None, quiet: bool) -> None:
        tasks = [one for one in self.harness.hub.tasks.open.values() if one.assignee is not None]
        task = pick([one for one in tasks if one.attempt > 1 and which % 2] or tasks, which)
        assert task.assignee is not None
        client = self.online(task.assignee.agent_id)
        if client is None:
            return
        number = max(1, task.attempt + attempt) if attempt is not None else None
        is_stale = number not in (None, task.attempt)
        reply = self.do(client, self.result(task.task_id, outcome, number), quiet=quiet)
        assert isinstance(reply, Error) == is_stale

    @rule(
        which=ANY,
        outcomes=st.lists(st.sampled_from(["success", "error", "agent_lost", "agent_lost"]), min_size=1, max_size=4),
        attempt=st.sampled_from([None, 0, -1]),
    )
    @precondition(lambda self: self.harness.hub.tasks.in_progress)
    def results_from_their_assignees(self, which: int, outcomes: list[str], attempt: int | None) -> None:
        for outcome in outcomes:
            if self.harness.hub.tasks.in_progress:
                self.result_from_its_assignee(which, outcome, attempt, quiet=False)

    def result(self, task_id: str, outcome: str, attempt: int | None = None) -> Result:
        if outcome == "success":
            return Result(task_id=task_id, success=True, output=[task_id], attempt=attempt)
        error: Any = ErrorInfo("agent_lost") if outcome == "agent_lost" else outcome
        return Result(task_id=task_id, success=False, error=error, attempt=attempt)

    @rule(who=ANY, which=ANY, outcome=st.sampled_from(["success", "error"]), attempt=st.sampled_from([None, 1, 2]))
    @precondition(lambda self: self.harness.clients and self.states)
    def result_from_anybody(self, who: int, which: int, outcome: str, attempt: int | None) -> None:
        task_id = pick(list((who % 2 and self.harness.hub.tasks.open) or self.states), which)
        self.do(pick(self.clients(), who), self.result(task_id, outcome, attempt))

    @rule(which=ANY)
    @precondition(lambda self: self.harness.hub.tasks.open)
    def cancel(self, which: int) -> None:
        task = pick(list(self.harness.hub.tasks.open.values()), which)
        client = self.online(task.requester.agent_id)
        if client is not None:
            self.do(client, Result(task_id=task.task_id, success=False))
            assert task.state is TaskState.FAILED

    @rule(who=ANY, which=ANY, progress=st.none() | st.floats(0, 1), detail=st.none() | st.just([1]))
    @precondition(lambda self: self.harness.clients and self.states)
    def report_or_ask(self, who: int, which: int, progress: float | None, detail: Any) -> None:
        task_id = pick(list((who % 2 and self.harness.hub.tasks.open) or self.states), which)
        message = Status(task_id=task_id, progress=progress, detail=detail)
        self.do(pick(self.clients(), who), message)

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
    @precondition(lambda self: self.harness.clients)
    def say(self, who: int, message: AgentMessage | InvalidMessage, quiet: bool) -> None:
        if not isinstance(message, InvalidMessage):
            message = dataclasses.replace(message)
        self.do(pick(self.clients(), who), message, quiet=quiet)

    # Time passes

    @rule(seconds=st.floats(0, 40) | st.sampled_from([0.0, 5.0, 10.0, 15.0]))
    def pass_time(self, seconds: float) -> None:
        end = self.harness.now + seconds
        while self.harness.hub.next_deadline() <= end:
            self.tick()
        self.harness.now = end

    @rule()
    def tick(self) -> None:
        """Go to the next deadline, exactly."""
        self.harness.now = max(self.harness.now, self.harness.hub.next_deadline())
        self.begin(None, "time")
        self.harness.tick()
        self.end()
        assert self.harness.hub.next_deadline() > self.harness.now
        self.no_task_is_open_past_its_deadline()

    @rule(seconds=st.floats(-100, 100))
    @precondition(lambda self: self.harness.hub.tasks.open)
    def tick_late_or_in_the_past(self, seconds: float) -> None:
        """Go on as a server does that was held up, with one tick for all that has come due, or whose clock jumped."""
        self.begin(None, "time")
        at = self.harness.now + seconds
        self.harness.now = max(self.harness.now, at)
        self.harness.tick(at)
        self.end()
        self.no_task_is_open_past_its_deadline()

    def no_task_is_open_past_its_deadline(self) -> None:
        assert all(task.deadline > self.harness.now for task in self.harness.hub.tasks.open.values())

    # What must hold after every step

    @invariant()
    def tasks_agree_with_the_ledger(self) -> None:
        assert set(self.harness.hub.tasks.open) == {
            one for one, state in self.states.items() if state not in FINAL_STATES
        }
        for task in self.records():
            entry = self.entry(task)
            recorded = self.states[task.task_id], entry.delivered, entry.due
            assert (task.state, task.attempt, task.deadline) == recorded
            assert (task.state is TaskState.IN_PROGRESS) <= (task.assignee is not None)
            assert task.attempt <= 1 + task.request.max_retries

    @invariant()
    def counters_agree_with_the_records(self) -> None:
        hub = self.harness.hub
        assert hub.tasks.counts == {state: sum(one.state is state for one in self.records()) for state in TaskState}
        assert hub.tasks.ended == {state: sum(one is state for one in self.states.values()) for state in FINAL_STATES}
        assert hub.tasks.bytes == sum(task.bytes for task in self.records())
        ended = (*hub.tasks.delivered.values(), *hub.tasks.undelivered.values())
        assert hub.tasks.ended_bytes == sum(task.bytes for task in ended)
        held = (*hub.tasks.open.values(), *hub.tasks.undelivered.values())
        for agent in hub.directory.agents.values():
            assert agent.held_bytes == sum(task.bytes for task in held if task.requester is agent)

    @invariant()
    def agents_hold_what_the_records_say(self) -> None:
        agents = self.agents()
        running, awaited, requested, undelivered = (collections.defaultdict(set) for _ in range(4))
        for task in self.harness.hub.tasks.open.values():
            requested[task.requester].add(task.task_id)
            if task.assignee is not None:
                running[task.assignee].add(task.task_id)
            elif task.request.agent_id in agents:
                awaited[agents[task.request.agent_id]].add(task.task_id)
        for task in self.harness.hub.tasks.undelivered.values():
            undelivered[task.requester].add(task.task_id)
        for agent in {*agents.values(), *running, *awaited, *requested, *undelivered}:
            assert set(agent.running) == running.get(agent, set())
            assert set(agent.awaited) == awaited.get(agent, set())
            assert set(agent.requested) == requested.get(agent, set())
            assert set(agent.undelivered) == undelivered.get(agent, set())
            assert agent.state not in LEFT_STATES or not agent.running
            assert agent.connection is None or not agent.undelivered
        assert set(running) | set(awaited) <= set(agents.values())
        # The outcomes of an agent that was gone and had to make room for another stay until their retention is over.
        assert {agent for agent in undelivered if agent.state not in LEFT_STATES} <= set(agents.values())

    @invariant()
    def pools_agree_with_the_agents(self) -> None:
        members: dict[str, set[str]] = collections.defaultdict(set)
        free: dict[str, dict[int, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
        for agent in self.agents().values():
            if agent.state in TARGET_STATES:
                for name in agent.capabilities:
                    members[name].add(agent.agent_id)
                    if agent.free_load is not None:
                        free[name][len(agent.running)].add(agent.agent_id)
        pools = self.harness.hub.directory.pools
        assert {name: set(pool.members) for name, pool in pools.items()} == members
        listed = {
            name: {load: set(ids) for load, ids in pool.free.items()} for name, pool in pools.items() if pool.free
        }
        assert listed == free

    @invariant()
    def queues_agree_with_the_pending_tasks(self) -> None:
        pending: dict[Any, dict[AgentRecord, set[TaskRecord]]] = {}
        for task in self.harness.hub.tasks.open.values():
            if task.state is TaskState.PENDING:
                queue = pending.setdefault((task.request.agent_id, task.request.capability), {})
                queue.setdefault(task.requester, set()).add(task)
        queues = self.harness.hub.pending.queues
        assert {
            target: {requester: set(heap.alive) for requester, heap in queue.by_requester.items()}
            for target, queue in queues.items()
        } == pending
        for target, queue in queues.items():
            heads = {requester: min(task.queue_key for task in tasks) for requester, tasks in pending[target].items()}
            assert {requester: (key[0], key[2]) for requester, key in alive(queue.heads).items()} == heads
            assert {requester: key[1] for requester, key in alive(queue.heads).items()} == queue.turns

    @invariant()
    def no_task_waits_while_an_agent_is_free_for_it(self) -> None:
        for task in self.harness.hub.tasks.open.values():
            if task.state is TaskState.PENDING:
                for agent in self.agents().values():
                    assert not (agent.free_load is not None and may_take(agent, task)), (
                        f"{agent.agent_id} for {task.task_id}"
                    )

    @invariant()
    def no_child_outlives_its_parent(self) -> None:
        for task in self.harness.hub.tasks.open.values():
            if task.parent is not None:
                assert task.parent.state is TaskState.IN_PROGRESS
                assert task.deadline <= task.parent.deadline
                assert (task.parent.children or {})[task.task_id] is task
            assert set(task.children or {}) <= set(self.harness.hub.tasks.open)

    @invariant()
    def deadlines_are_those_of_tasks_connections_and_disconnected_agents(self) -> None:
        hub = self.harness.hub
        disconnected = {agent for agent in self.agents().values() if agent.state in (DISCONNECTED, INTERRUPTED)}
        deadlines = alive(hub.deadlines)
        assert set(deadlines) == {*hub.tasks.open.values(), *hub.connections.values(), *disconnected}
        assert all(deadlines[task] == task.deadline for task in hub.tasks.open.values())
        assert hub.next_deadline() <= min([task.deadline for task in hub.tasks.open.values()], default=FOREVER_S)

    @invariant()
    def connections_are_those_of_the_harness(self) -> None:
        hub = self.harness.hub
        assert set(hub.connections) == set(self.harness.clients)
        for client in self.clients():
            agent = hub.connections[client.connection].agent
            assert (agent is None) == (client.registration is None)
            assert agent is None or (
                agent.connection is hub.connections[client.connection] and agent.agent_id == client.agent_id
            )
        for agent_id, agent in self.agents().items():
            assert agent.agent_id == agent_id
            assert (agent.connection is not None) == (agent.state in (ONLINE, DRAINING))
            assert (agent_id in hub.directory.gone) == (agent.state in LEFT_STATES)

    # In the end

    def teardown(self) -> None:
        if not getattr(self, "is_sound", False):
            return  # There is a failure to report already.
        self.all_reconnect()
        self.pass_time(2 * TTL_MAX_S)
        self.all_reconnect()  # Also the agents that were silent for too long.
        for task_id, state in self.states.items():
            assert state in FINAL_STATES
            entry, was_dropped = self.ledger.entries[task_id], self.harness.hub.tasks.find(task_id) is None
            late = task_id in self.ended_unseen and (was_dropped or entry.outcomes == entry.outcomes_due - 1)
            assert entry.outcomes == entry.outcomes_due or late
            assert entry.outcomes or was_dropped or task_id in self.harness.hub.tasks.delivered
        assert not any(self.draining.get(client.connection) for client in self.clients())
        for client in self.registered():
            self.do(client, Deregister())
        for client in self.clients():
            client.lose_connection()
        self.pass_time(self.options["grace_s"] + self.options["retention_s"] + 60)
        assert self.harness.is_empty()

    def all_reconnect(self) -> None:
        for agent_id, secret in list(self.secrets.items()):
            if agent_id in self.agents() and self.online(agent_id) is None:
                self.enter(self.harness.connect(), Register(name="z", agent_id=agent_id, resume=secret))


def alive(heap: LazyHeap[Any]) -> dict[Any, Any]:
    return {item: key for key, serial, item in heap.entries if heap.alive.get(item) == serial}


def may_take(agent: AgentRecord, task: TaskRecord) -> bool:
    if task.request.agent_id not in (None, agent.agent_id):
        return False
    if task.request.capability is not None and task.request.capability not in agent.capabilities:
        return False
    return task.request.agent_id is not None or task.requester is not agent


SEEDS = int(os.environ.get("HUB_SEEDS", "16"))
SHORT_SEEDS = 1  # The others are long.
EXAMPLES = 10  # Per seed; Hypothesis makes the first one as small as it can.


@pytest.mark.parametrize(
    "seed_", [pytest.param(one, marks=[pytest.mark.long] if one >= SHORT_SEEDS else []) for one in range(SEEDS)]
)
def test_hub_keeps_its_invariants_in_every_history(seed_: int) -> None:
    machine = seed(seed_)(type("HubMachine", (HubMachine,), {}))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES + 1,
            stateful_step_count=50,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
            print_blob=True,
        ),
    )
