"""An agent that asks its requester in the middle of a task, and passes a question of its own worker on.

$ python examples/asks_back.py
publisher asks: main or develop?
reviewed develop, 3 files
nobody could be asked, so it took main
"""

import asyncio
from typing import Any, Literal

from agenthub import Agent, LocalHub, Task, TaskFailed
from agenthub import TaskQuestion as Question

reviewer = Agent("reviewer")
publisher = Agent("publisher")


@reviewer.capability
async def review(files: int, task: Task) -> str:
    """Ask which branch; take main where nobody can be asked."""
    try:
        branch = await task.ask("main or develop?", schema=Literal["main", "develop"])
    except TaskFailed as error:
        if error.code != "no_answers":
            raise
        return "nobody could be asked, so it took main"
    return f"reviewed {branch}, {files} files"


@publisher.capability
async def publish(files: int, task: Task) -> str:
    """Have the files reviewed; the reviewer's questions go to this task's requester."""

    async def pass_on(question: Question) -> Any:
        return await task.ask(question.text, schema=question.schema)

    return await task.delegate("review", {"files": files}, on_question=pass_on)


def answer(question: Question) -> str:
    """Answer as a person would; a plain function runs in a thread, so it may wait for input()."""
    print(f"publisher asks: {question.text}")
    return "develop"


async def main() -> None:
    async with LocalHub() as hub:
        reviewer.use_hub(hub)
        publisher.use_hub(hub)
        async with reviewer, publisher, Agent("me", hub=hub) as me:
            print(await me.delegate("publish", {"files": 3}, on_question=answer))
            print(await me.delegate("review", {"files": 3}))


asyncio.run(main())
