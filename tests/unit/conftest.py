"""Fixtures of the unit tests: nothing here sleeps, and no time passes unless a test says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fakes import Bench

from idempotent_bus.testing import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def bench() -> Bench:
    """A lease of 60 seconds, 3 attempts, a backoff from 8 seconds of which one half is drawn."""
    return Bench()
