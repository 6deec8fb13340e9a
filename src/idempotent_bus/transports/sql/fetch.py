"""Taking messages and settling them: each one transaction.

Taking moves rows from kombu's table into ours, so that from then on a message is in exactly one place, and only the
owner's tag settles it. Messages that were given back before are taken singly: if one of them kills its consumer, its
neighbours do not pay for it with a delivery each.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import sqlalchemy as sa

from . import payload as sql_payload
from .database import Database
from .lease import Lease, renew
from .restore import UNREADABLE, Restorer
from .tables import affected

Delivery = tuple[str, dict[str, Any]]


class LeaseGone(Exception):
    """The lease lapsed and was taken apart: everything that it held belongs to others. Take with a new one."""


class Fetcher:
    """One a channel. Acks and delays may come from any thread."""

    def __init__(self, database: Database, restorer: Restorer) -> None:
        self._database = database
        self._restorer = restorer
        names = database.tables
        message, held = names.message, names.held
        queue_id = sa.select(names.queue.c.id).where(names.queue.c.name == sa.bindparam("queue_name"))
        self._next = (
            sa.select(message.c.id, message.c.payload)
            .where(message.c.queue_id == queue_id.scalar_subquery(), message.c.visible == sa.true())
            .order_by(message.c.id)
            .limit(sa.bindparam("most", type_=sa.Integer()))
            .with_for_update(skip_locked=True)
        )
        self._remove = sa.delete(message).where(message.c.id.in_(sa.bindparam("ids", expanding=True)))
        self._hold = sa.insert(held)
        self._ack = sa.delete(held).where(held.c.tag == sa.bindparam("old_tag"))

    def take(self, queue: str, most: int, lease: Lease) -> list[Delivery]:
        """Up to `most` messages of the queue, oldest first, now held by the lease's owner. Raises LeaseGone."""

        def work(connection: sa.Connection) -> list[Delivery] | None:
            rows = connection.execute(self._next, {"queue_name": queue, "most": most}).all()
            if not rows:
                return None
            if not renew(connection, self._database, lease):
                raise LeaseGone
            taken, deliveries = self._choose(connection, queue, rows)
            if taken:
                values = [{**row, "owner": lease.owner, "queue": queue} for row in taken]
                connection.execute(self._hold, values)
                connection.execute(self._remove, {"ids": [row["message_id"] for row in taken]})
            return deliveries

        deliveries = self._database.run(work)
        if deliveries is None:
            return []
        lease.written = True
        return deliveries

    def take_unheld(self, queue: str) -> list[Delivery]:
        """One message for a consumer without acks: it is gone with this, as such a consumer asked for."""

        def work(connection: sa.Connection) -> list[Delivery]:
            rows = connection.execute(self._next, {"queue_name": queue, "most": 1}).all()
            taken, deliveries = self._choose(connection, queue, rows)
            if taken:
                connection.execute(self._remove, {"ids": [row["message_id"] for row in taken]})
            return deliveries

        return self._database.run(work)

    def ack(self, tag: str) -> bool:
        """The message is done. False: it had gone back to its queue before (a lease that lapsed), and stays there."""
        return self._settle(self._ack, {"old_tag": tag})

    def delay(self, tag: str, seconds: float) -> bool:
        """The message comes back no sooner than this; the tag is spent. False as for `ack`."""
        held = self._database.tables.held
        values: dict[str, Any] = {"tag": uuid4().hex, "owner": None, "due_at": self._database.now + max(seconds, 0.0)}
        statement = sa.update(held).where(held.c.tag == tag).values(**values)
        done = self._settle(statement, {})
        self._restorer.soon(max(seconds, 0.0))
        return done

    def any_ready(self, queue: str) -> bool:
        """Whether the queue has a ready message: a plain read, which keeps an idle consumer off SQLite's write lock."""
        names = self._database.tables
        queue_id = sa.select(names.queue.c.id).where(names.queue.c.name == queue).scalar_subquery()
        query = sa.select(names.message.c.id).where(
            names.message.c.queue_id == queue_id, names.message.c.visible == sa.true()
        )
        return self._database.read(lambda connection: connection.scalar(query.limit(1))) is not None

    def _settle(self, statement: Any, values: dict[str, Any]) -> bool:
        return self._database.run(lambda connection: affected(connection.execute(statement, values)), again=True) > 0

    def _choose(self, connection: sa.Connection, queue: str, rows: Any) -> tuple[list[dict[str, Any]], list[Delivery]]:
        taken: list[dict[str, Any]] = []
        deliveries: list[Delivery] = []
        for row in rows:
            try:
                message, count = sql_payload.decode(row.payload)
            except ValueError:
                # kombu cannot have written this, and would fail on it at every fetch.
                unreadable = SimpleNamespace(queue=queue, message_id=row.id, deliveries=0, payload=row.payload)
                self._restorer.bury(connection, [(unreadable, UNREADABLE)])
                connection.execute(self._remove, {"ids": [row.id]})
                continue
            if count and taken:
                break
            tag = uuid4().hex
            taken.append({"tag": tag, "message_id": row.id, "deliveries": count, "payload": row.payload})
            deliveries.append((tag, sql_payload.hand_out(message, tag, count)))
            if count:
                break
        return taken, deliveries
