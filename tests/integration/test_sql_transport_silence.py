"""The SQL transport where its server falls silent, becomes a standby, or has carried two billion messages."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from kombu import Connection

from idempotent_bus import watchdog
from idempotent_bus.model import Landing
from idempotent_bus.transports.sql.database import open_database
from proxy import Proxy, through
from sql_bus import Bus, deliveries, drop, open_bus

SERVERS = ("postgresql", "mariadb")


@pytest.fixture(params=SERVERS)
def bus(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Bus]:
    bus = open_bus(request.param, unique, tmp_path)
    yield bus
    drop(bus)


def _told(act: Any, seconds: float) -> tuple[threading.Thread, list[BaseException | None]]:
    """A thread that does it, waited for so long, and what it raised, if it has come to its end."""
    told: list[BaseException | None] = []

    def run() -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever it is
            told.append(error)
        else:
            told.append(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return thread, told


def _first(bus: Bus, connection: Connection) -> Any:
    return lambda: bus.publish(connection, 1, "first")


def _publish(bus: Bus, connection: Connection) -> Any:
    bus.publish(connection, 0, "before")
    return lambda: bus.publish(connection, 1, "first", declare=[])


def _poll(bus: Bus, connection: Connection) -> Any:
    bus.publish(connection, 0, "before")
    return lambda: list(deliveries(connection, bus.queue))


def _ack(bus: Bus, connection: Connection) -> Any:
    bus.publish(connection, 0, "before")
    message = next(deliveries(connection, bus.queue))
    return message.ack


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("begin", [_first, _publish, _poll, _ack])
def test_a_server_that_falls_silent_is_a_lost_connection(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, begin: Any, watched: bool
) -> None:
    """Frozen, not closed: whoever waits is told, in time, what kombu takes for a lost connection. The control: without
    the watchdog and the driver's limits it hangs."""
    if not watched:
        monkeypatch.setattr(watchdog.Watchdog, "start", lambda *_: 0)
        monkeypatch.setattr(watchdog, "limits", lambda *_, **__: {})
    with Proxy(url=bus.url) as proxy, Bus(through(proxy, bus.url), bus.options).connect(answer_timeout=1) as connection:
        act = begin(bus, connection)
        proxy.stall()
        thread, told = _told(act, 12 if watched else 4)
        assert thread.is_alive() is not watched
        if watched:
            assert isinstance(told[0], connection.connection_errors)
            proxy.resume()
            assert bus.publish(connection, 2, "afterwards") is Landing.LANDED
        proxy.refuse()
        proxy.cut()
        proxy.resume()
        thread.join(10)


@pytest.mark.parametrize("watched", [True, False])
def test_a_commit_whose_answer_never_comes(bus: Bus, monkeypatch: pytest.MonkeyPatch, watched: bool) -> None:
    """The server has it, and falls silent: the outcome is unknown in time, and a resend settles it. The control: else
    it hangs, since SQLAlchemy tells nobody when a COMMIT is over."""
    if not watched:
        monkeypatch.setattr(watchdog.Watchdog, "start", lambda *_: 0)
        monkeypatch.setattr(watchdog, "limits", lambda *_, **__: {})
    with Proxy(url=bus.url) as proxy, Bus(through(proxy, bus.url), bus.options).connect(answer_timeout=1) as connection:
        act = _publish(bus, connection)
        proxy.lose_reply(b"COMMIT\0" if "postgresql" in bus.url else b"\x03COMMIT", cut=False)  # not READ COMMITTED
        thread, told = _told(act, 8 if watched else 4)
        assert proxy.done["lose_reply"] == 1
        assert thread.is_alive() is not watched
        if watched:
            assert isinstance(told[0], connection.connection_errors)
            assert bus.publish(connection, 1, "first") is Landing.DUPLICATE
        proxy.cut()
        thread.join(10)


def test_a_connection_to_what_became_a_standby_is_not_kept(bus: Bus) -> None:
    """After a failover the server that was the primary refuses all writes, for ever: the next try is on a new
    connection, which may lead to the new primary."""
    with bus.connect() as connection:
        bus.publish(connection, 1, "a")
        database = open_database(bus.url, bus.options)
        read_only = "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"
        for engine in {database.engine, database._lax}:
            with engine.connect() as held:
                held.exec_driver_sql(read_only if "postgresql" in bus.url else "SET SESSION TRANSACTION READ ONLY")
                held.commit()
        with pytest.raises(connection.connection_errors):
            bus.publish(connection, 2, "b")
        assert bus.publish(connection, 2, "b") is Landing.LANDED


def test_more_messages_than_an_integer_can_count(bus: Bus) -> None:
    """The numbers of messages go on behind 2,147,483,647: an INTEGER, as kombu makes it, would end the queue."""
    table = bus.tables().message
    with bus.connect() as connection:
        bus.publish(connection, 1, "a")
        with open_database(bus.url, bus.options).engine.begin() as held:
            held.execute(sa.update(table).values(id=2**31 - 1))
            # The sequence is one for all message tables of the database: only this table's own message is moved.
            held.execute(sa.update(table).values(id=table.c.id + 5))
        got = next(deliveries(connection, bus.queue))
        got.requeue()
        got = next(deliveries(connection, bus.queue))
        assert got.payload == 1
        got.ack()
