"""OpenTelemetry for AgentHub: a span for each task that an agent delegates or handles, linked over the wire.

    agenthub_otel.instrument(agent)

It needs the package `opentelemetry-api` (`pip install '.[otel]'` in a clone) and agenthub.py in the same folder. Where
the spans go is up to the program: without an SDK of OpenTelemetry they cost little and go nowhere.

    requester   CLIENT span "invoke_agent CAPABILITY"     from the delegation to the outcome
    worker      SERVER span "process CAPABILITY"          while the handler works; its parent is the CLIENT span

The parent travels in the task's `trace`, as W3C trace context, by the propagator that the program has set. What a
handler delegates is a child of its SERVER span, so a chain of agents is one trace.

Names and attributes follow the conventions for GenAI agents and for messaging. Both have the status "development"
(https://opentelemetry.io/docs/specs/semconv/gen-ai/), so they may change in any release.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING or not __package__:
    import agenthub
else:  # Copied into a package.
    from . import agenthub

try:
    from opentelemetry import propagate, trace
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode
except ImportError as error:
    raise agenthub.PackageMissing("opentelemetry-api", "Tracing") from error

__all__ = ["instrument"]

AnyAgent = TypeVar("AnyAgent", bound=agenthub.Agent)


def instrument(agent: AnyAgent, tracer: trace.Tracer | None = None) -> AnyAgent:
    """Make spans of the tasks that an agent delegates and handles, by `tracer` or a global one; return the agent.

    Raises ValueError if that agent is instrumented already.
    """
    if "submit" in vars(agent):
        raise ValueError(f"{agent.name}: this agent is instrumented already")
    tracer = tracer or trace.get_tracer("agenthub", agenthub.__version__)
    submit, functions = agent.submit, agent._functions

    @functools.wraps(submit)
    async def traced_submit(capability: str | None = None, input: Any = None, **options: Any) -> agenthub.TaskHandle:
        name = f"invoke_agent {capability or options.get('agent_id')}"
        span = tracer.start_span(name, kind=SpanKind.CLIENT, attributes={"gen_ai.operation.name": "invoke_agent"})
        carrier: dict[str, str] = dict(options.pop("trace", None) or {})
        propagate.inject(carrier, trace.set_span_in_context(span))
        try:
            handle = await submit(capability, input, trace=carrier, **options)
        except BaseException as error:
            end(span, error)
            raise
        set_task(span, handle.task_id, capability)
        handle.add_done_callback(functools.partial(end_with_outcome, span))
        return handle

    @contextmanager
    def traced_task(task: agenthub.Task) -> Iterator[None]:
        parent = propagate.extract(task.trace)
        name = f"process {task.capability or agent.name}"
        with tracer.start_as_current_span(
            name, parent, SpanKind.SERVER, record_exception=False, set_status_on_exception=False
        ) as span:
            span.set_attributes({"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": agent.name})
            span.set_attribute("gen_ai.agent.id", agent.agent_id or "")
            set_task(span, task.task_id, task.capability)
            try:
                yield
            except BaseException as error:
                set_error(span, error)
                raise

    agent.submit = traced_submit  # type: ignore[method-assign]  # Of this agent only, so no subclass.
    functions.around_task = traced_task
    return agent


def set_task(span: Span, task_id: str, capability: str | None) -> None:
    span.set_attribute("messaging.message.id", task_id)
    if capability is not None:
        span.set_attribute("messaging.destination.name", capability)


def set_error(span: Span, error: BaseException) -> None:
    """Say how a span failed: by the code of the hub's errors, else by the type of the exception."""
    code = error.code if isinstance(error, agenthub.AgentHubError) else type(error).__name__
    span.set_attribute("error.type", code)
    span.set_status(Status(StatusCode.ERROR, str(error)))


def end(span: Span, error: BaseException | None) -> None:
    if error is not None:
        set_error(span, error)
    span.end()


def end_with_outcome(span: Span, handle: agenthub.TaskHandle) -> None:
    """End the span of a delegated task: with its worker, and the error if it failed."""
    outcome = handle.outcome
    if outcome is not None and outcome.sender is not None:
        span.set_attribute("gen_ai.agent.id", outcome.sender)
    failure = outcome.error if outcome is not None else None
    end(span, agenthub.TaskFailed(failure.message, code=failure.code) if failure is not None else None)
