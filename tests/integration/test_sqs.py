"""`idempotent-sqs://` against moto's SQS server: a copy is dropped by FIFO queues, and what is held stays held."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from kombu import Connection, Consumer, Exchange, Producer, Queue, binding
from moto.server import ThreadedMotoServer

from idempotent_bus import Backoff, idempotent_consumer
from idempotent_bus.errors import ConfigurationError, PublishUnknown, Rejected, Unroutable
from idempotent_bus.headers import INNER_MSG_ID, REDRIVE
from idempotent_bus.model import Edge, Landing
from idempotent_bus.msgid import new_inner_msg_id
from idempotent_bus.producer import IdempotentProducer, ResendPolicy
from idempotent_bus.stores.memory import MemoryStore
from idempotent_bus.transports import register
from proxy import Proxy

SEND = b"AmazonSQS.SendMessage"
FAST = ResendPolicy(max_sends=3, patience=20.0, base=0.01, cap=0.02)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


Open = Callable[..., Connection]


@pytest.fixture
def open_connection(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens connections; they are closed at the end. options: transport options."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    register()
    opened: list[Connection] = []

    def open_connection(scheme: str = "idempotent-sqs", at: int = port, **options: Any) -> Connection:
        options = {"is_secure": False, "wait_time_seconds": 0, "polling_interval": 0.05, **options}
        connection = Connection(f"{scheme}://key:secret@127.0.0.1:{at}", transport_options=options)
        opened.append(connection)
        return connection

    yield open_connection
    for connection in opened:
        connection.close()


@pytest.fixture
def stored(port: int) -> Callable[[str], int]:
    """How many messages a queue has, visible or not."""
    client = boto3.client(
        "sqs",
        region_name="us-east-1",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )

    def stored(queue: str) -> int:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        url = client.get_queue_url(QueueName=queue)["QueueUrl"]
        return sum(map(int, client.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"].values()))

    return stored


def get(connection: Connection, queue: str, within: float = 5.0, no_ack: bool = False) -> Any:
    """One message, or None if none came within so many seconds."""
    deadline = time.monotonic() + within
    bound = Queue(queue)(connection.default_channel)
    while True:
        message = bound.get(no_ack=no_ack)
        if message is not None or time.monotonic() >= deadline:
            return message
        time.sleep(0.05)


# --- publishing -------------------------------------------------------------------------------------


def test_a_resend_to_a_fifo_queue_lands_once(open_connection: Open, stored: Any, unique: str) -> None:
    """The same inner-msg-id sent again is dropped by SQS; the receipt claims that it is there, at the broker's edge."""
    queue = f"{unique}.fifo"
    with IdempotentProducer(open_connection(), retry=FAST) as producer:
        first = producer.publish({"n": 1}, routing_key=queue)
        again = producer.publish({"n": 1}, routing_key=queue, inner_msg_id=first.inner_msg_id)
        other = producer.publish({"n": 1}, routing_key=queue)
    assert [receipt.landing for receipt in (first, again, other)] == [Landing.LANDED] * 3
    assert {receipt.edge for receipt in (first, again, other)} == {Edge.BROKER}
    assert stored(queue) == 2


@pytest.mark.parametrize(("scheme", "landed"), [("idempotent-sqs", 1), ("sqs", 2)])
def test_kombu_s_own_retry_lands_once(
    open_connection: Open, stored: Any, unique: str, port: int, scheme: str, landed: int
) -> None:
    """An answer that is lost on the way makes kombu's retry send again: once in the queue, twice with kombu's own."""
    queue = f"{unique}.fifo"
    with Proxy("127.0.0.1", port) as proxy:
        once = {"read_timeout": 2, "retries": {"total_max_attempts": 1}}
        connection = open_connection(scheme, at=proxy.port, **{"client-config": once})
        connection.default_channel.queue_declare(queue)
        proxy.lose_reply(SEND)
        Producer(connection).publish(
            {"n": 1},
            routing_key=queue,
            headers={INNER_MSG_ID: new_inner_msg_id()},
            retry=True,
            retry_policy={"max_retries": 3, "interval_start": 0, "interval_step": 0},
        )
        assert proxy.done["lose_reply"] == 1
    assert stored(queue) == landed


def test_a_lost_answer_is_settled_by_a_resend(open_connection: Open, stored: Any, unique: str, port: int) -> None:
    """The answer to the send is lost: the producer sends the same id again, and one message is in the queue."""
    queue = f"{unique}.fifo"
    with Proxy("127.0.0.1", port) as proxy, IdempotentProducer(open_connection(at=proxy.port), retry=FAST) as producer:
        proxy.lose_reply(SEND)
        receipt = producer.publish({"n": 1}, routing_key=queue)
    assert (receipt.sends, receipt.landing, stored(queue)) == (2, Landing.LANDED, 1)


def test_silence_is_unknown_not_a_refusal(open_connection: Open, stored: Any, unique: str, port: int) -> None:
    """No answer at all ends as unknown: SQS refused nothing, and the message is there indeed."""
    queue = f"{unique}.fifo"
    policy = ResendPolicy(max_sends=2, patience=5.0, base=0.01, cap=0.02)
    with Proxy("127.0.0.1", port) as proxy:
        connection = open_connection(at=proxy.port)
        with IdempotentProducer(connection, retry=policy, confirm_timeout=0.5) as producer:
            producer.publish({}, routing_key=queue)
            proxy.lose_reply(SEND, times=2, cut=False)
            with pytest.raises(PublishUnknown) as caught:
                producer.publish({}, routing_key=queue)
            assert caught.value.inner_msg_id
    assert stored(queue) == 2


def test_a_standard_queue_has_no_edge(open_connection: Open, stored: Any, unique: str) -> None:
    """A standard queue takes every copy, and the receipt says that the consumer must refuse them."""
    with IdempotentProducer(open_connection(), retry=FAST) as producer:
        first = producer.publish({}, routing_key=unique)
        producer.publish({}, routing_key=unique, inner_msg_id=first.inner_msg_id)
    assert (first.edge, stored(unique)) == (Edge.CONSUMER, 2)


def test_the_edge_is_the_weakest_of_all_queues(open_connection: Open, stored: Any, unique: str) -> None:
    """Routed to a FIFO and a standard queue: the receipt says consumer. To two FIFO queues: broker, once in each."""
    fifo, other, standard = f"{unique}.fifo", f"{unique}b.fifo", unique
    exchange = Exchange(unique, type="direct")
    # One entity with two bindings: kombu declares a queue of one name once.
    queues = [Queue(fifo, bindings=[binding(exchange, "both"), binding(exchange, "mixed")])]
    queues += [Queue(other, exchange, "both"), Queue(standard, exchange, "mixed")]
    with IdempotentProducer(open_connection(), exchange=exchange, declare=queues, retry=FAST) as producer:
        both = producer.publish({}, routing_key="both")
        producer.publish({}, routing_key="both", inner_msg_id=both.inner_msg_id)
        mixed = producer.publish({}, routing_key="mixed")
        with pytest.raises(Unroutable):
            producer.publish({}, routing_key="nowhere")
    assert (both.edge, mixed.edge) == (Edge.BROKER, Edge.CONSUMER)
    assert [stored(queue) for queue in (fifo, other, standard)] == [2, 1, 1]


def test_a_redriven_message_passes_the_edge(open_connection: Open, stored: Any, unique: str) -> None:
    """A move back from the dead letter keeps the inner-msg-id, and its redrive number takes it past the edge."""
    queue, ident = f"{unique}.fifo", new_inner_msg_id()
    producer = Producer(open_connection())
    for redrive in (0, 1, 1, 2):
        producer.publish({}, routing_key=queue, headers={INNER_MSG_ID: ident, REDRIVE: redrive})
    assert stored(queue) == 3


def test_a_foreign_deduplication_id_is_refused(open_connection: Open, unique: str) -> None:
    """Somebody else's MessageDeduplicationId could drop a message that the receipt calls landed: an error instead."""
    with IdempotentProducer(open_connection(), retry=FAST) as producer, pytest.raises(ConfigurationError):
        producer.publish({}, routing_key=f"{unique}.fifo", MessageDeduplicationId="mine")


def test_a_deleted_queue_is_unroutable(open_connection: Open, unique: str) -> None:
    """SQS says that the queue is gone: nothing was stored, and that is what the caller hears."""
    connection = open_connection()
    with IdempotentProducer(connection, retry=FAST) as producer:
        producer.publish({}, routing_key=unique)
        channel = connection.default_channel
        channel.sqs().delete_queue(QueueUrl=channel._resolve_queue_url(unique))
        with pytest.raises(Unroutable):
            producer.publish({}, routing_key=unique)
        assert producer.publish({}, routing_key=unique).landed  # declared anew by kombu


def test_what_is_too_long_is_refused(open_connection: Open, stored: Any, unique: str) -> None:
    """SQS takes at most 1 MiB: one send, an error that says so, and nothing stored."""
    with IdempotentProducer(open_connection(), retry=FAST) as producer:
        producer.publish({}, routing_key=unique)
        with pytest.raises(Rejected, match="sends: 1"):
            producer.publish("x" * 1_500_000, routing_key=unique)
    assert stored(unique) == 1


# --- consuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "at_once"), [("idempotent-sqs", 10), ("sqs", 1)])
def test_a_held_message_holds_up_no_other(open_connection: Open, unique: str, scheme: str, at_once: int) -> None:
    """Ten messages of no group are delivered although none is acked; with kombu's one group for all only the first."""
    connection = open_connection(scheme)
    producer = Producer(connection)
    for n in range(10):
        producer.publish({"n": n}, routing_key=f"{unique}.fifo", headers={INNER_MSG_ID: new_inner_msg_id()})
    held = [get(connection, f"{unique}.fifo", within=0) for _ in range(10)]
    assert len([message for message in held if message is not None]) == at_once


def test_a_group_of_the_sender_is_kept(open_connection: Open, unique: str) -> None:
    """A MessageGroupId that the sender gives keeps the order of its messages: the second waits for the first's ack."""
    queue = f"{unique}.fifo"
    connection = open_connection()
    with IdempotentProducer(connection, retry=FAST) as producer:
        for n in range(2):
            producer.publish({"n": n}, routing_key=queue, MessageGroupId="customer-1")
    first = get(connection, queue)
    assert get(connection, queue, within=0) is None
    first.ack()
    second = get(connection, queue)
    assert (first.payload, second.payload) == ({"n": 0}, {"n": 1})


@pytest.mark.parametrize(("scheme", "comes_back"), [("idempotent-sqs", False), ("sqs", True)])
def test_a_live_consumer_keeps_its_message(open_connection: Open, unique: str, scheme: str, comes_back: bool) -> None:
    """The visibility timeout passes while a message is worked on: nobody else gets it; with kombu's own they do."""
    holder, other = open_connection(scheme, visibility_timeout=1), open_connection()
    Producer(holder).publish({}, routing_key=unique)
    message = get(holder, unique)
    assert (get(other, unique, within=2.5) is not None) is comes_back
    if not comes_back:
        message.ack()
        assert get(other, unique, within=1.5) is None


def test_the_queue_s_own_timeout_counts(open_connection: Open, unique: str) -> None:
    """A queue that somebody made with a shorter timeout than the option's: what is held there is kept all the same."""
    holder, other = open_connection(), open_connection()
    holder.default_channel.sqs().create_queue(QueueName=unique, Attributes={"VisibilityTimeout": "1"})
    Producer(holder).publish({}, routing_key=unique)
    assert get(holder, unique) is not None
    assert get(other, unique, within=2.5) is None


def test_what_a_dead_consumer_held_comes_back_once(open_connection: Open, unique: str) -> None:
    """A consumer whose keeper is gone, as after a kill: the message comes back after the visibility timeout, marked."""
    holder, other = open_connection(visibility_timeout=1), open_connection(visibility_timeout=60)
    Producer(holder).publish({}, routing_key=unique)
    assert get(holder, unique).delivery_info["redelivered"] is False
    holder.default_channel.keeper.stop()
    message = get(other, unique)
    assert message.delivery_info["redelivered"] is True
    assert message.delivery_info["queue"] == unique
    message.ack()
    assert get(other, unique, within=1.5) is None


def test_a_delay_is_kept_by_the_broker(open_connection: Open, unique: str) -> None:
    """`basic_delay`: invisible until then, back in its own queue after it, even though the channel was closed."""
    holder, other = open_connection(visibility_timeout=60), open_connection()
    Producer(holder).publish({}, routing_key=unique)
    message = get(holder, unique)
    began = time.monotonic()
    assert message.channel.basic_delay(message.delivery_tag, 2) is True
    assert message.channel.basic_delay(message.delivery_tag, 2) is False
    holder.close()
    assert get(other, unique, within=8) is not None
    assert time.monotonic() - began >= 1.9


def test_a_long_delay_is_cut_to_what_sqs_takes(open_connection: Open, unique: str) -> None:
    """More than the 12 hours that SQS allows is no error: the message stays invisible for as long as it can."""
    connection = open_connection()
    Producer(connection).publish({}, routing_key=unique)
    message = get(connection, unique)
    assert message.channel.basic_delay(message.delivery_tag, 10 * 86400) is True


def test_a_requeue_goes_back_to_its_own_queue_at_once(open_connection: Open, unique: str) -> None:
    """Two queues of one exchange: what is requeued comes back in the queue it came from, once, without a wait."""
    connection, exchange = open_connection(), Exchange(unique, type="direct")
    one, two = Queue(f"{unique}a", exchange, "k"), Queue(f"{unique}b", exchange, "k")
    with IdempotentProducer(connection, exchange=exchange, declare=[one, two], retry=FAST) as producer:
        producer.publish({}, routing_key="k")
    get(connection, one.name).requeue()
    began = time.monotonic()
    again = get(connection, one.name)
    assert again.delivery_info["redelivered"] is True
    assert time.monotonic() - began < 5
    get(connection, two.name).ack()
    again.ack()
    assert get(connection, one.name, within=1.2) is None
    assert get(connection, two.name, within=1.2) is None


def test_closing_gives_back_what_was_held(open_connection: Open, unique: str) -> None:
    """An orderly close makes unsettled messages visible at once, not after the visibility timeout."""
    holder = open_connection(visibility_timeout=600)
    Producer(holder).publish({}, routing_key=unique)
    assert get(holder, unique) is not None
    holder.close()
    assert get(open_connection(), unique) is not None


def test_no_ack_deletes(open_connection: Open, stored: Any, unique: str) -> None:
    """Without acks a message is gone once it is delivered, by `get` and by a consumer (kombu's leaves it there)."""
    connection = open_connection()
    for _ in range(2):
        Producer(connection).publish({}, routing_key=unique)
    assert get(connection, unique, no_ack=True) is not None
    seen: list[Any] = []
    with Consumer(connection, Queue(unique), callbacks=[lambda body, message: seen.append(body)], no_ack=True):
        connection.drain_events(timeout=5)
    assert (len(seen), stored(unique)) == (1, 0)


def test_a_consumer_drains_a_fifo_queue(open_connection: Open, stored: Any, unique: str) -> None:
    """Prefetched messages are acked one by one, and the queue is empty at the end; every message came once."""
    connection, queue = open_connection(), f"{unique}.fifo"
    with IdempotentProducer(connection, retry=FAST) as producer:
        producer.publish_many([{"n": n} for n in range(25)], routing_key=queue)
    seen: list[int] = []

    def handle(body: dict[str, int], message: Any) -> None:
        seen.append(body["n"])
        message.ack()

    with Consumer(connection, Queue(queue), callbacks=[handle], prefetch_count=10):
        deadline = time.monotonic() + 20
        while len(seen) < 25 and time.monotonic() < deadline:
            connection.drain_events(timeout=5)
    assert (sorted(seen), stored(queue)) == (list(range(25)), 0)


def test_a_guarded_consumer_on_both_kinds_of_queue(open_connection: Open, stored: Any, unique: str) -> None:
    """The whole way: copies, and a handler that fails once; each payment is handled once, the hopeless one is dead."""
    fifo, standard, dead = f"{unique}.fifo", unique, f"{unique}-dead"
    connection, done, failed = open_connection(), [], set()

    @idempotent_consumer(
        MemoryStore(),
        scope=unique,
        biz_id="payment_id",
        dead_letter=dead,
        backoff=Backoff(base=0.05, cap=0.1),
        busy_delay=0.1,
        max_attempts=2,
    )
    def issue_card(body: dict[str, str], message: Any) -> None:
        payment = body["payment_id"]
        if payment == "hopeless" or payment not in failed:
            failed.add(payment)
            raise RuntimeError("not yet")
        done.append(payment)

    with IdempotentProducer(connection, retry=FAST) as producer:
        for queue in (fifo, standard):
            for payment in (f"p-1 {queue}", f"p-2 {queue}"):
                receipt = producer.publish({"payment_id": payment}, routing_key=queue)
                producer.publish({"payment_id": payment}, routing_key=queue, inner_msg_id=receipt.inner_msg_id)
        producer.publish({"payment_id": "hopeless"}, routing_key=fifo)
    with Consumer(connection, [Queue(fifo), Queue(standard)], callbacks=[issue_card], prefetch_count=10):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (stored(fifo) or stored(standard)):
            with contextlib.suppress(socket.timeout):
                connection.drain_events(timeout=1)
    assert sorted(done) == sorted(f"p-{n} {queue}" for n in (1, 2) for queue in (fifo, standard))
    assert (stored(fifo), stored(standard), stored(dead)) == (0, 0, 1)
