"""The small decisions of settling: where a message came from, what is sent on of it, how long it waits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from kombu.compression import compress
from kombu.message import Message

from idempotent_bus import HandlerAcknowledged
from idempotent_bus import settlement as settling
from idempotent_bus.delays import delay_for, delay_name, entities, return_queue
from idempotent_bus.errors import ConfigurationError, PublishUnknown
from idempotent_bus.headers import DEAD_ERROR, DEAD_FINGERPRINT, DEAD_REASON, DEAD_RECORD, ORIGIN_QUEUE
from idempotent_bus.kombu_message import (
    Content,
    came_back,
    content_of,
    forbid_acks,
    headers_of,
    origin_queue,
    redrives,
    was_fetched_without_ack,
)
from idempotent_bus.model import Reason
from idempotent_bus.moving import _merged
from idempotent_bus.settlement import MessageSettlement


class Channel:
    """As much of an AMQP channel as settling looks at."""

    no_ack_consumers: Any = None

    def __init__(self, driver: str = "amqp") -> None:
        self.done: list[tuple[Any, ...]] = []
        self.no_ack_consumers = set()
        self.callbacks: dict[str, Any] = {}
        transport = SimpleNamespace(driver_type=driver)
        self.connection = SimpleNamespace(client=SimpleNamespace(transport=transport, connection_errors=(KeyError,)))

    def basic_ack(self, tag: Any, multiple: bool = False) -> None:
        self.done.append(("ack", tag, multiple))

    def basic_reject(self, tag: Any, requeue: bool = False) -> None:
        self.done.append(("reject", tag, requeue))


def message(channel: Any = None, **values: Any) -> Message:
    return Message(**{"body": b"{}", "delivery_tag": 7, "channel": channel or Channel(), **values})


def settlement(of: Message, **values: Any) -> MessageSettlement:
    return MessageSettlement(of, **{"queue": None, "scope": "s", "dead_letter": "s.dead", **values})


@pytest.mark.parametrize(
    ("seconds", "milliseconds"), [(0.0, 250), (0.25, 250), (0.26, 500), (1.0, 1000), (1.001, 2000), (300.0, 512_000)]
)
def test_a_delay_queue_waits_at_least_as_long(seconds: float, milliseconds: int) -> None:
    """Powers of two from a quarter of a second: never shorter than asked, less than twice as long, few queues."""
    assert delay_for(seconds) == milliseconds
    assert delay_name(seconds) == f"idempotent-bus.wait.{milliseconds}"
    delay = entities("q", seconds)[-1]
    assert delay.name == delay.exchange.name == delay_name(seconds)
    assert delay.exchange.type == "fanout"
    assert delay.queue_arguments["x-message-ttl"] == milliseconds
    assert "x-dead-letter-routing-key" not in delay.queue_arguments, "the message's own says where it goes back to"


def test_what_waits_returns_through_a_queue_of_its_own() -> None:
    """I13: `<queue>.back` hands on at once and takes everything, so that no other queue's messages wait behind it."""
    back = return_queue("q")
    assert (back.name, back.routing_key, back.exchange.name) == ("q.back", "q", "idempotent-bus.back")
    assert back.queue_arguments["x-message-ttl"] == 0
    assert back.queue_arguments["x-dead-letter-routing-key"] == "q"
    stranded, *rest = entities("q", 1.0)
    assert back.exchange.arguments == {"alternate-exchange": stranded.exchange.name}
    for queue in rest:
        assert queue.durable
        assert queue.exchange.durable
        assert queue.queue_arguments["x-dead-letter-strategy"] == "at-least-once"
    assert entities("q", 1.0) == entities("q", 0.9)
    assert all(one is two for one, two in zip(entities("q", 1.0), entities("q", 0.9), strict=True)), "declared once"
    assert not any(queue.can_cache_declaration for queue in entities("q", 1.0, again=True))


def test_a_name_too_long_for_amqp_is_hashed() -> None:
    """A queue's name may have all 255 bytes: the queue through which messages return to it still has its own."""
    names = [return_queue(queue).name for queue in ("a" * 255, "a" * 254 + "b", "é" * 126, "a" * 250)]
    assert len(set(names)) == 4
    assert all(len(name.encode()) <= 255 for name in names)
    assert names[-1] == "a" * 250 + ".back"


def test_what_the_broker_added_is_not_sent_on() -> None:
    """x-death would pile up, CC would bring copies into other queues; what the sender wrote stays."""
    headers = {
        "x-death": [{}], "x-first-death-queue": "q", "x-delivery-count": 3, "CC": ["other"], "BCC": ["third"],
        "compression": "gzip", "compression-level": 9, "x-mine": 1, "inner-msg-id": "i",
    }  # fmt: skip
    of = message()
    of.headers = headers
    plain, packed = Content(b"", "", "", None), Content(b"", "", "", "gzip")
    assert headers_of(of, plain) == {"compression-level": 9, "x-mine": 1, "inner-msg-id": "i"}
    assert headers_of(of, packed) == {**headers_of(of, plain), "compression": "gzip"}


def test_the_compression_stays_where_kombu_could_not_undo_it() -> None:
    """A body that could not be decompressed is sent on as it came, and still says how it is compressed."""
    of = message(body=b"broken", headers={"compression": "application/x-gzip"})
    assert of.errors
    assert content_of(of) == Content(b"broken", "application/data", "utf-8", "application/x-gzip")


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "made-again"])
def test_a_compressed_body_is_sent_on_compressed(kept: bool) -> None:
    """A body that inflates a thousandfold is moved as it came; what kombu has packed is the same bytes again."""
    packed, kind = compress(b"x" * 100_000, "gzip")
    of = message(body=packed, headers={"compression": kind})
    assert not of.errors
    assert len(of.body) == 100_000
    if kept:
        of._raw = SimpleNamespace(body=packed)
    content = content_of(of)
    assert content.body == packed
    assert content.compression == kind


@pytest.mark.parametrize(
    ("values", "content"),
    [
        ({"body": b"\xff"}, (b"\xff", "application/data", "utf-8")),
        (
            {"body": "ä", "content_type": "text/plain", "content_encoding": "latin-1"},
            (b"\xe4", "text/plain", "latin-1"),
        ),
        ({"body": "ä", "content_encoding": "none-such"}, ("ä".encode(), "application/data", "none-such")),
        ({"body": "\ud800", "content_encoding": "utf-8"}, (b"\xed\xa0\x80", "application/data", "utf-8")),
        ({"body": "x", "content_encoding": "binary"}, (b"x", "application/data", "binary")),
        ({"body": None}, (b"", "application/data", "utf-8")),
    ],
)
def test_the_body_is_sent_on_as_it_came(values: dict[str, Any], content: tuple[Any, ...]) -> None:
    """Whatever the message says of its content, the bytes stay; what it does not say is said as kombu reads it."""
    assert content_of(message(**values)) == Content(*content, None)


def test_the_handler_cannot_settle_but_the_library_can() -> None:
    """ack, reject and requeue are the library's, from the handler's start on and ever after."""
    channel = Channel()
    of = message(channel)
    forbid_acks(of)
    for name in ("ack", "reject", "requeue"):
        with pytest.raises(HandlerAcknowledged):
            getattr(of, name)()
    assert channel.done == []
    settlement(of).ack()
    assert channel.done == [("ack", 7, False)]


@pytest.mark.parametrize(
    ("values", "back"),
    [
        ({}, False),
        ({"delivery_info": {"redelivered": False}}, False),
        ({"delivery_info": {"redelivered": True}}, True),
        ({"headers": {"x-death": [{"queue": "q.back"}]}}, True),
        ({"headers": {"idempotent-bus-redrive": 1}}, True),
        ({"headers": {"idempotent-bus-redrive": 0}}, False),
        ({"headers": {"idempotent-bus-redrive": "1"}}, False),
    ],
)
def test_a_successor_counts_as_redelivered(values: dict[str, Any], back: bool) -> None:
    """I12: a message that killed its worker, met its own lease and waited is not a first delivery: it is counted."""
    assert came_back(message(**values)) is back


def test_the_origin_by_the_consumer_tag() -> None:
    """AMQP: the tag leads to kombu's Consumer, which knows its queue; the default exchange tells by itself."""

    class Consumer:
        _active_tags = {"q1": "1", "q2": "2"}  # noqa: RUF012 - read only

        def receive(self) -> None: ...

    channel = Channel()
    channel.callbacks = {"1": Consumer().receive, "2": Consumer().receive, "3": print}
    assert origin_queue(message(channel, delivery_info={"consumer_tag": "2", "exchange": "x"})) == "q2"
    assert origin_queue(message(channel, delivery_info={"consumer_tag": "3", "exchange": "x"})) is None
    assert origin_queue(message(channel, delivery_info={"exchange": "", "routing_key": "q9"})) == "q9"
    assert origin_queue(message(channel, delivery_info={"exchange": "x", "routing_key": "q9"})) is None
    assert origin_queue(message(channel, delivery_info={"queue": "told"})) == "told"


def test_the_origin_on_a_virtual_channel() -> None:
    """The channel's only queue, or the only one that the exchange leads to; a guess is not made."""
    channel = Channel("redis")
    info = {"exchange": "x", "routing_key": "k"}
    looked_up: list[Any] = []

    def look_up(*args: Any) -> list[str]:
        looked_up.append(args)
        return ["q1", "q3"]

    channel._lookup = look_up  # type: ignore[attr-defined]
    channel._active_queues = ["q1"]  # type: ignore[attr-defined]
    assert origin_queue(message(channel, delivery_info=info)) == "q1"
    channel._active_queues = ["q1", "q2"]  # type: ignore[attr-defined]
    assert origin_queue(message(channel, delivery_info=info)) == "q1"
    assert looked_up == [("x", "k")], "a default would make kombu create that queue"
    channel._active_queues = ["q1", "q3"]  # type: ignore[attr-defined]
    assert origin_queue(message(channel, delivery_info=info)) is None


def test_no_ack_is_seen_on_amqp_and_on_virtual_channels() -> None:
    """AMQP knows the consumer's tag; a virtual channel has not noted the delivery as unacked."""
    channel = Channel()
    channel.no_ack_consumers = {"1"}
    assert was_fetched_without_ack(message(channel, delivery_info={"consumer_tag": "1"}))
    assert not was_fetched_without_ack(message(channel, delivery_info={"consumer_tag": "2"}))
    channel.no_ack_consumers = None
    channel.qos = SimpleNamespace(_delivered={7: 1})  # type: ignore[attr-defined]
    assert not was_fetched_without_ack(message(channel))
    assert was_fetched_without_ack(message(channel, delivery_tag=8))


class Moves:
    """In place of moving.move and moving.let_wait: remembers, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: Exception | None) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.errors = list(errors)
        monkeypatch.setattr(settling, "move", self)
        monkeypatch.setattr(settling, "let_wait", self.let_wait)

    def let_wait(self, of: Message, queue: str, seconds: float, headers: Any) -> None:
        assert headers == {ORIGIN_QUEUE: queue}
        self(of, f"{queue} in {seconds}", headers)

    def __call__(self, of: Message, queue: str, headers: Any, *, drop: frozenset[str] = frozenset()) -> None:
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        self.sent.append((queue, _merged(of.headers, headers, drop)))


def test_an_error_text_that_is_no_unicode_does_not_stop_the_dead_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lone surrogate in an exception's text cannot be sent as a header: it is replaced."""
    moves = Moves(monkeypatch)
    assert settlement(message()).dead_letter(Reason.PERMANENT, "ValueError: \ud800" + "x" * 1000, 1)
    text = moves.sent[0][1][DEAD_ERROR]
    assert text.startswith("ValueError: ?x")
    assert len(text) == 500


def test_a_dead_letter_says_which_record_it_belongs_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not known of this death is not taken from an earlier one, nor from whoever published the message."""
    moves = Moves(monkeypatch)
    forged = {DEAD_RECORD: "00" * 16, DEAD_FINGERPRINT: "00", ORIGIN_QUEUE: "elsewhere", "mine": 1}
    assert settlement(message(headers=forged)).dead_letter(Reason.INVALID, "no id", 0)
    assert not set(moves.sent[0][1]) & {DEAD_RECORD, DEAD_FINGERPRINT, ORIGIN_QUEUE}
    assert moves.sent[0][1]["mine"] == 1
    known = settlement(message(headers=forged), queue="q")
    known.record, known.fingerprint = b"\xab" * 16, b"\xcd" * 8
    assert known.dead_letter(Reason.ATTEMPTS, "", 8)
    assert [moves.sent[1][1][name] for name in (DEAD_RECORD, DEAD_FINGERPRINT, ORIGIN_QUEUE, DEAD_REASON)] == [
        "ab" * 16, "cd" * 8, "q", "attempts",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [PublishUnknown("no answer"), ConfigurationError("no"), ValueError("too long")],
    ids=lambda e: type(e).__name__,
)
def test_a_dead_letter_that_cannot_be_written_is_said_and_waits(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """I4, I1: False, and it waits in a delay queue before it is acked: RabbitMQ takes back what is held for long."""
    channel = Channel()
    moves = Moves(monkeypatch, error)
    assert settlement(message(channel), queue="q").dead_letter(Reason.PERMANENT, "", 1) is False
    assert [queue for queue, _ in moves.sent] == ["q in 4.0"]
    assert channel.done == [("ack", 7, False)]


def test_a_dead_letter_that_cannot_be_written_nor_wait_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """I4: neither the dead letter nor the delay queue takes it: nothing is acked, and it is looked at again."""
    channel, parked = Channel(), []
    Moves(monkeypatch, PublishUnknown("no answer"), ValueError("no"))
    answer = settlement(message(channel), queue="q", park=parked.append).dead_letter(Reason.PERMANENT, "", 1)
    assert answer is False
    assert channel.done == []
    assert len(parked) == 1


@pytest.mark.parametrize("answer", ["dead", "wait"])
def test_a_lost_connection_is_the_consumers_to_see(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """What the broker's driver says of a lost connection comes out: nothing is settled, the consumer reconnects."""
    channel = Channel()
    Moves(monkeypatch, KeyError("the driver's connection error"))
    of = settlement(message(channel), queue="q")
    with pytest.raises(KeyError):
        of.wait(1.0) if answer == "wait" else of.dead_letter(Reason.PERMANENT, "", 1)
    assert channel.done == []


@pytest.mark.parametrize(
    ("number", "believed"),
    [(None, 0), (0, 0), (3, 3), (True, None), (-1, None), (1.0, None), ("1", None), (2**31, None)],
)
def test_only_a_number_of_redrives_is_believed(number: Any, believed: int | None) -> None:
    """The redrive number starts the attempts afresh: what a store could not keep is none."""
    assert redrives({} if number is None else {"idempotent-bus-redrive": number}) == believed


def test_a_quorum_queues_message_is_not_requeued_without_a_known_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    """I1: each requeue counts towards the delivery limit, which destroys the message; it stays unacked instead."""
    monkeypatch.setattr("idempotent_bus.settlement.time.sleep", lambda seconds: None)
    channel = Channel()
    settlement(message(channel, headers={"x-delivery-count": 1}, delivery_info={"exchange": "x"})).wait(1.0)
    assert channel.done == []
    settlement(message(channel, delivery_info={"exchange": "x"})).wait(1.0)
    assert channel.done == [("reject", 7, True)]


@pytest.mark.parametrize(
    ("count", "amqp", "queue", "renewed"),
    [
        (None, True, "q", False), (1, True, "q", False), (2, True, "q", True), (9, True, "q", True),
        ("2", True, "q", False), (True, True, "q", False), (9, False, "q", False), (9, True, None, False),
    ],
)  # fmt: skip
def test_a_message_near_its_delivery_limit_is_replaced(
    monkeypatch: pytest.MonkeyPatch, count: Any, amqp: bool, queue: str | None, renewed: bool
) -> None:
    """I1: what came back twice is put off and acked at once, so that no number of cuts destroys it."""
    monkeypatch.setattr("idempotent_bus.settlement.is_amqp", lambda channel: amqp)
    waits: list[float] = []
    monkeypatch.setattr(
        "idempotent_bus.settlement.let_wait", lambda message, queue, delay, headers: waits.append(delay)
    )
    channel = Channel()
    headers = {} if count is None else {"x-delivery-count": count}
    assert (
        settlement(message(channel, headers=headers, delivery_info={"exchange": "x"}), queue=queue).renew() == renewed
    )
    assert waits == ([0.0] if renewed else [])
    assert bool(channel.done) == renewed


def test_a_closed_channel_is_a_lost_connection() -> None:
    """Settling on a channel that is closed raises what a consumer's loop takes for a lost connection."""
    channel = Channel()
    channel.connection = None  # type: ignore[assignment]
    with pytest.raises(ConnectionResetError):
        settlement(message(channel), queue="q").wait(1.0)
