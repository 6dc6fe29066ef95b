"""Review the Python files of a folder with a hub, three agents in different styles, and a requester that uses them.

$ python -m examples.review_folder FOLDER

Each task contains the text of its file and is sent over real sockets, so the agents could run on other machines.
Progress is printed to stderr, and the findings that matter most to stdout. Lines with `# noqa` are ignored.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import builtins
import contextlib
import functools
import io
import itertools
import json
import os
import re
import reprlib
import shutil
import sys
import threading
import time
import tokenize
import unicodedata
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

from agenthub import Agent, AgentHubError, HubServer, HubSettings, capability

SKIPPED_FOLDERS = {"__pycache__", "build", "dist", "node_modules", "venv"}  # And all hidden folders.
FILE_BYTES_MAX = 500_000
MESSAGE_BYTES_MAX = 4_000_000  # One byte of a file may take up to six in JSON.
FILES_AT_ONCE = 4
FUNCTION_LINES_MAX = 100
SHOWN_MAX = 12  # With the progress and the summary, they fill a terminal of 24 lines.
SEVERITIES = ("high", "medium", "minor")


class Finding(NamedTuple):
    """A problem, its place, and the agent that found it."""

    path: str
    line: int
    check: str
    message: str
    severity: str
    agent: str = ""


def rank(finding: Finding) -> tuple[Any, ...]:
    """Return the key that sorts findings by severity, then by place."""
    return (SEVERITIES.index(finding.severity), *finding)


# ============================================================================================
# The agents: two use a decorator, one is a class. Each has its own group of checks.
# ============================================================================================


def bug_hunter(url: str) -> Agent:
    agent = Agent("bug-hunter", description="Finds likely bugs in Python files", url=url)

    @agent.capability("find-bugs")
    def find_bugs(path: str, source: str) -> list[dict[str, Any]]:
        """Find likely bugs in a Python file."""
        return [finding._asdict() for finding in review(path, source, BUGS)]

    return agent


def security_scout(url: str) -> Agent:
    agent = Agent("security-scout", description="Finds risky code and secrets in Python files", url=url)

    @agent.capability("find-risks")
    def find_risks(path: str, source: str) -> list[dict[str, Any]]:
        """Find risky code and secrets in a Python file."""
        return [finding._asdict() for finding in review(path, source, RISKS)]

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
    """The findings of all reviewed files, for each other file a note with the reason, and what it took."""

    files: int
    findings: list[Finding] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    agents: int = 0
    tasks: int = 0
    seconds: float = 0.0


class NotReviewed(Exception):
    """A file cannot be reviewed, or is skipped; the text is the reason."""


@contextlib.asynccontextmanager
async def network() -> AsyncIterator[tuple[HubServer, Agent]]:
    """Run a hub and the agents; yield the hub and the requester."""
    async with (
        HubServer(HubSettings(message_bytes_max=MESSAGE_BYTES_MAX), port=0) as hub,
        bug_hunter(hub.url),
        security_scout(hub.url),
        StyleChecker("style-checker", description="Finds style problems in Python files", url=hub.url),
        Agent("requester", url=hub.url) as me,
    ):
        yield hub, me


async def discover_reviewers(me: Agent) -> dict[str, str]:
    """Return the name of each agent that reviews Python files, with its capability."""
    found = sorted(await me.discover("python"), key=lambda agent: agent.name)
    for agent in found:
        print(f"{agent.name} joined: {agent.description}", file=sys.stderr)
    return {agent.name: agent.capabilities[0].name for agent in found}


async def review_files(me: Agent, paths: list[Path]) -> Review:
    """Discover the agents, and delegate the review of all files to each of them, several files at a time."""
    started = time.monotonic()
    reviewers = await discover_reviewers(me)
    outcome = Review(len(paths), agents=len(reviewers))
    slots = asyncio.Semaphore(FILES_AT_ONCE)
    progress = Progress(list(reviewers), len(paths))

    async def review_one(path: Path) -> None:
        name = escape_unprintable(path.as_posix())
        async with slots:
            try:
                outcome.findings.extend(await review_file(me, path, name, reviewers, progress))
            except (NotReviewed, AgentHubError, ValueError) as error:
                outcome.skipped.append(f"{name}: {error}")
        progress.step()

    async with asyncio.TaskGroup() as group:
        for path in paths:
            group.create_task(review_one(path))
    outcome.findings.sort(key=rank)
    outcome.skipped.sort()
    outcome.tasks = progress.done.total()
    outcome.seconds = time.monotonic() - started
    return outcome


async def review_file(
    me: Agent, path: Path, name: str, reviewers: dict[str, str], progress: Progress
) -> Iterable[Finding]:
    """Delegate a file to all reviewers at once. Raises NotReviewed, or the error of a task."""
    try:
        file = {"path": name, "source": read_source(path)}
    except (SyntaxError, UnicodeError, LookupError):
        message = "is not UTF-8, or not in the encoding that it declares"
        return [Finding(name, 1, "encoding", message, "high", me.name)]

    async def review_by(agent: str, capability: str) -> list[Finding]:
        with progress.task_of(agent):
            found = await me.delegate(capability, file)
        return [Finding(**{**one, "agent": agent}) for one in found]

    answers = await asyncio.gather(*(review_by(*reviewer) for reviewer in reviewers.items()))
    # All agents report a syntax error; the first one is named.
    return {one._replace(agent=""): one for answer in reversed(answers) for one in answer}.values()


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
RISKS: dict[str, Check] = {}
STYLE: dict[str, Check] = {}
SEVERITY = {"syntax-error": "high", "todo": "minor"}  # Of each check; `check` adds the others.

UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)
PARSING = threading.Lock()
TODO = re.compile(r"\b(TODO|FIXME|XXX)\b")
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
        return [Finding(path, line, "syntax-error", message, SEVERITY["syntax-error"])]
    ignored = ignored_lines(tree, source)
    found = [(line, name, message) for name, find in checks.items() for line, message in find(tree)]
    if checks.keys() & STYLE.keys():
        found += [(line, "todo", message) for line, message in todos(source)]
    return [Finding(path, *one, SEVERITY[one[1]]) for one in found if one[0] not in ignored]


def todos(source: str) -> Found:
    """Yield the comments about work that remains; a syntax tree has no comments."""
    if not TODO.search(source):  # Splitting a file into tokens takes longer than all checks.
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (found := TODO.search(token.string)):
            yield token.start[0], f"a comment says {found[0]}"


def ignored_lines(tree: ast.AST, source: str) -> set[int]:
    """Return the lines marked with `# noqa`, and all lines of an import whose first line is marked."""
    lines = source.split("\n")
    if any(NOQA_FILE.match(line) for line in lines):
        return set(range(len(lines) + 1))
    ignored = {number for number, line in enumerate(lines, 1) if NOQA.search(line)}
    for node in nodes(tree, ast.ImportFrom):
        if node.lineno in ignored:
            ignored.update(range(node.lineno, (node.end_lineno or 0) + 1))
    return ignored


def check(group: dict[str, Check], severity: str) -> Callable[[Check], Check]:
    """Add a function to a group of checks, under its own name with hyphens."""

    def add(function: Check) -> Check:
        name = function.__name__.replace("_", "-")
        group[name], SEVERITY[name] = function, severity
        return function

    return add


@check(BUGS, "medium")
def bare_except(tree: ast.AST) -> Found:
    for handler in nodes(tree, ast.ExceptHandler):
        if handler.type is None and not any(isinstance(statement, ast.Raise) for statement in handler.body):
            yield handler.lineno, "catches KeyboardInterrupt and SystemExit too"


@check(BUGS, "medium")
def swallowed_exception(tree: ast.AST) -> Found:
    for handler in nodes(tree, ast.ExceptHandler):
        broad = exceptions(handler) & {"Exception", "BaseException"}
        if broad and all(is_idle(statement) for statement in handler.body):
            yield handler.lineno, f"{min(broad)} is caught, and nobody is told"


@check(BUGS, "high")
def mutable_default(tree: ast.AST) -> Found:
    for arguments in nodes(tree, ast.arguments):
        for argument, default in defaults(arguments):
            if is_mutable(default):
                yield default.lineno, f"one {argument} is shared by all calls"


@check(BUGS, "high")
def unreachable_code(tree: ast.AST) -> Found:
    for block in blocks(tree):
        for statement, following in itertools.pairwise(block):
            # An unreachable yield makes a function an empty generator.
            if isinstance(statement, ast.Return | ast.Raise | ast.Break | ast.Continue) and not is_yield(following):
                yield following.lineno, f"never runs, after the {type(statement).__name__.lower()} above it"
                break


@check(BUGS, "medium")
def none_comparison(tree: ast.AST) -> Found:
    for comparison in nodes(tree, ast.Compare):
        operands = itertools.pairwise([comparison.left, *comparison.comparators])
        for operator, pair in zip(comparison.ops, operands, strict=True):
            if isinstance(operator, ast.Eq | ast.NotEq) and any(is_none(operand) for operand in pair):
                yield comparison.lineno, f"use `{'is' if isinstance(operator, ast.Eq) else 'is not'} None`"


@check(BUGS, "high")
def assert_on_tuple(tree: ast.AST) -> Found:
    for statement in nodes(tree, ast.Assert):
        if isinstance(statement.test, ast.Tuple) and statement.test.elts:
            yield statement.lineno, "a tuple is always true"


@check(BUGS, "high")
def duplicate_key(tree: ast.AST) -> Found:
    for display in nodes(tree, ast.Dict):
        seen = set()
        for key in display.keys:
            if isinstance(key, ast.Constant):
                if (type(key.value), key.value) in seen:
                    yield key.lineno, f"{reprlib.repr(key.value)} is a key of this dict already"
                seen.add((type(key.value), key.value))


@check(RISKS, "medium")
def dynamic_code(tree: ast.AST) -> Found:
    for call in nodes(tree, ast.Call):
        if isinstance(call.func, ast.Name) and call.func.id in ("eval", "exec") and not is_literal(call.args):
            yield call.lineno, f"{call.func.id} runs text that is computed"


@check(RISKS, "high")
def shell_command(tree: ast.AST) -> Found:
    for call in nodes(tree, ast.Call):
        runs = name_of(call.func)
        in_shell = runs in ("create_subprocess_shell", "getoutput", "system") or has_keyword(call, "shell", True)
        if in_shell and not is_literal(call.args):
            yield call.lineno, f"{runs} gives text that is computed to a shell"


@check(RISKS, "medium")
def unsafe_load(tree: ast.AST) -> Found:
    for call in nodes(tree, ast.Call):
        module = name_of(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        if module in ("dill", "marshal", "pickle") and name_of(call.func) in ("load", "loads"):
            yield call.lineno, f"{module} runs code that its input contains"


@check(RISKS, "high")
def unverified_certificate(tree: ast.AST) -> Found:
    for call in nodes(tree, ast.Call):
        if has_keyword(call, "verify", False) or name_of(call.func) == "_create_unverified_context":
            yield call.lineno, "certificates are not verified"


@check(RISKS, "high")
def secret_in_source(tree: ast.AST) -> Found:
    for constant in nodes(tree, ast.Constant):
        if isinstance(constant.value, str) and SECRET.search(constant.value):
            yield constant.lineno, "looks like a key or token; keep it out of the source"
    for statement in nodes(tree, ast.Assign):
        names = [name_of(target) for target in statement.targets]
        if any(SECRET_NAME.search(name) for name in names) and is_password(statement.value):
            yield statement.lineno, f"{names[0]} is in the source"


@check(STYLE, "minor")
def long_function(tree: ast.AST) -> Found:
    for node in nodes(tree, *FUNCTIONS):
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES_MAX:
            yield node.lineno, f"{node.name} has {lines} lines"


@check(STYLE, "minor")
def unused_import(tree: ast.AST) -> Found:
    used = names_read(tree) | names_in_strings(tree)
    for alias in imports(tree):
        name = alias.asname or alias.name.partition(".")[0]
        # `import x as x` exports the name.
        if name not in used and name != "*" and alias.asname != alias.name:
            yield alias.lineno, f"{name} is imported and never used"


@check(STYLE, "minor")
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


@check(STYLE, "minor")
def shadowed_builtin(tree: ast.AST) -> Found:
    for scope, inside in scopes(tree):
        if not isinstance(scope, ast.ClassDef):  # Attributes shadow nothing.
            for name, line in first_lines(bindings(scope, inside)):
                if name in BUILTINS:
                    yield line, f"{name} is the name of a built-in"


@check(STYLE, "minor")
def empty_f_string(tree: ast.AST) -> Found:
    format_specs = {value.format_spec for value in nodes(tree, ast.FormattedValue)}
    for string in nodes(tree, ast.JoinedStr):
        if string not in format_specs and not any(isinstance(part, ast.FormattedValue) for part in string.values):
            yield string.lineno, "an f-string without placeholders"


# ============================================================================================
# Queries on a syntax tree
# ============================================================================================

SECRET = re.compile(  # The keys of AWS, GitHub, Slack and OpenAI, and private keys.
    r"\bAKIA[0-9A-Z]{16}\b|\bgh[oprsu]_\w{36}|\bxox[abprs]-[\w-]{10}|\bsk-[\w-]{32}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----\n"
)
SECRET_NAME = re.compile(r"(password|passwd|secret|api_?key)$", re.IGNORECASE)
PASSWORD = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[!-~]{8,}")
PROMPT_ONLY = {"copyright", "credits", "exit", "help", "license", "quit"}
BUILTINS = {name for name in dir(builtins) if not name.startswith("_")} - PROMPT_ONLY
MUTABLE_TYPES = {"Counter", "OrderedDict", "bytearray", "defaultdict", "deque", "dict", "list", "set"}
TAKES_TYPES = {"ForwardRef", "NewType", "TypeVar", "cast"}  # Their arguments may be quoted types.
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.Lambda, ast.ClassDef)


@functools.lru_cache(maxsize=16)
def nodes_by_kind(module: ast.Module) -> dict[type, list[Any]]:
    """Return the nodes of a file by their class; finding them again for each check would take twice as long."""
    kinds: dict[type, list[Any]] = {}
    for node in ast.walk(module):
        kinds.setdefault(type(node), []).append(node)
    return kinds


def nodes(tree: ast.AST, *kinds: type[Node]) -> Iterator[Node]:
    if isinstance(tree, ast.Module):
        return itertools.chain.from_iterable(nodes_by_kind(tree).get(kind, ()) for kind in kinds)
    return (node for node in ast.walk(tree) if isinstance(node, kinds))


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
    for node in nodes(tree, ast.Name, ast.AugAssign, ast.Global, ast.Nonlocal):
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


def is_literal(arguments: list[ast.expr]) -> bool:
    return all(isinstance(argument, ast.Constant) for argument in arguments[:1])


def has_keyword(call: ast.Call, name: str, value: object) -> bool:
    """Return whether a call has `name=value`."""
    return any(
        one.arg == name and isinstance(one.value, ast.Constant) and one.value.value is value for one in call.keywords
    )


def is_password(value: ast.expr) -> bool:
    """Return whether a value is a string with letters and digits, and without blanks."""
    return isinstance(value, ast.Constant) and isinstance(value.value, str) and bool(PASSWORD.fullmatch(value.value))


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


class Progress:
    """Shows progress on stderr: in a terminal one line for each agent, redrawn; else four lines in total."""

    def __init__(self, agents: list[str], files: int) -> None:
        self.agents = agents
        self.files = files
        self.reviewed = 0
        self.running: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.redraws = is_terminal(sys.stderr)
        if self.redraws:
            print("\n" * len(agents), end="", file=sys.stderr)
            self._draw()

    @contextlib.contextmanager
    def task_of(self, agent: str) -> Iterator[None]:
        """Count a task as running, then as done."""
        self.running[agent] += 1
        try:
            yield
        finally:
            self.running[agent] -= 1
            self.done[agent] += 1
            if self.redraws:
                self._draw()

    def step(self) -> None:
        """Count a file as reviewed."""
        self.reviewed += 1
        quarter, before = (number * 4 // self.files for number in (self.reviewed, self.reviewed - 1))
        if not self.redraws and quarter > before:
            print(f"reviewed {self.reviewed} of {self.files} files", file=sys.stderr)

    def _draw(self) -> None:
        columns = shutil.get_terminal_size().columns
        lines = [fit(self._line(agent, columns), columns - 1) for agent in self.agents]
        text = "".join(f"{line}\x1b[K\n" for line in lines)
        print(f"\x1b[{len(lines)}F{text}" if lines else "", end="", file=sys.stderr, flush=True)

    def _line(self, agent: str, columns: int) -> str:
        name_width = max(map(len, self.agents))
        bar_width = max(0, min(30, columns - name_width - 32))
        filled = bar_width * self.done[agent] // max(1, self.files)
        bar = "#" * filled + "-" * (bar_width - filled)
        return f"{agent:{name_width}}  {bar}  {self.running[agent]} running  {self.done[agent]:4} of {self.files} done"


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def escape_unprintable(text: str) -> str:
    """Return a file name that is safe to print and send: names may contain line breaks, or bytes that are not text."""
    return "".join(character if character.isprintable() else "?" for character in text)


def columns_of(text: str) -> int:
    """Return the width of some text in a terminal, in which characters of East Asia take two columns."""
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "FW" else 1 for one in text
    )


def fit(text: str, width: int, *, keep_end: bool = False) -> str:
    """Return some text shortened to a width, with `…` in place of its end, or of its beginning."""
    if columns_of(text) <= width:
        return text
    while text and columns_of(text) >= width:
        text = text[1:] if keep_end else text[:-1]
    return f"…{text}" if keep_end else f"{text}…"


def pad(text: str, width: int) -> str:
    return text + " " * (width - columns_of(text))


def as_table(outcome: Review, *, width: int | None = None, show_all: bool = False, colors: bool = False) -> str:
    """Return the findings, the worst first, and a summary. `width` shortens lines, None does not."""
    important = [one for one in outcome.findings if one.severity != "minor"]
    shown = outcome.findings if show_all else important[:SHOWN_MAX]
    lines = [*rows(shown, width, colors), *([""] if shown else [])]
    return "\n".join([*lines, *summary(outcome, shown), cost(outcome)])


def rows(findings: list[Finding], width: int | None, colors: bool) -> Iterator[str]:
    """Yield a line for each finding: severity, place, message, and the agent that found it."""
    agent_width = max((len(one.agent) for one in findings), default=0)
    place_width = max((columns_of(place_of(one)) for one in findings), default=0)
    message_width = max((columns_of(one.message) for one in findings), default=0)
    if width is not None:
        place_width = min(place_width, max(12, (width - agent_width - 12) // 2))
        message_width = min(message_width, max(12, width - agent_width - place_width - 12))
    for one in findings:
        place = pad(fit(place_of(one), place_width, keep_end=True), place_width)
        message = pad(fit(one.message, message_width), message_width)
        yield f"{colored(one.severity, colors)}  {place}  {message}  {one.agent}"


def place_of(finding: Finding) -> str:
    return f"{finding.path}:{finding.line}"


def colored(severity: str, colors: bool) -> str:
    code = {"high": 31, "medium": 33}.get(severity, 2)  # Red, yellow, faint.
    return f"\x1b[{code}m{severity:6}\x1b[0m" if colors else f"{severity:6}"


def summary(outcome: Review, shown: list[Finding]) -> Iterator[str]:
    """Yield a line with the number of findings, and one with the number of those not shown."""
    files = len({one.path for one in outcome.findings})
    skipped = f", {len(outcome.skipped)} skipped" if outcome.skipped else ""
    yield f"{counted(len(outcome.findings), 'finding')} in {files} of {counted(outcome.files, 'file')}{skipped}"
    hidden = Counter(one.severity for one in outcome.findings) - Counter(one.severity for one in shown)
    if hidden:
        counts = ", ".join(f"{hidden[severity]} {severity}" for severity in SEVERITIES if hidden[severity])
        yield f"not shown: {counts} (--all shows them)"


def cost(outcome: Review) -> str:
    tasks, agents = counted(outcome.tasks, "task"), counted(outcome.agents, "agent")
    return f"{tasks} done by {agents} in {outcome.seconds:.1f} s; to look at the hub yourself, add --keep"


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
    parser.add_argument("--all", action="store_true", help="show all findings, also the minor ones")
    parser.add_argument("--json", action="store_true", help="print all findings as JSON")
    parser.add_argument("--fail", action="store_true", help="exit with 1 if there are findings")
    parser.add_argument("--keep", action="store_true", help="keep the hub and the agents running until Ctrl-C")
    return parser


async def run(args: argparse.Namespace) -> Review:
    """Review the folder, print the findings, and keep the hub running if that is wanted."""
    paths = sorted(python_files(args.folder))
    async with network() as (hub, me):
        print(f"the hub is at {hub.url}", file=sys.stderr)
        outcome = await review_files(me, paths)
        print_outcome(outcome, args)
        if args.keep:
            print("The hub keeps running; Ctrl-C ends it. In another terminal:", file=sys.stderr)
            print(f"python3 -m agenthub status --url {hub.url}", file=sys.stderr, flush=True)
            with contextlib.suppress(asyncio.CancelledError):  # Ctrl-C is the way to end it, not a failure.
                await asyncio.Event().wait()
    return outcome


def print_outcome(outcome: Review, args: argparse.Namespace) -> None:
    for note in outcome.skipped:
        print(f"skipped {note}", file=sys.stderr)
    if args.json:
        print(as_json(outcome), flush=True)
        return
    is_shown = is_terminal(sys.stdout)
    width = shutil.get_terminal_size().columns if is_shown else None
    print(
        as_table(outcome, width=width, show_all=args.all, colors=is_shown and "NO_COLOR" not in os.environ), flush=True
    )


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser()
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        parser.error(f"no such folder: {args.folder}")
    warnings.simplefilter("ignore", SyntaxWarning)  # Warnings about the reviewed files would clutter the output.
    if isinstance(sys.stdout, io.TextIOWrapper):  # A file's name may have characters that the terminal has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        outcome = asyncio.run(run(args))
    except KeyboardInterrupt:
        return 130
    return 1 if args.fail and outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
