"""The protocol of docs/protocol.md: a hub in a process of its own, and clients independent of our code."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.raw_websocket import ConnectionClosed
from tests.support import CODECS_WITHOUT, PAYLOADS_AS_WRITTEN, WAIT_S, RawClient, hub_process, raw_client

numbers = itertools.count(1)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """Run a hub that most tests share: its grace period outlasts each test, and all names are fresh."""
    with hub_process() as (url, _):
        yield url


@pytest.fixture(scope="module")
def hasty_hub() -> Iterator[str]:
    """Run a hub with almost no grace period."""
    with hub_process("--grace", "0.2") as (url, _):
        yield url


@pytest.fixture
def own_hub() -> Iterator[str]:
    """Run a hub for one test alone, for tests that other agents would disturb."""
    with hub_process() as (url, _):
        yield url


@pytest.fixture(scope="module", params=CODECS_WITHOUT)
def codec_hub(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a hub with each codec."""
    with hub_process(without=CODECS_WITHOUT[request.param]) as (url, _):
        yield url


def fresh(word: str) -> str:
    """Return a name that no other test uses on the shared hub."""
    return f"{word}{next(numbers)}"


@contextlib.asynccontextmanager
async def clients(url: str, count: int) -> AsyncIterator[list[RawClient]]:
    """Open this many connections."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(raw_client(url)) for _ in range(count)]


@contextlib.asynccontextmanager
async def pair(url: str, **limits: Any) -> AsyncIterator[tuple[RawClient, RawClient, str, str]]:
    """Open a requester and a worker; yield them, the worker's one capability, and a fresh task id."""
    capability = fresh("capability")
    async with clients(url, 2) as (requester, worker):
        await requester.register("requester")
        await worker.register("worker", capability, **limits)
        yield requester, worker, capability, fresh("task")


async def lose(client: RawClient, *, seen_by: RawClient, name: str) -> None:
    """Close a connection, and wait until the hub has noticed: disconnected agents are not discoverable."""
    await client.connection.close()
    async with asyncio.timeout(WAIT_S):
        while (await seen_by.request(type="discover", capability=name))["total"]:
            await asyncio.sleep(0.01)


async def state_of(client: RawClient, task_id: str) -> str:
    state: str = (await client.request(type="status", task_id=task_id))["state"]
    return state


async def until_state(client: RawClient, task_id: str, state: str) -> None:
    """Wait until a task is in this state."""
    async with asyncio.timeout(WAIT_S):
        while await state_of(client, task_id) != state:
            await asyncio.sleep(0.01)


async def names_found(client: RawClient, keyword: str, **fields: Any) -> list[str]:
    reply = await client.request(type="discover", capability=keyword, **fields)
    return [agent["name"] for agent in reply["agents"]]


# One reply per request


async def test_every_message_with_an_id_gets_exactly_one_reply(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, task):
        await worker.nothing_else()
        exchanges = [
            (requester, "discover", {}, "discover"),
            (requester, "delegate", {"task_id": task, "capability": capability}, "status"),
            (requester, "status", {}, "status"),
            (requester, "status", {"task_id": task}, "status"),
            (requester, "status", {"tasks": True}, "status"),
            (requester, "broadcast", {"message": 1, "capability": "nobody"}, "broadcast"),
            (requester, "heartbeat", {}, "heartbeat_ack"),
            (requester, "register", {"name": "again"}, "register"),
            (requester, "nonsense", {}, "error"),
            (worker, "result", {"task_id": task, "success": True}, "status"),
            (requester, "deregister", {}, "deregister"),
        ]
        for client, type_, fields, expected in exchanges:
            reply = await client.request(type=type_, **fields)
            assert reply["type"] == expected
        assert await requester.closed() == 1000
        assert not [message for message in requester.seen if "reply_to" in message]
        await worker.message("delegate", task_id=task)
        await worker.nothing_else()


async def test_message_without_an_id_gets_no_reply(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, task):
        await requester.send(type="discover")
        await requester.send(type="status")
        await requester.send(type="heartbeat")
        await requester.send(type="broadcast", message=1, capability="nobody")
        await requester.send(type="register", name="again")
        await requester.send(type="delegate", task_id=task, capability=capability)
        await requester.nothing_else()
        await worker.message("delegate", task_id=task)
        await worker.send(type="status", task_id=task, progress=0.5)
        await worker.nothing_else()
        await worker.send(type="result", task_id=task, success=True)
        await worker.nothing_else()


async def test_refusal_without_an_id_is_told_and_has_no_reply_to(hub: str) -> None:
    async with pair(hub) as (requester, _, _, task):
        await requester.send(type="delegate", task_id=task, capability="nobody has this")
        refusal = await requester.receive()
        assert (refusal["type"], refusal["code"], refusal["task_id"]) == ("error", "no_agent", task)
        assert refusal.get("reply_to") is None
        await requester.nothing_else()


async def test_an_id_has_1_to_128_characters(hub: str) -> None:
    async with raw_client(hub) as client:
        assert (await client.request(type="status", id="x" * 128))["type"] == "status"
        assert (await client.request(type="status", id="ü \U0001f41d"))["type"] == "status"
        for bad in ("", "x" * 129, "\x00", 7, ["x"], True, {"a": 1}):
            await client.send(type="status", id=bad)
            refusal = await client.receive()
            assert (refusal["type"], refusal["code"]) == ("error", "invalid_message")
            assert refusal["message"].startswith("id")


async def test_many_requests_at_once_are_all_answered(hub: str) -> None:
    async with raw_client(hub) as client:
        await client.register("hasty")
        sent = [f"ping{number}" for number in range(500)]
        for message_id in sent:
            await client.send(type="heartbeat", id=message_id)
        assert [(await client.receive())["reply_to"] for _ in sent] == sent
        await client.nothing_else()


# Invalid messages are rejected with an error that names the field, and change nothing

REFUSED = [
    ("type", '{"id": "1"}', "reply"),
    ("type", '{"id": "1", "type": null}', "reply"),
    ("type", '{"id": "1", "type": 5}', "reply"),
    ("type", '{"id": "1", "type": ["status"]}', "reply"),
    ("type", '{"id": "1", "type": "Status"}', "reply"),
    ("type", '{"type": "heartbeat_ack", "id": "1"}', "reply"),
    ("type", '{"type": "error", "code": "internal", "message": "", "id": "1"}', "reply"),
    ("type", '{"type": "nonsense"}', "none"),
    ("name", '{"type": "register", "id": "1"}', "reply"),
    ("name", '{"type": "register", "name": 5, "id": "1"}', "reply"),
    ("name", '{"type": "register", "name": null, "id": "1"}', "reply"),
    ("name", '{"type": "register", "name": "", "id": "1"}', "reply"),
    ("description", '{"type": "register", "name": "a", "description": 5, "id": "1"}', "reply"),
    ("capabilities", '{"type": "register", "name": "a", "capabilities": "x", "id": "1"}', "reply"),
    ("capabilities", '{"type": "register", "name": "a", "capabilities": {"x": 1}, "id": "1"}', "reply"),
    ("capabilities", '{"type": "register", "name": "a", "capabilities": [5], "id": "1"}', "reply"),
    ("capabilities", '{"type": "register", "name": "a", "capabilities": [""], "id": "1"}', "reply"),
    ("capabilities", '{"type": "register", "name": "a", "capabilities": [{"description": "d"}], "id": "1"}', "reply"),
    ("capabilities", '{"type": "register", "name": "a", "capabilities": [{"name": ["x"]}], "id": "1"}', "reply"),
    ("capabilities", '{"type": "register", "name": "a", "capabilities": [{"name": "x", "input_schema": 5}]}', "none"),
    ("max_tasks", '{"type": "register", "name": "a", "max_tasks": "5", "id": "1"}', "reply"),
    ("max_tasks", '{"type": "register", "name": "a", "max_tasks": true, "id": "1"}', "reply"),
    ("max_tasks", '{"type": "register", "name": "a", "max_tasks": 1.5, "id": "1"}', "reply"),
    ("max_tasks", '{"type": "register", "name": "a", "max_tasks": -1, "id": "1"}', "reply"),
    ("metadata", '{"type": "register", "name": "a", "metadata": [], "id": "1"}', "reply"),
    ("agent_id", '{"type": "register", "name": "a", "agent_id": 5, "resume": "x", "id": "1"}', "reply"),
    ("resume", '{"type": "register", "name": "a", "agent_id": "x", "resume": 5, "id": "1"}', "reply"),
    ("drain", '{"type": "deregister", "drain": "yes", "id": "1"}', "reply"),
    ("drain", '{"type": "deregister", "drain": 1, "id": "1"}', "reply"),
    ("capability", '{"type": "discover", "capability": 5, "id": "1"}', "reply"),
    ("limit", '{"type": "discover", "limit": "5", "id": "1"}', "reply"),
    ("limit", '{"type": "discover", "limit": true, "id": "1"}', "reply"),
    ("limit", '{"type": "discover", "limit": -1, "id": "1"}', "reply"),
    ("task_id", '{"type": "delegate", "capability": "x", "id": "1"}', "reply"),
    ("task_id", '{"type": "delegate", "task_id": "", "capability": "x", "id": "1"}', "reply"),
    ("task_id", '{"type": "delegate", "task_id": ["x"], "capability": "x", "id": "1"}', "reply"),
    ("task_id", '{"type": "delegate", "task_id": "' + "x" * 129 + '", "capability": "x", "id": "1"}', "reply"),
    ("capability", '{"type": "delegate", "task_id": "x", "id": "1"}', "reply"),
    ("capability", '{"type": "delegate", "task_id": "x", "capability": ["x"], "id": "1"}', "reply"),
    ("agent_id", '{"type": "delegate", "task_id": "x", "agent_id": {}, "id": "1"}', "reply"),
    ("ttl", '{"type": "delegate", "task_id": "x", "capability": "x", "ttl": "5", "id": "1"}', "reply"),
    ("ttl", '{"type": "delegate", "task_id": "x", "capability": "x", "ttl": true, "id": "1"}', "reply"),
    ("ttl", '{"type": "delegate", "task_id": "x", "capability": "x", "ttl": 0, "id": "1"}', "reply"),
    ("ttl", '{"type": "delegate", "task_id": "x", "capability": "x", "ttl": -1, "id": "1"}', "reply"),
    ("ttl", '{"type": "delegate", "task_id": "x", "capability": "x", "ttl": 604800.1, "id": "1"}', "reply"),
    ("ttl", '{"type": "delegate", "task_id": "x", "capability": "x", "ttl": NaN, "id": "1"}', "reply"),
    ("ttl", '{"type": "delegate", "task_id": "x", "capability": "x", "ttl": Infinity, "id": "1"}', "reply"),
    ("ttl", '{"type": "delegate", "task_id": "x", "capability": "x", "ttl": 1e999, "id": "1"}', "reply"),
    ("priority", '{"type": "delegate", "task_id": "x", "capability": "x", "priority": 101, "id": "1"}', "reply"),
    ("priority", '{"type": "delegate", "task_id": "x", "capability": "x", "priority": -101, "id": "1"}', "reply"),
    ("priority", '{"type": "delegate", "task_id": "x", "capability": "x", "priority": true, "id": "1"}', "reply"),
    ("priority", '{"type": "delegate", "task_id": "x", "capability": "x", "priority": NaN, "id": "1"}', "reply"),
    ("priority", '{"type": "delegate", "task_id": "x", "capability": "x", "priority": 1e400, "id": "1"}', "reply"),
    ("max_retries", '{"type": "delegate", "task_id": "x", "capability": "x", "max_retries": -1, "id": "1"}', "reply"),
    ("max_retries", '{"type": "delegate", "task_id": "x", "capability": "x", "max_retries": "1", "id": "1"}', "reply"),
    ("parent_id", '{"type": "delegate", "task_id": "x", "capability": "x", "parent_id": 5, "id": "1"}', "reply"),
    ("wait", '{"type": "delegate", "task_id": "x", "capability": "x", "wait": 1, "id": "1"}', "reply"),
    ("wait", '{"type": "delegate", "task_id": "x", "capability": "x", "wait": "true", "id": "1"}', "reply"),
    ("input", '{"type": "delegate", "task_id": "x", "capability": "x", "input": NaN, "id": "1"}', "reply"),
    (
        "input",
        '{"type": "delegate", "task_id": "x", "capability": "x", "input": {"a": [-Infinity]}, "id": "1"}',
        "reply",
    ),
    ("input", '{"type": "delegate", "task_id": "x", "capability": "x", "input": [1e999], "id": "1"}', "reply"),
    ("metadata", '{"type": "register", "name": "a", "metadata": {"a": NaN}, "id": "1"}', "reply"),
    (
        "capabilities",
        '{"type": "register", "name": "a", "capabilities": [{"name": "x", "input_schema": {"a": NaN}}]}',
        "none",
    ),
    ("task_id", '{"type": "result", "success": true, "id": "1"}', "reply"),
    ("success", '{"type": "result", "task_id": "x", "id": "1"}', "reply"),
    ("success", '{"type": "result", "task_id": "x", "success": 1, "id": "1"}', "reply"),
    ("success", '{"type": "result", "task_id": "x", "success": "true", "id": "1"}', "reply"),
    ("error", '{"type": "result", "task_id": "x", "success": false, "error": 5, "id": "1"}', "reply"),
    ("error", '{"type": "result", "task_id": "x", "success": false, "error": ["x"], "id": "1"}', "reply"),
    ("attempt", '{"type": "result", "task_id": "x", "success": true, "attempt": "1", "id": "1"}', "reply"),
    ("attempt", '{"type": "result", "task_id": "x", "success": true, "attempt": true, "id": "1"}', "reply"),
    ("output", '{"type": "result", "task_id": "x", "success": true, "output": NaN, "id": "1"}', "reply"),
    (
        "output",
        '{"type": "result", "task_id": "x", "success": true, "output": {"a": {"b": 1e999}}, "id": "1"}',
        "reply",
    ),
    ("task_id", '{"type": "status", "task_id": 5, "id": "1"}', "reply"),
    ("tasks", '{"type": "status", "tasks": 1, "id": "1"}', "reply"),
    ("progress", '{"type": "status", "task_id": "x", "progress": 1.01, "id": "1"}', "reply"),
    ("progress", '{"type": "status", "task_id": "x", "progress": -0.01, "id": "1"}', "reply"),
    ("progress", '{"type": "status", "task_id": "x", "progress": "0.5", "id": "1"}', "reply"),
    ("progress", '{"type": "status", "task_id": "x", "progress": true, "id": "1"}', "reply"),
    ("progress", '{"type": "status", "task_id": "x", "progress": NaN, "id": "1"}', "reply"),
    ("detail", '{"type": "status", "task_id": "x", "detail": [NaN], "id": "1"}', "reply"),
    ("message", '{"type": "broadcast", "id": "1"}', "reply"),
    ("message", '{"type": "broadcast", "message": [Infinity], "id": "1"}', "reply"),
    ("message", '{"type": "broadcast", "message": 1e999, "id": "1"}', "reply"),
    ("capability", '{"type": "broadcast", "message": 1, "capability": 5, "id": "1"}', "reply"),
]


@pytest.mark.parametrize(("field", "text", "answer"), REFUSED, ids=[row[0] for row in REFUSED])
async def test_error_names_the_field_that_does_not_fit(hub: str, field: str, text: str, answer: str) -> None:
    async with raw_client(hub) as client:
        await client.register("careless")
        await client.connection.send(text)
        refusal = await client.receive()
        assert refusal["type"] == "error"
        expected = ("unsupported_type",) if '"nonsense"' in text else ("invalid_message", "unsupported_type")
        assert refusal["code"] in expected if field == "type" else refusal["code"] == "invalid_message"
        assert field in refusal["message"]
        assert refusal.get("reply_to") == ("1" if answer == "reply" else None)
        await client.nothing_else()


async def test_unknown_type_has_a_code_of_its_own(hub: str) -> None:
    async with raw_client(hub) as client:
        assert (await client.request(type="subscribe"))["code"] == "unsupported_type"


@pytest.mark.parametrize(
    "text", ["", " ", "{", "nonsense", "null", "[]", "5", '"status"', "true", "[" * 100_000, "NaN"]
)
async def test_what_is_no_object_is_refused_and_the_connection_lives_on(hub: str, text: str) -> None:
    async with raw_client(hub) as client:
        await client.connection.send(text)
        refusal = await client.receive()
        assert (refusal["type"], refusal["code"]) == ("error", "invalid_message")
        assert refusal["message"]
        await client.nothing_else()


DEEP = [
    ("input", '{"type": "delegate", "id": "deep", "task_id": "x", "capability": "x", "input": '),
    ("message", '{"type": "broadcast", "id": "deep", "message": '),
    ("metadata", '{"type": "register", "id": "deep", "name": "x", "metadata": {"a": '),
    ("output", '{"type": "result", "id": "deep", "task_id": "x", "success": true, "output": '),
    ("detail", '{"type": "status", "id": "deep", "task_id": "x", "detail": '),
    ("unknown", '{"type": "status", "id": "deep", "unknown": '),
]


@pytest.mark.parametrize("start", [start for _, start in DEEP], ids=[field for field, _ in DEEP])
async def test_100_000_nested_brackets_are_refused(hub: str, start: str) -> None:
    async with raw_client(hub) as client:
        await client.register("deep")
        for opening, closing in (("[", "]"), ('{"a":', "}"), ("[", "")):
            text = start + opening * 100_000 + "1" + closing * 100_000 + "}" * start.count("{")
            await client.connection.send(text)
            refusal = await client.receive()
            assert (refusal["type"], refusal["code"]) == ("error", "invalid_message")
            assert refusal["message"].endswith(("is nested more than 64 deep", "it is nested too deep"))
        await client.nothing_else()


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "1" * 5000, "NaN", "1e999"], ids=lambda v: v[:5])
async def test_refusal_carries_the_id_that_stands_before_what_is_refused(hub: str, value: str) -> None:
    async with raw_client(hub) as client:
        await client.register("client")
        await client.connection.send('{"type": "broadcast", "id": "readable", "message": ' + value + "}")
        refusal = await client.receive()
        assert (refusal["type"], refusal["code"]) == ("error", "invalid_message")
        assert refusal.get("reply_to") == "readable", refusal


async def test_binary_frame_is_refused_and_the_connection_lives_on(hub: str) -> None:
    async with raw_client(hub) as client:
        for content in (b"", b"\x00\xff", b'{"type": "status"}'):
            await client.connection.send(content)
            refusal = await client.receive()
            assert (refusal["type"], refusal["code"]) == ("error", "invalid_message")
        await client.nothing_else()


async def test_fragmented_message_is_one_message(hub: str) -> None:
    async with raw_client(hub) as client:
        await client.connection.send(iter(['{"type": "sta', "", 'tus", "id"', ': "ü', 'x"}']))
        assert (await client.receive())["reply_to"] == "üx"
        await client.connection.send(iter(["{", "nonsense", ""]))
        assert (await client.receive())["code"] == "invalid_message"
        await client.nothing_else()


async def test_half_of_a_surrogate_pair_does_no_harm(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, _):
        for text in (
            r'{"type": "status", "id": "\ud800"}',
            r'{"type": "\udfff", "id": "1"}',
            r'{"type": "register", "name": "\ud800", "id": "1"}',
            r'{"type": "status", "task_id": "\udc00", "id": "1"}',
            r'{"type": "broadcast", "message": {"\ud800": 1}, "id": "1"}',
            r'{"type": "delegate", "task_id": "a", "input": "\ud800", "id": "1", "capability": "' + capability + '"}',
        ):
            await requester.connection.send(text)
            assert (await requester.receive())["type"] == "error"
        await requester.nothing_else()
        await worker.nothing_else()


async def test_what_is_refused_changes_nothing(hub: str) -> None:
    name, capability = fresh("name"), fresh("capability")
    async with clients(hub, 2) as (observer, client):
        await client.register(name, capability, max_tasks=3)
        assert (await client.register("other", "else", max_tasks="many"))["code"] == "invalid_message"
        (agent,) = (await observer.request(type="discover", capability=capability))["agents"]
        assert (agent["name"], agent["max_tasks"]) == (name, 3)


async def test_refused_delegate_leaves_its_task_id_free(hub: str) -> None:
    async with pair(hub) as (requester, _, capability, task):
        assert (await requester.delegate(task, capability="nobody"))["code"] == "no_agent"
        assert (await requester.request(type="status", task_id=task))["code"] == "unknown_task"
        assert (await requester.delegate(task, capability=capability, input=1))["state"] == "in_progress"


async def test_unknown_fields_are_ignored(hub: str) -> None:
    capability, task = fresh("capability"), fresh("task")
    async with clients(hub, 2) as (requester, worker):
        await requester.register("requester", colour="red")
        await worker.register("worker", {"name": capability, "colour": "red"}, colour={"a": [1]})
        assert (await requester.delegate(task, capability=capability, colour=None))["state"] == "in_progress"
        assert "colour" not in await worker.message("delegate", task_id=task)
        assert (await requester.request(type="heartbeat", colour=1))["type"] == "heartbeat_ack"
        reply = await worker.request(
            type="result", task_id=task, success=False, error={"code": "a", "message": "b", "colour": 1}
        )
        assert reply["state"] == "failed"
        assert (await requester.request(type="discover", colour=1))["type"] == "discover"


async def test_payload_arrives_as_it_was_sent(hub: str) -> None:
    payload = {
        "": [None, True, False, 0, -1, 0.1, 1e300, -1.5e-9, 2**53 + 1, 2**64 - 1, -(2**63)],
        "text": '\x00\x7f ü \U0001f41d \u2028 \\ " </script>',
        "deep": json.loads("[" * 60 + "]" * 60),
        "type": "register",
    }
    async with pair(hub) as (requester, worker, capability, task):
        await requester.delegate(task, capability=capability, input=payload)
        assert (await worker.message("delegate"))["input"] == payload
        await worker.request(type="status", task_id=task, detail=payload)
        assert (await requester.message("status"))["detail"] == payload
        await worker.request(type="result", task_id=task, success=True, output=payload)
        assert (await requester.message("result"))["output"] == payload
        fetched = await requester.request(type="status", task_id=task)
        assert (fetched["input"], fetched["output"]) == (payload, payload)
        await requester.request(type="broadcast", message=payload, capability=capability)
        assert (await worker.message("broadcast"))["message"] == payload


async def test_sender_is_the_connection_and_never_a_field(hub: str) -> None:
    capability, task = fresh("capability"), fresh("task")
    async with clients(hub, 2) as (requester, worker):
        requester_id = (await requester.register("requester"))["agent_id"]
        worker_id = (await worker.register("worker", capability, sender="x"))["agent_id"]
        await requester.delegate(task, capability=capability, sender=worker_id, attempt=7)
        handed = await worker.message("delegate", task_id=task)
        assert (handed["sender"], handed["attempt"]) == (requester_id, 1)
        await worker.request(type="status", task_id=task, progress=0, sender=requester_id, seq=9)
        progress = await requester.message("status", task_id=task)
        assert (progress["sender"], progress["seq"]) == (worker_id, 1)
        await worker.request(type="result", task_id=task, success=True, sender=requester_id, state="failed")
        result = await requester.message("result", task_id=task)
        assert (result["sender"], result["state"]) == (worker_id, "completed")
        await worker.request(type="broadcast", message=1, sender=requester_id)
        assert (await requester.message("broadcast"))["sender"] == worker_id


# Registering and leaving


async def test_register_tells_identity_secret_and_limits(hub: str) -> None:
    async with clients(hub, 2) as (first, second):
        one, other = await first.register("Ann"), await second.register("Ann")
        assert one["agent_id"].startswith("Ann")
        assert one["agent_id"] != other["agent_id"]
        assert one["resume"] != other["resume"]
        assert (one["heartbeat_s"], one["max_bytes"], one["tasks"]) == (30, 1024 * 1024, [])


async def test_capability_comes_back_as_an_object(hub: str) -> None:
    plain, full = fresh("plain"), fresh("full")
    schema = {"type": "object", "properties": {"code": {"type": "string"}}}
    described = {"name": full, "description": "Reviews", "input_schema": schema, "output_schema": {"type": "array"}}
    async with clients(hub, 2) as (agent, observer):
        joined = await agent.register("ann", plain, described, description="About me", metadata={"a": [1]}, max_tasks=5)
        (found,) = (await observer.request(type="discover", capability=plain))["agents"]
        assert [capability["name"] for capability in found["capabilities"]] == [plain, full]
        assert found["capabilities"][1] == described
        assert found["agent_id"] == joined["agent_id"]
        assert (found["name"], found["description"], found["metadata"]) == ("ann", "About me", {"a": [1]})
        assert (found["running"], found["max_tasks"]) == (0, 5)
        assert joined["resume"] not in json.dumps(found)


async def test_resume_takes_the_identity_up_again(hub: str) -> None:
    capability = fresh("capability")
    async with clients(hub, 3) as (first, second, observer):
        joined = await first.register("ann", capability)
        await lose(first, seen_by=observer, name=capability)
        again = await second.register("ann", capability, agent_id=joined["agent_id"], resume=joined["resume"])
        assert again["agent_id"] == joined["agent_id"]
        assert (await observer.request(type="discover", capability=capability))["total"] == 1


async def test_wrong_secret_is_unauthorized(hub: str) -> None:
    capability = fresh("capability")
    async with clients(hub, 2) as (first, thief):
        joined = await first.register("ann", capability)
        for secret in ({"resume": "x" * len(joined["resume"])}, {"resume": "ü"}, {"resume": ""}, {}):
            reply = await thief.register("thief", agent_id=joined["agent_id"], **secret)
            assert reply.get("agent_id") != joined["agent_id"]
            if secret.get("resume"):
                assert reply["code"] == "unauthorized"
        await first.nothing_else()
        assert (await thief.register("thief"))["agent_id"].startswith("thief")


async def test_newer_connection_replaces_the_older_one(hasty_hub: str) -> None:
    capability = fresh("capability")
    async with clients(hasty_hub, 3) as (older, newer, observer):
        joined = await older.register("ann", capability)
        await newer.register("ann", capability, agent_id=joined["agent_id"], resume=joined["resume"])
        assert await older.closed() == 4000
        await asyncio.sleep(0.4)  # Longer than the grace period, which must not have begun.
        assert (await observer.request(type="discover", capability=capability))["total"] == 1
        await newer.nothing_else()


async def test_unknown_agent_id_gets_a_new_identity(hub: str) -> None:
    async with raw_client(hub) as client:
        joined = await client.register("ann", agent_id="ann-of-another-hub", resume="secret")
        assert joined["type"] == "register"
        assert joined["agent_id"] != "ann-of-another-hub"
        assert joined["resume"] != "secret"
        assert joined["tasks"] == []


async def test_second_register_replaces_all_but_the_identity(hub: str) -> None:
    old, new = fresh("old"), fresh("new")
    async with clients(hub, 2) as (client, observer):
        first = await client.register("ann", old, description="before", max_tasks=1, metadata={"a": 1})
        second = await client.register("bob", new, description="after", max_tasks=2)
        assert second["agent_id"] == first["agent_id"]
        assert (await observer.request(type="discover", capability=old))["total"] == 0
        (found,) = (await observer.request(type="discover", capability=new))["agents"]
        assert (found["name"], found["description"], found["max_tasks"]) == ("bob", "after", 2)


async def test_secret_still_holds_after_a_second_register(hub: str) -> None:
    async with clients(hub, 2) as (first, second):
        await first.register("ann")
        joined = await first.register("ann")
        again = await second.register("ann", agent_id=joined["agent_id"], resume=joined["resume"])
        assert again["agent_id"] == joined["agent_id"]
        assert await first.closed() == 4000


async def test_register_reply_lists_what_is_in_progress(hub: str) -> None:
    capability, other, ended = fresh("capability"), fresh("task"), fresh("task")
    async with clients(hub, 3) as (requester, worker, returned):
        await requester.register("requester")
        joined = await worker.register("worker", capability, max_tasks=2)
        held, queued = fresh("task"), fresh("task")
        for task in (ended, held):
            await requester.delegate(task, capability=capability)
        await worker.request(type="result", task_id=ended, success=True)
        for task in (other, queued):
            await requester.delegate(task, capability=capability)
        await lose(worker, seen_by=requester, name=capability)
        again = await returned.register(
            "worker", capability, max_tasks=2, agent_id=joined["agent_id"], resume=joined["resume"]
        )
        assert again["tasks"] == [{"task_id": held, "attempt": 1}, {"task_id": other, "attempt": 1}]
        await returned.nothing_else()
        assert (await returned.request(type="result", task_id=held, success=True, attempt=1))["state"] == "completed"
        assert (await returned.message("delegate"))["task_id"] == queued
        assert (await requester.message("result", task_id=held))["state"] == "completed"


async def test_agent_in_its_grace_time_keeps_its_place_and_its_tasks(hub: str) -> None:
    capability, running = fresh("capability"), fresh("task")
    async with clients(hub, 3) as (requester, worker, returned):
        await requester.register("requester")
        joined = await worker.register("worker", capability)
        await requester.delegate(running, capability=capability)
        await lose(worker, seen_by=requester, name=capability)
        assert await state_of(requester, running) == "in_progress"
        for target in ({"agent_id": joined["agent_id"]}, {"capability": capability}):
            sent = fresh("task")
            assert (await requester.delegate(sent, **target))["state"] in ("pending", "in_progress")
        again = await returned.register("worker", capability, agent_id=joined["agent_id"], resume=joined["resume"])
        assert {"task_id": running, "attempt": 1} in again["tasks"]
        assert (await returned.message("delegate", task_id=sent))["attempt"] == 1


async def test_after_the_grace_time_a_task_fails_with_agent_lost(hasty_hub: str) -> None:
    async with pair(hasty_hub) as (requester, worker, capability, task):
        await requester.delegate(task, capability=capability)
        await worker.connection.close()
        result = await requester.message("result", task_id=task)
        assert (result["success"], result["state"], result["error"]["code"]) == (False, "failed", "agent_lost")
        assert (await requester.delegate(fresh("task"), capability=capability))["code"] == "no_agent"


async def test_delegate_to_an_agent_that_is_gone_is_unknown_agent(hasty_hub: str) -> None:
    capability, task = fresh("capability"), fresh("task")
    async with clients(hasty_hub, 2) as (requester, worker):
        await requester.register("requester")
        agent_id = (await worker.register("worker", capability))["agent_id"]
        await requester.delegate(task, agent_id=agent_id)
        await worker.connection.close()
        await requester.message("result", task_id=task)
        assert (await requester.delegate(fresh("task"), agent_id=agent_id))["code"] == "unknown_agent"


async def test_after_the_grace_time_a_task_is_retried_at_another_agent(hasty_hub: str) -> None:
    capability, task = fresh("capability"), fresh("task")
    async with clients(hasty_hub, 3) as (requester, first, second):
        await requester.register("requester")
        await first.register("first", capability)
        await requester.delegate(task, capability=capability, max_retries=1, ttl=100)
        await first.message("delegate", task_id=task, attempt=1)
        await second.register("second", capability)
        await first.connection.close()
        handed = await second.message("delegate", task_id=task)
        assert handed["attempt"] == 2
        assert handed["ttl"] <= 99.9
        assert (await requester.message("status", task_id=task))["attempt"] == 2
        await second.connection.close()
        result = await requester.message("result", task_id=task)
        assert (result["error"]["code"], result["attempt"]) == ("agent_lost", 2)
        await requester.nothing_else()


async def test_explicit_agent_gets_its_task_again_when_it_is_back(hasty_hub: str) -> None:
    capability, task = fresh("capability"), fresh("task")
    async with clients(hasty_hub, 4) as (requester, worker, other, returned):
        await requester.register("requester")
        await other.register("other", capability)
        joined = await worker.register("worker", capability)
        identity = {"agent_id": joined["agent_id"], "resume": joined["resume"]}
        await requester.delegate(task, agent_id=joined["agent_id"], capability=capability, max_retries=1)
        await worker.message("delegate", task_id=task, attempt=1)
        await worker.connection.close()
        await until_state(requester, task, "pending")
        again = await returned.register("worker", capability, **identity)
        assert (again["agent_id"], again["tasks"]) == (joined["agent_id"], [])
        assert (await returned.message("delegate", task_id=task))["attempt"] == 2
        stale = await returned.request(type="result", task_id=task, success=True, attempt=1)
        assert (stale["code"], stale["task_id"]) == ("stale_attempt", task)
        assert (await returned.request(type="result", task_id=task, success=True, attempt=2))["state"] == "completed"
        assert (await requester.message("result", task_id=task))["attempt"] == 2
        await other.nothing_else()


async def test_result_of_a_lost_agent_for_an_older_attempt_is_refused(hasty_hub: str) -> None:
    capability, task = fresh("capability"), fresh("task")
    async with clients(hasty_hub, 4) as (requester, first, second, returned):
        await requester.register("requester")
        joined = await first.register("first", capability)
        await requester.delegate(task, capability=capability, max_retries=1)
        await second.register("second", capability)
        await first.connection.close()
        await second.message("delegate", task_id=task, attempt=2)
        await returned.register("first", capability, agent_id=joined["agent_id"], resume=joined["resume"])
        assert (await returned.request(type="result", task_id=task, success=True, attempt=1))["code"] == "stale_attempt"
        assert (await returned.request(type="result", task_id=task, success=True, attempt=2))["code"] == "not_assigned"
        assert (await returned.request(type="result", task_id=task, success=True))["code"] == "not_assigned"
        assert await state_of(requester, task) == "in_progress"


async def test_deregister_replies_closes_and_gives_the_tasks_up_at_once(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, task):
        await requester.delegate(task, capability=capability)
        assert (await worker.request(type="deregister"))["type"] == "deregister"
        assert await worker.closed() == 1000
        result = await requester.message("result", task_id=task)
        assert (result["state"], result["error"]["code"]) == ("failed", "agent_lost")
        assert (await requester.request(type="discover", capability=capability))["total"] == 0
        assert (await requester.delegate(fresh("task"), capability=capability))["code"] == "no_agent"


async def test_task_of_an_agent_that_left_is_retried(hub: str) -> None:
    capability, task = fresh("capability"), fresh("task")
    async with clients(hub, 3) as (requester, first, second):
        await requester.register("requester")
        await first.register("first", capability)
        await requester.delegate(task, capability=capability, max_retries=1)
        await second.register("second", capability)
        await first.request(type="deregister")
        assert (await second.message("delegate", task_id=task))["attempt"] == 2


async def test_retry_waits_for_an_agent_that_can(hub: str) -> None:
    capability, task = fresh("capability"), fresh("task")
    async with clients(hub, 3) as (requester, first, second):
        await requester.register("requester")
        await first.register("first", capability)
        await requester.delegate(task, capability=capability, max_retries=1)
        await first.request(type="deregister")
        assert await state_of(requester, task) == "pending"
        await second.register("second", capability)
        assert (await second.message("delegate", task_id=task))["attempt"] == 2


async def test_agent_that_left_has_no_identity_to_come_back_to(hub: str) -> None:
    async with clients(hub, 2) as (first, second):
        joined = await first.register("ann")
        await first.request(type="deregister")
        again = await second.register("ann", agent_id=joined["agent_id"], resume=joined["resume"])
        assert again["agent_id"] != joined["agent_id"]


async def test_draining_agent_gets_no_new_task_and_leaves_after_its_last_one(hub: str) -> None:
    async with pair(hub, max_tasks=2) as (requester, worker, capability, task):
        other, late = fresh("task"), fresh("task")
        await requester.delegate(task, capability=capability)
        await requester.delegate(other, capability=capability)
        await worker.send(type="deregister", drain=True, id="drain")
        await worker.request(type="status")
        await requester.delegate(late, capability=capability, wait=True)
        await worker.request(type="result", task_id=task, success=True)
        await worker.request(type="status", task_id=other, progress=0.5)
        assert not [message for message in worker.seen if message.get("reply_to") == "drain"]
        await worker.request(type="result", task_id=other, success=True)
        reply = await worker.until(lambda message: message.get("reply_to") == "drain")
        assert reply["type"] == "deregister"
        assert await worker.closed() == 1000
        assert not [message for message in worker.seen if message.get("task_id") == late]
        assert (await requester.message("result", task_id=other))["state"] == "completed"


async def test_draining_agent_leaves_when_its_last_task_is_cancelled(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, task):
        await requester.delegate(task, capability=capability)
        await worker.send(type="deregister", drain=True, id="drain")
        await worker.request(type="status")
        await requester.request(type="result", task_id=task, success=False)
        await worker.until(lambda message: message.get("reply_to") == "drain")
        assert await worker.closed() == 1000


async def test_draining_agent_is_answered_before_it_leaves(hub: str) -> None:
    async with raw_client(hub) as agent:
        agent_id = (await agent.register("agent"))["agent_id"]
        parent, child = fresh("task"), fresh("task")
        await agent.delegate(parent, agent_id=agent_id)
        await agent.delegate(child, agent_id=agent_id, parent_id=parent)
        await agent.send(type="deregister", drain=True, id="drain")
        await agent.send(type="result", task_id=parent, success=True, id="result")
        assert await replies_until_closed(agent) == {"drain", "result"}


async def test_every_deregister_is_answered(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, task):
        await requester.delegate(task, capability=capability)
        await worker.send(type="deregister", drain=True, id="first")
        await worker.send(type="deregister", drain=True, id="second")
        await worker.send(type="result", task_id=task, success=True)
        assert await replies_until_closed(worker) == {"first", "second"}


async def replies_until_closed(client: RawClient) -> set[str]:
    """Read a connection until it closes; return the ids of all replies."""
    replies: set[str] = set()
    with contextlib.suppress(ConnectionClosed):
        while True:
            message = await client.receive()
            if "reply_to" in message:
                replies.add(message["reply_to"])
    return replies


async def test_agent_that_leaves_is_not_handed_what_it_gives_up(hub: str) -> None:
    async with pair(hub, max_tasks=1) as (requester, worker, capability, task):
        queued = fresh("task")
        await requester.delegate(task, capability=capability, max_retries=3)
        await requester.delegate(queued, capability=capability, ttl=100)
        await worker.message("delegate", task_id=task)
        await worker.send(type="deregister", id="bye")
        assert (await worker.receive())["reply_to"] == "bye"
        assert await worker.closed() == 1000
        assert await state_of(requester, task) == "pending"


async def test_idle_agent_that_drains_leaves_at_once(hub: str) -> None:
    async with pair(hub) as (_, worker, _, _):
        assert (await worker.request(type="deregister", drain=True))["type"] == "deregister"
        assert await worker.closed() == 1000


# Discovery


async def test_discover_ranks_from_the_exact_name_to_a_word_of_a_description(own_hub: str) -> None:
    agents = [
        ("z-exact", ["test"], ""),
        ("y-word", ["unit-test"], ""),
        ("x-prefix", ["test-runner"], ""),
        ("b-inside", ["latest-news"], ""),
        ("a-description", ["other"], "Runs a test or two"),
        ("not-found", ["other"], "The latest and greatest"),
    ]
    async with clients(own_hub, len(agents) + 1) as (observer, *connections):
        for client, (name, capabilities, description) in zip(connections, agents, strict=True):
            await client.register(name, *capabilities, description=description)
        for keyword in ("test", "TEST", "Test"):
            found = await names_found(observer, keyword)
            assert found[0] == "z-exact"
            assert found[1:3] == ["x-prefix", "y-word"]  # Equal otherwise, so by name.
            assert found[3:] == ["b-inside", "a-description"]


async def test_discover_finds_capabilities_and_descriptions_in_any_case(own_hub: str) -> None:
    async with clients(own_hub, 5) as (observer, loud, described, inside, under):
        await loud.register("loud", "Code-Review")
        await described.register("a-described", {"name": "other", "description": "Does a CODE thing"})
        await inside.register("b-inside", "decoder")
        await under.register("under", "byte_code")
        assert await names_found(observer, "code") == ["loud", "under", "b-inside", "a-described"]
        assert await names_found(observer, "CODE-review") == ["loud"]
        assert await names_found(observer, "review") == ["loud"]
        assert await names_found(observer, "nothing of the kind") == []


async def test_equal_matches_are_ranked_by_load_then_by_name(hub: str) -> None:
    capability = fresh("capability")
    async with clients(hub, 4) as (requester, *workers):
        await requester.register("requester")
        ids = [
            (await worker.register(name, capability))["agent_id"]
            for worker, name in zip(workers, ("carl", "anna", "bert"), strict=True)
        ]
        assert await names_found(requester, capability) == ["anna", "bert", "carl"]
        await requester.delegate(fresh("task"), agent_id=ids[1])
        assert await names_found(requester, capability) == ["bert", "carl", "anna"]
        reply = await requester.request(type="discover", capability=capability)
        assert [agent["running"] for agent in reply["agents"]] == [0, 0, 1]


async def test_discover_with_a_limit_still_tells_the_total(hub: str) -> None:
    capability = fresh("capability")
    async with clients(hub, 4) as (observer, *agents):
        for name, agent in zip("abc", agents, strict=True):
            await agent.register(name, capability)
        reply = await observer.request(type="discover", capability=capability, limit=2)
        assert ([agent["name"] for agent in reply["agents"]], reply["total"]) == (["a", "b"], 3)


async def test_empty_keyword_lists_all_agents_and_no_observers(own_hub: str) -> None:
    async with clients(own_hub, 4) as (observer, first, second, _):
        await first.register("first", "a")
        await second.register("second")
        for fields in ({}, {"capability": ""}):
            reply = await observer.request(type="discover", **fields)
            assert ([agent["name"] for agent in reply["agents"]], reply["total"]) == (["first", "second"], 2)


# Delegation


async def test_task_goes_to_a_worker_and_its_result_back(hub: str) -> None:
    capability, task = fresh("capability"), fresh("task")
    async with clients(hub, 2) as (requester, worker):
        requester_id = (await requester.register("requester"))["agent_id"]
        worker_id = (await worker.register("worker", capability))["agent_id"]
        accepted = await requester.delegate(task, capability=capability, input=[1], ttl=50, priority=3)
        assert (accepted["type"], accepted["task_id"], accepted["state"]) == ("status", task, "in_progress")
        handed = await worker.message("delegate")
        assert (handed["task_id"], handed["input"], handed["attempt"]) == (task, [1], 1)
        assert (handed["sender"], handed["capability"]) == (requester_id, capability)
        assert 49 < handed["ttl"] <= 50
        settled = await worker.request(type="result", task_id=task, success=True, output={"a": 1}, attempt=1)
        assert (settled["type"], settled["task_id"], settled["state"]) == ("status", task, "completed")
        result = await requester.message("result")
        assert (result["task_id"], result["success"], result["state"]) == (task, True, "completed")
        assert (result["output"], result["error"], result["sender"]) == ({"a": 1}, None, worker_id)
        await requester.nothing_else()
        await worker.nothing_else()


async def test_remaining_seconds_are_never_more_than_were_asked_for(hub: str) -> None:
    async with pair(hub, max_tasks=50) as (requester, worker, capability, _):
        for ttl in [0.5, 1, 604800] * 10:
            task = fresh("task")
            await requester.delegate(task, capability=capability, ttl=ttl)
            assert (await worker.message("delegate", task_id=task))["ttl"] <= ttl
            await worker.request(type="result", task_id=task, success=True)


async def test_failed_result_carries_its_error(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, _):
        for sent, expected in (
            (
                {"code": "invalid_input", "message": "no such file"},
                {"code": "invalid_input", "message": "no such file"},
            ),
            ("it broke", {"code": "failed", "message": "it broke"}),
        ):
            task = fresh("task")
            await requester.delegate(task, capability=capability)
            reply = await worker.request(type="result", task_id=task, success=False, error=sent)
            assert reply["state"] == "failed"
            result = await requester.message("result", task_id=task)
            assert (result["success"], result["state"], result["error"]) == (False, "failed", expected)


async def test_failed_result_without_an_error_is_a_failure_all_the_same(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, task):
        await requester.delegate(task, capability=capability)
        await worker.request(type="result", task_id=task, success=False)
        result = await requester.message("result", task_id=task)
        assert (result["success"], result["state"], result["error"]["code"]) == (False, "failed", "failed")


async def test_delegate_by_agent_by_capability_or_by_both(hub: str) -> None:
    one, both = fresh("capability"), fresh("capability")
    async with clients(hub, 3) as (requester, first, second):
        await requester.register("requester")
        first_id = (await first.register("first", one, both))["agent_id"]
        second_id = (await second.register("second", both))["agent_id"]
        for worker, target in (
            (first, {"capability": one}),
            (first, {"agent_id": first_id}),
            (first, {"agent_id": first_id, "capability": both}),
            (second, {"agent_id": second_id, "capability": both}),
            (second, {"agent_id": second_id, "capability": None}),
        ):
            task = fresh("task")
            assert (await requester.delegate(task, **target))["state"] == "in_progress"
            await worker.message("delegate", task_id=task)
        refused = await requester.delegate(fresh("task"), agent_id=second_id, capability=one)
        assert refused["code"] == "no_agent"
        await first.nothing_else()
        await second.nothing_else()


async def test_nobody_there_is_told_at_once(hub: str) -> None:
    async with pair(hub) as (requester, _, capability, task):
        for code, target in (
            ("no_agent", {"capability": "nobody has this"}),
            ("no_agent", {"capability": capability.upper()}),
            ("unknown_agent", {"agent_id": "nobody"}),
            ("unknown_agent", {"agent_id": "nobody", "capability": capability}),
        ):
            refused = await requester.delegate(task, **target)
            assert (refused["code"], refused["task_id"]) == (code, task)


async def test_capability_alone_never_picks_the_requester(hub: str) -> None:
    capability, task = fresh("capability"), fresh("task")
    async with clients(hub, 2) as (requester, other):
        await requester.register("requester", capability)
        assert (await requester.delegate(task, capability=capability))["code"] == "no_agent"
        assert (await requester.delegate(task, capability=capability, wait=True))["state"] == "pending"
        await requester.nothing_else()
        await other.register("other", capability)
        await other.message("delegate", task_id=task)
        for _ in range(3):
            await requester.delegate(fresh("task"), capability=capability)
            await other.message("delegate")
        await requester.nothing_else()


async def test_waiting_task_goes_to_the_first_agent_that_comes(hub: str) -> None:
    capability, low, high = fresh("capability"), fresh("task"), fresh("task")
    async with clients(hub, 2) as (requester, worker):
        await requester.register("requester")
        assert (await requester.delegate(low, capability=capability, wait=True))["state"] == "pending"
        assert (await requester.delegate(high, capability=capability, wait=True, priority=1))["state"] == "pending"
        await worker.register("worker", capability, max_tasks=1)
        assert (await worker.message("delegate"))["task_id"] == high
        await worker.request(type="result", task_id=high, success=True)
        assert (await worker.message("delegate"))["task_id"] == low


async def test_waiting_task_with_both_targets_waits_for_the_capability(hub: str) -> None:
    capability, task = fresh("capability"), fresh("task")
    async with clients(hub, 2) as (requester, worker):
        await requester.register("requester")
        worker_id = (await worker.register("worker"))["agent_id"]
        reply = await requester.delegate(task, agent_id=worker_id, capability=capability, wait=True)
        assert reply["state"] == "pending"
        await worker.nothing_else()
        await worker.register("worker", capability)
        await worker.message("delegate", task_id=task)


async def test_waiting_task_ends_at_its_deadline(hub: str) -> None:
    async with raw_client(hub) as requester:
        await requester.register("requester")
        for target in ({"capability": fresh("capability")}, {"agent_id": fresh("nobody")}):
            task = fresh("task")
            began = time.monotonic()
            assert (await requester.delegate(task, ttl=0.2, wait=True, **target))["state"] == "pending"
            assert (await requester.message("result", task_id=task))["state"] == "timeout"
            assert time.monotonic() - began >= 0.19  # Timers are as exact as the loop's clock.


async def test_same_delegate_again_is_safe(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, task):
        content = {"capability": capability, "input": {"a": 1, "b": [2]}, "ttl": 100}
        await requester.delegate(task, **content)
        await worker.message("delegate", task_id=task)
        again = {"ttl": 100.0, "input": {"b": [2], "a": 1}, "capability": capability, "priority": 0, "wait": False}
        assert (await requester.delegate(task, **again))["state"] == "in_progress"
        await worker.nothing_else()
        await worker.request(type="result", task_id=task, success=True, output=5)
        await requester.message("result", task_id=task)
        assert (await requester.delegate(task, **content))["state"] == "completed"
        result = await requester.message("result", task_id=task)
        assert (result["state"], result["output"]) == ("completed", 5)
        await requester.nothing_else()
        await worker.nothing_else()


async def test_same_delegate_is_safe_when_its_agent_or_its_parent_has_gone(hub: str) -> None:
    capability, parent, child = fresh("capability"), fresh("task"), fresh("task")
    async with clients(hub, 3) as (requester, middle, worker):
        await requester.register("requester")
        middle_id = (await middle.register("middle"))["agent_id"]
        await worker.register("worker", capability)
        await requester.delegate(parent, agent_id=middle_id)
        await middle.delegate(child, capability=capability, parent_id=parent)
        await worker.request(type="result", task_id=child, success=True, output=5)
        await worker.request(type="deregister")
        await middle.request(type="result", task_id=parent, success=True)
        await middle.message("result", task_id=child)
        again = await middle.delegate(child, capability=capability, parent_id=parent)
        assert again.get("state") == "completed", again
        assert (await middle.message("result", task_id=child))["output"] == 5


async def test_other_content_with_the_same_id_is_a_duplicate(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, task):
        content = {"capability": capability, "input": {"a": 1}}
        await requester.delegate(task, **content)
        for change in (
            {"input": {"a": 2}},
            {"input": {"a": True}},
            {"input": None},
            {"ttl": 5},
            {"priority": 1},
            {"max_retries": 1},
            {"capability": "other"},
        ):
            refused = await requester.delegate(task, **content | change)
            assert (refused.get("code"), refused["task_id"]) == ("duplicate_task", task), change
        assert (await worker.delegate(task, **content))["code"] == "duplicate_task"
        await worker.request(type="result", task_id=task, success=True)
        await requester.message("result", task_id=task)
        assert (await requester.delegate(task, **content | {"input": 2}))["code"] == "duplicate_task"
        await requester.nothing_else()


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ('{"a":1,"b":[2,null]}', ' { "b" : [ 2 , null ] , "a" : 1 } ', True),
        ('"\N{SNOWMAN}/"', '"\\u2603\\/"', True),
        ("null", None, True),
        ("1", "1.0", False),
        ("1", "true", False),
        ("1", "1e0", False),
        ("[0]", "[false]", False),
        ('{"a":null}', "{}", False),
        ("[1,2]", "[2,1]", False),
    ],
)
async def test_same_delegate_may_be_written_otherwise(
    codec_hub: str, one: str, other: str | None, is_same: bool
) -> None:
    async with pair(codec_hub) as (requester, worker, capability, task):
        fields = f'"task_id":"{task}","capability":"{capability}"'
        for number, text in enumerate((one, other, one)):
            given = "" if text is None else f', "input" : {text}'
            await requester.connection.send(f'{{"type":"delegate","id":"{number}",{fields}{given}}}')
            reply = await requester.receive()
            is_accepted = is_same or number != 1
            expected = ("in_progress", None) if is_accepted else (None, "duplicate_task")
            assert (reply.get("state"), reply.get("code")) == expected
        await worker.message("delegate", task_id=task)
        await worker.nothing_else()


async def test_same_delegate_is_safe_after_a_reconnect(hub: str) -> None:
    capability, task = fresh("capability"), fresh("task")
    async with clients(hub, 3) as (requester, worker, returned):
        joined = await requester.register("requester")
        await worker.register("worker", capability)
        await requester.delegate(task, capability=capability)
        await requester.connection.close()
        await returned.register("requester", agent_id=joined["agent_id"], resume=joined["resume"])
        assert (await returned.delegate(task, capability=capability))["state"] == "in_progress"
        await worker.message("delegate", task_id=task)
        await worker.nothing_else()


async def test_least_loaded_agent_is_picked(hub: str) -> None:
    capability = fresh("capability")
    async with clients(hub, 4) as (requester, *workers):
        await requester.register("requester")
        ids = [(await worker.register("worker", capability))["agent_id"] for worker in workers]
        for worker_id, load in zip(ids, (2, 0, 1), strict=True):
            for _ in range(load):
                await requester.delegate(fresh("task"), agent_id=worker_id)
        task = fresh("task")
        await requester.delegate(task, capability=capability)
        await workers[1].message("delegate", task_id=task)
        for _ in range(4):
            await requester.delegate(fresh("task"), capability=capability)
        reply = await requester.request(type="discover", capability=capability)
        assert [agent["running"] for agent in reply["agents"]] == [2, 3, 3]


async def test_full_agent_gets_the_rest_by_priority_then_by_arrival(hub: str) -> None:
    capability, second = fresh("capability"), fresh("capability")
    async with clients(hub, 2) as (requester, worker):
        await requester.register("requester")
        worker_id = (await worker.register("worker", capability, second, max_tasks=1))["agent_id"]
        held = fresh("held")
        assert (await requester.delegate(held, capability=capability))["state"] == "in_progress"
        queued = [
            ("fourth", 0, {"capability": capability}),
            ("fifth", 0, {"agent_id": worker_id}),
            ("sixth", 0, {"capability": second}),
            ("last", -100, {"agent_id": worker_id}),
            ("second", 5, {"agent_id": worker_id}),
            ("third", 5, {"capability": second}),
            ("first", 100, {"capability": capability}),
        ]
        tail = fresh("-")
        for name, priority, target in queued:
            assert (await requester.delegate(name + tail, priority=priority, **target))["state"] == "pending"
        await worker.message("delegate", task_id=held)
        order, current = [], held
        for _ in queued:
            await worker.nothing_else()  # One at a time.
            await worker.request(type="result", task_id=current, success=True)
            current = (await worker.message("delegate"))["task_id"]
            order.append(current.removesuffix(tail))
        assert order == ["first", "second", "third", "fourth", "fifth", "sixth", "last"]


async def test_waiting_tasks_go_out_when_an_agent_may_hold_more(hub: str) -> None:
    async with pair(hub, max_tasks=1) as (requester, worker, capability, task):
        others = [fresh("task") for _ in range(3)]
        for each in (task, *others):
            await requester.delegate(each, capability=capability)
        await worker.register("worker", capability, max_tasks=3)
        for each in (task, *others[:2]):
            await worker.message("delegate", task_id=each)
        await worker.nothing_else()


async def test_waiting_tasks_go_to_another_agent_that_comes(hub: str) -> None:
    capability, held, waiting = fresh("capability"), fresh("task"), fresh("task")
    async with clients(hub, 3) as (requester, first, second):
        await requester.register("requester")
        await first.register("first", capability, max_tasks=1)
        await requester.delegate(held, capability=capability)
        assert (await requester.delegate(waiting, capability=capability))["state"] == "pending"
        await second.register("second", capability)
        assert (await second.message("delegate", task_id=waiting))["attempt"] == 1


# Outcomes


async def test_expired_task_tells_its_requester_and_its_worker_once(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, task):
        began = time.monotonic()
        await requester.delegate(task, capability=capability, ttl=0.3)
        result = await requester.message("result", task_id=task)
        assert time.monotonic() - began >= 0.3
        assert (result["success"], result["state"], result["error"]["code"]) == (False, "timeout", "timeout")
        await worker.message("delegate", task_id=task)
        assert (await worker.message("status", task_id=task))["state"] == "timeout"
        assert (await worker.request(type="result", task_id=task, success=True))["code"] == "task_over"
        await requester.nothing_else()
        await worker.nothing_else()
        assert await state_of(requester, task) == "timeout"


async def test_expired_task_frees_its_agent_for_the_next(hub: str) -> None:
    async with pair(hub, max_tasks=1) as (requester, worker, capability, task):
        following = fresh("task")
        await requester.delegate(task, capability=capability, ttl=0.1)
        await requester.delegate(following, capability=capability)
        assert (await worker.message("delegate", task_id=following))["attempt"] == 1


async def test_time_to_live_covers_the_waiting(hub: str) -> None:
    async with pair(hub, max_tasks=1) as (requester, worker, capability, held):
        expiring, late = fresh("task"), fresh("task")
        await requester.delegate(held, capability=capability)
        await requester.delegate(expiring, capability=capability, ttl=0.2)
        await requester.delegate(late, capability=capability, ttl=100)
        assert (await requester.message("result"))["task_id"] == expiring
        await worker.request(type="result", task_id=held, success=True)
        handed = await worker.message("delegate", task_id=late)
        assert handed["ttl"] < 99.99
        assert not [message for message in worker.seen if message.get("task_id") == expiring]


async def test_earlier_deadline_is_kept_when_it_comes_later(hub: str) -> None:
    async with pair(hub) as (requester, _, capability, _):
        tasks = [fresh("task") for _ in range(3)]
        for task, ttl in zip(tasks, (50, 0.4, 0.2), strict=True):
            await requester.delegate(task, capability=capability, ttl=ttl)
        assert (await requester.message("result"))["task_id"] == tasks[2]
        assert (await requester.message("result"))["task_id"] == tasks[1]


async def test_time_to_live_runs_while_the_agent_is_away(hub: str) -> None:
    capability, task = fresh("capability"), fresh("task")
    async with clients(hub, 3) as (requester, worker, returned):
        await requester.register("requester")
        joined = await worker.register("worker", capability)
        await requester.delegate(task, capability=capability, ttl=0.3, max_retries=5)
        await worker.connection.close()
        assert (await requester.message("result", task_id=task))["state"] == "timeout"
        again = await returned.register("worker", capability, agent_id=joined["agent_id"], resume=joined["resume"])
        assert again["tasks"] == []


async def test_requester_cancels_its_task(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, task):
        await requester.delegate(task, capability=capability)
        await worker.message("delegate", task_id=task)
        reply = await requester.request(type="result", task_id=task, success=False)
        assert (reply["type"], reply["state"]) == ("status", "failed")
        assert (await worker.message("status", task_id=task))["state"] == "failed"
        result = await requester.message("result", task_id=task)
        assert (result["success"], result["state"], result["error"]["code"]) == (False, "failed", "cancelled")
        assert (await worker.request(type="result", task_id=task, success=True))["code"] == "task_over"
        assert (await requester.request(type="result", task_id=task, success=False))["code"] == "task_over"
        await requester.nothing_else()
        await worker.nothing_else()


async def test_cancelled_task_never_leaves_the_queue(hub: str) -> None:
    async with pair(hub, max_tasks=1) as (requester, worker, capability, held):
        queued = fresh("task")
        await requester.delegate(held, capability=capability)
        await requester.delegate(queued, capability=capability)
        assert (await requester.request(type="result", task_id=queued, success=False))["state"] == "failed"
        assert (await requester.message("result", task_id=queued))["error"]["code"] == "cancelled"
        await worker.message("delegate", task_id=held)
        await worker.request(type="result", task_id=held, success=True)
        await worker.nothing_else()


async def test_nobody_but_assignee_and_requester_settles_a_task(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, task), raw_client(hub) as stranger:
        await stranger.register("stranger", capability)
        await requester.delegate(task, capability=capability, max_retries=3)
        holder, other = (worker, stranger) if await holds(worker, task) else (stranger, worker)
        for fields in ({"success": True}, {"success": False}, {"success": True, "attempt": 1}):
            refused = await other.request(type="result", task_id=task, **fields)
            assert (refused["code"], refused["task_id"]) == ("not_assigned", task)
        assert (await requester.request(type="result", task_id=task, success=True))["code"] == "not_assigned"
        assert (await other.request(type="status", task_id=task, progress=0.1))["code"] == "not_assigned"
        assert (await requester.request(type="status", task_id=task, progress=0.1))["code"] == "not_assigned"
        assert (await holder.request(type="result", task_id=task, success=True))["state"] == "completed"
        assert (await requester.message("result"))["state"] == "completed"


async def holds(client: RawClient, task_id: str) -> bool:
    """Return whether the hub has delivered this task to this client."""
    await client.request(type="status")
    return any(message["type"] == "delegate" and message["task_id"] == task_id for message in client.seen)


async def test_result_for_an_attempt_that_never_was_is_refused(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, task):
        await requester.delegate(task, capability=capability)
        assert (await worker.request(type="result", task_id=task, success=True, attempt=2))["type"] == "error"
        assert await state_of(requester, task) == "in_progress"


async def test_result_for_a_pending_task_is_refused(hub: str) -> None:
    async with pair(hub, max_tasks=1) as (requester, worker, capability, held):
        queued = fresh("task")
        await requester.delegate(held, capability=capability)
        await requester.delegate(queued, capability=capability)
        assert (await worker.request(type="result", task_id=queued, success=True))["code"] == "not_assigned"
        assert await state_of(requester, queued) == "pending"


async def test_final_state_never_changes(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, task), raw_client(hub) as stranger:
        await stranger.register("stranger")
        await requester.delegate(task, capability=capability)
        await worker.request(type="result", task_id=task, success=True, output=1)
        for client in (worker, requester, stranger):
            reply = await client.request(type="result", task_id=task, success=False, attempt=1)
            assert (
                reply["code"] in ("task_over", "not_assigned") if client is stranger else reply["code"] == "task_over"
            )
        assert (await worker.request(type="status", task_id=task, progress=1))["code"] == "task_over"
        await requester.message("result", task_id=task)
        await requester.nothing_else()
        fetched = await requester.request(type="status", task_id=task)
        assert (fetched["state"], fetched["output"]) == ("completed", 1)


async def test_task_that_the_hub_does_not_know_is_unknown(hub: str) -> None:
    async with raw_client(hub) as client:
        await client.register("curious")
        for message in (
            {"type": "status"},
            {"type": "status", "progress": 0.5},
            {"type": "result", "success": True},
            {"type": "result", "success": False},
        ):
            reply = await client.request(task_id="nobody-knows", **message)
            assert (reply["code"], reply["task_id"]) == ("unknown_task", "nobody-knows")


async def test_progress_is_passed_on_with_sender_and_seq(hub: str) -> None:
    capability, task, other = fresh("capability"), fresh("task"), fresh("task")
    async with clients(hub, 2) as (requester, worker):
        await requester.register("requester")
        worker_id = (await worker.register("worker", capability))["agent_id"]
        await requester.delegate(task, capability=capability)
        await requester.delegate(other, capability=capability)
        reports = [
            {"progress": 0},
            {"progress": 1},
            {"detail": {"piece": "of output"}},
            {"progress": None, "detail": 5},
        ]
        for number, report in enumerate(reports, start=1):
            assert (await worker.request(type="status", task_id=task, **report))["type"] == "status"
            passed_on = await requester.message("status", task_id=task)
            assert (passed_on["sender"], passed_on["seq"]) == (worker_id, number)
            assert {name: passed_on.get(name) for name in report} == report
        await worker.request(type="status", task_id=other, progress=0.25)
        assert (await requester.message("status", task_id=other))["seq"] == 1
        await requester.nothing_else()


async def test_seq_goes_on_over_attempts(hub: str) -> None:
    capability, task = fresh("capability"), fresh("task")
    async with clients(hub, 3) as (requester, first, second):
        await requester.register("requester")
        await first.register("first", capability)
        await requester.delegate(task, capability=capability, max_retries=1)
        await first.request(type="status", task_id=task, progress=0.5)
        await second.register("second", capability)
        await first.request(type="deregister")
        await second.message("delegate", task_id=task)
        await second.request(type="status", task_id=task, progress=0.1)
        assert [(await requester.message("status", task_id=task))["seq"] for _ in range(2)] == [1, 2]


async def test_input_and_output_are_shown_to_requester_and_assignee_only(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, task), clients(hub, 2) as (stranger, observer):
        await stranger.register("stranger")
        await requester.delegate(task, capability=capability, input="top-in", ttl=100)
        await worker.request(type="status", task_id=task, progress=0.5, detail="top-detail")
        for state in ("in_progress", "completed"):
            for client in (requester, worker):
                fetched = await client.request(type="status", task_id=task)
                assert (fetched["state"], fetched["input"]) == (state, "top-in")
                assert fetched.get("output") == ("top-out" if state == "completed" else None)
            for client in (stranger, observer):
                fetched = await client.request(type="status", task_id=task)
                assert fetched["state"] == state
                assert "top-" not in json.dumps(fetched)
                assert "top-" not in json.dumps(await client.request(type="status", tasks=True))
            if state == "in_progress":
                await worker.request(type="result", task_id=task, success=True, output="top-out")


async def test_results_wait_for_a_requester_who_is_away(hub: str) -> None:
    capability, done, expired = fresh("capability"), fresh("task"), fresh("task")
    async with clients(hub, 4) as (requester, worker, returned, once_more):
        joined = await requester.register("requester", fresh("name"))
        identity = {"agent_id": joined["agent_id"], "resume": joined["resume"]}
        await worker.register("worker", capability)
        await requester.delegate(done, capability=capability)
        await requester.delegate(expired, capability=capability, ttl=0.2)
        await requester.connection.close()
        await worker.request(type="result", task_id=done, success=True, output=5)
        await worker.message("status", task_id=expired)
        await returned.register("requester", **identity)
        assert (await returned.message("result", task_id=done))["output"] == 5
        assert (await returned.message("result", task_id=expired))["state"] == "timeout"
        await returned.nothing_else()
        await returned.connection.close()
        await once_more.register("requester", **identity)
        await once_more.nothing_else()


async def test_task_outlives_the_grace_time_of_its_requester(hasty_hub: str) -> None:
    capability, task = fresh("capability"), fresh("task")
    async with clients(hasty_hub, 3) as (requester, worker, returned):
        joined = await requester.register("requester")
        await worker.register("worker", capability)
        await requester.delegate(task, capability=capability)
        await requester.connection.close()
        await asyncio.sleep(0.4)  # Longer than the grace period.
        assert (await worker.request(type="result", task_id=task, success=True))["state"] == "completed"
        await returned.register("requester", agent_id=joined["agent_id"], resume=joined["resume"])
        assert (await returned.message("result", task_id=task))["state"] == "completed"


async def test_ended_task_is_forgotten_after_its_retention() -> None:
    with hub_process("--retention", "0.3") as (url, _):
        async with pair(url) as (requester, worker, capability, task):
            open_task = fresh("task")
            await requester.delegate(open_task, capability=capability)
            await requester.delegate(task, capability=capability)
            began = time.monotonic()
            await worker.request(type="result", task_id=task, success=True)
            async with asyncio.timeout(2 * WAIT_S):  # The reaper may take 30 seconds.
                while (await requester.request(type="status", task_id=task)).get("code") != "unknown_task":
                    await asyncio.sleep(0.05)
            assert time.monotonic() - began >= 0.3
            assert await state_of(requester, open_task) == "in_progress"
            assert (await requester.delegate(task, capability=capability, input="other"))["state"] == "in_progress"


# Subtasks


async def test_child_needs_a_parent_that_its_sender_works_on(hub: str) -> None:
    capability, parent = fresh("capability"), fresh("task")
    async with clients(hub, 3) as (requester, middle, worker):
        await requester.register("requester")
        middle_id = (await middle.register("middle"))["agent_id"]
        await worker.register("worker", capability)
        await requester.delegate(parent, agent_id=middle_id)
        for client, parent_id in ((requester, parent), (worker, parent), (middle, "unknown"), (middle, "x")):
            refused = await client.delegate("x" + fresh("task"), agent_id=middle_id, parent_id=parent_id)
            assert refused["code"] == "not_assigned"
        assert (await middle.delegate(fresh("task"), capability=capability, parent_id=parent))["state"] == "in_progress"
        await middle.request(type="result", task_id=parent, success=True)
        refused = await middle.delegate(fresh("task"), capability=capability, parent_id=parent)
        assert refused["code"] == "not_assigned"


@contextlib.asynccontextmanager
async def family(url: str, parent_ttl: float = 300) -> AsyncIterator[tuple[RawClient, RawClient, RawClient, list[str]]]:
    """Start a task, its subtask and a subtask of that; yield the first requester, the middle agent, and the worker."""
    async with clients(url, 3) as (requester, middle, worker):
        await requester.register("requester")
        middle_id = (await middle.register("middle"))["agent_id"]
        worker_id = (await worker.register("worker"))["agent_id"]
        tasks = [fresh("parent"), fresh("child"), fresh("grandchild")]
        await requester.delegate(tasks[0], agent_id=middle_id, ttl=parent_ttl)
        await middle.delegate(tasks[1], agent_id=worker_id, parent_id=tasks[0], ttl=3600)
        await worker.delegate(tasks[2], agent_id=middle_id, parent_id=tasks[1])
        yield requester, middle, worker, tasks


async def test_child_gets_no_more_time_than_its_parent_has(hub: str) -> None:
    async with family(hub, 50) as (_, middle, worker, (_, child, grandchild)):
        child_ttl = (await worker.message("delegate", task_id=child))["ttl"]
        grandchild_ttl = (await middle.message("delegate", task_id=grandchild))["ttl"]
        assert 49 < grandchild_ttl <= child_ttl <= 50 + 1e-9  # A deadline minus now is rounded.


async def test_children_end_when_their_parent_expires(hub: str) -> None:
    async with family(hub, 0.3) as (requester, middle, worker, (parent, child, grandchild)):
        assert (await requester.message("result", task_id=parent))["state"] == "timeout"
        assert (await middle.message("status", task_id=parent))["state"] == "timeout"
        assert (await middle.message("result", task_id=child))["success"] is False
        assert (await worker.message("status", task_id=child))["state"] in ("timeout", "failed")
        assert (await worker.message("result", task_id=grandchild))["success"] is False
        assert (await middle.message("status", task_id=grandchild))["state"] in ("timeout", "failed")


@pytest.mark.parametrize("how", ["completed", "failed", "cancelled", "deregistered", "lost"])
async def test_children_end_when_their_parent_ends(hub: str, hasty_hub: str, how: str) -> None:
    async with family(hasty_hub if how == "lost" else hub) as (requester, middle, worker, (parent, child, grandchild)):
        await worker.message("delegate", task_id=child)
        if how == "cancelled":
            await requester.request(type="result", task_id=parent, success=False)
        elif how == "deregistered":
            await middle.request(type="deregister")
        elif how == "lost":
            await middle.connection.close()
        else:
            await middle.request(type="result", task_id=parent, success=how == "completed")
        await requester.message("result", task_id=parent)
        assert (await worker.message("status", task_id=child))["state"] in ("failed", "timeout")
        assert (await worker.message("result", task_id=grandchild))["success"] is False
        if how not in ("deregistered", "lost"):
            assert (await middle.message("result", task_id=child))["success"] is False
            assert (await middle.message("status", task_id=grandchild))["state"] in ("failed", "timeout")
        for task in (child, grandchild):
            assert await state_of(requester, task) in ("failed", "timeout")
        await requester.nothing_else()
        await worker.nothing_else()


async def test_chain_is_at_most_16_deep(hub: str) -> None:
    async with clients(hub, 2) as (first, second):
        first_id = (await first.register("first"))["agent_id"]
        second_id = (await second.register("second"))["agent_id"]
        sides = itertools.cycle([(first, second_id), (second, first_id)])
        parent = None
        for _ in range(16):
            (sender, target), task = next(sides), fresh("task")
            reply = await sender.delegate(task, agent_id=target, parent_id=parent)
            assert reply.get("state") == "in_progress", reply
            parent = task
        (sender, target), task = next(sides), fresh("task")
        refused = await sender.delegate(task, agent_id=target, parent_id=parent)
        assert (refused.get("code"), refused["task_id"]) == ("too_deep", task)


# Broadcasts, the hub's status, observers


async def test_broadcast_reaches_all_other_agents(own_hub: str) -> None:
    async with clients(own_hub, 5) as (sender, first, second, lost, observer):
        sender_id = (await sender.register("sender"))["agent_id"]
        await first.register("first")
        await second.register("second", "something")
        await lost.register("lost", "gone")
        await lose(lost, seen_by=observer, name="gone")
        reply = await sender.request(type="broadcast", message={"deploy": "v2"})
        assert (reply["type"], reply["recipients"]) == ("broadcast", 2)
        for client in (first, second):
            message = await client.message("broadcast")
            assert (message["sender"], message["message"]) == (sender_id, {"deploy": "v2"})
        for client in (sender, observer):
            await client.nothing_else()


async def test_broadcast_with_a_capability_reaches_those_that_have_it(hub: str) -> None:
    capability = fresh("capability")
    async with clients(hub, 3) as (sender, has, has_not):
        await sender.register("sender", capability)
        await has.register("has", capability)
        await has_not.register("has-not", capability + "-more")
        reply = await sender.request(type="broadcast", message=None, capability=capability)
        assert reply["recipients"] == 1
        assert (await has.message("broadcast"))["message"] is None
        for client in (sender, has, has_not):
            await client.nothing_else()


async def test_hub_tells_its_status(own_hub: str) -> None:
    async with pair(own_hub, max_tasks=1) as (requester, worker, capability, _), raw_client(own_hub) as observer:
        status = (await observer.request(type="status"))["hub"]
        assert status["tasks"] == {"pending": 0, "in_progress": 0, "completed": 0, "failed": 0, "timeout": 0}
        assert status["agents"] == 2
        assert isinstance(status["version"], str)
        assert status["uptime_s"] >= 0
        tasks = [fresh("task") for _ in range(5)]
        for task, fields in zip(tasks, ({"ttl": 0.01}, {}, {}, {}, {}), strict=True):
            await requester.delegate(task, capability=capability, **fields)
        await requester.message("result", task_id=tasks[0])
        await worker.request(type="result", task_id=tasks[1], success=True)
        await worker.request(type="result", task_id=tasks[2], success=False)
        status = (await observer.request(type="status"))["hub"]
        assert status["tasks"] == {"pending": 1, "in_progress": 1, "completed": 1, "failed": 1, "timeout": 1}
        listed = (await observer.request(type="status", tasks=True))["tasks"]
        assert {task["task_id"]: task["state"] for task in listed} == dict(
            zip(tasks, ("timeout", "completed", "failed", "in_progress", "pending"), strict=True)
        )


async def test_connection_that_has_not_registered_may_only_look(own_hub: str) -> None:
    async with clients(own_hub, 2) as (observer, agent):
        await agent.register("agent", "something")
        await agent.delegate("task", capability="nobody", wait=True)
        assert (await observer.request(type="status"))["hub"]["agents"] == 1
        assert (await observer.request(type="status", task_id="task"))["state"] == "pending"
        assert len((await observer.request(type="status", tasks=True))["tasks"]) == 1
        assert (await observer.request(type="discover"))["total"] == 1
        for message in (
            {"type": "delegate", "task_id": "other", "capability": "something"},
            {"type": "result", "task_id": "task", "success": False},
            {"type": "status", "task_id": "task", "progress": 0.5},
            {"type": "broadcast", "message": 1},
            {"type": "heartbeat"},
            {"type": "deregister"},
        ):
            assert (await observer.request(**message))["code"] == "not_registered"
        await agent.nothing_else()
        assert await state_of(observer, "task") == "pending"


async def test_connection_that_breaks_off_anywhere_harms_nobody(hub: str) -> None:
    async with pair(hub) as (requester, worker, capability, task):
        for _ in range(5):
            async with raw_client(hub) as rude:
                await rude.register("rude", fresh("capability"))
                await rude.send(type="delegate", task_id=fresh("task"), capability="nobody", wait=True, ttl=0.05)
                rude.connection.transport.abort()
                with contextlib.suppress(ConnectionClosed):
                    await rude.receive()
        await requester.delegate(task, capability=capability)
        await worker.message("delegate", task_id=task)
        await worker.request(type="result", task_id=task, success=True)
        assert (await requester.message("result"))["state"] == "completed"


# Payloads


async def next_text(client: RawClient, type: str) -> str:
    """Return the text of the next message of a type."""
    async with asyncio.timeout(WAIT_S):
        while json.loads(text := await client.connection.recv())["type"] != type:
            pass
    return text


@pytest.mark.parametrize("payload", PAYLOADS_AS_WRITTEN, ids=range(len(PAYLOADS_AS_WRITTEN)))
async def test_payload_is_forwarded_byte_by_byte(codec_hub: str, payload: str) -> None:
    async with pair(codec_hub) as (requester, worker, capability, task):
        await requester.connection.send(
            f'{{"type":"delegate","input": {payload} ,"task_id":"{task}","capability":"{capability}"}}'
        )
        assert f'"input":{payload},' in await next_text(worker, "delegate")
        await worker.connection.send(f'{{"detail":\n{payload}\t, "type":"status","task_id":"{task}"}}')
        assert f'"detail":{payload}' in await next_text(requester, "status")
        await requester.send(type="status", id="q", task_id=task)
        report = await next_text(requester, "status")
        assert f'"input":{payload}' in report
        assert f'"detail":{payload}' in report
        await worker.connection.send(f'{{"type":"result","task_id":"{task}","success":true,"\\u006futput":{payload}}}')
        assert f'"output":{payload}' in await next_text(requester, "result")
        await requester.send(type="status", id="q", task_id=task)
        assert f'"output":{payload}' in await next_text(requester, "status")
        await requester.connection.send(f'{{"type":"broadcast","message":{payload},"capability":"{capability}"}}')
        assert f'"message":{payload},' in await next_text(worker, "broadcast")


async def test_payloads_are_redelivered_byte_by_byte(codec_hub: str) -> None:
    capability = fresh("capability")
    async with clients(codec_hub, 4) as (requester, returned, worker, second):
        joined = await requester.register("requester")
        await worker.register("worker", capability, max_tasks=100)
        for number, payload in enumerate(PAYLOADS_AS_WRITTEN):
            await requester.connection.send(
                f'{{"type":"delegate","task_id":"{capability}-{number}","capability":"{capability}",'
                f'"max_retries":1,"input":{payload}}}'
            )
            await next_text(worker, "delegate")
        await second.register("second", capability, max_tasks=100)
        await worker.send(type="deregister")
        for number, payload in enumerate(PAYLOADS_AS_WRITTEN):
            text = await next_text(second, "delegate")
            delivered = json.loads(text)
            assert (delivered["task_id"], delivered["attempt"]) == (f"{capability}-{number}", 2)
            assert f'"input":{payload},' in text
        await requester.connection.close()
        for number, payload in enumerate(PAYLOADS_AS_WRITTEN):
            await second.connection.send(
                f'{{"type":"result","task_id":"{capability}-{number}","success":true,"output":{payload}}}'
            )
        await second.request(type="status")
        await returned.send(type="register", name="requester", agent_id=joined["agent_id"], resume=joined["resume"])
        found = [await next_text(returned, "result") for _ in PAYLOADS_AS_WRITTEN]
        for text, payload in zip(found, PAYLOADS_AS_WRITTEN, strict=True):
            assert f'"output":{payload}' in text
