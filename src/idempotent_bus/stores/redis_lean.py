"""One command over one of the client's own connections, with as little Python around it as possible.

redis-py's `execute_command` costs more than the round trip: a checkout and a return with locks and counters, a probe of
the socket, wrappers for retries, packing argument by argument. Here a few connections stay checked out between the
commands, and a command is one `send_packed_command` of redis-py's own connection and one read of its socket, so that
TLS, passwords, Sentinel's managed connections and RESP3 are as redis-py has them. What goes wrong on the way is not
dealt with here: the caller asks again through the client itself, with its retries.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from redis.connection import ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, ResponseError

from ..replies import replies_of

__all__ = ["Lean", "pack"]

#: Connections that are kept out of the pool at most, and the part of a bounded pool that they may be.
_SPARE = 8
_SHARE = 8


def pack(script: bytes, keys: Sequence[bytes], values: Sequence[bytes]) -> bytes:
    """An EVALSHA in the form that the server reads. script: its SHA-1 in hex digits."""
    count = b"%d" % len(keys)
    parts: list[bytes | int] = [script, len(count), count]
    for argument in keys:
        parts += (len(argument), argument)
    for argument in values:
        parts += (len(argument), argument)
    return _form(len(keys) + len(values)) % tuple(parts)


@lru_cache(maxsize=256)
def _form(arguments: int) -> bytes:
    """An EVALSHA with so many keys and values, to be filled in."""
    return b"*%d\r\n$7\r\nEVALSHA\r\n$40\r\n%%b\r\n" % (3 + arguments) + b"$%d\r\n%b\r\n" * (1 + arguments)


class Lean:
    """Connections of a pool, kept at hand; safe for threads, and for a fork, after which the child takes new ones.

    pool: as many of its connections are kept as threads were here at once, but 8 at most, and an eighth of a pool
    that is bounded: others use it too.
    """

    def __init__(self, pool: ConnectionPool) -> None:
        self.pool: Any = pool  # Any: redis-py types its connections for the sync and the async client at once
        self._most = min(_SPARE, pool.max_connections // _SHARE)
        self._spare: list[Any] = []
        self._pid = os.getpid()

    def ask(self, packed: bytes) -> Any:
        """Send one command and give its reply. Raises redis-py's errors; but for a ResponseError it may have run."""
        if self._pid != os.getpid():
            self._spare, self._pid = [], os.getpid()
        try:
            connection = self._spare.pop()
        except IndexError:
            connection = self.pool.get_connection()
        try:
            connection.send_packed_command((packed,))
            reply = _reply(connection)
        except BaseException:
            connection.disconnect()  # the reply may still come: it must not be taken for the next command's
            self.pool.release(connection)
            raise
        self._give_back(connection)
        if isinstance(reply, ResponseError):
            raise reply
        return reply

    def _give_back(self, connection: Any) -> None:
        """To hand, or to the pool: there redis-py renews a password that has run out, or a server that moves away."""
        leaves = getattr(connection, "should_reconnect", None)  # unknown to older releases
        if (
            len(self._spare) < self._most
            and getattr(connection, "_re_auth_token", None) is None
            and not (leaves is not None and leaves())
        ):
            self._spare.append(connection)
        else:
            self.pool.release(connection)

    def close(self) -> None:
        """Give everything back to the pool. It may be used again."""
        while self._pid == os.getpid():
            try:
                connection = self._spare.pop()
            except IndexError:  # no more of them, or another thread has taken the last one
                return
            self.pool.release(connection)


def _reply(connection: Any) -> Any:
    """The reply to the one command that was sent; an error reply is not raised. Raises redis-py's other errors."""
    reply = replies_of(connection).reply()
    if isinstance(reply, ReadOnlyError):  # a master that is none now: another connection is better
        raise RedisConnectionError("the Redis server has become a replica") from reply
    if isinstance(reply, RedisConnectionError):  # it is loading, say
        raise reply
    return reply
