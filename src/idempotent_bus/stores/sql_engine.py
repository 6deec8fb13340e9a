"""An engine of our own: opened by URL, committing each statement, and never waiting for ever."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import URL, Engine
from sqlalchemy.pool import ConnectionPoolEntry

from ..errors import ConfigurationError
from ..watchdog import limits

__all__ = ["open_engine"]

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
        defaults = limits("psycopg", timeout)  # a silent server is the watchdog's
    else:
        prepare = _mysql(timeout)
        defaults = limits("pymysql", timeout)
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
