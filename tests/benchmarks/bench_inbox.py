"""What the inbox costs: a business INSERT with its record in the same transaction, beside that INSERT alone.

    python tests/benchmarks/bench_inbox.py [--messages 1000] [--rounds 5] [--url postgresql | sqlite | mariadb | URL]

Each round goes through all ways, 100 messages at a time and in rotated order, so that what else the machine does
meets all of them; the table shows the medians and the medians of the rounds' ratios to
that round's INSERT alone. Everything goes through SQLAlchemy Core, one thread, one connection of a pool:

alone      the business INSERT in a transaction of its own
together   100 of them in one commit, without any record: what the window could reach at the most
record     the same, with `inbox.record(connection, ...)` before it
guarded    the same INSERT as a handler: `Transactions.handle`, one message at a time (identity and body made before)
window     the same handlers, 100 messages in one commit
failing    the same, where one handler of each 100 raises

`--grown 1000000` compares a table of so many records with one of 10,000 instead, the two taking turns. SQLite is in WAL
mode with synchronous=FULL: every commit is durable, as on a server.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sqlalchemy as sa

import servers
from idempotent_bus import Inbox, schema
from idempotent_bus.identity import record_key
from idempotent_bus.inbox.running import Transactions
from idempotent_bus.model import Reason
from idempotent_bus.policy import Policy
from idempotent_bus.work import Ended, Work

CARD = "x" * 150
WINDOW = 100


class Settled:
    """Nobody: what the broker costs is measured elsewhere."""

    def ack(self) -> None: ...

    def wait(self, delay: float) -> None: ...

    def dead_letter(self, reason: Reason, error: str, attempts: int) -> bool:
        return True


class Bench:
    def __init__(self, url: str) -> None:
        self.unique = f"bench{uuid.uuid4().hex[:8]}_"
        self.engine = sa.create_engine(url)
        if self.engine.dialect.name == "sqlite":
            sa.event.listen(self.engine, "connect", durable)
        self.cards = sa.Table(
            f"{self.unique}cards",
            sa.MetaData(),
            sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
            sa.Column("card", sa.String(200)),
        )
        self.cards.create(self.engine)
        self.insert = sa.insert(self.cards)
        self.inbox = Inbox(self.engine, table_prefix=self.unique)
        self.inbox.create()
        self.made = Transactions(self.inbox, Policy())

    def close(self) -> None:
        self.cards.drop(self.engine)
        schema.inbox(self.inbox._tables).drop(self.engine)
        self.engine.dispose()

    def handler(self, connection: sa.Connection) -> None:
        connection.execute(self.insert, {"card": CARD})

    def fails(self, connection: sa.Connection) -> None:
        connection.execute(self.insert, {"card": CARD})
        raise ValueError

    def works(self, count: int, failing: int = 0) -> list[Work]:
        made = []
        for number in range(count):
            biz_id = uuid.uuid4().hex
            run = self.fails if failing and number % failing == failing // 2 else self.handler
            made.append(Work("cards", biz_id, record_key("cards", biz_id), run, Settled(), fingerprint=os.urandom(8)))
        return made

    # --- the ways ---------------------------------------------------------------------------------------

    def alone(self, count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            with self.engine.begin() as connection:
                connection.execute(self.insert, {"card": CARD})
        return time.perf_counter() - began

    def together(self, count: int) -> float:
        began = time.perf_counter()
        for _ in range(0, count, WINDOW):
            with self.engine.begin() as connection:
                for _ in range(WINDOW):
                    connection.execute(self.insert, {"card": CARD})
        return time.perf_counter() - began

    def record(self, count: int) -> float:
        ids = [uuid.uuid4().hex for _ in range(count)]
        began = time.perf_counter()
        for biz_id in ids:
            with self.engine.begin() as connection:
                assert self.inbox.record(connection, "cards", biz_id)
                connection.execute(self.insert, {"card": CARD})
        return time.perf_counter() - began

    def guarded(self, count: int) -> float:
        works = self.works(count)
        began = time.perf_counter()
        for work in works:
            assert self.made.handle(work).how is Ended.COMPLETED
        return time.perf_counter() - began

    def window(self, count: int, failing: int = 0) -> float:
        works = self.works(count, failing)
        began, done = time.perf_counter(), 0
        for begin in range(0, count, WINDOW):
            endings = self.made.handle_window(works[begin : begin + WINDOW])
            done += sum(ending.how is Ended.COMPLETED for ending in endings)
        took = time.perf_counter() - began
        assert done == count - (count // failing if failing else 0), "somebody was taken along"
        return took

    def failing(self, count: int) -> float:
        return self.window(count, WINDOW)

    def grow(self, rows: int) -> None:
        """Fill the table with finished records, as fast as it goes."""
        table = schema.inbox(self.inbox._tables)
        until = int((time.time() + 7 * 86400) * 1_000_000)
        values = {"redrive": 0, "attempts": 0, "completed": 1}
        for begin in range(0, rows, 10_000):
            batch = [
                {**values, "record_key": os.urandom(16), "kept_until": until + number, "fingerprint": os.urandom(8)}
                for number in range(begin, min(begin + 10_000, rows))
            ]
            with self.engine.begin() as connection:
                connection.execute(sa.insert(table), batch)
        if self.engine.dialect.name == "postgresql":
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql(f"VACUUM ANALYZE {table.name}")
                connection.exec_driver_sql("CHECKPOINT")


def durable(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


WAYS = ("alone", "together", "record", "guarded", "window", "failing")


def measure(bench: Bench, messages: int, rounds: int) -> dict[str, list[float]]:
    """Messages per second of each way, one number for each round."""
    import logging

    logging.disable(logging.WARNING)  # a traceback for each failing handler is not what is measured
    ways: dict[str, Callable[[int], float]] = {name: getattr(bench, name) for name in WAYS}
    for way in ways.values():
        way(WINDOW)
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds):
        took = dict.fromkeys(WAYS, 0.0)
        for part in range(messages // WINDOW):
            turn = (number + part) % len(WAYS)
            for name in (*WAYS[turn:], *WAYS[:turn]):
                took[name] += ways[name](WINDOW)
        for name in WAYS:
            rates[name].append(messages // WINDOW * WINDOW / took[name])
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    logging.disable(logging.NOTSET)
    return rates


def compare(few: Bench, many: Bench, rows: int, messages: int, rounds: int) -> None:
    """Two tables, one with 10,000 records and one with `rows`, taking turns a hundred messages at a time."""
    try:
        few.grow(10_000)
        many.grow(rows)
        names = ("record", "guarded", "window")
        for bench in (few, many):
            for name in names:
                getattr(bench, name)(WINDOW)
        ratios: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            took = {(name, bench): 0.0 for name in names for bench in (few, many)}
            for part in range(messages // WINDOW):
                turns = list(took)
                turn = (number + part) % len(turns)
                for name, bench in turns[turn:] + turns[:turn]:
                    took[name, bench] += getattr(bench, name)(WINDOW)
            for name in names:
                ratios[name].append(took[name, few] / took[name, many])
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for name, each in ratios.items():
            spread = " ".join(f"{ratio:.2f}" for ratio in each)
            print(f"{name:10}{rows:,} records run at {statistics.median(each):.2f} of 10,000   {spread}")
    finally:
        many.close()


def show(rates: dict[str, list[float]]) -> dict[str, float]:
    ratios = {}
    print(f"{'':10}{'messages/s':>12}{'ratio':>8}   (of each round)")
    for name, own in rates.items():
        each = [a / b for a, b in zip(own, rates["alone"], strict=True)]
        ratios[name] = statistics.median(each)
        spread = " ".join(f"{ratio:.2f}" for ratio in each)
        print(f"{name:10}{statistics.median(own):12.0f}{ratios[name]:8.2f}   {spread}")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--url", default="postgresql")
    parser.add_argument("--grown", type=int, default=0, help="compare a table of so many rows with a small one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        urls = {
            "postgresql": servers.POSTGRESQL,
            "mariadb": servers.MARIADB,
            "sqlite": f"sqlite:///{folder}/inbox.db",
        }
        url = urls.get(options.url, options.url)
        few = Bench(url)
        try:
            if options.grown:
                compare(few, Bench(url), options.grown, options.messages, options.rounds)
            else:
                show(measure(few, options.messages, options.rounds))
        finally:
            few.close()


if __name__ == "__main__":
    main()
