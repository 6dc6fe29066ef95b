"""The Autobahn test suite against both ends of our WebSocket, which echo each message here.

All 517 cases run against each end and each implementation with the default settings, and the cases over the hub's
limit also with a larger one. The suite needs Python 2; `kosoku` runs the same cases with Python 3. Without it, this
module is skipped.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest

import agenthub
from agenthub import HubServer, HubSettings, InvalidMessage
from tests.support import WAIT_S

pytest.importorskip("kosoku")

LARGEST_CASE_BYTES = 16 * 1_048_576
RUN_S = 6 * WAIT_S  # A run of many cases takes some seconds, mostly pauses of the cases.

CLIENTS_MAX = 16  # Cases in parallel.

# kosoku runs in a process of its own: its cases prepend folders to `sys.path` and replace a function of `binascii`. It
# exits by `os._exit` because its threads may outlive the interpreter, and kosoku 0.1.0 then aborts the process.
FUZZING_PEER = """
import asyncio, json, os, sys
from kosoku import FailureError, run_fuzzingclient, run_fuzzingserver

async def serve(patterns):
    async with run_fuzzingserver(patterns, port=0) as server:
        print(server.port, flush=True)
        return await server.get_result()

async def main(url, *patterns):
    try:
        results = await (run_fuzzingclient(url, patterns, concurrency=16) if url else serve(patterns))
    except FailureError as failure:
        results = failure.results
    print(json.dumps({
        result.case_id: {
            "is_passed": result.passed,
            "verdict": (result.behavior.value, result.behavior_close.value, result.remote_close_code),
            "request": result.http_request,
            "response": result.http_response,
        }
        for result in results
    }), flush=True)
    os._exit(0)

asyncio.run(main(*sys.argv[1:]))
"""


BUILT_IN = agenthub.WebSockets("built in", agenthub.BuiltinServer, agenthub.BuiltinClient, agenthub.HandshakeFailed)


class Verdict(NamedTuple):
    """The suite's verdicts on the messages and on the close, and the close code that it received."""

    messages: str
    close: str
    close_code: int | None


class Outcome(NamedTuple):
    is_passed: bool  # Both verdicts are OK, NON-STRICT or INFORMATIONAL.
    verdict: Verdict
    request: str
    response: str


# Where our ends differ from what the suite expects, and why that is allowed. NON-STRICT conforms to the RFC, so it is
# not listed. Depending on how TCP splits the bytes, the suite gives it when a message and an error arrive in one chunk
# (3.2 to 3.4, 4.1.3 to 4.1.5, 4.2.3 to 4.2.5, 5.15), because a failed connection answers nothing; and for UTF-8 that is
# checked once the message is complete (6.4.*), which RFC 6455 §8.1 permits.
CLOSE_IN_FRAGMENTS: dict[str, tuple[Verdict, str]] = {
    "7.1.5": (
        Verdict("FAILED", "WRONG CODE", 1002),
        "A close in a fragmented message is a protocol error to `websockets`. The suite expects its own code, 1000, "
        "to be echoed, but RFC 6455 §5.5.1 says no more than that an endpoint typically does so.",
    ),
}
TOO_BIG_FOR_A_HUB: dict[str, tuple[Verdict, str]] = dict.fromkeys(
    [
        *("9.1.4", "9.1.5", "9.1.6", "9.2.4", "9.2.5", "9.2.6"),
        *("9.3.1", "9.3.2", "9.3.3", "9.3.4", "9.3.5", "9.3.6", "9.3.7", "9.3.8", "9.3.9"),
        *("9.4.1", "9.4.2", "9.4.3", "9.4.4", "9.4.5", "9.4.6", "9.4.7", "9.4.8", "9.4.9"),
    ],
    (
        Verdict("FAILED", "FAILED", 1009),
        "These are messages of 4, 8 and 16 MiB, over the hub's limit of 1 MiB. RFC 6455 §10.4 asks for a limit, "
        "and §7.4.1 has the code 1009 for what is over it.",
    ),
)
ACCEPTED: dict[tuple[str, str], dict[str, tuple[Verdict, str]]] = {
    ("hub", "websockets"): CLOSE_IN_FRAGMENTS | TOO_BIG_FOR_A_HUB,
    ("hub", "built in"): TOO_BIG_FOR_A_HUB,
    ("agent", "websockets"): CLOSE_IN_FRAGMENTS,
    ("agent", "built in"): {},
}


class EchoingLink(agenthub.WebSocketLink):
    """One end of a WebSocket with an owner that echoes.

    Messages take their usual way: they are assembled, decoded, rejected (none is of our protocol), and fail the
    connection if they are not UTF-8. Binary messages are rejected too, but echoed all the same: a rejection would tell
    the suite nothing about frames, sizes and fragments.
    """

    raw = b""
    is_text = False

    def _deliver(self, raw: bytes) -> None:
        self.raw, self.is_text = raw, True
        super()._deliver(raw)

    def _on_message(self, message: agenthub.Message) -> None:
        self.raw, self.is_text = message.raw, False  # If it is text, `_deliver` is called with it.
        super()._on_message(message)

    def echo(self) -> None:
        if not self.is_text:
            if self.protocol.close_sent is None:
                send_binary(self.protocol, self.raw)  # A link sends only text by itself.
                self._process_output()
        elif agenthub.is_utf8(self.raw):  # Otherwise the connection fails next, and such a text must not be sent.
            self.send(self.raw)


def send_binary(protocol: Any, raw: bytes) -> None:
    if isinstance(protocol, agenthub.BuiltinProtocol):
        protocol._send(agenthub.BINARY, raw)
    else:
        protocol._inner.send_binary(raw)
        protocol._collect()


class EchoingServerLink(EchoingLink, agenthub.ServerLink):
    def __init__(self, owner: agenthub.LinkOwner, *args: Any, **options: Any) -> None:
        super().__init__(Echo(), *args, **options)


class EchoingClientLink(EchoingLink, agenthub.ClientLink): ...


class Echo:
    """Send each message back, in place of a hub or an agent."""

    def opened(self, link: agenthub.Link) -> None: ...

    def received(self, link: EchoingLink, message: Any, message_bytes: int) -> None:
        assert isinstance(message, InvalidMessage)
        assert message_bytes == len(link.raw)
        link.echo()

    def closed(self, link: agenthub.Link, code: int, reason: str) -> None: ...


@pytest.fixture(autouse=True, params=["websockets", "built in"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let our ends echo, on top of one of the implementations."""
    name = str(request.param)
    used = BUILT_IN if name == "built in" else agenthub.websockets_used()
    if not used.name.startswith(name):
        pytest.skip("websockets is not in use")
    monkeypatch.setattr(agenthub, "websockets_used", lambda: used)
    monkeypatch.setattr(agenthub, "ServerLink", EchoingServerLink)
    monkeypatch.setattr(agenthub, "ClientLink", EchoingClientLink)
    return name


async def outcomes_of(
    url: str, patterns: tuple[str, ...], drive: Callable[[str], Awaitable[None]]
) -> dict[str, Outcome]:
    """Run the cases whose ids match one of the patterns; return the outcome of each.

    The suite connects to `url` as a client; without one it is the server, and `drive` is called with its URL.
    """
    peer = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FUZZING_PEER, url, *patterns),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=LARGEST_CASE_BYTES,
    )
    try:
        async with asyncio.timeout(RUN_S):
            if not url:
                assert peer.stdout is not None
                port = (await peer.stdout.readline()).decode().strip()
                await drive(f"ws://127.0.0.1:{port}")
            answer, complaint = await peer.communicate()
    finally:
        if peer.returncode is None:
            peer.kill()
            await peer.wait()
    assert peer.returncode == 0, complaint.decode()
    return {
        case: Outcome(**{**outcome, "verdict": Verdict(*outcome["verdict"])})
        for case, outcome in json.loads(answer).items()
    }


async def outcomes_of_hub(*patterns: str, hub: HubServer) -> dict[str, Outcome]:
    async def drive(url: str) -> None: ...

    async with hub:
        return await outcomes_of(hub.url, patterns, drive)


async def outcomes_of_agent(*patterns: str) -> dict[str, Outcome]:
    return await outcomes_of("", patterns, run_all_cases)


async def run_all_cases(url: str) -> None:
    """Connect once for each of the suite's cases, echo until it is done, and then request the report."""
    count = int((await connected(f"{url}/getCaseCount")).raw)
    cases = iter(range(1, count + 1))

    async def run_some() -> None:
        for case in cases:
            await connected(f"{url}/runCase?case={case}&agent=agenthub")

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS_MAX):
            group.create_task(run_some())
    await connected(f"{url}/updateReports?agent=agenthub")


async def connected(url: str) -> EchoingClientLink:
    """Connect, and return the link once it is closed."""
    link = await agenthub.connect_websocket(url, Echo())
    assert isinstance(link, EchoingClientLink)
    await link.gone.wait()
    return link


def accepted(end: str, implementation: str, *sections: str) -> dict[str, Verdict]:
    table = ACCEPTED[end, implementation]
    return {case: verdict for case, (verdict, _) in table.items() if case.startswith(sections)}


def not_passed(outcomes: dict[str, Outcome]) -> dict[str, Verdict]:
    return {case: outcome.verdict for case, outcome in outcomes.items() if not outcome.is_passed}


FRAMES = ("1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*")


async def test_frames_fragments_utf8_and_closes_are_as_the_suite_expects_but_for_what_is_accepted(
    implementation: str,
) -> None:
    outcomes = await outcomes_of_hub(*FRAMES, hub=HubServer(port=0))
    assert len(outcomes) == 247
    assert not_passed(outcomes) == accepted("hub", implementation, "7.")


@pytest.mark.long
async def test_messages_up_to_the_limit_are_echoed_and_larger_ones_are_refused_as_too_big(implementation: str) -> None:
    """The cases 9.1.3, 9.2.3, 9.5.* and 9.6.* are exactly at the limit."""
    outcomes = await outcomes_of_hub("9.*", hub=HubServer(port=0))
    assert len(outcomes) == 54
    assert not_passed(outcomes) == accepted("hub", implementation, "9.")


@pytest.mark.long
async def test_messages_over_the_limit_are_echoed_by_a_hub_with_a_larger_one(implementation: str) -> None:
    """Only the limit rejects them. The backlog is larger too, because it has to hold an echo."""
    settings = HubSettings(message_bytes_max=LARGEST_CASE_BYTES)
    hub = HubServer(settings, port=0, backlog_bytes_max=2 * LARGEST_CASE_BYTES)
    outcomes = await outcomes_of_hub(*accepted("hub", implementation, "9."), hub=hub)
    assert outcomes.keys() == accepted("hub", implementation, "9.").keys()
    assert not_passed(outcomes) == {}


async def test_compression_is_offered_in_many_ways_and_never_negotiated() -> None:
    outcomes = await outcomes_of_hub("12.*", "13.*", hub=HubServer(port=0))
    assert len(outcomes) == 216
    assert {outcome.verdict for outcome in outcomes.values()} == {Verdict("UNIMPLEMENTED", "OK", 1000)}
    for outcome in outcomes.values():
        assert "permessage-deflate" in outcome.request
        assert outcome.response.startswith("HTTP/1.1 101 ")
        assert "sec-websocket-extensions" not in outcome.response.lower()


async def test_agent_does_as_the_suite_expects_but_for_what_is_accepted(implementation: str) -> None:
    outcomes = await outcomes_of_agent(*FRAMES)
    assert len(outcomes) == 247
    assert not_passed(outcomes) == accepted("agent", implementation, "7.")


@pytest.mark.long
async def test_agent_echoes_messages_of_any_size(implementation: str) -> None:
    outcomes = await outcomes_of_agent("9.*")
    assert len(outcomes) == 54
    assert not_passed(outcomes) == accepted("agent", implementation, "9.") == {}


async def test_agent_asks_for_no_compression() -> None:
    outcomes = await outcomes_of_agent("12.*", "13.*")
    assert len(outcomes) == 216
    assert {outcome.verdict for outcome in outcomes.values()} == {Verdict("UNIMPLEMENTED", "OK", 1000)}
    for outcome in outcomes.values():
        assert "sec-websocket-extensions" not in outcome.request.lower()
