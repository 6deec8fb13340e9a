"""What the processes of this example share: where the databases and the broker are, and the two tables.

Set these to use servers; without them everything lies in SQLite files in the current folder:

    CHARGES_DATABASE=postgresql+psycopg://...   CARDS_DATABASE=postgresql+psycopg://...   BROKER=amqp://...
"""

from __future__ import annotations

import os

import sqlalchemy as sa
from kombu import Exchange, Queue

CHARGES_DATABASE = os.environ.get("CHARGES_DATABASE", "sqlite:///charges.db")
CARDS_DATABASE = os.environ.get("CARDS_DATABASE", "sqlite:///cards.db")
BROKER = os.environ.get("BROKER", "idempotent-sqla+sqlite:///broker.db")
#: A prefix for everything that this example leaves in servers, so that several can run there.
NAME = os.environ.get("MEMBERSHIP_NAME", "membership")

paid = Exchange(f"{NAME}.payments", type="direct")
cards_queue = Queue(f"{NAME}.cards", exchange=paid, routing_key="paid")

# Without unique constraints on purpose: a customer who is charged twice must show.
tables = sa.MetaData()
charges = sa.Table(f"{NAME}_charge", tables, sa.Column("payment_id", sa.String(64)), sa.Column("cents", sa.Integer))
cards = sa.Table(f"{NAME}_card", tables, sa.Column("payment_id", sa.String(64)))


def open_database(url: str, table: sa.Table) -> sa.Engine:
    """An engine whose table is there."""
    engine = sa.create_engine(url)
    for attempt in range(5):
        try:
            tables.create_all(engine, tables=[table])
            break
        except sa.exc.DBAPIError:  # two processes at once
            if attempt == 4:
                raise
    return engine
