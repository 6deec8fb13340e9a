"""How a kombu delivery is answered: acked, put off, or moved to the dead letter. The broker keeps it throughout.

Putting off, by broker:

* a transport of ours: its own delay, one atomic step;
* RabbitMQ: a *confirmed successor*. The same message with the same inner-msg-id goes, with a confirm, into a durable
  delay queue that hands it back to the queue it came from, and only then the original is acked. A requeue would be
  a tight loop, and on quorum queues with a delivery limit it destroys the message (facts: 21 deliveries in 23 ms);
* kombu's other transports have no delay: `IdempotentConsumer` holds the message unacked and looks again when it is
  due; a bare callback can only pause for at most a second and put the message back, behind its neighbours.

The dead letter is written with a confirm before the ack. On a transport of ours it goes past the edge: a message that
was moved back from the dead letter and fails again comes there with the same inner-msg-id, and a refusal would lose it.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final
from weakref import WeakKeyDictionary

from kombu import Connection, Exchange, Queue
from kombu.message import Message

from .errors import ConfigurationError, HandlerAcknowledged, PublishError, Unroutable
from .headers import DEAD_AT, DEAD_ATTEMPTS, DEAD_ERROR, DEAD_REASON, DEAD_SCOPE, ORIGIN_QUEUE
from .model import Reason
from .producer import IdempotentProducer

__all__ = ["MessageSettlement", "came_back", "forbid_acks", "let_go", "origin_queue", "was_fetched_without_ack"]

log = logging.getLogger(__name__)

#: The longest pause of a bare callback on a transport without delays: longer, and its neighbours would wait for it.
_LONGEST_PAUSE: Final = 1.0

#: Delay queues come in powers of two, so that a queue has few of them and none blocks a shorter one behind a longer.
_SHORTEST_DELAY_MS: Final = 250

#: What the broker adds on its own way; sent on, it would pile up, or (CC) bring copies into other queues.
_BROKER_HEADERS: Final = frozenset(
    {"x-deduplication-header", "x-death", "x-delivery-count", "x-acquired-count", "CC", "BCC"}
)
_BROKER_PREFIXES: Final = ("x-first-death-", "x-last-death-")
_DEATHS: Final = "x-death"
#: Only quorum queues count deliveries, and throw away what was delivered too often.
_DELIVERY_COUNT: Final = "x-delivery-count"
#: kombu's virtual transports whose `_put` returns when the broker has the message.
_STORED_WHEN_PUT: Final = frozenset({"memory", "redis", "sql"})
_PROPERTIES: Final = ("correlation_id", "reply_to", "type", "app_id", "message_id", "timestamp", "priority")


class MessageSettlement:
    """Answers for one kombu message. Use it from the thread that consumes.

    queue: where the message was consumed from, if that is known for sure. park: called with a delay in seconds instead
    of pausing and requeueing, where the caller can hold the message and look again later.
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
        """The message is done: the broker may forget it."""
        # The class's own method: the instance's is out of the handler's reach (`forbid_acks`).
        type(self._message).ack(self._message)

    def wait(self, delay: float) -> None:
        """Let the message come back no sooner than `delay` seconds from now."""
        message, channel = self._message, self._message.channel
        if getattr(channel, "idempotent_edge", False):
            channel.basic_delay(message.delivery_tag, delay)
            message._state = "REQUEUED"
            return
        if _is_amqp(channel):
            queue = self._origin()
            if queue is not None:
                try:
                    self._send(_delay_queue(queue, delay), {})
                except PublishError as error:
                    self._not_moved(f"{queue}.wait", error)
                else:
                    self.ack()
                return
        self._hold(delay)

    def dead_letter(self, reason: Reason, error: str, attempts: int) -> None:
        """Put the message into the dead letter; once that is confirmed, ack it."""
        try:
            self.rescue(reason, error, attempts)
        except (PublishError, ConfigurationError) as failure:
            # A wrongly set up dead letter must not stop the messages that are well.
            self._not_moved(self._dead_letter, failure)
        else:
            self.ack()

    def rescue(self, reason: Reason, error: str, attempts: int) -> None:
        """Put the message into the dead letter, without an ack. Raises if that is not confirmed."""
        queue = self._origin()
        headers = {
            DEAD_REASON: reason.value,
            DEAD_ERROR: error.encode(errors="replace").decode()[:500],
            DEAD_ATTEMPTS: attempts,
            DEAD_SCOPE: self._scope,
            DEAD_AT: int(time.time()),
        }
        if queue is not None:
            headers[ORIGIN_QUEUE] = queue
        channel = self._message.channel
        if getattr(channel, "idempotent_edge", False) or _driver_type(channel) in _STORED_WHEN_PUT:
            self._put(self._dead_letter, headers)
        else:
            self._send(_existing_queue(self._dead_letter), headers)
        log.warning("dead-lettered a message of scope %s to %s: %s", self._scope, self._dead_letter, reason.value)

    def _origin(self) -> str | None:
        if self._queue is None:
            self._queue = origin_queue(self._message)
        return self._queue

    def _not_moved(self, name: str, error: Exception) -> None:
        # The message stays here, unacked, and is looked at again. A second copy that may have got there all the same
        # is refused by its inner-msg-id or its record.
        log.error("could not move a message of scope %s to %s, holding it: %s", self._scope, name, error)
        self._hold(_LONGEST_PAUSE)

    def _hold(self, delay: float) -> None:
        message, channel = self._message, self._message.channel
        if self._park is not None:
            self._park(delay)
            return
        time.sleep(min(delay, _LONGEST_PAUSE))
        if _DELIVERY_COUNT in message.headers and _is_amqp(channel):
            log.error(
                "a message of scope %s stays unacked until its channel closes: requeueing it could exceed the delivery "
                "limit of its quorum queue, which destroys it; consume through kombu's Consumer",
                self._scope,
            )
            return
        queue = self._origin() if _driver_type(channel) == "redis" else None
        if queue is None:
            type(message).requeue(message)
        else:
            # kombu's Redis transport requeues at the head, where the next fetch takes it again at once: neighbours
            # would starve. Behind them first, and only then the ack.
            self._put(queue, {})
            self.ack()

    def _headers(self, more: Mapping[str, Any]) -> dict[str, Any]:
        message = self._message
        headers = {
            name: value
            for name, value in message.headers.items()
            if name not in _BROKER_HEADERS and not name.startswith(_BROKER_PREFIXES)
        }
        if not message.errors:
            headers.pop("compression", None)  # kombu has decompressed the body; if it could not, that is as it came
        headers.update(more)
        return headers

    def _content(self) -> tuple[Any, str, str]:
        """The body as it came, and how kombu reads it: what is not said is said here, as kombu would take it."""
        message = self._message
        body, encoding = message.body, message.content_encoding or "utf-8"
        if isinstance(body, str):  # py-amqp decodes what it can
            try:
                body = body.encode("utf-8" if encoding == "binary" else encoding)
            except (LookupError, UnicodeError):
                body = body.encode(errors="surrogatepass")
        return b"" if body is None else body, message.content_type or "application/data", encoding

    def _properties(self) -> dict[str, Any]:
        # An expiration is left out on purpose: a message that waits or is dead must not vanish by it.
        properties = self._message.properties
        return {name: properties[name] for name in _PROPERTIES if properties.get(name)}

    def _send(self, queue: Queue, more: Mapping[str, Any]) -> None:
        """Send the same message, body and id untouched, to another queue, and wait for the confirm."""
        body, content_type, encoding = self._content()
        send = functools.partial(
            _producer_of(self._message.channel).forward,
            body,
            headers=self._headers(more),
            content_type=content_type,
            content_encoding=encoding,
            **self._properties(),
        )
        try:
            send(queue=queue)
        except Unroutable:
            # It is not there, or not there any more although it was declared before.
            send(queue=_declared(queue))

    def _put(self, name: str, more: Mapping[str, Any]) -> None:
        """Put the same message into a queue of a virtual transport, past any edge; stored when this returns."""
        channel = self._message.channel
        body, content_type, encoding = self._content()
        properties = self._properties()
        payload = channel.prepare_message(
            body, properties.pop("priority", None), content_type, encoding, self._headers(more), properties
        )
        channel.queue_declare(queue=name, durable=True)
        channel._inplace_augment_message(payload, "", name)
        if not more:
            payload["properties"]["delivery_info"]["redelivered"] = True
        channel._put(name, payload)


class _AlwaysDeclared(Queue):  # type: ignore[misc]  # kombu has no types
    """A queue of which nobody remembers that it was declared before."""

    can_cache_declaration = False


def _declared(queue: Queue) -> Queue:
    return _AlwaysDeclared(queue.name, exchange=Exchange(""), durable=True, queue_arguments=queue.queue_arguments)


@functools.lru_cache(maxsize=512)  # the same object, so that it is declared once
def _existing_queue(name: str) -> Queue:
    """A queue that is taken as it is: a dead letter that somebody declared in his own way serves as well."""
    return Queue(name, exchange=Exchange(""), no_declare=True)


def _delay_queue(queue: str, delay: float) -> Queue:
    milliseconds = _SHORTEST_DELAY_MS
    while milliseconds < delay * 1000:
        milliseconds *= 2
    return _delay_queue_of(queue, milliseconds)


@functools.lru_cache(maxsize=512)
def _delay_queue_of(queue: str, milliseconds: int) -> Queue:
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


def _driver_type(channel: Any) -> str:
    if channel.connection is None:
        raise ConnectionResetError("the channel is closed: the broker delivers its unsettled messages again")
    return str(channel.connection.client.transport.driver_type)


def _is_amqp(channel: Any) -> bool:
    return _driver_type(channel) == "amqp"


_producers: WeakKeyDictionary[Connection, IdempotentProducer] = WeakKeyDictionary()


def let_go(connection: Connection) -> None:
    """Close what was opened for moving the messages of a connection."""
    producer = _producers.pop(connection, None)
    if producer is not None:
        producer.close()


def _producer_of(channel: Any) -> IdempotentProducer:
    """One producer for each of the user's connections; it sends over a connection of its own."""
    connection = channel.connection.client
    producer = _producers.get(connection)
    if producer is None:
        # Two threads at once may make two: one of them is then used once.
        producer = _producers[connection] = IdempotentProducer(connection)
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
    if not info.get("exchange") and isinstance(info.get("routing_key"), str):
        return str(info["routing_key"]) or None  # the default exchange leads to the queue of that name
    if active_queues:
        routed = active_queues.intersection(channel._lookup(info.get("exchange"), info.get("routing_key")))
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


def came_back(message: Message) -> bool:
    """True if the message may have been delivered before, as the broker says, or is back from a delay queue.

    A successor that comes back from a delay queue is a new message to the broker; an attempt that died before it was
    put there must not be forgotten for that.
    """
    return bool(message.delivery_info.get("redelivered")) or _DEATHS in message.headers


def forbid_acks(message: Message) -> None:
    """From now on the message's ack, reject and requeue raise HandlerAcknowledged: they are not the handler's to call.

    They stay forbidden after the handler, so that what it hands on cannot ack either.
    """
    message.ack = message.reject = message.requeue = _refuse


def _refuse(*_: Any, **__: Any) -> None:
    raise HandlerAcknowledged(
        "a guarded handler must not ack, reject or requeue: return when the business has succeeded (or, with "
        "manual=True, call current_execution().complete()), and raise when it has not; the library acks after that"
    )
