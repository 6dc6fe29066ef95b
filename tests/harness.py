"""A hub with a clock of its own, and programs that speak to it: what the tests of section 4 tell their stories with.

Whatever is said goes through encode and decode. The world itself sees to what holds in every story: the hub sends
nothing to a connection that has ended, and nothing that is larger than it allows others to send.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
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
    Step,
    TaskRow,
    decoder_from_agent,
    encode,
)

TICKS_MAX = 10_000  # More without the time going on is a hub that does not come to rest.


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


class World:
    """A hub, the time, and the programs whose connections are open."""

    def __init__(self, *, seed: int = 1, **settings: Any) -> None:
        settings.setdefault("heartbeat_s", 1e9)  # Nobody is silent too long, except where a story is about that.
        settings.setdefault("join_s", 1e9)
        self.now = 1000.0
        self.hub = Hub(HubSettings(**settings), entropy=random.Random(seed).randbytes, now=self.now)
        self.programs: dict[str, Program] = {}
        self.history: list[tuple[str, bytes | Close]] = []
        self.connections = 0
        self.requests = 0

    def connect(self) -> Program:
        self.connections += 1
        program = Program(self, f"connection-{self.connections}")
        self.programs[program.connection] = program
        self.apply(self.hub.connected(program.connection, self.now))
        return program

    def join(self, name: str, *capabilities: Any, **fields: Any) -> Program:
        """Connect a program and register it."""
        program = self.connect()
        program.register(name, *capabilities, **fields)
        return program

    def receive(self, connection: str, message: AgentMessage | InvalidMessage) -> None:
        if isinstance(message, InvalidMessage):
            self.apply(self.hub.receive(connection, message, self.now, 100))
        else:
            raw = encode(message)
            self.apply(self.hub.receive(connection, decoder_from_agent()(raw), self.now, len(raw)))

    def apply(self, step: Step) -> None:
        for connection, effect in step.effects:
            assert connection in self.programs, f"{effect} for a connection that has ended"
            program = self.programs[connection]
            if isinstance(effect, Close):
                self.history.append((connection, effect))
                program.close_code = effect.code
                del self.programs[connection]
            else:
                raw = encode(effect)
                assert len(raw) <= self.hub.settings.message_bytes_max, f"{len(raw)} bytes of {raw[:200]!r}"
                self.history.append((connection, raw))
                program.inbox.append(effect)

    def pass_time(self, seconds: float) -> None:
        """Let time pass the way a server does: with a tick at each deadline."""
        end = self.now + seconds
        ticks = 0
        while (due := self.hub.next_deadline()) <= end:
            ticks = ticks + 1 if due <= self.now else 0
            assert ticks < TICKS_MAX, "the hub does not come to rest"
            self.now = max(self.now, due)
            self.apply(self.hub.tick(self.now))
        self.now = end

    def is_empty(self) -> bool:
        """Tell whether the hub remembers nothing of anybody."""
        hub = self.hub
        indexes = (
            hub.directory.agents,
            hub.directory.gone,
            hub.directory.pools,
            hub.directory.index,
            hub._queues,
            hub.tasks.open,
            hub.tasks.delivered,
            hub.tasks.undelivered,
            hub._deferred,
        )
        return (
            not any(map(len, (*indexes, hub._connections, hub._deadlines)))
            and hub.tasks.bytes == hub.tasks.delivered_bytes == 0
        )


class Program:
    """One connection, and what came in on it. It speaks as an agent once it has registered."""

    def __init__(self, world: World, connection: str) -> None:
        self.world = world
        self.connection = connection
        self.inbox: list[Any] = []
        self.close_code: int | None = None
        self.registration: Any = None

    @property
    def agent_id(self) -> str:
        return str(self.registration.agent_id)

    def tell(self, message: AgentMessage | InvalidMessage) -> None:
        """Send what asks for no reply."""
        self.world.receive(self.connection, message)

    def ask(self, message: AgentMessage) -> Any:
        """Send a request, and return the one reply to it."""
        self.world.requests += 1
        message.id = f"request-{self.world.requests}"
        self.tell(message)
        replies = self.replies_to(message.id)
        assert len(replies) == 1, f"{len(replies)} replies to {message}"
        self.inbox = [message for message in self.inbox if message is not replies[0]]
        return replies[0]

    def replies_to(self, message_id: str | None) -> list[Any]:
        """Return what came in, and was not looked at, as a reply to that request."""
        return [message for message in self.inbox if getattr(message, "reply_to", None) == message_id]

    def refused(self, message: AgentMessage) -> str:
        """Send what is to be refused; return the code, having seen that nothing changed and nobody heard of it."""
        before = snapshot(self.world.hub)
        heard = len(self.world.history)
        error = self.ask(message)
        assert isinstance(error, Error), error
        assert error.task_id == getattr(message, "task_id", None)
        assert len(self.world.history) == heard + 1
        assert snapshot(self.world.hub) == before
        return error.code

    def received(self) -> list[Any]:
        """Return what came in and has not been looked at."""
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
        del self.world.programs[self.connection]
        self.world.apply(self.world.hub.disconnected(self.connection, self.world.now))

    def come_back(self, *capabilities: Any, **fields: Any) -> Program:
        """Return a new connection that has taken this agent's identity up again."""
        fields = {"agent_id": self.agent_id, "resume": self.registration.resume, **fields}
        return self.world.join(fields.pop("name", "back"), *capabilities, **fields)


# The time, who is alive and what was refused are noted whatever is said; the others belong to the step.
PASSING = {"_now", "last_seen", "_refusals", "wrong_secrets", "_effects", "_message_bytes", "cost"}


def snapshot(value: Any, seen: dict[int, int] | None = None) -> Any:
    """Return all that a hub remembers, as plain values that can be compared. What has been seen becomes its number."""
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
        alive = [entry for entry in value._entries if value._alive.get(entry[2]) == entry[1]]
        return [(key, snapshot(item, seen)) for key, _, item in sorted(alive, key=lambda entry: entry[:2])]
    if id(value) in seen:
        return f"seen as {seen[id(value)]}"
    seen[id(value)] = len(seen)
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    else:
        names = list(getattr(type(value), "__slots__", ())) or list(getattr(value, "__dict__", ()))
    return [(name, snapshot(getattr(value, name), seen)) for name in names if name not in PASSING]


def rank_of(world: World, keyword: str, program: Program) -> int | None:
    """Return how well a program matches a keyword: 0 is best, None is not at all."""
    return world.hub.directory.index.ranks(keyword).get(world.hub.directory.agents[program.agent_id])
