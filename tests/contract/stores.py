"""The table of all stores that the contract is run over. A new store adds one line to `STORES`."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import servers
from idempotent_bus.stores import open_store
from idempotent_bus.stores.memory import MemoryStore
from idempotent_bus.testing.store_contract import Subject

#: Opens a place for one run of the tests, given a directory; cleans up what it made.
Place = Callable[[Path], AbstractContextManager[Subject]]


class ManualClock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def outlast(self, seconds: float) -> None:
        self.now += seconds + 0.001


@contextmanager
def memory(directory: Path) -> Iterator[Subject]:
    clock = ManualClock()
    store = MemoryStore(clock)
    yield Subject(lambda: store, clock.outlast)


@contextmanager
def redis(directory: Path) -> Iterator[Subject]:
    import redis as driver

    url = servers.redis()
    options = {"prefix": f"t{uuid.uuid4().hex[:12]}:"}
    yield Subject(
        lambda: open_store(url, **options),
        url=url,
        options=options,
        open_down=lambda: open_store("redis://127.0.0.1:1/0"),
    )
    with driver.Redis.from_url(url) as client:
        names = list(client.scan_iter(match=options["prefix"] + "*", count=1000))
        for start in range(0, len(names), 500):
            client.delete(*names[start : start + 500])


@contextmanager
def sqlite(directory: Path) -> Iterator[Subject]:
    url = f"sqlite:///{directory / f'{uuid.uuid4().hex}.db'}"
    options = {"table_prefix": f"t{uuid.uuid4().hex[:12]}_"}
    yield Subject(
        lambda: open_store(url, **options),
        url=url,
        options=options,
        open_down=lambda: open_store(f"sqlite:///{directory / 'no such directory' / 'x.db'}"),
    )


def sql(url: Callable[[], str], down: str) -> Place:
    @contextmanager
    def place(directory: Path) -> Iterator[Subject]:
        there = url()
        options = {"table_prefix": f"t{uuid.uuid4().hex[:12]}_"}
        try:
            yield Subject(
                lambda: open_store(there, **options), url=there, options=options, open_down=lambda: open_store(down)
            )
        finally:
            drop_tables(there, options["table_prefix"])

    return place


def drop_tables(url: str, prefix: str) -> None:
    """Drop every table (and with it its indexes) and every sequence whose name begins with `prefix`."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    with contextlib.closing(engine.connect()) as connection:
        for name in sqlalchemy.inspect(engine).get_table_names():
            if name.startswith(prefix):
                connection.exec_driver_sql(f"DROP TABLE {name}")
        if engine.dialect.supports_sequences:
            for name in sqlalchemy.inspect(engine).get_sequence_names():
                if name.startswith(prefix):
                    connection.exec_driver_sql(f"DROP SEQUENCE {name}")
    engine.dispose()


STORES: dict[str, Place] = {
    "memory": memory,
    "redis": redis,
    "sqlite": sqlite,
    "postgresql": sql(servers.postgresql, "postgresql+psycopg://postgres@127.0.0.1:1/test"),
    "mariadb": sql(servers.mariadb, "mysql+pymysql://root@127.0.0.1:1/test"),
}

#: What some stores are not held to: a store within one process, and records that vanish by themselves.
WITHOUT: dict[str, set[str]] = {"shared": {"memory"}, "purge": {"redis"}}

#: (store, test) -> why it is known to fail; strict, so that a line that is mended must be deleted here.
KNOWN_GAPS: dict[tuple[str, str], str] = {}
