"""From key to key through the ordered rows, so that a key with a million rows behind a dead one costs one step.

Only the first row of a key may be claimed, and those right behind it with it. To ask the database for "rows that have
none before them" would read every waiting row of a blocked key each time. Here the rows are read in the order of their
keys, a bounded piece at a time, and the next piece begins after the last key: whatever waits behind it is skipped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from .words import RowState

__all__ = ["OrderedRow", "Walk"]

_START: Final = bytes(16)
#: How many rows of one key are claimed together: each but the first waits for the confirm of the one before.
_RUN: Final = 50
#: How many pieces are read in one go before the relay does other things.
_PIECES: Final = 8


@dataclass(frozen=True, slots=True)
class OrderedRow:
    """What decides whether a row may be claimed. Times are microseconds; size: bytes of the body."""

    id: int
    order_key: bytes
    state: int
    due_at: int
    lease_ends: int
    size: int


class Walk:
    """Where a relay stands in its walk. For one thread."""

    def __init__(self) -> None:
        self._cursor = _START
        self._anchor = _START
        self._wrapped = False

    def next(
        self, read: Callable[[bytes, int], Sequence[OrderedRow]], limit: int, now: int
    ) -> tuple[list[list[OrderedRow]], bool]:
        """Up to about `limit` rows that may be claimed, as one list for each key, and whether all keys were passed.

        read(cursor, count): the first `count` rows by (key, id) whose key is larger than the cursor. True only when
        every key has been looked at since the last find, or since the last True.
        """
        found: list[list[OrderedRow]] = []
        count = 0
        piece = max(64, 2 * limit)
        for _ in range(_PIECES):
            rows = read(self._cursor, piece)
            for key, group in itertools.groupby(rows, key=lambda row: row.order_key):
                if self._wrapped and key > self._anchor:
                    self._begin_anew()  # round: from here on all were looked at before
                    return found, not found
                run = _run(list(group), min(_RUN, limit - count), now)
                if run:
                    found.append(run)
                    count += len(run)
                self._cursor = key
                if count >= limit:
                    self._begin_anew()
                    return found, False
            if len(rows) < piece:
                if self._anchor == _START or self._wrapped:
                    self._cursor = _START
                    self._begin_anew()
                    return found, not found
                self._wrapped = True
                self._cursor = _START
        if found:
            self._begin_anew()
        return found, False

    def _begin_anew(self) -> None:
        self._anchor = self._cursor
        self._wrapped = False


def _run(rows: Sequence[OrderedRow], most: int, now: int) -> list[OrderedRow]:
    """The first row of a key and those right behind it, as far as they may be sent now."""
    run = []
    for row in rows[:most]:
        if row.state != RowState.ORDERED or row.due_at > now or row.lease_ends > now:
            break
        run.append(row)
    return run
