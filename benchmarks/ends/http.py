"""Both ends with aiohttp, for benchmarks/http_hub.py: a request per task, a long poll and a request per result."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import ClientSession, TCPConnector

from benchmarks.ends import Ask, Payload, run_end, side_by_side


@contextlib.asynccontextmanager
async def working(url: str) -> AsyncIterator[None]:
    async with ClientSession(url, connector=TCPConnector(limit=0), raise_for_status=True) as client:

        async def work() -> None:
            async with client.get("/next/echo") as response:
                task = await response.json() if response.status == 200 else None
            if task is not None:
                output = {"text": task["input"]["text"]}
                async with client.post(f"/results/{task['id']}", json=output) as response:
                    await response.read()

        async with side_by_side(work):
            yield


@contextlib.asynccontextmanager
async def asking(url: str) -> AsyncIterator[Ask]:
    async with ClientSession(url, connector=TCPConnector(limit=0), raise_for_status=True) as client:

        async def ask(payload: Payload) -> Any:
            async with client.post("/tasks/echo", json=payload) as response:
                return await response.json()

        yield ask


if __name__ == "__main__":
    sys.exit(run_end(working, asking))
