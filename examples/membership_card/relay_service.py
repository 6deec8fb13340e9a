"""The relay: moves committed messages from the outbox to the broker. The same as

idempotent-bus relay --database sqlite:///charges.db --broker idempotent-sqla+sqlite:///broker.db
"""

from __future__ import annotations

import signal
import sys

from shop import BROKER, CHARGES_DATABASE, NAME, cards_queue, charges, open_database

from idempotent_bus import Relay

if __name__ == "__main__":
    engine = open_database(CHARGES_DATABASE, charges)
    relay = Relay(engine, BROKER, table_prefix=f"{NAME}_bus_", declare=[cards_queue], lease=5.0, poll_interval=0.2)
    signal.signal(signal.SIGTERM, lambda *_: relay.stop())
    relay.run(idle_timeout=float(sys.argv[1]) if len(sys.argv) > 1 else None)
