"""Measure what a call over the A2A gateway costs, next to the hub's own: `python -m tests.a2a_latency [CALLS]`.

A hub, a worker and a gateway run in processes of their own. Calls by the SDK and by A2A clients alternate, so that both
see the same machine; the clients' own CPU time is not counted. Reads /proc, so it needs Linux.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
from a2a import client as a2a_client
from a2a.types import a2a_pb2 as pb

from agenthub import Agent
from tests.support import hub_process, running

WORKER = "import agenthub\na = agenthub.Agent('w')\na.capability('echo')(lambda text: text)\na.run()"


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def measure(url: str, gateway: str, pids: dict[str, int], calls: int) -> None:
    async with Agent("me", url=url) as me, httpx.AsyncClient(timeout=30) as http:
        while not await me.discover("echo"):
            await asyncio.sleep(0.05)
        config = a2a_client.ClientConfig(httpx_client=http, streaming=False)
        client = await a2a_client.ClientFactory(config).create_from_url(f"{gateway}/a2a/echo")
        streaming = await a2a_client.ClientFactory(a2a_client.ClientConfig(httpx_client=http)).create_from_url(
            f"{gateway}/a2a/echo"
        )

        async def by_hub() -> None:
            assert await me.delegate("echo", {"text": "hi"}) == "hi"

        async def by(a2a: a2a_client.Client) -> None:
            message = pb.Message(message_id=uuid.uuid4().hex, role=pb.ROLE_USER, parts=[pb.Part(text="hi")])
            async for _ in a2a.send_message(pb.SendMessageRequest(message=message)):
                pass

        async def by_curl() -> None:
            message = {"messageId": uuid.uuid4().hex, "role": "ROLE_USER", "parts": [{"text": "hi"}]}
            path = f"{gateway}/a2a/echo/rest/message:send"
            answer = await http.post(path, json={"message": message}, headers={"A2A-Version": "1.0"})
            assert "COMPLETED" in answer.text

        ways: dict[str, Callable[[], Awaitable[None]]] = {
            "hub": by_hub,
            "A2A, plain HTTP": by_curl,
            "A2A, a2a-sdk": lambda: by(client),
            "A2A, a2a-sdk, streaming": lambda: by(streaming),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(calls):
            for name, way in ways.items():
                begun = time.perf_counter()
                await way()
                times[name].append(time.perf_counter() - begun)
        hub_ms = statistics.median(times["hub"]) * 1e3
        for name, took in times.items():
            ms = statistics.median(took) * 1e3
            print(f"{name:<24} median {ms:6.2f} ms, {ms - hub_ms:+6.2f} ms, {ms / hub_ms:5.1f} times the hub's own")
        for name, way in ways.items():
            before = {process: cpu_s(pid) for process, pid in pids.items()}
            for _ in range(calls // 10):
                await asyncio.gather(*(way() for _ in range(10)))
            used = {process: (cpu_s(pid) - before[process]) / calls * 1e3 for process, pid in pids.items()}
            print(f"{name:<24} CPU per task: " + ", ".join(f"{process} {ms:.2f} ms" for process, ms in used.items()))


def main(calls: str = "500") -> None:
    with hub_process() as (url, hub):
        command = ["-m", "agenthub", "a2a", "--port", "0", "--url", url, "--name", f"latency-{os.getpid()}"]
        with running("-c", WORKER, env={"AGENTHUB_URL": url}), running(*command) as gateway:
            assert gateway.stdout is not None
            address = gateway.stdout.readline().split()[-1]
            asyncio.run(measure(url, address, {"hub": hub.pid, "gateway": gateway.pid}, int(calls)))


if __name__ == "__main__":
    main(*sys.argv[1:])
