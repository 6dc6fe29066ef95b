"""A hub as it is often written first: FastAPI, a request per task that is answered with its result, and long polls.

It keeps its tasks in memory and knows no deadlines: something to compare with, not to use. Needs fastapi and uvicorn.
`python -m benchmarks.http_hub` prints where it listens.
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

POLL_S = 10.0  # How long a worker's poll is held open without a task.

app = FastAPI()
numbers = itertools.count(1)
queues: dict[str, asyncio.Queue[dict[str, Any]]] = collections.defaultdict(asyncio.Queue)
open_tasks: dict[int, asyncio.Future[bytes]] = {}


@app.post("/tasks/{capability}")
async def post_task(capability: str, request: Request) -> Response:
    """Take a task, and answer with its output when a worker has posted that."""
    number, output = next(numbers), asyncio.get_running_loop().create_future()
    open_tasks[number] = output
    try:
        queues[capability].put_nowait({"id": number, "input": await request.json()})
        return Response(await output, media_type="application/json")
    finally:
        del open_tasks[number]


@app.get("/next/{capability}", response_model=None)
async def get_work(capability: str) -> dict[str, Any] | Response:
    """Give a worker the next task, or 204 if none comes for a while."""
    try:
        async with asyncio.timeout(POLL_S):
            return await queues[capability].get()
    except TimeoutError:
        return Response(status_code=204)


@app.post("/results/{number}", status_code=204)
async def post_result(number: int, request: Request) -> None:
    """Take a task's output."""
    output = open_tasks.get(number)
    if output is None or output.done():
        raise HTTPException(404, "no open task has that number")
    output.set_result(await request.body())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.http_hub", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=0, help="the port to listen on; 0 takes a free one")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio", help="the event loop")
    args = parser.parse_args()
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # Only so is TCP_NODELAY set.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((args.host, args.port))
    address, port = listener.getsockname()
    print(f"listening on http://{address}:{port}", flush=True)
    config = uvicorn.Config(app, loop=args.loop, log_level="critical", access_log=False, timeout_graceful_shutdown=1)
    uvicorn.Server(config).run([listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
