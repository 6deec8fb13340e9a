"""Publisher confirms on one AMQP channel, tracked by delivery tag.

py-amqp's own `confirm_publish` waits for *any* ack: after a timeout it takes the late ack of the first message for
the second, which perhaps never reached the broker. Here every send gets its number, and only that number settles it.
The rule that goes with it: after any doubt the channel, and with it the numbering, is thrown away by its owner.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from amqp import spec

from ..headers import INNER_MSG_ID
from .resend import Known, NotConfirmed

__all__ = ["ConfirmChannel", "Ticket"]

_MANDATORY: Final = True
_IMMEDIATE: Final = False
#: Not 0: in the middle of a frame py-amqp spins on a socket that does not block.
_AT_ONCE: Final = 0.001
#: While the broker blocks the connection, another send could not arrive either: the wait is prolonged so often.
_WAITS_WHILE_BLOCKED: Final = 3


class Ticket:
    """One send that waits for its confirm. settled: the broker answered; failure: what it said, if not yes."""

    __slots__ = ("failure", "inner_msg_id", "settled")

    def __init__(self, inner_msg_id: object) -> None:
        self.inner_msg_id = inner_msg_id
        self.settled = False
        self.failure: NotConfirmed | None = None


class ConfirmChannel:
    """A py-amqp channel in confirm mode with its own count. For one thread at a time, and for this use alone.

    timeout: seconds to wait for a confirm. After an exception from any method the channel is in doubt: its owner
    must throw it away, with its connection, and never ask it again.
    """

    def __init__(self, channel: Any, *, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        channel.confirm_select()
        events = channel.events
        events["basic_ack"].add(self._on_ack)
        events["basic_nack"].add(self._on_nack)
        events["basic_return"].add(self._on_return)
        channel.connection.on_blocked = self._on_blocked
        channel.connection.on_unblocked = self._on_unblocked
        self._channel = channel
        self._connection = channel.connection
        self._timeout = timeout
        self._clock = clock
        self._sent = 0
        self._blocked = False
        self._waiting: dict[int, Ticket] = {}

    @property
    def outstanding(self) -> int:
        """How many sends wait for their confirm."""
        return len(self._waiting)

    def send(self, message: Any, exchange: str, routing_key: str, inner_msg_id: object) -> Ticket:
        """Write one message, mandatory, without waiting. The ticket is settled by a later `wait`."""
        # Not through basic_publish: with confirm_publish set that is py-amqp's own tracking, and it polls the
        # socket before every message.
        self._sent += 1
        ticket = self._waiting[self._sent] = Ticket(inner_msg_id)
        self._channel.send_method(
            spec.Basic.Publish, "Bssbb", (0, exchange, routing_key, _MANDATORY, _IMMEDIATE), message
        )
        return ticket

    def wait(self, ticket: Ticket) -> None:
        """Read answers until this ticket is settled. Raises NotConfirmed(UNKNOWN) when its time is over."""
        if ticket.settled:
            return
        connection, clock = self._connection, self._clock
        deadline = clock() + self._timeout
        prolonged = 0
        while not ticket.settled:
            left = deadline - clock()
            if left <= 0:
                if not self._blocked or prolonged >= _WAITS_WHILE_BLOCKED:
                    raise NotConfirmed(Known.UNKNOWN, self._silence())
                prolonged += 1
                deadline += self._timeout
                continue
            try:
                connection.drain_events(timeout=left)
            except TimeoutError:
                continue

    def read_pending(self) -> None:
        """Take in what the broker has sent meanwhile, without waiting: a closed connection shows itself here."""
        try:
            while True:
                self._connection.drain_events(timeout=_AT_ONCE)
        except TimeoutError:
            return

    def _silence(self) -> str:
        if self._blocked:
            return "the broker blocks publishers (an alarm of its memory or disk) and sent no confirm"
        return f"no confirm came within {self._timeout:g} s"

    def _on_ack(self, delivery_tag: int, multiple: bool) -> None:
        self._settle(delivery_tag, multiple, None)

    def _on_nack(self, delivery_tag: int, multiple: bool) -> None:
        failure = NotConfirmed(Known.REFUSED, "the broker refused the message (nack), as a full queue does")
        self._settle(delivery_tag, multiple, failure)

    def _settle(self, delivery_tag: int, multiple: bool, failure: NotConfirmed | None) -> None:
        waiting = self._waiting
        if not multiple:
            ticket = waiting.pop(delivery_tag, None)
            tickets = [] if ticket is None else [ticket]
        else:
            # A dict keeps the order of sending, so the settled ones are at its front. 0 means all so far.
            last = delivery_tag or self._sent
            tags = []
            for tag in waiting:
                if tag > last:
                    break
                tags.append(tag)
            tickets = [waiting.pop(tag) for tag in tags]
        for ticket in tickets:
            ticket.settled = True
            if ticket.failure is None:  # a returned message is acked too: the return is what counts
                ticket.failure = failure

    def _on_return(self, error: Exception, exchange: str, routing_key: str, message: Any) -> None:
        returned = (message.properties.get("application_headers") or {}).get(INNER_MSG_ID)
        for ticket in self._waiting.values():
            if ticket.inner_msg_id == returned and ticket.failure is None:
                text = f"no queue is bound to exchange {exchange!r} with routing key {routing_key!r}"
                ticket.failure = NotConfirmed(Known.UNROUTABLE, text, final=True)
                return

    def _on_blocked(self, *_: object) -> None:
        self._blocked = True

    def _on_unblocked(self, *_: object) -> None:
        self._blocked = False
