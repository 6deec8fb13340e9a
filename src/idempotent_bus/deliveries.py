"""Reading a delivery from RabbitMQ's bytes in one go. For a channel of our own.

A delivery is three frames: the method, the properties, the body. py-amqp hands each through its layers, which takes as
long as everything else that a consumer does for a small message. Here a delivery that is plain and all there is read
at once. Whatever else comes is left to py-amqp, which then finds it where it was: other methods, what has not arrived
as a whole, headers that are no texts, what is compressed, what cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from struct import Struct, error
from typing import Any, Final

from kombu import Consumer
from kombu.message import Message

__all__ = ["Deliveries"]

OnMessage = Callable[[Message], None]

_METHOD_KIND, _HEADER_KIND, _BODY_KIND, _FRAME_END = 1, 2, 3, 0xCE
#: basic, the class of the method and of the header; basic.deliver.
_BASIC, _DELIVER = 60, 60
#: kind, channel, size (as every frame begins); class, method, the length of the consumer tag.
_METHOD: Final = Struct(">BHIHHB")
#: The delivery tag, whether it is redelivered; behind them the exchange and the routing key.
_TAG: Final = Struct(">QB")
#: As every frame begins; class, weight, the body's size, which properties there are.
_HEADER: Final = Struct(">BHIHHQH")
_BODY: Final = Struct(">BHI")
_LONG: Final = Struct(">I")
_TIME: Final = Struct(">Q")

#: The properties in their order, from the highest bit of the flags, with how they are written.
_PROPERTIES: Final = (
    ("content_type", "text"),
    ("content_encoding", "text"),
    ("application_headers", "table"),
    ("delivery_mode", "byte"),
    ("priority", "byte"),
    ("correlation_id", "text"),
    ("reply_to", "text"),
    ("expiration", "text"),
    ("message_id", "text"),
    ("timestamp", "time"),
    ("type", "text"),
    ("user_id", "text"),
    ("app_id", "text"),
    ("cluster_id", "text"),
)
#: The lowest bits of the flags stand for no property: further flags would follow.
_NO_PROPERTY: Final = 0b11
#: How many ways of a message (consumer, exchange, routing key) and how many sets of properties are remembered.
_MOST: Final = 1000

_Way = tuple[OnMessage, Any, str, str, str]


class Deliveries:
    """The deliveries of one open channel of py-amqp. For the thread that consumes.

    consumers: those of the channel, which consume already; each message goes to its consumer's `on_message`.
    """

    def __init__(self, channel: Any, consumers: Iterable[Consumer]) -> None:
        self._channel = channel
        self._consumers: dict[str, tuple[OnMessage, Any]] = {
            tag: (consumer.on_message, consumer.accept)
            for consumer in consumers
            for tag in consumer._active_tags.values()
        }
        self._ways: dict[bytes, _Way] = {}
        self._layouts: dict[int, list[tuple[str, str]]] = {}

    def read(self, buffer: bytes, at: int) -> tuple[int, OnMessage, Message] | None:
        """The delivery that begins there: the place behind it, and whom to give it to. None: it is py-amqp's to read.

        Raises nothing: what cannot be read is py-amqp's too, and its errors are known.
        """
        try:
            return self._read(buffer, at)
        except (error, IndexError, ValueError):  # the buffer ends in the middle, or a text is none
            return None

    def _read(self, buffer: bytes, at: int) -> tuple[int, OnMessage, Message] | None:
        channel = self._channel
        kind, number, size, group, method, tag_length = _METHOD.unpack_from(buffer, at)
        if method != _DELIVER or group != _BASIC or kind != _METHOD_KIND or number != channel.channel_id:
            return None
        method_end = at + 7 + size
        kind, header_number, size, group, _, body_size, flags = _HEADER.unpack_from(buffer, method_end + 1)
        header_end = method_end + 8 + size
        if kind != _HEADER_KIND or header_number != number or group != _BASIC or flags & _NO_PROPERTY:
            return None
        kind, body_number, size = _BODY.unpack_from(buffer, header_end + 1)
        body_at = header_end + 8
        end = body_at + size
        if kind != _BODY_KIND or body_number != number or size != body_size:
            return None  # without a body, or with one in several frames
        if not buffer[method_end] == buffer[header_end] == buffer[end] == _FRAME_END:
            return None

        tag_end = at + 12 + tag_length
        # What comes before and behind the delivery tag is the same for many messages.
        way = self._ways.get(buffer[at + 11 : tag_end] + buffer[tag_end + 9 : method_end])
        if way is None:
            way = self._way(buffer[at + 11 : tag_end], buffer[tag_end + 9 : method_end])
            if way is None:
                return None
        on_message, accept, consumer_tag, exchange, routing_key = way
        if consumer_tag not in channel.callbacks:
            return None  # it was cancelled: py-amqp gives the message back
        delivery_tag, redelivered = _TAG.unpack_from(buffer, tag_end)

        properties = self._properties(buffer, method_end + 22, header_end, flags)
        if properties is None or channel.is_closing:
            return None
        headers = properties.get("application_headers") or {}
        if "compression" in headers:
            return None
        body: bytes | str = buffer[body_at:end]
        encoding = properties.get("content_encoding")
        if encoding is not None and channel.auto_decode:
            try:  # noqa: SIM105 - for each message, and `suppress` takes longer than what is in it
                body = body.decode(encoding)  # type: ignore[union-attr]  # still bytes
            except Exception:  # noqa: BLE001, S110 - as py-amqp does: then the bytes
                pass
        message = channel.Message.__new__(channel.Message)
        Message.__init__(
            message,
            body,
            delivery_tag,
            properties.get("content_type"),
            encoding,
            {
                "consumer_tag": consumer_tag,
                "delivery_tag": delivery_tag,
                "redelivered": bool(redelivered & 1),
                "exchange": exchange,
                "routing_key": routing_key,
            },
            properties,
            headers,
            accept=accept,
            channel=channel,
        )
        channel.connection.bytes_recv += 3  # frames: by these py-amqp knows that the broker is alive
        return end + 1, on_message, message

    def _way(self, before: bytes, behind: bytes) -> _Way | None:
        tag = before[1:].decode()
        known = self._consumers.get(tag)
        if known is None:
            return None
        exchange_end = 1 + behind[0]
        if behind[exchange_end] != len(behind) - exchange_end - 1:
            return None
        exchange, routing_key = behind[1:exchange_end].decode(), behind[exchange_end + 1 :].decode()
        if len(self._ways) >= _MOST:
            self._ways.clear()
        way = self._ways[before + behind] = (*known, tag, exchange, routing_key)
        return way

    def _properties(self, buffer: bytes, at: int, end: int, flags: int) -> dict[str, Any] | None:
        layout = self._layouts.get(flags)
        if layout is None:
            if len(self._layouts) >= _MOST:
                self._layouts.clear()
            layout = [one for bit, one in enumerate(_PROPERTIES) if flags & 0x8000 >> bit]
            self._layouts[flags] = layout
        properties: dict[str, Any] = {}
        for name, kind in layout:
            if kind == "text":
                text_end = at + 1 + buffer[at]
                properties[name] = buffer[at + 1 : text_end].decode()
                at = text_end
            elif kind == "byte":
                properties[name] = buffer[at]
                at += 1
            elif kind == "time":
                (properties[name],) = _TIME.unpack_from(buffer, at)
                at += 8
            else:
                table_end = at + 4 + _LONG.unpack_from(buffer, at)[0]
                table = _texts(buffer, at + 4, table_end)
                if table is None:
                    return None
                properties[name] = table
                at = table_end
        return properties if at == end else None


def _texts(buffer: bytes, at: int, end: int) -> dict[str, str] | None:
    """A table of texts; None if there is anything else in it."""
    table: dict[str, str] = {}
    while at < end:
        name_end = at + 1 + buffer[at]
        if buffer[name_end] != 83:  # S
            return None
        value_end = name_end + 5 + _LONG.unpack_from(buffer, name_end + 1)[0]
        table[buffer[at + 1 : name_end].decode()] = buffer[name_end + 5 : value_end].decode()
        at = value_end
    return table if at == end else None
