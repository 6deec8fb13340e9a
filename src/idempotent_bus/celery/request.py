"""The parent's half of a guarded task: what becomes of its message once its child has answered, or has died.

The parent owns the broker's message. A child can only say what it found (`outcomes.py`): the parent puts the message
off, or moves it to the dead letter before Celery acks it, and ends the claim of a child that it sees die.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any, Final
from weakref import WeakKeyDictionary

from billiard.einfo import ExceptionWithTraceback
from celery import Celery
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.exceptions import Ignore, Reject, Retry, Terminated, TimeLimitExceeded, WorkerLostError
from celery.worker.request import Request
from celery.worker.state import task_ready, task_reserved
from celery.worker.strategy import default as celery_strategy

from ..errors import InvalidMessage
from ..headers import INNER_MSG_ID
from ..model import NONCE_BYTES, Reason
from ..results import last_line
from ..settlement import MessageSettlement
from .guard import NONCE, Guard
from .outcomes import PutOff, Refused
from .task import guard_of

__all__ = ["GuardedRequest", "strategy"]

log = logging.getLogger(__name__)

#: Seconds after which a message is looked at again that could not be put off, or moved to its dead letter.
_AGAIN: Final = 4.0
#: Seconds after the call of `on_timeout` by which the pool has killed the child: SIGTERM, a tenth of a second, SIGKILL.
_KILLED_BY_THEN: Final = 0.5
#: The running consumer of each app's worker: its timer holds what no broker can hold.
_consumers: WeakKeyDictionary[Celery, Any] = WeakKeyDictionary()
#: What ends a task without Celery giving it up.
_NOT_GIVEN_UP: Final = (Retry, Ignore, Reject, Terminated, SystemExit, KeyboardInterrupt, MemoryError)


def strategy(task: Any, app: Celery, consumer: Any, **options: Any) -> Any:
    """Celery's own way of taking messages; the guard is made now, so that wrong options end the worker's start."""
    guard_of(task)
    _consumers[app] = consumer
    if consumer.pool.is_green or isinstance(consumer.pool, ThreadPool):
        # After a reconnect Celery would raise the prefetch count bit by bit from whatever thread acks. Two threads that
        # wait for AMQP's answer on one connection wait for ever: such a worker stood still, with all it had fetched.
        app.conf.worker_enable_prefetch_count_reduction = False
    return celery_strategy(task, app, consumer, **options)


class GuardedRequest(Request):
    """One delivery of a task's message, in the worker's parent. As Celery's own for a task without a scope."""

    acknowledged: bool

    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(message, *args, **kwargs)
        self._guard: Guard | None = guard_of(self._task)
        self._is_moved = False
        self._is_put_off = False
        self._nonce = b""
        self._renew_nonce()

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """The child raised, or died."""
        error = exc_info.exception
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if isinstance(error, PutOff):
            task_ready(self)
            return self._put_off(error.delay)
        if isinstance(error, (WorkerLostError, Terminated, SystemExit, KeyboardInterrupt)):
            self._abandon()  # not for a hard time limit: its child is killed only after this, and after on_timeout
        if self._is_given_up(error) and not self._move_to_dead_letter(error):
            task_ready(self)
            return self._put_off(_AGAIN)
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> Any:
        """A time limit was reached. At the hard one the child is about to be killed; `on_failure` was called before."""
        if self._guard is None or soft:
            return super().on_timeout(soft, timeout)
        # Once it is dead: while it lives its claim is nobody else's.
        _consumers[self._app].timer.call_after(_KILLED_BY_THEN, self._abandon, (self._nonce,))
        given_up = self.task.acks_late and self.task.acks_on_timeout
        if given_up and not self._is_put_off and not self._move_to_dead_letter(TimeLimitExceeded(timeout)):
            self._put_off(_AGAIN)
        if self._is_put_off:
            return task_ready(self)
        return super().on_timeout(soft, timeout)

    def _success_was_stored(self) -> Any:
        """Whether Celery may ack the message of a lost child, because of its task's result."""
        # That may be an older one's of the same task id; and the record knows better, once the message is back.
        if self._guard is not None and self.task.acks_late and self.task.reject_on_worker_lost:
            return False
        return super()._success_was_stored()

    # --- the claim ----------------------------------------------------------------------------------------

    def _renew_nonce(self) -> None:
        """Choose what the child claims with: then its claim can be ended from here, whatever becomes of it."""
        if self._guard is not None:
            self._nonce = os.urandom(NONCE_BYTES)
            self._request_dict["properties"] = {**self._request_dict["properties"], NONCE: self._nonce}

    def _abandon(self, nonce: bytes | None = None) -> None:
        """End the claim of a child that is dead. nonce: of an earlier run, if it is not the last one's."""
        if self._guard is None:
            return
        try:
            key = self._guard.key_of(self._args, self._kwargs, self._request_dict.get(INNER_MSG_ID))
        except InvalidMessage:
            return  # nothing was claimed for it
        self._guard.abandon(key, nonce or self._nonce)

    # --- the message --------------------------------------------------------------------------------------

    def _is_given_up(self, error: BaseException) -> bool:
        """True if Celery is about to ack, or to reject for good, what has not succeeded."""
        task = self.task
        if self._guard is None or not task.acks_late or isinstance(error, _NOT_GIVEN_UP):
            return False
        if isinstance(error, WorkerLostError):
            if not getattr(task, "retry_on_worker_lost", False):  # Celery 5.7
                return not task.reject_on_worker_lost
            return task.max_retries is not None and self._context.retries >= task.max_retries
        return not isinstance(error, TimeLimitExceeded) or bool(task.acks_on_timeout)

    def _move_to_dead_letter(self, error: BaseException) -> bool:
        """Put a copy of the message into the dead letter, confirmed. False: it is not there."""
        guard = self._guard
        if guard is None or guard.dead_letter is None or self._is_moved or self.acknowledged:
            return True
        reason, attempts = Reason.PERMANENT, 0
        if isinstance(error, Refused):
            reason, attempts = error.reason, error.attempts
        try:
            self._settlement(guard).rescue(reason, last_line(error), attempts)
        except Exception:  # whatever it is, the message must neither be lost nor stop the worker
            log.exception("could not move a message of scope %s to its dead letter, trying again later", guard.scope)
            return False
        self._is_moved = True
        return True

    def _put_off(self, delay: float) -> None:
        """Let the message come back after so many seconds, kept by the broker, or by this worker where it cannot."""
        if self.acknowledged or self._guard is None:
            return
        self._is_put_off = True
        try:
            self._settlement(self._guard).wait(delay)
        except Exception as error:  # noqa: BLE001 - its connection is gone, and the broker has it again; or it stays here
            log.warning("could not put off a message of scope %s (%s)", self._guard.scope, type(error).__name__)
            if self._message.channel.connection is not None and not self.acknowledged:
                self._hold(max(delay, _AGAIN))
        else:
            self.acknowledged = self.acknowledged or self._message.acknowledged

    def _settlement(self, guard: Guard) -> MessageSettlement:
        settle = _RequestSettlement(
            self._message, queue=None, scope=guard.scope, dead_letter=guard.dead_letter or "", park=self._hold
        )
        settle.request = self
        with contextlib.suppress(InvalidMessage):  # it has none
            settle.record = guard.key_of(self._args, self._kwargs, self._request_dict.get(INNER_MSG_ID))
        return settle

    def _hold(self, delay: float) -> None:
        """Keep the message unacked, as Celery keeps what has an ETA, and look again when it is due.

        On kombu's Redis transport this is the only way: its copies share a delivery tag, and whoever settles one takes
        the protection of the other, which may be running.
        """
        consumer = _consumers[self._app]
        qos = consumer.qos
        qos.increment_eventually()
        consumer.timer.call_after(delay, self._look_again, (consumer, qos))

    def _look_again(self, consumer: Any, qos: Any) -> None:
        qos.decrement_eventually()  # not the consumer's: after a reconnect that one has another, which never counted it
        if self._message.channel.connection is None:
            return  # the broker has it again
        self._is_put_off = False
        self._renew_nonce()  # of another claim: the last one may have been given up
        task_reserved(self)
        consumer.on_task_request(self)


class _RequestSettlement(MessageSettlement):
    """With Celery's ack, which finds its way to the thread that owns the channel."""

    __slots__ = ("request",)

    request: GuardedRequest

    def ack(self) -> None:
        """The message is done, or has a successor: the broker may forget it."""
        self.request.acknowledge()
