"""Ways in which a dedup store fails: stopped, stalled, read-only, full. Each has a store of its own, and a way back."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

import servers
from idempotent_bus import open_store
from proxy import Proxy, through

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from private_redis import PrivateRedis
from stores import drop_tables


@dataclass
class Trouble:
    """A store, and what is done to it.

    total: while it lasts no call that changes a record can succeed; otherwise some do, and are as good as ever.
    """

    store: Any
    begin: Callable[[], None]
    end: Callable[[], None]
    total: bool = True


Maker = Callable[[Path], AbstractContextManager[Trouble]]


# --- Redis: a server of its own ---------------------------------------------------------------------------


def redis(begin: Callable[[PrivateRedis], Any], end: Callable[[PrivateRedis], Any], *, total: bool = True) -> Maker:
    @contextmanager
    def make(folder: Path) -> Iterator[Trouble]:
        server = PrivateRedis(folder, "--appendonly", "yes", "--appendfsync", "always", "--enable-debug-command", "yes")
        # Asked three times, each time for so long: less than the outage, or nobody would notice it.
        store = open_store(server.url, socket_timeout=0.25)
        try:
            yield Trouble(store, lambda: begin(server), lambda: end(server), total)
        finally:
            store.close()
            with contextlib.suppress(ProcessLookupError):
                server.stop()

    return make


def sleep_inside(server: PrivateRedis) -> None:
    threading.Thread(target=server.client.execute_command, args=("DEBUG", "SLEEP", "3.5"), daemon=True).start()
    time.sleep(0.1)


def nothing(server: Any) -> None:
    """It ends by itself."""


# --- PostgreSQL: the shared server, in a database of its own, or by way of a proxy -------------------------


def _admin(statement: str, url: str = "") -> None:
    engine = sa.create_engine(url or servers.postgresql(), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()


def _end_backends(database: str) -> None:
    _admin(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'")


@contextmanager
def _database() -> Iterator[tuple[str, str]]:
    """A name and URL of a database that is only there for one test."""
    name = f"t{uuid.uuid4().hex[:12]}"
    url = sa.make_url(servers.postgresql()).set(database=name).render_as_string(hide_password=False)
    _admin(f"CREATE DATABASE {name}")
    try:
        yield name, url
    finally:
        _admin(f"DROP DATABASE {name} WITH (FORCE)")


def proxied(begin: Callable[[Proxy], None], end: Callable[[Proxy], None]) -> Maker:
    @contextmanager
    def make(folder: Path) -> Iterator[Trouble]:
        url, prefix = servers.postgresql(), f"t{uuid.uuid4().hex[:12]}_"
        with Proxy(url=url) as proxy:
            store = open_store(through(proxy, url), table_prefix=prefix, timeout=1.0)
            try:
                yield Trouble(store, lambda: begin(proxy), lambda: end(proxy))
            finally:
                store.close()
        drop_tables(url, prefix)

    return make


def cut(proxy: Proxy) -> None:
    proxy.refuse()
    proxy.cut()


@contextmanager
def postgresql_terminated(folder: Path) -> Iterator[Trouble]:
    over = threading.Event()
    with _database() as (name, url):
        store: Any = open_store(url, timeout=1.0)

        def hunt() -> None:
            while not over.wait(0.02):
                _end_backends(name)

        hunter = threading.Thread(target=hunt, daemon=True)

        def end() -> None:
            over.set()
            hunter.join()

        try:
            yield Trouble(store, hunter.start, end, total=False)
        finally:
            over.set()
            store.close()


@contextmanager
def postgresql_read_only(folder: Path) -> Iterator[Trouble]:
    with _database() as (name, url):
        store: Any = open_store(url, timeout=1.0)

        def begin() -> None:
            _admin(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
            _end_backends(name)

        def end() -> None:
            _admin(f"ALTER DATABASE {name} RESET default_transaction_read_only")
            _end_backends(name)

        try:
            yield Trouble(store, begin, end)
        finally:
            store.close()


def locked(url: Callable[[], str], lock: str, unlock: str) -> Maker:
    """Another connection holds the whole table."""

    @contextmanager
    def make(folder: Path) -> Iterator[Trouble]:
        there, prefix = url(), f"t{uuid.uuid4().hex[:12]}_"
        store: Any = open_store(there, table_prefix=prefix, timeout=1.0)
        engine = sa.create_engine(there, isolation_level="AUTOCOMMIT")
        other = engine.connect()

        def begin() -> None:
            names = [name for name in sa.inspect(engine).get_table_names() if name.startswith(prefix)]
            for statement in lock.format(*names).split(";"):
                other.exec_driver_sql(statement)

        try:
            yield Trouble(store, begin, lambda: other.exec_driver_sql(unlock) and None)
        finally:
            other.close()
            engine.dispose()
            store.close()
            drop_tables(there, prefix)

    return make


# --- SQLite -------------------------------------------------------------------------------------------------


@contextmanager
def sqlite_locked(folder: Path) -> Iterator[Trouble]:
    file = folder / "dedup.db"
    store: Any = open_store(f"sqlite:///{file}?timeout=1")
    other: list[sqlite3.Connection] = []

    def begin() -> None:
        other.append(sqlite3.connect(file, timeout=10, isolation_level=None, check_same_thread=False))
        other[0].execute("BEGIN IMMEDIATE")

    try:
        yield Trouble(store, begin, lambda: other[0].execute("ROLLBACK") and None)
    finally:
        for connection in other:
            connection.close()
        store.close()


@contextmanager
def sqlite_read_only(folder: Path) -> Iterator[Trouble]:
    with _with_pragma(folder, lambda bad: f"query_only = {'ON' if bad else 'OFF'}") as (store, bad, _):
        yield Trouble(store, bad.set, bad.clear)


@contextmanager
def sqlite_full(folder: Path) -> Iterator[Trouble]:
    pages = 2**30

    def limit(bad: bool) -> str:
        return f"max_page_count = {pages if bad else 2**30}"

    with _with_pragma(folder, limit) as (store, bad, file):

        def begin() -> None:
            nonlocal pages
            with contextlib.closing(sqlite3.connect(file, timeout=10)) as other:
                pages = other.execute("PRAGMA page_count").fetchone()[0]
            bad.set()

        # What still fits into the pages that are there is stored as ever.
        yield Trouble(store, begin, bad.clear, total=False)


@contextmanager
def _with_pragma(folder: Path, pragma: Callable[[bool], str]) -> Iterator[tuple[Any, threading.Event, Path]]:
    """A store on whose connections a pragma is set anew each time one is used: such settings are a connection's own."""
    file, bad = folder / "dedup.db", threading.Event()
    store: Any = open_store(f"sqlite:///{file}?timeout=1")

    def prepare(connection: sqlite3.Connection, *_: Any) -> None:
        connection.execute(f"PRAGMA {pragma(bad.is_set())}").close()

    sa.event.listen(store._engine, "checkout", prepare)
    try:
        yield store, bad, file
    finally:
        store.close()


TROUBLES: dict[str, Maker] = {
    "redis-killed": redis(lambda server: server.kill(), lambda server: server.start()),
    "redis-stopped": redis(lambda server: server.pause(), lambda server: server.resume()),
    "redis-client-pause": redis(lambda server: server.client.client_pause(3500), nothing),
    "redis-debug-sleep": redis(sleep_inside, nothing),
    "redis-no-replicas": redis(
        lambda server: server.client.config_set("min-replicas-to-write", 1),
        lambda server: server.client.config_set("min-replicas-to-write", 0),
    ),
    "redis-replica": redis(
        lambda server: server.client.replicaof("127.0.0.1", 1), lambda server: server.client.replicaof("NO", "ONE")
    ),
    "redis-full": redis(
        lambda server: server.client.config_set("maxmemory", 1),
        lambda server: server.client.config_set("maxmemory", 0),
        total=False,  # a completion needs no memory, and is taken
    ),
    "postgresql-cut": proxied(cut, lambda proxy: proxy.accept_again()),
    "postgresql-stalled": proxied(lambda proxy: proxy.stall(), lambda proxy: proxy.resume()),
    "postgresql-terminated": postgresql_terminated,
    "postgresql-locked": locked(servers.postgresql, "BEGIN;LOCK TABLE {0} IN ACCESS EXCLUSIVE MODE", "ROLLBACK"),
    "postgresql-read-only": postgresql_read_only,
    "mariadb-locked": locked(servers.mariadb, "LOCK TABLES {0} READ", "UNLOCK TABLES"),
    "sqlite-locked": sqlite_locked,
    "sqlite-read-only": sqlite_read_only,
    "sqlite-full": sqlite_full,
}
