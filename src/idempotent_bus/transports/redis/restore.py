"""Taking the library out again: everything that our Redis transport holds goes back to kombu's plain lists.

What is ready lies in plain lists anyway. What is unacked, delayed or dead lies under keys of ours, which plain kombu
does not read; `restore` moves it back. It may be run while consumers work, and run again: each step is atomic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigurationError
from .fetch import message_of
from .keys import our_keys_pattern, queue_of
from .scripts import REVIVE

__all__ = ["DeadMessage", "Holdings", "dead_messages", "holdings", "restore"]

_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Holdings:
    """How many messages of one queue lie outside its plain lists. After `restore`: how many were moved."""

    queue: str
    unacked: int = 0
    delayed: int = 0
    dead: int = 0


@dataclass(frozen=True, slots=True)
class DeadMessage:
    """A message in the dead list. at: seconds since the epoch, by the server's clock. reason: `deliveries`, `rejected`
    or `undecodable`. message: kombu's form as a dict, or None if it cannot be decoded; text: as it is stored."""

    queue: str
    at: float
    reason: str
    message: dict[str, Any] | None
    text: bytes


def holdings(connection: Any) -> list[Holdings]:
    """What our transport holds, by queue. connection: a kombu Connection of one of our Redis schemes.

    Reads the names of all keys (SCAN), so it is for people, not for every second. Raises ConfigurationError for
    another transport, redis-py's errors otherwise.
    """
    with _channel(connection) as channel:
        return [
            Holdings(
                queue,
                unacked=sum(channel.call([("HLEN", key)])[0] for key in held),
                delayed=_checked(channel.call([("ZCARD", channel.keys_of(queue).delayed)])[0]),
                dead=_checked(channel.call([("LLEN", channel.keys_of(queue).dead)])[0]),
            )
            for queue, held in _queues(channel)
        ]


def dead_messages(connection: Any, queue: str, limit: int = 100) -> list[DeadMessage]:
    """The oldest dead messages of a queue; they stay where they are. Raises as `holdings` does."""
    with _channel(connection) as channel:
        entries = _checked(channel.call([("LRANGE", channel.keys_of(queue).dead, -limit, -1)])[0])
    found = []
    for entry in reversed(entries):
        at, reason, _priority, text = entry.split(b" ", 3)
        try:
            message = message_of(text)
        except (ValueError, TypeError, KeyError, AttributeError):
            message = None
        found.append(DeadMessage(queue, int(at) / 1000, reason.decode(), message, text))
    return found


def restore(
    connection: Any, *queues: str, force: bool = False, delayed: bool = True, dead: bool = False
) -> list[Holdings]:
    """Move what our transport holds back to the plain lists, and say how much was moved.

    queues: only these; none named means all. Unacked messages go back if their consumer's lease has lapsed, or all of
    them with `force`: stop our consumers first, or what they work on will be worked on twice. Delayed messages go
    back at once, without waiting for their time. Dead messages go back only on request, past the edge's marks, with
    their count of deliveries forgotten. Safe to repeat. Raises as `holdings` does; what was moved before stays moved.
    """
    moved = []
    with _channel(connection) as channel:
        for queue, held in _queues(channel):
            if queues and queue not in queues:
                continue
            keys = channel.keys_of(queue)
            unacked = 0
            for key in held:
                owner = key.rpartition(":")[2]
                which = "all" if force else "lapsed"
                # Not counted: an operator's decision is no failed delivery.
                command = channel.giveback_command(queue, owner, which, how=1, head=True)
                unacked += _checked(channel.call([command])[0])[0]
            counts = {"delayed": 0, "dead": 0}
            for kind, key in (("delayed", keys.delayed), ("dead", keys.dead)):
                if not (delayed if kind == "delayed" else dead):
                    continue
                left = _checked(channel.call([("ZCARD" if kind == "delayed" else "LLEN", key)])[0])
                while left > 0:  # no more than there were: a message that dies again meanwhile is not moved for ever
                    at_most = min(left, _AT_ONCE)
                    command = (REVIVE, 1 + len(keys.lists), key, *keys.lists, kind, at_most)
                    done = _checked(channel.call([(*command, channel.expiry_of(queue), *keys.priorities)])[0])
                    counts[kind] += done
                    left = left - done if done else 0
            moved.append(Holdings(queue, unacked=unacked, **counts))
    return moved


@contextmanager
def _channel(connection: Any) -> Iterator[Any]:
    channel = connection.channel()
    try:
        if not hasattr(channel, "giveback_command"):
            raise ConfigurationError("this needs a connection of an idempotent-redis, -rediss or -sentinel URL")
        yield channel
    finally:
        channel.close()


def _queues(channel: Any) -> list[tuple[str, list[str]]]:
    """Every queue that we hold something of, and the keys of what is unacked."""
    prefix = channel.global_keyprefix
    # owners, delayed, dead, held: neither the marks nor a dedup store's records, of which there may be millions.
    pattern = our_keys_pattern(prefix)[:-1] + "[odh]*"
    found: dict[str, set[str]] = {}
    cursor: Any = b"0"
    while True:
        command = ("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
        cursor, names = _checked(channel.call([command])[0])
        for raw in names:
            try:
                name = raw.decode()
            except UnicodeDecodeError:
                continue  # a dedup store's record in the same database: its keys are bytes
            queue = queue_of(name, prefix=prefix)
            if queue is not None:
                held = found.setdefault(queue, set())
                if name.startswith(f"{channel.keys_of(queue).held_prefix}"):
                    held.add(name)
        if cursor == b"0":
            return [(queue, sorted(held)) for queue, held in sorted(found.items())]


def _checked(reply: Any) -> Any:
    if isinstance(reply, Exception):
        raise reply
    return reply
