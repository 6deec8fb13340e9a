"""The charge service: takes money, once per payment, and tells so in the same commit.

    echo '{"payment_id": "p-1", "cents": 990}' | python charge_service.py

Whoever asks to charge may ask twice (a browser's button, a restart): the inbox's record knows. The message to the card
service is a row of the outbox until `relay_service.py` (or `idempotent-bus relay`) has sent it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import sqlalchemy as sa
from shop import CHARGES_DATABASE, NAME, charges, open_database, paid

from idempotent_bus import Inbox, Outbox

engine = open_database(CHARGES_DATABASE, charges)
inbox = Inbox(engine, table_prefix=f"{NAME}_bus_")
outbox = Outbox(engine, table_prefix=f"{NAME}_bus_", exchange=paid, routing_key="paid", biz_id="payment_id")


def charge(payment: dict[str, Any]) -> bool:
    """Charge the customer. False: that was done before."""
    with engine.begin() as connection:
        if not inbox.record(connection, "payments.charge", payment["payment_id"]):
            return False
        connection.execute(sa.insert(charges).values(payment))
        outbox.add(connection, {"payment_id": payment["payment_id"]})
    return True


if __name__ == "__main__":
    inbox.create()
    for line in sys.stdin:
        asked = json.loads(line)
        print(asked["payment_id"], "charged" if charge(asked) else "was charged before", flush=True)
