"""From the tables of an older version to those of this one: numbered steps, and a table that says which were taken.

An empty database gets this version's tables as they are (`schema.metadata`). One that has tables and no number was made
by version 1, or by parts of this library that make what they need: every step so far passes over what is there. The
steps are texts that are never changed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import sqlalchemy as sa

from .. import schema
from ..dialects import load_texts, quoted
from ..errors import ConfigurationError

__all__ = ["LATEST", "upgrade", "version"]

#: One for each step, by the number of the version that it leads to. Version 1 had records, tokens and the inbox.
_STEPS: Final = {2: "0002_outbox.sql"}
LATEST: Final = max(_STEPS)
#: Seconds to wait for another one that is at it.
_PATIENCE: Final = 60
_ALREADY_THERE: Final = 1061  # MySQL has no CREATE INDEX IF NOT EXISTS


def upgrade(engine: sa.Engine, table_prefix: str = schema.PREFIX, database_schema: str | None = None) -> list[int]:
    """Bring the tables to this version, or make them; the versions that were reached on the way, none if all was there.

    Any number of processes may do so at once, one after the other. Raises ConfigurationError if the tables are of a
    newer version than this one, and what the database raises.
    """
    tables = schema.metadata(table_prefix, database_schema)
    numbers = _numbers(tables)
    with _alone(engine, tables) as connection:
        dialect = connection.dialect
        # Looked at first: with all in place no right to create is needed.
        if not sa.inspect(connection).has_table(numbers.name, schema=numbers.schema):
            connection.execute(sa.schema.CreateTable(numbers, if_not_exists=True))
        there = connection.execute(sa.select(numbers.c.version)).scalar_one_or_none()
        if there is not None and there > LATEST:
            raise ConfigurationError(f"these tables are of version {there}, and this release knows {LATEST} at most")
        reached = []
        if there is None and _is_empty(connection, tables):
            reached = [LATEST]
        else:
            for number in range((there or 1) + 1, LATEST + 1):
                _take(connection, tables, number)
                reached.append(number)
        if schema.missing(connection, tables):
            for statement in schema.statements(tables, dialect):
                _run(connection, statement)
        if there is None:
            connection.execute(sa.insert(numbers).values(id=1, version=LATEST))
        elif there < LATEST:
            connection.execute(sa.update(numbers).values(version=LATEST))
    return reached


def version(engine: sa.Engine, table_prefix: str = schema.PREFIX, database_schema: str | None = None) -> int | None:
    """The version that is written down in the database; None if there is none."""
    numbers = _numbers(schema.metadata(table_prefix, database_schema))
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table(numbers.name, schema=numbers.schema):
            return None
        return connection.execute(sa.select(numbers.c.version)).scalar_one_or_none()


def _numbers(tables: sa.MetaData) -> sa.Table:
    """The table of one row. Not part of `schema.metadata`: who migrates with Alembic has Alembic's own."""
    return sa.Table(
        f"{tables.info['prefix']}schema",
        sa.MetaData(schema=tables.schema),
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("version", sa.Integer, nullable=False),
    )


def _is_empty(connection: sa.Connection, tables: sa.MetaData) -> bool:
    inspector = sa.inspect(connection)
    return not any(inspector.has_table(table.name, schema=table.schema) for table in tables.sorted_tables)


def _take(connection: sa.Connection, tables: sa.MetaData, number: int) -> None:
    """Take one step."""
    kind = "mysql" if connection.dialect.name == "mariadb" else connection.dialect.name
    table = schema.outbox(tables)
    texts = load_texts(__package__, _STEPS[number], {"outbox": quoted(connection.dialect, table), "name": table.name})
    for name, text in texts.items():
        if name.split()[0] == kind:
            _run(connection, sa.text(text))


def _run(connection: sa.Connection, statement: sa.Executable) -> None:
    try:
        connection.execute(statement)
    except sa.exc.OperationalError as error:
        if error.orig is None or error.orig.args[:1] != (_ALREADY_THERE,):
            raise


@contextlib.contextmanager
def _alone(engine: sa.Engine, tables: sa.MetaData) -> Iterator[sa.Connection]:
    """A transaction that no other upgrade, and on PostgreSQL no `schema.create`, runs beside."""
    kind = engine.dialect.name
    level = {"isolation_level": "READ COMMITTED"} if kind != "sqlite" else {}
    with (
        engine.connect().execution_options(**level) as connection,
        contextlib.ExitStack() as at_the_end,
        connection.begin(),
    ):
        if kind == "postgresql":
            schema.one_at_a_time(connection, tables, _PATIENCE)
        elif kind == "sqlite":
            if not getattr(connection.connection.dbapi_connection, "in_transaction", False):
                connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            # CREATE ends transactions there; this lock is the session's.
            if connection.execute(sa.select(sa.func.get_lock(_lock_name(tables), _PATIENCE))).scalar() != 1:
                raise ConfigurationError("another process is changing the tables and does not come to its end")
            at_the_end.callback(connection.execute, sa.select(sa.func.release_lock(_lock_name(tables))))
        yield connection


def _lock_name(tables: sa.MetaData) -> str:
    # At most 64 characters, and one for the whole server.
    return f"idempotent-bus {tables.info['prefix']}"[:64]
