"""Section 8, the SDK: what Python has and JSON does not, in annotations, inputs and outputs."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import json
import typing
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NewType, NotRequired, Optional, Required, TypedDict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import agenthub
from agenthub import LocalHub, Task, ValidationError
from tests.test_agent import _nothing_is_left_over, failure_of, offered, soon, working  # noqa: F401  # a fixture

pytestmark = pytest.mark.filterwarnings("error")


class Level(enum.Enum):
    LOW = 1
    HIGH = "high"


class Color(enum.StrEnum):
    RED = "red"


class Right(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Item:
    name: str
    price: decimal.Decimal = decimal.Decimal("9.90")
    tags: set[str] = dataclasses.field(default_factory=set)
    total: int = dataclasses.field(init=False, default=0)


@dataclasses.dataclass(frozen=True)
class Order:
    """Some items."""

    items: list[Item]
    when: datetime.datetime
    level: Level = Level.LOW

    def __post_init__(self) -> None:
        if not self.items:
            raise ValueError("an order has at least one item")


@dataclasses.dataclass
class Tree:
    value: int
    children: list[Tree] = dataclasses.field(default_factory=list)


class Point(NamedTuple):
    x: int
    y: int = 0


class Person(TypedDict):
    name: str
    born: NotRequired[datetime.date]


class Loose(TypedDict, total=False):
    name: Required[str]
    age: int


UserId = NewType("UserId", int)
WHEN = datetime.datetime(2026, 11, 27, 12, 30, tzinfo=datetime.UTC)
ID = uuid.UUID("12345678-1234-5678-1234-567812345678")


def taken(annotation: Any, value: Any) -> Any:
    """Return what a handler gets whose parameter is so annotated. Raises ValidationError if the value does not fit."""
    return agenthub.TypeReader().validator(annotation)(value)


def schema_of(annotation: Any) -> dict[str, Any]:
    return agenthub.TypeReader().whole_schema(annotation)


def json_of(value: Any) -> Any:
    payload = agenthub.output_payload(value)
    return None if payload is None else json.loads(payload)


# From JSON, and back


@pytest.mark.parametrize(
    ("annotation", "given", "value"),
    [
        (Level, 1, Level.LOW),
        (Level, "high", Level.HIGH),
        (Color, "red", Color.RED),
        (Right, 3, Right.READ | Right.WRITE),
        (datetime.datetime, "2026-11-27T12:30:00+00:00", WHEN),
        (datetime.date, "2026-11-27", WHEN.date()),
        (datetime.time, "12:30:00", datetime.time(12, 30)),
        (decimal.Decimal, "0.10", decimal.Decimal("0.10")),
        (uuid.UUID, str(ID), ID),
        (Path, "a/b", Path("a/b")),
        (PurePosixPath, "/x", PurePosixPath("/x")),
        (Point, [1, 2], Point(1, 2)),
        (tuple[int, str], [1, "a"], (1, "a")),
        (tuple[int, ...], [1, 2, 3], (1, 2, 3)),
        (tuple[()], [], ()),
        (tuple, [1, "a"], (1, "a")),
        (typing.Tuple[int, ...], [1], (1,)),  # noqa: UP006  # users write it like this too
        (set[int], [1, 2], {1, 2}),
        (frozenset, ["a"], frozenset("a")),
        (collections.deque[int], [1], collections.deque([1])),
        (Sequence[Level], [1], [Level.LOW]),
        (Mapping[str, Level], {"a": 1}, {"a": Level.LOW}),
        (dict[int, str], {"1": "a"}, {1: "a"}),
        (dict[uuid.UUID, Point], {str(ID): [1, 0]}, {ID: Point(1)}),
        (dict[Level, int], {"1": 2, "high": 3}, {Level.LOW: 2, Level.HIGH: 3}),
        (UserId, 5, 5),
        (Person, {"name": "Ada", "born": "1815-12-10"}, {"name": "Ada", "born": datetime.date(1815, 12, 10)}),
        (Tree, {"value": 1, "children": [{"value": 2, "children": []}]}, Tree(1, [Tree(2)])),
        (Order | None, None, None),
        (
            Order,
            {
                "items": [{"name": "cup", "price": "1.50", "tags": ["new"], "total": 0}],
                "when": "2026-11-27T12:30:00+00:00",
                "level": "high",
            },
            Order([Item("cup", decimal.Decimal("1.50"), {"new"})], WHEN, Level.HIGH),
        ),
    ],
    ids=str,
)
def test_value_comes_from_json_and_becomes_the_same_json(annotation: Any, given: Any, value: Any) -> None:
    taken_from = given
    if annotation is Order:  # A field that the class sets itself is only in its output.
        taken_from = {**given, "items": [{key: one for key, one in given["items"][0].items() if key != "total"}]}
    found = taken(annotation, taken_from)
    assert found == value
    assert type(found) is type(value)
    assert json_of(value) == given


@pytest.mark.parametrize(
    ("annotation", "given", "value"),
    [
        (decimal.Decimal, 0.1, decimal.Decimal("0.1")),
        (decimal.Decimal, 5, decimal.Decimal(5)),
        (Point, [1], Point(1)),
        (Point, {"x": 1}, Point(1)),
        (Point, {"y": 2, "x": 1}, Point(1, 2)),
        (Level, 1.0, Level.LOW),
        (Item, {"name": "cup", "tags": None}, Item("cup")),
        (Loose, {"name": "Ada"}, {"name": "Ada"}),
        (datetime.datetime | str, "tomorrow", "tomorrow"),
        (int | datetime.date, "2026-11-27", WHEN.date()),
        (Iterable[int], [1.0], [1]),
    ],
    ids=str,
)
def test_other_forms_are_taken_too(annotation: Any, given: Any, value: Any) -> None:
    assert taken(annotation, given) == value


@pytest.mark.parametrize(
    ("annotation", "given", "text"),
    [
        (Level, True, 'must be one of [1, "high"]'),
        (Level, [1], 'must be one of [1, "high"]'),
        (Level, "1", 'must be one of [1, "high"]'),
        (Right, 8, "must be a sum of [1, 2]"),
        (datetime.datetime, "tomorrow", "must be a text in the format date-time"),
        (datetime.datetime, 5, "must be of type string"),
        (decimal.Decimal, "x", "must be a text in the format decimal"),
        (decimal.Decimal, "NaN", "must be a finite number"),
        (decimal.Decimal, True, "must be of type number or string"),
        (uuid.UUID, "x", "must be a text in the format uuid"),
        (Path, None, "must be of type string"),
        (Point, [], "must have 1 to 2 items"),
        (Point, [1, "a"], "1: must be of type integer"),
        (Point, {"y": 1}, "x: is required"),
        (Point, {"x": 1, "z": 1}, "has a field that is not one of x, y"),
        (Point, "x", "must be of type array"),
        (tuple[int, str], [1], "must have 2 to 2 items"),
        (set[list[int]], [[1]], "unhashable type: 'list'"),
        (dict[int, str], {"a": "b"}, "has a key that must be of type integer"),
        (dict[int, str], {"1": 2}, "*: must be of type string"),
        (Person, {"born": "1815-12-10"}, "name: is required"),
        (Person, {"name": "Ada", "born": 1815}, "born: must be of type string"),
        (Person, {"name": "Ada", "age": 36}, "has a field that is not one of name, born"),
        (Loose, {"age": 36}, "name: is required"),
        (Item, {"name": "cup", "total": 1}, "has a field that is not one of name, price, tags"),
        (Order, {"items": [], "when": "2026-11-27"}, "an order has at least one item"),
        (Order, {"items": [{"name": 5}], "when": "2026-11-27"}, "items.0.name: must be of type string"),
        (Tree, {"value": 1, "children": [{"value": "x"}]}, "children.0.value: must be of type integer"),
    ],
    ids=str,
)
def test_value_that_does_not_fit_names_its_part(annotation: Any, given: Any, text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        taken(annotation, given)
    assert str(caught.value).startswith(text), str(caught.value)


# Schemas


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        (Level, {"enum": [1, "high"]}),
        (Color, {"const": "red", "type": "string"}),
        (Right, {"type": "integer"}),
        (datetime.datetime, {"type": "string", "format": "date-time"}),
        (uuid.UUID, {"type": "string", "format": "uuid"}),
        (Path, {"type": "string", "format": "path"}),
        (decimal.Decimal, {"anyOf": [{"type": "number"}, {"type": "string"}]}),
        (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
        (set[int], {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}),
        (Sequence[str], {"type": "array", "items": {"type": "string"}}),
        (dict[int, Color], {"type": "object", "additionalProperties": {"const": "red", "type": "string"}}),
        (UserId, {"type": "integer"}),
        (
            Point,
            {
                "type": "array",
                "prefixItems": [{"type": "integer"}, {"type": "integer"}],
                "minItems": 1,
                "maxItems": 2,
            },
        ),
        (
            Person,
            {
                "type": "object",
                "properties": {"name": {"type": "string"}, "born": {"type": "string", "format": "date"}},
                "required": ["name"],
                "additionalProperties": False,
            },
        ),
        (
            Optional[Tree],  # noqa: UP045  # users write it like this too
            {
                "anyOf": [{"$ref": "#/$defs/Tree"}, {"type": "null"}],
                "$defs": {
                    "Tree": {
                        "type": "object",
                        "properties": {
                            "value": {"type": "integer"},
                            "children": {"type": "array", "items": {"$ref": "#/$defs/Tree"}},
                        },
                        "required": ["value"],
                        "additionalProperties": False,
                    }
                },
            },
        ),
    ],
    ids=str,
)
def test_annotation_becomes_a_schema(annotation: Any, schema: dict[str, Any]) -> None:
    assert schema_of(annotation) == schema


def test_two_classes_of_one_name_are_defined_apart() -> None:
    def recursive(kind: Any) -> Any:
        class Node(TypedDict):
            value: kind
            next: Any

        Node.__annotations__["next"] = list[Node]
        Node.__annotations__["value"] = kind
        return Node

    types = agenthub.TypeReader()
    schemas = [types.schema(recursive(int)), types.schema(recursive(str))]
    assert schemas == [{"$ref": "#/$defs/Node"}, {"$ref": "#/$defs/Node_"}]
    assert [types.definitions[name]["properties"]["value"] for name in ("Node", "Node_")] == [
        {"type": "integer"},
        {"type": "string"},
    ]


def test_defaults_of_parameters_are_shown_as_json() -> None:
    def work(level: Level = Level.LOW, path: Path = Path("a"), when: Any = datetime.date.min) -> None: ...

    found = offered(work).input_schema
    assert found is not None
    assert {name: one["default"] for name, one in found["properties"].items()} == {
        "level": 1,
        "path": "a",
        "when": "0001-01-01",
    }


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (dataclasses.make_dataclass("Bad", [("x", bytes)]), "work: x: Bad.x: bytes is not JSON"),
        (list[dataclasses.make_dataclass("Worse", [("x", list[complex])])], "work: x: Worse.x: complex is not JSON"),
        (enum.Enum("Odd", {"A": object()}), "work: x: Odd.A is not JSON: give it a text or a number"),
        (dict[bytes, int], "work: x: bytes is not JSON"),
        (set[bytes], "work: x: bytes is not JSON"),
    ],
)
def test_class_that_json_does_not_have_is_refused_by_its_path(kind: Any, text: str) -> None:
    def work(x: Any) -> None: ...

    work.__annotations__ = {"x": kind}
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # compared below
        offered(work)
    assert str(caught.value).startswith(text)


# In handlers


async def test_handler_gets_python_and_gives_python() -> None:
    async def ship(order: Order, to: Person, by: Level = Level.LOW) -> dict[str, Any]:
        assert isinstance(order, Order)
        return {"order": order, "due": order.when.date() + datetime.timedelta(days=1), "to": to["name"], by: {1}}

    async with LocalHub() as hub, working(hub, ship) as me:
        order = Order([Item("cup")], WHEN)
        output = await soon(
            me.delegate("ship", {"order": {"items": [{"name": "cup"}], "when": WHEN}, "to": {"name": "A"}})
        )
        assert output == {
            "order": {
                "items": [{"name": "cup", "price": "9.90", "tags": [], "total": 0}],
                "when": "2026-11-27T12:30:00+00:00",
                "level": 1,
            },
            "due": "2026-11-28",
            "to": "A",
            "1": [1],
        }
        assert await failure_of(me.delegate("ship", {"order": order, "to": {}})) == (
            "invalid_input",
            "input.order.items.0: has a field that is not one of name, price, tags",
        )


async def test_input_answer_and_progress_are_converted_like_an_output() -> None:
    async def echo(task: Task) -> Any:
        task.progress(detail=WHEN)
        return [task.input, await task.ask("When?", datetime.date)]

    async with LocalHub() as hub, working(hub, echo) as me:
        handle = await me.submit("echo", {"id": ID, Color.RED: {Point(1)}}, on_question=lambda _: WHEN.date())
        assert await soon(handle.result()) == [{"id": str(ID), "red": [[1, 0]]}, "2026-11-27"]
        (update,) = [update async for update in handle if isinstance(update, agenthub.Progress)]
        assert update.detail == "2026-11-27T12:30:00+00:00"
        with pytest.raises(ValueError, match=r"input\.order\.items\[0\]\.name: holds a bytes, which is not JSON"):
            await me.delegate("echo", {"order": Order([Item(b"x")], WHEN)})  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ([{"a": Item(b"x")}], "output[0].a.name: holds a bytes, which is not JSON"),  # type: ignore[arg-type]  # on purpose
        ({Level.LOW: 1, 1: 2}, "output: holds an object with two keys that are the same in JSON"),
        ({"a": {b"": 1}}, "output.a: holds a bytes, which is not JSON"),
        ({"a": {1.5: decimal.Decimal("NaN"), (1,): 2}}, "output.a: "),
        ([datetime.timedelta(1)], "output[0]: holds a timedelta, which is not JSON"),
    ],
)
async def test_output_that_json_does_not_have_fails_by_its_path(output: Any, text: str) -> None:
    def work() -> Any:
        return output

    async with LocalHub() as hub, working(hub, work) as me:
        code, found = await failure_of(me.delegate("work"))
    assert (code, found[: len(text)]) == ("failed", text)


# Pydantic


async def test_model_of_pydantic_is_checked_by_pydantic() -> None:
    pydantic = pytest.importorskip("pydantic")

    class Part(pydantic.BaseModel):  # type: ignore[name-defined,misc]  # imported at run time
        name: str

    class Model(pydantic.BaseModel):  # type: ignore[name-defined,misc]  # imported at run time
        model_config = pydantic.ConfigDict(strict=True)
        at: datetime.datetime
        n: int = pydantic.Field(gt=0, alias="count")
        parts: list[Part] = []

    def work(model: Any, others: Any = None) -> Any:
        assert isinstance(model, Model)
        return [model, *(others or ())]

    work.__annotations__ = {"model": Model, "others": list[Model] | None, "return": list[Model]}
    found = offered(work)
    assert found.input_schema is not None
    assert found.input_schema["$defs"]["Part"]["required"] == ["name"]
    assert found.input_schema["properties"]["model"]["properties"]["count"]["exclusiveMinimum"] == 0
    assert found.output_schema is not None
    assert list(found.output_schema["items"]["properties"]) == ["at", "n", "parts"]
    async with LocalHub() as hub, working(hub, work) as me:
        given = {"at": "2026-11-27T12:30:00Z", "count": 1, "parts": [{"name": "a"}]}
        made = {"at": "2026-11-27T12:30:00Z", "n": 1, "parts": [{"name": "a"}]}
        assert await soon(me.delegate("work", {"model": given, "others": [given]})) == [made, made]
        for bad, text in (
            ({**given, "count": 0}, "input.model.count: Input should be greater than 0"),
            ({**given, "parts": [{}]}, "input.model.parts.0.name: Field required"),
        ):
            assert await failure_of(me.delegate("work", {"model": bad})) == ("invalid_input", text)


def test_models_of_pydantic_with_parts_of_one_name_are_defined_apart() -> None:
    pydantic = pytest.importorskip("pydantic")

    def outer(kind: Any) -> Any:
        part = pydantic.create_model("Part", value=(kind, ...))
        return pydantic.create_model("Outer", part=(part, ...), __module__=__name__)

    types = agenthub.TypeReader()
    first, second = types.schema(outer(int)), types.schema(outer(str))
    assert (first["properties"]["part"], second["properties"]["part"]) == (
        {"$ref": "#/$defs/Part"},
        {"$ref": "#/$defs/Part_"},
    )
    assert [types.definitions[name]["properties"]["value"]["type"] for name in ("Part", "Part_")] == [
        "integer",
        "string",
    ]


# Any value


@dataclasses.dataclass(frozen=True)
class Any_:
    when: datetime.datetime
    day: datetime.date
    number: decimal.Decimal
    id: uuid.UUID
    level: Level
    point: Point
    pair: tuple[int, str]
    counts: dict[int, frozenset[str]]
    inner: Any_ | None


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
LEAVES = {
    "when": st.datetimes(),
    "day": st.dates(),
    "number": st.decimals(allow_nan=False, allow_infinity=False),
    "id": st.uuids(),
    "level": st.sampled_from(Level),
    "point": st.builds(Point, st.integers(-9, 9), st.integers(-9, 9)),
    "pair": st.tuples(st.integers(-9, 9), TEXTS),
    "counts": st.dictionaries(st.integers(-9, 9), st.frozensets(TEXTS, max_size=3), max_size=3),
}
VALUES = st.recursive(
    st.builds(Any_, **LEAVES, inner=st.none()), lambda inner: st.builds(Any_, **LEAVES, inner=inner), max_leaves=3
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # Machines may be busy.
@given(VALUES)
def test_any_value_that_is_written_is_read_again(value: Any_) -> None:
    assert taken(Any_, json_of(value)) == value


def test_hints_of_a_class_that_is_partly_unknown_name_the_field() -> None:
    class Bad:
        x: no_such_name  # type: ignore[name-defined]  # noqa: F821  # on purpose

    with pytest.raises(ValueError, match=r"Bad\.x: its annotation 'no_such_name' cannot be evaluated"):
        taken(dataclasses.dataclass(Bad), {"x": 1})
