"""What can be found wrong before anything goes wrong: `manage.py check`, and at every command's start.

E001 the settings; E002 a database that is not supported; E003 AUTOCOMMIT is off; W001 SQLite begins its transactions
by reading; W002 (`manage.py check --database default`) tables are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import django
from django.conf import settings as django_settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.db import connections
from django.db.utils import Error as DatabaseError

from ..errors import ConfigurationError
from .conf import NAME, bus_settings, problems, table_name
from .databases import unsupported

__all__ = ["TAG", "check_databases", "check_settings", "check_tables"]

TAG: Final = "idempotent_bus"


@register(TAG)
def check_settings(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """E001: each thing that is wrong in the settings."""
    return [
        Error(problem, hint=f"See idempotent_bus.django.conf for what {NAME} may hold.", id="idempotent_bus.E001")
        for problem in problems(getattr(django_settings, NAME, None))
    ]


@register(TAG)
def check_databases(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """E002, E003, W001: the database that the settings name. Does not connect."""
    try:
        connection: Any = connections[bus_settings().database]
    except ConfigurationError:
        return []  # E001 says so
    wrong = unsupported(connection)
    if wrong:
        return [Error(wrong, id="idempotent_bus.E002")]
    found: list[CheckMessage] = []
    if not connection.settings_dict["AUTOCOMMIT"]:
        found.append(
            Error(
                f"The database {connection.alias!r} has AUTOCOMMIT False: transaction.atomic() does not commit there.",
                hint="A handler's effect would never be committed, and its message acked. Leave AUTOCOMMIT out.",
                id="idempotent_bus.E003",
            )
        )
    if connection.vendor == "sqlite" and django.VERSION >= (5, 1):
        mode = str((connection.settings_dict.get("OPTIONS") or {}).get("transaction_mode") or "").upper()
        if mode not in ("IMMEDIATE", "EXCLUSIVE"):
            found.append(
                Warning(
                    f"The SQLite database {connection.alias!r} begins its transactions as DEFERRED: one that reads "
                    "before it writes fails at once with 'database is locked' if another has written meanwhile.",
                    hint=f"DATABASES[{connection.alias!r}]['OPTIONS'] = {{'transaction_mode': 'IMMEDIATE'}}",
                    id="idempotent_bus.W001",
                )
            )
    return found


@register(TAG, Tags.database)
def check_tables(app_configs: Any = None, databases: Sequence[str] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """W002: tables are missing. A warning, since `migrate`, which makes them, runs these checks first."""
    try:
        alias = bus_settings().database
    except ConfigurationError:
        return []
    if alias not in (databases or ()) or unsupported(connections[alias]):
        return []
    connection: Any = connections[alias]
    try:
        with connection.cursor() as cursor:
            there = set(connection.introspection.table_names(cursor))
    except DatabaseError as error:
        return [Warning(f"The database {alias!r} cannot be asked ({type(error).__name__}).", id="idempotent_bus.W003")]
    missing = [name for name in map(table_name, ("inbox", "outbox", "records")) if name not in there]
    if not missing:
        return []
    return [
        Warning(
            f"The database {alias!r} has no {', '.join(missing)}.",
            hint=f"manage.py migrate idempotent_bus --database={alias}",
            id="idempotent_bus.W002",
        )
    ]
