"""IdempotentConsumer with threads, and executions that another thread completes: all answers come from one thread."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection, Consumer
from kombu.message import Message

import servers
from consumer_rig import Broker, broker_of, drain, fill, make_broker, on, poll, running
from idempotent_bus import (
    Backoff,
    ConfigurationError,
    Ended,
    Execution,
    IdempotentConsumer,
    Permanent,
    current_execution,
    idempotent_consumer,
)
from idempotent_bus.errors import StoreUnavailable
from idempotent_bus.settlement import MessageSettlement
from idempotent_bus.stores.memory import MemoryStore
from proxy import Proxy, through

broker = pytest.fixture(broker_of)

THREADED = ("rabbitmq-classic", "rabbitmq-quorum", "ours-redis", "ours-sqlite", "memory", "redis", "sqla")
QUICK: dict[str, Any] = {"backoff": Backoff(0.05, 0.1), "busy_delay": 0.1, "biz_id": "id"}


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, threading.Thread]]]:
    """What was done to messages at the broker, and in which thread."""
    seen: list[tuple[str, threading.Thread]] = []
    for name in ("ack", "wait", "rescue"):
        real = getattr(MessageSettlement, name)

        def wrapped(self: Any, *args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            seen.append((name, threading.current_thread()))
            return real(self, *args, **kwargs)

        monkeypatch.setattr(MessageSettlement, name, wrapped)
    return seen


@on(*THREADED)
def test_handlers_run_at_once_and_all_answers_come_home(
    broker: Broker, settled: list[tuple[str, threading.Thread]]
) -> None:
    """I2, I4: 4 handlers at a time meet each other; acks, waits and dead letters are all the consuming thread's."""
    queue, meet, ran, threads, failed = broker.queue(), threading.Barrier(4), [], set(), set()

    @idempotent_consumer(MemoryStore(), scope=broker.unique, **QUICK)
    def handle(body: Any, message: Message) -> None:
        biz_id = body["id"]
        if biz_id.startswith("meet"):
            meet.wait(10)
        if biz_id == "fails" and biz_id not in failed:
            failed.add(biz_id)
            raise ValueError("the first time")
        if biz_id == "dies":
            raise Permanent("never")
        threads.add(threading.current_thread())
        ran.append(biz_id)

    ids = [*(f"meet{number}" for number in range(4)), "fails", "dies", *map(str, range(40))]
    fill(broker, queue, [*ids, *map(str, range(10))])
    made = IdempotentConsumer(broker.connect(), {queue: handle}, threads=4, prefetch=12)
    with running(made, idle_timeout=2.5) as home:
        home.join(60)
        assert not home.is_alive()
    assert Counter(ran) == Counter([name for name in ids if name != "dies"])
    assert len(threads) == 4
    assert home not in threads
    assert {thread for _, thread in settled} == {home}
    done = Counter(name for name, _ in settled)
    assert done["rescue"] == 1
    assert done["wait"] >= 1
    assert [message.payload["id"] for message in broker.take(broker.dead, 1)] == ["dies"]
    assert broker.is_empty(queue.name)
    assert made.endings[Ended.COMPLETED] == 45
    assert made.health()["state"] == "stopped"


@on("rabbitmq-classic", "ours-redis", "ours-sqlite")
def test_no_more_than_the_prefetch_are_on_hand(broker: Broker) -> None:
    """2 threads and a prefetch of 5: the other messages are there for somebody else."""
    queue, go_on = broker.queue(), threading.Event()
    handle = idempotent_consumer(MemoryStore(), scope=broker.unique, **QUICK)(lambda body, message: go_on.wait(20))
    fill(broker, queue, map(str, range(20)))
    made = IdempotentConsumer(broker.connect(), {queue: handle}, threads=2, prefetch=5)
    with running(made):
        assert poll(lambda: made.health()["in_flight"] == 2 and made.health()["waiting"] == 3)
        time.sleep(0.3)
        assert len(broker.take(queue.name, 20, timeout=0.5)) == 15
        assert made.health()["oldest_running"] > 0.3
        go_on.set()
        assert poll(lambda: made.endings[Ended.COMPLETED] == 5)
        assert made.health()["oldest_running"] == 0


@pytest.mark.parametrize("threads", [2, 0], ids=["threads", "control-no-threads"])
def test_slow_handlers_do_not_hold_up_heartbeats(threads: int, unique: str, tmp_path: Any) -> None:
    """A handler of 6 s on a connection with a heartbeat of 1 s: it lives. The control, in the loop itself, does not."""
    made = make_broker("rabbitmq-classic", unique, tmp_path)
    queue, ran = made.queue(), []

    @idempotent_consumer(MemoryStore(), scope=unique, **QUICK)
    def handle(body: Any, message: Message) -> None:
        time.sleep(6)
        ran.append(body["id"])

    fill(made, queue, ["a"])
    target = IdempotentConsumer(made.connect().clone(heartbeat=1), {queue: handle}, threads=threads)
    opened: list[int] = []
    real = target._consume

    def consume(*args: Any) -> None:
        opened.append(1)
        real(*args)

    target._consume = consume  # type: ignore[method-assign]
    with running(target):
        assert poll(lambda: ran == ["a"])
        if threads:
            assert poll(lambda: target.endings[Ended.COMPLETED] == 1)
            time.sleep(0.5)
            assert len(opened) == 1, "the broker closed the connection"
        else:
            assert poll(lambda: len(opened) > 1), "the control kept its heartbeats: the test proves nothing"
    made.clean_up()


@on("rabbitmq-quorum", "ours-redis", "ours-sqlite")
def test_stop_lets_what_runs_end_and_gives_the_rest_back(broker: Broker) -> None:
    """I1, I4: two run, they end and are acked; three were brought and had not begun, they are the broker's again."""
    queue, begun, go_on, ran = broker.queue(), threading.Semaphore(0), threading.Event(), []
    store = MemoryStore()

    @idempotent_consumer(store, scope=broker.unique, **QUICK)
    def handle(body: Any, message: Message) -> None:
        begun.release()
        go_on.wait(20)
        ran.append(body["id"])

    fill(broker, queue, map(str, range(5)))
    made = IdempotentConsumer(broker.connect(), {queue: handle}, threads=2, prefetch=5)
    thread = threading.Thread(target=made.run)
    thread.start()
    assert begun.acquire(timeout=10)
    assert begun.acquire(timeout=10)
    assert poll(lambda: made.health()["waiting"] == 3)
    made.stop()
    assert poll(lambda: made.health()["waiting"] == 0)
    assert made.health()["state"] == "stopping"
    go_on.set()
    thread.join(10)
    assert not thread.is_alive()
    assert len(ran) == 2
    assert made.endings == {Ended.COMPLETED: 2}
    assert made.left_behind == 0
    left = broker.take(queue.name, 5, timeout=2.0)
    assert sorted(message.payload["id"] for message in left) == sorted({*map(str, range(5))} - set(ran))


def test_what_outlives_the_stop_timeout_is_left_behind(unique: str, tmp_path: Any) -> None:
    """A handler that hangs does not hold up `run`; its message is the broker's again, its late completion counts."""
    made = make_broker("rabbitmq-classic", unique, tmp_path)
    queue, begun, go_on, ran = made.queue(), threading.Event(), threading.Event(), []

    @idempotent_consumer(MemoryStore(), scope=unique, **QUICK)
    def handle(body: Any, message: Message) -> None:
        ran.append(body["id"])
        begun.set()
        go_on.wait(20)

    fill(made, queue, ["a"])
    target = IdempotentConsumer(made.connect(), {queue: handle}, threads=1, stop_timeout=0.5)
    with running(target):
        assert begun.wait(10)
        target.stop()
        assert poll(lambda: target.health()["state"] == "stopped", timeout=5)
    assert target.left_behind == 1
    go_on.set()
    again = IdempotentConsumer(made.connect(), {queue: handle}, threads=1)
    again.run(idle_timeout=1.5)
    assert ran == ["a"]
    assert again.endings[Ended.REPLAYED] == 1
    assert made.is_empty(queue.name)
    made.clean_up()


@on("rabbitmq-classic", "ours-redis", "ours-sqlite", "memory")
@pytest.mark.parametrize("threads", [0, 2])
def test_another_thread_completes_later(
    broker: Broker, threads: int, settled: list[tuple[str, threading.Thread]]
) -> None:
    """manual=True: unacked until `complete`, and not idle; acked within a moment of it, from the consuming thread."""
    queue, executions = broker.queue(), []

    @idempotent_consumer(MemoryStore(), scope=broker.unique, manual=True, **QUICK)
    def handle(body: Any, message: Message) -> None:
        executions.append(current_execution())

    fill(broker, queue, ["good", "bad", "worst"])
    made = IdempotentConsumer(broker.connect(), {queue: handle}, threads=threads)
    with running(made, idle_timeout=0.5) as home:
        assert poll(lambda: len(executions) == 3)
        time.sleep(1.0)
        assert home.is_alive(), "it was taken for idle"
        assert made.health()["open"] == 3
        assert settled == []
        by_id: dict[str, Execution] = {execution.biz_id: execution for execution in executions}
        by_id["worst"].fail("nothing helps", permanent=True)
        assert [name for name, _ in settled] == ["rescue", "ack"], "fail() came back before the dead letter was there"
        by_id["good"].complete({"card": 1})
        assert poll(lambda: len(settled) == 3, timeout=2)
        by_id["bad"].fail("try again")
        assert poll(lambda: len(executions) == 4), "the failed one did not come back"
        executions[-1].complete()
        home.join(15)
        assert not home.is_alive(), "it was never idle"
    assert {thread for _, thread in settled} == {home}
    assert [message.payload["id"] for message in broker.take(broker.dead, 1)] == ["worst"]
    assert broker.is_empty(queue.name)


@on("rabbitmq-classic")
@pytest.mark.parametrize("threads", [0, 2])
def test_a_completion_is_acked_at_once(broker: Broker, threads: int) -> None:
    """The loop sleeps on the broker's socket; a completion from another thread wakes it."""
    queue, executions, spans = broker.queue(), [], []

    @idempotent_consumer(MemoryStore(), scope=broker.unique, manual=True, **QUICK)
    def handle(body: Any, message: Message) -> None:
        executions.append(current_execution())

    fill(broker, queue, map(str, range(10)))
    made = IdempotentConsumer(broker.connect(), {queue: handle}, threads=threads)
    with running(made):
        assert poll(lambda: len(executions) == 10)
        for number, execution in enumerate(executions):
            time.sleep(0.05)
            started = time.monotonic()
            execution.complete()
            while made.health()["open"] > 9 - number:
                time.sleep(0.0005)
            spans.append(time.monotonic() - started)
    assert sorted(spans)[5] < 0.02, spans


@on("rabbitmq-classic", "ours-redis")
def test_a_completion_after_a_reconnect_does_not_ack_on_the_new_connection(broker: Broker) -> None:
    """I4, I8: the old connection's ack is dropped; the broker delivers again, and the record answers."""
    queue, executions, url = broker.queue(), [], broker.url
    store = MemoryStore()

    @idempotent_consumer(store, scope=broker.unique, manual=True, lease=1.0, **QUICK)
    def handle(body: Any, message: Message) -> None:
        executions.append(current_execution())

    prefix = "idempotent-" if url.startswith("idempotent-") else ""
    fill(broker, queue, ["a"])
    with Proxy(url=url.removeprefix(prefix)) as proxy:
        options = {**broker.options, "visibility_timeout": 2}
        connection = Connection(prefix + through(proxy, url.removeprefix(prefix)), transport_options=options)
        made = IdempotentConsumer(connection, {queue: handle})
        with running(made):
            assert poll(lambda: bool(executions))
            session = made._session
            proxy.refuse()
            proxy.cut()
            assert poll(lambda: made._session is not session)
            executions[0].complete("done")
            proxy.accept_again()
            assert poll(lambda: made.endings[Ended.REPLAYED] == 1, timeout=20), made.endings
    assert len(executions) == 1, "it ran again"
    assert broker.is_empty(queue.name)


@on("rabbitmq-classic", "ours-sqlite")
def test_a_bare_callback_settles_when_it_is_called_again(
    broker: Broker, settled: list[tuple[str, threading.Thread]]
) -> None:
    """No loop of ours: what another thread completed is acked by the next callback, or by settle_pending."""
    queue, executions = broker.queue(), []

    @idempotent_consumer(MemoryStore(), scope=broker.unique, manual=True, **QUICK)
    def handle(body: Any, message: Message) -> None:
        executions.append(current_execution())

    def complete(execution: Execution) -> None:
        thread = threading.Thread(target=execution.complete)
        thread.start()
        thread.join()

    fill(broker, queue, ["a"])
    with broker.connect() as connection, Consumer(connection, [queue], callbacks=[handle]):
        assert drain(connection, lambda: len(executions) == 1)
        complete(executions[0])
        assert settled == []
        fill(broker, queue, ["b"])
        assert drain(connection, lambda: len(executions) == 2)
        assert len(settled) == 1
        complete(executions[1])
        assert len(settled) == 1
        handle.settle_pending()
        assert len(settled) == 2
    assert {thread for _, thread in settled} == {threading.current_thread()}
    assert broker.is_empty(queue.name)


@on("rabbitmq-classic")
def test_a_bare_callbacks_old_channel_is_left_alone(broker: Broker) -> None:
    """What was completed after its channel had closed is not acked anywhere: it comes again, and the record answers."""
    queue, executions = broker.queue(), []

    @idempotent_consumer(MemoryStore(), scope=broker.unique, manual=True, **QUICK)
    def handle(body: Any, message: Message) -> None:
        executions.append(current_execution())

    fill(broker, queue, ["a"])
    with broker.connect() as connection, Consumer(connection, [queue], callbacks=[handle]):
        assert drain(connection, lambda: len(executions) == 1)
    thread = threading.Thread(target=executions[0].complete)
    thread.start()
    thread.join()
    handle.settle_pending()
    endings: list[Any] = []
    with (
        broker.connect() as connection,
        Consumer(
            connection, [queue], callbacks=[lambda body, message: endings.append(handle.handle(body, message).how)]
        ),
    ):
        assert drain(connection, lambda: bool(endings))
    assert endings == [Ended.REPLAYED]
    assert broker.is_empty(queue.name)


@pytest.mark.parametrize("name", ["rabbitmq-quorum", "ours-redis"])
def test_a_cut_connection_during_pool_work(name: str, unique: str, tmp_path: Any) -> None:
    """I1, I2: connections cut three times while handlers run in threads: each effect once, none lost, all acked."""
    direct = make_broker(name, unique, tmp_path)
    queue, ran = direct.queue(), []

    @idempotent_consumer(MemoryStore(), scope=unique, **QUICK)
    def handle(body: Any, message: Message) -> None:
        time.sleep(0.05)
        ran.append(body["id"])

    fill(direct, queue, map(str, range(200)))
    prefix = "idempotent-" if name == "ours-redis" else ""
    url = servers.rabbitmq() if direct.is_rabbitmq else servers.real_redis()
    with Proxy(url=url) as proxy:
        options = {**direct.options, "visibility_timeout": 2}
        connection = Connection(prefix + through(proxy, url), transport_options=options)
        made = IdempotentConsumer(connection, {queue: handle}, threads=4, prefetch=16)
        with running(made):
            for goal in (30, 70, 120):
                assert poll(lambda: len(ran) >= goal, timeout=30), len(ran)  # noqa: B023 - called at once
                proxy.refuse()
                proxy.cut()
                time.sleep(0.4)
                proxy.accept_again()
            assert poll(lambda: len(ran) >= 200, timeout=40), len(ran)
            assert poll(lambda: not made.health()["in_flight"] and not made.health()["open"])
            time.sleep(3)
            assert made.health()["open"] == 0
    assert Counter(ran) == Counter(map(str, range(200)))
    assert direct.is_empty(queue.name)
    direct.clean_up()


@pytest.mark.slow  # it waits for the longest pause that a message in doubt may be given
@on("rabbitmq-classic", "ours-sqlite")
def test_a_store_that_is_away_does_not_spin_the_pool(broker: Broker) -> None:
    """I9, I13: nothing runs, nothing is acked, few claims are asked; the health says so; all is handled afterwards."""
    queue, ran, down, asked = broker.queue(), [], threading.Event(), []

    class Store(MemoryStore):
        def claim(self, *args: Any) -> Any:
            if down.is_set():
                asked.append(1)
                raise StoreUnavailable("down")
            return super().claim(*args)

    @idempotent_consumer(Store(), scope=broker.unique, **{**QUICK, "busy_delay": 0.5})
    def handle(body: Any, message: Message) -> None:
        ran.append(body["id"])

    down.set()
    fill(broker, queue, map(str, range(20)))
    made = IdempotentConsumer(broker.connect(), {queue: handle}, threads=2)
    with running(made):
        assert poll(lambda: not made.health()["store"]["ok"])
        time.sleep(2)
        assert ran == []
        assert len(asked) <= 2 * 2 * 6, "it spins"
        down.clear()
        # Put off for up to 15 s and a half as much again, which is 32 s in RabbitMQ's delay queues.
        assert poll(lambda: len(ran) == 20, timeout=45), len(ran)
        assert poll(lambda: made.health()["store"]["ok"])
    assert Counter(ran) == Counter(map(str, range(20)))


@on("memory", "rabbitmq-classic")
def test_what_cannot_be_ridden_out_comes_out_of_run(broker: Broker) -> None:
    """An error of ours in a pool thread (a store that cannot be opened) ends `run` as it would without threads."""
    queue = broker.queue()

    def opened() -> Any:
        raise ConfigurationError("no such store")

    handle = idempotent_consumer(opened, scope=broker.unique, **QUICK)(lambda body, message: None)
    fill(broker, queue, ["a"])
    with pytest.raises(ConfigurationError, match="no such store"):
        IdempotentConsumer(broker.connect(), {queue: handle}, threads=2).run(idle_timeout=10)
    assert not broker.is_empty(queue.name) or broker.name == "memory"


@on("redis", "ours-redis", "ours-sqlite")
def test_a_retention_below_the_visibility_timeout_is_refused(broker: Broker) -> None:
    """I11: a record that would be forgotten before the broker brings a dead consumer's message back."""
    queue = broker.queue()
    broker.options["visibility_timeout"] = 900
    options = {**QUICK, "lease": 10.0}
    short = idempotent_consumer(MemoryStore(), scope=broker.unique, retention=900, **options)(lambda b, m: None)
    with pytest.raises(ConfigurationError, match="visibility_timeout"):
        IdempotentConsumer(broker.connect(), {queue: short}).run(idle_timeout=0.1)
    enough = idempotent_consumer(MemoryStore(), scope=broker.unique, retention=901, **options)(lambda b, m: None)
    assert IdempotentConsumer(broker.connect(), {queue: enough}).run(idle_timeout=0.1) == 0


@on("memory", "rabbitmq-classic")
def test_where_the_time_cannot_be_known_it_is_said_what_is_relied_on(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    """I11: the broker tells no time after which a message comes no more: one sentence, at the first start."""
    queue = broker.queue()
    handle = idempotent_consumer(MemoryStore(), scope=broker.unique, retention=86_400, **QUICK)(lambda b, m: None)
    consumer = IdempotentConsumer(broker.connect(), {queue: handle})
    with caplog.at_level("INFO", logger="idempotent_bus.consumer"):
        for _ in range(2):
            consumer.run(idle_timeout=0.1)
    assert caplog.text.count(f"scope {broker.unique}: how long this broker may keep a message cannot be known") == 1


@pytest.mark.parametrize(
    "options",
    [{"threads": -1}, {"threads": 1.5}, {"threads": True}, {"stop_timeout": -1}, {"stop_timeout": float("nan")}],
    ids=["negative", "half", "true", "negative-timeout", "nan"],
)
def test_wrong_settings_are_refused_at_once(options: dict[str, Any], unique: str) -> None:
    """ConfigurationError when the consumer is made, not when it runs."""
    from kombu import Queue

    handle = idempotent_consumer(MemoryStore(), scope=unique, **QUICK)(lambda body, message: None)
    with pytest.raises(ConfigurationError):
        IdempotentConsumer("memory://", {Queue(unique): handle}, **options)


@on("memory", "rabbitmq-classic")
def test_another_thread_fails_it_while_the_handler_raises(broker: Broker) -> None:
    """The other thread waits for the consuming one to write the dead letter: neither waits for the other for ever."""
    queue, asked, told = broker.queue(), threading.Event(), []

    def fail(execution: Execution) -> None:
        execution.fail("nothing helps", permanent=True)
        told.append(1)

    @idempotent_consumer(MemoryStore(), scope=broker.unique, manual=True, **QUICK)
    def handle(body: Any, message: Message) -> None:
        thread = threading.Thread(target=fail, args=(current_execution(),), daemon=True)
        thread.start()
        asked.wait(0.5)  # until it waits for this thread
        raise ValueError("at the same time")

    fill(broker, queue, ["a"])
    made = IdempotentConsumer(broker.connect(), {queue: handle})
    with running(made, idle_timeout=1.5) as home:
        assert poll(lambda: told == [1]), "they wait for each other"
        home.join(10)
        assert not home.is_alive()
    assert len(broker.take(broker.dead, 2, timeout=1.0)) == 1
    assert broker.is_empty(queue.name)
