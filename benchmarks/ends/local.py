"""Hub, worker and requester in one process, connected in memory. This end has no separate worker."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator

from agenthub import Agent, LocalHub
from benchmarks.ends import DelegateOne, run_end
from benchmarks.ends.agenthub import delegate_one, make_worker


@contextlib.asynccontextmanager
async def worker(url: str) -> AsyncIterator[None]:
    raise ValueError("the worker runs in the requester's process")
    yield


@contextlib.asynccontextmanager
async def requester(url: str) -> AsyncIterator[DelegateOne]:
    echo_worker = make_worker()
    echo_worker.use_hub(hub := LocalHub())
    async with hub, echo_worker, Agent("echo-requester", hub=hub) as agent:
        yield delegate_one(agent)


if __name__ == "__main__":
    sys.exit(run_end(worker, requester))
