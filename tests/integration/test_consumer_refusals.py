"""IdempotentConsumer on a RabbitMQ that refuses, takes back or falls silent: it goes on as soon as the broker does."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from amqp.exceptions import AccessRefused, NotAllowed, NotFound, PreconditionFailed
from kombu import Connection, Queue
from kombu.message import Message

import servers
from consumer_rig import Broker, broker_of, fill, on, poll, running
from idempotent_bus import IdempotentConsumer, idempotent_consumer
from idempotent_bus import session as session_module
from idempotent_bus.session import Session
from idempotent_bus.stores.memory import MemoryStore
from proxy import Proxy, through

broker = pytest.fixture(broker_of)

LOST = "lost its connection"


@on("rabbitmq-classic", "rabbitmq-quorum")
@pytest.mark.parametrize("threads", [0, 2])
def test_a_channel_that_the_broker_closes_is_opened_again(broker: Broker, threads: int) -> None:
    """I13: 406 for a channel in the middle of its messages (an unknown tag, a timeout) ends no consumer."""
    queue, ran = broker.queue(), []

    @idempotent_consumer(MemoryStore(), scope=broker.unique, biz_id="id")
    def handle(body: Any, message: Message) -> None:
        if body["id"] == "50" and "50" not in ran:
            message.channel.basic_ack(999_999)
        ran.append(body["id"])

    fill(broker, queue, map(str, range(200)))
    IdempotentConsumer(broker.connect(), {queue: handle}, threads=threads).run(idle_timeout=1.0)
    assert sorted(ran) == sorted(map(str, range(200)))
    assert broker.is_empty(queue.name)


@on("rabbitmq-classic")
@pytest.mark.parametrize(
    ("error", "stage"),
    [
        (NotAllowed("vhost not found", reply_code=530), "connecting"),
        (AccessRefused("login was refused", reply_code=403), "connecting"),
        (NotFound("home node is down", method_sig=(50, 10), reply_code=404), "declaring"),
    ],
)
def test_what_the_broker_refuses_is_a_setting_at_the_start_and_trouble_that_passes_later(
    broker: Broker, error: Exception, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue's node or a virtual host that is down ends no consumer that has consumed; at the start it is said."""
    queue, ran, refusals = broker.queue(), [], [1]
    handle = idempotent_consumer(MemoryStore(), scope=broker.unique, biz_id="id")(lambda b, m: ran.append(b["id"]))
    where, name = (Connection, "ensure_connection") if stage == "connecting" else (Session, "_open_consumers")
    real = getattr(where, name)

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if refusals[0] and (stage == "declaring" or args):
            refusals[0] -= 1
            raise error
        return real(self, *args, **kwargs)

    fill(broker, queue, ["a"])
    monkeypatch.setattr(where, name, refuse)
    made = IdempotentConsumer(broker.connect(), {queue: handle})
    with pytest.raises(type(error)):
        made.run()
    with running(made) as thread:
        assert poll(lambda: ran == ["a"])
        refusals[0] = 2
        with broker.connect() as other:
            other.channel().queue_delete(queue.name)
        assert poll(lambda: refusals[0] == 0 or not thread.is_alive())
        fill(broker, queue, ["b"])
        assert poll(lambda: ran == ["a", "b"] or not thread.is_alive())
    assert ran == ["a", "b"]


@on("rabbitmq-classic")
def test_a_queue_that_is_declared_otherwise_meanwhile_is_said(broker: Broker) -> None:
    """It is deleted and made with other arguments while it is consumed: nobody but its owner can tell what is right."""
    queue = broker.queue()

    @idempotent_consumer(MemoryStore(), scope=broker.unique, biz_id="id")
    def handle(body: Any, message: Message) -> None:
        with broker.connect() as other:
            channel = other.channel()
            channel.queue_delete(queue.name)
            Queue(queue.name, durable=True, queue_arguments={"x-max-length": 9})(channel).declare()

    fill(broker, queue, ["a"])
    made = IdempotentConsumer(broker.connect(), {queue: handle})
    with pytest.raises(PreconditionFailed, match="x-max-length"):
        made.run(idle_timeout=10)


@on("rabbitmq-classic")
def test_a_broker_that_falls_silent_is_left(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """I13: found by the heartbeats, it answers no goodbye either: the consumer does not wait for that for ever."""
    caplog.set_level(logging.WARNING, "idempotent_bus")
    monkeypatch.setattr(session_module, "_GOODBYE_SECONDS", 0.5)
    queue, ran = broker.queue(), []
    handle = idempotent_consumer(MemoryStore(), scope=broker.unique, biz_id="id")(lambda b, m: ran.append(b["id"]))
    with Proxy(url=servers.rabbitmq()) as proxy:
        made = IdempotentConsumer(Connection(through(proxy, broker.url), heartbeat=1), {queue: handle})
        with running(made):
            assert poll(lambda: made.health()["connected"])
            proxy.stall()
            left = poll(lambda: LOST in caplog.text, timeout=15)
            proxy.resume()
            assert left, "it waits for the answer to its goodbye"
            fill(broker, queue, ["a"])
            assert poll(lambda: ran == ["a"], timeout=15)


@on("rabbitmq-classic")
def test_a_broker_that_does_not_answer_at_the_start_is_left(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """I13: the answer to the declaration of a queue never comes: the consumer hangs up and connects again."""
    caplog.set_level(logging.WARNING, "idempotent_bus")
    monkeypatch.setattr(session_module, "_GREETING_SECONDS", 0.5)
    queue, ran = broker.queue(), []
    handle = idempotent_consumer(MemoryStore(), scope=broker.unique, biz_id="id")(lambda b, m: ran.append(b["id"]))
    fill(broker, queue, ["a"])
    with Proxy(url=servers.rabbitmq()) as proxy:
        proxy.hold_request(queue.name.encode())
        made = IdempotentConsumer(through(proxy, broker.url), {queue: handle})
        with running(made):
            assert poll(lambda: ran == ["a"], timeout=15), "it waits for the answer"
    assert proxy.done["hold_request"] == 1
    assert LOST in caplog.text
