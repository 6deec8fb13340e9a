"""The lower half inside Celery: one guarded task, in the process and thread that runs it.

Celery keeps what is its own: states, results, callbacks, retries, and acks, which are late. The guard stands around the
task's function, autoretry included, and says what a delivery is: to be run, done before (the stored result goes on to
callbacks, chains and chords), or to be put off. What the function raises is Celery's to answer for: the claim is given
back and no attempt counted, so that attempts are here what died with its worker. Not so the library's own errors:
`Transient`, `InDoubt` and the classes of `in_doubt` let the message itself come back after a backoff.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from celery.exceptions import SoftTimeLimitExceeded

from ..errors import ConfigurationError, InDoubt, InvalidBizId, InvalidMessage, StoreError, Transient
from ..events import notifier
from ..executor import Executor
from ..handler import WorkExecutor, check_plain
from ..headers import DEAD_AT, REDRIVE
from ..headers import INNER_MSG_ID as INNER_MSG_ID_HEADER
from ..identity import (
    INNER_MSG_ID,
    canonical_biz_id,
    check_scope,
    check_tenant,
    extract_biz_id,
    fingerprint,
    record_key,
)
from ..kombu_message import redrives
from ..model import Hold, Reason, State
from ..msgid import published_at_of
from ..policy import Backoff, Policy
from ..store import LookupStore, Store
from ..stores import store_source
from ..work import Ended, Passing, Work
from .arguments import Arguments
from .call import Call, RetriedAndReturned, Settled, restored
from .chords import claimed_for
from .outcomes import PutOff, Refused
from .settings import inbox_of, option
from .stamping import has_succeeded

__all__ = ["NONCE", "Guard"]

log = logging.getLogger(__name__)

#: Where a parent tells its child what to claim with: in the message's properties, which no retry copies.
NONCE: Final = "idempotent-bus-nonce"
#: Seconds after which a task is run again whose retry could not be sent.
_AGAIN: Final = 5.0


class Guard:
    """One guarded task. Safe for threads; opens nothing before its first message, and its own after a fork.

    run: the task's function. bound: it takes the task first. Raises ConfigurationError or InvalidScope.
    """

    def __init__(self, task: Any, run: Any, *, bound: bool) -> None:
        self.scope: str = check_scope(option(task, "scope"))
        self.tenant = check_tenant(option(task, "tenant"))
        self._biz_id = option(task, "biz_id")
        if self._biz_id is not INNER_MSG_ID and not isinstance(self._biz_id, str) and not callable(self._biz_id):
            raise ConfigurationError(
                f"the task {task.name} has a scope, so it needs biz_id: the name of an argument or a path into one "
                '("order.id"), a function of the arguments by their names, or INNER_MSG_ID'
            )
        check_plain(run)
        self._fingerprint = option(task, "fingerprint")
        self.inbox = inbox_of(option(task, "inbox"))
        self.arguments = Arguments(run, bound=bound, transactional=self.inbox is not None)
        dead_letter = option(task, "dead_letter")
        #: The queue for what is given up; None: there is none, as in plain Celery.
        self.dead_letter: str | None = f"{self.scope}.dead" if dead_letter is None else dead_letter or None
        self.policy = Policy(
            lease=option(task, "lease"),
            retention=option(task, "retention"),
            max_attempts=option(task, "max_attempts"),
            backoff=option(task, "backoff") or Backoff(),
            backoffs=option(task, "backoffs") or {},
            busy_delay=option(task, "busy_delay"),
            on_abandoned=option(task, "on_abandoned"),
            in_doubt=tuple(option(task, "in_doubt")),
        )
        self._max_result = option(task, "max_result")
        self._notify = notifier(option(task, "listener"))
        self._task = task
        store = option(task, "store")
        if self.inbox is None and store is None:
            raise ConfigurationError(
                f"the task {task.name} has a scope, so it needs a dedup store or an inbox: "
                "setup(app, store='redis://...'), or store=... or inbox=... in its decorator"
            )
        self._store = None if self.inbox is not None else store_source(store)
        self._making = threading.Lock()
        self._executor: WorkExecutor | None = None

    # --- the child --------------------------------------------------------------------------------------

    def run(self, request: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the task for one delivery, or not. Returns its result, or the stored one of a copy.

        Raises what the task raised, PutOff, Refused, or ResultNotStored.
        """
        call = Call(self._task.run, request, args, kwargs, self.arguments.transaction, self._max_result)
        settled = Settled()
        try:
            work = self._work(request, args, kwargs, call, settled)
        except InvalidMessage as error:
            raise Refused(str(error), Reason.INVALID) from error
        ending = self._get_executor().handle(work)
        how = ending.how
        if how is Ended.COMPLETED or how is Ended.REPLAYED:
            if how is Ended.REPLAYED:
                self._wait_for_chord(request)
            has_succeeded(request)
            # A probe that found the effect has no result either.
            return call.value if how is Ended.COMPLETED else restored(ending.value)
        if how is Ended.PASSED:
            return self._pass(ending.value, call)
        if settled.refused is not None:
            raise settled.refused from call.error
        delay = self._patience(work, settled.delay) if how is Ended.BUSY else settled.delay
        raise PutOff(f"{self.scope}: {how.value}", delay) from call.error

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """For the sender: raise InvalidBizId or InvalidBody for a call that no worker would run."""
        body = self.arguments.named(args, kwargs)
        if self._biz_id is not INNER_MSG_ID:
            extract_biz_id(self._biz_id, body)

    def _pass(self, error: BaseException, call: Call) -> Any:
        """What Celery answers for. What the task has sent by retry or replace leaves, now that it is not busy."""
        try:
            for send in call.messages:
                send(None)
        except Exception as failure:
            raise PutOff(f"{self.scope}: its retry could not be sent ({type(failure).__name__})", _AGAIN) from failure
        if isinstance(error, RetriedAndReturned):
            return call.value
        raise error

    def _wait_for_chord(self, request: Any) -> None:
        """A copy of a chord's part: whoever was to send the chord's body may be this very message, killed before it."""
        try:
            seconds = claimed_for(self._task, request)
        except Exception as error:
            raise PutOff(
                f"{self.scope}: its result backend does not answer ({type(error).__name__})", _AGAIN
            ) from error
        if seconds:
            raise PutOff(f"{self.scope}: somebody is about to send the body of its chord", seconds)

    def _patience(self, work: Work, most: float) -> float:
        """Seconds until a busy copy looks again: soon at first, since most tasks are short, then later and later."""
        age = 0.0 if work.published_at is None else max(0.0, time.time() - work.published_at)
        return min(most, max(self.policy.busy_delay, age / 2))

    def _work(self, request: Any, args: Sequence[Any], kwargs: Mapping[str, Any], call: Call, settled: Settled) -> Work:
        body = self.arguments.named(args, kwargs)
        inner_msg_id = getattr(request, INNER_MSG_ID_HEADER, None)
        biz_id = self._extract(body, inner_msg_id)
        number = redrives({REDRIVE: getattr(request, REDRIVE, 0)})
        if number is None:
            raise InvalidMessage(f"the header {REDRIVE!r} is not a number of redrives")
        properties = request.properties or {}
        came_back = (request.delivery_info or {}).get("redelivered") or number > 0 or hasattr(request, "x-death")
        return Work(
            scope=self.scope,
            biz_id=biz_id,
            key=record_key(self.scope, biz_id, tenant=self.tenant),
            run=call.run,
            settle=settled,
            fingerprint=fingerprint(body, self._fingerprint),
            inner_msg_id=inner_msg_id if isinstance(inner_msg_id, str) else None,
            redelivered=bool(came_back),
            redrive=number,
            published_at=_in_the_bus_since(request, properties, number),
            nonce=properties.get(NONCE),
        )

    def _extract(self, body: Mapping[str, Any], inner_msg_id: Any) -> str:
        if self._biz_id is not INNER_MSG_ID:
            return extract_biz_id(self._biz_id, body)
        if inner_msg_id is None:
            raise InvalidBizId(f"the message has no header {INNER_MSG_ID_HEADER!r}, which is this scope's id")
        return canonical_biz_id(inner_msg_id)

    def _get_executor(self) -> WorkExecutor:
        if self._executor is None:
            with self._making:
                if self._executor is None:
                    self._executor = self._make_executor()
        return self._executor

    def _make_executor(self) -> WorkExecutor:
        options: dict[str, Any] = {
            "notify": self._notify,
            "max_result": 2 * self._max_result + 2,  # a result's text is made JSON once more
            "passing": self._passing,
        }
        if self._store is not None:
            return Executor(self._store, self.policy, **options)
        from ..inbox.running import Transactions

        kind = getattr(self.inbox, "transactions", Transactions)  # Django's keeps house around each message
        made: WorkExecutor = kind(self.inbox, self.policy, **options)
        return made

    def _passing(self, error: BaseException) -> Passing:
        if isinstance(error, SoftTimeLimitExceeded):
            return "abandoned"  # it struck in the middle of something
        if isinstance(error, (Transient, InDoubt, *self.policy.in_doubt)):
            return None
        if self.inbox is not None and _met_another(error):
            return None  # a deadlock that went on for too many tries is nobody's failure
        return "released"

    def store(self) -> Store | None:
        """The dedup store, opened; None for a task with an inbox. Raises ConfigurationError."""
        return None if self._store is None else self._store()

    # --- the parent -------------------------------------------------------------------------------------

    def key_of(self, args: Sequence[Any], kwargs: Mapping[str, Any], inner_msg_id: Any) -> bytes:
        """The key of a message's record. Raises InvalidMessage."""
        biz_id = self._extract(self.arguments.named(args, kwargs), inner_msg_id)
        return record_key(self.scope, biz_id, tenant=self.tenant)

    def abandon(self, key: bytes, nonce: bytes) -> None:
        """End the claim of a child that is dead or about to be, so that the policy decides now and not after the lease.

        Nothing if it is not held with that nonce, or if nobody can tell: then it lapses by itself. Never raises.
        """
        try:
            store = self.store()  # none: then the transaction went with its connection
            record = store.lookup(key) if isinstance(store, LookupStore) else None
            if record is not None and record.state is State.IN_PROGRESS:
                hold = Hold(key, record.token, nonce)
                store.abandon(hold, attempts=record.attempts, retention=self.policy.retention)
        except StoreError as error:
            log.warning(
                "could not end the claim of a lost worker in scope %s, its lease will lapse: %s", self.scope, error
            )


def _in_the_bus_since(request: Any, properties: Mapping[str, Any], number: int) -> float | None:
    """When the message was published, or was due, or died if it was redriven since; None if that is not known."""
    published = published_at_of(getattr(request, INNER_MSG_ID_HEADER, None), properties.get("timestamp"))
    died = published_at_of(None, getattr(request, DEAD_AT, None)) if number else None
    known = [when for when in (published, died) if when is not None]
    if not known:
        return None
    if isinstance(request.eta, str):
        with contextlib.suppress(ValueError):
            known.append(datetime.datetime.fromisoformat(request.eta.replace("Z", "+00:00")).timestamp())
    return max(known)


def _met_another(error: BaseException) -> bool:
    import sqlalchemy as sa

    from ..inbox.records import is_meeting

    return isinstance(error, sa.exc.DBAPIError) and is_meeting(error)
