"""All of AgentHub in one process: hub, worker and requester over links in memory. There is no worker to start."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator

from agenthub import Agent, LocalHub
from benchmarks.ends import Ask, run_end
from benchmarks.ends.agenthub import asker, make_worker


@contextlib.asynccontextmanager
async def working(url: str) -> AsyncIterator[None]:
    raise ValueError("its worker is in the requester's process")
    yield


@contextlib.asynccontextmanager
async def asking(url: str) -> AsyncIterator[Ask]:
    worker = make_worker()
    worker.use_hub(hub := LocalHub())
    async with hub, worker, Agent("echo-requester", hub=hub) as agent:
        yield asker(agent)


if __name__ == "__main__":
    sys.exit(run_end(working, asking))
