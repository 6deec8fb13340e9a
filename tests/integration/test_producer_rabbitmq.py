"""The producer on a real RabbitMQ, through a proxy that loses, delays, cuts and stalls."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kombu import Connection, Exchange, Producer, Queue

import servers
from idempotent_bus.errors import ConfigurationError, PublishUnknown, Rejected, Unroutable
from idempotent_bus.headers import INNER_MSG_ID
from idempotent_bus.model import Edge, Landing
from idempotent_bus.producer import IdempotentProducer, PublishManyError, ResendPolicy, idempotent_producer
from proxy import Proxy, through

FAST = ResendPolicy(max_sends=5, patience=20.0, base=0.01, cap=0.05)
HEADER = INNER_MSG_ID.encode()


class Broker:
    """A direct connection for looking on, and queues that are deleted at the end."""

    def __init__(self, url: str) -> None:
        self.connection = Connection(url)
        self.channel = self.connection.channel()
        self._made: list[str] = []

    def queue(self, name: str, **options: Any) -> str:
        Queue(name, durable=True, **options)(self.channel).declare()
        self._made.append(name)
        return name

    def drain(self, name: str) -> list[Any]:
        messages = []
        while (message := self.channel.basic_get(name, no_ack=True)) is not None:
            messages.append(message)
        return messages

    def ids(self, name: str) -> list[str]:
        return [message.headers[INNER_MSG_ID] for message in map(self.channel.message_to_python, self.drain(name))]

    def close(self) -> None:
        for name in self._made:
            self.channel.queue_delete(name)
        self.connection.release()


@pytest.fixture
def url() -> str:
    return servers.rabbitmq()


@pytest.fixture
def broker(url: str) -> Iterator[Broker]:
    broker = Broker(url)
    yield broker
    broker.close()


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    with Proxy(url=url) as proxy:
        yield proxy


@pytest.fixture
def make(url: str) -> Iterator[Callable[..., IdempotentProducer]]:
    made: list[IdempotentProducer] = []

    def make(connection: Any = None, **options: Any) -> IdempotentProducer:
        options.setdefault("retry", FAST)
        options.setdefault("confirm_timeout", 0.5)
        made.append(IdempotentProducer(url if connection is None else connection, **options))
        return made[-1]

    yield make
    for producer in made:
        producer.close()


def test_a_publish_lands_once_and_is_persistent(broker: Broker, make: Any, unique: str) -> None:
    """A confirmed publish is one message in the queue, persistent, with the body untouched."""
    queue = broker.queue(unique)
    receipt = make().publish({"payment_id": "p-1"}, routing_key=queue)
    messages = [broker.channel.message_to_python(message) for message in broker.drain(queue)]
    assert [message.payload for message in messages] == [{"payment_id": "p-1"}]
    assert messages[0].properties["delivery_mode"] == 2
    assert messages[0].headers[INNER_MSG_ID] == receipt.inner_msg_id
    assert (receipt.landing, receipt.edge, receipt.sends) == (Landing.LANDED, Edge.CONSUMER, 1)


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "silent"])
def test_lost_confirms_make_copies_with_one_id(
    cut: bool, broker: Broker, make: Any, proxy: Proxy, url: str, unique: str
) -> None:
    """Confirms lost three times: RabbitMQ has copies, all of one inner-msg-id, and the receipt counts the sends."""
    queue = broker.queue(unique)
    proxy.lose_reply(HEADER, times=3, cut=cut)
    receipt = make(through(proxy, url)).publish({"n": 1}, routing_key=queue)
    assert (receipt.landing, receipt.sends) == (Landing.LANDED, 4)
    assert broker.ids(queue) == [receipt.inner_msg_id] * 4
    assert proxy.done["lose_reply"] == 3


def test_control_kombus_confirms_and_retry_make_copies_that_nobody_can_tell_apart(
    broker: Broker, proxy: Proxy, url: str, unique: str
) -> None:
    """Control: kombu's confirm_publish with retry, under the same loss, leaves copies without any id of the bus."""
    queue = broker.queue(unique)
    proxy.lose_reply(b"n-is-1", times=3)
    options = {"confirm_publish": True}
    with Connection(through(proxy, url), transport_options=options) as connection:
        Producer(connection).publish(
            {"n": "n-is-1"}, routing_key=queue, retry=True, retry_policy={"interval_start": 0, "interval_max": 0.01}
        )
    messages = [broker.channel.message_to_python(message) for message in broker.drain(queue)]
    assert len(messages) == 4
    assert all(INNER_MSG_ID not in message.headers for message in messages)


def test_confirms_that_never_come_end_as_unknown(
    broker: Broker, make: Any, proxy: Proxy, url: str, unique: str
) -> None:
    """When every confirm is lost the outcome is unknown; the same id published again ends as landed."""
    queue = broker.queue(unique)
    proxy.lose_reply(HEADER, times=2)
    producer = make(through(proxy, url), retry=ResendPolicy(max_sends=2, base=0.01, cap=0.02))
    with pytest.raises(PublishUnknown) as caught:
        producer.publish({"n": 1}, routing_key=queue)
    receipt = producer.publish({"n": 1}, routing_key=queue, inner_msg_id=caught.value.inner_msg_id)
    assert receipt.landed
    assert broker.ids(queue) == [caught.value.inner_msg_id] * 3


def test_a_stale_ack_is_not_taken_for_another_message(
    broker: Broker, make: Any, proxy: Proxy, url: str, unique: str
) -> None:
    """The late ack of message 1 does not confirm message 2, which never reached the broker until it was resent."""
    queue = broker.queue(unique)
    producer = make(through(proxy, url), confirm_timeout=0.3, retry=ResendPolicy(max_sends=1))
    proxy.delay_reply(b"first-one", 0.6)
    with pytest.raises(PublishUnknown):
        producer.publish({"n": "first-one"}, routing_key=queue)
    proxy.lose_request(b"second-one")
    with pytest.raises(PublishUnknown):
        producer.publish({"n": "second-one"}, routing_key=queue)
    time.sleep(0.5)
    assert len(broker.drain(queue)) == 1


def test_control_py_amqp_takes_the_stale_ack(broker: Broker, proxy: Proxy, url: str, unique: str) -> None:
    """Control: py-amqp's confirm_publish reports message 2 as confirmed by the ack of message 1; it is lost."""
    queue = broker.queue(unique)
    proxy.delay_reply(b"first-one", 0.6)
    with Connection(through(proxy, url), transport_options={"confirm_publish": True}) as connection:
        producer = Producer(connection.channel())
        with pytest.raises(TimeoutError):
            producer.publish({"n": "first-one"}, routing_key=queue, confirm_timeout=0.3)
        # Held up on its way to the broker, while the ack of message 1 is already on its way to the client.
        proxy.hold_request(b"second-one")
        producer.publish({"n": "second-one"}, routing_key=queue, confirm_timeout=5)
    bodies = [broker.channel.message_to_python(message).payload["n"] for message in broker.drain(queue)]
    assert bodies == ["first-one"]


def test_a_full_queue_that_rejects_is_rejected(broker: Broker, make: Any, unique: str) -> None:
    """A nack from a full queue is tried again, then raised as Rejected; the connection stays in use."""
    queue = broker.queue(unique, queue_arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
    producer = make(retry=ResendPolicy(max_sends=3, base=0.01, cap=0.02))
    producer.publish({"n": 1}, routing_key=queue)
    with pytest.raises(Rejected, match="sends: 3") as caught:
        producer.publish({"n": 2}, routing_key=queue)
    ids = broker.ids(queue)
    assert caught.value.inner_msg_id not in ids
    assert producer.publish({"n": 3}, routing_key=queue).sends == 1


def test_a_nack_that_ends_is_landed(broker: Broker, make: Any, unique: str) -> None:
    """A queue that is emptied meanwhile takes the resend: landed, with the sends counted."""
    queue = broker.queue(unique, queue_arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        broker.channel.queue_purge(queue)

    producer = make(retry=ResendPolicy(max_sends=3, sleep=sleep))
    producer.publish({"n": 1}, routing_key=queue)
    receipt = producer.publish({"n": 2}, routing_key=queue)
    assert (receipt.landing, receipt.sends, len(slept)) == (Landing.LANDED, 2, 1)
    assert broker.ids(queue) == [receipt.inner_msg_id]


def test_an_unroutable_message_is_told(broker: Broker, make: Any, unique: str) -> None:
    """No queue for the key: Unroutable, at once and in one send; the channel stays in use."""
    producer = make()
    with pytest.raises(Unroutable, match="nothing was stored"):
        producer.publish({}, routing_key=f"{unique}.nowhere")
    assert producer.publish({}, routing_key=broker.queue(unique)).landed


def test_a_missing_exchange_is_told(broker: Broker, make: Any, unique: str) -> None:
    """A missing exchange closes the channel; it is raised as Unroutable, chained, and the producer goes on."""
    producer = make()
    with pytest.raises(Unroutable, match="exchange is missing") as caught:
        producer.publish({}, exchange=f"{unique}.nowhere", routing_key="k")
    assert type(caught.value.__cause__).__name__ == "NotFound"
    assert producer.publish({}, routing_key=broker.queue(unique)).landed


def test_an_unroutable_resend_after_a_lost_confirm_is_unknown(
    broker: Broker, make: Any, proxy: Proxy, url: str, unique: str
) -> None:
    """The first send landed, its confirm was lost, the queue is gone at the resend: nobody may say `nothing stored`."""
    queue = broker.queue(unique)
    proxy.lose_reply(HEADER)
    policy = ResendPolicy(max_sends=3, sleep=lambda _: broker.channel.queue_delete(queue))
    with pytest.raises(PublishUnknown, match="may or may not have landed"):
        make(through(proxy, url), retry=policy).publish({}, routing_key=queue)


def test_an_undeclarable_queue_is_a_configuration_error(broker: Broker, make: Any, unique: str) -> None:
    """A declaration that the broker refuses is said as such, before anything is sent."""
    queue = broker.queue(unique)
    other = Queue(queue, durable=True, queue_arguments={"x-max-length": 7})
    with pytest.raises(ConfigurationError, match="refused to declare"):
        make().publish({}, routing_key=queue, declare=[other])
    assert broker.drain(queue) == []


def test_an_exchange_object_is_declared(broker: Broker, make: Any, unique: str) -> None:
    """An Exchange and the queues in declare= exist afterwards, again after the connection was lost."""
    exchange = Exchange(f"{unique}.x", type="topic", durable=True)
    queue = Queue(broker.queue(unique), exchange, routing_key="paid.*")
    make().publish({"n": 1}, exchange=exchange, routing_key="paid.card", declare=[queue])
    assert len(broker.drain(unique)) == 1
    broker.channel.exchange_delete(exchange.name)


@pytest.mark.parametrize("fault", ["lose_request", "cut_request"])
def test_a_connection_cut_in_mid_publish_is_survived(
    fault: str, broker: Broker, make: Any, proxy: Proxy, url: str, unique: str
) -> None:
    """Cut before or in the middle of the message: the resend lands, once, under the same id."""
    queue = broker.queue(unique)
    getattr(proxy, fault)(HEADER, times=2)
    receipt = make(through(proxy, url)).publish({"n": "x" * 1000}, routing_key=queue)
    assert receipt.sends == 3
    assert broker.ids(queue) == [receipt.inner_msg_id]


def test_a_stalled_broker_does_not_hold_the_sender_for_ever(
    broker: Broker, make: Any, proxy: Proxy, url: str, unique: str
) -> None:
    """A broker that stops answering (SIGSTOP) ends as unknown within the policy; afterwards the same id lands."""
    queue = broker.queue(unique)
    producer = make(through(proxy, url), confirm_timeout=0.2, retry=ResendPolicy(max_sends=2, patience=1.0))
    producer.publish({"n": 0}, routing_key=queue)
    proxy.stall()
    began = time.monotonic()
    with pytest.raises(PublishUnknown) as caught:
        producer.publish({"n": 1}, routing_key=queue)
    assert time.monotonic() - began < 15
    proxy.resume()
    assert producer.publish({"n": 1}, routing_key=queue, inner_msg_id=caught.value.inner_msg_id).landed
    assert set(broker.ids(queue)[1:]) == {caught.value.inner_msg_id}


def test_a_stall_with_a_full_socket_ends_too(broker: Broker, make: Any, proxy: Proxy, url: str, unique: str) -> None:
    """A body larger than all socket buffers, nobody reads: the write itself must end, as unknown."""
    queue = broker.queue(unique)
    producer = make(through(proxy, url), confirm_timeout=0.2, retry=ResendPolicy(max_sends=1, patience=1.0))
    producer.publish({"n": 0}, routing_key=queue)
    proxy.stall()
    with pytest.raises(PublishUnknown):
        producer.publish({"n": "x" * 20_000_000}, routing_key=queue)


def test_a_broker_that_is_away_is_said_to_be(broker: Broker, make: Any, proxy: Proxy, url: str, unique: str) -> None:
    """Nobody listens: the error says that nothing was sent; once somebody listens again, a publish waits for that."""
    queue = broker.queue(unique)
    producer = make(through(proxy, url), retry=ResendPolicy(patience=0.2, base=0.05, cap=0.05))
    proxy.refuse()
    with pytest.raises(PublishUnknown, match="never sent"):
        producer.publish({"n": 1}, routing_key=queue)
    threading.Timer(0.3, proxy.accept_again).start()
    patient = make(through(proxy, url), retry=ResendPolicy(patience=10.0, base=0.05, cap=0.1))
    assert patient.publish({"n": 2}, routing_key=queue).sends == 1


def test_a_connection_closed_while_idle_is_no_doubt(
    broker: Broker, make: Any, proxy: Proxy, url: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that died while nobody published is replaced before the send: one send, one message."""
    monkeypatch.setattr("idempotent_bus.sending.amqp._LOOK_AFTER_IDLE", 0.0)
    queue = broker.queue(unique)
    producer = make(through(proxy, url))
    producer.publish({"n": 1}, routing_key=queue)
    proxy.cut()
    time.sleep(0.1)
    receipt = producer.publish({"n": 2}, routing_key=queue)
    assert receipt.sends == 1
    assert len(broker.drain(queue)) == 2


def test_eight_threads_share_one_producer(broker: Broker, make: Any, unique: str) -> None:
    """Eight threads on one producer: every publish lands once, and each receipt is its own message's."""
    queue = broker.queue(unique)
    producer = make(confirm_timeout=10)
    receipts: list[Any] = []

    def publish() -> None:
        receipts.extend(producer.publish({"n": number}, routing_key=queue) for number in range(50))

    threads = [threading.Thread(target=publish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(receipt.inner_msg_id for receipt in receipts) == sorted(broker.ids(queue))
    assert len(receipts) == 400


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_has_a_connection_of_its_own(broker: Broker, make: Any, unique: str) -> None:
    """A child publishes over a new connection, though the lock was held at the fork; the parent's goes on unharmed."""
    queue = broker.queue(unique)
    producer = make()
    first = producer.publish({"n": 1}, routing_key=queue)
    with producer._lock:
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # a child that hangs must end too
            code = 1
            try:
                producer.publish({"n": 2}, routing_key=queue)
                producer.close()
                del producer
                code = 0
            finally:
                os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    third = producer.publish({"n": 3}, routing_key=queue)
    assert third.sends == 1
    ids = broker.ids(queue)
    assert len(set(ids)) == 3
    assert {first.inner_msg_id, third.inner_msg_id} < set(ids)


def test_the_users_consumers_do_not_run_while_a_publish_waits(broker: Broker, make: Any, unique: str) -> None:
    """Waiting for a confirm reads only the private connection: a handler that publishes is not entered again."""
    queue, other = broker.queue(unique), broker.queue(f"{unique}.out")
    producer = make(broker.connection)
    depth: list[int] = []
    deepest: list[int] = []

    def handle(body: Any, message: Any) -> None:
        depth.append(1)
        deepest.append(len(depth))
        producer.publish(body, routing_key=other)
        message.ack()
        depth.pop()

    for number in range(5):
        producer.publish({"n": number}, routing_key=queue)
    with broker.connection.Consumer(Queue(queue), callbacks=[handle]):
        while len(deepest) < 5:
            broker.connection.drain_events(timeout=5)
    assert max(deepest) == 1


@pytest.mark.parametrize("kind", ["connection", "pool", "producers", "url"])
def test_everything_that_names_a_broker_is_accepted(
    kind: str, broker: Broker, make: Any, url: str, unique: str
) -> None:
    """A Connection, one out of a pool, a pool, a pool of producers, a URL: each is copied and left alone."""
    from kombu import pools

    queue = broker.queue(unique)
    connection = Connection(url, transport_options={"confirm_publish": True})
    given = {
        "connection": connection,
        "pool": connection.Pool(2),
        "producers": pools.producers[connection],
        "url": url,
    }[kind]
    assert make(given).publish({}, routing_key=queue).landed
    assert not connection.connected
    if kind == "pool":
        with given.acquire() as pooled:
            assert make(pooled).publish({}, routing_key=queue).landed


def test_the_decorator_on_a_real_broker(broker: Broker, url: str, unique: str) -> None:
    """@idempotent_producer publishes the returned body and gives the receipt."""
    queue = broker.queue(unique)

    @idempotent_producer(url, routing_key=queue, biz_id="payment_id")
    def pay(payment_id: str) -> dict[str, str]:
        return {"payment_id": payment_id}

    receipt = pay("p-1")
    assert broker.ids(queue) == [receipt.inner_msg_id]


# --- streams ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "generator"])
def test_a_stream_lands_in_order_with_its_receipts(as_list: bool, broker: Broker, make: Any, unique: str) -> None:
    """2,000 messages in a window of 100: as many in the queue, in order, and the receipts match."""
    queue = broker.queue(unique)
    bodies = ({"n": number} for number in range(2000))
    receipts = make(confirm_timeout=10).publish_many(list(bodies) if as_list else bodies, routing_key=queue, window=100)
    assert [receipt.inner_msg_id for receipt in receipts] == broker.ids(queue)
    assert all(receipt.sends == 1 for receipt in receipts)


def test_a_stream_survives_cuts_without_a_loss(broker: Broker, make: Any, proxy: Proxy, url: str, unique: str) -> None:
    """Cut in the middle, in the request and in the reply: every message is there, copies have its id, receipts hold."""
    queue = broker.queue(unique)
    producer = make(through(proxy, url), confirm_timeout=5)
    producer.publish_many([{"n": -1}], routing_key=queue)
    proxy.cut_request(b'"n": 150}', times=1)
    proxy.lose_reply(b'"n": 600}', times=1)
    receipts = producer.publish_many(({"n": number} for number in range(1000)), routing_key=queue, window=50)
    ids = broker.ids(queue)[1:]
    assert proxy.done["cut_request"] == 1
    assert proxy.done["lose_reply"] == 1
    assert set(ids) == {receipt.inner_msg_id for receipt in receipts}
    assert len({receipt.inner_msg_id for receipt in receipts}) == 1000
    assert any(receipt.sends > 1 for receipt in receipts)
    assert len(ids) <= sum(receipt.sends for receipt in receipts)


def test_a_stream_tells_which_messages_have_no_way(broker: Broker, make: Any, unique: str) -> None:
    """An unroutable message and a missing exchange fail alone and exactly; all others land."""
    queue = broker.queue(unique)
    bodies = [({"n": number}, {"routing_key": queue}) for number in range(100)]
    bodies[30] = ({"n": 30}, {"routing_key": f"{unique}.nowhere"})
    bodies[60] = ({"n": 60}, {"exchange": f"{unique}.missing", "routing_key": "k"})
    with pytest.raises(PublishManyError) as caught:
        make(confirm_timeout=10).publish_many(bodies)
    failed = {index: type(result) for index, result in enumerate(caught.value.results) if isinstance(result, Exception)}
    assert failed == {30: Unroutable, 60: Unroutable}
    assert len(broker.drain(queue)) == 98


def test_a_stream_into_a_full_queue_is_rejected_where_it_was(broker: Broker, make: Any, unique: str) -> None:
    """A queue of ten that rejects: ten landed, the others are Rejected, and the results say which is which."""
    queue = broker.queue(unique, queue_arguments={"x-max-length": 10, "x-overflow": "reject-publish"})
    producer = make(confirm_timeout=10, retry=ResendPolicy(max_sends=2, base=0.01, cap=0.02))
    with pytest.raises(PublishManyError) as caught:
        producer.publish_many([{"n": number} for number in range(25)], routing_key=queue)
    landed = [result.inner_msg_id for result in caught.value.results if not isinstance(result, Exception)]
    assert landed == broker.ids(queue)
    assert len(caught.value.results) == 25
    assert all(isinstance(result, Rejected) for result in caught.value.results if isinstance(result, Exception))


def test_a_stream_to_a_stalled_broker_gives_up_as_a_whole(
    broker: Broker, make: Any, proxy: Proxy, url: str, unique: str
) -> None:
    """The broker stops answering: what was under way is unknown, the rest is not taken, and it ends."""
    queue = broker.queue(unique)
    policy = ResendPolicy(max_sends=2, patience=1.0, base=0.01, cap=0.02)
    producer = make(through(proxy, url), confirm_timeout=0.3, retry=policy)
    producer.publish_many([{"n": -1}], routing_key=queue)
    taken: list[int] = []

    def bodies() -> Iterator[Any]:
        for number in range(1000):
            if number == 20:
                proxy.stall()
            taken.append(number)
            yield {"n": number}

    with pytest.raises(PublishManyError) as caught:
        producer.publish_many(bodies(), routing_key=queue, window=50)
    results = caught.value.results
    assert len(results) == len(taken) < 200
    assert isinstance(results[-1], PublishUnknown)
    proxy.resume()
    again = [
        ({"n": number}, {"inner_msg_id": result.inner_msg_id})
        for number, result in enumerate(results)
        if isinstance(result, Exception)
    ]
    producer.publish_many(again, routing_key=queue)
    assert set(broker.ids(queue)[1:]) == {result.inner_msg_id for result in results}
