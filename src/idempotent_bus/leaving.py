"""Taking the library out again: what our transports hold goes back to where kombu's own transports read it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from kombu import Connection

from .errors import ConfigurationError

__all__ = ["restore"]


def restore(
    connection: Connection, *, queues: Collection[str] = (), dead: bool = False, force: bool = False
) -> dict[str, int]:
    """Move unacked and delayed messages, and on request dead ones, back to the plain queues that they came from.

    connection: of one of our schemes (`idempotent-redis...`, `idempotent-sqla+...`). queues: only these, or all.
    dead: the transport's own dead messages as well (the queues `<scope>.dead` are plain queues already).
    force: what a live consumer holds too; stop the consumers first, or it is worked on twice.

    Returns how many messages of each kind were moved, and how many are `left` with live consumers. Safe to repeat.
    Raises ConfigurationError for another transport, and the driver's errors; what was moved before stays moved.
    """
    module = type(connection.transport).__module__
    if module.endswith("transports.redis.transport"):
        return _restore_redis(connection, queues, dead, force)
    if module.endswith("transports.sql.transport"):
        from .transports.sql.transport import restore as restore_sql

        return restore_sql(connection, queues=queues or None, dead=dead, force=force)
    raise ConfigurationError(
        "nothing to restore here: only the transports idempotent-redis, -rediss, -sentinel and -sqla keep anything"
    )


def _restore_redis(connection: Any, queues: Collection[str], dead: bool, force: bool) -> dict[str, int]:
    from .transports.redis import restore as redis_restore

    moved = redis_restore.restore(connection, *queues, dead=dead, force=force)
    left = redis_restore.holdings(connection)
    return {
        "unacked": sum(queue.unacked for queue in moved),
        "delayed": sum(queue.delayed for queue in moved),
        "dead": sum(queue.dead for queue in moved),
        "left": sum(queue.unacked for queue in left if not queues or queue.queue in queues),
    }
