"""How a kombu delivery is answered: acked, put off, or moved to the dead letter. The broker keeps it throughout.

Putting off, by broker:

* a transport of ours: its own delay, one atomic step;
* RabbitMQ: a *confirmed successor*. The same message with the same inner-msg-id goes, with a confirm, into a delay
  queue (`delays.py`), from which it returns to the queue it came from, and only then the original is acked. A requeue
  would be a tight loop, and on quorum queues with a delivery limit it destroys the message (21 deliveries in 23 ms);
* kombu's other transports have no delay: `IdempotentConsumer` holds the message unacked and looks again when it is
  due; a bare callback can only pause for at most a second and put the message back, behind its neighbours.

The dead letter is written with a confirm before the ack. On a transport of ours it goes past the edge: a message that
was moved back from the dead letter and fails again comes there with the same inner-msg-id, and a refusal would lose it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from kombu.message import Message

from .errors import ConfigurationError, IdempotentBusError
from .headers import (
    DEAD_AT,
    DEAD_ATTEMPTS,
    DEAD_ERROR,
    DEAD_FINGERPRINT,
    DEAD_REASON,
    DEAD_RECORD,
    DEAD_SCOPE,
    ORIGIN_QUEUE,
)
from .kombu_message import (
    DELIVERY_COUNT,
    OF_ONE_DEATH,
    came_back,
    driver_type,
    forbid_acks,
    is_amqp,
    origin_queue,
    was_fetched_without_ack,
)
from .model import Reason
from .moving import let_go, let_wait, move, put

__all__ = ["MessageSettlement", "came_back", "forbid_acks", "let_go", "origin_queue", "was_fetched_without_ack"]

log = logging.getLogger(__name__)

#: The longest pause of a bare callback on a transport without delays: longer, and its neighbours would wait for it.
_LONGEST_PAUSE: Final = 1.0
#: A quorum queue's message that came back so often is replaced before anything else is done with it. Twice, so that a
#: worker that was merely started anew costs nothing; far below the limits that people set (5, RabbitMQ's own is 20).
_MOST_RETURNS: Final = 2
#: A message whose dead letter cannot be written is looked at again after so many seconds.
_DEAD_LETTER_AGAIN: Final = 4.0


class MessageSettlement:
    """Answers for one kombu message. Use it from the thread that consumes.

    queue: where the message was consumed from, if that is known for sure. park: called with a delay in seconds instead
    of pausing and requeueing, where the caller can hold the message and look again later. ack: acks the message, where
    the caller gathers acks.

    record, fingerprint: what a dead letter says of the message's record, in hex, so that a redrive can tell whether
    it was completed meanwhile, and with which body. Set them once they are known.
    """

    __slots__ = ("_ack", "_dead_letter", "_message", "_park", "_queue", "_scope", "fingerprint", "record")

    def __init__(
        self,
        message: Message,
        *,
        queue: str | None,
        scope: str,
        dead_letter: str,
        park: Callable[[float], None] | None = None,
        ack: Callable[[Message], None] | None = None,
    ) -> None:
        self.record: bytes | None = None
        self.fingerprint: bytes | None = None
        self._message = message
        self._queue = queue
        self._scope = scope
        self._dead_letter = dead_letter
        self._park = park
        # The class's own method: the instance's is out of the handler's reach (`forbid_acks`).
        self._ack = type(message).ack if ack is None else ack

    def ack(self) -> None:
        """The message is done: the broker may forget it."""
        self._ack(self._message)

    def wait(self, delay: float) -> None:
        """Let the message come back no sooner than `delay` seconds from now.

        Raises ConfigurationError if its delay queue is declared otherwise, and the broker's connection errors.
        """
        message, channel = self._message, self._message.channel
        if getattr(channel, "idempotent_edge", False):
            channel.basic_delay(message.delivery_tag, delay)
            message._state = "REQUEUED"
            return
        queue = self._origin() if is_amqp(channel) else None
        if queue is None:
            self._hold(delay)
            return
        try:
            let_wait(message, queue, delay, {ORIGIN_QUEUE: queue})
        except Exception as error:
            if isinstance(error, ConfigurationError) or self._has_lost_connection(error):
                raise
            # It stays here, unacked. A second copy that may have got there all the same is refused by its record.
            log.error("could not put off a message of scope %s, holding it: %s", self._scope, _said(error))
            self._hold(_LONGEST_PAUSE)
        else:
            self.ack()

    def renew(self) -> bool:
        """Replace a message that a quorum queue would soon destroy by a new one, whose deliveries count from 0.

        True: it is back in a moment, and nothing else may be done with this one. A message comes nearer to its queue's
        delivery limit whenever it was only prefetched while a connection was cut, a channel timed out or a worker
        stopped. Raises as `wait`.
        """
        message = self._message
        count = message.headers.get(DELIVERY_COUNT)
        if type(count) is not int or count < _MOST_RETURNS or not is_amqp(message.channel) or self._origin() is None:
            return False
        self.wait(0.0)
        return True

    def dead_letter(self, reason: Reason, error: str, attempts: int, *, record: str = "") -> bool:
        """Put the message into the dead letter; once that is confirmed, ack it.

        False: it could not be written there. The message is kept, and comes back in a few seconds. record: as the
        attribute of that name, in hex.
        """
        try:
            self.rescue(reason, error, attempts, record=record)
        except Exception as failure:
            if self._has_lost_connection(failure):
                raise
            # Whatever it is (a full or wrongly set up dead letter, a message too long for it): it must not stop the
            # messages that are well. A copy that may have got there all the same is a duplicate when it is redriven.
            log.error(
                "could not move a message of scope %s to %s, trying again later: %s",
                self._scope,
                self._dead_letter,
                _said(failure),
            )
            self.wait(_DEAD_LETTER_AGAIN)  # not held: RabbitMQ takes back what is held for long, and counts that
            return False
        self.ack()
        return True

    def rescue(self, reason: Reason, error: str, attempts: int, *, record: str = "") -> None:
        """Put the message into the dead letter, without an ack. Raises if that is not confirmed."""
        queue = self._origin()
        headers = {
            DEAD_REASON: reason.value,
            DEAD_ERROR: error.encode(errors="replace").decode()[:500],
            DEAD_ATTEMPTS: attempts,
            DEAD_SCOPE: self._scope,
            DEAD_AT: int(time.time()),
            ORIGIN_QUEUE: queue,
            DEAD_RECORD: record or (None if self.record is None else self.record.hex()),
            DEAD_FINGERPRINT: None if self.fingerprint is None else self.fingerprint.hex(),
        }
        known: dict[str, Any] = {name: value for name, value in headers.items() if value is not None}
        # What is not known of this death must not be believed from an earlier one, or from whoever published it.
        move(self._message, self._dead_letter, known, drop=OF_ONE_DEATH)
        log.warning("dead-lettered a message of scope %s to %s: %s", self._scope, self._dead_letter, reason.value)

    def _origin(self) -> str | None:
        if self._queue is None:
            self._queue = origin_queue(self._message)
        return self._queue

    def _has_lost_connection(self, error: Exception) -> bool:
        """True if the message is the broker's again: nothing can be settled, and the consumer has to reconnect."""
        connection = self._message.channel.connection
        return connection is None or isinstance(error, (OSError, EOFError, *connection.client.connection_errors))

    def _hold(self, delay: float) -> None:
        message, channel = self._message, self._message.channel
        if self._park is not None:
            self._park(delay)
            return
        time.sleep(min(delay, _LONGEST_PAUSE))
        if DELIVERY_COUNT in message.headers and is_amqp(channel):
            log.error(
                "a message of scope %s stays unacked until its channel closes: requeueing it could exceed the delivery "
                "limit of its quorum queue, which destroys it; consume through kombu's Consumer",
                self._scope,
            )
            return
        queue = self._origin() if driver_type(channel) == "redis" else None
        if queue is None:
            type(message).requeue(message)
        else:
            # kombu's Redis transport requeues at the head, where the next fetch takes it again at once: neighbours
            # would starve. Behind them first, and only then the ack.
            put(message, queue, {}, redelivered=True)
            self.ack()


def _said(error: Exception) -> str:
    """An error for the log: of ours the text, of a driver only the class, since its text may show the message."""
    return str(error) if isinstance(error, IdempotentBusError) else type(error).__name__
