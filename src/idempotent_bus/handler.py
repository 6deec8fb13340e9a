"""The guarded handler: a kombu callback that runs once for each business id, made by a decorator.

It works wherever kombu takes a callback: `Consumer(callbacks=[...])`, `ConsumerMixin`, on functions and on methods. A
bare callback is a window of one message; `IdempotentConsumer` gives a handler all that has arrived.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol

from kombu.message import Message
from typing_extensions import ParamSpec, TypeVar

from .abandoned import OnAbandoned
from .admission import MAX_BODY, Admission
from .errors import (
    ConfigurationError,
    InvalidMessage,
    Permanent,
    PublishError,
    Transient,
    Untrusted,
)
from .events import Listener, notifier
from .executor import Executor
from .home import HandedOver, HomeThread
from .hooks import Step, direct
from .identity import (
    BizIdSpec,
    FingerprintSpec,
)
from .kombu_message import decoded
from .model import Reason
from .policy import DAY, Backoff, Policy
from .results import MAX_RESULT_BYTES
from .settlement import MessageSettlement, came_back, forbid_acks, was_fetched_without_ack
from .signing import Trust
from .stores import StoreSource, store_source
from .work import Ended, Ending, Settlement, Work

__all__ = ["IdempotentHandler", "WorkExecutor", "check_plain", "idempotent_consumer"]

# With defaults, so that a plain `IdempotentHandler` can be written where the handler's own types do not matter.
P = ParamSpec("P", default=...)
R = TypeVar("R", default=Any)
HandlerP = ParamSpec("HandlerP")
HandlerR = TypeVar("HandlerR")


class WorkExecutor(Protocol):
    """What runs the work: `executor.Executor` with a dedup store, or the inbox's with a transaction."""

    policy: Policy

    def handle(self, work: Work) -> Ending:
        """Handle one delivery and settle it."""
        ...

    def handle_window(self, works: Sequence[Work]) -> list[Ending]:
        """Handle and settle several; an error that comes out while they are gone through ends it."""
        ...

    def refuse(self, scope: str, settle: Settlement, reason: Reason, error: str) -> Ending:
        """Dead-letter a message that has no usable identity."""
        ...


class IdempotentHandler(Generic[P, R]):
    """A guarded handler: a kombu callback `(body, message)`. Made by a decorator, see `idempotent_consumer`.

    Calling it settles the message whatever the handler does, and returns the handler's result, or the stored one for
    a duplicate, or None where nothing ran. `__wrapped__` is the plain handler, for unit tests. Give
    `on_decode_error=handler.on_decode_error` to kombu's Consumer too, or a body that cannot be decoded ends its loop.

    Raises ConfigurationError if the broker had forgotten the message before this call (no_ack=True, or another
    callback has settled it), and the broker's connection errors; in the latter case nothing was settled, and the broker
    delivers the message again.
    """

    __wrapped__: Callable[P, R]

    def __init__(
        self,
        handler: Callable[P, R],
        executor: WorkExecutor,
        *,
        scope: str,
        biz_id: BizIdSpec,
        fingerprint: FingerprintSpec,
        dead_letter: str | None,
        tenant: str = "",
        trust: Trust | None = None,
        max_body: int | None = MAX_BODY,
    ) -> None:
        if dead_letter is not None and not (isinstance(dead_letter, str) and dead_letter):
            raise ConfigurationError("dead_letter must be the name of a queue")
        self._admission = Admission(scope, biz_id, fingerprint, tenant, trust, max_body)
        check_plain(handler)
        functools.update_wrapper(self, handler)
        self.scope = scope
        self.dead_letter = dead_letter if dead_letter is not None else f"{scope}.dead"
        self.executor = executor
        self._handler = handler
        self._homes = threading.local()

    @property
    def max_body(self) -> int | None:
        """The longest body that is looked at, in bytes; None: no limit."""
        return self._admission.max_body

    def __get__(self, instance: Any, owner: type | None = None) -> IdempotentHandler[P, R]:
        # As the plain handler would be bound: a function to the instance, a classmethod to its class.
        bind = getattr(type(self._handler), "__get__", None)
        bound = self._handler if bind is None else bind(self._handler, instance, owner)
        if bound is self._handler:
            return self
        handler = copy.copy(self)
        handler._handler = bound
        functools.update_wrapper(handler, bound)
        handler.__wrapped__ = getattr(bound, "__func__", bound)
        return handler

    def __call__(self, body: Any, message: Message) -> R | None:
        value: R | None = self.handle(body, message).value
        return value

    def handle(self, body: Any, message: Message) -> Ending:
        """As calling it, but says how it ended: `Ending.how` tells a replay from a first run."""
        if not isinstance(message, Message):
            raise ConfigurationError(
                f"{self.scope}: a guarded handler is called by kombu with (body, message); "
                "to call the plain function, in a test for instance, use its __wrapped__"
            )
        self.settle_pending()
        settle = self.settlement(message)
        if message.acknowledged or was_fetched_without_ack(message):
            self._refuse_forgotten(message, settle)
        if settle.renew():
            return Ending(Ended.BUSY)
        work = self.work(body, message, settle)
        if work is None:
            return Ending(Ended.DEAD)
        work.settle = HandedOver(
            settle,
            self._home(),
            is_live=functools.partial(_is_open, message.channel),
            patience=self.executor.policy.lease,
        )
        return self.executor.handle(work)

    def settle_pending(self) -> None:
        """For a bare kombu callback with `manual=True`: ack what other threads have completed. In the consuming thread.

        Each call of the handler does it too. If neither happens, the message stays unacked until its channel closes;
        then the broker delivers it again, and its record answers. `IdempotentConsumer` and the worker do it by
        themselves.
        """
        self._home().run_pending()

    def _home(self) -> HomeThread:
        """The mailbox of this thread."""
        home: HomeThread | None = getattr(self._homes, "home", None)
        if home is None:
            home = self._homes.home = HomeThread()
        return home

    def on_decode_error(self, message: Message, error: Exception) -> None:
        """For kombu's Consumer: a body that cannot be decoded goes to the dead letter as it came."""
        self.refuse_undecodable(error, self.settlement(message))

    def settlement(
        self,
        message: Message,
        queue: str | None = None,
        park: Callable[[float], None] | None = None,
        ack: Callable[[Message], None] | None = None,
    ) -> MessageSettlement:
        """How this message will be answered. queue: where it came from, if the caller knows."""
        return MessageSettlement(
            message, queue=queue, scope=self.scope, dead_letter=self.dead_letter, park=park, ack=ack
        )

    def refuse_undecodable(self, error: Exception, settle: Settlement) -> Ending:
        """Move a message whose body cannot be decoded to the dead letter."""
        return self.executor.refuse(self.scope, settle, Reason.INVALID, f"cannot be decoded: {type(error).__name__}")

    def receive(self, message: Message, settle: Settlement) -> Work | None:
        """A message as it arrived, as work for the core; None if it was refused, and is in the dead letter.

        What is too large or from nobody that is trusted is not even decoded.
        """
        try:
            producer = self._admission.producer_of(message)
        except InvalidMessage as error:
            self._refuse(error, settle)
            return None
        try:
            body = decoded(message)
        except Exception as error:  # noqa: BLE001 - a body that cannot be decoded must neither be lost nor end the consumer
            self.refuse_undecodable(error, settle)
            return None
        return self._work(body, message, settle, producer)

    def work(self, body: Any, message: Message, settle: Settlement) -> Work | None:
        """The same for a message whose body was decoded before."""
        try:
            producer = self._admission.producer_of(message)
        except InvalidMessage as error:
            self._refuse(error, settle)
            return None
        return self._work(body, message, settle, producer)

    def _work(self, body: Any, message: Message, settle: Settlement, producer: str) -> Work | None:
        try:
            who = self._admission.identify(body, message, producer)
        except InvalidMessage as error:
            self._refuse(error, settle)
            return None
        if isinstance(settle, MessageSettlement):  # for its dead letter
            settle.record, settle.fingerprint = who.key, who.fingerprint
        return Work(
            scope=self.scope,
            biz_id=who.biz_id,
            key=who.key,
            run=functools.partial(self._run, body, message),
            settle=settle,
            fingerprint=who.fingerprint,
            inner_msg_id=who.inner_msg_id,
            redelivered=came_back(message, who.redrive),
            redrive=who.redrive,
            published_at=who.published_at,
        )

    def _refuse(self, error: InvalidMessage, settle: Settlement) -> None:
        reason = Reason.UNTRUSTED if isinstance(error, Untrusted) else Reason.INVALID
        self.executor.refuse(self.scope, settle, reason, str(error))

    def _run(self, body: Any, message: Message, *more: Any) -> R:
        forbid_acks(message)
        try:
            value: R = self._handler(body, message, *more)  # type: ignore[call-arg]  # P is what kombu gives
        except _cancelled() as error:
            # No Exception, but it is the end of a task in the handler's own event loop, not that of this process.
            raise Transient("the handler was cancelled") from error
        if value is not None and (inspect.isawaitable(value) or inspect.isgenerator(value)):
            if not isinstance(value, type) and hasattr(value, "close"):
                value.close()
            raise Permanent("the handler returned something that has yet to be awaited or iterated: nothing was done")
        return value

    def _refuse_forgotten(self, message: Message, settle: MessageSettlement) -> None:
        # The broker has forgotten it, or will: the dead letter is the only place where it is not lost.
        if message.acknowledged:
            why = (
                "another callback has acked the message, or put it off, before this one was called. "
                "Give each handler, or each scope, a queue of its own"
            )
        else:
            why = (
                "the consumer was opened with no_ack=True, so the broker forgets a message before its handler has run. "
                "Open it with no_ack=False"
            )
        try:
            settle.rescue(Reason.NO_ACK, "the broker had forgotten the message before its handler was called", 0)
        except PublishError as error:
            raise ConfigurationError(f"{self.scope}: {why}. This message could not be saved: {error}") from error
        raise ConfigurationError(f"{self.scope}: {why}. This message was moved to {self.dead_letter}.")


def _cancelled() -> type[BaseException] | tuple[()]:
    """asyncio's CancelledError, which nobody can have raised who has not imported it."""
    asyncio = sys.modules.get("asyncio")
    return () if asyncio is None else asyncio.CancelledError


def _is_open(channel: Any) -> bool:
    return channel.connection is not None and not getattr(channel, "closed", False)


def check_plain(handler: Any) -> None:
    """Raise ConfigurationError for what does nothing, or not yet, when it is called."""
    plain = getattr(handler, "__func__", handler)  # of a method, a classmethod, a staticmethod
    while isinstance(plain, functools.partial):
        plain = plain.func
    if not callable(plain):
        raise ConfigurationError(f"a guarded handler must be a function, not {type(plain).__name__}")
    if isinstance(plain, IdempotentHandler):
        raise ConfigurationError("the handler is guarded already: one scope for each handler")
    code = plain if inspect.isroutine(plain) or inspect.isclass(plain) else type(plain).__call__
    if inspect.iscoroutinefunction(code) or inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
        raise ConfigurationError(
            "a guarded handler must be a plain function: calling a coroutine or generator function runs nothing, and "
            "the message would be acked without its effect"
        )


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
    backoffs: Mapping[type[BaseException], Backoff] | None = None,
    on_abandoned: OnAbandoned = "rerun",
    in_doubt: tuple[type[BaseException], ...] = (),
    max_result: int = MAX_RESULT_BYTES,
    listener: Listener | None = None,
    tenant: str = "",
    trust: Trust | None = None,
    max_body: int | None = MAX_BODY,
    step: Step = direct,
) -> Callable[[Callable[HandlerP, HandlerR]], IdempotentHandler[HandlerP, HandlerR]]:
    """Run the handler once for each business id, and ack after it succeeded.

    store: a Store, a URL for `open_store`, or a function that gives a Store; opened at its first use, per process.
    scope: the name of the business scenario within which a biz-id is unique; two consumers of one message need two.
    biz_id: where the id is: a path into the body ("payment_id", "order.id"), a function of the body, or INNER_MSG_ID.
    fingerprint: True compares the whole body of a copy with the first, names compare those fields, False nothing;
        the same biz-id with another fingerprint is a conflict and goes to the dead letter.
    manual: returning is not success; `current_execution().complete(result)`, or `fail(reason)`, is called by the
        handler or, later, by another thread that it gave the execution to. Until then its lease is renewed.
    lease, retention, max_attempts, backoff, backoffs, permanent, busy_delay: see `Policy`; durations in seconds.
    on_abandoned: when a worker died in the middle of the handler: "rerun", "quarantine", or a probe; `abandoned.py`.
    in_doubt: exception classes after which nobody knows whether the effect happened; treated as abandoned.
    max_result: a result whose JSON has more bytes is not stored, and its duplicates get None.
    listener: is told what happens, see `events.py`.
    dead_letter: the name of a queue; `<scope>.dead` if not given. One that exists is taken as it is.
    tenant: whose records these are, where several customers share a scope and a store: each has its own. It comes from
        the configuration only, never from a message.
    trust: runs only what a producer of this list has signed; the rest goes to the dead letter, see `Trust`.
    max_body: bytes; a longer body goes to the dead letter, and `IdempotentConsumer` does not decode it. None: no limit.
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
        backoffs=backoffs or {},
        on_abandoned=on_abandoned,
        in_doubt=in_doubt,
    )
    executor = Executor(
        store_source(store), policy, manual=manual, notify=notifier(listener), max_result=max_result, step=step
    )

    def decorate(handler: Callable[HandlerP, HandlerR]) -> IdempotentHandler[HandlerP, HandlerR]:
        return IdempotentHandler(
            handler,
            executor,
            scope=scope,
            biz_id=biz_id,
            fingerprint=fingerprint,
            dead_letter=dead_letter,
            tenant=tenant,
            trust=trust,
            max_body=max_body,
        )

    return decorate
