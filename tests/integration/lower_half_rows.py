"""The rows: what the lower half promises, each a function of a store and a broker (a `Rig`) that fails if it is not so.

The text of each assertion is the claim that it makes; `lower_half_mutants.py` names it.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from lower_half_rig import Rig, Worker

from idempotent_bus import Backoff, IdempotentProducer, Permanent, current_execution, pace, settlement
from idempotent_bus.errors import InDoubt, PublishUnknown
from idempotent_bus.headers import (
    DEAD_AT,
    DEAD_ATTEMPTS,
    DEAD_ERROR,
    DEAD_REASON,
    DEAD_SCOPE,
    INNER_MSG_ID,
    ORIGIN_QUEUE,
)
from idempotent_bus.model import ClaimRequest, State
from idempotent_bus.work import Ended

Row = Callable[[Rig], None]
ROWS: dict[str, Row] = {}


def row(function: Row) -> Row:
    ROWS[function.__name__] = function
    return function


def acked_only_when_done(*workers: Worker) -> None:
    """I4: at every ack of its own the record was completed already."""
    states = [entry.said for worker in workers for entry in worker.tape.of("ack")]
    assert set(states) <= {"COMPLETED"}, f"acked only after the completion is durable: {states}"


def reason_of(message: Any) -> str:
    return str(message.headers.get(DEAD_REASON))


class Stopped(BaseException):
    """The process is told to stop, in the middle of the handler."""


# --- completed ------------------------------------------------------------------------------------------


@row
def a_completed_copy(rig: Rig) -> None:
    """I4, I8: claim, run, complete, and only then the ack; a copy is acked, does not run, gets the stored result."""
    with rig.worker(lambda body: {"card": body["id"]}) as worker:
        rig.publish("a")
        rig.until(lambda: worker.ended(Ended.COMPLETED) == 1, "the first copy is completed")
        order = worker.tape.order("claim", "handler", "handler done", "complete", "complete done", "ack")
        acked_only_when_done(worker)
        assert order == ["claim", "handler", "handler done", "complete", "complete done", "ack"], order
        rig.publish("a")
        rig.until(lambda: worker.ended(Ended.REPLAYED) == 1, "a copy is acked as a replay")
    rig.publish("a")
    ending = rig.bare(worker.handler)
    assert ending.how is Ended.REPLAYED, "a bare callback is told of the replay"
    assert ending.value == {"card": "a"}, "the copy gets the stored result"
    assert len(worker.runs) == 1, "a copy does not run"
    acked_only_when_done(worker)
    rig.nothing_is_left()


@row
def completed_stays_completed(rig: Rig) -> None:
    """I6, I12: a redrive starts attempts afresh; a second dead copy of what is completed by then does nothing."""
    good = False

    def business(body: Any) -> None:
        if not good:
            raise ValueError("not yet")

    with rig.worker(business, max_attempts=1) as worker:
        first, second = rig.publish("a"), rig.publish("a")
        rig.until(lambda: worker.ended(Ended.DEAD) == 2, "both copies are dead-lettered")
        assert len(worker.runs) == 1, "attempts that are used up are so for each copy"
        good = True
        assert rig.redrive() == 2, "both are moved back"
        rig.until(lambda: worker.ended(Ended.COMPLETED) == 1, "a redriven message runs again")
        rig.until(lambda: worker.ended(Ended.REPLAYED) == 1, "the other copy is a replay")
        assert [run.attempt for run in worker.runs] == [1, 1], "a redrive starts the attempts afresh"
        assert worker.runs[0].token < worker.runs[1].token, "tokens only grow"
        acked_only_when_done(worker)
    assert rig.broker.is_empty(rig.broker.dead), "nothing is dead any more"
    rig.nothing_is_left()
    assert first != second


# --- busy, failed ---------------------------------------------------------------------------------------


@row
def a_busy_copy_waits(rig: Rig) -> None:
    """I12: a copy of what another worker is doing waits: no run, no ack, no attempt, no tight loop; others go on."""
    begun, go = rig.gate(), rig.gate()

    def hold(body: Any) -> None:
        begun.set()
        go.wait(rig.patience)

    with rig.worker(hold, prefetch=1, lease=1.0) as holder:
        rig.publish("a")
        rig.until(begun.is_set, "the first copy runs")
        with rig.worker(lease=1.0) as other:
            rig.publish("a")
            rig.publish("b")
            rig.until(lambda: bool(other.ran("b")), "a neighbour is handled meanwhile")
            rig.until(lambda: other.ended(Ended.BUSY) > 0, "the copy is found busy")
            time.sleep(0.5)
            asked = other.tape.order("claim", key=rig.key("a").hex())
            assert len(asked) <= 2, f"a busy copy is not asked for in a tight loop: {len(asked)} times in half a second"
            assert not other.ran("a"), "a busy copy does not run"
            assert rig.record("a").attempts == 1, "busy costs no attempt"
            go.set()
            rig.until(lambda: holder.ended(Ended.COMPLETED) == 1, "the holder completes")
            rig.until(
                lambda: other.ended(Ended.REPLAYED) + holder.ended(Ended.REPLAYED) == 1, "the copy is answered later"
            )
            acked_only_when_done(holder, other)
    assert len(holder.runs) == 1, "it ran once"
    assert rig.record("a").attempts == 1, "busy costs no attempt"
    rig.nothing_is_left()


@row
def a_failure_is_tried_again(rig: Rig) -> None:
    """I1, I12: a handler that raised: released, with its attempt counted, and run again after the backoff."""
    worker: Worker

    def business(body: Any) -> None:
        if len(worker.runs) == 1:
            raise ValueError("the first time")

    with rig.worker(business, backoff=Backoff(0.5, 0.5)) as worker:
        rig.publish("a")
        rig.until(lambda: worker.ended(Ended.COMPLETED) == 1, "it runs again, and completes")
        assert worker.ended(Ended.FAILED) == 1, "it failed once"
        assert [run.attempt for run in worker.runs] == [1, 2], "the failed attempt is counted"
        assert [entry.said for entry in worker.tape.of("wait")] == ["RELEASED"], "released before it waits"
        assert worker.runs[1].at - worker.runs[0].at >= 0.5, "not before its backoff"
        assert worker.runs[0].token < worker.runs[1].token, "tokens only grow"
        acked_only_when_done(worker)
    rig.nothing_is_left()


@row
def a_wait_is_confirmed_before_the_ack(rig: Rig) -> None:
    """I4: what cannot be put off is not acked: it is kept, and handled later."""
    worker: Worker
    refusals = 1

    def business(body: Any) -> None:
        if len(worker.runs) == 1:
            raise ValueError("the first time")

    def refuse_once(real: Callable[..., Any]) -> Callable[..., Any]:
        def broken(*args: Any, **kwargs: Any) -> Any:
            nonlocal refusals
            if refusals:
                refusals -= 1
                raise PublishUnknown("no confirm") if rig.broker.is_rabbitmq else ConnectionResetError("cut")
            return real(*args, **kwargs)

        return broken

    with rig.worker(business) as worker:
        if rig.broker.is_rabbitmq:
            rig.patch.setattr(IdempotentProducer, "forward", refuse_once(IdempotentProducer.forward))
        else:
            rig.until(worker.is_connected, "it is connected")
            kind = type(worker.consumer._session.channel)  # type: ignore[union-attr]
            rig.patch.setattr(kind, "basic_delay", refuse_once(kind.basic_delay))
        rig.publish("a")
        rig.until(lambda: worker.ended(Ended.COMPLETED) == 1, "what could not be put off is not lost")
        assert refusals == 0
        acked_only_when_done(worker)
    rig.nothing_is_left()


@row
def the_attempts_are_used_up(rig: Rig) -> None:
    """I1, I12: after max_attempts failures it is in the dead letter, as it was sent, with the story in headers."""

    def business(body: Any) -> None:
        raise ValueError("no such card")

    with rig.worker(business, max_attempts=3, backoff=Backoff(0.1, 0.1)) as worker:
        inner_msg_id = rig.publish("a", sum=1)
        rig.until(lambda: worker.ended(Ended.DEAD) == 1, "it is dead-lettered")
        assert [run.attempt for run in worker.runs] == [1, 2, 3], "it ran max_attempts times"
        (dead,) = rig.dead()
        body = dead.body.encode() if isinstance(dead.body, str) else bytes(dead.body)
        assert body == b'{  "id" :"a", "sum" : 1 }', "the body is untouched"
        assert dead.headers.get(INNER_MSG_ID) == inner_msg_id, "the id is untouched"
        told = {name: dead.headers.get(name) for name in (DEAD_REASON, DEAD_ERROR, DEAD_ATTEMPTS, DEAD_SCOPE)}
        assert told == {
            DEAD_REASON: "attempts", DEAD_ERROR: "ValueError: no such card", DEAD_ATTEMPTS: 3, DEAD_SCOPE: rig.scope,
        }, f"the headers say why: {told}"  # fmt: skip
        assert abs(dead.headers.get(DEAD_AT, 0) - time.time()) < 60, "the headers say when"
        assert dead.headers.get(ORIGIN_QUEUE) == rig.queue.name, "the headers say where it came from"
        assert not worker.tape.of("ack"), "only the dead letter acked it"
    rig.nothing_is_left()


@row
def a_permanent_error(rig: Rig) -> None:
    """I12: what no rerun can mend goes to the dead letter at once, whatever the bound is."""

    def business(body: Any) -> None:
        raise Permanent("never") if body["id"] == "a" else LookupError("gone")

    with rig.worker(business, permanent=(LookupError,), backoff=Backoff(0.05, 0.1)) as worker:
        rig.publish("a")
        rig.publish("b")
        rig.until(lambda: worker.ended(Ended.DEAD) == 2, "they are dead-lettered")
        assert len(worker.runs) == 2, "a permanent error is not tried again"
    assert [(reason_of(dead), dead.headers.get(DEAD_ATTEMPTS)) for dead in rig.dead(2)] == [("permanent", 1)] * 2
    rig.nothing_is_left()


@row
def a_dead_letter_is_confirmed_before_the_ack(rig: Rig) -> None:
    """I4: a dead letter that cannot be written: no ack, no second run; it is written when it can be."""
    refusals = 1
    real = settlement.move

    def refuse_once(*args: Any, **kwargs: Any) -> None:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise PublishUnknown("no confirm")
        real(*args, **kwargs)

    rig.patch.setattr(settlement, "move", refuse_once)
    rig.patch.setattr(settlement, "_DEAD_LETTER_AGAIN", 0.3)

    def business(body: Any) -> None:
        raise Permanent("never")

    with rig.worker(business) as worker:
        rig.publish("a")
        rig.until(lambda: worker.ended(Ended.HELD) == 1, "it says that it could not be written")
        rig.until(lambda: worker.ended(Ended.DEAD) == 1, "it is in the dead letter in the end")
        assert len(worker.runs) == 1, "it does not run again"
        assert not worker.tape.of("ack"), "only the dead letter acks it"
    assert len(rig.dead()) == 1, "it is in the dead letter in the end"
    rig.nothing_is_left()


@row
def a_conflict(rig: Rig) -> None:
    """I8: the same biz-id with another body is not a duplicate: it goes to the dead letter, and does not run."""
    begun, go = rig.gate(), rig.gate()

    def hold(body: Any) -> None:
        if body["id"] == "b":
            begun.set()
            go.wait(rig.patience)

    with rig.worker(hold, prefetch=1) as worker, rig.worker() as other:
        rig.publish("a", sum=1)
        rig.until(lambda: worker.ended(Ended.COMPLETED) + other.ended(Ended.COMPLETED) == 1, "the first is completed")
        rig.publish("a", sum=2)
        rig.until(lambda: worker.ended(Ended.DEAD) + other.ended(Ended.DEAD) == 1, "a conflict is dead-lettered")
        rig.publish("a", sum=1)
        rig.until(lambda: worker.ended(Ended.REPLAYED) + other.ended(Ended.REPLAYED) == 1, "the same body is a copy")
        assert len(worker.runs) + len(other.runs) == 1, "a conflict does not run"
    (dead,) = rig.dead()
    assert reason_of(dead) == "conflict", "the reason is the conflict"
    rig.nothing_is_left()


@row
def what_has_no_id_or_no_body(rig: Rig) -> None:
    """I1: what cannot be identified or decoded is neither run nor acked into nothing: the dead letter has it."""
    with rig.worker() as worker:
        rig.publish_raw(b'{"no": "id"}')
        rig.publish_raw(b"{ not json")
        rig.publish_raw(b'{"id": true}')
        rig.publish("good")
        rig.until(lambda: worker.ended(Ended.DEAD) == 3, "they are dead-lettered")
        rig.until(lambda: worker.ended(Ended.COMPLETED) == 1, "the good one is handled")
        assert [run.id for run in worker.runs] == ["good"], "nothing runs unguarded"
    dead = rig.dead(3)
    assert Counter(map(reason_of, dead)) == {"invalid": 3}, "the dead letter has them, with the reason"
    bodies = {message.body.encode() if isinstance(message.body, str) else bytes(message.body) for message in dead}
    assert bodies == {b'{"no": "id"}', b"{ not json", b'{"id": true}'}, "their bodies are untouched"
    rig.nothing_is_left()


# --- abandoned, too old ---------------------------------------------------------------------------------


@row
def abandoned_is_run_again(rig: Rig) -> None:
    """I1, I6: a worker died in the middle: by default it runs again, its dead attempt counted, with a larger token."""
    token = rig.dead_holder("a")
    with rig.worker() as worker:
        rig.publish("a")
        rig.until(lambda: worker.ended(Ended.COMPLETED) == 1, "it runs again")
        assert [run.attempt for run in worker.runs] == [2], "the attempt that died is counted"
        assert worker.runs[0].token > token, "tokens only grow"
        acked_only_when_done(worker)
    rig.nothing_is_left()


@row
def abandoned_is_quarantined(rig: Rig) -> None:
    """I2: a worker died in the middle, and a person is to decide: no copy runs before; resolved, redriven, one does."""
    rig.dead_holder("a")
    with rig.worker(on_abandoned="quarantine") as worker:
        rig.publish("a")
        rig.until(lambda: worker.ended(Ended.DEAD) == 1, "it is dead-lettered")
        assert rig.record("a").state is State.QUARANTINED, "the record is kept for a person"
        assert [entry.said for entry in worker.tape.of("dead_letter")] == ["QUARANTINED"], "the record first"
        rig.publish("a")
        rig.until(lambda: worker.ended(Ended.DEAD) == 2, "a copy is dead-lettered too")
        assert not worker.runs, "nothing runs before a person has decided"
        assert rig.store.resolve(rig.key("a"), completed=False, retention=600.0), "it still waits for a person"
        assert rig.redrive() == 2, "both are moved back"
        rig.until(lambda: worker.ended(Ended.COMPLETED) == 1, "a resolved one runs when it is redriven")
        rig.until(lambda: worker.ended(Ended.REPLAYED) == 1, "its copy is a replay")
        assert len(worker.runs) == 1, "it ran once"
        acked_only_when_done(worker)
    rig.nothing_is_left()


@row
def abandoned_is_probed(rig: Rig) -> None:
    """I2: a probe says whether the effect is there: yes completes without running, no runs."""
    asked: list[tuple[str, int]] = []

    def probe(record: Any) -> bool:
        asked.append((record.biz_id, record.attempts))
        return bool(record.biz_id == "there")

    rig.dead_holder("there")
    rig.dead_holder("missing")
    with rig.worker(on_abandoned=probe) as worker:
        rig.publish("there")
        rig.publish("missing")
        rig.until(lambda: worker.ended(Ended.COMPLETED) >= 1, "what is not there runs")
        rig.until(lambda: worker.ended(Ended.REPLAYED) == 1, "what is there is acked")
        assert [(run.id, run.attempt) for run in worker.runs] == [("missing", 2)], "what is there does not run"
        assert sorted(asked) == [("missing", 1), ("there", 1)], "the probe is asked once for each"
        assert rig.record("there").state is State.COMPLETED, "what is there is completed"
        acked_only_when_done(worker)
    rig.nothing_is_left()


@row
def a_handler_that_cannot_tell(rig: Rig) -> None:
    """I2: a handler that raises InDoubt may have done it: under quarantine a person decides, and nothing runs again."""

    def business(body: Any) -> None:
        raise InDoubt("no answer from the card system")

    with rig.worker(business, on_abandoned="quarantine", backoff=Backoff(0.1, 0.1)) as worker:
        rig.publish("a")
        rig.until(lambda: worker.ended(Ended.DEAD) == 1, "it is dead-lettered")
        assert len(worker.runs) == 1, "nothing runs before a person has decided"
        assert rig.record("a").state is State.QUARANTINED, "the record is kept for a person"
    assert reason_of(rig.dead()[0]) == "abandoned", "the reason is the doubt"
    rig.nothing_is_left()


@row
def told_to_stop_in_the_middle(rig: Rig) -> None:
    """I1, I12: a worker that is stopped in mid-handler settles nothing and ends its lease: another runs it at once."""

    def business(body: Any) -> None:
        raise Stopped

    with rig.worker(business) as first:
        rig.publish("a")
        rig.until(lambda: isinstance(first.error, Stopped), "the stop comes out of run")
        assert rig.record("a").state is State.IN_PROGRESS, "not as if nothing had been done"
    with rig.worker() as second:
        # Its lease is 20 s: whoever waited for that would not be done in time.
        rig.until(lambda: second.ended(Ended.COMPLETED) == 1, "another worker runs it at once", 10.0)
        assert [run.attempt for run in second.runs] == [2], "the broken attempt is counted"
    acked_only_when_done(first, second)
    rig.nothing_is_left()


@row
def too_old(rig: Rig) -> None:
    """I11: older than the retention, its record may be forgotten: not run but dead-lettered; a known one: a replay."""
    with rig.worker(retention=600.0) as worker:
        rig.publish("known")
        rig.until(lambda: worker.ended(Ended.COMPLETED) == 1, "a new one is handled")
        worker.handler.executor._wall = lambda: time.time() + 700.0
        rig.publish("old")
        rig.publish("known")
        rig.until(lambda: worker.ended(Ended.DEAD) == 1, "an old one is dead-lettered")
        rig.until(lambda: worker.ended(Ended.REPLAYED) == 1, "an old one with a record is a replay")
        assert [run.id for run in worker.runs] == ["known"], "an old one does not run"
    (dead,) = rig.dead()
    assert reason_of(dead) == "too old", "the reason is its age"
    rig.nothing_is_left()


# --- leases and tokens ----------------------------------------------------------------------------------


@row
def a_long_handler_keeps_its_lease(rig: Rig) -> None:
    """I2: a handler that runs for three leases is renewed meanwhile: nobody takes over, it runs once."""
    go = rig.gate()

    def business(body: Any) -> None:
        go.wait(2.0)
        current_execution().check()

    with rig.worker(business, prefetch=1, lease=0.6) as first, rig.worker(business, prefetch=1, lease=0.6) as second:
        rig.publish("a")
        rig.publish("a")
        rig.until(lambda: first.ended(Ended.COMPLETED) + second.ended(Ended.COMPLETED) == 1, "it completes")
        rig.until(lambda: first.ended(Ended.REPLAYED) + second.ended(Ended.REPLAYED) == 1, "its copy is a replay")
        assert len(first.runs) + len(second.runs) == 1, "nobody takes a renewed lease over"
        acked_only_when_done(first, second)
    rig.nothing_is_left()


@row
def a_late_completion_that_nobody_overtook(rig: Rig) -> None:
    """I6: the lease ran out, unrenewed, but nobody took over: the completion counts."""
    with rig.worker(lambda body: time.sleep(1.0), lease=0.4) as worker:
        worker.tape.deaf.add("renew")
        rig.publish("a")
        rig.until(lambda: worker.ended(Ended.COMPLETED) == 1, "a late completion counts if nobody took over")
        assert len(worker.runs) == 1, "it ran once"
        assert rig.record("a").state is State.COMPLETED, "it is completed"
        acked_only_when_done(worker)
    rig.nothing_is_left()


@row
def a_late_completion_that_was_overtaken(rig: Rig) -> None:
    """I2, I6: another worker took over: the old one's completion is refused and acks nothing; the token decides."""
    begun, first_go, second_go = rig.gate(), rig.gate(), rig.gate()

    def slow(body: Any) -> str:
        begun.set()
        first_go.wait(rig.patience)
        return "first"

    def newer(body: Any) -> str:
        second_go.wait(rig.patience)
        return "second"

    with rig.worker(slow, prefetch=1, lease=0.4) as first:
        first.tape.deaf.add("renew")
        rig.publish("a")
        rig.until(begun.is_set, "the first runs")
        with rig.worker(newer, prefetch=1, lease=0.4) as second:
            rig.publish("a")
            rig.until(lambda: bool(second.runs), "the lapsed lease is taken over")
            assert second.runs[0].token > first.runs[0].token, "tokens only grow"
            assert second.runs[0].attempt == 2, "the overtaken attempt is counted"
            first_go.set()
            rig.until(lambda: bool(first.tape.of("complete done", "wait")), "the first has ended")
            rig.until(lambda: first.ended(Ended.LEASE_LOST) == 1, "a superseded completion is refused")
            assert rig.record("a").state is State.IN_PROGRESS, "it changes nothing"
            second_go.set()
            rig.until(lambda: second.ended(Ended.COMPLETED) == 1, "the new holder completes")
            rig.until(
                lambda: first.ended(Ended.REPLAYED) + second.ended(Ended.REPLAYED) == 1, "the refused copy comes back"
            )
            acked_only_when_done(first, second)
    result = rig.record("a").result
    assert result is not None
    assert b"second" in result, "the new holder's result is kept"
    rig.nothing_is_left()


# --- replies that get lost ------------------------------------------------------------------------------


@row
def a_claim_whose_reply_was_lost(rig: Rig) -> None:
    """I15: asked again with its nonce, a claim is recognised: run once, one attempt, without waiting for the lease."""
    with rig.worker() as worker:
        worker.tape.lose["claim"].extend(["reply"])
        rig.publish("once")
        rig.until(lambda: worker.ended(Ended.COMPLETED) == 1, "a claim that was made is recognised", 5.0)
        assert not worker.ended(Ended.BUSY), "nobody stands in his own way"
        worker.tape.lose["claim"].extend(["reply", "reply"])  # so that it is given up, and in doubt
        rig.publish("twice")
        rig.until(lambda: worker.ended(Ended.COMPLETED) == 2, "a claim that was in doubt is recognised", 8.0)
        assert worker.ended(Ended.IN_DOUBT) == 1, "two lost replies are a doubt"
        assert not worker.ended(Ended.BUSY), "nobody stands in his own way"
        assert [(run.id, run.attempt) for run in worker.runs] == [("once", 1), ("twice", 1)], "one attempt for each"
        acked_only_when_done(worker)
    rig.nothing_is_left()


@row
def a_completion_whose_reply_was_lost(rig: Rig) -> None:
    """I4, I15: a completion without an answer is asked again with the same hold; only a clear yes is acked."""
    with rig.worker(lambda body: body["id"]) as worker:
        for trouble in ("reply", "request"):
            worker.tape.lose["complete"].append(trouble)
            rig.publish(trouble)
        rig.until(lambda: worker.ended(Ended.COMPLETED) == 2, "both are completed in the end")
        acked_only_when_done(worker)
        assert len(worker.tape.of("complete")) == 4, "each is asked again"
        assert [run.id for run in worker.runs] == ["reply", "request"], "each ran once"
        assert worker.consumer.endings == {Ended.COMPLETED: 2}, "no failure was made of it"
    rig.nothing_is_left()


@row
def in_doubt_neither_run_nor_acked(rig: Rig) -> None:
    """I9: while the store gives no answer nothing runs and nothing is acked; afterwards all is handled, once."""
    with rig.worker() as worker:
        worker.tape.deaf.update(("claim", "renew", "complete", "release"))
        for number in range(3):
            rig.publish(str(number))
        rig.until(lambda: worker.ended(Ended.IN_DOUBT) >= 3 or bool(worker.runs), "they are in doubt")
        assert not worker.runs, "nothing runs in doubt"
        assert not worker.tape.of("ack"), "nothing is acked in doubt"
        assert rig.broker.is_empty(rig.broker.dead), "nothing is given up for a doubt"
        worker.tape.deaf.clear()
        rig.until(lambda: worker.ended(Ended.COMPLETED) == 3, "all are handled afterwards")
        assert sorted((run.id, run.attempt) for run in worker.runs) == [("0", 1), ("1", 1), ("2", 1)], "once each"
        acked_only_when_done(worker)
    rig.nothing_is_left()


# --- manual, windows ------------------------------------------------------------------------------------


@row
def manual_completion(rig: Rig) -> None:
    """I4: manual=True: returning completes and acks nothing, the lease lives on; `complete` completes, then acks;
    `fail` releases, and it runs again."""
    open_ones: dict[str, Any] = {}

    def business(body: Any) -> None:
        open_ones[body["id"]] = current_execution()

    with rig.worker(business, manual=True, lease=0.6) as worker:
        rig.publish("done")
        rig.publish("failed")
        rig.until(lambda: len(open_ones) == 2, "both have started")
        rig.until(lambda: len(worker.tape.of("handler done")) == 2, "both have returned")
        time.sleep(1.3)  # two leases
        assert not worker.tape.of("ack"), "returning acks nothing"
        states = {rig.record(name).state for name in open_ones}
        assert states == {State.IN_PROGRESS}, "returning completes nothing"
        assert rig.record("done").lease_left > 0, "the lease is renewed meanwhile"
        first = open_ones["failed"]
        open_ones["done"].complete("paid")
        first.fail("the bank says no")
        rig.until(lambda: len(worker.tape.of("ack")) == 1, "complete acks")
        assert b"paid" in (rig.record("done").result or b""), "with its result"
        rig.until(lambda: open_ones["failed"] is not first, "fail lets it run again")
        open_ones["failed"].complete()
        rig.until(lambda: len(worker.tape.of("ack done")) == 2, "complete acks the second one too")
        assert [(run.id, run.attempt) for run in worker.runs][-1] == ("failed", 2), "the failure is counted"
        acked_only_when_done(worker)
    rig.nothing_is_left()


@row
def a_reservation_is_given_back(rig: Rig) -> None:
    """I12: claims made ahead of their turn, whose handlers never start, cost no attempt and block nobody."""
    slow = rig.gate()
    first: Worker

    def business(body: Any) -> None:
        if slow.is_set():
            first.consumer._stopping.requested = True  # as `stop` does
            time.sleep(0.05)

    with rig.worker(business, prefetch=30, max_attempts=1) as first:
        for number in range(20):  # so that it takes many at a time
            rig.publish(f"warm{number}")
        rig.until(lambda: first.ended(Ended.COMPLETED) == 20, "the first ones are handled")
    slow.set()
    ids = [str(number) for number in range(20)]
    for biz_id in ids:
        rig.publish(biz_id)
    rig.patch.setattr(pace, "_FIRST_SECONDS_EACH", 1e-4)
    with rig.worker(business, prefetch=30, max_attempts=1) as first:
        rig.until(lambda: not first.thread.is_alive(), "it stops")
        started = {run.id for run in first.runs}
        assert 0 < len(started) < 20, f"some never started: {len(started)}"
    slow.clear()
    with rig.worker(prefetch=30, max_attempts=1) as second:
        # The lease is 20 s: a reservation that was kept would make its message wait for that.
        rig.until(lambda: second.ended(Ended.COMPLETED) == 20 - len(started), "what never started blocks nobody", 10.0)
        assert {run.attempt for run in second.runs} == {1}, "a reservation costs no attempt"
        assert not second.ended(Ended.BUSY), "what never started blocks nobody"
    assert {run.id for run in second.runs} | started == set(ids), "all are handled"
    assert rig.broker.is_empty(rig.broker.dead), "a reservation costs no attempt"
    rig.nothing_is_left()


@row
def one_failure_touches_no_other(rig: Rig) -> None:
    """I1: failing, permanently failing, conflicting, busy and invalid ones in a window: the rest is handled."""
    worker: Worker
    rig.store.claim(_claim_of(rig, "busy"))

    def business(body: Any) -> None:
        if body["id"] == "fails" and len(worker.ran("fails")) == 1:
            raise ValueError("the first time")
        if body["id"] == "dies":
            raise Permanent("never")

    for name in ("0", "fails", "1", "dies", "2", "busy", "3"):
        rig.publish(name)
    rig.publish("0", sum=2)
    rig.publish_raw(b"{ not json")
    for number in range(4, 8):
        rig.publish(str(number))
    with rig.worker(business, prefetch=30) as worker:
        good = [str(number) for number in range(8)] + ["fails"]
        rig.until(lambda: worker.ended(Ended.COMPLETED) == 9, "the good ones are handled")
        rig.until(lambda: worker.ended(Ended.DEAD) == 3, "the bad ones are dead-lettered")
        runs = Counter(run.id for run in worker.runs)
        assert runs == {**dict.fromkeys(good, 1), "fails": 2, "dies": 1}, f"each as often as it should: {runs}"
        assert {run.attempt for run in worker.runs if run.id.isdigit()} == {1}, "no neighbour was tried again"
        acked_only_when_done(worker)
    assert Counter(map(reason_of, rig.dead(3))) == {"permanent": 1, "conflict": 1, "invalid": 1}


def _claim_of(rig: Rig, biz_id: str) -> ClaimRequest:
    return ClaimRequest(rig.key(biz_id), os.urandom(16), 30.0, 600.0)
