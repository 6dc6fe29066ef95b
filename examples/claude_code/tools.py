"""An MCP server with two tools that do not depend on a hub: agenthub bridge --serve 'python tools.py'."""

import datetime
import statistics
from typing import Annotated

from mcp.server.mcpserver import MCPServer
from pydantic import Field

server = MCPServer("calculator", log_level="WARNING")


@server.tool()
def days_between(first: datetime.date, last: datetime.date) -> int:
    """Count the days from one date to another, both as YYYY-MM-DD."""
    return (last - first).days


@server.tool()
def summarize_numbers(numbers: Annotated[list[float], Field(min_length=1)]) -> dict[str, float]:
    """Return the mean, the median, the smallest and the largest of some numbers."""
    mean, median = statistics.fmean(numbers), statistics.median(numbers)
    return {"mean": mean, "median": median, "smallest": min(numbers), "largest": max(numbers)}


if __name__ == "__main__":
    server.run()
