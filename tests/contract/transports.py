"""The table of all transports with an edge that the contract is run over. A new one adds one line to `TRANSPORTS`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import sqlalchemy as sa
from kombu import Connection

import servers
from idempotent_bus import transports
from idempotent_bus.testing.transport_contract import TransportSubject

transports.register()

#: Opens a place for one run of the tests, given a directory; cleans up what it made.
Place = Callable[[Path], AbstractContextManager[TransportSubject]]


@contextmanager
def sqlite(directory: Path) -> Iterator[TransportSubject]:
    url = f"idempotent-sqla+sqlite:///{directory}/{uuid.uuid4().hex}.db?synchronous=NORMAL"
    yield TransportSubject(lambda: Connection(url))


def sql(server: Callable[[], str]) -> Place:
    @contextmanager
    def place(directory: Path) -> Iterator[TransportSubject]:
        url, mark = server(), f"t{uuid.uuid4().hex[:12]}"
        names = {"queue_tablename": f"{mark}_queue", "message_tablename": f"{mark}_message"}
        try:
            yield TransportSubject(lambda: Connection(f"idempotent-sqla+{url}", transport_options=names))
        finally:
            engine = sa.create_engine(url)
            tables = sa.MetaData()
            tables.reflect(engine, only=lambda name, _: mark in name)
            tables.drop_all(engine)
            engine.dispose()

    return place


@contextmanager
def redis(directory: Path) -> Iterator[TransportSubject]:
    import redis as driver

    plain, prefix = servers.real_redis(), f"t{uuid.uuid4().hex[:12]}:"
    url = plain.replace("redis://", "idempotent-redis://", 1)
    yield TransportSubject(lambda: Connection(url, transport_options={"global_keyprefix": prefix}))
    with driver.Redis.from_url(plain) as client:
        for name in client.scan_iter(match=prefix + "*", count=1000):
            client.delete(name)


TRANSPORTS: dict[str, Place] = {
    "sqlite": sqlite,
    "postgresql": sql(servers.postgresql),
    "mariadb": sql(servers.mariadb),
    "redis": redis,
}
