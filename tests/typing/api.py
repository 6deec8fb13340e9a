"""The public face as a type checker sees it: this file is checked by mypy --strict, and never run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from kombu import Connection, Queue
from kombu.message import Message
from typing_extensions import assert_type

from idempotent_bus import (
    INNER_MSG_ID,
    Backoff,
    Ended,
    Execution,
    IdempotentConsumer,
    IdempotentHandler,
    IdempotentProducer,
    Inbox,
    Receipt,
    Store,
    current_execution,
    idempotent_consumer,
    idempotent_producer,
    open_store,
    transactional_consumer,
)
from idempotent_bus.testing import Delivered, FaultyStore, Finding, Way, assert_idempotent, deliver, find_flaws

Body = dict[str, Any]


def plain_handler(body: Body) -> None:
    """As a user may write it, before it is guarded."""


connection = Connection("memory://")
queue = Queue("cards")
store = open_store("memory://")
assert_type(store, Store)
message: Message = None

# --- consumers --------------------------------------------------------------------------------------


@idempotent_consumer(store, scope="cards.issue", biz_id="payment_id")
def issue(body: Body, message: Message) -> int:
    assert_type(current_execution(), Execution)
    return 7


assert_type(issue({}, message), int | None)  # None: nothing ran
assert_type(issue.__wrapped__({}, message), int)  # the plain handler, with its own types
issue.__wrapped__("no body", message)  # type: ignore[arg-type]  # what the handler takes is still known
issue({})  # type: ignore[call-arg]  # a kombu callback takes a body and a message
callback: Callable[[Any, Message], Any] = issue
handler: IdempotentHandler = issue
on_decode_error: Callable[[Message, Exception], None] = issue.on_decode_error
assert_type(issue.scope, str)
assert_type(issue.dead_letter, str)


@idempotent_consumer(
    lambda: store,
    scope="cards.issue",
    biz_id=lambda body: body["payment_id"],
    fingerprint=("payment_id", "amount"),
    manual=True,
    lease=60,
    retention=86_400,
    max_attempts=3,
    backoff=Backoff(base=1, cap=60),
    permanent=(ValueError,),
    busy_delay=0.5,
    dead_letter="graveyard",
)
def manual(body: Body, message: Message) -> None:
    current_execution().complete({"card": 1})
    assert_type(current_execution().token, int)


class Cards:
    """Methods are guarded as functions are."""

    @idempotent_consumer("memory://", scope="cards.issue", biz_id=INNER_MSG_ID)
    def issue(self, body: Body, message: Message) -> str:
        return "card"


assert_type(Cards().issue({}, message), str | None)

idempotent_consumer(store, "cards.issue", "payment_id")  # type: ignore[call-arg]  # the call shows the whole policy
idempotent_consumer(store, biz_id="payment_id")  # type: ignore[call-arg]  # a scope must be given
idempotent_consumer(store, scope="s", biz_id=7)  # type: ignore[arg-type]  # a path, a function or INNER_MSG_ID

# --- inbox --------------------------------------------------------------------------------------------

inbox = Inbox(sa.create_engine("sqlite://"))


@transactional_consumer(inbox, scope="cards.issue", biz_id="payment_id")
def issue_in_transaction(body: Body, message: Message, connection: sa.Connection) -> dict[str, int]:
    return {"card": 7}


assert_type(issue_in_transaction({}, message), dict[str, int] | None)
assert_type(inbox.purge(limit=10), int)

# --- IdempotentConsumer ---------------------------------------------------------------------------------

consumer = IdempotentConsumer(
    connection, {queue: issue, Queue("x"): issue_in_transaction}, prefetch=10, accept=["json"]
)
assert_type(consumer.run(idle_timeout=5), int)
assert_type(consumer.endings[Ended.COMPLETED], int)
consumer.stop()
IdempotentConsumer("memory://", {queue: print})  # type: ignore[dict-item]  # an unguarded function

# --- producers --------------------------------------------------------------------------------------------

with IdempotentProducer(connection, biz_id="payment_id") as producer:
    assert_type(producer.publish({"payment_id": "p-1"}, routing_key="cards"), Receipt)
    assert_type(producer.publish_many([{"payment_id": "p-1"}]), list[Receipt])


@idempotent_producer(connection, routing_key="cards")
def paid(payment_id: str, amount: int) -> Body:
    return {"payment_id": payment_id, "amount": amount}


assert_type(paid("p-1", amount=990), Receipt)
paid(1, 2)  # type: ignore[arg-type]  # the function's own parameters stay

# --- the kit for tests ------------------------------------------------------------------------------

bank: list[str] = []
flaws = find_flaws(plain_handler, {"payment_id": "p-1"}, observe=lambda: bank, outside=[(bank, "append")])
assert_type(flaws, list[Finding])
assert_idempotent(plain_handler, [{"payment_id": "p-1"}, {"payment_id": "p-2"}], observe=lambda: bank)
faulty: Store = FaultyStore(open_store("memory://"))
assert_type(deliver(plain_handler, {"payment_id": "p-1"}, way=Way.LATE), Delivered)
