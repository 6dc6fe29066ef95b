import argparse
import asyncio
import contextlib
import enum
import functools
import logging
import os
import socket
import sqlite3
import ssl
import types
import typing
from _typeshed import Incomplete
from asyncio import Protocol as AsyncioProtocol
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Hashable, Iterable, Mapping
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
SlotCount = int
AskNumber = int
Trace = dict[str, str]

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
    "Fenced",
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
    "JournalLike",
    "journal_of",
    "Journal",
    "Grant",
    "Access",
    "LocalHub",
    "HubServer",
    "capability",
    "on_broadcast",
    "Task",
    "Progress",
    "Piece",
    "TaskQuestion",
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
    NO_ANSWERS = "no_answers"
    NO_QUESTION = "no_question"
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
    PIECES_LOST = "pieces_lost"
    INVALID_INPUT = "invalid_input"
    BUSY = "busy"
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

class Fenced(JournalError):
    """Another hub has taken over the journal: this one must not write or say anything any more."""

class IllegalTransition(AgentHubError):
    """The table of states has no such transition: a bug in the hub. Nothing has changed."""

class CloseCode(enum.IntEnum):
    """The WebSocket close codes that the hub uses."""

    DONE = 1000
    GOING_AWAY = 1001
    NOT_ALLOWED = 1008
    TOO_BIG = 1009
    TRY_LATER = 1013
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
class Question:
    """What a worker asks the requester of its task. The answer fits the JSON Schema, if there is one."""

    text: Text
    schema: Schema | None = ...

@dataclass(slots=True, kw_only=True)
class TaskStep:
    """A step in the life of a task, `at_s` seconds ago. `agent_id` is None if no agent had a part in it.

    `event` is `accepted`, one of TaskEvent, `asked` or `answered`.
    """

    event: str
    agent_id: str | None
    attempt: int
    at_s: float

@dataclass(slots=True)
class TaskRef:
    """A task in progress at an agent, and its current attempt."""

    task_id: str
    attempt: int

@dataclass(slots=True)
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
    online_s: float | None = ...

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
    occupied: SlotCount = ...
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
    """Hand over a task to `agent_id`, or to the least loaded agent that offers `capability`. `ttl` is in seconds.

    With `answers` its worker may ask this agent something. `trace` is passed on unread: a W3C trace context, say.
    """

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
    answers: bool = ...
    trace: Trace | None = ...

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
    """Ask for the hub's status, for one task, or for the list of `tasks` (at most `limit`, in that `state`).

    From a task's worker: its `progress`, a `piece` of its output, or a `question`. From its requester: the `answer` to
    the question with the number `ask`.
    """

    type: Literal["status"] = ...
    id: RequestId | None = ...
    task_id: Id | None = ...
    tasks: bool = ...
    limit: Annotated[int, None] = ...
    state: Literal["pending", "in_progress", "completed", "failed", "timeout"] | None = ...
    progress: Fraction | None = ...
    detail: Json = ...
    piece: Json = ...
    question: Question | None = ...
    ask: AskNumber | None = ...
    answer: Json = ...

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
    progress at this agent, `features` what this hub knows of FEATURES.
    """

    type: Literal["register"] = ...
    reply_to: str | None = ...
    agent_id: Id
    resume: Id
    heartbeat_s: Annotated[float, None]
    max_bytes: Annotated[int, None]
    tasks: list[TaskRef]
    features: list[str] = field(default_factory=list)

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
    answers: bool = ...
    trace: dict[str, str] | None = ...

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
    """The status of the hub, of all tasks or of one; a worker's progress, a piece of its output or its question; or, to
    a worker, an answer or the end of its task.

    The fields of one task are those of TaskInfo, its `history`, and how many `pieces` were passed on. Only its
    requester and its assignee see `input`, `output`, `error`, `detail` and the `question` that waits for an answer.
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
    piece: Any = ...
    pieces: int | None = ...
    ask: int | None = ...
    question: Question | None = ...
    answer: Any = ...
    history: list[TaskStep] | None = ...

@dataclass(slots=True, kw_only=True)
class TaskAnswer:
    """The fields of StatusReply that bring a worker the answer to its question."""

    type: Literal["status"] = ...
    task_id: str
    state: str
    attempt: int
    sender: str
    ask: int
    answer: Json

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
HubOutput = HubMessage | TaskAck | TaskAnswer | BroadcastDelivery
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

    name: str
    value: Any
    start: int
    end: int

class Encoders(dict[type, Callable[[Any], bytes]]):
    """The function that writes the messages of a class, by class. Each is made at its first use."""
    def __missing__(self, message: type) -> Callable[[Any], bytes]: ...

class SchemaCheck:
    """Checks JSON against a JSON Schema, by the keywords that annotations become and some more.

    Others are ignored: so is `pattern`, because a regular expression of another agent may take forever.
    """
    def __init__(self, schema: Any) -> None: ...
    def check(self, value: Any) -> Any:
        """Return `value`. Raises ValidationError, which names the wrong part."""

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
    def passed_on_max(self) -> int:
        """The bytes of the largest message that the hub passes on."""
    @property
    def silence_s(self) -> float:
        """How long a connection may be silent before it is closed."""

class Close(NamedTuple):
    """Close a connection after all that was sent on it before."""

    code: int
    reason: str

Effect = tuple[Any, HubOutput | Close]
LifeStep = tuple[str, str, int, float]

@dataclass(slots=True, kw_only=True)
class Talk:
    """A question of a task's worker, and its answer (None: not yet). A repeated one has the same `message_id`."""

    ask: int
    message_id: str | None
    question: Question
    answer: bytes | None = ...
    bytes: int = ...

class TaskLife(NamedTuple):
    """What a journal keeps of a task beside its state."""

    steps: tuple[LifeStep, ...] = ...
    asked: int = ...
    talk: Talk | None = ...

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
    pieces: int = ...
    asked: int = ...
    talk: Talk | None = ...
    begun_at: float = ...
    listed_steps: tuple[LifeStep, ...] | None = ...
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
    def ask_reply(self, reply_to: str) -> StatusReply:
        """Return the reply to its question, with the number of that."""
    def delivery(self, worker: AgentRecord, now: float) -> Delegated:
        """Return the message that hands it to a worker, with the time to live that is left."""
    def progress_report(self, piece: Any = None) -> StatusReply:
        """Return the message that passes its progress, or a piece of its output, on to its requester."""
    def add_step(self, event: str, agent: AgentRecord, now: float) -> None:
        """Note a step between its acceptance and its end, in which an agent had a part."""
    @property
    def steps(self) -> tuple[LifeStep, ...]:
        """The steps between its acceptance and its end, the last STEPS_MAX.

        Most tasks are only assigned once. So that step is not listed until another follows.
        """
    def history(self, now: float) -> list[TaskStep]:
        """Return its life so far: its acceptance, what happened then, and its end."""
    @property
    def last_event(self) -> TaskEvent:
        """The event that ended it."""
    @property
    def question(self) -> Talk | None:
        """The question that waits for an answer."""
    @property
    def has_answer(self) -> bool:
        """Whether the last question of its present attempt was answered."""
    def question_report(self) -> StatusReply:
        """Return the message that passes its question on to its requester."""
    def answer_delivery(self) -> TaskAnswer:
        """Return the message that passes the answer on to its assignee."""
    def check_party(self, agent: AgentRecord, party: AgentRecord | None) -> None:
        """Refuse a message that only one of its two parties may send."""
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
    online_at: float = ...
    drain_id: str | None = ...
    name: str = ...
    description: str = ...
    capabilities: dict[str, Capability] = field(default_factory=dict)
    words: dict[str, None] = field(default_factory=dict)
    max_tasks: int = ...
    occupied: int = ...
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
    questions: dict[str, TaskRecord] = field(default_factory=dict)
    undelivered: dict[str, TaskRecord] = field(default_factory=dict)
    delivered: int = ...
    @property
    def free_load(self) -> int | None:
        """How many tasks it runs, if it can take one more; else None."""
    @property
    def is_needed(self) -> bool:
        """Whether an agent that is gone may still want something, or be wanted, when it comes back."""
    def targets(self) -> list[tuple[tuple[str | None, str | None], AgentRecord | None]]:
        """Return the targets of the tasks that it may take, each with the requester whose tasks it must not."""
    def info(self, now: float) -> AgentInfo: ...
    def session(self, reply_to: str, settings: HubSettings) -> Registered:
        """Return the reply to its registration."""
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
    is_doubted: bool = ...
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
    life: TaskLife = ...

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
    def __len__(self) -> int: ...
    def push(self, task: TaskRecord, turn: int) -> None: ...
    def discard(self, task: TaskRecord) -> None: ...
    def take_turn(self, requester: AgentRecord, turn: int) -> None:
        """Put a requester that was served, here or in another queue, behind the others."""
    def first(self, excluding: AgentRecord | None) -> tuple[tuple[int, int, int], TaskRecord] | None:
        """Return the first task in line whose requester is not `excluding`, and its place: least goes first."""

class PendingTasks:
    """The pending tasks, each in the queue of its target, and whose turn is next over all queues.

    `agents` are the directory's, by id. The tasks that name one of them are kept in its `awaited`.
    """

    queues: dict[tuple[str | None, str | None], PendingQueue]
    by_requester: dict[AgentRecord, int]
    def __init__(self, agents: Mapping[str, AgentRecord]) -> None: ...
    def push(self, task: TaskRecord) -> None: ...
    def discard(self, task: TaskRecord) -> None: ...
    def first_for(self, agent: AgentRecord) -> TaskRecord | None:
        """Return the task that an agent gets next, if one waits that it may take."""
    def take_turn(self, task: TaskRecord, agent: AgentRecord) -> None:
        """Take a task out for an agent; in all queues of that agent the requester goes behind the others."""
    def longest(self) -> dict[str, int]:
        """Return how many tasks wait for whom offers a capability, for those with most of them."""
    def most(self) -> dict[str, int]:
        """Return how many tasks wait, by the ids of the requesters that have most of them."""

class InvertedIndex(Generic[Item]):
    """Finds items by any of their keys. It is limited: items that do not fit are scanned one by one."""

    listed_count: int
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

    by_part: InvertedIndex[Pool]
    by_word: InvertedIndex[AgentRecord]
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
    states: Incomplete
    gone: dict[str, AgentRecord]
    pools: dict[str, Pool]
    index: Incomplete
    registrations_bytes: int
    changed: dict[AgentRecord, bool]
    def __init__(self, agents_max: int, *, is_journaled: bool) -> None: ...
    def mark(self, agent: AgentRecord, is_kept: bool = True) -> None:
        """Have an agent's row written, or deleted, by this step."""
    def take_changes(self, changes: Changes) -> None:
        """Add the rows of the agents that changed since the last step."""
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
    def update_load(self, agent: AgentRecord, is_listed: bool = True) -> None:
        """List an agent in its pools under its present load; unless `is_listed`, it is offered no task until then."""
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
    def search(self, keyword: str, limit: int, bytes_max: int, now: float) -> tuple[list[AgentInfo], int, int]:
        """Return the online agents that match a keyword, the best first, as many as fit; how many match; and how many
        were looked at.
        """

class Histogram:
    """How many durations fell between the bounds of SECONDS, the last ones above them all, and their sum."""

    counts: Incomplete
    sum_s: float
    def __init__(self) -> None: ...
    def add(self, seconds: float) -> None: ...

class TaskTable:
    """The records of all tasks, each in one of three dictionaries, with their counts and sizes.

    `open` are those not in a final state, in the order of acceptance. A task that ends moves on to `delivered` if its
    outcome was sent (or nobody is left to send it to), or else to `undelivered` until its requester is back; both are
    in the order of their ends, so that the oldest go first. Requesters, parents and the counts are kept in step here;
    the Hub decides which agent runs a task.
    """

    settings: Incomplete
    open: dict[str, TaskRecord]
    delivered: dict[str, TaskRecord]
    undelivered: dict[str, TaskRecord]
    pending_count: int
    running: dict[str | None, int]
    ended: Incomplete
    dropped: Incomplete
    codes: dict[tuple[TaskState, str], int]
    restored: int
    queued: int
    queued_s: Incomplete
    ran_s: Incomplete
    bytes: int
    ended_bytes: int
    bytes_max: Incomplete
    sequence: int
    changed: dict[TaskRecord, bool]
    def __init__(self, settings: HubSettings, directory: Directory, *, is_journaled: bool) -> None: ...
    def find(self, task_id: str) -> TaskRecord | None: ...
    def known_task(self, task_id: str) -> TaskRecord:
        """Return a task; refuse an id that is not known."""
    def open_task(self, task_id: str) -> TaskRecord:
        """Return a task that has not ended; refuse any other."""
    def parent(self, agent: AgentRecord, parent_id: str) -> TaskRecord:
        """Return the task that an agent may delegate a subtask of."""
    def newest(self, message: Status, now: float, bytes_max: int) -> tuple[list[Any], int]:
        """List the open tasks, those with an outcome to deliver, and the others, the newest first, as many as fit and
        are asked for. Return the list, and how many records were looked at for it.

        Each is the JSON text of a TaskInfo: its size is needed here, so the reply does not write it again.
        """
    def report(self, task: TaskRecord, viewer: AgentRecord | None, reply_to: str | None, now: float) -> StatusReply:
        """Return what the viewer may see of a task, as much as fits into one message: its output always does."""
    def total(self, state: str | None) -> int:
        """Return how many tasks are kept, in a state or in all."""
    @property
    def counts(self) -> dict[TaskState, int]:
        """How many tasks are kept, by state."""
    @property
    def in_progress(self) -> int:
        """How many tasks are in progress."""
    @property
    def accepted(self) -> int:
        """How many tasks were accepted, without those of a journal."""
    @property
    def waited_s(self) -> Histogram:
        """How long tasks waited for their first assignment; those that were not queued did not wait."""
    def most_running(self) -> dict[str, int]:
        """Return how many tasks are in progress, for the capabilities with most of them."""
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
        """Take one step of the table. Nothing else assigns a task's state; `error` and `ended_at` are set before."""
    def assign(self, task: TaskRecord, agent: AgentRecord, now: float) -> None:
        """Begin an attempt of a pending task. The caller updates the agent's load."""
    def ask(self, task: TaskRecord, message: Status, agent: AgentRecord, now: float, message_bytes: int) -> None:
        """Keep the question of a task's assignee instead of the one before, unless that was sent again."""
    def answer(self, task: TaskRecord, message: Status, agent: AgentRecord, now: float, message_bytes: int) -> None:
        """Keep the answer to the question that waits for one."""
    def forget_talk(self, task: TaskRecord) -> None:
        """Drop the last question of a task, and its answer."""
    def grow(self, task: TaskRecord, size: int) -> None:
        """Count `size` more bytes (less, if negative) in the record of an open task."""
    def keep_undelivered(self, task: TaskRecord) -> None: ...
    def take_undelivered(self, task: TaskRecord) -> None: ...
    def keep_delivered(self, task: TaskRecord) -> None: ...
    def take_delivered(self, task_id: str) -> TaskRecord | None:
        """Take a task out of `delivered`; return it if it was there."""
    def check_limits(self, agent: AgentRecord, message_bytes: int) -> None:
        """Refuse a task too many of an agent; drop ended tasks if its record needs their bytes."""
    def reserve(self, needed: int, agent: AgentRecord | None) -> None:
        """Drop ended tasks if so many more bytes need their room; refuse what needs them if that is not enough."""
    @property
    def records_bytes(self) -> int:
        """What all records take together, with the registrations of agents."""
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
    `is_held(link)` returns whether messages of a connection came in that wait to be handled: then it is not silent.
    `directory`, `tasks`, `pending`, `connections` and `deadlines` are for reading.
    """

    full_reason: str
    settings: HubSettings
    directory: Incomplete
    tasks: Incomplete
    pending: Incomplete
    shutting_down: bool
    is_full: bool
    is_unlinked: bool
    cost: float
    connections: dict[Hashable, Connection]
    deadlines: LazyHeap[TaskRecord | AgentRecord | Connection]
    next_sweep: Incomplete
    def __init__(
        self,
        settings: HubSettings,
        *,
        entropy: Callable[[int], bytes],
        now: float,
        is_journaled: bool = False,
        is_held: Callable[[Any], bool] = ...,
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
    def journal_state(self) -> str:
        """Return "none", "ok", or why it accepts no new task: "full", or "gone" if its file was removed or replaced."""
    def summary(self) -> dict[str, Any]:
        """Return what `status` reports of the hub itself."""
    def restore(self, agents: Iterable[AgentRow], tasks: Iterable[TaskRow], redeliver_after: float) -> Step:
        """Continue from the rows of a journal, before any other call. Each agent gets a new grace period.

        Outcomes of tasks that ended after `redeliver_after` are delivered again: the last ones may have been lost with
        the hub.
        """

StoredMessage = TypeVar("StoredMessage")

class JournalLike(Protocol):
    """What a hub needs of its journal. The methods may be called from any thread, one at a time.

    `lease_s` is how long after the start of a successful write no other hub can take the journal over; infinite if no
    other hub can while this process lives.
    """

    path: str
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

class Journal:
    """Persists a hub\'s tasks and agents in a file. `open` it, `load` once, then `write`, and `close`.

    With `sync` "full", `write` returns when the data would survive a power loss; with "normal", when it would survive
    the end of the process (https://sqlite.org/pragma.html#pragma_synchronous). The methods may be called from any
    thread, one at a time.
    """

    path: str
    sync: str
    lease_s: float
    has_file: bool
    unchanged: str
    database: sqlite3.Connection | None
    def __init__(self, path: str | os.PathLike[str], *, sync: str = "full") -> None: ...
    def of_namespace(self, namespace: str) -> Journal:
        """Return the journal of another namespace: the file next to this one with `.NAMESPACE` appended."""
    def namespaces(self) -> list[str]:
        """Return the namespaces that have a file here, which for `default` is this one."""
    def open(self, *, wait: bool = True) -> None:
        """Open the file, or create it, and lock it for this process. Raises JournalError; then no file was changed.

        `wait` has no effect: a file that another hub has locked is an error, also for a moment.
        """
    def close(self) -> None:
        """Close the file, which unlocks it. No effect if it is closed."""
    def load(self, clock_offset: float) -> tuple[list[AgentRow], list[TaskRow], float]:
        """Return all agents, all tasks, and the time of the last change to a task. Raises JournalError if damaged.

        `clock_offset` is the difference between the seconds since 1970 and the hub's clock.
        """
    def write(self, changes: Changes, clock_offset: float) -> None:
        """Write all changes in one transaction. Raises sqlite3.Error; then nothing was written, and a retry is safe."""
    def is_in_place(self) -> bool:
        """Return whether the path still leads to the file that was opened. If not, a restart would lose all in it."""
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

    waiters: list[asyncio.Future[None]]
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
    """What all links share: decoding for the owner, and calling its `closed` once.

    The attributes that each message needs are slots, here and in `LocalHub`: instances with more than 30 attributes of
    other kinds have slower ones (SHARED_KEYS_MAX_SIZE in CPython's Objects/dictobject.c).
    """

    address: str
    grant: Any
    is_backlogged: bool
    gone: Incomplete
    writable: Incomplete
    def __init__(self, owner: LinkOwner, decode: Callable[[bytes], Any]) -> None: ...
    @property
    def is_held(self) -> bool:
        """Whether what it has sent waits to be handled, for a reason other than itself."""
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
    def waits(self, cost: float, handle: Callable[[], None]) -> bool:
        """Return False if what costs that much may be handled now; else call `handle` later, and nothing before it."""
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

    It may be overdrawn, by at most PAUSE_MAX_S seconds' worth: whoever takes tokens that are not there calls `refill`.
    Pure arithmetic: the time is given.
    """

    tokens: Incomplete
    def __init__(self, rate: float, now: float) -> None: ...
    def refill(self, now: float) -> float:
        """Add the tokens earned since the last call; return how many seconds to pause, 0 if none are owed.

        Called when the bucket is empty instead of for each message, so that most messages need no clock.
        """

class Traffic:
    """What all connections of a server sent and received together."""

    bytes_in: int
    rate_limited_s: float
    def __init__(self) -> None: ...

class InputBudget:
    """Limits what all connections of a server keep of messages that are not complete, or that wait to be handled.

    Only connections that keep more than READ_BYTES count. Beyond the limit, of the address that keeps most the
    connection that has done so for longest is closed, as its message is the least likely to be completed.
    """

    total: int
    def __init__(self, message_bytes_max: int) -> None: ...
    def keep(self, link: ServerLink, size: int) -> None:
        """Count that a connection keeps so many bytes of input now."""
    def release(self, link: ServerLink) -> None:
        """Count a connection no more, if it did."""

class Turns:
    """Decides whose input is handled next when there is more than one turn of the loop should take.

    Nobody waits until messages have cost TURN_COST: that ends a turn, which may have been several of the loop. After
    that, and while any connection waits, each waits with what it has sent beyond its first message, and with anything
    that costs much, until the loop's next turn. Those that wait are served by self-clocked fair
    queueing (https://doi.org/10.1109/INFCOM.1994.337677): the one goes first whose input would be finished first if all
    were handled at the same time. All connections of one address, and those of one token, have the share of one.
    """

    left: float
    addresses: dict[str, int]
    grants: dict[str, int]
    traffic: Incomplete
    input_budget: Incomplete
    def __init__(self, loop: asyncio.AbstractEventLoop, message_bytes_max: int = ...) -> None: ...
    @property
    def is_crowded(self) -> bool:
        """Whether connections wait, so that the next turn of the loop takes long."""
    def arm(self) -> None:
        """Have the next turn begin with the loop's."""
    def wait(self, link: ServerLink, cost: float, handle: Callable[[], None]) -> None:
        """Call `handle`, which is expected to cost that much, when it is the link's turn."""
    def move(self, link: ServerLink, address: str) -> None:
        """Count a connection for another address from now on."""
    def leave(self, link: ServerLink) -> None:
        """Count a connection no more."""

class WebSocketLink(Link, AsyncioProtocol):
    """One end of a WebSocket: moves bytes between a socket and a `WebSocketProtocol`, and tells its owner the events.

    What is sent in one turn of the loop goes out together, at its end or when it is more than OUT_BYTES_MAX, so the
    replies to the messages of a chunk share their writes.
    """

    pause_reasons: set[str]
    protocol: Incomplete
    loop: Incomplete
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
    """The hub's end of a WebSocket. `answer(link, request)` returns the answer to a plain HTTP request, else None.

    A peer that sends more than `messages_per_s_max` (0: no limit) is read from more slowly. With half of
    `backlog_bytes_max` unread it is a slow consumer: it is not read from either, and what is sent waits here. It is
    disconnected beyond that limit, or when it has read nothing for STALLED_S seconds: the answer to a close would
    come behind the very bytes that it does not read.
    """

    address: Incomplete
    is_proxied: bool
    bearer: str | None
    grant_name: str
    turns: Incomplete
    traffic: Incomplete
    finish_time: float
    is_answered: bool
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
        on_gone: Callable[[ServerLink], None] = ...,
        turns: Turns | None = None,
    ) -> None: ...
    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...
    def connection_lost(self, error: Exception | None) -> None: ...
    @property
    def is_held(self) -> bool: ...
    def limit_messages(self, bytes_max: int) -> None:
        """Accept no larger messages from now on."""
    def charge(self, cost: float) -> None: ...
    def waits(self, cost: float, handle: Callable[[], None]) -> bool: ...
    def data_received(self, data: bytes) -> None: ...
    def resume_reading(self, reason: str) -> None: ...
    def close_unfinished(self) -> None:
        """Close a connection whose input takes the memory of others."""
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

class HubUrls:
    """The URLs of a hub and its standbys, comma-separated; `connect` tries them in turn, the last good one first."""

    urls: Incomplete
    def __init__(self, urls: str, *, token: str | None = None, ca_file: str | None = None) -> None: ...
    async def connect(self, owner: LinkOwner) -> Link:
        """Open a WebSocket to the first hub that accepts one. Raises as `connect_websocket`, with all reasons."""

Job = Callable[[], Callable[[], None] | None]

class DaemonThreads:
    """Runs plain functions in threads, which are reused; there are as many as functions ran at once, at most so many.

    A thread cannot be stopped. They are daemons, so that a function that hangs does not keep the process alive.
    """
    def __init__(self, name: str, threads_max: float = ...) -> None: ...
    def start(self, job: Job) -> None:
        """Call a function in an idle thread, or in a new one if there is none, and then the function that it returns.

        Neither may raise. The second hands over the outcome of the first: the thread counts as idle before that.
        """
    def close(self) -> None:
        """End each thread as soon as its function has returned."""
    async def run(self, function: Callable[[], Any], on_returned: Callable[[], None] | None = None) -> Any:
        """Return what the function returns, or raise what it raises.

        `on_returned` is called on the loop when the thread is free again, also if this call was cancelled before.
        """

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

class HttpAnswer(NamedTuple):
    """The answer to a plain HTTP request, or to a handshake that is rejected. The connection ends with it."""

    status: int
    text: str
    content_type: str = ...
    headers: tuple[tuple[str, str], ...] = ...

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
    method: str
    close_sent: CloseFrame | None
    close_rcvd: CloseFrame | None
    position: int
    unsent_bytes: int
    def __init__(self, message_bytes_max: int, *, is_server: bool, apply_mask: ApplyMask) -> None: ...
    def limit_messages(self, bytes_max: int) -> None:
        """Accept no larger messages from now on."""
    @property
    def unread_bytes(self) -> int: ...
    @property
    def kept_bytes(self) -> int:
        """How many bytes of messages are kept that are not complete, or were not asked for yet."""
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
    def reject(self, answer: HttpAnswer) -> None:
        """Send a plain HTTP response, without its body if the method is HEAD, after which the connection ends."""
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
    def reject(self, answer: HttpAnswer) -> None: ...

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
    def reject(self, answer: HttpAnswer) -> None: ...
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

    next_at: Incomplete
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
    connect. `served` are the only namespaces whose tokens are valid here (None: all). `rejected` counts rejections, by
    reason.
    """

    access: Incomplete
    origins: frozenset[str]
    knows_own_pages: bool
    rejected: dict[str, int]
    unauthenticated: dict[Link, Unauthenticated]
    def __init__(
        self,
        access: Access | None,
        names: frozenset[str] | None,
        admit: Callable[[Link, Grant | None], LinkOwner],
        served: frozenset[str] | None = None,
    ) -> None: ...
    def check_request(self, link: Link, request: Any) -> HttpAnswer | None:
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
    are merged into the next one. Heartbeats and `overloaded` errors do not wait. Calls `on_lost` when this hub must
    end, because its lease is lost or may be.
    """

    held: list[Effect]
    commits: Incomplete
    failures: int
    idle: Incomplete
    def __init__(
        self,
        hub: Hub,
        journal: JournalLike,
        carry_out: Callable[[list[Effect]], None],
        on_lost: Callable[[JournalError], None],
    ) -> None: ...
    def add(self, step: Step) -> None:
        """Carry out the effects of a step: now if nothing waits to be written before them, else as soon as it is."""
    def charge(self, link: Link, cost: float) -> None:
        """Charge a link for a message. If it has cost much during one write, it is not read until that is done."""
    async def close(self, within_s: float) -> None:
        """Write the changes that are left, for at most `within_s` seconds, and close the journal."""
    def abandon(self) -> None:
        """Drop all that is held, and close the journal without another write."""
    async def flush(self, within_s: float) -> None:
        """Return when nothing is held any more, or after `within_s` seconds."""
    @property
    def is_overfull(self) -> bool:
        """Whether so much is held that no more messages should be handled."""
    @property
    def is_silent(self) -> bool:
        """Whether the lease may be over, so that nothing may be said before the next write has succeeded."""
    def check_disk(self) -> None:
        """Check whether the journal's file is in its place, and whether the disk has free space."""
    def check_place(self) -> None:
        """Check now whether the journal's file is in its place."""

class Metric(NamedTuple):
    """A family of samples: one number, one for each combination of values of its labels, or a histogram."""

    kind: str
    name: str
    purpose: str
    numbers: float | Mapping[Any, float] | Histogram
    labels: tuple[str, ...] = ...

class LoopLag:
    """Measures how late the timers of the loop are: that is how long a message waits at worst before it is read."""
    def __init__(self) -> None: ...
    def start(self, loop: asyncio.AbstractEventLoop) -> None: ...
    @property
    def worst_s(self) -> float:
        """The worst of the last LAG_SAMPLES samples, in seconds."""
    def stop(self) -> None: ...

class LocalHub:
    """A hub in this process, reached over in-memory links: for tests, and for programs of one process.

        async with LocalHub() as hub, Agent("a", hub=hub) as a:
            ...

    Ends with the `async with`, or with `stop`. Everything happens on the loop it was started on. With a `journal`,
    which it opens and closes, `start` continues from what is in it, and raises JournalError if that is impossible.
    Where another hub can take the journal over, `start` waits for its lease, and `lost` fails with a JournalError when
    this hub has ended because of that.
    """

    settings: HubSettings
    hub: Hub
    lost: asyncio.Future[None]
    journal: Incomplete
    commit: GroupCommit | None
    links: dict[Link, None]
    messages_in: int
    is_running: bool
    def __init__(self, settings: HubSettings | None = None, *, journal: JournalLike | None = None) -> None: ...
    async def __aenter__(self) -> typing.Self: ...
    async def __aexit__(self, *_: object) -> None: ...
    async def start(self) -> None: ...
    def shut_down(self) -> None:
        """Accept no new task from now on."""
    async def stop(self, drain_s: float = 0.0) -> None:
        """Accept no new task, give those in progress `drain_s` seconds, then close all links with 1001.

        If another hub can take the journal over, tasks are not waited for: they go on there.
        """
    async def connect(self, owner: LinkOwner) -> Link:
        """Open a link to this hub from within its process."""
    def opened(self, link: Link) -> None: ...
    def received(self, link: Link, message: Any, message_bytes: int, has_turn: bool = False) -> None: ...
    def closed(self, link: Link, code: int, reason: str) -> None: ...

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

    page: typing.ClassVar[str]
    host: str
    port: int
    access: Incomplete
    namespaces: dict[str, LocalHub]
    is_standby: bool
    sockets: dict[ServerLink, None]
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
        backlog_bytes_max: int = ...,
        connections_per_address_max: int = ...,
        messages_per_s_max: float = ...,
        journal: JournalLike | None = None,
        namespaces: Iterable[str] | None = None,
        has_page: bool = True,
    ) -> None: ...
    @property
    def url(self) -> str: ...
    @property
    def addresses(self) -> dict[str, int]:
        """The number of connections from each address; none before the start."""
    @property
    def rejected(self) -> dict[str, int]:
        """The number of rejected connections and attempts to authenticate, by reason; none before the start."""
    turns: Incomplete
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
    def accept(self, connection: socket.socket, address: str) -> None: ...
    @classmethod
    def set_page(cls, html: str) -> None:
        """Have all servers show this page to browsers. Section 10 does so, which comes last."""
    def metrics(self) -> list[Metric]:
        """Return the metrics that the namespaces of this server share."""

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
    features: Collection[str]
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
    @property
    def is_writable(self) -> bool:
        """Whether its buffer has room."""
    def send_nowait(self, raw: bytes) -> None:
        """Send a message that may be missed: drop it if the session is closed or its buffer is full."""
    def send_request(
        self,
        message: AgentMessage,
        on_reply: Callable[[HubMessage | AgentHubError], None],
        message_id: str | None = None,
    ) -> None:
        """Send; `on_reply` gets the reply before any message behind it, or Disconnected. Raises as `encode` does.

        `message_id` is of this session by default, and then only digits.
        """
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
    def probe(self) -> None:
        """Send a heartbeat, and abort the connection if nothing arrives within PROBE_S seconds."""
    def abort(self) -> None:
        """Cut a connection that is of no more use, without a close handshake."""
    async def close(self) -> None:
        """Close, and return when nothing is left of the connection."""
    def opened(self, link: Link) -> None: ...
    def received(self, link: Link, message: Any, message_bytes: int) -> None: ...
    def closed(self, link: Link, code: int, reason: str) -> None: ...

class Backoff:
    """How long to wait before the next attempt: a random time up to a limit that doubles from 0.5 s to 30 s.

    A hub that was there is expected back soon: until then the limit is 6 s, and with a standby 1.5 s for the first
    30 s. Starts over only after a connection that lasted longer than the present limit; otherwise agents would storm a
    hub that accepts their connections and drops them.
    """
    def __init__(self, *, has_standby: bool = False) -> None: ...
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
    renewed_at: Incomplete
    accepted: set[str | None]
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
        has_token_file: bool = False,
        has_standby: bool = False,
    ) -> None: ...
    def check_loop(self) -> None:
        """Raise RuntimeError unless the caller runs on the event loop of this connection: nothing here has locks."""
    @property
    def is_on_loop(self) -> bool:
        """Whether the caller runs on the event loop of this connection."""
    def call_on_loop(self, coroutine: typing.Coroutine[Any, Any, Output]) -> asyncio.Future[Output]:
        """Run a coroutine on the event loop of this connection, from another one."""
    def call_soon(self, function: Callable[[], object]) -> None:
        """Call a function on the event loop of this connection: at once there, soon from another thread."""
    async def wait(self) -> Session:
        """Return the session, waiting for one. Raises what ended the connection for good."""
    def retry_now(self) -> None:
        """Cut the present pause short: make the next attempt to connect at once."""
    async def request(
        self,
        message: AgentMessage | Callable[[Session], AgentMessage],
        reply_type: type[Reply],
        within_s: float | None = ...,
        until: float = ...,
    ) -> Reply:
        """Return the hub's reply to a message that is safe to repeat: resend it after a lost connection.

        A function makes the message for each session. Raises Refused if the hub refuses, TimeoutError when the
        loop's clock reaches `until`, or what ended the connection for good.
        """
    async def in_thread(self, function: Callable[[], Any]) -> Any:
        """Return what a plain function returns, which may block."""
    def spawn(self, coroutine: typing.Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine in the background until the connection is closed."""
    async def close(self) -> None:
        """Close the session, cancel what runs in the background, and fail whatever waits."""

@dataclass(frozen=True, slots=True, eq=False, repr=False)
class HandlerOptions:
    """The arguments of the decorators `capability` and `on_broadcast`; None: derived from the function."""

    name: str | None = ...
    description: str | None = ...
    input_schema: dict[str, Any] | None = ...
    output_schema: dict[str, Any] | None = ...
    is_broadcast: bool = ...

class PythonType:
    """The JSON of a Python type: its JSON Schema, and the validator that makes a value of it."""

    kind: Incomplete
    def __init__(self, kind: Any) -> None: ...
    def schema(self, types: TypeReader) -> dict[str, Any]: ...
    def validator(self, types: TypeReader) -> Validator:
        """Raises ValueError if a part of it has no JSON."""

class TypeReader:
    """Makes the JSON Schemas and the validators of the annotations of one function.

    A class that holds itself is defined once, in `definitions`, which go into the whole schema as `$defs`.
    """

    definitions: dict[str, Any]
    is_output: Incomplete
    def __init__(self, *, is_output: bool = False) -> None: ...
    def schema(self, annotation: Any) -> dict[str, Any]: ...
    def whole_schema(self, annotation: Any) -> dict[str, Any]:
        """Return a schema that stands alone."""
    def validator(self, annotation: Any) -> Validator:
        """Raises ValueError for a type that has no JSON."""
    @property
    def definitions_part(self) -> dict[str, Any]: ...
    def define(self, name: str, schema: Any) -> str:
        """Add a definition under this name, or a longer one if that is taken; return the name."""

class AliasType(PythonType):
    """Another name of a type, its `kind`."""
    def schema(self, types: TypeReader) -> dict[str, Any]: ...
    def validator(self, types: TypeReader) -> Validator: ...

class EnumType(PythonType):
    """An Enum, by the values of its members."""
    def schema(self, types: TypeReader) -> dict[str, Any]: ...
    def validator(self, types: TypeReader) -> Validator: ...

class TextType(PythonType):
    """A date, a time, a Decimal, a UUID or a path."""

    format: Incomplete
    def __init__(self, kind: Any, text_format: str) -> None: ...
    @classmethod
    def of(cls, kind: type) -> TextType | None: ...
    def schema(self, types: TypeReader) -> dict[str, Any]: ...
    def validator(self, types: TypeReader) -> Validator: ...

class ObjectType(PythonType):
    """A dataclass or a TypedDict: an object with the fields that it takes."""
    def fields(self) -> list[tuple[str, Any, bool]]:
        """Return the name, the annotation and whether it is required, of each field."""
    def schema(self, types: TypeReader) -> dict[str, Any]: ...
    def validator(self, types: TypeReader) -> Validator: ...

class ArrayType(PythonType):
    """An array whose items all have the type `rest`, or have the types `heads`, one each.

    An array may end early, but not before it has `least` items.
    """

    rest: Incomplete
    heads: Incomplete
    least: Incomplete
    names: Incomplete
    def __init__(
        self,
        make: Callable[[list[Any]], Any],
        rest: Any = None,
        heads: tuple[Any, ...] = (),
        least: int = 0,
        names: tuple[str, ...] = (),
    ) -> None: ...
    @classmethod
    def of(cls, annotation: Any, kind: Any, arguments: tuple[Any, ...]) -> ArrayType: ...
    @classmethod
    def of_named_tuple(cls, kind: Any) -> ArrayType: ...
    def schema(self, types: TypeReader) -> dict[str, Any]: ...
    def validator(self, types: TypeReader) -> Validator: ...

class MappingType(PythonType):
    """An object whose keys or values have a type of their own. A key that is no text is written as its JSON."""

    key: Incomplete
    value: Incomplete
    def __init__(self, kind: Any, key: Any, value: Any) -> None: ...
    def schema(self, types: TypeReader) -> dict[str, Any]: ...
    def validator(self, types: TypeReader) -> Validator: ...

class ModelType(PythonType):
    """A model or a dataclass of Pydantic, which checks it."""
    def schema(self, types: TypeReader) -> dict[str, Any]: ...
    def validator(self, types: TypeReader) -> Validator: ...

@dataclass(frozen=True, slots=True, eq=False, repr=False)
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

@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Handler:
    """The function that does the tasks of one capability."""

    function: Callable[..., Any]
    capability: Capability
    signature: HandlerSignature
    is_async: bool
    piece: Any = ...
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
    around_task: Callable[[Task], contextlib.AbstractContextManager[None]] | None
    def __init__(self) -> None: ...
    def add(self, function: Callable[..., Any], options: HandlerOptions) -> None:
        """Register a function. Raises ValueError if its capability has a handler already."""
    def handler_for(self, capability: str | None) -> Handler:
        """Return the handler of a capability; of None, the only one there is. Raises TaskFailed(no_handler)."""

class OpenQuestion:
    """A question of a handler to the requester of its task, until its answer has come: `answer` is a future.

    It has the same id in all sessions, by which the hub knows that it is the same question: it replies with the same
    number, and delivers the answer again.
    """

    answer: asyncio.Future[Any]
    def __init__(self, connection: HubConnection, task_id: str, question: Question) -> None: ...
    def send(self) -> None:
        """Send it, for the first time or again; without a connection, the worker does after the next registration."""
    def receive(self, message: StatusReply) -> None:
        """Take the answer, unless it is that to an earlier question again."""
    def fail(self, error: Exception) -> None:
        """Have the handler raise an error instead of getting an answer."""

class Execution:
    """One attempt at a task by a handler of this agent.

    It waits for a slot, and then takes that until its coroutine and its thread have both ended, which may be later than
    its task. `worker` is told when it `finished`, and when it overstays.
    """

    task_id: Incomplete
    attempt: Incomplete
    capability: Incomplete
    question: OpenQuestion | None
    is_stopped: bool
    is_overstaying: bool
    in_thread: bool
    work: asyncio.Task[None] | None
    def __init__(self, worker: Worker, message: Delegated) -> None: ...
    @property
    def is_over(self) -> bool:
        """Whether nothing of it runs any more."""
    def start(self, coroutine: typing.Coroutine[Any, Any, None], *, at_once: bool) -> asyncio.Task[None]:
        """Run the handler. `at_once` runs its first step now, where the loop can: in Python 3.12 and newer."""
    def stop(self) -> None:
        """Cancel the handler. Only once, so that its cleaning up is not interrupted."""
    def is_run_by(self, work: asyncio.Task[Any] | None) -> bool:
        """Return whether the handler runs in this task of the loop."""
    def thread_returned(self) -> None:
        """Note that its thread is free again."""
    def overstay(self) -> None:
        """Note that the handler goes on though its task has ended."""

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
    def send_piece(self, piece: Any) -> None:
        """Send the requester a piece of the output, for a handler that does not yield but returns the whole output.

        The pieces are the beginning of that: parts of a text, or items of a list. So all are dropped once one was,
        because the connection was lost or its buffer is full. None is no piece. From any thread; raises as `progress`
        does.
        """
    async def ask(self, text: str, schema: Any = None) -> Any:
        """Ask the requester something, and return its answer: any JSON that fits `schema`. The ttl goes on.

        `schema` is a JSON Schema, or an annotation like that of a parameter: `Literal["main", "develop"]`. A question
        waits until the one before is answered. Raises TaskFailed, with the code `no_answers` if the requester cannot
        be asked and `invalid_input` if the answer does not fit; Refused if it is too large; ValueError for a text or a
        schema that the protocol does not allow.
        """
    async def delegate(self, capability: str | None = None, input: Any = None, **options: Any) -> Any:
        """Delegate a subtask, as `Agent.delegate` does; it ends with this task at the latest, and has its `trace`."""
    async def submit(self, capability: str | None = None, input: Any = None, **options: Any) -> TaskHandle:
        """Submit a subtask, as `Agent.submit` does; it ends with this task at the latest, and has its `trace`."""
    def stream(self, capability: str | None = None, input: Any = None, **options: Any) -> AsyncIterator[Any]:
        """Stream a subtask, as `Agent.stream` does; it ends with this task at the latest, and has its `trace`."""
    def run(self, awaitable: typing.Coroutine[Any, Any, Reply]) -> Reply:
        """Run a coroutine on the agent's loop and wait for it, from a plain handler: `task.run(task.delegate(...))`."""

class PieceSender:
    """Sends the pieces of a task's output as a generator yields them: texts together, PIECES_PER_S times a second.

    The pieces that were sent are always the start of the output. So it stops when the connection is lost, as pieces may
    be lost with it: the requester gets the rest with the output.
    """
    def __init__(self, connection: HubConnection, execution: Execution) -> None: ...
    async def send_all_async(self, generator: AsyncGenerator[Any, None]) -> None: ...
    def send_all(self, generator: typing.Generator[Any, None, Any]) -> Any:
        """Return what the generator returns. Runs in a thread."""
    def output(self, annotation: Any) -> bytes | None:
        """Return the output as a payload: the texts joined if all pieces are texts, else the list of them."""
    def flush(self) -> None:
        """Send what was not sent yet, if the connection takes it now; else try again later."""

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
    ) -> None: ...
    @property
    def running(self) -> int:
        """How many tasks run."""
    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and the hub has all results."""
    @property
    def occupied(self) -> int:
        """How many slots are taken by handlers that overstay."""
    def reconcile(self, tasks: list[TaskRef]) -> bool:
        """Keep only what the hub assigns to this agent too, after a registration.

        Cancel the other handlers, resend the results that the hub still waits for, and fail the tasks that are
        not known here. Return whether these are tasks that this agent can hold.
        """
    def receive(self, message: Delegated) -> None:
        """Start the handler of a task; not a second time for the same attempt."""
    def on_stopped(self, execution: Execution, *, has_begun: bool) -> None:
        """Forget a task that has ended before it began; give the handler of another OVERSTAY_S to end."""
    def on_overstaying(self, execution: Execution) -> None:
        """Tell the hub that a slot is taken by a handler whose task has ended."""
    def receive_answer(self, message: StatusReply) -> None:
        """Give an answer to the handler that waits for it."""
    def task_ended(self, task_id: str) -> None:
        """Cancel the handler of a task that has ended without it."""
    async def stop(self) -> None:
        """Cancel the running handlers, and again after LEAVING_S seconds; log those that do not end even then."""
    def on_part_ended(self, execution: Execution) -> None:
        """Free the slot of an execution when nothing of it runs any more."""
    def receive_broadcast(self, message: BroadcastReply) -> None:
        """Queue a broadcast for its handler, which takes one after the other."""

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

class Questions:
    """The questions of a task's worker, at its requester: at most one is `open`.

    `on_question` answers them, if it is given. The hub delivers an open question again after a reconnect; questions are
    numbered, so that each is taken once.
    """

    open: TaskQuestion | None
    def __init__(self, handle: TaskHandle, connection: HubConnection, on_question: OnQuestion | None) -> None: ...
    def receive(self, report: StatusReply) -> TaskQuestion | None:
        """Return the question in a report, and begin to answer it; None if it is not a new one."""
    def attempt_began(self, attempt: int) -> None:
        """Drop the question of an earlier attempt."""
    def drop(self, *, forgotten: bool = False) -> None:
        """Note that no question waits for an answer. A hub that has `forgotten` the task numbers from 1 again."""
    async def send(self, question: TaskQuestion, answer: bytes | None, until: float) -> None:
        """Send an answer until the hub has it. Raises Refused(no_question) if it was not the first to be sent."""

class TaskHandle:
    """A task that this agent has delegated. Iterate it (`async for`) for its events, until its outcome: its Progress,
    each Piece of its output, and each TaskQuestion of its worker.

    Submits its task until the hub accepts it, asks for its state after each new registration and when its deadline has
    passed, and submits it again to a hub that lost it.
    """

    task_id: str
    def __init__(self, connection: HubConnection, message: Delegate, on_question: OnQuestion | None = None) -> None: ...
    @classmethod
    async def submit(
        cls,
        connection: HubConnection,
        message: Delegate,
        patience_s: float | None = None,
        on_question: OnQuestion | None = None,
    ) -> TaskHandle:
        """Submit a task, and return its handle when the hub has accepted it. For `Agent.submit`, which see."""
    @property
    def done(self) -> bool:
        """Whether the task has ended."""
    def add_done_callback(self, function: Callable[[TaskHandle], object]) -> None:
        """Have `function(handle)` called on the loop when the task has ended; soon, if it has."""
    async def result(self, timeout_s: float | None = None) -> Any:
        """Return the task's output, waiting for it at most `timeout_s` seconds.

        Raises TaskFailed (with the hub's `code`; `hub_lost` if the hub no longer knows the task), TaskTimeout if it did
        not end within its ttl, Disconnected if the agent was stopped, TimeoutError after `timeout_s`.
        """
    @property
    def outcome(self) -> TaskOutcome | None:
        """How the task ended; None while it is open, and if this agent was stopped before it had ended."""
    @property
    def question(self) -> TaskQuestion | None:
        """The question of the task's worker that waits for an answer."""
    async def answer(self, answer: Any, ask: int | None = None) -> None:
        """Answer the question that waits, or only that of the number `ask`: with any JSON that fits its schema.

        Returns when the hub has the answer. Raises Refused(no_question) if that question does not wait for an answer,
        or no longer; ValueError if the answer is not JSON or does not fit; TaskTimeout if the ttl was over first.
        """
    async def cancel(self, reason: str = "") -> None:
        """Cancel the task; `result` then raises TaskFailed(cancelled). Without effect if it has ended."""
    def cancel_soon(self, reason: str = "its requester stopped waiting") -> None:
        """Cancel the task without waiting, where nothing can be awaited: in an `except CancelledError`.

        The cancellation is sent at once, or after the next registration if there is no connection.
        """
    def __aiter__(self) -> AsyncIterator[TaskNews]: ...
    async def pieces(self) -> AsyncIterator[Any]:
        """Yield the pieces of the output in order; at the end the rest of it, if pieces were lost with a connection.

        An output that came without pieces is one piece, or the items of a list. Raises what `result` raises, and
        TaskFailed(pieces_lost) if the task was begun again and its output does not continue what was yielded.
        """

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

    name: str
    description: str
    url: str
    agent_id: str | None
    resume: str | None
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
        Unless the program has configured logging, the log goes to stderr. While the command line loads a file, this
        returns at once: the command line runs the agent.
        """
    async def __aenter__(self) -> typing.Self: ...
    async def __aexit__(self, *_: object) -> None: ...
    async def start(self) -> None:
        """Connect, and return when the hub has registered this agent. Waits for a hub that is not running yet."""
    async def stop(self, drain_s: float = 0.0) -> None:
        """Leave the hub, waiting at most `drain_s` seconds for running tasks to end. Handles of open tasks fail.

        May be called from any event loop; the other methods only from the one on which the agent was started.
        """
    async def serve(self, stopped: asyncio.Event, drain_s: float = ...) -> None:
        """Run until `stopped` is set, then drain; leave at once when cancelled. Raises what ends the connection."""
    async def connected(self, within_s: float | None = None) -> None:
        """Return when there is a connection, trying to connect now rather than after the pause of the backoff.

        With `within_s`, return when the hub has answered a heartbeat. Raises Disconnected if there is no connection
        after `within_s` seconds (None: wait forever), or what ended the connection for good.
        """
    async def delegate(self, capability: str | None = None, input: Any = None, **options: Any) -> Any:
        """Have another agent do a task, and return its output. The options are those of `submit`.

        The worker's questions go to `on_question`. Raises what `submit` and `TaskHandle.result` raise. Cancelling this
        call cancels the task.
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
    async def stream(self, capability: str | None = None, input: Any = None, **options: Any) -> AsyncIterator[Any]:
        """Delegate a task, and yield the pieces of its output as they come. The options are those of `submit`.

        Leaving the loop cancels the task. Raises what `submit` and `TaskHandle.pieces` raise.
        """
    async def discover(self, capability: str = "", limit: int = 100) -> list[AgentInfo]:
        """Find agents by a keyword, the best match first; the empty one finds all. At most `limit`, up to 1000."""
    async def broadcast(self, message: Any, capability: str | None = None) -> int:
        """Send any JSON to all other agents that are online (with that capability); return how many there are.

        Raises Disconnected if the connection is lost before the hub replies: then it may have been sent or not.
        """
    async def status(self, task_id: str | None = None) -> StatusReply:
        """Ask the hub about itself (in `.hub`), or about one task. Raises Refused(unknown_task)."""

class LogFormatter(logging.Formatter):
    """Write one line per record, unprintable characters escaped. A traceback follows, each line marked with `|`."""
    def __init__(self) -> None: ...
    def formatMessage(self, record: logging.LogRecord) -> str: ...
    def formatException(self, exc_info: Any) -> str: ...

class JsonLogFormatter(logging.Formatter):
    """Write one JSON object per record: `time` (RFC 3339, UTC), `level`, `logger`, `message`, and `traceback`.

    Every `name=value` in the message becomes a field of the object: `task`, `agent`, `code`, `trace`.
    """
    def format(self, record: logging.LogRecord) -> str: ...

class LogFloodFilter(logging.Filter):
    """Drop records over LOG_LINES_PER_S of one logger, and log how many were dropped. Errors always pass."""
    def __init__(self) -> None: ...
    def filter(self, record: logging.LogRecord) -> bool: ...

class LocalHubLike(Protocol):
    """The part of a hub in its own process that an agent uses."""
    def connect(self, owner: LinkOwner) -> Awaitable[Link]: ...

async def serve(*agents: Agent, drain_s: float = ...) -> None:
    """Run agents side by side until SIGINT or SIGTERM, then drain them for at most `drain_s` seconds.

    Raises KeyboardInterrupt at once for a second signal, and the error with which an agent has ended.
    """

class CommandFailed(Exception):
    """Ends the command line with exit code 1 and this one line on stderr."""

def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit code."""

class Command(NamedTuple):
    """A command of the command line: its help text, the function that adds its options, and the one that runs it."""

    purpose: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    log_level: str = ...

class Parser(argparse.ArgumentParser):
    """A parser whose errors say where to find all options. Where a value is wrong, the usage would not help."""
    def error(self, message: str, usage: str | None = None) -> typing.NoReturn: ...

class Snapshot(NamedTuple):
    """What `top` shows: the hub's status, its agents and its newest tasks, at a time of the loop's clock."""

    hub: dict[str, Any]
    agents: list[AgentInfo]
    tasks: list[TaskInfo]
    taken_at: float

@dataclass(slots=True)
class TopView:
    """The state that the keys change: which table is large, its sort order, and its first visible row."""

    shows_tasks: bool = ...
    orders: dict[bool, int] = field(default_factory=Incomplete)
    is_reversed: bool = ...
    first: int = ...
    @property
    def columns(self) -> dict[str, Callable[[Any], Any]]: ...
    @property
    def order(self) -> str: ...
    def press(self, key: str, page: int) -> bool:
        """Apply a key; `page` is how many rows one is. Return whether to go on."""
