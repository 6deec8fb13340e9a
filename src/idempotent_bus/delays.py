"""Where messages wait on RabbitMQ, and how they come back to the queue that they came from.

::

    idempotent-bus.wait.<ms> --- when its time is over ---> idempotent-bus.back ---> <queue>.back ---> <queue>
    (one for each power of two from 250 ms)                           |
                                                                      +--- no such queue ---> idempotent-bus.stranded

The delay queues are shared by all of a virtual host: each is a durable quorum queue behind a fanout exchange of its
name, and the routing key says which queue the message goes back to. None blocks a short wait behind a longer one. The
broker itself hands a message on, with a confirm, and only then forgets it.

It returns through `<queue>.back`, one for each consumed queue, which hands it on at once. That is for the neighbours:
the broker has at most 32 messages of one queue on their way, and if these cannot be taken (their queue was deleted, or
is full and refuses), all behind them wait too, for minutes after the cause is gone. `<queue>.back` takes everything, so
only its own messages wait there. (Measured without it: 40 such messages, and a neighbour's was not back after 12 s
instead of 1 s.) A dozen delay queues for each consumed queue would keep them apart as well, but the broker reserves
file handles for every quorum queue: one with 1,024 stood still at three hundred of them.

All this should be there before trouble is: a quorum queue that was declared just before its broker was killed has lost
confirmed messages. `IdempotentConsumer` declares it when it starts; a bare kombu callback at first need.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable
from typing import Any, Final

from kombu import Connection, Exchange, Queue

from .errors import ConfigurationError

__all__ = ["declare", "delay_for", "delay_name", "entities", "refused", "return_queue"]

_SHORTEST_MS: Final = 250
#: What AMQP allows a queue's name, in bytes.
_LONGEST_NAME: Final = 255
#: Handing on with a confirm is for quorum queues only; a classic one may drop a message then.
_HANDS_ON: Final = {
    "x-queue-type": "quorum",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


def delay_for(seconds: float) -> int:
    """The time that a wait of so many seconds takes, in milliseconds: never less, and less than twice as long."""
    milliseconds = _SHORTEST_MS
    while milliseconds < seconds * 1000:
        milliseconds *= 2
    return milliseconds


def delay_name(seconds: float) -> str:
    """The exchange, and the queue, for a wait of so many seconds; the routing key is the queue to come back to."""
    return f"idempotent-bus.wait.{delay_for(seconds)}"


def entities(queue: str, seconds: float, *, again: bool = False) -> tuple[Queue, ...]:
    """What must be declared before a message from `queue` can wait; the same objects each time.

    again: other objects, which are declared however often that was done before.
    """
    kind = _DeclaredAgain if again else Queue
    return (_stranded(kind), _return_queue(kind, queue), _delay_queue(kind, delay_for(seconds)))


def return_queue(queue: str) -> Queue:
    """The queue through which messages come back to `queue`. Delete it after that one, if that one is gone for good."""
    return _return_queue(Queue, queue)


def declare(connection: Connection, longest: float, queues: Iterable[str]) -> None:
    """Declare what waits of up to `longest` seconds need, for messages from these queues.

    Nothing is done on brokers that are not AMQP: what waits there waits otherwise. Raises ConfigurationError if
    something of these names is there that would not hand messages back, and the connection's errors.
    """
    if connection.transport.driver_type != "amqp":
        return
    wanted = [_stranded(Queue), *(_return_queue(Queue, queue) for queue in queues)]
    milliseconds = _SHORTEST_MS
    while milliseconds <= delay_for(longest):
        wanted.append(_delay_queue(Queue, milliseconds))
        milliseconds *= 2
    channel = connection.channel()  # of its own: a refusal closes it
    try:
        for queue in wanted:
            try:
                # Always asked, whatever kombu remembers of this connection: somebody may have deleted it.
                queue(channel).declare()
            except connection.channel_errors as error:
                raise refused(queue.name, error) from error
    finally:
        with contextlib.suppress(*connection.connection_errors, *connection.channel_errors):
            channel.close()


def refused(name: str, error: BaseException) -> ConfigurationError:
    """What to say when the broker refuses to declare something of these."""
    return ConfigurationError(
        f"{name!r}, which messages need to wait, cannot be declared ({error}). If there is a queue or an exchange of "
        "that name, but with other arguments, messages would not come back from there: consume what is in it and "
        "delete it; it will be declared as it must be. Quorum queues that hand on at least once need RabbitMQ 3.10"
    )


class _DeclaredAgain(Queue):  # type: ignore[misc]  # kombu has no types
    """A queue of which nobody remembers that it was declared before."""

    can_cache_declaration = False


@functools.cache
def _stranded(kind: type[Queue]) -> Queue:
    """For what finds no way back: it is kept, and `idempotent-bus redrive idempotent-bus.stranded` moves it back."""
    exchange = Exchange("idempotent-bus.stranded", "fanout", durable=True)
    return kind(exchange.name, exchange, durable=True, queue_arguments={"x-queue-type": "quorum"})


@functools.lru_cache(maxsize=1024)
def _return_queue(kind: type[Queue], queue: str) -> Queue:
    back = Exchange(
        "idempotent-bus.back", "direct", durable=True, arguments={"alternate-exchange": "idempotent-bus.stranded"}
    )
    arguments: dict[str, Any] = {
        **_HANDS_ON,
        "x-message-ttl": 0,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": queue,
    }
    name = f"{queue}.back"
    if len(name.encode()) > _LONGEST_NAME:
        name = f"idempotent-bus.{hashlib.sha256(queue.encode()).hexdigest()[:32]}.back"
    return kind(name, back, routing_key=queue, durable=True, queue_arguments=arguments)


@functools.lru_cache(maxsize=256)
def _delay_queue(kind: type[Queue], milliseconds: int) -> Queue:
    # No routing key of its own: the message keeps that of its publish, the queue to come back to.
    arguments = {**_HANDS_ON, "x-message-ttl": milliseconds, "x-dead-letter-exchange": "idempotent-bus.back"}
    name = f"idempotent-bus.wait.{milliseconds}"
    return kind(name, Exchange(name, "fanout", durable=True), durable=True, queue_arguments=arguments)
