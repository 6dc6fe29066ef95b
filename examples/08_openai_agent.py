"""An agent that asks a model of OpenAI. It needs the package `openai`, and your key in OPENAI_API_KEY.

$ python -m agenthub hub
$ python examples/08_openai_agent.py
$ python -m agenthub call translate '{"text": "Agents at work", "language": "German"}'
"Agenten bei der Arbeit"

With OPENAI_BASE_URL, it asks any server with the same interface, for example a model on your own machine.
"""

import openai

from agenthub import Agent

agent = Agent("translator", description="Translates with a language model", max_tasks=8)
client = openai.AsyncOpenAI()


@agent.capability
async def translate(text: str, language: str = "English") -> str:
    """Translate a text."""
    completion = await client.chat.completions.create(
        model="gpt-5.5",
        messages=[
            {"role": "system", "content": f"Translate into {language}. Answer with the translation only."},
            {"role": "user", "content": text},
        ],
    )
    return completion.choices[0].message.content or ""


if __name__ == "__main__":
    agent.run()
