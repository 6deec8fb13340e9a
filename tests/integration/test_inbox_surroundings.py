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
from idempotent_bus import Ended, Inbox
from idempotent_bus.model import Reason

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
