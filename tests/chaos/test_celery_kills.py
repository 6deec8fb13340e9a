"""A real Celery application under kills and cuts, short; the long form is run_celery.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from celery_storm import storm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.mark.parametrize(("broker", "pool"), [("redis", "prefork"), ("rabbitmq", "threads")])
def test_kills_and_cuts_double_nothing_and_lose_nothing(broker: str, pool: str, tmp_path: Path) -> None:
    """I1/I2: with the inbox each effect once, with the store none missing and no double without a death; chains and
    chords finished, nothing stuck. 5 kills of children and parents, a cut, and beat killed."""
    with storm(broker, pool, tmp_path, guarded=True, units=40, work=0.02) as run:
        outcome = run.run(kills=5, cuts=1, beat_kills=1)
    assert outcome.is_right, outcome
    assert outcome.ticks


def test_without_the_library_the_same_kills_do_damage(tmp_path: Path) -> None:
    """The control: Celery's own tasks, acked late, on kombu's Redis transport, are done twice or lost or stuck."""
    with storm("redis", "threads", tmp_path, guarded=False, units=40, work=0.02) as run:
        outcome = run.run(kills=5, cuts=1, beat_kills=0, quiet=20.0)
    assert outcome.is_damaged, outcome
