"""The lower half over kombu: a decorator for callbacks, and a consumer that owns its channel and its window.

`@idempotent_consumer` makes a kombu callback that checks the business id against a store before the handler runs
and acks only after it succeeded. It works wherever kombu takes a callback: `Consumer(callbacks=[...])`,
`ConsumerMixin`, on functions and on methods. A bare callback is a window of one message; `IdempotentConsumer` claims
all messages that prefetch has already brought in one round trip. Both take the same path through `execution.py`.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from kombu import Connection, Consumer, Queue
from kombu.message import Message

from .errors import ConfigurationError, InvalidBizId, InvalidBody, InvalidMessage
from .execution import Ended, Ending, Executor, Settlement, Work
from .headers import INNER_MSG_ID as INNER_MSG_ID_HEADER
from .headers import REDRIVE
from .hooks import Step, direct
from .identity import (
    INNER_MSG_ID,
    BizIdSpec,
    FingerprintSpec,
    canonical_biz_id,
    check_scope,
    extract_biz_id,
    fingerprint,
    record_key,
)
from .model import Reason
from .policy import DAY, Backoff, Policy
from .settlement import MessageSettlement, forbid_acks, origin_queue, was_fetched_without_ack
from .stores import StoreSource, store_source

__all__ = ["IdempotentConsumer", "IdempotentHandler", "WorkExecutor", "idempotent_consumer"]

log = logging.getLogger(__name__)

Handler = Callable[..., Any]


class WorkExecutor(Protocol):
    """What runs the work: `execution.Executor` with a dedup store, or the inbox's with a transaction."""

    policy: Policy

    def handle(self, work: Work) -> Ending: ...

    def handle_window(self, works: Sequence[Work]) -> list[Ending]: ...


class IdempotentHandler:
    """A guarded handler: a kombu callback `(body, message)`. Made by a decorator, see `idempotent_consumer`.

    Calling it settles the message whatever the handler does, and returns the handler's result, or the stored one for
    a duplicate, or None where nothing ran. `__wrapped__` is the plain handler, for unit tests.

    Raises ConfigurationError if the consumer was opened with no_ack=True, and the broker's connection errors; in
    the latter case nothing was settled, and the broker delivers the message again.
    """

    def __init__(
        self,
        handler: Handler,
        executor: WorkExecutor,
        *,
        scope: str,
        biz_id: BizIdSpec,
        fingerprint: FingerprintSpec,
        dead_letter: str | None,
        owner: Any = None,
    ) -> None:
        if not (isinstance(biz_id, str) and biz_id) and not callable(biz_id) and biz_id is not INNER_MSG_ID:
            raise ConfigurationError(
                "biz_id must be a path such as 'payment_id', a function of the body, or INNER_MSG_ID"
            )
        functools.update_wrapper(self, handler)
        self.scope = check_scope(scope)
        self.dead_letter = dead_letter if dead_letter is not None else f"{scope}.dead"
        self.executor = executor
        self._handler = handler
        self._biz_id = biz_id
        self._fingerprint = fingerprint
        self._owner = owner

    def __get__(self, instance: Any, owner: type | None = None) -> IdempotentHandler:
        if instance is None:
            return self
        return IdempotentHandler(
            self._handler,
            self.executor,
            scope=self.scope,
            biz_id=self._biz_id,
            fingerprint=self._fingerprint,
            dead_letter=self.dead_letter,
            owner=instance,
        )

    def __call__(self, body: Any, message: Message) -> Any:
        if not isinstance(message, Message):
            raise ConfigurationError(
                f"{self.scope}: a guarded handler is called by kombu with (body, message); "
                "to call the plain function, in a test for instance, use its __wrapped__"
            )
        settle = self.settlement(message, origin_queue(message))
        if was_fetched_without_ack(message):
            # The broker has forgotten it already; the dead letter is the only place where it is not lost.
            settle.dead_letter(Reason.NO_ACK, "the consumer was opened with no_ack=True", 0)
            raise ConfigurationError(
                f"{self.scope}: the consumer was opened with no_ack=True, so the broker forgets a message before its "
                f"handler has run. Open it with no_ack=False. This message was moved to {self.dead_letter}."
            )
        work = self.work(body, message, settle)
        return None if work is None else self.executor.handle(work).value

    def settlement(
        self, message: Message, queue: str | None, park: Callable[[float], None] | None = None
    ) -> MessageSettlement:
        """How this message will be answered."""
        return MessageSettlement(message, queue=queue, scope=self.scope, dead_letter=self.dead_letter, park=park)

    def work(self, body: Any, message: Message, settle: Settlement) -> Work | None:
        """The message as work for the core; None if it was refused, and is in the dead letter."""
        headers = message.headers
        try:
            inner_msg_id = headers.get(INNER_MSG_ID_HEADER)
            if self._biz_id is INNER_MSG_ID:
                if inner_msg_id is None:
                    raise InvalidBizId(f"the message has no header {INNER_MSG_ID_HEADER!r}, which is this scope's id")
                biz_id = canonical_biz_id(inner_msg_id)
            else:
                biz_id = extract_biz_id(self._biz_id, body)  # type: ignore[arg-type]  # INNER_MSG_ID is handled above
            digest = fingerprint(body, self._fingerprint)
            redrive = headers.get(REDRIVE, 0)
            if not isinstance(redrive, int):
                raise InvalidMessage(f"the header {REDRIVE!r} is not a number")
        except InvalidMessage as error:
            settle.dead_letter(Reason.INVALID, str(error), 0)
            return None
        return Work(
            scope=self.scope,
            biz_id=biz_id,
            key=record_key(self.scope, biz_id),
            run=functools.partial(self._run, body, message),
            settle=settle,
            fingerprint=digest,
            inner_msg_id=inner_msg_id,
            redelivered=bool(message.delivery_info.get("redelivered")),
            redrive=redrive,
        )

    def _run(self, body: Any, message: Message, *more: Any) -> Any:
        with forbid_acks(message):
            if self._owner is None:
                return self._handler(body, message, *more)
            return self._handler(self._owner, body, message, *more)


def idempotent_consumer(
    store: StoreSource,
    *,
    scope: str,
    biz_id: BizIdSpec,
    fingerprint: FingerprintSpec = True,
    manual: bool = False,
    lease: float = 60.0,
    retention: float = 7 * DAY,
    max_attempts: int = 8,
    backoff: Backoff = Backoff(),  # noqa: B008 - frozen
    permanent: tuple[type[BaseException], ...] = (),
    busy_delay: float = 1.0,
    dead_letter: str | None = None,
    step: Step = direct,
) -> Callable[[Handler], IdempotentHandler]:
    """Run the handler once for each business id, and ack after it succeeded.

    store: a Store, a URL for `open_store`, or a function that gives a Store; opened at its first use, per process.
    scope: the name of the business scenario within which a biz-id is unique; two consumers of one message need two.
    biz_id: where the id is: a path into the body ("payment_id", "order.id"), a function of the body, or INNER_MSG_ID.
    fingerprint: True compares the whole body of a copy with the first, names compare those fields, False nothing;
        the same biz-id with another fingerprint is a conflict and goes to the dead letter.
    manual: returning is not success; the handler calls `current_execution().complete(result)`.
    lease, retention, max_attempts, backoff, permanent, busy_delay: see `Policy`; durations in seconds.
    dead_letter: the name of a queue; `<scope>.dead` if not given.
    step: performs the named outside steps, for fault injection.

    Raises InvalidScope or ConfigurationError at once if something cannot be right.
    """
    policy = Policy(
        lease=lease,
        retention=retention,
        max_attempts=max_attempts,
        backoff=backoff,
        busy_delay=busy_delay,
        permanent=permanent,
    )
    executor = Executor(store_source(store), policy, manual=manual, step=step)

    def decorate(handler: Handler) -> IdempotentHandler:
        return IdempotentHandler(
            handler, executor, scope=scope, biz_id=biz_id, fingerprint=fingerprint, dead_letter=dead_letter
        )

    return decorate


# --- the window ---------------------------------------------------------------------------------------


#: A window is kept so small that it is through in about this many seconds: a slow handler shrinks it to one message,
#: so that it never holds claims that others could run.
_WINDOW_SECONDS: Final = 0.25
_LONGEST_RECONNECT_PAUSE: Final = 5.0

_Arrived = tuple[IdempotentHandler, str, Message]


class IdempotentConsumer:
    """Consumes queues over a channel of its own, with a window of messages at a time, until stopped or idle.

    connection: a kombu Connection; it is cloned, so that nobody else's consumers are run from here.
    handlers: which guarded handler takes which queue. The queues are declared.
    prefetch: how many unacked messages the broker may have on their way to this consumer.

    `run` belongs to one thread; `stop` may be called from any thread or a signal handler. `endings` counts what
    became of the deliveries. Connection errors are ridden out: reconnecting, with a pause of at most 5 seconds.
    """

    def __init__(
        self,
        connection: Connection,
        handlers: Mapping[Queue, IdempotentHandler],
        *,
        prefetch: int = 100,
        accept: Sequence[str] | None = None,
    ) -> None:
        if not handlers:
            raise ConfigurationError("IdempotentConsumer needs at least one queue with its guarded handler")
        if prefetch < 1:
            raise ConfigurationError("prefetch must be at least 1: without a bound a dead worker takes all with it")
        for queue, handler in handlers.items():
            if not isinstance(queue, Queue) or not isinstance(handler, IdempotentHandler):
                raise ConfigurationError(
                    "handlers maps a kombu Queue to a function decorated with @idempotent_consumer "
                    "or @transactional_consumer"
                )
        self.endings: Counter[Ended] = Counter()
        self._connection = connection
        self._handlers = dict(handlers)
        self._prefetch = prefetch
        self._accept = accept
        self._stopped = threading.Event()
        self._reset()

    def _reset(self) -> None:
        self._arrived: list[_Arrived] = []
        self._parked: list[tuple[float, int, _Arrived]] = []
        self._order = itertools.count()
        self._seconds_each = 0.0

    def stop(self) -> None:
        """Let `run` return after the handler that is running now; what has not started goes back to the broker."""
        self._stopped.set()

    def run(self, *, idle_timeout: float | None = None) -> int:
        """Consume until `stop`, or until nothing arrived for `idle_timeout` seconds. Returns how many were settled."""
        self._stopped.clear()
        before = self.endings.total()
        pause = 0.1
        quiet_since = time.monotonic()
        while not self._stopped.is_set():
            self._reset()
            connection = self._connection.clone()
            try:
                connection.ensure_connection(max_retries=None, callback=self._check_stopped, interval_max=2)
                with connection:
                    quiet_since = self._consume(connection, idle_timeout, quiet_since)
                return self.endings.total() - before
            except _Stopped:
                break
            except (
                OSError,
                *connection.recoverable_connection_errors,
                *connection.recoverable_channel_errors,
            ) as error:
                log.warning("consumer lost its connection (%s), reconnecting", type(error).__name__)
                self._stopped.wait(pause)
                pause = min(pause * 2, _LONGEST_RECONNECT_PAUSE)
        return self.endings.total() - before

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise _Stopped

    def _consume(self, connection: Connection, idle_timeout: float | None, quiet_since: float) -> float:
        channel = connection.channel()
        channel.basic_qos(0, self._prefetch, False)
        consumers = [
            Consumer(
                channel,
                [queue],
                on_message=functools.partial(self._on_message, handler, queue.name),
                on_decode_error=functools.partial(self._on_decode_error, handler, queue.name),
                accept=self._accept,
                no_ack=False,
            )
            for queue, handler in self._handlers.items()
        ]
        for consumer in consumers:
            consumer.consume()
        while not self._stopped.is_set():
            wait = 1.0
            if self._parked:
                wait = min(wait, max(0.0, self._parked[0][0] - time.monotonic()))
            if idle_timeout is not None:
                wait = min(wait, max(0.0, quiet_since + idle_timeout - time.monotonic()))
            self._gather(connection, wait)
            now = time.monotonic()
            while self._parked and self._parked[0][0] <= now:
                self._arrived.append(heapq.heappop(self._parked)[2])
            if self._arrived:
                self._handle_arrived()
                quiet_since = time.monotonic()
            elif idle_timeout is not None and now - quiet_since >= idle_timeout and not self._parked:
                break
        for consumer in consumers:
            consumer.cancel()
        channel.close()  # what is here and not settled goes back to the broker
        return quiet_since

    def _gather(self, connection: Connection, wait: float) -> None:
        """Wait for a message, then take what else has already arrived, up to the window."""
        window = self._window()
        try:
            connection.drain_events(timeout=max(wait, 0.001))
            while len(self._arrived) < window:
                connection.drain_events(timeout=0)
        except (socket.timeout, TimeoutError):  # noqa: UP041 - not the same class in Python 3.10's ssl module
            pass

    def _window(self) -> int:
        if not self._seconds_each:
            return self._prefetch
        return max(1, min(self._prefetch, int(_WINDOW_SECONDS / self._seconds_each)))

    def _on_message(self, handler: IdempotentHandler, queue: str, message: Message) -> None:
        self._arrived.append((handler, queue, message))

    def _on_decode_error(self, handler: IdempotentHandler, queue: str, message: Message, error: Exception) -> None:
        settle = handler.settlement(message, queue)
        settle.dead_letter(Reason.INVALID, f"cannot be decoded: {type(error).__name__}", 0)
        self.endings[Ended.DEAD] += 1

    def _handle_arrived(self) -> None:
        arrived, self._arrived = self._arrived, []
        started = time.monotonic()
        handled = 0
        window = self._window()
        for handler, same in itertools.groupby(arrived, key=lambda entry: entry[0]):
            works = [work for entry in same if (work := self._work(entry)) is not None]
            for begin in range(0, len(works), window):
                endings = handler.executor.handle_window(works[begin : begin + window])
                self.endings.update(ending.how for ending in endings)
                handled += len(endings)
                if any(ending.how is Ended.IN_DOUBT for ending in endings):
                    self._stopped.wait(handler.executor.policy.busy_delay)  # the store is down: do not spin on it
        if handled:
            each = (time.monotonic() - started) / handled
            self._seconds_each = each if not self._seconds_each else 0.7 * self._seconds_each + 0.3 * each

    def _work(self, entry: _Arrived) -> Work | None:
        handler, queue, message = entry
        settle = handler.settlement(message, queue, functools.partial(self._park, entry))
        try:
            body = message.decode()
        except Exception as error:  # noqa: BLE001 - a body that cannot be decoded must neither be lost nor end the consumer
            invalid = InvalidBody(f"cannot be decoded: {type(error).__name__}")
            settle.dead_letter(Reason.INVALID, str(invalid), 0)
            work = None
        else:
            work = handler.work(body, message, settle)
        if work is None:
            self.endings[Ended.DEAD] += 1
        return work

    def _park(self, entry: _Arrived, delay: float) -> None:
        heapq.heappush(self._parked, (time.monotonic() + delay, next(self._order), entry))


class _Stopped(Exception):
    """Not an error: it ends the wait for a connection."""
