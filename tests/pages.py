"""Make docs/cli.md from the parser of the command line; `python -m tests.stubs` writes it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from agenthub import argument_parser

CLI = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """# Command line

<!-- made from the parser in agenthub.py by `python -m tests.stubs` -->

`python -m agenthub` and `python agenthub.py` do the same as `agenthub`. Exit codes: 0 done, 1 failed, 2 usage,
130 Ctrl-C.
"""
NOTES = {
    "agent": "A program of `--exec` fails its task by a non-zero exit, with the end of its stderr as the reason.\n"
    "It does not get `AGENTHUB_TOKEN`.\n",
    "call": "Ctrl-C cancels the task.\n",
}


def cli_page() -> str:
    """Return the page of the command line as it should be."""
    with mock.patch.dict(os.environ, clear=True):  # It may set a default.
        parser = argument_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = [HEAD]
    for name, parser in commands.choices.items():
        about = "\n\n".join(filter(None, (parser.description, NOTES.get(name))))
        parts += [f"\n## agenthub {name}\n\n{about.rstrip()}\n\n| | |\n|---|---|\n", *map(row, arguments(parser))]
    return "".join(parts)


def arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    return (action for action in parser._actions if not isinstance(action, argparse._HelpAction))


def row(action: argparse.Action) -> str:
    """Return the row of an argument: its names and value, and what `--help` prints about it."""
    value = action.metavar or action.dest.upper()
    if action.choices is not None:
        value = "|".join(map(str, action.choices))
    names = [name if action.nargs == 0 else f"{name} {value}" for name in action.option_strings] or [str(value)]
    text = (action.help or "") % {**vars(action), "prog": "agenthub"}
    cells = (", ".join(f"`{name}`" for name in names), text)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"
