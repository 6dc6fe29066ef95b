"""A few seconds of the soak, so that it stays runnable. The trends need minutes: `python -m tests.soak`."""

from __future__ import annotations

import os

import pytest

from tests.load_clients import FINAL
from tests.soak import SHORT, soak, trend

FOR_S = 10.0  # Then the open tasks end, and retention and grace pass: about as long again.


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="needs SIGTERM")
@pytest.mark.parametrize("is_journaled", [True, False])
def test_hub_accounts_for_every_task_under_load_and_is_empty_after_it(is_journaled: bool) -> None:
    report = soak(FOR_S, seed=1, pace=SHORT, is_journaled=is_journaled)
    assert report["problems"] == []
    assert report["end"]["exit_code"] == 0
    assert report["end"].get("journal_rows") == ({"tasks": 0, "agents": 0} if is_journaled else None)
    assert report["restarts"] > 0
    tasks = report["tasks"]
    ended = {state: tasks.get(f"ended {state}", 0) for state in FINAL}
    assert tasks["acknowledged"] == sum(ended.values()) + tasks.get("excused", 0)
    assert min(ended.values()) > 0, "the run was too short for every kind of outcome"
    assert report["bystanders"]["tasks"] > 0


def test_trend_distinguishes_growth_from_noise() -> None:
    noise = [(float(second), 100.0 + 30 * (second % 7)) for second in range(480)]
    assert trend(noise)["verdict"] == "flat"
    assert trend([(at, number - at / 10) for at, number in noise])["verdict"] == "flat"
    leak = trend([(at, number + at / 2) for at, number in noise])
    assert leak["verdict"] == "growing"
    assert round(leak["slope_per_minute"]) == 30
    assert trend([(float(second), 100.0 + second / 12) for second in range(200)])["verdict"] == "growing"
