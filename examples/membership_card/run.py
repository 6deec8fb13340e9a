"""The whole shop: charges payments, relays, issues cards, kills its own processes meanwhile, and counts.

    python run.py --payments 200 --kills 6

Every process is a real one, and every kill is a SIGKILL. In the end there is one card for every charge.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import sqlalchemy as sa
from shop import CARDS_DATABASE, CHARGES_DATABASE, cards, charges, open_database

HERE = Path(__file__).parent


class Service:
    """One process that is started again when it was killed. asks: a file that it reads from its beginning each time."""

    def __init__(self, script: str, asks: Path | None = None) -> None:
        self.script = script
        self.asks = asks
        self.start()

    def start(self) -> None:
        command = [sys.executable, HERE / self.script]
        with open(self.asks or "/dev/null") as asked:
            self.process = subprocess.Popen(command, stdin=asked, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.start()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def per_payment(url: str, table: sa.Table) -> collections.Counter[str]:
    """How often each payment stands in a table."""
    engine = open_database(url, table)
    with engine.connect() as connection:
        found = collections.Counter(connection.scalars(sa.select(table.c.payment_id)))
    engine.dispose()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payments", type=int, default=200)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience", type=float, default=120.0, help="Seconds until all cards must be there.")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    asked = [{"payment_id": f"p-{number}", "cents": 990} for number in range(options.payments)]
    asks = Path("payments.jsonl")
    asks.write_text("".join(json.dumps(payment) + "\n" for payment in asked))
    # Made before the services start, so that a kill meets work and not the making of tables.
    for database, table in ((CHARGES_DATABASE, charges), (CARDS_DATABASE, cards)):
        per_payment(database, table)
    services = [Service("charge_service.py", asks), Service("relay_service.py"), Service("card_service.py")]
    began, killed = time.monotonic(), 0
    try:
        while time.monotonic() - began < options.patience:
            time.sleep(draw.uniform(0.1, 0.5))
            charged, issued = per_payment(CHARGES_DATABASE, charges), per_payment(CARDS_DATABASE, cards)
            if killed < options.kills:
                service = draw.choice(services)
                service.kill()
                killed += 1
            elif len(charged) == options.payments and len(issued) >= len(charged):
                break
    finally:
        for service in services:
            service.stop()
    charged, issued = per_payment(CHARGES_DATABASE, charges), per_payment(CARDS_DATABASE, cards)
    print(f"{killed} kills; {charged.total()} charges, {issued.total()} cards for {options.payments} payments")
    exactly_once = charged == issued == collections.Counter({payment["payment_id"]: 1 for payment in asked})
    print("one charge and one card for every payment" if exactly_once else "SOMETHING IS WRONG")
    return 0 if exactly_once else 1


if __name__ == "__main__":
    sys.exit(main())
