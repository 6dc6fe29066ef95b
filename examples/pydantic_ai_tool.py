"""The capabilities of a hub as tools of an agent of Pydantic AI. It needs the package `pydantic-ai-slim`.

$ python examples/pydantic_ai_tool.py
{"count_words":1}

The default model, `test`, calls each tool once; the argument `anthropic:claude-sonnet-5-5` uses a real one.
"""

import asyncio
import sys
from typing import Any

import pydantic_ai

from agenthub import Agent, LocalHub, TaskFailed, TaskTimeout


async def tools(me: Agent) -> list[pydantic_ai.Tool]:
    """Return a tool for each capability that is online."""

    def tool(capability: Any) -> pydantic_ai.Tool:
        async def delegate(**arguments: Any) -> Any:
            try:
                return await me.delegate(capability.name, arguments, ttl=60)
            except (TaskFailed, TaskTimeout) as error:
                raise pydantic_ai.ModelRetry(str(error)) from error

        return pydantic_ai.Tool.from_schema(delegate, capability.name, capability.description, capability.input_schema)

    return [tool(capability) for agent in await me.discover() for capability in agent.capabilities]


async def main(model: str) -> None:
    async with LocalHub() as hub, Agent("counter", hub=hub) as counter, Agent("planner", hub=hub) as me:

        @counter.capability
        def count_words(text: str) -> int:
            """Count the words of a text."""
            return len(text.split())

        planner = pydantic_ai.Agent(model, tools=await tools(me))
        print((await planner.run("How many words are in 'to be or not to be'?")).output)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "test"))
