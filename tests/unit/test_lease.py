"""The keeper of leases: what runs is renewed in time, what is done is let go, and only the store says what is lost."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from fakes import Bench, SingleStore, Steps

from idempotent_bus import lease as lease_module
from idempotent_bus.errors import StoreUnavailable
from idempotent_bus.hooks import RENEW
from idempotent_bus.lease import LeaseKeeper
from idempotent_bus.model import Hold
from idempotent_bus.testing import ManualClock


@dataclass(eq=False)
class Running:
    """What the keeper needs of an execution."""

    hold: Hold
    lease: float = 60.0
    retention: float = 600.0
    renewed_at: float = 1000.0
    lost: int = 0

    stalled: int = 0

    def on_lease_lost(self, *, taken: bool) -> None:
        self.lost += taken
        self.stalled += not taken


def hold(number: int) -> Hold:
    return Hold(number.to_bytes(16, "big"), number, b"n" * 16)


@dataclass
class Answers:
    """A store whose renewals answer as told; `during` is called while they are under way."""

    lost: set[int] = field(default_factory=set)
    down: set[int] = field(default_factory=set)
    asked: list[list[int]] = field(default_factory=list)
    error: Exception = field(default_factory=lambda: StoreUnavailable("scripted"))
    during: Any = lambda: None

    def renew(self, hold: Hold, *, lease: float, retention: float) -> bool:
        self.asked.append([hold.token])
        self.during()
        if hold.token in self.down:
            raise self.error
        return hold.token not in self.lost


class Batches(Answers):
    """The same with batches."""

    def claim_many(self, requests: Any) -> Any:
        raise NotImplementedError

    def renew_many(self, holds: list[Hold], *, lease: float, retention: float) -> list[bool]:
        self.asked.append([hold.token for hold in holds])
        self.during()
        if self.down:
            raise self.error
        return [hold.token not in self.lost for hold in holds]


def keeper_of(store: Any, clock: ManualClock, steps: Any = None) -> LeaseKeeper:
    return LeaseKeeper(lambda: store, clock=clock, step=steps or Steps(), threaded=False)


def test_all_due_leases_are_renewed_in_one_step(clock: ManualClock) -> None:
    """A store that does many in one round trip gets one call for all that are due, through the hook."""
    store, steps = Batches(), Steps()
    keeper = keeper_of(store, clock, steps)
    for number in range(1, 6):
        keeper.add(Running(hold(number)))
    clock.advance(20)
    keeper.tick()
    assert store.asked == [[1, 2, 3, 4, 5]]
    assert steps.passed == [RENEW]


def test_without_batches_each_is_renewed_singly(clock: ManualClock) -> None:
    """A store with the four verbs alone is enough."""
    store, steps = Answers(), Steps()
    keeper = keeper_of(store, clock, steps)
    for number in range(1, 4):
        keeper.add(Running(hold(number)))
    clock.advance(20)
    keeper.tick()
    assert store.asked == [[1], [2], [3]]
    assert steps.passed == [RENEW] * 3


def test_one_step_for_each_pair_of_lease_and_retention(clock: ManualClock) -> None:
    """Scopes with other leases share a keeper: each group is renewed with its own durations."""
    seen: list[tuple[int, float, float]] = []

    class Seeing(Batches):
        def renew_many(self, holds: list[Hold], *, lease: float, retention: float) -> list[bool]:
            seen.append((len(holds), lease, retention))
            return super().renew_many(holds, lease=lease, retention=retention)

    keeper = keeper_of(Seeing(), clock)
    for number, lease in enumerate([30, 60, 30, 60]):
        keeper.add(Running(hold(number), lease=lease))
    clock.advance(25)
    keeper.tick()
    assert sorted(seen) == [(2, 30, 600.0), (2, 60, 600.0)]


def test_a_renewal_is_due_after_a_third_of_the_lease(clock: ManualClock) -> None:
    """Not sooner, so that it costs little; and then again a third later."""
    store = Answers()
    keeper = keeper_of(store, clock)
    keeper.add(Running(hold(1)))
    times = []
    for second in range(1, 61):
        clock.advance(1)
        keeper.tick()
        if store.asked:
            times.append(second)
            store.asked.clear()
    assert times == [20, 40, 60]


def test_the_thread_looks_often_enough() -> None:
    """The thread wakes every sixth of the shortest lease: a renewal that failed is tried again in time."""
    keeper = LeaseKeeper(Batches, threaded=False)
    waits: list[float] = []

    class Stop(BaseException):
        pass

    class Wake:
        def wait(self, seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 3:
                raise Stop

        def clear(self) -> None: ...

        def set(self) -> None: ...

    keeper._wake = Wake()  # type: ignore[assignment]
    keeper.add(Running(hold(1), lease=60))
    keeper.add(Running(hold(2), lease=6))
    keeper.add(Running(hold(3), lease=60))
    with pytest.raises(Stop):
        keeper._loop()
    assert waits == [1.0] * 3


def test_a_store_error_does_not_lose_the_lease(clock: ManualClock) -> None:
    """While the store is down nobody is told of a lost lease; the next round tries again, and keeps it."""
    store = Batches(down={1})
    keeper = keeper_of(store, clock)
    executions = [Running(hold(1)), Running(hold(2))]
    for execution in executions:
        keeper.add(execution)
    clock.advance(20)
    keeper.tick()
    clock.advance(10)
    store.down.clear()
    keeper.tick()
    assert store.asked == [[1, 2], [1, 2]]
    assert [e.lost for e in executions] == [0, 0]
    assert [e.renewed_at for e in executions] == [1030, 1030]


def test_one_failing_renewal_touches_no_other(clock: ManualClock) -> None:
    """Without batches a record that cannot be reached holds up no other one's renewal."""
    store = Answers(down={1}, lost={2})
    keeper = keeper_of(store, clock)
    executions = [Running(hold(number)) for number in (1, 2, 3)]
    for execution in executions:
        keeper.add(execution)
    clock.advance(20)
    keeper.tick()
    assert store.asked == [[1], [2], [3]]
    assert [e.lost for e in executions] == [0, 1, 0]
    assert [e.renewed_at for e in executions] == [1000, 1000, 1020]


def test_an_unexpected_error_touches_no_other_group(clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    """A driver's error that a store let out ends neither the round nor the lease."""
    store = Answers(down={1}, error=OSError("leaked"))
    keeper = keeper_of(store, clock)
    executions = [Running(hold(1), lease=30), Running(hold(2), lease=60)]
    for execution in executions:
        keeper.add(execution)
    clock.advance(20)
    with caplog.at_level(logging.WARNING):
        keeper.tick()
    assert [e.renewed_at for e in executions] == [1000, 1020]
    assert [e.lost for e in executions] == [0, 0]
    assert "could not renew" in caplog.text


def test_a_store_that_cannot_be_opened_loses_no_lease(clock: ManualClock) -> None:
    """The store's opener may fail as its verbs may."""

    def unreachable() -> Any:
        raise StoreUnavailable("scripted")

    keeper = LeaseKeeper(unreachable, clock=clock, threaded=False)
    execution = Running(hold(1))
    keeper.add(execution)
    clock.advance(20)
    keeper.tick()
    assert (execution.lost, execution.renewed_at) == (0, 1000)


def test_a_lost_lease_is_told_once(clock: ManualClock) -> None:
    """The holder is told exactly once, and is not renewed again."""
    store = Batches(lost={1})
    keeper = keeper_of(store, clock)
    lost, kept = Running(hold(1)), Running(hold(2))
    keeper.add(lost)
    keeper.add(kept)
    for _ in range(3):
        clock.advance(20)
        keeper.tick()
    assert store.asked == [[1, 2], [2], [2]]
    assert (lost.lost, kept.lost) == (1, 0)


@pytest.mark.parametrize("kind", [Answers, Batches])
def test_one_that_ended_meanwhile_has_not_lost_its_lease(clock: ManualClock, kind: type[Answers]) -> None:
    """Completed or released while its renewal was under way, so the store says no: that is no lost lease."""
    store = kind(lost={1, 2})
    keeper = keeper_of(store, clock)
    executions = [Running(hold(1)), Running(hold(2))]
    for execution in executions:
        keeper.add(execution)
    store.during = lambda: keeper.remove(executions[0])
    clock.advance(20)
    keeper.tick()
    assert [e.lost for e in executions] == [0, 1]


def test_one_that_is_being_ended_is_not_told_of_a_stall(clock: ManualClock) -> None:
    """I13: who ends it may hold its lock for as long as the store is silent: the keeper must not wait for that."""
    store, running = Answers(down={1}), Running(hold(1))
    keeper = keeper_of(store, clock)
    keeper.add(running)
    clock.advance(61)
    keeper.tick()
    assert running.stalled == 1, "the control: while it runs it is told"
    store.during = lambda: keeper.remove(running)
    keeper.tick()
    assert running.stalled == 1


def test_what_is_removed_is_not_renewed(clock: ManualClock) -> None:
    """Removing twice, or what was never added, is harmless."""
    store = Batches()
    keeper = keeper_of(store, clock)
    execution = Running(hold(1))
    keeper.remove(execution)
    keeper.add(execution)
    keeper.remove(execution)
    keeper.remove(execution)
    clock.advance(20)
    keeper.tick()
    assert store.asked == []


def test_over_the_memory_store(bench: Bench) -> None:
    """Renewed every third of it, a lease outlives itself many times; not renewed, it lapses."""
    kept, forgotten = bench.take("kept", 60.0), bench.take("forgotten", 60.0)
    keeper = LeaseKeeper(lambda: bench.memory, clock=bench.clock, threaded=False)
    keeper.add(Running(kept))
    for _ in range(100):
        bench.clock.advance(10)
        keeper.tick()
    assert bench.memory.renew(kept, lease=60, retention=600)
    assert bench.record("kept").lease_left == 60  # type: ignore[union-attr]
    assert bench.record("forgotten") is None or bench.record("forgotten").lease_left == 0  # type: ignore[union-attr]
    assert forgotten.token != kept.token


def test_a_single_lease_needs_no_batch(bench: Bench) -> None:
    """A store without batches works as well as one with."""
    kept = bench.take("kept", 60.0)
    keeper = LeaseKeeper(lambda: SingleStore(bench.memory), clock=bench.clock, threaded=False)
    keeper.add(Running(kept))
    bench.clock.advance(50)
    keeper.tick()
    assert bench.record("kept").lease_left == 60  # type: ignore[union-attr]


def test_one_thread_is_started_and_only_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle keeper has no thread; a hundred executions share one."""
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", lambda self: started.append(self))
    keeper = LeaseKeeper(Batches)
    assert started == []
    for number in range(100):
        keeper.add(Running(hold(number)))
    assert len(started) == 1
    assert started[0].daemon


def test_a_thread_that_could_not_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of threads for a moment must not mean that no lease is ever renewed: the next one tries again."""
    real_start, failures = threading.Thread.start, [RuntimeError("can't start new thread")]

    def start(self: threading.Thread) -> None:
        if failures:
            raise failures.pop()
        real_start(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    keeper = LeaseKeeper(Batches)
    with pytest.raises(RuntimeError):
        keeper.add(Running(hold(1)))
    keeper.add(Running(hold(2)))
    assert keeper._thread is not None
    assert keeper._thread.is_alive()


def test_the_thread_renews() -> None:
    """The background thread itself does the rounds: a due lease is renewed without anybody calling `tick`."""
    renewed = threading.Event()

    class Telling(Answers):
        def renew(self, hold: Hold, *, lease: float, retention: float) -> bool:
            renewed.set()
            return True

    keeper = LeaseKeeper(Telling, clock=lambda: 1020.0)
    keeper.add(Running(hold(1), lease=0.06, renewed_at=0.0))
    assert renewed.wait(10)


def test_the_thread_outlives_a_surprise(caplog: pytest.LogCaptureFixture) -> None:
    """A round that fails in a way that nobody foresaw is logged, and the next one comes."""
    rounds = threading.Semaphore(0)

    class Odd(LeaseKeeper):
        def tick(self) -> None:
            rounds.release()
            raise ZeroDivisionError("nobody foresaw this")

    keeper = Odd(Batches)
    with caplog.at_level(logging.CRITICAL, lease_module.log.name):
        keeper.add(Running(hold(1), lease=0.06))
        assert rounds.acquire(timeout=10)
        assert rounds.acquire(timeout=10)
        keeper.remove(Running(hold(1)))


def in_child(body: Callable[[], int]) -> int:
    """The number that `body` gives in a forked child; 1 if it raises there."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(body())
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_a_forked_child_starts_empty() -> None:
    """The parent's handlers do not run in the child: it renews none of them, and waits for no lock of the parent's."""
    keeper = LeaseKeeper(Batches, threaded=False)
    keeper.add(Running(hold(1)))
    other = LeaseKeeper(Batches, threaded=False)
    with other._lock:  # as another thread would hold it just when this one forks
        assert in_child(lambda: 10 + len(keeper._running) + 2 * other._lock.locked()) == 10
    assert len(keeper._running) == 1


@needs_fork
def test_two_threads_of_a_child_lose_nobody() -> None:
    """Two threads that are the first to use the keeper in a forked child are both kept: neither resets the other's."""
    keeper = LeaseKeeper(Batches, threaded=False)

    def child() -> int:
        real, looked = os.getpid, []

        def getpid() -> int:
            # A second thread comes in just when the first has looked whether this is a new process.
            answer = real()
            if not looked:
                looked.append(True)
                keeper.add(Running(hold(2)))
            return answer

        os.getpid = getpid
        keeper.add(Running(hold(1)))
        if not looked:
            keeper.add(Running(hold(2)))
        return 10 + len(keeper._running)

    assert in_child(child) == 12


@needs_fork
def test_a_child_has_a_thread_of_its_own() -> None:
    """Threads do not survive a fork: the child's first execution starts one again."""
    keeper = LeaseKeeper(Batches)
    keeper.add(Running(hold(1), lease=600))

    def child() -> int:
        keeper.add(Running(hold(2), lease=600))
        return 10 + bool(keeper._thread and keeper._thread.is_alive())

    assert in_child(child) == 11
