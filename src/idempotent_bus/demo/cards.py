"""The card system's own database: one table, on purpose without a unique constraint, so that a double shows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import sqlalchemy as sa

_metadata = sa.MetaData()
cards = sa.Table(
    "demo_cards",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("run", sa.String(64), nullable=False, index=True),
    sa.Column("payment_id", sa.Text, nullable=False),
)


def open_cards(url: str) -> sa.Engine:
    """An engine for the cards; SQLite with a write-ahead log, so that readers and the writer do not meet."""
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":

        @sa.event.listens_for(engine, "connect")
        def _pragmas(connection: Any, _: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA busy_timeout=20000")

    return engine


def create(engine: sa.Engine) -> None:
    """Create the table unless it is there."""
    _metadata.create_all(engine)


def issue(connection: sa.Connection, run: str, payment_id: str) -> None:
    """The effect: one more card for this payment."""
    connection.execute(sa.insert(cards).values(run=run, payment_id=payment_id))


def count(engine: sa.Engine, run: str) -> Counter[str]:
    """How many cards each payment has."""
    with engine.connect() as connection:
        query = sa.select(cards.c.payment_id, sa.func.count()).where(cards.c.run == run).group_by(cards.c.payment_id)
        return Counter(dict(connection.execute(query).tuples().all()))


def issued(engine: sa.Engine, run: str) -> int:
    """How many payments have a card: for the progress bar."""
    with engine.connect() as connection:
        query = sa.select(sa.func.count(cards.c.payment_id.distinct())).where(cards.c.run == run)
        return int(connection.execute(query).scalar_one())


def forget(engine: sa.Engine, run: str) -> None:
    """Remove this run's cards."""
    with engine.begin() as connection:
        connection.execute(sa.delete(cards).where(cards.c.run == run))
