"""The A2A gateway of AgentHub: A2A clients use the agents of a hub, and A2A agents join it.

`agenthub a2a` (or `python -m agenthub_a2a`) serves an A2A agent for each capability at /a2a/CAPABILITY, whose workers
the hub picks, and one for each agent at /a2a/@AGENT_ID. `--join URL` makes each skill of an A2A agent a capability.

The id of a task is made from its user and its first message's id, and a restarted gateway resumes its session at the
hub: so a message that is sent again is the same task, and tasks are found by their ids after a restart.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import re
import sys
import time
import weakref
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urljoin, urlsplit

if TYPE_CHECKING or not __package__:
    import agenthub
else:  # Copied into a package.
    from . import agenthub

if __name__ == "__main__":
    sys.exit(agenthub.main(["a2a", *sys.argv[1:]]))

try:
    import httpx
    import uvicorn  # noqa: F401  # The command line serves with it.
    from a2a import client as a2a_client
    from a2a.server import agent_execution, request_handlers, routes, tasks
    from a2a.server.context import ServerCallContext
    from a2a.types import a2a_pb2 as pb
    from a2a.utils import errors, json_utils
    from a2a.utils.task import apply_history_length
    from google.protobuf.json_format import MessageToDict, MessageToJson, ParseDict, ParseError
    from starlette import applications, authentication, responses, routing
except ModuleNotFoundError as error:
    raise agenthub.PackageMissing("'a2a-sdk[http-server]>=1.3,<2' uvicorn", "The A2A gateway") from error

json_utils.dumps = json.dumps  # ASCII only: a2a-sdk's client would take U+2028 in an event for the end of a line.
WORKING, PAUSED = pb.TASK_STATE_WORKING, (pb.TASK_STATE_INPUT_REQUIRED, pb.TASK_STATE_AUTH_REQUIRED)
ENDED = (pb.TASK_STATE_COMPLETED, pb.TASK_STATE_FAILED, pb.TASK_STATE_CANCELED, pb.TASK_STATE_REJECTED)
COMPLETED, FAILED, CANCELED, REJECTED = ENDED
JSON, CARD = "application/json", "/.well-known/agent-card.json"
CARDS = (CARD, f"/a2a{CARD}")
HUB_S = 5.0  # For the hub to accept a task, or to end one that is cancelled.
POLL_S, MISSED_MAX = 5.0, 3  # Between requests to an agent that has joined; when as many fail in a row, it is gone.


def parts_of(value: Any) -> list[pb.Part]:
    """Return JSON as parts: a string as text, what doubles can hold as data, else as text of the media type of JSON."""
    if isinstance(value, str):
        return [pb.Part(text=value)]
    if isinstance(value, dict) and value.keys() == {"parts"}:  # Those, if they are read as the same JSON.
        with contextlib.suppress(ParseError, AttributeError, TypeError, ValueError):
            parts = [ParseDict(one, pb.Part()) for one in value["parts"]]
            if parts and value_of(parts) == value:
                return parts
    raw = json.dumps(value)
    if value is None or re.search(r"(?<![\d.])\d{16}", raw) or agenthub.nests_deeper_than(raw.encode(), 16):
        return [pb.Part(text=raw, media_type=JSON)]  # Protobuf reads at most 100 messages inside each other.
    return [ParseDict({"data": value}, pb.Part())]


def value_of(parts: Sequence[pb.Part]) -> Any:
    """Return the JSON of a single part, texts joined, else {"parts": [...]}. Raises ValueError for broken JSON."""
    if len(parts) == 1 and parts[0].media_type == JSON and parts[0].HasField("text"):
        return json.loads(parts[0].text)
    if all(part.HasField("text") for part in parts):
        return "".join(part.text for part in parts)
    values = [json.loads(MessageToJson(part), parse_float=number) for part in parts]
    return values[0]["data"] if len(parts) == 1 and parts[0].HasField("data") else {"parts": values}


def number(text: str) -> int | float:
    return int(value) if (value := float(text)).is_integer() and abs(value) < 2**63 else value  # In A2A, 3 is 3.0.


def task_id_of(context: ServerCallContext, message_id: str) -> str:
    return f"a2a-{agenthub.hash_of(context.user.user_name)[:24]}-{agenthub.hash_of(message_id)[:24]}"


class TaskStore(tasks.InMemoryTaskStore):
    """Tasks by owner. Ended ones are evicted, the oldest first, beyond a number, a sum of bytes, or an age."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__()
        self.gateway, self.args, self.push = gateway, gateway.args, tasks.InMemoryPushNotificationConfigStore()
        self.bytes, self.bytes_total = dict[str, int](), 0  # By task id.
        self.ended: dict[str, tuple[float, ServerCallContext]] = {}  # By task id, the oldest first.

    def is_full(self) -> bool:
        return bool(len(self.bytes) > self.args.max_tasks or self.bytes_total > self.args.max_task_bytes)

    async def get(self, task_id: str, context: ServerCallContext) -> Any:
        return await super().get(task_id, context) or await self.gateway.recover(task_id, context)

    async def save(self, task: pb.Task, context: ServerCallContext) -> None:
        del task.history[1:-50]
        await super().save(task, context)
        self.bytes_total += task.ByteSize() - self.bytes.get(task.id, 0)
        self.bytes[task.id] = task.ByteSize()
        if task.status.state in ENDED:
            self.ended[task.id] = time.monotonic() + self.args.retention, context
        while self.ended and (self.is_full() or next(iter(self.ended.values()))[0] < time.monotonic()):
            await self.delete(oldest := next(iter(self.ended)), self.ended[oldest][1])

    async def delete(self, task_id: str, context: ServerCallContext) -> Any:
        self.ended.pop(task_id, None)
        self.bytes_total -= self.bytes.pop(task_id, 0)
        if await self.push.get_info(task_id, context):
            await self.push.delete_info(task_id, context)
        await super().delete(task_id, context)


class Gateway(request_handlers.DefaultRequestHandler, agent_execution.AgentExecutor):
    """Takes the requests of A2A clients, as an ASGI application, and has an agent of the hub delegate their tasks."""

    def __init__(self, agent: agenthub.Agent, args: argparse.Namespace) -> None:
        self.agent, self.args, self.open = agent, args, dict[str, tuple[agenthub.TaskHandle, tasks.TaskUpdater, Any]]()
        self.store, self.card = TaskStore(self), pb.AgentCard(version=agenthub.__version__)
        self.card.default_input_modes[:] = self.card.default_output_modes[:] = ["text/plain", JSON]
        self.card.capabilities.streaming, self.card.capabilities.push_notifications = True, bool(args.allow_push)
        if args.tokens:
            self.card.security_schemes["bearer"].http_auth_security_scheme.scheme = "bearer"
            self.card.security_requirements.add().schemes["bearer"].SetInParent()
        push: Any = {"push_url_validator": self.may_push}
        self.http = httpx.AsyncClient(timeout=HUB_S)
        sender = tasks.BasePushNotificationSender(self.http, self.store.push, **push)
        push |= {"push_config_store": self.store.push, "push_sender": sender, "request_context_builder": self}
        super().__init__(self, self.store, self.card, **push)
        self.slots: Any = weakref.WeakValueDictionary()  # For the requests of a client.
        self.authenticator = agenthub.Authenticator(args.tokens, args.hosts, NotImplemented, args.served)
        served: list[Any] = routes.create_jsonrpc_routes(self, "/a2a/rpc", enable_v0_3_compat=True)
        served += routes.create_rest_routes(self, None, True, "/a2a/rest")[:-1]  # The last is for tenants.
        served += [*(routing.Route(path, self.serve_card) for path in CARDS), routing.Route("/", self.serve_directory)]
        self.app = applications.Starlette(routes=served, max_body_size=args.max_bytes)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        _, first, target, path = f"{scope['raw_path'].decode('latin-1')}///".split("/", 3)
        scope["target"] = unquote(target) if first == "a2a" else ""  # The name of a capability may hold a slash.
        scope["path"] = f"/a2a/{unquote(path).rstrip('/')}" if first == "a2a" else scope["path"]
        if refusal := self.refusal(scope):
            await refusal(scope, receive, send)
            return
        async with scope["slot"]:
            await self.app(scope, receive, send)

    def refusal(self, scope: Any) -> Any:
        """Return the response that rejects a request; None if it is accepted: then its user is the owner of tasks."""
        link: Any = argparse.Namespace(address=scope["client"][0])
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        request, target = agenthub.Request(scope["path"], agenthub.Headers(*headers)), scope["target"]
        if answer := self.authenticator.check_request(link, request):
            return responses.PlainTextResponse(answer.text, answer.status)
        grant = self.authenticator.grant_of(link, request)
        if self.args.tokens and not grant and scope["path"] not in CARDS:
            return responses.PlainTextResponse("send a token\n", 401, {"WWW-Authenticate": "Bearer"})
        capability = None if target.startswith("@") else target or "-"
        refusal = grant and grant.refusal(agenthub.Delegate(task_id="-", capability=capability))
        if target and (refusal or not agenthub.matches_any(target, self.args.served_names)):
            return responses.PlainTextResponse(refusal or "this agent is not served\n", 403)
        user = grant.name if grant else ""
        scope["user"], client = authentication.SimpleUser(f"{user}\n{target}"), (user, link.address)
        scope["slot"] = self.slots.setdefault(client, asyncio.Semaphore(self.args.max_requests))
        return responses.PlainTextResponse("too many requests at once\n", 429) if scope["slot"].locked() else None

    async def offers(self, keyword: str) -> dict[str, tuple[str, list[agenthub.Capability]]]:
        found: dict[str, tuple[str, list[agenthub.Capability]]] = {}
        for agent in await self.agent.discover(keyword[:128].replace("\0", ""), 1000):
            for one in agent.capabilities:
                found.setdefault(one.name, (one.description, [one]))
                found[f"@{agent.agent_id}"] = agent.description, agent.capabilities
        return {name: found[name] for name in sorted(found) if agenthub.matches_any(name, self.args.served_names)}

    async def serve_directory(self, request: Any) -> Any:
        cards = {name: f"{request.base_url}a2a/{quote(name, safe='@')}{CARD}" for name in await self.offers("")}
        return responses.JSONResponse({"agents": [{"name": name, "card": card} for name, card in cards.items()]})

    async def serve_card(self, request: Any) -> Any:
        found = await self.offers("" if request.scope["target"].startswith("@") else request.scope["target"])
        only = [name for name in found if not name.startswith("@")]
        target = request.scope["target"] or (only[0] if len(only) == 1 else "")  # If there is one, the host is enough.
        if target not in found:
            return responses.JSONResponse({"error": "no such agent is online; GET / lists those that are"}, 404)
        card = pb.AgentCard(name=target, description=found[target][0] or target)
        card.MergeFrom(self.card)
        for binding, path in ("JSONRPC", "rpc"), ("HTTP+JSON", "rest"):
            url = f"{request.base_url}a2a/{quote(target, safe='@')}/{path}"
            card.supported_interfaces.add(url=url, protocol_binding=binding, protocol_version="1.0")
        for one in found[target][1]:
            about = f"{one.description or one.name}\n\nJSON Schema of the input: {json.dumps(one.input_schema)}"
            card.skills.add(id=one.name, name=one.name, description=about, tags=["agenthub"])
        return await routes.create_agent_card_routes(card, cache_control="no-cache")[0].endpoint(request)

    async def may_push(self, url: str) -> bool:
        return ".." not in url and agenthub.matches_any(url, tuple(self.args.allow_push))

    async def build(self, context: ServerCallContext, params: Any, task_id: Any, context_id: Any, **_: Any) -> Any:
        return agent_execution.RequestContext(context, params, task_id or context.state["new_id"], context_id)

    async def on_message_send(self, params: pb.SendMessageRequest, context: ServerCallContext) -> Any:
        async with contextlib.aclosing(self.on_message_send_stream(params, context)) as events:
            async for _ in events:
                if params.configuration.return_immediately:
                    break
        task = await self.store.get(params.message.task_id or context.state["new_id"], context)
        return apply_history_length(task, params.configuration)

    async def on_message_send_stream(self, params: Any, context: ServerCallContext) -> AsyncGenerator[Any, None]:
        """Yield the events of a task until it ends or asks; of a known one, if the message was sent before."""
        message = params.message
        if not message.task_id:
            context.state["new_id"] = task_id_of(context, message.message_id)
        known = await self.store.get(message.task_id or context.state["new_id"], context)
        is_new = message.task_id and known and all(one.message_id != message.message_id for one in known.history)
        if known and not message.task_id and known.status.state == REJECTED:
            known = await self.store.delete(known.id, context)  # The hub does not know it, so try again.
        if known and not is_new and known.status.state in (*ENDED, *PAUSED):
            yield known
            return
        if is_new and known.id in self.open:
            (handle, updater, _), answer = self.open[known.id], value_of(message.parts)
            schema = (handle.question and handle.question.schema) or {}
            is_json = isinstance(answer, str) and schema.get("type", "string") != "string"
            try:
                await handle.answer(json.loads(answer) if is_json else answer)  # Some clients send nothing but text.
            except (ValueError, agenthub.AgentHubError) as error:
                raise errors.InvalidParamsError(f"the task does not take this answer: {error}") from error
            await updater.start_work(message)
            await updater.start_work()  # So that the message is part of the history.
        elif not known and self.store.is_full():
            raise errors.InternalError("overloaded: too many tasks are open; retry later")
        subscription = known and super().on_subscribe_to_task(pb.SubscribeToTaskRequest(id=known.id), context)
        async with contextlib.aclosing(subscription or super().on_message_send_stream(params, context)) as events:
            async for event in events:
                yield event
                if isinstance(event, pb.TaskStatusUpdateEvent) and event.status.state in PAUSED:
                    return

    async def recover(self, task_id: str, context: ServerCallContext) -> Any:
        """Follow a task from before a restart again, if the hub knows it and it is this user's."""
        if task_id[:28] != task_id_of(context, "")[:28] or task_id in self.open or "new_id" in context.state:
            return None
        with contextlib.suppress(agenthub.Refused):
            report = await asyncio.wait_for(self.agent.status(task_id), HUB_S)
            if report.requester == self.agent.agent_id:
                own = ServerCallContext(user=context.user, state={"new_id": task_id, "report": report})
                message = pb.Message(message_id=task_id, role=pb.ROLE_USER, parts=[pb.Part(text="")])
                request = pb.SendMessageRequest(message=message, configuration={"return_immediately": True})
                return await super().on_message_send(request, own)
        return None

    async def execute(self, context: Any, event_queue: Any) -> None:
        updater = tasks.TaskUpdater(event_queue, context.task_id or "", context.context_id or "")
        if context.current_task is not None:
            return  # Its message was sent twice at the same time.
        report, target = context.call_context.state.get("report"), context.call_context.user.user_name.split("\n")[1]
        options: Any = {"agent_id": target[1:]} if target.startswith("@") else {"capability": target}
        options |= {"ttl": self.args.ttl, "max_retries": self.args.max_retries, "patience_s": HUB_S, "answers": True}
        task = pb.Task(id=updater.task_id, context_id=updater.context_id, history=[] if report else [context.message])
        task.status.state = WORKING
        task.status.timestamp.GetCurrentTime()
        try:
            if not self.agent.is_online:
                await self.agent.connected(HUB_S)
            input = report.input if report else value_of(task.history[0].parts)
            handle = await self.agent.submit(input=input, task_id=task.id, **options)
            if report and report.question is not None:
                handle._on_report(report)  # The hub delivers a question again only after a reconnect.
            self.open[task.id] = handle, updater, asyncio.current_task()
            await event_queue.enqueue_event(task)
            await publish(updater, handle)
        except (agenthub.AgentHubError, ValueError) as error:
            if not_accepted := task.id not in self.open:
                await event_queue.enqueue_event(task)
            code = error.code if isinstance(error, agenthub.AgentHubError) else "invalid_input"
            is_rejected = not_accepted or code in ("invalid_input", "rejected")
            state = CANCELED if code == "cancelled" else REJECTED if is_rejected else FAILED
            message = updater.new_agent_message([pb.Part(text=str(error) or code)])
            await updater.update_status(state, message, metadata={"code": code})
        finally:
            self.open.pop(task.id, None)

    async def cancel(self, context: Any, event_queue: Any) -> None:
        if context.task_id in self.open:
            handle, _, execution = self.open[context.task_id]
            handle.cancel_soon("cancelled by its A2A client")
            await asyncio.wait([execution], timeout=HUB_S)  # If it takes longer, a2a-sdk publishes the cancellation.


async def publish(updater: tasks.TaskUpdater, handle: agenthub.TaskHandle) -> None:
    """Publish what comes of a task. Raises what `TaskHandle.result` raises."""
    parts: list[pb.Part] = []
    async for update in handle:
        if isinstance(update, agenthub.Piece):
            await updater.add_artifact(parts_of(update.piece), "output", append=bool(parts), last_chunk=False)
            parts += parts_of(update.piece)
        elif isinstance(update, agenthub.Progress):
            message = None if update.detail is None else updater.new_agent_message(parts_of(update.detail))
            await updater.update_status(WORKING, message, metadata={"progress": update.progress})
        elif handle.question == update:
            message = updater.new_agent_message([pb.Part(text=update.text)], {"schema": update.schema})
            await updater.requires_input(message)
    output = await handle.result()
    if not parts or value_of(parts) != output:
        await updater.add_artifact(parts_of(output), "output", last_chunk=True)  # In place of the pieces.
    await updater.complete()


async def call(task: agenthub.Task, client: a2a_client.Client, skill: str) -> Any:
    """Have an A2A agent do a task, and return its output; cancel it there too. Raises TaskFailed."""
    following = asyncio.create_task(follow(task, client, skill, remote := pb.Task()))
    try:
        return await asyncio.shield(following)
    except asyncio.CancelledError:
        with contextlib.suppress(errors.A2AError, TimeoutError):
            async with asyncio.timeout(HUB_S):
                while not remote.id and not following.done():  # The event with its id is on the way.
                    await asyncio.sleep(0.01)
                await client.cancel_task(pb.CancelTaskRequest(id=remote.id))
        following.cancel()
        raise
    except errors.A2AError as error:
        code = "agent_lost" if isinstance(error, a2a_client.A2AClientError) else "rejected"
        raise agenthub.TaskFailed(str(error), code=code) from error


async def follow(task: agenthub.Task, client: a2a_client.Client, skill: str, remote: pb.Task) -> Any:
    message = pb.Message(message_id=f"{task.task_id}-{task.attempt}", parts=parts_of(task.input))
    session = task._connection.session  # Pieces may be lost with it, so that later ones are not sent.
    while True:
        message.role, message.metadata["skill"], remote.status.state = pb.ROLE_USER, skill, WORKING
        async for event in client.send_message(pb.SendMessageRequest(message=message)):
            kind, update, chunk = event.WhichOneof("payload"), event.status_update, event.artifact_update
            if kind == "task":
                remote.CopyFrom(event.task)
            elif kind == "message":
                remote.status.CopyFrom(pb.TaskStatus(state=COMPLETED, message=event.message))
            elif kind == "artifact_update":
                tasks.task_manager.append_artifact_to_task(remote, chunk)
                if session and session is task._connection.session and not chunk.last_chunk:
                    piece = agenthub.payload_of(value_of(chunk.artifact.parts))
                    session.send_nowait(session.encode(agenthub.Status(task_id=task.task_id, piece=piece)))
            else:
                remote.status.CopyFrom(update.status)
                remote.metadata.MergeFrom(update.metadata)
                said, progress = update.status.message, MessageToDict(update.metadata).get("progress")
                detail = value_of(said.parts) if said.parts and said.role != pb.ROLE_USER else None
                if update.status.state == WORKING and (progress, detail) != (None, None):
                    task.progress(progress, detail)
        while remote.status.state not in (*ENDED, *PAUSED):  # It does not stream, or the stream was cut.
            await asyncio.sleep(1)
            remote.CopyFrom(await client.get_task(pb.GetTaskRequest(id=remote.id)))
        text = value_of(remote.status.message.parts) if remote.status.message.parts else None
        if remote.status.state != pb.TASK_STATE_INPUT_REQUIRED:
            break
        answer = await task.ask(str(text), MessageToDict(remote.status.message.metadata).get("schema"))
        message = pb.Message(message_id=f"{message.message_id}+", parts=parts_of(answer), task_id=remote.id)
    if remote.status.state == COMPLETED:
        values = [value_of(one.parts) for one in remote.artifacts]
        return values[0] if len(values) == 1 else values or text
    code = {CANCELED: "cancelled", REJECTED: "rejected"}.get(remote.status.state, "failed")
    code = agenthub.slugify(str(MessageToDict(remote.metadata).get("code", code)), 64) or code
    raise agenthub.TaskFailed(str(text or code), code=code)


async def join(args: argparse.Namespace, stopped: asyncio.Event) -> None:
    """Offer the skills of an A2A agent on the hub for as long as it answers, until an event is set."""
    async with httpx.AsyncClient(headers=args.headers, timeout=httpx.Timeout(30, read=None)) as http:
        config = a2a_client.ClientConfig(httpx_client=http, supported_protocol_bindings=["JSONRPC", "HTTP+JSON"])
        card, known, agent, missed, stopping = None, None, None, 0, asyncio.create_task(stopped.wait())
        while not stopping.done():
            try:
                card, missed = await a2a_client.A2ACardResolver(http, args.join).get_agent_card(), 0
                for one in card.supported_interfaces:  # At the host that was named, whatever host the card names.
                    one.url = urljoin(args.join, urlsplit(one.url).path)
            except errors.A2AError as error:
                card, missed = known if missed < MISSED_MAX else None, missed + 1
                agenthub.log_agent.warning("%s does not answer: %s", args.join, agenthub.escape_unprintable(str(error)))
            if agent and card != known:
                await agent.stop()
                agent = None
            if card and not agent:
                known, agent = card, agenthub.Agent(args.name or card.name, url=args.url, max_tasks=args.max_running)
                client = a2a_client.ClientFactory(config).create(card)
                for skill in card.skills[:64]:
                    offer = agent.capability(f"{args.prefix}{skill.id}", description=skill.description, input_schema={})
                    offer(functools.partial(call, client=client, skill=skill.id))
                await agent.start()
            await asyncio.wait([stopping], timeout=POLL_S)
        if agent:
            await agent.stop(agenthub.DRAIN_S)
