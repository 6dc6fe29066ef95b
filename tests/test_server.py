"""The hub as a process, from outside: its limits, heartbeats, health page and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import agenthub
from agenthub import HubServer, HubSettings
from tests.raw_websocket import HANDSHAKE, ConnectionClosed, InvalidStatus, raw_socket
from tests.support import WAIT_S, RawClient, hub_process, raw_client, running

posix_signals = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent to a process as on POSIX")
linux_memory = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")

STATUS_TEXT = json.dumps({"type": "status", "id": "1"})


def padded(bytes_count: int, **message: Any) -> str:
    """Return a message of exactly this many bytes, padded by an unknown field."""
    text = json.dumps({**message, "padding": ""}, separators=(",", ":"))
    return text[:-2] + "x" * (bytes_count - len(text)) + '"}'


@contextlib.asynccontextmanager
async def deaf_client(url: str) -> AsyncIterator[RawClient]:
    """Open a connection with the smallest receive buffer, for a client that does not read."""
    address = urlsplit(url)
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plain.connect((address.hostname, address.port))
    plain.setblocking(False)
    async with raw_client(url, sock=plain, max_queue=1, max_size=math.inf) as client:
        try:
            yield client
        finally:
            client.connection.transport.abort()  # A close would wait behind data that nobody reads.


async def http(url: str, request: str) -> str:
    """Send an HTTP request to the hub's port; return all that it answers."""
    async with raw_socket(url, handshake=False) as one:
        await one.send(request.encode())
        return (await one.rest()).decode()


def resident_mb(process: subprocess.Popen[str]) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]  # Linux always says it


async def exit_code(process: subprocess.Popen[str], bound_s: float = WAIT_S) -> int:
    return await asyncio.to_thread(process.wait, bound_s)


# Limits


async def test_message_over_the_limit_closes_with_1009_and_harms_nobody_else() -> None:
    with hub_process("--max-bytes", "5000") as (url, _):
        async with raw_client(url) as whole, raw_client(url) as pieces, raw_client(url) as other:
            assert (await whole.register("ann", "big"))["max_bytes"] == 5000
            await pieces.register("bob")
            for client in (whole, pieces):
                await client.connection.send(padded(5000, type="status", id="fits"))
                assert (await client.receive())["reply_to"] == "fits"
            await whole.connection.send(padded(5001, type="status", id="too big"))
            assert await whole.closed() == 1009
            text = padded(5001, type="status", id="too big")
            await pieces.connection.send([text[:3000], text[3000:4000], text[4000:]])
            assert await pieces.closed() == 1009
            assert (await other.request(type="status"))["hub"]["agents"] == 0


async def test_who_was_closed_with_1009_may_come_back() -> None:
    with hub_process("--max-bytes", "5000") as (url, _):
        async with raw_client(url) as client, raw_client(url) as returned:
            joined = await client.register("ann")
            await client.connection.send("x" * 5001)
            assert await client.closed() == 1009
            again = await returned.register("ann", agent_id=joined["agent_id"], resume=joined["resume"])
            assert again["agent_id"] == joined["agent_id"]


async def test_hub_sends_no_message_over_its_own_limit() -> None:
    limit = 5000
    with hub_process("--max-bytes", str(limit)) as (url, _):
        async with raw_client(url, max_size=limit) as requester, raw_client(url, max_size=limit) as worker:
            await requester.register("requester", metadata={"a": "x" * 4000})
            await worker.register("worker", "work", max_tasks=100, metadata={"a": "x" * 4000})
            base = len(
                json.dumps({"type": "delegate", "task_id": "1234", "capability": "work", "input": "", "id": "1"})
            )
            for spare in (0, 50, 100, 150, 200, 250, 300):  # What is accepted may become too long when delivered.
                reply = await requester.delegate(
                    f"i{spare:03}", capability="work", input="x" * (limit - base - spare), id="1"
                )
                assert reply.get("code") == "too_large" or reply["state"] == "in_progress"
                reply = await requester.request(type="broadcast", message="x" * (limit - 60 - spare), id="1")
                assert reply.get("code") == "too_large" or reply["recipients"] == 1
            reply = await requester.delegate("output", capability="work", input="x" * 3000)
            assert reply["state"] == "in_progress"
            for spare in (60, 100, 150, 200):
                reply = await worker.request(type="status", task_id="output", detail="x" * (limit - 80 - spare), id="1")
                assert reply.get("code") == "too_large" or reply["type"] == "status"
            reply = await worker.request(type="result", task_id="output", success=True, output="x" * 3000)
            assert reply["state"] == "completed"
            assert (await requester.message("result", task_id="output"))["state"] == "completed"
            for number in range(60):
                await requester.delegate(f"task-{number}", capability="work")
            for message in ({"type": "discover"}, {"type": "status", "tasks": True}, {"task_id": "output"}):
                reply = await requester.request(**{"type": "status", **message})
                assert reply["type"] in ("discover", "status", "error")
            assert (await worker.request(type="status"))["hub"]["agents"] == 2


@linux_memory
async def test_connections_that_do_not_read_are_closed_while_others_go_on() -> None:
    with hub_process("--backlog", "300000") as (url, process):
        async with (
            raw_client(url) as sender,
            raw_client(url) as reader,
            deaf_client(url) as one,
            deaf_client(url) as two,
        ):
            await sender.register("sender")
            await reader.register("reader", "all-ears")
            await one.register("one", "deaf")
            await two.register("two", "deaf")
            before_mb = resident_mb(process)
            sent = 0
            while sent < 1000 and (await sender.request(type="discover", capability="deaf"))["total"]:
                await sender.request(type="broadcast", message={"number": sent, "filling": "x" * 50_000})
                assert (await reader.message("broadcast"))["message"]["number"] == sent
                sent += 1
            assert sent < 1000
            for number in range(300):
                await sender.request(type="broadcast", message={"number": number, "filling": "x" * 50_000})
                await reader.message("broadcast")
            assert resident_mb(process) - before_mb < 20
            for client in (one, two):
                assert await client.closed() in (4002, 1006)


@linux_memory
async def test_who_asks_and_does_not_read_the_answers_is_closed_or_held_up() -> None:
    with hub_process("--backlog", "300000") as (url, process):
        async with raw_client(url) as other, deaf_client(url) as deaf:
            await deaf.register("deaf", "something")
            await other.register("other")
            await deaf.delegate("big", capability="nobody", wait=True, input="x" * 500_000)
            before_mb = resident_mb(process)
            with contextlib.suppress(ConnectionClosed, TimeoutError):
                async with asyncio.timeout(1):
                    for _ in range(2000):
                        await deaf.send(type="status", task_id="big")
                        await asyncio.sleep(0)
            assert (await other.request(type="status"))["type"] == "status"
            assert resident_mb(process) - before_mb < 30


async def test_requester_of_a_deaf_worker_still_learns_how_its_tasks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its undelivered messages are stored anyway, so they are no reason to close it; reading nothing is."""
    monkeypatch.setattr(agenthub, "STALLED_S", 0.3)
    settings = HubSettings(grace_s=0.2)
    async with HubServer(settings, port=0, backlog_bytes_max=300_000) as hub:
        async with raw_client(hub.url) as requester, deaf_client(hub.url) as worker:
            await requester.register("requester")
            # By its id: a task for any agent with the capability would wait for another one if it came after the loss.
            agent_id = (await worker.register("worker", "work", max_tasks=500))["agent_id"]
            accepted = 0
            while accepted < 200:
                reply = await requester.delegate(f"task-{accepted}", agent_id=agent_id, input="x" * 100_000)
                if reply["type"] == "error":  # It is gone already.
                    break
                accepted += 1
            assert accepted > 10
            for number in range(accepted):
                result = await requester.message("result", task_id=f"task-{number}")
                assert result["error"]["code"] == "agent_lost"
        assert hub.hub.summary()["closed"]["4002"] == 1


async def test_small_messages_do_not_wait_for_the_receipt_of_others() -> None:
    """With Nagle's algorithm (RFC 896) a round trip took 44 ms with 16 tasks in progress."""
    async with HubServer(port=0) as hub, raw_client(hub.url) as client:
        await client.request(type="status")
        (link,) = hub.sockets
        assert link.transport is not None
        connection = link.transport.get_extra_info("socket")
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_worker_that_reads_gets_more_tasks_at_once_than_the_backlog_holds() -> None:
    hub = HubServer(port=0, backlog_bytes_max=300_000)
    async with hub, raw_client(hub.url) as requester, raw_client(hub.url) as worker:
        await requester.register("requester")
        for number in range(100):
            await requester.delegate(f"task-{number}", capability="work", input="x" * 100_000, wait=True)
        await worker.register("worker", "work", max_tasks=100)
        for number in range(100):
            assert (await worker.message("delegate"))["task_id"] == f"task-{number}"
            await worker.send(type="result", task_id=f"task-{number}", success=True, output="y" * 100_000)
        for number in range(100):
            assert (await requester.message("result", task_id=f"task-{number}"))["success"]
        assert hub.hub.summary()["closed"] == {}


async def test_requester_that_returns_gets_more_questions_at_once_than_the_backlog_holds() -> None:
    """Otherwise it would be closed as a slow consumer, and again whenever it returns."""
    hub = HubServer(port=0, backlog_bytes_max=300_000)
    async with hub, raw_client(hub.url) as worker:
        await worker.register("worker", "work", max_tasks=200)
        async with raw_client(hub.url) as requester:
            joined = await requester.register("requester")
            for number in range(200):
                await requester.delegate(f"task-{number}", capability="work", answers=True)
        for number in range(200):
            await worker.request(type="status", task_id=f"task-{number}", question={"text": "x" * 60_000})
        async with raw_client(hub.url) as back:
            await back.register("requester", agent_id=joined["agent_id"], resume=joined["resume"])
            for number in range(200):
                assert (await back.message("status", task_id=f"task-{number}"))["question"]
            assert "4002" not in hub.hub.summary()["closed"]


async def test_result_that_waited_for_room_is_told_again_when_its_reader_was_lost() -> None:
    async with HubServer(port=0, backlog_bytes_max=300_000) as hub, raw_client(hub.url) as worker:
        await worker.register("worker", "work", max_tasks=100)
        async with deaf_client(hub.url) as requester:
            joined = await requester.register("requester")
            for number in range(100):
                await requester.send(type="delegate", task_id=f"task-{number}", capability="work")
            for number in range(100):
                await worker.message("delegate", task_id=f"task-{number}")
                await worker.send(type="result", task_id=f"task-{number}", success=True, output="y" * 100_000)
            await worker.request(type="status")
            requester.connection.transport.abort()
        async with raw_client(hub.url) as back:
            await back.register("requester", agent_id=joined["agent_id"], resume=joined["resume"])
            assert (await back.message("result", task_id="task-99"))["success"]
            fetched = await back.request(type="status", task_id="task-0")  # It may have been in transit.
            assert fetched["state"] == "completed"


async def test_place_of_a_connection_that_hung_up_without_reading_is_taken_up_again() -> None:
    with hub_process() as (url, _):
        async with raw_client(url) as sender, deaf_client(url) as deaf, raw_client(url) as returned:
            await sender.register("sender")
            joined = await deaf.register("deaf", "work")
            for _ in range(60):  # Less than the backlog allows, more than the socket holds.
                await sender.request(type="broadcast", message="x" * 100_000)
            deaf.connection.transport.write_eof()
            await sender.request(type="status")
            again = await returned.register("deaf", "work", agent_id=joined["agent_id"], resume=joined["resume"])
            assert again["agent_id"] == joined["agent_id"]
            assert (await sender.delegate("task", capability="work"))["state"] == "in_progress"
            await returned.message("delegate", task_id="task")


async def test_silence_of_a_connection_that_hung_up_without_reading_stops_no_clock() -> None:
    with hub_process("--heartbeat", "0.5") as (url, _):
        async with raw_client(url) as sender, deaf_client(url) as deaf:
            await sender.register("sender")
            await deaf.register("deaf")
            for _ in range(60):
                await sender.request(type="broadcast", message="x" * 100_000)
            deaf.connection.transport.write_eof()
            await asyncio.sleep(0.5)
            await sender.delegate("task", capability="nobody", wait=True, ttl=1.1)
            # The other's three intervals end first, then the task, then ours.
            async with asyncio.timeout(5):
                assert (await sender.message("result", task_id="task"))["state"] == "timeout"


async def test_connection_over_the_bound_is_refused_with_503_and_healthz_still_answers() -> None:
    upgrade = (
        "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    with hub_process("--max-connections", "2") as (url, _):
        async with raw_client(url) as first:
            async with raw_client(url) as second:
                with pytest.raises(InvalidStatus) as caught:
                    await raw_client(url).__aenter__()
                assert caught.value.status_code == 503
                answer = await http(url, upgrade)
                assert answer.startswith("HTTP/1.1 503 ")
                assert answer.endswith("the hub has its 2 connections; try again later\n")
                health = await http(url, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert health.startswith("HTTP/1.1 200 ")
                assert json.loads(health.partition("\r\n\r\n")[2])["connections"] == 2
                for client in (first, second):
                    assert (await client.request(type="status"))["type"] == "status"
            async with asyncio.timeout(WAIT_S):
                while (await first.request(type="status"))["hub"]["connections"] > 1:
                    pass
            async with raw_client(url) as third:
                assert (await third.request(type="status"))["type"] == "status"


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--max-open-tasks", "this agent has reached its limit of 2 open tasks; wait until one ends"),
        ("--max-pending-tasks", "the hub has reached its limit of 2 pending tasks; retry later"),
    ],
)
async def test_task_over_a_bound_is_overloaded_with_the_bound_and_nothing_is_lost(option: str, text: str) -> None:
    with hub_process(option, "2") as (url, _):
        async with raw_client(url) as requester, raw_client(url) as worker:
            await requester.register("requester")
            for task_id in ("first", "second"):
                assert (await requester.delegate(task_id, capability="work", wait=True))["state"] == "pending"
            refused = await requester.delegate("third", capability="work", wait=True)
            assert (refused["type"], refused["code"], refused["message"]) == ("error", "overloaded", text)
            assert refused["task_id"] == "third"
            assert (await requester.request(type="status", task_id="third"))["code"] == "unknown_task"
            await worker.register("worker", "work")
            for task_id in ("first", "second"):
                await worker.request(type="result", task_id=task_id, success=True)
                assert (await requester.message("result", task_id=task_id))["state"] == "completed"
            assert (await requester.delegate("third", capability="work"))["state"] == "in_progress"


async def test_agent_over_the_bound_is_overloaded_with_the_bound() -> None:
    with hub_process("--max-agents", "1") as (url, _):
        async with raw_client(url) as first, raw_client(url) as second:
            joined = await first.register("first")
            refused = await second.register("second")
            assert refused["code"] == "overloaded"
            assert refused["message"] == "the hub has reached its limit of 1 agents; retry later"
            again = await second.register("first", agent_id=joined["agent_id"], resume=joined["resume"])
            assert again["agent_id"] == joined["agent_id"]


# Heartbeats


async def test_silent_agent_is_closed_with_4001_and_its_grace_time_runs() -> None:
    with hub_process("--heartbeat", "0.2", "--grace", "10") as (url, _):
        async with raw_client(url) as silent, raw_client(url) as other:
            began = time.monotonic()  # Before its registration: the silence cannot have begun earlier.
            joined = await silent.register("silent", "quiet")
            assert joined["heartbeat_s"] == 0.2
            await other.register("other", "loud")
            await other.delegate("task", capability="quiet")
            closing = asyncio.create_task(silent.closed())
            while not closing.done():
                await other.send(type="heartbeat")
                await asyncio.sleep(0.05)
            assert await closing == 4001
            assert time.monotonic() - began >= 3 * 0.2
            found = (await other.request(type="discover"))["agents"]
            assert [agent["name"] for agent in found] == ["other"]
            assert (await other.request(type="status", task_id="task"))["state"] == "in_progress"
            async with raw_client(url) as returned:
                again = await returned.register("silent", "quiet", agent_id=joined["agent_id"], resume=joined["resume"])
                assert again["tasks"] == [{"task_id": "task", "attempt": 1}]


@posix_signals
async def test_hub_that_was_stopped_reads_heartbeats_before_it_judges_silence() -> None:
    with hub_process("--heartbeat", "0.5") as (url, process):
        async with raw_client(url) as client:
            await client.register("ann", "work")
            os.kill(process.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(3.0)  # Twice the silence that closes a connection.
                await client.send(type="heartbeat", id="alive")
            finally:
                os.kill(process.pid, signal.SIGCONT)
            assert (await client.until(lambda reply: reply.get("reply_to") == "alive"))["type"] == "heartbeat_ack"


async def test_clients_that_connect_all_at_once_are_accepted_in_few_turns_of_the_loop() -> None:
    """A turn of a busy hub takes 25 ms and more: with one client each the backlog fills, and the rest is dropped."""
    async with HubServer(port=0) as hub, contextlib.AsyncExitStack() as stack:
        for _ in range(160):
            stack.callback(socket.create_connection(("127.0.0.1", hub.port)).close)
        turns = 0
        while len(hub.sockets) < 160:
            await asyncio.sleep(0)
            turns += 1
        assert 160 / agenthub.ACCEPTED_AT_ONCE <= turns <= 40


@pytest.mark.parametrize("turns", range(8))
@pytest.mark.parametrize("name", ["asyncio", "uvloop"])
def test_hub_that_stops_while_it_accepts_loses_no_socket_and_writes_to_no_closed_one(
    name: str, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agenthub, "CLOSING_S", 0.1)  # The clients do not answer.
    new_event_loop = pytest.importorskip(name).new_event_loop
    errors: list[dict[str, Any]] = []

    async def stop_while_accepting() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
        hub = HubServer(port=0)
        await hub.start()
        await asyncio.sleep(0.01)  # It waits for clients now.
        with contextlib.ExitStack() as stack:
            for _ in range(40):
                client = socket.create_connection(("127.0.0.1", hub.port))
                stack.callback(client.close)
                client.sendall(HANDSHAKE)
            for _ in range(turns):
                await asyncio.sleep(0)
            await hub.stop()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(stop_while_accepting())
    assert errors == []
    gc.collect()  # A socket that nobody has closed warns now, which fails the test.


async def test_ticks_that_are_always_late_are_put_off_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "TICK_LATE_S", -1.0)
    async with HubServer(port=0) as hub, raw_client(hub.url) as client:
        await client.register("ann")
        await client.delegate("t", capability="nobody", wait=True, ttl=0.05)
        assert (await client.message("result"))["state"] == "timeout"


async def test_hub_that_was_stopped_keeps_outcomes_for_a_grace_period_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "CATCH_UP_S", 0.0)
    settings = HubSettings(retention_s=0.1, grace_s=60.0)
    async with HubServer(settings, port=0) as hub, raw_client(hub.url) as ann, raw_client(hub.url) as bob:
        await ann.register("ann")
        await bob.register("bob", "work")
        monkeypatch.setattr(agenthub, "TICK_LATE_S", -1.0)  # As if the hub had been stopped before each tick.
        await ann.delegate("t", capability="work")
        await bob.request(type="result", task_id="t", success=True)
        sweep = hub.hub.next_sweep
        async with asyncio.timeout(WAIT_S):
            while hub.hub.next_sweep < sweep + 30:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)  # Its retention is over.
        assert (await ann.request(type="status", task_id="t"))["state"] == "completed"


async def test_any_message_is_a_sign_of_life() -> None:
    texts = ['{"type": "heartbeat"}', '{"type": "discover"}', "nonsense", ""]
    with hub_process("--heartbeat", "0.2") as (url, _):
        async with contextlib.AsyncExitStack() as stack:
            agents = [await stack.enter_async_context(raw_client(url)) for _ in texts]
            for agent in agents:
                await agent.register("agent")
            for _ in range(8):
                for agent, text in zip(agents, texts, strict=True):
                    await agent.connection.send(text)
                await asyncio.sleep(0.1)
            assert (await agents[0].request(type="status"))["hub"]["agents"] == len(texts)


async def test_being_written_to_is_no_sign_of_life() -> None:
    with hub_process("--heartbeat", "0.15") as (url, _):
        async with raw_client(url) as silent, raw_client(url) as other:
            await silent.register("silent")
            await other.register("other")
            closing = asyncio.create_task(silent.closed())
            async with asyncio.timeout(WAIT_S):
                while not closing.done():
                    await other.request(type="broadcast", message=1)
                    await asyncio.sleep(0.05)
            assert await closing == 4001


# The port


async def test_healthz_answers_200_on_the_same_port() -> None:
    with hub_process() as (url, _):
        async with raw_client(url) as client:
            answer = await http(url, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer.startswith("HTTP/1.1 200 ")
            assert (await client.request(type="status"))["type"] == "status"
        for request in ("GET /other HTTP/1.1\r\nHost: localhost\r\n\r\n", "nonsense\r\n\r\n"):
            assert not (await http(url, request)).startswith("HTTP/1.1 200 ")
        assert (await http(url, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")).startswith("HTTP/1.1 200 ")


async def test_load_balancer_may_ask_for_health_by_http_1_0_without_a_host() -> None:
    async with HubServer(port=0) as hub:
        assert " 200 " in (await http(hub.url, "GET /healthz HTTP/1.0\r\n\r\n")).splitlines()[0]
        for request in ("GET / HTTP/1.0\r\n\r\n", "GET /healthz HTTP/1.0\r\nHost: evil.example\r\n\r\n"):
            assert not (await http(hub.url, request)).startswith("HTTP/1.1 200 ")


async def test_taken_port_is_one_line_and_exit_1() -> None:
    with hub_process() as (url, _):
        port = urlsplit(url).port
        with running("-m", "agenthub", "hub", "--port", str(port)) as process:
            stdout, stderr = await asyncio.to_thread(process.communicate, timeout=WAIT_S)
            assert process.returncode == 1
            assert stdout == ""
            assert len(stderr.splitlines()) == 1
            assert str(port) in stderr


# Shutdown


@posix_signals
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
async def test_signal_closes_with_1001_and_exits_0(number: str) -> None:
    with hub_process("--log-level", "warning", stderr=subprocess.PIPE) as (url, process):
        async with raw_client(url) as agent, raw_client(url) as observer:
            await agent.register("agent", "work")
            await observer.request(type="status")
            process.send_signal(signal.Signals[number])
            assert await agent.closed() == 1001
            assert await observer.closed() == 1001
            assert await exit_code(process, 5) == 0
        _, stderr = process.communicate(timeout=WAIT_S)
        assert stderr == ""


@posix_signals
async def test_hub_that_ends_takes_no_new_task_and_still_passes_results_on() -> None:
    with hub_process() as (url, process):
        async with raw_client(url) as requester, raw_client(url) as worker:
            await requester.register("requester")
            await worker.register("worker", "work")
            await requester.delegate("old", capability="work")
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(WAIT_S):
                for number in range(100_000):
                    reply = await requester.delegate(f"new-{number}", capability="work", wait=True)
                    if reply["type"] == "error":
                        break
                    await worker.request(type="result", task_id=f"new-{number}", success=True)
            assert reply["code"] == "shutting_down"
            assert (await worker.request(type="result", task_id="old", success=True))["state"] == "completed"
            assert (await requester.message("result", task_id="old"))["state"] == "completed"
            assert await requester.closed() == 1001
            assert await worker.closed() == 1001
            assert await exit_code(process) == 0


@posix_signals
async def test_hub_ends_in_time_though_tasks_run_and_connections_do_not_read() -> None:
    with hub_process() as (url, process):
        async with raw_client(url) as requester, raw_client(url) as worker, deaf_client(url) as deaf:
            await requester.register("requester")
            await worker.register("worker", "work")
            await deaf.register("deaf", "deaf")
            await requester.delegate("endless", capability="work")
            for _ in range(60):  # Less than the backlog allows, more than the socket holds.
                await requester.request(type="broadcast", message="x" * 100_000, capability="deaf")
            process.send_signal(signal.SIGTERM)
            assert await exit_code(process, 5) == 0
            assert await requester.closed() == 1001
