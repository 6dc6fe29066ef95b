"""Progress reports from a running task, then a cancelled task.

$ python examples/05_progress_and_cancel.py
50%
100%
cancelled: that will do
"""

import asyncio
import time

from agenthub import Agent, LocalHub, Task, TaskFailed, capability


class Counter(Agent):
    @capability
    def count(self, to: int, task: Task) -> None:
        for number in range(1, to + 1):
            if task.cancelled:  # A plain function must check; an async one is cancelled.
                break
            time.sleep(0.01)
            task.progress(number / to)


async def main() -> None:
    async with LocalHub() as hub, Counter(hub=hub), Agent("me", hub=hub) as me:
        counting = await me.submit("count", 2)
        async for update in counting:
            print(f"{update.progress:.0%}")

        counting = await me.submit("count", 1_000_000)
        await counting.cancel("that will do")
        try:
            await counting.result()
        except TaskFailed as error:
            print(f"{error.code}: {error}")


asyncio.run(main())
