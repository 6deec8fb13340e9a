"""The migrations' one operation: the tables of `idempotent_bus.schema`, on Django's own connection."""

from __future__ import annotations

from typing import Any

from django.db import router
from django.db.migrations.operations.base import Operation
from django.db.utils import DatabaseError
from sqlalchemy.schema import DropSequence, DropTable, Table

from .. import schema
from .conf import bus_settings
from .databases import dialect_of

__all__ = ["BusTables"]

_ALREADY_THERE = 1061  # MySQL has no CREATE INDEX IF NOT EXISTS


class BusTables(Operation):
    """Make what is missing of the tables, as this release has them; backwards, drop them with all that is in them.

    What is there already is passed over: tables that `idempotent-bus schema create` has made may be taken over.
    """

    reduces_to_sql = True
    reversible = True

    def state_forwards(self, app_label: str, state: Any) -> None:
        """Nothing: the models are said beside it."""

    def database_forwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        """Create."""
        connection = schema_editor.connection
        if not router.allow_migrate(connection.alias, app_label):
            return
        for statement in schema.ddl(dialect_of(connection), bus_settings().table_prefix):
            try:
                schema_editor.execute(statement, params=None)
            except DatabaseError as error:
                if connection.vendor != "mysql" or error.args[:1] != (_ALREADY_THERE,):
                    raise

    def database_backwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        """Drop."""
        connection = schema_editor.connection
        if not router.allow_migrate(connection.alias, app_label):
            return
        dialect = dialect_of(connection)
        tables = schema.metadata(bus_settings().table_prefix)
        tokens = schema.tokens(tables, dialect)
        drops: list[Any] = [
            DropTable(table, if_exists=True) for table in tables.sorted_tables if table.name != tokens.name
        ]
        drops.append((DropTable if isinstance(tokens, Table) else DropSequence)(tokens, if_exists=True))  # type: ignore[arg-type]
        for drop in drops:
            schema_editor.execute(str(drop.compile(dialect=dialect)), params=None)

    def describe(self) -> str:
        """For `manage.py migrate`."""
        return "Create the tables of idempotent-bus"
