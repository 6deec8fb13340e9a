"""Four ways that look right, each with the crash that shows what is wrong. The right way is in the services beside.

    python wrong_ways.py            # all four; or one by its name

Nothing is simulated but the moment of the crash: an exception that nobody catches, where a process may be killed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import sqlalchemy as sa


class Killed(BaseException):
    """The process ends here."""


class Shop:
    """One database with charges, cards and marks, and a list that stands for the broker's queue."""

    def __init__(self) -> None:
        self.engine = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
        tables = sa.MetaData()
        self.charges = sa.Table("charge", tables, sa.Column("payment_id", sa.Text))
        self.cards = sa.Table("card", tables, sa.Column("payment_id", sa.Text))
        tables.create_all(self.engine)
        self.queue: list[str] = []
        self.marks: set[str] = set()

    def count(self, table: sa.Table) -> int:
        with self.engine.connect() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0

    def insert(self, table: sa.Table) -> None:
        with self.engine.begin() as connection:
            connection.execute(sa.insert(table).values(payment_id="p-1"))


def publish_after_commit(shop: Shop) -> None:
    """Charge, commit, then publish: killed in between, the customer has paid and nobody ever issues the card."""
    shop.insert(shop.charges)
    raise Killed
    shop.queue.append("p-1")


def publish_before_commit(shop: Shop) -> None:
    """Publish, then commit: the commit fails, and a card is issued for a payment that never was."""
    with shop.engine.begin() as connection:
        connection.execute(sa.insert(shop.charges).values(payment_id="p-1"))
        shop.queue.append("p-1")
        raise Killed


def mark_then_effect(shop: Shop) -> None:
    """`SET NX`, then issue: killed in between, the message comes back, the mark says done, and it never is."""
    shop.insert(shop.charges)
    for crash in (True, False):  # the broker delivers again
        if "p-1" in shop.marks:
            continue
        shop.marks.add("p-1")
        if crash:
            continue
        shop.insert(shop.cards)


def effect_then_mark(shop: Shop) -> None:
    """Issue, then mark: killed in between, the message comes back without a mark, and a second card is issued."""
    shop.insert(shop.charges)
    for crash in (True, False):  # the broker delivers again
        if "p-1" in shop.marks:
            continue
        shop.insert(shop.cards)
        if crash:
            continue
        shop.marks.add("p-1")


WAYS: dict[str, Callable[[Shop], None]] = {
    way.__name__.replace("_", "-"): way
    for way in (publish_after_commit, publish_before_commit, mark_then_effect, effect_then_mark)
}


def play(way: Callable[[Shop], None]) -> tuple[int, int]:
    """Run one way into its crash, let the card service work off the queue; how many charges and cards there are."""
    shop = Shop()
    with contextlib.suppress(Killed):
        way(shop)
    for _ in shop.queue:
        shop.insert(shop.cards)
    return shop.count(shop.charges), shop.count(shop.cards)


if __name__ == "__main__":
    for name in sys.argv[1:] or WAYS:
        charged, issued = play(WAYS[name])
        print(f"{name:24} charges {charged}, cards {issued}: {(WAYS[name].__doc__ or '').partition(': ')[2]}")
