"""A Celery application in one file: whoever pays is charged once and gets one membership card.

    pip install 'idempotent-bus[celery,sql]'
    python examples/celery_app.py

It needs no servers: broker, results, dedup store and the shop's database are SQLite files in the folder SHOP.
With servers only the URLs change, `redis://localhost:6379/0` or `amqp://guest@localhost//` for BROKER,
`redis://localhost:6379/1` for RESULTS and DEDUP, `postgresql+psycopg://...` for DATABASE, and the worker is
Celery's own: `celery -A celery_app worker`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import sqlalchemy as sa
from celery import Celery, chain

from idempotent_bus import Inbox, current_execution
from idempotent_bus.celery import setup

TEMPORARY = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # removed at the end
FOLDER = os.environ.setdefault("SHOP", TEMPORARY.name)  # the worker below inherits it
BROKER = os.environ.get("BROKER", f"sqla+sqlite:///{FOLDER}/broker.db")
RESULTS = os.environ.get("RESULTS", f"db+sqlite:///{FOLDER}/results.db")
DEDUP = os.environ.get("DEDUP", f"sqlite:///{FOLDER}/dedup.db")
DATABASE = os.environ.get("DATABASE", f"sqlite:///{FOLDER}/shop.db")

# --- the application --------------------------------------------------------------------------------------

app = Celery("celery_app", broker=BROKER, backend=RESULTS)
app.conf.broker_connection_retry_on_startup = True

# The one line for all tasks: those that name a scope below are guarded, the others stay as they are.
setup(app, store=DEDUP)

database = sa.create_engine(DATABASE)
cards = sa.Table("membership_card", sa.MetaData(), sa.Column("payment_id", sa.String(40)))  # nothing forbids two


@app.task(scope="payments.charge", biz_id="payment_id")
def charge(payment_id: str, cents: int) -> str:
    """An effect elsewhere. If its worker dies right after it, it runs again with the same key: the provider knows."""
    provider_charges(current_execution().idempotency_key, cents)
    return payment_id


@app.task(scope="cards.issue", biz_id="payment_id", inbox=Inbox(database))
def issue_card(payment_id: str, connection: sa.Connection) -> str:
    """An effect in our own database. It commits together with the record that it was done, or not at all."""
    connection.execute(sa.insert(cards), {"payment_id": payment_id})
    return f"card for {payment_id}"


@app.task
def greet(card: str) -> str:
    """A plain task, as it always was."""
    return f"welcome, your {card} is on its way"


# --- what a day brings ------------------------------------------------------------------------------------


def provider_charges(idempotency_key: str, cents: int) -> None:
    """The payment provider, which takes an idempotency key as most do. Here a folder with a file for each charge."""
    (Path(FOLDER) / f"{idempotency_key}.charge").write_text(str(cents))


def main() -> None:
    """Ten customers pay, and each clicks twice."""
    cards.create(database)
    worker = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "celery_app", "worker", "-P", "solo", "-l", "ERROR"],
        cwd=Path(__file__).parent,
        stdout=subprocess.DEVNULL,
    )
    try:
        payments = [f"p-{number}" for number in range(10)]
        clicks = [
            chain(charge.s(payment, 990), issue_card.s(), greet.s()).delay() for payment in payments for _ in range(2)
        ]
        answers = [click.get(timeout=60) for click in clicks]  # the second click is answered as the first
    finally:
        worker.terminate()
        worker.wait()
    charges = len(list(Path(FOLDER).glob("*.charge")))
    with database.connect() as connection:
        issued = connection.execute(sa.select(sa.func.count()).select_from(cards)).scalar_one()
    assert len(set(answers)) == len(payments)
    print(f"{len(clicks)} clicks, {charges} charges, {issued} cards")


if __name__ == "__main__":
    main()
