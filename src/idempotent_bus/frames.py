"""Reading from RabbitMQ what py-amqp cannot read: one such message would end every consumer that it is delivered to.

RabbitMQ hands on properties and routing keys that are no UTF-8, timestamps beyond year 9999 and tables nested 20,000
deep; py-amqp raises in the middle of a frame, the connection is lost, and the next consumer gets the same message.
Here such properties are taken off, and kept as they came in the header UNREADABLE, by which the message goes to the
dead letter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from struct import pack, unpack_from
from typing import Any, Final

import amqp
from amqp.method_framing import frame_handler as amqps_own
from kombu import Connection

from .headers import UNREADABLE

__all__ = ["read_everything"]

log = logging.getLogger(__name__)

_HEADER: Final = 2
#: The class, the weight and the size of the body; what follows are the properties.
_PROPERTIES_AT: Final = 12
#: Methods that bring a message to its consumer: basic.deliver and basic.get-ok.
_DELIVER: Final = (60, 60)
_GET_OK: Final = (60, 71)
#: Less than the smallest frame that a broker may ask for.
_MOST_KEPT: Final = 2048


def read_everything(connection: Connection) -> None:
    """Make a connection that is yet to be opened survive messages that py-amqp cannot read. Others it leaves alone."""
    if getattr(connection.transport, "driver_name", None) == "py-amqp":
        connection.transport_options["frame_handler"] = _frame_handler


def _frame_handler(connection: Any, callback: Callable[..., Any]) -> Callable[[Any], Any]:
    """As py-amqp's own, which is what does the reading."""
    handed_on = False

    def on_method(channel: int, method: tuple[int, int], arguments: bytes, content: Any) -> Any:
        nonlocal handed_on
        handed_on = True
        try:
            return callback(channel, method, arguments, content)
        except UnicodeDecodeError:
            # Raised while the arguments are read, before anybody was called.
            if method not in (_DELIVER, _GET_OK) or _is_text(arguments, method):
                raise
            return callback(channel, method, _as_text(arguments, method), content)

    on_frame = amqps_own(connection, on_method)

    def on_any_frame(frame: Any) -> Any:
        nonlocal handed_on
        kind, channel, payload = frame
        if kind != _HEADER:
            return on_frame(frame)
        handed_on = False
        try:
            return on_frame(frame)
        except Exception as error:  # many kinds, from the tables' and strings' decoders
            if handed_on:  # a message without a body is complete with its header: the error is that of its receiver
                raise
            # It was not taken in: py-amqp still waits for this header.
            log.warning("a message's properties cannot be read (%s): it comes without them", type(error).__name__)
            return on_frame((kind, channel, bytes(payload[:_PROPERTIES_AT]) + _kept(bytes(payload[_PROPERTIES_AT:]))))

    return on_any_frame


def _kept(properties: bytes) -> bytes:
    """The properties of a message that has none but the header which keeps the original ones, cut to a fair size."""
    kept: bytes = amqp.Message(application_headers={UNREADABLE: properties[:_MOST_KEPT].hex()})._serialize_properties()
    return kept


# --- the arguments of a delivery -----------------------------------------------------------------------------


def _places(arguments: bytes, method: tuple[int, int]) -> list[tuple[int, int]]:
    """Where the exchange and the routing key are: from, to. Each has its length in the byte before."""
    at = 4
    if method == _DELIVER:
        at += 1 + arguments[at]  # the consumer tag
    at += 9  # the delivery tag, and whether it is redelivered
    places = []
    for _ in range(2):
        (length,) = unpack_from("B", arguments, at)
        places.append((at + 1, at + 1 + length))
        at += 1 + length
    return places


def _is_text(arguments: bytes, method: tuple[int, int]) -> bool:
    try:
        for begin, end in _places(arguments, method):
            bytes(arguments[begin:end]).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


def _as_text(arguments: bytes, method: tuple[int, int]) -> bytes:
    """The arguments with an exchange and a routing key that can be read: nothing hangs on them but what is shown."""
    parts, done = [], 0
    for begin, end in _places(arguments, method):
        text = bytes(arguments[begin:end]).decode("ascii", "replace").replace("\ufffd", "?").encode()
        parts += [bytes(arguments[done : begin - 1]), pack("B", len(text)), text]
        done = end
    return b"".join(parts) + bytes(arguments[done:])
