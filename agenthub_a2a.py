"""The A2A gateway of AgentHub: A2A clients use the agents of a hub, and A2A agents join it.

The id of a task is made from its user and its first message's id, and a restarted gateway resumes its session at the
hub: so a message that is sent again is the same task, and tasks are found by their ids after a restart.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import sys
import time
import weakref
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, unquote, urljoin, urlsplit

if TYPE_CHECKING or not __package__:
    import agenthub
else:  # Copied into a package.
    from . import agenthub

if __name__ == "__main__":
    sys.exit(agenthub.main(["a2a", *sys.argv[1:]]))

try:
    import httpx
    import uvicorn
    from a2a import client as a2a_client
    from a2a.server import agent_execution, request_handlers, routes, tasks
    from a2a.server.context import ServerCallContext
    from a2a.types import a2a_pb2 as pb
    from a2a.utils import errors, json_utils
    from a2a.utils.task import apply_history_length
    from google.protobuf.json_format import MessageToDict, MessageToJson, ParseDict, ParseError
    from starlette import applications, authentication, datastructures, exceptions, responses, routing
    from starlette.middleware.exceptions import ExceptionMiddleware
except ModuleNotFoundError as error:
    raise agenthub.PackageMissing("'a2a-sdk[http-server]>=1.3,<2' 'uvicorn>=0.47'", "The A2A gateway") from error

json_utils.dumps = json.dumps  # ASCII only: a2a-sdk's client would take U+2028 in an event for the end of a line.
WORKING, PAUSED = pb.TASK_STATE_WORKING, (pb.TASK_STATE_INPUT_REQUIRED, pb.TASK_STATE_AUTH_REQUIRED)
ENDED = (pb.TASK_STATE_COMPLETED, pb.TASK_STATE_FAILED, pb.TASK_STATE_CANCELED, pb.TASK_STATE_REJECTED)
COMPLETED, FAILED, CANCELED, REJECTED = ENDED
JSON, CARDS = "application/json", ("/.well-known/agent-card.json", "/a2a/.well-known/agent-card.json")
HUB_S = 5.0  # For the hub to accept a task, or to end one that is cancelled.
POLL_S, MISSED_MAX = 5.0, 3  # Between requests to an agent that has joined; when as many fail in a row, it is gone.


def parts_of(value: Any) -> list[pb.Part]:
    """Return JSON as parts: as text, data or what {"parts": [...]} says, else as text of the media type of JSON."""
    if isinstance(value, str):
        return [pb.Part(text=value)]
    named = value["parts"] if isinstance(value, dict) and value.keys() == {"parts"} else [{"data": value}]
    with contextlib.suppress(ParseError, AttributeError, TypeError, ValueError):
        parts = [ParseDict(one, pb.Part(), max_recursion_depth=34) for one in named]  # 16 levels of JSON.
        if value is not None and value_of(parts) == value:  # Doubles change large integers.
            return parts
    return [pb.Part(text=json.dumps(value), media_type=JSON)]


def value_of(parts: Sequence[pb.Part]) -> Any:
    """Return the JSON of a single part, texts joined, else {"parts": [...]}. Raises ValueError for broken JSON."""
    if len(parts) == 1 and parts[0].media_type == JSON and parts[0].HasField("text"):
        return agenthub.parse_json(parts[0].text)
    if all(part.HasField("text") for part in parts):
        return "".join(part.text for part in parts)
    values = [json.loads(MessageToJson(part), parse_float=number) for part in parts]
    return values[0]["data"] if len(parts) == 1 and parts[0].HasField("data") else {"parts": values}


def number(text: str) -> int | float:
    value = float(text)  # In A2A, 3 is 3.0.
    return int(value) if value.is_integer() and agenthub.INTEGER_MIN <= value <= agenthub.INTEGER_MAX else value


def task_id_of(context: ServerCallContext, message_id: str) -> str:
    return f"a2a-{agenthub.hash_of(context.user.user_name)[:24]}-{agenthub.hash_of(message_id)[:24]}"


class Store(tasks.InMemoryTaskStore, tasks.InMemoryPushNotificationConfigStore):
    """Tasks by owner, and where their news is pushed to. The oldest ended ones are evicted beyond the limits."""

    def __init__(self, gateway: Gateway) -> None:
        tasks.InMemoryTaskStore.__init__(self)
        tasks.InMemoryPushNotificationConfigStore.__init__(self)
        self.gateway, self.args, self.targets = gateway, gateway.args, tuple(gateway.args.allow_push)
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
        await self.delete_info(task_id, context)
        await super().delete(task_id, context)

    async def set_info(self, task_id: str, config: Any, context: ServerCallContext) -> Any:
        ids, url = {config.id or task_id, *(one.id for one in await self.get_info(task_id, context))}, config.url
        if ".." in url or not agenthub.matches_any(url, self.targets) or len(ids) > 10 or config.ByteSize() > 4096:
            raise errors.InvalidParamsError("push notifications must go to an allowed URL, at most 10 of 4 KiB a task")
        return await super().set_info(task_id, config, context)


class Gateway(request_handlers.DefaultRequestHandler, agent_execution.AgentExecutor):
    """Takes the requests of A2A clients, as an ASGI application, and has an agent of the hub delegate their tasks."""

    def __init__(self, agent: agenthub.Agent, args: argparse.Namespace, http: httpx.AsyncClient) -> None:
        self.agent, self.args, self.open = agent, args, dict[str, tuple[agenthub.TaskHandle, tasks.TaskUpdater, Any]]()
        self.store, self.card = Store(self), pb.AgentCard(version=agenthub.__version__)
        self.card.default_input_modes[:] = self.card.default_output_modes[:] = ["text/plain", JSON]
        self.card.capabilities.streaming, self.card.capabilities.push_notifications = True, bool(args.allow_push)
        if args.tokens:
            self.card.security_schemes["bearer"].http_auth_security_scheme.scheme = "bearer"
            self.card.security_requirements.add().schemes["bearer"].SetInParent()
        sender, builder = tasks.BasePushNotificationSender(http, self.store), cast(Any, self)
        super().__init__(self, self.store, self.card, None, self.store, sender, builder)
        self.slots: Any = weakref.WeakValueDictionary()  # For the requests of a client.
        self.authenticator = agenthub.Authenticator(args.tokens, args.hosts, NotImplemented, args.served)
        served: list[Any] = routes.create_jsonrpc_routes(self, "/a2a/rpc", enable_v0_3_compat=True)
        served += routes.create_rest_routes(self, None, True, "/a2a/rest")[:-1]  # The last is for tenants.
        served += [*(routing.Route(path, self.serve_card) for path in CARDS), routing.Route("/", self.serve_directory)]
        self.app = applications.Starlette(routes=served, max_body_size=args.max_bytes)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request of the user who owns its tasks. Raises HTTPException to reject it."""
        _, first, target, path = f"{scope['raw_path'].decode('latin-1')}///".split("/", 3)
        target = scope["target"] = unquote(target) if first == "a2a" else ""  # A capability's name may hold a slash.
        scope["path"] = f"/a2a/{unquote(path).rstrip('/')}" if first == "a2a" else scope["path"]
        link: Any = argparse.Namespace(address=scope["client"][0])
        request = agenthub.Request(scope["path"], agenthub.Headers(*datastructures.Headers(scope=scope).items()))
        if answer := self.authenticator.check_request(link, request):
            raise exceptions.HTTPException(answer.status, answer.text)
        grant = self.authenticator.grant_of(link, request)
        if self.args.tokens and not grant and scope["path"] not in CARDS:
            raise exceptions.HTTPException(401, "send a token\n", {"WWW-Authenticate": "Bearer"})
        capability = None if target.startswith("@") else target or "-"
        refusal = grant and grant.refusal(agenthub.Delegate(task_id="-", capability=capability))
        if target and (refusal or not agenthub.matches_any(target, self.args.served_names)):
            raise exceptions.HTTPException(403, refusal or "this agent is not served\n")
        user = grant.name if grant else ""
        scope["user"] = authentication.SimpleUser(f"{user}\n{target}")
        slot = self.slots.setdefault((user, link.address), asyncio.Semaphore(self.args.max_requests))
        if slot.locked():
            raise exceptions.HTTPException(429, "too many requests at once\n")
        async with slot:
            await self.app(scope, receive, send)

    async def offers(self, keyword: str) -> dict[str, tuple[str, list[agenthub.Capability]]]:
        agents = await self.agent.discover(keyword[:128].replace("\0", ""), 1000)
        found = {f"@{one.agent_id}": (one.description, one.capabilities) for one in agents if one.capabilities}
        found |= {one.name: (one.description, [one]) for agent in reversed(agents) for one in agent.capabilities}
        return {name: found[name] for name in sorted(found) if agenthub.matches_any(name, self.args.served_names)}

    async def serve_directory(self, request: Any) -> Any:
        cards = {name: f"{request.base_url}a2a/{quote(name, safe='@')}{CARDS[0]}" for name in await self.offers("")}
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
        MessageToDict(message := params.message)  # Raises for NaN, which no answer could hold, before anything is kept.
        task_id = message.task_id or context.state.setdefault("new_id", task_id_of(context, message.message_id))
        known = await self.store.get(task_id, context)
        is_new = message.task_id and known and all(one.message_id != message.message_id for one in known.history)
        if known and not message.task_id and known.status.state == REJECTED:
            known = await self.store.delete(known.id, context)  # The hub does not know it, so try again.
        if known and not is_new and known.status.state in (*ENDED, *PAUSED):
            yield known
            return
        if is_new and task_id in self.open:
            try:
                (handle, updater, _), answer = self.open[task_id], value_of(message.parts)
                schema = (handle.question and handle.question.schema) or {}
                is_json = isinstance(answer, str) and schema.get("type", "string") != "string"  # It may send text only.
                await handle.answer(agenthub.parse_json(answer) if is_json else answer)
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
                parts = [pb.Part(text=json.dumps(report.input), media_type=JSON)]
                message = pb.Message(message_id=task_id, role=pb.ROLE_USER, parts=parts)
                request = pb.SendMessageRequest(message=message, configuration={"return_immediately": True})
                context.state["new_id"] = task_id
                return await super().on_message_send(request, context)
        return None

    async def execute(self, context: Any, event_queue: Any) -> None:
        updater = tasks.TaskUpdater(event_queue, context.task_id, context.context_id)
        if context.current_task is not None:
            return  # Its message was sent twice at the same time.
        target = context.call_context.user.user_name.partition("\n")[2]
        options: Any = {"agent_id": target[1:]} if target.startswith("@") else {"capability": target}
        options |= {"ttl": self.args.ttl, "max_retries": self.args.max_retries, "patience_s": HUB_S, "answers": True}
        task = pb.Task(id=updater.task_id, context_id=updater.context_id, history=[context.message])
        task.status.state = WORKING
        task.status.timestamp.GetCurrentTime()
        try:
            if not self.agent.is_online:
                await self.agent.connected(HUB_S)
            handle = await self.agent.submit(input=value_of(context.message.parts), task_id=task.id, **options)
            self.open[task.id] = handle, updater, asyncio.current_task()
            await event_queue.enqueue_event(task)
            parts: list[pb.Part] = []
            async for update in handle:
                if isinstance(update, agenthub.Piece):
                    parts += (chunk := parts_of(update.piece))
                    await updater.add_artifact(chunk, "output", append=len(parts) > len(chunk), last_chunk=False)
                elif isinstance(update, agenthub.Progress):
                    said = None if update.detail is None else updater.new_agent_message(parts_of(update.detail))
                    await updater.update_status(WORKING, said, metadata={"progress": update.progress})
                elif handle.question == update:
                    asked = updater.new_agent_message([pb.Part(text=update.text)], {"schema": update.schema})
                    await updater.requires_input(asked)
            output = await handle.result()
            if not parts or value_of(parts) != output:
                await updater.add_artifact(parts_of(output), "output", last_chunk=True)  # In place of the pieces.
            await updater.complete()
        except (agenthub.AgentHubError, ValueError) as error:
            if not_accepted := task.id not in self.open:
                await event_queue.enqueue_event(task)
            code = getattr(error, "code", "invalid_input")
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


async def serve(args: argparse.Namespace) -> None:
    """Serve A2A clients until cancelled, with an agent that resumes its session at the hub."""
    options: Any = {"http": "h11", "ws": "none", "lifespan": "off", "log_config": None, "proxy_headers": False}
    options |= {"server_header": False, "limit_concurrency": args.max_connections, "timeout_graceful_shutdown": 1}
    options["ssl_context_factory"] = args.tls and (lambda *_: args.tls)
    async with agenthub.shared_caller(args.url, args.name, None) as agent, httpx.AsyncClient(timeout=HUB_S) as http:
        gateway = Gateway(agent, args, http)
        server: Any = uvicorn.Server(uvicorn.Config(ExceptionMiddleware(gateway), **options))
        server.capture_signals, idle = contextlib.nullcontext, set[Any]()  # The command line handles signals.
        serving = asyncio.create_task(server.serve(sockets=[args.listening]))
        print(f"listening on {args.base_url}", flush=True)
        try:
            while not serving.done():
                await asyncio.wait([serving], timeout=agenthub.TOKEN_S)
                cycles = [(one, one.cycle) for one in server.server_state.connections]
                before, idle = idle, {one for one in cycles if one[1] is None or one[1].response_complete}
                for connection, _ in before & idle:  # Without a request, uvicorn would let them wait forever.
                    connection.transport.abort()
        finally:
            server.should_exit = True
            await gateway.aclose()
            await serving


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
                if not chunk.last_chunk:
                    task.send_piece(value_of(chunk.artifact.parts))
            else:
                remote.status.CopyFrom(update.status)
                remote.metadata.MergeFrom(update.metadata)
                said, sent = update.status.message, MessageToDict(update.metadata).get("progress")
                progress = sent if isinstance(sent, float) and 0 <= sent <= 1 else None
                detail = value_of(said.parts) if said.parts and said.role != pb.ROLE_USER else None
                if update.status.state == WORKING and (progress, detail) != (None, None):
                    task.progress(progress, detail)
        while remote.status.state not in (*ENDED, *PAUSED):  # It does not stream, or the stream was cut.
            await asyncio.sleep(1)
            remote.CopyFrom(await client.get_task(pb.GetTaskRequest(id=remote.id)))
        text = value_of(remote.status.message.parts) if remote.status.message.parts else None
        if remote.status.state == COMPLETED:
            values = [value_of(one.parts) for one in remote.artifacts]
            return values[0] if len(values) == 1 else values or text
        if remote.status.state != pb.TASK_STATE_INPUT_REQUIRED:
            code = {CANCELED: "cancelled", REJECTED: "rejected"}.get(remote.status.state, "failed")
            code = agenthub.slugify(str(MessageToDict(remote.metadata).get("code", code)), 64) or code
            raise agenthub.TaskFailed(str(text or code), code=code)
        answer = await task.ask(str(text), MessageToDict(remote.status.message.metadata).get("schema"))
        message = pb.Message(message_id=f"{message.message_id}+", parts=parts_of(answer), task_id=remote.id)


async def join(args: argparse.Namespace) -> None:
    """Offer the skills of an A2A agent on the hub, for as long as it answers, until cancelled."""
    timeout, offered = httpx.Timeout(30, read=None), contextlib.AsyncExitStack()
    async with httpx.AsyncClient(headers=args.headers, timeout=timeout) as http, offered:
        config = a2a_client.ClientConfig(httpx_client=http, supported_protocol_bindings=["JSONRPC", "HTTP+JSON"])
        clients, card, known, missed = a2a_client.ClientFactory(config), None, None, 0
        while True:
            try:
                card, missed = await a2a_client.A2ACardResolver(http, args.join).get_agent_card(), 0
                for one in card.supported_interfaces:  # At the host that was named, whatever host the card names.
                    one.url = urljoin(args.join, urlsplit(one.url).path)
            except errors.A2AError as error:
                card, missed = known if missed < MISSED_MAX else None, missed + 1
                agenthub.log_agent.warning("%s does not answer: %s", args.join, agenthub.escape_unprintable(str(error)))
            if card != known:
                await offered.aclose()
            if card and card != known:
                agent = agenthub.Agent(args.name or card.name, url=args.url, max_tasks=args.max_running)
                for skill in card.skills[:64]:
                    offer = agent.capability(f"{args.prefix}{skill.id}", description=skill.description, input_schema={})
                    offer(functools.partial(call, client=clients.create(card), skill=skill.id))
                await agent.start()
                offered.push_async_callback(agent.stop, agenthub.DRAIN_S)
            known = card
            await asyncio.sleep(POLL_S)
