"""No wait for a SQL server without an end: what the drivers can be told, and a watchdog for what they cannot.

libpq waits for ever for a server that is alive but frozen, or behind a network that swallows everything: no setting of
its own says how long an answer may take. PyMySQL and mysqlclient have one.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final
from weakref import WeakSet

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.pool import ConnectionPoolEntry

__all__ = ["SOCKET", "Watchdog", "limits", "patient_engine", "spare_socket", "watch"]

#: In a pooled connection's info: a socket object for the same TCP connection, for the watchdog.
SOCKET: Final = "idempotent_bus_socket"
#: Seconds for a connection, where answers are waited for longer: PyMySQL's own default.
_CONNECT: Final = 10.0


def limits(driver: str, timeout: float, *, connect: float | None = None) -> dict[str, Any]:
    """What a driver takes in its `connect` so that no answer is waited for much longer than `timeout` seconds.

    connect: seconds for the connection itself, if that is less. On PostgreSQL that is not all: a silent server is the
    watchdog's. Empty for a driver that is not known.
    """
    connect = timeout if connect is None else min(connect, timeout)
    if driver in ("psycopg", "psycopg2"):
        # libpq: a dead peer is noticed by unacknowledged data and by probes.
        return {
            "connect_timeout": max(2, math.ceil(connect)),
            "tcp_user_timeout": math.ceil(timeout * 1000),
            "keepalives_idle": max(1, math.ceil(timeout)),
            "keepalives_interval": 1,
            "keepalives_count": 3,
        }
    if driver in ("pymysql", "mysqldb"):
        wait = math.ceil(timeout) + 1  # the server's own limit comes first
        return {"connect_timeout": math.ceil(connect), "read_timeout": wait, "write_timeout": wait}
    return {}


def patient_engine(url: sa.URL, timeout: float, **options: Any) -> Engine:
    """An engine whose servers' answers are waited for no longer than this many seconds. What the URL or `connect_args`
    say of the driver's own limits goes before ours.
    """
    driver = url.get_dialect().driver
    ours = limits(driver, timeout, connect=_CONNECT)
    ours = {name: value for name, value in ours.items() if name not in url.query}
    engine = sa.create_engine(url, **{**options, "connect_args": {**ours, **options.get("connect_args", {})}})
    if engine.dialect.name == "postgresql":
        watch(engine, Watchdog(timeout))
    return engine


def spare_socket(connection: Any) -> socket.socket | None:
    """A socket object of its own for a driver's TCP connection. None where the driver does not give it away.

    A copy of the descriptor names this connection for as long as it is kept, whatever becomes of the first: shutting it
    down can never hit another connection that got the same number.
    """
    source = getattr(connection, "_sock", None)  # PyMySQL
    source = connection if source is None else source
    if not hasattr(source, "fileno"):
        return None
    # Whether it blocks is left as it is: that is the connection's, not the descriptor's.
    return socket.socket(fileno=os.dup(source.fileno()))


def watch(engine: Engine, watchdog: Watchdog) -> None:
    """Let a watchdog look at the connections of an engine of ours to PostgreSQL, each by its SOCKET.

    At every statement, commit and rollback, and while a connection is set up: connect_timeout ends with the greeting,
    and a server that falls silent right behind it would be waited for for ever.
    """
    spares: dict[int, socket.socket] = {}  # by the number of the driver's connection, while it is open

    def connect(dialect: Any, entry: ConnectionPoolEntry, arguments: Any, settings: Any) -> Any:
        connection = dialect.connect(*arguments, **settings)
        spare = spare_socket(connection)
        if spare is not None:
            entry.info[SOCKET] = spare
            watchdog.start(spare)  # as a whole: until it is set up
        return connection

    def ready(connection: Any, entry: ConnectionPoolEntry) -> None:
        watchdog.stop(threading.get_ident())
        if SOCKET in entry.info:
            spares[id(connection)] = entry.info[SOCKET]

    def closed(connection: Any, entry: ConnectionPoolEntry) -> None:
        spares.pop(id(connection), None)
        spare = entry.info.pop(SOCKET, None)
        if spare is not None:
            spare.close()

    def watched(ask: Callable[..., None]) -> Callable[..., None]:
        def asked(whom: Any, *arguments: Any) -> None:
            # The pool's proxy of a connection, at its end the connection itself; or a cursor.
            connection = getattr(whom, "dbapi_connection", None) or getattr(whom, "connection", whom)
            spare = spares.get(id(connection))
            if spare is None:  # it is being set up
                ask(whom, *arguments)
                return
            ticket = watchdog.start(spare)
            try:
                ask(whom, *arguments)
            finally:
                watchdog.stop(ticket)

        return asked

    sa.event.listen(engine, "do_connect", connect)
    sa.event.listen(engine, "connect", ready)
    sa.event.listen(engine, "close", closed)
    # By the dialect's calls, since no event of SQLAlchemy comes behind a COMMIT or a ROLLBACK. It is this engine's own.
    dialect: Any = engine.dialect
    for name in ("do_execute", "do_execute_no_params", "do_executemany", "do_commit", "do_rollback"):
        setattr(dialect, name, watched(getattr(dialect, name)))


class Watchdog:
    """Cuts connections whose server does not answer: libpq waits for ever for a server that is alive but frozen.

    limit: seconds that an answer may take. One thread for each process, started at the first use, asleep while nothing
    is under way.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._reset()
        _watchdogs.add(self)

    def _reset(self) -> None:
        self._busy: dict[int, tuple[float, socket.socket]] = {}
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self, connection: socket.socket, limit: float | None = None) -> int:
        """The answer is being waited for from now on. Gives a ticket for `stop`. limit: another one than usual."""
        ticket = threading.get_ident()
        self._busy[ticket] = (time.monotonic() + (self._limit if limit is None else limit), connection)
        if not self._wake.is_set():
            self._wake.set()
            with self._lock:
                if self._thread is None:
                    self._closed = False
                    self._thread = threading.Thread(target=self._run, name="idempotent-bus-sql-watchdog", daemon=True)
                    self._thread.start()
        return ticket

    def stop(self, ticket: int) -> None:
        """The answer came, or will not."""
        self._pop(ticket)

    def _pop(self, ticket: int) -> bool:
        return self._busy.pop(ticket, None) is not None

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            with self._lock:
                if self._closed and not self._busy:
                    self._thread = None
                    self._wake.clear()
                    return
            now = time.monotonic()
            for ticket, (deadline, connection) in list(self._busy.items()):
                # Whoever pops it decides: an answer that came in time is never cut off.
                if now > deadline and self._pop(ticket):
                    try:
                        connection.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        continue  # it is gone already, which is what we wanted
            if not self._busy:
                self._wake.clear()
                if not self._busy:  # else somebody started between the two lines: do not sleep on it
                    continue
                self._wake.set()
            time.sleep(min(0.25, self._limit / 4))


#: All of this process. A forked child has them, but not their thread, and another one may have held the lock.
_watchdogs: WeakSet[Watchdog] = WeakSet()


def _reset_all() -> None:
    for watchdog in list(_watchdogs):
        watchdog._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
