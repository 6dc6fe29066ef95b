"""The Python SDK, as clients/conformance.py checks it: `--client 'python -m clients.conformance_worker'`."""

import asyncio

from agenthub import Agent, Task, TaskFailed

agent = Agent("checked")


@agent.capability
async def echo(task: Task):
    return task.input


@agent.capability
async def sleep(task: Task):
    await asyncio.sleep(task.input)
    return task.input


@agent.capability
async def fail():
    raise TaskFailed("as it was asked to", code="own")


@agent.capability
async def relay(task: Task):
    return await task.delegate("elsewhere", task.input)


@agent.capability
async def answer(task: Task):
    return await task.delegate("elsewhere", task.input, on_question=lambda question: question.text)


@agent.capability
async def ask(task: Task):
    return [await task.ask(text) for text in task.input]


@agent.capability
async def stream(task: Task):
    for item in task.input:
        yield item


if __name__ == "__main__":
    agent.run()
