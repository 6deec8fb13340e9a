"""What a publish derives or signs before it is sent: `once=` inside an execution, the signer's headers."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection, Queue

from idempotent_bus import producer as producer_module
from idempotent_bus.errors import ConfigurationError, InvalidBody, NoExecution
from idempotent_bus.execution import Execution, running
from idempotent_bus.headers import INNER_MSG_ID, PRODUCER, SIGNATURE
from idempotent_bus.identity import record_key
from idempotent_bus.model import Edge, Landing
from idempotent_bus.msgid import derived_inner_msg_id, is_inner_msg_id, published_at, published_at_of
from idempotent_bus.producer import IdempotentProducer, PublishManyError, idempotent_producer
from idempotent_bus.sending.lane import Lane
from idempotent_bus.sending.outgoing import Outgoing
from idempotent_bus.signing import Signer, Trust
from idempotent_bus.work import Work

KEY = record_key("cards.issue", "p-1")
SECRET = bytes(range(32))
TRUST = Trust({"shop": SECRET})


class EdgeLikeLane(Lane):
    """Refuses an id that it has seen before."""

    edge = Edge.BROKER

    def __init__(self) -> None:
        super().__init__(Connection("memory://"), None, timeout=5.0, clock=lambda: 0.0)
        self.sent: list[Outgoing] = []

    def open(self) -> None: ...

    def declare(self, entities: Any) -> None: ...

    def _prepare_channel(self) -> None: ...

    def _deliver(self, outgoing: Outgoing) -> Landing:
        known = any(outgoing.inner_msg_id == earlier.inner_msg_id for earlier in self.sent)
        self.sent.append(outgoing)
        return Landing.DUPLICATE if known else Landing.LANDED


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> EdgeLikeLane:
    lane = EdgeLikeLane()
    monkeypatch.setattr(producer_module, "make_lane", lambda *_, **__: lane)
    return lane


@pytest.fixture
def producer(lane: EdgeLikeLane) -> IdempotentProducer:
    return IdempotentProducer("memory://", routing_key="q")


class Runs:
    """Starts one execution after another of the same record, as reruns are."""

    def __init__(self) -> None:
        self._tokens: list[Any] = []

    def start(self, key: bytes = KEY) -> Execution:
        work = Work(scope="cards.issue", biz_id="p-1", key=key, run=lambda: None, settle=None)  # type: ignore[arg-type]
        execution = Execution(work, 1)
        self._tokens.append(running.set(execution))
        return execution

    def end(self) -> None:
        running.reset(self._tokens.pop())


@pytest.fixture
def runs() -> Iterator[Runs]:
    runs = Runs()
    yield runs
    while runs._tokens:
        runs.end()


def test_a_rerun_publishes_the_very_same_message(producer: Any, lane: EdgeLikeLane, runs: Runs) -> None:
    """I2: `once=` gives each run of one record the same id, so that the edge takes the first and refuses the second."""
    runs.start()
    first = producer.publish({"a": 1}, once="receipt")
    runs.end()
    runs.start()
    second = producer.publish({"a": 1}, once="receipt")
    assert first.inner_msg_id == second.inner_msg_id == derived_inner_msg_id(KEY, "receipt")
    assert (first.landing, second.landing) == (Landing.LANDED, Landing.DUPLICATE)
    assert lane.sent[0].headers[INNER_MSG_ID] == first.inner_msg_id


def test_without_once_a_rerun_publishes_another_message(producer: Any, runs: Runs) -> None:
    """The control: fresh ids land twice, also inside an execution."""
    receipts = []
    for _ in range(2):
        runs.start()
        receipts.append(producer.publish({"a": 1}))
        runs.end()
    assert [receipt.landing for receipt in receipts] == [Landing.LANDED, Landing.LANDED]
    assert receipts[0].inner_msg_id != receipts[1].inner_msg_id


def test_other_names_and_other_records_are_other_messages(producer: Any, runs: Runs) -> None:
    """I10: two names in one execution, and the same name in two, are told apart."""
    ids = set()
    for key in (KEY, record_key("cards.issue", "p-2"), record_key("cards.issue", "p-1", tenant="t")):
        runs.start(key)
        ids |= {producer.publish({}, once=name).inner_msg_id for name in ("receipt", "receipt ", "mail")}
        runs.end()
    assert len(ids) == 9
    assert all(is_inner_msg_id(one) for one in ids)


def test_the_same_name_twice_in_one_execution_is_refused(producer: Any, lane: EdgeLikeLane, runs: Runs) -> None:
    """The second message of that name would be taken for the first, and be lost: an error, before it is sent."""
    runs.start()
    producer.publish({"n": 1}, once="receipt")
    with pytest.raises(ConfigurationError, match="twice"):
        producer.publish({"n": 2}, once="receipt")
    with pytest.raises(PublishManyError) as caught:
        producer.publish_many([({"n": 3}, {"once": "mail"}), ({"n": 4}, {"once": "mail"})])
    assert isinstance(caught.value.__cause__, ConfigurationError)
    assert len(lane.sent) == 2


def test_publish_many_takes_a_name_for_each(producer: Any, runs: Runs) -> None:
    """A name among a message's own keywords; the others get fresh ids."""
    receipts = []
    for _ in range(2):
        runs.start()
        receipts.append(producer.publish_many([({}, {"once": "receipt"}), ({}, {"once": "mail"}), {}]))
        runs.end()
    assert [receipt.landing for receipt in receipts[0]] == [Landing.LANDED] * 3
    assert [receipt.landing for receipt in receipts[1]] == [Landing.DUPLICATE, Landing.DUPLICATE, Landing.LANDED]


def test_outside_an_execution_there_is_nothing_to_derive_from(producer: Any, lane: EdgeLikeLane) -> None:
    """NoExecution, before anything is sent."""
    with pytest.raises(NoExecution):
        producer.publish({}, once="receipt")
    assert lane.sent == []


@pytest.mark.parametrize("once", ["", 5, b"receipt", True])
def test_names_that_are_none(once: Any, producer: Any, lane: EdgeLikeLane, runs: Runs) -> None:
    """A name is a text."""
    runs.start()
    with pytest.raises(ConfigurationError, match="once"):
        producer.publish({}, once=once)
    assert lane.sent == []


def test_once_and_an_id_contradict_each_other(producer: Any, lane: EdgeLikeLane, runs: Runs) -> None:
    """Either names the message: with both it would be unclear which."""
    execution = runs.start()
    with pytest.raises(ConfigurationError, match="not both"):
        producer.publish({}, once="receipt", inner_msg_id=derived_inner_msg_id(KEY, "mail"))
    assert lane.sent == []
    assert execution.derived_id("receipt")  # the refused publish did not use the name up


def test_another_thread_publishes_with_the_executions_id(producer: Any, lane: EdgeLikeLane, runs: Runs) -> None:
    """A callback's thread has no current execution: it is told what to do, and the id that it asks for is the same."""
    execution, told, receipts = runs.start(), [], []

    def callback() -> None:
        with pytest.raises(NoExecution, match="derived_id") as caught:
            producer.publish({}, once="receipt")
        told.append(caught.value)
        receipts.append(producer.publish({}, inner_msg_id=execution.derived_id("receipt")))

    thread = threading.Thread(target=callback)
    thread.start()
    thread.join()
    assert len(told) == 1
    assert receipts[0].inner_msg_id == derived_inner_msg_id(KEY, "receipt")
    assert type(lane.sent[0].properties.get("timestamp")) is int, "so that its age is known all the same"
    with pytest.raises(ConfigurationError, match="twice"):
        producer.publish({}, once="receipt")


def test_two_threads_do_not_get_one_name(runs: Runs) -> None:
    """I1: of threads that ask for one name at once exactly one gets its id; a second message of it would be refused."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(200):
            execution, barrier, got = runs.start(), threading.Barrier(3), []

            def ask(execution: Execution = execution, barrier: Any = barrier, got: list[str] = got) -> None:
                barrier.wait()
                with contextlib.suppress(ConfigurationError):
                    got.append(execution.derived_id("receipt"))

            threads = [threading.Thread(target=ask) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(got) == 1
    finally:
        sys.setswitchinterval(interval)


def test_a_derived_id_tells_no_time_so_the_message_does(producer: Any, lane: EdgeLikeLane, runs: Runs) -> None:
    """The property `timestamp` says when it was published; one that the caller gave stays."""
    runs.start()
    before = int(time.time())
    producer.publish({}, once="receipt")
    producer.publish({}, once="mail", timestamp=1645557742)
    producer.publish({})
    stamps = [outgoing.properties.get("timestamp") for outgoing in lane.sent]
    assert before <= stamps[0] <= time.time()
    assert type(stamps[0]) is int
    assert stamps[1:] == [1645557742, None]
    assert published_at(lane.sent[0].inner_msg_id) is None
    assert published_at_of(lane.sent[0].inner_msg_id, stamps[0]) == stamps[0]


# --- signing ------------------------------------------------------------------------------------------


def _verifies(outgoing: Outgoing) -> str:
    return TRUST.verify(outgoing.headers, outgoing.body, outgoing.content_type, outgoing.content_encoding)


def test_every_publish_is_signed(lane: EdgeLikeLane, runs: Runs) -> None:
    """publish, publish_many, once, and a decorated function: all of them stamp what a trusting consumer asks for."""
    signer = Signer("shop", SECRET)
    producer = IdempotentProducer("memory://", routing_key="q", signer=signer)
    runs.start()
    producer.publish({"n": 1})
    producer.publish({"n": 1}, once="receipt")
    producer.publish_many([{"n": 2}, ("text", {"once": "mail"}), b"\0\xff"])
    idempotent_producer("memory://", routing_key="q", signer=signer)(lambda: {"n": 3})()
    idempotent_producer(producer, routing_key="q")(lambda: {"n": 4})()
    assert [_verifies(outgoing) for outgoing in lane.sent] == ["shop"] * 7
    assert len({outgoing.headers[SIGNATURE] for outgoing in lane.sent}) == 7


def test_without_a_signer_nothing_is_signed(producer: Any, lane: EdgeLikeLane) -> None:
    """The control of the test above."""
    producer.publish({"n": 1})
    assert not {PRODUCER, SIGNATURE} & set(lane.sent[0].headers)


def test_what_is_signed_is_the_body_before_compression(lane: EdgeLikeLane) -> None:
    """kombu's consumer sees the decompressed body, and that is what verifies."""
    producer = IdempotentProducer("memory://", routing_key="q", signer=Signer("shop", SECRET))
    producer.publish({"n": 1}, compression="gzip")
    sent = lane.sent[0]
    assert sent.headers["compression"] == "application/x-gzip"
    assert TRUST.verify(sent.headers, b'{"n": 1}', sent.content_type, sent.content_encoding) == "shop"


def test_a_signature_that_came_with_copied_headers_is_replaced(lane: EdgeLikeLane) -> None:
    """Headers copied from another message bring its signature, which is not this one's."""
    producer = IdempotentProducer("memory://", routing_key="q", signer=Signer("shop", SECRET))
    producer.publish({"n": 1})
    producer.publish({"n": 2}, headers=lane.sent[0].headers)
    assert _verifies(lane.sent[1]) == "shop"


def test_a_forwarded_message_keeps_its_signature(lane: EdgeLikeLane) -> None:
    """Moving a message, as into a delay queue or the dead letter, is not publishing it: neither signed nor unsigned."""
    producer = IdempotentProducer("memory://", routing_key="q", signer=Signer("shop", SECRET))
    producer.publish({"n": 1})
    mover = IdempotentProducer("memory://", signer=Signer("mover", SECRET))
    sent = lane.sent[0]
    headers = dict(sent.headers)
    mover.forward(
        sent.body.encode(), queue=Queue("q"), headers=headers, content_type="application/json", content_encoding="utf-8"
    )
    mover.forward(b"x", queue=Queue("q"), headers={}, content_type="text/plain", content_encoding="utf-8")
    assert lane.sent[1].headers == headers
    assert _verifies(lane.sent[1]) == "shop"
    assert lane.sent[2].headers == {}


def test_a_signer_must_be_one(lane: EdgeLikeLane) -> None:
    """A key in its place is found when the producer is made."""
    with pytest.raises(ConfigurationError, match="Signer"):
        IdempotentProducer("memory://", signer=SECRET)  # type: ignore[arg-type]


# --- bodies and options that cannot be sent ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ("\ud800", {}),
        ("\ud800", {"content_type": "text/plain"}),
        ("\u00e9", {"content_type": "text/plain", "content_encoding": "ascii"}),
        ("a", {"content_type": "text/plain", "content_encoding": "no-such"}),
        ("\ud800", {"content_type": "text/plain", "content_encoding": "binary"}),
        ({"a": object()}, {}),
        ({"a": {1, 2}}, {}),
    ],
)
@pytest.mark.parametrize("signer", [None, Signer("shop", SECRET)], ids=["unsigned", "signed"])
def test_a_body_that_is_no_text_is_refused_before_it_is_sent(
    body: Any, options: dict[str, Any], signer: Any, lane: EdgeLikeLane
) -> None:
    """InvalidBody, whatever the codec raises, and nothing is sent."""
    with pytest.raises(InvalidBody):
        IdempotentProducer("memory://", routing_key="q", signer=signer).publish(body, **options)
    assert lane.sent == []


def test_an_unknown_compression_is_refused(producer: Any, lane: EdgeLikeLane) -> None:
    """It is a matter of settings: the error names it."""
    with pytest.raises(ConfigurationError, match="no-such"):
        producer.publish({}, compression="no-such")
    assert lane.sent == []
