"""Section 3, States: the tables are the life of a task and of an agent."""

from __future__ import annotations

import itertools

import pytest

from agenthub import (
    AGENT_TRANSITIONS,
    FINAL_STATES,
    LEFT_STATES,
    TARGET_STATES,
    TRANSITIONS,
    AgentEvent,
    AgentHubError,
    AgentState,
    IllegalTransition,
    TaskEvent,
    TaskState,
    next_agent_state,
    next_state,
)

# Each line is a state, an event, and the state that follows. All other pairs are illegal.
STEPS = """
    pending      assigned   in_progress
    pending      lost       failed
    pending      cancelled  failed
    pending      expired    timeout
    in_progress  succeeded  completed
    in_progress  erred      failed
    in_progress  retried    pending
    in_progress  lost       failed
    in_progress  cancelled  failed
    in_progress  expired    timeout
"""
LEGAL = {(state, event): follows for state, event, follows in map(str.split, STEPS.strip().splitlines())}
PAIRS = list(itertools.product(TaskState, TaskEvent))


def test_states_and_their_order_are_those_of_the_protocol() -> None:
    assert [state.value for state in TaskState] == ["pending", "in_progress", "completed", "failed", "timeout"]


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_each_pair_of_state_and_event_is_a_step_or_illegal(state: TaskState, event: TaskEvent) -> None:
    if (state, event) in LEGAL:
        follows = next_state(state, event)
        assert follows == LEGAL[state, event]
        assert isinstance(follows, TaskState)
    else:
        with pytest.raises(IllegalTransition, match=f"^a task that is {state} cannot be {event}$"):
            next_state(state, event)


def test_every_state_has_a_row() -> None:
    assert list(TRANSITIONS) == list(TaskState)


def test_final_states_are_the_empty_rows() -> None:
    assert {"completed", "failed", "timeout"} == FINAL_STATES
    assert {state for state in TaskState if not TRANSITIONS[state]} == FINAL_STATES


def test_every_event_is_used() -> None:
    assert {event for row in TRANSITIONS.values() for event in row} == set(TaskEvent)


def test_every_state_is_reached_from_pending_and_every_open_one_leads_to_each_end() -> None:
    def reachable(start: TaskState) -> set[TaskState]:
        reached, ahead = {start}, [start]
        while ahead:
            new = set(TRANSITIONS[ahead.pop()].values()) - reached
            reached |= new
            ahead += new
        return reached

    assert reachable(TaskState.PENDING) == set(TaskState)
    assert reachable(TaskState.IN_PROGRESS) == set(TaskState)


# The same for agents.
AGENT_STEPS = """
    online        drain_requested  draining
    online        connection_lost  disconnected
    online        deregistered     deregistered
    draining      connection_lost  interrupted
    draining      deregistered     deregistered
    disconnected  resumed          online
    disconnected  grace_expired    gone
    interrupted   resumed          online
    interrupted   grace_expired    gone
    gone          resumed          online
    deregistered  resumed          online
"""
LEGAL_OF_AGENTS = {(state, event): follows for state, event, follows in map(str.split, AGENT_STEPS.split("\n")[1:-1])}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(AgentState, AgentEvent)))
def test_each_pair_of_an_agents_state_and_event_is_a_step_or_illegal(state: AgentState, event: AgentEvent) -> None:
    follows = LEGAL_OF_AGENTS.get((state.value, event.name.lower()))
    if follows is not None:
        assert next_agent_state(state, event) is AgentState(follows)
    else:
        with pytest.raises(IllegalTransition, match=f"^an agent that is {state} has no transition for: {event}$"):
            next_agent_state(state, event)


def test_every_state_and_event_of_an_agent_is_used_and_none_is_final() -> None:
    assert list(AGENT_TRANSITIONS) == list(AgentState)
    assert all(AGENT_TRANSITIONS.values())
    assert {event for row in AGENT_TRANSITIONS.values() for event in row} == set(AgentEvent)
    assert {state for row in AGENT_TRANSITIONS.values() for state in row.values()} == set(AgentState)


def test_agents_that_have_left_are_no_targets_and_can_only_resume() -> None:
    assert not LEFT_STATES & TARGET_STATES
    assert all(list(AGENT_TRANSITIONS[state]) == [AgentEvent.RESUMED] for state in LEFT_STATES)


def test_illegal_step_is_an_error_of_ours() -> None:
    assert issubclass(IllegalTransition, AgentHubError)
