"""What the tests of the outbox share: a table of databases, and a business table beside the outbox."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import servers
from idempotent_bus import Outbox, Relay, schema

DATABASES = ("sqlite", "postgresql", "mariadb")


class Place:
    """One outbox with a table of payments beside it, under names of its own."""

    def __init__(self, name: str, url: str, prefix: str) -> None:
        self.name = name
        self.url = url
        self.prefix = prefix
        self.engine = sa.create_engine(url)
        self.payments = sa.Table(
            f"{prefix}payments",
            sa.MetaData(),
            sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
            mysql_engine="InnoDB",
        )
        self.payments.create(self.engine)
        self.outbox = Outbox(self.engine, table_prefix=prefix)
        self.table = schema.outbox(schema.metadata(prefix, parts=("outbox",)))

    def relay(self, broker: Any, **options: Any) -> Relay:
        """A relay of this outbox. broker: a URL, a connection or a Broker of `consumer_rig`."""
        connection = broker.connect() if hasattr(broker, "connect") and hasattr(broker, "unique") else broker
        return Relay(self.engine, connection, table_prefix=self.prefix, **options)

    def pay(self, connection: sa.Connection, number: int, **options: Any) -> str:
        """The business: a payment, and the message that tells of it."""
        connection.execute(sa.insert(self.payments).values(id=number))
        return self.outbox.add(connection, {"payment_id": number}, **options)

    def rows(self) -> list[Any]:
        """What is in the outbox."""
        with self.engine.connect() as connection:
            return list(connection.execute(sa.select(self.table).order_by(self.table.c.id)))

    def change(self, **values: Any) -> None:
        """Change all rows by hand."""
        with self.engine.begin() as connection:
            connection.execute(sa.update(self.table).values(**values))

    def clean_up(self) -> None:
        self.engine.dispose()
        if self.name != "sqlite":
            engine = sa.create_engine(self.url)
            with engine.begin() as connection:
                for table in sa.inspect(connection).get_table_names():
                    if table.startswith(self.prefix):
                        connection.execute(sa.text(f"DROP TABLE {table}"))
                connection.execute(sa.text(f"DROP SEQUENCE IF EXISTS {self.prefix}tokens"))
            engine.dispose()


def url_of(name: str, tmp_path: Path) -> str:
    if name == "sqlite":
        return f"sqlite:///{tmp_path}/outbox.db"
    return servers.postgresql() if name == "postgresql" else servers.mariadb()


def place_of(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Place]:
    """A fixture's body: the place that the test names with `@within(*DATABASES)`."""
    made = Place(request.param, url_of(request.param, tmp_path), f"{unique}_")
    yield made
    made.clean_up()


def within(*names: str) -> pytest.MarkDecorator:
    """Run the test in these databases."""
    return pytest.mark.parametrize("place", names, indirect=True)
