"""Both ends with autobahn on asyncio: a WAMP call and a registered procedure, through a Crossbar router."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

from autobahn.asyncio.wamp import ApplicationRunner, ApplicationSession
from autobahn.wamp.types import RegisterOptions

from benchmarks.ends import DelegateOne, Payload, run_end

REALM, PROCEDURE = "bench", "bench.echo"


async def echo(payload: Payload) -> Payload:
    return {"text": payload["text"]}


@contextlib.asynccontextmanager
async def _session(url: str) -> AsyncIterator[Any]:
    """Yield a session that has joined the realm. The runner cannot be used as usual, because it starts its own loop."""
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
async def worker(url: str) -> AsyncIterator[None]:
    async with _session(url) as session:
        await session.register(echo, PROCEDURE, options=RegisterOptions(invoke="roundrobin"))
        yield


@contextlib.asynccontextmanager
async def requester(url: str) -> AsyncIterator[DelegateOne]:
    async with _session(url) as session:

        async def delegate(payload: Payload) -> Any:
            return await session.call(PROCEDURE, payload)

        yield delegate


if __name__ == "__main__":
    sys.exit(run_end(worker, requester))
