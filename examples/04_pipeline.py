"""An agent that delegates subtasks to others. Subtasks share its deadline, and end when its task ends.

$ python examples/04_pipeline.py
A hub brings them together. (5 words)
"""

import asyncio

from agenthub import Agent, LocalHub, Task, capability


class Splitter(Agent):
    @capability("split")
    async def split(self, text: str) -> list[str]:
        return [f"{sentence}." for sentence in text.rstrip(".").split(". ")]


class Counter(Agent):
    @capability("count-words")
    def count_words(self, text: str) -> int:  # A plain function runs in a thread.
        return len(text.split())


class Editor(Agent):
    @capability("longest-sentence")
    async def longest_sentence(self, text: str, task: Task) -> str:
        sentences = await task.delegate("split", text)
        counts = await asyncio.gather(*(task.delegate("count-words", sentence) for sentence in sentences))
        count, sentence = max(zip(counts, sentences, strict=True))
        return f"{sentence} ({count} words)"


async def main() -> None:
    async with LocalHub() as hub, Splitter(hub=hub), Counter(hub=hub), Editor(hub=hub), Agent("me", hub=hub) as me:
        print(await me.delegate("longest-sentence", "Agents work. A hub brings them together. That is all."))


if __name__ == "__main__":
    asyncio.run(main())
