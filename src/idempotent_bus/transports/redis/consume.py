"""The consuming half of our channel: deliveries in, and every way in which one can be settled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from kombu.log import get_logger

from .edge import PublishingChannel
from .fetch import NO_MESSAGE, Line, message_of
from .hold import Hold
from .scripts import BURY, DELAY, GIVEBACK
from .wire import Command

logger = get_logger(__name__)


class ConsumingChannel(PublishingChannel):
    """For one consuming thread; acks, rejects and delays may come from any."""

    QoS = Hold
    _qos: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.QoS = Hold  # whatever ack_emulation says: without registering there is no promise
        self.line = Line(self)

    def _after_fork(self) -> None:
        if self._qos is not None:
            self._qos = None  # with the parent's deliveries and locks; its finalizer knows its own process
        if "line" in vars(self):
            self.line = Line(self)
        super()._after_fork()

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Any], Any], consumer_tag: str, **kwargs: Any
    ) -> Any:
        def deliver(payload: dict[str, Any]) -> Any:
            message = self._message(payload, queue)
            if message is None:
                return None
            if no_ack:
                self.qos.ack(message.delivery_tag)
            else:
                self.qos.append(message, message.delivery_tag)
            return callback(message)

        result = super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)
        self.callbacks[queue] = deliver
        self.line.look_again()
        return result

    def _basic_cancel(self, consumer_tag: str) -> Any:
        queue = self._tag_to_queue.get(consumer_tag)
        result = super()._basic_cancel(consumer_tag)
        if queue is not None and queue not in self._active_queues:
            self.callbacks.pop(queue, None)
            self.line.drop_queue(queue)
            self.line.look_again()
        return result

    def _message(self, payload: dict[str, Any], queue: str) -> Any:
        """The message object, or None for one that cannot be made: it is in the dead list then."""
        try:
            return self.Message(payload, channel=self)
        except Exception:  # whatever a foreign body raises, the message must stay visible
            tag = payload["properties"]["delivery_tag"]
            logger.exception("a message on queue %r cannot be decoded; it is in the dead list", queue)
            place_queue, number = self.qos.places[tag]
            self.bury(place_queue, number, "undecodable")
            self.qos.settle(tag)
            return None

    def next_message(self) -> bool:
        """Hand out one message if there is one and prefetch allows."""
        if self.again:
            self.connection._deliver(*self.again.popleft())
            return True
        if not self._consumers or not self.qos.can_consume():
            return False
        line = self.line
        if line.hand_out():
            return True
        return not line.quiet and line.refill() and line.hand_out()

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """The next message of a queue, or None."""
        wire = self._borrow()
        try:
            found = self.line.take(wire, [queue], 1)
        except BaseException:
            self.line.doubt()
            raise
        finally:
            self._put_away(wire)
        if not found:
            return None
        _, number, text = found[0]
        try:
            payload = message_of(text)
        except NO_MESSAGE:
            self.bury(queue, number, "undecodable")
            return None
        tag = payload["properties"]["delivery_tag"] = f"{self.owner}.{number}"
        message = self._message(payload, queue)
        if message is not None and no_ack:
            self.qos.ack(tag)
        elif message is not None:
            self.qos.append(message, tag)
        return message

    def basic_delay(self, delivery_tag: str, delay: float) -> bool:
        """Settle a delivery by letting the message wait: it comes back to its queue `delay` seconds from now.

        One atomic step; the waiting is in Redis, so no consumer need live. It is not counted as a delivery. False if
        the delivery was not held any more: its lease had lapsed, and the message has gone back by itself. Raises
        redis-py's errors; then it may be tried again. Any thread.
        """
        return self.qos.delay(delivery_tag, delay)

    def queues_in_turn(self) -> list[str]:
        queues: list[str] = self._queue_cycle.consume(len(self.active_queues))
        return list(queues)

    def served(self, queue: str) -> None:
        self._queue_cycle.rotate(queue)

    def fanout_queue_of(self, message: Any) -> str:
        return str(self._fanout_to_queue.get((message.delivery_info or {}).get("exchange"), ""))

    def deliver_again(self, message: Any, queue: str) -> None:
        """A fanout message was requeued: the server has no list for it, so this consumer gets it again."""
        raw = message._raw
        raw["properties"].setdefault("delivery_info", {})["redelivered"] = True
        raw["properties"]["delivery_tag"] = self._next_delivery_tag()
        self.again.append((raw, queue))
        self.wake()

    # --- settling otherwise than by an ack ------------------------------------------------------------

    def _settled(self, reply: Any) -> Any:
        if isinstance(reply, Exception):
            raise reply
        return reply

    def give_back(self, queue: str, number: int, *, counted: bool) -> None:
        """Requeue one delivery, behind the others."""
        command = self.giveback_command(
            queue, self.owner, "some", how=2 if counted else 1, head=False, numbers=[number]
        )
        _, buried = self._settled(self.call([command])[0])
        if buried:
            logger.error("a message of queue %r was delivered %d times: dead list", queue, self.max_deliveries)

    def give_back_all(self, queue: str, numbers: list[int], *, how: int) -> None:
        """Give deliveries back to the front of their queue, in their old order."""
        self._settled(
            self.call([self.giveback_command(queue, self.owner, "some", how=how, head=True, numbers=numbers)])[0]
        )

    def give_up(self, keep: Collection[str]) -> None:
        """Give all that is held back, but for these tags, as if it had never been. Any thread.

        For a consumer that stands still. What it has in hand is not its own any more, and must be safe to run twice.
        """
        places = [(tag, place) for tag, place in list(self.qos.places.items()) if tag not in keep]
        numbers: dict[str, list[int]] = {}
        for _, (queue, number) in places:
            numbers.setdefault(queue, []).append(number)
        for queue, mine in numbers.items():
            self.give_back_all(queue, mine, how=0)
        for tag, _ in places:
            self.qos.settle(tag)

    def put_back(self) -> None:
        """Give all that was handed out and not settled back, as if it had never been: in its place, not counted."""
        self.qos.flush()
        self.qos.restore_unacked(how=0)

    def giveback_command(
        self, queue: str, owner: str, which: str, *, how: int, head: bool, numbers: Sequence[int] = ()
    ) -> Command:
        keys = self.keys_of(queue)
        names = (keys.owners, keys.held(owner), keys.dead, *keys.lists)
        most = self.max_deliveries or 0
        place = "head" if head else "tail"
        head_args = (owner, which, how, most, place, self.expiry_of(queue), len(keys.priorities))
        return (GIVEBACK, len(names), *names, *head_args, *keys.priorities, *numbers)

    def bury(self, queue: str, number: int, reason: str) -> None:
        keys = self.keys_of(queue)
        self._settled(self.call([(BURY, 2, keys.held(self.owner), keys.dead, number, reason)])[0])

    def postpone(self, queue: str, number: int, delay: float) -> bool:
        keys = self.keys_of(queue)
        command = (DELAY, 2, keys.held(self.owner), keys.delayed, number, self.owner, max(0, int(delay * 1000 + 0.999)))
        return bool(self._settled(self.call([command])[0]))
