"""Where messages wait on RabbitMQ: delay queues that hand them back to the queue that they came from.

For each consumed queue a durable quorum queue `<queue>.wait.<milliseconds>` for each power of two from 250 ms: few, and
none blocks a short wait behind a longer one. A message's time there is the queue's own; when it is over the broker
itself publishes it, with a confirm, to the default exchange and so to the consumed queue, and only then forgets it.

Each consumed queue has its own, and does not share them with others. The broker has at most 32 messages of one delay
queue on their way back; if these cannot be taken back (their queue was deleted, or is full and refuses), all behind
them wait too, and for minutes after the cause is gone. With delay queues that were shared, one queue stopped
the retries of all (measured: 40 such messages, and a neighbour's was not back after 12 s instead of 1 s).

They should be there before trouble is: a quorum queue that was declared just before its broker was killed has lost
confirmed messages. `IdempotentConsumer` declares them when it starts; a bare kombu callback at first need.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable
from typing import Any, Final

from kombu import Connection, Exchange, Queue

from .errors import ConfigurationError

__all__ = ["declare", "delay_for", "delay_queue", "delay_queues", "refused"]

_SHORTEST_MS: Final = 250
#: What AMQP allows a queue's name, in bytes.
_LONGEST_NAME: Final = 255


def delay_for(seconds: float) -> int:
    """The time that a wait of so many seconds takes, in milliseconds: never less, and less than twice as long."""
    milliseconds = _SHORTEST_MS
    while milliseconds < seconds * 1000:
        milliseconds *= 2
    return milliseconds


def delay_queue(queue: str, seconds: float) -> Queue:
    """The delay queue for a message from `queue`; the same object each time, so that it is declared once."""
    return _delay_queue(queue, delay_for(seconds))


def delay_queues(queue: str, longest: float) -> list[Queue]:
    """All delay queues that waits of up to `longest` seconds need."""
    found, milliseconds = [], _SHORTEST_MS
    while milliseconds <= delay_for(longest):
        found.append(_delay_queue(queue, milliseconds))
        milliseconds *= 2
    return found


def declare(connection: Connection, longest: float, queues: Iterable[str]) -> None:
    """Declare what waits of up to `longest` seconds need, for messages from these queues.

    Nothing is done on brokers that are not AMQP: what waits there waits otherwise. About 6 ms for each delay queue that
    is new, and 0.1 ms for one that is there. Raises ConfigurationError if a queue of that name would not hand messages
    back, and the connection's errors.
    """
    if connection.transport.driver_type != "amqp":
        return
    channel = connection.channel()  # of its own: a refusal closes it
    try:
        for name in queues:
            for queue in delay_queues(name, longest):
                try:
                    # Always asked, whatever kombu remembers of this connection: somebody may have deleted it.
                    queue(channel).queue_declare()
                except connection.channel_errors as error:
                    raise refused(queue, error) from error
    finally:
        with contextlib.suppress(*connection.connection_errors, *connection.channel_errors):
            channel.close()


def refused(queue: Queue, error: BaseException) -> ConfigurationError:
    """What to say when the broker refuses to declare a delay queue."""
    return ConfigurationError(
        f"the delay queue {queue.name!r} cannot be declared ({error}). If there is a queue of that name with other "
        "arguments, messages put there would not come back: consume what is in it, delete it, and it will be declared "
        f"as it must be. It needs RabbitMQ 3.10 or newer and these arguments: {queue.queue_arguments}"
    )


@functools.lru_cache(maxsize=4096)
def _delay_queue(queue: str, milliseconds: int) -> Queue:
    arguments: dict[str, Any] = {
        # Only quorum queues hand a message on with a confirm (at-least-once); a classic one may drop it then.
        "x-queue-type": "quorum",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
        "x-message-ttl": milliseconds,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": queue,
    }
    return Queue(_name(queue, milliseconds), exchange=Exchange(""), durable=True, queue_arguments=arguments)


def _name(queue: str, milliseconds: int) -> str:
    name = f"{queue}.wait.{milliseconds}"
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    return f"idempotent-bus.{hashlib.sha256(queue.encode()).hexdigest()[:32]}.wait.{milliseconds}"
