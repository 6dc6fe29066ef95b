"""Make docs/cli.md from the parser of the command line, and docs/api.md; `python -m tests.stubs` writes them."""

from __future__ import annotations

import argparse
import enum
import inspect
import os
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import agenthub
from agenthub import argument_parser

ROOT = Path(__file__).parent.parent
CLI = ROOT / "docs" / "cli.md"
API = ROOT / "docs" / "api.md"
HEAD = """# Command line

<!-- made from the parser in agenthub.py by `python -m tests.stubs` -->

`python -m agenthub` and `python agenthub.py` do the same as `agenthub`. Exit codes: 0 done, 1 failed, 2 usage,
130 Ctrl-C.
"""
API_HEAD = """# Python API

<!-- made from the docstrings in agenthub.py by `python -m tests.stubs` -->

These are the public names of the module `agenthub`. All others may change in any version.
"""
NOTES = {
    "agent": "A program of `--exec` fails its task by a non-zero exit, with the end of its stderr as the reason.\n"
    "It does not get `AGENTHUB_TOKEN`.\n",
    "call": "Ctrl-C cancels the task.\n",
    "completion": "Add one line to the shell's startup file: `source <(agenthub completion bash)` to `~/.bashrc`,\n"
    "`source <(agenthub completion zsh)` to `~/.zshrc`, or `agenthub completion fish | source` to\n"
    "`~/.config/fish/config.fish`.\n",
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


def api_page() -> str:
    """Return the page of the Python API as it should be."""
    source = (ROOT / "agenthub.py").read_text(encoding="utf-8").partition("__all__ = [")[2].partition("\n]")[0]
    parts = [API_HEAD]
    for section, name in re.findall(r'# \d (.+)|"(\w+)"', source):
        parts.append(f"\n## {section}\n" if section else api_entry(name, getattr(agenthub, name)))
    return "".join(parts)


def api_entry(name: str, value: Any) -> str:
    """Return the entry of a public name: its signature, its docstring, and its public methods or members."""
    if not isinstance(value, type | types.FunctionType):
        return f"\n### {name}\n\nA table: `{type(value).__name__}`.\n"
    signature = signature_of(value) if isinstance(value, types.FunctionType) else ""
    parts = [f"\n### {name}{signature}\n", docstring_of(value)]
    if isinstance(value, enum.EnumType):
        parts.append(f"\nMembers: {', '.join(f'`{one}`' for one in value.__members__)}.\n")
    elif isinstance(value, type):
        parts += [f"\n- `{shown}`: {text}\n" for shown, text in methods_of(value)]
    return "".join(parts)


def docstring_of(value: Any) -> str:
    """Return a docstring as paragraphs. A class without one of its own gets none from its base or from dataclass."""
    text = inspect.cleandoc(value.__doc__ or "")
    is_made = text.startswith(f"{getattr(value, '__name__', '')}(")
    return f"\n{escaped(text)}\n" if text and not is_made else ""


def methods_of(owner: type) -> Iterator[tuple[str, str]]:
    """Yield the public methods and properties that a class defines, with the first paragraph of each docstring."""
    for name, value in vars(owner).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not name.startswith("_") and isinstance(function, types.FunctionType) and function.__doc__:
            shown = name if isinstance(value, property) else f"{name}{signature_of(function)}"
            yield shown, " ".join(inspect.cleandoc(function.__doc__).partition("\n\n")[0].split())


def signature_of(function: Any) -> str:
    """Return the names of a function's parameters, without types and defaults, which the stubs have."""
    parameters = [
        str(one.replace(annotation=one.empty, default=one.empty))
        for one in inspect.signature(function).parameters.values()
    ]
    return f"({', '.join(one for one in parameters if one not in ('self', 'cls'))})"


def escaped(text: str) -> str:
    """Return text whose indented parts are code, as Markdown has it: a blank line comes before them."""
    return re.sub(r"(?<=[^\n])\n(?= {4})", "\n\n", text)
