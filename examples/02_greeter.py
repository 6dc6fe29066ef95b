"""An agent in a process of its own. It serves until Ctrl-C, and may be started before the hub.

$ python -m agenthub hub
$ python examples/02_greeter.py

02_caller.py, in a third terminal, calls it.
"""

from agenthub import Agent

agent = Agent("greeter", description="Greets people, each in their own way")

GREETINGS = {"en": "Hello", "fr": "Bonjour", "sv": "Hej"}


@agent.capability("greet")
async def greet(name: str, language: str = "en") -> str:
    """Greet somebody by name, in English if nothing else is said."""
    return f"{GREETINGS[language]}, {name}!"


if __name__ == "__main__":
    agent.run()
