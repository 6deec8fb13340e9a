"""Acks of an AMQP channel, gathered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idempotent_bus.acks import BulkAcks


class Broker:
    """A channel that knows which of its deliveries are unacked, and refuses what RabbitMQ refuses."""

    def __init__(self) -> None:
        self.unacked: list[int] = []
        self.frames = 0

    def deliver(self, tag: int) -> None:
        self.unacked.append(tag)

    def basic_ack(self, tag: int, multiple: bool = False) -> None:
        self.frames += 1
        assert tag in self.unacked, "PRECONDITION_FAILED: unknown delivery tag"
        self.unacked = [one for one in self.unacked if one > tag or (one != tag and not multiple)]


def message(tag: int) -> Any:
    return SimpleNamespace(delivery_tag=tag, _state="RECEIVED")


@pytest.fixture
def broker() -> Broker:
    return Broker()


def arrived(broker: Broker, count: int) -> BulkAcks:
    acks = BulkAcks(broker)
    for tag in range(1, count + 1):
        broker.deliver(tag)
        acks.arrived(tag)
    return acks


def test_an_unbroken_run_is_one_frame(broker: Broker) -> None:
    """A hundred messages that are done are acked by one frame."""
    acks = arrived(broker, 100)
    for tag in range(1, 101):
        acks.ack(message(tag))
    assert broker.unacked == list(range(1, 101)), "acked before the flush"
    acks.flush()
    assert broker.unacked == []
    assert broker.frames == 1


def test_what_lies_behind_an_open_one_is_acked_by_itself(broker: Broker) -> None:
    """I4: a message that is not done is never acked along with its neighbours."""
    acks = arrived(broker, 5)
    for tag in (1, 2, 4, 5):
        acks.ack(message(tag))
    acks.flush()
    assert broker.unacked == [3]
    acks.ack(message(3))
    acks.flush()
    assert broker.unacked == []


@given(st.data())
def test_only_what_is_done_is_acked_and_all_of_it(data: st.DataObject) -> None:
    """I4: whatever the order in which messages come, are done and are flushed, the broker loses what was done only."""
    broker = Broker()
    acks = BulkAcks(broker)
    come: list[int] = []
    done: set[int] = set()
    for step in data.draw(st.lists(st.sampled_from(["come", "done", "flush"]), max_size=60)):
        if step == "come":
            come.append((come or [0])[-1] + data.draw(st.integers(1, 3)))
            broker.deliver(come[-1])
            acks.arrived(come[-1])
        elif step == "done" and (waiting := [tag for tag in come if tag not in done]):
            tag = data.draw(st.sampled_from(waiting))
            done.add(tag)
            acks.ack(message(tag))
        elif step == "flush":
            acks.flush()
            assert broker.unacked == [tag for tag in come if tag not in done]
        assert set(come) - set(broker.unacked) <= done
