"""The relay on every database and on brokers with and without an edge: what was committed lands, once, and is forgotten
only then."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from kombu import Exchange, Queue

from consumer_rig import Broker, make_broker, poll
from idempotent_bus import Outbox, Relay, hooks
from idempotent_bus import relay as relaying
from idempotent_bus.dialects import NO_LOITERING
from idempotent_bus.relay import redrive_outbox
from idempotent_bus.relaying import wakeup
from idempotent_bus.relaying.sending import Outcome
from idempotent_bus.watchdog import Watchdog
from outbox_rig import DATABASES, Place, place_of, within
from proxy import Proxy, through

BROKERS = ("ours-sqlite", "ours-redis", "rabbitmq-classic")

place = pytest.fixture(place_of)


@pytest.fixture
def broker(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Broker]:
    made = make_broker(request.param, unique, tmp_path)
    yield made
    made.clean_up()


def on(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("broker", names, indirect=True)


def landed(broker: Broker, queue: Queue, count: int, timeout: float = 5.0) -> list[int]:
    """The payment ids in the queue, in their order; it looks for one more than should be there."""
    found = [message.payload["payment_id"] for message in broker.take(queue.name, count, timeout)]
    return found + [message.payload["payment_id"] for message in broker.take(queue.name, 1000, 0.3)]


@contextlib.contextmanager
def running(*relays: Any) -> Iterator[None]:
    """These relays, each in a thread."""
    threads = [threading.Thread(target=relay.run) for relay in relays]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for relay in relays:
            relay.stop()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        for relay in relays:
            relay.close()


@within(*DATABASES)
@on(*BROKERS)
def test_what_was_committed_lands_and_what_was_rolled_back_never_does(place: Place, broker: Broker) -> None:
    """I1, I3: rows of committed transactions land once, with what they were added with, and are gone from the table."""
    queue = broker.queue()
    with contextlib.suppress(ZeroDivisionError), place.engine.begin() as connection:
        place.pay(connection, 1, routing_key=queue.name)
        raise ZeroDivisionError
    with place.engine.begin() as connection:
        sent = place.pay(connection, 2, routing_key=queue.name, headers={"x": "ü"}, priority=3, correlation_id="c")
    with place.relay(broker, declare=[queue]) as relay:
        counts = relay.run(idle_timeout=0)
    assert (counts.sent, counts.duplicates, counts.refused) == (1, 0, 0)
    (message,) = broker.take(queue.name, 1)
    assert message.payload == {"payment_id": 2}
    assert message.headers["inner-msg-id"] == sent
    assert message.headers["x"] == "ü"
    assert (message.properties["correlation_id"], message.properties.get("delivery_mode", 2)) == ("c", 2)
    assert broker.take(queue.name, 1, 0.2) == []
    assert place.rows() == []


@within(*DATABASES)
@on(*BROKERS)
def test_two_relays_share_the_work(place: Place, broker: Broker) -> None:
    """I1: with two relays at once every row lands, and none is sent twice while their leases hold."""
    queue = broker.queue()
    with place.engine.begin() as connection:
        for number in range(300):
            place.pay(connection, number, routing_key=queue.name, order_by="payment_id" if number % 3 == 0 else None)
    relays = [place.relay(broker, declare=[queue], batch=20, poll_interval=0.05) for _ in range(2)]
    with running(*relays):
        assert poll(lambda: not place.rows(), 30)
    assert sorted(landed(broker, queue, 300)) == list(range(300))


@within(*DATABASES)
@on("ours-sqlite")
def test_a_number_that_a_failover_gave_to_another_message_deletes_nothing(place: Place, broker: Broker) -> None:
    """I1: the mark is lost with its server, and the next one, which never had that row, has given its number to another
    message: what is deleted later is the message that was confirmed, and the other one is sent."""
    queue = broker.queue()
    with place.engine.begin() as connection:
        place.pay(connection, 1, routing_key=queue.name)
    failed = []

    def step(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if name == hooks.MARK and not failed:
            failed.append(name)
            number = place.rows()[0].id
            with place.engine.begin() as connection:
                connection.execute(sa.delete(place.table))
                place.pay(connection, 2, routing_key=queue.name)
            place.change(id=number)
            raise sa.exc.OperationalError("mark", None, Exception("the server is gone"))
        return function(*args, **kwargs)

    with place.relay(broker, declare=[queue], step=step) as relay:
        assert relay.run(idle_timeout=0).sent == 1
    assert landed(broker, queue, 2) == [1, 2]
    assert place.rows() == []


@within("postgresql", "mariadb")  # SQLite has one writer at a time
@on("ours-sqlite")
def test_a_row_that_commits_late_is_sent(place: Place, broker: Broker) -> None:
    """I1: two transactions that commit in the reverse order of their numbers: both are sent, also the one whose number
    and time the relay has long passed."""
    queue = broker.queue()
    with place.relay(broker, declare=[queue], batch=2) as relay:
        for order_by in (None, "payment_id"):
            base = 0 if order_by is None else 10
            early = place.engine.connect()
            place.pay(early, base + 1, routing_key=queue.name, order_by=order_by)
            with place.engine.begin() as late:
                for number in range(2, 7):
                    place.pay(late, base + number, routing_key=queue.name, order_by=order_by)
            assert relay.run(idle_timeout=0).sent == 5
            early.commit()
            early.close()
            assert relay.run(idle_timeout=0).sent == 1
    assert sorted(landed(broker, queue, 12)) == [*range(1, 7), *range(11, 17)]


@within(*DATABASES)
@on("ours-sqlite", "rabbitmq-classic")
def test_rows_of_one_key_land_in_order(place: Place, broker: Broker) -> None:
    """With `order_by` the rows of each key land in the order in which they were added, with two relays as well."""
    queue = broker.queue()
    numbers = range(120)
    with place.engine.begin() as connection:
        for number in numbers:
            place.pay(connection, number, routing_key=queue.name, order_by=lambda body: str(body["payment_id"] % 4))
    relays = [place.relay(broker, declare=[queue], batch=16, poll_interval=0.05) for _ in range(2)]
    with running(*relays):
        assert poll(lambda: not place.rows(), 30)
    found = landed(broker, queue, len(numbers))
    assert len(found) == len(numbers)
    for key in range(4):
        assert [number for number in found if number % 4 == key] == [number for number in numbers if number % 4 == key]


@within(*DATABASES)
@on("rabbitmq-classic")
def test_a_dead_head_blocks_its_key_and_nothing_else(place: Place, broker: Broker) -> None:
    """I12: what cannot be routed is dead after its attempts, is seen, holds up its own key only, and can be redriven or
    discarded; then what waited behind it goes on, in order."""
    queue = broker.queue()
    nowhere = f"{broker.unique}.nowhere"
    with place.engine.begin() as connection:
        place.pay(connection, 1, routing_key=nowhere, order_by=5)
        place.pay(connection, 2, routing_key=queue.name, order_by=5)
        place.pay(connection, 3, routing_key=nowhere)
        place.pay(connection, 4, routing_key=nowhere, order_by=6)
        place.pay(connection, 5, routing_key=queue.name, order_by=6)
        place.pay(connection, 6, routing_key=queue.name)
        place.pay(connection, 7, routing_key=queue.name, order_by=7)
    with place.relay(broker, declare=[queue], max_attempts=2) as relay:
        assert relay.run(idle_timeout=0).sent == 2
        for _ in range(2):
            place.change(due_at=0)
            relay.run(idle_timeout=0)
        dead = relay.dead()
        backlog = relay.backlog()
        assert [row.attempts for row in dead] == [2, 2, 2]
        assert "no queue is bound" in dead[0].last_error
        assert (backlog.dead, backlog.pending) == (3, 2)
        assert relay.discard([dead[0].id]) == 1
        assert relay.run(idle_timeout=0).sent == 1
        assert relay.discard([dead[0].id]) == 0
        found = Queue(nowhere, Exchange(""), durable=True)
        broker.extra.append(nowhere)
        with broker.connect() as connection:
            found(connection.default_channel).declare()
        assert redrive_outbox(place.engine, [dead[1].id], table_prefix=place.prefix) == 1
        assert relay.redrive() == 1
        assert relay.run(idle_timeout=0).sent == 3
    assert sorted(landed(broker, queue, 4)) == [2, 5, 6, 7]
    assert sorted(landed(broker, found, 2)) == [3, 4]
    assert place.rows() == []


@within(*DATABASES)
@on("rabbitmq-classic", "ours-redis")
def test_poison_does_not_hold_up_the_others(place: Place, broker: Broker) -> None:
    """I1, I12: rows that cannot be made a message, or that break the connection, count attempts and die; the rest of
    their batch lands once."""
    queue = broker.queue()
    with place.engine.begin() as connection:
        for number in range(30):
            place.pay(connection, number, routing_key=queue.name)
    spoiled = {4: {"headers": "no json"}, 11: {"options": '{"properties": {"expiration": "x"}}'}, 17: {"options": "[]"}}
    if broker.is_rabbitmq:
        spoiled[20] = {"headers": '{"' + "k" * 300 + '": 1}'}  # a header's name may have 255 bytes: py-amqp raises
    rows = place.rows()
    with place.engine.begin() as connection:
        for index, values in spoiled.items():
            connection.execute(sa.update(place.table).where(place.table.c.id == rows[index].id).values(**values))
    with place.relay(broker, declare=[queue], max_attempts=3, batch=10) as relay:
        for round_ in range(8):
            relay.run(idle_timeout=0)
            place.change(due_at=0)
            with place.engine.begin() as connection:  # others go on being added, which is how a poison is told
                place.pay(connection, 100 + round_, routing_key=queue.name)
        relay.run(idle_timeout=0)
        assert {row.id for row in relay.dead()} == {rows[index].id for index in spoiled}
        assert all(row.last_error for row in relay.dead())
    expected = [number for number in range(30) if number not in spoiled] + list(range(100, 108))
    found = landed(broker, queue, len(expected))
    assert sorted(set(found)) == expected
    if not broker.is_rabbitmq:
        assert len(found) == len(expected)


@within("sqlite", "postgresql")
@on("rabbitmq-classic")
def test_a_broker_that_is_away_costs_no_attempt(place: Place, broker: Broker) -> None:
    """I1, I13: while the broker is down rows stay, untouched and uncounted, and once it is back they land."""
    queue = broker.queue()
    broker.publish(queue, {"payment_id": -1})
    with Proxy(url=broker.url) as proxy:
        relay = place.relay(through(proxy, broker.url), max_attempts=1, poll_interval=0.05, confirm_timeout=0.5)
        proxy.refuse()
        with place.engine.begin() as connection:
            for number in range(20):
                place.pay(connection, number, routing_key=queue.name)
        with running(relay):
            time.sleep(1.5)
            assert [row.attempts for row in place.rows()] == [0] * 20
            proxy.accept_again()
            assert poll(lambda: not place.rows(), 20)
    assert sorted(landed(broker, queue, 21)) == list(range(-1, 20))


@within("sqlite", "postgresql")
@on("rabbitmq-classic", "ours-redis")
def test_a_lost_confirm_is_settled_by_sending_again(place: Place, broker: Broker) -> None:
    """I5, I15: a batch whose confirms are eaten is sent again under the same ids; no row is marked before."""
    queue = broker.queue()
    with place.engine.begin() as connection:
        sent = [place.pay(connection, number, routing_key=queue.name) for number in range(10)]
    real = broker.url
    with Proxy(url=real.replace("idempotent-", "")) as proxy:
        broker.url = through(proxy, real)
        proxy.lose_reply(sent[3].encode())
        with place.relay(broker, declare=[queue], confirm_timeout=1) as relay:
            relay.run(idle_timeout=0.3)
        broker.url = real
        assert proxy.done["lose_reply"] == 1
    assert poll(lambda: not place.rows(), 10)
    found = [message.headers["inner-msg-id"] for message in broker.take(queue.name, 30, 1.0)]
    assert set(found) == set(sent)
    if not broker.is_rabbitmq:
        assert len(found) == 10


@within("postgresql", "mariadb")
@on("ours-redis")
@pytest.mark.parametrize("commits", [True, False], ids=["committed", "not committed"])
def test_a_lost_answer_to_the_marks_commit(place: Place, broker: Broker, commits: bool) -> None:
    """I15: the deletion whose COMMIT got no answer is repeated, whether it was done or not; nothing lands twice."""
    queue = broker.queue()
    with place.engine.begin() as connection:
        for number in range(5):
            place.pay(connection, number, routing_key=queue.name)
    request = b"COMMIT\0" if place.name == "postgresql" else b"\x03COMMIT"
    with Proxy(url=place.url) as proxy:
        direct, place.engine = place.engine, sa.create_engine(through(proxy, place.url))

        def step(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if name == hooks.MARK:
                (proxy.lose_reply if commits else proxy.lose_request)(request)
            return function(*args, **kwargs)

        with place.relay(broker, declare=[queue], step=step) as relay:
            place.engine = direct
            with pytest.raises(sa.exc.DBAPIError):
                relay.run_once()
            assert len(place.rows()) == (0 if commits else 5)
            assert relay.run_once().claimed == 0
    assert place.rows() == []
    assert sorted(landed(broker, queue, 5)) == list(range(5))


@within(*DATABASES)
@on("ours-redis")
def test_a_relay_that_died_holds_rows_up_for_its_lease_only(place: Place, broker: Broker) -> None:
    """I1, I13: rows claimed, or sent and not marked, by a relay that vanished come back, and land once all the same."""
    queue = broker.queue()
    with place.engine.begin() as connection:
        for number in range(6):
            place.pay(connection, number, routing_key=queue.name, order_by=number % 2)

    class Gone(BaseException):
        pass

    for dies_at in (hooks.READ, hooks.CONFIRM):

        def step(name: str, function: Callable[..., Any], /, *args: Any, at: str = dies_at, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if name == at:
                raise Gone
            return result

        with place.relay(broker, declare=[queue], lease=1, step=step) as relay, pytest.raises(Gone):
            relay.run_once()
        with place.relay(broker, declare=[queue]) as another:
            assert another.run(idle_timeout=0).sent == 0
            time.sleep(1.1)
    with place.relay(broker, declare=[queue]) as another:
        counts = another.run(idle_timeout=0)
        assert (counts.sent, counts.duplicates) == (6, 1)  # after the first death each went alone: one had landed
    found = landed(broker, queue, 6)
    assert [number for number in found if number % 2] == [1, 3, 5]
    assert sorted(found) == list(range(6))


@within("postgresql")
@on("ours-redis")
def test_a_commit_wakes_the_relay(place: Place, broker: Broker) -> None:
    """A relay that sleeps is woken by the commit, long before its next look; one that works costs writers no NOTIFY."""
    queue = broker.queue()
    relay = place.relay(broker, declare=[queue], poll_interval=30)
    with running(relay):
        assert poll(lambda: relay._wakeup.guarded, 5)
        for number in range(5):
            began = time.monotonic()
            with place.engine.begin() as connection:
                place.pay(connection, number, routing_key=queue.name)
            assert poll(lambda: not place.rows(), 5)
            assert time.monotonic() - began < 3
            assert poll(lambda: relay._wakeup.guarded, 5)
    assert landed(broker, queue, 5) == list(range(5))


@within("postgresql")
@on("ours-redis")
def test_no_wake_up_is_lost_between_looking_and_sleeping(place: Place, broker: Broker) -> None:
    """I1: a row committed after the relay's last look and before it asked to be woken is found by its second look; one
    whose writer was under way at that moment is found without a NOTIFY. The relay would otherwise sleep for a minute.
    """
    queue = broker.queue()
    relay = place.relay(broker, declare=[queue], poll_interval=60)
    guard = relay._wakeup.guard
    asked: list[bool] = []
    writer = place.engine.connect()

    def guard_a_moment_later() -> bool:
        if not asked:
            with place.engine.begin() as connection:
                place.pay(connection, 1, routing_key=queue.name)
        elif len(asked) == 1:
            place.pay(writer, 2, routing_key=queue.name)
        asked.append(guard())
        if len(asked) == 3:
            writer.commit()
        return asked[-1]

    relay._wakeup.guard = guard_a_moment_later  # type: ignore[method-assign]
    with contextlib.closing(writer), running(relay):
        assert poll(lambda: len(asked) > 3 and not place.rows(), 5)
        assert poll(lambda: asked[-1], 5)
    assert asked[:4] == [True, False, False, True]
    assert landed(broker, queue, 2) == [1, 2]


@within("postgresql")
@on("ours-redis")
def test_without_its_listening_connection_it_polls(place: Place, broker: Broker) -> None:
    """I13: a LISTEN that was cut off costs time only."""
    queue = broker.queue()
    relay = place.relay(broker, declare=[queue], poll_interval=0.2)
    with running(relay):
        assert poll(lambda: relay._wakeup.guarded, 5)
        with place.engine.begin() as connection:
            pid = relay._wakeup._driver.info.backend_pid
            connection.execute(sa.text(f"SELECT pg_terminate_backend({pid})"))
        with place.engine.begin() as connection:
            place.pay(connection, 1, routing_key=queue.name)
        assert poll(lambda: not place.rows(), 5)
        assert poll(lambda: relay._wakeup.guarded, 10)
    assert landed(broker, queue, 1) == [1]


@within(*DATABASES)
@on("ours-sqlite")
def test_a_delay_is_kept(place: Place, broker: Broker) -> None:
    """A row is sent no earlier than its delay says, one with an order key too."""
    queue = broker.queue()
    with place.engine.begin() as connection:
        place.pay(connection, 1, routing_key=queue.name, delay=60)
        place.pay(connection, 2, routing_key=queue.name, order_by=1)
        place.pay(connection, 3, routing_key=queue.name, order_by=1, delay=60)
    with place.relay(broker, declare=[queue]) as relay:
        assert relay.run(idle_timeout=0).sent == 1
        assert relay.backlog().delayed == 2
        place.change(due_at=0)
        assert relay.run(idle_timeout=0).sent == 2
    assert landed(broker, queue, 3)[0] == 2


@within("sqlite")
@on("rabbitmq-classic")
def test_an_exchange_that_was_given_is_declared(place: Place, broker: Broker) -> None:
    """An Exchange object is declared with its type before the first message goes there; a name is not."""
    exchange = Exchange(f"{broker.unique}.topics", "topic", durable=True)
    queue = broker.queue("bound", exchange, "paid.#")
    with place.engine.begin() as connection:
        place.pay(connection, 1, exchange=f"{broker.unique}.missing", routing_key="x")
        place.pay(connection, 2, exchange=exchange, routing_key="paid.card")
    with place.relay(broker) as relay:
        assert relay.run(idle_timeout=0).refused == 2
        missing, unbound = place.rows()
        assert "the exchange is missing" in missing.last_error
        assert "no queue is bound" in unbound.last_error
        with broker.connect() as connection:
            queue(connection.default_channel).declare()
            place.change(due_at=0)
            assert relay.run(idle_timeout=0).sent == 1
            exchange(connection.default_channel).delete()
    assert landed(broker, queue, 1) == [2]


@within(*DATABASES)
@on("ours-redis")
def test_every_isolation_level(place: Place, broker: Broker) -> None:
    """The relay does its work whatever the engine's isolation level is, while others write."""
    queue = broker.queue()
    levels = ["SERIALIZABLE"] if place.name == "sqlite" else ["REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"]
    sent = 0
    for level in levels:
        other = sa.create_engine(place.url, isolation_level=level)
        mine, place.engine = place.engine, other
        relays = [place.relay(broker, declare=[queue], batch=5, poll_interval=0.02) for _ in range(2)]
        place.engine = mine
        with running(*relays):
            for _ in range(20):
                with mine.begin() as connection:
                    place.pay(connection, sent, routing_key=queue.name)
                    sent += 1
            assert poll(lambda: not place.rows(), 20)
        other.dispose()
    assert sorted(landed(broker, queue, sent)) == list(range(sent))


@within("sqlite")
@on("ours-sqlite")
def test_the_control_a_relay_that_marks_first_loses(place: Place, broker: Broker) -> None:
    """The control of I5: the same relay, but deleting before it sends, loses what was under way when it dies."""
    queue = broker.queue()
    with place.engine.begin() as connection:
        for number in range(5):
            place.pay(connection, number, routing_key=queue.name)

    class Gone(BaseException):
        pass

    def step(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if name == hooks.CONFIRM:
            with place.engine.begin() as connection:
                connection.execute(sa.delete(place.table))
            raise Gone
        return function(*args, **kwargs)

    with place.relay(broker, declare=[queue], step=step) as relay, pytest.raises(Gone):
        relay.run_once()
    with place.relay(broker, declare=[queue]) as another:
        another.run(idle_timeout=0)
    assert landed(broker, queue, 0, 0.1) == []


def _told(act: Callable[[], Any], seconds: float) -> tuple[threading.Thread, list[Any]]:
    """A thread that does it, waited for so long; what it gave or raised, if it has come to its end."""
    told: list[Any] = []

    def run() -> None:
        try:
            told.append(act())
        except sa.exc.SQLAlchemyError as error:
            told.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return thread, told


@within("postgresql", "mariadb")
@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("how", ["claim", "count", "asleep"])
def test_a_database_that_falls_silent_does_not_hold_the_relay_for_ever(
    place: Place, monkeypatch: pytest.MonkeyPatch, how: str, watched: bool
) -> None:
    """Frozen, not closed: it is told in time, tries again, and ends when asked. The control: drivers wait on."""
    monkeypatch.setattr(relaying, "_PATIENCE", 1.0)
    monkeypatch.setattr(relaying, "_LONGEST_COUNT", 1.0)
    monkeypatch.setattr(wakeup, "_ASK", 0.5)
    if not watched:
        monkeypatch.setattr(Watchdog, "start", lambda *_: 0)
    with Proxy(url=place.url) as proxy:
        engine = sa.create_engine(through(proxy, place.url), connect_args={"connect_timeout": 2})
        relay = Relay(engine, "memory://", table_prefix=place.prefix, lease=1.0, poll_interval=0.1)
        relay.run_once()
        if how == "asleep":
            thread, told = _told(relay.run, 1.0)
            proxy.stall()
            time.sleep(0.5)
            relay.stop()
            thread.join(6 if watched else 3)
        else:
            proxy.stall()
            thread, told = _told(relay.run_once if how == "claim" else relay.backlog, 6 if watched else 3)
        assert thread.is_alive() is not watched
        if watched and how != "asleep":
            assert isinstance(told[0], sa.exc.OperationalError)
            proxy.resume()
            assert relay.run_once().exhausted
        proxy.refuse()
        proxy.cut()
        proxy.resume()
        thread.join(10)
        relay.close()
        engine.dispose()


@within("postgresql", "mariadb")
@on("ours-sqlite")
@pytest.mark.parametrize("settled", [True, False])
def test_a_relay_that_was_stopped_in_its_transaction_does_not_keep_the_rows(
    place: Place, broker: Broker, monkeypatch: pytest.MonkeyPatch, settled: bool
) -> None:
    """Its machine vanished, or it was frozen, with a batch locked: the server ends the transaction, and another relay
    sends the rows. The control: else they stay locked, and SKIP LOCKED passes them over for ever."""
    queue = broker.queue()
    statements = {name: text.replace("30000", "1000").replace("= 30 ", "= 1 ") for name, text in NO_LOITERING.items()}
    if not settled:
        statements = dict.fromkeys(statements, "SELECT 1")
    monkeypatch.setattr(relaying, "NO_LOITERING", statements)
    monkeypatch.setattr(relaying, "_NO_LOITERING", statements["postgresql"].replace("SESSION", "LOCAL"))
    with place.engine.begin() as connection:
        place.pay(connection, 1, routing_key=queue.name)
    stopped = place.relay(broker)
    with place.relay(broker) as other, contextlib.suppress(sa.exc.DBAPIError), stopped._transaction() as connection:
        assert stopped._claimer is not None
        assert len(stopped._claimer.claim(connection, 10, 30.0)) == 1
        assert other.run_once().sent == 0
        deadline = time.monotonic() + 4
        sent = 0
        while not sent and time.monotonic() < deadline:
            time.sleep(0.2)
            sent = other.run_once().sent
        assert sent == settled
    stopped.close()


@within("postgresql")
def test_an_error_in_any_letters_is_noted_in_any_encoding(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the database is not in UTF-8: what the broker says must not end the relay (UnicodeEncodeError did)."""
    name = f"{place.prefix}latin1"
    everything = place.engine.execution_options(isolation_level="AUTOCOMMIT")
    with everything.connect() as connection:
        connection.exec_driver_sql(
            f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
        )
    engine = sa.create_engine(place.engine.url.set(database=name))
    try:
        outbox = Outbox(engine)
        with engine.begin() as connection:
            outbox.add(connection, {"n": 1}, routing_key="nowhere")
        monkeypatch.setattr(relaying, "send", lambda _, rows, *__, **___: Outcome(refused=[(rows[0], "отказано")]))
        with Relay(engine, "memory://", max_attempts=1) as relay:
            assert relay.run_once().refused == 1
            assert "u043e" in relay.dead()[0].last_error
    finally:
        engine.dispose()
        with everything.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name}")


@within("postgresql", "mariadb")
def test_a_relay_leaves_a_server_that_became_a_standby(place: Place) -> None:
    """After a failover the server that was the primary refuses all writes, for ever: the next pass is on a new
    connection, which may lead to the new primary."""
    read_only = "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"
    if place.name == "mariadb":
        read_only = "SET SESSION TRANSACTION READ ONLY"
    with place.relay("memory://") as relay:
        relay.run_once()
        assert relay._connection is not None
        relay._connection.exec_driver_sql(read_only)
        relay._connection.commit()
        with pytest.raises(sa.exc.DBAPIError):
            relay.run_once()
        assert relay.run_once().exhausted
