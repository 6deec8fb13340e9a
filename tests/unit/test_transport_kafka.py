"""`idempotent-kafka://` at its boundary: a stand-in for confluent_kafka with topics, offsets and delivery reports."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from kombu import Connection, Consumer, Producer, Queue
from sdk_stubs import StubModule, loaded

from idempotent_bus.errors import ConfigurationError, PublishUnknown, Rejected, Unroutable
from idempotent_bus.headers import INNER_MSG_ID
from idempotent_bus.model import Edge, Landing
from idempotent_bus.producer import IdempotentProducer, ResendPolicy

ONCE = ResendPolicy(max_sends=1)


class KafkaError:
    MSG_SIZE_TOO_LARGE, UNKNOWN_TOPIC_OR_PART, _UNKNOWN_TOPIC, _MSG_TIMED_OUT = 10, 3, -188, -192

    def __init__(self, code: int) -> None:
        self._code = code

    def code(self) -> int:
        return self._code


class KafkaException(Exception): ...


class TopicPartition:
    def __init__(self, topic: str, partition: int, offset: int = -1001) -> None:
        self.topic, self.partition, self.offset = topic, partition, offset


class Record:
    def __init__(self, topic: str, partition: int, offset: int, value: bytes, headers: Any) -> None:
        self.place, self.payload, self.sent_headers = (topic, partition, offset), value, headers

    def topic(self) -> str:
        return str(self.place[0])

    def partition(self) -> int:
        return int(self.place[1])

    def offset(self) -> int:
        return int(self.place[2])

    def value(self) -> bytes:
        return self.payload

    def error(self) -> None:
        return None


class Broker:
    """Topics of one partition; offsets that were committed; what the next reports say."""

    def __init__(self) -> None:
        self.topics: dict[str, list[Record]] = {}
        self.committed: dict[tuple[str, int], int] = {}
        self.reports: list[int | str | None] = []
        self.configs: list[dict[str, Any]] = []
        self.purged = 0
        self.consumers: list[Any] = []


def make_sdk(broker: Broker) -> dict[str, ModuleType]:
    class FakeProducer:
        def __init__(self, config: dict[str, Any]) -> None:
            broker.configs.append(config)
            self.waiting: list[Any] = []

        def produce(self, topic: str, value: bytes, *, on_delivery: Any = None, headers: Any = None) -> None:
            self.waiting.append((topic, value, on_delivery, headers))

        def flush(self, timeout: float | None = None) -> int:
            for topic, value, on_delivery, headers in self.waiting:
                report = broker.reports.pop(0) if broker.reports else None
                if report is None:
                    records = broker.topics.setdefault(topic, [])
                    records.append(Record(topic, 0, len(records), value, headers))
                if report != "silence" and on_delivery is not None:
                    on_delivery(None if report is None else KafkaError(int(report)), None)
            self.waiting.clear()
            return 0

        def purge(self) -> None:
            broker.purged += 1

    class FakeConsumer:
        def __init__(self, config: dict[str, Any]) -> None:
            broker.configs.append(config)
            broker.consumers.append(self)
            self.position: int | None = None
            self.callbacks: dict[str, Any] = {}

        def subscribe(self, topics: list[str], **callbacks: Any) -> None:
            self.topic, self.callbacks = topics[0], callbacks

        def poll(self, timeout: float) -> Record | None:
            if self.position is None:
                self.position = broker.committed.get((self.topic, 0), 0)
            records = broker.topics.get(self.topic, [])
            if self.position >= len(records):
                return None
            self.position += 1
            return records[self.position - 1]

        def commit(self, offsets: list[TopicPartition] | None = None, asynchronous: bool = True) -> None:
            if offsets is None:  # what was polled last, as kombu asks for
                offsets = [TopicPartition(self.topic, 0, self.position or 0)]
            for offset in offsets:
                broker.committed[offset.topic, offset.partition] = offset.offset

        def take_away(self) -> None:
            """A rebalance: another member gets the partition, and later this one again."""
            self.callbacks["on_revoke"](self, [TopicPartition(self.topic, 0)])
            self.position = None

        def assignment(self) -> list[TopicPartition]:
            return []

        def close(self) -> None: ...

    class FakeAdmin:
        def __init__(self, config: dict[str, Any]) -> None: ...

        def list_topics(self, timeout: float | None = None) -> Any:
            return type("Metadata", (), {"topics": broker.topics})()

        def create_topics(self, new_topics: list[Any]) -> None: ...

    sdk, admin = StubModule("confluent_kafka"), StubModule("confluent_kafka.admin")
    sdk.Producer, sdk.Consumer = FakeProducer, FakeConsumer  # type: ignore[attr-defined]
    sdk.KafkaError, sdk.KafkaException = KafkaError, KafkaException  # type: ignore[attr-defined]
    sdk.TopicPartition, sdk.admin = TopicPartition, admin  # type: ignore[attr-defined]
    admin.AdminClient, admin.NewTopic = FakeAdmin, dict  # type: ignore[attr-defined]
    return {"confluent_kafka": sdk, "confluent_kafka.admin": admin}


@pytest.fixture
def broker() -> Iterator[Broker]:
    broker = Broker()
    with loaded("kafka", "confluentkafka", make_sdk(broker)):
        yield broker


def connect(scheme: str = "idempotent-kafka") -> Connection:
    return Connection(f"{scheme}://localhost:9092", transport_options={"wait_time_seconds": 0})


def fetch(connection: Connection, count: int) -> list[Any]:
    bound = Queue("q")(connection.default_channel)
    return [bound.get() for _ in range(count)]


def fill(broker: Broker, count: int) -> None:
    with connect() as connection:
        for n in range(count):
            Producer(connection).publish({"n": n}, routing_key="q")


# --- publishing -------------------------------------------------------------------------------------


def test_a_delivered_record_is_landed_with_its_id_as_a_header(broker: Broker) -> None:
    """The receipt follows the delivery report, says that the edge is at the consumer, and the id is a record header."""
    with IdempotentProducer(connect(), retry=ONCE) as producer:
        receipt = producer.publish({"n": 1}, routing_key="q")
    record = broker.topics["q"][0]
    assert (receipt.landing, receipt.edge) == (Landing.LANDED, Edge.CONSUMER)
    assert record.sent_headers == [(INNER_MSG_ID, receipt.inner_msg_id.encode())]
    assert json.loads(record.payload)["headers"][INNER_MSG_ID] == receipt.inner_msg_id


@pytest.mark.parametrize(
    ("report", "error"),
    [
        (KafkaError.MSG_SIZE_TOO_LARGE, Rejected),
        (KafkaError.UNKNOWN_TOPIC_OR_PART, Unroutable),
        (KafkaError._MSG_TIMED_OUT, PublishUnknown),
        (99, PublishUnknown),
        ("silence", PublishUnknown),
    ],
)
def test_a_failed_delivery_raises(broker: Broker, report: int | str, error: type[Exception]) -> None:
    """Each report becomes the error that it allows: only what cannot have been stored is called refused."""
    broker.reports = [report]
    with IdempotentProducer(connect(), retry=ONCE) as producer, pytest.raises(error):
        producer.publish({}, routing_key="q")
    assert broker.topics == {}
    assert broker.purged == (report == "silence")  # what was not reported must not be sent behind our back


def test_kombu_s_own_calls_a_failed_delivery_published(broker: Broker) -> None:
    """The control: kombu's transport returns as if all were well, and so the producer refuses to work over it."""
    broker.reports = [KafkaError.MSG_SIZE_TOO_LARGE]
    with connect("confluentkafka") as connection:
        Producer(connection).publish({}, routing_key="q")
    assert broker.topics == {}
    with pytest.raises(ConfigurationError, match="idempotent-kafka"):
        IdempotentProducer(connect("confluentkafka"))


def test_a_resend_is_a_second_record(broker: Broker) -> None:
    """What the receipt's edge says is true: Kafka takes the copy, and the consumer must refuse it."""
    broker.reports = [KafkaError._MSG_TIMED_OUT]
    with IdempotentProducer(connect(), retry=ResendPolicy(max_sends=3, base=0.001, cap=0.001)) as producer:
        receipt = producer.publish({}, routing_key="q")
        producer.publish({}, routing_key="q", inner_msg_id=receipt.inner_msg_id)
    assert (receipt.sends, len(broker.topics["q"])) == (2, 2)


def test_the_settings_that_the_promise_needs_cannot_be_taken_back(broker: Broker) -> None:
    """acks=all and idempotence stay on whatever the user's producer config says; the time limit is the lane's."""
    options = {"kafka_producer_config": {"acks": 0, "enable.idempotence": False, "linger.ms": 7}}
    connection = Connection("idempotent-kafka://localhost:9092", transport_options=options)
    with IdempotentProducer(connection, confirm_timeout=3.0, retry=ONCE) as producer:
        producer.publish({}, routing_key="q")
    config = broker.configs[-1]
    assert (config["acks"], config["enable.idempotence"], config["linger.ms"]) == ("all", True, 7)
    assert config["message.timeout.ms"] == 3000


# --- consuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "committed"), [("idempotent-kafka", None), ("confluentkafka", 3)])
def test_an_ack_commits_nothing_that_is_not_done(broker: Broker, scheme: str, committed: int | None) -> None:
    """The third of three is acked first: nothing is committed. kombu's own commits all three, and two are lost."""
    fill(broker, 3)
    with connect(scheme) as connection:
        messages = fetch(connection, 3)
        messages[2].ack()
        assert broker.committed.get(("q", 0)) == committed
        if committed is None:
            messages[0].ack()
            assert broker.committed["q", 0] == 1
            messages[1].ack()
            assert broker.committed["q", 0] == 3


def test_what_was_not_done_comes_to_the_next_consumer(broker: Broker) -> None:
    """A consumer that closes with the first of three done leaves two to the next one, also what it did out of order."""
    fill(broker, 3)
    with connect() as connection:
        messages = fetch(connection, 3)
        messages[0].ack()
        messages[2].ack()
    with connect() as connection:
        assert [message.payload["n"] for message in fetch(connection, 2)] == [1, 2]


def test_an_ack_after_the_partition_was_taken_away_commits_nothing(broker: Broker) -> None:
    """What an earlier assignment fetched is not ours to commit: the group's offset stays where the new one began."""
    fill(broker, 3)
    with connect() as connection:
        old = fetch(connection, 3)
        old[0].ack()
        broker.consumers[-1].take_away()
        new = fetch(connection, 2)
        old[1].ack()
        old[2].ack()
        assert broker.committed["q", 0] == 1
        new[0].ack()
        assert broker.committed["q", 0] == 2
        assert message_is_gone(old[2])


def message_is_gone(message: Any) -> bool:
    """True if a delay of it is refused."""
    return message.channel.basic_delay(message.delivery_tag, 0) is False


def test_a_delayed_message_comes_back_and_holds_up_no_other(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are delivered meanwhile; when it is due it comes back, and only its ack lets the offset move past it."""
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    fill(broker, 2)
    with connect() as connection:
        [first] = fetch(connection, 1)
        assert first.channel.basic_delay(first.delivery_tag, 30) is True
        [second, none] = fetch(connection, 2)
        second.ack()
        assert (second.payload["n"], none) == (1, None)
        assert ("q", 0) not in broker.committed
        now += 31
        [again] = fetch(connection, 1)
        assert (again.payload["n"], again.delivery_info["redelivered"]) == (0, True)
        again.ack()
        assert broker.committed["q", 0] == 2


def test_a_requeued_message_and_the_others_take_turns(broker: Broker) -> None:
    """Neither starves the other: a message that is requeued every time comes every second time."""
    fill(broker, 3)
    seen = []
    with connect() as connection:
        for _ in range(6):
            [message] = fetch(connection, 1)
            seen.append(message.payload["n"])
            message.requeue() if seen[-1] == 0 else message.ack()
    assert seen == [0, 0, 1, 0, 2, 0]


def test_what_is_no_message_stops_the_commits(broker: Broker) -> None:
    """A record that kombu cannot read raises, and is not skipped by the commits of what comes after it."""
    fill(broker, 1)
    broker.topics["q"].insert(0, Record("q", 0, 0, b"not json", None))
    broker.topics["q"][1].place = ("q", 0, 1)
    with connect() as connection:
        with pytest.raises(ValueError, match="Expecting value"):
            fetch(connection, 1)
        fetch(connection, 1)[0].ack()
        assert ("q", 0) not in broker.committed


def test_without_acks_a_delivery_is_done(broker: Broker) -> None:
    """no_ack commits what was delivered, by `get` and by a consumer."""
    fill(broker, 2)
    with connect() as connection:
        assert Queue("q")(connection.default_channel).get(no_ack=True) is not None
        assert broker.committed["q", 0] == 1
        seen: list[Any] = []
        with Consumer(connection, Queue("q"), callbacks=[lambda body, _: seen.append(body)], no_ack=True):
            connection.drain_events(timeout=1)
        assert (len(seen), broker.committed["q", 0]) == (1, 2)


def test_the_stand_in_has_the_sdk_s_names() -> None:
    """Where the SDK is installed: what the transport asks of it is there, under these names."""
    sdk = pytest.importorskip("confluent_kafka")
    assert {"purge", "flush", "produce"} <= set(dir(sdk.Producer))
    for word in ("on_delivery", "headers"):
        assert word in (inspect.getdoc(sdk.Producer.produce) or "")
    for word in ("on_revoke", "on_lost"):
        assert word in (inspect.getdoc(sdk.Consumer.subscribe) or "")
    assert "asynchronous" in (inspect.getdoc(sdk.Consumer.commit) or "")
    sdk.Producer({"acks": "all", "enable.idempotence": True, "message.timeout.ms": 1000})
    assert sdk.KafkaError.MSG_SIZE_TOO_LARGE == KafkaError.MSG_SIZE_TOO_LARGE
