"""Run the fuzzer briefly, and replay every case that ever found a bug.

    python -m tests.fuzz --seconds 600

runs it longer. Add its findings to FOUND, with a description of the bug.
"""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import pytest

from agenthub import InvalidMessage, TaskTable, decoder_from_agent, decoder_from_hub
from tests.fuzz import OPENING, TARGETS, Violation, case_of, check, check_refusal, demand, main, smallest
from tests.raw_websocket import frame

REFUSED = OPENING.replace(b"GET / ", b"GET /healthz ")
NESTED = b"[" * 62 + b"]" * 62
CASES = {"decode": 1500, "bytes": 120, "sequences": 100}


class Found(NamedTuple):
    target: str
    case: Any
    what: str


FOUND = {
    "string without an end": Found(
        "decode",
        b'{"type":"heartbeat","x":"' + b'\\"' * 30_000,
        "The search for an id restarted at each quote of an unterminated string: 11 s for 60 KB.",
    ),
    "replies in front of the response": Found(
        "bytes",
        [("open",), ("data", 0, OPENING + frame(b"")), ("wait", 0)],
        "The reply to a message that followed the handshake was written before the 101.",
    ),
    "message behind a refused request": Found(
        "bytes",
        [("open",), ("data", 0, REFUSED + frame(b"")), ("wait", 0)],
        "A frame was parsed as an HTTP request: AttributeError from data_received.",
    ),
    "garbage behind a refused request": Found(
        "bytes",
        [("open",), ("data", 0, REFUSED + b"\xff\xff"), ("wait", 0)],
        "The protocol object failed the connection twice: AssertionError from data_received.",
    ),
    "ping behind a refused request": Found(
        "bytes",
        [("open",), ("data", 0, REFUSED + frame(b"x", 9)), ("wait", 0)],
        "The pong was written before the response.",
    ),
    "answer that is not read, and half a close": Found(
        "bytes",
        [("open",), ("data", 0, REFUSED), ("stuck", 0), ("eof", 0)],
        "Its socket was still open after the server had stopped.",
    ),
    "many small questions with large answers": Found(
        "bytes",
        [
            ("open",),
            ("data", 0, OPENING + frame(b'{"type":"register","name":"a","metadata":{"x":"%s"}}' % (b"x" * 3000))),
            ("stuck", 0),
            ("data", 0, frame(b'{"type":"discover","id":"1"}') * 1900),
            ("wait", 1),
        ],
        "All replies of one loop iteration were buffered before their size was checked.",
    ),
    "metadata as deep as may be": Found(
        "bytes",
        [
            ("open",),
            ("data", 0, OPENING + frame(b'{"type":"register","name":"a","metadata":{"x":%s}}' % NESTED)),
            ("data", 0, frame(b'{"type":"discover","id":"1"}')),
            ("wait", 0),
        ],
        "It was nested deeper in the reply to discover, so that no agent could decode it.",
    ),
    "wrong secrets": Found(
        "sequences",
        ({}, [("connect",), ("say", 0, b'{"type":"register","name":"a"}'), ("connect",)]
         + [("say", 1, b'{"type":"register","id":"r","name":"b","agent_id":"@A0@"}')] * 4),
        "Only a mistake of the fuzzer: a close may follow the third error.",
    ),
    "task that ends as it begins": Found(
        "sequences",
        ({}, [("connect",), ("say", 0, b'{"type":"register","name":"a","capabilities":["a"]}'), ("connect",),
              ("say", 1, b'{"type":"register","name":"b"}'),
              ("say", 1, b'{"type":"delegate","id":"r","task_id":"t","capability":"a","ttl":5e-324}'), ("wait", 0)]),
        "Only a mistake of the fuzzer: a task at its deadline waits for the tick, though an agent is free.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_has_found_something_once_finds_nothing_now(name: str) -> None:
    check(FOUND[name].target, FOUND[name].case)


@pytest.mark.parametrize("target", CASES)
def test_fuzzing_for_a_moment_finds_nothing(target: str) -> None:
    for seed in range(CASES[target]):
        case = case_of(target, seed)
        try:
            check(target, case)
        except Exception as error:
            case, error = smallest(target, case, error)
            pytest.fail(f"{error!r}\nfrom tests.fuzz import check; check({target!r}, {case!r})")


# The fuzzer itself must detect planted bugs.


def test_a_seed_makes_the_same_case_each_time() -> None:
    for target in TARGETS:
        assert repr(case_of(target, 7)) == repr(case_of(target, 7))
        assert repr(case_of(target, 7)) != repr(case_of(target, 8))


def test_messages_are_accepted_and_refused_in_fair_shares() -> None:
    shares: collections.Counter[str] = collections.Counter()
    for seed in range(400):
        raw = case_of("decode", seed)
        for decode in (decoder_from_agent(), decoder_from_hub()):
            try:
                shares[type(decode(raw)).__name__] += 1
            except InvalidMessage:
                shares["refused"] += 1
    assert 100 < shares["refused"] < 780
    assert len(shares) > 12


def test_finding_is_made_smaller_and_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def check_for_a_bracket(raw: bytes) -> None:
        demand(b"[" not in raw, "there is a bracket")

    monkeypatch.setitem(TARGETS, "decode", TARGETS["decode"]._replace(check=check_for_a_bracket))
    assert main(["--target", "decode", "--seconds", "20"]) == 1
    out = capsys.readouterr().out
    assert "1 finding" in out
    assert "check('decode', b'[')" in out


def test_run_that_finds_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--target", "decode", "--seconds", "0.01"]) == 0
    assert "nothing found" in capsys.readouterr().out


def test_leak_of_a_payload_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer detects a hub that shows all details of a task to everybody."""
    honest = TaskTable.report

    def indiscreet(tasks: TaskTable, task: Any, viewer: Any, reply_to: Any, now: float) -> Any:
        return honest(tasks, task, task.requester, reply_to, now)

    monkeypatch.setattr(TaskTable, "report", indiscreet)
    register, delegate = (
        b'{"type":"register","name":"a","capabilities":["a"]}',
        b'{"type":"delegate","task_id":"t","capability":"a","input":"@M@"}',
    )
    steps = [("connect",), ("say", 0, register), ("connect",), ("say", 1, register), ("say", 0, delegate)]
    check("sequences", ({}, [*steps, ("say", 1, b'{"type":"status","id":"r","task_id":"t"}')]))
    with pytest.raises(Violation, match="is shown to somebody else"):
        check("sequences", ({}, [*steps, ("connect",), ("say", 2, b'{"type":"status","id":"r","task_id":"t"}')]))


def test_echo_of_the_input_would_be_seen() -> None:
    check_refusal(InvalidMessage("name: must be a string"))
    with pytest.raises(Violation, match="echoes"):
        check_refusal(InvalidMessage("name: must not be 47114711"))
