"""Both ends with nats-py: request and reply of NATS core, with the workers in a queue group."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

from nats import connect

from benchmarks.ends import TASK_S, DelegateOne, Payload, run_end

SUBJECT, GROUP = "echo", "workers"


async def echo(message: Any) -> None:
    payload = json.loads(message.data)
    await message.respond(json.dumps({"text": payload["text"]}).encode())


@contextlib.asynccontextmanager
async def worker(url: str) -> AsyncIterator[None]:
    connection = await connect(url)
    try:
        await connection.subscribe(SUBJECT, queue=GROUP, cb=echo)
        await connection.flush()
        yield
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def requester(url: str) -> AsyncIterator[DelegateOne]:
    connection = await connect(url)

    async def delegate(payload: Payload) -> Any:
        reply = await connection.request(SUBJECT, json.dumps(payload).encode(), timeout=TASK_S)
        return json.loads(reply.data)

    try:
        yield delegate
    finally:
        await connection.close()


if __name__ == "__main__":
    sys.exit(run_end(worker, requester))
