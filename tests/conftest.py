"""The fixtures that several test modules ask for; none has an effect on those that do not."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def garbage_is_collected_fast() -> Iterator[None]:
    """What was there before a module's tests is not looked at again by each of them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
