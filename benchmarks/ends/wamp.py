"""Both ends with autobahn on asyncio: a call and a registered procedure of WAMP, by way of a Crossbar router."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

from autobahn.asyncio.wamp import ApplicationRunner, ApplicationSession
from autobahn.wamp.types import RegisterOptions

from benchmarks.ends import Ask, Payload, run_end

REALM, PROCEDURE = "bench", "bench.echo"


async def echo(payload: Payload) -> Payload:
    return {"text": payload["text"]}


@contextlib.asynccontextmanager
async def _session(url: str) -> AsyncIterator[Any]:
    """Give a session that has joined the realm; the runner's way, without its own loop."""
    joined: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    class Session(ApplicationSession):
        async def onJoin(self, details: Any) -> None:
            joined.set_result(self)

    transport, _ = await ApplicationRunner(url, REALM).run(Session, start_loop=False)
    try:
        async with asyncio.timeout(10):
            session = await joined
        yield session
        await session.leave()
    finally:
        transport.close()


@contextlib.asynccontextmanager
async def working(url: str) -> AsyncIterator[None]:
    async with _session(url) as session:
        await session.register(echo, PROCEDURE, options=RegisterOptions(invoke="roundrobin"))
        yield


@contextlib.asynccontextmanager
async def asking(url: str) -> AsyncIterator[Ask]:
    async with _session(url) as session:

        async def ask(payload: Payload) -> Any:
            return await session.call(PROCEDURE, payload)

        yield ask


if __name__ == "__main__":
    sys.exit(run_end(working, asking))
