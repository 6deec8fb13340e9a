"""The acks of an AMQP channel of our own: gathered, and sent as few frames.

`basic.ack(multiple)` acks everything up to a delivery tag, so it may only name the last of an unbroken run of messages
that are done; what lies behind one that is not is acked by itself. It would also ack the messages of somebody else on
the channel, so this is for a channel that nobody else consumes on. A channel that is lost takes its acks along: the
broker delivers the messages again.
"""

from __future__ import annotations

from collections import deque
from typing import Any

__all__ = ["BulkAcks"]


class BulkAcks:
    """For one channel and one thread. Every delivery must be announced, in the order in which they came."""

    __slots__ = ("_channel", "_done", "_open")

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._open: deque[int] = deque()  # delivery tags, ascending, that are not yet acked or lie behind such
        self._done: dict[int, bool] = {}  # of these, what may be acked; True: it was already

    def arrived(self, tag: int) -> None:
        """A message came."""
        self._open.append(tag)

    def ack(self, message: Any) -> None:
        """A message is done; the broker hears of it at the next `flush`."""
        self._done[message.delivery_tag] = False
        message._state = "ACK"

    def flush(self) -> None:
        """Send what has gathered. Raises the connection's errors; then the channel is gone, and this with it."""
        done, waiting = self._done, self._open
        if not done:
            return
        last = 0
        while waiting and waiting[0] in done:
            tag = waiting.popleft()
            if not done.pop(tag):
                last = tag  # not one that was acked before: the broker knows no such tag any more
        if last:
            self._channel.basic_ack(last, multiple=True)
        for tag, acked in done.items():
            if not acked:
                self._channel.basic_ack(tag)
                done[tag] = True
