"""Claim, run, complete, then ack: the life of one message's work, without any broker and without any database.

What goes in is `Work`: an identity, a function to run, and a `Settlement` that knows how to answer the broker.
Every outside step goes through a named hook (`hooks.py`). What can go wrong has one answer each:

=======================  ====================================================================================
claim's outcome unknown   nothing runs, nothing is acked; the message comes back later (I9)
completed before          acked; the stored result is returned (I8)
busy                      comes back when the holder's lease may have lapsed; costs no attempt (I12)
conflict                  dead letter
older than the retention  dead letter, unless its record is there to tell (I11)
abandoned                 run again, quarantined or probed, see `abandoned.py`
attempts used up          dead letter
handler raised            released with its attempt counted, comes back after the backoff; permanent: dead letter;
                          in doubt: as if abandoned
complete's reply lost     asked again with the same hold, which tells the outcome (I15)
complete refused          somebody took over: not acked, comes back, and then finds their record (I6)
=======================  ====================================================================================
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from .abandoned import AbandonedRecord, note_of
from .claims import Claim, Claims
from .errors import InDoubt, StoreError
from .events import Event, EventKind, Notify
from .execution import LeasedExecution, running
from .failing import Failing
from .finishing import UNDER_WAY, Finish, Finishing, Streams
from .hooks import ACK, COMPLETE, DEAD_LETTER, HANDLER, PROBE, QUARANTINE, RENEW, WAIT, Step, direct
from .lease import LeaseKeeper, keeper_for
from .model import Busy, Claimed, ClaimRequest, Completed, Completion, Conflict, Hold, Quarantined, Reason
from .policy import Policy
from .results import MAX_RESULT_BYTES, decode_result, encode_result, last_line
from .store import QuarantineStore, Store
from .work import Ended, Ending, Passing, Settlement, Work

__all__ = ["Executor"]

log = logging.getLogger(__name__)

#: How many messages whose dead letter could not be written are remembered with the reason.
_MOST_UNMOVED: Final = 10_000


class Executor:
    """Guards the work of one scope. Safe for threads.

    store: gives the store, opened at its first call. manual: returning is not success, see `LeasedExecution.complete`.
    notify: told of every event. max_result: bytes of a result's JSON that are stored at most.
    streaming: a window's completions are not waited for one by one (`finishing.py`), where the store can do that.
    passing: says of what a handler raised whether somebody else answers for it, and how its claim ends then.
    clock, wall, sleep, draw, step: for tests; monotonic seconds, seconds since the epoch, time.sleep, random numbers in
    [0, 1), the named hooks.
    """

    def __init__(
        self,
        store: Callable[[], Store],
        policy: Policy,
        *,
        keeper: LeaseKeeper | None = None,
        manual: bool = False,
        notify: Notify | None = None,
        max_result: int = MAX_RESULT_BYTES,
        passing: Callable[[BaseException], Passing] | None = None,
        streaming: bool = True,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        draw: Callable[[], float] = random.random,
        step: Step = direct,
    ) -> None:
        self.policy = policy
        if keeper is None:
            shared = step is direct and clock is time.monotonic
            keeper = keeper_for(store) if shared else LeaseKeeper(store, clock=clock, step=step)
        self._keeper = keeper
        self._claims = Claims(store, policy, clock, step)
        self._manual = manual
        self._notify = notify
        self._max_result = max_result
        self._passing = passing
        self._streaming = streaming
        self._clock = clock
        self._sleep = sleep
        self._draw = draw
        self._step = step
        self._wall = wall
        self._failing = Failing(policy, draw, lambda: self._wall())
        self._most_attempts = policy.most_attempts
        self._streams = Streams()
        self._doubtful: tuple[type[BaseException], ...] = (InDoubt, *policy.in_doubt)
        #: Why messages are to die whose dead letter could not be written yet: the store keeps only that they are.
        self._unmoved: dict[bytes, tuple[Reason, str, int]] = {}

    def handle(self, work: Work) -> Ending:
        """Claim singly and handle one delivery; settles it, whatever happens, unless the broker's connection fails."""
        return self._dispatch(work, self._look(work), self.finish)

    def handle_window(self, works: Sequence[Work]) -> list[Ending]:
        """Handle deliveries that are already here, claiming first deliveries together in one round trip.

        Such a claim is a reservation: it counts no attempt before its handler starts, and is given back if the
        handler never does. Redelivered messages and second copies of one key are claimed singly, in their turn: where
        the store can carry it, along with the completion before. Once the store gives no clear answer, the rest of the
        window is put off without asking it again for each.
        """
        claims = self._claims
        ahead = claims.together(works)
        streamed = self._streamed() if len(works) > 1 else None
        finish = self.finish if streamed is None else streamed.begin
        endings: list[Ending] = []
        silent = False
        try:
            for index, work in enumerate(works):
                if streamed is not None and not silent:
                    # Acks what is durable, which may raise: until then this one's claim is among those to give back.
                    streamed.make_room(work.key)
                    silent = streamed.in_doubt
                claim = ahead.pop(index, None)
                if silent:
                    if claim is not None and claim.request.reserve:
                        claims.remember(claim.request)
                    elif claim is not None:  # it went along, so its attempt is counted
                        claims.let_go(claim)
                    endings.append(self._in_doubt(work))
                    continue
                if claim is None:
                    claim = self._look(work)
                elif claim.outcome is None or claims.is_late(claim):
                    # Its reply was lost, or neighbours took long: asking again with the same nonce tells whether
                    # it is ours.
                    claim = claims.singly(work, claim.request)
                if streamed is not None:
                    claimed_in_turn = index + 1 < len(works) and index + 1 not in ahead
                    streamed.next_up = works[index + 1] if claimed_in_turn else None
                ending = self._dispatch(work, claim, finish)
                if streamed is not None and (claim := streamed.claimed()) is not None:
                    ahead[index + 1] = claim
                silent = ending.how is Ended.IN_DOUBT and bool(claims.silence)
                endings.append(ending)
            if streamed is not None:
                streamed.settle()
        except BaseException:
            for claim in ahead.values():
                claims.let_go(claim)
            if streamed is not None:
                streamed.leave()
                if (claim := streamed.claimed()) is not None:
                    claims.let_go(claim)
            raise
        if streamed is not None:
            return [  # by place: going through the works may end with an error
                streamed.ended(works[index]) if ending is UNDER_WAY else ending for index, ending in enumerate(endings)
            ]
        return endings

    def _streamed(self) -> Finishing | None:
        """For a window: its completions, if the store can take them without being waited for."""
        if self._manual or not self._streaming:
            return None
        try:
            stream = self._streams.of(self._claims.store())
        except StoreError:
            return None  # claiming will meet the same error, and answers it
        if stream is None:
            return None
        return Finishing(
            *stream,
            completion=self._completion,
            conclude=self._conclude,
            finish=self.finish,
            request=self._request_along,
            clock=self._clock,
            step=self._step,
        )

    def _request_along(self, work: Work) -> ClaimRequest | None:
        """For a claim that goes along with the completion before it. None while the store gives no clear answer."""
        claims = self._claims
        return None if claims.silence else claims.request(work, reserve=self._failing.is_too_old(work))

    def _completion(self, execution: LeasedExecution, value: Any) -> Completion:
        self._keeper.remove(execution)  # before, so that a renewal which meets the completed record is no lost lease
        result = encode_result(value, execution.scope, self._max_result)
        return Completion(execution.hold, result, execution.retention)

    def _conclude(self, execution: LeasedExecution, value: Any) -> Ending:
        """Its completion is durable: note it, and ack."""
        with execution.lock:
            if execution.completed is None:
                execution.completed = Ending(Ended.COMPLETED, value)
                self._tell(EventKind.COMPLETED, execution.work, execution)
            return self._ack(execution, execution.completed)

    def _ack(self, execution: LeasedExecution, completed: Ending) -> Ending:
        self._step(ACK, execution.work.settle.ack)
        execution.ending = completed
        return completed

    def refuse(self, scope: str, settle: Settlement, reason: Reason, error: str) -> Ending:
        """Dead-letter a message that has no usable identity, and therefore no record."""
        moved = self._step(DEAD_LETTER, settle.dead_letter, reason, error, 0)
        if moved and self._notify is not None:
            self._notify(Event(EventKind.DEAD_LETTERED, scope, reason=reason.value))
        return Ending(Ended.DEAD if moved else Ended.HELD)

    # --- what a claim says ----------------------------------------------------------------------------

    def _look(self, work: Work) -> Claim:
        """Claim singly. What may have been done and forgotten counts no attempt before its record was looked at.

        Else a worker that dies before the dead letter leaves a counted attempt, by which the next one could not tell
        the message from one that has only failed before, and would run it.
        """
        return self._claims.singly(work, reserve=self._failing.is_too_old(work))

    def _dispatch(self, work: Work, claim: Claim, finish: Finish) -> Ending:
        outcome = claim.outcome
        if isinstance(outcome, Claimed):
            return self._claimed(work, claim, outcome, finish)
        if outcome is None:
            return self._in_doubt(work)
        if isinstance(outcome, Completed):
            self._step(ACK, work.settle.ack)
            self._tell(EventKind.REPLAYED, work)
            return Ending(Ended.REPLAYED, decode_result(outcome.result))
        if isinstance(outcome, Busy):
            self._tell(EventKind.BUSY, work)
            return self._wait(work, Ended.BUSY, outcome.retry_after)
        if isinstance(outcome, Quarantined):
            return self._bury(work, None, Reason.ABANDONED, "the record is in quarantine: resolve it, then redrive")
        assert isinstance(outcome, Conflict)
        self._tell(EventKind.CONFLICTED, work)
        return self._bury(work, None, Reason.CONFLICT, f"the biz-id is {outcome.state.name.lower()} with another body")

    def _claimed(self, work: Work, claim: Claim, outcome: Claimed, finish: Finish) -> Ending:
        hold, attempt = claim.hold, outcome.attempt
        execution = LeasedExecution(
            work,
            attempt,
            hold,
            self,
            lease=self.policy.lease,
            retention=self.policy.retention,
            claimed_at=claim.asked_at,
            clock=self._clock,
        )
        if self._notify is not None:
            execution.on_lost = self._on_lease_lost
        if outcome.taken_over:
            self._tell(EventKind.ABANDONED, work, execution)
            if self.policy.on_abandoned != "rerun":
                if claim.request.reserve:  # as below: what is decided now may start it
                    self._claims.give_back(claim)
                    return self._dispatch(work, self._claims.singly(work), finish)
                return self._abandoned(work, execution, finish)
        elif attempt == 1 and self._failing.is_too_old(work):
            # No record is there, or one that was never started: it may be new, or done and forgotten.
            return self._bury(work, hold, Reason.TOO_OLD, "older than the retention, so it may have been done before")
        if attempt > self._most_attempts:
            known = self._unmoved.pop(work.key, None) or (Reason.ATTEMPTS, "the attempts are used up", attempt - 1)
            return self._bury(work, hold, *known)
        if claim.request.reserve and (attempt > 1 or work.redelivered):
            # It has failed before, or it came back after its reservation was in doubt: no first delivery. On a
            # reservation a run whose worker dies is not counted; one such run is what the bound has room for (I12).
            self._claims.give_back(claim)
            return self._dispatch(work, self._claims.singly(work), finish)
        return self._run(work, execution, finish)

    def _abandoned(self, work: Work, execution: LeasedExecution, finish: Finish) -> Ending:
        probe = self.policy.on_abandoned
        if not callable(probe):
            return self._quarantine(work, execution)
        asked = AbandonedRecord(
            scope=work.scope,
            biz_id=work.biz_id,
            idempotency_key=execution.idempotency_key,
            inner_msg_id=work.inner_msg_id,
            attempts=execution.attempt - 1,
            token=execution.token,
        )
        self._keeper.add(execution)
        try:
            done = self._step(PROBE, probe, asked)
            if not isinstance(done, bool):
                raise TypeError(f"a probe must say True (done) or False (not done), not {type(done).__name__}")
        except Exception as error:  # as with a handler, whatever it raises is an outcome
            self._keeper.remove(execution)
            log.warning("the probe of scope %s raised %s", work.scope, type(error).__name__, exc_info=error)
            if execution.attempt < self.policy.max_attempts:
                self._claims.release(execution.hold, execution.attempt, abandoned=True)
                self._tell(EventKind.RELEASED, work, execution, type(error).__name__)
                return self._wait(work, Ended.FAILED, self.policy.backoff.delay(execution.attempt, self._draw))
            return self._quarantine(work, execution)
        except BaseException:
            self._keeper.remove(execution)
            self._claims.release(execution.hold, execution.attempt - 1, abandoned=True)
            raise
        if done:
            ending = self.finish(execution, None)
            return Ending(Ended.REPLAYED) if ending.how is Ended.COMPLETED else ending
        if execution.attempt > self._most_attempts:
            self._keeper.remove(execution)
            return self._bury(work, execution.hold, Reason.ATTEMPTS, "the attempts are used up", execution.attempt - 1)
        return self._run(work, execution, finish)

    def _quarantine(self, work: Work, execution: LeasedExecution) -> Ending:
        attempts = execution.attempt - 1
        try:
            store = self._claims.store()
            # The record first: if the worker dies before the message is moved, the next one meets it and moves the
            # message. The other way round it would be moved twice.
            if isinstance(store, QuarantineStore):
                note = note_of(work, attempts)
                if not self._step(QUARANTINE, store.quarantine, execution.hold, note=note):
                    return self._lost(work, execution)
                self._tell(EventKind.QUARANTINED, work, execution)
            else:
                self._claims.release(execution.hold, attempts, abandoned=True)
        except StoreError as error:
            log.warning("could not quarantine a record of scope %s: %s", work.scope, error)
            return self._in_doubt(work)
        return self._bury(work, None, Reason.ABANDONED, "a worker died in the middle of the handler", attempts)

    # --- running -------------------------------------------------------------------------------------

    def _run(self, work: Work, execution: LeasedExecution, finish: Finish) -> Ending:
        self._tell(EventKind.CLAIMED, work, execution)
        self._keeper.add(execution)
        context = running.set(execution)
        value = None
        try:
            value = self._step(HANDLER, work.run)
        except Exception as error:  # whatever a handler raises is an outcome, not the end of the consumer
            with execution.lock:
                if execution.ending is None and execution.completed is None:
                    return self.fail(execution, error)
            log.exception("a handler in scope %s raised after it had ended its execution, which stands", work.scope)
        except BaseException:
            # The process is told to stop. The message is not settled: closing the channel brings it back.
            with execution.lock:
                if execution.ending is None and execution.completed is None:
                    self._keeper.remove(execution)
                    execution.ending = Ending(Ended.FAILED)
                    self._claims.release(execution.hold, execution.attempt, abandoned=True)
            raise
        finally:
            running.reset(context)
        if execution.ending is not None:
            return execution.ending
        if self._manual and execution.completed is None:
            return Ending(Ended.OPEN)  # its lease is renewed until the business calls `complete` or `fail`
        return finish(execution, value)

    def finish(self, execution: LeasedExecution, value: Any, /) -> Ending:
        """Complete, then ack. Repeats the completion for a lease's time if its outcome is unknown.

        Called again after the ack could not be sent, it only acks.
        """
        with execution.lock:
            if execution.completed is None:
                ending = self._complete(execution.work, execution, value)
                if ending.how is not Ended.COMPLETED:
                    execution.ending = ending
                    return ending
                execution.completed = ending
                self._tell(EventKind.COMPLETED, execution.work, execution)
            return self._ack(execution, execution.completed)

    def _complete(self, work: Work, execution: LeasedExecution, value: Any) -> Ending:
        hold = execution.hold
        # Before completing, so that a renewal that meets the completed record is not taken for a lost lease.
        self._keeper.remove(execution)
        result = encode_result(value, work.scope, self._max_result)
        give_up = self._clock() + self.policy.lease
        pause = 0.05
        while True:
            try:
                store = self._claims.store()
                ours = self._step(COMPLETE, store.complete, hold, result=result, retention=execution.retention)
                break
            except StoreError as error:
                if self._clock() + pause >= give_up:
                    log.error("completion in scope %s is in doubt after its handler succeeded: %s", work.scope, error)
                    self._claims.silence.begin()
                    return self._in_doubt(work)
            self._sleep(pause)
            pause = min(pause * 2, 1.0)
        if ours:
            return Ending(Ended.COMPLETED, value)
        log.error(
            "a handler in scope %s succeeded after its lease was lost (record %s, token %d): fence its resource",
            work.scope,
            execution.idempotency_key,
            hold.token,
        )
        return self._lost(work, execution)

    def fail(self, execution: LeasedExecution, error: BaseException, /) -> Ending:
        """The handler raised, or said that the business failed: release and put off, or dead-letter."""
        work, attempt = execution.work, execution.attempt
        self._keeper.remove(execution)
        execution.ending = Ending(Ended.FAILED)  # from here on a late `complete` changes nothing
        passing = None if self._passing is None else self._passing(error)
        if passing is not None:
            execution.ending = self._pass(execution, error, passing)
            return execution.ending
        most = self.policy.attempts_for(error)
        log.warning(
            "handler in scope %s raised %s at attempt %d of %d",
            work.scope,
            type(error).__name__,
            attempt,
            most,
            exc_info=error,
        )
        reason = self._failing.reason(error, attempt)
        doubtful = reason is not Reason.PERMANENT and isinstance(error, self._doubtful)
        decided_later = doubtful and self.policy.on_abandoned != "rerun"
        if reason is not None and not decided_later:
            execution.ending = self._give_up(work, execution, error, reason)
            return execution.ending
        if self._claims.release(execution.hold, attempt, abandoned=doubtful) is False:
            execution.on_lease_lost(taken=True)
        else:
            self._tell(EventKind.RELEASED, work, execution, type(error).__name__)
        execution.ending = self._wait(work, Ended.FAILED, self._failing.delay(error, attempt))
        return execution.ending

    def _pass(self, execution: LeasedExecution, error: BaseException, how: Passing) -> Ending:
        """End the claim of what somebody else answers for. Only attempts whose worker died stay counted."""
        abandoned = how == "abandoned"
        attempts = execution.attempt if abandoned else execution.attempt - 1
        if self._claims.release(execution.hold, attempts, abandoned=abandoned) is False:
            execution.on_lease_lost(taken=True)
        else:
            self._tell(EventKind.RELEASED, execution.work, execution, type(error).__name__)
        return Ending(Ended.PASSED, error)

    def _give_up(self, work: Work, execution: LeasedExecution, error: BaseException, reason: Reason) -> Ending:
        """Dead-letter what failed, if it is still ours: another one may be running it, or have done it."""
        policy = self.policy
        lasting = {"lease": policy.lease, "retention": policy.retention}
        try:
            ours = self._step(RENEW, self._claims.store().renew, execution.hold, **lasting)
        except StoreError:
            return self._in_doubt(work)
        if not ours:
            return self._lost(work, execution)
        return self._bury(work, execution.hold, reason, last_line(error), execution.attempt, execution)

    # --- settling ------------------------------------------------------------------------------------

    def _wait(self, work: Work, how: Ended, delay: float) -> Ending:
        self._step(WAIT, work.settle.wait, self._failing.spread(how, delay))
        return Ending(how)

    def _in_doubt(self, work: Work) -> Ending:
        self._tell(EventKind.STORE_UNAVAILABLE, work)
        return self._wait(work, Ended.IN_DOUBT, self._claims.silence.pause())

    def _lost(self, work: Work, execution: LeasedExecution) -> Ending:
        execution.on_lease_lost(taken=True)  # told once, whoever finds out
        return self._wait(work, Ended.LEASE_LOST, self.policy.busy_delay)

    def _bury(
        self,
        work: Work,
        hold: Hold | None,
        reason: Reason,
        error: str,
        attempts: int = 0,
        execution: LeasedExecution | None = None,
    ) -> Ending:
        moved = self._step(DEAD_LETTER, work.settle.dead_letter, reason, error, attempts)
        if moved:
            self._unmoved.pop(work.key, None)
            self._tell(EventKind.DEAD_LETTERED, work, execution, reason.value)
        if hold is not None:
            if not moved and len(self._unmoved) < _MOST_UNMOVED:
                self._unmoved[work.key] = reason, error, attempts
            # What could not be moved must not run again either, when it is looked at again.
            self._claims.release(hold, attempts if moved else max(attempts, self.policy.most_attempts))
        return Ending(Ended.DEAD if moved else Ended.HELD)

    # --- telling -------------------------------------------------------------------------------------

    def _on_lease_lost(self, execution: LeasedExecution) -> None:
        self._tell(EventKind.LEASE_LOST, execution.work, execution)

    def _tell(self, kind: EventKind, work: Work, execution: LeasedExecution | None = None, reason: str = "") -> None:
        if self._notify is None:
            return
        self._notify(
            Event(
                kind,
                work.scope,
                record=work.key.hex(),
                attempt=0 if execution is None else execution.attempt,
                token=0 if execution is None else execution.token,
                reason=reason,
                seconds=0.0 if execution is None else self._clock() - execution.started_at,
            )
        )
