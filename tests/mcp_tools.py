"""A small MCP server over stdio, for the tests of `agenthub_mcp --serve`: `python tests/mcp_tools.py [MORE_TOOLS]`."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel

server = MCPServer("toolbox", log_level="CRITICAL")


class Sum(BaseModel):
    sum: int


@server.tool()
async def add(a: int, b: int = 1) -> Sum:
    """Add two numbers."""
    return Sum(sum=a + b)


@server.tool(structured_output=False)
async def greet(name: str) -> str:
    """Greet somebody."""
    return f"Hello, {name}!"


@server.tool(structured_output=False)
async def process_id() -> str:
    """Return the id of this process."""
    return str(os.getpid())


@server.tool(structured_output=False)
async def environment(name: str) -> str:
    """Return an environment variable."""
    return os.environ.get(name, "(not set)")


@server.tool()
async def refuse(reason: str) -> str:
    """Fail."""
    raise ToolError(reason)


@server.tool(structured_output=False)
async def climb(context: Context, folder: str) -> str:
    """Report progress, and continue when the folder holds a file named after the report."""
    for step in (1, 2):
        await context.report_progress(step, 4, f"step {step}")
        while not (Path(folder) / str(step)).exists():
            await asyncio.sleep(0.01)
    return "at the top"


@server.tool()
async def slow(folder: str) -> str:
    """Create a file `started` in a folder, and `cancelled` when the call is cancelled."""
    (Path(folder) / "started").touch()
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        (Path(folder) / "cancelled").touch()
        raise
    return "done"


@server.tool(structured_output=False)
async def draw() -> Image:
    """Draw one dot."""
    return Image(data=b"\x89PNG", format="png")


@server.tool()
async def die() -> str:
    """End this process in the middle of the call."""
    os._exit(3)


async def number() -> str:
    """Give a number."""
    return "a number"


for index in range(int(sys.argv[1]) if len(sys.argv) > 1 else 0):
    server.add_tool(number, f"number-{index}", description="x" * 1000)

if __name__ == "__main__":
    server.run()
