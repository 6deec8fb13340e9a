"""A handler that does not return: what waits behind it is given back, once, and no sooner than it is late."""

from __future__ import annotations

import threading

from idempotent_bus.pool import Pool
from idempotent_bus.standstill import PATIENCE, Standstill


def test_what_stands_still_for_long_is_told_once() -> None:
    """Not while messages come and go, nor while there is none; once for each that stays; again for the next."""
    doing: list[object] = [None]
    told: list[float] = []
    now = 0.0
    watch = Standstill(lambda: doing[0], lambda: told.append(now))

    def pass_by(seconds: float) -> None:
        nonlocal now
        for _ in range(6):
            now += seconds / 6
            watch.look(now)

    pass_by(10 * PATIENCE)
    for _ in range(5):
        doing[0] = object()
        pass_by(0.9 * PATIENCE)
    assert told == []
    doing[0] = object()
    pass_by(10 * PATIENCE)
    assert len(told) == 1
    doing[0] = object()
    pass_by(0.9 * PATIENCE)
    assert len(told) == 1
    pass_by(0.9 * PATIENCE)
    assert len(told) == 2


def test_what_could_not_be_given_back_is_tried_again() -> None:
    """The broker was away for a moment: the next look tries again."""
    failures, told = [OSError("away")], []

    def give_back() -> None:
        if failures:
            raise failures.pop()
        told.append(1)

    doing = object()
    watch = Standstill(lambda: doing, give_back)
    watch.look(0.0)
    try:
        watch.look(PATIENCE)
    except OSError:
        watch.look(PATIENCE + 1)
    watch.look(2 * PATIENCE)
    assert told == [1]


def test_a_pool_gives_up_what_has_not_begun() -> None:
    """What runs goes on; the rest comes back to whoever asks, and is never run."""
    pool, begun, go_on, ran = Pool(1), threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        go_on.wait(10)
        ran.append("first")

    def second() -> None:
        ran.append("second")

    assert pool.newest == 0.0
    pool.submit(first)
    assert begun.wait(10)
    pool.submit(second)
    assert pool.newest == pool.oldest or pool.newest > 0.0
    assert pool.clear() == [second]
    go_on.set()
    assert pool.wait(10)
    assert ran == ["first"]
    pool.close()
