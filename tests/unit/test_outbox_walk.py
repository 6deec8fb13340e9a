"""The walk through ordered rows, on made-up rows: what it takes, in which order, and how little it reads for it."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from idempotent_bus.relaying.walk import OrderedRow, Walk
from idempotent_bus.relaying.words import RowState

NOW = 1000


def row(number: int, key: int, state: int = RowState.ORDERED, due_at: int = 0, lease_ends: int = 0) -> OrderedRow:
    return OrderedRow(number, key.to_bytes(16, "big"), state, due_at, lease_ends, 10)


class Table:
    """Rows by key and number; counts what is read."""

    def __init__(self, *rows: OrderedRow) -> None:
        self.rows = sorted(rows, key=lambda row: (row.order_key, row.id))
        self.read_rows = 0

    def read(self, cursor: bytes, count: int) -> Sequence[OrderedRow]:
        found = [row for row in self.rows if row.order_key > cursor][:count]
        self.read_rows += len(found)
        return found

    def take(self, walk: Walk, limit: int = 10) -> tuple[list[list[int]], bool]:
        runs, passed_all = walk.next(self.read, limit, NOW)
        return [[row.id for row in run] for run in runs], passed_all


def test_only_the_head_of_a_key_and_what_follows_it_at_once() -> None:
    """A row is taken only with all earlier ones of its key: a dead, delayed or claimed one ends the run."""
    table = Table(
        row(1, 1), row(2, 1), row(3, 1, due_at=NOW + 1), row(4, 1),
        row(5, 2, RowState.DEAD), row(6, 2),
        row(7, 3, lease_ends=NOW + 1), row(8, 3),
        row(9, 4, due_at=NOW + 1), row(10, 4),
        row(11, 5), row(12, 5, lease_ends=NOW + 1), row(13, 5),
    )  # fmt: skip
    assert table.take(Walk()) == ([[1, 2], [11]], False)


def test_a_key_with_a_million_rows_behind_a_dead_one_costs_one_step() -> None:
    """The piece after a blocked key begins behind it, however many rows wait there."""
    table = Table(row(1, 1, RowState.DEAD), *(row(number, 1) for number in range(2, 100_000)), row(100_000, 2))
    assert table.take(Walk())[0] == [[100_000]]
    assert table.read_rows < 200


def test_it_goes_round_and_says_when_it_has_seen_all() -> None:
    """Keys behind the cursor are found on the next round, also when they came while it was elsewhere."""
    table = Table(*(row(number, number) for number in range(10, 20)))
    walk = Walk()
    assert table.take(walk, 4) == ([[10], [11], [12], [13]], False)
    table.rows = Table(row(1, 1), row(30, 30)).rows
    assert table.take(walk, 4) == ([[30], [1]], False)
    table.rows = []
    assert table.take(walk, 4) == ([], True)
    table.rows = [row(2, 1)]
    assert table.take(walk, 4) == ([[2]], False)


@given(st.lists(st.tuples(st.integers(1, 400), st.booleans()), max_size=500), st.integers(1, 20))
def test_nothing_is_ever_passed_over(made: list[tuple[int, bool]], limit: int) -> None:
    """I1: whatever the keys, every head that may be taken is taken before the walk says that it has seen all."""
    keys: dict[int, bool] = dict(made)
    table = Table(*(row(key, key, RowState.ORDERED if free else RowState.DEAD) for key, free in keys.items()))
    walk = Walk()
    taken: list[int] = []
    for _ in range(2000):
        runs, passed_all = table.take(walk, limit)
        ids = [number for run in runs for number in run]
        taken += ids
        table.rows = [row for row in table.rows if row.id not in set(ids)]
        if passed_all:
            break
    else:
        raise AssertionError("it never came round")
    assert sorted(taken) == sorted(key for key, free in keys.items() if free)
