"""Section 1, Errors: one base, split by whose fault it is, with stable codes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

import agenthub
from agenthub import AgentHubError, Code

CODES_OF_ERRORS = """
    invalid_message unsupported_type unauthorized not_registered unknown_agent no_agent unknown_task duplicate_task
    not_assigned stale_attempt task_over no_answers no_question too_large too_deep deadlock overloaded shutting_down
    internal
"""
CODES_OF_RESULTS = "failed cancelled agent_lost timeout no_handler pieces_lost invalid_input busy hub_lost"

# Each error, constructed as callers do it, and its code.
ERRORS: list[tuple[AgentHubError, str]] = [
    (AgentHubError("what happened"), "internal"),
    (agenthub.InvalidMessage("name: Field required", reply_to="1"), "invalid_message"),
    (agenthub.Refused("no such task", code=Code.UNKNOWN_TASK, task_id="t"), "unknown_task"),
    (agenthub.Disconnected("the hub is gone", close_code=1001), "hub_lost"),
    (agenthub.TaskFailed("no such file", task_id="t"), "failed"),
    (agenthub.TaskTimeout("its time is over", task_id="t"), "timeout"),
    (agenthub.PackageMissing("uvloop", "The event loop `uvloop`"), "internal"),
    (agenthub.JournalError("hub.db: is no file"), "internal"),
    (agenthub.Fenced("hub.db: another hub has taken over"), "internal"),
    (agenthub.IllegalTransition("a task that is over cannot begin"), "internal"),
]


def test_codes_are_those_of_the_protocol() -> None:
    assert [code.value for code in Code] == CODES_OF_ERRORS.split() + CODES_OF_RESULTS.split()


@pytest.mark.parametrize(("error", "code"), ERRORS)
def test_every_error_has_a_text_and_a_code(error: AgentHubError, code: str) -> None:
    assert str(error) == error.message
    assert error.code == code
    assert type(error.code) is str


def test_every_class_of_errors_is_in_the_table_above() -> None:
    def classes(base: type[AgentHubError]) -> set[type[AgentHubError]]:
        own = (one for one in base.__subclasses__() if one.__module__ == agenthub.__name__)
        return {base}.union(*map(classes, own))

    assert classes(AgentHubError) == {type(error) for error, _ in ERRORS}


def test_errors_carry_what_they_are_about() -> None:
    facts: dict[str, Any] = {}
    for error, _ in ERRORS:
        facts |= {name: value for name, value in vars(error).items() if name not in ("message", "code")}
    assert facts == {"reply_to": "1", "task_id": "t", "close_code": 1001}


def test_timeout_is_a_failure_of_the_task() -> None:
    assert issubclass(agenthub.TaskTimeout, agenthub.TaskFailed)


def test_failure_may_carry_a_code_of_the_handlers_choice() -> None:
    assert agenthub.TaskFailed("out of paper", code="out_of_paper").code == "out_of_paper"


def test_missing_package_is_an_import_error_that_says_what_to_install() -> None:
    error = agenthub.PackageMissing("uvloop", "The event loop `uvloop`")
    assert isinstance(error, ImportError)
    assert str(error) == "The event loop `uvloop` needs the package uvloop: pip install uvloop"


def test_error_is_gone_after_its_text_was_written() -> None:
    """Its traceback would keep the objects of all its frames."""

    class WithFrames(Exception):
        pass

    error = WithFrames("no\n such  file")
    assert agenthub.one_line(error) == "no such file"
    assert agenthub.one_line(WithFrames()) == "WithFrames"
    reference = weakref.ref(error)
    del error
    gc.collect()
    assert reference() is None
