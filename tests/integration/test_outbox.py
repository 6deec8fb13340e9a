"""`Outbox.add` in somebody else's transaction, on every database and with every kind of connection."""

from __future__ import annotations

import datetime
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from kombu import Exchange
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from idempotent_bus import ConfigurationError, InvalidBizId, InvalidBody, NoExecution, Outbox
from idempotent_bus.msgid import new_inner_msg_id
from outbox_rig import DATABASES, Place, place_of, within

place = pytest.fixture(place_of)

ADD = {"exchange": "paid", "routing_key": "paid"}


class Driver:
    """A driver's own connection to a place, however that driver is opened."""

    def __init__(self, place: Place) -> None:
        url = sa.make_url(place.url)
        self.place = place
        if place.name == "sqlite":
            self.connection: Any = sqlite3.connect(url.database or "")
        elif place.name == "postgresql":
            import psycopg

            self.connection = psycopg.connect(
                host=url.host, port=url.port or 5432, user=url.username, dbname=url.database
            )
        else:
            import pymysql

            self.connection = pymysql.connect(
                host=url.host, port=url.port or 3306, user=url.username, database=url.database
            )


class DjangoLike:
    """What Django's connection shows of itself, over a driver's: %s for every database."""

    def __init__(self, driver: Driver) -> None:
        self.vendor = {"mariadb": "mysql"}.get(driver.place.name, driver.place.name)
        self.in_atomic_block = True
        self._driver = driver.connection

    def get_autocommit(self) -> bool:
        return not self.in_atomic_block

    def cursor(self) -> Any:
        return _DjangoCursor(self._driver.cursor())


class _DjangoCursor:
    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor

    def __enter__(self) -> _DjangoCursor:
        return self

    def __exit__(self, *_: object) -> None:
        self._cursor.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)

    def execute(self, text: str, parameters: Any) -> None:
        assert isinstance(parameters, tuple)
        if isinstance(self._cursor, sqlite3.Cursor):
            text = text.replace("%s", "?")
        self._cursor.execute(text, parameters)


def by_engine(place: Place) -> tuple[Any, Callable[[], None], Callable[[], None]]:
    connection = place.engine.connect()
    return connection, connection.commit, connection.close


def by_session(place: Place) -> tuple[Any, Callable[[], None], Callable[[], None]]:
    session = Session(place.engine)
    return session, session.commit, session.close


def by_scoped_session(place: Place) -> tuple[Any, Callable[[], None], Callable[[], None]]:
    session = scoped_session(sessionmaker(place.engine))
    return session, session.commit, session.remove


def by_driver(place: Place) -> tuple[Any, Callable[[], None], Callable[[], None]]:
    connection = Driver(place).connection
    return connection, connection.commit, connection.close


def by_raw_connection(place: Place) -> tuple[Any, Callable[[], None], Callable[[], None]]:
    connection = place.engine.raw_connection()
    return connection, connection.commit, connection.close


def by_django(place: Place) -> tuple[Any, Callable[[], None], Callable[[], None]]:
    driver = Driver(place)
    return DjangoLike(driver), driver.connection.commit, driver.connection.close


WAYS = (by_engine, by_session, by_scoped_session, by_driver, by_raw_connection, by_django)


@within(*DATABASES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_row_is_there_with_the_commit_and_not_before(place: Place, way: Any) -> None:
    """I3: with each kind of connection the row is the transaction's: rolled back it never was, committed it stays."""
    connection, commit, close = way(place)
    place.outbox.add(connection, {"payment_id": 1}, **ADD)
    assert place.rows() == []
    close()
    assert place.rows() == []
    connection, commit, close = way(place)
    added = place.outbox.add(connection, {"payment_id": 2, "name": "Zoë"}, order_by="payment_id", **ADD)
    commit()
    close()
    (row,) = place.rows()
    assert (str(uuid.UUID(bytes=row.inner_msg_id)), added.added) == (added, True)
    assert (row.exchange, row.routing_key, row.content_type) == ("paid", "paid", "application/json")
    assert b'"payment_id": 2' in row.body


@within(*DATABASES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_known_id_is_added_once_and_the_transaction_goes_on(place: Place, way: Any) -> None:
    """I15: adding a message again is no error and no second row; what else is in the transaction is committed."""
    known = new_inner_msg_id()
    with place.engine.begin() as earlier:
        assert place.outbox.add(earlier, {"n": 1}, inner_msg_id=known, **ADD).added
    connection, commit, close = way(place)
    again = place.outbox.add(connection, {"n": 1}, inner_msg_id=known, **ADD)
    other = place.outbox.add(connection, {"n": 2}, **ADD)
    twice = place.outbox.add(connection, {"n": 2}, inner_msg_id=other, **ADD)
    commit()
    close()
    assert [again.added, other.added, twice.added] == [False, True, False]
    assert again == known
    assert [str(uuid.UUID(bytes=row.inner_msg_id)) for row in place.rows()] == [known, other]


@within(*DATABASES)
def test_a_connection_in_autocommit_is_refused(place: Place) -> None:
    """I3: where the row would be durable by itself nothing is added, and the error says what to do."""
    with (
        place.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        pytest.raises(ConfigurationError, match="autocommit"),
    ):
        place.outbox.add(connection, {}, **ADD)
    driver = Driver(place).connection
    if place.name == "sqlite":
        driver.isolation_level = None
    elif place.name == "postgresql":
        driver.autocommit = True
    else:
        driver.autocommit(True)
    with pytest.raises(ConfigurationError, match="autocommit"):
        place.outbox.add(driver, {}, **ADD)
    # A transaction that was begun by hand is one, whatever the setting is.
    cursor = driver.cursor()
    cursor.execute("BEGIN")
    place.outbox.add(driver, {}, **ADD)
    cursor.execute("ROLLBACK")
    assert place.rows() == []
    driver.close()
    django = DjangoLike(Driver(place))
    django.in_atomic_block = False
    with pytest.raises(ConfigurationError, match=r"transaction\.atomic"):
        place.outbox.add(django, {}, **ADD)


@within("postgresql")
def test_a_session_in_psycopgs_own_transaction_block(place: Place) -> None:
    """psycopg in autocommit with `connection.transaction()` has a transaction open: it is taken."""
    driver = Driver(place).connection
    driver.autocommit = True
    with driver.transaction():
        place.outbox.add(driver, {}, **ADD)
    driver.close()
    assert len(place.rows()) == 1


@within(*DATABASES)
def test_rows_of_any_kind_do_not_confuse_it(place: Place) -> None:
    """A user's row factory, which makes dictionaries of rows, changes nothing."""
    driver = Driver(place).connection
    if place.name == "sqlite":
        driver.row_factory = lambda cursor, row: {"row": row}
    elif place.name == "postgresql":
        from psycopg.rows import dict_row

        driver.row_factory = dict_row
    else:
        from pymysql.cursors import DictCursor

        driver.cursorclass = DictCursor
    first = place.outbox.add(driver, {}, **ADD)
    assert not place.outbox.add(driver, {}, inner_msg_id=first, **ADD).added
    driver.rollback()
    driver.close()


@within("sqlite")
def test_what_is_no_transaction_is_refused_with_a_sentence(place: Place) -> None:
    """Engines, asynchronous connections and strangers: ConfigurationError, and nothing is added."""

    class AsyncThing:
        sync_connection = None

    for thing, text in ((place.engine, "Engine"), (AsyncThing(), "run_sync"), (object(), "not a connection")):
        with pytest.raises(ConfigurationError, match=text):
            place.outbox.add(thing, {}, **ADD)


@within("sqlite")
def test_what_cannot_be_sent_is_refused_before_it_is_added(place: Place) -> None:
    """No pickle, no body without its biz-id, no name that a column would cut, no header that JSON would lose."""
    outbox = Outbox(place.engine, table_prefix=place.prefix, biz_id="payment_id")
    with place.engine.connect() as connection:

        def refused(error: type[Exception], body: Any = None, **options: Any) -> None:
            with pytest.raises(error):
                outbox.add(connection, {"payment_id": 1} if body is None else body, **{**ADD, **options})

        refused(InvalidBizId, {})
        refused(InvalidBizId, {"payment_id": 1.5})
        refused(ConfigurationError, serializer="pickle")
        refused(ConfigurationError, content_type="application/x-python-serialize", biz_id=lambda body: "x")
        refused(ConfigurationError, exchange="x" * 256)
        refused(ConfigurationError, routing_key="a\0b")
        refused(ConfigurationError, routing_key="\ud800")
        refused(ConfigurationError, headers={"x": object()})
        refused(ConfigurationError, inner_msg_id="mine")
        refused(ConfigurationError, delay=-1)
        refused(ConfigurationError, mandatory=True)
        refused(InvalidBody, {"payment_id": 1, "x": object()})
        refused(InvalidBody, order_by="order.id")
        refused(NoExecution, once="receipt")
        connection.commit()
    assert place.rows() == []


@within("sqlite")
def test_the_order_key_is_the_same_however_it_is_written(place: Place) -> None:
    """I10: a path, a function and the value itself give one key; another value gives another."""
    with place.engine.begin() as connection:
        for order_by in ("payment_id", lambda body: str(body["payment_id"]), 7, None, 8):
            place.outbox.add(connection, {"payment_id": 7}, order_by=order_by, **ADD)
    keys = [row.order_key for row in place.rows()]
    assert keys[0] == keys[1] == keys[2]
    assert keys[3] is None
    assert keys[4] not in (None, keys[0])


@within("sqlite")
def test_no_ddl_and_no_commit_on_the_callers_connection(place: Place) -> None:
    """The caller's connection sees one INSERT, whatever the outbox was told about creating tables."""
    seen: list[str] = []
    sa.event.listen(place.engine, "before_cursor_execute", lambda c, cur, text, *rest: seen.append(text.split()[0]))
    with place.engine.connect() as connection:
        place.outbox.add(connection, {}, exchange=Exchange("paid", "topic"), routing_key="paid")
        assert connection.in_transaction()
    assert seen == ["INSERT"]


def test_in_memory_the_table_is_made_before_any_transaction() -> None:
    """One connection for all: the outbox makes its table when it is made, never within a transaction of the user's."""
    engine = sa.create_engine("sqlite://")
    outbox = Outbox(engine)
    with engine.connect() as connection:
        outbox.add(connection, {}, **ADD)
        connection.rollback()
        assert connection.exec_driver_sql("SELECT count(*) FROM idempotent_bus_outbox").scalar() == 0


BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "an object": ({"n": 1, "name": "Zoë \U0001f600", "at": datetime.datetime(2026, 1, 2), "by": uuid.UUID(int=7)}, {}),
    "a list": ([1, None, True, 1.5], {"serializer": "json"}),
    "a number": (7, {}),
    "null": (None, {}),
    "a text": ("plain", {}),
    "bytes": (b"\x00\xff", {}),
    "yaml": ({"n": 1}, {"serializer": "yaml"}),
    "to an exchange": ({"n": 1}, {"exchange": Exchange("paid", "topic", durable=False, arguments={"x": 1})}),
    "to the default exchange": ({"n": 1}, {"exchange": Exchange("")}),
    "without a way": ({"n": 1}, {"exchange": None, "routing_key": None}),
}


@within(*DATABASES)
@pytest.mark.parametrize("what", BODIES)
def test_the_short_way_writes_what_the_long_one_does(place: Place, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """I3: however a message is added, its row is the same but for its number, its id and its time."""
    body, options = BODIES[what]
    taken = []
    short = Outbox._add_plain
    monkeypatch.setattr(Outbox, "_add_plain", lambda *given: taken.append(short(*given)) or taken[-1])
    with place.engine.begin() as connection:
        place.outbox.add(connection, body, **{**ADD, **options})
        monkeypatch.setattr(Outbox, "_add_plain", lambda *_: None)
        place.outbox.add(connection, body, **{**ADD, **options})
    assert [made is None for made in taken] == [what in ("a text", "bytes", "yaml")]
    one, other = (row._mapping for row in place.rows())
    differs = {"id", "inner_msg_id", "made_at", "due_at"}
    assert {name: one[name] for name in one if name not in differs} == {
        name: other[name] for name in other if name not in differs
    }
    assert one["made_at"] <= one["due_at"] <= other["made_at"] <= other["due_at"]


@within(*DATABASES)
def test_a_fresh_id_that_is_there_is_an_error_and_no_silence(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """I1: two messages under one fresh id cannot be; if they were, the second would not vanish without a word."""
    with place.engine.begin() as connection:
        there = place.outbox.add(connection, {"n": 1}, **ADD)
    monkeypatch.setattr("idempotent_bus.outbox.new_inner_msg_id", lambda: str(there))
    with place.engine.connect() as connection, pytest.raises(sa.exc.IntegrityError):
        place.outbox.add(connection, {"n": 2}, **ADD)
    assert len(place.rows()) == 1


@within(*DATABASES)
def test_errors_show_no_body(place: Place) -> None:
    """What is added does not come out in an error's text."""
    outbox = Outbox(table_prefix=f"{place.prefix}absent_")
    with place.engine.connect() as connection, pytest.raises(sa.exc.DBAPIError) as caught:
        outbox.add(connection, {"card": "4111-1111"}, **ADD)
    assert "4111" not in str(caught.value)


@within(*DATABASES)
def test_two_that_add_the_same_id_at_once(place: Place) -> None:
    """The second waits for the first's end: one row if that commits, its own if that rolls back."""
    for commits in (True, False):
        known = new_inner_msg_id()
        results: list[bool] = []

        def second(known: str = known, results: list[bool] = results) -> None:
            with place.engine.begin() as connection:
                results.append(place.outbox.add(connection, {}, inner_msg_id=known, **ADD).added)

        first = place.engine.connect()
        place.outbox.add(first, {}, inner_msg_id=known, **ADD)
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        if commits:
            first.commit()
        else:
            first.rollback()
        thread.join(10)
        first.close()
        assert results == [not commits]
        assert sum(uuid.UUID(bytes=row.inner_msg_id) == uuid.UUID(known) for row in place.rows()) == 1


def test_without_sqlalchemy_the_sentence_says_what_to_install(tmp_path: Path) -> None:
    """`from idempotent_bus import Outbox` without the extra names the extra."""
    code = (
        "import sys; sys.modules['sqlalchemy'] = None\n"
        "import idempotent_bus\n"
        "for name in ('Outbox', 'Relay'):\n"
        "    try: getattr(idempotent_bus, name)\n"
        "    except idempotent_bus.ConfigurationError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.count("idempotent-bus[sql]") == 2, done.stdout + done.stderr
