"""A window of messages in one commit: each handler in a savepoint of its own, one COMMIT for all of them.

The records are inserted first, in the order of their keys, as not completed. Each is marked as completed within its
message's savepoint, just before its handler: so a handler that commits on its own, which it must not, makes nothing
durable for messages whose handlers have not run, and runs no earlier one again. A handler that raises takes back its
own savepoint only, and its attempt is counted in the same commit. With psycopg 3 some messages share a savepoint, and
their records are marked at its end, while nothing can commit; if one raises, they run again, each in its own.

Any error beyond a savepoint rolls the whole window back; then nothing has happened, and its messages are handled
singly.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sqlalchemy as sa

from ..hooks import CLAIM, COMMIT, RELEASE
from ..results import encode_result
from ..work import Work
from .points import Point, Quick, guarded, point_for
from .records import Taken, is_lock_timeout, is_meeting
from .transaction import HandlerEndedIt, HookRaised, Opened, translated

if TYPE_CHECKING:
    from .running import Answer, Transactions

__all__ = ["Window"]

log = logging.getLogger(__name__)


#: How many messages share a savepoint, where they can.
_GROUP: Final = 10


class _Found(NamedTuple):
    """taken: the records that are ours, by key. busy: those of which another transaction holds the record."""

    taken: dict[bytes, Taken]
    busy: set[bytes]


class _Outcome(NamedTuple):
    """What became of one message, if the window is committed."""

    attempt: int
    value: Any = None
    result: bytes | None = None
    error: Exception | None = None
    refusal: Answer | None = None
    seconds: float = 0.0


class Window:
    """One window. `run` gives the answers to those messages that it has dealt with, by their place, in order.

    meddler: after `run`, the place of the message whose handler has ended the transaction; None if none has.
    """

    def __init__(self, transactions: Transactions, works: Sequence[Work]) -> None:
        self.meddler: int | None = None
        self._owner = transactions
        self._records = transactions.inbox.records
        self._works = works
        self._running: int | None = None

    def run(self) -> dict[int, Answer]:
        """Handle what can be handled together. Nothing: no two can, or it was rolled back."""
        first: dict[bytes, int] = {}
        for index in range(len(self._works)):  # by place: going through them may end it, and nothing has begun yet
            first.setdefault(self._works[index].key, index)
        places = {key: index for key, index in first.items() if not self._works[index].redelivered}
        if len(places) < 2:
            return {}
        try:
            try:
                return self._transact(places, self._take_all)
            except sa.exc.SQLAlchemyError as error:
                if self._running is not None or not is_lock_timeout(error):
                    raise
            # One of them is busy, and nothing tells which.
            return self._transact(places, self._take_each)
        except HandlerEndedIt:
            self.meddler = self._running
            why = "a handler ended its transaction"
        except HookRaised:  # if it was committed all the same, each finds its record
            why = "a listener raised around the commit"
        except sa.exc.SQLAlchemyError as error:
            why = type(error).__name__
        log.info("a window of %d messages was rolled back and is handled singly: %s", len(places), why)
        return {}

    def _transact(self, places: dict[bytes, int], take: Callable[..., _Found]) -> dict[int, Answer]:
        """places: where the message of each key is."""
        owner, works = self._owner, self._works
        outcomes: dict[int, _Outcome] = {}
        with owner.inbox.transaction() as opened:
            with translated(opened.connection):
                opened.mark_before()
                found: _Found = owner.step(CLAIM, take, opened, [works[index] for index in places.values()])
                missing = [key for key in places if key not in found.taken and key not in found.busy]
                seen = self._records.seen(opened.link, missing) if missing else {}
            if found.taken:
                opened.mark_after(next(iter(found.taken.values())).transaction)
                outcomes = self._handle(opened, {places[key]: taken for key, taken in found.taken.items()})
        # Only now is anything told: what is rolled back has not happened.
        answers: dict[int, Answer] = {}
        for key, index in places.items():
            work = works[index]
            if key in found.busy:
                answers[index] = owner.busy(work)
            elif key in seen:
                answers[index] = owner.replayed(work, seen[key])
            elif index in outcomes:
                answers[index] = self._answer(work, outcomes[index])
        return dict(sorted(answers.items()))

    def _answer(self, work: Work, outcome: _Outcome) -> Answer:
        if outcome.refusal is not None:
            return outcome.refusal
        if outcome.error is not None:
            return self._owner.failed(work, outcome.error, outcome.attempt)
        return self._owner.completed(work, outcome.value, outcome.attempt, outcome.seconds)

    # --- the records --------------------------------------------------------------------------------------

    def _take_all(self, opened: Opened, works: Sequence[Work]) -> _Found:
        return _Found(self._records.take_many(opened.link, works, self._owner.policy.retention), set())

    def _take_each(self, opened: Opened, works: Sequence[Work]) -> _Found:
        return _Found(*self._records.take_each(opened.link, works, self._owner.policy.retention))

    # --- the handlers ---------------------------------------------------------------------------------------

    def _handle(self, opened: Opened, taken: dict[int, Taken]) -> dict[int, _Outcome]:
        """Run the handlers and commit; what became of each, by place."""
        owner, point = self._owner, point_for(opened, self._records)
        outcomes: dict[int, _Outcome] = {}
        # Gone through, since that may end it (the consumer was told to stop). What has failed before is no first
        # delivery, whatever the broker says: singly.
        ours = ((index, work) for index, work in enumerate(self._works) if index in taken and not taken[index].attempts)
        if isinstance(point, Quick):
            with guarded(opened):
                while group := list(itertools.islice(ours, _GROUP)):
                    outcomes.update(self._run_group(opened, point, group))
        else:
            for index, work in ours:
                outcomes[index] = self._run(opened, point, index, work)
        results = {self._works[index].key: done.result for index, done in outcomes.items() if done.result is not None}
        owner.step(COMMIT, opened.commit, results, point.last_words)
        return outcomes

    def _run_group(self, opened: Opened, point: Quick, group: list[tuple[int, Work]]) -> dict[int, _Outcome]:
        """Several handlers in one savepoint. If one raises, they run again, each in its own."""
        try:
            point.begin_shared()
            outcomes: dict[int, _Outcome] = {}
            for index, work in group:
                outcome = self._run_in_group(opened, index, work)
                if outcome is None:
                    break
                outcomes[index] = outcome
            else:
                point.keep()
                point.keep_shared([work.key for index, work in group if outcomes[index].refusal is None])
                return outcomes
            point.undo()
        except sa.exc.DBAPIError as error:
            raise self._ended_or(error) from error
        return {index: self._run(opened, point, index, work) for index, work in group}

    def _run_in_group(self, opened: Opened, index: int, work: Work) -> _Outcome | None:
        """None: it raised."""
        owner, attempt = self._owner, 1
        refusal = owner.refusal(work, attempt)
        if refusal is not None:
            return _Outcome(attempt, refusal=refusal)
        self._running = index
        began = time.monotonic()
        try:
            value = owner.call(work, opened, attempt)
            opened.check_open()
        except HandlerEndedIt:
            raise
        except Exception as error:
            if isinstance(error, sa.exc.DBAPIError) and (error.connection_invalidated or is_meeting(error)):
                raise
            if not opened.transaction.is_active:
                raise HandlerEndedIt from error
            return None
        result = encode_result(value, work.scope, owner.max_result)
        return _Outcome(attempt, value=value, result=result, seconds=time.monotonic() - began)

    def _run(self, opened: Opened, point: Point, index: int, work: Work) -> _Outcome:
        owner, attempt = self._owner, 1
        refusal = owner.refusal(work, attempt)
        if refusal is not None:
            return _Outcome(attempt, refusal=refusal)
        try:
            point.begin(work.key)
        except sa.exc.DBAPIError as error:
            raise self._ended_or(error) from error
        self._running = index
        began = time.monotonic()
        try:
            value = owner.call(work, opened, attempt)
            opened.check_open()
            opened.flush()
        except HandlerEndedIt:
            raise
        except Exception as error:
            if isinstance(error, sa.exc.DBAPIError) and (error.connection_invalidated or is_meeting(error)):
                raise
            if not opened.transaction.is_active:
                raise HandlerEndedIt from error
            try:
                point.undo()
            except sa.exc.DBAPIError as failure:
                raise self._ended_or(failure) from error
            with translated(opened.connection):
                owner.step(RELEASE, self._records.failed, opened.link, work.key, attempt)
            return _Outcome(attempt, error=error, seconds=time.monotonic() - began)
        try:
            point.keep()
        except HandlerEndedIt:
            raise
        except sa.exc.DBAPIError as error:
            raise self._ended_or(error) from error
        except Exception as error:
            raise HookRaised from error  # a Session tells its listeners of savepoints too
        result = encode_result(value, work.scope, owner.max_result)
        return _Outcome(attempt, value=value, result=result, seconds=time.monotonic() - began)

    def _ended_or(self, error: sa.exc.DBAPIError) -> Exception:
        """A savepoint that is not there any more was removed by the handler that ran last, with the transaction."""
        if self._running is None or error.connection_invalidated or is_meeting(error):
            return error
        return HandlerEndedIt(surely=False)
