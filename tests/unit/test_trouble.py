"""What the lower half does when handlers fail in their several ways, leases are lost, and messages are too old."""

from __future__ import annotations

import threading
import types
from typing import Any, ClassVar

import pytest
from fakes import SCOPE, Bench, Delivery, Killed, Steps, answers, hows
from sqlalchemy import create_engine

from idempotent_bus import Inbox, delays, idempotent_consumer, transactional_consumer
from idempotent_bus.errors import ConfigurationError, LeaseLost, Permanent, StoreUnavailable, Transient
from idempotent_bus.events import Event, EventKind, notifier
from idempotent_bus.execution import LeasedExecution, current_execution
from idempotent_bus.executor import Executor
from idempotent_bus.hooks import CLAIM, COMPLETE, DEAD_LETTER, HANDLER, RELEASE, RENEW
from idempotent_bus.lease import LeaseKeeper, keeper_for
from idempotent_bus.model import Reason, State
from idempotent_bus.msgid import derived_inner_msg_id
from idempotent_bus.policy import Backoff, Policy
from idempotent_bus.work import Ended, Work

RETENTION = 7 * 86_400.0


def boom() -> None:
    raise ValueError("no such card")


def run(bench: Bench, handler: Any, **changes: Any) -> Work:
    work = bench.work(handler, **changes)
    bench.executor().handle(work)
    return work


def answer(work: Work) -> tuple[Any, ...]:
    return work.settle.answer  # type: ignore[attr-defined,no-any-return]


# --- by the kind of failure -----------------------------------------------------------------------------


def test_a_transient_error_names_its_own_delay() -> None:
    """The resource said when to come again: that replaces the backoff, and the attempt is counted as ever."""
    bench = Bench()

    def later() -> None:
        raise Transient("rate limit", retry_after=42.0)

    assert answer(run(bench, later)) == ("wait", 42.0)
    assert bench.record().attempts == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf")])
def test_a_delay_that_is_none_is_refused_where_it_is_written(wrong: float) -> None:
    """NaN and negative delays would only fail in the broker, in the middle of a failure."""
    with pytest.raises(ValueError, match="retry_after"):
        Transient(retry_after=wrong)


class Http(Transient):
    """As users write them: without the base's __init__, or with its attribute set later to whatever came."""

    def __init__(self, *retry_after: Any) -> None:
        if retry_after:
            self.retry_after = retry_after[0]


@pytest.mark.parametrize("asked", [(), ("30",), (float("nan"),), (-1.0,), (None,)], ids=repr)
def test_a_transient_error_without_a_delay_has_the_backoff(asked: tuple[Any, ...]) -> None:
    """I12: a subclass that never called the base's __init__ is a failure as any other, and ends no consumer."""
    bench = Bench()

    def later() -> None:
        raise Http(*asked)

    assert answer(run(bench, later)) == ("wait", 4.0)
    assert bench.record().attempts == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("asked", [1_735_689_600, 1e300])
@pytest.mark.parametrize("retention", [RETENTION, 1e9])
def test_a_delay_is_never_longer_than_a_broker_can_keep_it(asked: float, retention: float) -> None:
    """A date where seconds are meant: the record outlives the wait, and RabbitMQ has a queue for it (2**32 ms)."""
    bench = Bench(retention=retention)

    def later() -> None:
        raise Transient("come again on that day", retry_after=asked)

    (_, delay) = answer(run(bench, later))
    assert 2 * delay <= retention
    assert delays.delay_for(delay) < 2**32


class Busy(ConnectionError):
    pass


def test_each_class_of_errors_has_its_own_backoff_and_bound() -> None:
    """The most special class that is named decides: for its subclasses too, and for nobody else."""
    bench = Bench(
        max_attempts=2,
        backoff=Backoff(8.0, 300.0),
        backoffs={OSError: Backoff(2.0, 10.0, max_attempts=4), ConnectionError: Backoff(100.0, 100.0)},
    )

    def raises(error: Exception) -> Any:
        def handler() -> None:
            raise error

        return handler

    assert answer(run(bench, raises(Busy()), biz_id="1")) == ("wait", 50.0)
    assert answer(run(bench, raises(TimeoutError()), biz_id="2")) == ("wait", 1.0)
    assert answer(run(bench, raises(KeyError()), biz_id="3")) == ("wait", 4.0)
    assert answer(run(bench, raises(KeyError()), biz_id="3"))[:2] == ("dead", Reason.ATTEMPTS)
    for _ in range(3):
        assert answer(run(bench, raises(TimeoutError()), biz_id="4"))[0] == "wait"
    assert answer(run(bench, raises(TimeoutError()), biz_id="4"))[:2] == ("dead", Reason.ATTEMPTS)


def test_an_attempt_past_its_own_bound_is_given_up_by_the_largest() -> None:
    """I12: bounded whatever class is raised in turn: a dead worker's attempt counts for the largest bound."""
    bench = Bench(max_attempts=2, backoffs={OSError: Backoff(max_attempts=3)})
    assert bench.policy.most_attempts == 3


# --- what cannot be dead-lettered -----------------------------------------------------------------------


def test_what_could_not_be_dead_lettered_is_held_and_not_run_again() -> None:
    """I4: the dead letter cannot be written: not acked, said truthfully; looked at again it is not run again."""
    bench = Bench(permanent=(ValueError,))
    held = bench.work(boom, settle=Delivery(moves=False))
    assert bench.executor().handle(held).how is Ended.HELD
    again = bench.work(lambda: pytest.fail("ran"), redelivered=True)
    assert bench.executor().handle(again).how is Ended.DEAD
    assert again.settle.answer[1] is Reason.ATTEMPTS, "another worker knows only that it may not run"  # type: ignore[attr-defined]


def test_what_could_not_be_dead_lettered_keeps_its_reason() -> None:
    """The dead letter that is written in the end says why the message died, not that it was tried before."""
    bench = Bench(permanent=(ValueError,))
    executor = bench.executor()
    works = [bench.work(boom, settle=Delivery(moves=False)) for _ in range(3)]
    works.append(bench.work(lambda: pytest.fail("ran"), redelivered=True))
    assert hows(map(executor.handle, works)) == ["held"] * 3 + ["dead"]
    said = [work.settle.answer[1:] for work in works]  # type: ignore[attr-defined]
    assert said[0][0] is Reason.PERMANENT
    assert said[0][2] == 1
    assert said == [said[0]] * 4
    assert executor._unmoved == {}


@pytest.mark.parametrize("error", [Permanent("closed"), ValueError("the last attempt")])
def test_nobody_dead_letters_what_is_not_his_any_more(error: Exception) -> None:
    """I6: the lease was lost and another one runs, or has done it: its failure decides nothing, and the copy waits."""
    bench = Bench(max_attempts=1)

    def overtaken() -> None:
        bench.clock.advance(61)
        bench.take()
        raise error

    work = bench.work(overtaken)
    assert bench.executor().handle(work).how is Ended.LEASE_LOST
    assert answers([work]) == ["wait"]
    assert bench.record().state is State.IN_PROGRESS  # type: ignore[union-attr]


def test_nobody_dead_letters_in_doubt() -> None:
    """I9: whether it is still ours cannot be told: it comes back."""
    bench = Bench(permanent=(ValueError,))
    bench.steps.error(RENEW)
    work = bench.work(boom)
    assert bench.executor().handle(work).how is Ended.IN_DOUBT
    assert answers([work]) == ["wait"]
    assert DEAD_LETTER not in bench.steps.passed


# --- too old --------------------------------------------------------------------------------------------


def test_a_message_older_than_the_retention_is_in_doubt() -> None:
    """I11: its record may have been forgotten: to the dead letter; the youngest that is old enough still runs."""
    bench, runs = Bench(retention=1000.0), []
    now = bench.clock()
    old = bench.work(lambda: pytest.fail("ran"), "old", published_at=now - 1000.1)
    young = bench.work(lambda: runs.append(1), "young", published_at=now - 999.9)
    assert hows([bench.executor().handle(work) for work in (old, young)]) == ["dead", "completed"]
    assert answer(old)[1] is Reason.TOO_OLD
    assert runs == [1]


def test_what_its_record_can_tell_is_not_in_doubt() -> None:
    """I8, I11: however old the message is, a record that is there says what it is."""
    bench, runs = Bench(retention=1000.0), []
    bench.executor().handle(bench.work(lambda: "card", "done"))
    bench.executor().handle(bench.work(boom, "failed"))
    long_ago = bench.clock() - 5000.0
    works = [bench.work(lambda: runs.append(1), name, published_at=long_ago) for name in ("done", "failed")]
    assert hows([bench.executor().handle(work) for work in works]) == ["replayed", "completed"]
    assert runs == [1]


def test_the_old_are_found_in_a_window_too() -> None:
    """I11: a reservation is given up like any other claim, and spoils no later one."""
    bench = Bench(retention=1000.0)
    works = [bench.work(lambda: None, str(n), published_at=bench.clock() - 600.0 * n) for n in range(4)]
    assert hows(bench.executor().handle_window(works)) == ["completed", "completed", "dead", "dead"]
    assert [bench.record(str(n)).attempts for n in (2, 3)] == [0, 0]  # type: ignore[union-attr]


def test_retention_shorter_than_a_wait_is_refused() -> None:
    """I11: a copy that waits for its backoff, or for a busy record, must still find the completed one."""
    with pytest.raises(ConfigurationError, match="retention"):
        Policy(retention=299.0)
    with pytest.raises(ConfigurationError, match="retention"):
        Policy(retention=80.0, lease=60.0, backoff=Backoff(1.0, 10.0))
    Policy(retention=100.0, lease=60.0, backoff=Backoff(1.0, 10.0))


# --- leases ---------------------------------------------------------------------------------------------


def test_a_handler_that_outlives_a_stalled_renewal_learns_of_it() -> None:
    """The store keeps silent for a lease: the worker's own clock says stop, an event is set; the token decides."""
    bench, seen = Bench(), []

    def handler() -> str:
        execution = current_execution()
        assert isinstance(execution, LeasedExecution)
        event = execution.lease_lost_event
        execution.check()
        bench.steps.error(RENEW, times=99)
        for _ in range(5):
            bench.clock.advance(15)
            bench.keeper.tick()
            seen.append((execution.lease_lost, event.is_set()))
        with pytest.raises(LeaseLost):
            execution.check()
        return "done"

    # A late completion stands, since nobody took over.
    assert bench.executor().handle(bench.work(handler)).how is Ended.COMPLETED
    assert seen == [(False, False)] * 3 + [(True, True)] * 2


def test_a_lease_that_was_renewed_late_is_good_again() -> None:
    """Nobody took over while the renewals stalled: by the store's word the handler may go on."""
    bench = Bench()

    def handler() -> None:
        bench.steps.error(RENEW, times=1)
        bench.clock.advance(61)
        bench.keeper.tick()
        assert current_execution().lease_lost
        bench.keeper.tick()
        assert not current_execution().lease_lost

    assert bench.executor().handle(bench.work(handler)).how is Ended.COMPLETED


def test_the_event_of_a_lease_lost_before_anybody_asked_is_set() -> None:
    """Asked for late, it tells what has happened."""
    bench, kept = Bench(), []

    def handler() -> None:
        kept.append(current_execution())
        bench.clock.advance(61)
        bench.take()
        bench.keeper.tick()
        assert kept[0].lease_lost_event.is_set()
        assert kept[0].lease_lost

    assert bench.executor().handle(bench.work(handler)).how is Ended.LEASE_LOST


def test_executors_on_one_store_share_a_keeper() -> None:
    """All running handlers of a process are renewed together, whatever their scopes; steps of a test stay its own."""
    bench = Bench()

    def store() -> Any:
        return bench.memory

    first, second = Executor(store, Policy()), Executor(store, Policy(lease=30.0))
    assert first._keeper is second._keeper is keeper_for(store)
    assert Executor(store, Policy(), step=Steps())._keeper is not first._keeper
    assert keeper_for(lambda: bench.memory) is not first._keeper


# --- manual ---------------------------------------------------------------------------------------------


def test_failing_later_is_like_raising() -> None:
    """manual=True: the business failed after the handler had returned: released, counted, back after the backoff."""
    bench, kept = Bench(), []
    executor = bench.executor(manual=True)
    work = bench.work(lambda: kept.append(current_execution()))
    assert executor.handle(work).how is Ended.OPEN
    kept[0].fail(ValueError("declined"))
    assert answer(work) == ("wait", 4.0)
    assert (bench.record().state, bench.record().attempts) == (State.RELEASED, 1)  # type: ignore[union-attr]
    kept[0].fail("again")  # changes nothing
    assert bench.keeper._running == {}


@pytest.mark.parametrize("reason", ["closed account", ValueError("closed account")])
def test_failing_for_good_goes_to_the_dead_letter(reason: Any) -> None:
    """permanent=True: no rerun, with what was said as the reason."""
    bench = Bench()
    work = bench.work(lambda: current_execution().fail(reason, permanent=True))
    assert bench.executor(manual=True).handle(work).how is Ended.DEAD
    assert answer(work)[1] is Reason.PERMANENT
    assert "closed account" in answer(work)[2]


def test_two_threads_that_end_it_end_it_once() -> None:
    """complete and fail race from several threads: one decides, and the message is answered once."""
    for _ in range(20):
        bench, kept, said = Bench(), [], []
        executor = bench.executor(manual=True)
        work = bench.work(lambda kept=kept: kept.append(current_execution()))
        executor.handle(work)
        barrier = threading.Barrier(6)

        def end(number: int, kept: Any = kept, barrier: Any = barrier, said: Any = said) -> None:
            barrier.wait()
            if number % 2:
                kept[0].fail("no")
            else:
                try:
                    kept[0].complete(number)
                    said.append("completed")
                except LeaseLost:
                    said.append("lost")

        threads = [threading.Thread(target=end, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(work.settle.answers) == 1  # type: ignore[attr-defined]
        assert set(said) == ({"completed"} if answer(work)[0] == "ack" else {"lost"})


def test_the_transactions_execution_has_no_lease() -> None:
    """What does not exist there says so, instead of pretending."""
    from idempotent_bus.execution import Execution

    execution = Execution(Bench().work(boom), 1)
    for call in (lambda: execution.token, execution.complete, execution.fail):
        with pytest.raises(ConfigurationError):
            call()
    assert not execution.lease_lost
    execution.check()


def test_a_derived_id_is_the_same_on_every_attempt() -> None:
    """What is published under a name has one id, whichever attempt publishes it; one name twice is refused."""
    bench, ids = Bench(), []

    def handler() -> None:
        ids.append(current_execution().derived_id("receipt"))
        ids.append(current_execution().derived_id("mail"))
        with pytest.raises(ConfigurationError, match="twice"):
            current_execution().derived_id("receipt")
        if len(ids) < 3:
            boom()

    for _ in range(2):
        work = bench.work(handler)
        bench.executor().handle(work)
    assert ids[:2] == ids[2:]
    assert ids[0] == derived_inner_msg_id(work.key, "receipt") != ids[1]


# --- a silent store -------------------------------------------------------------------------------------


def test_a_silent_store_is_asked_less_and_less_and_answers_at_once() -> None:
    """I9, I13: in doubt messages wait longer and longer, up to 22.5 seconds; one answer, and it is over."""
    bench = Bench(busy_delay=1.0)
    executor, delays = bench.executor(), []
    for lasted in (0.0, 1.0, 1.5, 4.0, 9.0, 30.0):
        bench.clock.advance(lasted)
        for number in range(3):  # however many messages ask
            bench.steps.error(CLAIM, times=2)
            work = bench.work(boom, str(number))
            assert executor.handle(work).how is Ended.IN_DOUBT
        delays.append(answer(work)[1] / 1.25)
    assert delays == [1.0, 1.0, 2.5, 6.5, 15.0, 15.0]
    assert executor.handle(bench.work(lambda: None)).how is Ended.COMPLETED
    bench.steps.error(CLAIM, times=2)
    work = bench.work(boom, "other")
    executor.handle(work)
    assert answer(work)[1] == 1.25


def test_what_was_reserved_before_the_store_fell_silent_is_not_started() -> None:
    """I9: a completion in doubt puts off the rest of its window; reservations lapse, and cost no attempt."""
    bench = Bench()
    bench.steps.error(COMPLETE, times=1000)
    works = [bench.work(lambda: None, str(n)) for n in range(3)]
    assert hows(bench.executor().handle_window(works)) == ["in doubt"] * 3
    assert bench.steps.passed.count(HANDLER) == 1
    bench.steps._script.clear()
    bench.clock.advance(61)
    again = [bench.work(lambda: current_execution().attempt, str(n), redelivered=True) for n in range(3)]
    executor = bench.executor()
    assert [executor.handle(work).value for work in again] == [1, 1, 1]
    assert [bench.record(str(n)).attempts for n in (1, 2)] == [1, 1]  # type: ignore[union-attr]


# --- events ---------------------------------------------------------------------------------------------


class Ear:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.heard: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.heard.append(event)

    def kinds(self) -> list[str]:
        return [event.kind.value for event in self.heard]


def test_a_listener_hears_what_happens() -> None:
    """Each way through the core is told, in order, under the record's digest and never the biz-id."""
    bench, ear = Bench(max_attempts=2), Ear()
    executor = bench.executor(notify=notifier(ear))
    for handler in (lambda: None, boom):
        executor.handle(bench.work(handler))
    assert ear.kinds() == ["claimed", "completed", "replayed"]
    ear.heard.clear()
    for _ in range(2):
        executor.handle(bench.work(boom, "bad"))
    assert ear.kinds() == ["claimed", "released", "claimed", "dead-lettered"]
    assert (ear.heard[1].reason, ear.heard[3].reason) == ("ValueError", "attempts")
    assert (ear.heard[3].attempt, ear.heard[3].token) == (2, ear.heard[2].token)
    ear.heard.clear()
    bench.take("held")
    executor.handle(bench.work(boom, "held"))
    executor.handle(bench.work(boom, fingerprint=b"another."))
    bench.steps.error(CLAIM, 2)
    executor.handle(bench.work(boom, "doubt"))
    executor.refuse(SCOPE, Delivery(), Reason.INVALID, "no id")
    assert ear.kinds() == ["busy", "replayed", "store unavailable", "dead-lettered"]
    assert all("b-1" not in repr(event) and "held" not in event.record for event in ear.heard)


def test_a_listener_hears_of_abandoned_quarantined_and_lost() -> None:
    """The rarer ways too."""
    bench, ear = Bench(on_abandoned="quarantine"), Ear()
    executor = bench.executor(notify=notifier(ear))
    bench.take()
    bench.clock.advance(61)
    executor.handle(bench.work(boom, redelivered=True))
    assert ear.kinds() == ["abandoned", "quarantined", "dead-lettered"]
    ear.heard.clear()

    def overtaken() -> None:
        bench.clock.advance(61)
        bench.take("other")
        bench.keeper.tick()

    executor.handle(bench.work(overtaken, "other"))
    assert ear.kinds() == ["claimed", "lease lost"], "the keeper saw it, then the completion: told once"
    ear.heard.clear()

    def unseen(failing: bool) -> None:
        bench.clock.advance(61)
        bench.take(f"unseen {failing}")
        if failing:
            boom()

    for failing in (False, True):
        executor.handle(bench.work(lambda failing=failing: unseen(failing), f"unseen {failing}"))
        assert ear.kinds() == ["claimed", "lease lost"], "nothing was released that is another's"
        assert ear.heard[1].token == ear.heard[0].token > 0
        ear.heard.clear()
    bench.executor(notify=notifier(ear)).handle(bench.work(lambda: None, "mark", fingerprint=b"finger-1"))
    bench.executor(notify=notifier(ear)).handle(bench.work(boom, "mark", fingerprint=b"finger-2"))
    assert ear.kinds() == ["claimed", "completed", "conflicted", "dead-lettered"]
    assert {kind.value for kind in EventKind} >= set(ear.kinds())


def test_a_listener_that_fails_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Who only watches cannot fail a message."""

    class Broken:
        def on_event(self, event: Event) -> None:
            raise RuntimeError("metrics are down")

    bench = Bench()
    work = bench.work(lambda: None)
    assert bench.executor(notify=notifier(Broken())).handle(work).how is Ended.COMPLETED
    assert answers([work]) == ["ack"]
    assert "listener failed" in caplog.text


class _Async:
    async def on_event(self, event: Event) -> None: ...


class _Wide:
    def on_event(self, event: Event, more: object) -> None: ...


class _Empty:
    on_event = "something else"


@pytest.mark.parametrize("wrong", [print, lambda event: None, object(), Ear, _Async(), _Wide(), _Empty(), "listener"])
def test_what_is_no_listener_is_refused_when_it_is_given(wrong: Any) -> None:
    """A function, a class, an async or a wrong method: each would fail or do nothing at every event, which is only
    logged. Refused where it is given, by every decorator, before any message."""
    with pytest.raises(ConfigurationError, match="listener"):
        notifier(wrong)
    with pytest.raises(ConfigurationError, match="listener"):
        idempotent_consumer("memory://", scope=SCOPE, biz_id="id", listener=wrong)
    with pytest.raises(ConfigurationError, match="listener"):
        transactional_consumer(Inbox(create_engine("sqlite://")), scope=SCOPE, biz_id="id", listener=wrong)


def test_listeners_of_every_kind_are_told() -> None:
    """A method, a class whose method is the class's own, a callable object as on_event: all that can be called."""

    class Kept:
        heard: ClassVar[list[Event]] = []

        @classmethod
        def on_event(cls, event: Event, more: int = 0) -> None:
            cls.heard.append(event)

    ear, event = Ear(), Event(EventKind.CLAIMED, SCOPE)
    for listener in (ear, Kept, types.SimpleNamespace(on_event=Kept.heard.append)):
        notify = notifier(listener)
        assert notify is not None
        notify(event)
    assert (ear.heard, Kept.heard) == ([event], [event, event])


def test_a_completion_in_doubt_raises_where_the_business_said_so() -> None:
    """manual=True from another thread: the caller learns that nothing is known."""
    bench, kept = Bench(), []
    executor = bench.executor(manual=True)
    work = bench.work(lambda: kept.append(current_execution()))
    executor.handle(work)
    bench.steps.error(COMPLETE, times=1000)
    with pytest.raises(StoreUnavailable):
        kept[0].complete()
    assert answers([work]) == ["wait"]


def test_a_killed_worker_tells_nothing_more() -> None:
    """The keeper is empty after a kill, so that a dead handler's lease is not renewed by its process's thread."""
    bench = Bench()
    with pytest.raises(Killed):
        bench.executor().handle(bench.work(lambda: (_ for _ in ()).throw(Killed())))
    assert bench.keeper._running == {}
    assert isinstance(bench.keeper, LeaseKeeper)
    assert RELEASE not in bench.steps.passed
