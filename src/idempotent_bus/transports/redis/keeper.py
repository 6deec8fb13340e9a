"""The thread that keeps a channel's leases while handlers run, and sends acks that nobody else sends in time."""

from __future__ import annotations

import threading
import weakref
from time import monotonic
from typing import TYPE_CHECKING

from kombu.log import get_logger
from redis import exceptions

from .scripts import RENEW
from .wire import Command

if TYPE_CHECKING:
    from .transport import Channel

logger = get_logger(__name__)

# A renewal that failed is tried again after this long; the lease has two thirds of its length left.
_RETRY = 1.0


class Keeper:
    """One daemon thread per channel that holds messages. It sleeps without a timeout while there is nothing to keep.

    It renews every third of the lease, so that one lost renewal costs nothing. A handler that blocks the
    main thread does not stop it; a process that is stopped or dead does, and then the messages go to somebody else.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = weakref.ref(channel)
        self._wake = threading.Event()
        self._asleep = False
        self._thread: threading.Thread | None = None
        self._closed = False
        self._renew_at = 0.0

    def notice(self) -> None:
        """There is something to keep. Any thread; costs next to nothing while the keeper is awake."""
        if self._thread is None:
            if self._closed:
                return
            self._renew_at = 0.0
            self._thread = threading.Thread(target=self._run, name="idempotent-bus-keeper", daemon=True)
            self._thread.start()
        elif self._asleep:
            self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    def _run(self) -> None:
        while not self._closed:
            channel = self._channel()
            if channel is None:
                return
            self._asleep = True  # before looking: who adds something after the look sees this and wakes us
            wait = self._next(channel)
            del channel
            self._wake.wait(wait)
            self._asleep = False
            self._wake.clear()
            channel = self._channel()
            if channel is None or self._closed:
                return
            try:
                self._work(channel)
            except (exceptions.RedisError, OSError):
                logger.warning("could not renew a lease or send an ack; trying again", exc_info=True)
                self._wake.wait(min(_RETRY, channel.lease / 6))
            del channel

    def _next(self, channel: Channel) -> float | None:
        """Seconds until there is something to do; None: until somebody notices something."""
        hold, waits = channel.qos, []
        now = monotonic()
        if hold.has_acks:
            waits.append(hold.acks_since + channel.ack_delay - now)
        if channel.holds:
            if not self._renew_at:
                self._renew_at = now + channel.renew_every
            waits.append(self._renew_at - now)
        else:
            self._renew_at = 0.0
        return max(0.005, min(waits)) if waits else None

    def _work(self, channel: Channel) -> None:
        hold, now = channel.qos, monotonic()
        if hold.has_acks and now >= hold.acks_since + channel.ack_delay:
            hold.flush(timeout=channel.lease / 3)
        if self._renew_at and now >= self._renew_at:
            renew(channel)
            self._renew_at = monotonic() + channel.renew_every


def renew(channel: Channel) -> None:
    """Extend the channel's leases on every queue that it holds messages of."""
    queues = channel.holding()
    commands: list[Command] = []
    for queue in queues:
        keys, expiry = channel.keys_of(queue), channel.expiry_of(queue)
        lists = keys.lists if expiry else ()
        commands.append((RENEW, 1 + len(lists), keys.owners, *lists, channel.owner, channel.lease_ms, expiry))
    if not commands:
        return
    for queue, reply in zip(queues, channel.call(commands, channel.lease / 3), strict=True):
        if isinstance(reply, Exception):
            raise reply
        if not reply:
            logger.warning("the lease on messages of queue %r had lapsed; they went back to the queue", queue)
