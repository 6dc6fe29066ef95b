"""Tracing: the spans of agents, collected by the in-memory exporter of OpenTelemetry's SDK."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

import agenthub
from agenthub import Agent, LocalHub, Refused, Task, TaskFailed

pytest.importorskip("opentelemetry.sdk", reason="the package opentelemetry-sdk is not installed")

import itertools

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, Tracer

from agenthub_otel import instrument
from tests.support import WAIT_S


class Spans:
    """A tracer, and what it has made."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer: Tracer = provider.get_tracer("test")

    def of_name(self, name: str) -> ReadableSpan:
        (span,) = (span for span in self.exporter.get_finished_spans() if span.name == name)
        return span

    async def ended(self, count: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.exporter.get_finished_spans()) < count:
                await asyncio.sleep(0.005)


@pytest.fixture
def spans() -> Iterator[Spans]:
    return Spans()


def agent_of(spans: Spans, hub: LocalHub, name: str, *functions: Any) -> Agent:
    agent = Agent(name, hub=hub)
    for function in functions:
        agent.capability(function)
    return instrument(agent, spans.tracer)


async def test_chain_of_three_agents_is_one_trace(spans: Spans) -> None:
    async def outer(task: Task) -> Any:
        return await task.delegate("inner", 1)

    def inner(task: Task) -> Any:
        return task.run(task.delegate("innermost", 2))  # In a thread.

    async def innermost(task: Task) -> Any:
        return task.trace

    async with LocalHub() as hub:
        agents = [agent_of(spans, hub, one.__name__, one) for one in (outer, inner, innermost)]
        async with agents[0], agents[1], agents[2], agent_of(spans, hub, "me") as me:
            carried = await me.delegate("outer")
            await spans.ended(6)
    names = ["invoke_agent outer", "process outer", "invoke_agent inner", "process inner"]
    chain = [spans.of_name(name) for name in (*names, "invoke_agent innermost", "process innermost")]
    assert len({span.context.trace_id for span in chain if span.context}) == 1
    assert chain[0].parent is None
    for parent, child in itertools.pairwise(chain):
        assert parent.context is not None
        assert child.parent is not None
        assert child.parent.span_id == parent.context.span_id
        assert child.parent.trace_id == parent.context.trace_id
    assert [span.kind for span in chain] == [SpanKind.CLIENT, SpanKind.SERVER] * 3
    assert set(carried) == {"traceparent"}


async def test_spans_say_what_was_done_by_whom(spans: Spans) -> None:
    async def work(task: Task) -> None: ...

    async with LocalHub() as hub, agent_of(spans, hub, "worker", work) as worker, agent_of(spans, hub, "me") as me:
        handle = await me.submit("work")
        await handle.result()
        await spans.ended(2)
        both = {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.id": worker.agent_id}
        both |= {"messaging.message.id": handle.task_id, "messaging.destination.name": "work"}
        assert dict(spans.of_name("invoke_agent work").attributes or {}) == both
        assert dict(spans.of_name("process work").attributes or {}) == both | {"gen_ai.agent.name": "worker"}
        assert spans.of_name("process work").status.status_code is StatusCode.UNSET


async def test_failures_are_errors_of_both_spans(spans: Spans) -> None:
    async def fail() -> None:
        raise TaskFailed("out of ink", code="ink")

    async def crash() -> None:
        raise KeyError("x")

    async with LocalHub() as hub, agent_of(spans, hub, "worker", fail, crash), agent_of(spans, hub, "me") as me:
        for capability, theirs, ours in (("fail", "ink", "ink"), ("crash", "KeyError", "failed")):
            spans.exporter.clear()
            with pytest.raises(TaskFailed):
                await me.delegate(capability)
            await spans.ended(2)
            found = [spans.of_name(f"{kind} {capability}") for kind in ("process", "invoke_agent")]
            assert [span.status.status_code for span in found] == [StatusCode.ERROR] * 2
            assert [(span.attributes or {})["error.type"] for span in found] == [theirs, ours]
        spans.exporter.clear()
        with pytest.raises(Refused):
            await me.delegate("nobody")
        assert (spans.of_name("invoke_agent nobody").attributes or {})["error.type"] == "no_agent"


async def test_trace_of_another_system_is_continued_and_kept(spans: Spans) -> None:
    async def work(task: Task) -> Any:
        return task.trace

    async with LocalHub() as hub:
        worker = agent_of(spans, hub, "worker", work)
        async with worker, Agent("me", hub=hub) as me:
            trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "x": "y"}
            assert await me.delegate("work", trace=trace) == trace
            await spans.ended(1)
    parent = spans.of_name("process work").parent
    assert parent is not None
    assert f"{parent.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"


async def test_stream_and_cancellation_end_their_spans(spans: Spans) -> None:
    async def count() -> Any:
        for number in range(1000):
            yield number
            await asyncio.sleep(0.01)

    async with LocalHub() as hub, agent_of(spans, hub, "worker", count), agent_of(spans, hub, "me") as me:
        async for _ in me.stream("count"):
            break
        await spans.ended(2)
        assert (spans.of_name("invoke_agent count").attributes or {})["error.type"] == "cancelled"


def test_agent_is_instrumented_once(spans: Spans) -> None:
    agent = instrument(Agent("a"), spans.tracer)
    with pytest.raises(ValueError, match="a: this agent is instrumented already"):
        instrument(agent)


async def test_handle_tells_when_its_task_has_ended() -> None:
    async def work() -> int:
        return 1

    told: list[agenthub.TaskHandle] = []
    worker = Agent("worker")
    worker.capability(work)
    async with LocalHub() as hub:
        worker.use_hub(hub)
        async with worker, Agent("me", hub=hub) as me:
            handle = await me.submit("work")
            handle.add_done_callback(told.append)
            await handle.result()
            handle.add_done_callback(told.append)
            await asyncio.sleep(0.01)
    assert told == [handle, handle]
