"""A hub with a clock of its own, and clients that speak to it: what the tests of section 4 are written with.

`HubDriver` is what all drivers of a hub share: facts go in, the ledger is kept, effects are carried out. `HubHarness`
is the plain one, without a journal or a network. Every message goes through encode and decode, and the harness checks
what holds in every test: the hub sends nothing on a connection that has ended, and no message beyond its own limit.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable
from typing import Any

from agenthub import (
    AgentMessage,
    AgentRow,
    Changes,
    Close,
    Delegate,
    Error,
    Hub,
    HubSettings,
    InvalidMessage,
    LazyHeap,
    Register,
    Result,
    Status,
    Step,
    TaskRow,
    decoder_from_agent,
    decoder_from_hub,
    encode,
)
from tests.ledger import Connection, Ledger
from tests.support import parsed

TICKS_MAX = 10_000  # A hub that wants more ticks at one time does not come to rest.


def changes_of(
    inserted: Iterable[TaskRow] = (),
    updated: Iterable[TaskRow] = (),
    agents: Iterable[AgentRow] = (),
    gone: Iterable[str] = (),
) -> Changes:
    """Return changes that write these rows of tasks and agents, and delete the agents that are gone."""
    return Changes(
        {row.sequence: row for row in inserted},
        {row.sequence: row for row in updated},
        agents={**{row.agent_id: row for row in agents}, **dict.fromkeys(gone)},
    )


class HubDriver:
    """Hands facts to a hub, enters what it decides and sends in a ledger, if there is one, and applies its steps."""

    hub: Hub
    ledger: Ledger | None = None

    # What a driver has to say.

    def clock(self) -> float:
        """Return the time of the hub's clock."""
        raise NotImplementedError

    def ledger_time(self) -> float:
        """Return the time that the ledger counts in."""
        return self.clock()

    def connection_of(self, handle: Any) -> Connection | None:
        """Return the connection that the hub knows by this handle."""
        raise NotImplementedError

    def send(self, handle: Any, message: Any, raw: bytes) -> None:
        """Send a message on a connection."""
        raise NotImplementedError

    def close(self, handle: Any, effect: Close) -> None:
        """Close a connection."""
        raise NotImplementedError

    # Facts.

    def connected(self, handle: Any) -> None:
        self.take(self.hub.connected(handle, self.clock()))

    def disconnected(self, handle: Any) -> None:
        self._lose(handle)
        self.take(self.hub.disconnected(handle, self.clock()))

    def received(self, handle: Any, raw: bytes) -> None:
        message: AgentMessage | InvalidMessage
        try:
            message = decoder_from_agent()(raw)
        except InvalidMessage as error:
            message = error
        self.handle(handle, message, len(raw))

    def handle(self, handle: Any, message: AgentMessage | InvalidMessage, message_bytes: int) -> None:
        self.take(self.hub.receive(handle, message, self.clock(), message_bytes), handle, message)

    def tick(self, now: float | None = None) -> None:
        """Do what has come due by now, or by another time."""
        self.take(self.hub.tick(self.clock() if now is None else now))

    # Steps.

    def take(self, step: Step, sender: Any = None, message: Any = None) -> None:
        """Enter what the hub decided in the ledger, and apply it."""
        if self.ledger is not None:
            for handle, effect in step.effects:
                if isinstance(effect, Close):
                    self._lose(handle)
            effects = [(self.connection_of(handle), parsed(effect)) for handle, effect in step.effects]
            self.ledger.decided(self.connection_of(sender), parsed(message), effects, self.ledger_time(), self.state_of)
        self.apply(step)

    def apply(self, step: Step) -> None:
        """Carry out the effects of a step."""
        for handle, effect in step.effects:
            self.carry_out(handle, effect, self.ledger_time())

    def carry_out(self, handle: Any, effect: Any, at: float) -> None:
        """Carry out an effect that was decided at `at`, and enter it in the ledger."""
        if isinstance(effect, Close):
            self.close(handle, effect)
            return
        connection = self.connection_of(handle)
        self.send(handle, effect, encode(effect))
        if self.ledger is not None and connection is not None:
            self.ledger.sent(connection, parsed(effect), at)

    def _lose(self, handle: Any) -> None:
        connection = self.connection_of(handle)
        if self.ledger is not None and connection is not None:
            self.ledger.lost(connection, self.ledger_time())

    # Questions that change nothing.

    def observe(self, question: AgentMessage) -> Any:
        """Return the reply to a question that an observer asks on a connection of its own."""
        observer = object()
        self.hub.connected(observer, self.clock())
        step = self.hub.receive(observer, decoder_from_agent()(encode(question)), self.clock(), 50)
        self.hub.disconnected(observer, self.clock())
        ((_, reply),) = step.effects
        return parsed(decoder_from_hub()(encode(reply)))

    def state_of(self, task_id: str) -> tuple[str, int] | None:
        """Return the state and the attempt of a task as the hub states them."""
        reply = self.observe(Status(id="state", task_id=task_id))
        return None if isinstance(reply, Error) else (reply.state, reply.attempt)


class HubHarness(HubDriver):
    """A hub, the time, and the clients whose connections are open."""

    def __init__(
        self,
        *,
        seed: int = 1,
        ledger: Ledger | None = None,
        is_held: Callable[[Any], bool] = lambda link: False,
        **settings: Any,
    ) -> None:
        settings.setdefault("heartbeat_s", 1e9)  # No connection is silent too long, except in a test about that.
        settings.setdefault("join_s", 1e9)
        self.now = 1000.0
        self.hub = Hub(HubSettings(**settings), entropy=random.Random(seed).randbytes, now=self.now, is_held=is_held)
        self.ledger = ledger
        self.clients: dict[str, Client] = {}
        self.history: list[tuple[str, bytes | Close]] = []
        self.connections = 0
        self.requests = 0

    def clock(self) -> float:
        return self.now

    def connection_of(self, handle: Any) -> Connection | None:
        return self.clients.get(handle)

    def connect(self) -> Client:
        self.connections += 1
        client = Client(self, f"connection-{self.connections}")
        self.clients[client.connection] = client
        self.connected(client.connection)
        return client

    def join(self, name: str, *capabilities: Any, **fields: Any) -> Client:
        """Connect a client and register it."""
        client = self.connect()
        client.register(name, *capabilities, **fields)
        return client

    def receive(self, connection: str, message: AgentMessage | InvalidMessage) -> None:
        if self.ledger is not None:
            self.ledger.requested(self.clients[connection], message)
        if isinstance(message, InvalidMessage):
            self.handle(connection, message, 100)
        else:
            self.received(connection, encode(message))

    def said(self, connection: str, text: str) -> None:
        self.received(connection, text.encode())

    def said_binary(self, connection: str, raw: bytes) -> None:
        self.handle(connection, InvalidMessage("message: must be text, not binary"), len(raw))

    def send(self, handle: str, message: Any, raw: bytes) -> None:
        assert handle in self.clients, f"{message} for a connection that has ended"
        assert len(raw) <= self.hub.settings.message_bytes_max, f"{len(raw)} bytes of {raw[:200]!r}"
        self.history.append((handle, raw))
        self.clients[handle].inbox.append(parsed(message))

    def close(self, handle: str, effect: Close) -> None:
        assert handle in self.clients, f"{effect} for a connection that has ended"
        self.history.append((handle, effect))
        self.clients.pop(handle).close_code = effect.code

    def lose(self, client: Client) -> None:
        """Lose a client's connection."""
        self._lose(client.connection)
        del self.clients[client.connection]
        self.take(self.hub.disconnected(client.connection, self.now))

    def pass_time(self, seconds: float) -> None:
        """Let time pass as a server does: with a tick at each deadline."""
        end = self.now + seconds
        ticks = 0
        while (due := self.hub.next_deadline()) <= end:
            ticks = ticks + 1 if due <= self.now else 0
            assert ticks < TICKS_MAX, "the hub does not come to rest"
            self.now = max(self.now, due)
            self.tick()
        self.now = end

    def is_empty(self) -> bool:
        """Return whether the hub remembers no agent, task or connection."""
        return not remembered(self.hub)


class Client(Connection):
    """One connection, and what came in on it. It speaks as an agent once it has registered."""

    def __init__(self, harness: HubHarness, connection: str) -> None:
        super().__init__()
        self.harness = harness
        self.connection = connection
        self.inbox: list[Any] = []
        self.close_code: int | None = None
        self.registration: Any = None

    @property
    def agent_id(self) -> str:
        return str(self.registration.agent_id)

    def tell(self, message: AgentMessage | InvalidMessage) -> None:
        """Send a message that needs no reply."""
        self.harness.receive(self.connection, message)

    def say(self, text: str) -> None:
        """Send a text that may be no message."""
        self.harness.said(self.connection, text)

    def say_binary(self, raw: bytes) -> None:
        """Send a binary message, which the WebSocket does not hand to the decoder."""
        self.harness.said_binary(self.connection, raw)

    def ask(self, message: AgentMessage) -> Any:
        """Send a request, and return the one reply to it."""
        self.harness.requests += 1
        message.id = f"request-{self.harness.requests}"
        self.tell(message)
        replies = self.replies_to(message.id)
        assert len(replies) == 1, f"{len(replies)} replies to {message}"
        self.inbox = [message for message in self.inbox if message is not replies[0]]
        return replies[0]

    def replies_to(self, message_id: str | None) -> list[Any]:
        """Return the replies to that request that were not read yet."""
        return [message for message in self.inbox if getattr(message, "reply_to", None) == message_id]

    def refused(self, message: AgentMessage) -> str:
        """Send a message that must be refused, change nothing and reach no other client; return the code."""
        before = snapshot(self.harness.hub)
        sent = len(self.harness.history)
        error = self.ask(message)
        assert isinstance(error, Error), error
        assert error.task_id == getattr(message, "task_id", None)
        assert len(self.harness.history) == sent + 1
        assert snapshot(self.harness.hub) == before
        return error.code

    def received(self) -> list[Any]:
        """Return what came in and was not read yet."""
        inbox, self.inbox = self.inbox, []
        return inbox

    def register(self, name: str, *capabilities: Any, **fields: Any) -> Any:
        self.registration = self.ask(Register(name=name, capabilities=list(capabilities), **fields))
        assert not isinstance(self.registration, Error), self.registration
        return self.registration

    def delegate(self, task_id: str, capability: str | None = None, **fields: Any) -> Any:
        return self.ask(Delegate(task_id=task_id, capability=capability, **fields))

    def succeed(self, task_id: str, output: Any = None, **fields: Any) -> Any:
        return self.ask(Result(task_id=task_id, success=True, output=output, **fields))

    def fail(self, task_id: str, error: Any = None, **fields: Any) -> Any:
        return self.ask(Result(task_id=task_id, success=False, error=error, **fields))

    def lose_connection(self) -> None:
        self.harness.lose(self)

    def come_back(self, *capabilities: Any, **fields: Any) -> Client:
        """Return a new client that has resumed this agent's session."""
        fields = {"agent_id": self.agent_id, "resume": self.registration.resume, **fields}
        return self.harness.join(fields.pop("name", "back"), *capabilities, **fields)


# Counts that never go back to zero, and what is not about agents, tasks and connections.
NOT_REMEMBERED = {
    "settings",
    "dropped",
    "ended",
    "queued_s",
    "states",
    "codes",
    "ran_s",
    "_refusals",
    "_closes",
    "_message_bytes",
}


def remembered(holder: Any) -> dict[str, Any]:
    """Return all non-empty indexes of a hub, and its counts of bytes that are not zero, by name."""
    found: dict[str, Any] = {}
    for name, value in vars(holder).items():
        if name in NOT_REMEMBERED or isinstance(value, str):
            continue
        if type(value).__module__ == Hub.__module__ and hasattr(value, "__dict__"):
            found |= remembered(value)
        elif hasattr(value, "__len__"):
            found |= {name: value} if len(value) else {}
        elif name.endswith("bytes") and value:
            found[name] = value
    return found


# Every message changes the time and these counts, also one that is refused; the others belong to the step.
PASSING = {"_now", "last_seen", "_refusals", "wrong_secrets", "_effects", "_message_bytes", "cost"}


def snapshot(value: Any, seen: dict[int, int] | None = None) -> Any:
    """Return all that a hub remembers, as plain values that can be compared. An object seen before becomes a number."""
    seen = {} if seen is None else seen
    if isinstance(value, str | int | float | bytes | None):
        return value
    if isinstance(value, dict):
        return [(snapshot(key, seen), snapshot(item, seen)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [snapshot(item, seen) for item in value]
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, LazyHeap):
        alive = [entry for entry in value.entries if value.alive.get(entry[2]) == entry[1]]
        return [(key, snapshot(item, seen)) for key, _, item in sorted(alive, key=lambda entry: entry[:2])]
    if id(value) in seen:
        return f"seen as {seen[id(value)]}"
    seen[id(value)] = len(seen)
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    else:
        names = list(getattr(type(value), "__slots__", ())) or list(getattr(value, "__dict__", ()))
    return [(name, snapshot(getattr(value, name), seen)) for name in names if name not in PASSING]


def rank_of(harness: HubHarness, keyword: str, client: Client) -> int | None:
    """Return how well a client matches a keyword: 0 is best, None is not at all."""
    return harness.hub.directory.index.ranks(keyword).get(harness.hub.directory.agents[client.agent_id])
