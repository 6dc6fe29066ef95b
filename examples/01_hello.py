"""A hub, an agent and a requester in one process: no server, no socket.

$ python examples/01_hello.py
Hello, Ada!
"""

import asyncio

from agenthub import Agent, LocalHub


async def main() -> None:
    async with LocalHub() as hub:
        greeter = Agent("greeter", hub=hub)

        @greeter.capability
        async def greet(name: str) -> str:
            return f"Hello, {name}!"

        async with greeter, Agent("planner", hub=hub) as me:
            print(await me.delegate("greet", {"name": "Ada"}))


if __name__ == "__main__":
    asyncio.run(main())
