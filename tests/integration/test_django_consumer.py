"""Handlers in `transaction.atomic`, with their records: on SQLite, PostgreSQL and MariaDB."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError, connections, transaction

import django_rig
from consumer_rig import Broker, make_broker
from django_rig import Card, Charge, within
from idempotent_bus import Backoff, ConfigurationError, Ended, Event, EventKind, IdempotentConsumer
from idempotent_bus.django import inbox, outbox, transactional_consumer
from idempotent_bus.django.models import InboxRecord, OutboxMessage
from idempotent_bus.hooks import ACK, COMMIT, HANDLER

project = pytest.fixture(scope="session")(django_rig.project)
place = pytest.fixture(django_rig.place_of)


@pytest.fixture
def broker(unique: str, tmp_path: Path) -> Iterator[Broker]:
    made = make_broker("memory", unique, tmp_path)
    yield made
    made.clean_up()


class Bench:
    """One guarded handler, fed through a broker in memory, and what it was told and did."""

    def __init__(self, broker: Broker, alias: str, act: Callable[[Any], Any] | None = None, **options: Any) -> None:
        self.broker, self.alias, self.act = broker, alias, act
        self.queue = broker.queue()
        self.events: list[Event] = []
        self.runs = 0
        options = {"max_attempts": 3, "backoff": Backoff(0.01, 0.01), "busy_delay": 0.05, **options}
        decorate = transactional_consumer(
            scope=broker.unique, biz_id="payment_id", using=alias, listener=self, **options
        )
        self.handler = decorate(self._issue)

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def _issue(self, body: Any, message: Any) -> Any:
        self.runs += 1
        Card.objects.using(self.alias).create(payment_id=body["payment_id"])
        return self.act(body) if self.act is not None else "issued"

    def send(self, *payments: str) -> None:
        for payment in payments:
            self.broker.publish(self.queue, {"payment_id": payment})

    def consume(self, prefetch: int = 100, idle: float = 0.1) -> None:
        with self.broker.connect() as connection:
            IdempotentConsumer(connection, {self.queue: self.handler}, prefetch=prefetch).run(idle_timeout=idle)

    @property
    def cards(self) -> list[str]:
        return sorted(Card.objects.using(self.alias).values_list("payment_id", flat=True))

    @property
    def kinds(self) -> list[EventKind]:
        return [event.kind for event in self.events]

    def dead(self) -> list[Any]:
        return self.broker.take(f"{self.broker.unique}.dead", 10, 0.1)


@within()
@pytest.mark.parametrize("prefetch", [1, 100], ids=["singly", "window"])
def test_one_effect_for_each_id(place: str, broker: Broker, prefetch: int) -> None:
    """I2, I3: three copies of each of twenty messages, in windows and singly: one card each, and one record."""
    bench = Bench(broker, place)
    for _ in range(3):
        bench.send(*(f"p-{number:02}" for number in range(20)))
    bench.consume(prefetch)
    assert bench.cards == [f"p-{number:02}" for number in range(20)]
    assert bench.kinds.count(EventKind.COMPLETED) == 20
    assert bench.kinds.count(EventKind.REPLAYED) == 40
    assert InboxRecord.objects.using(place).filter(completed=1).count() == 20
    assert not connections[place].in_atomic_block


@within()
@pytest.mark.parametrize("prefetch", [1, 100], ids=["singly", "window"])
def test_what_a_handler_raises_takes_back_its_rows_and_no_others(place: str, broker: Broker, prefetch: int) -> None:
    """I3, I12: its card, its outbox row and its hook go, the others' stay; its attempts are counted; then dead."""
    hooks: list[str] = []

    def act(body: Any) -> None:
        payment = body["payment_id"]
        outbox.add({"payment_id": payment}, routing_key="q", using=place)
        transaction.on_commit(lambda: hooks.append(payment), using=place)
        if payment == "bad":
            raise ZeroDivisionError

    bench = Bench(broker, place, act)
    bench.send("a", "bad", "c")
    bench.consume(prefetch)
    assert bench.cards == ["a", "c"]
    assert sorted(hooks) == ["a", "c"]
    assert OutboxMessage.objects.using(place).count() == 2
    assert len(bench.dead()) == 1
    assert bench.runs == 2 + 3
    assert InboxRecord.objects.using(place).filter(completed=0, attempts=3).count() == 1


@within()
def test_nested_blocks_roll_back_their_part(place: str, broker: Broker) -> None:
    """I3: an inner atomic block that fails takes back its outbox row and its hook; the rest is committed."""
    hooks: list[str] = []

    def act(body: Any) -> None:
        outbox.add({"payment_id": "outer"}, routing_key="q", using=place)
        with transaction.atomic(using=place):
            outbox.add({"payment_id": "kept"}, routing_key="q", using=place)
        with contextlib.suppress(IntegrityError), transaction.atomic(using=place):
            outbox.add({"payment_id": "taken back"}, routing_key="q", using=place)
            Charge.objects.using(place).create(payment_id="x")
            transaction.on_commit(lambda: hooks.append("never"), using=place)
            Charge.objects.using(place).create(payment_id="x")

    bench = Bench(broker, place, act)
    bench.send("a")
    bench.consume()
    assert bench.cards == ["a"]
    assert hooks == []
    bodies = [bytes(row.body) for row in OutboxMessage.objects.using(place).order_by("id")]
    assert bodies == [b'{"payment_id": "outer"}', b'{"payment_id": "kept"}']
    assert Charge.objects.using(place).count() == 0


#: What makes Django, or the database, roll back although the handler returns.
SWALLOWED: dict[str, Callable[[str], None]] = {}


def swallowed(function: Callable[[str], None]) -> Callable[[str], None]:
    SWALLOWED[function.__name__] = function
    return function


@swallowed
def set_rollback(alias: str) -> None:
    transaction.set_rollback(True, using=alias)


@swallowed
def an_error_in_save(alias: str) -> None:
    Charge.objects.using(alias).create(payment_id="twice")
    with contextlib.suppress(IntegrityError):
        Charge.objects.using(alias).create(payment_id="twice")
    if alias == "mariadb":
        set_rollback(alias)  # an error ends no transaction there; Django's flag does


@swallowed
def a_lost_connection(alias: str) -> None:
    connections[alias].close()


@within()
@pytest.mark.parametrize("how", SWALLOWED)
def test_a_quiet_rollback_is_never_acked(place: str, broker: Broker, how: str) -> None:
    """I3, I4: where Django would roll back without a word, the handler has failed: no ack, no effect, a dead letter."""
    bench = Bench(broker, place, lambda body: SWALLOWED[how](place))
    bench.send("a")
    bench.consume()
    assert bench.cards == []
    assert EventKind.COMPLETED not in bench.kinds
    assert len(bench.dead()) == 1
    assert not connections[place].in_atomic_block


@within()
def test_a_raw_commit_is_found_out(place: str, broker: Broker) -> None:
    """I2: a handler that commits on its own is told so, and is not run again, since a part of it is done."""

    def act(body: Any) -> None:
        with connections[place].cursor() as cursor:
            cursor.execute("COMMIT")

    bench = Bench(broker, place, act)
    bench.send("a")
    bench.consume()
    assert bench.cards == ["a"]
    assert bench.runs == 1
    assert EventKind.COMPLETED not in bench.kinds
    assert len(bench.dead()) == 1


@within()
def test_a_hook_that_raises_changes_nothing(place: str, broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    """I2, I4: it runs after the commit, so the message is done and acked; the error is logged."""

    def act(body: Any) -> None:
        transaction.on_commit(lambda: 1 // 0, using=place)

    bench = Bench(broker, place, act)
    bench.send("a")
    bench.consume()
    assert bench.cards == ["a"]
    assert bench.runs == 1
    assert bench.kinds.count(EventKind.COMPLETED) == 1
    assert "on_commit hook" in caplog.text
    assert bench.dead() == []


def lost(times: int, *, after: bool) -> Callable[..., Any]:
    """A step whose COMMITs are done, or not, and whose connection breaks either way."""
    left = [times]

    def step(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if name != COMMIT or not left[0]:
            return function(*args, **kwargs)
        left[0] -= 1
        borrowed = function.__self__.connection
        original = borrowed.django._commit

        def broken() -> None:
            if after:
                original()
            raise OperationalError("server closed the connection")

        borrowed.django._commit = broken
        try:
            return function(*args, **kwargs)
        finally:
            del borrowed.django._commit

    return step


@within()
@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
def test_a_commit_whose_reply_was_lost(place: str, broker: Broker, after: bool) -> None:
    """I15: whether the COMMIT was done or not, the outcome is learnt by inserting again: one card, one ack."""
    bench = Bench(broker, place, step=lost(1, after=after))
    bench.send("a")
    bench.consume(prefetch=1)
    assert bench.cards == ["a"]
    assert bench.runs == (1 if after else 2)
    assert bench.dead() == []


@within("postgresql", "mariadb")
def test_deadlocks_run_the_whole_again(place: str, broker: Broker) -> None:
    """I2: two handlers that lock two rows in opposite orders: one is rolled back and runs again; one effect each."""
    for name in ("x", "y"):
        Charge.objects.using(place).create(payment_id=name)
    both = threading.Barrier(2)
    met: list[int] = []

    def act(body: Any) -> None:
        first, second = body["payment_id"]
        Charge.objects.using(place).select_for_update().get(payment_id=first)
        if not met or len(met) < 2:
            met.append(1)
            both.wait(10)
        Charge.objects.using(place).select_for_update().get(payment_id=second)

    bench = Bench(broker, place, act)
    bench.send("xy", "yx")

    def consume() -> None:
        bench.consume(prefetch=1)
        connections[place].close()

    threads = [threading.Thread(target=consume) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert bench.cards == ["xy", "yx"]
    assert bench.runs == 3
    assert bench.dead() == []
    assert EventKind.RELEASED not in bench.kinds  # it cost no attempt


@within()
def test_ack_follows_the_commit(place: str, broker: Broker) -> None:
    """I4: whoever looks from another connection at the moment of the ack sees the card."""
    steps: list[tuple[str, int]] = []

    def seen() -> int:
        count: list[int] = []

        def look() -> None:
            count.append(Card.objects.using(place).count())
            connections[place].close()

        thread = threading.Thread(target=look)
        thread.start()
        thread.join(10)
        return count[0]

    def step(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if name in (HANDLER, ACK):
            steps.append((name, seen()))
        return function(*args, **kwargs)

    bench = Bench(broker, place, step=step)
    bench.send("a")
    bench.consume(prefetch=1)
    assert steps == [(HANDLER, 0), (ACK, 1)]


@within("default")
def test_a_consumer_within_a_block_refuses(place: str, broker: Broker) -> None:
    """I4: within a block of somebody else's the commit would not be one: nothing runs, and the error says why."""
    bench = Bench(broker, place)
    bench.send("a")
    with transaction.atomic(using=place), pytest.raises(ConfigurationError, match=r"within transaction\.atomic"):
        bench.consume(prefetch=1)
    assert bench.runs == 0


@within("default")
def test_autocommit_off_refuses(place: str, broker: Broker) -> None:
    """I4: with AUTOCOMMIT False Django's atomic does not commit: nothing runs."""
    bench = Bench(broker, place)
    bench.send("a")
    connection = connections[place]
    connection.settings_dict["AUTOCOMMIT"] = False  # else Django drops the connection as being not as it was
    connection.set_autocommit(False)
    try:
        with pytest.raises(ConfigurationError, match="AUTOCOMMIT False"):
            bench.consume(prefetch=1)
    finally:
        connection.settings_dict["AUTOCOMMIT"] = True
        connection.rollback()
        connection.set_autocommit(True)
    assert bench.runs == 0


@within("default")
def test_methods_and_names(place: str, broker: Broker) -> None:
    """A handler may be a method, and says what is wrong with it when it is made."""

    class Service:
        @transactional_consumer(scope="cards", biz_id="payment_id", using=place)
        def issue(self, body: Any, message: Any) -> str:
            """Issue it."""
            return f"{type(self).__name__} {body['payment_id']}"

    assert Service().issue.__wrapped__(Service(), {"payment_id": "a"}, None) == "Service a"
    queue = broker.queue()
    broker.publish(queue, {"payment_id": "a"})
    (message,) = [m for m in [_fetch(broker, queue.name)] if m]
    ending = Service().issue.handle(message.payload, message)
    assert (ending.how, ending.value) == (Ended.COMPLETED, "Service a")
    with pytest.raises(ConfigurationError, match="DATABASES has no 'elsewhere'"):
        transactional_consumer(scope="cards", biz_id="payment_id", using="elsewhere")


def _fetch(broker: Broker, name: str) -> Any:
    channel = broker.connect().channel()
    message = channel.basic_get(name, no_ack=False)
    return message if message is None or hasattr(message, "payload") else channel.message_to_python(message)


# --- without a consumer ---------------------------------------------------------------------------------


@within()
def test_record_within_a_block(place: str) -> None:
    """I2, I3: the first says go on, every later one says done; a block that is rolled back leaves no record."""
    with contextlib.suppress(ZeroDivisionError), transaction.atomic(using=place):
        assert inbox.record("cards", "a", using=place)
        raise ZeroDivisionError
    for expected in (True, False, False):
        with transaction.atomic(using=place):
            assert inbox.record("cards", "a", using=place, fingerprint={"id": "a"}) is expected
    with transaction.atomic(using=place):
        with contextlib.suppress(ZeroDivisionError), transaction.atomic(using=place):
            assert inbox.record("cards", "b", using=place)
            raise ZeroDivisionError
        assert inbox.record("cards", "b", using=place)
    assert InboxRecord.objects.using(place).count() == 2
    with pytest.raises(ConfigurationError, match=r"outside of transaction\.atomic"):
        inbox.record("cards", "c", using=place)
