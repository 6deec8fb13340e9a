"""The confirm tracker on a fake channel: every answer settles its own send and no other."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest

from idempotent_bus.headers import INNER_MSG_ID
from idempotent_bus.sending.confirms import ConfirmChannel
from idempotent_bus.sending.resend import Known, NotConfirmed


class FakeMessage:
    def __init__(self, inner_msg_id: object) -> None:
        self.properties = {"application_headers": {INNER_MSG_ID: inner_msg_id}}


class FakeChannel:
    """Plays what a broker would send: `script` holds what each reading of the socket brings."""

    def __init__(self) -> None:
        self.events: dict[str, set[Callable[..., None]]] = defaultdict(set)
        self.connection: Any = self
        self.confirming = False
        self.sent: list[Any] = []
        self.script: deque[Callable[[], None]] = deque()
        self.now = 0.0
        self.on_blocked: Any = None
        self.on_unblocked: Any = None

    def confirm_select(self) -> None:
        self.confirming = True

    def send_method(self, sig: Any, format: str, args: Any, content: Any) -> None:
        self.sent.append((args, content))

    def drain_events(self, timeout: float) -> None:
        if not self.script:
            self.now += timeout
            raise TimeoutError
        self.script.popleft()()

    def ack(self, tag: int, multiple: bool = False) -> None:
        self.script.append(lambda: self._emit("basic_ack", tag, multiple))

    def nack(self, tag: int, multiple: bool = False) -> None:
        self.script.append(lambda: self._emit("basic_nack", tag, multiple))

    def give_back(self, inner_msg_id: object) -> None:
        error = RuntimeError("NO_ROUTE")
        self.script.append(lambda: self._emit("basic_return", error, "x", "k", FakeMessage(inner_msg_id)))

    def _emit(self, event: str, *args: Any) -> None:
        for callback in self.events[event]:
            callback(*args)


@pytest.fixture
def channel() -> FakeChannel:
    return FakeChannel()


@pytest.fixture
def confirms(channel: FakeChannel) -> ConfirmChannel:
    return ConfirmChannel(channel, timeout=5.0, clock=lambda: channel.now)


def test_a_send_is_mandatory_and_the_channel_confirms(channel: FakeChannel, confirms: ConfirmChannel) -> None:
    """Every message is sent mandatory, on a channel in confirm mode."""
    confirms.send("message", "x", "k", "a")
    assert channel.confirming
    assert channel.sent == [((0, "x", "k", True, False), "message")]


def test_an_ack_settles_its_own_tag_only(channel: FakeChannel, confirms: ConfirmChannel) -> None:
    """The ack of another message is never taken for mine (the stale ack): the wait goes on until its own number."""
    first, second = confirms.send("m", "", "q", "a"), confirms.send("m", "", "q", "b")
    channel.ack(1)
    with pytest.raises(NotConfirmed) as caught:
        confirms.wait(second)
    assert caught.value.known is Known.UNKNOWN
    assert first.settled
    assert not second.settled


def test_a_multiple_ack_settles_all_up_to_its_tag(channel: FakeChannel, confirms: ConfirmChannel) -> None:
    """One ack with `multiple` confirms everything sent before, and nothing sent after."""
    tickets = [confirms.send("m", "", "q", str(number)) for number in range(5)]
    channel.ack(3, multiple=True)
    confirms.wait(tickets[0])
    assert [ticket.settled for ticket in tickets] == [True, True, True, False, False]
    assert confirms.outstanding == 2


def test_tag_0_with_multiple_means_all(channel: FakeChannel, confirms: ConfirmChannel) -> None:
    """AMQP's zero tag with `multiple` confirms all that was sent."""
    tickets = [confirms.send("m", "", "q", str(number)) for number in range(3)]
    channel.ack(0, multiple=True)
    confirms.wait(tickets[2])
    assert all(ticket.settled and ticket.failure is None for ticket in tickets)


def test_a_nack_is_a_refusal_that_may_be_tried_again(channel: FakeChannel, confirms: ConfirmChannel) -> None:
    """A nack settles the send as refused, and not for good."""
    ticket = confirms.send("m", "", "q", "a")
    channel.nack(1)
    confirms.wait(ticket)
    assert ticket.failure is not None
    assert ticket.failure.known is Known.REFUSED
    assert not ticket.failure.final


def test_a_returned_message_is_unroutable_although_it_is_acked(channel: FakeChannel, confirms: ConfirmChannel) -> None:
    """The broker acks what it returned: only the return counts."""
    ticket = confirms.send("m", "x", "k", "a")
    channel.give_back("a")
    channel.ack(1)
    confirms.wait(ticket)
    assert ticket.failure is not None
    assert ticket.failure.known is Known.UNROUTABLE
    assert ticket.failure.final


def test_a_return_is_matched_by_its_id(channel: FakeChannel, confirms: ConfirmChannel) -> None:
    """Of two messages under way the one whose inner-msg-id came back is unroutable, the other one landed."""
    first, second = confirms.send("m", "x", "k", "a"), confirms.send("m", "x", "nowhere", "b")
    channel.give_back("b")
    channel.ack(2, multiple=True)
    confirms.wait(second)
    assert first.failure is None
    assert second.failure is not None


def test_two_sends_of_one_id_are_returned_one_by_one(channel: FakeChannel, confirms: ConfirmChannel) -> None:
    """The same id under way twice: each return marks one send."""
    tickets = [confirms.send("m", "x", "k", "a") for _ in range(2)]
    for _ in tickets:
        channel.give_back("a")
    channel.ack(2, multiple=True)
    confirms.wait(tickets[1])
    assert all(ticket.failure is not None for ticket in tickets)


def test_silence_is_unknown_after_the_timeout(channel: FakeChannel, confirms: ConfirmChannel) -> None:
    """Without an answer the wait ends after the timeout, as unknown."""
    ticket = confirms.send("m", "", "q", "a")
    with pytest.raises(NotConfirmed) as caught:
        confirms.wait(ticket)
    assert caught.value.known is Known.UNKNOWN
    assert channel.now == pytest.approx(5.0)


def test_a_blocked_connection_is_waited_for(channel: FakeChannel, confirms: ConfirmChannel) -> None:
    """While the broker blocks publishers the wait is prolonged, since another send could not arrive either."""
    ticket = confirms.send("m", "", "q", "a")
    channel.on_blocked("alarm")
    with pytest.raises(NotConfirmed, match="blocks publishers"):
        confirms.wait(ticket)
    assert channel.now == pytest.approx(20.0)


def test_an_unblocked_connection_has_its_usual_patience(channel: FakeChannel, confirms: ConfirmChannel) -> None:
    """Once unblocked, the timeout counts as always."""
    ticket = confirms.send("m", "", "q", "a")
    channel.on_blocked("alarm")
    channel.script.append(channel.on_unblocked)
    with pytest.raises(NotConfirmed, match="no confirm came"):
        confirms.wait(ticket)
    assert channel.now == pytest.approx(5.0)


def test_a_confirm_that_came_already_needs_no_wait(channel: FakeChannel, confirms: ConfirmChannel) -> None:
    """Waiting for one message settles others too; their own wait reads nothing more."""
    first, second = confirms.send("m", "", "q", "a"), confirms.send("m", "", "q", "b")
    channel.ack(2, multiple=True)
    confirms.wait(second)
    confirms.wait(first)
    assert channel.now == 0.0


def test_an_error_of_the_connection_passes_through(channel: FakeChannel, confirms: ConfirmChannel) -> None:
    """What the driver raises while reading reaches the lane, which judges it."""
    ticket = confirms.send("m", "", "q", "a")

    def cut() -> None:
        raise ConnectionResetError

    channel.script.append(cut)
    with pytest.raises(ConnectionResetError):
        confirms.wait(ticket)
