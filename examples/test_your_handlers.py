"""Ten handlers as people write them, two that are right and eight that are not, before `assert_idempotent`.

    python examples/test_your_handlers.py        # or: pytest examples/test_your_handlers.py

Each runs under the library's guard, which by itself refuses duplicates. What remains is the handler's own: a worker
that dies between the effect and its completion, an answer that does not come, a worker that stood still past its lease.
`assert_idempotent` plays each of these at each step, and says what is wrong, and what to do about it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

from idempotent_bus import IdempotentProducer, Inbox, current_execution, idempotent_consumer, transactional_consumer
from idempotent_bus.testing import NotIdempotent, Reason, assert_idempotent

MESSAGE = {"payment_id": "p-1", "customer": "c-1", "amount": 10}
guarded = idempotent_consumer("memory://", scope="cards.issue", biz_id="payment_id")


class Printer:
    """The card system. One that is given a key prints one card for each key, however often it is asked."""

    def __init__(self) -> None:
        self.cards: list[tuple[str, str | None]] = []
        self._keys: set[str] = set()

    def print_card(self, payment_id: str, key: str | None = None) -> None:
        if key is None or key not in self._keys:
            self.cards.append((payment_id, key))
        if key is not None:
            self._keys.add(key)


class Points:
    """A table of bonus points, and of the payments that they were given for."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}
        self.booked: set[str] = set()

    def has(self, payment_id: str) -> bool:
        return payment_id in self.booked

    def read(self, customer: str) -> int:
        return self.of.get(customer, 0)

    def write(self, customer: str, points: int, payment_id: str) -> None:  # one transaction
        self.of[customer] = points
        self.booked.add(payment_id)

    def add(self, customer: str, points: int, payment_id: str) -> None:  # one statement
        if payment_id not in self.booked:
            self.of[customer] = self.of.get(customer, 0) + points
            self.booked.add(payment_id)


printer, points = Printer(), Points()
producer = IdempotentProducer("memory://", routing_key="issued")
engine = sa.create_engine("sqlite://", poolclass=StaticPool)
with engine.begin() as _connection:
    _connection.execute(sa.text("CREATE TABLE card (payment_id TEXT)"))


def cards_in_database() -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(sa.text("SELECT payment_id FROM card")).scalars())


# --- right --------------------------------------------------------------------------------------------------


@guarded
def with_a_key_for_the_other_side(body, message):
    """The other system dedupes by a key that is the same on every attempt; and what follows is published once."""
    printer.print_card(body["payment_id"], key=current_execution().idempotency_key)
    producer.publish({"card_for": body["payment_id"]}, once="issued")


@transactional_consumer(Inbox(engine), scope="cards.issue", biz_id="payment_id")
def in_the_inbox(body, message, connection):
    """Record and effect are one commit."""
    connection.execute(sa.text("INSERT INTO card VALUES (:payment_id)"), {"payment_id": body["payment_id"]})


# --- wrong --------------------------------------------------------------------------------------------------


@guarded
def naive(body, message):
    """The guard cannot know whether the card was printed before the worker died."""
    printer.print_card(body["payment_id"])


@guarded
def looks_too_late(body, message):
    printer.print_card(body["payment_id"])
    if points.has(body["payment_id"]):
        return
    points.add(body["customer"], 1, body["payment_id"])


@guarded
def with_a_random_key(body, message):
    printer.print_card(body["payment_id"], key=str(uuid.uuid4()))


@guarded
def swallows(body, message):
    try:
        printer.print_card(body["payment_id"], key=body["payment_id"])
    except Exception:  # noqa: BLE001 - that is what is wrong here
        print("the printer is away")


@transactional_consumer(Inbox(engine), scope="cards.issue", biz_id="payment_id")
def commits(body, message, connection):
    connection.execute(sa.text("INSERT INTO card VALUES (:payment_id)"), {"payment_id": body["payment_id"]})
    connection.commit()


@guarded
def reads_then_writes(body, message):
    if points.has(body["payment_id"]):
        return
    balance = points.read(body["customer"])
    points.write(body["customer"], balance + body["amount"], body["payment_id"])


@guarded
def publishes_anew(body, message):
    printer.print_card(body["payment_id"], key=body["payment_id"])
    producer.publish({"card_for": body["payment_id"]})


@guarded
def changes_the_body(body, message):
    body["amount"] = body["amount"] * 100  # in cents
    points.add(body["customer"], body["amount"], body["payment_id"])


#: The handler, what its effects are seen by, what it calls outside, and what is wrong with it.
HANDLERS: list[tuple[Callable[..., Any], Callable[[], Any], list[tuple[Any, str]], Reason | None]] = [
    (with_a_key_for_the_other_side, lambda: printer.cards, [(printer, "print_card")], None),
    (in_the_inbox, cards_in_database, [], None),
    (naive, lambda: printer.cards, [(printer, "print_card")], Reason.REPEATED),
    (
        looks_too_late,
        lambda: (printer.cards, points.of),
        [(printer, "print_card"), (points, "has"), (points, "add")],
        Reason.CHECKED_LATE,
    ),
    (with_a_random_key, lambda: printer.cards, [(printer, "print_card")], Reason.UNSTABLE),
    (swallows, lambda: printer.cards, [(printer, "print_card")], Reason.SWALLOWED),
    (commits, cards_in_database, [], Reason.COMMITTED),
    (reads_then_writes, lambda: points.of, [(points, "has"), (points, "read"), (points, "write")], Reason.NOT_ATOMIC),
    (publishes_anew, lambda: printer.cards, [(printer, "print_card")], Reason.PUBLISHED_ANEW),
    (changes_the_body, lambda: points.of, [(points, "add")], Reason.MUTATED),
]


def judge(number: int) -> set[Reason]:
    """What is wrong with one of them."""
    handler, observe, outside, _ = HANDLERS[number]
    try:
        assert_idempotent(handler, MESSAGE, observe=observe, outside=outside)
    except NotIdempotent as flawed:
        print(flawed, end="\n\n")
        return flawed.reasons
    print(f"{handler.__name__} is idempotent\n")
    return set()


def test_each_is_judged_rightly() -> None:
    """Two pass, and eight are named, each with its own reason and no other."""
    for number, (*_, reason) in enumerate(HANDLERS):
        assert judge(number) == ({reason} if reason else set())


if __name__ == "__main__":
    for index in range(len(HANDLERS)):
        judge(index)
