"""The small decisions of settling: where a message came from, what is sent on of it, how long it waits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from kombu.message import Message

from idempotent_bus import HandlerAcknowledged
from idempotent_bus.model import Reason
from idempotent_bus.settlement import (
    MessageSettlement,
    _delay_queue,
    came_back,
    forbid_acks,
    origin_queue,
    was_fetched_without_ack,
)


class Channel:
    """As much of an AMQP channel as settling looks at."""

    no_ack_consumers: Any = None

    def __init__(self, driver: str = "amqp") -> None:
        self.done: list[tuple[Any, ...]] = []
        self.no_ack_consumers = set()
        self.callbacks: dict[str, Any] = {}
        transport = SimpleNamespace(driver_type=driver)
        self.connection = SimpleNamespace(client=SimpleNamespace(transport=transport))

    def basic_ack(self, tag: Any, multiple: bool = False) -> None:
        self.done.append(("ack", tag, multiple))

    def basic_reject(self, tag: Any, requeue: bool = False) -> None:
        self.done.append(("reject", tag, requeue))


def message(channel: Any = None, **values: Any) -> Message:
    return Message(**{"body": b"{}", "delivery_tag": 7, "channel": channel or Channel(), **values})


def settlement(of: Message, **values: Any) -> MessageSettlement:
    return MessageSettlement(of, **{"queue": None, "scope": "s", "dead_letter": "s.dead", **values})


@pytest.mark.parametrize(
    ("delay", "queue"),
    [(0.0, "q.wait.250"), (0.25, "q.wait.250"), (0.26, "q.wait.500"), (1.0, "q.wait.1000"), (300.0, "q.wait.512000")],
)
def test_a_delay_queue_waits_at_least_as_long(delay: float, queue: str) -> None:
    """Powers of two from a quarter of a second: never shorter than asked, at most twice as long, few queues."""
    made = _delay_queue("q", delay)
    assert made.name == queue
    assert made.queue_arguments["x-message-ttl"] == int(queue.rpartition(".")[2])
    assert made.queue_arguments["x-message-ttl"] >= delay * 1000
    assert made.queue_arguments["x-dead-letter-routing-key"] == "q"
    assert made.queue_arguments["x-dead-letter-strategy"] == "at-least-once"
    assert made is _delay_queue("q", delay), "the same object, so that it is declared once"


def test_what_the_broker_added_is_not_sent_on() -> None:
    """x-death would pile up, CC would bring copies into other queues; what the sender wrote stays."""
    headers = {
        "x-death": [{}], "x-first-death-queue": "q", "x-delivery-count": 3, "CC": ["other"], "BCC": ["third"],
        "compression": "gzip", "compression-level": 9, "x-mine": 1, "inner-msg-id": "i",
    }  # fmt: skip
    of = message(headers={name: value for name, value in headers.items() if name != "compression"})
    of.headers = headers
    assert settlement(of)._headers({"more": 2}) == {"compression-level": 9, "x-mine": 1, "inner-msg-id": "i", "more": 2}


def test_the_compression_stays_where_kombu_could_not_undo_it() -> None:
    """A body that could not be decompressed is sent on as it came, and still says how it is compressed."""
    of = message(body=b"broken", headers={"compression": "application/x-gzip"})
    assert of.errors
    assert settlement(of)._headers({})["compression"] == "application/x-gzip"
    assert settlement(of)._content()[0] == b"broken"


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
    assert settlement(message(**values))._content() == content


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
        ({"headers": {"x-death": [{"queue": "q.wait.250"}]}}, True),
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


def test_an_error_text_that_is_no_unicode_does_not_stop_the_dead_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lone surrogate in an exception's text cannot be sent as a header: it is replaced."""
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(MessageSettlement, "_send", lambda self, queue, headers: sent.append(headers))
    settlement(message()).dead_letter(Reason.PERMANENT, "ValueError: \ud800" + "x" * 1000, 1)
    text = sent[0]["idempotent-bus-dead-error"]
    assert text.startswith("ValueError: ?x")
    assert len(text) == 500


def test_a_quorum_queues_message_is_not_requeued_without_a_known_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    """I1: each requeue counts towards the delivery limit, which destroys the message; it stays unacked instead."""
    monkeypatch.setattr("idempotent_bus.settlement.time.sleep", lambda seconds: None)
    channel = Channel()
    settlement(message(channel, headers={"x-delivery-count": 1}, delivery_info={"exchange": "x"})).wait(1.0)
    assert channel.done == []
    settlement(message(channel, delivery_info={"exchange": "x"})).wait(1.0)
    assert channel.done == [("reject", 7, True)]


def test_a_closed_channel_is_a_lost_connection() -> None:
    """Settling on a channel that is closed raises what a consumer's loop takes for a lost connection."""
    channel = Channel()
    channel.connection = None  # type: ignore[assignment]
    with pytest.raises(ConnectionResetError):
        settlement(message(channel), queue="q").wait(1.0)
