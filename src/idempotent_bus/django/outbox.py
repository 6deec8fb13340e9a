"""`outbox.add`: a message in the same transaction as the effect that it tells of."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from django.db import connections

from .. import schema
from ..connections import link_to
from ..outbox import Added, Outbox
from ..relaying.rows import load
from .conf import bus_settings
from .databases import check_atomic, dialect_of, known

__all__ = ["add", "discard", "redrive"]


def add(body: Any, *, using: str | None = None, **options: Any) -> Added:
    """Add one message to the outbox in the open `transaction.atomic` block; returns its inner-msg-id.

    It is there if and only if that block is committed: rolled back with it, with the savepoint in which it was added,
    or with the request under ATOMIC_REQUESTS.

    using: the alias of the database where the effect is; `IDEMPOTENT_BUS["DATABASE"]` if not given. exchange,
    routing_key, order_by, delay, once and all else: as for `Outbox.add`; what is not given is as in
    `IDEMPOTENT_BUS["OUTBOX"]`.

    Raises ConfigurationError outside an atomic block, where the message would be durable without its effect; what
    `Outbox.add` raises; and Django's database errors.
    """
    settings = bus_settings()
    connection = connections[using or settings.database]
    check_atomic(connection, "a message in the outbox")
    return _outbox(settings.table_prefix, *settings.outbox.items()).add(connection, body, **options)


def redrive(ids: Iterable[int], *, using: str | None = None) -> int:
    """Send these dead rows again, with fresh attempts; how many of them were dead."""
    return _decide("redrive", ids, using)


def discard(ids: Iterable[int], *, using: str | None = None) -> int:
    """Delete these dead rows: they are never sent, and what waits behind them goes on. How many of them were dead."""
    return _decide("discard", ids, using)


def _decide(statement: str, ids: Iterable[int], using: str | None) -> int:
    # On Django's connection, in the block that is open: a request may hold the lock that another one would wait for.
    numbers = [int(identity) for identity in ids]
    if not numbers:
        return 0
    settings = bus_settings()
    connection = known(using or settings.database)
    tables = schema.metadata(settings.table_prefix, parts=("outbox",))
    text = load(tables, dialect_of(connection))[statement]
    return link_to(connection).run(text.replace(":ids", f"({', '.join(map(str, numbers))})"), {})[1]


@functools.lru_cache(maxsize=16)
def _outbox(table_prefix: str, *options: tuple[str, Any]) -> Outbox:
    return Outbox(None, table_prefix=table_prefix, create=False, **dict(options))
