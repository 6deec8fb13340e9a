"""A connection that sends a few commands at once and reads their replies, and never sends anything twice by itself.

redis-py opens it (TLS, passwords, database, Sentinel); from then on the bytes are ours. There are two reasons. A
client of redis-py may resend a command whose reply did not come in time, silently, and a script that moves messages
must not run twice unseen. And one message costs one or two commands here, so the cost of a command is what counts.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from redis import exceptions

from ...replies import Replies
from .scripts import Script

__all__ = ["Command", "Wire"]

#: A command: a tuple of arguments. A Script in front stands for EVALSHA and for its number of keys.
Command = tuple[Any, ...]

# A connection that was idle for longer is looked at before it is used: the server may have closed it.
_STALE_AFTER = 1.0


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else str(value)).encode()


def pack(arguments: Sequence[Any]) -> bytes:
    """One command in the form that the server reads."""
    parts = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        value = argument if isinstance(argument, bytes) else _bytes(argument)
        parts.append(b"$%d\r\n%b\r\n" % (len(value), value))
    return b"".join(parts)


class Wire:
    """One connection, for one thread at a time. Connects at first use and again after an error.

    pool: the redis-py connection pool that makes the connection. tracking: ask the server to tell of changes to
    keys that were read (`changed` collects their names). Every failure closes the connection, so that a late reply
    is never taken for that of another command.
    """

    def __init__(
        self,
        pool: Any,
        *,
        tracking: bool = False,
        timeout: float | None = None,
        before_drop: Callable[[], None] | None = None,
    ) -> None:
        self._pool = pool
        self._want_tracking = tracking
        self._timeout = timeout
        self._before_drop = before_drop  # a poller must forget the socket while it still has its number
        self._connection: Any = None
        self._sock: socket.socket | None = None
        self._replies: Any = None  # Replies, while the socket is open
        self._used_at = 0.0
        self._pid = os.getpid()
        #: True while the server tells us of changes.
        self.tracking = False
        self.changed: list[bytes] = []
        self._flags = False  # whether the server knows script flags

    # --- connecting -------------------------------------------------------------------------------

    @property
    def sock(self) -> socket.socket | None:
        """The open socket, for a poller to wait on; None while the connection is closed."""
        return self._sock

    def connect(self) -> None:
        """Open the connection if it is not open. Raises redis-py's errors."""
        if self._sock is not None:
            return
        connection = self._connection
        if connection is None:
            connection = self._connection = self._pool.get_connection()
        connection.connect()
        self._sock = connection._sock
        self._replies = Replies(self._sock)
        self.changed.clear()
        try:
            self._sock.settimeout(self._timeout_of(None))
            self._greet()
        except BaseException:
            self.drop()
            raise

    def _greet(self) -> None:
        self._flags = self.tracking = False
        commands: list[Command] = [("HELLO", "3")]
        if self._want_tracking:
            commands.append(("CLIENT", "TRACKING", "ON", "NOLOOP"))
        self._send(commands)
        hello, *tracked = [self._read() for _ in commands]
        if isinstance(hello, list):  # a server older than 6.0 answers with an error
            facts = dict(zip(hello[::2], hello[1::2], strict=True))
            major = str(facts.get(b"version", b"0").decode()).split(".")[0]
            # Only servers that call themselves so are known to follow Redis' version numbers.
            if facts.get(b"server") in (b"redis", b"valkey"):
                self._flags = major.isdigit() and int(major) >= 7
            self.tracking = bool(tracked) and not isinstance(tracked[0], Exception)

    def drop(self) -> None:
        """Close the connection; the next use opens another."""
        if self._sock is not None and self._before_drop is not None:
            self._before_drop()
        self._sock = None
        self.tracking = False
        if self._connection is not None:
            self._connection.disconnect()

    def close(self) -> None:
        """Close the connection and give it back to the pool."""
        self.drop()
        connection, self._connection = self._connection, None
        if connection is not None and self._pid == os.getpid():
            self._pool.release(connection)

    def _timeout_of(self, timeout: float | None) -> float | None:
        if timeout is not None:
            return timeout
        if self._timeout is not None:
            return self._timeout
        own: float | None = self._connection.socket_timeout
        return own

    # --- commands -----------------------------------------------------------------------------------

    def call(self, commands: Sequence[Command], timeout: float | None = None) -> list[Any]:
        """Send the commands together and return their replies in order; an error reply is returned, not raised.

        timeout: seconds to wait for each read. A script that the server does not know is sent again in full: the
        refusal proves that it did not run. Raises redis-py's ConnectionError or TimeoutError, after which the
        commands may or may not have run.
        """
        if self._sock is None:
            self.connect()
        elif monotonic() - self._used_at > _STALE_AFTER and not self._want_tracking:
            self._reopen_if_stale()
        sock = self._sock
        assert sock is not None
        if timeout is not None:
            sock.settimeout(timeout)
        try:
            self._send(commands)
            replies = [self._read() for _ in commands]
            missing = [
                at
                for at, reply in enumerate(replies)
                if isinstance(reply, exceptions.NoScriptError) and isinstance(commands[at][0], Script)
            ]
            if missing:
                self._send([commands[at] for at in missing], in_full=True)
                for at in missing:
                    replies[at] = self._read()
            if timeout is not None:
                sock.settimeout(self._timeout_of(None))
        except BaseException:
            self.drop()  # the reply may still come: it must not be taken for the next command's
            raise
        self._used_at = monotonic()
        for reply in replies:
            if isinstance(reply, exceptions.ReadOnlyError):
                self._demoted(reply)
        if getattr(self._connection, "_re_auth_token", None) is not None:
            self._reauthenticate()
        return replies

    def one(self, *command: Any, timeout: float | None = None) -> Any:
        """Send one command; return its reply or raise its error."""
        reply = self.call([command], timeout)[0]
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _reopen_if_stale(self) -> None:
        if self._sock is not None and self._replies.is_there():  # not `select`, which knows of 1,024 open files only
            # Nothing is expected here, so what is readable is the end of the connection.
            self.drop()
        self.connect()

    def _demoted(self, error: exceptions.ReadOnlyError) -> None:
        """The server became a replica: connect anew. Sentinel then names the new master."""
        self.drop()
        if hasattr(self._connection, "connect_to"):
            raise exceptions.ConnectionError("The previous master is now a replica") from error

    def _reauthenticate(self) -> None:
        # redis-py re-authenticates a connection when it is given back to the pool; ours never is.
        self._connection.set_re_auth_token(None)
        self.drop()

    # --- bytes ------------------------------------------------------------------------------------------

    def _send(self, commands: Sequence[Command], *, in_full: bool = False) -> None:
        parts = []
        for command in commands:
            head = command[0]
            if isinstance(head, Script):
                form = head.flagged if self._flags else head.plain
                verb = (b"EVAL", form.text) if in_full else (b"EVALSHA", form.sha)
                parts.append(pack((*verb, *command[1:])))
            else:
                parts.append(pack(command))
        assert self._sock is not None
        try:
            self._sock.sendall(b"".join(parts))
        except TimeoutError as error:
            raise exceptions.TimeoutError("Timeout writing to the Redis server") from error
        except OSError as error:
            raise exceptions.ConnectionError(f"Error while writing to the Redis server: {error}") from error

    def _read(self) -> Any:
        """The next reply. What the server tells by itself is noted on the way."""
        while True:
            value, told = self._replies.value()
            if not told:
                return value
            self._note(value)

    def _note(self, push: Any) -> None:
        if isinstance(push, list) and push and push[0] == b"invalidate":
            # None stands for a flushed database: anything may have changed.
            self.changed.extend(push[1] if push[1] is not None else [b""])

    # --- waiting ------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Read what has arrived without waiting, between commands: only news of changes can have."""
        sock = self._sock
        if sock is None:
            return
        try:
            while self._replies.has_rest or self._arrived(sock):
                value, told = self._replies.value()
                if not told:
                    raise exceptions.ConnectionError("A reply came that nobody waits for")
                self._note(value)
        except BaseException:
            self.drop()
            raise

    def _arrived(self, sock: socket.socket) -> bool:
        """Read what is there, if anything. A readable TLS socket may have no byte for us (a session ticket)."""
        sock.settimeout(0)
        try:
            self._replies.more()
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        finally:
            sock.settimeout(self._timeout_of(None))
        return True

    @property
    def pending(self) -> bool:
        """Whether bytes were read from the socket and not yet looked at: waiting for the socket would miss them."""
        if self._replies is not None and self._replies.has_rest:
            return True
        sock = self._sock
        return bool(sock is not None and hasattr(sock, "pending") and sock.pending())
