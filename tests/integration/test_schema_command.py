"""`idempotent-bus schema` and `idempotent-bus relay`, and the migrations behind them."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from kombu import Connection, Queue

from idempotent_bus import ConfigurationError, Outbox, migrations, schema, watchdog
from idempotent_bus.cli import schema as cli
from outbox_rig import DATABASES, Place, place_of, url_of, within
from proxy import Proxy, through

place = pytest.fixture(place_of)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    made = [sys.executable, "-m", "idempotent_bus.cli", *arguments]
    return subprocess.run(made, capture_output=True, text=True, timeout=60, check=False)


def shape(engine: sa.Engine, prefix: str) -> dict[str, Any]:
    """The outbox's columns and indexes, as the database describes them."""
    inspector = sa.inspect(engine)
    name = f"{prefix}outbox"
    columns = [
        (column["name"], str(column["type"]).split(" COLLATE")[0], column["nullable"])
        for column in inspector.get_columns(name)
    ]
    indexes = sorted(
        (index["name"].removeprefix(prefix), index["column_names"], bool(index["unique"]))
        for index in inspector.get_indexes(name)
    )
    return {"columns": columns, "indexes": indexes}


def empty(place: Place) -> None:
    """Take away what the rig has made."""
    place.table.drop(place.engine)


@within(*DATABASES)
def test_an_upgrade_makes_what_create_makes(place: Place) -> None:
    """The second step's text and the metadata are the same table, column by column and index by index."""
    made = shape(place.engine, place.prefix)
    empty(place)
    old = schema.metadata(place.prefix, parts=("store", "inbox"))
    schema.create(place.engine, old)
    with place.engine.begin() as connection:
        connection.execute(
            sa.insert(schema.inbox(old)).values(record_key=b"k" * 16, kept_until=1, redrive=0, attempts=0, completed=1)
        )
    assert migrations.version(place.engine, place.prefix) is None
    assert migrations.upgrade(place.engine, place.prefix) == [2]
    assert shape(place.engine, place.prefix) == made
    assert migrations.upgrade(place.engine, place.prefix) == []
    assert migrations.version(place.engine, place.prefix) == migrations.LATEST
    with place.engine.begin() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(schema.inbox(old))).scalar() == 1
        Outbox(table_prefix=place.prefix).add(connection, {}, routing_key="x")


@within(*DATABASES)
def test_two_upgrades_at_once(place: Place) -> None:
    """Any number at once: each ends well, and the tables are there once."""
    empty(place)
    errors: list[BaseException] = []

    def upgrade() -> None:
        engine = sa.create_engine(place.url)
        try:
            migrations.upgrade(engine, place.prefix)
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)
        finally:
            engine.dispose()

    threads = [threading.Thread(target=upgrade) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    with place.engine.connect() as connection:
        assert not schema.missing(connection, schema.metadata(place.prefix))


@within("sqlite")
def test_tables_of_a_newer_version_are_left_alone(place: Place) -> None:
    """An old release says so, and changes nothing."""
    migrations.upgrade(place.engine, place.prefix)
    with place.engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {place.prefix}schema SET version = 99"))
    with pytest.raises(ConfigurationError, match="99"):
        migrations.upgrade(place.engine, place.prefix)


@pytest.mark.parametrize("database", DATABASES)
def test_the_commands(database: str, unique: str, tmp_path: Path) -> None:
    """create makes the tables, upgrade then has nothing to do, and what show prints is enough to make them by hand."""
    url, prefix = url_of(database, tmp_path), f"{unique}_"
    options = ("--database", url, "--table-prefix", prefix)
    engine = sa.create_engine(url)
    try:
        shown = command("schema", "show", *options)
        assert shown.returncode == 0, shown.stderr
        with engine.begin() as connection:
            for statement in shown.stdout.rstrip().rstrip(";").split(";\n"):
                connection.exec_driver_sql(statement.replace("%", "%%"))
        with engine.connect() as connection:
            assert not schema.missing(connection, schema.metadata(prefix))
        first = command("schema", "create", *options)
        assert (first.returncode, "version 2" in first.stdout) == (0, True), first.stderr
        assert "nothing to do" in command("schema", "upgrade", *options).stdout
    finally:
        with engine.begin() as connection:
            for table in sa.inspect(connection).get_table_names():
                if table.startswith(prefix):
                    connection.execute(sa.text(f"DROP TABLE {table}"))
            if database != "sqlite":
                connection.execute(sa.text(f"DROP SEQUENCE IF EXISTS {prefix}tokens"))
        engine.dispose()


def test_wrong_usage_is_said_in_a_sentence() -> None:
    """Exit codes: 2 for what cannot be a URL, 1 for a database that is not there; no password in the text."""
    broker = ("--broker", "memory://")
    wrong = command("relay", "--once", "--database", "nonsense://user:sesame@x", *broker)
    assert wrong.returncode == 2
    gone = command("relay", "--once", "--database", "postgresql://user:sesame@127.0.0.1:1/x", *broker)
    assert gone.returncode == 1
    assert "cannot be read" in gone.stderr
    assert command("schema", "show", "--database", "sqlite://", "--table-prefix", "a b").returncode == 2
    assert "sesame" not in wrong.stderr + gone.stderr


@within("sqlite")
def test_the_relay_command(place: Place, tmp_path: Path) -> None:
    """--once sends what is due and tells by its exit code what it left; without it SIGTERM ends it cleanly."""
    broker = f"idempotent-sqla+sqlite:///{tmp_path}/bus.db"
    queue = Queue("q", durable=True)
    with Connection(broker) as connection:
        queue(connection.default_channel).declare()
    options = ("--database", place.url, "--table-prefix", place.prefix, "--broker", broker)
    with place.engine.begin() as connection:
        place.pay(connection, 1, routing_key="q")
    done = command("relay", "--once", *options)
    assert done.returncode == 0, done.stderr
    assert "sent 1 " in done.stderr
    place.change(state=0)
    with place.engine.begin() as connection:
        place.pay(connection, 2, routing_key="q")
    place.change(headers="no json")
    assert command("relay", "--once", "--max-attempts", "1", *options).returncode == 3
    place.change(headers="{}")
    redriven = command("relay", "--once", "--redrive-dead", *options)
    assert (redriven.returncode, place.rows()) == (0, []), redriven.stderr
    made = [sys.executable, "-m", "idempotent_bus.cli", "relay", *options]
    running = subprocess.Popen(made, stderr=subprocess.PIPE, text=True)
    with place.engine.begin() as connection:
        place.pay(connection, 3, routing_key="q")
    deadline = time.monotonic() + 20
    while place.rows() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=20)
    assert running.returncode == 0, said
    assert "ended after" in said
    assert place.rows() == []


@within("postgresql", "mariadb")
@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("connected", [True, False])
def test_no_command_waits_for_ever_for_a_database_that_falls_silent(
    place: Place, monkeypatch: pytest.MonkeyPatch, connected: bool, watched: bool
) -> None:
    """Its engine is the commands' own: in use, and as it connects. The control: the drivers alone wait on."""
    monkeypatch.setattr(cli, "_ANSWER_TIMEOUT", 1.0)
    if not watched:
        monkeypatch.setattr(watchdog.Watchdog, "start", lambda *_: 0)
        monkeypatch.setattr(watchdog, "limits", lambda *_, **__: {})
    with Proxy(url=place.url) as proxy, cli.opened(through(proxy, place.url)) as engine:
        told: list[Any] = []

        def ask() -> None:
            try:
                with engine.connect() as connection:
                    told.append(connection.exec_driver_sql("SELECT 1").scalar())
            except sa.exc.OperationalError as error:
                told.append(error)

        if connected:
            ask()
        proxy.stall()
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(6 if watched else 3)
        assert thread.is_alive() is not watched
        if watched:
            assert isinstance(told[-1], sa.exc.OperationalError)
        proxy.cut()
        proxy.resume()
        thread.join(10)


@within("postgresql")
def test_whoever_was_stopped_while_it_made_the_tables_is_not_waited_for_for_ever(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is waited for as long as is said, by `create` and by an upgrade; once it is gone both go well."""
    monkeypatch.setattr(migrations, "_PATIENCE", 0.5)
    empty(place)
    tables = schema.metadata(place.prefix)
    stopped = place.engine.connect()
    stopped.begin()
    schema.one_at_a_time(stopped, tables, 1)
    attempts = {
        "create": lambda: schema.create(place.engine, tables, patience=0.5),
        "upgrade": lambda: migrations.upgrade(place.engine, place.prefix),
    }
    outcomes: dict[str, Any] = {}

    def make(name: str) -> None:
        try:
            outcomes[name] = attempts[name]()
        except sa.exc.OperationalError as error:
            outcomes[name] = getattr(error.orig, "sqlstate", None)

    threads = [threading.Thread(target=make, args=(name,)) for name in attempts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    told = dict(outcomes)
    stopped.close()
    for thread in threads:
        thread.join(10)
    assert told == {"create": "55P03", "upgrade": "55P03"}
    attempts["upgrade"]()
    attempts["create"]()
