"""What a worker that died in the middle of its handler leaves behind: run again, quarantined, or probed."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import Bench, Killed, SingleStore, answers, hows

from idempotent_bus.abandoned import AbandonedRecord, quarantined_record
from idempotent_bus.errors import ConfigurationError, InDoubt
from idempotent_bus.hooks import ABANDON, DEAD_LETTER, HANDLER, PROBE, QUARANTINE
from idempotent_bus.identity import record_key
from idempotent_bus.model import Reason, State
from idempotent_bus.policy import Backoff
from idempotent_bus.work import Ended


class Probe:
    """A probe that answers as told, and remembers what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[AbandonedRecord] = []

    def __call__(self, record: AbandonedRecord) -> bool:
        self.asked.append(record)
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer  # type: ignore[no-any-return]


def dies() -> None:
    raise Killed


def abandoned(bench: Bench) -> None:
    """A worker has started the handler and is gone."""
    bench.steps.error(ABANDON)  # it can say nothing any more
    with pytest.raises(Killed):
        bench.executor().handle(bench.work(dies))
    bench.clock.advance(61)


def test_rerun_is_the_default() -> None:
    """I2: without another wish an abandoned message runs again, its dead attempt counted."""
    bench = Bench()
    abandoned(bench)
    runs: list[int] = []
    assert bench.executor().handle(bench.work(lambda: runs.append(1), redelivered=True)).how is Ended.COMPLETED
    assert runs == [1]
    assert bench.record().attempts == 2  # type: ignore[union-attr]


def test_quarantine_runs_nothing_and_keeps_the_record_for_a_person() -> None:
    """I2: the effect may be there, so nothing runs: the record is quarantined, and only then the message is moved."""
    bench = Bench(on_abandoned="quarantine")
    abandoned(bench)
    work = bench.work(lambda: pytest.fail("ran"), redelivered=True)
    work.settle.check = lambda: bench.record().state is State.QUARANTINED or pytest.fail("moved too early")  # type: ignore[union-attr,attr-defined]
    assert bench.executor().handle(work).how is Ended.DEAD
    assert work.settle.answer[1:] == (Reason.ABANDONED, "a worker died in the middle of the handler", 1)  # type: ignore[attr-defined]
    shown = quarantined_record(bench.memory.quarantined()[0])
    assert (shown.scope, shown.biz_id, shown.attempts) == ("cards.issue", "b-1", 1)
    copy = bench.work(lambda: pytest.fail("ran"))
    assert bench.executor().handle(copy).how is Ended.DEAD
    assert copy.settle.answer[1] is Reason.ABANDONED  # type: ignore[attr-defined]


@pytest.mark.parametrize("done", [True, False])
def test_a_resolved_record_is_done_or_runs_when_it_is_redriven(done: bool) -> None:
    """I12: the person's word decides: completed, a redrive is a replay; not completed, it runs with fresh attempts."""
    bench, runs = Bench(on_abandoned="quarantine", max_attempts=1), []
    abandoned(bench)
    bench.executor().handle(bench.work(dies, redelivered=True))
    assert bench.memory.resolve(record_key("cards.issue", "b-1"), completed=done, retention=600.0)
    ending = bench.executor().handle(bench.work(lambda: runs.append(1), redelivered=True, redrive=1))
    assert ending.how is (Ended.REPLAYED if done else Ended.COMPLETED)
    assert runs == [1] * (not done)


def test_a_worker_that_dies_between_quarantine_and_dead_letter() -> None:
    """I1: the message comes back, meets the quarantined record, and is moved then."""
    bench = Bench(on_abandoned="quarantine")
    abandoned(bench)

    def die(call: Any) -> Any:
        raise Killed

    bench.steps.at(DEAD_LETTER, die)
    with pytest.raises(Killed):
        bench.executor().handle(bench.work(dies, redelivered=True))
    work = bench.work(dies, redelivered=True)
    assert bench.executor().handle(work).how is Ended.DEAD
    assert answers([work]) == ["dead"]


def test_quarantine_makes_no_reservations() -> None:
    """I12: a claim ahead of its turn could not be told from one whose handler had started: each is made singly."""
    bench = Bench(on_abandoned="quarantine")
    works = [bench.work(lambda: None, str(n)) for n in range(2)] + [bench.work(dies, "last")]
    bench.steps.error(ABANDON)
    with pytest.raises(Killed):
        bench.executor().handle_window(works)
    assert bench.record("last").state is State.IN_PROGRESS  # type: ignore[union-attr]
    late = [bench.work(lambda: None, "later")]
    assert hows(bench.executor().handle_window(late)) == ["completed"]


def test_a_claim_whose_replies_were_lost_is_not_abandoned() -> None:
    """The handler never started: asked again with the same nonce, the claim is recognised; no quarantine."""
    bench, runs = Bench(on_abandoned="quarantine"), []
    bench.steps.reply_lost("claim", 2)
    executor = bench.executor()
    assert executor.handle(bench.work(dies)).how is Ended.IN_DOUBT
    bench.clock.advance(2)
    assert executor.handle(bench.work(lambda: runs.append(1), redelivered=True)).how is Ended.COMPLETED
    assert runs == [1]
    assert bench.record().attempts == 1  # type: ignore[union-attr]


def test_a_store_without_a_quarantine_says_so() -> None:
    """A wish that cannot be kept is an error, not a silent rerun."""
    bench = Bench(on_abandoned="quarantine")
    bench.store = SingleStore(bench.memory)
    with pytest.raises(ConfigurationError, match="quarantine"):
        bench.executor().handle(bench.work(dies))


def test_a_quarantine_in_doubt_moves_nothing() -> None:
    """I9: the store does not answer: nothing runs, the message comes back, and is quarantined then."""
    bench = Bench(on_abandoned="quarantine")
    abandoned(bench)
    bench.steps.error(QUARANTINE)
    executor = bench.executor()
    work = bench.work(dies, redelivered=True)
    assert executor.handle(work).how is Ended.IN_DOUBT
    bench.clock.advance(61)
    assert executor.handle(bench.work(dies, redelivered=True)).how is Ended.DEAD


def test_the_probe_says_done() -> None:
    """I2: the card system has issued it: completed and acked without running."""
    probe = Probe(True)
    bench = Bench(on_abandoned=probe)
    abandoned(bench)
    work = bench.work(lambda: pytest.fail("ran"), redelivered=True)
    assert bench.executor().handle(work).how is Ended.REPLAYED
    assert answers([work]) == ["ack"]
    assert bench.record().state is State.COMPLETED  # type: ignore[union-attr]
    asked = probe.asked[0]
    assert (asked.scope, asked.biz_id, asked.attempts) == ("cards.issue", "b-1", 1)
    assert asked.idempotency_key == record_key("cards.issue", "b-1").hex()


def test_the_probe_says_not_done() -> None:
    """I1: it has not: the handler runs, as the next attempt, and the probe's token fences it."""
    probe, runs = Probe(False), []
    bench = Bench(on_abandoned=probe)
    abandoned(bench)
    assert bench.executor().handle(bench.work(lambda: runs.append(1), redelivered=True)).how is Ended.COMPLETED
    assert runs == [1]
    assert probe.asked[0].token == bench.record().token  # type: ignore[union-attr]


def test_the_probe_is_not_asked_about_what_was_not_abandoned() -> None:
    """A first run, a busy copy, a run after a failure: nobody died in them."""
    probe = Probe()
    bench = Bench(on_abandoned=probe)
    executor, seen = bench.executor(), []

    def fails() -> None:
        seen.append(bench.executor().handle(bench.work(dies)).how)
        raise ValueError

    assert executor.handle(bench.work(fails)).how is Ended.FAILED
    assert executor.handle(bench.work(lambda: None, redelivered=True)).how is Ended.COMPLETED
    assert seen == [Ended.BUSY]
    assert probe.asked == []


@pytest.mark.parametrize("trouble", [ValueError("down"), "yes", None])
def test_a_probe_that_fails_is_asked_again_then_a_person(trouble: Any) -> None:
    """I9, I12: without its word nothing runs. Each failure is an attempt with its backoff; in the end, quarantine."""
    probe = Probe(*[trouble] * 9)
    bench = Bench(on_abandoned=probe, max_attempts=4)
    abandoned(bench)
    executor, said = bench.executor(), []
    for _ in range(9):
        work = bench.work(lambda: pytest.fail("ran"), redelivered=True)
        said.append(executor.handle(work).how)
        if said[-1] is Ended.DEAD:
            break
        bench.clock.advance(16)  # its backoff, not its lease: the claim was ended
    assert said == [Ended.FAILED] * 2 + [Ended.DEAD]
    assert bench.record().state is State.QUARANTINED  # type: ignore[union-attr]


def test_a_process_told_to_stop_in_the_probe_leaves_it_abandoned() -> None:
    """The next worker probes again: that somebody may have done it is not forgotten."""
    probe = Probe(KeyboardInterrupt(), True)
    bench = Bench(on_abandoned=probe)
    abandoned(bench)
    with pytest.raises(KeyboardInterrupt):
        bench.executor().handle(bench.work(dies, redelivered=True))
    assert bench.keeper._running == {}
    assert bench.executor().handle(bench.work(dies, redelivered=True)).how is Ended.REPLAYED
    assert len(probe.asked) == 2


def test_the_lease_is_renewed_while_the_probe_asks() -> None:
    """A slow answer does not let another worker take over."""
    bench = Bench()

    def slow(record: AbandonedRecord) -> bool:
        for _ in range(10):
            bench.clock.advance(20)
            bench.keeper.tick()
        return True

    bench = Bench(on_abandoned=slow)
    abandoned(bench)
    assert bench.executor().handle(bench.work(dies, redelivered=True)).how is Ended.REPLAYED


class Timeout(Exception):
    """Of a call to somewhere: it may have arrived."""


@pytest.mark.parametrize("error", [InDoubt("no answer"), Timeout()])
@pytest.mark.parametrize("attempts", [1, 3])
def test_a_handler_that_cannot_tell_leaves_it_abandoned(error: Exception, attempts: int) -> None:
    """I2: a call that timed out may have had its effect: by quarantine nothing runs, not even as a last attempt."""
    bench = Bench(on_abandoned="quarantine", in_doubt=(Timeout,), max_attempts=attempts)

    def doubtful() -> None:
        raise error

    executor = bench.executor()
    assert executor.handle(bench.work(doubtful)).how is Ended.FAILED
    assert executor.handle(bench.work(dies, redelivered=True)).how is Ended.DEAD
    assert bench.record().state is State.QUARANTINED  # type: ignore[union-attr]


def test_in_doubt_under_rerun_is_a_failure_like_any_other() -> None:
    """I12: attempts are bounded, and the message ends in the dead letter."""
    bench = Bench(in_doubt=(Timeout,), max_attempts=2)

    def doubtful() -> None:
        raise Timeout

    executor = bench.executor()
    assert [executor.handle(bench.work(doubtful)).how for _ in range(2)] == [Ended.FAILED, Ended.DEAD]


def test_every_step_of_it_goes_through_a_hook() -> None:
    """Fault injection reaches the probe, the quarantine and the abandoning."""
    bench = Bench(on_abandoned="quarantine")
    abandoned(bench)
    bench.executor().handle(bench.work(dies, redelivered=True))
    assert {ABANDON, QUARANTINE} < set(bench.steps.passed)
    other = Bench(on_abandoned=Probe(True))
    abandoned(other)
    other.executor().handle(other.work(dies, redelivered=True))
    assert other.steps.passed[-3] == PROBE
    assert HANDLER in other.steps.passed


def test_attempts_are_bounded_whatever_the_probe_says() -> None:
    """I12: a message that kills its worker each time, and is found not done each time, ends in the dead letter."""
    bench, runs = Bench(on_abandoned=Probe(*[False] * 20), max_attempts=3, backoff=Backoff(1.0, 1.0)), []

    def poison() -> None:
        runs.append(1)
        bench.steps.error(ABANDON)
        raise Killed

    for _ in range(10):
        try:
            if bench.executor().handle(bench.work(poison, redelivered=True)).how is Ended.DEAD:
                break
        except Killed:
            bench.clock.advance(61)
    assert len(runs) == 3
