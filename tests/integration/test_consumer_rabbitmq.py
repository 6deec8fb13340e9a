"""Waiting and dying on RabbitMQ: confirmed successors, delivery limits, headers that do not pile up."""

from __future__ import annotations

from typing import Any

import pytest
from kombu import Consumer, Exchange, Queue
from kombu.message import Message

from consumer_rig import RABBITMQ, Broker, broker_of, consume, drain, on
from idempotent_bus import Backoff, ConfigurationError, IdempotentProducer, Permanent, idempotent_consumer
from idempotent_bus.headers import DEAD_REASON, INNER_MSG_ID
from idempotent_bus.model import Busy
from idempotent_bus.stores.memory import MemoryStore

broker = pytest.fixture(broker_of)

QUICK: dict[str, Any] = {"backoff": Backoff(0.05, 0.1), "busy_delay": 0.1}


def delivery_count(broker: Broker, name: str) -> int:
    with broker.connect() as connection:
        return int(connection.channel().queue_declare(name, passive=True).message_count)


@on(*RABBITMQ)
def test_a_successor_is_the_same_message_in_the_same_queue_only(broker: Broker) -> None:
    """A retry keeps id, body, headers and properties, reaches neither the exchange's other queues nor those in CC."""
    exchange = Exchange(broker.unique, "topic", durable=True)
    mine, other = broker.queue("mine", exchange, "a.#"), broker.queue("other", exchange, "a.#")
    copied = broker.queue("cc")
    seen: list[Message] = []

    @idempotent_consumer(MemoryStore(), scope=broker.unique, biz_id="id", **QUICK)
    def handle(body: Any, message: Message) -> None:
        seen.append(message)
        if len(seen) < 4:
            raise ValueError("not yet")

    with broker.connect() as connection, IdempotentProducer(connection) as producer:
        producer.publish(
            {"id": "a"}, exchange=exchange, routing_key="a.b", declare=[mine, other, copied],
            headers={"trace": "t", "CC": [copied.name]}, correlation_id="c", reply_to="r", priority=3, message_id="m",
        )  # fmt: skip
        with Consumer(connection, [mine], callbacks=[handle]):
            assert drain(connection, lambda: len(seen) == 4)
        connection.channel().exchange_delete(exchange.name)
    assert len({message.headers[INNER_MSG_ID] for message in seen}) == 1
    for message in seen:
        assert message.payload == {"id": "a"}
        assert message.headers["trace"] == "t"
        properties = [message.properties[name] for name in ("correlation_id", "reply_to", "priority", "message_id")]
        assert properties == ["c", "r", 3, "m"]
        assert len(message.headers.get("x-death", [])) <= 2, "the broker's headers pile up"
    assert delivery_count(broker, mine.name) == 0
    assert delivery_count(broker, other.name) == 1
    assert delivery_count(broker, copied.name) == 0, "over the default exchange CC leads to the queue of that name"


@on(*RABBITMQ)
def test_the_ack_follows_the_successors_confirm(broker: Broker) -> None:
    """I4: a process that dies between the successor's confirm and the ack leaves two copies, never none."""
    queue, acks = broker.queue(), []

    class Killed(BaseException):
        pass

    @idempotent_consumer(MemoryStore(), scope=broker.unique, biz_id="id", **QUICK)
    def handle(body: Any, message: Message) -> None:
        if not acks:
            message.channel.basic_ack = ack
            raise ValueError("no")

    def ack(*args: Any, **kwargs: Any) -> None:
        acks.append(1)
        raise Killed

    broker.publish(queue, {"id": "a"})
    with pytest.raises(Killed):
        consume(broker, queue, handle, lambda: False)
    assert len(broker.take(queue.name, 2)) == 2


@on("rabbitmq-quorum")
def test_a_long_holder_costs_no_message_at_a_delivery_limit(broker: Broker) -> None:
    """I1: a copy that is busy more often than its queue's delivery limit of 5 allows is still there in the end."""
    queue, ran, busy = broker.queue(**{"x-delivery-limit": 5}), [], [0]

    class Held(MemoryStore):
        def claim(self, request: Any) -> Any:
            busy[0] += 1
            return Busy(0.0) if busy[0] <= 8 else super().claim(request)

    @idempotent_consumer(Held(), scope=broker.unique, biz_id="id", **QUICK)
    def handle(body: Any, message: Message) -> None:
        ran.append(body["id"])

    broker.publish(queue, {"id": "a"})
    assert consume(broker, queue, handle, lambda: ran == ["a"], timeout=20)
    assert busy[0] == 9


@on("rabbitmq-quorum")
def test_the_control_requeueing_destroys_the_message(broker: Broker) -> None:
    """The control: a callback that requeues what is busy loses the message at the delivery limit."""
    queue, seen = broker.queue(**{"x-delivery-limit": 5}), []

    def requeue(body: Any, message: Message) -> None:
        seen.append(1)
        message.requeue()

    broker.publish(queue, {"id": "a"})
    assert not consume(broker, queue, requeue, lambda: len(seen) > 7, timeout=2)
    assert broker.is_empty(queue.name)


@on("rabbitmq-quorum")
def test_an_unknown_origin_does_not_destroy_the_message_either(broker: Broker) -> None:
    """I1: consumed past kombu's Consumer the queue is not known: the message is held, not requeued to its end."""
    exchange = Exchange(broker.unique, "direct", durable=True)
    queue = broker.queue("q", exchange, "k", **{"x-delivery-limit": 2})
    runs: list[int] = []

    @idempotent_consumer(MemoryStore(), scope=broker.unique, biz_id="id", **QUICK)
    def handle(body: Any, message: Message) -> None:
        runs.append(1)
        raise ValueError("no")

    with broker.connect() as connection:
        with IdempotentProducer(connection) as producer:
            producer.publish({"id": "a"}, exchange=exchange, routing_key="k", declare=[queue])
        channel = connection.channel()
        queue(channel).consume("tag", lambda raw: handle({"id": "a"}, channel.message_to_python(raw)))
        drain(connection, lambda: len(runs) > 6, timeout=2.0)
        channel.close()
        connection.channel().exchange_delete(exchange.name)
    assert runs == [1, 1]
    assert len(broker.take(queue.name)) == 1


@on("rabbitmq-classic")
def test_a_dead_letter_that_is_declared_otherwise_is_taken_as_it_is(broker: Broker) -> None:
    """A dead letter that an operator made (a quorum queue, say) is used; it need not be declared as we would."""
    queue = broker.queue()
    dead = Queue(broker.dead, Exchange(""), queue_arguments={"x-queue-type": "quorum"})
    handle = idempotent_consumer(MemoryStore(), scope=broker.unique, biz_id="id")(lambda body, message: 1 / 0)
    with broker.connect() as connection:
        dead(connection.channel()).declare()
    broker.publish(queue, {"no": "id"})
    assert consume(broker, queue, handle, lambda: delivery_count(broker, broker.dead) == 1)


@on("rabbitmq-classic")
def test_a_dead_letter_that_refuses_holds_the_message_and_nobody_else(broker: Broker) -> None:
    """I4: while the dead letter takes nothing the message is not acked, and its neighbours are handled."""
    queue, ran = broker.queue(), []
    full = {"x-max-length": 1, "x-overflow": "reject-publish"}
    dead = Queue(broker.dead, Exchange(""), queue_arguments=full)

    @idempotent_consumer(MemoryStore(), scope=broker.unique, biz_id="id")
    def handle(body: Any, message: Message) -> None:
        if body["id"] == "bad":
            raise Permanent("no")
        ran.append(body["id"])

    with broker.connect() as connection:
        dead(connection.channel()).declare()
        connection.Producer().publish("full", routing_key=broker.dead)
    for biz_id in ("bad", "good"):
        broker.publish(queue, {"id": biz_id})
    assert consume(broker, queue, handle, lambda: ran == ["good"], timeout=60)
    assert broker.take(queue.name)[0].payload["id"] == "bad"


@on("rabbitmq-classic")
def test_a_dead_letter_that_was_deleted_meanwhile_is_made_again(broker: Broker) -> None:
    """A dead letter that an operator deletes while we know it as declared is declared again."""
    queue, runs = broker.queue(), []

    @idempotent_consumer(MemoryStore(), scope=broker.unique, biz_id="id", max_attempts=3, **QUICK)
    def handle(body: Any, message: Message) -> None:
        runs.append(1)
        with broker.connect() as other:
            other.channel().queue_delete(broker.dead)
        raise ValueError("no")

    with broker.connect() as connection, Consumer(connection, [queue], callbacks=[handle]):
        for round_ in (1, 2):
            broker.publish(queue, {"id": str(round_)})
            assert drain(connection, lambda: len(runs) == 3 * round_, timeout=20)  # noqa: B023 - called at once
            assert len(broker.take(broker.dead)) == 1


@on("rabbitmq-classic")
def test_a_delay_queue_that_is_declared_otherwise_is_named_in_the_error(broker: Broker) -> None:
    """A queue of the name of one that waiting needs, but which hands nothing back: said, and nothing lost."""
    queue = broker.queue()
    with broker.connect() as connection:
        Queue(f"{queue.name}.back", Exchange(""))(connection.channel()).declare()
    handle = idempotent_consumer(MemoryStore(), scope=broker.unique, biz_id="id", **QUICK)(lambda b, m: 1 / 0)
    broker.publish(queue, {"id": "a"})
    with pytest.raises(ConfigurationError, match=r"\.back.*delete it"):
        consume(broker, queue, handle, lambda: False)
    assert len(broker.take(queue.name)) == 1


@on(*RABBITMQ)
def test_a_message_without_a_content_type_is_moved_untouched(broker: Broker) -> None:
    """Bytes that say nothing of themselves are in the dead letter byte for byte."""
    queue = broker.queue()
    handle = idempotent_consumer(MemoryStore(), scope=broker.unique, biz_id="id")(lambda body, message: None)
    with broker.connect() as connection:
        queue(connection.channel()).declare()
        import amqp

        connection.default_channel.basic_publish(amqp.Message(b"\xff\x00raw"), "", queue.name)
    seen: list[int] = []

    def undecodable(message: Message, error: Exception) -> None:
        handle.on_decode_error(message, error)
        seen.append(1)

    assert consume(broker, queue, handle, lambda: bool(seen), on_decode_error=undecodable)
    (dead,) = broker.take(broker.dead)
    assert bytes(dead.body) == b"\xff\x00raw"
    assert dead.headers[DEAD_REASON] == "invalid"
