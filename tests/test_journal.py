"""Section 5, Journal, and what rests on it: what a hub remembers of its last life, and what waits for the disk."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

import agenthub
from agenthub import (
    AgentRow,
    Capability,
    Changes,
    CloseCode,
    Delegate,
    Delegated,
    Deregister,
    ErrorInfo,
    Heartbeat,
    Hub,
    HubServer,
    HubSettings,
    Journal,
    JournalError,
    LocalHub,
    Question,
    Register,
    Result,
    Status,
    Step,
    Talk,
    TaskLife,
    TaskOutcome,
    TaskRow,
    TaskState,
    encode,
    hash_of,
)
from tests.harness import Client, HubHarness, changes_of
from tests.support import CODECS_WITHOUT, PAYLOADS_AS_WRITTEN, WAIT_S, hub_process, raw_client, running

posix_only = pytest.mark.skipif(os.name != "posix", reason="modes, signals and limits of files as on POSIX")

WALL = 1_700_000_000.0  # Since 1970. Whole numbers, so that nothing is lost when clocks are added to it.


class JournaledHarness(HubHarness):
    """A world whose hub has a journal: what changed is written before anybody hears of it.

    `offset` is what its clock lacks to the time since 1970.
    """

    def __init__(
        self,
        path: Path,
        *,
        now: float = 1000.0,
        offset: float = WALL - 1000.0,
        tells_again: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.now, self.offset = now, offset
        self.journal = Journal(path, sync="normal")
        self.hub = Hub(self.hub.settings, entropy=random.Random(now).randbytes, now=now, is_journaled=True)
        self.journal.open()
        agents, tasks, last = self.journal.load(offset)
        self.apply(self.hub.restore(agents, tasks, last - self.hub.settings.grace_s if tells_again else math.inf))

    def apply(self, step: Step) -> None:
        if step.changes is not None:
            self.journal.write(step.changes, self.offset)
        super().apply(step)

    def restart(
        self, *, down_s: float = 0.0, jump_s: float = 0.0, now: float = 48.0, tells_again: bool = True
    ) -> JournaledHarness:
        """End this hub without a word, and start another one whose clock begins elsewhere.

        The machine's calendar goes on by `down_s`, and is then set forward by `jump_s` (back if negative).
        """
        self.journal.close()
        settings = dataclasses.asdict(self.hub.settings)
        offset = self.now + self.offset + down_s + jump_s - now
        world = JournaledHarness(Path(self.journal.path), now=now, offset=offset, tells_again=tells_again, **settings)
        world.requests = self.requests
        return world

    def back(self, program: Client, *capabilities: Any, **fields: Any) -> Client:
        """Return a connection to this hub that has taken up an identity from before."""
        fields = {"agent_id": program.agent_id, "resume": program.registration.resume, **fields}
        return self.join(fields.pop("name", "back"), *capabilities, **fields)

    def rows(self, table: str) -> int:
        assert self.journal.database is not None
        return int(self.journal.database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


Start = Callable[..., JournaledHarness]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """A function that starts the first hub on a journal. All journals are closed at the end."""
    opened: list[Journal] = []
    real = Journal.open

    def remember(journal: Journal) -> None:
        opened.append(journal)
        real(journal)

    monkeypatch.setattr(Journal, "open", remember)
    yield lambda **settings: JournaledHarness(tmp_path / "hub.db", **settings)
    for journal in opened:
        journal.close()


@pytest.fixture
def couple(start: Start) -> Callable[..., tuple[JournaledHarness, Client, Client]]:
    def make(**settings: Any) -> tuple[JournaledHarness, Client, Client]:
        world = start(**settings)
        return world, world.join("worker", "work"), world.join("requester")

    return make


Couple = Callable[..., tuple[JournaledHarness, Client, Client]]


def delivered(program: Client) -> list[tuple[str, int]]:
    """Return the tasks that came in, in order, with their attempts."""
    return [(message.task_id, message.attempt) for message in program.received() if isinstance(message, Delegated)]


def settled(program: Client) -> list[tuple[str, str, str | None]]:
    """Return the ends of tasks that came in, in order: id, state and code."""
    ends = [message for message in program.received() if isinstance(message, TaskOutcome)]
    return [(end.task_id, end.state, end.error and end.error.code) for end in ends]


def state_of(program: Client, task_id: str) -> str:
    return str(program.ask(Status(task_id=task_id)).state)


# The round trip


PAYLOADS: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "minus-zero": -0.0,
    "whole-float": 1.0,
    "small": 1e-300,
    "large": 1.7976931348623157e308,
    "big": 2**64 - 1,
    "text": "Grüße, \N{SNOWMAN} \N{GRINNING FACE}\u2028 \x7f\u200d",
    "nul": "\0before and after\0",
    "escapes": '"\\/\b\f\n\r\t',
    "empty": "",
    "list": [[], {}, [None, [None]]],
    "nulls": {"a": None, "b": [None, {"c": None}]},
    "object": {"\0": 1, "": {"\N{SNOWMAN}": [True, False, 0.1 + 0.2]}},
}


def nested(depth: int) -> Any:
    value: Any = "core"
    for _ in range(depth):
        value = [value]
    return value


def json_of(value: Any) -> str:
    """Return what tells 1 from 1.0 and from true, and 0.0 from -0.0."""
    return json.dumps(agenthub.value_of(value), sort_keys=True)


@pytest.mark.parametrize("payload", [*PAYLOADS.values(), nested(60)], ids=[*PAYLOADS, "nested"])
def test_payload_comes_back_as_it_was(couple: Couple, payload: Any) -> None:
    world, worker, requester = couple()
    read = None if "\\u0000" in json_of(payload) else payload  # What the hub itself reads has no NUL.
    metadata = {"payload": read}
    worker.register("worker", Capability("work", "", {"default": read}, {"const": read}), metadata=metadata)
    for task_id in ("open", "completed"):
        requester.delegate(task_id, "work", input=payload)
    requester.lose_connection()
    worker.succeed("completed", payload)
    world = world.restart()
    agent = world.hub.directory.agents[worker.agent_id]
    assert json_of(agent.metadata) == json_of(metadata)
    assert json_of(agent.capabilities["work"].input_schema) == json_of({"default": read})
    assert json_of(agent.capabilities["work"].output_schema) == json_of({"const": read})
    assert json_of(world.hub.tasks.open["open"].request.input) == json_of(payload)
    (told,) = [message for message in world.back(requester).received() if isinstance(message, TaskOutcome)]
    assert (told.task_id, told.success, json_of(told.output)) == ("completed", True, json_of(payload))


@pytest.mark.parametrize(
    "error", [ErrorInfo("c" * 128, "x" * 65_536), ErrorInfo("\N{SNOWMAN}", "\x01\n"), "", "\N{SNOWMAN}"]
)
def test_error_comes_back_as_it_was(couple: Couple, error: Any) -> None:
    world, worker, requester = couple()
    requester.delegate("t", "work")
    requester.lose_connection()
    worker.fail("t", error)
    before = world.hub.tasks.undelivered["t"].error
    world = world.restart()
    assert world.hub.tasks.undelivered["t"].error == before
    (told,) = [message for message in world.back(requester).received() if isinstance(message, TaskOutcome)]
    assert (told.success, told.error) == (False, before)


def kept_of(hub: Hub) -> dict[str, Any]:
    """Return all of a hub that a journal has to keep, by name, and in order where that matters."""

    def task_of(task: Any) -> dict[str, Any]:
        return {
            "request": dataclasses.replace(task.request, id=None),
            "input": json_of(task.request.input),
            "requester": task.requester.agent_id,
            "parent": task.parent.task_id if task.parent and task.state in ("pending", "in_progress") else None,
            "assignee": task.assignee and task.assignee.agent_id,
            "settled_by": task.settled_by and task.settled_by.agent_id,
            "output": json_of(task.output),
            "children": sorted(task.children or {}),
            **{
                name: getattr(task, name)
                for name in ("depth", "accepted_at", "deadline", "sequence", "state", "attempt", "success")
            },
            "bytes": task.bytes - task.detail_bytes,  # What a worker reports on its way is not kept.
            "end": (task.error, task.ended_at) if task.state in agenthub.FINAL_STATES else None,
        }

    def agent_of(agent: Any) -> dict[str, Any]:
        names = ("resume_hash", "state", "name", "description", "capabilities", "words", "max_tasks")
        tables = ("running", "awaited", "requested")
        return {
            **{name: getattr(agent, name) for name in (*names, "metadata", "info_bytes", "delivered", "load")},
            **{name: sorted(getattr(agent, name)) for name in tables},
            "undelivered": list(agent.undelivered),
        }

    deadlines = [
        (key, getattr(item, "task_id", None) or item.agent_id)
        for key, serial, item in hub.deadlines.entries
        if hub.deadlines.alive.get(item) == serial and not isinstance(item, agenthub.Connection)
    ]
    tasks = (*hub.tasks.open.values(), *hub.tasks.delivered.values(), *hub.tasks.undelivered.values())
    queued = sorted(
        (task for task in hub.tasks.open.values() if task.state == "pending"), key=lambda task: task.queue_key
    )
    return {
        "agents": {agent.agent_id: agent_of(agent) for agent in hub.directory.agents.values()},
        "gone": sorted(hub.directory.gone),
        "pools": {name: sorted(pool.members) for name, pool in hub.directory.pools.items()},
        "tasks": {task.task_id: task_of(task) for task in tasks},
        "open": sorted(hub.tasks.open),
        "ended": list(hub.tasks.delivered),
        "undelivered": list(hub.tasks.undelivered),
        "queued": [(task.task_id, task.queue_key) for task in queued],
        "queues": sorted(map(str, hub.pending.queues)),
        "deadlines": sorted(deadlines),
        "sequence": hub.tasks.sequence,
        "bytes": (hub.tasks.bytes - sum(task.detail_bytes for task in tasks), hub.tasks.ended_bytes),
        "counts": (hub.tasks.counts, hub.tasks.ended, hub.tasks.running),
    }


def live(world: JournaledHarness) -> dict[str, Client]:
    """Let everything happen that a hub has to keep; return the agents, all of them away by then."""
    greet = Capability("greet", "Says \N{SNOWMAN}", {"type": "object", "default": None}, {"const": [None]})
    worker = world.join(
        "Worker \N{SNOWMAN}", greet, "work", description="d\x01", max_tasks=3, metadata={"a": [None, 1.0]}
    )
    second = world.join("second", "work", "other", max_tasks=1)
    requester, absent, leaver = world.join("requester"), world.join("absent"), world.join("leaver")
    world.pass_time(0.25)
    for name, payload in PAYLOADS.items():  # Ended, and told.
        requester.delegate(f"told-{name}", "greet", input=payload, priority=7)
        worker.succeed(f"told-{name}", payload)
        world.pass_time(0.25)
    requester.delegate("failed", "greet")
    worker.fail("failed", ErrorInfo("\N{SNOWMAN}", "it\ndid not"))
    requester.delegate("called-off", "nobody", wait=True)
    requester.fail("called-off", "no more")
    absent.delegate("late", "greet", ttl=0.5, max_retries=3)
    absent.delegate("undelivered", "greet", input={"a": None})
    absent.delegate("retried", "other", max_retries=5, ttl=2000.0, priority=-100)
    absent.lose_connection()
    worker.succeed("undelivered", [None, {"b": None}])
    world.pass_time(0.5)  # `late` is.
    second.lose_connection()
    second = second.come_back("work", "other", name="second", max_tasks=1)
    second.fail("retried", ErrorInfo("agent_lost", "never heard of it"))  # And gets it again.
    requester.delegate("parent", "greet", ttl=100.0)
    worker.delegate("child", agent_id=second.agent_id, parent_id="parent", ttl=500.0, priority=3)
    worker.tell(Status(task_id="parent", progress=0.5, detail="half"))
    requester.delegate("second-running", "greet", max_retries=2)
    leaver.delegate("of-one-that-left", "work", ttl=50.0)
    for number, priority in enumerate((0, 5, -5, 5, 0, 100, -100)):
        requester.delegate(f"pending-{number}", "work", priority=priority, input=number, ttl=400.0 + number)
    requester.delegate("named", agent_id=worker.agent_id, capability="greet", priority=5)
    requester.delegate("named-alone", agent_id=second.agent_id, max_retries=1)
    requester.delegate("for-nobody-yet", "nobody", wait=True, priority=1)
    requester.delegate("for-one-not-yet-there", agent_id="nobody-00000000", wait=True)
    leaver.ask(Deregister())
    worker.succeed("of-one-that-left", 1)  # The last end that the journal has as told.
    agents = {"worker": worker, "second": second, "requester": requester}
    for agent in agents.values():
        agent.lose_connection()
    return {**agents, "absent": absent}


def test_all_that_a_hub_has_to_keep_comes_back_equal(start: Start) -> None:
    world = start()
    live(world)
    before = kept_of(world.hub)
    assert set(world.hub.tasks.counts.values()) & {0} == set(), "a state that this story leaves out"
    away = {subject for key, subject in before["deadlines"] if key == world.now + world.hub.settings.grace_s}
    after = kept_of(world.restart(now=world.now, tells_again=False).hub)
    # Whoever was away has the whole of its grace time again.
    for kept in (before, after):
        kept["deadlines"] = [one for one in kept["deadlines"] if one[1] in before["tasks"]]
    assert away
    for part in before:
        assert after[part] == before[part], part


def test_hub_that_came_back_goes_on_as_the_first_would_have(tmp_path: Path, start: Start) -> None:
    def go_on(world: JournaledHarness, agents: dict[str, Client]) -> list[Any]:
        """Return what everybody heard, in order."""
        began = len(world.history)
        absent, requester = world.back(agents["absent"]), world.back(agents["requester"])
        second = world.back(agents["second"], "work", "other", "nobody", name="second", max_tasks=1)
        worker = world.back(agents["worker"], "greet", "work", name="worker", max_tasks=2)
        assert absent.registration.tasks == []
        worker.delegate("second-child", agent_id=second.agent_id, parent_id="parent")
        for _ in range(12):
            for one in (worker, second):
                for task in sorted(world.hub.directory.agents[one.agent_id].running):
                    one.succeed(task, {"by": one.agent_id})
                    world.pass_time(0.25)
        requester.delegate("new", "work", priority=5)
        requester.delegate("told-zero", "greet", input=0, priority=7)
        requester.ask(Status(tasks=True))
        requester.lose_connection()
        world.pass_time(5000)
        return [(connection, plain(action)) for connection, action in world.history[began:]]

    def plain(action: Any) -> Any:
        if not isinstance(action, bytes):
            return action
        message = json.loads(action)
        for task in message.get("tasks", ()):
            task.pop("progress", None)  # Not kept.
        if message["type"] == "register":  # They may be listed in any order.
            message["tasks"].sort(key=lambda task: task["task_id"])
        return message

    first = start()
    agents = live(first)
    for suffix in ("", "-wal"):
        shutil.copy(f"{first.journal.path}{suffix}", tmp_path / f"copy.db{suffix}")
    second = JournaledHarness(tmp_path / "copy.db", now=first.now, offset=first.offset, tells_again=False)
    second.requests, second.connections = first.requests, first.connections
    ways = go_on(second, agents), go_on(first, agents)
    assert len(ways[0]) > 40
    for one, other in zip(*ways, strict=True):
        assert one == other
    assert kept_of(second.hub) == kept_of(first.hub)


def test_many_lives_of_a_hub_lose_nothing(start: Start) -> None:
    """Whatever happens first in the life of a hub, the next one knows it."""
    world = start(grace_s=1000.0, retention_s=1000.0)
    rng = random.Random(4)
    worker, requester = world.join("worker", "work", max_tasks=3), world.join("requester")
    known: dict[str, str] = {}
    for life in range(30):
        for number in range(rng.randrange(4)):
            task_id = f"{life}.{number}"
            known[task_id] = requester.delegate(task_id, "work", priority=rng.randrange(3), ttl=1000.0).state
        for task_id in list(world.hub.directory.agents[worker.agent_id].running):
            if rng.random() < 0.4:
                known[task_id] = worker.succeed(task_id).state
        requester.received()
        expected = {task_id: state_of(requester, task_id) for task_id in known}
        world = world.restart(down_s=1.0, now=float(life))
        worker = world.back(worker, "work", max_tasks=3)
        requester = world.back(requester)
        assert {task_id: state_of(requester, task_id) for task_id in known} == expected
        for task_id, state in known.items():
            assert state != "completed" or expected[task_id] == "completed"
    assert sorted(TaskState(row[0]) for row in rows_of(world, "SELECT state FROM tasks")) == sorted(expected.values())


def rows_of(world: JournaledHarness, query: str) -> list[Any]:
    assert world.journal.database is not None
    return world.journal.database.execute(query).fetchall()


def test_no_secret_is_in_the_file(couple: Couple) -> None:
    world, worker, requester = couple()
    requester.delegate("the-task", "work")
    worker = worker.come_back("work")
    secrets = [program.registration.resume for program in (worker, requester)]
    raw = b"".join(Path(f"{world.journal.path}{suffix}").read_bytes() for suffix in ("", "-wal"))
    assert b"the-task" in raw
    for secret in secrets:
        assert hash_of(secret).encode() in raw
        assert secret.encode() not in raw
        assert bytes.fromhex(secret) not in raw
    world.journal.close()
    raw = Path(world.journal.path).read_bytes()
    assert b"the-task" in raw
    assert not any(secret.encode() in raw for secret in secrets)


class WithoutChanges(HubHarness):
    def apply(self, step: Step) -> None:
        assert step.changes is None
        super().apply(step)


def test_without_a_journal_no_step_has_changes() -> None:
    world = WithoutChanges()
    worker, requester = world.join("worker", "work"), world.join("requester")
    requester.delegate("t", "work")
    worker.succeed("t")
    worker.lose_connection()
    world.pass_time(10_000)
    assert world.hub.summary()["journal"] == "none"


def test_what_no_journal_keeps_is_no_change(couple: Couple) -> None:
    world, worker, requester = couple()
    requester.delegate("t", "work")
    said = [Status(), Status(tasks=True), Status(task_id="t"), agenthub.Discover(), Heartbeat()]
    said += [Status(task_id="t", progress=0.5), agenthub.Broadcast(message=1), Delegate(task_id="t", capability="work")]
    said += [Result(task_id="t", success=True, attempt=7), Delegate(task_id="u", capability="none")]
    for message in said:
        for program in (worker, requester):
            message.id = "1"
            assert world.hub.receive(program.connection, message, world.now, 100).changes is None, message
    assert world.hub.disconnected(worker.connection, world.now).changes is None


# After a restart: agents


def test_agent_takes_up_its_place_with_its_secret(couple: Couple) -> None:
    world, worker, requester = couple()
    world = world.restart()
    assert world.hub.summary()["agents_away"] == 2
    refused = Register(name="worker", agent_id=worker.agent_id, resume=requester.registration.resume)
    assert world.connect().refused(refused) == "unauthorized"
    assert world.connect().refused(Register(name="worker", agent_id=worker.agent_id)) == "unauthorized"
    empty = Register(name="worker", agent_id=worker.agent_id, resume=hash_of(worker.registration.resume))
    assert world.connect().refused(empty) == "unauthorized"
    back = world.back(worker, "work")
    assert (back.agent_id, back.registration.resume) == (worker.agent_id, worker.registration.resume)
    world = world.restart()
    again = world.back(back, "work")
    assert (again.agent_id, again.registration.resume) == (worker.agent_id, worker.registration.resume)


def test_agent_that_is_away_counts_as_there_after_a_restart(couple: Couple) -> None:
    world, worker, requester = couple()
    world = world.restart()
    requester = world.back(requester)
    assert requester.ask(agenthub.Discover()).total == 1
    assert requester.delegate("t", "work").state == "pending"
    assert requester.delegate("u", agent_id=worker.agent_id).state == "pending"
    assert delivered(world.back(worker, "work")) == [("t", 1), ("u", 1)]


def test_agent_is_after_a_restart_what_it_last_said_it_was(couple: Couple) -> None:
    world, worker, requester = couple()
    worker.register("singer", "sing", description="sings", max_tasks=2, metadata={"a": 1})
    world = world.restart()
    requester = world.back(requester)
    assert requester.refused(Delegate(task_id="t", capability="work")) == "no_agent"
    agent = world.hub.directory.agents[worker.agent_id]
    assert (agent.name, agent.description, agent.max_tasks, agent.metadata) == ("singer", "sings", 2, {"a": 1})


def test_agent_that_does_not_come_back_in_time_loses_its_tasks(couple: Couple) -> None:
    world, worker, requester = couple(grace_s=60.0)
    requester.delegate("lost", "work")
    requester.delegate("retried", "work", max_retries=1)
    requester.delegate("waits", agent_id=worker.agent_id, max_retries=1)
    world = world.restart(down_s=100.0, now=7.0)
    requester, other = world.back(requester), world.join("other", "work")
    world.pass_time(59.75)
    assert settled(requester) == []
    assert delivered(other) == []
    world.pass_time(0.25)
    assert settled(requester) == [("lost", "failed", "agent_lost")]
    assert delivered(other) == [("retried", 2)]
    assert requester.ask(Status(task_id="waits")).agent_id == worker.agent_id
    assert delivered(world.back(worker)) == [("waits", 2)]


def test_agents_that_are_gone_leave_no_rows(couple: Couple) -> None:
    world, worker, requester = couple(grace_s=60.0)
    assert world.rows("agents") == 2
    worker.ask(Deregister())
    assert world.rows("agents") == 1
    world = world.restart()
    world.pass_time(60)
    assert world.rows("agents") == 0
    assert world.is_empty()
    assert requester.agent_id not in world.hub.directory.agents


def test_gone_agent_is_kept_for_what_it_is_to_be_told_and_no_longer(couple: Couple) -> None:
    world, worker, requester = couple(grace_s=10.0, retention_s=100.0)
    requester.delegate("t", "work")
    requester.lose_connection()
    world.pass_time(10)
    worker.succeed("t")
    world = world.restart()
    assert list(world.hub.directory.gone) == [requester.agent_id]
    assert settled(world.back(requester)) == [("t", "completed", None)]
    world = world.restart()
    world.pass_time(1000)
    assert world.is_empty()
    assert (world.rows("agents"), world.rows("tasks")) == (0, 0)


def test_agent_that_left_before_a_restart_is_gone_after_it(couple: Couple) -> None:
    world, worker, requester = couple()
    requester.delegate("t", agent_id=worker.agent_id, max_retries=1)  # Waits for it, wherever it is.
    worker.ask(Deregister())
    world = world.restart()
    requester = world.back(requester)
    assert requester.refused(Delegate(task_id="u", agent_id=worker.agent_id)) == "unknown_agent"
    assert delivered(world.back(worker)) == [("t", 2)]


def test_results_for_a_requester_that_left_are_kept_for_nobody(couple: Couple) -> None:
    world, worker, requester = couple()
    requester.delegate("t", "work")
    requester.ask(Deregister())
    world = world.restart()
    worker = world.back(worker, "work")
    worker.succeed("t", 1)
    assert list(world.hub.tasks.delivered) == ["t"]
    world = world.restart()
    assert list(world.hub.tasks.delivered) == ["t"]
    assert world.hub.tasks.undelivered == {}


def test_agent_that_has_left_but_is_waited_for_stays_one_that_has_left(couple: Couple) -> None:
    world, worker, requester = couple()
    worker.delegate("own", "nothing", wait=True, ttl=10)
    requester.delegate("waits", agent_id=worker.agent_id, max_retries=1)
    worker.ask(Deregister())
    world = world.restart()
    world.pass_time(20)
    assert "own" not in world.hub.tasks.undelivered  # Nothing is kept for it.
    assert "own" in world.hub.tasks.delivered


# After a restart: tasks


def test_running_task_goes_on_and_its_result_is_accepted(couple: Couple) -> None:
    world, worker, requester = couple()
    requester.delegate("t", "work")
    world = world.restart(down_s=5.0)
    worker, requester = world.back(worker, "work"), world.back(requester)
    assert [(ref.task_id, ref.attempt) for ref in worker.registration.tasks] == [("t", 1)]
    assert requester.refused(Result(task_id="t", success=True)) == "not_assigned"
    assert worker.refused(Result(task_id="t", success=True, attempt=2)) == "stale_attempt"
    assert worker.succeed("t", "done", attempt=1).state == "completed"
    assert settled(requester) == [("t", "completed", None)]
    assert world.hub.directory.agents[worker.agent_id].running == {}


def test_attempts_are_counted_on(couple: Couple) -> None:
    world, worker, requester = couple()
    requester.delegate("t", "work", max_retries=2)
    for attempt in (1, 2):
        world = world.restart()
        worker = world.back(worker, "work")
        assert [(ref.task_id, ref.attempt) for ref in worker.registration.tasks] == [("t", attempt)]
        worker.fail("t", ErrorInfo("agent_lost", "never got it"), attempt=attempt)
        assert delivered(worker) == [("t", attempt + 1)]
    world = world.restart()
    worker = world.back(worker, "work")
    assert worker.refused(Result(task_id="t", success=True, attempt=2)) == "stale_attempt"
    worker.fail("t", ErrorInfo("agent_lost", "never got it"))
    assert settled(world.back(requester)) == [("t", "failed", "agent_lost")]


def test_pending_tasks_are_handed_out_in_the_same_order(couple: Couple) -> None:
    world, worker, requester = couple()
    worker.lose_connection()
    for number, priority in enumerate([0, 5, -5, 5, 0, 100, -100]):
        requester.delegate(f"t{number}", "work", priority=priority)
    requester.delegate("named", agent_id=worker.agent_id, priority=5)
    world = world.restart()
    requester = world.back(requester)
    requester.delegate("new", "work", priority=5)  # After those that came before.
    worker = world.back(worker, "work", max_tasks=3)
    order = []
    while handed := delivered(worker):
        order += [task_id for task_id, _ in handed]
        worker.succeed(handed[0][0])
        for task_id, _ in handed[1:]:
            worker.succeed(task_id)
    assert order == ["t5", "t1", "t3", "named", "new", "t0", "t4", "t2", "t6"]


def test_tasks_of_one_priority_stay_in_the_order_of_arrival_over_restarts(couple: Couple) -> None:
    world, worker, requester = couple()
    worker.lose_connection()
    for number in range(12):
        requester.delegate(f"t{number}", "work")
        if number % 3 == 2:
            world = world.restart(now=float(100 - number))
            requester = world.back(requester)
    assert [task_id for task_id, _ in delivered(world.back(worker, "work"))] == [f"t{number}" for number in range(12)]


def test_results_for_the_absent_wait_over_restarts(couple: Couple) -> None:
    world, worker, requester = couple()
    for task_id in ("t", "u"):
        requester.delegate(task_id, "work")
    requester.lose_connection()
    worker.succeed("u", [1])
    world = world.restart().restart(down_s=1.0)
    worker = world.back(worker, "work")
    worker.succeed("t", [2])
    world = world.restart()
    assert [
        (end.task_id, end.sender, end.output)
        for end in world.back(requester).received()
        if isinstance(end, TaskOutcome)
    ] == [("u", worker.agent_id, [1]), ("t", worker.agent_id, [2])]


def test_requester_is_told_again_of_what_ended_just_before_and_not_of_the_rest(couple: Couple) -> None:
    world, worker, requester = couple(grace_s=60.0)
    for task_id in ("long-ago", "just-before", "last"):
        requester.delegate(task_id, "work")
    worker.succeed("long-ago")
    world.pass_time(100)
    worker.succeed("just-before")
    world.pass_time(1)
    worker.succeed("last")
    world = world.restart(down_s=1000.0)
    requester = world.back(requester)
    assert settled(requester) == [("just-before", "completed", None), ("last", "completed", None)]
    assert state_of(requester, "long-ago") == "completed"
    assert settled(requester.come_back()) == []


def test_requester_is_told_again_though_time_has_passed_since_the_last_end(couple: Couple) -> None:
    """What was in the last write may never have been carried out, however long the hub was idle after it."""
    world, worker, requester = couple(grace_s=0.0)
    requester.delegate("t", "work")
    worker.succeed("t")
    world.pass_time(1000)
    world = world.restart(down_s=10.0)
    assert settled(world.back(requester)) == [("t", "completed", None)]


def test_children_end_with_their_parent_after_a_restart(couple: Couple) -> None:
    world, worker, requester = couple()
    requester.delegate("parent", "work")
    worker.delegate("child", agent_id=requester.agent_id, parent_id="parent")
    requester.delegate("grandchild", "work", parent_id="child")
    world = world.restart()
    worker, requester = world.back(worker, "work"), world.back(requester)
    assert worker.refused(Delegate(task_id="child", agent_id=requester.agent_id)) == "duplicate_task"
    assert requester.delegate("another", "work", parent_id="child").state == "in_progress"
    worker.succeed("parent")
    assert world.hub.tasks.open == {}
    assert sorted(settled(requester)) == [
        ("another", "failed", "cancelled"),
        ("grandchild", "failed", "cancelled"),
        ("parent", "completed", None),
    ]


def test_chain_is_no_longer_for_a_restart_in_the_middle_of_it(couple: Couple) -> None:
    world, one, other = couple()
    one.register("one", "work")
    other.register("other", "work")
    parent_id = None
    for depth in range(1, 17):
        one, other = other, one
        assert one.delegate(f"t{depth}", agent_id=other.agent_id, parent_id=parent_id).state == "in_progress"
        parent_id = f"t{depth}"
        if depth % 5 == 0:
            world = world.restart()
            one, other = world.back(one, "work"), world.back(other, "work")
    assert other.refused(Delegate(task_id="t17", agent_id=one.agent_id, parent_id="t16")) == "too_deep"


def test_delegate_that_comes_again_is_recognised(couple: Couple) -> None:
    world, worker, requester = couple()
    given: dict[str, Any] = {"input": {"a": [1.0, None, "\0"]}, "ttl": 100.0, "priority": 3, "max_retries": 1}
    for task_id in ("open", "ended"):
        requester.delegate(task_id, "work", **given)
    worker.succeed("ended", 1)
    world.pass_time(200 - 150.0)
    world = world.restart()
    worker, requester = world.back(worker, "work"), world.back(requester)
    requester.received()
    sequence = world.hub.tasks.sequence
    assert requester.delegate("open", "work", **given).state == "in_progress"
    assert requester.delegate("ended", "work", **given).state == "completed"
    assert settled(requester) == [("ended", "completed", None)]
    for name, value in {"input": {"a": [1, None, "\0"]}, "ttl": 99.0, "priority": 4, "max_retries": 0}.items():
        assert requester.refused(Delegate(task_id="open", capability="work", **{**given, name: value})) == (
            "duplicate_task"
        )
    assert worker.refused(Delegate(task_id="open", capability="work", **given)) == "duplicate_task"
    assert world.hub.tasks.sequence == sequence
    assert delivered(worker) == []


def test_counts_are_right_after_a_restart(start: Start) -> None:
    world = start()
    live(world)
    before = world.hub.summary()
    before["records_bytes"] -= sum(task.detail_bytes for task in world.hub.tasks.open.values())
    world = world.restart(now=world.now)
    after = world.hub.summary()
    for name in ("tasks", "ended", "records_bytes", "journal"):
        assert after[name] == before[name], name
    assert (after["agents"], after["agents_away"], after["connections"]) == (0, len(world.hub.directory.agents), 0)
    assert after["journal"] == "ok"


def test_bounds_count_what_was_there_before_a_restart(couple: Couple) -> None:
    world, worker, requester = couple(open_tasks_max=2, pending_tasks_max=3, agents_max=2)
    for task_id in ("t", "u"):
        requester.delegate(task_id, "nobody", wait=True)
    world = world.restart()
    requester = world.back(requester)
    assert requester.refused(Delegate(task_id="v", capability="work")) == "overloaded"
    assert world.connect().refused(Register(name="third")) == "overloaded"
    worker = world.back(worker)
    assert worker.delegate("w", "nobody", wait=True).state == "pending"
    assert worker.refused(Delegate(task_id="x", capability="nobody", wait=True)) == "overloaded"


# After a restart: time


def test_ttl_counts_on_in_wall_time(couple: Couple) -> None:
    world, worker, requester = couple()
    requester.delegate("t", "work", ttl=100.0)
    world.pass_time(30)
    world = world.restart(down_s=40.0)
    worker, requester = world.back(worker, "work"), world.back(requester)
    report = requester.ask(Status(task_id="t"))
    assert (report.ttl, report.age_s) == (30.0, 70.0)
    world.pass_time(29.75)
    assert settled(requester) == []
    world.pass_time(0.25)
    assert settled(requester) == [("t", "timeout", "timeout")]
    assert worker.refused(Result(task_id="t", success=True)) == "task_over"


def test_what_expired_while_the_hub_was_down_times_out_at_once(couple: Couple) -> None:
    world, worker, requester = couple()
    requester.delegate("running", "work", ttl=100.0)
    requester.delegate("pending", "nobody", ttl=100.0, wait=True)
    world = world.restart(down_s=100.0)
    assert world.hub.next_deadline() <= world.now
    worker, requester = world.back(worker, "work", "nobody"), world.back(requester)
    assert delivered(worker) == []
    assert worker.refused(Result(task_id="running", success=True)) == "task_over"
    world.pass_time(0)
    assert sorted(settled(requester)) == [("pending", "timeout", "timeout"), ("running", "timeout", "timeout")]
    assert world.hub.tasks.open == {}


def test_wall_clock_that_jumps_back_lengthens_no_ttl_beyond_itself(couple: Couple) -> None:
    world, worker, requester = couple()
    requester.delegate("t", "work", ttl=100.0)
    world.pass_time(60)
    world = world.restart(jump_s=-1_000_000.0)
    worker, requester = world.back(worker, "work"), world.back(requester)
    report = requester.ask(Status(task_id="t"))
    assert (report.ttl, report.age_s) == (100.0, 0.0)
    world.pass_time(100)
    assert settled(requester) == [("t", "timeout", "timeout")]


def test_wall_clock_that_jumps_back_keeps_no_record_for_longer_than_retention(couple: Couple) -> None:
    world, worker, requester = couple(retention_s=100.0, reap_s=1.0)
    requester.delegate("t", "work")
    worker.succeed("t")
    world = world.restart(jump_s=-1_000_000.0)
    assert settled(world.back(requester)) == [("t", "completed", None)]
    world.pass_time(101)
    assert world.rows("tasks") == 0


def test_wall_clock_that_jumps_forward_ends_what_it_says_has_expired(couple: Couple) -> None:
    world, _, requester = couple()
    requester.delegate("t", "work", ttl=100.0)
    world = world.restart(jump_s=1_000_000.0)
    requester = world.back(requester)
    world.pass_time(0)
    assert settled(requester) == [("t", "timeout", "timeout")]


def test_clock_of_the_hub_may_begin_anywhere(couple: Couple) -> None:
    world, _, requester = couple()
    requester.delegate("t", "work", ttl=100.0)
    for now in (0.0, 1e6, 0.25):
        world = world.restart(down_s=10.0, now=now)
    assert world.back(requester).ask(Status(task_id="t")).ttl == 70.0


def test_retention_counts_on(couple: Couple) -> None:
    world, worker, requester = couple(retention_s=100.0, reap_s=1.0)
    requester.delegate("t", "work")
    worker.succeed("t")
    world.pass_time(30)
    world = world.restart(down_s=40.0)
    requester = world.back(requester)
    world.pass_time(28)
    assert state_of(requester, "t") == "completed"
    world.pass_time(3)
    assert requester.refused(Status(task_id="t")) == "unknown_task"
    assert world.rows("tasks") == 0


def test_forgotten_tasks_leave_no_rows(couple: Couple) -> None:
    world, worker, requester = couple(retention_s=10.0, reap_s=1.0)
    for number in range(20):
        requester.delegate(f"t{number}", "work")
        worker.succeed(f"t{number}")
    assert world.rows("tasks") == 20
    world.pass_time(20)
    assert world.rows("tasks") == 0
    world = world.restart()
    assert world.hub.tasks.bytes == 0
    requester = world.back(requester)
    assert requester.delegate("t0", "work").state == "pending"
    assert world.rows("tasks") == 1


def test_records_that_made_room_leave_no_rows(couple: Couple) -> None:
    world, worker, requester = couple(records_bytes_max=5 * (agenthub.RECORD_BYTES + 300))
    for number in range(20):
        requester.delegate(f"t{number}", "work")
        worker.succeed(f"t{number}")
    assert world.rows("tasks") == len(world.hub.tasks.delivered) < 20


def test_task_that_begins_and_is_forgotten_between_two_writes_is_never_written(start: Start) -> None:
    world = start(retention_s=0.0, reap_s=1.0)
    world.join("worker", "work")
    hub = world.hub
    steps = [
        hub.connected("r", world.now),
        hub.receive("r", Register(name="requester"), world.now, 100),
        hub.receive("r", Delegate(task_id="t", capability="nobody", wait=True, ttl=0.25), world.now, 100),
        hub.tick(world.now + 0.25),
        hub.tick(world.now + 100),
    ]
    changes = Changes()
    for step in steps:
        changes.merge(step.changes or Changes())
    assert steps[2].changes is not None
    assert len(steps[2].changes.inserted) == 1
    assert (changes.inserted, changes.updated, changes.deleted) == ({}, {}, {})
    world.journal.write(changes, 0.0)


# Files


def use(path: str | Path, **options: Any) -> tuple[list[AgentRow], list[TaskRow]]:
    """Open, load and close a journal; return what is in it."""
    journal = Journal(path, **options)
    journal.open()
    try:
        return journal.load(0.0)[:2]
    finally:
        journal.close()


def task_row(sequence: int, **fields: Any) -> TaskRow:
    request = fields.pop("request", Delegate(task_id=f"t{sequence}", capability="work"))
    row = TaskRow(sequence, "a", request, 1, 100.0, 400.0, 1100, TaskState.PENDING, None, 0, False, 0.0, None)
    return row._replace(**fields)


def agent_row(agent_id: str = "a", **fields: Any) -> AgentRow:
    return AgentRow(agent_id, hash_of("secret"), Register(name="agent", capabilities=[Capability("work")]), True)


def fill(path: Path, count: int = 3) -> None:
    """Make a journal with so many tasks."""
    journal = Journal(path, sync="normal")
    journal.open()
    new = [
        task_row(number, request=Delegate(task_id=f"t{number}", capability="work", input="x" * 500))
        for number in range(1, count + 1)
    ]
    journal.write(changes_of(new, agents=[agent_row()]), 0.0)
    journal.close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def complaint_of(path: str | Path) -> str:
    """Return why a journal cannot be used: one line that names it. No file has changed over that."""
    before = files_of(Path(path).parent) if Path(path).parent.is_dir() else None
    with pytest.raises(JournalError) as caught:
        use(path)
    assert before is None or files_of(Path(path).parent) == before
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@posix_only
def test_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0o000)
    try:
        journal = Journal(tmp_path / "hub.db")
        journal.open()
        journal.write(changes_of(agents=[agent_row()]), 0.0)
        for name in ("hub.db", "hub.db-wal"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name
        journal.close()
    finally:
        os.umask(old)


@pytest.mark.parametrize(("sync", "level"), [("full", 2), ("normal", 1)])
def test_sync_is_as_it_was_asked_for(tmp_path: Path, sync: str, level: int) -> None:
    journal = Journal(tmp_path / "hub.db", sync=sync)
    for _ in range(2):  # It is no property of the file.
        journal.open()
        assert journal.database is not None
        assert journal.database.execute("PRAGMA synchronous").fetchone() == (level,)
        assert journal.database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        journal.close()
    assert Journal(tmp_path / "hub.db").sync == "full"


@pytest.mark.parametrize("sync", ["off", "", "FULL", None, 2])
def test_wrong_sync_is_a_value_error(sync: Any) -> None:
    with pytest.raises(ValueError, match="sync must be full or normal"):
        Journal("hub.db", sync=sync)


def test_path_may_be_of_any_kind(tmp_path: Path) -> None:
    for path in (tmp_path / "as a path.db", str(tmp_path / "as text ?#%20\N{SNOWMAN}.db"), tmp_path / "file:x?mode=ro"):
        use(path)
        assert Path(path).is_file()


def test_journal_in_memory_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    journal = Journal(":memory:")
    journal.open()
    journal.write(changes_of([task_row(1)], agents=[agent_row()]), 0.0)
    assert len(journal.load(0.0)[1]) == 1
    assert journal.take_reserve()
    journal.give_up_reserve()
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_empty_file_is_made_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    path.touch()
    assert use(path) == ([], [])
    fill(path)
    assert len(use(path)[1]) == 3


def test_closing_twice_is_the_same_as_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "hub.db")
    journal.close()
    journal.open()
    journal.close()
    journal.close()
    assert sorted(files_of(tmp_path)) == ["hub.db"]


def test_use_before_open_and_after_close_is_a_journal_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "hub.db")
    for _ in range(2):
        with pytest.raises(JournalError, match="not open; call open"):
            journal.load(0.0)
        with pytest.raises(JournalError, match="not open; call open"):
            journal.write(Changes(), 0.0)
        journal.open()
        journal.close()


def test_opening_twice_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "hub.db")
    journal.open()
    connection = journal.database
    try:
        with pytest.raises(JournalError):
            journal.open()
        journal.write(changes_of(agents=[agent_row()]), 0.0)
        assert len(journal.load(0.0)[0]) == 1
    finally:
        journal.close()
        assert connection is not None
        connection.close()


def test_failed_write_writes_nothing_and_may_be_tried_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "hub.db")
    journal.open()
    journal.write(changes_of([task_row(1)], agents=[agent_row()]), 0.0)
    nobody: Any = None  # Which the file does not take.
    torn = changes_of([task_row(2), task_row(3, requester=nobody)], agents=[agent_row("b")], gone=["a"])
    for _ in range(2):
        with pytest.raises(sqlite3.Error):
            journal.write(torn, 0.0)
        agents, tasks, _ = journal.load(0.0)
        assert ([agent.agent_id for agent in agents], [task.sequence for task in tasks]) == (["a"], [1])
    del torn.inserted[3]
    journal.write(torn, 0.0)
    agents, tasks, _ = journal.load(0.0)
    assert ([agent.agent_id for agent in agents], [task.sequence for task in tasks]) == (["b"], [1, 2])
    journal.write(torn, 0.0)  # A commit may take place and seem to have failed.
    assert journal.load(0.0)[:2] == (agents, tasks)
    journal.close()


def test_file_that_was_not_closed_opens(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "hub.db")
    journal.open()
    journal.write(changes_of([task_row(number) for number in range(1, 200)], agents=[agent_row()]), 0.0)
    journal.write(changes_of(updated=[task_row(7, state=TaskState.IN_PROGRESS, assignee="a", attempt=1)]), 0.0)
    for suffix in ("", "-wal"):
        shutil.copy(tmp_path / f"hub.db{suffix}", tmp_path / f"copy.db{suffix}")
    expected = journal.load(0.0)
    journal.close()
    assert use(tmp_path / "copy.db") == expected[:2]
    wal = tmp_path / "torn.db-wal"  # The last write was under way.
    shutil.copy(tmp_path / "hub.db", tmp_path / "torn.db")
    wal.write_bytes(b"")
    assert use(tmp_path / "torn.db") == expected[:2]


def test_write_that_was_cut_short_is_as_if_it_had_not_begun(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "hub.db")
    journal.open()
    journal.write(changes_of([task_row(1)], agents=[agent_row()]), 0.0)
    size = (tmp_path / "hub.db-wal").stat().st_size
    journal.write(changes_of([task_row(number) for number in range(2, 200)]), 0.0)
    shutil.copy(tmp_path / "hub.db", tmp_path / "copy.db")
    raw = (tmp_path / "hub.db-wal").read_bytes()
    journal.close()
    for kept in (size, size + 1, (size + len(raw)) // 2, len(raw) - 1):
        shutil.copy(tmp_path / "copy.db", tmp_path / "torn.db")
        (tmp_path / "torn.db-wal").write_bytes(raw[:kept])
        assert [task.sequence for task in use(tmp_path / "torn.db")[1]] == [1]


def test_second_hub_in_this_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    first = Journal(path)
    first.open()
    try:
        first.write(changes_of(agents=[agent_row()]), 0.0)
        for _ in range(2):
            with pytest.raises(JournalError, match="another hub uses this journal"):
                use(path)
            first.write(changes_of(agents=[agent_row("b")]), 0.0)  # It has lost no lock and no file over this.
        with pytest.raises(JournalError, match="another hub uses this journal"):
            use_in_another_process(path)
    finally:
        first.close()
    assert len(use(path)[0]) == 2


@pytest.mark.parametrize("pages", [1, 2, 20])
def test_journal_whose_hub_was_killed_amid_a_checkpoint_is_whole(tmp_path: Path, pages: int) -> None:
    """Its first page, which says how long the file is, is written first, and all is still in the -wal."""
    path, wal = tmp_path / "hub.db", tmp_path / "hub.db-wal"
    fill(path)
    journal = Journal(path)
    journal.open()
    journal.load(0.0)
    more = [task_row(number, request=Delegate(task_id=f"t{number}", input="x" * 500)) for number in range(4, 204)]
    journal.write(changes_of(more), 0.0)
    before, log = path.read_bytes(), wal.read_bytes()
    journal.close()
    cut = 4096 * pages
    assert max(cut, len(before)) < len(path.read_bytes())
    path.write_bytes(path.read_bytes()[:cut] + before[cut:])
    wal.write_bytes(log)
    _, tasks = use(path)
    assert len(tasks) == 203


def use_in_another_process(path: Path) -> None:
    with running("-m", "agenthub", "hub", "--port", "0", "--db", str(path)) as process:
        output, complaint = process.communicate(timeout=WAIT_S)
    assert (process.returncode, output) == (1, "")
    assert complaint.count("\n") == 1
    raise JournalError(complaint)


def test_second_hub_in_another_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    with hub_process("--db", str(path)):
        with pytest.raises(JournalError, match="another hub uses this journal"):
            use(path)
        with pytest.raises(JournalError, match="another hub uses this journal"):
            use_in_another_process(path)
    use(path)  # The first was killed.


# What is no journal


def test_folder_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "not a regular file" in complaint_of(tmp_path / "folder")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    assert "No such file or directory" in complaint_of(tmp_path / "missing" / "hub.db")


@posix_only
def test_link_that_leads_nowhere_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    complaint_of(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    complaint_of(tmp_path / "dangling")


@posix_only
def test_device_or_pipe_is_no_journal(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in complaint_of(tmp_path / "pipe")
    with pytest.raises(JournalError, match="not a regular file"):
        use("/dev/null")


@pytest.mark.parametrize(
    "raw",
    [
        b"x",
        b"\n",
        b"hello",
        b"a" * 99,
        b"hello\n" * 1000,
        bytes(100),
        bytes(4096),
        b"SQLite format 3\0",
        b"\xff" * 5000,
    ],
    ids=["one byte", "a newline", "a word", "99 bytes", "a text", "100 zeros", "a page of zeros", "magic", "noise"],
)
def test_other_file_is_no_journal(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "other").write_bytes(raw)
    complaint_of(tmp_path / "other")


def other_database(path: Path, *, mode: str = "delete", is_open: bool = False, is_empty: bool = False) -> None:
    """Make a database that is somebody else's; with `is_open` as it is when its program was killed."""
    name = path.with_name("original") if is_open else path
    database = sqlite3.connect(name, isolation_level=None)
    database.execute(f"PRAGMA journal_mode = {mode}")
    database.execute("PRAGMA user_version = 1")
    if not is_empty:
        database.execute("CREATE TABLE tasks (a)")
        database.execute("INSERT INTO tasks VALUES (1)")
    if is_open:
        for suffix in ("", "-wal"):
            shutil.copy(f"{name}{suffix}", f"{path}{suffix}")
    database.close()
    if is_open:
        name.unlink()


@pytest.mark.parametrize("mode", ["delete", "wal"])
@pytest.mark.parametrize("is_empty", [False, True], ids=["with a table", "empty"])
def test_other_database_is_no_journal(tmp_path: Path, mode: str, is_empty: bool) -> None:
    other_database(tmp_path / "other.db", mode=mode, is_empty=is_empty)
    assert "not an AgentHub journal; the file was not changed" in complaint_of(tmp_path / "other.db")


def test_other_database_that_was_not_closed_is_left_as_it_is(tmp_path: Path) -> None:
    other_database(tmp_path / "other.db", mode="wal", is_open=True)
    assert "not an AgentHub journal; the file was not changed" in complaint_of(tmp_path / "other.db")


@pytest.mark.parametrize("version", [0, 3, 99])
def test_journal_of_another_version_is_refused(tmp_path: Path, version: int) -> None:
    fill(tmp_path / "hub.db")
    change(tmp_path / "hub.db", f"PRAGMA user_version = {version}")
    text = f"a journal of version {version}, but this hub reads version 2: use another file; the file was not changed"
    assert complaint_of(tmp_path / "hub.db") == text


LIFE = TaskLife(
    (("assigned", "a", 1, 0.125), ("asked", "a", 1, 7.5)),
    2,
    Talk(
        ask=2,
        message_id='m"1',
        question=Question("main or d\xe9v?", {"enum": ["main", None]}),
        answer=b'{"b": 1, "b" :2}',
        bytes=77,
    ),
)


@pytest.mark.parametrize(
    "life",
    [
        TaskLife(),
        TaskLife((), 3, None),
        LIFE,
        LIFE._replace(talk=Talk(ask=1, message_id=None, question=Question(""))),
        LIFE._replace(talk=Talk(ask=1, message_id=None, question=Question(""), answer=b"null")),
    ],
    ids=["none", "asked", "answered", "open", "answered with null"],
)
def test_life_comes_back_as_it_was(tmp_path: Path, life: TaskLife) -> None:
    journal = Journal(tmp_path / "hub.db")
    journal.open()
    journal.write(changes_of([task_row(1, life=life), task_row(2)]), 0.0)
    journal.write(changes_of(updated=[task_row(2, life=life)]), 0.0)
    assert [row.life for row in journal.load(0.0)[1]] == [life, life]
    journal.close()


def test_journal_of_version_1_is_upgraded(tmp_path: Path) -> None:
    fill(tmp_path / "hub.db")
    rows = use(tmp_path / "hub.db")
    change(tmp_path / "hub.db", "ALTER TABLE tasks DROP COLUMN life")
    change(tmp_path / "hub.db", "PRAGMA user_version = 1")
    assert use(tmp_path / "hub.db") == rows
    journal = Journal(tmp_path / "hub.db")
    journal.open()
    journal.write(changes_of(updated=[task_row(1, life=LIFE)]), 0.0)
    assert journal.load(0.0)[1][0].life == LIFE
    journal.close()


def test_journal_of_another_version_that_was_not_closed_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    journal = Journal(tmp_path / "original")
    journal.open()
    assert journal.database is not None
    journal.database.execute("PRAGMA user_version = 3")
    journal.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    journal.write(changes_of(agents=[agent_row()]), 0.0)
    for suffix in ("", "-wal"):
        shutil.copy(f"{journal.path}{suffix}", f"{path}{suffix}")
    journal.close()
    assert "version 3" in complaint_of(path)


@pytest.mark.parametrize("where", [0.1, 0.25, 0.5, 0.75, 0.95])
def test_journal_with_a_torn_page_is_reported(tmp_path: Path, where: float) -> None:
    path = tmp_path / "hub.db"
    fill(path, 300)
    raw = bytearray(path.read_bytes())
    page = int(where * len(raw)) // 4096 * 4096
    raw[page : page + 64] = os.urandom(64)
    path.write_bytes(raw)
    complaint_of(path)


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.99])
def test_journal_that_was_cut_short_is_reported(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "hub.db"
    fill(path, 300)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(kept * len(raw))])
    complaint_of(path)


def change(path: Path, *statements: str) -> None:
    database = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        database.execute(statement)
    database.close()


DAMAGE = {
    "life is no JSON": "UPDATE tasks SET life = CAST('{' AS BLOB) WHERE arrival = 2",
    "life is incomplete": "UPDATE tasks SET life = CAST('{\"talk\": null}' AS BLOB) WHERE arrival = 2",
    "life has an odd step": """UPDATE tasks SET life = CAST('{"talk": null, "steps": [[1]]}' AS BLOB)""",
    "request is no JSON": "UPDATE tasks SET request = CAST('{' AS BLOB) WHERE arrival = 2",
    "request is another message": """UPDATE tasks SET request = CAST('{"type":"heartbeat"}' AS BLOB)""",
    "request is out of bounds": """UPDATE tasks SET request = CAST('{"type":"delegate","task_id":""}' AS BLOB)""",
    "request is text": "UPDATE tasks SET request = 'text'",
    "request is a number": "UPDATE tasks SET request = 7",
    "end is no JSON": "UPDATE tasks SET end = x'00'",
    "end is another message": """UPDATE tasks SET end = CAST('{"type":"heartbeat_ack"}' AS BLOB)""",
    "registration is no JSON": "UPDATE agents SET register = x'ff'",
    "state is unknown": "UPDATE tasks SET state = 'lost'",
    "deadline is no number": "UPDATE tasks SET deadline = 'soon'",
    "attempt is no number": "UPDATE tasks SET attempt = 'x'",
    "table is missing": "DROP TABLE tasks",
    "other table is missing": "DROP TABLE agents",
    "column too many": "ALTER TABLE tasks ADD COLUMN x",
}


@pytest.mark.parametrize("statement", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_row_is_reported(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "hub.db"
    fill(path)
    change(path, statement)
    complaint_of(path)


async def test_hub_does_not_start_on_a_damaged_row_and_leaves_nothing_open(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    fill(path)
    change(path, DAMAGE["request is no JSON"])
    before = files_of(tmp_path)
    hub = LocalHub(journal=Journal(path))
    with pytest.raises(JournalError, match="damaged row"):
        await hub.start()
    await hub.stop()
    assert files_of(tmp_path) == before
    change(path, "DELETE FROM tasks")
    async with hub:
        assert hub.hub.summary()["agents_away"] == 1


def run_hub(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """Run `agenthub hub` in this process, where it is expected to end by itself; return its code and complaint."""
    collector = gc.get_threshold(), list(gc.callbacks)
    try:
        code = agenthub.main(["hub", "--port", "0", *args])
    except SystemExit as end:
        code = int(end.code or 0)
    assert (gc.get_threshold(), gc.callbacks) == collector  # Nothing of it stays in the process of a program.
    output, complaint = capsys.readouterr()
    assert output == ""
    return code, complaint


@pytest.mark.parametrize("kind", ["folder", "missing", "text", "other", "version", "torn", "row", "state"])
def test_hub_that_cannot_use_its_journal_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = tmp_path / "hub.db"
    if kind == "folder":
        path.mkdir()
    elif kind == "missing":
        path = tmp_path / "missing" / "hub.db"
    elif kind == "text":
        path.write_text("hello\n" * 100)
    elif kind == "other":
        other_database(path)
    else:
        fill(path, 300)
    if kind == "version":
        change(path, "PRAGMA user_version = 3")
    elif kind == "torn":
        path.write_bytes(path.read_bytes()[:20_000])
    elif kind in ("row", "state"):
        change(path, DAMAGE["request is no JSON" if kind == "row" else "state is unknown"])
    before = files_of(tmp_path)
    code, complaint = run_hub(capsys, "--db", str(path))
    assert code == 1
    assert complaint.count("\n") == 1
    assert complaint.startswith(f"agenthub: {path}: ")
    assert files_of(tmp_path) == before


def test_sync_of_the_command_line_is_full_or_normal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, complaint = run_hub(capsys, "--db", str(tmp_path / "hub.db"), "--sync", "off")
    assert code == 2
    assert "'full', 'normal'" in complaint
    assert not (tmp_path / "hub.db").exists()


async def test_taken_port_leaves_no_journal_open_and_no_reserve(tmp_path: Path) -> None:
    async with HubServer(port=0) as other:
        journal = Journal(tmp_path / "hub.db")
        server = HubServer(port=other.port, journal=journal)
        try:
            with pytest.raises(OSError, match="in use"):
                await server.start()
            assert sorted(files_of(tmp_path)) == ["hub.db"]
            use(tmp_path / "hub.db")
        finally:
            await server.stop()


def test_hub_whose_port_is_taken_leaves_no_reserve(tmp_path: Path) -> None:
    with (
        hub_process() as (url, _),
        running("-m", "agenthub", "hub", "--port", url.rpartition(":")[2], "--db", str(tmp_path / "hub.db")) as process,
    ):
        _, complaint = process.communicate(timeout=WAIT_S)
        assert process.returncode == 1
        assert complaint.count("\n") == 1
    assert sorted(files_of(tmp_path)) == ["hub.db"]


# The group commit


async def eventually(condition: Callable[[], Any]) -> None:
    """Return when `condition` holds; fail when it still does not after WAIT_S."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.002)


class SlowJournal(Journal):
    """A journal whose writes can be held up, or made to fail. `written` are the changes that it took, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync="normal")
        self.gate = threading.Event()
        self.gate.set()
        self.begun = 0
        self.written: list[Changes] = []
        self.failure: Exception | None = None
        self.has_room = True
        self.in_use = threading.Lock()

    def write(self, changes: Changes, clock_offset: float) -> None:
        self.begun += 1
        assert self.gate.wait(WAIT_S)
        if self.failure is not None:
            raise self.failure
        with self.in_use:
            super().write(changes, clock_offset)
        self.written.append(changes)

    def take_reserve(self) -> bool:
        return self.has_room and super().take_reserve()


Slow = TypeVar("Slow", bound=SlowJournal)


class Caller:
    """A raw connection to a hub in this process."""

    def __init__(self) -> None:
        self.inbox: list[Any] = []
        self.close_code: int | None = None
        self.link: Any = None
        self.registration: Any = None

    def opened(self, link: Any) -> None: ...

    def received(self, link: Any, message: Any, message_bytes: int) -> None:
        self.inbox.append(message)

    def closed(self, link: Any, code: int, reason: str) -> None:
        self.close_code = code

    def tell(self, message: Any) -> None:
        self.link.send(encode(message))

    async def ask(self, message: Any) -> Any:
        message.id = message.id or f"{len(self.inbox)}-{os.urandom(4).hex()}"
        self.tell(message)
        return await self.reply_to(message.id)

    async def reply_to(self, message_id: str) -> Any:
        await eventually(lambda: any(getattr(one, "reply_to", None) == message_id for one in self.inbox))
        return next(one for one in self.inbox if getattr(one, "reply_to", None) == message_id)

    def heard(self) -> list[str]:
        """Return the types of what came in and was not looked at."""
        inbox, self.inbox = self.inbox, []
        return [message.type for message in inbox]

    async def is_alive(self) -> None:
        """See that a heartbeat is answered, and so all that was to be handled before it has been."""
        assert (await self.ask(Heartbeat())).type == "heartbeat_ack"


async def join(hub: LocalHub, name: str, *capabilities: Any, **fields: Any) -> Caller:
    caller = Caller()
    caller.link = await hub.connect(caller)
    caller.registration = await caller.ask(Register(name=name, capabilities=list(capabilities), **fields))
    caller.heard()
    return caller


@contextlib.asynccontextmanager
async def slow_hub(path: Path, **settings: Any) -> AsyncIterator[tuple[LocalHub, SlowJournal, Caller, Caller]]:
    """A hub on a journal that can be held up, with a worker and a requester."""
    async with hub_on(SlowJournal(path), **settings) as scene:
        yield scene


@contextlib.asynccontextmanager
async def hub_on(journal: Slow, **settings: Any) -> AsyncIterator[tuple[LocalHub, Slow, Caller, Caller]]:
    async with LocalHub(HubSettings(**settings), journal=journal) as hub:
        worker, requester = await join(hub, "worker", "work"), await join(hub, "requester")
        try:
            yield hub, journal, worker, requester
        finally:
            journal.gate.set()
            journal.failure = None


async def test_task_is_acknowledged_and_handed_out_only_after_the_write(tmp_path: Path) -> None:
    async with slow_hub(tmp_path / "hub.db", open_tasks_max=1) as (_, journal, worker, requester):
        journal.gate.clear()
        requester.tell(Delegate(id="d", task_id="t", capability="work"))
        await eventually(lambda: journal.begun == len(journal.written) + 1)
        refused = await requester.ask(Delegate(task_id="u", capability="work"))
        assert refused.code == "overloaded"
        assert refused.message == "this agent has reached its limit of 1 open tasks; wait until one ends"
        requester.tell(Status(id="s", task_id="t"))
        for caller in (requester, worker):
            await caller.is_alive()
        assert requester.heard() == ["error", "heartbeat_ack"]
        assert worker.heard() == ["heartbeat_ack"]
        journal.gate.set()
        await requester.reply_to("s")
        assert [one.reply_to for one in requester.inbox] == ["d", "s"]
        await eventually(lambda: worker.inbox)
        assert worker.heard() == ["delegate"]


async def test_result_is_acknowledged_and_passed_on_only_after_the_write(tmp_path: Path) -> None:
    async with slow_hub(tmp_path / "hub.db") as (_, journal, worker, requester):
        await requester.ask(Delegate(task_id="t", capability="work"))
        requester.heard()
        journal.gate.clear()
        worker.tell(Result(id="r", task_id="t", success=True))
        for caller in (worker, requester):
            await caller.is_alive()
        assert worker.heard() == ["delegate", "heartbeat_ack"]
        assert requester.heard() == ["heartbeat_ack"]
        journal.gate.set()
        assert (await worker.reply_to("r")).state == "completed"
        await eventually(lambda: requester.inbox)
        assert requester.heard() == ["result"]


async def test_identity_is_given_only_after_the_write(tmp_path: Path) -> None:
    async with slow_hub(tmp_path / "hub.db") as (hub, journal, _, _):
        journal.gate.clear()
        caller = Caller()
        caller.link = await hub.connect(caller)
        caller.tell(Register(id="r", name="new"))
        await caller.is_alive()
        assert caller.heard() == ["heartbeat_ack"]
        journal.gate.set()
        agent_id = (await caller.reply_to("r")).agent_id
        assert agent_id in [one for changes in journal.written for one in changes.agents]


async def test_agent_is_let_go_only_after_the_write(tmp_path: Path) -> None:
    async with slow_hub(tmp_path / "hub.db") as (_, journal, worker, requester):
        journal.gate.clear()
        worker.tell(Deregister(id="d"))
        await requester.is_alive()
        assert (worker.heard(), worker.close_code) == ([], None)
        journal.gate.set()
        await eventually(lambda: worker.close_code)
        assert (worker.heard(), worker.close_code) == (["deregister"], 1000)


async def test_changes_of_one_turn_share_one_write(tmp_path: Path) -> None:
    async with slow_hub(tmp_path / "hub.db") as (_, journal, worker, requester):
        before = len(journal.written)
        for number in range(50):
            requester.tell(Delegate(id=str(number), task_id=f"t{number}", capability="work"))
        await requester.reply_to("49")
        assert len(journal.written) == before + 1
        inserted = journal.written[-1].inserted.values()
        assert [row.request.task_id for row in inserted] == [f"t{number}" for number in range(50)]
        assert [one.reply_to for one in requester.inbox] == [str(number) for number in range(50)]
        await eventually(lambda: len(worker.inbox) == 16)


async def test_what_comes_in_during_a_write_goes_into_the_next_one(tmp_path: Path) -> None:
    async with slow_hub(tmp_path / "hub.db") as (_, journal, worker, requester):
        journal.gate.clear()
        begun, before = journal.begun, len(journal.written)
        requester.tell(Delegate(id="t", task_id="t", capability="work"))
        await eventually(lambda: journal.begun == begun + 1)
        for task_id in ("u", "v"):
            requester.tell(Delegate(id=task_id, task_id=task_id, capability="work"))
            await requester.is_alive()
        assert journal.begun == begun + 1
        assert requester.heard() == ["heartbeat_ack"] * 2
        journal.gate.set()
        await requester.reply_to("v")
        assert [one.reply_to for one in requester.inbox] == ["t", "u", "v"]
        new = [[row.request.task_id for row in changes.inserted.values()] for changes in journal.written[before:]]
        assert new == [["t"], ["u", "v"]]
        await eventually(lambda: len(worker.inbox) == 3)


async def test_what_follows_from_nothing_new_does_not_wait(tmp_path: Path) -> None:
    async with slow_hub(tmp_path / "hub.db") as (_, journal, _, requester):
        journal.gate.clear()
        assert (await requester.ask(Status())).hub["journal"] == "ok"
        assert (await requester.ask(Delegate(task_id="t", capability="none"))).code == "no_agent"


async def test_refusal_that_is_not_about_room_waits_its_turn(tmp_path: Path) -> None:
    """That a task is a duplicate follows from the one before it, which is not on disk yet."""
    async with slow_hub(tmp_path / "hub.db") as (_, journal, _, requester):
        journal.gate.clear()
        requester.tell(Delegate(id="t", task_id="t", capability="work"))
        requester.tell(Delegate(id="again", task_id="t", capability="work", priority=1))
        await requester.is_alive()
        assert requester.heard() == ["heartbeat_ack"]
        journal.gate.set()
        assert (await requester.reply_to("again")).code == "duplicate_task"
        assert [one.reply_to for one in requester.inbox] == ["t", "again"]


async def test_deadline_that_comes_during_a_write_is_told_after_it(tmp_path: Path) -> None:
    async with slow_hub(tmp_path / "hub.db") as (hub, journal, _, requester):
        journal.gate.clear()
        requester.tell(Delegate(id="t", task_id="t", capability="nobody", wait=True, ttl=0.01))
        await eventually(lambda: hub.hub.summary()["tasks"]["timeout"] == 1)
        await requester.is_alive()
        assert requester.heard() == ["heartbeat_ack"]
        journal.gate.set()
        await eventually(lambda: len(requester.inbox) == 2)
        assert requester.heard() == ["status", "result"]


async def test_connection_that_is_lost_during_a_write_costs_no_task(tmp_path: Path) -> None:
    async with slow_hub(tmp_path / "hub.db") as (hub, journal, worker, requester):
        journal.gate.clear()
        requester.tell(Delegate(id="t", task_id="t", capability="work"))
        await requester.is_alive()
        for caller in (requester, worker):
            caller.link.abort()
        await eventually(lambda: hub.hub.summary()["agents_away"] == 2)
        journal.gate.set()
        back = [
            await join(hub, "back", *offered, agent_id=one.registration.agent_id, resume=one.registration.resume)
            for one, offered in ((worker, ["work"]), (requester, []))
        ]
        assert [(ref.task_id, ref.attempt) for ref in back[0].registration.tasks] == [("t", 1)]
        assert (await back[0].ask(Result(task_id="t", success=True))).state == "completed"
        await eventually(lambda: back[1].inbox)
        assert back[1].heard() == ["result"]


async def test_result_whose_reader_is_lost_during_the_write_is_told_to_it_when_it_is_back(tmp_path: Path) -> None:
    async with slow_hub(tmp_path / "hub.db") as (hub, journal, worker, requester):
        delegate = Delegate(task_id="t", capability="work")
        await requester.ask(delegate)
        journal.gate.clear()
        worker.tell(Result(id="r", task_id="t", success=True))
        await worker.is_alive()
        requester.link.abort()
        await eventually(lambda: hub.hub.summary()["agents_away"] == 1)
        journal.gate.set()
        registration = requester.registration
        back = await join(hub, "back", agent_id=registration.agent_id, resume=registration.resume)
        assert (await back.ask(delegate)).state == "completed"  # As an agent does that has an open task.
        await eventually(lambda: "result" in [message.type for message in back.inbox])


@pytest.mark.parametrize("is_back_before_the_write", [False, True])
async def test_result_whose_reader_is_lost_during_the_write_needs_no_asking(
    tmp_path: Path, is_back_before_the_write: bool
) -> None:
    async with slow_hub(tmp_path / "hub.db") as (hub, journal, worker, requester):
        await requester.ask(Delegate(task_id="t", capability="work"))
        journal.gate.clear()
        worker.tell(Result(id="r", task_id="t", success=True))
        await worker.is_alive()
        requester.link.abort()
        await eventually(lambda: hub.hub.summary()["agents_away"] == 1)
        if not is_back_before_the_write:
            journal.gate.set()
            await worker.reply_to("r")
        registration = requester.registration
        back = Caller()
        back.link = await hub.connect(back)
        back.tell(Register(id="b", name="back", agent_id=registration.agent_id, resume=registration.resume))
        await back.is_alive() if is_back_before_the_write else await back.reply_to("b")
        journal.gate.set()
        await eventually(lambda: "result" in [message.type for message in back.inbox])
        await back.is_alive()
        assert [message.type for message in back.inbox].count("result") == 1


async def test_failure_in_the_middle_of_the_effects_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with slow_hub(tmp_path / "hub.db") as (_, _, worker, requester):
        encode = agenthub.encode
        failed: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))

        def fail_once(message: Any) -> bytes:
            if not failed and isinstance(message, agenthub.TaskAck):
                raise RuntimeError("a bug")
            return encode(message)

        monkeypatch.setattr(agenthub, "encode", fail_once)
        requester.tell(Delegate(id="t", task_id="t", capability="work"))
        await eventually(lambda: failed)
        assert (await requester.ask(Delegate(task_id="u", capability="work"))).state == "in_progress"
        await eventually(lambda: "delegate" in worker.heard())


async def test_who_speaks_while_too_much_is_held_back_is_told_to_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agenthub, "HELD_MAX", 5)
    async with slow_hub(tmp_path / "hub.db") as (_, journal, worker, requester):
        journal.gate.clear()
        for number in range(8):
            requester.tell(Delegate(id=f"{number}", task_id=f"t{number}", capability="work"))
            await asyncio.sleep(0)
        await eventually(lambda: requester.close_code == CloseCode.GOING_AWAY)
        await asyncio.sleep(0)
        assert worker.close_code is None
        journal.gate.set()
        await eventually(lambda: worker.inbox)


async def test_hub_takes_up_what_the_one_before_it_has_left(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    async with slow_hub(path) as (_, _, worker, requester):
        await requester.ask(Delegate(task_id="t", capability="work"))
    async with LocalHub(journal=Journal(path)) as hub:
        again = await join(
            hub, "worker", "work", agent_id=worker.registration.agent_id, resume=worker.registration.resume
        )
        assert [(ref.task_id, ref.attempt) for ref in again.registration.tasks] == [("t", 1)]
        summary = (await again.ask(Status())).hub
        assert (summary["journal"], summary["tasks"]["in_progress"]) == ("ok", 1)


async def test_stop_writes_what_came_in_before_it(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    async with slow_hub(path) as (hub, _, _, requester):
        for number in range(100):
            requester.tell(Delegate(id=str(number), task_id=f"t{number}", capability="work"))
        await requester.is_alive()
        await hub.stop()
        assert len([one for one in requester.inbox if one.type == "status"]) == 100
    assert len(use(path)[1]) == 100


async def test_hub_may_be_started_again_on_its_journal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "agenthub.hub")
    hub = LocalHub(journal=Journal(tmp_path / "hub.db"))
    for number in range(3):
        async with hub:
            assert len(hub.hub.directory.agents) == number
            await join(hub, "agent")
        assert sorted(files_of(tmp_path)) == ["hub.db"]
    assert "restored 2 agents and 0 tasks" in caplog.text
    assert "last change was" not in caplog.text  # The tasks tell, and there were none.


# A full disk


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "WRITE_RETRY_S", 0.01)
    monkeypatch.setattr(agenthub, "DISK_CHECK_S", 0.05)


impatient = pytest.mark.usefixtures("_impatient")
DISK_FULL = "database or disk is full"


def errors_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the hub's log says that is worse than INFO, without the refusals."""
    records = [record for record in caplog.records if record.name == "agenthub.hub"]
    said = [record.getMessage() for record in records if record.levelno > logging.INFO]
    return [text for text in said if not text.startswith("refused")]


@impatient
async def test_full_disk_stops_new_tasks_and_what_was_held_is_carried_out_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with slow_hub(tmp_path / "hub.db") as (hub, journal, worker, requester):
        await requester.ask(Delegate(task_id="old", capability="work"))
        await eventually(lambda: worker.inbox)
        for caller in (worker, requester):
            caller.heard()
        journal.failure, journal.has_room = sqlite3.OperationalError(DISK_FULL), False
        begun = journal.begun
        requester.tell(Delegate(id="held", task_id="held", capability="work"))
        await eventually(lambda: journal.begun > begun + 5)
        assert hub.hub.is_full
        refused = await requester.ask(Delegate(task_id="new", capability="work"))
        assert (refused.code, refused.message) == ("overloaded", "the hub's disk is full; retry later")
        worker.tell(Result(id="r", task_id="old", success=True))
        for caller in (worker, requester):
            await caller.is_alive()
        assert requester.heard() == ["error", "heartbeat_ack"]
        assert worker.heard() == ["heartbeat_ack"]
        assert hub.hub.summary()["journal"] == "full"
        assert errors_of(caplog) == [f"the journal cannot be written: {DISK_FULL}; new tasks are rejected until it can"]
        journal.failure = None  # As if something had been deleted, but not enough for the reserve.
        assert (await worker.reply_to("r")).state == "completed"
        assert (await requester.reply_to("held")).state == "in_progress"
        await eventually(lambda: len(requester.inbox) == 2 and len(worker.inbox) == 2)
        assert (requester.heard(), worker.heard()) == (["status", "result"], ["delegate", "status"])
        assert (await requester.ask(Status())).hub["journal"] == "full"
        assert (await requester.ask(Delegate(task_id="new", capability="work"))).code == "overloaded"
        assert (await worker.ask(Result(task_id="held", success=True))).state == "completed"  # Tasks go on ending.
        journal.has_room = True
        await eventually(lambda: not hub.hub.is_full)
        assert (await requester.ask(Delegate(task_id="new", capability="work"))).state == "in_progress"
        assert (await requester.ask(Status())).hub["journal"] == "ok"
        assert errors_of(caplog)[1:] == ["the journal's disk has free space again"]
    assert [row.request.task_id for row in use(tmp_path / "hub.db")[1]] == ["old", "held", "new"]


@impatient
async def test_disk_that_is_full_twice_is_said_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with slow_hub(tmp_path / "hub.db") as (hub, journal, _, requester):
        for number in range(2):
            journal.failure, journal.has_room = sqlite3.OperationalError(DISK_FULL), False
            requester.tell(Delegate(id=str(number), task_id=str(number), capability="work"))
            await eventually(lambda: hub.hub.is_full)
            journal.failure, journal.has_room = None, True
            await requester.reply_to(str(number))
            await eventually(lambda: not hub.hub.is_full)
    assert len(errors_of(caplog)) == 4


@impatient
async def test_hub_without_room_for_a_reserve_takes_no_task_from_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = SlowJournal(tmp_path / "hub.db")
    journal.has_room = False
    async with LocalHub(journal=journal) as hub:
        await eventually(lambda: hub.hub.is_full)
        await join(hub, "worker", "work")
        requester = await join(hub, "requester")
        assert (await requester.ask(Delegate(task_id="t", capability="work"))).code == "overloaded"
        journal.has_room = True
        await eventually(lambda: not hub.hub.is_full)
        assert (await requester.ask(Delegate(task_id="t", capability="work"))).state == "in_progress"
    assert errors_of(caplog) == [
        "the journal's disk is full; new tasks are rejected until there is free space",
        "the journal's disk has free space again",
    ]


async def test_reserve_is_made_given_up_and_removed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "WRITE_RETRY_S", 0.01)  # And no look for room before the end of this.
    reserve = tmp_path / "hub.db-reserve"
    async with slow_hub(tmp_path / "hub.db") as (hub, journal, _, requester):
        await eventually(reserve.exists)
        await eventually(lambda: reserve.stat().st_size == agenthub.RESERVE_BYTES)
        assert reserve.stat().st_blocks * 512 >= agenthub.RESERVE_BYTES
        journal.failure = sqlite3.OperationalError(DISK_FULL)
        requester.tell(Delegate(id="t", task_id="t", capability="work"))
        await eventually(lambda: hub.hub.is_full)
        assert not reserve.exists()
        journal.failure = None
        await requester.reply_to("t")
        monkeypatch.setattr(agenthub, "DISK_CHECK_S", 0.01)
        assert hub.commit is not None
        hub.commit.check_disk()
        await eventually(lambda: not hub.hub.is_full)
        assert reserve.exists()
    assert sorted(files_of(tmp_path)) == ["hub.db"]


@posix_only
@pytest.mark.parametrize("how", ["removed", "replaced"])
async def test_hub_notices_by_itself_that_its_journal_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(agenthub, "DISK_CHECK_S", 0.01)
    path = tmp_path / "hub.db"
    async with HubServer(port=0, journal=Journal(path, sync="normal")) as hub:
        path.rename(tmp_path / "elsewhere")
        if how == "replaced":
            path.touch()
        await eventually(lambda: hub.hub.journal_state == "gone")


@posix_only
@pytest.mark.parametrize("how", ["removed", "replaced"])
async def test_journal_whose_file_is_gone_accepts_no_new_tasks_until_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    monkeypatch.setattr(agenthub, "DISK_CHECK_S", 0.01)
    path, elsewhere = tmp_path / "hub.db", tmp_path / "elsewhere"
    async with HubServer(port=0, journal=Journal(path, sync="normal")) as hub, raw_client(hub.url) as client:
        await client.register("requester")
        path.rename(elsewhere)
        if how == "replaced":
            path.touch()
        assert (await asyncio.to_thread(fetched_health, hub))["status"] == "journal_gone"  # Checked for this request.
        assert f"the journal was removed or replaced while in use: {path}" in caplog.text
        refused = await client.request(type="delegate", task_id="t", capability="work", wait=True)
        assert (refused["code"], "journal was removed" in refused["message"]) == ("overloaded", True)
        elsewhere.replace(path)
        await eventually(lambda: hub.hub.journal_state == "ok")
        assert (await client.request(type="delegate", task_id="t", capability="work", wait=True))["state"] == "pending"


@posix_only
async def test_journal_behind_a_link_has_its_files_next_to_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reserve must be on the disk of the journal, and another folder of the process must change nothing."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "etc").mkdir()
    use(tmp_path / "disk" / "hub.db")
    (tmp_path / "etc" / "link.db").symlink_to("../disk/hub.db")
    monkeypatch.chdir(tmp_path / "etc")
    monkeypatch.setattr(agenthub, "DISK_CHECK_S", 0.01)
    async with LocalHub(journal=Journal("link.db")) as hub:
        requester = await join(hub, "requester")
        assert (await requester.ask(Delegate(task_id="t", capability="work", wait=True))).state == "pending"
        await eventually(lambda: (tmp_path / "disk" / "hub.db-reserve").exists())
        monkeypatch.chdir(tmp_path)
        assert hub.journal is not None
        assert hub.journal.is_in_place()
        assert sorted(files_of(tmp_path / "disk")) == ["hub.db", "hub.db-reserve", "hub.db-wal"]
        assert [path.name for path in (tmp_path / "etc").iterdir()] == ["link.db"]
        (tmp_path / "etc" / "link.db").unlink()
        assert not hub.journal.is_in_place()
    assert sorted(files_of(tmp_path / "disk")) == ["hub.db"]


@posix_only
def test_link_that_leads_nowhere_and_folder_that_cannot_be_written_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link.db").symlink_to("hub.db")
    assert (
        complaint_of(tmp_path / "link.db")
        == f"a link to {tmp_path}/hub.db, which does not exist: use that path instead"
    )
    use(tmp_path / "hub.db")
    monkeypatch.setattr(agenthub.os, "access", lambda path, mode: path != str(tmp_path))  # As not for root.
    expected = f"{tmp_path} must be writable too, for the files next to it; the file was not changed"
    assert complaint_of(tmp_path / "link.db") == expected


def test_journal_that_a_program_reads_cannot_be_opened_until_it_has_read_it(tmp_path: Path) -> None:
    use(tmp_path / "hub.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "hub.db")) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM tasks").fetchone() == (0,)
        with pytest.raises(JournalError, match="or a program reads it; stop that"):
            use(tmp_path / "hub.db")
        reader.execute("COMMIT")
    journal = Journal(tmp_path / "hub.db")
    journal.open()
    with contextlib.closing(sqlite3.connect(tmp_path / "hub.db", timeout=0)) as reader:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            reader.execute("SELECT count(*) FROM tasks")
        journal.write(Changes(), 0.0)
    journal.close()


def fetched_health(hub: HubServer) -> dict[str, Any]:
    with urllib.request.urlopen(hub.url.replace("ws:", "http:") + "/healthz") as response:
        found: dict[str, Any] = json.load(response)
        return found


def test_reserve_that_does_not_fit_takes_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "hub.db")
    journal.give_up_reserve()
    monkeypatch.setattr(agenthub, "RESERVE_BYTES", 1 << 62)
    with contextlib.suppress(MemoryError, OverflowError):
        assert not journal.take_reserve()
    monkeypatch.undo()
    (tmp_path / "sub").mkdir()
    missing = Journal(tmp_path / "missing" / "hub.db")
    assert not missing.take_reserve()
    assert journal.take_reserve()
    assert journal.take_reserve()  # It is there.
    journal.give_up_reserve()
    assert files_of(tmp_path) == {}


@impatient
async def test_file_that_may_not_grow_refuses_new_tasks_until_it_may(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    async with slow_hub(path, open_tasks_max=100_000) as (hub, journal, worker, requester):
        assert journal.database is not None
        (pages,) = journal.database.execute("PRAGMA page_count").fetchone()
        journal.database.execute(f"PRAGMA max_page_count = {pages + 20}").fetchone()
        accepted: list[str] = []
        for number in range(1000):
            requester.tell(Delegate(id=f"t{number}", task_id=f"t{number}", capability="work", input="x" * 2000))
            await requester.is_alive()
            await eventually(lambda: hub.hub.is_full or hub.commit.idle.is_set())  # type: ignore[union-attr]  # it has a journal
            if hub.hub.is_full:
                break
            accepted.append(f"t{number}")
        assert 0 < len(accepted) < 1000
        assert (await requester.ask(Delegate(task_id="refused", capability="work"))).code == "overloaded"
        held = f"t{number}"
        assert not [one for one in requester.inbox if getattr(one, "reply_to", None) == held]
        journal.database.execute("PRAGMA max_page_count = 1000000").fetchone()
        assert (await requester.reply_to(held)).state in ("pending", "in_progress")
        await eventually(lambda: not hub.hub.is_full)
        replies = [one.reply_to for one in requester.inbox if isinstance(one, agenthub.StatusReply)]
        assert replies == [*accepted, held]
        await eventually(lambda: len(worker.inbox) == 16)
    assert [row.request.task_id for row in use(path)[1]] == [*accepted, held]


SERVE_IMPATIENTLY = """
import sys, agenthub
agenthub.WRITE_RETRY_S, agenthub.DISK_CHECK_S, agenthub.RESERVE_BYTES = 0.02, 0.1, 100_000
sys.exit(agenthub.main(["hub", "--port", "0", "--db", sys.argv[1]]))
"""


def health_of(url: str) -> tuple[int, dict[str, Any]]:
    with urllib.request.urlopen(f"http{url.removeprefix('ws')}/healthz", timeout=WAIT_S) as answer:
        return answer.status, json.load(answer)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sets the limits of another process")
async def test_disk_that_is_full_for_real_is_survived(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "hub.db"
    with running("-c", SERVE_IMPATIENTLY, str(path)) as process:
        assert process.stdout is not None
        url = (await asyncio.to_thread(process.stdout.readline)).split()[-1]
        async with raw_client(url) as requester, raw_client(url) as worker:
            await requester.register("requester")
            await worker.register("worker", "work")
            await requester.delegate("old", capability="work")
            assert await asyncio.to_thread(health_of, url)
            limit = (tmp_path / "hub.db-wal").stat().st_size
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            await requester.send(type="delegate", id="held", task_id="held", capability="work", input="x" * 20_000)
            for number in range(1000):
                reply = await requester.request(type="heartbeat", id=f"beat-{number}")
                status, health = await asyncio.to_thread(health_of, url)
                if health["status"] != "ok":
                    break
            assert (status, health["status"], health["journal"]) == (200, "journal_full", "full")
            refused = await requester.delegate("new", capability="work")
            assert (refused["type"], refused["code"]) == ("error", "overloaded")
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            reply = await requester.until(lambda message: message.get("reply_to") == "held")
            assert reply["state"] == "in_progress"
            async with asyncio.timeout(WAIT_S):
                while (reply := await requester.delegate("new", capability="work"))["type"] == "error":
                    assert reply["code"] == "overloaded"
                    await asyncio.sleep(0.01)
            assert (await asyncio.to_thread(health_of, url))[1]["status"] == "ok"
            for task_id in ("old", "held", "new"):
                await worker.message("delegate", task_id=task_id)
                await worker.request(type="result", task_id=task_id, success=True)
                assert (await requester.message("result", task_id=task_id))["state"] == "completed"
        process.send_signal(signal.SIGTERM)
        _, log = await asyncio.to_thread(process.communicate, timeout=WAIT_S)
        assert process.returncode == 0
        assert len(re.findall("the journal cannot be written", log)) == 1
        assert len(re.findall("has free space again", log)) == 1
        assert "Traceback" not in log
    assert sorted(files_of(tmp_path)) == ["hub.db"]


@pytest.fixture
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "CLOSING_S", 0.1)


@impatient
@pytest.mark.usefixtures("_hurried")
async def test_hub_that_cannot_write_ends_in_time_and_has_acknowledged_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "hub.db"
    journal = SlowJournal(path)
    hub = LocalHub(journal=journal)
    await hub.start()
    requester = await join(hub, "requester")
    journal.failure = sqlite3.OperationalError(DISK_FULL)
    requester.tell(Delegate(id="t", task_id="t", capability="work", wait=True))
    await eventually(lambda: hub.hub.is_full)
    async with asyncio.timeout(5):
        await hub.stop()
    await eventually(lambda: journal.database is None)  # A slow disk may take longer than the hub waits for it.
    assert requester.heard() == []
    assert requester.close_code == 1001
    assert "could not be written" in errors_of(caplog)[-1]
    assert sorted(files_of(tmp_path)) == ["hub.db"]
    assert use(path)[1] == []


@pytest.mark.usefixtures("_hurried")
async def test_write_that_fails_after_the_hub_has_ended_is_not_logged_as_one_that_is_retried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = SlowJournal(tmp_path / "hub.db")
    hub = LocalHub(journal=journal)
    await hub.start()
    requester = await join(hub, "requester")
    journal.failure = sqlite3.OperationalError(DISK_FULL)
    journal.gate.clear()
    begun = journal.begun
    requester.tell(Delegate(id="t", task_id="t", capability="work", wait=True))
    await eventually(lambda: journal.begun > begun)
    await hub.stop()
    journal.gate.set()
    await eventually(lambda: journal.database is None)
    for _ in range(3):  # Turns of the loop, for the callbacks of the write.
        await asyncio.sleep(0)
    assert len(errors_of(caplog)) == 1
    assert "could not be written" in errors_of(caplog)[0]


@pytest.mark.usefixtures("_hurried")
async def test_hub_whose_disk_hangs_ends_in_time(tmp_path: Path) -> None:
    journal = SlowJournal(tmp_path / "hub.db")
    hub = LocalHub(journal=journal)
    await hub.start()
    requester = await join(hub, "requester")
    journal.gate.clear()
    requester.tell(Delegate(id="t", task_id="t", capability="work", wait=True))
    await requester.is_alive()
    stopping = asyncio.create_task(hub.stop())
    try:
        done, _ = await asyncio.wait([stopping], timeout=5)
        assert done, "it waits for the disk"
    finally:
        journal.gate.set()
        await stopping
        await eventually(lambda: journal.database is None)


# The hub as a process


@posix_only
@pytest.mark.parametrize("sync", ["full", "normal"])
async def test_hub_that_is_stopped_and_started_again_goes_on(tmp_path: Path, sync: str) -> None:
    path = tmp_path / "hub.db"
    options = ("--db", str(path), "--sync", sync)
    with hub_process(*options) as (url, process):
        async with raw_client(url) as requester, raw_client(url) as worker:
            asked = await requester.register("requester")
            works = await worker.register("worker", "work", max_tasks=1)
            assert (await requester.delegate("running", capability="work"))["state"] == "in_progress"
            assert (await requester.delegate("pending", capability="work"))["state"] == "pending"
            process.send_signal(signal.SIGTERM)
            assert await requester.closed() == 1001
            assert await asyncio.to_thread(process.wait, WAIT_S) == 0
    assert sorted(files_of(tmp_path)) == ["hub.db"]
    with hub_process(*options, stderr=subprocess.PIPE) as (url, process):
        async with raw_client(url) as requester, raw_client(url) as worker:
            await requester.register("requester", agent_id=asked["agent_id"], resume=asked["resume"])
            again = await worker.register(
                "worker", "work", max_tasks=1, agent_id=works["agent_id"], resume=works["resume"]
            )
            assert again["tasks"] == [{"task_id": "running", "attempt": 1}]
            for task_id in ("running", "pending"):
                await worker.request(type="result", task_id=task_id, success=True, output=task_id)
                assert (await requester.message("result", task_id=task_id))["output"] == task_id
        process.send_signal(signal.SIGTERM)
        _, log = await asyncio.to_thread(process.communicate, timeout=WAIT_S)
        assert f"restored 2 agents and 2 tasks from {path}" in log


@posix_only
async def test_hub_that_was_killed_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    with hub_process("--db", str(path)) as (url, process):
        async with raw_client(url) as requester, raw_client(url) as worker:
            asked = await requester.register("requester")
            await worker.register("worker", "work")
            await requester.delegate("t", capability="work")
            await worker.request(type="result", task_id="t", success=True, output=1)
            process.kill()
            await asyncio.to_thread(process.wait, WAIT_S)
    assert (tmp_path / "hub.db-wal").exists()
    with hub_process("--db", str(path)) as (url, _):
        async with raw_client(url) as requester:
            again = await requester.register("requester", agent_id=asked["agent_id"], resume=asked["resume"])
            assert again["agent_id"] == asked["agent_id"]
            assert (await requester.message("result", task_id="t"))["output"] == 1
            assert (await requester.request(type="status"))["hub"]["journal"] == "ok"


@posix_only
@pytest.mark.parametrize(
    ("before", "after"), [("msgspec", "built in"), ("built in", "pydantic"), ("pydantic", "msgspec")]
)
async def test_payloads_come_back_byte_by_byte_after_a_kill(before: str, after: str, tmp_path: Path) -> None:
    """Another codec reads them then: which one wrote the journal does not matter."""
    path, count = str(tmp_path / "hub.db"), len(PAYLOADS_AS_WRITTEN)
    with hub_process("--db", path, without=CODECS_WITHOUT[before]) as (url, process):
        async with raw_client(url) as requester, raw_client(url) as absent, raw_client(url) as worker:
            asked = await absent.register("absent")
            await requester.register("requester")
            await worker.register("worker", "work", max_tasks=100)
            for number, payload in enumerate(PAYLOADS_AS_WRITTEN):
                fields = f'"id":"{number}","input":{payload},"capability"'
                await absent.connection.send(f'{{"type":"delegate","task_id":"ended-{number}",{fields}:"work"}}')
                await requester.connection.send(
                    f'{{"type":"delegate","task_id":"open-{number}","wait":true,{fields}:"later"}}'
                )
                await requester.receive()
                await worker.message("delegate", task_id=f"ended-{number}")
            await absent.connection.close()
            for number, payload in enumerate(PAYLOADS_AS_WRITTEN):
                await worker.connection.send(
                    f'{{"type":"result","id":"{number}","task_id":"ended-{number}","success":true,"output":{payload}}}'
                )
                await worker.receive()
            process.kill()
            await asyncio.to_thread(process.wait, WAIT_S)
    with hub_process("--db", path, without=CODECS_WITHOUT[after]) as (url, _):
        async with raw_client(url) as absent, raw_client(url) as worker:
            await worker.register("worker", "later", max_tasks=100)
            found = [await worker.connection.recv() for _ in range(count)]
            for text, payload in zip(found, PAYLOADS_AS_WRITTEN, strict=True):
                assert f'"input":{payload},' in text
            await absent.register("absent", agent_id=asked["agent_id"], resume=asked["resume"])
            found = [await absent.connection.recv() for _ in range(count)]
            for text, payload in zip(found, PAYLOADS_AS_WRITTEN, strict=True):
                assert f'"output":{payload}' in text


async def test_hub_without_a_journal_says_so_and_writes_no_file(tmp_path: Path) -> None:
    with hub_process(cwd=tmp_path) as (url, _):
        assert (await asyncio.to_thread(health_of, url))[1]["journal"] == "none"
    assert files_of(tmp_path) == {}


def codes_after_restart(world: JournaledHarness, client: Any) -> tuple[JournaledHarness, dict[str, str]]:
    """Return the restarted hub, and the codes of the failed tasks that a client is told when it is back, by task_id."""
    after = world.restart()
    back = after.back(client)
    after.pass_time(1)
    return after, {one.task_id: one.error.code for one in back.received() if isinstance(one, TaskOutcome)}


@pytest.mark.parametrize("max_tasks", [5, 5000])
def test_release_of_many_tasks_goes_on_after_a_restart(tmp_path: Path, max_tasks: int) -> None:
    world = JournaledHarness(tmp_path / "hub.db", open_tasks_max=5000)
    worker, requester = world.join("worker", "greet", max_tasks=max_tasks), world.join("requester")
    count = agenthub.TICK_BATCH + 20
    for number in range(count):
        requester.delegate(f"t{number}", agent_id=worker.agent_id, ttl=1e5)
    worker.ask(Deregister())
    assert world.hub.summary()["ended"]["failed"] < count
    requester.received()
    after, codes = codes_after_restart(world, requester)
    assert codes == {f"t{number}": "agent_lost" for number in range(count)}
    assert worker.agent_id not in after.hub.directory.agents
    after.journal.close()


def test_cancelling_many_subtasks_goes_on_after_a_restart(tmp_path: Path) -> None:
    world = JournaledHarness(tmp_path / "hub.db")
    requester, parent = world.join("requester"), world.join("parent", "plan")
    requester.delegate("t", "plan")
    count = agenthub.TICK_BATCH + 20
    for number in range(count):
        parent.delegate(f"t{number}", "step", parent_id="t", wait=True, ttl=200.0)
    parent.succeed("t")
    parent.received()
    after, codes = codes_after_restart(world, parent)
    assert codes == {f"t{number}": "cancelled" for number in range(count)}
    after.journal.close()


# A journal that another hub can take over


class LeasedJournal(SlowJournal):
    """A journal with a lease, as one in a database has."""

    lease_s = 20.0

    def open(self, *, wait: bool = True) -> None:
        super().open()
        self.is_open = True

    def close(self) -> None:
        self.is_open = False
        with self.in_use:  # SQLite crashes if it is closed while another thread writes.
            super().close()


@pytest.fixture
def skip(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that moves the clock of leases on, as if the process had been stopped meanwhile."""
    real, skipped_s = agenthub.lease_clock, [0.0]
    monkeypatch.setattr(agenthub, "lease_clock", lambda: real() + skipped_s[0])

    def move(seconds: float) -> None:
        skipped_s[0] += seconds

    return move


@contextlib.asynccontextmanager
async def leased_hub(path: Path) -> AsyncIterator[tuple[LocalHub, LeasedJournal, Caller, Caller]]:
    async with hub_on(LeasedJournal(path)) as scene:
        yield scene


@pytest.mark.parametrize("fraction", [0.8, 0.95])
async def test_hub_whose_lease_may_be_over_says_nothing_before_the_next_write(
    fraction: float, tmp_path: Path, skip: Callable[[float], None]
) -> None:
    async with leased_hub(tmp_path / "hub.db") as (hub, journal, _, requester):
        await eventually(lambda: hub.commit is not None and hub.commit.idle.is_set())
        journal.gate.clear()
        skip(fraction * journal.lease_s)
        requester.tell(Status(id="s"))  # Its reply follows from no change, so it would not wait otherwise.
        await requester.is_alive()
        assert requester.heard() == (["heartbeat_ack"] if fraction > 0.9 else ["status", "heartbeat_ack"])
        journal.gate.set()
        await eventually(lambda: hub.commit is not None and not hub.commit.is_silent)
        if fraction > 0.9:
            await requester.reply_to("s")


async def test_write_that_took_longer_than_the_lease_is_not_believed(
    tmp_path: Path, skip: Callable[[float], None]
) -> None:
    async with leased_hub(tmp_path / "hub.db") as (hub, journal, _, requester):
        await eventually(lambda: hub.commit is not None and hub.commit.idle.is_set())
        journal.gate.clear()
        begun = journal.begun
        requester.tell(Delegate(id="d", task_id="t", capability="work"))
        await eventually(lambda: journal.begun > begun)
        skip(journal.lease_s)
        journal.gate.set()
        assert (await requester.reply_to("d")).state == "in_progress"
        assert journal.begun >= begun + 2  # The second one showed that the hub still had its lease.


async def test_hub_that_was_replaced_drops_what_it_held_and_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with leased_hub(tmp_path / "hub.db") as (hub, journal, worker, requester):
        journal.failure = agenthub.Fenced("another hub has taken over")
        requester.tell(Delegate(id="d", task_id="t", capability="work"))
        with pytest.raises(agenthub.Fenced):
            await asyncio.wait_for(asyncio.shield(hub.lost), WAIT_S)
        await eventually(lambda: (requester.close_code, worker.close_code) == (1006, 1006))
        await eventually(lambda: not journal.is_open)
        assert (requester.heard(), worker.heard()) == ([], [])
        assert errors_of(caplog) == ["another hub has taken over: this hub ends"]
        with pytest.raises(agenthub.Disconnected):
            await hub.connect(Caller())


@impatient
async def test_database_that_is_away_stops_new_tasks_until_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with leased_hub(tmp_path / "hub.db") as (hub, journal, _, requester):
        journal.failure = OSError("the connection\nis lost")
        requester.tell(Delegate(id="held", task_id="held", capability="work"))
        await eventually(lambda: hub.hub.is_full)
        refused = await requester.ask(Delegate(task_id="new", capability="work"))
        assert (refused.code, refused.message) == ("overloaded", "the hub's database is away; retry later")
        journal.failure = None
        assert (await requester.reply_to("held")).state == "in_progress"
        assert (await requester.ask(Delegate(task_id="new", capability="work"))).state == "in_progress"
        assert errors_of(caplog) == [
            "the journal cannot be written: the connection is lost; new tasks are rejected until it can",
            "the journal can be written again",
        ]


@pytest.mark.parametrize("way", ["fails", "hangs"])
async def test_hub_that_cannot_write_for_three_leases_ends(way: str, tmp_path: Path) -> None:
    async with leased_hub(tmp_path / "hub.db") as (hub, journal, _, requester):
        if way == "fails":
            journal.failure = OSError("the connection is lost")
        else:
            journal.gate.clear()
        begun = journal.begun
        requester.tell(Delegate(id="d", task_id="t", capability="work"))
        await eventually(lambda: journal.begun > begun)
        assert hub.commit is not None
        journal.lease_s = 0.05  # Only now, so that a slow machine does not lose it before.
        hub.commit._renew()
        with pytest.raises(JournalError, match="could not be written for "):
            await asyncio.wait_for(asyncio.shield(hub.lost), WAIT_S)
        await eventually(lambda: requester.close_code == 1006)


async def test_hub_with_a_lease_writes_although_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LeasedJournal, "lease_s", 0.5)
    async with leased_hub(tmp_path / "hub.db") as (_, journal, _, _):
        begun = journal.begun
        await eventually(lambda: journal.begun > begun + 3)


async def test_namespace_that_was_replaced_ends_the_whole_hub(tmp_path: Path) -> None:
    journals = []

    class Shared(LeasedJournal):
        def of_namespace(self, namespace: str) -> Shared:
            journals.append(Shared(tmp_path / namespace))
            return journals[-1]

    access = agenthub.Access([agenthub.Grant("one", hash_of("x" * 20), namespace="other")])
    async with HubServer(port=0, access=access, journal=Shared(tmp_path / "hub.db")) as hub:
        journals[0].failure = agenthub.Fenced("another hub has taken over")
        with pytest.raises(agenthub.Fenced):
            await asyncio.wait_for(asyncio.shield(hub.lost), WAIT_S)
        assert not any(one.is_running for one in hub.namespaces.values())


class AwaitedJournal(LeasedJournal):
    """A journal whose lease another hub holds, until `gate` is set or it is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.gate.clear()
        self.is_closed = False

    def open(self, *, wait: bool = True) -> None:
        while not self.gate.wait(0.01):
            if self.is_closed:
                raise JournalError("closed while it waited")
        super().open()

    def close(self) -> None:
        self.is_closed = True
        super().close()


async def test_standby_answers_503_until_it_has_the_lease(tmp_path: Path) -> None:
    journal = AwaitedJournal(tmp_path / "hub.db")
    hub = HubServer(port=0, journal=journal)
    starting = asyncio.create_task(hub.start())
    await eventually(lambda: hub.port)
    with pytest.raises(urllib.error.HTTPError, match="503") as caught:
        await asyncio.to_thread(health_of, hub.url)
    assert json.loads(caught.value.read()) == {"status": "standby", "ready": False}
    caught.value.close()
    with pytest.raises(agenthub.Disconnected, match=r"503; this hub does not serve now \(standby\): "):
        await agenthub.connect_websocket(hub.url, Caller())
    async with HubServer(port=0) as first, agenthub.Agent("me", url=f"{hub.url},{first.url}") as me:
        journal.gate.set()
        await starting
        assert (await asyncio.to_thread(health_of, hub.url))[0] == 200
        await first.stop()
        assert (await asyncio.wait_for(me.status(), WAIT_S)).hub["journal"] == "ok"
    await hub.stop()


async def test_standby_that_is_stopped_leaves_its_port_and_its_journal(tmp_path: Path) -> None:
    journal = AwaitedJournal(tmp_path / "hub.db")
    hub = HubServer(port=0, journal=journal)
    starting = asyncio.create_task(hub.start())
    await eventually(lambda: hub.port)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert journal.is_closed
    async with HubServer(port=hub.port):
        pass


# Some namespaces only


def access_of_two() -> agenthub.Access:
    return agenthub.Access([agenthub.Grant(name, hash_of(name * 20), namespace=name) for name in ("ape", "bee")])


async def test_hub_serves_the_namespaces_that_it_is_given(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "hub.db", sync="normal")
    async with HubServer(port=0, access=access_of_two(), journal=journal, namespaces=["bee"]) as hub:
        assert hub.namespaces == {"bee": hub}
        async with agenthub.Agent("me", url=hub.url, token="bee" * 20):
            pass
        text = "this hub does not serve the token's namespace, ape: use the URL of its hub"
        with pytest.raises(agenthub.Refused, match=text) as refused:
            await asyncio.wait_for(agenthub.Agent("me", url=hub.url, token="ape" * 20).start(), WAIT_S)
        assert refused.value.code == "unauthorized"
        async with raw_client(hub.url) as client:
            await client.send(type="register", id="1", name="me", token="ape" * 20)
            assert (await client.receive())["message"] == text
        with pytest.raises(agenthub.Refused, match="invalid token"):
            await asyncio.wait_for(agenthub.Agent("me", url=hub.url, token="eel" * 20).start(), WAIT_S)
        await hub.reload(access_of_two())
        assert list(hub.namespaces) == ["bee"]
    assert list(files_of(tmp_path)) == ["hub.db.bee"]


def test_namespaces_need_tokens_and_names(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run_hub(capsys, "--namespaces", "ape,bee")
    assert (code, "--namespaces needs --access" in text) == (2, True)
    with pytest.raises(ValueError, match="namespaces: must be 1 to 64 characters"):
        HubServer(access=access_of_two(), namespaces=["ape", ""])


# The seam for other journals; those in PostgreSQL are in test_postgres.py


def test_path_is_a_journal_in_sqlite(tmp_path: Path) -> None:
    journal = agenthub.journal_of(str(tmp_path / "hub.db"), sync="normal")
    assert isinstance(journal, Journal)
    assert (journal.path, journal.sync, journal.lease_s) == (str(tmp_path / "hub.db"), "normal", math.inf)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_journal_in_postgresql_needs_its_module(
    scheme: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Absent:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "agenthub_postgres":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.delitem(sys.modules, "agenthub_postgres", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(agenthub.AgentHubError, match=r"file: copy agenthub_postgres\.py next to agenthub\.py"):
        agenthub.journal_of(f"{scheme}://hub@127.0.0.1/agenthub")
    assert run_hub(capsys, "--db", f"{scheme}://hub@127.0.0.1/agenthub")[0] == 1


def test_journal_in_postgresql_needs_its_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "agenthub_postgres", raising=False)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    code, text = run_hub(capsys, "--db", "postgresql://hub@127.0.0.1/agenthub")
    assert (code, text.count("\n")) == (1, 1)
    assert text.endswith("needs the package 'psycopg[binary]>=3.3': pip install 'psycopg[binary]>=3.3'\n")


# Copying


def test_journal_is_copied_with_all_its_namespaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "hub.db", tmp_path / "new" / "hub.db"
    target.parent.mkdir()
    fill(source, 3)
    fill(tmp_path / "hub.db.bee", 1500)
    (tmp_path / "hub.db.bee-wal.old").touch()
    assert agenthub.main(["journal", "copy", str(source), str(target)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"copied 1 agents and 3 tasks of namespace default to {target}",
        f"copied 1 agents and 1500 tasks of namespace bee to {target}",
    ]
    assert use(target) == use(source)
    assert use(f"{target}.bee") == use(f"{source}.bee")


def test_copy_does_not_mix_journals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "one")
    fill(tmp_path / "two")
    before = files_of(tmp_path)
    assert agenthub.main(["journal", "copy", str(tmp_path / "one"), str(tmp_path / "two")]) == 1
    assert "holds agents or tasks of namespace default already; use another" in capsys.readouterr().err
    assert agenthub.main(["journal", "copy", str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err.endswith("nowhere: no such file\n")
    assert files_of(tmp_path) == before


def test_journal_in_use_is_not_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path / "hub.db")
    journal.open()
    assert agenthub.main(["journal", "copy", str(tmp_path / "hub.db"), str(tmp_path / "new")]) == 1
    assert "another hub uses this journal" in capsys.readouterr().err
    journal.close()
