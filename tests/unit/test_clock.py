"""The clock that users' tests get."""

from __future__ import annotations

import math

import pytest

from idempotent_bus.testing import ManualClock


def test_time_passes_only_when_told() -> None:
    """Reading it takes no time; advancing and sleeping do, and return at once."""
    clock = ManualClock(5.0)
    assert clock() == clock() == 5.0
    clock.advance(2)
    clock.sleep(0.5)
    clock.sleep(0)
    assert clock() == 7.5


@pytest.mark.parametrize("seconds", [-1, -0.001, math.nan])
def test_time_does_not_run_back(seconds: float) -> None:
    """A clock that could run back would test what cannot happen."""
    with pytest.raises(ValueError, match="negative"):
        ManualClock().advance(seconds)
