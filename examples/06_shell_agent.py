"""Any program as an agent: it reads the task's input from stdin, as JSON, and prints the output.

$ python examples/06_shell_agent.py
{'a': [1, 2], 'b': None}

By hand, in three terminals:

$ python -m agenthub hub
$ python -m agenthub agent --exec 'python -m json.tool --sort-keys' --name sorter --capability sort-keys
$ python -m agenthub call sort-keys '{"b": null, "a": [1, 2]}'
{
  "a": [
    1,
    2
  ],
  "b": null
}
"""

import asyncio
import sys

from agenthub import Agent, HubServer

COMMAND = f'"{sys.executable}" -m json.tool --sort-keys'
AGENT = ["-m", "agenthub", "agent", "--exec", COMMAND, "--name", "sorter", "--capability", "sort-keys"]


async def main() -> None:
    async with HubServer(port=0) as hub, Agent("me", hub=hub) as me:
        sorter = await asyncio.create_subprocess_exec(sys.executable, *AGENT, "--url", hub.url, "--log-level", "error")
        print(await me.delegate("sort-keys", {"b": None, "a": [1, 2]}, wait=True))
        sorter.terminate()
        await sorter.wait()


asyncio.run(main())
