"""The edge: a message and its mark land in one commit, in all the queues of one publish or in none.

A mark is a digest of (queue, inner-msg-id). Marks are remembered for at least the window: 7 days unless told
otherwise, which outlives a long weekend in which an outbox relay, or a caller with an unknown outcome, stood still.
Old ones are deleted in small batches by whoever publishes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from hashlib import sha256
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from ...model import Landing
from . import payload as sql_payload
from .database import ERRORS, Database
from .tables import COUNTED, affected, insert_ignore

logger = logging.getLogger(__name__)

WINDOW: Final = 7 * 86400.0
#: A purge looks at twice as many marks as were made since the last one, so it keeps up and never takes long.
_PURGE_EVERY: Final = 256
_PURGE_BATCH: Final = 512


def mark_of(queue: str, inner_msg_id: str) -> bytes:
    """The mark of an inner-msg-id in one queue: injective before it is hashed, of fixed length after."""
    name = queue.encode()
    return sha256(b"%d:%s%s" % (len(name), name, inner_msg_id.encode("utf-8", "surrogatepass"))).digest()


class Edge:
    """Lands messages in kombu's tables. One a channel; the threads of a channel are kombu's to keep apart."""

    def __init__(self, database: Database, window: float = WINDOW) -> None:
        self._database = database
        self._window = window
        self._since_purge = 0
        names = database.tables
        name = names.queue.c.name == sa.bindparam("queue_name")
        payload = sa.bindparam("new_payload", type_=sa.Text())
        row = sa.select(sa.true(), sa.literal(1), payload, names.queue.c.id).where(name)
        land = sa.insert(names.message).from_select(["visible", "version", "payload", "queue_id"], row)
        self._land = land.execution_options(**COUNTED)
        self._mark = insert_ignore(names.landed, database.dialect).values(
            mark=sa.bindparam("new_mark"), landed_at=database.now
        )
        self._queue = insert_ignore(names.queue, database.dialect).values(name=sa.bindparam("queue_name"))

    def land(self, message: dict[str, Any], queues: Iterable[str], inner_msg_id: str | None) -> Landing:
        """Land one publish. Without an id nothing is refused.

        Raises what the driver raises; the message may then have landed or not, and a resend of the same id settles it.
        """
        # Sorted, so that two publishes to the same queues wait for each other instead of deadlocking.
        copies = [(queue, sql_payload.encode(message)) for queue in sorted(queues)]

        def work(connection: sa.Connection) -> int:
            landed = 0
            for queue, payload in copies:
                if inner_msg_id is not None:
                    mark = mark_of(queue, inner_msg_id)
                    if not affected(connection.execute(self._mark, {"new_mark": mark})):
                        continue
                self._land_one(connection, queue, payload)
                landed += 1
            return landed

        landed = self._database.run(work, durable=True)
        if inner_msg_id is not None:
            self._purge_now_and_then()
        return Landing.LANDED if landed else Landing.DUPLICATE

    def declare(self, queue: str) -> None:
        """Make the queue's row, if it has none."""
        self._database.run(lambda connection: connection.execute(self._queue, {"queue_name": queue}))

    def _land_one(self, connection: sa.Connection, queue: str, payload: str) -> None:
        # The queue's id is looked up in the same statement, so a row can never point to a queue that is gone.
        values = {"queue_name": queue, "new_payload": payload}
        if not affected(connection.execute(self._land, values)):
            connection.execute(self._queue, {"queue_name": queue})
            if not affected(connection.execute(self._land, values)):
                raise OperationalError("landing", {}, LookupError("the queue's row is gone again: publish once more"))

    def _purge_now_and_then(self) -> None:
        self._since_purge += 1
        if self._since_purge < _PURGE_EVERY:
            return
        self._since_purge = 0
        try:
            self.purge()
        except ERRORS:
            # The publish has landed; a mark that stays longer harms nobody.
            logger.warning("old marks of the edge could not be purged; the next pass tries again", exc_info=True)

    def purge(self) -> int:
        """Delete up to one batch of marks that are older than the window; how many went."""
        landed = self._database.tables.landed
        oldest = sa.select(landed.c.id).order_by(landed.c.id).limit(_PURGE_BATCH)
        expired = landed.c.landed_at < self._database.now - self._window

        def work(connection: sa.Connection) -> int:
            ids = list(connection.scalars(oldest.with_for_update(skip_locked=True)))
            if not ids:
                return 0
            return connection.execute(sa.delete(landed).where(landed.c.id.in_(ids), expired)).rowcount

        return self._database.run(work)
