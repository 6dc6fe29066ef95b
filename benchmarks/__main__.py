"""Compare AgentHub with its alternatives: `python -m benchmarks [WORKLOAD ...]`, see --help.

Compare figures of the same run only, not of different machines or days.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.measure import Options, Row, Unavailable, describe, format_table, progress, require

WORKLOADS = ("throughput", "latency", "idle", "memory", "growth", "start", "journal", "peers", "sdk")
QUICK_SECONDS = 0.2


def main(argv: list[str] | None = None) -> int:
    """Run the workloads; return 0, 1 if one that was named could not run, or 130 after Ctrl-C."""
    parser = make_parser()
    args = parser.parse_args(argv)
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in available()}
    unknown = [name for name in args.workloads if name not in modules]
    if unknown:
        parser.error(f"there is no workload {unknown[0]}; there are {', '.join(modules)}")
    if args.list:
        print("\n".join(f"{name:<11} {first_line(module)}" for name, module in modules.items()))
        return 0
    try:
        prepare(args)
    except (Unavailable, OSError) as error:
        parser.error(str(error))
    chosen = {name: module for name, module in modules.items() if name in (args.workloads or modules)}
    try:
        return measure(chosen, args)
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition(":")[0] + ".")
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="what to measure (default: everything)")
    parser.add_argument("--list", action="store_true", help="list the workloads")
    parser.add_argument(
        "--rounds", type=count, metavar="N", help="rounds per comparison; the result is their median (default: 5)"
    )
    parser.add_argument("--seconds", type=seconds, metavar="S", help="how long each load lasts (default: 1)")
    parser.add_argument("--quick", action="store_true", help="check that the workloads run; the figures mean nothing")
    parser.add_argument(
        "--json", type=Path, default=Path("bench.json"), metavar="FILE", help="write all figures (default: bench.json)"
    )
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw PNGs (requires matplotlib)")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="create journals here, on the disk to measure")
    return parser


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return int(text)


def seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")


def available() -> list[str]:
    return [name for name in WORKLOADS if importlib.util.find_spec(f"benchmarks.{name}") is not None]


def first_line(module: ModuleType) -> str:
    return (module.__doc__ or "").partition("\n")[0]


def prepare(args: argparse.Namespace) -> None:
    """Check everything that would otherwise fail after an hour. Raises OSError or Unavailable."""
    if sys.platform != "linux":
        raise Unavailable("the benchmarks read the costs of processes from /proc, which only Linux has")
    if args.plot is not None:
        require("matplotlib")
        args.plot.mkdir(parents=True, exist_ok=True)
    if args.folder is not None and not args.folder.is_dir():
        raise NotADirectoryError(f"{args.folder} is not a folder")
    if not args.json.parent.is_dir() or args.json.is_dir():
        raise NotADirectoryError(f"{args.json} cannot be written")
    for ending in (signal.SIGTERM, signal.SIGHUP):  # Exit cleanly, which ends the started processes.
        signal.signal(ending, lambda number, _: sys.exit(128 + number))


def measure(modules: dict[str, ModuleType], args: argparse.Namespace) -> int:
    """Run workloads in turn; print and write the figures of each as soon as it ends."""
    code = 0
    report: dict[str, Any] = {**describe(), "quick": args.quick, "workloads": {}}
    for name, module in modules.items():
        options = options_of(args)
        progress(f"{name}: {first_line(module)}")
        began = time.monotonic()
        rows: list[Row] = []
        try:
            rows = module.run(options)
        except Unavailable as why:
            options.note(f"{name} is skipped: {why}")
            code = 1 if args.workloads else code
        report["workloads"][name] = {
            "rounds": options.rounds,
            "seconds": options.seconds,
            "took_s": round(time.monotonic() - began, 1),
            "notes": options.notes,
            "rows": rows,
        }
        print(f"## {name}: {first_line(module)}\n\n{format_table(rows)}")
        print("".join(f"\n- {note}" for note in options.notes), end="\n\n", flush=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
        if args.plot is not None and rows and hasattr(module, "plot"):
            progress("drawn: " + ", ".join(str(path) for path in module.plot(rows, args.plot)))
    return code


def options_of(args: argparse.Namespace) -> Options:
    """Return the options of a run: those from the command line, else those of --quick, else the defaults."""
    rounds = args.rounds or (1 if args.quick else Options.rounds)
    seconds = args.seconds or (QUICK_SECONDS if args.quick else Options.seconds)
    return Options(rounds=rounds, seconds=seconds, quick=args.quick, folder=args.folder)


if __name__ == "__main__":
    sys.exit(main())
