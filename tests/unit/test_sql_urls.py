"""How a SQL store is opened, and what of it is refused. Nothing is connected, except SQLite files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite

from idempotent_bus import schema
from idempotent_bus.dialects import Digest, is_contention
from idempotent_bus.errors import ConfigurationError, StoreUnavailable
from idempotent_bus.model import Claimed, ClaimRequest, Completed, Hold
from idempotent_bus.stores import open_store
from idempotent_bus.stores.sql import SQLStore, open_sql


def ask(key: bytes | None = None) -> ClaimRequest:
    return ClaimRequest(key or os.urandom(16), os.urandom(16), 60, 3600)


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("postgresql://u@h/d", "psycopg"),
        ("postgresql+psycopg://u@h/d", "psycopg"),
        ("mysql://u@h/d", "pymysql"),
        ("mariadb://u@h/d", "pymysql"),
        ("mariadb+pymysql://u@h/d", "pymysql"),
        ("sqlite:///x.db", "pysqlite"),
    ],
)
def test_a_url_without_a_driver_gets_the_one_that_the_extra_installs(url: str, driver: str) -> None:
    """`postgresql://` means psycopg 3, `mysql://` and `mariadb://` mean PyMySQL."""
    store = open_store(url)
    assert isinstance(store, SQLStore)
    assert store._engine.dialect.driver == driver


@pytest.mark.parametrize(
    "url",
    ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true", "sqlite:///x.db?synchronous=OFF"],
)
def test_a_file_that_would_forget_is_refused(url: str) -> None:
    """SQLite in memory, or without any sync, cannot keep a store's promise."""
    with pytest.raises(ConfigurationError):
        open_sql(url)


@pytest.mark.parametrize("name", ["", "1a", "a b", 'a"b', "a.b", "a%b", "a:b", "x" * 41, "é"])
def test_a_prefix_that_is_no_plain_name_is_refused(name: str) -> None:
    """What goes into SQL text unquoted by parameters is a plain name."""
    with pytest.raises(ConfigurationError):
        open_sql("sqlite:///x.db", table_prefix=name)
    with pytest.raises(ConfigurationError):
        open_sql("sqlite:///x.db", schema=name)


def test_sqlite_is_durable_by_default_and_the_url_may_trade_it(tmp_path: Path) -> None:
    """WAL always; synchronous FULL (2) unless the URL says NORMAL (1)."""
    for query, level in (("", 2), ("?synchronous=normal", 1), ("?synchronous=EXTRA&timeout=1", 3)):
        store = open_sql(f"sqlite:///{tmp_path}/{level}.db{query}")
        assert isinstance(store.claim(ask()), Claimed)
        with store._engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == level
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == (1000 if level == 3 else 5000)
        store.close()


def test_a_completion_changes_no_indexed_column(tmp_path: Path) -> None:
    """What the purge's index holds is written once, so that a completion need not touch the index."""
    store = open_sql(f"sqlite:///{tmp_path}/x.db")
    request = ask()
    claimed = store.claim(request)
    table = schema.records(store._tables)
    with store._engine.connect() as connection:
        columns = sa.select(table.c.purge_after, table.c.kept_until)
        before = connection.execute(columns).one()
        assert isinstance(claimed, Claimed)
        assert store.complete(Hold(request.key, claimed.token, request.nonce), result=None, retention=7200)
        after = connection.execute(columns).one()
    assert after.purge_after == before.purge_after <= after.kept_until != before.kept_until
    assert [column.name for index in table.indexes for column in index.columns] == ["purge_after"]


def test_a_shorter_retention_is_purged_in_time(tmp_path: Path) -> None:
    """The index never holds a later time than the record's own."""
    store = open_sql(f"sqlite:///{tmp_path}/x.db")
    request = ask()
    claimed = store.claim(request)
    assert isinstance(claimed, Claimed)
    assert store.complete(Hold(request.key, claimed.token, request.nonce), result=None, retention=0)
    assert store.purge() == 1


def test_closed_and_used_again(tmp_path: Path) -> None:
    """`close` lets go of connections; the records and the store remain."""
    store = open_sql(f"sqlite:///{tmp_path}/x.db")
    request = ask()
    claimed = store.claim(request)
    store.close()
    store.close()
    assert store.claim(request) == claimed


def test_the_ddl_can_be_run_by_hand(tmp_path: Path) -> None:
    """What `ddl` prints is all that a store with create=False needs; without it the error names the tables."""
    url = f"sqlite:///{tmp_path}/x.db"
    store = open_sql(url, table_prefix="mine_", create=False)
    with pytest.raises(StoreUnavailable, match="tables"):
        store.claim(ask())
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for statement in schema.ddl(engine.dialect, table_prefix="mine_"):
            connection.exec_driver_sql(statement)
    request = ask()
    claimed = store.claim(request)
    assert isinstance(claimed, Claimed)
    hold = Hold(request.key, claimed.token, request.nonce)
    assert store.complete(hold, result=b"r", retention=60)
    assert store.claim(ask(request.key)) == Completed(b"r")


@pytest.mark.parametrize("dialect", [postgresql.dialect(), mysql.dialect(), sqlite.dialect()])
def test_keys_are_binary_and_of_fixed_length_everywhere(dialect: sa.Dialect) -> None:
    """I10: no collation, padding or type affinity can fold two keys."""
    kind = Digest(16).dialect_impl(dialect).compile(dialect=dialect).upper()
    assert kind in ("UUID", "BINARY(16)", "BLOB")
    text = " ".join(schema.ddl(dialect, parts=("store", "inbox"))).upper()
    assert "VARCHAR" not in text
    assert "TEXT" not in text


def test_errors_show_no_parameters(tmp_path: Path) -> None:
    """Neither a result nor a password gets into the text of an error or of its causes."""
    store = open_sql("postgresql://user:sesame@127.0.0.1:1/x")
    with pytest.raises(StoreUnavailable) as caught:
        store.complete(Hold(b"k" * 16, 1, b"n" * 16), result=b"private", retention=1)
    shown = repr(caught.value) + repr(caught.value.__cause__)
    assert caught.value.__cause__ is not None
    assert "sesame" not in shown
    assert "private" not in shown


def test_only_contention_is_tried_again() -> None:
    """Deadlocks and serialization failures, by the code of each driver; nothing else."""

    class WithState(Exception):
        sqlstate = "40P01"

    assert is_contention(WithState())
    assert is_contention(Exception(1213, "Deadlock found"))
    assert not is_contention(Exception(1205, "Lock wait timeout"))
    assert not is_contention(Exception())
