"""The membership card in one file: charge a customer once, issue one card, whatever is sent twice.

    python examples/membership_card/one_file.py

It needs no server: the broker and the dedup store are SQLite files in a temporary folder. Every payment is published
twice under two inner-msg-ids (a sender that asks again by itself), and one of them with another amount.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from kombu import Connection, Exchange, Queue

from idempotent_bus import IdempotentConsumer, IdempotentProducer, idempotent_consumer

paid = Exchange("payments", type="direct")
queue = Queue("cards", exchange=paid, routing_key="paid")
folder = Path(tempfile.mkdtemp())
cards: list[str] = []


@idempotent_consumer(f"sqlite:///{folder}/dedup.db", scope="cards.issue", biz_id="payment_id")
def issue_card(body: dict[str, Any], message: Any) -> str:
    """The effect. Its return value is stored: a duplicate's caller gets it without running."""
    cards.append(body["payment_id"])
    return f"card {len(cards)}"


def main() -> None:
    """Publish, consume, show."""
    payments = [{"payment_id": f"p-{number}", "amount": "9.90"} for number in (1, 2, 3)]
    with Connection(f"idempotent-sqla+sqlite:///{folder}/broker.db") as connection:
        with IdempotentProducer(
            connection, exchange=paid, routing_key="paid", declare=[queue], biz_id="payment_id"
        ) as producer:
            for payment in payments:
                first = producer.publish(payment)
                again = producer.publish(payment, inner_msg_id=first.inner_msg_id)  # a resend: refused at the edge
                producer.publish(payment)  # another publish of the same payment: refused by the record
                print(payment["payment_id"], first.landing.value, again.landing.value)
            producer.publish({"payment_id": "p-1", "amount": "990.00"})  # a conflict: to the queue cards.issue.dead
        consumer = IdempotentConsumer(connection, {queue: issue_card})
        consumer.run(idle_timeout=1)
    print("cards:", cards)
    print({ended.value: number for ended, number in consumer.endings.items()})


if __name__ == "__main__":
    main()
