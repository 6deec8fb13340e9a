"""Guarded handlers as bare kombu callbacks, on every broker."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
from kombu import Connection, Consumer, Exchange, Queue
from kombu.message import Message
from kombu.mixins import ConsumerMixin

from consumer_rig import BROKERS, OURS, RABBITMQ, Broker, Log, broker_of, consume, drain, make_broker, on
from idempotent_bus import (
    Backoff,
    ConfigurationError,
    HandlerAcknowledged,
    IdempotentProducer,
    Permanent,
    current_execution,
    idempotent_consumer,
)
from idempotent_bus.errors import StoreUnavailable
from idempotent_bus.headers import DEAD_ATTEMPTS, DEAD_ERROR, DEAD_REASON, DEAD_SCOPE, INNER_MSG_ID, ORIGIN_QUEUE
from idempotent_bus.stores.memory import MemoryStore

broker = pytest.fixture(broker_of)

QUICK = {"backoff": Backoff(0.05, 0.1), "busy_delay": 0.1}


def guarded(store: Any, scope: str, **options: Any) -> Any:
    return functools.partial(idempotent_consumer, store, scope=scope, biz_id="id", **{**QUICK, **options})()


@on(*BROKERS)
def test_a_message_is_handled_once_and_acked_after_it_completed(broker: Broker) -> None:
    """I4: claim, handler, complete, ack, in this order; a copy with the same biz-id is acked without running (I8)."""
    queue, log, answers = broker.queue(), Log(), []

    @guarded(MemoryStore(), broker.unique, step=log)
    def handle(body: Any, message: Message) -> str:
        log.events.append("effect")
        return "card 7"

    def callback(body: Any, message: Message) -> None:
        answers.append(handle(body, message))

    broker.publish(queue, {"id": "a"})
    broker.publish(queue, {"id": "a"})
    assert consume(broker, queue, callback, lambda: len(answers) == 2)
    assert answers == ["card 7", "card 7"]
    assert log.order("claim", "effect", "complete done", "ack", "ack done") == [
        "claim", "effect", "complete done", "ack", "ack done", "claim", "ack", "ack done",
    ]  # fmt: skip
    assert broker.is_empty(queue.name)
    assert broker.is_empty(broker.dead)


@on(*BROKERS)
def test_the_brokers_ack_comes_last(broker: Broker) -> None:
    """I4, seen from the channel: nothing reaches the broker before the completion is durable."""
    queue, seen, store = broker.queue(), [], MemoryStore()

    class Told(MemoryStore):
        def complete(self, *args: Any, **kwargs: Any) -> bool:
            seen.append("completed")
            return super().complete(*args, **kwargs)

    store = Told()

    @guarded(store, broker.unique)
    def handle(body: Any, message: Message) -> None:
        seen.append("ran")
        basic_ack = message.channel.basic_ack

        def ack(*args: Any, **kwargs: Any) -> Any:
            seen.append("acked")
            return basic_ack(*args, **kwargs)

        message.channel.basic_ack = ack

    broker.publish(queue, {"id": "a"})
    assert consume(broker, queue, handle, lambda: "acked" in seen)
    assert seen == ["ran", "completed", "acked"]


@on(*BROKERS)
def test_a_failing_handler_is_tried_again_while_neighbours_flow(broker: Broker) -> None:
    """A handler that raised is released, comes back after its backoff, and does not hold up its neighbours."""
    queue, done, fails = broker.queue(), [], [2]

    @guarded(MemoryStore(), broker.unique)
    def handle(body: Any, message: Message) -> None:
        if body["id"] == "bad" and fails[0]:
            fails[0] -= 1
            raise ValueError("not today")
        done.append(body["id"])

    ids = ["bad", *(f"n{number}" for number in range(5))]
    for biz_id in ids:
        broker.publish(queue, {"id": biz_id})
    assert consume(broker, queue, handle, lambda: len(done) == 6, timeout=20)
    assert sorted(done) == sorted(ids)
    assert done[-1] == "bad"
    assert broker.is_empty(queue.name)


@on(*BROKERS)
def test_used_up_attempts_end_in_the_dead_letter(broker: Broker) -> None:
    """I12: after max_attempts the message is in `<scope>.dead`: body, id and properties untouched."""
    queue, runs = broker.queue(), []

    @guarded(MemoryStore(), broker.unique, max_attempts=2)
    def handle(body: Any, message: Message) -> None:
        runs.append(message.headers[INNER_MSG_ID])
        raise ValueError("never")

    inner = broker.publish(
        queue, {"id": "a", "sum": "9.90"}, headers={"trace": "t-1"}, correlation_id="c-1", reply_to="r-1", priority=3
    )
    dead: list[Message] = []

    def look() -> bool:
        dead.extend(broker.take(broker.dead, timeout=0.0) if len(runs) == 2 else [])
        return bool(dead)

    assert consume(broker, queue, handle, look, timeout=20)
    message = dead[0]
    assert message.payload == {"id": "a", "sum": "9.90"}
    assert message.headers[INNER_MSG_ID] == inner
    assert runs == [inner, inner]
    assert message.headers["trace"] == "t-1"
    assert message.headers[DEAD_REASON] == "attempts"
    assert message.headers[DEAD_ERROR] == "ValueError: never"
    assert message.headers[DEAD_ATTEMPTS] == 2
    assert message.headers[DEAD_SCOPE] == broker.unique
    assert message.headers[ORIGIN_QUEUE] == queue.name
    assert "x-death" not in message.headers
    assert message.properties["correlation_id"] == "c-1"
    assert message.properties["reply_to"] == "r-1"
    assert message.properties["priority"] == 3
    assert broker.is_empty(queue.name)


@on(*BROKERS)
def test_the_dead_letter_is_stored_before_the_ack(broker: Broker) -> None:
    """I4: killed between the dead letter's confirm and the ack, the message is in both places, never in none."""
    queue, events = broker.queue(), []

    class Killed(BaseException):
        pass

    @guarded(MemoryStore(), broker.unique)
    def handle(body: Any, message: Message) -> None:
        basic_ack = message.channel.basic_ack

        def ack(*args: Any, **kwargs: Any) -> Any:
            events.append("ack")
            raise Killed

        message.channel.basic_ack = ack
        events.append(basic_ack is not None)
        raise Permanent("no")

    broker.publish(queue, {"id": "a"})
    with pytest.raises(Killed):
        consume(broker, queue, handle, lambda: False)
    assert [message.payload["id"] for message in broker.take(broker.dead)] == ["a"]


BAD_BODIES: dict[str, tuple[bytes, dict[str, Any]]] = {
    "no biz-id": (b'{"other": 1}', {}),
    "bool biz-id": (b'{"id": true}', {}),
    "float biz-id": (b'{"id": 1.5}', {}),
    "empty biz-id": (b'{"id": ""}', {}),
    "control": (b'{"id": "a\\u0000b"}', {}),
    "lone surrogate": (b'{"id": "\\ud800"}', {}),
    "no object": (b"[1, 2]", {}),
    "no content type": (b'{"id": "a"}', {"content_type": "application/octet-stream", "content_encoding": "binary"}),
    "redrive": (b'{"id": "a"}', {"headers": {"idempotent-bus-redrive": "many"}}),
    "huge redrive": (b'{"id": "a"}', {"headers": {"idempotent-bus-redrive": 2**62}}),
}


@on(*BROKERS)
def test_what_has_no_usable_biz_id_is_never_run_and_never_lost(broker: Broker) -> None:
    """A missing or bad biz-id goes to the dead letter with the raw body, and the consumer lives on."""
    queue, ran = broker.queue(), []

    @guarded(MemoryStore(), broker.unique)
    def handle(body: Any, message: Message) -> None:
        ran.append(body["id"])

    for body, options in BAD_BODIES.values():
        broker.publish_raw(queue, body, **options)
    broker.publish(queue, {"id": "good"})
    assert consume(broker, queue, handle, lambda: ran == ["good"], timeout=20)
    dead = broker.take(broker.dead, len(BAD_BODIES))
    assert sorted(bytes_of(message) for message in dead) == sorted(body for body, _ in BAD_BODIES.values())
    assert {message.headers[DEAD_REASON] for message in dead} == {"invalid"}
    assert broker.is_empty(queue.name)


def bytes_of(message: Message) -> bytes:
    return message.body.encode() if isinstance(message.body, str) else bytes(message.body)


UNDECODABLE: dict[str, tuple[bytes, dict[str, Any]]] = {
    "broken json": (b'{"id": ', {}),
    "too deep": (b'{"id": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", {}),
    "pickle": (b"cos\nsystem\n.", {"content_type": "application/x-python-serialize", "content_encoding": "binary"}),
    "broken compression": (b"not zlib", {"headers": {"compression": "application/x-gzip"}}),
    "unknown encoding": (b"some text", {"content_type": "text/plain", "content_encoding": "no-such-encoding"}),
    "unknown type": (b"{}", {"content_type": "application/x-nobody-knows", "content_encoding": "utf-8"}),
}


@on(*BROKERS)
def test_what_cannot_be_decoded_goes_to_the_dead_letter_as_it_came(broker: Broker) -> None:
    """With `on_decode_error=handler.on_decode_error` kombu's Consumer lives on, and nothing is lost."""
    queue, ran = broker.queue(), []

    @guarded(MemoryStore(), broker.unique)
    def handle(body: Any, message: Message) -> None:
        ran.append(body["id"])

    for body, options in UNDECODABLE.values():
        broker.publish_raw(queue, body, **options)
    broker.publish(queue, {"id": "good"})
    assert consume(broker, queue, handle, lambda: ran == ["good"], timeout=20, on_decode_error=handle.on_decode_error)
    dead = broker.take(broker.dead, len(UNDECODABLE))
    assert sorted(bytes_of(message) for message in dead) == sorted(body for body, _ in UNDECODABLE.values())
    assert {message.headers[DEAD_REASON] for message in dead} == {"invalid"}


@on(*BROKERS)
def test_the_same_biz_id_with_another_body_is_a_conflict(broker: Broker) -> None:
    """I8: another fingerprint is not a duplicate: to the dead letter, visibly, and never run."""
    queue, ran = broker.queue(), []

    @guarded(MemoryStore(), broker.unique)
    def handle(body: Any, message: Message) -> None:
        ran.append(body["sum"])

    for total in (1, 2, 1):
        broker.publish(queue, {"id": "a", "sum": total})
    broker.publish(queue, {"id": "b", "sum": 3})
    assert consume(broker, queue, handle, lambda: ran == [1, 3])
    (dead,) = broker.take(broker.dead)
    assert dead.payload["sum"] == 2
    assert dead.headers[DEAD_REASON] == "conflict"


@on(*BROKERS)
def test_a_store_that_is_down_means_no_run_and_no_ack(broker: Broker) -> None:
    """I9: in doubt nothing runs and nothing is acked; after the store is back all is handled."""
    queue, ran, asked = broker.queue(), [], []
    down = [True]

    class Store(MemoryStore):
        def claim(self, *args: Any) -> Any:
            asked.append(time.monotonic())
            if down[0]:
                raise StoreUnavailable("down")
            return super().claim(*args)

    @guarded(Store(), broker.unique)
    def handle(body: Any, message: Message) -> None:
        ran.append(body["id"])

    broker.publish(queue, {"id": "a"})
    with broker.connect() as connection, Consumer(connection, [queue], callbacks=[handle]):
        assert drain(connection, lambda: len(asked) >= 4, timeout=20)
        assert ran == []
        down[0] = False
        assert drain(connection, lambda: ran == ["a"], timeout=20)
    assert broker.is_empty(queue.name)


@on(*BROKERS)
def test_a_busy_copy_waits_without_an_attempt_while_others_flow(broker: Broker) -> None:
    """I12: somebody else holds it: no run, no ack, no attempt, no tight loop; neighbours are handled meanwhile."""
    queue, ran, claims = broker.queue(), [], []
    store = MemoryStore()

    class Counting(MemoryStore):
        def claim(self, request: Any) -> Any:
            claims.append(request.key)
            return store.claim(request)

        def complete(self, *args: Any, **kwargs: Any) -> bool:
            return store.complete(*args, **kwargs)

    @guarded(Counting(), broker.unique, lease=1.0, max_attempts=1)
    def handle(body: Any, message: Message) -> None:
        ran.append((body["id"], current_execution().attempt))

    from idempotent_bus.identity import fingerprint, record_key
    from idempotent_bus.model import Claimed, ClaimRequest, Hold

    key = record_key(broker.unique, "held")
    nonce = b"somebody else's."
    held = store.claim(ClaimRequest(key, nonce, 60.0, 100.0, fingerprint({"id": "held"})))
    assert isinstance(held, Claimed)
    broker.publish(queue, {"id": "held"})
    for number in range(3):
        broker.publish(queue, {"id": f"n{number}"})
    store.renew(Hold(key, held.token, nonce), lease=2.5, retention=100.0)
    started = time.monotonic()
    with broker.connect() as connection, Consumer(connection, [queue], callbacks=[handle]):
        assert drain(connection, lambda: len(ran) == 3, timeout=20)
        assert time.monotonic() - started < 2.5, "the neighbours had to wait for the holder"
        # The holder gives it back with no attempt counted: had the waiting counted one, max_attempts=1 would bury it.
        store.release(Hold(key, held.token, nonce), attempts=0, retention=100.0)
        assert drain(connection, lambda: len(ran) == 4, timeout=20)
    assert ran[-1] == ("held", 1)
    assert claims.count(key) <= 10
    assert broker.is_empty(queue.name)


@on(*BROKERS)
def test_a_handler_that_acks_is_told_so(broker: Broker) -> None:
    """ack, reject and requeue in a handler raise HandlerAcknowledged; the message goes to the dead letter with that."""
    queue, told = broker.queue(), []

    @guarded(MemoryStore(), broker.unique)
    def handle(body: Any, message: Message) -> None:
        for answer in (message.ack, message.reject, message.requeue):
            try:
                answer()
            except HandlerAcknowledged as error:
                told.append(str(error))
        message.ack_log_error(None, ())

    broker.publish(queue, {"id": "a"})
    assert consume(broker, queue, handle, lambda: len(told) == 3)
    assert "must not ack" in told[0]
    (dead,) = broker.take(broker.dead)
    assert dead.headers[DEAD_REASON] == "permanent"
    assert "HandlerAcknowledged" in dead.headers[DEAD_ERROR]


@on(*BROKERS)
def test_a_consumer_without_acks_is_refused_and_its_message_saved(broker: Broker) -> None:
    """no_ack=True is refused with the reason, and the message that the broker has forgotten is saved."""
    queue, ran = broker.queue(), []

    @guarded(MemoryStore(), broker.unique)
    def handle(body: Any, message: Message) -> None:
        ran.append(body)

    broker.publish(queue, {"id": "a"})
    with pytest.raises(ConfigurationError, match="no_ack=True"):
        consume(broker, queue, handle, lambda: False, no_ack=True)
    assert not ran
    (dead,) = broker.take(broker.dead)
    assert dead.payload == {"id": "a"}
    assert dead.headers[DEAD_REASON] == "no-ack"


@on(*BROKERS)
def test_two_guarded_handlers_on_one_delivery_are_refused(broker: Broker) -> None:
    """The first handler's ack would make the second run on a forgotten message: refused, and saved for the second."""
    queue, ran = broker.queue(), []
    first = guarded(MemoryStore(), broker.unique + ".1")(lambda body, message: ran.append(1))
    second = guarded(MemoryStore(), broker.unique + ".2", dead_letter=broker.dead)(lambda b, m: ran.append(2))
    broker.publish(queue, {"id": "a"})
    with (
        broker.connect() as connection,
        Consumer(connection, [queue], callbacks=[first, second]),
        pytest.raises(ConfigurationError, match="queue of its own"),
    ):
        drain(connection, lambda: False)
    assert ran == [1]
    (dead,) = broker.take(broker.dead)
    assert dead.headers[DEAD_SCOPE] == broker.unique + ".2"


@on(*BROKERS)
def test_two_scopes_each_run_once(broker: Broker) -> None:
    """One publish to two queues, two scopes, one store: each handles it once, and a copy neither."""
    exchange = Exchange(broker.unique, "topic", durable=True)
    cards = broker.queue("cards", exchange, "paid.*")
    mails = broker.queue("mails", exchange, "paid.#")
    store, ran = MemoryStore(), []
    card = guarded(store, broker.unique + ".card")(lambda body, message: ran.append("card"))
    mail = guarded(store, broker.unique + ".mail")(lambda body, message: ran.append("mail"))
    with broker.connect() as connection:
        with IdempotentProducer(connection) as producer:
            for _ in range(2):
                producer.publish({"id": "a"}, exchange=exchange, routing_key="paid.now", declare=[cards, mails])
        acked: list[int] = []

        def count(handler: Any) -> Any:
            return lambda body, message: (handler(body, message), acked.append(1))

        with (
            Consumer(connection, [cards], callbacks=[count(card)]),
            Consumer(connection.channel(), [mails], callbacks=[count(mail)]),
        ):
            assert drain(connection, lambda: len(acked) == 4)
        if broker.is_rabbitmq:
            connection.channel().exchange_delete(exchange.name)
    assert sorted(ran) == ["card", "mail"]


@on(*BROKERS)
def test_one_handler_over_several_queues(broker: Broker) -> None:
    """One guarded handler may serve several queues: one scope, one record, one run."""
    one, two = broker.queue("one"), broker.queue("two")
    ran: list[str] = []
    handle = guarded(MemoryStore(), broker.unique)(lambda body, message: ran.append(body["id"]))
    for queue in (one, two):
        broker.publish(queue, {"id": "same"})
        broker.publish(queue, {"id": queue.name})
    calls: list[int] = []

    def callback(body: Any, message: Message) -> None:
        handle(body, message)
        calls.append(1)

    with broker.connect() as connection, Consumer(connection, [one, two], callbacks=[callback]):
        assert drain(connection, lambda: len(calls) == 4)
    assert sorted(ran) == sorted(["same", one.name, two.name])


@on(*BROKERS)
def test_the_origin_is_the_queue_that_was_consumed(broker: Broker) -> None:
    """The dead letter names the queue, with one consumer over two queues, on the default and on a topic exchange."""
    exchange = Exchange(broker.unique + ".x", "topic", durable=True)
    plain, topic = broker.queue("plain"), broker.queue("topic", exchange, "a.#")
    handle = guarded(MemoryStore(), broker.unique)(lambda body, message: 1 / 0)
    with broker.connect() as connection:
        with IdempotentProducer(connection) as producer:
            producer.publish({"no": "id", "q": plain.name}, routing_key=plain.name, declare=[plain])
            producer.publish({"no": "id", "q": topic.name}, exchange=exchange, routing_key="a.b", declare=[topic])
        seen: list[Any] = []

        def callback(body: Any, message: Message) -> None:
            handle(body, message)
            seen.append(body)

        with Consumer(connection, [plain, topic], callbacks=[callback]):
            assert drain(connection, lambda: len(seen) == 2)
        if broker.is_rabbitmq:
            connection.channel().exchange_delete(exchange.name)
    dead = broker.take(broker.dead, 2)
    assert {message.payload["q"]: message.headers[ORIGIN_QUEUE] for message in dead} == {
        plain.name: plain.name,
        topic.name: topic.name,
    }


@on("memory", "rabbitmq-classic", "ours-sqlite")
@pytest.mark.parametrize("when", ["inside", "after", "never"])
def test_manual_completion(broker: Broker, when: str) -> None:
    """manual=True: returning is not success. Acked after `complete`, inside the handler or later; never without it."""
    queue, log, executions = broker.queue(), Log(), []

    @guarded(MemoryStore(), broker.unique, manual=True, step=log)
    def handle(body: Any, message: Message) -> str:
        execution = current_execution()
        executions.append(execution)
        if when == "inside":
            execution.complete("done")
            execution.complete("again")  # answers as the first did
        return "not a result"

    broker.publish(queue, {"id": "a"})
    with broker.connect() as connection, Consumer(connection, [queue], callbacks=[handle]):
        assert drain(connection, lambda: bool(executions))
        if when == "after":
            assert log.order("complete", "ack") == []
            executions[0].complete("done")
    assert log.order("complete", "ack") == ([] if when == "never" else ["complete", "ack"])
    if broker.name != "memory":  # kombu's memory transport forgets unacked messages when its channel closes
        assert broker.is_empty(queue.name) is (when != "never")


@on("memory", "rabbitmq-classic", "ours-sqlite", "redis")
def test_in_a_consumer_mixin(broker: Broker) -> None:
    """Guarded methods work in kombu's ConsumerMixin, each instance with its own self."""
    queue = broker.queue()
    store = MemoryStore()

    class Worker(ConsumerMixin):
        def __init__(self, connection: Connection) -> None:
            self.connection = connection
            self.cards: list[str] = []

        def get_consumers(self, consumer_class: Any, channel: Any) -> list[Any]:
            return [consumer_class([queue], callbacks=[self.issue])]

        @guarded(store, broker.unique)
        def issue(self, body: Any, message: Message) -> None:
            self.cards.append(body["id"])
            self.should_stop = len(self.cards) == 2

    for biz_id in ("a", "a", "b"):
        broker.publish(queue, {"id": biz_id})
    with broker.connect() as connection:
        worker = Worker(connection)
        worker.run()
    assert worker.cards == ["a", "b"]
    assert broker.is_empty(queue.name)


@on(*RABBITMQ, *OURS, "redis", "memory")
def test_a_pooled_connection_serves_as_well(broker: Broker) -> None:
    """A consumer on a connection out of kombu's pool can put off and dead-letter: nothing clones that connection."""
    queue, runs = broker.queue(), []

    @guarded(MemoryStore(), broker.unique, max_attempts=2)
    def handle(body: Any, message: Message) -> None:
        runs.append(1)
        raise ValueError("never")

    broker.publish(queue, {"id": "a"})
    found: list[Message] = []
    pool = broker.connect().Pool(2)
    with pool.acquire(block=True) as connection, Consumer(connection, [queue], callbacks=[handle]):
        assert drain(connection, lambda: len(runs) == 2, timeout=20)
        found += broker.take(broker.dead)
    pool.force_close_all()
    assert len(found) == 1


@on(*OURS)
def test_a_message_that_dies_again_is_in_the_dead_letter_again(broker: Broker) -> None:
    """I1: moved back from the dead letter it still has its inner-msg-id: the edge must not swallow its second death."""
    queue, runs = broker.queue(), []

    @guarded(MemoryStore(), broker.unique)
    def handle(body: Any, message: Message) -> None:
        runs.append(1)
        raise Permanent("no")

    inner = broker.publish(queue, {"id": "a"})
    for round_ in (1, 2):
        assert consume(broker, queue, handle, lambda: len(runs) == round_)  # noqa: B023 - called before it changes
        (dead,) = broker.take(broker.dead)
        assert dead.headers[INNER_MSG_ID] == inner
        if round_ == 1:
            with broker.connect() as connection:  # as a redrive does: past the edge's mark
                channel = connection.channel()
                payload = channel.prepare_message(
                    dead.body, 0, dead.content_type, dead.content_encoding, dead.headers, {}
                )
                channel._inplace_augment_message(payload, "", queue.name)
                channel._put(queue.name, payload)


def test_undecodable_without_on_decode_error_stays_with_the_broker(unique: str, tmp_path: Any) -> None:
    """Without on_decode_error kombu itself raises before any callback; the message stays unacked with the broker."""
    made = make_broker("ours-sqlite", unique, tmp_path)
    queue = made.queue()
    handle = guarded(MemoryStore(), unique)(lambda body, message: None)
    made.publish_raw(queue, b"{")
    with pytest.raises(Exception, match=r"Expecting|property"):
        consume(made, queue, handle, lambda: False)
    assert len(made.take(queue.name)) == 1


def test_a_queue_object_declared_elsewhere_is_left_alone() -> None:
    """The decorator touches neither the queue nor the connection that the user made."""
    queue = Queue("q", Exchange("x"), routing_key="k")
    before = queue.as_dict(recurse=True)
    guarded(MemoryStore(), "s")(lambda body, message: None)
    assert queue.as_dict(recurse=True) == before
