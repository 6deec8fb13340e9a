"""Completions that are sent to Redis at once and not waited for, over one connection of the client's own pool.

A claim may go along, in the same `sendall` and behind its completion, which spares the next message a round trip.

Replies come in the order of the sends, so the connection is the order of the tickets. redis-py opens it; the replies
are read from its socket, since each is a short number and there is one for each message. When it breaks, or somebody
closes the client, every completion that was under way is in doubt, and is told as that; the next one goes over a new
connection. A refusal (a script that was flushed, a server that is full) proves that this one was not done: it is asked
again, singly. Only then may a kill repeat more than the effect that it struck.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from redis.connection import ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError, ResponseError

from ..errors import StoreError
from ..model import ClaimOutcome, ClaimRequest, Completion, Settled
from ..replies import replies_of

__all__ = ["RedisStream", "Share"]

#: Completions under way at most: beyond them `begin` waits, or two full buffers would wait for each other.
_MOST = 1000
#: Bytes under way at most, unless a single completion has more. The server reads so many at once, does what is in them,
#: and only then answers; where it cannot, since the client was killed, it reads no more, and what has left is lost.
_MOST_BYTES = 16 * 1024
#: The part of a bounded pool that streams may hold: claims, renewals and the user's own calls need the rest.
_SHARE = 4


class Share:
    """Which streams hold a connection of a pool: so many at most that the pool is not theirs. Safe for threads."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._most = pool.max_connections // _SHARE
        self._holders: set[int] = set()

    def take(self, stream: object) -> bool:
        """Whether a stream may hold a connection."""
        if len(self._holders) >= self._most and id(stream) not in self._holders:
            return False
        self._holders.add(id(stream))
        return True

    def give_back(self, stream: object) -> None:
        """It holds none now."""
        self._holders.discard(id(stream))


class RedisStream:
    """A `CompletionStream` over one connection. For one thread at a time.

    pool: gives the connection, at the first completion. share: says whether it may be held; else each completion is
    done while `begin` waits. script: the text that the server must know. packed: the command for a completion. accept:
    what its reply means, or None if it must be asked singly. singly: `complete`, as the store does it otherwise.
    claiming: the command for a claim. outcome: what its reply means, or None if it says nothing yet.
    """

    survives = True  # it is the kernel's once `begin` has returned

    def __init__(
        self,
        pool: ConnectionPool,
        share: Share,
        script: str,
        packed: Callable[[Completion], bytes],
        accept: Callable[[Completion, int], bool | None],
        singly: Callable[[Completion], bool],
        claiming: Callable[[ClaimRequest], bytes],
        outcome: Callable[[ClaimRequest, bytes], ClaimOutcome | None],
    ) -> None:
        self._pool: Any = pool  # Any: redis-py types its connections for the sync and the async client at once
        self._share = share
        self._script = script
        self._packed = packed
        self._accept = accept
        self._singly = singly
        self._claiming = claiming
        self._outcome_of = outcome
        self._connection: Any = None
        self._begun = 0
        #: With each completion its bytes, and the claim that went with it.
        self._under_way: deque[tuple[int, Completion, int, ClaimRequest | None]] = deque()
        self._bytes = 0
        self._replies: Any = None  # of `replies_of`, while there is a connection
        self._ended: list[Settled] = []
        #: The claim that went with the last completion, and its answer.
        self._asked: ClaimRequest | None = None
        self._outcome: ClaimOutcome | None = None

    @property
    def pending(self) -> int:
        return len(self._under_way) + len(self._ended)

    def begin(self, completion: Completion, claim: ClaimRequest | None = None, /) -> int:
        self._begun += 1
        ticket = self._begun
        self._asked, self._outcome = claim, None
        if self._connection is None and not self._share.take(self):
            self._end(ticket, completion, None)
            return ticket
        try:
            packed = self._packed(completion)
            if claim is not None:
                packed += self._claiming(claim)
        except (RedisError, OSError):
            packed = b""  # the server could not be asked whether it evicts
        while self._under_way and (len(self._under_way) >= _MOST or self._bytes + len(packed) > _MOST_BYTES):
            self._read_one()
        self._under_way.append((ticket, completion, len(packed), claim))
        self._bytes += len(packed)
        if not packed:
            self._broken()
            return ticket
        try:
            connection = self._connection
            if connection is None:
                connection = self._connection = self._pool.get_connection()
                # Or a new server would refuse what is sent ahead, and a killed client could not ask again.
                connection.send_command("SCRIPT", "LOAD", self._script)
                try:
                    connection.read_response()
                except ResponseError:  # not allowed to this user, say
                    self.survives = False
                    raise
                self._replies = replies_of(connection)
            self._replies.send(packed)
        except (RedisError, OSError):
            self._broken()
        except BaseException:
            self._broken()  # a signal in the middle of a send: what the server has is unknown
            raise
        return ticket

    def claimed(self, request: ClaimRequest, /) -> ClaimOutcome | None:
        if request is not self._asked:
            return None
        while self._under_way:
            self._read_one()
        outcome, self._asked, self._outcome = self._outcome, None, None
        return outcome

    def poll(self, timeout: float = 0.0) -> list[Settled]:
        while self._under_way and self._readable(0.0 if self._ended else timeout):
            self._read_one()
        ended, self._ended = self._ended, []
        return ended

    def settle(self) -> list[Settled]:
        while self._under_way:
            self._read_one()
        return self.poll()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            if self._under_way:
                connection.disconnect()  # their replies must not be taken for those of others
                self._forget()
            self._pool.release(connection)
        self._share.give_back(self)

    def __del__(self) -> None:
        """Its thread is over, or its executor gone: the connection is the pool's again. What was sent arrives."""
        with suppress(Exception):
            self.close()

    def _readable(self, timeout: float) -> bool:
        try:
            return bool(self._replies.is_there(timeout))
        except (RedisError, OSError):
            self._broken()
            return False

    def _read_one(self) -> None:
        """Read the reply of the first that is under way, and that of the claim which went with it."""
        ticket, completion, size, request = self._under_way[0]
        durable: bool | None = None
        try:
            reply = self._reply()
            if request is not None:
                self._read_claim(request)
            self._under_way.popleft()
        except (RedisError, OSError):
            self._broken()
            return
        except BaseException:
            self._broken()
            raise
        self._bytes -= size
        if reply is not None:
            durable = self._accept(completion, reply)
        self._end(ticket, completion, durable)

    def _end(self, ticket: int, completion: Completion, durable: bool | None) -> None:
        """Tell of a completion; of one that nothing is known of once it was asked for singly."""
        if durable is None:
            with suppress(StoreError):
                durable = self._singly(completion)
        self._ended.append(Settled(ticket, durable))

    def _reply(self) -> int | None:
        """The next reply, a number; None: an error, so that this one was not done. Raises redis-py's errors."""
        reply = self._replies.reply()
        if isinstance(reply, ResponseError) and not isinstance(reply, ReadOnlyError):
            return None
        if not isinstance(reply, int):  # a master that is none now, say: another connection is better
            raise RedisConnectionError("the Redis server has sent what is no reply of the script")
        return reply

    def _read_claim(self, request: ClaimRequest) -> None:
        reply = self._replies.reply()
        if request is self._asked and isinstance(reply, bytes):
            self._outcome = self._outcome_of(request, reply)

    def _broken(self) -> None:
        """The connection is gone, or what it would say next is unknown: all that was under way is in doubt."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()
            self._pool.release(connection)
        self._share.give_back(self)
        self._ended += [Settled(ticket, None) for ticket, *_ in self._under_way]
        self._forget()

    def _forget(self) -> None:
        self._under_way.clear()
        self._bytes = 0
