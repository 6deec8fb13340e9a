"""Somebody else's database connection: what kind it is, whether a transaction is open, and a statement run on it.

The caller's connection may be a SQLAlchemy Connection or Session, a Django connection, or a driver's own (psycopg 3 or
2, sqlite3, PyMySQL, mysqlclient). It is never committed and never rolled back here. Statements are texts with `:name`
parameters; each is put into the driver's own style once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sqlite3
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, cast

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite

from .dialects import Statement, compiled
from .errors import ConfigurationError

__all__ = [
    "Link",
    "commits_by_itself",
    "driver_errors",
    "is_duplicate",
    "link_to",
    "link_to_driver",
    "read_committed",
]

_DIALECTS: Final[dict[str, Any]] = {
    "postgresql": postgresql.dialect,
    "mysql": mysql.dialect,
    "mariadb": mysql.dialect,
    "sqlite": sqlite.dialect,
}
#: Driver packages by the name of their top module: the database, and how parameters are written.
_DRIVERS: Final = {
    "psycopg": ("postgresql", "format"),
    "psycopg2": ("postgresql", "format"),
    "pymysql": ("mysql", "format"),
    "MySQLdb": ("mysql", "format"),
    "sqlite3": ("sqlite", "qmark"),
    "pysqlite3": ("sqlite", "qmark"),
    "sqlcipher3": ("sqlite", "qmark"),
}
_KINDS: Final = (
    "a SQLAlchemy Connection or Session, a Django connection, or one of psycopg, psycopg2, sqlite3, PyMySQL, MySQLdb"
)

#: Where the link to a driver's connection is kept, in SQLAlchemy's dictionary for what belongs to that connection.
_KEPT: Final = "idempotent_bus.link"

# As libpq and the MySQL protocol number the states of a transaction.
_IDLE: Final = 0
_IN_TRANSACTION: Final = 1


class Link(ABC):
    """One borrowed connection. database: `postgresql`, `mysql` (MariaDB too) or `sqlite`. For one thread at a time."""

    __slots__ = ("database",)

    def __init__(self, database: str) -> None:
        self.database = database

    @abstractmethod
    def check_transaction(self) -> None:
        """Raise ConfigurationError if the next statement would be committed by itself."""

    @abstractmethod
    def run(self, text: str, parameters: Mapping[str, Any], *, fetch: bool = True) -> tuple[list[Sequence[Any]], int]:
        """Run one statement in the caller's transaction; its rows, and how many rows it changed. fetch: False: no rows.

        Raises what that kind of connection raises, without the parameters in its text where it would have them.
        """

    def run_many(self, text: str, rows: Sequence[Mapping[str, Any]]) -> int:
        """Run one statement without rows of its own once for each of `rows`; how many rows all of them changed."""
        return sum(self.run(text, row, fetch=False)[1] for row in rows)

    def tell(self, text: str) -> None:
        """Run one statement that has neither parameters nor rows."""
        self.run(text, {}, fetch=False)


class _SQLAlchemyLink(Link):
    __slots__ = ("_connection", "_style")

    def __init__(self, connection: sa.Connection) -> None:
        dialect = connection.dialect
        super().__init__(_database(dialect.name))
        self._connection = connection
        # Whoever takes `%(name)s` takes `%s` too, and has less to do then.
        self._style = "format" if dialect.paramstyle == "pyformat" else dialect.paramstyle

    def check_transaction(self) -> None:
        if commits_by_itself(self._connection):
            raise _autocommit("give it an engine without isolation_level='AUTOCOMMIT'")

    def run(self, text: str, parameters: Mapping[str, Any], *, fetch: bool = True) -> tuple[list[Sequence[Any]], int]:
        connection = self._connection
        if _is_plain(connection):
            driver = link_to_driver(connection)
            if driver is not None:
                return _run_below(connection, driver, text, parameters, fetch)
        statement = _prepared(text, self.database, self._style)
        try:
            result = connection.exec_driver_sql(statement.text, statement.arguments(parameters))
        except sa.exc.StatementError as error:
            error.hide_parameters = True  # whatever the engine's setting is: they are the message
            raise
        rows = cast("list[Sequence[Any]]", result.fetchall()) if result.returns_rows else []
        return rows, result.rowcount


def _is_plain(connection: sa.Connection) -> bool:
    """True if a transaction is open and in order, and nobody listens to what is executed or wants it logged."""
    if not connection.in_transaction():
        return False
    nested = connection.get_nested_transaction()
    if nested is not None and not nested.is_active:
        return False
    listening = getattr(connection, "_has_events", True) or getattr(connection.engine, "_has_events", True)
    return not (listening or getattr(connection, "_echo", True))


def link_to_driver(connection: sa.Connection) -> Link | None:
    """The link to the driver's own connection below, kept with it while the pool does. None: not one we know."""
    driver = connection.connection.dbapi_connection
    info = connection.info
    kept: _DriverLink | None = info.get(_KEPT)
    if kept is None or kept.connection is not driver:
        package = _package_of(driver)
        if package is None or _is_asynchronous(type(driver)):  # type: ignore[arg-type]  # any class can be a key
            return None
        kept = info[_KEPT] = _DriverLink(driver, package, keep_cursor=True)
    return kept


def _run_below(
    connection: sa.Connection, link: Link, text: str, parameters: Mapping[str, Any], fetch: bool
) -> tuple[list[Sequence[Any]], int]:
    """As exec_driver_sql, errors included, in half the time: its bookkeeping costs more than an INSERT into SQLite."""
    try:
        return link.run(text, parameters, fetch=fetch)
    except Exception as error:
        dialect = connection.dialect
        kind = dialect.loaded_dbapi.Error
        if not isinstance(error, kind):
            raise
        gone = dialect.is_disconnect(error, connection.connection.dbapi_connection, None)
        if gone:
            connection.invalidate(error)
        raise sa.exc.DBAPIError.instance(
            text, None, error, kind, hide_parameters=True, connection_invalidated=gone, dialect=dialect
        ) from error


def read_committed(connection: sa.Connection) -> sa.Connection:
    """The connection at READ COMMITTED, where it has levels. Raises SQLAlchemy's errors, and has closed it then."""
    if connection.dialect.name == "sqlite":
        return connection
    try:
        with driver_errors(connection.dialect):
            return connection.execution_options(isolation_level="READ COMMITTED")
    except BaseException as error:
        if isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
            connection.invalidate(error)
        connection.close()
        raise


@contextlib.contextmanager
def driver_errors(dialect: sa.Dialect) -> Iterator[None]:
    """Turn the driver's errors into SQLAlchemy's where that does not: as it sets a level, on MariaDB and MySQL."""
    kind = dialect.loaded_dbapi.Error
    try:
        yield
    except kind as error:
        gone = dialect.is_disconnect(error, None, None)
        raise sa.exc.DBAPIError.instance(
            "the isolation level", None, error, kind, hide_parameters=True, connection_invalidated=gone, dialect=dialect
        ) from error


def _has_rows(cursor: Any) -> bool:
    """As `cursor.description` says, which psycopg 3 makes anew, a column at a time, whenever it is asked."""
    result = getattr(cursor, "pgresult", None)
    return bool(cursor.description) if result is None else result.nfields > 0


def _await_result(cursor: Any) -> None:
    """In a pipeline of the user's (psycopg 3): before it is sent nothing is known; no row would mean "done before"."""
    if getattr(cursor, "pgresult", cursor) is None:
        with cursor.connection.pipeline() as pipeline:
            pipeline.sync()


class _DjangoLink(Link):
    __slots__ = ("_connection",)

    def __init__(self, connection: Any) -> None:
        super().__init__(_database(connection.vendor))
        self._connection = connection

    def check_transaction(self) -> None:
        connection = self._connection
        if not connection.in_atomic_block and connection.get_autocommit():
            raise _autocommit("use it within transaction.atomic()")

    def run(self, text: str, parameters: Mapping[str, Any], *, fetch: bool = True) -> tuple[list[Sequence[Any]], int]:
        # Django takes %s for every database, and turns it into what the driver wants.
        statement = _prepared(text, self.database, "format")
        with self._connection.cursor() as cursor:
            cursor.execute(statement.text, statement.arguments(parameters))
            if self.database == "postgresql":
                _await_result(cursor)
            return (list(cursor.fetchall()) if fetch and cursor.description else []), cursor.rowcount


class _DriverLink(Link):
    __slots__ = ("_kept", "_package", "_style", "connection")

    def __init__(self, connection: Any, package: str, *, keep_cursor: bool = False) -> None:
        database, self._style = _DRIVERS[package]
        super().__init__(database)
        self.connection = connection
        self._package = package
        self._kept: Any = self._cursor() if keep_cursor else None

    def check_transaction(self) -> None:
        if _driver_commits_by_itself(self.connection, self.database):
            raise _autocommit("switch its autocommit off, or begin a transaction first")

    def run(self, text: str, parameters: Mapping[str, Any], *, fetch: bool = True) -> tuple[list[Sequence[Any]], int]:
        statement = _prepared(text, self.database, self._style)
        cursor = self._kept or self._cursor()
        try:
            cursor.execute(statement.text, statement.arguments(parameters))
            if self._package == "psycopg":
                _await_result(cursor)
            return (list(cursor.fetchall()) if fetch and _has_rows(cursor) else []), cursor.rowcount
        finally:
            if cursor is not self._kept:
                cursor.close()

    def run_many(self, text: str, rows: Sequence[Mapping[str, Any]]) -> int:
        if self._kept is None or self.database != "sqlite":  # elsewhere it is a loop, or tells another number
            return super().run_many(text, rows)
        statement = _prepared(text, self.database, self._style)
        self._kept.executemany(statement.text, map(statement.arguments, rows))
        return int(self._kept.rowcount)

    def tell(self, text: str) -> None:
        if self._kept is None:
            super().tell(text)
        else:
            self._kept.execute(text)

    def _cursor(self) -> Any:
        """A cursor whose rows are tuples, whatever the user's rows are."""
        connection = self.connection
        if self.database == "sqlite":
            cursor = connection.cursor()
            cursor.row_factory = None
            return cursor
        if self._package == "psycopg":
            return connection.cursor(row_factory=sys.modules["psycopg.rows"].tuple_row)
        module = sys.modules[f"{self._package}.{'extensions' if self._package == 'psycopg2' else 'cursors'}"]
        if self._package == "psycopg2":
            return connection.cursor(cursor_factory=module.cursor)
        return connection.cursor(module.Cursor)


def link_to(connection: Any) -> Link:
    """The link to a connection of any kind we know. Raises ConfigurationError for anything else."""
    if isinstance(connection, sa.Connection):
        return _SQLAlchemyLink(connection)
    orm = sys.modules.get("sqlalchemy.orm")
    if orm is not None and isinstance(connection, (orm.Session, orm.scoped_session)):
        return _SQLAlchemyLink(connection.connection())
    if isinstance(connection, sa.Engine):
        raise ConfigurationError("an Engine has no transaction: give the Connection that engine.begin() yields")
    if hasattr(connection, "vendor") and hasattr(connection, "in_atomic_block"):
        return _DjangoLink(connection)
    if hasattr(connection, "sync_connection") or hasattr(connection, "sync_session"):
        raise ConfigurationError(
            "an asynchronous connection or session: run this inside `await connection.run_sync(lambda c: ...)`, and "
            "give it the connection or session that comes in there"
        )
    driver = getattr(connection, "driver_connection", None) or connection  # SQLAlchemy's raw_connection()
    package = _package_of(driver)
    if package is None:
        raise ConfigurationError(f"a {type(connection).__name__} is not a connection that is known here: {_KINDS}")
    if _is_asynchronous(type(driver)):  # type: ignore[arg-type]
        raise ConfigurationError("an asynchronous connection cannot be used here; use a synchronous one")
    return _DriverLink(driver, package)


def commits_by_itself(connection: sa.Connection) -> bool:
    """True if no transaction is open and the driver would end one with each statement."""
    driver = connection.connection.dbapi_connection
    # An asynchronous driver's adapter has no state to look at: its setting counts.
    package = _package_of(driver)
    if package is not None:
        return _driver_commits_by_itself(driver, _database(connection.dialect.name))
    detect = getattr(connection.dialect, "detect_autocommit_setting", None)
    if detect is not None:
        with contextlib.suppress(NotImplementedError):
            return bool(detect(driver))
    return getattr(driver, "autocommit", False) is True


def is_duplicate(error: BaseException) -> bool:
    """True if this is MySQL's refusal of a second row with a unique key, as any of the links raises it."""
    return any(candidate.args[:1] == (1062,) for candidate in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = getattr(seen, "orig", None) or seen.__cause__


def _driver_commits_by_itself(driver: Any, database: str) -> bool:
    if database == "sqlite":
        if driver.in_transaction:
            return False
        setting = getattr(driver, "autocommit", -1)  # Python 3.12; -1 is what there was before
        if setting is True or setting is False:
            return bool(setting)
        return driver.isolation_level is None
    if database == "postgresql":
        return bool(driver.autocommit) and driver.info.transaction_status == _IDLE
    if not driver.get_autocommit():
        return False
    return not (getattr(driver, "server_status", 0) & _IN_TRANSACTION)


def _package_of(driver: object) -> str | None:
    """The driver's package, if it is one of those that are known."""
    return "sqlite3" if isinstance(driver, sqlite3.Connection) else _package_of_kind(type(driver))  # type: ignore[arg-type]  # any class can be a key


@functools.lru_cache(maxsize=64)
def _is_asynchronous(kind: type) -> bool:
    return inspect.iscoroutinefunction(getattr(kind, "commit", None))


@functools.lru_cache(maxsize=64)
def _package_of_kind(kind: type) -> str | None:
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        if package in _DRIVERS:
            return package
    return None


def _database(name: str) -> str:
    if name not in _DIALECTS:
        raise ConfigurationError(f"PostgreSQL, MariaDB, MySQL and SQLite are supported, {name} is not")
    return "mysql" if name == "mariadb" else name


@functools.lru_cache(maxsize=256)
def _prepared(text: str, database: str, style: str) -> Statement:
    return compiled(text, _DIALECTS[database](paramstyle=style))


def _autocommit(cure: str) -> ConfigurationError:
    return ConfigurationError(
        "this connection is in autocommit: the row would be durable without the effect that it belongs to, or the "
        f"effect without the row; {cure}"
    )
