"""Section 4, Hub: every decision, told as stories in a world with a clock of its own. No socket, no loop."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agenthub
from agenthub import (
    RECORD_BYTES,
    TICK_BATCH,
    TRANSITIONS,
    AgentInfo,
    AgentMessage,
    AgentRecord,
    Broadcast,
    BroadcastReply,
    Capability,
    Close,
    Delegate,
    Delegated,
    Deregister,
    Deregistered,
    Discover,
    Discovered,
    Error,
    ErrorInfo,
    Heartbeat,
    HeartbeatAck,
    Hub,
    HubSettings,
    IllegalTransition,
    InvalidMessage,
    LazyHeap,
    PendingQueue,
    Pool,
    Register,
    Result,
    Status,
    StatusReply,
    Step,
    TaskAck,
    TaskEvent,
    TaskOutcome,
    TaskRecord,
    TaskRef,
    TaskState,
    encode,
)
from tests.harness import Client, HubHarness, rank_of, snapshot
from tests.ledger import Ledger

ROOT = Path(agenthub.__file__).parent


def couple(**options: Any) -> tuple[HubHarness, Client, Client]:
    """Return a world with an agent that can greet, and one that wants to be greeted."""
    world = HubHarness(**options)
    return world, world.join("worker", "greet"), world.join("requester")


def pair(**options: Any) -> tuple[Client, Client]:
    """Return the two alone, for stories in which nothing happens to the world."""
    return couple(**options)[1:]


def delivered(program: Client) -> list[str]:
    """Return the tasks that came in, in order."""
    return [message.task_id for message in program.received() if isinstance(message, Delegated)]


def handed_out(worker: Client) -> list[str]:
    """Let a worker that takes one task at a time complete all that it gets; return them in order."""
    order = []
    while got := delivered(worker):
        order += got
        worker.succeed(got[0])
    return order


def settled(program: Client) -> list[tuple[str, str, str | None]]:
    """Return the ends of tasks that came in, in order: id, state and code."""
    ends = [message for message in program.received() if isinstance(message, TaskOutcome)]
    return [(end.task_id, end.state, end.error and end.error.code) for end in ends]


def state_of(program: Client, task_id: str) -> str:
    return str(program.ask(Status(task_id=task_id)).state)


# Joining


def test_registration_gives_a_readable_identity_and_a_secret() -> None:
    world = HubHarness(heartbeat_s=30.0, message_bytes_max=5000)
    reply = world.connect().register("Code reviewer")
    assert reply.agent_id.startswith("Code-reviewer-")
    assert len(reply.agent_id) <= 128
    assert len(reply.resume) >= 32
    assert (reply.heartbeat_s, reply.max_bytes, reply.tasks) == (30.0, 5000, [])


def test_agents_of_one_name_are_told_apart() -> None:
    world = HubHarness()
    ids = {world.join("twin").agent_id for _ in range(50)}
    assert len(ids) == 50


def test_identity_that_is_taken_is_not_given_again() -> None:
    bytes_of = iter([b"1234", b"x" * 16, b"1234", b"5678", b"y" * 16])
    hub = Hub(HubSettings(), entropy=lambda size: next(bytes_of), now=0.0)
    ids = []
    for connection in ("a", "b"):
        hub.connected(connection, 0.0)
        ((_, reply),) = hub.receive(connection, Register(id="1", name="twin"), 0.0).effects
        ids.append(getattr(reply, "agent_id", None))
    assert ids == ["twin-31323334", "twin-35363738"]


@pytest.mark.parametrize("name", ["\N{SNOWMAN}", "a b/c", "x" * 128, " ", "../..", "<'\\\">"])
def test_identity_is_made_of_plain_characters(name: str) -> None:
    agent_id = HubHarness().join(name).agent_id
    assert agent_id.isascii()
    assert agent_id.isprintable()
    assert not set(agent_id) & set(" /\\'\"<>")


def test_registering_without_an_id_is_quiet_and_counts() -> None:
    world = HubHarness()
    quiet, loud = world.connect(), world.join("loud")
    quiet.tell(Register(name="quiet"))
    assert quiet.received() == []
    assert loud.ask(Discover()).total == 2


def test_second_registration_replaces_what_an_agent_is_and_keeps_who_it_is() -> None:
    worker, requester = pair()
    reply = worker.register("translator", "translate", max_tasks=3, metadata={"a": 1}, description="Translates")
    (info,) = [one for one in requester.ask(Discover()).agents if one.agent_id == worker.agent_id]
    assert info == AgentInfo(reply.agent_id, "translator", "Translates", [Capability("translate")], 0, 3, {"a": 1}, 0.0)
    assert requester.refused(Delegate(task_id="t", capability="greet")) == "no_agent"
    assert requester.delegate("u", "translate").state == "in_progress"


def test_second_registration_on_one_connection_ignores_another_identity() -> None:
    worker, requester = pair()
    assert requester.register("x", agent_id=worker.agent_id, resume=worker.registration.resume).agent_id != (
        worker.agent_id
    )


def test_capability_named_twice_counts_once() -> None:
    worker = HubHarness().join("worker", "greet", Capability("greet", "the second"))
    (info,) = worker.ask(Discover()).agents
    assert info.capabilities == [Capability("greet", "the second")]
    worker.lose_connection()


def test_new_capability_brings_the_tasks_that_wait_for_it() -> None:
    worker, requester = pair()
    requester.delegate("t", "sing", wait=True)
    worker.register("worker", "greet", "sing")
    assert delivered(worker) == ["t"]


def test_higher_limit_brings_more_tasks_at_once_and_a_lower_one_takes_none_back() -> None:
    world = HubHarness()
    worker = world.join("worker", "greet", max_tasks=1)
    requester = world.join("requester")
    for number in range(4):
        requester.delegate(f"t{number}", "greet")
    assert delivered(worker) == ["t0"]
    worker.register("worker", "greet", max_tasks=3)
    assert delivered(worker) == ["t1", "t2"]
    worker.register("worker", "greet", max_tasks=1)
    worker.succeed("t0")
    worker.succeed("t1")
    assert delivered(worker) == []
    worker.succeed("t2")
    assert delivered(worker) == ["t3"]


@pytest.mark.parametrize(
    "message",
    [
        Deregister(),
        Deregister(drain=True),
        Delegate(task_id="t", capability="greet"),
        Result(task_id="t", success=True),
        Status(task_id="t", progress=0.5),
        Broadcast(message="hello"),
        Heartbeat(),
    ],
)
def test_observer_may_do_nothing_else(message: AgentMessage) -> None:
    world, _, requester = couple()
    requester.delegate("t", "greet")
    assert world.connect().refused(message) == "not_registered"


def test_observer_may_look_and_is_no_agent() -> None:
    world, _, requester = couple()
    requester.delegate("t", "greet", input="secret")
    observer = world.connect()
    assert observer.ask(Discover()).total == 2
    assert observer.ask(Status()).hub["agents"] == 2
    assert [task.task_id for task in observer.ask(Status(tasks=True)).tasks] == ["t"]
    report = observer.ask(Status(task_id="t"))
    assert (report.state, report.input) == ("in_progress", None)


# Coming back


def test_identity_is_taken_up_again_with_its_secret() -> None:
    worker, requester = pair()
    requester.delegate("t", "greet")
    worker.lose_connection()
    back = worker.come_back("greet")
    assert back.agent_id == worker.agent_id
    assert back.registration.resume == worker.registration.resume
    assert back.registration.tasks == [TaskRef("t", 1)]
    assert back.received() == []  # It has the task: it is not delivered again.
    assert back.succeed("t").state == "completed"


@pytest.mark.parametrize("secret", [None, "guessed", "\N{SNOWMAN}"])
@pytest.mark.parametrize("is_online", [True, False])
def test_wrong_secret_is_unauthorized(secret: str | None, is_online: bool) -> None:
    world, worker, _ = couple()
    if not is_online:
        worker.lose_connection()
    message = Register(name="thief", agent_id=worker.agent_id, resume=secret)
    assert world.connect().refused(message) == "unauthorized"


def test_newer_connection_replaces_the_older() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "greet")
    back = worker.come_back("greet")
    assert worker.close_code == 4000
    assert back.registration.tasks == [TaskRef("t", 1)]
    assert requester.ask(Discover()).total == 2
    world.apply(world.hub.disconnected(worker.connection, world.now))  # The server reports its end as well.
    assert back.succeed("t").state == "completed"


def test_message_of_a_connection_that_was_closed_is_ignored() -> None:
    world, worker, _ = couple()
    back = worker.come_back("greet")
    before = snapshot(world.hub)
    assert world.hub.receive(worker.connection, Deregister(id="1"), world.now) == Step([])
    assert world.hub.receive(worker.connection, InvalidMessage("nonsense"), world.now) == Step([])
    assert snapshot(world.hub) == before
    assert back.close_code is None


def test_unknown_identity_becomes_a_new_one() -> None:
    agent = HubHarness().join("agent", agent_id="agent-of-another-hub", resume="secret")
    assert agent.agent_id != "agent-of-another-hub"
    assert agent.registration.resume != "secret"


def test_agent_that_is_away_is_not_found_and_counts_as_there() -> None:
    worker, requester = pair(grace_s=60.0)
    worker.lose_connection()
    assert requester.ask(Discover(capability="greet")).total == 0
    assert requester.ask(Status()).hub["agents"] == 1
    assert requester.delegate("t", "greet").state == "pending"
    assert requester.delegate("u", agent_id=worker.agent_id).state == "pending"
    back = worker.come_back("greet")
    assert delivered(back) == ["t", "u"]


def test_tasks_stay_with_an_agent_for_its_grace_time_and_fail_after_it() -> None:
    world, worker, requester = couple(grace_s=60.0)
    requester.delegate("t", "greet")
    worker.lose_connection()
    world.pass_time(59.9)
    assert state_of(requester, "t") == "in_progress"
    world.pass_time(0.1)
    assert settled(requester) == [("t", "failed", "agent_lost")]
    assert requester.refused(Delegate(task_id="u", capability="greet")) == "no_agent"
    assert requester.refused(Delegate(task_id="u", agent_id=worker.agent_id)) == "unknown_agent"


def test_grace_time_of_nothing_ends_at_once() -> None:
    world, worker, requester = couple(grace_s=0)
    requester.delegate("t", "greet")
    worker.lose_connection()
    world.pass_time(0)
    assert settled(requester) == [("t", "failed", "agent_lost")]


def test_coming_back_ends_the_grace_time() -> None:
    world, worker, requester = couple(grace_s=60.0)
    requester.delegate("t", "greet")
    worker.lose_connection()
    world.pass_time(59)
    back = worker.come_back("greet")
    world.pass_time(100)
    assert state_of(requester, "t") == "in_progress"
    back.lose_connection()  # And a new loss starts it again.
    world.pass_time(59)
    assert state_of(requester, "t") == "in_progress"


def test_occupied_slots_get_no_task_until_they_are_free() -> None:
    worker, requester = pair()
    worker.register("worker", "greet", max_tasks=2, occupied=1)
    for number in range(3):
        requester.delegate(f"t{number}", "greet")
    assert delivered(worker) == ["t0"]
    worker.register("worker", "greet", max_tasks=2)
    assert delivered(worker) == ["t1"]


def test_task_that_a_busy_agent_gives_back_goes_to_another_and_costs_no_retry() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "greet")
    assert delivered(worker) == ["t"]
    worker.register("worker", "greet", max_tasks=1, occupied=1)
    worker.fail("t", ErrorInfo("busy", "its slot is taken"))
    assert settled(requester) == []
    other = world.join("other", "greet")
    assert delivered(other) == ["t"]
    other.succeed("t")
    assert [(one.state, one.attempt) for one in requester.received() if isinstance(one, TaskOutcome)] == [
        ("completed", 1)
    ]


def test_busy_agent_gets_no_task_until_it_registers_again() -> None:
    _, worker, requester = couple()
    requester.delegate("t", "greet")
    assert delivered(worker) == ["t"]
    worker.fail("t", ErrorInfo("busy", "its slot is taken"))
    assert delivered(worker) == []
    requester.delegate("u", "greet")
    assert delivered(worker) == []
    worker.register("worker", "greet", max_tasks=2)
    assert delivered(worker) == ["t", "u"]


def test_task_that_an_agent_lost_on_the_way_is_given_up_by_it() -> None:
    worker, requester = pair()
    requester.delegate("t", "greet")
    worker.fail("t", ErrorInfo("agent_lost", "lost on the way"))
    assert settled(requester) == [("t", "failed", "agent_lost")]


def test_results_wait_for_a_requester_who_is_away() -> None:
    world, worker, requester = couple(grace_s=60.0)
    for task_id in ("t", "u", "v"):
        requester.delegate(task_id, "greet")
    requester.lose_connection()
    worker.succeed("t", "Hello")
    world.pass_time(100)  # Past its grace time, too: its tasks go on.
    worker.fail("u", "no voice")
    back = requester.come_back()
    assert back.agent_id == requester.agent_id
    first, second = back.received()
    assert (first.task_id, first.state, first.output) == ("t", "completed", "Hello")
    assert (second.task_id, second.state, second.error) == ("u", "failed", ErrorInfo("failed", "no voice"))
    worker.succeed("v")
    assert settled(back) == [("v", "completed", None)]


def test_results_that_waited_are_told_once() -> None:
    worker, requester = pair()
    requester.delegate("t", "greet")
    requester.lose_connection()
    worker.succeed("t")
    back = requester.come_back()
    assert settled(back) == [("t", "completed", None)]
    back.lose_connection()
    assert settled(back.come_back()) == []


def test_agents_tasks_that_timed_out_while_it_was_away_are_not_its_any_more() -> None:
    world, worker, requester = couple(grace_s=60.0)
    requester.delegate("t", "greet", ttl=10)
    worker.lose_connection()
    world.pass_time(10)
    back = worker.come_back("greet")
    assert back.registration.tasks == []
    assert back.refused(Result(task_id="t", success=True)) == "task_over"


# Leaving


def test_deregistering_takes_an_agent_out_at_once() -> None:
    worker, requester = pair()
    requester.delegate("t", "greet")
    assert isinstance(worker.ask(Deregister()), Deregistered)
    assert worker.close_code == 1000
    assert settled(requester) == [("t", "failed", "agent_lost")]
    assert requester.ask(Discover()).total == 1
    assert requester.refused(Delegate(task_id="u", agent_id=worker.agent_id)) == "unknown_agent"


def test_agent_that_left_has_left_its_identity() -> None:
    worker, _ = pair()
    worker.ask(Deregister())
    assert worker.come_back("greet").agent_id != worker.agent_id


def test_nothing_is_kept_for_a_requester_that_left() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "greet")
    requester.ask(Deregister())
    assert worker.succeed("t").state == "completed"
    assert settled(requester.come_back()) == []
    assert not world.hub.tasks.undelivered


def test_draining_agent_gets_no_new_task_and_leaves_with_its_last() -> None:
    worker, requester = pair()
    requester.delegate("t", "greet")
    requester.delegate("u", "greet")
    worker.received()
    worker.tell(Deregister(id="bye", drain=True))
    assert worker.received() == []
    assert requester.refused(Delegate(task_id="v", capability="greet")) == "no_agent"
    assert requester.refused(Delegate(task_id="v", agent_id=worker.agent_id)) == "unknown_agent"
    assert requester.ask(Discover(capability="greet")).total == 0
    assert requester.delegate("w", "greet", wait=True).state == "pending"
    worker.succeed("t")
    assert worker.close_code is None
    assert worker.succeed("u").state == "completed"  # The reply to its result comes before the end.
    assert worker.received() == [Deregistered(reply_to="bye")]
    assert worker.close_code == 1000


def test_draining_with_nothing_to_do_is_granted_at_once() -> None:
    worker, _ = pair()
    assert isinstance(worker.ask(Deregister(drain=True)), Deregistered)
    assert worker.close_code == 1000


@pytest.mark.parametrize("end", ["timeout", "cancel", "agent_lost", "agent_lost and retried"])
def test_draining_ends_however_the_last_task_does(end: str) -> None:
    world, worker, requester = couple()
    requester.delegate("t", "greet", ttl=10, max_retries=1 if end == "agent_lost and retried" else 0)
    worker.tell(Deregister(id="bye", drain=True))
    if end == "timeout":
        world.pass_time(10)
    elif end == "cancel":
        requester.fail("t")
    else:
        worker.tell(Result(task_id="t", success=False, error=ErrorInfo("agent_lost")))
    assert worker.replies_to("bye") == [Deregistered(reply_to="bye")]
    assert worker.close_code == 1000


def test_both_of_two_wishes_to_drain_are_answered() -> None:
    worker, requester = pair()
    requester.delegate("t", "greet")
    for request in ("first", "second"):
        worker.tell(Deregister(id=request, drain=True))
    worker.tell(Result(task_id="t", success=True))
    assert len(worker.replies_to("first")) == len(worker.replies_to("second")) == 1


def test_draining_agent_may_leave_at_once_after_all_and_both_requests_are_answered() -> None:
    worker, requester = pair()
    requester.delegate("t", "greet")
    worker.tell(Deregister(id="drain", drain=True))
    worker.tell(Deregister(id="now"))
    assert len(worker.replies_to("drain")) == len(worker.replies_to("now")) == 1
    assert settled(requester) == [("t", "failed", "agent_lost")]


def test_draining_agent_may_go_on_delegating_and_asking() -> None:
    world, worker, requester = couple()
    other = world.join("other", "sing")
    requester.delegate("t", "greet")
    worker.tell(Deregister(drain=True))
    assert worker.delegate("child", "sing", parent_id="t").state == "in_progress"
    other.succeed("child", "la")
    assert settled(worker) == [("child", "completed", None)]
    worker.register("worker", "greet", "sing")  # A second registration does not undo the wish to leave.
    assert requester.refused(Delegate(task_id="u", capability="greet")) == "no_agent"


def test_draining_agent_that_comes_back_takes_tasks_again() -> None:
    worker, requester = pair()
    requester.delegate("t", "greet")
    worker.tell(Deregister(drain=True))
    back = worker.come_back("greet")
    assert requester.delegate("u", "greet").state == "in_progress"
    assert delivered(back) == ["u"]


@pytest.mark.parametrize("drain", [True, False])
def test_impatient_tasks_that_name_an_agent_end_when_it_leaves_before_it_began(drain: bool) -> None:
    world = HubHarness()
    worker = world.join("worker", max_tasks=1)
    requester = world.join("requester")
    for task_id, fields in {
        "running": {},
        "impatient": {},
        "patient": {"wait": True},
        "again": {"max_retries": 1},
    }.items():
        requester.delegate(task_id, agent_id=worker.agent_id, **fields)
    requester.received()
    worker.tell(Deregister(drain=drain))
    ends = {task_id: code for task_id, _, code in settled(requester)}
    assert ends == {"impatient": "agent_lost"} | ({} if drain else {"running": "agent_lost"})
    assert state_of(requester, "patient") == state_of(requester, "again") == "pending"


# Silence


def test_three_intervals_of_silence_close_a_connection() -> None:
    world = HubHarness(heartbeat_s=30.0)
    agent, observer = world.join("agent"), world.connect()
    world.pass_time(89.9)
    assert (agent.close_code, observer.close_code) == (None, None)
    world.pass_time(0.1)
    assert (agent.close_code, observer.close_code) == (4001, 4001)


def test_any_message_is_a_sign_of_life() -> None:
    world = HubHarness(heartbeat_s=30.0, grace_s=60.0)
    agents = {kind: world.join(kind) for kind in ("heartbeat", "status", "nonsense", "refused", "silent")}
    for _ in range(4):
        world.pass_time(60)
        assert isinstance(agents["heartbeat"].ask(Heartbeat()), HeartbeatAck)
        agents["status"].tell(Status())
        agents["nonsense"].tell(InvalidMessage("nonsense"))
        agents["refused"].tell(Result(task_id="unknown", success=True))
    assert [name for name, agent in agents.items() if agent.close_code == 4001] == ["silent"]


def test_silence_that_is_found_late_is_judged_after_what_waits_in_the_sockets() -> None:
    """As after SIGSTOP and SIGCONT: the timers of a loop may fire before it reads."""
    world = HubHarness(heartbeat_s=30.0)
    agents = [world.join("speaks"), world.join("silent")]
    world.now += 90.1
    world.tick()
    assert [one.close_code for one in agents] == [None, None]
    agents[0].tell(Heartbeat())
    world.pass_time(agenthub.DOUBT_S)
    assert [one.close_code for one in agents] == [None, 4001]
    world.now += 90.1
    world.tick()
    assert agents[0].close_code is None
    world.now += agenthub.DOUBT_S + 1  # Late again, and still silent.
    world.tick()
    assert agents[0].close_code == 4001


def test_connection_whose_messages_wait_at_the_hub_is_not_silent() -> None:
    """Thousands of agents that return at once to a busy hub, or one among the floods of others, wait for their turn."""
    held: set[Any] = set()
    world = HubHarness(heartbeat_s=30.0, join_s=10.0, is_held=held.__contains__)
    agent, newcomer = world.join("agent"), world.connect()
    held.update(world.hub.connections)
    world.pass_time(200.0)
    assert agent.close_code is newcomer.close_code is None
    held.clear()
    agent.tell(Heartbeat())
    world.pass_time(agenthub.DOUBT_S)
    assert [agent.close_code, newcomer.close_code] == [None, 4001]


def test_silence_starts_the_grace_time() -> None:
    world, worker, requester = couple(heartbeat_s=10.0, grace_s=60.0)
    requester.delegate("t", "greet")
    for _ in range(8):
        world.pass_time(10)
        requester.tell(Heartbeat())
    assert worker.close_code == 4001
    assert state_of(requester, "t") == "in_progress"
    for _ in range(2):
        world.pass_time(5)
        requester.tell(Heartbeat())
    assert settled(requester) == [("t", "failed", "agent_lost")]


def test_heartbeat_without_an_id_gets_no_reply() -> None:
    worker, _ = pair()
    worker.tell(Heartbeat())
    assert worker.received() == []


# Finding


def test_discovery_is_ranked() -> None:
    world = HubHarness()
    observer = world.connect()
    world.join("described", Capability("check", "Runs every test there is"))
    world.join("elsewhere", "latest-news")
    world.join("word", "run-test")
    world.join("prefix", "test-runner")
    world.join("exact", "Test")
    world.join("nothing", "sing", description="Attests")
    world.join("about itself", "check", description="For a TEST")
    names = [agent.name for agent in observer.ask(Discover(capability="tEsT")).agents]
    assert names == ["exact", "prefix", "word", "elsewhere", "about itself", "described"]


@pytest.mark.parametrize(
    ("keyword", "capability", "description", "rank"),
    [
        ("te", "latest", "", 2),
        ("t", "test", "", 1),
        ("test", "test", "", 0),
        ("test", "Test", "", 0),
        ("test", "test-runner", "", 1),
        ("test", "testing", "", 1),
        ("test", "run-test", "", 1),
        ("test", "run_test", "", 1),
        ("test", "run.test.now", "", 1),
        ("test", "latest-news", "", 2),
        ("test", "contested", "test", 2),
        ("test", "check", "a test, of course", 3),
        ("test", "check", "the latest", None),
        ("test", "check", "testing", None),
        ("run-test", "dry-run-test", "", 2),
        ("\N{LATIN SMALL LETTER A WITH DIAERESIS}ra", "\N{LATIN CAPITAL LETTER A WITH DIAERESIS}RA", "", 0),
    ],
)
def test_rank_of_a_match(keyword: str, capability: str, description: str, rank: int | None) -> None:
    world = HubHarness()
    program = world.join("agent", Capability(capability, description))
    assert rank_of(world, keyword, program) == rank


def test_best_of_an_agents_capabilities_counts() -> None:
    world = HubHarness()
    program = world.join("agent", "latest", "other", "test")
    assert rank_of(world, "test", program) == 0


def test_among_equals_the_less_loaded_comes_first_and_then_the_name() -> None:
    world = HubHarness()
    busy, *_ = (world.join(name, "greet") for name in ("a", "c", "b"))
    requester = world.join("z")
    requester.delegate("t", agent_id=busy.agent_id)
    agents = requester.ask(Discover(capability="greet")).agents
    assert [(agent.name, agent.running) for agent in agents] == [("b", 0), ("c", 0), ("a", 1)]
    limited = requester.ask(Discover(capability="greet", limit=2))
    assert ([agent.name for agent in limited.agents], limited.total) == (["b", "c"], 3)


def test_discovered_agent_shows_what_it_can_do() -> None:
    world = HubHarness()
    schema = {"type": "object", "default": None}
    offered: list[Any] = ["a", Capability("b", "does b", schema, {"type": "null"})]
    agent = world.join("agent", *offered, max_tasks=7, metadata={"x": [None]}, description="Does it")
    found = world.connect().ask(Discover())
    capabilities = [Capability("a"), offered[1]]
    expected = AgentInfo(agent.agent_id, "agent", "Does it", capabilities, 0, 7, {"x": [None]}, 0.0)
    assert found == Discovered(reply_to=found.reply_to, agents=[expected], total=1)


def test_discovery_says_how_long_ago_an_agent_registered_or_resumed() -> None:
    world = HubHarness()
    worker, observer = world.join("worker", "greet"), world.connect()

    def online_s() -> list[float | None]:
        return [one.online_s for one in observer.ask(Discover()).agents]

    world.pass_time(7.5)
    assert online_s() == [7.5]
    worker.register("worker", "greet")  # A second registration is no new connection.
    assert online_s() == [7.5]
    worker.lose_connection()
    worker.come_back("greet")
    world.pass_time(2)
    assert online_s() == [2]


def test_discovery_shows_as_many_agents_as_fit_into_a_message() -> None:
    world = HubHarness(message_bytes_max=20_000)
    for number in range(30):
        world.join(f"agent-{number}", description="x" * 2000)
    found = world.connect().ask(Discover(limit=1000))
    assert found.total == 30
    assert 8 <= len(found.agents) < 10


def test_agent_too_large_to_be_shown_does_not_hide_the_others() -> None:
    world = HubHarness(message_bytes_max=4096)
    world.join("a", description="x" * 3900)
    small = world.join("b")
    found = small.ask(Discover())
    assert found.total == 2
    assert [agent.name for agent in found.agents] == ["b"]


def test_broadcast_reaches_everybody_else_who_is_online() -> None:
    world = HubHarness()
    sender, first, second, away = (world.join(name) for name in ("sender", "first", "second", "away"))
    observer = world.connect()
    away.lose_connection()
    assert sender.ask(Broadcast(message={"deploy": None})) == BroadcastReply(reply_to="request-5", recipients=2)
    for program in (first, second):
        (message,) = program.received()
        assert (message.type, message.sender, message.message) == ("broadcast", sender.agent_id, {"deploy": None})
    assert sender.received() == away.received() == observer.received() == []


def test_broadcast_to_a_capability_reaches_those_who_have_it() -> None:
    world = HubHarness()
    sender, greeter, singer = world.join("sender", "greet"), world.join("g", "greet"), world.join("s", "sing")
    assert sender.ask(Broadcast(message=1, capability="greet")).recipients == 1
    assert [message.capability for message in greeter.received()] == ["greet"]
    assert singer.received() == []
    assert sender.ask(Broadcast(message=1, capability="nobody has it")).recipients == 0


# Delegating


def test_task_goes_to_the_agent_that_can_do_it_and_its_output_comes_back() -> None:
    worker, requester = pair()
    reply = requester.delegate("t", "greet", input={"name": None}, ttl=60, priority=5, max_retries=2)
    assert reply == TaskAck(reply_to=reply.reply_to, task_id="t", state="in_progress", attempt=1)
    assert worker.received() == [
        Delegated(
            task_id="t",
            sender=requester.agent_id,
            agent_id=worker.agent_id,
            capability="greet",
            input={"name": None},
            ttl=60.0,
            priority=5,
            max_retries=2,
            parent_id=None,
            attempt=1,
        )
    ]
    reply = worker.succeed("t", {"greeting": "Hello"}, attempt=1)
    assert reply == TaskAck(reply_to=reply.reply_to, task_id="t", state="completed", attempt=1)
    assert requester.received() == [
        TaskOutcome(
            task_id="t",
            sender=worker.agent_id,
            success=True,
            state="completed",
            output={"greeting": "Hello"},
            error=None,
            attempt=1,
        )
    ]
    assert worker.received() == []


def test_acknowledgement_comes_before_the_delivery() -> None:
    world = HubHarness()
    agent = world.join("agent", "greet")
    agent.tell(Delegate(id="mine", task_id="t", agent_id=agent.agent_id))
    assert [message.type for message in agent.received()] == ["status", "delegate"]


def test_messages_without_an_id_get_no_reply() -> None:
    worker, requester = pair()
    requester.tell(Delegate(task_id="t", capability="greet"))
    worker.tell(Status(task_id="t", progress=0.5))
    worker.tell(Result(task_id="t", success=True))
    for message in (
        Status(),
        Discover(),
        Status(task_id="t"),
        Broadcast(message=1),
        Delegate(task_id="t", capability="greet"),
    ):
        requester.tell(message)
    assert [message.type for message in worker.received()] == ["delegate", "broadcast"]
    assert [message.type for message in requester.received()] == ["status", "result", "result"]


def test_refusal_is_sent_without_an_id_too() -> None:
    _, requester = pair()
    requester.tell(Delegate(task_id="t", capability="sing"))
    (error,) = requester.received()
    assert (error.code, error.task_id, error.reply_to) == ("no_agent", "t", None)


def test_what_could_not_be_read_is_answered() -> None:
    worker, _ = pair()
    worker.tell(InvalidMessage("name: Field required", reply_to="7"))
    assert worker.received() == [Error(reply_to="7", code="invalid_message", message="name: Field required")]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"capability": "sing"}, "no_agent"),
        ({"agent_id": "nobody"}, "unknown_agent"),
        ({"agent_id": "nobody", "capability": "greet"}, "unknown_agent"),
        ({"agent_id": "WORKER", "capability": "sing"}, "no_agent"),
        ({}, "invalid_message"),
        ({"wait": True}, "invalid_message"),
    ],
)
def test_task_that_nobody_can_take_is_refused_at_once(fields: dict[str, Any], code: str) -> None:
    worker, requester = pair()
    if fields.get("agent_id") == "WORKER":
        fields = fields | {"agent_id": worker.agent_id}
    assert requester.refused(Delegate(task_id="t", **fields)) == code


@pytest.mark.parametrize("fields", [{"capability": "sing"}, {"agent_id": "nobody"}])
def test_task_that_may_wait_stays_pending_until_its_time_is_over(fields: dict[str, Any]) -> None:
    world, _, requester = couple()
    assert requester.delegate("t", wait=True, ttl=10, **fields).state == "pending"
    world.pass_time(9.99)
    assert requester.received() == []
    world.pass_time(0.01)
    assert settled(requester) == [("t", "timeout", "timeout")]


def test_task_for_an_agent_and_a_capability_waits_until_that_agent_has_it() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "sing", agent_id=worker.agent_id, wait=True)
    world.join("another", "sing")
    assert state_of(requester, "t") == "pending"
    worker.register("worker", "sing")
    assert delivered(worker) == ["t"]


def test_least_loaded_agent_is_chosen() -> None:
    world = HubHarness()
    workers = [world.join(f"worker-{number}", "greet", max_tasks=2) for number in range(3)]
    requester = world.join("requester")
    for number in range(6):
        requester.delegate(f"t{number}", "greet")
    assert [delivered(worker) for worker in workers] == [["t0", "t3"], ["t1", "t4"], ["t2", "t5"]]
    workers[1].succeed("t1")
    requester.delegate("t6", "greet")
    assert delivered(workers[1]) == ["t6"]


def test_requester_is_never_chosen_itself() -> None:
    world = HubHarness()
    agent = world.join("agent", "greet")
    assert agent.refused(Delegate(task_id="t", capability="greet")) == "no_agent"
    agent.delegate("t", "greet", wait=True)
    assert delivered(agent) == []
    other = world.join("other", "greet")
    assert delivered(other) == ["t"]


def test_requester_may_name_itself() -> None:
    world = HubHarness()
    agent = world.join("agent", "greet")
    assert agent.delegate("t", agent_id=agent.agent_id).state == "in_progress"
    assert delivered(agent) == ["t"]
    assert agent.succeed("t", 1).state == "completed"
    assert settled(agent) == [("t", "completed", None)]


def test_agent_passes_over_its_own_tasks_in_the_queue() -> None:
    world = HubHarness()
    agent = world.join("agent", "greet", max_tasks=1)
    other = world.join("other")
    other.delegate("running", "greet")
    agent.delegate("own", "greet", wait=True, priority=100)
    other.delegate("others", "greet")
    agent.succeed("running")
    assert delivered(agent) == ["running", "others"]


def test_agent_holds_at_most_what_it_wants_and_the_rest_waits_by_priority_and_then_arrival() -> None:
    world = HubHarness()
    worker, requester = world.join("worker", "greet", max_tasks=1), world.join("requester")
    second = world.join("second requester")
    requester.delegate("first", "greet", priority=-100)
    for task_id, priority in {"low": -1, "a": 0, "high": 100, "b": 0}.items():
        assert requester.delegate(task_id, "greet", priority=priority).state == "pending"
    second.delegate("named", agent_id=worker.agent_id)
    second.delegate("both", "greet", agent_id=worker.agent_id, priority=1)
    assert handed_out(worker) == ["first", "high", "both", "a", "named", "b", "low"]


def test_requesters_take_turns_and_the_order_of_each_stays() -> None:
    world = HubHarness()
    worker, busy = world.join("worker", "greet", max_tasks=1), world.join("busy")
    for number in range(100):
        busy.delegate(f"busy-{number}", "greet")
    one, two = world.join("one"), world.join("two")
    one.delegate("one-0", "greet")
    two.delegate("two-0", "greet")
    two.delegate("two-1", "greet")
    busy.delegate("urgent", "greet", priority=1)
    order = handed_out(worker)
    assert order[:8] == ["busy-0", "urgent", "one-0", "two-0", "busy-1", "two-1", "busy-2", "busy-3"]
    assert order[8:] == [f"busy-{number}" for number in range(4, 100)]


def test_requester_takes_one_turn_for_all_queues_of_an_agent() -> None:
    world = HubHarness()
    names = [f"work-{number}" for number in range(20)]
    worker, busy, other = world.join("worker", *names, max_tasks=1), world.join("busy"), world.join("other")
    for number in range(40):
        busy.delegate(f"busy-{number}", names[number % 7], agent_id=worker.agent_id if number % 2 else None)
    other.delegate("other", names[3])
    order = handed_out(worker)
    assert order.index("other") == 2
    order.remove("other")
    assert order == [f"busy-{number}" for number in range(40)]


def test_requester_that_was_served_and_is_back_queues_behind_the_others() -> None:
    world = HubHarness()
    worker, patient, eager = world.join("worker", "greet", max_tasks=1), world.join("patient"), world.join("eager")
    for number in range(10):
        patient.delegate(f"patient-{number}", "greet")
    order = []
    for number in range(12):
        eager.delegate(f"eager-{number}", "greet")
        (got,) = delivered(worker)
        order.append(got.split("-")[0])
        worker.succeed(got)
    assert order[:9] == ["patient", "patient", "eager"] + ["patient", "eager"] * 3


def test_status_shows_who_has_the_most_tasks_waiting() -> None:
    world = HubHarness()
    requesters = [world.join(f"r{number}") for number in range(agenthub.WAITING_MAX + 2)]
    for number, requester in enumerate(requesters):
        for task in range(number):
            requester.delegate(f"t-{number}-{task}", "nobody", wait=True)
    waiting = requesters[0].ask(Status()).hub["waiting"]
    expected = {one.agent_id: number for number, one in enumerate(requesters)}
    assert waiting == dict(sorted(expected.items(), key=lambda one: -one[1])[: agenthub.WAITING_MAX])
    for requester in requesters:
        requester.ask(Deregister())
    world.pass_time(1000)
    assert world.hub.summary()["waiting"] == {}


def test_task_keeps_its_place_over_a_retry() -> None:
    world = HubHarness()
    worker, requester = world.join("worker", "greet", max_tasks=1), world.join("requester")
    requester.delegate("first", "greet", max_retries=1)
    requester.delegate("second", "greet", max_retries=1)
    worker.ask(Deregister())
    new = world.join("new", "greet", max_tasks=1)
    assert delivered(new) == ["first"]


# The same again


def test_same_delegate_again_gets_the_present_state_and_changes_nothing() -> None:
    world, worker, requester = couple()
    message = Delegate(task_id="t", capability="greet", input={"a": 1, "b": 2})
    requester.ask(message)
    worker.received()
    before = snapshot(world.hub)
    again = Delegate(task_id="t", capability="greet", input={"b": 2, "a": 1}, priority=0)
    assert requester.ask(again).state == "in_progress"
    assert snapshot(world.hub) == before
    assert worker.received() == requester.received() == []


def test_same_delegate_again_after_the_end_gets_the_result_once_more() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "greet")
    worker.succeed("t", "Hello")
    (first,) = requester.received()
    before = snapshot(world.hub)
    assert requester.delegate("t", "greet").state == "completed"
    assert requester.received() == [first]
    assert snapshot(world.hub) == before
    assert worker.received()[1:] == []


def test_same_delegate_again_is_answered_from_a_new_connection_and_while_shutting_down() -> None:
    world, _, requester = couple()
    requester.delegate("t", "greet")
    requester.lose_connection()
    back = requester.come_back()
    world.hub.shut_down()
    assert back.delegate("t", "greet").state == "in_progress"


@pytest.mark.parametrize(
    "changed",
    [
        {"input": True},
        {"input": 1.0},
        {"priority": 1},
        {"ttl": 299.0},
        {"max_retries": 1},
        {"wait": True},
        {"capability": None},
    ],
)
def test_another_content_under_a_known_id_is_a_duplicate(changed: dict[str, Any]) -> None:
    worker, requester = pair()
    fields = {"capability": "greet", "agent_id": worker.agent_id, "input": 1}
    requester.delegate("t", **fields)
    assert requester.refused(Delegate(task_id="t", **fields | changed)) == "duplicate_task"
    worker.succeed("t")
    assert requester.refused(Delegate(task_id="t", **fields | changed)) == "duplicate_task"


def test_another_requesters_id_is_a_duplicate() -> None:
    world, _, requester = couple()
    requester.delegate("t", "greet")
    assert world.join("other").refused(Delegate(task_id="t", capability="greet")) == "duplicate_task"


def test_id_may_be_used_again_when_its_record_is_gone() -> None:
    world, worker, requester = couple(retention_s=10.0)
    requester.delegate("t", "greet")
    worker.succeed("t")
    world.pass_time(60)
    assert requester.delegate("t", "greet").state == "in_progress"


# Ends


def test_failure_is_told_with_its_error() -> None:
    worker, requester = pair()
    for task_id, error in {"t": "out of paper", "u": ErrorInfo("paper", "out of it"), "v": None}.items():
        requester.delegate(task_id, "greet")
        assert worker.fail(task_id, error).state == "failed"
    errors = [(end.success, end.state, end.error, end.sender) for end in requester.received()]
    assert errors == [
        (False, "failed", ErrorInfo("failed", "out of paper"), worker.agent_id),
        (False, "failed", ErrorInfo("paper", "out of it"), worker.agent_id),
        (False, "failed", ErrorInfo("failed", ""), worker.agent_id),
    ]


def ends_as(end: str, world: HubHarness, worker: Client, requester: Client) -> bool:
    """End the task `t`, whose ttl is 10, if it is one of these ends; tell whether it was."""
    if end in ("completed", "failed"):
        worker.ask(Result(task_id="t", success=end == "completed"))
    elif end == "cancelled":
        requester.fail("t")
    elif end == "timeout":
        world.pass_time(10)
    else:
        return False
    return True


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled", "timeout", "agent_lost"])
def test_final_state_never_changes(end: str) -> None:
    world, worker, requester = couple(grace_s=5.0)
    requester.delegate("t", "greet", ttl=10)
    if not ends_as(end, world, worker, requester):
        worker.lose_connection()
        world.pass_time(5)
        worker = worker.come_back("greet")
    state = state_of(requester, "t")
    for program in (worker, requester, world.join("other")):
        for success in (True, False):
            assert program.refused(Result(task_id="t", success=success)) == "task_over"
    assert worker.refused(Status(task_id="t", progress=0.5)) == "task_over"
    world.pass_time(100)
    assert state_of(requester, "t") == state
    assert len(settled(requester)) == 1


def test_requester_cancels_its_task_and_the_worker_hears_of_it() -> None:
    worker, requester = pair()
    requester.delegate("t", "greet")
    worker.received()
    assert requester.fail("t", "changed my mind").state == "failed"
    (end,) = requester.received()
    assert (end.state, end.error, end.sender) == ("failed", ErrorInfo("cancelled", "changed my mind"), None)
    assert worker.received() == [TaskAck(task_id="t", state="failed", attempt=1)]


def test_pending_task_is_cancelled_too() -> None:
    world, _, requester = couple()
    requester.delegate("t", "sing", wait=True)
    requester.fail("t")
    assert settled(requester) == [("t", "failed", "cancelled")]
    singer = world.join("singer", "sing")
    assert singer.received() == []


def test_result_from_anyone_but_the_assignee_is_refused() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "greet")
    other = world.join("other", "greet")
    for success in (True, False):
        assert other.refused(Result(task_id="t", success=success)) == "not_assigned"
    assert requester.refused(Result(task_id="t", success=True)) == "not_assigned"
    assert other.refused(Status(task_id="t", progress=0.1)) == "not_assigned"
    assert requester.refused(Status(task_id="t", detail=1)) == "not_assigned"
    assert worker.refused(Result(task_id="unknown", success=True)) == "unknown_task"
    assert worker.refused(Status(task_id="unknown")) == "unknown_task"


def test_result_with_another_attempt_is_stale() -> None:
    worker, requester = pair()
    requester.delegate("t", "greet")
    assert worker.refused(Result(task_id="t", success=True, attempt=2)) == "stale_attempt"
    assert worker.succeed("t", attempt=1).state == "completed"


def test_worker_that_was_given_up_hears_that_its_attempt_is_stale() -> None:
    world, worker, requester = couple(grace_s=5.0)
    requester.delegate("t", "greet", max_retries=1)
    worker.lose_connection()
    world.pass_time(5)
    second = world.join("second", "greet")
    assert [message.attempt for message in second.received()] == [2]
    back = worker.come_back("greet")
    assert back.registration.tasks == []
    assert back.refused(Result(task_id="t", success=True, attempt=1)) == "stale_attempt"
    assert back.refused(Result(task_id="t", success=True)) == "not_assigned"
    assert second.succeed("t", attempt=2).state == "completed"


# Retries


def test_task_of_a_lost_agent_is_tried_again_at_another() -> None:
    world, worker, requester = couple(grace_s=5.0)
    requester.delegate("t", "greet", max_retries=1, ttl=60)
    second = world.join("second", "greet")
    worker.lose_connection()
    world.pass_time(5)
    (delivery,) = second.received()
    assert (delivery.attempt, delivery.ttl) == (2, 55.0)
    assert settled(requester) == []
    second.ask(Deregister())
    assert settled(requester) == [("t", "failed", "agent_lost")]


def test_task_for_one_agent_is_tried_again_there_when_it_is_back() -> None:
    world, worker, requester = couple(grace_s=5.0)
    requester.delegate("t", agent_id=worker.agent_id, max_retries=1)
    world.join("another", "greet")
    worker.lose_connection()
    world.pass_time(30)
    assert state_of(requester, "t") == "pending"
    back = worker.come_back("greet")
    (delivery,) = back.received()
    assert (delivery.task_id, delivery.attempt) == ("t", 2)


def test_task_is_delivered_at_most_once_more_than_it_may_be_retried() -> None:
    worker, requester = pair()
    requester.delegate("t", "greet", max_retries=3)
    for attempt in (1, 2, 3, 4):
        assert state_of(requester, "t") == "in_progress"
        for other in {1, attempt - 1, attempt + 1} - {0, attempt}:
            assert worker.refused(Result(task_id="t", success=True, attempt=other)) == "stale_attempt"
        worker.fail("t", ErrorInfo("agent_lost"), attempt=attempt)
    assert settled(requester) == [("t", "failed", "agent_lost")]


def test_task_that_its_agent_lost_goes_to_another_if_there_is_one() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "greet", max_retries=1)
    worker.received()
    busy = world.join("busy", "greet")
    for number in range(3):
        requester.delegate(f"other-{number}", agent_id=busy.agent_id)
    busy.received()
    worker.fail("t", ErrorInfo("agent_lost"))
    assert (delivered(busy), delivered(worker)) == (["t"], [])


def test_progress_is_forgotten_over_a_retry() -> None:
    worker, requester = pair()
    requester.delegate("t", "greet", max_retries=1)
    worker.ask(Status(task_id="t", progress=0.5, detail="half"))
    worker.fail("t", ErrorInfo("agent_lost"))
    report = requester.ask(Status(task_id="t"))
    assert (report.state, report.attempt, report.progress, report.detail) == ("in_progress", 2, None, None)


def test_failure_that_the_handler_reports_is_not_retried() -> None:
    worker, requester = pair()
    requester.delegate("t", "greet", max_retries=5)
    worker.fail("t", "no")
    assert settled(requester) == [("t", "failed", "failed")]


# Time


def test_task_ends_at_its_deadline_and_both_sides_are_told_once() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "greet", ttl=10)
    worker.received()
    assert world.hub.next_deadline() == world.now + 10
    world.pass_time(9.999)
    assert requester.received() == []
    world.pass_time(0.001)
    (end,) = requester.received()
    assert (end.state, end.success, end.sender, end.error.code) == ("timeout", False, None, "timeout")
    assert worker.received() == [TaskAck(task_id="t", state="timeout", attempt=1)]
    world.pass_time(1000)
    assert requester.received() == worker.received() == []


def test_time_to_live_covers_waiting_and_the_worker_gets_the_rest() -> None:
    world = HubHarness()
    worker, requester = world.join("worker", "greet", max_tasks=1), world.join("requester")
    requester.delegate("long", "greet")
    requester.delegate("t", "greet", ttl=10)
    worker.received()
    world.pass_time(4)
    worker.succeed("long")
    (delivery,) = worker.received()
    assert delivery.ttl == pytest.approx(6)
    world.pass_time(6)
    assert ("t", "timeout", "timeout") in settled(requester)


def test_slot_of_an_expired_task_goes_to_the_next() -> None:
    world = HubHarness()
    worker, requester = world.join("worker", "greet", max_tasks=1), world.join("requester")
    requester.delegate("t", "greet", ttl=10)
    requester.delegate("u", "greet")
    worker.received()
    world.pass_time(10)
    assert [message.type for message in worker.received()] == ["status", "delegate"]


def test_tasks_that_expire_together_are_not_handed_out_in_between() -> None:
    world = HubHarness()
    worker, requester = world.join("worker", "greet", max_tasks=1), world.join("requester")
    for task_id in ("t", "u", "v"):
        requester.delegate(task_id, "greet", ttl=10)
    assert delivered(worker) == ["t"]
    world.pass_time(10)
    assert delivered(worker) == []
    assert [state for _, state, _ in settled(requester)] == ["timeout"] * 3


@pytest.mark.parametrize("count", [1, TICK_BATCH - 1, TICK_BATCH, TICK_BATCH + 1, 2 * TICK_BATCH])
def test_slot_that_expired_tasks_leave_goes_to_the_next_that_lives_in_the_end(count: int) -> None:
    world = HubHarness()
    worker, requester = world.join("worker", "greet", max_tasks=1), world.join("requester")
    for number in range(count):
        requester.tell(Delegate(task_id=f"t{number}", capability="greet", ttl=10))
    requester.tell(Delegate(task_id="alive", capability="greet", ttl=20))
    worker.received()
    world.pass_time(10)
    assert delivered(worker) == ["alive"]


def test_task_whose_deadline_has_come_is_not_handed_out_even_if_the_tick_is_late() -> None:
    world = HubHarness()
    worker, requester = world.join("worker", "greet", max_tasks=1), world.join("requester")
    for task_id, ttl in {"long": 100, "t": 10, "alive": 100}.items():
        requester.delegate(task_id, "greet", ttl=ttl)
    worker.received()
    world.now += 11
    worker.succeed("long")
    assert delivered(worker) == []
    world.pass_time(0)
    assert delivered(worker) == ["alive"]


def test_clock_that_jumps_back_stands_still_until_it_has_caught_up() -> None:
    world, _, requester = couple()
    requester.delegate("t", "greet", ttl=10)
    deadline = world.now + 10
    world.now -= 500
    assert requester.ask(Status(task_id="t")).ttl == 10.0
    requester.delegate("u", "greet", ttl=20)
    world.tick()
    assert world.hub.next_deadline() == deadline
    world.now = deadline
    world.tick()
    assert settled(requester) == [("t", "timeout", "timeout")]
    assert requester.ask(Status(task_id="u")).ttl == 10.0


def test_thousands_of_deadlines_at_once_are_handled_in_batches() -> None:
    world, _, requester = couple()
    count = 3 * TICK_BATCH + 10
    for number in range(count):
        requester.tell(Delegate(task_id=f"t{number}", capability="greet", ttl=10))
    world.now += 10
    batches = []
    while world.hub.next_deadline() <= world.now:
        world.tick()
        batches.append(len(settled(requester)))
    assert batches == [TICK_BATCH, TICK_BATCH, TICK_BATCH, 10]


def test_tick_before_anything_is_due_does_nothing() -> None:
    world, _, requester = couple()
    requester.delegate("t", "greet")
    before = snapshot(world.hub)
    world.tick()
    assert snapshot(world.hub) == before


# Tasks that are part of others


def test_child_names_the_task_it_is_part_of() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "greet", ttl=10)
    singer = world.join("singer", "sing")
    assert worker.delegate("child", "sing", parent_id="t", ttl=300).state == "in_progress"
    (delivery,) = singer.received()
    assert (delivery.parent_id, delivery.ttl, delivery.sender) == ("t", 10.0, worker.agent_id)
    assert worker.ask(Status(task_id="child")).parent_id == "t"


def test_child_of_a_task_that_its_sender_does_not_work_on_is_refused() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "greet")
    requester.delegate("pending", "sing", wait=True)
    other = world.join("other", "sing2")
    for program, parent in ((requester, "t"), (other, "t"), (worker, "pending"), (worker, "unknown")):
        message = Delegate(task_id="child", capability="greet", parent_id=parent, wait=True)
        assert program.refused(message) == "not_assigned"
    worker.succeed("t")
    assert worker.refused(Delegate(task_id="child", capability="greet", parent_id="t", wait=True)) == "not_assigned"


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled", "timeout", "agent_lost", "retried"])
def test_child_never_outlives_its_parent(end: str) -> None:
    world, worker, requester = couple()
    singer = world.join("singer", "sing")
    requester.delegate("t", "greet", ttl=10, max_retries=1 if end == "retried" else 0)
    worker.delegate("child", "sing", parent_id="t")
    worker.delegate("waiting", "dance", parent_id="t", wait=True)
    singer.delegate("grandchild", "dance", parent_id="child", wait=True)
    singer.received()
    if not ends_as(end, world, worker, requester):
        worker.ask(Deregister())
    assert {state_of(requester, one) for one in ("child", "waiting", "grandchild")} == {"failed"}
    assert TaskAck(task_id="child", state="failed", attempt=1) in singer.received()
    assert world.hub.tasks.counts[TaskState.PENDING] == (1 if end == "retried" else 0)


def test_ended_child_leaves_its_parent_alone() -> None:
    world, worker, requester = couple()
    singer = world.join("singer", "sing")
    requester.delegate("t", "greet")
    worker.delegate("child", "sing", parent_id="t")
    singer.fail("child", "hoarse")
    assert state_of(requester, "t") == "in_progress"
    assert worker.succeed("t").state == "completed"


def chain(world: HubHarness, length: int) -> tuple[Client, Client]:
    """Delegate a task, a part of it, a part of that and so on, to and fro between two agents."""
    pair = world.join("a", max_tasks=100), world.join("b", max_tasks=100)
    for depth in range(1, length + 1):
        parent = f"t{depth - 1}" if depth > 1 else None
        sender, receiver = pair[depth % 2], pair[1 - depth % 2]
        assert sender.delegate(f"t{depth}", agent_id=receiver.agent_id, parent_id=parent).state == "in_progress"
    return pair


def test_chain_of_tasks_is_at_most_sixteen_deep() -> None:
    world = HubHarness()
    pair = chain(world, 16)
    message = Delegate(task_id="t17", agent_id=pair[0].agent_id, parent_id="t16")
    assert pair[17 % 2].refused(message) == "too_deep"


def test_agent_that_works_on_a_task_and_on_a_part_of_it_can_be_lost() -> None:
    world = HubHarness()
    pair = chain(world, 6)
    pair[0].ask(Deregister())
    assert {task.state for task in world.hub.tasks.delivered.values()} == {TaskState.FAILED}
    assert len(world.hub.tasks.delivered) == 6
    assert world.hub.tasks.open == {}


def test_agent_that_gave_itself_a_part_of_its_task_can_be_lost() -> None:
    world, worker, requester = couple(grace_s=5.0)
    requester.delegate("t", "greet", max_retries=1)
    worker.delegate("own", agent_id=worker.agent_id, parent_id="t", max_retries=1)
    worker.lose_connection()
    world.pass_time(5)
    assert state_of(requester, "t") == "pending"
    assert state_of(requester, "own") == "failed"


def in_batches(world: HubHarness, act: Callable[[], object]) -> int:
    """Do something that a batch is too small for; return how many calls it took to end all tasks of it."""
    calls, ended = 0, sum(world.hub.tasks.ended.values())
    act()
    while True:
        calls, former, ended = calls + 1, ended, sum(world.hub.tasks.ended.values())
        assert ended - former <= TICK_BATCH + 1
        if world.hub.next_deadline() > world.now:
            return calls
        world.tick()


@pytest.mark.parametrize("drain", [False, True])
def test_tasks_that_name_an_agent_which_leaves_end_in_batches(drain: bool) -> None:
    world = HubHarness()
    worker, requester = world.join("worker", "greet", max_tasks=1), world.join("requester")
    count = 3 * TICK_BATCH + 5
    for number in range(count):
        requester.delegate(f"t{number}", agent_id=worker.agent_id)
    requester.received()
    assert in_batches(world, lambda: worker.tell(Deregister(id="d", drain=drain))) >= 3
    expected = {(f"t{number}", "failed", "agent_lost") for number in range(1 if drain else 0, count)}
    outcomes = settled(requester)
    assert set(outcomes) == expected
    assert len(outcomes) == len(expected)
    if drain:
        worker.succeed("t0")
    assert worker.close_code == 1000
    assert worker.agent_id not in world.hub.directory.agents


def test_tasks_that_a_lost_agent_ran_end_in_batches_and_their_retries_go_out() -> None:
    world = HubHarness(grace_s=5.0)
    worker, requester = world.join("worker", "greet", max_tasks=5000), world.join("requester")
    count = 2 * TICK_BATCH + 5
    for number in range(count):
        requester.delegate(f"t{number}", "greet", max_retries=number % 2, ttl=1e5)
    other = world.join("other", "greet", max_tasks=5000)
    worker.lose_connection()
    world.now += 5
    assert in_batches(world, world.tick) >= 3
    assert len(settled(requester)) == count - count // 2
    assert len(delivered(other)) == count // 2
    world.pass_time(1)
    assert worker.agent_id not in world.hub.directory.agents


def test_agent_that_is_back_before_all_its_tasks_were_released_keeps_the_others() -> None:
    world = HubHarness(grace_s=5.0)
    worker, requester = world.join("worker", "greet", max_tasks=5000), world.join("requester")
    count = TICK_BATCH + 100
    for number in range(count):
        requester.delegate(f"t{number}", "greet", ttl=1e5)
    worker.lose_connection()
    world.now += 5
    world.tick()
    back = worker.come_back("greet", max_tasks=5000)
    world.pass_time(1)
    outcomes = settled(requester)
    assert len(outcomes) == TICK_BATCH
    kept = [ref.task_id for ref in back.registration.tasks]
    assert sorted([*kept, *(task_id for task_id, *_ in outcomes)]) == sorted(f"t{number}" for number in range(count))
    for task_id in kept:
        assert back.succeed(task_id).state == "completed"


def test_subtasks_of_a_task_that_ends_are_cancelled_in_batches() -> None:
    world = HubHarness()
    requester, parent = world.join("requester"), world.join("parent", "plan")
    worker = world.join("worker", "step", max_tasks=10)
    requester.delegate("t", "plan")
    count = 3 * TICK_BATCH
    for number in range(count):
        parent.delegate(f"t{number}", "step", parent_id="t")
    assert len(delivered(worker)) == 10
    assert in_batches(world, lambda: parent.succeed("t")) >= 3
    assert settled(requester) == [("t", "completed", None)]
    assert sorted(settled(parent)) == sorted((f"t{number}", "failed", "cancelled") for number in range(count))
    assert delivered(worker) == []
    assert parent.delegate("next", "step").state == "in_progress"


def test_kept_outcomes_are_delivered_in_batches() -> None:
    world = HubHarness()
    worker, requester = world.join("worker", "greet", max_tasks=5000), world.join("requester")
    count = 2 * TICK_BATCH + 5
    for number in range(count):
        requester.delegate(f"t{number}", "greet")
    requester.lose_connection()
    for number in range(count):
        worker.succeed(f"t{number}")
    back = requester.come_back()
    assert len([one for one in back.inbox if isinstance(one, TaskOutcome)]) == TICK_BATCH
    world.pass_time(0)
    assert [task_id for task_id, *_ in settled(back)] == [f"t{number}" for number in range(count)]


@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize("between", [1, 5])
def test_subtask_that_only_an_agent_of_its_ancestors_could_take_is_a_deadlock(between: int, by_id: bool) -> None:
    world = HubHarness()
    requester, first = world.join("requester"), world.join("first", "plan", max_tasks=1)
    chain = [first, *(world.join(f"agent-{number}", f"step-{number}") for number in range(between))]
    requester.delegate("t-0", "plan")
    for number, agent in enumerate(chain[:-1]):
        agent.delegate(f"t-{number + 1}", f"step-{number}", parent_id=f"t-{number}")
    target: dict[str, Any] = {"agent_id": first.agent_id} if by_id else {"capability": "plan"}
    back = Delegate(task_id="back", parent_id=f"t-{between}", **target)
    refusal = chain[-1].ask(back)
    assert refusal.code == "deadlock"
    assert f"{first.agent_id} → {chain[1].agent_id} → " in refusal.message
    assert refusal.message.count(first.agent_id) == 2
    assert len(refusal.message) < 400
    assert chain[-1].delegate("waits", "plan", parent_id=f"t-{between}", wait=True).state == "pending"
    other = world.join("other", "plan", max_tasks=1)  # The task that waits.
    if not by_id:
        assert chain[-1].ask(back).state == "pending"
        assert other.succeed("waits").state == "completed"
        assert delivered(other) == ["waits", "back"]


def test_subtask_that_only_its_requester_could_take_is_a_deadlock() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "greet")
    assert worker.refused(Delegate(task_id="own", capability="greet", parent_id="t")) == "deadlock"
    assert worker.delegate("named", agent_id=worker.agent_id, parent_id="t").state == "in_progress"
    world.join("other", "greet")
    assert worker.delegate("own", "greet", parent_id="t").state == "in_progress"


def test_agent_that_names_itself_and_has_no_slot_left_is_a_deadlock() -> None:
    world = HubHarness()
    worker, requester = world.join("worker", "greet", max_tasks=2), world.join("requester")
    requester.delegate("t", "greet")
    assert worker.delegate("own", agent_id=worker.agent_id, parent_id="t").state == "in_progress"
    assert worker.refused(Delegate(task_id="third", agent_id=worker.agent_id, parent_id="own")) == "deadlock"
    assert worker.delegate("sibling", agent_id=worker.agent_id, parent_id="t").state == "pending"  # After "own".


def test_subtask_for_an_agent_that_is_busy_with_something_else_waits() -> None:
    world = HubHarness()
    requester, helper = world.join("requester"), world.join("helper", "check")
    planner = world.join("planner", "plan", max_tasks=2)
    for task_id in ("t", "unrelated"):
        requester.delegate(task_id, "plan")
    planner.delegate("check", "check", parent_id="t")
    assert helper.delegate("back", "plan", parent_id="check").state == "pending"
    planner.succeed("unrelated")
    assert "back" in delivered(planner)


# Progress and status


def test_progress_is_passed_on_and_counted() -> None:
    worker, requester = pair()
    requester.delegate("t", "greet")
    worker.received()
    reply = worker.ask(Status(task_id="t", progress=0.25))
    assert reply == TaskAck(reply_to=reply.reply_to, task_id="t", state="in_progress", attempt=1)
    worker.tell(Status(task_id="t", detail={"a": None}))
    fields = {"task_id": "t", "state": "in_progress", "attempt": 1, "sender": worker.agent_id}
    assert requester.received() == [
        StatusReply(**fields, seq=1, progress=0.25),
        StatusReply(**fields, seq=2, detail={"a": None}),
    ]
    assert worker.received() == []
    requester.lose_connection()
    worker.ask(Status(task_id="t", progress=0.0))
    back = requester.come_back()
    report = back.ask(Status(task_id="t"))
    assert (report.seq, report.progress, report.detail) == (3, 0.0, None)


def test_status_of_a_task_shows_its_payloads_to_its_two_sides_only() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "greet", input="in")
    worker.ask(Status(task_id="t", progress=0.5, detail="half"))
    third, observer = world.join("third"), world.connect()
    for program, shown in ((requester, True), (worker, True), (third, False), (observer, False)):
        report = program.ask(Status(task_id="t"))
        assert (report.state, report.progress) == ("in_progress", 0.5)
        assert (report.input, report.detail) == (("in", "half") if shown else (None, None))
    worker.succeed("t", "out")
    for program, shown in ((requester, True), (worker, True), (third, False), (observer, False)):
        report = program.ask(Status(task_id="t"))
        assert (report.input, report.output) == (("in", "out") if shown else (None, None))
    worker.received()
    requester.delegate("u", "greet")
    worker.fail("u", "private")
    assert third.ask(Status(task_id="u")).error is None
    assert third.ask(Status(task_id="u")).code == "failed"
    assert requester.ask(Status(task_id="u")).error == ErrorInfo("failed", "private")


def test_status_of_a_task_tells_all_about_it() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "greet", ttl=100, priority=3, max_retries=2)
    world.pass_time(40)
    report = requester.ask(Status(task_id="t"))
    expected = {
        "requester": requester.agent_id,
        "agent_id": worker.agent_id,
        "capability": "greet",
        "attempt": 1,
        "priority": 3,
        "max_retries": 2,
        "ttl": 60.0,
        "age_s": 40.0,
        "seq": None,
    }
    assert {name: getattr(report, name) for name in expected} == expected


def test_status_of_the_hub() -> None:
    world, worker, requester = couple()
    away = world.join("away")
    away.lose_connection()
    observer = world.connect()
    for task_id in ("pending", "in_progress", "completed", "failed", "timeout"):
        requester.delegate(
            task_id, "sing" if task_id == "pending" else "greet", wait=True, ttl=5 if task_id == "timeout" else 300
        )
    worker.succeed("completed")
    worker.fail("failed")
    world.pass_time(5)
    hub = observer.ask(Status()).hub
    assert hub.items() >= {"version": agenthub.__version__, "uptime_s": 5.0, "agents": 2}.items()
    assert hub["tasks"] == dict.fromkeys(["pending", "in_progress", "completed", "failed", "timeout"], 1)


def test_totals_count_what_has_ended_also_when_the_records_are_gone() -> None:
    world, worker, requester = couple(retention_s=1.0)
    for number in range(10):
        requester.delegate(str(number), "greet")
        worker.ask(Result(task_id=str(number), success=number > 2))
    world.pass_time(10)
    hub = requester.ask(Status()).hub
    assert hub["ended"] == {"completed": 7, "failed": 3, "timeout": 0}
    assert hub["tasks"] == dict.fromkeys(["pending", "in_progress", "completed", "failed", "timeout"], 0)


def test_list_of_tasks_has_the_newest_first_and_no_payload() -> None:
    world, worker, requester = couple()
    for task_id in ("old", "older"):
        requester.delegate(task_id, "greet", input="secret")
        worker.succeed(task_id, "secret")
    requester.delegate("first", "greet", input="secret")
    requester.delegate("second", "greet")
    listed = world.connect().ask(Status(tasks=True))
    assert [task.task_id for task in listed.tasks] == ["second", "first", "older", "old"]
    assert listed.total == 4
    assert b"secret" not in encode(listed)


def test_list_of_tasks_shows_as_many_as_fit() -> None:
    _, requester = pair(message_bytes_max=10_000)
    for number in range(100):
        requester.tell(Delegate(task_id=f"{number:0100}", capability="greet"))
    listed = requester.ask(Status(tasks=True))
    assert listed.total == 100
    assert 10 < len(listed.tasks) < 100
    large = HubHarness()
    requester = large.join("requester")
    for number in range(1500):
        requester.tell(Delegate(task_id=str(number), capability="greet", wait=True))
    assert len(requester.ask(Status(tasks=True)).tasks) == 1000


# Bounds


def test_agent_has_at_most_its_number_of_tasks_open() -> None:
    worker, requester = pair(open_tasks_max=2)
    for task_id in ("t", "u"):
        requester.delegate(task_id, "greet")
    assert requester.refused(Delegate(task_id="v", capability="greet")) == "overloaded"
    assert worker.delegate("w", agent_id=requester.agent_id).state == "in_progress"
    worker.succeed("t")
    assert requester.delegate("v", "greet").state == "in_progress"


def test_hub_has_at_most_its_number_of_tasks_waiting() -> None:
    _, requester = pair(pending_tasks_max=2)
    for task_id in ("t", "u"):
        requester.delegate(task_id, "sing", wait=True)
    assert requester.refused(Delegate(task_id="v", capability="sing", wait=True)) == "overloaded"
    requester.fail("t")
    assert requester.delegate("v", "sing", wait=True).state == "pending"


@pytest.mark.parametrize(
    ("said", "bound"),
    [
        ({"capabilities": ["a", "b", "c"]}, "capabilities: at most 2 per agent on this hub; register several agents"),
        ({"metadata": {"text": "x" * 20}}, "metadata: at most 20 bytes as JSON on this hub"),
    ],
)
def test_agent_that_says_more_of_itself_than_the_hub_takes_is_refused(said: dict[str, Any], bound: str) -> None:
    world = HubHarness(capabilities_max=2, metadata_bytes_max=20)
    newcomer = world.connect()
    error = newcomer.ask(Register(name="a", **said))
    assert (error.code, error.message) == ("overloaded", bound)
    fitting = world.join("a", "a", "b", metadata={"text": "x" * 8})
    assert fitting.refused(Register(name="a", **said)) == "overloaded"  # It stays what it was.


def test_hub_has_at_most_its_number_of_agents() -> None:
    world, worker, requester = couple(agents_max=2, grace_s=5.0)
    assert world.connect().refused(Register(name="third")) == "overloaded"
    assert worker.come_back().agent_id == worker.agent_id
    requester.lose_connection()
    assert world.connect().refused(Register(name="third")) == "overloaded"
    world.pass_time(5)
    world.join("third")


def abandoned(world: HubHarness, number: int) -> Client:
    """Join, do what keeps an identity for the retention, and hang up."""
    client = world.join(f"abandoned-{number}")
    client.delegate(f"task-{number}", "nobody", wait=True)
    client.fail(f"task-{number}")
    client.lose_connection()
    return client


def test_agents_that_are_gone_make_room_for_new_ones_the_oldest_first() -> None:
    world = HubHarness(agents_max=10, grace_s=5.0)
    clients = []
    for number in range(10):
        clients.append(abandoned(world, number))
        world.pass_time(1)
    honest = [world.join("honest") for _ in range(3)]
    assert {one.agent_id for one in honest}.isdisjoint(one.agent_id for one in clients)
    assert clients[3].come_back().agent_id == clients[3].agent_id
    assert clients[2].come_back().agent_id != clients[2].agent_id  # It has the place of the next one.
    assert clients[4].come_back().agent_id != clients[4].agent_id
    assert honest[0].ask(Status(task_id="task-0")).state == "failed"  # Tasks are kept for their retention.
    world.pass_time(10_000)
    assert world.hub.tasks.bytes == 0


def test_task_of_a_requester_that_was_dropped_ends_all_the_same() -> None:
    world, worker, requester = couple(agents_max=2, grace_s=5.0)
    requester.delegate("t", "greet", ttl=10_000)
    requester.lose_connection()
    world.pass_time(6)
    world.join("newcomer")
    assert worker.succeed("t").state == "completed"
    worker.ask(Deregister())
    world.pass_time(10_000)
    assert (world.hub.tasks.bytes, len(world.hub.tasks)) == (0, 0)


def test_agents_of_one_address_that_hang_up_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "AWAY_MAX", 3)
    world = HubHarness(grace_s=5.0)

    def from_address(origin: str) -> Client:
        client = world.connect()
        world.take(world.hub.disconnected(client.connection, world.now))
        world.take(world.hub.connected(client.connection, world.now, origin))
        return client

    away = [from_address("198.51.100.7") for _ in range(3)]
    for client in away:
        client.register("flood")
        client.delegate(f"task-{client.agent_id}", "nobody", wait=True)
    for client in away:
        client.lose_connection()
    text = "3 agents of this address are disconnected; resume or deregister them, or retry later"
    refusal = from_address("198.51.100.7").ask(Register(name="fourth"))
    assert (refusal.code, refusal.message) == ("overloaded", text)
    from_address("203.0.113.1").register("bystander")
    fields = {"agent_id": away[0].agent_id, "resume": away[0].registration.resume}
    from_address("203.0.113.1").register("back", **fields)
    from_address("198.51.100.7").register("fourth")
    from_address("198.51.100.7").register("fifth")
    world.pass_time(5)
    for _ in range(5):  # Those that are gone make room.
        client = from_address("198.51.100.7")
        client.register("later")
        client.delegate(f"task-{client.agent_id}", "nobody", wait=True)
        client.lose_connection()
        world.pass_time(5)
    assert len(world.hub.directory.agents) == 3 + 3 + 1  # And no more are kept.


def test_oldest_ended_records_make_room_for_new_ones() -> None:
    world, worker, requester = couple(records_bytes_max=5 * (RECORD_BYTES + 300))
    for number in range(20):
        assert requester.delegate(f"t{number}", "greet").state == "in_progress"
        worker.succeed(f"t{number}")
        assert world.hub.tasks.bytes <= world.hub.settings.records_bytes_max
    assert list(world.hub.tasks.delivered)[-1] == "t19"
    assert len(world.hub.tasks.delivered) >= 4
    assert requester.refused(Status(task_id="t0")) == "unknown_task"


def test_open_tasks_never_make_room() -> None:
    world, _, requester = couple(records_bytes_max=5 * (RECORD_BYTES + 300))
    number = 0
    while requester.delegate(f"t{number}", "greet").type == "status":
        number += 1
    assert requester.refused(Delegate(task_id="more", capability="greet")) == "overloaded"
    assert len(world.hub.tasks.open) == number


def test_task_for_which_there_will_be_no_room_drops_no_record() -> None:
    worker, requester = pair(records_bytes_max=3 * (RECORD_BYTES + 300))
    requester.delegate("t", "greet")
    worker.succeed("t")
    assert requester.refused(Delegate(task_id="large", capability="greet", input="x" * 10_000)) == "overloaded"
    assert state_of(requester, "t") == "completed"


def crashed(world: HubHarness, worker: Client, name: str, outcomes: int, size: int = 1000) -> Client:
    """Return a requester that has crashed for good before so many outcomes."""
    requester = world.join(name)
    for number in range(outcomes):
        requester.delegate(f"{name}-{number}", "greet")
    requester.lose_connection()
    for number in range(outcomes):
        assert worker.succeed(f"{name}-{number}", "x" * size).state == "completed"
    return requester


def test_outcomes_for_requesters_that_are_away_make_room_before_anybody_is_refused() -> None:
    world = HubHarness(records_bytes_max=100_000)
    worker, requester = world.join("worker", "greet", max_tasks=1000), world.join("requester")
    crashed(world, worker, "one", 20)
    crashed(world, worker, "two", 40)
    for number in range(200):
        assert requester.delegate(f"t{number}", "greet").state == "in_progress"
        worker.succeed(f"t{number}", "y" * 1000)
        assert world.hub.tasks.bytes <= 100_000
    kept = len(world.hub.tasks.undelivered)
    assert kept > 30, "delivered outcomes go first"
    for number in range(40):
        assert requester.delegate(f"open{number}", "greet").state == "in_progress"
    assert requester.ask(Status(task_id="one-0")).code == "unknown_task"  # The oldest outcome has made room.
    assert 0 < len(world.hub.tasks.undelivered) < kept


def test_one_requester_holds_at_most_its_share_of_the_records() -> None:
    world = HubHarness(records_bytes_max=100_000)
    worker, greedy, other = world.join("worker", "greet", max_tasks=1000), world.join("greedy"), world.join("other")
    while (reply := greedy.delegate(f"g{len(world.hub.tasks)}", "greet", input="x" * 1000)).type == "status":
        pass
    assert (reply.code, reply.message) == (
        "overloaded",
        "this agent has reached its limit of 50000 bytes of tasks; wait until one ends",
    )
    assert world.hub.tasks.bytes <= 50_000
    assert other.delegate("other", "greet").state == "in_progress"
    worker.succeed("g0")
    assert greedy.delegate("more", "greet").state == "in_progress"


def test_requester_above_its_share_loses_its_own_oldest_outcomes_and_no_other() -> None:
    world = HubHarness(records_bytes_max=200_000)
    worker = world.join("worker", "greet", max_tasks=1000)
    modest = crashed(world, worker, "modest", 10)
    greedy = crashed(world, worker, "greedy", 20, size=20_000)
    assert world.hub.tasks.bytes <= 200_000
    assert len(settled(modest.come_back())) == 10
    outcomes = settled(greedy.come_back())
    assert [task_id for task_id, *_ in outcomes] == [f"greedy-{number}" for number in range(20 - len(outcomes), 20)]
    assert 5 <= len(outcomes) < 10


def test_descriptions_of_an_agent_have_a_limit_together() -> None:
    world = HubHarness()
    text = " ".join(f"{number:x}" for number in range(1000))[:4000]
    too_large = [Capability(f"c{number}", text) for number in range(18)]
    refusal = world.connect().ask(Register(name="a", capabilities=[*too_large]))
    expected = "description: all of an agent may have 65536 bytes together; register several agents"
    assert (refusal.code, refusal.message) == ("too_large", expected)
    worker = world.join("a", *too_large[:16], Capability("last", "zebra"))
    assert rank_of(world, "2a", worker) == 3
    assert len(world.hub.directory.agents[worker.agent_id].words) <= agenthub.WORDS_MAX


def test_large_registrations_count_among_the_records_and_go_with_their_agents() -> None:
    world = HubHarness(records_bytes_max=1_000_000)
    text = " ".join(f"{number:x}" for number in range(1000))[:4000]
    large = [Capability("c", text, {"k": [1] * 6000})]
    agents = [world.join("a", *large), world.join("a", *large)]
    counted = world.hub.summary()["records_bytes"]
    assert 500_000 < counted < 1_000_000
    assert world.connect().refused(Register(name="a", capabilities=[*large])) == "overloaded"
    world.join("small", "greet")
    assert agents[0].come_back(*large).agent_id == agents[0].agent_id
    for client in [*world.clients.values()]:
        client.ask(Deregister())
    assert world.hub.summary()["records_bytes"] == 0


SHAPES: dict[str, Callable[[int], dict[str, Any]]] = {
    "small": lambda number: {"capabilities": ["work"], "description": "Does work"},
    "short words": lambda number: {
        "capabilities": [
            Capability(f"c{one}", " ".join(f"{number * one * 997 + k:x}" for k in range(500))[:1000])
            for one in range(64)
        ]
    },
    "long words": lambda number: {
        "capabilities": [Capability(f"c{one}", f"{one}x{number}" * 180) for one in range(64)]
    },
    "metadata": lambda number: {"metadata": {"k": [{} for _ in range(900)]}},
    "schemas": lambda number: {"capabilities": [Capability("c", "", {"k": [{} for _ in range(15_000)]})]},
    "schema of properties": lambda number: {
        "capabilities": [Capability("c", "", {"properties": {f"field_{k}": {"type": "string"} for k in range(1500)}})]
    },
    "names": lambda number: {"capabilities": [f"{number}-{one}-{'n' * 100}" for one in range(64)]},
}
AGENTS = 8  # Of each shape.


@pytest.mark.parametrize("shape", SHAPES)
def test_agent_costs_at_most_twice_what_is_counted_and_20_kilobytes(shape: str) -> None:
    world = HubHarness()
    messages = [encode(Register(id="r", name="a", **SHAPES[shape](number))) for number in range(AGENTS)]
    world.join("first", "work")
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        counted = -world.hub.summary()["records_bytes"]
        for message in messages:
            client = world.connect()
            world.received(client.connection, message)
            client.inbox.clear()
        world.history.clear()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    counted += world.hub.summary()["records_bytes"]
    assert (after - before) / AGENTS <= 2 * counted / AGENTS + 20_000
    assert counted / AGENTS <= 2 * (after - before) / AGENTS + 20_000  # It is not counted much too high either.


def test_every_payload_that_a_record_holds_is_counted() -> None:
    world, worker, requester = couple()
    large = "x" * 50_000
    requester.delegate("in", "greet", input=large)
    assert world.hub.tasks.bytes > 50_000
    requester.delegate("out", "greet")
    worker.succeed("out", large)
    assert world.hub.tasks.bytes > 100_000
    requester.delegate("detail", "greet")
    worker.ask(Status(task_id="detail", detail=large))
    assert world.hub.tasks.bytes > 150_000, "the detail of the last progress is kept and not counted"
    requester.delegate("error", "greet")
    worker.fail("error", large)
    assert world.hub.tasks.bytes > 200_000, "the text of an error is kept and not counted"


def test_outputs_make_room_too() -> None:
    world, worker, requester = couple(records_bytes_max=200_000)
    for number in range(10):
        requester.delegate(f"t{number}", "greet")
    for number in range(10):
        worker.succeed(f"t{number}", "x" * 50_000)
    assert world.hub.tasks.bytes <= 200_000


def test_shutting_down_hub_takes_no_new_task_and_finishes_the_others() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "greet")
    world.hub.shut_down()
    assert requester.refused(Delegate(task_id="u", capability="greet")) == "shutting_down"
    assert world.hub.tasks.in_progress == 1
    worker.succeed("t")
    assert settled(requester) == [("t", "completed", None)]
    assert world.hub.tasks.in_progress == 0


# No message is larger than the hub allows others to send. (The world sees to that in every story.)


def largest(limit: int, make: Callable[[str], AgentMessage]) -> AgentMessage:
    """Return a message of exactly `limit` bytes."""
    return make("x" * (limit - len(encode(make("")))))


@pytest.mark.parametrize(
    "make",
    [
        lambda text: Delegate(task_id="t", capability="greet", input=text),
        lambda text: Delegate(task_id="t", capability="greet", input=[text]),
        lambda text: Broadcast(message=text),
    ],
)
def test_what_could_not_be_passed_on_within_the_limit_is_too_large(make: Callable[[str], AgentMessage]) -> None:
    _, requester = pair(message_bytes_max=10_000)
    assert requester.refused(largest(9999, make)) == "too_large"
    assert not isinstance(requester.ask(largest(8800, make)), Error)


def test_result_and_progress_that_could_not_be_passed_on_are_too_large() -> None:
    worker, requester = pair(message_bytes_max=10_000)
    requester.delegate("t", "greet")
    assert worker.refused(largest(9999, lambda text: Status(task_id="t", detail=text))) == "too_large"
    assert worker.refused(largest(9999, lambda text: Result(task_id="t", success=True, output=text))) == "too_large"
    assert worker.succeed("t", "x" * 8000).state == "completed"


@pytest.mark.parametrize("sender", ["worker", "requester"])
def test_error_of_the_largest_size_fits_or_is_too_large(sender: str) -> None:
    worker, requester = pair(message_bytes_max=10_000)
    requester.delegate("t", "greet")
    program = {"worker": worker, "requester": requester}[sender]
    program.tell(largest(10_000, lambda text: Result(task_id="t", success=False, error=text)))


def test_numbers_that_grow_when_they_are_written_again_are_too_large() -> None:
    world, _, requester = couple(message_bytes_max=10_000)
    raw = b'{"type":"delegate","id":"1","task_id":"t","capability":"greet","input":[%s]}' % b",".join([b"1e15"] * 1500)
    assert len(raw) < 9000
    world.received(requester.connection, raw)
    assert [message.type for message in requester.received()] in (["error"], ["status"])


def test_late_fetch_of_large_payloads_shows_what_fits() -> None:
    worker, requester = pair(message_bytes_max=20_000)
    requester.delegate("t", "greet", input="x" * 7000)
    worker.ask(Status(task_id="t", detail="x" * 7000))
    assert requester.ask(Status(task_id="t")).detail is not None
    worker.succeed("t", "x" * 15_000)
    report = requester.ask(Status(task_id="t"))
    assert report.output == "x" * 15_000


def test_late_fetch_with_input_detail_and_output_fits() -> None:
    worker, requester = pair(message_bytes_max=20_000)
    requester.delegate("t", "greet", input="x" * 7000)
    worker.ask(Status(task_id="t", detail="x" * 7000))
    worker.succeed("t", "x" * 7000)
    assert requester.ask(Status(task_id="t")).output == "x" * 7000


def test_late_fetch_with_the_longest_names_fits() -> None:
    name = "\N{GRINNING FACE}" * 128
    world = HubHarness(message_bytes_max=20_000)
    worker, requester = world.join("worker", name), world.join("requester")
    requester.delegate("parent", agent_id=worker.agent_id)
    other = world.join("other", name)
    worker.delegate("t", name, parent_id="parent", input=1)
    assert delivered(other) == ["t"]
    assert not isinstance(other.succeed("t", "x" * 18_800), Error)
    worker.tell(Status(id="\x01" * 128, task_id="t"))  # Six bytes each on the wire.


def test_late_fetch_of_numbers_that_grow_fits() -> None:
    world, worker, requester = couple(message_bytes_max=20_000)
    numbers = b",".join([b"1e15"] * 900)
    raw = b'{"type":"delegate","id":"1","task_id":"t","capability":"greet","input":[%s]}' % numbers
    world.received(requester.connection, raw)
    assert delivered(worker) == ["t"]
    raw = b'{"type":"result","id":"1","task_id":"t","success":true,"output":[%s]}' % numbers
    world.received(worker.connection, raw)
    assert requester.ask(Status(task_id="t")).state == "completed"


def test_agent_with_the_longest_names_of_tasks_can_come_back() -> None:
    world = HubHarness(message_bytes_max=4096)
    worker, requester = world.join("worker", "greet"), world.join("requester")
    worker.register("worker", "greet", max_tasks=10_000)
    for number in range(100):
        requester.delegate("x" * 126 + f"{number:02}", "greet")
    worker.lose_connection()
    worker.come_back("greet")


@pytest.mark.parametrize("limit", [1024, 4096])
def test_replies_of_the_hub_fit_at_the_least_limit_and_with_the_longest_names(limit: int) -> None:
    world = HubHarness(message_bytes_max=limit)
    worker, name = world.join("w", "c"), "x" * 128
    for message in (
        Status(),
        Discover(),
        Heartbeat(),
        Delegate(task_id=name, agent_id=name),
        Delegate(task_id=name, capability=name, wait=True),
        Status(task_id=name),
        Status(tasks=True),
        Status(task_id=name, progress=0.5),
        Result(task_id=name, success=True),
        Broadcast(message=name),
        Deregister(),
    ):
        worker.tell(dataclasses.replace(message, id=name))
    assert worker.close_code == 1000


def test_agent_with_thousands_of_tasks_can_come_back() -> None:
    world = HubHarness()
    worker, requester = world.join("worker", "greet", max_tasks=10_000), world.join("requester")
    for number in range(9000):
        requester.tell(Delegate(task_id=f"{number:0128}", capability="greet"))
    worker.lose_connection()
    worker.come_back("greet", max_tasks=10_000)


# Forgetting


def test_ended_record_is_kept_for_its_retention_and_then_dropped() -> None:
    world, worker, requester = couple(retention_s=100.0, reap_s=30.0)
    requester.delegate("t", "greet")
    worker.succeed("t")
    world.pass_time(99)
    assert state_of(requester, "t") == "completed"
    world.pass_time(31)
    assert requester.refused(Status(task_id="t")) == "unknown_task"


def test_records_are_dropped_in_batches() -> None:
    world, worker, requester = couple(retention_s=10.0)
    worker.register("worker", "greet", max_tasks=10_000)
    for number in range(2 * TICK_BATCH + 10):
        requester.tell(Delegate(task_id=str(number), capability="greet"))
        worker.tell(Result(task_id=str(number), success=True))
    left = [len(world.hub.tasks.delivered)]
    world.now += 1000
    while world.hub.next_deadline() <= world.now:
        world.tick()
        left.append(len(world.hub.tasks.delivered))
    assert left == [2 * TICK_BATCH + 10, TICK_BATCH + 10, 10, 0]
    assert world.hub.tasks.bytes == 0


def test_result_that_nobody_fetched_is_dropped_with_its_requester() -> None:
    world, worker, requester = couple(retention_s=100.0, grace_s=10.0)
    requester.delegate("t", "greet")
    requester.lose_connection()
    world.pass_time(20)
    worker.succeed("t")
    assert requester.agent_id in world.hub.directory.agents
    world.pass_time(200)
    assert requester.agent_id not in world.hub.directory.agents
    assert requester.come_back().agent_id != requester.agent_id


def test_gone_agent_that_nothing_needs_is_dropped_at_the_end_of_its_grace_time() -> None:
    world, worker, requester = couple(grace_s=10.0)
    worker.lose_connection()
    world.pass_time(10)
    assert list(world.hub.directory.agents) == [requester.agent_id]


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_left_of_agents_and_tasks_that_have_come_and_gone(seed: int) -> None:
    ledger = Ledger(grace_s=20.0, keeps_ended=False)
    world = HubHarness(ledger=ledger, grace_s=20.0, retention_s=60.0, message_bytes_max=4096)
    chaos(world, random.Random(seed), 1500)
    for program in list(world.clients.values()):
        if program.registration is not None and seed % 2:
            program.tell(Deregister())
        else:
            program.lose_connection()
    world.pass_time(1000)
    assert world.is_empty()
    assert set(world.hub.tasks.counts.values()) == {0}


def test_record_of_an_ended_task_costs_about_what_is_reckoned() -> None:
    world, worker, requester = couple()
    count = 2000

    def run(first: int) -> None:
        for number in range(first, first + count):
            raw = b'{"type":"delegate","task_id":"task-%d","capability":"greet","input":{"a":1}}' % number
            world.hub.receive(requester.connection, agenthub.decoder_from_agent()(raw), world.now, len(raw))
            raw = b'{"type":"result","task_id":"task-%d","success":true,"output":{"b":2}}' % number
            world.hub.receive(worker.connection, agenthub.decoder_from_agent()(raw), world.now, len(raw))

    run(0)
    tracemalloc.start()
    try:
        run(count)
        each = tracemalloc.get_traced_memory()[0] / count
    finally:
        tracemalloc.stop()
    assert len(world.hub.tasks.delivered) == 2 * count
    assert RECORD_BYTES / 3 < each < RECORD_BYTES * 3, f"a record costs {each:.0f} bytes"


# Anything in any state


def in_state(world: HubHarness, state: str) -> Client:
    program = world.connect() if state == "observer" else world.join("program", "sing", max_tasks=2)
    if state != "observer":
        world.join("boss").delegate("mine", agent_id=program.agent_id, ttl=1e5)
        program.delegate("own", "greet", wait=True)
    if state == "draining":
        program.tell(Deregister(drain=True))
    if state == "closed":
        program.tell(Deregister())
    program.received()
    return program


TARGETS = ["mine", "own", "theirs", "unknown"]
ANYTHING: list[AgentMessage | InvalidMessage] = [
    InvalidMessage("nonsense", reply_to="1"),
    InvalidMessage("nonsense"),
    Register(name="x", capabilities=["greet", Capability("sing")]),
    Register(name="x", agent_id="nobody", resume="nothing"),
    Deregister(),
    Deregister(drain=True),
    Discover(),
    Discover(capability="greet", limit=1),
    Status(),
    Status(tasks=True),
    Status(progress=0.5),
    *(Status(task_id=task_id) for task_id in TARGETS),
    *(Status(task_id=task_id, progress=0.5, detail=1) for task_id in TARGETS),
    *(Result(task_id=task_id, success=success) for task_id in TARGETS for success in (True, False)),
    *(Result(task_id=task_id, success=True, attempt=7) for task_id in TARGETS),
    Result(task_id="mine", success=False, error=ErrorInfo("agent_lost")),
    *(Delegate(task_id=task_id, capability="greet", wait=True) for task_id in (*TARGETS, "new")),
    Delegate(task_id="new", capability="greet", parent_id="mine"),
    Delegate(task_id="new", capability="nothing"),
    Delegate(task_id="new"),
    Broadcast(message=1),
    Broadcast(message=1, capability="greet"),
    Heartbeat(),
]


@pytest.mark.parametrize("state", ["observer", "registered", "draining", "closed"])
@pytest.mark.parametrize("message", ANYTHING, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("asks", [True, False])
def test_any_message_in_any_state_is_answered_or_refused_and_a_refusal_changes_nothing(
    state: str, message: Any, asks: bool
) -> None:
    world, worker, requester = couple()
    requester.delegate("theirs", "greet")
    program = in_state(world, state)
    worker.lose_connection()
    if not isinstance(message, InvalidMessage):
        message = dataclasses.replace(message, id="1" if asks else None)
    before = snapshot(world.hub)
    program.tell(message)
    errors = [reply for reply in program.inbox if isinstance(reply, Error)]
    if errors or state == "closed" or isinstance(message, InvalidMessage):
        assert snapshot(world.hub) == before
        assert len(program.inbox) == len(errors) == (0 if state == "closed" else 1)
    wants_reply = asks or errors or isinstance(message, InvalidMessage)
    waits = state in ("registered", "draining") and isinstance(message, Deregister) and message.drain and not errors
    replies = [one for one in program.inbox if isinstance(one, Error) or getattr(one, "reply_to", None) == "1"]
    assert len(replies) == (1 if wants_reply and state != "closed" and not waits else 0)


# The same again, to the last byte


def chaos(world: HubHarness, chance: random.Random, steps: int) -> None:
    """Do anything in any order, as `chance` has it."""
    capabilities = ["a", "b", "c"]
    agents: list[Client] = []
    for number in range(steps):
        online = [program for program in world.clients.values() if program.registration is not None]
        move = chance.random()
        if (move < 0.1 and len(online) < 10) or not online:
            agents.append(world.join("agent", *chance.sample(capabilities, 2), max_tasks=chance.randint(1, 3)))
            continue
        program = chance.choice(online)
        records = [*world.hub.tasks.open.values()]
        if move < 0.14:
            program.lose_connection()
        elif move < 0.17:
            program.tell(Deregister(drain=chance.random() < 0.5))
        elif move < 0.22:
            away = chance.choice(agents)
            agents.append(away.come_back(*chance.sample(capabilities, 2)))
        elif move < 0.55:
            message = Delegate(task_id=f"t{number}", wait=chance.random() < 0.5, ttl=chance.choice([5, 50]))
            message.priority, message.max_retries = chance.randint(-3, 3), chance.randint(0, 2)
            if chance.random() < 0.3:
                message.agent_id = chance.choice(agents).agent_id
            else:
                message.capability = chance.choice(capabilities)
            running = list(world.hub.directory.agents[program.agent_id].running)
            if running and chance.random() < 0.4:
                message.parent_id = chance.choice(running)
            program.tell(message)
        elif move < 0.85 and records:
            task = chance.choice(records)
            assignee = [one for one in online if task.assignee is not None and one.agent_id == task.assignee.agent_id]
            sender = assignee[0] if assignee and chance.random() < 0.9 else program
            error = chance.choice(["no", ErrorInfo("agent_lost")])
            sender.tell(Result(task_id=task.task_id, success=chance.random() < 0.7, output=number, error=error))
        elif move < 0.9 and records:
            program.tell(Status(task_id=chance.choice(records).task_id, progress=chance.random()))
        elif move < 0.92:
            program.tell(
                chance.choice([Discover(), Status(), Status(tasks=True), Broadcast(message=1, capability="a")])
            )
        else:
            world.pass_time(chance.expovariate(0.5))


def history(seed: int) -> list[str]:
    """Return all that a hub did in one random story."""
    world = HubHarness(seed=seed, grace_s=5.0, retention_s=20.0, heartbeat_s=20.0)
    chaos(world, random.Random(seed), 600)
    return [f"{connection} {effect!r}" for connection, effect in world.history]


@pytest.mark.parametrize("seed", range(3))
def test_same_calls_in_the_same_order_have_the_same_effects(seed: int) -> None:
    first = history(seed)
    assert len(first) > 500
    assert history(seed) == first


def test_effects_do_not_depend_on_the_order_of_sets() -> None:
    program = (
        "import hashlib, tests.test_hub as t; print(hashlib.sha256('\\n'.join(t.history(7)).encode()).hexdigest())"
    )
    found = set()
    for hash_seed in ("0", "1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program]
        found.add(
            subprocess.run(
                command, env=environment, check=True, capture_output=True, cwd=Path(__file__).parent.parent
            ).stdout
        )
    assert len(found) == 1


def test_illegal_step_raises_and_changes_nothing() -> None:
    world, worker, requester = couple()
    for task_id, success in {"completed": True, "failed": False}.items():
        requester.delegate(task_id, "greet")
        worker.ask(Result(task_id=task_id, success=success))
    requester.delegate("in_progress", "greet")
    requester.delegate("pending", "sing", wait=True)
    before = snapshot(world.hub)
    for task in (*world.hub.tasks.open.values(), *world.hub.tasks.delivered.values()):
        for event in set(TaskEvent) - set(TRANSITIONS[task.state]):
            with pytest.raises(IllegalTransition):
                world.hub.tasks.transition(task, event)
    assert snapshot(world.hub) == before


def test_result_that_comes_with_the_deadline_is_too_late_though_the_clock_has_not_ticked() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "greet", ttl=10)
    world.now += 10
    reply = worker.ask(Result(task_id="t", success=True))
    assert (reply.type, reply.code) == ("error", "task_over")
    world.tick()
    assert state_of(requester, "t") == "timeout"


def test_agent_that_says_it_lost_a_task_is_not_told_of_its_end_again() -> None:
    _, worker, requester = couple()
    requester.delegate("t", "greet")
    worker.received()
    worker.tell(Result(task_id="t", success=False, error=ErrorInfo("agent_lost")))
    assert worker.received() == []
    assert state_of(requester, "t") == "failed"


def test_detail_of_an_attempt_that_was_lost_is_counted_no_more() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "greet", max_retries=1)
    before = world.hub.tasks.bytes
    worker.ask(Status(task_id="t", detail="x" * 5000))
    worker.tell(Result(task_id="t", success=False, error=ErrorInfo("agent_lost")))
    assert world.hub.tasks.bytes < before + 1000


def test_requester_that_may_have_missed_its_result_can_fetch_it_long_after_its_grace_time() -> None:
    world, worker, requester = couple(grace_s=60, retention_s=3600)
    requester.delegate("t", "greet")
    worker.succeed("t", "hello")
    agent_id = requester.agent_id
    requester.lose_connection()
    world.pass_time(1000)
    back = requester.come_back()
    assert back.agent_id == agent_id
    assert back.ask(Status(task_id="t")).output == "hello"


# Settings


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(HubSettings)])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "30", None, True, [1]])
def test_setting_out_of_range_is_a_value_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        HubSettings(**{name: value})


def test_settings_at_their_least() -> None:
    HubSettings(grace_s=0, retention_s=0, message_bytes_max=1024)
    for name in ("heartbeat_s", "reap_s", "open_tasks_max", "pending_tasks_max", "agents_max", "records_bytes_max"):
        with pytest.raises(ValueError, match=name):
            HubSettings(**{name: 0})
    with pytest.raises(ValueError, match="message_bytes_max"):
        HubSettings(message_bytes_max=1023)


def test_defaults_are_those_of_the_protocol() -> None:
    defaults = HubSettings()
    assert (defaults.heartbeat_s, defaults.grace_s, defaults.retention_s, defaults.reap_s) == (30, 60, 3600, 30)
    assert defaults.message_bytes_max == 1024 * 1024
    assert defaults.silence_s == 90


# What the hub is made of

STEPS = st.lists(
    st.tuples(st.sampled_from(["push", "push", "discard", "first", "pop"]), st.integers(0, 20), st.integers(-3, 3)),
    max_size=300,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_lazy_heap_behaves_like_a_sorted_list(steps: list[tuple[str, int, int]]) -> None:
    heap: LazyHeap[int] = LazyHeap()
    model: dict[int, tuple[int, int]] = {}  # Each item's key and serial number.
    for serial, (step, item, key) in enumerate(steps):
        if step == "push":
            heap.push(item, key)
            model[item] = (key, serial)
        elif step == "discard":
            heap.discard(item)
            model.pop(item, None)
        expected = min(((*place, item) for item, place in model.items()), default=None)
        assert heap.first() == (expected and (expected[0], expected[2]))
        if step == "pop" and expected is not None:
            heap.discard(expected[2])
            del model[expected[2]]
        assert len(heap) == len(model)
        assert len(heap.entries) <= 2 * len(model) + 64


def test_lazy_heap_never_compares_its_items() -> None:
    heap: LazyHeap[object] = LazyHeap()
    items = [object() for _ in range(3)]
    for item in items:
        heap.push(item, 0)
    assert heap.first() == (0, items[0])


def test_memory_of_a_lazy_heap_is_bounded_by_what_is_in_it() -> None:
    heap: LazyHeap[int] = LazyHeap()
    for number in range(10_000):
        heap.push(number % 10, number)
        assert len(heap.entries) <= 2 * len(heap) + 64
    for number in range(10):
        heap.discard(number)
    assert len(heap) == 0
    assert len(heap.entries) <= 64
    assert heap.first() is None


def agent_record(name: str) -> AgentRecord:
    return AgentRecord(name, "secret")


def task_record(task_id: str, requester: AgentRecord, sequence: int, priority: int = 0) -> TaskRecord:
    return TaskRecord(task_id, Delegate(task_id=task_id, priority=priority), requester, None, 1, 0.0, 1.0, sequence, 0)


def test_pool_gives_the_least_loaded_agent_and_of_equals_the_one_that_was_so_for_longest() -> None:
    pool, (a, b, c) = Pool("greet"), map(agent_record, "abc")
    for agent, load in ((a, 1), (b, 0), (c, 0)):
        pool.move(agent, None, load)
    assert pool.least_loaded(a) is b
    assert pool.least_loaded(b) is c
    pool.move(b, 0, 2)
    pool.move(c, 0, None)
    assert pool.least_loaded(c) is a
    assert pool.least_loaded(a) is b
    assert pool.least_loaded(a, b) is None
    pool.move(a, 1, None)
    pool.move(b, 2, None)
    assert pool.least_loaded(c, None) is None
    assert pool.free == {}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["push", "discard", "serve"]), st.integers(0, 1000), st.integers(-2, 2)), max_size=60
    )
)
def test_pending_queue_gives_requesters_turns_and_keeps_the_order_of_each(steps: list[tuple[str, int, int]]) -> None:
    queue, requesters = PendingQueue(), [agent_record(name) for name in "abcd"]
    model: list[TaskRecord] = []
    turns: dict[AgentRecord, int] = {}
    for step, (what, number, priority) in enumerate(steps):
        if what == "push" or not model:
            task = task_record(str(step), requesters[number % 4], step, priority)
            if task.requester not in [other.requester for other in model]:
                turns[task.requester] = step
            model.append(task)
            queue.push(task, step)
        elif what == "discard":
            queue.discard(model.pop(number % len(model)))
        else:
            task = model.pop(0)
            turns[task.requester] = step
            queue.discard(task)
            queue.take_turn(task.requester, step)
        model.sort(key=lambda task: (-task.request.priority, turns[task.requester], task.sequence))
        assert bool(queue) == bool(model)
        for excluded in (None, *requesters):
            allowed = [task for task in model if task.requester is not excluded]
            first = queue.first(excluded)
            assert (first and first[1]) is (allowed[0] if allowed else None)
    assert set(queue.by_requester) == set(queue.turns) == {task.requester for task in model}


def test_same_content_tells_kinds_of_numbers_apart_and_not_the_order_of_keys() -> None:
    def same(one: Any, other: Any) -> bool:
        return agenthub.same_content(
            Delegate(id="1", task_id="t", input=one), Delegate(id="2", task_id="t", input=other)
        )

    assert same({"a": 1, "b": None}, {"b": None, "a": 1})
    assert not any((same(1, 1.0), same(1, True), same(0, False), same(None, False), same([1, 2], [2, 1]), same("1", 1)))


def test_large_inputs_are_the_same_only_as_text_because_parsing_them_would_take_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agenthub, "value_of", forbidden)
    world = HubHarness()
    requester = world.join("requester")
    large = [{}] * agenthub.COMPARED_BYTES_MAX
    assert requester.delegate("t", "nobody", input=agenthub.payload_of(large), wait=True).state == "pending"
    assert requester.delegate("t", "nobody", input=agenthub.payload_of(large), wait=True).state == "pending"
    for other in (json.dumps(large).encode(), b"[]"):  # With spaces, and a small message about the large one.
        assert requester.refused(Delegate(task_id="t", capability="nobody", input=other, wait=True)) == "duplicate_task"


def forbidden(*_: Any) -> Any:
    raise AssertionError("this takes long")


@pytest.mark.parametrize("spaces", [b"", b" " * 9000])
def test_comparing_inputs_is_charged(spaces: bytes) -> None:
    world = HubHarness()
    requester = world.join("requester")
    first = Delegate(task_id="t", capability="nobody", input=b"[" + spaces + b"1]", wait=True)
    assert cost_of(requester, first) == cost_of(requester, first) == 1
    requester.delegate("t", "nobody", input=b"[1 ]", wait=True)
    assert world.hub.cost == 1 + (7 + len(spaces)) // agenthub.COST_COMPARED_BYTES


def cost_of(client: Client, message: Any) -> int:
    client.ask(message)
    return client.harness.hub.cost


def test_small_messages_are_charged_with_what_they_make_the_hub_do() -> None:
    world = HubHarness(records_bytes_max=1 << 30)
    worker, requester = world.join("worker", "greet", max_tasks=900), world.join("requester")
    waiting = world.join("other")
    for number in range(900):
        requester.delegate(f"t{number}", "greet", ttl=1e5)
        waiting.delegate(f"w{number}", "later", wait=True, ttl=1e5)
    assert cost_of(worker, Register(name="worker", capabilities=["greet"], max_tasks=900)) == 1 + (
        1 + 900 // agenthub.COST_REFS
    )
    for number in range(900):
        worker.delegate(f"c{number}", "later", parent_id="t0", wait=True, ttl=1e5)
    children = cost_of(worker, Result(task_id="t0", success=True))
    assert children == 1 + 900 // agenthub.COST_STEPS
    taker = world.connect()
    taken = cost_of(taker, Register(name="taker", capabilities=["later"], max_tasks=900))
    assert taken >= 900 // agenthub.COST_STEPS
    assert len(delivered(taker)) == 900
    left = cost_of(taker, Deregister())
    assert left >= 900 // agenthub.COST_STEPS


def test_report_of_a_large_task_is_charged_by_its_size() -> None:
    world = HubHarness()
    worker, requester = world.join("worker", "greet"), world.join("requester")
    large = "x" * 20 * agenthub.COST_BYTES
    requester.delegate("t", "greet", input=agenthub.payload_of(1))
    worker.succeed("t", agenthub.payload_of(large))
    assert cost_of(requester, Status(task_id="t")) >= 20
    requester.delegate("t", "greet", input=agenthub.payload_of(1))  # Brings the outcome again.
    assert world.hub.cost >= 20


def test_status_of_the_hub_is_charged_by_what_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "COST_SCANNED", 10)
    world = HubHarness()
    requesters = [world.join(f"requester{number}") for number in range(50)]
    assert cost_of(requesters[0], Status()) == 1 + 50 // 10
    for requester in requesters:
        requester.delegate(f"task-of-{requester.agent_id}", "nobody", wait=True)
    assert cost_of(requesters[0], Status()) == 1 + 100 // 10


def test_waiting_tasks_are_handed_out_in_batches_and_new_ones_do_not_overtake_them() -> None:
    world = HubHarness()
    requester = world.join("requester")
    count = 3 * TICK_BATCH
    for number in range(count):
        requester.delegate(f"t{number}", "greet", wait=True, ttl=1e5)
    worker = world.join("worker", "greet", max_tasks=2 * count)
    handed_out_at_once = len(delivered(worker))
    assert 0 < handed_out_at_once <= TICK_BATCH
    assert requester.delegate("new", "greet", wait=True, ttl=1e5).state == "pending"
    assert requester.delegate("named", agent_id=worker.agent_id, wait=True, ttl=1e5).state == "pending"
    assert delivered(worker) == []
    world.pass_time(0)
    assert delivered(worker) == [*(f"t{number}" for number in range(handed_out_at_once, count)), "new", "named"]
    assert world.hub.next_deadline() > world.now
    assert requester.delegate("later", "greet").state == "in_progress"


def test_broadcast_that_would_be_too_much_for_all_its_recipients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = HubHarness()
    sender = world.join("sender")
    recipients = [world.join(f"recipient{number}", "news") for number in range(10)]
    message = Broadcast(message=agenthub.payload_of("x" * 1000), capability="news")
    assert sender.ask(message).recipients == 10
    sent = world.hub._message_bytes
    monkeypatch.setattr(agenthub, "BROADCAST_BYTES_MAX", 10 * sent - 1)
    for recipient in recipients:
        assert len(recipient.received()) == 1
    error = sender.ask(message)
    assert (error.code, error.message.split(";")[0]) == (
        "too_large",
        f"to 10 agents, a broadcast may have {sent - 1} bytes",
    )
    assert not any(recipient.received() for recipient in recipients)
    recipients.pop().tell(Deregister())
    assert sender.ask(message).recipients == 9


def test_closing_says_why() -> None:
    world = HubHarness(heartbeat_s=1.0)
    world.connect()
    world.pass_time(3)
    ((_, closed),) = world.history
    assert closed == Close(4001, "silent for three heartbeat intervals")


def test_agent_that_a_cancelled_subtask_leaves_takes_the_next_task_at_once() -> None:
    world = HubHarness()
    first, second = world.join("first", "a", max_tasks=1), world.join("second", "a", max_tasks=1)
    second.delegate("parent", "a")
    for task_id in ("child", "other-child"):
        first.delegate(task_id, "a", parent_id="parent", wait=True)
    first.delegate("next", "a", wait=True)
    second.received()
    second.fail("parent", "never mind")
    assert [message.task_id for message in second.received() if message.type == "delegate"] == ["next"]


def test_log_has_the_reason_why_a_message_is_invalid(caplog: pytest.LogCaptureFixture) -> None:
    HubHarness().connect().tell(agenthub.InvalidMessage("name: must be text"))
    assert "refused code=invalid_message agent=None: name: must be text" in caplog.text
