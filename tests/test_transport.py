"""Section 6, transport: bytes to messages and back, over a socket that the tests play, and in memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from wsproto.events import AcceptConnection, CloseConnection, Event, Pong, Request, TextMessage

import agenthub
from agenthub import Agent, Disconnected, HubServer, InvalidMessage
from tests.raw_websocket import BINARY, CONTINUATION, PING, PONG, Peer, frame
from tests.support import WAIT_S, client_link

HEARTBEAT = b'{"type":"heartbeat"}'
MAX_BYTES = 5000


class Owner:
    """Writes down what it is told about a link."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.sizes: list[int] = []
        self.opened_count = 0
        self.ends: list[tuple[int, str]] = []
        self.on_message: Callable[[agenthub.Link], None] = lambda link: None

    def opened(self, link: agenthub.Link) -> None:
        self.opened_count += 1

    def received(self, link: agenthub.Link, message: Any, message_bytes: int) -> None:
        assert not self.ends
        self.messages.append(message)
        self.sizes.append(message_bytes)
        self.on_message(link)

    def closed(self, link: agenthub.Link, code: int, reason: str) -> None:
        self.ends.append((code, reason))


class Socket(asyncio.Transport):
    """A transport that keeps what is written to it."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.writes: list[bytes] = []
        self.backlog_bytes = 0
        self.is_ended = False
        self.is_aborted = False
        self.is_half_closed = False

    def write(self, data: Any) -> None:
        assert not self.is_ended
        self.writes.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return self.backlog_bytes

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert (high, low) == (50_000, None)

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """Have the peer close too, as it does when it has read the end."""
        if not self.is_half_closed:
            self.is_half_closed = True
            asyncio.get_running_loop().call_soon(self.protocol.eof_received)
            asyncio.get_running_loop().call_soon(self.close)

    def is_closing(self) -> bool:
        return self.is_ended

    def close(self) -> None:
        if not self.is_ended:
            self.is_ended = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def abort(self) -> None:
        self.is_aborted = True
        self.close()


class Pair:
    """The hub's link, and a client that talks to it without a socket."""

    def __init__(self, answer: Any = lambda link, request: None) -> None:
        self.owner = Owner()
        self.link = agenthub.ServerLink(self.owner, answer, message_bytes_max=MAX_BYTES, backlog_bytes_max=100_000)
        self.socket = Socket(self.link)
        self.client = Peer()
        self.link.connection_made(self.socket)
        self.client.send(Request("hub", "/"))

    def say(self) -> None:
        """Give the link what the client has to say."""
        self.link.data_received(self.client.to_send())

    async def heard(self) -> list[Event]:
        """Return what the client hears, when the link has written it."""
        await asyncio.sleep(0)
        raw = b"".join(self.socket.writes)
        self.socket.writes.clear()
        return self.client.receive(raw)


@pytest.fixture
async def pair() -> Pair:
    """A link that is open."""
    pair = Pair()
    pair.say()
    (response,) = await pair.heard()
    assert isinstance(response, AcceptConnection)
    assert pair.owner.opened_count == 1
    return pair


async def ended(pair: Pair) -> None:
    """Wait until the link's socket is closed and its owner has been told of it."""
    async with asyncio.timeout(WAIT_S):
        while not (pair.owner.ends and pair.socket.is_ended):
            await asyncio.sleep(0.002)


# Reading.


async def test_message_arrives_with_its_size(pair: Pair) -> None:
    pair.link.data_received(frame(HEARTBEAT))
    assert pair.owner.messages == [agenthub.Heartbeat()]
    assert pair.owner.sizes == [len(HEARTBEAT)]


async def test_messages_of_one_chunk_arrive_in_order(pair: Pair) -> None:
    chunk = b"".join(frame(b'{"type":"heartbeat","id":"%d"}' % number) for number in range(10))
    pair.link.data_received(chunk)
    assert [message.id for message in pair.owner.messages] == [str(number) for number in range(10)]


async def test_it_does_not_matter_how_bytes_are_cut_into_chunks(pair: Pair) -> None:
    raw = frame(b'{"type":"heartbeat","id":"a"}') + frame(b'{"type":"heartbeat","id":"b"}')
    for index in range(len(raw)):
        pair.link.data_received(raw[index : index + 1])
    assert [message.id for message in pair.owner.messages] == ["a", "b"]


async def test_handshake_and_messages_may_come_in_one_chunk() -> None:
    pair = Pair()
    pair.link.data_received(pair.client.to_send() + frame(HEARTBEAT))
    assert pair.owner.messages == [agenthub.Heartbeat()]


async def test_message_in_fragments_is_put_together(pair: Pair) -> None:
    first = frame(HEARTBEAT[:5], fin=False) + frame(b"", CONTINUATION, fin=False)
    pair.link.data_received(first + frame(b"in between", PING) + frame(HEARTBEAT[5:], CONTINUATION))
    assert pair.owner.messages == [agenthub.Heartbeat()]
    assert pair.owner.sizes == [len(HEARTBEAT)]
    assert await pair.heard() == [Pong(b"in between")]


@pytest.mark.parametrize("is_fragmented", [False, True])
async def test_binary_message_is_refused_and_the_link_lives_on(pair: Pair, is_fragmented: bool) -> None:
    rest = frame(b"", CONTINUATION) if is_fragmented else b""
    pair.link.data_received(frame(HEARTBEAT, BINARY, fin=not is_fragmented) + rest + frame(HEARTBEAT))
    refused, message = pair.owner.messages
    assert isinstance(refused, InvalidMessage)
    assert "binary" in refused.message
    assert message == agenthub.Heartbeat()


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"[" * 3000])
async def test_what_is_no_message_is_refused_and_the_link_lives_on(pair: Pair, raw: bytes) -> None:
    pair.link.data_received(frame(raw) + frame(HEARTBEAT))
    refused, message = pair.owner.messages
    assert isinstance(refused, InvalidMessage)
    assert message == agenthub.Heartbeat()


@pytest.mark.parametrize("is_fragmented", [False, True])
async def test_text_that_is_not_utf8_ends_the_link(pair: Pair, is_fragmented: bool) -> None:
    rest = frame(b'"}', CONTINUATION) if is_fragmented else b""
    pair.link.data_received(frame(b'{"type":"\xff', fin=not is_fragmented) + rest)
    await pair.heard()
    assert pair.client.closed == CloseConnection(1007, "not UTF-8")
    await ended(pair)
    assert pair.owner.ends == [(1007, "not UTF-8")]


@pytest.mark.parametrize("is_fragmented", [False, True])
async def test_message_over_the_limit_ends_the_link(pair: Pair, is_fragmented: bool) -> None:
    if is_fragmented:
        part = b" " * 1000
        pair.link.data_received(frame(part, fin=False) + frame(part, CONTINUATION, fin=False) * 5)
    else:
        pair.link.data_received(frame(b" " * (MAX_BYTES + 1)))
    await pair.heard()
    assert pair.client.closed is not None
    assert pair.client.closed.code == 1009
    await ended(pair)
    assert [code for code, _ in pair.owner.ends] == [1009]
    assert pair.owner.messages == []


async def test_message_at_the_limit_is_read(pair: Pair) -> None:
    pair.link.data_received(frame(HEARTBEAT + b" " * (MAX_BYTES - len(HEARTBEAT))))
    assert pair.owner.messages == [agenthub.Heartbeat()]


async def test_frame_that_is_not_masked_ends_the_link(pair: Pair) -> None:
    pair.link.data_received(frame(HEARTBEAT, key=b""))
    await ended(pair)
    assert [code for code, _ in pair.owner.ends] == [1002]


def mixed_frames() -> bytes:
    """Return frames of all kinds and of all lengths that are written differently, each message with its number."""
    texts = [
        b'{"type":"heartbeat","id":"%d"%s}' % (number, b" " * more) for number, more in enumerate((0, 90, 120, 4000))
    ]
    middle = b'{"type":"heartbeat","id":"4"}'
    frames = [
        frame(texts[0]),
        frame(b"a", PING),
        frame(texts[1]),
        frame(middle[:9], fin=False),
        frame(b"b", PING),
        frame(middle[9:], CONTINUATION),
        frame(b"", PONG),
        frame(b""),
        frame(texts[2]),
        frame(texts[3]),
        frame(b"c", PING),
    ]
    return b"".join(frames)


async def test_frames_of_all_kinds_come_out_alike_wherever_they_are_cut() -> None:
    raw = mixed_frames()
    for cut in [*range(360), *range(360, len(raw), 97), len(raw) - 1]:
        pair = Pair()
        pair.say()
        await pair.heard()
        for chunk in (raw[:cut], raw[cut:]):
            if chunk:
                pair.link.data_received(chunk)
        ids = [getattr(message, "id", "none") for message in pair.owner.messages]
        assert ids == ["0", "1", "4", "none", "2", "3"], cut
        assert await pair.heard() == [Pong(b"a"), Pong(b"b"), Pong(b"c")], cut
        assert pair.owner.ends == []
        pair.link.abort()


async def test_text_within_a_fragmented_message_ends_the_link(pair: Pair) -> None:
    first = frame(HEARTBEAT[:5], fin=False)
    pair.link.data_received(first + frame(HEARTBEAT) + frame(HEARTBEAT))
    await ended(pair)
    assert pair.owner.messages == []
    assert [code for code, _ in pair.owner.ends] == [1002]


@pytest.mark.parametrize("head", [b"\x81\xfe\x00\x14", b"\x81\xff" + bytes(7) + b"\x14"])
async def test_length_may_be_written_with_more_bytes_than_it_needs(pair: Pair, head: bytes) -> None:
    pair.link.data_received(head + bytes(4) + HEARTBEAT + frame(HEARTBEAT))
    assert pair.owner.messages == [agenthub.Heartbeat()] * 2


async def test_link_that_is_paused_and_resumed_within_a_message_goes_on_in_order(pair: Pair) -> None:
    def pause_for_a_moment(link: agenthub.Link) -> None:
        link.pause_reading("for a moment")
        link.resume_reading("for a moment")

    pair.owner.on_message = pause_for_a_moment
    pair.link.data_received(b"".join(frame(b'{"type":"heartbeat","id":"%d"}' % number) for number in range(5)))
    assert [message.id for message in pair.owner.messages] == ["0", "1", "2", "3", "4"]
    assert pair.socket.is_reading is True


async def test_paused_link_keeps_the_rest_and_goes_on_where_it_was(pair: Pair) -> None:
    pair.owner.on_message = lambda link: link.pause_reading("enough")
    raw = mixed_frames()
    pair.link.data_received(raw[:-3])
    pair.link.data_received(raw[-3:])
    for number in range(6):
        assert len(pair.owner.messages) == number + 1
        assert pair.socket.is_reading is False
        pair.link.resume_reading("enough")
    assert pair.socket.is_reading is True
    assert await pair.heard() == [Pong(b"a"), Pong(b"b"), Pong(b"c")]


async def test_agent_masks_each_message_with_a_key_of_its_own() -> None:
    link = client_link(Owner())
    socket = Socket(link)
    link.connection_made(socket)
    await asyncio.sleep(0)
    socket.writes.clear()
    messages = agenthub.KEYS_BYTES // 4 + 10
    for _ in range(messages):
        link.send(b"same")
    await asyncio.sleep(0)
    raw = b"".join(socket.writes)
    frames = [raw[start : start + 10] for start in range(0, len(raw), 10)]
    assert {frame[:2] for frame in frames} == {b"\x81\x84"}
    assert len({frame[2:6] for frame in frames}) > messages - 3  # 32 bits each: two may be equal.
    unmasked = [bytes(byte ^ key for byte, key in zip(frame[6:], frame[2:6], strict=True)) for frame in frames]
    assert unmasked == [b"same"] * messages
    link.abort()


# The rate limit.


def test_token_bucket_saves_up_one_burst_and_pays_debts_at_its_rate() -> None:
    bucket = agenthub.TokenBucket(rate=100, now=50.0)
    assert bucket.tokens == 200  # Two seconds' worth are there at first.
    bucket.tokens -= 300
    assert bucket.refill(50.0) == pytest.approx(agenthub.PAUSE_MIN_S + 1.0)
    assert bucket.refill(50.4) == pytest.approx(agenthub.PAUSE_MIN_S + 0.6)
    assert bucket.refill(51.0) == 0.0
    bucket.tokens -= 1
    assert bucket.refill(1e6) == 0.0
    assert bucket.tokens == agenthub.BURST_S * 100  # However long it was idle, it has saved up no more than a burst.


def test_token_bucket_is_overdrawn_by_a_bounded_number_of_seconds() -> None:
    bucket = agenthub.TokenBucket(rate=100, now=0.0)
    bucket.tokens -= 1e9
    assert bucket.refill(0.0) == agenthub.PAUSE_MAX_S + agenthub.PAUSE_MIN_S
    assert bucket.refill(agenthub.PAUSE_MAX_S) == 0.0


def test_token_bucket_without_a_rate_is_never_empty() -> None:
    bucket = agenthub.TokenBucket(rate=float("inf"), now=0.0)
    bucket.tokens -= 1e12
    assert bucket.tokens > 0


# Writing.


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65_535, 65_536, 70_000])
async def test_frame_of_any_length_is_read_by_a_client(pair: Pair, length: int) -> None:
    pair.link.send(b"x" * length)
    assert await pair.heard() == [TextMessage("x" * length)]


async def test_all_that_is_sent_in_one_turn_is_written_at_once(pair: Pair) -> None:
    pair.owner.on_message = lambda link: [link.send(b"1"), link.send(b"2")]
    pair.link.data_received(frame(HEARTBEAT) + frame(HEARTBEAT))
    assert pair.socket.writes == []
    await asyncio.sleep(0)
    assert len(pair.socket.writes) == 1
    assert await pair.heard() == [TextMessage(text) for text in "1212"]


async def test_slow_consumer_is_closed_and_then_cut(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "CLOSING_S", 0.05)
    pair.socket.backlog_bytes = 100_001
    pair.link.send(b"x")
    await asyncio.sleep(0)  # For it to be written ...
    await asyncio.sleep(0)  # ... and for the consequences.
    assert pair.owner.ends == [(4002, "does not read")]
    await ended(pair)
    assert pair.socket.is_aborted


async def test_backlog_within_its_limit_is_no_reason_to_close(pair: Pair) -> None:
    pair.socket.backlog_bytes = 100_000
    pair.link.send(b"x")
    await asyncio.sleep(0)
    assert pair.owner.ends == []


# The end.


async def test_peer_that_closes_is_answered(pair: Pair) -> None:
    pair.client.send(CloseConnection(1000, "enough"))
    pair.say()
    assert pair.owner.ends == [(1000, "enough")]
    await pair.heard()
    assert pair.client.closed is not None
    await ended(pair)
    assert not pair.socket.is_aborted


async def test_close_comes_after_what_was_sent_and_nothing_is_read_after_it(pair: Pair) -> None:
    pair.link.send(b"last")
    pair.link.close(1001, "going")
    pair.link.send(b"too late")
    pair.link.close(1000, "again")
    pair.link.data_received(frame(HEARTBEAT))
    assert await pair.heard() == [TextMessage("last"), CloseConnection(1001, "going")]
    assert pair.owner.messages == []
    assert pair.owner.ends == []
    pair.say()
    await ended(pair)
    assert [code for code, _ in pair.owner.ends] == [1001]


async def test_close_that_is_not_answered_is_a_cut(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "CLOSING_S", 0.05)
    pair.link.close(1001, "going")
    await ended(pair)
    assert pair.socket.is_aborted
    assert len(pair.owner.ends) == 1


@pytest.mark.parametrize("how", ["cut", "end of file", "abort"])
async def test_lost_connection_is_reported_once(pair: Pair, how: str) -> None:
    if how == "cut":
        pair.link.connection_lost(ConnectionResetError())
    elif how == "end of file":
        pair.link.eof_received()
        await ended(pair)
    else:
        pair.link.abort()
        pair.link.abort()
        await ended(pair)
    assert [code for code, _ in pair.owner.ends] == [1006]


async def test_socket_that_never_becomes_a_websocket_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "HANDSHAKE_S", 0.05)
    pair = Pair()
    pair.link.data_received(b"GET / HTTP/1.1\r\n")
    async with asyncio.timeout(WAIT_S):
        while not pair.socket.is_ended:
            await asyncio.sleep(0.002)
    assert (pair.owner.opened_count, pair.owner.ends) == (0, [])


async def test_request_that_waits_for_its_turn_is_not_cut_as_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub to which thousands of agents come back may take longer for all of them than one handshake may take."""
    monkeypatch.setattr(agenthub, "HANDSHAKE_S", 0.05)
    pair = Pair()
    pair.link.pause_reading(agenthub.PauseReason.TURN_OVER)
    pair.say()
    await asyncio.sleep(0.2)
    assert not pair.socket.is_ended
    pair.link.resume_reading(agenthub.PauseReason.TURN_OVER)
    (response,) = await pair.heard()
    assert isinstance(response, AcceptConnection)
    await asyncio.sleep(0.2)
    assert not pair.socket.is_ended


async def test_plain_request_is_answered_and_the_socket_closed() -> None:
    pair = Pair(lambda link, request: agenthub.HttpAnswer(200, f"asked for {request.path}\n"))
    pair.say()
    await asyncio.sleep(0)
    head, _, body = b"".join(pair.socket.writes).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert body == b"asked for /\n"
    async with asyncio.timeout(WAIT_S):
        while not pair.socket.is_ended:
            await asyncio.sleep(0.002)
    assert (pair.owner.opened_count, pair.owner.ends) == (0, [])


async def test_what_is_no_http_is_cut() -> None:
    pair = Pair()
    pair.link.data_received(b"\x16\x03\x01\x00garbage\r\n\r\n")
    async with asyncio.timeout(WAIT_S):
        while not pair.socket.is_ended:
            await asyncio.sleep(0.002)
    assert pair.owner.opened_count == 0


async def test_random_bytes_do_no_harm(pair: Pair) -> None:
    for _ in range(200):
        pair.link.data_received(os.urandom(50))
    await ended(pair)
    assert len(pair.owner.ends) == 1


# In memory.


@pytest.fixture
async def memory() -> tuple[Owner, Owner, agenthub.Link, agenthub.Link]:
    hub_side, agent_side = Owner(), Owner()
    near, far = agenthub.MemoryLink.pair(
        (agent_side, agenthub.decoder_from_hub()), (hub_side, agenthub.decoder_from_agent())
    )
    return hub_side, agent_side, near, far


Memory = tuple[Owner, Owner, agenthub.Link, agenthub.Link]


async def test_message_in_memory_is_encoded_and_decoded(memory: Memory) -> None:
    hub_side, agent_side, near, far = memory
    near.send(agenthub.encode(agenthub.Heartbeat(id="1")))
    far.send(agenthub.encode(agenthub.HeartbeatAck(reply_to="1")))
    assert hub_side.messages == []  # Nobody is called from within his own call.
    await asyncio.sleep(0)
    assert hub_side.messages == [agenthub.Heartbeat(id="1")]
    assert agent_side.messages == [agenthub.HeartbeatAck(reply_to="1")]
    assert hub_side.sizes == [len(agenthub.encode(agenthub.Heartbeat(id="1")))]


async def test_message_in_memory_that_is_none_is_told_as_such(memory: Memory) -> None:
    hub_side, _, near, _ = memory
    near.send(b'{"type": "heartbeat", "id": 1}')
    near.send(HEARTBEAT)
    await asyncio.sleep(0)
    refused, message = hub_side.messages
    assert isinstance(refused, InvalidMessage)
    assert message == agenthub.Heartbeat()


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_link_in_memory_closes_at_both_ends_once(memory: Memory, how: str) -> None:
    hub_side, agent_side, near, far = memory
    near.send(HEARTBEAT)
    far.send(b'{"type": "heartbeat_ack"}')
    if how == "close":
        near.close(1001, "going")
    else:
        near.abort()
    near.close(1000, "again")
    near.send(HEARTBEAT)
    for _ in range(3):
        await asyncio.sleep(0)
    far.close(1000, "late")
    far.send(b'{"type": "heartbeat_ack"}')
    for _ in range(3):
        await asyncio.sleep(0)
    assert hub_side.messages == [agenthub.Heartbeat()]  # What was sent before the close arrives.
    assert agent_side.messages == []
    expected = [(1001, "going")] if how == "close" else [(1006, "cut")]
    assert (hub_side.ends, agent_side.ends) == (expected, expected)


# An agent's way to a hub.


@pytest.mark.parametrize(
    "url", ["", "hub", "http://hub", "ws://", "ws://hub/#part", "ws://ho st", "ws:///path", "wss://hub?query", "ws:hub"]
)
def test_what_is_no_url_of_a_hub_is_a_value_error(url: str) -> None:
    with pytest.raises(ValueError, match="a hub's URL looks like"):
        agenthub.check_url(url)


@pytest.mark.parametrize("url", ["ws://hub", "wss://hub:1/", "ws://[::1]:8765", "ws://hub/path?query=1"])
def test_url_of_a_hub_is_returned(url: str) -> None:
    assert agenthub.check_url(url) == url


@pytest.mark.parametrize("url", ["WS://Hub/A", "ws://Hub/A\n", "\ufeff Ws://Hub/A\r\n"])
def test_blanks_and_capitals_that_do_not_matter_in_a_url_are_removed(url: str) -> None:
    assert agenthub.check_url(url) == Agent("a", url=url).url == "ws://Hub/A"
    assert agenthub.split_url(url) == ("hub", 80, False, "/A")


# Several URLs.


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        ("ws://a,ws://b", "ws://a,ws://b"),
        ("WS://a:1/x,y , wss://b/", "ws://a:1/x,y,wss://b/"),
        ("ws://a,ws://a", "ws://a"),
    ],
)
def test_urls_are_separated_by_commas_before_a_scheme(urls: str, expected: str) -> None:
    assert agenthub.check_urls(urls) == Agent("a", url=urls).url == expected


@pytest.mark.parametrize("urls", ["ws://a,b", "ws://a,", "ws://a:8765,b:8765,ws://c"])
def test_url_without_a_scheme_behind_a_comma_is_a_value_error(urls: str) -> None:
    with pytest.raises(ValueError, match=r"each of several URLs needs its scheme, such as ws://hub1:8765,ws://"):
        agenthub.check_urls(urls)


@pytest.mark.parametrize("urls", ["", "ws://a,,ws://b", "ws://a,http://b"])
def test_wrong_url_among_several_is_a_value_error(urls: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        agenthub.check_urls(urls)


async def test_first_hub_that_answers_is_used_and_remembered() -> None:
    async with HubServer(port=0) as hub:
        hubs = agenthub.HubUrls(f"ws://127.0.0.1:9,{hub.url}")
        for _ in range(2):
            link = await hubs.connect(Owner())
            link.abort()
            assert hubs.urls == [hub.url, "ws://127.0.0.1:9"]


async def test_hub_that_does_not_answer_delays_the_next_one_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "NEXT_HUB_S", 0.1)  # Instead of 3; the handshake of a single hub has 10.
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0)
    silent = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with HubServer(port=0) as hub, asyncio.timeout(WAIT_S / 2), Agent("me", url=f"{silent},{hub.url}") as me:
        assert me.is_online
    server.close()


async def test_all_hubs_that_do_not_answer_are_named() -> None:
    with pytest.raises(Disconnected, match=r"^no hub at ws://127.0.0.1:9: .*; no hub at ws://127.0.0.1:10: "):
        await agenthub.HubUrls("ws://127.0.0.1:9,ws://127.0.0.1:10").connect(Owner())


async def test_connecting_to_a_port_where_nothing_listens_says_how_to_start_a_hub() -> None:
    with pytest.raises(
        Disconnected, match=r"^no hub at ws://127.0.0.1:9: nothing listens there; start one with \"agenthub hub\"$"
    ):
        await agenthub.connect_websocket("ws://127.0.0.1:9", Owner())


async def test_unknown_host_is_disconnected() -> None:
    with pytest.raises(Disconnected, match=r"no hub at ws://no-such-host.invalid"):
        await agenthub.connect_websocket("ws://no-such-host.invalid", Owner())


async def test_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "HANDSHAKE_S", 0.1)
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0)
    url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    with pytest.raises(Disconnected, match=r"^no hub answers at ws://127.0.0.1:\d+ within 0.1 s; check host and port$"):
        await agenthub.connect_websocket(url, Owner())
    server.close()


async def test_connecting_can_be_cancelled_at_any_moment(caplog: pytest.LogCaptureFixture) -> None:
    import gc

    async with HubServer(port=0) as hub:
        for steps in range(25):
            connecting = asyncio.create_task(agenthub.connect_websocket(hub.url, Owner()))
            for _ in range(steps):
                await asyncio.sleep(0)
            if connecting.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await connecting
            else:
                (await connecting).abort()
            await asyncio.sleep(0.01)
        gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


async def rejection(*chunks: bytes, closes: bool = True) -> tuple[bytes, str]:
    """Return the handshake that a server is sent, and what is said of its response in these chunks."""
    requests: list[bytes] = []
    is_over, is_served = asyncio.Event(), asyncio.Event()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            requests.append(await reader.readuntil(b"\r\n\r\n"))
            for chunk in chunks:
                writer.write(chunk)
                await asyncio.sleep(0.01)
            if not closes:
                await is_over.wait()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        finally:
            is_served.set()

    server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
    try:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/path"
        with pytest.raises(Disconnected) as caught:
            await asyncio.wait_for(agenthub.connect_websocket(url, Owner()), WAIT_S)
    finally:
        is_over.set()
        await asyncio.wait_for(is_served.wait(), WAIT_S)
        server.close()
    assert str(caught.value).startswith(f"no hub at {url}: server rejected WebSocket connection: HTTP ")
    return requests[0], str(caught.value).partition(": HTTP ")[2]


BODY_IN_CHUNKS = b"3\r\nno!\r\n0\r\n\r\n"
HTML = b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n</html>\r\n"


@pytest.mark.parametrize(
    ("head", "body", "text"),
    [
        ("403 Forbidden", b"", "403"),
        ("403 Forbidden", b"name the host\n", "403; name the host"),
        ("403 Forbidden", b"\r\n\x1b[2J\nanother line", "403; \\x1b[2J"),
        ("503 Busy", b"\xc3\xa4\xff\nmore", "503; \u00e4\ufffd"),
        ("403 Forbidden\r\nTransfer-Encoding: chunked", BODY_IN_CHUNKS, "403; no!"),
        ("502 Bad Gateway\r\nContent-Type: text/html", HTML, "502; 502 Bad Gateway"),
        ("301 Moved\r\nLocation: https://hub.example/", b"", "301; it redirects to https://hub.example/"),
    ],
)
@pytest.mark.parametrize("closes", [True, False])
async def test_rejected_handshake_says_what_the_server_says(head: str, body: bytes, text: str, closes: bool) -> None:
    if "chunked" not in head:
        head += f"\r\nContent-Length: {len(body)}"
    chunks = [f"HTTP/1.1 {head}\r\n\r\n".encode(), *(body[at : at + 7] for at in range(0, len(body), 7))]
    assert (await rejection(*chunks, closes=closes))[1] == text


async def test_rejection_without_a_length_ends_with_its_connection() -> None:
    assert (await rejection(b"HTTP/1.1 403 No\r\n\r\n", b"name", b" it"))[1] == "403; name it"


async def test_what_is_shown_of_a_rejection_is_bounded() -> None:
    text = (await rejection(b"HTTP/1.1 403 No\r\nLocation: " + b"x" * 4000 + b"\r\n\r\n" + b"y" * 100_000))[1]
    assert len(text) < 2 * agenthub.REJECTION_CHARACTERS_MAX + 100
    assert "y" * agenthub.REJECTION_CHARACTERS_MAX in text


async def test_agent_shows_what_the_hub_says_of_a_host_that_it_does_not_allow() -> None:
    async with HubServer(port=0) as hub:
        url = f"ws://localhost.localdomain:{hub.port}"
        link = agenthub.websockets_used().client(url, 1000)
        reader, writer = await asyncio.open_connection("127.0.0.1", hub.port)
        link.send_request(link.connect())
        writer.write(link.data_to_send())
        link.receive_data(await asyncio.wait_for(reader.read(), WAIT_S))
        link.next_event()
        link.receive_eof()
        writer.close()
    assert link.handshake_exc is not None
    assert "--allow-host" in agenthub.rejection_text(link.handshake_exc)


async def authorization_sent() -> list[str]:
    """Return the Authorization headers that a hub is sent in the handshake, with this user in its URL."""
    request, _ = await rejection(b"HTTP/1.1 403 Forbidden\r\n\r\n")
    headers = [line.partition(": ") for line in request.decode().splitlines()[1:]]
    return [value for name, _, value in headers if name.lower() == "authorization"]


@pytest.mark.parametrize("token", ["t0ken", "!~-._/+=", "x" * 4000])
async def test_token_is_sent_once(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTHUB_TOKEN", token)
    assert await authorization_sent() == [f"Bearer {token}"]


@pytest.mark.parametrize("token", [None, ""])
async def test_without_a_token_none_is_sent(token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTHUB_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("AGENTHUB_TOKEN", token)
    assert await authorization_sent() == []


@pytest.mark.parametrize(
    ("url", "parts", "host_header"),
    [
        ("ws://127.0.0.1:8765", ("127.0.0.1", 8765, False, "/"), "127.0.0.1:8765"),
        ("wss://hub.example", ("hub.example", 443, True, "/"), "hub.example"),
        ("ws://h:443/a?b?c", ("h", 443, False, "/a?b?c"), "h:443"),
        ("ws://[::1]:8/", ("::1", 8, False, "/"), "[::1]:8"),
        ("wss://ä.example/ü?x=ö&y=%20", ("xn--4ca.example", 443, True, "/%C3%BC?x=%C3%B6&y=%20"), "xn--4ca.example"),
    ],
)
def test_url_is_taken_apart_into_what_a_request_is_made_of(url: str, parts: Any, host_header: str) -> None:
    assert agenthub.split_url(url) == parts
    assert agenthub.split_url(url).host_header == host_header


@pytest.mark.parametrize("url", ["ws://:80", "ws://[::1", "ws://h:99999", "ws://h:b", "ws://a..b", f"ws://{'a' * 64}"])
async def test_url_that_leads_nowhere_is_a_value_error(url: str) -> None:
    with pytest.raises(ValueError, match="is not a hub's URL: "):
        await agenthub.connect_websocket(url, Owner())


async def test_user_and_password_of_a_url_are_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match="AGENTHUB_TOKEN") as refused:
        await agenthub.connect_websocket("ws://ada:s3cret@127.0.0.1:1", Owner())
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("token", [" ", "two words", "a\r\nX-Header: b", "é", "\x7f"])
async def test_token_that_is_no_header_is_a_value_error_before_anything_is_sent(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTHUB_TOKEN", token)
    with pytest.raises(ValueError, match=r"^AGENTHUB_TOKEN: ") as caught:
        await agenthub.connect_websocket("ws://127.0.0.1:9", Owner())
    assert not token.strip() or token not in str(caught.value)  # It is a secret, however it is written.


async def test_agent_reads_what_the_hub_answers() -> None:
    owner = Owner()
    async with HubServer(port=0) as hub:
        link = await agenthub.connect_websocket(hub.url, owner)
        link.send(json.dumps({"type": "status", "id": "1"}).encode())
        async with asyncio.timeout(WAIT_S):
            while not owner.messages:
                await asyncio.sleep(0.002)
            assert owner.messages[0].reply_to == "1"
            link.close(1000, "done")
            while not owner.ends:
                await asyncio.sleep(0.002)
    assert owner.ends == [(1000, "done")]


async def test_answers_that_nobody_can_read_any_more_are_not_kept(pair: Pair) -> None:
    pair.socket.is_ended = True
    tracemalloc.start()
    try:
        for _ in range(2000):
            pair.link.send(bytes(1000))
            await asyncio.sleep(0)
        assert tracemalloc.get_traced_memory()[0] < 500_000
    finally:
        tracemalloc.stop()


# Names with several addresses.


@pytest.mark.parametrize("swallowed", [1, 3])
async def test_hub_is_reached_although_some_of_its_addresses_swallow_packets(
    swallowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agenthub, "NEXT_ADDRESS_S", 0.01)
    connect = agenthub.connect_socket
    dead = [(socket.AF_INET, (f"192.0.2.{number}", 80)) for number in range(swallowed)]

    async def connecting(family: int, address: Any) -> socket.socket:
        if (family, address) in dead:
            await asyncio.Event().wait()
        return await connect(family, address)

    async with HubServer(port=0) as hub:

        async def looked_up(host: str, port: int) -> list[tuple[int, Any]]:
            return [*dead, (socket.AF_INET, ("127.0.0.1", hub.port))]

        monkeypatch.setattr(agenthub, "connect_socket", connecting)
        monkeypatch.setattr(agenthub, "addresses_of", looked_up)
        async with asyncio.timeout(WAIT_S), agenthub.Agent("me", url=hub.url) as me:
            assert me.is_online


async def test_next_address_is_tried_at_once_when_one_refuses() -> None:
    async with HubServer(port=0) as hub:
        url = hub.url.replace("127.0.0.1", "localhost")  # Which often has ::1 too, where nothing listens.
        async with asyncio.timeout(WAIT_S), agenthub.Agent("me", url=url) as me:
            assert me.is_online


async def test_addresses_of_both_families_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    six, four = socket.AF_INET6, socket.AF_INET
    found = [(family, 1, 6, "", (str(number),)) for number, family in enumerate([six, six, six, four])]

    async def getaddrinfo(*args: Any, **options: Any) -> Any:
        return found

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    assert [family for family, _ in await agenthub.addresses_of("hub.example", 80)] == [six, four, six, six]


async def test_unexpected_error_while_connecting_is_raised_and_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(host: str, port: int) -> Any:
        raise TypeError("a bug")

    monkeypatch.setattr(agenthub, "addresses_of", broken)
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(TypeError, match="a bug"):
            await Agent("me", url="ws://127.0.0.1:1").start()
