"""The cases of the Autobahn test suite against the hub's own end of a WebSocket, which echoes here what it is sent.

All 517 cases run: with the hub's own settings, and those that are over its limit also with a larger one. The suite has
them for Python 2; `kosoku` runs the same ones with Python 3. Where that is not installed, this module is skipped.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, NamedTuple

import pytest

import agenthub
from agenthub import HubServer, HubSettings, InvalidMessage
from tests.support import WAIT_S

pytest.importorskip("kosoku")

LARGEST_CASE_BYTES = 16 * 1_048_576
RUN_S = 6 * WAIT_S  # A run is many cases. It takes some seconds, of which most are pauses that the cases make.

# kosoku plays the other end in a process of its own: with its cases come folders in front of `sys.path`, and a function
# in place of the one that `binascii` had, which are no company for other tests. It leaves by `os._exit` because its
# threads are not always done when the interpreter is, and kosoku 0.1.0 then aborts the process, with the answer given.
FUZZING_CLIENT = """
import asyncio, json, os, sys
from kosoku import FailureError, run_fuzzingclient

async def main(url, *patterns):
    try:
        results = await run_fuzzingclient(url, patterns, concurrency=16)
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


class Verdict(NamedTuple):
    """What the suite says of the messages and of the close, and the close code that it was sent."""

    messages: str
    close: str
    close_code: int | None


class Outcome(NamedTuple):
    is_passed: bool  # Both parts of the verdict are OK, NON-STRICT or INFORMATIONAL.
    verdict: Verdict
    request: str
    response: str


# What the hub does otherwise than the suite expects, and why it may. NON-STRICT is not here, for it says that the RFC
# is kept. It is given, depending on how TCP cuts the bytes, where a message and then an error come in one chunk (3.2 to
# 3.4, 4.1.3 to 4.1.5, 4.2.3 to 4.2.5, 5.15), since the hub answers nothing when it has failed the connection; and for
# UTF-8 that is checked when the message is complete instead of in its midst (6.4.*), which RFC 6455 §8.1 leaves open.
ACCEPTED: dict[str, tuple[Verdict, str]] = {
    "7.1.5": (
        Verdict("FAILED", "WRONG CODE", 1002),
        "A close amid a fragmented message is a protocol error to `websockets`. The suite expects its own code, 1000, "
        "to be echoed, but RFC 6455 §5.5.1 says no more than that an endpoint typically does so.",
    ),
    **dict.fromkeys(
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
    ),
}


class EchoLink(agenthub.ServerLink):
    """The hub's end of a WebSocket, with an owner that echoes instead of the one it is made for.

    All that the hub does with a message is done here too: it is put together, decoded, refused (since none is of the
    hub's protocol) and, where it is no UTF-8, a reason to fail the connection. A binary message is refused like that as
    well, but echoed all the same, since the suite learns nothing of frames, sizes and fragments from a refusal.
    """

    def __init__(self, owner: agenthub.LinkOwner, *args: Any, **options: Any) -> None:
        super().__init__(Echo(), *args, **options)
        self.raw = b""
        self.is_text = False
        self.fragments: list[bytes] = []

    def _deliver(self, raw: bytes) -> None:
        self.raw, self.is_text = raw, True
        super()._deliver(raw)

    def _on_fragment(self, frame: Any) -> None:
        self.fragments.append(frame.data)
        if frame.fin:  # If it is text, `_deliver` is called with what the hub has put together.
            self.raw, self.is_text = b"".join(self.fragments), False
            self.fragments.clear()
        super()._on_fragment(frame)

    def echo(self) -> None:
        if not self.is_text:
            if not self._is_mute:
                self._protocol.send_binary(self.raw)  # The hub has no way of its own to send what is not text.
                self._pump()
        elif agenthub.is_utf8(self.raw):  # Else the connection is failed next; and nobody may send such a text.
            self.send(self.raw)


class Echo:
    """Has each message sent back, in the place of a hub."""

    def opened(self, link: agenthub.Link) -> None: ...

    def received(self, link: EchoLink, message: Any, message_bytes: int) -> None:
        assert isinstance(message, InvalidMessage)
        assert message_bytes == len(link.raw)
        link.echo()

    def closed(self, link: agenthub.Link, code: int, reason: str) -> None: ...


@pytest.fixture(autouse=True)
def _hub_echoes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenthub, "ServerLink", EchoLink)


async def outcomes_of(*patterns: str, hub: HubServer) -> dict[str, Outcome]:
    """Run the cases whose ids are like one of the patterns; return what came of each."""
    async with hub:
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", FUZZING_CLIENT, hub.url, *patterns),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(RUN_S):
                answer, complaint = await client.communicate()
        finally:
            if client.returncode is None:
                client.kill()
                await client.wait()
    assert client.returncode == 0, complaint.decode()
    return {
        case: Outcome(**{**outcome, "verdict": Verdict(*outcome["verdict"])})
        for case, outcome in json.loads(answer).items()
    }


def accepted(*sections: str) -> dict[str, Verdict]:
    return {case: verdict for case, (verdict, _) in ACCEPTED.items() if case.startswith(sections)}


def not_passed(outcomes: dict[str, Outcome]) -> dict[str, Verdict]:
    return {case: outcome.verdict for case, outcome in outcomes.items() if not outcome.is_passed}


async def test_frames_fragments_utf8_and_closes_are_as_the_suite_expects_but_for_what_is_accepted() -> None:
    outcomes = await outcomes_of("1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*", hub=HubServer(port=0))
    assert len(outcomes) == 247
    assert not_passed(outcomes) == accepted("7.")


async def test_messages_up_to_the_limit_are_echoed_and_larger_ones_are_refused_as_too_big() -> None:
    """9.1.3, 9.2.3, 9.5.* and 9.6.* are just at the limit."""
    outcomes = await outcomes_of("9.*", hub=HubServer(port=0))
    assert len(outcomes) == 54
    assert not_passed(outcomes) == accepted("9.")


async def test_messages_over_the_limit_are_echoed_by_a_hub_with_a_larger_one() -> None:
    """What refuses them is the limit and nothing else. The backlog is larger too: it has to hold an echo."""
    settings = HubSettings(message_bytes_max=LARGEST_CASE_BYTES)
    hub = HubServer(settings, port=0, backlog_bytes_max=2 * LARGEST_CASE_BYTES)
    outcomes = await outcomes_of(*accepted("9."), hub=hub)
    assert outcomes.keys() == accepted("9.").keys()
    assert not_passed(outcomes) == {}


async def test_compression_is_offered_in_many_ways_and_never_negotiated() -> None:
    outcomes = await outcomes_of("12.*", "13.*", hub=HubServer(port=0))
    assert len(outcomes) == 216
    assert {outcome.verdict for outcome in outcomes.values()} == {Verdict("UNIMPLEMENTED", "OK", 1000)}
    for outcome in outcomes.values():
        assert "permessage-deflate" in outcome.request
        assert outcome.response.startswith("HTTP/1.1 101 ")
        assert "sec-websocket-extensions" not in outcome.response.lower()
