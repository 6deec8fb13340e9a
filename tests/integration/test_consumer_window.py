"""IdempotentConsumer: a window of messages on a channel of its own, on every broker."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from typing import Any

import pytest
from kombu import Queue
from kombu.message import Message

import servers
from consumer_rig import BROKERS, OURS, RABBITMQ, Broker, Log, broker_of, fill, make_broker, on, poll, running
from idempotent_bus import (
    Backoff,
    Ended,
    IdempotentConsumer,
    IdempotentProducer,
    current_execution,
    idempotent_consumer,
)
from idempotent_bus.errors import StoreUnavailable
from idempotent_bus.headers import DEAD_REASON, ORIGIN_QUEUE
from idempotent_bus.session import Session
from idempotent_bus.stores.memory import MemoryStore
from proxy import Proxy, through

broker = pytest.fixture(broker_of)

QUICK: dict[str, Any] = {"backoff": Backoff(0.05, 0.1), "busy_delay": 0.1, "biz_id": "id"}


class Counting(MemoryStore):
    """Remembers how it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.singles = 0

    def claim(self, request: Any) -> Any:
        self.singles += 1
        return super().claim(request)

    def claim_many(self, requests: Any) -> Any:
        self.batches.append(len(requests))
        return super().claim_many(requests)


def consumer(broker: Broker, handlers: Any, **options: Any) -> IdempotentConsumer:
    return IdempotentConsumer(broker.connect(), handlers, **options)


@on(*BROKERS)
def test_a_window_is_handled_once_each(broker: Broker) -> None:
    """100 messages and 25 copies: 100 effects, all acked, first deliveries claimed together."""
    queue, store, ran = broker.queue(), Counting(), []

    @idempotent_consumer(store, scope=broker.unique, **QUICK)
    def handle(body: Any, message: Message) -> None:
        ran.append(body["id"])

    fill(broker, queue, [*map(str, range(100)), *map(str, range(25))])
    made = consumer(broker, {queue: handle})
    assert made.run(idle_timeout=1.5) == 125
    assert Counter(ran) == Counter(map(str, range(100)))
    assert made.endings == {Ended.COMPLETED: 100, Ended.REPLAYED: 25}
    assert broker.is_empty(queue.name)
    if broker.name != "redis":  # kombu's own asks for one message at a time: whether two are there at once is luck
        assert max(store.batches) > 2
        assert len(store.batches) + store.singles < 80, (store.batches, store.singles)


@on(*RABBITMQ, *OURS, "redis")
def test_redelivered_messages_are_claimed_singly(broker: Broker) -> None:
    """What may have killed a worker before is claimed just before its handler, so that its attempt is counted."""
    queue, store = broker.queue(), Counting()
    fill(broker, queue, map(str, range(10)))
    with broker.connect() as connection:
        channel = connection.channel()
        if not broker.is_rabbitmq:
            queue(channel).declare()
        held = []
        while len(held) < 10:
            raw = channel.basic_get(queue.name)
            if raw is not None:
                held.append(raw if isinstance(raw, Message) else channel.message_to_python(raw))
        for message in held:
            message.requeue()
    handle = idempotent_consumer(store, scope=broker.unique, **QUICK)(lambda body, message: None)
    assert consumer(broker, {queue: handle}).run(idle_timeout=1.5) == 10
    assert store.batches == []
    assert store.singles == 10


@on(*BROKERS)
def test_the_handlers_troubles_stay_its_own(broker: Broker) -> None:
    """A poison message, a bad body, a conflict and a failing handler end in the dead letter; the others are handled."""
    queue, ran = broker.queue(), []

    @idempotent_consumer(MemoryStore(), scope=broker.unique, max_attempts=2, **QUICK)
    def handle(body: Any, message: Message) -> None:
        if body["id"] == "poison":
            raise ValueError("no")
        ran.append(body["id"])

    broker.publish(queue, {"id": "poison"})
    broker.publish_raw(queue, b"{")
    broker.publish_raw(queue, b"[" * 100_000 + b"]" * 100_000)
    broker.publish_raw(queue, b"junk", headers={"compression": "application/x-gzip"})
    broker.publish_raw(queue, b"{}", content_type="application/x-python-serialize", content_encoding="binary")
    broker.publish(queue, {"no": "id"})
    broker.publish(queue, {"id": "0", "sum": 1})
    broker.publish(queue, {"id": "0", "sum": 2})
    fill(broker, queue, map(str, range(1, 20)))
    made = consumer(broker, {queue: handle}, prefetch=10)
    made.run(idle_timeout=2.0)
    assert sorted(ran, key=int) == [str(number) for number in range(20)]
    dead = broker.take(broker.dead, 7)
    assert Counter(message.headers[DEAD_REASON] for message in dead) == {"invalid": 5, "conflict": 1, "attempts": 1}
    assert {message.headers[ORIGIN_QUEUE] for message in dead} == {queue.name}
    assert made.endings[Ended.DEAD] == 7
    assert broker.is_empty(queue.name)


@on(*BROKERS)
def test_two_queues_two_handlers_and_a_publish_from_one_of_them(broker: Broker) -> None:
    """One consumer serves several queues, and a handler may publish with a producer on the same connection."""
    first, second = broker.queue("first"), broker.queue("second")
    connection, got = broker.connect(), []
    producer = IdempotentProducer(connection)

    @idempotent_consumer(MemoryStore(), scope=broker.unique + ".1", **QUICK)
    def hand_on(body: Any, message: Message) -> None:
        producer.publish({"id": body["id"]}, routing_key=second.name, declare=[second])

    @idempotent_consumer(MemoryStore(), scope=broker.unique + ".2", **QUICK)
    def take(body: Any, message: Message) -> None:
        got.append(body["id"])

    fill(broker, first, map(str, range(20)))
    made = IdempotentConsumer(connection, {first: hand_on, second: take}, prefetch=5)
    assert made.run(idle_timeout=2.0) == 40
    assert Counter(got) == Counter(map(str, range(20)))
    producer.close()
    connection.release()


@on("redis", "sqla", "memory", *OURS)
def test_messages_that_wait_do_not_block_those_behind_them(broker: Broker) -> None:
    """More failing messages than the prefetch allows: those behind them are handled before the backoff is over."""
    queue, ran = broker.queue(), []

    @idempotent_consumer(MemoryStore(), scope=broker.unique, **{**QUICK, "backoff": Backoff(60.0, 60.0)})
    def handle(body: Any, message: Message) -> None:
        if body["id"].startswith("bad"):
            raise ValueError("later")
        ran.append(body["id"])

    fill(broker, queue, [*(f"bad{number}" for number in range(12)), "good"])
    made = consumer(broker, {queue: handle}, prefetch=4)
    with running(made):
        assert poll(lambda: ran == ["good"], timeout=15)
    if broker.name != "ours-sqlite" and broker.name != "ours-redis":  # there they are with the broker's own delay
        assert len(broker.take(queue.name, 12)) >= 11, "what waited went back to the broker"


@on(*BROKERS)
def test_stop_gives_back_what_has_not_started(broker: Broker) -> None:
    """`stop` from another thread in mid-window: the running handler ends, the rest goes back at once, uncounted."""
    queue, store, ran = broker.queue(), MemoryStore(), []
    slow = threading.Event()

    @idempotent_consumer(store, scope=broker.unique, max_attempts=1, **QUICK)
    def handle(body: Any, message: Message) -> None:
        ran.append((body["id"], current_execution().attempt))
        if slow.is_set():
            time.sleep(0.5)

    fill(broker, queue, map(str, range(60)))
    made = consumer(broker, {queue: handle}, prefetch=50)
    with running(made) as thread:
        assert poll(lambda: len(ran) >= 20)
        slow.set()
        time.sleep(0.1)
        started = time.monotonic()
        made.stop()
        thread.join(10)
        assert time.monotonic() - started < 3.0
    done = len(ran)
    slow.clear()
    left = consumer(broker, {queue: handle}, prefetch=50)
    left.run(idle_timeout=2.0)
    # Had an unstarted one cost an attempt, max_attempts=1 would have buried it.
    assert len(ran) == 60, f"{done} before the stop, {len(ran)} in all"
    assert {attempt for _, attempt in ran} == {1}
    assert broker.is_empty(broker.dead)


def test_a_stop_before_run_counts(unique: str, tmp_path: Any) -> None:
    """A stop that comes before the thread has got to `run` is not forgotten; the next run is a new one."""
    made = make_broker("memory", unique, tmp_path)
    handle = idempotent_consumer(MemoryStore(), scope=unique, **QUICK)(lambda body, message: None)
    queue = made.queue()
    target = consumer(made, {queue: handle})
    target.stop()
    assert target.run() == 0
    made.publish(queue, {"id": "a"})
    assert target.run(idle_timeout=0.2) == 1


def test_stop_from_a_signal_handler(unique: str, tmp_path: Any) -> None:
    """A signal handler in the consuming thread may call `stop`, whatever that thread is doing."""
    made = make_broker("ours-sqlite", unique, tmp_path)
    handle = idempotent_consumer(MemoryStore(), scope=unique, **QUICK)(lambda body, message: None)
    target = consumer(made, {made.queue(): handle})
    earlier = signal.signal(signal.SIGUSR1, lambda *_: target.stop())
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        started = time.monotonic()
        assert target.run() == 0
        assert time.monotonic() - started < 5
    finally:
        signal.signal(signal.SIGUSR1, earlier)


@on(*BROKERS)
def test_prefetch_is_respected(broker: Broker) -> None:
    """No more than the prefetch, over both queues, is on its way; what the others leave is there for a second one."""
    one, two = broker.queue("one"), broker.queue("two")
    begun, go_on = threading.Event(), threading.Event()

    @idempotent_consumer(MemoryStore(), scope=broker.unique, **QUICK)
    def handle(body: Any, message: Message) -> None:
        begun.set()
        go_on.wait(10)

    for queue in (one, two):
        fill(broker, queue, [f"{queue.name}{number}" for number in range(20)])
    made = consumer(broker, {one: handle, two: handle}, prefetch=6)
    with running(made):
        assert begun.wait(10)
        time.sleep(0.3)
        free = len(broker.take(one.name, 20, timeout=0.5)) + len(broker.take(two.name, 20, timeout=0.5))
        made.stop()
        go_on.set()
    assert free >= 40 - 6


@on(*BROKERS)
def test_a_lost_ack_reconnects_and_nothing_runs_twice(broker: Broker) -> None:
    """The connection breaks at acks: it is opened again, the message comes back, and its record answers it."""
    queue, log, ran = broker.queue(), Log(), []
    log.fail["ack"] = [ConnectionResetError("cut"), None, ConnectionResetError("cut")]

    def lose(name: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if name == "ack" and log.fail["ack"]:
            error = log.fail["ack"].pop(0)
            if error is not None:
                raise error
        return function(*args, **kwargs)

    @idempotent_consumer(MemoryStore(), scope=broker.unique, step=lose, **QUICK)
    def handle(body: Any, message: Message) -> None:
        ran.append(body["id"])

    fill(broker, queue, map(str, range(10)))
    made = consumer(broker, {queue: handle}, prefetch=4)
    made.run(idle_timeout=2.0)
    assert Counter(ran) == Counter(map(str, range(10)))
    assert broker.is_empty(queue.name)


@pytest.mark.parametrize("name", ["rabbitmq-classic", "rabbitmq-quorum", "redis", "ours-redis"])
def test_a_cut_connection_is_ridden_out(name: str, unique: str, tmp_path: Any) -> None:
    """Connections cut in the middle, twice, and a broker that cannot be reached for a second: all handled once."""
    direct = make_broker(name, unique, tmp_path)
    queue, ran = direct.queue(), []

    @idempotent_consumer(MemoryStore(), scope=unique, **QUICK)
    def handle(body: Any, message: Message) -> None:
        ran.append(body["id"])
        time.sleep(0.01)

    fill(direct, queue, map(str, range(100)))
    options = {**direct.options, "visibility_timeout": 3}
    prefix = "idempotent-" if name == "ours-redis" else ""
    redis = servers.real_redis if prefix else servers.redis
    url = servers.rabbitmq() if direct.is_rabbitmq else redis()
    with Proxy(url=url) as proxy:
        from kombu import Connection

        made = IdempotentConsumer(
            Connection(prefix + through(proxy, url), transport_options=options), {queue: handle}, prefetch=20
        )
        with running(made):
            for goal in (20, 50):
                assert poll(lambda: len(ran) >= goal, timeout=30)  # noqa: B023 - called at once
                proxy.refuse()
                proxy.cut()
                time.sleep(0.5)
                proxy.accept_again()
            if name == "redis":  # kombu's own loses what a cut fetch carried (W4): what it has is handled once
                poll(lambda: len(ran) >= 100, timeout=15)
                assert len(ran) >= 95
            else:
                assert poll(lambda: len(ran) >= 100, timeout=40), len(ran)
        assert max(Counter(ran).values()) == 1
    direct.clean_up()


@on("rabbitmq-classic", "ours-sqlite", "memory")
def test_an_outage_does_not_count_as_idle(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an outage that was longer than the idle time the consumer looks before it goes."""
    queue, ran = broker.queue(), []
    cut = [True]

    @idempotent_consumer(MemoryStore(), scope=broker.unique, **QUICK)
    def handle(body: Any, message: Message) -> None:
        ran.append(body["id"])

    fill(broker, queue, ["a"])
    made = consumer(broker, {queue: handle})
    real = Session._loop

    def loop(*args: Any) -> None:
        if cut[0]:
            cut[0] = False
            time.sleep(0.6)
            raise ConnectionResetError("an outage")
        real(*args)

    monkeypatch.setattr(Session, "_loop", loop)
    made.run(idle_timeout=0.5)
    assert ran == ["a"]


@on(*BROKERS)
def test_the_store_may_go_and_come_back(broker: Broker) -> None:
    """I9, I13: while the store is down nothing runs and nothing is acked; when it is back all is handled, once."""
    queue, ran, down = broker.queue(), [], threading.Event()

    class Store(MemoryStore):
        def claim(self, *args: Any) -> Any:
            self._check()
            return super().claim(*args)

        def claim_many(self, *args: Any) -> Any:
            self._check()
            return super().claim_many(*args)

        def _check(self) -> None:
            if down.is_set():
                raise StoreUnavailable("down")

    @idempotent_consumer(Store(), scope=broker.unique, **QUICK)
    def handle(body: Any, message: Message) -> None:
        ran.append(body["id"])

    down.set()
    fill(broker, queue, map(str, range(20)))
    made = consumer(broker, {queue: handle}, prefetch=10)
    with running(made):
        assert poll(lambda: made.endings[Ended.IN_DOUBT] >= 3)
        assert ran == []
        down.clear()
        assert poll(lambda: len(ran) == 20, timeout=20), len(ran)
    assert Counter(ran) == Counter(map(str, range(20)))
    assert broker.is_empty(queue.name)


def test_slow_handlers_shrink_the_window(unique: str, tmp_path: Any) -> None:
    """A window is through in about a quarter of a second: claims that others could run are not held ahead."""
    made = make_broker("memory", unique, tmp_path)
    store, pause = Counting(), [0.0]
    handle = idempotent_consumer(store, scope=unique, **QUICK)(lambda body, message: time.sleep(pause[0]))
    queue = made.queue()
    fill(made, queue, [f"fast{number}" for number in range(300)])
    target = consumer(made, {queue: handle}, prefetch=50)
    target.run(idle_timeout=0.1)
    assert max(store.batches) == 50
    assert store.singles >= 1, "the first window is one message"
    store.batches.clear()
    pause[0] = 0.15
    fill(made, queue, [f"slow{number}" for number in range(12)])
    target.run(idle_timeout=0.1)
    assert sum(store.batches) <= 2


def test_an_unreachable_broker_is_waited_for_until_stop(unique: str) -> None:
    """No broker at the address: `run` keeps trying, and `stop` ends that too."""
    handle = idempotent_consumer(MemoryStore(), scope=unique, **QUICK)(lambda body, message: None)
    target = IdempotentConsumer("amqp://guest:guest@127.0.0.1:9//", {Queue(unique): handle})
    with running(target) as thread:
        time.sleep(0.5)
        assert thread.is_alive()


@on("rabbitmq-classic")
def test_heartbeats_are_answered(broker: Broker) -> None:
    """A connection with a heartbeat of a second lives through idle times."""
    queue, ran = broker.queue(), []
    handle = idempotent_consumer(MemoryStore(), scope=broker.unique, **QUICK)(lambda b, m: ran.append(b["id"]))
    connection = broker.connect().clone(heartbeat=1)
    made = IdempotentConsumer(connection, {queue: handle})
    opened: list[Any] = []
    real = made._consume

    def consume(*args: Any) -> None:
        opened.append(1)
        real(*args)

    made._consume = consume  # type: ignore[method-assign]
    with running(made):
        time.sleep(4)
        fill(broker, queue, ["a"])
        assert poll(lambda: ran == ["a"])
    assert len(opened) == 1, "the broker closed the connection"
