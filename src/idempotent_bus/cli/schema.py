"""`idempotent-bus schema`: make the library's tables, bring them up to date, show their DDL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import click

__all__ = ["COMMANDS", "first_line", "opened"]

#: The driver where the URL names none: the one that the extras install.
_DRIVERS: Final = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "mariadb": "mariadb+pymysql"}

#: Seconds that a database's answer is waited for: to count or to index a large table takes a while.
_ANSWER_TIMEOUT: Final = 600.0

_DATABASE = click.option(
    "--database", required=True, help="A SQLAlchemy URL, such as postgresql+psycopg://user@host/db."
)
_PREFIX = click.option(
    "--table-prefix", default="idempotent_bus_", show_default=True, help="In front of each table's name."
)
_SCHEMA = click.option("--schema", "database_schema", default=None, help="The database schema that the tables lie in.")


@click.group()
def schema() -> None:
    """Make the tables, bring them up to date, or show them."""


@schema.command()
@_DATABASE
@_PREFIX
@_SCHEMA
def create(database: str, table_prefix: str, database_schema: str | None) -> None:
    """Make all tables: those of an older version are brought up to date."""
    _upgrade(database, table_prefix, database_schema)


@schema.command()
@_DATABASE
@_PREFIX
@_SCHEMA
def upgrade(database: str, table_prefix: str, database_schema: str | None) -> None:
    """Bring the tables of an older version up to date, or make them."""
    _upgrade(database, table_prefix, database_schema)


@schema.command()
@_DATABASE
@_PREFIX
@_SCHEMA
def show(database: str, table_prefix: str, database_schema: str | None) -> None:
    """Print the statements that make the tables, for migrations of your own. Changes nothing."""
    from .. import schema as tables
    from ..errors import ConfigurationError

    with opened(database) as engine:
        if engine.dialect.name in ("mysql", "mariadb"):
            _connect(engine)  # which of the two it is, and what it can do, the server says
        try:
            statements = tables.ddl(engine.dialect, table_prefix, database_schema)
        except ConfigurationError as error:
            raise click.BadParameter(str(error)) from error
    for statement in statements:
        click.echo(f"{statement};")


def _upgrade(database: str, table_prefix: str, database_schema: str | None) -> None:
    from sqlalchemy.exc import SQLAlchemyError

    from .. import migrations
    from ..errors import ConfigurationError

    with opened(database) as engine:
        try:
            reached = migrations.upgrade(engine, table_prefix, database_schema)
        except ConfigurationError as error:
            raise click.ClickException(str(error)) from error
        except SQLAlchemyError as error:
            raise click.ClickException(first_line(error)) from error
    if reached:
        click.echo(f"the tables are now of version {reached[-1]}")
    else:
        click.echo(f"nothing to do: the tables are of version {migrations.LATEST}")


@contextlib.contextmanager
def opened(url: str) -> Iterator[Any]:
    """An engine for a URL, disposed of at the end. Raises click.BadParameter for what is no database URL."""
    try:
        import sqlalchemy as sa
    except ModuleNotFoundError:
        raise click.ClickException("this needs SQLAlchemy: pip install 'idempotent-bus[sql]'") from None
    from ..watchdog import patient_engine

    try:
        parsed = sa.make_url(url)
        parsed = parsed.set(drivername=_DRIVERS.get(parsed.drivername, parsed.drivername))
        engine = patient_engine(parsed, _ANSWER_TIMEOUT)
    except ModuleNotFoundError as error:
        raise click.ClickException(f"the driver of this database is missing: {error.name}") from error
    except (sa.exc.ArgumentError, ValueError):
        # Not chained: the parser's text may hold a part of the password.
        raise click.BadParameter("not a database URL that SQLAlchemy knows", param_hint="--database") from None
    try:
        yield engine
    finally:
        engine.dispose()


def first_line(error: BaseException) -> str:
    """What went wrong, without the statement and its parameters."""
    cause = getattr(error, "orig", None) or error
    return f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"


def _connect(engine: Any) -> None:
    from sqlalchemy.exc import SQLAlchemyError

    try:
        engine.connect().close()
    except SQLAlchemyError as error:
        raise click.ClickException(first_line(error)) from error


COMMANDS = (schema,)
