"""The windows of kombu's Redis transport, W1 to W12: the damage there, and its absence here (W5 is in tests/chaos).

Each test runs the same steps over kombu's transport and over ours, against a Redis server of its own.
"""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from typing import Any

import kombu.transport.redis as kombu_redis
import pytest
from kombu import Consumer, Exchange, Queue
from redis import exceptions
from redis_transport_rig import (
    FAST,
    Holder,
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

from idempotent_bus.model import Landing
from proxy import Proxy, through

__all__ = ["one_server", "server"]

ID = {"inner-msg-id": "m-1"}


def test_w1_a_lost_reply_and_kombus_own_retry_land_one_message(server: PrivateServer, unique: str) -> None:
    """I1/I15: the reply of a publish is lost, kombu republishes: one message here, two with kombu's transport."""

    def landed(kind: str) -> tuple[int, Any]:
        name = f"{unique}-{kind}"
        with Proxy(url=server.plain) as proxy, connect(through(proxy, server.url(kind))) as connection:
            queue = declare(connection, name)
            send(connection, queue, "first", headers={"inner-msg-id": "m-0"})  # the server knows the script now
            server.client.delete(name)
            proxy.lose_reply(b"m-1")
            outcome = send(connection, queue, "paid", headers=ID, retry=True, retry_policy=FAST)
            assert proxy.done["lose_reply"] == 1
        return server.client.llen(name), outcome

    assert landed("plain")[0] == 2
    assert landed("ours") == (1, Landing.DUPLICATE)  # "it was there already": the first sending landed


def test_w2_a_timeout_is_never_followed_by_a_silent_resend(server: PrivateServer, unique: str) -> None:
    """I15: with retry_on_timeout redis-py sends twice without a word; ours raises, and a resend lands once."""

    def publish(kind: str, headers: dict[str, str]) -> tuple[int, list[Any]]:
        name = f"{unique}-{kind}-{len(headers)}"
        options = {"socket_timeout": 0.3, "retry_on_timeout": True}
        with Proxy(url=server.plain) as proxy, connect(through(proxy, server.url(kind)), **options) as connection:
            queue = declare(connection, name)
            outcomes: list[Any] = []
            send(connection, queue, "first", headers={"inner-msg-id": "m-0"})  # the server knows the script now
            server.client.delete(name)
            proxy.lose_reply(b"x-marker", cut=False)
            for _ in range(2 if "inner-msg-id" in headers else 1):
                try:
                    outcomes.append(send(connection, queue, "paid", headers={"x-marker": "1", **headers}))
                except exceptions.TimeoutError as error:
                    outcomes.append(type(error))
            assert proxy.done["lose_reply"] == 1
        return server.client.llen(name), outcomes

    assert publish("plain", {}) == (2, [None])
    assert publish("ours", {}) == (1, [exceptions.TimeoutError])
    assert publish("ours", ID) == (1, [exceptions.TimeoutError, Landing.DUPLICATE])


@pytest.mark.parametrize(("kind", "lost"), [("plain", True), ("ours", False)])
def test_w3_a_kill_right_after_the_message_came_loses_nothing(
    server: PrivateServer, unique: str, kind: str, lost: bool
) -> None:
    """I1: SIGKILL between receiving and registering. Popped and registered is one step here, two in kombu's."""
    with connect(server.url(kind)) as connection:
        queue = declare(connection, unique)
        send(connection, queue, "paid")
        holder = Holder(server.url(kind), unique, die="fetched")
        assert holder.got() == ""
        holder.kill()
        with consuming(connection, queue) as got:
            drain(connection, 4, enough=lambda: got)
            assert [message.payload for message in got] == ([] if lost else ["paid"])


@pytest.mark.parametrize(("kind", "lost"), [("plain", True), ("ours", False)])
@pytest.mark.parametrize("reconnect", [True, False])
def test_w4_a_connection_cut_while_the_message_travels_loses_nothing(
    server: PrivateServer, unique: str, kind: str, lost: bool, reconnect: bool
) -> None:
    """I1: the reply that carries the message is lost. Here it is registered, and comes again on the same channel at
    once, or on a new connection after the old one closed."""
    with connect(server.url(kind)) as control, Proxy(url=server.plain) as proxy:
        queue = declare(control, unique)
        connection = connect(through(proxy, server.url(kind)))
        with consuming(connection, queue) as got:
            drain(connection, 0.3)  # both wait for a message now
            proxy.lose_reply(b"BRPOP" if kind == "plain" else b"idempotent-bus:held:")
            if kind == "plain":
                drain(connection, 1.5)  # until the next BRPOP is sent, which the fault is for
            send(control, queue, "paid")
            with pytest.raises(connection.connection_errors):
                drain(connection, 5)
            if not reconnect:
                drain(connection, 2, enough=lambda: got)
                assert [message.payload for message in got] == ([] if lost else ["paid"])
        connection.close()
        if reconnect:
            with consuming(control, queue) as again:
                drain(control, 2, enough=lambda: again)
                assert [message.payload for message in again] == ([] if lost else ["paid"])


@pytest.mark.parametrize(("kind", "lost"), [("plain", True), ("ours", False)])
def test_w6_a_process_that_knows_no_exchange_restores_to_the_right_queue(
    server: PrivateServer, unique: str, kind: str, lost: bool
) -> None:
    """I1: restoring needs no topic exchange, since a message goes back to the queue that it came from."""
    with connect(server.url(kind)) as connection:
        queue = declare(connection, unique, exchange=Exchange(unique, type="topic"), key="paid.*")
        connection.Producer().publish("paid", exchange=queue.exchange, routing_key="paid.eur")
    holder = Holder(server.url(kind), unique)
    assert holder.got() == "paid"
    holder.kill()
    with connect(server.url(kind)) as other, consuming(other, Queue(unique), auto_declare=False) as got:
        drain(other, 5, enough=lambda: got)
        assert [message.payload for message in got] == ([] if lost else ["paid"])


@pytest.mark.parametrize(("kind", "lost"), [("plain", True), ("ours", False)])
def test_w7_a_requeue_needs_no_binding_table(server: PrivateServer, unique: str, kind: str, lost: bool) -> None:
    """I1: the table of bindings is gone; a requeued message stays."""
    with connect(server.url(kind)) as connection:
        queue = declare(connection, unique)
        send(connection, queue, "paid")
        message = take(connection.default_channel, unique)
        server.client.delete(f"_kombu.binding.{unique}")
        message.requeue()
        assert server.client.llen(unique) == (0 if lost else 1)


@pytest.mark.parametrize(("kind", "in_the_other"), [("plain", 2), ("ours", 1)])
def test_w8_a_requeue_goes_to_its_own_queue_only(
    server: PrivateServer, unique: str, kind: str, in_the_other: int
) -> None:
    """I2: two queues on one key; requeueing the copy of one makes no second copy in the other."""
    with connect(server.url(kind)) as connection:
        exchange = Exchange(unique)
        one = declare(connection, f"{unique}-1", exchange=exchange, key="paid")
        declare(connection, f"{unique}-2", exchange=exchange, key="paid")
        send(connection, one, "paid")
        take(connection.default_channel, f"{unique}-1").requeue()
        assert server.client.llen(f"{unique}-1") == 1
        assert server.client.llen(f"{unique}-2") == in_the_other


@pytest.mark.parametrize(("kind", "lost"), [("plain", True), ("ours", False)])
def test_w9_acking_one_queues_copy_leaves_the_others_protected(
    server: PrivateServer, unique: str, kind: str, lost: bool
) -> None:
    """I1: one publish, two queues, one consumer that acks one copy and dies with the other."""
    first, second = f"{unique}-1", f"{unique}-2"
    with connect(server.url(kind)) as connection:
        exchange = Exchange(unique)
        one = declare(connection, first, exchange=exchange, key="paid")
        two = declare(connection, second, exchange=exchange, key="paid")
        send(connection, one, "paid")
        channel = connection.channel()
        copy, other = take(channel, first), take(channel, second)
        assert (copy.delivery_tag == other.delivery_tag) is lost
        copy.ack()
        _die(channel)
        with consuming(connection, two) as got:
            drain(connection, 4, enough=lambda: got)
            assert [message.payload for message in got] == ([] if lost else ["paid"])


def test_w9_our_producer_gives_kombus_consumers_tags_of_their_own_too(server: PrivateServer, unique: str) -> None:
    """The same for plain consumers, if the publisher is ours."""
    with connect(server.ours) as connection, connect(server.plain) as plain:
        exchange = Exchange(unique)
        one = declare(connection, f"{unique}-1", exchange=exchange, key="paid")
        declare(connection, f"{unique}-2", exchange=exchange, key="paid")
        send(connection, one, "paid")
        channel = plain.default_channel
        copies = [take(channel, f"{unique}-1"), take(channel, f"{unique}-2")]
        assert len({copy.delivery_tag for copy in copies}) == 2


def _die(channel: Any) -> None:
    """The channel's consumer dies without a word: nothing is given back, nothing renewed, nothing acked any more."""
    if hasattr(channel, "keeper"):
        with suppress(Exception):
            channel.qos.flush()
        channel.keeper.close()
        channel._left = True
    channel.qos._on_collect.cancel()
    channel.do_restore = False


def test_w10_a_live_consumers_message_is_not_given_to_another(server: PrivateServer, unique: str) -> None:
    """A handler runs three times as long as the visibility timeout: the other consumer gets the message with kombu's
    transport, and never with ours, though the handler blocks the consuming thread."""

    def other_gets(kind: str) -> bool:
        name = f"{unique}-{kind}"
        with connect(server.url(kind)) as connection, connect(server.url(kind)) as second:
            queue = declare(connection, name)
            send(connection, queue, "slow")
            message = take(connection.default_channel, name)
            with consuming(second, queue) as got:
                drain(second, 3.5, enough=lambda: got)
                message.ack()
                return bool(got)

    assert other_gets("plain")
    assert not other_gets("ours")


def test_w10_a_late_ack_does_not_take_the_new_owners_protection(server: PrivateServer, unique: str) -> None:
    """I1: a consumer was stopped, its message went to another, it wakes and acks: the other's entry stays."""
    with connect(server.plain) as connection, connect(server.plain) as second:
        queue = declare(connection, f"{unique}-plain")
        send(connection, queue, "paid")
        stopped = take(connection.default_channel, f"{unique}-plain")
        with consuming(second, queue) as got:
            drain(second, 4, enough=lambda: got)
            stopped.ack()
            assert server.client.hlen("unacked") == 0  # the new owner works without protection

    with connect(server.ours) as second:
        queue = declare(second, unique)
        send(second, queue, "paid")
        holder = Holder(server.ours, unique, ack="nothing")
        assert holder.got() == "paid"
        holder.signal(signal.SIGSTOP)
        with consuming(second, queue) as got:
            drain(second, 4, enough=lambda: got)
            assert [message.payload for message in got] == ["paid"]
            assert got[0].delivery_info["redelivered"]
            holder.signal(signal.SIGCONT)
            time.sleep(0.6)  # it renews, fetches, and would ack
            assert server.held() == 1
            holder.kill()
            got[0].ack()
    assert server.held() == 0


def test_w10_the_late_ack_itself_changes_nothing(server: PrivateServer, unique: str) -> None:
    """I1: the very ack of the lapsed delivery is sent, after the message went to another."""
    with connect(server.ours) as first, connect(server.ours) as second:
        queue = declare(first, unique)
        send(first, queue, "paid")
        channel = first.channel()
        late = take(channel, unique)
        channel.keeper.close()  # as if the process had been stopped: nothing is renewed
        with consuming(second, queue) as got:
            drain(second, 4, enough=lambda: got)
            assert len(got) == 1
            late.ack()
            channel.qos.flush()
            assert server.held() == 1
            got[0].ack()


def test_w11_a_requeued_fanout_message_comes_again(server: PrivateServer, unique: str) -> None:
    """A requeued fanout message: kombu strands it in a list that nobody reads; here its consumer gets it again."""

    def deliveries(kind: str) -> tuple[int, int]:
        name = f"{unique}-{kind}"
        with connect(server.url(kind)) as connection, connect(server.url(kind)) as sender:
            queue = Queue(name, Exchange(name, type="fanout"))
            got: list[Any] = []

            def work(message: Any) -> None:
                got.append(message)
                if len(got) == 1:
                    message.requeue()
                else:
                    message.ack()

            channel = connection.channel()
            with Consumer(channel, [queue], on_message=work):
                drain(connection, 0.3)
                sender.Producer(exchange=queue.exchange).publish("all", routing_key="")
                drain(connection, 1.5, enough=lambda: len(got) == 2)
            return len(got), server.client.llen(name)

    assert deliveries("plain") == (1, 1)
    assert deliveries("ours") == (2, 0)


def test_w12_a_consumers_wrong_clock_moves_no_timeout(
    server: PrivateServer, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I7: the clock of a consumer is an hour slow: kombu hands its message to another at once; here nothing changes."""

    def other_gets(kind: str) -> bool:
        name = f"{unique}-{kind}"
        with connect(server.url(kind), visibility_timeout=30) as connection:
            queue = declare(connection, name)
            send(connection, queue, "slow")
            right = time.time
            with monkeypatch.context() as patch:
                patch.setattr(time, "time", lambda: right() - 3600)
                patch.setattr(kombu_redis, "time", lambda: right() - 3600)
                message = take(connection.default_channel, name)
            with connect(server.url(kind), visibility_timeout=30) as second, consuming(second, queue) as got:
                drain(second, 1.5, enough=lambda: got)
                message.ack()
                return bool(got)

    assert other_gets("plain")
    assert not other_gets("ours")


def test_a_dead_consumers_message_comes_back_as_one_copy(server: PrivateServer, unique: str) -> None:
    """I1/I2: SIGKILL with messages in hand; each comes back once, to one of two waiting consumers."""
    with connect(server.ours) as first, connect(server.ours) as second:
        queue = declare(first, unique)
        for number in range(20):
            send(first, queue, number)
        holder = Holder(server.ours, unique, prefetch=20)
        for _ in range(20):
            holder.got()
        holder.kill()
        started = time.monotonic()
        with consuming(first, queue, prefetch=0) as one, consuming(second, queue, prefetch=0) as two:
            until(lambda: drain(first, 0.02) or drain(second, 0.02) or len(one) + len(two) >= 20, 5)
            drain(first, 0.3)
            drain(second, 0.3)
            assert sorted(message.payload for message in one + two) == list(range(20))
            assert time.monotonic() - started < 4
