"""Agents as classes, with a state of their own; one takes what the other broadcasts.

$ python -m agenthub hub --with examples/03_class_style.py
$ python -m agenthub call publish '{"title": "Agents at work"}'
1
$ python -m agenthub call latest
"Agents at work"

Beside a hub that runs already: python -m agenthub agent examples/03_class_style.py
"""

from typing import Any

from agenthub import Agent, capability, on_broadcast


class Editor(Agent):
    """Publishes articles."""

    @capability
    async def publish(self, title: str) -> int:
        """Announce an article to all who keep the latest, and return how many that are."""
        return await self.broadcast({"title": title}, capability="latest")


class Reader(Agent):
    """Remembers what was published."""

    def __init__(self, **options: Any) -> None:
        super().__init__("reader", **options)
        self.titles: list[str] = []

    @on_broadcast
    async def remember(self, message: dict[str, str], sender: str) -> None:
        self.titles.append(message["title"])

    @capability
    async def latest(self) -> str:
        return self.titles[-1]
