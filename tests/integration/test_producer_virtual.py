"""The producer over kombu's own virtual transports: Redis, memory, SQL. Their edge is at the consumer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Exchange, Producer, Queue

import servers
from idempotent_bus.errors import PublishUnknown, Rejected, Unroutable
from idempotent_bus.headers import INNER_MSG_ID
from idempotent_bus.model import Edge, Landing
from idempotent_bus.producer import IdempotentProducer, ResendPolicy
from proxy import Proxy, through

FAST = ResendPolicy(max_sends=5, patience=20.0, base=0.01, cap=0.05)
KINDS = ["memory", "redis", "sqlite"]


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "redis":
        return servers.redis()
    return "memory://" if request.param == "memory" else f"sqla+sqlite:///{tmp_path}/broker.db"


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    with Connection(url) as connection:
        yield connection


@pytest.fixture
def drain() -> Callable[..., list[Any]]:
    """Takes all messages out of a queue."""

    def drain(connection: Connection, queue: str) -> list[Any]:
        bound = Queue(queue)(connection.default_channel)
        messages = []
        while (message := bound.get(no_ack=True)) is not None:
            messages.append(message)
        return messages

    return drain


def test_a_publish_lands_with_its_id(connection: Connection, drain: Any, unique: str) -> None:
    """One message, the body untouched, the id in its header; the receipt says that the edge is at the consumer."""
    with IdempotentProducer(connection, retry=FAST) as producer:
        receipt = producer.publish({"n": 1}, routing_key=unique)
    messages = drain(connection, unique)
    assert [message.payload for message in messages] == [{"n": 1}]
    assert messages[0].headers[INNER_MSG_ID] == receipt.inner_msg_id
    assert (receipt.landing, receipt.edge, receipt.sends) == (Landing.LANDED, Edge.CONSUMER, 1)


def test_what_cannot_be_routed_is_an_error(connection: Connection, drain: Any, unique: str) -> None:
    """A key without a queue and an exchange that nobody declared: Unroutable, where kombu drops the message."""
    exchange = Exchange(f"{unique}.x", type="topic")
    queue = Queue(unique, exchange, routing_key="paid.*")
    with IdempotentProducer(connection, retry=FAST) as producer:
        assert producer.publish({"n": 1}, exchange=exchange, routing_key="paid.card", declare=[queue]).landed
        with pytest.raises(Unroutable):
            producer.publish({"n": 2}, exchange=exchange, routing_key="lost.card")
        with pytest.raises(Unroutable):
            producer.publish({"n": 3}, exchange=f"{unique}.missing", routing_key="k")
        with pytest.raises(Unroutable):
            producer.publish({"n": 4})
    assert len(drain(connection, unique)) == 1
    queue(connection.default_channel).delete()


def test_control_kombu_drops_what_it_cannot_route(connection: Connection, unique: str) -> None:
    """Control: kombu's own producer returns normally for a key that no queue is bound to."""
    exchange = Exchange(f"{unique}.x", type="direct")
    producer = Producer(connection, exchange=exchange)
    queue = Queue(unique, exchange, routing_key="k")
    queue(connection.default_channel).declare()
    producer.publish({"n": 1}, routing_key="nowhere")
    assert Queue(unique)(connection.default_channel).get(no_ack=True) is None
    queue(connection.default_channel).delete()


@pytest.mark.parametrize("kind", ["memory", "redis"])  # the SQL transport hands every option to SQLAlchemy
def test_a_dead_letter_queue_of_kombu_does_not_swallow_the_unroutable(kind: str, unique: str) -> None:
    """With `deadletter_queue` set kombu would put it there and say nothing: here it is Unroutable, and not there."""
    url = "memory://" if kind == "memory" else servers.redis()
    exchange = Exchange(f"{unique}.x", type="direct")
    options = {"deadletter_queue": f"{unique}.dead"}
    with Connection(url, transport_options=options) as connection:
        with IdempotentProducer(connection, retry=FAST) as producer, pytest.raises(Unroutable):
            producer.publish({"n": 1}, exchange=exchange, routing_key="nowhere")
        assert Queue(f"{unique}.dead")(connection.default_channel).get(no_ack=True) is None


def test_queues_declared_on_the_users_connection_are_known(connection: Connection, drain: Any, unique: str) -> None:
    """A binding that the user declared on the given connection routes the publish, without declare=."""
    exchange = Exchange(f"{unique}.x", type="topic")
    queue = Queue(unique, exchange, routing_key="paid.#")
    queue(connection.default_channel).declare()
    with IdempotentProducer(connection, retry=FAST) as producer:
        assert producer.publish({"n": 1}, exchange=exchange.name, routing_key="paid.by.card").landed
    assert len(drain(connection, unique)) == 1
    queue(connection.default_channel).delete()


def test_a_broadcast_is_landed_only_where_it_is_stored(connection: Connection, drain: Any, unique: str) -> None:
    """A fanout lands where the transport stores it for every bound queue; elsewhere it is refused, not guessed."""
    exchange = Exchange(f"{unique}.x", type="fanout")
    queue = Queue(unique, exchange)
    with IdempotentProducer(connection, retry=FAST) as producer:
        if connection.transport.driver_type != "memory":
            with pytest.raises(Unroutable, match="stores no broadcast"):
                producer.publish({"n": 1}, exchange=exchange, declare=[queue])
            queue(connection.default_channel).delete()
            return
        with pytest.raises(Unroutable):
            producer.publish({"n": 0}, exchange=exchange)
        assert producer.publish({"n": 1}, exchange=exchange, declare=[queue]).landed
    assert len(drain(connection, unique)) == 1


def test_lost_replies_on_redis_make_copies_with_one_id(drain: Any, unique: str) -> None:
    """The answer to LPUSH lost three times: copies on plain Redis, all with one id; the receipt counts the sends."""
    url = servers.redis()
    with Proxy(url=url) as proxy, IdempotentProducer(through(proxy, url), retry=FAST) as producer:
        proxy.lose_reply(INNER_MSG_ID.encode(), times=3)
        receipt = producer.publish({"n": 1}, routing_key=unique)
        assert proxy.done["lose_reply"] == 3
    with Connection(url) as connection:
        ids = [message.headers[INNER_MSG_ID] for message in drain(connection, unique)]
    assert ids == [receipt.inner_msg_id] * 4
    assert receipt.landed


def test_a_redis_that_stopped_answering_ends_as_unknown(unique: str) -> None:
    """A stalled server does not hold the sender for ever: unknown, within the policy."""
    url = servers.redis()
    policy = ResendPolicy(max_sends=1, patience=0.5)
    with Proxy(url=url) as proxy:
        with IdempotentProducer(through(proxy, url), retry=policy, confirm_timeout=0.2) as producer:
            producer.publish({"n": 1}, routing_key=unique)
            proxy.stall()
            with pytest.raises(PublishUnknown):
                producer.publish({"n": 2}, routing_key=unique)
        proxy.resume()
    with Connection(url) as connection:
        connection.default_channel.client.delete(unique)


def test_a_redis_that_refuses_is_rejected(unique: str) -> None:
    """An error reply (here WRONGTYPE) is no landing and no doubt: Rejected, with the driver's error behind it."""
    url = servers.redis()
    with Connection(url) as connection:
        client = connection.default_channel.client
        client.set(unique, "not a list")
        try:
            policy = ResendPolicy(max_sends=2, base=0.01, cap=0.02)
            with IdempotentProducer(url, retry=policy) as producer, pytest.raises(Rejected) as caught:
                producer.publish({"n": 1}, routing_key=unique)
        finally:
            client.delete(unique)
    assert type(caught.value.__cause__).__name__ == "ResponseError"


@pytest.mark.parametrize("scheme", ["idempotent-redis", "idempotent-sqla"])
def test_over_a_transport_of_ours_a_lost_reply_lands_once(scheme: str, drain: Any, tmp_path: Path, unique: str) -> None:
    """Replies lost after the send: one message, landed at the edge; the same id published again is a duplicate."""
    url = f"{scheme}+sqlite:///{tmp_path}/broker.db"
    if scheme == "idempotent-redis":
        url = servers.real_redis().replace("redis", scheme, 1)
    lost = iter([True, True, False, False])

    def step(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if next(lost):
            raise ConnectionResetError("reply lost")
        return result

    with IdempotentProducer(url, retry=FAST, step=step) as producer:
        receipt = producer.publish({"n": 1}, routing_key=unique, declare=[Queue(unique)])
        assert (receipt.landing, receipt.edge, receipt.sends) == (Landing.LANDED, Edge.BROKER, 3)
        again = producer.publish({"n": 1}, routing_key=unique, inner_msg_id=receipt.inner_msg_id)
        assert (again.landing, again.edge, again.sends) == (Landing.DUPLICATE, Edge.BROKER, 1)
    with Connection(url) as connection:
        assert len(drain(connection, unique)) == 1
