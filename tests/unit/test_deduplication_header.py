"""RabbitMQ's deduplication plugin, at the boundary: its header is set, and its answers are never taken for more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from kombu import Connection

from idempotent_bus import producer as producer_module
from idempotent_bus.errors import ConfigurationError, PublishUnknown, Rejected, Unroutable
from idempotent_bus.headers import DEDUPLICATION
from idempotent_bus.model import Edge, Landing
from idempotent_bus.msgid import new_inner_msg_id
from idempotent_bus.producer import IdempotentProducer, ResendPolicy
from idempotent_bus.sending.amqp import AmqpLane
from idempotent_bus.sending.outgoing import Outgoing
from idempotent_bus.sending.resend import Known, NotConfirmed


class ScriptedLane(AmqpLane):
    """An AMQP lane without a broker: each send ends as its script says, or lands."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__(Connection("amqp://localhost"), None, timeout=5.0, clock=lambda: 0.0)
        self.script: list[NotConfirmed] = []
        self.sent: list[Outgoing] = []

    def open(self) -> None: ...

    def _deliver(self, outgoing: Outgoing) -> Landing:
        self.sent.append(outgoing)
        if self.script:
            raise self.script.pop(0)
        return Landing.LANDED


def nack() -> NotConfirmed:
    return NotConfirmed(Known.REFUSED, "nacked")


def returned() -> NotConfirmed:
    return NotConfirmed(Known.UNROUTABLE, "no queue", final=True)


def silence() -> NotConfirmed:
    return NotConfirmed(Known.UNKNOWN, "silence")


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> ScriptedLane:
    lane = ScriptedLane()
    monkeypatch.setattr(producer_module, "make_lane", lambda *_, **__: lane)
    return lane


@pytest.fixture
def make(lane: ScriptedLane) -> Callable[..., IdempotentProducer]:
    def make(**options: Any) -> IdempotentProducer:
        policy = ResendPolicy(max_sends=3, clock=lambda: 0.0, sleep=lambda _: None)
        return IdempotentProducer("amqp://", retry=policy, **options)

    return make


def test_the_header_is_the_inner_msg_id(make: Any, lane: ScriptedLane) -> None:
    """Asked for, the header carries the id of this very publish, also over one that was copied from another message."""
    producer = make(deduplication_header=True)
    receipt = producer.publish({}, routing_key="q", headers={DEDUPLICATION: "another's", "kept": 1})
    many = producer.publish_many([{}, {}], routing_key="q")
    assert [sent.headers[DEDUPLICATION] for sent in lane.sent] == [r.inner_msg_id for r in (receipt, *many)]
    assert lane.sent[0].headers["kept"] == 1
    assert receipt.edge is Edge.CONSUMER


def test_the_header_is_not_set_unless_asked_for(make: Any, lane: ScriptedLane) -> None:
    """The control: without the option nothing is sent that a plugin could look at."""
    make().publish({}, routing_key="q")
    assert DEDUPLICATION not in lane.sent[0].headers


@pytest.mark.parametrize("answer", [nack, returned])
def test_after_a_doubt_a_refusal_may_be_a_duplicate(make: Any, lane: ScriptedLane, answer: Any) -> None:
    """A nack or a return of a resend may mean that the first send landed, or not: unknown, and no further resend."""
    lane.script = [silence(), answer()]
    with pytest.raises(PublishUnknown):
        make(deduplication_header=True).publish({}, routing_key="q")
    assert len(lane.sent) == 2


@pytest.mark.parametrize(("answer", "without"), [(nack, Rejected), (returned, Unroutable)])
def test_the_same_for_an_id_that_was_given(make: Any, lane: ScriptedLane, answer: Any, without: Any) -> None:
    """An id that the caller resends may be known to the plugin: unknown. Without the plugin the broker's no is a no."""
    lane.script = [answer()]
    with pytest.raises(PublishUnknown):
        make(deduplication_header=True).publish({}, routing_key="q", inner_msg_id=new_inner_msg_id())
    lane.script = [answer() for _ in range(3)]
    with pytest.raises(without):
        make().publish({}, routing_key="q", inner_msg_id=new_inner_msg_id())


@pytest.mark.parametrize(("answer", "error"), [(nack, Rejected), (returned, Unroutable)])
def test_a_first_refusal_is_one_and_is_not_resent(make: Any, lane: ScriptedLane, answer: Any, error: Any) -> None:
    """A fresh id's first send can be no duplicate; the plugin has noted the id, so that a resend would be refused."""
    lane.script = [answer()]
    with pytest.raises(error, match="fresh"):
        make(deduplication_header=True).publish({}, routing_key="q")
    assert len(lane.sent) == 1


def test_other_brokers_have_no_such_plugin() -> None:
    """Asked for over another broker the option is an error, not an empty promise."""
    with pytest.raises(ConfigurationError, match="RabbitMQ"):
        IdempotentProducer("memory://", deduplication_header=True)
