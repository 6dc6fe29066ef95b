"""Section 8, the SDK: generators as handlers, and the pieces of an output at both ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import agenthub
from agenthub import Agent, HubServer, LocalHub, Piece, Progress, Task, TaskFailed
from tests.test_agent import (  # noqa: F401  # fixtures
    Wire,
    _nothing_is_left_over,
    _quick_reconnects,
    eventually,
    hub,
    kind,
    soon,
    working,
)

pytestmark = pytest.mark.filterwarnings("error")


async def all_of(pieces: AsyncIterator[Any]) -> list[Any]:
    async with asyncio.timeout(10):
        return [piece async for piece in pieces]


def texts(count: int = 3) -> Iterator[str]:
    for number in range(count):
        yield f"<{number}>"


async def texts_async(count: int = 3) -> AsyncIterator[str]:
    for number in range(count):
        yield f"<{number}>"


@pytest.mark.parametrize("function", [texts, texts_async])
async def test_generator_streams_and_its_output_is_the_whole(hub: LocalHub, function: Any) -> None:  # noqa: F811
    async with working(hub, function) as me:
        assert await soon(me.delegate(function.__name__)) == "<0><1><2>"
        assert "".join(await all_of(me.stream(function.__name__, {"count": 100}))) == "".join(texts(100))
        offered = (await me.discover(function.__name__))[0].capabilities[0]
        assert offered.output_schema == {"type": "string"}


async def test_pieces_come_before_the_output(hub: LocalHub) -> None:  # noqa: F811
    go_on = asyncio.Event()

    async def write() -> AsyncIterator[str]:
        yield "Once"
        await go_on.wait()
        yield " upon"

    async with working(hub, write) as me:
        handle = await soon(me.submit("write"))
        updates = aiter(handle)
        assert await soon(anext(updates)) == Piece("Once", 1)
        assert not handle.done
        go_on.set()
        assert await soon(anext(updates)) == Piece(" upon", 2)
        assert await soon(handle.result()) == "Once upon"


async def test_values_are_a_list_and_each_is_a_piece(hub: LocalHub) -> None:  # noqa: F811
    def find() -> Iterator[dict[str, int]]:
        yield {"n": 1}
        yield {"n": 2}

    async with working(hub, find) as me:
        assert await all_of(me.stream("find")) == [{"n": 1}, {"n": 2}]
        assert await soon(me.delegate("find")) == [{"n": 1}, {"n": 2}]
        offered = (await me.discover("find"))[0].capabilities[0]
        assert offered.output_schema == {
            "type": "array",
            "items": {"type": "object", "additionalProperties": {"type": "integer"}},
        }


async def test_texts_among_values_are_items_of_the_list(hub: LocalHub) -> None:  # noqa: F811
    async def mixed() -> AsyncIterator[Any]:
        for piece in ("a", "b", 1, None, "c"):
            yield piece

    async with working(hub, mixed) as me:
        assert await soon(me.delegate("mixed")) == ["a", "b", 1, None, "c"]
        assert (await all_of(me.stream("mixed")))[:1] == ["a"]


@pytest.mark.parametrize(
    ("annotation", "output"), [(Iterator[str], ""), (Any, ""), (Iterator[dict[str, Any]], []), (Iterator[int], [])]
)
async def test_generator_without_a_piece(hub: LocalHub, annotation: Any, output: Any) -> None:  # noqa: F811
    def nothing() -> Any:
        yield from ()

    nothing.__annotations__ = {"return": annotation}
    async with working(hub, nothing) as me:
        assert await soon(me.delegate("nothing")) == output
        assert await all_of(me.stream("nothing")) == ([output] if output == "" else [])


async def test_return_of_a_plain_generator_is_the_output(hub: LocalHub) -> None:  # noqa: F811
    def count(to: int) -> Generator[int, None, dict[str, int]]:
        yield from range(to)
        return {"to": to}

    async with working(hub, count) as me:
        assert await soon(me.delegate("count", {"to": 3})) == {"to": 3}
        assert await all_of(me.stream("count", {"to": 3})) == [0, 1, 2]


async def test_output_without_pieces_is_streamed_whole(hub: LocalHub) -> None:  # noqa: F811
    async def echo(x: Any) -> Any:
        return x

    async with working(hub, echo) as me:
        for output, pieces in [("all", ["all"]), ([1, 2], [1, 2]), ({"a": 1}, [{"a": 1}]), (None, []), (0, [0])]:
            assert await all_of(me.stream("echo", {"x": output})) == pieces


@pytest.mark.parametrize("is_async", [True, False])
async def test_exception_in_the_middle_fails_the_task(hub: LocalHub, is_async: bool) -> None:  # noqa: F811
    def break_off() -> Iterator[str]:
        yield "a"
        raise TaskFailed("out of ink", code="ink")

    async def break_off_async() -> AsyncIterator[str]:
        yield "a"
        raise TaskFailed("out of ink", code="ink")

    got = []
    async with working(hub, break_off_async if is_async else break_off) as me:
        handle = await soon(me.submit("break_off_async" if is_async else "break_off"))
        got += [update.piece async for update in handle]
        with pytest.raises(TaskFailed, match="out of ink") as failed:
            await all_of(handle.pieces())
        assert (got, failed.value.code) == (["a"], "ink")


@pytest.mark.parametrize("is_async", [True, False])
async def test_leaving_the_loop_cancels_the_task_and_closes_the_generator(hub: LocalHub, is_async: bool) -> None:  # noqa: F811
    closed = threading.Event()

    def count() -> Iterator[int]:
        try:
            number = 0
            while True:
                yield (number := number + 1)
                threading.Event().wait(0.01)
        finally:
            closed.set()

    async def count_async() -> AsyncIterator[int]:
        try:
            number = 0
            while True:
                yield (number := number + 1)
                await asyncio.sleep(0.01)
        finally:
            closed.set()

    async with working(hub, count_async if is_async else count) as me:
        async for number in me.stream("count_async" if is_async else "count", ttl=60):
            if number == 3:
                break
        await eventually(closed.is_set)
        await eventually(lambda: hub.hub.summary()["ended"]["failed"] == 1)


async def test_texts_are_sent_together(hub: LocalHub) -> None:  # noqa: F811
    async def write() -> AsyncIterator[str]:
        for _ in range(1000):
            yield "word "
            await asyncio.sleep(0)

    async with working(hub, write) as me:
        pieces = await all_of(me.stream("write"))
        assert "".join(pieces) == "word " * 1000
        assert len(pieces) < 100


async def test_piece_that_is_not_json_fails_the_task(hub: LocalHub) -> None:  # noqa: F811
    def bad() -> Iterator[Any]:
        yield object()

    async with working(hub, bad) as me:
        with pytest.raises(TaskFailed, match="output: holds a object, which is not JSON"):
            await soon(me.delegate("bad"))


async def test_handler_that_returns_its_output_sends_pieces_of_it(hub: LocalHub) -> None:  # noqa: F811
    async def write(task: Task) -> str:
        for piece in ("Once", None, " upon"):
            task.send_piece(piece)
        with pytest.raises(ValueError, match="not JSON"):
            task.send_piece(object())
        return "Once upon a time"

    async with working(hub, write) as me:
        handle = await me.submit("write")
        news = [one.piece async for one in handle if isinstance(one, Piece)]
        assert (news, await soon(handle.result())) == (["Once", " upon"], "Once upon a time")
        assert await all_of(me.stream("write")) == ["Once", " upon", " a time"]


async def test_pieces_that_a_handler_sends_stop_where_the_buffer_is_full(hub: LocalHub) -> None:  # noqa: F811
    async def write(task: Task) -> str:
        for piece in "abc":
            link: Any = task._connection.session and task._connection.session._link
            link.writable.clear() if piece == "b" else link.writable.set()
            task.send_piece(piece)
        return "abc"

    async with working(hub, write) as me:
        assert await all_of(me.stream("write")) == ["a", "bc"]


async def test_output_that_grows_too_large_is_stopped(hub: LocalHub) -> None:  # noqa: F811
    made = 0

    async def endless() -> AsyncIterator[str]:
        nonlocal made
        while True:
            made += 1
            yield "x" * 100_000
            await asyncio.sleep(0)

    async with working(hub, endless) as me:
        with pytest.raises(TaskFailed, match="the output is larger than 1048576 bytes") as failed:
            await soon(me.delegate("endless"))
        assert failed.value.code == "too_large"
        assert made < 20


async def test_progress_and_pieces_are_counted_together(hub: LocalHub) -> None:  # noqa: F811
    async def work(task: Task) -> AsyncIterator[int]:
        yield 1
        task.progress(0.5)
        yield 2

    async with working(hub, work) as me:
        handle = await soon(me.submit("work"))
        updates = [update async for update in handle]
        assert {type(update) for update in updates} == {Progress, Piece}
        assert [update.seq for update in updates] == [1, 2, 3]
        assert await all_of(me.stream("work")) == [1, 2]


async def test_hub_that_passes_no_pieces_on_gets_none(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(agenthub, "FEATURES", [])
    async with working(hub, texts) as me:
        assert await all_of(me.stream("texts")) == ["<0><1><2>"]
        assert (await me.status()).hub is not None


# Lost connections


async def test_rest_comes_with_the_output_when_the_requester_was_away(hub: LocalHub) -> None:  # noqa: F811
    go_on = asyncio.Event()

    async def write() -> AsyncIterator[str]:
        yield "a"
        await go_on.wait()
        for letter in "bcd":
            yield letter
            await asyncio.sleep(0.1)

    worker = Agent("worker", hub=hub) if not isinstance(hub, HubServer) else Agent("worker", url=hub.url)
    worker.capability(write)
    wire = Wire(hub)
    got = []
    async with worker, Agent("requester", hub=wire) as me:
        async for piece in me.stream("write"):
            got.append(piece)
            if piece == "a":
                wire.cut()
                go_on.set()
                await eventually(lambda: hub.hub.tasks.ended[agenthub.TaskState.COMPLETED] == 1)
                wire.restore()
    assert (got[0], "".join(got)) == ("a", "abcd")


@pytest.mark.parametrize("yields", [True, False])
async def test_rest_comes_with_the_output_when_the_worker_was_away(hub: LocalHub, yields: bool) -> None:  # noqa: F811
    go_on = asyncio.Event()

    async def write() -> AsyncIterator[str]:
        yield "a"
        await go_on.wait()
        for letter in "bcd":
            yield letter

    async def send(task: Task) -> str:
        task.send_piece("a")
        await go_on.wait()
        for letter in "bcd":
            task.send_piece(letter)
        return "abcd"

    wire = Wire(hub)
    worker = Agent("worker", hub=wire)
    worker.capability("write")(write if yields else send)
    requester = Agent("requester", hub=hub) if not isinstance(hub, HubServer) else Agent("requester", url=hub.url)
    async with worker, requester as me:
        handle = await soon(me.submit("write"))
        pieces = handle.pieces()
        assert await soon(anext(pieces)) == "a"
        wire.cut(for_now=True)
        await eventually(lambda: wire.opened_count == 2 and worker.is_online)
        go_on.set()
        assert await all_of(pieces) == ["bcd"]


async def test_pieces_of_an_attempt_that_begins_again_are_held_until_the_end(hub: LocalHub) -> None:  # noqa: F811
    attempts = 0

    async def write(task: Task) -> AsyncIterator[str]:
        nonlocal attempts
        attempts += 1
        yield "a"
        yield "b" if task.attempt == 1 or is_alike else "x"
        if task.attempt == 1:
            await asyncio.sleep(0.2)
            raise TaskFailed("the power is gone", code="agent_lost")
        yield "c"

    for is_alike in (True, False):
        async with working(hub, write) as me:
            stream = me.stream("write", max_retries=1)
            if is_alike:
                assert "".join(await all_of(stream)) == "abc"
            else:
                with pytest.raises(TaskFailed, match="is not its beginning") as failed:
                    await all_of(stream)
                assert failed.value.code == "pieces_lost"


# Any pieces


VALUES = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=20) | st.lists(st.integers(0, 9))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(pieces=st.lists(VALUES, max_size=12) | st.lists(st.text(max_size=20), max_size=12), is_async=st.booleans())
def test_any_pieces_come_back(pieces: list[Any], is_async: bool) -> None:
    def work() -> Iterator[Any]:
        yield from pieces

    async def work_async() -> AsyncIterator[Any]:
        for piece in pieces:
            yield piece

    async def story() -> None:
        async with LocalHub() as hub, working(hub, work_async if is_async else work) as me:  # noqa: F811
            name = "work_async" if is_async else "work"
            output = await soon(me.delegate(name))
            streamed = await all_of(me.stream(name))
        if all(isinstance(piece, str) for piece in pieces):
            assert output == "".join(streamed) == "".join(pieces)
        else:
            assert output == pieces
            values = [piece for piece in streamed if not isinstance(piece, str) and piece is not None]
            assert values == [piece for piece in pieces if not isinstance(piece, str) and piece is not None]
            assert "".join(piece for piece in streamed if isinstance(piece, str)) == "".join(
                piece for piece in pieces if isinstance(piece, str)
            )

    asyncio.run(story())


@pytest.mark.parametrize(
    ("output", "pieces", "rest"),
    [
        ("abc", [], ["abc"]),
        ("abc", ["a"], ["bc"]),
        ("abc", ["ab", "c"], []),
        ("abc", ["b"], None),
        ("abc", [1], None),
        ([1, 2], [1], [2]),
        ([1, 2], [1, 2], []),
        ([1, 2], [2], None),
        ([1], [1, 2], None),
        ([1, 2], [], [1, 2]),
        ({"a": 1}, [], [{"a": 1}]),
        ({"a": 1}, [1], None),
        (None, [], []),
        (None, ["a"], None),
    ],
)
def test_rest_of_an_output(output: Any, pieces: list[Any], rest: list[Any] | None) -> None:
    assert agenthub.rest_of(output, pieces) == rest


def test_annotations_of_a_generator() -> None:
    def shapes(annotation: Any) -> tuple[Any, Any]:
        return agenthub.pieces_of(annotation)

    assert shapes(AsyncIterator[str]) == (str, str)
    assert shapes(Iterator[int]) == (int, list[int])
    assert shapes(Generator[int, None, None]) == (int, list[int])
    assert shapes(Generator[int, None, str]) == (int, str)
    for unknown in (None, Any, "Iterator", Iterator, Callable[[], int], int):
        assert shapes(unknown) == (Any, Any)
