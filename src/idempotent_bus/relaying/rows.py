"""The outbox's table as the relays see it: every statement of `outbox.sql` a method, on a connection that is given.

Every method runs in the transaction that the caller has opened, and may be repeated after an unknown outcome.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Dialect

from .. import schema
from ..dialects import NOW_US, Digest, load_texts, quoted
from .walk import OrderedRow
from .words import RowState, channel, lock_number

__all__ = ["Backlog", "DeadRow", "OutboxRow", "Rows", "load"]

_ERROR_LENGTH: Final = 1000


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """A claimed row. headers, options: JSON as `Outbox.add` wrote it."""

    id: int
    inner_msg_id: str
    order_key: bytes | None
    attempts: int
    exchange: str
    routing_key: str
    content_type: str
    content_encoding: str
    headers: str
    options: str
    body: bytes


@dataclass(frozen=True, slots=True)
class DeadRow:
    """A row that was given up. made_at: seconds since the epoch, by the database's clock."""

    id: int
    inner_msg_id: str
    exchange: str
    routing_key: str
    attempts: int
    made_at: float
    last_error: str


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is in the outbox. pending: to be sent, of which `delayed` are not due yet and `failing` have failed before.

    dead: given up. oldest: age in seconds of the oldest row that is to be sent, 0 if there is none.
    """

    pending: int
    delayed: int
    failing: int
    dead: int
    oldest: float


def load(tables: sa.MetaData, dialect: Dialect) -> dict[str, str]:
    """The statements for one kind of database, by name."""
    kind = "mysql" if dialect.name == "mariadb" else dialect.name
    table = schema.outbox(tables)
    skip = "FOR UPDATE SKIP LOCKED" if _skips_locked(dialect) else "FOR UPDATE"
    forced = kind == "mysql"  # its statistics lag behind a table that fills and empties all the time
    fill = {
        "outbox": quoted(dialect, table),
        "now": NOW_US[kind],
        "if_new": f"{{if_new_{kind}}}",
        "notify": f"{{notify_{kind}}}",
        "channel": channel(tables),
        "lock": str(lock_number(tables)),
        "lock_rows": "" if kind == "sqlite" else skip,
        "due_index": f"FORCE INDEX ({table.name}_due)" if forced else "",
        "order_index": f"FORCE INDEX ({table.name}_order)" if forced else "",
    }
    return load_texts(__package__, "outbox.sql", fill)


def _skips_locked(dialect: Dialect) -> bool:
    """Known after the first connection. Where it is missing, two relays that claim at once wait for each other."""
    if dialect.name == "postgresql":
        return True
    version = tuple(getattr(dialect, "server_version_info", None) or ())
    return version >= ((10, 6) if getattr(dialect, "is_mariadb", False) else (8, 0, 1))


class Rows:
    """The statements, ready to run. Holds no connection; safe for threads."""

    def __init__(self, tables: sa.MetaData, dialect: Dialect) -> None:
        texts = load(tables, dialect)
        if dialect.name == "postgresql":
            texts["clock"] = texts["clock_postgresql"]
        self._texts = {
            name: _bound(text)
            for name, text in texts.items()
            if not name.startswith(("add", "if_new", "notify")) and "{" not in text
        }

    def now(self, connection: sa.Connection) -> int:
        """The database's clock in microseconds; the first statement of a claim's transaction."""
        return int(connection.execute(self._texts["clock"]).first()[0])  # type: ignore[index]

    def due(self, connection: sa.Connection, *, now: int, floor: int, limit: int) -> list[tuple[int, int, int]]:
        """Rows in no order that may be claimed: number, size and due time; locked, where the database can."""
        found = connection.execute(self._texts["due"], {"now": now, "floor": floor, "limit": limit})
        return [(row[0], row[1], row[2]) for row in found]

    def heads(self, connection: sa.Connection, cursor: bytes, limit: int) -> list[OrderedRow]:
        """Ordered rows from the first key after the cursor on, by key and id."""
        found = connection.execute(self._texts["heads"], {"cursor": cursor, "limit": limit})
        return [OrderedRow(row[0], _bytes(row[1]), *row[2:]) for row in found]

    def lock_heads(self, connection: sa.Connection, ids: Sequence[int], now: int) -> set[int]:
        """Those of the rows that may still be claimed, locked."""
        found = connection.execute(self._texts["lock_heads"], {"ids": list(ids)})
        return {row[0] for row in found if row[1] == RowState.ORDERED and row[2] <= now and row[3] <= now}

    def take(
        self, connection: sa.Connection, ids: Sequence[int], *, owner: bytes, now: int, lease: int
    ) -> list[OutboxRow]:
        """Claim these rows for `lease` microseconds; those that were claimed, by id."""
        asked = {"ids": list(ids), "owner": owner, "now": now, "lease": lease}
        connection.execute(self._texts["take"], asked)
        found = connection.execute(self._texts["taken"], {"ids": list(ids), "owner": owner})
        return [_outbox_row(row) for row in found]

    def sent(self, connection: sa.Connection, ids: Iterable[int]) -> None:
        """These were confirmed: they go."""
        connection.execute(self._texts["sent"], {"ids": sorted(ids)})

    def sent_before(self, connection: sa.Connection, sent: Mapping[int, str]) -> None:
        """These, by number with their inner-msg-ids, were confirmed before the connection was lost: they go."""
        asked = [{"id": row, "message": _bytes(message)} for row, message in sorted(sent.items())]
        connection.execute(self._texts["sent_before"], asked)

    def release(self, connection: sa.Connection, ids: Iterable[int], owner: bytes) -> None:
        """These were not sent: give them back."""
        connection.execute(self._texts["release"], {"ids": sorted(ids), "owner": owner})

    def postpone(self, connection: sa.Connection, row: int, *, owner: bytes, later: int, error: str) -> None:
        """Perhaps sent: try again in `later` microseconds, without counting it."""
        asked = {"id": row, "owner": owner, "later": later, "error": _shown(error)}
        connection.execute(self._texts["postpone"], asked)

    def fail(self, connection: sa.Connection, row: int, *, owner: bytes, later: int, most: int, error: str) -> None:
        """The broker refused it: count, and try again in `later` microseconds, or give up after `most` attempts."""
        asked = {"id": row, "owner": owner, "later": later, "most": most, "error": _shown(error)}
        connection.execute(self._texts["fail"], asked)

    def count(self, connection: sa.Connection, ids: Iterable[int], most: int) -> None:
        """An attempt for each of these that were postponed: the broker took others since."""
        connection.execute(self._texts["count"], {"ids": sorted(ids), "most": most})

    def dead(self, connection: sa.Connection, *, after: int = 0, limit: int = 100) -> list[DeadRow]:
        """Rows that were given up, by id."""
        found = connection.execute(self._texts["dead"], {"after": after, "limit": limit})
        return [
            DeadRow(row[0], _uuid(row[1]), row[2], row[3], row[4], row[5] / 1_000_000, row[6] or "") for row in found
        ]

    def redrive(self, connection: sa.Connection, ids: Iterable[int]) -> int:
        """To be sent again, with fresh attempts; how many of these were dead."""
        return connection.execute(self._texts["redrive"], {"ids": sorted(ids)}).rowcount

    def discard(self, connection: sa.Connection, ids: Iterable[int]) -> int:
        """Delete these, if they are dead; how many were."""
        return connection.execute(self._texts["discard"], {"ids": sorted(ids)}).rowcount

    def backlog(self, connection: sa.Connection) -> Backlog:
        """Count the table. It reads all of it."""
        now = self.now(connection)
        pending = delayed = failing = dead = 0
        oldest = now
        for state, count, made_at, waiting, failed in connection.execute(self._texts["backlog"], {"now": now}):
            if state == RowState.DEAD:
                dead = count
                continue
            pending += count
            delayed += int(waiting)
            failing += int(failed)
            oldest = min(oldest, made_at)
        return Backlog(pending, delayed, failing, dead, max(0, now - oldest) / 1_000_000)


def _bound(text: str) -> sa.TextClause:
    made = sa.text(text)
    typed: list[sa.BindParameter[Any]] = []
    if ":ids" in text:
        typed.append(sa.bindparam("ids", expanding=True, type_=sa.BigInteger))
    typed += [sa.bindparam(name, type_=Digest(16)) for name in ("owner", "cursor", "message") if f":{name}" in text]
    return made.bindparams(*typed)


def _bytes(value: Any) -> bytes:
    """A digest as bytes: drivers give bytes, a memoryview, a UUID or its text."""
    if isinstance(value, str):
        return bytes.fromhex(value.replace("-", ""))
    return value.bytes if hasattr(value, "bytes") else bytes(value)


def _uuid(value: Any) -> str:
    digits = _bytes(value).hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _outbox_row(row: Sequence[Any]) -> OutboxRow:
    identity, inner_msg_id, order_key, attempts, exchange, routing_key, content, encoding, headers, options, body = row
    key = None if order_key is None else _bytes(order_key)
    return OutboxRow(
        identity,
        _uuid(inner_msg_id),
        key,
        attempts,
        exchange,
        routing_key,
        content,
        encoding,
        headers,
        options,
        bytes(body),
    )


def _shown(error: str) -> str:
    """What every database takes as text, whatever its encoding is."""
    return error[:_ERROR_LENGTH].replace("\0", "").encode("ascii", "backslashreplace").decode()
