"""The card service: issues one card per payment. Card and record are one commit, so that one card is exactly one.

python card_service.py          # until it is stopped; a number of seconds as argument: until it is quiet for so long
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import sqlalchemy as sa
from kombu import Connection
from shop import BROKER, CARDS_DATABASE, NAME, cards, cards_queue, open_database

from idempotent_bus import IdempotentConsumer, Inbox, transactional_consumer

engine = open_database(CARDS_DATABASE, cards)


@transactional_consumer(Inbox(engine, table_prefix=f"{NAME}_bus_"), scope=f"{NAME}.issue", biz_id="payment_id")
def issue_card(body: dict[str, Any], message: Any, connection: sa.Connection) -> None:
    """The effect, written with the connection whose transaction holds the record too."""
    connection.execute(sa.insert(cards).values(payment_id=body["payment_id"]))


if __name__ == "__main__":
    with Connection(BROKER, transport_options={"visibility_timeout": 5}) as broker:
        consumer = IdempotentConsumer(broker, {cards_queue: issue_card})
        signal.signal(signal.SIGTERM, lambda *_: consumer.stop())
        consumer.run(idle_timeout=float(sys.argv[1]) if len(sys.argv) > 1 else None)
