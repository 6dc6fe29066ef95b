"""Review the Python files of a folder with a hub, two agents in different styles, and a requester that uses both.

$ python -m examples.review_folder FOLDER

Each task contains the text of its file and is sent over real sockets, so the agents could run on other machines.
Progress is printed to stderr, and a table of findings to stdout. Lines with `# noqa` are ignored.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import builtins
import contextlib
import itertools
import json
import os
import re
import reprlib
import shutil
import sys
import threading
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from agenthub import Agent, AgentHubError, HubServer, HubSettings, capability

SKIPPED_FOLDERS = {"__pycache__", "build", "dist", "node_modules", "venv"}  # And all hidden folders.
FILE_BYTES_MAX = 500_000
MESSAGE_BYTES_MAX = 4_000_000  # One byte of a file may take up to six in JSON.
FILES_AT_ONCE = 4


class Finding(NamedTuple):
    """A problem and its place. Findings sort in the order of the table."""

    path: str
    line: int
    check: str
    message: str


# ============================================================================================
# The agents: one uses a decorator, the other is a class. Each has its own group of checks.
# ============================================================================================


def bug_hunter(url: str) -> Agent:
    agent = Agent("bug-hunter", description="Finds likely bugs in Python files", url=url)

    @agent.capability("find-bugs")
    def find_bugs(path: str, source: str) -> list[dict[str, Any]]:
        """Find likely bugs in a Python file."""
        return [finding._asdict() for finding in review(path, source, BUGS)]

    return agent


class StyleChecker(Agent):
    """Finds style problems in Python files."""

    @capability("check-style")
    def check_style(self, path: str, source: str) -> list[dict[str, Any]]:
        """Find style problems in a Python file."""
        # A package's imports are part of its interface.
        is_package = path.endswith("__init__.py")
        checks = {name: find for name, find in STYLE.items() if not (is_package and find is unused_import)}
        return [finding._asdict() for finding in review(path, source, checks)]


# ============================================================================================
# The requester
# ============================================================================================


@dataclass
class Review:
    """The findings of all reviewed files, and for each other file a note with the reason."""

    files: int
    findings: list[Finding] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


class NotReviewed(Exception):
    """A file cannot be reviewed, or is skipped; the text is the reason."""


async def review_files(paths: list[Path]) -> Review:
    """Start the hub and the agents, and delegate the review of all files, several at a time."""
    outcome = Review(len(paths))
    slots = asyncio.Semaphore(FILES_AT_ONCE)

    async def review_one(path: Path) -> None:
        name = escape_unprintable(path.as_posix())
        async with slots:
            try:
                outcome.findings.extend(await review_file(me, path, name))
            except (NotReviewed, AgentHubError, ValueError) as error:
                outcome.skipped.append(f"{name}: {error}")
        progress.step(name)

    async with (
        HubServer(HubSettings(message_bytes_max=MESSAGE_BYTES_MAX), port=0) as hub,
        bug_hunter(hub.url),
        StyleChecker(url=hub.url),
        Agent("requester", url=hub.url) as me,
    ):
        print(f"the hub is at {hub.url}", file=sys.stderr)
        with ProgressLine(len(paths)) as progress:
            async with asyncio.TaskGroup() as group:
                for path in paths:
                    group.create_task(review_one(path))
    return Review(len(paths), sorted(outcome.findings), sorted(outcome.skipped))


async def review_file(me: Agent, path: Path, name: str) -> set[Finding]:
    """Delegate a file to both agents at once. Raises NotReviewed, or the error of a task."""
    try:
        file = {"path": name, "source": read_source(path)}
    except (SyntaxError, UnicodeError, LookupError):
        return {Finding(name, 1, "encoding", "is not UTF-8, or not in the encoding that it declares")}
    answers = await asyncio.gather(me.delegate("find-bugs", file), me.delegate("check-style", file))
    return {Finding(**found) for answer in answers for found in answer}  # A set, because both report a syntax error.


def read_source(path: Path) -> str:
    """Return the text of a file. Raises NotReviewed, or the error of its encoding."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise NotReviewed(f"has more than {FILE_BYTES_MAX} bytes")
        with tokenize.open(path) as file:
            return file.read()
    except OSError as error:
        raise NotReviewed(os.strerror(error.errno or 0)) from error


def python_files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_skipped(Path(parent, name))]
        yield from (path for name in names if name.endswith(".py") and (path := Path(parent, name)).is_file())


def is_skipped(folder: Path) -> bool:
    return folder.name.startswith(".") or folder.name in SKIPPED_FOLDERS or (folder / "pyvenv.cfg").exists()


# ============================================================================================
# The checks. Each takes the syntax tree of a file, and yields a line and a message for each finding.
# ============================================================================================

Found = Iterator[tuple[int, str]]
Check = Callable[[ast.AST], Found]
Node = TypeVar("Node", bound=ast.AST)

BUGS: dict[str, Check] = {}
STYLE: dict[str, Check] = {}

UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)
PARSING = threading.Lock()
NOQA = re.compile(r"#\s*noqa\b", re.IGNORECASE)
NOQA_FILE = re.compile(r"#\s*(flake8|ruff):\s*noqa\b", re.IGNORECASE)


def parse(source: str, mode: str = "exec") -> ast.AST:
    """Return the syntax tree of some source. Raises one of UNPARSABLE."""
    with PARSING:  # Python 3.11 and 3.12 cannot parse safely in several threads at once.
        return ast.parse(source, mode=mode)


def review(path: str, source: str, checks: dict[str, Check]) -> list[Finding]:
    """Apply checks to the text of a file. A file that cannot be parsed has one finding, its syntax error."""
    try:
        tree = parse(source)
    except UNPARSABLE as error:
        line, message = getattr(error, "lineno", None) or 1, getattr(error, "msg", str(error))
        return [Finding(path, line, "syntax-error", message)]
    ignored = ignored_lines(tree, source)
    found = ((line, name, message) for name, find in checks.items() for line, message in find(tree))
    return [Finding(path, *one) for one in found if one[0] not in ignored]


def ignored_lines(tree: ast.AST, source: str) -> set[int]:
    """Return the lines marked with `# noqa`, and all lines of an import whose first line is marked."""
    lines = source.split("\n")
    if any(NOQA_FILE.match(line) for line in lines):
        return set(range(len(lines) + 1))
    ignored = {number for number, line in enumerate(lines, 1) if NOQA.search(line)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.lineno in ignored:
            ignored.update(range(node.lineno, (node.end_lineno or 0) + 1))
    return ignored


def check(group: dict[str, Check]) -> Callable[[Check], Check]:
    """Add a function to a group of checks, under its own name with hyphens."""

    def add(function: Check) -> Check:
        group[function.__name__.replace("_", "-")] = function
        return function

    return add


@check(BUGS)
def bare_except(tree: ast.AST) -> Found:
    for handler in nodes(tree, ast.ExceptHandler):
        if handler.type is None and not any(isinstance(statement, ast.Raise) for statement in handler.body):
            yield handler.lineno, "catches KeyboardInterrupt and SystemExit too"


@check(BUGS)
def swallowed_exception(tree: ast.AST) -> Found:
    for handler in nodes(tree, ast.ExceptHandler):
        broad = exceptions(handler) & {"Exception", "BaseException"}
        if broad and all(is_idle(statement) for statement in handler.body):
            yield handler.lineno, f"{min(broad)} is caught, and nobody is told"


@check(BUGS)
def mutable_default(tree: ast.AST) -> Found:
    for arguments in nodes(tree, ast.arguments):
        for argument, default in defaults(arguments):
            if is_mutable(default):
                yield default.lineno, f"one {argument} is shared by all calls"


@check(BUGS)
def unreachable_code(tree: ast.AST) -> Found:
    for block in blocks(tree):
        for statement, following in itertools.pairwise(block):
            # An unreachable yield makes a function an empty generator.
            if isinstance(statement, ast.Return | ast.Raise | ast.Break | ast.Continue) and not is_yield(following):
                yield following.lineno, f"never runs, after the {type(statement).__name__.lower()} above it"
                break


@check(BUGS)
def none_comparison(tree: ast.AST) -> Found:
    for comparison in nodes(tree, ast.Compare):
        operands = itertools.pairwise([comparison.left, *comparison.comparators])
        for operator, pair in zip(comparison.ops, operands, strict=True):
            if isinstance(operator, ast.Eq | ast.NotEq) and any(is_none(operand) for operand in pair):
                yield comparison.lineno, f"use `{'is' if isinstance(operator, ast.Eq) else 'is not'} None`"


@check(BUGS)
def assert_on_tuple(tree: ast.AST) -> Found:
    for statement in nodes(tree, ast.Assert):
        if isinstance(statement.test, ast.Tuple) and statement.test.elts:
            yield statement.lineno, "a tuple is always true"


@check(BUGS)
def duplicate_key(tree: ast.AST) -> Found:
    for display in nodes(tree, ast.Dict):
        seen = set()
        for key in display.keys:
            if isinstance(key, ast.Constant):
                if (type(key.value), key.value) in seen:
                    yield key.lineno, f"{reprlib.repr(key.value)} is a key of this dict already"
                seen.add((type(key.value), key.value))


@check(STYLE)
def unused_import(tree: ast.AST) -> Found:
    used = names_read(tree) | names_in_strings(tree)
    for alias in imports(tree):
        name = alias.asname or alias.name.partition(".")[0]
        # `import x as x` exports the name.
        if name not in used and name != "*" and alias.asname != alias.name:
            yield alias.lineno, f"{name} is imported and never used"


@check(STYLE)
def unused_variable(tree: ast.AST) -> Found:
    for handler in nodes(tree, ast.ExceptHandler):
        if handler.name and handler.name not in names_read(handler):
            yield handler.lineno, f"{handler.name} is never used"
    for scope, inside in scopes(tree):
        used = names_read(scope)
        # Other modules may use variables outside functions. `locals` and similar functions use all names.
        if isinstance(scope, FUNCTIONS) and not used & {"dir", "eval", "exec", "locals", "vars"}:
            for name, line in first_lines(assignments(inside)):
                if name not in used and not name.startswith("_"):
                    yield line, f"{name} is assigned and never used"


@check(STYLE)
def shadowed_builtin(tree: ast.AST) -> Found:
    for scope, inside in scopes(tree):
        if not isinstance(scope, ast.ClassDef):  # Attributes shadow nothing.
            for name, line in first_lines(bindings(scope, inside)):
                if name in BUILTINS:
                    yield line, f"{name} is the name of a built-in"


@check(STYLE)
def empty_f_string(tree: ast.AST) -> Found:
    format_specs = {value.format_spec for value in nodes(tree, ast.FormattedValue)}
    for string in nodes(tree, ast.JoinedStr):
        if string not in format_specs and not any(isinstance(part, ast.FormattedValue) for part in string.values):
            yield string.lineno, "an f-string without placeholders"


# ============================================================================================
# Queries on a syntax tree
# ============================================================================================

PROMPT_ONLY = {"copyright", "credits", "exit", "help", "license", "quit"}
BUILTINS = {name for name in dir(builtins) if not name.startswith("_")} - PROMPT_ONLY
MUTABLE_TYPES = {"Counter", "OrderedDict", "bytearray", "defaultdict", "deque", "dict", "list", "set"}
TAKES_TYPES = {"ForwardRef", "NewType", "TypeVar", "cast"}  # Their arguments may be quoted types.
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.Lambda, ast.ClassDef)


def nodes(tree: ast.AST, kind: type[Node]) -> Iterator[Node]:
    return (node for node in ast.walk(tree) if isinstance(node, kind))


def scopes(tree: ast.AST) -> Iterator[tuple[ast.AST, list[ast.AST]]]:
    """Yield the module and each function and class, with the nodes that belong to it and to no inner scope."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        scope = waiting.pop()
        inside = list(ast.iter_child_nodes(scope))
        for node in inside:  # The list grows while the loop runs.
            if isinstance(node, SCOPES):
                waiting.append(node)
            else:
                inside.extend(ast.iter_child_nodes(node))
        yield scope, inside


def blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            if isinstance(block := getattr(node, name, None), list):
                yield block


def imports(tree: ast.AST) -> Iterator[ast.alias]:
    """Yield the imports that only the file itself can use."""
    exempt = set(exempt_from_use(tree))
    for node in ast.walk(tree):
        is_future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if isinstance(node, ast.Import | ast.ImportFrom) and not is_future and node not in exempt:
            yield from node.names


def exempt_from_use(tree: ast.AST) -> Iterator[ast.stmt]:
    """Yield statements whose imports may be unused: fallbacks for a missing module, and attributes of a class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and is_import_guard(node):
            yield from itertools.chain(node.body, node.orelse, *(handler.body for handler in node.handlers))
        elif isinstance(node, ast.If) and node.orelse:
            yield from itertools.chain(node.body, node.orelse)
        elif isinstance(node, ast.ClassDef):
            yield from node.body


def name_of(expression: ast.expr | None) -> str:
    """Return `name` for name and for module.name, else an empty string."""
    if isinstance(expression, ast.Attribute):
        return expression.attr
    return expression.id if isinstance(expression, ast.Name) else ""


def names_read(tree: ast.AST) -> set[str]:
    """Return the names that are used other than as the target of an assignment."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.AugAssign):
            names.add(name_of(node.target))
        elif isinstance(node, ast.Global | ast.Nonlocal):
            names.update(node.names)
    return names


def names_in_strings(tree: ast.AST) -> set[str]:
    """Return the names in strings that contain code: quoted types, and the entries of `__all__`."""
    names: set[str] = set()
    for node in nodes_with_quoted_code(tree):
        for constant in nodes(node, ast.Constant):
            with contextlib.suppress(*UNPARSABLE):
                if isinstance(constant.value, str):
                    quoted = parse(constant.value.strip(), "eval")
                    names |= names_read(quoted) | names_in_strings(quoted)
    return names


def nodes_with_quoted_code(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, FUNCTIONS) and node.returns is not None:
            yield node.returns
        elif isinstance(node, ast.Subscript):
            yield node.slice
        elif isinstance(node, ast.AnnAssign) or takes_types(node) or is_about_all(node):
            yield node


def bindings(scope: ast.AST, inside: Iterable[ast.AST]) -> Iterator[tuple[str, int]]:
    """Yield the names that a scope defines, except parameters whose names an interface prescribes."""
    for node in inside:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg) and not has_prescribed_signature(scope):
            yield node.arg, node.lineno
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef)) or (isinstance(node, ast.ExceptHandler) and node.name):
            yield node.name or "", node.lineno


def assignments(inside: Iterable[ast.AST]) -> Iterator[tuple[str, int]]:
    """Yield the names that are assigned alone: in `a, b = pair`, one may be unused because the other is needed."""
    for node in inside:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        yield from ((target.id, target.lineno) for target in targets if isinstance(target, ast.Name))


def first_lines(pairs: Iterable[tuple[str, int]]) -> Iterable[tuple[str, int]]:
    """Return each name once, with its first line."""
    return dict(sorted(pairs, reverse=True)).items()


def defaults(arguments: ast.arguments) -> Iterator[tuple[str, ast.expr]]:
    positional = [*arguments.posonlyargs, *arguments.args]
    for argument, default in zip(reversed(positional), reversed(arguments.defaults), strict=False):
        yield argument.arg, default
    for argument, keyword_default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if keyword_default is not None:
            yield argument.arg, keyword_default


def exceptions(handler: ast.ExceptHandler) -> set[str]:
    """Return the names of the exceptions that an `except` catches; none if it is bare."""
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {name_of(one) for one in caught if one is not None}


def takes_types(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and name_of(node.func) in TAKES_TYPES


def is_about_all(node: ast.AST) -> bool:
    statements = ast.Assign | ast.AugAssign | ast.Expr
    return isinstance(node, statements) and any(name.id == "__all__" for name in nodes(node, ast.Name))


def is_import_guard(attempt: ast.Try) -> bool:
    """Return whether an attempt handles the failure of an import."""
    wanted = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}
    return any(handler.type is None or exceptions(handler) & wanted for handler in attempt.handlers)


def is_mutable(default: ast.expr) -> bool:
    if isinstance(default, ast.Call):
        return name_of(default.func) in MUTABLE_TYPES
    return isinstance(default, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def has_prescribed_signature(scope: ast.AST) -> bool:
    if not isinstance(scope, FUNCTIONS):
        return False
    return scope.name in ("__exit__", "__aexit__") or any(
        name_of(decorator) in ("overload", "override") for decorator in scope.decorator_list
    )


def is_idle(statement: ast.stmt) -> bool:
    """Return whether a statement is `pass`, an ellipsis or a string."""
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_constant or isinstance(statement, ast.Pass)


def is_yield(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Yield | ast.YieldFrom)


def is_none(expression: ast.expr) -> bool:
    return isinstance(expression, ast.Constant) and expression.value is None


# ============================================================================================
# Output and the command line
# ============================================================================================


class ProgressLine:
    """Shows progress on stderr: in a terminal as one line that is redrawn, else as four lines."""

    def __init__(self, files: int) -> None:
        self.files = files
        self.done = 0
        self.redraws = sys.stderr.isatty()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self.redraws:
            self._draw("")
            print(end="\r", file=sys.stderr, flush=True)

    def step(self, name: str) -> None:
        self.done += 1
        if self.redraws:
            self._draw(f"reviewed {self.done} of {self.files} files: {name}")
        elif self.done * 4 // self.files > (self.done - 1) * 4 // self.files:
            print(f"reviewed {self.done} of {self.files} files", file=sys.stderr)

    def _draw(self, line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{line[:width]:{width}}", end="", file=sys.stderr, flush=True)


def escape_unprintable(text: str) -> str:
    """Return a file name that is safe to print and send: names may contain line breaks, or bytes that are not text."""
    return "".join(character if character.isprintable() else "?" for character in text)


def as_table(outcome: Review) -> str:
    rows = [(f"{one.path}:{one.line}", one.check, one.message) for one in outcome.findings]
    where_width = max((len(where) for where, _, _ in rows), default=0)
    check_width = max((len(check) for _, check, _ in rows), default=0)
    lines = [f"{where:{where_width}}  {check:{check_width}}  {message}" for where, check, message in rows]
    return "\n".join([*lines, *([""] if lines else []), summary(outcome)])


def summary(outcome: Review) -> str:
    files = len({one.path for one in outcome.findings})
    skipped = f", {len(outcome.skipped)} skipped" if outcome.skipped else ""
    return f"{counted(len(outcome.findings), 'finding')} in {files} of {counted(outcome.files, 'file')}{skipped}"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def as_json(outcome: Review) -> str:
    findings = [one._asdict() for one in outcome.findings]
    return json.dumps({"files": outcome.files, "findings": findings, "skipped": outcome.skipped}, indent=2)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="review_folder",
        description="Review the Python files of a folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", default=".", type=Path, metavar="FOLDER", help="the folder to review")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--fail", action="store_true", help="exit with 1 if there are findings")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser()
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        parser.error(f"no such folder: {args.folder}")
    warnings.simplefilter("ignore", SyntaxWarning)  # Warnings about the reviewed files would clutter the output.
    try:
        outcome = asyncio.run(review_files(sorted(python_files(args.folder))))
    except KeyboardInterrupt:
        return 130
    for note in outcome.skipped:
        print(f"skipped {note}", file=sys.stderr)
    print(as_json(outcome) if args.json else as_table(outcome))
    return 1 if args.fail and outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
