"""Both ends with aiohttp, for benchmarks/http_hub.py: a request per task, a long poll and a request per result."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import ClientSession, TCPConnector

from benchmarks.ends import DelegateOne, Payload, run_concurrently, run_end


@contextlib.asynccontextmanager
async def worker(url: str) -> AsyncIterator[None]:
    async with ClientSession(url, connector=TCPConnector(limit=0), raise_for_status=True) as client:

        async def work() -> None:
            async with client.get("/next/echo") as response:
                task = await response.json() if response.status == 200 else None
            if task is not None:
                output = {"text": task["input"]["text"]}
                async with client.post(f"/results/{task['id']}", json=output) as response:
                    await response.read()

        async with run_concurrently(work):
            yield


@contextlib.asynccontextmanager
async def requester(url: str) -> AsyncIterator[DelegateOne]:
    async with ClientSession(url, connector=TCPConnector(limit=0), raise_for_status=True) as client:

        async def delegate(payload: Payload) -> Any:
            async with client.post("/tasks/echo", json=payload) as response:
                return await response.json()

        yield delegate


if __name__ == "__main__":
    sys.exit(run_end(worker, requester))
