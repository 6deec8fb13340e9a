"""The SQL transport through kombu's own producers and consumers, in one process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from kombu import Connection

from idempotent_bus import IdempotentConsumer, idempotent_consumer
from idempotent_bus.errors import Unroutable
from idempotent_bus.model import Landing
from idempotent_bus.stores.memory import MemoryStore
from idempotent_bus.transports.sql import tables
from idempotent_bus.transports.sql.database import open_database
from idempotent_bus.transports.sql.edge import Edge
from idempotent_bus.transports.sql.transport import dead_letters, restore
from idempotent_bus.work import Ended
from sql_bus import DIALECTS, Bus, deliveries, drop, lines, open_bus


@pytest.fixture(params=DIALECTS)
def bus(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Bus]:
    bus = open_bus(request.param, unique, tmp_path)
    yield bus
    drop(bus)


@pytest.fixture
def connection(bus: Bus) -> Iterator[Connection]:
    with bus.connect() as connection:
        yield connection


def bodies(messages: Any) -> list[Any]:
    return [message.payload for message in messages]


def taken(connection: Connection, bus: Bus, **kwargs: Any) -> list[Any]:
    result = []
    for message in deliveries(connection, bus.queue, **kwargs):
        result.append(message.payload)
        message.ack()
    return result


def test_second_copy_is_refused(bus: Bus, connection: Connection) -> None:
    """A resend of the same inner-msg-id says `duplicate` and leaves one message."""
    assert bus.publish(connection, {"n": 1}, "a") is Landing.LANDED
    assert bus.publish(connection, {"n": 1}, "a") is Landing.DUPLICATE
    assert bus.publish(connection, {"n": 2}, "b") is Landing.LANDED
    assert taken(connection, bus) == [{"n": 1}, {"n": 2}]


def test_without_an_id_every_publish_lands(bus: Bus, connection: Connection) -> None:
    """The control: what has no inner-msg-id lands as in kombu, twice."""
    assert [bus.publish(connection, 1), bus.publish(connection, 1)] == [Landing.LANDED] * 2
    assert taken(connection, bus) == [1, 1]


def test_a_message_is_still_refused_when_it_was_consumed(bus: Bus, connection: Connection) -> None:
    """The edge remembers a message that is long gone from its queue."""
    bus.publish(connection, 1, "a")
    assert taken(connection, bus) == [1]
    assert bus.publish(connection, 1, "a") is Landing.DUPLICATE
    assert taken(connection, bus) == []


def test_mandatory_without_a_route(bus: Bus, connection: Connection) -> None:
    """`mandatory` without a queue raises and stores nothing; without it nothing is claimed."""
    for exchange, key in (("", "nowhere"), ("unknown", "paid")):
        with pytest.raises(Unroutable) as caught:
            bus.publish(connection, 1, "a", exchange=exchange, routing_key=key, mandatory=True, declare=[])
        assert caught.value.inner_msg_id == "a"
    assert bus.publish(connection, 1, "a", exchange="unknown", declare=[]) is None
    assert bus.count("message") == bus.count("landed") == 0


def test_two_queues_are_one_commit_with_a_tag_each(bus: Bus, connection: Connection) -> None:
    """A publish to two queues lands in both; acking one leaves the other's copy alone; a requeue goes to its own."""
    publish = {"declare": [bus.queue, bus.other]}
    assert bus.publish(connection, 1, "a", **publish) is Landing.LANDED
    assert bus.publish(connection, 1, "a", **publish) is Landing.DUPLICATE
    cards = next(deliveries(connection, bus.queue))
    mails = next(deliveries(connection, bus.other))
    assert cards.delivery_tag != mails.delivery_tag
    cards.ack()
    assert bus.count("held") == 1
    mails.requeue()
    assert bodies(deliveries(connection, bus.queue)) == []
    again = next(deliveries(connection, bus.other))
    assert again.payload == 1
    assert again.delivery_info["redelivered"] is True
    assert again.headers["x-delivery-count"] == 1
    again.ack()
    assert bus.count("held") == bus.count("message") == 0


def test_a_queue_bound_later_gets_the_resend(bus: Bus, connection: Connection) -> None:
    """Marks are by queue: a resend lands where the first copy did not."""
    bus.publish(connection, 1, "a")
    assert bus.publish(connection, 1, "a", declare=[bus.queue, bus.other]) is Landing.LANDED
    assert bus.count("message") == 2


def test_order_is_kept(bus: Bus, connection: Connection) -> None:
    """Messages come in the order in which they landed, singly or many at a time."""
    for n in range(60):
        bus.publish(connection, n, str(n))
    first = deliveries(connection, bus.queue, prefetch=1)
    assert [message.ack() or message.payload for _, message in zip(range(5), first, strict=False)] == [*range(5)]
    first.close()
    assert taken(connection, bus, prefetch=100) == [*range(5, 60)]


_PLAIN = """
with bus.plain() as plain:
    bus.publish(plain, {"from": "plain"})
    for message in deliveries(plain, bus.other):
        print(message.payload["from"])
        message.ack()
"""


def test_plain_kombu_shares_the_queue(bus: Bus, connection: Connection) -> None:
    """A plain producer's message is consumed by us, ours by a plain consumer, over the same tables."""
    # In a process of its own, because kombu keeps the first table names that a process used.
    bus.publish(connection, {"from": "us"}, "a", declare=[bus.other])
    assert lines(bus.program(_PLAIN)) == ["us"]
    assert taken(connection, bus) == [{"from": "plain"}]
    assert list(deliveries(connection, bus.other)) == []


def test_plain_kombu_may_come_first(bus: Bus) -> None:
    """Tables that kombu made are used as they are, and get the index that finds the next message."""
    assert (
        lines(
            bus.program("""
with bus.plain() as plain:
    bus.publish(plain, 1)
""")
        )
        == []
    )
    with bus.connect() as connection:
        assert taken(connection, bus) == [1]
    table = bus.tables()
    inspector = sa.inspect(open_database(bus.url, bus.options).engine)
    assert table.ready.name in {index["name"] for index in inspector.get_indexes(table.message.name)}


def test_held_messages_are_out_of_reach_of_plain_workers(bus: Bus, connection: Connection) -> None:
    """What we hold is not in kombu's table at all."""
    bus.publish(connection, 1, "a")
    message = next(deliveries(connection, bus.queue))
    table = bus.tables().message
    assert bus.execute(table.select().limit(1)) is None
    message.ack()


def test_close_gives_everything_back_in_place(bus: Bus) -> None:
    """Unacked and taken-ahead messages return at once, in their old places; only the delivered one counts."""
    with bus.connect() as connection:
        for n in range(10):
            bus.publish(connection, n, str(n))
        delivered = []
        for message in deliveries(connection, bus.queue, prefetch=100):
            delivered.append(message)
            if len(delivered) == 4:
                break
    assert bus.count("message") == 10
    assert bus.count("held") == bus.count("lease") == 0
    with bus.connect() as connection:
        again = list(deliveries(connection, bus.queue))
        assert bodies(again) == [*range(10)]
        assert [bool(message.delivery_info.get("redelivered")) for message in again] == [True] * 4 + [False] * 6


def test_redelivered_messages_are_taken_singly(bus: Bus) -> None:
    """What came back before is never taken ahead of its turn, so that a death counts against one of them only."""
    with bus.connect() as connection:
        for n in range(12):
            bus.publish(connection, n, str(n))
        list(deliveries(connection, bus.queue))
    with bus.connect() as connection:
        for n in range(12, 24):
            bus.publish(connection, n, str(n))
        held = []
        for message in deliveries(connection, bus.queue, prefetch=100):
            held.append(bus.count("held"))
            message.ack()
    assert held[:12] == [1] * 12
    assert max(held[12:]) > 1


def test_cancel_gives_back_what_was_taken_ahead(bus: Bus, connection: Connection) -> None:
    """A cancelled consumer keeps what was delivered and nothing else."""
    for n in range(10):
        bus.publish(connection, n, str(n))
    got = []
    for message in deliveries(connection, bus.queue, prefetch=100):
        got.append(message)
        if len(got) == 5:
            break
    assert bus.count("held") == 5
    assert bus.count("message") == 5
    for message in got:
        message.ack()
    assert taken(connection, bus) == [*range(5, 10)]


def test_recover_and_reject(bus: Bus, connection: Connection) -> None:
    """`recover` and `reject(requeue=True)` return messages at once; `reject` deletes, as in AMQP."""
    bus.publish(connection, 1, "a")
    message = next(deliveries(connection, bus.queue))
    message.channel.basic_recover(requeue=True)
    message = next(deliveries(connection, bus.queue))
    message.reject(requeue=True)
    message = next(deliveries(connection, bus.queue))
    assert message.headers["x-delivery-count"] == 2
    message.reject()
    assert taken(connection, bus) == []
    assert bus.count("held") == 0


def test_a_message_that_comes_back_too_often_is_kept_apart(bus: Bus) -> None:
    """The bound on redeliveries ends a loop; the message is kept in the dead table. Without a bound it goes on."""
    with bus.connect(max_deliveries=3) as connection:
        bus.publish(connection, 1, "a")
        rounds = 0
        for message in deliveries(connection, bus.queue):
            rounds += 1
            message.requeue() if rounds < 10 else message.ack()
        assert rounds == 3
    assert bus.count("dead") == 1
    assert bus.count("held") == bus.count("message") == 0
    with bus.connect(max_deliveries=None) as connection:
        bus.publish(connection, 2, "b")
        for rounds, message in enumerate(deliveries(connection, bus.queue)):
            message.requeue() if rounds < 40 else message.ack()
        assert rounds == 40


def test_delays_do_not_count_and_come_in_time(bus: Bus) -> None:
    """A delayed message comes back, no sooner than said, as often as it is delayed, and survives its channel."""
    with bus.connect(max_deliveries=2) as connection:
        bus.publish(connection, 1, "a")
        for _ in range(4):
            message = next(deliveries(connection, bus.queue, idle=3))
            began = time.monotonic()
            assert message.channel.basic_delay(message.delivery_tag, 0.2) is True
            assert bus.count("message") == 0
        message = next(deliveries(connection, bus.queue, idle=3))
        assert time.monotonic() - began >= 0.19
        assert message.delivery_info["redelivered"] is True
        message.channel.basic_delay(message.delivery_tag, 0.2)
        message.ack()  # the tag is spent: nothing is removed
    assert bus.count("held") == 1
    with bus.connect() as connection:
        assert taken(connection, bus, idle=3) == [1]


def test_a_queue_counts_ready_messages(bus: Bus, connection: Connection) -> None:
    """`message_count` is what is ready; purge removes ready and delayed ones and leaves held ones to their owner."""
    for n in range(5):
        bus.publish(connection, n, str(n))
    first = next(deliveries(connection, bus.queue))
    second = next(deliveries(connection, bus.queue))
    second.channel.basic_delay(second.delivery_tag, 60)
    channel = connection.default_channel
    assert channel.queue_declare("cards", passive=True).message_count == 3
    assert channel.queue_purge("cards") == 4
    assert channel.queue_declare("cards").message_count == 0
    first.requeue()
    assert taken(connection, bus) == [0]


def test_unreadable_rows_are_kept_and_do_not_block(bus: Bus, connection: Connection) -> None:
    """A row that kombu cannot have written is set aside; its neighbours are delivered."""
    for n in range(3):
        bus.publish(connection, n, str(n))
    table = bus.tables().message
    first = bus.execute(table.select().with_only_columns(table.c.id).order_by(table.c.id))
    open_database(bus.url, bus.options).run(
        lambda c: c.execute(table.update().where(table.c.id == first).values(payload="{"))
    )
    assert taken(connection, bus) == [1, 2]
    assert bus.count("dead") == 1


def test_no_ack_consumers_and_simple_queues(bus: Bus, connection: Connection) -> None:
    """A consumer without acks takes messages for good; SimpleQueue works as with kombu's own transport."""
    bus.publish(connection, 1, "a")
    got: list[Any] = []
    with connection.Consumer([bus.queue], no_ack=True, callbacks=[lambda body, message: got.append(body)]):
        connection.drain_events(timeout=3)
    assert got == [1]
    assert bus.count("held") == 0
    with connection.SimpleQueue("simple") as simple:
        simple.put({"n": 1})
        assert simple.qsize() == 1
        message = simple.get(timeout=3)
        assert message.payload == {"n": 1}
        message.ack()


def test_leaving_moves_everything_back(bus: Bus, connection: Connection) -> None:
    """`restore` returns delayed, abandoned and, on request, dead messages to kombu's table; live ones only by force."""
    url = f"idempotent-sqla+{bus.url}"
    for n in range(4):
        bus.publish(connection, n, str(n))
    with bus.connect(max_deliveries=1) as other:
        next(deliveries(other, bus.queue)).requeue()
    delayed, live = (message for _, message in zip(range(2), deliveries(connection, bus.queue), strict=False))
    delayed.channel.basic_delay(delayed.delivery_tag, 60)
    assert bus.count("message") == 1
    assert [(letter.queue, letter.reason) for letter in dead_letters(url, options=bus.options)] == [
        ("cards", "deliveries")
    ]
    assert restore(url, queues=["mails"], dead=True, force=True, options=bus.options)["left"] == 0
    assert restore(connection) == {"delayed": 1, "unacked": 0, "dead": 0, "left": 1}
    assert restore(connection, dead=True, force=True) == {"delayed": 0, "unacked": 1, "dead": 1, "left": 0}
    assert bus.count("held") == bus.count("dead") == 0
    live.ack()  # too late: it removes nothing
    assert lines(
        bus.program("""
with bus.plain() as plain:
    print(sorted(message.payload for message in deliveries(plain, bus.queue)))
""")
    ) == ["[0, 1, 2, 3]"]


def test_marks_are_forgotten_after_the_window(bus: Bus) -> None:
    """Marks older than the window are purged in batches as messages are published; younger ones stay."""
    database = open_database(bus.url, bus.options)
    with bus.connect() as connection:
        for n in range(20):
            bus.publish(connection, n, str(n))
        assert Edge(database, 3600).purge() == 0
        assert bus.publish(connection, 0, "0") is Landing.DUPLICATE
        # An hour goes by for these 20.
        landed = database.tables.landed
        database.run(lambda c: c.execute(landed.update().values(landed_at=landed.c.landed_at - 3600)))
        bus.publish(connection, 20, "20")
        assert Edge(database, 3600).purge() == 20
        assert bus.count("landed") == 1
        assert bus.publish(connection, 20, "20") is Landing.DUPLICATE
        assert bus.publish(connection, 0, "0") is Landing.LANDED


def test_a_republished_copy_starts_afresh(bus: Bus, connection: Connection) -> None:
    """Publishing a delivered message's headers and properties anew takes its marks of redelivery off."""
    bus.publish(connection, 1, "a")
    next(deliveries(connection, bus.queue)).requeue()
    message = next(deliveries(connection, bus.queue))
    assert message.headers["x-delivery-count"] == 1
    headers = {**message.headers, "inner-msg-id": "b"}
    properties = {name: value for name, value in message.properties.items() if name != "delivery_tag"}
    connection.Producer().publish(1, exchange=bus.exchange, routing_key="paid", headers=headers, **properties)
    message.ack()
    again = next(deliveries(connection, bus.queue))
    assert not again.delivery_info.get("redelivered")
    assert "x-delivery-count" not in again.headers


def as_kombu_makes_it(bus: Bus) -> None:
    """kombu's own tables, where the payload is a TEXT."""
    plain = sa.MetaData()
    names = bus.tables()
    names.queue.to_metadata(plain)
    message = names.message.to_metadata(plain)
    message.c.payload.type = sa.Text()
    engine = sa.create_engine(bus.url)
    plain.create_all(engine)
    engine.dispose()


@pytest.mark.parametrize("widened", [True, False], ids=["widened", "control"])
def test_a_long_message_fits_into_its_dead_letter(
    bus: Bus, unique: str, widened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I1: what just fitted into kombu's column goes to the dead letter with its headers, if kombu made the table too.

    The control: in MariaDB's 64 KB it does not fit, and is held for ever; the others have no such bound.
    """
    as_kombu_makes_it(bus)
    if not widened:
        monkeypatch.setattr(tables, "_is_short", lambda *_: False)
    handle = idempotent_consumer(MemoryStore(), scope=unique, biz_id="id", permanent=(ValueError,))(
        lambda body, message: int("no number")
    )
    with bus.connect() as connection:
        bus.publish(connection, {"id": "a", "long": "x" * 48_600}, "a")
        consumer = IdempotentConsumer(connection, {bus.queue: handle})
        consumer.run(idle_timeout=0.3)
    fits = widened or bus.url.startswith(("sqlite", "postgresql"))
    assert consumer.endings == {Ended.DEAD if fits else Ended.HELD: 1}
