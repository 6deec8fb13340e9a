"""A broker in memory for tests: it delivers, redelivers, delays, dead-letters and refuses copies at its edge.

It knows no kombu: what it hands out are `Delivery` objects, which answer as `work.Settlement` says, so that an executor
can be run over it thousands of times a second. Time is the clock's that it is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..model import Landing, Reason
from ..msgid import new_inner_msg_id

__all__ = ["BrokerMessage", "DeadLetter", "Delivery", "MemoryBroker"]


@dataclass(eq=False, slots=True)
class BrokerMessage:
    """A message that the broker keeps. ready_at: not delivered before, by the broker's clock.

    redelivered: it may have been delivered before. redrive: how often it was moved back out of the dead letter; then
    published_at is when it died.
    """

    body: Any
    inner_msg_id: str
    published_at: float
    ready_at: float = 0.0
    redelivered: bool = False
    redrive: int = 0


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was given up, and why, and when."""

    message: BrokerMessage
    reason: Reason
    error: str
    attempts: int
    died_at: float


class Delivery:
    """One message with one consumer, to be answered once. A `work.Settlement`.

    Once the channel is closed, or the visibility timeout over, an answer raises ConnectionError, and changes nothing:
    the message is the broker's again.
    """

    __slots__ = ("_broker", "consumer", "message")

    def __init__(self, broker: MemoryBroker, consumer: object, message: BrokerMessage) -> None:
        self._broker = broker
        self.consumer = consumer
        self.message = message

    def ack(self) -> None:
        """The broker may forget it."""
        self._broker._check(self)
        self._broker._forget(self, "ack")

    def wait(self, delay: float) -> None:
        """It comes back no sooner than `delay` seconds from now, as a successor that counts as redelivered."""
        broker = self._broker
        broker._check(self)
        message = self.message
        broker.queue.append(
            BrokerMessage(
                message.body,
                message.inner_msg_id,
                message.published_at,
                broker.clock() + delay,
                True,
                message.redrive,
            )
        )
        broker._forget(self, "wait")

    def dead_letter(self, reason: Reason, error: str, attempts: int) -> bool:
        """It goes to the dead letter. False, and it is put off, while that takes nothing (`dead_letter_full`)."""
        broker = self._broker
        broker._check(self)
        if broker.dead_letter_full:
            self.wait(1.0)
            return False
        broker.dead.append(DeadLetter(self.message, reason, error, attempts, broker.clock()))
        broker._forget(self, "dead_letter")
        return True


@dataclass(eq=False)
class MemoryBroker:
    """One queue with its dead letter. For one thread at a time.

    clock: seconds. edge: refuse a second publish with the same inner-msg-id. queue: what is ready or delayed. unacked:
    what consumers have. dead: what was given up.
    lose_acks: whatever is answered is done but for its last half, the ack: so a move whose confirm came, and whose
    worker then died. dead_letter_full: the dead letter takes nothing.
    """

    clock: Callable[[], float]
    edge: bool = True
    queue: list[BrokerMessage] = field(default_factory=list)
    unacked: list[Delivery] = field(default_factory=list)
    dead: list[DeadLetter] = field(default_factory=list)
    lose_acks: bool = False
    dead_letter_full: bool = False
    on_answer: Callable[[Delivery, str], None] | None = None
    _marks: set[str] = field(default_factory=set)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def publish(self, body: Any, *, inner_msg_id: str | None = None, delay: float = 0.0) -> Landing:
        """Land a message, or refuse a copy of one that has landed."""
        identity = new_inner_msg_id() if inner_msg_id is None else inner_msg_id
        if self.edge and identity in self._marks:
            return Landing.DUPLICATE
        now = self.clock()
        self.queue.append(BrokerMessage(body, identity, now, now + delay))
        self._marks.add(identity)
        return Landing.LANDED

    def receive(self, consumer: object = None, most: int = 1) -> list[Delivery]:
        """Deliver what is ready, at most so many."""
        now = self.clock()
        ready = [message for message in self.queue if message.ready_at <= now][:most]
        deliveries = [Delivery(self, consumer, message) for message in ready]
        for message in ready:
            self.queue.remove(message)
        self.unacked.extend(deliveries)
        return deliveries

    @property
    def has_ready(self) -> bool:
        """True if `receive` would give something."""
        now = self.clock()
        return any(message.ready_at <= now for message in self.queue)

    @property
    def next_ready(self) -> float | None:
        """When the next message is ready; None if there is none."""
        return min((message.ready_at for message in self.queue), default=None)

    def close_channel(self, consumer: object = None, *, after: float = 0.0) -> None:
        """What this consumer has not settled comes back, as redelivered, to the head of the queue.

        after: seconds; how a visibility timeout that runs out while the consumer stands still is played.
        """
        back = [delivery for delivery in self.unacked if delivery.consumer == consumer]
        for delivery in back:
            self.unacked.remove(delivery)
            delivery.message.redelivered = True
            delivery.message.ready_at = self.clock() + after if after else delivery.message.ready_at
        self.queue[:0] = [delivery.message for delivery in back]

    def redrive(self) -> int:
        """Move all dead letters back to the queue, past the edge, with a larger redrive number. Returns how many."""
        dead, self.dead = self.dead, []
        now = self.clock()
        for letter in dead:
            message = letter.message
            self.queue.append(
                BrokerMessage(
                    message.body,
                    message.inner_msg_id,
                    letter.died_at,
                    now,
                    redelivered=False,
                    redrive=message.redrive + 1,
                )
            )
        return len(dead)

    def _check(self, delivery: Delivery) -> None:
        if delivery not in self.unacked:
            raise ConnectionError("the channel of this delivery is closed: it is the broker's again")

    def _forget(self, delivery: Delivery, answer: str) -> None:
        if self.on_answer is not None:
            self.on_answer(delivery, answer)
        if not self.lose_acks:
            self.unacked.remove(delivery)
