"""Claim, run, complete, then ack: the life of one message's work, without any broker and without any database.

What goes in is `Work`: an identity, a function to run, and a `Settlement` that knows how to answer the broker.
Every outside step goes through a named hook (`hooks.py`). What can go wrong has one answer each:

=======================  ====================================================================================
claim's outcome unknown   nothing runs, nothing is acked; the message comes back later (I9)
completed before          acked; the stored result is returned (I8)
busy                      comes back when the holder's lease may have lapsed; costs no attempt (I12)
conflict                  dead letter
attempts used up          dead letter
handler raised            released with its attempt counted, comes back after the backoff; permanent: dead letter
complete's reply lost     asked again with the same hold, which tells the outcome (I15)
complete refused          somebody took over: not acked, comes back, and then finds their record (I6)
=======================  ====================================================================================
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
import traceback
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Protocol

from .errors import HandlerAcknowledged, NoExecution, Permanent, StoreError
from .hooks import ACK, CLAIM, COMPLETE, DEAD_LETTER, HANDLER, RELEASE, WAIT, Step, direct
from .lease import LeaseKeeper
from .model import NONCE_BYTES, Busy, Claimed, ClaimOutcome, ClaimRequest, Completed, Conflict, Hold, Reason
from .policy import Policy
from .store import BatchStore, Store

__all__ = ["Ended", "Ending", "Execution", "Executor", "Settlement", "Work", "current_execution"]

log = logging.getLogger(__name__)

#: A result whose JSON is longer is not stored; its duplicates then get None.
MAX_RESULT_BYTES: Final = 65_536

#: A store error is answered by asking again: so many times at the claim, and until the lease is over at completion.
_CLAIM_TRIES: Final = 2


class Settlement(Protocol):
    """How one delivery is answered. Each method may raise the broker's connection errors; then nothing is settled."""

    def ack(self) -> None:
        """The message is done: the broker may forget it."""
        ...

    def wait(self, delay: float) -> None:
        """Let the message come back no sooner than `delay` seconds from now, kept by the broker, as one copy."""
        ...

    def dead_letter(self, reason: Reason, error: str, attempts: int) -> None:
        """Put the message into the dead letter; once that is confirmed, ack it."""
        ...


@dataclass(slots=True, eq=False)
class Work:
    """One delivery, as the core sees it.

    redelivered: it may have been delivered before. It must be True for whatever the broker delivers again, and for
    what comes back after `Settlement.wait`, even as a new message: a first delivery may run on a reservation, which
    counts no attempt if its worker dies, so a message that looked like one each time could kill workers for ever.
    """

    scope: str
    biz_id: str = field(repr=False)  # neither the id nor the body, which `run` may show, belongs into a log
    key: bytes
    run: Callable[[], Any] = field(repr=False)
    settle: Settlement
    fingerprint: bytes | None = None
    inner_msg_id: str | None = None
    redelivered: bool = False
    redrive: int = 0


class Ended(str, Enum):
    """How the handling of one delivery ended."""

    COMPLETED = "completed"
    REPLAYED = "replayed"
    BUSY = "busy"
    FAILED = "failed"
    DEAD = "dead"
    IN_DOUBT = "in doubt"
    LEASE_LOST = "lease lost"
    OPEN = "open"
    """manual=True, and the handler returned before the business had succeeded."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How it ended, with the handler's result or the stored one."""

    how: Ended
    value: Any = None


class Execution:
    """One run of a handler: what it may know of itself. Got with `current_execution()`."""

    __slots__ = (
        "_completed",
        "_ending",
        "_executor",
        "_lost",
        "_work",
        "attempt",
        "hold",
        "lease",
        "renewed_at",
        "retention",
    )

    def __init__(self, executor: Executor, work: Work, hold: Hold, attempt: int, claimed_at: float) -> None:
        self._executor = executor
        self._work = work
        self._lost = False
        self._completed: Ending | None = None  # durable; what is still to come is the ack
        self._ending: Ending | None = None  # settled
        self.hold = hold
        self.attempt = attempt
        self.lease = executor.policy.lease
        self.retention = executor.policy.retention
        self.renewed_at = claimed_at

    @property
    def scope(self) -> str:
        """The business scenario."""
        return self._work.scope

    @property
    def biz_id(self) -> str:
        """The canonical text of the biz-id."""
        return self._work.biz_id

    @property
    def inner_msg_id(self) -> str | None:
        """The bus's own id of this message, if its producer stamped one."""
        return self._work.inner_msg_id

    @property
    def token(self) -> int:
        """The fencing token: larger than that of every earlier claim of this biz-id. Let the resource compare it."""
        return self.hold.token

    @property
    def idempotency_key(self) -> str:
        """A key for a downstream service that dedupes: the same on every attempt, another for every (scope, biz-id)."""
        return self.hold.key.hex()

    @property
    def lease_lost(self) -> bool:
        """True once it is known that another claim took over. False proves nothing: the token decides."""
        return self._lost

    def on_lease_lost(self) -> None:
        """For the keeper of leases."""
        self._lost = True
        log.warning("lease lost in scope %s (record %s): another claim took over", self.scope, self.idempotency_key)

    def complete(self, result: Any = None) -> bool:
        """With `manual=True`: the business has succeeded. Completes durably, then acks.

        False: ownership was lost, or the store's answer is in doubt; the message is not acked and comes back.
        Call it from the thread that consumes. A second call changes nothing and answers as the first did.
        """
        if self._ending is None:
            self._executor.finish(self, result)
        return self._ending is not None and self._ending.how is Ended.COMPLETED


_current: ContextVar[Execution | None] = ContextVar("idempotent_bus_execution", default=None)


def current_execution() -> Execution:
    """The execution of the guarded handler that is running here. Raises NoExecution outside one."""
    execution = _current.get()
    if execution is None:
        raise NoExecution("current_execution() works only inside a guarded handler, in its own thread or context")
    return execution


class Executor:
    """Guards the work of one scope. Safe for threads.

    store: gives the store, opened at its first call. manual: returning is not success, see `Execution.complete`.
    clock, sleep, draw, step: for tests; monotonic seconds, time.sleep, random numbers in [0, 1), the named hooks.
    """

    def __init__(
        self,
        store: Callable[[], Store],
        policy: Policy,
        *,
        keeper: LeaseKeeper | None = None,
        manual: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        draw: Callable[[], float] = random.random,
        step: Step = direct,
    ) -> None:
        self.policy = policy
        self._store = store
        self._keeper = keeper if keeper is not None else LeaseKeeper(store, clock=clock, step=step)
        self._manual = manual
        self._clock = clock
        self._sleep = sleep
        self._draw = draw
        self._step = step
        self._permanent: tuple[type[BaseException], ...] = (Permanent, HandlerAcknowledged, *policy.permanent)

    def handle(self, work: Work) -> Ending:
        """Claim singly and handle one delivery; settles it, whatever happens, unless the broker's connection fails."""
        return self._claim_and_handle(work, self._request(work))

    def handle_window(self, works: Sequence[Work]) -> list[Ending]:
        """Handle deliveries that are already here, claiming first deliveries together in one round trip.

        Such a claim is a reservation: it counts no attempt before its handler starts, and is given back if the
        handler never does. Redelivered messages and second copies of one key are claimed singly, in their turn.
        """
        ahead = self._reserve(works)
        endings: list[Ending] = []
        try:
            for index, work in enumerate(works):
                reserved = ahead.pop(index, None)
                if reserved is None:
                    endings.append(self._claim_and_handle(work, self._request(work)))
                    continue
                request, outcome, claimed_at = reserved
                if outcome is None or (isinstance(outcome, Claimed) and self._is_late(claimed_at)):
                    # Its reply was lost, or neighbours took long: asking again with the same nonce tells whether
                    # it is ours.
                    endings.append(self._claim_and_handle(work, request))
                else:
                    endings.append(self._dispatch(work, request, outcome, claimed_at))
        except BaseException:
            self._give_back(ahead)
            raise
        return endings

    # --- claiming ------------------------------------------------------------------------------------

    def _request(self, work: Work, *, reserve: bool = False) -> ClaimRequest:
        return ClaimRequest(
            work.key,
            os.urandom(NONCE_BYTES),
            self.policy.lease,
            self.policy.retention,
            work.fingerprint,
            work.redrive,
            reserve,
        )

    def _reserve(self, works: Sequence[Work]) -> dict[int, _Reserved]:
        if len(works) < 2:
            return {}
        store = self._store_or_none()
        if not isinstance(store, BatchStore):
            return {}
        first: dict[bytes, int] = {}
        for index, work in enumerate(works):
            first.setdefault(work.key, index)
        # Not where an earlier copy in the window is claimed singly: it would find our own reservation in its way.
        chosen = [index for index in first.values() if not works[index].redelivered]
        if len(chosen) < 2:
            return {}
        asked = {index: self._request(works[index], reserve=True) for index in chosen}
        claimed_at = self._clock()
        try:
            outcomes = self._step(CLAIM, store.claim_many, list(asked.values()))
        except StoreError as error:
            # In doubt, so nobody runs on it. Each is claimed singly, with its reservation's nonce: if the
            # reservation was made and only its reply was lost, it is recognised instead of blocking for a lease.
            log.warning("claiming %d messages together failed, claiming them singly: %s", len(asked), error)
            return {index: (request, None, claimed_at) for index, request in asked.items()}
        return {
            index: (request, outcome, claimed_at)
            for (index, request), outcome in zip(asked.items(), outcomes, strict=True)
        }

    def _store_or_none(self) -> Store | None:
        try:
            return self._store()
        except StoreError:
            return None  # claiming singly will meet the same error, and answers it

    def _claim_and_handle(self, work: Work, request: ClaimRequest) -> Ending:
        doubt: object = None
        late: Claimed | None = None
        for _ in range(_CLAIM_TRIES):
            claimed_at = self._clock()
            try:
                outcome = self._step(CLAIM, self._store().claim, request)
            except StoreError as error:
                doubt = error
                continue
            if not isinstance(outcome, Claimed) or not self._is_late(claimed_at):
                return self._dispatch(work, request, outcome, claimed_at)
            # Its lease may be over before the handler is: asking again renews it, or shows that it is gone.
            doubt, late = "the store took more than half a lease to answer", outcome
        log.warning("claim in scope %s is in doubt, nothing is run: %s", work.scope, doubt)
        if late is not None:
            self._release(Hold(work.key, late.token, request.nonce), late.attempt - 1)
        return self._wait(work, Ended.IN_DOUBT, self.policy.busy_delay)

    def _is_late(self, claimed_at: float) -> bool:
        return self._clock() - claimed_at > self.policy.lease / 2

    def _dispatch(self, work: Work, request: ClaimRequest, outcome: ClaimOutcome, claimed_at: float) -> Ending:
        if isinstance(outcome, Claimed):
            hold = Hold(work.key, outcome.token, request.nonce)
            if outcome.attempt > self.policy.max_attempts:
                return self._bury(work, hold, Reason.ATTEMPTS, "the attempts are used up", outcome.attempt - 1)
            if request.reserve and outcome.attempt > 1:
                # It has failed before, so it is no first delivery, whatever the broker says. On a reservation a run
                # whose worker dies is not counted; one such run is what the bound has room for (I12).
                self._release(hold, outcome.attempt - 1)
                return self._claim_and_handle(work, self._request(work))
            return self._run(work, Execution(self, work, hold, outcome.attempt, claimed_at))
        if isinstance(outcome, Completed):
            self._step(ACK, work.settle.ack)
            return Ending(Ended.REPLAYED, decode_result(outcome.result))
        if isinstance(outcome, Busy):
            return self._wait(work, Ended.BUSY, outcome.retry_after)
        assert isinstance(outcome, Conflict)
        return self._bury(work, None, Reason.CONFLICT, f"the biz-id is {outcome.state.name.lower()} with another body")

    # --- running -------------------------------------------------------------------------------------

    def _run(self, work: Work, execution: Execution) -> Ending:
        self._keeper.add(execution)
        context = _current.set(execution)
        value = None
        try:
            value = self._step(HANDLER, work.run)
        except Exception as error:  # whatever a handler raises is an outcome, not the end of the consumer
            if execution._ending is None and execution._completed is None:
                self._keeper.remove(execution)
                execution._ending = Ending(Ended.FAILED)  # from here on a late `complete` changes nothing
                execution._ending = self._failed(work, execution, error)
                return execution._ending
            log.exception("a handler in scope %s raised after it had called complete(), which stands", work.scope)
        except BaseException:
            # The process is told to stop. The message is not settled: closing the channel brings it back.
            self._keeper.remove(execution)
            if execution._ending is None and execution._completed is None:
                execution._ending = Ending(Ended.FAILED)
                self._release(execution.hold, execution.attempt)
            raise
        finally:
            _current.reset(context)
        if execution._ending is not None:
            return execution._ending
        if self._manual and execution._completed is None:
            return Ending(Ended.OPEN)  # its lease is renewed until the business calls `complete`
        return self.finish(execution, value)

    def finish(self, execution: Execution, value: Any) -> Ending:
        """Complete, then ack. Repeats the completion for a lease's time if its outcome is unknown.

        Called again after the ack could not be sent, it only acks.
        """
        work = execution._work
        if execution._completed is None:
            ending = self._complete(work, execution, value)
            if ending.how is not Ended.COMPLETED:
                execution._ending = ending
                return ending
            execution._completed = ending
        self._step(ACK, work.settle.ack)
        execution._ending = execution._completed
        return execution._completed

    def _complete(self, work: Work, execution: Execution, value: Any) -> Ending:
        hold = execution.hold
        # Before completing, so that a renewal that meets the completed record is not taken for a lost lease.
        self._keeper.remove(execution)
        result = encode_result(value, work.scope)
        give_up = self._clock() + self.policy.lease
        pause = 0.05
        while True:
            try:
                ours = self._step(COMPLETE, self._store().complete, hold, result=result, retention=execution.retention)
                break
            except StoreError as error:
                if self._clock() + pause >= give_up:
                    log.error("completion in scope %s is in doubt after its handler succeeded: %s", work.scope, error)
                    return self._wait(work, Ended.IN_DOUBT, self.policy.busy_delay)
            self._sleep(pause)
            pause = min(pause * 2, 1.0)
        if not ours:
            log.error(
                "a handler in scope %s succeeded after its lease was lost (record %s, token %d): fence its resource",
                work.scope,
                execution.idempotency_key,
                hold.token,
            )
            return self._wait(work, Ended.LEASE_LOST, self.policy.busy_delay)
        return Ending(Ended.COMPLETED, value)

    def _failed(self, work: Work, execution: Execution, error: Exception) -> Ending:
        attempt = execution.attempt
        log.warning(
            "handler in scope %s raised %s at attempt %d of %d",
            work.scope,
            type(error).__name__,
            attempt,
            self.policy.max_attempts,
            exc_info=error,
        )
        if isinstance(error, self._permanent):
            return self._bury(work, execution.hold, Reason.PERMANENT, last_line(error), attempt)
        if attempt >= self.policy.max_attempts:
            return self._bury(work, execution.hold, Reason.ATTEMPTS, last_line(error), attempt)
        self._release(execution.hold, attempt)
        return self._wait(work, Ended.FAILED, self.policy.backoff.delay(attempt, self._draw))

    # --- settling ------------------------------------------------------------------------------------

    def _wait(self, work: Work, how: Ended, delay: float) -> Ending:
        # Spread over half as much again, so that copies which met once do not meet again at the same moment.
        if how is not Ended.FAILED:
            delay = max(delay, self.policy.busy_delay) * (1 + self._draw() / 2)
        self._step(WAIT, work.settle.wait, delay)
        return Ending(how)

    def _bury(self, work: Work, hold: Hold | None, reason: Reason, error: str, attempts: int = 0) -> Ending:
        self._step(DEAD_LETTER, work.settle.dead_letter, reason, error, attempts)
        if hold is not None:
            self._release(hold, attempts)
        return Ending(Ended.DEAD)

    def _release(self, hold: Hold, attempts: int) -> None:
        try:
            self._step(RELEASE, self._store().release, hold, attempts=attempts, retention=self.policy.retention)
        except StoreError as error:
            # Not needed for safety: the lease lapses by itself, and the attempt was counted at the claim.
            log.warning("could not release a claim, its lease will lapse: %s", error)

    def _give_back(self, ahead: dict[int, _Reserved]) -> None:
        for request, outcome, _ in ahead.values():
            if isinstance(outcome, Claimed):
                self._release(Hold(request.key, outcome.token, request.nonce), outcome.attempt - 1)


#: A claim made ahead of its turn: what was asked, the answer (None: in doubt), and when, by the worker's clock.
_Reserved = tuple[ClaimRequest, ClaimOutcome | None, float]


def encode_result(value: Any, scope: str) -> bytes | None:
    """What is stored of a handler's result: its JSON, or None if it has none or one that is too long."""
    if value is None:
        return None
    try:
        encoded = json.dumps(value, separators=(",", ":")).encode()
    except Exception:  # noqa: BLE001 - the effect has happened: whatever a result's own code raises must not repeat it
        encoded = None
    if encoded is None or len(encoded) > MAX_RESULT_BYTES:
        # The effect has happened: failing now would only repeat it.
        log.warning("the result of a handler in scope %s is not JSON of at most 64 KiB: it is not stored", scope)
        return None
    return encoded


def decode_result(result: bytes | None) -> Any:
    """The result that a duplicate gets."""
    if result is None:
        return None
    try:
        return json.loads(result)
    except (ValueError, RecursionError):
        log.warning("a stored result is not JSON that can be read: a duplicate gets None instead")
        return None


def last_line(error: BaseException) -> str:
    """The last line of a traceback, for the dead letter."""
    formatted = traceback.TracebackException(type(error), error, None)
    formatted.__notes__ = None  # they come after the line that says what was raised
    return list(formatted.format_exception_only())[-1].strip()
