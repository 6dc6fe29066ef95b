"""A dozen agents at work for as long as you like, to look at: http://127.0.0.1:8765/ shows them.

$ python -m examples.demo --seconds 2
open http://127.0.0.1:8765/ to look at a dozen agents at work

They do nothing but wait. Some of them fail, ask, report progress, delegate to others, or come and go. With --seed they
draw the same lots each time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

from agenthub import Agent, HubServer, Refused, Task, TaskFailed

LOTS = random.Random()

TOPICS = ["tides", "bridges", "sourdough", "comets", "lighthouses", "glass", "honey", "maps", "clocks", "paper"]
CAST = {  # Of each agent: what it says of itself, its capabilities, how many tasks it runs at once, and its metadata.
    "planner": ("Splits a piece of work, and has others do the parts", ["plan-article"], 4, {"model": "large"}),
    "researcher-1": ("Reads sources", ["research"], 3, {"region": "eu"}),
    "researcher-2": ("Reads sources", ["research"], 3, {"region": "us"}),
    "writer": ("Writes drafts, word by word", ["write-draft"], 2, {"model": "large"}),
    "reviewer": ("Reads drafts and says what is wrong", ["review", "check-facts"], 2, {}),
    "translator-de": ("Translates into German", ["translate-de"], 4, {"language": "de"}),
    "translator-fr": ("Translates into French", ["translate-fr"], 4, {"language": "fr"}),
    "illustrator": ("Draws pictures, slowly", ["draw"], 1, {"gpu": True}),
    "test-runner": ("Runs tests, which fail now and then", ["run-tests"], 6, {}),
    "release-manager": ("Asks before it releases anything", ["release"], 2, {}),
    "night-shift": ("Comes and goes", ["summarize", "research"], 2, {}),
    "indexer": ("Makes what was written easy to find", ["index", "summarize"], 8, {}),
}
WORK = [
    "research",
    "write-draft",
    "review",
    "check-facts",
    "translate-de",
    "translate-fr",
    "draw",
    "run-tests",
    "index",
]


async def work(task: Task) -> Any:
    """Take a while over a task, and report progress of it."""
    steps = LOTS.randint(2, 8)
    for step in range(steps):
        await asyncio.sleep(LOTS.uniform(0.05, 0.9) * (4 if task.capability == "draw" else 1))
        task.progress((step + 1) / steps, {"step": step + 1, "of": steps})
    if LOTS.random() < (0.25 if task.capability == "run-tests" else 0.03):
        raise TaskFailed("two of 31 tests failed" if task.capability == "run-tests" else "nothing found")
    return {"done": task.capability, "words": LOTS.randint(80, 900)}


async def plan(task: Task) -> Any:
    """Have the parts of an article done by others, one after the other."""
    topic = task.input["topic"]
    await asyncio.gather(*(task.delegate("research", {"topic": topic, "part": part}) for part in ("past", "present")))
    draft = await task.delegate("write-draft", {"topic": topic}, max_retries=1)
    await asyncio.gather(task.delegate("review", draft), task.delegate("translate-de", draft))
    return {"topic": topic, "published": True}


async def release(task: Task) -> Any:
    """Ask the requester, who takes its time."""
    await asyncio.sleep(LOTS.uniform(0.2, 1))
    branch = await task.ask("main or develop?", schema={"enum": ["main", "develop"]})
    await asyncio.sleep(LOTS.uniform(0.5, 2))
    return f"released {branch}"


SPECIAL = {"plan-article": plan, "release": release}


def member(name: str, url: str) -> Agent:
    """Return one of the cast."""
    description, capabilities, max_tasks, metadata = CAST[name]
    agent = Agent(name, url=url, description=description, max_tasks=max_tasks, metadata=metadata)
    for one in capabilities:
        agent.capability(one, description=f"{description} ({one})")(SPECIAL.get(one, work))
    return agent


async def come_and_go(name: str, url: str) -> None:
    """Keep an agent working for a while, and away for a while."""
    while True:
        async with member(name, url):
            await asyncio.sleep(LOTS.uniform(6, 12))
        await asyncio.sleep(LOTS.uniform(3, 6))


async def answer_later(question: Any) -> str:
    await asyncio.sleep(LOTS.uniform(2, 6))
    return LOTS.choice(["main", "develop"])


async def request(requester: Agent, capability: str) -> None:
    """Delegate a task, and wait for its outcome, whatever it is."""
    with contextlib.suppress(TaskFailed, Refused):
        options = {"ttl": LOTS.choice([20.0, 60.0, 300.0]), "priority": LOTS.choice([0, 0, 0, 10]), "max_retries": 1}
        asked = {"on_question": answer_later} if capability == "release" else {}
        await requester.delegate(capability, {"topic": LOTS.choice(TOPICS)}, **options, **asked)


async def keep_requesting(name: str, url: str, tasks_per_s: float) -> None:
    """Delegate tasks at random times."""
    async with Agent(name, url=url, description="Has work to be done") as me, asyncio.TaskGroup() as open_tasks:
        with contextlib.suppress(Refused):
            await me.submit("compose-music", {"topic": "tides"}, wait=True)  # Which nobody here can do.
        while True:
            await asyncio.sleep(LOTS.expovariate(tasks_per_s))
            capability = LOTS.choices(["plan-article", "release", LOTS.choice(WORK)], [1, 1, 8])[0]
            open_tasks.create_task(request(me, capability))


@contextlib.asynccontextmanager
async def at_work(hub: HubServer, tasks_per_s: float = 2.5) -> AsyncIterator[None]:
    """Have the cast work at a hub until the end of the `async with`."""
    others = [name for name in CAST if name != "night-shift"]
    async with contextlib.AsyncExitStack() as stack:
        for name in others:
            await stack.enter_async_context(member(name, hub.url))
        jobs = [asyncio.create_task(come_and_go("night-shift", hub.url))]
        jobs += [asyncio.create_task(keep_requesting(one, hub.url, tasks_per_s / 2)) for one in ("editor", "newsroom")]
        try:
            yield
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)


async def main() -> None:
    parser = argparse.ArgumentParser(description="A dozen agents at work, to look at.")
    parser.add_argument("--port", type=int, default=8765, help="port of the hub (default: 8765)")
    parser.add_argument("--seconds", type=float, help="how long they work (default: until Ctrl-C)")
    parser.add_argument("--rate", type=float, default=2.5, help="tasks per second, besides subtasks (default: 2.5)")
    parser.add_argument("--seed", type=int, help="the same lots each time")
    args = parser.parse_args()
    LOTS.seed(args.seed)
    async with HubServer(port=args.port) as hub, at_work(hub, args.rate):
        print(f"open http://127.0.0.1:{hub.port}/ to look at a dozen agents at work", flush=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), args.seconds)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
