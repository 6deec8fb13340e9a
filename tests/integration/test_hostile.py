"""Hostile messages: each is handled, dead-lettered or refused before it is sent; nothing is lost, nothing crashes."""

from __future__ import annotations

import bz2
import hashlib
import logging
import lzma
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kombu.compression
import kombu.message
import pytest
import redis
import sqlalchemy as sa
from kombu import Consumer, Exchange
from kombu.message import Message

import hostile
import servers
from consumer_rig import OURS, Broker, broker_of, drain, on
from hostile import LARGE, SCOPES, Raw, canonical, expected
from idempotent_bus import Ended, IdempotentConsumer, IdempotentHandler, admission, frames, idempotent_consumer
from idempotent_bus import consumer as consumer_module
from idempotent_bus import session as session_module
from idempotent_bus.events import Event, EventKind
from idempotent_bus.model import State
from idempotent_bus.policy import DAY
from idempotent_bus.redrive import redrive
from idempotent_bus.stores.memory import MemoryStore

#: Ids and timestamps of the messages are of any time: being too old is not what is looked at here.
CENTURY = 100 * 365 * DAY


@pytest.fixture
def broker(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Broker]:
    yield from broker_of(request, unique, tmp_path)


class Field:
    """Guarded handlers, one for each scope, over one store; what they ran, by the test's own reading of the id."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.store = MemoryStore()
        self.ran: Counter[tuple[int, str | None]] = Counter()
        self.events: Counter[EventKind] = Counter()
        self.queues = [broker.queue(f"q{scope}") for scope in range(len(SCOPES))]
        self.handlers = [self._handler(scope) for scope in range(len(SCOPES))]

    def _handler(self, scope: int) -> IdempotentHandler:
        @idempotent_consumer(
            self.store,
            scope=SCOPES[scope],
            biz_id="id",
            fingerprint=False,
            dead_letter=self.broker.dead,
            max_body=LARGE,
            retention=CENTURY,
            listener=self,
        )
        def handle(body: Any, message: Message) -> None:
            self.ran[scope, canonical(body["id"])] += 1

        return handle

    def on_event(self, event: Event) -> None:
        self.events[event.kind] += 1

    def send(self, raws: Sequence[Raw]) -> int:
        """Returns how many the transport refused."""
        with self.broker.connect() as connection:
            for queue in self.queues:
                queue(connection.channel()).declare()
            return len(hostile.send(connection, [queue.name for queue in self.queues], raws))

    def records(self) -> set[bytes]:
        """The keys of all records, each of them completed."""
        records = self.store._entries
        assert {record.state for record in records.values()} <= {State.COMPLETED}
        return set(records)

    def consume(self, idle: float = 1.0) -> Counter[Ended]:
        """Let `IdempotentConsumer` handle all that is there; how it ended."""
        consumer = IdempotentConsumer(self.broker.connect(), dict(zip(self.queues, self.handlers, strict=True)))
        assert consumer.run(idle_timeout=idle) == consumer.endings.total()
        return consumer.endings

    def dead(self, count: int) -> list[Message]:
        """What is in the dead letter, of which nothing may be left."""
        found = self.broker.take(self.broker.dead, count, timeout=10)
        assert self.broker.is_empty(self.broker.dead)
        return found


@pytest.fixture
def field(broker: Broker) -> Field:
    return Field(broker)


def naive_key(scope: str, biz_id: str, **_: Any) -> bytes:
    """As it is done where nobody thought of it: joined by a colon, normalised."""
    return hashlib.blake2b(unicodedata.normalize("NFC", f"{scope}:{biz_id}").encode(), digest_size=16).digest()


def check_records(field: Field) -> None:
    """I10: there are as many records as canonical ids, and each id ran once."""
    assert set(field.ran.values()) == {1}
    assert None not in {biz_id for _, biz_id in field.ran}
    assert len(field.records()) == len(field.ran)


@pytest.mark.slow  # half of it is Hypothesis, which makes 9,000 different messages
@on("memory")
def test_ten_thousand(field: Field, caplog: pytest.LogCaptureFixture) -> None:
    """I1, I10: of 10,000 hostile messages each is refused before it is sent, handled, or dead; no two ids are merged.

    The ids are read a second time here, by other means. The control is in the same run: a key that joins scope and id,
    and one that takes str() of whatever comes, merge some of the very ids that came.
    """
    caplog.set_level(logging.WARNING, "idempotent_bus")
    raws = hostile.generate(10_000)
    refused = field.send(raws)
    endings = field.consume()
    dead = field.dead(endings[Ended.DEAD])

    handled = endings[Ended.COMPLETED] + endings[Ended.REPLAYED]
    assert refused + handled + len(dead) == 10_000
    assert set(endings) == {Ended.COMPLETED, Ended.REPLAYED, Ended.DEAD}
    assert min(handled, len(dead)) > 2_000  # neither half is empty for want of such messages
    assert "lost its connection" not in caplog.text

    check_records(field)
    wanted = {expected(raw) for raw in raws if raw.is_plain}
    assert wanted - {None} <= set(field.ran)
    strange = [raw for raw in raws if not raw.is_plain]
    assert len(set(field.ran) - wanted) < len(strange)

    ids = [(SCOPES[scope], str(biz_id)) for scope, biz_id in field.ran]
    assert len({naive_key(*one) for one in ids}) < len(ids)
    values = [(type(value), value) for value in hostile.ALIKE if isinstance(value, (str, int, float))]
    assert len({str(value) for _, value in values}) < len(set(values))

    assert {message.headers["idempotent-bus-dead-reason"] for message in dead} == {"invalid"}
    sent = {raw.body for raw in raws} | {raw.body.encode() for raw in raws if isinstance(raw.body, str)} | {b""}
    assert all(message.body in sent for message in dead if "compression" not in message.headers)


@on("memory")
@pytest.mark.parametrize("key", [admission.record_key, naive_key], ids=["ours", "naive"])
def test_a_key_that_merges_ids_is_found_out(field: Field, key: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the check above: with a naive key the consumer merges ids, and the check fails."""
    monkeypatch.setattr(admission, "record_key", key)
    raws = [raw for raw in hostile.generate(2_000) if raw.is_plain]
    field.send(raws)
    field.consume()
    wanted = {expected(raw) for raw in raws} - {None}
    if key is naive_key:
        assert len(field.records()) < len(wanted)
        assert set(field.ran) < wanted
    else:
        check_records(field)
        assert set(field.ran) == wanted


@on("ours-sqlite", "ours-redis", "rabbitmq-classic", "rabbitmq-quorum")
def test_hundreds_on_real_brokers(field: Field, caplog: pytest.LogCaptureFixture) -> None:
    """I1, I10: the same on brokers that write messages down; what their drivers or edges refuse is refused."""
    caplog.set_level(logging.WARNING, "idempotent_bus")
    raws = hostile.generate(700)
    refused = field.send(raws)
    endings = field.consume(idle=2.0)
    dead = field.dead(endings[Ended.DEAD])
    assert refused + endings[Ended.COMPLETED] + endings[Ended.REPLAYED] + len(dead) == 700
    assert refused < 200
    assert "lost its connection" not in caplog.text
    check_records(field)


@on("memory", "ours-redis", "rabbitmq-classic")
def test_hundreds_through_bare_callbacks(field: Field) -> None:
    """I1: the same with kombu's own Consumer, whose `on_decode_error` is the handler's."""
    raws = [raw for raw in hostile.generate(700) if raw.scope == 0]
    refused = field.send(raws)
    handle = field.handlers[0]
    called = Counter[str]()

    def count(body: Any, message: Message) -> None:
        handle(body, message)
        called["ran"] += 1

    def count_undecodable(message: Message, error: Exception) -> None:
        handle.on_decode_error(message, error)
        called["undecodable"] += 1

    with field.broker.connect() as connection:
        frames.read_everything(connection)
        consumer = Consumer(connection, [field.queues[0]], callbacks=[count], on_decode_error=count_undecodable)
        consumer.qos(prefetch_count=50)
        with consumer:
            assert drain(connection, lambda: refused + called.total() == len(raws), timeout=60)
    dead = field.dead(field.events[EventKind.DEAD_LETTERED])
    handled = field.events[EventKind.COMPLETED] + field.events[EventKind.REPLAYED]
    assert refused + len(dead) + handled == len(raws)
    assert min(called["undecodable"], handled) > 20
    check_records(field)


@on("memory", "ours-sqlite", "ours-redis", "rabbitmq-classic")
@pytest.mark.parametrize("limited", [True, False], ids=["ours", "kombu alone"])
def test_a_bomb_is_not_inflated(field: Field, limited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """I1: 64 MiB of zeros in a few KB are dead-lettered as they came, and kombu never sees them.

    The control: without the measure kombu decompresses all of them, in a process that may have less memory.
    """
    inflated: list[int] = []

    def decompress(body: Any, name: Any) -> Any:
        whole = kombu.compression.decompress(body, name)
        inflated.append(len(whole))
        return whole

    monkeypatch.setattr(kombu.message, "decompress", decompress)
    if not limited:
        monkeypatch.setattr(session_module, "limit_inflation", lambda channel, limit: None)
    good = b'{"id": "good"}'
    zeros = bytes(64 * LARGE)
    bombs = {"gzip": zlib.compress(zeros), "bzip2": bz2.compress(zeros), "lzma": lzma.compress(zeros)}
    field.send([Raw(0, bomb, headers={"compression": name}) for name, bomb in bombs.items()])
    field.send([Raw(0, zlib.compress(good), headers={"compression": "gzip"})])
    assert field.consume(idle=1.5) == {Ended.DEAD: 3, Ended.COMPLETED: 1}
    assert inflated == ([len(good)] if limited else [len(zeros)] * 3 + [len(good)])
    if limited:
        assert redrive(field.broker.connect(), field.broker.dead).moved == 3
        assert field.consume(idle=1.5) == {Ended.DEAD: 3}
        assert inflated == [len(good)]
        monkeypatch.setattr(kombu.message, "decompress", lambda body, name: body)
        dead = field.dead(3)
        assert {message.headers["compression"]: message.body for message in dead} == bombs
        assert all("too large" in message.headers["idempotent-bus-dead-error"] for message in dead)


@on(*OURS)
def test_what_is_no_message_at_all(field: Field, caplog: pytest.LogCaptureFixture) -> None:
    """I1: what was put into a broker's storage past every client is run, dead, or in the transport's own dead list;
    the consumer goes on, and the storage still has each of them or its dead letter.
    """
    caplog.set_level(logging.WARNING, "idempotent_bus")
    field.send([])
    queue = field.queues[0].name
    if field.broker.name == "ours-redis":
        client = redis.Redis.from_url(servers.real_redis())
        client.lpush(field.broker.unique + queue, *[text.encode("utf-8", "surrogatepass") for text in hostile.STORED])

        def buried() -> int:
            return int(client.llen(f"{field.broker.unique}idempotent-bus:dead:{{{field.broker.unique}{queue}}}"))

    else:
        engine = sa.create_engine(field.broker.url.partition("+")[2])
        with engine.begin() as connection:
            number = connection.scalar(sa.text("SELECT id FROM kombu_queue WHERE name = :name"), {"name": queue})
            insert = "INSERT INTO kombu_message (visible, payload, version, queue_id) VALUES (1, :payload, 1, :queue)"
            connection.execute(sa.text(insert), [{"payload": text, "queue": number} for text in hostile.STORED])

        def buried() -> int:
            with engine.connect() as connection:
                return int(connection.scalar(sa.text("SELECT count(*) FROM idempotent_bus_dead")) or 0)

    endings = field.consume(idle=1.5)
    assert endings.total() + buried() == len(hostile.STORED)
    assert set(endings) == {Ended.COMPLETED, Ended.REPLAYED, Ended.DEAD}
    assert min(buried(), endings[Ended.DEAD], endings[Ended.REPLAYED]) > 3
    assert set(field.ran) == {(0, "stored")}
    field.dead(endings[Ended.DEAD])
    assert "lost its connection" not in caplog.text


@on("rabbitmq-classic", "rabbitmq-quorum")
@pytest.mark.parametrize("guarded", [True, False], ids=["ours", "py-amqp alone"])
def test_properties_that_py_amqp_cannot_read(field: Field, guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """I1: RabbitMQ delivers properties over which py-amqp falls; such a message is dead-lettered, its neighbours run.

    The control: with py-amqp's own reading the consumer ends with an error, and would each time that it is started.
    """
    field.send([])
    queue = field.queues[0].name
    sent = 0
    with field.broker.connect() as connection:
        for properties in hostile.PROPERTIES.values():
            for body in (b'{"id": "a"}', b""):
                sent += hostile.send_crafted(connection, "", queue, body, properties)
    assert sent > len(hostile.PROPERTIES)
    field.send([Raw(0, b'{"id": "good"}')])
    if not guarded:
        monkeypatch.setattr(consumer_module, "read_everything", lambda connection: None)
        with pytest.raises(UnicodeDecodeError):
            field.consume()
        return
    endings = field.consume(idle=2.0)
    assert endings == {Ended.DEAD: sent, Ended.COMPLETED: 1}
    dead = field.dead(sent)
    kept = {message.headers.get("idempotent-bus-unreadable") for message in dead}
    assert hostile.PROPERTIES["content type"].hex() in kept  # what it had is not lost either
    assert {bytes(message.body if isinstance(message.body, bytes) else message.body.encode()) for message in dead} == {
        b'{"id": "a"}',
        b"",
    }


@on("rabbitmq-classic")
def test_a_routing_key_that_is_no_text(field: Field) -> None:
    """I1: the exchange and the routing key are only shown: bytes that cannot be do not keep a message from running."""
    exchange = Exchange(f"{field.broker.unique}.topic", "topic", durable=False, auto_delete=True)
    queue = field.broker.queue("topic", exchange, routing_key="#")
    with field.broker.connect() as connection:
        queue(connection.channel()).declare()
        empty = b"\0\0"
        headers = b"\xa0\x00\x10application/json\0\0\0\0"
        assert hostile.send_crafted(connection, exchange.name, b"\xff\xfe", b'{"id": "odd key"}', headers)
        assert hostile.send_crafted(connection, exchange.name, b"\xff\xfe", b"", empty)
    field.queues[0] = queue
    assert field.consume(idle=2.0) == {Ended.COMPLETED: 1, Ended.DEAD: 1}
    assert set(field.ran) == {(0, "odd key")}
    field.dead(1)
