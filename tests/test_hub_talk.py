"""Section 4, Hub: questions and answers, pieces, traces, the life of a task, and lists of tasks."""

from __future__ import annotations

from typing import Any

import pytest

import agenthub
from agenthub import (
    Delegate,
    Delegated,
    Deregister,
    Question,
    Result,
    Status,
    StatusReply,
    TaskAck,
    TaskAnswer,
    TaskOutcome,
)
from tests.harness import Client, HubHarness


def couple(**options: Any) -> tuple[HubHarness, Client, Client]:
    """Return a world with an agent that can write, and one that wants something written."""
    world = HubHarness(**options)
    return world, world.join("worker", "write", max_tasks=4), world.join("requester")


def at_work(*tasks: str, answers: bool = True, **options: Any) -> tuple[HubHarness, Client, Client]:
    """Return the same, with tasks that the worker has begun."""
    world, worker, requester = couple(**options)
    for task in tasks or ("t",):
        requester.delegate(task, "write", answers=answers, max_retries=1)
    worker.received()
    return world, worker, requester


def question(text: str = "main or develop?", task: str = "t", **fields: Any) -> Status:
    return Status(task_id=task, question=Question(text, **fields))


def answer(ask: int, value: Any, task: str = "t") -> Status:
    return Status(task_id=task, ask=ask, answer=agenthub.payload_of(value))


def questions_in(client: Client) -> list[tuple[str, int, str]]:
    """Return the questions that came in: their tasks, numbers and texts."""
    return [
        (one.task_id, one.ask, one.question.text)
        for one in client.received()
        if isinstance(one, StatusReply) and one.question
    ]


def answers_in(client: Client) -> list[tuple[str, int, Any]]:
    return [(one.task_id, one.ask, one.answer) for one in client.received() if isinstance(one, TaskAnswer)]


# Features


def test_hub_says_what_it_knows() -> None:
    _, worker, _ = couple()
    assert worker.registration.features == ["ask", "stream", "trace"]


# Questions


def test_question_reaches_the_requester_and_its_answer_the_worker() -> None:
    _, worker, requester = at_work()
    schema = {"enum": ["main", "develop"]}
    reply = worker.ask(question(schema=schema))
    assert (reply.task_id, reply.state, reply.attempt, reply.ask) == ("t", "in_progress", 1, 1)
    assert requester.received() == [
        StatusReply(
            task_id="t",
            state="in_progress",
            attempt=1,
            sender=worker.agent_id,
            ask=1,
            question=Question("main or develop?", schema),
        )
    ]
    reply = requester.ask(answer(1, "main"))
    assert reply == TaskAck(reply_to=reply.reply_to, task_id="t", state="in_progress", attempt=1)
    assert worker.received() == [
        TaskAnswer(task_id="t", state="in_progress", attempt=1, sender=requester.agent_id, ask=1, answer="main")
    ]
    worker.succeed("t", "written")
    assert [one.output for one in requester.received() if isinstance(one, TaskOutcome)] == ["written"]


@pytest.mark.parametrize("value", [None, False, 0, "", [], {"a": [None]}])
def test_answer_is_any_json(value: Any) -> None:
    _, worker, requester = at_work()
    worker.ask(question())
    requester.ask(answer(1, value))
    assert answers_in(worker) == [("t", 1, value)]


def test_questions_are_numbered_over_all_attempts() -> None:
    world, worker, requester = at_work()
    for number in (1, 2):
        assert worker.ask(question(f"{number}?")).ask == number
        requester.ask(answer(number, number))
    other = world.join("other", "write")
    worker.ask(Deregister())
    assert [one.attempt for one in other.received() if isinstance(one, Delegated)] == [2]
    assert other.ask(question("3?")).ask == 3


def test_requester_that_cannot_be_asked_is_not() -> None:
    _, worker, requester = at_work(answers=False)
    assert worker.refused(question()) == "no_answers"
    assert requester.received() == []


def test_requester_that_has_left_is_not_asked() -> None:
    _, worker, requester = at_work()
    requester.ask(Deregister())
    assert worker.refused(question()) == "no_answers"


def test_new_question_replaces_the_one_that_waits() -> None:
    _, worker, requester = at_work()
    worker.ask(question())
    assert worker.ask(question("another?")).ask == 2
    assert questions_in(requester) == [("t", 1, "main or develop?"), ("t", 2, "another?")]
    assert requester.refused(answer(1, "main")) == "no_question"
    requester.ask(answer(2, "main"))
    assert answers_in(worker) == [("t", 2, "main")]


def test_question_stands_alone_in_its_message() -> None:
    _, worker, _ = at_work()
    for fields in ({"progress": 0.5}, {"detail": b"1"}, {"piece": b"1"}):
        assert worker.refused(Status(task_id="t", question=Question("?"), **fields)) == "invalid_message"


@pytest.mark.parametrize(("ask", "times"), [(2, 0), (2, 1), (1, 1)], ids=["none yet", "a later one", "answered before"])
def test_answer_to_no_open_question_is_refused(ask: int, times: int) -> None:
    _, worker, requester = at_work()
    worker.ask(question())
    for _ in range(times):
        requester.ask(answer(1, "main"))
    assert requester.refused(answer(ask, "late")) == "no_question"


def test_only_the_worker_asks_and_only_the_requester_answers() -> None:
    world, worker, requester = at_work()
    other = world.join("other", "write")
    assert requester.refused(question()) == "not_assigned"
    assert other.refused(question()) == "not_assigned"
    worker.ask(question())
    assert worker.refused(answer(1, "main")) == "not_assigned"
    assert other.refused(answer(1, "main")) == "not_assigned"
    worker.succeed("t")
    assert worker.refused(question()) == "task_over"
    assert requester.refused(answer(1, "main")) == "task_over"
    observer = world.connect()
    assert observer.refused(question()) == "not_registered"
    assert observer.refused(answer(1, "main")) == "not_registered"


def test_question_sent_again_is_the_same_and_brings_its_answer_again() -> None:
    _, worker, requester = at_work()
    asked = question()
    assert worker.ask(asked).ask == 1
    worker.lose_connection()
    worker = worker.come_back("write", max_tasks=4)
    worker.tell(asked)  # With the id that it had.
    assert [one.ask for one in worker.replies_to(asked.id)] == [1]
    assert {number for _, number, _ in questions_in(requester)} == {1}
    requester.ask(answer(1, "main"))
    assert answers_in(worker) == [("t", 1, "main")]
    worker.tell(asked)
    assert [type(one) for one in worker.inbox] == [StatusReply, TaskAnswer]  # The reply comes first.
    assert answers_in(worker) == [("t", 1, "main")]


def test_question_waits_for_a_requester_that_is_away() -> None:
    _, worker, requester = at_work("t", "u")
    requester.lose_connection()
    worker.ask(question())
    worker.ask(question("and here?", "u"))
    requester = requester.come_back()
    assert questions_in(requester) == [("t", 1, "main or develop?"), ("u", 1, "and here?")]
    requester.ask(answer(1, "main"))
    requester.lose_connection()
    assert questions_in(requester.come_back()) == [("u", 1, "and here?")]


def test_question_is_delivered_again_when_its_task_is_delegated_again() -> None:
    _, worker, requester = at_work()
    worker.ask(question())
    assert questions_in(requester) == [("t", 1, "main or develop?")]
    requester.delegate("t", "write", answers=True, max_retries=1)
    assert questions_in(requester) == [("t", 1, "main or develop?")]
    requester.ask(answer(1, "main"))
    worker.received()
    requester.delegate("t", "write", answers=True, max_retries=1)
    assert (questions_in(requester), answers_in(worker)) == ([], [])


def test_answer_waits_for_a_worker_that_is_away() -> None:
    _, worker, requester = at_work()
    worker.ask(question())
    worker.lose_connection()
    requester.ask(answer(1, "main"))
    worker = worker.come_back("write")
    assert answers_in(worker) == [("t", 1, "main")]
    worker.ask(question("another?"))
    worker.lose_connection()
    assert answers_in(worker.come_back("write")) == []


def test_new_attempt_drops_the_question() -> None:
    world, worker, requester = at_work()
    worker.ask(question())
    other = world.join("other", "write")
    worker.lose_connection()
    world.pass_time(61)
    assert [one.attempt for one in other.received() if isinstance(one, Delegated)] == [2]
    assert requester.refused(answer(1, "main")) == "no_question"
    requester.lose_connection()
    assert questions_in(requester.come_back()) == []


def test_talk_counts_among_the_records_and_goes_with_the_task() -> None:
    world, worker, requester = at_work()
    before = world.hub.tasks.bytes
    worker.ask(question("x" * 1000))
    requester.ask(answer(1, "y" * 1000))
    assert world.hub.tasks.bytes - before > 2000
    worker.ask(question("z"))
    assert world.hub.tasks.bytes - before < 1000
    worker.fail("t", "no")
    assert world.hub.tasks.bytes - before < 300
    for client in (worker, requester):
        client.ask(Deregister())
    world.pass_time(4000)
    assert world.is_empty()


def test_question_without_room_for_it_is_refused() -> None:
    _, worker, _ = at_work(records_bytes_max=3000)
    assert worker.refused(question("x" * 2000)) == "overloaded"


def test_question_too_large_to_be_passed_on_is_refused() -> None:
    _, worker, requester = at_work(message_bytes_max=8192)
    assert worker.refused(question("x" * 8000)) == "too_large"
    worker.ask(question())
    assert requester.refused(answer(1, "x" * 8000)) == "too_large"


def test_waiting_for_an_answer_does_not_stop_the_time_to_live() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "write", answers=True, ttl=10)
    worker.ask(question())
    world.pass_time(11)
    assert [one.state for one in requester.received() if isinstance(one, TaskOutcome)] == ["timeout"]
    assert requester.refused(answer(1, "main")) == "task_over"


def test_status_shows_the_open_question_to_the_two_parties() -> None:
    world, worker, requester = at_work()
    worker.ask(question())
    for client, is_shown in ((worker, True), (requester, True), (world.join("other"), False), (world.connect(), False)):
        report = client.ask(Status(task_id="t"))
        assert (report.ask, report.question and report.question.text) == (
            (1, "main or develop?") if is_shown else (None, None)
        )
    requester.ask(answer(1, "main"))
    assert worker.ask(Status(task_id="t")).question is None


# Pieces


def test_pieces_are_passed_on_in_order_and_not_kept() -> None:
    world, worker, requester = at_work()
    size = world.hub.tasks.bytes
    worker.ask(Status(task_id="t", progress=0.5))
    for piece in (b'"Once"', b'" upon"', b'{"a": 1}'):
        reply = worker.ask(Status(task_id="t", piece=piece))
        assert reply == TaskAck(reply_to=reply.reply_to, task_id="t", state="in_progress", attempt=1)
    got = [one for one in requester.received() if isinstance(one, StatusReply)]
    assert [(one.seq, one.piece, one.progress) for one in got] == [
        (1, None, 0.5),
        (2, "Once", None),
        (3, " upon", None),
        (4, {"a": 1}, None),
    ]
    report = requester.ask(Status(task_id="t"))
    assert (report.pieces, report.piece, report.progress) == (3, None, 0.5)
    assert world.hub.tasks.bytes < size + 200


def test_progress_and_piece_in_one_message_are_both_passed_on() -> None:
    _, worker, requester = at_work()
    worker.ask(Status(task_id="t", progress=0.25, detail=b'"d"', piece=b'"p"'))
    got = [(one.seq, one.progress, one.detail, one.piece) for one in requester.received()]
    assert got == [(1, 0.25, "d", None), (2, None, None, "p")]


def test_only_the_worker_sends_pieces() -> None:
    _, worker, requester = at_work()
    assert requester.refused(Status(task_id="t", piece=b"1")) == "not_assigned"
    worker.succeed("t")
    assert worker.refused(Status(task_id="t", piece=b"1")) == "task_over"


def test_piece_for_a_requester_that_is_away_is_dropped() -> None:
    _, worker, requester = at_work()
    requester.lose_connection()
    worker.ask(Status(task_id="t", piece=b"1"))
    assert [one for one in requester.come_back().received() if isinstance(one, StatusReply)] == []


# Traces


def test_trace_is_passed_on_and_no_part_of_the_content() -> None:
    _, worker, requester = couple()
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "baggage": "a=\u00e4"}
    requester.delegate("t", "write", trace=trace, answers=True)
    (delivery,) = worker.received()
    assert (delivery.trace, delivery.answers) == (trace, True)
    again = requester.delegate("t", "write", trace={"traceparent": "other"}, answers=True)
    assert isinstance(again, TaskAck)
    assert requester.refused(Delegate(task_id="t", capability="write", answers=False)) == "duplicate_task"


# The life of a task


def life(client: Client, task: str = "t") -> list[tuple[str, str | None, int, float]]:
    return [(one.event, one.agent_id, one.attempt, one.at_s) for one in client.ask(Status(task_id=task)).history]


def test_life_of_a_task() -> None:
    world, worker, requester = couple()
    requester.delegate("t", "write", answers=True, max_retries=1)
    world.pass_time(1)
    worker.ask(question())
    world.pass_time(1)
    requester.ask(answer(1, "main"))
    world.pass_time(1)
    other = world.join("other", "write")
    worker.ask(Deregister())
    world.pass_time(1)
    other.succeed("t")
    world.pass_time(1)
    expected = [
        ("accepted", requester.agent_id, 0, 5.0),
        ("assigned", worker.agent_id, 1, 5.0),
        ("asked", worker.agent_id, 1, 4.0),
        ("answered", requester.agent_id, 1, 3.0),
        ("retried", worker.agent_id, 1, 2.0),
        ("assigned", other.agent_id, 2, 2.0),
        ("succeeded", other.agent_id, 2, 1.0),
    ]
    assert life(requester) == expected
    assert life(world.connect()) == expected  # No content is in it.


@pytest.mark.parametrize("event", ["erred", "cancelled", "lost", "expired"])
def test_end_of_a_life(event: str) -> None:
    world, worker, requester = couple()
    requester.delegate("t", "write", ttl=10)
    if event == "erred":
        worker.fail("t", "cancelled")
    elif event == "cancelled":
        requester.ask(Result(task_id="t", success=False))
    elif event == "lost":
        worker.ask(Deregister())
    else:
        world.pass_time(10)
    ender = worker.agent_id if event == "erred" else None
    assert [one[:3] for one in life(requester)][-1] == (event, ender, 1)


def test_long_life_shows_its_beginning_and_its_last_steps() -> None:
    world, _, requester = couple()
    requester.delegate("t", "travel", max_retries=100, wait=True)
    for number in range(30):
        worker = world.join(f"worker-{number}", "travel")
        worker.ask(Deregister())
    history = life(requester)
    assert len(history) <= 16
    assert history[0][0] == "accepted"
    assert [one[:1] + one[2:3] for one in history[-2:]] == [("assigned", 30), ("retried", 30)]


# Lists


def listed(client: Client, **fields: Any) -> tuple[list[str], int]:
    reply = client.ask(Status(tasks=True, **fields))
    return [one.task_id for one in reply.tasks], reply.total


def test_list_is_limited_and_of_one_state_the_newest_first() -> None:
    world, worker, requester = couple()
    for number in range(8):
        requester.delegate(f"t{number}", "write")
        world.pass_time(1)
    worker.succeed("t0")
    worker.fail("t1")
    assert listed(requester, limit=3) == (["t7", "t6", "t5"], 8)
    assert listed(requester, state="pending") == (["t7", "t6"], 2)
    assert listed(requester, state="in_progress", limit=1) == (["t5"], 4)
    assert listed(requester, state="failed") == (["t1"], 1)
    assert listed(requester, state="timeout") == ([], 0)
    assert listed(requester) == (["t7", "t6", "t5", "t4", "t3", "t2", "t1", "t0"], 8)


def test_looking_for_a_rare_state_is_bounded_and_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "LIST_SCAN_MAX", 20)
    monkeypatch.setattr(agenthub, "COST_SCANNED", 5)
    world, worker, requester = couple()
    for number in range(30):
        requester.delegate(f"t{number}", "write")
        worker.succeed(f"t{number}") if number else worker.fail("t0")
    assert listed(requester, state="failed") == ([], 1)
    assert world.hub.cost == 1 + 20 // 5


def test_agent_that_registers_again_on_its_connection_gets_no_question_twice_and_one_that_resumes_does() -> None:
    _, worker, requester = at_work()
    worker.ask(question("x" * 3 * agenthub.COST_BYTES))
    assert worker.harness.hub.cost >= 6
    assert len(questions_in(requester)) == 1
    requester.register("requester", "more")
    assert questions_in(requester) == []
    requester.lose_connection()
    back = requester.come_back()
    assert back.harness.hub.cost >= 3
    assert len(questions_in(back)) == 1
