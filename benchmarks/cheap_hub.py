"""A fake hub for one agent that needs very little CPU time, so that the agent is the bottleneck.

It acknowledges a task from a requester and ends it at once, with its input as the output. It assigns tasks to a worker,
so that `--open` of them are always open, and prints `measuring` and a line of figures like the requesters in
benchmarks.ends; their CPU time is that of this process.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import itertools
import json
import sys
import time
import typing
from typing import Any

from websockets.frames import apply_mask

from agenthub import frame_header, run_loop
from benchmarks.ends import Load, add_load_options, figures_of, load_of

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3.
TTL_S = 300.0
TEXT, CLOSE, PING = 0x81, 0x88, 0x89  # The first bytes of whole frames.
REGISTERED: dict[str, Any] = {
    "type": "register",
    "agent_id": "a",
    "resume": "r",
    "heartbeat_s": 30.0,
    "max_bytes": 1 << 20,
    "tasks": [],
}


class Frames(asyncio.Protocol):
    """The server's end of a WebSocket for well-behaved clients: no fragments, and one write per chunk read."""

    def __init__(self) -> None:
        self._unread = b""
        self._is_open = False
        self._out: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = typing.cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._unread += data
        if not self._is_open:
            self._open()
        at = 0
        while self._is_open and (end := self._frame(at)):
            at = end
        self._unread = self._unread[at:]
        self.flush()

    def _open(self) -> None:
        head, separator, rest = self._unread.partition(b"\r\n\r\n")
        if not separator:
            return
        fields = dict(line.lower().split(b": ", 1)[:1] + line.split(b": ", 1)[1:] for line in head.split(b"\r\n")[1:])
        accepted = base64.b64encode(hashlib.sha1(fields[b"sec-websocket-key"] + GUID).digest())
        answer = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        self.transport.write(b"%sSec-WebSocket-Accept: %s\r\n\r\n" % (answer, accepted))
        self._is_open, self._unread = True, rest

    def _frame(self, at: int) -> int:
        """Handle the frame at this offset; return the offset of its end, or 0 if it is incomplete."""
        raw = self._unread
        if len(raw) < at + 14:  # The longest header. A close is shorter, and the last frame.
            short = len(raw) >= at + 6 and raw[at] == CLOSE
            if short:
                self.transport.close()
            return 0
        length, start = raw[at + 1] & 0x7F, at + 6
        if length > 125:
            size = 2 if length == 126 else 8
            length, start = int.from_bytes(raw[at + 2 : at + 2 + size]), start + size
        end = start + length
        if len(raw) < end:
            return 0
        if raw[at] == TEXT:
            self.received(json.loads(apply_mask(raw[start:end], raw[start - 4 : start])))
        elif raw[at] == CLOSE:
            self.transport.close()
        return end

    def send(self, raw: bytes) -> None:
        self._out += (frame_header(len(raw)), raw)

    def flush(self) -> None:
        if self._out:
            self.transport.write(b"".join(self._out))
            self._out.clear()

    def received(self, message: dict[str, Any]) -> None:
        raise NotImplementedError


class CheapHub(Frames):
    """The hub's end of one connection."""

    def __init__(self, load: Load, capability: str) -> None:
        super().__init__()
        self.began: dict[str, float] = {}  # The start of each open task.
        self.latencies_s: list[float] = []
        self.worker = asyncio.get_running_loop().create_future()
        task = {"type": "delegate", "task_id": "ID", "sender": "s", "agent_id": "a", "capability": capability}
        rest = {"ttl": TTL_S, "priority": 0, "max_retries": 0, "parent_id": None, "attempt": 1}
        self._task = json.dumps({**task, "input": load.payload, **rest}).encode().partition(b"ID")
        self._numbers = itertools.count()

    def received(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "delegate":
            self.acknowledge(message, b"in_progress")
            outcome = {
                "type": "result",
                "sender": "w",
                "success": True,
                "state": "completed",
                "error": None,
                "attempt": 1,
            }
            self.send(json.dumps({**outcome, "task_id": message["task_id"], "output": message["input"]}).encode())
        elif kind == "result":
            self.acknowledge(message, b"completed")
            self.latencies_s.append(time.perf_counter() - self.began.pop(message["task_id"]))
            self.assign()
        else:
            self.answer(kind, message)

    def acknowledge(self, message: dict[str, Any], state: bytes) -> None:
        ids = (message["id"].encode(), message["task_id"].encode(), state)
        self.send(b'{"type":"status","reply_to":"%s","task_id":"%s","state":"%s","attempt":1}' % ids)

    def answer(self, kind: str, message: dict[str, Any]) -> None:
        """Reply to a rare message."""
        replies: dict[str, dict[str, Any]] = {
            "register": REGISTERED,
            "heartbeat": {"type": "heartbeat_ack"},
            "deregister": {"type": "deregister"},
        }
        self.send(json.dumps({**replies[kind], "reply_to": message["id"]}).encode())
        if message.get("capabilities") and not self.worker.done():
            self.worker.set_result(None)

    def assign(self) -> None:
        task_id = f"t{next(self._numbers)}"
        self.began[task_id] = time.perf_counter()
        before, _, after = self._task
        self.send(before + task_id.encode() + after)


async def serve(load: Load, capability: str) -> None:
    """Print the URL, measure the first agent with capabilities, and serve until cancelled."""
    connections: asyncio.Queue[CheapHub] = asyncio.Queue()

    def connected() -> CheapHub:
        connection = CheapHub(load, capability)
        connections.put_nowait(connection)
        return connection

    server = await asyncio.get_running_loop().create_server(connected, "127.0.0.1", 0)
    print(f"listening on ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    worker = await connections.get()
    await worker.worker
    for _ in range(load.tasks_open):
        worker.assign()
    worker.flush()
    await asyncio.sleep(load.warm_up_s)
    print("measuring", flush=True)
    worker.latencies_s.clear()
    began, cpu_began = time.perf_counter(), time.process_time()
    await asyncio.sleep(load.seconds)
    figures = figures_of(worker.latencies_s, time.perf_counter() - began, time.process_time() - cpu_began)
    print(json.dumps(figures), flush=True)
    await asyncio.Event().wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cheap_hub", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--capability", default="echo", help="the capability of the tasks for a worker")
    add_load_options(parser)
    args = parser.parse_args()
    try:
        run_loop(serve(load_of(args), args.capability), args.loop)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
