"""An agent in its own process. It runs until Ctrl-C, and may start before the hub.

$ python -m agenthub hub
$ python examples/02_greeter.py

Run 02_caller.py in a third terminal to delegate tasks to it.
"""

from agenthub import Agent

agent = Agent("greeter", description="Greets people, each in their own way")

GREETINGS = {"en": "Hello", "fr": "Bonjour", "sv": "Hej"}


@agent.capability("greet")
async def greet(name: str, language: str = "en") -> str:
    """Greet somebody by name, in English by default."""
    return f"{GREETINGS[language]}, {name}!"


if __name__ == "__main__":
    agent.run()
