"""A requester that discovers the agent of 02_greeter.py, in another process, and delegates to it.

$ python -m agenthub hub
$ python examples/02_greeter.py
$ python examples/02_caller.py
Hello, Ada!
Bonjour, Grace!
greeter: Greets people, each in their own way
"""

import asyncio

from agenthub import Agent


async def main() -> None:
    async with Agent("caller") as me:
        # With `wait`, the caller may start first: the task waits until an agent offers the capability.
        print(await me.delegate("greet", {"name": "Ada"}, wait=True))
        print(await me.delegate("greet", {"name": "Grace", "language": "fr"}, ttl=10))

        for agent in await me.discover("greet"):
            print(f"{agent.name}: {agent.description}")


if __name__ == "__main__":
    asyncio.run(main())
