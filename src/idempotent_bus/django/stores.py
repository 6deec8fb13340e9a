"""The dedup store that the settings name, for handlers whose effect is not in the database."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from django.db.utils import Error as DjangoError

from .. import schema
from ..errors import StoreUnavailable
from ..store import Store
from ..stores import open_store
from ..stores.sql import SQLStore
from ..stores.sql_flavours import Flavour, Work, choose
from .conf import bus_settings
from .databases import dialect_of, engine_of, known

__all__ = ["store", "store_here"]

T = TypeVar("T")


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


def store_here() -> Store:
    """The same for looking, deciding and purging: where it is in a Django database, on this thread's connection there.

    A request under ATOMIC_REQUESTS may hold the lock that another connection would wait for.
    """
    settings = bus_settings()
    if settings.store is not None:
        return open_store(settings.store)
    return _Here(settings.database, settings.table_prefix)


class _Here(SQLStore):
    """Its verbs on a Django connection, in the block that is open there, if one is."""

    def __init__(self, alias: str, table_prefix: str) -> None:  # no super().__init__: that one has an engine
        self._alias = alias
        self._tables = schema.metadata(table_prefix, parts=("store",))

    def close(self) -> None:
        """It has opened nothing."""

    def _perform(self, act: Callable[[Flavour, Work], T]) -> T:
        connection = known(self._alias)
        try:
            flavour = choose(dialect_of(connection), self._tables)
            work = Work(connection.connection, flavour.statements, own=True)
            answer = act(flavour, work)
            if not connection.in_atomic_block:
                work.finish()
        except (DjangoError, connection.Database.Error) as error:
            cause: Any = error
            if not connection.in_atomic_block:
                connection.close_if_unusable_or_obsolete()
            raise StoreUnavailable(f"the database says {type(cause).__name__}: are the tables migrated?") from error
        return answer
