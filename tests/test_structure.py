"""The structure of agenthub.py, read from its source: sections use only those above, and the core needs no packages."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import symtable
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import agenthub

SOURCE = Path(agenthub.__file__)
LINES_OF_A_FUNCTION_MAX = 60
TITLE = re.compile(r"^# =+\n# (\d+) (.+)\n", re.MULTILINE)


@functools.cache
def text() -> str:
    return SOURCE.read_text(encoding="utf-8")


@functools.cache
def tree() -> ast.Module:
    return ast.parse(text())


@functools.cache
def sections() -> dict[int, list[ast.stmt]]:
    """Return the statements of each section by its number; 0 is the part above the first banner."""
    starts = {0: 0}
    for banner in TITLE.finditer(text()):
        starts[int(banner[1])] = text().count("\n", 0, banner.start()) + 1
    numbers = list(starts)
    ends = [*list(starts.values())[1:], sys.maxsize]
    return {
        number: [one for one in tree().body if starts[number] < one.lineno < end]
        for number, end in zip(numbers, ends, strict=True)
    }


def defined_by(statement: ast.stmt) -> Iterator[str]:
    """Yield the module-level names that a statement defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from ((one.asname or one.name).split(".")[0] for one in statement.names)
    elif isinstance(statement, ast.If | ast.Try | ast.With):
        for inner in statement.body:
            yield from defined_by(inner)
    else:
        yield from (
            one.id for one in ast.walk(statement) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
        )


def used_by(statement: ast.stmt) -> set[str]:
    """Return the module-level names that a statement uses, also in annotations."""
    table = symtable.symtable(ast.unparse(statement), SOURCE.name, "exec")

    def free(scope: symtable.SymbolTable) -> Iterator[str]:
        is_module = scope is table
        for symbol in scope.get_symbols():
            if symbol.is_referenced() and (symbol.is_global() or is_module):
                yield symbol.get_name()
        for inner in scope.get_children():
            yield from free(inner)

    return set(free(table))


def used_in_section(number: int) -> set[str]:
    return set().union(*(used_by(statement) for statement in sections()[number]))


def defined_in_section(number: int) -> list[str]:
    return [name for statement in sections()[number] for name in defined_by(statement)]


def functions() -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree()) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


# Sections


def test_sections_are_those_of_the_map_in_the_docstring() -> None:
    titles = {int(number): title for number, title in TITLE.findall(text())}
    listed = {
        int(number): title for number, title in re.findall(r"^ {3,4}(\d+) (\S+(?: \S+)*) {2,}", text(), re.MULTILINE)
    }
    assert list(titles) == sorted(titles)
    assert {number: listed[number] for number in titles} == titles
    assert set(listed) - set(titles) <= {5}


def test_every_statement_belongs_to_a_section() -> None:
    assert sum(map(len, sections().values())) == len(tree().body)


@pytest.mark.parametrize("number", list(sections()))
def test_section_uses_only_what_stands_above_it_or_in_it(number: int) -> None:
    later = {name: one for one in sections() if one > number for name in defined_in_section(one)}
    above = {name for one in sections() if one <= number for name in defined_in_section(one)}
    assert {name: later[name] for name in used_in_section(number) & (set(later) - above)} == {}


def test_hub_knows_no_loop_no_clock_no_chance_and_no_socket() -> None:
    forbidden = {
        "asyncio",
        "time",
        "random",
        "socket",
        "os",
        "threading",
        "datetime",
        "uuid",
        "secrets",
        "Path",
        "open",
    }
    assert used_in_section(4) & forbidden == set()


def test_messages_and_states_know_nothing_of_the_loop_either() -> None:
    for number in (1, 2, 3):
        assert used_in_section(number) & {"asyncio", "os", "random", "threading"} == set()


def test_agent_uses_neither_hub_nor_server() -> None:
    """Section 8 never uses 4, 5 and 7."""
    others = {name for number in (4, 5, 7) if number in sections() for name in defined_in_section(number)}
    assert used_in_section(8) & others == set()


def test_one_method_each_moves_an_agent_and_a_task_to_another_state() -> None:
    assigning = []
    for owner in (one for one in sections()[4] if isinstance(one, ast.ClassDef | ast.FunctionDef)):
        for function in (one for one in ast.walk(owner) if isinstance(one, ast.FunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == "state":
                    assigning.append(f"{owner.name}.{function.name}")
    assert assigning == ["Directory.transition", "TaskTable.transition"]
    assert "setattr" not in used_in_section(4)


def test_no_function_is_longer_than_a_screen() -> None:
    long = {
        one.name: lines
        for one in functions()
        if (lines := (one.end_lineno or 0) - one.lineno + 1) > LINES_OF_A_FUNCTION_MAX
    }
    assert long == {}


# __all__


def test_all_is_grouped_by_the_sections_that_define_its_names() -> None:
    groups = re.search(r"^__all__ = \[\n(.*?)^\]", text(), re.MULTILINE | re.DOTALL)
    assert groups is not None
    grouped: dict[int, list[str]] = {}
    for comment, name in re.findall(r'# (\d .+)|"(\w+)",', groups[1]):
        if comment:
            grouped[int(comment[0])] = []
            assert re.search(f"^# {re.escape(comment)}$", text(), re.MULTILINE), comment
        else:
            grouped[max(grouped)].append(name)
    assert [name for names in grouped.values() for name in names] == agenthub.__all__
    for number, names in grouped.items():
        assert set(names) <= set(defined_in_section(number))
        assert names == sorted(names)


def test_all_has_each_name_once_and_every_one_exists() -> None:
    assert len(set(agenthub.__all__)) == len(agenthub.__all__)
    assert all(hasattr(agenthub, name) for name in agenthub.__all__)


def test_all_has_every_error() -> None:
    errors = {one for one in sections()[1] if isinstance(one, ast.ClassDef)}
    assert {one.name for one in errors} <= set(agenthub.__all__)


def test_all_has_every_name_that_readme_docs_and_examples_import() -> None:
    root = SOURCE.parent
    pages = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("examples/*.py")]
    lines = re.findall(r"^\s*from agenthub import (?:\(([^)]*)\)|(.*))$", "\n".join(map(read, pages)), re.MULTILINE)
    names = {name.split(" as ")[0].strip() for line in lines for name in "".join(line).split("#")[0].split(",")}
    assert names - {""} <= set(agenthub.__all__)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_no_name_is_given_to_two_things() -> None:
    made = [one for statement in tree().body for one in names_made_by(statement)]
    assert {one for one in made if made.count(one) > 1} == set()


def names_made_by(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [one.id for target in targets if target for one in ast.walk(target) if isinstance(one, ast.Name)]


# Importing

BLOCKED = """
import sys

sys.modules.update(dict.fromkeys({packages}))  # None there is what Python takes for a package that is not installed.
import agenthub
"""


def output_of(program: str, *packages: str) -> str:
    """Return the output of a program in an interpreter in which these packages cannot be imported."""
    program = BLOCKED.format(packages=packages) + program
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, cwd=SOURCE.parent, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_importing_brings_in_no_other_package() -> None:
    found = output_of("print(sorted({'msgspec', 'pydantic', 'pydantic_core', 'websockets'} & set(sys.modules)))")
    assert found == "[]\n"


def test_using_a_missing_package_says_what_to_install_in_one_line() -> None:
    attempt = (
        "import asyncio\n"
        "try:\n    agenthub.run_loop(asyncio.sleep(0), 'uvloop')\n"
        "except agenthub.PackageMissing as error:\n    print(error)"
    )
    assert output_of(attempt, "uvloop") == "The event loop `uvloop` needs the package uvloop: pip install uvloop\n"


@pytest.mark.parametrize(
    ("missing", "messages", "websocket"),
    [
        (("msgspec",), "pydantic", "websockets"),
        (("msgspec", "pydantic"), "built in", "websockets"),
        (("websockets",), "msgspec", "built in"),
        (("msgspec", "pydantic", "websockets"), "built in", "built in"),
    ],
)
def test_tasks_are_done_over_sockets_without_the_packages(
    missing: tuple[str, ...], messages: str, websocket: str
) -> None:
    if agenthub.usable_version("pydantic", oldest=(2, 11)) is None:  # Also by AGENTHUB_BUILTIN.
        messages = websocket = "built in"
    for name in {messages, websocket} - {"built in"}:
        pytest.importorskip(name)
    program = """
import asyncio, logging

logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.INFO)

async def main():
    async with agenthub.HubServer(port=0) as hub:
        agent = agenthub.Agent("greeter", url=hub.url)
        agent.capability("greet")(lambda name: f"Hello, {name}!")
        async with agent, agenthub.Agent("asker", url=hub.url) as me:
            logging.disable()
            print(await me.delegate("greet", {"name": "Ada"}))

asyncio.run(main())
packages = {'msgspec', 'pydantic', 'pydantic_core', 'websockets'}
print(sorted(packages & {name for name, module in sys.modules.items() if module}))
"""
    first, *_, answer, imported = output_of(program, *missing).splitlines()
    assert answer == "Hello, Ada!"
    used = first.removeprefix("messages: ").split("; websocket: ")
    assert [one if one == "built in" else one.split()[0] for one in used] == [messages, websocket]
    assert not set(missing) & set(ast.literal_eval(imported))


def test_file_is_all_that_a_hub_needs(tmp_path: Path) -> None:
    """Isolated, without site-packages: only the standard library can be imported."""
    shutil.copy(SOURCE, tmp_path)
    program = "import agenthub, sys; print(agenthub.json_schema()['title'], agenthub.codec().name)"
    command = [sys.executable, "-S", "-E", "-c", program]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.stdout, finished.stderr) == ("AgentHub protocol 1 built in\n", "")


def test_file_run_as_a_program_hands_over_to_the_copy_that_others_import() -> None:
    body = tree().body
    (guard,) = [one for one in body if isinstance(one, ast.If) and ast.unparse(one.test) == "__name__ == '__main__'"]
    assert "importlib.import_module(__spec__.name if __spec__ else" in ast.unparse(guard.body[-1])
    assert ast.unparse(guard.body[-1]).endswith(".main())")
    before = body[: body.index(guard)]
    assert not [one for one in before if isinstance(one, ast.FunctionDef | ast.ClassDef)]  # Nothing is defined twice


def test_older_python_is_told_which_one_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SOURCE.read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 8))  # An older one reads the whole file before it runs the first line.
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    check = compile(source.partition("import collections\n")[0], "agenthub.py", "exec")
    text = r"^AgentHub needs Python 3\.11 or newer, this is 3\.10$"
    with pytest.raises(ImportError, match=text):
        exec(check, {"__name__": "agenthub"})
    with pytest.raises(SystemExit, match=text):
        exec(check, {"__name__": "__main__"})


def test_no_pattern_repeats_a_group_possessively() -> None:
    """Before Python 3.11.5 such a group ends too early. That of JSON_TOKENS takes one character, or two, at a time."""
    source = Path(agenthub.__file__).read_text(encoding="utf-8").splitlines()
    found = [line.split(" = ")[0].strip() for line in source if re.search(r"\)[*+?]\+(?!,;)", line)]
    assert found == ["JSON_TOKENS"]
