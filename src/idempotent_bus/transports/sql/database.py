"""One database as this process sees it: engine, transactions, tables made at first use, and safety across forks.

SQLite gets one connection a process and file, behind a lock: it has one writer at a time anyway. That connection is
closed before every fork, because a child that inherits an open SQLite connection shares its record of file locks,
does not own the locks, and can have the write-ahead log deleted under its hands. Elsewhere the child forgets the
parent's sockets without closing them.
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from ...dialects import NO_LOITERING, is_read_only
from ...errors import ConfigurationError
from ...watchdog import patient_engine
from .tables import CLOCKS, KOMBU_MESSAGE, KOMBU_QUEUE, Tables, create, tables

T = TypeVar("T")

#: How long SQLite waits for another process's transaction before "database is locked", in seconds.
BUSY_TIMEOUT: Final = 30.0
#: How long a server's answer is waited for where `answer_timeout` is not set, in seconds. A consumer that waited longer
#: would have lost its lease.
ANSWER_TIMEOUT: Final = 60.0
#: Arguments of create_engine() that are taken from the transport options; the others are kombu's or ours.
_ENGINE_OPTIONS: Final = frozenset(
    {"connect_args", "echo", "echo_pool", "isolation_level", "max_overflow"}
    | {"pool_pre_ping", "pool_recycle", "pool_size", "pool_timeout"}
)
_LEVELS: Final = frozenset({"OFF", "NORMAL", "FULL", "EXTRA"})
#: The server rolled the whole transaction back because of another one: repeating it is safe and right.
_ROLLED_BACK: Final = frozenset({"40001", "40P01", 1213, 1205, 1020})

_LAX: Final = "SET SESSION synchronous_commit = off"

#: What a database operation raises; sqlite3's own comes from PRAGMAs, which go past SQLAlchemy.
ERRORS: Final = (sa.exc.SQLAlchemyError, sqlite3.Error)


class Database:
    """Use `open_database`. Every method may be called from any thread."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self.url, self.synchronous = _split_synchronous(url)
        self.tables: Tables = tables(
            options.get("queue_tablename", KOMBU_QUEUE),
            options.get("message_tablename", KOMBU_MESSAGE),
            options.get("table_prefix"),
        )
        self.dialect = self.url.get_backend_name()
        if self.dialect not in CLOCKS:
            raise ConfigurationError(
                f"idempotent-sqla works with SQLite, PostgreSQL, MariaDB and MySQL, not with {self.dialect!r}"
            )
        if self.dialect == "sqlite" and self.url.database in (None, "", ":memory:"):
            raise ConfigurationError(
                "an in-memory SQLite database is gone with its process: name a file, as in sqlite:///bus.db"
            )
        self.now: sa.ColumnElement[float] = sa.literal_column(CLOCKS[self.dialect], sa.Double())
        chosen = {name: options[name] for name in _ENGINE_OPTIONS & options.keys()}
        self._answer_timeout = float(options.get("answer_timeout", ANSWER_TIMEOUT))
        if self._answer_timeout <= 0:
            raise ConfigurationError("answer_timeout must be more than 0 seconds")
        self.engine = self._engine(chosen)
        #: For what need not survive a power cut. PostgreSQL sets that by session, so it takes sessions of its own.
        self._lax = self._engine(chosen, _LAX) if self.dialect == "postgresql" else self.engine
        self._lock = threading.RLock()
        self._locked_for_fork = False
        self._created = False
        #: Changes with every commit of this process; SQLite's data_version tells of the others' commits only.
        self.own_commits = 0
        #: How often a server has cut a connection. It may have crashed, and with it go commits of the last moment that
        #: did not wait for its disk: whoever holds messages must look what the server knows of them.
        self.cuts = 0

    @property
    def is_sqlite(self) -> bool:
        return self.dialect == "sqlite"

    # --- transactions -----------------------------------------------------------------------------

    def run(self, work: Callable[[sa.Connection], T], *, durable: bool = False, again: bool = False) -> T:
        """`work(connection)` in one transaction; repeated where the server rolled it back for another's sake.

        durable: must survive a power cut as soon as this returns. Only landing needs it: a fetch or an ack that a
        power cut undoes brings a message back, so SQLite and PostgreSQL need not wait for the disk there.
        again: doing it twice does no harm, so it is repeated once where the connection was cut.
        """
        for tries in range(8):
            try:
                with self.transaction(durable=durable) as connection:
                    return work(connection)
            except DBAPIError as error:
                cut = again and tries == 0 and error.connection_invalidated
                if tries == 7 or not (cut or _code(error) in _ROLLED_BACK):
                    raise
                time.sleep(random.uniform(0.001, 0.01) * 2**tries)  # noqa: S311 (spreads retries, no secret)
        raise AssertionError  # pragma: no cover (the loop returns or raises)

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[sa.Connection]:
        """One transaction: committed at the end of the block, rolled back if it raises."""
        self._create_once()
        with self._transaction(durable) as connection:
            yield connection

    def read(self, work: Callable[[sa.Connection], T]) -> T:
        """`work(connection)` outside any write transaction; repeated once where the connection was cut."""
        self._create_once()
        try:
            return self._read(work)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            return self._read(work)

    def _read(self, work: Callable[[sa.Connection], T]) -> T:
        if not self.is_sqlite:
            with self.engine.connect() as connection:
                return work(connection)
        with self._lock, self.engine.connect() as connection:
            connection.execution_options(idempotent_bus_begin="BEGIN")
            return work(connection)

    def change_token(self) -> object:
        """Equal tokens mean that nobody committed in between; None means that one has to look. Cheap on SQLite."""
        if not self.is_sqlite:
            return None
        self._create_once()
        with self._lock, self.engine.connect() as connection:
            raw: Any = connection.connection.dbapi_connection
            version = raw.execute("PRAGMA data_version").fetchone()[0]
            return id(raw), connection.connection.info["opened"], version, self.own_commits

    @contextmanager
    def _transaction(self, durable: bool) -> Iterator[sa.Connection]:
        if not self.is_sqlite:
            with (self.engine if durable else self._lax).begin() as connection:
                yield connection
            self.own_commits += 1
            return
        with self._lock, self.engine.connect() as connection:
            self._set_level(connection, self.synchronous if durable else _weaker(self.synchronous))
            with connection.begin():
                yield connection
            self.own_commits += 1

    def _set_level(self, connection: sa.Connection, level: str) -> None:
        info = connection.connection.info
        if info.get("level") != level:
            raw: Any = connection.connection.dbapi_connection
            raw.execute(f"PRAGMA synchronous={level}")
            info["level"] = level

    def dispose(self) -> None:
        """Close the connections that are idle. The next use opens new ones."""
        self.engine.dispose()
        self._lax.dispose()

    # --- making and forgetting --------------------------------------------------------------------

    def _create_once(self) -> None:
        if self._created:
            return
        gives_up = time.monotonic() + self._answer_timeout
        with self._lock:
            for tries in range(10):
                if self._created:
                    return
                try:
                    with self._transaction(durable=True) as connection:
                        create(connection, self.tables)
                    self._created = True
                except DBAPIError:
                    # Another process is creating the same tables; what it committed is there at the next look.
                    if tries == 9 or time.monotonic() >= gives_up:
                        raise
                    time.sleep(0.02 * (tries + 1))

    def _engine(self, options: dict[str, Any], *settings: str) -> sa.Engine:
        if not self.is_sqlite:
            # READ COMMITTED: a second publisher of the same id waits for the first one, then sees its mark.
            defaults = {"isolation_level": "READ COMMITTED", "pool_recycle": 1800}
            engine = patient_engine(self.url, self._answer_timeout, **{**defaults, **options})
            sa.event.listen(engine, "connect", _prepare_server(NO_LOITERING[self.dialect], *settings))
            sa.event.listen(engine, "handle_error", self._note_cut)
            return engine
        arguments = {"check_same_thread": False, **options.get("connect_args", {})}
        if "timeout" not in self.url.query:
            arguments.setdefault("timeout", BUSY_TIMEOUT)
        echo = {name: options[name] for name in ("echo", "echo_pool") if name in options}
        engine = sa.create_engine(
            self.url, poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=60, connect_args=arguments, **echo
        )
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine

    def _note_cut(self, context: sa.engine.ExceptionContext) -> None:
        if context.original_exception is not None and is_read_only(context.original_exception):
            # A failover has made a standby of that server: it would say so for as long as the connection is kept.
            context.is_disconnect = True
        if context.is_disconnect:
            self.cuts += 1

    def before_fork(self) -> None:
        """Wait until no thread is inside the database, then close what a child must not inherit."""
        if self.is_sqlite:
            self._locked_for_fork = self._lock.acquire(timeout=BUSY_TIMEOUT)
            self.engine.dispose()

    def after_fork_in_parent(self) -> None:
        if self._locked_for_fork:
            self._locked_for_fork = False
            self._lock.release()

    def after_fork_in_child(self) -> None:
        self._lock = threading.RLock()
        self._locked_for_fork = False
        if not self.is_sqlite:
            self.engine.dispose(close=False)
            self._lax.dispose(close=False)


def _prepare_server(*statements: str) -> Callable[[Any, Any], None]:
    def prepare(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        for statement in statements:
            cursor.execute(statement)
        cursor.close()
        connection.commit()

    return prepare


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN would be a deferred one
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except connection.OperationalError:
            # The switch to WAL does not use SQLite's busy handler.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA foreign_keys=ON")
    record.info["opened"] = random.getrandbits(64)
    record.info.pop("level", None)


def _begin_sqlite(connection: sa.Connection) -> None:
    begin = connection.get_execution_options().get("idempotent_bus_begin", "BEGIN IMMEDIATE")
    connection.exec_driver_sql(begin)


def _split_synchronous(url: str) -> tuple[sa.URL, str]:
    parsed = sa.make_url(url)
    level = str(parsed.query.get("synchronous", "FULL")).upper()
    if level not in _LEVELS:
        raise ConfigurationError("synchronous must be OFF, NORMAL, FULL or EXTRA")
    return parsed.difference_update_query(["synchronous"]), level


def _weaker(level: str) -> str:
    return "NORMAL" if level in ("FULL", "EXTRA") else level


def _code(error: DBAPIError) -> object:
    original: Any = error.orig
    state = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
    if state:
        return state
    arguments = getattr(original, "args", ())
    return arguments[0] if arguments and isinstance(arguments[0], int) else None


# --- one Database a process and URL ---------------------------------------------------------------

_databases: dict[tuple[Any, ...], Database] = {}
_mutex = threading.Lock()
_NAMES: Final = ("queue_tablename", "message_tablename", "table_prefix", "answer_timeout")


def open_database(url: str, options: dict[str, Any]) -> Database:
    """The Database of this URL and these transport options, one a process as kombu keeps its engines."""
    key = (url, *(repr(options.get(name)) for name in (*_NAMES, *sorted(_ENGINE_OPTIONS))))
    with _mutex:
        if key not in _databases:
            _databases[key] = Database(url, options)
        return _databases[key]


def _before_fork() -> None:
    _mutex.acquire()
    for database in _databases.values():
        database.before_fork()


def _after_fork_in_parent() -> None:
    for database in _databases.values():
        database.after_fork_in_parent()
    _mutex.release()


def _after_fork_in_child() -> None:
    for database in _databases.values():
        database.after_fork_in_child()
    _mutex.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
