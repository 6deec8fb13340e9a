"""A bell that ends another thread's wait, also while that thread waits for a socket."""

from __future__ import annotations

import contextlib
import selectors
import socket
from typing import Any

__all__ = ["Bell"]


class Bell:
    """One thread waits, any thread or signal handler rings.

    sock: a socket whose data ends the wait too; it stays somebody else's.
    """

    def __init__(self, sock: Any = None) -> None:
        self._sock = sock
        self._heard, self._struck = socket.socketpair()
        self._heard.setblocking(False)
        self._struck.setblocking(False)
        self._rung = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._heard, selectors.EVENT_READ)
        if sock is not None:
            self._selector.register(sock, selectors.EVENT_READ)

    def ring(self) -> None:
        """End the wait that is under way, or the next one at once. Takes no lock."""
        if not self._rung:  # one ring is enough until it was heard
            self._rung = True
            with contextlib.suppress(OSError):  # closed, or full: then it has been rung
                self._struck.send(b"\0")

    def wait(self, timeout: float) -> bool:
        """Wait for a ring or for data. True if the socket has data.

        What was posted before the ring must be looked for after this returns.
        """
        if getattr(self._sock, "pending", int)():  # TLS: decrypted already
            return True
        ready = self._selector.select(max(timeout, 0.0))
        has_data = False
        for key, _ in ready:
            if key.fileobj is self._heard:
                with contextlib.suppress(OSError):
                    self._heard.recv(64)
                self._rung = False  # after the ring was taken away: a ring from now on is heard again
            else:
                has_data = True
        return has_data

    def close(self) -> None:
        """Give the descriptors back. Rings from now on do nothing."""
        self._selector.close()
        self._heard.close()
        self._struck.close()
