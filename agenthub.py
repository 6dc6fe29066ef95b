"""AgentHub: programs register what they can do, find each other, delegate tasks and get results.

One file, to install (`pip install 'agenthub[standard]'`) or to copy into a project. It needs nothing
but Python; it uses `pydantic` and `websockets` where they are installed. `python -m agenthub hub`
starts a hub; an agent is a decorated function:

    from agenthub import Agent

    agent = Agent("greeter")

    @agent.capability("greet")
    async def greet(name: str) -> str:
        return f"Hello, {name}!"

    agent.run()

Any other agent calls it with `await me.delegate("greet", {"name": "Ada"})`.

The sections, top to bottom. Each uses only those above it:

    1 Errors         the exceptions, by whose fault they are, and the codes on the wire
    2 Messages       the ten messages, their limits, validation, decode and encode, JSON Schema
    3 States         the transition tables of tasks and agents, and the priority queue with lazy deletion
    4 Hub            every decision about agents and tasks; no socket, no clock, no event loop
    5 Journal        tasks and agents in an SQLite file, so that they survive the hub
    6 Transport      links that carry messages: over a WebSocket, or in memory
    7 Server         the hub on an event loop: sockets, timers, authentication, HTTP
    8 Agent          the SDK: handlers, sessions, task handles, the connection loop
    9 Command line   hub, agent, status, call, bridge, schema, token

Where to add what: a message or a field of one, in section 2 (a class in AgentMessage or HubMessage,
and its `_on_` method in Hub); a state, in TRANSITIONS (section 3); a limit for deployers, in
HubSettings (section 4); a command, in section 9. docs/protocol.md describes the wire.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import enum
import errno
import fnmatch
import functools
import gc
import heapq
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import operator
import os
import re
import signal
import stat
import struct
import sys
import threading
import time
import types
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, NamedTuple, NoReturn, Protocol, TypeGuard, TypeVar

if typing.TYPE_CHECKING:
    import argparse
    import asyncio
    import base64
    import hashlib
    import hmac
    import pathlib
    import random
    import shutil
    import socket
    import sqlite3
    import ssl
    from asyncio import Protocol as AsyncioProtocol

    import pydantic
else:
    AsyncioProtocol = object

    class LazyModule:
        """A module imported on first use. Importing these eagerly would double import time."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            module = globals()[self._name] = importlib.import_module(self._name)
            return getattr(module, attribute)

    argparse, asyncio, base64, hashlib, hmac = map(LazyModule, ("argparse", "asyncio", "base64", "hashlib", "hmac"))
    pathlib, random, shutil, socket = map(LazyModule, ("pathlib", "random", "shutil", "socket"))

if __name__ == "__main__":
    # Run as a program, this file is the module __main__, and `import agenthub` in an agent's file makes a second copy
    # with other classes. So run the copy that others import, and stop this one here.
    sys.exit(importlib.import_module(__spec__.name if __spec__ else pathlib.Path(__file__).stem).main())

__version__ = "0.1.0"
__all__ = [
    # 1 Errors
    "AgentHubError",
    "Code",
    "Disconnected",
    "IllegalTransition",
    "InvalidMessage",
    "JournalError",
    "PackageMissing",
    "Refused",
    "TaskFailed",
    "TaskTimeout",
    # 2 Messages
    "AgentInfo",
    "Capability",
    "CloseCode",
    "ErrorInfo",
    "StatusReply",
    "TaskInfo",
    "TaskOutcome",
    # 3 States
    "AGENT_TRANSITIONS",
    "AgentEvent",
    "AgentState",
    "FINAL_STATES",
    "TRANSITIONS",
    "TaskEvent",
    "TaskState",
    # 4 Hub
    "Hub",
    "HubSettings",
    # 5 Journal
    "Journal",
    # 7 Server
    "Access",
    "Grant",
    "HubServer",
    "LocalHub",
    # 8 Agent
    "Agent",
    "Progress",
    "Task",
    "TaskHandle",
    "capability",
    "on_broadcast",
    "serve",
    # 9 Command line
    "main",
]

PROTOCOL_VERSION = 1
URL_DEFAULT = "ws://127.0.0.1:8765"


def usable_version(package: str, oldest: tuple[int, int]) -> str | None:
    """Return the version of an installed package; None if it is missing, broken, too old or AGENTHUB_BUILTIN is set."""
    if os.environ.get("AGENTHUB_BUILTIN", "0") not in ("", "0"):
        return None
    try:
        version = str(importlib.import_module(package).__version__)
    except (ImportError, AttributeError):
        return None
    except Exception as error:  # Such as a pydantic that does not match its pydantic_core.
        logging.getLogger("agenthub").warning(
            "%s is installed but broken, so the built-in parts are used; reinstall it: %s", package, error
        )
        return None
    release = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return version if release >= oldest else None


# ============================================================================================
# 1 Errors
#
#   AgentHubError
#   ├── InvalidMessage      the peer's fault: it sent something that is not a message of the protocol
#   ├── Refused             the caller's fault: the hub rejected its request
#   ├── Disconnected        nobody's fault: the connection to the hub is lost and will not come back
#   ├── TaskFailed          nobody's fault: the task ended without an output
#   │   └── TaskTimeout       ... because its time to live was over
#   ├── PackageMissing      the installation's fault: a package is not installed
#   ├── JournalError        the deployment's fault: the journal cannot be used
#   └── IllegalTransition   our fault: the table of states has no such transition
# ============================================================================================


class Code(enum.StrEnum):
    """The codes of `error` messages and of failed results, stable on the wire."""

    INVALID_MESSAGE = "invalid_message"
    UNSUPPORTED_TYPE = "unsupported_type"
    UNAUTHORIZED = "unauthorized"
    NOT_REGISTERED = "not_registered"
    UNKNOWN_AGENT = "unknown_agent"
    NO_AGENT = "no_agent"
    UNKNOWN_TASK = "unknown_task"
    DUPLICATE_TASK = "duplicate_task"
    NOT_ASSIGNED = "not_assigned"
    STALE_ATTEMPT = "stale_attempt"
    TASK_OVER = "task_over"
    TOO_LARGE = "too_large"
    TOO_DEEP = "too_deep"
    DEADLOCK = "deadlock"
    OVERLOADED = "overloaded"
    SHUTTING_DOWN = "shutting_down"
    INTERNAL = "internal"
    # Only in failed results.
    FAILED = "failed"
    CANCELLED = "cancelled"
    AGENT_LOST = "agent_lost"
    TIMEOUT = "timeout"
    NO_HANDLER = "no_handler"
    INVALID_INPUT = "invalid_input"
    HUB_LOST = "hub_lost"


class AgentHubError(Exception):
    """The base of all errors of this module. `code` is stable, for programs; `message` is for people."""

    message: str
    code: str

    def __init__(self, message: str, *, code: str = Code.INTERNAL) -> None:
        super().__init__(message)
        self.message = message
        self.code = str(code)


class InvalidMessage(AgentHubError):
    """A peer sent something that is not a message of the protocol. `reply_to` is its id, if that was readable."""

    reply_to: str | None

    def __init__(self, message: str, *, code: str = Code.INVALID_MESSAGE, reply_to: str | None = None) -> None:
        super().__init__(message, code=code)
        self.reply_to = reply_to


class Refused(AgentHubError):
    """The hub rejected a request, which had no effect. `task_id` is the task that it was about, if any."""

    task_id: str | None

    def __init__(self, message: str, *, code: str, task_id: str | None = None) -> None:
        super().__init__(message, code=code)
        self.task_id = task_id


class Disconnected(AgentHubError):
    """The connection to the hub is lost. `close_code` is the close code of the WebSocket, if it had one."""

    close_code: int | None

    def __init__(self, message: str, *, close_code: int | None = None) -> None:
        super().__init__(message, code=Code.HUB_LOST)
        self.close_code = close_code


class TaskFailed(AgentHubError):
    """A task ended without an output. A handler raises it to fail its task with a code of its choice."""

    task_id: str | None

    def __init__(self, message: str, *, code: str = Code.FAILED, task_id: str | None = None) -> None:
        super().__init__(message, code=code)
        self.task_id = task_id


class TaskTimeout(TaskFailed):
    """A task did not end within its time to live."""

    def __init__(self, message: str, *, task_id: str | None = None) -> None:
        super().__init__(message, code=Code.TIMEOUT, task_id=task_id)


class PackageMissing(AgentHubError, ImportError):
    """A feature needs a package that is not installed. The message names the command that installs it."""

    def __init__(self, package: str, purpose: str) -> None:
        AgentHubError.__init__(self, f"{purpose} needs the package {package}: pip install {package}")


class JournalError(AgentHubError):
    """A journal cannot be used: it is not one, damaged, of another version or in use. The file was not changed."""


class IllegalTransition(AgentHubError):
    """The table of states has no such transition: a bug in the hub. Nothing has changed."""


# ============================================================================================
# 2 Messages
#
# Ten types go over the wire. Each class below is one type in one direction:
#
#   type            agent -> hub    hub -> agent
#   register        Register        Registered
#   deregister      Deregister      Deregistered
#   discover        Discover        Discovered
#   delegate        Delegate        Delegated       (to the worker)
#   result          Result          TaskOutcome     (to the requester)
#   status          Status          StatusReply, TaskAck
#   broadcast       Broadcast       BroadcastReply, BroadcastDelivery
#   heartbeat       Heartbeat
#   heartbeat_ack                   HeartbeatAck
#   error                           Error
#
# The annotations of their fields are the only place where limits are written. Everything else is
# derived from them: Pydantic's validators, the built-in ones, and the JSON Schema.
#
# A payload (a field annotated Json) is any JSON. In a message that came in it is bytes: its JSON
# text as it came, checked but not changed; the SDK parses it with `value_of` when it is first read.
# In a message that is made here it may also be a value.
#
# Reading a message, in `decoder`:
#
#   1. A codec makes a message of the bytes: MsgspecCodec or PydanticCodec where it is installed.
#   2. What that rejects, or is not sure of, the built-in codec decides. It also words the reason of
#      every rejection, so that the texts do not depend on what is installed.
#   3. What a parser lets through shows in the bytes: NaN, numbers that other languages cannot
#      read, and deep nesting. So payloads are not walked, unless their bytes look suspicious.
#
# Writing is one function a class, compiled from its fields (Encoders). It leaves out the fields
# that are None, except in the classes of KEEP_NULLS.
# ============================================================================================


class CloseCode(enum.IntEnum):
    """The WebSocket close codes that the hub uses."""

    DONE = 1000
    GOING_AWAY = 1001
    NOT_ALLOWED = 1008
    TOO_BIG = 1009
    REPLACED = 4000  # A newer connection resumed the session.
    SILENT = 4001  # No message for three heartbeat intervals, or no first message in time.
    NOT_READING = 4002  # A slow consumer: its backlog exceeds the limit.


MESSAGE_BYTES_MAX = 1_048_576  # The default; a hub announces its own.
MESSAGE_BYTES_MIN = 1024  # The least that the limit may be set to.
ENVELOPE_BYTES = 1024  # The most that the hub adds to a message when it passes it on.
REF_BYTES = 168  # The most that a task takes in the reply to `register`.
TTL_MAX_S = 604_800  # A week.
TEXT_MAX = 65_536  # Characters of an error's text.
DEPTH_MAX = 64  # Nesting of a field's value. Parsers of other languages stop at about 100.
DEPTH_OF_REPLY = 5  # What the hub puts around a value: agents[].capabilities[].input_schema.
INTEGER_MIN, INTEGER_MAX = -(2**63), 2**64 - 1  # 64 bits, signed or unsigned.

# The characters that a text may hold, as regular expressions that Python, Rust and ECMAScript read alike.
ID_PATTERN = "^[A-Za-z0-9_.:-]+$"
# Without control characters, line separators, annotations and Unicode 16's Default_Ignorable_Code_Point: invisible
# characters (zero-width, bidi, fillers, tags) make two different names look the same.
VISIBLE_PATTERN = (
    r"^[^\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]*$"
)
NO_NUL_PATTERN = r"^[^\x00]*$"
PATTERNS: Mapping[str, str] = {
    ID_PATTERN: "may hold ASCII letters, digits and _ . : - only",
    VISIBLE_PATTERN: "may not hold control characters or invisible ones",
    NO_NUL_PATTERN: "may not hold the character NUL",
}
JSON_TYPES: Mapping[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    types.NoneType: "null",
    list: "array",
    dict: "object",
}


Made = TypeVar("Made", bound=type)
Kind = TypeVar("Kind")


class ValidationError(ValueError):
    """A value does not fit. `path` leads to the wrong part; `kinds` are its possible types, if its type is wrong."""

    def __init__(self, reason: str, *path: str, kinds: tuple[Any, ...] = (), code: str = Code.INVALID_MESSAGE) -> None:
        super().__init__(reason)
        self.reason, self.path, self.kinds, self.code = reason, path, kinds, code
        self.document: dict[str, Any] | None = None  # The message that was rejected, as far as it was parsed.

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}: {self.reason}" if self.path else self.reason

    @classmethod
    def of_type(cls, *kinds: Any) -> ValidationError:
        """Return the error of a value that has none of these types."""
        return cls(f"must be of type {' or '.join(JSON_TYPES[kind] for kind in kinds)}", kinds=kinds)

    def within(self, part: str) -> ValidationError:
        """Return the same error, as one of the whole that holds `part`."""
        return ValidationError(self.reason, part, *self.path)


def check_json(value: Any, depth: int = DEPTH_MAX) -> Any:
    """Return `value` if it is JSON that every language can read, at most `depth` deep; raise ValidationError if not."""
    if type(value) in SCALARS:
        return value
    if isinstance(value, dict):
        items: Iterable[Any] = value.values()
        if not (set(map(type, value)) <= {str} or all(isinstance(key, str | int) for key in value)):
            raise ValidationError("holds an object with a key that is neither a string nor an integer")
    elif isinstance(value, list | tuple):
        items = value
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValidationError("holds a number that is not finite")
        return value
    elif isinstance(value, int):
        if not INTEGER_MIN <= value <= INTEGER_MAX:
            raise ValidationError("holds an integer of more than 64 bits; send it as a string")
        return value
    elif isinstance(value, str):
        return value
    else:
        raise ValidationError(f"holds a {type(value).__name__}, which is not JSON")
    if depth == 0:
        raise ValidationError(f"is nested more than {DEPTH_MAX} deep")
    for item in items:
        kind = type(item)
        if kind not in SCALARS and not (kind is int and INTEGER_MIN <= item <= INTEGER_MAX):
            check_json(item, depth - 1)
    return value


SCALARS = frozenset((str, bool, types.NoneType))  # Types whose every value is JSON.
ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # In JSON, where a literal backslash is written twice.
_compiled = functools.cache(re.compile)


@dataclass(frozen=True, slots=True)
class Limit:
    """The limits of a string (one of PATTERNS, and a length), a list (length) or a number (value), for `Annotated`."""

    pattern: str | None = None
    min_length: int | None = None
    max_length: int | None = None
    gt: float | None = None
    ge: float | None = None
    le: float | None = None

    def problem_of_size(self, value: str | list[Any]) -> str | None:
        """Return how a string or a list exceeds this limit; None if it does not."""
        least, most = self.min_length or 0, self.max_length
        if most is not None and not least <= len(value) <= most:
            unit = "characters" if isinstance(value, str) else "items"
            return f"must have {f'{least} to' if least else 'at most'} {most} {unit}"
        if self.pattern is not None and not _compiled(self.pattern).fullmatch(value):
            return PATTERNS[self.pattern]
        return None

    def problem_of_number(self, value: float) -> str | None:
        """Return how a number exceeds this limit; None if it does not."""
        if self.gt is not None and not value > self.gt:
            return f"must be greater than {self.gt}"
        if self.ge is not None and not value >= self.ge:
            return f"must be at least {self.ge}"
        if self.le is not None and not value <= self.le:
            return f"must be at most {self.le}"
        return None

    def validator(self, validate: Validator) -> Validator:
        """Return `validate`, limited."""
        is_of_size = self.gt is self.ge is self.le is None
        problem_of: Callable[[Any], str | None] = self.problem_of_size if is_of_size else self.problem_of_number
        most = -1 if self.max_length is None or not is_of_size else self.max_length
        fits = _compiled(self.pattern or "(?s:.*)").fullmatch

        def validate_limited(value: Any) -> Any:
            if type(value) is str and 0 < len(value) <= most and fits(value):  # As most are.
                return value
            value = validate(value)
            problem = problem_of(value)
            if problem is not None:
                raise ValidationError(problem)
            return value

        return validate_limited

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        limits = ((name, getattr(self, name)) for name in self.__slots__)
        return handler(source) | {name: limit for name, limit in limits if limit is not None}


@dataclass(frozen=True, slots=True)
class JsonLimit:
    """Any JSON. What the hub itself reads has at most `bytes_max` bytes, and no NUL.

    Without `bytes_max` it is a payload, whose numbers and depth `decoder` checks in the bytes of the message.
    """

    bytes_max: int | None = None

    def check(self, value: Any) -> Any:
        """Return `value`; raise ValidationError if it exceeds this limit, or is not JSON that every language reads."""
        try:
            text = json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            text = json.dumps(check_json(value))  # Says what is wrong.
        if self.bytes_max is not None and len(text) > self.bytes_max:
            raise ValidationError(f"is larger than {self.bytes_max} bytes")
        check_json(value)
        if ESCAPED_NUL.search(text):
            raise ValidationError(PATTERNS[NO_NUL_PATTERN])
        return value

    def validator(self, validate: Validator) -> Validator:
        """Return `validate`, limited."""
        return validate if self.bytes_max is None else lambda value: self.check(validate(value))

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        if self.bytes_max is None:
            return handler(source)
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.check, handler(source))


def check_text(field: str, text: str, pattern: str, max_length: int = 128) -> str:
    """Return a text of 1 to `max_length` characters that fits one of PATTERNS; raise ValueError if it does not."""
    problem = Limit(pattern, 1, max_length).problem_of_size(text)
    if problem is None and re.search("[\ud800-\udfff]", text):
        problem = "may not hold half of a surrogate pair"
    if problem is not None:
        raise ValueError(f"{field} {problem}")
    return text


def escape_unprintable(text: str) -> str:
    """Return foreign text with its control characters escaped, for logs and terminals."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


@functools.lru_cache(maxsize=128)
def slugify(text: str, max_length: int) -> str:
    """Return the part of a text that an id may hold."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)[:max_length].strip("-")


Id = Annotated[str, Limit(pattern=ID_PATTERN, min_length=1, max_length=128)]
RequestId = Annotated[str, Limit(pattern=NO_NUL_PATTERN, min_length=1, max_length=128)]  # Only its sender sees it.
ResumeSecret = Annotated[str, Limit(pattern=NO_NUL_PATTERN, min_length=1, max_length=128)]  # Issued by the hub.
Name = Annotated[str, Limit(pattern=VISIBLE_PATTERN, min_length=1, max_length=128)]
Keyword = Annotated[str, Limit(pattern=NO_NUL_PATTERN, max_length=128)]
Description = Annotated[str, Limit(pattern=NO_NUL_PATTERN, max_length=4096)]
Text = Annotated[str, Limit(pattern=NO_NUL_PATTERN, max_length=TEXT_MAX)]
Json = Annotated[Any, JsonLimit()]
Schema = Annotated[dict[str, Any], JsonLimit(bytes_max=65_536)]
Metadata = Annotated[dict[str, Any], JsonLimit(bytes_max=4096)]
Seconds = Annotated[float, Limit(gt=0, le=TTL_MAX_S)]
Fraction = Annotated[float, Limit(ge=0, le=1)]
Priority = Annotated[int, Limit(ge=-100, le=100)]
Retries = Annotated[int, Limit(ge=0, le=100)]
Attempt = Annotated[int, Limit(ge=1, le=1_000_000)]
TaskLimit = Annotated[int, Limit(ge=1, le=10_000)]


@typing.dataclass_transform(kw_only_default=True)
def record(made: type[Kind]) -> type[Kind]:
    """Make a dataclass with slots. `dataclass` would compile `==` and `repr` of each class: 3 ms of the import."""
    shared: Any = made
    shared.__eq__, shared.__hash__, shared.__repr__ = equal_fields, None, repr_of_fields
    return dataclass(slots=True, kw_only=True, eq=False, repr=False)(made)


def equal_fields(one: Any, other: Any) -> Any:
    if type(one) is not type(other):
        return NotImplemented
    return all(getattr(one, name) == getattr(other, name) for name in one.__slots__)


def repr_of_fields(one: Any) -> str:
    fields = ", ".join(f"{name}={getattr(one, name)!r}" for name in one.__slots__)
    return f"{type(one).__qualname__}({fields})"


@dataclass(slots=True)
class Capability:
    """Something that an agent offers to do. The schemas are JSON Schemas of a task's input and output."""

    name: Name
    description: Description = ""
    input_schema: Schema | None = None
    output_schema: Schema | None = None


@dataclass(slots=True)
class ErrorInfo:
    """Why a task failed."""

    code: Name
    message: Text = ""


@dataclass(slots=True)
class TaskRef:
    """A task in progress at an agent, and its current attempt."""

    task_id: str
    attempt: int


@dataclass(slots=True)
class AgentInfo:
    """What agents see of one another. `running` and `max_tasks` are counts of tasks."""

    agent_id: str
    name: str
    description: str
    capabilities: list[Capability]
    running: int
    max_tasks: int
    metadata: dict[str, Any]


@record
class TaskInfo:
    """What every agent may see of a task: no input, output or error text.

    `agent_id` is its assignee, or the agent that it waits for; `ttl` the seconds left, `age_s` the seconds since
    the hub accepted it; `code` the reason of its failure.
    """

    task_id: str
    state: str
    requester: str
    agent_id: str | None = None
    capability: str | None = None
    attempt: int
    priority: int
    max_retries: int
    parent_id: str | None = None
    ttl: float
    age_s: float
    progress: float | None = None
    code: str | None = None


# What agents send.


@record
class Register:
    """Join, resume a session (`agent_id` with its secret, `resume`), or change what this connection registered."""

    type: Literal["register"] = "register"
    id: RequestId | None = None
    name: Name
    description: Description = ""
    capabilities: Annotated[list[Name | Capability], Limit(max_length=64)] = field(default_factory=list)
    max_tasks: TaskLimit = 16
    metadata: Metadata = field(default_factory=dict)
    agent_id: Id | None = None
    resume: ResumeSecret | None = None


@record
class Deregister:
    """Leave: at once, or with `drain` after the last task."""

    type: Literal["deregister"] = "deregister"
    id: RequestId | None = None
    drain: bool = False


@record
class Discover:
    """Find online agents by a keyword in their capabilities; an empty one finds all."""

    type: Literal["discover"] = "discover"
    id: RequestId | None = None
    capability: Keyword = ""
    limit: Annotated[int, Limit(ge=1, le=1000)] = 100


@record
class Delegate:
    """Hand over a task to `agent_id`, or to the least loaded agent that offers `capability`. `ttl` is in seconds."""

    type: Literal["delegate"] = "delegate"
    id: RequestId | None = None
    task_id: Id
    agent_id: Id | None = None
    capability: Name | None = None
    input: Json = None
    ttl: Seconds = 300.0
    priority: Priority = 0
    max_retries: Retries = 0
    parent_id: Id | None = None
    wait: bool = False


@record
class Result:
    """End a task: the worker's outcome, or a requester's cancellation (`success` is false)."""

    type: Literal["result"] = "result"
    id: RequestId | None = None
    task_id: Id
    success: bool
    output: Json = None
    error: Text | ErrorInfo | None = None
    attempt: Attempt | None = None


@record
class Status:
    """Ask for the hub's status, one task or the list of `tasks`; or report the `progress` of a task."""

    type: Literal["status"] = "status"
    id: RequestId | None = None
    task_id: Id | None = None
    tasks: bool = False
    progress: Fraction | None = None
    detail: Json = None


@record
class Broadcast:
    """Send any JSON to all other agents, or to those that offer `capability`."""

    type: Literal["broadcast"] = "broadcast"
    id: RequestId | None = None
    message: Json
    capability: Name | None = None


@record
class Heartbeat:
    """Show that this agent is alive."""

    type: Literal["heartbeat"] = "heartbeat"
    id: RequestId | None = None


# Sent by the hub. A reply carries the `id` of its request as `reply_to`.


@record
class Registered:
    """The session: `resume` is its secret, `heartbeat_s` the interval, `tasks` those that the hub holds to be in
    progress at this agent.
    """

    type: Literal["register"] = "register"
    reply_to: str | None = None
    agent_id: Id
    resume: Id
    heartbeat_s: Annotated[float, Limit(gt=0)]
    max_bytes: Annotated[int, Limit(ge=MESSAGE_BYTES_MIN)]
    tasks: list[TaskRef]


@record
class Deregistered:
    """The agent left; the hub closes the connection."""

    type: Literal["deregister"] = "deregister"
    reply_to: str | None = None


@record
class Discovered:
    """The agents found, best match first. `total` also counts those beyond the limit."""

    type: Literal["discover"] = "discover"
    reply_to: str | None = None
    agents: list[AgentInfo]
    total: int


@record
class Delegated:
    """A task, delivered to its worker. `ttl` is the seconds left, `attempt` counts deliveries from 1."""

    type: Literal["delegate"] = "delegate"
    task_id: str
    sender: str
    agent_id: str
    capability: str | None = None
    input: Json = None
    ttl: float
    priority: int
    max_retries: int
    parent_id: str | None = None
    attempt: int


@record
class TaskOutcome:
    """A task's outcome, delivered to its requester. `sender` is None if the hub itself ended the task."""

    type: Literal["result"] = "result"
    task_id: str
    sender: str | None = None
    success: bool
    state: str
    output: Json = None
    error: ErrorInfo | None = None
    attempt: int


@record
class StatusReply:
    """The status of the hub, of all tasks or of one; a worker's progress; or, to a worker, the end of its task.

    The fields of one task are those of TaskInfo. Only its requester and its assignee see `input`, `output`, `error`
    and `detail`.
    """

    type: Literal["status"] = "status"
    reply_to: str | None = None
    hub: dict[str, Any] | None = None
    tasks: list[TaskInfo] | None = None
    total: int | None = None
    task_id: str | None = None
    state: str | None = None
    requester: str | None = None
    agent_id: str | None = None
    capability: str | None = None
    attempt: int | None = None
    priority: int | None = None
    max_retries: int | None = None
    parent_id: str | None = None
    ttl: float | None = None
    age_s: float | None = None
    code: str | None = None
    sender: str | None = None
    seq: int | None = None
    progress: float | None = None
    detail: Any = None
    input: Any = None
    output: Any = None
    error: ErrorInfo | None = None


@record
class TaskAck:
    """The few fields of StatusReply that acknowledge a task: the message that a hub writes most often."""

    type: Literal["status"] = "status"
    reply_to: str | None = None
    task_id: str
    state: str
    attempt: int


@record
class BroadcastReply:
    """A broadcast (`message`, `sender`), or the reply to its sender (`recipients`)."""

    type: Literal["broadcast"] = "broadcast"
    reply_to: str | None = None
    recipients: int | None = None
    sender: str | None = None
    message: Json = None
    capability: str | None = None


@record
class BroadcastDelivery:
    """The fields of BroadcastReply that its recipients get."""

    type: Literal["broadcast"] = "broadcast"
    sender: str
    message: Any
    capability: str | None


@record
class HeartbeatAck:
    """The reply to a heartbeat."""

    type: Literal["heartbeat_ack"] = "heartbeat_ack"
    reply_to: str | None = None


@record
class Error:
    """A request was rejected and had no effect. `code` is one of Code."""

    type: Literal["error"] = "error"
    reply_to: str | None = None
    code: str
    message: str
    task_id: str | None = None


def has_default(one: dataclasses.Field[Any]) -> bool:
    return one.default is not dataclasses.MISSING or one.default_factory is not dataclasses.MISSING


def quick_maker(made: Made) -> Made:
    """Return a function that makes objects of a dataclass as calling the class does, but in half the time.

    Before Python 3.13, a call of a class passes its keywords on in a dict.
    """
    fields = dataclasses.fields(typing.cast(Any, made))
    scope: dict[str, Any] = {"made": made, "new": object.__new__}
    scope |= {f"default_{one.name}": one.default for one in fields}
    required = [one.name for one in fields if not has_default(one)]
    optional = [f"{one.name}=default_{one.name}" for one in fields if has_default(one)]
    body = "".join(f"    it.{one.name} = {one.name}\n" for one in fields)
    exec(f"def make({', '.join([*required, *optional])}):\n    it = new(made)\n{body}    return it\n", scope)
    return typing.cast(Made, scope["make"])


make_delegated = quick_maker(Delegated)
make_outcome = quick_maker(TaskOutcome)
make_ack = quick_maker(TaskAck)

AgentMessage = Register | Deregister | Discover | Delegate | Result | Status | Broadcast | Heartbeat
HubMessage = (
    Registered
    | Deregistered
    | Discovered
    | Delegated
    | TaskOutcome
    | StatusReply
    | BroadcastReply
    | HeartbeatAck
    | Error
)
HubOutput = HubMessage | TaskAck | BroadcastDelivery  # Agents read the last two as StatusReply and BroadcastReply.
KEEP_NULLS = (Broadcast, Delegated, TaskOutcome, BroadcastDelivery)


# The built-in validator: one function for each kind of annotation, for the messages above and for the parameters of
# handlers (section 8). It rejects a value by the first thing that is wrong with it.

Validator = Callable[[Any], Any]  # Returns the value as its annotation has it, or raises ValidationError.


def accept(value: Any) -> Any:
    """Return `value`, whatever it is."""
    return value


def validator_for(
    annotation: Any,
    of_class: Callable[[Any], Validator] = lambda kind: accept,
    validate_integer: Validator | None = None,
) -> Validator:
    """Return the validator of an annotation. `of_class` makes those of the types that JSON does not have.

    The numbers that are integers are by default those of Python, for which 3.0 is none.
    """
    part = functools.partial(validator_for, of_class=of_class, validate_integer=validate_integer)
    kind, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind is Annotated and typing.get_origin(arguments[0]) is list:
        (item,) = typing.get_args(arguments[0])
        return list_validator(part(item), arguments[1])
    if kind is Annotated:
        limit: Limit | JsonLimit = arguments[1]
        return limit.validator(part(arguments[0]))
    if kind in (typing.Union, types.UnionType):
        branches = [part(branch) for branch in arguments if branch is not types.NoneType]
        return union_validator(branches, is_nullable=types.NoneType in arguments)
    if kind is Literal:
        return literal_validator(arguments)
    if kind is list and arguments:
        return list_validator(part(arguments[0]), Limit())
    if kind is dict and arguments:
        return dict_validator(part(arguments[1]))
    if kind is float:
        return validate_number
    if kind is int and validate_integer is not None:
        return validate_integer
    if json_type(kind) is not None:
        return type_validator(kind)
    return accept if kind is Any else of_class(kind)


def json_type(kind: Any) -> str | None:
    """Return the name of a Python type in JSON Schema; None if JSON does not have it."""
    return JSON_TYPES.get(kind) if isinstance(kind, Hashable) else None


def type_validator(kind: type) -> Validator:
    def validate(value: Any) -> Any:
        if type(value) is not kind:
            raise ValidationError.of_type(kind)
        return value

    return validate


def validate_whole(value: Any) -> Any:
    """Return an integer as JSON Schema has it: also 3.0 is one."""
    if type(value) is float and value.is_integer():
        return int(value)
    if type(value) is not int:
        raise ValidationError.of_type(int)
    return value


def validate_number(value: Any) -> Any:
    """Return a finite number, as a float."""
    if type(value) is int:
        value = float(value) if abs(value) <= sys.float_info.max else math.inf
    elif type(value) is not float:
        raise ValidationError.of_type(float)
    if not math.isfinite(value):
        raise ValidationError("must be a finite number")
    return value


def literal_validator(literals: tuple[Any, ...]) -> Validator:
    def validate(value: Any) -> Any:
        if value not in literals:
            raise ValidationError(f"must be one of {json.dumps(literals)}")
        return value

    return validate


def list_validator(validate_item: Validator, limit: Limit) -> Validator:
    def validate(value: Any) -> Any:
        if type(value) is not list:
            raise ValidationError.of_type(list)
        problem = limit.problem_of_size(value)  # First, because there may be a million items.
        if problem is not None:
            raise ValidationError(problem)
        items: list[Any] = []
        try:
            for item in value:
                items.append(validate_item(item))
        except ValidationError as error:
            raise error.within(str(len(items))) from None
        return items

    return validate


def dict_validator(validate_item: Validator) -> Validator:
    def validate(value: Any) -> Any:
        if type(value) is not dict:
            raise ValidationError.of_type(dict)
        try:
            return value if validate_item is accept else {key: validate_item(item) for key, item in value.items()}
        except ValidationError as error:
            raise error.within("*") from None  # An error never repeats a key: it may be a secret.

    return validate


def union_validator(branches: list[Validator], *, is_nullable: bool) -> Validator:
    """Return the validator of a value that fits one of several annotations: the first that accepts it."""

    def validate(value: Any) -> Any:
        if value is None and is_nullable:
            return None
        errors = []
        for branch in branches:
            try:
                return branch(value)
            except ValidationError as error:
                errors.append(error)
        of_the_right_type = [error for error in errors if not error.kinds]
        if of_the_right_type:
            raise max(of_the_right_type, key=lambda error: len(error.path))
        kinds = [kind for error in errors for kind in error.kinds]
        raise ValidationError.of_type(*kinds, *[types.NoneType] * is_nullable)

    return validate


def object_validator(
    make: Callable[..., Any], fields: list[tuple[str, Validator, bool]], *, is_open: bool = True
) -> Validator:
    """Return the validator of an object that becomes `make(**fields)`.

    `fields` has the name, the validator and whether it is required, of each. Other fields are ignored if the object
    `is_open`, and rejected if it is not.
    """
    names = dict.fromkeys(name for name, _, _ in fields)

    def validate(value: Any) -> Any:
        if type(value) is not dict:
            raise ValidationError.of_type(dict)
        found = {}
        for name, validate_field, is_required in fields:
            if name in value:
                try:
                    found[name] = validate_field(value[name])
                except ValidationError as error:
                    raise error.within(name) from None
            elif is_required:
                raise ValidationError("is required", name)
        if not is_open and not value.keys() <= names.keys():
            raise ValidationError(f"has a field that is not one of {', '.join(names) or 'none'}")
        return make(**found)

    return validate


@functools.cache
def class_validator(made: Any) -> Validator:
    """Return the validator of an object that becomes a `made`: a message, or a part of one."""
    fields = [
        (one.name, validator_for(hint, class_validator), not has_default(one)) for one, hint in hints_of_fields(made)
    ]
    return object_validator(made, fields)


# From bytes to messages. A fast codec, of msgspec or Pydantic, may reject a message only because it is unusual: the
# built-in one decides then. So all accept the same messages; tests/test_builtin_messages.py compares them.

NUMBER_SHAPES = bytes.maketrans(b"123456789+E", b"0000000000e")  # 0 stands for any digit, and for a plus.
SURROGATE_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
SPACE = r"[ \t\n\r]*+"
# As most fields are before the payload: strings without escapes, and numbers.
PLAIN_FIELDS = (
    rf'(?:{SPACE}"(?!(?:type|input|output|detail|message)")[^"\\]*+"{SPACE}:{SPACE}'
    rf'(?:"[^"\\]*+"|[-+.0-9a-zA-Z]++){SPACE},)*+{SPACE}'
)
# The beginning of a message up to its payload, as most are: its type first.
HEAD_OF_PAYLOAD = re.compile(
    rf'{SPACE}\{{{SPACE}"type"{SPACE}:{SPACE}"([a-z]+)"{SPACE},{PLAIN_FIELDS}"(input|output|detail|message)"{SPACE}:{SPACE}'
)
LARGE_BYTES = 65_536  # Of a message that may have so many parts that garbage is collected while it is parsed.
QUOTE = ord('"')
NEXT_VALUE = re.compile(rf"{SPACE}:{SPACE}")
NEXT_FIELD = re.compile(rf"{SPACE}[,{{}}]{PLAIN_FIELDS}")


class Codec(Protocol):
    """One way to parse messages."""

    name: str

    def loads(self, payload: bytes, /) -> Any:
        """Return the value of a payload."""

    def parser(self, union: Any, depth_max: int, decide: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        """Return the function that makes a message of `union` from bytes, its payload still bytes.

        What it would reject, it leaves to `decide`.
        """


class BuiltinCodec:
    """Parse messages with nothing but the standard library. It decides what is accepted, and words why not."""

    name = "built in"
    loads: Callable[[bytes], Any] = staticmethod(json.loads)

    def parser(self, union: Any, depth_max: int, decide: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        return decide

    @staticmethod
    def strict_parser(union: Any, depth_max: int) -> Callable[[bytes], Any]:
        """Return the function that makes a message of `union` from bytes, or raises ValidationError."""
        validators = {type_of(message): class_validator(message) for message in typing.get_args(union)}
        types_known = ", ".join(sorted(validators))

        def read(text: str) -> Any:
            document = parse_json(text)
            if type(document) is not dict:
                raise ValidationError.of_type(dict).within("message")
            tag = document.get("type")
            if type(tag) is not str:
                raise ValidationError(f"must be a string, one of {types_known}", "type")
            if tag not in validators:
                raise ValidationError(f"must be one of {types_known}", "type", code=Code.UNSUPPORTED_TYPE)
            try:
                return validators[tag](document)
            except ValidationError as error:
                error.document = document
                raise

        return payload_parser(union, depth_max, read)


class PydanticCodec:
    """Parse messages with Pydantic, from the same annotations.

    Strict: no string or bool for a number, and no number that is not finite.
    """

    def __init__(self, version: str) -> None:
        import pydantic
        import pydantic_core

        self.name = f"pydantic {version}"
        self._rejected = pydantic.ValidationError, ValidationError
        self._from_json = pydantic_core.from_json
        self._adapter = pydantic.TypeAdapter
        self._discriminator = pydantic.Field(discriminator="type")
        self._config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)

    def parser(self, union: Any, depth_max: int, decide: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        one_of = typing.cast(Any, Annotated[union, self._discriminator])
        adapter: pydantic.TypeAdapter[Any] = self._adapter(one_of, config=self._config)
        parse, rejected = payload_parser(union, depth_max, adapter.validator.validate_json), self._rejected

        def parse_or_leave(raw: bytes) -> Any:
            try:
                return parse(raw)
            except rejected:
                return decide(raw)

        return parse_or_leave

    def loads(self, payload: bytes, /) -> Any:
        try:
            return self._from_json(payload)
        except ValueError:  # Before the point, a number may have more digits than Pydantic takes.
            return json.loads(payload)


class MsgspecCodec:
    """Parse messages with msgspec, from the same annotations. Of a payload it checks only the syntax."""

    def __init__(self, version: str) -> None:
        import msgspec

        self.name = f"msgspec {version}"
        self.loads: Callable[[bytes], Any] = msgspec.json.decode
        self._msgspec = msgspec

    def parser(self, union: Any, depth_max: int, decide: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        payloads = {message: payload_name(message) for message in typing.get_args(union)}
        makers: dict[Any, Callable[[Any], Any]] = {}  # By the class of what msgspec returns.
        decode_any = self._decoder(union, makers)
        decode_plain = self._decoder(union, makers, skipped=(VISIBLE_PATTERN, NO_NUL_PATTERN))
        rejected = self._msgspec.DecodeError, ValidationError, UnicodeDecodeError, RecursionError

        def parse(raw: bytes) -> Any:
            try:
                if raw.isascii() and b"\\" not in raw and b"\x7f" not in raw:
                    struct = decode_plain(raw)  # No character in it is invisible.
                else:
                    raw.decode()  # msgspec does not decode what it leaves as it is.
                    struct = decode_any(raw)
                message = makers[struct.__class__](struct)
                name = payloads[message.__class__]
                payload = getattr(message, name) if name is not None else None
                if len(raw) - len(payload or b"") > 2 * depth_max and looks_suspicious(raw):
                    return decide(raw)  # About a field that no message has and msgspec has skipped.
                return message
            except rejected:
                return decide(raw)

        return parse

    def _decoder(self, union: Any, makers: dict[Any, Any], skipped: Collection[str] = ()) -> Callable[[bytes], Any]:
        """Return a function that decodes all but the payload, without checking the patterns in `skipped`."""
        found = [self._struct_and_maker(message, skipped) for message in typing.get_args(union)]
        makers.update(found)
        union_of_structs = functools.reduce(operator.or_, (struct for struct, _ in found))
        decoder = self._msgspec.json.Decoder(union_of_structs)
        return typing.cast(Callable[[bytes], Any], decoder.decode)

    def _struct_and_maker(self, message: Any, skipped: Collection[str]) -> tuple[Any, Callable[[Any], Any]]:
        """Return the msgspec.Struct with the fields of a message, and the function that makes the message of one."""
        has_factory = any(one.default_factory is not dataclasses.MISSING for one in dataclasses.fields(message))
        make = message if has_factory else quick_maker(message)
        fields: list[Any] = []
        arguments = []
        scope: dict[str, Any] = {"make": make, "payload_in": payload_in, "reject": reject_pattern}
        for one, hint in hints_of_fields(message):
            if one.name == "type":
                continue
            scalar = self._scalar(hint)
            default: dict[str, Any] = {"default": one.default} if has_default(one) else {}
            if one.default_factory is not dataclasses.MISSING:
                default = {"default_factory": one.default_factory}
            argument, pattern = f"struct.{one.name}", pattern_of(hint)
            if hint == Json:
                scalar, argument = self._msgspec.Raw, f"payload_in({argument})"
                default = {} if not default else {"default": self._msgspec.Raw(b"null")}
            elif scalar is None:
                scope[f"validate_{one.name}"] = validator_for(hint, class_validator)
                if_given = f"None if {argument} is None else " if one.default is None else ""
                scalar, argument = Any, f"{if_given}validate_{one.name}({argument})"
            elif pattern is not None and pattern not in skipped:
                scope[f"fits_{one.name}"] = _compiled(pattern).fullmatch
                argument = f"{argument} if {argument} is None or fits_{one.name}({argument}) else reject()"
            fields.append((one.name, scalar, self._msgspec.field(**default)))
            arguments.append(f"{one.name}={argument}")
        struct = self._msgspec.defstruct(
            message.__name__, fields, kw_only=True, tag=type_of(message), tag_field="type", gc=False
        )
        return struct, eval(f"lambda struct: make({', '.join(arguments)})", scope)

    def _scalar(self, hint: Any) -> Any:
        """Return the annotation of a string, a number or a boolean as msgspec has it; None for any other."""
        arguments = typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            scalars = [self._scalar(one) for one in arguments if one is not types.NoneType]
            return scalars[0] | None if len(scalars) == 1 < len(arguments) and scalars[0] is not None else None
        if typing.get_origin(hint) is Annotated and isinstance(arguments[1], Limit):
            limits = {name: getattr(arguments[1], name) for name in Limit.__slots__ if name != "pattern"}
            kind = self._scalar(arguments[0])
            return kind and Annotated[kind, self._msgspec.Meta(**limits)]
        return hint if hint in (str, int, float, bool) else None


@functools.cache
def codec() -> Codec:
    """Return the codec in use. It is made at the first use: importing this module imports no package."""
    if version := usable_version("msgspec", oldest=(0, 19)):
        return MsgspecCodec(version)
    if version := usable_version("pydantic", oldest=(2, 11)):
        return PydanticCodec(version)
    return BuiltinCodec()


scan_json = json.JSONDecoder().raw_decode  # From a position on; returns the end too.
decode_json = json.JSONDecoder().decode


def parse_json(text: str) -> Any:
    """Return the value of some JSON; raise ValidationError if it is none.

    This reads NaN and the infinities too, so that the reason of a rejection can name their field.
    """
    try:
        return decode_json(text)
    except (ValueError, RecursionError) as error:
        raise not_json(error) from None


def not_json(error: Exception) -> ValidationError:
    return ValidationError(f"Invalid JSON: {'it is nested too deep' if isinstance(error, RecursionError) else error}")


def has_constant(text: str) -> bool:
    """Return whether some JSON may hold NaN or an infinity."""
    return "NaN" in text or "nfinity" in text


def refuse_constants(text: str, name: str | None, payload: bytes | None) -> None:
    """Raise ValidationError if some JSON holds NaN or an infinity, also in a field that no message has.

    Pydantic ignores them there. If the payload in field `name` holds one, the error says so.
    """

    def refuse(constant: str) -> NoReturn:
        if name is not None and payload is not None:
            check_payload(name, payload)
        raise ValidationError(f"Invalid JSON: {constant} is not a number in JSON")

    json.loads(text, parse_constant=refuse)


def text_in(raw: bytes) -> str:
    """Return the text in some bytes; raise ValidationError if it is not UTF-8, or escapes half of a surrogate pair."""
    if b"\\u" in raw and SURROGATE.search(SURROGATE_PAIR.sub(b"", raw.replace(b"\\\\", b"  "))):
        raise ValidationError("Invalid JSON: lone surrogate in an escape")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValidationError(f"Invalid JSON: {error}") from None


def payload_parser(union: Any, depth_max: int, read: Callable[[str], Any]) -> Callable[[bytes], Any]:
    """Return the function that makes a message of bytes, where `read` makes it of the text without its payload."""
    payloads = {message: payload_name(message) for message in typing.get_args(union)}
    names_by_type = {type_of(message): name for message, name in payloads.items()}

    def parse(raw: bytes) -> Any:
        if len(raw) < LARGE_BYTES or not gc.isenabled():
            return parse_now(raw)
        gc.disable()  # Each run of the collector would visit all parts made so far.
        try:
            return parse_now(raw)
        finally:
            gc.enable()

    def parse_now(raw: bytes) -> Any:
        text = text_in(raw)
        if nests_deeper_than(raw, depth_max):  # Before it is parsed, which would take long.
            head = HEAD_OF_PAYLOAD.match(text)
            where = head[2] if head is not None and names_by_type.get(head[1]) == head[2] else "message"
            raise ValidationError(f"is nested more than {DEPTH_MAX} deep", where)
        found = find_payload(text, names_by_type)
        message = read(text if found is None else f"{text[: found.start]}null{text[found.end :]}")
        try:
            name, payload = payloads[type(message)], None
            if name is not None:
                if found is None and getattr(message, name) is not None:
                    found = last_member(text, name)
                if found is not None and found.value is not None:
                    payload = text[found.start : found.end].encode()
                    if type(found.value) not in SCALARS and looks_suspicious(payload):
                        check_payload(name, payload)
                setattr(message, name, payload)
            if has_constant(text):
                refuse_constants(text, name, payload)
            return message
        except ValidationError as error:
            error.document = {name: getattr(message, name, None) for name in ("id", "reply_to")}
            raise

    return parse


class Member(NamedTuple):
    """The value of a field at the top level of some JSON, and where in the text that is."""

    value: Any
    start: int
    end: int


def find_payload(text: str, names_by_type: Mapping[str, str | None]) -> Member | None:
    """Return the payload of a message; None if it has none, or if it is not written as most are."""
    head = HEAD_OF_PAYLOAD.match(text)
    if head is None or names_by_type.get(head[1]) != head[2]:
        return None
    try:
        value, end = scan_json(text, head.end())
    except (ValueError, RecursionError) as error:
        raise not_json(error) from None
    tail = text[end:]
    may_occur_again = f'"{head[2]}"' in tail or '"type"' in tail or "\\" in tail
    return None if may_occur_again else Member(value, head.end(), end)


def last_member(text: str, name: str) -> Member:
    """Return the last field of that name in a text that is a JSON object and has one."""
    found = None
    separator = NEXT_FIELD.match(text)
    while separator is not None and separator.end() < len(text) and text[separator.end()] == '"':
        key, end = scan_json(text, separator.end())
        start = NEXT_VALUE.match(text, end).end()  # type: ignore[union-attr]  # the text is a JSON object
        value, end = scan_json(text, start)
        if key == name:
            found = Member(value, start, end)
        separator = NEXT_FIELD.match(text, end)
    if found is None:
        raise AssertionError("no such field")
    return found


def pattern_of(hint: Any) -> str | None:
    """Return the pattern that a field's value has to fit, if it is a string or null."""
    limits = (limit for branch in (hint, *typing.get_args(hint)) for limit in typing.get_args(branch)[1:])
    return next((limit.pattern for limit in limits if isinstance(limit, Limit) and limit.pattern is not None), None)


def reject_pattern() -> NoReturn:
    raise ValidationError("does not fit a pattern")


def payload_in(raw: Any) -> bytes | None:
    """Return a payload that msgspec has left as it is, None for null; raise ValidationError if it looks suspicious."""
    payload = bytes(raw)
    if payload[0] == QUOTE:
        return payload
    if looks_suspicious(payload):
        raise ValidationError("may not be JSON that every language reads")
    return None if payload == b"null" else payload


def decoder(union: Any, id_field: str, depth_max: int) -> Callable[[bytes], Any]:
    """Return the function that makes a message of `union` from bytes, or raises InvalidMessage, naming the field."""
    parse = BuiltinCodec.strict_parser(union, depth_max)

    def decide(raw: bytes) -> Any:
        try:
            return parse(raw)
        except ValidationError as error:
            raise _rejection(error, raw, id_field) from None

    return codec().parser(union, depth_max, decide)


@functools.cache
def decoder_from_agent() -> Callable[[bytes], AgentMessage]:
    """Return the function that reads what agents send. It raises InvalidMessage, which names the field."""
    return decoder(AgentMessage, "id", DEPTH_MAX + 1)


@functools.cache
def decoder_from_hub() -> Callable[[bytes], HubMessage]:
    """Return the function that reads what the hub sends. It raises InvalidMessage, which names the field."""
    return decoder(HubMessage, "reply_to", DEPTH_MAX + DEPTH_OF_REPLY)


# From messages to bytes.


class Encoders(dict[type, Callable[[Any], bytes]]):
    """The function that writes the messages of a class, by class. Each is made at its first use."""

    def __missing__(self, message: type) -> Callable[[Any], bytes]:
        write = self[message] = self._compile(message)
        return write

    @staticmethod
    def _compile(message: Any) -> Callable[[Any], bytes]:
        """Compile the function from the fields, as `dataclass` does: a loop over them takes twice the time."""
        parts, has_nulls, separator = [], message in KEEP_NULLS, "{"
        for one, hint in hints_of_fields(message):
            name, value = f'{separator}"{one.name}":', f"message.{one.name}"
            optional = [branch for branch in typing.get_args(hint) if branch is not types.NoneType]
            write = WRITERS.get(optional[0] if len(optional) == 1 else hint, "write({})").format(value)
            if one.name == "type":
                parts.append(repr(f"{name}{json.dumps(one.default)}"))
            elif one.default is None and not has_nulls:
                parts.append(f"'' if {value} is None else {name!r} + {write}")
            else:
                parts += [repr(name), f"'null' if {value} is None else {write}" if optional else write]
            separator = ","
        scope = {"write": field_text, "quote": json.encoder.encode_basestring}
        made: Callable[[Any], bytes] = eval(f"lambda message: ''.join(({', '.join(parts)}, '}}')).encode()", scope)
        return made


# How the fields are written whose values are the hub's own, and so of the type that their annotation says.
WRITERS: Mapping[Any, str] = {str: "quote({})", int: "repr({})", float: "repr({})", bool: "'true' if {} else 'false'"}
ENCODERS = Encoders()


def encode(message: AgentMessage | HubOutput) -> bytes:
    """Return `message` as it goes over the wire; raise ValueError if a payload in it is not JSON."""
    try:
        return ENCODERS[message.__class__](message)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot be serialized: {error}") from error


def field_text(value: Any) -> str:
    """Return a field's value in JSON. Bytes are a payload, which is JSON already."""
    if type(value) is str:
        return json.encoder.encode_basestring(value)
    if type(value) is bytes:
        return value.decode()
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return repr(value)
    if value is None:
        return "null"
    try:
        return write_json(value)
    except ValueError:  # It may hold numbers that are not finite, which another hub sent: they become null.
        text = json.dumps(value, default=_fields_of)
        return write_json(json.loads(text, parse_constant=lambda constant: None))


def _fields_of(part: Any) -> dict[str, Any]:
    """Return the fields of a message's part that are written."""
    kind = type(part)
    if not dataclasses.is_dataclass(kind) or kind.__module__ != __name__:
        raise TypeError(f"{kind.__name__} is not JSON")
    return {name: value for name in field_names(kind) if (value := getattr(part, name)) is not None}


write_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_fields_of).encode


def payload_of(value: Any) -> bytes | None:
    """Return a value as a payload, None as None; raise ValueError if it is not JSON that every language reads."""
    if value is None:
        return None
    try:
        payload = write_json(value).encode()
    except (TypeError, ValueError, RecursionError):
        payload = b""
    if not payload or looks_suspicious(payload):
        payload = write_json(check_json(value)).encode()
    return payload


def value_of(payload: Any) -> Any:
    """Return the value of a payload: parsed if it came in (bytes), as it is if it was given."""
    return codec().loads(payload) if type(payload) is bytes else payload


def envelope_bytes(message_bytes_max: int) -> int:
    """Return the part of a message's limit that is reserved for what the hub adds to it."""
    return min(ENVELOPE_BYTES, message_bytes_max // 4)


@functools.cache
def field_names(made: type) -> tuple[str, ...]:
    return tuple(one.name for one in dataclasses.fields(made))


@functools.cache
def hints_of_fields(made: Any) -> list[tuple[dataclasses.Field[Any], Any]]:
    """Return the fields of a class, each with its annotation."""
    hints = typing.get_type_hints(made, include_extras=True)
    return [(one, hints[one.name]) for one in dataclasses.fields(made)]


def payload_name(message: type) -> str | None:
    """Return the name of the field whose JSON the hub passes on without reading it; None if there is none."""
    names = [one.name for one, hint in hints_of_fields(message) if hint == Json]
    if len(names) > 1:
        raise AssertionError(f"{message.__name__} has several payloads, and `decode` checks one")
    return names[0] if names else None


def type_of(message: type) -> str:
    """Return the `type` of the messages of a class."""
    return str(next(one.default for one in dataclasses.fields(message) if one.name == "type"))


# What shows in the bytes. Walking through a parsed value in Python takes longer than parsing it did.

BRACKETS = re.compile(rb"([\[{]+)|[\]}]+")
NOT_MARKS = bytes(set(range(256)) - set(b'[]{}"'))


def check_payload(name: str, payload: bytes) -> None:
    """Raise ValidationError if the payload in a field is not JSON that every language reads."""
    if nests_deeper_than(payload, DEPTH_MAX):
        raise ValidationError(f"is nested more than {DEPTH_MAX} deep", name)
    # Without its names, an object keeps the values of fields that occur again: they are passed on too.
    values = json.loads(payload, object_pairs_hook=lambda pairs: [value for _, value in pairs])
    try:
        check_json(values)
    except ValidationError as error:
        raise error.within(name) from None


def looks_suspicious(payload: bytes) -> bool:
    """Return whether a payload may be nested too deep or hold a number that is too large, so that a look is needed."""
    if len(payload) > 1024 and payload.count(b",") < len(payload) // 256:  # Few long texts.
        payload = outside_strings(without_escapes(payload))
    return nests_deeper_than(payload, DEPTH_MAX) or may_hold_large_number(payload)


def without_escapes(raw: bytes) -> bytes:
    """Return some JSON without its escaped quotes and backslashes: each quote in it begins or ends a string."""
    return raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw


def outside_strings(raw: bytes) -> bytes:
    """Return what is not in a string, of some JSON without escaped quotes: every second part."""
    return b"".join(raw.split(b'"')[::2])


def may_hold_large_number(raw: bytes) -> bool:
    """Return whether some JSON may hold an integer beyond 64 bits or a number like 1e999; False is certain.

    Those have 19 digits in a row, or an exponent of three.
    """
    shapes = raw.translate(NUMBER_SHAPES)
    if b"0e000" in shapes:
        return True
    return b"0" * 19 in shapes and (b"0" * 20 in shapes or b"-" + b"0" * 19 in shapes)


def nests_deeper_than(raw: bytes, depth: int) -> bool:
    """Return whether some JSON nests deeper than `depth`."""
    if len(raw) <= 2 * depth:  # Each level takes two brackets.
        return False
    marks = raw.translate(None, NOT_MARKS)
    if len(marks) <= depth:
        return False
    if b"\\" in raw:
        marks = without_escapes(raw).translate(None, NOT_MARKS)
    else:
        # Most strings are empty now. If all are, what is left is brackets, and each round removes at most two levels.
        brackets = marks.replace(b'""', b"")
        if b'"' not in brackets:
            for levels in (2, 4, 6, 8):
                brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
                if len(brackets) <= depth - levels:
                    return False
    # Removing "" leaves all other quotes in their roles.
    brackets = outside_strings(marks.replace(b'""', b""))
    level = 0
    for run in BRACKETS.finditer(brackets):
        if run[1] is None:
            level -= len(run[0])
        elif (level := level + len(run[1])) > depth:
            return True
    return False


# Rejected messages.

SCAN_BYTES = 16_384  # How much of a message that is not JSON is searched for its id,
SCAN_TOKENS = 256  # and in how many tokens: each takes a step in Python, and such messages need no credentials.
# An unterminated string matches to the end; rescanning inside it would be quadratic.
JSON_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}:,]', re.DOTALL)


def _rejection(error: ValidationError, raw: bytes, id_field: str) -> InvalidMessage:
    """Return the error that rejects a message. Its text names the field and never repeats a value."""
    document = error.document or {id_field: _find_string_field(id_field, raw[:SCAN_BYTES])}
    return InvalidMessage(str(error), code=error.code, reply_to=_reply_id(document, id_field))


def _find_string_field(wanted: str, raw: bytes) -> Any:
    """Return the value of a string at the top level of JSON that may be malformed or cut off; None if not found."""
    depth, name, is_value = 0, b"", False
    for match in itertools.islice(JSON_TOKENS.finditer(raw), SCAN_TOKENS):
        token = match[0]
        if token in b"[{":
            depth += 1
        elif token in b"]}":
            depth -= 1
        elif depth == 1 and token == b":":
            is_value = True
        elif depth == 1 and token == b",":
            is_value = False
        elif depth == 1 and is_value and name == b'"%s"' % wanted.encode():
            with contextlib.suppress(ValueError):
                return json.loads(token)
        elif depth == 1 and not is_value:
            name = token
        if not 0 < depth <= DEPTH_MAX:
            break
    return None


def _reply_id(document: dict[str, Any], id_field: str) -> str | None:
    """Return the id of a rejected message if a reply can carry it, else None."""
    found = document.get(id_field)
    if not isinstance(found, str):
        return None
    try:
        return check_text(id_field, found, NO_NUL_PATTERN)
    except ValueError:
        return None


# JSON Schema, for the messages and for what handlers take and return.

KEYWORDS: Mapping[str, str] = {  # The fields of a Limit in JSON Schema.
    "pattern": "pattern",
    "min_length": "minLength",
    "max_length": "maxLength",
    "gt": "exclusiveMinimum",
    "ge": "minimum",
    "le": "maximum",
}


def json_schema() -> dict[str, Any]:
    """Return one JSON Schema (2020-12) with all messages in its `$defs`, in both directions."""
    definitions: dict[str, Any] = {}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"AgentHub protocol {PROTOCOL_VERSION}",
        "anyOf": [
            {"title": "from an agent to the hub", **_schema_of_messages(AgentMessage, definitions)},
            {"title": "from the hub to an agent", **_schema_of_messages(HubMessage, definitions)},
        ],
        "$defs": dict(sorted(definitions.items())),
    }


def schema_of(annotation: Any, of_class: Callable[[Any], dict[str, Any]] = lambda kind: {}) -> dict[str, Any]:
    """Return the JSON Schema of an annotation, as Pydantic makes it. `of_class` makes those of the types that JSON does
    not have: by default {}, which is anything.
    """
    kind, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind is Annotated:
        schema = schema_of(arguments[0], of_class)
        return _in_order(schema | _keywords(arguments[1], schema)) if isinstance(arguments[1], Limit) else schema
    if kind in (typing.Union, types.UnionType):
        return {"anyOf": [schema_of(branch, of_class) for branch in arguments]}
    if kind is Literal and len(arguments) == 1:
        return {"const": arguments[0]} | schema_of(type(arguments[0]))
    if kind is Literal:
        return {"enum": list(arguments)}
    if kind is list and arguments:
        return {"items": schema_of(arguments[0], of_class), "type": "array"}
    if kind is dict and arguments:
        return {"additionalProperties": schema_of(arguments[1], of_class) or True, "type": "object"}
    name = json_type(kind)
    if name is not None:
        return {"type": name}
    return {} if kind is Any else of_class(kind)


def _keywords(limit: Limit, schema: dict[str, Any]) -> dict[str, Any]:
    unit = "Items" if schema["type"] == "array" else "Length"
    limits = ((keyword, getattr(limit, name)) for name, keyword in KEYWORDS.items())
    return {keyword.replace("Length", unit): value for keyword, value in limits if value is not None}


def _schema_of_messages(union: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    messages = {type_of(message): _reference(message, definitions) for message in typing.get_args(union)}
    mapping = {name: schema["$ref"] for name, schema in messages.items()}
    return {"oneOf": list(messages.values()), "discriminator": {"propertyName": "type", "mapping": mapping}}


def _reference(made: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return a reference to the schema of a class, and put that into `definitions`."""
    if made.__name__ not in definitions:
        definitions[made.__name__] = _schema_of_class(made, definitions)
    return {"$ref": f"#/$defs/{made.__name__}"}


def _schema_of_class(made: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    properties = {}
    for one, hint in hints_of_fields(made):
        schema = schema_of(hint, lambda kind: _reference(kind, definitions))
        if "$ref" not in schema.get("anyOf", [schema])[0]:  # A class has a title of its own.
            schema["title"] = one.name.replace("_", " ").title()
        if one.default is not dataclasses.MISSING:
            schema["default"] = one.default
        properties[one.name] = _in_order(schema)
    required = [one.name for one in dataclasses.fields(made) if not has_default(one)]
    return _in_order(
        {
            "properties": properties,
            "title": made.__name__,
            "type": "object",
            "description": inspect.cleandoc(made.__doc__),
        }
        | ({"required": required} if required else {})
    )


def _in_order(schema: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(schema.items()))


# ============================================================================================
# 3 States
#
# A task is PENDING from its acceptance until the hub assigns it to an agent, and again while it
# waits for a retry. It is IN_PROGRESS while exactly one agent, its assignee, holds it. The other
# three states are final: their rows are empty, and the record is kept only for late fetching.
#
# An agent is ONLINE while it has a connection and takes tasks. When it loses its connection, the
# hub keeps its session for a grace period: it is DISCONNECTED, and GONE when that is over. It
# drains if it wants to finish what it has and get nothing new: DRAINING, or INTERRUPTED when it
# loses its connection meanwhile. It is DEREGISTERED when it has left by its own wish. No state of
# an agent is final: it may resume its session as long as the hub still has a record of it.
#
# `next_state` and `next_agent_state` are the only readers of the tables; TaskTable.transition and
# Directory.transition are the only places that assign a state. docs/guide.md's diagrams are generated
# from the tables.
#
# LazyHeap stands here because both the hub and the SDK keep their deadlines in one.
# ============================================================================================


class TaskState(enum.StrEnum):
    """The state of a task."""

    PENDING = "pending"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    TIMEOUT = "timeout"


class TaskEvent(enum.StrEnum):
    """The events that change a task's state."""

    ASSIGNED = "assigned"  # The hub delivered it to an agent.
    SUCCEEDED = "succeeded"  # Its assignee sent an output.
    ERRED = "erred"  # Its assignee sent an error.
    RETRIED = "retried"  # Its assignee is gone, and a retry is left.
    LOST = "lost"  # Its assignee is gone, and no retry is left.
    CANCELLED = "cancelled"  # Its requester cancelled it, or its parent task ended.
    EXPIRED = "expired"  # Its deadline has passed.


TRANSITIONS: Mapping[TaskState, Mapping[TaskEvent, TaskState]] = {
    TaskState.PENDING: {
        TaskEvent.ASSIGNED: TaskState.IN_PROGRESS,
        TaskEvent.LOST: TaskState.FAILED,
        TaskEvent.CANCELLED: TaskState.FAILED,
        TaskEvent.EXPIRED: TaskState.TIMEOUT,
    },
    TaskState.IN_PROGRESS: {
        TaskEvent.SUCCEEDED: TaskState.COMPLETED,
        TaskEvent.ERRED: TaskState.FAILED,
        TaskEvent.RETRIED: TaskState.PENDING,
        TaskEvent.LOST: TaskState.FAILED,
        TaskEvent.CANCELLED: TaskState.FAILED,
        TaskEvent.EXPIRED: TaskState.TIMEOUT,
    },
    TaskState.COMPLETED: {},
    TaskState.FAILED: {},
    TaskState.TIMEOUT: {},
}
FINAL_STATES: frozenset[TaskState] = frozenset(state for state, row in TRANSITIONS.items() if not row)
# Used for every task: before Python 3.12, reading an enum member costs as much as a call.
PENDING, ASSIGNED, SUCCEEDED = TaskState.PENDING, TaskEvent.ASSIGNED, TaskEvent.SUCCEEDED


def next_state(state: TaskState, event: TaskEvent) -> TaskState:
    """Return the state after an event; raise IllegalTransition if the table has no such transition."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransition(f"a task that is {state} cannot be {event}") from None


class AgentState(enum.StrEnum):
    """The state of an agent."""

    ONLINE = "online"  # It has a connection and takes tasks.
    DRAINING = "draining"  # It has a connection, finishes what it has and gets no new task.
    DISCONNECTED = "disconnected"  # It lost its connection, and is in its grace period: it still counts as available.
    INTERRUPTED = "interrupted"  # It lost its connection while it was draining, and is in its grace period.
    GONE = "gone"  # Its grace period is over.
    DEREGISTERED = "deregistered"  # It left by its own wish.


class AgentEvent(enum.StrEnum):
    """The events that change an agent's state."""

    DRAIN_REQUESTED = "drain requested"
    CONNECTION_LOST = "connection lost"  # Or closed by the hub, because it was silent or a newer one resumed.
    RESUMED = "resumed"  # It registered with its agent_id and its secret.
    GRACE_EXPIRED = "grace period expired"
    DEREGISTERED = "deregistered"  # It asked to leave at once, or the last task of a draining agent has ended.


AGENT_TRANSITIONS: Mapping[AgentState, Mapping[AgentEvent, AgentState]] = {
    AgentState.ONLINE: {
        AgentEvent.DRAIN_REQUESTED: AgentState.DRAINING,
        AgentEvent.CONNECTION_LOST: AgentState.DISCONNECTED,
        AgentEvent.DEREGISTERED: AgentState.DEREGISTERED,
    },
    AgentState.DRAINING: {
        AgentEvent.CONNECTION_LOST: AgentState.INTERRUPTED,
        AgentEvent.DEREGISTERED: AgentState.DEREGISTERED,
    },
    AgentState.DISCONNECTED: {
        AgentEvent.RESUMED: AgentState.ONLINE,
        AgentEvent.GRACE_EXPIRED: AgentState.GONE,
    },
    AgentState.INTERRUPTED: {
        AgentEvent.RESUMED: AgentState.ONLINE,
        AgentEvent.GRACE_EXPIRED: AgentState.GONE,
    },
    AgentState.GONE: {AgentEvent.RESUMED: AgentState.ONLINE},
    AgentState.DEREGISTERED: {AgentEvent.RESUMED: AgentState.ONLINE},
}
ONLINE, DRAINING = AgentState.ONLINE, AgentState.DRAINING  # As for tasks.
TARGET_STATES = frozenset((AgentState.ONLINE, AgentState.DISCONNECTED))  # New tasks may be for such an agent.
LEFT_STATES = frozenset((AgentState.GONE, AgentState.DEREGISTERED))  # Its record is kept only while it is needed.


def next_agent_state(state: AgentState, event: AgentEvent) -> AgentState:
    """Return the state after an event; raise IllegalTransition if the table has no such transition."""
    try:
        return AGENT_TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransition(f"an agent that is {state} has no transition for: {event}") from None


Item = TypeVar("Item", bound=Hashable)


class LazyHeap(Generic[Item]):
    """A priority queue with lazy deletion: items can be moved and discarded.

    Moving or discarding an item leaves its old entry in the heap as a dead one. The heap is rebuilt before it holds
    twice as many entries as items, plus 64. So memory is proportional to the number of items, and every operation takes
    O(log n) time, amortized.
    """

    __slots__ = ("_serial", "alive", "entries")

    def __init__(self) -> None:
        self.entries: list[tuple[Any, int, Item]] = []
        self.alive: dict[Item, int] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self.alive)

    def push(self, item: Item, key: Any) -> None:
        """Add `item` at `key`, or move it there. Items with equal keys come out in the order of their pushes."""
        self._serial += 1
        self.alive[item] = self._serial
        heapq.heappush(self.entries, (key, self._serial, item))
        if len(self.entries) > 2 * len(self.alive) + 64:
            self._sweep()

    def discard(self, item: Item) -> None:
        """Remove `item` if it is in the queue."""
        if self.alive.pop(item, None) is not None and len(self.entries) > 2 * len(self.alive) + 64:
            self._sweep()

    def first(self) -> tuple[Any, Item] | None:
        """Return the least key and its item, or None."""
        while self.entries:
            key, serial, item = self.entries[0]
            if self.alive.get(item) == serial:
                return key, item
            heapq.heappop(self.entries)
        return None

    def _sweep(self) -> None:
        self.entries = [entry for entry in self.entries if self.alive.get(entry[2]) == entry[1]]
        heapq.heapify(self.entries)


# ============================================================================================
# 4 Hub
#
# The hub is Sans-I/O. Facts go in with the time; each call returns one Step: the changes that a
# journal must write first, and the effects to carry out after that, in order.
#
#     connected(link, now)       a link has opened       ┌─────────────┐
#     receive(link, message,     a message, or what      │     Hub     │   Step
#             now, bytes)        was wrong with it  ───► │  Directory  │ ───► changes: rows of
#     disconnected(link, now)    a link has closed       │  TaskTable  │        tasks and agents
#     redeliver(task_id, now)    an outcome was not      │  queues     │      effects: send a
#                                sent                    │  deadlines  │        message on a link,
#     tick(now)                  next_deadline() has     └─────────────┘        or close it
#                                come
#
# Nothing here touches a socket, a file, a clock or a source of randomness; a `link` is any
# hashable object of the caller's. The same calls in the same order give the same steps, so
# whatever is iterated is a dict or a list, never a set.
#
# A message is handled in one order: check everything that may refuse it (Refused, and nothing has
# changed), change the state, reply with the new state, then do what follows from it. To add a
# message, write an `_on_…` method of that shape, and an entry in `_RECEIVERS`; to add a state, a
# row of its table; to add a limit, a field of HubSettings and a check that raises Refused.
#
# The life of a task is TRANSITIONS. What the table does not show:
# - A pending task waits in the queue of its target (an agent_id, a capability, or both). It is in
#   no queue only within the step that accepts or retries it. Within one priority, the requesters
#   in a queue take turns; an agent that serves several queues takes the least recent turn of all.
# - A task that ends is settled (`_settle`: its state, and the slot of its worker), and then
#   followed up (`_follow_up`): its open subtasks are cancelled, its outcome is delivered, its
#   worker gets the next task. A retry is followed up too, only that the task is placed again.
# - A final task is either delivered or undelivered. An outcome is delivered when it was handed to
#   a link; if the link closes before it was sent, `redeliver` takes that back.
# - At its deadline a task belongs to `tick`: nobody gets it and no result counts any more. So the
#   outcome does not depend on whether the tick or the message comes first.
#
# The life of an agent is AGENT_TRANSITIONS. What the table does not show:
# - An agent has a connection while it is online or draining, and only then. A connection that has
#   not registered belongs to an observer, which may only look.
# - A disconnected agent keeps its tasks and its memberships: tasks may be accepted for it, but it
#   is handed none.
# - When an agent is gone or deregistered, its tasks are retried or fail (`_release_all`, in batches
#   if they are many; an agent that is back meanwhile keeps the others), and its record is kept
#   while `is_needed`: tasks name it, or (unless it deregistered) it has tasks or outcomes to come
#   back for. A retry that names an agent waits until that agent resumes.
#
# Who keeps the indexes true:
#
#     Directory.agents, gone, pools, index    Directory.transition and describe
#     Pool.free, AgentRecord.load             Directory.update_load, after `running` has changed
#     TaskTable.open, counts, bytes,          TaskTable.accept, transition, grow, keep_…, take_…
#       AgentRecord.requested, children
#     AgentRecord.running                     Hub._assign, _settle, _retry
#     Hub.queues, _waiting, awaited          Hub._enqueue, _unqueue
#     Hub.deadlines                          with a task while it is open, a connection while it
#                                             is, an agent in its grace period
#
# What bounds the memory: tasks are limited by `records_bytes_max` (the oldest delivered ones make
# room, then outcomes of disconnected requesters), by `open_tasks_max` and a share of the bytes a
# requester, and by `pending_tasks_max`; agents by `agents_max` (those that are gone make room), by
# AWAY_MAX an address and by the limits on a registration, which counts among the records if it is
# large; connections by the server. Ended tasks go after `retention_s`. The indexes hold nothing
# that these do not hold, and INDEX_MAX bounds what `discover` keeps twice.
#
# Cost: a message touches only its own task, agents and queues. No path but `discover`, `status`
# and a broadcast looks at more, and these say in `cost` how much it was.
# ============================================================================================

log_hub = logging.getLogger("agenthub.hub")

TICK_BATCH = 1000  # Tasks that one call ends or hands on: about 10 ms, so that messages are not held up.
LIST_MAX = 1000  # Tasks in one `status` list.
WAITING_MAX = 10  # Requesters in the status of the hub: those with the most pending tasks.
RECORD_BYTES = 1024  # The memory of a task's record without its payloads (tests/test_hub.py measures it).
DEPTH_OF_CHILDREN_MAX = 16
TRIES_MAX = 3  # Wrong secrets, or messages without a token, before a connection is closed.
SCHEMAS_BYTES_MAX = 65_536  # Of all capabilities of one agent.
DESCRIPTIONS_BYTES_MAX = 65_536  # Of one agent and all its capabilities.
WORDS_MAX = 1000  # Distinct words of one agent's descriptions that `discover` finds.
# An agent's registration counts among the records with what it takes in memory beyond the first AGENT_BYTES:
AGENT_BYTES = 20_000
JSON_FACTOR = 14  # ... so much for a byte of its metadata and schemas, which are held as many small objects,
CAPABILITY_BYTES = 1500  # ... so much for a capability,
WORD_BYTES = 200  # ... and so much for a word that it is found by. tests/test_hub.py measures all three.
AWAY_MAX = 1000  # Agents without a connection that came from one address.
REQUESTER_SHARE = 0.5  # Of `records_bytes_max`, for the open tasks and undelivered outcomes of one requester.
INDEX_MAX = 250_000  # Entries in each of the two indexes of `discover`; one takes 400 bytes at most.
# A message costs 1, for the rate limit, and 1 more for each ...
COST_BYTES = 16_384  # ... bytes of it,
COST_AGENTS = 50  # ... agents that `discover` scans,
COST_TASKS = 4  # ... tasks that `status` lists.
CLOSE_CODES = frozenset((*CloseCode, 1002, 1006, 1007))  # Each is counted by itself, all others together.
WARNING_CLOSE_CODES = CLOSE_CODES - {CloseCode.DONE, CloseCode.GOING_AWAY, CloseCode.REPLACED, 1006}


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSettings:
    """The settings that a deployer may tune. Raises ValueError for a value out of range."""

    heartbeat_s: float = 30.0  # Agents send at least this often; after three intervals of silence they are closed.
    grace_s: float = 60.0  # How long an agent's session is kept after its connection was lost.
    retention_s: float = 3600.0  # How long the record of an ended task is kept for late fetching.
    reap_s: float = 30.0  # How often records past their retention are dropped.
    message_bytes_max: int = MESSAGE_BYTES_MAX  # The largest message in either direction.
    records_bytes_max: int = 1_073_741_824  # All records together; the oldest ended tasks make room.
    open_tasks_max: int = 10_000  # Open tasks of one requester.
    pending_tasks_max: int = 100_000  # Tasks that wait for an agent.
    agents_max: int = 20_000  # Agents whose record is kept, whatever their state; the oldest gone ones make room.
    connections_max: int = 10_000  # Of agents and observers.
    capabilities_max: int = 64  # Of one agent; the protocol has no more.
    metadata_bytes_max: int = 4096  # Of one agent, as JSON; the protocol has no more.
    join_s: float = 10.0  # For a new connection to register, or to ask something as an observer.

    def __post_init__(self) -> None:
        for name in self.__slots__:
            number = getattr(self, name)
            least = 0 if name in ("grace_s", "retention_s") else 0.001
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ValueError(f"{name} must be a number")
            if not least <= number < math.inf:
                raise ValueError(f"{name} must be a number of at least {least}")
        if self.message_bytes_max < MESSAGE_BYTES_MIN:
            raise ValueError(f"message_bytes_max must be a number of at least {MESSAGE_BYTES_MIN}")

    @property
    def envelope_bytes(self) -> int:
        """The bytes that the hub may add to a message when it passes it on."""
        return envelope_bytes(self.message_bytes_max)

    @property
    def silence_s(self) -> float:
        """How long a connection may be silent before it is closed."""
        return 3 * self.heartbeat_s


class Close(NamedTuple):
    """Close a connection after all that was sent on it before."""

    code: int
    reason: str


# An effect is a link, and the message to send on it or its Close. One message object may go to many links.
Effect = tuple[Any, HubOutput | Close]


@dataclass(slots=True, eq=False, repr=False)
class TaskRecord:
    """The hub's record of one task. Only `TaskTable.transition` assigns `state`."""

    task_id: str
    request: Delegate
    requester: AgentRecord
    parent: TaskRecord | None
    depth: int
    accepted_at: float
    deadline: float
    sequence: int  # In the order of acceptance; kept over retries.
    bytes: int  # Of its payloads and RECORD_BYTES, as `TaskTable.bytes` counts them.
    state: TaskState = TaskState.PENDING
    assignee: AgentRecord | None = None
    attempt: int = 0  # Deliveries so far.
    seq: int = 0  # Progress reports so far.
    progress: float | None = None
    detail: Any = None
    success: bool = False
    output: Any = None
    detail_bytes: int = 0
    error: ErrorInfo | None = None
    settled_by: AgentRecord | None = None  # The assignee if its result ended it, None if the hub did.
    ended_at: float = 0.0
    children: dict[str, TaskRecord] | None = None  # Its open subtasks.
    is_delivered: bool = False  # Its outcome was sent to its requester, or is kept for nobody.
    is_journaled: bool = False  # A row of it has left in the changes of some step.

    @property
    def queue_key(self) -> tuple[int, int]:
        """Where it stands among its requester's tasks: the higher priority first, then the order of acceptance."""
        return -self.request.priority, self.sequence

    @property
    def target(self) -> tuple[str | None, str | None]:
        """The queue in which it waits for an agent: an agent_id, a capability, or both."""
        return self.request.agent_id, self.request.capability

    @property
    def is_orphan(self) -> bool:
        """Whether the hub died before it had cancelled this subtask: its parent task has ended, or is retried."""
        return self.request.parent_id is not None and (self.parent is None or self.parent.state is PENDING)

    @property
    def waits_for_agent(self) -> bool:
        """Whether it waits for the agent it names when that one is lost before it could start."""
        return self.request.wait or self.request.max_retries > 0

    def ack(self, reply_to: str | None = None) -> TaskAck:
        return make_ack(reply_to=reply_to, task_id=self.task_id, state=self.state, attempt=self.attempt)

    def delivery(self, worker: AgentRecord, now: float) -> Delegated:
        """Return the message that hands it to a worker, with the time to live that is left."""
        request = self.request
        return make_delegated(
            task_id=request.task_id,
            sender=self.requester.agent_id,
            agent_id=worker.agent_id,
            capability=request.capability,
            input=request.input,
            ttl=min(request.ttl, max(0.001, self.deadline - now)),
            priority=request.priority,
            max_retries=request.max_retries,
            parent_id=request.parent_id,
            attempt=self.attempt,
        )

    def progress_report(self) -> StatusReply:
        """Return the message that passes its progress on to its requester."""
        return StatusReply(
            task_id=self.task_id,
            state=self.state,
            attempt=self.attempt,
            sender=self.assignee.agent_id if self.assignee is not None else None,
            seq=self.seq,
            progress=self.progress,
            detail=self.detail,
        )

    def check_result(self, agent: AgentRecord, message: Result, now: float) -> None:
        """Refuse a result unless it is from the assignee, of the present attempt, or its requester cancels with it."""
        if self.assignee is agent:
            if message.attempt is not None and message.attempt != self.attempt:
                text = f"attempt: {message.attempt} is not the present one, which is {self.attempt}"
                raise Refused(text, code=Code.STALE_ATTEMPT)
            if self.deadline <= now:  # `tick` is about to end it.
                raise Refused("the deadline of that task has passed", code=Code.TASK_OVER)
        elif self.requester is not agent or message.success:
            if message.attempt is not None and message.attempt < self.attempt:
                raise Refused("attempt: a newer one has begun; stop working on this one", code=Code.STALE_ATTEMPT)
            raise Refused("this agent is not the assignee of that task", code=Code.NOT_ASSIGNED)

    def least_report(self, reply_to: str | None) -> StatusReply:
        """Return a reply to its requester or assignee that is no longer than its outcome."""
        return StatusReply(
            reply_to=reply_to,
            task_id=self.task_id,
            state=self.state,
            requester=self.requester.agent_id,
            attempt=self.attempt,
            output=self.output,
            error=self.error,
        )

    def outcome(self) -> TaskOutcome:
        return make_outcome(
            task_id=self.task_id,
            sender=self.settled_by.agent_id if self.settled_by is not None else None,
            success=self.success,
            state=self.state,
            output=self.output,
            error=self.error,
            attempt=self.attempt,
        )

    def info_fields(self, now: float) -> dict[str, Any]:
        """Return the fields that TaskInfo and StatusReply share."""
        request = self.request
        return {
            "task_id": self.task_id,
            "state": self.state,
            "requester": self.requester.agent_id,
            "agent_id": self.assignee.agent_id if self.assignee is not None else request.agent_id,
            "capability": request.capability,
            "attempt": self.attempt,
            "priority": request.priority,
            "max_retries": request.max_retries,
            "parent_id": request.parent_id,
            "ttl": 0.0 if self.state in FINAL_STATES else round(max(0.0, self.deadline - now), 3),
            "age_s": round(now - self.accepted_at, 3),
            "progress": self.progress,
            "code": self.error.code if self.error is not None else None,
        }

    def row(self) -> TaskRow:
        """Return its row for a journal: everything but its progress."""
        return TaskRow(
            sequence=self.sequence,
            requester=self.requester.agent_id,
            request=self.request,
            depth=self.depth,
            accepted_at=self.accepted_at,
            deadline=self.deadline,
            bytes=self.bytes - self.detail_bytes,
            state=self.state,
            assignee=self.assignee.agent_id if self.assignee is not None else None,
            attempt=self.attempt,
            is_delivered=self.is_delivered,
            ended_at=self.ended_at,
            end=self.outcome() if self.state in FINAL_STATES else None,
        )


make_task_record = quick_maker(TaskRecord)


@dataclass(slots=True, eq=False, repr=False)
class AgentRecord:
    """The hub's record of one agent. Only `Directory.transition` assigns `state`.

    After its grace period, or after it has deregistered, its record is kept only as long as it `is_needed`.
    """

    agent_id: str
    resume: str  # Its secret; empty after a restart, until the agent has presented it.
    resume_hash: str = ""  # SHA-256 of that, in hex.
    state: AgentState = ONLINE
    connection: Connection | None = None  # While it is online or draining.
    drain_id: str | None = None  # The id of its request to drain, until the hub replies to it.
    name: str = ""
    description: str = ""
    capabilities: dict[str, Capability] = field(default_factory=dict)
    words: dict[str, None] = field(default_factory=dict)  # Of the descriptions, in lower case, while it can be found.
    max_tasks: int = 1
    metadata: dict[str, Any] = field(default_factory=dict)
    info_bytes: int = 0  # The size of its AgentInfo.
    bytes: int = 0  # Of its registration, as `Directory.bytes` counts it.
    held_bytes: int = 0  # Of the tasks that it requested, unless they are delivered.
    origin: str | None = None  # The address that it came from last, if the hub was told.
    pools: list[Pool] = field(default_factory=list)  # Of its capabilities, while it is online or disconnected.
    load: int | None = None  # The load under which the pools list it; None while it can take no task.
    running: dict[str, TaskRecord] = field(default_factory=dict)  # In progress, with it as the assignee.
    awaited: dict[str, TaskRecord] = field(default_factory=dict)  # Pending, and naming it.
    requested: dict[str, TaskRecord] = field(default_factory=dict)  # Open, with it as the requester.
    undelivered: dict[str, TaskRecord] = field(default_factory=dict)  # Ended while it was disconnected or gone.
    delivered: int = 0  # Records kept whose outcome was sent to it, which does not mean that it arrived.

    @property
    def is_available(self) -> bool:
        return len(self.running) < self.max_tasks and self.state is ONLINE

    @property
    def is_needed(self) -> bool:
        """Whether an agent that is gone may still want something, or be wanted, when it comes back."""
        if self.state is AgentState.DEREGISTERED:
            return bool(self.awaited or self.running)
        return bool(self.awaited or self.running or self.requested or self.undelivered or self.delivered)

    def targets(self) -> list[tuple[tuple[str | None, str | None], AgentRecord | None]]:
        """Return the targets of the tasks that it may take, each with the requester whose tasks it must not."""
        targets: list[tuple[tuple[str | None, str | None], AgentRecord | None]]
        targets = [(pool.target, self) for pool in self.pools]
        if self.awaited:  # Tasks that name it, its own included.
            targets += [((self.agent_id, capability), None) for capability in (None, *self.capabilities)]
        return targets

    @property
    def info(self) -> AgentInfo:
        return AgentInfo(
            self.agent_id,
            self.name,
            self.description,
            list(self.capabilities.values()),
            len(self.running),
            self.max_tasks,
            self.metadata,
        )

    def row(self) -> AgentRow:
        """Return its row for a journal."""
        register = Register(
            name=self.name,
            description=self.description,
            capabilities=list(self.capabilities.values()),
            max_tasks=self.max_tasks,
            metadata=self.metadata,
        )
        is_deregistered = self.state is AgentState.DEREGISTERED
        return AgentRow(self.agent_id, self.resume_hash, register, self.state not in LEFT_STATES, is_deregistered)


@dataclass(slots=True, eq=False, repr=False)
class Connection:
    """One connection, and the agent that is registered on it (None: an observer)."""

    link: Hashable
    last_seen: float
    origin: str | None = None
    agent: AgentRecord | None = None
    is_known: bool = False  # It has registered or asked something, so `join_s` does not apply any more.
    wrong_secrets: int = 0  # At TRIES_MAX it is closed.


class AgentRow(NamedTuple):
    """An agent as a journal keeps it: its registration, and only the hash of its secret.

    `there` is false once it is gone, `departed` is true if that is because it deregistered. Other states do not
    outlive the hub: to the next one, every agent that is not gone is disconnected.
    """

    agent_id: str
    resume_hash: str
    register: Register
    there: bool
    departed: bool = False


class TaskRow(NamedTuple):
    """A task as a journal keeps it. Times are in seconds of the hub's clock; `end` is None unless it has ended."""

    sequence: int
    requester: str
    request: Delegate
    depth: int
    accepted_at: float
    deadline: float
    bytes: int
    state: TaskState
    assignee: str | None
    attempt: int
    is_delivered: bool  # Its outcome was sent to its requester.
    ended_at: float
    end: TaskOutcome | None


@dataclass(slots=True)
class Changes:
    """The rows that a journal writes at once: the latest row of each task and agent that changed."""

    inserted: dict[int, TaskRow] = field(default_factory=dict)  # By sequence, as the next two.
    updated: dict[int, TaskRow] = field(default_factory=dict)
    deleted: dict[int, None] = field(default_factory=dict)
    agents: dict[str, AgentRow | None] = field(default_factory=dict)  # By agent_id; None deletes the row.

    def merge(self, later: Changes) -> None:
        """Add later changes, whose rows supersede the earlier ones. Costs no more than `later` is long."""
        self.inserted.update(later.inserted)
        for sequence, row in later.updated.items():
            rows = self.inserted if sequence in self.inserted else self.updated
            rows[sequence] = row
        for sequence in later.deleted:
            # A task that was both accepted and forgotten between two writes leaves no trace.
            if self.inserted.pop(sequence, None) is None:
                self.updated.pop(sequence, None)
                self.deleted[sequence] = None
        self.agents.update(later.agents)


class Step(NamedTuple):
    """The consequences of one fact: changes to be written first (None: none), then effects, in their order."""

    effects: list[Effect]
    changes: Changes | None = None


class Pool:
    """The agents with one capability, and those of them that can take a task, by load.

    Loads are few and small numbers, so the least one is found by sorting them, and an agent moves in constant time.
    """

    __slots__ = ("free", "lower_name", "members", "name", "target", "words")

    def __init__(self, name: str) -> None:
        self.name = name
        self.target = None, name  # Of the tasks that any of them may take.
        self.lower_name = name.lower()
        self.words = words_of(name)
        self.members: dict[str, AgentRecord] = {}
        self.free: dict[int, dict[str, AgentRecord]] = {}

    def move(self, agent: AgentRecord, old: int | None, new: int | None) -> None:
        """List `agent` under the load `new` instead of `old`; None is the load of one that can take no task."""
        free = self.free
        if old is not None:
            equals = free[old]
            del equals[agent.agent_id]
            if not equals:
                del free[old]
        if new is not None:
            if new in free:
                free[new][agent.agent_id] = agent
            else:
                free[new] = {agent.agent_id: agent}

    def least_loaded(self, *excluded: AgentRecord | None) -> AgentRecord | None:
        """Return a free agent with the fewest tasks; of several, the one that has had that load for longest."""
        for load in sorted(self.free):
            for agent in self.free[load].values():
                if agent not in excluded:
                    return agent
        return None


class PendingQueue:
    """The pending tasks with one target. Within one priority, requesters take turns.

    A heap a requester, and a heap of their heads. Turns are counted by the hub over all queues: a requester joins at
    the present turn, and takes a new one in all queues of the agent that serves it; the least recent turn goes first.
    No agent gets its own task, and must not search for another's: the requester that it is not to serve is left out by
    looking at the second head.
    """

    __slots__ = ("by_requester", "heads", "turns")

    def __init__(self) -> None:
        self.by_requester: dict[AgentRecord, LazyHeap[TaskRecord]] = {}
        self.turns: dict[AgentRecord, int] = {}
        self.heads: LazyHeap[AgentRecord] = LazyHeap()

    def __bool__(self) -> bool:
        return bool(self.by_requester)

    def push(self, task: TaskRecord, turn: int) -> None:
        requester = task.requester
        heap = self.by_requester.get(requester)
        if heap is None:
            heap = self.by_requester[requester] = LazyHeap()
            self.turns[requester] = turn
        heap.push(task, task.queue_key)
        self._update_head(requester, heap)

    def discard(self, task: TaskRecord) -> None:
        heap = self.by_requester[task.requester]
        heap.discard(task)
        self._update_head(task.requester, heap)

    def take_turn(self, requester: AgentRecord, turn: int) -> None:
        """Put a requester that was served, here or in another queue, behind the others."""
        heap = self.by_requester.get(requester)
        if heap is not None:
            self.turns[requester] = turn
            self._update_head(requester, heap)

    def first(self, excluding: AgentRecord | None) -> tuple[tuple[int, int, int], TaskRecord] | None:
        """Return the first task in line whose requester is not `excluding`, and its place: least goes first."""
        head = self.heads.first()
        if head is not None and head[1] is excluding:
            key, requester = head
            self.heads.discard(requester)
            head = self.heads.first()
            self.heads.push(requester, key)
        if head is None:
            return None
        first = self.by_requester[head[1]].first()
        if first is None:
            raise AssertionError("a requester without a task has no head")
        return head[0], first[1]

    def _update_head(self, requester: AgentRecord, heap: LazyHeap[TaskRecord]) -> None:
        first = heap.first()
        if first is None:
            del self.by_requester[requester], self.turns[requester]
            self.heads.discard(requester)
        else:
            priority, sequence = first[0]
            self.heads.push(requester, (priority, self.turns[requester], sequence))


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def match_rank(keyword: str, name: str, words: list[str]) -> int | None:
    """Return how well the name of a capability, in lower case, matches a keyword: 0 is best, None is no match."""
    if name == keyword:
        return 0
    if name.startswith(keyword) or keyword in words:
        return 1
    return 2 if keyword in name else None


class InvertedIndex(Generic[Item]):
    """Finds items by any of their keys. It is limited: items that do not fit are scanned one by one."""

    __slots__ = ("_by_key", "_places", "_unlisted")

    def __init__(self) -> None:
        self._by_key: dict[str, dict[Item, None]] = {}
        self._places = 0  # Items under keys, at most INDEX_MAX.
        self._unlisted: dict[Item, None] = {}  # Items that did not fit.

    def __len__(self) -> int:
        return self._places + len(self._unlisted)

    def add(self, item: Item, keys: Collection[str]) -> None:
        if self._places + len(keys) > INDEX_MAX:
            self._unlisted[item] = None
            return
        for key in keys:
            self._by_key.setdefault(key, {})[item] = None
        self._places += len(keys)

    def drop(self, item: Item, keys: Collection[str]) -> None:
        """Remove an item that was added with these keys, or not at all."""
        if item in self._unlisted:
            del self._unlisted[item]
            return
        for key in keys:
            del self._by_key[key][item]
            if not self._by_key[key]:
                del self._by_key[key]
        self._places -= len(keys)

    def candidates(self, keys: Iterable[str]) -> list[Item]:
        """Return the items that may have all these keys, at least one of them: those with the rarest."""
        return [*min((self._by_key.get(key, {}) for key in keys), key=len), *self._unlisted]


class CapabilityIndex:
    """Finds agents by the names of their capabilities and the words of their descriptions, without scanning them all.

    Names are looked up by their trigrams, as in pg_trgm of PostgreSQL: a keyword of three characters or more is part of
    a name only if the name has all trigrams of the keyword. The candidates with the rarest one are then compared.
    """

    __slots__ = ("_by_part", "_by_word", "_pools", "scanned")

    def __init__(self) -> None:
        self._pools: dict[str, Pool] = {}
        self._by_part: InvertedIndex[Pool] = InvertedIndex()
        self._by_word: InvertedIndex[AgentRecord] = InvertedIndex()
        self.scanned = 0  # Names and agents, by the last search.

    def __len__(self) -> int:
        return len(self._pools) + len(self._by_part) + len(self._by_word)

    def add_pool(self, pool: Pool) -> None:
        self._pools[pool.name] = pool
        self._by_part.add(pool, trigrams(pool.lower_name))

    def drop_pool(self, pool: Pool) -> None:
        del self._pools[pool.name]
        self._by_part.drop(pool, trigrams(pool.lower_name))

    def add_agent(self, agent: AgentRecord) -> None:
        self._by_word.add(agent, agent.words)

    def drop_agent(self, agent: AgentRecord) -> None:
        self._by_word.drop(agent, agent.words)

    def ranks(self, keyword: str) -> dict[AgentRecord, int]:
        """Return the rank of each agent that matches a keyword in lower case: 0 is best, 3 a word of a description."""
        agents = self._by_word.candidates([keyword])
        ranks = {agent: 3 for agent in agents if keyword in agent.words}
        parts = trigrams(keyword)
        pools = self._by_part.candidates(parts) if parts else list(self._pools.values())
        self.scanned = len(agents) + len(pools)
        for pool in pools:
            rank = match_rank(keyword, pool.lower_name, pool.words)
            if rank is not None:
                self.scanned += len(pool.members)
                for agent in pool.members.values():
                    ranks[agent] = min(rank, ranks.get(agent, rank))
        return ranks


def trigrams(text: str) -> dict[str, None]:
    return dict.fromkeys(text[start : start + 3] for start in range(len(text) - 2))


class Directory:
    """The agents that the hub knows, with the indexes that find one for a task and for `discover`.

    An agent that is online or disconnected is a member of the pool of each of its capabilities and is in the index of
    `discover`; one that is draining, interrupted or gone is in neither. A pool lists those of its members that can take
    a task under their load. `transition` and `describe` keep that true, and `update_load` does after each change of
    an agent's `running`.
    """

    def __init__(self, agents_max: int, *, is_journaled: bool) -> None:
        self.agents_max = agents_max
        self.agents: dict[str, AgentRecord] = {}
        self.gone: dict[str, AgentRecord] = {}  # Those of them in one of LEFT_STATES.
        self.pools: dict[str, Pool] = {}  # By capability; none of them is empty.
        self.index = CapabilityIndex()
        self.registrations_bytes = 0
        self._away: dict[str, dict[str, AgentRecord]] = {}  # Agents without a connection, by origin, the oldest first.
        self.changed: dict[AgentRecord, bool] = {}  # Since the last step; False if the record was dropped.
        self._is_journaled = is_journaled

    def mark(self, agent: AgentRecord, is_kept: bool = True) -> None:
        """Have an agent's row written, or deleted, by this step."""
        if self._is_journaled:
            self.changed[agent] = is_kept

    def transition(self, agent: AgentRecord, event: AgentEvent) -> None:
        """Take one step of the table. Nothing else assigns an agent's state; pools and index follow it here."""
        agent.state = state = next_agent_state(agent.state, event)
        if state in TARGET_STATES:
            self.update_load(agent)
        else:
            self._leave_pools(agent)
        if state in LEFT_STATES:
            self.gone[agent.agent_id] = agent
            self.mark(agent)
        else:
            self.gone.pop(agent.agent_id, None)
        if state is ONLINE:
            self._leave_origin(agent)
        elif state is not AgentState.DRAINING and agent.origin is not None:
            self._away.setdefault(agent.origin, {})[agent.agent_id] = agent

    def add(self, name: str, origin: str | None, entropy: Callable[[int], bytes]) -> AgentRecord:
        """Return the record of a new agent. Where there are too many, the oldest one that is gone makes room."""
        away = self._away.get(origin or "", {})
        oldest = None
        if len(away) >= AWAY_MAX:
            oldest = next(iter(away.values()))
            text = f"{AWAY_MAX} agents of this address are disconnected; resume or deregister them, or retry later"
        elif len(self.agents) >= self.agents_max:
            oldest = next(iter(self.gone.values()), None)
            text = f"the hub has reached its limit of {self.agents_max} agents; retry later"
        else:
            text = ""
        if oldest is not None and oldest.state in LEFT_STATES:
            log_hub.warning("dropped agent=%s, to make room for a new one", oldest.agent_id)
            self.forget(oldest)
        elif text:
            raise Refused(text, code=Code.OVERLOADED)
        readable = slugify(name, 48) or "agent"
        agent_id = f"{readable}-{entropy(4).hex()}"
        while agent_id in self.agents:
            agent_id = f"{readable}-{entropy(4).hex()}"
        secret = entropy(16).hex()
        agent = self.agents[agent_id] = AgentRecord(agent_id, secret, hash_of(secret), origin=origin)
        return agent

    def _leave_origin(self, agent: AgentRecord) -> None:
        away = self._away.get(agent.origin or "")
        if away is not None and away.pop(agent.agent_id, None) is not None and not away:
            del self._away[agent.origin or ""]

    def describe(self, agent: AgentRecord, message: Register, running_max: int) -> None:
        """Apply a registration to its agent, and list the agent under its capabilities."""
        self._leave_pools(agent)
        offered = [Capability(one) if isinstance(one, str) else one for one in message.capabilities]
        agent.name, agent.description = message.name, message.description
        agent.max_tasks, agent.metadata = min(message.max_tasks, running_max), message.metadata
        agent.capabilities = {one.name: one for one in offered}
        agent.info_bytes = len(encode(Discovered(agents=[agent.info], total=1)))
        if agent.state in TARGET_STATES:
            self._join_pools(agent, descriptions_of(message))
        self._count_bytes(agent, registration_bytes(message, len(agent.words)))
        self.update_load(agent)
        self.mark(agent)

    def _count_bytes(self, agent: AgentRecord, size: int) -> None:
        self.registrations_bytes += size - agent.bytes
        agent.bytes = size

    def restore(self, row: AgentRow, running_max: int) -> AgentRecord:
        """Add an agent that a journal has kept."""
        left = AgentState.DEREGISTERED if row.departed else AgentState.GONE
        agent = AgentRecord(row.agent_id, "", row.resume_hash, AgentState.DISCONNECTED if row.there else left)
        self.agents[row.agent_id] = agent
        if agent.state in LEFT_STATES:
            self.gone[row.agent_id] = agent
        self.describe(agent, row.register, running_max)
        return agent

    def forget_unneeded(self) -> None:
        """Drop those that are gone and that nothing needs any more."""
        for agent in [agent for agent in self.gone.values() if not agent.is_needed]:
            self.forget(agent)

    def forget(self, agent: AgentRecord) -> None:
        del self.agents[agent.agent_id], self.gone[agent.agent_id]
        self._leave_origin(agent)
        self._count_bytes(agent, 0)
        self.mark(agent, is_kept=False)

    def update_load(self, agent: AgentRecord) -> None:
        """List an agent in its pools under its present load."""
        old, new = agent.load, len(agent.running) if agent.is_available else None
        if new != old:
            for pool in agent.pools:
                pool.move(agent, old, new)
            agent.load = new

    def free_agent(self, task: TaskRecord, avoiding: AgentRecord | None) -> AgentRecord | None:
        """Return an agent that can take a task now: the one to avoid only as a last choice.

        A task by capability never goes to its own requester; one that names an agent may.
        """
        agent_id, capability = task.target
        if agent_id is None:
            pool = self.pools.get(capability or "")
            if pool is None:
                return None
            return pool.least_loaded(task.requester, avoiding) or pool.least_loaded(task.requester)
        agent = self.agents.get(agent_id)
        if agent is None or agent.load is None:
            return None
        return agent if capability is None or capability in agent.capabilities else None

    def check_target(self, requester: AgentRecord, message: Delegate) -> None:
        """Refuse a task that no agent offers which is online or in its grace period."""
        if message.agent_id is None:
            pool = self.pools.get(message.capability or "")
            others = len(pool.members) - (requester.agent_id in pool.members) if pool is not None else 0
            if not others:
                text = f'no online agent offers {quoted(message.capability or "")}; start one, or set "wait"'
                raise Refused(text, code=Code.NO_AGENT)
            return
        agent = self.agents.get(message.agent_id)
        if agent is None or agent.state not in TARGET_STATES:
            text = 'no online agent has that agent_id; discover one, or set "wait"'
            raise Refused(text, code=Code.UNKNOWN_AGENT)
        if message.capability is not None and message.capability not in agent.capabilities:
            raise Refused(f"that agent does not offer {quoted(message.capability)}", code=Code.NO_AGENT)

    def check_deadlock(self, requester: AgentRecord, message: Delegate, parent: TaskRecord) -> None:
        """Refuse a subtask that could begin only after an ancestor has ended, with which it ends too.

        That is so if each agent that could take it has all its slots taken by ancestors, or is the requester and not
        named. An ancestor may end without waiting for its subtasks, so no task that could run is refused.
        """
        chain = [requester]
        while (above := parent.parent) is not None and above.assignee is not None:
            chain.append(above.assignee)
            parent = above
        able: Collection[AgentRecord] = ()
        if message.agent_id is not None:
            able = [agent for agent in (self.agents.get(message.agent_id),) if agent is not None]
        elif (pool := self.pools.get(message.capability or "")) is not None:
            able = pool.members.values()
        if not able or any(
            chain.count(agent) < agent.max_tasks and (agent is not requester or message.agent_id is not None)
            for agent in able
        ):
            return
        blocked = next(iter(able))
        cycle = [agent.agent_id for agent in (*reversed(chain[: chain.index(blocked) + 1]), blocked)]
        raise Refused(deadlock_text(message, cycle), code=Code.DEADLOCK)

    def search(self, keyword: str, limit: int, bytes_max: int) -> tuple[list[AgentInfo], int, int]:
        """Return the online agents that match a keyword, the best first, as many as fit; how many match; and how many
        were looked at.
        """
        ranks = self.index.ranks(keyword) if keyword else dict.fromkeys(self.agents.values(), 0)
        ranked = [
            (rank, len(agent.running), agent.name, agent.agent_id)
            for agent, rank in ranks.items()
            if agent.state is ONLINE
        ]
        found: list[AgentInfo] = []
        for *_, agent_id in heapq.nsmallest(limit, ranked):
            agent = self.agents[agent_id]
            if agent.info_bytes <= bytes_max:
                bytes_max -= agent.info_bytes
                found.append(agent.info)
        return found, len(ranked), self.index.scanned if keyword else len(ranks)

    def _join_pools(self, agent: AgentRecord, descriptions: str) -> None:
        for name in agent.capabilities:
            pool = self.pools.get(name)
            if pool is None:
                pool = self.pools[name] = Pool(name)
                self.index.add_pool(pool)
            pool.members[agent.agent_id] = agent
            agent.pools.append(pool)
        words = dict.fromkeys(words_of(descriptions))
        agent.words = dict(itertools.islice(words.items(), WORDS_MAX))
        self.index.add_agent(agent)

    def _leave_pools(self, agent: AgentRecord) -> None:
        for pool in agent.pools:
            pool.move(agent, agent.load, None)
            del pool.members[agent.agent_id]
            if not pool.members:
                del self.pools[pool.name]
                self.index.drop_pool(pool)
        self.index.drop_agent(agent)
        agent.pools, agent.words, agent.load = [], {}, None


class TaskTable:
    """The records of all tasks, each in one of three dictionaries, with their counts and sizes.

    `open` are those not in a final state, in the order of acceptance. A task that ends moves on to `delivered` if its
    outcome was sent (or nobody is left to send it to), or else to `undelivered` until its requester is back; both are
    in the order of their ends, so that the oldest go first. Requesters, parents and the counts are kept in step here;
    who runs a task, and who waits for which, is the Hub's affair.
    """

    def __init__(self, bytes_max: int, *, is_journaled: bool) -> None:
        self.open: dict[str, TaskRecord] = {}
        self.delivered: dict[str, TaskRecord] = {}
        self.undelivered: dict[str, TaskRecord] = {}
        self.counts = dict.fromkeys(TaskState, 0)  # Of the records that are kept.
        self.totals = {state: 0 for state in TaskState if state in FINAL_STATES}  # Of all that have ended.
        self.bytes = 0  # Of all records, ...
        self.ended_bytes = 0  # ... and of those that have ended, which may be dropped to make room.
        self.bytes_max = bytes_max
        self.sequence = 0  # Of the task accepted last.
        self.changed: dict[TaskRecord, bool] = {}  # Since the last step; False if the record was dropped.
        self._is_journaled = is_journaled

    def find(self, task_id: str) -> TaskRecord | None:
        return self.open.get(task_id) or self.delivered.get(task_id) or self.undelivered.get(task_id)

    def parent(self, agent: AgentRecord, parent_id: str) -> TaskRecord:
        """Return the task that an agent may delegate a subtask of."""
        parent = self.open.get(parent_id)
        if parent is None or parent.assignee is not agent:
            raise Refused("parent_id: this agent is not the assignee of that task", code=Code.NOT_ASSIGNED)
        if parent.depth >= DEPTH_OF_CHILDREN_MAX:
            raise Refused(f"parent_id: subtasks nest at most {DEPTH_OF_CHILDREN_MAX} deep", code=Code.TOO_DEEP)
        return parent

    def newest(self, now: float, bytes_max: int) -> list[TaskInfo]:
        """List the open tasks, those with an outcome to deliver, and the others, the newest first, as many as fit."""
        kept = (self.open, self.undelivered, self.delivered)
        listed: list[TaskInfo] = []
        for task in itertools.islice(
            itertools.chain.from_iterable(reversed(tasks.values()) for tasks in kept), LIST_MAX
        ):
            one = TaskInfo(**task.info_fields(now))
            bytes_max -= len(encode(StatusReply(tasks=[one])))
            if bytes_max < 0:
                break
            listed.append(one)
        return listed

    def __len__(self) -> int:
        return len(self.open) + len(self.undelivered) + len(self.delivered)

    def mark(self, task: TaskRecord, is_kept: bool = True) -> None:
        """Have a task's row written, or deleted, by this step."""
        if self._is_journaled:
            self.changed[task] = is_kept

    def take_changes(self, changes: Changes) -> None:
        """Add the rows of the tasks that changed since the last step."""
        for task, is_kept in self.changed.items():
            if is_kept:
                (changes.updated if task.is_journaled else changes.inserted)[task.sequence] = task.row()
                task.is_journaled = True
            elif task.is_journaled:  # Otherwise it came and went within one step.
                changes.deleted[task.sequence] = None
        self.changed = {}

    def accept(
        self, request: Delegate, requester: AgentRecord, parent: TaskRecord | None, now: float, message_bytes: int
    ) -> TaskRecord:
        """Return the record of a new task, which is pending."""
        deadline = now + request.ttl
        depth = 1
        if parent is not None:
            deadline = min(deadline, parent.deadline)
            depth = parent.depth + 1
        self.sequence += 1
        size = message_bytes + RECORD_BYTES
        task = make_task_record(request.task_id, request, requester, parent, depth, now, deadline, self.sequence, size)
        self._count(task)
        self.list_open(task)
        if self._is_journaled:
            self.changed[task] = True
        return task

    def restore(self, row: TaskRow, agent_of: Callable[[str], AgentRecord], now: float) -> TaskRecord:
        """Return the record of a task that a journal has kept; it is in none of the dictionaries yet.

        Even if the machine's clock was set back, nothing is younger than now, or lives longer than its time to live.
        """
        request = row.request
        self.sequence = row.sequence
        task = TaskRecord(
            request.task_id,
            request,
            agent_of(row.requester),
            self.open.get(request.parent_id or ""),
            row.depth,
            min(row.accepted_at, now),
            min(row.deadline, now + request.ttl),
            row.sequence,
            row.bytes,
            state=row.state,
            assignee=agent_of(row.assignee) if row.assignee is not None else None,
            attempt=row.attempt,
            ended_at=min(row.ended_at, now),
            is_journaled=True,
        )
        if row.end is not None:
            task.success, task.output, task.error = row.end.success, row.end.output, row.end.error
            task.settled_by = agent_of(row.end.sender) if row.end.sender is not None else None
            self.totals[task.state] += 1
        self._count(task)
        return task

    def _count(self, task: TaskRecord) -> None:
        self.bytes += task.bytes
        task.requester.held_bytes += task.bytes
        self.counts[task.state] += 1

    def list_open(self, task: TaskRecord) -> None:
        self.open[task.task_id] = task.requester.requested[task.task_id] = task
        if task.parent is not None:
            task.parent.children = task.parent.children or {}
            task.parent.children[task.task_id] = task

    def transition(self, task: TaskRecord, event: TaskEvent) -> None:
        """Take one step of the table. Nothing else assigns a task's state."""
        state = next_state(task.state, event)
        counts = self.counts
        counts[task.state] -= 1
        counts[state] += 1
        task.state = state
        if state in FINAL_STATES:
            self.totals[state] += 1
            del self.open[task.task_id], task.requester.requested[task.task_id]
            if task.parent is not None and task.parent.children:
                task.parent.children.pop(task.task_id, None)
        if self._is_journaled:
            self.changed[task] = True

    def grow(self, task: TaskRecord, size: int) -> None:
        """Count `size` more bytes (less, if negative) in the record of an open task."""
        task.bytes += size
        self.bytes += size
        task.requester.held_bytes += size

    def keep_undelivered(self, task: TaskRecord) -> None:
        task.requester.undelivered[task.task_id] = self.undelivered[task.task_id] = task
        self.ended_bytes += task.bytes

    def take_undelivered(self, task: TaskRecord) -> None:
        del task.requester.undelivered[task.task_id], self.undelivered[task.task_id]
        self.ended_bytes -= task.bytes

    def keep_delivered(self, task: TaskRecord) -> None:
        self.delivered[task.task_id] = task
        self.ended_bytes += task.bytes
        task.is_delivered = True
        task.requester.delivered += 1
        task.requester.held_bytes -= task.bytes

    def take_delivered(self, task_id: str) -> TaskRecord | None:
        """Take a task out of `delivered`; return it if it was there."""
        task = self.delivered.pop(task_id, None)
        if task is not None:
            self.ended_bytes -= task.bytes
            task.is_delivered = False
            task.requester.delivered -= 1
            task.requester.held_bytes += task.bytes
        return task

    def has_room(self, size: int) -> bool:
        """Return whether a record of `size` bytes fits when all ended ones are dropped for it."""
        return self.bytes - self.ended_bytes + size <= self.bytes_max

    def make_room(self, needed: int, requester: AgentRecord | None) -> None:
        """Drop ended tasks, before their retention is over, while the records are too large together.

        The oldest delivered ones go first, and then outcomes of disconnected requesters: those of the `requester` that
        needs the bytes while it holds more than its share, and then the oldest of all.
        """
        while self.bytes + needed > self.bytes_max and (self.delivered or self.undelivered):
            if self.delivered:
                oldest = self.delivered
            else:
                oldest = self.undelivered
                if requester is not None and requester.held_bytes > REQUESTER_SHARE * self.bytes_max:
                    oldest = requester.undelivered or oldest
            task = next(iter(oldest.values()))
            if oldest is not self.delivered:
                log_hub.warning("dropped outcome task=%s requester=%s", task.task_id, task.requester.agent_id)
            self.purge(task)

    def purge_older(self, horizon: float) -> bool:
        """Drop tasks that ended before `horizon`, at most TICK_BATCH of a kind; return whether more may be left."""
        kept = (self.delivered.values(), self.undelivered.values())
        oldest = itertools.chain.from_iterable(itertools.islice(tasks, TICK_BATCH) for tasks in kept)
        stale = [task for task in oldest if task.ended_at <= horizon]
        for task in stale:
            self.purge(task)
        return len(stale) >= TICK_BATCH

    def purge(self, task: TaskRecord) -> None:
        """Drop the record of an ended task."""
        self.mark(task, is_kept=False)
        if self.take_delivered(task.task_id) is None:
            self.take_undelivered(task)
        self.bytes -= task.bytes
        task.requester.held_bytes -= task.bytes
        self.counts[task.state] -= 1


class Hub:
    """Every decision about agents and tasks.

    `entropy(n)` returns n random bytes, for agents' ids and their secrets. `now` is in seconds of one clock that
    does not go back (if it does, time stands still here until it has caught up). With `is_journaled`, each step has
    the changes that must be on disk before its effects are carried out; `restore` reads them again after a restart.
    `directory`, `tasks`, `connections`, `queues` and `deadlines` are for reading.
    """

    def __init__(
        self, settings: HubSettings, *, entropy: Callable[[int], bytes], now: float, is_journaled: bool = False
    ) -> None:
        self.settings: HubSettings = settings
        self.directory = Directory(settings.agents_max, is_journaled=is_journaled)
        self.tasks = TaskTable(settings.records_bytes_max, is_journaled=is_journaled)
        self.shutting_down = False
        self.is_full = False  # The journal's disk is full: no new task is accepted.
        self.cost = 0  # What the last message cost to handle; a plain one costs 1.
        self._is_journaled = is_journaled
        self._entropy = entropy
        self._now = self._started_at = now
        self._effects: list[Effect] = []  # Of this step.
        self._message_bytes = 0  # The size of the message being handled.
        self._passed_on_max = settings.message_bytes_max - settings.envelope_bytes  # Bytes of a message that fits.
        # An agent never runs more tasks than fit into the reply to its next `register`.
        self._running_max = max(1, self._passed_on_max // REF_BYTES)
        self._refusals: dict[str, int] = {}  # How many, by code.
        self._closes: dict[str, int] = {}  # How many connections ended, by close code.
        self.connections: dict[Hashable, Connection] = {}
        self.queues: dict[tuple[str | None, str | None], PendingQueue] = {}  # By `TaskRecord.target`; none is empty.
        self._turn = 0  # How many tasks were handed out of the queues.
        self._waiting: dict[AgentRecord, int] = {}  # Pending tasks by requester; none is 0.
        self._deferred: dict[str, AgentRecord] = {}  # Can take a task once all that is due has ended.
        self.deadlines: LazyHeap[TaskRecord | AgentRecord | Connection] = LazyHeap()
        self._steps_left = TICK_BATCH  # Of this call.
        self._unfinished: collections.deque[Iterator[None]] = collections.deque()  # What `tick` goes on with.
        # Records that are kept for a second must not wait thirty for the reaper.
        self._sweep_interval_s = min(settings.reap_s, max(0.1, settings.retention_s / 10))
        self._next_sweep = now + self._sweep_interval_s

    # Facts.

    def connected(self, link: Hashable, now: float, origin: str | None = None) -> Step:
        """Add a new connection. Until it registers it may only look: `status` and `discover`.

        `origin` is the address that it comes from; None is not limited.
        """
        self._advance(now)
        connection = self.connections[link] = Connection(link, self._now, origin)
        self.deadlines.push(connection, self._now + min(self.settings.join_s, self.settings.silence_s))
        return self._take_step()

    def receive(
        self,
        link: Hashable,
        message: AgentMessage | InvalidMessage,
        now: float,
        message_bytes: int = 0,
        refusal: Refused | None = None,
    ) -> Step:
        """Handle a message of `message_bytes` bytes, or the error of one that could not be decoded.

        With `refusal`, its sender lacks the right to send it: it is counted and answered with that, and does no more.
        """
        connection = self.connections.get(link)
        if connection is None:  # The hub has closed it, and this was still on its way.
            return Step([])
        if now > self._now:  # As in _advance, without the call: this is used for every message.
            self._now = now
        connection.last_seen = self._now
        self._message_bytes = message_bytes
        self.cost = 1 + message_bytes // COST_BYTES
        try:
            if refusal is not None:
                raise refusal
            self._RECEIVERS[type(message)](self, connection, message)
        except Refused as refused:
            self._refuse(connection, refused, getattr(message, "id", None), getattr(message, "task_id", None))
        return self._take_step()

    def failed(self, link: Hashable, reply_to: str | None) -> Step:
        """Answer a message whose handling raised an unexpected exception; its effects until then are kept."""
        text = "the hub failed while it handled this message; its log has the traceback"
        self._effects.append((link, Error(reply_to=reply_to, code=Code.INTERNAL, message=text)))
        return self._take_step()

    def disconnected(self, link: Hashable, now: float, code: int = 1006) -> Step:
        """Remove a lost connection. Its agent's session is kept for the grace period."""
        self._advance(now)
        connection = self.connections.get(link)
        if connection is not None:
            self._forget_connection(connection, code)
        return self._take_step()

    def tick(self, now: float) -> Step:
        """Handle what is due, TICK_BATCH deadlines at most; after that, next_deadline() may be past again."""
        self._advance(now)
        if self._unfinished:
            self._begin(self._unfinished.popleft())
        for _ in range(TICK_BATCH):
            due = self.deadlines.first()
            if due is None or due[0] > self._now:
                self._assign_deferred()  # Only now: no task is handed out whose deadline has come.
                break
            self.deadlines.discard(due[1])
            self._on_deadline(due[1])
        if self._now >= self._next_sweep:
            self._reap()
        return self._take_step()

    def redeliver(self, task_id: str, now: float) -> Step:
        """Redeliver an outcome that was not sent because the requester disconnected."""
        self._advance(now)
        task = self.tasks.take_delivered(task_id)
        if task is not None:
            self.tasks.mark(task)
            self._deliver_outcome(task)
        return self._take_step()

    def next_deadline(self) -> float:
        """Return when `tick` is due next."""
        if self._deferred or self._unfinished:
            return self._now
        first = self.deadlines.first()
        return self._next_sweep if first is None else min(first[0], self._next_sweep)

    def shut_down(self) -> None:
        """Accept no new task from now on."""
        self.shutting_down = True

    @property
    def in_progress(self) -> int:
        """How many tasks are in progress."""
        return self.tasks.counts[TaskState.IN_PROGRESS]

    def summary(self) -> dict[str, Any]:
        """Return what `status` reports of the hub itself."""
        online = sum(1 for connection in self.connections.values() if connection.agent is not None)
        most_waiting = heapq.nlargest(WAITING_MAX, self._waiting.items(), key=lambda one: one[1])
        return {
            "version": __version__,
            "protocol": PROTOCOL_VERSION,
            "uptime_s": round(self._now - self._started_at, 3),
            "agents": online,
            "agents_away": sum(1 for agent in self.directory.agents.values() if agent.connection is None),
            "connections": len(self.connections),
            "tasks": {state.value: count for state, count in self.tasks.counts.items()},
            "ended": {state.value: count for state, count in self.tasks.totals.items()},
            "refused": dict(self._refusals),
            "closed": dict(self._closes),
            "waiting": {agent.agent_id: waiting for agent, waiting in most_waiting},
            "records_bytes": self.tasks.bytes + self.directory.registrations_bytes,
            "shutting_down": self.shutting_down,
            "journal": ("full" if self.is_full else "ok") if self._is_journaled else "none",
        }

    # Steps, and restarts.

    def _take_step(self) -> Step:
        """Return the effects and changes since the last step."""
        effects, self._effects = self._effects, []
        self._steps_left = TICK_BATCH
        if self._is_journaled and (self.tasks.changed or self.directory.changed):
            return Step(effects, self._take_changes())
        return Step(effects)

    def _take_changes(self) -> Changes:
        changes = Changes()
        self.tasks.take_changes(changes)
        agents, self.directory.changed = self.directory.changed, {}
        for agent, is_kept in agents.items():
            changes.agents[agent.agent_id] = agent.row() if is_kept else None
        return changes

    def restore(self, agents: Iterable[AgentRow], tasks: Iterable[TaskRow], redeliver_after: float) -> Step:
        """Continue from the rows of a journal, before any other call. Each agent gets a new grace period.

        Outcomes of tasks that ended after `redeliver_after` are delivered again: the last ones may have been lost with
        the hub.
        """
        known: dict[str, AgentRecord] = {}

        def agent_of(agent_id: str) -> AgentRecord:
            """Return an agent, or a stand-in for one whose record was dropped."""
            return known.setdefault(agent_id, AgentRecord(agent_id, "", "", AgentState.DEREGISTERED))

        for agent_row in agents:
            agent = known[agent_row.agent_id] = self.directory.restore(agent_row, self._running_max)
            if agent_row.there:
                self.deadlines.push(agent, self._now + self.settings.grace_s)
        ended = []
        for row in sorted(tasks, key=lambda row: row.sequence):
            task = self.tasks.restore(row, agent_of, self._now)
            if task.state in FINAL_STATES:
                ended.append((task, row.is_delivered and row.ended_at < redeliver_after))
            else:
                self._restore_open(task)
        for task, is_delivered in sorted(ended, key=lambda one: one[0].ended_at):
            self._restore_ended(task, is_delivered)
        orphans = [task for task in self.tasks.open.values() if task.is_orphan]
        self._begin(self._cancel(orphans))
        for agent in known.values():  # The hub died before it had released all of them.
            if agent.state in LEFT_STATES and (agent.running or agent.awaited):
                self._begin(self._release_all(agent))
        self.directory.forget_unneeded()
        return self._take_step()

    def _restore_open(self, task: TaskRecord) -> None:
        self.tasks.list_open(task)
        self.deadlines.push(task, task.deadline)
        if task.state is PENDING:
            self._enqueue(task)
        elif task.assignee is not None:
            task.assignee.running[task.task_id] = task

    def _restore_ended(self, task: TaskRecord, is_delivered: bool) -> None:
        if is_delivered or task.requester.state is AgentState.DEREGISTERED:
            self.tasks.keep_delivered(task)
        else:
            self.tasks.keep_undelivered(task)
            self.tasks.mark(task)  # As undelivered, in case that this hub too dies before it can deliver.

    # Joining and leaving.

    def _on_register(self, connection: Connection, message: Register) -> None:
        self.cost += len(message.capabilities)
        needed = check_registration(message, self.settings)
        agent = connection.agent
        former = agent or self.directory.agents.get(message.agent_id or "")
        needed -= former.bytes if former is not None else 0
        if needed > 0:
            self._reserve(needed, agent)
        if agent is None:
            agent = self._resumed(connection, message)
            agent = agent or self.directory.add(message.name, connection.origin, self._entropy)
            self._attach(agent, connection)
            log_hub.info("joined agent=%s", agent.agent_id)
        self.directory.describe(agent, message, self._running_max)
        # The reply lists what the agent is running, so it goes before the tasks that it gets now.
        if message.id is not None:
            self._send(connection, self._registered(agent, message.id))
        self._begin(self._deliver_kept(agent))
        self._assign_waiting(agent)

    def _resumed(self, connection: Connection, message: Register) -> AgentRecord | None:
        """Return the agent whose session a connection resumes, if the hub knows it."""
        agent = self.directory.agents.get(message.agent_id or "")
        if agent is None:
            return None
        secret = message.resume or ""
        if not hmac.compare_digest(agent.resume_hash, hash_of(secret)):
            connection.wrong_secrets += message.resume is not None  # A forgotten one is no guess.
            raise Refused("resume: wrong secret; register without agent_id for a new identity", code=Code.UNAUTHORIZED)
        agent.resume = secret  # After a restart, the hub knows only its hash.
        if agent.connection is not None:  # Most likely dead, and not noticed yet: the network was changed.
            self._close(agent.connection, CloseCode.REPLACED, "a newer connection has resumed this agent's session")
        self.directory.transition(agent, AgentEvent.RESUMED)
        return agent

    def _attach(self, agent: AgentRecord, connection: Connection) -> None:
        self.deadlines.discard(agent)
        self._set_known(connection)
        agent.connection, connection.agent, agent.origin = connection, agent, connection.origin
        agent.drain_id = None

    def _registered(self, agent: AgentRecord, reply_to: str) -> Registered:
        return Registered(
            reply_to=reply_to,
            agent_id=agent.agent_id,
            resume=agent.resume,
            heartbeat_s=self.settings.heartbeat_s,
            max_bytes=self.settings.message_bytes_max,
            tasks=[TaskRef(task.task_id, task.attempt) for task in agent.running.values()],
        )

    def _on_deregister(self, connection: Connection, message: Deregister) -> None:
        agent = connection.agent or refuse_unregistered()
        if not message.drain:
            self._leave(agent, agent.drain_id, message.id)
            return
        if agent.state is DRAINING:
            text = "drain: already requested; the reply follows when the last task has ended"
            raise Refused(text, code=Code.SHUTTING_DOWN)
        agent.drain_id = message.id
        self.directory.transition(agent, AgentEvent.DRAIN_REQUESTED)
        self._begin(self._release_awaited(agent))
        self._leave_if_drained(agent)

    def _leave_if_drained(self, agent: AgentRecord) -> None:
        if agent.state is DRAINING and not agent.running:
            self._leave(agent, agent.drain_id)

    def _leave(self, agent: AgentRecord, *reply_ids: str | None) -> None:
        """Let an agent go, with a reply to each of its requests to."""
        connection = agent.connection
        if connection is None:
            raise AssertionError("an agent without a connection waits out its grace period")
        for reply_to in reply_ids:
            if reply_to is not None:
                self._send(connection, Deregistered(reply_to=reply_to))
        self._close(connection, CloseCode.DONE, "deregistered", AgentEvent.DEREGISTERED)
        self._remove_agent(agent)

    def _close(
        self, connection: Connection, code: int, reason: str, event: AgentEvent = AgentEvent.CONNECTION_LOST
    ) -> None:
        self._effects.append((connection.link, Close(code, reason)))
        self._forget_connection(connection, code, event)

    def _set_known(self, connection: Connection) -> None:
        """Note that a connection has registered or asked something, so that it may stay."""
        if not connection.is_known:
            connection.is_known = True
            self.deadlines.push(connection, self._now + self.settings.silence_s)

    def _forget_connection(
        self, connection: Connection, code: int, event: AgentEvent = AgentEvent.CONNECTION_LOST
    ) -> None:
        """Remove a connection, and start the grace period of its agent unless that has deregistered."""
        del self.connections[connection.link]
        self.deadlines.discard(connection)
        key = str(code) if code in CLOSE_CODES else "other"
        count(self._closes, key)
        agent, connection.agent = connection.agent, None
        level = logging.WARNING if code in WARNING_CLOSE_CODES else logging.DEBUG
        log_hub.log(level, "closed code=%s agent=%s", key, agent.agent_id if agent is not None else None)
        if agent is not None:
            agent.connection = None
            self.directory.transition(agent, event)
            if event is AgentEvent.CONNECTION_LOST:
                self.deadlines.push(agent, self._now + self.settings.grace_s)

    def _remove_agent(self, agent: AgentRecord) -> None:
        """Take an agent out that is gone or deregistered. Its tasks are retried or fail."""
        what = "left" if agent.state is AgentState.DEREGISTERED else "lost"
        log_hub.info("%s agent=%s running=%d", what, agent.agent_id, len(agent.running))
        self._begin(self._release_all(agent))

    def _begin(self, steps: Iterator[None]) -> None:
        """Take as many steps as this call may still take, and leave the others to `tick`."""
        while self._steps_left > 0:
            self._steps_left -= 1
            if next(steps, True):  # None is left.
                return
        self._unfinished.append(steps)

    def _release_all(self, agent: AgentRecord) -> Iterator[None]:
        """Retry or fail the tasks of an agent, one a step, for as long as it is gone or deregistered."""
        left = agent.state is AgentState.DEREGISTERED
        reason = "its agent deregistered" if left else "its agent did not reconnect within its grace period"
        while agent.running and agent.state in LEFT_STATES:
            task = next(iter(agent.running.values()))
            self._retry(task, reason)
            self._follow_up(task, agent)
            yield
        yield from self._release_awaited(agent)
        if not agent.is_needed and agent.agent_id in self.directory.gone:
            self.directory.forget(agent)

    def _release_awaited(self, agent: AgentRecord) -> Iterator[None]:
        """Fail the pending tasks that name an agent which takes no more, one a step, unless they may wait for it."""
        for task in list(agent.awaited.values()):
            if agent.state in TARGET_STATES:  # It is back, and gets those that are left.
                return
            if task.state is PENDING and not task.waits_for_agent:
                self._end(task, TaskEvent.LOST, ErrorInfo(Code.AGENT_LOST, "its agent left before the task began"))
            yield

    def _deliver_kept(self, agent: AgentRecord) -> Iterator[None]:
        """Deliver the outcomes that were kept for an agent, one a step, for as long as it is there."""
        while agent.undelivered and agent.connection is not None:
            task = next(iter(agent.undelivered.values()))
            self.tasks.take_undelivered(task)
            self.tasks.mark(task)
            self._deliver_outcome(task)
            yield

    def _on_deadline(self, subject: TaskRecord | AgentRecord | Connection) -> None:
        if isinstance(subject, TaskRecord):
            self._expire(subject)
        elif isinstance(subject, AgentRecord):
            self.directory.transition(subject, AgentEvent.GRACE_EXPIRED)
            self._remove_agent(subject)
        else:
            self._on_silence(subject)

    def _on_silence(self, connection: Connection) -> None:
        silent_since = connection.last_seen + self.settings.silence_s
        if silent_since <= self._now:
            self._close(connection, CloseCode.SILENT, "silent for three heartbeat intervals")
        elif not connection.is_known:
            # Not 1008: a program that was only slow may try again.
            text = f"neither registered nor asked anything within {self.settings.join_s:g} s"
            self._close(connection, CloseCode.SILENT, text)
        else:  # It has spoken since this deadline was set: moving it with each message would cost more.
            self.deadlines.push(connection, silent_since)

    def _expire(self, task: TaskRecord) -> None:
        text = f"its time to live of {task.deadline - task.accepted_at:g} s has expired"
        self._end(task, TaskEvent.EXPIRED, ErrorInfo(Code.TIMEOUT, text))

    def _on_heartbeat(self, connection: Connection, message: Heartbeat) -> None:
        if connection.agent is None:
            refuse_unregistered()
        if message.id is not None:
            self._send(connection, HeartbeatAck(reply_to=message.id))

    # Finding.

    def _on_discover(self, connection: Connection, message: Discover) -> None:
        self._set_known(connection)
        keyword = message.capability.lower()
        found, total, scanned = self.directory.search(keyword, message.limit, self._passed_on_max)
        self.cost += scanned // COST_AGENTS
        if message.id is not None:
            self._send(connection, Discovered(reply_to=message.id, agents=found, total=total))

    def _on_broadcast(self, connection: Connection, message: Broadcast) -> None:
        sender = connection.agent or refuse_unregistered()
        if self._message_bytes > self._passed_on_max:
            self._check_size(message)
        delivery = BroadcastDelivery(sender=sender.agent_id, message=message.message, capability=message.capability)
        recipients = 0
        for agent in list(self._audience(message.capability)):
            if agent is not sender and agent.connection is not None:
                self._send(agent.connection, delivery)
                recipients += 1
        self.cost *= max(1, recipients)  # Each recipient is a message to send.
        if message.id is not None:
            self._send(connection, BroadcastReply(reply_to=message.id, recipients=recipients))

    def _audience(self, capability: str | None) -> Iterable[AgentRecord]:
        if capability is None:
            return (one.agent for one in self.connections.values() if one.agent is not None)
        pool = self.directory.pools.get(capability)
        return pool.members.values() if pool is not None else ()

    # Asking.

    def _on_status(self, connection: Connection, message: Status) -> None:
        reply: StatusReply | TaskAck
        if message.task_id is None:
            reply = self._task_list() if message.tasks else StatusReply(hub=self.summary())
        elif message.progress is not None or message.detail is not None:
            reply = self._on_progress(connection.agent or refuse_unregistered(), message)
        else:
            reply = self._task_report(self._known_task(message.task_id), connection.agent, message.id)
        self._set_known(connection)
        if message.id is not None:
            reply.reply_to = message.id
            self._send(connection, reply)

    def _on_progress(self, agent: AgentRecord, message: Status) -> TaskAck:
        task = self._open_task(message.task_id or "")
        if task.assignee is not agent:
            raise Refused("this agent is not the assignee of that task", code=Code.NOT_ASSIGNED)
        if self._message_bytes > self._passed_on_max:
            self._check_size(message)
        task.seq += 1
        task.progress, task.detail = message.progress, message.detail
        self.tasks.grow(task, self._message_bytes - task.detail_bytes)
        task.detail_bytes = self._message_bytes
        if task.requester.connection is not None:
            self._send(task.requester.connection, task.progress_report())
        return task.ack()

    def _task_report(self, task: TaskRecord, viewer: AgentRecord | None, reply_to: str | None) -> StatusReply:
        """Return what the viewer may see of a task, as much as fits into one message: its output always does."""
        full = StatusReply(reply_to=reply_to, **task.info_fields(self._now), seq=task.seq or None)
        if viewer is None or viewer not in (task.requester, task.assignee):
            return full
        full.input, full.detail, full.output, full.error = task.request.input, task.detail, task.output, task.error
        lean = dataclasses.replace(full, input=None, detail=None)
        for report in (full, lean):
            if task.bytes <= self._passed_on_max or len(encode(report)) <= self.settings.message_bytes_max:
                return report
        return task.least_report(reply_to)

    def _task_list(self) -> StatusReply:
        """List the open tasks and then the ended ones, the newest first, as many as fit."""
        listed = self.tasks.newest(self._now, self._passed_on_max)
        self.cost += len(listed) // COST_TASKS
        return StatusReply(tasks=listed, total=len(self.tasks))

    # Delegating.

    def _on_delegate(self, connection: Connection, message: Delegate) -> None:
        agent = connection.agent or refuse_unregistered()
        known = self.tasks.find(message.task_id)
        if known is not None:
            self._repeat(connection, agent, known, message)
            return
        parent = self._admit(agent, message)
        task = self.tasks.accept(message, agent, parent, self._now, self._message_bytes)
        self.deadlines.push(task, task.deadline)
        worker = self._place(task)
        self._acknowledge(connection, message, task)
        if worker is not None:
            self._hand_out(task, worker)

    def _repeat(self, connection: Connection, agent: AgentRecord, task: TaskRecord, message: Delegate) -> None:
        """Answer a delegate that was accepted before: its requester repeats it when it missed the reply."""
        if task.requester is not agent or not same_content(task.request, message):
            raise Refused("task_id: used by another task; choose a new one", code=Code.DUPLICATE_TASK)
        self._acknowledge(connection, message, task)
        if task.state in FINAL_STATES:
            self._send(connection, task.outcome())

    def _admit(self, agent: AgentRecord, message: Delegate) -> TaskRecord | None:
        """Return the parent of a new task, if it has one; raise Refused if it cannot be accepted."""
        if self.shutting_down:
            raise Refused("the hub is shutting down; retry when it is back", code=Code.SHUTTING_DOWN)
        if self.is_full:
            raise Refused("the hub's disk is full; retry later", code=Code.OVERLOADED)
        if message.agent_id is None and message.capability is None:
            raise Refused("capability: name a capability, an agent_id, or both", code=Code.INVALID_MESSAGE)
        parent = self.tasks.parent(agent, message.parent_id) if message.parent_id is not None else None
        if not message.wait:  # Otherwise the task may wait for an agent that does not exist yet.
            if parent is not None:
                self.directory.check_deadlock(agent, message, parent)
            self.directory.check_target(agent, message)
        if self._message_bytes > self._passed_on_max:
            self._check_size(message)
        self._check_limits(agent)
        return parent

    def _check_size(self, message: Delegate | Result | Status | Broadcast) -> None:
        """Refuse a large message if it would be too large when the hub passes it on, with the fields that it adds."""
        if len(encode(message)) > self._passed_on_max:
            limit = self.settings.message_bytes_max
            raise Refused(f"with the fields that the hub adds, the message exceeds {limit} bytes", code=Code.TOO_LARGE)

    def _check_limits(self, agent: AgentRecord) -> None:
        """Refuse a task too many; drop ended tasks if its record needs their bytes."""
        settings, tasks = self.settings, self.tasks
        if len(agent.requested) >= settings.open_tasks_max:
            text = f"this agent has reached its limit of {settings.open_tasks_max} open tasks; wait until one ends"
            raise Refused(text, code=Code.OVERLOADED)
        if tasks.counts[PENDING] >= settings.pending_tasks_max:
            text = f"the hub has reached its limit of {settings.pending_tasks_max} pending tasks; retry later"
            raise Refused(text, code=Code.OVERLOADED)
        share = REQUESTER_SHARE * settings.records_bytes_max
        needed = self._message_bytes + RECORD_BYTES
        if agent.held_bytes + needed > share:
            text = f"this agent has reached its limit of {share:.0f} bytes of tasks; wait until one ends"
            raise Refused(text, code=Code.OVERLOADED)
        self._reserve(needed, agent)  # Last, because it drops records: a task that is refused must change nothing.

    def _reserve(self, needed: int, agent: AgentRecord | None) -> None:
        """Drop ended tasks if a new record needs their bytes; refuse it if that is not enough."""
        needed += self.directory.registrations_bytes
        if self.tasks.bytes + needed > self.settings.records_bytes_max:
            if not self.tasks.has_room(needed):
                text = (
                    f"the hub has reached its limit of {self.settings.records_bytes_max} bytes of records; retry later"
                )
                raise Refused(text, code=Code.OVERLOADED)
            self.tasks.make_room(needed, agent)

    def _place(self, task: TaskRecord, avoiding: AgentRecord | None = None) -> AgentRecord | None:
        """Assign a pending task to a free agent, the one to avoid only as a last choice, or let it wait.

        Return the agent, to which the task is still to be handed out. A task whose deadline has come, and that `tick`
        is about to end, is given to nobody.
        """
        agent = self.directory.free_agent(task, avoiding) if self._now < task.deadline else None
        if agent is None:
            self._enqueue(task)
        else:
            self._assign(task, agent)
            self.directory.update_load(agent)
        return agent

    def _enqueue(self, task: TaskRecord) -> None:
        queue = self.queues.get(task.target)
        if queue is None:
            queue = self.queues[task.target] = PendingQueue()
        queue.push(task, self._turn)
        self._waiting[task.requester] = self._waiting.get(task.requester, 0) + 1
        named = self.directory.agents.get(task.request.agent_id or "")
        if named is not None:
            named.awaited[task.task_id] = task

    def _unqueue(self, task: TaskRecord) -> None:
        queue = self.queues[task.target]
        queue.discard(task)
        if not queue:
            del self.queues[task.target]
        self._waiting[task.requester] -= 1
        if not self._waiting[task.requester]:
            del self._waiting[task.requester]
        named = self.directory.agents.get(task.request.agent_id or "")
        if named is not None:
            named.awaited.pop(task.task_id, None)

    def _assign(self, task: TaskRecord, agent: AgentRecord) -> None:
        self.tasks.transition(task, ASSIGNED)
        task.attempt += 1
        task.assignee = agent
        agent.running[task.task_id] = task

    def _hand_out(self, task: TaskRecord, agent: AgentRecord) -> None:
        """Send a task to its assignee."""
        if agent.connection is None:
            raise AssertionError("only an agent that is online is free")
        self._send(agent.connection, task.delivery(agent, self._now))

    def _assign_waiting(self, agent: AgentRecord) -> None:
        """Hand waiting tasks to an agent for as long as it can take one."""
        while self.tasks.counts[PENDING] and agent.is_available:
            found = ((self.queues.get(target), excluded) for target, excluded in agent.targets())
            queues = [(queue, excluded) for queue, excluded in found if queue is not None]
            waiting = [one for queue, excluded in queues if (one := queue.first(excluded)) is not None]
            if not waiting:
                break
            _, task = min(waiting)
            if task.deadline <= self._now:  # Its turn and its deadline have come at once: `tick` ends it first.
                self._deferred[agent.agent_id] = agent
                break
            self._unqueue(task)
            self._turn += 1
            for queue, _ in queues:
                queue.take_turn(task.requester, self._turn)
            self._assign(task, agent)
            self._hand_out(task, agent)
        self.directory.update_load(agent)

    def _assign_deferred(self) -> None:
        deferred, self._deferred = self._deferred, {}
        for agent in deferred.values():
            self._assign_waiting(agent)

    # Ending.

    def _on_result(self, connection: Connection, message: Result) -> None:
        agent = connection.agent or refuse_unregistered()
        task = self._open_task(message.task_id)
        task.check_result(agent, message, self._now)
        if self._message_bytes > self._passed_on_max:
            self._check_size(message)
        self.tasks.grow(task, self._message_bytes)
        worker = task.assignee
        if worker is agent:
            self._conclude(task, message)
        else:
            reason = error_info(message.error).message or "cancelled by its requester"
            self._settle(task, TaskEvent.CANCELLED, error=ErrorInfo(Code.CANCELLED, reason))
        self._acknowledge(connection, message, task)
        self._follow_up(task, worker)

    def _conclude(self, task: TaskRecord, message: Result) -> None:
        """Apply the result of a task's assignee."""
        if message.success:
            task.success, task.output = True, message.output
            self._settle(task, SUCCEEDED, sender=task.assignee)
            return
        error = error_info(message.error)
        if error.code == Code.AGENT_LOST:  # It never got the task, or lost it, and reports so after a reconnect.
            self._retry(task, error.message, reporter=task.assignee)
        else:
            self._settle(task, TaskEvent.ERRED, sender=task.assignee, error=error)

    def _retry(self, task: TaskRecord, reason: str, reporter: AgentRecord | None = None) -> None:
        """Make a task pending again whose agent was lost, if it may be retried; fail it if not."""
        if task.attempt > task.request.max_retries:  # The first attempt is no retry.
            self._settle(task, TaskEvent.LOST, sender=reporter, error=ErrorInfo(Code.AGENT_LOST, reason))
            return
        self.tasks.transition(task, TaskEvent.RETRIED)
        if task.assignee is not None:
            del task.assignee.running[task.task_id]
        task.assignee = None
        task.progress = task.detail = None  # Of the attempt that has failed; `seq` counts on over all of them.
        self.tasks.grow(task, -task.detail_bytes)
        task.detail_bytes = 0

    def _settle(
        self, task: TaskRecord, event: TaskEvent, *, sender: AgentRecord | None = None, error: ErrorInfo | None = None
    ) -> None:
        """Take an open task to its final state. `sender` is its assignee if its result does that."""
        if task.state is PENDING:
            self._unqueue(task)
        self.tasks.transition(task, event)
        task.error, task.settled_by, task.ended_at = error, sender, self._now
        self.deadlines.discard(task)
        if task.assignee is not None:
            del task.assignee.running[task.task_id]

    def _follow_up(self, task: TaskRecord, worker: AgentRecord | None) -> None:
        """Do what follows when a task has left its worker, because it has ended or is retried: cancel its subtasks,
        deliver its outcome or hand it out again, and fill the slot that is free now.
        """
        if task.children:
            children, task.children = list(task.children.values()), None
            self._begin(self._cancel(children))
        if task.state is PENDING:
            taker = self._place(task, avoiding=worker)
            if taker is not None:
                self._hand_out(task, taker)
        else:
            self._deliver_outcome(task)
            if worker is not None and worker is not task.settled_by and worker.connection is not None:
                self._send(worker.connection, task.ack())  # It must stop.
        if worker is not None:  # Its free slot is filled last, so that what it did comes before what it gets.
            self._assign_waiting(worker)
            if worker.state is DRAINING:
                self._leave_if_drained(worker)

    def _cancel(self, children: list[TaskRecord]) -> Iterator[None]:
        """Cancel subtasks whose parent task has ended or is retried, one a step."""
        error = ErrorInfo(Code.CANCELLED, "its parent task has ended")
        deadlines = [child.deadline for child in children]
        for child in children:  # Until its turn comes, nobody gets it and no result counts.
            child.deadline = min(child.deadline, self._now)
        for child, deadline in zip(children, deadlines, strict=True):
            child.deadline = deadline
            if child.state not in FINAL_STATES:
                self._end(child, TaskEvent.CANCELLED, error)
            yield
        self._assign_deferred()  # Agents that became free while a subtask that nobody gets was first in line for them.

    def _end(self, task: TaskRecord, event: TaskEvent, error: ErrorInfo) -> None:
        """End a task by other means than a result."""
        worker = task.assignee
        self._settle(task, event, error=error)
        self._follow_up(task, worker)

    def _deliver_outcome(self, task: TaskRecord) -> None:
        """Send the outcome of a task to its requester, or keep it until its requester is back."""
        requester = task.requester
        if requester.connection is not None:
            self._send(requester.connection, task.outcome())
            self.tasks.keep_delivered(task)
        elif requester.state is AgentState.DEREGISTERED:
            self.tasks.keep_delivered(task)  # Nobody is left to deliver it to.
        else:
            self.tasks.keep_undelivered(task)
        if self.tasks.bytes + self.directory.registrations_bytes > self.settings.records_bytes_max:
            self.tasks.make_room(self.directory.registrations_bytes, requester)

    def _reap(self) -> None:
        """Drop ended tasks past their retention, and gone agents that nothing needs."""
        is_more_left = self.tasks.purge_older(self._now - self.settings.retention_s)
        self.directory.forget_unneeded()
        self._next_sweep = self._now + (0 if is_more_left else self._sweep_interval_s)

    # What the others share.

    def _acknowledge(self, connection: Connection, message: Delegate | Result, task: TaskRecord) -> None:
        """Reply to a message with the new state of its task, before the effects that follow from that."""
        if message.id is not None:
            self._effects.append((connection.link, task.ack(message.id)))

    def _advance(self, now: float) -> None:
        if now > self._now:
            self._now = now

    def _send(self, connection: Connection, message: HubOutput) -> None:
        self._effects.append((connection.link, message))

    def _refuse(
        self, connection: Connection, why: AgentHubError, reply_to: str | None, task_id: str | None = None
    ) -> None:
        self._send(connection, Error(reply_to=reply_to, code=why.code, message=why.message, task_id=task_id))
        count(self._refusals, why.code)
        log_hub.warning("refused code=%s agent=%s", why.code, connection.agent.agent_id if connection.agent else None)
        if connection.wrong_secrets >= TRIES_MAX:
            self._close(connection, CloseCode.NOT_ALLOWED, "too many wrong secrets")

    def _known_task(self, task_id: str) -> TaskRecord:
        task = self.tasks.find(task_id)
        if task is None:
            raise Refused("task_id: unknown to this hub; its record may have expired", code=Code.UNKNOWN_TASK)
        return task

    def _open_task(self, task_id: str) -> TaskRecord:
        task = self.tasks.open.get(task_id)
        if task is None:
            self._known_task(task_id)
            raise Refused("that task has already ended", code=Code.TASK_OVER)
        return task

    def _on_invalid(self, connection: Connection, message: InvalidMessage) -> None:
        self._refuse(connection, message, message.reply_to)

    _RECEIVERS: typing.ClassVar[dict[type, Callable[[Hub, Connection, Any], None]]] = {
        Register: _on_register,
        Deregister: _on_deregister,
        Discover: _on_discover,
        Delegate: _on_delegate,
        Result: _on_result,
        Status: _on_status,
        Broadcast: _on_broadcast,
        Heartbeat: _on_heartbeat,
        InvalidMessage: _on_invalid,
    }


def refuse_unregistered() -> NoReturn:
    text = "register first; before that, only status and discover are allowed"
    raise Refused(text, code=Code.NOT_REGISTERED)


def hash_of(secret: str) -> str:
    """Return the SHA-256 of a secret, in hex, which is kept and compared instead of it. Any text has one."""
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def check_registration(message: Register, settings: HubSettings) -> int:
    """Refuse an agent whose registration is larger than this hub accepts; return what it counts at most."""
    if len(message.capabilities) > settings.capabilities_max:
        text = f"capabilities: at most {settings.capabilities_max} per agent on this hub; register several agents"
        raise Refused(text, code=Code.OVERLOADED)
    if len(json.dumps(message.metadata)) > settings.metadata_bytes_max:
        text = f"metadata: at most {settings.metadata_bytes_max} bytes as JSON on this hub"
        raise Refused(text, code=Code.OVERLOADED)
    if len(descriptions_of(message).encode(errors="surrogatepass")) > DESCRIPTIONS_BYTES_MAX:
        text = f"description: all of an agent may have {DESCRIPTIONS_BYTES_MAX} bytes together; register several agents"
        raise Refused(text, code=Code.TOO_LARGE)
    if schemas_bytes(one for one in message.capabilities if isinstance(one, Capability)) > SCHEMAS_BYTES_MAX:
        text = f"capabilities: their schemas may have {SCHEMAS_BYTES_MAX} bytes together; register several agents"
        raise Refused(text, code=Code.TOO_LARGE)
    return registration_bytes(message, len(descriptions_of(message)) // 2)


def descriptions_of(message: Register) -> str:
    """Return all descriptions of an agent and its capabilities."""
    offered = (one.description for one in message.capabilities if isinstance(one, Capability))
    return " ".join((message.description, *offered))


def registration_bytes(message: Register, words: int) -> int:
    """Return what an agent counts among the records if it can be found by so many words."""
    offered = [one for one in message.capabilities if isinstance(one, Capability)]
    size = JSON_FACTOR * (len(json.dumps(message.metadata)) + schemas_bytes(offered))
    size += 2 * len(descriptions_of(message)) + WORD_BYTES * min(words, WORDS_MAX)
    return max(0, size + CAPABILITY_BYTES * len(message.capabilities) - AGENT_BYTES)


def schemas_bytes(offered: Iterable[Capability]) -> int:
    """Return how large the schemas of some capabilities are together, as JSON."""
    schemas = itertools.chain.from_iterable((one.input_schema, one.output_schema) for one in offered)
    return sum(len(json.dumps(schema)) for schema in schemas if schema is not None)


def quoted(name: str) -> str:
    """Return the name of a capability in quotes, for an error text; shortened, because a reply has a limit too.

    Nothing else that came in is quoted in an error: it might be a secret in the wrong field.
    """
    return f'"{name}"' if len(name) <= 48 else f'"{name[:47]}…"'


def deadlock_text(message: Delegate, cycle: list[str]) -> str:
    """Return the text for a task that could never begin, because each agent of a cycle would wait for the next."""
    if len(cycle) > 4:
        cycle = [*cycle[:2], "…", *cycle[-2:]]
    target = quoted(message.capability) if message.capability is not None else "this agent"
    return (
        f"no slot for {target} until the parent task ends: {' → '.join(cycle)}; raise max_tasks or start another agent"
    )


def count(counts: dict[str, int], what: str) -> None:
    counts[what] = counts.get(what, 0) + 1


def error_info(error: str | ErrorInfo | None) -> ErrorInfo:
    """Return the error of a failed result in its full form: a plain string is the text of `failed`."""
    if isinstance(error, ErrorInfo):
        return error
    return ErrorInfo(Code.FAILED, error or "")


def same_content(one: Delegate, other: Delegate) -> bool:
    """Return whether two delegates are the same task: all fields but the id, as JSON (1 is neither 1.0 nor true)."""

    def content(message: Delegate, given: Any) -> str:
        fields = {name: getattr(message, name) for name in field_names(Delegate) if name not in ("id", "input")}
        return json.dumps([fields, given], sort_keys=True)

    if content(one, None) != content(other, None):
        return False
    # Most are sent again as they were; spaces and the order of fields make no difference.
    if field_text(one.input) == field_text(other.input):
        return True
    return content(one, value_of(one.input)) == content(other, value_of(other.input))


# ============================================================================================
# 5 Journal
#
# What must survive the hub's process, in one SQLite file (https://sqlite.org/wal.html). The journal
# decides nothing: it stores rows as the hub gives them, and returns them at the next start.
#
# Contents. One row per agent: its registration, the hash of its resume secret, its state. One
# row per task: some columns are written when it is accepted and never change, the others are updated
# with its state; the row is deleted when its record is purged. Progress reports, broadcasts and
# heartbeats are not written.
#
# When. All changes that came up during one write make up the next one, in one transaction, and the
# effects that follow from them (the acknowledgement, the task to its worker, the outcome to its
# requester) are held back until it has succeeded: see GroupCommit in section 7. So everything that
# was acknowledged is in the file, and what is not in the file had no effect.
#
#                    process killed     power lost               disk full
#   sync "full"      nothing is lost    nothing is lost          new tasks are rejected,
#   sync "normal"    nothing is lost    the last writes may be   the others can still end
#
# Outcomes. The column `told` is the number of the write that recorded an outcome's delivery. The
# effects of the last write may not have been carried out, so after a restart its outcomes are
# delivered again; those of earlier writes are not.
#
# Reserve. A file of RESERVE_BYTES next to the journal is deleted when a write fails, which frees
# enough space for open tasks to end. Until it can be allocated again, the hub rejects new tasks.
#
# Clock. The hub's clock restarts with the machine, so times are stored as seconds since 1970: the
# hub's time plus `clock_offset`. A hub keeps the offset of its start for all rows. If the offset has
# changed by more than CLOCK_STEP_S, the machine's clock was set; then all times in the file are moved
# by the same step, because otherwise deadlines would shift at the next start.
#
# Files: hub.db, hub.db-wal (SQLite's write-ahead log), hub.db-reserve, and for another namespace
# hub.db.NAMESPACE with the same two next to it.
# ============================================================================================

JOURNAL_VERSION = 1
JOURNAL_ID = 0x41484A4C  # "AHJL", PRAGMA application_id: distinguishes a journal from other SQLite files.
RESERVE_BYTES = 8_388_608  # Enough for the outcomes of open tasks while the disk is full.
CLOCK_STEP_S = 0.8  # A smaller difference of the offset is drift or jitter, and ignored.
UNCHANGED = "the file was not changed"
WAL_BYTES_MAX = 67_108_864  # To which the write-ahead log is truncated after a checkpoint.
JOURNAL_TABLES = """
    CREATE TABLE agents (
        agent_id TEXT PRIMARY KEY, resume_hash TEXT NOT NULL, register BLOB NOT NULL, there INTEGER NOT NULL,
        departed INTEGER NOT NULL
    );
    CREATE TABLE tasks (
        arrival INTEGER PRIMARY KEY, requester TEXT NOT NULL, request BLOB NOT NULL, depth INTEGER NOT NULL,
        accepted_at REAL NOT NULL, deadline REAL NOT NULL, bytes INTEGER NOT NULL, state TEXT NOT NULL, assignee TEXT,
        attempt INTEGER NOT NULL, told INTEGER NOT NULL, ended_at REAL NOT NULL, end BLOB
    );
"""


StoredMessage = TypeVar("StoredMessage")


class Journal:
    """Persists a hub's tasks and agents in a file. `open` it, `load` once, then `write`, and `close`.

    With `sync` "full", `write` returns when the data would survive a power loss; with "normal", when it would survive
    the end of the process (https://sqlite.org/pragma.html#pragma_synchronous). The methods may be called from any
    thread, one at a time.
    """

    path: str
    sync: str

    def __init__(self, path: str | os.PathLike[str], *, sync: str = "full") -> None:
        if sync not in ("full", "normal"):
            raise ValueError(f"sync must be full or normal, not {sync!r}")
        self.path = os.fspath(path)
        self.sync = sync
        self.database: sqlite3.Connection | None = None
        self._writes = 0  # The number of the last write; continued from the highest `told` in the file.
        self._clock_offset = math.nan  # Of the times in the file.

    @property
    def _reserve(self) -> pathlib.Path:
        return pathlib.Path(f"{self.path}-reserve")

    def of_namespace(self, namespace: str) -> Journal:
        """Return the journal of another namespace: the file next to this one with `.NAMESPACE` appended."""
        return Journal(self.path if self.path == ":memory:" else f"{self.path}.{namespace}", sync=self.sync)

    def open(self) -> None:
        """Open the file, or create it, and lock it for this process. Raises JournalError; then no file was changed."""
        import sqlite3

        if self.database is not None:
            raise JournalError(f"{self.path}: this journal is already open")
        try:
            self._create_file()
            self._check_format()
            self.database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=0)
            self._lock()
            self.database.execute("PRAGMA journal_mode = WAL")
            self.database.execute(f"PRAGMA synchronous = {self.sync}")
            self.database.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_MAX}")
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be opened: {error.strerror}") from error
        except sqlite3.Error as error:
            self.close()
            if "locked" in str(error):
                raise JournalError(
                    f"{self.path}: another hub uses this journal; stop it, or use another file"
                ) from error
            if isinstance(error, sqlite3.OperationalError):  # A problem of the disk or the system, not of the file.
                raise JournalError(f"{self.path}: cannot be used: {error}; {UNCHANGED}") from error
            raise JournalError(f"{self.path}: not an AgentHub journal, or damaged: {error}; {UNCHANGED}") from error
        except JournalError:
            self.close()
            raise

    def _create_file(self) -> None:
        """Create the file, readable by its owner only, unless it exists. An existing file is not opened here: closing
        it would release the locks that this process may hold on it.
        """
        if self.path == ":memory:":
            return
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        found = os.stat(self.path)
        if not stat.S_ISREG(found.st_mode):
            raise JournalError(f"{self.path}: not a regular file")
        if 0 < found.st_size < 512:  # SQLite takes a file of one byte for an empty one.
            raise JournalError(f"{self.path}: not an AgentHub journal; {UNCHANGED}")

    def _check_format(self) -> None:
        """Raise JournalError for a file that is not a journal of this version, before it is opened for writing:
        closing it would write the -wal that another program left next to it into the file.
        """
        import sqlite3

        # A file without its first page, or with a rollback journal, cannot be read as it is: SQLite decides.
        if self.path == ":memory:" or not os.stat(self.path).st_size or pathlib.Path(f"{self.path}-journal").exists():
            return
        uri = f"{pathlib.Path(self.path).absolute().as_uri()}?immutable=1"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
            try:
                is_empty = self._is_empty(database)  # Without the contents of its -wal.
            except sqlite3.DatabaseError as error:
                # A process killed during a checkpoint leaves a header that counts pages not yet written.
                if error.sqlite_errorcode != sqlite3.SQLITE_CORRUPT:
                    raise
                return
            if is_empty:
                raise JournalError(f"{self.path}: a database, but not an AgentHub journal; {UNCHANGED}")

    def _is_empty(self, database: sqlite3.Connection) -> bool:
        """Return whether a database has no content yet. Raises JournalError if it is not a journal of this version."""
        (kind,) = database.execute("PRAGMA application_id").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,) and kind == version == 0:
            return True
        if kind != JOURNAL_ID:
            raise JournalError(f"{self.path}: a database, but not an AgentHub journal; {UNCHANGED}")
        if version != JOURNAL_VERSION:
            text = f"a journal of version {version}, but this hub reads version {JOURNAL_VERSION}: use another file"
            raise JournalError(f"{self.path}: {text}; {UNCHANGED}")
        return False

    def _lock(self) -> None:
        """Lock the file until it is closed, create the tables if it is empty, and check its pages."""
        database = self._connected()
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("BEGIN EXCLUSIVE")
        if self._is_empty(database):
            for statement in JOURNAL_TABLES.split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA application_id = {JOURNAL_ID}")
            database.execute(f"PRAGMA user_version = {JOURNAL_VERSION}")
        database.execute("COMMIT")
        (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise JournalError(f"{self.path}: damaged: {verdict.splitlines()[-1]}; {UNCHANGED}")

    def close(self) -> None:
        """Close the file, which unlocks it. No effect if it is closed."""
        if self.database is not None:
            self.database.close()
            self.database = None

    def load(self, clock_offset: float) -> tuple[list[AgentRow], list[TaskRow], float]:
        """Return all agents, all tasks, and the time of the last change to a task. Raises JournalError if damaged.

        `clock_offset` is the difference between the seconds since 1970 and the hub's clock.
        """
        import sqlite3

        try:
            return self._load(clock_offset)
        except (sqlite3.Error, TypeError, ValueError) as error:
            raise JournalError(f"{self.path}: damaged: {error}; {UNCHANGED}") from error

    def _load(self, clock_offset: float) -> tuple[list[AgentRow], list[TaskRow], float]:
        database = self._connected()
        self._clock_offset = clock_offset
        (self._writes,) = database.execute("SELECT coalesce(max(told), 0) FROM tasks").fetchone()
        agents, tasks = [], []
        # Loops, because the traceback of a comprehension would hold its cursor, and a held cursor keeps the file open.
        for agent in map(AgentRow._make, database.execute("SELECT * FROM agents")):
            agents.append(self._agent_row(agent))
        for task in map(TaskRow._make, database.execute("SELECT * FROM tasks ORDER BY arrival")):
            tasks.append(self._task_row(task, clock_offset))
        last = max((max(row.accepted_at, row.ended_at) for row in tasks), default=-math.inf)
        return agents, tasks, last

    def _agent_row(self, stored: AgentRow) -> AgentRow:
        """Return a row as the hub knows it, from one whose fields are the columns."""
        register = self._decode(decoder_from_agent(), stored.register, Register)
        return stored._replace(register=register, there=bool(stored.there), departed=bool(stored.departed))

    def _task_row(self, stored: TaskRow, clock_offset: float) -> TaskRow:
        """Return a row as the hub knows it, from one whose fields are the columns."""
        return stored._replace(
            request=self._decode(decoder_from_agent(), stored.request, Delegate),
            accepted_at=stored.accepted_at - clock_offset,
            deadline=stored.deadline - clock_offset,
            state=TaskState(stored.state),
            attempt=int(stored.attempt),
            # The column holds the number of a write. The effects of the last write may not have been carried out.
            is_delivered=0 < stored.is_delivered < self._writes,
            ended_at=stored.ended_at - clock_offset,
            end=self._decode(decoder_from_hub(), stored.end, TaskOutcome) if stored.end is not None else None,
        )

    def _decode(self, decode: Callable[[bytes], Any], raw: Any, kind: type[StoredMessage]) -> StoredMessage:
        if not isinstance(raw, bytes):
            raise JournalError(f"{self.path}: damaged row: a {type(raw).__name__} instead of a message; {UNCHANGED}")
        try:
            message = decode(raw)
        except InvalidMessage as error:
            raise JournalError(f"{self.path}: damaged row: {error.message}; {UNCHANGED}") from error
        if not isinstance(message, kind):
            raise JournalError(f"{self.path}: damaged row: an unexpected {type(message).__name__}; {UNCHANGED}")
        return message

    def write(self, changes: Changes, clock_offset: float) -> None:
        """Write all changes in one transaction. Raises sqlite3.Error; then nothing was written, and a retry is safe."""
        database = self._connected()
        self._writes += 1
        step_s = clock_offset - self._clock_offset
        is_clock_set = abs(step_s) > CLOCK_STEP_S
        if abs(step_s) <= CLOCK_STEP_S:  # False for the first write of a journal that was not loaded.
            clock_offset = self._clock_offset
        new = [
            (*fixed_columns(row, clock_offset), *self._state_columns(row, clock_offset))
            for row in changes.inserted.values()
        ]
        moved = [(*self._state_columns(row, clock_offset), row.sequence) for row in changes.updated.values()]
        agents = [
            (row.agent_id, row.resume_hash, encode(row.register), row.there, row.departed)
            for row in changes.agents.values()
            if row is not None
        ]
        gone = [(agent_id,) for agent_id, row in changes.agents.items() if row is None]
        try:
            database.execute("BEGIN IMMEDIATE")
            if is_clock_set:
                self._move_times(database, step_s)
            database.executemany("INSERT OR REPLACE INTO agents VALUES (?, ?, ?, ?, ?)", agents)
            # OR REPLACE, because a commit may succeed and still report an error, and is then retried.
            database.executemany("INSERT OR REPLACE INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", new)
            database.executemany(
                "UPDATE tasks SET bytes = ?, state = ?, assignee = ?, attempt = ?, told = ?, ended_at = ?, end = ?"
                " WHERE arrival = ?",
                moved,
            )
            database.executemany("DELETE FROM tasks WHERE arrival = ?", [(sequence,) for sequence in changes.deleted])
            database.executemany("DELETE FROM agents WHERE agent_id = ?", gone)
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        self._clock_offset = clock_offset

    @staticmethod
    def _move_times(database: sqlite3.Connection, step_s: float) -> None:
        """Move all times with the machine's clock, which was set; otherwise deadlines would shift at the next start."""
        database.execute("UPDATE tasks SET accepted_at = accepted_at + ?, deadline = deadline + ?", (step_s, step_s))
        database.execute("UPDATE tasks SET ended_at = ended_at + ? WHERE end IS NOT NULL", (step_s,))

    def _state_columns(self, row: TaskRow, clock_offset: float) -> tuple[Any, ...]:
        """Return the columns that change with the state of a task."""
        end = encode(row.end) if row.end is not None else None
        ended_at = row.ended_at + clock_offset if row.end is not None else 0.0
        told = self._writes if row.is_delivered else 0
        return row.bytes, row.state.value, row.assignee, row.attempt, told, ended_at, end

    def take_reserve(self) -> bool:
        """Allocate the reserve unless it exists; return whether the disk has the space."""
        if self.path == ":memory:" or self._reserve.exists():
            return True
        try:
            descriptor = os.open(self._reserve, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.write(bytes(RESERVE_BYTES))
        except OSError:
            self.give_up_reserve()
            return False
        return True

    def give_up_reserve(self) -> None:
        """Delete the reserve, so that its space is free for the journal."""
        if self.path != ":memory:":
            self._reserve.unlink(missing_ok=True)

    def _connected(self) -> sqlite3.Connection:
        if self.database is None:
            raise JournalError(f"{self.path}: not open; call open() first")
        return self.database


def fixed_columns(row: TaskRow, clock_offset: float) -> tuple[Any, ...]:
    """Return the columns of a task that never change."""
    request = encode(dataclasses.replace(row.request, id=None))
    accepted_at, deadline = row.accepted_at + clock_offset, row.deadline + clock_offset
    return row.sequence, row.requester, request, row.depth, accepted_at, deadline


# ============================================================================================
# 6 Transport
#
# A link is one end of a connection: it decodes what comes in for its owner, and sends the bytes it
# is given. It decides nothing about what the messages say. MemoryLink connects two owners within a
# process. WebSocketLink moves bytes between a socket and a WebSocketProtocol, which knows frames
# and no sockets:
#
#     socket      data_received                  write, at the end of the turn
#                       |                              ^
#     protocol    receive_data                   data_to_send
#                 next_event                     send_text, send_close, fail
#                       |                              ^
#     link        decode, charge                 send, send_when_writable, close
#                       |                              ^
#     owner       opened, received, closed       the hub, or an agent's session
#
# What a link goes through:
#
#     connecting --> handshake --> open --> closing --> closed
#          |             |          |          |           ^
#          +-------------+----------+----------+-----------+
#                the socket is lost, or a timeout cuts it
#
# * connecting: there is no socket yet; with TLS its own handshake comes first.
# * handshake: one HTTP request and its response, within HANDSHAKE_S. What comes behind the request
#   is read after the response. A rejected request ends the link, and its owner is never called.
# * open: `opened` was called. Messages go both ways; pings are answered by the protocol.
# * closing: a close was sent: by `close`, as the echo of the peer's, or because the peer broke the
#   protocol. Nothing may follow it. After a close of ours the peer's is awaited, and what comes
#   before it is discarded. CLOSING_S later the socket is cut.
# * closed: `closed` was called, once, with the peer's close code, or ours, or 1006 if the socket
#   was lost; `gone` is set when nothing is left of the socket.
#
# What waits where, until when, and the limit:
#
#     in    protocol, buffer     until it is a whole event        one message, and one read of the
#                                and reading is not paused        socket (256 KiB in asyncio)
#     in    protocol, fragments  until the message is whole       one message
#     out   protocol             until the turn of the loop ends  OUT_BYTES_MAX and one message
#     out   socket               until the peer reads it          `backlog_bytes_max`, for agents
#                                                                 one message and BACKLOG_BYTES_MAX
#     out   link, postponed      until the socket has drained     half of `backlog_bytes_max`, and
#     (hub)                                                       messages that the hub keeps anyway
#
# Backpressure on what comes in: while there is any PauseReason, the link handles nothing and does
# not read from the socket, so TCP slows the peer down. The link itself pauses after each
# SLICE_BYTES, for the turn of the other connections; when the token bucket is empty; and while the
# peer does not read its replies. The server pauses it while a write of the journal goes on, and to
# slow down the guessing of tokens.
#
# Backpressure on what goes out: at half of `backlog_bytes_max` unread the peer is a slow consumer;
# messages to it are postponed from then on. Beyond the limit it is closed with 4002, and when it reads
# nothing at all for STALLED_S it is cut: an answer to a close would wait behind those very bytes.
# An agent sends when `writable` is set, or waits for it.
# ============================================================================================

BACKLOG_BYTES_MAX = 8 * 1_048_576  # Sent to a peer and not read by it.
CLIENT_MESSAGE_BYTES_MAX = 256 * 1_048_576  # The largest message that an agent accepts, whatever its hub allows.
UNAUTHENTICATED_BYTES_MAX = 16_384  # The largest message of a connection that has not authenticated.
PRIVATE_CHARACTERS_MAX = 1_048_576  # In a file with a token, or an access file.
REJECTION_BYTES_MAX = 2048  # Of the body of a response that rejects a handshake: its first line is shown.
REJECTION_CHARACTERS_MAX = 500  # Of such a line, and of a Location.
BLANKS = "\ufeff \t\r\n"  # Around a token or a URL, from editors, secrets and files of variables; BOM included.

HANDSHAKE_S = 10.0  # From the connection to the end of the handshake.
TICK_LATE_S = 1.0  # A tick later than this waits until what came in meanwhile is read,
CATCH_UP_S = 0.5  # which takes at most this long.
STALLED_S = 10.0  # For a peer to read any of the bytes that wait for it.
CLOSING_S = 2.0  # For a peer to answer a close, or to read what it was sent before; then the socket is cut.

SLICE_BYTES = 16_384  # Handled from one connection before the others have their turn.
OUT_BYTES_MAX = 2048  # Gathered in one turn of the loop before they are written, so that the peer can start on them.
FRAGMENT_BYTES = 16  # Limits the fragments of a message to as many as if each had this size; RFC 6455 has no limit.
KEYS_BYTES = 1024  # Random bytes for masking keys, read at a time.

MESSAGES_PER_S_MAX = 2000.0  # From one connection, in the long run.
BURST_S = 2.0  # How many seconds' worth of messages may come at once.
PAUSE_MIN_S = 0.02  # Of the rate limit: pausing after each message would cost more than the message.
PAUSE_MAX_S = 10.0  # Of the rate limit: well below the silence after which a connection is closed.
FRAME_COST = 0.25  # Of a ping or a fragment; a plain message costs 1.
CPU_COUNTED_BYTES = 4096  # From this size on the CPU time of a message is measured; smaller ones cost about the same.
CPU_SHARE = 0.25  # CPU seconds per second that one connection may take in the long run.

LOOPS = ("auto", "asyncio", "uvloop")  # Event loops to choose from.

Output = TypeVar("Output")

log_loop = logging.getLogger("agenthub.loop")
# `websockets` logs frames with their payloads at DEBUG; payloads must not be logged.
WIRE_LOGGER = logging.getLogger("agenthub.wire")
WIRE_LOGGER.setLevel(logging.WARNING)


class LinkOwner(Protocol):
    """The callbacks of a link's owner. `closed` is called once, and nothing after it."""

    def opened(self, link: Link) -> None: ...

    def received(self, link: Link, message: Any, message_bytes: int) -> None:
        """Handle a message, or the InvalidMessage that says what is wrong with it."""

    def closed(self, link: Link, code: int, reason: str) -> None: ...


class LightEvent:
    """An asyncio.Event with a tenth of the memory: each link has two of them, and a hub has many links."""

    __slots__ = ("_is_set", "_waiters")

    def __init__(self) -> None:
        self._is_set = False
        self._waiters: list[asyncio.Future[None]] = []

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def clear(self) -> None:
        self._is_set = False

    async def wait(self) -> None:
        """Return when it is set, or was set for a moment since the call."""
        if not self._is_set:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter.cancelled() and waiter in self._waiters:
                    self._waiters.remove(waiter)


class PauseReason(enum.StrEnum):
    """Why nothing is read from a connection; reading goes on when no reason is left."""

    TURN_OVER = "turn over"  # It has had its slice; the other connections have their turn.
    RATE_LIMIT = "rate limit"  # It has sent more than its token bucket allows.
    SLOW_CONSUMER = "slow consumer"  # It does not read what was sent to it, so it gets no further replies.
    JOURNAL = "journal"  # Its messages cost much, and their replies wait for one write of the journal.
    AUTH_BACKOFF = "auth backoff"  # Its address has sent too many wrong tokens.


class Link:
    """What all links share: decoding for the owner, and calling its `closed` once."""

    address = ""  # The network address of the other end.
    grant: Any = None  # What the other end may do; None: everything.
    is_backlogged = False  # The other end is a slow consumer: `send_when_writable` is better than `send`.

    def __init__(self, owner: LinkOwner, decode: Callable[[bytes], Any]) -> None:
        self._owner = owner
        self._decode = decode
        self._is_closing = False  # What comes in is discarded.
        self._is_reported = False
        self.gone = LightEvent()  # Nothing is left of it.
        self.writable = LightEvent()  # The other end reads what it is sent.
        self.writable.set()

    def send(self, raw: bytes) -> None:
        """Send an encoded message; without effect when the link is closing."""
        raise NotImplementedError

    def send_when_writable(self, message: Any) -> None:
        """Send a message that its owner keeps in memory anyway: encode it when the other end has read the backlog."""
        raise NotImplementedError

    def take_unsent(self) -> list[Any]:
        """Return the postponed messages that were not sent, and will not be."""
        return []

    def close(self, code: int, reason: str = "") -> None:
        """Close, after what was sent before. The owner's `closed` is called when the other end agrees or is lost."""
        raise NotImplementedError

    def abort(self) -> None:
        """Cut the link, without waiting for anything."""
        raise NotImplementedError

    def set_owner(self, owner: LinkOwner, decode: Callable[[bytes], Any]) -> None:
        """Call another owner from now on. Its `opened` is not called: the link is open already."""
        self._owner = owner
        self._decode = decode

    def charge(self, cost: float) -> None:
        """Count what a message cost to handle towards the rate limit, if this kind of link has one."""

    def pause_reading(self, reason: str) -> None:
        """Handle nothing more that comes in until each reason to pause is gone, if this kind of link can."""

    def resume_reading(self, reason: str) -> None:
        """Remove one reason to pause; without effect if it is none."""

    def _deliver(self, raw: bytes) -> None:
        """Call the owner with a message, or with what was wrong with it."""
        try:
            message = self._decode(raw)
        except InvalidMessage as error:
            self._owner.received(self, error, len(raw))
            self._on_unreadable(raw)
        else:
            self._owner.received(self, message, len(raw))

    def _on_unreadable(self, raw: bytes) -> None:
        """Handle a message that could not be decoded, after the owner has."""

    def _report_closed(self, code: int, reason: str) -> None:
        self._is_closing = True
        if not self._is_reported:
            self._is_reported = True
            self._owner.closed(self, code, reason)


Connector = Callable[[LinkOwner], Awaitable[Link]]


class MemoryLink(Link):
    """One end of a connection within this process. Messages still go through encode and decode."""

    def __init__(self, owner: LinkOwner, decode: Callable[[bytes], Any]) -> None:
        super().__init__(owner, decode)
        self._loop = asyncio.get_running_loop()
        self._other = self

    @classmethod
    def pair(cls, near: tuple[LinkOwner, Callable[[bytes], Any]], far: tuple[LinkOwner, Any]) -> tuple[Link, Link]:
        """Return both ends, each made from an owner and a decoder."""
        one, other = cls(*near), cls(*far)
        one._other, other._other = other, one
        return one, other

    def send(self, raw: bytes) -> None:
        if not self._is_closing:
            self._loop.call_soon(self._other._arrive, raw)

    def close(self, code: int, reason: str = "") -> None:
        if not self._is_closing:
            self._is_closing = True
            self._loop.call_soon(self._other._on_gone, code, reason)
            self._loop.call_soon(self._on_gone, code, reason)

    def abort(self) -> None:
        self.close(1006, "cut")

    def _arrive(self, raw: bytes) -> None:
        if not self._is_closing:
            self._deliver(raw)

    def _on_gone(self, code: int, reason: str) -> None:
        self._report_closed(code, reason)
        self.gone.set()


class TokenBucket:
    """A rate limit: `rate` tokens a second. BURST_S seconds' worth of them can be saved up.

    It may be overdrawn, by at most PAUSE_MAX_S seconds' worth. Pure arithmetic: the time is given.
    """

    __slots__ = ("_rate", "_tokens", "_updated_at")

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._tokens = rate * BURST_S
        self._updated_at = now

    def take(self, cost: float) -> bool:
        """Take tokens, also more than there are. Return whether there were enough; otherwise `refill` comes next."""
        self._tokens -= cost
        return self._tokens >= 0

    def refill(self, now: float) -> float:
        """Add the tokens earned since the last call; return how many seconds to pause, 0 if none are owed.

        Called when the bucket is empty instead of for each message, so that most messages need no clock.
        """
        earned = (now - self._updated_at) * self._rate
        self._updated_at = now
        self._tokens = max(-self._rate * PAUSE_MAX_S, min(self._rate * BURST_S, self._tokens + earned))
        return PAUSE_MIN_S - self._tokens / self._rate if self._tokens < 0 else 0.0


class WebSocketLink(Link, AsyncioProtocol):
    """One end of a WebSocket: moves bytes between a socket and a `WebSocketProtocol`, and tells its owner the events.

    What is sent in one turn of the loop goes out together, at its end or when it is more than OUT_BYTES_MAX, so the
    replies to the messages of a chunk share their writes.
    """

    def __init__(self, protocol: WebSocketProtocol, owner: LinkOwner, decode: Callable[[bytes], Any]) -> None:
        super().__init__(owner, decode)
        self.pause_reasons: set[str] = set()
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None  # For the handshake, then for the close.
        self._is_handling = False
        self._is_flush_scheduled = False
        self._at_end: Callable[[], None] | None = None  # What to do when all that came before the end is handled.

    @property
    def unread_bytes(self) -> int:
        """How many bytes came in and were not handled yet."""
        return self._protocol.unread_bytes

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = typing.cast(asyncio.Transport, transport)
        self._timer = self._loop.call_later(HANDSHAKE_S, self.abort)

    def data_received(self, data: bytes) -> None:
        self._protocol.receive_data(data)
        if not self.pause_reasons:
            self._read()

    def eof_received(self) -> None:
        # With TLS this comes even while reading is paused, and the transport closes next.
        self._end_when_read(self._on_eof)

    def connection_lost(self, error: Exception | None) -> None:
        if self._at_end is None:
            self._protocol.discard()
        self._end_when_read(functools.partial(self._on_end, error))

    def _end_when_read(self, at_end: Callable[[], None]) -> None:
        """Call `at_end` when what came in before is handled, at the same pace as before the end."""
        self._at_end = at_end
        self.resume_reading(PauseReason.SLOW_CONSUMER)  # Nothing is sent to it any more.
        if not self.pause_reasons or self._is_closing or PauseReason.AUTH_BACKOFF in self.pause_reasons:
            at_end()

    def _on_eof(self) -> None:
        self._protocol.receive_eof()
        self._flush()
        # The transport closes itself now, but not before all is written, which may be never.
        self._is_closing = True
        if self._protocol.is_open:
            self._report_closed(1006, "the connection was lost")
        if self._timer is None:
            self._timer = self._loop.call_later(CLOSING_S, self.abort)

    def _on_end(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._protocol.discard()
        self._on_lost(error)
        if self._protocol.is_open:
            self._report_closed(1006, "the connection was lost")
        self.writable.set()
        self.gone.set()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    # Link

    def send(self, raw: bytes) -> None:
        self._protocol.send_text(raw)
        self._flush_soon()

    def close(self, code: int, reason: str = "") -> None:
        if self._is_closing:
            return
        self._is_closing = True
        if not self._protocol.is_open:
            self.abort()
        else:
            if self._protocol.close_sent is None:
                self._protocol.send_close(code, reason)
            self._process_output()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def pause_reading(self, reason: str) -> None:
        if not self.pause_reasons and self.transport is not None:
            self.transport.pause_reading()
        self.pause_reasons.add(reason)

    def resume_reading(self, reason: str) -> None:
        if reason not in self.pause_reasons:
            return
        self.pause_reasons.discard(reason)
        if not self.pause_reasons and not self._is_handling:
            self._read()
        if self.pause_reasons or self.transport is None:
            return
        if self._at_end is None:
            self.transport.resume_reading()
        else:
            self._at_end()

    # Reading

    def _read(self) -> None:
        """Handle what has come in, event by event, until reading is paused or more bytes are needed."""
        protocol = self._protocol
        turn_end = protocol.position + SLICE_BYTES
        self._is_handling = True
        while not self.pause_reasons and (event := protocol.next_event()) is not None:
            if event.__class__ is bytes and not self._is_closing:
                self._deliver(event)
            elif event is COSTLY:
                self._measure(self._handle_costly)
            else:
                self._handle(event)
            if protocol.position >= turn_end and protocol.unread_bytes:
                self.pause_reading(PauseReason.TURN_OVER)
                self._loop.call_soon(self.resume_reading, PauseReason.TURN_OVER)
        self._is_handling = False

    def _measure(self, handle: Callable[[], None]) -> None:
        """Call what may take longer than most messages do."""
        handle()

    def _handle_costly(self) -> None:
        self._handle(self._protocol.next_event())

    def _handle(self, event: Event | None) -> None:
        """Handle any event, and what the protocol has to say to it."""
        if self._is_closing and not isinstance(event, CloseFrame):
            self.charge(FRAME_COST)
        elif isinstance(event, bytes):
            self._deliver(event)
        elif isinstance(event, Frame | Message):
            self.charge(FRAME_COST)
            if isinstance(event, Message):
                self._on_message(event)
        elif not isinstance(event, CloseFrame | Violation):
            self._on_handshake(event)
        elif self._protocol.is_open:
            self._report_closed(event.code, event.reason)
        self._process_output()

    def _on_message(self, message: Message) -> None:
        if message.is_text:
            self._deliver(message.raw)
        else:
            self._owner.received(self, InvalidMessage("message: must be text, not binary"), len(message.raw))

    def _on_unreadable(self, raw: bytes) -> None:
        if not is_utf8(raw):  # RFC 6455 §8.1: such a connection must be failed.
            self._protocol.fail(1007, "not UTF-8")
            if not self._is_closing:
                self._report_closed(1007, "not UTF-8")
            self._process_output()

    def _on_handshake(self, event: Any) -> None:
        """Handle the request or response that opens the WebSocket."""
        raise NotImplementedError

    def _on_lost(self, error: Exception | None) -> None:
        """Handle the end of the socket, which may come before the link was open."""

    def _set_open(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._owner.opened(self)

    # Writing

    def _process_output(self) -> None:
        """Have written what the protocol has to say, and limit how long a close takes."""
        self._flush_soon()
        if self._timer is None and self._protocol.close_expected():
            self._timer = self._loop.call_later(CLOSING_S, self.abort)

    def _flush_soon(self) -> None:
        """Write at the end of this turn of the loop, or at once if much has gathered."""
        if self._protocol.unsent_bytes > OUT_BYTES_MAX:
            self._flush()
        elif not self._is_flush_scheduled:
            self._is_flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_scheduled = False
        transport, protocol = self.transport, self._protocol
        if transport is None:
            return
        raw = protocol.data_to_send()
        if transport.is_closing():
            return  # Nobody will read the answers to what came in before the end.
        if raw:
            transport.write(raw)
        if protocol.has_ended:
            self._close_transport(transport)
        elif raw and not self._is_closing:
            self._on_written(len(raw), transport.get_write_buffer_size())

    def _on_written(self, size: int, waiting: int) -> None:
        """Handle that `size` bytes were written, and that `waiting` bytes in all were not read by the other end yet."""

    def _close_transport(self, transport: asyncio.Transport) -> None:
        """Close the socket when all is written; the timer of the close cuts it if that never happens."""
        if self._protocol.is_open and self._protocol.close_rcvd is None and transport.can_write_eof():
            # Closing a socket with unread bytes resets it, and the reset may overtake the reason (RFC 6455 §7.1.1).
            # What still comes in is discarded until the peer closes too, or the timer of the close cuts the socket.
            try:
                transport.write_eof()
            except OSError:  # The peer has answered what was just written with a reset.
                transport.abort()
        else:
            transport.close()


class ServerLink(WebSocketLink):
    """The hub's end of a WebSocket. `answer(link, request)` returns (status, body) for a plain HTTP request, else None.

    A peer that sends more than `messages_per_s_max` (0: no limit) is read from more slowly. With half of
    `backlog_bytes_max` unread it is a slow consumer: it is not read from either, and what is sent waits here. It is
    disconnected beyond that limit, or when it has read nothing for STALLED_S seconds: the answer to a close would
    come behind the very bytes that it does not read.
    """

    def __init__(
        self,
        owner: LinkOwner,
        answer: Callable[[ServerLink, Any], tuple[int, str] | None],
        *,
        message_bytes_max: int,
        backlog_bytes_max: int,
        messages_per_s_max: float = 0.0,
        address: str = "",
        decode: Callable[[bytes], Any] | None = None,
        on_gone: Callable[[ServerLink], None] = lambda link: None,
    ) -> None:
        decode = decode if decode is not None else decoder_from_agent()
        super().__init__(websockets_used().server(message_bytes_max), owner, decode)
        self.address = address
        self.bearer: str | None = None  # The handshake's token, if it did not authenticate the link at once.
        self.is_answered = False  # Its request has come, and was answered.
        self._answer = answer
        self._on_gone = on_gone
        self._backlog_bytes_max = backlog_bytes_max
        self._rate = messages_per_s_max or math.inf
        self._rate_timer: asyncio.TimerHandle | None = None
        self._written_bytes = 0  # Since the connection was made.
        self._postponed: collections.deque[Any] | None = None  # To be sent when it is not backlogged any more;
        self._postponed_bytes = 0  # the size of those that are encoded.
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._bucket = TokenBucket(self._rate, self._loop.time())
        if self.transport is not None:
            self.transport.set_write_buffer_limits(self._backlog_bytes_max // 2)

    def connection_lost(self, error: Exception | None) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        self._on_gone(self)
        super().connection_lost(error)

    def limit_messages(self, bytes_max: int) -> None:
        """Accept no larger messages from now on."""
        self._protocol.limit_messages(bytes_max)

    def _on_handshake(self, event: Any) -> None:
        self.is_answered = True
        answer = self._answer(self, event)
        if answer is None:
            self._protocol.accept(event)
        else:
            self._protocol.reject(*answer)
        if self._protocol.is_open:
            self._set_open()

    # The rate limit

    def charge(self, cost: float) -> None:
        if self._bucket.take(cost):
            return
        pause_s = self._bucket.refill(self._loop.time())
        if pause_s:
            self.pause_reading(PauseReason.RATE_LIMIT)
            if self._rate_timer is not None:  # Otherwise the earlier timer lets one message through, which arms two.
                self._rate_timer.cancel()
            self._rate_timer = self._loop.call_later(pause_s, self.resume_reading, PauseReason.RATE_LIMIT)

    def _measure(self, handle: Callable[[], None]) -> None:
        """Charge the CPU time of what may take longer than most messages do."""
        if self._rate == math.inf:
            handle()
            return
        began = time.thread_time()
        handle()
        self.charge((time.thread_time() - began) * self._rate / CPU_SHARE)

    # Slow consumers

    def pause_writing(self) -> None:
        super().pause_writing()
        self.is_backlogged = True
        self.pause_reading(PauseReason.SLOW_CONSUMER)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._send_postponed()
        if not self._postponed and self.writable.is_set():
            self.is_backlogged = False
            self.resume_reading(PauseReason.SLOW_CONSUMER)

    def send(self, raw: bytes) -> None:
        if not self.is_backlogged:
            self._protocol.send_text(raw)
            if not self._is_flush_scheduled or self._protocol.unsent_bytes > OUT_BYTES_MAX:
                self._flush_soon()
        elif self._postponed_bytes <= self._backlog_bytes_max // 2:
            self.send_when_writable(raw)
            self._postponed_bytes += len(raw)
        else:
            self._loop.call_soon(self._close_slow_consumer)  # Not now: its owner is about to send more.

    def send_when_writable(self, message: Any) -> None:
        if self._postponed is None:
            self._postponed = collections.deque()
        self._postponed.append(message)

    def take_unsent(self) -> list[Any]:
        unsent = [message for message in self._postponed or () if not isinstance(message, bytes)]
        self._postponed = None
        return unsent

    def close(self, code: int, reason: str = "") -> None:
        if not self._is_closing and self._postponed:
            self._send_postponed(is_last=True)
        super().close(code, reason)

    def _send_postponed(self, is_last: bool = False) -> None:
        """Send what was postponed while the socket takes it, or as much as the backlog may hold if it is the last."""
        sent_bytes = 0
        while self._postponed and (sent_bytes <= self._backlog_bytes_max if is_last else self.writable.is_set()):
            message = self._postponed.popleft()
            raw = message if isinstance(message, bytes) else encode(message)
            sent_bytes += len(raw)
            self._postponed_bytes -= len(raw) if raw is message else 0
            self._protocol.send_text(raw)
            self._flush_soon()
        self._flush()

    def _on_written(self, size: int, waiting: int) -> None:
        self._written_bytes += size
        if waiting > self._backlog_bytes_max:
            self._loop.call_soon(self._close_slow_consumer)
        elif waiting and self._stall_timer is None:
            read_bytes = self._written_bytes - waiting
            self._stall_timer = self._loop.call_later(STALLED_S, self._check_stalled, read_bytes)

    def _close_slow_consumer(self) -> None:
        if not self._is_closing:
            super().close(CloseCode.NOT_READING, "does not read")
            self._report_closed(CloseCode.NOT_READING, "does not read")

    def _check_stalled(self, read_before: int) -> None:
        """Disconnect a peer that has read nothing since `read_before` bytes were read."""
        self._stall_timer = None
        if self.transport is None or self._is_closing:
            return
        waiting = self.transport.get_write_buffer_size()
        if waiting and self._written_bytes - waiting <= read_before:
            self._report_closed(CloseCode.NOT_READING, f"has read nothing for {STALLED_S:g} s")
            self.abort()
        else:
            self._on_written(0, waiting)


class ClientLink(WebSocketLink):
    """An agent's end of a WebSocket. `ready` is done when the handshake is."""

    def __init__(self, protocol: WebSocketProtocol, owner: LinkOwner, token: str | None) -> None:
        super().__init__(protocol, owner, decoder_from_hub())
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self._token = token

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        request = self._protocol.connect()
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        self._protocol.send_request(request)
        self._flush_soon()

    def _on_handshake(self, event: Any) -> None:
        self._set_open()
        if not self.ready.done():
            self.ready.set_result(None)

    def _on_written(self, size: int, waiting: int) -> None:
        if waiting > CLIENT_MESSAGE_BYTES_MAX + BACKLOG_BYTES_MAX:  # As the answers to pings may.
            self.abort()

    def _on_lost(self, error: Exception | None) -> None:
        if not self.ready.done():
            self.ready.set_exception(self._protocol.handshake_exc or error or ConnectionError("closed at once"))
            self.ready.exception()  # Whether or not anybody waits.


async def connect_websocket(
    url: str, owner: LinkOwner, *, token: str | None = None, ca_file: str | None = None
) -> Link:
    """Open a WebSocket to the hub at `url`, with a bearer token if there is one: `token`, or that of the environment.

    The hub's certificate is verified with the system's CAs, or with those in `ca_file` (else AGENTHUB_CA_FILE).
    Raises Disconnected if that fails, ValueError if the URL, the token or the file is not valid.
    """
    host, port, is_secure = split_url(url)[:3]
    protocol = websockets_used().client(url, CLIENT_MESSAGE_BYTES_MAX)
    token = bearer_token() if token is None else check_token("the token", token)
    tls = client_tls(ca_file or os.environ.get("AGENTHUB_CA_FILE") or None) if is_secure else None
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            _, link = await loop.create_connection(lambda: ClientLink(protocol, owner, token), host, port, ssl=tls)
            try:
                await link.ready
            except BaseException:
                link.abort()
                raise
    except TimeoutError as error:
        raise Disconnected(f"no hub answers at {url} within {HANDSHAKE_S:g} s; check host and port") from error
    except ConnectionRefusedError as error:
        raise Disconnected(f'no hub at {url}: nothing listens there; start one with "agenthub hub"') from error
    except OSError as error:
        raise Disconnected(f"no hub at {url}: {error.strerror or error}") from error
    except websockets_used().refused as error:
        raise Disconnected(f"no hub at {url}: {rejection_text(error)}") from error
    return link


def rejection_text(error: Exception) -> str:
    """Return why a handshake failed: with the first line that the response says, and where it redirects to."""
    response, texts = getattr(error, "response", None), [str(error)]
    if response is not None:
        body = (response.body or b"")[:REJECTION_BYTES_MAX].decode(errors="replace")
        if body.lstrip().startswith("<"):
            body = re.sub("<[^>]*>", "", body)
        texts += [line.strip() for line in body.splitlines() if line.strip()][:1]
        texts += [f"it redirects to {location}" for location in response.headers.get_all("Location")[:1]]
    return "; ".join(escape_unprintable(text[:REJECTION_CHARACTERS_MAX]) for text in texts)


def run_loop(main: typing.Coroutine[Any, Any, Output], loop: str = "auto") -> Output:
    """Run a coroutine on an event loop of its own, one of LOOPS: `auto` is uvloop where that is installed.

    Raises PackageMissing for `uvloop` if it is not installed, ValueError if `loop` is not one of LOOPS.
    """
    if loop not in LOOPS:
        main.close()
        raise ValueError(f"loop must be one of {', '.join(LOOPS)}, not {loop!r}")
    factory = None
    if loop != "asyncio":
        try:
            import uvloop
        except ImportError as error:
            if loop == "uvloop":
                main.close()
                raise PackageMissing("uvloop", "The event loop `uvloop`") from error
        else:
            factory = uvloop.new_event_loop
    log_loop.debug("event loop: %s", "asyncio" if factory is None else "uvloop")
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def bearer_token() -> str | None:
    """Return the token to connect with: AGENTHUB_TOKEN, or the content of AGENTHUB_TOKEN_FILE; None without them.

    Raises ValueError if the file cannot be read, or a header cannot carry the token.
    """
    if token := os.environ.get("AGENTHUB_TOKEN"):
        return check_token("AGENTHUB_TOKEN", token)
    if path := os.environ.get("AGENTHUB_TOKEN_FILE", "").strip(BLANKS):
        return token_in(path)
    return None


def token_in(path: str) -> str:
    """Return the token in a file; raise ValueError if other users can read the file, or it holds no token."""
    return check_token(path, read_private(path, stat.S_IRWXG | stat.S_IRWXO, "read"))


def check_token(where: str, token: str) -> str:
    """Return the token without BLANKS; raise ValueError, without showing it, if a header cannot carry it."""
    token = token.strip(BLANKS)
    if not re.fullmatch("[!-~]+", token):
        raise ValueError(f"{where}: {'must be printable ASCII without spaces' if token else 'is an empty token'}")
    return token


def read_private(path: str | os.PathLike[str], forbidden: int, deed: str) -> str:
    """Return the text in a file; raise ValueError if it cannot be read, or its mode has a `forbidden` bit.

    On a read-only mount the mode is not the owner's to change, nor is that of another user's file, which others may
    then read but not write to: containers get their secrets in these ways.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            if os.name == "posix" and is_exposed(file.fileno(), forbidden):
                hint = "chmod 600 helps; in a container, mount it read-only"
                raise ValueError(f"{path}: others may {deed} it; {hint}")
            text = file.read(PRIVATE_CHARACTERS_MAX + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8") from None
    if len(text) > PRIVATE_CHARACTERS_MAX:
        raise ValueError(f"{path}: is larger than {PRIVATE_CHARACTERS_MAX} characters")
    return text


def is_exposed(descriptor: int, forbidden: int) -> bool:
    """Return whether the mode of an open file has a `forbidden` bit that its user is to remove."""
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid():
        forbidden &= stat.S_IWGRP | stat.S_IWOTH
    return bool(status.st_mode & forbidden) and not os.fstatvfs(descriptor).f_flag & os.ST_RDONLY


def client_tls(ca_file: str | None) -> ssl.SSLContext:
    """Return the context to verify a hub's certificate with the system's CAs, or with those in a file."""
    import ssl

    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise ValueError(f"{ca_file}: not a PEM file of CA certificates: {error.strerror or error}") from error


def check_url(url: str) -> str:
    """Return the URL, its scheme in lower case and without BLANKS; raise ValueError if it is not a hub's."""
    scheme, colon, rest = url.strip(BLANKS).partition(":")
    url = scheme.lower() + colon + rest
    if "@" in url:  # It is not shown, because it may contain a password.
        raise ValueError("a hub's URL holds no user or password; the token goes into AGENTHUB_TOKEN")
    if not re.fullmatch(r"wss?://[^\s/?#]+(/[^\s#]*)?", url):
        raise ValueError(f"a hub's URL looks like {URL_DEFAULT}, not {url!r}")
    return url


class HubUrl(NamedTuple):
    """A hub's URL in parts. `path` includes the query."""

    host: str
    port: int
    is_secure: bool
    path: str

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_secure else 80) else f"{host}:{self.port}"


def split_url(url: str) -> HubUrl:
    """Return the parts of a hub's URL, in ASCII; raise ValueError if it is not one."""
    from urllib.parse import quote, urlsplit

    url = check_url(url)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host = host if ":" in host else host.encode("idna").decode()
        if not re.fullmatch(r"[!-\[\]-~]+", host) or port == 0:
            raise ValueError("host or port is missing")
    except ValueError as error:
        raise ValueError(f"{url!r} is not a hub's URL: {error}") from error
    path = quote(parts.path or "/", safe=URL_CHARACTERS)
    if parts.query:
        path += "?" + quote(parts.query, safe=URL_CHARACTERS)
    is_secure = parts.scheme == "wss"
    return HubUrl(host, port or (443 if is_secure else 80), is_secure, path)


URL_CHARACTERS = "%:/?#[]@!$&'()*+,;="  # Reserved, and not to be quoted (RFC 3986 §2.2).
FIN = 0x80  # The first bit of a frame that is, or completes, a message (RFC 6455 §5.2).
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10  # Opcodes, in the same byte.
WHOLE_TEXT: int = FIN | TEXT

pack_medium_header = struct.Struct("!BBH").pack
pack_long_header = struct.Struct("!BBQ").pack


@functools.lru_cache(maxsize=1024)
def frame_header(length: int, is_masked: bool = False, opcode: int = TEXT) -> bytes:
    """Return the header of a frame that is a message in one piece, without the masking key (RFC 6455 §5.2)."""
    if length < 126:
        return bytes((FIN | opcode, is_masked << 7 | length))
    if length < 65_536:
        return pack_medium_header(FIN | opcode, is_masked << 7 | 126, length)
    return pack_long_header(FIN | opcode, is_masked << 7 | 127, length)


def is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


# The WebSocket protocol
#
# RFC 6455 without its socket. Bytes that came in go to `receive_data`, `next_event` returns what
# they say, and `data_to_send` returns the bytes to write: the shape of h11 and of `websockets`.
# It has two implementations: `websockets`, and a built-in one where that is not installed. Both
# share the buffer, the one reader of a frame's header, whole text messages and fragments. An
# implementation reads the handshake and all other frames.
# There are no extensions and no subprotocols.

HEAD_BYTES_MAX = 65_536  # Of a request or response, including its line ends.
HEAD_LINE_BYTES_MAX = 8192  # Of one line, without its end.
HEADERS_MAX = 128
MASK_BLOCK_BYTES = 16_384  # Masked at a time: larger numbers do not fit into the processor's L1 cache.
CONTROL_BYTES_MAX = 125  # RFC 6455 §5.5.
REASON_BYTES_MAX = CONTROL_BYTES_MAX - 2
ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3.
# The close codes allowed in a frame (RFC 6455 §7.4): not 1004 to 1006 and 1015; from 3000 on they are free to use.
CODES_IN_FRAMES = frozenset((1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)))
HEADER_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 §5.6.2.
HEADER_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")


class HandshakeFailed(Exception):
    """The other end does not speak WebSocket.

    `status` is the HTTP status that a server answers with, `response` that with which it has rejected a client.
    """

    def __init__(self, text: str, status: int = 400, response: Response | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.response = response


class FrameError(Exception):
    """The other end broke the rules. `code` is the close code that says so."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Headers:
    """The headers of a request or response, in their order; setting one adds it. Names are case-insensitive."""

    def __init__(self, *pairs: tuple[str, str]) -> None:
        self.pairs = list(pairs)

    def get_all(self, name: str) -> list[str]:
        return [value for other, value in self.pairs if other.lower() == name.lower()]

    def words(self, name: str) -> list[str]:
        """Return the elements of a header that is a list, in lower case."""
        return [word.strip().lower() for value in self.get_all(name) for word in value.split(",")]

    def is_upgrade(self) -> bool:
        """Return whether this is a handshake (RFC 6455 §4.1, §4.2.1)."""
        return "upgrade" in self.words("Connection") and self.words("Upgrade") == ["websocket"]

    def encode(self, first_line: str) -> bytes:
        """Return the head of a request or response."""
        return "\r\n".join([first_line, *(f"{name}: {value}" for name, value in self.pairs), "", ""]).encode("latin-1")

    def only(self, name: str) -> str:
        """Return the value of a header that must occur exactly once."""
        values = self.get_all(name)
        if len(values) != 1:
            raise HandshakeFailed(f"the header {name} must occur exactly once")
        return values[0]

    def __setitem__(self, name: str, value: str) -> None:
        self.pairs.append((name, value))


class Request(NamedTuple):
    """The handshake of a client. A server accepts or rejects it before it reads on."""

    path: str
    headers: Headers
    method: str = "GET"
    version: str = "HTTP/1.1"


class Response(NamedTuple):
    """The answer of a server to a handshake; with 101 it opened the WebSocket, else `body` may say why not."""

    status_code: int
    phrase: str
    headers: Headers
    body: bytes = b""


class Message(NamedTuple):
    """A binary message, or one that came in fragments. A text message in one frame, as nearly all are, is `bytes`."""

    raw: bytes
    is_text: bool


class Frame(NamedTuple):
    """A ping, a pong, or a fragment that does not complete its message."""

    opcode: int
    data: bytes
    fin: bool


class CloseFrame(NamedTuple):
    """The other end closed; nothing follows."""

    code: int
    reason: str


class Violation(NamedTuple):
    """The other end broke the rules, and the close that says so is to be sent; nothing follows.

    During the handshake `code` is an HTTP status.
    """

    code: int
    reason: str


class Costly(enum.Enum):
    """The next event is none of the small messages that cost about the same: its cost is worth measuring."""

    COSTLY = enum.auto()


COSTLY = Costly.COSTLY
ApplyMask = Callable[[bytes | bytearray, bytes | bytearray], bytes]  # Data and a key of 4 bytes.
Event = Request | Response | bytes | Message | Frame | CloseFrame | Violation | Costly


@dataclass(slots=True)
class Fragments:
    """The fragments of a message so far."""

    is_text: bool
    raw: bytearray = field(default_factory=bytearray)
    count: int = 0


class WebSocketProtocol:
    """One end of a WebSocket, without I/O.

    Events come one at a time, so that each is handled before the next is read: a request is answered before what is
    behind it, messages are answered before the close behind them, and a reader may stop between any two. What the
    other end does wrong is an event too; nothing is raised.
    """

    def __init__(self, message_bytes_max: int, *, is_server: bool, apply_mask: ApplyMask) -> None:
        self.is_server = is_server
        self.is_open = False  # The handshake is done.
        self.has_ended = False  # Nothing follows what `data_to_send` returns next.
        self.handshake_exc: Exception | None = None
        self.close_sent: CloseFrame | None = None
        self.close_rcvd: CloseFrame | None = None
        self.position = 0  # How much of the buffer was read; grows until more bytes are needed.
        self.unsent_bytes = 0
        self._buffer: bytes | bytearray = b""
        self._writes: list[bytes] = []
        self._apply_mask = apply_mask
        self._keys = b""  # Random, for the masks of the next frames.
        self._is_reading_frames = False  # It is open, and nothing was read that ends it.
        self._is_discarding = False  # Nothing that still comes is read.
        self._is_announced = False  # COSTLY was returned.
        self._fragments: Fragments | None = None
        self.limit_messages(message_bytes_max)

    def limit_messages(self, bytes_max: int) -> None:
        """Accept no larger messages from now on."""
        self._message_bytes_max = bytes_max

    # Reading

    @property
    def unread_bytes(self) -> int:
        return len(self._buffer) - self.position

    def receive_data(self, data: bytes) -> None:
        """Keep bytes that came in, for `next_event`."""
        if self._is_discarding:
            return
        if not self._buffer:
            self._buffer = data
            return
        if isinstance(self._buffer, bytes):  # A large message comes in many pieces; bytes would be copied for each.
            self._buffer = bytearray(self._buffer)
        self._buffer += data

    def next_event(self) -> Event | None:
        """Return what came in next, None if more bytes are needed.

        A frame is read when it is complete, or when its header says that it is too long. So no more than one message
        is ever buffered on top of what came in at once.
        """
        if not self._is_reading_frames:
            return None if self._is_discarding else self._read_head()
        buffer, start = self._buffer, self.position
        size, begin = len(buffer), start + 2
        if begin > size:
            return self._wait() if start else None
        first, second = buffer[start], buffer[start + 1]
        length = second & 127
        if length > 125:
            begin += 2 if length == 126 else 8
            if begin > size:
                return self._wait()
            if length == 126:
                length = buffer[start + 2] << 8 | buffer[start + 3]
            else:
                length = int.from_bytes(buffer[start + 2 : begin], "big")
        end = begin + length + (4 if second > 127 else 0)
        if end > size and not self._is_too_long(first & 15, length):
            return self._wait()
        is_text = first == WHOLE_TEXT and self._fragments is None and (second > 127) == self.is_server
        if not is_text or length >= CPU_COUNTED_BYTES:
            self._is_announced = not self._is_announced
            if self._is_announced:
                return COSTLY
        if not is_text or length > self._message_bytes_max:
            return self._read_frame(begin, end)
        if end < size:
            self.position = end
        else:
            self.position, self._buffer = 0, b""
        if not self.is_server:
            return bytes(buffer[begin:end])
        return self._apply_mask(buffer[begin + 4 : end], buffer[begin : begin + 4])

    def receive_eof(self) -> None:
        """Handle that nothing will come in any more."""
        raise NotImplementedError

    def discard(self) -> None:
        """Read nothing more, whatever still comes in."""
        self._is_discarding = True
        self._is_reading_frames = False
        self._fragments = None
        self.position = 0
        self._buffer = b""

    def _wait(self) -> Event | None:
        """Drop what was read, so that an idle connection buffers nothing; return None for `next_event`."""
        if self.position:
            self._buffer = self._buffer[self.position :]
            self.position = 0
        return None

    def _is_too_long(self, opcode: int, length: int) -> bool:
        if opcode >= CLOSE:
            return length > max(self._message_bytes_max, CONTROL_BYTES_MAX)
        return length > self._message_bytes_max - self._fragments_bytes

    @property
    def _fragments_bytes(self) -> int:
        return 0 if self._fragments is None else len(self._fragments.raw)

    def _take_line(self) -> bytes:
        """Return the next line of the handshake, or the beginning of one that is too long; empty if there is none."""
        end = self._buffer.find(b"\n", self.position) + 1
        if not end:
            if self.unread_bytes <= HEAD_LINE_BYTES_MAX + len(b"\r"):
                self._wait()
                return b""
            end = len(self._buffer)
        line = bytes(self._buffer[self.position : end])
        self.position = end
        return line

    def _read_head(self) -> Event | None:
        """Read the request or response line by line; return it when it is complete."""
        raise NotImplementedError

    def _read_frame(self, begin: int, end: int) -> Event:
        """Read the frame at `position`, whose masking key or payload begins at `begin`: complete, or too long."""
        raise NotImplementedError

    def _assemble(self, frame: Frame) -> Event:
        """Return the message that this frame is or completes, else the frame. The total size is limited already."""
        if frame.opcode != CONTINUATION:
            if frame.fin:
                return frame.data if frame.opcode == TEXT else Message(frame.data, is_text=False)
            self._fragments = Fragments(frame.opcode == TEXT)
        fragments = self._fragments
        if fragments is None:
            raise AssertionError("no implementation accepts a continuation of nothing")
        fragments.raw += frame.data
        fragments.count += 1
        if fragments.count > self._message_bytes_max // FRAGMENT_BYTES:
            return self._violate(CloseCode.TOO_BIG, "too many fragments")
        if not frame.fin:
            return frame
        self._fragments = None
        return Message(bytes(fragments.raw), fragments.is_text)

    def _set_open(self) -> None:
        self.is_open = self._is_reading_frames = True

    # Writing

    def data_to_send(self) -> bytes:
        """Return what is to be written."""
        raw = b"".join(self._writes)
        self._writes.clear()
        self.unsent_bytes = 0
        return raw

    def send_text(self, raw: bytes) -> None:
        """Send a message; without effect after a close. A server's frames are not masked: a header and the bytes."""
        if self.close_sent is not None:
            return
        if self.is_server:
            self._writes += (frame_header(len(raw)), raw)
        else:
            key = self._next_key()
            self._writes += (frame_header(len(raw), is_masked=True), key, self._apply_mask(raw, key))
        self.unsent_bytes += len(raw)

    def send_close(self, code: int, reason: str = "") -> None:
        """Send a close. What still comes in is read until the other end closes too."""
        raise NotImplementedError

    def fail(self, code: int, reason: str = "") -> None:
        """Send why the connection has failed, and read nothing more (RFC 6455 §7.1.7)."""
        raise NotImplementedError

    def close_expected(self) -> bool:
        """Return whether the other end is expected to close the socket."""
        raise NotImplementedError

    def _violate(self, code: int, reason: str) -> Violation:
        self.fail(code, reason)
        return Violation(code, reason)

    def _write(self, raw: bytes) -> None:
        self._writes.append(raw)
        self.unsent_bytes += len(raw)

    def _next_key(self) -> bytes:
        if not self._keys:
            self._keys = os.urandom(KEYS_BYTES)
        key, self._keys = self._keys[:4], self._keys[4:]
        return key

    # The handshake of a server

    def accept(self, request: Any) -> None:
        """Send the response that opens the WebSocket, or that says why not (RFC 6455 §4.2)."""
        raise NotImplementedError

    def reject(self, status: int, text: str, content_type: str = "application/json") -> None:
        """Send a plain HTTP response, after which the connection ends."""
        raise NotImplementedError

    # The handshake of a client

    def connect(self) -> Any:
        """Return the request that opens the WebSocket (RFC 6455 §4.1), for `send_request`."""
        raise NotImplementedError

    def send_request(self, request: Any) -> None:
        raise NotImplementedError


class BuiltinProtocol(WebSocketProtocol):
    """The built-in implementation's part that both roles share: frames, and the end of a connection."""

    IS_SERVER: bool

    def __init__(self, message_bytes_max: int) -> None:
        super().__init__(message_bytes_max, is_server=self.IS_SERVER, apply_mask=apply_mask)
        self._has_eof = False  # Nothing will come in.
        self._head: list[bytes] | None = []  # The lines of it so far; None when it is complete.
        self._head_bytes = 0

    def receive_eof(self) -> None:
        if not self.is_open and self.handshake_exc is None:
            self.handshake_exc = HandshakeFailed("the connection was closed")
        self._has_eof = True
        self._end()

    def close_expected(self) -> bool:
        return not self._has_eof and (self.close_sent is not None if self.is_open else self.has_ended)

    def send_close(self, code: int, reason: str = "") -> None:
        self._send(CLOSE, code.to_bytes(2, "big") + truncate_reason(reason).encode())
        self.close_sent = CloseFrame(code, reason)

    def fail(self, code: int, reason: str = "") -> None:
        if self.close_sent is None:
            self.send_close(code, reason)
        self._stop()

    def _stop(self) -> None:
        """Read nothing more. A server ends the connection then, and a client waits for it to do so (§7.1.1)."""
        self.discard()
        self.has_ended = self.has_ended or self.IS_SERVER

    def _end(self) -> None:
        self.discard()
        self.has_ended = True

    def _send(self, opcode: int, data: bytes) -> None:
        """Queue a frame in one piece."""
        header = frame_header(len(data), is_masked=not self.IS_SERVER, opcode=opcode)
        if self.IS_SERVER:
            self._write(header + data)
        else:
            key = self._next_key()
            self._write(header + key + apply_mask(data, key))

    def _read_head(self) -> Event | None:
        try:
            while self._head is not None and (line := self._take_line()):
                self._head_bytes += len(line)
                self._check_line(line, len(self._head))
                if line == b"\r\n":
                    lines, self._head = self._head, None
                    return self._parse_head(lines)
                self._head.append(line[:-2])
        except HandshakeFailed as error:
            self.handshake_exc = error
            self._refuse(error)
            self._end()
            return Violation(error.status, str(error))
        return None

    def _check_line(self, line: bytes, index: int) -> None:
        is_too_long = len(line) > HEAD_LINE_BYTES_MAX + 2 or not line.endswith(b"\n")
        if is_too_long or index > HEADERS_MAX + 1 or self._head_bytes > HEAD_BYTES_MAX:
            raise HandshakeFailed("too many headers, or too long ones", 431)
        if not line.endswith(b"\r\n"):  # A reader that takes this for a line may disagree where the headers end.
            raise HandshakeFailed("a line must end with CR and LF")

    def _parse_head(self, lines: list[bytes]) -> Event | None:
        first, *rest = lines or [b""]
        words = first.decode("latin-1").split(" ", 2)
        if len(words) != 3 or not (first.isascii() or not self.IS_SERVER) or not HEADER_VALUE.fullmatch(first):
            raise HandshakeFailed("the first line is not valid HTTP")
        return self._on_head(words, Headers(*map(parse_header, rest)))

    def _on_head(self, words: list[str], headers: Headers) -> Event | None:
        """Return the event for the three words of the first line and the headers; None if a body is to follow."""
        raise NotImplementedError

    def _refuse(self, error: HandshakeFailed) -> None:
        """Send, where that is possible, that the handshake was wrong."""

    def _read_frame(self, begin: int, end: int) -> Event:
        buffer, start = self._buffer, self.position
        first, second = buffer[start], buffer[start + 1]
        payload = begin + 4 * (second >> 7)
        try:
            self._check_header(first, second)
            if first & 15 < CLOSE and self._fragments_bytes + end - payload > self._message_bytes_max:
                raise FrameError(CloseCode.TOO_BIG, f"larger than {self._message_bytes_max} bytes")
            data = bytes(buffer[payload:end])
            if self.IS_SERVER:
                data = apply_mask(data, buffer[begin:payload])
            self.position = end
            return self._on_frame(Frame(first & 15, data, first > 127))
        except FrameError as error:
            return self._violate(error.code, str(error))

    def _check_header(self, first: int, second: int) -> None:
        """Raise FrameError if no frame may begin with these bytes (RFC 6455 §5.1, §5.2, §5.4, §5.5)."""
        opcode = first & 15
        if first & 0x70:
            raise FrameError(1002, "reserved bits must be 0")
        if not (opcode <= BINARY or CLOSE <= opcode <= PONG):
            raise FrameError(1002, f"unknown opcode {opcode}")
        if opcode >= CLOSE and (second & 127 > CONTROL_BYTES_MAX or first < 128):
            raise FrameError(1002, "a control frame must be short and not fragmented")
        if (second > 127) != self.IS_SERVER:
            raise FrameError(1002, "a client must mask its frames, and a server must not")
        if opcode < CLOSE and (opcode == CONTINUATION) != (self._fragments is not None):
            raise FrameError(1002, "a continuation, and nothing else, must follow a fragment")

    def _on_frame(self, frame: Frame) -> Event:
        if frame.opcode < CLOSE:
            return self._assemble(frame)
        if frame.opcode == PING and self.close_sent is None:
            self._send(PONG, frame.data)
        elif frame.opcode == CLOSE:
            self.close_rcvd = parse_close(frame.data)
            if self.close_sent is None:
                self._send(CLOSE, frame.data)
                self.close_sent = self.close_rcvd
            self._stop()
            return self.close_rcvd
        return frame


class BuiltinServer(BuiltinProtocol):
    """The end that is connected to. A Request comes as the first event."""

    IS_SERVER = True

    def accept(self, request: Request) -> None:
        try:
            accepted = self._accepted(request)
        except HandshakeFailed as error:
            self.handshake_exc = error
            self._refuse(error)
            return
        headers = Headers(("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accepted))
        self._write(headers.encode("HTTP/1.1 101 Switching Protocols"))
        self._set_open()

    def reject(self, status: int, text: str, content_type: str = "application/json", *more: tuple[str, str]) -> None:
        from http import HTTPStatus

        body = text.encode()
        headers = Headers(
            ("Connection", "close"), ("Content-Length", str(len(body))), ("Content-Type", content_type), *more
        )
        self._write(headers.encode(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}") + body)
        self._end()

    def _accepted(self, request: Request) -> str:
        headers = request.headers
        if request.method != "GET":
            raise HandshakeFailed("the method must be GET", 405)
        if request.version != "HTTP/1.1":
            raise HandshakeFailed("the protocol must be HTTP/1.1", 505)
        if not headers.is_upgrade():
            raise HandshakeFailed("this port speaks WebSocket; connect with a WebSocket client", 426)
        key = headers.only("Sec-WebSocket-Key")
        if not re.fullmatch("[A-Za-z0-9+/]{22}==", key):
            raise HandshakeFailed("Sec-WebSocket-Key must be 16 bytes in Base64")
        if headers.only("Sec-WebSocket-Version") != "13":
            raise HandshakeFailed("Sec-WebSocket-Version must be 13", 426)
        return accept_key(key)

    def _on_head(self, words: list[str], headers: Headers) -> Event:
        method, path, version = words
        if version not in ("HTTP/1.1", "HTTP/1.0"):
            raise HandshakeFailed("the first line is not valid HTTP")
        if headers.get_all("Transfer-Encoding") or set(headers.get_all("Content-Length")) - {"0"}:
            raise HandshakeFailed("the request must not have a body")
        return Request(path, headers, method, version)

    def _refuse(self, error: HandshakeFailed) -> None:
        more = {426: (("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")), 405: (("Allow", "GET"),)}
        text = f"cannot open a WebSocket: {error}\n"
        self.reject(error.status, text, "text/plain; charset=utf-8", *more.get(error.status, ()))


class BuiltinClient(BuiltinProtocol):
    """The end that connects to a URL. The Response comes as the first event, or `handshake_exc` says what it lacks."""

    IS_SERVER = False

    def __init__(self, url: str, message_bytes_max: int) -> None:
        super().__init__(message_bytes_max)
        self._url = split_url(url)
        self._key = base64.b64encode(os.urandom(16)).decode()
        self._rejection: Response | None = None  # Its body is being read.

    def receive_eof(self) -> None:
        self._has_eof = True
        if self._rejection is not None and self.handshake_exc is None:
            self._read_rejection(self._rejection)
        super().receive_eof()

    def connect(self) -> Request:
        headers = Headers(
            ("Host", self._url.host_header),
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Key", self._key),
            ("Sec-WebSocket-Version", "13"),
            ("User-Agent", f"agenthub/{__version__}"),
        )
        return Request(self._url.path, headers)

    def send_request(self, request: Request) -> None:
        self._write(request.headers.encode(f"{request.method} {request.path} {request.version}"))

    def _on_head(self, words: list[str], headers: Headers) -> Event | None:
        version, status, phrase = words
        if version != "HTTP/1.1" or not re.fullmatch("[1-5][0-9][0-9]", status):
            raise HandshakeFailed("did not receive a valid HTTP response")
        if status != "101":
            self._rejection = Response(int(status), phrase, headers)
            return self._read_rejection(self._rejection)
        if not headers.is_upgrade():
            raise HandshakeFailed("the response does not upgrade to a WebSocket")
        if headers.only("Sec-WebSocket-Accept") != accept_key(self._key):
            raise HandshakeFailed("the response answers another request")
        if headers.get_all("Sec-WebSocket-Extensions") or headers.get_all("Sec-WebSocket-Protocol"):
            raise HandshakeFailed("the response has extensions or subprotocols that were not requested")
        self._set_open()
        return Response(101, phrase, headers)

    def _read_head(self) -> Event | None:
        return super()._read_head() if self._rejection is None else self._read_rejection(self._rejection)

    def _read_rejection(self, response: Response) -> Event | None:
        """End with the response when its body is there, or as much of it as is read (RFC 9112 §6.3)."""
        body = bytes(self._buffer[self.position : self.position + REJECTION_BYTES_MAX])
        length = (response.headers.get_all("Content-Length") or [""])[0]
        is_chunked = response.headers.words("Transfer-Encoding")[-1:] == ["chunked"]
        bytes_max = REJECTION_BYTES_MAX
        if response.status_code < 200 or response.status_code in (204, 304):
            bytes_max = 0
        elif re.fullmatch("[0-9]{1,9}", length) and not is_chunked:
            bytes_max = min(int(length), bytes_max)
        if not (len(body) >= bytes_max or self._has_eof or (is_chunked and body.endswith(b"0\r\n\r\n"))):
            return None
        if is_chunked:
            body = body.partition(b"\r\n")[2]  # The size of the first chunk.
        text = f"server rejected WebSocket connection: HTTP {response.status_code}"
        self.handshake_exc = HandshakeFailed(text, response=response._replace(body=body[:bytes_max]))
        self._end()
        return Violation(self.handshake_exc.status, text)


def parse_header(line: bytes) -> tuple[str, str]:
    """Return the name and the value in a line of a request or response (RFC 9112 §5)."""
    name, colon, value = line.partition(b":")
    if not (colon and HEADER_NAME.fullmatch(name) and HEADER_VALUE.fullmatch(value)):
        raise HandshakeFailed("a header is not valid HTTP")
    return name.decode(), value.strip(b" \t").decode("latin-1")


def accept_key(key: str) -> str:
    """Return the Sec-WebSocket-Accept for the key of a request (RFC 6455 §4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode() + ACCEPT_GUID, usedforsecurity=False).digest()).decode()


def parse_close(data: bytes) -> CloseFrame:
    """Return the content of a close frame (RFC 6455 §5.5.1, §7.4); raise FrameError if it is not allowed."""
    if not data:
        return CloseFrame(1005, "")  # RFC 6455 §7.1.5: the code that stands for none.
    code = int.from_bytes(data[:2], "big")
    if code not in CODES_IN_FRAMES:  # Nor is any single byte one.
        raise FrameError(1002, "this close code must not be sent")
    try:
        return CloseFrame(code, data[2:].decode())
    except UnicodeDecodeError:
        raise FrameError(1007, "not UTF-8") from None


def truncate_reason(reason: str) -> str:
    """Return as many characters of a close's reason as fit into its frame."""
    return reason.encode()[:REASON_BYTES_MAX].decode(errors="ignore")


def apply_mask(data: bytes | bytearray, key: bytes | bytearray) -> bytes:
    """Return the data masked with a key of 4 bytes, or unmasked (RFC 6455 §5.3): one exclusive or of large numbers."""
    size = len(data)
    if size <= MASK_BLOCK_BYTES:
        stream = (key * (size // 4 + 1))[:size]
        return (int.from_bytes(data, "little") ^ int.from_bytes(stream, "little")).to_bytes(size, "little")
    mask, block_bytes = int.from_bytes(key * (MASK_BLOCK_BYTES // 4), "little"), MASK_BLOCK_BYTES
    starts = range(0, size, block_bytes)
    blocks = (int.from_bytes(data[start : start + block_bytes], "little") ^ mask for start in starts)
    return b"".join(block.to_bytes(block_bytes, "little") for block in blocks)[:size]


class PackageProtocol(WebSocketProtocol):
    """The same around a Sans-I/O protocol object of `websockets`, which is given one line or one frame at a time.

    Given more it would read on at once: answer a ping before the request in front of it, or close before the messages
    in front of the close are answered.
    """

    def __init__(self, inner: Any, message_bytes_max: int, *, is_server: bool, apply_mask: ApplyMask) -> None:
        self._inner = inner
        self._has_head = False
        super().__init__(message_bytes_max, is_server=is_server, apply_mask=apply_mask)

    def limit_messages(self, bytes_max: int) -> None:
        super().limit_messages(bytes_max)
        self._inner.max_size = self._inner.max_message_size = bytes_max  # Its name until websockets 15, and since 16.

    def receive_eof(self) -> None:
        if not (self.is_open or self._is_discarding):
            # The beginning of a line: the end makes it an error.
            self._inner.receive_data(bytes(self._buffer[self.position :]))
        self._inner.receive_eof()
        self.handshake_exc = self._inner.handshake_exc
        self._collect()
        self.discard()

    def close_expected(self) -> bool:
        return bool(self._inner.close_expected())

    def send_close(self, code: int, reason: str = "") -> None:
        self._inner.send_close(code, truncate_reason(reason))
        self._collect()

    def fail(self, code: int, reason: str = "") -> None:
        self._inner.fail(code, truncate_reason(reason))
        self._collect()
        self.discard()

    def accept(self, request: Any) -> None:
        self._send_response(self._inner.accept(request))

    def reject(self, status: int, text: str, content_type: str = "application/json") -> None:
        response = self._inner.reject(status, text)
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = content_type
        self._send_response(response)

    def connect(self) -> Any:
        return self._inner.connect()

    def send_request(self, request: Any) -> None:
        self._inner.send_request(request)
        self._collect()

    def _send_response(self, response: Any) -> None:
        self._inner.send_response(response)
        self.handshake_exc = self._inner.handshake_exc
        self._collect()
        if response.status_code == 101:
            self._set_open()
        else:
            self.discard()

    def _read_head(self) -> Event | None:
        while data := self._take_body() if self._has_head else self._take_line():
            self._has_head = self._has_head or data == b"\r\n"
            if data.startswith(b"GET /healthz"):  # `websockets` 15 takes HTTP/1.1 only, and load balancers send 1.0.
                data = data.replace(b" HTTP/1.0\r\n", b" HTTP/1.1\r\n")
            self._inner.receive_data(data)
            events = self._inner.events_received()
            self._collect()
            if self._inner.handshake_exc is not None:
                self.handshake_exc = self._inner.handshake_exc
                self.discard()
                return Violation(400, str(self.handshake_exc))
            if events:
                if not self.is_server:
                    self._set_open()
                event: Event = events[0]
                return event
        return None

    def _take_body(self) -> bytes:
        """Return what comes behind the head of a response that did not open; a server's request has no body."""
        body = b"" if self.is_server else bytes(self._buffer[self.position :])
        self.position += len(body)
        return body

    def _read_frame(self, begin: int, end: int) -> Event:
        self._inner.receive_data(bytes(self._buffer[self.position : end]))
        self.position = end
        events = self._inner.events_received()
        self._collect()
        if not events:  # Any frame is an event, if it is none that fails the connection.
            self.discard()
            return Violation(*self.close_sent or (1006, ""))
        frame = events[0]
        if frame.opcode == CLOSE:
            self.discard()
            return self.close_rcvd or CloseFrame(1006, "")
        read = Frame(int(frame.opcode), bytes(frame.data), frame.fin)
        return read if read.opcode > CLOSE else self._assemble(read)

    def _collect(self) -> None:
        """Collect what `websockets` has written, and its closes."""
        for data in self._inner.data_to_send():
            if not data:
                self.has_ended = True
            elif self.close_sent is None:  # Nothing may follow a close; it would answer pings even then.
                self._write(data)
        sent, received = self._inner.close_sent, self._inner.close_rcvd
        if sent is not None and self.close_sent is None:
            self.close_sent = CloseFrame(sent.code, sent.reason)
        if received is not None:
            self.close_rcvd = CloseFrame(received.code, received.reason)


class WebSockets(NamedTuple):
    """An implementation: protocols for both roles, and the base class of a client's `handshake_exc`."""

    name: str
    server: Callable[[int], WebSocketProtocol]  # From the largest message, in bytes.
    client: Callable[[str, int], WebSocketProtocol]  # From a URL and the largest message.
    refused: type[Exception]


@functools.cache
def websockets_used() -> WebSockets:
    """Return the implementation of WebSocket in this process: the package `websockets`, or the one built in."""
    version = usable_version("websockets", oldest=(15, 0))
    if version is None:
        return WebSockets("built in", BuiltinServer, BuiltinClient, HandshakeFailed)
    from websockets.client import ClientProtocol
    from websockets.exceptions import InvalidHandshake
    from websockets.server import ServerProtocol
    from websockets.uri import parse_uri

    mask: ApplyMask
    try:
        from websockets.speedups import apply_mask as mask
    except ImportError:  # It was installed without its C extension.
        mask = apply_mask

    def server(bytes_max: int) -> WebSocketProtocol:
        inner = ServerProtocol(max_size=bytes_max, logger=WIRE_LOGGER)
        return PackageProtocol(inner, bytes_max, is_server=True, apply_mask=mask)

    def client(url: str, bytes_max: int) -> WebSocketProtocol:
        inner = ClientProtocol(parse_uri(check_url(url)), max_size=bytes_max, logger=WIRE_LOGGER)
        return PackageProtocol(inner, bytes_max, is_server=False, apply_mask=mask)

    return WebSockets(f"websockets {version}", server, client, InvalidHandshake)


class Timers:
    """Calls functions at set times, with one timer of the loop for all: most are cancelled long before they are due."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: LazyHeap[Callable[[], None]] = LazyHeap()
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for = math.inf

    def set(self, function: Callable[[], None], when: float) -> None:
        """Call `function` at `when` by the loop's clock; one that is set already is moved there."""
        self._due.push(function, when)
        if when < self._armed_for:
            self._arm(when)

    def cancel(self, function: Callable[[], None]) -> None:
        """Do not call `function`. Without effect if it is not set."""
        self._due.discard(function)

    def clear(self) -> None:
        """Call none of them."""
        self._due = LazyHeap()
        self._disarm()

    def _arm(self, when: float) -> None:
        self._disarm()
        self._armed_for = when
        self._timer = self._loop.call_at(when, self._ring)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._armed_for = None, math.inf

    def _ring(self) -> None:
        now = max(self._loop.time(), self._armed_for)  # A timer may fire up to the clock's resolution early.
        self._timer, self._armed_for = None, math.inf
        try:
            while (first := self._due.first()) is not None and first[0] <= now:
                self._due.discard(first[1])
                first[1]()
        finally:  # If one raises, the others are called nevertheless.
            if (first := self._due.first()) is not None and first[0] < self._armed_for:
                self._arm(first[0])


# ============================================================================================
# 7 Server
#
# The hub on an event loop. What happens between a message and its effects:
#
#   link ──► LocalHub.received ──► Hub.receive ──► Step ──► LocalHub._apply
#                                                              │
#               no journal, or nothing changed and nothing held│ otherwise
#                         ┌────────────────────────────────────┴───┐
#                         │                                        ▼
#                         │             GroupCommit.add: merge the changes, hold the effects
#                         │                                        │  one write at a time, in a thread;
#                         ▼                                        ▼  what comes meanwhile is the next
#                     _carry_out ◄──────────────────────────── the journal has the changes
#                         │
#         ┌───────────────┼──────────────────────────────┐
#         ▼               ▼                              ▼
#     link.send     link.send_when_writable,        the link is closed:
#                   for a slow consumer             an outcome goes back to Hub.redeliver
#
# Effects are held until their changes are on disk: nobody hears of what a crash could undo, so what
# was not acknowledged has not happened. Effects without changes wait too while others are held:
# they may depend on these, and order is kept. Only heartbeats and `overloaded` overtake. At most
# HELD_MAX effects are held, and of one connection those of messages that cost COST_PER_WRITE_MAX;
# then its messages are not read until the write is done.
#
# If a write fails (a full disk, most likely), the same changes are written again until it
# succeeds. Meanwhile the hub accepts no new task, the reserve file is given up so that open tasks
# can end, and agents stay connected. DISK_CHECK_S later, and from then on, the reserve is tried.
#
# A message to a slow consumer waits as an object in the link, not encoded, as long as its payload
# is in the hub's records anyway. It comes back with `take_unsent` if the link closes first. So an
# outcome that was not sent reaches Hub.redeliver in one way, LocalHub._return_unsent.
#
# The hub's time is one timer, set for `next_deadline()` once all that has come in is handled.
#
# A connection passes these stages before its messages reach a hub; a failure of each is counted by
# its reason, logged, and shown by /healthz:
#
#   accept         at most connections_max in total and connections_per_address_max from one
#      |           address. CONNECTIONS_OVER more get a 503; the others are closed at once.
#   TLS            if there is a certificate; at most HANDSHAKE_S, as for the next stage.
#      |
#   handshake      Host and Origin must be allowed, else 403: a web page can make a browser connect
#      |           anywhere, but cannot forge these two. GET /healthz is answered and ends here. A
#      |           valid bearer token skips the next stage.
#   authenticate   A message has to carry a valid `token`: within TOKEN_S, in TRIES_MAX attempts, each
#      |           of at most UNAUTHENTICATED_BYTES_MAX. Until then each gets `unauthorized`, and then
#      |           the connection is closed with 1008. The Authenticator owns the link. Without
#      |           tokens (`access` None) this stage does not exist.
#   namespace      The link is handed over to the LocalHub of the token's namespace, for good. Its
#                  grant stays on the link, and is checked before each message reaches the hub.
#
# A wrong token counts against its address: after FAILURES_FREE of them, answers to that address are
# delayed, for right and wrong tokens alike, so that guessing is slow and a delay tells nothing.
#
# Each resource of a connection is limited: file descriptors, some reserved for the journals
# (HubServer); the memory of an incoming message (message_bytes_max) and of what waits for a slow
# consumer (backlog_bytes_max, ServerLink); CPU time (messages_per_s_max, ServerLink, to which the
# hub adds the cost of each message); its share of a journal write (COST_PER_WRITE_MAX, GroupCommit).
#
# Namespaces share the port and the settings, and nothing else: each is a LocalHub with its own Hub,
# limits and journal. HubServer is itself that of `default`.
# ============================================================================================


WRITE_RETRY_S = 1.0  # After a write to the journal that failed.
DISK_CHECK_S = 5.0  # Between two checks whether a full disk has free space again.
COST_PER_WRITE_MAX = 500  # Of the messages of one connection during a write; a plain message costs 1.
HELD_MAX = 100_000  # Effects held for a write; beyond that, connections that send are closed with 1001.
TOKEN_S = 5.0  # For a connection to authenticate.
TOKENS_MAX = 1000  # In an access file.
TOKEN_LENGTH_MIN = 16  # A shorter one is warned of; `agenthub token` generates 43 characters, or 256 bits.
FAILURES_FREE = 5  # Wrong tokens from one address before answers to it are delayed.
FAILURE_FORGOTTEN_S = 10.0  # After each such interval, one failure of an address is forgotten.
FAILURE_DELAY_FIRST_S, FAILURE_DELAY_MAX_S = 0.1, 2.0  # Each further failure doubles the delay.
ADDRESSES_MAX = 10_000  # Whose failures are remembered.
CONNECTIONS_PER_ADDRESS_MAX = 1000
CONNECTIONS_OVER = 64  # Connections over a limit that still get an answer (503); the others are closed at once.
DESCRIPTORS_KEPT = 64  # File descriptors that no connection gets, so that the journals can always be written ...
DESCRIPTORS_OF_JOURNAL = 4  # ... in addition to those that each of them has open.
ACCEPT_RETRY_S = 0.5  # After a connection could not be accepted, most likely for want of file descriptors.
NAMESPACE_DEFAULT = "default"
RIGHTS = ("register", "delegate", "broadcast", "observe")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True)
class Grant:
    """What one token allows: in which namespace, which of RIGHTS, and for which capabilities.

    `register` allows to offer capabilities, `delegate` to delegate tasks and to discover agents, `broadcast` to
    broadcast, `observe` to discover agents and to see the hub's status and list of tasks. The patterns in `may_offer`
    and `may_call` are those of a shell (`review-*`); None matches any capability. The status of one task, a result and
    a heartbeat need no right: the hub decides by the connection.
    """

    name: str
    sha256: str  # Of the token, in hex.
    namespace: str = NAMESPACE_DEFAULT
    may: frozenset[str] = frozenset(RIGHTS)
    may_offer: tuple[str, ...] | None = None
    may_call: tuple[str, ...] | None = None

    @property
    def registration_scope(self) -> tuple[Any, ...]:
        """What a registration depends on: if a reload changes it, the agent has to register again."""
        return self.namespace, self.may_offer, "register" in self.may

    def refusal(self, message: AgentMessage) -> str | None:
        """Return why the holder may not send a message; None if it may."""
        if isinstance(message, Register):
            return self._refusal_to_register(message)
        if isinstance(message, Delegate):
            return self._refusal_to_delegate(message)
        if isinstance(message, Broadcast):
            return None if "broadcast" in self.may else "this token may not broadcast"
        if isinstance(message, Discover):
            return None if self.may & {"delegate", "observe"} else "this token may not discover"
        if isinstance(message, Status) and message.task_id is None:
            return None if "observe" in self.may else "this token may not observe"
        return None

    def _refusal_to_register(self, message: Register) -> str | None:
        names = [one if isinstance(one, str) else one.name for one in message.capabilities]
        if not self.may & {"register", "delegate", "broadcast"}:
            return "this token may not register"
        if names and "register" not in self.may:
            return "capabilities: this token may not offer any"
        if not all(matches_any(name, self.may_offer) for name in names):
            return "capabilities: this token may not offer all of these"
        return None

    def _refusal_to_delegate(self, message: Delegate) -> str | None:
        if "delegate" not in self.may:
            return "this token may not delegate"
        if self.may_call is not None and (
            message.capability is None or not matches_any(message.capability, self.may_call)
        ):
            return "capability: this token may not call it"
        return None


def matches_any(name: str, patterns: tuple[str, ...] | None) -> bool:
    return patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class Access:
    """The tokens that a hub accepts, by their SHA-256. Raises ValueError for no tokens, or for more than TOKENS_MAX."""

    grants: list[Grant]

    def __init__(self, grants: Iterable[Grant]) -> None:
        self.grants = list(grants)
        if not 1 <= len(self.grants) <= TOKENS_MAX:
            raise ValueError(f"a hub needs 1 to {TOKENS_MAX} tokens, not {len(self.grants)}")
        if len({grant.sha256 for grant in self.grants}) < len(self.grants):
            raise ValueError("two names have the same token; `agenthub token` generates another")

    @classmethod
    def of_token(cls, token: str) -> Access:
        """Return access by this one token, with all rights."""
        return cls([Grant("token", hash_of(check_token("the token", token)))])

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> Access:
        """Read an access file: TOML with a table `tokens.NAME` for each token. Raises ValueError with the path."""
        import tomllib

        try:
            document = tomllib.loads(read_private(path, stat.S_IWGRP | stat.S_IWOTH, "write to"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path}: is not TOML: {error}") from error
        except RecursionError:
            raise ValueError(f"{path}: is not TOML that can be read: it is nested too deeply") from None
        tokens = document.get("tokens")
        if not isinstance(tokens, dict) or set(document) != {"tokens"}:
            raise ValueError(f"{path}: must have tables named tokens.NAME, and nothing else")
        try:
            return cls(parse_grant(name, table) for name, table in tokens.items())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def namespaces(self) -> list[str]:
        return list(dict.fromkeys(grant.namespace for grant in self.grants))

    def grant(self, token: str) -> Grant | None:
        """Return what a token allows; None if it is unknown. Takes the same time for all tokens, right or wrong."""
        return self.grant_by_hash(hash_of(token))

    def grant_by_hash(self, sha256: str) -> Grant | None:
        found = None
        for grant in self.grants:
            if hmac.compare_digest(grant.sha256, sha256):
                found = grant
        return found


def parse_grant(name: str, table: Any) -> Grant:
    """Return the grant that a table of an access file describes; raise ValueError with the key."""
    where = f"tokens.{escape_unprintable(name)}"
    known = {"sha256", "namespace", "may", "offers", "calls"}
    if not isinstance(table, dict) or not set(table) <= known:
        raise ValueError(f"{where}: must be a table with no other keys than {', '.join(sorted(known))}")
    sha256, namespace = table.get("sha256"), table.get("namespace", NAMESPACE_DEFAULT)
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(
            f"{where}.sha256: must be the SHA-256 of a token, 64 digits of 0-9 a-f, as `agenthub token` prints it"
        )
    if not isinstance(namespace, str) or not re.fullmatch("[a-z0-9][a-z0-9_-]{0,63}", namespace):
        raise ValueError(f"{where}.namespace: must be 1 to 64 characters of a-z 0-9 _ -")
    if namespace.endswith(("-wal", "-shm", "-journal", "-reserve")):
        raise ValueError(
            f"{where}.namespace: must not end like a file next to a journal: -wal, -shm, -journal, -reserve"
        )
    lists: dict[str, tuple[str, ...] | None] = {}
    for key in ("may", "offers", "calls"):
        given = table.get(key)
        if given is not None and not (isinstance(given, list) and all(isinstance(one, str) for one in given)):
            raise ValueError(f"{where}.{key}: must be a list of strings")
        lists[key] = tuple(given) if given is not None else None
    may = frozenset(RIGHTS if lists["may"] is None else lists["may"])
    if not may <= set(RIGHTS):
        raise ValueError(f"{where}.may: must be a list of some of {', '.join(RIGHTS)}")
    return Grant(name, sha256, namespace, may, lists["offers"], lists["calls"])


class AuthBackoff:
    """Counts wrong tokens by address, and computes the delay of the next answer to an address."""

    def __init__(self) -> None:
        self._scores: dict[str, tuple[float, float]] = {}  # By address: its failures, and when they were counted.

    def add(self, address: str, now: float) -> None:
        score = self._score(address, now) + 1
        self._scores.pop(address, None)
        self._scores[address] = score, now
        if len(self._scores) > ADDRESSES_MAX:
            del self._scores[next(iter(self._scores))]

    def delay_s(self, address: str, now: float) -> float:
        over = self._score(address, now) - FAILURES_FREE
        return min(FAILURE_DELAY_FIRST_S * 2**over, FAILURE_DELAY_MAX_S) if over >= 0 else 0.0

    def _score(self, address: str, now: float) -> float:
        score, then = self._scores.get(address, (0.0, now))
        return min(max(0.0, score - (now - then) / FAILURE_FORGOTTEN_S), 2 * FAILURES_FREE)


class AuthAttempt(NamedTuple):
    """A message on a link that has not authenticated, and the token in it ("": a value that cannot be a token)."""

    message: AgentMessage | InvalidMessage | None  # None: the token is that of the handshake.
    token: str | None


def decode_auth_attempt(raw: bytes) -> AuthAttempt:
    """Read a message that may carry a token, and is short: it is parsed twice."""
    try:
        document = json.loads(raw)
        found = document.get("token") if isinstance(document, dict) else None
    except (ValueError, RecursionError):
        found = None
    token = found if isinstance(found, str) or found is None else ""
    try:
        return AuthAttempt(decoder_from_agent()(raw), token)
    except InvalidMessage as error:
        if not is_utf8(raw):
            raise
        return AuthAttempt(error, token)


@dataclass(slots=True, eq=False)
class Unauthenticated:
    """A link that has not authenticated yet. When the timer fires, it is closed."""

    timer: asyncio.TimerHandle
    bearer: str | None  # The handshake's token, which did not authenticate it at once.
    attempts: int = 0


class Authenticator:
    """Owns each link from the network until it has authenticated; then `admit` hands it over to its hub.

    Call `check_request` and `check_bearer` for the request of the handshake, before the link opens. `access` None
    admits every link. `names` are those that a Host header may have (None: any), `origins` those of web pages that may
    connect. `rejected` counts rejections, by reason.
    """

    def __init__(
        self,
        access: Access | None,
        names: frozenset[str] | None,
        admit: Callable[[Link, Grant | None], LinkOwner],
    ) -> None:
        self.access = access
        self.origins: frozenset[str] = frozenset()
        self.rejected: dict[str, int] = {}
        self._names = names
        self._admit = admit
        self._backoff = AuthBackoff()
        self.unauthenticated: dict[Link, Unauthenticated] = {}
        self._loop = asyncio.get_running_loop()

    # The handshake

    def check_request(self, link: Link, request: Any) -> tuple[int, str] | None:
        """Return the answer that rejects an HTTP request of a foreign web page; None for any other request.

        A page can make a browser connect to any address, and let its own name resolve to any address, but cannot set
        these two headers: https://datatracker.ietf.org/doc/html/rfc6455#section-10.2.
        """
        hosts, origins = request.headers.get_all("Host"), request.headers.get_all("Origin")
        if not hosts and is_health_check(request):  # HTTP/1.0 of a load balancer. Every browser sends a Host.
            hosts = list(self._names or ())[:1]
        if self._names is not None and not (len(hosts) == 1 and host_name(hosts[0]) in self._names):
            self.reject(link, "host")
            return 403, "this hub does not accept that Host header; --allow-host adds a name\n"
        if origins and not (len(origins) == 1 and origins[0] in self.origins):
            self.reject(link, "origin")
            return 403, "web pages of that origin may not connect; --allow-origin adds an origin\n"
        return None

    def check_bearer(self, link: ServerLink, request: Any) -> None:
        """Look up the bearer token of a handshake: with a valid one, the link is admitted as it opens.

        A wrong one is treated as a failed attempt once the link is open; so is one whose answer has to be delayed.
        """
        token = bearer_in(request)
        if self.access is not None and token is not None:
            link.grant = self.access.grant(token) if not self._delay_s(link) else None
            link.bearer = token if link.grant is None else None

    def grant_of(self, link: Link, request: Any) -> Grant | None:
        """Return what the bearer token of a plain HTTP request allows; None while its address has to wait."""
        token = bearer_in(request)
        if self.access is None or token is None or self._delay_s(link):
            return None
        grant = self.access.grant(token)
        if grant is None:
            self._backoff.add(link.address, self._loop.time())
            self.reject(link, "unauthorized")
        return grant

    def reject(self, link: Link, reason: str) -> None:
        """Count and log a rejection. `reason` is one of a few words of this module, never what a client sent."""
        count(self.rejected, reason)
        log_hub.warning("rejected reason=%s address=%s", reason, link.address)

    def _delay_s(self, link: Link) -> float:
        return self._backoff.delay_s(link.address, self._loop.time())

    # LinkOwner

    def opened(self, link: Link) -> None:
        if self.access is None or link.grant is not None:
            self._admit(link, link.grant)
            return
        timer = self._loop.call_later(TOKEN_S, self._close, link, "authentication timed out")
        bearer = link.bearer if isinstance(link, ServerLink) else None
        self.unauthenticated[link] = Unauthenticated(timer, bearer)
        if bearer is not None:
            self._authenticate(link, AuthAttempt(None, bearer), 0)

    def received(self, link: Link, attempt: AuthAttempt, message_bytes: int) -> None:
        if isinstance(attempt, InvalidMessage):  # Not UTF-8, or a binary message.
            attempt = AuthAttempt(attempt, None)
        if link in self.unauthenticated:
            self._authenticate(link, attempt, message_bytes)

    def closed(self, link: Link, code: int, reason: str) -> None:
        pending = self.unauthenticated.pop(link, None)
        if pending is not None:
            pending.timer.cancel()

    # A token in a message

    def _authenticate(self, link: Link, attempt: AuthAttempt, message_bytes: int) -> None:
        """Decide about an attempt: at once, or after a delay if its address has failed too often."""
        delay_s = self._delay_s(link) if attempt.token is not None else 0.0
        if not delay_s:
            self._decide(link, attempt, message_bytes)
            return

        def decide() -> None:
            if link in self.unauthenticated:
                self._decide(link, attempt, message_bytes)
            link.resume_reading(PauseReason.AUTH_BACKOFF)

        link.pause_reading(PauseReason.AUTH_BACKOFF)
        self._loop.call_later(delay_s, decide)

    def _decide(self, link: Link, attempt: AuthAttempt, message_bytes: int) -> None:
        if self.access is None:
            raise AssertionError("without tokens, every link is admitted as it opens")
        grant = self.access.grant(attempt.token) if attempt.token is not None else None
        if grant is None:
            self._refuse(link, attempt)
            return
        self.closed(link, CloseCode.DONE, "authenticated")
        owner = self._admit(link, grant)
        if attempt.message is not None:
            owner.received(link, attempt.message, message_bytes)

    def _refuse(self, link: Link, attempt: AuthAttempt) -> None:
        pending = self.unauthenticated[link]
        pending.attempts += 1
        if attempt.token is not None:
            self._backoff.add(link.address, self._loop.time())
        if attempt.message is not None:
            reply_to = attempt.message.reply_to if isinstance(attempt.message, InvalidMessage) else attempt.message.id
            text = "authentication required: set AGENTHUB_TOKEN or AGENTHUB_TOKEN_FILE"
            if attempt.token is not None or pending.bearer is not None:
                text = "invalid token: check AGENTHUB_TOKEN or AGENTHUB_TOKEN_FILE"
            link.send(encode(Error(reply_to=reply_to, code=Code.UNAUTHORIZED, message=text)))
        if pending.attempts >= TRIES_MAX:
            self._close(link, "too many failed attempts to authenticate")
        else:
            self.reject(link, "unauthorized")

    def _close(self, link: Link, reason: str) -> None:
        self.reject(link, "unauthorized")
        self.closed(link, CloseCode.NOT_ALLOWED, reason)
        link.close(CloseCode.NOT_ALLOWED, reason)


def bearer_in(request: Any) -> str | None:
    """Return the bearer token of an HTTP request (RFC 6750 §2.1); None if it has none, or more than one."""
    headers = request.headers.get_all("Authorization")
    scheme, _, token = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    return token.strip() if scheme.lower() == "bearer" else None


def is_health_check(request: Any) -> bool:
    """Return whether an HTTP request is `GET /healthz`."""
    return bool(request.path.partition("?")[0] == "/healthz")


def host_name(header: str) -> str:
    """Return the name in a Host header, in lower case and without the port (RFC 9110 §7.2)."""
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]]*)(?::[0-9]{1,5})?", header.lower())
    return match[1] if match is not None and match[1] else "?"  # No host has this name.


def is_loopback(host: str) -> bool:
    """Return whether an address or name to listen on can be reached from this machine only."""
    import ipaddress

    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def network_of(address: str) -> str:
    """Return what counts as one address: of IPv6 the first 64 bits, because a site owns all addresses with the same."""
    import ipaddress

    if ":" not in address:
        return address
    return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))


def server_tls(cert_file: str, key_file: str | None = None) -> ssl.SSLContext:
    """Return a context for TLS 1.2 or later. Raises ValueError for files that are not a certificate and its key."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, cert_file, key_file)
    return context


def load_certificate(context: ssl.SSLContext, cert_file: str, key_file: str | None) -> None:
    """Load a certificate, for new connections. Raises ValueError for files that are not a certificate and its key."""
    import ssl

    def no_password() -> NoReturn:
        raise ValueError("the key is encrypted; give one without a password")

    try:
        # Into a second context first: a key that does not match would leave the first with a certificate and no key.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, no_password)
        context.load_cert_chain(cert_file, key_file, no_password)
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or "they are not PEM files"
        text = f"the certificate {cert_file} and its key {key_file or cert_file} cannot be used: {reason}"
        raise ValueError(text) from error


def descriptors_max() -> float:
    """Return the number of files and sockets that this process may have open."""
    try:
        import resource
    except ImportError:  # Windows has no such limit.
        return math.inf
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if soft == resource.RLIM_INFINITY else soft


class GroupCommit:
    """Holds the hub's effects back until the changes that they follow from are in the journal.

    One write at a time, in a thread of its own, so that a slow disk does not stop the loop; the steps taken meanwhile
    are merged into the next one. Heartbeats and `overloaded` errors do not wait.
    """

    def __init__(self, hub: Hub, journal: Journal, carry_out: Callable[[list[Effect]], None]) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._hub = hub
        self._journal = journal
        self._carry_out = carry_out
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "agenthub-journal")
        self._changes: Changes | None = None  # To be in the next write ...
        self.held: list[Effect] = []  # ... and the effects to be carried out after it.
        self._costs: dict[Link, int] = {}  # Of the messages of each connection since the last write.
        self._is_closed = False
        self.idle = asyncio.Event()  # Nothing is held back.
        self.idle.set()
        self._timer: asyncio.TimerHandle | None = None
        self._check_disk()

    def add(self, step: Step) -> None:
        """Carry out the effects of a step: now if nothing waits to be written before them, else as soon as it is."""
        effects, changes = step
        if changes is None and self.idle.is_set():
            self._carry_out(effects)
            return
        if self._changes is None:
            self._changes = changes
        elif changes is not None:
            self._changes.merge(changes)
        self._carry_out([effect for effect in effects if self._may_overtake(effect[1])])
        self.held += [effect for effect in effects if not self._may_overtake(effect[1])]
        if self.idle.is_set():
            self.idle.clear()
            self._loop.call_soon(self._write)  # After this turn of the loop, so that what it brings is one write.

    def charge(self, link: Link, cost: int) -> None:
        """Charge a link for a message. If it has cost much during one write, it is not read until that is done."""
        if not self.idle.is_set():
            total = self._costs[link] = self._costs.get(link, 0) + cost
            if total > COST_PER_WRITE_MAX:
                link.pause_reading(PauseReason.JOURNAL)

    async def close(self, within_s: float) -> None:
        """Write the changes that are left, for at most `within_s` seconds, and close the journal."""
        await self.flush(within_s)
        if not self.idle.is_set():
            log_hub.error("the journal could not be written; the changes that it lacks were not acknowledged either")
        if self._timer is not None:
            self._timer.cancel()
        self._is_closed = True
        ending = self._loop.run_in_executor(self._thread, self._end)
        self._thread.shutdown(wait=False)
        with contextlib.suppress(TimeoutError):  # A disk that hangs must not keep the hub from ending.
            async with asyncio.timeout(within_s):
                await asyncio.shield(ending)

    def _end(self) -> None:
        try:
            self._journal.give_up_reserve()
        finally:
            self._journal.close()

    async def flush(self, within_s: float) -> None:
        """Return when nothing is held any more, or after `within_s` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self.idle.wait()

    @property
    def is_overfull(self) -> bool:
        """Whether so much is held that no more messages should be handled."""
        return len(self.held) > HELD_MAX

    @staticmethod
    def _may_overtake(action: HubOutput | Close) -> bool:
        return isinstance(action, HeartbeatAck) or (isinstance(action, Error) and action.code == Code.OVERLOADED)

    def _write(self) -> None:
        """Write all changes until now, and then carry out all effects until now."""
        held, self.held = self.held, []
        changes, self._changes = self._changes, None
        self._try(changes or Changes(), held)

    def _try(self, changes: Changes, held: list[Effect]) -> None:
        if self._is_closed:
            return
        offset = time.time() - self._loop.time()
        writing = self._loop.run_in_executor(self._thread, self._journal.write, changes, offset)
        writing.add_done_callback(functools.partial(self._on_written, changes, held))

    def _on_written(self, changes: Changes, held: list[Effect], writing: asyncio.Future[None]) -> None:
        error = writing.exception()
        if error is not None:
            self._on_failure(error, changes, held)
            return
        try:
            self._carry_out(held)
        finally:  # A bug in one effect must not stop the journal.
            self._resume_reading()
            if self.held or self._changes is not None:
                self._write()
            else:
                self.idle.set()

    def _resume_reading(self) -> None:
        costs, self._costs = self._costs, {}
        for link in costs:
            link.resume_reading(PauseReason.JOURNAL)

    def _on_failure(self, error: BaseException, changes: Changes, held: list[Effect]) -> None:
        """Accept no new task, give up the reserve, and retry until the changes are written."""
        self._resume_reading()  # Heartbeats must not wait until somebody frees disk space.
        delay_s = WRITE_RETRY_S
        if not self._hub.is_full:
            log_hub.error("the journal cannot be written: %s; new tasks are rejected until it can", error)
            self._hub.is_full = True
            self._journal.give_up_reserve()
            delay_s = 0.0
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(DISK_CHECK_S, self._check_disk)
        self._loop.call_later(delay_s, self._try, changes, held)

    def _check_disk(self) -> None:
        if self._is_closed:
            return
        taking = self._loop.run_in_executor(self._thread, self._journal.take_reserve)
        taking.add_done_callback(self._on_disk_checked)

    def _on_disk_checked(self, taking: asyncio.Future[bool]) -> None:
        if self._is_closed:
            return
        has_space = taking.exception() is None and taking.result()
        if has_space and self._hub.is_full:
            log_hub.warning("the journal's disk has free space again")
        elif not has_space and not self._hub.is_full:
            log_hub.error("the journal's disk is full; new tasks are rejected until there is free space")
        self._hub.is_full = not has_space
        self._timer = None if has_space else self._loop.call_later(DISK_CHECK_S, self._check_disk)


class LocalHub:
    """A hub in this process, reached over in-memory links: for tests, and for programs of one process.

        async with LocalHub() as hub, Agent("a", hub=hub) as a:
            ...

    Ends with the `async with`, or with `stop`. Everything happens on the loop it was started on. With a `journal`,
    which it opens and closes, `start` continues from what is in it, and raises JournalError if that is impossible.
    """

    settings: HubSettings
    hub: Hub

    def __init__(self, settings: HubSettings | None = None, *, journal: Journal | None = None) -> None:
        self.settings = settings or HubSettings()
        self._journal = journal
        self.commit: GroupCommit | None = None
        self.links: dict[Link, None] = {}
        self._tick_at = math.inf  # When `_tick` is to be called; it may be early.
        self._is_arming = False
        self.is_running = False

    async def __aenter__(self) -> typing.Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        decoder_from_agent()  # Compiled now, so that the first message need not wait for it.
        self._is_verbose = log_hub.isEnabledFor(logging.DEBUG)  # Once, because it costs a call for each message.
        self._loop = asyncio.get_running_loop()
        self._timers = Timers()
        now = self._loop.time()
        self.hub = Hub(self.settings, entropy=os.urandom, now=now, is_journaled=self._journal is not None)
        if self._journal is not None:
            await self._recover(self._journal)
        self.is_running = True
        self._arm()

    async def _recover(self, journal: Journal) -> None:
        """Open the journal, and restore the hub from it."""
        offset = time.time() - self._loop.time()
        await asyncio.to_thread(journal.open)
        try:
            agents, tasks, last = await asyncio.to_thread(journal.load, offset)
            step = self.hub.restore(agents, tasks, last - self.settings.grace_s)
        except BaseException:
            journal.close()
            raise
        if agents or tasks:
            log_hub.info("restored %d agents and %d tasks from %s", len(agents), len(tasks), journal.path)
            self._log_age(self._loop.time() - last)
        self.commit = GroupCommit(self.hub, journal, self._carry_out)
        self.commit.add(step)

    def _log_age(self, age_s: float) -> None:
        """Log how long ago the last change was: deadlines go by the machine's clock, which may have been set."""
        if age_s < 0:
            log_hub.warning("the journal's last change is %.0f s in the future: the clock was set back", -age_s)
        else:
            log_hub.info("the journal's last change was %.0f s ago by the machine's clock", age_s)

    def shut_down(self) -> None:
        """Accept no new task from now on."""
        self.hub.shut_down()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Accept no new task, give those in progress `drain_s` seconds, then close all links with 1001."""
        if not self.is_running:
            return
        self.hub.shut_down()
        last = self._loop.time() + drain_s
        while self.hub.in_progress and self._loop.time() < last:
            await asyncio.sleep(0.02)
        if self.commit is not None:
            await self.commit.flush(CLOSING_S)
        self.is_running = False
        self._timers.clear()
        links = self._stop_listening()
        for link in links:
            link.close(CloseCode.GOING_AWAY, "the hub is shutting down")
        with contextlib.suppress(TimeoutError):  # Each link aborts by itself CLOSING_S after its close.
            async with asyncio.timeout(2 * CLOSING_S):
                await asyncio.gather(*(link.gone.wait() for link in links))
        for link in links:
            link.abort()
        if self.commit is not None:
            await self.commit.close(CLOSING_S)
            self.commit = None

    def _stop_listening(self) -> list[Link]:
        """Accept no new link, and return all that are open."""
        return list(self.links)

    async def connect(self, owner: LinkOwner) -> Link:
        """Open a link to this hub from within its process."""
        if not self.is_running:
            raise Disconnected("the hub of this process is not running")
        near, far = MemoryLink.pair((owner, decoder_from_hub()), (self, decoder_from_agent()))
        self.opened(far)
        return near

    # LinkOwner

    def opened(self, link: Link) -> None:
        if not self.is_running:  # One of several namespaces may have stopped before the others.
            link.close(CloseCode.GOING_AWAY, "the hub is shutting down")
            return
        self.links[link] = None
        self._apply(self.hub.connected(link, self._loop.time(), link.address or None))

    def received(self, link: Link, message: Any, message_bytes: int) -> None:
        if self._is_verbose:
            log_hub.debug("received type=%s bytes=%d", getattr(message, "type", "invalid"), message_bytes)
        commit = self.commit
        if commit is not None and commit.is_overfull:
            link.close(CloseCode.GOING_AWAY, "the journal cannot be written; come back later")
            return
        refusal = self._refusal(link, message) if link.grant is not None else None
        try:
            step = self.hub.receive(link, message, self._loop.time(), message_bytes, refusal)
        except Exception:
            log_hub.exception("a message was not handled type=%s", getattr(message, "type", "invalid"))
            step = self.hub.failed(link, getattr(message, "id", None))
        self._apply(step)
        if commit is not None:
            commit.charge(link, self.hub.cost)
        link.charge(self.hub.cost)

    @staticmethod
    def _refusal(link: Link, message: Any) -> Refused | None:
        """Return why the token of a link does not allow a message; None if it does."""
        if isinstance(message, InvalidMessage):
            return None
        reason = link.grant.refusal(message)
        return Refused(reason, code=Code.UNAUTHORIZED) if reason is not None else None

    def closed(self, link: Link, code: int, reason: str) -> None:
        self.links.pop(link, None)
        self._apply(self.hub.disconnected(link, self._loop.time(), code))
        for message in link.take_unsent():
            self._return_unsent(message)

    # Steps of the hub, and its time.

    def _apply(self, step: Step) -> None:
        if self.commit is None:
            self._carry_out(step.effects)
        else:
            self.commit.add(step)
        if not self._is_arming:  # Once, when all that came in at once has been handled.
            self._is_arming = True
            self._loop.call_soon(self._arm)

    def _carry_out(self, effects: list[Effect]) -> None:
        sent: HubOutput | None = None
        raw = b""
        for link, action in effects:
            if link not in self.links:  # It closed while its effects were held for the journal.
                self._return_unsent(action)
                continue
            if action is not sent:  # A broadcast is one message to many, encoded once.
                if isinstance(action, Close):
                    link.close(action.code, action.reason)
                    continue
                if link.is_backlogged and isinstance(action, Delegated | TaskOutcome):
                    link.send_when_writable(action)  # Their payloads are in memory anyway, in the hub's records.
                    continue
                sent, raw = action, encode(action)
            link.send(raw)

    def _return_unsent(self, action: HubOutput | Close) -> None:
        """Take back an outcome that was not sent before its link closed; other effects are dropped."""
        if isinstance(action, TaskOutcome):
            self._apply(self.hub.redeliver(action.task_id, self._loop.time()))

    def _arm(self) -> None:
        """Have `_tick` called at the hub's next deadline, or before: an early tick costs less than moving it."""
        self._is_arming = False
        deadline = self.hub.next_deadline()
        if deadline < self._tick_at and self.is_running:
            self._tick_at = deadline
            self._timers.set(self._tick, deadline)

    def _tick(self) -> None:
        now = max(self._loop.time(), self._tick_at)  # A timer may fire up to the clock's resolution early.
        if now - self._tick_at > TICK_LATE_S:  # The process was stopped: heartbeats of that time wait in the sockets.
            self._tick_at = now + CATCH_UP_S
            self._timers.set(self._tick, self._tick_at)
            return
        self._tick_at = math.inf
        try:
            self._apply(self.hub.tick(now))
        finally:
            self._arm()  # A tick that fails must not stop the deadlines.


class HubServer(LocalHub):
    """A hub that listens for WebSockets, and answers `GET /healthz` on the same port.

    With `port=0` it picks a free one, which `url` contains. `start` raises OSError if the port is taken. Without
    `access` all clients are accepted; if `host` is not loopback, that raises ValueError unless `insecure`. Each
    namespace but `default`, which is this object, is a hub of its own behind the same port, with a journal of its own.

    On loopback it accepts the Host names of loopback and those in `allow_hosts`; elsewhere those in `allow_hosts`, or
    any if that is empty. Web pages may connect from its own origins and those in `allow_origins`
    (`https://example.org`).
    """

    host: str
    port: int

    def __init__(
        self,
        settings: HubSettings | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 8765,
        access: Access | None = None,
        insecure: bool = False,
        tls: ssl.SSLContext | None = None,
        allow_origins: Iterable[str] = (),
        allow_hosts: Iterable[str] = (),
        backlog_bytes_max: int = BACKLOG_BYTES_MAX,
        connections_per_address_max: int = CONNECTIONS_PER_ADDRESS_MAX,
        messages_per_s_max: float = MESSAGES_PER_S_MAX,
        journal: Journal | None = None,
    ) -> None:
        super().__init__(settings, journal=journal)
        if backlog_bytes_max <= 0:
            raise ValueError("backlog_bytes_max must be more than 0")
        if connections_per_address_max <= 0:
            raise ValueError("connections_per_address_max must be more than 0")
        if not 0 <= messages_per_s_max < math.inf:
            raise ValueError("messages_per_s_max must be a number of at least 0 (unlimited)")
        if access is None and not insecure and not is_loopback(host):
            raise ValueError(
                f"{host} can be reached from other machines, so this hub needs a token: set AGENTHUB_TOKEN,"
                " --token-file or --access (`agenthub token` generates one), or accept everybody with --insecure"
            )
        self.host = host
        self.port = port
        self.access = access
        bytes_max = self.settings.message_bytes_max
        self._first_bytes_max = bytes_max if access is None else min(bytes_max, UNAUTHENTICATED_BYTES_MAX)
        self._tls = tls
        self._allow_origins = frozenset(map(check_origin, allow_origins))
        self._allow_hosts = frozenset(name.lower() for name in allow_hosts)
        self._backlog_bytes_max = backlog_bytes_max
        if bytes_max > MESSAGE_BYTES_MAX:  # Otherwise one large message could make any peer a slow consumer.
            self._backlog_bytes_max = max(backlog_bytes_max, 2 * bytes_max)
        self._per_address_max = connections_per_address_max
        self._messages_per_s_max = messages_per_s_max
        self.namespaces: dict[str, LocalHub] = {NAMESPACE_DEFAULT: self}
        self._reloading = asyncio.Lock()
        self._accepting: set[asyncio.Task[None]] = set()
        self.sockets: dict[ServerLink, None] = {}  # All connections, also before and without a WebSocket handshake.
        self.addresses: dict[str, int] = {}  # How many of them each address has.

    @property
    def url(self) -> str:
        return f"{'ws' if self._tls is None else 'wss'}://{self._name}:{self.port}"

    @property
    def rejected(self) -> dict[str, int]:
        """The number of rejected connections and attempts to authenticate, by reason."""
        return dict(self.authenticator.rejected)

    @property
    def _name(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    async def start(self) -> None:
        names = self._allow_hosts | {self._name.lower()} | set(LOOPBACK_NAMES if is_loopback(self.host) else ())
        is_any_name = not is_loopback(self.host) and not self._allow_hosts
        self.authenticator = Authenticator(self.access, None if is_any_name else names, self._admit)
        await super().start()
        try:
            for namespace in self.access.namespaces if self.access is not None else ():
                await self._start_namespace(namespace)
            self._count_descriptors()
            listeners = await self._listen()
        except BaseException:
            await self.stop()  # Unlocks the journals for another hub.
            raise
        self.authenticator.origins = self._allow_origins | own_origins(
            names, self.port, is_secure=self._tls is not None
        )
        self._accepting = {self._loop.create_task(self._accept_all(listener)) for listener in listeners}
        log_hub.info("messages: %s; websocket: %s", codec().name, websockets_used().name)

    async def stop(self, drain_s: float = 0.0) -> None:
        await asyncio.gather(super().stop(drain_s), *(other.stop(drain_s) for other in self._other_namespaces()))
        async with self._reloading:  # A reload may have started another one meanwhile.
            await asyncio.gather(*(other.stop() for other in self._other_namespaces()))
        await asyncio.gather(*self._accepting, return_exceptions=True)  # Until the port is free again.

    def shut_down(self) -> None:
        for namespace in self.namespaces.values():
            namespace.hub.shut_down()

    def _other_namespaces(self) -> list[LocalHub]:
        return [namespace for namespace in self.namespaces.values() if namespace is not self]

    async def reload(self, access: Access) -> None:
        """Replace the tokens, also for the present connections.

        Closes connections whose token was revoked with 1008, and those whose agent has to register again under the
        changed grant with 1001. Raises JournalError, and keeps the tokens, if the journal of a new namespace cannot be
        opened; ValueError if this hub was started without tokens.
        """
        if self.access is None:
            raise ValueError("this hub was started without tokens; restart it with --token-file or --access")
        async with self._reloading:
            for namespace in access.namespaces:
                await self._start_namespace(namespace)
            self._count_descriptors()
        self.access = self.authenticator.access = access
        for link in list(self.sockets):
            if link.grant is None:
                continue
            grant = access.grant_by_hash(link.grant.sha256)
            if grant is None:
                link.close(CloseCode.NOT_ALLOWED, "the token was revoked")
            elif grant.registration_scope != link.grant.registration_scope:
                link.close(CloseCode.GOING_AWAY, "the token's namespace or capabilities changed; register again")
            else:
                link.grant = grant
        log_hub.info("loaded %d tokens of %d namespaces", len(access.grants), len(access.namespaces))

    async def _start_namespace(self, namespace: str) -> None:
        """Start the hub of a namespace, unless it runs already."""
        if namespace not in self.namespaces and self.is_running:
            journal = self._journal.of_namespace(namespace) if self._journal is not None else None
            local_hub = LocalHub(self.settings, journal=journal)
            await local_hub.start()
            self.namespaces[namespace] = local_hub

    def _admit(self, link: Link, grant: Grant | None) -> LinkOwner:
        """Hand a link over to the hub of its namespace."""
        local_hub = self.namespaces[grant.namespace if grant is not None else NAMESPACE_DEFAULT]
        link.grant = grant
        link.set_owner(local_hub, decoder_from_agent())
        if self.access is not None and isinstance(link, ServerLink):
            link.limit_messages(self.settings.message_bytes_max)
        local_hub.opened(link)
        return local_hub

    # Connections

    async def _listen(self) -> list[socket.socket]:
        """Open a socket for each address that `host` has, all on the same port."""
        found = await self._loop.getaddrinfo(
            self.host or None, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with contextlib.ExitStack() as opened:
            listeners: list[socket.socket] = []
            for family, *_, address in dict.fromkeys(found):
                where: Any = (address[0], self.port, *address[2:])
                try:
                    listener = socket.create_server(where, family=family, backlog=1024)
                except OSError as error:
                    if error.errno != errno.EADDRNOTAVAIL or (address == found[-1][-1] and not listeners):
                        raise
                    log_hub.warning("%s is not an address of this machine", address[0])  # `localhost` without IPv6.
                    continue
                listeners.append(opened.enter_context(listener))
                listener.setblocking(False)
                self.port = listener.getsockname()[1]
            opened.pop_all()
        return listeners

    def _count_descriptors(self) -> None:
        """Limit the number of sockets so that file descriptors are left for the journals."""
        left = descriptors_max() - DESCRIPTORS_KEPT - DESCRIPTORS_OF_JOURNAL * len(self.namespaces)
        if left < 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        if left < self.settings.connections_max:
            log_hub.warning("file descriptors suffice for %d connections only: raise the limit with ulimit -n", left)
        self._sockets_max = min(self.settings.connections_max + CONNECTIONS_OVER, left)

    def _stop_listening(self) -> list[Link]:
        for task in self._accepting:
            task.cancel()
        elsewhere = {link for other in self._other_namespaces() for link in other.links}
        return [link for link in dict.fromkeys([*self.links, *self.sockets]) if link not in elsewhere]

    async def _accept_all(self, listener: socket.socket) -> None:
        with listener:
            while True:
                try:
                    connection, address = await self._loop.sock_accept(listener)
                except OSError as error:
                    log_hub.error("a connection cannot be accepted: %s", error.strerror)
                    await asyncio.sleep(ACCEPT_RETRY_S)
                else:
                    # As asyncio does for its own sockets: else a small message waits for the previous one's ACK.
                    with contextlib.suppress(OSError):  # The client has hung up already.
                        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._accept(connection, network_of(address[0]))
                    await asyncio.sleep(0)  # `sock_accept` does not wait while another client is in the queue.

    def _accept(self, connection: socket.socket, network: str) -> None:
        over = self.addresses.get(network, 0) - self._per_address_max
        if len(self.sockets) >= self._sockets_max or over >= CONNECTIONS_OVER:
            count(self.authenticator.rejected, "connections")
            log_hub.warning("rejected reason=connections address=%s", network)
            connection.close()
            return
        link = ServerLink(
            self.authenticator,
            self._answer,
            message_bytes_max=self._first_bytes_max,
            backlog_bytes_max=self._backlog_bytes_max,
            messages_per_s_max=self._messages_per_s_max,
            address=network,
            decode=decode_auth_attempt if self.access is not None else None,
            on_gone=self._on_gone,
        )
        self.sockets[link] = None  # Now, not in the task: the next client is accepted before that runs.
        self.addresses[network] = self.addresses.get(network, 0) + 1
        task = self._loop.create_task(self._open(link, connection, network))
        self._accepting.add(task)
        task.add_done_callback(functools.partial(self._on_opened, link))

    def _on_opened(self, link: ServerLink, task: asyncio.Task[None]) -> None:
        self._accepting.discard(task)
        if task.cancelled():  # Perhaps before it began.
            self._on_gone(link)
            link.gone.set()

    async def _open(self, link: ServerLink, connection: socket.socket, network: str) -> None:
        """Attach a socket to its link, with TLS after that handshake."""
        options: dict[str, Any] = {}
        if self._tls is not None:
            options = {"ssl": self._tls, "ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": CLOSING_S}
        try:
            await self._loop.connect_accepted_socket(lambda: link, connection, **options)
        except BaseException as error:
            self._on_gone(link, "tls")
            link.gone.set()  # `connection_lost` will not be called, as `connection_made` was not.
            if not isinstance(error, OSError):
                raise
            log_hub.debug("TLS handshake failed address=%s: %s", network, error)

    def _on_gone(self, link: ServerLink, reason: str = "handshake") -> None:
        """Forget a connection. May be called twice for one."""
        if link in self.sockets:
            if not link.is_answered and self.is_running:
                self.authenticator.reject(link, reason)
            del self.sockets[link]
            self.addresses[link.address] -= 1
            if not self.addresses[link.address]:
                del self.addresses[link.address]

    def _answer(self, link: ServerLink, request: Any) -> tuple[int, str] | None:
        """Return the answer to a plain HTTP request; None if the WebSocket handshake may go on."""
        refusal = self.authenticator.check_request(link, request)
        if refusal is not None:
            return refusal
        if is_health_check(request):
            return self._health(link, request)
        for limit, number, whose in (
            (self.settings.connections_max, len(self.sockets), "the hub"),
            (self._per_address_max, self.addresses[link.address], "that address"),
        ):
            if number > limit:
                self.authenticator.reject(link, "connections")
                return 503, f"{whose} has its {limit} connections; try again later\n"
        self.authenticator.check_bearer(link, request)
        return None

    def _health(self, link: ServerLink, request: Any) -> tuple[int, str]:
        """Return the hub's health; for a token with the right to observe, also the summary of its namespace."""
        observed: LocalHub | None = self
        if self.access is not None:
            grant = self.authenticator.grant_of(link, request)
            observed = self.namespaces[grant.namespace] if grant is not None and "observe" in grant.may else None
        hub = (observed or self).hub
        health = "shutting_down" if hub.shutting_down else "journal_full" if hub.is_full else "ok"
        more = {**observed.hub.summary(), "turned_away": self.authenticator.rejected} if observed is not None else {}
        return 503 if hub.shutting_down else 200, json.dumps({"status": health, **more}) + "\n"


def check_origin(origin: str) -> str:
    """Return an origin as browsers write it; raise ValueError if it is not one."""
    if not re.fullmatch(r"https?://[^\s/?#@]+", origin):
        raise ValueError(f"an origin looks like https://example.org, not {origin!r}")
    return origin


def own_origins(names: Iterable[str], port: int, *, is_secure: bool) -> frozenset[str]:
    """Return the origins of web pages that this hub serves, as browsers write them (RFC 6454 §6.2)."""
    scheme, usual_port = ("https", 443) if is_secure else ("http", 80)
    suffix = "" if port == usual_port else f":{port}"
    return frozenset(f"{scheme}://{name}{suffix}" for name in names)


# ============================================================================================
# 8 Agent
#
#   Session        one connection to the hub: requests and their replies, matched by id
#   HubConnection  the connection over all sessions: connects, registers, reconnects with backoff
#   Handler        a function as a capability: its schema, and how a task's input fits it
#   Task           what a handler may know and do about the task that it works on
#   Worker         what others delegated to this agent: running handlers, threads, results
#   TaskHandle     what this agent delegated: one task, from its submission to its outcome
#   Agent          a name, its handlers, and the calls that ask the hub; owns all of the above
#
# The connection loop. An agent has one HubConnection from its start to its stop, and that has at
# most one Session at a time:
#
#     start ──► connect ──► register ──► reconcile ──► heartbeat
#                  ▲    │ failed   │ failed               │ lost
#                  │    ▼          ▼                      ▼
#                  └─ backoff ◄────┴─────────────────  release
#                       │
#                       └──► ended for good: replaced, not allowed, refused, or give_up_after_s is over
#
#     stop, from anywhere: deregister ──► stop the worker ──► cancel the loop ──► release
#
# Only `_connection_loop` moves along these arrows. The reply to the registration is handled in its
# place among the incoming messages (`on_reply`): a task that arrives right behind it must find the
# worker already reconciled. A session is lost when its link closes or when the hub was silent for
# three heartbeat intervals. Backoff is random up to a limit that doubles; `connected()` cuts it short.
#
# Kept across sessions, and until when:
#
#   what                           by              until
#   agent_id and its secret        Agent           the hub assigns others: it has forgotten these, or the agent had left
#   a running handler              Worker          it returns, its task ends elsewhere, or the deadline
#   a result                       Worker          the hub acknowledges it or no longer assigns the task here
#   a delegated task               TaskHandle      its outcome, which it asks for LATE_S after the deadline
#   a request that waits           its caller      the reply, within REQUEST_S of each session
#   progress and broadcasts        nobody          sent or dropped: they may be missed
#
# Resending, and why it is safe. A message without a reply may or may not have been read, so
# only messages that are safe to repeat are: a delegation (the hub knows its task_id and
# acknowledges it again), a result (it names its attempt: a second one is rejected and changes
# nothing), a cancellation (the task has one outcome), a question. A broadcast is not, so it fails
# with Disconnected. After each registration both sides compare what they hold. The hub lists the
# tasks that it assigns to this agent: handlers of others are cancelled, results of others dropped,
# results of these resent, and a task that the agent does not know fails with `agent_lost`. Each
# TaskHandle asks for its task's state: a hub that restarted without a journal does not know it, and
# the handle submits it again if it has a retry left, which this uses up.
#
# Threads. Everything runs on the loop that the agent was started on, except handlers that are plain
# functions: each runs in a daemon thread, at most `max_tasks` at once. From such a thread only
# `Task.progress`, `Task.run`, `Task.cancelled` and `Task.remaining_s` may be used.
# ============================================================================================

log_agent = logging.getLogger("agenthub.agent")

REPLY_S = 10.0  # For the hub to answer a registration.
REQUEST_S = 60.0  # For it to answer anything else, which may wait for a slow disk.
LATE_REGISTRATION_S = 120.0  # How long the hub may still receive a registration that was given up.
LEAVING_S = 2.0  # For the hub to acknowledge that an agent leaves, and for handlers to clean up.
LATE_S = 5.0  # After a task's deadline, for its outcome to arrive.
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 30.0
BACKOFF_RETURN_S = 6.0  # The limit while a hub that was there is expected back,
RETURN_MIN_S, RETURN_MAX_S = 120.0, 3600.0  # which is for as long as it was there, within these limits.
DRAIN_S = 4.0  # For running tasks to end when an agent is asked to stop. Containers are killed after 10 s.
HEARTBEAT_MIN_S, HEARTBEAT_MAX_S = 0.01, TTL_MAX_S  # Limits to the interval that the hub asks for.
TASKS_OVER = 100  # A worker holds up to twice its max_tasks, for tasks that have just ended still count, and so many.
LATE_CODES = (Code.TASK_OVER, Code.NOT_ASSIGNED, Code.STALE_ATTEMPT)  # The task ended meanwhile: nobody's mistake.
REASON_MAX = 4096  # Characters of the reason of a cancellation.
LEAVES_MAX = 5  # Exceptions of a group that the requester is told.
UPDATES_MAX = 1000  # Progress reports, and broadcasts, kept for a slow consumer; then the oldest are dropped.

Function = TypeVar("Function", bound=Callable[..., Any])
Reply = TypeVar("Reply")


class Session:
    """One connection to the hub: sends requests, and matches each reply to its request by id.

    Does not reconnect. `close_info` resolves to (code, reason) when the connection is closed, `released` is set when
    nobody uses the session any more.
    """

    def __init__(self, on_message: Callable[[HubMessage], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self.close_info: asyncio.Future[tuple[int, str]] = self._loop.create_future()
        self.released = asyncio.Event()
        self.agent_id: str | None = None  # None until the hub has registered it.
        self.heartbeat_s = 30.0
        self.message_bytes_max = MESSAGE_BYTES_MAX
        self.last_received = 0.0
        self._on_message = on_message
        self._pending: dict[str, Callable[[HubMessage | AgentHubError], None]] = {}  # By the request's id.
        self._ids = itertools.count(1)
        self._link: Link | None = None
        self._timers = Timers()  # For replies that do not come.

    @classmethod
    async def open(cls, connector: Connector, on_message: Callable[[HubMessage], None]) -> Session:
        """Connect. Raises Disconnected if there is no hub."""
        session = cls(on_message)
        session._link = await connector(session)
        return session

    def apply(self, registered: Registered) -> None:
        """Take over what the hub says in its reply to the registration."""
        self.agent_id = registered.agent_id
        self.heartbeat_s = min(max(HEARTBEAT_MIN_S, registered.heartbeat_s), HEARTBEAT_MAX_S)
        self.message_bytes_max = registered.max_bytes
        if registered.max_bytes > CLIENT_MESSAGE_BYTES_MAX:
            limits = (registered.max_bytes, CLIENT_MESSAGE_BYTES_MAX)
            log_agent.warning("the hub allows messages of %d bytes; this agent accepts at most %d", *limits)

    def encode(self, message: AgentMessage) -> bytes:
        """Return a message as it goes over the wire; from any thread.

        Raises Refused(too_large) if the hub would not pass it on, ValueError if it is not JSON.
        """
        raw = encode(message)
        if len(raw) + envelope_bytes(self.message_bytes_max) > self.message_bytes_max:
            text = f"a message of {len(raw)} bytes is too large for the hub's limit of {self.message_bytes_max}"
            raise Refused(text, code=Code.TOO_LARGE, task_id=getattr(message, "task_id", None))
        return raw

    def send_nowait(self, raw: bytes) -> None:
        """Send a message that may be missed: drop it if the session is closed or its buffer is full."""
        if self._link is not None and self._link.writable.is_set():
            self._link.send(raw)

    def send_request(self, message: AgentMessage, on_reply: Callable[[HubMessage | AgentHubError], None]) -> None:
        """Send; `on_reply` gets the reply before any message behind it, or Disconnected. Raises as `encode` does."""
        message.id = str(next(self._ids))
        raw = self.encode(message)
        if self._link is None or self.close_info.done():
            on_reply(Disconnected("the connection to the hub was lost"))
        else:
            self._pending[message.id] = on_reply
            self._link.send(raw)

    async def request(
        self,
        message: AgentMessage,
        reply_type: type[Reply],
        on_reply: Callable[[Reply], None] | None = None,
        within_s: float | None = REQUEST_S,
        until: float = math.inf,
    ) -> Reply:
        """Return the hub's reply; `on_reply` sees it before any message behind it. Waits while the buffer is full.

        Raises Refused if the hub refuses, Disconnected if the connection is lost before it replies. A hub that has not
        replied after `within_s` seconds (None: no limit) counts as lost: the connection is aborted. Raises TimeoutError
        when the loop's clock reaches `until`, and then leaves the connection as it is.
        """
        replied: asyncio.Future[HubMessage | AgentHubError] = self._loop.create_future()

        def resolve(reply: HubMessage | AgentHubError) -> None:
            if on_reply is not None and isinstance(reply, reply_type):
                on_reply(reply)
            if not replied.done():
                replied.set_result(reply)

        on_timeout = self._set_timeout(replied, within_s, until)
        try:
            if self._link is not None and not self._link.writable.is_set():
                await done_or_set(replied, self._link.writable)
            if not replied.done():
                self.send_request(message, resolve)
            return expect_reply(await replied, reply_type)
        finally:
            self._timers.cancel(on_timeout)

    def _set_timeout(
        self, replied: asyncio.Future[HubMessage | AgentHubError], within_s: float | None, until: float
    ) -> Callable[[], None]:
        """Set the earlier of a request's two timeouts, that of the hub and that of the caller; return its function."""
        lost_at = math.inf if within_s is None else self._loop.time() + within_s
        on_timeout = functools.partial(self._on_timeout, replied, within_s if lost_at <= until else None)
        given_up_at = min(lost_at, until)
        if given_up_at < math.inf:
            self._timers.set(on_timeout, given_up_at)
        return on_timeout

    def _on_timeout(self, replied: asyncio.Future[HubMessage | AgentHubError], within_s: float | None) -> None:
        """Fail a request because the hub did not reply within `within_s` seconds, or (None) its caller gave it up."""
        if replied.done():
            return
        if within_s is None:
            replied.set_exception(TimeoutError())
        else:
            replied.set_exception(Disconnected(f"the hub did not answer within {within_s:g} s"))
            self.abort()

    def abort(self) -> None:
        """Cut a connection that is of no more use, without a close handshake."""
        if self._link is not None:
            self._link.abort()

    async def close(self) -> None:
        """Close, and return when nothing is left of the connection."""
        if self._link is not None:
            self._link.close(CloseCode.DONE)
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CLOSING_S):
                        await self._link.gone.wait()
            finally:
                self._link.abort()

    # As the owner of its link.

    def opened(self, link: Link) -> None:
        self.last_received = self._loop.time()

    def received(self, link: Link, message: Any, message_bytes: int) -> None:
        self.last_received = self._loop.time()
        on_reply = self._pending.pop(getattr(message, "reply_to", None) or "", None)
        if on_reply is not None:
            on_reply(message)
        elif isinstance(message, InvalidMessage):
            log_agent.warning("invalid message from the hub: %s", escape_unprintable(message.message))
        else:
            self._on_message(message)

    def closed(self, link: Link, code: int, reason: str) -> None:
        self._timers.clear()
        if not self.close_info.done():
            self.close_info.set_result((code, reason))
        pending, self._pending = self._pending, {}
        for on_reply in pending.values():
            on_reply(Disconnected(f"the connection to the hub was lost: {code} {reason}", close_code=code))


def expect_reply(reply: HubMessage | AgentHubError, reply_type: type[Reply]) -> Reply:
    """Return a reply of the expected type. Raises Refused for an error, Disconnected if there was no reply."""
    if isinstance(reply, reply_type):
        return reply
    if isinstance(reply, Error):
        raise Refused(reply.message, code=reply.code, task_id=reply.task_id)
    if isinstance(reply, AgentHubError):
        raise reply
    raise InvalidMessage(f"the hub replied with {reply.type}")


class Backoff:
    """How long to wait before the next attempt: a random time up to a limit that doubles from 0.5 s to 30 s.

    A hub that was there is expected back soon: until then the limit is 6 s. Starts over only after a connection that
    lasted longer than the present limit; otherwise agents would storm a hub that accepts their connections and drops
    them.
    """

    def __init__(self) -> None:
        self._limit_s = BACKOFF_FIRST_S
        self._expected_s = 0.0  # How much longer the hub is expected back soon.

    def next_s(self) -> float:
        """Return how many seconds to wait, and double the limit."""
        delay_s = random.uniform(0, self._limit_s)
        self._expected_s -= delay_s
        limit_max_s = min(BACKOFF_RETURN_S, BACKOFF_MAX_S) if self._expected_s > 0 else BACKOFF_MAX_S
        self._limit_s = min(2 * self._limit_s, limit_max_s)
        return delay_s

    def lasted(self, connection_s: float) -> None:
        """Start over after a connection of so many seconds, if that was long enough."""
        if connection_s > self._limit_s:
            self._limit_s = BACKOFF_FIRST_S
            self._expected_s = min(max(RETURN_MIN_S, connection_s), RETURN_MAX_S)


Follower = Callable[[StatusReply | TaskOutcome | Registered | AgentHubError], None]


class HubConnection:
    """The connection of an agent over all its sessions, from the agent's start to its stop.

    `session` is the present one, None while there is none. `followers` are called with what concerns their task: its
    progress, its outcome, the reply to a new registration, or the error after which there will be no connection.
    `ended` is the connection loop: done, with an error, when another attempt would be pointless. `on_registered`
    returns whether the agent accepts the session.
    """

    def __init__(
        self,
        connector: Connector,
        *,
        registration: Callable[[], Register],
        on_registered: Callable[[Register, Registered], bool],
        on_message: Callable[[HubMessage], None],
        give_up_after_s: float | None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.session: Session | None = None
        self.timers = Timers()  # For the deadlines of tasks, those that run here and those that others run.
        self.followers: dict[str, Follower] = {}  # By task_id.
        self.last_failure = ""  # Of an attempt to connect.
        self.failure: Exception | None = None  # What made another attempt pointless.
        self.is_leaving = False
        self.is_closed = False
        self._connector = connector
        self._registration = registration
        self._on_registered = on_registered
        self._on_message = on_message
        self._give_up_after_s = give_up_after_s
        self._next_session: asyncio.Future[Session] = self._loop.create_future()
        self._retry_now = asyncio.Event()
        self._late_until = 0.0  # A registration that was given up may reach the hub until then.
        self._background: set[asyncio.Task[Any]] = set()
        self.ended = asyncio.create_task(self._connection_loop())

    async def wait(self) -> Session:
        """Return the session, waiting for one. Raises what ended the connection for good."""
        if self.session is not None:
            return self.session
        return await asyncio.shield(self._next_session)

    def retry_now(self) -> None:
        """Cut the present pause short: make the next attempt to connect at once."""
        if self.session is None:
            self._retry_now.set()

    async def request(
        self,
        message: AgentMessage,
        reply_type: type[Reply],
        within_s: float | None = REQUEST_S,
        until: float = math.inf,
    ) -> Reply:
        """Return the hub's reply to a message that is safe to repeat: resend it after a lost connection.

        Raises Refused if the hub refuses, TimeoutError when the loop's clock reaches `until`, or what ended the
        connection for good.
        """
        while True:
            session = self.session
            if session is None:
                async with self._timeout_at(until):
                    session = await self.wait()
            try:
                return await session.request(message, reply_type, within_s=within_s, until=until)
            except Disconnected:
                async with self._timeout_at(until):
                    await session.released.wait()

    def spawn(self, coroutine: typing.Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine in the background until the connection is closed."""
        task = asyncio.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        if self.is_closed:
            task.cancel()
        return task

    async def close(self) -> None:
        """Close the session, cancel what runs in the background, and fail whatever waits."""
        self.is_closed = True
        await cancel_and_wait([*self._background, self.ended])
        if self.session is not None:
            await self._release(self.session)
        self._fail(Disconnected("this agent was stopped"))
        self.timers.clear()
        await asyncio.sleep(0)  # A transport that was aborted is closed in the next step of the loop.

    @staticmethod
    def _timeout_at(until: float) -> asyncio.Timeout:
        return asyncio.timeout_at(until if until < math.inf else None)

    async def _connection_loop(self) -> None:
        """Connect again after each lost session. Ends with the error that makes another attempt pointless."""
        backoff = Backoff()
        last_online = self._loop.time()
        try:
            while True:
                registered_at = None
                try:
                    session = await self._connect()
                    self._retry_now.clear()
                    registered_at = self._loop.time()
                    await self._heartbeat_loop(session)
                except Disconnected as error:
                    if registered_at is not None:
                        last_online = self._loop.time()
                        backoff.lasted(last_online - registered_at)
                    self._give_up_if_due(error, self._loop.time() - last_online)
                    await self._pause(error, backoff.next_s())
        except (AgentHubError, ValueError) as error:
            self.failure = error
            self._fail(error)
            raise

    async def _connect(self) -> Session:
        """Open a session and register on it."""
        session = await Session.open(self._connector, self._receive)
        try:
            registration = self._registration()
            adopt = functools.partial(self._adopt, session, registration)
            await session.request(registration, Registered, on_reply=adopt, within_s=REPLY_S)
        except Refused as refusal:
            if refusal.code in (Code.OVERLOADED, Code.INTERNAL):  # These pass.
                raise Disconnected(f"the hub rejected the registration: {refusal.message}") from refusal
            raise
        finally:
            if self.session is not session:
                self._late_until = self._loop.time() + LATE_REGISTRATION_S
                await session.close()
        return session

    def _adopt(self, session: Session, registration: Register, registered: Registered) -> None:
        """Use a session from now on, before any message behind the reply to its registration is handled."""
        session.apply(registered)
        self.session = session
        if not self._on_registered(registration, registered):
            session.abort()
            return
        self._tell_followers(registered)
        if not self._next_session.done():
            self._next_session.set_result(session)

    def _receive(self, message: HubMessage) -> None:
        """Pass progress and an outcome to the task's follower, everything else to the agent."""
        if isinstance(message, TaskOutcome) or (isinstance(message, StatusReply) and message.seq is not None):
            follower = self.followers.get(message.task_id or "")
            if follower is not None:
                follower(message)
        else:
            self._on_message(message)

    def _tell_followers(self, news: Registered | AgentHubError) -> None:
        for follower in list(self.followers.values()):
            follower(news)

    async def _heartbeat_loop(self, session: Session) -> None:
        """Keep a session alive until it is lost. Raises Disconnected, with the close code."""
        try:
            while not session.close_info.done():
                session.send_request(Heartbeat(), _ignore)
                await asyncio.wait({session.close_info}, timeout=session.heartbeat_s)
                if self._loop.time() - session.last_received > 3 * session.heartbeat_s:
                    raise Disconnected("the hub has been silent for three heartbeat intervals")
            code, reason = session.close_info.result()
            raise Disconnected(f"the hub closed the connection: {code} {reason}".rstrip(), close_code=code)
        finally:
            await self._release(session)

    async def _release(self, session: Session) -> None:
        """Close a session that is lost or no longer wanted, and let its requests go to the next one."""
        self.session = None
        if self._next_session.done():
            self._next_session = self._loop.create_future()
        session.released.set()
        await session.close()

    async def _pause(self, error: Disconnected, delay_s: float) -> None:
        self.last_failure = error.message
        is_expected = self.is_leaving and error.close_code == CloseCode.DONE
        level = logging.DEBUG if is_expected else logging.WARNING
        log_agent.log(level, "%s; next attempt in %.1f s", escape_unprintable(error.message), delay_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._retry_now.wait()
        self._retry_now.clear()

    def _give_up_if_due(self, error: Disconnected, offline_s: float) -> None:
        # The agent may have replaced itself: the hub may have received late a registration that was given up.
        was_itself = self._loop.time() < self._late_until
        if error.close_code == CloseCode.NOT_ALLOWED or (error.close_code == CloseCode.REPLACED and not was_itself):
            raise error
        if self._give_up_after_s is not None and offline_s >= self._give_up_after_s:
            raise error

    def _fail(self, error: Exception) -> None:
        """Tell all that wait for a connection that there will be none."""
        if self._next_session.done():
            self._next_session = self._loop.create_future()
        self._next_session.set_exception(error)
        self._next_session.exception()  # Marks it as retrieved: perhaps nobody waits.
        self._tell_followers(Disconnected(str(error)))
        self.followers.clear()


@dataclass(frozen=True, slots=True)
class HandlerOptions:
    """The arguments of the decorators `capability` and `on_broadcast`; None: derived from the function."""

    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    output_schema: dict[str, Any] | None = None
    is_broadcast: bool = False


@dataclass(frozen=True, slots=True)
class HandlerSignature:
    """How a task's input becomes a handler's keyword arguments."""

    schema: dict[str, Any] | None  # Of an input; None if the function takes nothing but the Task.
    validate: Validator | None  # Of an input, likewise.
    task_parameter: str | None  # Takes the Task.
    sole_parameter: str | None  # Takes an input that is not an object: the only parameter, or the only required one.
    optional: frozenset[str] = frozenset()  # Have a default.

    @classmethod
    def of(cls, function: Callable[..., Any], hints: dict[str, Any]) -> HandlerSignature:
        """Read a function's signature. Raises ValueError if a task's input cannot become its keyword arguments."""
        task_parameter = None
        properties: dict[str, Any] = {}
        fields: list[tuple[str, Validator, bool]] = []
        is_open = False
        bound = function.keywords if isinstance(function, functools.partial) else {}  # Not for a requester to see.
        for parameter in inspect.signature(function).parameters.values():
            annotation = hints.get(parameter.name, Any)
            if parameter.name in bound:
                continue
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                text = f"a handler is called with keyword arguments, so {parameter} must be a keyword parameter"
                raise ValueError(f"{name_of(function)}: {text}")
            if parameter.kind is parameter.VAR_KEYWORD:
                is_open = True
            elif is_task(annotation):
                task_parameter = parameter.name
            else:
                try:
                    if parameter.default is None and not isinstance(annotation, str):
                        annotation = annotation | None  # As in `limit: int = None`.
                    properties[parameter.name] = parameter_schema(parameter, annotation)
                    validate = validator_for(annotation, validator_of_class, validate_whole)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{name_of(function)}: {parameter.name}: {error}") from None
                fields.append((parameter.name, validate, parameter.default is parameter.empty))
        if task_parameter is not None and not properties and not is_open:
            return cls(None, None, task_parameter, None)  # It reads the input from the task.
        required = [name for name, _, is_required in fields if is_required]
        schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": is_open}
        candidates = required or list(properties)
        sole_parameter = candidates[0] if len(candidates) == 1 else None
        optional = frozenset(properties) - frozenset(required)
        return cls(schema, object_validator(dict, fields, is_open=is_open), task_parameter, sole_parameter, optional)

    def arguments(self, task: Task) -> dict[str, Any]:
        """Return the keyword arguments for a task. Raises TaskFailed(invalid_input), which names the argument."""
        given: Any = {}
        if self.validate is not None:
            given = task.input
            if given is None:
                given = {}
            elif not isinstance(given, dict) and self.sole_parameter is not None:
                given = {self.sole_parameter: given}
            if isinstance(given, dict):  # Null means missing, where there is a default.
                given = {key: one for key, one in given.items() if one is not None or key not in self.optional}
            try:
                self.validate(given)
            except ValidationError as error:
                raise TaskFailed(str(error.within("input")), code=Code.INVALID_INPUT) from None
        return given if self.task_parameter is None else {**given, self.task_parameter: task}


@dataclass(frozen=True, slots=True)
class Handler:
    """The function that does the tasks of one capability."""

    function: Callable[..., Any]
    capability: Capability
    signature: HandlerSignature
    is_async: bool

    @classmethod
    def of(cls, function: Callable[..., Any], options: HandlerOptions) -> Handler:
        """Make a function a handler. Raises ValueError if its signature, or what the options say, does not allow it."""
        inner = inner_function(function)
        if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
            text = "a generator cannot be a handler; return all of its items, and report steps by task.progress()"
            raise ValueError(f"{name_of(function)}: {text}")
        hints = hints_of(inner)
        signature = HandlerSignature.of(function, hints)
        for given in (options.input_schema, options.output_schema):
            if given is not None and not isinstance(check_json(given), dict):
                raise ValueError(f"{name_of(function)}: a schema must be a JSON object")
        description = options.description or (inspect.getdoc(inner) or "").partition("\n")[0]
        capability = Capability(
            check_text("a capability's name", options.name or name_of(function), VISIBLE_PATTERN),
            description[:4096],
            signature.schema if options.input_schema is None else options.input_schema,
            schema_of(hints.get("return")) or None if options.output_schema is None else options.output_schema,
        )
        return cls(function, capability, signature, is_async(function))


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function; of a partial, that of its function; of another object, that of its class."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return getattr(function, "__name__", None) or type(function).__name__


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether a function, or an object that can be called, is declared with `async def`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def inner_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function within decorators, partials and objects that can be called: it has the annotations."""
    while not hasattr(function := inspect.unwrap(function), "__code__"):
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(type(function).__call__, "__code__"):
            function = type(function).__call__
        else:
            break
    return function


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function's annotations, evaluated; those that cannot be evaluated as strings."""
    try:
        return typing.get_type_hints(function)
    except Exception:
        pass  # A name that is imported for type checkers only; below, the others are evaluated one by one.
    hints = {}
    scope = getattr(function, "__globals__", {})
    for name, annotation in inspect.get_annotations(function).items():
        try:
            hints[name] = eval(annotation, scope) if isinstance(annotation, str) else annotation
        except Exception:
            log_agent.debug("an annotation cannot be evaluated: %s", name, exc_info=True)
            hints[name] = annotation
    return hints


TASK_ANNOTATION = re.compile(r"\W*(?:(?:\w+\.)*(?:Optional|Task|None)\b\W*)*")


def is_task(annotation: Any) -> bool:
    """Return whether a parameter takes the Task: `Task`, `Task | None`, or the text of these."""
    if isinstance(annotation, str):
        return "Task" in annotation and TASK_ANNOTATION.fullmatch(annotation) is not None
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return annotation is Task or (is_union and Task in typing.get_args(annotation))


def validator_of_class(kind: Any) -> Validator:
    """Return the validator of a type that JSON does not have: the type of some JSON values, as Sequence, or of none."""
    if isinstance(kind, str):
        raise ValueError(f"its annotation {kind!r} cannot be evaluated; import the name also at run time")
    is_of_json = not isinstance(kind, type) or typing.is_typeddict(kind) or getattr(kind, "_is_protocol", False)
    if not is_of_json and not any(issubclass(one, kind) for one in JSON_TYPES):
        raise ValueError(f"{kind.__qualname__} is not JSON; take what JSON has, and convert it in the handler")
    return accept


def parameter_schema(parameter: inspect.Parameter, annotation: Any) -> dict[str, Any]:
    """Return the JSON Schema of a parameter, with its default."""
    schema = schema_of(annotation)
    if parameter.default is not parameter.empty:
        try:
            json.dumps(check_json(parameter.default))
        except (ValueError, TypeError):
            return schema  # A default that is not JSON stays with the function: the schema only omits it.
        schema["default"] = parameter.default
    return schema


class CapabilityDecorator:
    """Make a function the handler of a capability: `@capability`, or `@capability("name", description=...)`.

    The capability is named like the function by default. The function may be async, or plain: then it runs in a
    thread. An object as input becomes its keyword arguments, checked against its annotations. The JSON Schemas come
    from the annotations too; `input_schema` and `output_schema` are announced instead of these, but inputs are still
    checked against the annotations. A method of an Agent's subclass takes the module's `capability`, any other function
    that of its agent, which raises ValueError if the capability has a handler already.
    """

    def __init__(self, register: Callable[[Callable[..., Any], HandlerOptions], None]) -> None:
        self._register = register

    @typing.overload
    def __call__(self, name: Function) -> Function: ...
    @typing.overload
    def __call__(
        self,
        name: str | None = None,
        *,
        description: str | None = None,
        input_schema: dict[str, Any] | None = None,
        output_schema: dict[str, Any] | None = None,
    ) -> Callable[[Function], Function]: ...
    def __call__(
        self,
        name: str | Callable[..., Any] | None = None,
        *,
        description: str | None = None,
        input_schema: dict[str, Any] | None = None,
        output_schema: dict[str, Any] | None = None,
    ) -> Any:
        given_name = name if isinstance(name, str) else None
        options = HandlerOptions(given_name, description, input_schema, output_schema)

        def decorate(function: Function) -> Function:
            self._register(function, options)
            return function

        return decorate if name is None or isinstance(name, str) else decorate(name)  # A classmethod is not callable.


def mark_handler(function: Callable[..., Any], options: HandlerOptions) -> None:
    """Record on a method how it is to be registered: an Agent looks for these marks when it is made."""
    function.__agenthub__ = options  # type: ignore[attr-defined]  # functions take attributes


capability = CapabilityDecorator(mark_handler)


def on_broadcast(function: Function) -> Function:
    """Make a method of an Agent's subclass the one that takes broadcasts: `(message, sender)`."""
    mark_handler(function, HandlerOptions(is_broadcast=True))
    return function


class HandlerRegistry:
    """The functions of an agent: one handler for each capability, and one function for broadcasts."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}  # By capability.
        self.on_broadcast: Callable[[Any, str], Any] | None = None

    def add(self, function: Callable[..., Any], options: HandlerOptions) -> None:
        """Register a function. Raises ValueError if its capability has a handler already."""
        if options.is_broadcast:
            self.on_broadcast = function
            return
        handler = Handler.of(function, options)
        name = handler.capability.name
        former = self.handlers.get(name)
        if former is not None and not is_redefinition(former.function, function):
            raise ValueError(f"{name}: this capability already has a handler; give one of them another name")
        self.handlers[name] = handler

    def handler_for(self, capability: str | None) -> Handler:
        """Return the handler of a capability; of None, the only one there is. Raises TaskFailed(no_handler)."""
        if capability is None and len(self.handlers) == 1:
            return next(iter(self.handlers.values()))
        handler = self.handlers.get(capability or "")
        if handler is None:
            offered = ", ".join(self.handlers) or "no capability"
            raise TaskFailed(f"this agent offers {offered}; name one of them", code=Code.NO_HANDLER)
        return handler


def is_redefinition(former: Callable[..., Any], function: Callable[..., Any]) -> bool:
    """Return whether a function is defined in the place of another, as when the cell of a notebook runs again."""
    places = [(one.__module__, getattr(one, "__qualname__", "<lambda>")) for one in (former, function)]
    return places[0] == places[1] and not places[0][1].endswith("<lambda>")


class Execution:
    """One attempt at a task by a handler of this agent."""

    __slots__ = ("_work", "attempt", "capability", "is_stopped", "task_id")

    def __init__(self, message: Delegated) -> None:
        self.task_id = message.task_id
        self.attempt = message.attempt
        self.capability = message.capability
        self.is_stopped = False  # The task has ended without the handler, so its result is not wanted.
        self._work: asyncio.Task[None] | None = None

    def start(self, coroutine: typing.Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run the handler."""
        self._work = asyncio.create_task(coroutine)
        return self._work

    def is_running_in(self, work: set[asyncio.Task[None]]) -> bool:
        """Return whether the handler runs in one of these."""
        return self._work in work

    def stop(self) -> None:
        """Cancel the handler. Only once, so that its cleaning up is not interrupted."""
        if not self.is_stopped:
            self.is_stopped = True
            # A handler that stops its own agent goes on.
            if self._work is not None and self._work is not asyncio.current_task():
                self._work.cancel()


class Task:
    """A task, as its handler sees it. A handler with an argument `task: Task` is given it.

    `requester` is the agent_id of the agent that delegated it; `attempt` counts its deliveries from 1; `deadline` is in
    seconds of the event loop's clock.
    """

    task_id: str
    requester: str
    capability: str | None
    attempt: int
    priority: int
    parent_id: str | None
    deadline: float

    def __init__(self, agent: Agent, connection: HubConnection, execution: Execution, message: Delegated) -> None:
        self.task_id = message.task_id
        self.requester = message.sender
        self.capability = message.capability
        self.attempt = message.attempt
        self.priority = message.priority
        self.parent_id = message.parent_id
        self._payload = message.input
        self._agent = agent
        self._connection = connection
        self._execution = execution
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self.deadline = self._loop.time() + message.ttl

    @functools.cached_property
    def input(self) -> Any:
        """The input of the task: any JSON."""
        return value_of(self._payload)

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline; 0 when it has passed."""
        return max(0.0, self.deadline - self._loop.time())

    @property
    def cancelled(self) -> bool:
        """Whether the task has ended without this handler: a plain function should check it, and return."""
        return self._execution.is_stopped

    def progress(self, progress: float | None = None, detail: Any = None) -> None:
        """Report progress to the requester: a number from 0 to 1, and any JSON. From any thread.

        Raises ValueError if it is neither, Refused if it is too large. Dropped while there is no connection.
        """
        if progress is not None and not 0 <= progress <= 1:
            raise ValueError("progress must be from 0 to 1")
        session = self._connection.session
        report = Status(task_id=self.task_id, progress=progress, detail=payload_of(detail))
        if session is None or self.cancelled:
            encode(report)  # Raises ValueError here too: whether a report is valid must not depend on the connection.
            return
        raw = session.encode(report)
        if threading.get_ident() == self._thread:
            session.send_nowait(raw)
        else:
            self._loop.call_soon_threadsafe(session.send_nowait, raw)

    async def delegate(self, capability: str | None = None, input: Any = None, **options: Any) -> Any:
        """Delegate a subtask, as `Agent.delegate` does; it ends with this task at the latest."""
        return await self._agent.delegate(capability, input, parent_id=self.task_id, **options)

    async def submit(self, capability: str | None = None, input: Any = None, **options: Any) -> TaskHandle:
        """Submit a subtask, as `Agent.submit` does; it ends with this task at the latest."""
        return await self._agent.submit(capability, input, parent_id=self.task_id, **options)

    def run(self, awaitable: typing.Coroutine[Any, Any, Reply]) -> Reply:
        """Run a coroutine on the agent's loop and wait for it, from a plain handler: `task.run(task.delegate(...))`."""
        if threading.get_ident() == self._thread:
            awaitable.close()
            raise RuntimeError("an async handler must use await instead of task.run")
        return asyncio.run_coroutine_threadsafe(awaitable, self._loop).result()


class DaemonThreads:
    """Runs plain functions, each in a thread of its own, so many at once.

    A thread cannot be stopped: one that ignores its task's end keeps its slot. They are daemons, so that a function
    that hangs does not keep the process alive.
    """

    def __init__(self, name: str, threads_max: int) -> None:
        self._name = name
        self._slots = asyncio.Semaphore(threads_max)

    async def run(self, function: Callable[[], Any]) -> Any:
        """Return what the function returns, or raise what it raises."""
        await self._slots.acquire()
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[Any] = loop.create_future()
        context = contextvars.copy_context()

        def work() -> None:
            output: Any = None
            error: BaseException | None = None
            try:
                output = context.run(function)
            except StopIteration as stop:  # A future does not accept this one.
                error = RuntimeError(f"the handler raised {stop!r}")
            except BaseException as raised:
                error = raised
            with contextlib.suppress(RuntimeError):  # The loop was closed while the function ran.
                loop.call_soon_threadsafe(self._finish, finished, output, error)

        threading.Thread(target=work, name=self._name, daemon=True).start()
        return await finished

    def _finish(self, finished: asyncio.Future[Any], output: Any, error: BaseException | None) -> None:
        self._slots.release()
        if finished.done():  # It was cancelled meanwhile.
            return
        if error is None:
            finished.set_result(output)
        else:
            finished.set_exception(error)


class Worker:
    """What others delegated to an agent, from the agent's start to its stop.

    Owns the running handlers, their threads, the results that the hub has not acknowledged yet, and the broadcasts
    that wait for their handler.
    """

    def __init__(self, agent: Agent, connection: HubConnection, functions: HandlerRegistry) -> None:
        self._agent = agent
        self._connection = connection
        self._functions = functions
        self._threads = DaemonThreads(f"{agent.name}-handler", agent.max_tasks)
        self._running: dict[str, Execution] = {}  # By task_id: the latest attempt.
        self._work: set[asyncio.Task[None]] = set()  # Of these, and of older attempts that still clean up.
        self._results: dict[str, Result] = {}  # By task_id, until the hub has acknowledged them.
        self._broadcasts: collections.deque[BroadcastReply] = collections.deque(maxlen=UPDATES_MAX)
        self._broadcasting: asyncio.Task[None] | None = None

    @property
    def running(self) -> int:
        """How many tasks run."""
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and the hub has all results."""
        return not (self._running or self._results)

    @property
    def _held_max(self) -> int:
        return 2 * self._agent.max_tasks + TASKS_OVER

    def reconcile(self, tasks: list[TaskRef]) -> bool:
        """Keep only what the hub assigns to this agent too, after a registration.

        Cancel the other handlers, resend the results that the hub still waits for, and fail the tasks that are
        not known here. Return whether these are tasks that this agent can hold.
        """
        if len(tasks) > self._held_max:
            self._log_too_many()
            return False
        assigned = {ref.task_id: ref.attempt for ref in tasks}
        for execution in self._running.values():
            if assigned.get(execution.task_id) != execution.attempt:
                execution.stop()
        for result in list(self._results.values()):
            if assigned.get(result.task_id) == result.attempt:
                self._send(result)
            else:
                del self._results[result.task_id]
        for task_id, attempt in assigned.items():
            running = self._running.get(task_id)
            if (running is None or running.attempt != attempt) and task_id not in self._results:
                error = ErrorInfo(Code.AGENT_LOST, "the agent does not have this task")
                self._send(Result(task_id=task_id, success=False, error=error, attempt=attempt))
        return True

    def receive(self, message: Delegated) -> None:
        """Start the handler of a task; not a second time for the same attempt."""
        former = self._running.get(message.task_id)
        if former is not None:
            if former.attempt == message.attempt:
                return
            former.stop()
        elif len(self._running) + len(self._results) >= self._held_max and self._connection.session is not None:
            self._log_too_many()
            self._connection.session.abort()
            return
        execution = self._running[message.task_id] = Execution(message)
        task = Task(self._agent, self._connection, execution, message)
        self._connection.timers.set(execution.stop, task.deadline)
        work = execution.start(self._run(task))
        self._work.add(work)
        work.add_done_callback(functools.partial(self._on_finished, execution))

    def task_ended(self, task_id: str) -> None:
        """Cancel the handler of a task that has ended without it."""
        if task_id in self._running:
            self._running[task_id].stop()

    async def stop(self) -> None:
        """Cancel the running handlers, and again after LEAVING_S seconds; log those that do not end even then."""
        for execution in self._running.values():
            execution.stop()
        work = self._work - {asyncio.current_task()}
        for within_s in (LEAVING_S, LEAVING_S / 2):
            if work:
                _, work = await asyncio.wait(work, timeout=within_s)
            for one in work:
                one.cancel()
        if work:
            log_agent.error("handlers ignore that they are cancelled, and are left behind: %s", self._names_of(work))

    def _names_of(self, work: set[asyncio.Task[None]]) -> str:
        left = [one for one in self._running.values() if one.is_running_in(work)]
        return escape_unprintable(", ".join(f"{one.capability} task={one.task_id}" for one in left[:LEAVES_MAX]))

    def _log_too_many(self) -> None:
        agent_id = escape_unprintable(self._agent.agent_id or "")
        log_agent.error("the hub assigns more tasks than max_tasks allows: disconnecting agent=%s", agent_id)

    def _on_finished(self, execution: Execution, work: asyncio.Task[None]) -> None:
        self._work.discard(work)
        self._connection.timers.cancel(execution.stop)
        if self._running.get(execution.task_id) is execution:
            del self._running[execution.task_id]

    async def _run(self, task: Task) -> None:
        """Do a task and send its result; none if the task has ended meanwhile."""
        result = Result(task_id=task.task_id, success=False, attempt=task.attempt)
        try:
            result.output = output_payload(await self._call(task))
            result.success = True
        except BaseException as error:  # A handler that exits, panics or cancels itself fails like any other.
            if is_of_the_loop(error):
                if not task.cancelled:
                    raise
            else:
                result.error = handler_error(error, task)
        if not task.cancelled:
            self._send(result)

    async def _call(self, task: Task) -> Any:
        handler = self._functions.handler_for(task.capability)
        arguments = handler.signature.arguments(task)
        return await self._await(handler.function, handler.is_async, **arguments)

    async def _await(self, function: Callable[..., Any], is_async: bool, *given: Any, **arguments: Any) -> Any:
        """Call a function, in a thread if it is a plain one, and await what it returns if that is awaitable."""
        if is_async:
            output = function(*given, **arguments)
        else:
            output = await self._threads.run(functools.partial(function, *given, **arguments))
        return await output if inspect.isawaitable(output) else output

    def _send(self, result: Result) -> None:
        """Send a result, and keep it until the hub has acknowledged it."""
        self._results[result.task_id] = result
        if self._connection.session is None:
            return  # `reconcile` sends it after the next registration.
        try:
            self._connection.session.send_request(result, functools.partial(self._on_reply, result))
        except ValueError as error:
            self._send_failure(result, ErrorInfo(Code.FAILED, f"the output cannot be encoded as JSON: {error}"))
        except Refused as refusal:
            self._send_failure(result, ErrorInfo(refusal.code, refusal.message))

    def _send_failure(self, result: Result, error: ErrorInfo) -> None:
        """Fail the task of a result that cannot be sent."""
        self._send(dataclasses.replace(result, success=False, output=None, error=error))

    def _on_reply(self, result: Result, reply: HubMessage | AgentHubError) -> None:
        if isinstance(reply, AgentHubError) or self._results.get(result.task_id) is not result:
            return
        del self._results[result.task_id]
        if isinstance(reply, Error):
            task_id, code = escape_unprintable(result.task_id), escape_unprintable(reply.code)
            log_agent.log(refusal_level(reply), "result refused task=%s code=%s", task_id, code)
            if reply.code in (Code.INVALID_MESSAGE, Code.TOO_LARGE) and result.success:
                code = reply.code if reply.code == Code.TOO_LARGE else Code.FAILED
                self._send_failure(result, ErrorInfo(code, f"the hub refused the output: {reply.message}"))

    def receive_broadcast(self, message: BroadcastReply) -> None:
        """Queue a broadcast for its handler, which takes one after the other."""
        handler = self._functions.on_broadcast
        if handler is None:
            return
        if len(self._broadcasts) == UPDATES_MAX:
            log_agent.warning("the broadcast handler is too slow: the oldest broadcast is dropped")
        self._broadcasts.append(message)
        if self._broadcasting is None or self._broadcasting.done():
            self._broadcasting = self._connection.spawn(self._handle_broadcasts(handler))

    async def _handle_broadcasts(self, handler: Callable[[Any, str], Any]) -> None:
        while self._broadcasts:
            message = self._broadcasts.popleft()
            arguments = (value_of(message.message), message.sender or "")
            try:
                await self._await(handler, is_async(handler), *arguments)
            except BaseException as error:
                if is_of_the_loop(error):
                    raise
                log_agent.exception("the broadcast handler failed")


@dataclass(frozen=True, slots=True)
class Progress:
    """One progress report: `progress` from 0 to 1 or None, `detail` any JSON, `seq` counts from 1 per task."""

    progress: float | None
    detail: Any
    seq: int


class TaskHandle:
    """A task that this agent has delegated. Iterate it (`async for`) for its progress, until its outcome.

    Submits its task until the hub accepts it, asks for its state after each new registration and when its deadline has
    passed, and submits it again to a hub that lost it.
    """

    task_id: str

    def __init__(self, connection: HubConnection, message: Delegate) -> None:
        self.task_id = message.task_id
        self._connection = connection
        self._message = message
        self._loop = asyncio.get_running_loop()
        self._is_accepted = False
        self._is_cancelled = False
        self._deadline = 0.0  # Once it is accepted.
        self._outcome: TaskOutcome | AgentHubError | None = None
        self._updates: collections.deque[Progress] | None = None  # Until there are some.
        self._news = LightEvent()  # Set for a moment when there is progress, or the outcome.

    @classmethod
    async def submit(cls, connection: HubConnection, message: Delegate, patience_s: float | None) -> TaskHandle:
        """Submit a task, and return its handle when the hub has accepted it. For `Agent.submit`, which see."""
        handle = cls(connection, message)
        if message.task_id in connection.followers:
            raise ValueError(f"{message.task_id}: this agent has an open task of that id; choose another task_id")
        connection.followers[message.task_id] = handle._on_news
        try:
            await handle._submit(patience_s)
        except BaseException as error:
            connection.followers.pop(message.task_id, None)
            if isinstance(error, asyncio.CancelledError | TaskTimeout):  # The hub may have accepted it nevertheless.
                handle.cancel_soon()
            raise
        return handle

    @property
    def done(self) -> bool:
        """Whether the task has ended."""
        return self._outcome is not None

    async def result(self, timeout_s: float | None = None) -> Any:
        """Return the task's output, waiting for it at most `timeout_s` seconds.

        Raises TaskFailed (with the hub's `code`; `hub_lost` if the hub no longer knows the task), TaskTimeout if it did
        not end within its ttl, Disconnected if the agent was stopped, TimeoutError after `timeout_s`.
        """
        if timeout_s is None:
            outcome = await self._wait()
        else:
            async with asyncio.timeout(timeout_s):
                outcome = await self._wait()
        if isinstance(outcome, AgentHubError):
            raise outcome
        if outcome.success:
            return value_of(outcome.output)
        error = outcome.error or ErrorInfo(Code.FAILED)
        if outcome.state == TaskState.TIMEOUT:
            raise TaskTimeout(error.message, task_id=self.task_id)
        raise TaskFailed(error.message, code=error.code, task_id=self.task_id)

    @property
    def outcome(self) -> TaskOutcome | None:
        """How the task ended; None while it is open, and if this agent was stopped before it had ended."""
        outcome = self._outcome
        if outcome is None or isinstance(outcome, Disconnected):
            return None
        if isinstance(outcome, TaskOutcome):
            if type(outcome.output) is bytes:
                outcome.output = value_of(outcome.output)
            return outcome
        return TaskOutcome(  # The hub has forgotten it, could not be asked, or did not accept it again.
            task_id=self.task_id,
            sender=None,
            success=False,
            state=TaskState.TIMEOUT if isinstance(outcome, TaskTimeout) else TaskState.FAILED,
            output=None,
            error=ErrorInfo(outcome.code, outcome.message),
            attempt=0,
        )

    async def cancel(self, reason: str = "") -> None:
        """Cancel the task; `result` then raises TaskFailed(cancelled). Without effect if it has ended."""
        if not self.done:
            with contextlib.suppress(Refused):  # It has just ended, and its outcome is on the way.
                await self._connection.request(self._cancellation(reason), StatusReply)

    def cancel_soon(self, reason: str = "its requester stopped waiting") -> None:
        """Cancel the task without waiting, where nothing can be awaited: in an `except CancelledError`.

        The cancellation is sent at once, or after the next registration if there is no connection.
        """
        if self.done:
            return
        cancellation = self._cancellation(reason)
        on_reply = functools.partial(self._on_cancel_reply, cancellation)
        if self._connection.session is None:
            on_reply(Disconnected("there is no connection"))
        else:
            self._connection.session.send_request(cancellation, on_reply)

    def _cancellation(self, reason: str) -> Result:
        """Record that the task is cancelled, and return the message that cancels it at the hub."""
        self._is_cancelled = True
        error = ErrorInfo(Code.CANCELLED, error_text(reason[:REASON_MAX]))
        return Result(task_id=self.task_id, success=False, error=error)

    def _on_cancel_reply(self, cancellation: Result, reply: HubMessage | AgentHubError) -> None:
        if isinstance(reply, Disconnected):
            self._connection.spawn(self._cancel_until_acknowledged(cancellation))

    async def _cancel_until_acknowledged(self, cancellation: Result) -> None:
        with contextlib.suppress(AgentHubError, TimeoutError):  # It has ended, or will at its deadline.
            await self._connection.request(cancellation, StatusReply, until=self._loop.time() + self._message.ttl)

    def __aiter__(self) -> AsyncIterator[Progress]:
        return self._follow()

    async def _wait(self) -> TaskOutcome | AgentHubError:
        while self._outcome is None:
            await self._news.wait()
        return self._outcome

    async def _follow(self) -> AsyncIterator[Progress]:
        while True:
            while self._updates:
                yield self._updates.popleft()
            if self.done:
                return
            await self._news.wait()

    # Submitting it.

    async def _submit(self, patience_s: float | None = None) -> None:
        """Send the task until the hub has accepted it; while the hub is overloaded, for `patience_s` seconds."""
        now = self._loop.time()
        last = now + self._message.ttl
        patient_until = last if patience_s is None else now + patience_s
        backoff = Backoff()
        try:
            while not await self._offer(last, patient_until):
                async with asyncio.timeout_at(last):
                    await asyncio.sleep(backoff.next_s())
                # A task that was refused has not begun, so what is left of its ttl is all that it gets.
                remaining_s = max(0.001, last - self._loop.time())
                self._message = dataclasses.replace(self._message, ttl=remaining_s)
        except TimeoutError as error:
            text = "the hub did not accept the task within its ttl; give it a longer ttl, or try again later"
            raise TaskTimeout(text, task_id=self.task_id) from error
        self._is_accepted = True
        self._deadline = self._loop.time() + self._message.ttl
        self._watch()

    async def _offer(self, last: float, patient_until: float) -> bool:
        """Send the task once; return whether the hub has accepted it, or is overloaded and may be asked again.

        Raises Refused, or TimeoutError when the loop's clock reaches `last`.
        """
        try:
            await self._connection.request(self._message, StatusReply, until=last)
            return True
        except Refused as refusal:
            now = self._loop.time()
            if refusal.code == Code.OVERLOADED and now >= last:
                raise TimeoutError from refusal
            if refusal.code != Code.OVERLOADED or now >= patient_until:
                raise
            task_id, text = escape_unprintable(self.task_id), escape_unprintable(refusal.message)
            log_agent.info("overloaded task=%s: %s", task_id, text)
            return False

    async def _resubmit(self) -> None:
        """Submit the task to a hub that has forgotten it, which uses up one of its retries."""
        if not self._is_accepted:
            return  # It is being submitted.
        self._is_accepted = False
        remaining_s = self._deadline - self._loop.time()
        if self._is_cancelled:
            self._fail("the task was cancelled", Code.CANCELLED)
        elif self._message.max_retries == 0 or self._message.parent_id is not None or remaining_s <= 0:
            self._fail("the hub no longer knows this task; delegate it again")
        else:
            retries = self._message.max_retries - 1
            self._message = dataclasses.replace(self._message, ttl=remaining_s, max_retries=retries)
            try:
                await self._submit()
            except AgentHubError as error:
                self._finish(error)

    # Learning its outcome.

    def _on_news(self, news: StatusReply | TaskOutcome | Registered | AgentHubError) -> None:
        if isinstance(news, StatusReply):
            self._on_progress(news)
        elif not isinstance(news, Registered):
            self._finish(news)
        elif self._is_accepted:
            self._connection.spawn(self._refresh())

    def _on_progress(self, report: StatusReply) -> None:
        if self._updates is None:
            self._updates = collections.deque(maxlen=UPDATES_MAX)
        self._updates.append(Progress(report.progress, report.detail, report.seq or 0))
        self._wake()

    def _finish(self, outcome: TaskOutcome | AgentHubError) -> None:
        if self._outcome is not None:
            return
        self._outcome = outcome
        self._connection.timers.cancel(self._on_overdue)
        self._connection.followers.pop(self.task_id, None)
        self._wake()

    def _fail(self, text: str, code: str = Code.HUB_LOST) -> None:
        self._finish(TaskFailed(text, code=code, task_id=self.task_id))

    def _wake(self) -> None:
        self._news.set()
        self._news.clear()

    def _watch(self) -> None:
        """Make sure that nobody waits forever for the outcome of a task whose hub is gone."""
        if not self.done:
            self._connection.timers.set(self._on_overdue, self._deadline + LATE_S)

    def _on_overdue(self) -> None:
        if self._connection.session is None:
            self._fail("the task's deadline passed without a connection to the hub")
        else:
            self._connection.spawn(self._refresh())
            self._deadline = self._loop.time()
            self._watch()

    async def _refresh(self) -> None:
        """Ask for the state of the task, and submit it again if the hub no longer knows it."""
        session = self._connection.session
        if session is None or self.done:
            return
        try:
            report = await session.request(Status(task_id=self.task_id), StatusReply)
        except Disconnected:
            return  # It asks again after the next registration.
        except Refused as refusal:
            if refusal.code == Code.UNKNOWN_TASK:
                await self._resubmit()
            else:
                self._fail(refusal.message)
            return
        if report.requester != session.agent_id:  # The hub knows the task, but no longer this agent: output is hidden.
            self._fail("the hub no longer knows that this agent delegated the task")
        elif report.state in FINAL_STATES:
            self._finish(outcome_from(report))


class Agent:
    """A program on the hub: what it offers, and its way to delegate to others.

    `hub` is a LocalHub of this process; without one, the agent connects to `url` (else AGENTHUB_URL, else
    ws://127.0.0.1:8765), authenticates with `token` (else AGENTHUB_TOKEN, else the content of the file
    AGENTHUB_TOKEN_FILE), and verifies the hub's certificate by the authorities in `ca_file` (else AGENTHUB_CA_FILE,
    else the system's). `name` is the class's by default. At most `max_tasks` tasks run at once. Without a connection
    it keeps trying, forever or for `give_up_after_s` seconds.

    Use it as `async with agent:`, or block on `agent.run()`. Raises ValueError for a bad argument, Refused if the hub
    does not accept the registration, Disconnected when it has given up or another connection has replaced it.
    """

    name: str = ""
    description: str
    url: str
    agent_id: str | None  # None until the hub has registered it.
    max_tasks: int
    metadata: dict[str, Any]
    give_up_after_s: float | None
    _worker: Worker  # Of the latest start, as is `_connection`.

    def __init__(
        self,
        name: str | None = None,
        *,
        description: str | None = None,
        url: str | None = None,
        hub: LocalHubLike | None = None,
        token: str | None = None,
        ca_file: str | None = None,
        max_tasks: int = 16,
        metadata: dict[str, Any] | None = None,
        give_up_after_s: float | None = None,
    ) -> None:
        self.name = name or type(self).name or type(self).__name__.lower()
        own_doc = type(self).__doc__ if type(self) is not Agent else None
        self.description = (
            description if description is not None else inspect.cleandoc(own_doc or "").partition("\n")[0]
        )
        self.url = check_url(url or os.environ.get("AGENTHUB_URL") or URL_DEFAULT)
        self.agent_id = None
        self.max_tasks = max_tasks
        self.metadata = metadata or {}
        self.give_up_after_s = give_up_after_s
        connect = functools.partial(connect_websocket, self.url, token=token, ca_file=ca_file)
        self._connector: Connector = hub.connect if hub is not None else connect
        self._functions = HandlerRegistry()
        self._resume: str | None = None
        self._connection: HubConnection | None = None
        for function_name in dir(type(self)):
            function = inspect.getattr_static(type(self), function_name)  # Of a static or class method, not of a call.
            options = getattr(function, "__agenthub__", None) or getattr(
                getattr(function, "__func__", None), "__agenthub__", None
            )
            if options is not None and hasattr(Agent, function_name):
                raise ValueError(
                    f"{function_name}: an Agent has a method of that name; rename yours, and give the capability its "
                    f"name by @capability({function_name!r})"
                )
            if options is not None:
                self._functions.add(getattr(self, function_name), options)
        try:
            validator_for(Metadata)(self.metadata)
        except ValidationError as error:
            raise ValueError(str(error.within("metadata"))) from None
        self._registration()  # Raises ValueError now rather than when it is sent.

    # What it offers.

    @property
    def capability(self) -> CapabilityDecorator:
        """Make a function the handler of a capability, named like the function by default. A decorator.

        It takes the arguments of CapabilityDecorator, and raises ValueError if the capability has a handler already.
        """
        return CapabilityDecorator(self._add_handler)

    def on_broadcast(self, function: Function) -> Function:
        """Make a function the handler of broadcasts, one after the other: `(message, sender)`. A decorator."""
        self._functions.on_broadcast = function
        return function

    def _add_handler(self, function: Callable[..., Any], options: HandlerOptions) -> None:
        self._functions.add(function, options)
        self._announce()

    def _announce(self) -> None:
        """Register once more if the agent is online, because what it offers has changed."""
        if self._connection is not None and self._connection.session is not None:
            self._connection.session.send_request(self._registration(), _on_announced)

    def _registration(self) -> Register:
        """Return what this agent says of itself. Raises ValueError if the limits of the protocol do not allow it."""
        if not 1 <= self.max_tasks <= 10_000:
            raise ValueError("max_tasks must be from 1 to 10000")
        check_text("name", self.name, VISIBLE_PATTERN)
        return Register(
            name=self.name,
            description=self.description[:4096],
            capabilities=[handler.capability for handler in self._functions.handlers.values()],
            max_tasks=self.max_tasks,
            metadata=self.metadata,
            agent_id=self.agent_id,
            resume=self._resume,
        )

    # From its start to its stop.

    @property
    def is_online(self) -> bool:
        """Whether the agent is registered and has a connection just now."""
        return self._connection is not None and self._connection.session is not None

    def use_hub(self, hub: LocalHubLike) -> None:
        """Connect to a hub of this process instead of the one at `url`, from the next start on."""
        self._connector = hub.connect

    def run(self, *, drain_s: float = DRAIN_S, loop: str = "auto") -> None:
        """Run until Ctrl-C or SIGTERM; then accept no new task and leave when the running ones have ended.

        `drain_s` limits that, in seconds; a second signal ends it at once. The event `loop` is uvloop's where that is
        installed; "asyncio" is the standard library's, and "uvloop" raises PackageMissing where it is not installed.
        """
        if asyncio._get_running_loop() is not None:
            raise RuntimeError(
                "an event loop runs already, as in a notebook: use `await agent.start()` instead of run()"
            )
        with contextlib.suppress(KeyboardInterrupt):
            run_loop(serve(self, drain_s=drain_s), loop)

    async def __aenter__(self) -> typing.Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Connect, and return when the hub has registered this agent. Waits for a hub that is not running yet."""
        connection = self._begin()
        try:
            await connection.wait()
        except BaseException:
            await self.stop()
            raise

    async def stop(self, drain_s: float = 0.0) -> None:
        """Leave the hub, waiting at most `drain_s` seconds for running tasks to end. Handles of open tasks fail."""
        connection = self._connection
        if connection is None or connection.is_closed:
            return
        connection.is_leaving = True
        has_left = False
        if drain_s > 0 and (connection.session is not None or not self._worker.is_idle):
            has_left = await self._deregister(connection, Deregister(drain=True), drain_s)
        if not has_left and connection.session is not None:
            await self._deregister(connection, Deregister(), LEAVING_S)
        await self._worker.stop()
        await connection.close()

    async def serve(self, stopped: asyncio.Event, drain_s: float = DRAIN_S) -> None:
        """Run until `stopped` is set, then drain; leave at once when cancelled. Raises what ends the connection."""
        connection = self._begin()
        failure: BaseException | None = None
        try:
            await done_or_set(connection.ended, stopped)
            if not connection.ended.done():
                await self.stop(drain_s)
            elif not connection.ended.cancelled():
                failure = connection.ended.exception()
        finally:
            await self.stop()
        if failure is not None:
            raise failure

    async def connected(self, within_s: float | None = None) -> None:
        """Return when there is a connection, trying to connect now rather than after the pause of the backoff.

        Raises Disconnected if there is none after `within_s` seconds (None: wait forever), or what ended the connection
        for good.
        """
        connection = self._started()
        connection.retry_now()
        try:
            async with asyncio.timeout(within_s):
                await connection.wait()
        except TimeoutError as error:
            raise Disconnected(connection.last_failure or f"no hub answers at {self.url}") from error

    def _begin(self) -> HubConnection:
        if self._connection is not None and not self._connection.is_closed:
            raise RuntimeError("this agent is already running; stop it before you start it again")
        connection = self._connection = HubConnection(
            self._connector,
            registration=self._registration,
            on_registered=self._on_registered,
            on_message=self._on_message,
            give_up_after_s=self.give_up_after_s,
        )
        self._worker = Worker(self, connection, self._functions)
        return connection

    def _started(self) -> HubConnection:
        """Return the connection. Raises Disconnected if the agent was not started, or what ended it for good."""
        if self._connection is None or self._connection.is_closed:
            failure = self._connection and self._connection.failure
            raise failure or Disconnected("this agent is not started; use `async with agent:` or `await agent.start()`")
        return self._connection

    async def _deregister(self, connection: HubConnection, message: Deregister, wait_s: float) -> bool:
        """Leave the hub, again after a reconnect; return whether it acknowledged that within `wait_s` seconds."""
        try:
            async with asyncio.timeout(wait_s):
                await connection.request(message, Deregistered, within_s=None)
        except TimeoutError:
            running = self._worker.running
            log_agent.warning("no reply to deregister in %g s agent=%s tasks=%d", wait_s, self.agent_id, running)
            return False
        except AgentHubError as error:
            log_agent.debug("no reply to deregister: %s", escape_unprintable(error.message))
            return False
        return True

    # What comes in.

    def _on_registered(self, registration: Register, registered: Registered) -> bool:
        """Bring both sides in line after a registration; return whether this agent accepts the session."""
        log_agent.info("joined agent=%s", escape_unprintable(registered.agent_id))
        self.agent_id, self._resume = registered.agent_id, registered.resume
        if not self._worker.reconcile(registered.tasks):
            return False
        if registration.capabilities != self._registration().capabilities:
            self._announce()  # One was added meanwhile.
        return True

    def _on_message(self, message: HubMessage) -> None:
        if isinstance(message, Delegated):
            self._worker.receive(message)
        elif isinstance(message, StatusReply):
            if message.state in FINAL_STATES:
                self._worker.task_ended(message.task_id or "")
        elif isinstance(message, BroadcastReply):
            self._worker.receive_broadcast(message)
        elif isinstance(message, Error):
            code, text = escape_unprintable(message.code), escape_unprintable(message.message)
            log_agent.log(refusal_level(message), "refused code=%s: %s", code, text)

    # Asking others.

    async def delegate(self, capability: str | None = None, input: Any = None, **options: Any) -> Any:
        """Have another agent do a task, and return its output. The options are those of `submit`.

        Raises what `submit` and `TaskHandle.result` raise. Cancelling this call cancels the task.
        """
        handle = await self.submit(capability, input, **options)
        try:
            return await handle.result()
        except asyncio.CancelledError:
            handle.cancel_soon()
            raise

    async def submit(
        self,
        capability: str | None = None,
        input: Any = None,
        *,
        agent_id: str | None = None,
        ttl: float = 300.0,
        priority: int = 0,
        max_retries: int = 0,
        wait: bool = False,
        task_id: str | None = None,
        parent_id: str | None = None,
        patience_s: float | None = None,
    ) -> TaskHandle:
        """Delegate a task, and return its handle when the hub has accepted it.

        `capability` lets the hub choose the worker, `agent_id` names it; `ttl` is in seconds and covers waiting and all
        attempts; the higher `priority` (-100 to 100) goes first; the task is retried up to `max_retries` times when its
        worker is lost; `wait` queues it although no online agent offers the capability. Without a connection this waits
        for one.

        A hub that is `overloaded` is asked again for `patience_s` seconds (None: the ttl). Raises Refused, with the
        hub's code; TaskTimeout if the hub did not accept the task within `ttl`; ValueError if the input is not JSON;
        Disconnected if there will be no connection.
        """
        if not 0 < ttl <= TTL_MAX_S:
            raise ValueError(f"ttl must be more than 0 and at most {TTL_MAX_S} seconds")
        if task_id is not None:
            check_text("task_id", task_id, ID_PATTERN)
        message = Delegate(
            task_id=task_id or f"{slugify(self.name, 40) or 'task'}-{os.urandom(8).hex()}",
            agent_id=agent_id,
            capability=capability,
            input=payload_of(input),
            ttl=float(ttl),
            priority=priority,
            max_retries=max_retries,
            parent_id=parent_id,
            wait=wait,
        )
        return await TaskHandle.submit(self._started(), message, patience_s)

    async def discover(self, capability: str = "", limit: int = 100) -> list[AgentInfo]:
        """Find agents by a keyword, the best match first; the empty one finds all. At most `limit`, up to 1000."""
        message = Discover(capability=capability, limit=limit)
        return (await self._started().request(message, Discovered)).agents

    async def broadcast(self, message: Any, capability: str | None = None) -> int:
        """Send any JSON to all other agents that are online (with that capability); return how many there are.

        Raises Disconnected if the connection is lost before the hub replies: then it may have been sent or not.
        """
        session = await self._started().wait()
        reply = await session.request(Broadcast(message=payload_of(message), capability=capability), BroadcastReply)
        return reply.recipients or 0

    async def status(self, task_id: str | None = None) -> StatusReply:
        """Ask the hub about itself (in `.hub`), or about one task. Raises Refused(unknown_task)."""
        return await self._started().request(Status(task_id=task_id), StatusReply)


class LocalHubLike(Protocol):
    """The part of a hub in its own process that an agent uses."""

    def connect(self, owner: LinkOwner) -> Awaitable[Link]: ...


def refusal_level(error: Error) -> int:
    """Return how important it is that the hub refused something."""
    return logging.DEBUG if error.code in LATE_CODES else logging.WARNING


def _on_announced(reply: HubMessage | AgentHubError) -> None:
    if isinstance(reply, Error):
        code, text = escape_unprintable(reply.code), escape_unprintable(reply.message)
        log_agent.error("registration refused code=%s: %s", code, text)


def _ignore(reply: object) -> None:
    """Drop a reply that says nothing new."""


def handler_error(error: BaseException, task: Task) -> ErrorInfo:
    """Return what the requester is told of an exception that a handler raised, and log all of it here."""
    try:
        leaves = list(itertools.islice(leaf_errors(error), LEAVES_MAX + 1))
        own = leaves[0] if len(leaves) == 1 else None
        if isinstance(own, TaskFailed) and own.task_id is None:
            return ErrorInfo(own_code(own), error_text(text_of(own.message)))
        log_agent.error(
            "handler failed task=%s capability=%s", escape_unprintable(task.task_id), task.capability, exc_info=error
        )
        more = ["and more"] if len(leaves) > LEAVES_MAX else []
        return ErrorInfo(Code.FAILED, error_text("; ".join([*map(with_cause, leaves[:LEAVES_MAX]), *more])))
    except BaseException as failure:  # The exception's own code failed: the task must still end.
        log_agent.error("an exception of type %s cannot be shown: %s", type(error).__name__, type(failure).__name__)
        return ErrorInfo(Code.FAILED, error_text(type(error).__name__))


def leaf_errors(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, or those that a group of exceptions holds at any depth."""
    left = [error]
    while left:
        one = left.pop()
        if isinstance(one, BaseExceptionGroup):
            left.extend(reversed(one.exceptions))
        else:
            yield one


def own_code(error: TaskFailed) -> str:
    """Return the code that a handler chose; `failed` if the protocol does not allow it."""
    try:
        return check_text("code", error.code, VISIBLE_PATTERN)
    except (ValueError, TypeError):
        return Code.FAILED


def with_cause(error: BaseException) -> str:
    """Return `Type: text` of an exception, and of its cause if that says more."""
    text = text_of(error)
    cause = "" if error.__cause__ is None else text_of(error.__cause__)
    return text if cause in text else f"{text} (caused by {cause})"


def text_of(value: Any) -> str:
    """Return a string as it is, and of anything else its type and its text, which may be impossible to get."""
    if isinstance(value, str):
        return value
    try:
        text = str(value)
    except BaseException as failure:
        text = f"its text cannot be read ({type(failure).__name__})"
    return f"{type(value).__name__}: {text}" if text else type(value).__name__


def is_of_the_loop(error: BaseException) -> bool:
    """Return whether the loop ends the current coroutine by this exception, rather than the coroutine's own code."""
    try:
        current = asyncio.current_task()
    except RuntimeError:
        current = None
    if current is None:  # The coroutine is closed, or collected, when no loop runs it.
        return True
    return isinstance(error, asyncio.CancelledError) and current.cancelling() > 0


def output_payload(output: Any) -> bytes | None:
    """Return a handler's output as a payload. Raises TaskFailed, which names the part that is not JSON."""
    try:
        return payload_of(output)
    except (ValueError, RecursionError) as error:
        fault = fault_in(output) or f"output: {error}"
        log_agent.error("a handler's output is not JSON: %s", escape_unprintable(error_text(fault)))
        raise TaskFailed(fault) from None


def fault_in(output: Any) -> str | None:
    """Return which part of an output is not JSON, and why; None if only its encoding failed."""
    path, fault, parts = "output", None, iter([("", output)])
    for _ in range(DEPTH_MAX + 2):
        for step, part in parts:
            try:
                check_json(part)
            except (ValueError, RecursionError) as error:
                path, fault = path + step, str(error)
                break
        else:
            break
        if isinstance(part, dict):
            parts = ((f".{text_of(key)}", value) for key, value in part.items())
        elif isinstance(part, list | tuple):
            parts = ((f"[{index}]", value) for index, value in enumerate(part))
        else:
            break
    return fault and f"{path}: {fault}"


def error_text(text: str) -> str:
    """Return as much of an error's text as the protocol allows."""
    return text.replace("\0", "\\x00").encode(errors="backslashreplace").decode()[:TEXT_MAX]


def outcome_from(report: StatusReply) -> TaskOutcome:
    """Return a task's outcome from a report that was asked for."""
    return TaskOutcome(
        task_id=report.task_id or "",
        sender=report.agent_id,
        success=report.state == TaskState.COMPLETED,
        state=report.state or "",
        output=report.output,
        error=report.error,
        attempt=report.attempt or 0,
    )


async def cancel_and_wait(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks of the loop, but not the one that calls this, and return when they are done."""
    others = [task for task in tasks if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def done_or_set(future: asyncio.Future[Any], event: asyncio.Event | LightEvent) -> None:
    """Return when a future is done or an event is set, whichever comes first."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({future, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


async def serve(*agents: Agent, drain_s: float = DRAIN_S) -> None:
    """Run agents side by side until SIGINT or SIGTERM, then drain them for at most `drain_s` seconds.

    Raises KeyboardInterrupt at once for a second signal, and the error with which an agent has ended.
    """
    with stop_signals() as stopped:
        try:
            async with asyncio.TaskGroup() as group:
                for agent in agents:
                    group.create_task(agent.serve(stopped, drain_s))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None


@contextlib.contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """Set an event at the first SIGINT or SIGTERM, and raise KeyboardInterrupt in the current task at the second."""
    stopped = asyncio.Event()
    current = asyncio.current_task()
    is_interrupted = False

    def stop() -> None:
        nonlocal is_interrupted
        if stopped.is_set() and current is not None:
            is_interrupted = True
            current.cancel()
        stopped.set()

    with signal_handler(stop, "SIGINT", "SIGTERM"):
        try:
            yield stopped
        except asyncio.CancelledError:
            if is_interrupted:
                raise KeyboardInterrupt from None
            raise


@contextlib.contextmanager
def signal_handler(handler: Callable[[], object], *names: str) -> Iterator[None]:
    """Call `handler` on the loop for each of these signals, as far as the system knows them and the thread may."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as undo:
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            try:
                loop.add_signal_handler(number, handler)
                undo.callback(loop.remove_signal_handler, number)
            except NotImplementedError:  # Windows: its event loops have no signal handlers.
                former = signal.signal(number, lambda *_: loop.call_soon_threadsafe(handler))
                undo.callback(signal.signal, number, former)
            except (RuntimeError, ValueError):
                log_agent.debug("not in the main thread: signals are not handled")
                break
        yield


# ============================================================================================
# 9 Command line
#
# Each command is a row of `commands`: its options, and the function that runs it. An option is one
# line: `option(group, "--port N", 8765, "port to listen on")`. Results go to stdout, log and errors to
# stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
# ============================================================================================

HUB_DRAIN_S = 1.5  # With CLOSING_S it keeps the hub's exit under five seconds.
GC_THRESHOLD = 10_000  # New objects between two looks of the garbage collector at them.
FULL_COLLECTION_S = 600.0  # Between two looks at all objects, which take 0.3 s for a million.
STDERR_TAIL_BYTES = 4000  # Of a failed command's stderr, sent to its requester.
TOKEN_BYTES = 32  # Of randomness.
LOG_LINES_PER_S = 100
CELL_MAX = 200  # Characters in a cell of a table with many rows.
TERMINATING_S = 1.0  # Between SIGTERM and SIGKILL for a command whose task has ended.
LOG_LEVELS = "debug|info|warning|error"


class CommandFailed(Exception):
    """Ends the command line with exit code 1 and this one line on stderr."""


class LogFormatter(logging.Formatter):
    """Write one line per record, unprintable characters escaped. A traceback follows, each line marked with `|`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escape_unprintable(super().formatMessage(record))

    def formatException(self, exc_info: Any) -> str:
        return "\n".join(f"  | {escape_unprintable(line)}" for line in super().formatException(exc_info).splitlines())


class LogFloodFilter(logging.Filter):
    """Drop records over LOG_LINES_PER_S of one logger, and log how many were dropped. Errors always pass."""

    def __init__(self) -> None:
        super().__init__()
        self._seconds: dict[str, tuple[int, int]] = {}  # By logger: the current second, and its number of records.

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        second, lines = self._seconds.get(record.name, (0, 0))
        if int(record.created) != second:
            if lines > LOG_LINES_PER_S:
                dropped = lines - LOG_LINES_PER_S
                record.msg, record.args = f"[{dropped} lines before this were dropped] {record.getMessage()}", None
            second, lines = int(record.created), 0
        self._seconds[record.name] = second, lines + 1
        return lines < LOG_LINES_PER_S


def configure_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter())
    handler.addFilter(LogFloodFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # Not every terminal can show every character.
    words = sys.argv[1:] if argv is None else argv
    parser = argument_parser([word for word in words if word != "--"][:1])
    args = parser.parse_args(words)
    configure_logging(args.log_level)
    try:
        code: int = args.run(args)
        return code
    except (CommandFailed, AgentHubError) as error:
        print(f"agenthub: {escape_unprintable(str(error))}", file=sys.stderr)
        return 1
    except ValueError as error:
        parser.error(escape_unprintable(str(error)))
    except BrokenPipeError:  # `agenthub status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


# Commands and options


class Command(NamedTuple):
    """A command of the command line: its help text, the function that adds its options, and the one that runs it."""

    purpose: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    log_level: str = "error"


def commands() -> dict[str, Command]:
    return {
        "hub": Command("start a hub", _add_hub, _run_hub, "info"),
        "agent": Command("run agents from a file, or turn a program into an agent", _add_agent, _run_agent, "info"),
        "status": Command("show the agents and tasks of a hub", _add_status, _run_status),
        "call": Command("delegate a task and print its output", _add_call, _run_call),
        "bridge": Command(
            "offer the hub to an MCP client, or an MCP server's tools to the hub", _add_bridge, _run_bridge, "info"
        ),
        "schema": Command("print the JSON Schema of all messages", lambda parser: None, _run_schema),
        "token": Command("generate a token for a hub", _add_token, _run_token),
    }


def argument_parser(names: Iterable[str] | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line. Only the commands in `names` get their options (None: all)."""
    parser = argparse.ArgumentParser(
        prog="agenthub", description="A hub for agents: they find each other and delegate tasks.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"agenthub {__version__}")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in commands().items():
        description = f"{command.purpose[0].upper()}{command.purpose[1:]}."
        # Without abbreviations: `--token SECRET` would be taken for --token-file.
        one = parsers.add_parser(name, help=command.purpose, description=description, allow_abbrev=False)
        if names is None or name in names:
            one.set_defaults(run=command.run)
            option(one, f"--log-level {LOG_LEVELS}", command.log_level, "least severe level to log, to stderr")
            command.add_options(one)
    return parser


def option(group: argparse._ActionsContainer, flag: str, default: Any, purpose: str, **more: Any) -> None:
    """Add an option; `flag` holds its name and, unless it is a switch, a word for its value or its choices.

    The value has the type of the default. An option whose default is a list may be repeated.
    """
    name, _, value = flag.partition(" ")
    if not value:
        group.add_argument(name, action="store_true", help=purpose, **more)
    elif isinstance(default, list):
        group.add_argument(name, action="append", default=default, metavar=value, help=f"{purpose}; repeatable", **more)
    else:
        more |= {"choices": value.split("|")} if "|" in value else {"metavar": value}
        more.setdefault("type", str if default is None else type(default))
        if default not in (None, ""):
            shown = f"{default:g}" if isinstance(default, float) else str(default)
            purpose = f"{purpose} (default: {shown.replace('%', '%%')})"
        group.add_argument(name, default=default, help=purpose, **more)


def _add_connection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("connection")
    url = os.environ.get("AGENTHUB_URL") or URL_DEFAULT
    option(group, "--url URL", url, "URL of the hub; AGENTHUB_URL sets the default")
    option(group, "--token-file PATH", None, "file with the hub's token; overrides AGENTHUB_TOKEN")
    option(group, "--ca-file PATH", None, "CA certificates to trust instead of the system's")


def export_connection_options(args: argparse.Namespace) -> None:
    """Export the options of `_add_connection` to the environment, where all agents of this process read them."""
    os.environ["AGENTHUB_URL"] = check_url(args.url)
    if args.token_file is not None:
        token_in(args.token_file)  # Raises ValueError now rather than at each attempt to connect.
        os.environ.pop("AGENTHUB_TOKEN", None)
        os.environ["AGENTHUB_TOKEN_FILE"] = os.path.abspath(args.token_file)
    if args.ca_file is not None:
        client_tls(args.ca_file)
        os.environ["AGENTHUB_CA_FILE"] = os.path.abspath(args.ca_file)
    bearer_token()


def _add_loop(group: argparse._ActionsContainer) -> None:
    option(group, f"--loop {'|'.join(LOOPS)}", "auto", "event loop; auto is uvloop if it is installed, else asyncio")


# hub


def _add_hub(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("listening")
    option(group, "--host HOST", "127.0.0.1", "address to listen on")
    option(group, "--port N", 8765, "port to listen on; 0 picks a free one")
    option(group, "--tls-cert PATH", None, "TLS certificate: serve wss:// instead of ws://")
    option(group, "--tls-key PATH", None, "private key of the certificate, unless both are in one file")
    _add_access(parser.add_argument_group("access"))
    group = parser.add_argument_group("persistence")
    option(group, "--db PATH", None, "persist tasks and agents in this file across restarts")
    option(group, "--sync full|normal", "full", "with --db: full survives a power loss, normal a crash of the process")
    group = parser.add_argument_group("process")
    option(group, "--with FILE[:NAME]", [], "also run the agents of this file, in the hub's process", dest="files")
    _add_loop(group)
    _add_limits(parser)


def _add_access(group: argparse._ActionsContainer) -> None:
    option(group, "--token-file PATH", None, "file with the token to require; overrides AGENTHUB_TOKEN")
    option(group, "--access PATH", None, "file with several tokens and what each allows; SIGHUP reloads it")
    option(group, "--insecure", False, "run without a token on an address that others can reach")
    option(group, "--allow-origin ORIGIN", [], "origin whose web pages may connect, such as https://example.org")
    option(group, "--allow-host NAME", [], "name accepted in the Host header; on loopback in addition to its own names")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the options that set HubSettings, each under the name of its field, and the limits of one connection."""
    settings = HubSettings()

    def setting(group: argparse._ActionsContainer, flag: str, name: str, purpose: str) -> None:
        option(group, flag, getattr(settings, name), purpose, dest=name)

    group = parser.add_argument_group("times")
    setting(group, "--heartbeat S", "heartbeat_s", "seconds between heartbeats; three missed ones disconnect")
    setting(group, "--grace S", "grace_s", "seconds that the session of a disconnected agent is kept")
    setting(group, "--retention S", "retention_s", "seconds that the record of an ended task is kept")
    group = parser.add_argument_group("limits")
    setting(group, "--max-bytes N", "message_bytes_max", "bytes of one message")
    setting(group, "--max-open-tasks N", "open_tasks_max", "open tasks of one requester")
    setting(group, "--max-pending-tasks N", "pending_tasks_max", "pending tasks in total")
    setting(group, "--max-agents N", "agents_max", "agents: online, disconnected, or with outcomes to fetch")
    setting(group, "--max-connections N", "connections_max", "connections of agents and observers")
    setting(group, "--max-capabilities N", "capabilities_max", "capabilities of one agent")
    setting(group, "--max-metadata-bytes N", "metadata_bytes_max", "bytes of one agent's metadata")
    option(group, "--max-connections-per-address N", CONNECTIONS_PER_ADDRESS_MAX, "connections from one address")
    option(group, "--backlog N", BACKLOG_BYTES_MAX, "bytes waiting for a slow consumer before it is disconnected")
    burst = f"messages per second from one connection, in bursts of {BURST_S:g} seconds' worth; 0: unlimited"
    option(group, "--rate N", MESSAGES_PER_S_MAX, burst)


def _run_hub(args: argparse.Namespace) -> int:
    if not 0 <= args.port <= 65_535:
        raise ValueError("--port must be from 0 to 65535")
    if args.tls_key is not None and args.tls_cert is None:
        raise ValueError("--tls-key needs --tls-cert")
    tls = server_tls(args.tls_cert, args.tls_key) if args.tls_cert is not None else None
    server = _hub_server(args, tls)
    _warn_if_exposed(args)
    _raise_descriptors_max(server.settings.connections_max + CONNECTIONS_OVER + 2 * DESCRIPTORS_KEPT)
    agents = [agent for target in args.files for agent in load_agents(target)]
    is_reloadable = args.access is not None or args.token_file is not None or tls is not None
    reload = functools.partial(_reload, server, tls, args) if is_reloadable else None
    collect_only_new_objects()
    run_loop(_serve_hub(server, agents, reload), args.loop)
    return 0


def _hub_server(args: argparse.Namespace, tls: ssl.SSLContext | None) -> HubServer:
    return HubServer(
        HubSettings(**{name: value for name, value in vars(args).items() if name in HubSettings.__slots__}),
        host=args.host,
        port=args.port,
        access=_access(args),
        insecure=args.insecure,
        tls=tls,
        allow_origins=args.allow_origin,
        allow_hosts=args.allow_host,
        backlog_bytes_max=args.backlog,
        connections_per_address_max=args.max_connections_per_address,
        messages_per_s_max=args.rate,
        journal=_journal(args),
    )


def _journal(args: argparse.Namespace) -> Journal | None:
    """Return the journal of the options; raise ValueError for one that would not survive the hub."""
    if args.db == ":memory:":
        raise ValueError("--db :memory: would persist nothing; give a file, or leave --db out")
    return Journal(args.db, sync=args.sync) if args.db is not None else None


def _access(args: argparse.Namespace) -> Access | None:
    """Return the tokens to require, by the options or the environment (None: no token); raise ValueError."""
    if args.access is not None and args.token_file is not None:
        raise ValueError("give either --access or --token-file")
    if args.access is not None:
        return Access.of_file(args.access)
    token = token_in(args.token_file) if args.token_file is not None else os.environ.get("AGENTHUB_TOKEN")
    if token is None and "AGENTHUB_TOKEN_FILE" in os.environ:
        token = token_in(os.environ["AGENTHUB_TOKEN_FILE"])
    if token is None:
        return None
    access = Access.of_token(check_token("AGENTHUB_TOKEN", token))
    if len(token) < TOKEN_LENGTH_MIN:
        log_hub.warning("the token is short enough to be guessed; `agenthub token` generates a better one")
    return access


def _warn_if_exposed(args: argparse.Namespace) -> None:
    if is_loopback(args.host):
        return
    if args.insecure:
        log_hub.warning("--insecure: everybody who can reach %s may use this hub, without a token", args.host)
    if args.tls_cert is None:
        log_hub.warning("without --tls-cert, tokens and tasks can be read on the network")


def _raise_descriptors_max(needed: int) -> None:
    """Raise this process's limit of open files and sockets to what it needs, as far as the system allows."""
    if descriptors_max() < needed:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (OSError, ValueError) as error:
            log_hub.debug("the limit of file descriptors was not raised: %s", error)


def collect_only_new_objects() -> None:
    """Have the garbage collector look at an object only once, while it is new: records are many, and make no cycles."""

    def freeze_survivors(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            gc.freeze()

    gc.set_threshold(GC_THRESHOLD)
    gc.callbacks.append(freeze_survivors)
    gc.collect()


async def _collect_all_loop() -> None:
    """Free what the garbage collector cannot have found while it was new, such as a closed connection with TLS."""
    while True:
        await asyncio.sleep(FULL_COLLECTION_S)
        gc.unfreeze()
        gc.collect()


async def _serve_hub(server: HubServer, agents: list[Agent], reload: Callable[[], Awaitable[None]] | None) -> None:
    """Run a hub, and agents in its process, until SIGINT or SIGTERM; call `reload` for each SIGHUP."""
    loop = asyncio.get_running_loop()
    hangup = asyncio.Event()
    with stop_signals() as stopped, signal_handler(hangup.set, *(["SIGHUP"] if reload is not None else [])):
        await _start_hub(server)
        background = [loop.create_task(_collect_all_loop())]
        if reload is not None:
            background.append(loop.create_task(_reload_loop(reload, hangup)))
        for agent in agents:
            agent.use_hub(server)
        running = [loop.create_task(_serve_in_hub(agent, stopped)) for agent in agents]
        try:
            await stopped.wait()
            last = loop.time() + HUB_DRAIN_S
            server.shut_down()
            await asyncio.gather(*running)
            await server.stop(max(0.0, last - loop.time()))
        finally:
            for task in background:
                task.cancel()


async def _start_hub(server: HubServer) -> None:
    try:
        await server.start()
    except OSError as error:
        number = error.errno or 0  # Negative for a name that cannot be resolved.
        reason = os.strerror(number) if number > 0 else error.strerror
        raise CommandFailed(f"cannot listen on {server.url}: {reason}; try another --host or --port") from error
    print(f"listening on {server.url}", flush=True)


async def _reload_loop(reload: Callable[[], Awaitable[None]], asked: asyncio.Event) -> None:
    """Call `reload` each time that it was asked for, one call at a time."""
    while True:
        await asked.wait()
        asked.clear()
        try:
            await reload()
        except Exception:
            log_hub.exception("reload failed")


async def _reload(server: HubServer, tls: ssl.SSLContext | None, args: argparse.Namespace) -> None:
    """Reload the certificate, and the token or access file. Log a bad one, and keep the former."""
    try:
        if tls is not None:
            load_certificate(tls, args.tls_cert, args.tls_key)
        access = _access(args)
        if access is not None:
            await server.reload(access)
    except (AgentHubError, ValueError) as error:
        log_hub.error("not reloaded: %s", error)


async def _serve_in_hub(agent: Agent, stopped: asyncio.Event) -> None:
    """Run an agent; log its failure, which does not end the hub."""
    try:
        await agent.serve(stopped, HUB_DRAIN_S)
    except AgentHubError as error:
        log_agent.error("agent %s has ended: %s", escape_unprintable(agent.name), escape_unprintable(error.message))


# agent


def _add_agent(parser: argparse.ArgumentParser) -> None:
    where = "a file, or package.module:NAME; without NAME, all agents that it defines"
    parser.add_argument("target", nargs="?", metavar="FILE[:NAME]", help=where)
    group = parser.add_argument_group("an agent from a program")
    program = "shell command that does a task: input as JSON on stdin, output on stdout"
    option(group, "--exec COMMAND", None, program, dest="command")
    option(group, "--name NAME", None, "name of the agent")
    option(group, "--capability C", [], "capability that the command provides")
    option(group, "--description TEXT", "", "description of the agent and its capabilities")
    option(group, "--max-tasks N", 4, "tasks that run at once")
    group = parser.add_argument_group("process")
    option(group, "--drain S", DRAIN_S, "seconds that running tasks have to end when the agent is stopped")
    _add_loop(group)
    _add_connection(parser)


def _run_agent(args: argparse.Namespace) -> int:
    export_connection_options(args)  # For the agents that the file makes.
    if (args.command is None) == (args.target is None):
        raise ValueError("give either a FILE or --exec COMMAND")
    if args.command is None:
        agents = load_agents(args.target)
    elif not args.name or not args.capability:
        raise ValueError("--exec needs --name and --capability")
    else:
        agents = [exec_agent(args.command, args.name, args.capability, args.description, args.max_tasks)]
    run_loop(serve(*agents, drain_s=args.drain), args.loop)
    return 0


def load_agents(target: str) -> list[Agent]:
    """Return the agents of FILE[:NAME] or package.module[:NAME]; raise CommandFailed if it has none.

    NAME is an Agent or a subclass of it. Without NAME: all Agents at the top level, else all subclasses defined there.
    """
    path, _, name = target.rpartition(":")
    if not path or os.sep in name or "/" in name:  # No NAME; the colon may be that of a Windows drive.
        path, name = target, ""
    module = load_module(path)
    if name:
        found = [getattr(module, name, None)]
    else:
        defined = list(vars(module).values())
        found = [one for one in defined if isinstance(one, Agent)] or [
            one for one in defined if is_agent_class(one) and one.__module__ == module.__name__
        ]
    made = [one() if is_agent_class(one) else one for one in dict.fromkeys(found)]
    agents = [one for one in made if isinstance(one, Agent)]
    if not agents:
        raise CommandFailed(f"{target}: defines no Agent of {__name__}, nor a subclass of it")
    return agents


def is_agent_class(one: object) -> TypeGuard[type[Agent]]:
    return isinstance(one, type) and issubclass(one, Agent) and one is not Agent


def load_module(path: str) -> types.ModuleType:
    """Import a file by its path, or a module by its name; raise CommandFailed if it does not exist."""
    sys.path.insert(0, os.getcwd())
    if not path.endswith(".py"):
        if not all(part.isidentifier() for part in path.split(".")):
            raise CommandFailed(f"{path}: not a FILE.py or a package.module")
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            raise CommandFailed(f"{path}: {error}") from error
    if not pathlib.Path(path).is_file():
        raise CommandFailed(f"{path}: no such file")
    sys.path.insert(0, str(pathlib.Path(path).resolve().parent))
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise CommandFailed(f"{path}: cannot be imported as a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def exec_agent(command: str, name: str, capabilities: list[str], description: str = "", max_tasks: int = 4) -> Agent:
    """Return an agent that runs a shell command for each task.

    The task's input is the command's stdin, as JSON; its stdout is the output, as JSON if it parses, else as text. A
    non-zero exit code fails the task with the last part of stderr. The command's environment has AGENTHUB_TASK_ID,
    AGENTHUB_CAPABILITY and AGENTHUB_ATTEMPT, but not AGENTHUB_TOKEN. When the task ends, the command's process group is
    killed (on Windows: the process).
    """
    agent = Agent(name, description=description, max_tasks=max_tasks)

    async def run_command(task: Task) -> Any:
        environment = {
            **{name: value for name, value in os.environ.items() if name != "AGENTHUB_TOKEN"},
            "AGENTHUB_TASK_ID": task.task_id,
            "AGENTHUB_CAPABILITY": task.capability or "",
            "AGENTHUB_ATTEMPT": str(task.attempt),
        }
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_shell(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=os.name == "posix"
        )
        try:
            return await _communicate(process, json.dumps(task.input).encode())
        finally:
            await _kill_process_group(process)

    for capability_name in capabilities:
        agent.capability(capability_name, description=description)(run_command)
    return agent


async def _communicate(process: asyncio.subprocess.Process, raw: bytes) -> Any:
    """Send a process its input, and return its output; raise TaskFailed if it fails or its output is too large."""
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise AssertionError("run_command opens a pipe for all three")
    _, output, errors, exit_code = await asyncio.gather(
        _write_input(process.stdin, raw),
        _read_all(process.stdout),
        _read_tail(process.stderr),
        process.wait(),
    )
    if exit_code != 0:
        text = errors.decode(errors="replace").strip()
        raise TaskFailed(f"exit code {exit_code}: {text}" if text else f"exit code {exit_code}")
    text = output.decode(errors="replace")
    try:
        return check_json(json.loads(text))
    except (ValueError, RecursionError):
        return text


async def _write_input(stdin: asyncio.StreamWriter, raw: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # A command may ignore its input.
        stdin.write(raw)
        await stdin.drain()
        stdin.close()
        await stdin.wait_closed()


async def _read_all(stdout: asyncio.StreamReader) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while chunk := await stdout.read(65_536):
        size += len(chunk)
        if size > CLIENT_MESSAGE_BYTES_MAX:
            raise TaskFailed(f"the output is larger than {CLIENT_MESSAGE_BYTES_MAX} bytes", code=Code.TOO_LARGE)
        chunks.append(chunk)
    return b"".join(chunks)


async def _read_tail(stderr: asyncio.StreamReader) -> bytes:
    tail = b""
    while chunk := await stderr.read(65_536):
        tail = (tail + chunk)[-STDERR_TAIL_BYTES:]
    return tail


async def _kill_process_group(process: asyncio.subprocess.Process) -> None:
    """Kill all processes of a command, after SIGTERM and TERMINATING_S if it still runs."""
    if process.returncode is None:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TERMINATING_S):
                await process.wait()
    _signal_group(process, getattr(signal, "SIGKILL", signal.SIGTERM))
    await process.wait()
    # asyncio has no public way to close a pipe that was not read to its end.
    process._transport.close()  # type: ignore[attr-defined]  # private, but unchanged since 3.4


def _signal_group(process: asyncio.subprocess.Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(process.pid, number)
        elif process.returncode is None:
            process.terminate()


# status


def _add_status(parser: argparse.ArgumentParser) -> None:
    option(parser, "--json", False, "print JSON")
    option(parser, "--watch", False, "repeat every second")
    option(parser, "--task ID", None, "show one task")
    _add_connection(parser)


def _run_status(args: argparse.Namespace) -> int:
    export_connection_options(args)
    return asyncio.run(_status(args))


async def _status(args: argparse.Namespace) -> int:
    session = await Session.open(functools.partial(connect_websocket, args.url), _ignore)
    try:
        while True:
            text = await (_task_text(session, args) if args.task else _hub_text(session, args))
            if args.watch and sys.stdout.isatty():
                text = f"\x1b[H\x1b[J{text}"
            print(text, flush=True)
            if not args.watch:
                return 0
            await asyncio.sleep(1)
    finally:
        await session.close()


async def _task_text(session: Session, args: argparse.Namespace) -> str:
    report = await session.request(Status(task_id=args.task), StatusReply)
    fields = {name: value for name, value in to_dict(report).items() if name not in ("type", "reply_to")}
    if args.json:
        return json_text(fields)
    return table([[name, to_text(value)] for name, value in fields.items()])


async def _hub_text(session: Session, args: argparse.Namespace) -> str:
    hub = (await session.request(Status(), StatusReply)).hub or {}
    found = await session.request(Discover(limit=1000), Discovered)
    listed = await session.request(Status(tasks=True), StatusReply)
    if args.json:
        return json_text({"hub": hub, "agents": to_dict(found)["agents"], "tasks": to_dict(listed)["tasks"]})
    counts = hub.get("tasks")  # The protocol leaves open which fields a hub's status has.
    counts = ", ".join(f"{number} {state}" for state, number in counts.items()) if isinstance(counts, dict) else "?"
    up_s = hub.get("uptime_s")
    up = f"{up_s:.0f}" if isinstance(up_s, int | float) else "?"
    head = escape_unprintable(f"hub {args.url}, version {hub.get('version')}, up {up} s; tasks: {counts}")
    agents = [["AGENT", "RUNNING", "CAPABILITIES", "DESCRIPTION"], *map(_agent_row, found.agents[:LIST_MAX])]
    tasks = [
        ["TASK", "STATE", "CAPABILITY", "AGENT", "ATTEMPT", "AGE", "TTL", "PROGRESS"],
        *map(_task_row, (listed.tasks or [])[:LIST_MAX]),
    ]
    return "\n".join([head, "", table(agents), "", table(tasks)])


def _agent_row(agent: AgentInfo) -> list[str]:
    names = ", ".join(one.name for one in agent.capabilities)
    return truncate([agent.agent_id, f"{agent.running}/{agent.max_tasks}", names, agent.description])


def truncate(cells: list[str]) -> list[str]:
    """Return the cells of a row, each shortened to CELL_MAX characters."""
    return [cell if len(cell) <= CELL_MAX else f"{cell[:CELL_MAX]}…" for cell in cells]


def _task_row(task: TaskInfo) -> list[str]:
    state = f"{task.state} ({task.code})" if task.code is not None else task.state
    progress = f"{task.progress:.0%}" if task.progress is not None else ""
    row = [
        task.task_id,
        state,
        task.capability or "",
        task.agent_id or "",
        str(task.attempt),
        f"{task.age_s:.0f} s",
        f"{task.ttl:.0f} s",
        progress,
    ]
    return truncate(row)


def table(rows: list[list[str]]) -> str:
    """Return rows as aligned columns, with unprintable characters escaped, and truncated to the terminal's width."""
    cells = [[escape_unprintable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)
    width_max = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return "\n".join(line[:width_max] for line in lines)


def to_dict(message: HubMessage) -> dict[str, Any]:
    """Return a message as the JSON object that goes over the wire."""
    document: dict[str, Any] = json.loads(encode(message))
    return document


def to_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# call


def _add_call(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("capability", metavar="CAPABILITY", help="capability to delegate the task to")
    parser.add_argument(
        "input", nargs="?", default="null", metavar="JSON", help="input of the task; - reads it from stdin"
    )
    option(parser, "--agent ID", None, "agent_id of the agent to delegate it to")
    option(parser, "--ttl S", 300.0, "seconds until the task times out")
    option(parser, "--no-wait", False, "print the task's id instead of waiting for its output")
    _add_connection(parser)


def _run_call(args: argparse.Namespace) -> int:
    export_connection_options(args)
    text = sys.stdin.read() if args.input == "-" else args.input
    try:
        given = check_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the input is not JSON: {error}") from None
    return asyncio.run(_call(args, given))


async def _call(args: argparse.Namespace, given: Any) -> int:
    """Delegate a task, and print its output; cancel it at a signal."""
    with stop_signals() as stopped:
        calling = asyncio.create_task(_delegate(args, given))
        await done_or_set(calling, stopped)
        if calling.done():
            print(calling.result())
            return 0
        calling.cancel()
        await asyncio.wait({calling})
        return 130


async def _delegate(args: argparse.Namespace, given: Any) -> str:
    """Delegate a task; return its output as JSON, or with --no-wait its id."""
    async with Agent("call", url=args.url, give_up_after_s=0) as agent:
        handle = await agent.submit(args.capability, given, agent_id=args.agent, ttl=args.ttl)
        if args.no_wait:
            return handle.task_id
        showing = asyncio.create_task(_show_progress(handle))
        try:
            return json_text(await handle.result())
        except asyncio.CancelledError:
            handle.cancel_soon()
            raise
        finally:
            showing.cancel()


def json_text(value: Any) -> str:
    """Return a value as indented JSON without control characters that a terminal would obey."""
    if (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8"):
        return json.dumps(value, indent=2)
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(one if one.isprintable() or one == "\n" else json.dumps(one)[1:-1] for one in text)


async def _show_progress(handle: TaskHandle) -> None:
    if not sys.stderr.isatty():
        return
    async for update in handle:
        percent = f"{update.progress:4.0%}" if update.progress is not None else "    "
        detail = escape_unprintable(to_text(update.detail)) if update.detail is not None else ""
        print(f"{percent} {detail}"[: shutil.get_terminal_size().columns], file=sys.stderr)


# bridge


def _add_bridge(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("MCP")
    direction = group.add_mutually_exclusive_group()
    option(direction, "--http PORT", None, "speak Streamable HTTP on this port of 127.0.0.1 instead of stdio", type=int)
    option(direction, "--serve COMMAND", None, "start this MCP server, and offer its tools on the hub", dest="command")
    option(group, "--name NAME", None, "name of the bridge's agent on the hub")
    option(group, "--prefix TEXT", "", "with --serve: prefix of the capabilities' names")
    option(group, "--max-tasks N", 4, "with --serve: tasks that run at once")
    _add_connection(parser)


def _run_bridge(args: argparse.Namespace) -> int:
    """Run agenthub_mcp, the module next to this one."""
    export_connection_options(args)  # So that a wrong URL or token ends the command, rather than reach the model.
    name = f"{__name__.rpartition('.')[0]}.agenthub_mcp".lstrip(".")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise CommandFailed("the bridge is a separate file: copy agenthub_mcp.py next to agenthub.py") from error
    code: int = module.run(args)
    return code


# schema


def _run_schema(args: argparse.Namespace) -> int:
    print(json_text(json_schema()))
    return 0


# token


def _add_token(parser: argparse.ArgumentParser) -> None:
    option(parser, "--file PATH", None, "write the token to this new file, readable by its owner only")
    option(parser, "--json", False, "print JSON, with the SHA-256 for an access file")


def _run_token(args: argparse.Namespace) -> int:
    token = base64.urlsafe_b64encode(os.urandom(TOKEN_BYTES)).rstrip(b"=").decode()
    sha256 = hash_of(token)
    if args.file is not None:
        try:
            with open(os.open(args.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(f"{token}\n")
        except OSError as error:
            raise CommandFailed(f"{args.file}: cannot be created: {error.strerror}") from error
    if args.json:
        result = {"file": args.file} if args.file is not None else {"token": token}
        print(json_text({**result, "sha256": sha256}))
        return 0
    print(args.file if args.file is not None else token)
    print(f'SHA-256 of the token, for an access file: "{sha256}"', file=sys.stderr)
    return 0
