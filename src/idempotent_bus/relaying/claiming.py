"""Which rows a relay takes: a bounded batch of what is due, claimed by a lease in one short transaction.

Several relays share the work: a claimed row is another's for the length of its lease, and comes back if its relay dies.
Nothing here goes by a highest number that was seen: a row that was committed late, with a small number and a time that
is long over, is found like any other.

A database that deletes lazily (PostgreSQL most of all) must step over what was sent before it comes to what is left.
While there is plenty to do, a claim therefore begins where the last one ended, and from the very beginning only now
and then: at least once a second, or less often where that takes long, and always before the relay sleeps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from .rows import OutboxRow, Rows
from .walk import OrderedRow, Walk

__all__ = ["Batch", "Claimer"]

#: A row in no order: its number, size and due time.
_Free = tuple[int, int, int]
#: Seconds between two looks from the very beginning, or so many times what the last one took.
_FULL_LOOK: Final = 1.0
_FULL_LOOK_SHARE: Final = 20
#: A batch ends before its bodies are larger than this, in bytes. One row may be.
_MOST_BYTES: Final = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Batch:
    """What one claim brought. sequences: each list must be sent in its order, one after the other's confirm; the lists
    among themselves in any. exhausted: nothing else is due, as far as can be seen.
    """

    owner: bytes
    sequences: list[list[OutboxRow]]
    exhausted: bool

    def __len__(self) -> int:
        return sum(map(len, self.sequences))


class Claimer:
    """Claims for one relay. For one thread."""

    def __init__(self, rows: Rows, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rows = rows
        self._clock = clock
        self._walk = Walk()
        self._floor = 0
        self._next_full_look = 0.0

    def claim(self, connection: sa.Connection, limit: int, lease: float) -> Batch:
        """Claim up to `limit` rows for `lease` seconds, in the transaction that is open."""
        rows = self._rows
        owner = os.urandom(16)
        now = rows.now(connection)
        # Half for either kind, so that neither starves the other.
        runs, passed_all = self._walk.next(
            lambda cursor, count: rows.heads(connection, cursor, count), max(1, limit // 2), now
        )
        if runs:
            won = rows.lock_heads(connection, [run[0].id for run in runs], now)
            runs = [run for run in runs if run[0].id in won]
        room = limit - sum(map(len, runs))
        free = self._due(connection, now, room) if room > 0 else []
        complete = passed_all and len(free) < room
        free, runs = _bounded(free, runs)
        ids = [row[0] for row in free] + [row.id for run in runs for row in run]
        if not ids:
            return Batch(owner, [], complete)
        taken = {
            row.id: row for row in rows.take(connection, ids, owner=owner, now=now, lease=round(lease * 1_000_000))
        }
        sequences = [[taken.pop(identity)] for identity, _, _ in free if identity in taken]
        for run in runs:
            sequence = []
            for row in run:
                if row.id not in taken:
                    break  # what comes after it must wait for it
                sequence.append(taken.pop(row.id))
            if sequence:
                sequences.append(sequence)
        if taken:
            rows.release(connection, taken, owner)
        return Batch(owner, sequences, complete)

    def _due(self, connection: sa.Connection, now: int, limit: int) -> list[_Free]:
        began = self._clock()
        if self._floor and began < self._next_full_look:
            found = self._rows.due(connection, now=now, floor=self._floor, limit=limit)
            if len(found) == limit:
                self._floor = found[-1][2]
                return found
        found = self._rows.due(connection, now=now, floor=0, limit=limit)
        ended = self._clock()
        self._next_full_look = ended + max(_FULL_LOOK, (ended - began) * _FULL_LOOK_SHARE)
        self._floor = found[-1][2] if len(found) == limit else 0
        return found


def _bounded(free: list[_Free], runs: list[list[OrderedRow]]) -> tuple[list[_Free], list[list[OrderedRow]]]:
    """As many of them as fit into a batch by their bytes, and one at least."""
    left = _MOST_BYTES
    kept_runs: list[list[OrderedRow]] = []
    for run in runs:
        kept: list[OrderedRow] = []
        for row in run:
            left -= row.size
            if left < 0 and (kept or kept_runs):
                break
            kept.append(row)
        if kept:
            kept_runs.append(kept)
        if left < 0:
            return [], kept_runs
    kept_free: list[_Free] = []
    for one in free:
        left -= one[1]
        if left < 0 and (kept_free or kept_runs):
            break
        kept_free.append(one)
    return kept_free, kept_runs
