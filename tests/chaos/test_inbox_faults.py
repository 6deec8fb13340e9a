"""The inbox under lost COMMIT replies, terminated backends, deadlocks and serialization failures."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from inbox_lost_commits import run
from test_inbox import Bench

import servers
from idempotent_bus import Ended

SERVERS = {"postgresql": servers.postgresql, "mariadb": servers.mariadb}
WRITERS = 16
EACH = 6


@pytest.mark.parametrize("server", SERVERS)
def test_sixty_eaten_commits(server: str) -> None:
    """I1, I2, I15. The control: without the record a retry doubles, and an ack loses. 500: `inbox_lost_commits.py`."""
    found = run(SERVERS[server](), 60)
    assert found["guarded"] == (0, 0)
    assert found["retry"] == (0, 40), "each COMMIT that was done is done again"
    assert found["ack"] == (20, 0), "each COMMIT that was not done is missing"


class Quiet:
    """A broker that costs nothing; nothing here is dead."""

    def ack(self) -> None: ...

    def wait(self, delay: float) -> None: ...

    def dead_letter(self, *_: Any) -> bool:
        raise AssertionError("nothing here is dead")


class Accounts:
    """Two rows that every handler adds to, and a card for each message."""

    def __init__(self, url: str, unique: str, level: str) -> None:
        # A deadlock is found in 50 ms, not in a second: there are many.
        quick = {"connect_args": {"options": "-c deadlock_timeout=50ms"}} if url.startswith("postgresql") else {}
        self.bench = Bench(url, unique, isolation_level=level, pool_size=WRITERS + 2, **quick)
        self.bench.inbox.create()
        with self.bench.engine.begin() as connection:
            connection.execute(sa.insert(self.bench.table), [{"card": "0"}, {"card": "0"}])
        self.runs = 0

    def add(self, connection: sa.Connection, name: str, order: tuple[int, int]) -> None:
        self.runs += 1
        table = self.bench.table
        for row in order:
            query = sa.select(table.c.card).where(table.c.id == row)
            if connection.dialect.name != "postgresql":
                query = query.with_for_update()
            value = int(connection.execute(query).scalar_one())
            connection.execute(sa.update(table).where(table.c.id == row).values(card=str(value + 1)))
        connection.execute(sa.insert(table).values(card=name))

    def names(self) -> Counter[str]:
        with self.bench.engine.connect() as connection:
            query = sa.select(self.bench.table.c.card).where(self.bench.table.c.id > 2)
            return Counter(connection.execute(query).scalars())

    def totals(self) -> list[int]:
        with self.bench.engine.connect() as connection:
            query = sa.select(self.bench.table.c.card).where(self.bench.table.c.id <= 2)
            return [int(card) for card in connection.execute(query).scalars()]


LEVELS = (
    ("postgresql", "REPEATABLE READ"),
    ("postgresql", "SERIALIZABLE"),
    ("mariadb", "READ COMMITTED"),
    ("mariadb", "REPEATABLE READ"),
    ("mariadb", "SERIALIZABLE"),
)


@pytest.fixture(params=LEVELS, ids=["-".join(level).replace(" ", "-").lower() for level in LEVELS])
def accounts(request: pytest.FixtureRequest, unique: str) -> Iterator[Accounts]:
    server, level = request.param
    made = Accounts(SERVERS[server](), unique, level)
    yield made
    made.bench.close()


def test_sixteen_writers_that_meet_all_the_time(accounts: Accounts) -> None:
    """I2, I12: 40001, deadlocks in opposite order, 16 writers, each message given to two: one effect, none stuck.

    Nothing is lost either: every handler read the sum and wrote one more, and the sums are right.
    """
    names = [f"m{number}" for number in range(WRITERS * EACH // 2)]
    left: list[str] = []

    def write(writer: int) -> None:
        mine = names[writer // 2 :: WRITERS // 2]
        made = accounts.bench.transactions(max_attempts=1000, busy_delay=0.01)
        made.step = lambda name, function, /, *args, **kwargs: function(*args, **kwargs)  # the log is for one thread
        order = (1, 2) if writer % 2 else (2, 1)
        deadline = time.monotonic() + 100
        for name in mine:
            redelivered = False
            while True:
                work = accounts.bench.work(
                    lambda connection, name=name: accounts.add(connection, name, order), name, redelivered=redelivered
                )
                work.settle = Quiet()
                how = made.handle(work).how
                if how in (Ended.COMPLETED, Ended.REPLAYED):
                    break
                redelivered = True
                if time.monotonic() > deadline:
                    left.append(name)
                    break
                time.sleep(random.random() * 0.05)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert left == []
    assert accounts.names() == Counter(names)
    assert accounts.totals() == [len(names)] * 2
    assert accounts.runs > len(names), "they never met: nothing was shown"


def test_backends_that_are_terminated_all_the_time(unique: str) -> None:
    """I1, I2: pg_terminate_backend at random moments, 200 messages singly and in windows: one effect each."""
    bench = Bench(servers.postgresql(), unique, connect_args={"application_name": unique})
    bench.inbox.create()
    killer = sa.create_engine(servers.postgresql(), isolation_level="AUTOCOMMIT")
    stop, killed = threading.Event(), [0]

    def kill() -> None:
        text = sa.text("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = :name")
        with killer.connect() as connection:
            while not stop.wait(random.random() * 0.06):
                killed[0] += connection.execute(text, {"name": unique}).scalar_one()

    thread = threading.Thread(target=kill)
    thread.start()
    made = bench.transactions(max_attempts=1000, busy_delay=0.01)
    names = [f"n{number}" for number in range(200)]

    def handler(name: str):  # type: ignore[no-untyped-def]
        def run(connection: sa.Connection) -> None:
            connection.execute(sa.insert(bench.table).values(card=name))
            time.sleep(0.002)

        return run

    try:
        left, first, deadline = names, True, time.monotonic() + 60
        while left and time.monotonic() < deadline:
            works = [bench.work(handler(name), name, redelivered=not first and index % 2 == 0)
                     for index, name in enumerate(left)]  # fmt: skip
            for work in works:
                work.settle = Quiet()
            endings = [ending for begin in range(0, len(works), 20)
                       for ending in made.handle_window(works[begin : begin + 20])]  # fmt: skip
            left = [name for name, ending in zip(left, endings, strict=True)
                    if ending.how not in (Ended.COMPLETED, Ended.REPLAYED)]  # fmt: skip
            first = False
    finally:
        stop.set()
        thread.join(10)
        killer.dispose()
    assert left == []
    with bench.engine.connect() as connection:
        assert Counter(connection.execute(sa.select(bench.table.c.card)).scalars()) == Counter(names)
    assert killed[0] > 10
    bench.close()
