"""Hooks for the whole suite: cheaper garbage collections, parallel runs, and reports that pytest-xdist can send."""

from __future__ import annotations

import gc
from collections.abc import Generator

import pytest


def pytest_collection_finish() -> None:
    """Exempt imported modules from garbage collection: a full one would cost 0.2 s in each test that asks for it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True, wrapper=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """Have `-n auto` run one more test than there are cores: half of the time a test waits for processes or timers."""
    return (yield) + 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape lone surrogates in captured logs: a worker of pytest-xdist could not send them."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
