"""Section 2, Messages: decoding, rejections and their texts, and encoding."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agenthub
from agenthub import (
    AgentMessage,
    Broadcast,
    BroadcastDelivery,
    Capability,
    Delegate,
    Error,
    ErrorInfo,
    HubMessage,
    InvalidMessage,
    JsonLimit,
    Limit,
    Question,
    Register,
    TaskState,
    check_json,
    decoder_from_agent,
    decoder_from_hub,
    encode,
    json_schema,
)
from tests.support import parsed

FROM_AGENT: dict[str, Any] = {
    message.__dataclass_fields__["type"].default: message for message in typing.get_args(AgentMessage)
}

# The required fields of each message, and the defaults of the others (docs/protocol.md).
REQUIRED: dict[str, dict[str, Any]] = {
    "register": {"name": "n"},
    "deregister": {},
    "discover": {},
    "delegate": {"task_id": "t"},
    "result": {"task_id": "t", "success": True},
    "status": {},
    "broadcast": {"message": "m"},
    "heartbeat": {},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "register": {
        "description": "",
        "capabilities": [],
        "max_tasks": 16,
        "occupied": 0,
        "metadata": {},
        "agent_id": None,
        "resume": None,
    },
    "deregister": {"drain": False},
    "discover": {"capability": "", "limit": 100},
    "delegate": {
        "agent_id": None,
        "capability": None,
        "input": None,
        "ttl": 300,
        "priority": 0,
        "max_retries": 0,
        "parent_id": None,
        "wait": False,
        "answers": False,
        "trace": None,
    },
    "result": {"output": None, "error": None, "attempt": None},
    "status": {
        "task_id": None,
        "tasks": False,
        "limit": 1000,
        "state": None,
        "progress": None,
        "detail": None,
        "piece": None,
        "question": None,
        "ask": None,
        "answer": None,
    },
    "broadcast": {"capability": None},
    "heartbeat": {},
}
MESSAGES = list(REQUIRED)


def read(document: Any, *, raw: bytes | None = None) -> Any:
    return parsed(decoder_from_agent()(json.dumps(document).encode() if raw is None else raw))


def message_of(type: str, **fields: Any) -> dict[str, Any]:
    """Return a message that is valid except for `fields`."""
    return {"type": type, "id": "1", **REQUIRED[type], **fields}


def refusal(document: Any = None, *, raw: bytes | None = None) -> InvalidMessage:
    with pytest.raises(InvalidMessage) as caught:
        read(document, raw=raw)
    assert "\n" not in caught.value.message
    return caught.value


# Decoding


@pytest.mark.parametrize("type", MESSAGES)
def test_message_with_its_required_fields_alone_is_read_with_the_defaults_of_the_protocol(type: str) -> None:
    message = read({"type": type, **REQUIRED[type]})
    assert dataclasses.asdict(message) == {"type": type, "id": None} | REQUIRED[type] | DEFAULTS[type]


def test_agents_send_eight_types_and_the_hub_nine_and_there_are_ten() -> None:
    sent_by_hub = {message.__dataclass_fields__["type"].default for message in typing.get_args(HubMessage)}
    assert set(MESSAGES) == set(FROM_AGENT)
    assert set(MESSAGES) | sent_by_hub == set(MESSAGES) | {"heartbeat_ack", "error"}
    assert len(set(MESSAGES) | sent_by_hub) == 10


@pytest.mark.parametrize("type", MESSAGES)
def test_each_field_can_be_given(type: str) -> None:
    given_fields = {name: value for name, value in DEFAULTS[type].items() if value is not None}
    assert read(message_of(type, **given_fields)) == read(message_of(type))


@pytest.mark.parametrize(("type", "field"), [(type, field) for type in MESSAGES for field in REQUIRED[type]])
def test_missing_field_is_refused_by_its_name(type: str, field: str) -> None:
    document = message_of(type)
    del document[field]
    error = refusal(document)
    assert (error.code, error.reply_to, error.message) == ("invalid_message", "1", f"{field}: is required")


def test_unknown_fields_are_ignored() -> None:
    assert read(message_of("delegate", sender="me", zzz={"a": [1]})) == read(message_of("delegate"))


def test_capability_is_a_name_or_an_object() -> None:
    schema = {"type": "object"}
    capabilities = ["a", {"name": "b"}, {"name": "c", "description": "d", "input_schema": schema, "output_schema": {}}]
    message = read(message_of("register", capabilities=capabilities))
    assert message.capabilities == ["a", Capability("b"), Capability("c", "d", schema, {})]


def test_error_of_a_result_is_a_text_or_an_object() -> None:
    assert read(message_of("result", success=False, error="out of paper")).error == "out of paper"
    error = {"code": "paper", "message": "out of paper"}
    assert read(message_of("result", success=False, error=error)).error == ErrorInfo("paper", "out of paper")


# Limits: for each limited field, the values at the edge that are accepted, and those just past it


def inside(*values: Any, **fields: Any) -> list[Any]:
    """Return capabilities with each of the values in one of their fields."""
    ((name, values),) = fields.items()
    return [[{"name": "c", name: value}] for value in values]


def sized(size: int) -> dict[str, str]:
    """Return an object of that many bytes."""
    return {"a": "x" * (size - len('{"a": ""}'))}


ID = ("x", "x" * 128), ("", "x" * 129)
EDGES: dict[str, tuple[typing.Sequence[Any], typing.Sequence[Any]]] = {
    "id": ID,
    "task_id": ID,
    "agent_id": ID,
    "parent_id": ID,
    "resume": ID,
    "name": ID,
    "capability": ID,
    "discover.capability": (("", "x" * 128), ("x" * 129,)),
    "description": (("", "x" * 4096), ("x" * 4097,)),
    "capabilities": (([], ["x"] * 64), (["x"] * 65,)),
    "capabilities.name": (
        (["x"], ["x" * 128], [{"name": "x" * 128}]),
        ([""], ["x" * 129], [{"name": ""}], [{"name": "x" * 129}]),
    ),
    "capabilities.description": (inside(description=["", "x" * 4096]), inside(description=["x" * 4097])),
    "capabilities.input_schema": (inside(input_schema=[{}, sized(65_536)]), inside(input_schema=[sized(65_537)])),
    "capabilities.output_schema": (inside(output_schema=[{}, sized(65_536)]), inside(output_schema=[sized(65_537)])),
    "max_tasks": ((1, 10_000), (0, -1, 10_001, 10**30)),
    "occupied": ((0, 10_000), (-1, 10_001, 10**30)),
    "metadata": (({}, sized(4096)), (sized(4097),)),
    "limit": ((1, 1000), (0, 1001)),
    "ttl": ((5e-324, 0.001, 604_800), (0, -0.0, -1, 604_800.001, 604_801)),
    "priority": ((-100, 100), (-101, 101)),
    "max_retries": ((0, 100), (-1, 101)),
    "attempt": ((1, 1_000_000), (0, 1_000_001)),
    "progress": ((0, 1, 0.5, 1.0), (-0.001, 1.001)),
    "error": (("", "x" * 65_536), ("x" * 65_537,)),
    "error.code": (({"code": "x"}, {"code": "x" * 128}), ({"code": ""}, {"code": "x" * 129})),
    "error.message": (({"code": "x", "message": "x" * 65_536},), ({"code": "x", "message": "x" * 65_537},)),
    "trace": (({}, sized(2048)), (sized(2049),)),
    "ask": ((1, 1_000_000_000), (0, 1_000_000_001)),
    "question.text": (({"text": ""}, {"text": "x" * 65_536}), ({"text": "x" * 65_537},)),
    "question.schema": (
        ({"text": "", "schema": {}}, {"text": "", "schema": sized(65_536)}),
        ({"text": "", "schema": sized(65_537)},),
    ),
}


def limited_fields() -> list[tuple[str, str]]:
    """Return the (type, path) of each field whose annotation has a limit."""

    def paths(hint: Any, path: str) -> set[str]:
        found = {path} if any(isinstance(one, Limit) for one in getattr(hint, "__metadata__", ())) else set()
        found |= {path for one in getattr(hint, "__metadata__", ()) if isinstance(one, JsonLimit) and one.bytes_max}
        if hint in (Capability, ErrorInfo, Question):
            inner = typing.get_type_hints(hint, include_extras=True)
            return found.union(*(paths(one, f"{path}.{name}") for name, one in inner.items()))
        if typing.get_origin(hint) is list:  # A limited string in a list of capabilities is a name.
            (items,) = typing.get_args(hint)
            return found | {f"{path}.name" if one == path else one for one in paths(items, path)}
        return found.union(*(paths(one, path) for one in typing.get_args(hint) if not isinstance(one, str)))

    hints = {type: typing.get_type_hints(FROM_AGENT[type], include_extras=True) for type in MESSAGES}
    return [
        (type, path) for type in MESSAGES for name in hints[type] for path in sorted(paths(hints[type][name], name))
    ]


def edges_of(type: str, path: str) -> tuple[typing.Sequence[Any], typing.Sequence[Any]]:
    return EDGES.get(f"{type}.{path}") or EDGES[path]


def test_table_of_edges_has_every_limit_and_no_other() -> None:
    paths = {path for _, path in limited_fields()}
    assert {path.removeprefix("discover.") for path in EDGES} == paths


@pytest.mark.parametrize(("type", "path"), limited_fields())
def test_value_at_the_edge_is_taken(type: str, path: str) -> None:
    field = path.split(".")[0]
    for value in edges_of(type, path)[0]:
        read(message_of(type, **{field: value}))


@pytest.mark.parametrize(("type", "path"), limited_fields())
def test_value_past_the_edge_is_refused_by_the_name_of_its_field(type: str, path: str) -> None:
    field, *inner = path.split(".")
    for value in edges_of(type, path)[1]:
        error = refusal(message_of(type, **{field: value}))
        assert error.code == "invalid_message"
        assert error.reply_to == ("1" if field != "id" else None)
        named = error.message.split(":")[0].split(".")
        if value == ["x"] * 65 or path == "error":
            assert named == [field]
        elif field == "capabilities":
            assert named == ["capabilities", "0", *inner] or (isinstance(value[0], str) and named == [field, "0"])
        else:
            assert named == [field, *inner]


def test_length_is_counted_in_characters() -> None:
    read(message_of("delegate", capability="\N{GRINNING FACE}" * 128))
    refusal(message_of("delegate", capability="\N{GRINNING FACE}" * 129))


# Wrong types: for each field, the kinds of JSON that it accepts; everything else is rejected

SAMPLES = {"text": "x", "int": 1, "float": 0.5, "bool": True, "null": None, "list": [], "object": {}}
ANYTHING = set(SAMPLES)
KINDS: dict[str, set[str]] = {
    "id": {"text", "null"},
    "name": {"text"},
    "description": {"text"},
    "capabilities": {"list"},
    "max_tasks": {"int"},
    "occupied": {"int"},
    "metadata": {"object"},
    "agent_id": {"text", "null"},
    "resume": {"text", "null"},
    "drain": {"bool"},
    "capability": {"text", "null"},
    "discover.capability": {"text"},
    "limit": {"int"},
    "task_id": {"text"},
    "status.task_id": {"text", "null"},
    "input": ANYTHING,
    "ttl": {"int", "float"},
    "priority": {"int"},
    "max_retries": {"int"},
    "parent_id": {"text", "null"},
    "wait": {"bool"},
    "success": {"bool"},
    "output": ANYTHING,
    "error": {"text", "null"},  # An empty object has no code.
    "attempt": {"int", "null"},
    "tasks": {"bool"},
    "progress": {"int", "float", "null"},
    "detail": ANYTHING,
    "message": ANYTHING,
    "answers": {"bool"},
    "trace": {"object", "null"},
    "state": {"null"},  # A text must be one of the states.
    "piece": ANYTHING,
    "question": {"null"},  # An empty object has no text.
    "ask": {"int", "null"},
    "answer": ANYTHING,
}
FIELDS = [(type, field) for type in MESSAGES for field in ("id", *REQUIRED[type], *DEFAULTS[type])]


@pytest.mark.parametrize(("type", "field"), FIELDS)
def test_field_takes_its_kinds_of_json_and_no_other(type: str, field: str) -> None:
    taken = KINDS.get(f"{type}.{field}") or KINDS[field]
    for kind, value in SAMPLES.items():
        if kind in taken:
            read(message_of(type, **{field: value}))
        else:
            error = refusal(message_of(type, **{field: value}))
            assert error.message.split(":")[0].split(".")[0] == field, (kind, error.message)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("capabilities", ["a", 5], "capabilities.1"),
        ("capabilities", ["a", ""], "capabilities.1"),
        ("capabilities", ["a", {}], "capabilities.1.name"),
        ("capabilities", ["a", {"name": 5}], "capabilities.1.name"),
        ("capabilities", [{"name": "a", "input_schema": []}], "capabilities.0.input_schema"),
        ("error", 5, "error"),
        ("error", {}, "error.code"),
        ("error", {"code": "x", "message": 5}, "error.message"),
    ],
)
def test_refusal_names_the_inner_field_and_nothing_of_the_checker(field: str, value: Any, named: str) -> None:
    type = "register" if field == "capabilities" else "result"
    assert refusal(message_of(type, **{field: value})).message.split(":")[0] == named


# Not a message


@pytest.mark.parametrize("raw", [b"", b" ", b"{", b'{"type": "heartbeat"', b'{"type": "heartbeat"} x', b"\x00", b"nul"])
def test_what_is_not_json_is_refused(raw: bytes) -> None:
    error = refusal(raw=raw)
    assert (error.code, error.reply_to) == ("invalid_message", None)
    assert error.message.startswith("Invalid JSON: ")


@pytest.mark.parametrize("document", [[], 5, "heartbeat", None, True, [{"type": "heartbeat"}]])
def test_what_is_not_an_object_is_refused(document: Any) -> None:
    assert refusal(document).code == "invalid_message"


@pytest.mark.parametrize("type", ["", "Heartbeat", "heartbeat_ack", "error", "secret", "x" * 1000])
def test_unknown_type_is_told_which_there_are(type: str) -> None:
    error = refusal({"type": type, "id": "1"})
    assert (error.code, error.reply_to) == ("unsupported_type", "1")
    assert error.message == "type: must be one of " + ", ".join(sorted(MESSAGES))


@pytest.mark.parametrize("document", [{}, {"type": None}, {"type": 5}, {"type": ["heartbeat"]}, {"type": {}}])
def test_type_that_is_no_text_or_missing_is_an_invalid_message(document: Any) -> None:
    error = refusal(document)
    assert error.code == "invalid_message"
    assert error.message.startswith("type: ")


NOT_FINITE = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"]
NUMBERS = [("delegate", "ttl"), ("status", "progress"), ("register", "max_tasks"), ("result", "attempt")]
PAYLOADS = [
    ("delegate", "input"),
    ("result", "output"),
    ("status", "detail"),
    ("status", "piece"),
    ("status", "answer"),
    ("broadcast", "message"),
]


def with_number(type: str, field: str, number: str) -> bytes:
    """Return a message with a number that Python would not write; `field` may be a dotted path."""
    name, *inner = field.split(".")
    value: Any = "NUMBER"
    for key in reversed(inner):
        value = {key: value} if key != "0" else [value]
    return json.dumps(message_of(type, **{name: value})).replace('"NUMBER"', number).encode()


@pytest.mark.parametrize("number", NOT_FINITE)
@pytest.mark.parametrize(
    ("type", "field"),
    [
        *NUMBERS,
        *PAYLOADS,
        *((type, f"{field}.a.0.b") for type, field in PAYLOADS),
        ("register", "metadata.a"),
        ("register", "capabilities.0.input_schema"),
    ],
)
def test_number_that_is_not_finite_is_refused_in_every_field(type: str, field: str, number: str) -> None:
    error = refusal(raw=with_number(type, field, number))
    assert (error.code, error.reply_to) == ("invalid_message", "1")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_constant_that_is_not_json_is_refused_in_an_unknown_field(number: str) -> None:
    error = refusal(raw=with_number("heartbeat", "zzz.a.0", number))
    assert (error.code, error.reply_to) == ("invalid_message", "1")


def test_texts_may_speak_of_nan_and_infinity() -> None:
    words = {"NaN": ["Infinity", "-Infinity", '"NaN']}
    assert read(message_of("delegate", input=words)).input == words


def test_number_too_large_for_a_float_is_json_and_ignored_in_an_unknown_field() -> None:
    read(None, raw=with_number("heartbeat", "zzz", "1e999"))


@pytest.mark.parametrize("document", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000])
@pytest.mark.parametrize("where", ["alone", "payload", "unknown field"])
def test_hundred_thousand_brackets_are_refused(document: str, where: str) -> None:
    field = {"payload": "input", "unknown field": "zzz"}.get(where)
    raw = json.dumps(message_of("delegate", **{field: "HERE"})).replace('"HERE"', document) if field else document
    assert refusal(raw=raw.encode()).code == "invalid_message"


@pytest.mark.parametrize(("type", "field"), PAYLOADS)
@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("innermost", ["1", "null", "[]", "{}", '"x"', "1.5"])
def test_payload_may_be_64_deep(type: str, field: str, opened: str, closed: str, innermost: str) -> None:
    depth = 63 if innermost in ("[]", "{}") else 64
    read(None, raw=with_number(type, field, opened * depth + innermost + closed * depth))
    error = refusal(raw=with_number(type, field, opened * (depth + 1) + innermost + closed * (depth + 1)))
    assert error.message == f"{field}: is nested more than 64 deep"
    assert error.reply_to == "1"


@pytest.mark.parametrize(
    "raw",
    [
        b'{"type": "heartbeat", "id": "\xff"}',
        b'{"type": "heartbeat", "zzz": "\xc3\x28"}',
        b'{"type": "heartbeat", "zzz": "\xed\xa0\x80"}',
        b"\xff\xfe\x00",
    ],
)
def test_what_is_not_utf_8_is_refused(raw: bytes) -> None:
    assert refusal(raw=raw).code == "invalid_message"


@pytest.mark.parametrize("escape", [r"\ud800", r"\udc00", r"\udc00\ud800", r"a\ud800b"])
@pytest.mark.parametrize("field", ["input", "task_id", "zzz"])
def test_half_a_surrogate_pair_is_refused(escape: str, field: str) -> None:
    raw = json.dumps(message_of("delegate", **{field: "HERE"})).replace("HERE", escape).encode()
    error = refusal(raw=raw)
    assert (error.code, error.reply_to) == ("invalid_message", "1")


def test_integers_of_64_bits_are_taken_and_larger_ones_refused() -> None:
    least, most = -(2**63), 2**64 - 1
    message = read(message_of("delegate", input=[least, {"most": most}]))
    assert message.input == [least, {"most": most}]
    assert read(None, raw=encode(message)).input == message.input
    assert agenthub.same_content(message, message)
    for over in (least - 1, most + 1, 10**4000):
        assert "64 bits" in refusal(message_of("delegate", input={"a": [over]})).message
    for field in ("input", "priority", "zzz"):
        refusal(raw=with_number("delegate", field, "1" * 5000))
    assert refusal(raw=with_number("register", "max_tasks", "1" * 4000)).message.startswith("max_tasks: ")
    assert refusal(raw=with_number("register", "metadata.a", "1" * 4097)).message.startswith("metadata: ")


def test_shape_of_a_large_number_in_a_string_needs_no_slower_parser() -> None:
    for text in ("requester-ab4e929c", "1e999", "12345678901234567890", 'a quote " and 1e999', "a backslash \\"):
        inside = json.dumps({"task_id": text, "ttl": 5}).encode()
        assert not agenthub.may_hold_large_number(inside)
        assert agenthub.may_hold_large_number(inside.replace(b"5", b"1e999"))
        assert agenthub.may_hold_large_number(inside.replace(b"5", b"12345678901234567890"))


# Numbers and depth, which show in the bytes of a message: nothing is walked unless they look suspicious.

AROUND = [*range(100), {"a": 1.5, "b": "c"}]  # Many short values: looking at the bytes is faster than a walk.
TAKEN = [
    *("18446744073709551615", "-9223372036854775808", "1700000000000000000", "9999999999999999999", "1e308", "1E+99"),
    *("1e-999", "0.00000000000000000001", "-1.7976931348623157e308", "0e999", "12345678901234567890e-5"),
    *('"123456789012345678901234567890"', '"1e999"', '"a\\"1e999"', '{"1e999": 1}', '"-9999999999999999999"'),
]
REFUSED = [
    *("18446744073709551616", "-9223372036854775809", "-9999999999999999999", "123456789012345678901234567890"),
    *("1e999", "-1E+999", "1e309", "1.5E0400", "1e00000309", "123456789012345678901e289", "9" * 310 + ".5"),
    *('["\\"", 1e999]', '{"a": {"b": [-1e400]}}', '["1e999", 1e999]'),
]


def crowded(type: str, field: str, value: str) -> bytes:
    """Return a message with a value among many others in one of its payloads."""
    document = json.dumps(message_of(type, **{field: [*AROUND, "HERE", *AROUND]}))
    return document.replace('"HERE"', value).encode()


@pytest.mark.parametrize(("type", "field"), PAYLOADS)
@pytest.mark.parametrize("value", TAKEN)
def test_number_that_only_looks_large_is_taken_among_many_values(type: str, field: str, value: str) -> None:
    message = read(None, raw=crowded(type, field, value))
    assert getattr(message, field)[len(AROUND)] == json.loads(value)


@pytest.mark.parametrize(("type", "field"), PAYLOADS)
@pytest.mark.parametrize("value", REFUSED)
def test_number_that_is_too_large_is_refused_among_many_values(type: str, field: str, value: str) -> None:
    error = refusal(raw=crowded(type, field, value))
    assert (error.code, error.reply_to) == ("invalid_message", "1")
    assert error.message.startswith((f"{field}: holds a number that is not", f"{field}: holds an integer of more than"))


def test_payloads_are_the_fields_that_the_decoder_looks_at() -> None:
    """A payload inside of another field would go unchecked."""
    found = {type: str(typing.get_type_hints(FROM_AGENT[type], include_extras=True)) for type in MESSAGES}
    assert {type: text.count("JsonLimit(bytes_max=None)") for type, text in found.items()} == {
        type: len([field for one, field in PAYLOADS if one == type]) for type in MESSAGES
    }
    assert [(type, name) for type in MESSAGES for name in agenthub.payload_names(FROM_AGENT[type])] == PAYLOADS
    assert {name for _, name in PAYLOADS} == set(agenthub.PAYLOADS.split("|"))


@pytest.mark.parametrize(("type", "field"), PAYLOADS)
def test_payload_of_numbers_is_not_walked(type: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "check_json", None)
    for value in ("1700000000000000000", "0.1234567890123456789", "-1e-10", "1e99"):
        read(None, raw=crowded(type, field, value))


LARGE = st.builds(
    lambda sign, whole, rest, exponent: f"{sign}{whole}{rest}{exponent}",
    st.sampled_from(["", "-"]),
    st.one_of(st.integers(0, 10**25), st.integers(2**63 - 5, 2**64 + 5), st.sampled_from([10**308, 10**309])),
    st.sampled_from(["", ".0", ".123456789012345678901"]),
    st.builds(lambda e, value: f"{e}{value}", st.sampled_from(["e", "E", "e+", "e-", "e0"]), st.integers(0, 500))
    | st.just(""),
)


@settings(max_examples=500, deadline=None)
@given(LARGE)
def test_number_among_many_values_is_taken_if_it_passes_check_json(number: str) -> None:
    try:
        check_json(json.loads(number))
    except ValueError:
        refusal(raw=crowded("delegate", "input", number))
    else:
        read(None, raw=crowded("delegate", "input", number))


TRICKY = st.recursive(
    st.text(st.sampled_from('[]{}"\\a'), max_size=6) | st.integers(0, 9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.sampled_from('[]{}"\\'), max_size=3), inner),
    max_leaves=30,
)


def depth_of(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if items is None else 1 + max(map(depth_of, items), default=0)


@settings(max_examples=500, deadline=None)
@given(TRICKY, st.integers(0, 8))
def test_depth_is_counted_outside_of_strings(value: Any, depth: int) -> None:
    assert agenthub.nests_deeper_than(json.dumps(value).encode(), depth) == (depth_of(value) > depth)


# The texts of rejections


SECRET = "s3cret"


@pytest.mark.parametrize(
    "document",
    [
        {"type": SECRET},
        {"type": [SECRET]},
        {SECRET: SECRET},
        [SECRET],
        SECRET,
        message_of("delegate", id=SECRET * 50),
        message_of("delegate", ttl=SECRET),
        message_of("delegate", wait=SECRET),
        message_of("delegate", priority=SECRET),
        message_of("delegate", agent_id={SECRET: SECRET}),
        message_of("delegate", **{SECRET: 1}, task_id=[SECRET]),
        message_of("register", resume=SECRET * 50),
        message_of("register", capabilities=[{SECRET: SECRET}]),
        message_of("register", capabilities=[{"name": [SECRET]}]),
        message_of("register", metadata={SECRET: SECRET * 1000}),
        message_of("register", capabilities=[{"name": "c", "input_schema": {SECRET: SECRET * 20_000}}]),
        message_of("result", error={SECRET: SECRET}),
        message_of("result", error={"code": SECRET * 50}),
        message_of("status", progress=SECRET),
        message_of("broadcast", message=functools.reduce(lambda inner, _: {SECRET: inner}, range(70), SECRET)),
    ],
)
def test_refusal_never_repeats_what_was_sent(document: Any) -> None:
    error = refusal(document)
    assert SECRET not in error.message
    assert len(error.message) < 200


@pytest.mark.parametrize("raw", [b'{"s3cret": s3cret}', b'{"id": "1", "type": "s3cret", "a": NaN}', b"s3cret"])
def test_refusal_of_what_is_not_json_never_repeats_it(raw: bytes) -> None:
    assert SECRET not in refusal(raw=raw).message


@pytest.mark.parametrize(
    ("raw", "reply_to"),
    [
        (b'{"id": "7"}', "7"),
        (b'{"id": "7", "type": 5}', "7"),
        (b'{"id": "7", "type": "nothing"}', "7"),
        (b'{"id": "7", "type": "register"}', "7"),
        (b'{"id": "7", "type": "heartbeat", "zzz": NaN}', "7"),
        (b'{"id": "7", "type": "delegate", "task_id": "t", "input": 1e999}', "7"),
        (b'{"id": "7", "type": "delegate", "task_id": "t", "input": "\\ud800"}', "7"),
        ('{"id": "\N{SNOWMAN}", "type": 5}'.encode(), "\N{SNOWMAN}"),
        (b'{"id": "' + b"x" * 128 + b'", "type": 5}', "x" * 128),
        (b'{"id": "' + b"x" * 129 + b'", "type": 5}', None),
        (b'{"id": "", "type": 5}', None),
        (b'{"id": 7, "type": "heartbeat"}', None),
        (b'{"id": null, "type": 5}', None),
        (b'{"id": ["7"], "type": 5}', None),
        (b'{"id": "7", "type": "heartbeat"', "7"),
        (b'["id", "7"]', None),
        (b"", None),
    ],
)
def test_reply_to_is_the_id_wherever_one_could_be_read(raw: bytes, reply_to: str | None) -> None:
    assert refusal(raw=raw).reply_to == reply_to


def test_id_with_half_a_surrogate_pair_is_refused_with_an_error_that_can_be_sent() -> None:
    error = refusal(raw=rb'{"id": "\ud800", "type": "heartbeat"}')
    encode(Error(reply_to=error.reply_to, code=error.code, message=error.message))


DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.sampled_from([*MESSAGES, *KINDS]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", *KINDS]) | st.text(), inner),
    max_leaves=10,
)
RAW = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.builds(
        lambda type, fields: json.dumps(message_of(type) | fields).encode(),
        st.sampled_from(MESSAGES),
        st.dictionaries(st.sampled_from([*KINDS, "zzz", "type"]), DOCUMENTS, max_size=3),
    ),
)


@settings(max_examples=300, deadline=None)
@given(RAW)
def test_whatever_comes_in_is_a_message_or_an_error_that_can_be_sent(raw: bytes) -> None:
    try:
        message = decoder_from_agent()(raw)
    except InvalidMessage as error:
        encode(Error(reply_to=error.reply_to, code=error.code, message=error.message))
    else:
        encode(message)


# Encoding, and round trips

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
INTEGERS = st.integers(agenthub.INTEGER_MIN, agenthub.INTEGER_MAX)
NUMBERS_OF_JSON = INTEGERS | st.floats(allow_nan=False, allow_infinity=False)
PAYLOAD = st.recursive(
    st.none() | st.booleans() | NUMBERS_OF_JSON | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


WITHOUT_NUL = TEXTS.filter(lambda text: "\0" not in text)
PAYLOAD_WITHOUT_NUL = PAYLOAD.filter(lambda value: not agenthub.ESCAPED_NUL.search(json.dumps(value)))


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for the values of an annotation, within its limits."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        limit = next((one for one in hint.__metadata__ if isinstance(one, Limit)), Limit())
        return limited(args[0], limit)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(one) for one in args])
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is list:
        return st.lists(values(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(WITHOUT_NUL, WITHOUT_NUL if args[1] is str else PAYLOAD_WITHOUT_NUL, max_size=3)
    if dataclasses.is_dataclass(hint):
        return objects(hint)
    return {
        str: TEXTS,
        int: INTEGERS,
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        Any: PAYLOAD,
        types.NoneType: st.none(),
    }[hint]


def limited(kind: Any, limit: Limit) -> st.SearchStrategy[Any]:
    if kind is str:
        pattern = re.compile(limit.pattern or ".*", re.DOTALL)
        fitting = st.characters(exclude_categories=["Cs"]).filter(lambda one: pattern.fullmatch(one) is not None)
        if limit.pattern == agenthub.ID_PATTERN:
            fitting = st.sampled_from("azAZ09_.:-")
        return st.text(fitting, min_size=limit.min_length or 0, max_size=limit.max_length and 20)
    if kind is int:
        return st.integers(limit.ge, limit.le or agenthub.INTEGER_MAX)  # type: ignore[arg-type]  # these are integers
    if kind is float:
        least = limit.gt if limit.gt is not None else limit.ge
        return st.floats(least, limit.le, exclude_min=limit.gt is not None, allow_infinity=False)
    return values(kind)


def objects(message: Any) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(message, include_extras=True)
    return st.builds(message, **{name: values(hint) for name, hint in hints.items()})


def as_json(message: Any) -> str:
    """Return a representation that distinguishes 1, 1.0 and true."""
    return json.dumps(dataclasses.asdict(parsed(message)))


@pytest.mark.parametrize("message_type", typing.get_args(AgentMessage), ids=lambda one: one.__name__)
def test_agents_message_is_read_as_it_was_written(message_type: Any) -> None:
    @settings(max_examples=60, deadline=None)
    @given(objects(message_type))
    def holds(message: Any) -> None:
        raw = encode(message)
        assert as_json(decoder_from_agent()(raw)) == as_json(message)
        assert json.loads(raw)["type"] == message.type

    holds()


@pytest.mark.parametrize("message_type", typing.get_args(HubMessage), ids=lambda one: one.__name__)
def test_hubs_message_is_read_as_it_was_written(message_type: Any) -> None:
    @settings(max_examples=60, deadline=None)
    @given(objects(message_type))
    def holds(message: Any) -> None:
        assert as_json(decoder_from_hub()(encode(message))) == as_json(message)

    holds()


NULLS = {"a": None, "b": [None, {"c": None}]}


def written(message: Any) -> Any:
    return json.loads(encode(message))


def test_nulls_inside_payloads_survive() -> None:
    assert written(Delegate(task_id="t", input=NULLS))["input"] == NULLS
    assert written(agenthub.Result(task_id="t", success=True, output=NULLS))["output"] == NULLS
    assert written(Register(name="n", metadata=NULLS))["metadata"] == NULLS
    schema = written(Register(name="n", capabilities=[Capability("c", input_schema=NULLS)]))
    assert schema["capabilities"][0]["input_schema"] == NULLS
    assert written(agenthub.StatusReply(output=NULLS, detail=NULLS))["output"] == NULLS


def test_broadcast_of_null_is_a_message_in_both_directions() -> None:
    assert written(Broadcast(message=None))["message"] is None
    assert written(BroadcastDelivery(sender="a", message=None, capability=None))["message"] is None


def test_task_and_result_are_passed_on_with_their_nulls() -> None:
    delegated = agenthub.Delegated(
        task_id="t",
        sender="a",
        agent_id="b",
        capability=None,
        input=None,
        ttl=1.0,
        priority=0,
        max_retries=0,
        parent_id=None,
        attempt=1,
    )
    assert written(delegated).items() >= {"input": None, "capability": None, "parent_id": None}.items()
    settled = agenthub.TaskOutcome(
        task_id="t", sender=None, success=True, state="completed", output=None, error=None, attempt=1
    )
    assert written(settled).items() >= {"output": None, "error": None, "sender": None}.items()


def test_field_that_is_none_is_left_out_of_replies() -> None:
    assert written(Error(code="internal", message="m")) == {"type": "error", "code": "internal", "message": "m"}
    assert written(agenthub.HeartbeatAck(reply_to="1")) == {"type": "heartbeat_ack", "reply_to": "1"}


def test_agent_reads_what_leaves_out_its_nulls() -> None:
    delegated = {"type": "delegate", "task_id": "t", "sender": "s", "agent_id": "a", "ttl": 1.0, "priority": 0}
    delegated |= {"max_retries": 0, "attempt": 1}
    settled = {"type": "result", "task_id": "t", "success": True, "state": "completed", "attempt": 1}
    for message, nulls in ((delegated, ("capability", "input", "parent_id")), (settled, ("sender", "output", "error"))):
        with_nulls = message | dict.fromkeys(nulls)
        read = decoder_from_hub()
        assert read(json.dumps(message).encode()) == read(json.dumps(with_nulls).encode())


def test_acknowledgement_is_read_as_a_report() -> None:
    raw = encode(agenthub.TaskAck(reply_to="1", task_id="t", state="pending", attempt=1))
    assert decoder_from_hub()(raw) == agenthub.StatusReply(reply_to="1", task_id="t", state="pending", attempt=1)


@pytest.mark.parametrize("value", [object(), "\ud800", [type]])
def test_writing_what_is_not_json_is_a_value_error(value: Any) -> None:
    with pytest.raises(ValueError, match="serializ"):
        encode(Delegate(task_id="t", input=value))


# check_json


@given(PAYLOAD)
def test_check_json_gives_back_what_is_json(value: Any) -> None:
    assert check_json(value) is value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_check_json_refuses_numbers_that_are_not_finite(value: float) -> None:
    for holder in (value, [value], {"a": (value,)}):
        with pytest.raises(ValueError, match="not finite"):
            check_json(holder)


@pytest.mark.parametrize("value", [b"x", {1}, object(), 1j, Capability("c")])
def test_check_json_names_the_type_that_is_not_json(value: Any) -> None:
    with pytest.raises(ValueError, match=f"holds a {type(value).__name__}, which is not JSON"):
        check_json({"a": [value]})


@pytest.mark.parametrize("key", [None, 1.5, float("nan"), (1, 2), b"b", TaskState])
def test_check_json_refuses_keys_that_parsers_make_different_texts_of(key: Any) -> None:
    with pytest.raises(ValueError, match="a key that is neither a string nor an integer"):
        check_json({"a": [{"b": 1, key: 2}]})


def test_check_json_takes_keys_that_are_texts_and_whole_numbers() -> None:
    value = {"a": 1, 2: 3, TaskState.PENDING: 4}
    assert check_json(value) is value
    assert written(Delegate(task_id="t", input=value))["input"] == {"a": 1, "2": 3, "pending": 4}


def test_check_json_refuses_what_holds_itself() -> None:
    endless: list[Any] = []
    endless += [endless, endless]
    with pytest.raises(ValueError, match="nested"):
        check_json(endless)


@pytest.mark.parametrize("innermost", [None, 1, 1.5, "x", True])
@pytest.mark.parametrize("around", [lambda inner: [inner], lambda inner: {"a": inner}, lambda inner: (1, inner)])
def test_check_json_counts_brackets(innermost: Any, around: Any) -> None:
    nested = functools.reduce(lambda inner, _: around(inner), range(64), innermost)
    check_json(nested)
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        check_json([nested])


# json_schema


def definitions() -> dict[str, Any]:
    return typing.cast(dict[str, Any], json_schema()["$defs"])


def test_schema_is_json_and_all_its_references_lead_somewhere() -> None:
    def references(node: Any) -> list[str]:
        if isinstance(node, list):
            return [found for item in node for found in references(item)]
        if not isinstance(node, dict):
            return []
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        own += list(node.get("discriminator", {}).get("mapping", {}).values())
        return own + [found for item in node.values() for found in references(item)]

    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    found = references(schema)
    assert found
    assert {one.removeprefix("#/$defs/") for one in found} <= set(schema["$defs"])


def test_schema_has_all_ten_types() -> None:
    found = {one["properties"]["type"]["const"] for one in definitions().values() if "type" in one["properties"]}
    assert found == {*MESSAGES, "heartbeat_ack", "error"}


def test_schema_has_each_message_with_its_required_fields() -> None:
    for message in typing.get_args(AgentMessage):
        definition = definitions()[message.__name__]
        type = definition["properties"]["type"]["const"]
        assert set(definition.get("required", ())) - {"type"} == set(REQUIRED[type])
        assert set(definition["properties"]) == {"type", "id", *REQUIRED[type], *DEFAULTS[type]}


def test_schema_shows_the_limits() -> None:
    fields = definitions()["Delegate"]["properties"]
    assert fields["task_id"].items() >= {"type": "string", "minLength": 1, "maxLength": 128}.items()
    assert fields["ttl"].items() >= {"type": "number", "exclusiveMinimum": 0, "maximum": 604_800}.items()
    assert fields["priority"].items() >= {"type": "integer", "minimum": -100, "maximum": 100}.items()
    assert definitions()["Register"]["properties"]["capabilities"]["maxItems"] == 64
