"""Make docs/review.svg from what `review_folder` prints in a terminal: `python -m docs.make_picture`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "review.svg"
COLUMNS, ROWS = 80, 24
CHARACTER_WIDTH, LINE_HEIGHT, MARGIN = 8.4, 20, 20
COLORS = {"31": "#ff7b72", "33": "#e3b341", "2": "#8b949e", "0": "#e6edf3"}

# A small shop with a few mistakes.
SHOP = {
    "cart.py": "import json\n\n\ndef add(item, cart=[]):\n    cart.append(item)\n    return cart\n",
    "export.py": "import os\n\n\ndef export(name):\n    # TODO: check the name\n    os.system('tar cf ' + name)\n",
    "orders.py": "def total(order):\n    try:\n        return sum(order)\n    except:\n        return None\n",
    "prices.py": "def price(text):\n    return eval(text)\n",
    "settings.py": 'DEBUG = False\nPASSWORD = "winter2024"\n',
}


def terminal_output(folder: Path) -> str:
    """Return what the review of a folder writes to a terminal. Needs a system with pseudo terminals."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment = {**kept, "TERM": "xterm", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "examples.review_folder", "shop"]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=theirs, stderr=theirs):
        os.close(theirs)
        return b"".join(iter(lambda: read_terminal(ours), b"")).decode()


def read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux reports the end of a pseudo terminal as an error.
        os.close(descriptor)
        return b""


def screen(output: str) -> list[str]:
    """Return the lines that a terminal shows in the end; escape sequences for colors are kept."""
    shown = [""]
    for part in re.split(r"(\x1b\[\d+F|\r?\n)", output):
        if moved := re.fullmatch(r"\x1b\[(\d+)F", part):
            shown = [*shown[: -int(moved[1]) - 1], ""]
        elif part in ("\n", "\r\n"):
            shown.append("")
        else:
            shown[-1] += part.replace("\x1b[K", "")
    return shown[:-1]  # The last one is empty: the cursor is there.


def spans(line: str) -> str:
    """Return a line as SVG text, with a color for each part."""
    parts = re.split(r"\x1b\[(\d+)m", f"\x1b[0m{line}")[1:]
    return "".join(
        f'<tspan fill="{COLORS[color]}">{escape(text)}</tspan>'
        for color, text in zip(parts[::2], parts[1::2], strict=True)
        if text
    )


def as_svg(lines: list[str]) -> str:
    """Return a picture of a terminal with these lines."""
    width, height = round(COLUMNS * CHARACTER_WIDTH + 2 * MARGIN), len(lines) * LINE_HEIGHT + 2 * MARGIN
    rows = [
        f'<text x="{MARGIN}" y="{MARGIN + LINE_HEIGHT * number - 5}" xml:space="preserve">{spans(line)}</text>'
        for number, line in enumerate(lines, 1)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"',
            '     font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace" font-size="14">',
            "<title>Three agents review a folder</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>',
            *rows,
            "</svg>\n",
        ]
    )


def made_picture() -> str:
    """Return the picture as it should be. The port and the seconds differ each time."""
    with tempfile.TemporaryDirectory() as folder:
        shop = Path(folder) / "shop"
        shop.mkdir()
        for name, source in SHOP.items():
            (shop / name).write_text(source, encoding="utf-8")
        output = terminal_output(Path(folder))
    return as_svg(["$ python3 -m examples.review_folder shop", "", *screen(output)])


if __name__ == "__main__":
    PICTURE.write_text(made_picture(), encoding="utf-8")
