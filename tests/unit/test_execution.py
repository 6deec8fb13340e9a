"""The execution core: each row of the table in `execution.py`, one answer for each thing that can go wrong."""

from __future__ import annotations

import contextvars
import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from fakes import SCOPE, Bench, Delivery, Killed, SingleStore, Steps, answers, hows

from idempotent_bus.errors import HandlerAcknowledged, LeaseLost, NoExecution, Permanent, StoreUnavailable
from idempotent_bus.execution import LeasedExecution, current_execution
from idempotent_bus.hooks import (
    ABANDON,
    ACK,
    CLAIM,
    CLAIMED,
    COMPLETE,
    DEAD_LETTER,
    DURABLE,
    HANDLER,
    RELEASE,
    RENEW,
    WAIT,
)
from idempotent_bus.identity import record_key
from idempotent_bus.model import ClaimRequest, Hold, Reason, State
from idempotent_bus.policy import Backoff
from idempotent_bus.results import MAX_RESULT_BYTES
from idempotent_bus.store import CompletionStream
from idempotent_bus.stores.streams import DirectStream
from idempotent_bus.work import Ended, Work

SECRET = "biz-s3cret-77"


def boom() -> None:
    raise ValueError("no such card")


def state(bench: Bench, biz_id: str = "b-1") -> State | None:
    record = bench.record(biz_id)
    return None if record is None else record.state


def attempts(bench: Bench, biz_id: str = "b-1") -> int:
    record = bench.record(biz_id)
    return 0 if record is None else record.attempts


# --- the straight way -----------------------------------------------------------------------------------


def test_claim_run_complete_then_ack(bench: Bench) -> None:
    """I4: acked once, after the completion is durable, and in this order."""
    work = bench.work(lambda: {"card": 7})
    work.settle.check = lambda: state(bench) is State.COMPLETED or pytest.fail("acked before completed")  # type: ignore[attr-defined]
    ending = bench.executor().handle(work)
    assert (ending.how, ending.value) == (Ended.COMPLETED, {"card": 7})
    assert bench.steps.passed == [CLAIM, HANDLER, COMPLETE, ACK]
    assert answers([work]) == ["ack"]


def test_a_duplicate_is_acked_and_gets_the_result(bench: Bench) -> None:
    """I8: the second copy does not run; its caller gets the stored result, and can tell that it is a replay."""
    executor, runs = bench.executor(), []
    for _ in range(3):
        work = bench.work(lambda: runs.append(1) or {"card": 7})
        ending = executor.handle(work)
        assert ending.value == {"card": 7}
        assert answers([work]) == ["ack"]
    assert ending.how is Ended.REPLAYED
    assert runs == [1]
    assert bench.steps.passed[4:] == [CLAIM, ACK] * 2


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (None, None),
        (0, 0),
        (False, False),
        ("", ""),
        ([1, "a", None, {"b": 1.5}], [1, "a", None, {"b": 1.5}]),
        ((1, 2), [1, 2]),
        ("\u00e9\ud800", "\u00e9\ud800"),
        ("x" * (MAX_RESULT_BYTES - 2), "x" * (MAX_RESULT_BYTES - 2)),
    ],
)
def test_results_are_stored_as_json(bench: Bench, value: Any, stored: Any) -> None:
    """The first caller gets the handler's own value, every later one its JSON; the largest that fits is stored."""
    executor = bench.executor()
    assert executor.handle(bench.work(lambda: value)).value is value
    assert executor.handle(bench.work(boom)).value == stored


class _BadDict(dict):  # type: ignore[type-arg]
    def items(self) -> Any:
        raise LookupError("no items today")


def _deep() -> Any:
    value: Any = "x"
    for _ in range(50_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, b"bytes", {(1, 2): 3}, "x" * (MAX_RESULT_BYTES - 1), 10**5000, _BadDict(a=1), "deep"],
    ids=["object", "set", "bytes", "tuple key", "too large", "huge int", "bad dict", "deep"],
)
def test_a_result_that_cannot_be_stored_fails_nothing(
    bench: Bench, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The effect has happened: completed without a result and with a warning, whatever encoding it raises."""
    value = _deep() if value == "deep" else value
    executor, work = bench.executor(), bench.work(lambda: value)
    ending = executor.handle(work)
    assert ending.how is Ended.COMPLETED
    assert ending.value is value
    assert answers([work]) == ["ack"]
    assert "not stored" in caplog.text
    assert executor.handle(bench.work(boom)).value is None
    del ending
    while isinstance(value, list):  # taken apart by hand: freeing it in one go recurses
        value = value[0]


@pytest.mark.parametrize("stored", [b"not json", b"\xff", b"", b"[" * 100_000])
def test_a_stored_result_that_cannot_be_read_ends_nothing(bench: Bench, stored: bytes) -> None:
    """A record that another hand wrote: the duplicate is acked all the same, with no result."""
    bench.memory.complete(bench.take(), result=stored, retention=600)
    work = bench.work(boom)
    ending = bench.executor().handle(work)
    assert (ending.how, ending.value) == (Ended.REPLAYED, None)
    assert answers([work]) == ["ack"]


def test_what_the_handler_may_know(bench: Bench) -> None:
    """The handler sees its scope, ids, token, attempt, and a downstream key that is the same on every attempt."""
    seen: list[tuple[Any, ...]] = []

    def handler() -> None:
        e = current_execution()
        seen.append((e.scope, e.biz_id, e.inner_msg_id, e.attempt, e.lease_lost, e.idempotency_key, e.token))
        if len(seen) < 3:
            raise ValueError

    executor = bench.executor()
    for _ in range(3):
        executor.handle(bench.work(handler, inner_msg_id="m-1"))
    key = record_key(SCOPE, "b-1").hex()
    assert [s[:-1] for s in seen] == [(SCOPE, "b-1", "m-1", n, False, key) for n in (1, 2, 3)]
    assert seen[0][-1] < seen[1][-1] < seen[2][-1]


def test_current_execution_is_the_innermost(bench: Bench) -> None:
    """A handler that handles another message sees its own execution again afterwards."""
    executor, seen = bench.executor(), []

    def inner() -> None:
        seen.append(current_execution().biz_id)

    def outer() -> None:
        seen.append(current_execution().biz_id)
        executor.handle(bench.work(inner, "inner"))
        executor.handle(bench.work(boom, "broken"))
        seen.append(current_execution().biz_id)

    executor.handle(bench.work(outer, "outer"))
    assert seen == ["outer", "inner", "outer"]
    with pytest.raises(NoExecution):
        current_execution()


def test_current_execution_belongs_to_its_thread(bench: Bench) -> None:
    """Two threads at once each see their own; a thread that a handler starts sees one only with a copied context."""
    executor, both, seen = bench.executor(), threading.Barrier(2), {}

    def handler(name: str) -> None:
        both.wait(10)
        context = contextvars.copy_context()
        inside: list[Any] = []

        def other() -> None:
            with pytest.raises(NoExecution):
                current_execution()
            inside.append(context.run(lambda: current_execution().biz_id))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join(10)
        seen[name] = (current_execution().biz_id, inside)
        both.wait(10)

    threads = [
        threading.Thread(target=executor.handle, args=(bench.work(lambda name=name: handler(name), name),))
        for name in ("one", "two")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == {"one": ("one", ["one"]), "two": ("two", ["two"])}


# --- the handler raised ---------------------------------------------------------------------------------


def test_a_failure_is_released_counted_and_comes_back_after_the_backoff(bench: Bench) -> None:
    """I12: attempts are counted in the store, the delay doubles with each, and nothing is acked."""
    executor, delays = bench.executor(), []
    for number in (1, 2):
        work = bench.work(boom)
        assert executor.handle(work).how is Ended.FAILED
        assert (state(bench), attempts(bench)) == (State.RELEASED, number)
        delays.append(work.settle.answer)  # type: ignore[attr-defined]
    assert delays == [("wait", 4.0), ("wait", 8.0)]  # one half drawn, of 8 and of 16 seconds
    assert bench.steps.passed == [CLAIM, HANDLER, RELEASE, WAIT] * 2


def test_attempts_used_up_end_in_the_dead_letter(bench: Bench) -> None:
    """I12: the last allowed attempt that fails is dead-lettered with the traceback's last line; no more runs follow."""
    executor = bench.executor()
    works = [bench.work(boom) for _ in range(5)]
    endings = [executor.handle(work) for work in works]
    assert hows(endings) == ["failed", "failed", "dead", "dead", "dead"]
    assert works[2].settle.answer == ("dead", Reason.ATTEMPTS, "ValueError: no such card", 3)  # type: ignore[attr-defined]
    assert works[3].settle.answer == ("dead", Reason.ATTEMPTS, "the attempts are used up", 3)  # type: ignore[attr-defined]
    assert works[4].settle.answer == works[3].settle.answer  # type: ignore[attr-defined]
    assert bench.steps.passed.count(HANDLER) == 3
    assert attempts(bench) == 3


def test_the_dead_letter_comes_before_the_release(bench: Bench) -> None:
    """I4: until the dead letter is confirmed the claim is held, so that no copy runs beside it."""
    work = bench.work(boom)
    bench.policy = type(bench.policy)(max_attempts=1)
    work.settle.check = lambda: state(bench) is State.IN_PROGRESS or pytest.fail("released too early")  # type: ignore[attr-defined]
    assert bench.executor().handle(work).how is Ended.DEAD
    assert bench.steps.passed == [CLAIM, HANDLER, RENEW, DEAD_LETTER, RELEASE]


def test_a_redrive_starts_the_attempts_afresh(bench: Bench) -> None:
    """I12: moved back from the dead letter with a larger number, the message gets all its attempts again."""
    executor = bench.executor()
    for _ in range(4):
        executor.handle(bench.work(boom))
    assert [executor.handle(bench.work(boom, redrive=1)).how for _ in range(4)] == [
        Ended.FAILED,
        Ended.FAILED,
        Ended.DEAD,
        Ended.DEAD,
    ]
    assert executor.handle(bench.work(lambda: "ok", redrive=2)).how is Ended.COMPLETED
    assert executor.handle(bench.work(boom, redrive=3)).how is Ended.REPLAYED


class _Mine(Permanent):
    """A user's own permanent error."""


@pytest.mark.parametrize("error", [Permanent("closed account"), _Mine("x"), KeyError("x"), HandlerAcknowledged("x")])
def test_a_permanent_error_is_dead_lettered_at_once(error: Exception) -> None:
    """No rerun of what no rerun can mend: Permanent, its subclasses, the policy's classes, and a handler that acked."""
    bench = Bench(permanent=(LookupError,))

    def handler() -> None:
        raise error

    work = bench.work(handler)
    assert bench.executor().handle(work).how is Ended.DEAD
    assert work.settle.answer[:2] == ("dead", Reason.PERMANENT)  # type: ignore[attr-defined]
    assert (state(bench), attempts(bench)) == (State.RELEASED, 1)


def test_the_last_line_is_the_errors_own(bench: Bench) -> None:
    """Notes and messages of many lines do not hide what was raised."""

    def handler() -> None:
        error = Permanent("first line\nsecond line")
        if hasattr(error, "add_note"):
            error.add_note("only a note")
        raise error

    work = bench.work(handler)
    bench.executor().handle(work)
    assert "Permanent: first line" in work.settle.answer[2]  # type: ignore[attr-defined]
    assert "note" not in work.settle.answer[2]  # type: ignore[attr-defined]


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_an_error_without_a_text_is_an_error_like_any_other(bench: Bench) -> None:
    """Whatever a handler raises is an outcome: even an error whose text cannot be made."""

    def handler() -> None:
        raise _Unprintable

    executor = bench.executor()
    assert hows([executor.handle(bench.work(handler)) for _ in range(3)]) == ["failed", "failed", "dead"]


@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_the_end_of_the_process_goes_through(bench: Bench, error: type[BaseException]) -> None:
    """Told to stop in the handler: abandoned with its attempt counted, not settled, and the error goes on."""

    def handler() -> None:
        raise error

    executor, work = bench.executor(), bench.work(handler)
    with pytest.raises(error):
        executor.handle(work)
    assert answers([work]) == [""]
    assert (state(bench), attempts(bench)) == (State.IN_PROGRESS, 1)
    assert bench.record().lease_left == 0  # type: ignore[union-attr]
    assert bench.keeper._running == {}
    with pytest.raises(NoExecution):
        current_execution()


def test_never_more_runs_than_the_bound_whatever_raises(bench: Bench) -> None:
    """I12: single handling counts at the claim: exactly max_attempts runs, with a worker that dies in each."""
    runs = 0

    def poison() -> None:
        nonlocal runs
        runs += 1
        raise Killed

    def dying() -> None:
        # The process is gone: nothing that it would say now reaches the store.
        bench.steps.error(ABANDON)
        poison()

    for run in (poison, dying):
        bench, runs = Bench(max_attempts=3), 0
        for _ in range(10):
            try:
                bench.executor().handle(bench.work(run, redelivered=True))
            except Killed:
                bench.clock.advance(61)
        assert runs == 3


# --- the claim ------------------------------------------------------------------------------------------


def test_busy_comes_back_later_and_spends_no_attempt(bench: Bench) -> None:
    """I12: neither ack nor run nor attempt; it comes back when the holder's lease may be over, with some jitter."""
    bench.take(lease=60.0)
    executor = bench.executor()
    for draw, delay in ((0.0, 60.0), (0.5, 75.0), (0.999, 89.97)):
        bench.draw = draw
        work = bench.work(boom)
        assert executor.handle(work).how is Ended.BUSY
        assert work.settle.answer == ("wait", pytest.approx(delay))  # type: ignore[attr-defined]
        assert attempts(bench) == 1
    assert HANDLER not in bench.steps.passed


def test_busy_waits_at_least_the_busy_delay() -> None:
    """A lease that ends in a moment does not make a tight loop."""
    bench = Bench(busy_delay=5.0)
    bench.draw = 0.0
    bench.take(lease=0.1)
    work = bench.work(boom)
    bench.executor().handle(work)
    assert work.settle.answer == ("wait", 5.0)  # type: ignore[attr-defined]


def test_a_conflict_goes_to_the_dead_letter(bench: Bench) -> None:
    """I8: the same biz-id with another body is no duplicate, and is never run; the record is left as it is."""
    executor = bench.executor()
    executor.handle(bench.work(lambda: "first", fingerprint=b"1" * 8))
    work = bench.work(boom, fingerprint=b"2" * 8)
    assert executor.handle(work).how is Ended.DEAD
    assert work.settle.answer[:2] == ("dead", Reason.CONFLICT)  # type: ignore[attr-defined]
    assert executor.handle(bench.work(boom, fingerprint=b"1" * 8)).value == "first"


def test_in_doubt_at_the_claim_nothing_runs_and_nothing_is_acked(bench: Bench) -> None:
    """I9: the store is down: no handler, no ack, the message comes back."""
    executor = bench.executor()
    bench.steps.error(CLAIM, times=2)
    work = bench.work(boom)
    assert executor.handle(work).how is Ended.IN_DOUBT
    assert work.settle.answer == ("wait", 1.25)  # type: ignore[attr-defined]
    assert HANDLER not in bench.steps.passed
    assert bench.record() is None


def test_a_store_that_cannot_be_opened_is_in_doubt(bench: Bench) -> None:
    """I9: an opener that fails is the same as a verb that fails, singly and in a window."""
    executor = bench.executor()

    def unreachable() -> Any:
        raise StoreUnavailable("scripted")

    executor._claims._open = unreachable
    works = [bench.work(boom, str(n)) for n in range(3)]
    assert executor.handle(works[0]).how is Ended.IN_DOUBT
    assert hows(executor.handle_window(works[1:])) == ["in doubt"] * 2
    assert answers(works) == ["wait"] * 3


def test_a_claim_whose_reply_was_lost_is_recognised(bench: Bench) -> None:
    """I15: asked again with the same nonce it is the same claim: one attempt, one run."""
    bench.steps.reply_lost(CLAIM)
    work = bench.work(lambda: current_execution().attempt)
    ending = bench.executor().handle(work)
    assert (ending.how, ending.value) == (Ended.COMPLETED, 1)
    assert attempts(bench) == 1
    assert bench.steps.passed == [CLAIM, CLAIM, HANDLER, COMPLETE, ACK]


def test_a_claim_in_doubt_is_not_another_bodys(bench: Bench) -> None:
    """I8: what is remembered of a claim in doubt is for the same body only: another one must not run as its holder."""
    bench.steps.reply_lost(CLAIM, 2)
    executor = bench.executor()
    first = bench.work(lambda: "first", fingerprint=b"body one")
    assert executor.handle(first).how is Ended.IN_DOUBT
    other = bench.work(boom, fingerprint=b"body two", redelivered=True)
    assert executor.handle(other).how is Ended.DEAD
    again = bench.work(lambda: "first", fingerprint=b"body one", redelivered=True)
    ending = executor.handle(again)
    assert (ending.how, ending.value) == (Ended.COMPLETED, "first")


def test_no_handler_starts_past_half_its_lease(bench: Bench) -> None:
    """A claim whose reply took more than half the lease is asked again, which renews it, before anything runs."""

    def slow(call: Callable[[], Any]) -> Any:
        outcome = call()
        bench.clock.advance(31)
        return outcome

    bench.steps.at(CLAIM, slow)
    work = bench.work(lambda: bench.record().lease_left)  # type: ignore[union-attr]
    assert bench.executor().handle(work).value == 60
    assert bench.steps.passed == [CLAIM, CLAIM, HANDLER, COMPLETE, ACK]


def test_a_store_too_slow_for_the_lease_is_in_doubt(bench: Bench) -> None:
    """I9: no reply comes within half the lease: nothing runs, and the claim is given back without an attempt."""

    def slow(call: Callable[[], Any]) -> Any:
        outcome = call()
        bench.clock.advance(40)
        return outcome

    bench.steps.at(CLAIM, slow, slow)
    work = bench.work(boom)
    assert bench.executor().handle(work).how is Ended.IN_DOUBT
    assert answers([work]) == ["wait"]
    assert (state(bench), attempts(bench)) == (State.RELEASED, 0)
    assert HANDLER not in bench.steps.passed


def test_nothing_runs_without_a_claim(bench: Bench) -> None:
    """Whatever the claim says but `Claimed`, the handler is not run."""
    executor = bench.executor()
    bench.take("busy")
    bench.memory.complete(bench.take("done"), result=None, retention=600)
    for biz_id in ("busy", "done"):
        executor.handle(bench.work(boom, biz_id))
        executor.handle_window([bench.work(boom, biz_id), bench.work(lambda: None, biz_id + "x")])
    assert bench.steps.passed.count(HANDLER) == 2


# --- the completion -------------------------------------------------------------------------------------


def test_a_completion_whose_reply_was_lost_is_asked_again(bench: Bench) -> None:
    """I15: the same hold asked again tells that it is completed; acked once, the handler ran once."""
    runs: list[int] = []
    bench.steps.reply_lost(COMPLETE, times=3)
    work = bench.work(lambda: runs.append(1))
    assert bench.executor().handle(work).how is Ended.COMPLETED
    assert bench.steps.passed == [CLAIM, HANDLER, COMPLETE, COMPLETE, COMPLETE, COMPLETE, ACK]
    assert (runs, answers([work])) == ([1], ["ack"])


def test_a_completion_in_doubt_for_a_whole_lease_is_not_acked(bench: Bench) -> None:
    """I9: it is repeated for about a lease's time, then the message comes back, unacked."""
    begun = bench.clock()
    bench.steps.error(COMPLETE, times=1000)
    work = bench.work(lambda: "done")
    assert bench.executor().handle(work).how is Ended.IN_DOUBT
    assert answers([work]) == ["wait"]
    assert 55 < bench.clock() - begun <= 60
    assert bench.steps.passed.count(COMPLETE) < 100


def test_a_refused_completion_is_not_acked(bench: Bench) -> None:
    """I6: somebody took over: the late completion is refused, and the message comes back and finds their record."""
    executor = bench.executor()

    def overtaken() -> str:
        bench.clock.advance(61)
        bench.memory.complete(bench.take(), result=b'"theirs"', retention=6000)
        return "ours"

    work = bench.work(overtaken)
    assert executor.handle(work).how is Ended.LEASE_LOST
    assert answers([work]) == ["wait"]
    assert executor.handle(bench.work(boom)).value == "theirs"


def test_a_late_completion_stands_if_nobody_took_over(bench: Bench) -> None:
    """The lease lapsed unnoticed, nobody came: the work is done, and is completed and acked."""
    work = bench.work(lambda: bench.clock.advance(1000))
    assert bench.executor().handle(work).how is Ended.COMPLETED
    assert answers([work]) == ["ack"]


def test_a_lost_lease_shows_in_the_handler(bench: Bench) -> None:
    """A handler that outlived its lease learns it from the next renewal, and at the completion."""
    executor, seen = bench.executor(), []

    def handler() -> None:
        seen.append(current_execution().lease_lost)
        bench.clock.advance(61)
        bench.take()
        bench.keeper.tick()
        seen.append(current_execution().lease_lost)

    assert executor.handle(bench.work(handler)).how is Ended.LEASE_LOST
    assert seen == [False, True]


def test_the_lease_is_renewed_while_the_handler_runs(bench: Bench) -> None:
    """A handler ten times as long as its lease keeps it: a copy that looks in is busy, and it completes."""
    executor, copies = bench.executor(), []

    def long() -> str:
        for _ in range(30):
            bench.clock.advance(20)
            bench.keeper.tick()
            copies.append(executor.handle(bench.work(boom)).how)
        return "done"

    assert executor.handle(bench.work(long)).how is Ended.COMPLETED
    assert set(copies) == {Ended.BUSY}
    assert bench.steps.passed.count(RENEW) == 30
    assert bench.keeper._running == {}


@pytest.mark.parametrize("run", [lambda: None, boom])
def test_nothing_is_renewed_once_it_ended(bench: Bench, run: Callable[[], None]) -> None:
    """Completed or failed, the keeper has let go before the record changes: no renewal can take it for a lost lease."""

    def check(call: Callable[[], Any]) -> Any:
        assert bench.keeper._running == {}
        return call()

    for name in (COMPLETE, RELEASE):
        bench.steps.at(name, check)
    bench.executor().handle(bench.work(run))
    assert {COMPLETE, RELEASE} & set(bench.steps.passed)


def test_a_broken_connection_at_the_ack_goes_through(bench: Bench) -> None:
    """The ack was not sent: the record is completed, the error reaches the consumer, the redelivery is acked."""
    executor = bench.executor()
    bench.steps.error(ACK)
    with pytest.raises(ConnectionError):
        executor.handle(bench.work(lambda: "done"))
    again = bench.work(boom, redelivered=True)
    assert executor.handle(again).how is Ended.REPLAYED
    assert answers([again]) == ["ack"]


@pytest.mark.parametrize("name", [WAIT, DEAD_LETTER])
def test_a_broken_connection_at_another_answer_goes_through(name: str) -> None:
    """Nothing is settled, and the record is left for the redelivery: nothing is lost, nothing is acked."""
    bench = Bench(max_attempts=1 if name == DEAD_LETTER else 2)
    executor = bench.executor()
    bench.steps.error(name)
    with pytest.raises(ConnectionError):
        executor.handle(bench.work(boom))
    bench.clock.advance(61)
    again = bench.work(boom, redelivered=True)
    assert executor.handle(again).how is Ended.DEAD
    assert bench.steps.passed.count(HANDLER) == bench.policy.max_attempts


def test_a_release_in_doubt_costs_only_time(bench: Bench) -> None:
    """The lease lapses by itself; the attempt stays counted."""
    executor = bench.executor()
    bench.steps.error(RELEASE)
    assert executor.handle(bench.work(boom)).how is Ended.FAILED
    assert executor.handle(bench.work(boom)).how is Ended.BUSY
    bench.clock.advance(61)
    assert executor.handle(bench.work(lambda: current_execution().attempt)).value == 2


# --- manual completion ----------------------------------------------------------------------------------


def test_manual_completion_in_the_handler(bench: Bench) -> None:
    """manual=True: completed and acked by the call, not by the return; its result is stored."""
    executor = bench.executor(manual=True)

    def handler() -> str:
        current_execution().complete({"card": 7})
        assert bench.steps.passed[-2:] == [COMPLETE, ACK]
        return "not the result"

    work = bench.work(handler)
    ending = executor.handle(work)
    assert (ending.how, ending.value) == (Ended.COMPLETED, {"card": 7})
    assert answers([work]) == ["ack"]
    assert executor.handle(bench.work(boom)).value == {"card": 7}


def test_manual_completion_later(bench: Bench) -> None:
    """The handler has returned, the lease is renewed, a copy is busy; then the business succeeds, and it is acked."""
    executor, kept = bench.executor(manual=True), []
    work = bench.work(lambda: kept.append(current_execution()))
    assert executor.handle(work).how is Ended.OPEN
    assert answers([work]) == [""]
    for _ in range(10):
        bench.clock.advance(20)
        bench.keeper.tick()
    assert executor.handle(bench.work(boom)).how is Ended.BUSY
    kept[0].complete("late")
    assert answers([work]) == ["ack"]
    assert executor.handle(bench.work(boom)).value == "late"


def test_manual_completion_that_never_comes(bench: Bench) -> None:
    """Returning is not success: nothing is completed, nothing acked; when the worker is gone, another one runs it."""
    work = bench.work(lambda: "returned")
    assert bench.executor(manual=True).handle(work).how is Ended.OPEN
    assert answers([work]) == [""]
    assert state(bench) is State.IN_PROGRESS
    bench.clock.advance(61)  # nobody renews: the worker died
    assert bench.executor(manual=True).handle(bench.work(lambda: current_execution().complete())).how is Ended.COMPLETED


def test_completing_twice_changes_nothing(bench: Bench) -> None:
    """The second call answers as the first did: one completion, one ack, the first result."""
    executor = bench.executor(manual=True)
    work = bench.work(lambda: [current_execution().complete(n) for n in (1, 2)])
    assert executor.handle(work).value == 1
    assert bench.steps.passed == [CLAIM, HANDLER, COMPLETE, ACK]
    assert answers([work]) == ["ack"]


def test_raising_after_completing_stays_completed(bench: Bench) -> None:
    """The business has said that it succeeded: what the handler raises after that repeats nothing."""

    def handler() -> None:
        current_execution().complete("done")
        boom()

    executor, work = bench.executor(manual=True), bench.work(handler)
    assert executor.handle(work).how is Ended.COMPLETED
    assert answers([work]) == ["ack"]


def test_completing_after_the_handler_failed_changes_nothing(bench: Bench) -> None:
    """A callback that comes after the handler raised and the message was put off: it says no, and answers nothing."""
    executor, kept = bench.executor(manual=True), []

    def handler() -> None:
        kept.append(current_execution())
        boom()

    work = bench.work(handler)
    assert executor.handle(work).how is Ended.FAILED
    with pytest.raises(LeaseLost):
        kept[0].complete("too late")
    kept[0].fail("too late")
    assert answers([work]) == ["wait"]
    assert state(bench) is State.RELEASED


def test_a_manual_completion_refused_or_in_doubt_says_no(bench: Bench) -> None:
    """LeaseLost: somebody took over; StoreUnavailable: in doubt. Again and again; the message comes back unacked."""
    executor, said = bench.executor(manual=True), []

    def try_it() -> None:
        for _ in range(2):
            try:
                current_execution().complete()
            except (LeaseLost, StoreUnavailable) as error:
                said.append(type(error))

    def overtaken() -> None:
        bench.clock.advance(61)
        bench.take()
        try_it()
        boom()  # changes nothing any more

    work = bench.work(overtaken)
    assert executor.handle(work).how is Ended.LEASE_LOST
    assert answers([work]) == ["wait"]
    bench.steps.error(COMPLETE, times=1000)
    other = bench.work(try_it, "other")
    assert executor.handle(other).how is Ended.IN_DOUBT
    assert answers([other]) == ["wait"]
    assert said == [LeaseLost] * 2 + [StoreUnavailable] * 2


@pytest.mark.parametrize("swallow", [True, False])
def test_a_manual_completion_whose_ack_failed(bench: Bench, swallow: bool) -> None:
    """Completed, but the ack could not be sent: never put off nor dead-lettered; the ack is tried once more."""
    bench = Bench(max_attempts=1)
    executor = bench.executor(manual=True)

    def handler() -> None:
        try:
            current_execution().complete("done")
        except ConnectionError:
            if not swallow:
                raise

    bench.steps.error(ACK)
    work = bench.work(handler)
    assert executor.handle(work).how is Ended.COMPLETED
    assert answers([work]) == ["ack"]
    bench.steps.error(ACK, times=2)
    broken = bench.work(handler, "broken")
    with pytest.raises(ConnectionError):  # the consumer must learn that its connection is gone
        executor.handle(broken)
    assert answers([broken]) == [""]
    assert bench.steps.passed.count(COMPLETE) == 2
    assert state(bench, "broken") is State.COMPLETED


def test_complete_without_manual_is_not_done_twice(bench: Bench) -> None:
    """A handler that calls `complete` although it need not is completed and acked once: a second ack ends a channel."""
    executor = bench.executor()
    work = bench.work(lambda: current_execution().complete("early") and "returned")
    ending = executor.handle(work)
    assert (ending.how, ending.value) == (Ended.COMPLETED, "early")
    assert bench.steps.passed == [CLAIM, HANDLER, COMPLETE, ACK]
    assert answers([work]) == ["ack"]


def test_a_killed_process_does_not_release_what_it_completed(bench: Bench) -> None:
    """Told to stop after `complete`: the record stays completed."""

    def handler() -> None:
        current_execution().complete("done")
        raise Killed

    work = bench.work(handler)
    with pytest.raises(Killed):
        bench.executor(manual=True).handle(work)
    assert state(bench) is State.COMPLETED
    assert RELEASE not in bench.steps.passed


# --- the window -----------------------------------------------------------------------------------------


def test_first_deliveries_are_claimed_in_one_step(bench: Bench) -> None:
    """One round trip for the whole window; without a stream, each then runs, completes and is acked in its turn."""
    works = [bench.work(lambda n=n: n, str(n)) for n in range(4)]
    endings = bench.executor(streaming=False).handle_window(works)
    assert [ending.value for ending in endings] == [0, 1, 2, 3]
    assert bench.steps.passed == [CLAIM] + [HANDLER, COMPLETE, ACK] * 4
    assert answers(works) == ["ack"] * 4


def test_completions_are_not_waited_for_one_by_one(bench: Bench) -> None:
    """Streaming: each completion leaves at once, and the acks follow when all are durable."""
    works = [bench.work(lambda n=n: n, str(n)) for n in range(4)]
    endings = bench.executor().handle_window(works)
    assert [ending.value for ending in endings] == [0, 1, 2, 3]
    assert bench.steps.passed == [CLAIM] + [HANDLER, COMPLETE] * 4 + [DURABLE] + [ACK] * 4


def test_a_window_of_none_and_of_one(bench: Bench) -> None:
    """Nothing to do is nothing done; a single message is claimed as a single message, its attempt counted at once."""
    executor = bench.executor()
    assert executor.handle_window([]) == []
    work = bench.work(lambda: state(bench))
    assert executor.handle_window([work])[0].value is State.IN_PROGRESS
    assert bench.steps.passed == [CLAIM, HANDLER, COMPLETE, ACK]


def test_a_store_without_batches_is_asked_one_by_one(bench: Bench) -> None:
    """The window is a capability: without it every message is claimed singly."""
    bench.store = SingleStore(bench.memory)
    works = [bench.work(lambda: None, str(n)) for n in range(3)]
    assert hows(bench.executor().handle_window(works)) == ["completed"] * 3
    assert bench.steps.passed == [CLAIM, HANDLER, COMPLETE, ACK] * 3


def test_redelivered_messages_are_claimed_singly_in_their_turn(bench: Bench) -> None:
    """I12: their worker may have died, so the attempt must be in the store before the handler starts."""
    seen: dict[str, State | None] = {}
    works = [
        bench.work(lambda n=n: seen.setdefault(n, state(bench, n)), n, redelivered=n.startswith("r"))
        for n in ("a", "r1", "b", "r2")
    ]
    assert hows(bench.executor().handle_window(works)) == ["completed"] * 4
    assert seen == {"a": State.RESERVED, "r1": State.IN_PROGRESS, "b": State.RESERVED, "r2": State.IN_PROGRESS}
    assert [bench.steps.passed.count(step) for step in (CLAIM, CLAIMED)] == [1, 2]


def came_back(bench: Bench, *names: str, **handlers: Callable[[], Any]) -> list[Work]:
    """Messages that were here before, so that each is claimed singly, in its turn."""
    return [bench.work(handlers.get(name, lambda: None), name, redelivered=True) for name in names]


def test_a_claim_goes_along_with_the_completion_before(bench: Bench) -> None:
    """Where messages are claimed singly: the next one's claim leaves with a completion, and only its answer is waited
    for; its attempt is counted before its handler starts (I12)."""
    seen = {}
    works = came_back(bench, "a", "b", "c", b=lambda: seen.setdefault("b", (state(bench, "b"), state(bench, "c"))))
    assert hows(bench.executor().handle_window(works)) == ["completed"] * 3
    along = [CLAIMED, HANDLER, COMPLETE]
    assert bench.steps.passed == [CLAIM, HANDLER, COMPLETE, *along, *along, DURABLE] + [ACK] * 3
    assert seen == {"b": (State.IN_PROGRESS, None)}
    assert [attempts(bench, name) for name in "abc"] == [1, 1, 1]


def test_a_claim_does_not_go_along_with_a_failure(bench: Bench) -> None:
    """Nothing is sent before the handler is through; after one that raised, the next one is claimed by itself."""
    works = came_back(bench, "a", "b", a=boom)
    assert hows(bench.executor().handle_window(works)) == ["failed", "completed"]
    assert bench.steps.passed == [CLAIM, HANDLER, RELEASE, WAIT, CLAIM, HANDLER, COMPLETE, DURABLE, ACK]
    assert attempts(bench, "b") == 1


def test_a_copy_is_claimed_behind_the_completion_of_the_first(bench: Bench) -> None:
    """I2: two copies in a row: the second finds the first completed, and does not run."""
    runs: list[int] = []
    works = [bench.work(lambda: runs.append(1), "a", redelivered=True) for _ in range(2)]
    assert hows(bench.executor().handle_window(works)) == ["completed", "replayed"]
    assert runs == [1]


@pytest.mark.parametrize("how", ["error", "reply_lost"])
def test_a_claim_along_that_is_in_doubt_is_asked_again(bench: Bench, how: str) -> None:
    """I9: no answer, no handler. Asked again with the same nonce it is recognised, and costs one attempt."""
    works = came_back(bench, "a", "b")
    getattr(bench.steps, how)(CLAIMED)
    assert hows(bench.executor().handle_window(works)) == ["completed"] * 2
    assert bench.steps.passed.count(CLAIM) == 2
    assert attempts(bench, "b") == 1


@pytest.mark.parametrize("how", ["error", "reply_lost"])
def test_a_completion_in_doubt_that_took_a_claim_along(bench: Bench, how: str) -> None:
    """I15: the completion is repeated; the claim that may have left with it is asked for with the same nonce."""
    works = came_back(bench, "a", "b")
    getattr(bench.steps, how)(COMPLETE)
    assert hows(bench.executor().handle_window(works)) == ["completed"] * 2
    assert answers(works) == ["ack"] * 2
    assert [attempts(bench, name) for name in "ab"] == [1, 1]


def test_a_claim_along_is_given_back_if_its_handler_never_starts(bench: Bench) -> None:
    """The consumer is told to stop behind a completion: the next message's claim costs no attempt, and bars nobody."""

    class UntilStopped(list[Work]):
        def __iter__(self) -> Any:
            for work in super().__iter__():
                if state(bench, "a") is State.COMPLETED:
                    raise Killed
                yield work

    works = came_back(bench, "a", "b")
    with pytest.raises(Killed):
        bench.executor().handle_window(UntilStopped(works))
    assert answers(works) == ["ack", ""]
    assert (state(bench, "a"), state(bench, "b"), attempts(bench, "b")) == (State.COMPLETED, State.RELEASED, 0)


def test_a_handler_that_ends_the_window_leaves_no_claim(bench: Bench) -> None:
    """A signal in a handler: the claim of the next message has not left, and never does."""

    def killed() -> None:
        raise Killed

    works = came_back(bench, "a", "b", a=killed)
    executor = bench.executor()
    with pytest.raises(Killed):
        executor.handle_window(works)
    assert hows(executor.handle_window([bench.work(lambda: None, name) for name in "cd"])) == ["completed"] * 2
    assert state(bench, "b") is None


def gone(call: Callable[[], Any]) -> None:
    """The broker is."""
    raise ConnectionError


class SlowClaims:
    """A store whose claims take a moment, as in life; the completions of one key find its node down."""

    def __init__(self, bench: Bench, down: str = "") -> None:
        self._bench, self._down = bench, record_key(SCOPE, down) if down else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bench.memory, name)

    def claim(self, request: ClaimRequest) -> Any:
        outcome = self._bench.memory.claim(request)
        self._bench.clock.advance(0.002)
        return outcome

    def complete(self, hold: Hold, **settings: Any) -> bool:
        if hold.key == self._down:
            raise StoreUnavailable("its node is down")
        return self._bench.memory.complete(hold, **settings)

    def stream(self) -> CompletionStream:
        return DirectStream(self)


@pytest.mark.parametrize("policy", ["rerun", "quarantine"])
def test_a_claim_along_is_given_back_once_the_store_falls_silent(policy: Any) -> None:
    """I12: `b` was won, and is put off since the completion of `a` is in doubt: it never started, so it costs no
    attempt, and is not taken for one whose worker died."""
    bench = Bench(on_abandoned=policy)
    bench.store = SlowClaims(bench, down="a")
    assert hows(bench.executor().handle_window(came_back(bench, "a", "b"))) == ["in doubt"] * 2
    assert (state(bench, "b"), attempts(bench, "b")) == (State.RELEASED, 0)


@pytest.mark.parametrize(("step", "how"), [(CLAIMED, "error"), (CLAIMED, "reply_lost"), (RELEASE, "error")])
def test_a_claim_in_doubt_is_remembered_when_the_broker_goes(step: str, how: str) -> None:
    """I12, I15: one blip strikes store and broker. The message comes back to this consumer, which asks with the same
    nonce: it is not kept waiting by its own claim, nor taken for one whose worker died."""
    bench = Bench(on_abandoned="quarantine")
    bench.store = SlowClaims(bench)
    getattr(bench.steps, how)(step)
    bench.steps.at(ACK, gone)
    executor = bench.executor()
    with pytest.raises(ConnectionError):
        executor.handle_window(came_back(bench, "a", "b"))
    assert hows(executor.handle_window(came_back(bench, "a", "b"))) == ["replayed", "completed"]
    assert attempts(bench, "b") == 1


def test_a_takeover_whose_giving_back_is_in_doubt_is_counted(bench: Bench) -> None:
    """I12: `b`, whose worker had died, was taken over along with a completion, and abandoned again as the broker went;
    the answer is lost. It comes back as its second run, however often that happens."""
    bench.store = SlowClaims(bench)
    bench.take("b")
    bench.clock.advance(1000)
    bench.steps.reply_lost(ABANDON)
    bench.steps.at(ACK, gone)
    executor = bench.executor()
    with pytest.raises(ConnectionError):
        executor.handle_window(came_back(bench, "a", "b"))
    seen: list[int] = []
    again = came_back(bench, "b", b=lambda: seen.append(current_execution().attempt))
    assert hows(executor.handle_window(again)) == ["completed"]
    assert seen == [2]


def test_one_claim_in_doubt_keeps_no_other_from_going_along(bench: Bench) -> None:
    """A message that was put off in doubt may never come back here."""
    executor = bench.executor()
    bench.steps.error(CLAIM, 2)
    assert hows(executor.handle_window(came_back(bench, "x"))) == ["in doubt"]
    assert hows(executor.handle_window(came_back(bench, "a", "b", "c"))) == ["completed"] * 3
    assert bench.steps.passed.count(CLAIMED) == 2


def test_what_grew_too_old_meanwhile_counts_no_attempt(bench: Bench) -> None:
    """I11: `b` is older than the retention when the handler of `a` is through: a worker that dies before the dead
    letter must leave nothing by which the next one takes it for a message that has only failed before."""
    bench = Bench(retention=10_000.0, backoff=Backoff(1.0, 10.0))
    works = came_back(bench, "a", a=lambda: bench.clock.advance(100))
    works.append(bench.work(lambda: None, "b", redelivered=True, published_at=bench.clock() - 9_950))

    def killed(call: Callable[[], Any]) -> None:
        raise Killed

    bench.steps.at(DEAD_LETTER, killed)
    with pytest.raises(Killed):
        bench.executor().handle_window(works)
    bench.clock.advance(61)
    late = bench.work(boom, "b", redelivered=True, published_at=bench.clock() - 10_111)
    assert hows([bench.executor().handle(late)]) == ["dead"]


def test_a_copy_is_not_put_off_by_the_completion_in_its_way(bench: Bench) -> None:
    """I8: the completion of the first copy needs a second try; the other copy, which found it busy, is asked again."""
    complete, refused = bench.memory.complete, []

    def once_not(hold: Hold, **settings: Any) -> bool:
        if not refused:
            refused.append(hold)
            raise StoreUnavailable("once")
        return complete(hold, **settings)

    bench.memory.complete = once_not  # type: ignore[method-assign]
    works = [bench.work(lambda: None, "a", redelivered=True) for _ in range(2)]
    assert hows(bench.executor().handle_window(works)) == ["completed", "replayed"]


def test_a_reservation_with_attempts_behind_it_is_counted(bench: Bench) -> None:
    """I12: a retry that came back through a delay queue looks like a first delivery; a run of it must be counted before
    it starts, or a worker that dies in it could do so for ever, every other time."""
    executor = bench.executor()
    executor.handle(bench.work(boom, "retry"))
    seen: list[Any] = []
    works = [
        bench.work(lambda: seen.append((state(bench, "retry"), attempts(bench, "retry"))), "retry"),
        bench.work(lambda: None, "other"),
    ]
    assert hows(executor.handle_window(works)) == ["completed"] * 2
    assert seen == [(State.IN_PROGRESS, 2)]


def test_second_copies_of_one_key_wait_their_turn(bench: Bench) -> None:
    """Two copies in one window: the second is claimed after the first completed, and is acked as its duplicate."""
    works = [bench.work(lambda: "a", "a"), bench.work(lambda: "b", "b"), bench.work(boom, "a"), bench.work(boom, "b")]
    endings = bench.executor().handle_window(works)
    assert hows(endings) == ["completed", "completed", "replayed", "replayed"]
    assert [ending.value for ending in endings] == ["a", "b", "a", "b"]
    assert answers(works) == ["ack"] * 4


def test_a_redelivered_copy_is_not_held_up_by_its_own_windows_reservation(bench: Bench) -> None:
    """The redelivered copy comes first: it runs in its turn, instead of being busy with a claim of our own."""
    works = [bench.work(lambda: "a", "a", redelivered=True), bench.work(boom, "a")]
    works += [bench.work(lambda: None, n) for n in ("b", "c")]
    assert hows(bench.executor().handle_window(works)) == ["completed", "replayed", "completed", "completed"]


def test_a_failing_message_touches_no_other(bench: Bench) -> None:
    """One raises, one is busy, one conflicts, one is a duplicate: the rest complete as if they were alone."""
    executor = bench.executor()
    bench.take("busy")
    executor.handle(bench.work(lambda: "old", "done"))
    executor.handle(bench.work(lambda: None, "clash", fingerprint=b"1" * 8))
    works = [
        bench.work(lambda: "a", "a"),
        bench.work(boom, "fails"),
        bench.work(boom, "busy"),
        bench.work(lambda: "b", "b"),
        bench.work(boom, "clash", fingerprint=b"2" * 8),
        bench.work(boom, "done"),
        bench.work(lambda: "c", "c"),
    ]
    endings = executor.handle_window(works)
    assert hows(endings) == ["completed", "failed", "busy", "completed", "dead", "replayed", "completed"]
    assert answers(works) == ["ack", "wait", "wait", "ack", "dead", "ack", "ack"]
    assert attempts(bench, "fails") == 1


@pytest.mark.parametrize("done", [True, False])
def test_claiming_together_fails(bench: Bench, done: bool) -> None:
    """I15: each is claimed singly with its reservation's nonce, so that one that was made after all is recognised."""
    (bench.steps.reply_lost if done else bench.steps.error)(CLAIM)
    works = [bench.work(lambda n=n: n, str(n)) for n in range(3)]
    endings = bench.executor().handle_window(works)
    assert hows(endings) == ["completed"] * 3
    assert bench.steps.passed.count(CLAIM) == 4


def test_the_store_is_down_for_a_whole_window(bench: Bench) -> None:
    """I9: nothing runs, nothing is acked, every message comes back; and all is done when the store is there again."""
    bench.steps.error(CLAIM, times=1 + 2)
    works = [bench.work(lambda: None, str(n)) for n in range(3)]
    executor = bench.executor()
    assert hows(executor.handle_window(works)) == ["in doubt"] * 3
    assert answers(works) == ["wait"] * 3
    assert bench.steps.passed.count(CLAIM) == 3, "a store that keeps silent is not asked again for each message"
    assert HANDLER not in bench.steps.passed
    again = [bench.work(lambda: None, str(n)) for n in range(3)]
    assert hows(executor.handle_window(again)) == ["completed"] * 3


@pytest.mark.parametrize("cut", [Killed, KeyboardInterrupt, "wait"])
def test_reservations_are_given_back_when_the_window_is_cut_short(bench: Bench, cut: Any) -> None:
    """What never started costs no attempt and blocks nobody, whether the process stops or the connection breaks.

    What had succeeded before is acked all the same (I4)."""

    def second() -> None:
        if cut == "wait":
            bench.steps.error(WAIT)
            raise ValueError
        raise cut

    works = [bench.work(second if n == 1 else lambda: None, str(n)) for n in range(4)]
    with pytest.raises((ConnectionError, Killed, KeyboardInterrupt)):
        bench.executor().handle_window(works)
    assert answers(works) == ["ack", "", "", ""]
    assert [(state(bench, n), attempts(bench, n)) for n in ("2", "3")] == [(State.RELEASED, 0)] * 2
    other = Bench()
    other.clock, other.memory, other.store = bench.clock, bench.memory, bench.memory
    assert other.executor().handle(other.work(lambda: current_execution().attempt, "3")).value == 1


def test_a_connection_that_breaks_at_an_ack_loses_no_completion(bench: Bench) -> None:
    """I4/I8: all of the window is completed; what could not be acked comes back, and its record answers."""
    works = [bench.work(lambda n=n: n, str(n)) for n in range(3)]
    bench.steps.error(ACK)
    with pytest.raises(ConnectionError):
        bench.executor().handle_window(works)
    assert [state(bench, str(n)) for n in range(3)] == [State.COMPLETED] * 3
    assert answers(works)[0] == ""
    again = bench.work(boom, "0")
    assert bench.executor().handle(again).how is Ended.REPLAYED


def test_an_ack_that_fails_between_two_handlers_keeps_no_claim(bench: Bench) -> None:
    """I12: the message that was next had not started: its claim is given back too, and blocks nobody for a lease."""
    works = [bench.work(lambda: bench.clock.advance(0.01), str(n)) for n in range(4)]
    bench.steps.error(ACK)  # of the first, before the second handler: the clock lets the answers be looked at
    with pytest.raises(ConnectionError):
        bench.executor().handle_window(works)
    again = [bench.work(lambda: None, str(n)) for n in range(4)]
    assert "busy" not in [bench.executor().handle(one).how.value for one in again]


def test_a_second_copy_in_the_window_waits_for_the_first_ones_completion(bench: Bench) -> None:
    """I8: the copy is a replay, not busy: what is under way for its record is settled before it is claimed."""
    bench.stream_late()
    works = [bench.work(lambda: "once", "p-1"), bench.work(boom, "p-1"), bench.work(lambda: None, "p-2")]
    endings = bench.executor().handle_window(works)
    assert hows(endings) == ["completed", "replayed", "completed"]
    assert endings[1].value == "once"


def test_no_handler_starts_with_too_many_completions_under_way(bench: Bench) -> None:
    """At most 50 effects are ahead of their durable completions, and none by more than a second."""
    stream = bench.stream_late()
    most = 0

    def look(slow: float) -> None:
        nonlocal most
        most = max(most, stream.pending)
        bench.clock.advance(slow)

    bench.executor().handle_window([bench.work(lambda: look(0.0), str(n)) for n in range(120)])
    assert most == 49, "the fiftieth is begun by the handler that is looking"
    most = 0
    bench.executor().handle_window([bench.work(lambda: look(0.6), f"slow-{n}") for n in range(6)])
    assert most <= 2


def test_a_window_waits_for_each_completion_that_a_kill_would_take_along(bench: Bench) -> None:
    """I2: with a stream whose completions wait in this process, one kill could repeat a whole window of effects."""
    bench.stream_late().survives = False
    bench.executor().handle_window([bench.work(lambda: None, str(n)) for n in range(3)])
    assert bench.steps.passed == [CLAIM] + [HANDLER, COMPLETE, ACK] * 3


@pytest.mark.parametrize("durable", [False, None])
def test_what_the_stream_does_not_call_durable_is_asked_again(bench: Bench, durable: bool | None) -> None:
    """I4/I15: nothing is acked on the stream's word alone unless that is yes; `complete` with the same hold tells."""
    bench.stream_late(durable)
    works = [bench.work(lambda n=n: n, str(n)) for n in range(3)]
    assert hows(bench.executor().handle_window(works)) == ["completed"] * 3
    assert answers(works) == ["ack"] * 3
    assert [state(bench, str(n)) for n in range(3)] == [State.COMPLETED] * 3


def test_giving_back_is_tried_for_each(bench: Bench) -> None:
    """A reservation that cannot be given back lapses by itself, and stops neither the others nor the first error."""

    def first() -> None:
        bench.steps.error(ABANDON)
        bench.steps.error(RELEASE)  # that of the second
        raise Killed

    works = [bench.work(first if n == 0 else boom, str(n)) for n in range(3)]
    with pytest.raises(Killed):
        bench.executor().handle_window(works)
    assert [state(bench, str(n)) for n in range(3)] == [State.RESERVED, State.RESERVED, State.RELEASED]


def test_a_slow_neighbour_makes_the_next_ask_again(bench: Bench) -> None:
    """Past half its lease a reservation is asked for again before its handler starts: it may have been taken over."""
    theirs: list[str] = []

    def slow() -> None:
        bench.clock.advance(61)
        bench.memory.complete(bench.take("taken"), result=b'"theirs"', retention=6000)
        bench.take("busy")

    works = [
        bench.work(slow, "slow"),
        bench.work(boom, "taken"),
        bench.work(boom, "busy"),
        bench.work(lambda: theirs.append("ran") or state(bench, "free"), "free"),
    ]
    endings = bench.executor().handle_window(works)
    assert hows(endings) == ["completed", "replayed", "busy", "completed"]
    assert endings[1].value == "theirs"
    assert theirs == ["ran"]
    assert bench.record("free").token < bench.record("taken").token  # type: ignore[union-attr]  # still its reservation


def test_a_quick_neighbour_costs_no_second_claim(bench: Bench) -> None:
    """Up to half the lease a reservation is as good as new."""
    works = [bench.work(lambda: bench.clock.advance(29.9), "a"), bench.work(lambda: None, "b")]
    bench.executor().handle_window(works)
    assert bench.steps.passed.count(CLAIM) == 1


def test_a_reservation_never_runs_more_than_once_uncounted() -> None:
    """I12: the bound is max + 1 runs, with a worker that dies in each, as long as the broker tells a redelivery."""
    bench, runs = Bench(max_attempts=3), []

    def poison() -> None:
        runs.append(1)
        bench.steps.error(ABANDON)
        bench.steps.error(RELEASE, times=9)
        raise Killed

    for delivery in range(12):
        works = [bench.work(poison, redelivered=delivery > 0), bench.work(lambda: None, f"neighbour {delivery}")]
        try:
            bench.steps._script.clear()
            endings = bench.executor().handle_window(works)
        except Killed:
            bench.clock.advance(61)
    assert len(runs) == 4
    assert hows(endings) == ["dead", "completed"]


def test_a_window_past_the_attempts_is_buried(bench: Bench) -> None:
    """Attempts used up are found in a window too, and cost no further one."""
    executor = bench.executor()
    for _ in range(3):
        executor.handle(bench.work(boom, "bad"))
    works = [bench.work(boom, "bad"), bench.work(lambda: None, "good")]
    assert hows(executor.handle_window(works)) == ["dead", "completed"]
    assert attempts(bench, "bad") == 3


def test_manual_completion_in_a_window(bench: Bench) -> None:
    """One that stays open holds up no other."""
    kept: list[LeasedExecution] = []
    works = [
        bench.work(lambda: kept.append(current_execution()), "open"),
        bench.work(lambda: current_execution().complete(), "done"),
    ]
    assert hows(bench.executor(manual=True).handle_window(works)) == ["open", "completed"]
    kept[0].complete()
    assert answers(works) == ["ack", "ack"]


# --- what must not show ---------------------------------------------------------------------------------


def test_no_biz_id_in_logs_or_reprs(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A biz-id appears neither in a log line, nor in a dead letter's text of ours, nor in the repr of work."""
    caplog.set_level(logging.DEBUG)
    executor = bench.executor()

    def run(work: Work) -> None:
        assert SECRET not in repr(work)
        assert SECRET not in json.dumps(work.settle.answers, default=str)  # type: ignore[attr-defined]

    def overtaken() -> object:
        bench.clock.advance(61)
        bench.take(SECRET)
        bench.keeper.tick()
        return object()

    body = {"id": SECRET}
    works = [bench.work(overtaken, SECRET), bench.work(lambda body=body: boom(), SECRET)]
    bench.clock.advance(61)
    works += [bench.work(boom, SECRET, fingerprint=bytes([n]) * 8) for n in range(5)]
    for name in (CLAIM, COMPLETE, RELEASE):
        bench.steps.error(name, times=1)
    for work in works:
        run(work)
        executor.handle(work)
        bench.clock.advance(61)
        run(work)
    bench.steps.error(COMPLETE, times=1000)
    executor.handle(bench.work(lambda: None, SECRET + "x"))
    assert caplog.text.count("scope cards.issue") >= 4
    assert SECRET not in caplog.text


def test_every_step_has_a_hook() -> None:
    """All outside steps of all ways through the core go through the hook: none is hidden from fault injection."""
    outside: list[str] = []
    inside: list[str] = []

    class Watching(Steps):
        def __call__(self, name: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            inside.append(name)
            try:
                return super().__call__(name, function, *args, **kwargs)
            finally:
                inside.pop()

    def watched(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            outside.extend([name] * (not inside))
            return getattr(bench.memory, name)(*args, **kwargs)

        return call

    verbs = ("claim", "claim_many", "renew", "renew_many", "complete", "release", "abandon", "close")

    bench = Bench(max_attempts=1)
    bench.steps = Watching()
    bench.store = type("Watched", (), {name: watched(name) for name in verbs})()
    executor = bench.executor()

    def work(run: Any, biz_id: str, **changes: Any) -> Work:
        delivery = Delivery(check=lambda: outside.extend(["settled"] * (not inside)))
        return bench.work(run, biz_id, settle=delivery, **changes)

    def long() -> None:
        bench.clock.advance(21)
        bench.keeper.tick()

    bench.take("busy")
    executor.handle_window([work(long, "a"), work(boom, "b"), work(boom, "busy"), work(boom, "a")])
    assert outside == []
    assert set(bench.steps.passed) == {CLAIM, HANDLER, RENEW, COMPLETE, ACK, WAIT, DEAD_LETTER, RELEASE}


def test_a_window_whose_reservations_are_in_doubt_finds_them_again() -> None:
    """I15: what was put off with a silent store is asked for again with its nonce, and not blocked by its own claim."""
    bench, runs = Bench(), []
    executor = bench.executor()

    def window(redelivered: bool) -> list[Work]:
        return [bench.work(lambda name=name: runs.append(name), name, redelivered=redelivered) for name in "abc"]

    bench.steps.reply_lost(CLAIM, 3)  # the window's, and both of the first message's own
    assert hows(executor.handle_window(window(False))) == ["in doubt"] * 3
    assert runs == []
    assert {state(bench, name) for name in "abc"} == {State.RESERVED}
    assert hows(executor.handle_window(window(True))) == ["completed"] * 3
    assert runs == ["a", "b", "c"]
    assert {attempts(bench, name) for name in "abc"} == {1}, "it came back, so its attempt is counted"


def test_a_window_that_meets_a_silent_store_finds_its_reservations_again() -> None:
    """I15: the same for reservations whose reply did come, when the store fell silent before their turn."""
    bench, runs = Bench(), []
    executor = bench.executor()
    works = [bench.work(lambda name=name: runs.append(name), name) for name in "abc"]
    bench.steps.error(COMPLETE, 1000)  # for as long as a completion is asked for
    assert hows(executor.handle_window(works)) == ["in doubt"] * 3
    assert runs == ["a"]
    bench.steps._script.clear()
    again = [bench.work(lambda name=name: runs.append(name), name, redelivered=True) for name in "bc"]
    assert hows(executor.handle_window(again)) == ["completed"] * 2
    assert runs == ["a", "b", "c"]
