"""Make agenthub-stubs, docs/cli.md and docs/api.md from agenthub.py: `python -m tests.stubs`; --check only compares.

A `py.typed` does nothing for a module that is a single file; a folder of stubs gives its users the types.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.pages import API, CLI, api_page, cli_page

ROOT = Path(__file__).parent.parent
STUBS = ROOT / "agenthub-stubs" / "__init__.pyi"


def made_stubs() -> str:
    """Return the stubs as they should be, by mypy's stubgen and ruff."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["stubgen", "--quiet", "--include-docstrings", "--output", folder, str(ROOT / "agenthub.py")]
        subprocess.run(command, check=True, cwd=ROOT)
        stubs = next(Path(folder).rglob("agenthub.pyi"))
        stubs.write_text(with_aliases(stubs.read_text(encoding="utf-8")), encoding="utf-8")
        subprocess.run(["ruff", "format", "--quiet", str(stubs)], check=True, cwd=ROOT)
        return stubs.read_text(encoding="utf-8")


def with_aliases(stubs: str) -> str:
    """Add what stubgen leaves out: aliases, without their limits, and what `record` does."""
    # It also lists classes inside functions, by the numbers of their lines.
    stubs = re.sub(r"^#   \w+@\d+\n|, '\w+@\d+'", "", stubs, flags=re.MULTILINE)
    stubs = stubs.replace("# Names in __all__ with no definition:\n", "")
    source = (ROOT / "agenthub.py").read_text(encoding="utf-8")
    aliases = re.findall(r"^(\w+) = Annotated\[(.+), \w+\(.*\)\](?:  # .*)?$", source, re.MULTILINE)
    aliases += re.findall(r"^(\w+) = (Callable\[.+\])$", source, re.MULTILINE)
    missing = [f"{name} = {kind}" for name, kind in aliases if not re.search(rf"^{name}\b", stubs, re.MULTILINE)]
    stubs = stubs.replace("@record\n", "@dataclass(slots=True, kw_only=True)\n")  # stubgen leaves out the functions.
    stubs = stubs.replace("@part\n", "@dataclass(slots=True)\n")
    head, import_line, rest = stubs.partition("\n\n")
    return "\n".join([head, "", *missing, import_line, rest])


def main() -> int:
    made = {STUBS: made_stubs(), CLI: cli_page(), API: api_page()}
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: python -m tests.stubs", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(made[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
