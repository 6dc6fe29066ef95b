"""Agents as classes with their own state; one receives the broadcasts of the other.

$ python -m agenthub hub --with examples/03_class_style.py
$ python -m agenthub call publish '{"title": "Agents at work"}'
1
$ python -m agenthub call latest
"Agents at work"

If a hub runs already: python -m agenthub agent examples/03_class_style.py
"""

from typing import Any

from agenthub import Agent, capability, on_broadcast


class Editor(Agent):
    """Publishes articles."""

    @capability
    async def publish(self, title: str) -> int:
        """Announce an article to all agents that keep the latest one, and return their number."""
        return await self.broadcast({"title": title}, capability="latest")


class Reader(Agent):
    """Remembers published articles."""

    def __init__(self, **options: Any) -> None:
        super().__init__("reader", **options)
        self.titles: list[str] = []

    @on_broadcast
    async def remember(self, message: dict[str, str], sender: str) -> None:
        self.titles.append(message["title"])

    @capability
    async def latest(self) -> str:
        return self.titles[-1]
