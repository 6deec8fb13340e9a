"""Publishing through our Redis transport: landing once, the right error, and plain lists that kombu shares."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Any

import pytest
from kombu import Exchange, Queue
from kombu.exceptions import BatchPublishError
from redis import exceptions
from redis_transport_rig import (
    FAST,
    PrivateServer,
    connect,
    consuming,
    declare,
    drain,
    one_server,
    send,
    server,
    take,
    until,
)

from idempotent_bus.errors import Unroutable
from idempotent_bus.model import Landing
from proxy import Proxy, through

__all__ = ["one_server", "server"]

LONG = bool(os.environ.get("IDEMPOTENT_BUS_LONG"))


def named(inner_msg_id: str, **more: Any) -> dict[str, Any]:
    return {"inner-msg-id": inner_msg_id, **more}


def test_lost_answers_land_each_message_once(server: PrivateServer, unique: str) -> None:
    """I1/I15: every publish is stored, its answer eaten and the connection cut: each lands once, in order. kombu's
    transport with its own retry lands each twice in the same test. (100 here; 1,000 in the long form.)"""
    count = 1000 if LONG else 100

    def publish(kind: str, count: int) -> list[str]:
        name = f"{unique}-{kind}"
        with Proxy(url=server.plain) as proxy, connect(through(proxy, server.url(kind))) as connection:
            queue = declare(connection, name)
            producer = connection.Producer()
            producer.publish("warm", exchange="", routing_key=f"{name}-warm", headers=named("warm"))
            for number in range(count):
                proxy.lose_reply(f"m-{number}-".encode())
                where = {"exchange": queue.exchange, "routing_key": queue.routing_key}
                producer.publish(number, headers=named(f"m-{number}-"), retry=True, retry_policy=FAST, **where)
            assert proxy.done["lose_reply"] == count
        with connect(server.plain) as plain:
            channel = plain.default_channel
            return [channel.basic_get(name, no_ack=True).payload for _ in range(server.client.llen(name))]

    assert publish("ours", count) == list(range(count))
    doubled = Counter(publish("plain", count))
    assert len(doubled) == count
    assert doubled.total() == 2 * count


def test_every_routed_queue_gets_one_copy_and_a_resend_completes(server: PrivateServer, unique: str) -> None:
    """I15: one of two lists refuses the message; the error is raised, and the resend lands on that one only."""
    with connect(server.ours) as connection:
        exchange = Exchange(unique)
        for number in (1, 2):
            declare(connection, f"{unique}-{number}", exchange=exchange, key="paid")
        server.client.set(f"{unique}-2", "not a list")
        producer = connection.Producer()
        with pytest.raises(exceptions.ResponseError):
            producer.publish("paid", exchange=exchange, routing_key="paid", headers=named("m-1"))
        server.client.delete(f"{unique}-2")
        for expected in (Landing.LANDED, Landing.DUPLICATE):
            assert producer.publish("paid", exchange=exchange, routing_key="paid", headers=named("m-1")) is expected
        assert [server.client.llen(f"{unique}-{number}") for number in (1, 2)] == [1, 1]


def test_unroutable_is_said_and_nothing_is_stored(server: PrivateServer, unique: str) -> None:
    """A mandatory message without a queue raises, with its id; without mandatory nothing is claimed to have landed."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        producer = connection.Producer()
        with pytest.raises(Unroutable) as caught:
            producer.publish(1, exchange=queue.exchange, routing_key="none", headers=named("m-1"), mandatory=True)
        assert caught.value.inner_msg_id == "m-1"
        assert producer.publish(1, exchange=queue.exchange, routing_key="none", headers=named("m-1")) is None
        fanout = Exchange(f"{unique}-all", type="fanout")
        with pytest.raises(Unroutable):
            connection.Producer(exchange=fanout).publish(1, routing_key="", mandatory=True)


def test_the_window_ends(server: PrivateServer, unique: str) -> None:
    """The edge remembers for dedup_window seconds, as stated, and no longer; each mark has that expiry."""
    with connect(server.ours, dedup_window=0.3) as connection:
        queue = declare(connection, unique)
        assert send(connection, queue, 1, headers=named("m-1")) is Landing.LANDED
        assert send(connection, queue, 1, headers=named("m-1")) is Landing.DUPLICATE
        time.sleep(0.35)
        assert send(connection, queue, 1, headers=named("m-1")) is Landing.LANDED


def test_a_redrive_passes_the_mark_once_per_number(server: PrivateServer, unique: str) -> None:
    """I12: a message moved back from the dead letter lands though its id is known, and each redrive lands once."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        send(connection, queue, 1, headers=named("m-1"))
        again = named("m-1", **{"idempotent-bus-redrive": 1})
        assert send(connection, queue, 1, headers=again) is Landing.LANDED
        assert send(connection, queue, 1, headers=again) is Landing.DUPLICATE


def test_messages_without_an_id_are_never_taken_for_each_other(server: PrivateServer, unique: str) -> None:
    """I10: no id, no mark: ten equal messages are ten messages."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        for _ in range(10):
            assert send(connection, queue, "same") is Landing.LANDED
        assert server.client.llen(unique) == 10


def test_a_flushed_script_cache_is_a_right_retry(server: PrivateServer, unique: str) -> None:
    """NOSCRIPT proves that nothing ran: publish, fetch, delay, requeue and reject go on after SCRIPT FLUSH."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        channel = connection.channel()
        server.client.script_flush()
        assert send(connection, queue, 1, headers=named("m-1")) is Landing.LANDED
        server.client.script_flush()
        assert send(connection, queue, 1, headers=named("m-1")) is Landing.DUPLICATE
        server.client.script_flush()
        message = take(channel, unique)
        server.client.script_flush()
        message.requeue()
        server.client.script_flush()
        message = take(channel, unique)
        server.client.script_flush()
        assert channel.basic_delay(message.delivery_tag, 0)
        server.client.script_flush()
        message = take(channel, unique)
        server.client.script_flush()
        message.reject()
        assert server.client.llen(f"idempotent-bus:dead:{{{unique}}}") == 1


def test_a_full_server_refuses_messages_but_gives_out_what_it_has(server: PrivateServer, unique: str) -> None:
    """I1/I9: out of memory a publish raises and leaves no mark, so the resend lands; consumers drain all the same.
    With kombu's transport a message that is popped then cannot be registered, and is lost."""
    client = server.client
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        plain_queue = f"{unique}-plain"
        for number in range(3):
            send(connection, queue, number)
            connection.Producer().publish(number, exchange="", routing_key=plain_queue)
        client.config_set("maxmemory", 1)
        try:
            for _ in range(2):
                with pytest.raises(exceptions.OutOfMemoryError):
                    send(connection, queue, 3, headers=named("m-3"))
            with consuming(connection, queue, prefetch=10) as got:
                drain(connection, 2, enough=lambda: len(got) == 3)
                assert [message.payload for message in got] == [0, 1, 2]
                for message in got:
                    message.ack()
            with connect(server.plain) as plain:
                with pytest.raises(exceptions.OutOfMemoryError):
                    plain.default_channel.basic_get(plain_queue)
                assert client.llen(plain_queue) == 2
                assert client.hlen("unacked") == 0  # the third is nowhere
        finally:
            client.config_set("maxmemory", 0)
        assert send(connection, queue, 3, headers=named("m-3")) is Landing.LANDED


def test_a_read_only_replica_raises_and_nothing_is_lost(server: PrivateServer, unique: str) -> None:
    """I9: on a server that became a replica, publishing and fetching raise; afterwards all goes on."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        send(connection, queue, 1, headers=named("m-1"))
        server.client.replicaof("127.0.0.1", 1)
        try:
            with pytest.raises(exceptions.ReadOnlyError):
                send(connection, queue, 2, headers=named("m-2"))
            with pytest.raises(exceptions.ReadOnlyError):
                connection.default_channel.basic_get(unique)
        finally:
            server.client.replicaof("no", "one")
        assert send(connection, queue, 2, headers=named("m-2")) is Landing.LANDED
        assert take(connection.default_channel, unique).payload == 1


def test_a_silent_server_raises_within_the_confirm_timeout(server: PrivateServer, unique: str) -> None:
    """I15: no answer within confirm_timeout is an error, never a landing; the resend of the same id lands once."""
    with Proxy(url=server.plain) as proxy, connect(through(proxy, server.ours)) as connection:
        queue = declare(connection, unique)
        send(connection, queue, 0)
        proxy.stall()
        started = time.monotonic()
        with pytest.raises(exceptions.TimeoutError):
            connection.Producer().publish(
                1, exchange="", routing_key=queue.name, headers=named("m-1"), confirm_timeout=0.3
            )
        assert time.monotonic() - started < 1
        proxy.resume()
        until(lambda: server.client.llen(unique) == 2)  # it was under way and landed after all
        outcome = connection.Producer().publish(1, exchange="", routing_key=queue.name, headers=named("m-1"))
        assert outcome is Landing.DUPLICATE
        assert server.client.llen(unique) == 2


def test_an_uncertain_batch_is_published_again_whole(server: PrivateServer, unique: str) -> None:
    """I15: the answer to a batch is lost; the whole batch is published again and every message is there once. With
    kombu's transport each is there twice."""

    def batch(kind: str) -> tuple[int, list[Any]]:
        name = f"{unique}-{kind}"
        landings: list[Any] = []
        with Proxy(url=server.plain) as proxy, connect(through(proxy, server.url(kind))) as connection:
            declare(connection, name)
            producer = connection.Producer()
            producer.publish("warm", exchange="", routing_key=f"{name}-warm", headers=named("warm"))
            proxy.lose_reply(b"m-49")
            for _ in range(2):
                try:
                    with producer.batch(max_size=100) as open_batch:
                        for number in range(50):
                            producer.publish(number, exchange="", routing_key=name, headers=named(f"m-{number}"))
                        open_batch.flush()
                        landings = getattr(open_batch.state.session, "landings", [])
                except BatchPublishError:
                    assert proxy.done["lose_reply"] == 1
        return server.client.llen(name), landings

    assert batch("plain")[0] == 100
    assert batch("ours") == (50, [Landing.DUPLICATE] * 50)


def test_a_batch_says_what_landed(server: PrivateServer, unique: str) -> None:
    """A batch's landings are those of its messages, in order; a batch in several flushes is in publishing order."""
    with connect(server.ours) as connection:
        declare(connection, unique)
        producer = connection.Producer()
        producer.publish(0, exchange="", routing_key=unique, headers=named("m-1"))
        with producer.batch(max_size=2) as open_batch:
            for number in range(5):
                producer.publish(number, exchange="", routing_key=unique, headers=named(f"m-{number}"))
            open_batch.flush()
            landings = open_batch.state.session.landings
        assert [landing.value for landing in landings] == ["landed", "duplicate", "landed", "landed", "landed"]
        assert server.client.llen(unique) == 5


@pytest.mark.parametrize(("publisher", "consumer"), [("plain", "ours"), ("ours", "plain"), ("ours", "ours")])
@pytest.mark.parametrize("prefix", ["", "app[1]*:"])
def test_priorities_and_prefix_are_kombus_own(
    server: PrivateServer, unique: str, publisher: str, consumer: str, prefix: str
) -> None:
    """kombu's producers and consumers share the queues both ways: same lists, same order of priorities, same prefix."""
    options = {"global_keyprefix": prefix, "priority_steps": [0, 3, 6, 9]}
    with connect(server.url(publisher), **options) as sender, connect(server.url(consumer), **options) as receiver:
        queue = declare(sender, unique)
        declare(receiver, unique)
        for number, priority in enumerate([9, 3, 0, 6, 0]):
            send(sender, queue, number, priority=priority, headers=named(f"m-{number}"))
        assert all(key.decode().startswith(prefix) for key in server.client.scan_iter())
        with consuming(receiver, queue, prefetch=1) as got:
            order: list[int] = []
            while len(order) < 5:
                drain(receiver, 2, enough=lambda: got)
                message = got.pop()
                order.append(message.payload)
                message.ack()
        assert order == [2, 4, 1, 3, 0]
    assert server.held() == 0


def test_an_expiring_queue_expires_and_stays_while_it_is_used(server: PrivateServer, unique: str) -> None:
    """x-expires: a queue that nobody uses goes; one whose messages somebody works on stays."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique, expires=0.6)
        send(connection, queue, 1, headers=named("m-1"))
        assert 0 < server.client.pttl(unique) <= 600
        until(lambda: not server.client.exists(unique), 3)
        for number in range(2):
            send(connection, queue, number, headers=named(f"n-{number}"))
        channel = connection.channel()
        queue(channel).declare()
        message = take(channel, unique)
        time.sleep(1.2)  # twice the expiry, while the handler runs
        assert server.client.llen(unique) == 1
        message.requeue()
        assert 0 < server.client.pttl(unique) <= 600


def test_a_publisher_that_knows_no_queue_still_lands(server: PrivateServer, unique: str) -> None:
    """The default exchange needs no declaration; several threads may publish on one channel."""
    with connect(server.ours) as connection:
        Queue(unique)(connection.default_channel)
        assert connection.Producer().publish(1, exchange="", routing_key=unique, mandatory=True) is Landing.LANDED
