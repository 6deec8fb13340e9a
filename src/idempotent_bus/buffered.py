"""Reading from RabbitMQ many frames at a time. For a connection of our own.

py-amqp asks the socket for exactly the bytes of each part of each frame: nine `recv` and six `settimeout` for a
message. Here it is given what has arrived, up to 64 KiB, which its own buffer keeps; and whole frames are taken
from that buffer without asking the socket at all, plain deliveries all at once (`deliveries.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Any, Final

from kombu import Connection

from .deliveries import Deliveries

__all__ = ["BufferedReads"]

#: What is read at once at most. py-amqp copies what is left of it for each part of a frame that it reads itself.
_PIECE: Final = 65_536
_HEAD: Final = Struct(">BHI")
_FRAME_END: Final = 0xCE


class BufferedReads:
    """The reads of one open py-amqp connection. For one thread at a time.

    deliveries: reads those of a channel; None: py-amqp reads them all.
    """

    __slots__ = ("_amqp", "_deliveries", "_transport")

    def __init__(self, connection: Connection, deliveries: Deliveries | None = None) -> None:
        self._deliveries = deliveries
        self._amqp: Any = connection.connection
        self._transport: Any = self._amqp.transport
        receive = self._transport._quick_recv

        def receive_more(wanted: int) -> Any:
            return receive(max(wanted, _PIECE))

        self._transport._quick_recv = receive_more

    @staticmethod
    def fits(connection: Connection) -> bool:
        """True for py-amqp, whose inner workings these are."""
        transport = getattr(connection.connection, "transport", None)
        return getattr(connection.transport, "driver_name", None) == "py-amqp" and hasattr(transport, "_quick_recv")

    @property
    def has_message(self) -> bool:
        """True if there is at least one whole frame to take."""
        buffer = self._transport._read_buffer
        return len(buffer) >= 8 and len(buffer) >= 8 + _HEAD.unpack_from(buffer)[2]

    def take(self, wanted: Callable[[], bool]) -> None:
        """Hand on whole frames that have arrived, as long as more is wanted. Never waits.

        Raises what py-amqp raises while it takes a frame.
        """
        transport, amqp, deliveries = self._transport, self._amqp, self._deliveries
        buffer: bytes = transport._read_buffer
        at = 0
        try:
            while len(buffer) - at >= 8 and wanted():
                if deliveries is not None and (found := deliveries.read(buffer, at)) is not None:
                    at, on_message, message = found
                    on_message(message)
                    continue
                kind, channel, size = _HEAD.unpack_from(buffer, at)
                last = at + 7 + size
                if last >= len(buffer) or buffer[last] != _FRAME_END:
                    break  # what is wrong with it is py-amqp's to say
                payload = buffer[at + 7 : last]
                # It may wait for the broker's answer (a channel that was closed), and reads on from there.
                transport._read_buffer, at = buffer[last + 1 :], 0
                amqp.on_inbound_frame((kind, channel, payload))
                buffer = transport._read_buffer
        finally:
            if at:
                transport._read_buffer = buffer[at:]
