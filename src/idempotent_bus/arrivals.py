"""Taking messages off a connection of our own: wait for the first, then take what else has already arrived."""

from __future__ import annotations

import select
import socket
from collections.abc import Collection, Iterable
from typing import Any, Final

from kombu import Connection, Consumer

from .bell import Bell
from .buffered import BufferedReads
from .deliveries import Deliveries

__all__ = ["ANSWER_SECONDS", "Arrivals"]

#: How long an answer that comes home may wait for its way to the broker, where nothing wakes the loop.
ANSWER_SECONDS: Final = 0.05
#: In the middle of a frame py-amqp spins on a socket that does not block; to wait where nothing has come at all would
#: cost a millisecond for each window.
_MIDDLE_OF_A_FRAME: Final = 0.001


class Arrivals:
    """How messages come over one open connection. For the thread that owns it.

    bell: rung when something else is to be done here. channel, consumers: what consumes, already. Each message goes to
    its consumer's `on_message`, which appends it to what `gather` is given.
    """

    def __init__(self, connection: Connection, bell: Bell, channel: Any, consumers: Iterable[Consumer]) -> None:
        self._connection = connection
        self._bell = bell
        self._reads: BufferedReads | None = None
        self._at_once = 0.0
        self._sock: Any = None
        if connection.transport.driver_type == "amqp":
            if BufferedReads.fits(connection):
                self._reads = BufferedReads(connection, Deliveries(channel, consumers))
            self._at_once = _MIDDLE_OF_A_FRAME
            self._sock = getattr(connection.connection, "sock", None)  # librabbitmq shows none

    def gather(
        self, arrived: Collection[Any], window: int, wait: float, *, on_hand: Collection[Any], prefetch: int
    ) -> None:
        """Wait for so many seconds until one has arrived, then take what is there, up to the window.

        on_hand: messages that are being handled, whose answers may come home meanwhile.
        """
        wait = max(wait, 0.001)
        reads, connection = self._reads, self._connection

        def wanted() -> bool:
            return len(arrived) < window

        try:
            if reads is not None and reads.has_message:
                wait = 0.0
            elif on_hand:  # others may want something done here meanwhile
                wait = self._await_bell(wait, full=len(on_hand) >= prefetch)
            if wait:
                connection.drain_events(timeout=wait)
            while wanted():
                if reads is not None:
                    reads.take(wanted)
                if not wanted() or not self._has_more():
                    break
                connection.drain_events(timeout=self._at_once)
        except (socket.timeout, TimeoutError):  # noqa: UP041 - not the same class in Python 3.10's ssl module
            pass

    def _await_bell(self, wait: float, *, full: bool) -> float:
        """Wait so that an answer that comes home ends it. Returns how long the broker's messages may be waited for."""
        if self._sock is not None:
            return 0.001 if self._bell.wait(wait) else 0.0
        wait = min(wait, ANSWER_SECONDS)
        if not full:
            return wait  # here only the transport itself can tell that a message has come
        self._bell.wait(wait)
        return 0.001

    def _has_more(self) -> bool:
        """Whether there is something to read, or it cannot be told without reading."""
        sock = self._sock
        if sock is None or getattr(sock, "pending", int)():  # TLS: decrypted already
            return True
        try:
            return bool(select.select((sock,), (), (), 0)[0])
        except ValueError:  # more open files than select can name, or the socket is closed
            return True
