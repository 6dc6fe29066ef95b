"""An agent made with Pydantic AI, and another one that delegates to it over the bridge.

It needs the packages `pydantic-ai-slim[mcp]` and `agenthub[mcp]`.

$ python examples/pydantic_ai_agent.py
planner: The summary is: "Hubs connect agents."

Without an argument, stand-ins take the place of the models; `anthropic:claude-sonnet-5-5` uses a real one for both.
If a package of yours needs another version of `mcp` than the bridge, install the bridge as a tool of its own, for
example with pipx, and set AGENTHUB_BRIDGE="agenthub bridge".
"""

import asyncio
import os
import shlex
import sys

import pydantic_ai
from pydantic_ai.mcp import MCPToolset, StdioTransport
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel

from agenthub import Agent, HubServer

BRIDGE = shlex.split(os.environ.get("AGENTHUB_BRIDGE") or f"{shlex.quote(sys.executable)} -m agenthub bridge")
MODEL = sys.argv[1] if len(sys.argv) > 1 else None


def plan(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """Stand in for a model: delegate, then repeat what came back."""
    (part, *_) = messages[-1].parts
    if isinstance(part, ToolReturnPart):
        return ModelResponse([TextPart(f'The summary is: "{part.content["output"]}"')])
    task = {"capability": "summarize", "input": {"text": "A hub is where agents meet."}}
    return ModelResponse([ToolCallPart("delegate_task", task)])


async def main() -> None:
    async with HubServer(port=0) as hub, Agent("writer", url=hub.url) as agent:
        writer = pydantic_ai.Agent(MODEL or TestModel(custom_output_text="Hubs connect agents."))

        @agent.capability
        async def summarize(text: str) -> str:
            """Summarize a text in one sentence."""
            return (await writer.run(f"Summarize in one sentence: {text}")).output

        bridge = MCPToolset(StdioTransport(BRIDGE[0], [*BRIDGE[1:], "--url", hub.url, "--log-level", "error"]))
        async with pydantic_ai.Agent(MODEL or FunctionModel(plan), toolsets=[bridge]) as planner:
            print("planner:", (await planner.run("Have an agent summarize: A hub is where agents meet.")).output)


if __name__ == "__main__":
    asyncio.run(main())
