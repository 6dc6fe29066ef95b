import argparse
import asyncio
import contextlib
import enum
import functools
import logging
import os
import sqlite3
import ssl
import typing
from _typeshed import Incomplete
from asyncio import Protocol as AsyncioProtocol
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, NamedTuple, Protocol, TypeVar

Id = str
RequestId = str
ResumeSecret = str
Name = str
Keyword = str
Description = str
Text = str
Json = Any
Schema = dict[str, Any]
Metadata = dict[str, Any]
Seconds = float
Fraction = float
Priority = int
Retries = int
Attempt = int
TaskLimit = int

__all__ = [
    "Code",
    "AgentHubError",
    "InvalidMessage",
    "Refused",
    "Disconnected",
    "TaskFailed",
    "TaskTimeout",
    "PackageMissing",
    "JournalError",
    "IllegalTransition",
    "CloseCode",
    "Capability",
    "ErrorInfo",
    "AgentInfo",
    "TaskInfo",
    "TaskOutcome",
    "StatusReply",
    "TaskState",
    "TaskEvent",
    "TRANSITIONS",
    "FINAL_STATES",
    "AgentState",
    "AgentEvent",
    "AGENT_TRANSITIONS",
    "HubSettings",
    "Hub",
    "Journal",
    "Grant",
    "Access",
    "LocalHub",
    "HubServer",
    "capability",
    "on_broadcast",
    "Task",
    "Progress",
    "TaskHandle",
    "Agent",
    "serve",
    "main",
]

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
    def __init__(self, message: str, *, code: str = ...) -> None: ...

class InvalidMessage(AgentHubError):
    """A peer sent something that is not a message of the protocol. `reply_to` is its id, if that was readable."""

    reply_to: str | None
    def __init__(self, message: str, *, code: str = ..., reply_to: str | None = None) -> None: ...

class Refused(AgentHubError):
    """The hub rejected a request, which had no effect. `task_id` is the task that it was about, if any."""

    task_id: str | None
    def __init__(self, message: str, *, code: str, task_id: str | None = None) -> None: ...

class Disconnected(AgentHubError):
    """The connection to the hub is lost. `close_code` is the close code of the WebSocket, if it had one."""

    close_code: int | None
    def __init__(self, message: str, *, close_code: int | None = None) -> None: ...

class TaskFailed(AgentHubError):
    """A task ended without an output. A handler raises it to fail its task with a code of its choice."""

    task_id: str | None
    def __init__(self, message: str, *, code: str = ..., task_id: str | None = None) -> None: ...

class TaskTimeout(TaskFailed):
    """A task did not end within its time to live."""
    def __init__(self, message: str, *, task_id: str | None = None) -> None: ...

class PackageMissing(AgentHubError, ImportError):
    """A feature needs a package that is not installed. The message names the command that installs it."""
    def __init__(self, package: str, purpose: str) -> None: ...

class JournalError(AgentHubError):
    """A journal cannot be used: it is not one, damaged, of another version or in use. The file was not changed."""

class IllegalTransition(AgentHubError):
    """The table of states has no such transition: a bug in the hub. Nothing has changed."""

class CloseCode(enum.IntEnum):
    """The WebSocket close codes that the hub uses."""

    DONE = 1000
    GOING_AWAY = 1001
    NOT_ALLOWED = 1008
    TOO_BIG = 1009
    REPLACED = 4000
    SILENT = 4001
    NOT_READING = 4002

Made = TypeVar("Made", bound=type)
Kind = TypeVar("Kind")

class ValidationError(ValueError):
    """A value does not fit. `path` leads to the wrong part; `kinds` are its possible types, if its type is wrong."""

    document: dict[str, Any] | None
    def __init__(self, reason: str, *path: str, kinds: tuple[Any, ...] = (), code: str = ...) -> None: ...
    @classmethod
    def of_type(cls, *kinds: Any) -> ValidationError:
        """Return the error of a value that has none of these types."""
    def within(self, part: str) -> ValidationError:
        """Return the same error, as one of the whole that holds `part`."""

@dataclass(frozen=True, slots=True)
class Limit:
    """The limits of a string (one of PATTERNS, and a length), a list (length) or a number (value), for `Annotated`."""

    pattern: str | None = ...
    min_length: int | None = ...
    max_length: int | None = ...
    gt: float | None = ...
    ge: float | None = ...
    le: float | None = ...
    def problem_of_size(self, value: str | list[Any]) -> str | None:
        """Return how a string or a list exceeds this limit; None if it does not."""
    def problem_of_number(self, value: float) -> str | None:
        """Return how a number exceeds this limit; None if it does not."""
    def validator(self, validate: Validator) -> Validator:
        """Return `validate`, limited."""
    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any: ...

@dataclass(frozen=True, slots=True)
class JsonLimit:
    """Any JSON. What the hub itself reads has at most `bytes_max` bytes, and no NUL.

    Without `bytes_max` it is a payload, whose numbers and depth `decoder` checks in the bytes of the message.
    """

    bytes_max: int | None = ...
    def check(self, value: Any) -> Any:
        """Return `value`; raise ValidationError if it exceeds this limit, or is not JSON that every language reads."""
    def validator(self, validate: Validator) -> Validator:
        """Return `validate`, limited."""
    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any: ...

@dataclass(slots=True)
class Capability:
    """Something that an agent offers to do. The schemas are JSON Schemas of a task's input and output."""

    name: Name
    description: Description = ...
    input_schema: Schema | None = ...
    output_schema: Schema | None = ...

@dataclass(slots=True)
class ErrorInfo:
    """Why a task failed."""

    code: Name
    message: Text = ...

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

@dataclass(slots=True, kw_only=True)
class TaskInfo:
    """What every agent may see of a task: no input, output or error text.

    `agent_id` is its assignee, or the agent that it waits for; `ttl` the seconds left, `age_s` the seconds since
    the hub accepted it; `code` the reason of its failure.
    """

    task_id: str
    state: str
    requester: str
    agent_id: str | None = ...
    capability: str | None = ...
    attempt: int
    priority: int
    max_retries: int
    parent_id: str | None = ...
    ttl: float
    age_s: float
    progress: float | None = ...
    code: str | None = ...

@dataclass(slots=True, kw_only=True)
class Register:
    """Join, resume a session (`agent_id` with its secret, `resume`), or change what this connection registered."""

    type: Literal["register"] = ...
    id: RequestId | None = ...
    name: Name
    description: Description = ...
    capabilities: Annotated[list[Name | Capability], None] = field(default_factory=list)
    max_tasks: TaskLimit = ...
    metadata: Metadata = field(default_factory=dict)
    agent_id: Id | None = ...
    resume: ResumeSecret | None = ...

@dataclass(slots=True, kw_only=True)
class Deregister:
    """Leave: at once, or with `drain` after the last task."""

    type: Literal["deregister"] = ...
    id: RequestId | None = ...
    drain: bool = ...

@dataclass(slots=True, kw_only=True)
class Discover:
    """Find online agents by a keyword in their capabilities; an empty one finds all."""

    type: Literal["discover"] = ...
    id: RequestId | None = ...
    capability: Keyword = ...
    limit: Annotated[int, None] = ...

@dataclass(slots=True, kw_only=True)
class Delegate:
    """Hand over a task to `agent_id`, or to the least loaded agent that offers `capability`. `ttl` is in seconds."""

    type: Literal["delegate"] = ...
    id: RequestId | None = ...
    task_id: Id
    agent_id: Id | None = ...
    capability: Name | None = ...
    input: Json = ...
    ttl: Seconds = ...
    priority: Priority = ...
    max_retries: Retries = ...
    parent_id: Id | None = ...
    wait: bool = ...

@dataclass(slots=True, kw_only=True)
class Result:
    """End a task: the worker's outcome, or a requester's cancellation (`success` is false)."""

    type: Literal["result"] = ...
    id: RequestId | None = ...
    task_id: Id
    success: bool
    output: Json = ...
    error: Text | ErrorInfo | None = ...
    attempt: Attempt | None = ...

@dataclass(slots=True, kw_only=True)
class Status:
    """Ask for the hub's status, one task or the list of `tasks`; or report the `progress` of a task."""

    type: Literal["status"] = ...
    id: RequestId | None = ...
    task_id: Id | None = ...
    tasks: bool = ...
    progress: Fraction | None = ...
    detail: Json = ...

@dataclass(slots=True, kw_only=True)
class Broadcast:
    """Send any JSON to all other agents, or to those that offer `capability`."""

    type: Literal["broadcast"] = ...
    id: RequestId | None = ...
    message: Json
    capability: Name | None = ...

@dataclass(slots=True, kw_only=True)
class Heartbeat:
    """Show that this agent is alive."""

    type: Literal["heartbeat"] = ...
    id: RequestId | None = ...

@dataclass(slots=True, kw_only=True)
class Registered:
    """The session: `resume` is its secret, `heartbeat_s` the interval, `tasks` those that the hub holds to be in
    progress at this agent.
    """

    type: Literal["register"] = ...
    reply_to: str | None = ...
    agent_id: Id
    resume: Id
    heartbeat_s: Annotated[float, None]
    max_bytes: Annotated[int, None]
    tasks: list[TaskRef]

@dataclass(slots=True, kw_only=True)
class Deregistered:
    """The agent left; the hub closes the connection."""

    type: Literal["deregister"] = ...
    reply_to: str | None = ...

@dataclass(slots=True, kw_only=True)
class Discovered:
    """The agents found, best match first. `total` also counts those beyond the limit."""

    type: Literal["discover"] = ...
    reply_to: str | None = ...
    agents: list[AgentInfo]
    total: int

@dataclass(slots=True, kw_only=True)
class Delegated:
    """A task, delivered to its worker. `ttl` is the seconds left, `attempt` counts deliveries from 1."""

    type: Literal["delegate"] = ...
    task_id: str
    sender: str
    agent_id: str
    capability: str | None = ...
    input: Json = ...
    ttl: float
    priority: int
    max_retries: int
    parent_id: str | None = ...
    attempt: int

@dataclass(slots=True, kw_only=True)
class TaskOutcome:
    """A task's outcome, delivered to its requester. `sender` is None if the hub itself ended the task."""

    type: Literal["result"] = ...
    task_id: str
    sender: str | None = ...
    success: bool
    state: str
    output: Json = ...
    error: ErrorInfo | None = ...
    attempt: int

@dataclass(slots=True, kw_only=True)
class StatusReply:
    """The status of the hub, of all tasks or of one; a worker's progress; or, to a worker, the end of its task.

    The fields of one task are those of TaskInfo. Only its requester and its assignee see `input`, `output`, `error`
    and `detail`.
    """

    type: Literal["status"] = ...
    reply_to: str | None = ...
    hub: dict[str, Any] | None = ...
    tasks: list[TaskInfo] | None = ...
    total: int | None = ...
    task_id: str | None = ...
    state: str | None = ...
    requester: str | None = ...
    agent_id: str | None = ...
    capability: str | None = ...
    attempt: int | None = ...
    priority: int | None = ...
    max_retries: int | None = ...
    parent_id: str | None = ...
    ttl: float | None = ...
    age_s: float | None = ...
    code: str | None = ...
    sender: str | None = ...
    seq: int | None = ...
    progress: float | None = ...
    detail: Any = ...
    input: Any = ...
    output: Any = ...
    error: ErrorInfo | None = ...

@dataclass(slots=True, kw_only=True)
class TaskAck:
    """The few fields of StatusReply that acknowledge a task: the message that a hub writes most often."""

    type: Literal["status"] = ...
    reply_to: str | None = ...
    task_id: str
    state: str
    attempt: int

@dataclass(slots=True, kw_only=True)
class BroadcastReply:
    """A broadcast (`message`, `sender`), or the reply to its sender (`recipients`)."""

    type: Literal["broadcast"] = ...
    reply_to: str | None = ...
    recipients: int | None = ...
    sender: str | None = ...
    message: Json = ...
    capability: str | None = ...

@dataclass(slots=True, kw_only=True)
class BroadcastDelivery:
    """The fields of BroadcastReply that its recipients get."""

    type: Literal["broadcast"] = ...
    sender: str
    message: Any
    capability: str | None

@dataclass(slots=True, kw_only=True)
class HeartbeatAck:
    """The reply to a heartbeat."""

    type: Literal["heartbeat_ack"] = ...
    reply_to: str | None = ...

@dataclass(slots=True, kw_only=True)
class Error:
    """A request was rejected and had no effect. `code` is one of Code."""

    type: Literal["error"] = ...
    reply_to: str | None = ...
    code: str
    message: str
    task_id: str | None = ...

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
HubOutput = HubMessage | TaskAck | BroadcastDelivery
Validator = Callable[[Any], Any]

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

    name: str
    loads: Callable[[bytes], Any]
    def parser(self, union: Any, depth_max: int, decide: Callable[[bytes], Any]) -> Callable[[bytes], Any]: ...
    @staticmethod
    def strict_parser(union: Any, depth_max: int) -> Callable[[bytes], Any]:
        """Return the function that makes a message of `union` from bytes, or raises ValidationError."""

class PydanticCodec:
    """Parse messages with Pydantic, from the same annotations.

    Strict: no string or bool for a number, and no number that is not finite.
    """

    name: Incomplete
    def __init__(self, version: str) -> None: ...
    def parser(self, union: Any, depth_max: int, decide: Callable[[bytes], Any]) -> Callable[[bytes], Any]: ...
    def loads(self, payload: bytes, /) -> Any: ...

class MsgspecCodec:
    """Parse messages with msgspec, from the same annotations. Of a payload it checks only the syntax."""

    name: Incomplete
    loads: Callable[[bytes], Any]
    def __init__(self, version: str) -> None: ...
    def parser(self, union: Any, depth_max: int, decide: Callable[[bytes], Any]) -> Callable[[bytes], Any]: ...

class Member(NamedTuple):
    """The value of a field at the top level of some JSON, and where in the text that is."""

    value: Any
    start: int
    end: int

class Encoders(dict[type, Callable[[Any], bytes]]):
    """The function that writes the messages of a class, by class. Each is made at its first use."""
    def __missing__(self, message: type) -> Callable[[Any], bytes]: ...

class TaskState(enum.StrEnum):
    """The state of a task."""

    PENDING = "pending"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    TIMEOUT = "timeout"

class TaskEvent(enum.StrEnum):
    """The events that change a task's state."""

    ASSIGNED = "assigned"
    SUCCEEDED = "succeeded"
    ERRED = "erred"
    RETRIED = "retried"
    LOST = "lost"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

TRANSITIONS: Mapping[TaskState, Mapping[TaskEvent, TaskState]]
FINAL_STATES: frozenset[TaskState]

class AgentState(enum.StrEnum):
    """The state of an agent."""

    ONLINE = "online"
    DRAINING = "draining"
    DISCONNECTED = "disconnected"
    INTERRUPTED = "interrupted"
    GONE = "gone"
    DEREGISTERED = "deregistered"

class AgentEvent(enum.StrEnum):
    """The events that change an agent's state."""

    DRAIN_REQUESTED = "drain requested"
    CONNECTION_LOST = "connection lost"
    RESUMED = "resumed"
    GRACE_EXPIRED = "grace period expired"
    DEREGISTERED = "deregistered"

AGENT_TRANSITIONS: Mapping[AgentState, Mapping[AgentEvent, AgentState]]
Item = TypeVar("Item", bound=Hashable)

class LazyHeap(Generic[Item]):
    """A priority queue with lazy deletion: items can be moved and discarded.

    Moving or discarding an item leaves its old entry in the heap as a dead one. The heap is rebuilt before it holds
    twice as many entries as items, plus 64. So memory is proportional to the number of items, and every operation takes
    O(log n) time, amortized.
    """

    entries: list[tuple[Any, int, Item]]
    alive: dict[Item, int]
    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def push(self, item: Item, key: Any) -> None:
        """Add `item` at `key`, or move it there. Items with equal keys come out in the order of their pushes."""
    def discard(self, item: Item) -> None:
        """Remove `item` if it is in the queue."""
    def first(self) -> tuple[Any, Item] | None:
        """Return the least key and its item, or None."""

@dataclass(frozen=True, slots=True, kw_only=True)
class HubSettings:
    """The settings that a deployer may tune. Raises ValueError for a value out of range."""

    heartbeat_s: float = ...
    grace_s: float = ...
    retention_s: float = ...
    reap_s: float = ...
    message_bytes_max: int = ...
    records_bytes_max: int = ...
    open_tasks_max: int = ...
    pending_tasks_max: int = ...
    agents_max: int = ...
    connections_max: int = ...
    capabilities_max: int = ...
    metadata_bytes_max: int = ...
    join_s: float = ...
    def __post_init__(self) -> None: ...
    @property
    def envelope_bytes(self) -> int:
        """The bytes that the hub may add to a message when it passes it on."""
    @property
    def silence_s(self) -> float:
        """How long a connection may be silent before it is closed."""

class Close(NamedTuple):
    """Close a connection after all that was sent on it before."""

    code: int
    reason: str

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
    sequence: int
    bytes: int
    state: TaskState = ...
    assignee: AgentRecord | None = ...
    attempt: int = ...
    seq: int = ...
    progress: float | None = ...
    detail: Any = ...
    success: bool = ...
    output: Any = ...
    detail_bytes: int = ...
    error: ErrorInfo | None = ...
    settled_by: AgentRecord | None = ...
    ended_at: float = ...
    children: dict[str, TaskRecord] | None = ...
    is_delivered: bool = ...
    is_journaled: bool = ...
    @property
    def queue_key(self) -> tuple[int, int]:
        """Where it stands among its requester's tasks: the higher priority first, then the order of acceptance."""
    @property
    def target(self) -> tuple[str | None, str | None]:
        """The queue in which it waits for an agent: an agent_id, a capability, or both."""
    @property
    def is_orphan(self) -> bool:
        """Whether the hub died before it had cancelled this subtask: its parent task has ended, or is retried."""
    @property
    def waits_for_agent(self) -> bool:
        """Whether it waits for the agent it names when that one is lost before it could start."""
    def ack(self, reply_to: str | None = None) -> TaskAck: ...
    def delivery(self, worker: AgentRecord, now: float) -> Delegated:
        """Return the message that hands it to a worker, with the time to live that is left."""
    def progress_report(self) -> StatusReply:
        """Return the message that passes its progress on to its requester."""
    def check_result(self, agent: AgentRecord, message: Result, now: float) -> None:
        """Refuse a result unless it is from the assignee, of the present attempt, or its requester cancels with it."""
    def least_report(self, reply_to: str | None) -> StatusReply:
        """Return a reply to its requester or assignee that is no longer than its outcome."""
    def outcome(self) -> TaskOutcome: ...
    def info_fields(self, now: float) -> dict[str, Any]:
        """Return the fields that TaskInfo and StatusReply share."""
    def row(self) -> TaskRow:
        """Return its row for a journal: everything but its progress."""

@dataclass(slots=True, eq=False, repr=False)
class AgentRecord:
    """The hub's record of one agent. Only `Directory.transition` assigns `state`.

    After its grace period, or after it has deregistered, its record is kept only as long as it `is_needed`.
    """

    agent_id: str
    resume: str
    resume_hash: str = ...
    state: AgentState = ...
    connection: Connection | None = ...
    drain_id: str | None = ...
    name: str = ...
    description: str = ...
    capabilities: dict[str, Capability] = field(default_factory=dict)
    words: dict[str, None] = field(default_factory=dict)
    max_tasks: int = ...
    metadata: dict[str, Any] = field(default_factory=dict)
    info_bytes: int = ...
    bytes: int = ...
    held_bytes: int = ...
    origin: str | None = ...
    pools: list[Pool] = field(default_factory=list)
    load: int | None = ...
    running: dict[str, TaskRecord] = field(default_factory=dict)
    awaited: dict[str, TaskRecord] = field(default_factory=dict)
    requested: dict[str, TaskRecord] = field(default_factory=dict)
    undelivered: dict[str, TaskRecord] = field(default_factory=dict)
    delivered: int = ...
    @property
    def is_available(self) -> bool: ...
    @property
    def is_needed(self) -> bool:
        """Whether an agent that is gone may still want something, or be wanted, when it comes back."""
    def targets(self) -> list[tuple[tuple[str | None, str | None], AgentRecord | None]]:
        """Return the targets of the tasks that it may take, each with the requester whose tasks it must not."""
    @property
    def info(self) -> AgentInfo: ...
    def row(self) -> AgentRow:
        """Return its row for a journal."""

@dataclass(slots=True, eq=False, repr=False)
class Connection:
    """One connection, and the agent that is registered on it (None: an observer)."""

    link: Hashable
    last_seen: float
    origin: str | None = ...
    agent: AgentRecord | None = ...
    is_known: bool = ...
    wrong_secrets: int = ...

class AgentRow(NamedTuple):
    """An agent as a journal keeps it: its registration, and only the hash of its secret.

    `there` is false once it is gone, `departed` is true if that is because it deregistered. Other states do not
    outlive the hub: to the next one, every agent that is not gone is disconnected.
    """

    agent_id: str
    resume_hash: str
    register: Register
    there: bool
    departed: bool = ...

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
    is_delivered: bool
    ended_at: float
    end: TaskOutcome | None

@dataclass(slots=True)
class Changes:
    """The rows that a journal writes at once: the latest row of each task and agent that changed."""

    inserted: dict[int, TaskRow] = field(default_factory=dict)
    updated: dict[int, TaskRow] = field(default_factory=dict)
    deleted: dict[int, None] = field(default_factory=dict)
    agents: dict[str, AgentRow | None] = field(default_factory=dict)
    def merge(self, later: Changes) -> None:
        """Add later changes, whose rows supersede the earlier ones. Costs no more than `later` is long."""

class Step(NamedTuple):
    """The consequences of one fact: changes to be written first (None: none), then effects, in their order."""

    effects: list[Effect]
    changes: Changes | None = ...

class Pool:
    """The agents with one capability, and those of them that can take a task, by load.

    Loads are few and small numbers, so the least one is found by sorting them, and an agent moves in constant time.
    """

    name: Incomplete
    target: Incomplete
    lower_name: Incomplete
    words: Incomplete
    members: dict[str, AgentRecord]
    free: dict[int, dict[str, AgentRecord]]
    def __init__(self, name: str) -> None: ...
    def move(self, agent: AgentRecord, old: int | None, new: int | None) -> None:
        """List `agent` under the load `new` instead of `old`; None is the load of one that can take no task."""
    def least_loaded(self, *excluded: AgentRecord | None) -> AgentRecord | None:
        """Return a free agent with the fewest tasks; of several, the one that has had that load for longest."""

class PendingQueue:
    """The pending tasks with one target. Within one priority, requesters take turns.

    A heap a requester, and a heap of their heads. Turns are counted by the hub over all queues: a requester joins at
    the present turn, and takes a new one in all queues of the agent that serves it; the least recent turn goes first.
    No agent gets its own task, and must not search for another's: the requester that it is not to serve is left out by
    looking at the second head.
    """

    by_requester: dict[AgentRecord, LazyHeap[TaskRecord]]
    turns: dict[AgentRecord, int]
    heads: LazyHeap[AgentRecord]
    def __init__(self) -> None: ...
    def __bool__(self) -> bool: ...
    def push(self, task: TaskRecord, turn: int) -> None: ...
    def discard(self, task: TaskRecord) -> None: ...
    def take_turn(self, requester: AgentRecord, turn: int) -> None:
        """Put a requester that was served, here or in another queue, behind the others."""
    def first(self, excluding: AgentRecord | None) -> tuple[tuple[int, int, int], TaskRecord] | None:
        """Return the first task in line whose requester is not `excluding`, and its place: least goes first."""

class InvertedIndex(Generic[Item]):
    """Finds items by any of their keys. It is limited: items that do not fit are scanned one by one."""
    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def add(self, item: Item, keys: Collection[str]) -> None: ...
    def drop(self, item: Item, keys: Collection[str]) -> None:
        """Remove an item that was added with these keys, or not at all."""
    def candidates(self, keys: Iterable[str]) -> list[Item]:
        """Return the items that may have all these keys, at least one of them: those with the rarest."""

class CapabilityIndex:
    """Finds agents by the names of their capabilities and the words of their descriptions, without scanning them all.

    Names are looked up by their trigrams, as in pg_trgm of PostgreSQL: a keyword of three characters or more is part of
    a name only if the name has all trigrams of the keyword. The candidates with the rarest one are then compared.
    """

    scanned: int
    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def add_pool(self, pool: Pool) -> None: ...
    def drop_pool(self, pool: Pool) -> None: ...
    def add_agent(self, agent: AgentRecord) -> None: ...
    def drop_agent(self, agent: AgentRecord) -> None: ...
    def ranks(self, keyword: str) -> dict[AgentRecord, int]:
        """Return the rank of each agent that matches a keyword in lower case: 0 is best, 3 a word of a description."""

class Directory:
    """The agents that the hub knows, with the indexes that find one for a task and for `discover`.

    An agent that is online or disconnected is a member of the pool of each of its capabilities and is in the index of
    `discover`; one that is draining, interrupted or gone is in neither. A pool lists those of its members that can take
    a task under their load. `transition` and `describe` keep that true, and `update_load` does after each change of
    an agent's `running`.
    """

    agents_max: Incomplete
    agents: dict[str, AgentRecord]
    gone: dict[str, AgentRecord]
    pools: dict[str, Pool]
    index: Incomplete
    registrations_bytes: int
    changed: dict[AgentRecord, bool]
    def __init__(self, agents_max: int, *, is_journaled: bool) -> None: ...
    def mark(self, agent: AgentRecord, is_kept: bool = True) -> None:
        """Have an agent's row written, or deleted, by this step."""
    def transition(self, agent: AgentRecord, event: AgentEvent) -> None:
        """Take one step of the table. Nothing else assigns an agent's state; pools and index follow it here."""
    def add(self, name: str, origin: str | None, entropy: Callable[[int], bytes]) -> AgentRecord:
        """Return the record of a new agent. Where there are too many, the oldest one that is gone makes room."""
    def describe(self, agent: AgentRecord, message: Register, running_max: int) -> None:
        """Apply a registration to its agent, and list the agent under its capabilities."""
    def restore(self, row: AgentRow, running_max: int) -> AgentRecord:
        """Add an agent that a journal has kept."""
    def forget_unneeded(self) -> None:
        """Drop those that are gone and that nothing needs any more."""
    def forget(self, agent: AgentRecord) -> None: ...
    def update_load(self, agent: AgentRecord) -> None:
        """List an agent in its pools under its present load."""
    def free_agent(self, task: TaskRecord, avoiding: AgentRecord | None) -> AgentRecord | None:
        """Return an agent that can take a task now: the one to avoid only as a last choice.

        A task by capability never goes to its own requester; one that names an agent may.
        """
    def check_target(self, requester: AgentRecord, message: Delegate) -> None:
        """Refuse a task that no agent offers which is online or in its grace period."""
    def check_deadlock(self, requester: AgentRecord, message: Delegate, parent: TaskRecord) -> None:
        """Refuse a subtask that could begin only after an ancestor has ended, with which it ends too.

        That is so if each agent that could take it has all its slots taken by ancestors, or is the requester and not
        named. An ancestor may end without waiting for its subtasks, so no task that could run is refused.
        """
    def search(self, keyword: str, limit: int, bytes_max: int) -> tuple[list[AgentInfo], int, int]:
        """Return the online agents that match a keyword, the best first, as many as fit; how many match; and how many
        were looked at.
        """

class TaskTable:
    """The records of all tasks, each in one of three dictionaries, with their counts and sizes.

    `open` are those not in a final state, in the order of acceptance. A task that ends moves on to `delivered` if its
    outcome was sent (or nobody is left to send it to), or else to `undelivered` until its requester is back; both are
    in the order of their ends, so that the oldest go first. Requesters, parents and the counts are kept in step here;
    who runs a task, and who waits for which, is the Hub's affair.
    """

    open: dict[str, TaskRecord]
    delivered: dict[str, TaskRecord]
    undelivered: dict[str, TaskRecord]
    counts: Incomplete
    totals: Incomplete
    bytes: int
    ended_bytes: int
    bytes_max: Incomplete
    sequence: int
    changed: dict[TaskRecord, bool]
    def __init__(self, bytes_max: int, *, is_journaled: bool) -> None: ...
    def find(self, task_id: str) -> TaskRecord | None: ...
    def parent(self, agent: AgentRecord, parent_id: str) -> TaskRecord:
        """Return the task that an agent may delegate a subtask of."""
    def newest(self, now: float, bytes_max: int) -> list[TaskInfo]:
        """List the open tasks, those with an outcome to deliver, and the others, the newest first, as many as fit."""
    def __len__(self) -> int: ...
    def mark(self, task: TaskRecord, is_kept: bool = True) -> None:
        """Have a task's row written, or deleted, by this step."""
    def take_changes(self, changes: Changes) -> None:
        """Add the rows of the tasks that changed since the last step."""
    def accept(
        self, request: Delegate, requester: AgentRecord, parent: TaskRecord | None, now: float, message_bytes: int
    ) -> TaskRecord:
        """Return the record of a new task, which is pending."""
    def restore(self, row: TaskRow, agent_of: Callable[[str], AgentRecord], now: float) -> TaskRecord:
        """Return the record of a task that a journal has kept; it is in none of the dictionaries yet.

        Even if the machine's clock was set back, nothing is younger than now, or lives longer than its time to live.
        """
    def list_open(self, task: TaskRecord) -> None: ...
    def transition(self, task: TaskRecord, event: TaskEvent) -> None:
        """Take one step of the table. Nothing else assigns a task's state."""
    def grow(self, task: TaskRecord, size: int) -> None:
        """Count `size` more bytes (less, if negative) in the record of an open task."""
    def keep_undelivered(self, task: TaskRecord) -> None: ...
    def take_undelivered(self, task: TaskRecord) -> None: ...
    def keep_delivered(self, task: TaskRecord) -> None: ...
    def take_delivered(self, task_id: str) -> TaskRecord | None:
        """Take a task out of `delivered`; return it if it was there."""
    def has_room(self, size: int) -> bool:
        """Return whether a record of `size` bytes fits when all ended ones are dropped for it."""
    def make_room(self, needed: int, requester: AgentRecord | None) -> None:
        """Drop ended tasks, before their retention is over, while the records are too large together.

        The oldest delivered ones go first, and then outcomes of disconnected requesters: those of the `requester` that
        needs the bytes while it holds more than its share, and then the oldest of all.
        """
    def purge_older(self, horizon: float) -> bool:
        """Drop tasks that ended before `horizon`, at most TICK_BATCH of a kind; return whether more may be left."""
    def purge(self, task: TaskRecord) -> None:
        """Drop the record of an ended task."""

class Hub:
    """Every decision about agents and tasks.

    `entropy(n)` returns n random bytes, for agents' ids and their secrets. `now` is in seconds of one clock that
    does not go back (if it does, time stands still here until it has caught up). With `is_journaled`, each step has
    the changes that must be on disk before its effects are carried out; `restore` reads them again after a restart.
    `directory`, `tasks`, `connections`, `queues` and `deadlines` are for reading.
    """

    settings: HubSettings
    directory: Incomplete
    tasks: Incomplete
    shutting_down: bool
    is_full: bool
    cost: int
    connections: dict[Hashable, Connection]
    queues: dict[tuple[str | None, str | None], PendingQueue]
    deadlines: LazyHeap[TaskRecord | AgentRecord | Connection]
    def __init__(
        self, settings: HubSettings, *, entropy: Callable[[int], bytes], now: float, is_journaled: bool = False
    ) -> None: ...
    def connected(self, link: Hashable, now: float, origin: str | None = None) -> Step:
        """Add a new connection. Until it registers it may only look: `status` and `discover`.

        `origin` is the address that it comes from; None is not limited.
        """
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
    def failed(self, link: Hashable, reply_to: str | None) -> Step:
        """Answer a message whose handling raised an unexpected exception; its effects until then are kept."""
    def disconnected(self, link: Hashable, now: float, code: int = 1006) -> Step:
        """Remove a lost connection. Its agent's session is kept for the grace period."""
    def tick(self, now: float) -> Step:
        """Handle what is due, TICK_BATCH deadlines at most; after that, next_deadline() may be past again."""
    def redeliver(self, task_id: str, now: float) -> Step:
        """Redeliver an outcome that was not sent because the requester disconnected."""
    def next_deadline(self) -> float:
        """Return when `tick` is due next."""
    def shut_down(self) -> None:
        """Accept no new task from now on."""
    @property
    def in_progress(self) -> int:
        """How many tasks are in progress."""
    def summary(self) -> dict[str, Any]:
        """Return what `status` reports of the hub itself."""
    def restore(self, agents: Iterable[AgentRow], tasks: Iterable[TaskRow], redeliver_after: float) -> Step:
        """Continue from the rows of a journal, before any other call. Each agent gets a new grace period.

        Outcomes of tasks that ended after `redeliver_after` are delivered again: the last ones may have been lost with
        the hub.
        """

StoredMessage = TypeVar("StoredMessage")

class Journal:
    """Persists a hub\'s tasks and agents in a file. `open` it, `load` once, then `write`, and `close`.

    With `sync` "full", `write` returns when the data would survive a power loss; with "normal", when it would survive
    the end of the process (https://sqlite.org/pragma.html#pragma_synchronous). The methods may be called from any
    thread, one at a time.
    """

    path: str
    sync: str
    database: sqlite3.Connection | None
    def __init__(self, path: str | os.PathLike[str], *, sync: str = "full") -> None: ...
    def of_namespace(self, namespace: str) -> Journal:
        """Return the journal of another namespace: the file next to this one with `.NAMESPACE` appended."""
    def open(self) -> None:
        """Open the file, or create it, and lock it for this process. Raises JournalError; then no file was changed."""
    def close(self) -> None:
        """Close the file, which unlocks it. No effect if it is closed."""
    def load(self, clock_offset: float) -> tuple[list[AgentRow], list[TaskRow], float]:
        """Return all agents, all tasks, and the time of the last change to a task. Raises JournalError if damaged.

        `clock_offset` is the difference between the seconds since 1970 and the hub's clock.
        """
    def write(self, changes: Changes, clock_offset: float) -> None:
        """Write all changes in one transaction. Raises sqlite3.Error; then nothing was written, and a retry is safe."""
    def take_reserve(self) -> bool:
        """Allocate the reserve unless it exists; return whether the disk has the space."""
    def give_up_reserve(self) -> None:
        """Delete the reserve, so that its space is free for the journal."""

Output = TypeVar("Output")

class LinkOwner(Protocol):
    """The callbacks of a link's owner. `closed` is called once, and nothing after it."""
    def opened(self, link: Link) -> None: ...
    def received(self, link: Link, message: Any, message_bytes: int) -> None:
        """Handle a message, or the InvalidMessage that says what is wrong with it."""
    def closed(self, link: Link, code: int, reason: str) -> None: ...

class LightEvent:
    """An asyncio.Event with a tenth of the memory: each link has two of them, and a hub has many links."""
    def __init__(self) -> None: ...
    def is_set(self) -> bool: ...
    def set(self) -> None: ...
    def clear(self) -> None: ...
    async def wait(self) -> None:
        """Return when it is set, or was set for a moment since the call."""

class PauseReason(enum.StrEnum):
    """Why nothing is read from a connection; reading goes on when no reason is left."""

    TURN_OVER = "turn over"
    RATE_LIMIT = "rate limit"
    SLOW_CONSUMER = "slow consumer"
    JOURNAL = "journal"
    AUTH_BACKOFF = "auth backoff"

class Link:
    """What all links share: decoding for the owner, and calling its `closed` once."""

    address: str
    grant: Any
    is_backlogged: bool
    gone: Incomplete
    writable: Incomplete
    def __init__(self, owner: LinkOwner, decode: Callable[[bytes], Any]) -> None: ...
    def send(self, raw: bytes) -> None:
        """Send an encoded message; without effect when the link is closing."""
    def send_when_writable(self, message: Any) -> None:
        """Send a message that its owner keeps in memory anyway: encode it when the other end has read the backlog."""
    def take_unsent(self) -> list[Any]:
        """Return the postponed messages that were not sent, and will not be."""
    def close(self, code: int, reason: str = "") -> None:
        """Close, after what was sent before. The owner's `closed` is called when the other end agrees or is lost."""
    def abort(self) -> None:
        """Cut the link, without waiting for anything."""
    def set_owner(self, owner: LinkOwner, decode: Callable[[bytes], Any]) -> None:
        """Call another owner from now on. Its `opened` is not called: the link is open already."""
    def charge(self, cost: float) -> None:
        """Count what a message cost to handle towards the rate limit, if this kind of link has one."""
    def pause_reading(self, reason: str) -> None:
        """Handle nothing more that comes in until each reason to pause is gone, if this kind of link can."""
    def resume_reading(self, reason: str) -> None:
        """Remove one reason to pause; without effect if it is none."""

Connector = Callable[[LinkOwner], Awaitable[Link]]

class MemoryLink(Link):
    """One end of a connection within this process. Messages still go through encode and decode."""
    def __init__(self, owner: LinkOwner, decode: Callable[[bytes], Any]) -> None: ...
    @classmethod
    def pair(cls, near: tuple[LinkOwner, Callable[[bytes], Any]], far: tuple[LinkOwner, Any]) -> tuple[Link, Link]:
        """Return both ends, each made from an owner and a decoder."""
    def send(self, raw: bytes) -> None: ...
    def close(self, code: int, reason: str = "") -> None: ...
    def abort(self) -> None: ...

class TokenBucket:
    """A rate limit: `rate` tokens a second. BURST_S seconds' worth of them can be saved up.

    It may be overdrawn, by at most PAUSE_MAX_S seconds' worth. Pure arithmetic: the time is given.
    """
    def __init__(self, rate: float, now: float) -> None: ...
    def take(self, cost: float) -> bool:
        """Take tokens, also more than there are. Return whether there were enough; otherwise `refill` comes next."""
    def refill(self, now: float) -> float:
        """Add the tokens earned since the last call; return how many seconds to pause, 0 if none are owed.

        Called when the bucket is empty instead of for each message, so that most messages need no clock.
        """

class WebSocketLink(Link, AsyncioProtocol):
    """One end of a WebSocket: moves bytes between a socket and a `WebSocketProtocol`, and tells its owner the events.

    What is sent in one turn of the loop goes out together, at its end or when it is more than OUT_BYTES_MAX, so the
    replies to the messages of a chunk share their writes.
    """

    pause_reasons: set[str]
    transport: asyncio.Transport | None
    def __init__(self, protocol: WebSocketProtocol, owner: LinkOwner, decode: Callable[[bytes], Any]) -> None: ...
    @property
    def unread_bytes(self) -> int:
        """How many bytes came in and were not handled yet."""
    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...
    def data_received(self, data: bytes) -> None: ...
    def eof_received(self) -> None: ...
    def connection_lost(self, error: Exception | None) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def send(self, raw: bytes) -> None: ...
    def close(self, code: int, reason: str = "") -> None: ...
    def abort(self) -> None: ...
    def pause_reading(self, reason: str) -> None: ...
    def resume_reading(self, reason: str) -> None: ...

class ServerLink(WebSocketLink):
    """The hub's end of a WebSocket. `answer(link, request)` returns (status, body) for a plain HTTP request, else None.

    A peer that sends more than `messages_per_s_max` (0: no limit) is read from more slowly. With half of
    `backlog_bytes_max` unread it is a slow consumer: it is not read from either, and what is sent waits here. It is
    disconnected beyond that limit, or when it has read nothing for STALLED_S seconds: the answer to a close would
    come behind the very bytes that it does not read.
    """

    address: Incomplete
    bearer: str | None
    is_answered: bool
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
        on_gone: Callable[[ServerLink], None] = ...,
    ) -> None: ...
    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...
    def connection_lost(self, error: Exception | None) -> None: ...
    def limit_messages(self, bytes_max: int) -> None:
        """Accept no larger messages from now on."""
    def charge(self, cost: float) -> None: ...
    is_backlogged: bool
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def send(self, raw: bytes) -> None: ...
    def send_when_writable(self, message: Any) -> None: ...
    def take_unsent(self) -> list[Any]: ...
    def close(self, code: int, reason: str = "") -> None: ...

class ClientLink(WebSocketLink):
    """An agent's end of a WebSocket. `ready` is done when the handshake is."""

    ready: asyncio.Future[None]
    def __init__(self, protocol: WebSocketProtocol, owner: LinkOwner, token: str | None) -> None: ...
    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...

class HubUrl(NamedTuple):
    """A hub's URL in parts. `path` includes the query."""

    host: str
    port: int
    is_secure: bool
    path: str
    @property
    def host_header(self) -> str: ...

class HandshakeFailed(Exception):
    """The other end does not speak WebSocket.

    `status` is the HTTP status that a server answers with, `response` that with which it has rejected a client.
    """

    status: Incomplete
    response: Incomplete
    def __init__(self, text: str, status: int = 400, response: Response | None = None) -> None: ...

class FrameError(Exception):
    """The other end broke the rules. `code` is the close code that says so."""

    code: Incomplete
    def __init__(self, code: int, reason: str) -> None: ...

class Headers:
    """The headers of a request or response, in their order; setting one adds it. Names are case-insensitive."""

    pairs: Incomplete
    def __init__(self, *pairs: tuple[str, str]) -> None: ...
    def get_all(self, name: str) -> list[str]: ...
    def words(self, name: str) -> list[str]:
        """Return the elements of a header that is a list, in lower case."""
    def is_upgrade(self) -> bool:
        """Return whether this is a handshake (RFC 6455 §4.1, §4.2.1)."""
    def encode(self, first_line: str) -> bytes:
        """Return the head of a request or response."""
    def only(self, name: str) -> str:
        """Return the value of a header that must occur exactly once."""
    def __setitem__(self, name: str, value: str) -> None: ...

class Request(NamedTuple):
    """The handshake of a client. A server accepts or rejects it before it reads on."""

    path: str
    headers: Headers
    method: str = ...
    version: str = ...

class Response(NamedTuple):
    """The answer of a server to a handshake; with 101 it opened the WebSocket, else `body` may say why not."""

    status_code: int
    phrase: str
    headers: Headers
    body: bytes = ...

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

    COSTLY = ...

ApplyMask = Callable[[bytes | bytearray, bytes | bytearray], bytes]
Event = Request | Response | bytes | Message | Frame | CloseFrame | Violation | Costly

@dataclass(slots=True)
class Fragments:
    """The fragments of a message so far."""

    is_text: bool
    raw: bytearray = field(default_factory=bytearray)
    count: int = ...

class WebSocketProtocol:
    """One end of a WebSocket, without I/O.

    Events come one at a time, so that each is handled before the next is read: a request is answered before what is
    behind it, messages are answered before the close behind them, and a reader may stop between any two. What the
    other end does wrong is an event too; nothing is raised.
    """

    is_server: Incomplete
    is_open: bool
    has_ended: bool
    handshake_exc: Exception | None
    close_sent: CloseFrame | None
    close_rcvd: CloseFrame | None
    position: int
    unsent_bytes: int
    def __init__(self, message_bytes_max: int, *, is_server: bool, apply_mask: ApplyMask) -> None: ...
    def limit_messages(self, bytes_max: int) -> None:
        """Accept no larger messages from now on."""
    @property
    def unread_bytes(self) -> int: ...
    def receive_data(self, data: bytes) -> None:
        """Keep bytes that came in, for `next_event`."""
    def next_event(self) -> Event | None:
        """Return what came in next, None if more bytes are needed.

        A frame is read when it is complete, or when its header says that it is too long. So no more than one message
        is ever buffered on top of what came in at once.
        """
    def receive_eof(self) -> None:
        """Handle that nothing will come in any more."""
    def discard(self) -> None:
        """Read nothing more, whatever still comes in."""
    def data_to_send(self) -> bytes:
        """Return what is to be written."""
    def send_text(self, raw: bytes) -> None:
        """Send a message; without effect after a close. A server's frames are not masked: a header and the bytes."""
    def send_close(self, code: int, reason: str = "") -> None:
        """Send a close. What still comes in is read until the other end closes too."""
    def fail(self, code: int, reason: str = "") -> None:
        """Send why the connection has failed, and read nothing more (RFC 6455 §7.1.7)."""
    def close_expected(self) -> bool:
        """Return whether the other end is expected to close the socket."""
    def accept(self, request: Any) -> None:
        """Send the response that opens the WebSocket, or that says why not (RFC 6455 §4.2)."""
    def reject(self, status: int, text: str, content_type: str = "application/json") -> None:
        """Send a plain HTTP response, after which the connection ends."""
    def connect(self) -> Any:
        """Return the request that opens the WebSocket (RFC 6455 §4.1), for `send_request`."""
    def send_request(self, request: Any) -> None: ...

class BuiltinProtocol(WebSocketProtocol):
    """The built-in implementation's part that both roles share: frames, and the end of a connection."""

    IS_SERVER: bool
    def __init__(self, message_bytes_max: int) -> None: ...
    handshake_exc: Incomplete
    def receive_eof(self) -> None: ...
    def close_expected(self) -> bool: ...
    close_sent: Incomplete
    def send_close(self, code: int, reason: str = "") -> None: ...
    def fail(self, code: int, reason: str = "") -> None: ...

class BuiltinServer(BuiltinProtocol):
    """The end that is connected to. A Request comes as the first event."""

    IS_SERVER: bool
    handshake_exc: Incomplete
    def accept(self, request: Request) -> None: ...
    def reject(
        self, status: int, text: str, content_type: str = "application/json", *more: tuple[str, str]
    ) -> None: ...

class BuiltinClient(BuiltinProtocol):
    """The end that connects to a URL. The Response comes as the first event, or `handshake_exc` says what it lacks."""

    IS_SERVER: bool
    def __init__(self, url: str, message_bytes_max: int) -> None: ...
    def receive_eof(self) -> None: ...
    def connect(self) -> Request: ...
    def send_request(self, request: Request) -> None: ...

class PackageProtocol(WebSocketProtocol):
    """The same around a Sans-I/O protocol object of `websockets`, which is given one line or one frame at a time.

    Given more it would read on at once: answer a ping before the request in front of it, or close before the messages
    in front of the close are answered.
    """
    def __init__(self, inner: Any, message_bytes_max: int, *, is_server: bool, apply_mask: ApplyMask) -> None: ...
    def limit_messages(self, bytes_max: int) -> None: ...
    handshake_exc: Incomplete
    def receive_eof(self) -> None: ...
    def close_expected(self) -> bool: ...
    def send_close(self, code: int, reason: str = "") -> None: ...
    def fail(self, code: int, reason: str = "") -> None: ...
    def accept(self, request: Any) -> None: ...
    def reject(self, status: int, text: str, content_type: str = "application/json") -> None: ...
    def connect(self) -> Any: ...
    def send_request(self, request: Any) -> None: ...

class WebSockets(NamedTuple):
    """An implementation: protocols for both roles, and the base class of a client's `handshake_exc`."""

    name: str
    server: Callable[[int], WebSocketProtocol]
    client: Callable[[str, int], WebSocketProtocol]
    refused: type[Exception]

class Timers:
    """Calls functions at set times, with one timer of the loop for all: most are cancelled long before they are due."""
    def __init__(self) -> None: ...
    def set(self, function: Callable[[], None], when: float) -> None:
        """Call `function` at `when` by the loop's clock; one that is set already is moved there."""
    def cancel(self, function: Callable[[], None]) -> None:
        """Do not call `function`. Without effect if it is not set."""
    def clear(self) -> None:
        """Call none of them."""

@dataclass(frozen=True, slots=True)
class Grant:
    """What one token allows: in which namespace, which of RIGHTS, and for which capabilities.

    `register` allows to offer capabilities, `delegate` to delegate tasks and to discover agents, `broadcast` to
    broadcast, `observe` to discover agents and to see the hub's status and list of tasks. The patterns in `may_offer`
    and `may_call` are those of a shell (`review-*`); None matches any capability. The status of one task, a result and
    a heartbeat need no right: the hub decides by the connection.
    """

    name: str
    sha256: str
    namespace: str = ...
    may: frozenset[str] = ...
    may_offer: tuple[str, ...] | None = ...
    may_call: tuple[str, ...] | None = ...
    @property
    def registration_scope(self) -> tuple[Any, ...]:
        """What a registration depends on: if a reload changes it, the agent has to register again."""
    def refusal(self, message: AgentMessage) -> str | None:
        """Return why the holder may not send a message; None if it may."""

class Access:
    """The tokens that a hub accepts, by their SHA-256. Raises ValueError for no tokens, or for more than TOKENS_MAX."""

    grants: list[Grant]
    def __init__(self, grants: Iterable[Grant]) -> None: ...
    @classmethod
    def of_token(cls, token: str) -> Access:
        """Return access by this one token, with all rights."""
    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> Access:
        """Read an access file: TOML with a table `tokens.NAME` for each token. Raises ValueError with the path."""
    @property
    def namespaces(self) -> list[str]: ...
    def grant(self, token: str) -> Grant | None:
        """Return what a token allows; None if it is unknown. Takes the same time for all tokens, right or wrong."""
    def grant_by_hash(self, sha256: str) -> Grant | None: ...

class AuthBackoff:
    """Counts wrong tokens by address, and computes the delay of the next answer to an address."""
    def __init__(self) -> None: ...
    def add(self, address: str, now: float) -> None: ...
    def delay_s(self, address: str, now: float) -> float: ...

class AuthAttempt(NamedTuple):
    """A message on a link that has not authenticated, and the token in it ("": a value that cannot be a token)."""

    message: AgentMessage | InvalidMessage | None
    token: str | None

@dataclass(slots=True, eq=False)
class Unauthenticated:
    """A link that has not authenticated yet. When the timer fires, it is closed."""

    timer: asyncio.TimerHandle
    bearer: str | None
    attempts: int = ...

class Authenticator:
    """Owns each link from the network until it has authenticated; then `admit` hands it over to its hub.

    Call `check_request` and `check_bearer` for the request of the handshake, before the link opens. `access` None
    admits every link. `names` are those that a Host header may have (None: any), `origins` those of web pages that may
    connect. `rejected` counts rejections, by reason.
    """

    access: Incomplete
    origins: frozenset[str]
    rejected: dict[str, int]
    unauthenticated: dict[Link, Unauthenticated]
    def __init__(
        self, access: Access | None, names: frozenset[str] | None, admit: Callable[[Link, Grant | None], LinkOwner]
    ) -> None: ...
    def check_request(self, link: Link, request: Any) -> tuple[int, str] | None:
        """Return the answer that rejects an HTTP request of a foreign web page; None for any other request.

        A page can make a browser connect to any address, and let its own name resolve to any address, but cannot set
        these two headers: https://datatracker.ietf.org/doc/html/rfc6455#section-10.2.
        """
    def check_bearer(self, link: ServerLink, request: Any) -> None:
        """Look up the bearer token of a handshake: with a valid one, the link is admitted as it opens.

        A wrong one is treated as a failed attempt once the link is open; so is one whose answer has to be delayed.
        """
    def grant_of(self, link: Link, request: Any) -> Grant | None:
        """Return what the bearer token of a plain HTTP request allows; None while its address has to wait."""
    def reject(self, link: Link, reason: str) -> None:
        """Count and log a rejection. `reason` is one of a few words of this module, never what a client sent."""
    def opened(self, link: Link) -> None: ...
    def received(self, link: Link, attempt: AuthAttempt, message_bytes: int) -> None: ...
    def closed(self, link: Link, code: int, reason: str) -> None: ...

class GroupCommit:
    """Holds the hub's effects back until the changes that they follow from are in the journal.

    One write at a time, in a thread of its own, so that a slow disk does not stop the loop; the steps taken meanwhile
    are merged into the next one. Heartbeats and `overloaded` errors do not wait.
    """

    held: list[Effect]
    idle: Incomplete
    def __init__(self, hub: Hub, journal: Journal, carry_out: Callable[[list[Effect]], None]) -> None: ...
    def add(self, step: Step) -> None:
        """Carry out the effects of a step: now if nothing waits to be written before them, else as soon as it is."""
    def charge(self, link: Link, cost: int) -> None:
        """Charge a link for a message. If it has cost much during one write, it is not read until that is done."""
    async def close(self, within_s: float) -> None:
        """Write the changes that are left, for at most `within_s` seconds, and close the journal."""
    async def flush(self, within_s: float) -> None:
        """Return when nothing is held any more, or after `within_s` seconds."""
    @property
    def is_overfull(self) -> bool:
        """Whether so much is held that no more messages should be handled."""

class LocalHub:
    """A hub in this process, reached over in-memory links: for tests, and for programs of one process.

        async with LocalHub() as hub, Agent("a", hub=hub) as a:
            ...

    Ends with the `async with`, or with `stop`. Everything happens on the loop it was started on. With a `journal`,
    which it opens and closes, `start` continues from what is in it, and raises JournalError if that is impossible.
    """

    settings: HubSettings
    hub: Hub
    commit: GroupCommit | None
    links: dict[Link, None]
    is_running: bool
    def __init__(self, settings: HubSettings | None = None, *, journal: Journal | None = None) -> None: ...
    async def __aenter__(self) -> typing.Self: ...
    async def __aexit__(self, *_: object) -> None: ...
    async def start(self) -> None: ...
    def shut_down(self) -> None:
        """Accept no new task from now on."""
    async def stop(self, drain_s: float = 0.0) -> None:
        """Accept no new task, give those in progress `drain_s` seconds, then close all links with 1001."""
    async def connect(self, owner: LinkOwner) -> Link:
        """Open a link to this hub from within its process."""
    def opened(self, link: Link) -> None: ...
    def received(self, link: Link, message: Any, message_bytes: int) -> None: ...
    def closed(self, link: Link, code: int, reason: str) -> None: ...

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
    access: Incomplete
    namespaces: dict[str, LocalHub]
    sockets: dict[ServerLink, None]
    addresses: dict[str, int]
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
        backlog_bytes_max: int = ...,
        connections_per_address_max: int = ...,
        messages_per_s_max: float = ...,
        journal: Journal | None = None,
    ) -> None: ...
    @property
    def url(self) -> str: ...
    @property
    def rejected(self) -> dict[str, int]:
        """The number of rejected connections and attempts to authenticate, by reason."""
    authenticator: Incomplete
    async def start(self) -> None: ...
    async def stop(self, drain_s: float = 0.0) -> None: ...
    def shut_down(self) -> None: ...
    async def reload(self, access: Access) -> None:
        """Replace the tokens, also for the present connections.

        Closes connections whose token was revoked with 1008, and those whose agent has to register again under the
        changed grant with 1001. Raises JournalError, and keeps the tokens, if the journal of a new namespace cannot be
        opened; ValueError if this hub was started without tokens.
        """

Function = TypeVar("Function", bound=Callable[..., Any])
Reply = TypeVar("Reply")

class Session:
    """One connection to the hub: sends requests, and matches each reply to its request by id.

    Does not reconnect. `close_info` resolves to (code, reason) when the connection is closed, `released` is set when
    nobody uses the session any more.
    """

    close_info: asyncio.Future[tuple[int, str]]
    released: Incomplete
    agent_id: str | None
    heartbeat_s: float
    message_bytes_max: Incomplete
    last_received: float
    def __init__(self, on_message: Callable[[HubMessage], None]) -> None: ...
    @classmethod
    async def open(cls, connector: Connector, on_message: Callable[[HubMessage], None]) -> Session:
        """Connect. Raises Disconnected if there is no hub."""
    def apply(self, registered: Registered) -> None:
        """Take over what the hub says in its reply to the registration."""
    def encode(self, message: AgentMessage) -> bytes:
        """Return a message as it goes over the wire; from any thread.

        Raises Refused(too_large) if the hub would not pass it on, ValueError if it is not JSON.
        """
    def send_nowait(self, raw: bytes) -> None:
        """Send a message that may be missed: drop it if the session is closed or its buffer is full."""
    def send_request(self, message: AgentMessage, on_reply: Callable[[HubMessage | AgentHubError], None]) -> None:
        """Send; `on_reply` gets the reply before any message behind it, or Disconnected. Raises as `encode` does."""
    async def request(
        self,
        message: AgentMessage,
        reply_type: type[Reply],
        on_reply: Callable[[Reply], None] | None = None,
        within_s: float | None = ...,
        until: float = ...,
    ) -> Reply:
        """Return the hub's reply; `on_reply` sees it before any message behind it. Waits while the buffer is full.

        Raises Refused if the hub refuses, Disconnected if the connection is lost before it replies. A hub that has not
        replied after `within_s` seconds (None: no limit) counts as lost: the connection is aborted. Raises TimeoutError
        when the loop's clock reaches `until`, and then leaves the connection as it is.
        """
    def abort(self) -> None:
        """Cut a connection that is of no more use, without a close handshake."""
    async def close(self) -> None:
        """Close, and return when nothing is left of the connection."""
    def opened(self, link: Link) -> None: ...
    def received(self, link: Link, message: Any, message_bytes: int) -> None: ...
    def closed(self, link: Link, code: int, reason: str) -> None: ...

class Backoff:
    """How long to wait before the next attempt: a random time up to a limit that doubles from 0.5 s to 30 s.

    A hub that was there is expected back soon: until then the limit is 6 s. Starts over only after a connection that
    lasted longer than the present limit; otherwise agents would storm a hub that accepts their connections and drops
    them.
    """
    def __init__(self) -> None: ...
    def next_s(self) -> float:
        """Return how many seconds to wait, and double the limit."""
    def lasted(self, connection_s: float) -> None:
        """Start over after a connection of so many seconds, if that was long enough."""

Follower = Callable[[StatusReply | TaskOutcome | Registered | AgentHubError], None]

class HubConnection:
    """The connection of an agent over all its sessions, from the agent's start to its stop.

    `session` is the present one, None while there is none. `followers` are called with what concerns their task: its
    progress, its outcome, the reply to a new registration, or the error after which there will be no connection.
    `ended` is the connection loop: done, with an error, when another attempt would be pointless. `on_registered`
    returns whether the agent accepts the session.
    """

    session: Session | None
    timers: Incomplete
    followers: dict[str, Follower]
    last_failure: str
    failure: Exception | None
    is_leaving: bool
    is_closed: bool
    ended: Incomplete
    def __init__(
        self,
        connector: Connector,
        *,
        registration: Callable[[], Register],
        on_registered: Callable[[Register, Registered], bool],
        on_message: Callable[[HubMessage], None],
        give_up_after_s: float | None,
    ) -> None: ...
    async def wait(self) -> Session:
        """Return the session, waiting for one. Raises what ended the connection for good."""
    def retry_now(self) -> None:
        """Cut the present pause short: make the next attempt to connect at once."""
    async def request(
        self, message: AgentMessage, reply_type: type[Reply], within_s: float | None = ..., until: float = ...
    ) -> Reply:
        """Return the hub's reply to a message that is safe to repeat: resend it after a lost connection.

        Raises Refused if the hub refuses, TimeoutError when the loop's clock reaches `until`, or what ended the
        connection for good.
        """
    def spawn(self, coroutine: typing.Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine in the background until the connection is closed."""
    async def close(self) -> None:
        """Close the session, cancel what runs in the background, and fail whatever waits."""

@dataclass(frozen=True, slots=True)
class HandlerOptions:
    """The arguments of the decorators `capability` and `on_broadcast`; None: derived from the function."""

    name: str | None = ...
    description: str | None = ...
    input_schema: dict[str, Any] | None = ...
    output_schema: dict[str, Any] | None = ...
    is_broadcast: bool = ...

@dataclass(frozen=True, slots=True)
class HandlerSignature:
    """How a task's input becomes a handler's keyword arguments."""

    schema: dict[str, Any] | None
    validate: Validator | None
    task_parameter: str | None
    sole_parameter: str | None
    optional: frozenset[str] = ...
    @classmethod
    def of(cls, function: Callable[..., Any], hints: dict[str, Any]) -> HandlerSignature:
        """Read a function's signature. Raises ValueError if a task's input cannot become its keyword arguments."""
    def arguments(self, task: Task) -> dict[str, Any]:
        """Return the keyword arguments for a task. Raises TaskFailed(invalid_input), which names the argument."""

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

class CapabilityDecorator:
    """Make a function the handler of a capability: `@capability`, or `@capability("name", description=...)`.

    The capability is named like the function by default. The function may be async, or plain: then it runs in a
    thread. An object as input becomes its keyword arguments, checked against its annotations. The JSON Schemas come
    from the annotations too; `input_schema` and `output_schema` are announced instead of these, but inputs are still
    checked against the annotations. A method of an Agent\'s subclass takes the module\'s `capability`, any other function
    that of its agent, which raises ValueError if the capability has a handler already.
    """
    def __init__(self, register: Callable[[Callable[..., Any], HandlerOptions], None]) -> None: ...
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

capability: Incomplete

def on_broadcast(function: Function) -> Function:
    """Make a method of an Agent's subclass the one that takes broadcasts: `(message, sender)`."""

class HandlerRegistry:
    """The functions of an agent: one handler for each capability, and one function for broadcasts."""

    handlers: dict[str, Handler]
    on_broadcast: Callable[[Any, str], Any] | None
    def __init__(self) -> None: ...
    def add(self, function: Callable[..., Any], options: HandlerOptions) -> None:
        """Register a function. Raises ValueError if its capability has a handler already."""
    def handler_for(self, capability: str | None) -> Handler:
        """Return the handler of a capability; of None, the only one there is. Raises TaskFailed(no_handler)."""

class Execution:
    """One attempt at a task by a handler of this agent."""

    task_id: Incomplete
    attempt: Incomplete
    capability: Incomplete
    is_stopped: bool
    def __init__(self, message: Delegated) -> None: ...
    def start(self, coroutine: typing.Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run the handler."""
    def is_running_in(self, work: set[asyncio.Task[None]]) -> bool:
        """Return whether the handler runs in one of these."""
    def stop(self) -> None:
        """Cancel the handler. Only once, so that its cleaning up is not interrupted."""

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
    def __init__(self, agent: Agent, connection: HubConnection, execution: Execution, message: Delegated) -> None: ...
    @functools.cached_property
    def input(self) -> Any:
        """The input of the task: any JSON."""
    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline; 0 when it has passed."""
    @property
    def cancelled(self) -> bool:
        """Whether the task has ended without this handler: a plain function should check it, and return."""
    def progress(self, progress: float | None = None, detail: Any = None) -> None:
        """Report progress to the requester: a number from 0 to 1, and any JSON. From any thread.

        Raises ValueError if it is neither, Refused if it is too large. Dropped while there is no connection.
        """
    async def delegate(self, capability: str | None = None, input: Any = None, **options: Any) -> Any:
        """Delegate a subtask, as `Agent.delegate` does; it ends with this task at the latest."""
    async def submit(self, capability: str | None = None, input: Any = None, **options: Any) -> TaskHandle:
        """Submit a subtask, as `Agent.submit` does; it ends with this task at the latest."""
    def run(self, awaitable: typing.Coroutine[Any, Any, Reply]) -> Reply:
        """Run a coroutine on the agent's loop and wait for it, from a plain handler: `task.run(task.delegate(...))`."""

class DaemonThreads:
    """Runs plain functions, each in a thread of its own, so many at once.

    A thread cannot be stopped: one that ignores its task's end keeps its slot. They are daemons, so that a function
    that hangs does not keep the process alive.
    """
    def __init__(self, name: str, threads_max: int) -> None: ...
    async def run(self, function: Callable[[], Any]) -> Any:
        """Return what the function returns, or raise what it raises."""

class Worker:
    """What others delegated to an agent, from the agent's start to its stop.

    Owns the running handlers, their threads, the results that the hub has not acknowledged yet, and the broadcasts
    that wait for their handler.
    """
    def __init__(self, agent: Agent, connection: HubConnection, functions: HandlerRegistry) -> None: ...
    @property
    def running(self) -> int:
        """How many tasks run."""
    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and the hub has all results."""
    def reconcile(self, tasks: list[TaskRef]) -> bool:
        """Keep only what the hub assigns to this agent too, after a registration.

        Cancel the other handlers, resend the results that the hub still waits for, and fail the tasks that are
        not known here. Return whether these are tasks that this agent can hold.
        """
    def receive(self, message: Delegated) -> None:
        """Start the handler of a task; not a second time for the same attempt."""
    def task_ended(self, task_id: str) -> None:
        """Cancel the handler of a task that has ended without it."""
    async def stop(self) -> None:
        """Cancel the running handlers, and again after LEAVING_S seconds; log those that do not end even then."""
    def receive_broadcast(self, message: BroadcastReply) -> None:
        """Queue a broadcast for its handler, which takes one after the other."""

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
    def __init__(self, connection: HubConnection, message: Delegate) -> None: ...
    @classmethod
    async def submit(cls, connection: HubConnection, message: Delegate, patience_s: float | None) -> TaskHandle:
        """Submit a task, and return its handle when the hub has accepted it. For `Agent.submit`, which see."""
    @property
    def done(self) -> bool:
        """Whether the task has ended."""
    async def result(self, timeout_s: float | None = None) -> Any:
        """Return the task's output, waiting for it at most `timeout_s` seconds.

        Raises TaskFailed (with the hub's `code`; `hub_lost` if the hub no longer knows the task), TaskTimeout if it did
        not end within its ttl, Disconnected if the agent was stopped, TimeoutError after `timeout_s`.
        """
    @property
    def outcome(self) -> TaskOutcome | None:
        """How the task ended; None while it is open, and if this agent was stopped before it had ended."""
    async def cancel(self, reason: str = "") -> None:
        """Cancel the task; `result` then raises TaskFailed(cancelled). Without effect if it has ended."""
    def cancel_soon(self, reason: str = "its requester stopped waiting") -> None:
        """Cancel the task without waiting, where nothing can be awaited: in an `except CancelledError`.

        The cancellation is sent at once, or after the next registration if there is no connection.
        """
    def __aiter__(self) -> AsyncIterator[Progress]: ...

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

    name: str
    description: str
    url: str
    agent_id: str | None
    max_tasks: int
    metadata: dict[str, Any]
    give_up_after_s: float | None
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
    ) -> None: ...
    @property
    def capability(self) -> CapabilityDecorator:
        """Make a function the handler of a capability, named like the function by default. A decorator.

        It takes the arguments of CapabilityDecorator, and raises ValueError if the capability has a handler already.
        """
    def on_broadcast(self, function: Function) -> Function:
        """Make a function the handler of broadcasts, one after the other: `(message, sender)`. A decorator."""
    @property
    def is_online(self) -> bool:
        """Whether the agent is registered and has a connection just now."""
    def use_hub(self, hub: LocalHubLike) -> None:
        """Connect to a hub of this process instead of the one at `url`, from the next start on."""
    def run(self, *, drain_s: float = ..., loop: str = "auto") -> None:
        """Run until Ctrl-C or SIGTERM; then accept no new task and leave when the running ones have ended.

        `drain_s` limits that, in seconds; a second signal ends it at once. The event `loop` is uvloop\'s where that is
        installed; "asyncio" is the standard library\'s, and "uvloop" raises PackageMissing where it is not installed.
        """
    async def __aenter__(self) -> typing.Self: ...
    async def __aexit__(self, *_: object) -> None: ...
    async def start(self) -> None:
        """Connect, and return when the hub has registered this agent. Waits for a hub that is not running yet."""
    async def stop(self, drain_s: float = 0.0) -> None:
        """Leave the hub, waiting at most `drain_s` seconds for running tasks to end. Handles of open tasks fail."""
    async def serve(self, stopped: asyncio.Event, drain_s: float = ...) -> None:
        """Run until `stopped` is set, then drain; leave at once when cancelled. Raises what ends the connection."""
    async def connected(self, within_s: float | None = None) -> None:
        """Return when there is a connection, trying to connect now rather than after the pause of the backoff.

        Raises Disconnected if there is none after `within_s` seconds (None: wait forever), or what ended the connection
        for good.
        """
    async def delegate(self, capability: str | None = None, input: Any = None, **options: Any) -> Any:
        """Have another agent do a task, and return its output. The options are those of `submit`.

        Raises what `submit` and `TaskHandle.result` raise. Cancelling this call cancels the task.
        """
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
    async def discover(self, capability: str = "", limit: int = 100) -> list[AgentInfo]:
        """Find agents by a keyword, the best match first; the empty one finds all. At most `limit`, up to 1000."""
    async def broadcast(self, message: Any, capability: str | None = None) -> int:
        """Send any JSON to all other agents that are online (with that capability); return how many there are.

        Raises Disconnected if the connection is lost before the hub replies: then it may have been sent or not.
        """
    async def status(self, task_id: str | None = None) -> StatusReply:
        """Ask the hub about itself (in `.hub`), or about one task. Raises Refused(unknown_task)."""

class LocalHubLike(Protocol):
    """The part of a hub in its own process that an agent uses."""
    def connect(self, owner: LinkOwner) -> Awaitable[Link]: ...

async def serve(*agents: Agent, drain_s: float = ...) -> None:
    """Run agents side by side until SIGINT or SIGTERM, then drain them for at most `drain_s` seconds.

    Raises KeyboardInterrupt at once for a second signal, and the error with which an agent has ended.
    """

class CommandFailed(Exception):
    """Ends the command line with exit code 1 and this one line on stderr."""

class LogFormatter(logging.Formatter):
    """Write one line per record, unprintable characters escaped. A traceback follows, each line marked with `|`."""
    def __init__(self) -> None: ...
    def formatMessage(self, record: logging.LogRecord) -> str: ...
    def formatException(self, exc_info: Any) -> str: ...

class LogFloodFilter(logging.Filter):
    """Drop records over LOG_LINES_PER_S of one logger, and log how many were dropped. Errors always pass."""
    def __init__(self) -> None: ...
    def filter(self, record: logging.LogRecord) -> bool: ...

def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit code."""

class Command(NamedTuple):
    """A command of the command line: its help text, the function that adds its options, and the one that runs it."""

    purpose: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    log_level: str = ...
