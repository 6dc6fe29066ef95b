"""A simple hub with FastAPI: one request per task, which returns the result, and long polls for workers.

It keeps tasks in memory and has no deadlines; it is for comparison, not for use. It requires fastapi and uvicorn.
`python -m benchmarks.http_hub` prints its URL.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import socket
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response

POLL_S = 10.0  # Timeout of a worker's poll.

app = FastAPI()
numbers = itertools.count(1)
queues: dict[str, asyncio.Queue[dict[str, Any]]] = collections.defaultdict(asyncio.Queue)
open_tasks: dict[int, asyncio.Future[bytes]] = {}


@app.post("/tasks/{capability}")
async def post_task(capability: str, request: Request) -> Response:
    """Accept a task, and return its output once a worker has posted it."""
    number, output = next(numbers), asyncio.get_running_loop().create_future()
    open_tasks[number] = output
    try:
        queues[capability].put_nowait({"id": number, "input": await request.json()})
        return Response(await output, media_type="application/json")
    finally:
        del open_tasks[number]


@app.get("/next/{capability}", response_model=None)
async def get_work(capability: str) -> dict[str, Any] | Response:
    """Return the next task, or 204 after a timeout."""
    try:
        async with asyncio.timeout(POLL_S):
            return await queues[capability].get()
    except TimeoutError:
        return Response(status_code=204)


@app.post("/results/{number}", status_code=204)
async def post_result(number: int, request: Request) -> None:
    """Accept the output of a task."""
    output = open_tasks.get(number)
    if output is None or output.done():
        raise HTTPException(404, "no open task has this number")
    output.set_result(await request.body())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.http_hub", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=0, help="the port to listen on; 0 takes a free one")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio", help="the event loop")
    args = parser.parse_args()
    listener = socket.socket(
        socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )  # asyncio sets TCP_NODELAY only with this protocol.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((args.host, args.port))
    address, port = listener.getsockname()
    print(f"listening on http://{address}:{port}", flush=True)
    config = uvicorn.Config(app, loop=args.loop, log_level="critical", access_log=False, timeout_graceful_shutdown=1)
    uvicorn.Server(config).run([listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
