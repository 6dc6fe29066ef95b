"""Exchanges that authors of clients want to replay, and no test of the hub shows: tests/vectors.py records them.

Each function is one: its name says what happens, and what the hub does in it is in docs/protocol-vectors.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agenthub import Broadcast, Delegate, Deregister, Discover, ErrorInfo, Heartbeat, Question, Register, Status
from tests.harness import Client, HubHarness

Story = Callable[[], None]
STORIES: dict[str, Story] = {}


def story(function: Story) -> Story:
    STORIES[function.__name__.replace("_", " ")] = function
    return function


def pair(**options: Any) -> tuple[HubHarness, Client, Client]:
    """Return a hub with a worker and a requester."""
    hub = HubHarness(**options)
    return hub, hub.join("worker", "work", max_tasks=4), hub.join("requester")


def begun(*, max_retries: int = 0, answers: bool = False, **options: Any) -> tuple[HubHarness, Client, Client]:
    """Return the same, with the task `t` that the worker has begun."""
    hub, worker, requester = pair(**options)
    requester.delegate("t", "work", max_retries=max_retries, answers=answers)
    return hub, worker, requester


def asked(client: Client, text: str = "which?", task: str = "t", **fields: Any) -> Any:
    return client.ask(Status(task_id=task, question=Question(text, **fields)))


def answered(client: Client, ask: int, value: Any = None, task: str = "t") -> Any:
    return client.ask(Status(task_id=task, ask=ask, answer=value))


# Frames that hold no message.


@story
def text_that_is_not_json_is_rejected() -> None:
    client = HubHarness().join("agent")
    for text in ("", "hello", '{"type": "status"', '{"type": "status"} {}', "{'type': 'status'}"):
        client.say(text)
    client.ask(Heartbeat())


@story
def json_that_is_no_object_is_rejected() -> None:
    client = HubHarness().join("agent")
    for text in ("null", "7", '"status"', '["status"]'):
        client.say(text)


@story
def binary_message_is_rejected() -> None:
    client = HubHarness().join("agent")
    client.say_binary(b'{"type": "status", "id": "1"}')
    client.ask(Heartbeat())


@story
def type_that_agents_do_not_send_is_rejected() -> None:
    client = HubHarness().join("agent")
    for type in ("dance", "heartbeat_ack", "error", "Register", ""):
        client.say(f'{{"type": "{type}", "id": "1"}}')
    client.say('{"id": "2"}')


@story
def id_that_is_no_string_is_not_repeated() -> None:
    client = HubHarness().join("agent")
    for id in ("7", "true", '[""]', '""'):
        client.say(f'{{"type": "heartbeat", "id": {id}}}')


@story
def numbers_that_are_not_json_are_rejected() -> None:
    _, _, requester = pair()
    for number in ("NaN", "Infinity", "-Infinity", "01", "1.", "+1"):
        requester.say(f'{{"type": "delegate", "id": "1", "task_id": "t", "capability": "work", "input": {number}}}')


@story
def integers_beyond_64_bits_are_rejected() -> None:
    _, _, requester = pair()
    for number in (2**64, -(2**63) - 1, 10**30):
        requester.say(f'{{"type": "delegate", "id": "1", "task_id": "t", "capability": "work", "input": [{number}]}}')


@story
def integers_of_64_bits_are_forwarded() -> None:
    _, _, requester = pair()
    for task, number in enumerate((2**64 - 1, -(2**63), 2**53 + 1)):
        requester.say(
            f'{{"type": "delegate", "id": "1", "task_id": "t-{task}", "capability": "work", "input": {number}}}'
        )


@story
def lone_surrogates_are_rejected() -> None:
    _, _, requester = pair()
    for text in (r"\ud800", r"\udc00\ud800", r"a\udfff"):
        requester.say(f'{{"type": "delegate", "id": "1", "task_id": "t", "capability": "work", "input": "{text}"}}')
    requester.say(r'{"type": "delegate", "id": "2", "task_id": "t", "capability": "work", "input": "\ud83d\ude00"}')


@story
def payload_may_nest_64_deep_and_no_deeper() -> None:
    _, _, requester = pair()
    for depth in (64, 65):
        nested = "[" * depth + "]" * depth
        requester.say(
            f'{{"type": "delegate", "id": "{depth}", "task_id": "t-{depth}", "capability": "work", "input": {nested}}}'
        )


@story
def last_of_two_fields_of_the_same_name_counts() -> None:
    _, _, requester = pair()
    requester.say('{"type": "delegate", "id": "1", "task_id": "a", "task_id": "b", "capability": "work", "id": "2"}')
    requester.say('{"type": "heartbeat", "type": "status", "id": "3", "task_id": "b"}')


@story
def unknown_fields_are_ignored() -> None:
    _, _, requester = pair()
    requester.say('{"type": "heartbeat", "id": "1", "color": {"deep": [1]}, "type_": null}')
    requester.say('{"type": "delegate", "id": "2", "task_id": "t", "capability": "work", "inputs": 1}')


@story
def null_is_a_missing_field_unless_that_has_another_default() -> None:
    _, _, requester = pair()
    requester.say('{"type": "heartbeat", "id": null}')
    requester.say(
        '{"type": "delegate", "id": "1", "task_id": "t", "capability": "work", "agent_id": null, "trace": null}'
    )
    requester.say('{"type": "delegate", "id": "2", "task_id": "u", "capability": "work", "ttl": null}')
    requester.say('{"type": "discover", "id": "3", "capability": null}')


@story
def values_are_not_converted() -> None:
    _, _, requester = pair()
    for field in (
        '"ttl": "60"',
        '"ttl": true',
        '"priority": 1.5',
        '"wait": 1',
        '"capability": 7',
        '"max_retries": true',
    ):
        requester.say(f'{{"type": "delegate", "id": "1", "task_id": "t", {field}}}')


@story
def sender_is_the_connection_whatever_a_message_says() -> None:
    _, worker, requester = pair()
    requester.say('{"type": "delegate", "id": "1", "task_id": "t", "capability": "work", "sender": "somebody-else"}')
    worker.say('{"type": "result", "id": "1", "task_id": "t", "success": true, "sender": "somebody-else"}')


@story
def message_too_large_to_be_forwarded_is_rejected() -> None:
    _, _, requester = pair(message_bytes_max=4096)
    requester.delegate("t", "work", input="x" * 3100)
    requester.ask(Broadcast(message="x" * 3100))
    requester.delegate("t", "work", input="x" * 2900)


# Sessions.


@story
def wrong_secret_is_rejected_and_the_third_closes() -> None:
    hub, worker, _ = pair()
    worker.lose_connection()
    thief = hub.connect()
    for secret in ("guess-1", "guess-2", "guess-3"):
        thief.ask(Register(name="thief", agent_id=worker.agent_id, resume=secret))
    worker.come_back("work")


@story
def resumed_session_lists_its_tasks_and_takes_their_results() -> None:
    _, worker, requester = pair()
    for task in ("one", "two"):
        requester.delegate(task, "work")
    worker.lose_connection()
    worker = worker.come_back("work")
    worker.succeed("one", 1, attempt=1)
    worker.fail("two", ErrorInfo("agent_lost", "the agent does not have it"), attempt=1)


@story
def capability_given_up_in_a_resumed_session_is_not_found() -> None:
    _, worker, requester = pair()
    worker.lose_connection()
    worker.come_back("rest")
    requester.delegate("t", "work")
    requester.ask(Discover(capability="rest"))


@story
def connection_that_does_not_register_is_closed() -> None:
    hub = HubHarness(join_s=10.0)
    hub.connect()
    observer = hub.connect()
    hub.pass_time(9.0)
    observer.ask(Status())
    hub.pass_time(2.0)


@story
def heartbeats_keep_a_connection_open() -> None:
    hub = HubHarness(heartbeat_s=30.0)
    client = hub.join("agent")
    for _ in range(3):
        hub.pass_time(80.0)
        client.ask(Heartbeat())
    hub.pass_time(90.0)


@story
def task_of_a_worker_that_deregisters_is_retried_elsewhere() -> None:
    hub, worker, _ = begun(max_retries=1)
    other = hub.join("other", "work")
    worker.ask(Deregister())
    other.succeed("t", "done")


@story
def task_of_a_worker_that_deregisters_fails_without_a_retry() -> None:
    _, worker, _ = begun()
    worker.ask(Deregister())


@story
def outcome_waits_for_a_requester_that_comes_back() -> None:
    _, worker, requester = begun()
    requester.lose_connection()
    worker.succeed("t", {"kept": True})
    requester = requester.come_back()
    requester.ask(Status(task_id="t"))


@story
def delegate_that_was_not_acknowledged_is_sent_again_after_a_reconnect() -> None:
    _, worker, requester = pair()
    requester.tell(Delegate(task_id="t", capability="work", id="1"))
    requester.lose_connection()
    requester = requester.come_back()
    requester.delegate("t", "work")
    worker.succeed("t")


# Tasks.


@story
def same_task_id_with_other_content_is_a_duplicate() -> None:
    _, _, requester = pair()
    content: dict[str, Any] = {"input": {"a": 1}, "ttl": 60.0}
    requester.delegate("t", "work", **content)
    for other in ({"input": {"a": 2}}, {"ttl": 61.0}, {"priority": 1}, {"max_retries": 1}, {"wait": True}):
        requester.delegate("t", "work", **{**content, **other})
    requester.delegate("t", "other", **content)


@story
def same_content_may_differ_in_spaces_order_and_trace() -> None:
    _, _, requester = pair()
    head = '{"type": "delegate", "task_id": "t", "capability": "work"'
    requester.say(f'{head}, "id": "1", "input": {{"a": 1, "b": [2, 3]}}}}')
    requester.say(f'{head}, "id": "2", "input": {{"b":[2,3],"a":1}}, "trace": {{"traceparent": "00-1"}}}}')


@story
def task_without_a_worker_is_rejected_or_waits() -> None:
    hub = HubHarness()
    requester = hub.join("requester")
    requester.delegate("a", "work")
    requester.delegate("b", agent_id="nobody-1")
    requester.delegate("c")
    requester.delegate("d", "work", wait=True)
    hub.join("worker", "work").succeed("d")


@story
def named_agent_without_the_capability_is_rejected() -> None:
    _, worker, requester = pair()
    requester.delegate("a", "dance", agent_id=worker.agent_id)
    requester.delegate("b", "work", agent_id=worker.agent_id)


@story
def retries_are_used_up_one_by_one() -> None:
    hub, worker, requester = begun(max_retries=2, grace_s=0.0)
    for _ in range(2):
        worker.lose_connection()
        worker = hub.join("worker", "work")
    worker.lose_connection()
    requester.ask(Status(task_id="t"))


@story
def result_of_no_task_or_an_ended_task_is_rejected() -> None:
    _, worker, _ = begun()
    worker.succeed("unknown")
    worker.succeed("t", 1)
    worker.succeed("t", 2)
    worker.fail("t", "too late")


@story
def failure_with_a_text_has_the_code_failed() -> None:
    _, worker, _ = begun()
    worker.fail("t", "the disk is full")


@story
def failure_without_an_error_and_success_without_an_output() -> None:
    _, worker, requester = begun()
    requester.delegate("u", "work")
    worker.fail("t")
    worker.succeed("u")


@story
def cancel_that_crosses_the_result_comes_too_late() -> None:
    _, worker, requester = begun()
    worker.succeed("t", "done")
    requester.fail("t", ErrorInfo("cancelled", "enough"))


@story
def result_that_crosses_the_cancel_comes_too_late() -> None:
    _, worker, requester = begun()
    requester.fail("t", ErrorInfo("cancelled", "enough"))
    worker.succeed("t", "done", attempt=1)


@story
def cancel_while_the_worker_is_disconnected_takes_the_task_from_it() -> None:
    _, worker, requester = begun()
    worker.lose_connection()
    requester.fail("t", ErrorInfo("cancelled", "enough"))
    worker.come_back("work")


@story
def result_that_crosses_the_deadline_comes_too_late() -> None:
    hub, worker, requester = pair()
    requester.delegate("t", "work", ttl=5.0)
    hub.pass_time(6.0)
    worker.succeed("t", "done", attempt=1)


@story
def somebody_else_can_neither_end_nor_cancel_a_task() -> None:
    hub, _, _ = begun()
    stranger = hub.join("stranger", "work")
    stranger.succeed("t")
    stranger.fail("t", "mine")
    stranger.ask(Status(task_id="t", progress=0.5))


@story
def higher_priority_goes_first() -> None:
    hub = HubHarness()
    requester = hub.join("requester")
    for task, priority in (("low", -1), ("first", 0), ("second", 0), ("high", 5)):
        requester.delegate(task, "work", priority=priority, wait=True)
    worker = hub.join("worker", "work", max_tasks=1)
    for task in ("high", "first", "second", "low"):
        worker.succeed(task)


@story
def requesters_take_turns() -> None:
    hub = HubHarness()
    one, other = hub.join("one"), hub.join("other")
    for task in ("a-1", "a-2", "a-3"):
        one.delegate(task, "work", wait=True)
    other.delegate("b-1", "work", wait=True)
    worker = hub.join("worker", "work", max_tasks=1)
    for task in ("a-1", "b-1", "a-2", "a-3"):
        worker.succeed(task)


@story
def subtasks_end_with_their_parent_task() -> None:
    hub, worker, requester = begun()
    helper = hub.join("helper", "help")
    worker.delegate("t.1", "help", parent_id="t", ttl=900.0)
    requester.fail("t", ErrorInfo("cancelled", "enough"))
    helper.succeed("t.1", attempt=1)
    worker.delegate("t.2", "help", parent_id="t")


@story
def subtask_lives_no_longer_than_its_parent_task() -> None:
    hub, worker, requester = pair()
    hub.join("helper", "help")
    requester.delegate("t", "work", ttl=10.0)
    worker.delegate("t.1", "help", parent_id="t", ttl=900.0)
    hub.pass_time(11.0)


@story
def retry_of_the_parent_task_cancels_its_subtasks() -> None:
    hub, worker, _ = begun(max_retries=1)
    hub.join("other", "work")
    helper = hub.join("helper", "help")
    worker.delegate("t.1", "help", parent_id="t")
    worker.ask(Deregister())
    helper.succeed("t.1", attempt=1)


@story
def chain_of_subtasks_may_be_16_deep() -> None:
    hub = HubHarness()
    worker = hub.join("worker", max_tasks=20)
    worker.delegate("t1", agent_id=worker.agent_id)
    for depth in range(2, 18):
        worker.delegate(f"t{depth}", agent_id=worker.agent_id, parent_id=f"t{depth - 1}")


# Questions, pieces and reports.


@story
def second_answer_and_answers_to_other_numbers_are_rejected() -> None:
    _, worker, requester = begun(answers=True)
    answered(requester, 1, "early")
    asked(worker)
    answered(requester, 2, "wrong number")
    answered(requester, 1, "main")
    answered(requester, 1, "develop")


@story
def answer_may_be_null() -> None:
    _, worker, requester = begun(answers=True)
    asked(worker)
    answered(requester, 1)


@story
def answer_and_question_after_the_end_are_rejected() -> None:
    _, worker, requester = begun(answers=True)
    asked(worker)
    requester.fail("t", ErrorInfo("cancelled", "enough"))
    answered(requester, 1, "main")
    asked(worker, "still there?")


@story
def answer_that_was_not_acknowledged_is_sent_again() -> None:
    _, worker, requester = begun(answers=True)
    asked(worker)
    requester.tell(Status(id="a", task_id="t", ask=1, answer="main"))
    requester.lose_connection()
    requester = requester.come_back()
    answered(requester, 1, "main")


@story
def question_that_waits_is_in_the_status_for_its_two_parties() -> None:
    hub, worker, requester = begun(answers=True)
    asked(worker, "which?", schema={"enum": ["main", "develop"]})
    for client in (requester, worker, hub.connect()):
        client.ask(Status(task_id="t"))


@story
def question_of_an_earlier_attempt_waits_no_more() -> None:
    hub, worker, requester = begun(answers=True, max_retries=1)
    other = hub.join("other", "work")
    asked(worker, "first?")
    worker.ask(Deregister())
    answered(requester, 1, "late")
    asked(other, "second?")
    answered(requester, 2, "in time")


@story
def report_without_content_and_question_with_a_piece_are_rejected() -> None:
    _, worker, _ = begun(answers=True)
    for fields in ('"piece": null', '"progress": null, "detail": null', '"progress": 1.5', '"progress": "half"'):
        worker.say(f'{{"type": "status", "id": "1", "task_id": "t", {fields}}}')
    worker.say('{"type": "status", "id": "2", "task_id": "t", "piece": "a", "question": {"text": "which?"}}')
    worker.say('{"type": "status", "id": "3", "task_id": "t", "question": {}}')


@story
def pieces_of_a_new_attempt_are_counted_on() -> None:
    hub, worker, _ = begun(max_retries=1)
    other = hub.join("other", "work")
    worker.tell(Status(task_id="t", piece="Once "))
    worker.tell(Status(task_id="t", piece="upon"))
    worker.ask(Deregister())
    other.tell(Status(task_id="t", piece="Long "))
    other.tell(Status(task_id="t", piece="ago"))
    other.succeed("t", "Long ago")


@story
def pieces_and_progress_share_their_numbers() -> None:
    _, worker, requester = begun()
    worker.tell(Status(task_id="t", piece={"line": 1}))
    worker.tell(Status(task_id="t", progress=0.5))
    worker.tell(Status(task_id="t", piece={"line": 2}, progress=1.0, detail="done"))
    requester.ask(Status(task_id="t"))


# Lists, discovery and broadcasts.


@story
def list_of_tasks_is_limited_by_number_and_state() -> None:
    _, worker, requester = pair()
    for number in range(3):
        requester.delegate(f"t-{number}", "work")
    worker.succeed("t-0")
    requester.ask(Status(tasks=True, limit=2))
    requester.ask(Status(tasks=True, state="completed"))
    requester.ask(Status(tasks=True, state="timeout"))
    requester.say('{"type": "status", "id": "1", "tasks": true, "state": "lost"}')


@story
def history_keeps_the_first_and_the_last_steps() -> None:
    hub, worker, requester = begun(max_retries=9, grace_s=0.0)
    for _ in range(8):
        worker.lose_connection()
        worker = hub.join("worker", "work")
    requester.ask(Status(task_id="t"))


@story
def stranger_sees_no_payload_of_a_task() -> None:
    hub, worker, requester = pair()
    requester.delegate("t", "work", input={"secret": 1})
    worker.tell(Status(task_id="t", progress=0.5, detail="secret"))
    stranger = hub.join("stranger")
    stranger.ask(Status(task_id="t"))
    worker.fail("t", ErrorInfo("own", "secret"))
    stranger.ask(Status(task_id="t"))
    stranger.ask(Status(task_id="unknown"))


@story
def discovery_ends_at_its_limit_and_leaves_out_who_is_not_online() -> None:
    hub = HubHarness()
    agents = [hub.join(f"agent-{number}", "work") for number in range(4)]
    agents[1].lose_connection()
    agents[2].tell(Deregister(drain=True, id="d"))
    agents[0].ask(Discover(capability="work", limit=1))
    agents[0].ask(Discover(capability=""))


@story
def broadcast_is_any_json_and_does_not_come_back_to_its_sender() -> None:
    hub = HubHarness()
    sender = hub.join("sender", "listen")
    sender.ask(Broadcast(message=None))
    hub.join("listener", "listen")
    for message in (None, 0, [], {"a": [None]}):
        sender.ask(Broadcast(message=message, capability="listen"))
    sender.ask(Broadcast(message=1, capability="nobody has it"))


@story
def broadcast_is_not_kept_for_a_disconnected_agent() -> None:
    hub = HubHarness()
    sender, listener = hub.join("sender"), hub.join("listener")
    listener.lose_connection()
    sender.ask(Broadcast(message="missed"))
    listener.come_back()


@story
def registration_past_the_limits_of_this_hub_is_overloaded() -> None:
    client = HubHarness(capabilities_max=2, metadata_bytes_max=30).connect()
    client.ask(Register(name="agent", capabilities=["a", "b", "c"]))
    client.ask(Register(name="agent", metadata={"text": "x" * 30}))
    client.ask(Register(name="agent", capabilities=["a", "b"]))


@story
def request_of_an_ended_task_purged_by_the_hub_is_unknown() -> None:
    hub, worker, requester = begun(retention_s=60.0)
    worker.succeed("t")
    hub.pass_time(100.0)
    requester.ask(Status(task_id="t"))
    requester.fail("t", ErrorInfo("cancelled", "enough"))
    requester.delegate("t", "work")
