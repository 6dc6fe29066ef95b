"""Check that the benchmarks run, report what they skip, and compute correctly. No test asserts a speed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import measure
from tests.support import ROOT, WAIT_S

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read the costs of processes from /proc")

WITHOUT = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {packages} else found(name, *rest)
from benchmarks.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def benchmarks(*args: str, without: tuple[str, ...] = (), folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python -m benchmarks ARGS`, as if these packages were not installed."""
    program = ["-c", WITHOUT.format(packages=without)] if without else ["-m", "benchmarks"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *program, *args], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.long
def test_quick_run_prints_a_table_and_writes_where_it_was_measured(tmp_path: Path) -> None:
    done = benchmarks("--quick", "growth", "start", "--json", str(tmp_path / "x.json"))
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads((tmp_path / "x.json").read_text())
    assert {"date", "machine", "python", "packages", "commit", "quick", "workloads"} <= set(report)
    is_installed = importlib.util.find_spec("pydantic") is not None
    assert (report["packages"]["pydantic"] is not None) == is_installed
    assert list(report["workloads"]) == ["growth", "start"]
    for workload in report["workloads"].values():
        assert workload["rounds"] == 1
        assert workload["rows"]
        for row in workload["rows"]:
            assert all(value is None or isinstance(value, str | int | float) for value in row.values())
    for column in ("operation", "agents", "cpu_us", "of_smallest", "ms_over_bare"):
        assert column in done.stdout
    operations = {row["operation"] for row in report["workloads"]["growth"]["rows"]}
    assert {"delegate and result", "discover by name", "broadcast, decided", "expiry in one second"} <= operations
    assert "garbage collection" in operations


@pytest.mark.long
def test_memory_of_ten_shapes_is_compared_with_what_is_counted(tmp_path: Path) -> None:
    if any(importlib.util.find_spec(package) is None for package in ("picows", "uvloop", "orjson")):
        pytest.skip("the load driver needs picows, uvloop and orjson")
    done = benchmarks("--quick", "memory", "--json", str(tmp_path / "x.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "x.json").read_text())["workloads"]["memory"]["rows"]
    assert len(rows) == 10
    assert all(row["counted_bytes_per_task"] > row["payload_bytes"] for row in rows)
    for row in rows:  # A megabyte for what the allocator keeps.
        assert (
            row["memory_bytes_per_task"] * row["tasks"] < 2 * row["counted_bytes_per_task"] * row["tasks"] + 1_000_000
        )


def test_unknown_workload_is_an_error_of_usage() -> None:
    done = benchmarks("thruput")
    assert done.returncode == 2
    assert "there is no workload thruput; there are throughput, latency" in done.stderr


@pytest.mark.parametrize(
    "args",
    [("--rounds", "0"), ("--seconds", "nan"), ("--seconds", "-1"), ("--json", "/absent/x"), ("--folder", "/absent")],
)
def test_bad_option_is_an_error_of_usage(args: tuple[str, ...], tmp_path: Path) -> None:
    done = benchmarks("start", *args, folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("workload", ["throughput", "latency", "idle"])
def test_missing_package_is_told_with_what_to_install(workload: str, tmp_path: Path) -> None:
    missing = ("pydantic", "websockets", "picows", "uvloop", "orjson")
    done = benchmarks(workload, "--quick", "--json", str(tmp_path / "x.json"), without=missing)
    assert done.returncode == 1
    assert f"{workload} is skipped: it needs {', '.join(missing)}: pip install {' '.join(missing)}" in done.stdout
    assert "Traceback" not in done.stderr


def test_package_that_is_there_is_not_among_the_missing() -> None:
    measure.require("json")
    with pytest.raises(measure.Unavailable, match=r"^it needs no_such_package: pip install no_such_package$"):
        measure.require("json", "no_such_package")


def test_missing_matplotlib_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    done = benchmarks("start", "--plot", str(tmp_path), without=("matplotlib",))
    assert done.returncode == 2
    assert "it needs matplotlib: pip install matplotlib" in done.stderr


def test_each_workload_is_listed_with_what_it_measures() -> None:
    listed = benchmarks("--list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == command.available()
    assert all(len(line.split()) > 3 for line in listed)


def test_server_that_does_not_start_is_unavailable_and_gone() -> None:
    with pytest.raises(measure.Unavailable, match="did not start"), measure.server(sys.executable, "-c", "pass"):
        pass


def test_process_is_gone_when_its_block_ends() -> None:
    with pytest.raises(KeyboardInterrupt), measure.hub() as hub:
        raise KeyboardInterrupt
    assert hub.process.returncode is not None


def test_ctrl_c_ends_what_was_started(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "growth", "--json", str(tmp_path / "x.json")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "filling" in line:
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130
        assert "Traceback" not in process.stderr.read()
    assert children
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def test_contestants_take_turns_in_beginning() -> None:
    called: list[str] = []
    contestants = {name: lambda name=name: called.append(name) or len(called) for name in "abc"}
    results = measure.alternate(4, contestants)
    assert "".join(called) == "abcbcacababc"
    assert results == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def test_medians_are_of_each_column() -> None:
    assert measure.medians([{"a": 1, "b": 5}, {"a": 9, "b": 4}, {"a": 2, "b": 6}]) == {"a": 2, "b": 5}
    assert measure.medians([]) == {}


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (0.1, 1), (50, 500), (99, 990), (99.9, 999), (100, 1000)])
def test_percentile_is_the_nearest_rank(percent: float, expected: int) -> None:
    assert measure.percentile(range(1, 1001), percent) == expected


def test_percentile_of_one_is_that_one_and_of_none_an_error() -> None:
    assert measure.percentile([7.0], 99.9) == 7.0
    with pytest.raises(ValueError, match="nothing"):
        measure.percentile([], 50)


def test_cpu_is_found_behind_any_name() -> None:
    stat = "42 (a (b) c 1 2) S 1 42 42 0 -1 4194304 100 0 0 0 150 50 0 0 20 0 1 0 100 1000 10 0"
    assert measure.parse_cpu_s(stat, ticks_per_s=100) == 2.0


def test_cpu_and_memory_of_this_process_can_be_read() -> None:
    assert measure.cpu_s(os.getpid()) > 0
    assert measure.queued_s(os.getpid()) >= 0
    assert measure.memory_bytes(os.getpid()) > 2**20


def test_memory_is_what_is_private() -> None:
    rollup = "Rss: 900 kB\nPss: 500 kB\nShared_Clean: 100 kB\nPrivate_Clean:   30 kB\nPrivate_Dirty:  70 kB\n"
    assert measure.parse_private_bytes(rollup) == 100 * 1024


def test_rows_of_other_columns_are_another_table() -> None:
    rows = [{"name": "one", "us": 1.23456}, {"name": "three", "us": 1234.5}, {"other": None}]
    assert measure.format_table(rows) == "name     us\none    1.23\nthree  1234\n\nother\n    -"
    assert measure.format_table([]) == ""
