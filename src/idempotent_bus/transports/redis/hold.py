"""What a channel holds: deliveries that are not settled yet, and acks that are not sent yet.

An ack is sent a little later, together with others. Until it has arrived the message is registered as held, so a
crash in between makes it come again; it cannot lose it. Acks leave before the channel waits for messages, when
it closes, when there are `ack_limit` of them, and otherwise within `ack_delay` seconds, by the keeper's hand.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from time import monotonic
from typing import TYPE_CHECKING, Any

from kombu.log import get_logger
from kombu.transport import virtual

from .wire import Command

if TYPE_CHECKING:
    from .transport import Channel

logger = get_logger(__name__)


class Hold(virtual.QoS):
    """kombu's QoS of a channel of ours. Acks and rejects may come from any thread; the rest is the consumer's."""

    def __init__(self, channel: Channel, prefetch_count: int = 0) -> None:
        #: tag -> message, handed to a callback and not settled (kombu's name, Celery's eyes).
        self._delivered: OrderedDict[str, Any]
        super().__init__(channel, prefetch_count)
        #: tag -> (queue, number): what is registered with the server, handed out or not.
        self.places: dict[str, tuple[str, int]] = {}
        #: Fanout messages: the server keeps nothing of them, so requeueing happens here.
        self._fleeting: dict[str, str] = {}
        self._lock = threading.Lock()  # the two below
        self._acks: dict[str, list[int]] = {}
        self._ack_count = 0
        self.acks_since = 0.0
        self.sending = threading.Lock()
        #: The consumer found no room: the next ack must wake it.
        self.starved = False

    # --- what kombu and Celery ask ----------------------------------------------------------------

    def can_consume(self) -> bool:
        limit = self.prefetch_count
        return not limit or len(self._delivered) < limit

    def can_consume_max_estimate(self) -> int | None:
        limit = self.prefetch_count
        return max(limit - len(self._delivered), 0) if limit else None

    def append(self, message: Any, delivery_tag: str) -> None:
        self._delivered[delivery_tag] = message
        if delivery_tag not in self.places:
            self._fleeting[delivery_tag] = self.channel.fanout_queue_of(message)

    def get(self, delivery_tag: str) -> Any:
        return self._delivered[delivery_tag]

    def ack(self, delivery_tag: str) -> None:
        place = self.settle(delivery_tag)
        if place is not None:
            self.ack_place(*place)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        message, place = self._delivered.get(delivery_tag), self.places.get(delivery_tag)
        fanout_queue = self._fleeting.get(delivery_tag)
        if place is not None and requeue:
            self.channel.give_back(*place, counted=True)
        elif place is not None and self.channel.keep_rejected:
            self.channel.bury(*place, "rejected")
        elif place is not None:
            self.ack_place(*place)
        elif requeue and message is not None and fanout_queue:
            self.channel.deliver_again(message, fanout_queue)
        # Only now: had the step failed, the message would still be held, and settling it could be tried again.
        self.settle(delivery_tag)

    def delay(self, delivery_tag: str, delay: float) -> bool:
        """See `Channel.basic_delay`."""
        place = self.places.get(delivery_tag)
        waits = place is not None and self.channel.postpone(*place, delay)
        self.settle(delivery_tag)
        return waits

    def settle(self, tag: str) -> tuple[str, int] | None:
        """Forget a delivery here; where it is registered, or None."""
        self._delivered.pop(tag, None)
        self._fleeting.pop(tag, None)
        place = self.places.pop(tag, None)
        if self.starved:
            self.starved = False
            self.channel.wake()
        return place

    # --- acks -------------------------------------------------------------------------------------

    def ack_place(self, queue: str, number: int) -> None:
        with self._lock:
            if not self._ack_count:
                self.acks_since = monotonic()
            self._acks.setdefault(queue, []).append(number)
            self._ack_count += 1
            count = self._ack_count
        if count >= self.channel.ack_limit:
            self.flush()
        elif count == 1:
            self.channel.keeper.notice()

    @property
    def has_acks(self) -> bool:
        return self._ack_count > 0

    def acks_of(self, queue: str) -> set[int]:
        """The deliveries of a queue whose acks wait to be sent."""
        with self._lock:
            return set(self._acks.get(queue, ()))

    def take_acks(self) -> tuple[dict[str, list[int]], list[Command]]:
        """The acks to send, and the commands that send them. Whoever takes them sends them or puts them back."""
        if not self._ack_count:
            return {}, []
        with self._lock:
            taken, self._acks, self._ack_count = self._acks, {}, 0
        keys, owner = self.channel.keys_of, self.channel.owner
        return taken, [("HDEL", keys(queue).held(owner), *numbers) for queue, numbers in taken.items()]

    def put_back(self, taken: dict[str, list[int]]) -> None:
        """Their sending failed, or may have: send them again later. An ack may be sent any number of times."""
        with self._lock:
            for queue, numbers in taken.items():
                self._acks.setdefault(queue, []).extend(numbers)
                self._ack_count += len(numbers)

    def check_acks(self, taken: dict[str, list[int]], replies: list[Any]) -> None:
        """Say so if a message had already gone to somebody else. Raises the server's error, if it gave one."""
        for (queue, numbers), reply in zip(taken.items(), replies, strict=True):
            if isinstance(reply, Exception):
                self.put_back({queue: numbers})
                raise reply
            if reply < len(numbers):
                logger.info(
                    "%d ack(s) on queue %r came after the lease had lapsed: the messages went back to the queue",
                    len(numbers) - reply,
                    queue,
                )

    def flush(self, timeout: float | None = None) -> None:
        """Send the acks that wait. Any thread. Raises the connection's errors; nothing is forgotten then."""
        with self.sending:
            taken, commands = self.take_acks()
            if not commands:
                return
            try:
                replies = self.channel.call(commands, timeout)
            except BaseException:
                self.put_back(taken)
                raise
            self.check_acks(taken, replies)

    def forget(self) -> None:
        """The channel leaves: nothing here is its own any more."""
        self._delivered.clear()
        self._fleeting.clear()
        self.places.clear()

    # --- giving back ------------------------------------------------------------------------------

    def restore_unacked(self, how: int = 1) -> None:
        """Give back what was handed out and not settled (`basic_recover`). how: 1 marks it redelivered, 0 not."""
        tags: dict[str, list[str]] = {}
        for tag in list(self._delivered):
            tags.setdefault(self.places.get(tag, ("", 0))[0], []).append(tag)
        for queue, mine in tags.items():
            if queue:
                self.channel.give_back_all(queue, [self.places[tag][1] for tag in mine], how=how)
            for tag in mine:
                self.settle(tag)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """At close, at exit and when collected: send the acks, give back the rest. Only the first call counts."""
        self._on_collect.cancel()
        self.channel.leave()

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """kombu's periodic restore: ours happens while fetching, by the server's clock."""
