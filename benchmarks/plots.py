"""The style of all plots: one palette, one size per panel, no window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Distinguishable with color blindness.
SERVER_COLORS = {"asyncio": "#4477aa", "uvloop": "#66ccee", "built in": "#ee6677", "relay": "#ccbb44"}
SERVER_LABELS = {
    "asyncio": "hub on asyncio",
    "uvloop": "hub on uvloop",
    "built in": "hub on asyncio, built in",
    "relay": "relay",
}
LINES = ("-", "--", ":", "-.")
LINE_COLORS = ("#222222", "#4477aa", "#228833", "#ee6677")
PANEL_INCHES = (4.6, 3.2)


def figure(lines: int, columns: int) -> tuple[Any, list[list[Any]]]:
    """Return a figure, and its panels by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width, height = PANEL_INCHES
    canvas, panels = pyplot.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    return canvas, [list(line) for line in panels]


def bars(panel: Any, groups: list[str], heights: dict[str, list[float | None]]) -> None:
    """Draw a bar for each server in each group, without bars for missing figures."""
    for number, (server, of_server) in enumerate(heights.items()):
        places = [place + (number - (len(heights) - 1) / 2) * 0.2 for place in range(len(groups))]
        color, label = SERVER_COLORS[server], SERVER_LABELS[server]
        panel.bar(places, [height or 0 for height in of_server], 0.18, color=color, label=label)
    panel.set_xticks(range(len(groups)), groups)


def save(canvas: Any, path: Path, title: str) -> Path:
    from matplotlib import pyplot

    canvas.suptitle(title)
    canvas.tight_layout()
    canvas.savefig(path, dpi=120)
    pyplot.close(canvas)
    return path
