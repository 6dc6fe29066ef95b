"""Both ends with AgentHub's own SDK: `await agent.delegate(...)`, and handlers, one async and one plain."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator

from agenthub import Agent
from benchmarks.ends import Ask, Payload, run_end

MAX_TASKS = 1000


async def echo(text: str) -> Payload:
    """Give back what came."""
    return {"text": text}


def echo_in_thread(text: str) -> Payload:
    """Give back what came, from a thread."""
    return {"text": text}


def make_worker(url: str | None = None) -> Agent:
    """Return an agent with both handlers: the capabilities `echo` and `echo-in-thread`."""
    agent = Agent("echo-worker", url=url, max_tasks=MAX_TASKS)
    agent.capability("echo")(echo)
    agent.capability("echo-in-thread")(echo_in_thread)
    return agent


@contextlib.asynccontextmanager
async def working(url: str) -> AsyncIterator[None]:
    async with make_worker(url):
        yield


@contextlib.asynccontextmanager
async def asking(url: str) -> AsyncIterator[Ask]:
    async with Agent("echo-requester", url=url) as agent:
        yield asker(agent)


def asker(agent: Agent) -> Ask:
    async def ask(payload: Payload) -> Payload:
        answer: Payload = await agent.delegate("echo", payload)
        return answer

    return ask


if __name__ == "__main__":
    sys.exit(run_end(working, asking))
