"""Both ends with redis-py: a list of tasks for all workers (RPUSH, BLPOP), and a list of answers for each requester."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from redis.asyncio import Redis

from benchmarks.ends import Ask, Payload, Replies, run_end, side_by_side

QUEUE = "tasks:echo"
POLL_S = 10  # How long one BLPOP waits; then it is sent again.
READERS = 4  # Of the list of answers: one alone would be waiting for its own round trips.


async def _pop(client: Redis, key: str) -> Any:
    """Return the next entry of a list, as JSON; None if none came for POLL_S seconds."""
    popped = await client.blpop([key], timeout=POLL_S)
    return None if popped is None else json.loads(popped[1])


@contextlib.asynccontextmanager
async def working(url: str) -> AsyncIterator[None]:
    async with Redis.from_url(url, socket_timeout=None) as client:

        async def work() -> None:
            task = await _pop(client, QUEUE)
            if task is not None:
                answer = {"id": task["id"], "output": {"text": task["input"]["text"]}}
                await client.rpush(task["reply_to"], json.dumps(answer))

        await client.ping()
        async with side_by_side(work):
            yield


@contextlib.asynccontextmanager
async def asking(url: str) -> AsyncIterator[Ask]:
    replies, own_list = Replies(), f"answers:{os.getpid()}"
    async with Redis.from_url(url, socket_timeout=None) as client:

        async def read() -> None:
            answer = await _pop(client, own_list)
            if answer is not None:
                replies.settle(answer["id"], answer["output"])

        async def ask(payload: Payload) -> Any:
            with replies.expected() as (number, output):
                await client.rpush(QUEUE, json.dumps({"id": number, "reply_to": own_list, "input": payload}))
                return await output

        async with side_by_side(read, READERS):
            yield ask


if __name__ == "__main__":
    sys.exit(run_end(working, asking))
