"""An A2A client: sends a message, prints what comes, and asks its user what the agent asks.

$ python examples/a2a/client.py review '{"files": 3}'
main or develop? develop
reviewed develop, 3 files

It needs the package `a2a-sdk` (`pip install '.[a2a]'` in a clone). See README.md in this folder.
"""

import argparse
import asyncio
import json
import uuid

from a2a.client import create_client
from a2a.types import Message, Part, Role, SendMessageRequest, TaskState


def part_of(text: str) -> Part:
    """Return a part with JSON, if the text is that, else with the text."""
    try:
        json.loads(text)
    except ValueError:
        return Part(text=text)
    return Part(text=text, media_type="application/json")


async def main(url: str, text: str) -> None:
    client = await create_client(url)
    message = Message(role=Role.ROLE_USER, message_id=uuid.uuid4().hex, parts=[part_of(text)])
    while True:
        question, task_id = "", ""
        async for event in client.send_message(SendMessageRequest(message=message)):
            if event.HasField("artifact_update"):
                print("".join(part.text or str(part.data) for part in event.artifact_update.artifact.parts))
            elif event.HasField("status_update"):
                status, task_id = event.status_update.status, event.status_update.task_id
                is_ours = status.message.role == Role.ROLE_USER
                said = "" if is_ours else "".join(part.text for part in status.message.parts)
                question = said if status.state == TaskState.TASK_STATE_INPUT_REQUIRED else ""
                if said and not question:
                    print(f"{TaskState.Name(status.state)}: {said}")
        if not question:
            return
        answer = Part(text=await asyncio.to_thread(input, f"{question} "))
        message = Message(role=Role.ROLE_USER, message_id=uuid.uuid4().hex, task_id=task_id, parts=[answer])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", nargs="?", default="")
    parser.add_argument("input", nargs="?", default="null")
    parser.add_argument("--url", default="http://127.0.0.1:8766", help="of the gateway, or of any A2A agent")
    args = parser.parse_args()
    asyncio.run(main(f"{args.url}/a2a/{args.capability}" if args.capability else args.url, args.input))
