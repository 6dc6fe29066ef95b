"""Section 8, the SDK: over the in-memory link and over WebSockets alike."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import datetime
import decimal
import enum
import functools
import gc
import logging
import math
import operator
import random
import re
import signal
import socket
import sys
import threading
import traceback
import typing
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

import agenthub
from agenthub import (
    Agent,
    Disconnected,
    HubServer,
    HubSettings,
    LocalHub,
    Refused,
    Task,
    TaskFailed,
    TaskTimeout,
    capability,
    on_broadcast,
)
from tests.support import WAIT_S, alive, running

pytestmark = pytest.mark.filterwarnings("error")
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="sends signals that Windows does not have")


# Fixtures and helpers.


async def eventually(condition: Callable[[], Any]) -> None:
    """Return when `condition` holds; fail when it still does not after WAIT_S."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.002)


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, WAIT_S)


def at(hub: Any) -> dict[str, Any]:
    """Return the argument that connects an Agent to `hub`: the URL of a HubServer, else the hub itself."""
    return {"url": hub.url} if isinstance(hub, HubServer) else {"hub": hub}


@pytest.fixture(autouse=True)
def _quick_reconnects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "BACKOFF_FIRST_S", 0.02)
    monkeypatch.setattr(agenthub, "BACKOFF_MAX_S", 0.1)


@pytest.fixture(autouse=True)
async def _nothing_is_left_over(caplog: pytest.LogCaptureFixture) -> AsyncIterator[None]:
    """Check that a test leaves no asyncio task, no thread that keeps the process alive, and no asyncio warning."""
    before = set(threading.enumerate())
    yield
    await eventually(lambda: len(asyncio.all_tasks()) == 1)
    gc.collect()
    assert [record.getMessage() for record in caplog.get_records("call") if record.name == "asyncio"] == []
    left = [one for one in threading.enumerate() if one not in before and not one.daemon]
    assert [
        one for one in left if not one.name.startswith("asyncio_")
    ] == []  # Threads of asyncio.to_thread in the tests.


@pytest.fixture(params=["in memory", "over WebSockets"])
def kind(request: pytest.FixtureRequest) -> type[LocalHub]:
    return LocalHub if request.param == "in memory" else functools.partial(HubServer, port=0)  # type: ignore[return-value]  # both are called alike


@pytest.fixture
async def hub(kind: Callable[..., LocalHub]) -> AsyncIterator[LocalHub]:
    async with kind() as hub:
        yield hub


@contextlib.asynccontextmanager
async def working(hub: Any, *functions: Callable[..., Any], **options: Any) -> AsyncIterator[Agent]:
    """Run an agent with these functions as its capabilities, and yield a requester."""
    worker = Agent("worker", **at(hub), **options)
    for function in functions:
        worker.capability(function)
    async with worker, Agent("requester", **at(hub)) as me:
        yield me


class Wire:
    """A connection to a hub, as an argument for `Agent(hub=...)`, that a test can observe, cut and restore.

    `lets_through(message)` is asked about all that comes from the hub.
    """

    def __init__(self, hub: LocalHub) -> None:
        self.hub = hub
        self.is_up = True
        self.link: agenthub.Link | None = None
        self.owner: agenthub.LinkOwner | None = None
        self.tried_count = 0
        self.opened_count = 0
        self.lets_through: Callable[[Any], bool] = lambda message: True

    async def connect(self, owner: agenthub.LinkOwner) -> agenthub.Link:
        self.tried_count += 1
        if not self.is_up:
            raise Disconnected("the wire is cut")
        self.owner = owner
        if isinstance(self.hub, HubServer):
            self.link = await agenthub.connect_websocket(self.hub.url, self)
        else:
            self.link = await self.hub.connect(self)
        self.opened_count += 1
        return self.link

    def cut(self, *, for_now: bool = False) -> None:
        """Cut the connection; without `for_now` there is none until `restore`."""
        self.is_up = for_now
        if self.link is not None:
            self.link.abort()

    def restore(self) -> None:
        self.is_up = True

    def opened(self, link: agenthub.Link) -> None:
        assert self.owner is not None
        self.owner.opened(link)

    def received(self, link: agenthub.Link, message: Any, message_bytes: int) -> None:
        assert self.owner is not None
        if self.lets_through(message):
            self.owner.received(link, message, message_bytes)

    def closed(self, link: agenthub.Link, code: int, reason: str) -> None:
        assert self.owner is not None
        self.owner.closed(link, code, reason)


class Recorder(Agent):
    """An agent that keeps the handles of the tasks that it has delegated."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.handles: list[agenthub.TaskHandle] = []

    async def submit(self, *args: Any, **options: Any) -> agenthub.TaskHandle:
        self.handles.append(await super().submit(*args, **options))
        return self.handles[-1]


class At:
    """A URL, as an argument for `Agent.use_hub`."""

    def __init__(self, url: str) -> None:
        self.connect = functools.partial(agenthub.connect_websocket, url)


@pytest.fixture
def wire(hub: LocalHub) -> Wire:
    return Wire(hub)


def away(hub: LocalHub) -> int:
    return int(hub.hub.summary()["agents_away"])


def online(hub: LocalHub) -> int:
    return int(hub.hub.summary()["agents"])


def tasks_of(hub: LocalHub) -> dict[str, int]:
    """Return how many tasks the hub has a record of, by state."""
    return {str(state): count for state, count in hub.hub.summary()["tasks"].items() if count}


async def failure_of(awaitable: Any) -> tuple[str, str]:
    """Return the code and the text of the TaskFailed that `awaitable` ends with."""
    with pytest.raises(TaskFailed) as caught:
        await soon(awaitable)
    return caught.value.code, caught.value.message


# Functions and methods as handlers.


async def test_decorated_function_does_a_task(hub: LocalHub) -> None:
    worker = Agent("worker", **at(hub))

    @worker.capability("greet")
    async def hello(name: str) -> str:
        return f"Hello, {name}!"

    async with worker, Agent("requester", **at(hub)) as me:
        assert await me.delegate("greet", {"name": "Ada"}) == "Hello, Ada!"


async def test_method_of_a_subclass_does_a_task(hub: LocalHub) -> None:
    class Greeter(Agent):
        """Greets people.

        At length.
        """

        greeting = "Hello"

        @capability("greet", description="Says it")
        async def hello(self, name: str) -> str:
            return f"{self.greeting}, {name}!"

        @capability
        def shout(self, name: str) -> str:
            """Shout a name."""
            return name.upper()

    async with Greeter(**at(hub)), Agent("requester", **at(hub)) as me:
        assert await me.delegate("greet", {"name": "Ada"}) == "Hello, Ada!"
        assert await me.delegate("shout", {"name": "Ada"}) == "ADA"
        (found,) = await me.discover("greet")
    assert (found.name, found.description) == ("greeter", "Greets people.")
    assert [(one.name, one.description) for one in found.capabilities] == [
        ("greet", "Says it"),
        ("shout", "Shout a name."),
    ]


async def test_bare_decorator_takes_the_name_of_the_function(hub: LocalHub) -> None:
    worker = Agent("worker", **at(hub))

    @worker.capability
    async def double(x: int) -> int:
        return 2 * x

    assert await double(4) == 8  # The decorator returns the function unchanged.
    async with worker, Agent("requester", **at(hub)) as me:
        assert await me.delegate("double", {"x": 4}) == 8


async def test_both_styles_meet_in_one_agent(hub: LocalHub) -> None:
    class Worker(Agent):
        @capability
        def one(self) -> int:
            return 1

    worker = Worker(**at(hub))

    @worker.capability
    def two() -> int:
        return 2

    async with worker, Agent("requester", **at(hub)) as me:
        assert [await me.delegate("one"), await me.delegate("two")] == [1, 2]


async def test_two_agents_of_one_class_keep_their_own_handlers() -> None:
    one, other = Agent("one"), Agent("other")
    one.capability("work")(lambda: 1)
    other.capability("work")(lambda: 2)
    with pytest.raises(ValueError, match="work: this capability already has a handler"):
        one.capability("work")(lambda: 3)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tasks": 0},
        {"max_tasks": 10_001},
        {"metadata": {"a": datetime.date.min}},
        {"metadata": {"a": "x" * 5000}},
        {"name": "x" * 129},
        {"url": "http://example.org"},
        {"url": 5},
    ],
)
def test_bad_argument_is_a_value_error_at_construction(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|looks like|is a string such as|metadata: (holds a date|is larger)"):
        Agent(**options)


def test_handler_with_positional_parameters_is_a_value_error() -> None:
    def by_place(x: int, /) -> int:
        return x

    def any_number(*xs: int) -> int:
        return len(xs)

    for function in (by_place, any_number):
        with pytest.raises(ValueError, match="keyword"):
            Agent("worker").capability(function)


# Schemas from signature and docstring.


def offered(function: Callable[..., Any]) -> agenthub.Capability:
    return agenthub.Handler.of(function, agenthub.HandlerOptions()).capability


def test_signature_and_docstring_become_the_capability() -> None:
    async def review(code: str, strict: bool = False, tags: list[str] | None = None) -> dict:  # type: ignore[type-arg]  # as users write it
        """Point out what is wrong.

        And what is not.
        """
        raise NotImplementedError

    assert offered(review) == agenthub.Capability(
        "review",
        "Point out what is wrong.",
        {
            "type": "object",
            "properties": {
                "code": {"type": "string"},
                "strict": {"type": "boolean", "default": False},
                "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}], "default": None},
            },
            "required": ["code"],
            "additionalProperties": False,
        },
        {"type": "object"},
    )


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        (str, {"type": "string"}),
        (int, {"type": "integer"}),
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        (None, {"type": "null"}),
        (list, {"type": "array"}),
        (dict, {"type": "object"}),
        (Any, {}),
        (list[str], {"type": "array", "items": {"type": "string"}}),
        (dict[str, int], {"type": "object", "additionalProperties": {"type": "integer"}}),
        (Optional[int], {"anyOf": [{"type": "integer"}, {"type": "null"}]}),  # noqa: UP045  # users write it like this too
        (int | str, {"anyOf": [{"type": "integer"}, {"type": "string"}]}),
        (Literal["a", "b"], {"enum": ["a", "b"], "type": "string"}),
        (typing.Annotated[str, "a note"], {"type": "string"}),
        (typing.List, {"type": "array"}),  # noqa: UP006  # users write it like this too
        (typing.Dict, {"type": "object"}),  # noqa: UP006  # users write it like this too
        (typing.List[int], {"type": "array", "items": {"type": "integer"}}),  # noqa: UP006  # users write it like this too
        (Sequence, {}),
    ],
)
def test_annotation_becomes_a_schema(annotation: Any, schema: dict[str, Any]) -> None:
    def work(x: Any) -> None: ...

    work.__annotations__ = {"x": annotation}
    found = offered(work).input_schema
    assert found is not None
    assert found["properties"]["x"] == schema


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (bytes, "work: x: bytes is not JSON"),
        (list[datetime.timedelta], "work: x: timedelta is not JSON"),
        (dict[str, complex] | None, "work: x: complex is not JSON"),
        (tuple[int, object, type], "work: x: type is not JSON"),
        (asyncio.Task, "work: x: Task is not JSON"),
        ("no.such.name", "work: x: its annotation 'no.such.name' cannot be evaluated"),
        ("list[Task]", "work: x: Task is not JSON"),
    ],
)
def test_annotation_that_json_does_not_have_is_a_value_error(annotation: Any, text: str) -> None:
    def work(x: Any) -> None: ...

    work.__annotations__ = {"x": annotation}
    with pytest.raises(ValueError, match=re.escape(text)):
        offered(work)


@pytest.mark.parametrize(
    "annotation",
    [Task, "Task", "Task | None", "Optional[agenthub.Task]", Task | None, "somewhere.Task", "None | other.Task"],
)
async def test_task_is_recognized_by_its_annotation(annotation: Any) -> None:
    def work(task: Any = None) -> Any:
        return task.input

    work.__annotations__ = {"task": annotation}
    async with LocalHub() as hub, working(hub, work) as me:
        assert await soon(me.delegate("work", 5)) == 5


def test_partial_shows_what_is_left_to_give() -> None:
    def work(x: int, *, key: str, y: int = 2) -> None:
        """Work."""

    found = offered(functools.partial(work, key="secret"))
    assert (found.name, found.description) == ("work", "Work.")
    assert found.input_schema is not None
    assert list(found.input_schema["properties"]) == ["x", "y"]


async def test_static_and_class_methods_do_tasks() -> None:
    class Both(Agent):
        @capability
        @staticmethod
        def outer(x: int) -> int:
            return x

        @staticmethod
        @capability
        def inner(x: int) -> int:
            return x + 1

        @classmethod
        @capability
        def of_class(cls, x: int) -> str:
            return f"{cls.__name__}{x}"

        @capability
        @classmethod
        def of_class_too(cls, x: int) -> str:
            return f"{cls.__name__}{x}"

    async with LocalHub() as hub, Both(hub=hub), Agent("me", hub=hub) as me:
        found = [await soon(me.delegate(name, 1)) for name in ("outer", "inner", "of_class", "of_class_too")]
    assert found == [1, 2, "Both1", "Both1"]


def test_default_that_is_not_json_makes_an_argument_optional_without_showing() -> None:
    def work(when: Any = datetime.timedelta.min) -> None: ...

    found = offered(work).input_schema
    assert found is not None
    assert (found["properties"], found["required"]) == ({"when": {}}, [])


def test_handler_of_the_task_alone_takes_any_input() -> None:
    def work(task: Task) -> None: ...

    assert offered(work).input_schema is None


async def test_schema_is_found_by_others(hub: LocalHub) -> None:
    async def double(x: int) -> int:
        return 2 * x

    async with working(hub, double) as me:
        (found,) = await me.discover("double")
    assert found.capabilities == [offered(double)]


# Explicit schemas.

INPUT_SCHEMA = {"type": "object", "properties": {"x": {"type": "integer", "minimum": 5}}, "title": "A number"}
OUTPUT_SCHEMA = {"type": "integer", "maximum": 10}


def calculator(style: str, **said: Any) -> Agent:
    """Return an agent with two capabilities declared with these options, in one style or the other."""
    if style == "functions":
        agent = Agent("calculator")

        @agent.capability("double", **said)
        async def double(x: int) -> int:
            return 2 * x

        @agent.capability("repeat", **said)
        async def repeat(task: Task) -> Any:
            return task.input

        return agent

    class Calculator(Agent):
        @capability("double", **said)
        async def double(self, x: int) -> int:
            return 2 * x

        @capability("repeat", **said)
        async def repeat(self, task: Task) -> Any:
            return task.input

    return Calculator()


both_styles = pytest.mark.parametrize("style", ["functions", "class"])


async def schemas_at(hub: LocalHub, agent: Agent) -> dict[str, Any]:
    """Return the two schemas of each capability, by name, as `discover` shows them."""
    agent.use_hub(hub)
    async with agent, Agent("requester", hub=hub) as me:
        (found,) = await me.discover("double")
    return {one.name: (one.input_schema, one.output_schema) for one in found.capabilities}


@both_styles
async def test_given_schemas_are_announced_as_they_are(style: str) -> None:
    async with LocalHub() as hub:
        seen = await schemas_at(hub, calculator(style, input_schema=INPUT_SCHEMA, output_schema=OUTPUT_SCHEMA))
    assert seen == dict.fromkeys(("double", "repeat"), (INPUT_SCHEMA, OUTPUT_SCHEMA))


@both_styles
@pytest.mark.parametrize("given", [{"input_schema": INPUT_SCHEMA}, {"output_schema": OUTPUT_SCHEMA}])
async def test_schema_that_is_not_given_comes_from_the_annotations(style: str, given: dict[str, Any]) -> None:
    async with LocalHub() as hub:
        seen = await schemas_at(hub, calculator(style, **given))
        derived = await schemas_at(hub, calculator(style))
    input_schema, output_schema = derived["double"]
    assert (input_schema["required"], output_schema) == (["x"], {"type": "integer"})
    assert seen["double"] == (given.get("input_schema", input_schema), given.get("output_schema", output_schema))


@both_styles
async def test_given_schema_may_be_the_one_that_takes_anything(style: str) -> None:
    async with LocalHub() as hub:
        seen = await schemas_at(hub, calculator(style, input_schema={}, output_schema={}))
    assert seen == dict.fromkeys(("double", "repeat"), ({}, {}))


@both_styles
async def test_input_is_checked_against_the_signature_and_not_the_given_schema(style: str) -> None:
    other = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x", "y"]}
    agent = calculator(style, input_schema=other, output_schema={"type": "string"})
    async with LocalHub() as hub:
        agent.use_hub(hub)
        async with agent, Agent("requester", hub=hub) as me:
            assert await soon(me.delegate("double", {"x": 1})) == 2
            assert await soon(me.delegate("double", 1)) == 2
            text = "input.x: must be of type integer"
            assert await failure_of(me.delegate("double", {"x": "1"})) == ("invalid_input", text)


@both_styles
@pytest.mark.parametrize("given", [None, "text", [1], {"x": "no number"}, {"y": {}}])
async def test_handler_of_the_task_alone_takes_any_input_whatever_its_schema(style: str, given: Any) -> None:
    agent = calculator(style, input_schema=INPUT_SCHEMA)
    async with LocalHub() as hub:
        agent.use_hub(hub)
        async with agent, Agent("requester", hub=hub) as me:
            assert await soon(me.delegate("repeat", given)) == given


@both_styles
@pytest.mark.parametrize("typo", ["input_shema", "outputschema", "schema", "is_broadcast"])
def test_keyword_that_there_is_not_is_a_type_error(style: str, typo: str) -> None:
    with pytest.raises(TypeError, match=typo):
        calculator(style, **{typo: {}})


# From a task's input to arguments.


def plain(x: int, y: int = 2) -> Any:
    return [x, y]


def optional(x: Optional[str] = None) -> Any:  # noqa: UP045  # users write it like this too
    return x


def literal(x: Literal["a", "b"]) -> Any:
    return x


def strings(x: list[str]) -> Any:
    return x


def numbers(x: dict[str, float]) -> Any:
    return x


def number(x: float) -> Any:
    return x


def limited(limit: int = None) -> Any:  # type: ignore[assignment]  # noqa: RUF013  # users write it like this too
    return limit


def open_ended(x: int, **rest: Any) -> Any:
    return [x, rest]


def nothing() -> Any:
    return "nothing"


def task_alone(task: Task) -> Any:
    return task.input


def task_too(x: int, task: Task) -> Any:
    return [x, task.input]


@pytest.mark.parametrize(
    ("function", "given", "expected"),
    [
        (plain, {"x": 1}, [1, 2]),
        (plain, {"x": 1, "y": 3}, [1, 3]),
        (plain, 1, [1, 2]),
        (plain, {"x": 1, "y": None}, [1, 2]),
        (plain, {"x": 3.0}, [3, 2]),
        (limited, {"limit": None}, None),
        (limited, {}, None),
        (optional, {"x": "a"}, "a"),
        (optional, {"x": None}, None),
        (optional, {}, None),
        (optional, None, None),
        (optional, "a", "a"),
        (literal, {"x": "b"}, "b"),
        (literal, "b", "b"),
        (strings, {"x": ["a", "b"]}, ["a", "b"]),
        (strings, ["a", "b"], ["a", "b"]),
        (numbers, {"x": {"a": 1, "b": 2.5}}, {"a": 1, "b": 2.5}),
        (number, 3, 3),
        (open_ended, {"x": 1, "y": 2}, [1, {"y": 2}]),
        (nothing, None, "nothing"),
        (nothing, {}, "nothing"),
        (task_alone, None, None),
        (task_alone, [1, {"a": 2}], [1, {"a": 2}]),
        (task_alone, {"any": "thing"}, {"any": "thing"}),
        (task_too, {"x": 1}, [1, {"x": 1}]),
        (task_too, 1, [1, 1]),
    ],
)
async def test_input_becomes_arguments(function: Callable[..., Any], given: Any, expected: Any) -> None:
    async with LocalHub() as hub, working(hub, function) as me:
        assert await soon(me.delegate(function.__name__, given)) == expected


@pytest.mark.parametrize(
    ("function", "given", "text"),
    [
        (plain, {}, "input.x: is required"),
        (plain, None, "input.x: is required"),
        (plain, {"x": "1"}, "input.x: must be of type integer"),
        (plain, {"x": True}, "input.x: must be of type integer"),
        (plain, {"x": 1.5}, "input.x: must be of type integer"),
        (limited, {"limit": "1"}, "input.limit: must be of type integer or null"),
        (plain, {"x": None}, "input.x: must be of type integer"),
        (plain, {"x": 1, "z": 3}, "input: has a field that is not one of x, y"),
        (plain, [1, 2], "input.x: must be of type integer"),
        (optional, {"x": 1}, "input.x: must be of type string or null"),
        (literal, {"x": "c"}, 'input.x: must be one of ["a", "b"]'),
        (strings, {"x": ["a", 1]}, "input.x.1: must be of type string"),
        (strings, {"x": "a"}, "input.x: must be of type array"),
        (numbers, {"x": {"a": "1"}}, "input.x.*: must be of type number"),
        (nothing, {"x": 1}, "input: has a field that is not one of none"),
        (nothing, 1, "input: must be of type object"),
        (open_ended, {"y": 1}, "input.x: is required"),
        (task_too, {"task": 1}, "input.x: is required"),
        (task_too, {"x": 1, "task": 1}, "input: has a field that is not one of x"),
    ],
)
async def test_input_that_does_not_fit_fails_the_task(function: Callable[..., Any], given: Any, text: str) -> None:
    async with LocalHub() as hub, working(hub, function) as me:
        assert await failure_of(me.delegate(function.__name__, given)) == ("invalid_input", text)


async def test_input_does_not_stand_in_for_the_task() -> None:
    def work(task: Task, **rest: Any) -> Any:
        return [task.capability, rest]

    async with LocalHub() as hub, working(hub, work) as me:
        assert await soon(me.delegate("work", {"task": 2, "y": 2})) == ["work", {"y": 2}]


async def test_task_without_a_capability_goes_to_the_only_handler(hub: LocalHub) -> None:
    async with working(hub, plain) as me:
        (found,) = await me.discover("plain")
        assert await soon(me.delegate(None, {"x": 1}, agent_id=found.agent_id)) == [1, 2]


async def test_task_without_a_capability_fails_where_there_are_two_handlers(hub: LocalHub) -> None:
    async with working(hub, plain, nothing) as me:
        (found,) = await me.discover("plain")
        code, text = await failure_of(me.delegate(None, {"x": 1}, agent_id=found.agent_id))
    assert (code, text) == ("no_handler", "this agent offers plain, nothing; name one of them")


async def test_handler_sees_its_task(hub: LocalHub) -> None:
    seen: list[Task] = []

    async def work(task: Task) -> None:
        assert 59 < task.remaining_s <= 60
        seen.append(task)

    async with working(hub, work) as me:
        await soon(me.delegate("work", [1], ttl=60, priority=7, task_id="this"))
        (task,) = seen
        assert (task.task_id, task.input, task.requester) == ("this", [1], me.agent_id)
        assert (task.capability, task.attempt, task.priority, task.parent_id) == ("work", 1, 7, None)
        assert not task.cancelled


# Concurrent handlers.


async def test_async_handlers_run_side_by_side(hub: LocalHub) -> None:
    together = asyncio.Barrier(3)

    async def work() -> None:
        await together.wait()

    async with working(hub, work) as me:
        await soon(asyncio.gather(*(me.delegate("work") for _ in range(3))))


async def test_plain_handlers_run_side_by_side_in_threads(hub: LocalHub) -> None:
    together = threading.Barrier(3)

    def work() -> bool:
        together.wait(WAIT_S)
        return threading.current_thread() is not threading.main_thread()

    async with working(hub, work) as me:
        assert await soon(asyncio.gather(*(me.delegate("work") for _ in range(3)))) == [True] * 3


async def test_no_more_than_max_tasks_run_at_once(hub: LocalHub) -> None:
    now, most = 0, 0

    async def work() -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1

    async with working(hub, work, max_tasks=2) as me:
        await soon(asyncio.gather(*(me.delegate("work") for _ in range(8))))
    assert most == 2


async def test_plain_handler_sees_the_context_variables_of_its_agent(hub: LocalHub) -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="unset")

    def work() -> str:
        found = request.get()
        request.set("changed by a handler")
        return found

    request.set("set before the start")
    async with working(hub, work) as me:
        assert [await soon(me.delegate("work")) for _ in range(2)] == ["set before the start"] * 2


async def test_blocking_plain_handler_does_not_hold_up_heartbeats(kind: Callable[..., LocalHub]) -> None:
    let_go = threading.Event()

    def work() -> str:
        let_go.wait(WAIT_S)
        return "done"

    async with kind(HubSettings(heartbeat_s=0.05)) as hub, working(hub, work) as me:
        handle = await me.submit("work")
        await asyncio.sleep(0.4)  # Longer than three heartbeat intervals, twice.
        assert (online(hub), away(hub)) == (2, 0)
        let_go.set()
        assert await soon(handle.result()) == "done"


# The first step of an async handler, which Python 3.12 and newer run where its task comes in.


async def test_each_handler_runs_in_a_loop_task_of_its_own(hub: LocalHub) -> None:
    found: list[Any] = []
    ended: list[Any] = []

    async def work() -> int:
        current = asyncio.current_task()
        assert current is not None
        current.add_done_callback(ended.append)
        found.append(current)
        async with asyncio.timeout(WAIT_S), asyncio.TaskGroup():
            return len(found)

    async with working(hub, work) as me:
        assert [await soon(me.delegate("work")) for _ in range(3)] == [1, 2, 3]
        await eventually(lambda: len(ended) == 3)
    assert len(set(found)) == 3
    assert ended == found


@pytest.mark.parametrize("suspends", [False, True])
async def test_async_handler_keeps_its_context_variables_to_itself(hub: LocalHub, suspends: bool) -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="unset")

    async def work() -> list[str]:
        found = [request.get()]
        request.set("changed by a handler")
        if suspends:
            await asyncio.sleep(0)
        return [*found, request.get()]

    request.set("set before the start")
    async with working(hub, work) as me:
        outputs = [await soon(me.delegate("work")) for _ in range(2)]
    assert outputs == [["set before the start", "changed by a handler"]] * 2
    assert request.get() == "set before the start"


async def test_timeout_and_cancellation_reach_a_handler_after_its_first_step(hub: LocalHub) -> None:
    ended: list[str] = []

    async def times_out() -> str:
        try:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        except TimeoutError:
            return "timed out"
        return "not timed out"

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async with working(hub, times_out, waits) as me:
        assert await soon(me.delegate("times_out")) == "timed out"
        handle = await me.submit("waits")
        await handle.cancel()
        assert await failure_of(handle.result()) == ("cancelled", "cancelled by its requester")
        await eventually(lambda: ended == ["cancelled"])


async def test_handler_cancelled_before_its_first_step_never_begins(hub: LocalHub) -> None:
    let_go, began = asyncio.Event(), []

    async def work(number: int) -> int:
        began.append(number)
        await let_go.wait()
        return number

    async with working(hub, work, max_tasks=1) as me:
        first, second, third = [await me.submit("work", {"number": number}) for number in range(3)]
        await second.cancel()
        let_go.set()
        assert [await soon(one.result()) for one in (first, third)] == [0, 2]
    assert began == [0, 2]


async def test_handler_may_stop_its_own_agent_in_its_first_step(hub: LocalHub) -> None:
    worker = Agent("worker", **at(hub))
    went_on = asyncio.Event()

    @worker.capability
    async def leave() -> None:
        await worker.stop()
        went_on.set()

    async with worker, Agent("requester", **at(hub)) as me:
        with pytest.raises(TaskFailed):
            await soon(me.delegate("leave"))
        await soon(went_on.wait())
    assert not worker.is_online


async def test_tasks_of_handlers_are_made_by_the_factory_of_the_program(hub: LocalHub) -> None:
    class OwnTask(asyncio.Task[Any]):
        """Made by a program for itself."""

    def own_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> OwnTask:
        return OwnTask(coroutine, loop=loop, **options)

    async def work() -> str:
        return type(asyncio.current_task()).__name__

    async with working(hub, work) as me:
        asyncio.get_running_loop().set_task_factory(own_task)
        assert await soon(me.delegate("work")) == "OwnTask"
        asyncio.get_running_loop().set_task_factory(None)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio has no eager tasks")
async def test_first_step_of_a_handler_takes_no_turn_of_the_loop() -> None:
    async def work() -> bool:
        return any(frame.name == "data_received" for frame in traceback.extract_stack())

    async with HubServer(port=0) as server, working(server, work) as me:
        assert await soon(me.delegate("work")) is True


async def test_burst_of_tasks_leaves_the_loop_to_others() -> None:
    loop, turns, ran = asyncio.get_running_loop(), 0, []

    def turn() -> None:
        nonlocal turns
        turns += 1
        if len(ran) < 1000:
            loop.call_soon(turn)

    async def work() -> None:
        ran.append(turns)

    async with HubServer(HubSettings(heartbeat_s=0.05), port=0) as server, working(server, work, max_tasks=1000) as me:
        turn()
        await soon(asyncio.gather(*(me.delegate("work", wait=True) for _ in range(1000))))
        assert (online(server), away(server)) == (2, 0)
    assert len(ran) == 1000
    assert max(map(ran.count, set(ran))) <= 200  # As many messages as a link handles before others have their turn.


# Handlers that fail.


async def test_exception_fails_the_task_with_its_text(hub: LocalHub, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        raise LookupError("no such \x1b[31mthing")

    async with working(hub, work) as me:
        assert await failure_of(me.delegate("work")) == ("failed", "LookupError: no such \x1b[31mthing")
    (record,) = [record for record in caplog.records if record.name == "agenthub.agent" and record.exc_info]
    assert "LookupError" in caplog.text
    assert record.levelname == "ERROR"


class Unreadable(Exception):
    def __repr__(self) -> str:
        raise SystemExit

    __str__ = __repr__


class Unmade(TaskFailed):
    """One whose constructor does not call that of TaskFailed."""

    def __init__(self, text: str) -> None:
        Exception.__init__(self, text)


def group(*errors: BaseException) -> BaseException:
    return BaseExceptionGroup("several", errors)


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("wrong"), ("failed", "ValueError: wrong")),
        (ValueError(), ("failed", "ValueError")),
        (KeyError("a"), ("failed", "KeyError: 'a'")),
        (TimeoutError("of the handler's own"), ("failed", "TimeoutError: of the handler's own")),
        (StopIteration(1), ("failed", None)),
        (StopAsyncIteration(1), ("failed", None)),
        (TaskFailed("not today", code="closed"), ("closed", "not today")),
        (TaskFailed("x" * 100_000), ("failed", "x" * 65_536)),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), ("failed", None)),
        (ValueError("\udc80"), ("failed", None)),
        (asyncio.CancelledError(), ("failed", None)),
        (TaskFailed("x", code=""), ("failed", None)),
        (TaskFailed("x", code="x" * 129), ("failed", None)),
        (BaseException("panic"), ("failed", "BaseException: panic")),
        (GeneratorExit(), ("failed", "GeneratorExit")),
        (KeyboardInterrupt(), ("failed", "KeyboardInterrupt")),
        (Unreadable(), ("failed", "Unreadable: its text cannot be read (SystemExit)")),
        (TaskFailed({"a": 1}), ("failed", "dict: {'a': 1}")),  # type: ignore[arg-type]
        (TaskFailed(IndexError("list")), ("failed", "IndexError: list")),  # type: ignore[arg-type]
        (TaskFailed("x", code=5), ("5", "x")),  # type: ignore[arg-type]
        (Unmade("x"), ("failed", "Unmade")),
        (group(KeyError("a"), group(IndexError("b"))), ("failed", "KeyError: 'a'; IndexError: b")),
        (group(*[OSError("no")] * 9), ("failed", "; ".join(["OSError: no"] * 5) + "; and more")),
        (group(TaskFailed("not today", code="closed")), ("closed", "not today")),
        (caused(ValueError("outer"), OSError("inner")), ("failed", "ValueError: outer (caused by OSError: inner)")),
        (caused(ValueError("an OSError: inner"), OSError("inner")), ("failed", "ValueError: an OSError: inner")),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_any_exception_fails_its_task_alone(is_async: bool, error: BaseException, expected: Any) -> None:
    def fail() -> None:
        raise error

    async def fail_async() -> None:
        raise error

    async with LocalHub() as hub, working(hub, fail, fail_async, nothing) as me:
        code, text = await failure_of(me.delegate("fail_async" if is_async else "fail", ttl=3))
        assert code == (expected[0] or code)
        assert text == (expected[1] or text)
        assert await soon(me.delegate("nothing")) == "nothing"


def test_plain_handler_that_exits_fails_its_task_alone() -> None:
    def work() -> None:
        sys.exit("wrong usage")

    async def once() -> None:
        async with LocalHub() as hub, working(hub, work, nothing) as me:
            code, _ = await failure_of(me.delegate("work", ttl=3))
            assert code == "failed"
            assert await soon(me.delegate("nothing")) == "nothing"

    try:
        asyncio.run(once())
    except SystemExit:
        pytest.fail("the handler has ended the whole program")


class Circle(list[Any]):
    """A list that contains itself."""

    def __init__(self) -> None:
        super().__init__([self])


@pytest.mark.parametrize(
    "output",
    [
        {b"1"},
        float("nan"),
        {"deep": [float("inf")]},
        datetime.timedelta(1),
        b"bytes",
        object(),
        Circle(),
        "\udc80",
        {"\udc80": 1},
        10**5000,
        2**64,
        -(2**63) - 1,
    ],
    ids=lambda value: type(value).__name__,
)
async def test_output_that_is_not_json_fails_its_task_alone(hub: LocalHub, output: Any) -> None:
    async def work() -> Any:
        return output

    async with working(hub, work, nothing) as me:
        code, _ = await failure_of(me.delegate("work", ttl=3))
        assert code == "failed"
        assert await soon(me.delegate("nothing")) == "nothing"
        assert online(hub) == 2


@pytest.mark.parametrize(
    ("output", "path"),
    [({"items": [1, 2, 3, b"4"]}, "output.items[3]: "), (b"", "output: "), ([{(1, 2): 2}], "output[0]: ")],
    ids=str,
)
async def test_failure_names_the_part_of_the_output_that_is_not_json(output: Any, path: str) -> None:
    def work() -> Any:
        return output

    async with LocalHub() as hub, working(hub, work) as me:
        code, text = await failure_of(me.delegate("work"))
        assert (code, path in text) == ("failed", True), text


class CallableObject:
    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    async def __call__(self, message: Any, sender: str) -> Any:
        self.seen.append(message)
        return message


@pytest.mark.parametrize("shape", ["object", "partial", "decorated"])
async def test_awaitable_that_comes_back_is_awaited(hub: LocalHub, shape: str) -> None:
    seen: list[Any] = []
    handler: Any = CallableObject(seen)
    if shape == "partial":
        handler = functools.partial(handler.__call__)
    elif shape == "decorated":
        handler = lambda message, sender, inner=handler: inner(message, sender)  # noqa: E731
    worker = Agent("worker", **at(hub))
    worker.on_broadcast(handler)
    worker.capability("work")(handler)
    async with worker, Agent("requester", **at(hub)) as me:
        assert await soon(me.delegate("work", {"message": 1, "sender": "me"})) == 1
        await me.broadcast(2)
        await eventually(lambda: seen == [1, 2])


class Shapes:
    """Functions that differ in how they are defined."""

    def method(self, x: int) -> int:
        return x + 1

    @classmethod
    async def of_class(cls, x: int) -> int:
        return x + 1

    @staticmethod
    def static(x: int) -> int:
        return x + 1

    async def __call__(self, x: int) -> int:
        return x + 1


class Position(typing.NamedTuple):
    x: int


def wrapper_without_wraps(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: function(*args, **options)


GOOD_SHAPES: dict[str, Any] = {
    "bound method": Shapes().method,
    "class method": Shapes.of_class,
    "static method": Shapes.static,
    "raw static method": vars(Shapes)["static"],
    "object": Shapes(),
    "partial of an object": functools.partial(Shapes()),
    "partial of a partial": functools.partial(functools.partial(Shapes.static)),
    "cached": functools.lru_cache(Shapes.static),
    "lambda": lambda x: x + 1,
}
# What Python says of built-in ones depends on its version.
NO_KEYWORDS = "(its parameters are not known; wrap it|a handler is called with keyword arguments)"
BAD_SHAPES: dict[str, tuple[Any, str]] = {
    "raw class method": (vars(Shapes)["of_class"], "of_class: a classmethod cannot be called"),
    "property": (property(lambda self: 1), "a property cannot be called"),
    "number": (5, "int: an int cannot be called; make a function the handler"),
    "None": (None, "NoneType: a NoneType cannot be called"),
    "method without its object": (Shapes.method, "method: is a method; give that of an object"),
    "class": (Shapes, "Shapes: a class whose instances are not JSON"),
    "type": (int, f"int: {NO_KEYWORDS}"),
    "getter": (operator.itemgetter(1), f"itemgetter: {NO_KEYWORDS}"),
    "builtin": (len, "len: a handler is called with keyword arguments, so obj must be a keyword parameter"),
    "dispatch": (functools.singledispatch(Shapes.static), "static: functools.singledispatch needs positional"),
    "decorator": (wrapper_without_wraps(len), "<lambda>: .* if that is a decorator's, give it functools.wraps"),
}


@pytest.mark.parametrize("shape", GOOD_SHAPES)
async def test_handler_may_be_anything_that_can_be_called(hub: LocalHub, shape: str) -> None:
    worker = Agent("worker", **at(hub))
    worker.capability("work")(GOOD_SHAPES[shape])
    worker.capability("point")(Position)
    async with worker, Agent("requester", **at(hub)) as me:
        assert await soon(me.delegate("work", {"x": 1})) == 2
        assert await soon(me.delegate("point", {"x": 1})) == [1]


@pytest.mark.parametrize("shape", BAD_SHAPES)
def test_what_cannot_be_a_handler_is_refused_when_it_is_registered(shape: str) -> None:
    function, text = BAD_SHAPES[shape]
    worker = Agent("worker")
    with pytest.raises(ValueError, match=text):
        worker.capability("work")(function)


@pytest.mark.parametrize(
    "one", [Shapes().method, len, int, 5, property(lambda self: 1)], ids=lambda one: type(one).__name__
)
def test_what_cannot_be_marked_is_refused_with_a_reason(one: Any) -> None:
    for mark in (capability, capability("work"), on_broadcast):
        with pytest.raises(ValueError, match="cannot be marked as a handler; define it in the class, or register it"):
            mark(one)


def test_function_that_cannot_take_broadcasts_is_refused() -> None:
    async def generator(message: Any, sender: str) -> AsyncIterator[None]:
        yield

    class Lacking(Agent):
        @on_broadcast
        def hear(self, message: Any) -> None: ...

    with pytest.raises(
        ValueError, match=r"hear: the handler of broadcasts is called with \(message, sender\): too many"
    ):
        Lacking()
    with pytest.raises(ValueError, match="generator: a generator cannot be a handler"):
        Agent("x").on_broadcast(generator)
    for shape in ("number", "class", "raw class method"):
        function, text = BAD_SHAPES[shape]
        with pytest.raises(ValueError, match=text):
            Agent("x").on_broadcast(function)


@pytest.mark.parametrize("output", [None, False, 0, 1.5, "", "é\n\x00", [], {"a": [None]}, (1, 2), 2**64 - 1, -(2**63)])
async def test_output_arrives_as_it_was(hub: LocalHub, output: Any) -> None:
    async def work() -> Any:
        return output

    async with working(hub, work) as me:
        assert await soon(me.delegate("work")) == (list(output) if isinstance(output, tuple) else output)


async def test_too_large_output_fails_its_task_alone(hub: LocalHub) -> None:
    async def work() -> str:
        return "x" * 2_000_000

    async with working(hub, work, nothing) as me:
        code, text = await failure_of(me.delegate("work"))
        assert code == "too_large"
        assert "1048576" in text
        assert await soon(me.delegate("nothing")) == "nothing"


async def test_error_text_too_large_for_the_hub_still_fails_the_task(kind: Callable[..., LocalHub]) -> None:
    async def work() -> None:
        raise ValueError("x" * 50_000)

    async with kind(HubSettings(message_bytes_max=10_000)) as hub, working(hub, work) as me:
        await failure_of(me.delegate("work"))


@pytest.mark.parametrize("is_async", [True, False])
async def test_too_large_progress_is_told_to_the_handler(hub: LocalHub, is_async: bool) -> None:
    raised: list[BaseException] = []

    def report(task: Task) -> None:
        try:
            task.progress(0.5, "x" * 2_000_000)
        except Refused as refusal:
            raised.append(refusal)

    async def report_async(task: Task) -> None:
        report(task)

    async with working(hub, report, report_async) as me:
        await soon(me.delegate("report_async" if is_async else "report"))
    assert [getattr(error, "code", None) for error in raised] == ["too_large"]


@pytest.mark.parametrize(("progress", "detail"), [(1.5, None), (float("nan"), None), (None, {1j}), (0.5, "\udc80")])
@pytest.mark.parametrize("is_async", [True, False])
async def test_wrong_progress_is_told_to_the_handler(is_async: bool, progress: Any, detail: Any) -> None:
    def report(task: Task) -> str:
        try:
            task.progress(progress, detail)
        except ValueError:
            return "told"
        return "not told"

    async def report_async(task: Task) -> str:
        return report(task)

    async with LocalHub() as hub, working(hub, report, report_async) as me:
        assert await soon(me.delegate("report_async" if is_async else "report", ttl=3)) == "told"


# Requests: refusals and limits.


@pytest.mark.parametrize("given", [{1j}, float("nan"), [[float("inf")]], datetime.timedelta.min, b"", "\udc80"])
async def test_input_that_is_not_json_is_a_value_error(hub: LocalHub, given: Any) -> None:
    async with working(hub, nothing) as me:
        with pytest.raises(ValueError, match=r"."):
            await me.submit("nothing", given)
        assert await soon(me.delegate("nothing")) == "nothing"
        assert tasks_of(hub) == {"completed": 1}


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), 604_801])
async def test_ttl_out_of_range_is_refused_and_not_a_timeout(hub: LocalHub, ttl: float) -> None:
    async with working(hub, nothing) as me:
        with pytest.raises((ValueError, Refused)):
            await soon(me.submit("nothing", ttl=ttl))
        assert tasks_of(hub) == {}


async def test_too_large_input_is_refused(hub: LocalHub) -> None:
    async with working(hub, nothing) as me:
        with pytest.raises(Refused) as caught:
            await me.submit("nothing", "x" * 2_000_000)
        assert caught.value.code == "too_large"
        assert await soon(me.delegate("nothing")) == "nothing"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"capability": "no-such-thing"}, "no_agent"),
        ({"agent_id": "nobody"}, "unknown_agent"),
        ({}, "invalid_message"),
        ({"capability": "nothing", "priority": 1000}, "invalid_message"),
        ({"capability": "nothing", "parent_id": "no-task"}, "not_assigned"),
    ],
)
async def test_what_the_hub_refuses_is_raised_with_its_code(hub: LocalHub, options: Any, code: str) -> None:
    async with working(hub, nothing) as me:
        with pytest.raises(Refused) as caught:
            await soon(me.delegate(**options))
        assert caught.value.code == code


async def test_wait_accepts_that_nobody_is_there_yet(hub: LocalHub) -> None:
    async with Agent("requester", **at(hub)) as me:
        handle = await soon(me.submit("nothing", wait=True))
        async with working(hub, nothing):
            assert await soon(handle.result()) == "nothing"


async def test_task_id_of_an_open_task_is_a_value_error(hub: LocalHub) -> None:
    async with Agent("requester", **at(hub)) as me:
        await me.submit("nothing", wait=True, task_id="mine")
        with pytest.raises(ValueError, match="mine"):
            await me.submit("nothing", wait=True, task_id="mine")


async def test_task_id_of_another_agent_is_a_duplicate(hub: LocalHub) -> None:
    async with Agent("one", **at(hub)) as one, Agent("other", **at(hub)) as other:
        await one.submit("nothing", wait=True, task_id="mine")
        with pytest.raises(Refused) as caught:
            await other.submit("nothing", wait=True, task_id="mine")
        assert caught.value.code == "duplicate_task"


async def test_agent_that_is_not_started_is_disconnected(hub: LocalHub) -> None:
    for asking in (Agent("me", **at(hub)).delegate("nothing"), Agent("me", **at(hub)).discover()):
        with pytest.raises(Disconnected):
            await asking


async def test_agent_does_not_get_its_own_tasks(hub: LocalHub) -> None:
    me = Agent("me", **at(hub))
    me.capability(nothing)
    async with me:
        with pytest.raises(Refused) as caught:
            await me.delegate("nothing")
        assert caught.value.code == "no_agent"


async def test_task_that_comes_back_to_an_agent_without_a_slot_fails_at_once(hub: LocalHub) -> None:
    planner, checker = Agent("planner", max_tasks=1, **at(hub)), Agent("checker", **at(hub))

    @planner.capability
    async def plan(task: Task) -> Any:
        return await task.delegate("check")

    @checker.capability
    async def check(task: Task) -> Any:
        return await task.delegate("plan")

    async with planner, checker, Agent("requester", **at(hub)) as requester:
        with pytest.raises(TaskFailed, match=r"planner-.* → checker-.* → planner-.*; raise max_tasks"):
            await soon(requester.delegate("plan"))


async def test_many_large_inputs_at_once_arrive() -> None:
    """Together they exceed the backlog of one connection."""
    async with HubServer(port=0) as hub, working(hub, optional, max_tasks=4) as me:
        given = "x" * 600_000
        outputs = await soon(asyncio.gather(*(me.delegate("optional", given, ttl=8) for _ in range(30))))
        assert outputs == [given] * 30


async def test_many_large_outputs_at_once_arrive() -> None:
    let_go = asyncio.Event()

    async def work() -> str:
        await let_go.wait()
        return "x" * 600_000

    async with HubServer(port=0) as hub, working(hub, work, max_tasks=30) as me:
        handles = [await me.submit("work") for _ in range(30)]
        let_go.set()
        assert {len(await soon(handle.result())) for handle in handles} == {600_000}


async def test_many_large_tasks_that_waited_for_an_agent_reach_it() -> None:
    async with HubServer(port=0) as hub, Agent("requester", **at(hub)) as me:
        handles = [await soon(me.submit("optional", "x" * 600_000, wait=True)) for _ in range(30)]
        async with working(hub, optional, max_tasks=30):
            assert {len(await soon(handle.result())) for handle in handles} == {600_000}


# Requests: an overloaded hub.


def count_of(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("bound", ["open_tasks_max", "pending_tasks_max", "records_bytes_max"])
async def test_submit_tries_again_until_there_is_room(
    kind: Callable[..., LocalHub], bound: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With any limit no task is lost and none runs twice."""
    caplog.set_level(logging.INFO, "agenthub.agent")
    release = asyncio.Event()
    done: list[int] = []

    async def work(x: int) -> int:
        await release.wait()
        done.append(x)
        return x

    async with (
        kind(HubSettings(**{bound: 4000 if bound == "records_bytes_max" else 2})) as hub,
        working(hub, work, max_tasks=1) as me,
    ):
        waiting = [asyncio.create_task(me.submit("work", {"x": x}, ttl=100.0)) for x in range(8)]
        await eventually(lambda: count_of(caplog, "overloaded task=") >= 20)
        assert 0 < sum(one.done() for one in waiting) < 8
        assert sum(hub.hub.summary()["tasks"].values()) < 8
        release.set()
        handles = await soon(asyncio.gather(*waiting))
        assert await soon(asyncio.gather(*(handle.result() for handle in handles))) == list(range(8))
        assert sorted(done) == list(range(8))
        if bound == "open_tasks_max":
            assert count_of(caplog, "this agent has reached its limit of 2 open tasks; wait until one ends") >= 20


async def test_submit_without_patience_says_at_once_that_the_hub_is_overloaded(kind: Callable[..., LocalHub]) -> None:
    async with kind(HubSettings(open_tasks_max=1)) as hub, Agent("me", **at(hub)) as me:
        await me.submit("nothing", wait=True)
        with pytest.raises(Refused) as caught:
            await soon(me.submit("nothing", wait=True, patience_s=0))
        assert caught.value.code == "overloaded"


async def test_submit_that_finds_no_room_within_the_ttl_is_a_timeout(kind: Callable[..., LocalHub]) -> None:
    async with kind(HubSettings(open_tasks_max=1)) as hub, Agent("requester", **at(hub)) as me:
        first = await me.submit("nobody", wait=True)
        began = asyncio.get_running_loop().time()
        with pytest.raises(TaskTimeout, match="did not accept the task") as caught:
            await soon(me.submit("nobody", wait=True, ttl=0.3, task_id="second"))
        assert 0.3 <= asyncio.get_running_loop().time() - began < 5
        assert caught.value.task_id == "second"
        assert tasks_of(hub) == {"pending": 1}
        first.cancel_soon()
        third = await soon(me.submit("nobody", wait=True, task_id="second"))  # Its id is free again.
        third.cancel_soon()


async def test_refusal_that_comes_when_the_ttl_is_over_is_a_timeout(
    kind: Callable[..., LocalHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agenthub.Backoff, "next_s", lambda self: 0.0)  # An attempt is always under way.
    async with kind(HubSettings(open_tasks_max=1)) as hub, Agent("requester", **at(hub)) as me:
        first = await me.submit("nobody", wait=True)
        for _ in range(20):
            with pytest.raises(TaskTimeout, match="did not accept the task"):
                await soon(me.submit("nobody", wait=True, ttl=0.01))
        first.cancel_soon()


async def test_time_spent_on_waiting_for_room_is_part_of_the_ttl(kind: Callable[..., LocalHub]) -> None:
    async with kind(HubSettings(open_tasks_max=1)) as hub, Agent("requester", **at(hub)) as me:
        first = await me.submit("nobody", wait=True)
        began = asyncio.get_running_loop().time()
        waiting = asyncio.create_task(me.submit("nobody", wait=True, ttl=100.0, task_id="second"))
        asyncio.get_running_loop().call_later(0.2, first.cancel_soon)
        second = await soon(waiting)
        waited = asyncio.get_running_loop().time() - began
        assert waited >= 0.2
        assert 100.0 - waited - 1 < hub.hub.tasks.open["second"].request.ttl <= 99.8
        second.cancel_soon()


async def test_submit_that_waits_for_room_may_be_cancelled(
    kind: Callable[..., LocalHub], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "agenthub.agent")
    async with kind(HubSettings(open_tasks_max=1)) as hub, Agent("requester", **at(hub)) as me:
        first = await me.submit("nobody", wait=True)
        waiting = asyncio.create_task(me.submit("nobody", wait=True, task_id="second"))
        await eventually(lambda: count_of(caplog, "overloaded task=second"))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(Refused) as caught:  # Its id is free again.
            await me.submit("nobody", wait=True, task_id="second", patience_s=0)
        assert caught.value.code == "overloaded"
        first.cancel_soon()
        await eventually(lambda: tasks_of(hub) == {"failed": 1})


async def test_other_refusals_are_raised_at_once(hub: LocalHub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "agenthub.agent")
    async with Agent("requester", **at(hub)) as me:
        for options, code in (
            ({"capability": "nobody"}, "no_agent"),
            ({"agent_id": "nobody"}, "unknown_agent"),
            ({"capability": "nobody", "wait": True, "parent_id": "none"}, "not_assigned"),
        ):
            for _ in range(2):  # The second one finds the id free again.
                with pytest.raises(Refused) as caught:
                    await soon(me.submit(**options, task_id="same"))
                assert caught.value.code == code
    assert count_of(caplog, "overloaded") == 0


async def test_agent_for_which_there_is_no_room_tries_again_until_there_is(
    kind: Callable[..., LocalHub], caplog: pytest.LogCaptureFixture
) -> None:
    async with kind(HubSettings(agents_max=1, grace_s=0.0)) as hub:
        async with Agent("first", **at(hub)):
            second = Agent("second", **at(hub))
            joining = asyncio.create_task(second.__aenter__())
            await eventually(lambda: count_of(caplog, "the hub has reached its limit of 1 agents; retry later") >= 3)
            assert not joining.done()
        await soon(joining)
        assert online(hub) == 1
        await second.__aexit__(None, None, None)


async def test_agent_for_which_there_is_no_connection_tries_again_until_there_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with HubServer(HubSettings(connections_max=1), port=0) as hub:
        async with Agent("first", **at(hub)):
            second = Agent("second", **at(hub))
            joining = asyncio.create_task(second.__aenter__())
            await eventually(lambda: count_of(caplog, "HTTP 503") >= 3)
            assert not joining.done()
        await soon(joining)
        await second.__aexit__(None, None, None)


# Tasks that end without their handler: cancelled, expired.


class Slow:
    """Handlers that do not return on their own, and a record of how they ended."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.seen: list[str] = []

    async def slow(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.seen.append("cancelled")
            raise

    def slow_plain(self, task: Task) -> None:
        self.loop.call_soon_threadsafe(self.begun.set)
        while not task.cancelled:
            threading.Event().wait(0.002)
        self.seen.append("cancelled")


@pytest.fixture
async def slow() -> Slow:
    return Slow()


@pytest.mark.parametrize("name", ["slow", "slow_plain"])
async def test_cancelled_task_stops_its_handler(hub: LocalHub, slow: Slow, name: str) -> None:
    async with working(hub, getattr(slow, name)) as me:
        handle = await me.submit(name)
        await soon(slow.begun.wait())
        await handle.cancel("never mind")
        assert await failure_of(handle.result()) == ("cancelled", "never mind")
        await eventually(lambda: slow.seen == ["cancelled"])
        await handle.cancel()  # A second time has no effect.


@pytest.mark.parametrize("name", ["slow", "slow_plain"])
async def test_expired_task_stops_its_handler(hub: LocalHub, slow: Slow, name: str) -> None:
    async with working(hub, getattr(slow, name)) as me:
        with pytest.raises(TaskTimeout) as caught:
            await soon(me.delegate(name, ttl=0.1))
        assert caught.value.code == "timeout"
        await eventually(lambda: slow.seen == ["cancelled"])


@pytest.mark.parametrize("name", ["slow", "slow_plain"])
async def test_stopped_agent_stops_its_handlers(hub: LocalHub, slow: Slow, name: str) -> None:
    async with Agent("requester", **at(hub)) as me:
        async with working(hub, getattr(slow, name)):
            handle = await me.submit(name)
            await soon(slow.begun.wait())
        code, _ = await failure_of(handle.result())
        assert code == "agent_lost"
        await eventually(lambda: slow.seen == ["cancelled"])


@pytest.mark.parametrize("name", ["slow", "slow_plain"])
async def test_cancelled_delegate_cancels_the_task(hub: LocalHub, slow: Slow, name: str) -> None:
    async with working(hub, getattr(slow, name)) as me:
        asking = asyncio.create_task(me.delegate(name))
        await soon(slow.begun.wait())
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await eventually(lambda: slow.seen == ["cancelled"])
        await eventually(lambda: tasks_of(hub) == {"failed": 1})


@pytest.mark.parametrize("ends", ["expired", "cancelled"])
async def test_clean_up_of_a_handler_is_not_cut_short(hub: LocalHub, ends: str) -> None:
    """The hub's report and the agent's own timer arrive at nearly the same time: one of them cancels."""
    cleaned = asyncio.Event()
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.3)
            cleaned.set()

    async with working(hub, work) as me:
        handle = await me.submit("work", ttl=0.2)
        await soon(begun.wait())
        if ends == "cancelled":
            await handle.cancel()
        with pytest.raises(TaskFailed):
            await soon(handle.result())
        await asyncio.wait_for(cleaned.wait(), 2)


async def test_handler_that_ignores_its_cancellation_changes_nothing(hub: LocalHub, slow: Slow) -> None:
    async def stubborn() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await slow.slow()
        return "too late"

    async with working(hub, stubborn, nothing) as me:
        handle = await me.submit("stubborn")
        await soon(slow.begun.wait())
        await handle.cancel()
        assert (await failure_of(handle.result()))[0] == "cancelled"
        assert await soon(me.delegate("nothing")) == "nothing"


async def test_plain_handler_that_ignores_its_end_keeps_its_thread_only(hub: LocalHub) -> None:
    let_go = threading.Event()

    def stubborn() -> None:
        let_go.wait(WAIT_S)

    async with working(hub, stubborn, nothing, max_tasks=2) as me:
        with pytest.raises(TaskTimeout):
            await soon(me.delegate("stubborn", ttl=0.1))
        assert await soon(me.delegate("nothing")) == "nothing"
        let_go.set()


class Stubborn:
    """Handlers that go on after their task has ended, until the test lets them go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.let_go_async = asyncio.Event()
        self.most = self.running = 0

    def plain(self, number: int) -> str:
        self.begin()
        self.let_go.wait(WAIT_S)
        self.running -= 1
        return "done"

    async def awaiting(self, number: int) -> str:
        self.begin()
        while not self.let_go_async.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.let_go_async.wait()
        self.running -= 1
        return "done"

    def begin(self) -> None:
        self.running += 1
        self.most = max(self.most, self.running)

    def end(self) -> None:
        self.let_go.set()
        self.let_go_async.set()


@pytest.fixture
async def stubborn(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stubborn]:
    monkeypatch.setattr(agenthub, "OVERSTAY_S", 0.05)
    handlers = Stubborn()
    yield handlers
    handlers.end()


@pytest.mark.parametrize("name", ["plain", "awaiting"])
async def test_slot_of_a_handler_that_overstays_is_not_given_to_others(
    hub: LocalHub, stubborn: Stubborn, name: str
) -> None:
    async with working(hub, getattr(stubborn, name), max_tasks=1) as me:
        healthy = Agent("healthy", **at(hub))
        handle = await me.submit(name, 1)
        await eventually(lambda: stubborn.running == 1)
        await handle.cancel()
        waiting = [
            await me.submit(name, number) for number in range(5)
        ]  # The first goes to the agent, which gives it back.
        await eventually(lambda: any(agent.occupied for agent in hub.hub.directory.agents.values()))
        await eventually(lambda: tasks_of(hub) == {"failed": 1, "pending": 5})
        healthy.capability(name)(lambda number: f"{number} by the healthy one")
        async with healthy:
            outputs = [await soon(one.result()) for one in waiting]
            assert outputs == [f"{number} by the healthy one" for number in range(5)]
            assert [one.outcome.attempt for one in waiting if one.outcome] == [1] * 5
        stubborn.end()
        assert await soon(me.delegate(name, 1)) == "done"
        assert stubborn.most == 1
        assert not any(agent.occupied for agent in hub.hub.directory.agents.values())


async def test_slot_that_is_taken_is_announced_after_a_reconnect_too(
    hub: LocalHub, wire: Wire, stubborn: Stubborn
) -> None:
    worker = Agent("worker", hub=wire, max_tasks=1)
    worker.capability(stubborn.plain)
    async with worker, Agent("me", **at(hub)) as me:
        with pytest.raises(TaskTimeout):
            await soon(me.delegate("plain", 1, ttl=0.05))
        await eventually(lambda: any(agent.occupied for agent in hub.hub.directory.agents.values()))
        wire.cut(for_now=True)
        await eventually(lambda: wire.opened_count == 2 and worker.is_online)
        handle = await me.submit("plain", 2)
        assert tasks_of(hub) == {"timeout": 1, "pending": 1}
        stubborn.end()
        assert await soon(handle.result()) == "done"


async def test_threads_of_plain_handlers_are_used_again_and_end_with_the_agent(hub: LocalHub) -> None:
    threads: set[threading.Thread] = set()

    def plain() -> None:
        threads.add(threading.current_thread())

    async with working(hub, plain) as me:
        for _ in range(20):
            await soon(me.delegate("plain"))
        assert len(threads) == 1  # A thread is idle before its result is handed over.
    await eventually(lambda: not any(thread.is_alive() for thread in threads))


def test_thread_is_idle_before_it_hands_its_outcome_over() -> None:
    pool, is_done = agenthub.DaemonThreads("pool"), threading.Event()

    def first() -> Callable[[], None]:
        return lambda: pool.start(lambda: is_done.set)  # As a loop does that was handed the outcome at once.

    pool.start(first)
    assert is_done.wait(WAIT_S)
    assert pool._count == 1
    pool.close()


async def test_handler_that_blocks_the_loop_is_named(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agenthub, "BLOCKED_S", 0.5)

    async def blocking() -> str:
        await asyncio.sleep(0)
        threading.Event().wait(1.0)
        return "done"

    async def waiting() -> str:
        await asyncio.sleep(0.6)
        return "done"

    async with working(hub, blocking, waiting) as me:
        assert await soon(me.delegate("waiting")) == "done"
        assert await soon(me.delegate("blocking")) == "done"
    named = [line for line in caplog.messages if "blocked the event loop" in line]
    assert len(named) == 1
    assert "blocking task=" in named[0]


# The handle of a task.


async def test_handle_gives_the_result_to_all_who_wait(hub: LocalHub) -> None:
    let_go = asyncio.Event()

    async def work() -> int:
        await let_go.wait()
        return 7

    async with working(hub, work) as me:
        handle = await me.submit("work")
        waiting = [asyncio.create_task(handle.result()) for _ in range(3)]
        with pytest.raises(TimeoutError):
            await handle.result(timeout_s=0.02)
        waiting[0].cancel()
        await asyncio.sleep(0)
        assert not handle.done
        let_go.set()
        assert await soon(asyncio.gather(*waiting[1:])) == [7, 7]
        assert handle.done
        assert await handle.result() == 7


async def test_handle_raises_the_failure_to_all_who_wait(hub: LocalHub) -> None:
    async def work() -> None:
        raise ValueError("wrong")

    async with working(hub, work) as me:
        handle = await me.submit("work")
        ends = await soon(asyncio.gather(*(handle.result() for _ in range(3)), return_exceptions=True))
        assert [str(end) for end in ends] == ["ValueError: wrong"] * 3
        assert [end.task_id for end in ends] == [handle.task_id] * 3


async def test_failure_that_nobody_fetches_makes_no_noise(hub: LocalHub) -> None:
    async def work() -> None:
        raise TaskFailed("wrong")

    async with working(hub, work) as me:
        handle = await me.submit("work")
        await eventually(lambda handle=handle: handle.done)
        del handle


@pytest.mark.parametrize("is_async", [True, False])
async def test_progress_comes_in_order_and_ends_with_the_task(hub: LocalHub, is_async: bool) -> None:
    def count(task: Task) -> str:
        for index in range(5):
            task.progress(index / 4, {"index": index})
        task.progress(detail="nearly")
        return "done"

    async def count_async(task: Task) -> str:
        return count(task)

    async with working(hub, count, count_async) as me:
        handle = await me.submit("count_async" if is_async else "count")
        updates = await soon(_collected(handle))
        assert [update.seq for update in updates] == [1, 2, 3, 4, 5, 6]
        assert [update.progress for update in updates] == [0, 0.25, 0.5, 0.75, 1, None]
        assert updates[4].detail == {"index": 4}
        assert await handle.result() == "done"
        assert await soon(_collected(handle)) == []  # Each report is delivered once.


async def _collected(handle: agenthub.TaskHandle) -> list[agenthub.Progress]:
    return [update async for update in handle]


async def test_progress_is_seen_while_the_task_runs(hub: LocalHub) -> None:
    seen = asyncio.Event()

    async def work(task: Task) -> None:
        task.progress(0.5)
        await seen.wait()

    async with working(hub, work) as me:
        handle = await me.submit("work")
        async with asyncio.timeout(WAIT_S):
            async for _ in handle:
                seen.set()
        await handle.result()


async def test_progress_of_an_ended_task_goes_nowhere(hub: LocalHub) -> None:
    kept: list[Task] = []

    async def work(task: Task) -> None:
        kept.append(task)

    async with working(hub, work, nothing) as me:
        await soon(me.delegate("work"))
        kept[0].progress(0.5)
        assert await soon(me.delegate("nothing")) == "nothing"


async def test_two_iterators_of_one_handle_both_end(hub: LocalHub) -> None:
    async def work(task: Task) -> None:
        for _ in range(10):
            task.progress(0.5)
            await asyncio.sleep(0)

    async with working(hub, work) as me:
        handle = await me.submit("work")
        one, other = await soon(asyncio.gather(_collected(handle), _collected(handle)))
        assert len(one) + len(other) == 10


# Discovery, broadcasts, and the hub's status.


async def test_discover_finds_what_others_can_do(hub: LocalHub) -> None:
    async with working(hub, plain, nothing, metadata={"version": 2}, max_tasks=3) as me:
        (found,) = await me.discover("plain")
        assert (found.name, found.running, found.max_tasks, found.metadata) == ("worker", 0, 3, {"version": 2})
        assert [one.name for one in await me.discover()] == ["requester", "worker"]
        assert len(await me.discover(limit=1)) == 1
        assert await me.discover("no-such-thing") == []
        with pytest.raises(Refused):
            await me.discover(limit=0)


async def test_status_tells_of_the_hub_and_of_a_task(hub: LocalHub) -> None:
    async with working(hub, nothing) as me:
        await soon(me.delegate("nothing", task_id="mine"))
        assert ((await me.status()).hub or {})["tasks"]["completed"] == 1
        report = await me.status("mine")
        assert (report.state, report.output, report.requester) == ("completed", "nothing", me.agent_id)
        with pytest.raises(Refused) as caught:
            await me.status("no-such-task")
        assert caught.value.code == "unknown_task"


@pytest.mark.parametrize("is_async", [True, False])
async def test_broadcast_reaches_the_handlers_of_both_styles(hub: LocalHub, is_async: bool) -> None:
    heard: list[Any] = []

    def hear(message: Any, sender: str) -> None:
        heard.append((message, sender))

    async def hear_async(message: Any, sender: str) -> None:
        heard.append((message, sender))

    class Listener(Agent):
        @on_broadcast
        async def on_news(self, message: Any, sender: str) -> None:
            heard.append((message, sender))

    listener = Agent("listener", **at(hub))
    listener.on_broadcast(hear_async if is_async else hear)
    async with listener, Listener(**at(hub)), Agent("deaf", **at(hub)), Agent("sender", **at(hub)) as me:
        assert await soon(me.broadcast({"deploy": "v2"})) == 3
        await eventually(lambda: heard == [({"deploy": "v2"}, me.agent_id)] * 2)


async def test_broadcast_goes_to_those_with_a_capability(hub: LocalHub) -> None:
    async with working(hub, nothing) as me:
        assert await me.broadcast("x", capability="nothing") == 1
        assert await me.broadcast("x", capability="no-such-thing") == 0
        with pytest.raises(ValueError, match="JSON"):
            await me.broadcast(b"x")


async def test_slow_broadcast_handler_holds_up_nothing_and_keeps_the_order(hub: LocalHub) -> None:
    heard: list[int] = []
    let_go = asyncio.Event()
    worker = Agent("worker", **at(hub))
    worker.capability(nothing)

    @worker.on_broadcast
    async def hear(message: int, sender: str) -> None:
        await let_go.wait()
        if message == 3:
            raise ValueError("one that fails does not keep the next one away")
        heard.append(message)

    async with worker, Agent("requester", **at(hub)) as me:
        for number in range(10):
            await me.broadcast(number)
        assert await soon(me.delegate("nothing")) == "nothing"
        let_go.set()
        await eventually(lambda: len(heard) == 9)
        assert heard == [0, 1, 2, 4, 5, 6, 7, 8, 9]


async def test_oldest_broadcasts_go_when_the_handler_is_too_slow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agenthub, "UPDATES_MAX", 3)
    heard: list[int] = []
    let_go = asyncio.Event()
    async with LocalHub() as hub:
        worker = Agent("worker", hub=hub)

        @worker.on_broadcast
        async def hear(message: int, sender: str) -> None:
            heard.append(message)
            await let_go.wait()

        async with worker, Agent("requester", hub=hub) as me:
            for number in range(8):
                await me.broadcast(number)
            await eventually(lambda: heard == [0])
            let_go.set()
            await eventually(lambda: heard == [0, 5, 6, 7])
    assert "too slow" in caplog.text


# Subtasks.


async def test_handler_delegates_to_others(hub: LocalHub) -> None:
    async def outer(task: Task, x: int) -> Any:
        handle = await task.submit("inner", {"x": x})
        return [await handle.result(), await task.delegate("inner", {"x": 2 * x})]

    async def inner(task: Task, x: int) -> Any:
        return [x, task.parent_id]

    async with working(hub, outer), working(hub, inner) as me:
        assert await soon(me.delegate("outer", {"x": 1}, task_id="t")) == [[1, "t"], [2, "t"]]


async def test_plain_handler_delegates_to_others(hub: LocalHub) -> None:
    def outer(task: Task, x: int) -> Any:
        return task.run(task.delegate("plain", {"x": x}))

    async with working(hub, outer), working(hub, plain) as me:
        assert await soon(me.delegate("outer", {"x": 1})) == [1, 2]


async def test_async_handler_is_told_to_await_instead_of_run(hub: LocalHub) -> None:
    async def work(task: Task) -> Any:
        return task.run(task.delegate("plain", {"x": 1}))

    async with working(hub, work) as me:
        assert await failure_of(me.delegate("work")) == (
            "failed",
            "RuntimeError: an async handler must use await instead of task.run",
        )


@pytest.mark.parametrize("name", ["outer", "outer_plain"])
async def test_child_ends_with_its_parent(hub: LocalHub, slow: Slow, name: str) -> None:
    async def outer(task: Task) -> Any:
        return await task.delegate("slow")

    def outer_plain(task: Task) -> Any:
        return task.run(task.delegate("slow"))

    async with working(hub, outer, outer_plain), working(hub, slow.slow) as me:
        handle = await me.submit(name)
        await soon(slow.begun.wait())
        await handle.cancel()
        await eventually(lambda: slow.seen == ["cancelled"])
        await eventually(lambda: tasks_of(hub) == {"failed": 2})


async def test_failure_of_a_child_is_a_failure_like_any_other(hub: LocalHub) -> None:
    async def outer(task: Task) -> Any:
        return await task.delegate("inner")

    async def inner() -> None:
        raise TaskFailed("no", code="of-its-own")

    async with working(hub, outer), working(hub, inner) as me:
        assert await failure_of(me.delegate("outer")) == ("failed", "TaskFailed: no")


async def test_stopping_ends_a_plain_handler_that_waits_for_a_child(hub: LocalHub, slow: Slow) -> None:
    ended = threading.Event()

    def outer(task: Task) -> Any:
        try:
            return task.run(task.delegate("slow"))
        finally:
            ended.set()

    async with working(hub, slow.slow), Agent("requester", **at(hub)) as me:
        async with working(hub, outer):
            await me.submit("outer")
            await soon(slow.begun.wait())
        await eventually(ended.is_set)


# Capabilities added later; agents that start twice.


async def test_capability_added_while_running_is_announced(hub: LocalHub) -> None:
    worker = Agent("worker", **at(hub))
    async with worker, Agent("requester", **at(hub)) as me:
        worker.capability(nothing)
        handle = await me.submit("nothing", wait=True)
        assert await soon(handle.result()) == "nothing"
        assert len(await me.discover("nothing")) == 1


async def test_capability_added_during_the_registration_is_announced(hub: LocalHub, wire: Wire) -> None:
    worker = Agent("worker", hub=wire)

    def lets_through(message: Any) -> bool:
        if message.type == "register" and wire.lets_through is lets_through:
            wire.lets_through = lambda message: True
            worker.capability(nothing)  # The hub has read the registration, but the agent has not read the reply.
        return True

    wire.lets_through = lets_through
    async with worker, Agent("requester", **at(hub)) as me:
        handle = await me.submit("nothing", wait=True)
        assert await asyncio.wait_for(handle.result(), 3) == "nothing"


async def test_stop_leaves_a_handler_behind_that_ignores_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agenthub, "LEAVING_S", 0.05)
    begun, let_go = asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        begun.set()
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()

    async with LocalHub() as hub:
        worker = Agent("worker", hub=hub)
        worker.capability(stubborn)
        async with worker, Agent("me", hub=hub) as me:
            await me.submit("stubborn", task_id="t1")
            await soon(begun.wait())
            await soon(worker.stop())
            assert "left behind: stubborn task=t1" in caplog.text
            let_go.set()


async def test_run_says_what_to_do_where_a_loop_runs() -> None:
    with pytest.raises(RuntimeError, match="await agent"):
        Agent("me").run()


async def test_second_definition_in_the_same_place_replaces_the_first(hub: LocalHub) -> None:
    worker = Agent("worker", **at(hub))
    for number in (1, 2):

        @worker.capability
        def work(number: int = number) -> int:
            return number

    async with worker, Agent("me", **at(hub)) as me:
        assert await soon(me.delegate("work")) == 2


async def test_agent_is_used_twice(hub: LocalHub) -> None:
    worker = Agent("worker", **at(hub))
    worker.capability(nothing)
    async with Agent("requester", **at(hub)) as me:
        for _ in range(3):
            async with worker:
                assert await soon(me.delegate("nothing")) == "nothing"
            assert await me.discover("nothing") == []


async def test_agent_cannot_be_started_while_it_runs(hub: LocalHub) -> None:
    async with Agent("me", **at(hub)) as me:
        with pytest.raises(RuntimeError, match="already running"):
            await me.start()
        assert len(await me.discover()) == 1


async def test_stop_twice_and_before_the_start_does_no_harm(hub: LocalHub) -> None:
    me = Agent("me", **at(hub))
    await me.stop()
    async with me:
        await asyncio.gather(me.stop(), me.stop())
    await me.stop()
    assert online(hub) == 0


async def test_serving_ends_when_the_agent_is_stopped_elsewhere(hub: LocalHub) -> None:
    me = Agent("me", **at(hub))
    serving = asyncio.create_task(me.serve(asyncio.Event()))
    await eventually(lambda: online(hub))
    await soon(me.stop())
    assert await soon(serving) is None
    assert online(hub) == 0


def test_agent_is_used_on_two_loops() -> None:
    agent = Agent("worker", max_tasks=2)
    agent.capability(nothing)

    async def once() -> Any:
        async with LocalHub() as hub:
            agent.use_hub(hub)
            async with agent, Agent("requester", hub=hub) as me:
                return await soon(asyncio.gather(*(me.delegate("nothing") for _ in range(8))))

    assert [asyncio.run(once()) for _ in range(2)] == [["nothing"] * 8] * 2


def test_agent_whose_threads_hung_works_on_the_next_loop() -> None:
    let_go = threading.Event()
    agent = Agent("worker", max_tasks=1)

    @agent.capability
    def work(is_to_hang: bool) -> None:
        if is_to_hang:
            let_go.wait(WAIT_S)

    async def once(is_to_hang: bool) -> None:
        async with LocalHub() as hub:
            agent.use_hub(hub)
            async with agent, Agent("requester", hub=hub) as me:
                with contextlib.suppress(TaskTimeout):
                    await me.delegate("work", is_to_hang, ttl=0.2)
                if is_to_hang:  # Another call waits for the thread: now the semaphore belongs to this loop.
                    with contextlib.suppress(TaskTimeout):
                        await me.delegate("work", False, ttl=0.2)
                else:
                    await soon(me.delegate("work", False, ttl=2))

    asyncio.run(once(True))
    asyncio.run(once(False))
    let_go.set()


# Lost connections.


async def test_result_is_kept_and_sent_after_a_reconnect(hub: LocalHub, wire: Wire) -> None:
    let_go, begun, returned = asyncio.Event(), asyncio.Event(), asyncio.Event()
    worker = Agent("worker", hub=wire)

    @worker.capability
    async def work() -> str:
        begun.set()
        await let_go.wait()
        asyncio.get_running_loop().call_soon(returned.set)
        return "kept"

    async with worker, Agent("requester", **at(hub)) as me:
        handle = await me.submit("work")
        await soon(begun.wait())
        wire.cut()
        await eventually(lambda: away(hub) == 1)
        let_go.set()
        await soon(returned.wait())
        assert not handle.done
        wire.restore()
        assert await soon(handle.result()) == "kept"
        assert (await me.status(handle.task_id)).attempt == 1


async def test_handler_goes_on_over_a_reconnect(hub: LocalHub, wire: Wire) -> None:
    let_go = threading.Event()
    begun = threading.Event()
    worker = Agent("worker", hub=wire)

    @worker.capability
    def work(task: Task) -> Any:
        begun.set()
        let_go.wait(WAIT_S)
        task.progress(0.5)
        return task.attempt

    async with worker, Agent("requester", **at(hub)) as me:
        handle = await me.submit("work", max_retries=3)
        await eventually(begun.is_set)
        first_id = worker.agent_id
        for _ in range(3):
            count = wire.opened_count
            wire.cut(for_now=True)
            await eventually(lambda count=count: wire.opened_count > count and online(hub) == 2)
            await worker.connected()  # Progress would be dropped before the agent knows that it is online.
        let_go.set()
        assert len(await soon(_collected(handle))) == 1
        assert await soon(handle.result()) == 1
        assert worker.agent_id == first_id


async def test_result_that_the_hub_has_but_did_not_confirm_is_not_sent_for_ever(hub: LocalHub, wire: Wire) -> None:
    worker = Agent("worker", hub=wire)
    worker.capability(nothing)

    def cut_before_the_confirmation(message: Any) -> bool:
        if message.type == "status" and message.reply_to is not None:
            wire.cut(for_now=True)
            wire.lets_through = lambda message: True
            return False
        return True

    wire.lets_through = cut_before_the_confirmation
    async with worker, Agent("requester", **at(hub)) as me:
        assert await soon(me.delegate("nothing")) == "nothing"
        await eventually(lambda: wire.opened_count == 2 and worker.is_online)
        assert await soon(me.delegate("nothing")) == "nothing"
        assert hub.hub.summary()["refused"] == {}  # A result for an ended task would be refused.


async def test_result_arrives_that_came_while_the_requester_was_away(hub: LocalHub, wire: Wire) -> None:
    let_go = asyncio.Event()

    async def work() -> str:
        await let_go.wait()
        return "done"

    async with working(hub, work), Agent("me", hub=wire) as me:
        handle = await me.submit("work")
        wire.cut()
        await eventually(lambda: away(hub) == 1)
        let_go.set()
        await eventually(lambda: tasks_of(hub) == {"completed": 1})
        assert not handle.done
        wire.restore()
        assert await soon(handle.result()) == "done"


async def test_result_lost_on_the_wire_arrives_after_the_reconnect(hub: LocalHub, wire: Wire) -> None:
    async with working(hub, nothing), Agent("me", hub=wire) as me:
        wire.lets_through = lambda message: message.type != "result"
        handle = await me.submit("nothing")
        await eventually(lambda: tasks_of(hub) == {"completed": 1})
        wire.cut(for_now=True)
        wire.lets_through = lambda message: True
        assert await soon(handle.result()) == "nothing"


async def test_result_lost_on_the_wire_is_not_taken_for_none_after_the_grace_time(
    kind: Callable[..., LocalHub],
) -> None:
    async with kind(HubSettings(grace_s=0.05)) as hub, working(hub, nothing):
        wire = Wire(hub)
        async with Agent("me", hub=wire) as me:
            wire.lets_through = lambda message: message.type != "result"
            handle = await me.submit("nothing")
            await eventually(lambda: tasks_of(hub) == {"completed": 1})
            wire.cut()
            await asyncio.sleep(0.2)
            wire.lets_through = lambda message: True
            wire.restore()
            (end,) = await soon(asyncio.gather(handle.result(), return_exceptions=True))
            assert getattr(end, "code", end) in ("nothing", "hub_lost")


async def test_task_cancelled_while_its_agent_was_away_stops_there_on_its_return(
    hub: LocalHub, wire: Wire, slow: Slow
) -> None:
    worker = Agent("worker", hub=wire)
    worker.capability(slow.slow)
    async with worker, Agent("requester", **at(hub)) as me:
        handle = await me.submit("slow")
        await soon(slow.begun.wait())
        wire.cut()
        await eventually(lambda: away(hub) == 1)
        await handle.cancel()
        assert slow.seen == []
        wire.restore()
        await eventually(lambda: slow.seen == ["cancelled"])


async def test_delegate_cancelled_while_away_calls_the_task_off_later(hub: LocalHub, wire: Wire, slow: Slow) -> None:
    async with working(hub, slow.slow), Agent("me", hub=wire) as me:
        asking = asyncio.create_task(me.delegate("slow"))
        await soon(slow.begun.wait())
        wire.cut()
        await eventually(lambda: away(hub) == 1 and not me.is_online)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        wire.restore()
        async with asyncio.timeout(3):
            while slow.seen != ["cancelled"]:
                await asyncio.sleep(0.01)


async def test_requests_without_a_connection_wait_for_one(hub: LocalHub, wire: Wire) -> None:
    async with working(hub, nothing), Agent("me", hub=wire) as me:
        wire.cut()
        await eventually(lambda: away(hub) == 1)
        asking = [asyncio.create_task(one) for one in (me.delegate("nothing"), me.discover("nothing"), me.status())]
        await asyncio.sleep(0.01)
        wire.restore()
        output, found, _ = await soon(asyncio.gather(*asking))
        assert (output, len(found)) == ("nothing", 1)


async def test_delegate_without_a_connection_ends_with_its_ttl(hub: LocalHub, wire: Wire) -> None:
    async with Agent("me", hub=wire) as me:
        wire.cut()
        await eventually(lambda: away(hub) == 1)
        with pytest.raises(TaskTimeout):
            await soon(me.delegate("nothing", ttl=0.05))


async def test_delegate_whose_acknowledgement_was_lost_is_done_once(hub: LocalHub, wire: Wire) -> None:
    count = 0

    async def work() -> int:
        nonlocal count
        count += 1
        return count

    def cut_before_the_acknowledgement(message: Any) -> bool:
        if message.type == "status" and message.reply_to is not None:
            wire.cut(for_now=True)
            wire.lets_through = lambda message: True
            return False
        return True

    async with working(hub, work), Agent("me", hub=wire) as me:
        wire.lets_through = cut_before_the_acknowledgement
        assert await soon(me.delegate("work")) == 1
    assert (count, wire.opened_count) == (1, 2)


@pytest.mark.parametrize(("max_retries", "expected"), [(0, "agent_lost"), (1, 2)])
async def test_delegate_lost_on_the_wire_is_reported_by_its_agent(
    hub: LocalHub, wire: Wire, max_retries: int, expected: Any
) -> None:
    worker = Agent("worker", hub=wire)

    @worker.capability
    async def work(task: Task) -> int:
        return task.attempt

    def cut_before_the_task(message: Any) -> bool:
        if message.type == "delegate":
            wire.cut(for_now=True)
            wire.lets_through = lambda message: True
            return False
        return True

    wire.lets_through = cut_before_the_task
    async with worker, Agent("requester", **at(hub)) as me:
        handle = await me.submit("work", max_retries=max_retries)
        if max_retries:
            assert await soon(handle.result()) == expected
        else:
            assert (await failure_of(handle.result()))[0] == expected


async def test_lost_agent_has_its_task_done_by_another(kind: Callable[..., LocalHub], slow: Slow) -> None:
    async def other(task: Task) -> int:
        return task.attempt

    async with kind(HubSettings(grace_s=0.05)) as hub, Agent("requester", **at(hub)) as me:
        wire = Wire(hub)
        lost, second = Agent("lost", hub=wire), Agent("second", **at(hub))
        lost.capability("work")(slow.slow)
        second.capability("work")(other)
        async with lost:
            handle = await me.submit("work", max_retries=1)
            await soon(slow.begun.wait())
            async with second:
                wire.cut()
                assert await soon(handle.result()) == 2
                wire.restore()
                await eventually(lambda: slow.seen == ["cancelled"])


async def test_silent_hub_is_left_and_tried_again(kind: Callable[..., LocalHub]) -> None:
    async with kind(HubSettings(heartbeat_s=0.05)) as hub:
        wire = Wire(hub)
        async with Agent("me", hub=wire) as me:
            wire.lets_through = lambda message: wire.opened_count > 1
            await eventually(lambda: wire.opened_count == 2)
            assert len(await soon(me.discover())) == 1


async def test_stale_agent_comes_back_as_the_one_it_was(kind: Callable[..., LocalHub]) -> None:
    def lets_through(message: Any) -> bool:
        if message.type == "register":
            message.heartbeat_s = 60.0  # The agent sends no heartbeats: the hub closes with 4001.
        return True

    async with kind(HubSettings(heartbeat_s=0.05)) as hub:
        wire = Wire(hub)
        wire.lets_through = lets_through
        async with Agent("me", hub=wire) as me:
            first_id = me.agent_id
            await eventually(lambda: away(hub) == 1)
            wire.lets_through = lambda message: True
            await eventually(lambda: online(hub) == 1)
            assert me.agent_id == first_id


async def test_hub_that_comes_later_is_waited_for() -> None:
    hub = HubServer(port=0)
    await hub.start()
    await hub.stop()
    me = Agent("me", url=hub.url)
    starting = asyncio.create_task(me.start())
    await asyncio.sleep(0.05)
    assert not starting.done()
    async with HubServer(port=hub.port) as hub:
        await soon(starting)
        assert online(hub) == 1
        await me.stop()


async def test_start_that_is_cancelled_leaves_nothing() -> None:
    me = Agent("me", url="ws://127.0.0.1:9")
    starting = asyncio.create_task(me.start())
    await asyncio.sleep(0.05)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting


@pytest.mark.parametrize(
    "answer", [b"", b"no HTTP\r\n\r\n", b"HTTP/1.1 404 Not Found\r\n\r\n", b"HTTP/1.1 101 X\r\n\r\n"]
)
async def test_what_is_no_hub_is_given_up(answer: bytes) -> None:
    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
    url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    with pytest.raises(Disconnected, match="no hub at ws://"):
        await soon(Agent("me", url=url, give_up_after_s=0.05).start())
    server.close()


@pytest.mark.parametrize("give_up_after_s", [0, 0.1])
async def test_hub_that_never_comes_is_given_up(give_up_after_s: float) -> None:
    with pytest.raises(Disconnected, match="no hub at"):
        async with asyncio.timeout(WAIT_S), Agent("me", url="ws://127.0.0.1:9", give_up_after_s=give_up_after_s):
            pytest.fail("there is no hub")


async def test_hub_that_does_not_come_back_is_given_up(hub: LocalHub, wire: Wire) -> None:
    async with Agent("me", hub=wire, give_up_after_s=0.1) as me:
        handle = await me.submit("nothing", wait=True)
        wire.cut()
        with pytest.raises(Disconnected):
            await soon(handle.result())
        for asking in (me.delegate("nothing"), me.discover(), me.broadcast("x")):
            with pytest.raises(Disconnected):
                await soon(asking)


async def test_newer_connection_ends_the_older_agent(hub: LocalHub) -> None:
    async with Agent("older", **at(hub)) as older:
        newer = Agent("newer", **at(hub))
        newer.agent_id, newer.resume = older.agent_id, older.resume
        handle = await older.submit("nothing", wait=True)
        async with newer:
            with pytest.raises(Disconnected) as caught:
                await soon(handle.result())
            with pytest.raises(Disconnected) as caught:
                await soon(older.discover())
            assert caught.value.close_code == 4000
            assert newer.agent_id == older.agent_id
            assert len(await newer.discover()) == 1


async def test_wrong_secret_is_refused(hub: LocalHub) -> None:
    async with Agent("one", **at(hub)) as one:
        other = Agent("other", **at(hub))
        other.agent_id, other.resume = one.agent_id, "wrong"
        with pytest.raises(Refused) as caught:
            await soon(other.start())
        assert caught.value.code == "unauthorized"


# A hub that restarts without a journal.


@contextlib.asynccontextmanager
async def forgetful(kind: Callable[..., LocalHub]) -> AsyncIterator[tuple[Wire, Callable[[], Any]]]:
    """Yield a wire to a hub, and a coroutine function that replaces that by a new hub."""
    wire = Wire(kind())
    await wire.hub.start()

    async def restart() -> None:
        wire.is_up = False
        await wire.hub.stop()
        wire.hub = kind()
        await wire.hub.start()
        wire.restore()

    try:
        yield wire, restart
    finally:
        await wire.hub.stop()


async def test_open_task_of_a_hub_without_memory_is_lost(kind: Callable[..., LocalHub]) -> None:
    async with forgetful(kind) as (wire, restart), Agent("me", hub=wire) as me:
        handle = await me.submit("nothing", wait=True)
        first_id = me.agent_id
        await restart()
        assert (await failure_of(handle.result()))[0] == "hub_lost"
        assert me.agent_id != first_id


async def test_open_task_of_a_hub_without_memory_is_sent_again_if_it_may_be(kind: Callable[..., LocalHub]) -> None:
    async with forgetful(kind) as (wire, restart), Agent("me", hub=wire) as me:
        handle = await me.submit("nothing", wait=True, max_retries=1, ttl=60)
        await restart()
        await eventually(lambda: tasks_of(wire.hub) == {"pending": 1})
        report = await me.status(handle.task_id)
        assert (report.max_retries, report.ttl or 0) == (0, pytest.approx(60, abs=WAIT_S))
        async with working(wire.hub, nothing):
            assert await soon(handle.result()) == "nothing"


async def test_sending_again_uses_up_the_retries(kind: Callable[..., LocalHub]) -> None:
    async with forgetful(kind) as (wire, restart), Agent("me", hub=wire) as me:
        handle = await me.submit("nothing", wait=True, max_retries=1)
        await restart()
        await eventually(lambda: tasks_of(wire.hub) == {"pending": 1})
        await restart()
        assert (await failure_of(handle.result()))[0] == "hub_lost"


@pytest.mark.parametrize("max_retries", [0, 1])
async def test_task_whose_acknowledgement_was_lost_with_its_hub_is_not_begun_too_often(
    kind: Callable[..., LocalHub], max_retries: int
) -> None:
    """The lost hub may have begun it, so at a hub without memory it may be sent only as a retry."""
    async with forgetful(kind) as (wire, restart), Agent("me", hub=wire) as me:
        begun: list[int] = []
        acknowledged = asyncio.Event()

        def drop_the_acknowledgement(message: Any) -> bool:
            if message.type != "status":
                return True
            acknowledged.set()
            return False

        async with working(wire.hub, functools.partial(begin, begun)):
            wire.lets_through = drop_the_acknowledgement
            asking = asyncio.create_task(me.delegate("begin", max_retries=max_retries, ttl=60))
            await soon(acknowledged.wait())
            await eventually(lambda: begun)
        wire.lets_through = lambda message: True
        await restart()
        if max_retries == 0:
            assert (await failure_of(asking))[0] == "hub_lost"
        async with working(wire.hub, functools.partial(begin, begun)):
            if max_retries:
                assert await soon(asking) == 2
        assert len(begun) == 1 + max_retries


async def begin(begun: list[int]) -> int:
    """Record the call, and return how many there were; the first one never returns."""
    begun.append(len(begun))
    if len(begun) == 1:
        await asyncio.Event().wait()
    return len(begun)


async def test_retries_by_a_hub_that_is_lost_are_counted(kind: Callable[..., LocalHub]) -> None:
    async with forgetful(kind) as (wire, restart), Agent("me", hub=wire) as me:
        handle = await me.submit("nothing_for_long", max_retries=1, wait=True)
        async with working(wire.hub, nothing_for_long):  # Leaves, so the task is retried.
            await eventually(lambda: tasks_of(wire.hub) == {"in_progress": 1})
        async with working(wire.hub, nothing_for_long):  # Is lost with the hub.
            await eventually(lambda: tasks_of(wire.hub) == {"in_progress": 1})
            await restart()
        assert (await failure_of(handle.result()))[0] == "hub_lost"


async def test_task_that_is_sent_again_waits_for_its_worker(kind: Callable[..., LocalHub]) -> None:
    async with forgetful(kind) as (wire, restart), Agent("me", hub=wire) as me:
        async with working(wire.hub, nothing_for_long):
            handle = await me.submit("nothing_for_long", max_retries=1)
        await restart()
        await eventually(lambda: tasks_of(wire.hub) == {"pending": 1})
        async with working(wire.hub, nothing_for_long):
            await eventually(lambda: tasks_of(wire.hub) == {"in_progress": 1})
            await handle.cancel()


async def nothing_for_long() -> None:
    await asyncio.Event().wait()


async def test_connection_lost_while_a_task_is_sent_again_costs_no_second_retry(kind: Callable[..., LocalHub]) -> None:
    async with forgetful(kind) as (wire, restart), Agent("me", hub=wire) as me:
        handle = await me.submit("nothing", wait=True, max_retries=1)

        def cut_instead_of_the_word_that_it_is_unknown(message: Any) -> bool:
            if message.type == "error":
                wire.lets_through = lambda message: True
                asyncio.get_running_loop().call_soon(lambda: wire.cut(for_now=True))
            return True

        wire.lets_through = cut_instead_of_the_word_that_it_is_unknown
        await restart()
        async with working(wire.hub, nothing):
            assert await soon(handle.result()) == "nothing"


@pytest.mark.parametrize("how", ["by its handle", "by its delegate"])
async def test_task_called_off_while_its_hub_lost_its_memory_is_not_sent_again(
    kind: Callable[..., LocalHub], how: str
) -> None:
    async with forgetful(kind) as (wire, restart), Recorder("me", hub=wire) as me:
        asking = asyncio.create_task(me.delegate("nothing", wait=True, max_retries=1, task_id="this"))
        await eventually(lambda: me.handles)
        (handle,) = me.handles
        wire.cut()
        await eventually(lambda: not me.is_online)
        calling_off = asyncio.create_task(handle.cancel())
        if how == "by its delegate":
            calling_off.cancel()
            asking.cancel()
        await restart()
        await asyncio.wait({asking}, timeout=3)
        states = tasks_of(wire.hub)
        await me.stop()
        await soon(asyncio.gather(asking, calling_off, return_exceptions=True))
        assert handle.done
        assert "pending" not in states


async def test_new_attempt_lost_on_the_wire_is_reported_though_the_old_one_still_cleans_up(
    kind: Callable[..., LocalHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agenthub, "BACKOFF_MAX_S", 0.02)
    async with kind(HubSettings(grace_s=0.3)) as hub, Agent("requester", **at(hub)) as me:
        wire = Wire(hub)
        begun, let_go = asyncio.Event(), asyncio.Event()
        worker = Agent("worker", hub=wire)

        @worker.capability
        async def work(task: Task) -> int:
            if task.attempt == 1:
                begun.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    await let_go.wait()
            return task.attempt

        def cut_before_the_task(message: Any) -> bool:
            if message.type != "delegate":
                return True
            wire.lets_through = lambda message: True
            wire.cut(for_now=True)
            return False

        async with worker:
            await worker.submit("other", wait=True)  # Keeps it known to the hub when its grace period is over.
            handle = await me.submit("work", max_retries=9, wait=True, agent_id=worker.agent_id)
            await soon(begun.wait())
            wire.lets_through = cut_before_the_task
            wire.cut()
            await eventually(lambda: tasks_of(hub) == {"pending": 2})
            wire.restore()
            assert await soon(handle.result(timeout_s=3)) > 2
            let_go.set()


async def test_handler_of_a_hub_without_memory_is_stopped(kind: Callable[..., LocalHub], slow: Slow) -> None:
    async with forgetful(kind) as (wire, restart), Agent("me", hub=wire) as me:
        other = Wire(wire.hub)
        worker = Agent("worker", hub=other)
        worker.capability(slow.slow)
        async with worker:
            handle = await me.submit("slow")
            await soon(slow.begun.wait())
            other.is_up = False
            await restart()
            other.hub = wire.hub
            other.restore()
            await eventually(lambda: slow.seen == ["cancelled"])
            assert (await failure_of(handle.result()))[0] == "hub_lost"


async def test_hub_restarts_on_the_same_port() -> None:
    first = HubServer(port=0)
    await first.start()
    worker = Agent("worker", url=first.url)
    worker.capability(nothing)
    async with worker, Agent("me", url=first.url) as me:
        await first.stop()
        async with HubServer(port=first.port) as second:
            await eventually(lambda: online(second) == 2)
            assert await soon(me.delegate("nothing")) == "nothing"


async def test_input_changed_after_submit_is_resent_as_it_was_first_sent() -> None:
    def echo(count: int) -> int:
        return count

    first = HubServer(port=0)
    await first.start()
    worker = Agent("worker", url=first.url)
    worker.capability(echo)
    async with Agent("me", url=first.url) as me:
        given = {"count": 1}
        handle = await me.submit("echo", given, wait=True, max_retries=1)
        given["count"] = 2
        await first.stop()
        async with HubServer(port=first.port), worker:  # It does not know the task.
            assert await soon(handle.result()) == 1


async def test_task_does_not_outlast_its_deadline_by_much_without_a_hub(
    hub: LocalHub, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agenthub, "LATE_S", 0.05)
    async with Agent("me", hub=wire) as me:
        handle = await me.submit("nothing", wait=True, ttl=0.1)
        wire.cut()
        assert (await failure_of(handle.result()))[0] in ("hub_lost", "timeout")


# Connections that are cut at random.


@pytest.mark.parametrize("seed", range(4))
async def test_every_task_ends_once_however_the_connections_are_cut(kind: Callable[..., LocalHub], seed: int) -> None:
    chance = random.Random(seed)
    before = len(alive(agenthub.Task, agenthub.Result))

    async def work(task: Task, x: int) -> int:
        task.progress(0.5)
        await asyncio.sleep(chance.uniform(0, 0.02))
        return 2 * x

    async with kind(HubSettings(grace_s=WAIT_S)) as hub, contextlib.AsyncExitStack() as stack:
        wires = [Wire(hub) for _ in range(4)]
        workers = [Agent("worker", hub=wire, max_tasks=3) for wire in wires[:2]]
        for worker in workers:
            worker.capability(work)
        requesters = [Recorder("requester", hub=wire) for wire in wires[2:]]
        for agent in (*workers, *requesters):
            await stack.enter_async_context(agent)

        async def cutting() -> None:
            while True:
                await asyncio.sleep(chance.uniform(0, 0.05))
                chance.choice(wires).cut(for_now=True)

        cutter = asyncio.create_task(cutting())
        numbers = range(20)
        async with asyncio.timeout(WAIT_S):
            outputs = await asyncio.gather(
                *(one.delegate("work", x, max_retries=100, ttl=60) for one in requesters for x in numbers)
            )
        cutter.cancel()
        assert outputs == [2 * x for x in numbers] * 2
        await eventually(lambda: tasks_of(hub) == {"completed": 40})
        await eventually(lambda: online(hub) == 4)
        # The hub keeps outcomes, and the workers nothing any more.
        await eventually(lambda: len(alive(agenthub.Task, agenthub.Result)) <= before)
        for requester in requesters:
            assert len(requester.handles) == len(numbers)
            for handle in requester.handles:
                assert handle.done
                with pytest.raises(Refused) as caught:  # By the hub: for the agent its id is free again.
                    await requester.submit("work", "other", task_id=handle.task_id)
                assert caught.value.code == "duplicate_task"


# `Agent.connected`.


class Pauses:
    """Counts the pauses before attempts to connect; each lasts until `connected` cuts it short."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(agenthub.Backoff, "next_s", self.next_s)

    def next_s(self) -> float:
        self.count += 1
        assert self.count < 100, "the pauses end at once"
        return 3600.0


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Pauses:
    return Pauses(monkeypatch)


@contextlib.asynccontextmanager
async def starting(agent: Agent) -> AsyncIterator[asyncio.Task[None]]:
    """Start an agent without waiting for a hub; stop it when the block ends."""
    start = asyncio.create_task(agent.start())
    await asyncio.sleep(0)
    try:
        yield start
    finally:
        start.cancel()
        await asyncio.wait({start})
        await agent.stop()


@contextlib.asynccontextmanager
async def silent_server() -> AsyncIterator[str]:
    """Yield the URL of a server that accepts connections and says nothing."""
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0)
    try:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize("within_s", [None, 0])
async def test_connected_returns_at_once_when_there_is_a_connection(hub: LocalHub, within_s: float | None) -> None:
    async with Agent("me", **at(hub)) as me:
        asking = asyncio.create_task(me.connected(within_s))
        await asyncio.sleep(0)
        assert asking.done()
        await asking


@pytest.mark.parametrize("count", [1, 3])
async def test_connected_cuts_the_pause_between_two_tries_short(
    hub: LocalHub, wire: Wire, pauses: Pauses, count: int
) -> None:
    async with Agent("me", hub=wire) as me:
        wire.cut()
        await eventually(lambda: pauses.count == 1)
        wire.restore()
        await soon(asyncio.gather(*(me.connected() for _ in range(count))))
        assert (online(hub), wire.tried_count, pauses.count) == (1, 2, 1)


async def test_connected_finds_a_hub_that_comes_while_the_agent_starts(pauses: Pauses) -> None:
    hub = HubServer(port=0)
    await hub.start()
    await hub.stop()
    me = Agent("me", url=hub.url)
    async with starting(me) as start:
        await eventually(lambda: pauses.count == 1)
        async with HubServer(port=hub.port) as hub:
            await soon(me.connected())
            await soon(start)
            assert online(hub) == 1
            await me.stop()


async def test_connected_does_not_shorten_the_pause_after_a_later_loss(
    hub: LocalHub, wire: Wire, pauses: Pauses
) -> None:
    async with Agent("me", hub=wire) as me:
        wire.cut()
        await eventually(lambda: pauses.count == 1)
        wire.restore()
        await soon(asyncio.gather(me.connected(), me.connected(WAIT_S)))
        await soon(me.connected())  # Without effect while there is a connection.
        wire.cut(for_now=True)
        await eventually(lambda: pauses.count == 2)
        assert wire.tried_count == 2  # The end of the pause would have been an attempt in the same step.
        await soon(me.connected())
        assert wire.tried_count == 3


async def test_connected_while_a_try_is_under_way_does_not_shorten_a_later_pause(
    hub: LocalHub, wire: Wire, pauses: Pauses
) -> None:
    me = Agent("me", hub=wire)
    async with starting(me) as start:
        assert not me.is_online
        await soon(asyncio.gather(start, me.connected()))
        wire.cut()
        await eventually(lambda: pauses.count == 1)
        assert wire.tried_count == 1


async def test_connected_without_a_hub_tries_once_and_then_pauses_again(
    hub: LocalHub, wire: Wire, pauses: Pauses
) -> None:
    async with Agent("me", hub=wire) as me:
        wire.cut()
        await eventually(lambda: pauses.count == 1)
        for count in (1, 2, 3):
            with pytest.raises(Disconnected, match=r"^the wire is cut$"):
                await soon(me.connected(0.05))
            assert (wire.tried_count, pauses.count) == (1 + count, 1 + count)


async def test_connected_says_what_the_last_try_met(caplog: pytest.LogCaptureFixture) -> None:
    me = Agent("me", url="ws://127.0.0.1:9")
    async with starting(me):
        await eventually(lambda: count_of(caplog, "next attempt in"))
        with pytest.raises(Disconnected, match=r"^no hub at ws://127.0.0.1:9: ") as caught:
            await soon(me.connected(0.05))
    assert isinstance(caught.value.__cause__, TimeoutError)


async def test_connected_ends_at_its_bound_though_a_try_takes_longer() -> None:
    async with silent_server() as url:
        me = Agent("me", url=url)
        async with starting(me), asyncio.timeout(agenthub.HANDSHAKE_S / 2):
            with pytest.raises(Disconnected, match=f"^no hub answers at {url}$"):
                await soon(me.connected(0.05))


async def test_connected_that_is_cancelled_leaves_the_agent_trying(hub: LocalHub, wire: Wire) -> None:
    async with Agent("me", hub=wire) as me:
        wire.cut()
        await eventually(lambda: away(hub) == 1 and not me.is_online)
        asking = asyncio.create_task(me.connected())
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        wire.restore()
        await soon(me.connected())


async def test_connected_raises_that_another_has_taken_the_place(hub: LocalHub) -> None:
    async with Agent("older", **at(hub)) as older:
        newer = Agent("newer", **at(hub))
        newer.agent_id, newer.resume = older.agent_id, older.resume
        async with newer:
            await eventually(lambda: not older.is_online)
            with pytest.raises(Disconnected) as caught:
                await soon(older.connected())
    assert caught.value.close_code == 4000


@pytest.mark.parametrize("within_s", [None, WAIT_S])
async def test_connected_raises_that_the_hub_refuses_the_agent(
    hub: LocalHub, wire: Wire, within_s: float | None
) -> None:
    async with Agent("me", hub=wire) as me:
        me.resume = "wrong"
        wire.cut(for_now=True)
        await eventually(lambda: not me.is_online)
        for _ in range(2):
            with pytest.raises(Refused) as caught:
                await soon(me.connected(within_s))
            assert caught.value.code == "unauthorized"


async def test_connected_raises_that_the_agent_has_given_up(hub: LocalHub, wire: Wire) -> None:
    async with Agent("me", hub=wire, give_up_after_s=0) as me:
        wire.cut()
        await eventually(lambda: not me.is_online)
        with pytest.raises(Disconnected, match=r"the hub closed the connection|the wire is cut"):
            await soon(me.connected())


async def test_connected_asks_the_hub_whether_it_is_there(
    hub: LocalHub, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agenthub, "PROBE_S", 0.2)
    async with Agent("me", hub=wire) as me:
        await soon(me.connected(WAIT_S))
        wire.lets_through = lambda message: False
        with pytest.raises(Disconnected, match="did not answer within"):
            await soon(me.connected(0.05))
        wire.lets_through = lambda message: wire.opened_count > 1
        await soon(me.connected(WAIT_S))
        assert wire.opened_count == 2


async def test_call_without_an_acknowledgement_probes_the_link_and_is_sent_again(
    hub: LocalHub, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agenthub, "PROBE_S", 0.1)
    async with working(hub, nothing), Agent("me", hub=wire) as me:
        wire.lets_through = lambda message: wire.opened_count > 1
        assert await soon(me.delegate("nothing")) == "nothing"
        assert wire.opened_count == 2


async def test_system_is_asked_to_notice_a_dead_hub(wire: Wire) -> None:
    async with Agent("me", hub=wire):
        if isinstance(wire.hub, HubServer):
            assert isinstance(wire.link, agenthub.ClientLink)
            connection = wire.link.transport.get_extra_info("socket")
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_connected_ends_when_the_agent_is_stopped(hub: LocalHub, wire: Wire) -> None:
    async with Agent("me", hub=wire) as me:
        wire.cut()
        await eventually(lambda: not me.is_online)
        asking = asyncio.create_task(me.connected())
        await asyncio.sleep(0)
        await me.stop()
        with pytest.raises(Disconnected, match="this agent was stopped"):
            await soon(asking)


async def test_connected_of_an_agent_that_is_not_started_is_disconnected(hub: LocalHub) -> None:
    me = Agent("me", **at(hub))
    with pytest.raises(Disconnected, match="this agent is not started"):
        await me.connected()
    async with me:
        await me.connected()
    with pytest.raises(Disconnected, match="this agent is not started"):
        await me.connected(WAIT_S)


def test_connected_works_on_the_next_loop(pauses: Pauses) -> None:
    me = Agent("me")

    async def once() -> None:
        async with LocalHub() as hub:
            wire = Wire(hub)
            me.use_hub(wire)
            async with me:
                wire.cut()
                paused = pauses.count
                await eventually(lambda: pauses.count == paused + 1)
                with pytest.raises(Disconnected, match="the wire is cut"):
                    await soon(me.connected(0.05))
                wire.restore()
                await soon(me.connected())
                assert online(hub) == 1

    for _ in range(2):
        asyncio.run(once())


def test_what_the_last_try_met_is_forgotten_at_the_next_start(caplog: pytest.LogCaptureFixture) -> None:
    me = Agent("me", url="ws://127.0.0.1:9")

    async def first() -> None:
        async with starting(me):
            await eventually(lambda: count_of(caplog, "next attempt in"))
            with pytest.raises(Disconnected, match=r"^no hub at ws://127.0.0.1:9: "):
                await soon(me.connected(0.05))

    async def second() -> None:
        async with silent_server() as url:
            me.use_hub(At(url))
            async with starting(me):
                with pytest.raises(Disconnected, match=r"^no hub answers at"):
                    await soon(me.connected(0.05))

    asyncio.run(first())
    asyncio.run(second())


@pytest.mark.parametrize("token", ["two words", "a\r\nb", "\u00e9", "\x7f"])
async def test_token_that_cannot_be_sent_is_a_value_error(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTHUB_TOKEN", token)
    async with HubServer(port=0) as hub:
        me = Agent("me", url=hub.url)
        with pytest.raises(ValueError, match=r"^AGENTHUB_TOKEN: must be printable ASCII without spaces$"):
            await soon(me.start())
        assert online(hub) == 0
        monkeypatch.setenv("AGENTHUB_TOKEN", "secret")
        async with me:
            assert online(hub) == 1


# Wrong arguments, wrong states, wrong threads.


@pytest.mark.parametrize("value", ["5", True, math.nan, b"1", [1]], ids=repr)
async def test_time_limit_that_is_no_number_is_a_value_error(hub: LocalHub, value: Any) -> None:
    async with working(hub, nothing_for_long) as me:
        handle = await me.submit("nothing_for_long")
        for call in (
            lambda: me.submit("nothing_for_long", ttl=value),
            lambda: me.submit("nothing_for_long", patience_s=value),
            lambda: me.connected(value),
            lambda: me.stop(value),
            lambda: handle.result(value),
        ):
            with pytest.raises(ValueError, match=r"must be (a number of|more than 0)"):
                await soon(call())
        assert me.is_online


@pytest.mark.parametrize("value", [5, b"x", ["x"]], ids=repr)
async def test_text_that_is_no_string_is_a_value_error(hub: LocalHub, value: Any) -> None:
    async with working(hub, nothing_for_long) as me:
        handle = await me.submit("nothing_for_long")
        for name, call in (
            ("task_id", lambda: me.submit("nothing_for_long", task_id=value)),
            ("reason", lambda: handle.cancel(value)),
        ):
            with pytest.raises(ValueError, match=f"{name} must be a string, not {re.escape(repr(value))}"):
                await soon(call())
        with pytest.raises(ValueError, match="reason must be a string"):
            handle.cancel_soon(value)
    with pytest.raises(ValueError, match="description must be a string"):
        Agent("x").capability(description=value)(nothing)
    with pytest.raises(ValueError, match="description must be a string"):
        Agent("x", description=value)
    with pytest.raises(ValueError, match="name must be a string"):
        Agent(value)


@pytest.mark.parametrize("hub", ["ws://127.0.0.1:1", 5, LocalHub], ids=str)
def test_hub_that_is_none_is_a_value_error(hub: Any) -> None:
    with pytest.raises(
        ValueError, match=r"hub must be a LocalHub of this process, not .*; for another hub, give its url"
    ):
        Agent("x", hub=hub)
    with pytest.raises(ValueError, match="hub must be a LocalHub"):
        Agent("x").use_hub(hub)


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_tasks", "5"), ("max_tasks", 1.5), ("max_tasks", True), ("token", 5)]
    + [("give_up_after_s", value) for value in ("5", math.nan, True)],
)
def test_option_of_an_agent_of_a_wrong_type_is_a_value_error(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{option} must be "):
        Agent("x", **{option: value})


async def test_hub_that_runs_is_not_started_again(hub: LocalHub) -> None:
    async with working(hub, nothing) as me:
        with pytest.raises(RuntimeError, match="this hub is already running; stop it before you start it again"):
            await hub.start()
        assert await soon(me.delegate("nothing")) == "nothing"


def test_hub_that_was_not_started_has_counted_nothing() -> None:
    hub = HubServer(port=0)
    assert (hub.addresses, hub.rejected) == ({}, {})


def test_constraint_in_an_annotation_is_refused_and_a_description_is_not() -> None:
    pydantic, agent = pytest.importorskip("pydantic"), Agent("x")

    def work(n: Any) -> None: ...

    for annotation, text in (
        (
            list[typing.Annotated[int, pydantic.Field(gt=0)]],
            r"work: n: Gt\(gt=0\) in its annotation would not be checked",
        ),
        (typing.Annotated[str, pydantic.Field(max_length=3)], r"work: n: MaxLen\(max_length=3\) in its annotation"),
    ):
        work.__annotations__["n"] = annotation
        with pytest.raises(ValueError, match=text):
            agent.capability(work)
    work.__annotations__["n"] = typing.Annotated[int, pydantic.Field(description="How many"), "a note"]
    agent.capability(work)


def test_default_that_describes_a_field_is_refused() -> None:
    pydantic = pytest.importorskip("pydantic")

    def work(x: int = pydantic.Field(5, description="How many.")) -> None: ...

    with pytest.raises(ValueError, match="work: x: Field is of Pydantic's models; give a plain default"):
        Agent("x").capability(work)


async def test_nobody_waits_for_a_connection_whose_loop_was_cancelled(hub: LocalHub) -> None:
    me = Agent("me", **at(hub))
    await me.start()
    assert me._connection is not None
    me._connection.ended.cancel()  # As a program does that cancels all tasks of its loop.
    await asyncio.wait([me._connection.ended])
    for call in (me.discover, me.status, lambda: me.submit("x"), me.connected, lambda: me.broadcast(1)):
        with pytest.raises(Disconnected, match="the connection of this agent was cancelled"):
            await soon(call())
    await soon(me.stop())
    async with me:
        assert len(await soon(me.discover())) == 1


async def test_capability_that_another_thread_adds_is_announced_on_the_loop(hub: LocalHub) -> None:
    def learn() -> None:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        worker.capability(nothing)

    worker = Agent("worker", **at(hub))
    worker.capability(learn)
    announced: list[int] = []
    announce, worker._announce = worker._announce, lambda: (announced.append(threading.get_ident()), announce())
    async with worker, Agent("requester", **at(hub)) as me:
        await soon(me.delegate("learn"))
        await eventually(lambda: announced)
        assert set(announced) == {threading.get_ident()}
        assert await soon(me.delegate("nothing", wait=True)) == "nothing"


# Backoff.


def test_backoff_has_full_jitter_under_a_bound_that_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    bounds: list[float] = []
    monkeypatch.setattr(random, "uniform", lambda low, high: bounds.append(high) or low)
    backoff = agenthub.Backoff()
    assert {backoff.next_s() for _ in range(9)} == {0}
    assert bounds == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_backoff_starts_over_after_a_connection_that_lasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    bounds: list[float] = []
    monkeypatch.setattr(random, "uniform", lambda low, high: bounds.append(high) or low)
    backoff = agenthub.Backoff()
    for connection_s in (0, 0.1, 1, 1.9, 9):
        backoff.lasted(connection_s)
        backoff.next_s()
    assert bounds == [0.5, 1, 2, 4, 0.5]


@pytest.mark.parametrize(("connection_s", "expected_s"), [(1, 120), (600, 600), (1e6, 3600)])
def test_agent_tries_every_few_seconds_while_its_hub_is_expected_back(
    monkeypatch: pytest.MonkeyPatch, connection_s: float, expected_s: float
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    backoff, waited_s = agenthub.Backoff(), 0.0
    backoff.lasted(connection_s)
    while waited_s < expected_s:
        delay_s = backoff.next_s()
        assert delay_s <= 6  # 300 agents are back within 10 s, each at a random moment.
        waited_s += delay_s
    assert [backoff.next_s() for _ in range(5)][-1] == 30


@pytest.mark.parametrize("away_s", [20, 60])
@pytest.mark.parametrize("seed", range(5))
def test_300_agents_are_back_within_seconds_after_their_hub(
    monkeypatch: pytest.MonkeyPatch, away_s: float, seed: int
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(random, "uniform", random.Random(seed).uniform)
    back_s = []
    for _ in range(300):
        backoff, offline_s = agenthub.Backoff(), 0.0
        backoff.lasted(1.0)
        while offline_s < away_s:
            offline_s += backoff.next_s()
        back_s.append(offline_s - away_s)
    assert max(back_s) <= 6
    assert sum(one <= 4 for one in back_s) > 200


@pytest.mark.long
@pytest.mark.parametrize(("away_s", "loop"), [(20, "uvloop"), (60, "asyncio")])
def test_300_agents_are_back_within_seconds_on_sockets(
    monkeypatch: pytest.MonkeyPatch, away_s: float, loop: str
) -> None:
    monkeypatch.undo()
    if loop == "uvloop":
        pytest.importorskip("uvloop")

    async def back_after_s() -> float:
        async with HubServer(port=0) as hub, contextlib.AsyncExitStack() as stack:
            agents = [Agent(f"agent-{number}", url=hub.url) for number in range(300)]
            agents[0].capability("work")(lambda: "done")
            await asyncio.gather(*(stack.enter_async_context(agent) for agent in agents))
            await agents[1].delegate("work")
            await asyncio.sleep(1)
            await hub.stop()
            await asyncio.sleep(away_s)
            async with HubServer(port=hub.port):
                begun = asyncio.get_running_loop().time()
                await agents[1].connected()
                assert await agents[1].delegate("work", ttl=100) == "done"
                await eventually(lambda: all(agent.is_online for agent in agents))
                return asyncio.get_running_loop().time() - begun

    assert agenthub.run_loop(back_after_s(), loop) <= 10


async def test_tasks_wait_for_the_agents_that_a_new_hub_does_not_know_yet(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agenthub, "RETURN_POLL_S", 0.01)
    caplog.set_level("INFO", "agenthub.agent")
    async with HubServer(port=0) as hub:
        worker, me = Agent("worker", url=hub.url), Agent("requester", url=hub.url)
        worker.capability("work")(lambda: "done")
        async with me:
            async with worker:
                assert await soon(me.delegate("work")) == "done"
            with pytest.raises(Refused):
                await soon(me.delegate("work"))  # The hub is not new: the worker has left.
            await hub.stop()
            async with HubServer(port=hub.port):
                await soon(me.connected())
                work = asyncio.create_task(me.delegate("work"))
                await eventually(lambda: any(line.startswith("no_agent task=") for line in caplog.messages))
                for options, code in (
                    ({"capability": "other"}, "no_agent"),
                    ({"agent_id": "nobody"}, "unknown_agent"),
                    ({"capability": "work", "patience_s": 0}, "no_agent"),
                ):
                    with pytest.raises(Refused) as caught:
                        await soon(me.submit(**options))
                    assert caught.value.code == code
                with pytest.raises(TaskTimeout):
                    await soon(me.delegate("work", ttl=0.05))
                async with worker:
                    assert await soon(work) == "done"
                monkeypatch.setattr(agenthub, "RETURN_WAIT_S", 0.0)
                with pytest.raises(Refused):
                    await soon(me.delegate("work"))


def test_agent_with_a_standby_tries_within_seconds_while_that_may_take_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    backoff = agenthub.Backoff(has_standby=True)
    for connection_s in (0.0, 100.0):  # At the start, and once more after a connection that lasted.
        waited_s = 0.0
        backoff.lasted(connection_s)
        while waited_s < 30:
            delay_s = backoff.next_s()
            assert delay_s < 2
            waited_s += delay_s
        assert backoff.next_s() <= 3
        assert backoff.next_s() > 2


async def test_agent_goes_on_at_the_next_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    async with HubServer(port=0) as second:
        first = HubServer(port=0)
        await first.start()
        urls = f"{first.url},{second.url}"
        worker = Agent("worker", url=urls)
        worker.capability(name="twice")(lambda n: 2 * n)
        async with worker, Agent("me", url=urls) as me:
            assert await me.delegate("twice", {"n": 2}) == 4
            assert len(first.hub.directory.agents) == 2
            await first.stop()
            assert await soon(me.delegate("twice", {"n": 3}, wait=True)) == 6
            assert len(second.hub.directory.agents) == 2


# Outcomes.


@contextlib.asynccontextmanager
async def asked(hub: Any, way: Any) -> AsyncIterator[tuple[Agent, Agent]]:
    """Yield a worker with a capability for each kind of outcome, and a requester connected by `way`."""
    worker = Agent("worker", **at(hub))

    @worker.capability
    async def complete() -> dict[str, Any]:
        return {"é": [1, None]}

    @worker.capability
    async def fail() -> None:
        raise TaskFailed("went wrong", code="own-code")

    @worker.capability
    async def wait() -> None:
        await asyncio.Event().wait()

    async with worker, Agent("requester", **at(way)) as me:
        yield worker, me


ENDS: dict[str, dict[str, Any]] = {
    "complete": {"success": True, "state": "completed", "output": {"é": [1, None]}, "error": None},
    "fail": {"success": False, "state": "failed", "output": None, "error": ("own-code", "went wrong")},
    "expire": {"success": False, "state": "timeout", "output": None, "error": ("timeout", None)},
    "cancel": {"success": False, "state": "failed", "output": None, "error": ("cancelled", "never mind")},
}


def fields_of(outcome: agenthub.TaskOutcome | None) -> dict[str, Any]:
    """Return the fields of an outcome; of a timeout the code without the text, which names the seconds."""
    assert outcome is not None
    error = outcome.error and (outcome.error.code, None if outcome.state == "timeout" else outcome.error.message)
    return {"success": outcome.success, "state": outcome.state, "output": outcome.output, "error": error}


async def ended(me: Agent, how: str) -> agenthub.TaskHandle:
    """Return the handle of a task with such an outcome."""
    handle = await me.submit(how if how in ("complete", "fail") else "wait", ttl=0.05 if how == "expire" else 60)
    if how == "cancel":
        await handle.cancel("never mind")
    await eventually(lambda: handle.done)
    return handle


@pytest.mark.parametrize("how", ENDS)
async def test_outcome_is_the_hubs_word_of_the_end(hub: LocalHub, how: str) -> None:
    async with asked(hub, hub) as (worker, me):
        outcome = (await ended(me, how)).outcome
        assert outcome is not None
        assert fields_of(outcome) == ENDS[how]
        assert outcome.attempt == 1
        by_hub = how in ("expire", "cancel")
        assert outcome.sender in ((None, me.agent_id) if by_hub else (worker.agent_id,))


async def test_outcome_is_none_while_the_task_is_open(hub: LocalHub) -> None:
    async with asked(hub, hub) as (_, me):
        handles = [await me.submit("nobody", wait=True), await me.submit("wait")]
        await eventually(lambda: tasks_of(hub) == {"pending": 1, "in_progress": 1})
        assert [(handle.done, handle.outcome) for handle in handles] == [(False, None)] * 2


async def test_outcome_counts_the_attempts(kind: Callable[..., LocalHub]) -> None:
    async with kind(HubSettings(grace_s=0.05)) as hub, Agent("requester", **at(hub)) as me:
        wire = Wire(hub)
        lost = Agent("lost", hub=wire)
        handle = await me.submit("nothing", wait=True, max_retries=1)
        begun = asyncio.Event()

        async def hang() -> None:
            begun.set()
            await asyncio.Event().wait()

        lost.capability("nothing")(hang)
        async with lost:
            await soon(begun.wait())
            wire.cut()
            second = Agent("second", **at(hub))
            second.capability(nothing)
            async with second:
                assert await soon(handle.result()) == "nothing"
                assert handle.outcome is not None
                assert (handle.outcome.attempt, handle.outcome.sender) == (2, second.agent_id)


@pytest.mark.parametrize("how", ENDS)
async def test_outcome_is_the_same_when_it_is_told_after_a_reconnect(hub: LocalHub, wire: Wire, how: str) -> None:
    """The outcome is lost on the wire; the report that the agent asks for instead is equivalent."""
    async with asked(hub, wire) as (_, me):
        direct = (await ended(me, how)).outcome
        wire.lets_through = lambda message: message.type != "result"
        handle = await me.submit(how if how in ("complete", "fail") else "wait", ttl=0.05 if how == "expire" else 60)
        if how == "cancel":
            await handle.cancel("never mind")
        await eventually(lambda: sum(tasks_of(hub).get(state, 0) for state in agenthub.FINAL_STATES) == 2)
        assert handle.outcome is None
        wire.lets_through = lambda message: True
        wire.cut(for_now=True)
        await eventually(lambda: handle.done)
        assert direct is not None
        assert handle.outcome is not None
        assert fields_of(handle.outcome) == ENDS[how]
        assert (handle.outcome.task_id, handle.outcome.attempt) == (handle.task_id, direct.attempt)


async def test_outcome_says_that_the_hub_has_lost_its_memory(kind: Callable[..., LocalHub]) -> None:
    async with forgetful(kind) as (wire, restart), Agent("me", hub=wire) as me:
        handle = await me.submit("nothing", wait=True)
        await restart()
        text = "the hub no longer knows this task; delegate it again"
        assert await failure_of(handle.result()) == ("hub_lost", text)
        error = agenthub.ErrorInfo("hub_lost", text)
        assert handle.outcome == agenthub.TaskOutcome(
            task_id=handle.task_id, sender=None, success=False, state="failed", output=None, error=error, attempt=0
        )


async def test_outcome_is_none_when_the_agent_was_stopped(hub: LocalHub) -> None:
    async with asked(hub, hub) as (_, me):
        handle = await me.submit("wait")
        completed = await ended(me, "complete")
        await me.stop()
        assert (handle.done, handle.outcome) == (True, None)
        assert fields_of(completed.outcome) == ENDS["complete"]  # A delivered outcome does not change.


# Cancelling without waiting.


async def test_cancel_soon_calls_the_task_off_with_its_reason(hub: LocalHub, slow: Slow) -> None:
    async with working(hub, slow.slow) as me:
        handle = await me.submit("slow")
        await soon(slow.begun.wait())
        handle.cancel_soon("never mind")
        assert await failure_of(handle.result()) == ("cancelled", "never mind")
        await eventually(lambda: slow.seen == ["cancelled"])


async def test_cancel_soon_has_a_reason_of_its_own(hub: LocalHub, slow: Slow) -> None:
    async with working(hub, slow.slow) as me:
        handle = await me.submit("slow")
        handle.cancel_soon()
        handle.cancel_soon("once more does no harm")
        assert await failure_of(handle.result()) == ("cancelled", "its requester stopped waiting")


@pytest.mark.parametrize("method", ["cancel", "cancel_soon"])
async def test_reason_longer_than_the_hub_takes_is_cut_and_the_task_called_off(hub: LocalHub, method: str) -> None:
    async with Agent("me", **at(hub)) as me:
        handle = await me.submit("nothing", wait=True)
        calling_off = getattr(handle, method)("x" * (agenthub.TEXT_MAX + 1))
        if calling_off is not None:
            await soon(calling_off)
        await me.status()  # By now the hub has read what was sent.
        assert await failure_of(handle.result(timeout_s=1)) == ("cancelled", "x" * agenthub.REASON_MAX)


async def test_cancel_soon_of_a_task_that_nobody_has_taken_yet(hub: LocalHub) -> None:
    async with Agent("me", **at(hub)) as me:
        handle = await me.submit("nothing", wait=True)
        handle.cancel_soon("never mind")
        assert await failure_of(handle.result()) == ("cancelled", "never mind")
        assert tasks_of(hub) == {"failed": 1}


async def test_cancel_soon_without_a_connection_is_done_after_the_reconnect(
    hub: LocalHub, wire: Wire, slow: Slow
) -> None:
    async with working(hub, slow.slow), Agent("me", hub=wire) as me:
        handle = await me.submit("slow")
        await soon(slow.begun.wait())
        wire.cut()
        await eventually(lambda: away(hub) == 1 and not me.is_online)
        handle.cancel_soon("never mind")
        assert not handle.done
        wire.restore()
        assert await failure_of(handle.result()) == ("cancelled", "never mind")
        await eventually(lambda: slow.seen == ["cancelled"])


async def test_cancel_soon_that_is_lost_on_the_wire_is_done_after_the_reconnect(
    hub: LocalHub, wire: Wire, slow: Slow
) -> None:
    """The connection is cut in the same step: the hub has not read the message, or its reply is lost."""
    async with working(hub, slow.slow), Agent("me", hub=wire) as me:
        handle = await me.submit("slow")
        await soon(slow.begun.wait())
        handle.cancel_soon("never mind")
        wire.cut(for_now=True)
        assert await failure_of(handle.result()) == ("cancelled", "never mind")
        await eventually(lambda: slow.seen == ["cancelled"])


@pytest.mark.parametrize("how", ENDS)
async def test_cancel_soon_of_an_ended_task_has_no_effect(hub: LocalHub, how: str) -> None:
    async with asked(hub, hub) as (_, me):
        handle = await ended(me, how)
        before = handle.outcome
        handle.cancel_soon("too late")
        await me.status()  # By now the hub has read whatever was sent.
        assert handle.outcome is before
        assert fields_of(before) == ENDS[how]
        assert (await me.status(handle.task_id)).state == ENDS[how]["state"]


async def test_cancel_soon_after_the_agent_was_stopped_does_nothing(hub: LocalHub, slow: Slow) -> None:
    async with working(hub, slow.slow):
        me = Agent("me", **at(hub))
        async with me:
            handle = await me.submit("slow")
            await soon(slow.begun.wait())
        before = asyncio.all_tasks()
        handle.cancel_soon("never mind")
        assert asyncio.all_tasks() == before
        with pytest.raises(Disconnected, match="this agent was stopped"):
            await soon(handle.result())
        await soon(handle.cancel("never mind"))


async def test_stop_ends_a_cancellation_that_waits_for_a_connection(hub: LocalHub, wire: Wire, slow: Slow) -> None:
    async with working(hub, slow.slow), Agent("me", hub=wire) as me:
        handle = await me.submit("slow")
        wire.cut()
        await eventually(lambda: not me.is_online)
        handle.cancel_soon("never mind")
        await soon(me.stop())
        with pytest.raises(Disconnected, match="this agent was stopped"):
            await soon(handle.result())


# Stopping.


async def test_stop_settles_what_is_open(hub: LocalHub, slow: Slow) -> None:
    async with working(hub, slow.slow):
        me = Agent("me", **at(hub))
        await me.start()
        handle = await me.submit("slow")
        waiting = [asyncio.create_task(one) for one in (handle.result(), me.delegate("slow"), _collected(handle))]
        await soon(slow.begun.wait())
        await me.stop()
        first, second, updates = await soon(asyncio.gather(*waiting, return_exceptions=True))
        assert isinstance(first, Disconnected)
        assert isinstance(second, Disconnected)
        assert updates == []
        assert online(hub) == 2


async def test_stop_ends_requests_that_wait_for_a_connection(hub: LocalHub, wire: Wire) -> None:
    me = Agent("me", hub=wire)
    await me.start()
    wire.cut()
    await eventually(lambda: away(hub) == 1)
    waiting = [asyncio.create_task(one) for one in (me.delegate("nothing"), me.discover(), me.broadcast("x"))]
    await asyncio.sleep(0.01)
    await me.stop()
    ends = await soon(asyncio.gather(*waiting, return_exceptions=True))
    assert [type(end) for end in ends] == [Disconnected] * 3


@pytest.mark.parametrize("turns", range(8))
async def test_stop_in_the_moment_of_the_registration_leaves_nobody_waiting(
    hub: LocalHub, wire: Wire, turns: int
) -> None:
    me = Agent("me", hub=wire)
    await me.start()
    wire.cut()
    await eventually(lambda: away(hub) == 1)
    waiting = asyncio.create_task(me.discover())
    stopping: list[asyncio.Task[None]] = []

    async def stop() -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        await me.stop()

    def stop_now(message: Any) -> bool:
        if message.type == "register":
            stopping.append(asyncio.create_task(stop()))
        return True

    wire.lets_through = stop_now
    wire.restore()
    await eventually(lambda: stopping)
    await soon(stopping[0])
    with contextlib.suppress(Disconnected):  # With several turns in between, the request may have been answered.
        await soon(waiting)


@pytest.mark.parametrize("name", ["work", "work_plain"])
async def test_stop_with_a_drain_waits_for_what_runs(hub: LocalHub, name: str) -> None:
    begun = threading.Event()

    async def work() -> str:
        begun.set()
        await asyncio.sleep(0.1)
        return "done"

    def work_plain() -> str:
        begun.set()
        threading.Event().wait(0.1)
        return "done"

    worker = Agent("worker", **at(hub))
    worker.capability(work)
    worker.capability(work_plain)
    async with Agent("requester", **at(hub)) as me:
        await worker.start()
        handle = await me.submit(name)
        await eventually(begun.is_set)
        stopping = asyncio.create_task(worker.stop(drain_s=WAIT_S))
        await eventually(lambda: not stopping.done() and hub.hub.summary()["tasks"]["in_progress"] == 1)
        await asyncio.sleep(0.02)
        with pytest.raises(Refused) as caught:
            await me.delegate(name)
        assert caught.value.code == "no_agent"
        assert await soon(handle.result()) == "done"
        await soon(stopping)
        assert online(hub) == 1


@pytest.mark.parametrize("name", ["work", "work_plain"])
async def test_draining_handler_reports_progress_and_delegates(hub: LocalHub, name: str) -> None:
    let_go = threading.Event()
    begun = threading.Event()

    async def work(task: Task) -> str:
        begun.set()
        await asyncio.to_thread(let_go.wait, WAIT_S)
        task.progress(0.5, "half")
        return str(await task.delegate("part", 1, wait=True))

    def work_plain(task: Task) -> str:
        begun.set()
        let_go.wait(WAIT_S)
        task.progress(0.5, "half")
        return str(task.run(task.delegate("part", 1, wait=True)))

    def part(number: int) -> str:
        return f"part {number}"

    worker = Agent("worker", **at(hub))
    worker.capability(work)
    worker.capability(work_plain)
    async with working(hub, part) as me:
        await worker.start()
        handle = await me.submit(name)
        await eventually(begun.is_set)
        stopping = asyncio.create_task(worker.stop(drain_s=WAIT_S))
        await eventually(lambda: any(agent.state == "draining" for agent in hub.hub.directory.agents.values()))
        let_go.set()
        assert await soon(handle.result()) == "part 1"
        assert [report.detail async for report in handle] == ["half"]
        await soon(stopping)


async def test_drain_ends_at_its_bound(hub: LocalHub, slow: Slow) -> None:
    worker = Agent("worker", **at(hub))
    worker.capability(slow.slow)
    async with Agent("requester", **at(hub)) as me:
        await worker.start()
        handle = await me.submit("slow")
        await soon(slow.begun.wait())
        await asyncio.wait_for(worker.stop(drain_s=0.05), 5)
        assert slow.seen == ["cancelled"]
        assert (await failure_of(handle.result()))[0] == "agent_lost"


async def test_drain_outlives_a_lost_connection(hub: LocalHub, wire: Wire) -> None:
    let_go = asyncio.Event()
    begun = asyncio.Event()
    worker = Agent("worker", hub=wire)

    @worker.capability
    async def work() -> str:
        begun.set()
        await let_go.wait()
        return "done"

    async with Agent("requester", **at(hub)) as me:
        await worker.start()
        handle = await me.submit("work")
        await soon(begun.wait())
        stopping = asyncio.create_task(worker.stop(drain_s=WAIT_S))
        await asyncio.sleep(0.02)
        wire.cut(for_now=True)
        await asyncio.sleep(0.05)
        let_go.set()
        assert await asyncio.wait_for(handle.result(), 3) == "done"
        await soon(stopping)


async def test_serve_raises_what_ends_the_connection_for_good() -> None:
    with pytest.raises(Disconnected, match="no hub at"):
        await soon(agenthub.serve(Agent("me", url="ws://127.0.0.1:9", give_up_after_s=0)))


async def test_stop_from_within_a_handler_ends(hub: LocalHub) -> None:
    worker = Agent("worker", **at(hub))
    stopped = asyncio.Event()

    @worker.capability
    async def quit() -> None:
        await worker.stop()
        stopped.set()

    async with Agent("requester", **at(hub)) as me:
        await worker.start()
        await failure_of(me.delegate("quit"))
        await asyncio.wait_for(stopped.wait(), 5)
        assert online(hub) == 1


# Signals.

PROGRAM = """
import asyncio, time
from agenthub import Agent, Task, serve

agent = Agent("worker")

@agent.capability
async def work(seconds: float) -> str:
    print("begun", flush=True)
    await asyncio.sleep(seconds)
    return "done"

@agent.capability
def plain(seconds: float) -> str:
    print("begun", flush=True)
    time.sleep(seconds)
    return "done"
"""
RUN = PROGRAM + "agent.run()\nprint('left')\n"
SERVE = PROGRAM + "asyncio.run(serve(agent, Agent('second'), drain_s=0.3))\nprint('left')\n"


@contextlib.asynccontextmanager
async def program(hub: HubServer, folder: Path, source: str) -> AsyncIterator[Any]:
    """Run an agent's program in its own process, with a hub in this one."""
    path = folder / "program.py"
    path.write_text(source)
    with running("-W", "error", str(path), env={"AGENTHUB_URL": hub.url}) as process:
        yield process


@posix_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["work", "plain"])
async def test_signal_drains_a_running_agent(tmp_path: Path, number: signal.Signals, name: str) -> None:
    async with HubServer(port=0) as hub, Agent("me", url=hub.url) as me, program(hub, tmp_path, RUN) as process:
        handle = await soon(me.submit(name, 0.4, wait=True))
        assert await asyncio.to_thread(process.stdout.readline) == "begun\n"
        process.send_signal(number)
        assert await soon(handle.result()) == "done"
        output, complaint = await asyncio.to_thread(process.communicate, timeout=WAIT_S)
        assert (process.returncode, output) == (0, "left\n")
        assert all(" INFO agenthub.agent " in line for line in complaint.splitlines()), complaint


@posix_only
@pytest.mark.parametrize("is_configured", [False, True])
async def test_run_logs_to_stderr_unless_the_program_has_configured_logging(
    tmp_path: Path, is_configured: bool
) -> None:
    configuration = "import logging\nlogging.basicConfig(format='own %(message)s', level='INFO')\n"
    source = (configuration if is_configured else "") + RUN
    async with HubServer(port=0) as hub, program(hub, tmp_path, source) as process:
        await eventually(lambda: online(hub) == 1)
        line = await asyncio.to_thread(process.stderr.readline)
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.communicate, timeout=WAIT_S)
    prefix = "own " if is_configured else r"\S+ \S+ INFO agenthub.agent "
    assert re.fullmatch(rf"{prefix}joined agent=\S+ capabilities=work, plain\n", line)


@posix_only
async def test_serve_gives_up_draining_at_its_bound(tmp_path: Path) -> None:
    async with HubServer(port=0) as hub, Agent("me", url=hub.url) as me, program(hub, tmp_path, SERVE) as process:
        await eventually(lambda: online(hub) == 3)
        handle = await soon(me.submit("work", 60, wait=True))
        assert await asyncio.to_thread(process.stdout.readline) == "begun\n"
        process.send_signal(signal.SIGTERM)
        assert (await failure_of(handle.result()))[0] == "agent_lost"
        output, _ = await asyncio.to_thread(process.communicate, timeout=WAIT_S)
        assert (process.returncode, output) == (0, "left\n")


HANGING = """
import asyncio, contextlib, time
from agenthub import Agent

agent = Agent("worker")

@agent.capability
def plain() -> None:
    print("begun", flush=True)
    time.sleep(600)

@agent.capability
async def to_thread() -> None:
    print("begun", flush=True)
    await asyncio.to_thread(time.sleep, 600)

@agent.capability
async def stubborn() -> None:
    print("begun", flush=True)
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(600)

agent.run(drain_s=0.1)
print("left")
"""


@posix_only
@pytest.mark.parametrize(("name", "named"), [("plain", "plain"), ("to_thread", "sleep"), ("stubborn", "stubborn")])
async def test_run_ends_although_a_handler_hangs_and_names_it(tmp_path: Path, name: str, named: str) -> None:
    async with HubServer(port=0) as hub, Agent("me", url=hub.url) as me, program(hub, tmp_path, HANGING) as process:
        await soon(me.submit(name, wait=True))
        assert await asyncio.to_thread(process.stdout.readline) == "begun\n"
        process.send_signal(signal.SIGTERM)
        output, complaint = await asyncio.to_thread(process.communicate, timeout=WAIT_S)
        assert (process.returncode, output) == (0, "left\n")
        assert re.search(f"left behind: {named}", complaint)


FORKING = """
import asyncio, multiprocessing, os, signal, sys, time, warnings
from agenthub import Agent

warnings.simplefilter("ignore")  # Of a fork while there are threads.
agent = Agent("worker")

@agent.capability
def fork() -> int:
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writable, b"!")
        time.sleep(5)
        os._exit(0)
    os.read(readable, 1)
    os.kill(child, signal.SIGTERM)
    return os.waitpid(child, 0)[1]

@agent.capability
async def interrupt() -> None:
    raise KeyboardInterrupt

def forked(way: str) -> int:
    # Return the exit code of a forked child that ends in this way; -9 if it does not end.
    if way == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=print)
        process.start()
        process.join(10)
        return process.exitcode
    child = os.fork()
    if child == 0:
        if way == "exit":
            os._exit(5)
        elif way == "sys.exit":
            sys.exit(6)
        elif way == "raise":
            raise ValueError("in the child")
        return -1
    begun = time.monotonic()
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() - begun > 10:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

@agent.capability
def plain(way: str) -> int:
    return forked(way)

@agent.capability
async def coroutine(way: str) -> int:
    output = forked(way)
    await asyncio.sleep(0)
    return output

@agent.capability
async def thread(way: str) -> int:
    return await asyncio.to_thread(forked, way)

@agent.on_broadcast
async def told(way: str, sender: str) -> None:
    print("told", forked(way), flush=True)

agent.run(loop=os.environ.get("LOOP", "auto"))
"""


@posix_only
async def test_signal_to_a_forked_child_ends_the_child_and_not_the_agent(tmp_path: Path) -> None:
    async with HubServer(port=0) as hub, Agent("me", url=hub.url) as me, program(hub, tmp_path, FORKING):
        for _ in range(2):
            assert await soon(me.delegate("fork", wait=True)) == signal.SIGTERM


@posix_only
@pytest.mark.parametrize("loop", agenthub.LOOPS[1:])
async def test_child_that_a_handler_forks_ends_where_the_handler_does(
    tmp_path: Path, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    monkeypatch.setenv("LOOP", loop)
    codes = {"return": 0, "raise": 1, "sys.exit": 6, "exit": 5, "multiprocessing": 0}
    async with (
        HubServer(port=0) as hub,
        Agent("me", url=hub.url) as me,
        program(hub, tmp_path, FORKING) as process,
    ):
        for capability in ("plain", "coroutine", "thread"):
            for way, code in codes.items():
                assert (way, await soon(me.delegate(capability, way, wait=True))) == (way, code)
        await me.broadcast("return")
        printed = ""
        while not printed.endswith("told 0\n"):
            printed += await soon(asyncio.to_thread(process.stdout.readline))
        assert printed.split() == ["told", "-1", "told", "0"]  # By the child, and by the agent.
        assert hub.rejected == {}
        assert len(await me.discover()) == 2


@posix_only
async def test_keyboard_interrupt_of_a_handler_fails_its_task_and_the_agent_lives(tmp_path: Path) -> None:
    async with HubServer(port=0) as hub, Agent("me", url=hub.url) as me, program(hub, tmp_path, FORKING):
        for _ in range(2):
            assert await failure_of(me.delegate("interrupt", wait=True)) == ("failed", "KeyboardInterrupt")


@posix_only
@pytest.mark.parametrize("name", ["work", "plain"])
async def test_second_signal_ends_it_at_once_and_quietly(tmp_path: Path, name: str) -> None:
    async with HubServer(port=0) as hub, Agent("me", url=hub.url) as me, program(hub, tmp_path, RUN) as process:
        await soon(me.submit(name, 60, wait=True))
        assert await asyncio.to_thread(process.stdout.readline) == "begun\n"
        process.send_signal(signal.SIGINT)
        await eventually(lambda: any(agent.state == "draining" for agent in hub.hub.directory.agents.values()))
        assert "joined" in await asyncio.to_thread(process.stderr.readline)
        line = await asyncio.to_thread(process.stderr.readline)
        assert line.endswith("waiting for 1 task (up to 4 s); Ctrl-C again to stop now\n")
        process.send_signal(signal.SIGINT)
        output, complaint = await asyncio.to_thread(process.communicate, timeout=5)
        assert output == "left\n"
        usual = (" INFO agenthub.agent ", "are left behind: plain")
        assert all(any(one in line for one in usual) for line in complaint.splitlines()), complaint


@posix_only
async def test_signal_ends_an_agent_that_waits_for_its_hub(tmp_path: Path) -> None:
    async with HubServer(port=0) as hub, program(hub, tmp_path, RUN) as process:
        await eventually(lambda: online(hub) == 1)
        await hub.stop()
        process.send_signal(signal.SIGTERM)
        output, _ = await asyncio.to_thread(process.communicate, timeout=5)
        assert (process.returncode, output) == (0, "left\n")


LEAVE = """
import asyncio, logging, sys
from agenthub import Agent

async def main() -> None:
    async with Agent("me") as me:
        print(len(await me.discover()))

asyncio.run(main())
"""


async def test_program_that_ends_leaves_nothing_open(tmp_path: Path) -> None:
    """Python warns about anything that is still open when the loop closes."""
    async with HubServer(port=0) as hub, program(hub, tmp_path, LEAVE) as process:
        output, complaint = await asyncio.to_thread(process.communicate, timeout=WAIT_S)
        assert (process.returncode, output, complaint) == (0, "1\n", "")


async def test_stopped_agent_has_closed_its_socket(wire: Wire) -> None:
    async with Agent("me", hub=wire):
        transport = getattr(wire.link, "transport", None)
    if transport is not None:
        assert transport.get_extra_info("socket").fileno() == -1


def test_logger_of_the_agent_is_quiet_by_default() -> None:
    assert logging.getLogger("agenthub.agent").level == logging.NOTSET


# Timers: one timer of the loop for what is due.


async def test_timers_ring_in_order_and_not_when_taken_back() -> None:
    timers, rung = agenthub.Timers(), []
    loop = asyncio.get_running_loop()
    functions = {name: functools.partial(rung.append, name) for name in "abcd"}
    for name, delay_s in (("c", 0.03), ("a", 0.01), ("d", 0.02), ("b", 0.05)):
        timers.set(functions[name], loop.time() + delay_s)
    timers.set(functions["b"], loop.time() + 0.02)  # Moved.
    timers.cancel(functions["d"])
    async with asyncio.timeout(WAIT_S):
        while len(rung) < 3:
            await asyncio.sleep(0.002)
    assert rung == ["a", "b", "c"]
    assert timers.next_at == math.inf


async def test_timer_that_fails_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    timers, rung = agenthub.Timers(), asyncio.Event()
    now = asyncio.get_running_loop().time()
    timers.set(functools.partial(int, "no number"), now)
    timers.set(rung.set, now)
    async with asyncio.timeout(WAIT_S):
        await rung.wait()
    assert "no number" in caplog.text
    caplog.clear()


async def test_timers_that_are_cleared_do_not_ring() -> None:
    timers, rung = agenthub.Timers(), asyncio.Event()
    timers.set(rung.set, asyncio.get_running_loop().time() + 0.001)
    timers.clear()
    await asyncio.sleep(0.01)
    assert not rung.is_set()
    timers.set(rung.set, asyncio.get_running_loop().time())
    async with asyncio.timeout(WAIT_S):
        await rung.wait()


@contextlib.asynccontextmanager
async def requester_of_one_who_waits() -> AsyncIterator[tuple[Agent, asyncio.Event]]:
    """Yield a requester, and the event that completes the tasks `wait` of a worker."""
    async with agenthub.LocalHub() as hub, Agent("r", hub=hub) as requester, Agent("w", hub=hub) as worker:
        go_on = asyncio.Event()

        @worker.capability("wait")
        async def wait() -> str:
            await go_on.wait()
            return "done"

        yield requester, go_on


async def test_large_messages_that_the_hub_allows_come_through_on_the_first_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = "x" * 20_000_000
    async with (
        HubServer(HubSettings(message_bytes_max=30_000_000), port=0) as hub,
        Agent("echo", url=hub.url) as worker,
        Agent("me", url=hub.url) as me,
    ):

        @worker.capability
        async def echo(text: str) -> str:
            return text

        assert await me.delegate("echo", {"text": text}, wait=True) == text
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_agent_says_that_it_accepts_less_than_the_hub_allows(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agenthub, "CLIENT_MESSAGE_BYTES_MAX", 1_000_000)
    async with HubServer(HubSettings(message_bytes_max=1_000_001), port=0) as hub, Agent("me", url=hub.url):
        assert "the hub allows messages of 1000001 bytes; this agent accepts at most 1000000" in caplog.text


async def test_many_tasks_are_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with requester_of_one_who_waits() as (requester, go_on):
        loop: Any = asyncio.get_running_loop()
        armed: list[float] = []
        call_at = loop.call_at
        monkeypatch.setattr(loop, "call_at", lambda when, *args, **options: armed.append(when) or call_at(when, *args))
        handles = [await requester.submit("wait") for _ in range(16)]
        assert len(armed) <= 6  # Of the hub, and of both agents; not one for each task.
        go_on.set()
        for handle in handles:
            await handle.result()


async def test_who_stops_waiting_for_a_result_leaves_the_others_alone() -> None:
    async with requester_of_one_who_waits() as (requester, go_on):
        handle = await requester.submit("wait")
        waiting = [asyncio.create_task(handle.result()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        with pytest.raises(TimeoutError):
            await handle.result(timeout_s=0.001)
        go_on.set()
        assert await asyncio.gather(*waiting[1:]) == ["done", "done"]
        assert waiting[0].cancelled()
        assert await handle.result() == "done"


# Other threads.


async def from_another_thread(coroutine: Callable[[], Any]) -> Any:
    """Return what a coroutine returns on an event loop of its own."""

    async def run() -> Any:
        return await coroutine()

    return await asyncio.to_thread(asyncio.run, run())


async def test_calls_from_another_event_loop_say_so_and_stop_is_safe(hub: LocalHub) -> None:
    me = Agent("me", **at(hub))
    async with me:
        handle = await me.submit("nothing", wait=True)
        calls: list[Callable[[], Any]] = [
            lambda: me.delegate("nothing"),
            lambda: me.submit("nothing"),
            me.discover,
            lambda: me.broadcast("x"),
            lambda: me.status("t"),
            me.connected,
            handle.result,
            handle.cancel,
            lambda: anext(aiter(handle)),
        ]
        for call in calls:
            with pytest.raises(RuntimeError, match="this agent runs on another event loop"):
                await soon(from_another_thread(call))
        with pytest.raises(RuntimeError, match="this agent runs on another event loop"):
            await asyncio.to_thread(handle.cancel_soon)
        assert not handle.done
        assert await me.discover(limit=1) is not None
        await soon(from_another_thread(me.stop))
        assert not me.is_online
        with pytest.raises(Disconnected):
            await handle.result()


# Outputs of other types than JSON has.


@dataclasses.dataclass
class Point:
    x: int
    label: str | None = None


class Colour(enum.Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (Point(1), {"x": 1, "label": None}),
        ([Point(1, "a")], [{"x": 1, "label": "a"}]),
        (Colour.RED, "red"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (datetime.datetime(2026, 1, 2, 3, 4), "2026-01-02T03:04:00"),
        (decimal.Decimal("1.50"), "1.50"),
        ({7}, [7]),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Path("a") / "b", str(Path("a") / "b")),
        ({"deep": [{"when": datetime.date(2026, 1, 2)}]}, {"deep": [{"when": "2026-01-02"}]}),
    ],
)
async def test_output_of_a_common_type_becomes_what_json_has_for_it(hub: LocalHub, output: Any, expected: Any) -> None:
    async def give() -> Any:
        return output

    async with working(hub, give) as me:
        assert await soon(me.delegate("give")) == expected


async def test_output_of_a_pydantic_model_becomes_an_object(hub: LocalHub) -> None:
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("Model", when=(datetime.date, ...))

    async def give() -> Any:
        return [model(when=datetime.date(2026, 1, 2))]

    async with working(hub, give) as me:
        assert await soon(me.delegate("give")) == [{"when": "2026-01-02"}]


@pytest.mark.parametrize("output", [b"x", object(), {"a": Point(1), "b": [object()]}, float("nan"), [Point]])
async def test_output_of_another_type_fails_its_task_and_names_the_part(hub: LocalHub, output: Any) -> None:
    async def give() -> Any:
        return output

    async with working(hub, give) as me:
        code, text = await failure_of(me.delegate("give"))
    assert code == "failed"
    assert text.startswith("output.b[0]: holds a object" if isinstance(output, dict) else "output")
