"""An agent that asks Claude. It needs the package `anthropic`, and your key in ANTHROPIC_API_KEY.

$ python -m agenthub hub
$ python examples/07_anthropic_agent.py
$ python -m agenthub call summarize '{"text": "A hub brings agents together. It queues and retries their tasks."}'
"A hub connects agents and manages their tasks."
"""

import anthropic

from agenthub import Agent

agent = Agent("claude", description="Summarizes with Claude", max_tasks=8)
client = anthropic.AsyncAnthropic()


@agent.capability
async def summarize(text: str, words: int = 20) -> str:
    """Summarize a text in one sentence."""
    request = f"Summarize this text in one sentence of at most {words} words:\n\n{text}"
    message = await client.messages.create(
        model="claude-sonnet-5-5", max_tokens=500, messages=[{"role": "user", "content": request}]
    )
    return "".join(block.text for block in message.content if block.type == "text")


if __name__ == "__main__":
    agent.run()
