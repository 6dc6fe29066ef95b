"""An agent made with the OpenAI Agents SDK, and another one that delegates to it over the bridge.

It needs the packages `openai-agents` and `agenthub[mcp]`.

$ python examples/openai_agents_sdk.py
planner: The summary is: "Hubs connect agents."

Without an argument, stand-ins take the place of the models; the name of a model, with OPENAI_API_KEY, uses that one.
If a package of yours needs another version of `mcp` than the bridge, install the bridge as a tool of its own, for
example with pipx, and set AGENTHUB_BRIDGE="agenthub bridge".
"""

import asyncio
import json
import os
import shlex
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import agents
import agents.mcp
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

from agenthub import Agent, HubServer

BRIDGE = shlex.split(os.environ.get("AGENTHUB_BRIDGE") or f"{shlex.quote(sys.executable)} -m agenthub bridge")
MODEL = sys.argv[1] if len(sys.argv) > 1 else None


class StandIn(agents.Model):
    """Takes the place of a model: a function returns its text, or the task that it delegates."""

    def __init__(self, respond: Callable[[Any], str | dict[str, Any]]) -> None:
        self._respond = respond

    async def get_response(
        self, system_instructions: Any, input: Any, *args: Any, **options: Any
    ) -> agents.ModelResponse:
        said = self._respond(input)
        if isinstance(said, dict):
            call = {"call_id": "1", "name": "delegate_task", "arguments": json.dumps(said)}
            output: Any = ResponseFunctionToolCall(type="function_call", **call)
        else:
            text = ResponseOutputText(type="output_text", text=said, annotations=[])
            output = ResponseOutputMessage(id="1", type="message", role="assistant", status="completed", content=[text])
        return agents.ModelResponse(output=[output], usage=agents.Usage(), response_id=None)

    def stream_response(self, *args: Any, **options: Any) -> AsyncIterator[Any]:
        raise NotImplementedError("the stand-in does not stream")


def plan(items: Any) -> str | dict[str, Any]:
    """Delegate, then repeat what came back."""
    came_back = [item for item in items if isinstance(item, dict) and item.get("type") == "function_call_output"]
    if not came_back:
        return {"capability": "summarize", "input": {"text": "A hub is where agents meet."}}
    return f'The summary is: "{json.loads(came_back[-1]["output"])["output"]}"'


async def main() -> None:
    agents.set_tracing_disabled(MODEL is None)
    async with HubServer(port=0) as hub, Agent("writer", url=hub.url) as agent:
        writer = agents.Agent("writer", model=MODEL or StandIn(lambda items: "Hubs connect agents."))

        @agent.capability
        async def summarize(text: str) -> str:
            """Summarize a text in one sentence."""
            return (await agents.Runner.run(writer, f"Summarize in one sentence: {text}")).final_output

        params = {"command": BRIDGE[0], "args": [*BRIDGE[1:], "--url", hub.url, "--log-level", "error"]}
        async with agents.mcp.MCPServerStdio(
            params, use_structured_content=True, client_session_timeout_seconds=60
        ) as bridge:
            planner = agents.Agent("planner", model=MODEL or StandIn(plan), mcp_servers=[bridge])
            result = await agents.Runner.run(planner, "Have an agent summarize: A hub is where agents meet.")
            print("planner:", result.final_output)


if __name__ == "__main__":
    asyncio.run(main())
