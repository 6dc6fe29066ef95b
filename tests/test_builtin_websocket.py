"""Section 6, the WebSocket that is built in: RFC 6455 without a socket, fed by hand, and compared with other packages.

It runs where neither `websockets` nor Pydantic is installed; what compares with a missing package is skipped.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import itertools
import random
import re
import unittest.mock
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import agenthub
from agenthub import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    BuiltinClient,
    BuiltinServer,
    CloseFrame,
    Frame,
    Message,
    Violation,
    apply_mask,
)
from tests.raw_websocket import RawFrame, frame, frames_in, mask

LIMIT = 1000  # Of a message, in bytes.
KEY = b"\xa1\x02\xf3\x44"  # What the clients of these tests mask with.
BUILT_IN = agenthub.WebSockets("built in", BuiltinServer, BuiltinClient, agenthub.HandshakeFailed)

# The example of RFC 6455 §1.3.
NONCE, ACCEPTED = "dGhlIHNhbXBsZSBub25jZQ==", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
REQUEST_LINES = [
    "GET /path?query HTTP/1.1",
    "Host: hub:1",
    "Upgrade: websocket",
    "Connection: Upgrade",
    f"Sec-WebSocket-Key: {NONCE}",
    "Sec-WebSocket-Version: 13",
]
RESPONSE_LINES = [
    "HTTP/1.1 101 Switching Protocols",
    "Upgrade: websocket",
    "Connection: Upgrade",
    f"Sec-WebSocket-Accept: {ACCEPTED}",
]


def head(lines: Iterable[str]) -> bytes:
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


REQUEST, RESPONSE = head(REQUEST_LINES), head(RESPONSE_LINES)


def changed(lines: list[str], *changes: str) -> bytes:
    """Return a head in which each header of the changes stands instead of those of its name; `Name:` leaves it out."""
    names = tuple(change.partition(":")[0].lower() + ":" for change in changes)
    kept = [line for line in lines if not line.lower().startswith(names)]
    return head([*kept, *(change for change in changes if not change.endswith(":"))])


def close_of(code: int, reason: bytes = b"") -> bytes:
    return code.to_bytes(2, "big") + reason


class End:
    """One end of a WebSocket, and all that has come of what it was fed. A server's requests are accepted.

    Whole messages are written down as the one frame that they could have been. What broke the rules is no event, but
    in `violations`.
    """

    def __init__(self, protocol: agenthub.WebSocketProtocol) -> None:
        self.protocol = protocol
        self.events: list[Any] = []
        self.violations: list[Violation] = []
        self.written = b""
        self.is_ended = False

    def feed(self, *chunks: bytes) -> End:
        for chunk in chunks:
            self.protocol.receive_data(chunk)
            self.take()
        return self

    def take(self) -> None:
        while (event := self.protocol.next_event()) is not None:
            if isinstance(event, bytes):
                self.events.append(Frame(TEXT, event, True))
            elif isinstance(event, Message):
                self.events.append(Frame(TEXT if event.is_text else BINARY, event.raw, True))
            elif isinstance(event, Violation):
                self.violations.append(event)
            elif event is not agenthub.COSTLY:
                self.events.append(event)
                if not isinstance(event, Frame | CloseFrame) and self.protocol.is_server:
                    self.protocol.accept(event)
            self.write()
        self.write()

    def write(self) -> None:
        raw = self.protocol.data_to_send()
        assert not (raw and self.is_ended)  # Nothing comes after the end.
        self.written += raw
        self.is_ended = self.protocol.has_ended

    def clear(self) -> None:
        self.events.clear()
        self.written = b""

    @property
    def said(self) -> list[RawFrame]:
        return frames_in(self.written, masked=not self.protocol.is_server)

    @property
    def failed_with(self) -> int | None:
        """The code of the close frame, which must be the last frame; None if there is none."""
        assert not any(one.opcode == CLOSE for one in self.said[:-1])
        last = self.said[-1:]
        return int.from_bytes(last[0].data[:2], "big") if last and last[0].opcode == CLOSE else None


def new_server(limit: int = LIMIT) -> End:
    return End(BuiltinServer(limit))


@contextlib.contextmanager
def key_of_the_rfc() -> Iterator[None]:
    """Have clients that are made meanwhile send the key of the RFC's example, in either implementation."""
    nonce = base64.b64decode(NONCE)
    with (
        unittest.mock.patch("os.urandom", lambda size: nonce[:size]),
        unittest.mock.patch("secrets.token_bytes", lambda size: nonce[:size]),
    ):
        yield


def new_client(limit: int = LIMIT) -> End:
    """Return a client that has sent its request, which is that of the RFC's example."""
    with key_of_the_rfc():
        protocol = BuiltinClient("ws://hub:1/path?query", limit)
    request_of(protocol)
    return End(protocol)


def opened(end: End, opening: bytes) -> End:
    end.feed(opening)
    assert end.protocol.handshake_exc is None
    end.clear()
    return end


class Role(NamedTuple):
    """One of the ends, and what the other one masks its frames with."""

    name: str
    new: Callable[..., End]
    opening: bytes
    key: bytes

    def opened(self, limit: int = LIMIT) -> End:
        return opened(self.new(limit), self.opening)

    def frame(self, opcode: int, payload: bytes = b"", **options: Any) -> bytes:
        """Return a frame as the other end has to write it."""
        return frame(payload, opcode, **{"key": self.key, **options})


SERVER, CLIENT = Role("server", new_server, REQUEST, KEY), Role("client", new_client, RESPONSE, b"")
both_roles = pytest.mark.parametrize("role", [SERVER, CLIENT], ids=lambda role: role.name)


# The handshake of a server


def answer_to(*chunks: bytes) -> tuple[int, dict[str, str], End]:
    """Return the status and the headers that a server answers with, and the server."""
    end = new_server().feed(*chunks)
    first, *lines = end.written.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    status = int(first.split()[1])
    assert end.is_ended == (status != 101)
    assert (end.protocol.handshake_exc is None) == (status == 101)
    return status, dict(line.split(": ", 1) for line in lines), end


def test_request_of_the_rfc_is_answered_as_there() -> None:
    status, headers, end = answer_to(REQUEST)
    assert (status, headers) == (
        101,
        {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": ACCEPTED},
    )
    (request,) = end.events
    assert (request.method, request.path, request.version) == ("GET", "/path?query", "HTTP/1.1")
    assert request.headers.get_all("HOST") == ["hub:1"]
    assert not end.protocol.close_expected()


@pytest.mark.parametrize(
    "change",
    [
        "Upgrade: WebSocket",
        "upgrade:websocket",
        "UPGRADE: \t websocket \t",
        "Connection: keep-alive, Upgrade",
        "Connection: foo ,\tUPGRADE\t, bar",
        "Content-Length: 0",
        "Sec-WebSocket-Extensions: permessage-deflate",
        "Sec-WebSocket-Protocol: chat",
        "X: \xe9",
        "X:",
        "!#$%&'*+-.^_`|~09Az: x",
    ],
)
def test_request_may_be_written_in_many_ways(change: str) -> None:
    status, headers, _ = answer_to(changed(REQUEST_LINES, change))
    assert status == 101
    assert headers.keys() == {"Upgrade", "Connection", "Sec-WebSocket-Accept"}


def test_words_of_a_header_may_stand_in_several() -> None:
    lines = [line for line in REQUEST_LINES if not line.startswith("Connection")]
    assert answer_to(head([*lines, "Connection: keep-alive", "connection: upgrade"]))[0] == 101


REFUSED_REQUESTS: dict[str, tuple[bytes, int]] = {
    "method": (REQUEST.replace(b"GET", b"POST"), 405),
    "old version": (REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0"), 505),
    "other version": (REQUEST.replace(b"HTTP/1.1", b"HTTP/2.0"), 400),
    "version in lower case": (REQUEST.replace(b"HTTP/1.1", b"http/1.1"), 400),
    "no version": (REQUEST.replace(b" HTTP/1.1", b""), 400),
    "space in the path": (REQUEST.replace(b"/path", b"/pa th"), 400),
    "no first line": (b"\r\n" + REQUEST, 400),
    "path that is not ASCII": (REQUEST.replace(b"/path", b"/p\xc3\xa4th"), 400),
    "control character in the first line": (REQUEST.replace(b"/path", b"/pa\x00th"), 400),
    "carriage return in the first line": (REQUEST.replace(b"/path", b"/pa\rth"), 400),
    "no Upgrade": (changed(REQUEST_LINES, "Upgrade:"), 426),
    "other Upgrade": (changed(REQUEST_LINES, "Upgrade: h2c"), 426),
    "no Connection": (changed(REQUEST_LINES, "Connection:"), 426),
    "other Connection": (changed(REQUEST_LINES, "Connection: keep-alive"), 426),
    "Connection of a longer word": (changed(REQUEST_LINES, "Connection: upgraded, notupgrade"), 426),
    "no key": (changed(REQUEST_LINES, "Sec-WebSocket-Key:"), 400),
    "two keys": (head([*REQUEST_LINES, f"Sec-WebSocket-Key: {NONCE}"]), 400),
    "short key": (changed(REQUEST_LINES, "Sec-WebSocket-Key: dGhlIHNhbXBsZQ=="), 400),
    "long key": (changed(REQUEST_LINES, f"Sec-WebSocket-Key: AAAA{NONCE}"), 400),
    "key that is no Base64": (changed(REQUEST_LINES, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25j*Q=="), 400),
    "empty key": (changed(REQUEST_LINES, "Sec-WebSocket-Key: "), 400),
    "no version of the protocol": (changed(REQUEST_LINES, "Sec-WebSocket-Version:"), 400),
    "two versions of the protocol": (head([*REQUEST_LINES, "Sec-WebSocket-Version: 13"]), 400),
    "older version of the protocol": (changed(REQUEST_LINES, "Sec-WebSocket-Version: 8"), 426),
    "newer version of the protocol": (changed(REQUEST_LINES, "Sec-WebSocket-Version: 14"), 426),
    "body": (changed(REQUEST_LINES, "Content-Length: 5"), 400),
    "body of two lengths": (head([*REQUEST_LINES, "Content-Length: 0", "Content-Length: 5"]), 400),
    "body without a length": (changed(REQUEST_LINES, "Transfer-Encoding: chunked"), 400),
    "bare line feed": (REQUEST.replace(b"Host: hub:1\r\n", b"Host: hub:1\n"), 400),
    "bare line feeds only": (REQUEST.replace(b"\r\n", b"\n"), 400),
    "line feed in a header": (REQUEST.replace(b"hub:1", b"hub\n:1"), 400),
    "carriage return in a header": (REQUEST.replace(b"hub:1", b"hub\r:1"), 400),
    "zero in a header": (REQUEST.replace(b"hub:1", b"hub\x00:1"), 400),
    "delete in a header": (REQUEST.replace(b"hub:1", b"hub\x7f:1"), 400),
    "control character in a name": (REQUEST.replace(b"Host", b"Ho\x01st"), 400),
    "header that is not ASCII in its name": (REQUEST.replace(b"Host", b"H\xf6st"), 400),
    "space before the colon": (REQUEST.replace(b"Host:", b"Host :"), 400),
    "folded header": (REQUEST.replace(b"hub:1", b"hub\r\n :1"), 400),
    "header without a colon": (REQUEST.replace(b"Host: hub:1", b"Host"), 400),
    "header without a name": (REQUEST.replace(b"Host: hub:1", b": hub"), 400),
    "too long first line": (REQUEST.replace(b"/path", b"/" + b"x" * agenthub.HEAD_LINE_BYTES_MAX), 431),
    "too long header": (changed(REQUEST_LINES, "X: " + "x" * (agenthub.HEAD_LINE_BYTES_MAX - 2)), 431),
    "too many headers": (head([*REQUEST_LINES, *["X: y"] * (agenthub.HEADERS_MAX - 4)]), 431),
    "too much without an end": (b"GET /" + b"x" * agenthub.HEAD_BYTES_MAX, 431),
    "TLS": (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n", 400),
}


@pytest.mark.parametrize(("raw", "status"), REFUSED_REQUESTS.values(), ids=REFUSED_REQUESTS.keys())
def test_request_that_is_no_handshake_is_answered_with_why_not(raw: bytes, status: int) -> None:
    answered, headers, end = answer_to(raw)
    body = end.written.partition(b"\r\n\r\n")[2]
    assert answered == status
    assert headers["Connection"] == "close"
    assert int(headers["Content-Length"]) == len(body) > 0
    assert (headers.get("Sec-WebSocket-Version"), headers.get("Upgrade")) == (
        ("13", "websocket") if status == 426 else (None, None)
    )
    assert headers.get("Allow") == ("GET" if status == 405 else None)
    assert end.protocol.close_expected()
    end.feed(REQUEST, frame(b"", PING))  # Nothing is read any more ...
    end.protocol.receive_eof()
    end.take()
    assert len(end.events) <= 1
    assert end.is_ended  # ... nor written, the end included.


def test_limits_of_a_head_are_exact() -> None:
    """One line, their number, and all of them: at the limit a request is accepted, however it is cut."""
    longest = agenthub.HEAD_LINE_BYTES_MAX
    assert answer_to(changed(REQUEST_LINES, "X: " + "x" * (longest - 3)))[0] == 101
    assert answer_to(head([*REQUEST_LINES, *["X: y"] * (agenthub.HEADERS_MAX - 5)]))[0] == 101


@pytest.mark.parametrize("more", [-4, -3, -2, -1, 0, 1, 2])
@pytest.mark.parametrize("rest", [0, 1, 2, 3, 4])
def test_limit_of_all_headers_does_not_depend_on_how_they_are_cut(more: int, rest: int) -> None:
    size = agenthub.HEAD_BYTES_MAX + more
    filler = [*REQUEST_LINES, *["X: " + "x" * 7995] * 8]
    missing = size - len(head(filler))
    raw = head([*filler, "Y: " + "y" * (missing - 5)])
    assert len(raw) == size
    assert answer_to(raw[: len(raw) - rest], raw[len(raw) - rest :])[0] == (101 if more <= 0 else 431)


@pytest.mark.parametrize("raw", [b"A" * 1000, b"A: b\r\n" * 170, b"\r" * 1000], ids=["line", "headers", "returns"])
def test_head_without_an_end_takes_no_more_memory_than_its_limit(raw: bytes) -> None:
    end = new_server()
    for _ in range(200):
        end.feed(raw)
        assert end.protocol.unread_bytes <= agenthub.HEAD_BYTES_MAX + len(raw)
    assert end.is_ended


def test_plain_request_can_be_answered_plainly() -> None:
    protocol = BuiltinServer(LIMIT)
    protocol.receive_data(b"GET /health HTTP/1.0\r\n\r\nGET / HTTP/1.1\r\n\r\n")
    request = protocol.next_event()
    assert isinstance(request, agenthub.Request)
    assert (request.path, request.headers.get_all("Host")) == ("/health", [])
    assert protocol.next_event() is None  # Nothing is read on before the answer, nor after this one.
    protocol.reject(agenthub.HttpAnswer(503, "späte\n", "application/json"))
    assert protocol.next_event() is None
    raw = protocol.data_to_send()
    assert raw.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert b"\r\nContent-Length: 7\r\n" in raw
    assert b"\r\nContent-Type: application/json\r\n" in raw
    assert raw.partition(b"\r\n\r\n")[2] == "späte\n".encode()
    assert protocol.has_ended


# The handshake of a client


def request_of_a_client() -> tuple[str, dict[str, str]]:
    """Return the first line and the headers of a client's request with a token."""
    protocol = BuiltinClient("ws://hub:1/path?query", LIMIT)
    request = protocol.connect()
    request.headers["Authorization"] = "Bearer x"
    protocol.send_request(request)
    first, *lines = protocol.data_to_send().decode().split("\r\n")
    assert lines[-2:] == ["", ""]
    return first, dict(line.split(": ", 1) for line in lines[:-2])


def test_request_of_a_client_has_what_the_rfc_asks_for() -> None:
    first, headers = request_of_a_client()
    assert first == "GET /path?query HTTP/1.1"
    assert headers | {"User-Agent": "", "Sec-WebSocket-Key": ""} == {
        "Host": "hub:1",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "",
        "Sec-WebSocket-Version": "13",
        "User-Agent": "",
        "Authorization": "Bearer x",
    }
    assert headers["Sec-WebSocket-Key"] != request_of_a_client()[1]["Sec-WebSocket-Key"]


@pytest.mark.parametrize(
    ("url", "host", "path"),
    [
        ("ws://hub", "hub", "/"),
        ("ws://hub:80/", "hub", "/"),
        ("ws://hub:443", "hub:443", "/"),
        ("wss://hub:443", "hub", "/"),
        ("wss://hub:80/?a=b", "hub:80", "/?a=b"),
        ("ws://[::1]:8765/a%20b", "[::1]:8765", "/a%20b"),
        ("ws://b\xfccher/\xe4%20?\xfc", "xn--bcher-kva", "/%C3%A4%20?%C3%BC"),
    ],
)
def test_host_and_path_of_a_request_are_those_of_the_url(url: str, host: str, path: str) -> None:
    request = BuiltinClient(url, LIMIT).connect()
    assert (request.headers.get_all("Host"), request.path) == ([host], path)


@pytest.mark.parametrize(
    "raw",
    [
        RESPONSE,
        changed(RESPONSE_LINES, "Upgrade: WebSocket"),
        changed(RESPONSE_LINES, "connection: keep-alive, uPgRaDe"),
        changed(RESPONSE_LINES, "Server: x", "Date: y"),
        RESPONSE.replace(b"Switching Protocols", b""),
        RESPONSE.replace(b"Switching Protocols", b"Anders sch\xf6n"),
    ],
)
def test_response_that_opens_is_taken(raw: bytes) -> None:
    end = new_client().feed(raw + frame(b"x", key=b""))
    assert end.protocol.handshake_exc is None
    response, text = end.events
    assert response.status_code == 101
    assert text == Frame(TEXT, b"x", True)
    assert not end.protocol.close_expected()
    assert end.written == b""


REFUSED_RESPONSES: dict[str, tuple[bytes, str]] = {
    "forbidden": (head(["HTTP/1.1 403 Forbidden", "Content-Length: 2"]) + b"no", "HTTP 403"),
    "OK": (RESPONSE.replace(b"101", b"200").replace(b"Upgrade: ", b"Content-Length: 0\r\nUpgrade: "), "HTTP 200"),
    "continue": (RESPONSE.replace(b"101", b"100"), "HTTP 100"),
    "no number": (RESPONSE.replace(b"101", b"1o1"), "valid HTTP response"),
    "no such number": (RESPONSE.replace(b"101", b"601"), "valid HTTP response"),
    "long number": (RESPONSE.replace(b"101", b"1010"), "valid HTTP response"),
    "old version": (RESPONSE.replace(b"HTTP/1.1", b"HTTP/1.0"), "valid HTTP response"),
    "other protocol": (b"SSH-2.0-OpenSSH_9.6 x y\r\n\r\n", "valid HTTP response"),
    "one word": (b"+OK\r\n\r\n", "first line"),
    "bare line feeds": (RESPONSE.replace(b"\r\n", b"\n"), "CR and LF"),
    "no Upgrade": (changed(RESPONSE_LINES, "Upgrade:"), "upgrade"),
    "other Upgrade": (changed(RESPONSE_LINES, "Upgrade: h2c"), "upgrade"),
    "no Connection": (changed(RESPONSE_LINES, "Connection:"), "upgrade"),
    "other Connection": (changed(RESPONSE_LINES, "Connection: close"), "upgrade"),
    "no Accept": (changed(RESPONSE_LINES, "Sec-WebSocket-Accept:"), "Sec-WebSocket-Accept must occur exactly once"),
    "two Accepts": (
        head([*RESPONSE_LINES, f"Sec-WebSocket-Accept: {ACCEPTED}"]),
        "Sec-WebSocket-Accept must occur exactly once",
    ),
    "other Accept": (changed(RESPONSE_LINES, f"Sec-WebSocket-Accept: {ACCEPTED.lower()}"), "answers another request"),
    "extension": (changed(RESPONSE_LINES, "Sec-WebSocket-Extensions: permessage-deflate"), "not requested"),
    "subprotocol": (changed(RESPONSE_LINES, "Sec-WebSocket-Protocol: chat"), "not requested"),
    "folded header": (RESPONSE.replace(b"Upgrade: ", b"Upgrade:\r\n "), "header"),
    "too many headers": (head([*RESPONSE_LINES, *["X: y"] * agenthub.HEADERS_MAX]), "too many headers"),
    "too long": (b"HTTP/1.1 101 " + b"x" * agenthub.HEAD_BYTES_MAX, "too long"),
}


@pytest.mark.parametrize(("raw", "why"), REFUSED_RESPONSES.values(), ids=REFUSED_RESPONSES.keys())
def test_response_that_does_not_open_is_an_error_and_the_end(raw: bytes, why: str) -> None:
    end = new_client().feed(raw)
    assert isinstance(end.protocol.handshake_exc, agenthub.HandshakeFailed)
    assert why in str(end.protocol.handshake_exc)
    assert end.protocol.close_expected()
    end.feed(RESPONSE, frame(key=b""))
    end.protocol.receive_eof()
    end.take()
    assert (end.events, end.written, end.is_ended) == ([], b"", True)
    assert end.violations == [
        (400 if "many" not in why and "long" not in why else 431, str(end.protocol.handshake_exc))
    ]
    assert why in str(end.protocol.handshake_exc)


@pytest.mark.parametrize(
    ("role", "raw"),
    [
        (SERVER, REQUEST),
        (CLIENT, RESPONSE),
        *((SERVER, raw) for raw, status in REFUSED_REQUESTS.values() if len(raw) < 1000),
        *((CLIENT, raw) for raw, why in REFUSED_RESPONSES.values() if len(raw) < 1000),
    ],
)
def test_handshake_comes_out_alike_wherever_it_is_cut(role: Role, raw: bytes) -> None:
    whole = outcome(role.new().feed(raw))
    for cut in range(1, len(raw)):
        assert outcome(role.new().feed(raw[:cut], raw[cut:])) == whole, cut
    assert outcome(role.new().feed(*(bytes([byte]) for byte in raw))) == whole


def outcome(end: End) -> tuple[Any, ...]:
    """Return all that is to be seen of an end. The events of a handshake are told by what they say."""
    events = [one if isinstance(one, Frame | CloseFrame) else (type(one), one.headers.pairs) for one in end.events]
    protocol = end.protocol
    closes = protocol.close_rcvd, protocol.close_sent, protocol.close_expected()
    return events, end.violations, end.written, end.is_ended, str(protocol.handshake_exc), closes


@both_roles
def test_end_within_a_handshake_is_an_error(role: Role) -> None:
    for cut in (0, 1, len(role.opening) - 1):
        end = role.new().feed(role.opening[:cut])
        end.protocol.receive_eof()
        end.protocol.receive_eof()
        end.take()
        assert (end.events, end.written, end.is_ended) == ([], b"", True)
        assert str(end.protocol.handshake_exc) == "the connection was closed"
        assert not end.protocol.close_expected()


# The handshake with others


def request_of(protocol: agenthub.WebSocketProtocol) -> bytes:
    protocol.send_request(protocol.connect())
    return protocol.data_to_send()


def test_client_and_server_open_and_talk() -> None:
    client, server = BuiltinClient("ws://hub", LIMIT), new_server()
    end = End(client)
    server.feed(request_of(client))
    end.feed(server.written)
    assert client.handshake_exc is None
    server.written = b""
    client.send_text(b"x" * 300)
    end.feed(server.feed(client.data_to_send()).written)
    assert server.events[1:] == [Frame(TEXT, b"x" * 300, True)]
    client.send_close(1000, "done")
    end.feed(server.feed(client.data_to_send()).written)
    assert client.close_rcvd == server.protocol.close_rcvd == (1000, "done")
    assert server.is_ended
    assert not end.is_ended  # It waits for the server to close the socket.
    client.receive_eof()
    assert (client.data_to_send(), client.has_ended) == (b"", True)


def test_client_is_accepted_by_websockets() -> None:
    server = pytest.importorskip("websockets.server").ServerProtocol()
    client = BuiltinClient("ws://hub:1/path", LIMIT)
    server.receive_data(request_of(client))
    (request,) = server.events_received()
    response = server.accept(request)
    server.send_response(response)
    assert (response.status_code, request.path) == (101, "/path")
    end = End(client).feed(*server.data_to_send())
    assert client.handshake_exc is None
    server.send_text(b"x" * 70_000)
    end.protocol.limit_messages(70_000)
    assert end.feed(*server.data_to_send()).events[1:] == [Frame(TEXT, b"x" * 70_000, True)]


def test_server_is_accepted_by_websockets() -> None:
    uri = pytest.importorskip("websockets.uri").parse_uri("ws://hub:1/path")
    client = pytest.importorskip("websockets.client").ClientProtocol(uri)
    client.send_request(client.connect())
    server = new_server().feed(*client.data_to_send())
    client.receive_data(server.written)
    assert client.handshake_exc is None
    assert [event.status_code for event in client.events_received()] == [101]
    client.send_binary(b"x" * 200)
    assert server.feed(*client.data_to_send()).events[1:] == [Frame(BINARY, b"x" * 200, True)]


def test_client_is_accepted_by_wsproto() -> None:
    wsproto = pytest.importorskip("wsproto")
    events = pytest.importorskip("wsproto.events")
    server = wsproto.WSConnection(wsproto.ConnectionType.SERVER)
    client = BuiltinClient("ws://hub:1/path", LIMIT)
    server.receive_data(request_of(client))
    (request,) = server.events()
    assert (request.host, request.target) == ("hub:1", "/path")
    end = End(client).feed(server.send(events.AcceptConnection()))
    assert client.handshake_exc is None
    end.feed(server.send(events.TextMessage("hi")))
    client.send_text(b"x" * 300)
    server.receive_data(client.data_to_send())
    assert end.events[1:] == [Frame(TEXT, b"hi", True)]
    assert [event.data for event in server.events()] == ["x" * 300]


def test_server_is_accepted_by_wsproto() -> None:
    wsproto = pytest.importorskip("wsproto")
    events = pytest.importorskip("wsproto.events")
    client = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
    server = new_server().feed(client.send(events.Request(host="hub", target="/")))
    client.receive_data(server.written)
    assert [type(event) for event in client.events()] == [events.AcceptConnection]
    server.written = b""
    server.feed(client.send(events.Ping(b"x")), client.send(events.CloseConnection(1001, "going")))
    client.receive_data(server.written)
    assert [type(event) for event in client.events()] == [events.Pong, events.CloseConnection]


# Frames


@both_roles
@pytest.mark.parametrize("opcode", [TEXT, BINARY, PING, PONG])
@pytest.mark.parametrize("size", [0, 1, 124, 125, 126, 127, 65_535, 65_536, 70_000])
def test_frame_of_any_length_is_read(role: Role, opcode: int, size: int) -> None:
    end = role.opened(limit=70_000).feed(role.frame(opcode, b"x" * size))
    if opcode >= CLOSE and size > 125:
        assert (end.events, end.failed_with) == ([], 1002)
    else:
        assert end.events == [Frame(opcode, b"x" * size, True)]
        assert end.said == ([Frame(PONG, b"x" * size, True)] if opcode == PING else [])


@both_roles
@pytest.mark.parametrize("length_bytes", [2, 8])
@pytest.mark.parametrize("size", [0, 5, 125, 126, 1000])
def test_length_of_a_message_may_be_written_with_more_bytes_than_it_needs(
    role: Role, length_bytes: int, size: int
) -> None:
    text = role.frame(TEXT, b"x" * size, length_bytes=length_bytes)
    assert role.opened().feed(text).events == [Frame(TEXT, b"x" * size, True)]
    assert role.opened().feed(role.frame(PING, b"", length_bytes=length_bytes)).failed_with == 1002


@both_roles
def test_fragments_come_as_they_are_with_control_frames_between(role: Role) -> None:
    sent = [
        Frame(TEXT, b"a", False),
        Frame(PING, b"1", True),
        Frame(CONTINUATION, b"", False),
        Frame(PONG, b"2", True),
        Frame(PING, b"", True),
        Frame(CONTINUATION, b"b", True),
        Frame(BINARY, b"", False),
        Frame(CONTINUATION, b"", True),
        Frame(TEXT, b"c", True),
    ]
    end = role.opened().feed(b"".join(role.frame(one.opcode, one.data, fin=one.fin) for one in sent))
    sent[5], sent[7] = Frame(TEXT, b"ab", True), Frame(BINARY, b"", True)  # The last ones complete their messages.
    assert end.events == sent
    assert end.said == [Frame(PONG, b"1", True), Frame(PONG, b"", True)]
    assert not end.is_ended
    assert not end.protocol.close_expected()


FORBIDDEN: dict[str, tuple[list[tuple[int, bytes, dict[str, Any]]], int]] = {
    **{f"reserved bits {rsv}": ([(TEXT, b"x", {"rsv": rsv})], 1002) for rsv in range(1, 8)},
    **{f"opcode {opcode}": ([(opcode, b"x", {})], 1002) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    **{f"opcode {opcode} in fragments": ([(opcode, b"x", {"fin": False})], 1002) for opcode in (CLOSE, PING, PONG)},
    **{f"opcode {opcode} of 126 bytes": ([(opcode, b"x" * 126, {})], 1002) for opcode in (CLOSE, PING, PONG)},
    "continuation of nothing": ([(CONTINUATION, b"x", {})], 1002),
    "continuation of nothing, not the last": ([(CONTINUATION, b"x", {"fin": False})], 1002),
    "continuation after the last": ([(TEXT, b"", {"fin": False}), *[(CONTINUATION, b"", {})] * 2], 1002),
    "text in fragments": ([(TEXT, b"", {"fin": False}), (TEXT, b"", {})], 1002),
    "binary in fragments": ([(TEXT, b"", {"fin": False}), (BINARY, b"", {"fin": False})], 1002),
    "close of 1 byte": ([(CLOSE, b"\x03", {})], 1002),
    "close with a reason that is not UTF-8": ([(CLOSE, close_of(1000, b"\xff"), {})], 1007),
    "close with a reason that is cut": ([(CLOSE, close_of(1000, "é".encode()[:1]), {})], 1007),
}  # fmt: skip


@both_roles
@pytest.mark.parametrize(("frames", "code"), FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_forbidden_frame_fails_the_connection_and_nothing_is_read_after_it(
    role: Role, frames: list[tuple[int, bytes, dict[str, Any]]], code: int
) -> None:
    raw = b"".join(role.frame(opcode, payload, **options) for opcode, payload, options in frames)
    end = role.opened().feed(raw)
    assert len(end.events) == len(frames) - 1
    assert_failed(role, end, code)


def assert_failed(role: Role, end: End, code: int) -> None:
    """Assert that an end has said why and reads no more: a server is done, and a client waits for the other to be."""
    events = len(end.events)
    assert end.protocol.close_sent is not None
    assert end.failed_with == code == end.protocol.close_sent.code
    assert end.protocol.close_rcvd is None
    assert end.protocol.close_expected()
    assert end.is_ended == (role is SERVER)
    written = len(end.written)
    end.feed(role.frame(PING, b"x"), role.frame(CLOSE, close_of(1000)), b"\xff" * 100)
    assert (len(end.events), len(end.written), end.protocol.unread_bytes) == (events, written, 0)
    assert len(end.violations) <= 1
    end.protocol.receive_eof()
    end.protocol.receive_eof()
    end.take()
    assert end.is_ended
    assert len(end.written) == written
    assert not end.protocol.close_expected()


@both_roles
@pytest.mark.parametrize("opcode", [TEXT, CLOSE, PING])
def test_client_must_mask_and_server_must_not(role: Role, opcode: int) -> None:
    end = role.opened().feed(frame(b"", opcode, key=b"" if role is SERVER else KEY))
    assert end.events == []
    assert_failed(role, end, 1002)


def test_client_masks_what_it_writes_each_time_with_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    end = CLIENT.opened()
    monkeypatch.setattr(agenthub.os, "urandom", lambda size: b"\x01\x02\x03\x04\xff\xfe\xfd\xfc"[:size])
    end.feed(frame(b"same", PING, key=b""), frame(b"same", PING, key=b""))
    keys = b"\x01\x02\x03\x04", b"\xff\xfe\xfd\xfc"
    assert end.written == b"".join(frame(b"same", PONG, key=key) for key in keys)


# Limits


@both_roles
def test_message_at_the_limit_is_read_and_one_more_byte_is_too_big_before_it_comes(role: Role) -> None:
    assert role.opened().feed(role.frame(BINARY, b"x" * LIMIT)).events == [Frame(BINARY, b"x" * LIMIT, True)]
    end = role.opened().feed(role.frame(TEXT, b"x" * (LIMIT + 1))[:4])
    assert end.events == []
    assert_failed(role, end, 1009)


@both_roles
def test_fragments_together_are_bounded_like_one_message(role: Role) -> None:
    start = role.frame(TEXT, b"x" * 400, fin=False) + role.frame(CONTINUATION, b"x" * 400, fin=False)
    end = role.opened().feed(start, role.frame(CONTINUATION, b"x" * 200))
    assert [len(one.data) for one in end.events] == [400, 400, 1000]
    end.feed(start, role.frame(CONTINUATION, b"x" * 201)[:4])
    assert len(end.events) == 5
    assert_failed(role, end, 1009)


@both_roles
@pytest.mark.parametrize("length", [LIMIT + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_length_beyond_all_measure_is_too_big_at_once(role: Role, length: int) -> None:
    end = role.opened().feed(bytes([129, 127 | bool(role.key) << 7]) + length.to_bytes(8, "big"))
    assert_failed(role, end, 1009)


@both_roles
def test_limit_can_be_changed_between_frames(role: Role) -> None:
    end = role.opened()
    end.protocol.limit_messages(10)
    assert end.feed(role.frame(TEXT, b"x" * 10)).failed_with is None
    assert end.feed(role.frame(TEXT, b"x" * 11)).failed_with == 1009


@both_roles
def test_control_frames_do_not_count_as_parts_of_a_message(role: Role) -> None:
    end = role.opened(limit=40).feed(role.frame(TEXT, b"x" * 40, fin=False), role.frame(PING, b"y" * 125))
    assert end.feed(role.frame(CONTINUATION)).failed_with is None
    assert len(end.events) == 3


@both_roles
def test_limit_of_nothing_lets_empty_messages_through(role: Role) -> None:
    end = role.opened(limit=0).feed(role.frame(TEXT), role.frame(BINARY), role.frame(TEXT, b"x"))
    assert len(end.events) == 2
    assert_failed(role, end, 1009)


# The end of a connection

VALID_CODES = [1000, 1001, 1002, 1003, *range(1007, 1015), 3000, 3999, 4000, 4001, 4999]
INVALID_CODES = [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1099, 1100, 1999, 2000, 2999, 5000, 9999, 65_535]


@both_roles
@pytest.mark.parametrize("code", VALID_CODES)
def test_close_is_echoed_and_is_the_last(role: Role, code: int) -> None:
    reason = "gr\xfc\xdfe".encode()
    end = role.opened().feed(role.frame(CLOSE, close_of(code, reason)) + role.frame(PING) + b"\xff")
    assert end.events == [CloseFrame(code, reason.decode())]
    assert end.said == [Frame(CLOSE, close_of(code, reason), True)]
    assert end.protocol.close_rcvd == end.protocol.close_sent == (code, reason.decode())
    assert end.is_ended == (role is SERVER)
    assert end.protocol.close_expected()


@both_roles
@pytest.mark.parametrize("code", INVALID_CODES)
def test_close_code_that_may_not_be_sent_is_an_error(role: Role, code: int) -> None:
    end = role.opened().feed(role.frame(CLOSE, close_of(code)))
    assert end.events == []
    assert_failed(role, end, 1002)


@both_roles
def test_close_without_a_code_is_echoed_as_it_is(role: Role) -> None:
    end = role.opened().feed(role.frame(CLOSE))
    assert end.events == [CloseFrame(1005, "")]
    assert end.said == [Frame(CLOSE, b"", True)]
    assert end.protocol.close_rcvd == end.protocol.close_sent == (1005, "")


@both_roles
def test_close_amid_a_fragmented_message_is_echoed(role: Role) -> None:
    end = role.opened().feed(role.frame(TEXT, b"x", fin=False), role.frame(CLOSE, close_of(1001)))
    assert end.said == [Frame(CLOSE, close_of(1001), True)]


@both_roles
def test_after_our_close_pings_are_not_answered_and_the_other_close_is_not_echoed(role: Role) -> None:
    end = role.opened()
    end.protocol.send_close(4000, "over")
    assert end.protocol.close_expected()
    end.take()
    end.feed(role.frame(TEXT, b"late"), role.frame(PING, b"x"))
    assert not end.is_ended
    end.feed(role.frame(CLOSE, close_of(1000)), role.frame(PING))
    assert end.events == [Frame(TEXT, b"late", True), Frame(PING, b"x", True), CloseFrame(1000, "")]
    assert end.said == [Frame(CLOSE, close_of(4000, b"over"), True)]
    assert (end.protocol.close_sent, end.protocol.close_rcvd) == ((4000, "over"), (1000, ""))
    assert end.is_ended == (role is SERVER)
    end.protocol.receive_eof()
    end.take()
    assert end.is_ended
    assert not end.protocol.close_expected()


@both_roles
def test_error_after_our_close_ends_without_another_one(role: Role) -> None:
    end = role.opened()
    end.protocol.send_close(1001)
    end.take()
    end.feed(b"\xff\xff" * 10)
    assert end.said == [Frame(CLOSE, close_of(1001), True)]
    assert end.is_ended == (role is SERVER)


@both_roles
def test_failing_twice_is_failing_once(role: Role) -> None:
    end = role.opened()
    end.protocol.fail(1008, "no")
    end.protocol.fail(1002, "more")
    end.take()
    assert end.said == [Frame(CLOSE, close_of(1008, b"no"), True)]
    assert_failed(role, end, 1008)


@both_roles
@pytest.mark.parametrize("reason", ["x" * 123, "x" * 124, "é" * 62, "x" + "😀" * 40])
def test_reason_that_is_too_long_is_cut_between_characters(role: Role, reason: str) -> None:
    end = role.opened()
    end.protocol.send_close(1000, reason)
    end.take()
    (said,) = end.said
    assert len(said.data) <= 125
    assert reason.startswith(said.data[2:].decode())
    assert len(said.data) > 121


@both_roles
@pytest.mark.parametrize("raw", [b"", b"\x81", b"\x81\x85abc", b"\x01\x80abcd"])
def test_lost_connection_ends_and_says_nothing(role: Role, raw: bytes) -> None:
    end = role.opened().feed(raw[:1])
    end.protocol.receive_eof()
    end.protocol.receive_eof()
    end.take()
    end.feed(role.frame(TEXT, b"x"))
    assert (end.events, end.written, end.is_ended) == ([], b"", True)
    assert end.protocol.handshake_exc is None
    assert not end.protocol.close_expected()


# However the bytes are cut


def valid_stream(role: Role) -> bytes:
    """Return frames of all kinds and of all forms of a length, with a close at the end and something behind it."""
    write = role.frame
    texts = [b'{"type":"heartbeat","id":"%d"%s}' % (number, b" " * more) for number, more in enumerate((0, 90, 110))]
    ack = b'{"type":"heartbeat_ack","reply_to":"x"}'
    return b"".join(
        [
            write(TEXT, texts[0]),
            write(PING, b"a"),
            write(TEXT, ack, length_bytes=8),
            write(TEXT, texts[1][:7], fin=False),
            write(PING, b""),
            write(CONTINUATION, b"", fin=False),
            write(CONTINUATION, texts[1][7:]),
            write(PONG, b"b"),
            write(TEXT, texts[2]),
            write(BINARY, b"\xff\x00"),
            write(TEXT, b""),
            write(TEXT, ack, length_bytes=2),
            write(BINARY, mask(write(TEXT, ack), role.key or bytes(4))),  # In which a text seems to begin.
            write(CLOSE, close_of(4001, "f\xfcr heute".encode())),
            write(PING, b"behind the close"),
        ]
    )


def streams(role: Role) -> dict[str, bytes]:
    """Return what an open connection may bring: good, and bad in many ways, always with something good around it."""
    good = role.frame(TEXT, b'{"type":"heartbeat","id":"first"}') + role.frame(PING, b"x")
    rest = role.frame(TEXT, b'{"type":"heartbeat","id":"never"}') + role.frame(PING, b"y")
    bad = {
        name: b"".join(role.frame(opcode, payload, **options) for opcode, payload, options in frames)
        for name, (frames, _) in FORBIDDEN.items()
    }
    unmasked = frame(b"x", key=b"" if role.key else KEY)
    too_big = role.frame(TEXT, b"x" * (LIMIT + 1))[:60]
    return {
        "valid": valid_stream(role),
        "masking": good + unmasked + rest,
        "too big": good + too_big + rest,
        "immense": good + bytes([129, 127 | bool(role.key) << 7]) + b"\xff" * 8 + rest,
        **{name: good + raw + rest for name, raw in bad.items()},
    }


@both_roles
@pytest.mark.parametrize("name", streams(SERVER))
def test_same_bytes_give_the_same_wherever_they_are_cut(role: Role, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub.os, "urandom", lambda size: KEY[:size])
    raw = role.opening + streams(role)[name]
    whole = outcome(role.new().feed(raw))
    assert len(whole[0]) > 2
    for cut in range(1, len(raw)):
        assert outcome(role.new().feed(raw[:cut], raw[cut:])) == whole, cut
    assert outcome(role.new().feed(*(bytes([byte]) for byte in raw))) == whole


# Links, around either protocol object


class Owner:
    """Writes down what it is told about a link."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def opened(self, link: agenthub.Link) -> None:
        self.told.append("opened")

    def received(self, link: agenthub.Link, message: Any, message_bytes: int) -> None:
        self.told.append((str(message) if isinstance(message, Exception) else message, message_bytes))

    def closed(self, link: agenthub.Link, code: int, reason: str) -> None:
        self.told.append((code, reason))


class Socket(asyncio.Transport):
    """A transport that keeps what is written to it, for a peer that says nothing when it is told of the end."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.is_ended = False

    def write(self, data: Any) -> None:
        assert not self.is_ended
        self.written += data

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None: ...

    def is_closing(self) -> bool:
        return self.is_ended

    def close(self) -> None:
        self.is_ended = True

    def abort(self) -> None:
        self.is_ended = True


def new_link(role: Role, owner: Owner) -> agenthub.WebSocketLink:
    """Return a link of the implementation in use; a client's has the key of the RFC's example."""
    if role is SERVER:
        return agenthub.ServerLink(
            owner, lambda link, request: None, message_bytes_max=LIMIT, backlog_bytes_max=LIMIT * LIMIT
        )
    return agenthub.ClientLink(client_protocol(), owner, None)


def client_protocol() -> Any:
    """Return a client of the implementation in use, with the key of the RFC's example."""
    with key_of_the_rfc():
        return agenthub.websockets_used().client("ws://hub:1/", LIMIT)


async def played(role: Role, *chunks: bytes) -> tuple[Any, ...]:
    """Return what came of chunks that a link was fed: what its owner was told, and what it wrote."""
    owner, socket = Owner(), Socket()
    link = new_link(role, owner)
    link.connection_made(socket)
    for chunk in chunks:
        link.data_received(chunk)
    await settled(link)
    assert ("opened" in owner.told) == link.protocol.is_open
    seen = list(owner.told), unmasked(bytes(socket.written)), socket.is_ended
    link.connection_lost(None)
    if role is CLIENT and not link.ready.cancelled():  # type: ignore[attr-defined]
        link.ready.exception()  # type: ignore[attr-defined]
    return seen


async def settled(link: agenthub.WebSocketLink) -> None:
    await asyncio.sleep(0)
    while link.pause_reasons:
        await asyncio.sleep(0)
    await asyncio.sleep(0)


def unmasked(raw: bytes) -> tuple[bytes, list[RawFrame]]:
    """Return what was written without what is random in it: the key of a request, and those of the frames."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.startswith((b"Sec-WebSocket-Key", b"Date"))]
    is_client = lines[0].startswith(b"GET")
    return b"\r\n".join(lines), frames_in(rest, masked=is_client) if is_client or b" 101 " in lines[0] else []


@functools.cache
def implementations() -> dict[str, agenthub.WebSockets]:
    used = agenthub.websockets_used()
    return {"built in": BUILT_IN, **({} if used.name == "built in" else {"websockets": used})}


def use(name: str, patch: pytest.MonkeyPatch) -> None:
    """Have an implementation carry what is opened from now on; skip the test where it is not in use."""
    used = implementations().get(name)
    if used is None:
        pytest.skip("websockets is not in use")
    patch.setattr(agenthub, "websockets_used", lambda: used)


@pytest.fixture(params=["built in", "websockets"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use(request.param, monkeypatch)
    return str(request.param)


def opened_protocol(role: Role, limit: int) -> Any:
    """Return a protocol of the implementation in use after its handshake."""
    protocol = agenthub.websockets_used().server(limit) if role is SERVER else client_protocol()
    protocol.limit_messages(limit)
    if role is CLIENT:
        request_of(protocol)
    return opened(End(protocol), role.opening).protocol


@both_roles
def test_all_but_small_text_messages_are_announced_as_costly(implementation: str, role: Role) -> None:
    long = b"x" * agenthub.CPU_COUNTED_BYTES
    protocol = opened_protocol(role, 10_000)
    fragments = role.frame(TEXT, b"d", fin=False) + role.frame(CONTINUATION, b"e")
    frames = role.frame(TEXT, b"a"), role.frame(PING, b"p"), role.frame(TEXT, long), role.frame(BINARY, b"b"), fragments
    protocol.receive_data(b"".join(frames) + role.frame(TEXT, long)[:-1])
    costly = agenthub.COSTLY
    assert [protocol.next_event() for _ in range(11)] == [
        *(b"a", costly, Frame(PING, b"p", True), costly, long, costly, Message(b"b", False)),
        *(costly, Frame(TEXT, b"d", False), costly, Message(b"de", True)),
    ]
    assert protocol.next_event() is None  # The last one is not complete.
    assert protocol.unread_bytes == len(role.frame(TEXT, long)) - 1
    protocol.receive_data(role.frame(TEXT, long)[-1:])
    assert [protocol.next_event() for _ in range(3)] == [costly, long, None]
    assert protocol.unread_bytes == 0


@both_roles
def test_each_event_can_be_answered_before_the_next_is_read(implementation: str, role: Role) -> None:
    protocol = opened_protocol(role, LIMIT)
    pieces = role.frame(TEXT, b"a"), role.frame(PING, b"p"), role.frame(TEXT, b"b"), role.frame(CLOSE, close_of(1000))
    protocol.receive_data(b"".join(pieces))
    while (event := protocol.next_event()) is not None:
        if isinstance(event, bytes):
            protocol.send_text(event.upper())
    protocol.send_text(b"too late")
    said = [(one.opcode, one.data) for one in frames_in(protocol.data_to_send(), masked=role is CLIENT)]
    assert said == [(TEXT, b"A"), (PONG, b"p"), (TEXT, b"B"), (CLOSE, close_of(1000))]


@both_roles
@pytest.mark.parametrize("name", ["valid", "masking", "too big", "immense", "reserved bits 4", "text in fragments"])
async def test_link_makes_the_same_of_the_same_bytes_wherever_they_are_cut(
    implementation: str, role: Role, name: str
) -> None:
    raw = role.opening + streams(role)[name]
    whole = await played(role, raw)
    assert len(whole[0]) > 2
    for cut in range(1, len(raw)):
        assert await played(role, raw[:cut], raw[cut:]) == whole, cut
    assert await played(role, *(bytes([byte]) for byte in raw)) == whole


@both_roles
async def test_link_tells_its_owner_the_same_with_either_implementation(
    role: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for used in implementations().values():
        monkeypatch.setattr(agenthub, "websockets_used", lambda used=used: used)
        told, (_, said), is_ended = await played(role, role.opening + streams(role)["valid"])
        seen.append((told, said, is_ended))
    assert seen == [seen[0]] * len(seen)


@pytest.mark.parametrize("fragments", [2, 62, 63])
async def test_link_bounds_the_number_of_fragments(implementation: str, fragments: int) -> None:
    raw = frame(fin=False) + frame(b"", CONTINUATION, fin=False) * (fragments - 2) + frame(b"{}", CONTINUATION)
    told, _, _ = await played(SERVER, REQUEST + raw)
    assert told[0] == "opened"
    if fragments > LIMIT // agenthub.FRAGMENT_BYTES:
        assert told[1:] == [(1009, "too many fragments")]
    else:
        assert [message_bytes for _, message_bytes in told[1:]] == [2]


@pytest.mark.parametrize("size", [LIMIT, LIMIT + 1])
async def test_link_bounds_a_message_that_comes_as_a_whole(implementation: str, size: int) -> None:
    told, _, _ = await played(SERVER, REQUEST + frame(b"{}".ljust(size)))
    assert [len(told), told[1][0] == 1009, told[1][1] == size] == [2, size > LIMIT, size <= LIMIT]


# Masks


AROUND_BLOCKS = [blocks * agenthub.MASK_BLOCK_BYTES + more for blocks in (1, 2, 3) for more in range(-5, 6)]


@pytest.mark.parametrize("size", [*range(71), *AROUND_BLOCKS, 100_003])
def test_mask_is_an_exclusive_or_and_its_own_inverse(size: int) -> None:
    payload = random.Random(size).randbytes(size)
    for key in (bytes(4), b"\xff\xff\xff\xff", b"\x00\x00\x00\x01", b"\x80\x00\x00\x00", KEY):
        masked = apply_mask(payload, key)
        assert masked == mask(payload, key)
        assert apply_mask(masked, key) == payload


# Whatever comes in

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FUZZ_LIMIT = 300
opcodes = st.one_of(st.sampled_from([CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG]), st.integers(0, 15))
payloads = st.one_of(
    st.binary(max_size=10),
    st.integers(0, FUZZ_LIMIT + 5).map(bytes),
    st.sampled_from([*VALID_CODES, *INVALID_CODES]).map(close_of),
    st.sampled_from([b'{"type":"heartbeat"}', b"\xff", close_of(1000, b"\xff"), b"{"]),
)


def one_in(number: int) -> st.SearchStrategy[bool]:
    return st.integers(0, number - 1).map(lambda drawn: not drawn)


@st.composite
def frame_streams(draw: st.DrawFn, key: bytes) -> bytes:
    """Frames as a peer has to write them, most of them good."""
    other_key = b"" if key else KEY
    is_amid = False
    raw = b""
    for _ in range(draw(st.integers(0, 6))):
        opcode, fin = draw(opcodes), not draw(one_in(3))
        if opcode < CLOSE and not draw(one_in(8)):  # As it has to be, but for one in eight.
            opcode = CONTINUATION if is_amid else max(TEXT, min(opcode, BINARY))
        fin = fin or (opcode >= CLOSE and not draw(one_in(8)))
        is_amid = is_amid if opcode >= CLOSE else not fin
        payload = draw(payloads)
        payload = payload if opcode < CLOSE or draw(one_in(8)) else payload[:125]
        form = draw(st.sampled_from([0] * 6 + [2, 8])) if opcode < CLOSE else 0
        rsv = draw(st.integers(0, 7)) if draw(one_in(12)) else 0
        used_key = other_key if draw(one_in(12)) else key
        raw += frame(payload, opcode, fin=fin, key=used_key, rsv=rsv, length_bytes=form)
    return raw


@st.composite
def mutated(draw: st.DrawFn, good: st.SearchStrategy[bytes]) -> bytes:
    """A stream as it is, or with bytes changed, taken out, put in, or cut off."""
    raw = bytearray(draw(good))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 5]))):
        place = draw(st.integers(0, max(0, len(raw) - 1)))
        how = draw(st.sampled_from(["set", "flip", "take", "put", "cut"]))
        if how == "set" and raw:
            raw[place] = draw(st.integers(0, 255))
        elif how == "flip" and raw:
            raw[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "take":
            del raw[place : place + draw(st.integers(1, 5))]
        elif how == "put":
            raw[place:place] = draw(st.binary(min_size=1, max_size=5))
        else:
            del raw[place:]
    return bytes(raw)


def chunked(draw: Callable[..., Any], raw: bytes) -> list[bytes]:
    """Cut bytes at random."""
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    return [raw[start:end] for start, end in itertools.pairwise([0, *cuts, len(raw)])]


def any_bytes(role: Role) -> st.SearchStrategy[bytes]:
    return st.one_of(st.binary(max_size=200), mutated(frame_streams(role.key)))


@st.composite
def handshakes(draw: st.DrawFn, role: Role) -> bytes:
    return draw(st.one_of(st.just(role.opening), mutated(st.just(role.opening)), st.binary(max_size=100)))


def check_events(events: list[Any], limit: int) -> None:
    """Assert that events are a handshake and then frames as they may follow each other."""
    partial_bytes: int | None = None
    for index, event in enumerate(events):
        if isinstance(event, CloseFrame):
            assert index == len(events) - 1
            continue
        if not isinstance(event, Frame):
            assert index == 0
            continue
        assert type(event.data) is bytes
        assert event.opcode in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG)
        if event.opcode >= CLOSE:
            assert event.fin
            assert len(event.data) <= 125
            assert event.opcode != CLOSE
        elif event.fin:  # A message, which is as long as the fragments were that came before it, or longer.
            assert event.opcode in (TEXT, BINARY)
            assert (partial_bytes or 0) <= len(event.data) <= limit
            partial_bytes = None
        else:
            assert (event.opcode == CONTINUATION) == (partial_bytes is not None)
            partial_bytes = (partial_bytes or 0) + len(event.data)
            assert partial_bytes <= limit


def check_said(role: Role, end: End) -> None:
    """Assert that what was written after a handshake is pongs for the pings, then a valid close if it was the last."""
    pings = [Frame(PONG, event.data, True) for event in end.events if isinstance(event, Frame) and event.opcode == PING]
    closes = [one for one in end.said if one.opcode == CLOSE]
    assert end.said == pings + closes
    assert len(closes) == sum(isinstance(event, CloseFrame) for event in end.events) + len(end.violations)
    assert end.is_ended == (bool(closes) and role is SERVER)
    for one in closes:
        assert agenthub.parse_close(one.data) == end.protocol.close_sent


@FUZZ
@given(st.data(), st.sampled_from([SERVER, CLIENT]))
def test_any_bytes_on_an_open_connection_give_frames_or_a_close(data: st.DataObject, role: Role) -> None:
    end = role.opened(FUZZ_LIMIT)
    for chunk in chunked(data.draw, data.draw(any_bytes(role))):
        end.feed(chunk)
        assert end.protocol.unread_bytes <= FUZZ_LIMIT + 14
    check_events(end.events, FUZZ_LIMIT)
    check_said(role, end)
    end.protocol.receive_eof()
    end.take()
    assert end.is_ended


@FUZZ
@given(st.data(), st.sampled_from([SERVER, CLIENT]))
def test_any_bytes_from_the_start_open_or_are_refused(data: st.DataObject, role: Role) -> None:
    end = role.new(FUZZ_LIMIT)
    for chunk in chunked(data.draw, data.draw(handshakes(role)) + data.draw(any_bytes(role))):
        end.feed(chunk)
        assert end.protocol.unread_bytes <= agenthub.HEAD_BYTES_MAX + FUZZ_LIMIT + len(chunk)
    check_events(end.events, FUZZ_LIMIT)
    if not end.protocol.is_open:
        assert end.is_ended == (end.protocol.handshake_exc is not None)
        assert not any(isinstance(event, Frame) for event in end.events)
        assert end.is_ended or end.written == b""
    end.protocol.receive_eof()
    end.take()
    assert end.is_ended


@pytest.mark.parametrize("name", ["built in", "websockets"])
@pytest.mark.parametrize("upgrade", [b"\x80websocket", b"websocket\x80", b"websocket, \x80"])
async def test_upgrade_that_is_not_ascii_is_answered(
    name: str, upgrade: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(name, monkeypatch)
    owner, socket = Owner(), Socket()
    link = new_link(SERVER, owner)
    link.connection_made(socket)
    link.data_received(SERVER.opening.replace(b"Upgrade: websocket", b"Upgrade: " + upgrade))
    await settled(link)
    assert bytes(socket.written).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 426 "))
    assert (owner.told, socket.is_ended) == ([], True)


@pytest.mark.parametrize("name", ["built in", "websockets"])
@FUZZ
@given(data=st.data(), role=st.sampled_from([SERVER, CLIENT]))
async def test_any_bytes_into_a_link_give_messages_or_a_close(name: str, data: st.DataObject, role: Role) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use(name, patch)
        raw = data.draw(handshakes(role)) + data.draw(any_bytes(role))
        whole = await played(role, raw)
        assert await played(role, *chunked(data.draw, raw)) == whole
    told, (_, said), _ = whole
    closes = [index for index, one in enumerate(said) if one.opcode == CLOSE]
    assert closes in ([], [len(said) - 1])
    ends = [index for index, one in enumerate(told) if isinstance(one[0], int)]
    assert ends in ([], [len(told) - 1])
    assert len(closes) == len(ends)
    for index in closes:
        agenthub.parse_close(said[index].data)


# Compared with `websockets`

# What a stream may end with, first there and then here, and why that is as it should be.
ACCEPTED_DIFFERENCES: dict[tuple[int | None, int | None], str] = {
    (1009, 1002): "A frame that is wrong and too big: what the first two bytes say is checked here before the length.",
    (1007, 1002): "A close with a wrong code and a reason that is no UTF-8: the code is looked at first here.",
    (None, 1002): "What the first two bytes say is checked here before the rest comes, and there after it.",
}


def compared(role: Role, raw: bytes) -> tuple[End, End]:
    """Return what `websockets` and our own protocol object make of the same frames."""
    with pytest.MonkeyPatch.context() as patch:
        use("websockets", patch)
        theirs = End(opened_protocol(role, LIMIT))
    return theirs.feed(raw), role.opened().feed(raw)


# A control frame whose length is not written in its shortest form, as RFC 6455 §5.2 wants it.
LONG_CONTROL = re.compile(rb"[\x88-\x8a](?:[\x7e\xfe]\x00[\x00-\x7d]|[\x7f\xff]\x00{7}[\x00-\x7d])")


def check_alike(role: Role, raw: bytes) -> None:
    theirs, ours = compared(role, raw)
    if ours.failed_with == 1002 and LONG_CONTROL.search(raw):  # `websockets` takes it.
        assert ours.events == theirs.events[: len(ours.events)]
        return
    codes = theirs.failed_with, ours.failed_with
    pongs = [[one for one in end.said if one.opcode != CLOSE] for end in (theirs, ours)]
    assert pongs[0] == pongs[1]
    if ours.events and isinstance(ours.events[-1], CloseFrame) and is_amid_a_message(ours.events):
        # A close within a fragmented message is an error there, and echoed here: RFC 6455 §5.5.1 does not forbid it.
        assert codes[0] == 1002
        assert theirs.events == ours.events[:-1]
        return
    assert theirs.events == ours.events
    assert codes[0] == codes[1] or codes in ACCEPTED_DIFFERENCES, codes
    if codes[0] == codes[1]:
        assert theirs.is_ended == ours.is_ended
    elif codes[0] is None:  # It says the same, or that it is too big, when the rest of the frame comes.
        assert compared(role, raw + bytes(LIMIT + 20))[0].failed_with in (1002, 1009)


def is_amid_a_message(events: list[Frame]) -> bool:
    return [one.fin for one in events if isinstance(one, Frame) and one.opcode < CLOSE][-1:] == [False]


@both_roles
def test_streams_come_out_as_with_websockets(role: Role) -> None:
    for raw in streams(role).values():
        check_alike(role, raw)


@FUZZ
@given(st.data(), st.sampled_from([SERVER, CLIENT]))
def test_any_frames_come_out_as_with_websockets(data: st.DataObject, role: Role) -> None:
    check_alike(role, data.draw(mutated(frame_streams(role.key))))


@pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
@pytest.mark.parametrize("length", [b"\xfe\x00\x00", b"\xfe\x00\x02", b"\xff" + bytes(8)])
def test_control_frame_with_a_long_length_is_refused(opcode: int, length: bytes) -> None:
    raw = bytes([0x80 | opcode]) + length + bytes(6)
    assert SERVER.opened().feed(raw).failed_with == 1002
    check_alike(SERVER, raw)


@both_roles
def test_ping_after_our_close_is_not_answered(role: Role) -> None:
    """RFC 6455 §5.5.1 lets no data follow a close. `websockets` would answer; what it writes then is not sent."""
    for end in compared(role, b""):
        end.protocol.send_close(1000)
        end.feed(role.frame(PING, b"x"))
        assert [one.opcode for one in end.said] == [CLOSE]
        assert [one.opcode for one in end.events] == [PING]
