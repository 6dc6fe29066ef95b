"""Both ends with redis-py: one list of tasks for all workers (RPUSH, BLPOP), one list of outputs per requester."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from redis.asyncio import Redis

from benchmarks.ends import DelegateOne, Payload, PendingOutputs, run_concurrently, run_end

QUEUE = "tasks:echo"
POLL_S = 10  # Timeout of one BLPOP, which is then repeated.
READERS = 4  # Concurrent readers of the outputs: a single one would spend its time in round trips.


async def _pop(client: Redis, key: str) -> Any:
    """Return the next entry of a list, parsed as JSON, or None after POLL_S seconds."""
    popped = await client.blpop([key], timeout=POLL_S)
    return None if popped is None else json.loads(popped[1])


@contextlib.asynccontextmanager
async def worker(url: str) -> AsyncIterator[None]:
    async with Redis.from_url(url, socket_timeout=None) as client:

        async def work() -> None:
            task = await _pop(client, QUEUE)
            if task is not None:
                result = {"id": task["id"], "output": {"text": task["input"]["text"]}}
                await client.rpush(task["reply_to"], json.dumps(result))

        await client.ping()
        async with run_concurrently(work):
            yield


@contextlib.asynccontextmanager
async def requester(url: str) -> AsyncIterator[DelegateOne]:
    outputs, own_list = PendingOutputs(), f"outputs:{os.getpid()}"
    async with Redis.from_url(url, socket_timeout=None) as client:

        async def read() -> None:
            result = await _pop(client, own_list)
            if result is not None:
                outputs.deliver(result["id"], result["output"])

        async def delegate(payload: Payload) -> Any:
            with outputs.expected() as (number, output):
                await client.rpush(QUEUE, json.dumps({"id": number, "reply_to": own_list, "input": payload}))
                return await output

        async with run_concurrently(read, READERS):
            yield delegate


if __name__ == "__main__":
    sys.exit(run_end(worker, requester))
