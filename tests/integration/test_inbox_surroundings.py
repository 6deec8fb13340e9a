"""What surrounds the inbox's transaction: listeners of the user's, the server's defaults, the pool."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import sessionmaker
from test_inbox import DATABASES, Bench, database_url
from test_inbox_window import WindowBench, hows

import servers
from idempotent_bus import Ended, Inbox, Outbox, Relay, schema
from idempotent_bus.errors import ConfigurationError
from idempotent_bus.model import Reason
from idempotent_bus.stores.sql import SQLStore

LISTENERS = ("before_commit", "after_commit")
#: Of SQLAlchemy's own kind too: it must not be taken for a database in doubt, which would be asked for ever.
ERRORS = (ValueError("no"), sa.exc.InvalidRequestError("no"))


class Listened(WindowBench):
    """With Sessions, and a listener of the user's that can raise."""

    error: Exception | None = None

    def listen(self, name: str) -> None:
        sessions = sessionmaker(self.engine)
        self.inbox = Inbox(sessions, table_prefix=f"{self.unique}_")

        def listener(session: Any) -> None:
            if self.error is not None:
                raise self.error

        sa.event.listen(sessions, name, listener)


@pytest.fixture(params=DATABASES)
def bench(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Listened]:
    made = Listened(database_url(request.param, tmp_path), unique)
    yield made
    made.close()


@pytest.mark.parametrize("error", ERRORS, ids=["plain", "sqlalchemy"])
def test_what_a_listener_raises_before_the_commit_counts_as_the_handlers(bench: Listened, error: Exception) -> None:
    """I3, I12: nothing is committed, the attempt is counted, and the message dies in the end: it is not stuck."""
    bench.listen("before_commit")
    made, bench.error = bench.transactions(max_attempts=2), error
    first, second = bench.one("a"), bench.one("a")
    assert [made.handle(first).how, made.handle(second).how] == [Ended.FAILED, Ended.DEAD]
    assert second.settle.answers[0][:2] == ("dead", Reason.ATTEMPTS)  # type: ignore[attr-defined]
    assert bench.all_cards() == []
    bench.error = None
    assert made.handle(bench.one("a", redrive=1)).how is Ended.COMPLETED


@pytest.mark.parametrize("error", ERRORS, ids=["plain", "sqlalchemy"])
def test_what_a_listener_raises_after_the_commit_undoes_nothing(bench: Listened, error: Exception) -> None:
    """I2, I4: effect and record are there, so the message is acked; a copy gets the result."""
    bench.listen("after_commit")
    made, bench.error = bench.transactions(), error
    assert made.handle(bench.one("a")).how is Ended.COMPLETED
    assert made.handle(bench.one("a")).how is Ended.REPLAYED
    assert bench.all_cards() == ["a"]


@pytest.mark.parametrize("name", LISTENERS)
def test_a_listener_that_raises_in_a_window_takes_no_consumer_along(bench: Listened, name: str) -> None:
    """I2, I3: the window is rolled back or found committed, and each of its messages gets its own answer."""
    bench.listen(name)
    made, bench.error = bench.transactions(), ERRORS[0]
    ends = {Ended.FAILED} if name == "before_commit" else {Ended.COMPLETED, Ended.REPLAYED}
    assert set(hows(made.handle_window(bench.works(3)))) <= ends
    bench.error = None
    made.handle_window(bench.works(3))
    assert bench.all_cards() == ["w0", "w1", "w2"]


def test_on_mariadb_the_record_is_in_a_table_with_transactions(unique: str) -> None:
    """I1, I3: whatever the server's default is: else the record of a handler that raised would stay, and its message be
    acked without an effect."""
    bench = Bench(servers.mariadb(), unique, connect_args={"init_command": "SET SESSION default_storage_engine=MyISAM"})
    try:
        with bench.engine.begin() as connection:
            connection.execute(sa.text(f"ALTER TABLE {unique}_cards ENGINE=InnoDB"))

        def fail(connection: sa.Connection) -> None:
            raise ValueError

        made = bench.transactions()
        assert made.handle(bench.work(fail)).how is Ended.FAILED
        assert made.handle(bench.work()).how is Ended.COMPLETED
        assert bench.cards() == 1
    finally:
        bench.close()


WITHOUT = ("MyISAM", "Aria")


@pytest.fixture
def untransactional(request: pytest.FixtureRequest, unique: str) -> Iterator[sa.Engine]:
    """A MariaDB in which all tables of the library are there, in an engine without transactions."""
    engine = sa.create_engine(servers.mariadb())
    tables = schema.metadata(f"{unique}_")
    schema.create(engine, tables)
    with engine.begin() as connection:
        for table in (schema.inbox(tables), schema.outbox(tables), schema.records(tables)):
            connection.execute(sa.text(f"ALTER TABLE {table.name} ENGINE={request.param}"))
    yield engine
    for table in (schema.inbox(tables), schema.outbox(tables), schema.records(tables)):
        table.drop(engine)
    for sequence in sa.inspect(engine).get_sequence_names():
        if sequence.startswith(unique):
            with engine.begin() as connection:
                connection.execute(sa.text(f"DROP SEQUENCE {sequence}"))
    engine.dispose()


@pytest.mark.parametrize("untransactional", WITHOUT, indirect=True)
@pytest.mark.parametrize("create", [True, False])
def test_a_table_without_transactions_is_refused(untransactional: sa.Engine, unique: str, create: bool) -> None:
    """I1, I3: a record whose effect was rolled back would stay: said at the first use, whoever made the table."""
    engine, prefix = untransactional, f"{unique}_"
    refused = pytest.raises(ConfigurationError, match=r"has no transactions.*ENGINE=InnoDB")
    inbox = Inbox(engine, table_prefix=prefix, create=create)
    with refused, inbox.transaction():
        pytest.fail("it was opened")
    with engine.begin() as connection, refused:
        Inbox(None, table_prefix=prefix).record(connection, "cards", "a")
    with engine.begin() as connection, refused:
        Outbox(engine if create else None, table_prefix=prefix).add(connection, {}, routing_key="q")
    with refused, Relay(engine, "memory://", table_prefix=prefix, create=create) as relay:
        relay.run_once()
    with refused:
        SQLStore(engine, table_prefix=prefix, create=create).purge()
    with engine.connect() as connection:
        for part in ("inbox", "outbox", "records"):
            assert connection.execute(sa.text(f"SELECT count(*) FROM {prefix}{part}")).scalar() == 0


def test_without_the_refusal_the_record_would_outlive_its_effect(unique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: on such a table a handler that raises leaves its record, and its message would be acked undone."""
    bench = Bench(servers.mariadb(), unique)
    try:
        bench.inbox.create()
        with bench.engine.begin() as connection:
            connection.execute(sa.text(f"ALTER TABLE {unique}_inbox ENGINE=MyISAM"))
        monkeypatch.setattr(schema, "refuse_engines", lambda rows: None)

        def fail(connection: sa.Connection) -> None:
            raise ValueError

        made = bench.transactions()
        made.handle(bench.work(fail))
        assert made.handle(bench.work()).how is Ended.REPLAYED
        assert bench.cards() == 0
    finally:
        bench.close()


def test_a_busy_begin_leaves_the_users_busy_timeout_in_the_pool(unique: str, tmp_path: Path) -> None:
    """On SQLite the inbox waits for less; a BEGIN IMMEDIATE of the engine's own that fails must not keep it so."""
    bench = Bench(f"sqlite:///{tmp_path}/cards.db?timeout=30", unique)
    bench.transactions().handle(bench.work())

    @sa.event.listens_for(bench.engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    other = sqlite3.connect(tmp_path / "cards.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert bench.transactions().handle(bench.work(biz_id="b")).how is Ended.BUSY
    other.execute("ROLLBACK")
    other.close()
    with bench.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 30_000
    bench.close()
