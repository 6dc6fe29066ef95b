"""AgentHub: programs register what they can do, find each other, delegate tasks and get results.

One file, to install (`pip install '.[standard]'` in a clone) or to copy into a project. It needs nothing
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
    9 Command line   hub, agent, status, top, call, result, cancel, bridge, schema, token, journal, completion
   10 Page           what browsers see of a hub: its agents and tasks

Where to add what: a message or a field of one, in section 2 (a class in AgentMessage or HubMessage,
and its `_on_` method in Hub); a state, in TRANSITIONS (section 3); a limit for deployers, in
HubSettings (section 4); a command, in section 9. docs/protocol.md describes the wire.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036  # Reached by 3.8 to 3.10, which can parse this file but not run it.
    needed = "AgentHub needs Python 3.11 or newer, this is {}.{}".format(*sys.version_info[:2])
    if __name__ == "__main__":
        sys.exit(needed)
    raise ImportError(needed)

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
import threading
import time
import types
import typing
from bisect import bisect_left
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
)
from dataclasses import dataclass, field
from queue import SimpleQueue
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
    from concurrent.futures import Future, ThreadPoolExecutor

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
    "Fenced",
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
    "JournalLike",
    "journal_of",
    # 7 Server
    "Access",
    "Grant",
    "HubServer",
    "LocalHub",
    # 8 Agent
    "Agent",
    "Piece",
    "Progress",
    "Task",
    "TaskHandle",
    "TaskQuestion",
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
#   │   └── Fenced            ... because another hub has taken it over
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
    NO_ANSWERS = "no_answers"
    NO_QUESTION = "no_question"
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
    PIECES_LOST = "pieces_lost"
    INVALID_INPUT = "invalid_input"
    BUSY = "busy"
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


class Fenced(JournalError):
    """Another hub has taken over the journal: this one must not write or say anything any more."""


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
#   status          Status          StatusReply, TaskAck, TaskAnswer (to the worker)
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
    TRY_LATER = 1013  # All connections together have too much unfinished input, and its address has most of that.
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
        if (kind is float and math.isfinite(item)) or (kind is int and INTEGER_MIN <= item <= INTEGER_MAX):
            continue  # As the call would do, which takes longer.
        if kind not in SCALARS:
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


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def string(field: str, value: Any) -> str:
    """Return a value that is a string; raise ValueError for any other."""
    if not isinstance(value, str):
        raise ValueError(f"{field} must be a string, not {value!r}")
    return value


def check_text(field: str, text: str, pattern: str, max_length: int = 128) -> str:
    """Return a text of 1 to `max_length` characters that fits one of PATTERNS; raise ValueError if it does not."""
    problem = Limit(pattern, 1, max_length).problem_of_size(string(field, text))
    if problem is None and re.search("[\ud800-\udfff]", text):
        problem = "may not hold half of a surrogate pair"
    if problem is not None:
        raise ValueError(f"{field} {problem}")
    return text


def escape_unprintable(text: str) -> str:
    """Return foreign text with its control characters escaped, for logs and terminals."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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
SlotCount = Annotated[int, Limit(ge=0, le=10_000)]
AskNumber = Annotated[int, Limit(ge=1, le=1_000_000_000)]
Trace = Annotated[dict[str, str], JsonLimit(bytes_max=2048)]


@typing.dataclass_transform(kw_only_default=True)
def record(made: type[Kind]) -> type[Kind]:
    """Make a dataclass with slots. `dataclass` would compile `==` and `repr` of each class: 3 ms of the import."""
    return _slotted(made, kw_only=True)


@typing.dataclass_transform()
def part(made: type[Kind]) -> type[Kind]:
    """Make a dataclass like `record`, whose arguments may be positional."""
    return _slotted(made, kw_only=False)


def _slotted(made: type[Kind], *, kw_only: bool) -> type[Kind]:
    shared: Any = made
    shared.__eq__, shared.__hash__, shared.__repr__ = equal_fields, None, repr_of_fields
    return dataclass(slots=True, kw_only=kw_only, eq=False, repr=False)(made)


def equal_fields(one: Any, other: Any) -> Any:
    if type(one) is not type(other):
        return NotImplemented
    return all(getattr(one, name) == getattr(other, name) for name in one.__slots__)


def repr_of_fields(one: Any) -> str:
    fields = ", ".join(f"{name}={getattr(one, name)!r}" for name in one.__slots__)
    return f"{type(one).__qualname__}({fields})"


@part
class Capability:
    """Something that an agent offers to do. The schemas are JSON Schemas of a task's input and output."""

    name: Name
    description: Description = ""
    input_schema: Schema | None = None
    output_schema: Schema | None = None


@part
class ErrorInfo:
    """Why a task failed."""

    code: Name
    message: Text = ""


@part
class Question:
    """What a worker asks the requester of its task. The answer fits the JSON Schema, if there is one."""

    text: Text
    schema: Schema | None = None


@record
class TaskStep:
    """A step in the life of a task, `at_s` seconds ago. `agent_id` is None if no agent had a part in it.

    `event` is `accepted`, one of TaskEvent, `asked` or `answered`.
    """

    event: str
    agent_id: str | None
    attempt: int
    at_s: float


@part
class TaskRef:
    """A task in progress at an agent, and its current attempt."""

    task_id: str
    attempt: int


@part
class AgentInfo:
    """What agents see of one another. `running` and `max_tasks` are counts of tasks.

    `online_s` is how many seconds ago it registered or resumed; an older hub does not say so.
    """

    agent_id: str
    name: str
    description: str
    capabilities: list[Capability]
    running: int
    max_tasks: int
    metadata: dict[str, Any]
    online_s: float | None = None


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
    occupied: SlotCount = 0  # Of these, how many are taken by handlers whose task has ended without them.
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
    """Hand over a task to `agent_id`, or to the least loaded agent that offers `capability`. `ttl` is in seconds.

    With `answers` its worker may ask this agent something. `trace` is passed on unread: a W3C trace context, say.
    """

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
    answers: bool = False
    trace: Trace | None = None


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
    """Ask for the hub's status, for one task, or for the list of `tasks` (at most `limit`, in that `state`).

    From a task's worker: its `progress`, a `piece` of its output, or a `question`. From its requester: the `answer` to
    the question with the number `ask`.
    """

    type: Literal["status"] = "status"
    id: RequestId | None = None
    task_id: Id | None = None
    tasks: bool = False
    limit: Annotated[int, Limit(ge=1, le=1000)] = 1000
    state: Literal["pending", "in_progress", "completed", "failed", "timeout"] | None = None
    progress: Fraction | None = None
    detail: Json = None
    piece: Json = None
    question: Question | None = None
    ask: AskNumber | None = None
    answer: Json = None


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
    progress at this agent, `features` what this hub knows of FEATURES.
    """

    type: Literal["register"] = "register"
    reply_to: str | None = None
    agent_id: Id
    resume: Id
    heartbeat_s: Annotated[float, Limit(gt=0)]
    max_bytes: Annotated[int, Limit(ge=MESSAGE_BYTES_MIN)]
    tasks: list[TaskRef]
    features: list[str] = field(default_factory=list)


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
    answers: bool = False
    trace: dict[str, str] | None = None


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
    """The status of the hub, of all tasks or of one; a worker's progress, a piece of its output or its question; or, to
    a worker, an answer or the end of its task.

    The fields of one task are those of TaskInfo, its `history`, and how many `pieces` were passed on. Only its
    requester and its assignee see `input`, `output`, `error`, `detail` and the `question` that waits for an answer.
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
    piece: Any = None
    pieces: int | None = None
    ask: int | None = None
    question: Question | None = None
    answer: Any = None
    history: list[TaskStep] | None = None


@record
class TaskAnswer:
    """The fields of StatusReply that bring a worker the answer to its question."""

    type: Literal["status"] = "status"
    task_id: str
    state: str
    attempt: int
    sender: str
    ask: int
    answer: Json


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
HubOutput = HubMessage | TaskAck | TaskAnswer | BroadcastDelivery  # Agents read the last three as other classes above.
KEEP_NULLS = (Broadcast, Delegated, TaskOutcome, TaskAnswer, BroadcastDelivery)


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
    """Return the validator of an annotation. `of_class` makes those of the types that JSON does not have: classes, also
    with arguments, and objects whose keys are no strings.

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
        return dict_validator(part(arguments[1])) if arguments[0] in (str, Any) else of_class(annotation)
    if kind is float:
        return validate_number
    if kind is int and validate_integer is not None:
        return validate_integer
    if json_type(kind) is not None:
        return type_validator(kind)
    return accept if kind is Any else of_class(annotation)


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
                errors.append(error.with_traceback(None))  # Which refers to this frame.
        raise union_error(errors, is_nullable=is_nullable)

    return validate


def union_error(errors: list[ValidationError], *, is_nullable: bool) -> ValidationError:
    """Return the error of a value that no branch of a union accepts, and forget those of the branches.

    The traceback of the one that is raised refers to the frame that holds them.
    """
    of_the_right_type = [error for error in errors if not error.kinds]
    kinds = [kind for error in errors for kind in error.kinds]
    errors.clear()
    if of_the_right_type:
        return max(of_the_right_type, key=lambda error: len(error.path))
    return ValidationError.of_type(*kinds, *[types.NoneType] * is_nullable)


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
PAYLOADS = "input|output|detail|piece|answer|message"
# As most fields are before the payload: strings without escapes, and numbers. No two parts match the same character, so
# that the group need not be possessive: before Python 3.11.5, one that is ends too early (python/cpython#106052).
PLAIN_FIELDS = (
    rf'(?:{SPACE}"(?!(?:type|{PAYLOADS})")[^"\\]*+"{SPACE}:{SPACE}'
    rf'(?:"[^"\\]*+"|[-+.0-9a-zA-Z]++){SPACE},)*{SPACE}'
)
# The beginning of a message up to its first payload, as most are: its type first.
HEAD_OF_PAYLOAD = re.compile(
    rf'{SPACE}\{{{SPACE}"type"{SPACE}:{SPACE}"([a-z]+)"{SPACE},{PLAIN_FIELDS}"({PAYLOADS})"{SPACE}:{SPACE}'
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
        payloads = {message: payload_names(message) for message in typing.get_args(union)}
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
                rest = len(raw)
                for name in payloads[message.__class__]:
                    rest -= len(getattr(message, name) or b"")
                if rest > 2 * depth_max and looks_suspicious(raw):
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


CONSTANTS = b"NaN", b"-Infinity", b"Infinity"


def constant_in(raw: bytes) -> bytes | None:
    """Return a NaN or infinity that some JSON holds outside its strings, else None."""
    if b"NaN" not in raw and b"Infinity" not in raw:
        return None
    outside = outside_strings(without_escapes(raw))
    return next((constant for constant in CONSTANTS if constant in outside), None)


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
    payloads = {message: payload_names(message) for message in typing.get_args(union)}
    names_by_type = {type_of(message): names for message, names in payloads.items()}

    def parse(raw: bytes) -> Any:
        if len(raw) < LARGE_BYTES or not gc.isenabled():
            return parse_now(raw)
        gc.disable()  # Each run of the collector would visit all parts made so far.
        try:
            return parse_now(raw)
        except ValidationError as error:
            error.__context__ = None  # Its frames hold all parts, which must be gone before the collector is back.
            raise error.with_traceback(None) from None
        finally:
            gc.enable()

    def parse_now(raw: bytes) -> Any:
        text = text_in(raw)
        if nests_deeper_than(raw, depth_max):  # Before it is parsed, which would take long.
            head = HEAD_OF_PAYLOAD.match(text)
            where = head[2] if head is not None and head[2] in names_by_type.get(head[1], ()) else "message"
            raise ValidationError(f"is nested more than {DEPTH_MAX} deep", where)
        found = find_payload(text, names_by_type)
        message = read(text if found is None else f"{text[: found.start]}null{text[found.end :]}")
        constant = constant_in(raw)  # Also in a field that no message has, where Pydantic ignores it.
        try:
            for name in payloads[type(message)]:
                one = found if found is not None and found.name == name else None
                if one is None and getattr(message, name) is not None:
                    one = last_member(text, name)
                payload = None
                if one is not None and one.value is not None:
                    payload = text[one.start : one.end].encode()
                    if constant is not None and constant_in(payload) is not None:  # Before a walk that is as long.
                        raise ValidationError("holds a number that is not finite", name)
                    if type(one.value) not in SCALARS:
                        if depth_max > DEPTH_MAX + 1 and nests_deeper_than(payload, DEPTH_MAX):
                            raise ValidationError(f"is nested more than {DEPTH_MAX} deep", name)
                        if may_hold_large_number(without_long_texts(payload)):
                            check_payload(name, payload)
                setattr(message, name, payload)
            if constant is not None:
                raise ValidationError(f"Invalid JSON: {constant.decode()} is not a number in JSON")
            return message
        except ValidationError as error:
            error.document = {name: getattr(message, name, None) for name in ("id", "reply_to")}
            raise

    return parse


class Member(NamedTuple):
    """The value of a field at the top level of some JSON, and where in the text that is."""

    name: str
    value: Any
    start: int
    end: int


def find_payload(text: str, names_by_type: Mapping[str, Collection[str]]) -> Member | None:
    """Return the first payload of a message; None if it has none, or if it is not written as most are."""
    head = HEAD_OF_PAYLOAD.match(text)
    if head is None or head[2] not in names_by_type.get(head[1], ()):
        return None
    try:
        value, end = scan_json(text, head.end())
    except (ValueError, RecursionError) as error:
        raise not_json(error) from None
    tail = text[end:]
    may_occur_again = f'"{head[2]}"' in tail or '"type"' in tail or "\\" in tail
    return None if may_occur_again else Member(head[2], value, head.end(), end)


def last_member(text: str, name: str) -> Member:
    """Return the last field of that name in a text that is a JSON object and has one."""
    found = None
    separator = NEXT_FIELD.match(text)
    while separator is not None and separator.end() < len(text) and text[separator.end()] == '"':
        key, end = scan_json(text, separator.end())
        start = NEXT_VALUE.match(text, end).end()  # type: ignore[union-attr]  # the text is a JSON object
        value, end = scan_json(text, start)
        if key == name:
            found = Member(name, value, start, end)
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
            branches = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
            optional = [branch for branch in branches if branch is not types.NoneType]
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


def encode(message: AgentMessage | HubOutput | TaskInfo) -> bytes:
    """Return a message, or a part of one, as it goes over the wire; raise ValueError if a payload in it is not JSON."""
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
    if type(value) is list:
        return f"[{','.join(map(field_text, value))}]"
    try:
        return ENCODERS[type(value)](value).decode() if is_part(type(value)) else write_json(value)
    except ValueError:  # It may hold numbers that are not finite, which another hub sent: they become null.
        text = json.dumps(value, default=_fields_of)
        return write_json(json.loads(text, parse_constant=lambda constant: None))


def is_part(kind: type) -> bool:
    """Return whether `kind` is a message, or a part of one, and not a class of somebody's own."""
    return kind.__module__ == __name__ and dataclasses.is_dataclass(kind)


def _fields_of(part: Any) -> dict[str, Any]:
    """Return the fields of a message's part that are written."""
    if not is_part(type(part)):
        raise TypeError(f"{type(part).__name__} is not JSON")
    return {name: value for name in field_names(part.__class__) if (value := getattr(part, name)) is not None}


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


def payload_names(message: type) -> list[str]:
    """Return the names of the fields whose JSON the hub passes on without reading it."""
    return [one.name for one, hint in hints_of_fields(message) if hint == Json]


def type_of(message: type) -> str:
    """Return the `type` of the messages of a class."""
    return str(next(one.default for one in dataclasses.fields(message) if one.name == "type"))


# What shows in the bytes. Walking through a parsed value in Python takes longer than parsing it did.

LEVEL_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # As signed bytes: what a bracket adds to the depth.
NOT_MARKS = bytes(set(range(256)) - set(b'[]{}"'))


def check_payload(name: str, payload: bytes) -> None:
    """Raise ValidationError if the payload in a field, not nested too deep, is not JSON that every language reads."""
    # Without its names, an object keeps the values of fields that occur again: they are passed on too.
    values = json.loads(payload, object_pairs_hook=lambda pairs: [value for _, value in pairs])
    try:
        check_json(values)
    except ValidationError as error:
        raise error.within(name) from None


def looks_suspicious(payload: bytes) -> bool:
    """Return whether a payload may be nested too deep or hold a number that is too large, so that a look is needed."""
    if len(payload) > 1024:
        payload = without_long_texts(payload)
    return nests_deeper_than(payload, DEPTH_MAX) or may_hold_large_number(payload)


def without_long_texts(payload: bytes) -> bytes:
    """Return some JSON without its strings if it is mostly a few long ones, else as it is."""
    is_mostly_text = payload.count(b",") < len(payload) // 256
    return outside_strings(without_escapes(payload)) if is_mostly_text else payload


def without_escapes(raw: bytes) -> bytes:
    """Return some JSON without its escaped quotes and backslashes: each quote in it begins or ends a string."""
    return raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw


def outside_strings(raw: bytes) -> bytes:
    """Return what is not in a string, of some JSON without escaped quotes: every second part."""
    return b"".join(raw.split(b'"')[::2])


def may_hold_large_number(raw: bytes) -> bool:
    """Return whether some JSON may hold an integer beyond 64 bits or a number like 1e999; False is certain.

    Those have 19 digits in a row, or an exponent of three. Many strings have too: one in nine random ids of eight
    hexadecimal digits.
    """
    shapes = raw.translate(NUMBER_SHAPES)
    if b"0e000" not in shapes and b"0" * 19 not in shapes:
        return False
    shapes = outside_strings(without_escapes(raw)).translate(NUMBER_SHAPES)
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
    steps = outside_strings(marks.replace(b'""', b"")).translate(LEVEL_STEPS)
    return max(itertools.accumulate(memoryview(steps).cast("b")), default=0) > depth


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
        kinds = {type(one) for one in arguments}
        return {"enum": list(arguments)} | (schema_of(kinds.pop()) if len(kinds) == 1 else {})
    if kind is list and arguments:
        return {"items": schema_of(arguments[0], of_class), "type": "array"}
    if kind is dict and arguments:
        return {"additionalProperties": schema_of(arguments[1], of_class) or True, "type": "object"}
    name = json_type(kind)
    if name is not None:
        return {"type": name}
    return {} if kind is Any else of_class(annotation)


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


SCHEMA_STEPS_MAX = 20_000  # Of checking one value, 13 µs each: the schema of another agent may branch without end.
SCHEMA_DEPTH_MAX = 2 * DEPTH_MAX  # References in a row, and levels of the value.
SCHEMA_LIMITS = (
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("minLength", "maxLength", "minItems", "maxItems"),
)


class SchemaCheck:
    """Checks JSON against a JSON Schema, by the keywords that annotations become and some more.

    Others are ignored: so is `pattern`, because a regular expression of another agent may take forever.
    """

    def __init__(self, schema: Any) -> None:
        self._root = schema
        self._steps_left = SCHEMA_STEPS_MAX

    def check(self, value: Any) -> Any:
        """Return `value`. Raises ValidationError, which names the wrong part."""
        self._check(value, self._root, 0)
        return value

    def _check(self, value: Any, schema: Any, depth: int) -> None:
        self._steps_left -= 1
        if self._steps_left < 0 or depth > SCHEMA_DEPTH_MAX:
            raise ValidationError("cannot be checked: its schema branches or refers to itself too often")
        if schema is False:
            raise ValidationError("is not allowed")
        if not isinstance(schema, dict):
            return
        self._check_scalar(value, schema)
        self._check_branches(value, schema, depth + 1)
        if isinstance(value, dict):
            self._check_object(value, schema, depth + 1)
        elif isinstance(value, list | tuple):
            self._check_items(value, schema, depth + 1)

    def _check_scalar(self, value: Any, schema: dict[str, Any]) -> None:
        kinds = schema.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds] if isinstance(kinds, str) else []
        if kinds and not any(is_of_schema_type(value, kind) for kind in kinds):
            raise ValidationError(f"must be of type {' or '.join(map(str, kinds))}")
        literals = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(literals, list) and not any(is_same_json(value, one) for one in literals):
            raise ValidationError(f"must be one of {json.dumps(literals, ensure_ascii=False)}")
        problem = None
        given = {keyword: limit for keyword in SCHEMA_LIMITS if is_number(limit := schema.get(keyword))}
        if given and is_number(value):
            limit = Limit(gt=given.get("exclusiveMinimum"), ge=given.get("minimum"), le=given.get("maximum"))
            problem = limit.problem_of_number(value)
            if problem is None and value >= given.get("exclusiveMaximum", math.inf):
                problem = f"must be less than {given['exclusiveMaximum']}"
        elif given and isinstance(value, str | list | tuple):
            unit = "Length" if isinstance(value, str) else "Items"
            least, most = given.get(f"min{unit}", 0), given.get(f"max{unit}", math.inf)
            if not least <= len(value) <= most:
                problem = f"must have {least} to {most} {'characters' if isinstance(value, str) else 'items'}"
                problem = problem.replace(" to inf", " or more")
        if problem is not None:
            raise ValidationError(problem)

    def _check_branches(self, value: Any, schema: dict[str, Any], depth: int) -> None:
        if "$ref" in schema:
            self._check(value, self._target(schema["$ref"]), depth)
        for branch in list_in(schema, "allOf"):
            self._check(value, branch, depth)
        for keyword, fits_max in (("anyOf", math.inf), ("oneOf", 1)):
            fits, errors = 0, []
            for branch in list_in(schema, keyword):
                try:
                    self._check(value, branch, depth)
                    fits += 1
                except ValidationError as error:
                    errors.append(error)
            if errors and not fits:
                raise max(errors, key=lambda error: len(error.path))
            if fits > fits_max:
                raise ValidationError("fits more than one branch of its schema")

    def _target(self, reference: Any) -> Any:
        """Return the part of the schema that a reference leads to, as `#/$defs/Name`; anything fits one that is not."""
        target = self._root
        for step in str(reference).removeprefix("#").split("/")[1:]:
            target = target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
        return target if str(reference).startswith("#") else None

    def _check_object(self, value: dict[str, Any], schema: dict[str, Any], depth: int) -> None:
        for name in list_in(schema, "required"):
            if isinstance(name, str) and name not in value:
                raise ValidationError("is required", name)
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        for name, item in value.items():
            try:
                self._check(item, properties.get(name, schema.get("additionalProperties", True)), depth)
            except ValidationError as error:
                raise error.within(name if name in properties else "*") from None

    def _check_items(self, value: Collection[Any], schema: dict[str, Any], depth: int) -> None:
        heads = list_in(schema, "prefixItems")
        for index, item in enumerate(value):
            try:
                self._check(item, heads[index] if index < len(heads) else schema.get("items", True), depth)
            except ValidationError as error:
                raise error.within(str(index)) from None


def list_in(schema: dict[str, Any], keyword: str) -> list[Any]:
    """Return the list that a keyword of a schema has; an empty one if it has something else."""
    listed = schema.get(keyword)
    return listed if isinstance(listed, list) else []


def is_of_schema_type(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type of JSON Schema. One that does not exist fits all."""
    if kind == "number":
        return is_number(value)
    if kind == "integer":
        return is_number(value) and (isinstance(value, int) or value.is_integer())
    kinds = [one for one, name in JSON_TYPES.items() if name == kind]
    return not kinds or isinstance(value, tuple(kinds)) or (kind == "array" and isinstance(value, tuple))


def is_same_json(one: Any, other: Any) -> bool:
    """Return whether two values are the same JSON: 1 is 1.0, but not true."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


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
    RETRIED = "retried"  # Its assignee is gone, and a retry is left; or it has not begun the task.
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
LAST_EVENTS = {  # By what they led to; TaskRecord.last_event knows those that have no state of their own.
    TaskState.COMPLETED: TaskEvent.SUCCEEDED,
    TaskState.FAILED: TaskEvent.ERRED,
    TaskState.TIMEOUT: TaskEvent.EXPIRED,
}
# Used for every task: before Python 3.12, reading an enum member costs as much as a call.
PENDING, IN_PROGRESS = TaskState.PENDING, TaskState.IN_PROGRESS
ASSIGNED, SUCCEEDED = TaskEvent.ASSIGNED, TaskEvent.SUCCEEDED


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
#     AgentRecord.running                     TaskTable.assign, Hub._settle, _retry
#     PendingTasks.queues, by_requester,     PendingTasks.push, discard, take_turn
#       AgentRecord.awaited
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
log_tasks = logging.getLogger("agenthub.tasks")  # A line for each task that ends, at the level set for this logger.

TICK_BATCH = 1000  # Tasks that one call ends or hands on: about 10 ms, so that messages are not held up.
LIST_SCAN_MAX = 100_000  # Records that one list of tasks looks at.
WAITING_MAX = 10  # Requesters in the status of the hub: those with the most pending tasks.
RECORD_BYTES = 1024  # The memory of a task's record without its payloads (tests/test_hub.py measures it).
DEPTH_OF_CHILDREN_MAX = 16
STEPS_MAX = 14  # Of a task's history, which has its acceptance and its end besides.
FEATURES = ["ask", "stream", "trace"]  # What this hub knows that not every hub does.
SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)  # The bounds of a Histogram.
BUCKETS = [f'_bucket{{le="{bound}"}}' for bound in (*SECONDS, "+Inf")]
LONGEST_QUEUES = 20  # Capabilities in the status and the metrics: those with the most tasks pending, or in progress.
QUEUES_SCANNED_MAX = 10_000  # ... of so many at most.
REASON_LOGGED_MAX = 200  # Characters of the text of a refusal.
TRIES_MAX = 3  # Wrong secrets, or messages without a token, before a connection is closed.
SCHEMAS_BYTES_MAX = 65_536  # Of all capabilities of one agent.
DESCRIPTIONS_BYTES_MAX = 65_536  # Of one agent and all its capabilities.
WORDS_MAX = 1000  # Distinct words of one agent's descriptions that `discover` finds.
# An agent's registration counts among the records with what it takes in memory beyond the first AGENT_BYTES:
AGENT_BYTES = 20_000
JSON_FACTOR = 14  # ... so much for a byte of its metadata and schemas, which are held as many small objects,
CAPABILITY_BYTES = 1500  # ... so much for a capability,
WORD_BYTES = 200  # ... and so much for a word that it is found by. tests/test_hub.py measures all three.
SILENCE_LATE_S = 0.01  # A silence that is found later than this is judged once more,
DOUBT_S = 2.0  # after this long, within which the messages are read that waited in the sockets of a stopped hub.
COMPARED_BYTES_MAX = 16_384  # Of an input; larger ones are the same only byte for byte.
BROADCAST_BYTES_MAX = 134_217_728  # To all recipients together: with TLS, sending them takes about 0.2 s at once.
AWAY_MAX = 1000  # Agents without a connection that came from one address.
ONLINE_S_LONGEST = 999_999_999.999  # No other time since an agent came online takes more characters.
REQUESTER_SHARE = 0.5  # Of `records_bytes_max`, for the open tasks and undelivered outcomes of one requester.
INDEX_MAX = 250_000  # Entries in each of the two indexes of `discover`; one takes 400 bytes at most.
# A message costs 1, for the rate limit, and 1 more for each ...
COST_BYTES = 16_384  # ... bytes of it,
COST_AGENTS = 25  # ... agents that `discover` scans,
COST_TASKS = 10  # ... tasks that `status` lists,
COST_SCANNED = 1000  # ... records that it looks at for one state, or counts for the status of the hub,
COST_REFS = 64  # ... running tasks that the reply to `register` lists,
COST_STEPS = 5  # ... tasks that are handed out, end or are handed on because of it,
COST_COMPARED_BYTES = 256  # ... bytes of inputs that are parsed to compare them.
COST_RECIPIENTS = 50  # Of a broadcast; for the rate limit, each is a message.
KNOWN_CODES = frozenset(map(str, Code))  # Each is counted by itself, all others together;
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
            if not is_number(number):
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
    def passed_on_max(self) -> int:
        """The bytes of the largest message that the hub passes on."""
        return self.message_bytes_max - self.envelope_bytes

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


# An event, the agent that had a part in it, the attempt, and the seconds since the task was accepted.
LifeStep = tuple[str, str, int, float]


def last_begun_s(steps: tuple[LifeStep, ...]) -> float:
    """Return when the last attempt began, or the first of its steps that are kept was."""
    return next((step[3] for step in reversed(steps) if step[0] == ASSIGNED), steps[0][3] if steps else 0.0)


@record
class Talk:
    """A question of a task's worker, and its answer (None: not yet). A repeated one has the same `message_id`."""

    ask: int
    message_id: str | None
    question: Question
    answer: bytes | None = None
    bytes: int = 0  # Of both, as they are counted in the task's record.


class TaskLife(NamedTuple):
    """What a journal keeps of a task beside its state."""

    steps: tuple[LifeStep, ...] = ()
    asked: int = 0
    talk: Talk | None = None


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
    pieces: int = 0  # Of its output, passed on so far.
    asked: int = 0  # Questions so far; counted on over all attempts.
    talk: Talk | None = None  # The last question of the present attempt.
    begun_at: float = 0.0  # When its last attempt began.
    listed_steps: tuple[LifeStep, ...] | None = None  # None while its first assignment is all that has happened.

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

    def ask_reply(self, reply_to: str) -> StatusReply:
        """Return the reply to its question, with the number of that."""
        return StatusReply(
            reply_to=reply_to, task_id=self.task_id, state=self.state, attempt=self.attempt, ask=self.asked
        )

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
            answers=request.answers,
            trace=request.trace,
        )

    def progress_report(self, piece: Any = None) -> StatusReply:
        """Return the message that passes its progress, or a piece of its output, on to its requester."""
        return StatusReply(
            task_id=self.task_id,
            state=self.state,
            attempt=self.attempt,
            sender=self.assignee.agent_id if self.assignee is not None else None,
            seq=self.seq,
            progress=self.progress if piece is None else None,
            detail=self.detail if piece is None else None,
            piece=piece,
        )

    def add_step(self, event: str, agent: AgentRecord, now: float) -> None:
        """Note a step between its acceptance and its end, in which an agent had a part."""
        steps = self.steps
        step = event, agent.agent_id, self.attempt, now - self.accepted_at
        self.listed_steps = (*steps[1:], step) if len(steps) == STEPS_MAX else (*steps, step)

    @property
    def steps(self) -> tuple[LifeStep, ...]:
        """The steps between its acceptance and its end, the last STEPS_MAX.

        Most tasks are only assigned once. So that step is not listed until another follows.
        """
        if self.listed_steps is not None:
            return self.listed_steps
        if self.assignee is None:
            return ()
        return ((ASSIGNED, self.assignee.agent_id, 1, self.begun_at - self.accepted_at),)

    def history(self, now: float) -> list[TaskStep]:
        """Return its life so far: its acceptance, what happened then, and its end."""
        age_s = now - self.accepted_at
        steps = [("accepted", self.requester.agent_id, 0, 0.0), *self.steps]
        history = [
            TaskStep(event=event, agent_id=agent_id, attempt=attempt, at_s=round(age_s - at, 3))
            for event, agent_id, attempt, at in steps
        ]
        if self.state in FINAL_STATES:
            ender = self.settled_by.agent_id if self.settled_by is not None else None
            at_s = round(now - self.ended_at, 3)
            history.append(TaskStep(event=self.last_event, agent_id=ender, attempt=self.attempt, at_s=at_s))
        return history

    @property
    def last_event(self) -> TaskEvent:
        """The event that ended it."""
        code = self.error.code if self.error is not None else None
        if code == Code.AGENT_LOST:
            return TaskEvent.LOST
        if code == Code.CANCELLED and self.settled_by is None:
            return TaskEvent.CANCELLED
        return LAST_EVENTS[self.state]

    @property
    def question(self) -> Talk | None:
        """The question that waits for an answer."""
        return self.talk if self.talk is not None and self.talk.answer is None else None

    @property
    def has_answer(self) -> bool:
        """Whether the last question of its present attempt was answered."""
        return self.talk is not None and self.talk.answer is not None

    def question_report(self) -> StatusReply:
        """Return the message that passes its question on to its requester."""
        if self.talk is None:
            raise AssertionError("it has no question")
        return StatusReply(
            task_id=self.task_id,
            state=self.state,
            attempt=self.attempt,
            sender=self.assignee.agent_id if self.assignee is not None else None,
            ask=self.talk.ask,
            question=self.talk.question,
        )

    def answer_delivery(self) -> TaskAnswer:
        """Return the message that passes the answer on to its assignee."""
        if self.talk is None:
            raise AssertionError("it has no answer")
        return TaskAnswer(
            task_id=self.task_id,
            state=self.state,
            attempt=self.attempt,
            sender=self.requester.agent_id,
            ask=self.talk.ask,
            answer=self.talk.answer,
        )

    def check_party(self, agent: AgentRecord, party: AgentRecord | None) -> None:
        """Refuse a message that only one of its two parties may send."""
        if agent is not party:
            role = "requester" if party is self.requester else "assignee"
            raise Refused(f"this agent is not the {role} of that task", code=Code.NOT_ASSIGNED)

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
            life=TaskLife(self.steps, self.asked, self.talk),
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
    connection: Connection | None = None  # While it is online or draining, ...
    online_at: float = 0.0  # ... and since when.
    drain_id: str | None = None  # The id of its request to drain, until the hub replies to it.
    name: str = ""
    description: str = ""
    capabilities: dict[str, Capability] = field(default_factory=dict)
    words: dict[str, None] = field(default_factory=dict)  # Of the descriptions, in lower case, while it can be found.
    max_tasks: int = 1
    occupied: int = 0  # Of these, how many the agent needs for handlers whose task has ended.
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
    questions: dict[str, TaskRecord] = field(default_factory=dict)  # Requested, with a question that waits for it.
    undelivered: dict[str, TaskRecord] = field(default_factory=dict)  # Ended while it was disconnected or gone.
    delivered: int = 0  # Records kept whose outcome was sent to it, which does not mean that it arrived.

    @property
    def free_load(self) -> int | None:
        """How many tasks it runs, if it can take one more; else None."""
        load = len(self.running) + self.occupied
        return load if load < self.max_tasks and self.state is ONLINE else None

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

    def info(self, now: float) -> AgentInfo:
        return AgentInfo(
            self.agent_id,
            self.name,
            self.description,
            list(self.capabilities.values()),
            len(self.running),
            self.max_tasks,
            self.metadata,
            round(now - self.online_at, 3),
        )

    def session(self, reply_to: str, settings: HubSettings) -> Registered:
        """Return the reply to its registration."""
        return Registered(
            reply_to=reply_to,
            agent_id=self.agent_id,
            resume=self.resume,
            heartbeat_s=settings.heartbeat_s,
            max_bytes=settings.message_bytes_max,
            tasks=[TaskRef(task.task_id, task.attempt) for task in self.running.values()],
            features=FEATURES,
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
    is_doubted: bool = False  # It was found silent, but late; it is closed if it is still silent after DOUBT_S.
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
    life: TaskLife = TaskLife()


@part
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

    def __len__(self) -> int:
        return sum(map(len, self.by_requester.values()))

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


class PendingTasks:
    """The pending tasks, each in the queue of its target, and whose turn is next over all queues.

    `agents` are the directory's, by id. The tasks that name one of them are kept in its `awaited`.
    """

    def __init__(self, agents: Mapping[str, AgentRecord]) -> None:
        self.queues: dict[tuple[str | None, str | None], PendingQueue] = {}  # By `TaskRecord.target`; none is empty.
        self.by_requester: dict[AgentRecord, int] = {}  # How many; none is 0.
        self._turn = 0  # How many tasks were handed out of the queues.
        self._agents = agents

    def push(self, task: TaskRecord) -> None:
        queue = self.queues.get(task.target)
        if queue is None:
            queue = self.queues[task.target] = PendingQueue()
        queue.push(task, self._turn)
        self.by_requester[task.requester] = self.by_requester.get(task.requester, 0) + 1
        named = self._agents.get(task.request.agent_id or "")
        if named is not None:
            named.awaited[task.task_id] = task

    def discard(self, task: TaskRecord) -> None:
        queue = self.queues[task.target]
        queue.discard(task)
        if not queue:
            del self.queues[task.target]
        self.by_requester[task.requester] -= 1
        if not self.by_requester[task.requester]:
            del self.by_requester[task.requester]
        named = self._agents.get(task.request.agent_id or "")
        if named is not None:
            named.awaited.pop(task.task_id, None)

    def first_for(self, agent: AgentRecord) -> TaskRecord | None:
        """Return the task that an agent gets next, if one waits that it may take."""
        best = None
        for target, excluded in agent.targets():
            queue = self.queues.get(target)
            first = queue.first(excluded) if queue is not None else None
            if first is not None and (best is None or first < best):
                best = first
        return best[1] if best is not None else None

    def take_turn(self, task: TaskRecord, agent: AgentRecord) -> None:
        """Take a task out for an agent; in all queues of that agent the requester goes behind the others."""
        self.discard(task)
        self._turn += 1
        for target, _ in agent.targets():
            queue = self.queues.get(target)
            if queue is not None:
                queue.take_turn(task.requester, self._turn)

    def longest(self) -> dict[str, int]:
        """Return how many tasks wait for whom offers a capability, for those with most of them."""
        waiting: dict[str, int] = {}
        for (_, capability), queue in itertools.islice(self.queues.items(), QUEUES_SCANNED_MAX):
            if capability is not None:
                waiting[capability] = waiting.get(capability, 0) + len(queue)
        return largest(waiting, LONGEST_QUEUES)

    def most(self) -> dict[str, int]:
        """Return how many tasks wait, by the ids of the requesters that have most of them."""
        return {agent.agent_id: waiting for agent, waiting in largest(self.by_requester, WAITING_MAX).items()}


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

    __slots__ = ("_by_key", "_unlisted", "listed_count")

    def __init__(self) -> None:
        self._by_key: dict[str, dict[Item, None]] = {}
        self.listed_count = 0  # Items under keys, at most INDEX_MAX.
        self._unlisted: dict[Item, None] = {}  # Items that did not fit.

    def __len__(self) -> int:
        return self.listed_count + len(self._unlisted)

    def add(self, item: Item, keys: Collection[str]) -> None:
        if self.listed_count + len(keys) > INDEX_MAX:
            self._unlisted[item] = None
            return
        for key in keys:
            self._by_key.setdefault(key, {})[item] = None
        self.listed_count += len(keys)

    def drop(self, item: Item, keys: Collection[str]) -> None:
        """Remove an item that was added with these keys, or not at all."""
        if item in self._unlisted:
            del self._unlisted[item]
            return
        for key in keys:
            del self._by_key[key][item]
            if not self._by_key[key]:
                del self._by_key[key]
        self.listed_count -= len(keys)

    def candidates(self, keys: Iterable[str]) -> list[Item]:
        """Return the items that may have all these keys, at least one of them: those with the rarest."""
        return [*min((self._by_key.get(key, {}) for key in keys), key=len), *self._unlisted]


class CapabilityIndex:
    """Finds agents by the names of their capabilities and the words of their descriptions, without scanning them all.

    Names are looked up by their trigrams, as in pg_trgm of PostgreSQL: a keyword of three characters or more is part of
    a name only if the name has all trigrams of the keyword. The candidates with the rarest one are then compared.
    """

    __slots__ = ("_pools", "by_part", "by_word", "scanned")

    def __init__(self) -> None:
        self._pools: dict[str, Pool] = {}
        self.by_part: InvertedIndex[Pool] = InvertedIndex()
        self.by_word: InvertedIndex[AgentRecord] = InvertedIndex()
        self.scanned = 0  # Names and agents, by the last search.

    def __len__(self) -> int:
        return len(self._pools) + len(self.by_part) + len(self.by_word)

    def add_pool(self, pool: Pool) -> None:
        self._pools[pool.name] = pool
        self.by_part.add(pool, trigrams(pool.lower_name))

    def drop_pool(self, pool: Pool) -> None:
        del self._pools[pool.name]
        self.by_part.drop(pool, trigrams(pool.lower_name))

    def add_agent(self, agent: AgentRecord) -> None:
        self.by_word.add(agent, agent.words)

    def drop_agent(self, agent: AgentRecord) -> None:
        self.by_word.drop(agent, agent.words)

    def ranks(self, keyword: str) -> dict[AgentRecord, int]:
        """Return the rank of each agent that matches a keyword in lower case: 0 is best, 3 a word of a description."""
        agents = self.by_word.candidates([keyword])
        ranks = {agent: 3 for agent in agents if keyword in agent.words}
        parts = trigrams(keyword)
        pools = self.by_part.candidates(parts) if parts else list(self._pools.values())
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
        self.states = dict.fromkeys(AgentState, 0)  # How many of them are in each state.
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

    def take_changes(self, changes: Changes) -> None:
        """Add the rows of the agents that changed since the last step."""
        for agent, is_kept in self.changed.items():
            changes.agents[agent.agent_id] = agent.row() if is_kept else None
        self.changed = {}

    def transition(self, agent: AgentRecord, event: AgentEvent) -> None:
        """Take one step of the table. Nothing else assigns an agent's state; pools and index follow it here."""
        state = next_agent_state(agent.state, event)
        self.states[agent.state] -= 1
        self.states[state] += 1
        agent.state = state
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
        self.states[agent.state] += 1
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
        agent.occupied = message.occupied
        agent.capabilities = {one.name: one for one in offered}
        largest = agent.info(agent.online_at + ONLINE_S_LONGEST)
        agent.info_bytes = len(encode(Discovered(agents=[largest], total=1)))
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
        self.states[agent.state] += 1
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
        self.states[agent.state] -= 1
        self._leave_origin(agent)
        self._count_bytes(agent, 0)
        self.mark(agent, is_kept=False)

    def update_load(self, agent: AgentRecord, is_listed: bool = True) -> None:
        """List an agent in its pools under its present load; unless `is_listed`, it is offered no task until then."""
        old, new = agent.load, agent.free_load if is_listed else None
        if new != old:
            for pool in agent.pools:
                pool.move(agent, old, new)
            agent.load = new

    def free_agent(self, task: TaskRecord, avoiding: AgentRecord | None) -> AgentRecord | None:
        """Return an agent that can take a task now: the one to avoid only as a last choice.

        A task by capability never goes to its own requester; one that names an agent may.
        """
        agent_id, capability = task.request.agent_id, task.request.capability
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

    def search(self, keyword: str, limit: int, bytes_max: int, now: float) -> tuple[list[AgentInfo], int, int]:
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
                found.append(agent.info(now))
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
        self.update_load(agent, is_listed=False)
        for pool in agent.pools:
            del pool.members[agent.agent_id]
            if not pool.members:
                del self.pools[pool.name]
                self.index.drop_pool(pool)
        self.index.drop_agent(agent)
        agent.pools, agent.words = [], {}


class Histogram:
    """How many durations fell between the bounds of SECONDS, the last ones above them all, and their sum."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum_s += seconds


class TaskTable:
    """The records of all tasks, each in one of three dictionaries, with their counts and sizes.

    `open` are those not in a final state, in the order of acceptance. A task that ends moves on to `delivered` if its
    outcome was sent (or nobody is left to send it to), or else to `undelivered` until its requester is back; both are
    in the order of their ends, so that the oldest go first. Requesters, parents and the counts are kept in step here;
    the Hub decides which agent runs a task.
    """

    def __init__(self, settings: HubSettings, directory: Directory, *, is_journaled: bool) -> None:
        self.settings = settings
        self._directory = directory
        self.open: dict[str, TaskRecord] = {}
        self.delivered: dict[str, TaskRecord] = {}
        self.undelivered: dict[str, TaskRecord] = {}
        self.pending_count = 0
        self.running: dict[str | None, int] = {}  # How many tasks are in progress, by capability.
        self.ended = {state: 0 for state in TaskState if state in FINAL_STATES}  # How many ever have, by state,
        self.dropped = dict(self.ended)  # ... and of these, how many whose record is gone.
        self.codes: dict[tuple[TaskState, str], int] = {}  # Of those that did not succeed, by state and code.
        self.restored = 0  # The sequence of the last task that a journal has kept.
        self.queued = 0  # How many tasks could not be assigned when they were accepted.
        self.queued_s = Histogram()  # From the acceptance of each of these to its first assignment,
        self.ran_s = Histogram()  # ... and from the last assignment of each task to its end.
        self.bytes = 0  # Of all records, ...
        self.ended_bytes = 0  # ... and of those that have ended, which may be dropped to make room.
        self.bytes_max = settings.records_bytes_max
        self.sequence = 0  # Of the task accepted last.
        self.changed: dict[TaskRecord, bool] = {}  # Since the last step; False if the record was dropped.
        self._is_journaled = is_journaled

    def find(self, task_id: str) -> TaskRecord | None:
        return self.open.get(task_id) or self.delivered.get(task_id) or self.undelivered.get(task_id)

    def known_task(self, task_id: str) -> TaskRecord:
        """Return a task; refuse an id that is not known."""
        task = self.find(task_id)
        if task is None:
            raise Refused("task_id: unknown to this hub; its record may have expired", code=Code.UNKNOWN_TASK)
        return task

    def open_task(self, task_id: str) -> TaskRecord:
        """Return a task that has not ended; refuse any other."""
        task = self.open.get(task_id)
        if task is None:
            self.known_task(task_id)
            raise Refused("that task has already ended", code=Code.TASK_OVER)
        return task

    def parent(self, agent: AgentRecord, parent_id: str) -> TaskRecord:
        """Return the task that an agent may delegate a subtask of."""
        parent = self.open.get(parent_id)
        if parent is None or parent.assignee is not agent:
            raise Refused("parent_id: this agent is not the assignee of that task", code=Code.NOT_ASSIGNED)
        if parent.depth >= DEPTH_OF_CHILDREN_MAX:
            raise Refused(f"parent_id: subtasks nest at most {DEPTH_OF_CHILDREN_MAX} deep", code=Code.TOO_DEEP)
        return parent

    def newest(self, message: Status, now: float, bytes_max: int) -> tuple[list[Any], int]:
        """List the open tasks, those with an outcome to deliver, and the others, the newest first, as many as fit and
        are asked for. Return the list, and how many records were looked at for it.

        Each is the JSON text of a TaskInfo: its size is needed here, so the reply does not write it again.
        """
        kept = (self.open, self.undelivered, self.delivered)
        records = itertools.chain.from_iterable(reversed(tasks.values()) for tasks in kept)
        left = min(message.limit, self.total(message.state))
        listed: list[bytes] = []
        scanned = 0
        for scanned, task in enumerate(itertools.islice(records, LIST_SCAN_MAX), 1):
            if message.state is not None and task.state != message.state:
                continue
            listed.append(encode(TaskInfo(**task.info_fields(now))))
            bytes_max -= len(listed[-1]) + 1  # And a comma.
            if bytes_max < 0:
                return listed[:-1], scanned
            if len(listed) == left:
                break
        return listed, scanned

    def report(self, task: TaskRecord, viewer: AgentRecord | None, reply_to: str | None, now: float) -> StatusReply:
        """Return what the viewer may see of a task, as much as fits into one message: its output always does."""
        full = StatusReply(
            reply_to=reply_to,
            **task.info_fields(now),
            seq=task.seq or None,
            pieces=task.pieces or None,
            history=task.history(now),
        )
        if viewer is None or viewer not in (task.requester, task.assignee):
            return full
        if task.question is not None:
            full.ask, full.question = task.question.ask, task.question.question
        full.input, full.detail, full.output, full.error = task.request.input, task.detail, task.output, task.error
        lean = dataclasses.replace(full, input=None, detail=None)
        for report in (full, lean):
            if task.bytes <= self.settings.passed_on_max or len(encode(report)) <= self.settings.message_bytes_max:
                return report
        return task.least_report(reply_to)

    def total(self, state: str | None) -> int:
        """Return how many tasks are kept, in a state or in all."""
        return len(self) if state is None else self.counts[TaskState(state)]

    @property
    def counts(self) -> dict[TaskState, int]:
        """How many tasks are kept, by state."""
        kept = {state: total - self.dropped[state] for state, total in self.ended.items()}
        return {PENDING: self.pending_count, IN_PROGRESS: self.in_progress, **kept}

    @property
    def in_progress(self) -> int:
        """How many tasks are in progress."""
        return len(self.open) - self.pending_count

    @property
    def accepted(self) -> int:
        """How many tasks were accepted, without those of a journal."""
        return self.sequence - self.restored

    @property
    def waited_s(self) -> Histogram:
        """How long tasks waited for their first assignment; those that were not queued did not wait."""
        waited = Histogram()
        waited.counts = [self.accepted - self.queued + self.queued_s.counts[0], *self.queued_s.counts[1:]]
        waited.sum_s = self.queued_s.sum_s
        return waited

    def most_running(self) -> dict[str, int]:
        """Return how many tasks are in progress, for the capabilities with most of them."""
        scanned = itertools.islice(self.running.items(), QUEUES_SCANNED_MAX)
        return largest({name: number for name, number in scanned if name is not None}, LONGEST_QUEUES)

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
        request, accepted_at = row.request, min(row.accepted_at, now)
        self.sequence = self.restored = row.sequence
        task = TaskRecord(
            request.task_id,
            request,
            agent_of(row.requester),
            self.open.get(request.parent_id or ""),
            row.depth,
            accepted_at,
            min(row.deadline, now + request.ttl),
            row.sequence,
            row.bytes,
            state=row.state,
            assignee=agent_of(row.assignee) if row.assignee is not None else None,
            attempt=row.attempt,
            ended_at=min(row.ended_at, now),
            is_journaled=True,
            asked=row.life.asked,
            talk=row.life.talk,
            begun_at=accepted_at + last_begun_s(row.life.steps),
            listed_steps=row.life.steps if row.life.steps or row.assignee is not None else None,
        )
        if task.question is not None:
            task.requester.questions[task.task_id] = task
        if row.end is not None:
            task.success, task.output, task.error = row.end.success, row.end.output, row.end.error
            task.settled_by = agent_of(row.end.sender) if row.end.sender is not None else None
        self._count(task)
        return task

    def _count(self, task: TaskRecord) -> None:
        self.bytes += task.bytes
        task.requester.held_bytes += task.bytes
        if task.state is PENDING:
            self.pending_count += 1
        elif task.state is IN_PROGRESS:
            count(self.running, task.request.capability)
        else:
            self.ended[task.state] += 1

    def list_open(self, task: TaskRecord) -> None:
        self.open[task.task_id] = task.requester.requested[task.task_id] = task
        if task.parent is not None:
            task.parent.children = task.parent.children or {}
            task.parent.children[task.task_id] = task

    def transition(self, task: TaskRecord, event: TaskEvent) -> None:
        """Take one step of the table. Nothing else assigns a task's state; `error` and `ended_at` are set before."""
        state = next_state(task.state, event)
        if task.state is PENDING:
            self.pending_count -= 1
        else:
            uncount(self.running, task.request.capability)
        task.state = state
        if state is IN_PROGRESS:
            count(self.running, task.request.capability)
        elif state is PENDING:
            self.pending_count += 1
        else:
            self.ended[state] += 1
            if task.error is not None:
                self._count_code(task, task.error)
            if task.assignee is not None:
                ran_s, seconds = self.ran_s, task.ended_at - task.begun_at
                ran_s.counts[bisect_left(SECONDS, seconds)] += 1  # As `add` does, without the call.
                ran_s.sum_s += seconds
            del self.open[task.task_id], task.requester.requested[task.task_id]
            if task.parent is not None and task.parent.children:
                task.parent.children.pop(task.task_id, None)
        if self._is_journaled:
            self.changed[task] = True

    def assign(self, task: TaskRecord, agent: AgentRecord, now: float) -> None:
        """Begin an attempt of a pending task. The caller updates the agent's load."""
        self.transition(task, ASSIGNED)
        task.attempt += 1
        task.assignee = agent
        task.begun_at = now
        if task.listed_steps is not None:
            task.add_step(ASSIGNED, agent, now)
        agent.running[task.task_id] = task

    def _count_code(self, task: TaskRecord, error: ErrorInfo) -> None:
        count(self.codes, (task.state, error.code if error.code in KNOWN_CODES else "other"))

    def ask(self, task: TaskRecord, message: Status, agent: AgentRecord, now: float, message_bytes: int) -> None:
        """Keep the question of a task's assignee instead of the one before, unless that was sent again."""
        if message.question is None or (message.progress, message.detail, message.piece) != (None, None, None):
            raise Refused("question: send it without progress, detail and piece", code=Code.INVALID_MESSAGE)
        if not task.request.answers:
            raise Refused('its requester did not say "answers": it cannot be asked', code=Code.NO_ANSWERS)
        if task.talk is not None and task.talk.message_id == message.id is not None:
            return
        if task.requester.state is AgentState.DEREGISTERED:
            raise Refused("its requester has left and cannot be asked", code=Code.NO_ANSWERS)
        self.reserve(message_bytes, None)
        self.forget_talk(task)
        task.asked += 1
        task.talk = Talk(ask=task.asked, message_id=message.id, question=message.question, bytes=message_bytes)
        task.requester.questions[task.task_id] = task
        self.grow(task, message_bytes)
        task.add_step("asked", agent, now)
        self.mark(task)

    def answer(self, task: TaskRecord, message: Status, agent: AgentRecord, now: float, message_bytes: int) -> None:
        """Keep the answer to the question that waits for one."""
        talk = task.question
        if talk is None or talk.ask != message.ask:
            raise Refused("ask: no question with that number waits for an answer", code=Code.NO_QUESTION)
        self.reserve(message_bytes, None)
        talk.answer = message.answer if message.answer is not None else b"null"
        talk.bytes += message_bytes
        del agent.questions[task.task_id]
        self.grow(task, message_bytes)
        task.add_step("answered", agent, now)
        self.mark(task)

    def forget_talk(self, task: TaskRecord) -> None:
        """Drop the last question of a task, and its answer."""
        if task.talk is not None:
            task.requester.questions.pop(task.task_id, None)
            self.grow(task, -task.talk.bytes)
            task.talk = None

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

    def check_limits(self, agent: AgentRecord, message_bytes: int) -> None:
        """Refuse a task too many of an agent; drop ended tasks if its record needs their bytes."""
        settings = self.settings
        if len(agent.requested) >= settings.open_tasks_max:
            text = f"this agent has reached its limit of {settings.open_tasks_max} open tasks; wait until one ends"
            raise Refused(text, code=Code.OVERLOADED)
        if self.pending_count >= settings.pending_tasks_max:
            text = f"the hub has reached its limit of {settings.pending_tasks_max} pending tasks; retry later"
            raise Refused(text, code=Code.OVERLOADED)
        share = REQUESTER_SHARE * self.bytes_max
        needed = message_bytes + RECORD_BYTES
        if agent.held_bytes + needed > share:
            text = f"this agent has reached its limit of {share:.0f} bytes of tasks; wait until one ends"
            raise Refused(text, code=Code.OVERLOADED)
        self.reserve(needed, agent)  # Last, because it drops records: a task that is refused must change nothing.

    def reserve(self, needed: int, agent: AgentRecord | None) -> None:
        """Drop ended tasks if so many more bytes need their room; refuse what needs them if that is not enough."""
        needed_in_all = self.bytes + self._directory.registrations_bytes + needed
        if needed_in_all > self.bytes_max:
            if needed_in_all - self.ended_bytes > self.bytes_max:
                text = f"the hub has reached its limit of {self.bytes_max} bytes of records; retry later"
                raise Refused(text, code=Code.OVERLOADED)
            self.make_room(needed, agent)

    @property
    def records_bytes(self) -> int:
        """What all records take together, with the registrations of agents."""
        return self.bytes + self._directory.registrations_bytes

    def make_room(self, needed: int, requester: AgentRecord | None) -> None:
        """Drop ended tasks, before their retention is over, while the records are too large together.

        The oldest delivered ones go first, and then outcomes of disconnected requesters: those of the `requester` that
        needs the bytes while it holds more than its share, and then the oldest of all.
        """
        while self.records_bytes + needed > self.bytes_max and (self.delivered or self.undelivered):
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
        self.dropped[task.state] += 1


class Hub:
    """Every decision about agents and tasks.

    `entropy(n)` returns n random bytes, for agents' ids and their secrets. `now` is in seconds of one clock that
    does not go back (if it does, time stands still here until it has caught up). With `is_journaled`, each step has
    the changes that must be on disk before its effects are carried out; `restore` reads them again after a restart.
    `is_held(link)` returns whether messages of a connection came in that wait to be handled: then it is not silent.
    `directory`, `tasks`, `pending`, `connections` and `deadlines` are for reading.
    """

    full_reason = "the hub's disk is full; retry later"  # The most likely one, for requesters.

    def __init__(
        self,
        settings: HubSettings,
        *,
        entropy: Callable[[int], bytes],
        now: float,
        is_journaled: bool = False,
        is_held: Callable[[Any], bool] = lambda link: False,
    ) -> None:
        self.settings: HubSettings = settings
        self.directory = Directory(settings.agents_max, is_journaled=is_journaled)
        self.tasks = TaskTable(settings, self.directory, is_journaled=is_journaled)
        self.pending = PendingTasks(self.directory.agents)
        self.shutting_down = False
        self.is_full = False  # The journal cannot be written: no new task is accepted,
        self.is_unlinked = False  # ... nor while its file is not where a restart would look for it.
        self.cost = 0.0  # What the last message cost to handle; a plain one costs 1.
        self._is_journaled = is_journaled
        self._is_held = is_held
        self._entropy = entropy
        self._now = self._started_at = now
        self._effects: list[Effect] = []  # Of this step.
        self._message_bytes = 0  # The size of the message being handled.
        self._passed_on_max = settings.passed_on_max
        # An agent never runs more tasks than fit into the reply to its next `register`.
        self._running_max = max(1, self._passed_on_max // REF_BYTES)
        self._is_logging_ends = is_logging_ends()
        self._refusals: dict[str, int] = {}  # How many, by code.
        self._closes: dict[str, int] = {}  # How many connections ended, by close code.
        self.connections: dict[Hashable, Connection] = {}
        self._deferred: dict[str, AgentRecord] = {}  # Can take a task once all that is due has ended.
        self.deadlines: LazyHeap[TaskRecord | AgentRecord | Connection] = LazyHeap()
        self._steps_left = TICK_BATCH  # Of this call.
        self._unfinished: collections.deque[Iterator[None]] = collections.deque()  # What `tick` goes on with.
        # Records that are kept for a second must not wait thirty for the reaper.
        self._sweep_interval_s = min(settings.reap_s, max(0.1, settings.retention_s / 10))
        self.next_sweep = now + self._sweep_interval_s  # Of records past their retention; may be put off.

    # Facts.

    def connected(self, link: Hashable, now: float, origin: str | None = None) -> Step:
        """Add a new connection. Until it registers it may only look: `status` and `discover`.

        `origin` is the address that it comes from; None is not limited.
        """
        self._now = max(self._now, now)
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
        if now > self._now:  # Without a call: this is used for every message.
            self._now = now
        connection.last_seen = self._now
        self._message_bytes = message_bytes
        self.cost = 1.0 + message_bytes // COST_BYTES
        try:
            if refusal is not None:
                raise refusal
            self._RECEIVERS[type(message)](self, connection, message)
        except Refused as refused:
            self._refuse(connection, refused, getattr(message, "id", None), getattr(message, "task_id", None))
        if self._steps_left < TICK_BATCH:
            self.cost += (TICK_BATCH - self._steps_left) // COST_STEPS
        return self._take_step()

    def failed(self, link: Hashable, reply_to: str | None) -> Step:
        """Answer a message whose handling raised an unexpected exception; its effects until then are kept."""
        text = "the hub failed while it handled this message; its log has the traceback"
        self._effects.append((link, Error(reply_to=reply_to, code=Code.INTERNAL, message=text)))
        return self._take_step()

    def disconnected(self, link: Hashable, now: float, code: int = 1006) -> Step:
        """Remove a lost connection. Its agent's session is kept for the grace period."""
        self._now = max(self._now, now)
        connection = self.connections.get(link)
        if connection is not None:
            self._forget_connection(connection, code)
        return self._take_step()

    def tick(self, now: float) -> Step:
        """Handle what is due, TICK_BATCH deadlines at most; after that, next_deadline() may be past again."""
        self._now = max(self._now, now)
        if self._unfinished:
            self._begin(self._unfinished.popleft())
        for _ in range(TICK_BATCH):
            due = self.deadlines.first()
            if due is None or due[0] > self._now:
                self._assign_deferred()  # Only now: no task is handed out whose deadline has come.
                break
            self.deadlines.discard(due[1])
            self._on_deadline(due[1], self._now - due[0])
        if self._now >= self.next_sweep:
            self._is_logging_ends = is_logging_ends()
            self._reap()
        return self._take_step()

    def redeliver(self, task_id: str, now: float) -> Step:
        """Redeliver an outcome that was not sent because the requester disconnected."""
        self._now = max(self._now, now)
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
        return self.next_sweep if first is None else min(first[0], self.next_sweep)

    def shut_down(self) -> None:
        """Accept no new task from now on."""
        self.shutting_down = True

    @property
    def journal_state(self) -> str:
        """Return "none", "ok", or why it accepts no new task: "full", or "gone" if its file was removed or replaced."""
        if not self._is_journaled:
            return "none"
        return "gone" if self.is_unlinked else "full" if self.is_full else "ok"

    def summary(self) -> dict[str, Any]:
        """Return what `status` reports of the hub itself."""
        online = self.directory.states[ONLINE] + self.directory.states[DRAINING]
        return {
            "version": __version__,
            "protocol": PROTOCOL_VERSION,
            "uptime_s": round(self._now - self._started_at, 3),
            "agents": online,
            "agents_away": len(self.directory.agents) - online,
            "connections": len(self.connections),
            "tasks": {state.value: count for state, count in self.tasks.counts.items()},
            "ended": {state.value: count for state, count in self.tasks.ended.items()},
            "refused": dict(self._refusals),
            "closed": dict(self._closes),
            "waiting": self.pending.most(),
            "queues": self.pending.longest(),
            "records_bytes": self.tasks.records_bytes,
            "shutting_down": self.shutting_down,
            "journal": self.journal_state,
        }

    # Steps, and restarts.

    def _take_step(self) -> Step:
        """Return the effects and changes since the last step."""
        effects, self._effects = self._effects, []
        self._steps_left = TICK_BATCH
        if self._is_journaled and (self.tasks.changed or self.directory.changed):
            changes = Changes()
            self.tasks.take_changes(changes)
            self.directory.take_changes(changes)
            return Step(effects, changes)
        return Step(effects)

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
            self.pending.push(task)
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
        resumed = None
        former = agent or self.directory.agents.get(message.agent_id or "")
        needed -= former.bytes if former is not None else 0
        if needed > 0:
            self.tasks.reserve(needed, agent)
        if agent is None:
            resumed = self._resumed(connection, message)
            agent = resumed or self.directory.add(message.name, connection.origin, self._entropy)
            self._attach(agent, connection)
            log_hub.info("joined agent=%s", agent.agent_id)
        self.directory.describe(agent, message, self._running_max)
        # The reply lists what the agent is running, so it goes before the tasks that it gets now.
        if message.id is not None:
            self.cost += len(agent.running) // COST_REFS
            self._send(connection, agent.session(message.id, self.settings))
        self._begin(self._deliver_kept(agent))
        if resumed is not None:  # What it did not get before, or may have lost with its connection.
            answered = [task for task in agent.running.values() if task.has_answer]
            self._begin(self._deliver_talks([*answered, *agent.questions.values()]))
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
        agent.drain_id, agent.online_at = None, self._now

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

    def _on_deadline(self, subject: TaskRecord | AgentRecord | Connection, late_s: float) -> None:
        if isinstance(subject, TaskRecord):
            text = f"its time to live of {subject.deadline - subject.accepted_at:g} s has expired"
            self._end(subject, TaskEvent.EXPIRED, ErrorInfo(Code.TIMEOUT, text))
        elif isinstance(subject, AgentRecord):
            self.directory.transition(subject, AgentEvent.GRACE_EXPIRED)
            self._remove_agent(subject)
        else:
            self._on_silence(subject, late_s)

    def _on_silence(self, connection: Connection, late_s: float) -> None:
        silent_since = connection.last_seen + self.settings.silence_s
        if connection.is_known and silent_since > self._now:
            # It has spoken since this deadline was set: moving it with each message would cost more.
            connection.is_doubted = False
            self.deadlines.push(connection, silent_since)
        elif self._is_held(connection.link):  # By this hub, which is busy.
            self.deadlines.push(connection, self._now + DOUBT_S)
        elif late_s > SILENCE_LATE_S and not connection.is_doubted:  # The process was stopped: it may have spoken.
            connection.is_doubted = True
            self.deadlines.push(connection, self._now + DOUBT_S)
        elif silent_since <= self._now:
            self._close(connection, CloseCode.SILENT, "silent for three heartbeat intervals")
        else:
            text = f"neither registered nor asked anything within {self.settings.join_s:g} s"
            self._close(connection, CloseCode.SILENT, text)  # Not 1008: a program that was only slow may try again.

    def _on_heartbeat(self, connection: Connection, message: Heartbeat) -> None:
        if connection.agent is None:
            refuse_unregistered()
        if message.id is not None:
            self._send(connection, HeartbeatAck(reply_to=message.id))

    # Finding.

    def _on_discover(self, connection: Connection, message: Discover) -> None:
        self._set_known(connection)
        keyword = message.capability.lower()
        found, total, scanned = self.directory.search(keyword, message.limit, self._passed_on_max, self._now)
        self.cost += scanned // COST_AGENTS
        if message.id is not None:
            self._send(connection, Discovered(reply_to=message.id, agents=found, total=total))

    def _on_broadcast(self, connection: Connection, message: Broadcast) -> None:
        sender = connection.agent or refuse_unregistered()
        if self._message_bytes > self._passed_on_max:
            check_size(message, self.settings)
        delivery = BroadcastDelivery(sender=sender.agent_id, message=message.message, capability=message.capability)
        audience = self._audience(message.capability)
        recipients = [one.connection for one in audience if one is not sender and one.connection is not None]
        if len(recipients) * self._message_bytes > BROADCAST_BYTES_MAX:
            most = BROADCAST_BYTES_MAX // len(recipients)
            text = f"to {len(recipients)} agents, a broadcast may have {most} bytes; send them where to fetch the rest"
            raise Refused(text, code=Code.TOO_LARGE)
        for recipient in recipients:
            self._send(recipient, delivery)
        self.cost *= max(1, len(recipients))  # Each is a message to send.
        if message.id is not None:
            self._send(connection, BroadcastReply(reply_to=message.id, recipients=len(recipients)))

    def _audience(self, capability: str | None) -> Iterable[AgentRecord]:
        if capability is None:
            return (one.agent for one in self.connections.values() if one.agent is not None)
        pool = self.directory.pools.get(capability)
        return pool.members.values() if pool is not None else ()

    # Asking.

    def _on_status(self, connection: Connection, message: Status) -> None:
        reply: StatusReply | TaskAck
        if message.task_id is None:
            reply = self._task_list(message) if message.tasks else self._hub_report()
        elif message.question is not None or message.ask is not None:
            self._on_talk(connection, message)
            return
        elif message.progress is not None or message.detail is not None or message.piece is not None:
            reply = self._on_progress(connection.agent or refuse_unregistered(), message)
        else:
            task = self.tasks.known_task(message.task_id)
            self.cost += task.bytes // COST_BYTES
            reply = self.tasks.report(task, connection.agent, message.id, self._now)
        self._set_known(connection)
        if message.id is not None:
            reply.reply_to = message.id
            self._send(connection, reply)

    def _hub_report(self) -> StatusReply:
        self.cost += (len(self.connections) + len(self.pending.by_requester)) // COST_SCANNED
        return StatusReply(hub=self.summary())

    def _on_progress(self, agent: AgentRecord, message: Status) -> TaskAck:
        task = self.tasks.open_task(message.task_id or "")
        task.check_party(agent, task.assignee)
        if self._message_bytes > self._passed_on_max:
            check_size(message, self.settings)
        requester = task.requester.connection
        if message.progress is not None or message.detail is not None:
            task.seq += 1
            task.progress, task.detail = message.progress, message.detail
            self.tasks.grow(task, self._message_bytes - task.detail_bytes)
            task.detail_bytes = self._message_bytes
            if requester is not None:
                self._send(requester, task.progress_report())
        if message.piece is not None:
            task.seq += 1
            task.pieces += 1
            if requester is not None:
                self._send(requester, task.progress_report(message.piece))
        return task.ack()

    def _on_talk(self, connection: Connection, message: Status) -> None:
        """Take the question of a task's worker, or the answer of its requester; pass it on after the reply."""
        agent = connection.agent or refuse_unregistered()
        task = self.tasks.open_task(message.task_id or "")
        task.check_party(agent, task.assignee if message.question is not None else task.requester)
        if self._message_bytes > self._passed_on_max:
            check_size(message, self.settings)
        take = self.tasks.ask if message.question is not None else self.tasks.answer
        take(task, message, agent, self._now, self._message_bytes)
        if message.id is not None:
            self._send(connection, task.ack(message.id) if message.question is None else task.ask_reply(message.id))
        self._begin(self._deliver_talks([task]))

    def _deliver_talks(self, tasks: Iterable[TaskRecord]) -> Iterator[None]:
        """Deliver open questions to their requesters and answers to their workers, one a step."""
        for task in tasks:
            requester, worker = task.requester.connection, task.assignee
            self.cost += task.talk.bytes // COST_BYTES if task.talk is not None else 0
            if task.question is not None and requester is not None:
                self._send(requester, task.question_report())
            elif task.has_answer and worker is not None and worker.connection is not None:
                self._send(worker.connection, task.answer_delivery())
            yield

    def _task_list(self, message: Status) -> StatusReply:
        """List the open tasks and then the ended ones, the newest first, as many as fit."""
        listed, scanned = self.tasks.newest(message, self._now, self._passed_on_max)
        self.cost += len(listed) // COST_TASKS + scanned // COST_SCANNED
        return StatusReply(tasks=listed, total=self.tasks.total(message.state))

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
        else:
            self.tasks.queued += 1

    def _repeat(self, connection: Connection, agent: AgentRecord, task: TaskRecord, message: Delegate) -> None:
        """Answer a delegate that was accepted before: its requester repeats it when it missed the reply."""
        self.cost += compared_bytes(task.request, message) // COST_COMPARED_BYTES
        if task.requester is not agent or not same_content(task.request, message):
            raise Refused("task_id: used by another task; choose a new one", code=Code.DUPLICATE_TASK)
        self._acknowledge(connection, message, task)
        if task.state in FINAL_STATES:
            self.cost += task.bytes // COST_BYTES
            self._send(connection, task.outcome())
        elif task.question is not None:
            self.cost += task.question.bytes // COST_BYTES
            self._send(connection, task.question_report())

    def _admit(self, agent: AgentRecord, message: Delegate) -> TaskRecord | None:
        """Return the parent of a new task, if it has one; raise Refused if it cannot be accepted."""
        if self.shutting_down:
            raise Refused("the hub is shutting down; retry when it is back", code=Code.SHUTTING_DOWN)
        if self.is_full:
            raise Refused(self.full_reason, code=Code.OVERLOADED)
        if self.is_unlinked:
            raise Refused("the hub's journal was removed; retry when the hub was restarted", code=Code.OVERLOADED)
        if message.agent_id is None and message.capability is None:
            raise Refused("capability: name a capability, an agent_id, or both", code=Code.INVALID_MESSAGE)
        parent = self.tasks.parent(agent, message.parent_id) if message.parent_id is not None else None
        if not message.wait:  # Otherwise the task may wait for an agent that does not exist yet.
            if parent is not None:
                self.directory.check_deadlock(agent, message, parent)
            self.directory.check_target(agent, message)
        if self._message_bytes > self._passed_on_max:
            check_size(message, self.settings)
        self.tasks.check_limits(agent, self._message_bytes)
        return parent

    def _place(self, task: TaskRecord, avoiding: AgentRecord | None = None) -> AgentRecord | None:
        """Assign a pending task to a free agent, the one to avoid only as a last choice, or let it wait.

        Return the agent, to which the task is still to be handed out. A task whose deadline has come, and that `tick`
        is about to end, is given to nobody.
        """
        agent = self.directory.free_agent(task, avoiding) if self._now < task.deadline else None
        if agent is None:
            self.pending.push(task)
        else:
            self.tasks.assign(task, agent, self._now)
            self.directory.update_load(agent)
        return agent

    def _hand_out(self, task: TaskRecord, agent: AgentRecord) -> None:
        """Send a task to its assignee."""
        if agent.connection is None:
            raise AssertionError("only an agent that is online is free")
        if task.attempt > 1 and task.requester.connection is not None:  # First: it counts the attempts of a lost hub.
            task.seq += 1
            self._send(task.requester.connection, task.progress_report())
        self._send(agent.connection, task.delivery(agent, self._now))

    def _assign_waiting(self, agent: AgentRecord) -> None:
        """Hand waiting tasks to an agent for as long as it can take one, and leave those of other calls to `tick`."""
        while self.tasks.pending_count and agent.free_load is not None:
            if self._steps_left <= 0:
                self._deferred[agent.agent_id] = agent
                self.directory.update_load(agent, is_listed=False)  # New tasks must not overtake those that wait.
                return
            self._steps_left -= 1
            task = self.pending.first_for(agent)
            if task is None:
                break
            if task.deadline <= self._now:  # Its turn and its deadline have come at once: `tick` ends it first.
                self._deferred[agent.agent_id] = agent
                break
            self.pending.take_turn(task, agent)
            if task.listed_steps is None:
                self.tasks.queued_s.add(self._now - task.accepted_at)
            self.tasks.assign(task, agent, self._now)
            self._hand_out(task, agent)
        self.directory.update_load(agent)

    def _assign_deferred(self) -> None:
        deferred, self._deferred = self._deferred, {}
        for agent in deferred.values():
            self._assign_waiting(agent)

    # Ending.

    def _on_result(self, connection: Connection, message: Result) -> None:
        agent = connection.agent or refuse_unregistered()
        task = self.tasks.open_task(message.task_id)
        task.check_result(agent, message, self._now)
        if self._message_bytes > self._passed_on_max:
            check_size(message, self.settings)
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
        elif error.code == Code.BUSY:
            self._take_back(task)
        else:
            self._settle(task, TaskEvent.ERRED, sender=task.assignee, error=error)

    def _retry(self, task: TaskRecord, reason: str, reporter: AgentRecord | None = None) -> None:
        """Make a task pending again whose agent was lost, if it may be retried; fail it if not."""
        if task.attempt > task.request.max_retries:  # The first attempt is no retry.
            self._settle(task, TaskEvent.LOST, sender=reporter, error=ErrorInfo(Code.AGENT_LOST, reason))
        else:
            self._make_pending(task)

    def _take_back(self, task: TaskRecord) -> None:
        """Make a task pending again that its assignee has not begun, which uses up no retry.

        That agent has no free slot, whatever it has registered, until it registers again or another task of it ends.
        """
        agent = task.assignee
        self._make_pending(task)
        task.attempt -= 1
        if agent is not None:
            agent.occupied = max(agent.occupied, agent.max_tasks - len(agent.running))
            self.directory.update_load(agent)

    def _make_pending(self, task: TaskRecord) -> None:
        """Take a task from its assignee."""
        self.tasks.transition(task, TaskEvent.RETRIED)
        if task.assignee is not None:
            del task.assignee.running[task.task_id]
            task.add_step(TaskEvent.RETRIED, task.assignee, self._now)
        task.assignee = None
        task.progress = task.detail = None  # Of the attempt that has failed; `seq` counts on over all of them.
        self.tasks.grow(task, -task.detail_bytes)
        task.detail_bytes = 0
        self.tasks.forget_talk(task)

    def _settle(
        self, task: TaskRecord, event: TaskEvent, *, sender: AgentRecord | None = None, error: ErrorInfo | None = None
    ) -> None:
        """Take an open task to its final state. `sender` is its assignee if its result does that."""
        if task.state is PENDING:
            self.pending.discard(task)
        task.error, task.settled_by, task.ended_at = error, sender, self._now
        self.tasks.transition(task, event)
        if task.talk is not None:
            self.tasks.forget_talk(task)
        self.deadlines.discard(task)
        if self._is_logging_ends:
            log_ended(task)
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
        if self.tasks.bytes + self.directory.registrations_bytes > self.tasks.bytes_max:
            self.tasks.make_room(0, requester)

    def _reap(self) -> None:
        """Drop ended tasks past their retention, and gone agents that nothing needs."""
        is_more_left = self.tasks.purge_older(self._now - self.settings.retention_s)
        self.directory.forget_unneeded()
        self.next_sweep = self._now + (0 if is_more_left else self._sweep_interval_s)

    # What the others share.

    def _acknowledge(self, connection: Connection, message: Delegate | Result, task: TaskRecord) -> None:
        """Reply to a message with the new state of its task, before the effects that follow from that."""
        if message.id is not None:
            self._effects.append((connection.link, task.ack(message.id)))

    def _send(self, connection: Connection, message: HubOutput) -> None:
        self._effects.append((connection.link, message))

    def _refuse(
        self, connection: Connection, why: AgentHubError, reply_to: str | None, task_id: str | None = None
    ) -> None:
        self._send(connection, Error(reply_to=reply_to, code=why.code, message=why.message, task_id=task_id))
        count(self._refusals, why.code)
        agent_id = connection.agent.agent_id if connection.agent else None
        # This text names a field and what it must be. Those of other codes repeat names that clients chose.
        reason = f": {why.message[:REASON_LOGGED_MAX]}" if why.code == Code.INVALID_MESSAGE else ""
        log_hub.warning("refused code=%s agent=%s%s", why.code, agent_id, reason)
        if connection.wrong_secrets >= TRIES_MAX:
            self._close(connection, CloseCode.NOT_ALLOWED, "too many wrong secrets")

    _RECEIVERS: typing.ClassVar[dict[type, Callable[[Hub, Connection, Any], None]]] = {
        Register: _on_register,
        Deregister: _on_deregister,
        Discover: _on_discover,
        Delegate: _on_delegate,
        Result: _on_result,
        Status: _on_status,
        Broadcast: _on_broadcast,
        Heartbeat: _on_heartbeat,
        InvalidMessage: lambda hub, connection, message: hub._refuse(connection, message, message.reply_to),
    }


# What a message would cost that reads much: it is small, but its reply is not.
EXPECTED_COSTS: dict[type, Callable[[Hub, Any], int]] = {
    Status: lambda hub, status: min(len(hub.tasks), status.limit) // COST_TASKS if status.tasks else 0,
    Discover: lambda hub, _: len(hub.directory.agents) // COST_AGENTS,
    Broadcast: lambda hub, _: len(hub.connections) // COST_RECIPIENTS,
}


def is_logging_ends() -> bool:
    """Return whether `log_ended` has an effect. It is looked up with each sweep: for each task that took 0.3 µs."""
    return log_tasks.isEnabledFor(log_tasks.level or logging.DEBUG)


def log_ended(task: TaskRecord) -> None:
    """Log the end of a task: at the level of its logger, or at DEBUG if that has none of its own.

    Ids and states are plain words. Code and capability may be any text of a client, so they are quoted.
    """
    code = task.error.code if task.error is not None else None
    waited_s = task.steps[0][3] if task.steps else task.ended_at - task.accepted_at
    ran_s = task.ended_at - task.begun_at if task.steps else 0.0
    log_tasks.log(
        log_tasks.level or logging.DEBUG,
        "ended task=%s state=%s code=%r capability=%r requester=%s agent=%s attempt=%d waited_s=%.3f ran_s=%.3f"
        " trace=%s",
        task.task_id,
        task.state.value,
        code,
        task.request.capability,
        task.requester.agent_id,
        task.assignee.agent_id if task.assignee is not None else None,
        task.attempt,
        waited_s,
        ran_s,
        trace_id(task.request.trace),
    )


def trace_id(trace: Mapping[str, str] | None) -> str | None:
    """Return the id in the `traceparent` of a trace (https://www.w3.org/TR/trace-context/); None without one."""
    found = re.match(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-", (trace or {}).get("traceparent", ""))
    return found[1] if found is not None else None


def refuse_unregistered() -> NoReturn:
    text = "register first; before that, only status and discover are allowed"
    raise Refused(text, code=Code.NOT_REGISTERED)


def hash_of(secret: str) -> str:
    """Return the SHA-256 of a secret, in hex, which is kept and compared instead of it. Any text has one."""
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def check_size(message: Delegate | Result | Status | Broadcast, settings: HubSettings) -> None:
    """Refuse a large message if it would be too large when the hub passes it on, with the fields that it adds."""
    if len(encode(message)) > settings.passed_on_max:
        text = f"with the fields that the hub adds, the message exceeds {settings.message_bytes_max} bytes"
        raise Refused(text, code=Code.TOO_LARGE)


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


def count(counts: dict[Any, int], what: Any) -> None:
    counts[what] = counts.get(what, 0) + 1


def uncount(counts: dict[Any, int], what: Any) -> None:
    counts[what] -= 1
    if not counts[what]:
        del counts[what]


def largest(counts: Mapping[Item, int], limit: int) -> dict[Item, int]:
    """Return the entries with the largest numbers, those first, at most `limit`."""
    return dict(heapq.nlargest(limit, counts.items(), key=lambda one: one[1]))


def error_info(error: str | ErrorInfo | None) -> ErrorInfo:
    """Return the error of a failed result in its full form: a plain string is the text of `failed`."""
    if isinstance(error, ErrorInfo):
        return error
    return ErrorInfo(Code.FAILED, error or "")


APART = ("id", "trace", "input")  # The fields of a delegate that `same_content` does not compare, and the last apart.


def same_content(one: Delegate, other: Delegate) -> bool:
    """Return whether two delegates are the same task: by all fields but its id and trace, as JSON (1 is neither 1.0
    nor true). Inputs of more than COMPARED_BYTES_MAX are the same only as text: parsing 1 MB twice can take 0.6 s.
    """

    def content(message: Delegate, given: Any) -> str:
        fields = {name: getattr(message, name) for name in field_names(Delegate) if name not in APART}
        return json.dumps([fields, given], sort_keys=True)

    if content(one, None) != content(other, None):
        return False
    # Most are sent again as they were; spaces and the order of fields make no difference.
    texts = field_text(one.input), field_text(other.input)
    if texts[0] == texts[1] or max(map(len, texts)) > COMPARED_BYTES_MAX:
        return texts[0] == texts[1]
    return content(one, value_of(one.input)) == content(other, value_of(other.input))


def compared_bytes(one: Delegate, other: Delegate) -> int:
    """Return about how many bytes `same_content` parses."""
    sizes = [len(delegate.input) if isinstance(delegate.input, bytes) else 0 for delegate in (one, other)]
    return sum(sizes) if max(sizes) <= COMPARED_BYTES_MAX and one.input != other.input else 0


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
#
# Elsewhere. A hub needs no more of its journal than JournalLike. `agenthub_postgres.py`, next to this
# file, is another one: a database that two machines reach, so that a second hub can take over. Its
# holder has a lease, which each write renews and checks; see GroupCommit for what that means there.
# ============================================================================================

JOURNAL_VERSION = 2
JOURNAL_ID = 0x41484A4C  # "AHJL", PRAGMA application_id: distinguishes a journal from other SQLite files.
RESERVE_BYTES = 8_388_608  # Enough for the outcomes of open tasks while the disk is full.
CLOCK_STEP_S = 0.8  # A smaller difference of the offset is drift or jitter, and ignored.
UNCHANGED = "the file was not changed"
NAMESPACE_DEFAULT = "default"
NAMESPACE_RULE = "must be 1 to 64 characters of a-z 0-9 _ -"
NEIGHBOURS = ("-wal", "-shm", "-journal", "-reserve")  # Ends of the names of files next to a journal.
WAL_BYTES_MAX = 67_108_864  # To which the write-ahead log is truncated after a checkpoint.
JOURNAL_TABLES = """
    CREATE TABLE agents (
        agent_id TEXT PRIMARY KEY, resume_hash TEXT NOT NULL, register BLOB NOT NULL, there INTEGER NOT NULL,
        departed INTEGER NOT NULL
    );
    CREATE TABLE tasks (
        arrival INTEGER PRIMARY KEY, requester TEXT NOT NULL, request BLOB NOT NULL, depth INTEGER NOT NULL,
        accepted_at REAL NOT NULL, deadline REAL NOT NULL, bytes INTEGER NOT NULL, state TEXT NOT NULL, assignee TEXT,
        attempt INTEGER NOT NULL, told INTEGER NOT NULL, ended_at REAL NOT NULL, end BLOB, life BLOB
    );
"""
JOURNAL_UPGRADES = {1: "ALTER TABLE tasks ADD COLUMN life BLOB"}  # By the version that they change.


StoredMessage = TypeVar("StoredMessage")


def is_namespace(name: str) -> bool:
    return re.fullmatch("[a-z0-9][a-z0-9_-]{0,63}", name) is not None


class JournalLike(Protocol):
    """What a hub needs of its journal. The methods may be called from any thread, one at a time.

    `lease_s` is how long after the start of a successful write no other hub can take the journal over; infinite if no
    other hub can while this process lives.
    """

    path: str  # For the log: without a password.
    lease_s: float

    def of_namespace(self, namespace: str) -> JournalLike:
        """Return the journal of another namespace, which shares the lease of this one."""

    def namespaces(self) -> list[str]:
        """Return the namespaces that have a journal here, while this one is open."""

    def open(self, *, wait: bool = True) -> None:
        """Open it for this hub alone; wait for its lease, or raise JournalError while another hub holds it."""

    def load(self, clock_offset: float) -> tuple[list[AgentRow], list[TaskRow], float]:
        """Return all agents, all tasks, and the time of the last change to a task. Raises JournalError if damaged."""

    def write(self, changes: Changes, clock_offset: float) -> None:
        """Write all changes or none, and renew the lease. Raises Fenced if that is lost; any other error may pass."""

    def is_in_place(self) -> bool:
        """Return whether a restart would find what was written."""

    def take_reserve(self) -> bool:
        """Return whether there is space for new tasks."""

    def give_up_reserve(self) -> None:
        """Free space for the outcomes of open tasks."""

    def close(self) -> None:
        """Give the journal back. With a lease, also while another method runs, which then fails."""


def journal_of(where: str, *, sync: str = "full") -> JournalLike:
    """Return the journal at a path (SQLite), or at a URL `postgresql://…`, which needs `agenthub_postgres` and psycopg.

    Raises AgentHubError without these, ValueError for a URL or a `sync` that is not valid.
    """
    if not where.startswith(("postgresql://", "postgres://")):
        return Journal(where, sync=sync)
    module = sibling_module("agenthub_postgres", "a journal in PostgreSQL")
    journal: JournalLike = module.PostgresJournal(where, sync=sync)
    return journal


def sibling_module(name: str, what: str) -> Any:
    """Import a module next to this one, which may be part of a package. Raises AgentHubError if it is missing."""
    full_name = f"{__name__.rpartition('.')[0]}.{name}".lstrip(".")
    try:
        return importlib.import_module(full_name)
    except ModuleNotFoundError as error:
        if error.name != full_name:
            raise
        raise AgentHubError(f"{what} is a separate file: copy {name}.py next to agenthub.py") from error


class Journal:
    """Persists a hub's tasks and agents in a file. `open` it, `load` once, then `write`, and `close`.

    With `sync` "full", `write` returns when the data would survive a power loss; with "normal", when it would survive
    the end of the process (https://sqlite.org/pragma.html#pragma_synchronous). The methods may be called from any
    thread, one at a time.
    """

    path: str
    sync: str
    lease_s: float = math.inf  # The lock of the file lasts as long as the process.
    has_file = True
    unchanged: str = UNCHANGED

    def __init__(self, path: str | os.PathLike[str], *, sync: str = "full") -> None:
        if sync not in ("full", "normal"):
            raise ValueError(f"sync must be full or normal, not {sync!r}")
        self.path = os.fspath(path)
        self.has_file = self.has_file and self.path != ":memory:"
        self.sync = sync
        self._place = self._target = self.path  # Where a restart looks for the file, and where that leads to.
        self.database: sqlite3.Connection | None = None
        self._writes = 0  # The number of the last write; continued from the highest `told` in the file.
        self._clock_offset = math.nan  # Of the times in the file.
        self._file = (0, 0)  # The device and the inode of the file.

    @property
    def _reserve(self) -> pathlib.Path:
        return pathlib.Path(f"{self._target}-reserve")

    def of_namespace(self, namespace: str) -> Journal:
        """Return the journal of another namespace: the file next to this one with `.NAMESPACE` appended."""
        return Journal(f"{self.path}.{namespace}" if self.has_file else self.path, sync=self.sync)

    def namespaces(self) -> list[str]:
        """Return the namespaces that have a file here, which for `default` is this one."""
        from glob import escape as glob_escape

        path = pathlib.Path(self.path)
        near = [one.name.removeprefix(f"{path.name}.") for one in path.parent.glob(f"{glob_escape(path.name)}.*")]
        return [NAMESPACE_DEFAULT, *sorted(one for one in near if is_namespace(one) and not one.endswith(NEIGHBOURS))]

    def open(self, *, wait: bool = True) -> None:
        """Open the file, or create it, and lock it for this process. Raises JournalError; then no file was changed.

        `wait` has no effect: a file that another hub has locked is an error, also for a moment.
        """
        import sqlite3

        if self.database is not None:
            raise JournalError(f"{self.path}: this journal is already open")
        try:
            self._create_file()
            self._check_format()
            self.database = sqlite3.connect(self._target, isolation_level=None, check_same_thread=False, timeout=0)
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
                    f"{self.path}: another hub uses this journal, or a program reads it; stop that, or use another file"
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
        if not self.has_file:
            return
        # Absolute, because the process may change its folder; and SQLite puts its files next to the target of a link.
        self._place, self._target = os.path.abspath(self.path), os.path.realpath(self.path)
        if os.path.islink(self.path) and not os.path.lexists(self._target):
            raise JournalError(f"{self.path}: a link to {self._target}, which does not exist: use that path instead")
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        found = os.stat(self._target)
        if not stat.S_ISREG(found.st_mode):
            raise JournalError(f"{self.path}: not a regular file")
        folder = os.path.dirname(self._target)
        if not os.access(folder, os.W_OK):
            raise JournalError(f"{self.path}: {folder} must be writable too, for the files next to it; {UNCHANGED}")
        self._file = found.st_dev, found.st_ino
        if 0 < found.st_size < 512:  # SQLite takes a file of one byte for an empty one.
            raise JournalError(f"{self.path}: not an AgentHub journal; {UNCHANGED}")

    def _check_format(self) -> None:
        """Raise JournalError for a file that is not a journal of this version, before it is opened for writing:
        closing it would write the -wal that another program left next to it into the file.
        """
        import sqlite3

        # A file without its first page, or with a rollback journal, cannot be read as it is: SQLite decides.
        target = pathlib.Path(self._target)
        if not self.has_file or not target.stat().st_size or pathlib.Path(f"{target}-journal").exists():
            return
        uri = f"{target.as_uri()}?immutable=1"
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
        if version != JOURNAL_VERSION and version not in JOURNAL_UPGRADES:
            text = f"a journal of version {version}, but this hub reads version {JOURNAL_VERSION}: use another file"
            raise JournalError(f"{self.path}: {text}; {UNCHANGED}")
        return False

    def _lock(self) -> None:
        """Lock the file until it is closed, create the tables if it is empty, check its pages, and upgrade it."""
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
        (version,) = database.execute("PRAGMA user_version").fetchone()
        for former in range(version, JOURNAL_VERSION):
            database.executescript(f"BEGIN; {JOURNAL_UPGRADES[former]}; PRAGMA user_version = {former + 1}; COMMIT")

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
            return self._load(self._row_offset(clock_offset))
        except (sqlite3.Error, LookupError, TypeError, ValueError) as error:
            raise JournalError(f"{self.path}: damaged: {error}; {UNCHANGED}") from error

    def _load(self, clock_offset: float) -> tuple[list[AgentRow], list[TaskRow], float]:
        self._clock_offset = clock_offset
        self._writes = self._last_write()
        agents, tasks = [], []
        # Loops, because the traceback of a comprehension would hold its cursor, and a held cursor keeps the file open.
        for agent in map(AgentRow._make, self._stored("agents")):
            agents.append(self._agent_row(agent))
        for task in map(TaskRow._make, self._stored("tasks")):
            tasks.append(self._task_row(task, clock_offset))
        last = max((max(row.accepted_at, row.ended_at) for row in tasks), default=-math.inf)
        return agents, tasks, last

    def _row_offset(self, clock_offset: float) -> float:
        """Return the difference between the times in rows and the hub's clock: they are in seconds since 1970."""
        return clock_offset

    def _last_write(self) -> int:
        (number,) = self._connected().execute("SELECT coalesce(max(told), 0) FROM tasks").fetchone()
        return int(number)

    def _stored(self, table: str) -> Iterable[tuple[Any, ...]]:
        return self._connected().execute(f"SELECT * FROM {table} ORDER BY 1")

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
            life=life_of(typing.cast(Any, stored.life)),  # A column.
        )

    def _decode(self, decode: Callable[[bytes], Any], raw: Any, kind: type[StoredMessage]) -> StoredMessage:
        if not isinstance(raw, bytes):
            raise JournalError(
                f"{self.path}: damaged row: a {type(raw).__name__} instead of a message; {self.unchanged}"
            )
        try:
            message = decode(raw)
        except InvalidMessage as error:
            raise JournalError(f"{self.path}: damaged row: {error.message}; {self.unchanged}") from error
        if not isinstance(message, kind):
            raise JournalError(f"{self.path}: damaged row: an unexpected {type(message).__name__}; {self.unchanged}")
        return message

    def write(self, changes: Changes, clock_offset: float) -> None:
        """Write all changes in one transaction. Raises sqlite3.Error; then nothing was written, and a retry is safe."""
        self._writes += 1
        clock_offset = self._row_offset(clock_offset)
        step_s = clock_offset - self._clock_offset
        if abs(step_s) <= CLOCK_STEP_S:  # False for the first write of a journal that was not loaded.
            clock_offset = self._clock_offset
        self._write_rows(self._rows_of(changes, clock_offset), step_s if abs(step_s) > CLOCK_STEP_S else 0.0)
        self._clock_offset = clock_offset

    def _rows_of(self, changes: Changes, clock_offset: float) -> list[list[tuple[Any, ...]]]:
        """Return the columns of inserted, updated and deleted tasks, and of written and deleted agents."""
        return [
            [
                (*fixed_columns(row, clock_offset), *self._state_columns(row, clock_offset))
                for row in changes.inserted.values()
            ],
            [(*self._state_columns(row, clock_offset), row.sequence) for row in changes.updated.values()],
            [(sequence,) for sequence in changes.deleted],
            [
                (row.agent_id, row.resume_hash, encode(row.register), row.there, row.departed)
                for row in changes.agents.values()
                if row is not None
            ],
            [(agent_id,) for agent_id, row in changes.agents.items() if row is None],
        ]

    def _write_rows(self, rows: list[list[tuple[Any, ...]]], step_s: float) -> None:
        """Write the rows of `_rows_of` in one transaction, after moving all times by `step_s`."""
        database = self._connected()
        inserted, updated, deleted, agents, gone = rows
        try:
            database.execute("BEGIN IMMEDIATE")
            if step_s:
                self._move_times(database, step_s)
            database.executemany("INSERT OR REPLACE INTO agents VALUES (?, ?, ?, ?, ?)", agents)
            # OR REPLACE, because a commit may succeed and still report an error, and is then retried.
            database.executemany(
                "INSERT OR REPLACE INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", inserted
            )
            database.executemany(
                "UPDATE tasks SET bytes = ?, state = ?, assignee = ?, attempt = ?, told = ?, ended_at = ?, end = ?,"
                " life = ? WHERE arrival = ?",
                updated,
            )
            database.executemany("DELETE FROM tasks WHERE arrival = ?", deleted)
            database.executemany("DELETE FROM agents WHERE agent_id = ?", gone)
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise

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
        return row.bytes, row.state.value, row.assignee, row.attempt, told, ended_at, end, life_column(row.life)

    def is_in_place(self) -> bool:
        """Return whether the path still leads to the file that was opened. If not, a restart would lose all in it."""
        if not self.has_file:
            return True
        try:
            found = os.stat(self._place)
        except OSError:  # Not there, or not to be read.
            return False
        return (found.st_dev, found.st_ino) == self._file

    def take_reserve(self) -> bool:
        """Allocate the reserve unless it exists; return whether the disk has the space."""
        if not self.has_file or self._reserve.exists():
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
        if self.has_file:
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


def life_column(life: TaskLife) -> bytes | None:
    """Return the steps of a task's life, and its last question, as a journal stores them; None if it has none.

    The JSON text of an answer is stored as a string, so that its bytes come back.
    """
    if not life.steps and not life.asked:
        return None
    steps = ",".join(f'["{event}","{agent_id}",{attempt},{at:.3f}]' for event, agent_id, attempt, at in life.steps)
    talk = None
    if life.talk is not None:
        talk = dataclasses.asdict(life.talk) | {"answer": life.talk.answer and life.talk.answer.decode()}
    return f'{{"steps":[{steps}],"asked":{life.asked},"talk":{write_json(talk)}}}'.encode()


def life_of(column: bytes | None) -> TaskLife:
    """Return what `life_column` has stored. Raises LookupError, TypeError or ValueError if it is damaged."""
    if column is None:
        return TaskLife()
    stored, talk = json.loads(column), None
    if stored["talk"] is not None:
        talk = Talk(**stored["talk"])
        talk.question = Question(**stored["talk"]["question"])
        talk.answer = talk.answer.encode() if isinstance(talk.answer, str) else None
    steps = ((str(event), str(agent_id), int(attempt), float(at)) for event, agent_id, attempt, at in stored["steps"])
    return TaskLife(tuple(steps), int(stored["asked"]), talk)


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

NEXT_ADDRESS_S = 0.25  # Until the next address of a hub's name is tried too, while the earlier ones do not answer.
HANDSHAKE_S = 10.0  # From the connection to the end of the handshake.
NEXT_HUB_S = 3.0  # The same where there is another hub to try.
# Idle seconds until the first keepalive, seconds between them, how many may be lost; milliseconds for data to arrive.
TCP_OPTIONS = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}
ENDING_S = 1.0  # For coroutines and threads to end that a loop leaves behind.
TICK_LATE_S = 1.0  # A tick later than this waits once, until what came in meanwhile is read,
CATCH_UP_S = 0.5  # which takes this long.
STALLED_S = 10.0  # For a peer to read any of the bytes that wait for it.
CLOSING_S = 2.0  # For a peer to answer a close, or to read what it was sent before; then the socket is cut.

SLICE_BYTES = 16_384  # Handled from one connection before the others have their turn.
# The cost of a message (see COST_BYTES) is an estimate of its CPU time: a plain one costs 1, and so do COST_S seconds.
COST_S = 125e-6  # With the two limits below, CPU_SHARE of a second.
PLAIN_COST = 0.4  # Of a turn. Nothing costs less than 1 of the rate, but a plain message takes less than COST_S.
TURN_COST = 200  # What messages may cost together before connections wait for the loop's next turn,
QUANTUM_COST = 8  # ... and those of one connection that has waited.
OUT_BYTES_MAX = 2048  # Gathered in one turn of the loop before they are written, so that the peer can start on them.
FRAGMENT_BYTES = 16  # Limits the fragments of a message to as many as if each had this size; RFC 6455 has no limit.
KEYS_BYTES = 1024  # Random bytes for masking keys, read at a time.

MESSAGES_PER_S_MAX = 2000.0  # From one connection, in the long run.
BURST_S = 2.0  # How many seconds' worth of messages may come at once.
PAUSE_MIN_S = 0.02  # Of the rate limit: pausing after each message would cost more than the message.
PAUSE_MAX_S = 10.0  # Of the rate limit: well below the silence after which a connection is closed.
HANDSHAKE_COST = 2
READ_BYTES = 65_536  # Cost 1 to read and decrypt.
INPUT_BYTES_MAX = 268_435_456  # Of unfinished messages, of all connections together.
SOCKET_READ_COST = 4  # Of the socket of a connection that has had its turn, which the loop reads next: 256 KiB.
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

    __slots__ = ("_is_set", "waiters")

    def __init__(self) -> None:
        self._is_set = False
        self.waiters: list[asyncio.Future[None]] = []

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def clear(self) -> None:
        self._is_set = False

    async def wait(self) -> None:
        """Return when it is set, or was set for a moment since the call."""
        if not self._is_set:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter.cancelled() and waiter in self.waiters:
                    self.waiters.remove(waiter)


class PauseReason(enum.StrEnum):
    """Why nothing is read from a connection; reading goes on when no reason is left."""

    TURN_OVER = "turn over"  # It has had its slice; the other connections have their turn.
    RATE_LIMIT = "rate limit"  # It has sent more than its token bucket allows.
    SLOW_CONSUMER = "slow consumer"  # It does not read what was sent to it, so it gets no further replies.
    JOURNAL = "journal"  # Its messages cost much, and their replies wait for one write of the journal.
    AUTH_BACKOFF = "auth backoff"  # Its address has sent too many wrong tokens.


class Link:
    """What all links share: decoding for the owner, and calling its `closed` once.

    The attributes that each message needs are slots, here and in `LocalHub`: instances with more than 30 attributes of
    other kinds have slower ones (SHARED_KEYS_MAX_SIZE in CPython's Objects/dictobject.c).
    """

    __slots__ = ("__dict__", "__weakref__", "_decode", "_is_closing", "_is_reported", "_owner", "gone", "writable")

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

    @property
    def is_held(self) -> bool:
        """Whether what it has sent waits to be handled, for a reason other than itself."""
        return False

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

    def waits(self, cost: float, handle: Callable[[], None]) -> bool:
        """Return False if what costs that much may be handled now; else call `handle` later, and nothing before it."""
        return False

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

    It may be overdrawn, by at most PAUSE_MAX_S seconds' worth: whoever takes tokens that are not there calls `refill`.
    Pure arithmetic: the time is given.
    """

    __slots__ = ("_rate", "_updated_at", "tokens")

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self.tokens = rate * BURST_S
        self._updated_at = now

    def refill(self, now: float) -> float:
        """Add the tokens earned since the last call; return how many seconds to pause, 0 if none are owed.

        Called when the bucket is empty instead of for each message, so that most messages need no clock.
        """
        earned = (now - self._updated_at) * self._rate
        self._updated_at = now
        self.tokens = max(-self._rate * PAUSE_MAX_S, min(self._rate * BURST_S, self.tokens + earned))
        return PAUSE_MIN_S - self.tokens / self._rate if self.tokens < 0 else 0.0


class Traffic:
    """What all connections of a server sent and received together."""

    __slots__ = ("bytes_in", "bytes_out", "rate_limited_s")

    def __init__(self) -> None:
        self.bytes_in = self.bytes_out = 0  # Without TLS.
        self.rate_limited_s = 0.0  # That connections were not read from, because they had used up their rate.


class InputBudget:
    """Limits what all connections of a server keep of messages that are not complete, or that wait to be handled.

    Only connections that keep more than READ_BYTES count. Beyond the limit, of the address that keeps most the
    connection that has done so for longest is closed, as its message is the least likely to be completed.
    """

    __slots__ = ("_bytes_max", "_kept", "total")

    def __init__(self, message_bytes_max: int) -> None:
        self._bytes_max = max(INPUT_BYTES_MAX, 4 * message_bytes_max)
        self._kept: dict[ServerLink, int] = {}  # The longest first.
        self.total = 0

    def keep(self, link: ServerLink, size: int) -> None:
        """Count that a connection keeps so many bytes of input now."""
        if size > READ_BYTES:
            self.total += size - self._kept.get(link, 0)
            self._kept[link] = size
            while self.total > self._bytes_max:
                victim = self._victim()
                self.release(victim)
                victim.close_unfinished()
        else:
            self.release(link)

    def release(self, link: ServerLink) -> None:
        """Count a connection no more, if it did."""
        self.total -= self._kept.pop(link, 0)

    def _victim(self) -> ServerLink:
        kept: collections.Counter[str] = collections.Counter()
        for link, size in self._kept.items():
            kept[link.address] += size
        (most, _), *_ = kept.most_common(1)
        return next(link for link in self._kept if link.address == most)


class Turns:
    """Decides whose input is handled next when there is more than one turn of the loop should take.

    Nobody waits until messages have cost TURN_COST: that ends a turn, which may have been several of the loop. After
    that, and while any connection waits, each waits with what it has sent beyond its first message, and with anything
    that costs much, until the loop's next turn. Those that wait are served by self-clocked fair
    queueing (https://doi.org/10.1109/INFCOM.1994.337677): the one goes first whose input would be finished first if all
    were handled at the same time. All connections of one address, and those of one token, have the share of one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, message_bytes_max: int = MESSAGE_BYTES_MAX) -> None:
        self.left: float = TURN_COST  # Until connections wait; of a connection that has waited, its quantum.
        self.addresses: dict[str, int] = {}  # How many connections each address has,
        self.grants: dict[str, int] = {}  # ... and how many use a token, by its name.
        self.traffic = Traffic()
        self.input_budget = InputBudget(message_bytes_max)
        self._is_armed = False
        self._loop = loop
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []  # A heap: the finish times come first.
        self._served = 0.0  # The finish time of the latest that was served.
        self._arrivals = itertools.count()

    @property
    def is_crowded(self) -> bool:
        """Whether connections wait, so that the next turn of the loop takes long."""
        return bool(self._waiting)

    def arm(self) -> None:
        """Have the next turn begin with the loop's."""
        if not self._is_armed:
            self._is_armed = True
            self._loop.call_soon(self._serve)

    def wait(self, link: ServerLink, cost: float, handle: Callable[[], None]) -> None:
        """Call `handle`, which is expected to cost that much, when it is the link's turn."""
        sharing = max(self.addresses.get(link.address, 1), self.grants.get(link.grant_name, 1))
        link.finish_time = max(link.finish_time, self._served) + cost * sharing
        heapq.heappush(self._waiting, (link.finish_time, next(self._arrivals), handle))
        self.arm()

    def move(self, link: ServerLink, address: str) -> None:
        """Count a connection for another address from now on."""
        self.leave(link)
        link.address = address
        count(self.addresses, address)

    def leave(self, link: ServerLink) -> None:
        """Count a connection no more."""
        for counts, name in ((self.addresses, link.address), (self.grants, link.grant_name)):
            if name in counts:
                uncount(counts, name)

    def _serve(self) -> None:
        self._is_armed = False
        left: float = TURN_COST
        try:
            while self._waiting and left > 0:
                self._served, _, handle = heapq.heappop(self._waiting)
                self.left = QUANTUM_COST
                handle()
                left -= QUANTUM_COST - self.left
        finally:  # Also if one raises.
            self.left = 0 if self._waiting else left
            if self._waiting:
                self.arm()


class WebSocketLink(Link, AsyncioProtocol):
    """One end of a WebSocket: moves bytes between a socket and a `WebSocketProtocol`, and tells its owner the events.

    What is sent in one turn of the loop goes out together, at its end or when it is more than OUT_BYTES_MAX, so the
    replies to the messages of a chunk share their writes.
    """

    __slots__ = (
        "_at_end",
        "_is_flush_scheduled",
        "_is_handling",
        "_timer",
        "loop",
        "pause_reasons",
        "protocol",
        "transport",
    )

    def __init__(self, protocol: WebSocketProtocol, owner: LinkOwner, decode: Callable[[bytes], Any]) -> None:
        super().__init__(owner, decode)
        self.pause_reasons: set[str] = set()
        self.protocol = protocol
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None  # For the handshake, then for the close.
        self._is_handling = False
        self._is_flush_scheduled = False
        self._at_end: Callable[[], None] | None = None  # What to do when all that came before the end is handled.

    @property
    def unread_bytes(self) -> int:
        """How many bytes came in and were not handled yet."""
        return self.protocol.unread_bytes

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = typing.cast(asyncio.Transport, transport)
        self._timer = self.loop.call_later(HANDSHAKE_S, self._on_handshake_late)

    def _on_handshake_late(self) -> None:
        """End a connection whose peer takes too long, but not one whose request waits for its turn here."""
        if PauseReason.TURN_OVER in self.pause_reasons:
            self._timer = self.loop.call_later(HANDSHAKE_S, self._on_handshake_late)
        else:
            self.abort()

    def data_received(self, data: bytes) -> None:
        self.protocol.receive_data(data)
        if not self.pause_reasons:
            self._read()

    def eof_received(self) -> None:
        # With TLS this comes even while reading is paused, and the transport closes next.
        self._end_when_read(self._on_eof)

    def connection_lost(self, error: Exception | None) -> None:
        if self._at_end is None:
            self.protocol.discard()
        self._end_when_read(functools.partial(self._on_end, error))

    def _end_when_read(self, at_end: Callable[[], None]) -> None:
        """Call `at_end` when what came in before is handled, at the same pace as before the end."""
        self._at_end = at_end
        self.resume_reading(PauseReason.SLOW_CONSUMER)  # Nothing is sent to it any more.
        if not self.pause_reasons or self._is_closing or PauseReason.AUTH_BACKOFF in self.pause_reasons:
            at_end()

    def _on_eof(self) -> None:
        self.protocol.receive_eof()
        self._flush()
        # The transport closes itself now, but not before all is written, which may be never.
        self._is_closing = True
        if self.protocol.is_open:
            self._report_closed(1006, "the connection was lost")
        if self._timer is None:
            self._timer = self.loop.call_later(CLOSING_S, self.abort)

    def _on_end(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.protocol.discard()
        self._on_lost(error)
        if self.protocol.is_open:
            self._report_closed(1006, "the connection was lost")
        self.writable.set()
        self.gone.set()
        self._at_end = self.gone.set  # It has ended already. And what led here refers to this link, as its attribute.

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    # Link

    def send(self, raw: bytes) -> None:
        self.protocol.send_text(raw)
        self._flush_soon()

    def close(self, code: int, reason: str = "") -> None:
        if self._is_closing:
            return
        self._is_closing = True
        if not self.protocol.is_open:
            self.abort()
        else:
            if self.protocol.close_sent is None:
                self.protocol.send_close(code, reason)
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
        protocol = self.protocol
        turn_end = protocol.position + SLICE_BYTES
        self._is_handling = True
        while not self.pause_reasons and (event := protocol.next_event()) is not None:
            if event.__class__ is bytes and not self._is_closing:
                self._deliver(event)
            elif event is COSTLY:
                self._handle_costly()
            else:
                self._handle(event)
            if protocol.position >= turn_end and protocol.unread_bytes:
                self._end_turn()
        self._is_handling = False

    def _end_turn(self) -> None:
        """Handle nothing more until the others have had their turn."""
        self.pause_reading(PauseReason.TURN_OVER)
        self.loop.call_soon(self.resume_reading, PauseReason.TURN_OVER)

    def _handle_costly(self) -> None:
        """Handle an event that may take longer than most."""
        self._handle(self.protocol.next_event())

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
        elif self.protocol.is_open:
            self._report_closed(event.code, event.reason)
        self._process_output()

    def _on_message(self, message: Message) -> None:
        if message.is_text:
            self._deliver(message.raw)
        else:
            self._owner.received(self, InvalidMessage("message: must be text, not binary"), len(message.raw))

    def _on_unreadable(self, raw: bytes) -> None:
        if not is_utf8(raw):  # RFC 6455 §8.1: such a connection must be failed.
            self.protocol.fail(1007, "not UTF-8")
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
        if self._timer is None and self.protocol.close_expected():
            self._timer = self.loop.call_later(CLOSING_S, self.abort)

    def _flush_soon(self) -> None:
        """Write at the end of this turn of the loop, or at once if much has gathered."""
        if self.protocol.unsent_bytes > OUT_BYTES_MAX:
            self._flush()
        elif not self._is_flush_scheduled:
            self._is_flush_scheduled = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_scheduled = False
        transport, protocol = self.transport, self.protocol
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
        if self.protocol.is_open and self.protocol.close_rcvd is None and transport.can_write_eof():
            # Closing a socket with unread bytes resets it, and the reset may overtake the reason (RFC 6455 §7.1.1).
            # What still comes in is discarded until the peer closes too, or the timer of the close cuts the socket.
            try:
                transport.write_eof()
            except OSError:  # The peer has answered what was just written with a reset.
                transport.abort()
        else:
            transport.close()


class ServerLink(WebSocketLink):
    """The hub's end of a WebSocket. `answer(link, request)` returns the answer to a plain HTTP request, else None.

    A peer that sends more than `messages_per_s_max` (0: no limit) is read from more slowly. With half of
    `backlog_bytes_max` unread it is a slow consumer: it is not read from either, and what is sent waits here. It is
    disconnected beyond that limit, or when it has read nothing for STALLED_S seconds: the answer to a close would
    come behind the very bytes that it does not read.
    """

    def __init__(
        self,
        owner: LinkOwner,
        answer: Callable[[ServerLink, Any], HttpAnswer | None],
        *,
        message_bytes_max: int,
        backlog_bytes_max: int,
        messages_per_s_max: float = 0.0,
        address: str = "",
        decode: Callable[[bytes], Any] | None = None,
        on_gone: Callable[[ServerLink], None] = lambda link: None,
        turns: Turns | None = None,
    ) -> None:
        decode = decode if decode is not None else decoder_from_agent()
        super().__init__(websockets_used().server(message_bytes_max), owner, decode)
        self.address = address
        self.is_proxied = False  # Whether its request comes from a trusted proxy, which names the address.
        self.bearer: str | None = None  # The handshake's token, if it did not authenticate the link at once.
        self.grant_name = ""  # Of the token that authenticated it.
        self.turns = turns or Turns(self.loop)
        self.traffic = self.turns.traffic
        self.finish_time = 0.0  # Of the fair queueing, when it last waited.
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
        self._bucket = TokenBucket(self._rate, self.loop.time())
        if self.transport is not None:
            self.transport.set_write_buffer_limits(self._backlog_bytes_max // 2)

    def connection_lost(self, error: Exception | None) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        self._on_gone(self)
        super().connection_lost(error)
        self._count_input()  # What is left of it: nothing, but what waits for its turn.

    @property
    def is_held(self) -> bool:
        return PauseReason.TURN_OVER in self.pause_reasons or PauseReason.JOURNAL in self.pause_reasons

    def limit_messages(self, bytes_max: int) -> None:
        """Accept no larger messages from now on."""
        self.protocol.limit_messages(bytes_max)

    def _on_handshake(self, event: Any) -> None:
        self.is_answered = True
        self.turns.left -= HANDSHAKE_COST
        if self.turns.left < 0.0:
            self._on_turn_used_up()
        answer = self._answer(self, event)
        if answer is None:
            self.protocol.accept(event)
        else:
            self.protocol.reject(answer)
        if self.protocol.is_open:
            self._set_open()

    # The rate limit, and fair turns

    def charge(self, cost: float) -> None:
        turns, bucket = self.turns, self._bucket
        turns.left -= cost if cost > 1.0 else cost * PLAIN_COST
        if turns.left < 0.0:
            self._on_turn_used_up()
        bucket.tokens -= cost
        if bucket.tokens >= 0.0:
            return
        pause_s = bucket.refill(self.loop.time())
        if pause_s:
            self.traffic.rate_limited_s += pause_s
            self.pause_reading(PauseReason.RATE_LIMIT)
            if self._rate_timer is not None:  # Otherwise the earlier timer lets one message through, which arms two.
                self._rate_timer.cancel()
            self._rate_timer = self.loop.call_later(pause_s, self.resume_reading, PauseReason.RATE_LIMIT)

    def waits(self, cost: float, handle: Callable[[], None]) -> bool:
        if self.turns.left > 0:
            return False

        def handle_now() -> None:
            try:
                handle()
            finally:
                self._resume_turn()

        self.pause_reading(PauseReason.TURN_OVER)
        self.turns.wait(self, cost, handle_now)
        return True

    def data_received(self, data: bytes) -> None:
        turns = self.turns
        self.protocol.receive_data(data)
        turns.left -= len(data) / READ_BYTES
        self.traffic.bytes_in += len(data)
        if self.pause_reasons:
            self._count_input()
            return
        if turns.left <= 0.0 and not self.protocol.is_open:  # A handshake costs more than a message.
            self._end_turn()
        else:
            self._read()
            self._count_input()
            if turns.left < 0.0:  # An unfinished message has cost the time to read it.
                self._on_turn_used_up()
        if turns.is_crowded and self._is_flush_scheduled:
            self._flush()  # At the end of this turn of the loop it would wait for all that others have sent.

    def resume_reading(self, reason: str) -> None:
        super().resume_reading(reason)
        self._count_input()

    def _count_input(self) -> None:
        kept_bytes, budget = self.protocol.kept_bytes, self.turns.input_budget
        if kept_bytes > READ_BYTES or budget.total:
            budget.keep(self, kept_bytes)

    def close_unfinished(self) -> None:
        """Close a connection whose input takes the memory of others."""
        reason = "too much unfinished input; retry later"
        self.protocol.fail(CloseCode.TRY_LATER, reason)
        if not self._is_closing:
            self._report_closed(CloseCode.TRY_LATER, reason)
        self._process_output()

    def _end_turn(self) -> None:
        if PauseReason.TURN_OVER in self.pause_reasons:  # It waits already, and would be resumed twice.
            return
        self.pause_reading(PauseReason.TURN_OVER)
        self.turns.wait(self, QUANTUM_COST, self._resume_turn)

    def _resume_turn(self) -> None:
        self.resume_reading(PauseReason.TURN_OVER)
        if not self.pause_reasons:
            self.turns.left -= SOCKET_READ_COST

    def _on_turn_used_up(self) -> None:
        """Wait with the rest of what came in: all have used up this turn together."""
        self.turns.arm()
        if self.protocol.unread_bytes:
            self._end_turn()

    def _handle_costly(self) -> None:
        """Handle an event whose CPU time is measured, and charged."""
        if not self.waits(QUANTUM_COST, self._measure):
            self._measure()

    def _measure(self) -> None:
        began = time.thread_time()
        event = self.protocol.next_event()
        if event is not None:  # Otherwise the connection was lost while this waited.
            self._handle(event)
        cpu_s = time.thread_time() - began
        self.turns.left -= cpu_s / COST_S
        self.charge(cpu_s * self._rate / CPU_SHARE if self._rate < math.inf else 0.0)

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
            protocol = self.protocol
            protocol.send_text(raw)
            if not self._is_flush_scheduled or protocol.unsent_bytes > OUT_BYTES_MAX:
                self._flush_soon()
        elif self._postponed_bytes <= self._backlog_bytes_max // 2:
            self.send_when_writable(raw)
            self._postponed_bytes += len(raw)
        else:
            self.loop.call_soon(self._close_slow_consumer)  # Not now: its owner is about to send more.

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
            self.protocol.send_text(raw)
            self._flush_soon()
        self._flush()

    def _on_written(self, size: int, waiting: int) -> None:
        self._written_bytes += size
        self.traffic.bytes_out += size
        if waiting > self._backlog_bytes_max:
            self.loop.call_soon(self._close_slow_consumer)
        elif waiting and self._stall_timer is None:
            read_bytes = self._written_bytes - waiting
            self._stall_timer = self.loop.call_later(STALLED_S, self._check_stalled, read_bytes)

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
        self.ready: asyncio.Future[None] = self.loop.create_future()
        self._token = token

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        detect_dead_peer(transport.get_extra_info("socket"))
        request = self.protocol.connect()
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        self.protocol.send_request(request)
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
            self.ready.set_exception(self.protocol.handshake_exc or error or ConnectionError("closed at once"))
            self.ready.exception()  # Whether or not anybody waits.


def detect_dead_peer(connection: socket.socket | None) -> None:
    """Have the system notice a peer that vanished without a word, as far as it can: by TCP keepalives and timeouts."""
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in TCP_OPTIONS.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class HubUrls:
    """The URLs of a hub and its standbys, comma-separated; `connect` tries them in turn, the last good one first."""

    def __init__(self, urls: str, *, token: str | None = None, ca_file: str | None = None) -> None:
        self.urls = check_urls(urls).split(URL_SEPARATOR)
        self._token = token
        self._ca_file = ca_file

    async def connect(self, owner: LinkOwner) -> Link:
        """Open a WebSocket to the first hub that accepts one. Raises as `connect_websocket`, with all reasons."""
        within_s = NEXT_HUB_S if len(self.urls) > 1 else None
        reasons = []
        for url in list(self.urls):
            try:
                link = await connect_websocket(url, owner, token=self._token, ca_file=self._ca_file, within_s=within_s)
            except Disconnected as error:
                reasons.append(error.message)
            else:
                self.urls.remove(url)
                self.urls.insert(0, url)
                return link
        raise Disconnected("; ".join(reasons))


async def connect_websocket(
    url: str,
    owner: LinkOwner,
    *,
    token: str | None = None,
    ca_file: str | None = None,
    within_s: float | None = None,
) -> Link:
    """Open a WebSocket to the hub at `url`, with a bearer token if there is one: `token`, or that of the environment.

    The hub's certificate is verified with the system's CAs, or with those in `ca_file` (else AGENTHUB_CA_FILE).
    Raises Disconnected if that fails or takes `within_s` seconds (None: HANDSHAKE_S), ValueError if the URL, the token
    or the file is not valid.
    """
    host, port, is_secure = split_url(url)[:3]
    protocol = websockets_used().client(url, CLIENT_MESSAGE_BYTES_MAX)
    token = bearer_token() if token is None else check_token("the token", token)
    tls = client_tls(ca_file or os.environ.get("AGENTHUB_CA_FILE") or None) if is_secure else None
    loop = asyncio.get_running_loop()
    within_s = HANDSHAKE_S if within_s is None else within_s
    try:
        async with asyncio.timeout(within_s):
            connection = await open_socket(host, port)
            _, link = await loop.create_connection(
                lambda: ClientLink(protocol, owner, token),
                sock=connection,
                ssl=tls,
                server_hostname=host if tls is not None else None,
            )
            try:
                await link.ready
            except BaseException:
                link.abort()
                raise
    except TimeoutError as error:
        raise Disconnected(f"no hub answers at {url} within {within_s:g} s; check host and port") from error
    except ConnectionRefusedError as error:
        raise Disconnected(f'no hub at {url}: nothing listens there; start one with "agenthub hub"') from error
    except OSError as error:
        text = f"{error.strerror or str(error) or type(error).__name__}{scheme_hint(is_secure, error)}"
        raise Disconnected(f"no hub at {url}: {text}") from error
    except websockets_used().refused as error:
        raise Disconnected(f"no hub at {url}: {rejection_text(error)}{scheme_hint(is_secure, error)}") from error
    return link


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


async def open_socket(host: str, port: int) -> socket.socket:
    """Connect to the address of a host that answers first. Raises OSError.

    While one does not answer, the next is tried after NEXT_ADDRESS_S (RFC 8305, "happy eyeballs", §5). Not every event
    loop has that built in.
    """
    found = await addresses_of(host, port)
    attempts: set[asyncio.Task[socket.socket]] = set()
    error: BaseException = OSError("the name has no address")
    try:
        while found or attempts:
            if found:
                attempts.add(asyncio.create_task(connect_socket(*found.pop(0))))
            timeout_s = NEXT_ADDRESS_S if found else None
            ended, attempts = await asyncio.wait(attempts, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for attempt in ended:
                error = attempt.exception() or error
                if attempt.exception() is None:
                    attempts |= ended - {attempt}
                    return attempt.result()
        raise error
    finally:
        await cancel_and_wait(attempts)
        for attempt in attempts:  # That succeeded too.
            if not attempt.cancelled() and attempt.exception() is None:
                attempt.result().close()


async def addresses_of(host: str, port: int) -> list[tuple[int, Any]]:
    """Return the families and addresses of a host, the two families in turn (RFC 8305 §4)."""
    with contextlib.suppress(OSError, UnicodeError):  # A literal address needs no thread to look it up in.
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        return [(one[0], one[4]) for one in found]
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    first = [(one[0], one[4]) for one in found if one[0] == found[0][0]]
    other = [(one[0], one[4]) for one in found if one[0] != found[0][0]]
    return [one for pair in itertools.zip_longest(first, other) for one in pair if one is not None]


async def connect_socket(family: int, address: Any) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection


def scheme_hint(is_secure: bool, error: Exception) -> str:
    """Return what to try if a connection failed in the way in which it does when only the hub, or the URL, has TLS."""
    if is_secure and (isinstance(error, ConnectionResetError) or "WRONG_VERSION_NUMBER" in str(error)):
        return "; a hub without --tls-cert speaks ws://, so try that"
    if not is_secure and not isinstance(error, OSError) and getattr(error, "response", None) is None:
        return "; a hub with --tls-cert speaks wss://, so try that"
    return ""


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


Job = Callable[[], Callable[[], None] | None]  # Of a thread.


class DaemonThreads:
    """Runs plain functions in threads, which are reused; there are as many as functions ran at once, at most so many.

    A thread cannot be stopped. They are daemons, so that a function that hangs does not keep the process alive.
    """

    def __init__(self, name: str, threads_max: float = math.inf) -> None:
        self._name = name
        self._threads_max = threads_max
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()  # None ends a thread.
        self._idle = threading.Semaphore(0)
        self._count = 0

    def start(self, job: Job) -> None:
        """Call a function in an idle thread, or in a new one if there is none, and then the function that it returns.

        Neither may raise. The second hands over the outcome of the first: the thread counts as idle before that.
        """
        if not self._idle.acquire(blocking=False) and self._count < self._threads_max:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
            self._count += 1
        self._jobs.put(job)

    def close(self) -> None:
        """End each thread as soon as its function has returned."""
        for _ in range(self._count):
            self._jobs.put(None)
        self._count = 0

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            hand_over = job()
            self._idle.release()
            if hand_over is not None:
                hand_over()
            del job, hand_over  # An idle thread must not keep what its last function worked on.

    async def run(self, function: Callable[[], Any], on_returned: Callable[[], None] | None = None) -> Any:
        """Return what the function returns, or raise what it raises.

        `on_returned` is called on the loop when the thread is free again, also if this call was cancelled before.
        """
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[Any] = loop.create_future()
        context = contextvars.copy_context()

        def finish(output: Any, error: BaseException | None) -> None:
            if on_returned is not None:
                on_returned()
            if finished.done():  # It was cancelled meanwhile.
                return
            if error is None:
                finished.set_result(output)
            else:
                finished.set_exception(error)

        def hand_over(outcome: tuple[Any, BaseException | None]) -> None:
            with contextlib.suppress(RuntimeError):  # The loop was closed while the function ran.
                loop.call_soon_threadsafe(finish, *outcome)

        self.start(lambda: functools.partial(hand_over, call_caught(context, function)))
        return await finished


def call_caught(context: contextvars.Context, function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """Return what a function returns and None, or None and what it raises."""
    try:
        return context.run(call_here, function), None
    except StopIteration as stop:  # A future does not accept this one.
        return None, RuntimeError(f"the handler raised {stop!r}")
    except BaseException as raised:
        return None, raised


def call_here(function: Callable[[], Output]) -> Output:
    """Call a function of the user's; a child process that it forks ends where it returns."""
    pid = os.getpid()
    try:
        return function()
    finally:
        end_forked_child(pid)


def end_forked_child(pid: int) -> None:
    """Exit if this process is a child that user code forked in process `pid`, and that has returned from that code.

    It shares the connection and the event loop's selector with its parent, and would answer in its place.
    """
    if os.getpid() == pid:
        return
    error, code = sys.exc_info()[1], 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None and not isinstance(error, StopIteration):  # By which a coroutine returns.
        log_loop.error("a forked child failed", exc_info=error)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # It is closed, or there is none.
            stream.flush()
    os._exit(code)


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function; of a partial, that of its function; of another object, that of its class."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return getattr(function, "__name__", None) or type(function).__name__


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
    runner = asyncio.Runner(loop_factory=factory)
    own_loop = runner.get_loop()
    own_loop.set_default_executor(daemon_executor())
    try:
        return runner.run(main)
    finally:
        if cancel_left_over(own_loop):
            own_loop.close()  # Closing the runner would wait until they end.
        else:
            runner.close()


def cancel_left_over(loop: asyncio.AbstractEventLoop) -> set[asyncio.Task[Any]]:
    """Cancel all tasks of a loop that has stopped; log and return those that have not ended ENDING_S later."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        _, left = loop.run_until_complete(asyncio.wait(left, timeout=ENDING_S))
    if left:
        names = ", ".join(task.get_name() for task in left)
        log_loop.error("coroutines ignore that they are cancelled, and are left behind: %s", escape_unprintable(names))
        for task in left:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is logged above
    return left


def daemon_executor() -> ThreadPoolExecutor:
    """Return an executor for `asyncio.to_thread` that does not keep the process alive while a function hangs in it.

    Otherwise closing a loop waits for it, and the interpreter for each of its threads.
    """
    from concurrent.futures import Future, ThreadPoolExecutor

    class DaemonExecutor(ThreadPoolExecutor):
        def __init__(self) -> None:
            super().__init__()
            self._daemons = DaemonThreads("to_thread", self._max_workers)
            self._open: dict[Future[Any], str] = {}

        def submit(self, function: Callable[..., Any], /, *given: Any, **arguments: Any) -> Future[Any]:
            future: Future[Any] = Future()
            within = getattr(function, "args", None) or (function,)  # That of `to_thread` runs the context.
            self._open[future] = name_of(within[0])
            future.add_done_callback(lambda _: self._open.pop(future, None))
            self._daemons.start(functools.partial(run_into, future, functools.partial(function, *given, **arguments)))
            return future

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            from concurrent.futures import wait as wait_for

            self._daemons.close()
            if wait and wait_for(list(self._open), ENDING_S).not_done:
                names = escape_unprintable(", ".join(self._open.values()))
                log_loop.error("functions still run in threads, and are left behind: %s", names)

    return DaemonExecutor()


def run_into(future: Future[Any], function: Callable[[], Any]) -> None:
    """Call a function, and set its outcome in a future unless that was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call_here(function))
    except BaseException as error:
        future.set_exception(error)


def bearer_token() -> str | None:
    """Return the token to connect with: AGENTHUB_TOKEN, or the content of AGENTHUB_TOKEN_FILE; None without them.

    Raises ValueError if the file cannot be read, or a header cannot carry the token.
    """
    if token := os.environ.get("AGENTHUB_TOKEN"):
        return check_token("AGENTHUB_TOKEN", token)
    if path := os.environ.get("AGENTHUB_TOKEN_FILE", "").strip(BLANKS):
        return token_in(path)
    return None


def is_token_in_file() -> bool:
    """Return whether `bearer_token` reads a file."""
    return not os.environ.get("AGENTHUB_TOKEN") and bool(os.environ.get("AGENTHUB_TOKEN_FILE", "").strip(BLANKS))


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
    if re.match(r"[^/]*//[^/]*,", url):
        raise ValueError(f"each of several URLs needs its scheme, such as ws://hub1:8765,ws://hub2:8765, not {url!r}")
    if not re.fullmatch(r"wss?://[^\s/?#]+(/[^\s#]*)?", url):
        raise ValueError(f"a hub's URL looks like {URL_DEFAULT}, not {url!r}")
    return url


def check_urls(urls: str) -> str:
    """Return the URLs of a comma-separated list, each once and as `check_url` returns it, with URL_SEPARATOR between.

    Raises ValueError for one that is not a hub's. A comma before anything but a scheme is part of a URL's path.
    """
    if not isinstance(urls, str):
        raise ValueError(f"a hub's URL is a string such as {URL_DEFAULT}, not of type {type(urls).__name__}")
    return URL_SEPARATOR.join(dict.fromkeys(map(check_url, re.split(r",(?=\s*wss?://)", urls, flags=re.IGNORECASE))))


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


URL_SEPARATOR = ","  # Between the URLs of several hubs; each begins with its scheme.
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
GET_ONLY = "the method must be GET"
ALLOW_GET = (("Allow", "GET"),)  # RFC 9110 §15.5.6 wants it with a 405.
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


class HttpAnswer(NamedTuple):
    """The answer to a plain HTTP request, or to a handshake that is rejected. The connection ends with it."""

    status: int
    text: str
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


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


@part
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
        self.method = "GET"  # Of the request that a server has read.
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

    @property
    def kept_bytes(self) -> int:
        """How many bytes of messages are kept that are not complete, or were not asked for yet."""
        if not self._buffer and self._fragments is None:  # As after most reads.
            return 0
        return self.unread_bytes + self._fragments_bytes

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

    def reject(self, answer: HttpAnswer) -> None:
        """Send a plain HTTP response, without its body if the method is HEAD, after which the connection ends."""
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

    def reject(self, answer: HttpAnswer) -> None:
        from http import HTTPStatus

        body = answer.text.encode()
        length, kind = ("Content-Length", str(len(body))), ("Content-Type", answer.content_type)
        headers = Headers(("Connection", "close"), length, kind, *answer.headers)
        head = headers.encode(f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}")
        self._write(head if self.method == "HEAD" else head + body)
        self._end()

    def _accepted(self, request: Request) -> str:
        headers = request.headers
        if request.method != "GET":
            raise HandshakeFailed(GET_ONLY, 405)
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
        self.method = method
        if headers.get_all("Transfer-Encoding") or set(headers.get_all("Content-Length")) - {"0"}:
            raise HandshakeFailed("the request must not have a body")
        return Request(path, headers, method, version)

    def _refuse(self, error: HandshakeFailed) -> None:
        more = {426: (("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")), 405: ALLOW_GET}
        text = f"cannot open a WebSocket: {error}\n"
        self.reject(HttpAnswer(error.status, text, headers=more.get(error.status, ())))


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
        for error in (self._inner.parser_exc, self.handshake_exc):
            while error is not None:  # A traceback holds the frames that led here, and so all of this connection.
                error.__traceback__, error = None, error.__cause__ or error.__context__
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
        if self.method != "GET":
            self.reject(HttpAnswer(405, f"cannot open a WebSocket: {GET_ONLY}\n", headers=ALLOW_GET))
            return
        try:
            response = self._inner.accept(request)
        except UnicodeEncodeError:  # `websockets` 15 quotes a header in its answer that is not ASCII.
            self.reject(HttpAnswer(400, "a header of the handshake is not ASCII\n"))
        else:
            self._send_response(response)

    def reject(self, answer: HttpAnswer) -> None:
        response = self._inner.reject(answer.status, answer.text)
        del response.headers["Content-Type"]
        for name, value in (("Content-Type", answer.content_type), *answer.headers):
            response.headers[name] = value
        self._send_response(response if self.method != "HEAD" else dataclasses.replace(response, body=b""))

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
            self._inner.receive_data(self._adapt(data) if self.is_server else data)
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

    def _adapt(self, line: bytes) -> bytes:
        """Return a line of a request as `websockets` takes it, which knows no method but GET.

        Before version 17 it knew no HTTP/1.0 either, which load balancers send.
        """
        first = re.fullmatch(rb"([A-Z]{3,20}) (\S+) HTTP/1\.([01])\r\n", line)
        if first is None:
            return line
        self.method = first[1].decode()
        is_healthz = first[2].startswith(b"/healthz")
        return b"GET %b HTTP/1.%b\r\n" % (first[2], b"1" if is_healthz else first[3])

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
        self.next_at = math.inf

    def set(self, function: Callable[[], None], when: float) -> None:
        """Call `function` at `when` by the loop's clock; one that is set already is moved there."""
        self._due.push(function, when)
        if when < self.next_at:
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
        self.next_at = when
        self._timer = self._loop.call_at(when, self._ring)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self.next_at = None, math.inf

    def _ring(self) -> None:
        now = max(self._loop.time(), self.next_at)  # A timer may fire up to the clock's resolution early.
        self._timer, self.next_at = None, math.inf
        try:
            while (first := self._due.first()) is not None and first[0] <= now:
                self._due.discard(first[1])
                first[1]()
        finally:  # If one raises, the others are called nevertheless.
            if (first := self._due.first()) is not None and first[0] < self.next_at:
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
# can end, and agents stay connected. Every DISK_CHECK_S the hub tries the reserve again, and checks
# that the journal's file is where a restart would look for it; else no new task is accepted either.
#
# A journal with a lease can be taken over by another hub (JournalLike). So a hub also holds effects
# without changes, all but heartbeats, once SILENT_AFTER of the lease has passed since the start of
# the last write that succeeded: the next one shows whether it still has the lease. Without other
# changes it writes every RENEW_AFTER of the lease. If it was replaced (Fenced), or could not write
# for LEASES_MAX leases, it is lost: it drops what it holds, aborts its links, and ends. Until it has
# the lease a HubServer is a standby: it answers every request with 503. When it stops, it gives the
# lease back as soon as its links are closed, and drains nothing: the next hub goes on with the tasks.
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
# A thousand connections within their limits are still more than the hub can handle at once, so they
# take turns (Turns): while nobody waits, messages are handled as they come; after that a connection
# waits with the rest of what it sent, and with any message that costs much, and each address and
# each token has the share of one connection. A heartbeat is the first message of its connection
# after a while, so it does not wait.
#
# Namespaces share the port and the settings, and nothing else: each is a LocalHub with its own Hub,
# limits and journal. HubServer is itself that of `default`.
# ============================================================================================


WRITE_RETRY_S = 1.0  # After a write to the journal that failed.
SILENT_AFTER = 0.9  # Of the lease of a journal: the rest is for clocks that do not agree.
RENEW_AFTER = 0.2  # Of the lease: at the latest then there is another write.
LEASES_MAX = 3  # How many leases a hub waits for a write to succeed before it ends.
DISK_CHECK_S = 5.0  # Between two checks of the journal's disk and file.
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
LAG_SAMPLE_S = 0.5  # Between two looks at how late the loop is; the worst of the
LAG_SAMPLES = 60  # ... last ones is shown, so that a scrape each half minute misses none.
PROCESS_STARTED_AT = time.time()
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
ACCEPTED_AT_ONCE = 16  # Before the loop's next turn: one at a time, clients of a busy hub would fill the backlog.
LISTEN_BACKLOG = 4096  # Of clients to accept; the system may allow fewer (net.core.somaxconn), and drops the others.
RIGHTS = ("register", "delegate", "broadcast", "observe")
NO_STORE = (("Cache-Control", "no-store"),)
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
    if not isinstance(namespace, str) or not is_namespace(namespace):
        raise ValueError(f"{where}.namespace: {NAMESPACE_RULE}")
    if namespace.endswith(NEIGHBOURS):
        raise ValueError(f"{where}.namespace: must not end like a file next to a journal: {', '.join(NEIGHBOURS)}")
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
    connect. `served` are the only namespaces whose tokens are valid here (None: all). `rejected` counts rejections, by
    reason.
    """

    def __init__(
        self,
        access: Access | None,
        names: frozenset[str] | None,
        admit: Callable[[Link, Grant | None], LinkOwner],
        served: frozenset[str] | None = None,
    ) -> None:
        self.access = access
        self._served = served
        self.origins: frozenset[str] = frozenset()
        self.knows_own_pages = False  # Also those of addresses that are not in `origins`.
        self.rejected: dict[str, int] = {}
        self._names = names
        self._admit = admit
        self._backoff = AuthBackoff()
        self.unauthenticated: dict[Link, Unauthenticated] = {}
        self._loop = asyncio.get_running_loop()

    # The handshake

    def check_request(self, link: Link, request: Any) -> HttpAnswer | None:
        """Return the answer that rejects an HTTP request of a foreign web page; None for any other request.

        A page can make a browser connect to any address, and let its own name resolve to any address, but cannot set
        these two headers: https://datatracker.ietf.org/doc/html/rfc6455#section-10.2.
        """
        hosts, origins = request.headers.get_all("Host"), request.headers.get_all("Origin")
        if not hosts and is_health_check(request):  # HTTP/1.0 of a load balancer. Every browser sends a Host.
            hosts = list(self._names or ())[:1]
        if self._names is not None and not (len(hosts) == 1 and host_name(hosts[0]) in self._names):
            self.reject(link, "host")
            return HttpAnswer(403, "this hub does not accept that Host header; --allow-host adds a name\n")
        if origins and not (len(origins) == 1 and (origins[0] in self.origins or self._is_own(origins[0], hosts))):
            self.reject(link, "origin")
            return HttpAnswer(403, "web pages of that origin may not connect; --allow-origin adds an origin\n")
        return None

    def _is_own(self, origin: str, hosts: list[str]) -> bool:
        """Return whether a page comes from the very address that the request was sent to.

        Where the address can be any, that does not show that the page is this hub's: another may let its own name
        resolve to the hub. So it counts only where a token is needed: no browser sends one by itself.
        """
        scheme, _, address = origin.partition("://")
        return self.knows_own_pages and scheme in ("http", "https") and [address] == [host.lower() for host in hosts]

    def check_bearer(self, link: ServerLink, request: Any) -> None:
        """Look up the bearer token of a handshake: with a valid one, the link is admitted as it opens.

        A wrong one is treated as a failed attempt once the link is open; so is one whose answer has to be delayed.
        """
        token = bearer_in(request)
        if self.access is not None and token is not None:
            link.grant = self._grant(token) if not self._delay_s(link) else None
            link.bearer = token if link.grant is None else None

    def grant_of(self, link: Link, request: Any) -> Grant | None:
        """Return what the bearer token of a plain HTTP request allows; None while its address has to wait."""
        token = bearer_in(request)
        if self.access is None or token is None or self._delay_s(link):
            return None
        grant = self._grant(token)
        if grant is None:
            self._backoff.add(link.address, self._loop.time())
            self.reject(link, "unauthorized")
        return grant

    def _grant(self, token: str | None) -> Grant | None:
        """Return what a token allows here; None if it is unknown, or one of a namespace that is not served."""
        grant = self.access.grant(token) if self.access is not None and token is not None else None
        return grant if grant is None or self._served is None or grant.namespace in self._served else None

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
        timer = self._loop.call_later(TOKEN_S, self._on_late, link)
        bearer = link.bearer if isinstance(link, ServerLink) else None
        self.unauthenticated[link] = Unauthenticated(timer, bearer)
        if bearer is not None:
            self._authenticate(link, AuthAttempt(None, bearer), 0)

    def _on_late(self, link: Link) -> None:
        """Close a link that has not authenticated in time, unless its attempt waits for its turn here."""
        if link.is_held:
            self.unauthenticated[link].timer = self._loop.call_later(TOKEN_S, self._on_late, link)
        else:
            self._close(link, "authentication timed out")

    def received(self, link: Link, attempt: AuthAttempt, message_bytes: int) -> None:
        link.charge(1 + message_bytes // COST_BYTES)
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
        grant = self._grant(attempt.token)
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
        token = attempt.token or pending.bearer
        elsewhere = self.access.grant(token) if self.access is not None and token is not None else None
        if attempt.token is not None and elsewhere is None:
            self._backoff.add(link.address, self._loop.time())
        if attempt.message is not None:
            reply_to = attempt.message.reply_to if isinstance(attempt.message, InvalidMessage) else attempt.message.id
            text = "authentication required: set AGENTHUB_TOKEN or AGENTHUB_TOKEN_FILE"
            if attempt.token is not None or pending.bearer is not None:
                text = "invalid token: check AGENTHUB_TOKEN or AGENTHUB_TOKEN_FILE"
            if elsewhere is not None:
                text = f"this hub does not serve the token's namespace, {elsewhere.namespace}: use the URL of its hub"
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


def url_host(host: str) -> str:
    """Return a host as URLs and the Host header have it: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def host_names(host: str, allowed: Iterable[str]) -> frozenset[str]:
    """Return the names of a server that listens on `host`, in lower case: its own, and those that are allowed."""
    return frozenset({url_host(host).lower(), *allowed, *(LOOPBACK_NAMES if is_loopback(host) else ())})


def network_of(address: str) -> str:
    """Return what counts as one address: of IPv6 the first 64 bits, because a site owns all addresses with the same."""
    import ipaddress

    if ":" not in address:
        return address
    return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))


# Proxies


def proxy_networks(proxies: Iterable[str]) -> tuple[Any, ...]:
    """Return the networks of trusted proxies; raise ValueError for what is no address and no network."""
    import ipaddress

    networks = []
    for proxy in proxies:
        try:
            networks.append(ipaddress.ip_network(proxy.strip()))
        except ValueError as error:
            raise ValueError(f"a trusted proxy is an address or a network, such as 10.0.0.0/8: {error}") from None
    return tuple(networks)


def ip_in(text: str) -> Any:
    """Return the IP address in a text, which may have a port (RFC 7239 §6); None if it has none."""
    import ipaddress

    found = re.fullmatch(r'\s*"?(?:\[([^\]]*)\](?::\d+)?|([\d.]+):\d+|([^"\[\]]*))"?\s*', text)
    try:
        address = ipaddress.ip_address(next(filter(None, found.groups()), "").strip() if found is not None else "")
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def forwarded_address(headers: Any, proxies: tuple[Any, ...]) -> str | None:
    """Return the client's address that trusted proxies report; None without one that can be relied on.

    That is the last entry that is not a proxy's: a client may send entries of its own, but a proxy appends. If both
    X-Forwarded-For and Forwarded are there (RFC 7239), one of them may be the client's, so they must agree.
    """
    found = set()
    for name, pattern in (("X-Forwarded-For", "(.*)"), ("Forwarded", r"(?i)(?:.*;)?\s*for\s*=([^;]*)(?:;.*)?")):
        if values := headers.get_all(name):
            entries = [re.fullmatch(pattern, entry) for entry in ",".join(values).split(",")]
            addresses = (ip_in(entry[1]) if entry is not None else None for entry in reversed(entries))
            clients = (one for one in addresses if one is None or not any(one in network for network in proxies))
            found.add(next(clients, None))
    (client,) = found if len(found) == 1 else (None,)
    return None if client is None else str(client)


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


def lease_clock() -> float:
    """Return the time by a clock that goes on while the machine is suspended, where there is one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


def has_lease(journal: JournalLike | None) -> bool:
    """Return whether another hub can take over a journal while this process lives."""
    return journal is not None and journal.lease_s < math.inf


class GroupCommit:
    """Holds the hub's effects back until the changes that they follow from are in the journal.

    One write at a time, in a thread of its own, so that a slow disk does not stop the loop; the steps taken meanwhile
    are merged into the next one. Heartbeats and `overloaded` errors do not wait. Calls `on_lost` when this hub must
    end, because its lease is lost or may be.
    """

    def __init__(
        self,
        hub: Hub,
        journal: JournalLike,
        carry_out: Callable[[list[Effect]], None],
        on_lost: Callable[[JournalError], None],
    ) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._hub = hub
        self._journal = journal
        self._carry_out = carry_out
        self._on_lost = on_lost
        self._has_lease = has_lease(journal)
        self._silent_from = -math.inf if self._has_lease else math.inf  # By the lease_clock.
        self._writing_since = lease_clock()  # The first attempt of this write, which goes on, or of the last one.
        self._renewal: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "agenthub-journal")
        self._changes: Changes | None = None  # To be in the next write ...
        self.held: list[Effect] = []  # ... and the effects to be carried out after it.
        self._costs: dict[Link, float] = {}  # Of the messages of each connection since the last write.
        self._offset_written = self._clock_offset()  # Of the last write; the journal was loaded just now.
        self._is_closed = False
        self.commits = Histogram()  # Of the writes that succeeded,
        self.failures = 0  # ... and how many did not.
        self.idle = asyncio.Event()  # Nothing is held back.
        self.idle.set()
        self._timer: asyncio.TimerHandle | None = None
        if self._has_lease:
            hub.full_reason = "the hub's database is away; retry later"
            self._renew()
        else:
            self.check_disk()

    def add(self, step: Step) -> None:
        """Carry out the effects of a step: now if nothing waits to be written before them, else as soon as it is."""
        if self._is_closed:
            return
        effects, changes = step
        is_silent = self.is_silent
        if changes is None and not is_silent and self.idle.is_set():
            self._carry_out(effects)
            return
        if self._changes is None:
            self._changes = changes
        elif changes is not None:
            self._changes.merge(changes)
        self._carry_out([effect for effect in effects if self._may_overtake(effect[1], is_silent)])
        self.held += [effect for effect in effects if not self._may_overtake(effect[1], is_silent)]
        if self.idle.is_set():
            self.idle.clear()
            self._loop.call_soon(self._write)  # After this turn of the loop, so that what it brings is one write.

    def charge(self, link: Link, cost: float) -> None:
        """Charge a link for a message. If it has cost much during one write, it is not read until that is done."""
        if not self.idle.is_set():
            total = self._costs[link] = self._costs.get(link, 0) + cost
            if total > COST_PER_WRITE_MAX:
                link.pause_reading(PauseReason.JOURNAL)

    async def close(self, within_s: float) -> None:
        """Write the changes that are left, for at most `within_s` seconds, and close the journal."""
        if self._is_closed:
            return
        self._follow_clock()
        await self.flush(within_s)
        if not self.idle.is_set():
            log_hub.error("the journal could not be written; the changes that it lacks were not acknowledged either")
        self._cancel_timers()
        self._is_closed = True
        ending = self._loop.run_in_executor(self._thread, self._end)
        self._thread.shutdown(wait=False)
        with contextlib.suppress(TimeoutError):  # A disk that hangs must not keep the hub from ending.
            async with asyncio.timeout(within_s):
                await asyncio.shield(ending)
        if self._has_lease and not ending.done():
            self._journal.close()  # Cuts the write that hangs.

    def abandon(self) -> None:
        """Drop all that is held, and close the journal without another write."""
        if not self._is_closed:
            self._cancel_timers()
            self._is_closed = True
            self._changes, self.held = None, []
            self._thread.shutdown(wait=False)
            self._loop.run_in_executor(None, self._journal.close)

    def _cancel_timers(self) -> None:
        for timer in (self._timer, self._renewal):
            if timer is not None:
                timer.cancel()

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

    @property
    def is_silent(self) -> bool:
        """Whether the lease may be over, so that nothing may be said before the next write has succeeded."""
        return self._silent_from < math.inf and lease_clock() > self._silent_from

    @staticmethod
    def _may_overtake(action: HubOutput | Close, is_silent: bool) -> bool:
        if isinstance(action, HeartbeatAck):
            return True
        return not is_silent and isinstance(action, Error) and action.code == Code.OVERLOADED

    def _write(self) -> None:
        """Write all changes until now, and then carry out all effects until now."""
        self._writing_since = lease_clock()
        held, self.held = self.held, []
        changes, self._changes = self._changes, None
        self._try(changes or Changes(), held)

    def _try(self, changes: Changes, held: list[Effect]) -> None:
        if self._is_closed:
            return
        started = lease_clock()
        self._offset_written = self._clock_offset()
        writing = self._loop.run_in_executor(self._thread, self._journal.write, changes, self._offset_written)
        writing.add_done_callback(functools.partial(self._on_written, changes, held, started))

    def _on_written(self, changes: Changes, held: list[Effect], started: float, writing: asyncio.Future[None]) -> None:
        error = writing.exception()
        if self._is_closed:
            return
        if error is not None:
            self.failures += 1
            self._on_failure(error, changes, held)
            return
        self.commits.add(lease_clock() - started)
        if self._has_lease:
            self._on_renewed(started)
            if self.is_silent:  # It took too long: only another write shows whether another hub decides by now.
                self._try(Changes(), held)
                return
        try:
            self._carry_out(held)
        finally:  # A bug in one effect must not stop the journal.
            self._resume_reading()
            if self.held or self._changes is not None:
                self._write()
            else:
                self.idle.set()

    def _on_renewed(self, started: float) -> None:
        self._silent_from = started + SILENT_AFTER * self._journal.lease_s
        if self._hub.is_full:
            log_hub.warning("the journal can be written again")
            self._hub.is_full = False

    def _renew(self) -> None:
        """Write again if the last write was a while ago; end if the present one has failed for too long."""
        lease_s, writing_s = self._journal.lease_s, lease_clock() - self._writing_since
        if self.idle.is_set():
            if writing_s > RENEW_AFTER * lease_s / 2:
                self.idle.clear()
                self._write()
        elif writing_s > LEASES_MAX * lease_s:
            self._on_lost(JournalError(f"{self._journal.path}: could not be written for {writing_s:.0f} s"))
            return
        self._renewal = self._loop.call_later(RENEW_AFTER * lease_s / 2, self._renew)

    def _resume_reading(self) -> None:
        costs, self._costs = self._costs, {}
        for link in costs:
            link.resume_reading(PauseReason.JOURNAL)

    def _on_failure(self, error: BaseException, changes: Changes, held: list[Effect]) -> None:
        """Accept no new task, give up the reserve, and retry until the changes are written."""
        if isinstance(error, Fenced):
            self._on_lost(error)
            return
        self._resume_reading()  # Heartbeats must not wait until somebody frees disk space.
        delay_s = min(WRITE_RETRY_S, RENEW_AFTER * self._journal.lease_s)
        if not self._hub.is_full:
            text = "the journal cannot be written: %s; new tasks are rejected until it can"
            log_hub.error(text, one_line(error))
            self._hub.is_full = True
            self._journal.give_up_reserve()
            delay_s = 0.0
        if not self._has_lease:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(DISK_CHECK_S, self.check_disk)
        self._loop.call_later(delay_s, self._try, changes, held)

    def check_disk(self) -> None:
        """Check whether the journal's file is in its place, and whether the disk has free space."""
        if self._is_closed:
            return
        self._follow_clock()
        checking = self._loop.run_in_executor(self._thread, self._check_disk_now)
        checking.add_done_callback(self._on_disk_checked)

    def _clock_offset(self) -> float:
        return time.time() - self._loop.time()

    def _follow_clock(self) -> None:
        """Write if the machine's clock was set, because a restart goes by it."""
        if abs(self._clock_offset() - self._offset_written) > CLOCK_STEP_S:
            self.add(Step([], Changes()))

    def _check_disk_now(self) -> tuple[bool, bool]:
        is_in_place = self._journal.is_in_place()
        return is_in_place, not is_in_place or self._journal.take_reserve()

    def _on_disk_checked(self, checking: asyncio.Future[tuple[bool, bool]]) -> None:
        if self._is_closed:
            return
        is_in_place, has_space = checking.result() if checking.exception() is None else (True, False)
        self._report_place(is_in_place)
        if has_space and self._hub.is_full:
            log_hub.warning("the journal's disk has free space again")
        elif not has_space and not self._hub.is_full:
            log_hub.error("the journal's disk is full; new tasks are rejected until there is free space")
        self._hub.is_full = not has_space
        if self._timer is not None:  # Of a write that failed meanwhile.
            self._timer.cancel()
        self._timer = self._loop.call_later(DISK_CHECK_S, self.check_disk)

    def check_place(self) -> None:
        """Check now whether the journal's file is in its place."""
        self._report_place(self._journal.is_in_place())

    def _report_place(self, is_in_place: bool) -> None:
        if is_in_place != self._hub.is_unlinked:
            return
        self._hub.is_unlinked = not is_in_place
        if is_in_place:
            log_hub.warning("the journal is in its place again: %s", self._journal.path)
        else:
            text = "the journal was removed or replaced while in use: %s; new tasks are rejected until it is put back"
            log_hub.error(text + " or the hub is restarted", self._journal.path)


def is_in_records(action: HubOutput) -> bool:
    """Return whether a message has a payload that is in memory anyway, in the hub's records."""
    return isinstance(action, Delegated | TaskOutcome | TaskAnswer) or (
        isinstance(action, StatusReply) and action.question is not None
    )


# Metrics
#
# They are counted where things happen, and put into words here, in the text formats of Prometheus
# (https://prometheus.io/docs/instrumenting/exposition_formats/) and OpenMetrics
# (https://github.com/prometheus/OpenMetrics/blob/v1.0.0/specification/OpenMetrics.md).


class Metric(NamedTuple):
    """A family of samples: one number, one for each combination of values of its labels, or a histogram."""

    kind: str
    name: str  # Of a counter without its `_total`.
    purpose: str
    numbers: float | Mapping[Any, float] | Histogram  # By the value of the label, or by a tuple of values.
    labels: tuple[str, ...] = ()


def samples(metric: Metric) -> Iterator[tuple[str, float]]:
    """Yield the rest of the name of each sample, with its labels, and its value."""
    ending, numbers = "_total" if metric.kind == "counter" else "", metric.numbers
    if isinstance(numbers, Histogram):
        totals = list(itertools.accumulate(numbers.counts))
        yield from zip(BUCKETS, totals, strict=True)
        yield from (("_count", totals[-1]), ("_sum", numbers.sum_s))
    elif isinstance(numbers, Mapping):
        for values, number in numbers.items():
            yield ending + labels(metric.labels, values if isinstance(values, tuple) else (values,)), number
    else:
        yield ending, numbers


def labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    """Return the labels of a sample. Their values may be texts that clients chose."""
    pairs = []
    for name, value in zip(names, values, strict=True):
        text = value.encode(errors="replace").decode()  # Lone surrogates are not UTF-8.
        text = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        pairs.append(f'{name}="{text}"')
    return f"{{{','.join(pairs)}}}"


def exposition(metrics: Iterable[Metric], *, is_openmetrics: bool) -> str:
    """Return the text of some metrics. The two formats differ in how counters are announced, and in the end."""
    lines = []
    for metric in metrics:
        announced = f"{metric.name}_total" if metric.kind == "counter" and not is_openmetrics else metric.name
        lines += [f"# HELP {announced} {metric.purpose}", f"# TYPE {announced} {metric.kind}"]
        lines += [f"{metric.name}{rest} {number:.12g}" for rest, number in samples(metric)]
    return "\n".join([*lines, *(["# EOF"] if is_openmetrics else []), ""])


def wants_openmetrics(request: Any) -> bool:
    """Return whether the Accept header of a request names OpenMetrics 1.0, without weighing it against others."""
    accepted = ",".join(request.headers.get_all("Accept")).lower()
    return re.search(r"application/openmetrics-text(?![^,]*;\s*q=0(\.0*)?\s*(,|;|$))", accepted) is not None


def hub_metrics(local_hub: LocalHub) -> list[Metric]:
    """Return the metrics of the hub of one namespace, in labels of its own words but for the names of capabilities."""
    hub, tasks, directory = local_hub.hub, local_hub.hub.tasks, local_hub.hub.directory
    summary, reason = hub.summary(), readiness(hub)
    queues = summary["queues"]
    unserved = {name: number for name, number in queues.items() if name not in directory.pools}
    ended = {(TaskState.COMPLETED, ""): tasks.ended[TaskState.COMPLETED], **tasks.codes}
    running, bytes_max = tasks.most_running(), hub.settings.records_bytes_max
    by_capability = ("capability",)
    return [
        Metric("gauge", "agenthub_info", "1, with the version.", {__version__: 1}, ("version",)),
        Metric("gauge", "agenthub_ready", "1 if new tasks are accepted.", {reason: reason == "ok"}, ("reason",)),
        Metric("gauge", "agenthub_uptime_seconds", "Seconds since the start.", summary["uptime_s"]),
        Metric("gauge", "agenthub_agents", "Agents that are known, by state.", directory.states, ("state",)),
        Metric("gauge", "agenthub_connections", "Connections of agents and observers.", summary["connections"]),
        Metric("gauge", "agenthub_tasks", "Tasks whose record is kept, by state.", summary["tasks"], ("state",)),
        Metric("counter", "agenthub_tasks_accepted", "Tasks accepted.", tasks.accepted),
        Metric("counter", "agenthub_tasks_ended", "Tasks ended, by state and code.", ended, ("state", "code")),
        Metric("gauge", "agenthub_queue_tasks", "Tasks that wait, of the longest queues.", queues, by_capability),
        Metric("gauge", "agenthub_unserved_tasks", "Of these, tasks no agent offers to do.", unserved, by_capability),
        Metric("gauge", "agenthub_running_tasks", "Tasks in progress.", running, by_capability),
        Metric("histogram", "agenthub_task_wait_seconds", "From acceptance to the first assignment.", tasks.waited_s),
        Metric("histogram", "agenthub_task_run_seconds", "From the last assignment to the end.", tasks.ran_s),
        Metric("counter", "agenthub_messages_received", "Messages from clients.", local_hub.messages_in),
        Metric("counter", "agenthub_messages_sent", "Messages to clients.", local_hub.messages_out),
        Metric("counter", "agenthub_refused", "Messages refused, by code.", summary["refused"], ("code",)),
        Metric("counter", "agenthub_closed", "Connections that ended, by code.", summary["closed"], ("code",)),
        Metric("gauge", "agenthub_records_bytes", "Memory of all records, estimated.", summary["records_bytes"]),
        Metric("gauge", "agenthub_records_limit_bytes", "The limit of that.", bytes_max),
        *(journal_metrics(local_hub.commit) if local_hub.commit is not None else ()),
    ]


def journal_metrics(commit: GroupCommit) -> list[Metric]:
    return [
        Metric("histogram", "agenthub_journal_commit_seconds", "Writes to the journal.", commit.commits),
        Metric("counter", "agenthub_journal_failures", "Writes that failed, and were repeated.", commit.failures),
        Metric("gauge", "agenthub_journal_held_messages", "Messages that wait for a write.", len(commit.held)),
    ]


def process_metrics() -> list[Metric]:
    """Return the metrics of this process, under the names that Prometheus' own libraries use."""
    metrics = [
        Metric("counter", "process_cpu_seconds", "CPU seconds, user and system.", time.process_time()),
        Metric("gauge", "process_start_time_seconds", "When it started, in Unix time.", PROCESS_STARTED_AT),
    ]
    if (limit := descriptors_max()) < math.inf:
        metrics.append(Metric("gauge", "process_max_fds", "File descriptors that it may have.", limit))
    with contextlib.suppress(OSError):  # Only Linux has /proc.
        # Linux 6.2 and newer count them in the size of the folder. Listing it takes time in proportion to them.
        descriptors = os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
        metrics.append(Metric("gauge", "process_open_fds", "File descriptors in use.", descriptors))
        with open("/proc/self/statm", "rb", buffering=0) as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        metrics.append(Metric("gauge", "process_resident_memory_bytes", "Resident memory in bytes.", resident))
    return metrics


class LoopLag:
    """Measures how late the timers of the loop are: that is how long a message waits at worst before it is read."""

    def __init__(self) -> None:
        self._late: collections.deque[float] = collections.deque(maxlen=LAG_SAMPLES)
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + LAG_SAMPLE_S
        self._timer = loop.call_at(due, self._sample, loop, due)

    def _sample(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self._late.append(loop.time() - due)
        self.start(loop)

    @property
    def worst_s(self) -> float:
        """The worst of the last LAG_SAMPLES samples, in seconds."""
        return max(self._late, default=0.0)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class LocalHub:
    """A hub in this process, reached over in-memory links: for tests, and for programs of one process.

        async with LocalHub() as hub, Agent("a", hub=hub) as a:
            ...

    Ends with the `async with`, or with `stop`. Everything happens on the loop it was started on. With a `journal`,
    which it opens and closes, `start` continues from what is in it, and raises JournalError if that is impossible.
    Where another hub can take the journal over, `start` waits for its lease, and `lost` fails with a JournalError when
    this hub has ended because of that.
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "_is_arming",
        "_is_verbose",
        "_loop",
        "_timers",
        "commit",
        "hub",
        "is_running",
        "links",
        "lost",
        "messages_in",
        "messages_out",
        "settings",
    )

    settings: HubSettings
    hub: Hub
    lost: asyncio.Future[None]

    def __init__(self, settings: HubSettings | None = None, *, journal: JournalLike | None = None) -> None:
        self.settings = settings or HubSettings()
        self.journal = journal
        self.commit: GroupCommit | None = None
        self._report_loss = self._on_lost
        self.links: dict[Link, None] = {}
        self.messages_in = self.messages_out = 0
        self._tick_at = math.inf  # When `_tick` is to be called; it may be early.
        self._is_arming = False
        self._is_catching_up = False
        self.is_running = False

    async def __aenter__(self) -> typing.Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _check_stopped(self) -> None:
        """Raise RuntimeError if this hub runs: another start would forget its agents and tasks."""
        if self.is_running:
            raise RuntimeError("this hub is already running; stop it before you start it again")

    async def start(self) -> None:
        self._check_stopped()
        decoder_from_agent()  # Compiled now, so that the first message need not wait for it.
        self._is_verbose = log_hub.isEnabledFor(logging.DEBUG)  # Once, because it costs a call for each message.
        self._loop = asyncio.get_running_loop()
        self._timers = Timers()
        self.lost = self._loop.create_future()
        if self.journal is not None:
            await self._open_journal(self.journal)
        now = self._loop.time()
        self.hub = Hub(
            self.settings,
            entropy=os.urandom,
            now=now,
            is_journaled=self.journal is not None,
            is_held=operator.attrgetter("is_held"),
        )
        if self.journal is not None:
            await self._restore(self.journal)
        self.is_running = True
        self._arm()

    @staticmethod
    async def _open_journal(journal: JournalLike) -> None:
        try:
            await asyncio.to_thread(journal.open)
        except asyncio.CancelledError:
            if has_lease(journal):
                journal.close()  # Otherwise the thread would go on waiting for the lease.
            raise

    async def _restore(self, journal: JournalLike) -> None:
        """Restore the hub from the journal."""
        offset = time.time() - self._loop.time()
        try:
            agents, tasks, last = await asyncio.to_thread(journal.load, offset)
            step = self.hub.restore(agents, tasks, last - self.settings.grace_s)
        except BaseException:
            journal.close()
            raise
        if agents or tasks:
            log_hub.info("restored %d agents and %d tasks from %s", len(agents), len(tasks), journal.path)
            if tasks:
                self._log_age(self._loop.time() - last)
        self.commit = GroupCommit(self.hub, journal, self._carry_out, self._report_loss)
        self.commit.add(step)
        if has_lease(journal):
            # Until a write has shown that the lease is not lost already.
            await done_or_set(self.lost, self.commit.idle)
            if self.lost.done():
                self.lost.result()

    def _log_age(self, age_s: float) -> None:
        """Log how long ago the last change was: deadlines go by the machine's clock, which may have been set."""
        if age_s < 0:
            log_hub.warning("the journal's last change is %.0f s in the future: the clock was set back", -age_s)
        else:
            log_hub.info("the journal's last change was %.0f s ago by the machine's clock", age_s)

    def _on_lost(self, error: JournalError) -> None:
        """End at once, and say nothing more: another hub has taken over, or may have."""
        if self.lost.done():
            return
        log_hub.error("%s: this hub ends", error.message)
        self.is_running = False
        self._timers.clear()
        if self.commit is not None:
            self.commit.abandon()
        for link in self._stop_listening():
            link.abort()
        self.lost.set_exception(error)
        self.lost.exception()  # Marks it as retrieved: perhaps nobody waits.

    def shut_down(self) -> None:
        """Accept no new task from now on."""
        self.hub.shut_down()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Accept no new task, give those in progress `drain_s` seconds, then close all links with 1001.

        If another hub can take the journal over, tasks are not waited for: they go on there.
        """
        if not self.is_running:
            return
        if has_lease(self.journal):
            self.is_running = False  # What comes in from now on is not handled; its sender sends it to the next hub.
        else:
            await self._drain(drain_s)
        if self.commit is not None:
            await self.commit.flush(CLOSING_S)
        self.is_running = False
        self._timers.clear()
        links = self._stop_listening()
        for link in links:
            link.close(CloseCode.GOING_AWAY, "the hub is shutting down")
        if self.commit is not None and has_lease(self.journal):
            await self.commit.close(CLOSING_S)  # Now: the next hub need not wait until all clients have answered.
        with contextlib.suppress(TimeoutError):  # Each link aborts by itself CLOSING_S after its close.
            async with asyncio.timeout(2 * CLOSING_S):
                await asyncio.gather(*(link.gone.wait() for link in links))
        for link in links:
            link.abort()
        if self.commit is not None:
            await self.commit.close(CLOSING_S)
            self.commit = None

    async def _drain(self, drain_s: float) -> None:
        self.hub.shut_down()
        last = self._loop.time() + drain_s
        while self.hub.tasks.in_progress and self._loop.time() < last:
            await asyncio.sleep(0.02)

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

    def received(self, link: Link, message: Any, message_bytes: int, has_turn: bool = False) -> None:
        if self._is_verbose:
            log_hub.debug("received type=%s bytes=%d", getattr(message, "type", "invalid"), message_bytes)
        commit = self.commit
        if not self.is_running:
            return
        if commit is not None and commit.is_overfull:
            link.close(CloseCode.GOING_AWAY, "the journal cannot be written; come back later")
            return
        if message.__class__ in EXPECTED_COSTS and not has_turn:
            cost = EXPECTED_COSTS[message.__class__](self.hub, message)
            if cost and link.waits(cost, functools.partial(self.received, link, message, message_bytes, has_turn=True)):
                return
        self.messages_in += 1
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
        self.messages_out += len(effects)
        for link, action in effects:
            if link not in self.links:  # It closed while its effects were held for the journal.
                self._return_unsent(action)
                continue
            if action is not sent:  # A broadcast is one message to many, encoded once.
                if isinstance(action, Close):
                    link.close(action.code, action.reason)
                    continue
                if link.is_backlogged and is_in_records(action):
                    link.send_when_writable(action)
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
        # The process was stopped: results and registrations of that time wait in the sockets.
        self._is_catching_up = now - self._tick_at > TICK_LATE_S and not self._is_catching_up
        if self._is_catching_up:
            # Nobody could fetch an outcome meanwhile: those whose retention passed are kept for a grace period more.
            self.hub.next_sweep = now + self.settings.grace_s
            self._tick_at = now + CATCH_UP_S
            self._timers.set(self._tick, self._tick_at)
            return
        self._tick_at = math.inf
        try:
            self._apply(self.hub.tick(now))
        finally:
            self._arm()  # A tick that fails must not stop the deadlines.


class HubServer(LocalHub):
    """A hub that listens for WebSockets, and answers `GET /healthz` and `GET /metrics` on the same port.

    With `has_page`, browsers get a page at `/` that shows its agents and tasks.

    With `port=0` it picks a free one, which `url` contains. `start` raises OSError if the port is taken. Without
    `access` all clients are accepted; if `host` is not loopback, that raises ValueError unless `insecure`. Each
    namespace but `default`, which is this object, is a hub of its own behind the same port, with a journal of its own.
    With `namespaces` it serves only these, and is itself the first one of them by name if `default` is not among them.
    While `start` waits for the lease of a journal, it listens, and answers every request with 503.

    On loopback it accepts the Host names of loopback and those in `allow_hosts`; elsewhere those in `allow_hosts`, or
    any if that is empty. Web pages may connect from its own origins and those in `allow_origins`
    (`https://example.org`).

    Limits for each address, and the log, use the address that one of `trusted_proxies`, addresses and networks, names
    as its client's.
    """

    page: typing.ClassVar[str] = ""
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
        trusted_proxies: Iterable[str] = (),
        backlog_bytes_max: int = BACKLOG_BYTES_MAX,
        connections_per_address_max: int = CONNECTIONS_PER_ADDRESS_MAX,
        messages_per_s_max: float = MESSAGES_PER_S_MAX,
        journal: JournalLike | None = None,
        namespaces: Iterable[str] | None = None,
        has_page: bool = True,
    ) -> None:
        served = self._check_namespaces(namespaces, access)
        own = min(served, key=lambda name: (name != NAMESPACE_DEFAULT, name)) if served else NAMESPACE_DEFAULT
        if journal is not None and own != NAMESPACE_DEFAULT:
            journal = journal.of_namespace(own)
        super().__init__(settings, journal=journal)
        self._check_limits(backlog_bytes_max, connections_per_address_max, messages_per_s_max)
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
        self._proxies = proxy_networks(trusted_proxies)
        self._backlog_bytes_max = backlog_bytes_max
        if bytes_max > MESSAGE_BYTES_MAX:  # Otherwise one large message could make any peer a slow consumer.
            self._backlog_bytes_max = max(backlog_bytes_max, 2 * bytes_max)
        self._per_address_max = connections_per_address_max
        self._messages_per_s_max = messages_per_s_max
        self.namespaces: dict[str, LocalHub] = {own: self}
        self._served = served
        self._reloading = asyncio.Lock()
        self._listeners: list[socket.socket] = []
        self._accepting: dict[asyncio.Task[None], ServerLink | None] = {}  # Of a listener, or of one connection.
        self._loop_lag = LoopLag()
        self.is_standby = False  # It listens, but does not have the lease of its journal yet.
        self.sockets: dict[ServerLink, None] = {}  # All connections, also before and without a WebSocket handshake.
        self._paths: dict[str, Callable[[ServerLink, Any], HttpAnswer | None]] = {
            "/healthz": self._health,
            "/metrics": self._metrics,
        }
        if has_page:
            self._paths["/"] = self._page

    @staticmethod
    def _check_namespaces(namespaces: Iterable[str] | None, access: Access | None) -> frozenset[str] | None:
        if namespaces is None:
            return None
        if access is None:
            raise ValueError("--namespaces needs --access: without tokens there is only one namespace")
        served = frozenset(namespaces)
        if not all(map(is_namespace, served)):
            raise ValueError(f"namespaces: {NAMESPACE_RULE}")
        return served

    @staticmethod
    def _check_limits(backlog_bytes_max: int, connections_per_address_max: int, messages_per_s_max: float) -> None:
        if backlog_bytes_max <= 0:
            raise ValueError("backlog_bytes_max must be more than 0")
        if connections_per_address_max <= 0:
            raise ValueError("connections_per_address_max must be more than 0")
        if not 0 <= messages_per_s_max < math.inf:
            raise ValueError("messages_per_s_max must be a number of at least 0 (unlimited)")

    @property
    def url(self) -> str:
        return f"{'ws' if self._tls is None else 'wss'}://{url_host(self.host)}:{self.port}"

    @property
    def addresses(self) -> dict[str, int]:
        """The number of connections from each address; none before the start."""
        return dict(self.turns.addresses) if hasattr(self, "turns") else {}

    @property
    def rejected(self) -> dict[str, int]:
        """The number of rejected connections and attempts to authenticate, by reason; none before the start."""
        return dict(self.authenticator.rejected) if hasattr(self, "authenticator") else {}

    async def start(self) -> None:
        self._check_stopped()
        names = host_names(self.host, self._allow_hosts)
        is_any_name = not is_loopback(self.host) and not self._allow_hosts
        self.turns = Turns(asyncio.get_running_loop(), self.settings.message_bytes_max)
        self.authenticator = Authenticator(self.access, None if is_any_name else names, self._admit, self._served)
        self.authenticator.knows_own_pages = self.access is not None and not is_loopback(self.host)
        self.is_standby = has_lease(self.journal)
        try:
            if self.is_standby:
                await self._start_listening(names)
                log_hub.info("until it has the lease of its journal, %s answers 503", self.url)
            await super().start()
            for namespace in self._served_namespaces(self.access):
                await self._start_namespace(namespace)
            if self.is_standby:
                self._count_descriptors()
                self.is_standby = False
            else:
                await self._start_listening(names)
        except BaseException:
            await self.stop()  # Unlocks the journals for another hub.
            raise
        log_hub.info("messages: %s; websocket: %s", codec().name, websockets_used().name)

    async def _start_listening(self, names: Iterable[str]) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop_lag.start(self._loop)
        self._count_descriptors()
        self._listeners = await self._listen()
        self.authenticator.origins = self._allow_origins | own_origins(
            names, self.port, is_secure=self._tls is not None
        )
        self._accepting = {self._loop.create_task(self._accept_all(listener)): None for listener in self._listeners}

    async def stop(self, drain_s: float = 0.0) -> None:
        await asyncio.gather(super().stop(drain_s), *(other.stop(drain_s) for other in self._other_namespaces()))
        async with self._reloading:  # A reload may have started another one meanwhile.
            await asyncio.gather(*(other.stop() for other in self._other_namespaces()))
        for link in self._stop_listening():  # Those of a standby.
            link.abort()
        await asyncio.gather(*self._accepting, return_exceptions=True)  # Until the port is free again.

    def shut_down(self) -> None:
        for namespace in self.namespaces.values():
            namespace.hub.shut_down()

    def _on_lost(self, error: JournalError) -> None:
        super()._on_lost(error)
        for other in self._other_namespaces():
            other._on_lost(error)

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
            for namespace in self._served_namespaces(access):
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

    def _served_namespaces(self, access: Access | None) -> list[str]:
        names = access.namespaces if access is not None else []
        return [name for name in names if self._served is None or name in self._served]

    async def _start_namespace(self, namespace: str) -> None:
        """Start the hub of a namespace, unless it runs already."""
        if namespace not in self.namespaces and self.is_running:
            journal = self.journal.of_namespace(namespace) if self.journal is not None else None
            local_hub = LocalHub(self.settings, journal=journal)
            local_hub._report_loss = self._on_lost  # One lease for all: the loss of one is that of all.
            await local_hub.start()
            self.namespaces[namespace] = local_hub

    def _admit(self, link: Link, grant: Grant | None) -> LinkOwner:
        """Hand a link over to the hub of its namespace."""
        local_hub = self.namespaces[grant.namespace] if grant is not None else self
        link.grant = grant
        link.set_owner(local_hub, decoder_from_agent())
        if grant is not None and isinstance(link, ServerLink):
            link.limit_messages(self.settings.message_bytes_max)
            link.grant_name = grant.name
            count(self.turns.grants, grant.name)
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
                    listener = socket.create_server(where, family=family, backlog=LISTEN_BACKLOG)
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
        self._loop_lag.stop()
        while self._listeners:
            with contextlib.suppress(NotImplementedError):  # Windows: its loop can cancel an `accept` at any moment.
                self._loop.remove_reader(self._listeners.pop())
        for task, link in self._accepting.items():
            if link is None:
                self._loop.call_soon(task.cancel)  # After it has taken what `sock_accept` has for it already.
            else:
                link.abort()  # Now: when its task is cancelled, uvloop closes the transport, which does not say so.
                task.cancel()
        elsewhere = {link for other in self._other_namespaces() for link in other.links}
        return [link for link in dict.fromkeys([*self.links, *self.sockets]) if link not in elsewhere]

    async def _accept_all(self, listener: socket.socket) -> None:
        with listener:
            for number in itertools.count(1):
                try:
                    connection, address = await self._loop.sock_accept(listener)
                except OSError as error:
                    log_hub.error("a connection cannot be accepted: %s", error.strerror)
                    await asyncio.sleep(ACCEPT_RETRY_S)
                    continue
                if not self._listeners:
                    connection.close()
                    return
                # As asyncio does for its own sockets: else a small message waits for the previous one's ACK.
                with contextlib.suppress(OSError):  # The client has hung up already.
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.accept(connection, address[0])
                if number % ACCEPTED_AT_ONCE == 0:
                    await asyncio.sleep(0)  # `sock_accept` does not wait while another client is in the queue.

    def accept(self, connection: socket.socket, address: str) -> None:
        network = network_of(address)
        over = self.turns.addresses.get(network, 0) - self._per_address_max
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
            turns=self.turns,
        )
        link.is_proxied = any(ip_in(address) in one for one in self._proxies)
        self.sockets[link] = None  # Now, not in the task: the next client is accepted before that runs.
        count(self.turns.addresses, network)
        task = self._loop.create_task(self._open(link, connection, network))
        self._accepting[task] = link
        task.add_done_callback(functools.partial(self._on_opened, link, connection))

    def _on_opened(self, link: ServerLink, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._accepting.pop(task, None)
        if task.cancelled():  # Perhaps before it began.
            self._on_gone(link)
            link.gone.set()
            connection.close()

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
            self.turns.leave(link)

    def _answer(self, link: ServerLink, request: Any) -> HttpAnswer | None:
        """Return the answer to a plain HTTP request; None if the WebSocket handshake may go on."""
        if link.is_proxied and (client := forwarded_address(request.headers, self._proxies)) is not None:
            self.turns.move(link, network_of(client))
        refusal = self.authenticator.check_request(link, request)
        if refusal is not None:
            return refusal
        plain = self._plain_answer(link, request)
        if plain is not None:
            return plain
        for limit, number, whose in (
            (self.settings.connections_max, len(self.sockets), "the hub"),
            (self._per_address_max, self.turns.addresses[link.address], "that address"),
        ):
            if number > limit:
                self.authenticator.reject(link, "connections")
                return HttpAnswer(503, f"{whose} has its {limit} connections; try again later\n")
        self.authenticator.check_bearer(link, request)
        return None

    def _plain_answer(self, link: ServerLink, request: Any) -> HttpAnswer | None:
        """Return the answer to a request of one of the paths that are no WebSocket, and to any while another hub
        serves.
        """
        path = request.path.partition("?")[0]
        absence = self._absence()
        if absence is not None and path != "/healthz":
            return HttpAnswer(503, f"this hub does not serve now ({absence}): use the other URL\n")
        answer = self._paths.get(path)
        if answer is None:
            return None
        if link.protocol.method not in ("GET", "HEAD"):
            return HttpAnswer(405, f"{GET_ONLY} or HEAD\n", headers=(("Allow", "GET, HEAD"),))
        return answer(link, request)

    def _absence(self) -> str | None:
        """Return why another hub should be asked; None if this one decides."""
        if self.is_standby:
            return "standby"
        return "silent" if self.commit is not None and self.commit.is_silent else None

    def _observed(self, link: ServerLink, request: Any) -> LocalHub | None:
        """Return the hub of the namespace that a request may observe; None if it lacks a token with that right."""
        if self.access is None:
            return self
        grant = self.authenticator.grant_of(link, request)
        return self.namespaces[grant.namespace] if grant is not None and "observe" in grant.may else None

    def _health(self, link: ServerLink, request: Any) -> HttpAnswer:
        """Return whether clients should connect, and whether new tasks are accepted, by one word that says why not.

        For a token with the right to observe also the summary of its namespace.
        """
        status, more = self._absence(), {}
        if status is None:
            observed = self._observed(link, request)
            local_hub = observed or self
            if local_hub.commit is not None:
                local_hub.commit.check_place()
            status = readiness(local_hub.hub)
            if observed is not None:
                more = {**observed.hub.summary(), "turned_away": self.authenticator.rejected}
        text = json.dumps({"status": status, "ready": status == "ok", **more}) + "\n"
        is_serving = status == "ok" or status.startswith("journal_")
        return HttpAnswer(200 if is_serving else 503, text, "application/json", NO_STORE)

    @classmethod
    def set_page(cls, html: str) -> None:
        """Have all servers show this page to browsers. Section 10 does so, which comes last."""
        cls.page = html

    def _page(self, link: ServerLink, request: Any) -> HttpAnswer | None:
        """Return the page for browsers; None for a handshake, which has the same path."""
        if request.headers.get_all("Upgrade"):
            return None
        return HttpAnswer(200, self.page, "text/html; charset=utf-8", (*NO_STORE, *page_headers(self.page)))

    def _metrics(self, link: ServerLink, request: Any) -> HttpAnswer:
        """Return the metrics of this server, and of the namespace that the request may observe."""
        observed = self._observed(link, request)
        if observed is None:
            text = "metrics need a token with the right to observe, as a bearer token\n"
            return HttpAnswer(401, text, headers=(("WWW-Authenticate", "Bearer"),))
        is_openmetrics = wants_openmetrics(request)
        text = exposition(hub_metrics(observed) + self.metrics() + process_metrics(), is_openmetrics=is_openmetrics)
        return HttpAnswer(200, text, OPENMETRICS if is_openmetrics else PROMETHEUS_TEXT, NO_STORE)

    def metrics(self) -> list[Metric]:
        """Return the metrics that the namespaces of this server share."""
        traffic, lag_s, rejected = self.turns.traffic, self._loop_lag.worst_s, self.authenticator.rejected
        return [
            Metric("counter", "agenthub_bytes_received", "Bytes from connections, without TLS.", traffic.bytes_in),
            Metric("counter", "agenthub_bytes_sent", "Bytes to WebSockets, without TLS.", traffic.bytes_out),
            Metric(
                "counter",
                "agenthub_rate_limited_seconds",
                "Seconds that connections over their rate were not read from.",
                traffic.rate_limited_s,
            ),
            Metric("counter", "agenthub_rejected", "Connections and tokens rejected.", rejected, ("reason",)),
            Metric("gauge", "agenthub_sockets", "Open sockets.", len(self.sockets)),
            Metric("gauge", "agenthub_loop_lag_seconds", "Worst lag of the event loop in half a minute.", lag_s),
        ]


@functools.cache
def page_headers(page: str) -> tuple[tuple[str, str], ...]:
    """Return the headers that keep a page from loading, running or sending anything but its own style and script."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    policy = {
        "default-src": "'none'",
        "script-src": hashes["script"],
        "style-src": hashes["style"],
        "img-src": "data:",  # Its icon.
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",  # Assigning to innerHTML is an error.
        "trusted-types": "'none'",
    }
    return (
        ("Content-Security-Policy", "; ".join(f"{name} {value}" for name, value in policy.items())),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
    )


def readiness(hub: Hub) -> str:
    """Return "ok" if a hub accepts new tasks, else why not."""
    if hub.shutting_down:
        return "shutting_down"
    return "ok" if hub.journal_state in ("none", "ok") else f"journal_{hub.journal_state}"


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
#
# First steps. In Python 3.12 and newer, an async handler whose task finds a free slot takes its first step at
# once, in an eager asyncio.Task; one that does not suspend costs no turn of the loop. How many do so in one turn
# is limited by what a link handles in one. Other handlers begin in the next turn: many tasks may wait for a slot.
#
# Slots. A handler has one of `max_tasks` slots until its coroutine and its thread have ended. That may be later
# than the end of its task: no thread can be cancelled, and a coroutine may ignore it. The hub considers the slot
# free when the task has ended, and learns otherwise OVERSTAY_S later: the worker registers the slot as `occupied`,
# and fails the tasks that were assigned to it meanwhile with `busy`, which the hub assigns again.
# ============================================================================================

log_agent = logging.getLogger("agenthub.agent")

REPLY_S = 10.0  # For the hub to answer a registration.
PROBE_S = 10.0  # Without a reply, the connection is probed by a heartbeat, which must be answered within as long.
CLOCK_S = 0.05  # A timer may fire so early, by the resolution of the clock.
REQUEST_S = 60.0  # For it to answer anything else, which may wait for a slow disk.
TOKEN_REPLACED_S = 10.0  # How long a token file may be missing, or hold a token that the hub does not accept yet.
LATE_REGISTRATION_S = 120.0  # How long the hub may still receive a registration that was given up.
LEAVING_S = 2.0  # For the hub to acknowledge that an agent leaves, and for handlers to clean up.
BLOCKED_S = 5.0  # For which one step of an async handler may keep the loop; then it is logged.
OVERSTAY_S = 1.0  # For a handler to end after its task has; then the hub is told that its slot is taken.
LATE_S = 5.0  # After a task's deadline, for its outcome to arrive.
LOG_LINES_PER_S = 100
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 30.0
BACKOFF_RETURN_S = 6.0  # The limit while a hub that was there is expected back,
RETURN_MIN_S, RETURN_MAX_S = 120.0, 3600.0  # which is for as long as it was there, within these limits.
RETURN_WAIT_S = 60.0  # How long a new hub's agents are expected back, as long as the grace period of a hub by default.
RETURN_POLL_S = 1.0  # Between two attempts to submit a task to one of them.
CAPABILITIES_KNOWN_MAX = 10_000  # Of other agents, by an agent that delegated to them.
BACKOFF_TAKEOVER_S = 1.5  # The limit while a standby is expected to take over,
TAKEOVER_S = 30.0  # which is for as long as this.
DRAIN_S = 4.0  # For running tasks to end when an agent is asked to stop. Containers are killed after 10 s.
HEARTBEAT_MIN_S, HEARTBEAT_MAX_S = 0.01, TTL_MAX_S  # Limits to the interval that the hub asks for.
TASKS_OVER = 100  # A worker holds up to twice its max_tasks, for tasks that have just ended still count, and so many.
LATE_CODES = (Code.TASK_OVER, Code.NOT_ASSIGNED, Code.STALE_ATTEMPT)  # The task ended meanwhile: nobody's mistake.
REASON_MAX = 4096  # Characters of the reason of a cancellation.
LEAVES_MAX = 5  # Exceptions of a group that the requester is told.
PIECES_PER_S = 20  # Messages with pieces of one task's output; texts are sent together.
UPDATES_MAX = 1000  # Updates of a task, and broadcasts, kept for a slow consumer; then the oldest are dropped.

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
        self.features: Collection[str] = ()  # Of the hub.
        self.heartbeat_s = 30.0
        self.message_bytes_max = MESSAGE_BYTES_MAX
        self.last_received = 0.0
        self._on_message = on_message
        self._pending: dict[str, Callable[[HubMessage | AgentHubError], None]] = {}  # By the request's id.
        self._ids = itertools.count(1)
        self._link: Link | None = None
        self._timers = Timers()  # For replies that do not come.
        self._probed_at: float | None = None  # While the hub has not sent anything since.

    @classmethod
    async def open(cls, connector: Connector, on_message: Callable[[HubMessage], None]) -> Session:
        """Connect. Raises Disconnected if there is no hub."""
        session = cls(on_message)
        session._link = await connector(session)
        return session

    def apply(self, registered: Registered) -> None:
        """Take over what the hub says in its reply to the registration."""
        self.agent_id = registered.agent_id
        self.features = registered.features
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

    @property
    def is_writable(self) -> bool:
        """Whether its buffer has room."""
        return self._link is not None and self._link.writable.is_set()

    def send_nowait(self, raw: bytes) -> None:
        """Send a message that may be missed: drop it if the session is closed or its buffer is full."""
        if self._link is not None and self.is_writable:
            self._link.send(raw)

    def send_request(
        self,
        message: AgentMessage,
        on_reply: Callable[[HubMessage | AgentHubError], None],
        message_id: str | None = None,
    ) -> None:
        """Send; `on_reply` gets the reply before any message behind it, or Disconnected. Raises as `encode` does.

        `message_id` is of this session by default, and then only digits.
        """
        message.id = message_id or str(next(self._ids))
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
        """Set the earlier of a request's two timeouts, that of the hub and that of the caller; return its function.

        If both are later than PROBE_S, that function first probes the connection then.
        """
        now = self._loop.time()
        lost_at = math.inf if within_s is None else now + within_s
        given_up_at = min(lost_at, until)

        def on_timeout() -> None:
            if self._loop.time() < given_up_at - CLOCK_S:
                self._timers.set(on_timeout, given_up_at)
                self.probe()
            else:
                self._on_timeout(replied, within_s if lost_at <= until else None)

        if given_up_at < math.inf:
            self._timers.set(on_timeout, min(given_up_at, now + PROBE_S))
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

    def probe(self) -> None:
        """Send a heartbeat, and abort the connection if nothing arrives within PROBE_S seconds."""
        if self._probed_at is None:
            self._probed_at = self._loop.time()
            self._timers.set(self._on_probed, self._probed_at + PROBE_S)
            self.send_request(Heartbeat(), _ignore)

    def _on_probed(self) -> None:
        probed_at, self._probed_at = self._probed_at, None
        if probed_at is not None and self.last_received < probed_at:
            log_agent.warning(
                "the hub does not answer: disconnecting agent=%s", escape_unprintable(self.agent_id or "")
            )
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

    A hub that was there is expected back soon: until then the limit is 6 s, and with a standby 1.5 s for the first
    30 s. Starts over only after a connection that lasted longer than the present limit; otherwise agents would storm a
    hub that accepts their connections and drops them.
    """

    def __init__(self, *, has_standby: bool = False) -> None:
        self._takeover_s = self._takeover_left_s = TAKEOVER_S if has_standby else 0.0
        self._limit_s = BACKOFF_FIRST_S
        self._expected_s = 0.0  # How much longer the hub is expected back soon.

    def next_s(self) -> float:
        """Return how many seconds to wait, and double the limit."""
        delay_s = random.uniform(0, self._limit_s)
        self._expected_s -= delay_s
        self._takeover_left_s -= delay_s
        limit_max_s = min(BACKOFF_RETURN_S, BACKOFF_MAX_S) if self._expected_s > 0 else BACKOFF_MAX_S
        if self._takeover_left_s > 0:
            limit_max_s = min(BACKOFF_TAKEOVER_S, limit_max_s)
        self._limit_s = min(2 * self._limit_s, limit_max_s)
        return delay_s

    def lasted(self, connection_s: float) -> None:
        """Start over after a connection of so many seconds, if that was long enough."""
        if connection_s > self._limit_s:
            self._limit_s = BACKOFF_FIRST_S
            self._takeover_left_s = self._takeover_s
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
        has_token_file: bool = False,
        has_standby: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.session: Session | None = None
        self.timers = Timers()  # For the deadlines of tasks, those that run here and those that others run.
        self.followers: dict[str, Follower] = {}  # By task_id.
        self.renewed_at = -math.inf  # When a hub last registered this agent that had forgotten it,
        self.accepted: set[str | None] = set()  # and the capabilities of tasks that any hub has accepted.
        self.last_failure = ""  # Of an attempt to connect.
        self.failure: Exception | None = None  # What made another attempt pointless.
        self.is_leaving = False
        self.is_closed = False
        self._threads: DaemonThreads | None = None  # For functions that answer questions. None until there is one.
        self._connector = connector
        self._registration = registration
        self._on_registered = on_registered
        self._on_message = on_message
        self._give_up_after_s = give_up_after_s
        self._has_token_file = has_token_file  # It is read again for each attempt to connect.
        self._has_standby = has_standby
        self._next_session: asyncio.Future[Session] = self._loop.create_future()
        self._retry_now = asyncio.Event()
        self._late_until = 0.0  # A registration that was given up may reach the hub until then.
        self._background: set[asyncio.Task[Any]] = set()
        self.ended = asyncio.create_task(self._connection_loop())

    def check_loop(self) -> None:
        """Raise RuntimeError unless the caller runs on the event loop of this connection: nothing here has locks."""
        if not self.is_on_loop:
            text = "this agent runs on another event loop; call it there, with asyncio.run_coroutine_threadsafe"
            raise RuntimeError(f"{text}, or make the handler that calls it `async def`")

    @property
    def is_on_loop(self) -> bool:
        """Whether the caller runs on the event loop of this connection."""
        return asyncio._get_running_loop() is self._loop  # It may be None.

    def call_on_loop(self, coroutine: typing.Coroutine[Any, Any, Output]) -> asyncio.Future[Output]:
        """Run a coroutine on the event loop of this connection, from another one."""
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call a function on the event loop of this connection: at once there, soon from another thread."""
        if self.is_on_loop:
            function()
        else:
            self._loop.call_soon_threadsafe(function)

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
        message: AgentMessage | Callable[[Session], AgentMessage],
        reply_type: type[Reply],
        within_s: float | None = REQUEST_S,
        until: float = math.inf,
    ) -> Reply:
        """Return the hub's reply to a message that is safe to repeat: resend it after a lost connection.

        A function makes the message for each session. Raises Refused if the hub refuses, TimeoutError when the
        loop's clock reaches `until`, or what ended the connection for good.
        """
        while True:
            session = self.session
            if session is None:
                async with self._timeout_at(until):
                    session = await self.wait()
            try:
                sent = message(session) if callable(message) else message
                return await session.request(sent, reply_type, within_s=within_s, until=until)
            except Disconnected:
                async with self._timeout_at(until):
                    await session.released.wait()

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        """Return what a plain function returns, which may block."""
        self._threads = self._threads or DaemonThreads("on-question")
        return await self._threads.run(function)

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
        if self._threads is not None:
            self._threads.close()
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
        backoff = Backoff(has_standby=self._has_standby)
        last_online = self._loop.time()
        was_online = False
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
                        last_online, was_online = self._loop.time(), True
                        backoff.lasted(last_online - registered_at)
                    offline_s = self._loop.time() - last_online
                    if not (was_online and error.close_code == CloseCode.NOT_ALLOWED and self._may_pass(offline_s)):
                        self._give_up_if_due(error, offline_s)
                    await self._pause(error, backoff.next_s())
                except (Refused, ValueError) as error:  # Or more than the token is wrong: then the same comes again.
                    if not (was_online and self._may_pass(self._loop.time() - last_online)):
                        raise
                    await self._pause(Disconnected(str(error)), backoff.next_s())
        except asyncio.CancelledError:  # Also by a program that cancels all tasks of its loop.
            if not self.is_closed:
                self._fail(Disconnected("the connection of this agent was cancelled"))
            raise
        except Exception as error:  # Also a bug: nobody must wait for a session that will not come.
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
        """Pass progress, questions and an outcome to the task's follower, everything else to the agent."""
        if isinstance(message, TaskOutcome) or (
            isinstance(message, StatusReply) and (message.seq is not None or message.question is not None)
        ):
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

    def _may_pass(self, offline_s: float) -> bool:
        """Whether a token that is refused, or cannot be read, may be in the course of being replaced."""
        return self._has_token_file and offline_s < TOKEN_REPLACED_S

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


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class HandlerOptions:
    """The arguments of the decorators `capability` and `on_broadcast`; None: derived from the function."""

    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    output_schema: dict[str, Any] | None = None
    is_broadcast: bool = False


# What Python has and JSON does not, in the annotations of parameters, of answers and of outputs.


class PythonType:
    """The JSON of a Python type: its JSON Schema, and the validator that makes a value of it."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def schema(self, types: TypeReader) -> dict[str, Any]:
        raise NotImplementedError

    def validator(self, types: TypeReader) -> Validator:
        """Raises ValueError if a part of it has no JSON."""
        raise NotImplementedError


class TypeReader:
    """Makes the JSON Schemas and the validators of the annotations of one function.

    A class that holds itself is defined once, in `definitions`, which go into the whole schema as `$defs`.
    """

    def __init__(self, *, is_output: bool = False) -> None:
        self.definitions: dict[str, Any] = {}
        self.is_output = is_output
        self._names: dict[Any, str] = {}  # Of the classes that hold themselves.
        self._begun: list[Any] = []  # Classes whose schema is being made.
        self._validators: dict[Any, Validator] = {}

    def schema(self, annotation: Any) -> dict[str, Any]:
        return schema_of(annotation, self._schema_of_class)

    def whole_schema(self, annotation: Any) -> dict[str, Any]:
        """Return a schema that stands alone."""
        return self.schema(annotation) | self.definitions_part

    def validator(self, annotation: Any) -> Validator:
        """Raises ValueError for a type that has no JSON."""
        return validator_for(annotation, self._validator_of_class, validate_whole)

    @property
    def definitions_part(self) -> dict[str, Any]:
        return {"$defs": self.definitions} if self.definitions else {}

    def define(self, name: str, schema: Any) -> str:
        """Add a definition under this name, or a longer one if that is taken; return the name."""
        while self.definitions.setdefault(name, schema) != schema:
            name += "_"
        return name

    def _schema_of_class(self, annotation: Any) -> dict[str, Any]:
        if annotation in self._begun and annotation not in self._names:
            self._names[annotation] = self.define(getattr(annotation, "__name__", "type"), {"": len(self._names)})
        if annotation in self._names:
            return {"$ref": f"#/$defs/{self._names[annotation]}"}
        python_type = python_type_of(annotation)
        if python_type is None:
            return {}
        self._begun.append(annotation)
        try:
            schema = python_type.schema(self)
        finally:
            self._begun.pop()
        name = self._names.get(annotation)
        if name is None:
            return schema
        self.definitions[name] = schema
        return {"$ref": f"#/$defs/{name}"}

    def _validator_of_class(self, annotation: Any) -> Validator:
        if isinstance(annotation, str):
            raise ValueError(f"its annotation {annotation!r} cannot be evaluated; import the name also at run time")
        if annotation not in self._validators:
            self._validators[annotation] = lambda value: self._validators[annotation](value)  # It may hold itself.
            python_type = python_type_of(annotation)
            if python_type is None:
                check_holds_json(annotation)
            self._validators[annotation] = accept if python_type is None else python_type.validator(self)
        return self._validators[annotation]


def python_type_of(annotation: Any) -> PythonType | None:
    """Return the JSON of a class; None if it has none, or if any JSON may be of it."""
    kind, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    for name in ("__supertype__", "__value__"):  # Of NewType, and of `type Name = …`.
        if hasattr(kind, name) and not isinstance(kind, type):
            return AliasType(getattr(kind, name))
    if not isinstance(kind, type):
        return None
    if hasattr(kind, "__pydantic_validator__"):
        return ModelType(kind)
    if issubclass(kind, enum.Enum):
        return EnumType(kind)
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return ObjectType(kind)
    if kind in MAPPINGS and arguments:
        return MappingType(kind, *arguments)
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return ArrayType.of_named_tuple(kind)
    if kind is tuple or (kind in ARRAYS and arguments) or kind in (set, frozenset):
        return ArrayType.of(annotation, kind, arguments)
    return TextType.of(kind)


def check_holds_json(annotation: Any) -> None:
    """Raise ValueError for the type of no JSON value: `Hashable` is that of some, and a protocol may be."""
    kind = typing.get_origin(annotation) or annotation
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return
    if not any(issubclass(one, kind) for one in JSON_TYPES):
        raise ValueError(f"{kind.__qualname__} is not JSON; take what JSON has, and convert it in the handler")


def made_of(make: Callable[..., Any], *values: Any, **fields: Any) -> Any:
    """Return what a class makes of values. Raises ValidationError with what the class says is wrong with them."""
    try:
        return make(*values, **fields)
    except (ValueError, TypeError, ArithmeticError, AssertionError) as error:
        raise ValidationError(one_line(error)) from None


class AliasType(PythonType):
    """Another name of a type, its `kind`."""

    def schema(self, types: TypeReader) -> dict[str, Any]:
        return types.schema(self.kind)

    def validator(self, types: TypeReader) -> Validator:
        return types.validator(self.kind)


class EnumType(PythonType):
    """An Enum, by the values of its members."""

    def schema(self, types: TypeReader) -> dict[str, Any]:
        if issubclass(self.kind, enum.Flag):
            return {"type": "integer"}
        return schema_of(Literal[tuple(one.value for one in self.kind)])

    def validator(self, types: TypeReader) -> Validator:
        if issubclass(self.kind, enum.Flag):
            return self._validate_flag
        members = {}
        for one in self.kind:
            if type(one.value) not in (str, int, float, bool, type(None)):
                raise ValueError(f"{self.kind.__qualname__}.{one.name} is not JSON: give it a text or a number")
            members[json.dumps(one.value)] = one
        known = f"must be one of {json.dumps([one.value for one in self.kind], ensure_ascii=False)}"

        def validate(value: Any) -> Any:
            if type(value) is float and value.is_integer():
                value = int(value)
            member = members.get(json.dumps(value)) if not isinstance(value, list | dict) else None
            if member is None:
                raise ValidationError(known)
            return member

        return validate

    def _validate_flag(self, value: Any) -> Any:
        given, known = validate_whole(value), [one.value for one in self.kind]
        if given < 0 or given & ~functools.reduce(operator.or_, known, 0):  # Some Pythons would take it.
            raise ValidationError(f"must be a sum of {json.dumps(known)}")
        return self.kind(given)


# The classes that are written as text, each with the format that it has in JSON Schema.
TEXT_FORMATS: Mapping[str, str] = {
    "datetime.datetime": "date-time",
    "datetime.date": "date",
    "datetime.time": "time",
    "decimal.Decimal": "decimal",
    "uuid.UUID": "uuid",
}


class TextType(PythonType):
    """A date, a time, a Decimal, a UUID or a path."""

    def __init__(self, kind: Any, text_format: str) -> None:
        super().__init__(kind)
        self.format = text_format

    @classmethod
    def of(cls, kind: type) -> TextType | None:
        if issubclass(kind, os.PathLike) and kind.__module__.partition(".")[0] == "pathlib":
            return cls(kind, "path")
        names = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
        found = next((TEXT_FORMATS[name] for name in names if name in TEXT_FORMATS), None)
        return cls(kind, found) if found is not None else None

    def schema(self, types: TypeReader) -> dict[str, Any]:
        if self.format == "decimal":
            return {"type": "string"} if types.is_output else {"anyOf": [{"type": "number"}, {"type": "string"}]}
        return {"type": "string", "format": self.format}

    def validator(self, types: TypeReader) -> Validator:
        parse = getattr(self.kind, "fromisoformat", self.kind)
        is_decimal = self.format == "decimal"

        def validate(value: Any) -> Any:
            if is_decimal and type(value) in (int, float):
                value = str(value)
            elif type(value) is not str:
                raise ValidationError.of_type(float, str) if is_decimal else ValidationError.of_type(str)
            try:
                made = parse(value)
            except (ValueError, ArithmeticError):
                raise ValidationError(f"must be a text in the format {self.format}") from None
            if is_decimal and not made.is_finite():
                raise ValidationError("must be a finite number")
            return made

        return validate


class ObjectType(PythonType):
    """A dataclass or a TypedDict: an object with the fields that it takes."""

    def fields(self) -> list[tuple[str, Any, bool]]:
        """Return the name, the annotation and whether it is required, of each field."""
        hints = hints_of(self.kind)
        if dataclasses.is_dataclass(self.kind):
            taken = [one for one in dataclasses.fields(self.kind) if one.init]
            return [(one.name, hints.get(one.name, Any), not has_default(one)) for one in taken]
        marks = {
            name: typing.get_origin(hint)
            for name, hint in typing.get_type_hints(self.kind, include_extras=True).items()
        }
        required = self.kind.__required_keys__  # Which misses the marks in annotations that are strings.
        return [
            (name, hint, (name in required and marks[name] is not typing.NotRequired) or marks[name] is typing.Required)
            for name, hint in hints.items()
        ]

    def schema(self, types: TypeReader) -> dict[str, Any]:
        fields = self.fields()
        return {
            "type": "object",
            "properties": {name: types.schema(hint) for name, hint, _ in fields},
            "required": [name for name, _, is_required in fields if is_required],
            "additionalProperties": False,
        }

    def validator(self, types: TypeReader) -> Validator:
        fields = [
            (name, within_class(self.kind, name, types, hint), is_required) for name, hint, is_required in self.fields()
        ]
        optional = {name for name, _, is_required in fields if not is_required}
        make = dict if typing.is_typeddict(self.kind) else functools.partial(made_of, self.kind)
        validate_object = object_validator(make, fields, is_open=False)

        def validate(value: Any) -> Any:
            if type(value) is dict and optional:  # Null means missing, where there is a default.
                value = {name: one for name, one in value.items() if one is not None or name not in optional}
            return validate_object(value)

        return validate


def within_class(kind: type, name: str, types: TypeReader, annotation: Any) -> Validator:
    """Return the validator of a field; an error names it."""
    try:
        return types.validator(annotation)
    except ValueError as error:
        raise ValueError(f"{kind.__qualname__}.{name}: {error}") from None


# Classes with arguments that are arrays, and those that are objects, each with what makes one.
ARRAYS: Mapping[Any, Callable[[list[Any]], Any]] = {
    **dict.fromkeys(
        (
            collections.abc.Sequence,
            collections.abc.MutableSequence,
            collections.abc.Collection,
            collections.abc.Iterable,
            collections.abc.Reversible,
        ),
        accept,
    ),
    **dict.fromkeys((set, collections.abc.Set, collections.abc.MutableSet), set),
    frozenset: frozenset,
    tuple: tuple,
    collections.deque: collections.deque,
}
MAPPINGS: Mapping[Any, Callable[[dict[Any, Any]], Any]] = {
    **dict.fromkeys((dict, collections.abc.Mapping, collections.abc.MutableMapping), accept),
    collections.OrderedDict: collections.OrderedDict,
}


class ArrayType(PythonType):
    """An array whose items all have the type `rest`, or have the types `heads`, one each.

    An array may end early, but not before it has `least` items.
    """

    def __init__(
        self,
        make: Callable[[list[Any]], Any],
        rest: Any = None,
        heads: tuple[Any, ...] = (),
        least: int = 0,
        names: tuple[str, ...] = (),
    ) -> None:
        super().__init__(make)
        self.rest = rest  # None: no more items.
        self.heads = heads
        self.least = least
        self.names = names  # Of a named tuple's heads.

    @classmethod
    def of(cls, annotation: Any, kind: Any, arguments: tuple[Any, ...]) -> ArrayType:
        make = ARRAYS[kind]
        if kind is not tuple:
            return cls(make, arguments[0] if arguments else Any)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return cls(make, arguments[0])
        return cls(make, heads=arguments, least=len(arguments)) if typing.get_origin(annotation) else cls(make, Any)

    @classmethod
    def of_named_tuple(cls, kind: Any) -> ArrayType:
        hints = hints_of(kind)
        heads = tuple(hints.get(name, Any) for name in kind._fields)
        return cls(lambda items: kind(*items), None, heads, len(heads) - len(kind._field_defaults), names=kind._fields)

    def schema(self, types: TypeReader) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "array"}
        if self.heads or self.rest is None:
            heads = [types.schema(one) for one in self.heads]
            schema |= {"prefixItems": heads, "minItems": self.least, "maxItems": len(heads)}
        elif (items := types.schema(self.rest)) != {}:
            schema["items"] = items
        return schema | ({"uniqueItems": True} if self.kind in (set, frozenset) else {})

    def validator(self, types: TypeReader) -> Validator:
        validate_heads = [types.validator(one) for one in self.heads]
        if self.rest is not None:
            validate_list = list_validator(types.validator(self.rest), Limit())
            return lambda value: made_of(self.kind, validate_list(value))
        most = len(validate_heads)

        def validate(value: Any) -> Any:
            if type(value) is dict and self.names:
                value = self._in_order(value)
            if type(value) is not list:
                raise ValidationError.of_type(list)
            if not self.least <= len(value) <= most:
                raise ValidationError(f"must have {self.least} to {most} items")
            items = []
            for validate_item, item in zip(validate_heads, value, strict=False):
                try:
                    items.append(validate_item(item))
                except ValidationError as error:
                    raise error.within(str(len(items))) from None
            return made_of(self.kind, items)

        return validate

    def _in_order(self, value: dict[str, Any]) -> list[Any]:
        """Return the items of a named tuple that is given as an object."""
        if not value.keys() <= set(self.names):
            raise ValidationError(f"has a field that is not one of {', '.join(self.names)}")
        given = [name for name in self.names if name in value]
        if given != list(self.names[: len(given)]):
            raise ValidationError("is required", next(name for name in self.names if name not in value))
        return [value[name] for name in given]


class MappingType(PythonType):
    """An object whose keys or values have a type of their own. A key that is no text is written as its JSON."""

    def __init__(self, kind: Any, key: Any, value: Any) -> None:
        super().__init__(kind)
        self.key = key
        self.value = value

    def schema(self, types: TypeReader) -> dict[str, Any]:
        return {"additionalProperties": types.schema(self.value) or True, "type": "object"}

    def validator(self, types: TypeReader) -> Validator:
        validate_value, make = dict_validator(types.validator(self.value)), MAPPINGS[self.kind]
        if self.key in (str, Any):
            return lambda value: make(validate_value(value))
        validate_key = types.validator(self.key)

        def read_key(key: str) -> Any:
            try:
                return validate_key(key)
            except ValidationError as error:
                with contextlib.suppress(ValueError):
                    return validate_key(json.loads(key))
                raise ValidationError(f"has a key that {error.reason}") from None

        return lambda value: make({read_key(key): one for key, one in validate_value(value).items()})


class ModelType(PythonType):
    """A model or a dataclass of Pydantic, which checks it."""

    def schema(self, types: TypeReader) -> dict[str, Any]:
        adapter = importlib.import_module("pydantic").TypeAdapter(self.kind)
        mode = {"mode": "serialization", "by_alias": False} if types.is_output else {}  # As `convert` dumps it.
        try:
            schema: dict[str, Any] = adapter.json_schema(**mode)
        except Exception as error:
            raise ValueError(f"{self.kind.__qualname__}: {one_line(error)}") from error
        renamed = {}
        for name, definition in schema.pop("$defs", {}).items():
            if (used := types.define(name, definition)) != name:
                renamed[f"#/$defs/{name}"] = f"#/$defs/{used}"
        if renamed:
            text = json.dumps([schema, {name: types.definitions[name.rpartition("/")[2]] for name in renamed.values()}])
            for name, used in renamed.items():
                text = text.replace(f'"$ref": "{name}"', f'"$ref": "{used}"')
            schema, definitions = json.loads(text)
            types.definitions |= {name.rpartition("/")[2]: one for name, one in definitions.items()}
        return schema

    def validator(self, types: TypeReader) -> Validator:
        pydantic = importlib.import_module("pydantic")
        adapter = pydantic.TypeAdapter(self.kind)

        def validate(value: Any) -> Any:
            try:
                return adapter.validate_json(write_json(value))  # A strict model accepts a date only from JSON text.
            except pydantic.ValidationError as error:
                first = error.errors(include_url=False, include_context=False, include_input=False)[0]
                raise ValidationError(first["msg"], *map(str, first["loc"])) from None

        return validate


@dataclass(frozen=True, slots=True, eq=False, repr=False)
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
        types = TypeReader()
        bound = function.keywords if isinstance(function, functools.partial) else {}  # Not for a requester to see.
        for number, parameter in enumerate(parameters_of(function)):
            annotation = hints.get(parameter.name, Any)
            if parameter.name in bound:
                continue
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                text = f"a handler is called with keyword arguments, so {parameter} must be a keyword parameter"
                is_wrapper = parameter.kind is parameter.VAR_POSITIONAL
                hint = "; if that is a decorator's, give it functools.wraps" if is_wrapper else ""
                raise ValueError(f"{name_of(function)}: {text}{hint}")
            if number == 0 and parameter.name in ("self", "cls") and parameter.name not in hints:
                text = "is a method; give that of an object, or use agenthub.capability in an Agent's subclass"
                raise ValueError(f"{name_of(function)}: {text}")
            if parameter.kind is parameter.VAR_KEYWORD:
                is_open = True
            elif is_task(annotation):
                task_parameter = parameter.name
            else:
                try:
                    if parameter.default is None and not isinstance(annotation, str):
                        annotation = annotation | None  # As in `limit: int = None`.
                    validate = types.validator(annotation)
                    properties[parameter.name] = parameter_schema(parameter, types.schema(annotation))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{name_of(function)}: {parameter.name}: {error}") from None
                fields.append((parameter.name, validate, parameter.default is parameter.empty))
        if task_parameter is not None and not properties and not is_open:
            return cls(None, None, task_parameter, None)  # It reads the input from the task.
        required = [name for name, _, is_required in fields if is_required]
        schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": is_open}
        schema |= types.definitions_part
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
                made = self.validate(given)
                given = {**given, **made}  # Those of a `**parameter` are as they came.
            except ValidationError as error:
                raise TaskFailed(str(error.within("input")), code=Code.INVALID_INPUT) from None
        return given if self.task_parameter is None else {**given, self.task_parameter: task}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Handler:
    """The function that does the tasks of one capability."""

    function: Callable[..., Any]
    capability: Capability
    signature: HandlerSignature
    is_async: bool
    piece: Any = None  # The annotation of what a generator yields (Any: unknown); None for any other function.

    @classmethod
    def of(cls, function: Callable[..., Any], options: HandlerOptions) -> Handler:
        """Make a function a handler. Raises ValueError if its signature, or what the options say, does not allow it."""
        inner = check_function(function)
        hints = hints_of(inner)
        streams = inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner)
        piece, output = pieces_of(hints.get("return")) if streams else (None, hints.get("return"))
        signature = HandlerSignature.of(function, hints)
        for given in (options.input_schema, options.output_schema):
            if given is not None and not isinstance(check_json(given), dict):
                raise ValueError(f"{name_of(function)}: a schema must be a JSON object")
        description = options.description or (inspect.getdoc(inner) or "").partition("\n")[0]
        capability = Capability(
            check_text("a capability's name", options.name or name_of(function), VISIBLE_PATTERN),
            string("description", description)[:4096],
            signature.schema if options.input_schema is None else options.input_schema,
            TypeReader(is_output=True).whole_schema(output) or None
            if options.output_schema is None
            else options.output_schema,
        )
        return cls(function, capability, signature, is_async(function), piece)


def shape_of_answer(schema: Any) -> tuple[dict[str, Any] | None, Validator]:
    """Return the JSON Schema and the validator of an answer: of a schema, of an annotation, or (None) of any JSON."""
    if schema is None:
        return None, accept
    if isinstance(schema, dict):
        return schema, lambda answer: SchemaCheck(schema).check(answer)
    types = TypeReader()
    validate = types.validator(schema)
    return types.whole_schema(schema) or None, validate


def pieces_of(annotation: Any) -> tuple[Any, Any]:
    """Return the annotations of the pieces and of the output of a generator, from that of what it returns."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if not (isinstance(origin, type) and issubclass(origin, Iterable | AsyncIterable)) or not arguments:
        return Any, Any
    piece, *others = arguments
    if len(others) == 2 and others[1] not in (None, types.NoneType):  # Generator[piece, sent, output]
        return piece, others[1]
    return piece, piece if piece in (str, Any) else types.GenericAlias(list, (piece,))


def check_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function within a handler. Raises ValueError for what cannot be one."""
    text = None
    if not callable(function):
        text = f"{shown_type(function)} cannot be called; make a function the handler"
        if isinstance(function, classmethod):
            text += ", or use agenthub.capability in an Agent's subclass"
    elif isinstance(function, type) and not makes_json(function):
        text = "a class whose instances are not JSON; make a function the handler, and return what JSON has"
    elif hasattr(function, "dispatch") and hasattr(function, "registry"):
        text = "functools.singledispatch needs positional arguments; wrap it in a function with named parameters"
    if text is not None:
        raise ValueError(f"{name_of(function)}: {text}")
    return inner_function(function)


def shown_type(value: object) -> str:
    """Return the type of a value with its article, for an error."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def makes_json(kind: type) -> bool:
    """Return whether an output of a class can be converted to JSON."""
    is_converted = dataclasses.is_dataclass(kind) or callable(getattr(kind, "model_dump", None))
    return is_converted or issubclass(kind, (*JSON_TYPES, tuple, set, frozenset, enum.Enum))


def parameters_of(function: Callable[..., Any]) -> Collection[inspect.Parameter]:
    """Return a function's parameters. Raises ValueError if Python does not know them, as of some built-in ones."""
    try:
        return inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        text = "its parameters are not known; wrap it in a function with named parameters"
        raise ValueError(f"{name_of(function)}: {text}") from None


def check_broadcast_handler(function: Callable[..., Any]) -> Callable[[Any, str], Any]:
    """Return a handler of broadcasts. Raises ValueError if it cannot be called with a message and its sender."""
    inner, text = check_function(function), None
    with contextlib.suppress(ValueError):  # Its parameters are not known: they may be right.
        try:
            inspect.signature(function).bind(None, "")
        except TypeError as error:
            text = f"the handler of broadcasts is called with (message, sender): {error}"
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        text = "a generator cannot be a handler"
    if text is not None:
        raise ValueError(f"{name_of(function)}: {text}")
    return function


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
    """Return the annotations of a function, or of a class, evaluated; those that cannot be evaluated as strings.

    Raises ValueError for a constraint in one, of Pydantic or annotated_types: it would not be checked.
    """
    try:
        hints, full = typing.get_type_hints(function), typing.get_type_hints(function, include_extras=True)
    except Exception:
        pass  # A name that is imported for type checkers only; below, the others are evaluated one by one.
    else:
        for name, annotation in full.items():
            for constraint in constraints_in(annotation):
                text = f"{constraint!r} in its annotation would not be checked; check it in the handler"
                raise ValueError(f"{name_of(function)}: {name}: {text}")
        return hints
    hints = {}
    scope = getattr(function, "__globals__", None) or vars(sys.modules.get(function.__module__, types))
    bases: Iterable[Any] = reversed(getattr(function, "__mro__", (function,)))
    for name, annotation in itertools.chain.from_iterable(inspect.get_annotations(base).items() for base in bases):
        try:
            hints[name] = eval(annotation, scope) if isinstance(annotation, str) else annotation
        except Exception:
            log_agent.debug("an annotation cannot be evaluated: %s", name, exc_info=True)
            hints[name] = annotation
    return hints


def constraints_in(annotation: Any) -> Iterator[Any]:
    """Return what limits the values of an annotation, but is no part of their type: `Gt(gt=0)` in Annotated."""
    if typing.get_origin(annotation) is Annotated:
        for one in annotation.__metadata__:  # Pydantic's Field may hold some, or none but a description.
            yield from getattr(one, "metadata", ()) if type(one).__name__ == "FieldInfo" else ()
            if type(one).__module__.partition(".")[0] == "annotated_types":
                yield one
    for part in typing.get_args(annotation):
        yield from constraints_in(part)


TASK_ANNOTATION = re.compile(r"\W*(?:(?:\w+\.)*(?:Optional|Task|None)\b\W*)*")


def is_task(annotation: Any) -> bool:
    """Return whether a parameter takes the Task: `Task`, `Task | None`, or the text of these."""
    if isinstance(annotation, str):
        return "Task" in annotation and TASK_ANNOTATION.fullmatch(annotation) is not None
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return annotation is Task or (is_union and Task in typing.get_args(annotation))


def parameter_schema(parameter: inspect.Parameter, schema: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of a parameter: that of its annotation, with its default."""
    if type(parameter.default).__name__ == "FieldInfo":
        raise ValueError("Field is of Pydantic's models; give a plain default, and describe it in the docstring")
    if parameter.default is not parameter.empty:
        try:
            default = check_json(converted(parameter.default))
        except (ValueError, RecursionError):
            return schema  # A default that is not JSON stays with the function: the schema only omits it.
        return {**schema, "default": default}
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
    try:
        function.__agenthub__ = options  # type: ignore[attr-defined]  # functions take attributes
    except (AttributeError, TypeError):
        text = (
            f"{shown_type(function)} cannot be marked as a handler; define it in the class, or register it at an agent"
        )
        raise ValueError(f"{name_of(function)}: {text}") from None


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
        self.around_task: Callable[[Task], contextlib.AbstractContextManager[None]] | None = None  # Of agenthub_otel.

    def add(self, function: Callable[..., Any], options: HandlerOptions) -> None:
        """Register a function. Raises ValueError if its capability has a handler already."""
        if options.is_broadcast:
            self.on_broadcast = check_broadcast_handler(function)
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


class OpenQuestion:
    """A question of a handler to the requester of its task, until its answer has come: `answer` is a future.

    It has the same id in all sessions, by which the hub knows that it is the same question: it replies with the same
    number, and delivers the answer again.
    """

    def __init__(self, connection: HubConnection, task_id: str, question: Question) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._message = Status(task_id=task_id, question=question)
        self._message_id = f"ask-{os.urandom(8).hex()}"
        self._connection = connection
        self._ask: int | None = None  # Its number, once the hub has said it.
        self._early: StatusReply | None = None  # An answer that came before that.

    def send(self) -> None:
        """Send it, for the first time or again; without a connection, the worker does after the next registration."""
        if self._connection.session is None or self.answer.done():
            return
        try:
            self._connection.session.send_request(self._message, self._on_reply, self._message_id)
        except (Refused, ValueError) as error:
            self.fail(error)

    def _on_reply(self, reply: HubMessage | AgentHubError) -> None:
        if isinstance(reply, Error):
            if reply.code == Code.NO_ANSWERS:
                self.fail(TaskFailed(reply.message, code=Code.NO_ANSWERS))
            else:
                self.fail(Refused(reply.message, code=reply.code, task_id=reply.task_id))
        elif isinstance(reply, StatusReply) and reply.ask is None:
            self.fail(TaskFailed("this hub passes no questions on", code=Code.NO_ANSWERS))
        elif isinstance(reply, StatusReply):
            self._ask = reply.ask
            if self._early is not None:
                self.receive(self._early)

    def receive(self, message: StatusReply) -> None:
        """Take the answer, unless it is that to an earlier question again."""
        if self._ask is None:
            self._early = message
        elif message.ask == self._ask and not self.answer.done():
            self.answer.set_result(value_of(message.answer))

    def fail(self, error: Exception) -> None:
        """Have the handler raise an error instead of getting an answer."""
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # Marks it as retrieved: perhaps the handler is cancelled too.


class Execution:
    """One attempt at a task by a handler of this agent.

    It waits for a slot, and then takes that until its coroutine and its thread have both ended, which may be later than
    its task. `worker` is told when it `finished`, and when it overstays.
    """

    __slots__ = (
        *("_worker", "attempt", "capability", "in_thread", "is_overstaying", "is_stopped", "question", "task_id"),
        "work",
    )

    def __init__(self, worker: Worker, message: Delegated) -> None:
        self.task_id = message.task_id
        self.attempt = message.attempt
        self.capability = message.capability
        self.question: OpenQuestion | None = None  # That waits for its answer.
        self.is_stopped = False  # The task has ended without the handler, so its result is not wanted.
        self.is_overstaying = False  # OVERSTAY_S later, the handler still runs.
        self.in_thread = False
        self.work: asyncio.Task[None] | None = None  # None while it waits for a slot.
        self._worker = worker

    @property
    def is_over(self) -> bool:
        """Whether nothing of it runs any more."""
        return not self.in_thread and (self.work is None or self.work.done())

    def start(self, coroutine: typing.Coroutine[Any, Any, None], *, at_once: bool) -> asyncio.Task[None]:
        """Run the handler. `at_once` runs its first step now, where the loop can: in Python 3.12 and newer."""
        loop = asyncio.get_running_loop()
        if at_once and sys.version_info >= (3, 12) and loop.get_task_factory() is None:
            self.work = asyncio.Task(coroutine, loop=loop, eager_start=True)
        else:
            self.work = loop.create_task(coroutine)
        return self.work

    def stop(self) -> None:
        """Cancel the handler. Only once, so that its cleaning up is not interrupted."""
        if self.is_stopped:
            return
        self.is_stopped = True
        if self.question is not None:  # A thread that waits for the answer cannot be cancelled.
            self.question.fail(TaskFailed("the task ended before the answer came", code=Code.TASK_OVER))
        # A handler that stops its own agent goes on.
        if self.work is not None and self.work is not asyncio.current_task():
            self.work.cancel()
        self._worker.on_stopped(self, has_begun=self.work is not None)

    def is_run_by(self, work: asyncio.Task[Any] | None) -> bool:
        """Return whether the handler runs in this task of the loop."""
        return work is not None and self.work is work

    def thread_returned(self) -> None:
        """Note that its thread is free again."""
        self.in_thread = False
        self._worker.on_part_ended(self)

    def overstay(self) -> None:
        """Note that the handler goes on though its task has ended."""
        self.is_overstaying = True
        self._worker.on_overstaying(self)


class Task:
    """A task, as its handler sees it. A handler with an argument `task: Task` is given it.

    `requester` is the agent_id of the agent that delegated it; `attempt` counts its deliveries from 1; `deadline` is in
    seconds of the event loop's clock; `answers` is whether its requester can be asked; `trace` is what the requester
    gave, a W3C trace context for example.
    """

    task_id: str
    requester: str
    capability: str | None
    attempt: int
    priority: int
    parent_id: str | None
    deadline: float
    answers: bool
    trace: dict[str, str]
    _asking: asyncio.Lock | None = None  # Held while a question waits for its answer. None until there is one.

    def __init__(self, agent: Agent, connection: HubConnection, execution: Execution, message: Delegated) -> None:
        self.task_id = message.task_id
        self.requester = message.sender
        self.capability = message.capability
        self.attempt = message.attempt
        self.priority = message.priority
        self.parent_id = message.parent_id
        self.answers = message.answers
        self.trace = message.trace or {}
        self._payload = message.input
        self._agent = agent
        self._connection = connection
        session = connection.session
        self._piece_session = session if session is not None and "stream" in session.features else None
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
        report = Status(task_id=self.task_id, progress=progress, detail=payload_from("detail", detail))
        self._send(report, self._connection.session)

    def send_piece(self, piece: Any) -> None:
        """Send the requester a piece of the output, for a handler that does not yield but returns the whole output.

        The pieces are the beginning of that: parts of a text, or items of a list. So all are dropped once one was,
        because the connection was lost or its buffer is full. None is no piece. From any thread; raises as `progress`
        does.
        """
        if piece is not None:
            self._send(Status(task_id=self.task_id, piece=payload_from("piece", piece)), self._piece_session)

    def _send(self, report: Status, session: Session | None) -> None:
        if session is None or self.cancelled:
            encode(report)  # Raises ValueError here too: whether a report is valid must not depend on the connection.
            return
        send = functools.partial(self._send_nowait, session, session.encode(report), report.piece is not None)
        if threading.get_ident() == self._thread:
            send()
        else:
            self._loop.call_soon_threadsafe(send)

    def _send_nowait(self, session: Session, raw: bytes, is_piece: bool) -> None:
        if is_piece and not (self._piece_session is self._connection.session and session.is_writable):
            self._piece_session = None  # A later piece would not continue what was sent.
        else:
            session.send_nowait(raw)

    async def ask(self, text: str, schema: Any = None) -> Any:
        """Ask the requester something, and return its answer: any JSON that fits `schema`. The ttl goes on.

        `schema` is a JSON Schema, or an annotation like that of a parameter: `Literal["main", "develop"]`. A question
        waits until the one before is answered. Raises TaskFailed, with the code `no_answers` if the requester cannot
        be asked and `invalid_input` if the answer does not fit; Refused if it is too large; ValueError for a text or a
        schema that the protocol does not allow.
        """
        shape, validate = shape_of_answer(schema)
        try:
            question = Question(validator_for(Text)(text), validator_for(Schema | None)(shape))
        except ValidationError as error:
            raise ValueError(f"a question's text or schema {error.reason}") from None
        if not self.answers:
            text = "the requester cannot be asked: it delegated the task without `answers` or `on_question`"
            raise TaskFailed(text, code=Code.NO_ANSWERS)
        self._asking = self._asking or asyncio.Lock()
        async with self._asking:
            answer = await self._answer_to(question)
        try:
            return validate(answer)
        except ValidationError as error:
            raise TaskFailed(str(error.within("answer")), code=Code.INVALID_INPUT) from None

    async def _answer_to(self, question: Question) -> Any:
        execution = self._execution
        if execution.is_stopped:
            raise TaskFailed("the task has ended: nobody can be asked", code=Code.TASK_OVER)
        execution.question = OpenQuestion(self._connection, self.task_id, question)
        execution.question.send()
        try:
            return await execution.question.answer
        finally:
            execution.question = None

    async def delegate(self, capability: str | None = None, input: Any = None, **options: Any) -> Any:
        """Delegate a subtask, as `Agent.delegate` does; it ends with this task at the latest, and has its `trace`."""
        return await self._agent.delegate(capability, input, **self._of_subtask(options))

    async def submit(self, capability: str | None = None, input: Any = None, **options: Any) -> TaskHandle:
        """Submit a subtask, as `Agent.submit` does; it ends with this task at the latest, and has its `trace`."""
        return await self._agent.submit(capability, input, **self._of_subtask(options))

    def stream(self, capability: str | None = None, input: Any = None, **options: Any) -> AsyncIterator[Any]:
        """Stream a subtask, as `Agent.stream` does; it ends with this task at the latest, and has its `trace`."""
        return self._agent.stream(capability, input, **self._of_subtask(options))

    def _of_subtask(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"parent_id": self.task_id, "trace": self.trace, **options}

    def run(self, awaitable: typing.Coroutine[Any, Any, Reply]) -> Reply:
        """Run a coroutine on the agent's loop and wait for it, from a plain handler: `task.run(task.delegate(...))`."""
        if threading.get_ident() == self._thread:
            awaitable.close()
            raise RuntimeError("an async handler must use await instead of task.run")
        return asyncio.run_coroutine_threadsafe(awaitable, self._loop).result()


class PieceSender:
    """Sends the pieces of a task's output as a generator yields them: texts together, PIECES_PER_S times a second.

    The pieces that were sent are always the start of the output. So it stops when the connection is lost, as pieces may
    be lost with it: the requester gets the rest with the output.
    """

    def __init__(self, connection: HubConnection, execution: Execution) -> None:
        self._connection = connection
        self._execution = execution
        self._session = connection.session  # On which all are sent.
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []  # All of them, as JSON.
        self._texts: list[str] | None = []  # The same, while all are texts.
        self._bytes = 0
        self._unsent: list[Any] = []  # Texts, and payloads of other pieces.
        self._next_at = -math.inf  # When the next message may be sent.

    async def send_all_async(self, generator: AsyncGenerator[Any, None]) -> None:
        async with contextlib.aclosing(generator):
            async for piece in generator:
                self._send_soon(self._keep(piece))

    def send_all(self, generator: typing.Generator[Any, None, Any]) -> Any:
        """Return what the generator returns. Runs in a thread."""
        with contextlib.closing(generator):
            while not self._execution.is_stopped:
                try:
                    piece = next(generator)
                except StopIteration as end:
                    return end.value
                self._loop.call_soon_threadsafe(self._send_soon, self._keep(piece))
        return None

    def output(self, annotation: Any) -> bytes | None:
        """Return the output as a payload: the texts joined if all pieces are texts, else the list of them."""
        if self._texts is not None and (self._texts or annotation in (str, Any)):
            return payload_of("".join(self._texts))
        return b"[%s]" % b",".join(self._parts)

    def flush(self) -> None:
        """Send what was not sent yet, if the connection takes it now; else try again later."""
        session = self._session
        if session is None or session is not self._connection.session or "stream" not in session.features:
            self._unsent.clear()
        elif not session.is_writable:
            self._set_timer()
        else:
            self._next_at = self._loop.time() + 1 / PIECES_PER_S
            unsent, self._unsent = self._unsent, []
            for is_text, pieces in itertools.groupby(unsent, lambda piece: isinstance(piece, str)):
                for piece in ["".join(pieces)] if is_text else pieces:
                    session.send_nowait(session.encode(Status(task_id=self._execution.task_id, piece=piece)))

    def _keep(self, piece: Any) -> str | bytes | None:
        """Add a piece to the output, and return what to send of it: a text, or the payload of anything else but None.

        Raises TaskFailed if it is not JSON, or the output becomes too large.
        """
        payload = output_payload(piece)
        part = b"null" if payload is None else payload
        self._parts.append(part)
        if isinstance(piece, str) and self._texts is not None:
            self._texts.append(piece)
        else:
            self._texts = None
        self._bytes += len(part)
        bytes_max = self._session.message_bytes_max if self._session is not None else CLIENT_MESSAGE_BYTES_MAX
        if self._bytes > bytes_max:
            raise TaskFailed(f"the output is larger than {bytes_max} bytes", code=Code.TOO_LARGE)
        return piece if isinstance(piece, str) else payload

    def _send_soon(self, piece: str | bytes | None) -> None:
        if piece is None or self._execution.is_stopped:
            return
        self._unsent.append(piece)
        if self._loop.time() >= self._next_at:
            self.flush()
        elif len(self._unsent) == 1:
            self._set_timer()

    def _set_timer(self) -> None:
        self._connection.timers.set(self.flush, max(self._next_at, self._loop.time() + 0.5 / PIECES_PER_S))


@types.coroutine
def timed(coroutine: typing.Coroutine[Any, Any, Any], execution: Execution | None) -> typing.Generator[Any, Any, Any]:
    """Await the coroutine of a handler; log each step of it that takes longer than BLOCKED_S seconds."""
    step: Callable[[Any], Any] = coroutine.send
    given: Any = None
    pid = os.getpid()
    while True:
        begun = time.monotonic()
        try:
            yielded = step(given)
        except StopIteration as end:
            return end.value
        finally:
            end_forked_child(pid)
            if (blocked_s := time.monotonic() - begun) > BLOCKED_S:
                log_blocked(execution, blocked_s)
        try:
            step, given = coroutine.send, (yield yielded)
        except BaseException as error:
            step, given = coroutine.throw, error


def log_blocked(execution: Execution | None, blocked_s: float) -> None:
    """Log that a handler, of a task or (None) of broadcasts, kept the loop from everything else."""
    what = "on_broadcast"
    if execution is not None:
        what = escape_unprintable(f"{execution.capability} task={execution.task_id}")
    text = "an async handler blocked the event loop for %.1f s, heartbeats included; make it a plain function: %s"
    log_agent.warning(text, blocked_s, what)


class Worker:
    """What others delegated to an agent, from the agent's start to its stop.

    Owns the running handlers, their threads, the results that the hub has not acknowledged yet, and the broadcasts
    that wait for their handler. At most `max_tasks` handlers run, including those whose task has ended: a cancelled
    handler may clean up or ignore it, and a thread cannot be cancelled. A task without a slot waits. When a handler
    still runs OVERSTAY_S after its task has ended, the worker registers its slot as `occupied`, and gives the tasks
    without a slot back to the hub.
    """

    def __init__(
        self, agent: Agent, connection: HubConnection, functions: HandlerRegistry, on_occupied: Callable[[], None]
    ) -> None:
        self._agent = agent
        self._connection = connection
        self._functions = functions
        self._on_occupied = on_occupied  # Called when `occupied` has changed.
        self._threads = DaemonThreads(f"{agent.name}-handler")
        self._running: dict[str, Execution] = {}  # By task_id: the latest attempt, if its task has not ended.
        self._waiting: dict[Execution, Task] = {}  # Of these, those that wait for a slot, in order.
        self._slots: dict[Execution, None] = {}  # What has a slot: of these, and whatever has not ended yet.
        self._work: set[asyncio.Task[None]] = set()  # Of those.
        self._slot_freed = LightEvent()  # Set for a moment.
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
    def occupied(self) -> int:
        """How many slots are taken by handlers that overstay."""
        return sum(execution.is_overstaying for execution in self._slots)

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
        for execution in list(self._running.values()):
            if assigned.get(execution.task_id) != execution.attempt:
                execution.stop()
            elif execution.question is not None:
                execution.question.send()
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
            if former.attempt == message.attempt and not former.is_stopped:
                return
            former.stop()
        elif len(self._running) + len(self._results) >= self._held_max and self._connection.session is not None:
            self._log_too_many()
            self._connection.session.abort()
            return
        execution = self._running[message.task_id] = Execution(self, message)
        task = Task(self._agent, self._connection, execution, message)
        self._connection.timers.set(execution.stop, task.deadline)
        if not self._waiting and len(self._slots) < self._agent.max_tasks:
            self._start(execution, task, at_once=True)
        else:
            self._waiting[execution] = task
            self._fill_slots()

    def _start(self, execution: Execution, task: Task, *, at_once: bool) -> None:
        """Start the handler of a task in a free slot."""
        self._slots[execution] = None
        work = execution.start(self._run(task), at_once=at_once)
        if at_once and work.done():
            self._on_finished(execution, work)
        else:
            self._work.add(work)
            work.add_done_callback(functools.partial(self._on_finished, execution))

    def _fill_slots(self) -> None:
        """Start waiting tasks while there are slots; give back those that would wait for a handler that overstays."""
        slots_max = self._agent.max_tasks
        while self._waiting and len(self._slots) < slots_max:
            execution, task = next(iter(self._waiting.items()))
            del self._waiting[execution]
            self._start(execution, task, at_once=False)  # In a turn of the loop of its own: many may wait.
        if self._waiting and (occupied := self.occupied):
            usable = slots_max - occupied
            due = sum(not execution.is_overstaying for execution in self._slots) + len(self._waiting) - usable
            for execution in list(self._waiting)[len(self._waiting) - due :] if due > 0 else ():
                self._give_back(execution)

    def _give_back(self, execution: Execution) -> None:
        """Return a task that has not begun to the hub."""
        execution.stop()
        error = ErrorInfo(Code.BUSY, "its slot is taken by a handler that goes on after the end of its task")
        self._send(Result(task_id=execution.task_id, success=False, error=error, attempt=execution.attempt))

    def on_stopped(self, execution: Execution, *, has_begun: bool) -> None:
        """Forget a task that has ended before it began; give the handler of another OVERSTAY_S to end."""
        if has_begun:
            self._connection.timers.set(execution.overstay, asyncio.get_running_loop().time() + OVERSTAY_S)
        else:
            self._waiting.pop(execution, None)
            self._forget(execution)

    def on_overstaying(self, execution: Execution) -> None:
        """Tell the hub that a slot is taken by a handler whose task has ended."""
        what = f"{execution.capability} task={execution.task_id}"
        log_agent.warning(
            "a handler goes on after its task has ended, and keeps its slot: %s", escape_unprintable(what)
        )
        self._on_occupied()
        self._fill_slots()

    def receive_answer(self, message: StatusReply) -> None:
        """Give an answer to the handler that waits for it."""
        execution = self._running.get(message.task_id or "")
        if execution is not None and execution.question is not None:
            execution.question.receive(message)

    def task_ended(self, task_id: str) -> None:
        """Cancel the handler of a task that has ended without it."""
        if task_id in self._running:
            self._running[task_id].stop()

    async def stop(self) -> None:
        """Cancel the running handlers, and again after LEAVING_S seconds; log those that do not end even then."""
        for execution in list(self._running.values()):
            execution.stop()
        self._threads.close()
        for execution in self._slots:
            self._connection.timers.cancel(execution.overstay)
        current = asyncio.current_task()
        work = self._work - {current}
        for within_s in (LEAVING_S, LEAVING_S / 2):
            if work:
                _, work = await asyncio.wait(work, timeout=within_s)
            for one in work:
                one.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.0 if work else LEAVING_S / 2):
                while self._left_by(current):  # A thread.
                    await self._slot_freed.wait()
        if left := self._left_by(current):
            names = escape_unprintable(", ".join(f"{one.capability} task={one.task_id}" for one in left[:LEAVES_MAX]))
            log_agent.error("handlers ignore that they are cancelled, and are left behind: %s", names)

    def _left_by(self, current: asyncio.Task[Any] | None) -> list[Execution]:
        """Return what has not ended, except for the handler that runs in this task of the loop."""
        return [execution for execution in self._slots if not execution.is_run_by(current)]

    def _log_too_many(self) -> None:
        agent_id = escape_unprintable(self._agent.agent_id or "")
        log_agent.error("the hub assigns more tasks than max_tasks allows: disconnecting agent=%s", agent_id)

    def _on_finished(self, execution: Execution, work: asyncio.Task[None]) -> None:
        self._work.discard(work)
        self._forget(execution)
        self.on_part_ended(execution)

    def _forget(self, execution: Execution) -> None:
        """Note that an execution needs no timer, and that its task is not this agent's any more."""
        self._connection.timers.cancel(execution.stop)
        if self._running.get(execution.task_id) is execution:
            del self._running[execution.task_id]

    def on_part_ended(self, execution: Execution) -> None:
        """Free the slot of an execution when nothing of it runs any more."""
        if execution.is_over and execution in self._slots:
            del self._slots[execution]
            if execution.is_stopped:
                self._connection.timers.cancel(execution.overstay)
            if execution.is_overstaying:
                self._on_occupied()
            if self._waiting:
                self._fill_slots()
            self._slot_freed.set()
            self._slot_freed.clear()

    async def _run(self, task: Task) -> None:
        """Do a task and send its result; none if the task has ended meanwhile."""
        execution = task._execution
        if execution.work is None:  # In its first step, from which `start` has not returned.
            execution.work = asyncio.current_task()
        result = Result(task_id=task.task_id, success=False, attempt=task.attempt)
        try:
            around = self._functions.around_task
            if around is None:
                result.output = await self._call(task)
            else:
                with around(task):
                    result.output = await self._call(task)
            result.success = True
        except BaseException as error:  # A handler that exits, panics or cancels itself fails like any other.
            if is_of_the_loop(error):
                if not task.cancelled:
                    raise
            else:
                result.error = handler_error(error, task)
        if not task.cancelled:
            self._send(result)

    async def _call(self, task: Task) -> bytes | None:
        """Call the handler of a task, and return its output as a payload."""
        handler = self._functions.handler_for(task.capability)
        arguments = handler.signature.arguments(task)
        function = functools.partial(handler.function, **arguments)
        if handler.piece is None:
            return output_payload(await self._await(function, handler.is_async, task._execution))
        pieces = PieceSender(self._connection, task._execution)
        try:
            generator = function()
            is_plain = inspect.isgenerator(generator)
            send = functools.partial(pieces.send_all if is_plain else pieces.send_all_async, generator)
            output = await self._await(send, not is_plain, task._execution)
            pieces.flush()
        finally:
            self._connection.timers.cancel(pieces.flush)
        return pieces.output(handler.piece) if output is None else output_payload(output)

    async def _await(self, function: Callable[[], Any], is_async: bool, execution: Execution | None = None) -> Any:
        """Call a function, in a thread if it is a plain one, and await what it returns if that is awaitable."""
        if is_async:
            output = function()
        elif execution is None:
            output = await self._threads.run(function)
        else:
            execution.in_thread = True
            output = await self._threads.run(function, execution.thread_returned)
        if inspect.iscoroutine(output):
            return await timed(output, execution)
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
            call = functools.partial(handler, value_of(message.message), message.sender or "")
            try:
                await self._await(call, is_async(handler))
            except BaseException as error:
                if is_of_the_loop(error):
                    raise
                log_agent.exception("the broadcast handler failed")


class Progress(NamedTuple):
    """One progress report: `progress` from 0 to 1 or None, `detail` any JSON, `seq` counts from 1 per task."""

    progress: float | None
    detail: Any
    seq: int


class Piece(NamedTuple):
    """One piece of a task's output, any JSON, in order; `seq` counts progress and pieces per task, from 1."""

    piece: Any
    seq: int


class TaskQuestion(NamedTuple):
    """A question of a task's worker; `ask` counts from 1 per task. The answer fits the JSON Schema, if there is one."""

    text: str
    schema: dict[str, Any] | None
    ask: int


TaskNews = Progress | Piece | TaskQuestion
OnQuestion = Callable[[TaskQuestion], Any]
FORGOTTEN = "the hub no longer knows this task; delegate it again"


class Questions:
    """The questions of a task's worker, at its requester: at most one is `open`.

    `on_question` answers them, if it is given. The hub delivers an open question again after a reconnect; questions are
    numbered, so that each is taken once.
    """

    def __init__(self, handle: TaskHandle, connection: HubConnection, on_question: OnQuestion | None) -> None:
        self.open: TaskQuestion | None = None
        self._attempt = 0  # Of the open one.
        self._last = 0
        self._handle = handle
        self._connection = connection
        self._on_question = on_question
        self._answering: asyncio.Task[None] | None = None

    def receive(self, report: StatusReply) -> TaskQuestion | None:
        """Return the question in a report, and begin to answer it; None if it is not a new one."""
        if report.question is None or report.ask is None or report.ask <= self._last:
            return None
        self.drop()
        question = TaskQuestion(report.question.text, report.question.schema, report.ask)
        self.open, self._last, self._attempt = question, report.ask, report.attempt or 0
        if self._on_question is not None:
            self._answering = self._connection.spawn(self._answer(self._on_question, question))
        return question

    def attempt_began(self, attempt: int) -> None:
        """Drop the question of an earlier attempt."""
        if attempt > self._attempt:
            self.drop()

    def drop(self, *, forgotten: bool = False) -> None:
        """Note that no question waits for an answer. A hub that has `forgotten` the task numbers from 1 again."""
        self.open = None
        if forgotten:
            self._last = self._attempt = 0
        if self._answering is not None and self._answering is not asyncio.current_task():
            self._answering.cancel()

    async def send(self, question: TaskQuestion, answer: bytes | None, until: float) -> None:
        """Send an answer until the hub has it. Raises Refused(no_question) if it was not the first to be sent."""
        message = Status(task_id=self._handle.task_id, ask=question.ask, answer=answer)
        sent_count = 0

        def message_for(session: Session) -> Status:
            nonlocal sent_count
            sent_count += 1
            return message

        try:
            await self._connection.request(message_for, StatusReply, until=until)
        except Refused as refusal:
            if refusal.code != Code.NO_QUESTION or sent_count == 1:
                raise
            log_agent.debug("the answer had arrived before its reply was lost task=%s", self._handle.task_id)
        if self.open is question:
            self.open = None

    async def _answer(self, on_question: OnQuestion, question: TaskQuestion) -> None:
        """Have the function answer; if it fails, so does the task."""
        try:
            answer = (
                on_question(question)
                if is_async(on_question)
                else await self._connection.in_thread(functools.partial(on_question, question))
            )
            if inspect.isawaitable(answer):
                answer = await answer
            if self.open is question:
                await self._handle.answer(answer)
        except Exception as error:
            if self.open is question and not self._handle.done:
                self._handle._give_up(error)
            else:
                log_agent.debug("nobody waits for this answer any more", exc_info=True)


class TaskHandle:
    """A task that this agent has delegated. Iterate it (`async for`) for its events, until its outcome: its Progress,
    each Piece of its output, and each TaskQuestion of its worker.

    Submits its task until the hub accepts it, asks for its state after each new registration and when its deadline has
    passed, and submits it again to a hub that lost it.
    """

    task_id: str

    def __init__(self, connection: HubConnection, message: Delegate, on_question: OnQuestion | None = None) -> None:
        self.task_id = message.task_id
        self._connection = connection
        self._message = message
        self._questions = Questions(self, connection, on_question) if message.answers else None
        self._loop = asyncio.get_running_loop()
        self._is_accepted = False
        self._is_cancelled = False
        self._sent_as: str | None = None  # The agent_id under which it was last sent.
        self._attempts = 1  # That the hub has begun, as far as it said.
        self._begun_seq = 0  # The `seq` of the report that the present one has begun.
        self._deadline = 0.0  # Once it is accepted.
        self._outcome: TaskOutcome | AgentHubError | None = None
        self._done_callbacks: list[Callable[[TaskHandle], object]] | None = None  # Until there are some.
        self._updates: collections.deque[TaskNews] | None = None  # Until there are some.
        self._news: LightEvent | None = None  # Until somebody waits: set for a moment with an update, or the outcome.

    @classmethod
    async def submit(
        cls,
        connection: HubConnection,
        message: Delegate,
        patience_s: float | None = None,
        on_question: OnQuestion | None = None,
    ) -> TaskHandle:
        """Submit a task, and return its handle when the hub has accepted it. For `Agent.submit`, which see."""
        handle = cls(connection, message, on_question)
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

    def add_done_callback(self, function: Callable[[TaskHandle], object]) -> None:
        """Have `function(handle)` called on the loop when the task has ended; soon, if it has."""
        self._done_callbacks = [*(self._done_callbacks or ()), function]
        if self.done:
            self._loop.call_soon(function, self)

    async def result(self, timeout_s: float | None = None) -> Any:
        """Return the task's output, waiting for it at most `timeout_s` seconds.

        Raises TaskFailed (with the hub's `code`; `hub_lost` if the hub no longer knows the task), TaskTimeout if it did
        not end within its ttl, Disconnected if the agent was stopped, TimeoutError after `timeout_s`.
        """
        check_seconds("timeout_s", timeout_s)
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

    @property
    def question(self) -> TaskQuestion | None:
        """The question of the task's worker that waits for an answer."""
        return self._questions.open if self._questions is not None else None

    async def answer(self, answer: Any, ask: int | None = None) -> None:
        """Answer the question that waits, or only that of the number `ask`: with any JSON that fits its schema.

        Returns when the hub has the answer. Raises Refused(no_question) if that question does not wait for an answer,
        or no longer; ValueError if the answer is not JSON or does not fit; TaskTimeout if the ttl was over first.
        """
        self._connection.check_loop()
        question = self.question
        if self._questions is None or question is None or ask not in (None, question.ask):
            text = "no question of this task waits for an answer"
            raise Refused(text, code=Code.NO_QUESTION, task_id=self.task_id)
        payload = payload_from("answer", answer)
        if question.schema is not None:
            try:
                SchemaCheck(question.schema).check(value_of(payload))
            except ValidationError as error:
                raise ValueError(str(error.within("answer"))) from None
        try:
            await self._questions.send(question, payload, self._deadline)
        except TimeoutError:
            raise TaskTimeout("the ttl was over before the answer was sent", task_id=self.task_id) from None

    def _give_up(self, error: Exception) -> None:
        """Cancel the task because its worker's question cannot be answered, and have `result` raise why."""
        self.cancel_soon("its requester failed to answer")
        text = error.message if isinstance(error, AgentHubError) else text_of(error)
        code = error.code if isinstance(error, TaskFailed) else Code.FAILED
        failure = TaskFailed(f"on_question: {text}", code=code, task_id=self.task_id)
        failure.__cause__ = error
        self._finish(failure)

    async def cancel(self, reason: str = "") -> None:
        """Cancel the task; `result` then raises TaskFailed(cancelled). Without effect if it has ended."""
        self._connection.check_loop()
        if not self.done:
            with contextlib.suppress(Refused):  # It has just ended, and its outcome is on the way.
                await self._connection.request(self._cancellation(reason), StatusReply)

    def cancel_soon(self, reason: str = "its requester stopped waiting") -> None:
        """Cancel the task without waiting, where nothing can be awaited: in an `except CancelledError`.

        The cancellation is sent at once, or after the next registration if there is no connection.
        """
        self._connection.check_loop()
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
        error = ErrorInfo(Code.CANCELLED, error_text(string("reason", reason)[:REASON_MAX]))
        return Result(task_id=self.task_id, success=False, error=error)

    def _on_cancel_reply(self, cancellation: Result, reply: HubMessage | AgentHubError) -> None:
        if isinstance(reply, Disconnected):
            self._connection.spawn(self._cancel_until_acknowledged(cancellation))

    async def _cancel_until_acknowledged(self, cancellation: Result) -> None:
        with contextlib.suppress(AgentHubError, TimeoutError):  # It has ended, or will at its deadline.
            await self._connection.request(cancellation, StatusReply, until=self._loop.time() + self._message.ttl)

    def __aiter__(self) -> AsyncIterator[TaskNews]:
        return self._follow()

    async def pieces(self) -> AsyncIterator[Any]:
        """Yield the pieces of the output in order; at the end the rest of it, if pieces were lost with a connection.

        An output that came without pieces is one piece, or the items of a list. Raises what `result` raises, and
        TaskFailed(pieces_lost) if the task was begun again and its output does not continue what was yielded.
        """
        got: list[Any] = []
        seq, is_whole = 0, True
        async for update in self:
            if isinstance(update, TaskQuestion):
                continue
            if not got:
                seq = max(seq, self._begun_seq)
            is_whole = is_whole and update.seq == seq + 1
            seq = update.seq
            if is_whole and isinstance(update, Piece):
                got.append(update.piece)
                yield update.piece
        output = await self.result()
        rest = rest_of(output, got)
        for piece in rest if rest is not None else ():
            yield piece
        if rest is None and not is_whole:
            text = "pieces of the output were lost, and what came before is not its beginning; result() has all of it"
            raise TaskFailed(text, code=Code.PIECES_LOST, task_id=self.task_id)

    async def _wait(self) -> TaskOutcome | AgentHubError:
        self._connection.check_loop()
        while self._outcome is None:
            await self._next_news()
        return self._outcome

    async def _next_news(self) -> None:
        self._news = self._news or LightEvent()
        await self._news.wait()

    async def _follow(self) -> AsyncIterator[TaskNews]:
        self._connection.check_loop()
        while True:
            while self._updates:
                yield self._updates.popleft()
            if self.done:
                return
            await self._next_news()

    # Submitting it.

    async def _submit(self, patience_s: float | None = None) -> None:
        """Send the task until the hub has accepted it; while the hub is overloaded, for `patience_s` seconds."""
        now = self._loop.time()
        last = now + self._message.ttl
        patient_until = last if patience_s is None else now + patience_s
        backoff: Backoff | None = None
        try:
            while pause_max_s := await self._offer(last, patient_until):
                backoff = backoff or Backoff()
                async with asyncio.timeout_at(last):
                    await asyncio.sleep(min(backoff.next_s(), pause_max_s))
                # A task that was refused has not begun, so what is left of its ttl is all that it gets.
                remaining_s = max(0.001, last - self._loop.time())
                self._message = dataclasses.replace(self._message, ttl=remaining_s)
        except TimeoutError as error:
            text = "the hub did not accept the task within its ttl; give it a longer ttl, or try again later"
            raise TaskTimeout(text, task_id=self.task_id) from error
        self._is_accepted = True
        self._deadline = self._loop.time() + self._message.ttl
        self._watch()

    async def _offer(self, last: float, patient_until: float) -> float:
        """Send the task once; return 0 if the hub has accepted it, else the longest pause before the next attempt.

        Raises Refused, or TimeoutError when the loop's clock reaches `last`.
        """
        try:
            accepted = await self._connection.request(self._message_for, StatusReply, until=last)
            self._count_attempt(accepted)
        except Refused as refusal:
            now = self._loop.time()
            passes = refusal.code == Code.OVERLOADED or self._is_awaiting_return(refusal)
            if passes and now >= last:
                raise TimeoutError from refusal
            if not passes or now >= patient_until:
                raise
            task_id, text = escape_unprintable(self.task_id), escape_unprintable(refusal.message)
            log_agent.info("%s task=%s: %s", refusal.code, task_id, text)
            return BACKOFF_MAX_S if refusal.code == Code.OVERLOADED else RETURN_POLL_S
        if len(self._connection.accepted) < CAPABILITIES_KNOWN_MAX:
            self._connection.accepted.add(self._message.capability)
        return 0.0

    def _is_awaiting_return(self, refusal: Refused) -> bool:
        """Whether a new hub does not know the workers only because they are not back yet."""
        is_new = self._loop.time() < self._connection.renewed_at + RETURN_WAIT_S
        return refusal.code == Code.NO_AGENT and is_new and self._message.capability in self._connection.accepted

    def _message_for(self, session: Session) -> Delegate:
        """Return what is sent on a session. Raises TaskFailed if an earlier hub may have begun all attempts."""
        if self._sent_as not in (None, session.agent_id):  # Its reply was lost, and this hub does not know the task.
            self._message = self._retry()
        self._sent_as = session.agent_id
        return self._message

    def _retry(self) -> Delegate:
        """Return the task for a hub that has forgotten it, with the retries that are left. Raises TaskFailed."""
        retries = self._message.max_retries - self._attempts
        if retries < 0 or self._message.parent_id is not None:
            raise TaskFailed(FORGOTTEN, code=Code.HUB_LOST, task_id=self.task_id)
        self._attempts = 1
        return dataclasses.replace(self._message, max_retries=retries, wait=True)  # Its workers may not be back yet.

    async def _resubmit(self) -> None:
        """Submit the task to a hub that has forgotten it."""
        if not self._is_accepted:
            return  # It is being submitted.
        self._is_accepted = False
        self._sent_as = None
        remaining_s = self._deadline - self._loop.time()
        if self._is_cancelled:
            self._fail("the task was cancelled", Code.CANCELLED)
        elif remaining_s <= 0:
            self._fail(FORGOTTEN)
        else:
            try:
                self._message = dataclasses.replace(self._retry(), ttl=remaining_s)
                if self._questions is not None:
                    self._questions.drop(forgotten=True)
                await self._submit()
            except AgentHubError as error:
                self._finish(error)

    def _count_attempt(self, report: StatusReply) -> None:
        self._attempts = max(self._attempts, report.attempt or 0)
        if self._questions is not None:
            self._questions.attempt_began(report.attempt or 0)

    # Learning its outcome.

    def _on_news(self, news: StatusReply | TaskOutcome | Registered | AgentHubError) -> None:
        if isinstance(news, StatusReply):
            self._on_report(news)
        elif not isinstance(news, Registered):
            self._finish(news)
        elif self._is_accepted:
            self._connection.spawn(self._refresh())

    def _on_report(self, report: StatusReply) -> None:
        self._count_attempt(report)
        update: TaskNews | None = None  # If another attempt has begun, or a question is delivered again.
        if report.question is not None:
            update = self._questions.receive(report) if self._questions is not None else None
        elif report.piece is not None:
            update = Piece(value_of(report.piece), report.seq or 0)
        elif report.progress is not None or report.detail is not None:
            update = Progress(report.progress, report.detail, report.seq or 0)
        else:
            self._begun_seq = report.seq or 0
        if update is not None:
            if self._updates is None:
                self._updates = collections.deque(maxlen=UPDATES_MAX)
            self._updates.append(update)
            self._wake()

    def _finish(self, outcome: TaskOutcome | AgentHubError) -> None:
        if self._outcome is not None:
            return
        self._outcome = outcome
        if self._questions is not None:
            self._questions.drop()
        self._connection.timers.cancel(self._on_overdue)
        self._connection.followers.pop(self.task_id, None)
        for function in self._done_callbacks or ():
            self._loop.call_soon(function, self)
        self._wake()

    def _fail(self, text: str, code: str = Code.HUB_LOST) -> None:
        self._finish(TaskFailed(text, code=code, task_id=self.task_id))

    def _wake(self) -> None:
        if self._news is not None:
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
        self._count_attempt(report)
        if report.requester != session.agent_id:  # The hub knows the task, but no longer this agent: output is hidden.
            self._fail("the hub no longer knows that this agent delegated the task")
        elif report.state in FINAL_STATES:
            self._finish(outcome_from(report))


class Agent:
    """A program on the hub: what it offers, and its way to delegate to others.

    `hub` is a LocalHub of this process; without one, the agent connects to `url` (else AGENTHUB_URL, else
    ws://127.0.0.1:8765; several are separated by commas: a hub and its standbys), authenticates with `token` (else
    AGENTHUB_TOKEN, else the content of the file AGENTHUB_TOKEN_FILE), and verifies the hub's certificate by the
    authorities in `ca_file` (else AGENTHUB_CA_FILE, else the system's). `name` is the class's by default. At most
    `max_tasks` tasks run at once. Without a connection it keeps trying, forever or for `give_up_after_s` seconds.

    Use it as `async with agent:`, or block on `agent.run()`. Raises ValueError for a bad argument, Refused if the hub
    does not accept the registration, Disconnected when it has given up or another connection has replaced it.
    """

    name: str = ""
    description: str
    url: str
    agent_id: str | None  # None until the hub has registered it, or it is set to resume an earlier agent's session.
    resume: str | None  # The secret of that session; it changes with each registration.
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
        self.url = check_urls(url or os.environ.get("AGENTHUB_URL") or URL_DEFAULT)
        self.agent_id = None
        self.max_tasks = max_tasks
        check_seconds("give_up_after_s", give_up_after_s)
        self.metadata = metadata or {}
        self.give_up_after_s = give_up_after_s
        if token is not None and not isinstance(token, str):
            raise ValueError("token must be a string")  # Without its value.
        hubs = HubUrls(self.url, token=token, ca_file=ca_file)
        self._connector: Connector = connector_of(hub) if hub is not None else hubs.connect
        self._has_standby = hub is None and len(hubs.urls) > 1
        self._may_read_token = hub is None and token is None
        self._functions = HandlerRegistry()
        self.resume = None
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
        self._functions.add(function, HandlerOptions(is_broadcast=True))
        return function

    def _add_handler(self, function: Callable[..., Any], options: HandlerOptions) -> None:
        self._functions.add(function, options)
        if self.is_online and self._connection is not None:
            self._connection.call_soon(self._announce)

    def _offer_of(self, other: Agent | None) -> None:
        """Offer what another agent would, instead of all that this one has offered; None: nothing."""
        handlers = other._functions.handlers if other is not None else {}
        offered = [handler.capability for handler in handlers.values()]
        if offered != [handler.capability for handler in self._functions.handlers.values()]:
            self._functions.handlers = handlers
            self._announce()

    def _announce(self) -> None:
        """Register once more if the agent is online, because what it offers has changed."""
        if self._connection is not None and self._connection.session is not None:
            self._connection.session.send_request(self._registration(), _on_announced)

    def _registration(self) -> Register:
        """Return what this agent says of itself. Raises ValueError if the limits of the protocol do not allow it."""
        if type(self.max_tasks) is not int or not 1 <= self.max_tasks <= 10_000:
            raise ValueError("max_tasks must be from 1 to 10000")
        check_text("name", self.name, VISIBLE_PATTERN)
        return Register(
            name=self.name,
            description=string("description", self.description)[:4096],
            capabilities=[handler.capability for handler in self._functions.handlers.values()],
            max_tasks=self.max_tasks,
            occupied=self._worker.occupied if self._connection is not None else 0,
            metadata=self.metadata,
            agent_id=self.agent_id,
            resume=self.resume,
        )

    # From its start to its stop.

    @property
    def is_online(self) -> bool:
        """Whether the agent is registered and has a connection just now."""
        return self._connection is not None and self._connection.session is not None

    def use_hub(self, hub: LocalHubLike) -> None:
        """Connect to a hub of this process instead of the one at `url`, from the next start on."""
        self._connector = connector_of(hub)
        self._has_standby = False

    def run(self, *, drain_s: float = DRAIN_S, loop: str = "auto") -> None:
        """Run until Ctrl-C or SIGTERM; then accept no new task and leave when the running ones have ended.

        `drain_s` limits that, in seconds; a second signal ends it at once. The event `loop` is uvloop's where that is
        installed; "asyncio" is the standard library's, and "uvloop" raises PackageMissing where it is not installed.
        Unless the program has configured logging, the log goes to stderr. While the command line loads a file, this
        returns at once: the command line runs the agent.
        """
        if _runs_while_loading is not None:
            _runs_while_loading.append(self)
            return
        if asyncio._get_running_loop() is not None:
            raise RuntimeError(
                "an event loop runs already, as in a notebook: use `await agent.start()` instead of run()"
            )
        log_if_unconfigured()
        try:
            run_loop(serve(self, drain_s=drain_s), loop)
        except AgentHubError as error:
            report_in_one_line(error)
            raise
        except KeyboardInterrupt:
            return

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
        """Leave the hub, waiting at most `drain_s` seconds for running tasks to end. Handles of open tasks fail.

        May be called from any event loop; the other methods only from the one on which the agent was started.
        """
        check_seconds("drain_s", drain_s)
        connection = self._connection
        if connection is None or connection.is_closed:
            return
        if not connection.is_on_loop:
            await connection.call_on_loop(self.stop(drain_s))
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
                self._log_drain(drain_s)
                await self.stop(drain_s)
            elif not connection.ended.cancelled():
                failure = connection.ended.exception()
        finally:
            await self.stop()
        if failure is not None:
            raise failure

    def _log_drain(self, drain_s: float) -> None:
        running = self._worker.running
        if drain_s > 0 and running:
            tasks = f"{running} task{'s' if running > 1 else ''}"
            log_agent.info("waiting for %s (up to %g s); Ctrl-C again to stop now", tasks, drain_s)

    async def connected(self, within_s: float | None = None) -> None:
        """Return when there is a connection, trying to connect now rather than after the pause of the backoff.

        With `within_s`, return when the hub has answered a heartbeat. Raises Disconnected if there is no connection
        after `within_s` seconds (None: wait forever), or what ended the connection for good.
        """
        check_seconds("within_s", within_s)
        connection = self._started()
        connection.retry_now()
        try:
            async with asyncio.timeout(within_s):
                while not await self._is_answered(await connection.wait(), within_s):
                    connection.retry_now()
        except TimeoutError as error:
            if connection.session is not None:
                connection.session.probe()
                raise Disconnected(f"the hub did not answer within {within_s:g} s") from error
            raise Disconnected(connection.last_failure or f"no hub answers at {self.url}") from error

    async def _is_answered(self, session: Session, within_s: float | None) -> bool:
        """Return whether the hub answers on a session, which is lost if not. Without a limit it is not asked."""
        if not within_s:
            return True
        try:
            await session.request(Heartbeat(), HeartbeatAck, within_s=PROBE_S)
        except Disconnected:
            await session.released.wait()
            return False
        return True

    def _begin(self) -> HubConnection:
        if self._connection is not None and not self._connection.is_closed:
            raise RuntimeError("this agent is already running; stop it before you start it again")
        connection = self._connection = HubConnection(
            self._connector,
            registration=self._registration,
            on_registered=self._on_registered,
            on_message=self._on_message,
            give_up_after_s=self.give_up_after_s,
            has_token_file=self._may_read_token and is_token_in_file(),
            has_standby=self._has_standby,
        )
        self._worker = Worker(self, connection, self._functions, self._announce)
        return connection

    def _started(self) -> HubConnection:
        """Return the connection. Raises Disconnected if the agent was not started, or what ended it for good."""
        if self._connection is None or self._connection.is_closed:
            failure = self._connection and self._connection.failure
            raise failure or Disconnected("this agent is not started; use `async with agent:` or `await agent.start()`")
        self._connection.check_loop()
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
        offered = ", ".join(self._functions.handlers)
        log_agent.info("joined agent=%s capabilities=%s", escape_unprintable(registered.agent_id), offered or "none")
        if self.agent_id not in (None, registered.agent_id) and self._connection is not None:
            self._connection.renewed_at = asyncio.get_running_loop().time()
        self.agent_id, self.resume = registered.agent_id, registered.resume
        if not self._worker.reconcile(registered.tasks):
            return False
        present = self._registration()
        if (registration.capabilities, registration.occupied) != (present.capabilities, present.occupied):
            self._announce()  # It has changed meanwhile.
        return True

    def _on_message(self, message: HubMessage) -> None:
        if isinstance(message, Delegated):
            self._worker.receive(message)
        elif isinstance(message, StatusReply):
            if message.state in FINAL_STATES:
                self._worker.task_ended(message.task_id or "")
            elif message.ask is not None and message.reply_to is None:
                self._worker.receive_answer(message)
        elif isinstance(message, BroadcastReply):
            self._worker.receive_broadcast(message)
        elif isinstance(message, Error):
            code, text = escape_unprintable(message.code), escape_unprintable(message.message)
            log_agent.log(refusal_level(message), "refused code=%s: %s", code, text)

    # Asking others.

    async def delegate(self, capability: str | None = None, input: Any = None, **options: Any) -> Any:
        """Have another agent do a task, and return its output. The options are those of `submit`.

        The worker's questions go to `on_question`. Raises what `submit` and `TaskHandle.result` raise. Cancelling this
        call cancels the task.
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
        answers: bool = False,
        on_question: OnQuestion | None = None,
        trace: dict[str, str] | None = None,
    ) -> TaskHandle:
        """Delegate a task, and return its handle when the hub has accepted it.

        `capability` lets the hub choose the worker, `agent_id` names it; `ttl` is in seconds and covers waiting and all
        attempts; the higher `priority` (-100 to 100) goes first; the task is retried up to `max_retries` times when its
        worker is lost; `wait` queues it although no online agent offers the capability. Without a connection this waits
        for one.

        With `answers` the worker may ask something, which `TaskHandle.answer` answers. `on_question` says it too: it is
        called with each TaskQuestion and returns the answer; a plain function runs in a thread. If it raises, the task
        is cancelled, and its result is that error. `trace` is passed on to the worker unread: at most 2 KiB.

        A hub that is `overloaded` is asked again for `patience_s` seconds (None: the ttl). So is a hub that restarted
        without a journal, about a capability that was offered before: its agents have 60 s to come back. Raises
        Refused, with the hub's code; TaskTimeout if the hub did not accept the task within `ttl`; ValueError if the
        input is not JSON; Disconnected if there will be no connection.
        """
        check_seconds("patience_s", patience_s)
        if not is_number(ttl) or not 0 < ttl <= TTL_MAX_S:
            raise ValueError(f"ttl must be more than 0 and at most {TTL_MAX_S} seconds")
        message = Delegate(
            task_id=self._new_task_id() if task_id is None else check_text("task_id", task_id, ID_PATTERN),
            agent_id=agent_id,
            capability=capability,
            input=payload_from("input", input),
            ttl=float(ttl),
            priority=priority,
            max_retries=max_retries,
            parent_id=parent_id,
            wait=wait,
            answers=answers or on_question is not None,
            trace=check_trace(trace) if trace else None,
        )
        return await TaskHandle.submit(self._started(), message, patience_s, on_question)

    def _new_task_id(self) -> str:
        return f"{slugify(self.name, 40) or 'task'}-{os.urandom(8).hex()}"

    async def stream(self, capability: str | None = None, input: Any = None, **options: Any) -> AsyncIterator[Any]:
        """Delegate a task, and yield the pieces of its output as they come. The options are those of `submit`.

        Leaving the loop cancels the task. Raises what `submit` and `TaskHandle.pieces` raise.
        """
        handle = await self.submit(capability, input, **options)
        try:
            async for piece in handle.pieces():
                yield piece
        finally:
            if not handle.done:
                handle.cancel_soon("its requester stopped reading")

    async def discover(self, capability: str = "", limit: int = 100) -> list[AgentInfo]:
        """Find agents by a keyword, the best match first; the empty one finds all. At most `limit`, up to 1000."""
        message = Discover(capability=capability, limit=limit)
        return (await self._started().request(message, Discovered)).agents

    async def broadcast(self, message: Any, capability: str | None = None) -> int:
        """Send any JSON to all other agents that are online (with that capability); return how many there are.

        Raises Disconnected if the connection is lost before the hub replies: then it may have been sent or not.
        """
        session = await self._started().wait()
        reply = await session.request(
            Broadcast(message=payload_from("message", message), capability=capability), BroadcastReply
        )
        return reply.recipients or 0

    async def status(self, task_id: str | None = None) -> StatusReply:
        """Ask the hub about itself (in `.hub`), or about one task. Raises Refused(unknown_task)."""
        return await self._started().request(Status(task_id=task_id), StatusReply)


class LogFormatter(logging.Formatter):
    """Write one line per record, unprintable characters escaped. A traceback follows, each line marked with `|`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escape_unprintable(super().formatMessage(record))

    def formatException(self, exc_info: Any) -> str:
        return "\n".join(f"  | {escape_unprintable(line)}" for line in super().formatException(exc_info).splitlines())


PLACEHOLDER = re.compile(r"%%|(?:(\w+)=)?%[-#0 +]*\d*(?:\.\d+)?[a-zA-Z]")  # What a log message takes an argument for.


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the arguments of a log record that its message has as `name=%s`: numbers and None as they are."""
    names = [found[1] for found in PLACEHOLDER.finditer(str(record.msg)) if found[0] != "%%"]
    if not isinstance(record.args, tuple) or len(names) != len(record.args):
        return {}
    given = zip(names, record.args, strict=True)
    return {name: one if isinstance(one, int | float | None) else str(one) for name, one in given if name is not None}


class JsonLogFormatter(logging.Formatter):
    """Write one JSON object per record: `time` (RFC 3339, UTC), `level`, `logger`, `message`, and `traceback`.

    Every `name=value` in the message becomes a field of the object: `task`, `agent`, `code`, `trace`.
    """

    def format(self, record: logging.LogRecord) -> str:
        seconds, milliseconds = divmod(int(record.created * 1000), 1000)
        fields = {
            **fields_of(record),
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


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


def log_handler() -> logging.Handler:
    """Return a handler that writes the log to stderr in the format of the command line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter())
    handler.addFilter(LogFloodFilter())
    return handler


def log_if_unconfigured() -> None:
    """Write this module's log to stderr, unless the program has configured logging."""
    log = logging.getLogger("agenthub")
    if not log.hasHandlers() and log.level == logging.NOTSET:
        log.addHandler(log_handler())
        log.setLevel(logging.INFO)


def report_in_one_line(error: AgentHubError) -> None:
    """If an error ends the program, have Python print its text: a traceback would show only lines of this module."""
    former = sys.excepthook

    def report(kind: type[BaseException], value: BaseException, traceback: types.TracebackType | None) -> None:
        if value is error:
            print(f"agenthub: {escape_unprintable(error.message)}", file=sys.stderr)
        else:
            former(kind, value, traceback)

    sys.excepthook = report


_runs_while_loading: list[Agent] | None = None  # Agents whose run() was called by a file that is being loaded.


@contextlib.contextmanager
def deferred_runs() -> Iterator[list[Agent]]:
    """Have `Agent.run` append its agent to the list instead of running it, for a file may end with `agent.run()`."""
    global _runs_while_loading
    former, _runs_while_loading = _runs_while_loading, []
    try:
        yield _runs_while_loading
    finally:
        _runs_while_loading = former


class LocalHubLike(Protocol):
    """The part of a hub in its own process that an agent uses."""

    def connect(self, owner: LinkOwner) -> Awaitable[Link]: ...


def connector_of(hub: LocalHubLike) -> Connector:
    """Return how to connect to a hub of this process; raise ValueError for what is none, as a URL."""
    if isinstance(hub, type) or not callable(getattr(hub, "connect", None)):
        raise ValueError(f"hub must be a LocalHub of this process, not {hub!r}; for another hub, give its url")
    return hub.connect


def check_trace(trace: Any) -> dict[str, str]:
    """Return a trace that is an object of strings, and not too large; raise ValueError for any other."""
    try:
        return typing.cast(dict[str, str], validator_for(Trace)(trace))
    except ValidationError as error:
        raise ValueError(str(error.within("trace"))) from None


def check_seconds(name: str, value: float | None) -> None:
    """Raise ValueError for a time limit that is not a number."""
    if value is not None and (not is_number(value) or math.isnan(value)):
        raise ValueError(f"{name} must be a number of seconds, not {value!r}")


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


def rest_of(output: Any, pieces: list[Any]) -> list[Any] | None:
    """Return the pieces of an output behind the first ones; None if these are not its beginning."""
    if not pieces:
        return output if isinstance(output, list) else [] if output is None else [output]
    if isinstance(output, list):
        return output[len(pieces) :] if output[: len(pieces)] == pieces else None
    if not isinstance(output, str) or not all(isinstance(piece, str) for piece in pieces):
        return None
    head = "".join(pieces)
    return None if not output.startswith(head) else [output[len(head) :]] if len(output) > len(head) else []


def output_payload(output: Any) -> bytes | None:
    """Return a handler's output as a payload. Raises TaskFailed, which names the part that is not JSON."""
    try:
        return payload_from("output", output)
    except ValueError as error:
        fault = str(error)
        log_agent.error("a handler's output is not JSON: %s", escape_unprintable(error_text(fault)))
        raise TaskFailed(fault) from None


def payload_from(what: str, value: Any) -> bytes | None:
    """Return a value of the user's as a payload, converted where it is not JSON.

    Raises ValueError, which names the part that cannot be converted, as one of `what`.
    """
    try:
        return payload_of(value)
    except (ValueError, RecursionError):
        pass  # It has parts to convert, or to name.
    try:
        return payload_of(converted(value))
    except (ValueError, RecursionError) as error:
        raise ValueError(fault_in(what, value) or f"{what}: {error}") from None


def converted(value: Any) -> Any:
    """Return a value with what JSON has instead of the rest. Raises ValueError for what is not known."""
    try:
        return json.loads(json.dumps(value, default=convert))
    except TypeError:  # A key that is not JSON either.
        return json.loads(json.dumps(with_json_keys(value), default=convert))


def with_json_keys(value: Any, depth: int = DEPTH_MAX) -> Any:
    """Return a value whose objects have keys of JSON: an Enum or a date becomes what it is as a value."""
    if depth == 0:
        raise ValidationError(f"is nested more than {DEPTH_MAX} deep")
    if isinstance(value, list | tuple | set | frozenset):
        return [with_json_keys(one, depth - 1) for one in value]
    if isinstance(value, str | int | float) or value is None:
        return value
    if not isinstance(value, dict):
        return with_json_keys(convert(value), depth - 1)
    made = {}
    for key, one in value.items():
        name = key if isinstance(key, str | int) and not isinstance(key, enum.Enum) else convert(key)
        if not isinstance(name, str | int):
            raise ValidationError("holds an object with a key that is neither a string nor an integer")
        made[str(name) if type(name) is int else name] = with_json_keys(one, depth - 1)
    if len(made) < len(value):
        raise ValidationError("holds an object with two keys that are the same in JSON")
    return made


def convert(value: Any) -> Any:
    """Return what JSON has for a value of a common type, as Pydantic's `to_jsonable_python` does; not of bytes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset | collections.deque):
        return list(value)
    if callable(dump := getattr(value, "model_dump", None)) and not isinstance(value, type):
        return dump(mode="json")
    if callable(isoformat := getattr(value, "isoformat", None)) and not isinstance(value, type):
        return isoformat()
    if isinstance(value, os.PathLike) or type(value).__module__ in ("decimal", "uuid"):
        return str(value)
    raise ValidationError(f"holds a {type(value).__name__}, which is not JSON")


def fault_in(what: str, value: Any) -> str | None:
    """Return which part of a value is not JSON, and why; None if only its encoding failed."""
    path, fault, parts = what, None, iter([("", value)])
    for _ in range(DEPTH_MAX + 2):
        for step, part in parts:
            try:
                check_json(converted(part))
            except (ValueError, RecursionError) as error:
                path, fault = path + step, str(error)
                break
        else:
            break
        if isinstance(part, dict):
            parts = ((f".{text_of(key)}", one) for key, one in part.items())
        elif isinstance(part, list | tuple):
            parts = ((f"[{index}]", one) for index, one in enumerate(part))
        elif dataclasses.is_dataclass(part) and not isinstance(part, type):
            parts = ((f".{name}", getattr(part, name)) for name in field_names(type(part)))
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


HANDLED_SIGNALS: set[int] = set()  # Of this process, by a loop.


def forget_signals() -> None:
    """Let a forked child have its own signals: it would report them to the loop of its parent, and not end by them."""
    if HANDLED_SIGNALS:
        signal.set_wakeup_fd(-1)
    for number in HANDLED_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    HANDLED_SIGNALS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_signals)


@contextlib.contextmanager
def signal_handler(handler: Callable[[], object], *names: str) -> Iterator[None]:
    """Call `handler` on the loop for each of these signals, as far as the system knows them and the thread may."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as undo:
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            try:
                loop.add_signal_handler(number, handler)
                undo.callback(loop.remove_signal_handler, number)
                HANDLED_SIGNALS.add(number)
                undo.callback(HANDLED_SIGNALS.discard, number)
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
CELL_MAX = 200  # Characters in a cell of a table with many rows.
CALLERS_MAX = 1000  # Hubs whose shared caller is remembered.
RESULT_POLL_S = 1.0  # Between two questions of `result --wait`.
AGENT_HEAD = ["NAME", "AGENT", "RUNNING", "CAPABILITIES", "DESCRIPTION"]
TASK_HEAD = ["TASK", "STATE", "CAPABILITY", "AGENT", "ATTEMPT", "AGE", "TTL", "PROGRESS"]
TOP_ROWS = 200  # Agents and tasks that `top` asks for,
TOP_STALE_S = 4.0  # ... how old an answer is when it says so,
TOP_DRAW_S = 0.1  # ... and how soon it draws after a key.
STATUS_HEAD_LINES = 9  # Two of the hub, two blank, the heads and counts of two tables, and the shell's prompt.
LOCK_POLL_S = 0.02
COPIED_AT_ONCE = 1000  # Tasks that `journal copy` writes at once.
TERMINATING_S = 1.0  # Between SIGTERM and SIGKILL for a command whose task has ended.
PIPES_LEFT_S = 1.0  # For what is in the pipes of a command that has ended, if a child of it holds them open.
PROGRAM = re.compile(r"\s*([\w./+-]+)(?=\s|$)")  # The first word of a shell command, if nothing in it is special.
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Which Windows does not have.
LOG_LEVELS = "debug|info|warning|error"


class CommandFailed(Exception):
    """Ends the command line with exit code 1 and this one line on stderr."""


def configure_logging(level: str, log_format: str) -> None:
    handler = log_handler()
    if log_format == "json":
        handler.setFormatter(JsonLogFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # It was closed by the shell, as in `agenthub status >&-`.
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  # for the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # Not every terminal can show every character.
    words = sys.argv[1:] if argv is None else argv
    parser = argument_parser([word for word in words if word != "--"][:1])
    if not words:
        parser.print_help()
        return 0
    args, unknown = parser.parse_known_args(words)
    command_parser: Parser = args.parser  # Its usage helps more than that of all commands.
    if unknown:
        hint = "; quote JSON for the shell, as one argument" if args.run is _run_call else ""
        command_parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    configure_logging(args.log_level, args.log_format)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except (CommandFailed, AgentHubError) as error:
        hint = ", or give --token-file" if str(error).endswith("AGENTHUB_TOKEN_FILE") else ""
        print(f"agenthub: {escape_unprintable(str(error))}{hint}", file=sys.stderr)
        return 1
    except ValueError as error:
        command_parser.error(escape_unprintable(str(error)), usage="")
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
        "top": Command("watch a hub in the terminal: numbers, agents, queues and tasks", _add_top, _run_top),
        "call": Command("delegate a task and print its output", _add_call, _run_call),
        "result": Command("print the output of a task that call --no-wait delegated", _add_result, _run_result),
        "cancel": Command("cancel a task that call --no-wait delegated", _add_cancel, _run_cancel),
        "bridge": Command(
            "offer the hub to an MCP client, or an MCP server's tools to the hub", _add_bridge, _run_bridge, "info"
        ),
        "a2a": Command("offer the hub's agents to A2A clients, or an A2A agent to the hub", _add_a2a, _run_a2a, "info"),
        "schema": Command("print the JSON Schema of all messages", lambda parser: None, _run_schema),
        "token": Command("generate a token for a hub", _add_token, _run_token),
        "journal": Command("copy a journal to another place, such as a database", _add_journal, _run_journal),
        "completion": Command("print a shell's completion of these commands", _add_completion, _run_completion),
    }


COMMANDS_OF_SERVICES = ("hub", "agent")  # Their options can stand in the environment, as containers have them.
SWITCH_VALUES = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}


class Parser(argparse.ArgumentParser):
    """A parser whose errors say where to find all options. Where a value is wrong, the usage would not help."""

    def error(self, message: str, usage: str | None = None) -> typing.NoReturn:
        usage = self.format_usage() if usage is None else usage
        self.exit(2, f'{usage}{self.prog}: error: {message}; see "{self.prog} --help"\n')


def argument_parser(names: Iterable[str] | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line. Only the commands in `names` get their options (None: all)."""
    parser = Parser(
        prog="agenthub", description="A hub for agents: they find each other and delegate tasks.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"agenthub {__version__}")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in commands().items():
        description = f"{command.purpose[0].upper()}{command.purpose[1:]}."
        # Without abbreviations: `--token SECRET` would be taken for --token-file.
        one = parsers.add_parser(name, help=command.purpose, description=description, allow_abbrev=False)
        if names is None or name in names:
            one.set_defaults(run=command.run, parser=one)
            option(one, f"--log-level {LOG_LEVELS}", command.log_level, "least severe level to log, to stderr")
            option(one, "--log-format text|json", "text", "how each log record is written")
            command.add_options(one)
            if name in COMMANDS_OF_SERVICES:
                take_defaults_from_environment(one, f"AGENTHUB_{name.upper()}")
    return parser


def take_defaults_from_environment(parser: argparse.ArgumentParser, prefix: str) -> None:
    """Take the defaults of all options from variables of their names, and say so in the help."""
    names = {}
    for action in parser._actions:  # argparse has no public list of them.
        if action.option_strings and action.dest not in ("help", "version"):
            names[f"{prefix}_{action.option_strings[0].strip('-').replace('-', '_').upper()}"] = action
    for name in names.keys() & os.environ.keys():
        action, value = names[name], os.environ[name]
        if isinstance(action.default, list):
            action.default = value.split(",")
        elif action.nargs == 0 and value.lower() in SWITCH_VALUES:
            action.default = SWITCH_VALUES[value.lower()]
        elif action.nargs == 0:
            parser.error(f"{name}: must be 1 or 0, not {value!r}")
        elif action.choices is not None and value not in action.choices:
            parser.error(f"{name}: must be one of {', '.join(map(str, action.choices))}, not {value!r}")
        else:
            action.default = value  # argparse converts it to the type of the option.
    parser.epilog = (
        f"Each option can also be set in the environment, as {prefix}_ and its name ({next(reversed(names))}); "
        "several values are separated by commas, switches are 1 or 0. An option given here wins."
    )


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
    option(group, "--url URL", url, "URL of the hub, or several, comma-separated; AGENTHUB_URL sets the default")
    option(group, "--token-file PATH", None, "file with the hub's token; overrides AGENTHUB_TOKEN")
    option(group, "--ca-file PATH", None, "CA certificates to trust instead of the system's")


def export_connection_options(args: argparse.Namespace) -> None:
    """Export the options of `_add_connection` to the environment, where all agents of this process read them."""
    os.environ["AGENTHUB_URL"] = check_urls(args.url)
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
    option(group, "--no-page", False, "do not show agents and tasks to browsers, at /")
    option(group, "--tls-cert PATH", None, "TLS certificate: serve wss:// instead of ws://")
    option(group, "--tls-key PATH", None, "private key of the certificate, unless both are in one file")
    _add_access(parser.add_argument_group("access"))
    group = parser.add_argument_group("persistence")
    purpose = "persist tasks and agents in this file across restarts, or in a database: postgresql://USER@HOST/NAME"
    option(group, "--db PATH", None, purpose)
    option(group, "--sync full|normal", "full", "with --db: full survives a power loss, normal a crash of the process")
    group = parser.add_argument_group("process")
    option(group, "--log-tasks", False, "log one line for each task that ends, at level info")
    option(group, "--with FILE[:NAME]", [], "also run the agents of this file, in the hub's process", dest="files")
    _add_loop(group)
    _add_limits(parser)


def _add_access(group: argparse._ActionsContainer) -> None:
    option(group, "--token-file PATH", None, "file with the token to require; overrides AGENTHUB_TOKEN")
    option(group, "--access PATH", None, "file with several tokens and what each allows; SIGHUP reloads it")
    option(group, "--namespaces A,B", None, "serve only these namespaces of --access; other hubs serve the others")
    option(group, "--insecure", False, "run without a token on an address that others can reach")
    option(group, "--allow-origin ORIGIN", [], "origin whose web pages may connect, such as https://example.org")
    option(group, "--allow-host NAME", [], "name accepted in the Host header; on loopback in addition to its own names")
    proxy = "address or network of a proxy, whose X-Forwarded-For or Forwarded header names the client's address"
    option(group, "--trusted-proxy ADDRESS", [], proxy)


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
    tls = listening_tls(args)
    server = _hub_server(args, tls)
    if args.log_tasks:
        log_tasks.setLevel(logging.INFO)
    _warn_if_exposed(args)
    _raise_descriptors_max(server.settings.connections_max + CONNECTIONS_OVER + 2 * DESCRIPTORS_KEPT)
    agents = [agent for target in args.files for agent in load_agents(target)]
    is_reloadable = args.access is not None or args.token_file is not None or tls is not None
    reload = functools.partial(reload_access, server, tls, args) if is_reloadable else None
    with only_new_objects_collected():
        run_loop(_serve_hub(server, agents, reload), args.loop)
    return 0


def listening_tls(args: argparse.Namespace) -> ssl.SSLContext | None:
    """Return the TLS of --tls-cert and --tls-key; raise ValueError if these or --port are invalid."""
    if not 0 <= args.port <= 65_535:
        raise ValueError("--port must be from 0 to 65535")
    if args.tls_key is not None and args.tls_cert is None:
        raise ValueError("--tls-key needs --tls-cert")
    return server_tls(args.tls_cert, args.tls_key) if args.tls_cert is not None else None


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
        trusted_proxies=",".join(args.trusted_proxy).split(",") if args.trusted_proxy else (),
        backlog_bytes_max=args.backlog,
        connections_per_address_max=args.max_connections_per_address,
        messages_per_s_max=args.rate,
        journal=_journal(args),
        namespaces=args.namespaces.split(",") if args.namespaces is not None else None,
        has_page=not args.no_page,
    )


def _journal(args: argparse.Namespace) -> JournalLike | None:
    """Return the journal of the options; raise ValueError for one that would not survive the hub."""
    if args.db == ":memory:":
        raise ValueError("--db :memory: would persist nothing; give a file, or leave --db out")
    return journal_of(args.db, sync=args.sync) if args.db is not None else None


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


@contextlib.contextmanager
def only_new_objects_collected() -> Iterator[None]:
    """Have the garbage collector look at an object only once, while it is new: records are many, and make no cycles."""
    thresholds = gc.get_threshold()

    def freeze_survivors(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            gc.freeze()

    gc.set_threshold(GC_THRESHOLD)
    gc.callbacks.append(freeze_survivors)
    gc.collect()
    try:
        yield
    finally:
        gc.callbacks.remove(freeze_survivors)
        gc.set_threshold(*thresholds)


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
        starting = loop.create_task(_start_hub(server))
        background = [loop.create_task(_watchdog_loop(interval_s))] if (interval_s := watchdog_s()) is not None else []
        if has_lease(server.journal):
            notify_systemd("READY=1", "STATUS=standby: another hub serves")  # Which may take weeks.
            await done_or_set(starting, stopped)
        if stopped.is_set() and not starting.done():
            await cancel_and_wait([starting])
            return
        await starting
        notify_systemd("READY=1", f"STATUS=listening on {server.url}")
        background.append(loop.create_task(_collect_all_loop()))
        if reload is not None:
            background.append(loop.create_task(_reload_loop(reload, hangup)))
        for agent in agents:
            agent.use_hub(server)
        running = [loop.create_task(_serve_in_hub(agent, stopped)) for agent in agents]
        try:
            await done_or_set(server.lost, stopped)
            notify_systemd("STOPPING=1")
            if server.lost.done():
                await server.stop()
                server.lost.result()  # Raises.
            last = loop.time() + HUB_DRAIN_S
            if not has_lease(server.journal):  # Else the next hub accepts what this one would reject.
                server.shut_down()
            await asyncio.gather(*running)
            await server.stop(max(0.0, last - loop.time()))
        finally:
            for task in background:
                task.cancel()


def notify_systemd(*changes: str) -> None:
    """Tell systemd what has changed, such as READY=1, where it waits for that (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
            one.setblocking(False)
            one.sendto("\n".join(changes).encode(), f"\0{path[1:]}" if path.startswith("@") else path)
    except OSError as error:
        log_hub.warning("systemd was not notified: %s", one_line(error))


def watchdog_s() -> float | None:
    """Return how often systemd wants a sign of life, in seconds; None if it does not wait for any of this process."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(usec) / 1e6 if usec.isdecimal() and int(usec) > 0 and pid == str(os.getpid()) else None


async def _watchdog_loop(interval_s: float) -> None:
    """Send signs of life at half the interval. They come from the loop: systemd restarts a hub whose loop hangs."""
    while True:
        notify_systemd("WATCHDOG=1")
        await asyncio.sleep(interval_s / 2)


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


async def reload_access(server: HubServer, tls: ssl.SSLContext | None, args: argparse.Namespace) -> None:
    """Reload the certificate, and the token or access file. Log a bad one, and keep the former."""
    try:
        access = _access(args)  # First, so that a mistake in it leaves the certificate as it is.
        if tls is not None:
            load_certificate(tls, args.tls_cert, args.tls_key)
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
    option(group, "--output text|json|auto", "auto", "what the command prints; auto is JSON if it parses, else text")
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
    elif not args.command.strip():
        raise ValueError("--exec needs a command")
    elif not args.name or not args.capability:
        raise ValueError("--exec needs --name and --capability")
    else:
        check_program(args.command)
        options = {name: getattr(args, name) for name in ("description", "max_tasks", "output")}
        agents = [exec_agent(args.command, args.name, args.capability, **options)]
    run_loop(serve(*agents, drain_s=args.drain), args.loop)
    return 0


def load_agents(target: str) -> list[Agent]:
    """Return the agents of FILE[:NAME] or package.module[:NAME]; raise CommandFailed if it has none.

    NAME is an Agent or a subclass of it. Without NAME: all Agents at the top level, and those that the file runs, else
    all subclasses defined there.
    """
    path, _, name = target.rpartition(":")
    if not path or os.sep in name or "/" in name:  # No NAME; the colon may be that of a Windows drive.
        path, name = target, ""
    with errors_of_file(path), deferred_runs() as run:
        module = load_module(path)
        if name:
            found = [getattr(module, name, None)]
        else:
            defined = list(vars(module).values())
            found = [one for one in (*defined, *run) if isinstance(one, Agent)] or [
                one for one in defined if is_agent_class(one) and one.__module__ == module.__name__
            ]
        made = [one() if is_agent_class(one) else one for one in dict.fromkeys(found)]
    agents = [one for one in made if isinstance(one, Agent)]
    if not agents:
        raise CommandFailed(f"{target}: defines no Agent of {__name__}, nor a subclass of it")
    return agents


@contextlib.contextmanager
def errors_of_file(path: str) -> Iterator[None]:
    """Print the traceback of an error in the user's code, without the frames of this module and of importlib."""
    try:
        yield
    except CommandFailed:
        raise
    except Exception as error:
        import traceback

        raised: BaseException | None = error
        while raised is not None:
            raised.__traceback__ = frames_of_user(raised.__traceback__)
            raised = raised.__cause__ or raised.__context__
        traceback.print_exception(error)
        text = f"{path}: not loaded because of the error above"
        if isinstance(error, ModuleNotFoundError):
            text += f"; is {error.name} installed for {sys.executable}?"
        raise CommandFailed(text) from error


def frames_of_user(traceback: types.TracebackType | None) -> types.TracebackType | None:
    if traceback is None:
        return None
    path, rest = traceback.tb_frame.f_code.co_filename, frames_of_user(traceback.tb_next)
    if path in (__file__, importlib.__file__) or path.startswith("<frozen importlib"):
        return rest
    return types.TracebackType(rest, traceback.tb_frame, traceback.tb_lasti, traceback.tb_lineno)


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
            if not f"{path}.".startswith(f"{error.name}."):
                raise
            raise CommandFailed(f"{path}: {error}") from error
    if not pathlib.Path(path).is_file():
        raise CommandFailed(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
    sys.path.insert(0, str(pathlib.Path(path).resolve().parent))
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise CommandFailed(f"{path}: cannot be imported as a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check_program(command: str) -> None:
    """Raise ValueError if a shell command begins with the name of a program that does not exist."""
    found = PROGRAM.match(command)
    if found is None or os.name != "posix" or shutil.which(found[1]):
        return
    if os.system(f"command -v {found[1]} >/dev/null 2>&1") != 0:  # It is nothing of the shell's own either.
        raise ValueError(f"--exec: there is no program {found[1]!r}; install it, or give its path")


def exec_agent(
    command: str,
    name: str,
    capabilities: list[str],
    *,
    description: str = "",
    max_tasks: int = 4,
    output: str = "auto",
) -> Agent:
    """Return an agent that runs a shell command for each task.

    The task's input is the command's stdin, as JSON; its stdout is the output, read as `json`, `text`, or (`auto`) as
    JSON if it parses, else as text. A non-zero exit code fails the task with the last part of stderr. The command's
    environment has AGENTHUB_TASK_ID, AGENTHUB_CAPABILITY and AGENTHUB_ATTEMPT, but not AGENTHUB_TOKEN. When the command
    or the task ends, the command's process group is killed (on Windows: the process).
    """
    agent = Agent(name, description=description, max_tasks=max_tasks)

    async def run_command(task: Task) -> Any:
        environment = {
            **{name: value for name, value in os.environ.items() if name != "AGENTHUB_TOKEN"},
            "AGENTHUB_TASK_ID": task.task_id,
            "AGENTHUB_CAPABILITY": task.capability or "",
            "AGENTHUB_ATTEMPT": str(task.attempt),
        }
        # asyncio would kill the shell alone if the task ended while it starts, and some versions would wait forever.
        starting = asyncio.ensure_future(_start_command(command, environment))
        try:
            process, exited = await asyncio.shield(starting)
            text = await _communicate(process, exited, json.dumps(task.input).encode())
        finally:
            await _kill_process_group(*await starting)
        return output_in(text, output)

    for capability_name in capabilities:
        agent.capability(capability_name, description=description)(run_command)
    return agent


def output_in(text: str, output: str) -> Any:
    """Return what a command printed, read as `text`, `json` or `auto`. Raises TaskFailed if it is not that."""
    if output == "text":
        return text
    try:
        return check_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        if output == "json":
            raise TaskFailed(f"the command's output is not JSON: {error}") from None
        return text


async def _start_command(command: str, environment: dict[str, str]) -> tuple[asyncio.subprocess.Process, asyncio.Event]:
    """Start a shell command; the event is set when it has ended, even while a child of it holds its pipes.

    Until then, `Process.wait` does not return in some versions of Python (python/cpython#119710).
    """
    exited = asyncio.Event()

    class CommandProtocol(asyncio.subprocess.SubprocessStreamProtocol):
        def process_exited(self) -> None:
            super().process_exited()
            exited.set()

    loop, pipe = asyncio.get_running_loop(), asyncio.subprocess.PIPE
    transport, protocol = await loop.subprocess_shell(
        lambda: CommandProtocol(limit=65_536, loop=loop),
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        env=environment,
        start_new_session=os.name == "posix",
    )
    return asyncio.subprocess.Process(transport, protocol, loop), exited


async def _communicate(process: asyncio.subprocess.Process, exited: asyncio.Event, raw: bytes) -> str:
    """Send a process its input, and return its output; raise TaskFailed if it fails or its output is too large."""
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise AssertionError("_start_command opens a pipe for all three")
    output, errors = bytearray(), bytearray()
    with contextlib.suppress(TimeoutError):  # A child in a session of its own may hold the pipes.
        async with asyncio.timeout(None) as limit:
            await asyncio.gather(
                _write_input(process.stdin, raw),
                _read_all(process.stdout, output),
                _read_tail(process.stderr, errors),
                _end_children(process, exited, limit),
            )
    if process.returncode != 0:
        text = errors.decode(errors="replace").strip()
        raise TaskFailed(f"exit code {process.returncode}: {text}" if text else f"exit code {process.returncode}")
    return output.decode(errors="replace")


async def _end_children(process: asyncio.subprocess.Process, exited: asyncio.Event, limit: asyncio.Timeout) -> None:
    """When a process has ended, kill its children, and set the limit for reading what is in the pipes."""
    await exited.wait()
    _signal_group(process, KILL)
    limit.reschedule(asyncio.get_running_loop().time() + PIPES_LEFT_S)


async def _write_input(stdin: asyncio.StreamWriter, raw: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # A command may ignore its input.
        if not stdin.is_closing():  # Else uvloop raises RuntimeError.
            stdin.write(raw)
        await stdin.drain()
        stdin.close()
        await stdin.wait_closed()


async def _read_all(stdout: asyncio.StreamReader, output: bytearray) -> None:
    while chunk := await stdout.read(65_536):
        output += chunk
        if len(output) > CLIENT_MESSAGE_BYTES_MAX:
            raise TaskFailed(f"the output is larger than {CLIENT_MESSAGE_BYTES_MAX} bytes", code=Code.TOO_LARGE)


async def _read_tail(stderr: asyncio.StreamReader, tail: bytearray) -> None:
    while chunk := await stderr.read(65_536):
        tail[:] = (tail + chunk)[-STDERR_TAIL_BYTES:]


async def _kill_process_group(process: asyncio.subprocess.Process, exited: asyncio.Event) -> None:
    """Kill all processes of a command, after SIGTERM and TERMINATING_S if it still runs."""
    if process.returncode is None:
        _signal_group(process, signal.SIGTERM)
        waiting = asyncio.ensure_future(exited.wait())
        # asyncio.timeout would raise CancelledError in a task that was cancelled, before Python 3.11.4.
        await asyncio.wait({waiting}, timeout=TERMINATING_S)
        waiting.cancel()
    _signal_group(process, KILL)
    await exited.wait()
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
    option(parser, "--tasks all|open|ended", "all", "which tasks to show")
    option(parser, "--agent NAME", None, "show only agents of this name or agent_id, and their tasks")
    option(parser, "-n N", 0, "rows of each table; 0: as many as fit on the terminal, else all")
    _add_connection(parser)


def _run_status(args: argparse.Namespace) -> int:
    export_connection_options(args)
    if args.n < 0:
        raise ValueError("-n must be 0 or more")
    return asyncio.run(_status(args))


async def _status(args: argparse.Namespace) -> int:
    """Show the status; with --watch, wait for a hub that goes away."""
    was_there = False
    hubs = HubUrls(args.url)

    def show(text: str) -> None:
        nonlocal was_there
        was_there = True
        print(f"\x1b[H\x1b[J{text}" if args.watch and sys.stdout.isatty() else text, flush=True)

    while True:
        try:
            return await _show_status(args, hubs.connect, show)
        except Disconnected as error:
            if not (args.watch and was_there):
                raise
            print(f"agenthub: {escape_unprintable(error.message)}; waiting for the hub", file=sys.stderr)
        await asyncio.sleep(1)


async def _show_status(args: argparse.Namespace, connector: Connector, show: Callable[[str], None]) -> int:
    session = await Session.open(connector, _ignore)
    try:
        while True:
            show(await (_task_text(session, args) if args.task else _hub_text(session, args)))
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
    names = {one.agent_id: one.name for one in found.agents}
    found.agents = [one for one in found.agents if args.agent in (None, one.agent_id, one.name)]
    found.agents.sort(key=lambda one: -one.running)
    listed.tasks = [
        one
        for one in listed.tasks or []
        if args.agent in (None, one.agent_id, names.get(one.agent_id or ""))
        and args.tasks in ("all", "ended" if one.state in FINAL_STATES else "open")
    ]
    if args.json:
        return json_text({"hub": hub, "agents": to_dict(found)["agents"], "tasks": to_dict(listed)["tasks"]})
    counts = hub.get("tasks")  # The protocol leaves open which fields a hub's status has.
    counts = ", ".join(f"{number} {state}" for state, number in counts.items()) if isinstance(counts, dict) else "?"
    up_s = hub.get("uptime_s")
    up = f"{up_s:.0f}" if isinstance(up_s, int | float) else "?"
    head = [f"hub {args.url}, version {hub.get('version')}, up {up} s", f"tasks: {counts}"]
    agents = [AGENT_HEAD, *map(agent_row, found.agents)]
    tasks = [TASK_HEAD, *map(_task_row, listed.tasks)]
    agent_rows, task_rows = rows_shown(len(found.agents), len(listed.tasks), args.n)
    shown = table([[one] for one in head]), first_rows(agents, agent_rows), first_rows(tasks, task_rows)
    return "\n\n".join(shown)


def rows_shown(agents: int, tasks: int, rows_max: int) -> tuple[int, int]:
    """Return how many rows of both tables to show: `rows_max`, or if that is 0 as many as fit on the terminal."""
    if rows_max > 0:
        return rows_max, rows_max
    if not sys.stdout.isatty():
        return agents, tasks
    free = max(2, shutil.get_terminal_size().lines - STATUS_HEAD_LINES)
    for_agents = min(agents, max(free // 2, free - tasks))
    return for_agents, free - for_agents


def first_rows(rows: list[list[str]], rows_max: int) -> str:
    """Return a table with the first rows below its head, and the count of the others."""
    more = len(rows) - 1 - rows_max
    return table(rows[: rows_max + 1]) + (f"\n... and {more} more" if more > 0 else "")


def agent_row(agent: AgentInfo) -> list[str]:
    names = ", ".join(one.name for one in agent.capabilities)
    return truncate([agent.name, agent.agent_id, f"{agent.running}/{agent.max_tasks}", names, agent.description])


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
    widths = [max(map(display_width, column)) for column in zip(*cells, strict=True)]
    padded = (
        [cell + " " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True)] for row in cells
    )
    width_max = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    return "\n".join(cut_to_width("  ".join(row).rstrip(), width_max) for row in padded)


def display_width(text: str) -> int:
    """Return how many columns of a terminal a text takes: a wide character takes two, a combining one none."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0 if unicodedata.category(one) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(one) in "WF" else 1
        for one in text
    )


def cut_to_width(text: str, width_max: int) -> str:
    """Return the beginning of a text that fits into so many columns of a terminal."""
    while (over := display_width(text) - width_max) > 0:
        text = text[: -max(1, over // 2)]
    return text


def to_dict(message: HubMessage) -> dict[str, Any]:
    """Return a message as the JSON object that goes over the wire."""
    document: dict[str, Any] = json.loads(encode(message))
    return document


def to_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# top


class Snapshot(NamedTuple):
    """What `top` shows: the hub's status, its agents and its newest tasks, at a time of the loop's clock."""

    hub: dict[str, Any]
    agents: list[AgentInfo]
    tasks: list[TaskInfo]
    taken_at: float


TOP_KEYS = "q quit · a/t agents or tasks · s sort · r reverse · up/down/page scroll"
AGENT_COLUMNS: dict[str, Callable[[AgentInfo], Any]] = {  # By which agents are sorted, the first one at the start.
    "running": lambda one: -one.running,
    "name": lambda one: one.name,
    "free": lambda one: one.running - one.max_tasks,
}
TASK_COLUMNS: dict[str, Callable[[TaskInfo], Any]] = {
    "newest": lambda one: one.age_s,
    "state": lambda one: one.state,
    "capability": lambda one: one.capability or "",
    "agent": lambda one: one.agent_id or "",
    "time left": lambda one: one.ttl,
}


@dataclass(slots=True)
class TopView:
    """The state that the keys change: which table is large, its sort order, and its first visible row."""

    shows_tasks: bool = True
    orders: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})  # By `shows_tasks`.
    is_reversed: bool = False
    first: int = 0

    @property
    def columns(self) -> dict[str, Callable[[Any], Any]]:
        return TASK_COLUMNS if self.shows_tasks else AGENT_COLUMNS

    @property
    def order(self) -> str:
        return list(self.columns)[self.orders[self.shows_tasks]]

    def press(self, key: str, page: int) -> bool:
        """Apply a key; `page` is how many rows one is. Return whether to go on."""
        if key in ("a", "t"):
            self.shows_tasks, self.first = key == "t", 0
        elif key == "s":
            self.orders[self.shows_tasks] = (self.orders[self.shows_tasks] + 1) % len(self.columns)
        elif key == "r":
            self.is_reversed = not self.is_reversed
        steps = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -page, "page down": page, " ": page}
        self.first = 0 if key == "home" else max(0, self.first + steps.get(key, 0))
        return key not in ("q", "\x1b", "\x03")


def top_lines(view: TopView, now: Snapshot, before: Snapshot | None, height: int, width: int) -> list[str]:
    """Return the screen: numbers, the longest queues, and the rows of one table, cut to the terminal."""
    counts, ended = now.hub.get("tasks") or {}, sum((now.hub.get("ended") or {}).values())
    rate = 0.0
    if before is not None and now.taken_at > before.taken_at:
        rate = max(0.0, (ended - sum((before.hub.get("ended") or {}).values())) / (now.taken_at - before.taken_at))
    numbers = f"{rate:.1f} tasks/s · " + " · ".join(f"{number} {state}" for state, number in counts.items())
    queues = " · ".join(f"{name} {number}" for name, number in (now.hub.get("queues") or {}).items())
    agents = f"{now.hub.get('agents')} agents, {now.hub.get('agents_away')} away"
    rows, head = list[Any](now.tasks if view.shows_tasks else now.agents), AGENT_HEAD
    rows.sort(key=view.columns[view.order], reverse=view.is_reversed)
    if view.shows_tasks:
        head = TASK_HEAD
    room = max(1, height - 6)
    view.first = max(0, min(view.first, len(rows) - room))
    shown = [(_task_row if view.shows_tasks else agent_row)(one) for one in rows[view.first : view.first + room]]
    last = f"{view.first + 1}-{view.first + len(shown)} of {len(rows)}, by {view.order} · {TOP_KEYS}"
    version, up_s = now.hub.get("version"), now.hub.get("uptime_s") or 0
    lines = [f"AgentHub {version}, up {up_s:.0f} s · {agents}", numbers, f"waiting: {queues or 'none'}", ""]
    lines += [*table([head, *shown]).splitlines(), *[""] * (room - len(shown)), last]
    return [cut_to_width(escape_unprintable(line), width - 1) for line in lines[:height]]


def _add_top(parser: argparse.ArgumentParser) -> None:
    _add_connection(parser)


def _run_top(args: argparse.Namespace) -> int:
    """Show the screen where there is a terminal and `curses`; else the table of `status --watch`."""
    export_connection_options(args)
    # Windows has no curses.
    if importlib.util.find_spec("_curses") is None or not (sys.stdout.isatty() and sys.stdin.isatty()):
        shown = {"json": False, "watch": True, "task": None, "tasks": "all", "agent": None, "n": 0}
        return asyncio.run(_status(argparse.Namespace(**vars(args) | shown)))
    import curses
    import locale

    locale.setlocale(locale.LC_ALL, "")  # Otherwise curses writes no other characters than ASCII.
    return curses.wrapper(lambda screen: asyncio.run(_top(args, screen)))


async def _top(args: argparse.Namespace, screen: Any) -> int:
    """Take a snapshot each second, and draw at each key."""
    import curses

    with contextlib.suppress(curses.error):  # Not every terminal can hide its cursor.
        curses.curs_set(0)
    screen.nodelay(True)
    named = {curses.KEY_UP: "up", curses.KEY_DOWN: "down", curses.KEY_PPAGE: "page up", curses.KEY_NPAGE: "page down"}
    named[curses.KEY_HOME] = "home"
    view, taken = TopView(), collections.deque[Snapshot](maxlen=2)
    taking = asyncio.create_task(_take_snapshots(args, taken))
    try:
        while True:
            height, width = screen.getmaxyx()
            while (code := screen.getch()) != -1:
                if not view.press(named.get(code) or (chr(code) if 0 <= code < 256 else ""), max(1, height - 6)):
                    return 0
            lines = [f"connecting to {args.url}"] if not taken else top_lines(view, taken[-1], taken[0], height, width)
            if taken and (age_s := asyncio.get_running_loop().time() - taken[-1].taken_at) > TOP_STALE_S:
                lines[0] = f"the hub does not answer; this is what it said {age_s:.0f} s ago"
            screen.erase()
            for row, line in enumerate(lines):
                with contextlib.suppress(
                    curses.error
                ):  # The last cell of a window cannot be written, or it has shrunk.
                    screen.addstr(row, 0, line, curses.A_REVERSE if row in (4, len(lines) - 1) else curses.A_NORMAL)
            screen.refresh()
            await done_or_set(taking, _after(TOP_DRAW_S))
            if taking.done():
                taking.result()
    finally:
        await cancel_and_wait([taking])


def _after(seconds: float) -> asyncio.Event:
    """Return an event that is set after some seconds."""
    passed = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, passed.set)
    return passed


async def _take_snapshots(args: argparse.Namespace, taken: collections.deque[Snapshot]) -> None:
    """Ask the hub once a second; wait for one that has gone away."""
    hubs = HubUrls(args.url)
    while True:
        try:
            session = await Session.open(hubs.connect, _ignore)
            try:
                while True:
                    hub = (await session.request(Status(), StatusReply)).hub or {}
                    agents = (await session.request(Discover(limit=TOP_ROWS), Discovered)).agents
                    tasks = (await session.request(Status(tasks=True, limit=TOP_ROWS), StatusReply)).tasks or []
                    taken.append(Snapshot(hub, agents, tasks, asyncio.get_running_loop().time()))
                    await asyncio.sleep(1)
            finally:
                await session.close()
        except Disconnected:
            if not taken:
                raise
        await asyncio.sleep(1)


# call


def _add_call(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("capability", metavar="CAPABILITY", help="capability to delegate the task to")
    parser.add_argument(
        "input", nargs="?", default="null", metavar="JSON", help="input of the task; - reads it from stdin"
    )
    option(parser, "--agent NAME", None, "agent to delegate it to: its agent_id, or its name if only one has it")
    option(parser, "--ttl S", 300.0, "seconds until the task times out")
    option(parser, "--priority N", 0, "from -100 to 100; tasks of a higher priority go first")
    option(parser, "--max-retries N", 0, "how often the task is retried when its worker is lost")
    option(parser, "--wait", False, "queue the task although no online agent offers the capability")
    option(parser, "--no-wait", False, "print the task's id, for `agenthub result` and `cancel`, instead of its output")
    option(parser, "--stream", False, "print pieces of the output as they come, as on a terminal, also elsewhere")
    _add_connection(parser)


def _run_call(args: argparse.Namespace) -> int:
    export_connection_options(args)
    try:
        text = sys.stdin.read() if args.input == "-" else args.input
        given = json.loads(text.removeprefix("\ufeff"))  # Windows' shells begin a pipe with this mark.
    except (ValueError, RecursionError) as error:
        hint = "write a text as '\"text\"', and - to read the input from stdin"
        raise ValueError(f"the input is not JSON: {error}; {hint}") from None
    try:
        check_json(given)
    except ValidationError as error:
        raise ValueError(f"the input {error}") from None
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
    if args.no_wait:
        async with shared_caller(args.url) as agent:
            return (await _submit(agent, args, given)).task_id
    async with Agent("call", url=args.url, give_up_after_s=0) as agent:
        handle = await _submit(agent, args, given)
        try:
            printed = await _follow(handle, streams=args.stream or sys.stdout.isatty())
        except BaseException:
            handle.cancel_soon()
            raise
        try:
            output = await handle.result()
        except TaskFailed:
            if printed:
                print()
            if handle.outcome is None:
                raise
            output = _output_of(handle.outcome)
        rest = rest_of(output, printed)
        if not printed or rest is None:  # Pieces were lost, or are not what the output is made of.
            return "\n" * bool(printed) + json_text(output)
        for piece in rest:
            _print_piece(piece)
        return ""


async def _submit(agent: Agent, args: argparse.Namespace, given: Any) -> TaskHandle:
    options = {"ttl": args.ttl, "priority": args.priority, "max_retries": args.max_retries, "wait": args.wait}
    options["answers"] = not args.no_wait
    agent_id = await _agent_id_of(agent, args.agent) if args.agent is not None else None
    try:
        return await agent.submit(args.capability, given, agent_id=agent_id, **options)
    except Refused as refusal:
        if refusal.code not in (Code.NO_AGENT, Code.UNKNOWN_AGENT):
            raise
        raise CommandFailed(await _no_agent_text(agent, args, refusal)) from refusal


async def _no_agent_text(agent: Agent, args: argparse.Namespace, refusal: Refused) -> str:
    """Return the refusal in terms of the command line, with similar names of capabilities or, for --agent, agents."""
    import difflib

    agents = [one for one in await agent.discover(limit=1000) if one.agent_id != agent.agent_id]
    found = [one for one in agents if args.agent in (None, one.agent_id, one.name)]
    reason, wanted = refusal.message.partition(";")[0], args.capability
    names = {one.name for info in found for one in info.capabilities}
    if args.agent is not None and not found:
        reason, wanted = f'no online agent has the name or agent_id "{args.agent}"', args.agent
        names = {info.name for info in agents}
    close = difflib.get_close_matches(wanted, sorted(names))
    return f"{reason}; close matches: {', '.join(close)}" if close else f"{reason}; start one, or use --wait"


async def _agent_id_of(agent: Agent, name: str) -> str:
    """Return the agent_id of the online agent of this name; `name` itself if none has it, for it may be an agent_id."""
    names = {one.agent_id: one.name for one in await agent.discover(limit=1000) if one.agent_id != agent.agent_id}
    ids = [agent_id for agent_id, one in names.items() if one == name]
    if name in names or (not ids and re.fullmatch(ID_PATTERN, name)):
        return name
    if not ids:
        raise CommandFailed(f'no online agent has the name "{name}"; "agenthub status" lists all')
    if len(ids) > 1:
        raise CommandFailed(f"{len(ids)} agents are named {name}; give the agent_id of one: {', '.join(ids[:10])}")
    return ids[0]


def json_text(value: Any) -> str:
    """Return a value as indented JSON without control characters that a terminal would obey."""
    if (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8"):
        return json.dumps(value, indent=2)
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(one if one.isprintable() or one == "\n" else json.dumps(one)[1:-1] for one in text)


async def _follow(handle: TaskHandle, *, streams: bool) -> list[Any]:
    """Show the updates of a task until it has ended, and answer its questions; return the pieces that were printed."""
    printed: list[Any] = []
    seq = 0  # Of the last update, unless one was lost.
    async for update in handle:
        if isinstance(update, TaskQuestion):
            await _answer_on_terminal(handle, update)
            continue
        seq += update.seq == seq + 1
        if isinstance(update, Piece) and streams and update.seq == seq:
            printed.append(update.piece)
            _print_piece(update.piece)
        elif isinstance(update, Progress) and sys.stderr.isatty():
            percent = f"{update.progress:4.0%}" if update.progress is not None else "    "
            detail = escape_unprintable(to_text(update.detail)) if update.detail is not None else ""
            print(f"{percent} {detail}"[: shutil.get_terminal_size().columns], file=sys.stderr)
    return printed


def _print_piece(piece: Any) -> None:
    """Print a piece of an output: a text as it is, anything else as a line of JSON."""
    text = piece if isinstance(piece, str) else f"{json.dumps(piece)}\n"
    if sys.stdout.isatty():
        text = "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)
    print(text, end="", flush=True)


async def _answer_on_terminal(handle: TaskHandle, question: TaskQuestion) -> None:
    """Have the user answer a question. Raises CommandFailed where there is no terminal, or no answer."""
    text = escape_unprintable(question.text)
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        how = "run this on a terminal to answer, or delegate it from a program, with on_question"
        raise CommandFailed(f"task {handle.task_id} was cancelled, because it asks: {text}; {how}")
    schema = question.schema or {}
    options = schema.get("enum")
    hint = f" ({', '.join(map(to_text, options))})" if isinstance(options, list) else ""
    while True:
        print(f"{text}{escape_unprintable(hint)} ", end="", file=sys.stderr, flush=True)
        line = await DaemonThreads("answer").run(sys.stdin.readline)
        if not line:
            raise CommandFailed(f"task {handle.task_id} was cancelled, because its question was not answered: {text}")
        try:
            await handle.answer(_answer_in(line.strip(), schema))
            return
        except ValueError as error:
            print(escape_unprintable(str(error)), file=sys.stderr)
        except Refused as refusal:
            if refusal.code not in (Code.NO_QUESTION, Code.TASK_OVER):
                raise
            return  # It was too late.


def _answer_in(line: str, schema: dict[str, Any]) -> Any:
    """Return the answer that a user has typed: JSON, or a text where it is none or the schema wants one."""
    try:
        value = json.loads(line)
    except ValueError:
        return line
    try:
        return SchemaCheck(schema).check(value)
    except ValidationError:
        return line


# result and cancel
#
# Only its requester may read a task's output or cancel it. So the commands of one user share one agent for each hub,
# whose id and secret are kept in a private file. One agent, since a hub limits how many disconnected ones an address
# leaves; a lock, since a session has one connection.


def _add_result(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task_id", metavar="ID", help="id that `agenthub call --no-wait` printed")
    option(parser, "--wait S", 0.0, "seconds to wait for the task to end")
    _add_connection(parser)


def _run_result(args: argparse.Namespace) -> int:
    export_connection_options(args)
    print(json_text(asyncio.run(_result(args))))
    return 0


async def _result(args: argparse.Namespace) -> Any:
    """Return the output of a task; raise CommandFailed if it failed, is unknown or has not ended in time."""
    last = time.monotonic() + args.wait
    while True:
        async with shared_caller(args.url) as caller:
            with _task_refusals(args):
                report = await caller.status(args.task_id)
        if report.requester != caller.agent_id:
            raise CommandFailed(f"task {args.task_id}: only its requester {report.requester} may read its output")
        if report.state in FINAL_STATES:
            return _output_of(outcome_from(report))
        if time.monotonic() >= last:
            raise CommandFailed(f"task {args.task_id} is {report.state}; --wait S waits until it has ended")
        await asyncio.sleep(min(RESULT_POLL_S, max(0.0, last - time.monotonic())))


def _output_of(outcome: TaskOutcome) -> Any:
    """Return a task's output; raise CommandFailed, with the worker and the code, if it has none."""
    if outcome.success:
        return value_of(outcome.output)
    error = outcome.error or ErrorInfo(Code.FAILED)
    where = f" at {outcome.sender}" if outcome.sender else ""
    raise CommandFailed(f"task {outcome.task_id} failed{where} ({error.code}): {error.message}")


def _add_cancel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task_id", metavar="ID", help="id that `agenthub call --no-wait` printed")
    _add_connection(parser)


def _run_cancel(args: argparse.Namespace) -> int:
    export_connection_options(args)
    asyncio.run(_cancel(args))
    return 0


async def _cancel(args: argparse.Namespace) -> None:
    error = ErrorInfo(Code.CANCELLED, "cancelled from the command line")
    async with shared_caller(args.url) as caller:
        with _task_refusals(args):
            message = Result(task_id=args.task_id, success=False, error=error)
            await caller._started().request(message, StatusReply)


@contextlib.contextmanager
def _task_refusals(args: argparse.Namespace) -> Iterator[None]:
    """Name the task in a refusal, and for an unknown one the reasons why the hub may not know it."""
    try:
        yield
    except Refused as refusal:
        if refusal.code != Code.UNKNOWN_TASK:
            raise CommandFailed(f"task {args.task_id}: {refusal.message}") from refusal
        reasons = "its record expired, the hub restarted without --db, or --url is not the one that it was delegated to"
        raise CommandFailed(f"task {args.task_id}: unknown to the hub at {args.url}: {reasons}") from refusal


@contextlib.asynccontextmanager
async def shared_caller(url: str, name: str = "", give_up_after_s: float | None = 0) -> AsyncIterator[Agent]:
    """Resume this user's shared agent at a hub, one command at a time, and leave it disconnected for the next one.

    An agent with a `name` is not waited for: raises CommandFailed while another process has it.
    """
    agent = Agent(name or "call", url=url, give_up_after_s=give_up_after_s)
    urls = URL_SEPARATOR.join(sorted(HubUrls(url).urls))  # In any order, they are those of one hub.
    with _private_file(f"{hash_of(f'{urls} {bearer_token()}{name}')[:16]}.json") as file:
        while not try_lock(file):
            if name:
                raise CommandFailed(f"another process is the agent {name} of this hub: give --name")
            await asyncio.sleep(LOCK_POLL_S)
        with contextlib.suppress(ValueError):  # It is new, or its writer was killed.
            agent.agent_id, agent.resume = json.loads(file.read())
        await agent.start()
        try:
            file.seek(0)
            file.write(json.dumps([agent.agent_id, agent.resume]))
            file.truncate()
            file.flush()
            yield agent
        finally:
            await agent._started().close()


def _private_file(name: str) -> typing.TextIO:
    """Open a file of the state folder that only its owner may read; remove the oldest ones beyond CALLERS_MAX."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    folder = pathlib.Path(os.environ.get("AGENTHUB_STATE_DIR") or os.path.join(base, "agenthub"))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-CALLERS_MAX]:
            path.unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.fdopen(os.open(folder / name, flags, 0o600), "r+", encoding="utf-8")
    except OSError as error:
        text = f"{error.filename}: {error.strerror}; set AGENTHUB_STATE_DIR to a folder that you may write to"
        raise CommandFailed(text) from error
    if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
        file.close()
        raise CommandFailed(f"{folder / name}: others may read this secret; remove the file")
    return file


def try_lock(file: typing.TextIO) -> bool:
    """Lock a file until it is closed; return whether no other process had."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file.fileno(), 1 << 20, os.SEEK_SET)  # A locked byte of Windows cannot be read, so one behind.
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            os.lseek(file.fileno(), 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


# bridge


def _add_bridge(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("MCP")
    direction = group.add_mutually_exclusive_group()
    option(direction, "--http PORT", None, "speak Streamable HTTP on this port of 127.0.0.1 instead of stdio", type=int)
    option(direction, "--serve COMMAND", None, "start this MCP server, and offer its tools on the hub", dest="command")
    option(group, "--name NAME", None, "name of the bridge's agent on the hub")
    option(group, "--prefix TEXT", "", "with --serve: prefix of the capabilities' names")
    option(group, "--max-tasks N", 4, "with --serve: tasks that run at once")
    option(group, "--channel", False, "tell Claude Code when a task ends or asks (a preview: its channels)")
    _add_connection(parser)


def _run_bridge(args: argparse.Namespace) -> int:
    """Run agenthub_mcp, the module next to this one."""
    export_connection_options(args)  # So that a wrong URL or token ends the command, rather than reach the model.
    module = sibling_module("agenthub_mcp", "the bridge")
    code: int = module.run(args)
    return code


# a2a


def _add_a2a(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("A2A")
    option(
        group, "--join URL", None, "offer the skills of this A2A agent on the hub, instead of the hub's agents to A2A"
    )
    option(group, "--prefix TEXT", "", "with --join: prefix of the capabilities' names")
    option(group, "--max-running N", 16, "with --join: tasks that run at once")
    option(group, "--name NAME", None, "name of the agent on the hub; gateways of one hub and user need different ones")
    option(group, "--capability PATTERN", [], "serve only these capabilities, or agents as @AGENT_ID, such as review-*")
    option(group, "--ttl S", 300.0, "seconds that a task has, questions to its client included")
    option(group, "--max-retries N", 0, "how often a task is retried if its worker is lost")
    push = "URLs that push notifications may go to, such as https://example.org/hooks/*; none by default"
    option(group, "--allow-push PATTERN", [], push)
    group = parser.add_argument_group("listening")
    option(group, "--host HOST", "127.0.0.1", "address to listen on")
    option(group, "--port N", 8766, "port to listen on; 0 picks a free one")
    option(group, "--tls-cert PATH", None, "TLS certificate: serve https instead of http")
    option(group, "--tls-key PATH", None, "private key of the certificate, unless both are in one file")
    option(
        group, "--access PATH", None, "access file of the hub; without it, AGENTHUB_A2A_TOKEN is the token to require"
    )
    option(group, "--insecure", False, "run without a token on an address that others can reach")
    option(group, "--allow-host NAME", [], "name accepted in the Host header; on loopback in addition to its own names")
    group = parser.add_argument_group("limits")
    option(group, "--max-tasks N", 10_000, "tasks that are kept; the oldest ended ones are evicted")
    option(group, "--max-task-bytes N", 256 << 20, "bytes of the tasks that are kept")
    option(group, "--retention S", 3600.0, "seconds that an ended task is kept")
    option(group, "--max-bytes N", MESSAGE_BYTES_MAX, "bytes of a request")
    option(group, "--max-requests N", 200, "requests of one client at the same time; a stream is one")
    option(group, "--max-connections N", 2000, "connections of all clients")
    _add_connection(parser)


def _run_a2a(args: argparse.Namespace) -> int:
    """Run agenthub_a2a, the module next to this one."""
    export_connection_options(args)
    module = sibling_module("agenthub_a2a", "the A2A gateway")
    token = os.environ.get("AGENTHUB_A2A_TOKEN")
    args.headers = {"Authorization": f"Bearer {check_token('AGENTHUB_A2A_TOKEN', token)}"} if token else {}
    if args.log_level != "debug":  # They log what clients send.
        for name in ("a2a", "httpx", "uvicorn", "opentelemetry"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        logging.getLogger("a2a.server.agent_execution").setLevel(logging.ERROR)
    with _listening(args) if args.join is None else contextlib.nullcontext():
        run_loop(_until_stopped(module.serve(args) if args.join is None else module.join(args)))
    return 0


async def _until_stopped(running: typing.Coroutine[Any, Any, None]) -> None:
    """Run a coroutine until it ends, and cancel it at the first SIGINT or SIGTERM."""
    task = asyncio.create_task(running)
    with stop_signals() as stopped:
        await done_or_set(task, stopped)
        await cancel_and_wait([task])
    if not task.cancelled():
        task.result()


def _listening(args: argparse.Namespace) -> socket.socket:
    """Check the options of a gateway, add what they stand for (`tokens`, `served`, `hosts`, `tls`), and listen."""
    args.tls = listening_tls(args)
    for pattern in args.allow_push:
        if not re.fullmatch(r"https?://[\w.-]+(:\d+)?/.*", pattern):
            raise ValueError("--allow-push needs a scheme, a host without wildcards, and a path: https://example.org/*")
    token = os.environ.get("AGENTHUB_A2A_TOKEN")
    args.tokens = Access.of_token(token) if token else None
    if args.access is not None:
        args.tokens = Access.of_file(args.access)
    if args.tokens is None and not is_loopback(args.host) and not args.insecure:
        raise ValueError(
            f"{args.host} can be reached by others: set AGENTHUB_A2A_TOKEN, or give --access or --insecure"
        )
    own = args.tokens.grant(bearer_token() or "") if args.access is not None else None
    args.served = frozenset([own.namespace if own is not None else NAMESPACE_DEFAULT])
    is_any_name = not is_loopback(args.host) and not args.allow_host
    args.hosts = None if is_any_name else host_names(args.host, map(str.lower, args.allow_host))
    args.served_names = tuple(args.capability) or None
    args.name = args.name or "a2a-gateway"
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        listening = args.listening = socket.create_server((args.host, args.port), family=family)
    except OSError as error:
        raise CommandFailed(f"cannot listen on {args.host}:{args.port}: {error.strerror}") from error
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio does so only for some sockets.
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # The kernel closes connections whose other end reads nothing for so long.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
    args.base_url = f"http{'s' if args.tls else ''}://{url_host(args.host)}:{listening.getsockname()[1]}"
    return listening


# schema


def _run_schema(args: argparse.Namespace) -> int:
    print(json_text(json_schema()))
    return 0


# completion
#
# A script is made from the parser, so that the shell does not start Python at each Tab. A command is always the first
# word. Where the script has no words, the shell completes files.


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh", "fish"], help="shell that the script is for")


def _run_completion(args: argparse.Namespace) -> int:
    (parsers,) = (one.choices for one in argument_parser()._actions if isinstance(one, argparse._SubParsersAction))
    print("\n".join(fish_completion(parsers) if args.shell == "fish" else bash_completion(parsers)))
    return 0


def bash_completion(parsers: Mapping[str, argparse.ArgumentParser]) -> Iterator[str]:
    """Yield the lines of a script for bash, and for zsh in its mode for such scripts."""
    yield '[ -z "${ZSH_VERSION-}" ] || type compdef >/dev/null || { autoload -Uz compinit && compinit; }'
    yield '[ -z "${ZSH_VERSION-}" ] || { autoload -Uz bashcompinit && bashcompinit; }'
    yield "_agenthub() {\n  local found= command="
    yield '  [ "$COMP_CWORD" -eq 1 ] || command=${COMP_WORDS[1]}'
    yield '  case "$command ${COMP_WORDS[COMP_CWORD-1]} ${COMP_WORDS[COMP_CWORD]}" in'
    yield f'    " "*) found="{" ".join(parsers)} --help --version" ;;'
    for name, parser in parsers.items():
        words = " ".join(flag for action in parser._actions for flag in action.option_strings)
        for action in parser._actions:
            choices = " ".join(action.choices or ())
            if not action.option_strings:
                yield f'    "{name} "*" -"*) found="{words}" ;;'
                words = choices
            elif action.nargs != 0:
                for flag in action.option_strings:
                    yield f'    "{name} {flag} "*) found="{choices}" ;;'
        yield f'    "{name} "*) found="{words}" ;;'
    yield '  esac\n  COMPREPLY=($(compgen -W "$found" -- "${COMP_WORDS[COMP_CWORD]}"))\n}'
    yield "complete -o default -F _agenthub agenthub"


def fish_completion(parsers: Mapping[str, argparse.ArgumentParser]) -> Iterator[str]:
    import shlex

    yield "complete -c agenthub -f"
    for name, parser in parsers.items():
        purpose = shlex.quote(commands()[name].purpose)
        yield f"complete -c agenthub -n __fish_use_subcommand -a {name} -d {purpose}"
        for action in parser._actions:
            words = [f"complete -c agenthub -n '__fish_seen_subcommand_from {name}'"]
            words += [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in action.option_strings]
            is_file = str(action.metavar).startswith(("PATH", "FILE", "COMMAND"))
            words += ["-F"] if is_file else [f"-a '{' '.join(action.choices)}'"] if action.choices else []
            words += ["-r" if is_file else "-x"] if action.option_strings and action.nargs != 0 else []
            yield " ".join([*words, "-d", shlex.quote(parser._get_formatter()._expand_help(action))])


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


# journal


def _add_journal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["copy"], help="what to do; copy: all namespaces, while no hub uses them")
    parser.add_argument("source", metavar="FROM", help="the journal, as --db of a hub names it")
    parser.add_argument("target", metavar="TO", help="the other one, in which there are no tasks and agents yet")


def _run_journal(args: argparse.Namespace) -> int:
    source, target = journal_of(args.source), journal_of(args.target)
    if isinstance(source, Journal) and source.has_file and not os.path.exists(source.path):
        raise CommandFailed(f"{source.path}: no such file")
    with _opened(source):
        for namespace in source.namespaces():
            agents, tasks = _copy_namespace(source, target, namespace)
            print(f"copied {agents} agents and {tasks} tasks of namespace {namespace} to {target.path}")
    return 0


@contextlib.contextmanager
def _opened(journal: JournalLike) -> Iterator[JournalLike]:
    journal.open(wait=False)
    try:
        yield journal
    finally:
        journal.close()


def _copy_namespace(source: JournalLike, target: JournalLike, namespace: str) -> tuple[int, int]:
    """Copy the journal of one namespace; return the numbers of its agents and tasks. `source` is open."""
    with contextlib.ExitStack() as opened:
        if namespace != NAMESPACE_DEFAULT:
            source = opened.enter_context(_opened(source.of_namespace(namespace)))
            target = target.of_namespace(namespace)
        opened.enter_context(_opened(target))
        agents, tasks, _ = source.load(0.0)
        if any(target.load(0.0)[:2]):
            raise CommandFailed(f"{target.path}: holds agents or tasks of namespace {namespace} already; use another")
        for first in range(0, len(tasks), COPIED_AT_ONCE):
            rows = tasks[first : first + COPIED_AT_ONCE]
            target.write(Changes(inserted={row.sequence: row for row in rows}), 0.0)
        target.write(Changes(agents={row.agent_id: row for row in agents}), 0.0)
        found_agents, found_tasks, _ = target.load(0.0)
        counts, expected = (len(found_agents), len(found_tasks)), (len(agents), len(tasks))
        if counts != expected:
            raise CommandFailed(f"{target.path}: has {counts} agents and tasks after copying, not {expected}")
        return counts


# ============================================================================================
# 10 Page
#
# What browsers get at the address of a hub: an observer that shows agents and tasks. It is one
# document without a build, and loads nothing. The server sends the hashes of its style and its
# script, so that nothing else on it can run. Names and descriptions come from clients: they go into
# the document as text only, and into a link only behind a `#`.
#
# `refresh` asks for everything once a second and hands it to `show`, which writes into tables only
# the cells that changed. The fragment of the address names the open dialog: #task/ID or #agent/ID.
# ============================================================================================

HubServer.set_page(r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>AgentHub</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'><path fill='none'
 stroke='%232f6fed' stroke-width='2' d='M3 3l5 5 5-5M8 8v6'/><circle fill='%232f6fed' cx='8' cy='8' r='4'/></svg>">
<style>
:root { color-scheme: light dark; --back: light-dark(#f3f5f8, #0d1117); --card: light-dark(#fff, #161c25);
  --line: light-dark(#dfe4ea, #2a3341); --text: light-dark(#18202b, #e6ebf2); --dim: light-dark(#566272, #9ba7b7);
  --blue: light-dark(#1c4fc4, #8ab4ff); --ink: var(--dim); }
main, dialog { --ink: var(--dim); } .in_progress, .busy { --ink: var(--blue); }
.pending, .full { --ink: light-dark(#7a4b00, #f2c469); } .live, .completed { --ink: light-dark(#0f6130, #74d797); }
.gone, .failed, .timeout { --ink: light-dark(#a5161d, #ff9a96); } ::-moz-progress-bar { background: var(--blue); }
* { box-sizing: border-box; --tint: color-mix(in srgb, var(--ink) 14%, transparent); }
[hidden], #facts thead { display: none !important; } #tiles small { display: block; min-height: 1.45em; }
body { margin: 0 auto; padding: 1rem 1.5rem 3rem; max-width: 90rem; background: var(--back); color: var(--text);
  font: 14px/1.45 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; } h1, h2, h3 { margin: 0 auto .4rem 0; font-size: 1.05rem; } h1 { margin: 0; }
small, thead, #about, #facts th, tbody:empty { margin: 0; color: var(--dim); font-weight: 400; font-size: 12.5px; }
a { color: var(--blue); text-decoration: none; } a:hover { text-decoration: underline; } th a { font-weight: 600; }
input, select, button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--dim);
  border-radius: 6px; padding: .3rem .6rem; min-width: 0; }
.bar { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem .9rem; margin-bottom: .6rem; }
.card, dialog { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1.1rem; }
.grid { display: grid; gap: .8rem; margin-bottom: .8rem; align-items: start; }
#tiles { display: flex; flex-wrap: wrap; align-items: stretch; } #tiles strong, h1 { font-size: 1.6rem; }
#tiles > * { position: relative; flex: 1 1 9.5rem; overflow: hidden; padding-bottom: 2.6rem; white-space: nowrap; }
svg { position: absolute; inset: auto -1px -1px; width: calc(100% + 2px); height: 2.4rem; stroke: var(--ink); }
polygon { fill: var(--tint); } .scroll { overflow: auto; max-height: 27rem; } #facts th { width: 9rem; }
table { width: 100%; border-collapse: collapse; } thead th { position: sticky; top: 0; background: var(--card); }
th, td { padding: .35rem .8rem .35rem 0; text-align: left; vertical-align: top; font-weight: 400; min-width: 3.5rem;
  border-bottom: 1px solid var(--line); white-space: pre-line; } tbody tr:last-child > * { border-bottom: 0; }
tbody:empty::after { content: attr(data-empty); line-height: 3; } h3 { margin-top: 1.2rem; }
tr > * > * { display: block; width: fit-content; unicode-bidi: isolate; } tr a { min-width: 6rem; }
.number { text-align: right; } .number > * { margin-left: auto; } .number, .short, .badge { white-space: nowrap; }
.badge { padding: 0 .5rem; border-radius: 99px; font-weight: 600; color: var(--ink); background: var(--tint); }
td > progress { appearance: none; border: 0; width: 6rem; max-width: 100%; height: 5px; margin-top: .25rem; }
progress, ::-webkit-progress-bar { background: var(--line); } ::-webkit-progress-value { background: var(--blue); }
dialog { color: inherit; width: min(60rem, 100% - 1rem); max-height: calc(100% - 1rem); overflow: auto; }
dialog::backdrop { background: #0009; } body.gone :is(main, dialog) { opacity: .5; }
@media (min-width: 60rem) { #columns { grid-template-columns: 5fr 2fr; } } .grid > * { min-width: 0; }
@media (max-width: 40rem) { body { padding: .7rem .7rem 2rem; } .wide { display: none; } .grid { gap: .6rem; }
  #filter { flex: 1 1 8rem; } #h-tasks { flex: 1 1 100%; } #facts th { width: 6rem; } tr a { min-width: 4.5rem; } }
</style>
<header class="bar"><h1>AgentHub</h1><b id="link" class="badge" role="status">needs JavaScript</b><p id="about"></p>
</header><form id="login" class="card bar" hidden><label for="token">A token with the right to observe:</label>
<input id="token" type="password" autocomplete="off" required><button>Connect</button><b id="refusal" role="alert"></b>
</form><main id="main" hidden><section id="tiles" class="grid" aria-label="Numbers"></section>
<div id="columns" class="grid"><section class="card scroll" tabindex="0" aria-label="Agents">
<h2 id="h-agents">Agents <small></small></h2><table id="agents"></table></section>
<section class="card scroll" tabindex="0" aria-label="Queues"><h2>Queues</h2><table id="queues"></table></section></div>
<section class="card"><div class="bar"><h2 id="h-tasks">Tasks <small></small></h2>
<input id="filter" type="search" placeholder="filter" aria-label="Filter tasks by text" maxlength="128">
<select id="state" aria-label="Filter tasks by state"><option value="">all states<option value="in_progress">in progress
<option>pending<option>completed<option>failed<option>timeout</select></div><table id="tasks"></table></section></main>
<dialog id="detail" aria-labelledby="subject"><div class="bar"><h2 id="subject"></h2><button id="close">Close</button>
</div><table id="facts"></table><div id="task"><h3>Life</h3><table id="life"></table>
<h3>Parent task and subtasks</h3><table id="family"></table></div><div id="agent"><h3>Capabilities</h3>
<table id="capabilities"></table><h3>Tasks of it and for it</h3><table id="involved"></table></div></dialog>
<template id="tile"><div class="card"><small></small><strong></strong><small></small><svg viewBox="0 0 59 20"
preserveAspectRatio="none" aria-hidden="true"><polygon vector-effect="non-scaling-stroke"/></svg></div></template>
<script>
'use strict';  // An observer: it sends `status` and `discover`, nothing else. What others wrote becomes text only.
const REFRESH_MS = 1000, HIDDEN_MS = 15000, REPLY_MS = 10000, RETRY_MS = 5000, LISTED = 200, QUEUES = 30, SAMPLES = 60;
const TILES = [['tasks ended per second', 'rate', 'completed'], ['running', 'runs', 'in_progress'],
  ['waiting', 'waits', 'pending'], ['failed', 'bad', 'failed'], ['agents online', 'online', 'busy']];
const TABLES = {  // What an empty one says, then its columns: the title, and the classes of its cells.
  agents: ['No agent is online.', 'agent', 'running', 'state', 'capabilities|wide', 'online for|wide number'],
  queues: ['No capability is offered or waited for.', 'capability', 'waiting', 'agents|number'],
  tasks: ['None.', 'task', 'state', 'agent', 'requester|wide', 'attempt|wide number', 'age|number', 'left|wide number'],
  life: ['', 'after|short', 'event|short', 'agent', 'attempt|wide number', 'ago|number'], facts: ['', 'name', 'value'],
  family: ['', 'task', 'state', 'agent', 'age|number'], capabilities: ['None.', 'capability', 'description'],
  involved: ['None of the newest.', 'task', 'state', 'agent', 'age|number']};
const $ = id => document.getElementById(id), make = (tag, more) => Object.assign(document.createElement(tag), more);
const put = (node, text) => { if (node.textContent !== String(text)) node.textContent = text; };
const sum = numbers => numbers.reduce((total, one) => total + one, 0);
const count = value => value.toLocaleString('en', {maximumFractionDigits: value < 10 ? 1 : 0});
const UNITS = [[172800, 86400, ' d'], [5970, 3600, ' h'], [99.5, 60, ' min'], [-1, 1, ' s']];
const time = s => { const [, unit, name] = UNITS.find(one => s >= one[0]); return count(s / unit) + name; };
// The connection: requests and their replies, matched by id.
let socket, serial = 0, wake = () => {}, isDue = false, token = sessionStorage.getItem('agenthub-token');
const waiting = new Map(), failure = (code, text) => Object.assign(new Error(text), {code});
const open = () => new Promise((resolve, reject) => {
  socket = new WebSocket(new URL('.', location.href.replace(/[?#].*/, '')).href.replace(/^http/, 'ws'));
  socket.onopen = resolve;
  socket.onclose = () => {
    for (const one of [{reject}, ...waiting.values()]) one.reject(failure('gone', 'the hub is gone'));
    wake();
  };
  socket.onmessage = event => {
    const reply = JSON.parse(event.data), one = waiting.get(reply.reply_to);
    if (reply.type === 'error') one?.reject(failure(reply.code, reply.message)); else one?.resolve(reply);
    waiting.delete(reply.reply_to);
    clearTimeout(one?.timer);
  };
});
const ask = message => new Promise((resolve, reject) => {
  const timer = setTimeout(reject, REPLY_MS, failure('gone', 'the hub does not answer'));
  waiting.set(String(++serial), {resolve, reject, timer});
  if (socket.readyState > WebSocket.OPEN) socket.onclose();
  else socket.send(JSON.stringify({...message, id: String(serial)}));
});
const pause = ms => new Promise(resolve => { setTimeout(wake = resolve, isDue ? 0 : ms); isDue = false; });
const live = (isLive, text) => { put($('link'), text); document.body.className = isLive ? 'live' : 'gone'; };
async function run() {
  for (let failures = 0; ;) {
    try {
      await open();
      await ask({type: 'status', ...token && {token}});
      for (; ; failures = 0, await pause(document.hidden ? HIDDEN_MS : REFRESH_MS)) await refresh();
    } catch (error) {
      const isRefused = error.code === 'unauthorized';
      if (!error.code) console.error(error);
      socket.onclose = null; socket.close(); waiting.clear();
      live(false, isRefused ? 'token required' : `${error.message}; trying again`);
      await (isRefused ? login(error.message) : pause(Math.min(RETRY_MS, 250 * 2 ** failures++)));
    }
  }
}
const login = refusal => new Promise(resolve => {
  $('main').hidden = !($('login').hidden = false);
  put($('refusal'), token ? refusal : '');
  $('token').focus();
  $('login').onsubmit = event => {
    event.preventDefault();
    sessionStorage.setItem('agenthub-token', token = $('token').value.trim());
    resolve($('login').reset());
  };
});
// Tables: only what has changed is written, so that focus, selection and scrolling stay as they are.
function fill(cell, value) {  // With a text, or an object: text, and perhaps its link, its class, a note, a bar.
  const {text = value ?? '', href, kind, note, bar} = Object(value), shape = [text, href, kind, note, bar >= 0].join();
  if (cell.shape !== shape) {
    const main = make(href ? 'a' : 'span', {textContent: text, className: kind ?? '', ...href && {href}});
    const more = [note && make('small', {textContent: note}), bar >= 0 && make('progress', {ariaLabel: text})];
    cell.replaceChildren(main, ...more.filter(Boolean));
    cell.shape = shape;
  }
  if (bar >= 0) cell.lastChild.value = bar;
}
function show(id, rows) {  // Each row is a key and its cells. A row that is there already is kept.
  const table = $(id), [[empty], ...columns] = TABLES[id].map(one => one.split('|'));
  if (!table.shown) {
    const heads = columns.map(([textContent, className = '']) => make('th', {textContent, className, scope: 'col'}));
    table.createTHead().insertRow().append(...heads);
    Object.assign(table, {shown: new Map(), ariaLabel: id}).createTBody().dataset.empty = empty;
  }
  const [body] = table.tBodies, keys = new Set(rows.map(([key]) => key)), focused = document.activeElement;
  const isHeld = !getSelection().isCollapsed && body.contains(getSelection().anchorNode);
  for (const [key, row] of table.shown) if (!isHeld && !keys.has(key)) table.shown.delete(key, row.remove());
  let next = body.firstElementChild;
  for (const [key, ...cells] of rows) {
    const row = table.shown.get(key) ?? make('tr');
    if (isHeld && !row.isConnected) continue;
    if (!row.cells.length) row.append(...columns.map(([, className = ''], at) => make(at ? 'td' : 'th', {className})));
    cells.forEach((value, at) => fill(row.cells[at], value));
    table.shown.set(key, row);
    if (row === next) next = next.nextElementSibling; else if (!isHeld) body.insertBefore(row, next);
  }
  if (focused !== document.activeElement && body.contains(focused)) focused.focus({preventScroll: true});
}
// What is shown. A link leads to a fragment of this page, whatever the id.
const link = (kind, id, more) => ({text: id ?? '', href: id && /^[\w.:-]+$/.test(id) && `#${kind}/${id}`, ...more});
const agent = one => link('agent', one.agent_id), attempt = one => `${one.attempt} of ${one.max_retries + 1}`;
const task = (one, pre = '') => link('task', one.task_id, {text: pre + (one.capability ?? 'task'), note: one.task_id});
const state = one => ({...badge(one.state), note: one.code !== one.state && one.code,
  bar: one.state === 'in_progress' ? one.progress : undefined});
const brief = (one, indent) => [one.task_id, task(one, indent), state(one), agent(one), time(one.age_s)];
const load = one => ({text: `${one.running} of ${one.max_tasks}`, bar: one.running / one.max_tasks});
const badge = text => ({text: text.replace('_', ' '), kind: `badge ${text}`});
const busy = one => badge(one.running >= one.max_tasks ? 'full' : one.running ? 'busy' : 'idle');
const samples = [];  // One for each refresh, of the last minute.
function showTiles(hub, slots) {
  const bad = hub.ended.failed + hub.ended.timeout, ended = hub.ended.completed + bad, at = hub.uptime_s;
  if (samples.at(-1)?.at > at) samples.length = 0;  // The hub has restarted.
  const last = samples.at(-1) ?? {at: at - 1, ended, failed: bad}, rate = (ended - last.ended) / (at - last.at || 1);
  const {pending: waits, in_progress: runs} = hub.tasks, [queue] = Object.entries(hub.queues);
  const now = {at, ended, rate, failed: bad, bad: bad - last.failed, runs, waits, online: hub.agents};
  if (samples.push(now) > SAMPLES) samples.shift();
  const first = SAMPLES - samples.length, recently = `${sum(samples.map(one => one.bad))} in the last minute`;
  const notes = [`${count(ended)} in all`, slots, queue?.join(': ') ?? '', recently, `${hub.agents_away} disconnected`];
  TILES.forEach(([title, name, kind], at) => {
    const tile = $('tiles').children[at] ?? $('tiles').appendChild($('tile').content.firstChild.cloneNode(true));
    const [label, number, note, svg] = tile.children, most = Math.max(1, ...samples.map(one => one[name]));
    put(label, title, put(number, count(name === 'bad' ? bad : now[name])), put(note, notes[at]));
    const line = samples.map((one, x) => `${first + x},${19 - 17 * one[name] / most}`).join(' ');
    svg.firstChild.setAttribute('points', `${first},21 ${line} ${SAMPLES - 1},21`);
    svg.setAttribute('class', kind);
  });
}
async function refresh() {
  const only = $('state').value, list = {type: 'status', tasks: true, limit: LISTED};
  const requests = [{type: 'status'}, {type: 'discover', limit: LISTED}, list, ...only ? [{...list, state: only}] : []];
  const [{hub}, {agents, total}, recent, {tasks, total: all} = recent] = await Promise.all(requests.map(ask));
  live(true, hub.shutting_down ? 'shutting down' : 'live');
  put($('about'), `${location.host} · version ${hub.version} · up ${time(hub.uptime_s)} · journal ${hub.journal}`);
  $('login').hidden = !($('main').hidden = false);
  showTiles(hub, agents.length < total ? '' : `of at most ${count(sum(agents.map(one => one.max_tasks)))}`);
  put($('h-agents').lastChild, agents.length < total ? `${agents.length} of ${count(total)}` : '');
  agents.sort((a, b) => b.running - a.running || (a.name < b.name ? -1 : 1));
  show('agents', agents.map(one => [one.agent_id, {...agent(one), text: one.name, note: one.agent_id}, load(one),
    busy(one), one.capabilities.map(each => each.name).join(', '), one.online_s && time(one.online_s)]));
  const offers = agents.flatMap(one => one.capabilities.map(each => each.name));
  const waits = new Map([...offers.map(name => [name, 0]), ...Object.entries(hub.queues)]);
  const longest = [...waits].sort((a, b) => b[1] - a[1]).slice(0, QUEUES);
  show('queues', longest.map(([name, number]) => [name, name, {text: number, bar: number ? number / longest[0][1] : -1},
    sum(offers.map(one => one === name)) || {text: 'none', kind: 'badge gone'}]));
  const word = $('filter').value.toLowerCase(), among = word && ` of the newest ${tasks.length}`;
  const texts = one => [one.capability, one.task_id, one.agent_id, one.requester, one.state, one.code].join(' ');
  const found = tasks.filter(one => texts(one).toLowerCase().includes(word));
  put($('h-tasks').lastChild, `${found.length}${among}${tasks.length < all ? ` of ${count(all)}` : ''}`);
  show('tasks', found.map(one => [one.task_id, task(one), state(one), agent(one), link('agent', one.requester),
    attempt(one), time(one.age_s), one.ttl ? time(one.ttl) : '']));
  const {hash} = location, [, kind, id] = /^#(task|agent)\/([\w.:-]{1,128})$/.exec(hash) ?? [], dialog = $('detail');
  if (kind) await (kind === 'task' ? showTask : showAgent)(id, recent.tasks, agents); else dialog.close();
  if (kind && !dialog.open && hash === location.hash) dialog.showModal();  // It may have been closed meanwhile.
}
function showFacts(kind, title, facts) {
  put($('subject'), title);
  for (const each of ['task', 'agent']) $(each).hidden = each !== kind;
  show('facts', Object.entries(facts).map(([name, value]) => [name, name, value]));
}
function showAgent(id, tasks, agents) {
  const one = agents.find(each => each.agent_id === id);
  showFacts('agent', `Agent ${one?.name ?? id}`, one ? {id, state: busy(one), running: load(one),
    description: one.description, metadata: JSON.stringify(one.metadata)} : {id, state: 'not online'});
  show('capabilities', one?.capabilities.map(each => [each.name, each.name, each.description]) ?? []);
  show('involved', tasks.filter(each => each.agent_id === id || each.requester === id).map(each => brief(each)));
}
const report = id => ask({type: 'status', task_id: id}).catch(error => { if (error.code === 'gone') throw error; });
async function showTask(id, tasks) {
  const one = await report(id), known = new Map(tasks.map(each => [each.task_id, each])), family = [];
  if (!one) return showFacts('', `Task ${id}`, {state: 'the hub has no record of it, or none any more'});
  let root = one;
  for (let up = one; up; up = root.parent_id && (known.get(root.parent_id) ?? await report(root.parent_id)))
    known.set(up.task_id, root = up);
  const add = (each, indent) => {
    family.push(brief(each, indent));
    for (const sub of known.values()) if (sub.parent_id === each.task_id) add(sub, `${indent}\u2003`);
  };
  add(root, '');
  showFacts('task', `Task ${one.capability ?? id}`, {id, state: state(one), requester: link('agent', one.requester),
    agent: agent(one), attempt: attempt(one), priority: one.priority, age: time(one.age_s)});
  show('life', one.history.map((step, at) => [at, `+${time(one.age_s - step.at_s)}`, step.event, agent(step),
    step.attempt || '', time(step.at_s)]));
  show('family', family);
}
$('close').onclick = () => $('detail').close();
$('detail').onclose = () => { if (location.hash) history.pushState(null, '', location.pathname + location.search); };
onhashchange = document.onvisibilitychange = $('state').onchange = $('filter').oninput = () => wake(isDue = true);
run();
</script>
""")
