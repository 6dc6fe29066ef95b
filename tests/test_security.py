"""Attacks on the hub, with a section for each kind of attacker.

In each test the hub stays up, two bystanders go on with their work, and the hub counts and logs the attack, without
tokens or payloads.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import hmac
import json
import logging
import math
import os
import random
import re
import signal
import socket
import ssl
import stat
import sys
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import agenthub
from agenthub import (
    Access,
    Agent,
    AuthBackoff,
    Backoff,
    Broadcast,
    Delegate,
    Disconnected,
    Discover,
    Grant,
    HubServer,
    HubSettings,
    InvalidMessage,
    Journal,
    Register,
    Result,
    Status,
    TaskOutcome,
    decoder_from_agent,
    hash_of,
)
from tests.harness import Client, HubHarness, changes_of
from tests.raw_websocket import HANDSHAKE, UPGRADE, ConnectionClosed, RawSocket, frame, raw_socket, request_of
from tests.support import WAIT_S, agenthub_main, hub_process, raw_client, running

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs signals, file modes or limits as on POSIX")

TOKEN = "a-token-that-these-tests-use"
SECRET = "what-only-two-may-know"  # In payloads.
WRONG = "a-token-of-somebody-else"

# An authority, a certificate for the name localhost only, valid from 2020 to 2120, and others that do not match.
AUTHORITY = """\
-----BEGIN CERTIFICATE-----
MIIBmjCCAT+gAwIBAgIUVBtD+981jlS+trHFq5MNGnDImT0wCgYIKoZIzj0EAwIw
GTEXMBUGA1UEAwwOdGVzdCBhdXRob3JpdHkwIBcNMjAwMTAxMDAwMDAwWhgPMjEy
MDAxMDEwMDAwMDBaMBkxFzAVBgNVBAMMDnRlc3QgYXV0aG9yaXR5MFkwEwYHKoZI
zj0CAQYIKoZIzj0DAQcDQgAEw5E9BROQImBsregDS9bRpvZ/Smf3e7x3+THb50hP
uohhN39XILKuDb+tfEaqHNzrd6aumzQrBoGxjl0RoLzRMKNjMGEwDwYDVR0TAQH/
BAUwAwEB/zAOBgNVHQ8BAf8EBAMCAQYwHQYDVR0OBBYEFPPyCcZ/Im/Fo1i5pXIA
ctaTT9VdMB8GA1UdIwQYMBaAFPPyCcZ/Im/Fo1i5pXIActaTT9VdMAoGCCqGSM49
BAMCA0kAMEYCIQCNE7q41jmQXBAzvHVXPIo3IKLZALFZv7X55UtHYqa7VQIhAI6t
ET5c9ADELhnbE4rzxtR7KsyDqJvrRuEfd7/ZqXSK
-----END CERTIFICATE-----
"""
OTHER_AUTHORITY = """\
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUC+AzAefwTgd0KFwK+ZtNgX+qmXcwCgYIKoZIzj0EAwIw
GjEYMBYGA1UEAwwPb3RoZXIgYXV0aG9yaXR5MCAXDTIwMDEwMTAwMDAwMFoYDzIx
MjAwMTAxMDAwMDAwWjAaMRgwFgYDVQQDDA9vdGhlciBhdXRob3JpdHkwWTATBgcq
hkjOPQIBBggqhkjOPQMBBwNCAAScxRL7WpWDYee7EG7tC4mgX9rcddQrK1GMKaKq
sz30i+AaDo1ia3sDLI+CLcWe5WArrTFtJ6iLfKjqa9rR4h0Io2MwYTAPBgNVHRMB
Af8EBTADAQH/MA4GA1UdDwEB/wQEAwIBBjAdBgNVHQ4EFgQUz33zskPgm1guXPK6
6wjMvYiLPfQwHwYDVR0jBBgwFoAUz33zskPgm1guXPK66wjMvYiLPfQwCgYIKoZI
zj0EAwIDSAAwRQIhAMpy9kyaHckWv5RfY6UvBEv5yqy6kP9zDtuQVW/j//zsAiAO
YpTi1EqNKB+pnivq8x+CnnOMpXjdUM8/5BXSxefX6w==
-----END CERTIFICATE-----
"""
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBvTCCAWSgAwIBAgIUAn1wRXT3/rn7ubhT0j2kZJUS1oEwCgYIKoZIzj0EAwIw
GTEXMBUGA1UEAwwOdGVzdCBhdXRob3JpdHkwIBcNMjAwMTAxMDAwMDAwWhgPMjEy
MDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMMCWxvY2FsaG9zdDBZMBMGByqGSM49AgEG
CCqGSM49AwEHA0IABLNNqq0DEiVevlG6u4blZ4PnoS/8gGouOORNeirzrcFTOnB0
FHcQB91uorcKZQ9lZrPgnHzcxyKltF3giFHV2rujgYwwgYkwDAYDVR0TAQH/BAIw
ADAOBgNVHQ8BAf8EBAMCB4AwHQYDVR0OBBYEFNJwwd5xq5KrsLvUcZqJI+HJlcJa
MB8GA1UdIwQYMBaAFPPyCcZ/Im/Fo1i5pXIActaTT9VdMBMGA1UdJQQMMAoGCCsG
AQUFBwMBMBQGA1UdEQQNMAuCCWxvY2FsaG9zdDAKBggqhkjOPQQDAgNHADBEAiA9
d9hjXCht2w9aJSWOjXzYX8T6U9zixzpWk8ZOruL//QIgTY2HHZd+UZMGMfR01itG
SCjeLpdZS6jcxt+ignBZLz0=
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg0ixibFJquW9K47vp
xJy2Ecn9f5bkaSDO/39PnNpV7dKhRANCAASzTaqtAxIlXr5RuruG5WeD56Ev/IBq
LjjkTXoq863BUzpwdBR3EAfdbqK3CmUPZWaz4Jx83McipbRd4IhR1dq7
-----END PRIVATE KEY-----
"""
OTHER_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgwCG5SOpgMiPPY4gD
dm77vjIUVejVLWHa6MKAcsPONLuhRANCAAScxRL7WpWDYee7EG7tC4mgX9rcddQr
K1GMKaKqsz30i+AaDo1ia3sDLI+CLcWe5WArrTFtJ6iLfKjqa9rR4h0I
-----END PRIVATE KEY-----
"""
LOCKED_KEY = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIH0MF8GCSqGSIb3DQEFDTBSMDEGCSqGSIb3DQEFDDAkBBAQN+NAj7+MQ5z0/ogx
eM1/AgIIADAMBggqhkiG9w0CCQUAMB0GCWCGSAFlAwQBKgQQWOZDEh/7aFEItP5x
J1xHgwSBkGaWaZaXOdbYt3+4wGPMpQiEuywDczlEk2E2YbgVgkd3mGx14prGDSVD
FDqvfWlH74IT7mu/kxfOAigSdmcHTyIB7R953PMRlE2WFHKz0fPNwXpVDgQIjYQT
Gouu+zAqwHRivtSbPVTIjhJI6ZWdUyo5HHb33ub6NrFaMBl5rVOVtkHZW7oDzk+w
juuhw1utJw==
-----END ENCRYPTED PRIVATE KEY-----
"""


# Shared by all sections.


@pytest.fixture(autouse=True)
def _nothing_fails_and_nothing_leaks(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Check after each test that the hub logged no error, and no token or payload at any level."""
    caplog.set_level(logging.DEBUG, "agenthub")
    yield
    said = [record.getMessage() for record in caplog.get_records("call")]
    assert [line for line in said for secret in (TOKEN, SECRET, WRONG) if secret in line] == []
    errors = [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert [line for line in errors if not line.startswith("not reloaded: ")] == []


@pytest.fixture(autouse=True)
def _no_token_comes_from_or_stays_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AGENTHUB_TOKEN", "AGENTHUB_TOKEN_FILE", "AGENTHUB_CA_FILE", "AGENTHUB_URL"):
        monkeypatch.setenv(name, "")  # So that it is restored even if the test sets it.
        monkeypatch.delenv(name)


def never_forget_failures(
    monkeypatch: pytest.MonkeyPatch, *, free: int, delay_s: float = agenthub.FAILURE_DELAY_FIRST_S
) -> None:
    """Delay an address's answers after `free` wrong tokens, the first one by `delay_s`, and forget none of them."""
    monkeypatch.setattr(agenthub, "FAILURES_FREE", free)
    monkeypatch.setattr(agenthub, "FAILURE_FORGOTTEN_S", math.inf)
    monkeypatch.setattr(agenthub, "FAILURE_DELAY_FIRST_S", delay_s)


def bearer(token: str | None) -> dict[str, Any]:
    return {} if token is None else {"additional_headers": {"Authorization": f"Bearer {token}"}}


def is_logged(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return any(text in record.getMessage() for record in caplog.records)


@contextlib.asynccontextmanager
async def bystanders(url: str, token: str | None = None, **options: Any) -> AsyncIterator[None]:
    """Two undisturbed agents: at the end they complete a task over the connections that they had at the start."""
    options |= bearer(token)
    async with raw_client(url, **options) as requester, raw_client(url, **options) as worker:
        await requester.register("bystander")
        await worker.register("bystander", "stand-by")
        yield
        await requester.delegate("of-the-bystanders", capability="stand-by", input=SECRET)
        assert (await worker.message("delegate", task_id="of-the-bystanders"))["input"] == SECRET
        await worker.request(type="result", task_id="of-the-bystanders", success=True, output=SECRET)
        assert (await requester.message("result", task_id="of-the-bystanders"))["output"] == SECRET


@contextlib.asynccontextmanager
async def hub_in_use(
    settings: HubSettings | None = None, *, token: str | None = TOKEN, **options: Any
) -> AsyncIterator[HubServer]:
    """A hub with bystanders. It requires `token`, unless that is None."""
    if token is not None:
        options.setdefault("access", Access.of_token(token))
    async with HubServer(settings, port=0, **options) as hub, bystanders(hub.url, token):
        yield hub


async def until(condition: Callable[[], Any]) -> Any:
    """Return the value of `condition` once it is true."""
    async with asyncio.timeout(WAIT_S):
        while not (found := condition()):
            await asyncio.sleep(0.01)
    return found


plain_connection = functools.partial(raw_socket, handshake=False)  # On which nothing has been sent yet.


async def status_code(url: str, *headers: str, path: str = "/", **options: Any) -> int:
    """Return the status of the hub's response to a request with exactly these headers."""
    async with plain_connection(url, **options) as one:
        await one.send(request_of(*headers, path=path))
        async with asyncio.timeout(WAIT_S):
            return int((await one.reader.readline()).split()[1])


async def health(url: str, token: str | None = None, **options: Any) -> dict[str, Any]:
    """Return the JSON object of the hub's /healthz."""
    headers = ["Host: localhost"] + ([f"Authorization: Bearer {token}"] if token is not None else [])
    async with plain_connection(url, **options) as one:
        await one.send(request_of(*headers, path="/healthz"))
        answer: dict[str, Any] = json.loads((await one.rest()).partition(b"\r\n\r\n")[2])
    return answer


@contextlib.contextmanager
def world_in_use(**settings: Any) -> Iterator[HubHarness]:
    """A hub without sockets, with bystanders."""
    world = HubHarness(**settings)
    requester, worker = world.join("bystander"), world.join("bystander", "stand-by")
    yield world
    assert requester.close_code is worker.close_code is None
    requester.delegate("of-the-bystanders", "stand-by", ttl=1.0)
    worker.succeed("of-the-bystanders", "done")
    assert [one.output for one in requester.received() if isinstance(one, TaskOutcome)] == ["done"]


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[HubServer]:
    """The servers that the command line would have started."""
    made: list[HubServer] = []

    async def note(server: HubServer, *_: Any) -> None:
        made.append(server)

    monkeypatch.setattr(agenthub, "_serve_hub", note)
    return made


def refusal_to_start(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the line of usage error with which the command line refuses to start a hub."""
    assert agenthub_main("hub", "--port", "0", *argv) == 2
    output, complaint = capsys.readouterr()
    assert output == ""
    line = complaint.splitlines()[-1]
    before, after = "agenthub hub: error: ", '; see "agenthub hub --help"'
    assert line.startswith(before), complaint
    assert line.endswith(after)
    assert "Traceback" not in complaint
    return f"agenthub: error: {line.removeprefix(before).removesuffix(after)}"


def private_file(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


# 1: clients without a token.

FIRST_MESSAGES: dict[str, dict[str, Any]] = {
    "register": {"name": "ann"},
    "deregister": {},
    "discover": {},
    "delegate": {"task_id": "task", "capability": "stand-by"},
    "result": {"task_id": "task", "success": True},
    "status": {},
    "broadcast": {"message": SECRET},
    "heartbeat": {},
}
NO_TOKENS: list[Any] = [
    "tökén",
    "\x00",
    "\ud800",
    f"{TOKEN}\x00",
    f" {TOKEN}",
    TOKEN.upper(),
    "",
    "x" * 10_000,
    [TOKEN],
    {"token": TOKEN},
    5,
    True,
]


def test_token_in_the_environment_opens_the_hub(
    monkeypatch: pytest.MonkeyPatch, servers: list[HubServer], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AGENTHUB_TOKEN", TOKEN)
    assert agenthub_main("hub") == 0
    (server,) = servers
    assert server.access is not None
    assert server.access.grant(TOKEN) is not None
    assert server.access.grant(WRONG) is None
    assert TOKEN not in "".join(capsys.readouterr())


@posix_only
@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_token_file_that_only_its_owner_can_read_opens_the_hub(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servers: list[HubServer]
) -> None:
    monkeypatch.setenv("AGENTHUB_TOKEN", WRONG)
    assert agenthub_main("hub", "--token-file", private_file(tmp_path / "token", f"{TOKEN}\n", mode)) == 0
    (server,) = servers
    assert server.access is not None
    assert server.access.grant(TOKEN) is not None
    assert server.access.grant(WRONG) is None


@posix_only
@pytest.mark.parametrize("mode", [0o640, 0o644, 0o604, 0o620, 0o601])
def test_token_file_that_others_may_use_is_refused(
    mode: int, tmp_path: Path, servers: list[HubServer], capsys: pytest.CaptureFixture[str]
) -> None:
    path = private_file(tmp_path / "token", TOKEN, mode)
    line = refusal_to_start(capsys, "--token-file", path)
    assert line == (f"agenthub: error: {path}: others may read it; chmod 600 helps; in a container, mount it read-only")
    assert agenthub_main("status", "--token-file", path) == 2
    assert TOKEN not in "".join(capsys.readouterr())
    assert servers == []


@pytest.mark.parametrize("text", ["", "\n", " \t\r\n"])
def test_empty_token_file_is_refused(
    text: str, tmp_path: Path, servers: list[HubServer], capsys: pytest.CaptureFixture[str]
) -> None:
    path = private_file(tmp_path / "token", text)
    assert refusal_to_start(capsys, "--token-file", path) == f"agenthub: error: {path}: is an empty token"
    assert servers == []


def test_empty_token_of_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, servers: list[HubServer], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AGENTHUB_TOKEN", "")
    assert refusal_to_start(capsys) == "agenthub: error: AGENTHUB_TOKEN: is an empty token"
    assert servers == []


@pytest.mark.parametrize("token", ["two words", "tökén", "a\nb", "a\x7fb"])
def test_token_that_no_header_can_carry_is_refused_and_not_shown(
    token: str, monkeypatch: pytest.MonkeyPatch, servers: list[HubServer], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AGENTHUB_TOKEN", token)
    line = refusal_to_start(capsys)
    assert line == "agenthub: error: AGENTHUB_TOKEN: must be printable ASCII without spaces"
    assert servers == []


def test_token_file_that_is_not_there_or_is_no_text_is_refused(
    tmp_path: Path, servers: list[HubServer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot be read: No such file" in refusal_to_start(capsys, "--token-file", str(tmp_path / "none"))
    assert "cannot be read" in refusal_to_start(capsys, "--token-file", str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "binary").chmod(0o600)
    assert "is not UTF-8" in refusal_to_start(capsys, "--token-file", str(tmp_path / "binary"))
    assert servers == []


def test_no_option_of_any_command_takes_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("hub", "agent", "status", "call", "bridge"):
        assert agenthub_main(command, "--help") == 0
        options = re.findall(r"--[\w-]*(?:token|secret|password|bearer)[\w-]*", capsys.readouterr().out)
        assert set(options) <= {"--token-file"}, command


@pytest.mark.parametrize("kind", FIRST_MESSAGES)
async def test_token_may_stand_in_the_first_message_of_any_type(kind: str) -> None:
    async with hub_in_use() as hub, raw_client(hub.url) as client:
        reply = await client.request(type=kind, token=TOKEN, **FIRST_MESSAGES[kind])
        assert reply["type"] == kind or reply["code"] == "not_registered"
        assert (await client.request(type="status"))["hub"]["version"] == agenthub.__version__
        assert hub.rejected == {}


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_token_may_come_as_a_bearer_token_of_the_handshake(scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {TOKEN}"}
    async with hub_in_use() as hub, raw_client(hub.url, additional_headers=headers) as client:
        assert (await client.register("ann"))["type"] == "register"
        assert hub.rejected == {}


async def test_token_in_the_url_opens_nothing() -> None:
    async with hub_in_use() as hub, raw_client(f"{hub.url}/?token={TOKEN}") as client:
        assert (await client.request(type="status"))["code"] == "unauthorized"
    with pytest.raises(ValueError, match="AGENTHUB_TOKEN") as caught:
        Agent("ann", url=f"ws://{TOKEN}@localhost")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        *(json.dumps({"type": kind, **fields}) for kind, fields in FIRST_MESSAGES.items()),
        json.dumps({"type": "status", "token": None}),
        json.dumps({"type": "nonsense"}),
        "",
        "{",
        "[]",
        '"text"',
        "[" * 10_000,
        "\x00",
        b"\x00\xff",
        json.dumps({"type": "status"}).encode(),
    ],
    ids=lambda raw: str(raw[:20]),
)
async def test_before_the_token_everything_is_unauthorized_and_the_third_try_is_the_last(
    raw: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with hub_in_use() as hub, raw_client(hub.url) as client:
        before = hub.hub.summary()["agents"]
        for _ in range(3):
            await client.connection.send(raw)
            answer = await client.receive()
            assert answer["code"] == "unauthorized"
            assert answer["message"] == "authentication required: set AGENTHUB_TOKEN or AGENTHUB_TOKEN_FILE"
        assert await client.closed() == 1008
        assert hub.rejected == {"unauthorized": 3}
        assert is_logged(caplog, "rejected reason=unauthorized address=127.0.0.1")
        assert hub.hub.summary()["agents"] == before
        assert (await health(hub.url, TOKEN))["turned_away"] == {"unauthorized": 3}


async def test_answer_to_who_has_no_token_carries_the_id_of_the_request() -> None:
    async with hub_in_use() as hub, raw_client(hub.url) as client:
        for message in ({"type": "status"}, {"type": "nonsense"}):
            assert (await client.request(**message))["code"] == "unauthorized"


async def test_health_says_only_that_the_hub_is_up_to_who_has_no_token() -> None:
    async with hub_in_use() as hub:
        assert await health(hub.url) == await health(hub.url, WRONG) == {"status": "ok", "ready": True}
        assert (await health(hub.url, TOKEN))["agents"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second address of this machine's own")
async def test_page_of_health_is_no_place_to_guess_tokens_at(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with hub_in_use() as hub:
        never_forget_failures(monkeypatch, free=3)
        for _ in range(10):
            assert await health(hub.url, WRONG) == {"status": "ok", "ready": True}
        assert await health(hub.url, TOKEN) == {
            "status": "ok",
            "ready": True,
        }  # Throttled without an answer about the token.
        page = await health(hub.url, TOKEN, local_addr=("127.0.0.2", 0))
        assert page["turned_away"] == {"unauthorized": 3}
        assert is_logged(caplog, "rejected reason=unauthorized address=127.0.0.1")


async def test_who_says_no_token_in_time_is_closed_with_1008(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with hub_in_use() as hub:
        monkeypatch.setattr(agenthub, "TOKEN_S", 0.05)
        async with raw_client(hub.url) as silent, raw_client(hub.url) as talking:
            with contextlib.suppress(ConnectionClosed):
                await talking.send(type="status")
            assert await silent.closed() == 1008
            assert await talking.closed() == 1008
        assert hub.rejected["unauthorized"] >= 2
        assert is_logged(caplog, "rejected reason=unauthorized")
        assert hub.authenticator.unauthenticated == {}


async def test_attempt_to_authenticate_that_waits_for_its_turn_is_not_closed_as_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agenthub, "TOKEN_S", 0.05)
    async with hub_in_use() as hub, raw_client(hub.url) as client:
        (link,) = hub.authenticator.unauthenticated
        link.pause_reading(agenthub.PauseReason.TURN_OVER)
        await client.send(type="status", id="waits", token=TOKEN)
        await asyncio.sleep(0.2)
        link.resume_reading(agenthub.PauseReason.TURN_OVER)
        assert (await client.receive())["reply_to"] == "waits"
        assert hub.rejected == {}


async def test_wrong_token_of_the_handshake_is_a_try() -> None:
    async with hub_in_use() as hub, raw_client(hub.url, **bearer(WRONG)) as client:
        for _ in range(2):
            assert (await client.request(type="status", token=WRONG))["code"] == "unauthorized"
        assert await client.closed() == 1008
        assert hub.rejected == {"unauthorized": 3}


async def test_valid_bearer_token_from_an_address_that_failed_too_often_is_admitted_after_the_delay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hub_in_use() as hub:
        never_forget_failures(monkeypatch, free=1, delay_s=0.2)
        async with raw_client(hub.url) as client:
            assert (await client.request(type="status", token=WRONG))["code"] == "unauthorized"
        began = time.monotonic()
        async with raw_client(hub.url, **bearer(TOKEN)) as client:
            assert (await client.request(type="status"))["hub"]["version"] == agenthub.__version__
        assert time.monotonic() - began >= 0.2
        assert hub.rejected == {"unauthorized": 1}


async def test_right_token_after_two_wrong_ones_opens_the_hub() -> None:
    async with hub_in_use() as hub, raw_client(hub.url, **bearer(WRONG)) as client:
        assert (await client.request(type="register", name="ann", token=WRONG))["code"] == "unauthorized"
        assert (await client.request(type="register", name="ann", token=TOKEN))["type"] == "register"


@pytest.mark.parametrize("token", NO_TOKENS, ids=lambda token: ascii(token)[:20])
async def test_token_that_cannot_be_one_is_unauthorized_and_no_more(
    token: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with hub_in_use() as hub, raw_client(hub.url) as client:
        for _ in range(3):
            assert (await client.request(type="status", token=token))["code"] == "unauthorized"
        assert await client.closed() == 1008
        assert is_logged(caplog, "rejected reason=unauthorized")


@pytest.mark.parametrize(
    "headers",
    [
        ["Authorization: Bearer t\xf6k\xe9n"],
        ["Authorization: Bearer"],
        ["Authorization:"],
        ["Authorization: Bearer  "],
        [f"Authorization: Basic {TOKEN}"],
        [f"Authorization: {TOKEN}"],
        [f"Authorization: Bearer {TOKEN}", f"Authorization: Bearer {TOKEN}"],
        [f"X-Authorization: Bearer {TOKEN}"],
    ],
    ids=ascii,
)
async def test_header_that_is_no_bearer_token_opens_nothing(headers: list[str]) -> None:
    async with hub_in_use() as hub, raw_socket(hub.url, handshake=False) as one:
        await one.handshake(*headers)
        assert b" 101 " in one.head
        await one.send(frame(b'{"type": "status"}') * 3)
        for _ in range(2):
            reply = await one.message()
            assert (reply["type"], reply["code"]) == ("error", "unauthorized")
        assert await one.close_code() == 1008


async def test_wrong_token_is_compared_with_every_token_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    access = Access(Grant(name, hash_of(name)) for name in ("first", "second", "third"))
    compared: list[Any] = []
    compare = hmac.compare_digest

    def spy(one: Any, other: Any) -> bool:
        compared.append({one, other})
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    for token in ("first", "second", "third", WRONG, "", "\ud800"):
        compared.clear()
        grant = access.grant(token)
        assert (grant.name if grant is not None else None) == (token if token in ("first", "second", "third") else None)
        assert compared == [{one.sha256, hash_of(token)} for one in access.grants]
        assert token == "" or token not in map(str, compared)


def test_hub_keeps_no_token() -> None:
    access = Access.of_token(TOKEN)
    assert TOKEN not in repr(access.grants)
    assert access.grants[0].sha256 == hash_of(TOKEN)


def test_token_command_makes_another_token_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = set()
    for _ in range(5):
        assert agenthub_main("token") == 0
        output, talk = capsys.readouterr()
        token = output.removesuffix("\n")
        assert len(token) == 43
        assert agenthub.check_token("it", token) == token
        assert hash_of(token) in talk
        assert token not in talk
        tokens.add(token)
    assert len(tokens) == 5


@posix_only
def test_token_command_makes_a_file_for_its_owner_alone_and_overwrites_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "token"
    before = os.umask(0)
    try:
        assert agenthub_main("token", "--file", str(path)) == 0
    finally:
        os.umask(before)
    token = path.read_text().strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert agenthub.token_in(str(path)) == token
    output, talk = capsys.readouterr()
    assert output == f"{path}\n"
    assert token not in output + talk
    assert agenthub_main("token", "--file", str(path)) == 1
    assert capsys.readouterr() == ("", f"agenthub: {path}: cannot be created: File exists\n")
    assert path.read_text().strip() == token
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert agenthub_main("token", "--file", str(tmp_path / "link")) == 1
    assert not (tmp_path / "elsewhere").exists()


def test_token_command_speaks_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert agenthub_main("token", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"token": said["token"], "sha256": hash_of(said["token"])}
    path = tmp_path / "token"
    assert agenthub_main("token", "--json", "--file", str(path)) == 0
    assert json.loads(capsys.readouterr().out) == {
        "file": str(path),
        "sha256": hash_of(path.read_text().strip()),
    }


def test_failures_of_an_address_slow_it_down_more_and_more_up_to_a_bound() -> None:
    failures = AuthBackoff()
    delays = []
    for _ in range(50):
        delays.append(failures.delay_s("1.2.3.4", 100.0))
        failures.add("1.2.3.4", 100.0)
    free = agenthub.FAILURES_FREE
    assert delays[:free] == [0.0] * free
    assert delays[free : free + 3] == [agenthub.FAILURE_DELAY_FIRST_S * factor for factor in (1, 2, 4)]
    assert delays == sorted(delays)
    assert max(delays) == delays[-1] == agenthub.FAILURE_DELAY_MAX_S


def test_failures_of_an_address_are_forgotten_one_by_one() -> None:
    failures = AuthBackoff()
    for _ in range(1000):
        failures.add("1.2.3.4", 100.0)
    every_s = agenthub.FAILURE_FORGOTTEN_S
    delays = [failures.delay_s("1.2.3.4", 100.0 + number * every_s) for number in range(20)]
    assert delays == sorted(delays, reverse=True)
    assert delays[0] == agenthub.FAILURE_DELAY_MAX_S
    assert delays[-1] == 0.0
    failures.add("1.2.3.4", 1e6)
    assert failures.delay_s("1.2.3.4", 1e6) == 0.0


def test_failures_of_one_address_are_nothing_to_another() -> None:
    failures = AuthBackoff()
    for _ in range(20):
        failures.add("1.2.3.4", 100.0)
    assert failures.delay_s("1.2.3.5", 100.0) == 0.0


def test_failures_are_remembered_of_so_many_addresses_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "ADDRESSES_MAX", 10)
    failures = AuthBackoff()
    for number in range(100):
        for _ in range(20):
            failures.add(f"1.2.3.{number}", 100.0)
    assert [number for number in range(100) if failures.delay_s(f"1.2.3.{number}", 100.0)] == list(range(90, 100))


def test_whoever_has_64_bits_of_an_ipv6_address_counts_as_one() -> None:
    network = agenthub.network_of
    assert network("2001:db8::1") == network("2001:db8::ffff:1") != network("2001:db8:0:1::1")
    assert network("fe80::1%eth0") == network("fe80::2")
    assert network("1.2.3.4") == "1.2.3.4"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second address of this machine's own")
async def test_answer_to_an_address_that_failed_too_often_is_held_back_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hub_in_use() as hub:
        never_forget_failures(monkeypatch, free=1, delay_s=3600.0)
        monkeypatch.setattr(agenthub, "FAILURE_DELAY_MAX_S", 3600.0)
        monkeypatch.setattr(agenthub, "CLOSING_S", 0.1)  # Paused links never see the reply to a close.
        async with raw_client(hub.url) as client, raw_client(hub.url) as later:
            assert (await client.request(type="status", token=WRONG))["code"] == "unauthorized"
            for one in (client, later):
                await one.send(type="status", id="held", token=WRONG)
            await until(lambda: sum(bool(link.pause_reasons) for link in hub.authenticator.unauthenticated) == 2)
            assert not any(link.transport.is_reading() for link in hub.authenticator.unauthenticated)
            async with raw_client(hub.url, local_addr=("127.0.0.2", 0)) as other:
                assert (await other.request(type="status", token=TOKEN))["hub"]["agents"] == 2
            # The delayed replies never came: the hub closes these connections like silent ones.
            for link in list(hub.authenticator.unauthenticated):
                link.close(1008, "authentication timed out")
            for one in (client, later):
                assert await one.closed() == 1008
                assert one.seen == []


async def test_answer_that_was_held_back_comes_and_what_was_said_meanwhile_is_answered_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hub_in_use() as hub:
        never_forget_failures(monkeypatch, free=1, delay_s=0.02)
        async with raw_client(hub.url) as client:
            await client.send(type="status", id="1", token=WRONG)
            await client.send(type="status", id="2", token=WRONG)
            await client.send(type="status", id="3", token=TOKEN)
            await client.send(type="status", id="4")
            replies = [await client.receive() for _ in range(4)]
            assert [reply["reply_to"] for reply in replies] == ["1", "2", "3", "4"]
            assert [reply["type"] for reply in replies] == ["error", "error", "status", "status"]


async def test_log_of_a_hub_process_shows_no_token_and_no_payload_even_at_debug(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        log.open("w") as stderr,
        hub_process("--log-level", "debug", stderr=stderr, env={"AGENTHUB_TOKEN": TOKEN}) as (
            url,
            _,
        ),
    ):
        async with bystanders(url, TOKEN), raw_client(url, **bearer(WRONG)) as client:
            await client.send(type="broadcast", token=WRONG, message=SECRET)
            await client.connection.send(f'{{"token": "{WRONG}", "{SECRET}')
            assert await client.closed() == 1008
        assert (await health(url, TOKEN))["turned_away"] == {"unauthorized": 3}
    said = log.read_text()
    assert said.count("rejected reason=unauthorized address=127.0.0.1") == 3
    assert "received type=delegate" in said
    assert [secret for secret in (TOKEN, WRONG, SECRET) if secret in said] == []


async def test_agent_with_a_wrong_token_ends_with_a_clear_error_instead_of_retrying() -> None:
    async with hub_in_use() as hub:
        with pytest.raises((Disconnected, agenthub.Refused), match="token"):
            async with asyncio.timeout(WAIT_S), Agent("ann", url=hub.url, token=WRONG):
                pass
        async with Agent("ann", url=hub.url, token=TOKEN) as ann:
            assert ann.agent_id is not None


# 2: clients with a token for other rights or another namespace.


def access_text(**tokens: dict[str, Any]) -> str:
    """Return an access file with a table for each token, named by the token."""
    lines = []
    for token, table in tokens.items():
        lines.append(f"[tokens.{token}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in {"sha256": hash_of(token), **table}.items()]
    return "\n".join([*lines, ""])


@contextlib.asynccontextmanager
async def hub_with_tokens(**tokens: dict[str, Any]) -> AsyncIterator[HubServer]:
    """A hub with an access file, and bystanders in its namespace `default`."""
    tables = {**tokens, TOKEN: {}}
    access = Access(agenthub.parse_grant(token, {"sha256": hash_of(token), **table}) for token, table in tables.items())
    async with hub_in_use(access=access) as hub:
        yield hub


BAD_ACCESS_FILES = {
    "no TOML": ("[tokens.a\n", "is not TOML"),
    "another table": ("[agents.a]\n", "must have tables named tokens.NAME, and nothing else"),
    "another table too": (access_text(a={}) + "[more]\n", "must have tables named tokens.NAME, and nothing else"),
    "no table": ("tokens = 1\n", "must have tables named tokens.NAME, and nothing else"),
    "no token": ("", "must have tables named tokens.NAME, and nothing else"),
    "nested too deep": (f"x = {'[' * 5000}{']' * 5000}\n", "is not TOML"),
    "an empty table": ("[tokens]\n", "a hub needs 1 to 1000 tokens, not 0"),
    "too many": (access_text(**{f"t{number}": {} for number in range(1001)}), "a hub needs 1 to 1000 tokens, not 1001"),
    "an unknown key": (access_text(a={"may_not": []}), "tokens.a: must be a table with"),
    "a token for a table": ('[tokens]\na = "x"\n', "tokens.a: must be a table with"),
    "no hash": ("[tokens.a]\n", "tokens.a.sha256: must be the SHA-256 of a token"),
    "the token itself": (access_text(a={"sha256": TOKEN}), "tokens.a.sha256: must be the SHA-256 of a token"),
    "a hash in capitals": (access_text(a={"sha256": hash_of("a").upper()}), "tokens.a.sha256: must be the SHA-256"),
    "a short hash": (access_text(a={"sha256": hash_of("a")[1:]}), "tokens.a.sha256: must be the SHA-256"),
    "a number for a hash": (access_text(a={"sha256": 1}), "tokens.a.sha256: must be the SHA-256"),
    "a token twice": (access_text(a={}, b={"sha256": hash_of("a")}), "two names have the same token"),
    "a path for a namespace": (
        access_text(a={"namespace": "../etc"}),
        "tokens.a.namespace: must be 1 to 64 characters of a-z",
    ),
    "an empty namespace": (access_text(a={"namespace": ""}), "tokens.a.namespace: must be 1 to 64 characters of a-z"),
    "an unknown right": (access_text(a={"may": ["everything"]}), "tokens.a.may: must be a list of some of register"),
    "a text for rights": (access_text(a={"may": "register"}), "tokens.a.may: must be a list of strings"),
    "numbers for patterns": (access_text(a={"offers": [1]}), "tokens.a.offers: must be a list of strings"),
    "a text for patterns": (access_text(a={"calls": "*"}), "tokens.a.calls: must be a list of strings"),
}


@pytest.mark.parametrize("what", BAD_ACCESS_FILES)
def test_bad_access_file_is_one_clear_line(
    what: str, tmp_path: Path, servers: list[HubServer], capsys: pytest.CaptureFixture[str]
) -> None:
    text, complaint = BAD_ACCESS_FILES[what]
    path = private_file(tmp_path / "access.toml", text)
    line = refusal_to_start(capsys, "--access", path)
    assert line.startswith(f"agenthub: error: {path}: {complaint}")
    assert TOKEN not in line
    assert servers == []


@posix_only
@pytest.mark.parametrize("mode", [0o440, 0o444, 0o644])
def test_secret_of_another_user_may_be_read_by_others_too(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = private_file(tmp_path / "token", TOKEN, mode)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert agenthub.token_in(path) == TOKEN
    private_file(tmp_path / "token", TOKEN, 0o664)
    with pytest.raises(ValueError, match="others may read it; chmod 600 helps; in a container, mount it read-only"):
        agenthub.token_in(path)


@posix_only
@pytest.mark.parametrize("mode", [0o440, 0o444, 0o666])
def test_secret_on_a_read_only_mount_may_have_any_mode(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = private_file(tmp_path / "token", TOKEN, mode)
    read_only = os.statvfs_result([0] * 8 + [os.ST_RDONLY, 255])
    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: read_only)
    assert agenthub.token_in(path) == TOKEN


@pytest.mark.parametrize("text", ["{}\n", "\ufeff{}", " {}\r\n", "\ufeff\t{}\r\n\r\n"])
def test_blanks_and_a_byte_order_mark_around_a_token_do_not_matter(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text.format(TOKEN)
    assert agenthub.token_in(private_file(tmp_path / "token", text)) == TOKEN
    assert agenthub.check_token("it", text) == TOKEN
    assert Access.of_token(text).grant(TOKEN) is not None
    monkeypatch.setenv("AGENTHUB_TOKEN", text)
    assert agenthub.bearer_token() == TOKEN
    monkeypatch.delenv("AGENTHUB_TOKEN")
    monkeypatch.setenv("AGENTHUB_TOKEN_FILE", f"{tmp_path / 'token'}\r\n")
    assert agenthub.bearer_token() == TOKEN


def test_byte_order_mark_of_an_access_file_does_not_matter(tmp_path: Path) -> None:
    path = private_file(tmp_path / "access.toml", "\ufeff" + access_text(a={}))
    assert [grant.name for grant in Access.of_file(path).grants] == ["a"]


@posix_only
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_access_file_that_others_may_write_to_is_refused(
    mode: int, tmp_path: Path, servers: list[HubServer], capsys: pytest.CaptureFixture[str]
) -> None:
    path = private_file(tmp_path / "access.toml", access_text(a={}), mode)
    assert refusal_to_start(capsys, "--access", path).endswith(
        "others may write to it; chmod 600 helps; in a container, mount it read-only"
    )
    private_file(tmp_path / "access.toml", access_text(a={}), 0o644)  # It contains only hashes.
    assert agenthub_main("hub", "--access", path) == 0
    assert len(servers) == 1


def test_access_file_that_is_not_there_or_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servers: list[HubServer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot be read: No such file" in refusal_to_start(capsys, "--access", str(tmp_path / "none"))
    monkeypatch.setattr(agenthub, "PRIVATE_CHARACTERS_MAX", 10)
    path = private_file(tmp_path / "access.toml", access_text(a={}))
    assert "is larger than 10 characters" in refusal_to_start(capsys, "--access", path)
    token = private_file(tmp_path / "token", TOKEN)
    assert "either --access or --token-file" in refusal_to_start(capsys, "--access", path, "--token-file", token)
    assert servers == []


def test_access_file_may_have_a_thousand_tokens(tmp_path: Path, servers: list[HubServer]) -> None:
    text = access_text(**{f"t{number}": {"namespace": f"n{number % 3}"} for number in range(1000)})
    assert agenthub_main("hub", "--access", private_file(tmp_path / "access.toml", text)) == 0
    (server,) = servers
    assert server.access is not None
    assert server.access.namespaces == ["n0", "n1", "n2"]
    grant = server.access.grant("t999")
    assert grant is not None
    assert (grant.name, grant.namespace) == ("t999", "n0")


@pytest.mark.parametrize("right", ["register", "delegate", "broadcast", "observe"])
async def test_token_allows_what_its_rights_say_and_nothing_else(right: str) -> None:
    async with hub_with_tokens(limited={"may": [right]}) as hub, raw_client(hub.url, **bearer("limited")) as client:
        allowed = {
            "register": right == "register",
            "discover": right in ("delegate", "observe"),
            "delegate": right == "delegate",
            "broadcast": right == "broadcast",
            "status": right == "observe",
        }
        joined = await client.register("ann")  # Every right but `observe` allows registration without capabilities.
        assert joined.get("code") == ("unauthorized" if right == "observe" else None)
        before = hub.hub.summary()["refused"].get("unauthorized", 0)
        for kind, is_allowed in allowed.items():
            fields = {"register": {"name": "ann", "capabilities": ["work"]}}.get(kind, FIRST_MESSAGES[kind])
            reply = await client.request(type=kind, **fields)
            assert (reply.get("code") != "unauthorized") == is_allowed, (kind, reply)
        assert (await client.request(type="status", tasks=True)).get("code") == (
            None if right == "observe" else "unauthorized"
        )
        refused = hub.hub.summary()["refused"]["unauthorized"]
        assert refused - before == 1 + list(allowed.values()).count(False) - (right == "observe")
        assert ("agents" in await health(hub.url, "limited")) == (right == "observe")
        assert (hub.hub.summary()["tasks"]["in_progress"] == 1) == (right == "delegate")


async def test_refusal_for_want_of_a_right_is_counted_and_logged_and_closes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with hub_with_tokens(limited={"may": ["delegate"]}) as hub, raw_client(hub.url, **bearer("limited")) as one:
        joined = await one.register("ann")
        for _ in range(5):
            assert (await one.request(type="broadcast", message=SECRET))["code"] == "unauthorized"
        assert hub.hub.summary()["refused"] == {"unauthorized": 5}
        assert hub.hub.summary()["closed"] == {}
        assert is_logged(caplog, f"refused code=unauthorized agent={joined['agent_id']}")


async def test_token_offers_only_capabilities_that_fit_its_patterns() -> None:
    patterns = {"offers": ["review-*", "lint"]}
    async with hub_with_tokens(limited=patterns) as hub, raw_client(hub.url, **bearer("limited")) as client:
        for names in (["review-code", "lint"], ["review-"], [], [{"name": "lint", "description": "x"}]):
            assert (await client.register("ann", *names))["type"] == "register"
        for names in (["review"], ["lint", "deploy"], ["REVIEW-code"], ["linting"], [{"name": "deploy"}], ["stand-by"]):
            assert (await client.register("ann", *names))["code"] == "unauthorized"
        found = await client.request(type="discover", capability="lint")
        assert [one["name"] for agent in found["agents"] for one in agent["capabilities"]] == ["lint"]


async def test_token_calls_only_capabilities_that_fit_its_patterns() -> None:
    async with (
        hub_with_tokens(limited={"calls": ["review-*"]}) as hub,
        raw_client(hub.url, **bearer(TOKEN)) as worker,
        raw_client(hub.url, **bearer("limited")) as client,
    ):
        agent_id = (await worker.register("worker", "review-code", "deploy"))["agent_id"]
        await client.register("ann")
        assert (await client.delegate("1", capability="review-code"))["state"] == "in_progress"
        assert (await client.delegate("2", capability="review-code", agent_id=agent_id))["state"] == "in_progress"
        for fields in (
            {"capability": "deploy"},
            {"agent_id": agent_id},
            {"capability": "deploy", "agent_id": agent_id},
        ):
            assert (await client.delegate("3", **fields))["code"] == "unauthorized"
        assert (await worker.request(type="status", task_id="3"))["code"] == "unknown_task"


async def test_namespaces_do_not_see_each_other() -> None:
    async with (
        hub_with_tokens(one={"namespace": "one"}, other={"namespace": "other"}) as hub,
        raw_client(hub.url, **bearer("one")) as one,
        raw_client(hub.url, **bearer("other")) as other,
    ):
        one_id = (await one.register("ann", "work"))["agent_id"]
        await other.register("bob", "rest")
        for keyword in ("", "work", "ann"):
            found = (await other.request(type="discover", capability=keyword))["agents"]
            assert [agent["name"] for agent in found] == (["bob"] if not keyword else [])
        assert (await other.delegate("1", capability="work"))["code"] == "no_agent"
        assert (await other.delegate("1", agent_id=one_id))["code"] == "unknown_agent"
        assert (await other.delegate("1", capability="stand-by"))["code"] == "no_agent"
        assert (await other.request(type="broadcast", message="hello"))["recipients"] == 0
        assert (await other.request(type="broadcast", message="hello", capability="work"))["recipients"] == 0
        assert (await other.delegate("waiting", capability="work", wait=True))["state"] == "pending"
        await one.nothing_else()
        for client, agents, pending in ((one, 1, 0), (other, 1, 1)):
            summary = (await client.request(type="status"))["hub"]
            assert (summary["agents"], summary["connections"], summary["tasks"]["pending"]) == (agents, 1, pending)
        assert (await one.request(type="status", tasks=True))["tasks"] == []
        assert (await one.request(type="status"))["hub"]["refused"] == {}
        assert hub.hub.summary()["agents"] == 2
        assert (await health(hub.url, "other"))["refused"] == {"no_agent": 2, "unknown_agent": 1}


async def test_task_id_of_another_namespace_is_as_free_and_as_unknown_as_any() -> None:
    async with (
        hub_with_tokens(one={"namespace": "one"}, other={"namespace": "other"}) as hub,
        raw_client(hub.url, **bearer("one")) as one,
        raw_client(hub.url, **bearer("other")) as other,
    ):
        await one.register("ann", "work")
        await other.register("bob")
        assert (await one.delegate("mine", capability="work", wait=True, input=SECRET))["state"] == "pending"
        texts = []
        for task_id in ("mine", "nobodys"):
            for message in (
                {"type": "status", "task_id": task_id},
                {"type": "result", "task_id": task_id, "success": False},
                {"type": "status", "task_id": task_id, "progress": 0.5},
                {"type": "delegate", "task_id": "child", "capability": "x", "wait": True, "parent_id": task_id},
            ):
                reply = await other.request(id="1", **message)
                assert reply["code"] in ("unknown_task", "not_assigned")
                texts.append(json.dumps(reply).replace(task_id, "ID"))
        assert texts[:4] == texts[4:]
        assert (await other.delegate("mine", capability="rest", wait=True))["state"] == "pending"
        assert (await one.request(type="status", task_id="mine"))["capability"] == "work"
        assert (await other.request(type="status", task_id="mine"))["capability"] == "rest"
        assert (await one.request(type="result", task_id="mine", success=False))["state"] == "failed"
        assert (await other.request(type="status", task_id="mine"))["state"] == "pending"


async def test_identity_of_another_namespace_cannot_be_taken_up() -> None:
    async with (
        hub_with_tokens(one={"namespace": "one"}, other={"namespace": "other"}) as hub,
        raw_client(hub.url, **bearer("one")) as one,
        raw_client(hub.url, **bearer("other")) as other,
    ):
        joined = await one.register("ann", "work")
        identity = {"agent_id": joined["agent_id"], "resume": joined["resume"]}
        taken = await other.register("ann", "work", **identity)
        assert taken["type"] == "register"
        assert taken["agent_id"] != joined["agent_id"]
        assert taken["resume"] != joined["resume"]
        assert (await one.request(type="heartbeat"))["type"] == "heartbeat_ack"


async def test_reload_closes_who_may_not_stay_and_applies_other_rights_at_once() -> None:
    def access(**tokens: dict[str, Any]) -> Access:
        tables = {**tokens, "kept": {}, TOKEN: {}}
        return Access(
            agenthub.parse_grant(token, {"sha256": hash_of(token), **table}) for token, table in tables.items()
        )

    rights = ["register", "delegate", "observe"]
    former = access(withdrawn={}, moved={}, curbed={}, barred={})
    latter = access(moved={"namespace": "new"}, curbed={"may": rights}, barred={"offers": []}, new={"namespace": "n"})
    async with hub_in_use(access=former) as hub, contextlib.AsyncExitStack() as stack:
        clients = {}
        for token in ("kept", "withdrawn", "moved", "curbed", "barred"):
            clients[token] = await stack.enter_async_context(raw_client(hub.url, **bearer(token)))
            await clients[token].register(token, "work")
        await hub.reload(latter)
        assert await clients["withdrawn"].closed() == 1008
        assert await clients["moved"].closed() == 1001
        assert await clients["barred"].closed() == 1001
        assert (await clients["kept"].request(type="broadcast", message="x"))["recipients"] == 3
        assert (await clients["curbed"].request(type="broadcast", message="x"))["code"] == "unauthorized"
        assert (await clients["curbed"].request(type="status"))["hub"]["agents"] == 4
        assert hub.hub.summary()["closed"] == {"1008": 1, "1001": 2}
        for token, agents in (("moved", 0), ("new", 0), ("kept", 4)):
            async with raw_client(hub.url, **bearer(token)) as client:
                assert (await client.request(type="status"))["hub"]["agents"] == agents
        async with raw_client(hub.url, **bearer("barred")) as client:
            assert (await client.register("barred", "work"))["code"] == "unauthorized"
        async with raw_client(hub.url) as client:
            assert (await client.request(type="status", token="withdrawn"))["code"] == "unauthorized"


async def test_client_that_authenticates_after_a_reload_needs_one_of_the_new_tokens() -> None:
    async with hub_with_tokens(former={}) as hub, raw_client(hub.url) as client:
        await hub.reload(Access([*Access.of_token(TOKEN).grants, Grant("latter", hash_of("latter"))]))
        assert (await client.request(type="status", token="former"))["code"] == "unauthorized"
        assert (await client.request(type="status", token="latter"))["type"] == "status"


async def test_reload_of_a_bad_file_is_told_and_leaves_the_former_tokens_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "access.toml"
    args = argparse.Namespace(access=str(path), token_file=None)
    async with hub_in_use() as hub:
        for text, complaint in BAD_ACCESS_FILES.values():
            private_file(path, text)
            await agenthub.reload_access(hub, None, args)
            assert is_logged(caplog, f"not reloaded: {path}: {complaint}")
            assert (await health(hub.url, TOKEN))["agents"] == 2


@pytest.mark.parametrize(("content", "complaint"), [("", "is an empty token"), (None, "cannot be read")])
async def test_token_file_that_is_being_replaced_changes_neither_tokens_nor_certificate(
    content: str | None,
    complaint: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "token"
    if content is not None:
        private_file(path, content)
    loaded: list[str] = []
    monkeypatch.setattr(agenthub, "load_certificate", lambda *_: loaded.append("certificate"))
    args = argparse.Namespace(access=None, token_file=str(path), tls_cert="", tls_key=None)
    async with hub_in_use() as hub:
        await agenthub.reload_access(hub, ssl.create_default_context(), args)
        assert is_logged(caplog, complaint)
        assert loaded == []
        assert (await health(hub.url, TOKEN))["agents"] == 2


async def test_reload_during_the_start_is_taken_up(tmp_path: Path) -> None:
    hub = HubServer(port=0, access=Access.of_token(WRONG), journal=Journal(str(tmp_path / "hub.db")))
    starting = asyncio.create_task(hub.start())
    await asyncio.sleep(0)
    try:
        await hub.reload(Access.of_token(TOKEN))
        await starting
        async with bystanders(hub.url, TOKEN), raw_client(hub.url) as client:
            assert (await client.request(type="status", token=WRONG))["code"] == "unauthorized"
    finally:
        await asyncio.wait({starting})
        await hub.stop()


async def test_hub_without_tokens_takes_none_up() -> None:
    async with hub_in_use(token=None) as hub:
        with pytest.raises(ValueError, match="was started without tokens"):
            await hub.reload(Access.of_token(TOKEN))


@posix_only
async def test_sighup_has_a_hub_process_read_its_access_file_again(tmp_path: Path) -> None:
    path, log = tmp_path / "access.toml", tmp_path / "log"
    private_file(path, access_text(stays={}, leaves={}, moves={}, **{TOKEN: {}}))
    with (
        log.open("w") as stderr,
        hub_process("--access", str(path), "--db", str(tmp_path / "hub.db"), stderr=stderr) as (url, process),
    ):
        async with (
            bystanders(url, TOKEN),
            raw_client(url, **bearer("stays")) as stays,
            raw_client(url, **bearer("leaves")) as leaves,
            raw_client(url, **bearer("moves")) as moves,
        ):
            for client in (stays, leaves, moves):
                await client.register("ann")
            complaints = (
                ("[tokens.stays", "is not TOML"),
                (access_text(stays={"may": ["all"]}), "tokens.stays.may"),
                ("", "must have tables named tokens.NAME"),
            )
            for number, (text, complaint) in enumerate(complaints, 1):
                path.write_text(text)
                process.send_signal(signal.SIGHUP)
                await until(lambda number=number: log.read_text().count("not reloaded") == number)
                assert complaint in log.read_text().splitlines()[-1]
                for client in (stays, leaves, moves):
                    assert (await client.request(type="broadcast", message="x"))["recipients"] == 4
            path.unlink()
            process.send_signal(signal.SIGHUP)
            await until(lambda: "cannot be read" in log.read_text())
            assert (await stays.request(type="broadcast", message="x"))["recipients"] == 4
            tables = {"stays": {"may": ["register", "delegate", "observe"]}, "moves": {"namespace": "new"}, TOKEN: {}}
            private_file(path, access_text(**tables, comes={"namespace": "newer"}))
            process.send_signal(signal.SIGHUP)
            assert await leaves.closed() == 1008
            assert await moves.closed() == 1001
            assert (await stays.request(type="broadcast", message="x"))["code"] == "unauthorized"
            async with raw_client(url, **bearer("comes")) as comes:
                assert (await comes.request(type="status"))["hub"]["agents"] == 0
            counted = await health(url, TOKEN)
            assert counted["closed"] == {"1001": 1, "1008": 1}
            assert counted["refused"] == {"unauthorized": 1}
    said = log.read_text()
    assert said.count("ERROR agenthub.hub not reloaded: ") == 4
    assert said.count("loaded 4 tokens of 3 namespaces") == 1
    assert TOKEN not in said
    assert (tmp_path / "hub.db.new").exists()
    assert (tmp_path / "hub.db.newer").exists()


@posix_only
async def test_sighup_has_a_hub_process_read_its_token_file_again(tmp_path: Path) -> None:
    path = private_file(tmp_path / "token", WRONG)
    with hub_process("--token-file", path) as (url, process):
        async with raw_client(url, **bearer(WRONG)) as client:
            await client.register("ann")
            private_file(tmp_path / "token", TOKEN)
            process.send_signal(signal.SIGHUP)
            assert await client.closed() == 1008
        async with bystanders(url, TOKEN):
            assert (await health(url, WRONG)) == {"status": "ok", "ready": True}


@posix_only
async def test_token_file_that_is_replaced_during_each_sighup_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    path, successor = tmp_path / "token", tmp_path / "token.new"
    private_file(path, WRONG)
    with hub_process("--token-file", str(path)) as (url, process):
        for number in range(50):
            process.send_signal(signal.SIGHUP)
            if number % 3:
                private_file(path, "too short"[: number % 9])  # Half of one, or an empty file: the former token stays.
            else:
                private_file(successor, f"{WRONG}-{number}")
                successor.replace(path)
            await asyncio.sleep(0.005)
        private_file(successor, TOKEN)
        successor.replace(path)
        process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(WAIT_S):
            while not await accepts(url, TOKEN):
                await asyncio.sleep(0.05)
        assert not await accepts(url, WRONG)
        async with bystanders(url, TOKEN):
            pass


async def accepts(url: str, token: str) -> bool:
    """Ask from another address each time: one that fails too often has to wait."""
    return "agents" in await health(url, token, local_addr=(f"127.0.0.{random.randint(2, 250)}", 0))


@posix_only
async def test_tasks_of_each_namespace_survive_the_death_of_the_hub_in_a_file_of_their_own(tmp_path: Path) -> None:
    access = private_file(tmp_path / "access.toml", access_text(one={"namespace": "one"}, other={"namespace": "other"}))
    args = ("--access", access, "--db", str(tmp_path / "hub.db"))
    joined = {}
    with hub_process(*args) as (url, process):
        for token in ("one", "other"):
            async with raw_client(url, **bearer(token)) as client:
                joined[token] = await client.register(token)
                reply = await client.delegate("task", capability=f"work-of-{token}", wait=True, input=token)
                assert reply["state"] == "pending"
        process.kill()
        process.wait(WAIT_S)
    for name in ("hub.db", "hub.db.one", "hub.db.other"):
        assert (tmp_path / name).stat().st_size > 0
    with hub_process(*args) as (url, process):
        for token in ("one", "other"):
            async with raw_client(url, **bearer(token)) as client:
                identity = {name: joined[token][name] for name in ("agent_id", "resume")}
                assert (await client.register(token, **identity))["agent_id"] == identity["agent_id"]
                report = await client.request(type="status", task_id="task")
                assert (report["state"], report["input"]) == ("pending", token)
                assert [one["capability"] for one in (await client.request(type="status", tasks=True))["tasks"]] == [
                    f"work-of-{token}"
                ]


# 3: attackers on the network path, and fake hubs.


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    return private_file(tmp_path / "cert.pem", CERTIFICATE), private_file(tmp_path / "key.pem", KEY)


@pytest.fixture
def authority(tmp_path: Path) -> str:
    return private_file(tmp_path / "authority.pem", AUTHORITY)


def client_context(authority: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority)


@contextlib.asynccontextmanager
async def secure_hub(certificate: tuple[str, str], authority: str) -> AsyncIterator[tuple[HubServer, str]]:
    """A hub with TLS and bystanders, and its URL with the name in its certificate."""
    async with HubServer(port=0, tls=agenthub.server_tls(*certificate), access=Access.of_token(TOKEN)) as hub:
        assert hub.url == f"wss://127.0.0.1:{hub.port}"
        url = f"wss://localhost:{hub.port}"
        async with bystanders(url, TOKEN, ssl=client_context(authority)):
            yield hub, url


async def failure_to_connect(url: str, **options: Any) -> str:
    """Return the text of the Disconnected that an attempt to connect raises."""
    with pytest.raises(Disconnected) as caught:
        async with asyncio.timeout(WAIT_S):
            await agenthub.connect_websocket(url, agenthub.Session(lambda _: None), token=TOKEN, **options)
    assert caught.value.message.startswith(f"no hub at {url}: ")
    assert "\n" not in caught.value.message
    return caught.value.message


async def test_ws_url_of_a_hub_with_tls_is_explained(certificate: tuple[str, str], authority: str) -> None:
    async with secure_hub(certificate, authority) as (_, url):
        text = await failure_to_connect(url.replace("wss:", "ws:"))
    assert text.endswith("; a hub with --tls-cert speaks wss://, so try that")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "hub.example.org", ""])
def test_hub_that_others_can_reach_does_not_start_without_a_token(
    host: str, servers: list[HubServer], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal_to_start(capsys, "--host", host)
    for remedy in ("AGENTHUB_TOKEN", "--token-file", "--access", "agenthub token", "--insecure"):
        assert remedy in line
    with pytest.raises(ValueError, match="--insecure"):
        HubServer(host=host)
    assert servers == []


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_hub_that_only_its_own_machine_can_reach_needs_no_token(host: str, servers: list[HubServer]) -> None:
    assert agenthub_main("hub", "--host", host) == 0
    assert len(servers) == 1


def test_insecure_hub_starts_with_a_warning(servers: list[HubServer], caplog: pytest.LogCaptureFixture) -> None:
    assert agenthub_main("hub", "--host", "0.0.0.0", "--insecure") == 0
    assert len(servers) == 1
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "--insecure: everybody who can reach 0.0.0.0 may use this hub, without a token",
        "without --tls-cert, tokens and tasks can be read on the network",
    ]


def test_hub_with_a_token_that_others_can_reach_is_warned_of_what_can_be_read_or_guessed(
    monkeypatch: pytest.MonkeyPatch,
    certificate: tuple[str, str],
    servers: list[HubServer],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("AGENTHUB_TOKEN", TOKEN)
    tls = ("--tls-cert", certificate[0], "--tls-key", certificate[1])
    assert agenthub_main("hub", "--host", "0.0.0.0", *tls) == 0
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert agenthub_main("hub", "--host", "0.0.0.0") == 0
    assert is_logged(caplog, "without --tls-cert")
    monkeypatch.setenv("AGENTHUB_TOKEN", "short")
    assert agenthub_main("hub") == 0
    assert is_logged(caplog, "the token is short enough to be guessed")
    assert not is_logged(caplog, "--insecure")
    assert len(servers) == 3


async def test_agent_reaches_a_hub_over_tls_that_an_authority_of_a_file_vouches_for(
    certificate: tuple[str, str], authority: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with secure_hub(certificate, authority) as (hub, url):
        async with Agent("ann", url=url, token=TOKEN, ca_file=authority) as ann:
            assert hub.hub.summary()["agents"] == 3
            assert ann.agent_id is not None
        monkeypatch.setenv("AGENTHUB_CA_FILE", authority)
        async with Agent("ann", url=url, token=TOKEN) as ann:
            assert ann.agent_id is not None
        assert hub.rejected == {}


async def test_hub_that_no_trusted_authority_vouches_for_gets_no_token(
    certificate: tuple[str, str], authority: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = private_file(tmp_path / "other.pem", OTHER_AUTHORITY)
    async with secure_hub(certificate, authority) as (hub, url):
        for options in ({}, {"ca_file": other}):
            assert "certificate verify failed" in await failure_to_connect(url, **options)
        await until(lambda: hub.rejected == {"tls": 2})
        assert is_logged(caplog, "rejected reason=tls address=127.0.0.1")
        assert hub.hub.summary()["connections"] == 2


async def test_hub_by_another_name_than_its_certificates_gets_no_token(
    certificate: tuple[str, str], authority: str
) -> None:
    async with secure_hub(certificate, authority) as (hub, _):
        assert "certificate" in await failure_to_connect(hub.url, ca_file=authority)
        await until(lambda: hub.rejected == {"tls": 1})


async def test_tls_below_1_2_is_refused(
    certificate: tuple[str, str], authority: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert agenthub.server_tls(*certificate).minimum_version == ssl.TLSVersion.TLSv1_2
    context = client_context(authority)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with secure_hub(certificate, authority) as (hub, url):
        with pytest.raises((ssl.SSLError, ConnectionError)) as caught:
            async with plain_connection(url, ssl=context):
                pass
        if "NO_PROTOCOLS_AVAILABLE" in str(caught.value):
            pytest.skip("this OpenSSL cannot even ask for TLS 1.1")
        await until(lambda: hub.rejected == {"tls": 1})
        assert is_logged(caplog, "rejected reason=tls")
        assert is_logged(caplog, "UNSUPPORTED_PROTOCOL")


async def test_who_speaks_no_tls_to_a_hub_that_does_gets_no_answer(
    certificate: tuple[str, str], authority: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with secure_hub(certificate, authority) as (hub, url):
        assert await failure_to_connect(url.replace("wss:", "ws:"))
        async with plain_connection(url) as one:
            await one.send(os.urandom(10_000))
            await one.rest()
        await until(lambda: hub.rejected == {"tls": 2})
        assert is_logged(caplog, "rejected reason=tls")
        page = await health(url, TOKEN, ssl=client_context(authority))
        assert page["turned_away"] == {"tls": 2}


async def test_who_speaks_tls_to_a_hub_that_does_not_fails_cleanly(authority: str) -> None:
    async with hub_in_use() as hub:
        assert await failure_to_connect(f"wss://localhost:{hub.port}", ca_file=authority)


async def test_handshake_of_tls_that_does_not_end_is_cut_and_counted(
    certificate: tuple[str, str], authority: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with secure_hub(certificate, authority) as (hub, url):
        monkeypatch.setattr(agenthub, "HANDSHAKE_S", 0.1)
        async with plain_connection(url) as silent, plain_connection(url) as one:
            await one.send(b"\x16\x03\x01\x02\x00\x01")  # The beginning of a ClientHello.
            assert await silent.rest() == await one.rest() == b""
        await until(lambda: hub.rejected == {"tls": 2})
        assert is_logged(caplog, "rejected reason=tls")
        assert len(hub.sockets) == 2


async def test_who_hangs_up_during_the_handshake_of_tls_is_forgotten(
    certificate: tuple[str, str], authority: str
) -> None:
    async with secure_hub(certificate, authority) as (hub, url):
        for _ in range(3):
            async with plain_connection(url) as one:
                await one.send(b"\x16\x03")
        await until(lambda: hub.rejected == {"tls": 3})
        assert len(hub.sockets) == 2
        assert hub.addresses == {"127.0.0.1": 2}


def test_certificate_that_cannot_be_used_is_one_clear_line(
    certificate: tuple[str, str], tmp_path: Path, servers: list[HubServer], capsys: pytest.CaptureFixture[str]
) -> None:
    other_key = private_file(tmp_path / "other.pem", OTHER_KEY)
    locked_key = private_file(tmp_path / "locked.pem", LOCKED_KEY)
    no_pem = private_file(tmp_path / "no.pem", "no PEM")
    for cert, key, complaint in (
        (certificate[0], other_key, "KEY_VALUES_MISMATCH"),
        (certificate[0], locked_key, "the key is encrypted; give one without a password"),
        (certificate[0], no_pem, "cannot be used"),
        (no_pem, certificate[1], "cannot be used"),
        (str(tmp_path / "none.pem"), certificate[1], "No such file"),
        (certificate[0], str(tmp_path / "none.pem"), "No such file"),
    ):
        assert complaint in refusal_to_start(capsys, "--tls-cert", cert, "--tls-key", key)
    assert "cannot be used" in refusal_to_start(capsys, "--tls-cert", certificate[0])  # The file contains no key.
    assert "--tls-key needs --tls-cert" in refusal_to_start(capsys, "--tls-key", certificate[1])
    assert servers == []


def test_file_of_authorities_that_cannot_be_used_is_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (private_file(tmp_path / "no.pem", "no PEM"), str(tmp_path / "none.pem")):
        assert agenthub_main("status", "--url", "wss://localhost:1", "--ca-file", path) == 2
        output, complaint = capsys.readouterr()
        assert output == ""
        assert "not a PEM file of CA certificates" in complaint.splitlines()[-1]


@posix_only
@pytest.mark.parametrize(
    ("cert", "key"),
    [
        (CERTIFICATE, OTHER_KEY),
        (OTHER_AUTHORITY, KEY),
        (CERTIFICATE, "no PEM"),
        ("no PEM", KEY),
        (CERTIFICATE, LOCKED_KEY),
    ],
    ids=["another key", "another certificate", "no key", "no certificate", "a key with a password"],
)
async def test_certificate_that_cannot_be_used_leaves_the_former_in_use(
    cert: str, key: str, certificate: tuple[str, str], authority: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = agenthub.server_tls(*certificate)
    for path, text in zip(certificate, (cert, key), strict=True):
        private_file(Path(path), text)
    with pytest.raises(ValueError, match="key"):
        agenthub.load_certificate(context, *certificate)
    async with (
        HubServer(port=0, tls=context) as hub,
        raw_client(f"wss://localhost:{hub.port}", ssl=client_context(authority)) as client,
    ):
        assert (await client.request(type="status"))["type"] == "status"


@posix_only
async def test_sighup_has_a_hub_process_read_its_certificate_again(
    certificate: tuple[str, str], authority: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    options = ("-m", "agenthub", "hub", "--port", "0", "--tls-cert", certificate[0], "--tls-key", certificate[1])
    with log.open("w") as stderr, running(*options, stderr=stderr) as process:
        assert process.stdout is not None
        url = f"wss://localhost:{process.stdout.readline().rpartition(':')[2].strip()}"
        tls = {"ssl": client_context(authority)}
        async with bystanders(url, **tls):
            private_file(Path(certificate[1]), "no PEM")
            process.send_signal(signal.SIGHUP)
            await until(lambda: "not reloaded: the certificate" in log.read_text())
            async with raw_client(url, **tls) as client:
                assert (await client.request(type="status"))["hub"]["agents"] == 2
            private_file(Path(certificate[0]), OTHER_AUTHORITY)
            private_file(Path(certificate[1]), OTHER_KEY)
            process.send_signal(signal.SIGHUP)
            await until(lambda: is_vouched_for(url, OTHER_AUTHORITY))


def is_vouched_for(url: str, certificate: str) -> bool:
    address = urlsplit(url)
    found = ssl.get_server_certificate((address.hostname or "", address.port or 0))
    return ssl.PEM_cert_to_DER_cert(found) == ssl.PEM_cert_to_DER_cert(certificate)


# 4: web pages in the browser of a user who can reach the hub.

HERE = ("localhost", "127.0.0.1", "[::1]")


def named(hub: HubServer, host: str) -> str:
    return f"Host: {host.replace('PORT', str(hub.port))}"


def origin(hub: HubServer, text: str) -> str:
    return f"Origin: {text.replace('PORT', str(hub.port))}"


ORIGINS_OF_OTHERS = [
    ["https://evil.example"],
    ["null"],
    [""],
    ["http://localhost"],
    ["http://localhost:1"],
    ["https://localhost:PORT"],
    ["ws://localhost:PORT"],
    ["http://localhost:PORT/"],
    ["http://LOCALHOST:PORT"],
    ["http://localhost:PORT.evil.example"],
    ["http://evil.example:PORT"],
    ["http://evil@localhost:PORT"],
    ["file://"],
    ["http://localhost:PORT", "https://evil.example"],
    ["http://localhost:PORT", "http://localhost:PORT"],
    ["http://localhost:PORT, https://evil.example"],
    ["https://APP.example.org"],
    ["https://app.example.org:443"],
    ["http://app.example.org"],
    ["https://example.org"],
    ["https://app.example.org.evil.example"],
]


async def test_page_of_another_origin_may_not_connect(caplog: pytest.LogCaptureFixture) -> None:
    async with hub_in_use(token=None, allow_origins=["https://app.example.org"]) as hub:
        for number, origins in enumerate(ORIGINS_OF_OTHERS, 1):
            headers = [named(hub, "localhost:PORT"), *(origin(hub, text) for text in origins)]
            assert await status_code(hub.url, *headers, *UPGRADE) == 403, origins
            assert await status_code(hub.url, *headers, path="/healthz") == 403, origins
            assert hub.rejected == {"origin": 2 * number}
        assert is_logged(caplog, "rejected reason=origin address=127.0.0.1")
        assert not is_logged(caplog, "evil")
        assert (await health(hub.url))["turned_away"] == {"origin": 2 * len(ORIGINS_OF_OTHERS)}
        assert hub.hub.summary()["connections"] == 2


async def test_page_of_the_hubs_own_origin_or_of_one_that_is_allowed_may_connect() -> None:
    async with hub_in_use(token=None, allow_origins=["https://app.example.org"]) as hub:
        for text in (*(f"http://{name}:PORT" for name in HERE), "https://app.example.org"):
            headers = (named(hub, "localhost:PORT"), origin(hub, text))
            assert await status_code(hub.url, *headers, *UPGRADE) == 101
            assert await status_code(hub.url, *headers, path="/healthz") == 200
        assert await status_code(hub.url, named(hub, "localhost:PORT"), *UPGRADE) == 101  # Without an Origin.
        assert hub.rejected == {}


async def test_page_of_a_secure_hub_has_a_secure_origin(certificate: tuple[str, str], authority: str) -> None:
    async with secure_hub(certificate, authority) as (hub, url):
        tls = {"ssl": client_context(authority)}
        for text, code in (("https://localhost:PORT", 101), ("http://localhost:PORT", 403)):
            headers = (named(hub, "localhost:PORT"), origin(hub, text))
            assert await status_code(url, *headers, *UPGRADE, **tls) == code


def test_origin_has_no_port_where_it_is_the_usual_one() -> None:
    own_origins = agenthub.own_origins
    assert own_origins(["a"], 80, is_secure=False) == {"http://a"}
    assert own_origins(["a"], 443, is_secure=True) == {"https://a"}
    assert own_origins(["a"], 443, is_secure=False) == {"http://a:443"}


@pytest.mark.parametrize(
    "text",
    ["*", "null", "example.org", "https://", "https://a/", "https://a/b", "https://u@a", "ws://a", "https://a b"],
)
def test_origin_that_no_browser_writes_is_wrong_usage(
    text: str, servers: list[HubServer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "an origin looks like https://example.org" in refusal_to_start(capsys, "--allow-origin", text)
    assert servers == []


HOSTS_OF_OTHERS = [
    ["evil.example"],
    ["evil.example:PORT"],
    ["localhost.evil.example"],
    ["localhost."],
    ["127.0.0.1.evil.example:PORT"],
    ["127.0.0.2"],
    ["127.1"],
    ["0.0.0.0"],
    ["::1"],
    ["[::1"],
    ["[::ffff:127.0.0.1]"],
    ["localhost:port"],
    ["localhost:PORT:1"],
    ["evil.example:80@localhost"],
    ["localhost/"],
    [""],
    [],
    ["localhost", "localhost"],
    ["localhost", "evil.example"],
    ["localhost, evil.example"],
]


async def test_hub_on_loopback_does_not_answer_to_the_names_of_others(caplog: pytest.LogCaptureFixture) -> None:
    async with hub_in_use(token=None) as hub:
        rejected = 0
        for hosts in HOSTS_OF_OTHERS:
            headers = [named(hub, host) for host in hosts]
            assert await status_code(hub.url, *headers, *UPGRADE) == 403, hosts
            assert await status_code(hub.url, *headers, path="/") == 403, hosts
            # A load balancer that speaks HTTP/1.0 names no host, and a browser always does.
            assert await status_code(hub.url, *headers, path="/healthz") == (403 if hosts else 200), hosts
            rejected += 3 if hosts else 2
            assert hub.rejected == {"host": rejected}
        assert is_logged(caplog, "rejected reason=host address=127.0.0.1")
        assert not is_logged(caplog, "evil")
        assert (await health(hub.url))["turned_away"] == {"host": rejected}


async def test_hub_on_loopback_answers_to_its_names_with_any_port() -> None:
    async with hub_in_use(token=None, allow_hosts=["Hub.example.org"]) as hub:
        for name in (*HERE, "LocalHost", "hub.example.org", "HUB.example.org"):
            for port in ("", ":PORT", ":1"):
                assert await status_code(hub.url, named(hub, name + port), *UPGRADE) == 101
                assert await status_code(hub.url, named(hub, name + port), path="/healthz") == 200
        assert await status_code(hub.url, named(hub, "x.hub.example.org"), *UPGRADE) == 403


async def test_hub_that_others_can_reach_answers_to_the_names_that_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agenthub, "is_loopback", lambda host: False)
    async with hub_in_use(allow_hosts=["hub.example.org"]) as hub:
        for name, code in (
            ("hub.example.org", 101),
            ("127.0.0.1:PORT", 101),
            ("localhost", 403),
            ("evil.example", 403),
        ):
            assert await status_code(hub.url, named(hub, name), *UPGRADE) == code
            assert await status_code(hub.url, named(hub, name), path="/healthz") == (200 if code == 101 else code)
        for headers in ([], [named(hub, "hub.example.org")] * 2):
            assert await status_code(hub.url, *headers, *UPGRADE) == 403
        own = f"http://hub.example.org:{hub.port}"
        for text, code in ((own, 101), (f"http://localhost:{hub.port}", 403)):
            assert await status_code(hub.url, named(hub, "hub.example.org"), f"Origin: {text}", *UPGRADE) == code
        assert hub.rejected == {"host": 6, "origin": 1}


async def test_hub_that_others_can_reach_answers_to_any_name_when_it_was_given_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agenthub, "is_loopback", lambda host: False)
    async with hub_in_use() as hub:
        assert await status_code(hub.url, "Host: whatever.example", *UPGRADE) == 101
        headers = ("Host: whatever.example", "Origin: http://other.example")
        assert await status_code(hub.url, *headers, *UPGRADE) == 403
        assert hub.rejected == {"origin": 1}


PROXIES = agenthub.proxy_networks(["127.0.0.1", " 10.0.0.0/8", "2001:db8:1::/48"])


@pytest.mark.parametrize(
    ("headers", "client"),
    [
        ([], None),
        (["X-Forwarded-For: 203.0.113.7"], "203.0.113.7"),
        (["x-forwarded-for: 203.0.113.7:4711"], "203.0.113.7"),
        (["X-Forwarded-For: 1.1.1.1, nonsense, 203.0.113.7, 10.1.2.3,127.0.0.1"], "203.0.113.7"),
        (["X-Forwarded-For: 1.1.1.1", "X-Forwarded-For: 203.0.113.7"], "203.0.113.7"),
        (["X-Forwarded-For: 2001:db8:2::7"], "2001:db8:2::7"),
        (["X-Forwarded-For: [2001:db8:2::7]:80, 2001:db8:1::1"], "2001:db8:2::7"),
        (["X-Forwarded-For: ::ffff:203.0.113.7"], "203.0.113.7"),
        (["X-Forwarded-For: 203.0.113.7, unknown"], None),
        (["X-Forwarded-For: 203.0.113.7, "], None),
        (["X-Forwarded-For: 203.0.113.07.1"], None),
        (["X-Forwarded-For: 10.0.0.1, 127.0.0.1"], None),
        (["Forwarded: for=203.0.113.7"], "203.0.113.7"),
        (['Forwarded: For="[2001:db8:2::7]:4711";proto=https;by=10.0.0.1'], "2001:db8:2::7"),
        (["Forwarded: for=1.1.1.1, proto=http; for=203.0.113.7 , for=10.0.0.1"], "203.0.113.7"),
        (["Forwarded: for=203.0.113.7, for=_hidden"], None),
        (["Forwarded: for=203.0.113.7, by=10.0.0.1"], None),
        (['Forwarded: for="1.1.1.1, for=203.0.113.7'], "203.0.113.7"),
        (["Forwarded: for=203.0.113.7", "X-Forwarded-For: 203.0.113.7"], "203.0.113.7"),
        (["Forwarded: for=203.0.113.7", "X-Forwarded-For: 203.0.113.8"], None),
        (["Forwarded: for=203.0.113.7", "X-Forwarded-For: unknown"], None),
    ],
    ids=str,
)
async def test_client_of_a_proxy_has_its_own_address(headers: list[str], client: str | None) -> None:
    async with hub_in_use(token=None, trusted_proxies=map(str, PROXIES)) as hub, plain_connection(hub.url) as one:
        await one.send(request_of(named(hub, "localhost"), *UPGRADE, *headers))
        own = agenthub.network_of(client) if client is not None else "127.0.0.1"
        await until(lambda: hub.addresses.get(own, 0) == (3 if client is None else 1))
        assert sum(hub.addresses.values()) == 3


async def test_only_a_trusted_proxy_names_the_address_of_a_client() -> None:
    for proxies in ([], ["127.0.0.2", "10.0.0.0/8"]):
        async with hub_in_use(token=None, trusted_proxies=proxies) as hub:
            headers = {"X-Forwarded-For": "203.0.113.7", "Forwarded": "for=203.0.113.7"}
            async with raw_client(hub.url, additional_headers=headers):
                assert hub.addresses == {"127.0.0.1": 3}


async def test_wrong_tokens_behind_a_proxy_delay_only_their_own_address(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    never_forget_failures(monkeypatch, free=1, delay_s=3600.0)
    async with hub_in_use(trusted_proxies=["127.0.0.1"]) as hub:
        wrong = {"X-Forwarded-For": "203.0.113.7", "Authorization": "Bearer wrong"}
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(raw_client(hub.url, additional_headers=wrong))
            await until(lambda: hub.rejected.get("unauthorized"))
            right = {"X-Forwarded-For": "203.0.113.8", **bearer(TOKEN)["additional_headers"]}
            async with raw_client(hub.url, additional_headers=right) as client:
                assert (await client.register("right"))["type"] == "register"
        assert is_logged(caplog, "rejected reason=unauthorized address=203.0.113.7")


async def test_connections_behind_a_proxy_are_limited_by_their_own_address() -> None:
    async with (
        hub_in_use(token=None, trusted_proxies=["127.0.0.0/8"], connections_per_address_max=2) as hub,
        raw_client(hub.url, additional_headers={"X-Forwarded-For": "203.0.113.7"}),
        raw_client(hub.url, additional_headers={"X-Forwarded-For": "203.0.113.7"}),
    ):
        host = named(hub, "localhost")
        assert await status_code(hub.url, host, *UPGRADE, "X-Forwarded-For: 203.0.113.7") == 503
        assert await status_code(hub.url, host, *UPGRADE, "X-Forwarded-For: 203.0.113.8") == 101
        await until(lambda: hub.addresses == {"127.0.0.1": 2, "203.0.113.7": 2})


@pytest.mark.parametrize("proxy", ["", "proxy.example.org", "10.0.0.1/8", "10.0.0.0/33", "1.2.3"])
def test_proxy_that_is_no_address_is_refused(proxy: str) -> None:
    with pytest.raises(ValueError, match=r"^a trusted proxy is an address or a network, such as 10\.0\.0\.0/8: "):
        HubServer(trusted_proxies=["127.0.0.1", proxy])


# 5: clients that exhaust resources: slow, silent or numerous connections.


async def test_connection_that_becomes_no_websocket_in_time_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hub_in_use() as hub:
        monkeypatch.setattr(agenthub, "HANDSHAKE_S", 0.1)
        async with plain_connection(hub.url) as silent, plain_connection(hub.url) as slow:
            dripping = asyncio.create_task(drip(slow.writer))
            assert await silent.rest() == await slow.rest() == b""
            await dripping
        await until(lambda: len(hub.sockets) == 2)


async def drip(writer: asyncio.StreamWriter) -> None:
    """Send an endless request, one byte at a time."""
    with contextlib.suppress(OSError):
        for byte in request_of("Host: localhost", *UPGRADE, "X: " + "x" * 5000)[:-2]:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.01)
            if writer.transport.is_closing():
                return


async def test_handshake_that_is_too_slow_is_counted_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with hub_in_use() as hub:
        monkeypatch.setattr(agenthub, "HANDSHAKE_S", 0.1)
        async with plain_connection(hub.url) as silent:
            assert await silent.rest() == b""
        await until(lambda: len(hub.sockets) == 2)
        assert sum(hub.rejected.values()) == 1
        assert is_logged(caplog, "rejected reason=")


async def test_request_that_is_no_handshake_is_answered_and_closed() -> None:
    async with hub_in_use() as hub:
        for raw in (
            b"nonsense\r\n\r\n",
            b"\0" * 100_000,
            b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1000,
            b"POST / HTTP/1.1\r\n\r\n",
        ):
            async with plain_connection(hub.url) as one:
                await one.send(raw)
                answer = await one.rest()
                assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer
        await until(lambda: len(hub.sockets) == 2)


def test_who_neither_registers_nor_asks_in_time_is_closed_with_4001() -> None:
    with world_in_use(join_s=5.0) as world:
        silent, observer, finder, refused = (world.connect() for _ in range(4))
        observer.ask(Status())
        finder.ask(Discover())
        assert refused.ask(Broadcast(message=SECRET)).code == "not_registered"
        world.pass_time(4.9)
        assert silent.close_code is refused.close_code is None
        world.pass_time(0.2)
        assert silent.close_code == refused.close_code == 4001
        assert observer.close_code is finder.close_code is None
        assert world.hub.summary()["closed"] == {"4001": 2}


async def test_connection_that_says_nothing_is_closed_with_4001() -> None:
    async with hub_in_use(token=None) as hub:
        hub.hub.settings = dataclasses.replace(hub.hub.settings, join_s=0.1)
        async with raw_client(hub.url) as silent:
            assert await silent.closed() == 4001
        assert (await health(hub.url))["closed"] == {"4001": 1}


async def test_connections_over_a_bound_are_answered_with_503_and_beyond_that_cut(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for options, text in (
        ({"settings": HubSettings(connections_max=3)}, b"the hub has its 3 connections"),
        ({"connections_per_address_max": 3}, b"that address has its 3 connections"),
    ):
        monkeypatch.setattr(agenthub, "CONNECTIONS_OVER", 2)
        async with hub_in_use(**options) as hub, contextlib.AsyncExitStack() as stack:
            headers = ("Host: localhost", *UPGRADE)

            async def open_plain(stack: contextlib.AsyncExitStack = stack, url: str = hub.url) -> RawSocket:
                return await stack.enter_async_context(plain_connection(url))

            silent = await open_plain()  # The third connection, which stays silent.
            waiting = [await open_plain() for _ in range(2)]
            await until(lambda hub=hub: len(hub.sockets) == 5)
            for _ in range(3):
                assert await (await open_plain()).rest() == b""
            assert hub.rejected == {"connections": 3}
            for one in waiting:
                await one.send(request_of(*headers))
                answer = await one.rest()
                assert answer.startswith(b"HTTP/1.1 503 ")
                assert text in answer
            assert hub.rejected == {"connections": 5}
            await until(lambda hub=hub: len(hub.sockets) == 3)
            assert (await health(hub.url, TOKEN))["turned_away"] == {"connections": 5}
            assert not silent.reader.at_eof()
        assert is_logged(caplog, "rejected reason=connections address=127.0.0.1")


async def test_connections_that_come_in_one_turn_of_the_loop_are_bounded_like_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agenthub, "CONNECTIONS_OVER", 2)
    for options in ({"settings": HubSettings(connections_max=3)}, {"connections_per_address_max": 3}):
        async with hub_in_use(**options) as hub:
            flood = [socket.create_connection(("127.0.0.1", hub.port), WAIT_S) for _ in range(50)]
            try:
                await until(lambda hub=hub: len(hub.sockets) + hub.rejected.get("connections", 0) >= 52)
                assert len(hub.sockets) == 5
            finally:
                for one in flood:
                    one.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second address of this machine's own")
async def test_connections_of_one_address_are_no_bound_for_another() -> None:
    async with hub_in_use(connections_per_address_max=2) as hub:
        assert await status_code(hub.url, "Host: localhost", *UPGRADE) == 503
        async with raw_client(hub.url, local_addr=("127.0.0.2", 0), **bearer(TOKEN)) as other:
            assert (await other.register("ann"))["type"] == "register"
        await until(lambda: hub.addresses == {"127.0.0.1": 2})


@posix_only
async def test_hub_process_whose_descriptors_are_used_up_still_writes_its_journal_and_serves_who_is_in(
    tmp_path: Path,
) -> None:
    import resource

    args = ("--db", str(tmp_path / "hub.db"))
    log = tmp_path / "log"
    limit = 128
    with (
        log.open("w") as stderr,
        hub_process(
            *args,
            stderr=stderr,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
        ) as (url, process),
    ):
        async with bystanders(url), raw_client(url) as requester:
            await requester.register("requester")
            async with contextlib.AsyncExitStack() as stack:
                process.send_signal(signal.SIGSTOP)  # So that it finds all connections at once when it continues.
                flood = [await stack.enter_async_context(plain_connection(url)) for _ in range(limit + 20)]
                process.send_signal(signal.SIGCONT)
                await until(lambda: sum(one.reader.at_eof() for one in flood) >= 50)
                for number in range(20):
                    reply = await requester.delegate(f"task-{number}", capability="later", wait=True, input=SECRET)
                    assert reply["state"] == "pending"
            async with asyncio.timeout(WAIT_S):
                while (page := await healthy(url)) is None:
                    await asyncio.sleep(0.02)
            assert page["turned_away"]["connections"] >= 50
            assert page["journal"] == "ok"
        process.kill()
        process.wait(WAIT_S)
    with hub_process(*args) as (url, _):
        async with raw_client(url) as client:
            assert (await client.request(type="status"))["hub"]["tasks"]["pending"] == 20
    assert re.search(
        r"file descriptors suffice for \d\d connections only: raise the limit with ulimit -n", log.read_text()
    )
    assert SECRET not in log.read_text()


@posix_only
async def test_descriptors_of_many_journals_are_kept_too(tmp_path: Path) -> None:
    import resource

    tables = {f"t{number}": {"namespace": f"n{number}"} for number in range(40)}
    access = private_file(tmp_path / "access.toml", access_text(**tables, **{TOKEN: {}}))
    limit = 256
    log = tmp_path / "log"
    with (
        log.open("w") as stderr,
        hub_process(
            *("--access", access, "--db", str(tmp_path / "hub.db")),
            stderr=stderr,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
        ) as (url, _),
    ):
        async with bystanders(url, TOKEN), contextlib.AsyncExitStack() as stack:
            flood = [await stack.enter_async_context(plain_connection(url)) for _ in range(limit)]
            await until(
                lambda: sum(one.reader.at_eof() for one in flood) >= 64 or "cannot be accepted" in log.read_text()
            )
    assert "cannot be accepted" not in log.read_text()


async def healthy(url: str) -> dict[str, Any] | None:
    """Return the JSON object of /healthz, or None if the hub accepts no more connections."""
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return await health(url)
    return None


# 6: clients that claim another identity, or use names that look like another.

LOOK_ALIKES = [
    "t\u0430sk",  # A Cyrillic a.
    "t\u0251sk",
    "\uff54ask",  # Of full width.
    "ta\u0301sk",
    "task\u200b",
    "\u2060task",
    "ta\u00adsk",
    "\u202etask",
    "task\ufe0f",
    "task\U000e0061",
    "task\x00",
    "ta\x00sk",
    "task\n",
    "\ttask",
    "task ",
    "ta sk",
    "task\x7f",
    "task\x85",
    "\ud800task",
    "ta/sk",
    "ta\\sk",
    "",
    "x" * 129,
]
ID_FIELDS: list[dict[str, Any]] = [
    {"type": "delegate", "task_id": None, "capability": "work"},
    {"type": "delegate", "task_id": "task", "agent_id": None},
    {"type": "delegate", "task_id": "task", "capability": "work", "parent_id": None},
    {"type": "result", "task_id": None, "success": True},
    {"type": "status", "task_id": None},
    {"type": "register", "name": "ann", "agent_id": None, "resume": "x"},
]
INVISIBLE = [
    "\x00",
    "\x07",
    "\n",
    "\x1b",
    "\x7f",
    "\x9b",
    "\u00ad",
    "\u034f",
    "\u061c",
    "\u115f",
    "\u180e",
    "\u200b",
    "\u200d",
    "\u200e",
    "\u200f",
    "\u2028",
    "\u202a",
    "\u202e",
    "\u2060",
    "\u2066",
    "\u2069",
    "\u3164",
    "\ufe0f",
    "\ufeff",
    "\uffa0",
    "\ufff9",
    "\U0001d173",
    "\U000e0020",
]


def reads(raw: bytes) -> bool:
    try:
        decoder_from_agent()(raw)
    except InvalidMessage as error:
        return error.code != "invalid_message"
    return True


def is_read(message: dict[str, Any]) -> bool:
    """Return whether a message is accepted, with escaped and with literal characters."""
    raws = [json.dumps(message).encode(), json.dumps(message, ensure_ascii=False).encode(errors="surrogatepass")]
    outcomes = {reads(raw) for raw in raws}
    (outcome,) = outcomes
    return outcome


async def test_sender_is_who_the_connection_belongs_to_whatever_a_field_says(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        hub_in_use(token=None) as hub,
        raw_client(hub.url) as victim,
        raw_client(hub.url) as forger,
        raw_client(hub.url) as worker,
    ):
        victim_id = (await victim.register("victim"))["agent_id"]
        forger_id = (await forger.register("forger"))["agent_id"]
        worker_id = (await worker.register("worker", "work"))["agent_id"]
        # In `delegate`, agent_id names the worker.
        forged = dict.fromkeys(("sender", "requester", "assignee", "from", "resume", "token"), victim_id)
        fully_forged = {**forged, "agent_id": victim_id}
        await forger.request(type="broadcast", message=SECRET, **fully_forged)
        assert (await victim.message("broadcast"))["sender"] == forger_id
        assert (await forger.delegate("task", capability="work", **forged))["state"] == "in_progress"
        assert (await worker.message("delegate"))["sender"] == forger_id
        assert (await victim.request(type="status", task_id="task"))["requester"] == forger_id
        for client, success in ((forger, True), (victim, True), (victim, False)):
            result = {"type": "result", "task_id": "task", "success": success, **fully_forged, "agent_id": worker_id}
            assert (await client.request(**result))["code"] == "not_assigned"
        await worker.request(type="status", task_id="task", progress=0.5, **fully_forged)
        assert (await forger.message("status"))["sender"] == worker_id
        await worker.request(type="result", task_id="task", success=True, **fully_forged)
        assert (await forger.message("result"))["sender"] == worker_id
        await victim.nothing_else()
        assert (await health(hub.url))["refused"] == {"not_assigned": 3}
        assert is_logged(caplog, f"refused code=not_assigned agent={victim_id}")


@pytest.mark.parametrize("text", LOOK_ALIKES, ids=lambda text: ascii(text)[:20])
def test_id_is_of_plain_ascii(text: str) -> None:
    for fields in ID_FIELDS:
        assert is_read({name: "task" if value is None else value for name, value in fields.items()})
        assert not is_read({name: text if value is None else value for name, value in fields.items()}), fields


@pytest.mark.parametrize("character", INVISIBLE, ids=ascii)
def test_name_holds_no_character_that_is_not_seen(character: str) -> None:
    for where in ("{}name", "na{}me", "name{}"):
        text = where.format(character)
        assert is_read({"type": "register", "name": "name", "capabilities": ["name", {"name": "more"}]})
        assert not is_read({"type": "register", "name": text})
        assert not is_read({"type": "register", "name": "name", "capabilities": [text]})
        assert not is_read({"type": "register", "name": "name", "capabilities": [{"name": text}]})
        assert not is_read({"type": "delegate", "task_id": "task", "capability": text})
        assert not is_read({"type": "broadcast", "message": 1, "capability": text})


@pytest.mark.parametrize("text", ["Åsa", "名前", "имя", "naïve name", "🙂", "a/b:c"])
def test_name_may_be_of_any_language(text: str) -> None:
    assert is_read({"type": "register", "name": text, "capabilities": [text, {"name": text + "2"}]})


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "\ud800", "a\udfffb", "\udfff\ud800"], ids=ascii)
@pytest.mark.parametrize(
    "message",
    [
        {"type": "status", "id": None},
        {"type": "register", "name": "ann", "description": None},
        {"type": "register", "name": "ann", "capabilities": [{"name": "work", "description": None}]},
        {"type": "register", "name": "ann", "agent_id": "ann", "resume": None},
        {"type": "discover", "capability": None},
        {"type": "result", "task_id": "task", "success": False, "error": None},
        {"type": "result", "task_id": "task", "success": False, "error": {"code": "failed", "message": None}},
    ],
    ids=lambda message: next(str(one) for one in message if one != "type"),
)
def test_text_outside_payloads_holds_neither_nul_nor_half_a_surrogate_pair(message: dict[str, Any], text: str) -> None:
    template = json.dumps(message)
    assert is_read(json.loads(template.replace("null", '"text"')))
    assert not is_read(json.loads(template.replace("null", json.dumps(text))))


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udfff\ud800"], ids=ascii)
def test_payload_holds_no_half_of_a_surrogate_pair(text: str) -> None:
    for payload in (text, [text], {"key": text}, {text: 1}, {"deep": [{"er": text}]}):
        assert not is_read({"type": "delegate", "task_id": "task", "capability": "work", "input": payload})
        assert not is_read({"type": "result", "task_id": "task", "success": True, "output": payload})
        assert not is_read({"type": "status", "task_id": "task", "detail": payload})
        assert not is_read({"type": "broadcast", "message": payload})


async def test_payload_with_nul_arrives_as_it_is() -> None:
    payload = {"a\x00b": ["\x00", "\\u0000", "\U0001f642"]}
    async with hub_in_use(token=None) as hub, raw_client(hub.url) as one, raw_client(hub.url) as other:
        await one.register("one")
        await other.register("other", "work")
        await one.request(type="broadcast", message=payload)
        assert (await other.message("broadcast"))["message"] == payload
        await one.delegate("task", capability="work", input=payload)
        assert (await other.message("delegate"))["input"] == payload
        await other.request(type="status", task_id="task", detail=payload)
        assert (await one.message("status"))["detail"] == payload
        await other.request(type="result", task_id="task", success=True, output=payload)
        assert (await one.message("result"))["output"] == payload
        assert hub.hub.summary()["refused"] == {}


async def test_message_with_a_look_alike_is_refused_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with hub_in_use(token=None) as hub, raw_client(hub.url) as client:
        await client.register("ann")
        for text in LOOK_ALIKES:
            assert (await client.delegate(text, capability="stand-by", input=SECRET))["code"] == "invalid_message"
        for raw in (b"\xff", b'{"type": "status", "task_id": "\xed\xa0\x80"}'):
            async with raw_client(hub.url) as other:
                other.connection.transport.write(frame(raw))
                assert await other.closed() == 1007
        assert hub.hub.summary()["refused"] == {"invalid_message": len(LOOK_ALIKES) + 2}
        assert is_logged(caplog, "refused code=invalid_message agent=ann-")
        assert (await health(hub.url))["refused"] == {"invalid_message": len(LOOK_ALIKES) + 2}


def test_agent_refuses_such_a_name_before_it_is_sent() -> None:
    async def work() -> None: ...

    for name in ("x" * 129, *(f"na{character}me" for character in INVISIBLE), "\ud800"):
        with pytest.raises(ValueError, match=r"name (must have|may )"):
            Agent(name)
        with pytest.raises(ValueError, match=r"(must have|may )"):
            Agent("ann").capability(name)(work)


async def test_agent_refuses_such_a_task_id_before_it_is_sent() -> None:
    async with agenthub.LocalHub() as hub, Agent("ann", hub=hub) as ann:
        for task_id in LOOK_ALIKES:
            with pytest.raises(ValueError, match="task_id"):
                await ann.submit("work", task_id=task_id)
        assert hub.hub.summary()["refused"] == {}


# 7: clients that try to resume another agent's session.


def test_identity_is_taken_up_only_with_its_secret() -> None:
    with world_in_use() as world:
        victim = world.join("victim", "work")
        for resume in (None, "guess", victim.registration.resume[:-1], victim.registration.resume.upper() + "0"):
            intruder = world.connect()
            message = Register(name="victim", capabilities=["work"], agent_id=victim.agent_id, resume=resume)
            assert intruder.refused(message) == "unauthorized"
            assert intruder.close_code is None
        assert victim.close_code is None
        assert world.hub.summary()["refused"] == {"unauthorized": 4}
        successor = victim.come_back("work")
        assert successor.agent_id == victim.agent_id
        assert victim.close_code == 4000
        assert world.hub.summary()["closed"] == {"4000": 1}


def test_third_wrong_secret_is_the_last_even_with_other_messages_between(caplog: pytest.LogCaptureFixture) -> None:
    with world_in_use() as world:
        victim, intruder = world.join("victim"), world.connect()
        for number in range(3):
            assert intruder.close_code is None
            intruder.ask(Discover())
            reply = intruder.ask(Register(name="x", agent_id=victim.agent_id, resume=f"{SECRET}-{number}"))
            assert reply.code == "unauthorized"
        assert intruder.close_code == 1008
        assert world.hub.summary()["closed"] == {"1008": 1}
        assert world.hub.summary()["refused"] == {"unauthorized": 3}
        assert is_logged(caplog, "refused code=unauthorized")
        assert victim.close_code is None


def test_place_in_its_grace_time_stays_its_own() -> None:
    with world_in_use(grace_s=60.0) as world:
        requester, victim = world.join("requester"), world.join("victim", "work")
        requester.delegate("running", agent_id=victim.agent_id, input=SECRET, ttl=1000.0)
        victim.lose_connection()
        requester.delegate("waiting", agent_id=victim.agent_id, input=SECRET, ttl=1000.0)
        intruder = world.connect()
        squat = Register(name="victim", capabilities=["work"], agent_id=victim.agent_id)
        assert intruder.refused(squat) == "unauthorized"
        namesake = world.join("victim", "work")
        assert namesake.agent_id != victim.agent_id
        assert namesake.received() == []
        for task_id in ("running", "waiting"):
            report = namesake.ask(Status(task_id=task_id))
            assert (report.agent_id, report.input) == (victim.agent_id, None)
            assert namesake.refused(Result(task_id=task_id, success=True)) == "not_assigned"
        world.pass_time(59.0)
        back = victim.come_back("work")
        assert back.agent_id == victim.agent_id
        assert [ref.task_id for ref in back.registration.tasks] == ["running"]
        assert [one.task_id for one in back.received()] == ["waiting"]


def test_place_of_an_agent_that_left_is_not_handed_on() -> None:
    with world_in_use(grace_s=10.0) as world:
        victim = world.join("victim", "work")
        victim.lose_connection()
        world.pass_time(11.0)
        newcomer = world.join("victim", "work", agent_id=victim.agent_id, resume=victim.registration.resume)
        assert newcomer.agent_id != victim.agent_id
        assert newcomer.registration.resume != victim.registration.resume


async def test_who_guesses_secrets_over_a_socket_is_closed_with_1008(caplog: pytest.LogCaptureFixture) -> None:
    async with hub_in_use(token=None) as hub, raw_client(hub.url) as victim, raw_client(hub.url) as intruder:
        agent_id = (await victim.register("victim"))["agent_id"]
        for _ in range(3):
            reply = await intruder.register("victim", agent_id=agent_id, resume=SECRET)
            assert reply["code"] == "unauthorized"
        assert await intruder.closed() == 1008
        assert (await health(hub.url))["closed"] == {"1008": 1}
        assert (await health(hub.url))["refused"] == {"unauthorized": 3}
        assert is_logged(caplog, "refused code=unauthorized agent=None")
        assert (await victim.request(type="heartbeat"))["type"] == "heartbeat_ack"


# 8: clients that interfere with the task of another agent.


@pytest.fixture
def party() -> Iterator[tuple[HubHarness, Client, Client, Client, Client]]:
    """A task in progress, with its requester, its worker, a third agent, and an observer."""
    with world_in_use() as world:
        requester, worker, third = (
            world.join("requester"),
            world.join("worker", "work"),
            world.join("third", "work-too"),
        )
        requester.delegate("task", "work", input=SECRET, max_retries=1)
        worker.received()
        yield world, requester, worker, third, world.connect()


Party = tuple[HubHarness, Client, Client, Client, Client]


def test_result_of_anyone_but_the_assignee_is_refused_and_changes_nothing(
    party: Party, caplog: pytest.LogCaptureFixture
) -> None:
    world, requester, worker, third, observer = party
    for success in (True, False):
        assert third.refused(Result(task_id="task", success=success, output="x")) == "not_assigned"
        assert third.refused(Result(task_id="task", success=success, attempt=1)) == "not_assigned"
        assert observer.refused(Result(task_id="task", success=success)) == "not_registered"
    assert requester.refused(Result(task_id="task", success=True, output="x")) == "not_assigned"
    assert third.refused(Status(task_id="task", progress=0.5)) == "not_assigned"
    assert requester.refused(Status(task_id="task", detail="x")) == "not_assigned"
    assert observer.refused(Status(task_id="task", detail="x")) == "not_registered"
    assert requester.received() == []
    assert worker.succeed("task", "done").state == "completed"
    assert [one.output for one in requester.received()] == ["done"]
    assert world.hub.summary()["refused"] == {"not_assigned": 7, "not_registered": 3}
    assert is_logged(caplog, "refused code=not_assigned")


def test_result_of_an_older_attempt_is_refused_and_changes_nothing(party: Party) -> None:
    world, requester, worker, third, _ = party
    worker.fail("task", agenthub.ErrorInfo("agent_lost", "x"))
    (again,) = [one for one in worker.received() if one.type == "delegate"]
    assert again.attempt == 2
    assert worker.refused(Result(task_id="task", success=True, output="old", attempt=1)) == "stale_attempt"
    assert third.refused(Result(task_id="task", success=True, output="old", attempt=1)) == "stale_attempt"
    assert worker.refused(Result(task_id="task", success=True, output="new", attempt=3)) == "stale_attempt"
    worker.succeed("task", "new", attempt=2)
    assert [one.output for one in requester.received() if one.type == "result"] == ["new"]
    assert world.hub.summary()["refused"] == {"stale_attempt": 3}


def test_result_of_an_ended_task_is_refused_and_changes_nothing(party: Party) -> None:
    world, requester, worker, third, _ = party
    worker.succeed("task", "first")
    for one in (worker, third, requester):
        for success in (True, False):
            assert one.refused(Result(task_id="task", success=success, output="second")) == "task_over"
    assert worker.refused(Status(task_id="task", progress=1.0)) == "task_over"
    assert requester.ask(Status(task_id="task")).output == "first"
    assert world.hub.summary()["refused"] == {"task_over": 7}


def test_inputs_and_outputs_are_shown_to_requester_and_assignee_alone(party: Party) -> None:
    _, requester, worker, third, observer = party
    worker.ask(Status(task_id="task", progress=0.5, detail=SECRET))
    for is_ended in (False, True):
        for one in (requester, worker):
            report = one.ask(Status(task_id="task"))
            assert report.input == report.detail == SECRET
            assert report.output == (SECRET if is_ended else None)
        for one in (third, observer):
            report = one.ask(Status(task_id="task"))
            assert (report.state, report.progress) == ("completed" if is_ended else "in_progress", 0.5)
            assert SECRET not in repr(report)
            assert SECRET not in repr(one.ask(Status(tasks=True)))
            assert SECRET not in repr(one.ask(Discover()))
            assert SECRET not in repr(one.ask(Status()))
        if not is_ended:
            worker.succeed("task", SECRET)
    assert third.received() == observer.received() == []


def test_error_text_is_shown_to_requester_and_assignee_alone(party: Party) -> None:
    _, requester, worker, third, observer = party
    worker.fail("task", agenthub.ErrorInfo("odd", SECRET))
    for one in (requester, worker):
        assert one.ask(Status(task_id="task")).error.message == SECRET
    for one in (third, observer):
        report = one.ask(Status(task_id="task"))
        assert (report.state, report.code, report.error) == ("failed", "odd", None)
        assert SECRET not in repr(one.ask(Status(tasks=True)))


def test_task_of_another_is_neither_repeated_nor_replaced(party: Party) -> None:
    world, requester, _, third, _ = party
    assert third.refused(Delegate(task_id="task", capability="work", input=SECRET, max_retries=1)) == "duplicate_task"
    assert requester.refused(Delegate(task_id="task", capability="work", input="x")) == "duplicate_task"
    assert world.hub.summary()["refused"] == {"duplicate_task": 2}


# 9: clients that multiply tasks, or cancel those of others.


def test_chain_of_tasks_is_at_most_sixteen_deep(caplog: pytest.LogCaptureFixture) -> None:
    with world_in_use() as world:
        requester, even, odd = world.join("requester"), world.join("even", "even"), world.join("odd", "odd")
        requester.delegate("depth-1", "odd")
        for depth in range(2, 17):
            asker, capability = (odd, "even") if depth % 2 == 0 else (even, "odd")
            reply = asker.delegate(f"depth-{depth}", capability, parent_id=f"depth-{depth - 1}")
            assert reply.state == "in_progress"
        assert even.refused(Delegate(task_id="depth-17", capability="odd", parent_id="depth-16")) == "too_deep"
        assert even.refused(Delegate(task_id="depth-17", agent_id="x", wait=True, parent_id="depth-16")) == "too_deep"
        assert world.hub.summary()["refused"] == {"too_deep": 2}
        assert is_logged(caplog, f"refused code=too_deep agent={even.agent_id}")
        requester.fail("depth-1")
        assert world.hub.summary()["tasks"] == {
            "pending": 0,
            "in_progress": 0,
            "completed": 0,
            "failed": 16,
            "timeout": 0,
        }


def test_only_the_assignee_of_a_task_makes_others_part_of_it() -> None:
    with world_in_use() as world:
        requester, worker, third = world.join("requester"), world.join("worker", "work"), world.join("third", "help")
        requester.delegate("task", "work")
        for one in (requester, third):
            assert one.refused(Delegate(task_id="child", capability="stand-by", parent_id="task")) == "not_assigned"
        assert worker.refused(Delegate(task_id="child", capability="help", parent_id="nobodys")) == "not_assigned"
        worker.succeed("task")
        assert worker.refused(Delegate(task_id="child", capability="help", parent_id="task")) == "not_assigned"
        assert world.hub.summary()["refused"] == {"not_assigned": 4}


def test_child_does_not_outlive_its_parent() -> None:
    with world_in_use() as world:
        requester, worker, helper = world.join("requester"), world.join("worker", "work"), world.join("helper", "help")
        requester.delegate("task", "work", ttl=10.0)
        world.pass_time(4.0)
        worker.delegate("child", "help", ttl=1000.0, parent_id="task")
        (delivery,) = helper.received()
        assert delivery.ttl == pytest.approx(6.0)
        world.pass_time(6.0)
        assert requester.ask(Status(task_id="task")).state == "timeout"
        assert requester.ask(Status(task_id="child")).state in ("timeout", "failed")
        assert helper.refused(Result(task_id="child", success=True)) == "task_over"


def test_only_the_requester_of_a_task_calls_it_off() -> None:
    with world_in_use() as world:
        requester, worker, third = world.join("requester"), world.join("worker", "work"), world.join("third")
        requester.delegate("task", "work")
        requester.delegate("waiting", "nobody", wait=True)
        observer = world.connect()
        for task_id in ("task", "waiting"):
            assert third.refused(Result(task_id=task_id, success=False)) == "not_assigned"
            assert observer.refused(Result(task_id=task_id, success=False)) == "not_registered"
        assert worker.refused(Result(task_id="waiting", success=False)) == "not_assigned"
        for task_id in ("task", "waiting"):
            requester.fail(task_id, SECRET)
            assert requester.ask(Status(task_id=task_id)).code == "cancelled"
        assert [one.state for one in worker.received() if one.type == "status"] == ["failed"]
        assert world.hub.summary()["refused"] == {"not_assigned": 3, "not_registered": 2}


def test_agent_that_was_calling_itself_gets_no_task_of_its_own_by_capability() -> None:
    with world_in_use() as world:
        one = world.join("one", "work")
        assert one.refused(Delegate(task_id="task", capability="work")) == "no_agent"
        assert world.hub.summary()["refused"] == {"no_agent": 1}


# 16: all agents at once.

CROWD_MAX = 10_000
DESCRIPTORS_BESIDE = 300  # Of each process, for other purposes than these connections.


class Returning(asyncio.Protocol):
    """A minimal connection: it resumes a session, and reads the reply."""

    def __init__(self, registration: dict[str, Any], replies: asyncio.Queue[dict[str, Any]]) -> None:
        self.said = HANDSHAKE + frame(json.dumps(registration).encode())
        self.replies = replies
        self.heard = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.said)

    def data_received(self, raw: bytes) -> None:
        self.heard += raw
        _, separator, frame = self.heard.partition(b"\r\n\r\n")
        if separator and frame.endswith(b"}"):
            self.replies.put_nowait(json.loads(frame[frame.index(b"{") :]))

    def connection_lost(self, error: Exception | None) -> None:
        self.replies.put_nowait({"type": "lost", "agent_id": str(error)})


@pytest.fixture(params=[1000, pytest.param(CROWD_MAX, marks=pytest.mark.long)])
def crowd_size(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many connections, or as many as the system allows. This process may have as many open meanwhile."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = (
        CROWD_MAX + DESCRIPTORS_BESIDE if hard == resource.RLIM_INFINITY else min(hard, CROWD_MAX + DESCRIPTORS_BESIDE)
    )
    if most - DESCRIPTORS_BESIDE < 500:
        pytest.skip("this system allows too few connections for a crowd")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    yield min(most - DESCRIPTORS_BESIDE, request.param)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def write_journal_of_a_crowd(path: Path, size: int) -> dict[str, str]:
    """Write the journal of a hub that died with `size` agents; return their secrets by agent_id."""
    secrets = {f"agent-{number}": f"secret-{number}" for number in range(size)}
    journal = Journal(str(path))
    journal.open()
    rows = [
        agenthub.AgentRow(agent_id, hash_of(secret), Register(name="agent", capabilities=["work"]), there=True)
        for agent_id, secret in secrets.items()
    ]
    journal.write(changes_of(agents=rows), time.time())
    journal.close()
    return secrets


@posix_only
async def test_crowd_that_comes_back_at_once_after_a_restart_of_the_hub_is_taken_back(
    crowd_size: int, tmp_path: Path
) -> None:
    secrets = write_journal_of_a_crowd(tmp_path / "hub.db", crowd_size)
    options = ["--max-connections", str(crowd_size + 10), "--max-connections-per-address", str(2 * CROWD_MAX)]
    # The system limits the backlog of connections to accept; TCP retries the others after a second or so.
    with hub_process(*options, "--db", str(tmp_path / "hub.db")) as (url, _):
        async with bystanders(url), raw_client(url) as asker:
            assert (await asker.request(type="status"))["hub"]["agents_away"] == crowd_size
            loop, replies = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]]()
            address = urlsplit(url)

            async def come_back(agent_id: str, secret: str) -> asyncio.BaseTransport:
                fields = {"name": "agent", "capabilities": ["work"], "agent_id": agent_id, "resume": secret}
                message = {"type": "register", "id": "1", **fields}
                transport, _ = await loop.create_connection(
                    lambda: Returning(message, replies), address.hostname, address.port
                )
                return transport

            coming = asyncio.gather(*(come_back(*one) for one in secrets.items()))
            answers = []
            async with asyncio.timeout(9 * WAIT_S):
                while not answers or answers[-1] < crowd_size:
                    answers.append((await asker.request(type="discover", capability="work", limit=1))["total"])
                    await asyncio.sleep(0.1)
                transports = await coming
                back = [await replies.get() for _ in secrets]
            try:
                assert {one["type"] for one in back} == {"register"}
                assert {one["agent_id"] for one in back} == set(secrets)
                assert answers == sorted(answers)
                assert len(answers) > 1  # It answered while they connected.
                summary = (await asker.request(type="status"))["hub"]
                assert (summary["agents"], summary["agents_away"]) == (crowd_size + 2, 0)
                assert summary["refused"] == summary["closed"] == {}
            finally:
                for transport in transports:
                    transport.abort()


def test_agent_waits_longer_after_each_try_and_never_as_long_as_another(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[float] = []

    def note(least: float, most: float) -> float:
        assert least == 0
        bounds.append(most)
        return most

    monkeypatch.setattr(random, "uniform", note)
    backoff = Backoff()
    for _ in range(10):
        assert backoff.next_s() == bounds[-1]
    assert bounds == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30]


def test_agent_starts_over_only_after_a_connection_that_lasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda least, most: most)
    backoff = Backoff()
    for expected in (0.5, 1, 2, 4):
        assert backoff.next_s() == expected
        backoff.lasted(0.0)
        backoff.lasted(expected)
    backoff.lasted(8.0)  # Not longer than the present limit.
    assert backoff.next_s() == 8
    backoff.lasted(16.1)
    assert backoff.next_s() == 0.5


async def test_hub_that_lets_agents_in_and_drops_them_is_not_stormed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(agenthub, "BACKOFF_MAX_S", 0.1)
    bounds: list[float] = []
    monkeypatch.setattr(random, "uniform", lambda least, most: bounds.append(most) or 0.0)
    async with hub_in_use(token=None) as hub:
        async with Agent("ann", url=hub.url) as ann:
            for number in range(6):
                (link,) = await until(
                    lambda: [
                        one for one in hub.links if "ann" in str(getattr(hub.hub.connections[one].agent, "name", ""))
                    ]
                )
                link.abort()
                await until(lambda number=number: len(bounds) > number)
            await ann.connected(WAIT_S)  # So that it leaves with a close.
        assert bounds[:6] == [0.01, 0.02, 0.04, 0.08, 0.1, 0.1]
        assert hub.hub.summary()["closed"] == {"1006": 6, "1000": 1}
