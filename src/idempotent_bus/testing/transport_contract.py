"""The transport contract as tests: what a kombu transport must do to say `idempotent_edge` of its channels.

Over one fixture, `contract_transport`. The class knows no particular transport. To hold one of your own to the
contract, subclass it and give a fixture that yields a `TransportSubject`. A check takes nothing but the subject, so
that it can be called by hand too: `TransportContract().test_...(subject)`; that is how the controls are judged.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from kombu import Connection, Consumer, Exchange, Queue
from kombu.message import Message

from ..errors import Unroutable
from ..headers import DEAD_REASON, INNER_MSG_ID, REDRIVE
from ..kombu_message import came_back
from ..model import Landing, Reason, Receipt
from ..msgid import new_inner_msg_id
from ..producer import IdempotentProducer
from ..redrive import redrive
from ..settlement import MessageSettlement

__all__ = ["Taker", "TransportContract", "TransportSubject", "publish"]

#: Seconds. How long nothing must come before it is taken for nothing; and within which what is due must come.
QUIET = 0.2
_PATIENCE = 15.0


@dataclass
class TransportSubject:
    """A transport to be held to the contract. connect: gives a connection of its own each time.

    patience: seconds within which what is due must come.
    """

    connect: Callable[[], Connection]
    patience: float = _PATIENCE

    def new_queue(self) -> Queue:
        """A queue that no other check has."""
        name = f"contract-{uuid.uuid4().hex[:12]}"
        return Queue(name, routing_key=name)

    @contextlib.contextmanager
    def taker(self, queue: Queue) -> Iterator[Taker]:
        """A consumer on a connection of its own, that is closed in the end."""
        taker = Taker(self.connect(), queue, self.patience)
        try:
            yield taker
        finally:
            taker.close()

    @contextlib.contextmanager
    def publisher(self, *declared: Queue | Exchange) -> Iterator[IdempotentProducer]:
        """A producer on a connection of its own."""
        with self.connect() as connection, IdempotentProducer(connection, declare=declared) as producer:
            yield producer

    def delete(self, *queues: Queue) -> None:
        """Delete these queues, and their dead letters."""
        with self.connect() as connection:
            for queue in queues:
                for name in (queue.name, f"{queue.name}.dead"):
                    with contextlib.suppress(Exception):
                        connection.default_channel.queue_delete(name)


class Taker:
    """Takes messages as kombu's Consumer gives them, and answers them as the library does."""

    def __init__(self, connection: Connection, queue: Queue, patience: float = _PATIENCE) -> None:
        self.queue = queue
        self._patience = patience
        self.connection = connection
        self._got: deque[Message] = deque()
        channel = connection.channel()
        consumer = Consumer(channel, [queue], on_message=self._got.append, no_ack=False)
        consumer.consume()

    def next(self, timeout: float | None = None) -> Message | None:
        """The next message; None if none came in so many seconds."""
        until = time.monotonic() + (self._patience if timeout is None else timeout)
        while not self._got and (left := until - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError, OSError):
                self.connection.drain_events(timeout=max(min(left, 0.2), 0.001))
        return self._got.popleft() if self._got else None

    def must(self) -> Message:
        """The next message, which must come."""
        message = self.next()
        assert message is not None, "the message never came"
        return message

    def settlement(self, message: Message) -> MessageSettlement:
        """How the library answers it."""
        return MessageSettlement(
            message, queue=self.queue.name, scope="contract", dead_letter=f"{self.queue.name}.dead"
        )

    def close(self) -> None:
        """As a consumer that stops: what is not settled goes back to the broker."""
        with contextlib.suppress(Exception):
            self.connection.close()


def publish(producer: IdempotentProducer, queue: Queue, identity: str | None = None, body: Any = "a") -> Receipt:
    """Publish to this queue, under this inner-msg-id."""
    return producer.publish(body, routing_key=queue.name, inner_msg_id=identity)


class TransportContract:
    """The edge, and that nothing is lost."""

    def test_a_publish_lands_once(self, contract_transport: TransportSubject) -> None:
        """However often it is sent, by whatever connection: one message, and each copy hears that it is one."""
        queue, identity = contract_transport.new_queue(), new_inner_msg_id()
        for copy in range(3):
            with contract_transport.publisher(queue) as producer:
                landing = publish(producer, queue, identity).landing
            assert landing is (Landing.DUPLICATE if copy else Landing.LANDED)
        with contract_transport.taker(queue) as taker:
            assert taker.must().headers[INNER_MSG_ID] == identity
            assert taker.next(QUIET) is None
        contract_transport.delete(queue)

    def test_each_queue_has_an_edge_of_its_own(self, contract_transport: TransportSubject) -> None:
        """A copy for another queue is no copy."""
        one, other = contract_transport.new_queue(), contract_transport.new_queue()
        identity = new_inner_msg_id()
        with contract_transport.publisher(one, other) as producer:
            assert publish(producer, one, identity).landed
            assert publish(producer, other, identity).landed
        contract_transport.delete(one, other)

    def test_of_racing_copies_one_lands(self, contract_transport: TransportSubject) -> None:
        """Landing and marking are one atomic step."""
        queue, identity = contract_transport.new_queue(), new_inner_msg_id()
        with contract_transport.publisher(queue):
            pass
        barrier, landings = threading.Barrier(6), []

        def race() -> None:
            with contract_transport.publisher(queue) as producer:
                barrier.wait(30)
                landings.append(publish(producer, queue, identity).landing)

        threads = [threading.Thread(target=race) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(landing.value for landing in landings) == ["duplicate"] * 5 + ["landed"]
        with contract_transport.taker(queue) as taker:
            taker.must()
            assert taker.next(QUIET) is None
        contract_transport.delete(queue)

    def test_what_no_queue_takes_is_said(self, contract_transport: TransportSubject) -> None:
        """Unroutable is an error, never silence."""
        nowhere = Exchange(contract_transport.new_queue().name, "direct")
        with contract_transport.publisher(nowhere) as producer, pytest.raises(Unroutable):
            producer.publish("a", exchange=nowhere, routing_key="nobody")

    def test_what_is_acked_is_gone(self, contract_transport: TransportSubject) -> None:
        """And its id stays known."""
        queue, identity = contract_transport.new_queue(), new_inner_msg_id()
        with contract_transport.publisher(queue) as producer:
            publish(producer, queue, identity)
            with contract_transport.taker(queue) as taker:
                taker.settlement(taker.must()).ack()
            assert not publish(producer, queue, identity).landed
        with contract_transport.taker(queue) as taker:
            assert taker.next(QUIET) is None
        contract_transport.delete(queue)

    def test_what_is_not_settled_comes_back(self, contract_transport: TransportSubject) -> None:
        """I1: after its consumer has gone, as the same message, and as one that may have been delivered before."""
        queue = contract_transport.new_queue()
        with contract_transport.publisher(queue) as producer:
            identities = {publish(producer, queue, body=number).inner_msg_id for number in range(3)}
        with contract_transport.taker(queue) as taker:
            for _ in range(3):
                taker.must()
        with contract_transport.taker(queue) as taker:
            again = [taker.must() for _ in range(3)]
            assert {message.headers[INNER_MSG_ID] for message in again} == identities
            assert all(came_back(message) for message in again)
            assert taker.next(QUIET) is None
        contract_transport.delete(queue)

    def test_a_requeue_is_no_copy(self, contract_transport: TransportSubject) -> None:
        """I1: what is put back passes the edge."""
        queue = contract_transport.new_queue()
        with contract_transport.publisher(queue) as producer:
            identity = publish(producer, queue).inner_msg_id
        with contract_transport.taker(queue) as taker:
            taker.must().requeue()
            again = taker.must()
            assert again.headers[INNER_MSG_ID] == identity
            again.ack()
        contract_transport.delete(queue)

    def test_a_wait_is_kept_and_holds_up_nobody(self, contract_transport: TransportSubject) -> None:
        """It comes back no sooner, though its consumer is gone, as one that may have run; others go on meanwhile."""
        queue = contract_transport.new_queue()
        with contract_transport.publisher(queue) as producer:
            first = publish(producer, queue, body="first").inner_msg_id
            with contract_transport.taker(queue) as taker:
                began = time.monotonic()
                taker.settlement(taker.must()).wait(1.0)
                publish(producer, queue, body="second")
                neighbour = taker.must()
                assert neighbour.payload == "second"
                taker.settlement(neighbour).ack()
        with contract_transport.taker(queue) as taker:
            again = taker.must()
            assert time.monotonic() - began >= 0.95
            assert again.headers[INNER_MSG_ID] == first
            assert again.payload == "first"
            assert came_back(again)
            taker.settlement(again).ack()
        contract_transport.delete(queue)

    def test_dead_and_redriven_and_dead_again(self, contract_transport: TransportSubject) -> None:
        """I12: the dead letter has it with the reason; a redrive moves it back past the edge, however often."""
        queue = contract_transport.new_queue()
        with contract_transport.publisher(queue) as producer:
            identity = publish(producer, queue, body={"text": "\u00fc\U0001f4a5"}).inner_msg_id
        for number in range(3):
            with contract_transport.taker(queue) as taker:
                message = taker.must()
                assert message.headers[INNER_MSG_ID] == identity
                assert message.payload == {"text": "\u00fc\U0001f4a5"}
                assert int(message.headers.get(REDRIVE, 0)) == number
                assert taker.settlement(message).dead_letter(Reason.ATTEMPTS, "no", 3)
                assert taker.next(QUIET) is None
            dead = Queue(f"{queue.name}.dead", routing_key=f"{queue.name}.dead")
            with contract_transport.taker(dead) as taker:
                assert taker.must().headers[DEAD_REASON] == Reason.ATTEMPTS.value
            with contract_transport.connect() as connection:
                assert redrive(connection, dead.name).moved == 1
        contract_transport.delete(queue)

    def test_a_late_ack_loses_nothing(self, contract_transport: TransportSubject) -> None:
        """I1, I4: an answer on a channel that is closed does not ack what has gone back to the broker."""
        queue = contract_transport.new_queue()
        with contract_transport.publisher(queue) as producer:
            publish(producer, queue)
        with contract_transport.taker(queue) as taker:
            late = taker.must()
        with contextlib.suppress(Exception):  # it may say so, or not
            taker.settlement(late).ack()
        with contract_transport.taker(queue) as taker:
            taker.must()
        contract_transport.delete(queue)
