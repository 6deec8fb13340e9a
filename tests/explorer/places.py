"""Where the records of a run are: each store and each inbox, and how time passes for it.

A run never waits. The workers' clock is a manual one; when it is advanced, the records of that run are made older by as
much in a store that has a clock of its own. That is what the passing of time does to a lease.
"""

from __future__ import annotations

import contextlib
import struct
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

import servers
from idempotent_bus import Inbox, open_store
from idempotent_bus.stores.memory import MemoryStore
from idempotent_bus.testing import ManualClock
from idempotent_bus.testing.faults import error_of

#: A folder in memory where there is one: the question is what is written when, not how a disk does it.
FOLDER = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


class Place:
    """A dedup store for many runs, each with keys of its own. clock: the workers', for one run at a time."""

    name = ""
    transactional = False

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store: Any = None
        self._streams: list[Any] = []

    def begin(self) -> None:
        """A new run. The workers of the last one are dead, and with them their connections."""
        self.clock = ManualClock()
        while self._streams:
            self._streams.pop().close()

    def keep_streams(self) -> None:
        """Know which streams the store has given."""
        stream = self.store.stream

        def kept() -> Any:
            self._streams.append(stream())
            return self._streams[-1]

        self.store.stream = kept

    def advance(self, seconds: float, keys: Sequence[bytes]) -> None:
        """Let time pass, for the workers and for these records."""
        self.clock.advance(seconds)

    def error(self, step: str) -> Exception:
        return error_of(step)

    def close(self) -> None:
        if self.store is not None:
            self.store.close()


class Memory(Place):
    name = "memory"

    def begin(self) -> None:
        super().begin()
        self.store = MemoryStore(self.clock)


class SQL(Place):
    """SQLite or PostgreSQL. lease_ends is moved, which is all of a record that a run's time touches."""

    def __init__(self, name: str, url: str, **options: Any) -> None:
        super().__init__()
        self.name = name
        self.prefix = f"x{uuid.uuid4().hex[:10]}_"
        self.store = open_store(url, table_prefix=self.prefix, **options)
        self.store.lookup(bytes(16))  # makes the tables
        self._engine: sa.Engine = self.store._engine
        self.keep_streams()
        self._uuid = self._engine.dialect.name == "postgresql"

    def advance(self, seconds: float, keys: Sequence[bytes]) -> None:
        super().advance(seconds, keys)
        named: list[Any] = [str(uuid.UUID(bytes=key)) if self._uuid else key for key in keys]
        mark = "%s" if self._uuid else "?"
        marks = ", ".join([f"CAST({mark} AS uuid)" if self._uuid else mark] * len(named))
        table = f"{self.prefix}records"
        with self._engine.connect() as connection:
            connection.exec_driver_sql(
                f"UPDATE {table} SET lease_ends = lease_ends - {mark} WHERE record_key IN ({marks}) "
                "AND state IN (1, 2)",
                (round(seconds * 1_000_000), *named),
            )

    def close(self) -> None:
        if self._uuid:
            with self._engine.connect() as connection:
                connection.exec_driver_sql(f"DROP TABLE IF EXISTS {self.prefix}records")
                connection.exec_driver_sql(f"DROP SEQUENCE IF EXISTS {self.prefix}tokens")
        super().close()


class Redis(Place):
    name = "redis"
    _LEASE = struct.Struct(">Q")

    def __init__(self, url: str) -> None:
        super().__init__()
        self.prefix = f"x{uuid.uuid4().hex[:10]}:"
        self.store = open_store(url, prefix=self.prefix)
        self.keep_streams()

    def advance(self, seconds: float, keys: Sequence[bytes]) -> None:
        super().advance(seconds, keys)
        client = self.store._client
        names = [self.store._places.record(key) for key in keys]
        for name, record in zip(names, client.mget(names), strict=True):
            if record is not None and record[0] % 8 in (1, 2):  # reserved, in progress
                ends = self._LEASE.unpack(record[41:49])[0] - round(seconds * 1_000_000)
                client.set(name, record[:41] + self._LEASE.pack(ends) + record[49:], keepttl=True)

    def close(self) -> None:
        client = self.store._client
        names = list(client.scan_iter(match=self.prefix + "*", count=1000))
        for start in range(0, len(names), 500):
            client.delete(*names[start : start + 500])
        super().close()


class InDatabase(Place):
    """The inbox: record and effect in one database, the effect in a table without a unique constraint."""

    transactional = True

    def __init__(self, name: str, url: str, **connect_args: Any) -> None:
        super().__init__()
        self.name = name
        self.prefix = f"x{uuid.uuid4().hex[:10]}_"
        self.engine = sa.create_engine(url, connect_args=connect_args)
        if self.engine.dialect.name == "sqlite":

            @sa.event.listens_for(self.engine, "connect")
            def quick(connection: Any, entry: object) -> None:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=OFF")

        self.inbox = Inbox(self.engine, table_prefix=self.prefix)
        self.inbox.create()
        self.effects = f"{self.prefix}effects"
        with self.engine.begin() as connection:
            connection.exec_driver_sql(f"CREATE TABLE {self.effects} (scope VARCHAR(40), biz_id VARCHAR(40))")
            connection.exec_driver_sql(f"CREATE INDEX {self.effects}_scope ON {self.effects} (scope)")
        self._insert = sa.text(f"INSERT INTO {self.effects} VALUES (:scope, :biz_id)")
        self._count = sa.text(f"SELECT biz_id, COUNT(*) FROM {self.effects} WHERE scope = :scope GROUP BY biz_id")
        self._done = sa.text(f"SELECT completed FROM {self.prefix}inbox WHERE record_key = :key").bindparams(
            sa.bindparam("key", type_=self.inbox._tables.tables[f"{self.prefix}inbox"].c.record_key.type)
        )

    def apply(self, connection: sa.Connection, scope: str, biz_id: str) -> None:
        connection.execute(self._insert, {"scope": scope, "biz_id": biz_id})

    def applied(self, scope: str) -> dict[str, int]:
        with self.engine.connect() as connection:
            return dict(map(tuple, connection.execute(self._count, {"scope": scope})))

    def is_completed(self, key: bytes) -> bool:
        with self.engine.connect() as connection:
            return bool(connection.execute(self._done, {"key": key}).scalar())

    def error(self, step: str) -> Exception:
        if step in ("claim", "commit", "release"):
            cause = ConnectionError("injected: the connection is gone")
            return sa.exc.OperationalError("injected", {}, cause, connection_invalidated=True)
        return error_of(step)

    def close(self) -> None:
        with self.engine.begin() as connection:
            for table in ("inbox", "effects"):
                connection.exec_driver_sql(f"DROP TABLE IF EXISTS {self.prefix}{table}")
        self.engine.dispose()


@contextlib.contextmanager
def opened(name: str) -> Iterator[Place]:
    """A place by its name, cleaned up in the end: memory, sqlite, redis, postgresql, and `<database> inbox`."""
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        if name == "memory":
            place: Place = Memory()
        elif name == "sqlite":
            place = SQL(name, f"sqlite:///{folder}/store.db?synchronous=NORMAL")
        elif name == "redis":
            place = Redis(servers.redis())
        elif name == "postgresql":
            place = SQL(name, servers.postgresql(), connect_args={"options": "-c synchronous_commit=off"})
        elif name == "sqlite inbox":
            # No waiting for locks: of two workers in one thread each, the one that waits keeps the other from going on.
            place = InDatabase(name, f"sqlite:///{folder}/inbox.db", timeout=0)
        elif name == "postgresql inbox":
            place = InDatabase(name, servers.postgresql(), options="-c synchronous_commit=off")
        else:
            raise ValueError(name)
        try:
            yield place
        finally:
            place.close()
