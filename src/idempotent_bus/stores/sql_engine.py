"""An engine of our own: opened by URL, committing each statement, and never waiting for ever."""

from __future__ import annotations

import math
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import URL, Engine
from sqlalchemy.pool import ConnectionPoolEntry

from ..errors import ConfigurationError

__all__ = ["SOCKET", "Watchdog", "open_engine", "watch"]

#: In a pooled connection's info: a socket object for the same TCP connection, for the watchdog.
SOCKET: Final = "idempotent_bus_socket"
#: The driver where the URL names none: the one that the extras install.
_DRIVERS: Final = {
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}
_SYNCHRONOUS: Final = ("FULL", "NORMAL", "EXTRA")


def open_engine(url: str, *, timeout: float, options: dict[str, Any]) -> tuple[Engine, float]:
    """An engine for the store alone, and its timeout in seconds. Nothing is connected yet.

    The URL may say `timeout=` (seconds) and, for SQLite, `synchronous=FULL|NORMAL|EXTRA`.

    Raises ConfigurationError for a URL that cannot keep a store's promises.
    """
    try:
        parsed = sa.make_url(url)
        timeout = float(str(parsed.query.get("timeout", timeout)))
    except (sa.exc.ArgumentError, ValueError) as error:
        raise ConfigurationError("not a database URL that SQLAlchemy understands") from error
    parsed = parsed.difference_update_query(["timeout"])
    parsed = parsed.set(drivername=_DRIVERS.get(parsed.drivername, parsed.drivername))
    kind = parsed.get_backend_name()
    prepare: Callable[..., None]
    if kind == "sqlite":
        parsed, prepare = _sqlite(parsed, timeout)
        defaults: dict[str, Any] = {"timeout": timeout}
    elif kind == "postgresql":
        prepare = _postgresql(timeout)
        # libpq: a dead peer is noticed by unacknowledged data and by probes; a silent one by the watchdog.
        defaults = {
            "connect_timeout": max(2, math.ceil(timeout)),
            "tcp_user_timeout": math.ceil(timeout * 1000),
            "keepalives_idle": max(1, math.ceil(timeout)),
            "keepalives_interval": 1,
            "keepalives_count": 3,
        }
    else:
        prepare = _mysql(timeout)
        wait = math.ceil(timeout) + 1  # the server's own limit comes first
        defaults = {"connect_timeout": math.ceil(timeout), "read_timeout": wait, "write_timeout": wait}
    engine = sa.create_engine(
        parsed,
        **{
            "pool_timeout": timeout,
            "hide_parameters": True,  # results are the user's data: not for error texts
            **options,
            "connect_args": {**defaults, **options.get("connect_args", {})},
            # Each statement commits itself: one round trip. And nothing is ever left to roll back.
            "isolation_level": "AUTOCOMMIT",
            "pool_reset_on_return": None,
        },
    )
    sa.event.listen(engine, "connect", prepare)
    return engine, timeout


def _sqlite(url: URL, timeout: float) -> tuple[URL, Callable[..., None]]:
    if sqlite3.sqlite_version_info < (3, 35):
        raise ConfigurationError("the SQLite store needs SQLite 3.35 or newer; update Python or the system's SQLite")
    if not url.database or ":memory:" in url.database or url.query.get("mode") == "memory":
        raise ConfigurationError("a dedup store in memory forgets at a restart: name a file, or use memory:// in tests")
    synchronous = str(url.query.get("synchronous", "FULL")).upper()
    if synchronous not in _SYNCHRONOUS:
        raise ConfigurationError(f"synchronous must be one of {', '.join(_SYNCHRONOUS)}")

    def prepare(connection: sqlite3.Connection, entry: ConnectionPoolEntry) -> None:
        # WAL lets look-ups go on beside the writer. Changing to it does not heed the busy timeout, so that several
        # processes that open a new file at once must try until one has done it.
        deadline = time.monotonic() + timeout
        while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            try:
                connection.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        # FULL: a completion that was reported survives a power cut. NORMAL may lose the newest, not corrupt the file.
        connection.execute(f"PRAGMA synchronous={synchronous}")

    return url.difference_update_query(["synchronous"]), prepare


def _postgresql(timeout: float) -> Callable[..., None]:
    limit = math.ceil(timeout * 1000)

    def prepare(connection: Any, entry: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        cursor.execute(
            f"SELECT set_config('lock_timeout', '{limit}', false), set_config('statement_timeout', '{limit}', false),"
            " set_config('default_transaction_isolation', 'read committed', false)"
        )
        cursor.close()

    return prepare


def watch(engine: Engine, watchdog: Callable[[], Watchdog]) -> None:
    """Let a watchdog look at the connections of an engine of ours to PostgreSQL, each by its SOCKET.

    What SQLAlchemy asks for by itself it looks at from here: a connection is set up, tables are made. connect_timeout
    ends with the greeting, and a server that falls silent right behind it would be waited for for ever.
    """

    def connect(dialect: Any, entry: ConnectionPoolEntry, arguments: Any, settings: Any) -> Any:
        connection = dialect.connect(*arguments, **settings)
        # A copy of the descriptor names this TCP connection for as long as it is kept, whatever becomes of the first:
        # shutting it down can never hit another connection that got the same number.
        entry.info[SOCKET] = spare = socket.socket(fileno=os.dup(connection.fileno()))
        spare.setblocking(False)
        watchdog().start(spare)
        return connection

    def begin(connection: sa.Connection, *_: Any) -> None:
        if SOCKET in connection.info:
            watchdog().start(connection.info[SOCKET])

    def end(*_: Any) -> None:
        watchdog().stop(threading.get_ident())

    sa.event.listen(engine, "do_connect", connect)
    sa.event.listen(engine, "connect", end)
    sa.event.listen(engine, "before_cursor_execute", begin)
    sa.event.listen(engine, "after_cursor_execute", end)
    sa.event.listen(engine, "handle_error", end)


def _mysql(timeout: float) -> Callable[..., None]:
    limit = max(1, math.ceil(timeout))

    def prepare(connection: Any, entry: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        # REPEATABLE READ, the default, locks the gaps between keys: inserts of different keys would deadlock.
        cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
        cursor.execute(f"SET SESSION innodb_lock_wait_timeout = {limit}")
        if "mariadb" in str(connection.get_server_info()).lower():
            cursor.execute(f"SET SESSION max_statement_time = {limit}")
        cursor.close()

    return prepare


class Watchdog:
    """Cuts connections whose server does not answer: libpq waits for ever for a server that is alive but frozen.

    limit: seconds that an answer may take. One thread, started at the first use, asleep while nothing is under way.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._busy: dict[int, tuple[float, socket.socket]] = {}
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self, connection: socket.socket) -> int:
        """The answer is being waited for from now on. Gives a ticket for `stop`."""
        ticket = threading.get_ident()
        self._busy[ticket] = (time.monotonic() + self._limit, connection)
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
