"""Copies of a task that is running wait, without holding up the pool, and take nothing from the one that runs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery_rig import Place, place, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

#: kombu's own restore, made as eager as ours.
EAGER = {"visibility_timeout": 2, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
KINDS = ("ours-redis", "rabbitmq", "rabbitmq-quorum", "redis")


@pytest.mark.parametrize("kind", KINDS)
def test_a_busy_copy_waits_without_a_pool_process(kind: str, unique: str, tmp_path: Path) -> None:
    """I12: in a pool of two, one runs for 3 s and five copies of it wait; neighbours pass. Each copy has its result."""
    with place(kind, tmp_path) as made:
        made.start("threads", 2)
        calls = [made.t.slow.delay(unique, 3)]
        until(lambda: made.runs("slow", unique))
        calls += [made.t.slow.delay(unique, 3) for _ in range(5)]
        began = time.monotonic()
        neighbours = [made.t.add.delay(f"{unique}-{n}", n, 1) for n in range(5)]
        assert [one.get(timeout=20) for one in neighbours] == [1, 2, 3, 4, 5]
        assert time.monotonic() - began < 2.5, "the neighbours waited for the one that runs"
        assert not made.runs("slept", unique)
        assert [one.get(timeout=30) for one in calls] == [unique] * 6
        made.stays("slow", unique, seconds=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_waiting_copies_leave_the_running_one_its_protection(kind: str, unique: str, tmp_path: Path) -> None:
    """I1: the worker of a running task is killed while a copy of it waits in another worker: it is run again.

    On kombu's Redis transport the copy is a redelivery with the same tag: whoever acked it would take the message away.
    """
    with place(kind, tmp_path, lease=3.0, options={} if kind.startswith("rabbit") else EAGER) as made:
        first = made.start("prefork", 1)
        call = made.t.slow.delay(unique, 60)
        until(lambda: made.runs("slow", unique))
        made.start("prefork", 1)
        copy = made.t.slow.delay(unique, 60)
        time.sleep(2.5)  # longer than the visibility timeout: copies of kinds that come back have come back
        assert made.runs("slow", unique) == 1
        made.stop(first)
        assert call.get(timeout=60) == unique
        assert copy.get(timeout=30) == unique
        assert (made.runs("slow", unique), made.runs("slept", unique)) == (2, 1)


def test_a_message_that_is_killed_with_its_parent_alone(unique: str, tmp_path: Path) -> None:
    """A parent that is killed while its child works: the orphan may end its work, and then nobody repeats it."""
    with place("rabbitmq", tmp_path, lease=5.0) as made:
        first = made.start("prefork", 1)
        call = made.t.slow.delay(unique, 2)
        until(lambda: made.runs("slow", unique))
        first.send_signal(signal.SIGKILL)
        first.wait(10)
        made.start("prefork", 1)
        assert call.get(timeout=40) == unique
        made.stays("slept", unique, seconds=1)


LONG = bool(os.environ.get("IDEMPOTENT_BUS_LONG"))
#: How long a task and a countdown are, and the visibility timeout that they outlast, in seconds.
TASK, COUNTDOWN, VISIBILITY = (10, 20, 2) if LONG else (4, 4, 1)
#: Every broker with a visibility timeout, by what runs on it; the last is the control.
OUTLASTED = ("guarded ours-redis", "guarded redis", "guarded ours-postgresql", "plain redis")


@pytest.fixture(params=OUTLASTED)
def short(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A short visibility timeout, under guarded tasks or, as the control, under Celery's own."""
    how, _, kind = request.param.partition(" ")
    options = {"visibility_timeout": VISIBILITY}
    if kind == "redis":
        options = {**EAGER, **options}
    with place(kind, tmp_path, guarded=how == "guarded", options=options) as made:
        yield made


def test_tasks_and_countdowns_longer_than_the_visibility_timeout(short: Place, unique: str) -> None:
    """I2: tasks of 4 s and countdowns of 4 s under a visibility timeout of 1 s run once each, also in two workers;
    in the long form (IDEMPOTENT_BUS_LONG=1) 10 s and 20 s under 2 s.

    The control: kombu's Redis transport with Celery's own tasks runs them again.
    """
    for _ in range(2):
        short.start("threads", 8)
    names = [f"{unique}-{number}" for number in range(3)]
    for name in names:
        short.t.slow.delay(name, TASK)
        short.t.add.apply_async((name, 1, 2), countdown=COUNTDOWN)
    until(lambda: all(short.runs("slept", name) and short.runs("add", name) for name in names), COUNTDOWN + 40)
    time.sleep(3 * VISIBILITY)
    tasks, countdowns = ([short.runs(word, name) for name in names] for word in ("slow", "add"))
    how = "guarded" if short.guarded else "plain"
    print(f"{how} {short.kind}: tasks ran {tasks} times, countdowns {countdowns}", flush=True)
    if short.guarded:
        assert (tasks, countdowns) == ([1, 1, 1], [1, 1, 1])
    else:
        assert max(tasks) > 1, "the control shows no double of a task: the test proves nothing"
        assert max(countdowns) > 1, "the control shows no double of a countdown: the test proves nothing"
