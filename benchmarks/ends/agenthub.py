"""Both ends with AgentHub's SDK: `await agent.delegate(...)`, an async handler and a plain handler."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator

from agenthub import Agent
from benchmarks.ends import DelegateOne, Payload, run_end

MAX_TASKS = 1000


async def echo(text: str) -> Payload:
    """Return the input."""
    return {"text": text}


def echo_in_thread(text: str) -> Payload:
    """Return the input from a thread."""
    return {"text": text}


def make_worker(url: str | None = None) -> Agent:
    """Return an agent with both handlers, for the capabilities `echo` and `echo-in-thread`."""
    agent = Agent("echo-worker", url=url, max_tasks=MAX_TASKS)
    agent.capability("echo")(echo)
    agent.capability("echo-in-thread")(echo_in_thread)
    return agent


@contextlib.asynccontextmanager
async def worker(url: str) -> AsyncIterator[None]:
    async with make_worker(url):
        yield


@contextlib.asynccontextmanager
async def requester(url: str) -> AsyncIterator[DelegateOne]:
    async with Agent("echo-requester", url=url) as agent:
        yield delegate_one(agent)


def delegate_one(agent: Agent) -> DelegateOne:
    async def delegate(payload: Payload) -> Payload:
        answer: Payload = await agent.delegate("echo", payload)
        return answer

    return delegate


if __name__ == "__main__":
    sys.exit(run_end(worker, requester))
