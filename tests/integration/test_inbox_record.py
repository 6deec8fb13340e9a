"""`inbox.record` in transactions of the user's, on every kind of connection; and handlers that get a Session."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pymysql
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker
from test_inbox import DATABASES, Bench, answers, database_url

from idempotent_bus import ConfigurationError, Ended, FingerprintConflict, Inbox
from idempotent_bus.events import Event, EventKind
from idempotent_bus.inbox.running import Transactions
from idempotent_bus.model import Reason
from idempotent_bus.policy import Backoff, Policy


def driver(bench: Bench) -> Any:
    url = bench.engine.url
    if bench.engine.dialect.name == "sqlite":
        return sqlite3.connect(str(url.database), timeout=0.5)
    if bench.engine.dialect.name == "postgresql":
        return psycopg.connect(host=url.host, port=url.port, user=url.username, dbname=url.database)
    return pymysql.connect(host=url.host, port=url.port or 0, user=url.username, database=url.database)


KINDS: dict[str, Callable[[Bench], Any]] = {
    "connection": lambda bench: bench.engine.connect(),
    "session": lambda bench: Session(bench.engine),
    "scoped": lambda bench: scoped_session(sessionmaker(bench.engine)),
    "driver": driver,
    "raw": lambda bench: bench.engine.raw_connection(),
}


@pytest.fixture(params=DATABASES)
def bench(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(database_url(request.param, tmp_path), unique)
    made.inbox.create()
    yield made
    made.close()


def issue(bench: Bench, connection: Any) -> None:
    text = f"INSERT INTO {bench.unique}_cards (card) VALUES ('a')"
    if isinstance(connection, (sa.Connection, Session, scoped_session)):
        connection.execute(sa.text(text))
    else:
        connection.cursor().execute(text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_lives_and_dies_with_the_users_transaction(bench: Bench, kind: str) -> None:
    """I3: committed together, rolled back together; never committed by `record`; a duplicate ends nothing."""
    with contextlib.closing(KINDS[kind](bench)) as connection:
        assert bench.inbox.record(connection, "cards", "a") is True
        assert bench.record() is None, "nobody sees it before the commit"
        issue(bench, connection)
        connection.rollback()
        assert (bench.cards(), bench.record()) == (0, None)
        assert bench.inbox.record(connection, "cards", "a", fingerprint={"sum": 1}) is True
        issue(bench, connection)
        connection.commit()
        assert bench.cards() == 1
        assert bench.inbox.record(connection, "cards", "a", fingerprint={"sum": 1}) is False
        with pytest.raises(FingerprintConflict, match="another body"):
            bench.inbox.record(connection, "cards", "a", fingerprint={"sum": 2})
        assert bench.inbox.record(connection, "cards", "a") is False
        assert bench.inbox.record(connection, "cards", "a", tenant="other") is True, "I14"
        issue(bench, connection)  # the duplicates have not aborted the transaction
        connection.commit()
    assert bench.cards() == 2
    assert bench.transactions().handle(bench.work(body={"sum": 1})).how is Ended.REPLAYED, "the decorator's copy"


@pytest.mark.parametrize("kind", ["driver", "connection"])
def test_in_a_pipeline_of_psycopg_the_answer_is_waited_for(unique: str, tmp_path: Path, kind: str) -> None:
    """I1: an answer that is not here yet is not "done before", which would skip the effect and keep the record."""
    bench = Bench(database_url("postgresql", tmp_path), unique)
    try:
        bench.inbox.create()
        with contextlib.closing(KINDS[kind](bench)) as connection:
            if kind == "connection":
                connection.begin()
            raw = connection if kind == "driver" else connection.connection.driver_connection
            with raw.pipeline():
                assert bench.inbox.record(connection, "cards", "a", fingerprint="x") is True
                assert bench.inbox.record(connection, "cards", "a", fingerprint="x") is False
                with pytest.raises(FingerprintConflict):
                    bench.inbox.record(connection, "cards", "a", fingerprint="y")
            connection.commit()
        assert bench.record().completed
    finally:
        bench.close()


def test_autocommit_is_refused(bench: Bench) -> None:
    """There the record would be durable without its effect."""
    engine = sa.create_engine(bench.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection, pytest.raises(ConfigurationError, match="autocommit"):
        bench.inbox.record(connection, "cards", "a")
    with pytest.raises(ConfigurationError, match="Engine"):
        bench.inbox.record(bench.engine, "cards", "a")
    engine.dispose()
    assert bench.record() is None


def test_a_missing_table_is_named_and_not_made(unique: str, bench: Bench) -> None:
    """No DDL in the user's transaction: the error says what to run."""
    inbox = Inbox(table_prefix=f"{unique}_none_")
    with bench.engine.connect() as connection:
        with pytest.raises(ConfigurationError, match="idempotent-bus schema create"):
            inbox.record(connection, "cards", "a")
        connection.rollback()
        assert not sa.inspect(connection).has_table(f"{unique}_none_inbox")
    with pytest.raises(ConfigurationError, match="no engine"):
        inbox.create()


def test_a_copy_waits_for_the_first_and_then_knows(bench: Bench) -> None:
    """I2: two transactions with one biz-id: the second waits, and goes on only if the first was rolled back."""
    if bench.engine.dialect.name == "sqlite":
        bench = Bench(bench.url.replace("timeout=0.5", "timeout=10"), bench.unique)
    for commits in (False, True):
        biz_id = f"b{commits}"
        told: list[bool] = []
        with bench.engine.connect() as first:
            assert bench.inbox.record(first, "cards", biz_id)

            def second(biz_id: str = biz_id, told: list[bool] = told) -> None:
                with bench.engine.begin() as connection:
                    told.append(bench.inbox.record(connection, "cards", biz_id))

            thread = threading.Thread(target=second)
            thread.start()
            time.sleep(0.3)
            assert told == []
            (first.commit if commits else first.rollback)()
            thread.join(10)
        assert told == [not commits]


def test_a_failed_message_that_was_counted_can_be_recorded(bench: Bench) -> None:
    """Attempts that were counted are no completion."""

    def fail(connection: sa.Connection) -> None:
        raise ValueError

    bench.transactions().handle(bench.work(fail))
    with bench.engine.begin() as connection:
        assert bench.inbox.record(connection, "cards", "a") is True
    with bench.engine.begin() as connection:
        assert bench.inbox.record(connection, "cards", "a") is False


# --- handlers that get a Session ----------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Card(Base):
    __tablename__ = "inbox_session_cards"
    id: Mapped[int] = mapped_column(primary_key=True)
    card: Mapped[str] = mapped_column(sa.String(50))


@pytest.fixture
def sessions(tmp_path: Path) -> Iterator[sessionmaker[Session]]:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/sessions.db")
    Base.metadata.create_all(engine)
    yield sessionmaker(engine)
    engine.dispose()


def test_a_session_is_committed_with_the_record(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """What the handler only added is flushed, its session's events come after the commit; a failure leaves nothing."""
    inbox, committed = Inbox(sessions), []
    bench = Bench(f"sqlite:///{tmp_path}/other.db", "other")
    made = Transactions(inbox, Policy(backoff=Backoff(0.1, 0.1)))

    def add(session: Session) -> str:
        sa.event.listen(session, "after_commit", lambda _: committed.append(count()))
        session.add(Card(card="a"))
        return "card"

    def add_nothing(session: Session) -> None:
        session.add(Card(card=None))  # type: ignore[arg-type]  # refused at the flush

    def commits(session: Session) -> None:
        session.add(Card(card="b"))
        session.commit()

    def count() -> int:
        with sessions() as session:
            return session.query(Card).count()

    assert made.handle(bench.work(add)).how is Ended.COMPLETED
    assert committed == [1]
    assert made.handle(bench.work(add)).how is Ended.REPLAYED
    bad = bench.work(add_nothing, biz_id="b")
    assert made.handle(bad).how is Ended.FAILED
    assert count() == 1
    meddler = bench.work(commits, biz_id="c")
    assert made.handle(meddler).how is Ended.DEAD
    assert meddler.settle.answers[0][1] is Reason.PERMANENT  # type: ignore[attr-defined]
    bench.close()


def test_what_an_inbox_does_not_take() -> None:
    """Said when it is made: an unbound sessionmaker, several binds, two phases, something else."""
    engine = sa.create_engine("sqlite://")
    for wrong in (sessionmaker(), sessionmaker(engine, twophase=True), sessionmaker(engine, binds={Card: engine}), "x"):
        with pytest.raises(ConfigurationError):
            Inbox(wrong)  # type: ignore[arg-type]


# --- the policy, and who is told -------------------------------------------------------------------------------


class Ears:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def kinds(self) -> list[EventKind]:
        return [event.kind for event in self.events]


def test_the_listener_hears_the_same_words_singly_and_in_a_window(bench: Bench) -> None:
    """The events of the dedup store's executor, with the attempt and the record's key, and no biz-id."""
    for window in (False, True):
        ears = Ears()
        made = Transactions(bench.inbox, Policy(max_attempts=2, backoff=Backoff(0.1, 0.1)), notify=ears)

        def fail(connection: sa.Connection) -> None:
            raise ValueError

        works = [bench.work(biz_id=f"x{window}"), bench.work(fail, biz_id=f"y{window}")]
        if window:
            made.handle_window(works)
        else:
            [made.handle(work) for work in works]
        heard = [kind for kind in ears.kinds if kind is not EventKind.CLAIMED]
        assert sorted(heard) == [EventKind.COMPLETED, EventKind.RELEASED]
        assert {event.attempt for event in ears.events} == {1}
        assert {event.record for event in ears.events} == {work.key.hex() for work in works}
        made.handle(bench.work(fail, biz_id=f"y{window}"))
        made.handle(bench.work(biz_id=f"x{window}"))
        made.handle(bench.work(biz_id=f"x{window}", body={"other": 1}))
        tail = [EventKind.DEAD_LETTERED, EventKind.REPLAYED, EventKind.CONFLICTED]
        assert [kind for kind in ears.kinds if kind in tail][:3] == tail


def test_too_old_without_a_record_is_not_run(bench: Bench) -> None:
    """I11: it may have been done and forgotten; singly and in a window. One with a record is a replay."""
    made = bench.transactions()
    made.handle(bench.work(biz_id="known"))
    old = time.time() - 8 * 86400
    works = [bench.work(biz_id=name, published_at=old) for name in ("known", "new1", "new2")]
    hows = [ending.how for ending in made.handle_window(works)]
    assert hows == [Ended.REPLAYED, Ended.DEAD, Ended.DEAD]
    single = bench.work(biz_id="new3", published_at=old)
    assert made.handle(single).how is Ended.DEAD
    assert single.settle.answers[0][1] is Reason.TOO_OLD  # type: ignore[attr-defined]
    assert bench.cards() == 1


def test_what_cannot_be_dead_lettered_is_held_and_never_runs_again(bench: Bench) -> None:
    """I12: HELD: not acked, and when it is looked at again it is not run."""
    for number, published_at in enumerate((None, time.time() - 8 * 86400)):
        ran: list[int] = []

        def fail(connection: sa.Connection, ran: list[int] = ran) -> None:
            ran.append(1)
            raise TypeError

        made = bench.transactions(permanent=(TypeError,), max_attempts=5)
        for redelivered in (False, True, True):
            work = bench.work(fail, biz_id=f"h{number}", redelivered=redelivered, published_at=published_at)
            work.settle.dead_letter = lambda *_: False  # type: ignore[method-assign]
            assert made.handle(work).how is Ended.HELD
            assert answers(work) == []
        assert len(ran) == (published_at is None)


def test_a_backoff_for_a_class_of_errors(bench: Bench) -> None:
    """backoffs and Transient.retry_after count as with the dedup store."""
    from idempotent_bus import Transient

    def transient(connection: sa.Connection) -> None:
        raise Transient(retry_after=77.0)

    def key_error(connection: sa.Connection) -> None:
        raise KeyError

    made = bench.transactions(backoffs={KeyError: Backoff(40.0, 40.0, max_attempts=1)})
    waits = bench.work(transient)
    assert made.handle(waits).how is Ended.FAILED
    assert waits.settle.answers == [("wait", 77.0)]  # type: ignore[attr-defined]
    assert made.handle(bench.work(key_error, biz_id="k")).how is Ended.DEAD


def test_a_long_result_is_not_stored(bench: Bench) -> None:
    """max_result: its duplicates get None, and the effect stands."""
    made = Transactions(bench.inbox, Policy(), max_result=10)
    assert made.handle(bench.work(lambda connection: "x" * 11)).how is Ended.COMPLETED
    assert made.handle(bench.work()).value is None
    assert bench.cards() == 0
