"""The library's tables, in one place: for its own `create`, and for your migrations.

metadata()                      # a SQLAlchemy MetaData, for Alembic's target_metadata
ddl(engine.dialect)             # the statements as text, for whoever writes migrations by hand
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Dialect, Engine
from sqlalchemy.schema import CreateIndex, CreateSequence, CreateTable

from .dialects import Blob, Digest, quoted
from .errors import ConfigurationError
from .model import FINGERPRINT_BYTES, KEY_BYTES, NONCE_BYTES

__all__ = ["PARTS", "PREFIX", "check_engines", "create", "ddl", "engines_query", "inbox", "metadata", "missing"]
__all__ += ["one_at_a_time", "outbox", "records", "refuse_engines", "statements", "tokens"]

PREFIX: Final = "idempotent_bus_"
#: What can be had apart: the dedup store's tables, and the inbox's and the outbox's, which live where the effects are.
PARTS: Final = ("store", "inbox", "outbox")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
# On PostgreSQL a page keeps room for the completion beside the claim, and what a window's completions leave behind is
# used again by the next claims once it is vacuumed: 216 bytes an id then, 350 without. SQLAlchemy 2.0 has no word for
# it on a table.
_ROOM_FOR_UPDATES: Final[dict[str, Any]] = (
    {"postgresql_with": {"fillfactor": "85", "autovacuum_vacuum_scale_factor": "0.05"}}
    if not sa.__version__.startswith("2.0.")
    else {}
)
# Claimed rows are changed in no indexed column, and rows soon die: room on the page and an early vacuum keep it small.
_QUEUE_LIKE: Final[dict[str, Any]] = (
    {"postgresql_with": {"fillfactor": "70", "autovacuum_vacuum_scale_factor": "0.05"}} if _ROOM_FOR_UPDATES else {}
)
# Whatever the server's default is: without transactions a record would outlive its effect's rollback.
_INNODB: Final[dict[str, Any]] = {"mysql_engine": "InnoDB", "mariadb_engine": "InnoDB"}
# Tables that a database without sequences has instead of one carry this mark.
_INSTEAD: Final = "instead_of_sequence"


def metadata(table_prefix: str = PREFIX, schema: str | None = None, *, parts: Collection[str] = PARTS) -> sa.MetaData:
    """All tables and sequences of the library, or those of the named parts.

    Raises ConfigurationError if the prefix or the schema is not a plain name of at most 40 letters, digits and `_`.
    """
    for name in (table_prefix, schema):
        if name is not None and not _NAME.fullmatch(name):
            raise ConfigurationError("a table prefix or schema must be a name of at most 40 letters, digits and _")
    tables = sa.MetaData(schema=schema, info={"prefix": table_prefix})
    if "store" in parts:
        _records(tables, table_prefix)
        _tokens(tables, table_prefix)
    if "inbox" in parts:
        _inbox(tables, table_prefix)
    if "outbox" in parts:
        _outbox(tables, table_prefix)
    return tables


def _records(tables: sa.MetaData, prefix: str) -> None:
    """One row per biz-id: the dedup store. Times are microseconds since the epoch, by the database's clock.

    Long columns come first, so that PostgreSQL need not pad between them.
    """
    name = f"{prefix}records"
    small = sa.SmallInteger
    sa.Table(
        name,
        tables,
        sa.Column("record_key", Digest(KEY_BYTES), primary_key=True),
        sa.Column("nonce", Digest(NONCE_BYTES), nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("lease_ends", sa.BigInteger, nullable=False),
        sa.Column("kept_until", sa.BigInteger, nullable=False),
        # Never later than kept_until, and set once: completing a record then changes no indexed column, which spares
        # two index entries per message (PostgreSQL updates in place, "HOT"; SQLite and InnoDB touch one tree).
        sa.Column("purge_after", sa.BigInteger, nullable=False),
        sa.Column("redrive", sa.BigInteger, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("state", small, nullable=False),
        # Bit 0: the claim took over from a holder that had started. Higher bits: MySQL's verdict on the last claim.
        sa.Column("flags", small, nullable=False),
        sa.Column("fingerprint", Digest(FINGERPRINT_BYTES)),
        sa.Column("result", Blob),
        sa.Index(f"{name}_purge", "purge_after"),
        sqlite_with_rowid=False,
        **_INNODB,
        **_ROOM_FOR_UPDATES,
    )


def _tokens(tables: sa.MetaData, prefix: str) -> None:
    """The counter of tokens. It outlives the records, so that a key's tokens grow even after it was forgotten."""
    name = f"{prefix}tokens"
    # One number at a time: a session that cached some would hand out small ones after another's larger ones.
    # (MariaDB's cache is the server's, not the session's, and 1000 by default: it stays as it is.)
    sa.Sequence(name, metadata=tables)
    sa.Table(
        name,
        tables,
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("value", sa.BigInteger, nullable=False),
        info={_INSTEAD: True},
        **_INNODB,
    )


def _inbox(tables: sa.MetaData, prefix: str) -> None:
    """One row per biz-id that was handled in a transaction, or (completed 0) whose attempts are counted."""
    name = f"{prefix}inbox"
    sa.Table(
        name,
        tables,
        sa.Column("record_key", Digest(KEY_BYTES), primary_key=True),
        sa.Column("kept_until", sa.BigInteger, nullable=False),
        sa.Column("redrive", sa.BigInteger, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("completed", sa.SmallInteger, nullable=False),
        sa.Column("fingerprint", Digest(FINGERPRINT_BYTES)),
        sa.Column("result", Blob),
        sa.Index(f"{name}_purge", "kept_until"),
        sqlite_with_rowid=False,
        **_INNODB,
    )


def _outbox(tables: sa.MetaData, prefix: str) -> None:
    """One row per message that is to be sent; deleted once the broker has confirmed it.

    Claiming a row changes no indexed column. Rows with an order key are found through their own index, and never
    stand in the way of those without: that one has their state in front.
    """
    name = f"{prefix}outbox"
    utf8: dict[str, Any] = {"charset": "utf8mb4", "collation": "utf8mb4_bin"}
    short = sa.String(255).with_variant(mysql.VARCHAR(255, **utf8), "mysql", "mariadb")
    json = sa.Text().with_variant(mysql.LONGTEXT(**utf8), "mysql", "mariadb")
    sa.Table(
        name,
        tables,
        # Numbers are never used again (SQLite would otherwise): they are the order of the rows of one key.
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("inner_msg_id", Digest(16), nullable=False),
        sa.Column("order_key", Digest(16)),
        sa.Column("owner", Digest(16)),
        sa.Column("made_at", sa.BigInteger, nullable=False),
        sa.Column("due_at", sa.BigInteger, nullable=False),
        sa.Column("lease_ends", sa.BigInteger, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("state", sa.SmallInteger, nullable=False),
        sa.Column("exchange", short, nullable=False),
        sa.Column("routing_key", short, nullable=False),
        sa.Column("content_type", short, nullable=False),
        sa.Column("content_encoding", short, nullable=False),
        sa.Column("headers", json, nullable=False),
        sa.Column("options", json, nullable=False),
        sa.Column("last_error", json),
        sa.Column("body", Blob, nullable=False),
        sa.Index(f"{name}_message", "inner_msg_id", unique=True),
        sa.Index(f"{name}_due", "state", "due_at", "id"),
        # Most rows have none: where an index can leave them out, it does.
        sa.Index(
            f"{name}_order",
            "order_key",
            "id",
            postgresql_where=sa.text("order_key IS NOT NULL"),
            sqlite_where=sa.text("order_key IS NOT NULL"),
        ),
        sqlite_autoincrement=True,
        **_INNODB,
        **_QUEUE_LIKE,
    )


def inbox(tables: sa.MetaData) -> sa.Table:
    """The inbox's table."""
    return _table(tables, "inbox")


def outbox(tables: sa.MetaData) -> sa.Table:
    """The outbox's table."""
    return _table(tables, "outbox")


def records(tables: sa.MetaData) -> sa.Table:
    """The dedup store's table."""
    return _table(tables, "records")


def tokens(tables: sa.MetaData, dialect: Dialect) -> sa.Table | sa.Sequence:
    """The token counter: a sequence where the database has them (PostgreSQL, MariaDB), else a table of one row."""
    if has_sequences(dialect):
        return next(iter(_sequences(tables)))
    return _table(tables, "tokens")


def has_sequences(dialect: Dialect) -> bool:
    """PostgreSQL, and MariaDB from 10.6 on. Known only after the first connection: MySQL and MariaDB share a scheme."""
    if dialect.name == "postgresql":
        return True
    version = getattr(dialect, "server_version_info", None) or ()
    return bool(getattr(dialect, "is_mariadb", False)) and tuple(version) >= (10, 6)


def _table(tables: sa.MetaData, what: str) -> sa.Table:
    name = f"{tables.info['prefix']}{what}"
    return tables.tables[name if tables.schema is None else f"{tables.schema}.{name}"]


def _sequences(tables: sa.MetaData) -> Iterator[sa.Sequence]:
    name = f"{tables.info['prefix']}tokens"
    if any(table.info.get(_INSTEAD) for table in tables.sorted_tables):
        yield sa.Sequence(name, schema=tables.schema)


def statements(tables: sa.MetaData, dialect: Dialect) -> Iterator[sa.Executable]:
    """Whatever makes the tables, each passing over what is there already (but for an index on MySQL: error 1061)."""
    sequences = has_sequences(dialect)
    if sequences:
        for sequence in _sequences(tables):
            yield CreateSequence(sequence, if_not_exists=True)
    for table in tables.sorted_tables:
        instead = table.info.get(_INSTEAD, False)
        if instead and sequences:
            continue
        yield CreateTable(table, if_not_exists=True)
        if instead:
            ignore = "INSERT IGNORE" if dialect.name in ("mysql", "mariadb") else "INSERT OR IGNORE"
            yield sa.text(f"{ignore} INTO {quoted(dialect, table)} (id, value) VALUES (1, 0)")
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            # MySQL proper has no IF NOT EXISTS here: `create` passes over an index that is there already.
            yield CreateIndex(index, if_not_exists=dialect.name != "mysql" or has_sequences(dialect))


def ddl(
    dialect: Dialect, table_prefix: str = PREFIX, schema: str | None = None, *, parts: Collection[str] = PARTS
) -> list[str]:
    """The statements that `create` runs, as text. The dialect of an engine that has connected knows its server."""
    tables = metadata(table_prefix, schema, parts=parts)
    made = (str(statement.compile(dialect=dialect)) for statement in statements(tables, dialect))  # type: ignore[attr-defined]  # every DDL and text element compiles; Executable does not say so
    return [" ".join(text.split()) for text in made]


def create(engine: Engine, tables: sa.MetaData, *, patience: float = 2.0) -> None:
    """Create what is missing, and nothing if all is there (then no right to create is needed).

    Any number of processes may do so at once.

    Raises the driver's error, wrapped by SQLAlchemy, if it cannot be done within `patience` seconds; and
    ConfigurationError for tables that are there, in an engine of MySQL's or MariaDB's without transactions.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            with engine.connect() as connection:
                if not missing(connection, tables):
                    check_engines(connection, tables)
                    return
            # On PostgreSQL a transaction, whatever the engine's default is: the lock must last until the end.
            postgresql = engine.dialect.name == "postgresql"
            level = {"isolation_level": "READ COMMITTED"} if postgresql else {}
            with engine.connect().execution_options(**level) as connection, connection.begin():
                if postgresql:
                    one_at_a_time(connection, tables, patience)
                for statement in statements(tables, engine.dialect):
                    connection.execute(statement)
        except sa.exc.DBAPIError:
            # Somebody else created it in between (MySQL's index, SQLite's lock): look again.
            with engine.connect() as connection:
                if missing(connection, tables) and time.monotonic() > deadline:
                    raise
            time.sleep(0.05)


def one_at_a_time(connection: sa.Connection, tables: sa.MetaData, patience: float) -> None:
    """On PostgreSQL: wait until nobody else makes these tables, and keep others from it until the transaction's end.

    CREATE ... IF NOT EXISTS looks, then creates: two at once collide in the catalogue. patience: seconds to wait for
    this or any other lock in the transaction: whoever has it may have been stopped in the middle.
    """
    connection.execute(sa.select(sa.func.set_config("lock_timeout", f"{max(1, round(patience * 1000))}", True)))
    lock = sa.func.hashtext(f"idempotent-bus {tables.schema} {tables.info['prefix']}")
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(lock)))


def check_engines(connection: sa.Connection, tables: sa.MetaData) -> None:
    """On MySQL and MariaDB: raise ConfigurationError if one of the tables is in an engine without transactions."""
    if connection.dialect.name in ("mysql", "mariadb"):
        refuse_engines(connection.exec_driver_sql(engines_query(tables)))


def engines_query(tables: sa.MetaData) -> str:
    """What of these tables, as far as they are there, has no transactions on MySQL and MariaDB: name and engine."""
    # Plain names, as `metadata` has checked.
    names = ", ".join(f"'{table.name}'" for table in tables.sorted_tables)
    where = "DATABASE()" if tables.schema is None else f"'{tables.schema}'"
    return (
        "SELECT t.TABLE_NAME, t.ENGINE FROM information_schema.TABLES AS t "  # noqa: S608
        "JOIN information_schema.ENGINES AS e ON e.ENGINE = t.ENGINE "
        f"WHERE t.TABLE_SCHEMA = {where} AND t.TABLE_NAME IN ({names}) AND COALESCE(e.TRANSACTIONS, 'NO') <> 'YES'"
    )


def refuse_engines(rows: Iterable[Sequence[Any]]) -> None:
    """Raise ConfigurationError if `engines_query` has found any."""
    for name, engine in rows:
        raise ConfigurationError(
            f"the table {name} is in the engine {engine}, which has no transactions: what is rolled back would stay "
            f"there. Run `ALTER TABLE {name} ENGINE=InnoDB`, and look at what is in it"
        )


def missing(connection: sa.Connection, tables: sa.MetaData) -> bool:
    """Whether anything is missing, asked of the catalogue."""
    inspector = sa.inspect(connection)
    dialect = connection.dialect
    wanted = [table for table in tables.sorted_tables if not (table.info.get(_INSTEAD) and has_sequences(dialect))]
    for table in wanted:
        if not inspector.has_table(table.name, schema=table.schema):
            return True
        there = {index["name"] for index in inspector.get_indexes(table.name, schema=table.schema)}
        if not {index.name for index in table.indexes} <= there:
            return True
        if table.info.get(_INSTEAD) and connection.execute(sa.select(sa.func.count()).select_from(table)).scalar() != 1:
            return True
    if not has_sequences(dialect):
        return False
    return not all(inspector.has_sequence(item.name, schema=item.schema) for item in _sequences(tables))
