"""What a kombu delivery tells of itself: where it came from, whether it came back, and its content as it came."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kombu.compression import compress
from kombu.message import Message
from kombu.serialization import registry
from kombu.utils import json as kombu_json

from .errors import HandlerAcknowledged
from .headers import (
    DEAD_ATTEMPTS,
    DEAD_ERROR,
    DEAD_FINGERPRINT,
    DEAD_REASON,
    DEAD_RECORD,
    DEAD_SCOPE,
    ORIGIN_QUEUE,
    REDRIVE,
)
from .quick_json import loads

__all__ = [
    "DELIVERY_COUNT",
    "OF_ONE_DEATH",
    "Content",
    "came_back",
    "content_of",
    "decoded",
    "driver_type",
    "forbid_acks",
    "headers_of",
    "is_amqp",
    "is_of_the_broker",
    "origin_queue",
    "properties_of",
    "redrives",
    "was_fetched_without_ack",
]

#: What the broker adds on its own way; sent on, it would pile up, or (CC) bring copies into other queues.
_BROKER_HEADERS: Final = frozenset(
    {"x-deduplication-header", "x-death", "x-delivery-count", "x-acquired-count", "CC", "BCC"}
)
_BROKER_PREFIXES: Final = ("x-first-death-", "x-last-death-")
_DEATHS: Final = "x-death"
#: Only quorum queues count deliveries, and throw away what was delivered too often.
DELIVERY_COUNT: Final = "x-delivery-count"
#: What is true of one death only: neither a redriven message nor its next death has these from the last one.
OF_ONE_DEATH: Final = frozenset(
    {DEAD_REASON, DEAD_ERROR, DEAD_ATTEMPTS, DEAD_SCOPE, DEAD_RECORD, DEAD_FINGERPRINT, ORIGIN_QUEUE}
)
_PROPERTIES: Final = ("correlation_id", "reply_to", "type", "app_id", "message_id", "timestamp", "priority")
_COMPRESSION: Final = "compression"
#: The largest redrive number that is believed: every store can keep it, and nobody redrives so often.
_MOST_REDRIVES: Final = 2**31 - 1
_JSON: Final = "application/json"


def decoded(message: Message) -> Any:
    """The body as `message.decode()` gives it, and raises. Sooner, where kombu's own JSON reads it."""
    body, accept = message.body, message.accept
    if (
        message.content_type == _JSON
        and body
        and isinstance(body, (str, bytes))
        and registry._decoders.get(_JSON) is kombu_json.loads
        and (_JSON not in registry._disabled_content_types if accept is None else _JSON in accept)
    ):
        try:
            value = message._decoded_cache = loads(body if isinstance(body, str) else body.decode())
        except Exception:  # noqa: BLE001 - kombu says it in its own way
            return message.decode()
        return value
    return message.decode()


# --- the content, to be sent on ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Content:
    """A body as it came, and how kombu reads it. compression: what the header of that name must say, or None."""

    body: bytes
    content_type: str
    content_encoding: str
    compression: str | None


def content_of(message: Message) -> Content:
    """The body as it came. What the message does not say of it is said as kombu would take it.

    Byte for byte, with two exceptions, both on AMQP, where kombu shows only what it has made of the bytes: what its
    sender compressed is compressed again, and text in an encoding with several forms (UTF-16) is encoded again.
    """
    encoding = message.content_encoding or "utf-8"
    body, compression = message.body, None
    # If kombu could not undo the compression, the body is as it came, and still needs the header.
    named = message.headers.get(_COMPRESSION)
    if named and message.errors:
        compression = named
    elif named:
        body, compression = _compressed(message, named)
    if isinstance(body, str):  # py-amqp decodes what it can
        try:
            body = body.encode("utf-8" if encoding == "binary" else encoding)
        except (LookupError, UnicodeError, TypeError):  # a virtual transport's can be of any type
            body = body.encode(errors="surrogatepass")
    elif not isinstance(body, (bytes, bytearray, memoryview)):
        # Nobody can send such a thing but past kombu, into the broker's own storage: shown as it is there.
        body = b"" if body is None else json.dumps(body, default=repr).encode()
    return Content(bytes(body), message.content_type or "application/data", encoding, compression)


def _compressed(message: Message, named: Any) -> tuple[Any, str | None]:
    """The body as its sender compressed it, and its header. Not inflated: that may be a thousand times as long."""
    raw = getattr(message, "_raw", None)
    if isinstance(raw, dict):  # a virtual transport: the bytes themselves
        return message.channel.decode_body(raw.get("body"), raw["properties"].get("body_encoding")), named
    if raw is not None:  # AMQP, kept by whoever fetched it
        return raw.body, named
    body = message.body
    try:
        again, _ = compress(body.encode() if isinstance(body, str) else body, named)
    except Exception:  # noqa: BLE001 - a decoder without an encoder: then as kombu gave it
        return body, None
    return again, named


def headers_of(message: Message, content: Content) -> dict[str, Any]:
    """The headers to send on: the sender's and ours, without those that the broker added on its way."""
    headers = {name: value for name, value in message.headers.items() if not is_of_the_broker(name)}
    if content.compression is None:
        headers.pop(_COMPRESSION, None)
    return headers


def is_of_the_broker(header: Any) -> bool:
    """True for a header that the broker added to a message on its way."""
    # py-amqp leaves a name that is no UTF-8 as bytes.
    return header in _BROKER_HEADERS or (isinstance(header, str) and header.startswith(_BROKER_PREFIXES))


def properties_of(message: Message) -> dict[str, Any]:
    """The properties to send on. An expiration is left out: a message that waits or is dead must not vanish by it."""
    properties: Mapping[str, Any] = message.properties
    return {name: properties[name] for name in _PROPERTIES if properties.get(name)}


# --- where it is -----------------------------------------------------------------------------------------


def driver_type(channel: Any) -> str:
    """kombu's name of the kind of broker. Raises ConnectionResetError if the channel is closed."""
    if channel.connection is None:
        raise ConnectionResetError("the channel is closed: the broker delivers its unsettled messages again")
    return str(channel.connection.client.transport.driver_type)


def is_amqp(channel: Any) -> bool:
    """True for RabbitMQ and whatever else speaks AMQP 0.9.1."""
    return driver_type(channel) == "amqp"


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


# --- what has happened to it -----------------------------------------------------------------------------


def came_back(message: Message, number: int | None = None) -> bool:
    """True if the message may have been delivered before: as the broker says, from a delay queue, or redriven.

    What comes back from a delay queue or out of the dead letter is a new message to the broker; an attempt that died
    before it was put there must not be forgotten for that. number: of redrives, if it is known.
    """
    return (
        bool(message.delivery_info.get("redelivered"))
        or _DEATHS in message.headers
        or (redrives(message.headers) or 0 if number is None else number) > 0
    )


def redrives(headers: Mapping[str, Any]) -> int | None:
    """How often the message was moved back from the dead letter; None if its header says no number."""
    number = headers.get(REDRIVE, 0)
    return number if type(number) is int and 0 <= number <= _MOST_REDRIVES else None


def was_fetched_without_ack(message: Message) -> bool:
    """True if the consumer was opened with no_ack=True: the broker has forgotten the message already."""
    channel = message.channel
    without_ack = channel.no_ack_consumers
    if without_ack is not None:
        return message.delivery_info.get("consumer_tag") in without_ack
    delivered = getattr(channel.qos, "_delivered", None)
    return delivered is not None and message.delivery_tag not in delivered


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
