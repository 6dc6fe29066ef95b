"""Two agents for Claude Code that use only the standard library: agenthub hub --with code_agents.py

They run in the hub's process, and read folders on its machine.
"""

import asyncio
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agenthub import Agent, Task, TaskFailed, capability

IGNORED = {"__pycache__", "build", "dist", "node_modules", "venv"}  # And all hidden folders.
# Tests may do anything, even exit, so they run in a separate process, which first prints their number.
RUNNER = """import sys, unittest
suite = unittest.defaultTestLoader.discover(".")
print("tests:", suite.countTestCases(), file=sys.stderr, flush=True)
unittest.TextTestRunner(verbosity=2, buffer=True).run(suite)"""


def existing(folder: str) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise TaskFailed(f"{folder}: no such folder", code="invalid_input")
    return path


def lines_of(top: Path) -> Iterator[tuple[str, int, str]]:
    """Yield path, number and text of each line in a folder's text files, without hidden ones."""
    for parent, folders, names in os.walk(top):
        folders[:] = sorted(name for name in folders if name not in IGNORED and not name.startswith("."))
        for path in sorted(Path(parent, name) for name in names if not name.startswith(".")):
            try:
                text = path.read_text("utf-8") if path.is_file() and path.stat().st_size < 1_000_000 else ""
            except (OSError, UnicodeDecodeError):
                continue
            for number, line in enumerate(text.splitlines(), 1):
                yield path.relative_to(top).as_posix(), number, line


class Reader(Agent):
    """Reads source code."""

    @capability
    def find_todos(self, folder: str, word: str = "") -> dict[str, Any]:
        """Find TODO, FIXME and XXX, or another word, in a folder's text files; return file, line and text of each."""
        wanted = re.compile(rf"\b({re.escape(word) or 'TODO|FIXME|XXX'})\b")
        found = [
            {"file": path, "line": number, "text": line.strip()[:200]}
            for path, number, line in lines_of(existing(folder))
            if wanted.search(line)
        ]
        return {"total": len(found), "found": found[:200]}


class Tester(Agent):
    """Runs tests."""

    @capability
    async def run_tests(self, task: Task, folder: str) -> dict[str, Any]:
        """Run the unittest tests of a folder with progress; return their number, the failed ones and the report."""
        devnull, pipe = asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", RUNNER, cwd=existing(folder), stdin=devnull, stdout=devnull, stderr=pipe, limit=2**24
        )
        count, done, report = 0, 0, ""
        try:
            async for raw in process.stderr:
                line = raw.decode(errors="replace")
                report += line
                if line.startswith("tests: "):
                    count = int(line.split()[1])
                elif count and re.search(r" \.\.\. (ok|FAIL|ERROR|skipped|expected|unexpected)", line):
                    done += 1
                    task.progress(min(done / count, 1.0), line.strip()[:200])
        finally:  # Also after the task was cancelled.
            if process.returncode is None:
                process.kill()
            await process.wait()
        if count == 0 or "\nRan " not in report:
            raise TaskFailed(f"no unittest tests were run to their end in {folder}: {report[-500:]}")
        failed = re.findall(r"^(?:FAIL|ERROR): (.+)", report, re.MULTILINE)
        return {"tests": count, "failed": failed, "report": report[-5000:]}
