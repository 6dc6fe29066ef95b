"""An agent on two hubs: what the agents of one site offer can be delegated at the other.

$ python examples/two_sites.py
deployed main

With the URLs of two hubs and names of capabilities it joins these hubs: a task at the first becomes one at the second.
Progress, questions and the trace go through, and if one is cancelled or times out, so is the other.
"""

import asyncio
import sys
from typing import Any

from agenthub import Agent, LocalHub, Progress, Task, TaskFailed


async def pass_on(name: str, office: Agent, factory: Agent) -> None:
    """Offer a capability at the office as soon as the factory has it."""
    while name not in (offered := {it.name: it for agent in await factory.discover(name) for it in agent.capabilities}):
        await asyncio.sleep(1)

    @office.capability(name, description=offered[name].description, input_schema=offered[name].input_schema)
    async def passed_on(task: Task) -> Any:
        def ask(question: Any) -> Any:
            return task.ask(question.text, question.schema)

        handle = await factory.submit(name, task.input, ttl=task.remaining_s, trace=task.trace, on_question=ask)
        try:
            async for news in handle:
                if isinstance(news, Progress):
                    task.progress(news.progress, news.detail)
            return await handle.result()
        except TaskFailed as error:
            raise TaskFailed(error.message, code=error.code) from error
        finally:
            handle.cancel_soon("its task at the other site has ended")  # Without effect if this one has ended, too.


async def main(*names: str, **hubs: Any) -> None:
    async with Agent("gate", **hubs["office"]) as office, Agent("gate", **hubs["factory"]) as factory:
        await asyncio.gather(*(pass_on(name, office, factory) for name in names))
        await asyncio.Event().wait()


async def demo() -> None:
    async with LocalHub() as one, LocalHub() as other, Agent("worker", hub=other) as worker, Agent("me", hub=one) as me:

        @worker.capability
        async def deploy(task: Task) -> str:
            return f"deployed {await task.ask('main or develop?')}"

        gate = asyncio.create_task(main("deploy", office={"hub": one}, factory={"hub": other}))
        print(await me.delegate("deploy", wait=True, on_question=lambda question: "main"))
        gate.cancel()


if __name__ == "__main__":
    urls, names = [{"url": url} for url in sys.argv[1:3]], sys.argv[3:]
    asyncio.run(main(*names, office=urls[0], factory=urls[1]) if names else demo())
