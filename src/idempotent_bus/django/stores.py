"""The dedup store that the settings name, for handlers whose effect is not in the database."""

from __future__ import annotations

from sqlalchemy.pool import NullPool

from ..store import Store
from ..stores import open_store
from ..stores.sql import SQLStore
from .conf import bus_settings
from .databases import engine_of

__all__ = ["brief_store", "store"]


def store() -> Store:
    """Open the store of `IDEMPOTENT_BUS["STORE"]`, or the one in `IDEMPOTENT_BUS["DATABASE"]`.

    To be given as it is: `@idempotent_consumer(store, scope=..., biz_id=...)`; it is then called at the first message,
    once per process. Raises ConfigurationError.
    """
    settings = bus_settings()
    if settings.store is not None:
        return open_store(settings.store)
    # On connections of its own: a claim must be visible at once, and outlive your rollback.
    return SQLStore(engine_of(settings.database), table_prefix=settings.table_prefix, create=False)


def brief_store() -> Store:
    """The same for one look: it keeps no connection open."""
    settings = bus_settings()
    if settings.store is not None:
        return open_store(settings.store)
    engine = engine_of(settings.database, poolclass=NullPool)
    return SQLStore(engine, table_prefix=settings.table_prefix, create=False)
