"""Waiting on RabbitMQ: delay queues that are there in time, that return what they got, and that no neighbour can stop.

And on a node of its own: what counts deliveries or times out held messages does not get what waits.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from amqp.exceptions import NotFound
from kombu import Connection, Consumer, Exchange, Queue
from kombu.message import Message

from consumer_rig import Broker, broker_of, consume, drain, on, poll
from idempotent_bus import (
    Backoff,
    ConfigurationError,
    IdempotentConsumer,
    IdempotentProducer,
    current_execution,
    delays,
    idempotent_consumer,
)
from idempotent_bus.headers import REDRIVE
from idempotent_bus.kombu_message import came_back
from idempotent_bus.model import Busy
from idempotent_bus.redrive import redrive
from idempotent_bus.settlement import MessageSettlement
from idempotent_bus.stores.memory import MemoryStore
from private_rabbitmq import PrivateRabbitMQ
from proxy import Proxy, through

broker = pytest.fixture(broker_of)

QUICK: dict[str, Any] = {"backoff": Backoff(0.05, 0.1), "busy_delay": 0.1}


# --- the delay queues ---------------------------------------------------------------------------------


@on("rabbitmq-classic")
def test_they_are_declared_before_they_are_needed(broker: Broker) -> None:
    """I1: `declare` makes all that a wait can need, may be repeated, and does nothing on other brokers."""
    queue = broker.queue()
    with broker.connect() as connection:
        queue(connection.channel()).declare()
        for _ in range(2):
            delays.declare(connection, 300.0, [queue.name])
        for seconds in (0.0, 1.0, 60.0, 300.0):
            for entity in delays.entities(queue.name, seconds):
                connection.channel().queue_declare(entity.name, passive=True)
                connection.channel().exchange_declare(entity.exchange.name, "any", passive=True)
    delays.declare(Connection("memory://"), 300.0, [queue.name])


@on("rabbitmq-classic")
@pytest.mark.parametrize("length", [255, 251, 100], ids=["longest", "just-too-long", "usual"])
def test_a_long_name_comes_back_to_its_queue(broker: Broker, length: int) -> None:
    """I1: whatever the length of a queue's name, what waited is back in that queue, and counts as come back."""
    name = broker.unique + "é" * ((length - len(broker.unique)) // 2)
    name += "x" * (length - len(name.encode()))
    broker.extra.append(name)
    seen: list[Message] = []

    @idempotent_consumer(MemoryStore(), scope=broker.unique, biz_id="id", **QUICK)
    def handle(body: Any, message: Message) -> None:
        seen.append(message)
        if len(seen) < 3:
            raise ValueError("not yet")

    queue = Queue(name, Exchange(""))
    broker.publish(queue, {"id": "a"})
    assert consume(broker, queue, handle, lambda: len(seen) == 3)
    assert [came_back(message) for message in seen] == [False, True, True]


@on("rabbitmq-classic")
@pytest.mark.parametrize("trouble", ["deleted", "full"])
def test_a_queue_that_takes_nothing_back_stops_nobody_else(broker: Broker, trouble: str) -> None:
    """I13, I14: 40 messages wait for a queue that is deleted or full; a neighbour's wait is over in its time.

    The control, in the same run: a delay queue that hands them straight back to their queues does not give the
    neighbour's message back.
    """
    limits = {"x-max-length": 1, "x-overflow": "reject-publish"} if trouble == "full" else {}
    bad, live = broker.queue("bad", **limits), broker.queue("live")
    straight = f"{broker.unique}.straight"
    broker.extra.append(straight)
    arguments = {**delays.entities(live.name, 1.0)[-1].queue_arguments, "x-dead-letter-exchange": ""}
    with broker.connect() as connection, IdempotentProducer(connection) as producer:
        channel = connection.channel()
        Queue(straight, Exchange(straight, "fanout"), queue_arguments=arguments)(channel).declare()
        for queue in (bad, live):
            queue(channel).declare()
        delays.declare(connection, 1.0, [bad.name, live.name])
        if trouble == "full":
            producer.publish("fills it", routing_key=bad.name)
        else:
            channel.queue_delete(bad.name)
        for number in range(40):
            for exchange in (straight, delays.delay_name(1.0)):
                producer.publish(number, exchange=exchange, routing_key=bad.name)
        started = time.monotonic()
        producer.publish("straight", exchange=straight, routing_key=live.name)
        producer.publish("ours", exchange=delays.delay_name(1.0), routing_key=live.name)
        assert [message.payload for message in broker.take(live.name)] == ["ours"]
        assert 0.9 < time.monotonic() - started < 3.0
        assert broker.take(live.name, timeout=3.0) == [], "the control: handing straight back would do as well"
        channel.exchange_delete(straight)


# --- a node of its own: timeouts and delivery limits ----------------------------------------------------

_CONSUMER_TIMEOUT = 2.0


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateRabbitMQ]:
    """RabbitMQ that takes back what is held for two seconds."""
    directory: Path = tmp_path_factory.mktemp("rabbitmq")
    private = PrivateRabbitMQ(directory, consumer_timeout=int(_CONSUMER_TIMEOUT * 1000), channel_tick_interval=500)
    yield private
    private.stop()


@contextlib.contextmanager
def running(*consumers: IdempotentConsumer) -> Iterator[None]:
    """Consumers in threads of their own; within it they run."""
    threads = [threading.Thread(target=consumer.run) for consumer in consumers]
    for thread in threads:
        thread.start()
    try:
        yield
        assert all(thread.is_alive() for thread in threads), "run ended"
    finally:
        for consumer in consumers:
            consumer.stop()
        for thread in threads:
            thread.join(timeout=30)
            assert not thread.is_alive()


@contextlib.contextmanager
def naive(url: str, queue: Queue, callback: Callable[[Any, Message], None]) -> Iterator[None]:
    """The control: a plain kombu consumer that reconnects for ever, in a thread of its own."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            with (
                contextlib.suppress(Exception),
                Connection(url) as connection,
                Consumer(connection, [queue], callbacks=[callback], prefetch_count=1),
            ):
                drain(connection, stop.is_set, timeout=60)
            time.sleep(0.05)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=30)


def count(url: str, name: str) -> int:
    with Connection(url) as connection:
        return int(connection.channel().queue_declare(name, passive=True).message_count)


def everything(url: str, queue: Queue) -> int:
    """Ready messages in a queue, and those that wait (on a node where nobody else does)."""
    names = {entity.name for power in range(12) for entity in delays.entities(queue.name, 0.25 * 2**power)}
    total = 0
    for name in (queue.name, *names):
        with contextlib.suppress(NotFound):
            total += count(url, name)
    return total


def test_one_that_is_there_otherwise_is_named_with_what_to_do(node: PrivateRabbitMQ, unique: str) -> None:
    """A queue or an exchange that would swallow what waits there is found at the start, not in trouble."""
    with Connection(node.url) as connection:
        channel = connection.channel()
        other = delays.delay_name(700_000.0)
        channel.queue_declare(other, durable=True, auto_delete=False)
        with pytest.raises(ConfigurationError, match=f"{other}.*delete it"):
            delays.declare(connection, 700_000.0, [unique])
        channel.queue_delete(other)
        channel.exchange_declare(other := delays.delay_name(1_400_000.0), "direct", durable=True, auto_delete=False)
        with pytest.raises(ConfigurationError, match=f"{other}.*delete it"):
            delays.declare(connection, 1_400_000.0, [unique])
        channel.exchange_delete(other)
        delays.declare(connection, 1_400_000.0, [unique])


@pytest.mark.parametrize("deleted", ["queue", "exchange"])
def test_a_delay_queue_that_was_deleted_meanwhile_is_made_again(
    node: PrivateRabbitMQ, unique: str, deleted: str
) -> None:
    """I1: an operator deletes what we know as declared: the next wait declares it again, and nothing is lost."""
    queue = Queue(unique, durable=True)
    runs: list[bool] = []
    name = delays.delay_name(0.1)

    @idempotent_consumer(MemoryStore(), scope=unique, biz_id="id", **QUICK)
    def handle(body: Any, message: Message) -> None:
        runs.append(bool(message.delivery_info["redelivered"]))
        with Connection(node.url) as other:
            if deleted == "queue":
                other.channel().queue_delete(name)
            else:
                other.channel().exchange_delete(name)
        if len(runs) < 4:
            raise ValueError("not yet")

    with IdempotentProducer(node.url) as producer:
        producer.publish({"id": "a"}, routing_key=queue.name, declare=[queue])
    with Connection(node.url) as connection, Consumer(connection, [queue], callbacks=[handle]):
        assert drain(connection, lambda: len(runs) == 4, timeout=20)
    assert runs == [False] * 4, "it was held and requeued instead"


def test_what_finds_no_way_back_is_kept_and_can_be_redriven(node: PrivateRabbitMQ, unique: str) -> None:
    """I1: the queue through which a message was to return is deleted: it is kept, and a redrive brings it back."""
    queue, runs = Queue(unique, durable=True), []

    @idempotent_consumer(MemoryStore(), scope=unique, biz_id="id", **QUICK)
    def handle(body: Any, message: Message) -> None:
        runs.append(message.headers.get(REDRIVE))
        with Connection(node.url) as other:
            other.channel().queue_delete(delays.return_queue(queue.name).name)
        if len(runs) < 3:
            raise ValueError("not yet")

    with IdempotentProducer(node.url) as producer:
        producer.publish({"id": "a"}, routing_key=queue.name, declare=[queue])
    stranded = delays.entities(queue.name, 0.1)[0].name
    with Connection(node.url) as connection, Consumer(connection, [queue], callbacks=[handle]):
        # The first wait has declared it, and only the handler's second run deletes it for good.
        assert drain(connection, lambda: count(node.url, stranded) == 1, timeout=20)
        assert redrive(node.url, stranded).moved == 1
        assert drain(connection, lambda: runs[-1:] == [1], timeout=20)


@pytest.mark.slow  # a handler must outlive the broker's timeout three times over, and brokers look every second at best
def test_a_handler_and_a_busy_copy_outlive_the_consumer_timeout(node: PrivateRabbitMQ, unique: str) -> None:
    """I1, I2: the broker takes back what is held for 2 s; a handler of 7 s and a copy that waits for it: one effect.

    The control, in the same run: the same handler without the guard has more than one.
    """
    queue, plain = Queue(unique, durable=True), Queue(f"{unique}.plain", durable=True)
    store, effects, unguarded = MemoryStore(), [], []

    @idempotent_consumer(store, scope=unique, biz_id="id", lease=3.0, **QUICK)
    def handle(body: Any, message: Message) -> None:
        effects.append(current_execution().attempt)
        time.sleep(3.5 * _CONSUMER_TIMEOUT)

    def bare(body: Any, message: Message) -> None:
        unguarded.append(1)
        time.sleep(3.5 * _CONSUMER_TIMEOUT)
        message.ack()

    with IdempotentProducer(node.url) as producer:
        for target in (queue, plain):
            for _ in range(2 if target is queue else 1):
                producer.publish({"id": "a"}, routing_key=target.name, declare=[target])
    consumers = [IdempotentConsumer(node.url, {queue: handle}, prefetch=1) for _ in range(2)]
    with naive(node.url, plain, bare):
        with running(*consumers):
            assert poll(lambda: bool(effects))
            assert poll(lambda: sum(c.endings.total() for c in consumers) >= 2, timeout=15)
            assert poll(lambda: _done(consumers) >= 2, timeout=30)
            assert poll(lambda: everything(node.url, queue) == 0, timeout=10)
            time.sleep(_CONSUMER_TIMEOUT)  # what was still held would be taken back now
        assert poll(lambda: len(unguarded) > 1, timeout=10), "the control did not meet the timeout"
    assert effects == [1]
    assert everything(node.url, queue) == 0


def _done(consumers: list[IdempotentConsumer]) -> int:
    return sum(number for c in consumers for how, number in c.endings.items() if how.value in ("completed", "replayed"))


@pytest.mark.slow  # eight cuts with the reconnecting pauses between them, three times in one run
@pytest.mark.parametrize("kind", ["busy", "failing"])
def test_eight_cuts_at_a_delivery_limit_of_five_lose_nothing(node: PrivateRabbitMQ, unique: str, kind: str) -> None:
    """I1, I4: cut at every delivery of a message that is busy elsewhere, or being backed off: it is still there.

    The control, in the same run: a consumer that holds it unacked until it may run loses it at the sixth cut.
    """
    limited = {"x-queue-type": "quorum", "x-delivery-limit": 5}
    queue = Queue(unique, queue_arguments=limited)
    held = Queue(f"{unique}.held", queue_arguments=limited)
    ran: list[Any] = []
    with Proxy(url=node.url) as ours, Proxy(url=node.url) as theirs:
        cuts = [0]

        def cut_it() -> bool:
            """Cut all connections if eight cuts are not done yet, in the middle of a delivery."""
            if cuts[0] >= 8:
                return False
            cuts[0] += 1
            ours.cut()
            return True

        class Held(MemoryStore):
            def claim(self, request: Any) -> Any:
                if kind == "busy" and cut_it():
                    return Busy(0.0)
                return super().claim(request)

        @idempotent_consumer(Held(), scope=unique, biz_id="id", max_attempts=20, **QUICK)
        def handle(body: Any, message: Message) -> None:
            if kind == "failing" and cut_it():
                raise ValueError("no")
            ran.append(body["id"])

        taken: list[int] = []

        def hold(body: Any, message: Message) -> None:
            taken.append(1)
            if len(taken) > 8:
                message.ack()
            theirs.cut()

        with IdempotentProducer(node.url) as producer:
            producer.publish({"id": "a"}, routing_key=queue.name, declare=[queue])
            producer.publish({"id": "a"}, routing_key=held.name, declare=[held])
        consumer = IdempotentConsumer(through(ours, node.url), {queue: handle}, prefetch=1)
        with naive(through(theirs, node.url), held, hold), running(consumer):
            assert poll(lambda: cuts[0] == 8, timeout=60)
            assert poll(lambda: bool(ran), timeout=30)
            assert poll(lambda: everything(node.url, queue) == 0, timeout=30)
        assert ours.done["cut"] >= 8
    assert ran == ["a"]
    assert everything(node.url, queue) == 0
    assert len(taken) == 6, "the control: five times brought back, and then destroyed"
    assert count(node.url, held.name) == 0


@pytest.mark.slow  # five cuts with the reconnecting pauses between them
@pytest.mark.parametrize("renewed", [True, False], ids=["renewed", "control"])
@on("rabbitmq-quorum")
def test_what_was_only_prefetched_outlives_cuts_at_a_delivery_limit(
    broker: Broker, renewed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I1: messages behind a slow handler are cut off five times at a delivery limit of 3: none is lost.

    The control: without a new copy in their place the broker destroys them.
    """
    queue, ran, go = broker.queue(**{"x-delivery-limit": 3}), set(), threading.Event()
    if not renewed:
        monkeypatch.setattr(MessageSettlement, "renew", lambda self: False)

    @idempotent_consumer(MemoryStore(), scope=broker.unique, biz_id="id", **QUICK)
    def handle(body: Any, message: Message) -> None:
        go.wait(60)
        ran.add(body["id"])

    ids = {str(number) for number in range(8)}
    for one in sorted(ids):
        broker.publish(queue, {"id": one})
    with Proxy(url=broker.url) as proxy:
        consumer = IdempotentConsumer(through(proxy, broker.url), {queue: handle}, threads=1)
        with running(consumer):
            for _ in range(5):
                assert poll(lambda: consumer.health()["state"] == "running", timeout=20)
                time.sleep(0.8)
                proxy.cut()
                assert poll(lambda: consumer.health()["state"] != "running", timeout=20)
            go.set()
            assert poll(lambda: ran == ids, timeout=20 if renewed else 4) == renewed
            assert poll(lambda: count(broker.url, queue.name) == 0)
    assert proxy.done["cut"] >= 5


@pytest.mark.slow  # queues must be 6 s old, the broker takes 6 s to start, and the wait is 8 s
def test_what_waits_outlives_a_killed_broker(node: PrivateRabbitMQ, unique: str) -> None:
    """I1: successors are on disk before the ack: the broker is killed while they wait, and they come back."""
    queue = Queue(unique, queue_arguments={"x-queue-type": "quorum"})
    failed: list[str] = []
    ran: list[str] = []

    @idempotent_consumer(MemoryStore(), scope=unique, biz_id="id", backoff=Backoff(8.0, 8.0), busy_delay=0.1)
    def handle(body: Any, message: Message) -> None:
        if body["id"] not in failed:
            failed.append(body["id"])
            raise ValueError("not yet")
        ran.append(body["id"])

    ids = [str(number) for number in range(50)]
    with Connection(node.url) as connection:
        queue(connection.channel()).declare()
        delays.declare(connection, 8.0, [queue.name])
    time.sleep(6)  # a quorum queue younger than that may lose confirmed messages when its broker is killed (facts)
    with IdempotentProducer(node.url) as producer:
        for biz_id in ids:
            producer.publish({"id": biz_id}, routing_key=queue.name)
    consumer = IdempotentConsumer(node.url, {queue: handle})
    with running(consumer):
        assert poll(lambda: len(failed) == 50, timeout=20)
        node.kill()
        node.start()
        assert poll(lambda: len(set(ran)) == 50, timeout=60)
    assert sorted(ran) == sorted(ids)
