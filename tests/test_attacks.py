"""Regression tests for attacks that once succeeded against the hub or an agent."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import gc
import json
import math
import os
import random
import socket
import sqlite3
import ssl
import struct
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wsproto import ConnectionType
from wsproto.events import Ping, Request

import agenthub
from agenthub import (
    Access,
    Changes,
    Delegate,
    ErrorInfo,
    HubServer,
    HubSettings,
    Journal,
    LocalHub,
    TaskOutcome,
    TaskRow,
    TaskState,
    hash_of,
)
from tests.harness import changes_of
from tests.raw_websocket import BINARY, CLOSE, CONTINUATION, HANDSHAKE, PING, TEXT, Peer, frame
from tests.support import WAIT_S, RawClient, agenthub_main, client_link, raw_client
from tests.test_cli import ran
from tests.test_security import (
    AUTHORITY,
    CERTIFICATE,
    KEY,
    TOKEN,
    WRONG,
    bearer,
    health,
    plain_connection,
    private_file,
    until,
)
from tests.test_security_input import Clock, Rationed, message
from tests.test_transport import HEARTBEAT, Owner, Pair, Socket

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs a shell as on POSIX")
DONE = frame(struct.pack("!H", 1000), CLOSE)
STATUS = '{"type":"status","id":"1"}'


def secured(**options: Any) -> HubServer:
    return HubServer(port=0, access=Access.of_token(TOKEN), **options)


def access_of(**tokens: dict[str, Any]) -> Access:
    """Return an Access with a token for each table, named by the token."""
    return Access(agenthub.parse_grant(name, {"sha256": hash_of(name), **table}) for name, table in tables_of(tokens))


def tables_of(tokens: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return list({TOKEN: {}, **tokens}.items())


# Expensive messages.


async def test_unauthenticated_client_may_send_small_messages_only_and_an_authenticated_one_large_ones() -> None:
    most = agenthub.UNAUTHENTICATED_BYTES_MAX
    async with secured() as hub:
        async with raw_client(hub.url) as client:
            await client.connection.send(STATUS + " " * (most - len(STATUS)))
            assert (await client.receive())["code"] == "unauthorized"
            await client.connection.send(STATUS + " " * (most + 1 - len(STATUS)))
            assert await client.closed() == 1009
        most = hub.settings.message_bytes_max
        async with raw_client(hub.url, **bearer(TOKEN)) as one, raw_client(hub.url) as other:
            assert (await other.request(type="status", token=TOKEN))["type"] == "status"
            for client in (one, other):
                await client.connection.send(STATUS + " " * (most - len(STATUS)))
                assert (await client.receive())["type"] == "status"
                await client.connection.send(STATUS + " " * (most + 1 - len(STATUS)))
                assert await client.closed() == 1009


async def test_unfinished_message_of_an_unauthenticated_client_is_refused_by_its_announced_length() -> None:
    async with secured() as hub, raw_client(hub.url) as client:
        client.connection.transport.write(frame(length=agenthub.UNAUTHENTICATED_BYTES_MAX + 1))
        assert await client.closed() == 1009


def test_malformed_message_is_searched_for_its_id_in_a_bounded_number_of_steps() -> None:
    for filling in (b"," * 10, b"," * 2 * agenthub.SCAN_TOKENS):
        with pytest.raises(agenthub.InvalidMessage) as caught:
            agenthub.decoder_from_agent()(b"{" + filling + b'"id":"1",')
        assert caught.value.reply_to == ("1" if len(filling) < agenthub.SCAN_TOKENS else None)


async def test_hub_without_tokens_has_no_unauthenticated_clients() -> None:
    async with HubServer(port=0) as hub, raw_client(hub.url) as client:
        await client.connection.send(STATUS + " " * (hub.settings.message_bytes_max - len(STATUS)))
        assert (await client.receive())["type"] == "status"


def each_message_takes(cpu_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = (number * cpu_s for number in range(1_000_000))
    monkeypatch.setattr(agenthub.time, "thread_time", lambda: next(readings))


async def test_large_message_is_charged_with_the_time_that_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    each_message_takes(1.0, monkeypatch)
    rationed = Rationed(100)
    small = HEARTBEAT + b" " * (agenthub.CPU_COUNTED_BYTES - 1 - len(HEARTBEAT))
    rationed.link.data_received(frame(small) * 3)
    assert rationed.count == 3
    assert rationed.link.pause_reasons == set()
    rationed.link.data_received(frame(small + b" ") * 2)
    assert rationed.count == 4
    assert rationed.link.pause_reasons == {"rate limit", "turn over"}
    # The messages cost the tokens of four seconds, two of which the bucket held.
    rationed.clock.pass_time(1 / agenthub.CPU_SHARE - agenthub.BURST_S)
    assert rationed.count == 4
    rationed.clock.pass_time(0.1)
    assert rationed.count >= 5


@pytest.mark.parametrize(
    "pieces",
    [[frame(bytes(5000), BINARY)], [frame(bytes(9), BINARY, fin=False), frame(bytes(5000), CONTINUATION)]],
    ids=["binary", "fragments"],
)
async def test_what_is_no_text_in_one_piece_is_charged_with_the_time_that_it_took_too(
    pieces: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unmasking takes longer than parsing a small message, even more so without the C extension."""
    each_message_takes(0.6 / len(pieces), monkeypatch)  # More than the half second allowed at once.
    rationed = Rationed(100)
    for piece in pieces:
        rationed.clock.run_soon()
        assert rationed.link.pause_reasons == set()
        rationed.link.data_received(piece)
    rationed.clock.run_soon()
    assert rationed.link.pause_reasons == {"rate limit"}


# Fair turns.


def waiting_links(turns: agenthub.Turns, order: list[str], *names: str, cost: float = 8) -> None:
    """Have links wait whose names are `address` or `address/token`, and enter each in `order` when it is served."""
    for name in names:
        address, _, token = name.partition("/")
        link: Any = types.SimpleNamespace(address=address, grant_name=token, finish_time=0.0)
        turns.wait(link, cost, functools.partial(order.append, name))


def test_waiting_connections_of_one_address_share_the_turns_of_one() -> None:
    clock, order = Clock(), list[str]()
    turns = agenthub.Turns(clock)  # type: ignore[arg-type]
    turns.addresses["crowd"] = 100
    waiting_links(turns, order, *["crowd"] * 100, "other", "another")
    clock.run_soon()
    assert order[:2] == ["other", "another"]
    assert len(order) == 102


def test_waiting_connections_of_one_token_share_the_turns_of_one() -> None:
    clock, order = Clock(), list[str]()
    turns = agenthub.Turns(clock)  # type: ignore[arg-type]
    turns.grants["shared"] = 100
    waiting_links(turns, order, *[f"{number}/shared" for number in range(100)], "1/own")
    clock.run_soon()
    assert order[0] == "1/own"


def test_what_costs_little_does_not_wait_for_what_costs_much() -> None:
    clock, order = Clock(), list[str]()
    turns = agenthub.Turns(clock)  # type: ignore[arg-type]
    waiting_links(turns, order, "dear", "dear", cost=100)
    waiting_links(turns, order, "cheap", cost=1)
    clock.run_soon()
    assert order == ["cheap", "dear", "dear"]


def test_error_in_one_turn_does_not_end_the_others() -> None:
    clock, order = Clock(), list[str]()
    turns = agenthub.Turns(clock)  # type: ignore[arg-type]
    link: Any = types.SimpleNamespace(address="a", grant_name="", finish_time=0.0)
    turns.wait(link, 1, functools.partial(int, "no number"))
    waiting_links(turns, order, "b")
    with pytest.raises(ValueError, match="no number"):
        clock.run_soon()
    clock.run_soon()
    assert order == ["b"]


FLOODS = {
    "lists": frame(b'{"type":"status","id":"1","tasks":true}') * 160,
    "searches": frame(b'{"type":"discover","id":"1","capability":"a"}') * 160,
    "heartbeats": frame(b'{"type":"heartbeat"}') * 500,
    "large messages": frame(
        b'{"type":"delegate","task_id":"t","capability":"nobody","input":[' + b"{}," * 2_000 + b"{}]}"
    )
    * 100,
}


FLOOD_CASES = [(kind, False) for kind in FLOODS] + [
    pytest.param(kind, True, marks=pytest.mark.long if kind != "lists" else ()) for kind in FLOODS
]


@pytest.mark.parametrize(("kind", "has_tls"), FLOOD_CASES)
async def test_flood_from_many_connections_does_not_delay_a_bystander(
    kind: str, has_tls: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without turns, the bystander's heartbeat waits for a slice of 16 KiB of every connection, several times."""
    options: dict[str, Any] = {}
    client_options: dict[str, Any] = {}
    if has_tls:
        files = private_file(tmp_path / "cert.pem", CERTIFICATE), private_file(tmp_path / "key.pem", KEY)
        options["tls"] = agenthub.server_tls(*files)
        client_options["ssl"] = ssl.create_default_context(cafile=private_file(tmp_path / "ca.pem", AUTHORITY))
        options["host"] = "localhost"
    connect = functools.partial(raw_client, **client_options)
    counts = collections.Counter[type]()
    receive = agenthub.Hub.receive

    def counting(hub: Any, link: Any, message: Any, *args: Any) -> Any:
        counts[type(message)] += 1
        return receive(hub, link, message, *args)

    monkeypatch.setattr(agenthub.Hub, "receive", counting)
    raw = FLOODS[kind]
    async with HubServer(port=0, **options) as hub, contextlib.AsyncExitStack() as stack, connect(hub.url) as bystander:
        await bystander.register("bystander", "a")
        for number in range(300):
            await bystander.send(type="delegate", task_id=f"t-{number}", capability="nobody", wait=True)
        await bystander.request(type="heartbeat")
        flood = [await stack.enter_async_context(connect(hub.url)) for _ in range(60)]
        for client in flood:
            await client.register("one of many", "a")
        counts.clear()
        for client in flood:
            client.connection.transport.write(raw)
        await bystander.request(type="heartbeat")
        # Two turns, and a first message of each connection.
        assert counts.total() < 2 * agenthub.TURN_COST / agenthub.PLAIN_COST + len(flood) * 20
        for client in flood:
            client.connection.transport.abort()


async def test_message_that_waits_for_its_turn_is_dropped_with_its_connection() -> None:
    async with HubServer(port=0) as hub, raw_client(hub.url) as client, raw_client(hub.url) as other:
        await other.register("other")
        hub.turns.left = 0  # As after a turn that was used up.
        for raw in (STATUS.encode(), b" " * agenthub.CPU_COUNTED_BYTES + STATUS.encode()):
            client.connection.transport.write(frame(raw))
        client.connection.transport.write(frame(b'{"type":"status","id":"2","tasks":true}'))
        client.connection.transport.abort()
        await until(lambda: len(hub.sockets) == 1)
        hub.turns.left = 0
        assert (await other.request(type="discover"))["total"] == 1


async def test_bytes_of_unfinished_messages_use_up_a_turn_too() -> None:
    """To read and decrypt a megabyte of a thousand connections each takes a second, before any message is complete."""
    rationed = Rationed(0)
    raw = frame(bytes(1_000_000))
    piece = raw[: agenthub.READ_BYTES]
    rationed.link.turns.left = 0.5
    rationed.link.data_received(piece)
    assert rationed.link.pause_reasons == {"turn over"}
    rationed.clock.run_soon()
    assert rationed.link.pause_reasons == set()
    rationed.link.data_received(raw[agenthub.READ_BYTES :])
    rationed.clock.run_soon()
    assert rationed.count == 1


@pytest.mark.parametrize("is_fragmented", [False, True])
async def test_unfinished_messages_are_limited_together_and_the_address_with_most_pays(
    is_fragmented: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agenthub, "INPUT_BYTES_MAX", 0)  # So it is four messages.
    text = (STATUS + " " * 190_000).encode()
    whole = (
        frame(text[:130_000], TEXT, fin=False) + frame(text[130_000:], CONTINUATION) if is_fragmented else frame(text)
    )
    settings = HubSettings(message_bytes_max=200_000)
    async with HubServer(settings, port=0) as hub, contextlib.AsyncExitStack() as stack:

        async def begun(address: str) -> RawClient:
            client = await stack.enter_async_context(raw_client(hub.url, local_addr=(address, 0)))
            before = hub.turns.traffic.bytes_in
            client.connection.transport.write(whole[:145_000])
            await until(lambda: hub.turns.traffic.bytes_in >= before + 145_000)
            return client

        other = await begun("127.0.0.2")
        crowd = [await begun("127.0.0.1") for _ in range(12)]
        for client in crowd[:8]:
            assert await client.closed() == 1013
        for client in (other, *crowd[8:]):
            client.connection.transport.write(whole[145_000:])
            assert (await client.receive())["type"] == "status"
        assert hub.turns.input_budget.total == 0
        last = await begun("127.0.0.1")
        assert hub.turns.input_budget.total > 0
        last.connection.transport.abort()
        await until(lambda: hub.turns.input_budget.total == 0)


async def test_input_that_waits_for_its_turn_counts_until_it_is_handled() -> None:
    rationed = Rationed(0)
    budget = rationed.link.turns.input_budget
    rationed.link.pause_reading("test")
    raw = frame(HEARTBEAT + b" " * 100_000) * 3
    rationed.link.data_received(raw)
    assert budget.total == len(raw)
    rationed.link.resume_reading("test")
    rationed.clock.run_soon()
    assert rationed.count == 3
    assert budget.total == 0


@pytest.mark.parametrize("state", ["open", "paused", "closing"])
async def test_input_of_a_connection_that_is_lost_does_not_count(state: str) -> None:
    rationed = Rationed(0)
    link, budget = rationed.link, rationed.link.turns.input_budget
    if state != "open":
        link.pause_reading("test")
    link.data_received(frame(HEARTBEAT + b" " * 200_000)[:150_000])
    assert budget.total == 150_000
    if state == "closing":
        link.close(1000)
    link.eof_received()
    rationed.clock.run_soon()
    link.connection_lost(None)
    if state == "paused":  # It counts until it was handled.
        link.resume_reading("test")
    assert budget.total == 0


async def test_sockets_of_connections_that_have_had_their_turn_are_not_all_read_at_once() -> None:
    """The loop reads 256 KiB of each, which takes a thousand connections half a second, and with TLS longer."""
    clock = Clock()
    turns = agenthub.Turns(clock)  # type: ignore[arg-type]
    links = []
    for _ in range(200):
        turns.left = agenthub.TURN_COST  # No handshake waits.
        links.append(Rationed(0, clock=clock, turns=turns).link)
    unfinished = frame(bytes(1_000_000))[: agenthub.READ_BYTES]
    turns.left = 0.5
    for link in links:
        link.data_received(unfinished)
    assert all(link.pause_reasons == {"turn over"} for link in links)
    clock.run_once()
    resumed = [link for link in links if link.transport.is_reading]
    assert 1 <= len(resumed) <= agenthub.TURN_COST // agenthub.SOCKET_READ_COST
    clock.run_soon()
    assert all(link.transport.is_reading for link in links)


async def test_reply_during_an_overload_is_written_before_other_connections_have_their_turn() -> None:
    rationed = Rationed(0)
    rationed.owner.on_message = lambda link: link.send(b"{}")
    before = len(rationed.link.transport.writes)
    waiting_links(rationed.link.turns, [], "another")
    rationed.link.data_received(frame(HEARTBEAT))
    assert len(rationed.link.transport.writes) == before + 1
    rationed.clock.run_soon()
    rationed.link.data_received(frame(HEARTBEAT))
    assert len(rationed.link.transport.writes) == before + 1  # Else at the end of the turn, with other replies.
    rationed.clock.run_soon()
    assert len(rationed.link.transport.writes) == before + 2


async def test_connection_waits_for_one_turn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once resume it twice: then a message is not measured, and another is announced to who expects it."""
    each_message_takes(0.01, monkeypatch)
    rationed = Rationed(0)
    waits: list[int] = []
    wait = rationed.link.turns.wait

    def waiting(*args: Any) -> None:
        waits.append(len(rationed.link.turns._waiting))
        wait(*args)

    monkeypatch.setattr(rationed.link.turns, "wait", waiting)
    rationed.link.data_received(frame(HEARTBEAT + b" " * agenthub.SLICE_BYTES) * 50)
    for _ in range(200):
        rationed.clock.run_soon()
    assert rationed.count == 50
    assert waits
    assert set(waits) == {0}


async def test_what_comes_after_a_close_is_gone_through_in_slices() -> None:
    rationed = Rationed(0)
    rationed.link.close(4000, "replaced")
    raw = frame(b"", PING) * 20_000
    rationed.link.data_received(raw)
    assert 0 < len(raw) - rationed.link.unread_bytes <= agenthub.SLICE_BYTES + len(frame(b"", PING))
    assert rationed.link.pause_reasons == {"turn over"}


async def test_without_a_rate_no_time_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    each_message_takes(1.0, monkeypatch)
    rationed = Rationed(0)
    rationed.link.data_received(frame(HEARTBEAT + b" " * agenthub.CPU_COUNTED_BYTES) * 3)
    rationed.clock.run_soon()
    assert rationed.count == 3
    assert rationed.link.pause_reasons == set()


async def test_what_a_connection_owes_holds_it_only_so_long() -> None:
    rationed = Rationed(100, effort=1e9)
    rationed.link.data_received(frame(HEARTBEAT) * 2)
    assert rationed.count == 1
    rationed.clock.pass_time(agenthub.PAUSE_MAX_S - 0.1)
    assert rationed.count == 1
    rationed.clock.pass_time(0.2)
    assert rationed.count == 2
    assert HubSettings().silence_s / 2 > agenthub.PAUSE_MAX_S


texts = st.text(st.sampled_from('[]{}"\\a\u0000é'), max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(texts, children, max_size=4),
    max_leaves=30,
)


def nesting(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(nesting, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(nesting, value), default=0)
    return 0


def nests(raw: bytes, depth: int) -> bool:
    """Return whether `nests_deeper_than` finds exactly this depth."""
    return not agenthub.nests_deeper_than(raw, depth) and (not depth or agenthub.nests_deeper_than(raw, depth - 1))


@settings(max_examples=300, deadline=None)
@given(values, st.booleans(), st.sampled_from([None, 1]))
def test_depth_is_how_deep_a_value_is_nested(value: Any, ensure_ascii: bool, indent: int | None) -> None:
    assert nests(json.dumps(value, ensure_ascii=ensure_ascii, indent=indent).encode(), nesting(value))


def test_depth_of_a_megabyte_of_deep_chains_is_right() -> None:
    chain = b'{"a":' * 30 + b"[" * 30 + b"]" * 30 + b"}" * 30
    raw = b"[" + b",".join([chain] * (1_000_000 // len(chain))) + b"]"
    assert nests(raw, 61)
    assert nests(b"", 0)
    assert nests(b'"[[["', 0)


# Stopped hubs.


async def test_connection_that_comes_to_a_hub_after_its_stop_is_closed_with_1001() -> None:
    async with LocalHub() as hub:
        pass
    owner = Owner()
    near, far = agenthub.MemoryLink.pair((owner, agenthub.decoder_from_hub()), (hub, agenthub.decoder_from_agent()))
    hub.opened(far)
    await asyncio.wait_for(near.gone.wait(), WAIT_S)
    assert [code for code, _ in owner.ends] == [1001]
    assert hub.links == {}


async def test_namespace_that_has_stopped_before_another_takes_no_one_in() -> None:
    async with HubServer(port=0, access=access_of(other={"namespace": "other"})) as hub:
        async with raw_client(hub.url, **bearer(TOKEN)) as worker:
            await worker.register("worker", "work")
            async with raw_client(hub.url, **bearer(TOKEN)) as requester:
                await requester.register("requester")
                await requester.delegate("task", capability="work")
                stopping = asyncio.create_task(hub.stop(10 * WAIT_S))
                await until(lambda: not hub.namespaces["other"].is_running)
                assert hub.is_running  # Its task has not ended.
                async with raw_client(hub.url, **bearer("other")) as late:
                    assert await late.closed() == 1001
                assert hub.namespaces["other"].hub.summary()["agents"] == 0
                await worker.send(type="result", task_id="task", success=True)
                assert (await requester.message("result"))["success"]
        await asyncio.wait_for(stopping, WAIT_S)


async def test_hub_stops_at_once_in_the_midst_of_handshakes_of_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = private_file(tmp_path / "cert.pem", CERTIFICATE), private_file(tmp_path / "key.pem", KEY)
    monkeypatch.setattr(agenthub, "CLOSING_S", 3600.0)
    hub = secured(tls=agenthub.server_tls(*files))
    await hub.start()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(plain_connection(hub.url))
        one = await stack.enter_async_context(plain_connection(hub.url))
        await until(lambda: len(hub.sockets) == 4)
        links = list(hub.sockets)
        one.writer.transport.abort()
        await until(lambda: hub.rejected == {"tls": 1})  # The other client has disconnected.
        await asyncio.wait_for(hub.stop(), WAIT_S)
        assert all(link.gone.is_set() for link in links)
        assert hub.sockets == hub.addresses == {}


# Simultaneous connections.


@pytest.mark.parametrize("bound", ["of the hub", "of an address"])
async def test_bounds_hold_for_connections_that_wait_all_at_once(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "CONNECTIONS_OVER", 2)
    options: dict[str, Any] = {"settings": HubSettings(connections_max=3)}
    if bound == "of an address":
        options = {"connections_per_address_max": 3}
    async with HubServer(port=0, **options) as hub:
        with contextlib.ExitStack() as stack:
            for _ in range(50):  # The hub's loop does not run meanwhile.
                stack.enter_context(socket.create_connection(("127.0.0.1", hub.port), timeout=WAIT_S))
            most = await until(lambda: len(hub.sockets) + hub.rejected.get("connections", 0) == 50 and hub)
            assert len(most.sockets) == sum(most.addresses.values()) == 5
            assert hub.rejected == {"connections": 45}


# Closing connections.


async def test_messages_that_are_held_are_handled_before_the_close_behind_them() -> None:
    rationed = Rationed(100)
    rationed.link.data_received(frame(HEARTBEAT) * 300 + DONE)
    rationed.clock.run_soon()
    await asyncio.sleep(0)  # Let the loop close the socket, if it would.
    assert rationed.link.pause_reasons == {"rate limit"}
    assert rationed.count < 300
    assert rationed.owner.ends == []
    rationed.clock.pass_time(2.0)
    assert rationed.count == 300
    assert [code for code, _ in rationed.owner.ends] == [1000]


class Fickle:
    """A link owner that pauses reading at random, and passes the link to another such owner."""

    def __init__(self, luck: random.Random, clock: Clock, hold_probability: float) -> None:
        self.luck = luck
        self.clock = clock
        self.hold_probability = hold_probability
        self.messages: list[bytes] = []
        self.ends: list[int] = []

    def opened(self, link: agenthub.Link) -> None:
        pass

    def received(self, link: Any, message: bytes, message_bytes: int) -> None:
        assert not self.ends
        assert not link.pause_reasons
        self.messages.append(message)
        if self.luck.random() < self.hold_probability:
            why = self.luck.choice("abc")
            link.pause_reading(why)
            self.clock.call_later(self.luck.choice([0.0, 0.001, 1.0]), link.resume_reading, why)
        if self.luck.random() < 0.05:
            other = Fickle(self.luck, self.clock, self.hold_probability)
            other.messages, other.ends = self.messages, self.ends
            link.set_owner(other, bytes)
        if self.luck.random() < 0.1:
            link.send(b"x" * self.luck.randrange(1000))

    def closed(self, link: agenthub.Link, code: int, reason: str) -> None:
        self.ends.append(code)


def conversation(luck: random.Random) -> tuple[list[bytes], bytes]:
    """Return messages and their bytes: whole or in fragments, with pings between them and a close at the end."""
    messages, raw = [], HANDSHAKE
    for number in range(luck.randrange(1, 100)):
        one = b"%d " % number + b"a" * luck.choice([0, 5, 100, 1000, luck.randrange(20_000)])
        messages.append(one)
        if luck.random() < 0.2:
            cut = luck.randrange(len(one))
            raw += frame(one[:cut], fin=False) + frame(b"p", PING) * luck.randrange(2) + frame(one[cut:], CONTINUATION)
        else:
            raw += frame(one)
        if luck.random() < 0.1:
            raw += frame(b"ping", PING)
    return messages, raw + DONE


@pytest.mark.parametrize("seed", range(60))
async def test_all_messages_arrive_in_order_and_then_the_close_however_they_come_in(seed: int) -> None:
    luck, clock = random.Random(seed), Clock()
    owner = Fickle(luck, clock, luck.choice([0.0, 0.01, 0.3, 1.0]))
    link = agenthub.ServerLink(
        owner,
        lambda link, request: None,
        message_bytes_max=1_000_000,
        backlog_bytes_max=100_000,
        messages_per_s_max=luck.choice([0, 100]),
        decode=bytes,
        turns=agenthub.Turns(clock),  # type: ignore[arg-type]
    )
    link.loop = clock  # type: ignore[assignment]  # It has as much of a loop as a link needs.
    link.connection_made(Socket(link))
    link.transport.resume_reading()
    messages, raw = conversation(luck)
    chunk_max = luck.choice([300, 3000, 100_000])
    while raw:
        while not link.transport.is_reading and luck.random() < 0.95:
            clock.pass_time(luck.choice([0.0, 0.001, 1.0]))
        length = luck.randrange(1, chunk_max)
        link.data_received(raw[:length])
        raw = raw[length:]
        if luck.random() < 0.3:
            clock.run_soon()
            await asyncio.sleep(0)
    clock.run_soon()
    await asyncio.sleep(0)
    clock.pass_time(1000.0)
    assert owner.messages == messages
    assert owner.ends == [1000]
    assert link.transport.is_ended


@pytest.mark.parametrize("is_closed", [False, True])
async def test_end_of_the_socket_takes_nothing_away_that_came_before_it(is_closed: bool) -> None:
    pair = Pair()
    pair.say()
    await pair.heard()
    raw = b"".join(frame(b'{"type":"heartbeat","id":"%d"}' % number) for number in range(2000))
    assert len(raw) > 3 * agenthub.SLICE_BYTES
    pair.link.data_received(raw + (DONE if is_closed else b""))
    assert pair.link.pause_reasons == {"turn over"}
    pair.link.eof_received()  # TLS calls this even if reading is paused,
    pair.link.connection_lost(None)  # and closes its transport next.
    assert len(pair.owner.messages) * len(frame(b'{"type":"heartbeat","id":"0000"}')) < 2 * agenthub.SLICE_BYTES
    assert not pair.link.gone.is_set()
    await until(pair.link.gone.is_set)
    assert [message.id for message in pair.owner.messages] == [str(number) for number in range(2000)]
    assert [code for code, _ in pair.owner.ends] == [1000 if is_closed else 1006]


# Tokens, namespaces and names.


@pytest.mark.parametrize("ending", ["-wal", "-shm", "-journal", "-reserve"])
def test_namespace_may_not_end_like_a_file_beside_a_journal(ending: str) -> None:
    with pytest.raises(ValueError, match=r"tokens\.a\.namespace: must not end like a file"):
        access_of(a={"namespace": f"x{ending}"})
    for namespace in (f"x{ending}s", ending[1:], f"x_{ending[1:]}"):
        assert namespace in access_of(a={"namespace": namespace}).namespaces


@pytest.mark.parametrize("curbed", [{"offers": ["other"]}, {"offers": []}, {"may": ["delegate", "observe"]}])
async def test_agent_whose_token_offers_less_has_to_register_anew(curbed: dict[str, Any]) -> None:
    async with HubServer(port=0, access=access_of(worker={})) as hub:
        async with raw_client(hub.url, **bearer("worker")) as worker:
            await worker.register("worker", "work")
            await hub.reload(access_of(worker=curbed))
            assert await worker.closed() == 1001
        async with raw_client(hub.url, **bearer("worker")) as worker:
            assert (await worker.register("worker", "work"))["code"] == "unauthorized"


async def test_token_that_may_say_less_is_taken_at_its_word_at_once_and_stays() -> None:
    async with (
        HubServer(port=0, access=access_of(worker={}, caller={"calls": ["work"]})) as hub,
        raw_client(hub.url, **bearer("worker")) as worker,
        raw_client(hub.url, **bearer("caller")) as caller,
    ):
        await worker.register("worker", "work")
        await caller.register("caller")
        await hub.reload(access_of(worker={"may": ["register"]}, caller={"calls": ["rest"]}))
        assert (await worker.request(type="broadcast", message="x"))["code"] == "unauthorized"
        assert (await caller.delegate("task", capability="work"))["code"] == "unauthorized"
        assert (await worker.request(type="heartbeat"))["type"] == "heartbeat_ack"
        assert hub.hub.summary()["closed"] == {}


UNREADABLE = ["", ":", ":80", "a b[", "evil.example:x", "evil.example:123456", "[::1", "a:b:c", "[x]", "a]"]


@pytest.mark.parametrize("header", UNREADABLE)
async def test_name_that_cannot_be_read_is_nobodys(header: str) -> None:
    # A hub on all addresses has an empty name.
    authenticator = agenthub.Authenticator(None, frozenset({"", "hub.example"}), lambda link, grant: Owner())
    link: Any = Owner()
    link.address = "192.0.2.1"
    refused = authenticator.check_request(link, _request(header))
    assert refused is not None
    assert refused.status == 403
    assert authenticator.check_request(link, _request("HUB.example:80")) is None
    assert authenticator.rejected == {"host": 1}


def _request(host: str) -> Any:
    """Return the parsed request with this Host header."""
    requests: list[Any] = []

    def answer(link: agenthub.Link, request: Any) -> agenthub.HttpAnswer:
        requests.append(request)
        return agenthub.HttpAnswer(403, "")

    pair = Pair(answer)
    pair.link.data_received(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host.encode())
    pair.link.abort()
    return requests.pop()


async def test_page_of_health_counts_wrong_tokens_and_does_not_tell_right_ones_from_them_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agenthub, "FAILURES_FREE", 2)
    monkeypatch.setattr(agenthub, "FAILURE_FORGOTTEN_S", math.inf)
    async with secured() as hub:
        assert "agents" in await health(hub.url, TOKEN)
        for _ in range(2):
            assert await health(hub.url, WRONG) == {"status": "ok", "ready": True}
        assert hub.rejected == {"unauthorized": 2}
        assert await health(hub.url, TOKEN) == await health(hub.url, WRONG) == {"status": "ok", "ready": True}
        assert hub.rejected == {"unauthorized": 2}  # The token was not checked.
        monkeypatch.setattr(agenthub, "FAILURE_FORGOTTEN_S", 1e-9)
        assert "agents" in await health(hub.url, TOKEN)


async def test_two_reloads_at_once_open_a_new_namespace_once(tmp_path: Path) -> None:
    former, latter = access_of(), access_of(a={"namespace": "new"})
    async with HubServer(port=0, access=former, journal=Journal(tmp_path / "hub.db", sync="normal")) as hub:
        await asyncio.gather(hub.reload(latter), hub.reload(latter))
        assert list(hub.namespaces) == ["default", "new"]
        async with raw_client(hub.url, **bearer("a")) as client:
            assert (await client.register("a"))["type"] == "register"


async def test_reload_of_a_hub_that_has_stopped_opens_no_namespace(tmp_path: Path) -> None:
    async with HubServer(port=0, access=access_of(), journal=Journal(tmp_path / "hub.db", sync="normal")) as hub:
        pass
    await hub.reload(access_of(a={"namespace": "new"}))
    assert list(hub.namespaces) == ["default"]
    assert not (tmp_path / "hub.db.new").exists()


@posix_only
async def test_program_of_an_agent_does_not_see_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTHUB_TOKEN", TOKEN)
    monkeypatch.setenv("AGENTHUB_TOKEN_FILE", "where-it-is")
    assert await ran("echo ${AGENTHUB_TOKEN-none} $AGENTHUB_TOKEN_FILE") == "none where-it-is\n"
    assert TOKEN not in await ran("env")


@pytest.mark.parametrize("command", ["hub", "agent", "status", "call", "bridge"])
@pytest.mark.parametrize("form", ["--token {}", "--token={}", "--tok {}"])
def test_token_on_the_command_line_is_not_taken_for_the_name_of_a_file(
    command: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def open_it(path: str) -> str:
        opened.append(path)
        raise ValueError("that is enough")

    monkeypatch.setattr(agenthub, "token_in", open_it)
    path = private_file(tmp_path / "secret", TOKEN)
    needed = {"agent": ["--exec", "true"], "call": ["work"]}.get(command, [])
    assert agenthub_main(command, *needed, *form.format(path).split()) == 2
    assert opened == []


# Agents of a hostile hub.


async def test_agent_cuts_a_hub_that_asks_for_pongs_and_does_not_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "CLIENT_MESSAGE_BYTES_MAX", 1000)
    monkeypatch.setattr(agenthub, "BACKLOG_BYTES_MAX", 500)
    link = client_link(Owner())
    transport = Socket(link)
    link.connection_made(transport)
    await asyncio.sleep(0)
    server = Peer(ConnectionType.SERVER)
    (request,) = server.receive(b"".join(transport.writes))
    assert isinstance(request, Request)
    link.data_received(server.to_send())
    await asyncio.wait_for(link.ready, WAIT_S)
    for waiting, is_cut in ((1500, False), (1501, True)):
        transport.backlog_bytes = waiting
        server.send(Ping(b"ping"))
        link.data_received(server.to_send())
        await asyncio.sleep(0)
        assert transport.is_aborted == is_cut


# Journals.


def row(
    sequence: int, accepted_at: float, deadline: float, ended_at: float = 0.0, *, is_ended: bool = False
) -> TaskRow:
    task_id = f"task-{sequence}"
    end = None
    if is_ended:
        end = TaskOutcome(
            sender="hub",
            task_id=task_id,
            state="failed",
            success=False,
            output=None,
            error=ErrorInfo("x", "x"),
            attempt=1,
        )
    request = Delegate(task_id=task_id, capability="work")
    state = TaskState.FAILED if is_ended else TaskState.PENDING
    return TaskRow(sequence, "ann", request, 0, accepted_at, deadline, 0, state, None, 1, False, ended_at, end)


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_wall_clock_that_is_set_while_a_journal_is_open_moves_no_time_in_it(jump_s: float, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "hub.db", sync="normal")
    journal.open()
    journal.load(1_000_000.0)
    before = [row(1, 10.0, 70.0), row(2, 20.0, 80.0, 30.0, is_ended=True)]
    journal.write(changes_of(before), 1_000_000.0)
    after = row(3, 40.0, 100.0)
    journal.write(changes_of([after]), 1_000_000.0 + jump_s)
    journal.write(changes_of(updated=[after]), 1_000_000.0 + jump_s)  # The clock offset is set once.
    journal.close()
    journal.open()
    _, tasks, last = journal.load(1_000_000.0 + jump_s)
    journal.close()
    for found, expected in zip(tasks, [*before, after], strict=True):
        assert (found.accepted_at, found.deadline) == (expected.accepted_at, expected.deadline)
    assert (tasks[1].ended_at, last) == (30.0, 40.0)


class SlowJournal(Journal):
    """A journal on a disk whose writes the test delays or fails."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync="normal")
        self.gate = threading.Event()
        self.gate.set()
        self.is_broken = False

    def write(self, changes: Changes, clock_offset: float) -> None:
        assert self.gate.wait(WAIT_S)
        if self.is_broken:
            raise sqlite3.OperationalError("disk full")
        super().write(changes, clock_offset)


@pytest.mark.parametrize("is_broken", [False, True])
async def test_connection_that_asks_for_much_during_one_write_is_held_until_that_is_over(
    is_broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agenthub, "COST_PER_WRITE_MAX", 10)
    journal = SlowJournal(tmp_path / "hub.db")
    async with HubServer(port=0, journal=journal) as hub, raw_client(hub.url) as client, raw_client(hub.url) as other:
        await client.register("ann")
        await other.register("bob")
        link = next(link for link in hub.links if hub.hub.connections[link].agent.name == "ann")
        journal.gate.clear()
        try:
            asked = b"".join(message(type="status", id=str(number)) for number in range(100))
            task = message(type="delegate", task_id="task", capability="work", wait=True)
            client.connection.transport.write(task + asked + message(type="heartbeat", id="alive"))
            await until(lambda: "journal" in link.pause_reasons)
            assert len(hub.commit.held) < 50
            assert (await other.request(type="heartbeat"))["type"] == "heartbeat_ack"  # Others are not paused.
            assert "journal" in link.pause_reasons
            if is_broken:  # Reading stays paused, and resumes at each attempt to write.
                monkeypatch.setattr(agenthub, "COST_PER_WRITE_MAX", 1000)
                journal.is_broken = True
        finally:
            journal.gate.set()
        if is_broken:
            assert (await client.until(lambda reply: reply.get("reply_to") == "alive"))["type"] == "heartbeat_ack"
            assert client.seen == []
            journal.is_broken = False
        for number in range(100):
            assert (await client.until(functools.partial(is_reply_to, str(number))))["type"] == "status"
        assert link.pause_reasons == set()


def is_reply_to(message_id: str, reply: dict[str, Any]) -> bool:
    return reply.get("reply_to") == message_id


# Rate limits and other reasons to pause reading.


async def test_what_large_messages_cost_bounds_them_in_the_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    each_message_takes(1.0, monkeypatch)  # Allows one message in four seconds.
    rationed = Rationed(100)
    rationed.link.data_received(frame(HEARTBEAT + b" " * agenthub.CPU_COUNTED_BYTES) * 500)
    rationed.clock.pass_time(1000.0)
    assert 240 <= rationed.count <= 260


async def test_what_costs_more_than_the_longest_hold_is_bounded_by_that(monkeypatch: pytest.MonkeyPatch) -> None:
    each_message_takes(100.0, monkeypatch)
    rationed = Rationed(100)
    rationed.link.data_received(frame(HEARTBEAT + b" " * agenthub.CPU_COUNTED_BYTES) * 500)
    rationed.clock.pass_time(1000.0)
    assert rationed.count <= 1000.0 / agenthub.PAUSE_MAX_S + 2


async def test_who_was_let_in_may_send_as_many_fragments_as_without_tokens() -> None:
    async with secured() as hub, raw_client(hub.url, **bearer(TOKEN)) as client:
        number = agenthub.UNAUTHENTICATED_BYTES_MAX // agenthub.FRAGMENT_BYTES + 10
        parts = frame(b" ", CONTINUATION, fin=False) * number
        client.connection.transport.write(frame(STATUS.encode(), fin=False) + parts + frame(b"", CONTINUATION))
        assert (await client.receive())["type"] == "status"


@pytest.mark.parametrize("is_reload_first", [False, True])
async def test_namespace_that_is_opened_during_the_stop_is_stopped_too(is_reload_first: bool, tmp_path: Path) -> None:
    hub = HubServer(port=0, access=access_of(), journal=Journal(tmp_path / "hub.db", sync="normal"))
    await hub.start()
    both = [hub.stop(), hub.reload(access_of(a={"namespace": "new"}))]
    await asyncio.gather(*(reversed(both) if is_reload_first else both))
    running = [name for name, namespace in hub.namespaces.items() if namespace.is_running]
    for namespace in hub.namespaces.values():
        await namespace.stop()
    assert running == []


async def test_end_of_the_socket_takes_nothing_away_from_who_sends_too_much() -> None:
    rationed = Rationed(100)
    rationed.link.data_received(frame(HEARTBEAT) * 300 + DONE)
    rationed.clock.run_soon()
    rationed.link.eof_received()
    rationed.link.connection_lost(None)
    assert rationed.count < 300  # Not all at once, as the end of the socket was no reason to hurry.
    rationed.clock.pass_time(agenthub.PAUSE_MAX_S)
    assert rationed.count == 300
    assert rationed.link.gone.is_set()
    assert rationed.owner.ends == [(1000, "")]


# What a message costs before it is known to be one.

MEGABYTE = 1_000_000
COSTLY = {
    "nested too deep": b'{"type":"delegate","task_id":"t","input":[' + b"[" * 199 * 2500 + b"]" * 199 * 2500 + b"]}",
    "malformed at the end": b'{"type":"delegate","task_id":"t","input":[' + b"{}," * 300_000 + b"]}",
    "commas": b"{" + b"," * MEGABYTE,
    "not finite at the end": b'{"type":"delegate","task_id":"t","input":[' + b"{}," * 300_000 + b"NaN]}",
    "metadata that is too large": b'{"type":"register","name":"x","metadata":{"a":[' + b"{}," * 300_000 + b"{}]}}",
}


@pytest.mark.parametrize("case", COSTLY)
def test_rejected_message_is_parsed_once_and_not_walked(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = agenthub.decoder_from_agent()
    with pytest.raises(agenthub.InvalidMessage):
        decode(b'{"type":1}')  # What is made once is not counted.
    calls: collections.Counter[str] = collections.Counter()

    def trace(frame: Any, event: str, _: Any) -> None:
        calls[frame.f_code.co_name] += event == "call" and frame.f_code.co_filename == agenthub.__file__

    sys.setprofile(trace)
    try:
        with pytest.raises(agenthub.InvalidMessage):
            decode(COSTLY[case])
    finally:
        sys.setprofile(None)
    assert sum(calls.values()) < 200, calls.most_common(5)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_message_with_a_number_that_is_not_finite_is_parsed_once(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = agenthub.decoder_from_agent()
    with pytest.raises(agenthub.InvalidMessage):
        decode(b'{"type":1}')  # What is made once is not counted.
    scanned: list[int] = []
    nests_deeper_than, scan_json = agenthub.nests_deeper_than, agenthub.scan_json

    def scan(text: str, start: int) -> Any:
        scanned.append(len(text))
        return scan_json(text, start)

    monkeypatch.setattr(agenthub, "scan_json", scan)
    monkeypatch.setattr(
        agenthub, "nests_deeper_than", lambda raw, most: scanned.append(0) or nests_deeper_than(raw, most)
    )
    monkeypatch.setattr(agenthub.json, "loads", lambda *_, **options: pytest.fail("parsed once more"))
    chain = "[" * 60 + "]" * 60 + ","
    for raw, where in (
        (
            f'{{"type":"delegate","task_id":"t","input":[{chain * 2000}{number}]}}',
            "input: holds a number that is not finite",
        ),
        (
            f'{{"type":"heartbeat","id":"1","x":[{chain * 2000}{number}]}}',
            f"Invalid JSON: {number} is not a number in JSON",
        ),
    ):
        scanned.clear()
        with pytest.raises(agenthub.InvalidMessage) as caught:
            decode(raw.encode())
        assert caught.value.message == where
        assert len(scanned) <= 2 * (1 + (agenthub.codec().name.startswith("pydantic")))


def test_text_that_names_a_number_that_is_not_finite_is_accepted() -> None:
    raw = rb'{"type":"delegate","task_id":"t","capability":"c","input":["NaN","\"Infinity","\\",{"-Infinity":1}]}'
    assert agenthub.decoder_from_agent()(raw).input == raw[raw.index(b"[") : -1]


def test_parsing_a_large_message_does_not_collect_garbage() -> None:
    parse = agenthub.BuiltinCodec.strict_parser(agenthub.AgentMessage, agenthub.DEPTH_MAX + 1)
    collections_before = [one["collections"] for one in gc.get_stats()]
    parse(b'{"type":"delegate","task_id":"t","input":[' + b"{}," * 300_000 + b"{}]}")
    assert gc.isenabled()
    assert sum(one["collections"] for one in gc.get_stats()) - sum(collections_before) <= 3  # Once it is done.


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Without the collector of cycles, which a hub lets look at what has survived only every ten minutes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "raw",
    [
        b'{"type":"result","task_id":"t","success":false,"error":7}',
        b'{"type":"result","task_id":"t","success":false,"error":{"code":7}}',
        b'{"type":"register","name":"a","capabilities":[{"name":7}]}',
        b'{"type":"delegate","task_id":7}',
        b"{,",
    ],
)
def test_rejected_message_leaves_no_cycle(raw: bytes, no_collector: None) -> None:
    for _ in range(3):  # The first one may fill caches.
        gc.collect()
        with pytest.raises(agenthub.InvalidMessage):
            agenthub.decoder_from_agent()(raw)
    assert gc.collect() == 0


@pytest.mark.parametrize("how", ["before the handshake", "closed", "unfinished", "reset"])
async def test_connection_that_has_ended_leaves_no_cycle(how: str, no_collector: None) -> None:
    async with HubServer(port=0) as hub:
        if how == "before the handshake":
            _, writer = await asyncio.open_connection("127.0.0.1", hub.port)
            await until(lambda: bool(hub.sockets))
            ended = [weakref.ref(link) for link in hub.sockets]
            writer.close()
        else:
            async with raw_client(hub.url) as client:
                await client.register("a", "b")
                ended = [weakref.ref(link) for link in hub.sockets]
                if how == "unfinished":
                    client.connection.transport.write(frame(HEARTBEAT)[:-1])
                if how != "closed":
                    client.connection.transport.abort()
        assert len(ended) == 1
        await until(lambda: not hub.sockets)
        hub.hub.deadlines.entries.clear()  # Its deadline stays there until it is due.
        await until(lambda: ended[0]() is None)


def test_parts_of_a_rejected_message_are_gone_before_the_collector_is_back() -> None:
    """A traceback holds the frames of the parser, and so all parts of the message."""
    numbers: list[int] = []

    def on_collection(phase: str, _: Any) -> None:
        if phase == "start":
            numbers.append(len(gc.get_objects(generation=0)))

    decode = agenthub.decoder_from_agent()
    gc.callbacks.append(on_collection)
    try:
        with pytest.raises(agenthub.InvalidMessage, match="not finite"):
            decode(b'{"type":"delegate","task_id":"t","input":[' + b"[]," * 300_000 + b"NaN]}")
        gc.collect(0)
    finally:
        gc.callbacks.remove(on_collection)
    assert max(numbers) < 100_000


# Tokens that are replaced.


def written_token(path: Path, token: str) -> None:
    path.write_text(token)
    path.chmod(0o600)


async def test_agent_reads_its_token_file_again_when_the_hub_has_replaced_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    written_token(path, "former")
    monkeypatch.setenv("AGENTHUB_TOKEN_FILE", str(path))
    former, latter = Access.of_token("former"), Access.of_token("latter")
    async with HubServer(port=0, access=former) as hub, agenthub.Agent("me", url=hub.url) as me:
        path.unlink()
        await hub.reload(latter)
        await until(lambda: not me.is_online)
        await asyncio.sleep(0.2)  # Some attempts without a file.
        written_token(path, "former")
        await until(lambda: hub.rejected.get("unauthorized", 0) > 0)  # An attempt with the token that was revoked.
        written_token(path, "latter")
        await until(lambda: me.is_online)


async def test_agent_ends_when_the_token_in_its_file_is_still_refused_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agenthub, "TOKEN_REPLACED_S", 0.1)
    path = tmp_path / "token"
    written_token(path, "former")
    monkeypatch.setenv("AGENTHUB_TOKEN_FILE", str(path))
    former, latter = Access.of_token("former"), Access.of_token("latter")
    async with HubServer(port=0, access=former) as hub, agenthub.Agent("me", url=hub.url) as me:
        await hub.reload(latter)
        await until(lambda: not me.is_online)
        with pytest.raises(agenthub.Refused, match="invalid token"):
            await asyncio.wait_for(me.connected(), WAIT_S)
