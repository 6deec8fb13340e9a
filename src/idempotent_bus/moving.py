"""Moving a delivered message to another queue of its broker: body and id untouched, confirmed, past any edge.

Past the edge because the message is not a second copy of its publish: a refusal would lose it. RabbitMQ has no edge;
the other brokers have one only in `basic_publish`. The caller acks the original once the move is confirmed.
"""

from __future__ import annotations

import functools
import logging
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final
from weakref import WeakKeyDictionary

from kombu import Connection, Exchange, Queue
from kombu.message import Message

from . import delays
from .errors import ConfigurationError, Unroutable
from .kombu_message import content_of, driver_type, headers_of, properties_of
from .producer import IdempotentProducer
from .sending.resend import ResendPolicy

__all__ = ["let_go", "let_wait", "move", "put", "send"]

log = logging.getLogger(__name__)

#: kombu's virtual transports whose `_put` returns when the broker has the message.
_STORED_WHEN_PUT: Final = frozenset({"memory", "redis", "sql"})
#: What a driver's encoder raises for a value, and values for which it cannot.
_CANNOT_BE_WRITTEN: Final = (RecursionError, TypeError, ValueError, OverflowError, struct.error)
_SIMPLE: Final = (str, bytes, int, float, type(None))
#: Two sends at most: while they are tried the neighbours wait, and a message that could not be moved is tried again.
_RESEND: Final = ResendPolicy(max_sends=2, patience=10.0)


def move(message: Message, queue: str, headers: Mapping[str, Any], *, drop: frozenset[str] = frozenset()) -> None:
    """Put the message into a queue, which is taken as it is, or declared if there is none.

    headers: set on top of the message's own. drop: headers of the message that do not go with it.
    Headers of the sender's that the driver could read but cannot write (nested a thousand deep) are left behind: rather
    without them than never. Raises PublishError if the broker did not confirm it, or what a virtual transport's driver
    raises.
    """
    try:
        _move(message, queue, headers, drop)
    except _CANNOT_BE_WRITTEN as error:
        unwritable = frozenset(name for name, value in message.headers.items() if not isinstance(value, _SIMPLE))
        if not unwritable - drop:
            raise
        log.warning("headers of a message cannot be written again (%s): it is moved without them", type(error).__name__)
        _move(message, queue, headers, drop | unwritable)


def _move(message: Message, queue: str, headers: Mapping[str, Any], drop: frozenset[str]) -> None:
    channel = message.channel
    if getattr(channel, "idempotent_edge", False) or driver_type(channel) in _STORED_WHEN_PUT:
        put(message, queue, headers, drop=drop)
    else:
        send(message, queue, headers, drop=drop)


def send(
    message: Message,
    queue: str,
    headers: Mapping[str, Any],
    *,
    drop: frozenset[str] = frozenset(),
    make: bool = True,
) -> None:
    """Publish the message to a queue and wait for the confirm. make: declare the queue if it is not there.

    Raises PublishError, or ConfigurationError if the broker refuses to declare the queue.
    """
    publish = _publisher(message, headers, drop)
    try:
        publish(queue=_existing_queue(queue))
    except Unroutable:
        if not make:
            raise
        publish(queue=_declared_queue(queue))


def let_wait(message: Message, queue: str, seconds: float, headers: Mapping[str, Any]) -> None:
    """RabbitMQ: publish the message to where it waits, with a confirm; after `seconds` it is back in the queue.

    Raises PublishError, or ConfigurationError if the broker refuses to declare what waiting needs.
    """
    publish = functools.partial(
        _publisher(message, headers, frozenset()), queue=_existing_queue(queue), exchange=delays.delay_name(seconds)
    )
    try:
        try:
            publish(declare=delays.entities(queue, seconds))
        except Unroutable:  # somebody has deleted it after it was declared
            publish(declare=delays.entities(queue, seconds, again=True))
    except ConfigurationError as error:
        raise delays.refused(f"{delays.delay_name(seconds)} or {delays.return_queue(queue).name}", error) from error


def _publisher(message: Message, headers: Mapping[str, Any], drop: frozenset[str]) -> Callable[..., Any]:
    content = content_of(message)
    return functools.partial(
        _producer_of(message.channel).forward,
        content.body,
        headers=_merged(headers_of(message, content), headers, drop),
        content_type=content.content_type,
        content_encoding=content.content_encoding,
        **properties_of(message),
    )


def put(
    message: Message,
    queue: str,
    headers: Mapping[str, Any],
    *,
    drop: frozenset[str] = frozenset(),
    redelivered: bool = False,
) -> None:
    """Put the message into a queue of a virtual transport, past any edge; stored when this returns."""
    channel, content, properties = message.channel, content_of(message), properties_of(message)
    payload = channel.prepare_message(
        content.body,
        properties.pop("priority", None),
        content.content_type,
        content.content_encoding,
        _merged(headers_of(message, content), headers, drop),
        properties,
    )
    channel.queue_declare(queue=queue, durable=True)
    channel._inplace_augment_message(payload, "", queue)
    if redelivered:
        payload["properties"]["delivery_info"]["redelivered"] = True
    channel._put(queue, payload)


@functools.lru_cache(maxsize=512)  # the same object, so that it is declared once
def _existing_queue(name: str) -> Queue:
    """A queue that is taken as it is: a dead letter that somebody declared in his own way serves as well."""
    return Queue(name, exchange=Exchange(""), no_declare=True)


class _DeclaredAgain(Queue):  # type: ignore[misc]  # kombu has no types
    """A queue of which nobody remembers that it was declared before."""

    can_cache_declaration = False


def _declared_queue(name: str) -> Queue:
    return _DeclaredAgain(name, exchange=Exchange(""), durable=True)


def _merged(own: dict[str, Any], more: Mapping[str, Any], drop: frozenset[str]) -> dict[str, Any]:
    return {**{name: value for name, value in own.items() if name not in drop}, **more}


# --- the connection that moves ----------------------------------------------------------------------

_producers: WeakKeyDictionary[Connection, IdempotentProducer] = WeakKeyDictionary()


def _producer_of(channel: Any) -> IdempotentProducer:
    """One producer for each of the user's connections; it sends over a connection of its own."""
    connection = channel.connection.client
    producer = _producers.get(connection)
    if producer is None:
        # Two threads at once may make two: one of them is then used once.
        producer = _producers[connection] = IdempotentProducer(connection, retry=_RESEND)
    return producer


def let_go(connection: Connection) -> None:
    """Close what was opened for moving the messages of a connection."""
    producer = _producers.pop(connection, None)
    if producer is not None:
        producer.close()
