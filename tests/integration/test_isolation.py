"""Who may suppress whom: tenants, signatures and the limit of a body, over every broker (I14)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from kombu import Queue
from kombu.message import Message
from kombu.serialization import register, unregister

from consumer_rig import BROKERS, OURS, Broker, broker_of, consume, on
from idempotent_bus import (
    INNER_MSG_ID,
    Backoff,
    Ended,
    IdempotentConsumer,
    IdempotentProducer,
    Inbox,
    Signer,
    Trust,
    current_execution,
    idempotent_consumer,
    transactional_consumer,
)
from idempotent_bus.headers import DEAD_REASON, SIGNATURE
from idempotent_bus.headers import INNER_MSG_ID as ID_HEADER
from idempotent_bus.identity import record_key
from idempotent_bus.model import Landing, State
from idempotent_bus.redrive import redrive
from idempotent_bus.stores.memory import MemoryStore

SHOP, OTHER = Signer("shop", b"a secret of the shop's only"), Signer("other", b"the other one's own secret")
FORGER = Signer("shop", b"what the forger believes it is")
TRUST = Trust({"shop": b"a secret of the shop's only", "other": [b"the other one's own secret"]})
SEPARATE = Trust({"shop": b"a secret of the shop's only", "other": b"the other one's own secret"}, separate=True)


@pytest.fixture
def broker(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Broker]:
    yield from broker_of(request, unique, tmp_path)


class Till:
    """A guarded handler with its queue and its store; what it ran."""

    def __init__(self, broker: Broker, **options: Any) -> None:
        self.broker = broker
        self.queue: Queue = options.pop("queue", None) or broker.queue()
        self.store: MemoryStore = options.pop("store", None) or MemoryStore()
        self.ran: list[Any] = []
        self.failing = 0  # attempts of each message
        settings = {"scope": "tills", "biz_id": "id", "dead_letter": broker.dead, "backoff": Backoff(0.1, 0.1)}
        self.handle = idempotent_consumer(self.store, **{**settings, **options})(self.work)

    def work(self, body: Any, message: Message) -> None:
        if current_execution().attempt <= self.failing:
            raise RuntimeError("not yet")
        self.ran.append(body)

    def run(self, idle: float = 1.5) -> dict[Ended, int]:
        consumer = IdempotentConsumer(self.broker.connect(), {self.queue: self.handle})
        consumer.run(idle_timeout=idle)
        return dict(consumer.endings)

    def publish(self, body: Any, signer: Signer | None = SHOP, **options: Any) -> Any:
        with IdempotentProducer(self.broker.connect(), signer=signer) as producer:
            return producer.publish(body, routing_key=self.queue.name, declare=[self.queue], **options)

    def reasons(self, count: int) -> list[str]:
        """Why the dead are dead."""
        found = [str(message.headers[DEAD_REASON]) for message in self.broker.take(self.broker.dead, count)]
        assert self.broker.is_empty(self.broker.dead)
        return found


# --- tenants ----------------------------------------------------------------------------------------------


@on("memory")
def test_tenants_do_not_meet(broker: Broker) -> None:
    """I14: two tenants with one store, scope and id have a run each; the copies of one tenant have one."""
    store, ran = MemoryStore(), {}
    for number, tenant in enumerate(("", "north", "south", "north")):
        till = Till(broker, queue=broker.queue(f"q{number}"), store=store, tenant=tenant)
        till.publish({"id": "p-1"})
        till.run(idle=0.3)
        ran[number] = len(till.ran)
    assert ran == {0: 1, 1: 1, 2: 1, 3: 0}
    keys = {record_key("tills", "p-1", tenant=tenant) for tenant in ("", "north", "south")}
    assert set(store._entries) == keys


@on("memory")
def test_tenants_do_not_meet_in_the_inbox(broker: Broker, tmp_path: Path) -> None:
    """I14: the same for the transactional consumer; what a message says of a tenant is no matter."""
    engine = sa.create_engine(f"sqlite:///{tmp_path}/inbox.db")
    inbox = Inbox(engine)
    ran: list[str] = []
    for number, tenant in enumerate(("north", "south", "north")):
        queue = broker.queue(f"q{number}")

        @transactional_consumer(inbox, scope="tills", biz_id="id", tenant=tenant, trust=TRUST)
        def handle(body: Any, message: Message, connection: Any, tenant: str = tenant) -> None:
            ran.append(tenant)

        with IdempotentProducer(broker.connect(), signer=SHOP) as producer:
            producer.publish({"id": "p-1", "tenant": "east"}, routing_key=queue.name, declare=[queue])
        IdempotentConsumer(broker.connect(), {queue: handle}).run(idle_timeout=0.3)
    assert ran == ["north", "south"]
    engine.dispose()


# --- signatures ---------------------------------------------------------------------------------------------

BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "json": ({"id": "p-1", "name": "\u00e9\u4e2d"}, {}),
    "json compressed": ({"id": "p-1", "name": "\u00e9\u4e2d" * 99}, {"compression": "gzip"}),
    "text": ("\u00e9\u4e2d plain", {}),
    "text compressed": ("\u00e9\u4e2d plain" * 99, {"compression": "bzip2"}),
    "bytes": (b"\0\xff\xfe raw", {}),
    "bytes compressed": (b"\0\xff\xfe raw" * 99, {"compression": "lzma"}),
    "empty": (b"", {}),
    "latin-1": ("caf\u00e9", {"content_type": "text/plain", "content_encoding": "latin-1"}),
    "utf-16": ("caf\u00e9", {"content_type": "text/plain", "content_encoding": "utf-16"}),
    "ready-made json": ('{"id": "\u00e9"}', {"content_type": "application/json"}),
}


@on(*BROKERS)
def test_what_is_signed_runs_however_it_is_written(broker: Broker) -> None:
    """I14: bytes, text, JSON, with compression and without, verify over every broker and are run, none is dead."""
    till = Till(broker, biz_id=INNER_MSG_ID, fingerprint=False, trust=TRUST)
    for body, options in BODIES.values():
        till.publish(body, **options)
    assert till.run() == {Ended.COMPLETED: len(BODIES)}
    expected = [
        json.loads(body) if "json" in str(options.get("content_type")) else body for body, options in BODIES.values()
    ]
    # An empty body comes as py-amqp's text or as kombu's bytes.
    assert sorted(repr(body) for body in till.ran if body) == sorted(repr(body) for body in expected if body)


@on(*BROKERS)
def test_what_is_not_signed_does_not_run(broker: Broker) -> None:
    """I14: unsigned, wrongly signed, altered: to the dead letter as untrusted, and no record is touched.

    The control: the same messages run where there is no trust.
    """
    till = Till(broker, trust=TRUST)
    for number, signer in enumerate((None, FORGER, Signer("stranger", b"a key that nobody here has"))):
        till.publish({"id": f"p-{number}"}, signer)
    till.publish({"id": "p-3"}, None, headers={**_signature(till), SIGNATURE: "1." + "0" * 64})
    assert till.run() == {Ended.DEAD: 4}
    assert till.ran == []
    assert till.store._entries == {}
    assert till.reasons(4) == ["untrusted"] * 4

    control = Till(broker, queue=broker.queue("control"))
    for number, signer in enumerate((None, FORGER)):
        control.publish({"id": f"p-{number}"}, signer)
    assert control.run() == {Ended.COMPLETED: 2}


def _signature(till: Till) -> dict[str, str]:
    return SHOP.headers("017f22e2-79b0-7cc3-98c4-dc0c0c07398f", b"{}", "application/json", "utf-8")


@on("memory", "rabbitmq-classic", *OURS)
def test_a_bare_callback_trusts_nobody_else_either(broker: Broker) -> None:
    """I14: the same path for a kombu callback."""
    till = Till(broker, trust=TRUST)
    till.publish({"id": "forged"}, FORGER)
    till.publish({"id": "real"})
    assert consume(broker, till.queue, till.handle, lambda: len(till.ran) == 1)
    assert till.ran == [{"id": "real"}]
    assert till.reasons(1) == ["untrusted"]


@on(*BROKERS)
def test_it_still_verifies_after_waiting_and_after_the_dead_letter(broker: Broker) -> None:
    """I14: in a delay queue, parked, dead, and redriven, the id, the body and the signature stay what they were."""
    till = Till(broker, trust=TRUST, max_attempts=3)
    till.failing = 2
    for number, options in enumerate(({}, {"compression": "gzip"})):
        till.publish({"id": f"p-{number}", "name": "\u00e9" * 99}, **options)
    endings = till.run(idle=2.5)
    assert endings == {Ended.FAILED: 4, Ended.COMPLETED: 2}

    till.failing = 3
    till.publish({"id": "p-2", "name": "\u00e9" * 99}, compression="gzip")
    assert till.run(idle=2.5) == {Ended.FAILED: 2, Ended.DEAD: 1}
    till.failing = 0
    assert redrive(broker.connect(), broker.dead, store=till.store).moved == 1
    assert till.run() == {Ended.COMPLETED: 1}
    assert sorted(body["id"] for body in till.ran) == ["p-0", "p-1", "p-2"]


def _suppression(broker: Broker, trust: Trust | None, forged: Signer, fingerprint: bool) -> list[Any]:
    """A message that was sent ahead, under the id of one that is yet to come. What ran?"""
    till = Till(broker, biz_id=INNER_MSG_ID, fingerprint=fingerprint, trust=trust)
    other = broker.queue("other")
    with IdempotentProducer(broker.connect(), signer=SHOP) as producer:
        real = producer.publish({"pay": "card"}, routing_key=other.name, declare=[other])
    (kept,) = broker.take(other.name)
    # Below our producer, past every edge, as somebody with a client of his own would.
    headers = {ID_HEADER: real.inner_msg_id, **_headers_of(forged, real.inner_msg_id, b'{"pay": "forger"}')}
    _put(broker, till.queue, b'{"pay": "forger"}', headers)
    till.run()
    _put(broker, till.queue, b'{"pay": "card"}', dict(kept.headers))
    till.run()
    return till.ran


def _headers_of(signer: Signer, inner_msg_id: str, body: bytes) -> dict[str, str]:
    return signer.headers(inner_msg_id, body, "application/json", "utf-8")


def _put(broker: Broker, queue: Queue, body: bytes, headers: dict[str, Any]) -> None:
    with broker.connect() as connection:
        channel = connection.channel()
        queue(channel).declare()
        message = channel.prepare_message(body, None, "application/json", "utf-8", headers, {"delivery_mode": 2})
        if broker.name in OURS:
            channel._inplace_augment_message(message, "", queue.name)
            channel._put(queue.name, message)
        else:
            channel.basic_publish(message, exchange="", routing_key=queue.name)


@on(*BROKERS)
@pytest.mark.parametrize("fingerprint", [True, False], ids=["fingerprint", "no fingerprint"])
def test_a_forged_id_suppresses_nobody(broker: Broker, fingerprint: bool) -> None:
    """I14: with trust a forged message under somebody's inner-msg-id is dead, and the real one runs when it comes."""
    assert _suppression(broker, TRUST, FORGER, fingerprint) == [{"pay": "card"}]


@on("memory", "rabbitmq-classic")
@pytest.mark.parametrize("fingerprint", [True, False], ids=["fingerprint", "no fingerprint"])
def test_without_trust_a_forged_id_does(broker: Broker, fingerprint: bool) -> None:
    """The control: the forged one runs, and the real one is taken for its copy, or for a conflict with it."""
    assert _suppression(broker, None, FORGER, fingerprint) == [{"pay": "forger"}]


@on("memory")
@pytest.mark.parametrize(
    ("trust", "ran"),
    [(TRUST, [{"pay": "forger"}]), (SEPARATE, [{"pay": "forger"}, {"pay": "card"}])],
    ids=["together", "separate"],
)
def test_one_trusted_producer_and_anothers_ids(broker: Broker, trust: Trust, ran: list[Any]) -> None:
    """I14: producers trusted together share their ids, as they must to dedupe one fact; separate ones do not."""
    assert _suppression(broker, trust, OTHER, False) == ran


@on("memory")
def test_separate_producers_have_records_of_their_own(broker: Broker) -> None:
    """I14: the producer's name, which its signature proves, is a part of the key."""
    till = Till(broker, trust=SEPARATE, tenant="north")
    for signer in (SHOP, OTHER, SHOP, OTHER):
        till.publish({"id": "p-1"}, signer)
    assert till.run(idle=0.3) == {Ended.COMPLETED: 2, Ended.REPLAYED: 2}
    assert set(till.store._entries) == {
        record_key("tills", "p-1", tenant="north", producer=name) for name in ("shop", "other")
    }


@on(*OURS)
def test_what_a_signature_cannot_do(broker: Broker) -> None:
    """As is written down: who may publish at an edge that clients run can mark an id, and the real one is refused.

    The sender learns of it: the receipt of a message that was not sent before says duplicate.
    """
    till = Till(broker, biz_id=INNER_MSG_ID, trust=TRUST)
    other = broker.queue("other")
    with IdempotentProducer(broker.connect(), signer=SHOP) as producer:
        stolen = producer.publish({"pay": "card"}, routing_key=other.name, declare=[other]).inner_msg_id
    till.publish({"pay": "forger"}, FORGER, inner_msg_id=stolen)
    assert till.publish({"pay": "card"}, inner_msg_id=stolen).landing is Landing.DUPLICATE
    assert till.run() == {Ended.DEAD: 1}


# --- large bodies ---------------------------------------------------------------------------------------------


@pytest.fixture
def decoded() -> Iterator[list[int]]:
    """Counts what is decoded of a content type of its own."""
    lengths: list[int] = []

    def decode(data: Any) -> Any:
        lengths.append(len(data))
        return json.loads(data)

    register("counted", json.dumps, decode, content_type="application/x-counted", content_encoding="utf-8")
    yield lengths
    unregister("counted")


@on(*BROKERS)
def test_a_large_body_is_not_even_decoded(broker: Broker, decoded: list[int]) -> None:
    """A body of more than max_body bytes goes to the dead letter, undecoded and not run; one byte less runs."""
    head, tail = '{"id": "', '", "x": "\u00e9\u00e9"}'
    bodies = [head + "x" * (size - len((head + tail).encode())) + tail for size in (300, 301, 5000)]
    assert [len(body.encode()) for body in bodies] == [300, 301, 5000]
    till = Till(broker, max_body=300)
    for body in bodies:
        till.publish(body, content_type="application/x-counted")
    till.publish(bodies[1] * 9, content_type="application/x-counted", compression="gzip")
    consumer = IdempotentConsumer(broker.connect(), {till.queue: till.handle}, accept=["application/x-counted"])
    consumer.run(idle_timeout=1.5)
    assert dict(consumer.endings) == {Ended.COMPLETED: 1, Ended.DEAD: 3}
    assert len(till.ran) == len(decoded) == 1
    dead = broker.take(broker.dead, 3)
    assert {str(message.headers[DEAD_REASON]) for message in dead} == {"invalid"}
    assert all("too large" in message.headers["idempotent-bus-dead-error"] for message in dead)


@on("memory", "rabbitmq-classic")
def test_a_large_body_in_a_bare_callback(broker: Broker) -> None:
    """There kombu has decoded it before, but it is not run; without a limit it is."""
    till = Till(broker, max_body=100)
    till.publish({"id": "large", "x": "x" * 100})
    till.publish({"id": "small"})
    assert consume(broker, till.queue, till.handle, lambda: len(till.ran) == 1)
    assert till.reasons(1) == ["invalid"]
    unlimited = Till(broker, max_body=None)
    unlimited.publish({"id": "large", "x": "x" * 20_000_000})
    assert consume(broker, unlimited.queue, unlimited.handle, lambda: len(unlimited.ran) == 1)
    assert {entry.state for entry in till.store._entries.values()} == {State.COMPLETED}
