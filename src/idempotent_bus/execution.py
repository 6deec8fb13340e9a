"""What a running handler may know and do: `current_execution()`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol

from .errors import ConfigurationError, LeaseLost, NoExecution, Permanent, StoreUnavailable, Transient
from .model import Hold
from .msgid import derived_inner_msg_id
from .work import Ended, Ending, Work

__all__ = ["Execution", "LeasedExecution", "current_execution", "running"]

log = logging.getLogger(__name__)

#: The execution that the code of this context belongs to; set by whoever runs a handler.
running: ContextVar[Execution | None] = ContextVar("idempotent_bus_execution", default=None)


def current_execution() -> Execution:
    """The execution of the guarded handler that is running here. Raises NoExecution outside one."""
    execution = running.get()
    if execution is None:
        raise NoExecution(
            "current_execution() works only inside a guarded handler, in its own thread or context; another thread "
            "must be given the execution, and publishes with inner_msg_id=execution.derived_id(name), not once=name"
        )
    return execution


class Execution:
    """One run of a handler. Got with `current_execution()`; it may be handed to other threads.

    attempt: its number, from 1, as the store counts. In a transaction (the inbox) a first delivery is 1, and there is
    no token, no lease and no manual completion: the transaction is all of these.
    """

    __slots__ = ("_names", "_work", "attempt")

    def __init__(self, work: Work, attempt: int) -> None:
        self._work = work
        self._names: dict[str, object] = {}
        self.attempt = attempt

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
    def idempotency_key(self) -> str:
        """A key for a downstream service that dedupes: the same on every attempt, another for every (scope, biz-id)."""
        return self._work.key.hex()

    @property
    def token(self) -> int:
        """The fencing token: larger than that of every earlier claim of this biz-id. Let the resource compare it."""
        raise ConfigurationError("a transaction has no fencing token: it needs none, since only one can commit")

    @property
    def lease_lost(self) -> bool:
        """True once the lease is over by this worker's clock, or known to be another's: stop. False proves nothing."""
        return False

    def check(self) -> None:
        """Raise LeaseLost if the lease is lost. For handlers that work in steps."""
        if self.lease_lost:
            raise LeaseLost("the lease is over, another execution may be running: stop, and change nothing more")

    def derived_id(self, name: str) -> str:
        """An inner-msg-id for what this execution publishes under `name`: the same on every attempt.

        `publish(..., once=name)` asks for it by itself; another thread, which has only been given the execution, gives
        it as `inner_msg_id`. Raises ConfigurationError for a name that this execution has used before: two messages
        need two names.
        """
        mine = object()
        if self._names.setdefault(name, mine) is not mine:  # one step: two threads may ask at once
            raise ConfigurationError(f"once={name!r} is used twice in one execution: the second would be refused")
        return derived_inner_msg_id(self._work.key, name)

    def complete(self, result: Any = None) -> None:
        """With `manual=True`: the business has succeeded. See LeasedExecution."""
        raise ConfigurationError("a transaction is completed by returning: there is nothing to call")

    def fail(self, reason: str | BaseException = "", *, permanent: bool = False) -> None:
        """With `manual=True`: the business has failed. See LeasedExecution."""
        raise ConfigurationError("in a transaction, raise what went wrong")


class Finisher(Protocol):
    """What ends an execution: the executor."""

    def finish(self, execution: LeasedExecution, value: Any, /) -> Ending:
        """Complete durably, then ack."""
        ...

    def fail(self, execution: LeasedExecution, error: BaseException, /) -> Ending:
        """Release and put off, or dead-letter."""
        ...


class LeasedExecution(Execution):
    """An execution on a claim in a dedup store, with a lease that is renewed in the background until it ends.

    `complete` and `fail` may be called from any thread, in the handler or later; the first call decides.
    """

    __slots__ = (
        "_clock",
        "_event",
        "_finisher",
        "_taken",
        "_told",
        "completed",
        "ending",
        "hold",
        "lease",
        "lock",
        "on_lost",
        "renewed_at",
        "retention",
        "started_at",
    )

    def __init__(
        self,
        work: Work,
        attempt: int,
        hold: Hold,
        finisher: Finisher,
        *,
        lease: float,
        retention: float,
        claimed_at: float,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(work, attempt)
        self._finisher = finisher
        self._clock = clock
        self._told = False
        self._taken = False
        self._event: threading.Event | None = None
        # Held while the execution is being ended, so that two threads cannot end it twice.
        self.lock = threading.RLock()
        self.completed: Ending | None = None  # durable; what is still to come is the ack
        self.ending: Ending | None = None  # settled
        self.on_lost: Callable[[LeasedExecution], None] | None = None
        self.hold = hold
        self.lease = lease
        self.retention = retention
        self.renewed_at = self.started_at = claimed_at

    @property
    def work(self) -> Work:
        """The delivery."""
        return self._work

    @property
    def token(self) -> int:
        """The fencing token: larger than that of every earlier claim of this biz-id. Let the resource compare it."""
        return self.hold.token

    @property
    def lease_lost(self) -> bool:
        """True once the lease is over by this worker's clock, or known to be another's: stop. False proves nothing.

        A lease that ran out because its renewal stalled may become good again, if nobody took over meanwhile.
        """
        return self._taken or self._clock() >= self.renewed_at + self.lease

    @property
    def lease_lost_event(self) -> threading.Event:
        """An event that is set when the lease is found to be lost: for a handler that waits for several things."""
        with self.lock:
            if self._event is None:
                self._event = threading.Event()
                if self._told:
                    self._event.set()
            return self._event

    def on_lease_lost(self, *, taken: bool) -> None:
        """For the keeper of leases. taken: another claim is known to have taken over; else the renewals stalled."""
        self._taken = self._taken or taken
        with self.lock:
            first, self._told = not self._told, True
            if self._event is not None:
                self._event.set()
        if first:
            why = "another claim took over" if taken else "it could not be renewed in time"
            log.warning("lease lost in scope %s (record %s): %s", self.scope, self.idempotency_key, why)
            if self.on_lost is not None:
                self.on_lost(self)

    def complete(self, result: Any = None) -> None:
        """The business has succeeded: completes durably, then acks. With `manual=True` this is what counts.

        Raises LeaseLost if another claim took over meanwhile (fence the resource: the effect may now be there twice),
        and StoreUnavailable if the store gave no clear answer for a lease's time; in both cases the message is not
        acked and comes back. A second call changes nothing and answers as the first did.
        """
        with self.lock:
            ending = self.ending if self.ending is not None else self._finisher.finish(self, result)
        if ending.how is Ended.IN_DOUBT:
            raise StoreUnavailable("the completion is in doubt: the message is not acked, and comes back")
        if ending.how is not Ended.COMPLETED:
            raise LeaseLost(f"nothing was completed: this execution had ended before ({ending.how.value})")

    def fail(self, reason: str | BaseException = "", *, permanent: bool = False) -> None:
        """The business has failed: as if the handler had raised `reason`, or a text. Nothing if it had ended before.

        permanent: no rerun can mend it, so the message goes to the dead letter at once.
        """
        error: BaseException
        if isinstance(reason, BaseException):
            error = Permanent(f"{type(reason).__name__}: {reason}") if permanent else reason
        else:
            error = Permanent(reason) if permanent else Transient(reason)
        with self.lock:
            if self.ending is not None or self.completed is not None:
                return
            self.ending = Ending(Ended.FAILED)  # from here on nothing else ends it
        # Not under the lock: the dead letter is written by the consuming thread, and that may be waiting for the lock.
        self._finisher.fail(self, error)
