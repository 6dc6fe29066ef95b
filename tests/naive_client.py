"""A client that knows nothing of lost connections and failures, for the tests of clients/conformance.py."""

import asyncio
import contextlib
import json
import os

from tests.raw_websocket import ConnectionClosed, connect

CAPABILITIES = ["echo", "sleep", "fail", "relay"]


async def main() -> None:
    async with connect(os.environ["AGENTHUB_URL"]) as connection:
        await connection.send(
            json.dumps({"type": "register", "id": "1", "name": "naive", "capabilities": CAPABILITIES})
        )
        while True:
            message = json.loads(await connection.recv())
            if message["type"] == "delegate":
                task_id, output = message["task_id"], message["input"]
                result = {"type": "result", "id": task_id, "task_id": task_id, "success": True, "output": output}
                await connection.send(json.dumps(result))


if __name__ == "__main__":
    with contextlib.suppress(ConnectionClosed):
        asyncio.run(main())
