"""The Django app in a project: settings, checks, migrations, requests, commands and admin pages."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import django
import pytest
import sqlalchemy as sa
from django.core import checks
from django.core.management import CommandError, call_command
from django.db import connections, transaction
from django.db.migrations.autodetector import MigrationAutodetector
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.state import ProjectState
from django.test import Client, TestCase
from django.test.utils import override_settings

import django_rig
from consumer_rig import Broker, make_broker
from django_rig import PREFIX, Charge, environment, within
from idempotent_bus import ConfigurationError, schema
from idempotent_bus.django import outbox, store
from idempotent_bus.django.conf import bus_settings, problems
from idempotent_bus.django.databases import engine_of
from idempotent_bus.django.models import InboxRecord, OutboxMessage, StoreRecord
from idempotent_bus.identity import record_key
from idempotent_bus.model import ClaimRequest, Hold

project = pytest.fixture(scope="session")(django_rig.project)
place = pytest.fixture(django_rig.place_of)
RIG = Path(django_rig.__file__)


@pytest.fixture
def broker(unique: str, tmp_path: Path) -> Iterator[Broker]:
    made = make_broker("ours-sqlite", unique, tmp_path)
    yield made
    made.clean_up()


def with_bus(**bus: Any) -> Any:
    """These settings of the library, besides the table prefix."""
    return override_settings(IDEMPOTENT_BUS={"TABLE_PREFIX": PREFIX, **bus})


def manage(*arguments: str, **bus: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RIG), *arguments], env=environment(**bus), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


def landed(broker: Broker, queue: str, count: int, patience: float = 5.0) -> list[str]:
    """The payments in the queue; it looks for one more than should be there."""
    found = [message.payload["payment_id"] for message in broker.take(queue, count, patience)]
    return sorted(found + [message.payload["payment_id"] for message in broker.take(queue, 100, 0.1)])


# --- settings and checks --------------------------------------------------------------------------------

WRONG: dict[str, tuple[Any, str]] = {
    "unknown": ({"RETENTION": 7}, "no key 'RETENTION': did you mean 'RETENTION_DAYS'?"),
    "unknown, lower case": ({"broker": "amqp://"}, "did you mean 'BROKER'?"),
    "unknown, like nothing": ({"XYZ": 1}, "known are 'DATABASE'"),
    "unknown, nested": ({"RELAY": {"LEESE": 1}}, "IDEMPOTENT_BUS['RELAY'] has no key 'LEESE': did you mean 'LEASE'?"),
    "no dictionary": (["BROKER"], "must be a dictionary"),
    "no nested dictionary": ({"OUTBOX": "q"}, "['OUTBOX'] must be a dictionary"),
    "no database": ({"DATABASE": "elsewhere"}, "names no database of DATABASES"),
    "prefix": ({"TABLE_PREFIX": "a b"}, "at most 40 letters"),
    "days": ({"RETENTION_DAYS": 0}, "must be more than 0"),
    "true is no number": ({"RETENTION_DAYS": True}, "must be a number"),
    "batch": ({"RELAY": {"BATCH": 10**6}}, "at most 5000"),
    "names": ({"DEAD_LETTERS": "cards"}, "must be a list"),
    "url": ({"BROKER": ""}, "must be a URL"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_refused_by_name(case: str) -> None:
    """Each is said in one sentence with what to write instead, by the check and by whoever reads the settings."""
    given, said = WRONG[case]
    assert any(said in problem for problem in problems(given)), problems(given)
    with override_settings(IDEMPOTENT_BUS=given):
        found = checks.run_checks(tags=["idempotent_bus"])
        assert [message.id for message in found] == ["idempotent_bus.E001"] * len(problems(given))
        with pytest.raises(ConfigurationError):
            bus_settings()
    assert not problems({"BROKER": "amqp://guest:secret@host//", "OUTBOX": {"EXCHANGE": "paid"}, "DATABASE": "default"})


def test_no_password_is_told() -> None:
    """What is wrong with a URL is said without the URL."""
    assert "secret" not in str(problems({"BROKER": b"amqp://guest:secret@host", "BROKERS": "amqp://guest:secret@host"}))


@contextlib.contextmanager
def changed(alias: str, **values: Any) -> Iterator[None]:
    entry = connections[alias].settings_dict
    before = {name: entry[name] for name in values}
    entry.update(values)
    try:
        yield
    finally:
        entry.update(before)


@within("default")
def test_checks_find_what_would_lose_effects(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AUTOCOMMIT off, another kind of database, SQLite without IMMEDIATE, no tables: each has an id; else none."""

    def found(**options: Any) -> list[str | None]:
        return [message.id for message in checks.run_checks(tags=["idempotent_bus"], **options)]

    assert found(databases=["default"]) == []
    with changed(place, AUTOCOMMIT=False):
        assert found() == ["idempotent_bus.E003"]
    if django.VERSION >= (5, 1):
        with changed(place, OPTIONS={}):
            assert found() == ["idempotent_bus.W001"]
    with override_settings(IDEMPOTENT_BUS={"TABLE_PREFIX": "elsewhere_"}):
        assert found() == []
        assert found(databases=["default"]) == ["idempotent_bus.W002"]
    monkeypatch.setattr(type(connections[place]), "vendor", "oracle")
    assert found(databases=["default"]) == ["idempotent_bus.E002"]


# --- tables ---------------------------------------------------------------------------------------------


def tables_of(engine: sa.Engine, prefix: str, space: str | None) -> dict[str, Any]:
    """What is there, as SQLAlchemy reads it back."""
    inspector = sa.inspect(engine)
    found: dict[str, Any] = {}
    for name in inspector.get_table_names(schema=space):
        if name.startswith(prefix) and name.removeprefix(prefix) in ("inbox", "outbox", "records", "tokens"):
            columns = [
                (column["name"], str(column["type"]), column["nullable"], column.get("autoincrement"))
                for column in inspector.get_columns(name, schema=space)
            ]
            indexes = sorted(
                (str(index["name"]).removeprefix(prefix), index["column_names"], bool(index["unique"]))
                for index in inspector.get_indexes(name, schema=space)
            )
            key = inspector.get_pk_constraint(name, schema=space)["constrained_columns"]
            found[name.removeprefix(prefix)] = (columns, indexes, key)
    return found


@within()
def test_django_makes_exactly_our_tables(place: str, unique: str) -> None:
    """Columns, types, keys and indexes are those of `schema.create` there, and the models name them all."""
    engine, other = engine_of(place), f"{unique}_"
    try:
        ours = schema.metadata(other)
        schema.create(engine, ours)
        made, wanted = tables_of(engine, PREFIX, None), tables_of(engine, other, None)
        assert made == wanted
        assert {"inbox", "outbox", "records"} <= set(made)
        for model in (InboxRecord, OutboxMessage, StoreRecord):
            table = schema.metadata(PREFIX).tables[model._meta.db_table]
            fields = {field.column: (field.null, field.primary_key) for field in model._meta.fields}
            assert fields == {c.name: (bool(c.nullable), c.primary_key) for c in table.columns}
            digests = {c.name: c.type.length for c in table.columns if type(c.type).__name__ == "Digest"}
            assert digests == {f.column: f.length for f in model._meta.fields if type(f).__name__ == "DigestField"}
    finally:
        with contextlib.suppress(Exception):
            ours.drop_all(engine)
        engine.dispose()


def test_no_migration_is_missing() -> None:
    """`makemigrations --check` finds nothing to do. The control: a model without its migration is found."""
    loader = MigrationLoader(None)
    for drop, expected in ((False, False), (True, True)):
        state = loader.project_state()
        if drop:
            state.models["idempotent_bus", "inboxrecord"].fields.pop("attempts")
        now = ProjectState.from_apps(django.apps.apps)
        found = MigrationAutodetector(state, now).changes(graph=loader.graph)
        assert ("idempotent_bus" in found) is expected


@within()
def test_migrations_go_back_and_take_over(place: str) -> None:
    """Backwards drops the tables, forwards makes them, or takes over what `idempotent-bus schema create` has made."""
    Charge.objects.using(place).create(payment_id="stays")
    call_command("migrate", "idempotent_bus", "zero", database=place, verbosity=0)
    engine = engine_of(place)
    assert tables_of(engine, PREFIX, None) == {}
    schema.create(engine, schema.metadata(PREFIX))
    before = tables_of(engine, PREFIX, None)
    call_command("migrate", "idempotent_bus", database=place, verbosity=0)
    assert tables_of(engine, PREFIX, None) == before
    engine.dispose()
    with transaction.atomic(using=place):
        outbox.add({"payment_id": "p"}, routing_key="q", using=place)
    assert OutboxMessage.objects.using(place).count() == 1


# --- requests, and the relay ----------------------------------------------------------------------------


@within("default")
def test_a_request_and_its_message_are_one(place: str, broker: Broker) -> None:
    """I3: ATOMIC_REQUESTS: a request that failed leaves no row, one that succeeded lands once through the relay."""
    queue = broker.queue()
    with broker.connect() as connection:
        queue(connection.channel()).declare()
    client = Client(raise_request_exception=False)
    assert client.get(f"/charge/p-1/?queue={queue.name}&fail").status_code == 500
    assert (Charge.objects.count(), OutboxMessage.objects.count()) == (0, 0)
    assert client.get(f"/charge/p-2/?queue={queue.name}").status_code == 200
    assert client.get(f"/charge/p-2/?queue={queue.name}").status_code == 500  # charged before: unique
    assert (Charge.objects.count(), OutboxMessage.objects.count()) == (1, 1)
    with pytest.raises(ConfigurationError, match=r"outside of transaction\.atomic"):
        Client().get("/careless/")
    call_command("relay", "--once", "--broker", broker.url, stderr=io.StringIO())
    assert landed(broker, queue.name, 1) == ["p-2"]
    assert OutboxMessage.objects.count() == 0


@within("default")
def test_the_block_around_a_test_is_none(place: str) -> None:
    """What would fail in production fails within Django's TestCase too; a durable block is one there as well."""

    class Inner(TestCase):
        def test(self) -> None:
            with pytest.raises(ConfigurationError, match=r"outside of transaction\.atomic"):
                outbox.add({"payment_id": "p"}, routing_key="q")
            with transaction.atomic(durable=True):
                outbox.add({"payment_id": "p"}, routing_key="q")
            assert OutboxMessage.objects.count() == 1

    import unittest

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Inner).run(result)
    assert result.wasSuccessful(), result.errors + result.failures
    assert OutboxMessage.objects.count() == 0


@within("postgresql", "mariadb")
def test_the_relay_reads_djangos_entry(place: str, broker: Broker) -> None:
    """I1, I3: through `manage.py relay` as a process: what was committed lands, once; SIGTERM ends it cleanly."""
    queue = broker.queue()
    with broker.connect() as connection:
        queue(connection.channel()).declare()
    with contextlib.suppress(ZeroDivisionError), transaction.atomic(using=place, durable=True):
        outbox.add({"payment_id": "never"}, routing_key=queue.name, using=place)
        raise ZeroDivisionError
    with transaction.atomic(using=place):
        outbox.add({"payment_id": "a"}, routing_key=queue.name, using=place)
    command = [sys.executable, str(RIG), "relay", "--database", place, "--broker", broker.url, "--poll-interval", "30"]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as relay:
        try:
            assert landed(broker, queue.name, 1, 30.0) == ["a"]  # a process has to start
            if place == "postgresql":
                time.sleep(0.3)  # it sleeps now, for half a minute unless it is woken
                with transaction.atomic(using=place):
                    outbox.add({"payment_id": "b"}, routing_key=queue.name, using=place)
                assert landed(broker, queue.name, 1) == ["b"]  # within five seconds: woken by NOTIFY
        finally:
            relay.send_signal(signal.SIGTERM)
            _, said = relay.communicate(timeout=20)
    assert relay.returncode == 0, said
    assert "ended after" in said


@within("default")
def test_a_kill_between_commit_and_relay_loses_nothing(place: str, broker: Broker) -> None:
    """I1, I3: a process that is killed after its commit, and one that is killed before it, with SIGKILL."""
    queue = broker.queue()
    with broker.connect() as connection:
        queue(connection.channel()).declare()
    code = (
        "import os, signal, sys, django_rig\n"
        "from django.db import transaction\n"
        "from idempotent_bus.django import outbox\n"
        "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with transaction.atomic():\n"
        "    django_rig.Charge.objects.create(payment_id=sys.argv[1])\n"
        "    outbox.add({'payment_id': sys.argv[1]}, routing_key=sys.argv[2])\n"
        "    if sys.argv[1] == 'before': die()\n"
        "die()\n"
    )
    for when in ("before", "after"):
        done = subprocess.run(
            [sys.executable, "-c", code, when, queue.name], env=environment(), timeout=30, check=False
        )
        assert done.returncode == -signal.SIGKILL
    assert list(Charge.objects.values_list("payment_id", flat=True)) == ["after"]
    call_command("relay", "--once", "--broker", broker.url, stderr=io.StringIO())
    assert landed(broker, queue.name, 1) == ["after"]


@within("default")
def test_the_relay_says_what_it_cannot_do(place: str) -> None:
    """No broker, no such database, an option that cannot be carried over, a missing table: one line each."""
    for arguments, said in (
        ((), "no broker"),
        (("--broker", "memory://", "--database", "elsewhere"), "elsewhere"),
        (("--broker", "memory://", "--batch", "0"), "batch must be"),
    ):
        with pytest.raises(CommandError, match=said):
            call_command("relay", "--once", *arguments)
    with changed(place, OPTIONS={"factory": object}), pytest.raises(CommandError, match="'factory', which cannot"):
        call_command("relay", "--once", "--broker", "memory://", skip_checks=True)
    with changed(place, NAME=":memory:"), pytest.raises(CommandError, match="in memory"):
        call_command("relay", "--once", "--broker", "memory://", skip_checks=True)
    elsewhere = override_settings(IDEMPOTENT_BUS={"TABLE_PREFIX": "elsewhere_"})
    with elsewhere, pytest.raises(CommandError, match="migrate makes its table"):
        call_command("relay", "--once", "--broker", "memory://", skip_checks=True)
    failed = manage("relay", "--once")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "no broker" in failed.stderr


def test_an_engine_from_djangos_entry() -> None:
    """Password, port, socket, TLS and role are carried over; nothing that is Django's own is."""
    entry = {
        "NAME": "shop", "USER": "u", "PASSWORD": "p@ss:/word", "HOST": "db", "PORT": "6543",
        "OPTIONS": {"sslmode": "verify-full", "isolation_level": 3, "pool": True, "server_side_binding": True},
    }  # fmt: skip
    with changed("postgresql", **entry):
        engine = engine_of("postgresql")
        assert engine.url.render_as_string(hide_password=False) == (
            "postgresql+psycopg://u:p%40ss%3A%2Fword@db:6543/shop"
        )
        assert engine.dialect.create_connect_args(engine.url)[1]["password"] == "p@ss:/word"
    with changed("mariadb", HOST="/run/mysql.sock", PORT="", OPTIONS={"ssl": {"ca": "/ca.pem"}, "init_command": "x"}):
        assert engine_of("mariadb").url.host is None
    with changed("mariadb", OPTIONS={"passwd": "secret"}), pytest.raises(ConfigurationError) as raised:
        engine_of("mariadb")
    assert "secret" not in str(raised.value)


@within()
def test_purge_forgets_what_is_over(place: str) -> None:
    """Records past their retention go, in batches, those within it stay; a dry run only counts."""
    keys = [record_key("cards", f"p-{number}").hex() for number in range(25)]
    for number, key in enumerate(keys):
        InboxRecord.objects.using(place).create(
            record_key=key, kept_until=1 if number else 2**60, redrive=0, attempts=0, completed=1
        )
    with with_bus(DATABASE=place):
        kept = store()
        kept.claim(ClaimRequest(bytes.fromhex(keys[0]), b"n" * 16, lease=0.001, retention=0.001))
        kept.claim(ClaimRequest(bytes.fromhex(keys[1]), b"n" * 16, lease=60, retention=60))
        kept._engine.dispose()  # type: ignore[attr-defined]
        time.sleep(0.01)
        said = io.StringIO()
        call_command("purge", "--dry-run", stdout=said)
        assert said.getvalue().splitlines() == ["inbox: 24 would be deleted", "store: 1 would be deleted"]
        said = io.StringIO()
        call_command("purge", "--batch", "10", stdout=said)
    assert said.getvalue().splitlines() == ["inbox: 24 deleted", "store: 1 deleted"]
    assert [row.record_key for row in InboxRecord.objects.using(place)] == [keys[0]]
    assert [row.record_key for row in StoreRecord.objects.using(place)] == [keys[1]]


# --- the admin ------------------------------------------------------------------------------------------


def client_of(name: str, *permissions: str) -> Client:
    """Somebody of the staff with these permissions."""
    from django.contrib.auth.models import Permission, User

    User.objects.filter(username=name).delete()
    user = User.objects.create_user(name, password="x", is_staff=True)
    found = Permission.objects.filter(content_type__app_label="idempotent_bus", codename__in=permissions)
    assert found.count() == len(permissions)
    user.user_permissions.set(found)
    client = Client()
    client.force_login(user)
    return client


def page(client: Client, name: str, *more: str, **query: str) -> str:
    answer = client.get(f"/admin/idempotent_bus/{name}/{''.join(more)}", query)
    assert answer.status_code == 200, answer.status_code
    return answer.content.decode()


@within("default")
def test_the_admin_shows_and_changes_nothing(place: str) -> None:
    """Found by scope and biz-id, bodies cut, no way to add, change or delete; who has no permission sees none."""
    key = record_key("cards", "p-1").hex()
    InboxRecord.objects.create(record_key=key, kept_until=2**50, redrive=0, attempts=1, completed=1, result=b'"card"')
    with transaction.atomic():
        outbox.add({"payment_id": "p-1", "text": "x" * 5000}, routing_key="q")
    row = OutboxMessage.objects.get()
    client = client_of("looker", "view_inboxrecord", "view_outboxmessage", "view_storerecord")
    assert key in page(client, "inboxrecord", q="cards p-1")
    assert key not in page(client, "inboxrecord", q="cards p-2")
    assert "card" in page(client, "inboxrecord", key, "/change/")
    assert str(row.pk) in page(client, "outboxmessage", q=str(row.inner_msg_id))
    shown = page(client, "outboxmessage", str(row.pk), "/change/")
    assert "bytes)" in shown
    assert "x" * 600 not in shown
    page(client, "storerecord")
    for path in ("inboxrecord/add/", f"outboxmessage/{row.pk}/delete/", "deadmessage/", "quarantinedrecord/"):
        assert client.get(f"/admin/idempotent_bus/{path}").status_code == 403
    assert client.post(f"/admin/idempotent_bus/outboxmessage/{row.pk}/change/", {"state": 2}).status_code == 403
    nobody = client_of("nobody")
    assert nobody.get("/admin/idempotent_bus/inboxrecord/").status_code == 403


@within("default")
def test_dead_rows_are_redriven_and_discarded(place: str) -> None:
    """I12: by who may, with fresh attempts; a message says how many. Who may only look changes nothing."""
    for number in range(3):
        with transaction.atomic():
            outbox.add({"payment_id": f"p-{number}"}, routing_key="q")
    first, second, _ = rows = list(OutboxMessage.objects.order_by("id").values_list("pk", flat=True))
    OutboxMessage.objects.update(state=2, attempts=20)

    def act(client: Client, action: str, *chosen: int) -> str:
        data = {"action": action, "_selected_action": [str(pk) for pk in chosen]}
        return client.post("/admin/idempotent_bus/deadmessage/", data, follow=True).content.decode()

    looker = client_of("looker", "view_deadmessage")
    act(looker, "send_again", *rows)
    act(looker, "discard", *rows)
    assert OutboxMessage.objects.filter(state=2).count() == 3
    changer = client_of("changer", "view_deadmessage", "change_deadmessage")
    assert "1 to be sent again" in act(changer, "send_again", first)
    act(changer, "discard", second)
    assert list(OutboxMessage.objects.order_by("id").values_list("state", "attempts")) == [(0, 0), (2, 20), (2, 20)]
    deleter = client_of("deleter", "view_deadmessage", "delete_deadmessage")
    assert "1 discarded" in act(deleter, "discard", second)
    assert OutboxMessage.objects.count() == 2


@within("default")
def test_quarantine_is_resolved(place: str) -> None:
    """I12: the biz-id is shown to who may resolve, and to nobody else; what was found is written down, and told."""
    kept: Any = store()
    for name in ("p-1", "p-2"):
        key = record_key("cards", name)
        claimed = kept.claim(ClaimRequest(key, b"n" * 16, lease=60, retention=60))
        note = b'{"scope": "cards", "biz_id": "%s", "since": 1, "attempts": 1}' % name.encode()
        assert kept.quarantine(Hold(key, claimed.token, b"n" * 16), note=note)
    kept._engine.dispose()
    looker = client_of("looker", "view_quarantinedrecord")
    shown = page(looker, "quarantinedrecord")
    assert record_key("cards", "p-1").hex() in shown
    assert "p-1" not in shown
    data = {"record": [record_key("cards", "p-1").hex()], "found": "done"}
    assert looker.post("/admin/idempotent_bus/quarantinedrecord/", data).status_code == 403
    resolver = client_of("resolver", "view_quarantinedrecord", "change_quarantinedrecord")
    assert "p-1" in page(resolver, "quarantinedrecord")
    answer = resolver.post("/admin/idempotent_bus/quarantinedrecord/", data, follow=True).content.decode()
    assert "1 resolved: done" in answer
    again = resolver.post("/admin/idempotent_bus/quarantinedrecord/", data, follow=True).content.decode()
    assert "1 were not in quarantine any more" in again
    data = {"record": [record_key("cards", "p-2").hex()], "found": "not_done"}
    resolver.post("/admin/idempotent_bus/quarantinedrecord/", data)
    states = {row.record_key: row.state for row in StoreRecord.objects.all()}
    assert states == {record_key("cards", "p-1").hex(): 3, record_key("cards", "p-2").hex(): 4}
    assert "Nothing is in quarantine" in page(resolver, "quarantinedrecord")


@within("default")
def test_the_brokers_dead_letters(place: str, broker: Broker) -> None:
    """I12: counted, and moved back to their queue by who may."""
    from idempotent_bus.headers import ORIGIN_QUEUE

    queue, dead = broker.queue(), broker.queue("cards.dead")
    with broker.connect() as connection:
        queue(connection.channel()).declare()
    for number in range(3):
        broker.publish(dead, {"payment_id": f"p-{number}"}, headers={ORIGIN_QUEUE: queue.name})
    with with_bus(BROKER=broker.url, DEAD_LETTERS=[f"{broker.unique}.cards"]):
        looker = client_of("looker", "view_deadletterqueue")
        shown = page(looker, "deadletterqueue")
        assert f"<td>{dead.name}</td><td>3</td>" in shown
        assert "Redrive" not in shown
        data = {"queue": dead.name}
        assert looker.post("/admin/idempotent_bus/deadletterqueue/", data).status_code == 403
        changer = client_of("changer", "view_deadletterqueue", "change_deadletterqueue")
        answer = changer.post("/admin/idempotent_bus/deadletterqueue/", data, follow=True).content.decode()
        assert "3 moved" in answer
        other = changer.post("/admin/idempotent_bus/deadletterqueue/", {"queue": queue.name}, follow=True)
        assert "none of IDEMPOTENT_BUS" in other.content.decode()
    assert landed(broker, queue.name, 3) == ["p-0", "p-1", "p-2"]
    assert "needs BROKER" in page(looker, "deadletterqueue")


# --- by itself ------------------------------------------------------------------------------------------


def test_without_django_nothing_of_it_is_imported() -> None:
    """The package, its command line and its halves import no database layer of Django (kombu knows its texts)."""
    code = (
        "import sys, idempotent_bus, idempotent_bus.cli, idempotent_bus.inbox, idempotent_bus.relay\n"
        "sys.exit('django.db' in sys.modules or 'idempotent_bus.django' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_its_absence_is_said(tmp_path: Path) -> None:
    """Without Django the app says which extra to install."""
    (tmp_path / "django.py").write_text("raise ModuleNotFoundError('no', name='django')")
    done = subprocess.run(
        [sys.executable, "-c", "import idempotent_bus.django"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "pip install 'idempotent-bus[django]'" in done.stderr
