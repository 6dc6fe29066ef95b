"""Section 9: how `agenthub call` shows pieces, and asks its user what a worker asks."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import WAIT_S, hub_with, running
from tests.test_cli import finished, posix_only

WORKER = r"""
from agenthub import Agent, Task, TaskFailed

agent = Agent("writer")

@agent.capability
async def write(task: Task):
    for word in ("Once", " upon\n", "a \x1b[2Jtime"):
        yield word

@agent.capability
def find():
    yield {"n": 1}
    yield {"n": 2}
    return {"found": 2}

@agent.capability
async def review(task: Task):
    branch = await task.ask("main or\x1b[2J develop?", schema={"enum": ["main", "develop"]})
    count = await task.ask("How many?", schema={"type": "integer"})
    return [branch, count, await task.ask("Your name?")]

@agent.capability
def break_off():
    yield "half"
    raise TaskFailed("out of ink", code="ink")
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with hub_with(tmp_path_factory.mktemp("writer"), WORKER) as url:
        yield url


def call(url: str, *words: str, **options: Any) -> Any:
    return running("-m", "agenthub", "call", *words, "--url", url, **options)


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["write"], '"Once upon\\na \\u001b[2Jtime"\n'),
        (["write", "--stream"], "Once upon\na \x1b[2Jtime\n"),
        (["find"], '{\n  "found": 2\n}\n'),
        (["find", "--stream"], '{"n": 1}\n{"n": 2}\n\n{\n  "found": 2\n}\n'),
    ],
)
def test_pieces_are_printed_as_they_come_where_that_is_asked_for(url: str, words: list[str], output: str) -> None:
    with call(url, *words) as process:
        assert finished(process) == (0, output, "")


@posix_only
def test_pieces_are_printed_as_they_come_on_a_terminal(url: str) -> None:
    import pty

    near, far = pty.openpty()
    try:
        with call(url, "write", stdout=far) as process:
            code, _, complaint = finished(process)
        assert (code, complaint, os.read(near, 65_536)) == (0, "", b"Once upon\r\na \\x1b[2Jtime\r\n")
    finally:
        os.close(near)
        os.close(far)


def test_failure_after_pieces_is_one_line(url: str) -> None:
    with call(url, "break_off", "--stream") as process:
        code, output, complaint = finished(process)
    assert (code, output) == (1, "half\n")
    assert re.fullmatch(r"agenthub: task .* failed at .* \(ink\): out of ink\n", complaint)


def test_question_without_a_terminal_fails_the_task_and_says_how_to_answer(url: str) -> None:
    with call(url, "review") as process:
        code, output, complaint = finished(process)
    assert (code, output) == (1, "")
    assert complaint.count("\n") == 1
    assert r"it asks: main or\x1b[2J develop?; run this on a terminal to answer" in complaint


class Terminal:
    """The near end of a terminal, on which a program shows text and reads lines."""

    def __init__(self, near: int) -> None:
        self._near = near

    def read(self) -> bytes:
        return os.read(self._near, 65_536)

    def type_after(self, text: bytes, typed: bytes) -> None:
        shown = b""
        while text not in shown:
            shown += self.read()
        os.write(self._near, typed)


@contextlib.contextmanager
def call_on_terminal(url: str, *words: str) -> Iterator[tuple[Terminal, Any]]:
    import pty

    near, far = pty.openpty()
    try:
        with call(url, *words, stdin=far, stderr=far) as process:
            yield Terminal(near), process
    finally:
        os.close(near)
        os.close(far)


@posix_only
def test_question_is_asked_on_the_terminal_until_its_answer_fits(url: str) -> None:
    with call_on_terminal(url, "review") as (terminal, process):
        terminal.type_after(b"main or\\x1b[2J develop? (main, develop) ", b"trunk\n")
        terminal.type_after(b'answer: must be one of ["main", "develop"]\r\nmain or', b"develop\n")
        terminal.type_after(b"How many? ", b"three\n")
        terminal.type_after(b"answer: must be of type integer\r\nHow many? ", b"3\n")
        terminal.type_after(b"Your name? ", b"Ada Lovelace\n")
        code, output, _ = finished(process, WAIT_S)
    assert (code, output) == (0, '[\n  "develop",\n  3,\n  "Ada Lovelace"\n]\n')


@posix_only
def test_end_of_input_instead_of_an_answer_is_one_line(url: str) -> None:
    with call_on_terminal(url, "review") as (terminal, process):
        terminal.type_after(b"develop) ", b"\x04")
        assert finished(process)[:2] == (1, "")
        assert b"its question was not answered" in terminal.read()
