"""The way back: from what we hold to kombu's table, by queue.

A message goes back to the queue that it came from, whatever is bound where, and keeps its place in it, except where a
consumer rejected it (then it goes to the end, as kombu's own transport does, so that it cannot starve its neighbours).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from . import payload as sql_payload
from .database import Database
from .tables import insert_ignore

#: Messages that one transaction moves at most, so that it stays short.
BATCH: Final = 200
#: How often a consumer looks for lapsed leases and due messages, in seconds. The look is one indexed read.
CHECK_EVERY: Final = 1.0

TOO_MANY: Final = "deliveries"
UNREADABLE: Final = "unreadable"


class Restorer:
    """Moves held messages back. One a channel; every method is one or more whole transactions."""

    def __init__(self, database: Database, max_deliveries: int | None) -> None:
        self._database = database
        self._max = max_deliveries
        self._next_check = 0.0

    def soon(self, delay: float) -> None:
        """Look again when this delay is over, if that is earlier than planned."""
        self._next_check = min(self._next_check, time.monotonic() + delay)

    def now_and_then(self) -> None:
        """Move back what lapsed or came due, if it is time to look."""
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + CHECK_EVERY
        names, clock = self._database.tables, self._database.now
        lease = sa.select(sa.func.min(names.lease.c.until)).scalar_subquery() - clock
        due = sa.select(sa.func.min(names.held.c.due_at)).scalar_subquery() - clock
        lapse_in, due_in = self._database.read(lambda connection: connection.execute(sa.select(lease, due)).one())
        moved = 0
        if lapse_in is not None and lapse_in < 0:
            moved += self._database.run(self._lapsed)
        if due_in is not None and due_in <= 0:
            moved += self._database.run(self._due)
            due_in = None
        if moved >= BATCH:
            self._next_check = now
        elif due_in is not None:
            self.soon(due_in)

    def give_back(self, tags: Iterable[str], *, keep_place: bool, counted: bool = True) -> int:
        """Delivered messages go back to their queues at once; counted as delivered, unless they were only looked at."""
        held = self._database.tables.held
        wanted = list(tags)
        moved = 0
        for start in range(0, len(wanted), BATCH):
            chosen = held.c.tag.in_(wanted[start : start + BATCH])

            def work(connection: sa.Connection, chosen: Any = chosen) -> int:
                rows = connection.execute(sa.select(held).where(chosen).with_for_update()).all()
                return self.move(connection, rows, keep_place=keep_place, counted=counted)

            moved += self._database.run(work)
        return moved

    def release(self, owner: str, delivered: Collection[str], *, keep: Collection[str] = (), end: bool = True) -> None:
        """All that `owner` holds goes back, but for the tags in `keep`; only `delivered` ones count as delivered.

        end: the lease ends too.
        """
        names = self._database.tables
        mine = names.held.c.owner == owner

        def work(connection: sa.Connection) -> bool:
            query = sa.select(names.held).where(mine).order_by(names.held.c.message_id).with_for_update()
            rows = [row for row in connection.execute(query) if row.tag not in keep]
            for counted in (True, False):
                part = [row for row in rows[:BATCH] if (row.tag in delivered) is counted]
                self.move(connection, part, counted=counted)
            if len(rows) > BATCH:
                return False
            if end:
                connection.execute(sa.delete(names.lease).where(names.lease.c.owner == owner))
            return True

        while not self._database.run(work, again=True):
            pass

    def _lapsed(self, connection: sa.Connection) -> int:
        names = self._database.tables
        lapsed = names.lease.c.until < self._database.now
        query = sa.select(names.lease.c.owner).where(lapsed).limit(1).with_for_update(skip_locked=True)
        owner = connection.scalar(query)
        if owner is None:
            return 0
        # Waits for an ack that is being committed; whoever holds the lease's row is the only one to move these.
        held = sa.select(names.held).where(names.held.c.owner == owner).limit(BATCH).with_for_update()
        rows = connection.execute(held).all()
        self.move(connection, rows)
        if len(rows) < BATCH:
            connection.execute(sa.delete(names.lease).where(names.lease.c.owner == owner))
        # More owners, or more of this one: the next look follows at once.
        return BATCH

    def _due(self, connection: sa.Connection) -> int:
        held = self._database.tables.held
        due = held.c.due_at <= self._database.now
        query = sa.select(held).where(due).order_by(held.c.due_at).limit(BATCH).with_for_update(skip_locked=True)
        rows = connection.execute(query).all()
        # Waiting is no delivery that failed: a message may be delayed as often as it takes.
        self.move(connection, rows, counted=False, seen=True)
        return len(rows)

    def move(
        self,
        connection: sa.Connection,
        rows: Sequence[Any],
        *,
        keep_place: bool = True,
        counted: bool = True,
        seen: bool = False,
    ) -> int:
        """Move rows of the held table back, in the caller's transaction.

        counted: this delivery counts towards the bound; seen: it does not, but is marked as redelivered all the same.
        """
        if not rows:
            return 0
        back, dead = [], []
        for row in rows:
            deliveries = row.deliveries + counted
            if counted and self._max is not None and deliveries >= self._max:
                dead.append((row, TOO_MANY))
                continue
            payload = row.payload
            if counted or seen:
                payload = sql_payload.mark_redelivered(payload, deliveries)
            back.append((row.message_id, row.queue, payload))
        self.put(connection, back, keep_place=keep_place)
        self.bury(connection, dead)
        held = self._database.tables.held
        connection.execute(sa.delete(held).where(held.c.tag.in_([row.tag for row in rows])))
        return len(rows)

    def put(self, connection: sa.Connection, rows: Sequence[tuple[int, str, str]], *, keep_place: bool) -> None:
        """Insert (message id, queue, payload) into kombu's table, in the caller's transaction."""
        if not rows:
            return
        message = self._database.tables.message
        ids = {queue: self._queue_id(connection, queue) for queue in {queue for _, queue, _ in rows}}
        values = [
            {"id": number, "visible": True, "version": 1, "payload": payload, "queue_id": ids[queue]}
            for number, queue, payload in sorted(rows)
        ]
        if keep_place:
            try:
                with connection.begin_nested():
                    connection.execute(sa.insert(message), values)
                return
            except IntegrityError:
                # The id was given to another message (a database restored from a dump): then the end of the queue.
                pass
        for value in values:
            del value["id"]
        connection.execute(sa.insert(message), values)

    def bury(self, connection: sa.Connection, rows: Sequence[tuple[Any, str]]) -> None:
        """Insert rows with their reasons into the dead table, in the caller's transaction."""
        if not rows:
            return
        dead = self._database.tables.dead
        values = [
            {
                "queue": row.queue,
                "message_id": row.message_id,
                "deliveries": row.deliveries + (reason == TOO_MANY),
                "reason": reason,
                "payload": row.payload,
            }
            for row, reason in rows
        ]
        connection.execute(sa.insert(dead).values(dead_at=self._database.now), values)

    def _queue_id(self, connection: sa.Connection, name: str) -> int:
        queue = self._database.tables.queue
        query = sa.select(queue.c.id).where(queue.c.name == name)
        found = connection.scalar(query)
        if found is None:
            connection.execute(insert_ignore(queue, self._database.dialect).values(name=name))
            found = connection.execute(query).scalar_one()
        return int(found)
