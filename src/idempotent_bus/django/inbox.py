"""`inbox.record`: the record of a biz-id in the same transaction as its effect."""

from __future__ import annotations

import functools
from typing import Any

from django.db import connections

from ..inbox import Inbox
from .conf import bus_settings
from .databases import check_atomic

__all__ = ["record"]


def record(
    scope: str,
    biz_id: Any,
    *,
    using: str | None = None,
    fingerprint: Any = None,
    tenant: str = "",
    retention: float | None = None,
) -> bool:
    """Insert the record in the open `transaction.atomic` block. True: go on. False: it was done before.

    using: the alias of the database where the effect is; `IDEMPOTENT_BUS["DATABASE"]` if not given. retention: seconds;
    `IDEMPOTENT_BUS["RETENTION_DAYS"]` if not given. All else is as for `Inbox.record`, which says what is raised; and
    ConfigurationError outside an atomic block, Django's database errors, among them its OperationalError for a deadlock
    or a serialization failure, after which the whole block is to be repeated.
    """
    settings = bus_settings()
    connection = connections[using or settings.database]
    check_atomic(connection, "a record in the inbox")
    return _inbox(settings.table_prefix).record(
        connection,
        scope,
        biz_id,
        fingerprint=fingerprint,
        tenant=tenant,
        retention=settings.retention if retention is None else retention,
    )


@functools.lru_cache(maxsize=16)
def _inbox(table_prefix: str) -> Inbox:
    return Inbox(None, table_prefix=table_prefix, create=False)
