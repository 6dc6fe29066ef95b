# ruff: noqa: E402  # The imports need a2a-sdk.
"""The A2A gateway, with a2a-sdk's own client: agents of a hub as A2A agents, and the other way round."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import socket
import ssl
import sys
import uuid
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import agenthub
from agenthub import Agent, HubServer, Task, TaskFailed
from tests.raw_websocket import WAIT_S
from tests.support import ROOT, agenthub_main, hub_process, running
from tests.test_docs import blocks
from tests.test_security import AUTHORITY, CERTIFICATE, KEY, private_file

pytest.importorskip("a2a", reason="needs a2a-sdk[http-server]: tox -e a2a")
httpx = pytest.importorskip("httpx")

from a2a import client as a2a_client
from a2a.types import a2a_pb2 as pb
from a2a.utils import errors
from google.protobuf.json_format import ParseDict

import agenthub_a2a

BINDINGS = ("JSONRPC", "HTTP+JSON")
TOKEN = "right-" * 6


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTHUB_STATE_DIR", str(tmp_path / "state"))
    for name in ("AGENTHUB_TOKEN", "AGENTHUB_TOKEN_FILE", "AGENTHUB_A2A_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def options(*argv: str) -> Any:
    args = agenthub.argument_parser(["a2a"]).parse_args(["a2a", "--port", "0", *argv])
    args.headers = {}
    return args


@contextlib.asynccontextmanager
async def run_until_left(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine, and cancel it in the end, as the first signal does. Raises what it raises."""
    task = asyncio.create_task(coroutine)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, WAIT_S)


@contextlib.asynccontextmanager
async def gateway(hub: str, *argv: str) -> AsyncIterator[str]:
    """Run a gateway of a hub; yield its URL."""
    args = options("--url", hub, *argv)
    with agenthub._listening(args):
        async with run_until_left(agenthub_a2a.serve(args)):
            yield args.base_url


@contextlib.asynccontextmanager
async def joined(hub: str, url: str, *argv: str) -> AsyncIterator[None]:
    """Have an A2A agent join a hub."""
    async with run_until_left(agenthub_a2a.join(options("--url", hub, "--join", url, *argv))):
        yield


async def offered(hub: str, capability: str) -> None:
    """Wait until an agent offers a capability."""
    async with Agent("probe", url=hub) as probe:
        while not any(one.name == capability for agent in await probe.discover() for one in agent.capabilities):
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def client_of(url: str, binding: str = "JSONRPC", token: str | None = None, **more: Any) -> AsyncIterator[Any]:
    headers = {"Authorization": f"Bearer {token}"} if token else None
    async with httpx.AsyncClient(headers=headers, timeout=WAIT_S) as http:
        config = a2a_client.ClientConfig(httpx_client=http, supported_protocol_bindings=[binding], **more)
        yield await a2a_client.ClientFactory(config).create_from_url(url)


def request(value: Any, message_id: str = "", **more: Any) -> pb.SendMessageRequest:
    message_id = message_id or uuid.uuid4().hex
    message = pb.Message(message_id=message_id, role=pb.ROLE_USER, parts=agenthub_a2a.parts_of(value), **more)
    return pb.SendMessageRequest(message=message)


async def send(client: Any, value: Any, message_id: str = "", **more: Any) -> pb.Task:
    """Send a message, and return the task as the events tell it."""
    task = pb.Task()
    async for event in client.send_message(request(value, message_id, **more)):
        take(task, event)
    return task


def take(task: pb.Task, event: pb.StreamResponse) -> None:
    if event.HasField("task"):
        task.CopyFrom(event.task)
    elif event.HasField("status_update"):
        task.status.CopyFrom(event.status_update.status)
        task.metadata.MergeFrom(event.status_update.metadata)
    else:
        agenthub_a2a.tasks.task_manager.append_artifact_to_task(task, event.artifact_update)


def output_of(task: pb.Task) -> Any:
    assert task.status.state == pb.TASK_STATE_COMPLETED, task
    (artifact,) = task.artifacts
    return agenthub_a2a.value_of(artifact.parts)


def text_of(task: pb.Task) -> str:
    return "".join(part.text for part in task.status.message.parts)


def worker(**more: Any) -> Agent:
    agent = Agent("worker", description="Works", **more)
    agent.begun, agent.cancelled = asyncio.Event(), asyncio.Event()  # type: ignore[attr-defined]

    @agent.capability
    def echo(task: Task) -> Any:
        """Return the input."""
        return task.input

    @agent.capability
    def double(n: int) -> int:
        return 2 * n

    @agent.capability
    async def write(words: list[Any], task: Task) -> AsyncIterator[Any]:
        task.progress(0.5, "half")
        for word in words:
            yield word

    @agent.capability
    async def review(task: Task) -> str:
        return f"on {await task.ask('main or develop?', schema=Literal['main', 'develop'])}"

    @agent.capability
    async def count(task: Task) -> int:
        n: int = await task.ask("how many?", schema=int)
        return n + 1

    @agent.capability
    async def wait(task: Task) -> None:
        agent.begun.set()  # type: ignore[attr-defined]
        try:
            await asyncio.Event().wait()
        finally:
            agent.cancelled.set()  # type: ignore[attr-defined]

    @agent.capability
    def fail(code: str) -> None:
        raise TaskFailed("on purpose", code=code)

    return agent


@contextlib.asynccontextmanager
async def world(*argv: str, within_s: float = WAIT_S) -> AsyncIterator[tuple[str, str, Agent]]:
    """A hub, a worker and a gateway: their URLs, and the worker."""
    async with asyncio.timeout(within_s), HubServer(port=0) as hub:
        agent = worker(url=hub.url)
        async with agent, gateway(hub.url, *argv) as url:
            yield hub.url, url, agent


# Outward


@pytest.mark.parametrize("binding", BINDINGS)
async def test_a_task_is_sent_streamed_found_and_listed(binding: str) -> None:
    async with world() as (_, url, _), client_of(f"{url}/a2a/write", binding) as client:
        events = [event async for event in client.send_message(request({"words": ["Once", " upon"]}, context_id="c-1"))]
        assert [event.WhichOneof("payload") for event in events][:2] == ["task", "status_update"]
        progress = events[1].status_update
        assert progress.metadata["progress"] == 0.5
        assert progress.status.message.parts[0].text == "half"
        task = pb.Task()
        for event in events:
            take(task, event)
        assert output_of(task) == "Once upon"
        assert all(event.artifact_update.append for event in events[3:-1])
        found = await client.get_task(pb.GetTaskRequest(id=task.id))
        assert (output_of(found), found.context_id) == ("Once upon", "c-1")
        listed = await client.list_tasks(pb.ListTasksRequest())
        assert [one.id for one in listed.tasks] == [task.id]
        with pytest.raises(errors.TaskNotFoundError):
            await client.get_task(pb.GetTaskRequest(id=f"{task.id[:-1]}x"))


@pytest.mark.parametrize("binding", BINDINGS)
async def test_a_cancelled_task_is_cancelled_at_the_worker(binding: str) -> None:
    async with world() as (_, url, agent), client_of(f"{url}/a2a/wait", binding) as client:
        events = client.send_message(request(None))
        task = (await anext(events)).task
        await agent.begun.wait()  # type: ignore[attr-defined]
        cancelled = await client.cancel_task(pb.CancelTaskRequest(id=task.id))
        assert cancelled.status.state == pb.TASK_STATE_CANCELED
        await agent.cancelled.wait()  # type: ignore[attr-defined]
        assert [event.status_update.status.state async for event in events] == [pb.TASK_STATE_CANCELED]
        with pytest.raises(errors.TaskNotCancelableError):
            await client.cancel_task(pb.CancelTaskRequest(id=task.id))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("binding", BINDINGS)
async def test_a_question_is_input_required_and_a_message_answers_it(binding: str, streaming: bool) -> None:
    async with world() as (_, url, _), client_of(f"{url}/a2a/review", binding, streaming=streaming) as client:
        task = await send(client, None)
        assert (task.status.state, text_of(task)) == (pb.TASK_STATE_INPUT_REQUIRED, "main or develop?")
        with pytest.raises(errors.InvalidParamsError, match="must be one of"):
            await send(client, "neither", task_id=task.id)
        assert output_of(await send(client, "main", "answer", task_id=task.id)) == "on main"
        assert output_of(await send(client, "main", "answer", task_id=task.id)) == "on main"  # As it was sent before.
        found = await client.get_task(pb.GetTaskRequest(id=task.id))
        assert "answer" in [one.message_id for one in found.history]
        with pytest.raises(errors.UnsupportedOperationError):
            await send(client, "main", task_id=task.id)


async def test_a_text_answers_a_question_for_a_number() -> None:
    async with world() as (_, url, _), client_of(f"{url}/a2a/count") as client:
        task = await send(client, None)
        assert output_of(await send(client, "41", task_id=task.id)) == 42


async def test_a_task_that_waits_for_an_answer_can_be_cancelled() -> None:
    async with world() as (_, url, _), client_of(f"{url}/a2a/review") as client:
        task = await send(client, None)
        cancelled = await client.cancel_task(pb.CancelTaskRequest(id=task.id))
        assert cancelled.status.state == pb.TASK_STATE_CANCELED


async def test_a_task_whose_ttl_passes_while_it_waits_for_an_answer_fails() -> None:
    async with world("--ttl", "0.2") as (_, url, _), client_of(f"{url}/a2a/review") as client:
        task = await send(client, None)
        async for event in client.subscribe(pb.SubscribeToTaskRequest(id=task.id)):
            take(task, event)
        assert (task.status.state, task.metadata["code"]) == (pb.TASK_STATE_FAILED, "timeout")


async def test_a_stream_can_be_resubscribed() -> None:
    async with world() as (_, url, _), client_of(f"{url}/a2a/wait") as client:
        task = (await anext(client.send_message(request(None)))).task
        events = client.subscribe(pb.SubscribeToTaskRequest(id=task.id))
        assert (await anext(events)).task.id == task.id
        await client.cancel_task(pb.CancelTaskRequest(id=task.id))
        assert [event.status_update.status.state async for event in events] == [pb.TASK_STATE_CANCELED]


@pytest.mark.parametrize("streaming", [True, False])
async def test_the_same_message_is_the_same_task(streaming: bool) -> None:
    calls = []
    async with world() as (_, url, agent):
        agent.capability("note")(lambda task: calls.append(task))
        await agent.connected()
        await offered(agent.url, "note")
        async with client_of(f"{url}/a2a/note", streaming=streaming) as client:
            sent = await asyncio.gather(*(send(client, {"task": 1}, "m-1") for _ in range(20)))
            again = await send(client, {"task": 1}, "m-1")
            assert {task.id for task in (*sent, again)} == {again.id}
            assert again.status.state == pb.TASK_STATE_COMPLETED
            assert calls == [1]
            assert (await send(client, {"task": 1}, "m-2")).id != again.id


async def test_a_send_that_returns_at_once_goes_on() -> None:
    async with world() as (_, url, agent), client_of(f"{url}/a2a/wait", streaming=False, polling=True) as client:
        task = await send(client, None, "m-1")
        assert task.status.state == pb.TASK_STATE_WORKING
        assert (await send(client, None, "m-1")).status.state == pb.TASK_STATE_WORKING
        await agent.begun.wait()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("code", "state"),
    [
        ("failed", pb.TASK_STATE_FAILED),
        ("my_code", pb.TASK_STATE_FAILED),
        ("rejected", pb.TASK_STATE_REJECTED),
        ("cancelled", pb.TASK_STATE_CANCELED),
    ],
)
async def test_the_code_of_a_failure_decides_about_the_state(code: str, state: int) -> None:
    async with world() as (_, url, _), client_of(f"{url}/a2a/fail") as client:
        task = await send(client, {"code": code})
        assert (task.status.state, text_of(task), task.metadata["code"]) == (state, "on purpose", code)


async def test_a_rejected_message_is_tried_again_when_it_is_sent_again() -> None:
    async with world() as (hub, url, agent), client_of(f"{url}/a2a/double") as client:
        await agent.stop()
        task = await send(client, {"n": 21}, "m-1")
        assert (task.status.state, task.metadata["code"]) == (pb.TASK_STATE_REJECTED, "no_agent")
        async with worker(url=hub):
            again = await send(client, {"n": 21}, "m-1")
            assert (output_of(again), again.id) == (42, task.id)


async def test_without_a_hub_a_message_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub_a2a, "HUB_S", 0.1)
    async with asyncio.timeout(WAIT_S), contextlib.AsyncExitStack() as stack:
        async with HubServer(port=0) as hub, worker(url=hub.url):
            url = await stack.enter_async_context(gateway(hub.url))
            client = await stack.enter_async_context(client_of(f"{url}/a2a/double"))
        task = await send(client, {"n": 21})
        assert (task.status.state, task.metadata["code"]) == (pb.TASK_STATE_REJECTED, "hub_lost")


async def test_what_the_hub_does_not_accept_is_rejected() -> None:
    async with world() as (_, url, _), client_of(f"{url}/a2a/double") as client:
        task = await send(client, {"n": "x"})
        assert (task.status.state, task.metadata["code"]) == (pb.TASK_STATE_REJECTED, "invalid_input")
        message = request(None)
        message.message.parts[0].CopyFrom(pb.Part(text="{", media_type="application/json"))
        task = pb.Task()
        async for event in client.send_message(message):
            take(task, event)
        assert task.status.state == pb.TASK_STATE_REJECTED


async def test_one_agent_is_reached_by_its_id() -> None:
    async with world() as (hub, url, _):
        other = Agent("other", url=hub)
        other.capability("name")(lambda: "other")
        async with other, client_of(f"{url}/a2a/@{other.agent_id}") as client:
            assert output_of(await send(client, {})) == "other"


async def test_the_directory_lists_cards_and_these_describe_the_agents() -> None:
    async with world("--capability", "double", "--capability", "a/b c") as (hub, url, agent):
        agent.capability("a/b c")(lambda: "slash")
        await offered(hub, "a/b c")
        async with httpx.AsyncClient(timeout=WAIT_S) as http:
            listed = (await http.get(url)).json()["agents"]
            assert [one["name"] for one in listed] == ["a/b c", "double"]
            card = (await http.get(listed[1]["card"])).json()
            assert "input: {" in card["skills"][0]["description"]
            bindings = [(one["protocolBinding"], one["protocolVersion"]) for one in card["supportedInterfaces"]]
            assert bindings == [("JSONRPC", "1.0"), ("HTTP+JSON", "1.0")]
            assert (await http.get(f"{url}/a2a/nope/.well-known/agent-card.json")).status_code == 403
            assert (await http.get(f"{url}/.well-known/agent-card.json")).status_code == 404
        async with client_of(listed[0]["card"].removesuffix("/.well-known/agent-card.json")) as client:
            assert output_of(await send(client, {})) == "slash"


async def test_the_host_is_enough_where_there_is_one_capability() -> None:
    async with world("--capability", "double") as (_, url, _), client_of(url) as client:
        assert output_of(await send(client, {"n": 21})) == 42


async def test_a_client_of_a2a_0_3_is_served() -> None:
    async with world() as (_, url, _), httpx.AsyncClient(timeout=WAIT_S) as http:
        message = {"messageId": "m", "role": "user", "kind": "message", "parts": [{"kind": "text", "text": "hi"}]}
        call = {"jsonrpc": "2.0", "id": 1, "method": "message/send", "params": {"message": message}}
        result = (await http.post(f"{url}/a2a/echo/rpc", json=call)).json()["result"]
        assert result["artifacts"][0]["parts"] == [{"kind": "text", "text": "hi"}]


# Values

TEXT = st.text(st.characters(codec="utf-8"))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
    | st.integers(-(2**63), 2**63 - 1),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
@settings(deadline=None)
def test_any_json_comes_back_equal_from_its_parts(value: Any) -> None:
    parts = [pb.Part.FromString(part.SerializeToString()) for part in agenthub_a2a.parts_of(value)]
    back = agenthub_a2a.value_of(parts)
    assert back == value
    assert type(back) is type(value) or isinstance(value, float)


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 2**53, 2**60 + 1, -(2**63), 2**64 - 1, 0.1, 1e300, -0.0, 1e-9, "", "null", "3", None, True, [], {}),
        [3, 3.5, {"n": 2**60 + 1}],
        {"parts": []},
        {"parts": [{"text": "a"}, {"data": 3}]},
        {"parts": [{"url": "https://example.org/x", "mediaType": "text/plain"}]},
        {"parts": [{"raw": "dGNr", "filename": "output.txt"}]},
        {"parts": "x"},
        json.loads("[" * 60 + "]" * 60),
    ],
)
async def test_json_goes_through_the_gateway_and_back(value: Any) -> None:
    async with world() as (_, url, _), client_of(f"{url}/a2a/echo") as client:
        back = output_of(await send(client, value))
        assert back == value
        assert type(back) is type(value) or isinstance(value, float)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(JSON, min_size=1, max_size=10))
def test_any_json_goes_through_two_gateways(state: None, values: list[Any]) -> None:
    async def main() -> None:
        async with chain() as me:
            assert [await me.delegate("echo", value) for value in values] == values

    asyncio.run(main())


async def test_integers_arrive_as_integers_where_a_client_sends_doubles() -> None:
    async with world() as (_, url, _), httpx.AsyncClient(timeout=WAIT_S, headers={"A2A-Version": "1.0"}) as http:
        for number in ("21", "21.0", "2.1e1"):
            message = f'{{"messageId": "{number}", "role": "ROLE_USER", "parts": [{{"data": {{"n": {number}}}}}]}}'
            answer = await http.post(f"{url}/a2a/double/rest/message:send", content=f'{{"message": {message}}}')
            assert answer.json()["task"]["artifacts"][0]["parts"] == [{"data": 42.0}]


# Inward


@contextlib.asynccontextmanager
async def chain() -> AsyncIterator[Agent]:
    """A requester at hub B, whose worker is one of hub A: B -> joined agents -> gateway -> A -> worker."""
    async with world() as (_, url, agent), HubServer(port=0) as other, contextlib.AsyncExitStack() as stack:
        names = ("echo", "write", "review", "wait", "fail")
        for name in names:
            await stack.enter_async_context(joined(other.url, f"{url}/a2a/{name}"))
        for name in names:
            await offered(other.url, name)
        me = await stack.enter_async_context(Agent("me", url=other.url))
        me.worker = agent  # type: ignore[attr-defined]
        yield me


async def test_a_chain_of_two_hubs_carries_pieces_progress_questions_errors_and_cancellations() -> None:
    async with chain() as me:
        handle = await me.submit("write", {"words": ["Once", " upon"]})
        news = [one async for one in handle]
        assert [one.detail for one in news if isinstance(one, agenthub.Progress)] == ["half"]
        assert "".join(one.piece for one in news if isinstance(one, agenthub.Piece)) == "Once upon"
        assert await handle.result() == "Once upon"
        assert [one async for one in me.stream("write", {"words": [1, "a", [2.5]]})] == [1, "a", [2.5]]
        asked: list[agenthub.TaskQuestion] = []

        def answer(question: agenthub.TaskQuestion) -> str:
            asked.append(question)
            return "develop"

        handle = await me.submit("review", on_question=answer)
        assert [one async for one in handle if isinstance(one, agenthub.Progress)] == []
        assert await handle.result() == "on develop"
        assert [(one.text, (one.schema or {})["enum"]) for one in asked] == [("main or develop?", ["main", "develop"])]
        with pytest.raises(TaskFailed, match="on purpose") as failure:
            await me.delegate("fail", {"code": "my_code"})
        assert failure.value.code == "my_code"
        handle = await me.submit("wait")
        await me.worker.begun.wait()  # type: ignore[attr-defined]
        await handle.cancel()
        await me.worker.cancelled.wait()  # type: ignore[attr-defined]


class Remote:
    """The client of an A2A agent that sends certain events."""

    def __init__(self, *events: dict[str, Any]) -> None:
        self.events = events

    async def send_message(self, _: pb.SendMessageRequest) -> AsyncIterator[pb.StreamResponse]:
        for event in self.events:
            yield ParseDict(event, pb.StreamResponse())


async def delegated(hub: agenthub.LocalHub, *events: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Delegate a task to an A2A agent that sends these events; return its output, and the progress it reported."""
    async with Agent("w", hub=hub) as joined, Agent("me", hub=hub) as me:

        @joined.capability
        async def skill(task: Task) -> Any:
            remote: Any = Remote(*events)
            return await agenthub_a2a.follow(task, remote, "skill", pb.Task())

        while not await me.discover("skill"):
            await asyncio.sleep(0)
        handle = await me.submit("skill")
        reports = [one.progress async for one in handle if isinstance(one, agenthub.Progress)]
        return await handle.result(), reports


@pytest.mark.parametrize(
    "part", [{"data": 0}, {"data": False}, {"text": ""}, {"data": {}}, {"data": []}, {"text": "x"}]
)
async def test_any_reply_without_a_task_is_the_output(part: dict[str, Any]) -> None:
    async with asyncio.timeout(WAIT_S), agenthub.LocalHub() as hub:
        reply = {"message": {"messageId": "m", "role": "ROLE_AGENT", "parts": [part]}}
        (expected,) = part.values()
        assert (await delegated(hub, reply)) == (expected, [])


@pytest.mark.parametrize(
    ("sent", "reported"), [("50%", []), (50, []), (-1, []), (True, []), ({"a": 1}, []), (0.5, [0.5]), (1, [1.0])]
)
async def test_progress_of_another_kind_is_left_out(sent: Any, reported: list[float]) -> None:
    status = {"taskId": "r", "status": {"state": "TASK_STATE_WORKING"}, "metadata": {"progress": sent}}
    reply = {"message": {"messageId": "m", "role": "ROLE_AGENT", "parts": [{"text": "x"}]}}
    async with asyncio.timeout(WAIT_S), agenthub.LocalHub() as hub:
        assert await delegated(hub, {"statusUpdate": status}, reply) == ("x", reported)


async def test_an_agent_that_is_gone_leaves_the_hub_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub_a2a, "POLL_S", 0.01)
    async with asyncio.timeout(WAIT_S), contextlib.AsyncExitStack() as stack:
        hub, other = [await stack.enter_async_context(HubServer(port=0)) for _ in range(2)]
        async with worker(url=hub.url), Agent("me", url=other.url) as me:
            async with gateway(hub.url) as url:
                await stack.enter_async_context(joined(other.url, f"{url}/a2a/double", "--prefix", "far."))
                await offered(other.url, "far.double")
                assert await me.delegate("far.double", {"n": 21}) == 42
            while await me.discover("far.double"):
                await asyncio.sleep(0)
            async with gateway(hub.url, "--port", url.rpartition(":")[2]):
                await offered(other.url, "far.double")
                assert await me.delegate("far.double", {"n": 21}) == 42


# Restarts


async def test_a_restarted_gateway_finds_its_tasks_by_their_ids(tmp_path: Path) -> None:
    released = asyncio.Event()
    async with asyncio.timeout(WAIT_S), HubServer(port=0) as hub:
        agent = worker(url=hub.url)

        @agent.capability
        async def hold() -> str:
            await released.wait()
            return "done"

        async with agent:
            async with gateway(hub.url) as url:
                async with client_of(f"{url}/a2a/hold", polling=True, streaming=False) as client:
                    open_task = await send(client, {}, "open")
                    ended = await send(client, {}, "ended")
                async with client_of(f"{url}/a2a/review") as client:
                    asking = await send(client, None, "asking")
            async with gateway(hub.url) as url:
                async with client_of(f"{url}/a2a/hold") as client:
                    found = await client.get_task(pb.GetTaskRequest(id=open_task.id))
                    assert found.status.state == pb.TASK_STATE_WORKING
                    events = client.subscribe(pb.SubscribeToTaskRequest(id=open_task.id))
                    task = (await anext(events)).task
                    released.set()
                    async for event in events:
                        take(task, event)
                    assert output_of(task) == "done"
                    assert output_of(await send(client, {}, "ended")) == "done"
                    assert output_of(await client.get_task(pb.GetTaskRequest(id=ended.id))) == "done"
                async with client_of(f"{url}/a2a/review", streaming=False) as client:
                    found = await client.get_task(pb.GetTaskRequest(id=asking.id))
                    while found.status.state != pb.TASK_STATE_INPUT_REQUIRED:
                        found = await client.get_task(pb.GetTaskRequest(id=asking.id))
                    assert output_of(await send(client, "main", task_id=asking.id)) == "on main"


async def test_a_message_sent_again_after_a_restart_shows_the_question_of_its_task() -> None:
    async with asyncio.timeout(WAIT_S), HubServer(port=0) as hub, worker(url=hub.url):
        for streaming in (False, True):
            asking = pb.Task()
            for _ in range(2):
                async with gateway(hub.url) as url, client_of(f"{url}/a2a/review", streaming=streaming) as client:
                    task = await send(client, None, f"m-{streaming}")
                    assert (task.status.state, text_of(task)) == (pb.TASK_STATE_INPUT_REQUIRED, "main or develop?")
                    assert asking.id in ("", task.id)
                    asking = task
            async with gateway(hub.url) as url, client_of(f"{url}/a2a/review", streaming=streaming) as client:
                assert output_of(await send(client, "main", task_id=asking.id)) == "on main"


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM")
@pytest.mark.parametrize("direction", ["outward", "inward"])
async def test_the_first_signal_ends_a_command_that_waits_for_its_hub(direction: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        command = ["-m", "agenthub", "a2a", "--port", "0", "--url", f"ws://127.0.0.1:{closed.getsockname()[1]}"]
        async with world() as (_, url, _):
            if direction == "inward":
                command += ["--join", f"{url}/a2a/double"]
            with running(*command) as process:
                assert process.stderr is not None
                assert "no hub at" in await asyncio.to_thread(process.stderr.readline)
                process.terminate()
                assert await asyncio.to_thread(process.wait, WAIT_S) == 0


async def test_two_gateways_of_a_hub_need_different_names() -> None:
    async with world() as (hub, url, _), httpx.AsyncClient(timeout=WAIT_S) as http:
        await http.get(url)  # The first one serves.
        args = options("--url", hub)
        with agenthub._listening(args), pytest.raises(agenthub.CommandFailed, match="give --name"):
            await agenthub_a2a.serve(args)
        async with gateway(hub, "--name", "another") as other:
            assert (await http.get(other)).status_code == 200


async def test_a_killed_gateway_finds_its_tasks_too() -> None:
    async with asyncio.timeout(WAIT_S), HubServer(port=0) as hub, worker(url=hub.url):
        argv, task = ["-m", "agenthub", "a2a", "--port", "0", "--url", hub.url], pb.Task()
        for attempt in range(2):
            with running(*argv) as process:
                assert process.stdout is not None
                url = (await asyncio.to_thread(process.stdout.readline)).split()[-1]
                async with client_of(f"{url}/a2a/wait", polling=True, streaming=False) as client:
                    if attempt == 0:
                        task = await send(client, None, "m-1")
                        process.kill()
                    else:
                        assert (await send(client, None, "m-1")).id == task.id
                        cancelled = await client.cancel_task(pb.CancelTaskRequest(id=task.id))
                        assert cancelled.status.state == pb.TASK_STATE_CANCELED


@pytest.mark.parametrize("has_journal", [True, False])
async def test_a_task_outlives_a_hub_with_a_journal_and_fails_without(has_journal: bool, tmp_path: Path) -> None:
    journal = ["--db", str(tmp_path / "hub.db")] if has_journal else []
    begun, released = asyncio.Event(), asyncio.Event()
    async with asyncio.timeout(WAIT_S):
        with hub_process(*journal) as (hub, process):
            agent = Agent("worker", url=hub)

            @agent.capability
            async def hold() -> str:
                begun.set()
                await released.wait()
                return "done"

            await agent.start()
            serving = gateway(hub)
            url = await serving.__aenter__()
            async with client_of(f"{url}/a2a/hold") as client:
                events = client.send_message(request({}))
                task = (await anext(events)).task
                await begun.wait()
                process.kill()
                process.wait()
                with running("-m", "agenthub", "hub", "--port", hub.rpartition(":")[2], *journal):
                    released.set()
                    async for event in events:
                        take(task, event)
                    code = dict(task.metadata).get("code")
                    assert (task.status.state, code) == (
                        (pb.TASK_STATE_COMPLETED, None) if has_journal else (pb.TASK_STATE_FAILED, "hub_lost")
                    )
                    await serving.__aexit__(None, None, None)
                    await agent.stop()


async def test_a_task_is_retried_where_its_worker_is_lost() -> None:
    async with asyncio.timeout(WAIT_S), HubServer(port=0) as hub:
        first, second = worker(url=hub.url), Agent("second", url=hub.url)
        second.capability("wait")(lambda task: "by the second")
        async with first, gateway(hub.url, "--max-retries", "1") as url, client_of(f"{url}/a2a/wait") as client:
            events = client.send_message(request({"task": 1}))
            task = (await anext(events)).task
            await first.begun.wait()  # type: ignore[attr-defined]
            async with second:
                await first.stop()
                async for event in events:
                    take(task, event)
            assert output_of(task) == "by the second"


# Limits


async def test_ended_tasks_are_evicted_by_number_bytes_and_age() -> None:
    for limit in (["--max-tasks", "5"], ["--max-task-bytes", "2000"], ["--retention", "0"]):
        async with world(*limit) as (_, url, _), client_of(f"{url}/a2a/echo") as client:
            sent = [await send(client, "x" * 50) for _ in range(30)]
            listed = await client.list_tasks(pb.ListTasksRequest(page_size=100))
            assert 0 <= len(listed.tasks) <= 6
            assert {one.id for one in listed.tasks} <= {one.id for one in sent[-6:]}


async def test_no_new_task_is_taken_while_open_ones_fill_the_store() -> None:
    poll = {"polling": True, "streaming": False}
    async with world("--max-tasks", "2") as (_, url, _), client_of(f"{url}/a2a/wait", **poll) as client:
        for _ in range(3):
            await send(client, None)
        with pytest.raises(errors.A2AError, match="too many tasks are open"):
            await send(client, None)


async def test_a_request_that_is_too_large_is_rejected() -> None:
    async with world("--max-bytes", "1000") as (_, url, _), httpx.AsyncClient(timeout=WAIT_S) as http:
        for path in ("rpc", "rest/message:send"):
            answer = await http.post(f"{url}/a2a/echo/{path}", content=b"{" + b" " * 1000)
            assert answer.status_code == 413 or "too large" in answer.text.lower()

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b" " * 100

        answer = await http.post(f"{url}/a2a/echo/rpc", content=chunks())
        assert answer.status_code == 413 or "too large" in answer.text.lower()


async def test_connections_without_a_request_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "TOKEN_S", 0.05)
    async with world() as (_, url, _):
        host, port = url.removeprefix("http://").split(":")
        for sent in (b"", b"GET / HTTP/1.1\r\n", f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\nGET /".encode()):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(sent)
            with contextlib.suppress(ConnectionResetError):
                while await reader.read(1000):
                    pass
            writer.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="needs TCP_USER_TIMEOUT")
@pytest.mark.long
async def test_a_client_that_reads_nothing_is_disconnected() -> None:
    """The kernel does it, after half a second here. Until then, the stream is the one request that it may have."""
    async with asyncio.timeout(WAIT_S), HubServer(port=0) as hub, worker(url=hub.url):
        args = options("--url", hub.url, "--max-requests", "1")
        listening = agenthub._listening(args)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 500)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10_000)
        text = json.dumps({"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "x" * 900_000}]})
        body = f'{{"message": {text}}}'.encode()
        head = "POST /a2a/echo/rest/message:stream HTTP/1.1\r\nHost: 127.0.0.1\r\nA2A-Version: 1.0\r\n"
        async with run_until_left(agenthub_a2a.serve(args)):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 5_000)
                client.connect(args.listening.getsockname())
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(client, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                assert (await loop.sock_recv(client, 17)).startswith(b"HTTP/1.1 200")
                async with httpx.AsyncClient(timeout=WAIT_S) as http:
                    assert (await http.get(args.base_url)).status_code == 429
                    while (await http.get(args.base_url)).status_code == 429:
                        await asyncio.sleep(0)


async def test_a_client_may_have_a_number_of_requests_at_once() -> None:
    async with (
        world("--max-requests", "3") as (_, url, _),
        client_of(f"{url}/a2a/wait") as client,
        httpx.AsyncClient() as http,
    ):
        streams = [client.send_message(request(None)) for _ in range(3)]
        for stream in streams:
            await anext(stream)
        assert (await http.get(url)).status_code == 429


@pytest.mark.parametrize("binding", BINDINGS)
async def test_push_notifications_go_only_where_they_are_allowed_to(binding: str) -> None:
    received: asyncio.Queue[Any] = asyncio.Queue()

    async def target(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
        await received.put(json.loads(await reader.readexactly(length)))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(target, "127.0.0.1", 0) as server:
        hook = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        config = pb.TaskPushNotificationConfig(id="1", url=f"{hook}/hooks/1")
        async with world() as (_, url, _), client_of(f"{url}/a2a/wait", binding) as client:
            task = (await anext(client.send_message(request(None)))).task
            config.task_id = task.id
            with pytest.raises(errors.PushNotificationNotSupportedError):
                await client.create_task_push_notification_config(config)
            message = request(None)
            message.configuration.task_push_notification_config.CopyFrom(config)
            with pytest.raises(errors.A2AError):
                await anext(client.send_message(message))
        async with (
            world("--allow-push", f"{hook}/hooks/*") as (_, url, _),
            client_of(f"{url}/a2a/wait", binding) as client,
        ):
            task = (await anext(client.send_message(request(None)))).task
            for other in (f"{hook}/x", f"{hook}/hooks/../x", "http://127.0.0.1:1/hooks/1", f"{hook}@evil/hooks/1"):
                with pytest.raises(errors.InvalidParamsError):
                    await client.create_task_push_notification_config(
                        pb.TaskPushNotificationConfig(id="1", url=other, task_id=task.id)
                    )
            config.task_id = task.id
            await client.create_task_push_notification_config(config)
            await client.cancel_task(pb.CancelTaskRequest(id=task.id))
            event = await received.get()
            assert event["statusUpdate"]["status"]["state"] == "TASK_STATE_CANCELED"


@pytest.mark.parametrize("binding", BINDINGS)
async def test_a_task_has_at_most_ten_push_notification_configurations(binding: str) -> None:
    async with (
        world("--allow-push", "http://127.0.0.1:1/*") as (_, url, _),
        client_of(f"{url}/a2a/wait", binding) as client,
    ):
        task = (await anext(client.send_message(request(None)))).task
        for number in (*range(10), 9):  # The last is changed.
            config = pb.TaskPushNotificationConfig(id=str(number), url="http://127.0.0.1:1/x", task_id=task.id)
            await client.create_task_push_notification_config(config)
        config.id = "another"
        with pytest.raises(errors.InvalidParamsError, match="at most 10"):
            await client.create_task_push_notification_config(config)
        config.id, config.token = "9", "x" * 5000
        with pytest.raises(errors.InvalidParamsError, match="4 KiB"):
            await client.create_task_push_notification_config(config)
        listed = pb.ListTaskPushNotificationConfigsRequest(task_id=task.id)
        assert len((await client.list_task_push_notification_configs(listed)).configs) == 10


# Users


async def test_a_token_is_needed_where_one_is_set_and_the_card_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTHUB_A2A_TOKEN", TOKEN)
    async with world() as (_, url, _), httpx.AsyncClient(timeout=WAIT_S) as http:
        card = (await http.get(f"{url}/a2a/double/.well-known/agent-card.json")).json()
        assert card["securitySchemes"]["bearer"]["httpAuthSecurityScheme"] == {"scheme": "bearer"}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            for path in ("", "/a2a/double/rpc", "/a2a/double/rest/tasks", "/a2a/double/rest/message:send"):
                answer = await http.post(f"{url}{path}", headers=headers)
                assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        async with client_of(f"{url}/a2a/double", token=TOKEN) as client:
            assert output_of(await send(client, {"n": 21})) == 42


ACCESS = """
[tokens.ada]
sha256 = "{ada}"

[tokens.bob]
sha256 = "{bob}"
calls = ["wait", "double", "*-public"]

[tokens.eve]
sha256 = "{eve}"
may = ["observe"]

[tokens.far]
sha256 = "{far}"
namespace = "far"
"""


async def test_users_of_the_access_file_see_only_their_own_tasks(tmp_path: Path) -> None:
    tokens = {name: f"{name}-" * 10 for name in ("ada", "bob", "eve", "far")}
    hashes = {name: agenthub.hash_of(token) for name, token in tokens.items()}
    (tmp_path / "access.toml").write_text(ACCESS.format(**hashes))
    (tmp_path / "access.toml").chmod(0o600)
    async with (
        world("--access", str(tmp_path / "access.toml")) as (_, url, _),
        client_of(f"{url}/a2a/wait", token=tokens["ada"]) as ada,
        client_of(f"{url}/a2a/wait", token=tokens["bob"]) as bob,
        httpx.AsyncClient(timeout=WAIT_S) as http,
    ):
        task = (await anext(ada.send_message(request(None, "m-1")))).task
        assert (await bob.list_tasks(pb.ListTasksRequest())).total_size == 0
        for attempt in (
            bob.get_task(pb.GetTaskRequest(id=task.id)),
            bob.cancel_task(pb.CancelTaskRequest(id=task.id)),
            anext(bob.subscribe(pb.SubscribeToTaskRequest(id=task.id))),
            anext(bob.send_message(request("x", task_id=task.id))),
        ):
            with pytest.raises(errors.TaskNotFoundError):
                await attempt
        assert (await anext(bob.send_message(request(None, "m-1")))).task.id != task.id
        for name, target, status in (
            ("bob", "echo", 403),
            ("bob", "@worker", 403),
            ("eve", "echo", 403),
            ("far", "echo", 401),
            ("ada", "echo", 200),
        ):
            headers = {"Authorization": f"Bearer {tokens[name]}", "A2A-Version": "1.0"}
            answer = await http.get(f"{url}/a2a/{target}/rest/tasks", headers=headers)
            assert answer.status_code == status, (name, target)
        headers = {"Authorization": f"Bearer {tokens['bob']}", "A2A-Version": "1.0"}
        answer = await http.post(f"{url}/a2a/echo%0A-public/rest/message:send", json=MESSAGE, headers=headers)
        assert answer.json()["task"]["status"]["state"] == "TASK_STATE_REJECTED", "a name is taken for another one"


async def test_tls_is_that_of_the_hub(tmp_path: Path) -> None:
    files = {"cert": CERTIFICATE, "key": KEY, "authority": AUTHORITY}
    paths = {name: private_file(tmp_path / f"{name}.pem", text) for name, text in files.items()}
    async with world("--tls-cert", paths["cert"], "--tls-key", paths["key"]) as (_, url, _):
        assert url.startswith("https://")
        url = url.replace("127.0.0.1", "localhost")
        context = ssl.create_default_context(cafile=paths["authority"])
        async with httpx.AsyncClient(timeout=WAIT_S, verify=context) as http:
            card = (await http.get(f"{url}/a2a/echo/.well-known/agent-card.json")).json()
            assert card["supportedInterfaces"][0]["url"] == f"{url}/a2a/echo/rpc"
            answer = await http.post(f"{url}/a2a/echo/rest/message:send", json=MESSAGE, headers={"A2A-Version": "1.0"})
            assert answer.json()["task"]["artifacts"][0]["parts"] == [{"text": "x"}]


async def test_foreign_hosts_and_web_pages_are_rejected() -> None:
    async with world("--allow-host", "example.org") as (_, url, _), httpx.AsyncClient(timeout=WAIT_S) as http:
        for headers, status in (
            ({}, 200),
            ({"Host": "localhost"}, 200),
            ({"Host": "example.org:443"}, 200),
            ({"Host": "evil.example"}, 403),
            ({"Origin": "https://evil.example"}, 403),
            ({"Origin": "null"}, 403),
        ):
            assert (await http.get(url, headers=headers)).status_code == status


MESSAGE = {"message": {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "x"}]}}


@pytest.mark.parametrize("binding", ["rpc", "rest"])
@pytest.mark.parametrize(
    "data",
    ["[" * 30_000 + "]" * 30_000, "1e400", '"\\ud800"', "9" * 5000, '{"a": NaN}', "[" * 60 + "]" * 60, '"\\u2028"'],
)
@pytest.mark.parametrize("field", ['"parts": [{{"data": {}}}]', '"parts": [{{"text": ""}}], "metadata": {{"x": {}}}'])
async def test_odd_json_is_answered_and_the_gateway_goes_on(binding: str, data: str, field: str) -> None:
    message = f'{{"message": {{"messageId": "m", "role": "ROLE_USER", {field.format(data)}}}}}'
    call = f'{{"jsonrpc": "2.0", "id": 1, "method": "SendMessage", "params": {message}}}'
    async with world() as (_, url, _), httpx.AsyncClient(timeout=WAIT_S, headers={"A2A-Version": "1.0"}) as http:
        path, body = ("rpc", call) if binding == "rpc" else ("rest/message:send", message)
        answer = await http.post(f"{url}/a2a/echo/{path}", content=body)
        assert answer.status_code in (200, 400, 500)
        async with client_of(f"{url}/a2a/double") as client:
            assert output_of(await send(client, {"n": 21})) == 42
        listed = await http.get(f"{url}/a2a/echo/rest/tasks?historyLength=5")
        assert listed.status_code == 200, "a message that was kept cannot be read"


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "1 2"])
async def test_broken_json_in_a_text_is_rejected(text: str) -> None:
    part = pb.Part(text=text, media_type="application/json")
    message = pb.Message(message_id="m", role=pb.ROLE_USER, parts=[part])
    async with world() as (_, url, _):
        async with client_of(f"{url}/a2a/echo") as client:
            task = pb.Task()
            async for event in client.send_message(pb.SendMessageRequest(message=message)):
                take(task, event)
            assert task.status.state == pb.TASK_STATE_REJECTED
        async with client_of(f"{url}/a2a/count") as client:
            message.task_id = (await send(client, None)).id
            message.message_id = "n"
            with pytest.raises(errors.InvalidParamsError, match="does not take this answer"):
                await anext(client.send_message(pb.SendMessageRequest(message=message)))


async def test_odd_paths_are_not_found() -> None:
    async with world() as (_, url, _), httpx.AsyncClient(timeout=WAIT_S) as http:
        for name in ("x" * 200, "%00", "%ff", "a%0Ab"):
            assert (await http.get(f"{url}/a2a/{name}/.well-known/agent-card.json")).status_code == 404
            answer = await http.post(
                f"{url}/a2a/{name}/rest/message:send", json=MESSAGE, headers={"A2A-Version": "1.0"}
            )
            assert answer.status_code == 200
            assert answer.json()["task"]["status"]["state"] == "TASK_STATE_REJECTED"
        for path in ("/a2a", "/a2a/", "/a2a/double", "/a2a/rpc", "//a2a/double/rpc", "/a2a/double/x/rpc", "/x/a2a/rpc"):
            assert (await http.post(f"{url}{path}", json={})).status_code in (404, 405)
        answer = await http.post(f"{url}/%612a/rest/message:send", json={}, headers={"A2A-Version": "1.0"})
        assert answer.status_code >= 400


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--host", "0.0.0.0"], "set AGENTHUB_A2A_TOKEN"),
        (["--port", "70000"], "--port must be"),
        (["--tls-key", "x"], "--tls-key needs --tls-cert"),
        (["--allow-push", "https://*/x"], "host without wildcards"),
        (["--allow-push", "https://example.org"], "and a path"),
        (["--access", "/nope"], "/nope"),
    ],
)
def test_wrong_options_are_wrong_usage(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("a2a", *argv) == 2
    assert text in capsys.readouterr().err


# Many at once


@pytest.mark.long
async def test_1000_tasks_of_50_clients_are_done_once_each() -> None:
    done: list[int] = []
    async with world(within_s=5 * WAIT_S) as (hub, url, agent):
        agent.capability("note")(lambda n: done.append(n) or n)
        await offered(hub, "note")

        async def client(number: int) -> list[int]:
            async with client_of(f"{url}/a2a/note", BINDINGS[number % 2], streaming=number % 3 > 0) as one:
                return [output_of(await send(one, {"n": n})) for n in range(number * 20, number * 20 + 20)]

        outputs = await asyncio.gather(*map(client, range(50)))
        assert sorted(done) == [n for output in outputs for n in output] == list(range(1000))


# docs/a2a.md and examples/a2a

PAGE = (ROOT / "docs" / "a2a.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "a2a"


async def output_of_command(*argv: str, answer: str = "") -> str:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    process = await asyncio.create_subprocess_exec(*argv, **pipes, cwd=ROOT)
    output, errors_of = await process.communicate(answer.encode())
    assert process.returncode == 0, errors_of
    return output.decode()


async def test_the_client_and_the_curl_of_the_page_greet_ada() -> None:
    (program,), curl = blocks(PAGE, "python"), blocks(PAGE, "sh")[1]
    async with asyncio.timeout(WAIT_S), HubServer(port=0) as hub:
        greeter = Agent("greeter", url=hub.url)
        greeter.capability("greet")(lambda name: f"Hello, {name}!")
        async with greeter, gateway(hub.url) as url:
            program, curl = (text.replace("http://127.0.0.1:8766", url) for text in (program, curl))
            assert await output_of_command(sys.executable, "-c", program) == "Hello, Ada!"
            if shutil.which("curl"):
                task = json.loads(await output_of_command("sh", "-c", curl))["task"]
                assert task["artifacts"][0]["parts"] == [{"text": "Hello, Ada!"}]


async def test_the_client_of_the_example_answers_the_agent_of_the_example() -> None:
    (agent,) = agenthub.load_agents(str(EXAMPLE / "reviewer_agent.py"))
    async with asyncio.timeout(WAIT_S), HubServer(port=0) as hub:
        agent.use_hub(hub)
        async with agent, gateway(hub.url) as url:
            command = [sys.executable, str(EXAMPLE / "client.py"), "review", '{"files": 3}', "--url", url]
            output = await output_of_command(*command, answer="develop\n")
            assert output == "main or develop? reviewed develop, 3 files\n"


def test_the_limits_on_the_page_are_those_of_the_options() -> None:
    args = options()
    for flag, shown in (
        (args.max_tasks, "10,000,"),
        (args.max_task_bytes / 2**20, "256 MiB"),
        (args.retention / 3600, "an hour"),
        (args.max_bytes / 2**20, "1 MiB"),
        (args.max_requests, "200 "),
        (args.max_connections, "2,000 "),
    ):
        assert shown in PAGE
        assert "an hour" in shown or float(re.sub(r"[^0-9]", "", shown)) == flag


def test_the_module_has_at_most_400_lines() -> None:
    assert len(Path(agenthub_a2a.__file__).read_text(encoding="utf-8").splitlines()) <= 400
