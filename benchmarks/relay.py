"""The baseline of comparisons: a relay on the asyncio API of `websockets` with as little logic as possible.

It implements just enough of the protocol for `benchmarks.load`, with the same messages per task, and nothing else of
a hub: it validates nothing, tasks have no state, deadline or retries, and a task is lost when its worker disconnects.
`python -m benchmarks.relay` prints its URL.
"""

import asyncio
import collections
import contextlib
import json
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

agents: dict[str, ServerConnection] = {}
pools: dict[str, collections.deque[str]] = collections.defaultdict(collections.deque)  # Agents, by capability.
requesters: dict[str, ServerConnection] = {}  # By task.


async def relay(connection: ServerConnection, message: dict[str, Any], me: str) -> None:
    reply: dict[str, Any] = {"type": "status", "reply_to": message["id"]}
    if message["type"] == "register":
        agents[me] = connection
        for capability in message["capabilities"]:
            pools[capability].append(me)
        reply |= {"type": "register", "agent_id": me}
    elif message["type"] == "delegate":
        requesters[message["task_id"]] = connection
        if "agent_id" not in message:
            pools[message["capability"]].rotate()
        worker = message.get("agent_id") or pools[message["capability"]][0]
        await agents[worker].send(json.dumps({**message, "sender": me}))
    elif message["type"] == "result":
        await requesters.pop(message["task_id"]).send(json.dumps({**message, "sender": me}))
    elif message["type"] == "heartbeat":
        reply["type"] = "heartbeat_ack"
    elif message["type"] == "deregister":
        await connection.close()
    await connection.send(json.dumps(reply))


async def serve_agent(connection: ServerConnection) -> None:
    me = f"agent-{id(connection)}"
    try:
        with contextlib.suppress(ConnectionClosed):
            async for raw in connection:
                await relay(connection, json.loads(raw), me)
    finally:
        agents.pop(me, None)
        for pool in pools.values():
            if me in pool:
                pool.remove(me)


async def main() -> None:
    async with serve(serve_agent, "127.0.0.1", 0, compression=None, max_size=None, ping_interval=None) as server:
        print(f"listening on ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await asyncio.Future()


if __name__ == "__main__":
    asyncio.run(main())
