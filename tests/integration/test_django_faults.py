"""The Django consumer under faults: lost COMMIT replies, writers that meet, dead connections, SIGKILL."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from django.db import connections
from django.db.models import F
from django.test import TestCase

import django_rig
import servers
from consumer_rig import Broker, make_broker, poll
from django_rig import Card, Charge, environment, within
from idempotent_bus import Backoff, Ended
from idempotent_bus.django import transactional_consumer
from idempotent_bus.identity import record_key
from idempotent_bus.model import Reason
from idempotent_bus.work import Work
from proxy import Proxy

project = pytest.fixture(scope="session")(django_rig.project)
place = pytest.fixture(django_rig.place_of)


class Delivery:
    """How one delivery was answered."""

    def __init__(self) -> None:
        self.acked = 0

    def ack(self) -> None:
        self.acked += 1

    def wait(self, delay: float) -> None:
        return

    def dead_letter(self, reason: Reason, error: str, attempts: int) -> bool:
        raise AssertionError(error)


def work_of(handler: Any, payment: str, run: Any) -> Work:
    key = record_key("cards", payment)
    return Work(scope="cards", biz_id=payment, key=key, run=run, settle=Delivery())


def handler_in(alias: str) -> Any:
    @transactional_consumer(scope="cards", biz_id="payment_id", using=alias, backoff=Backoff(0.01, 0.01))
    def issue(body: Any, message: Any) -> None:
        raise AssertionError

    return issue.executor


@contextlib.contextmanager
def by_way_of(proxy: Proxy, alias: str) -> Iterator[None]:
    entry = connections[alias].settings_dict
    before = entry["HOST"], entry["PORT"]
    connections[alias].close()
    entry["HOST"], entry["PORT"] = "127.0.0.1", proxy.port
    try:
        yield
    finally:
        connections[alias].close()
        entry["HOST"], entry["PORT"] = before


@within("postgresql", "mariadb")
def test_a_commit_reply_that_the_network_lost(place: str) -> None:
    """I2, I15 through a real socket: the reply to COMMIT is swallowed twenty times; one card and one ack each."""
    executor = handler_in(place)
    runs: list[str] = []
    with (
        Proxy(url=servers.postgresql() if place == "postgresql" else servers.mariadb()) as proxy,
        by_way_of(proxy, place),
    ):

        def issue(payment: str) -> None:
            runs.append(payment)
            Card.objects.using(place).create(payment_id=payment)

        executor.handle(work_of(executor, "warm-up", lambda: issue("warm-up")))
        for number in range(20):
            proxy.lose_reply(b"COMMIT")
            work = work_of(executor, str(number), lambda number=number: issue(str(number)))
            while executor.handle(work).how not in (Ended.COMPLETED, Ended.REPLAYED):
                pass
            assert work.settle.acked == 1
        assert proxy.done["lose_reply"] == 20
    cards = sorted(Card.objects.using(place).values_list("payment_id", flat=True))
    assert cards == sorted(["warm-up", *map(str, range(20))])
    assert len(runs) == 21  # nothing ran twice either: the record was met before the handler


@contextlib.contextmanager
def isolated(alias: str, level: str) -> Iterator[None]:
    from psycopg import IsolationLevel

    options = connections[alias].settings_dict["OPTIONS"]
    connections[alias].close()
    options["isolation_level"] = getattr(IsolationLevel, level) if alias == "postgresql" else level.replace("_", " ")
    try:
        yield
    finally:
        connections[alias].close()
        del options["isolation_level"]


@within("postgresql", "mariadb")
@pytest.mark.parametrize("level", ["REPEATABLE_READ", "SERIALIZABLE"])
def test_writers_that_meet(place: str, level: str) -> None:
    """I2: four threads read and write one row: what the database refuses is run again as a whole; every effect once."""
    executor = handler_in(place)
    start = threading.Barrier(4)
    left: list[int] = []

    def act(payment: str) -> None:
        row = Charge.objects.using(place).get(payment_id="sum")
        Charge.objects.using(place).filter(pk=row.pk).update(payment_id=F("payment_id"))
        Card.objects.using(place).create(payment_id=payment)

    def consume(thread: int) -> None:
        start.wait(20)
        for number in range(5):
            payment = f"{thread}-{number}"
            while (work := work_of(executor, payment, lambda payment=payment: act(payment))) is not None:
                if executor.handle(work).how in (Ended.COMPLETED, Ended.REPLAYED):
                    break
                left.append(1)
        connections[place].close()

    with isolated(place, level):
        Charge.objects.using(place).create(payment_id="sum")
        threads = [threading.Thread(target=consume, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    cards = sorted(Card.objects.using(place).values_list("payment_id", flat=True))
    assert cards == sorted(f"{thread}-{number}" for thread in range(4) for number in range(5))


@within("postgresql", "mariadb")
def test_connections_that_died(place: str) -> None:
    """I2: the server ends the session between two messages, and in the middle of one: one card each."""
    executor = handler_in(place)

    def issue(payment: str, *, then_kill: bool = False) -> None:
        Card.objects.using(place).create(payment_id=payment)
        if then_kill and not killed:
            killed.append(1)
            _kill(place)

    killed: list[int] = []
    assert executor.handle(work_of(executor, "a", lambda: issue("a"))).how is Ended.COMPLETED
    _kill(place)
    assert executor.handle(work_of(executor, "b", lambda: issue("b"))).how is Ended.COMPLETED
    for _ in range(3):
        if executor.handle(work_of(executor, "c", lambda: issue("c", then_kill=True))).how is Ended.COMPLETED:
            break
    assert sorted(Card.objects.using(place).values_list("payment_id", flat=True)) == ["a", "b", "c"]


def _kill(alias: str) -> None:
    """End this thread's session from outside."""
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()" if alias == "postgresql" else "SELECT connection_id()")
        number = cursor.fetchone()[0]
    url = servers.postgresql() if alias == "postgresql" else servers.mariadb()
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        text = f"SELECT pg_terminate_backend({number})" if alias == "postgresql" else f"KILL {number}"
        connection.execute(sa.text(text))
    engine.dispose()


@within("default", "postgresql")
@pytest.mark.parametrize("lasting", [0, 60], ids=["closed", "kept"])
def test_old_connections_are_closed_around_messages(place: str, lasting: int) -> None:
    """As around requests: with CONN_MAX_AGE 0 none is left open after a message, and none is used that is too old."""
    executor = handler_in(place)
    entry = connections[place].settings_dict
    before = entry["CONN_MAX_AGE"]
    connections[place].close()
    entry["CONN_MAX_AGE"] = lasting
    try:
        executor.handle(work_of(executor, "a", lambda: Card.objects.using(place).create(payment_id="a") and None))
        earlier = connections[place].connection
        assert (earlier is None) is (lasting == 0)
        connections[place].close_at = 0.0  # long ago
        used: list[Any] = []
        executor.handle(work_of(executor, "b", lambda: used.append(connections[place].connection)))
        assert used[0] is not earlier
    finally:
        entry["CONN_MAX_AGE"] = before


VICTIM = """
import os, signal, sys
import django_rig
from kombu import Connection, Exchange, Queue
from idempotent_bus import IdempotentConsumer
from idempotent_bus.django import transactional_consumer
alias, url, queue, scope, when = sys.argv[1:]

def step(name, function, /, *args, **kwargs):
    if name == when:
        os.kill(os.getpid(), signal.SIGKILL)
    answer = function(*args, **kwargs)
    if f"after {name}" == when:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

@transactional_consumer(scope=scope, biz_id="payment_id", using=alias, step=step)
def issue(body, message):
    django_rig.Card.objects.using(alias).create(payment_id=body["payment_id"])

with Connection(url) as connection:
    IdempotentConsumer(connection, {Queue(queue, Exchange(""), durable=True): issue}).run(idle_timeout=0.5)
"""


WORKER = """
import sys
import django_rig
from django.db import connections
from kombu import Exchange, Queue
from idempotent_bus import IdempotentWorker
from idempotent_bus.django import transactional_consumer
alias, url, queue, scope = sys.argv[1:]

@transactional_consumer(scope=scope, biz_id="payment_id", using=alias)
def issue(body, message):
    django_rig.Card.objects.using(alias).create(payment_id=body["payment_id"])

before = django_rig.Card.objects.using(alias).count()  # the parent's connection, which its children inherit
session = connections[alias].connection
IdempotentWorker(url, {Queue(queue, Exchange(""), durable=True): issue}, processes=2, threads=0).run()
assert connections[alias].connection is session
print(django_rig.Card.objects.using(alias).count())
"""


@pytest.fixture
def broker(unique: str, tmp_path: Path) -> Iterator[Broker]:
    made = make_broker("rabbitmq-classic", unique, tmp_path)
    yield made
    made.clean_up()


@within("postgresql")
def test_a_killed_consumer(place: str, broker: Broker) -> None:
    """I1, I2, I4: SIGKILL after the handler, and between COMMIT and ack: three cards for three messages, none left."""
    queue = broker.queue()
    for payment in ("a", "b", "c"):
        broker.publish(queue, {"payment_id": payment})
    ended = []
    for when in ("after handler", "after commit", "ack", "never"):
        command = [sys.executable, "-c", VICTIM, place, broker.url, queue.name, broker.unique, when]
        ended.append(subprocess.run(command, env=environment(), timeout=60, check=False).returncode)
    assert ended == [-signal.SIGKILL] * 3 + [0]
    assert sorted(Card.objects.using(place).values_list("payment_id", flat=True)) == ["a", "b", "c"]
    assert broker.is_empty(queue.name)
    assert broker.is_empty(broker.dead)


@within("postgresql")
def test_a_worker_whose_parent_has_a_connection(place: str, broker: Broker) -> None:
    """I2: processes that were forked leave their parent's connection alone, and use their own."""
    queue = broker.queue()
    payments = sorted(f"p-{number:02}" for number in range(30))
    for payment in payments:
        broker.publish(queue, {"payment_id": payment})
    command = [sys.executable, "-c", WORKER, place, broker.url, queue.name, broker.unique]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as worker:
        try:
            assert poll(lambda: Card.objects.using(place).count() == len(payments), 30)
        finally:
            worker.send_signal(signal.SIGTERM)
            said, _ = worker.communicate(timeout=30)
    assert (worker.returncode, said) == (0, "30\n")
    assert sorted(Card.objects.using(place).values_list("payment_id", flat=True)) == payments


FORKED = """
import os, sys
import django_rig
from django.db import connections
from idempotent_bus.work import Work
from test_django_faults import handler_in, work_of
alias = sys.argv[1]
executor = handler_in(alias)
django_rig.Card.objects.using(alias).count()
session = connections[alias].connection
children = []
for child in range(2):
    pid = os.fork()
    if not pid:
        for number in range(20):
            payment = f"{child}-{number}"
            issue = lambda: django_rig.Card.objects.using(alias).create(payment_id=payment) and None
            executor.handle(work_of(executor, payment, issue))
        os._exit(0)
    children.append(pid)
assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
assert connections[alias].connection is session
print(django_rig.Card.objects.using(alias).count())
"""


@within("postgresql")
def test_a_fork_leaves_its_parents_connection_alone(place: str) -> None:
    """I2: two children that handle messages at once, in the thread whose connection the parent had opened."""
    path = os.pathsep.join((str(Path(__file__).parent), environment()["PYTHONPATH"]))
    command, around = [sys.executable, "-c", FORKED, place], {**environment(), "PYTHONPATH": path}
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "40\n"), done.stderr


@within("default")
def test_handlers_within_a_test_case(place: str) -> None:
    """In Django's TestCase a handler runs as in production, a copy is a replay, and nothing outlives the test."""
    executor = handler_in(place)

    class Inner(TestCase):
        def test(self) -> None:
            for expected in (Ended.COMPLETED, Ended.REPLAYED):
                issue = work_of(executor, "a", lambda: Card.objects.create(payment_id="a") and None)
                assert executor.handle(issue).how is expected
            failing = work_of(executor, "b", lambda: Card.objects.create(payment_id="b") and 1 // 0)
            assert executor.handle(failing).how is Ended.FAILED
            assert [card.payment_id for card in Card.objects.all()] == ["a"]

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Inner).run(result)
    assert result.wasSuccessful(), result.errors + result.failures
    assert Card.objects.count() == 0
