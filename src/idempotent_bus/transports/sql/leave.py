"""Taking the library out again: everything that we keep goes back to the tables that plain kombu reads."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from . import payload as sql_payload
from .database import Database, open_database
from .restore import BATCH, UNREADABLE, Restorer

_SCHEMES = ("idempotent-sqla+", "sqla+", "sqlalchemy+")


@dataclass(frozen=True)
class DeadLetter:
    """A message in the dead table. `reason`: `deliveries` (given back too often) or `unreadable` (not kombu's JSON)."""

    id: int
    queue: str
    deliveries: int
    reason: str
    dead_at: float
    payload: str


def restore(
    target: Any,
    *,
    dead: bool = False,
    queues: Collection[str] | None = None,
    force: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, int]:
    """Move what our tables hold back to kombu's ready messages, each to the queue that it came from.

    target: a broker URL or a kombu Connection. dead: the dead table's messages too, with their count of deliveries
    begun afresh (unreadable rows stay). queues: only these. options: transport options, where `target` is a URL.
    What a live consumer holds stays with it, unless `force` is set (then its late ack removes nothing).

    Returns how many messages of each kind were moved, and how many are `left`. Delayed ones do not wait any longer.
    """
    database = _open(target, options)
    restorer = Restorer(database, max_deliveries=None)
    held = database.tables.held
    chosen = [] if queues is None else [held.c.queue.in_(list(queues))]
    moved = {"delayed": _move(database, restorer, [*chosen, held.c.owner.is_(None)])}
    moved["unacked"] = _move(
        database, restorer, [*chosen, _unowned(database) if not force else held.c.owner.isnot(None)]
    )
    moved["dead"] = _move_dead(database, restorer, queues) if dead else 0
    left = sa.select(sa.func.count()).select_from(held).where(*chosen)
    moved["left"] = int(database.read(lambda connection: connection.scalar(left)) or 0)
    return moved


def dead_letters(
    target: Any, *, queues: Collection[str] | None = None, most: int = 100, options: dict[str, Any] | None = None
) -> list[DeadLetter]:
    """The dead table's oldest messages. `target`, `queues` and `options` as for `restore`."""
    database = _open(target, options)
    table = database.tables.dead
    columns = (table.c.id, table.c.queue, table.c.deliveries, table.c.reason, table.c.dead_at, table.c.payload)
    query = sa.select(*columns).order_by(table.c.id).limit(most)
    if queues is not None:
        query = query.where(table.c.queue.in_(list(queues)))
    return [DeadLetter(*row) for row in database.read(lambda connection: connection.execute(query).all())]


def _open(target: Any, options: dict[str, Any] | None) -> Database:
    if isinstance(target, str):
        for scheme in _SCHEMES:
            target = target.removeprefix(scheme)
        return open_database(target, options or {})
    return open_database(target.hostname, target.transport_options or {})


def _unowned(database: Database) -> Any:
    """Held by an owner whose lease has lapsed or is gone."""
    names = database.tables
    alive = sa.select(names.lease.c.owner).where(names.lease.c.until >= database.now)
    return sa.and_(names.held.c.owner.isnot(None), names.held.c.owner.not_in(alive))


def _move(database: Database, restorer: Restorer, conditions: list[Any]) -> int:
    held = database.tables.held
    query = sa.select(held).where(*conditions).order_by(held.c.message_id).limit(BATCH).with_for_update()

    def work(connection: sa.Connection) -> int:
        return restorer.move(connection, connection.execute(query).all(), counted=False, seen=True)

    return _until_none(database, work)


def _move_dead(database: Database, restorer: Restorer, queues: Collection[str] | None) -> int:
    dead = database.tables.dead
    chosen = [] if queues is None else [dead.c.queue.in_(list(queues))]
    query = sa.select(dead).where(*chosen, dead.c.reason != UNREADABLE).limit(BATCH).with_for_update()

    def work(connection: sa.Connection) -> int:
        rows = connection.execute(query).all()
        fresh = [(row.message_id, row.queue, sql_payload.mark_redelivered(row.payload, 0)) for row in rows]
        restorer.put(connection, fresh, keep_place=False)
        connection.execute(sa.delete(dead).where(dead.c.id.in_([row.id for row in rows])))
        return len(rows)

    return _until_none(database, work)


def _until_none(database: Database, work: Any) -> int:
    total = 0
    while moved := database.run(work, durable=True):
        total += moved
    return total
