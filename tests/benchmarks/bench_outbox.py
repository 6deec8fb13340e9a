"""The outbox: what `add` costs a business transaction, and how fast a relay moves rows to RabbitMQ.

    python tests/benchmarks/bench_outbox.py [--rounds 5] [--adds 1000] [--moves 10000] [--large 1000000]

Baselines in the same run: the business INSERT alone (one transaction each, through SQLAlchemy), and `publish_many` of
the same messages. Base and candidate take turns every hundred transactions. Everything is done with ten thousand rows
in the outbox and with a million. The last table is what decided that sent rows are deleted at once: the alternative
marks them and purges them in batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import sqlalchemy as sa
from kombu import Connection, Queue

import servers
from idempotent_bus import IdempotentProducer, Outbox, Relay, schema
from idempotent_bus.msgid import new_inner_msg_id

BODY = {"payment_id": "p-" + "1" * 30, "amount": "9.90", "note": "x" * 120}
CHUNK = 100
FAR = 10**15 * 4


class Place:
    """An outbox and a table of payments, in one database."""

    def __init__(self, name: str, folder: str) -> None:
        self.prefix = f"t{uuid.uuid4().hex[:12]}_"
        url = f"sqlite:///{folder}/{self.prefix}bench.db" if name == "sqlite" else getattr(servers, name)()
        self.engine = sa.create_engine(url)
        if name == "sqlite":
            sa.event.listen(self.engine, "connect", lambda driver, record: driver.execute("PRAGMA journal_mode=WAL"))
        self.payments = sa.Table(
            f"{self.prefix}payments",
            sa.MetaData(),
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("payment_id", sa.String(40)),
            sa.Column("amount", sa.String(20)),
        )
        self.payments.create(self.engine)
        self.outbox = Outbox(self.engine, table_prefix=self.prefix)
        self.table = schema.outbox(schema.metadata(self.prefix, parts=("outbox",)))

    def fill(self, count: int, routing_key: str, *, due: bool) -> None:
        """Rows as `add` makes them, but quickly. due: they may be sent now; otherwise not in our lifetime."""
        names = (
            "inner_msg_id, made_at, due_at, lease_ends, attempts, state, exchange, routing_key, content_type, "
            "content_encoding, headers, options, body"
        )
        rest = ("utf-8", "{}", "{}", json.dumps(BODY).encode())
        rows: Iterator[tuple[Any, ...]] = (
            (new_inner_msg_id(), n, n if due else FAR + n, 0, 0, 0, "", routing_key, "application/json", *rest)
            for n in range(1, count + 1)
        )
        driver: Any = self.engine.raw_connection()
        cursor = driver.cursor()
        if self.engine.dialect.name == "postgresql":
            with cursor.copy(f"COPY {self.table.name} ({names}) FROM STDIN") as copy:
                for row in rows:
                    copy.write_row(row)
        else:
            marks = ", ".join("?" * 13)
            made = ((uuid.UUID(row[0]).bytes, *row[1:]) for row in rows)
            cursor.executemany(f"INSERT INTO {self.table.name} ({names}) VALUES ({marks})", made)
        driver.commit()
        driver.close()
        if self.engine.dialect.name == "postgresql":
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(sa.text(f"VACUUM ANALYZE {self.table.name}"))

    def close(self) -> None:
        self.table.drop(self.engine)
        self.payments.drop(self.engine)
        self.engine.dispose()


@contextmanager
def place(name: str, count: int, routing_key: str, *, due: bool) -> Iterator[Place]:
    """A place with so many rows in its outbox."""
    with tempfile.TemporaryDirectory() as folder:
        made = Place(name, folder)
        try:
            made.fill(count, routing_key, due=due)
            yield made
        finally:
            made.close()


def adding(made: Place, rounds: int, adds: int) -> dict[str, list[float]]:
    """Transactions a second: the INSERT alone, and with `outbox.add` in it."""
    insert = sa.insert(made.payments)

    def alone() -> None:
        with made.engine.begin() as connection:
            connection.execute(insert, {"payment_id": BODY["payment_id"], "amount": "9.90"})

    def added() -> None:
        with made.engine.begin() as connection:
            connection.execute(insert, {"payment_id": BODY["payment_id"], "amount": "9.90"})
            made.outbox.add(connection, BODY, routing_key="bench")

    rates: dict[str, list[float]] = {"INSERT alone": [], "with outbox.add": []}
    runs: list[tuple[str, Callable[[], None]]] = [("INSERT alone", alone), ("with outbox.add", added)]
    for _, run in runs:
        for _ in range(CHUNK):
            run()
    for _ in range(rounds):
        spent = dict.fromkeys(rates, 0.0)
        for piece in range(adds // CHUNK):
            for name, run in runs if piece % 2 else reversed(runs):
                began = time.perf_counter()
                for _ in range(CHUNK):
                    run()
                spent[name] += time.perf_counter() - began
        for name, seconds in spent.items():
            rates[name].append(adds // CHUNK * CHUNK / seconds)
    return rates


def moving(name: str, count: int, rounds: int, moves: int) -> dict[str, list[float]]:
    """Messages a second: `publish_many`, and the relay out of an outbox of `count` rows."""
    rates: dict[str, list[float]] = {"publish_many": [], "relay": []}
    queue = Queue(f"bench.{uuid.uuid4().hex[:12]}", durable=True)
    with (
        Connection(servers.rabbitmq()) as looking,
        IdempotentProducer(servers.rabbitmq()) as producer,
        place(name, max(count, 0) + moves * rounds, queue.name, due=True) as made,
        Relay(made.engine, servers.rabbitmq(), table_prefix=made.prefix) as relay,
    ):
        bound = queue(looking.default_channel)
        bound.declare()
        producer.publish_many([BODY] * 500, routing_key=queue.name)
        relay.run_once()
        for _ in range(rounds):
            bound.purge()
            began = time.perf_counter()
            producer.publish_many([BODY] * moves, routing_key=queue.name)
            rates["publish_many"].append(moves / (time.perf_counter() - began))
            bound.purge()
            began, sent = time.perf_counter(), 0
            while sent < moves - 500:
                sent += relay.run_once().sent
            rates["relay"].append(sent / (time.perf_counter() - began))
        bound.delete()
    return rates


def forgetting(rounds: int) -> dict[str, list[float]]:
    """Rows a second on PostgreSQL: deleted in batches of 500, or marked in such batches and purged 5,000 at a time."""
    rates: dict[str, list[float]] = {"deleted at once": [], "marked, purged later": []}
    total = 20_000
    for _ in range(rounds):
        for name, values in rates.items():
            with place("postgresql", total, "bench", due=True) as made, made.engine.connect() as connection:
                table = made.table.name
                first = connection.execute(sa.text(f"SELECT min(id) FROM {table}")).scalar_one()
                began = time.perf_counter()
                for start in range(first, first + total, 500):
                    these = f"id BETWEEN {start} AND {start + 499}"
                    change = "DELETE FROM {}" if name == "deleted at once" else "UPDATE {} SET state = 3"
                    connection.execute(sa.text(f"{change.format(table)} WHERE {these}"))
                    connection.commit()
                if name != "deleted at once":
                    for start in range(first, first + total, 5000):
                        purge = f"DELETE FROM {table} WHERE state = 3 AND id BETWEEN {start} AND {start + 4999}"
                        connection.execute(sa.text(purge))
                        connection.commit()
                values.append(total / (time.perf_counter() - began))
    return rates


def show(title: str, rates: dict[str, list[float]]) -> None:
    """Medians with the least and the most, and the ratio to the first of them in the same round."""
    base = next(iter(rates.values()))
    for name, values in rates.items():
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        cells = [
            title,
            name,
            f"{statistics.median(values):,.0f}",
            f"{min(values):,.0f} to {max(values):,.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure everything and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--adds", type=int, default=1000, help="transactions a round")
    parser.add_argument("--moves", type=int, default=10_000, help="messages a round")
    parser.add_argument("--large", type=int, default=1_000_000)
    options = parser.parse_args()
    print("| what | how | median/s | least to most | ratio | least to most |\n|---|---|---|---|---|---|")
    for count in (10_000, options.large):
        for name in ("postgresql", "sqlite"):
            with place(name, count, "bench", due=False) as made:
                show(f"add, {name}, {count:,} rows", adding(made, options.rounds, options.adds))
    for count in (0, options.large):
        for name in ("postgresql", "sqlite"):
            title = f"relay, {name}, {count + options.moves * options.rounds:,} rows"
            show(title, moving(name, count, options.rounds, options.moves))
    show("20,000 rows, postgresql", forgetting(options.rounds))


if __name__ == "__main__":
    main()
