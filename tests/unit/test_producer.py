"""The producer over a scripted lane: every outcome, and every combination of two, claims no more than is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kombu import Connection, Exchange, Queue

from idempotent_bus import producer as producer_module
from idempotent_bus.errors import (
    ConfigurationError,
    InvalidBizId,
    InvalidBody,
    PublishError,
    PublishUnknown,
    Rejected,
    Unroutable,
)
from idempotent_bus.headers import INNER_MSG_ID
from idempotent_bus.model import Edge, Landing
from idempotent_bus.msgid import is_inner_msg_id, new_inner_msg_id
from idempotent_bus.producer import IdempotentProducer, PublishManyError, ResendPolicy, idempotent_producer
from idempotent_bus.sending.lane import Lane
from idempotent_bus.sending.outgoing import Outgoing
from idempotent_bus.sending.resend import Known, NotConfirmed

Outcome = Landing | BaseException


class ScriptedLane(Lane):
    """Answers each send with the next outcome of its script; without one the message lands."""

    def __init__(self) -> None:
        super().__init__(Connection("memory://"), None, timeout=5.0, clock=lambda: 0.0)
        self.script: list[Outcome] = []
        self.sent: list[Outgoing] = []
        self.discards = 0

    def open(self) -> None: ...

    def discard(self) -> None:
        self.discards += 1

    def declare(self, entities: Any) -> None: ...

    def _prepare_channel(self) -> None: ...

    def _deliver(self, outgoing: Outgoing) -> Landing:
        outcome = self.script.pop(0) if self.script else Landing.LANDED
        if isinstance(outcome, NotConfirmed) and outcome.known is Known.NOT_SENT:
            raise outcome
        self.sent.append(outgoing)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class Time:
    """A clock that moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> ScriptedLane:
    lane = ScriptedLane()
    monkeypatch.setattr(producer_module, "make_lane", lambda *_, **__: lane)
    return lane


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def make(lane: ScriptedLane, time: Time) -> Callable[..., IdempotentProducer]:
    def make(max_sends: int = 2, **options: Any) -> IdempotentProducer:
        policy = ResendPolicy(max_sends=max_sends, clock=lambda: time.now, sleep=time.sleep, draw=lambda: 1.0)
        return IdempotentProducer("memory://", retry=policy, **options)

    return make


FAILURES: dict[str, Callable[[], NotConfirmed | OSError]] = {
    "not sent": lambda: NotConfirmed(Known.NOT_SENT, "nobody there"),
    "unroutable": lambda: NotConfirmed(Known.UNROUTABLE, "no queue", final=True),
    "nack": lambda: NotConfirmed(Known.REFUSED, "nacked"),
    "refused": lambda: NotConfirmed(Known.REFUSED, "too large", final=True),
    "timeout": lambda: NotConfirmed(Known.UNKNOWN, "silence"),
    "cut": lambda: ConnectionResetError("cut"),
}

#: What one failure alone allows to be claimed. "not sent" is raised as unknown too, but says that it was never sent.
ALONE = {
    "not sent": PublishUnknown,
    "unroutable": Unroutable,
    "nack": Rejected,
    "refused": Rejected,
    "timeout": PublishUnknown,
    "cut": PublishUnknown,
}

#: What two failures in this order allow: the weakest of them, since either send may have landed. A first failure that
#: is final is never followed by a second send.
TOGETHER = {
    ("not sent", "unroutable"): Unroutable,
    ("not sent", "nack"): Rejected,
    ("not sent", "refused"): Rejected,
    ("not sent", "timeout"): PublishUnknown,
    ("not sent", "cut"): PublishUnknown,
    ("nack", "not sent"): Rejected,
    ("nack", "unroutable"): Rejected,
    ("nack", "nack"): Rejected,
    ("nack", "refused"): Rejected,
    ("nack", "timeout"): PublishUnknown,
    ("nack", "cut"): PublishUnknown,
    **{(doubt, second): PublishUnknown for doubt in ("timeout", "cut") for second in FAILURES},
}


def test_a_publish_that_is_confirmed_at_once(make: Any, lane: ScriptedLane) -> None:
    """The receipt says landed, after one send, with an id of our own form."""
    receipt = make().publish({"a": 1}, routing_key="q")
    assert receipt.landing is Landing.LANDED
    assert receipt.landed
    assert receipt.edge is Edge.CONSUMER
    assert receipt.sends == 1
    assert is_inner_msg_id(receipt.inner_msg_id)
    assert lane.sent[0].headers[INNER_MSG_ID] == receipt.inner_msg_id


@pytest.mark.parametrize("failure", FAILURES)
def test_one_failure_alone(failure: str, make: Any, lane: ScriptedLane, time: Time) -> None:
    """With one send allowed, each failure raises what it alone allows, with the message's id."""
    lane.script = [FAILURES[failure]()] * 100
    with pytest.raises(ALONE[failure]) as caught:
        make(max_sends=1).publish({}, routing_key="q")
    assert type(caught.value) is ALONE[failure]
    assert is_inner_msg_id(caught.value.inner_msg_id)
    assert len(lane.sent) == (0 if failure == "not sent" else 1)
    if failure == "not sent":
        assert "never sent" in str(caught.value)
        assert time.now >= 30.0  # tried until the patience was over


@pytest.mark.parametrize(("first", "second"), TOGETHER)
def test_two_failures_claim_no_more_than_the_weakest(first: str, second: str, make: Any, lane: ScriptedLane) -> None:
    """After a send in doubt no later answer, however definite, makes the whole publish certain."""
    lane.script = [FAILURES[first](), *[FAILURES[second]() for _ in range(100)]]
    with pytest.raises(PublishError) as caught:
        make().publish({}, routing_key="q")
    assert type(caught.value) is TOGETHER[first, second]


def test_the_pairs_are_all_there() -> None:
    """No combination of two failures is left out of the table above."""
    final = {"unroutable", "refused"}
    expected = {pair for pair in itertools.product(FAILURES, FAILURES) if pair[0] not in final}
    assert set(TOGETHER) == expected - {("not sent", "not sent")}


@pytest.mark.parametrize("failure", ["not sent", "nack", "timeout", "cut"])
def test_a_confirm_after_any_failure_is_landed(failure: str, make: Any, lane: ScriptedLane) -> None:
    """A confirmed resend is a landing, and the receipt counts the sends."""
    lane.script = [FAILURES[failure]()]
    receipt = make().publish({}, routing_key="q")
    assert receipt.landing is Landing.LANDED
    assert receipt.sends == (1 if failure == "not sent" else 2)


@pytest.mark.parametrize("failure", ["unroutable", "refused"])
def test_a_definite_answer_is_not_asked_for_again(failure: str, make: Any, lane: ScriptedLane) -> None:
    """Where another send cannot help there is none."""
    lane.script = [FAILURES[failure]()]
    with pytest.raises(PublishError):
        make(max_sends=5).publish({}, routing_key="q")
    assert len(lane.sent) == 1


def test_every_resend_is_the_same_message(make: Any, lane: ScriptedLane) -> None:
    """All sends of one publish carry the same id and the same bytes, serialised once."""
    lane.script = [FAILURES["timeout"](), FAILURES["cut"](), FAILURES["nack"]()]
    receipt = make(max_sends=5).publish({"a": [1, 2]}, routing_key="q")
    assert receipt.sends == 4
    assert all(outgoing is lane.sent[0] for outgoing in lane.sent)


def test_two_publishes_have_two_ids(make: Any) -> None:
    """Each logical publish has an id of its own, also for the same body."""
    producer = make()
    assert producer.publish({}, routing_key="q").inner_msg_id != producer.publish({}, routing_key="q").inner_msg_id


def test_an_id_that_came_with_the_headers_is_never_inherited(make: Any, lane: ScriptedLane) -> None:
    """Headers copied from another message bring its id: it is overwritten, and the caller's dict stays as it was."""
    other = new_inner_msg_id()
    headers = {INNER_MSG_ID: other, "mine": 1}
    receipt = make().publish({}, routing_key="q", headers=headers)
    assert receipt.inner_msg_id != other
    assert lane.sent[0].headers == {INNER_MSG_ID: receipt.inner_msg_id, "mine": 1}
    assert headers == {INNER_MSG_ID: other, "mine": 1}


def test_an_explicit_id_resends_that_very_message(make: Any, lane: ScriptedLane) -> None:
    """The id of an error can be published again, and the edge's answer `duplicate` is handed on."""
    producer = make(max_sends=1)
    lane.script = [FAILURES["timeout"](), Landing.DUPLICATE]
    with pytest.raises(PublishUnknown) as caught:
        producer.publish({}, routing_key="q")
    receipt = producer.publish({}, routing_key="q", inner_msg_id=caught.value.inner_msg_id)
    assert receipt.landing is Landing.DUPLICATE
    assert receipt.inner_msg_id == caught.value.inner_msg_id
    assert lane.sent[0].headers[INNER_MSG_ID] == lane.sent[1].headers[INNER_MSG_ID]


def test_a_fresh_id_that_meets_itself_has_landed(make: Any, lane: ScriptedLane) -> None:
    """A duplicate of a fresh id can only be this publish's own earlier send: the receipt says landed, sends 2."""
    lane.script = [FAILURES["timeout"](), Landing.DUPLICATE]
    receipt = make().publish({}, routing_key="q")
    assert receipt.landing is Landing.LANDED
    assert receipt.sends == 2


@pytest.mark.parametrize("value", ["", "my-id", "9f0c1d52-4f0e-4a36-9d0b-0d6a4e7f3c11", 7])
def test_an_explicit_id_of_another_form_is_refused(value: Any, make: Any, lane: ScriptedLane) -> None:
    """Ids that the bus did not make could be anybody's; they are refused before anything is sent."""
    with pytest.raises(ConfigurationError):
        make().publish({}, routing_key="q", inner_msg_id=value)
    assert lane.sent == []


@pytest.mark.parametrize("body", [{}, {"payment_id": ""}, {"payment_id": True}, {"payment_id": None}, [], "text"])
def test_a_body_without_the_named_biz_id_is_refused_before_it_is_sent(body: Any, make: Any, lane: ScriptedLane) -> None:
    """A producer told where the biz-id is refuses a body without a valid one."""
    with pytest.raises(InvalidBizId):
        make(biz_id="payment_id").publish(body, routing_key="q")
    assert lane.sent == []


def test_a_body_with_the_named_biz_id_is_sent_untouched(make: Any, lane: ScriptedLane) -> None:
    """The body that leaves is the body that was given: nothing of the bus is in it."""
    make(biz_id="payment_id").publish({"payment_id": "p-1"}, routing_key="q")
    assert lane.sent[0].body == '{"payment_id": "p-1"}'


def test_a_body_that_cannot_be_serialised_is_refused(make: Any, lane: ScriptedLane) -> None:
    """Serialising fails before the first send, as InvalidBody with the serialiser's error behind it."""
    with pytest.raises(InvalidBody) as caught:
        make().publish(object(), routing_key="q")
    assert caught.value.__cause__ is not None
    assert lane.sent == []


@pytest.mark.parametrize("name", ["retry", "retry_policy", "mandatory", "immediate", "delivery_mode", "timeout"])
def test_options_of_kombus_publish_that_would_be_ignored_are_refused(name: str, make: Any) -> None:
    """What kombu's publish takes and this one decides itself is refused with the reason, not silently ignored."""
    with pytest.raises(ConfigurationError, match=name):
        make().publish({}, routing_key="q", **{name: 1})


def test_messages_are_always_persistent(make: Any, lane: ScriptedLane) -> None:
    """Every message asks to be stored on disk; priority, expiration and properties go along."""
    make().publish({}, routing_key="q", priority=3, expiration=1.5, correlation_id="c", reply_to=Queue("answers"))
    outgoing = lane.sent[0]
    assert outgoing.properties == {
        "delivery_mode": 2,
        "expiration": "1500",
        "correlation_id": "c",
        "reply_to": "answers",
    }
    assert outgoing.priority == 3


def test_pauses_grow_with_full_jitter_up_to_the_cap(lane: ScriptedLane, time: Time) -> None:
    """The pause before send n + 1 is a drawn part of min(cap, base * 2 ** (n - 1))."""
    draws = iter([1.0, 0.5, 1.0, 0.0])
    policy = ResendPolicy(
        max_sends=5, base=1.0, cap=3.0, clock=lambda: time.now, sleep=time.sleep, draw=lambda: next(draws)
    )
    lane.script = [FAILURES["cut"]() for _ in range(5)]
    with pytest.raises(PublishUnknown):
        IdempotentProducer("memory://", retry=policy).publish({}, routing_key="q")
    assert time.slept == [1.0, 1.0, 3.0, 0.0]


def test_patience_ends_the_resends(lane: ScriptedLane, time: Time) -> None:
    """No send begins after the patience is over, whatever the count, and the last pause is cut to it."""
    policy = ResendPolicy(
        max_sends=100, patience=5.0, base=2.0, cap=2.0, clock=lambda: time.now, sleep=time.sleep, draw=lambda: 1.0
    )
    lane.script = [FAILURES["cut"]() for _ in range(100)]
    with pytest.raises(PublishUnknown):
        IdempotentProducer("memory://", retry=policy).publish({}, routing_key="q")
    assert time.slept == [2.0, 2.0, 1.0]
    assert len(lane.sent) == 4


def test_the_connection_is_thrown_away_after_every_doubt(make: Any, lane: ScriptedLane) -> None:
    """After a timeout or a cut the next send has a new connection, where no late answer meets it; a nack keeps it."""
    lane.script = [FAILURES["timeout"](), FAILURES["cut"](), FAILURES["nack"]()]
    make(max_sends=9).publish({}, routing_key="q")
    assert lane.discards == 2


def test_a_signal_in_mid_send_throws_the_connection_away(make: Any, lane: ScriptedLane) -> None:
    """KeyboardInterrupt passes through, and the answer to the interrupted send can meet no other."""
    lane.script = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        make().publish({}, routing_key="q")
    assert lane.discards == 1


def test_a_foreign_error_passes_through(make: Any, lane: ScriptedLane) -> None:
    """What is no error of the broker is not dressed up as one, if nothing is in doubt."""
    lane.script = [ZeroDivisionError()]
    with pytest.raises(ZeroDivisionError):
        make().publish({}, routing_key="q")


def test_a_foreign_error_after_a_doubt_is_unknown(make: Any, lane: ScriptedLane) -> None:
    """After a send in doubt even a programming error must not look as if nothing had been sent."""
    lane.script = [FAILURES["timeout"](), ZeroDivisionError()]
    with pytest.raises(PublishUnknown) as caught:
        make().publish({}, routing_key="q")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_fault_injected_after_the_send_is_a_doubt(make: Any, lane: ScriptedLane) -> None:
    """An injected lost reply (a connection error after the call) makes the producer send the same id again."""
    lost = iter([True, False])

    def step(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        assert name == "publish"
        result = function(*args, **kwargs)
        if next(lost):
            raise ConnectionResetError("reply lost")
        return result

    receipt = make(step=step).publish({}, routing_key="q")
    assert receipt.sends == 2
    assert len(lane.sent) == 2


def test_driver_errors_are_chained(make: Any, lane: ScriptedLane) -> None:
    """The driver's error is the cause of what is raised."""
    lane.script = [ConnectionResetError("cut")]
    with pytest.raises(PublishUnknown) as caught:
        make(max_sends=1).publish({}, routing_key="q")
    assert isinstance(caught.value.__cause__, ConnectionResetError)


def test_publish_many_without_a_window_loops(make: Any, lane: ScriptedLane) -> None:
    """Bodies and (body, keywords) pairs are published in order; the receipts come in that order."""
    receipts = make().publish_many([{"n": 1}, ({"n": 2}, {"routing_key": "other"})], routing_key="q")
    assert [outgoing.routing_key for outgoing in lane.sent] == ["q", "other"]
    assert [receipt.inner_msg_id for receipt in receipts] == [outgoing.inner_msg_id for outgoing in lane.sent]


def test_publish_many_tells_which_did_not_land(make: Any, lane: ScriptedLane) -> None:
    """An unroutable message fails alone: the others land, and the error's results tell them apart."""
    lane.script = [Landing.LANDED, FAILURES["unroutable"](), Landing.LANDED]
    with pytest.raises(PublishManyError) as caught:
        make().publish_many([{}, {}, {}], routing_key="q")
    kinds = [type(result).__name__ for result in caught.value.results]
    assert kinds == ["Receipt", "Unroutable", "Receipt"]
    assert caught.value.inner_msg_id == caught.value.results[1].inner_msg_id


def test_publish_many_stops_when_the_broker_is_away(make: Any, lane: ScriptedLane) -> None:
    """After an unknown outcome nothing more is taken from the iterable."""
    lane.script = [Landing.LANDED, *[FAILURES["cut"]() for _ in range(2)]]
    bodies = iter([{}, {}, {}, {}])
    with pytest.raises(PublishManyError) as caught:
        make().publish_many(bodies, routing_key="q")
    assert len(caught.value.results) == 2
    assert len(list(bodies)) == 2


def test_publish_many_keeps_its_receipts_when_the_iterable_raises(make: Any) -> None:
    """What landed before the caller's generator failed is not forgotten."""

    def bodies() -> Iterator[Any]:
        yield {}
        raise ZeroDivisionError

    with pytest.raises(PublishManyError) as caught:
        make().publish_many(bodies(), routing_key="q")
    assert len(caught.value.results) == 1
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_the_decorator_publishes_what_the_function_returns(make: Any, lane: ScriptedLane) -> None:
    """Calling the wrapped function publishes its body and gives the receipt; `__wrapped__` is the plain function."""
    exchange = Exchange("paid")

    @idempotent_producer(make(), exchange=exchange, routing_key="paid", biz_id="payment_id")
    def pay(payment_id: str, *, amount: str) -> dict[str, str]:
        return {"payment_id": payment_id, "amount": amount}

    receipt = pay("p-1", amount="9.90")
    assert receipt.landed
    assert lane.sent[0].exchange == "paid"
    assert lane.sent[0].declare == (exchange,)
    assert pay.__wrapped__("p-1", amount="1") == {"payment_id": "p-1", "amount": "1"}  # type: ignore[attr-defined]
    with pytest.raises(InvalidBizId):
        pay("", amount="1")
    assert len(lane.sent) == 1


def test_the_decorator_refuses_what_returns_no_body(make: Any) -> None:
    """A coroutine function's return value would be a coroutine, which is no body."""
    with pytest.raises(ConfigurationError):

        @idempotent_producer(make())
        async def pay() -> None: ...


def test_forward_keeps_the_message_as_it_is(make: Any, lane: ScriptedLane) -> None:
    """A forwarded message keeps its id, its headers and its bytes, and goes to one queue that is declared first."""
    known = new_inner_msg_id()
    queue = Queue("dead", durable=True)
    make().forward(
        b"\x00raw", queue=queue, headers={INNER_MSG_ID: known}, content_type="x/y", content_encoding="binary"
    )
    outgoing = lane.sent[0]
    assert (outgoing.body, outgoing.content_type, outgoing.content_encoding) == (b"\x00raw", "x/y", "binary")
    assert outgoing.headers == {INNER_MSG_ID: known}
    assert (outgoing.exchange, outgoing.routing_key, outgoing.declare) == ("", "dead", (queue,))


def test_forward_adds_no_id_to_a_message_that_has_none(make: Any, lane: ScriptedLane) -> None:
    """A message of a foreign producer stays without an id: two forwards of it must not become two messages."""
    make().forward(b"raw", queue=Queue("dead"), headers={}, content_type="x/y", content_encoding="binary")
    assert lane.sent[0].headers == {}


@pytest.mark.parametrize("url", ["amqp://user:s3cret/x@host//", "nosuch://user:s3cret@host//"])
def test_a_password_is_never_in_an_error(url: str) -> None:
    """A URL that cannot be read is refused without repeating any part of its password."""
    with pytest.raises(ConfigurationError) as caught:
        IdempotentProducer(url)
    error: BaseException | None = caught.value
    while error is not None:
        assert "s3cret" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@pytest.mark.parametrize("connection", [None, 7, object()])
def test_what_is_no_connection_is_refused(connection: Any) -> None:
    """Only a Connection, a pool or a URL makes a producer."""
    with pytest.raises(ConfigurationError):
        IdempotentProducer(connection)


def test_a_transport_that_reports_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a transport whose failures nobody sees a receipt would be a guess: the producer cannot be made."""
    connection = Connection("memory://")
    monkeypatch.setattr(type(connection.transport), "driver_type", "kafka")
    with pytest.raises(ConfigurationError, match="does not report"):
        IdempotentProducer(connection)


def test_impossible_policies_are_refused() -> None:
    """A policy that could never send, or never wait, is refused when it is made."""
    for options in ({"max_sends": 0}, {"patience": -1}, {"base": 0}, {"base": 2, "cap": 1}):
        with pytest.raises(ConfigurationError):
            ResendPolicy(**options)
    with pytest.raises(ConfigurationError):
        IdempotentProducer("memory://", confirm_timeout=0)
