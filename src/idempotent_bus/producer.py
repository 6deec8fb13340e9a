"""The upper half: one logical publish lands as one message, or the caller is told exactly what is not known."""

from __future__ import annotations

import functools
import inspect
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kombu import Connection, Exchange, Queue
from typing_extensions import ParamSpec, Self

from . import hooks
from .errors import ConfigurationError, PublishError, PublishUnknown
from .execution import current_execution
from .headers import DEDUPLICATION, INNER_MSG_ID
from .identity import BizIdSpec, extract_biz_id
from .model import Edge, Landing, Receipt
from .msgid import is_inner_msg_id, new_inner_msg_id, published_at
from .sending.amqp import AmqpLane
from .sending.outgoing import Outgoing, prepare
from .sending.resend import Known, NotConfirmed, ResendPolicy, Sends
from .sending.streaming import PublishManyError, publish_stream
from .sending.virtual import make_lane
from .signing import Signer

__all__ = ["IdempotentProducer", "PublishManyError", "ResendPolicy", "idempotent_producer"]

P = ParamSpec("P")


class IdempotentProducer:
    """Publishes over a private connection, waits for the broker's confirm, resends the same inner-msg-id in doubt.

    connection: a kombu Connection, a pool of connections or producers, or a URL; it is copied, and the copy is opened
        at the first publish. Queues and exchanges that were declared on the given connection are known here.
    exchange, routing_key, serializer, declare: defaults of `publish`.
    biz_id: a path or a function; a body without a valid id there is refused (InvalidBizId) before it is sent.
    confirm_timeout: seconds to wait for the confirm of one send.
    retry: how often and how long the same message is sent again.
    deduplication_header: for RabbitMQ's deduplication plugin, set its header to the inner-msg-id. It guarantees
        little: its cache is bounded, lives on one node and does not know quorum queues, and it notes an id before any
        queue has the message, so a message that was refused (a full queue) is refused again under the same id. It
        answers a duplicate as it answers a failure, by a nack or by a return, so the receipt's edge stays the
        consumer, nothing is ever reported as `duplicate`, and a resend that is answered so ends as PublishUnknown.
        publish_many then waits for each confirm in turn.
    signer: signs each publish, so that consumers can tell who sent it (`signing.py` says what that protects).
    step: performs each send; for fault injection.

    Safe for threads: one lock, so that publishes of several threads take turns, not during the pauses between
    resends. Safe after a fork: the child opens a connection of its own.
    """

    def __init__(
        self,
        connection: Connection | str | Any,
        *,
        exchange: Exchange | str | None = None,
        routing_key: str | None = None,
        serializer: str | None = None,
        biz_id: BizIdSpec | None = None,
        declare: Iterable[Any] = (),
        confirm_timeout: float = 5.0,
        retry: ResendPolicy | None = None,
        deduplication_header: bool = False,
        signer: Signer | None = None,
        step: hooks.Step = hooks.direct,
    ) -> None:
        if signer is not None and not isinstance(signer, Signer):
            raise ConfigurationError("signer must be a Signer")
        if confirm_timeout <= 0:
            raise ConfigurationError("confirm_timeout must be more than 0 seconds: a publish is never left unconfirmed")
        self._exchange = exchange
        self._routing_key = routing_key
        self._serializer = serializer
        self._biz_id = biz_id
        self._declare = tuple(declare)
        self._policy = ResendPolicy() if retry is None else retry
        self._signer = signer
        self._step = step
        self._lock = threading.Lock()
        self._lane = make_lane(connection, timeout=confirm_timeout, clock=self._policy.clock)
        self._deduplication_header = deduplication_header
        if deduplication_header and not isinstance(self._lane, AmqpLane):
            raise ConfigurationError("deduplication_header is for RabbitMQ's plugin, and this is another broker")
        # A stream has a connection of its own, so that single publishes need not wait for its end.
        self._stream_lock = threading.Lock()
        self._stream_lane = self._lane.twin() if isinstance(self._lane, AmqpLane) and not deduplication_header else None
        _producers.add(self)

    def publish(
        self,
        body: Any,
        *,
        exchange: Exchange | str | None = None,
        routing_key: str | None = None,
        headers: Mapping[str, Any] | None = None,
        inner_msg_id: str | None = None,
        once: str | None = None,
        declare: Iterable[Any] = (),
        serializer: str | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        compression: str | None = None,
        priority: int | None = None,
        expiration: float | None = None,
        biz_id: BizIdSpec | None = None,
        **properties: Any,
    ) -> Receipt:
        """Publish one message and return when the broker has it.

        inner_msg_id: resends that very message (take it from a PublishError or a Receipt); without it the message
            gets a fresh id. once: inside a guarded handler, a name for this publish: the id is derived from the
            execution and that name, so that a handler that is run again publishes the very same message again. To
            resend after an error use the error's inner_msg_id; in another thread, `execution.derived_id(name)`.
            expiration: seconds. Other keywords are message properties. An Exchange object is declared first, a name
            is not.

        The receipt says `duplicate` only for an id that was given or derived: a fresh one can only be met again by its
        own resend, and then this publish did land. Raises Unroutable, Rejected or PublishUnknown, never more than is
        known; InvalidBizId, InvalidBody, NoExecution or ConfigurationError before anything is sent.
        """
        outgoing = self._prepare(
            body,
            inner_msg_id=inner_msg_id,
            once=once,
            exchange=exchange,
            routing_key=routing_key,
            headers=headers,
            declare=declare,
            serializer=serializer,
            content_type=content_type,
            content_encoding=content_encoding,
            compression=compression,
            priority=priority,
            expiration=expiration,
            biz_id=biz_id,
            **properties,
        )
        return self._publish(outgoing, fresh=inner_msg_id is None and once is None)

    def publish_many(self, messages: Iterable[Any], *, window: int = 500, **options: Any) -> list[Receipt]:
        """Publish many messages; on AMQP up to `window` of them wait for their confirms at the same time.

        messages: bodies, or tuples (body, keywords of `publish`); a generator does too, a list is faster.
        options: keywords of `publish` for all of them. Returns the receipts in the order of the messages. Raises
        PublishManyError if one of them did not land; its `results` tells them apart. Several threads take turns.
        """
        if window < 1:
            raise ConfigurationError("window must be at least 1")
        if self._stream_lane is None:
            return self._publish_each(messages, options)
        with self._stream_lock:
            return publish_stream(
                (self._prepare(body, **keywords) for body, keywords in _each(messages, options)),
                self._stream_lane,
                window=window,
                # A generator may pause between two bodies: what it gave before must not wait in a buffer for that.
                gather=isinstance(messages, (list, tuple)),
                policy=self._policy,
                step=self._step,
            )

    def forward(
        self,
        body: bytes | str,
        *,
        queue: Queue,
        headers: Mapping[str, Any],
        content_type: str,
        content_encoding: str,
        exchange: str = "",
        declare: Iterable[Any] | None = None,
        **properties: Any,
    ) -> Receipt:
        """Send an existing message, body, headers and id untouched, to one queue, which is declared first.

        exchange: what leads to that queue by its name, in the end. declare: what is declared first in its place.
        Unlike `publish` it keeps the inner-msg-id that the headers bring, or that there is none. Returns and raises
        as `publish` does; a duplicate means that this queue has the message already.
        """
        known = headers.get(INNER_MSG_ID)
        outgoing = prepare(
            body,
            inner_msg_id=known,
            exchange=exchange,
            routing_key=queue.name,
            headers=headers,
            declare=(queue,) if declare is None else declare,
            serializer=None,
            content_type=content_type,
            content_encoding=content_encoding,
            compression=None,
            priority=properties.pop("priority", None),
            expiration=None,
            properties=properties,
        )
        return self._publish(outgoing, fresh=False)

    def close(self) -> None:
        """Close the private connection. A later publish opens it again."""
        with self._lock:
            self._lane.close()
        if self._stream_lane is not None:
            with self._stream_lock:
                self._stream_lane.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(
        self,
        body: Any,
        *,
        inner_msg_id: str | None = None,
        once: str | None = None,
        exchange: Exchange | str | None = None,
        routing_key: str | None = None,
        headers: Mapping[str, Any] | None = None,
        declare: Iterable[Any] = (),
        serializer: str | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        compression: str | None = None,
        priority: int | None = None,
        expiration: float | None = None,
        biz_id: BizIdSpec | None = None,
        **properties: Any,
    ) -> Outgoing:
        spec = self._biz_id if biz_id is None else biz_id
        if spec is not None and (isinstance(spec, str) or callable(spec)):  # else the inner-msg-id is the id
            extract_biz_id(spec, body)
        if once is not None:
            if inner_msg_id is not None:
                raise ConfigurationError("give once or inner_msg_id, not both: each of them says which message it is")
            if not isinstance(once, str) or not once:
                raise ConfigurationError("once must be a name for this publish, such as 'receipt'")
            inner_msg_id = current_execution().derived_id(once)
        elif inner_msg_id is None:
            inner_msg_id = new_inner_msg_id()
        elif not is_inner_msg_id(inner_msg_id):
            raise ConfigurationError("inner_msg_id must be one that a receipt, a publish error or an execution gave")
        if published_at(inner_msg_id) is None:
            properties.setdefault("timestamp", int(time.time()))  # which a derived id does not tell
        if self._deduplication_header:
            headers = {**(headers or {}), DEDUPLICATION: inner_msg_id}
        return prepare(
            body,
            inner_msg_id=inner_msg_id,
            exchange=self._exchange if exchange is None else exchange,
            routing_key=self._routing_key if routing_key is None else routing_key,
            headers=headers,
            declare=(*self._declare, *declare),
            serializer=self._serializer if serializer is None else serializer,
            content_type=content_type,
            content_encoding=content_encoding,
            compression=compression,
            priority=priority,
            expiration=expiration,
            properties=properties,
            signer=self._signer,
        )

    def _publish(self, outgoing: Outgoing, *, fresh: bool) -> Receipt:
        sends = Sends(self._policy)
        while True:
            try:
                landing, edge = self._send_once(outgoing, sends)
            except NotConfirmed as answer:
                failure = answer
                if self._deduplication_header:
                    failure = _as_the_plugin_means_it(answer, first=fresh and not sends.count)
                pause = sends.failed(failure)
                if pause is None:
                    raise sends.error(failure, outgoing.inner_msg_id or "") from answer.__cause__
            else:
                if fresh:
                    landing = Landing.LANDED
                return Receipt(outgoing.inner_msg_id or "", landing, edge, sends.count + 1)
            self._policy.sleep(pause)

    def _publish_each(self, messages: Iterable[Any], options: Mapping[str, Any]) -> list[Receipt]:
        results: list[Receipt | PublishError] = []
        reason: Exception | None = None
        try:
            for body, keywords in _each(messages, options):
                try:
                    results.append(self.publish(body, **keywords))
                except PublishError as error:
                    results.append(error)
                    reason = reason or error
                    if isinstance(error, PublishUnknown):  # the broker is away: the rest would fare no better
                        break
        except Exception as error:  # noqa: BLE001 - the caller's iterable or body: raised below, with the results
            reason = error
        if reason is not None:
            landed = sum(isinstance(result, Receipt) for result in results)
            text = f"{landed} of {len(results)} messages landed; the first that failed: {reason}"
            raise PublishManyError(text, results) from reason
        return [result for result in results if isinstance(result, Receipt)]

    def _send_once(self, outgoing: Outgoing, sends: Sends) -> tuple[Landing, Edge]:
        with self._lock:
            lane = self._lane
            try:
                return self._step(hooks.PUBLISH, lane.send, outgoing), lane.edge_of(outgoing)
            except Exception as error:
                failure = lane.judge(error)
                if failure is not None:
                    if failure is error:
                        raise
                    raise failure from error
                if sends.in_doubt:
                    text = f"an earlier send was not confirmed, and the last one raised {type(error).__name__}"
                    raise PublishUnknown(text, outgoing.inner_msg_id or "") from error
                raise
            except BaseException:  # a signal in mid-wait: the answer to this send must not meet the next one
                lane.discard()
                raise

    def _start_afresh_after_fork(self) -> None:
        self._lock = threading.Lock()  # another thread of the parent may hold the old one, for ever
        self._lane = self._lane.inherit()
        self._stream_lock = threading.Lock()
        if self._stream_lane is not None:
            self._stream_lane = self._stream_lane.inherit()


def idempotent_producer(
    connection: IdempotentProducer | Connection | str | Any,
    *,
    exchange: Exchange | str | None = None,
    routing_key: str | None = None,
    serializer: str | None = None,
    biz_id: BizIdSpec | None = None,
    declare: Iterable[Any] = (),
    confirm_timeout: float = 5.0,
    retry: ResendPolicy | None = None,
    signer: Signer | None = None,
    step: hooks.Step = hooks.direct,
) -> Callable[[Callable[P, Any]], Callable[P, Receipt]]:
    """Make a function whose return value is the body publish that body: calling it returns the receipt.

    connection: as IdempotentProducer takes it, or a producer to share; the rest as `publish` and IdempotentProducer
    take them (confirm_timeout, retry, signer and step are those of a shared producer). `__wrapped__` is the plain
    function.
    """
    if isinstance(connection, IdempotentProducer):
        producer = connection
    else:
        producer = IdempotentProducer(
            connection, confirm_timeout=confirm_timeout, retry=retry, signer=signer, step=step
        )
    entities = tuple(declare)

    def decorate(function: Callable[P, Any]) -> Callable[P, Receipt]:
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            raise ConfigurationError("@idempotent_producer wraps a plain function that returns the body")

        @functools.wraps(function)
        def publish(*args: P.args, **kwargs: P.kwargs) -> Receipt:
            return producer.publish(
                function(*args, **kwargs),
                exchange=exchange,
                routing_key=routing_key,
                serializer=serializer,
                biz_id=biz_id,
                declare=entities,
            )

        return publish

    return decorate


def _as_the_plugin_means_it(answer: NotConfirmed, *, first: bool) -> NotConfirmed:
    """A nack or a return where the deduplication plugin may be at work. first: no copy can have gone before it."""
    if answer.known not in (Known.REFUSED, Known.UNROUTABLE):
        return answer
    if first:
        text = f"{answer.text}; the deduplication plugin may refuse this id from now on, publish under a fresh one"
        return NotConfirmed(answer.known, text, final=True)
    text = f"{answer.text}, which may also be the deduplication plugin's answer to a copy that landed before"
    return NotConfirmed(Known.UNKNOWN, text, final=True)


def _each(messages: Iterable[Any], options: Mapping[str, Any]) -> Iterable[tuple[Any, dict[str, Any]]]:
    for message in messages:
        if isinstance(message, tuple) and len(message) == 2 and isinstance(message[1], dict):
            yield message[0], {**options, **message[1]}
        else:
            yield message, dict(options)


_producers: weakref.WeakSet[IdempotentProducer] = weakref.WeakSet()


def _start_afresh_after_fork() -> None:
    for producer in list(_producers):
        producer._start_afresh_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh_after_fork)
