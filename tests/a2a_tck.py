"""A system under test for A2A's compatibility kit: an agent of a hub, behind the gateway, does what a prefix says.

    python -m tests.a2a_tck 9999

Then, in a clone of https://github.com/a2aproject/a2a-tck at its branch 1.0-dev, with its packages installed:

    python run_tck.py --sut-host http://127.0.0.1:9999 --level must --transport jsonrpc,http_json

The kit says by the prefix of a message's id what the agent has to do, so this gateway makes that id the task's input.
And it uses the same id for many messages, so here each is a new task.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

import agenthub
import agenthub_a2a

FILE = {"filename": "output.txt", "mediaType": "text/plain"}
OUTPUTS: dict[str, Any] = {  # The longer one of two prefixes first.
    "tck-artifact-file-url": {"parts": [{"url": "https://example.com/output.txt", **FILE}]},
    "tck-artifact-file": {"parts": [{"raw": "dGNr", **FILE}]},
    "tck-stream-artifact-file": {"parts": [{"raw": "dGNr", **FILE}]},
    "tck-artifact-data": {"key": "value", "count": 42},
    "tck-artifact-text": "Generated text content",
    "tck-stream-artifact-text": "Streamed text content",
    "tck-stream-ordering-001": "Ordered output",
    "tck-stream-001": "Stream hello from TCK",
    "tck-stream-003": "Stream task lifecycle",
    "": "Hello from TCK",
}
SLOW_S = 4.0  # Twice what the kit waits for an event.
COUNT = itertools.count()
MESSAGE_ID = contextvars.ContextVar[str]("MESSAGE_ID")

agent = agenthub.Agent("tck")


@agent.capability("tck", description="Does what the prefix of a message's id says")
def do(message_id: str, task: agenthub.Task) -> Iterator[Any]:
    if message_id.startswith("tck-reject-task"):
        raise agenthub.TaskFailed("rejected", code="rejected")
    if message_id.startswith("tck-input-required"):
        task.run(task.ask("What next?"))
    if message_id.startswith("test-resubscribe-message-id"):
        time.sleep(SLOW_S)
    if message_id.startswith("tck-stream-artifact-chunked"):
        yield "chunk-1 "
        time.sleep(0.1)  # The SDK joins texts that come at the same time.
        yield "chunk-2"
        return None
    return next(output for prefix, output in OUTPUTS.items() if message_id.startswith(prefix))


class Gateway(agenthub_a2a.Gateway):
    """Delegates the ids of messages, not their parts."""

    def __init__(self, requester: agenthub.Agent, *given: Any) -> None:
        submit = requester.submit

        async def submit_id(**options: Any) -> agenthub.TaskHandle:
            return await submit(**options | {"input": {"message_id": MESSAGE_ID.get()}})

        requester.submit = submit_id  # type: ignore[method-assign]
        super().__init__(requester, *given)

    async def execute(self, context: Any, event_queue: Any) -> None:
        MESSAGE_ID.set(context.message.message_id)
        await super().execute(context, event_queue)


def new_task_id(context: Any, message_id: str, task_id_of: Any = agenthub_a2a.task_id_of) -> Any:
    return task_id_of(context, f"{message_id}{next(COUNT)}" if message_id else "")


async def main(port: str) -> None:
    async with agenthub.HubServer(port=0) as hub:
        agenthub_a2a.Gateway, agenthub_a2a.task_id_of = Gateway, new_task_id  # type: ignore[misc]
        args = agenthub.argument_parser(["a2a"]).parse_args(["a2a", "--url", hub.url, "--port", port, "--name", "tck"])
        agent.use_hub(hub)
        with agenthub._listening(args):
            async with agent:
                await agenthub._until_stopped(agenthub_a2a.serve(args))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:] or ["9999"]))
