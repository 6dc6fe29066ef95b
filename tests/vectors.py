"""The exchanges in docs/protocol-vectors.json: `python -m tests.vectors` records them from the tests of the hub.

Each test of tests/test_hub.py and tests/test_hub_talk.py whose story is short becomes one: what each connection sends,
what the hub sends to it, how much time passes, and which connections are lost or closed. The limits of messages in
tests/test_messages.py become one each, too, and those in tests/exchanges.py are written for clients. `replay` plays an
exchange to a hub, which must do the same again.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from agenthub import Close
from tests import exchanges, harness, test_hub, test_hub_talk, test_messages
from tests.support import ROOT

PATH = ROOT / "docs" / "protocol-vectors.json"
STEPS_MAX = 60
BYTES_MAX = 6000
VALUE_BYTES_MAX = 200
SEED = 1

Vector = dict[str, Any]


class Recorder(harness.HubHarness):
    """A hub whose exchanges are recorded."""

    made: list[Recorder] = []

    def __init__(self, **options: Any) -> None:
        self.steps: list[dict[str, Any]] = []
        self.is_malformed = False  # Whether what is being received is no JSON.
        self.is_exchange = options.get("seed", SEED) == SEED and options.get("ledger") is None
        self.options = {name: value for name, value in options.items() if name not in ("seed", "ledger")}
        self.is_exchange &= all(isinstance(value, int | float | str) for value in self.options.values())
        super().__init__(**options)
        self.made.append(self)

    def connect(self) -> harness.Client:
        self.steps.append({"connect": f"connection-{self.connections + 1}"})
        return super().connect()

    def received(self, handle: Any, raw: bytes) -> None:
        message = without_defaults(json.loads(raw))
        self.steps.append({"from": handle, "message": message})
        super().received(handle, json.dumps(message).encode())

    def said(self, connection: str, text: str) -> None:
        self.steps.append({"from": connection, "text": text})
        self.is_malformed = not is_json(text)
        super().received(connection, text.encode())
        self.is_malformed = False

    def said_binary(self, connection: str, raw: bytes) -> None:
        self.steps.append({"from": connection, "binary": raw.hex()})
        super().said_binary(connection, raw)

    def send(self, handle: str, message: Any, raw: bytes) -> None:
        sent = json.loads(raw)
        if self.is_malformed:
            del sent["message"]  # Its words are those of the decoder that is installed.
        self.steps.append({"to": handle, "message": sent})
        super().send(handle, message, raw)

    def close(self, handle: str, effect: Close) -> None:
        self.steps.append({"closed": handle, "code": int(effect.code)})
        super().close(handle, effect)

    def lose(self, client: harness.Client) -> None:
        self.steps.append({"lost": client.connection})
        super().lose(client)

    def pass_time(self, seconds: float) -> None:
        self.steps.append({"seconds": seconds})
        super().pass_time(seconds)


def is_json(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def without_defaults(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without the fields that have the value that they have by default."""
    fields = dataclasses.fields(test_messages.FROM_AGENT[message["type"]])
    defaults = {one.name: one.default for one in fields if one.default is not dataclasses.MISSING}
    defaults |= {one.name: one.default_factory() for one in fields if one.default_factory is not dataclasses.MISSING}
    kept = {name: value for name, value in message.items() if name not in defaults or value != defaults[name]}
    return {"type": message["type"], **kept}


def stories() -> Iterator[tuple[str, Any]]:
    """Yield the tests of the hub that need no arguments, with their names as sentences."""
    for name, function in [*vars(test_hub).items(), *vars(test_hub_talk).items()]:
        if name.startswith("test_") and not inspect.signature(function).parameters:
            yield name.removeprefix("test_").replace("_", " "), function


def rejections() -> Iterator[tuple[str, Any]]:
    """Yield what sends messages that the hub must reject: those that lack a field, or are past a limit."""

    def rejected(*documents: dict[str, Any]) -> Any:
        def story() -> None:
            client = Recorder().join("agent")
            for document in documents:
                client.harness.received(client.connection, json.dumps(document).encode())

        return story

    for type, required in test_messages.REQUIRED.items():
        for field in required:
            document = test_messages.message_of(type)
            del document[field]
            yield f"{type} without {field} is rejected", rejected(document)
    for type, path in test_messages.limited_fields():
        values = [value for value in test_messages.edges_of(type, path)[1] if len(json.dumps(value)) < VALUE_BYTES_MAX]
        documents = [test_messages.message_of(type, **{path.split(".")[0]: value}) for value in values]
        if documents:
            yield f"{type} with {path} past its limit is rejected", rejected(*documents)


def recorded() -> list[Vector]:
    """Return the exchanges of all tests that a fresh hub does again in the same way."""
    vectors: list[Vector] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_hub, "HubHarness", Recorder)
        patch.setattr(test_hub_talk, "HubHarness", Recorder)
        patch.setattr(exchanges, "HubHarness", Recorder)
        for name, function in [*stories(), *rejections(), *exchanges.STORIES.items()]:
            Recorder.made.clear()
            function()
            if len(Recorder.made) != 1 or not Recorder.made[0].is_exchange:
                continue
            (hub,) = Recorder.made
            vector = {"name": name, "settings": hub.options, "steps": hub.steps}
            if (
                2 <= len(hub.steps) <= STEPS_MAX
                and (name in exchanges.STORIES or len(json.dumps(vector)) <= BYTES_MAX)
                and replay(vector) == hub.steps
            ):
                vectors.append(vector)
    return vectors


def replay(vector: Vector) -> list[dict[str, Any]]:
    """Play an exchange to a fresh hub: all but its own messages and closes. Return what happens."""
    hub = Recorder(**vector["settings"])
    clients: dict[str, harness.Client] = {}
    for step in vector["steps"]:
        if "connect" in step:
            clients[step["connect"]] = hub.connect()
        elif "from" in step and step["from"] in hub.clients:
            if "message" in step:
                hub.received(step["from"], json.dumps(step["message"]).encode())
            elif "text" in step:
                hub.said(step["from"], step["text"])
            else:
                hub.said_binary(step["from"], bytes.fromhex(step["binary"]))
        elif "lost" in step and step["lost"] in hub.clients:
            hub.lose(clients[step["lost"]])
        elif "seconds" in step:
            hub.pass_time(step["seconds"])
    return hub.steps


def page(vectors: list[Vector]) -> str:
    """Return the file: one step a line."""
    parts = []
    for vector in vectors:
        steps = ",\n".join(f"    {json.dumps(step, ensure_ascii=False)}" for step in vector["steps"])
        head = f'  "name": {json.dumps(vector["name"])},\n  "settings": {json.dumps(vector["settings"])}'
        parts.append(f'{{\n{head},\n  "steps": [\n{steps}\n  ]\n}}')
    return "[\n" + ",\n".join(parts) + "\n]\n"


def main() -> int:
    logging.disable()
    vectors = recorded()
    PATH.write_text(page(vectors), encoding="utf-8")
    print(f"{len(vectors)} exchanges in {PATH.relative_to(ROOT)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
