"""The publishing side: routing a message to lists, and landing it there with its mark in one step.

A message with an `inner-msg-id` header lands once per list within the window, however often it is sent. A message
without one lands as often as it is sent, but is never sent twice by the transport itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from kombu.exceptions import BatchPublishError
from kombu.utils.json import dumps

from ...errors import Unroutable
from ...headers import INNER_MSG_ID, REDRIVE
from ...model import Landing
from .base import BaseChannel
from .keys import mark_key
from .scripts import LAND
from .wire import Command

__all__ = ["Batch", "PublishingChannel"]


class Route:
    """Where an exchange sends one message: collected by the channel's `_put` and `_put_fanout`."""

    __slots__ = ("queues", "topics")

    def __init__(self) -> None:
        self.queues: list[str] = []
        self.topics: list[str] = []


def land_commands(channel: BaseChannel, message: dict[str, Any], route: Route, *, mandatory: bool) -> list[Command]:
    """The commands that store a routed message, one or more per list and one per topic.

    Raises Unroutable if the message is mandatory and goes nowhere: nothing is sent then.
    """
    headers = message["headers"]
    inner_msg_id = headers.get(INNER_MSG_ID)
    if mandatory and not route.queues and not route.topics:
        raise Unroutable(
            "no queue is bound for this exchange and routing key, so nothing was stored; declare the queue first",
            inner_msg_id if isinstance(inner_msg_id, str) else "",
        )
    prefix = channel.global_keyprefix
    commands: list[Command] = []
    for at, queue in enumerate(route.queues):
        if at:  # every copy has a delivery tag of its own, for the sake of kombu's own consumers
            message["properties"]["delivery_tag"] = channel._next_delivery_tag()
        text = dumps(message)
        key = prefix + channel._q_for_pri(queue, channel._get_message_priority(message))
        expiry = channel.expiry_of(queue)
        lists = channel.keys_of(queue).lists if expiry else ()
        if isinstance(inner_msg_id, str) and inner_msg_id:
            mark = mark_key(key, inner_msg_id, headers.get(REDRIVE), prefix=prefix)
            commands.append((LAND, 2 + len(lists), key, mark, *lists, text, channel.window_ms, expiry))
        else:
            commands.append(("LPUSH", key, text))
            commands.extend(("PEXPIRE", name, expiry) for name in lists)
    commands.extend(("PUBLISH", prefix + topic, dumps(message)) for topic in route.topics)
    return commands


def landing_of(commands: Sequence[Command], replies: Sequence[Any]) -> Landing | None:
    """What the replies say of one message: None if it was stored nowhere (fanout, or no queue and not mandatory).

    Raises the server's first error. Lists that took the message before keep it and its mark: a resend completes.
    """
    landing = None
    for command, reply in zip(commands, replies, strict=True):
        if isinstance(reply, Exception):
            raise reply
        if command[0] is LAND and reply == 0:
            landing = landing or Landing.DUPLICATE
        elif command[0] is LAND or command[0] == "LPUSH":
            landing = Landing.LANDED
    return landing


class Batch:
    """What `Producer.batch()` fills: publishes that are sent together. One thread.

    After a failure it is uncertain which of them landed. Messages with an inner-msg-id may then be published again,
    all of them, in a new batch: each lands once. landings: the outcome of every message that was sent, in order.
    """

    def __init__(self, channel: BaseChannel, max_size: int) -> None:
        self.channel = channel
        self.max_size = max_size
        self.landings: list[Landing | None] = []
        self._commands: list[Command] = []
        self._sizes: list[int] = []  # commands per message
        self._failed: BaseException | None = None
        self._over = ""

    def publish(self, message: dict[str, Any], **kwargs: Any) -> None:
        """Route one message and keep its commands; send what has gathered when it is max_size."""
        self._check()
        commands = self.channel.prepare_publish(message, **kwargs)
        if self._commands and len(self._commands) + len(commands) > self.max_size:
            self.flush()
        self._commands += commands
        self._sizes.append(len(commands))
        if len(self._commands) >= self.max_size:
            self.flush()

    def flush(self) -> None:
        """Send what has gathered. Raises kombu's BatchPublishError if that failed or may have failed."""
        self._check()
        commands, sizes = self._commands, self._sizes
        if not sizes:
            return
        self._commands, self._sizes = [], []
        try:
            replies = self.channel.call(commands) if commands else []
            start = 0
            for size in sizes:
                self.landings.append(landing_of(commands[start : start + size], replies[start : start + size]))
                start += size
        except BaseException as error:
            self._failed = error
            if isinstance(error, Exception):
                raise BatchPublishError("the batch failed, and part of it may have landed: publish it again") from error
            raise

    def discard(self) -> None:
        """Forget what was not sent."""
        self._over = "aborted"
        self._commands, self._sizes = [], []

    def close(self) -> None:
        self._over = self._over or "closed"

    def _check(self) -> None:
        if self._over:
            raise RuntimeError(f"this publish batch is {self._over}")
        if self._failed is not None:
            raise BatchPublishError("this publish batch failed before: use a new one") from self._failed


class PublishingChannel(BaseChannel):
    """The publishing half of our channel. Any thread."""

    #: Publishing with an inner-msg-id lands once: see `idempotent_bus.transports`.
    idempotent_edge: ClassVar[bool] = True

    supports_batch_publish = True

    def basic_publish(
        self,
        message: dict[str, Any],
        exchange: str,
        routing_key: str,
        mandatory: bool = False,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
        **kwargs: Any,
    ) -> Landing | None:
        """Store the message on every list that it is routed to, in one round trip.

        Returns LANDED if a list took it, DUPLICATE if every list had one with its inner-msg-id within the window,
        None if it is stored nowhere: fanout, or no queue and not mandatory. Raises Unroutable if it is mandatory
        and no queue is bound, or nobody listens to the fanout; the server's error, after which it is on no list or
        on some, so that a resend completes; redis-py's ConnectionError or TimeoutError, after which the outcome is
        unknown and the same message with the same inner-msg-id may be sent again. confirm_timeout (or timeout):
        seconds to wait for the answer. Any thread.
        """
        commands = self.prepare_publish(message, exchange, routing_key, mandatory)
        if not commands:
            return None
        replies = self.call(commands, confirm_timeout or timeout)
        landing = landing_of(commands, replies)
        if mandatory and landing is None and not any(replies):
            land_commands(self, message, Route(), mandatory=True)  # raises Unroutable
        return landing

    def prepare_publish(
        self, message: dict[str, Any], exchange: str, routing_key: str, mandatory: bool = False, **kwargs: Any
    ) -> list[Command]:
        """Route a message and return the commands that store it; nothing is sent but what routing needs."""
        self._inplace_augment_message(message, exchange, routing_key)
        route = Route()
        if exchange:
            self.typeof(exchange).deliver(message, exchange, routing_key, route=route)
        else:
            self._put(routing_key, message, route=route)
        return land_commands(self, message, route, mandatory=mandatory)

    def _put(self, queue: str, message: dict[str, Any], *, route: Route | None = None, **kwargs: Any) -> None:
        if route is not None:
            route.queues.append(queue)
        else:
            super()._put(queue, message, **kwargs)

    def _put_fanout(
        self, exchange: str, message: dict[str, Any], routing_key: str, *, route: Route | None = None, **kwargs: Any
    ) -> None:
        if route is not None:
            route.topics.extend(self._get_publish_topics(exchange, routing_key))
        else:
            super()._put_fanout(exchange, message, routing_key, **kwargs)

    def create_publish_batch(self, max_size: int) -> Batch:
        return Batch(self, max_size)
