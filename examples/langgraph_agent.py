"""An agent made with LangGraph, and a graph that delegates to it over the bridge.

It needs the packages `langgraph` and `agenthub[mcp]`.

$ python examples/langgraph_agent.py
planner: The summary is: "Hubs connect agents."

Functions take the place of the models. The graph calls the bridge with the client of the package `mcp`: the adapters
of LangChain, `langchain-mcp-adapters`, need `mcp` 1.x, and the bridge needs 2.x. To use them, install the bridge as a
tool of its own, for example with pipx, and set AGENTHUB_BRIDGE="agenthub bridge".
"""

import asyncio
import os
import shlex
import sys
from typing import Any, TypedDict

import mcp
from langgraph.graph import END, START, StateGraph

from agenthub import Agent, HubServer

BRIDGE = shlex.split(os.environ.get("AGENTHUB_BRIDGE") or f"{shlex.quote(sys.executable)} -m agenthub bridge")


class State(TypedDict, total=False):
    """The state that the nodes of both graphs read and write."""

    text: str
    summary: str
    answer: str


def graph(*nodes: Any) -> Any:
    """Return a graph that runs these nodes one after the other."""
    built = StateGraph(State)
    names = [node.__name__ for node in nodes]
    for name, node in zip(names, nodes, strict=True):
        built.add_node(name, node)
    for former, name in zip([START, *names], [*names, END], strict=True):
        built.add_edge(former, name)
    return built.compile()


async def main() -> None:
    def write(state: State) -> State:
        return {"summary": "Hubs connect agents."}  # Here a model would read state["text"].

    writer = graph(write)
    async with HubServer(port=0) as hub, Agent("writer", url=hub.url) as agent:

        @agent.capability
        async def summarize(text: str) -> str:
            """Summarize a text in one sentence."""
            return (await writer.ainvoke({"text": text}))["summary"]

        transport = mcp.StdioServerParameters(
            command=BRIDGE[0], args=[*BRIDGE[1:], "--url", hub.url, "--log-level", "error"]
        )
        async with mcp.Client(mcp.stdio_client(transport)) as bridge:

            async def delegate(state: State) -> State:
                task = {"capability": "summarize", "input": {"text": state["text"]}}
                result = await bridge.call_tool("delegate_task", task)
                return {"summary": result.structured_content["output"]}

            def conclude(state: State) -> State:
                return {"answer": f'The summary is: "{state["summary"]}"'}

            planner = graph(delegate, conclude)
            print("planner:", (await planner.ainvoke({"text": "A hub is where agents meet."}))["answer"])


if __name__ == "__main__":
    asyncio.run(main())
