"""Any order of publishes, answers, deaths and redrives: a transport and a dictionary must agree where each message is.

A long form, as for the stores: `python tests/contract/run_machines.py`.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from kombu import Connection, Queue
from transports import TRANSPORTS

from idempotent_bus.headers import INNER_MSG_ID
from idempotent_bus.model import Landing, Reason
from idempotent_bus.msgid import new_inner_msg_id
from idempotent_bus.redrive import redrive
from idempotent_bus.testing.transport_contract import Taker, TransportSubject, publish

#: Which of the messages in hand; more than there are: the last one.
WHICH = st.integers(0, 3)
IDS = st.integers(0, 4)


class Agreement(RuleBasedStateMachine):
    """A transport beside its model: how many of each message are in the queue, in hand, and dead."""

    subject: TransportSubject

    @initialize()
    def begin(self) -> None:
        self.queue = self.subject.new_queue()
        self.dead = Queue(f"{self.queue.name}.dead", routing_key=f"{self.queue.name}.dead")
        self.ids = [new_inner_msg_id() for _ in range(5)]
        self.landed: set[int] = set()
        self.queued: Counter[int] = Counter()
        self.buried: Counter[int] = Counter()
        self.held: list[tuple[int, Any]] = []
        self.stack = contextlib.ExitStack()
        self.producer = self.stack.enter_context(self.subject.publisher(self.queue))
        self.taker = Taker(self.subject.connect(), self.queue, self.subject.patience)

    @rule(number=IDS)
    def publish(self, number: int) -> None:
        landing = publish(self.producer, self.queue, self.ids[number], body=number).landing
        assert landing is (Landing.DUPLICATE if number in self.landed else Landing.LANDED)
        self.queued[number] += number not in self.landed
        self.landed.add(number)

    @precondition(lambda self: self.queued.total())
    @rule()
    def take(self) -> None:
        """All that the queue has comes, each message once, and nothing else."""
        came: Counter[int] = Counter()
        for _ in range(self.queued.total()):
            message = self.taker.next()
            assert message is not None, f"lost: {self.queued - came}"
            number = self.ids.index(message.headers[INNER_MSG_ID])
            assert message.payload == number
            came[number] += 1
            self.held.append((number, message))
        assert came == self.queued
        self.queued.clear()

    def _in_hand(self, which: int) -> tuple[int, Any]:
        return self.held.pop(min(which, len(self.held) - 1))

    @precondition(lambda self: self.held)
    @rule(which=WHICH)
    def ack(self, which: int) -> None:
        _, message = self._in_hand(which)
        self.taker.settlement(message).ack()

    @precondition(lambda self: self.held)
    @rule(which=WHICH)
    def requeue(self, which: int) -> None:
        number, message = self._in_hand(which)
        message.requeue()
        self.queued[number] += 1

    @precondition(lambda self: self.held)
    @rule(which=WHICH)
    def wait(self, which: int) -> None:
        number, message = self._in_hand(which)
        self.taker.settlement(message).wait(0.001)
        self.queued[number] += 1

    @precondition(lambda self: self.held)
    @rule(which=WHICH)
    def bury(self, which: int) -> None:
        number, message = self._in_hand(which)
        assert self.taker.settlement(message).dead_letter(Reason.PERMANENT, "no", 1)
        self.buried[number] += 1

    @precondition(lambda self: self.buried.total())
    @rule()
    def redrive(self) -> None:
        with self.subject.connect() as connection:
            assert redrive(connection, self.dead.name).moved == self.buried.total()
        self.queued += self.buried
        self.buried.clear()

    @rule()
    def consumer_stops(self) -> None:
        """What it has goes back."""
        self.taker.close()
        self.queued.update(number for number, _ in self.held)
        self.held.clear()
        self.taker = Taker(self.subject.connect(), self.queue, self.subject.patience)

    def teardown(self) -> None:
        if not hasattr(self, "taker"):
            return
        try:
            self.consumer_stops()
            self.take()
            assert self.taker.next(0.005) is None, "more than there should be"
            with self.subject.taker(self.dead) as taker:
                dead = Counter(taker.must().payload for _ in range(self.buried.total()))
            assert dead == self.buried
        finally:
            self.taker.close()
            self.stack.close()
            self.subject.delete(self.queue)


EXAMPLES = {"sqlite": 12, "redis": 12}
STEPS = 25


def agree(
    subject: TransportSubject, examples: int, steps: int = STEPS, phases: tuple[Phase, ...] = tuple(Phase)
) -> None:
    machine = type("Machine", (Agreement,), {"subject": subject})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=not os.environ.get("IDEMPOTENT_BUS_LONG"),
            report_multiple_bugs=False,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_transport_agrees_with_its_model(name: str, tmp_path: Path) -> None:
    """I1: whatever is done in whatever order, each message is where it should be, as often as it should be."""
    with TRANSPORTS[name](tmp_path) as subject:
        agree(subject, EXAMPLES[name])


def test_the_model_notices() -> None:
    """The control: kombu's memory transport lands copies, and forgets what its channel had when that closes."""
    with pytest.raises(AssertionError):
        agree(TransportSubject(lambda: Connection("memory://"), patience=0.2), 30, phases=(Phase.generate,))
