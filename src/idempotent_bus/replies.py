"""Reading a Redis server's replies, of RESP2 and RESP3, from a socket that redis-py has opened.

redis-py's reading goes through several layers, which for a short reply take longer than the server does. TLS, passwords
and Sentinel are matters of opening the connection, which stays redis-py's; and so does the reading where a connection
has another way of it than redis-py's own (fakeredis, a user's class), or notes what it has read for its health checks.
"""

from __future__ import annotations

import select
import socket
import ssl
from typing import Any, Final

from redis import exceptions
from redis._parsers.base import BaseParser
from redis.connection import Connection
from redis.sentinel import SentinelManagedConnection

__all__ = ["DriversReplies", "Replies", "replies_of"]

#: What is read at once at most, bytes.
_PIECE: Final = 262_144
#: The ways of reading that this one can stand for.
_REDIS_PYS: Final = (Connection.read_response, SentinelManagedConnection.read_response)


class Replies:
    """The replies that come over one connected socket. For one thread at a time.

    After an error that is raised nothing is known of what comes next: close the connection.
    """

    __slots__ = ("_buffer", "_poll", "_position", "_sock")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._poll: Any = None
        self._buffer = b""
        self._position = 0

    @property
    def has_rest(self) -> bool:
        """Whether bytes were read from the socket and not yet looked at."""
        return self._position < len(self._buffer)

    def is_there(self, timeout: float = 0.0) -> bool:
        """Whether a reply, or a part of one, comes within so many seconds, or it cannot be told without reading."""
        sock = self._sock
        if self._buffer.find(b"\r\n", self._position) >= 0 or getattr(sock, "pending", int)():  # TLS: decrypted
            return True
        try:
            if not hasattr(select, "poll"):  # Windows
                return bool(select.select((sock,), (), (), timeout)[0])
            if self._poll is None:
                self._poll = select.poll()  # which can wait for any number of open files
                self._poll.register(sock, select.POLLIN)
            return bool(self._poll.poll(timeout * 1000))
        except ValueError:  # it is closed
            return True

    def send(self, packed: bytes) -> None:
        """Send a command over this very socket: redis-py would open another where somebody has closed it.

        Raises the socket's errors.
        """
        self._sock.sendall(packed)

    def more(self) -> None:
        """Read what has arrived, waiting for it as the socket's timeout says.

        Raises redis-py's ConnectionError and TimeoutError; where the socket does not wait, BlockingIOError and
        SSLWantReadError as they are.
        """
        try:
            data = self._sock.recv(_PIECE)
        except TimeoutError as error:
            raise exceptions.TimeoutError("Timeout reading from the Redis server") from error
        except (BlockingIOError, ssl.SSLWantReadError):
            raise
        except OSError as error:
            raise exceptions.ConnectionError(f"Error while reading from the Redis server: {error}") from error
        if not data:
            raise exceptions.ConnectionError("Connection closed by the Redis server")
        self._buffer = self._buffer[self._position :] + data if self._position < len(self._buffer) else data
        self._position = 0

    def reply(self) -> Any:
        """The next reply, an error as an exception that is not raised. What the server tells by itself is skipped.

        Raises as `value`.
        """
        while True:
            value, told = self.value()
            if not told:
                return value

    def value(self) -> tuple[Any, bool]:
        """As `reply`, with what the server tells by itself, which has True beside it.

        Raises as `more`, and redis-py's InvalidResponse.
        """
        line = self._line()
        kind, rest = line[:1], line[1:]
        try:
            if kind == b":":
                return int(rest), False
            if kind == b"$" or kind == b"=":
                size = int(rest)
                if size < 0:
                    return None, False
                text = self._bulk(size)
                return (text[4:] if kind == b"=" else text), False
            if kind in b"*~>":
                size = int(rest)
                if size < 0:
                    return None, False
                return [self.value()[0] for _ in range(size)], kind == b">"
            if kind == b"+":
                return rest, False
            if kind == b"%":
                return [self.value()[0] for _ in range(2 * int(rest))], False
            if kind == b"-":
                return _error(rest), False
            if kind == b"!":
                return _error(self._bulk(int(rest))), False
            if kind == b"_":
                return None, False
            if kind == b"#":
                return rest == b"t", False
            if kind in b",(":
                return rest, False
            raise _invalid(line)
        except ValueError as error:  # no number where there must be one
            raise _invalid(line) from error

    def _line(self) -> bytes:
        while True:
            end = self._buffer.find(b"\r\n", self._position)
            if end >= 0:
                line = self._buffer[self._position : end]
                self._position = end + 2
                return line
            self.more()

    def _bulk(self, size: int) -> bytes:
        while len(self._buffer) - self._position < size + 2:
            self.more()
        start = self._position
        self._position = start + size + 2
        return self._buffer[start : start + size]


class DriversReplies:
    """As `Replies`, by redis-py itself."""

    __slots__ = ("_connection", "_sock")

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._sock = connection._sock

    def is_there(self, timeout: float = 0.0) -> bool:
        """As `Replies.is_there`. Raises redis-py's errors."""
        return bool(self._checked().can_read(timeout=timeout))

    def send(self, packed: bytes) -> None:
        """As `Replies.send`. Raises redis-py's errors."""
        self._checked().send_packed_command((packed,), check_health=False)

    def reply(self) -> Any:
        """As `Replies.reply`."""
        try:
            return self._checked().read_response(disable_decoding=True)
        except exceptions.ResponseError as error:
            return error

    def _checked(self) -> Any:
        if self._connection._sock is not self._sock:
            raise _gone()
        return self._connection


def replies_of(connection: Any) -> Replies | DriversReplies:
    """How to read the replies of an open connection of redis-py that has nothing to read from before.

    Raises redis-py's ConnectionError if somebody has closed it meanwhile.
    """
    sock = connection._sock
    if sock is None:
        raise _gone()
    reads_as_redis_py = type(connection).read_response in _REDIS_PYS
    if isinstance(sock, socket.socket) and reads_as_redis_py and not connection.health_check_interval:
        return Replies(sock)
    return DriversReplies(connection)


def _invalid(line: bytes) -> Exception:
    return exceptions.InvalidResponse(f"Unexpected reply from the Redis server: {line[:20]!r}")


def _gone() -> Exception:
    return exceptions.ConnectionError("the connection to the Redis server was closed in this process")


def _error(text: bytes) -> Exception:
    """The exception that redis-py has for an error reply."""
    error: Exception = BaseParser.parse_error(text.decode(errors="replace"))  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
    return error
