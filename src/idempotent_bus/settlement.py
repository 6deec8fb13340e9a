"""How a kombu delivery is answered: acked, put off, or moved to the dead letter. The broker keeps it throughout.

Putting off, by broker:

* a transport of ours: its own delay, one atomic step;
* RabbitMQ: a *confirmed successor*. The same message with the same inner-msg-id goes, with a confirm, into a durable
  delay queue that hands it back to the queue it came from, and only then the original is acked. A requeue would be
  a tight loop, and on quorum queues with a delivery limit it destroys the message (facts: 21 deliveries in 23 ms).
* kombu's other transports have no delay: `IdempotentConsumer` holds the message unacked and looks again when it is
  due; a bare callback can only pause for at most a second and requeue.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final
from weakref import WeakKeyDictionary

from kombu import Connection, Exchange, Queue
from kombu.message import Message

from .errors import HandlerAcknowledged, PublishError
from .headers import DEAD_AT, DEAD_ATTEMPTS, DEAD_ERROR, DEAD_REASON, DEAD_SCOPE, ORIGIN_QUEUE
from .model import Reason
from .producer import IdempotentProducer

__all__ = ["MessageSettlement", "forbid_acks", "origin_queue", "was_fetched_without_ack"]

log = logging.getLogger(__name__)

#: The longest pause of a bare callback on a transport without delays: longer, and its neighbours would wait for it.
_LONGEST_PAUSE: Final = 1.0

#: Delay queues come in powers of two, so that a queue has few of them and none blocks a shorter one behind a longer.
_SHORTEST_DELAY_MS: Final = 250

# What the broker adds on its own way; sending it on would feed it back as if it were the sender's.
_BROKER_HEADERS: Final = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "compression")
_PROPERTIES: Final = ("correlation_id", "reply_to", "type", "app_id", "message_id", "timestamp", "priority")

_producers: WeakKeyDictionary[Connection, IdempotentProducer] = WeakKeyDictionary()
_producers_lock = threading.Lock()


class MessageSettlement:
    """Answers for one kombu message. Use it from the thread that consumes.

    queue: where the message was consumed from, if that is known. park: called with a delay in seconds instead of
    pausing and requeueing, where the caller can hold the message and look again later.
    """

    __slots__ = ("_dead_letter", "_message", "_park", "_queue", "_scope")

    def __init__(
        self,
        message: Message,
        *,
        queue: str | None,
        scope: str,
        dead_letter: str,
        park: Callable[[float], None] | None = None,
    ) -> None:
        self._message = message
        self._queue = queue
        self._scope = scope
        self._dead_letter = dead_letter
        self._park = park

    def ack(self) -> None:
        # The class's own method: the instance's is out of reach of the handler while that runs (`forbid_acks`).
        type(self._message).ack(self._message)

    def wait(self, delay: float) -> None:
        message, channel = self._message, self._message.channel
        if getattr(channel, "idempotent_edge", False):
            channel.basic_delay(message.delivery_tag, delay)
            message._state = "REQUEUED"
        elif self._queue is None or not _is_amqp(channel):
            self._hold(delay)
        elif self._forward(_delay_queue(self._queue, delay), {}):
            self.ack()

    def dead_letter(self, reason: Reason, error: str, attempts: int) -> None:
        sent = self._forward(
            Queue(self._dead_letter, durable=True),
            {
                DEAD_REASON: reason.value,
                DEAD_ERROR: error[:500],
                DEAD_ATTEMPTS: attempts,
                DEAD_SCOPE: self._scope,
                DEAD_AT: int(time.time()),
                **({ORIGIN_QUEUE: self._queue} if self._queue is not None else {}),
            },
        )
        if not sent:
            return
        log.warning("dead-lettered a message of scope %s to %s: %s", self._scope, self._dead_letter, reason.value)
        if reason is not Reason.NO_ACK:
            self.ack()

    def _hold(self, delay: float) -> None:
        if self._park is not None:
            self._park(delay)
        else:
            time.sleep(min(delay, _LONGEST_PAUSE))
            type(self._message).requeue(self._message)

    def _forward(self, queue: Queue, more: Mapping[str, Any]) -> bool:
        """Send the same message, body and id untouched, to another queue. True when that is confirmed.

        False: the broker did not take it, or it is not known; the message stays here, unacked, and is looked at
        again. A second copy of it that may be there now is refused by its inner-msg-id or its record.
        """
        message = self._message
        headers = {name: value for name, value in message.headers.items() if not name.startswith(_BROKER_HEADERS)}
        # An expiration is left out on purpose: a message that waits or is dead must not vanish by it.
        properties = {name: message.properties[name] for name in _PROPERTIES if message.properties.get(name)}
        try:
            _producer_of(message.channel).forward(
                message.body,
                queue=queue,
                headers={**headers, **more},
                content_type=message.content_type,
                content_encoding=message.content_encoding,
                **properties,
            )
        except PublishError as error:
            log.error("could not move a message of scope %s to %s, holding it: %s", self._scope, queue.name, error)
            self._hold(_LONGEST_PAUSE)
            return False
        return True


def _delay_queue(queue: str, delay: float) -> Queue:
    milliseconds = _SHORTEST_DELAY_MS
    while milliseconds < delay * 1000:
        milliseconds *= 2
    return Queue(
        f"{queue}.wait.{milliseconds}",
        exchange=Exchange(""),
        durable=True,
        queue_arguments={
            # Only quorum queues hand a message on with a confirm (at-least-once); a classic one may drop it then.
            "x-queue-type": "quorum",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
            "x-message-ttl": milliseconds,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": queue,
        },
    )


def _is_amqp(channel: Any) -> bool:
    return bool(channel.connection.client.transport.driver_type == "amqp")


def _producer_of(channel: Any) -> IdempotentProducer:
    """One producer for each of the user's connections; it sends over a connection of its own."""
    connection = channel.connection.client
    with _producers_lock:
        producer = _producers.get(connection)
        if producer is None:
            # A clone, since a producer that held the connection itself would keep its own entry here alive.
            producer = _producers[connection] = IdempotentProducer(connection.clone())
        return producer


def origin_queue(message: Message) -> str | None:
    """The queue that a message was consumed from, or None where kombu does not tell.

    AMQP's delivery info has only the exchange and the routing key. The consumer tag leads to kombu's Consumer, which
    knows the queue; on a virtual transport the channel's own consumers do, if only one of them fits.
    """
    channel, info = message.channel, message.delivery_info
    queue = info.get("queue")
    if isinstance(queue, str):
        return queue
    tag = info.get("consumer_tag")
    if tag is not None:
        consumer = getattr(getattr(channel, "callbacks", {}).get(tag), "__self__", None)
        for name, active in getattr(consumer, "_active_tags", {}).items():
            if active == tag:
                return str(name)
    active_queues = set(getattr(channel, "_active_queues", ()))
    if len(active_queues) == 1:
        return str(active_queues.pop())
    if active_queues:
        routed = active_queues.intersection(channel._lookup(info.get("exchange"), info.get("routing_key"), ""))
        if len(routed) == 1:
            return str(routed.pop())
    return None


def was_fetched_without_ack(message: Message) -> bool:
    """True if the consumer was opened with no_ack=True: the broker has forgotten the message already."""
    channel = message.channel
    without_ack = channel.no_ack_consumers
    if without_ack is not None:
        return message.delivery_info.get("consumer_tag") in without_ack
    delivered = getattr(channel.qos, "_delivered", None)
    return delivered is not None and message.delivery_tag not in delivered


class forbid_acks(contextlib.AbstractContextManager[None]):  # noqa: N801 - reads as a verb: `with forbid_acks(...)`
    """Within it the message's ack, reject and requeue raise HandlerAcknowledged: they are not the handler's to call."""

    _NAMES = ("ack", "reject", "requeue")

    def __init__(self, message: Message) -> None:
        self._message = message

    def __enter__(self) -> None:
        for name in self._NAMES:
            setattr(self._message, name, _refuse)

    def __exit__(self, *_: object) -> None:
        for name in self._NAMES:
            with contextlib.suppress(AttributeError):
                delattr(self._message, name)


def _refuse(*_: Any, **__: Any) -> None:
    raise HandlerAcknowledged(
        "a guarded handler must not ack, reject or requeue: return when the business has succeeded (or, with "
        "manual=True, call current_execution().complete()), and raise when it has not; the library acks after that"
    )
