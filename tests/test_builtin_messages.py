"""Section 2: all codecs accept and reject the same messages, with the same errors, and keep the same payloads.

    python -m tests.test_builtin_messages --examples 1000000 --start 7

compares more documents. They are generated from the annotations of the messages, so a new message or field needs no
change here.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import math
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator
from random import Random
from typing import Annotated, Any, Literal, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import agenthub
from agenthub import (
    AgentMessage,
    Broadcast,
    BroadcastDelivery,
    BuiltinCodec,
    Delegate,
    HubMessage,
    HubOutput,
    InvalidMessage,
    JsonLimit,
    Limit,
    MsgspecCodec,
    PydanticCodec,
    TaskAck,
    TaskAnswer,
    encode,
    json_schema,
    usable_version,
)
from tests.fuzz import KEYS, SMALL, Pairs, change, natural, smaller, text
from tests.support import parsed

EXAMPLES = int(os.environ.get("MESSAGE_EXAMPLES", "20000"))  # In all, of the long run and of this program.
SHORT_EXAMPLES = 4000
UNIONS: dict[str, Any] = {"from an agent": AgentMessage, "from the hub": HubMessage}
DECODERS = {"from an agent": agenthub.decoder_from_agent, "from the hub": agenthub.decoder_from_hub}
CLASSES = typing.get_args(AgentMessage | HubOutput)
SHRINK_S = 10.0  # Time limit for shrinking a document that the codecs read differently.
NOT_JSON = "Invalid JSON"
DIGITS_MAX = 4300  # Of an integer that Python converts.
DESCRIBES_CLASSES = (2, 13)  # The first version whose schemas include the docstrings of dataclasses.


# The codecs that are compared


class Reading(NamedTuple):
    """The message that a codec made of some bytes, or its reason for rejecting them."""

    message: str | None = None  # As repr(), in which 1, 1.0 and True differ, and 0.0 and -0.0.
    code: str = ""
    reply_to: str | None = None
    field: str = ""
    text: str = ""


def with_codec(codec: Any, make: Any) -> Any:
    """Return what one of agenthub's cached functions makes with a codec, past its cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agenthub, "codec", lambda: codec)
        return make.__wrapped__()


@functools.cache
def codecs() -> dict[str, Any]:
    """Return the codecs whose packages are installed, by name."""
    made: list[Any] = [BuiltinCodec()]
    for package, make in {"msgspec": MsgspecCodec, "pydantic": PydanticCodec}.items():
        with contextlib.suppress(ImportError):
            made.append(make(importlib.import_module(package).__version__))
    return {codec.name: codec for codec in made}


@functools.cache
def decoders(direction: str) -> dict[str, Callable[[bytes], Any]]:
    return {name: with_codec(codec, DECODERS[direction]) for name, codec in codecs().items()}


def reading(decode: Callable[[bytes], Any], raw: bytes) -> Reading:
    try:
        return Reading(repr(decode(raw)))
    except InvalidMessage as error:
        return Reading(None, str(error.code), error.reply_to, error.message.partition(": ")[0], error.message)


class Difference(AssertionError):
    """The codecs read the same bytes differently. The text shows the shortest bytes found for which that holds."""

    def __init__(self, direction: str, raw: bytes) -> None:
        raw, readings = smallest(direction, raw)
        lines = [f"{direction}, {raw!r}", *(f"  {name:16}  {found}" for name, found in readings.items())]
        super().__init__("\n".join(lines))


def readings_of(direction: str, raw: bytes) -> dict[str, Reading]:
    return {name: reading(decode, raw) for name, decode in decoders(direction).items()}


def are_alike(readings: dict[str, Reading]) -> bool:
    return len(set(readings.values())) == 1


def smallest(direction: str, raw: bytes) -> tuple[bytes, dict[str, Reading]]:
    """Shrink bytes that the codecs read differently, within SHRINK_S."""
    readings, end = readings_of(direction, raw), time.monotonic() + SHRINK_S
    left = smaller(raw)
    while time.monotonic() < end and (candidate := next(left, None)) is not None:
        found = readings_of(direction, candidate)
        if not are_alike(found):
            raw, readings, left = candidate, found, smaller(candidate)
    return raw, readings


def compare_readings(direction: str, raw: bytes) -> Reading:
    """Raise Difference if the codecs read some bytes differently; return their reading."""
    readings = readings_of(direction, raw)
    if not are_alike(readings):
        raise Difference(direction, raw)
    if readings["built in"].message is not None:
        compare_with_json(decoders(direction)["built in"](raw), raw)
    return readings["built in"]


def compare_with_json(message: Any, raw: bytes) -> None:
    """Assert that a message holds what its JSON holds if all of it is parsed, and its payload as it was written."""
    document = json.loads(raw)
    assert repr(parsed(message)) == repr(agenthub.class_validator(type(message))(document)), raw
    assert message.type == document["type"], raw
    payloads = (getattr(message, name) for name in agenthub.payload_names(type(message)))
    for payload in filter(None, payloads):
        assert payload in raw, raw
        assert payload == payload.strip(), raw
        all_values = json.loads(payload, object_pairs_hook=lambda pairs: [value for _, value in pairs])
        assert agenthub.check_json(all_values) is all_values, raw  # Also of fields that occur again.


# Values of one annotation: valid ones, those at its limits, and those of other types


def characters_of(pattern: str) -> list[str]:
    """Return the characters that a pattern names, and their neighbours."""
    plain = re.sub(r"\\[xu]([0-9a-f]+)", lambda escape: chr(int(escape[1], 16)), pattern)
    codes = {ord(character) + step for character in plain for step in (-1, 0, 1)}
    return [chr(code) for code in sorted(codes) if code >= 0 and not 0xD800 <= code <= 0xDFFF]


def is_json(raw: bytes) -> bool:
    """Return whether Python can parse some bytes and write them again; NaN counts as JSON here."""
    try:
        json.dumps(json.loads(raw), ensure_ascii=False).encode()
    except ValueError:
        return False
    return True


def is_sound(raw: bytes) -> bool:
    """Return whether some JSON is valid in every payload."""
    value = json.loads(raw)
    with contextlib.suppress(ValueError):
        return agenthub.check_json(value) is value and "\0" not in str(value)
    return False


CHARACTERS = characters_of(agenthub.VISIBLE_PATTERN + agenthub.ID_PATTERN)
ASTRAL = "\U0001f600"
LETTERS = ["a", "b-C", "x_0", ".", "a:b"]
WORDS = ["a b", "\xe4", ASTRAL, 'q"uote', "back\\slash", "\\u0000", "\\ud800", "\u4e2d" * 5, "[[{{", "NaN", "/"]
DIGITS = [
    sign + digits
    for count in range(DIGITS_MAX - 1, DIGITS_MAX + 3)
    for sign in ("", "-")
    for digits in (
        *("9" * count, "1" + "0" * (count - 1), "9" * count + ".5", "9" * count + "e1", "9" * count + "E-4300"),
        *("0." + "9" * count, "1." + "0" * count, "0." + "0" * count + "1", "1e" + "0" * count + "1"),
        *("9" * (count - 2) + ".5", "9" * (count - 3) + "e-9", "0." + "9" * (count - 2)),
    )
]
NUMBERS = [
    *("0", "-0", "-0.0", "0.0", "1", "1.0", "1E2", "1e+2", "1e-2", "-1", "0.1", "5e-324", "4e-324", "2e-324", "1e-400"),
    *("1e308", "1e309", "-1e309", "1e400", "1e999", "-1e999", "1.7976931348623157e308", "1.7976931348623159e308"),
    *(str(10**power + more) for power in (15, 22, 308, 309, 400) for more in (-1, 0, 1)),
    *(str(sign * 2**power + more) for power in (31, 53, 63, 64, 1024) for sign in (1, -1) for more in (-1, 0, 1)),
    *("2.2250738585072011e-308", "0.30000000000000004", "9007199254740993.0", "123456789012345678901234567890.5e-10"),
    *("NaN", "Infinity", "-Infinity", "-NaN", "nan", "inf", "+1", "01", "-01", "1.", ".5", "1e", "1e+", "0x1", "1_0"),
    *("-", "\u0661"),
]  # fmt: skip
ESCAPES = [
    *(r"\ud800", r"\udc00", r"\ud83d\ude00", r"\uD83D\uDE00", r"\ude00\ud83d", r"\ud800\ud800", r"\ud83d\u0041"),
    *(r"\ud800\ud83d\ude00", r"\ud83d\ude00\ude00", r"\\ud800", r"\\\ud800", r"\\\\ud800", r"\\\\\udfff"),
    *(r"\\\ud83d\ude00", r"\u", r"\'"),
    *(r"\ud83d\\ude00", r"\ud83dx\ude00", r"\ud83d\n\ude00", r"\ud8", r"\ud83d\ud", r"\ud83d\u", r"\ud83d", r"\u00e4"),
    *(r"\udbff\udfff", r"\udc00\udc00", r"\ud7ff", r"\ue000", r"\uDFFF", r"\uffff", r"\u0000", r"\\u0000", r"\\\u0000"),
    *(r"\"", r"\\", r"\/", r"\b\f\n\r\t", r"\x41", r"\U0001f600", r"\u+041", r"\u 041", r"\u00_1", r"\u12"),
]  # fmt: skip
STRINGS = [
    *(f'"{before}{one}{after}"'.encode() for one in ESCAPES for before in ("", "a") for after in ("", "\\\\", "b")),
    *(b'"a%cb"' % code for code in (*range(33), 127, 128, 159, 192, 237, 255)),
    *(b'"%s"' % bad for bad in (b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xf0\x9f\x98", b"\xed\xb0\x80")),
    *(text(one) for one in ["", *WORDS, *CHARACTERS]),
]  # fmt: skip
OTHERS = [b"null", b"true", b"false", b"[]", b"{}", b'""', b"[null]", b"[[]]"]
ODD = [one.encode() for one in NUMBERS] + STRINGS + OTHERS
PLAIN = [one for one in ODD if is_json(one)]
SOUND = [one for one in PLAIN if is_sound(one)]
BROKEN = [one for one in ODD if not is_json(one)]
DEPTHS = [
    *(1, 2, 30),
    *range(59, 72),
    *range(126, 131),
    *range(192, 205),  # About where Pydantic's parser stops.
    *(260, 1100, 3000),
]
SPACES = [b""] * 12 + [b" ", b"\n\t", b"\r", b"\r\n ", b"\x0b", b"\x0c", b"\0", b"\xc2\xa0", "\u2028".encode()]


@functools.cache
def limits_of_text(limit: Limit) -> list[bytes]:
    """Return texts just inside and just outside of some limits, of characters of one to four bytes."""
    lengths = {limit.min_length or 0, limit.max_length or 0} if limit.max_length else {0, 1}
    counts = sorted({length + more for length in lengths for more in (-1, 0, 1)} - {-1})
    whole = [character * count for count in counts for character in ("x", "\xe4", ASTRAL, "\0")]
    whole += ["x" * (count - 1) + last for count in counts for last in (ASTRAL, "\n", "\0", " ")]
    return [form for one in whole for form in (text(one), json_of(one))]


@functools.cache
def limits_of_number(limit: Limit) -> list[bytes]:
    """Return numbers just inside and just outside of some limits, in several notations."""
    bounds = [bound for bound in (limit.gt, limit.ge, limit.le) if bound is not None]
    near = [number for bound in bounds for number in (bound - 1, bound, bound + 1, -bound)]
    near += [math.nextafter(bound, way) for bound in bounds for way in (-math.inf, math.inf)]
    return [form.encode() for one in near for form in (f"{one}", f"{float(one)}", f"{one:e}", f'"{one}"', f"{one}e0")]


def json_of(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def union_of(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()


@functools.cache
def fields_of(made: type) -> list[tuple[str, Any, bool]]:
    """Return the name, the annotation and whether it may be left out, of each field of a class."""
    hints = typing.get_type_hints(made, include_extras=True)
    fields = made.__dataclass_fields__.values()  # type: ignore[attr-defined]
    return [(one.name, hints[one.name], agenthub.has_default(one)) for one in fields]


FIELDS = sorted({name for union in UNIONS.values() for one in typing.get_args(union) for name, _, _ in fields_of(one)})
TYPES = sorted({agenthub.type_of(one) for union in UNIONS.values() for one in typing.get_args(union)})


class Writer:
    """Makes documents as trees: bytes are a literal value, a list is an array, Pairs are an object.

    `odds` is how many values there are to one that may be wrong; 0 is for none.
    """

    def __init__(self, rng: Random, odds: int = 0) -> None:
        self.rng, self.odds = rng, odds

    def message(self, union: Any) -> Pairs:
        return self.object(self.rng.choice(typing.get_args(union)))

    def object(self, made: type) -> Pairs:
        pairs = Pairs()
        for name, annotation, is_optional in fields_of(made):
            if name == "type" or not is_optional or self.rng.randrange(2):
                pairs.append([text(name), self.value(annotation)])
        if self.odds and not self.rng.randrange(2 * self.odds):
            pairs.insert(self.rng.randint(0, len(pairs)), [self.key(), self.anything()])
        return pairs

    def odd_one(self) -> bytes:
        return self.rng.choice(PLAIN if self.rng.randrange(12) else BROKEN)

    def key(self) -> bytes:
        kind = self.rng.randrange(4)
        if kind == 0:
            return self.rng.choice(KEYS)
        return self.odd_one() if kind == 1 else text(self.rng.choice(FIELDS))

    def value(self, annotation: Any) -> Any:
        if self.odds and not self.rng.randrange(self.odds):
            return self.odd(annotation)
        return self.good(annotation)

    def good(self, annotation: Any, limit: Any = None) -> Any:
        kind, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
        if union_of(annotation):
            return self.value(self.rng.choice(arguments))
        if kind is Annotated:
            return self.good(*arguments)
        if kind is Literal:
            return text(self.rng.choice(arguments))
        if kind is list:
            return [self.value(arguments[0]) for _ in range(self.rng.randrange(4))]
        if kind is dict:
            return Pairs([self.word(), self.value(arguments[1])] for _ in range(self.rng.randrange(3)))
        if kind in (types.NoneType, bool):
            return b"null" if kind is types.NoneType else self.rng.choice([b"true", b"false"])
        if kind in (int, float):
            return self.number(limit or Limit(), kind)
        if kind is str:
            return text(self.rng.choice(LETTERS)) if limit and limit.pattern == agenthub.ID_PATTERN else self.word()
        return self.anything() if kind is Any else self.object(kind)

    def odd(self, annotation: Any) -> Any:
        """Return a value at the limits of an annotation, or one of another type."""
        branch = self.rng.choice(union_of(annotation) or (annotation,))
        kind, *marks = typing.get_args(branch) if typing.get_origin(branch) is Annotated else (branch,)
        chance = self.rng.randrange(5)
        limit = marks[0] if marks and isinstance(marks[0], Limit) else Limit()
        if typing.get_origin(kind) is Literal and chance < 4:
            return text(self.rng.choice(TYPES))
        if kind is str and chance < 3:
            return self.rng.choice(limits_of_text(limit) if chance else PLAIN)
        if kind in (int, float) and chance < 4:
            return self.rng.choice([limits_of_number(limit) or [b"0"], [one.encode() for one in NUMBERS]][chance % 2])
        if typing.get_origin(kind) is list and chance < 2:
            count = self.rng.choice([1, 63, 64, 65])
            return [self.good(*typing.get_args(kind)) if chance else self.odd_one()] * count
        if marks and isinstance(marks[0], JsonLimit) and marks[0].bytes_max and chance < 2:
            return self.sized(marks[0].bytes_max + self.rng.randint(-2, 2))
        if chance == 4 and not self.rng.randrange(4):
            return self.rng.choice(DIGITS).encode()
        return self.rng.choice([self.anything, self.odd_one, lambda: self.rng.choice(SMALL)])()

    def sized(self, length: int) -> Pairs:
        """Return an object of so many bytes, as json.dumps writes it."""
        filler = self.rng.choice(["x", "\xe4", ASTRAL])
        return Pairs([[b'"k"', json_of(filler * ((length - len('{"k": ""}')) // (len(text(filler)) - 2)))]])

    def word(self) -> bytes:
        return self.rng.choice([text, json_of])(self.rng.choice(LETTERS if self.rng.randrange(3) else WORDS))

    def number(self, limit: Limit, kind: type) -> bytes:
        low = limit.ge if limit.ge is not None else limit.gt if limit.gt is not None else -5
        high = limit.le if limit.le is not None else low + 10
        whole = self.rng.randint(int(low) + (limit.gt is not None and high > 1), int(high))
        return f"{whole}".encode() if kind is int or self.rng.randrange(2) else b"%d.0" % whole

    def anything(self, depth: int = 3) -> Any:
        kind = self.rng.randrange(9 if depth else 6)
        if kind < 4:
            return self.rng.choice(SOUND)
        if kind < 6:
            return self.odd_one() if self.odds and not self.rng.randrange(self.odds) else self.word()
        if kind == 6:
            return [self.anything(depth - 1) for _ in range(self.rng.randrange(4))]
        return Pairs([self.word(), self.anything(depth - 1)] for _ in range(self.rng.randrange(3)))


def written(tree: Any, space: bytes = b"") -> bytes:
    """Return a tree as JSON, with `space` wherever JSON allows some."""
    comma, colon = space + b"," + space, space + b":" + space
    if isinstance(tree, Pairs):
        return b"{" + space + comma.join(key + colon + written(value, space) for key, value in tree) + space + b"}"
    if isinstance(tree, list):
        return b"[" + space + comma.join(written(item, space) for item in tree) + space + b"]"
    return bytes(tree)


# Families of documents


def valid(rng: Random, union: Any) -> bytes:
    """Return a valid message."""
    tree = Writer(rng).message(union)
    if rng.randrange(2):
        rng.shuffle(tree)
    return written(tree)


def wrong(rng: Random, union: Any) -> bytes:
    """Return a message with wrong values, and with unknown, missing or repeated fields."""
    tree = Writer(rng, odds=rng.choice([4, 10, 20])).message(union)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
        change(rng, tree, PLAIN)
    return written(tree, rng.choice(SPACES))


def deep(rng: Random, union: Any) -> bytes:
    """Return a message with a value that is nested about as deep as the limits."""
    tree, writer = Writer(rng).message(union), Writer(rng, odds=10)
    nested = nest(rng, rng.choice([writer.anything(), rng.choice(PLAIN), b"1", []]))
    if not rng.randrange(12):
        return nested
    place = rng.randrange(len(tree) + 2)
    if place < len(tree):
        tree[place][1] = nested
    else:
        tree.insert(rng.randint(0, len(tree)), [writer.key(), nested])
    if not rng.randrange(3):
        change(rng, tree, PLAIN)
    return nest(rng, tree) if not rng.randrange(12) else written(tree)


def nest(rng: Random, inner: Any) -> bytes:
    """Return a tree inside of nested arrays and objects, sometimes without its last bracket."""
    rounds = [(b"[", b"]"), (b'{"a":', b"}"), (b'[1,"]",', b',"["]'), (b'{"\\\\":"{[",  "\\"":', b',"x":"\\"]"}')]
    depth = rng.choice(DEPTHS)
    kinds = [rng.choice(rounds) for _ in range(rng.randint(1, 3))]
    chosen = list(itertools.islice(itertools.cycle(kinds), depth))
    after = b"".join(closing for _, closing in reversed(chosen))
    return b"".join(opening for opening, _ in chosen) + written(inner) + after[: rng.choice([None] * 9 + [-1])]


MISPLACED = [
    *BROKEN,
    *STRINGS,
    *(one.encode() for one in NUMBERS if len(one) > 15),
    *(b"NaN", b"Infinity", b"-Infinity", b'"NaN"', b'{"NaN":Infinity}', b"[-Infinity]"),
    *(sign + b"9" * count for count in (19, 20, 21, 600, DIGITS_MAX, DIGITS_MAX + 1) for sign in (b"", b"-")),
    *(b"1e" + b"9" * count for count in (2, 3, 4, 20, 600, 5000)),
    *(b"1e-" + b"0" * count + b"9" for count in (1, 2, 600)),
    *(b"\xef\xbb\xbf1", b'"\xef\xbb\xbf"', b'{"\x7f":"\x1f"}', b'{"\xff":1}', b'{"\\ud800":1}', b'{"a":1,"a":NaN}'),
    *(b"1.0", b"-0.0", b"1e0", b"10e-1", b"true", b"false", b'"1"', b"null", b'{"a":1,"a":2}'),
]  # fmt: skip
PAYLOADS_OF = {"delegate": b'"input"', "result": b'"output"', "status": b'"detail"', "broadcast": b'"message"'}
GAPS = [b"", b"", b" ", b"\n", b"\t", b"\r", b" \r\n\t "]


def misplaced(rng: Random, union: Any) -> bytes:
    """Return a message with values that parsers may differ about: in its payload, or in a field that it does not have.

    Fields, also `type` and the payload, occur several times; some of their names are written with escapes.
    """
    tree, writer = Writer(rng).message(union), Writer(rng, odds=rng.choice([0, 0, 20]))
    payload_keys = list(PAYLOADS_OF.values())

    def insert(key: bytes, value: Any) -> None:
        tree.insert(rng.randint(0, len(tree)), [key, value])

    for _ in range(rng.choice([0, 1, 1, 2])):
        odd: Any = rng.choice(MISPLACED) if rng.randrange(4) else nest(rng, b"1")
        for _ in range(rng.randrange(3)):
            twice = rng.sample([[b'"a"', odd], [b'"a"', b"0"]], 2)
            odd = rng.choice([[odd], [b"1", odd, b"[]"], Pairs([[writer.word(), b"0"], [b'""', odd]]), Pairs(twice)])
        keys = [b'"unknown"', text(rng.choice(FIELDS)), *(key for key, _ in tree), *payload_keys, writer.key()]
        insert(key := rng.choice(keys), odd)
        if rng.randrange(2):
            insert(key, writer.anything())
    if not rng.randrange(2):
        insert(b'"type"', text(rng.choice(list(PAYLOADS_OF) if rng.randrange(4) else TYPES)))
    if not rng.randrange(4):  # So that it is small, or not, without its payload.
        filler = rng.choice([text("x" * rng.randint(900, 1200)), b"[%b1]" % (b"1," * 600), text("\xe4" * 200)])
        insert(rng.choice([b'"unknown"', *payload_keys]), filler)
    if not rng.randrange(3):
        rng.shuffle(tree)
    if not rng.randrange(3):
        tree[:] = [[key if rng.randrange(4) else with_escapes(rng, key), value] for key, value in tree]
    return spaced(rng, tree) if rng.randrange(2) else written(tree)


def with_escapes(rng: Random, key: bytes) -> bytes:
    """Return the same key with some of its letters written as escapes."""
    return re.sub(rb"[a-z]", lambda one: one[0] if rng.randrange(3) else b"\\u%04x" % ord(one[0]), key)


def spaced(rng: Random, tree: Any) -> bytes:
    """Return a tree as JSON, with spaces of all kinds in some of the places where JSON allows them."""

    def gap() -> bytes:
        return rng.choice(GAPS)

    if isinstance(tree, Pairs):
        members = [gap() + key + gap() + b":" + spaced(rng, value) for key, value in tree]
        return gap() + b"{" + b",".join(members) + b"}" + gap()
    if isinstance(tree, list):
        return gap() + b"[" + b",".join(spaced(rng, item) for item in tree) + b"]" + gap()
    return gap() + bytes(tree) + gap()


SPLINTERS = [
    *(b"", b" ", b"\n", b"\0", b'"', b"\\", b",", b"}", b"]", b"{", b"[", b":", b"-", b"0", b"e", b"\xff", b"\x80"),
    *(b"\xef\xbb\xbf", b"\\u", b"\\ud800", b"//", b"/**/", b"NaN", b"x", b"'", b"\xe2\x80\xa8", b",,", b"\x1f"),
    *(b"\\u0000", b"\x7f"),
]  # fmt: skip


def damaged(rng: Random, union: Any) -> bytes:
    """Return a message with changed, lost or added bytes, or bytes that never were a message."""
    if not rng.randrange(10):
        return rng.choice([rng.choice(PLAIN), rng.choice(SMALL), written(Writer(rng, odds=5).anything()), b" "])
    raw = written(Writer(rng, odds=40).message(union), rng.choice(SPACES))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.randint(0, len(raw))
        how = rng.randrange(10)
        if how < 2:
            raw = raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :] if at < len(raw) else raw
        elif how < 4:
            raw = raw[:at] + raw[at + rng.randint(1, 3) :]
        elif how < 6:
            raw = raw[:at] + rng.choice(SPLINTERS) + raw[at:]
        elif how == 6:
            raw = raw[:at]
        elif how == 7:
            raw = rng.choice(SPLINTERS) + raw + rng.choice(SPLINTERS)
        elif how == 8:
            raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at:]
        else:
            raw = rng.choice([raw + raw, raw.decode("latin-1").encode("utf-16"), raw.replace(b'"', b"'"), raw.upper()])
    return raw


FAMILIES: dict[str, Callable[[Random, Any], bytes]] = {
    "valid": valid,
    "wrong": wrong,
    "deep": deep,
    "damaged": damaged,
    "misplaced": misplaced,
}
# Each example is a seed, because drawing every choice takes three times as long. Difference shrinks what fails.
PLAIN_CHANCE = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
SHARES = {"valid": 0.1, "wrong": 0.3, "deep": 0.1, "damaged": 0.2, "misplaced": 0.3}


# Reading


@pytest.mark.parametrize("examples", [SHORT_EXAMPLES, pytest.param(EXAMPLES, marks=pytest.mark.long)])
@pytest.mark.parametrize("direction", UNIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_codecs_read_and_refuse_alike(family: str, direction: str, examples: int) -> None:
    decoders(direction)

    @settings(PLAIN_CHANCE, max_examples=round(examples * SHARES[family] / len(UNIONS)))
    @given(st.randoms(use_true_random=True))
    def holds(rng: Random) -> None:
        compare_readings(direction, FAMILIES[family](rng, UNIONS[direction]))

    holds()


@functools.cache
def places(direction: str) -> list[tuple[bytes, Any]]:
    """Return messages with an @ for a value, and its annotation: a field of each kind, an unknown one, a key, all."""
    found: dict[str, tuple[bytes, Any]] = {}
    for made in typing.get_args(UNIONS[direction]):
        fields = [[text(name), Writer(Random(name)).good(annotation)] for name, annotation, _ in fields_of(made)]
        for index, (name, annotation, _) in enumerate(fields_of(made)):
            field = [text(name), b"@"]
            found.setdefault(
                str(annotation), (written(Pairs([*fields[:index], field, *fields[index + 1 :]])), annotation)
            )
    smallest = b'{"type":"%s",' % agenthub.type_of(typing.get_args(UNIONS[direction])[-1]).encode()
    return [*found.values(), (smallest + b'"unknown":@}', Any), (smallest + b"@:1}", Any), (b"@", Any)]


def limits_in(annotation: Any) -> Iterator[Limit]:
    if isinstance(annotation, Limit):
        yield annotation
    for part in typing.get_args(annotation):
        yield from limits_in(part)


@pytest.mark.long
@pytest.mark.parametrize("direction", UNIONS)
def test_each_odd_value_is_read_alike_in_a_field_of_each_kind(direction: str) -> None:
    for place, _ in places(direction):
        for value in [*ODD, *(one.encode() for one in DIGITS), *SMALL]:
            compare_readings(direction, place.replace(b"@", value))


@pytest.mark.parametrize("direction", UNIONS)
def test_values_at_the_limits_are_read_alike_in_a_field_of_each_kind(direction: str) -> None:
    for place, annotation in places(direction):
        for limit in limits_in(annotation):
            for value in limits_of_number(limit) + limits_of_text(limit):
                compare_readings(direction, place.replace(b"@", value))


CAPABILITIES = [
    *(
        "5",
        "[]",
        "{}",
        '"a"',
        "[5]",
        '[{"name":5}]',
        '[5,{"name":5}]',
        '["a",{}]',
        '[{"name":"a","input_schema":null}]',
    ),
    *('[{"name":"a","description":5,"input_schema":5}]', '[{"name":"a","input_schema":{"a":"\\u0000"}}]'),
    *('[{"name":"","x":1},""]', '["a",["a"],null,true]', '[{"name":"a","name":5}]', '[{"name":5,"name":"a"}]'),
    *(json.dumps([one] * count) for one in (5, "a", {"name": "a"}) for count in (63, 64, 65, 100)),
    *(json.dumps(["a"] * count + [5]) for count in (63, 64, 65)),
]
ERRORS = [
    *(
        '"a"',
        "null",
        "{}",
        "5",
        "[]",
        '{"code":5}',
        '{"code":"a","message":"b"}',
        '{"code":"a","message":5}',
        '"\\u0000"',
    ),
    *('{"code":""}', '{"code":"\\u202e","message":5}', '{"message":"b"}', "[[]]", "true", '{"code":{"code":"a"}}'),
]


def of_type(type: str, fields: str) -> str:
    return f'{{"type":"{type}",{fields}}}'


PROBES = [
    *("", " ", "5", "null", "[]", '"x"', "{}", "\0", "\ufeff", "{", "[", '"', '{"type"', '{"type":"heartbeat"', "{}{}"),
    *(f'{{"type":{one}}}' for one in ("5", "null", '["heartbeat"]', '"x"', '"h\xebartbeat"', '""', "{}")),
    *('{"type":"heartbeat","type":"x"}', '{"type":"x","type":"heartbeat"}', '{"type":"heartbeat","type":"deregister"}'),
    *('{"type":"heartbeat","id":5,"id":"a"}', '{"type":"heartbeat","id":"b","id":5}', '{"typ\\u0065":"heartbeat"}'),
    *('{"type":"heartbeat","\\udc00":1}', '{"type":"heartbeat","\\udc00":1,"id":"a"}', '{"TYPE":"heartbeat"}'),
    *(of_type("heartbeat", f'"id":"{"x" * length}"') for length in (0, 127, 128, 129, 200)),
    *(of_type("heartbeat", f'"x":{"[" * depth}{one}{"]" * depth}')
      for depth in range(197, 203) for one in ("", "1", "[ \n]", "[]", "{}", '"[]"', "[}", "{ 1 }")),
    *(of_type("heartbeat", '"x":' + '{"a":' * depth + "{}" + "}" * depth) for depth in range(197, 203)),
    *(of_type("heartbeat", '"x":' + '["[]",' * depth + '"{}"' + "]" * depth) for depth in range(197, 203)),
    *(of_type("delegate", '"task_id":"a","input":' + "[" * depth + "]" * depth) for depth in range(62, 68)),
    *(of_type("broadcast", '"message":' + "[" * depth + "]" * depth) for depth in range(62, 74)),
    *(of_type("delegate", fields) for fields in ('"task_id":5', '"task_id":"a\\n"', '"x":1')),
    *(of_type("delegate", f'"task_id":"a","{field}":{one}') for field in ("ttl", "priority") for one in NUMBERS),
    *('{"type":"broadcast","message":null}', of_type("delegate", '"task_id":"a b","ttl":true,"priority":1.0')),
    *(of_type("register", f'"name":"a","capabilities":{one}') for one in CAPABILITIES),
    *(of_type("result", f'"task_id":"a","success":false,"error":{one}') for one in ERRORS),
    *(of_type("register", fields) for fields in ('"name":5,"metadata":5', '"name":"a","metadata":{"a":1e999}')),
    *(of_type("register", f'"name":"a","metadata":{one}') for one in ("[]", '{"a":NaN}', '{"a":"\\u0000"}', "null")),
    *('{"type":"status","tasks":1}', '{"type":"status","tasks":"true"}', '{"type":"status","progress":2}'),
    *('{"type":"status","tasks":[{"task_id":5},{}]}', '{"type":"discover","agents":[{"capabilities":[5]}],"total":1}'),
    *(' {"type":"heartbeat"} \n\t\r', '\ufeff{"type":"heartbeat"}', '{"type":"heartbeat"}x', '{"type":"heartbeat",}'),
    *("{'type':'heartbeat'}", '{"type":"heartbeat"}\0', '{"type":"heartbeat" "id":"a"}', '{"type":"heartbeat"]'),
]  # fmt: skip


@pytest.mark.parametrize("raw", PROBES, ids=range(len(PROBES)))
def test_what_is_known_to_be_delicate_is_read_alike(raw: str) -> None:
    for direction in UNIONS:
        compare_readings(direction, raw.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("direction", UNIONS)
def test_the_families_are_read_and_refused_in_fair_shares(direction: str) -> None:
    """Comparing only syntax errors, or only valid messages, would find nothing."""
    found: collections.Counter[str] = collections.Counter()
    decode = with_codec(BuiltinCodec(), DECODERS[direction])
    for family, seed in itertools.product(FAMILIES, range(300)):
        outcome = reading(decode, FAMILIES[family](Random(seed), UNIONS[direction]))
        found[f"{family} {'read' if outcome.message else 'not JSON' if outcome.field == NOT_JSON else 'refused'}"] += 1
    assert found["valid read"] == 300
    shares = itertools.product(("wrong", "deep", "damaged", "misplaced"), ("read", "refused", "not JSON"))
    assert all(5 <= found[f"{family} {what}"] < 280 for family, what in shares)


# Writing


def objects(made: type, rng: Random) -> Any:
    """Return a message of a class."""
    return agenthub.class_validator(made)(json.loads(written(Writer(rng).object(made))))


@pytest.mark.parametrize("made", CLASSES, ids=lambda made: made.__name__)
def test_all_codecs_read_what_was_written(made: Any) -> None:
    direction = "from an agent" if made in typing.get_args(AgentMessage) else "from the hub"

    @settings(PLAIN_CHANCE, max_examples=60)
    @given(st.randoms(use_true_random=True))
    def holds(rng: Random) -> None:
        message = objects(made, rng)
        raw = encode(message)
        compare_readings(direction, raw)
        if made not in (TaskAck, TaskAnswer, BroadcastDelivery):  # These are read as others.
            assert repr(parsed(DECODERS[direction]()(raw))) == repr(message)

    holds()


@pytest.mark.parametrize("ttl", [5, 5.0, 0.1, 1e-7, 1e22, 604_800])
def test_numbers_are_written_as_they_are(ttl: float) -> None:
    written_ttl = json.loads(encode(Delegate(task_id="t", ttl=ttl)))["ttl"]
    assert (written_ttl, type(written_ttl)) == (ttl, type(ttl))


UNWRITABLE: dict[str, Any] = {
    "an object": object(),
    "an object inside": {"a": [1, object()]},
    "a class": dict,
    "half a surrogate pair": "\ud800",
    "half a surrogate pair as a key": {"\udfff": 1},
    "bytes that are no text": b"\xff",
    "itself": (loop := []) or loop.append(loop) or loop,
    "more than the stack holds": functools.reduce(lambda inner, _: [inner], range(100_000), None),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_what_is_no_json_is_not_written(name: str) -> None:
    with pytest.raises(ValueError, match="serializ"):
        encode(Broadcast(message=UNWRITABLE[name]))


# The schema


def test_schema_is_the_one_that_pydantic_makes() -> None:
    pydantic = pytest.importorskip("pydantic")
    discriminator = pydantic.Field(discriminator="type")
    adapters = {name: pydantic.TypeAdapter(Annotated[union, discriminator]) for name, union in UNIONS.items()}
    references, definitions = pydantic.TypeAdapter.json_schemas(
        [(name, "validation", adapter) for name, adapter in adapters.items()]
    )
    expected = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"AgentHub protocol {agenthub.PROTOCOL_VERSION}",
        "anyOf": [
            {"title": "from an agent to the hub", **references["from an agent", "validation"]},
            {"title": "from the hub to an agent", **references["from the hub", "validation"]},
        ],
        **definitions,
    }
    schema = json_schema()
    if tuple(int(number) for number in re.findall(r"\d+", pydantic.__version__)[:2]) < DESCRIBES_CLASSES:
        for definition in schema["$defs"].values():
            definition.pop("description", None)
    assert json.dumps(schema, indent=1).splitlines() == json.dumps(expected, indent=1).splitlines()


# The choice of the codec


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Install a package of version 2.11.3 during a test."""
    module = types.ModuleType("package_of_this_test")
    module.__version__ = "2.11.3"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv("AGENTHUB_BUILTIN", raising=False)
    return module


@pytest.mark.parametrize(
    "version", ["2.11", "2.11.0", "2.11.3", "2.12", "2.100.1", "3.0", "10.0", "2.11b1", "3.0a1.dev0"]
)
def test_package_that_is_new_enough_is_used(version: str, package: Any) -> None:
    package.__version__ = version
    assert usable_version(package.__name__, oldest=(2, 11)) == version


@pytest.mark.parametrize("version", ["2.10", "2.10.99", "2.9.3", "2", "1.99", "0.0.11", "", "unknown", None])
def test_package_that_is_too_old_or_of_no_known_version_is_not_used(version: Any, package: Any) -> None:
    package.__version__ = version
    assert usable_version(package.__name__, oldest=(2, 11)) is None


def test_package_without_a_version_is_not_used(package: Any) -> None:
    del package.__version__  # As an empty folder of that name has none.
    assert usable_version(package.__name__, oldest=(0, 0)) is None


def test_package_that_is_missing_is_not_used(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_version("no_package_is_called_this", oldest=(0, 0)) is None
    monkeypatch.setitem(sys.modules, package.__name__, None)
    assert usable_version(package.__name__, oldest=(0, 0)) is None


@pytest.mark.parametrize(("value", "is_used"), [("1", False), ("yes", False), ("0", True), ("", True)])
def test_environment_can_forbid_packages(
    value: str, is_used: bool, package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTHUB_BUILTIN", value)
    assert usable_version(package.__name__, oldest=(2, 11)) == (package.__version__ if is_used else None)


def test_codec_is_built_in_where_the_packages_are_missing_too_old_or_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    make = agenthub.codec.__wrapped__
    monkeypatch.delenv("AGENTHUB_BUILTIN", raising=False)
    monkeypatch.setitem(sys.modules, "msgspec", types.SimpleNamespace(__version__="0.18.6"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pydantic", None)
        assert make().name == "built in"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pydantic", types.SimpleNamespace(__version__="2.10.6"))
        assert make().name == "built in"
    with monkeypatch.context() as patch:
        patch.setenv("AGENTHUB_BUILTIN", "1")
        assert make().name == "built in"


def test_package_that_is_broken_is_not_used_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(name: str) -> Any:
        raise SystemError("the other half is of another version")

    monkeypatch.delenv("AGENTHUB_BUILTIN", raising=False)
    monkeypatch.setattr(agenthub.importlib, "import_module", broken)
    assert usable_version("pydantic", oldest=(2, 11)) is None
    text = "pydantic is installed but broken, so the built-in parts are used; reinstall it: "
    assert caplog.messages == [text + "the other half is of another version"]


def test_object_of_a_class_of_ones_own_is_no_payload() -> None:
    """Nobody knows whether its None is a null or a missing field."""
    with pytest.raises(ValueError, match="Reading is not JSON"):
        encode(Broadcast(message=dataclasses.make_dataclass("Reading", ["text"])("x")))


def test_codec_is_the_fastest_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    msgspec, pydantic = pytest.importorskip("msgspec"), pytest.importorskip("pydantic")
    monkeypatch.delenv("AGENTHUB_BUILTIN", raising=False)
    assert agenthub.codec.__wrapped__().name == f"msgspec {msgspec.__version__}"
    monkeypatch.setitem(sys.modules, "msgspec", None)
    assert agenthub.codec.__wrapped__().name == f"pydantic {pydantic.__version__}"


# Payloads

PAYLOADS = [
    *(b'"x"', b"[1, 2]", b'{"a":1,"a":2}', b"1E2", b"1.0", b"-0", b"18446744073709551615", b'"\\u00e4\\/"', b"[ ]"),
    *(b'{"input":null,"type":"x","output":{"message":[]}}', b'"\\"}"', "\"\N{SNOWMAN}\"".encode(), b"false", b"{\n}"),
]  # fmt: skip
SHAPES = [
    b'{"type":"delegate","task_id":"t","input":%s}',
    b'{"input":%s,"task_id":"t","type":"delegate"}',
    b' { "type" : "delegate" ,\n"x":[{}], "input" :\t%s , "task_id":"t" } ',
    rb'{"type":"delegate","in\u0070ut":%s,"task_id":"t"}',
    b'{"type":"delegate","task_id":"t","input":1,"input":%s}',
    rb'{"type":"delegate","input":[],"task_id":"t","in\u0070ut":%s}',
    b'{"type":"x","type":"delegate","task_id":"t","input":%s}',
    b'{"type":"delegate","output":1,"input":%s,"task_id":"t","detail":{}}',
]


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_payload_is_kept_as_it_came(shape: bytes) -> None:
    for payload in PAYLOADS:
        for name, decode in decoders("from an agent").items():
            assert decode(shape % payload).input == payload, name
    for name, decode in decoders("from an agent").items():
        assert decode(shape % b" null ").input is None, name


def test_payload_that_is_null_at_its_last_occurrence_is_none() -> None:
    for name in (b"input", rb"in\u0070ut"):
        raw = b'{"type":"delegate","task_id":"t","input":1,"%s":null}' % name
        assert {decode(raw).input for decode in decoders("from an agent").values()} == {None}


@pytest.mark.parametrize(
    "odd", [b"18446744073709551616", b"1e999", b"NaN", b"[" * 64 + b"]" * 64, b'"\\udc00"', b'"\xff"']
)
def test_value_that_is_refused_in_a_payload_is_refused_where_its_field_occurs_again(odd: bytes) -> None:
    def refusals(payload: bytes) -> set[str]:
        raw = b'{"type":"delegate","task_id":"t","input":[%s]}' % payload
        return {re.sub(r"[0-9]+", "0", reading(decode, raw).text) for decode in decoders("from an agent").values()}

    once = refusals(b'{"a":%s}' % odd)
    assert len(once) == 1
    assert "" not in once
    assert refusals(b'{"a":%s,"a":1}' % odd) == refusals(b'{"a":%s,"\\u0061":1}' % odd) == once


def test_payload_has_the_same_value_with_all_codecs() -> None:
    def compare(payload: bytes) -> None:
        assert {repr(codec.loads(payload)) for codec in codecs().values()} == {repr(json.loads(payload))}, payload

    @settings(PLAIN_CHANCE, max_examples=1000)
    @given(st.randoms(use_true_random=True))
    def holds(rng: Random) -> None:
        compare(spaced(rng, Writer(rng).anything()))

    numbers = [one.encode() for one in DIGITS]
    for payload in [*SOUND, *(one for one in numbers if is_json(one) and is_sound(one))]:
        compare(payload)
    holds()


# On request


def main(argv: list[str] | None = None) -> int:
    """Compare as many documents as the command line asks for; return 1 if the codecs read one differently."""
    parser = argparse.ArgumentParser(prog="python -m tests.test_builtin_messages", description="Compare the codecs.")
    parser.add_argument("--examples", type=natural, default=EXAMPLES, metavar="N", help=f"(default {EXAMPLES})")
    parser.add_argument("--start", type=natural, default=0, metavar="N", help="the first of the seeds (default 0)")
    args = parser.parse_args(argv)
    families = list(FAMILIES)
    started = time.monotonic()
    for seed in range(args.start, args.start + args.examples):
        rng = Random(seed)
        family = rng.choices(families, [SHARES[one] for one in families])[0]
        direction = rng.choice(list(UNIONS))
        raw = FAMILIES[family](rng, UNIONS[direction])
        try:
            compare_readings(direction, raw)
        except Difference as difference:
            print(f"seed {seed}, {family}, {difference}")
            return 1
    rate = args.examples / (time.monotonic() - started)
    print(f"{args.examples} examples, {rate:.0f} per second, nothing found", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
