"""The other end of a WebSocket, independent of our code: frames and sockets by hand, connections by `wsproto`.

- `frame`, `take_frames`, `frames_in`: RFC 6455 §5.2 in bytes, valid or not
- `RawSocket`, `raw_socket`: a TCP connection to a hub that sends any bytes
- `Peer`: one end of a WebSocket in memory; `Connection`, `connect`, `serve`: the same on asyncio
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    RejectConnection,
    Request,
    TextMessage,
)
from wsproto.extensions import PerMessageDeflate

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10  # Opcodes, RFC 6455 §5.2.
WAIT_S = 20.0  # The limit of every wait: generous, because it is reached only when something is broken.
CLOSE_S = 10.0  # For the other end to answer a close; then the socket is cut.
WRITE_BYTES_MAX = 32_768  # `send` waits while more is buffered.


class ConnectionClosed(Exception):
    """The connection is closed."""


class InvalidStatus(Exception):
    """The server has answered the handshake with another status than 101."""

    def __init__(self, status_code: int) -> None:
        super().__init__(f"HTTP {status_code}")
        self.status_code = status_code


# Frames and handshakes in bytes

UPGRADE = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)


def request_of(*headers: str, path: str = "/") -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", *headers, "", ""]).encode("latin-1")


HANDSHAKE = request_of("Host: 127.0.0.1", *UPGRADE)


class RawFrame(NamedTuple):
    opcode: int
    data: bytes
    fin: bool


def frame(
    payload: bytes = b"",
    opcode: int = TEXT,
    *,
    fin: bool = True,
    rsv: int = 0,
    key: bytes | None = None,
    length: int | None = None,
    length_bytes: int = 0,
) -> bytes:
    """Return a frame, valid or not. It claims `length`, written in at least `length_bytes` bytes (0, 2 or 8).

    The same payload is always masked with the same key. An empty key leaves it unmasked.
    """
    key = zlib.crc32(payload).to_bytes(4) if key is None else key
    length = len(payload) if length is None else length
    length_bytes = max(length_bytes, 0 if length < 126 else 2 if length < 65_536 else 8)
    first = fin << 7 | rsv << 4 | opcode
    second = bool(key) << 7 | {0: length, 2: 126, 8: 127}[length_bytes]
    extended = length.to_bytes(length_bytes) if length_bytes else b""
    return bytes((first, second)) + extended + key + (mask(payload, key) if key else payload)


def mask(payload: bytes, key: bytes) -> bytes:
    stream = (key * (len(payload) // 4 + 1))[: len(payload)]
    return (int.from_bytes(payload) ^ int.from_bytes(stream)).to_bytes(len(payload))


def take_frames(buffer: bytearray, *, masked: bool = False) -> Iterator[RawFrame]:
    """Yield each whole frame, and take it out of the buffer. Raises ValueError for one that RFC 6455 §5.2 forbids."""
    while len(buffer) >= 2:
        first, second, start = buffer[0], buffer[1], 2
        if first & 0x70 or (second > 127) is not masked:
            raise ValueError(f"reserved bits are set, or the frame is masked by the wrong end: {bytes(buffer[:20])!r}")
        length = second & 127
        if length > 125:
            start = 4 if length == 126 else 10
            least, length = 126 if length == 126 else 65_536, int.from_bytes(buffer[2:start])
            if len(buffer) >= start and length < least:
                raise ValueError(f"the length is not written in its shortest form: {bytes(buffer[:20])!r}")
        key, start = buffer[start : start + 4 * masked], start + 4 * masked
        if len(buffer) < start + length:
            return
        data = bytes(buffer[start : start + length])
        del buffer[: start + length]
        yield RawFrame(first & 0x0F, mask(data, bytes(key)) if masked else data, first > 127)


def frames_in(raw: bytes, *, masked: bool = False) -> list[RawFrame]:
    """Return the frames that some bytes consist of."""
    buffer = bytearray(raw)
    frames = list(take_frames(buffer, masked=masked))
    if buffer:
        raise ValueError(f"the last frame is incomplete: {bytes(buffer[:20])!r}")
    return frames


class RawSocket:
    """A TCP connection to a hub that sends any bytes, and reads what the hub answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.head = b""  # Of the answer to the handshake.
        self._buffer = bytearray()

    async def send(self, raw: bytes) -> None:
        self.writer.write(raw)
        with contextlib.suppress(ConnectionError):  # The hub has closed the connection.
            await asyncio.wait_for(self.writer.drain(), WAIT_S)

    async def handshake(self, *headers: str, behind: bytes = b"") -> None:
        await self.send(request_of("Host: 127.0.0.1", *UPGRADE, *headers) + behind)
        self.head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), WAIT_S)

    async def frame(self) -> RawFrame:
        """Return the next frame. Raises EOFError when the connection ends."""
        while True:
            for frame in take_frames(self._buffer):
                return frame
            raw = await asyncio.wait_for(self.reader.read(65_536), WAIT_S)
            if not raw:
                raise EOFError
            self._buffer += raw

    async def message(self) -> dict[str, Any]:
        frame = await self.frame()
        assert frame.opcode == TEXT, frame
        message: dict[str, Any] = json.loads(frame.data)
        return message

    async def close_code(self) -> int:
        """Return the hub's close code, once it has closed."""
        while (frame := await self.frame()).opcode != CLOSE:
            pass
        return int.from_bytes(frame.data[:2])

    async def rest(self) -> bytes:
        """Return all bytes until the connection closes or is reset."""
        raw = bytes(self._buffer)
        async with asyncio.timeout(WAIT_S):
            with contextlib.suppress(OSError):
                while piece := await self.reader.read(65_536):
                    raw += piece
        return raw


@contextlib.asynccontextmanager
async def raw_socket(url: str, *, handshake: bool = True, **options: Any) -> AsyncIterator[RawSocket]:
    """Connect to a hub; without the handshake, nothing has been sent yet. Cut the connection when the block ends."""
    address = urlsplit(url)
    async with asyncio.timeout(WAIT_S):
        reader, writer = await asyncio.open_connection(address.hostname, address.port, **options)
    one = RawSocket(reader, writer)
    try:
        if handshake:
            await one.handshake()
            assert one.head.startswith(b"HTTP/1.1 101 ")
        yield one
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await asyncio.wait_for(writer.wait_closed(), WAIT_S)


# Connections by wsproto


class Peer:
    """One end of a WebSocket without a socket: `receive` bytes, and write what is `to_send`.

    It answers requests, pings and closes by itself, and fails the connection when the other end violates the protocol.
    """

    def __init__(self, role: ConnectionType = ConnectionType.CLIENT) -> None:
        self.closed: CloseConnection | None = None  # By the other end.
        self.is_failed = False
        self._role = role
        self._websocket = WSConnection(role)
        self._out = bytearray()

    @property
    def is_open(self) -> bool:
        return self._websocket.state is ConnectionState.OPEN and not self.is_failed

    @property
    def is_over(self) -> bool:
        """Return whether this end must close the socket now (RFC 6455 §7.1.1)."""
        return self.is_failed or (self._role is ConnectionType.SERVER and self.closed is not None)

    def send(self, event: Event) -> None:
        self._out += self._websocket.send(event)

    def to_send(self) -> bytes:
        """Return the bytes to write, once."""
        raw = bytes(self._out)
        self._out.clear()
        return raw

    def receive(self, raw: bytes) -> list[Event]:
        """Return the events of these bytes. A message comes in at least as many pieces as it has frames."""
        events: list[Event] = []
        if raw and self.closed is None and not self.is_failed:
            self._websocket.receive_data(raw)
            for event in self._websocket.events():  # Each is answered in the state in which it was received.
                events.append(event)
                self._answer(event)
        return events

    def fail(self, code: int, reason: str | None = None) -> None:
        """End the connection without waiting for the other end (RFC 6455 §7.1.7)."""
        if self.is_open:
            self.send(CloseConnection(code, reason))
        self.is_failed = True

    def _answer(self, event: Event) -> None:
        state = self._websocket.state
        if isinstance(event, Request):
            self.send(AcceptConnection())
        elif isinstance(event, Ping) and state is ConnectionState.OPEN:
            self.send(event.response())
        elif isinstance(event, CloseConnection):
            if state in (
                ConnectionState.OPEN,
                ConnectionState.LOCAL_CLOSING,
            ):  # A violation, to wsproto.
                self.fail(event.code, event.reason)
                return
            self.closed = event
            if state is ConnectionState.REMOTE_CLOSING:
                self.send(event.response())


class Connection(asyncio.Protocol):
    """A WebSocket on a socket. It stops reading while more than `queue_max` messages wait for `recv`.

    It fails the connection after a message of more than `bytes_max` bytes.
    """

    transport: asyncio.Transport

    def __init__(self, peer: Peer, bytes_max: float, queue_max: int) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._peer = peer
        self._bytes_max = bytes_max
        self._queue_max = queue_max
        self._pieces: list[Any] = []  # Of an incomplete message.
        self._pieces_bytes = 0
        self._messages: collections.deque[str | bytes] = collections.deque()
        self._is_leaving = False
        self._gone = asyncio.Event()
        self._news = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()

    @property
    def close_code(self) -> int | None:
        """The other end's close code, 1006 if it sent none; None while the connection is open."""
        if not self._gone.is_set():
            return None
        return 1006 if self._peer.closed is None else self._peer.closed.code

    async def recv(self) -> str | bytes:
        """Return the next message. Raises ConnectionClosed when there is none left."""
        while not self._messages:
            if self._gone.is_set():
                raise ConnectionClosed(f"closed with {self.close_code}")
            self._news.clear()
            await self._news.wait()
        message = self._messages.popleft()
        if len(self._messages) <= self._queue_max // 4:
            self.transport.resume_reading()
        return message

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        with contextlib.suppress(ConnectionClosed):
            while True:
                yield await self.recv()

    async def send(self, message: str | bytes | Iterable[str]) -> None:
        """Send a message; one with parts in a fragment each, and an empty last one."""
        if isinstance(message, str):
            await self._send(TextMessage(message))
        elif isinstance(message, bytes):
            await self._send(BytesMessage(message))
        else:
            for part in message:
                await self._send(TextMessage(part, message_finished=False))
            await self._send(TextMessage(""))

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close, discarding messages meanwhile; cut the socket after CLOSE_S."""
        self._is_leaving = True
        self.transport.resume_reading()
        if self._peer.is_open:
            self._peer.send(CloseConnection(code, reason))
            self._flush()
        elif not self.opened.done():
            self.transport.abort()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._gone.wait(), CLOSE_S)
        self.transport.abort()
        await self._gone.wait()

    async def wait_closed(self) -> None:
        """Wait until the socket is closed."""
        await self._gone.wait()

    async def _send(self, event: Event) -> None:
        if not self._peer.is_open or self.transport.is_closing():
            raise ConnectionClosed("cannot send")
        self._peer.send(event)
        self._flush()
        await self._writable.wait()

    def _flush(self) -> None:
        if (raw := self._peer.to_send()) and not self.transport.is_closing():
            self.transport.write(raw)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(WRITE_BYTES_MAX)
        self._flush()

    def data_received(self, raw: bytes) -> None:
        for event in self._peer.receive(raw):
            if isinstance(event, TextMessage | BytesMessage):
                self._take(event)
            elif isinstance(event, AcceptConnection | Request):
                self.opened.set_result(None)
            elif isinstance(event, RejectConnection):
                self.opened.set_exception(InvalidStatus(event.status_code))
        self._flush()
        if self._peer.is_over:
            self.transport.close()

    def _take(self, event: TextMessage | BytesMessage) -> None:
        self._pieces.append(event.data)
        self._pieces_bytes += len(event.data.encode() if isinstance(event.data, str) else event.data)
        if self._pieces_bytes > self._bytes_max:
            self._peer.fail(1009)
        elif event.message_finished and not self._is_leaving and not self._peer.is_failed:
            message = "".join(self._pieces) if isinstance(event, TextMessage) else b"".join(self._pieces)
            self._messages.append(message)
            self._news.set()
            if len(self._messages) > self._queue_max:
                self.transport.pause_reading()
        if event.message_finished:
            self._pieces.clear()
            self._pieces_bytes = 0

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(error or ConnectionClosed("before it was open"))
        for event in (self._gone, self._news, self._writable):
            event.set()


@contextlib.asynccontextmanager
async def connect(
    url: str,
    *,
    additional_headers: Mapping[str, str] | None = None,
    ssl: ssl.SSLContext | None = None,
    sock: socket.socket | None = None,
    local_addr: tuple[str, int] | None = None,
    max_size: float = 2**20,
    max_queue: int = 16,
) -> AsyncIterator[Connection]:
    """Open a WebSocket, over a connected socket if one is given; close it when the block ends.

    Like a browser, it offers compression. Raises InvalidStatus or an OSError if it cannot be opened.
    """
    address = urlsplit(url)
    peer = Peer()
    target = (address.path or "/") + (f"?{address.query}" if address.query else "")
    headers = [(name.encode(), value.encode()) for name, value in (additional_headers or {}).items()]
    peer.send(Request(address.netloc, target, extensions=[PerMessageDeflate()], extra_headers=headers))
    where = {"sock": sock} if sock is not None else {"host": address.hostname, "port": address.port}
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Connection(peer, max_size, max_queue), ssl=ssl, local_addr=local_addr, **where
    )
    try:
        await connection.opened
    except BaseException:
        connection.transport.abort()
        raise
    try:
        yield connection
    finally:
        await connection.close()


Script = Callable[[Connection], Awaitable[None]]


@contextlib.asynccontextmanager
async def serve(script: Script) -> AsyncIterator[str]:
    """Listen for WebSockets, and run the script on each until it returns or the connection closes; yield the URL.

    Other exceptions of a script are raised when the block ends.
    """
    connections: list[Connection] = []
    runs: list[asyncio.Task[None]] = []

    def accept() -> Connection:
        connections.append(Connection(Peer(ConnectionType.SERVER), float("inf"), 16))
        runs.append(asyncio.create_task(run(connections[-1])))
        return connections[-1]

    async def run(connection: Connection) -> None:
        with contextlib.suppress(ConnectionClosed):
            await connection.opened
            await script(connection)
        await connection.close()

    server = await asyncio.get_running_loop().create_server(accept, "127.0.0.1", 0)
    try:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await asyncio.gather(*(connection.close(1001) for connection in connections))
        await asyncio.gather(*runs)
