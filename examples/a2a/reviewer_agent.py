"""An agent that asks its requester: `agenthub hub --with examples/a2a/reviewer_agent.py`."""

from typing import Literal

from agenthub import Agent, Task

reviewer = Agent("reviewer", description="Reviews files")


@reviewer.capability
async def review(files: int, task: Task) -> str:
    """Review a number of files on a branch."""
    branch = await task.ask("main or develop?", schema=Literal["main", "develop"])
    return f"reviewed {branch}, {files} files"
