"""The states of a row in the outbox, and how its writers and its relays find each other on PostgreSQL."""

from __future__ import annotations

import enum
from hashlib import blake2b

import sqlalchemy as sa

__all__ = ["RowState", "channel", "lock_number"]


class RowState(enum.IntEnum):
    """The state of a row in the outbox. The numbers are stored. A row that was sent has none: it is deleted."""

    FREE = 0
    """To be sent, in no order with others."""
    ORDERED = 1
    """To be sent after all earlier rows of its order key."""
    DEAD = 2
    """Given up, kept for a person; the later rows of its order key wait behind it."""


def channel(tables: sa.MetaData) -> str:
    """The channel of LISTEN and NOTIFY for these tables. A digest, since a schema and a prefix could be too long."""
    return f"idempotent_bus_{_digest(tables).hex()}"


def lock_number(tables: sa.MetaData) -> int:
    """The number of the advisory lock that an idle relay holds, so that writers wake it and no other."""
    return int.from_bytes(_digest(tables), "big", signed=True)


def _digest(tables: sa.MetaData) -> bytes:
    return blake2b(f"{tables.schema} {tables.info['prefix']}outbox".encode(), digest_size=8).digest()
