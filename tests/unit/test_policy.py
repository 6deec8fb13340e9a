"""The policy of a scope: wrong values are refused when it is made, and delays stay within their bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idempotent_bus.errors import ConfigurationError
from idempotent_bus.policy import DAY, Backoff, Policy

NAN, INF = math.nan, math.inf


def test_the_defaults() -> None:
    """A lease of a minute, a week of memory, 8 attempts, backoff from 1 s to 300 s."""
    policy = Policy()
    assert (policy.lease, policy.retention, policy.max_attempts) == (60.0, 7 * DAY, 8)
    assert (policy.backoff.base, policy.backoff.cap) == (1.0, 300.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lease": 0.04},
        {"lease": 0},
        {"lease": -1},
        {"lease": NAN},
        {"lease": INF, "retention": INF},
        {"lease": 60, "retention": 59},
        {"retention": NAN},
        {"retention": INF},
        {"max_attempts": 0},
        {"max_attempts": -1},
        {"max_attempts": NAN},
        {"max_attempts": 2.5},
        {"busy_delay": 0},
        {"busy_delay": -1},
        {"busy_delay": NAN},
        {"busy_delay": INF},
        {"permanent": ValueError},
        {"permanent": ("ValueError",)},
        {"permanent": (ValueError, int)},
        {"permanent": (ValueError("x"),)},
    ],
)
def test_wrong_policies_are_refused(wrong: dict[str, Any]) -> None:
    """What could not be kept is refused at once: not at the first message, and not at the first failure."""
    with pytest.raises(ConfigurationError):
        Policy(**wrong)


@pytest.mark.parametrize(
    "right",
    [
        {"lease": 0.05},
        {"lease": 60, "retention": 300.1},
        {"lease": 60, "retention": 90.1, "backoff": Backoff(1, 60)},
        {"max_attempts": 1},
        {"busy_delay": 0.001},
        {"permanent": (ValueError, KeyError)},
        {"permanent": ()},
    ],
)
def test_the_bounds_themselves_are_allowed(right: dict[str, Any]) -> None:
    """A bound belongs to what is allowed."""
    Policy(**right)


@pytest.mark.parametrize(("base", "cap"), [(0, 1), (-1, 1), (2, 1), (NAN, 1), (1, NAN), (1, INF), (INF, INF)])
def test_wrong_backoffs_are_refused(base: float, cap: float) -> None:
    """A backoff needs a base above 0 and a finite cap."""
    with pytest.raises(ConfigurationError):
        Backoff(base, cap)


@given(st.floats(0.001, 10), st.floats(0, 1000), st.integers(1, 5000), st.floats(0, 1))
def test_full_jitter(base: float, more: float, attempt: int, drawn: float) -> None:
    """The delay lies in [0, min(cap, base * 2 ** (n - 1))], and the draw decides where."""
    backoff = Backoff(base, base + more)
    longest = min(backoff.cap, base * 2.0 ** min(attempt - 1, 1000))
    assert backoff.delay(attempt, lambda: drawn) == pytest.approx(longest * drawn)
    assert 0 <= backoff.delay(attempt) <= longest
