"""Section 8, the SDK: questions and answers, streams, traces, over the in-memory link and over WebSockets alike."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import agenthub
from agenthub import Agent, HubServer, HubSettings, LocalHub, Progress, Refused, Task, TaskFailed, TaskQuestion
from tests.support import WAIT_S, hub_process, raw_client
from tests.test_agent import (
    At,
    Wire,
    _nothing_is_left_over,  # noqa: F401  # a fixture
    _quick_reconnects,  # noqa: F401  # a fixture
    at,
    eventually,
    failure_of,
    soon,
    tasks_of,
    working,
)

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(params=["in memory", "over WebSockets"])
async def hub(request: pytest.FixtureRequest) -> AsyncIterator[LocalHub]:
    kind: Any = LocalHub if request.param == "in memory" else functools.partial(HubServer, port=0)
    async with kind() as hub:
        yield hub


@pytest.fixture
def wire(hub: LocalHub) -> Wire:
    return Wire(hub)


@contextlib.asynccontextmanager
async def couple(worker_at: Any, requester_at: Any, *functions: Callable[..., Any]) -> AsyncIterator[Agent]:
    """Run a worker with these capabilities, each over its own connection, and yield a requester."""
    worker = Agent("worker", **at(worker_at))
    for function in functions:
        worker.capability(function)
    async with worker, Agent("requester", **at(requester_at)) as me:
        yield me


async def choose(task: Task) -> str:
    """A handler that asks one question."""
    return f"merged into {await task.ask('main or develop?', Literal['main', 'develop'])}"


async def question_of(handle: agenthub.TaskHandle) -> TaskQuestion:
    await eventually(lambda: handle.question is not None)
    assert handle.question is not None
    return handle.question


# Questions and answers.


@pytest.mark.parametrize("kind", ["plain", "async", "a lambda that returns a coroutine"])
async def test_question_of_a_handler_is_answered_by_on_question(hub: LocalHub, kind: str) -> None:
    asked = []

    def plain(question: TaskQuestion) -> str:
        asked.append(question)
        return "develop"

    async def coroutine(question: TaskQuestion) -> str:
        return plain(question)

    answers = {"plain": plain, "async": coroutine}
    async with working(hub, choose) as me:
        on_question = answers.get(kind, lambda question: coroutine(question))
        assert await soon(me.delegate("choose", on_question=on_question)) == "merged into develop"
    assert asked == [TaskQuestion("main or develop?", {"enum": ["main", "develop"], "type": "string"}, 1)]


async def test_handle_shows_the_question_and_takes_the_answer(hub: LocalHub) -> None:
    async with working(hub, choose) as me:
        handle = await me.submit("choose", answers=True)
        question = await question_of(handle)
        assert (question.text, question.ask) == ("main or develop?", 1)
        await handle.answer("main")
        assert handle.question is None
        assert await soon(handle.result()) == "merged into main"


async def test_events_of_a_handle_are_progress_and_questions_in_order(hub: LocalHub) -> None:
    async def work(task: Task) -> Any:
        task.progress(0.25, "begun")
        answers = [await task.ask("first?"), await task.ask("second?")]
        task.progress(0.75)
        return answers

    events: list[Any] = []
    async with working(hub, work) as me:
        handle = await me.submit("work", answers=True)
        async for event in handle:
            events.append(event)
            if isinstance(event, TaskQuestion):
                await handle.answer({"to": event.text})
        assert await handle.result() == [{"to": "first?"}, {"to": "second?"}]
    assert events == [
        Progress(0.25, "begun", 1),
        TaskQuestion("first?", None, 1),
        TaskQuestion("second?", None, 2),
        Progress(0.75, None, 2),
    ]


async def test_plain_handler_asks_through_task_run(hub: LocalHub) -> None:
    def work(task: Task) -> Any:
        return [task.run(task.ask("one?", {"type": "integer"})), task.run(task.ask("two?"))]

    async with working(hub, work) as me:
        assert await soon(me.delegate("work", on_question=lambda question: question.ask)) == [1, 2]


async def test_answer_that_is_not_json_is_a_value_error(hub: LocalHub) -> None:
    async def work(task: Task) -> Any:
        return await task.ask("?")

    async with working(hub, work) as me:
        handle = await me.submit("work", answers=True)
        await question_of(handle)
        with pytest.raises(ValueError, match="not JSON"):
            await handle.answer([1, b"2"])
        await handle.answer((1, 2))
        assert await soon(handle.result()) == [1, 2]


@pytest.mark.parametrize("answer", [None, False, 0, "", [], {}, {"deep": [None]}, "ä\u2028"])
async def test_answer_is_any_json(hub: LocalHub, answer: Any) -> None:
    async def work(task: Task) -> Any:
        return [await task.ask("?")]

    async with working(hub, work) as me:
        assert await soon(me.delegate("work", on_question=lambda question: answer)) == [answer]


async def test_question_to_nobody_fails_at_once(hub: LocalHub) -> None:
    async def may_ask(task: Task) -> bool:
        return task.answers

    async with working(hub, choose, may_ask) as me:
        code, text = await failure_of(me.delegate("choose"))
        assert (code, text) == (
            "no_answers",
            "the requester cannot be asked: it delegated the task without `answers` or `on_question`",
        )
        assert await me.delegate("may_ask") is False
        assert await me.delegate("may_ask", answers=True) is True


async def test_answer_that_does_not_fit_is_refused_where_it_is_given(hub: LocalHub) -> None:
    async with working(hub, choose) as me:
        handle = await me.submit("choose", answers=True)
        await question_of(handle)
        with pytest.raises(ValueError, match=r'answer: must be one of \["main", "develop"\]'):
            await handle.answer("trunk")
        assert handle.question is not None
        await handle.answer("main")
        assert await soon(handle.result()) == "merged into main"


async def test_answer_of_another_client_is_checked_by_the_handler() -> None:
    async with HubServer(port=0) as hub, working(hub, choose), raw_client(hub.url) as raw:
        await raw.register("raw")
        await raw.delegate("t", capability="choose", answers=True)
        question = await raw.message("status", ask=1)
        assert question["question"]["text"] == "main or develop?"
        await raw.request(type="status", task_id="t", ask=1, answer="trunk")
        outcome = await raw.message("result")
    assert outcome["error"] == {"code": "invalid_input", "message": 'answer: must be one of ["main", "develop"]'}


async def test_on_question_that_fails_cancels_the_task_and_is_its_result(hub: LocalHub) -> None:
    def answer(question: TaskQuestion) -> str:
        raise KeyError("branch")

    async with working(hub, choose) as me:
        with pytest.raises(TaskFailed, match="on_question: KeyError: 'branch'") as caught:
            await soon(me.delegate("choose", on_question=answer))
        assert isinstance(caught.value.__cause__, KeyError)
        await eventually(lambda: tasks_of(hub) == {"failed": 1})

        with pytest.raises(TaskFailed, match="on_question: ValueError: answer: must be one of"):
            await soon(me.delegate("choose", on_question=lambda question: "trunk"))


async def test_answer_to_no_question_is_refused(hub: LocalHub) -> None:
    async with working(hub, choose) as me:
        handle = await me.submit("choose", answers=True)
        question = await question_of(handle)
        with pytest.raises(Refused, match="no question of this task waits") as caught:
            await handle.answer("main", ask=question.ask + 1)
        assert caught.value.code == "no_question"
        first, second = await asyncio.gather(
            handle.answer("main"), handle.answer("develop", question.ask), return_exceptions=True
        )
        assert first is None
        assert isinstance(second, Refused)
        assert second.code == "no_question"
        assert await soon(handle.result()) == "merged into main"
        with pytest.raises(Refused):
            await handle.answer("main")


async def test_question_that_is_given_up_is_replaced_by_the_next(hub: LocalHub) -> None:
    async def work(task: Task) -> Any:
        asking = asyncio.create_task(task.ask("first?"))
        await asyncio.sleep(0)
        await eventually(lambda: task._execution.question is not None)
        asking.cancel()
        return await task.ask("second?")

    async with working(hub, work) as me:
        handle = await me.submit("work", answers=True)
        await eventually(lambda: handle.question is not None and handle.question.text == "second?")
        await handle.answer(2)
        assert await soon(handle.result()) == 2


async def test_questions_of_one_task_are_asked_one_after_the_other(hub: LocalHub) -> None:
    async def work(task: Task) -> Any:
        return await asyncio.gather(*(task.ask(f"{number}?") for number in range(5)))

    async with working(hub, work) as me:
        assert await soon(me.delegate("work", on_question=lambda one: one.text)) == [
            f"{number}?" for number in range(5)
        ]


async def test_thread_that_waits_for_an_answer_returns_when_its_task_ends(hub: LocalHub) -> None:
    seen: list[str] = []

    def work(task: Task) -> None:
        try:
            task.run(task.ask("?"))
        except TaskFailed as error:
            seen.append(error.code)
        try:
            task.run(task.ask("again?"))
        except TaskFailed as error:
            seen.append(error.code)

    async with working(hub, work) as me:
        handle = await me.submit("work", answers=True)
        await question_of(handle)
        await handle.cancel()
        assert handle.question is None or handle.done is False
        await eventually(lambda: seen == ["task_over", "task_over"])
        await eventually(lambda: handle.question is None)


@pytest.mark.parametrize(
    ("text", "schema", "reason"),
    [
        ("x" * 65_537, None, "must have at most 65536 characters"),
        ("\0", None, "may not hold the character NUL"),
        (5, None, "must be of type string"),
        ("?", {"enum": ["x" * 70_000]}, "is larger than 65536 bytes"),
        ("?", {"enum": [object()]}, "is not JSON"),
        ("?", bytes, "bytes is not JSON"),
    ],
)
async def test_bad_question_is_a_value_error(text: Any, schema: Any, reason: str) -> None:
    async def work(task: Task) -> str:
        with pytest.raises(ValueError, match=reason):
            await task.ask(text, schema)
        return "refused"

    async with LocalHub() as hub, working(hub, work) as me:
        assert await soon(me.delegate("work", answers=True)) == "refused"


async def test_question_is_relayed_through_a_chain(hub: LocalHub) -> None:
    async def middle(task: Task) -> Any:
        return await task.delegate(
            "choose", on_question=lambda one: task.ask(f"{task.capability}: {one.text}", one.schema)
        )

    texts = []

    def answer(question: TaskQuestion) -> str:
        texts.append(question.text)
        return "main"

    async with working(hub, choose), working(hub, middle) as me:
        assert await soon(me.delegate("middle", on_question=answer)) == "merged into main"
        assert texts == ["middle: main or develop?"]
        _, text = await failure_of(me.delegate("middle"))
        assert "on_question: the requester cannot be asked" in text


# Questions over lost connections, lost workers and lost hubs.


async def test_worker_asks_again_after_a_reconnect_and_gets_the_answer_given_meanwhile(
    hub: LocalHub, wire: Wire
) -> None:
    async with couple(wire, hub, choose) as me:
        handle = await me.submit("choose", answers=True)
        wire.lets_through = lambda message: getattr(message, "ask", None) is None  # The reply with its number is lost.
        await question_of(handle)
        wire.cut()
        await handle.answer("develop")
        wire.lets_through = lambda message: True
        wire.restore()
        assert await soon(handle.result()) == "merged into develop"
        report = await me.status(handle.task_id)
        assert [step.event for step in report.history or ()].count("asked") == 1


async def test_question_lost_before_the_hub_read_it_is_sent_again(hub: LocalHub, wire: Wire) -> None:
    begun, may_ask = asyncio.Event(), asyncio.Event()

    async def work(task: Task) -> Any:
        begun.set()
        await may_ask.wait()
        return await task.ask("?")

    async with couple(wire, hub, work) as me:
        handle = await me.submit("work", answers=True)
        await soon(begun.wait())
        wire.cut()
        may_ask.set()
        await asyncio.sleep(0.01)
        assert handle.question is None
        wire.restore()
        await question_of(handle)
        await handle.answer(5)
        assert await soon(handle.result()) == 5


async def test_answer_to_the_question_before_is_not_taken_for_the_next_one(hub: LocalHub, wire: Wire) -> None:
    async def work(task: Task) -> Any:
        return [await task.ask("first?"), await task.ask("second?")]

    async with couple(wire, hub, work) as me:
        handle = await me.submit("work", answers=True)
        await question_of(handle)
        # The hub has answered the first question when it is cut, and delivers that again before it reads the second.
        wire.lets_through = lambda message: not (isinstance(message, agenthub.StatusReply) and message.ask == 2)
        await handle.answer(1)
        await eventually(lambda: handle.question is not None)
        wire.cut()
        wire.lets_through = lambda message: True
        wire.restore()
        await handle.answer(2)
        assert await soon(handle.result()) == [1, 2]


async def test_requester_gets_a_question_once_though_it_is_delivered_after_each_reconnect(
    hub: LocalHub, wire: Wire
) -> None:
    asked = []

    async def answer(question: TaskQuestion) -> str:
        asked.append(question)
        for count in (2, 3):
            wire.cut(for_now=True)
            await eventually(lambda count=count: wire.opened_count == count)
            await me.connected()
            await me.status()
        return "main"

    async with couple(hub, wire, choose) as me:
        assert await soon(me.delegate("choose", on_question=answer)) == "merged into main"
    assert len(asked) == 1


async def test_answer_whose_reply_was_lost_is_sent_again_and_counts_once(hub: LocalHub, wire: Wire) -> None:
    async def work(task: Task) -> Any:
        return [await task.ask("first?"), await task.ask("second?")]

    async with couple(hub, wire, work) as me:
        handle = await me.submit("work", answers=True)
        await question_of(handle)
        wire.lets_through = lambda message: getattr(message, "reply_to", None) is None
        answering = asyncio.create_task(handle.answer(1))
        await eventually(lambda: handle.question is not None and handle.question.ask == 2)
        wire.cut(for_now=True)
        wire.lets_through = lambda message: True
        await soon(answering)
        assert handle.question is not None
        await handle.answer(2)
        assert await soon(handle.result()) == [1, 2]


async def test_new_attempt_drops_the_question_and_asks_its_own(hub: LocalHub, wire: Wire) -> None:
    async with Agent("requester", **at(hub)) as me:
        first = Agent("first", **at(wire))
        first.capability(choose)
        await first.start()
        cancelled: list[bool] = []

        async def answer(question: TaskQuestion) -> str:
            if question.ask == 1:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    cancelled.append(True)
                    raise
            return "main"

        handle = await me.submit("choose", max_retries=1, on_question=answer)
        question = await question_of(handle)
        await first.stop()
        second = Agent("second", **at(hub))
        second.capability(choose)
        async with second:
            assert await soon(handle.result()) == "merged into main"
        assert cancelled == [True]
        assert (await me.status(handle.task_id)).attempt == 2
        with pytest.raises(Refused):
            await handle.answer("main", question.ask)


async def test_hub_that_lost_the_task_gets_it_again_and_numbers_its_questions_from_one() -> None:
    async with HubServer(port=0) as first:
        worker, me = Agent("worker", url=first.url), Agent("requester", url=first.url)
        worker.capability(choose)
        for agent in (worker, me):
            agent.use_hub(At(first.url))
        async with worker, me:
            handle = await me.submit("choose", answers=True, max_retries=1)
            lost = await question_of(handle)
            port = first.port
            await first.stop()
            async with HubServer(port=port):
                await eventually(lambda: handle.question is not None and handle.question is not lost)
                assert handle.question == lost  # Its fields are the same.
                await handle.answer("main")
                assert await soon(handle.result()) == "merged into main"


async def test_task_of_a_lost_hub_begins_again_while_its_former_handler_is_being_cancelled() -> None:
    """The new hub counts its attempts from 1 again: it is another attempt, not the same one delivered twice."""
    begun = []

    async def work(task: Task) -> int:
        begun.append(task.attempt)
        if len(begun) == 1:
            await asyncio.Event().wait()
        return len(begun)

    async with LocalHub() as first, LocalHub() as second:
        near_worker, near_requester = Wire(first), Wire(first)
        async with couple(near_worker, near_requester, work) as me:
            handle = await me.submit("work", max_retries=1)
            await eventually(lambda: begun)
            for wire in (near_requester, near_worker):  # In this order, the worker gets the task with its registration.
                wire.hub = second
                wire.cut(for_now=True)
                await eventually(lambda: sum(tasks_of(second).values()) == 1)
            assert await soon(handle.result()) == 2
    assert begun == [1, 1]


async def test_task_whose_hub_is_lost_without_a_retry_left_fails_with_hub_lost() -> None:
    async with HubServer(port=0) as first:
        worker, me = Agent("worker", url=first.url), Agent("requester", url=first.url)
        worker.capability(choose)
        async with worker, me:
            handle = await me.submit("choose", answers=True)
            await question_of(handle)
            port = first.port
            await first.stop()
            async with HubServer(port=port):
                assert (await failure_of(handle.result()))[0] == "hub_lost"
                assert handle.question is None


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize("answered", ["before the kill", "while there is no hub", "after the restart"])
async def test_hub_killed_between_question_and_answer_goes_on_from_its_journal(tmp_path: Path, answered: str) -> None:
    """Also: progress after the restart arrives, though the hub counts it from 1 again."""
    release = asyncio.Event()

    async def work(task: Task) -> Any:
        for number in range(3):
            task.progress(detail=number)
        answer = await task.ask("?")
        await release.wait()
        task.progress(detail="goes on")
        return [answer, await task.ask("and now?")]

    options = ("--port", str(free_port()), "--db", str(tmp_path / "hub.db"))
    with contextlib.ExitStack() as stack:
        url, process = stack.enter_context(hub_process(*options))
        worker, me = Agent("worker", url=url), Agent("requester", url=url)
        worker.capability(work)
        async with worker, me:
            handle = await me.submit("work", answers=True)
            await question_of(handle)
            if answered == "before the kill":
                await handle.answer(1)
            process.kill()
            await asyncio.to_thread(process.wait)
            await eventually(lambda: not me.is_online)
            answering = None
            if answered == "while there is no hub":
                answering = asyncio.create_task(handle.answer(1))
            await asyncio.to_thread(stack.enter_context, hub_process(*options))
            await soon(asyncio.gather(me.connected(), worker.connected()))
            if answering is not None:
                await soon(answering)
            elif answered == "after the restart":
                await handle.answer(1)
            release.set()
            await eventually(lambda: handle.question is not None and handle.question.text == "and now?")
            await handle.answer(2)
            assert await soon(handle.result()) == [1, 2]
            details = [event.detail async for event in handle if isinstance(event, Progress)]
            assert details == [0, 1, 2, "goes on"]
            report = await me.status(handle.task_id)
            assert [step.event for step in report.history or ()].count("asked") == 2


async def test_hub_that_knows_no_questions_is_named() -> None:
    """A question that is sent to another hub than the one that handed out the task, after a failover."""
    async with LocalHub() as hub, Agent("worker", hub=hub) as worker:
        question = agenthub.OpenQuestion(worker._started(), "t", agenthub.Question("?"))
        question._on_reply(agenthub.StatusReply(reply_to="1", task_id="t", state="in_progress"))
        with pytest.raises(TaskFailed, match="this hub passes no questions on") as caught:
            await question.answer
        assert caught.value.code == "no_answers"


# Streams.


async def test_stream_and_its_questions_go_through_a_chain_piece_by_piece(hub: LocalHub) -> None:
    seen = asyncio.Event()

    async def write(task: Task) -> AsyncIterator[str]:
        yield f"on {await task.ask('main or develop?', Literal['main', 'develop'])}: "
        await seen.wait()  # The whole chain passes a piece on before the next one is made.
        yield "done"

    async def middle(task: Task) -> AsyncIterator[str]:
        async for piece in task.stream("write", on_question=lambda one: task.ask(one.text, one.schema)):
            yield piece.upper()

    got = []
    async with working(hub, write), working(hub, middle) as me, asyncio.timeout(WAIT_S):
        async for piece in me.stream("middle", on_question=lambda one: "main"):
            got.append(piece)
            seen.set()
    assert got == ["ON MAIN: ", "DONE"]


PIECES = st.booleans() | st.integers(-9, 9) | st.text("aä\n", max_size=3) | st.just("x" * 3000) | st.lists(st.none())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pieces=st.lists(PIECES, max_size=6) | st.lists(st.text("aä", max_size=3), max_size=6),
    ends=st.sampled_from(["returns", "returns a value", "raises", "raises TaskFailed", "is cancelled"]),
    is_async=st.booleans(),
)
def test_any_generator_streams_a_beginning_of_its_output_or_fails_as_it_did(
    pieces: list[Any], ends: str, is_async: bool
) -> None:
    closed: list[bool] = []

    def end() -> Any:
        if ends == "raises":
            raise KeyError("x")
        if ends == "raises TaskFailed":
            raise TaskFailed("out of ink", code="ink")
        return {"own": 1} if ends == "returns a value" else None

    def work() -> Any:
        try:
            yield from pieces
            while ends == "is cancelled":
                threading.Event().wait(0.01)
                yield 0
            return end()
        finally:
            closed.append(True)

    async def work_async() -> Any:
        try:
            for piece in pieces:
                yield piece
            if ends == "is cancelled":
                await asyncio.Event().wait()
            end()
        finally:
            closed.append(True)

    async def story() -> None:
        settings = HubSettings(message_bytes_max=8192)
        async with LocalHub(settings) as hub, working(hub, work_async if is_async else work) as me:
            handle = await me.submit("work_async" if is_async else "work")
            if ends == "is cancelled":
                await handle.cancel()
            got: list[Any] = []
            try:
                async for piece in handle.pieces():
                    got.append(piece)
                failure = None
            except TaskFailed as error:
                failure = error.code
            await eventually(lambda: closed or ends == "is cancelled")
            check(got, failure, handle)

    def check(got: list[Any], failure: str | None, handle: agenthub.TaskHandle) -> None:
        is_text = all(isinstance(piece, str) for piece in pieces)
        size = sum(len(json.dumps(piece, ensure_ascii=False).encode()) for piece in pieces)
        expected = {"raises": "failed", "raises TaskFailed": "ink", "is cancelled": "cancelled"}.get(ends)
        if size > 8192 and ends != "is cancelled":
            expected = "too_large"
        assert failure == expected or (size > 7000 and failure == "too_large")
        overridden = ends == "returns a value" and not is_async
        if not pieces and overridden and failure is None:  # An output without pieces is one piece.
            assert got == [{"own": 1}]
            return
        flat = "".join(got) if is_text else got
        if is_text and not ("".join(pieces)).startswith(flat if isinstance(flat, str) else ""):
            raise AssertionError(f"{got} is no beginning of {pieces}")
        if failure is None:
            assert handle.outcome is not None
            output = {"own": 1} if overridden else "".join(pieces) if is_text and pieces else pieces
            assert handle.outcome.output in (output, "" if not pieces else output)
            if is_text and not overridden:
                assert flat == "".join(pieces)

    asyncio.run(story())


# Traces.


async def test_trace_goes_to_the_worker_and_on_to_its_subtasks(hub: LocalHub) -> None:
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=1"}

    async def seen(task: Task) -> dict[str, str]:
        return task.trace

    async def middle(task: Task) -> Any:
        handle = await task.submit("seen", trace={"own": "1"})
        return [await task.delegate("seen"), await handle.result()]

    async with working(hub, seen), working(hub, middle) as me:
        assert await me.delegate("seen") == {}
        assert await me.delegate("middle", trace=trace) == [trace, {"own": "1"}]


@pytest.mark.parametrize("trace", [{"a": 1}, {"a": "x" * 2048}, ["a"], {"a": "\0"}])
async def test_bad_trace_is_a_value_error(trace: Any) -> None:
    async with LocalHub() as hub, Agent("me", hub=hub) as me:
        with pytest.raises(ValueError, match="trace"):
            await me.delegate("seen", trace=trace)


# JSON Schemas.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.sampled_from(["", "a", "main", "ä"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
KINDS = st.sampled_from(["null", "boolean", "object", "array", "number", "integer", "string"])
LENGTHS = st.integers(0, 3)


def schemas(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(inner, min_size=1, max_size=3)
    named = st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    return st.fixed_dictionaries(
        {},
        optional={
            "type": KINDS | st.lists(KINDS, min_size=1, max_size=3, unique=True),
            "enum": st.lists(VALUES, min_size=1, max_size=3),
            "const": VALUES,
            "minimum": st.integers(-5, 5),
            "maximum": st.integers(-5, 5),
            "exclusiveMinimum": st.integers(-5, 5),
            "exclusiveMaximum": st.integers(-5, 5),
            **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), LENGTHS),
            **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), lists),
            "items": inner,
            "properties": named,
            "additionalProperties": inner,
            "required": st.lists(st.sampled_from("abc"), max_size=2, unique=True),
            "$ref": st.sampled_from(["#/$defs/one", "#/$defs/two"]),
        },
    )


SCHEMA_KEYWORDS = [
    *agenthub.SCHEMA_LIMITS,
    *("type", "enum", "const", "anyOf", "oneOf", "allOf", "prefixItems", "items", "properties", "additionalProperties"),
    *("required", "$ref"),
]
SCHEMAS = st.recursive(st.booleans(), schemas, max_leaves=3)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # Machines may be busy.
@given(value=VALUES, schema=schemas(SCHEMAS), one=SCHEMAS, two=st.just({"type": "string"}))
def test_schemas_mean_what_jsonschema_says(value: Any, schema: dict[str, Any], one: Any, two: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")

    def has_reference(part: Any) -> bool:
        return "$ref" in json.dumps(part)

    schema = {**schema, "$defs": {"one": one if not has_reference(one) else True, "two": two}}
    try:
        agenthub.SchemaCheck(schema).check(value)
        fits = True
    except agenthub.ValidationError:
        fits = False
    assert fits == jsonschema.Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
        {
            "$defs": {str(n): {"allOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(60)},
            "$ref": "#/$defs/0",
        },
    ],
)
def test_schema_that_never_ends_is_given_up(schema: Any) -> None:
    with pytest.raises(agenthub.ValidationError, match="branches or refers to itself too often"):
        agenthub.SchemaCheck(schema).check("x")


@settings(deadline=None)
@given(value=VALUES, keyword=st.sampled_from(SCHEMA_KEYWORDS), given_for_it=VALUES)
def test_malformed_schema_accepts_or_rejects_and_nothing_else(value: Any, keyword: str, given_for_it: Any) -> None:
    with contextlib.suppress(agenthub.ValidationError):
        assert agenthub.SchemaCheck({keyword: given_for_it}).check(value) is value
