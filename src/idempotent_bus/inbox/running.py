"""Runs work in transactions: the counterpart of `executor.Executor`, where the effect is in the same database.

The transaction is the lock: a copy that arrives meanwhile waits for it briefly, and then comes back later. A COMMIT
whose reply was lost is settled by inserting again, which waits for the first and then meets its record, never by a
SELECT, which could look too early (I15). What can go wrong has one answer each:

========================  ===================================================================================
the database is silent     nothing runs, nothing is acked; the message comes back later and later (I9)
completed before           acked; the stored result is returned (I8); with another body: dead letter
its record is held         comes back after the busy delay; costs no attempt (I12)
older than the retention   dead letter, unless its record is there to tell (I11)
handler raised             rolled back, the attempt counted apart, comes back after the backoff, or dead letter
deadlock, 40001            the whole transaction is repeated at once, a few times; then as if the handler had raised
COMMIT's reply lost        the whole transaction is repeated, which tells; if that never ends well: an attempt
========================  ===================================================================================

Attempts are counted in a transaction of their own: after a handler raised, and before a message is run that the
broker says was delivered before, since then the last run may have died.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from ..dialects import is_contention
from ..events import Event, EventKind, Notify
from ..execution import Execution, running
from ..failing import Failing, Silence
from ..hooks import ACK, CLAIM, COMMIT, DEAD_LETTER, HANDLER, RELEASE, WAIT, Step, direct
from ..model import Reason
from ..policy import Policy
from ..results import MAX_RESULT_BYTES, decode_result, encode_result, last_line
from ..work import Ended, Ending, Passing, Settlement, Work
from .base import Inbox
from .records import Seen, is_lock_timeout, is_meeting
from .transaction import HandlerEndedIt, HookRaised, Opened, translated
from .window import Window

__all__ = ["Transactions"]

log = logging.getLogger(__name__)

#: How often a transaction whose COMMIT is in doubt is repeated at once.
_TRIES: Final = 4
#: How often one that met others is repeated, and for how long it rests in between at most, in seconds.
_TRIES_AT_MEETING: Final = 8
_LONGEST_REST: Final = 0.1


class _HandlerRaised(Exception):
    """Carries what a handler raised past the handling of database errors. attempt: the number of this run."""

    def __init__(self, error: Exception, attempt: int) -> None:
        super().__init__()
        self.error = error
        self.attempt = attempt


class _Unfinished(Exception):
    """The handler ran, but it is not known whether its transaction was committed, or it must be repeated as a whole."""

    def __init__(self, error: sa.exc.DBAPIError) -> None:
        super().__init__()
        self.error = error


class Answer(NamedTuple):
    """What to tell the broker. attempts: for the dead letter. again: seconds until it comes back."""

    how: Ended
    value: Any = None
    reason: Reason | None = None
    error: str = ""
    attempts: int = 0
    again: float = 0.0


_TOO_OLD: Final = Answer(Ended.DEAD, None, Reason.TOO_OLD, "older than the retention, so it may have been done before")


class Transactions:
    """Guards the work of one scope. Safe for threads.

    The database decides first, and only then the broker is answered: an error of the one is never taken for an error
    of the other, also where both are SQL databases.

    notify: told of every event. max_result: bytes of a result's JSON that are stored at most. passing: says of what a
    handler raised whether somebody else answers for it; it is rolled back then, and counted nowhere. wall, sleep, draw,
    step: for tests; seconds since the epoch, time.sleep, random numbers in [0, 1), the named hooks.
    """

    def __init__(
        self,
        inbox: Inbox,
        policy: Policy,
        *,
        notify: Notify | None = None,
        max_result: int = MAX_RESULT_BYTES,
        passing: Callable[[BaseException], Passing] | None = None,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        draw: Callable[[], float] = random.random,
        step: Step = direct,
    ) -> None:
        self.policy = policy
        self._most_attempts = policy.most_attempts
        self.inbox = inbox
        self._notify = notify
        self.max_result = max_result
        self._passing = passing
        self._wall = wall
        self._sleep = sleep
        self._draw = draw
        self.step = step
        self._failing = Failing(policy, draw, lambda: self._wall())
        self._silence = Silence(policy, time.monotonic)

    def handle(self, work: Work) -> Ending:
        """Handle one delivery; settles it, whatever happens, unless the broker's connection fails."""
        return self._settle(work, self._decided(work))

    def handle_window(self, works: Sequence[Work]) -> list[Ending]:
        """Handle deliveries that are already here: first deliveries together, in one commit; see `window.py`.

        What the window leaves, redelivered messages and second copies of one key are handled singly. Once the database
        gives no clear answer, the rest is put off without asking it again for each.
        """
        endings: dict[int, Ending] = {}
        window = Window(self, works)
        for index, answer in window.run().items():
            endings[index] = self._settle(works[index], answer)
        silent = False
        # The works themselves are gone through, since that may end with an error: the consumer was told to stop.
        for index, work in enumerate(works):
            if index in endings:
                continue
            if silent:
                endings[index] = self._settle(work, self._doubt(work))
                continue
            told = self._meddler(work) if index == window.meddler else None
            endings[index] = ending = self._settle(work, told or self._decided(work))
            silent = ending.how is Ended.IN_DOUBT
        return [endings[index] for index in range(len(works))]

    def refuse(self, scope: str, settle: Settlement, reason: Reason, error: str) -> Ending:
        """Dead-letter a message that has no usable identity, and therefore no record."""
        moved = self.step(DEAD_LETTER, settle.dead_letter, reason, error, 0)
        if moved and self._notify is not None:
            self._notify(Event(EventKind.DEAD_LETTERED, scope, reason=reason.value))
        return Ending(Ended.DEAD if moved else Ended.HELD)

    # --- what the database says ---------------------------------------------------------------------------

    def _decided(self, work: Work) -> Answer:
        try:
            answer = self._decide(work)
        except sa.exc.SQLAlchemyError as error:
            if is_lock_timeout(error):
                return self.busy(work)
            reason = f"{type(error).__name__}: {str(getattr(error, 'orig', error)).partition(chr(10))[0]}"
            log.warning("the inbox of scope %s is in doubt, nothing is acked (%s)", work.scope, reason)
            return self._doubt(work)
        self._silence.end()
        return answer

    def _decide(self, work: Work) -> Answer:
        """What to answer the broker. Raises SQLAlchemyError if the database does not tell."""
        counted = 0
        if work.redelivered:
            if self._failing.is_too_old(work) and self.step(CLAIM, self._is_unknown, work):
                return _TOO_OLD
            counted = self._count(CLAIM, work)
            if counted > self._most_attempts:
                return Answer(Ended.DEAD, None, Reason.ATTEMPTS, "the attempts are used up", counted - 1)
        ran = False
        tries = meetings = 0
        while True:
            try:
                return self._transact(work, counted)
            except _HandlerRaised as raised:
                return self._failed(work, raised.error, counted, raised.attempt)
            except _Unfinished as unfinished:
                ran, error = True, unfinished.error
            except sa.exc.DBAPIError as before_any_handler:
                if not _is_worth_repeating(before_any_handler):
                    raise
                error = before_any_handler
            if is_meeting(error):
                meetings += 1
                if meetings >= _TRIES_AT_MEETING:
                    break
                self._sleep(self._draw() * min(_LONGEST_REST, 0.002 * 2**meetings))
            else:
                tries += 1
                if tries >= _TRIES:
                    break
        if ran and is_meeting(error):
            # It is known not to be committed: as if the handler had raised.
            return self._failed(work, error, counted, 0)
        if ran and not 0 < counted < self.policy.max_attempts:
            # It ran, and never came to its end: an attempt, or else this could go on for ever. To count it is to
            # insert, which waits for a COMMIT that is still under way, and counts nothing after it. One that was
            # counted before it ran is not counted again, unless it was the last: then this tells whether it is done.
            attempt = self._count(RELEASE, work)
            if attempt >= self.policy.max_attempts:
                return Answer(Ended.DEAD, None, Reason.ATTEMPTS, last_line(error), counted or attempt)
        raise error

    def _transact(self, work: Work, counted: int) -> Answer:
        inbox, policy = self.inbox, self.policy
        with inbox.transaction() as opened:
            with translated(opened.connection):
                opened.mark_before()
                taken = self.step(CLAIM, inbox.records.take, opened.link, work, policy.retention)
                if taken is None:
                    return self.replayed(work, inbox.records.seen(opened.link, [work.key]).get(work.key))
            opened.mark_after(taken.transaction)
            attempt = counted or taken.attempts + 1
            refusal = self.refusal(work, attempt)
            if refusal is not None:
                return refusal
            began = time.monotonic()
            value, results = self._run(work, opened, attempt)
            try:
                self.step(COMMIT, opened.commit, results)
            except HandlerEndedIt as error:
                raise self._ended(work, opened, error, attempt) from error
            except HookRaised as raised:
                cause = raised.__cause__
                assert isinstance(cause, Exception)
                if not opened.was_committed(work.key):
                    raise _HandlerRaised(cause, attempt) from raised
                log.error("a listener raised after the commit in scope %s: all is there", work.scope, exc_info=cause)
            except sa.exc.OperationalError as error:
                if is_lock_timeout(error) and not is_meeting(error):
                    raise  # SQLite: readers are in the way, nothing was committed
                raise _Unfinished(error) from error
            except sa.exc.DBAPIError as error:
                if error.connection_invalidated or is_meeting(error):
                    raise _Unfinished(error) from error
                raise _HandlerRaised(error, attempt) from error  # a deferred constraint: the database said no
        return self.completed(work, value, attempt, time.monotonic() - began)

    def _run(self, work: Work, opened: Opened, attempt: int) -> tuple[Any, dict[bytes, bytes]]:
        try:
            value = self.call(work, opened, attempt)
            opened.check_open()
            opened.flush()
        except HandlerEndedIt as error:
            raise self._ended(work, opened, error, attempt) from error
        except sa.exc.DBAPIError as error:
            if is_meeting(error):
                raise _Unfinished(error) from error  # the whole transaction is repeated
            raise self._raised(work, opened, error, attempt) from error
        except Exception as error:
            raise self._raised(work, opened, error, attempt) from error
        result = encode_result(value, work.scope, self.max_result)
        return value, {} if result is None else {work.key: result}

    def call(self, work: Work, opened: Opened, attempt: int) -> Any:
        """Run the handler in the transaction."""
        self.tell(EventKind.CLAIMED, work, attempt)
        context = running.set(Execution(work, attempt))
        try:
            return self.step(HANDLER, work.run, opened.handed)
        finally:
            running.reset(context)

    def _raised(self, work: Work, opened: Opened, error: Exception, attempt: int) -> _HandlerRaised:
        """What the handler raised; or that it had committed before, so that a part of it is done."""
        try:
            if opened.was_committed(work.key):
                ended = HandlerEndedIt()
                ended.__cause__ = error
                return _HandlerRaised(ended, attempt)
        except sa.exc.SQLAlchemyError:
            log.debug("nobody can tell how the handler's transaction ended", exc_info=True)
        return _HandlerRaised(error, attempt)

    def _ended(self, work: Work, opened: Opened, error: HandlerEndedIt, attempt: int) -> _HandlerRaised:
        if error.surely or opened.was_committed(work.key):
            return _HandlerRaised(error, attempt)
        lost = sa.exc.InvalidRequestError(
            "the transaction was rolled back before the handler returned: by the database (a deadlock whose error the "
            "handler swallowed), or by the handler"
        )
        return _HandlerRaised(lost, attempt)

    def completed(self, work: Work, value: Any, attempt: int, seconds: float) -> Answer:
        """It is committed."""
        self.tell(EventKind.COMPLETED, work, attempt, seconds=seconds)
        return Answer(Ended.COMPLETED, value)

    def replayed(self, work: Work, seen: Seen | None) -> Answer:
        """What a copy of a completed record gets."""
        if seen is None:  # purged just now: it may be new, or not
            return self.busy(work)
        if None not in (seen.fingerprint, work.fingerprint) and seen.fingerprint != work.fingerprint:
            self.tell(EventKind.CONFLICTED, work)
            return Answer(Ended.DEAD, None, Reason.CONFLICT, "the biz-id is completed with another body")
        self.tell(EventKind.REPLAYED, work)
        return Answer(Ended.REPLAYED, decode_result(seen.result))

    def refusal(self, work: Work, attempt: int) -> Answer | None:
        """Why a record that was taken is not run."""
        if attempt > self._most_attempts:
            return Answer(Ended.DEAD, None, Reason.ATTEMPTS, "the attempts are used up", attempt - 1)
        if attempt == 1 and self._failing.is_too_old(work):
            return _TOO_OLD
        return None

    def busy(self, work: Work) -> Answer:
        """Its record is held by another transaction."""
        self.tell(EventKind.BUSY, work)
        return Answer(Ended.BUSY, again=self._failing.spread(Ended.BUSY, self.policy.busy_delay))

    def _doubt(self, work: Work) -> Answer:
        self._silence.begin()
        self.tell(EventKind.STORE_UNAVAILABLE, work)
        return Answer(Ended.IN_DOUBT, again=self._failing.spread(Ended.IN_DOUBT, self._silence.pause()))

    def _failed(self, work: Work, error: Exception, counted: int, attempt: int) -> Answer:
        if self._passing is not None and self._passing(error) is not None:
            self.tell(EventKind.RELEASED, work, attempt, reason=type(error).__name__)
            return Answer(Ended.PASSED, error)
        known = counted or self._count(RELEASE, work)
        if known == 0 and not isinstance(error, HandlerEndedIt):
            # Another copy has completed it since: this one will be its replay.
            return Answer(Ended.FAILED, again=self._failing.delay(error, attempt))
        return self.failed(work, error, known or attempt)

    def failed(self, work: Work, error: Exception, attempt: int) -> Answer:
        """What follows from what the handler raised, once its attempt is counted."""
        log.warning(
            "handler in scope %s raised %s at attempt %d of %d, rolled back",
            work.scope,
            type(error).__name__,
            attempt,
            self.policy.attempts_for(error),
            exc_info=error,
        )
        reason = self._failing.reason(error, attempt)
        if reason is not None:
            return Answer(Ended.DEAD, None, reason, last_line(error), attempt)
        self.tell(EventKind.RELEASED, work, attempt, reason=type(error).__name__)
        return Answer(Ended.FAILED, again=self._failing.delay(error, attempt))

    def _meddler(self, work: Work) -> Answer | None:
        """After a window that was ended by this work's handler: if it was by a COMMIT, a part of it is done."""
        try:
            with self.inbox.transaction(apart=True) as opened, translated(opened.connection):
                seen = self.inbox.records.seen(opened.link, [work.key]).get(work.key)
        except sa.exc.SQLAlchemyError:
            return self._doubt(work)
        if seen is None or not seen.completed:
            return None
        return self.failed(work, HandlerEndedIt(), 1)

    def _is_unknown(self, work: Work) -> bool:
        """True if no attempt of it is known. Raises SQLAlchemyError if that is in doubt.

        Asked before the attempt of an old message is counted: once it is, and the worker dies, the next one could not
        tell the message from one that has only failed before, and would run it.
        """
        with self.inbox.transaction(apart=True) as opened, translated(opened.connection):
            taken = self.inbox.records.take(opened.link, work, self.policy.retention)
        return taken is not None and not taken.attempts

    def _count(self, step: str, work: Work, least: int = 1) -> int:
        """Count an attempt in a transaction of its own; 0: completed. Raises SQLAlchemyError if that is in doubt."""
        for left in range(_TRIES - 1, -1, -1):
            try:
                return int(self.step(step, self.inbox.count_attempt, work, self.policy.retention, least))
            except sa.exc.DBAPIError as error:
                if not left or not _is_worth_repeating(error):
                    raise
        raise AssertionError

    # --- answering the broker -----------------------------------------------------------------------------

    def _settle(self, work: Work, answer: Answer) -> Ending:
        how = answer.how
        if how is Ended.COMPLETED or how is Ended.REPLAYED:
            self.step(ACK, work.settle.ack)
            return Ending(how, answer.value)
        if how is Ended.PASSED:
            return Ending(how, answer.value)
        if answer.reason is None:
            self.step(WAIT, work.settle.wait, answer.again)
            return Ending(how)
        moved = self.step(DEAD_LETTER, work.settle.dead_letter, answer.reason, answer.error, answer.attempts)
        if moved:
            self.tell(EventKind.DEAD_LETTERED, work, answer.attempts, reason=answer.reason.value)
            return Ending(Ended.DEAD)
        self._exhaust(work, answer)
        return Ending(Ended.HELD)

    def _exhaust(self, work: Work, answer: Answer) -> None:
        """What could not be moved must not run when it is looked at again."""
        if answer.reason is Reason.CONFLICT:
            return
        try:
            self._count(RELEASE, work, max(answer.attempts, self._most_attempts))
        except sa.exc.SQLAlchemyError as error:
            log.warning("could not note that a message of scope %s is dead (%s)", work.scope, type(error).__name__)

    def tell(self, kind: EventKind, work: Work, attempt: int = 0, *, reason: str = "", seconds: float = 0.0) -> None:
        """Tell the listener."""
        if self._notify is not None:
            self._notify(
                Event(kind, work.scope, record=work.key.hex(), attempt=attempt, reason=reason, seconds=seconds)
            )


def _is_worth_repeating(error: sa.exc.DBAPIError) -> bool:
    """True where the same may go well at once: a pooled connection that was dead, a meeting with somebody."""
    return error.connection_invalidated or (error.orig is not None and is_contention(error.orig))
