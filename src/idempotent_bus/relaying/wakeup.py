"""Sleep until there is something to do: woken by NOTIFY on PostgreSQL, else by the clock.

A NOTIFY makes the commits of all transactions that have one wait for each other, so writers send it only to a relay
that sleeps. It says so by an advisory lock of its own session: a writer tries to share it, in the INSERT itself, and
notifies if it cannot; if it can, it holds its share until its commit is visible, and the relay, which cannot have the
lock before, looks once more and finds the row.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import sqlalchemy as sa

from ..watchdog import Watchdog, spare_socket
from .words import channel, lock_number

__all__ = ["Wakeup"]

log = logging.getLogger(__name__)

#: Seconds before the connection for LISTEN is tried again.
_AGAIN: Final = 5.0
#: After so many seconds of silence it is asked whether it is still there.
_ASK: Final = 30.0


class Wakeup:
    """The bed of one relay. `stop` may be called from anywhere, a signal's handler too; all else by one thread.

    engine: the outbox's. Its pool lends one connection for good, which is taken out of it. watchdog: looks at that one
    while it is asked something.
    """

    def __init__(
        self,
        engine: sa.Engine,
        tables: sa.MetaData,
        *,
        watchdog: Watchdog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._channel = channel(tables)
        self._lock = lock_number(tables)
        self._clock = clock
        self._listens = engine.dialect.name == "postgresql" and engine.dialect.driver == "psycopg"
        self._watchdog = watchdog
        self._driver: Any = None
        self._socket: socket.socket | None = None
        self._next_try = 0.0
        self._last_heard = 0.0
        self._bell, self._ring = socket.socketpair()
        self._ring.setblocking(False)
        self._bell.setblocking(False)
        self.guarded = False

    @property
    def listening(self) -> bool:
        """True while a NOTIFY would be heard."""
        return self._driver is not None

    def guard(self) -> bool:
        """Ask writers for a NOTIFY from now on. True: every row is visible now, or its commit will wake us.

        False: somebody else sleeps and will be woken, or a writer has not committed yet, or there is no such thing
        here: sleep a little only.
        """
        if self.guarded or not self._listens:
            return self.guarded
        driver = self._open()
        if driver is not None:
            with self._giving_up():
                row = driver.execute(f"SELECT pg_try_advisory_lock({self._lock})").fetchone()
                self.guarded = bool(row[0])
        return self.guarded

    def unguard(self) -> None:
        """Writers need not notify any more."""
        if self.guarded:
            self.guarded = False
            with self._giving_up():
                self._driver.execute(f"SELECT pg_advisory_unlock({self._lock})")

    def wait(self, seconds: float) -> None:
        """Sleep for so long at most. Being woken ends the guard."""
        sources: list[Any] = [self._bell]
        if self._driver is not None:
            with self._giving_up():
                if self._clock() - self._last_heard > _ASK:
                    self._driver.execute("SELECT 1")
                    self._last_heard = self._clock()
                if self._notified():
                    self.unguard()
                    return
                sources.append(self._driver.fileno())
        with selectors.DefaultSelector() as selector:  # not `select`, which knows of 1,024 open files only
            for source in sources:
                selector.register(source, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select(max(0.0, seconds))]
        if self._bell in ready:
            with contextlib.suppress(BlockingIOError):
                self._bell.recv(64)
        if self._driver is not None and len(ready) > (self._bell in ready):
            with self._giving_up():
                self._driver.pgconn.consume_input()
                if self._notified():
                    self.unguard()

    def stop(self) -> None:
        """End a `wait` at once, or the next one."""
        with contextlib.suppress(OSError):
            self._ring.send(b"!")

    def close(self) -> None:
        """Close everything."""
        self._drop()
        self._bell.close()
        self._ring.close()

    def _notified(self) -> bool:
        heard = False
        while self._driver.pgconn.notifies() is not None:
            heard = True
        if heard:
            self._last_heard = self._clock()
        return heard

    def _open(self) -> Any:
        if self._driver is None and self._clock() >= self._next_try:
            self._next_try = self._clock() + _AGAIN
            try:
                pooled = self._engine.raw_connection()
                driver = pooled.driver_connection
                pooled.detach()
                self._driver = driver
                assert driver is not None
                self._socket = spare_socket(driver)
                with self._watched():
                    driver.rollback()
                    driver.autocommit = True
                    driver.execute(f"LISTEN {self._channel}")
                self._last_heard = self._clock()
            except Exception as error:  # noqa: BLE001 - without it there is polling, whatever the reason is
                log.warning("the outbox is polled only: LISTEN failed (%s)", type(error).__name__)
                self._drop()
        return self._driver

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            with self._watched():
                yield
        except Exception as error:  # noqa: BLE001 - as above
            log.warning("the outbox is polled until LISTEN works again (%s)", type(error).__name__)
            self._drop()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """For what is asked: a server that says nothing is given up in time."""
        if self._socket is None:
            yield
            return
        ticket = self._watchdog.start(self._socket)
        try:
            yield
        finally:
            self._watchdog.stop(ticket)

    def _drop(self) -> None:
        self.guarded = False
        driver, self._driver = self._driver, None
        if driver is not None:
            with contextlib.suppress(Exception):
                driver.close()
        spare, self._socket = self._socket, None
        if spare is not None:
            spare.close()
