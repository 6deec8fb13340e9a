"""The tables: kombu's own two, as kombu makes them, and four of ours.

Ready messages lie in kombu's tables, so plain `sqla+...` producers and consumers share the queues with us. On MySQL and
MariaDB their payload is made LONGTEXT: kombu's TEXT ends at 64 KB, which a dead letter's headers exceed soon. What we
keep besides lies in tables of our own, where no plain worker can take or restore it.

* `..._landed`: the edge. One row for each (queue, inner-msg-id) that landed, unique.
* `..._held`: messages that are out of their queue: taken by a live consumer (`owner` set) or delayed (`due_at` set).
* `..._lease`: the live consumers. Renewing one row keeps everything that its owner holds invisible.
* `..._dead`: messages that were delivered too often; kept until a person moves them back.

Times are seconds since the epoch by the database's clock.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from ...errors import ConfigurationError

KOMBU_QUEUE: Final = "kombu_queue"
KOMBU_MESSAGE: Final = "kombu_message"
PREFIX: Final = "idempotent_bus"

#: The database's clock in seconds since the epoch. Never the start of the transaction, and free of time zones.
CLOCKS: Final = {
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) AS double precision)",
    "mysql": "(timestampdiff(MICROSECOND, '1970-01-01', utc_timestamp(6)) / 1000000e0)",
    "mariadb": "(timestampdiff(MICROSECOND, '1970-01-01', utc_timestamp(6)) / 1000000e0)",
}

#: SQLAlchemy keeps the row count of an INSERT only if asked to.
COUNTED: Final[dict[str, Any]] = {"preserve_rowcount": True}

# SQLite fills only an INTEGER primary key by itself.
_BIG: Final = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
# MySQL's TEXT ends at 64 KB and its FLOAT at seven digits; ids and tags must compare byte by byte.
_LONG: Final = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
_TIME: Final[sa.Double[float]] = sa.Double()
_DIGEST: Final = sa.LargeBinary(32).with_variant(mysql.BINARY(32), "mysql", "mariadb")
_TAG: Final = sa.String(64).with_variant(mysql.VARCHAR(64, charset="ascii", collation="ascii_bin"), "mysql", "mariadb")


@dataclass(frozen=True)
class Tables:
    """One set of tables: kombu's `queue` and `message`, and ours."""

    metadata: sa.MetaData
    queue: sa.Table
    message: sa.Table
    landed: sa.Table
    held: sa.Table
    lease: sa.Table
    dead: sa.Table
    ready: sa.Index


@functools.cache
def tables(queue: str = KOMBU_QUEUE, message: str = KOMBU_MESSAGE, prefix: str | None = None) -> Tables:
    """The tables under these names. Ours follow the message table's name, so that two sets never mix."""
    if prefix is None:
        prefix = PREFIX if message == KOMBU_MESSAGE else f"{PREFIX}_{message}"
    metadata = sa.MetaData()
    innodb: dict[str, Any] = {"mysql_engine": "InnoDB", "mariadb_engine": "InnoDB"}
    # kombu gives these two fixed names, which PostgreSQL and SQLite allow once a schema: other tables, other names.
    plain = message == KOMBU_MESSAGE
    queue_table = sa.Table(
        queue,
        metadata,
        sa.Column("id", sa.Integer, sa.Sequence("queue_id_sequence"), primary_key=True, autoincrement=True),
        sa.Column("name", sa.String(200), unique=True),
        sqlite_autoincrement=True,
        **innodb,
    )
    message_table = sa.Table(
        message,
        metadata,
        # kombu's is an INTEGER, which ends at two billion messages; a table of ours does not.
        sa.Column("id", _BIG, sa.Sequence("message_id_sequence"), primary_key=True, autoincrement=True),
        sa.Column("visible", sa.Boolean, index=True),
        sa.Column("timestamp", sa.DateTime, nullable=True, index=True),
        sa.Column("payload", _LONG, nullable=False),
        sa.Column("version", sa.SmallInteger, nullable=False),
        sa.Column(
            "queue_id",
            sa.Integer,
            sa.ForeignKey(f"{queue}.id", name="FK_kombu_message_queue" if plain else f"FK_{message}_queue"),
        ),
        sa.Index("ix_kombu_message_timestamp_id" if plain else f"ix_{message}_timestamp_id", "timestamp", "id"),
        sqlite_autoincrement=True,
        **innodb,
    )
    # kombu has no index that finds a queue's next message, and its own consumers never delete a row.
    ready = sa.Index(f"ix_{message}_ready", message_table.c.queue_id, message_table.c.visible, message_table.c.id)
    landed = sa.Table(
        f"{prefix}_landed",
        metadata,
        # Grows with time, so the oldest marks are found without an index on the time.
        sa.Column("id", _BIG, primary_key=True, autoincrement=True),
        sa.Column("mark", _DIGEST, nullable=False, unique=True),
        sa.Column("landed_at", _TIME, nullable=False),
        **innodb,
    )
    held = sa.Table(
        f"{prefix}_held",
        metadata,
        # The delivery tag, fresh at each fetch: who has it owns the message.
        sa.Column("tag", _TAG, primary_key=True),
        sa.Column("owner", _TAG, nullable=True, index=True),
        sa.Column("due_at", _TIME, nullable=True, index=True),
        sa.Column("queue", sa.String(200), nullable=False, index=True),
        sa.Column("message_id", _BIG, nullable=False),
        sa.Column("deliveries", sa.Integer, nullable=False),
        sa.Column("payload", _LONG, nullable=False),
        **innodb,
    )
    lease = sa.Table(
        f"{prefix}_lease",
        metadata,
        sa.Column("owner", _TAG, primary_key=True),
        sa.Column("until", _TIME, nullable=False),
        sa.Column("timeout", _TIME, nullable=False),
        **innodb,
    )
    dead = sa.Table(
        f"{prefix}_dead",
        metadata,
        sa.Column("id", _BIG, primary_key=True, autoincrement=True),
        sa.Column("queue", sa.String(200), nullable=False, index=True),
        sa.Column("message_id", _BIG, nullable=False),
        sa.Column("deliveries", sa.Integer, nullable=False),
        sa.Column("reason", sa.String(40), nullable=False),
        sa.Column("dead_at", _TIME, nullable=False),
        sa.Column("payload", _LONG, nullable=False),
        **innodb,
    )
    return Tables(metadata, queue_table, message_table, landed, held, lease, dead, ready)


def create(connection: sa.Connection, names: Tables) -> None:
    """Create what is missing, in the caller's transaction. May fail where another process does the same: repeat."""
    if connection.dialect.name == "postgresql":
        # One creator at a time; plain kombu does not take this lock, so the caller repeats all the same.
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(7105091846)"))
    inspector = sa.inspect(connection)
    existed = inspector.has_table(names.message.name)
    names.metadata.create_all(connection)
    if not existed:
        return
    if not any(index["name"] == names.ready.name for index in inspector.get_indexes(names.message.name)):
        names.ready.create(connection)
    if connection.dialect.name in ("mysql", "mariadb") and _is_short(inspector, names.message):
        # What is read back with a header or two more must fit again: a message that does not is stuck for ever.
        table = connection.dialect.identifier_preparer.format_table(names.message)
        # Not for a day, as is usual, behind somebody's open transaction: the caller repeats it, and then says so.
        connection.exec_driver_sql("SET SESSION lock_wait_timeout = 5")
        connection.exec_driver_sql(f"ALTER TABLE {table} MODIFY payload LONGTEXT NOT NULL")
        connection.exec_driver_sql("SET SESSION lock_wait_timeout = DEFAULT")


def _is_short(inspector: sa.Inspector, message: sa.Table) -> bool:
    """True if kombu made the table: its TEXT ends at 64 KB."""
    payload = next(column for column in inspector.get_columns(message.name) if column["name"] == "payload")
    return not isinstance(payload["type"], mysql.LONGTEXT)


def insert_ignore(table: sa.Table, dialect: str) -> Any:
    """An INSERT that does nothing where a unique value is there already; `affected` tells."""
    # inline: no RETURNING for the new id, which would hide the rowcount.
    if dialect == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as pg_insert

        return pg_insert(table).inline().on_conflict_do_nothing().execution_options(**COUNTED)
    if dialect == "sqlite":
        from sqlalchemy.dialects.sqlite import insert as sqlite_insert

        return sqlite_insert(table).inline().on_conflict_do_nothing().execution_options(**COUNTED)
    return sa.insert(table).inline().prefix_with("IGNORE").execution_options(**COUNTED)


def affected(result: Any) -> int:
    """How many rows a statement changed. Raises ConfigurationError where the driver does not say: never guessed."""
    if result.rowcount < 0:
        raise ConfigurationError("the database driver tells no row counts: SQLAlchemy 2.0.28 or newer is needed")
    return int(result.rowcount)
