"""The fixtures that several test modules ask for; none has an effect on those that do not."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator

import pytest


@pytest.fixture(scope="module")
def garbage_is_collected_fast() -> Iterator[None]:
    """What was there before a module's tests is not looked at again by each of them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape lone surrogates in captured logs: a worker of pytest-xdist could not send them."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
