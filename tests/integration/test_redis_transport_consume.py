"""Consuming through our Redis transport: what is held, given back, delayed and given up, and who may take it."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
from kombu import Consumer, Queue
from kombu.asynchronous import Hub
from kombu.mixins import ConsumerMixin
from redis_transport_rig import (
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

from idempotent_bus import IdempotentConsumer, idempotent_consumer
from idempotent_bus.errors import ConfigurationError
from idempotent_bus.transports.redis.hold import Hold
from idempotent_bus.transports.redis.restore import Holdings, dead_messages, holdings, restore
from proxy import Proxy, through

__all__ = ["one_server", "server"]


def fill(connection: Any, queue: Queue, count: int) -> None:
    for number in range(count):
        send(connection, queue, number)


def bodies(messages: list[Any]) -> list[Any]:
    return [message.payload for message in messages]


# --- acks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [{}, {"ack_limit": 10}])
def test_a_guarded_consumers_acks_go_with_its_next_fetch(
    server: PrivateServer, unique: str, monkeypatch: pytest.MonkeyPatch, told: dict[str, int]
) -> None:
    """A window's acks cost no round trip of their own, unless `ack_limit` says so; all of them arrive."""
    full: list[int] = []
    flush = Hold.flush

    def counted(hold: Hold, timeout: float | None = None) -> None:
        if hold._ack_count >= hold.channel.ack_limit:  # not: before it waits for messages, or when it closes
            full.append(hold._ack_count)
        flush(hold, timeout)

    monkeypatch.setattr(Hold, "flush", counted)
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        fill(connection, queue, 300)
    handler = idempotent_consumer("memory://", scope=unique, biz_id=str)(lambda body, message: None)
    consumer = IdempotentConsumer(connect(server.ours, **told), {queue: handler}, prefetch=100)
    assert consumer.run(idle_timeout=0.5) == 300
    assert bool(full) is bool(told)
    assert server.held() == 0


# --- holding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [1, 3, 100])
def test_prefetch_bounds_what_is_handed_out_and_what_is_held(server: PrivateServer, unique: str, prefetch: int) -> None:
    """A consumer holds no more than its prefetch, neither in callbacks nor in its buffer; the order is kept."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        fill(connection, queue, 10)
        with consuming(connection, queue, prefetch=prefetch) as got:
            drain(connection, 0.5, enough=lambda: len(got) >= 10)
            assert bodies(got) == list(range(min(prefetch, 10)))
            assert server.held() == min(prefetch, 10)
            while len(got) < 10:
                got[len(got) - prefetch].ack()
                seen = len(got)
                drain(connection, 2, enough=lambda seen=seen: len(got) > seen)
            assert bodies(got) == list(range(10))


def test_without_a_prefetch_a_slow_consumer_takes_one_at_a_time(server: PrivateServer, unique: str) -> None:
    """Prefetch 0 is no limit, yet a slow consumer does not sit on messages that another could handle."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        fill(connection, queue, 20)
        with consuming(connection, queue, prefetch=0):
            for _ in range(3):
                connection.drain_events(timeout=1)
                time.sleep(0.1)
            assert server.held() <= 4


def test_acks_leave_within_the_stated_time_while_a_handler_is_slow(server: PrivateServer, unique: str) -> None:
    """An ack is sent within ack_delay though the consuming thread goes into a slow handler and drains no more."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        fill(connection, queue, 5)
        with consuming(connection, queue, prefetch=5) as got:
            drain(connection, 1, enough=lambda: len(got) == 5)
            got[0].ack()
            until(lambda: server.held() == 4, 1, "the ack")  # no drain_events in between
            for message in got[1:]:
                message.ack()
            until(lambda: server.held() == 0, 1, "the acks")


def test_acks_survive_a_cut_connection(server: PrivateServer, unique: str) -> None:
    """The sending of an ack fails; it is sent again and the message does not come back."""
    with Proxy(url=server.plain) as proxy, connect(through(proxy, server.ours)) as connection:
        queue = declare(connection, unique)
        fill(connection, queue, 1)
        with consuming(connection, queue) as got:
            drain(connection, 1, enough=lambda: got)
            proxy.lose_request(b"HDEL", times=2)
            got[0].ack()
            until(lambda: server.held() == 0, 5, "the ack")
            assert proxy.done["lose_request"] >= 1


def test_acks_may_come_from_other_threads_and_wake_a_full_consumer(server: PrivateServer, unique: str) -> None:
    """With prefetch 1 and acks by another thread, the next message is handed out at once, not at the next look."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        fill(connection, queue, 20)
        with consuming(connection, queue, prefetch=1) as got:
            stop = threading.Event()

            def acknowledge() -> None:
                done = 0
                while not stop.is_set():
                    if done < len(got):
                        got[done].ack()
                        done += 1
                    time.sleep(0.001)

            thread = threading.Thread(target=acknowledge)
            thread.start()
            started = time.monotonic()
            drain(connection, 10, enough=lambda: len(got) == 20)
            elapsed = time.monotonic() - started
            until(lambda: server.held() == 0)
            stop.set()
            thread.join()
            assert bodies(got) == list(range(20))
            assert elapsed < 2


def test_closing_gives_everything_back_in_order_and_uncounted(server: PrivateServer, unique: str) -> None:
    """I1: an orderly end gives back what was handed out and what was only fetched; no delivery is counted."""
    with connect(server.ours) as first, connect(server.ours) as second:
        queue = declare(first, unique)
        fill(first, queue, 10)
        with consuming(first, queue, prefetch=10) as got:
            connection_got = got
            first.drain_events(timeout=1)
            first.drain_events(timeout=1)
            assert server.held() == 10
            connection_got[0].ack()
        assert server.held() == 0
        with consuming(second, queue, prefetch=10) as again:
            drain(second, 1, enough=lambda: len(again) == 9)
            assert bodies(again) == list(range(1, 10))
            assert [bool(message.delivery_info.get("redelivered")) for message in again] == [True] + [False] * 8
            assert all("x-delivery-count" not in message.delivery_info for message in again)


def test_cancelling_a_consumer_gives_back_what_it_had_fetched(server: PrivateServer, unique: str) -> None:
    """I1: what lies in the buffer for a cancelled consumer goes back at once; what was handed out stays held."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        fill(connection, queue, 10)
        channel = connection.channel()
        got: list[Any] = []
        consumer = Consumer(channel, [queue], on_message=got.append, prefetch_count=10)
        consumer.consume()
        connection.drain_events(timeout=1)
        assert server.held() == 10
        consumer.cancel()
        assert server.held() == 1
        assert server.client.llen(unique) == 9


def test_no_ack_consumers_settle_each_message_as_it_is_handed_out(server: PrivateServer, unique: str) -> None:
    """no_ack: nothing stays held, and what was fetched but not handed out is not lost with the consumer."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        fill(connection, queue, 5)
        with consuming(connection, queue, prefetch=5, no_ack=True) as got:
            connection.drain_events(timeout=1)
            connection.drain_events(timeout=1)
        assert bodies(got) == [0, 1]
        assert server.held() == 0
        assert server.client.llen(unique) == 3


def test_a_process_that_ends_without_closing_gives_back_at_exit(server: PrivateServer, unique: str) -> None:
    """I1: SIGINT ends a consumer that never closes anything; its message is back at once, not after a lease."""
    with connect(server.ours, visibility_timeout=60) as connection:
        queue = declare(connection, unique)
        fill(connection, queue, 1)
        holder = Holder(server.ours, unique, visibility=60)
        assert holder.got() == "0"
        holder.signal(signal.SIGINT)
        assert take(connection.default_channel, unique, 5).payload == 0
        holder.kill()


def test_an_outage_of_the_server_takes_no_message_from_a_live_consumer(server: PrivateServer, unique: str) -> None:
    """I2: the server stands still for longer than the lease; the owner renews before anybody may sweep."""
    with connect(server.ours) as first, connect(server.ours) as second:
        queue = declare(first, unique)
        fill(first, queue, 1)
        mine = take(first.default_channel, unique)
        with consuming(second, queue) as got:
            drain(second, 1)
            server.signal(signal.SIGSTOP)
            threading.Timer(2.5, server.signal, (signal.SIGCONT,)).start()
            drain(second, 5, enough=lambda: got)
            assert got == []
            mine.ack()
    assert server.held() == 0


def test_several_consumers_share_a_queue_without_loss_or_doubles(server: PrivateServer, unique: str) -> None:
    """I1/I2: four threads with a connection each drain 400 messages; each message is handed out once."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        fill(connection, queue, 400)
        seen: list[Any] = []

        def work() -> None:
            with connect(server.ours) as mine:

                def handle(message: Any) -> None:
                    seen.append(message.payload)
                    message.ack()

                with Consumer(mine.channel(), [queue], on_message=handle, prefetch_count=7):
                    drain(mine, 10, enough=lambda: len(seen) >= 400)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(seen) == list(range(400))
        assert server.held() == server.client.llen(unique) == 0


def test_two_channels_of_one_connection_settle_their_own(server: PrivateServer, unique: str) -> None:
    """kombu keeps one callback per queue and connection; each of our channels acks what it took itself."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        fill(connection, queue, 40)
        seen: list[Any] = []

        def handle(message: Any) -> None:
            seen.append(message.payload)
            message.ack()

        consumers = [Consumer(connection.channel(), [queue], on_message=handle, prefetch_count=3) for _ in range(2)]
        for consumer in consumers:
            consumer.consume()
        drain(connection, 5, enough=lambda: len(seen) == 40)
        assert sorted(seen) == list(range(40))
        until(lambda: server.held() == 0)
        for consumer in consumers:
            consumer.channel.close()


def test_several_queues_are_served_in_turn(server: PrivateServer, unique: str) -> None:
    """Round robin as in kombu: a full queue does not keep another waiting."""
    with connect(server.ours) as connection:
        queues = [declare(connection, f"{unique}-{letter}") for letter in "ab"]
        for queue in queues:
            fill(connection, queue, 10)
        channel, order = connection.channel(), []

        def handle(message: Any) -> None:
            order.append(message.delivery_info["routing_key"][-1])
            message.ack()

        with Consumer(channel, queues, on_message=handle, prefetch_count=1):
            drain(connection, 3, enough=lambda: len(order) == 20)
        assert set(order[:4]) == {"a", "b"}
        assert len(order) == 20


def test_consumer_mixin_works(server: PrivateServer, unique: str) -> None:
    """kombu's ConsumerMixin runs over it, and goes on after its connection was cut in mid-flow."""
    got: list[Any] = []
    with Proxy(url=server.plain) as proxy, connect(server.ours) as control:
        queue = declare(control, unique)

        class Worker(ConsumerMixin):  # type: ignore[misc]
            def __init__(self) -> None:
                self.connection = connect(through(proxy, server.ours))

            def get_consumers(self, consumer: Any, channel: Any) -> list[Any]:
                return [consumer([queue], on_message=self.handle, prefetch_count=4)]

            def handle(self, message: Any) -> None:
                got.append(message.payload)
                message.ack()

        worker = Worker()
        thread = threading.Thread(target=worker.run, daemon=True)
        thread.start()
        fill(control, queue, 10)
        until(lambda: len(set(got)) == 10)
        proxy.cut()
        fill(control, queue, 10)
        until(lambda: len(got) >= 20)
        worker.should_stop = True
        thread.join(5)
        until(lambda: server.held() == 0)


def test_what_is_no_message_goes_to_the_dead_list(server: PrivateServer, unique: str) -> None:
    """I1: text that is not kombu's, or a body that cannot be decoded, stops nobody and stays visible."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        server.client.lpush(unique, b"\xff\xfe not json")
        server.client.lpush(unique, b'{"no": "properties"}')
        wrong = b'{"body": "%%%", "properties": {"body_encoding": "rot13", "delivery_tag": "x"}}'
        server.client.lpush(unique, wrong)
        fill(connection, queue, 1)
        with consuming(connection, queue) as got:
            drain(connection, 3, enough=lambda: got)
            assert bodies(got) == [0]
        dead = dead_messages(connection, unique)
        assert [entry.reason for entry in dead] == ["undecodable"] * 3
        assert dead[2].text == wrong


def test_a_server_that_went_silent_is_noticed_by_an_idle_consumer(server: PrivateServer, unique: str) -> None:
    """I13: nothing is closed, nothing is answered: the sleeping consumer asks, and raises in time."""
    with Proxy(url=server.plain) as proxy, connect(through(proxy, server.ours), socket_timeout=0.5) as connection:
        queue = declare(connection, unique)
        with consuming(connection, queue):
            drain(connection, 0.3)
            proxy.stall()
            started = time.monotonic()
            with pytest.raises(connection.connection_errors):
                drain(connection, 5)
            assert time.monotonic() - started < 3
            proxy.resume()


# --- delaying -----------------------------------------------------------------------------------------------


def test_a_delayed_message_comes_back_when_it_is_due_not_before(server: PrivateServer, unique: str) -> None:
    """The delay is kept in Redis: it survives its consumer, wakes an idle one in time, and is not counted."""
    with connect(server.ours) as first, connect(server.ours) as second:
        queue = declare(first, unique)
        with consuming(second, queue) as got:
            drain(second, 0.3)  # idle: it looks again only in seconds
            fill(first, queue, 1)
            drain(second, 2, enough=lambda: got)
            message = got.pop()
            started = time.monotonic()
            assert message.channel.basic_delay(message.delivery_tag, 0.7) is True
            assert message.channel.basic_delay(message.delivery_tag, 0.7) is False
            assert server.held() == 0
            drain(second, 3, enough=lambda: got)
            assert 0.65 < time.monotonic() - started < 1.1
            assert got[0].delivery_info["redelivered"]
            assert "x-delivery-count" not in got[0].delivery_info


def test_a_delay_outlives_the_process_that_asked_for_it(server: PrivateServer, unique: str) -> None:
    """I1: the channel that delayed is gone; any consumer moves the message back when it is due."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        fill(connection, queue, 2)
        channel = connection.channel()
        for _ in range(2):
            message = take(channel, unique)
            assert channel.basic_delay(message.delivery_tag, 0.5)
        channel.close()
    with connect(server.ours) as other, consuming(other, queue, prefetch=2) as got:
        drain(other, 0.3, enough=lambda: got)
        assert got == []
        drain(other, 3, enough=lambda: len(got) == 2)
        assert bodies(got) == [0, 1]


# --- giving up ------------------------------------------------------------------------------------------------


def test_requeues_are_bounded_and_end_in_the_dead_list(server: PrivateServer, unique: str) -> None:
    """I12: a message that is requeued for ever ends in the dead list, whole and visible. kombu's loops on."""
    with connect(server.ours, max_deliveries=3) as connection:
        queue = declare(connection, unique)
        send(connection, queue, {"n": 10**20, "empty": [], "f": 1.0}, headers={"inner-msg-id": "m-1", "k": []})
        channel = connection.channel()
        counts = []
        while (message := take(channel, unique, 0.2)) is not None:
            counts.append(message.delivery_info.get("x-delivery-count", 0))
            message.requeue()
        assert counts == [0, 1, 2]
        [dead] = dead_messages(connection, unique)
        assert dead.reason == "deliveries"
        assert dead.message is not None
        assert dead.message["headers"]["inner-msg-id"] == "m-1"
        assert abs(dead.at - time.time()) < 60


def test_a_message_that_kills_its_consumers_ends_in_the_dead_list(server: PrivateServer, unique: str) -> None:
    """I12: deaths are counted too. What was fetched beside the killer is not given up with it: a message that came
    back before is taken alone."""
    with connect(server.ours, max_deliveries=2) as connection:
        queue = declare(connection, unique)
        fill(connection, queue, 3)
        for _ in range(2):
            holder = Holder(server.ours, unique, prefetch=3, die="handling")
            assert holder.got() == "0"
            holder.process.wait()
            until(lambda: _swept(connection, unique) and server.held() == 0, 5, "the sweep")
        channel = connection.channel()
        rest = [take(channel, unique) for _ in range(2)]
        assert sorted(bodies(rest)) == [1, 2]
        assert [dead.reason for dead in dead_messages(connection, unique)] == ["deliveries"]


def _swept(connection: Any, name: str) -> bool:
    """Look after the queue as an idle consumer does, without taking anything."""
    channel = connection.default_channel
    line = channel.line
    from idempotent_bus.transports.redis.wire import Wire

    wire = Wire(channel.pool)
    try:
        reply = wire.call([line._tend(channel.keys_of(name), name)])
        line._after_tending(wire, [name], reply)
    finally:
        wire.close()
    return True


def test_a_rejected_message_is_kept_unless_told_otherwise(server: PrivateServer, unique: str) -> None:
    """I1: reject without requeue moves to the dead list; with keep_rejected=False it is deleted, as by kombu."""
    for keep, expected in ((True, 1), (False, 0)):
        name = f"{unique}-{keep}"
        with connect(server.ours, keep_rejected=keep) as connection:
            fill(connection, declare(connection, name), 1)
            take(connection.default_channel, name).reject()
            connection.default_channel.qos.flush()
            assert len(dead_messages(connection, name)) == expected
    assert server.held() == 0


# --- beside kombu's own consumers, and out again -------------------------------------------------------------


def test_a_plain_worker_beside_ours_cannot_take_what_ours_works_on(server: PrivateServer, unique: str) -> None:
    """I2: kombu's restore finds nothing of ours, however old; its own messages it restores itself."""
    with connect(server.ours) as ours, connect(server.plain) as plain:
        queue = declare(ours, unique)
        fill(ours, queue, 1)
        mine = take(ours.default_channel, unique)
        with consuming(plain, queue) as got:
            drain(plain, 2.5, enough=lambda: got)
            assert got == []
            fill(plain, queue, 1)
            drain(plain, 2, enough=lambda: got)
            mine.ack()
            got[0].ack()
    assert server.held() == 0


def test_a_message_that_came_back_is_readable_by_kombu(server: PrivateServer, unique: str) -> None:
    """A requeued, delayed or restored message is one of kombu's: body, headers and properties unchanged."""
    body = {"n": 10**20, "empty": [], "none": None, "f": 1.0, "text": 'a "delivery_info": {"x": 1} b'}
    headers = {"inner-msg-id": "m-1", "list": [], "delivery_info": {"mine": 1}, "redelivered": False}
    with connect(server.ours) as ours, connect(server.plain) as plain:
        queue = declare(ours, unique)
        send(ours, queue, body, headers=headers, priority=0)
        for step in ("requeue", "requeue", "delay"):
            message = take(ours.default_channel, unique)
            if step == "requeue":
                message.requeue()
            else:
                message.channel.basic_delay(message.delivery_tag, 0)
        _swept(ours, unique)
        message = take(plain.default_channel, unique)
        assert message.payload == body
        assert message.headers == headers
        assert message.delivery_info["redelivered"] is True
        assert message.delivery_info["exchange"] == unique
        message.ack()


@pytest.mark.parametrize("prefix", ["", "app{1}*:"])
def test_restore_moves_everything_back_to_plain_lists(server: PrivateServer, unique: str, prefix: str) -> None:
    """Leaving again: unacked whose owner is dead (others with force), delayed, and dead on request; then kombu's own
    consumer reads every message, and nothing of ours but marks is left."""
    with connect(server.ours, global_keyprefix=prefix, visibility_timeout=0.5) as connection:
        queue = declare(connection, unique)
        fill(connection, queue, 6)
        channel = connection.channel()
        messages = [take(channel, unique) for _ in range(5)]
        channel.basic_delay(messages[0].delivery_tag, 3600)
        messages[1].reject()
        assert restore(connection, delayed=False) == [Holdings(unique)]  # the owner lives
        assert holdings(connection) == [Holdings(unique, unacked=3, delayed=1, dead=1)]
        channel.keeper.close()
        time.sleep(0.6)
        assert restore(connection) == [Holdings(unique, unacked=3, delayed=1)]
        assert restore(connection) == [Holdings(unique)]
        assert restore(connection, "another", dead=True) == []
        assert restore(connection, unique, dead=True) == [Holdings(unique, dead=1)]
        message = take(channel, unique)
        assert restore(connection, force=True) == [Holdings(unique, unacked=1)]
        message.ack()
    with connect(server.plain, global_keyprefix=prefix) as plain:
        assert sorted(take(plain.default_channel, unique).payload for _ in range(6)) == list(range(6))


def test_restore_refuses_another_transport(server: PrivateServer) -> None:
    """It says which connection it needs."""
    with connect(server.plain) as plain, pytest.raises(ConfigurationError):
        restore(plain)


def test_an_old_server_without_tracking_is_looked_at_in_turns(
    server: PrivateServer, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the server refuses CLIENT TRACKING messages still come, within the stated interval."""
    server.client.execute_command("ACL", "SETUSER", "weak", "on", "nopass", "~*", "&*", "+@all", "-client|tracking")
    url = f"idempotent-redis://weak:any@127.0.0.1:{server.port}/0"
    with connect(url) as connection, connect(server.ours) as control:
        queue = declare(control, unique)
        with consuming(connection, queue) as got:
            drain(connection, 0.3)
            started = time.monotonic()
            fill(control, queue, 1)
            drain(connection, 2, enough=lambda: got)
            assert bodies(got) == [0]
            assert time.monotonic() - started < 0.6


# --- processes and event loops --------------------------------------------------------------------------------


def test_a_forked_child_settles_nothing_of_its_parents(server: PrivateServer, unique: str) -> None:
    """I1: a child made by a bare os.fork() publishes on the inherited channel, and its end neither acks nor gives
    back what the parent holds."""
    with connect(server.ours) as connection:
        queue = declare(connection, unique)
        fill(connection, queue, 2)
        channel = connection.default_channel
        first, second = take(channel, unique), take(channel, unique)
        first.ack()
        child = os.fork()
        if not child:
            try:
                send(connection, queue, "from the child", headers={"inner-msg-id": "child"})
                channel.close()
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert server.client.llen(unique) == 1
        until(lambda: server.held() == 1, 2, "the ack of the parent")
        second.ack()
        message = take(channel, unique)
        assert message.payload == "from the child"
        message.ack()
    assert server.held() == 0


def test_in_an_event_loop_messages_delays_and_other_threads_acks_come_in_time(
    server: PrivateServer, unique: str
) -> None:
    """kombu's Hub, as a Celery worker runs it: a burst is handed out, a delay wakes the sleeping loop when it is due,
    and an ack from another thread lets the next message in at once."""
    with connect(server.ours, visibility_timeout=60) as connection, connect(server.plain) as sender:
        queue = declare(connection, unique)
        hub = Hub()
        connection.register_with_event_loop(hub)
        got: list[tuple[float, Any]] = []

        def run(enough: Any, seconds: float = 5.0) -> None:
            deadline = time.monotonic() + seconds
            while not enough() and time.monotonic() < deadline:
                hub.run_once()

        channel = connection.channel()
        consumer = Consumer(channel, [queue], on_message=lambda m: got.append((time.monotonic(), m)), prefetch_count=3)
        with consumer:
            run(lambda: False, 0.3)
            fill(sender, queue, 4)
            run(lambda: len(got) == 3)
            assert [message.payload for _, message in got] == [0, 1, 2]
            acked_at = time.monotonic() + 0.2
            threading.Timer(0.2, got[0][1].ack).start()
            run(lambda: len(got) == 4)
            assert got[3][1].payload == 3
            assert got[3][0] - acked_at < 0.3
            for _, message in got[1:3]:
                message.ack()
            due = time.monotonic() + 0.4
            channel.basic_delay(got[3][1].delivery_tag, 0.4)
            run(lambda: len(got) == 5)
            assert -0.01 < got[4][0] - due < 0.3
            got[4][1].ack()
            run(lambda: server.held() == 0)
        channel.close()
        hub.close()
    assert server.held() == 0
