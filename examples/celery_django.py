"""Django and Celery in one file: a view charges, a task issues the card, and each payment gets one card.

    pip install 'idempotent-bus[celery,django]'
    python examples/celery_django.py

It needs no servers: database, broker and the inbox are SQLite files in the folder SHOP. With PostgreSQL
and RabbitMQ only DATABASES and BROKER change, and the three parts run as processes of their own: `manage.py runserver`,
`manage.py relay`, which sends what was committed, and `celery -A ... worker`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import django
from celery import Celery
from django.conf import settings
from django.core.management import call_command

TEMPORARY = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # removed at the end
FOLDER = os.environ.setdefault("SHOP", TEMPORARY.name)  # the worker below inherits it
BROKER = os.environ.get("BROKER", f"idempotent-sqla+sqlite:///{FOLDER}/broker.db")
PAYMENTS = [f"p-{number:02}" for number in range(10)]

# --- settings.py ------------------------------------------------------------------------------------------

settings.configure(
    SECRET_KEY="an example",  # noqa: S106
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    USE_TZ=True,
    INSTALLED_APPS=["idempotent_bus.django"],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": f"{FOLDER}/shop.db",
            "ATOMIC_REQUESTS": True,
            # The write lock first: Django 5.1 and later.
            "OPTIONS": {"transaction_mode": "IMMEDIATE"} if django.VERSION >= (5, 1) else {},
        }
    },
    IDEMPOTENT_BUS={"BROKER": BROKER},
)
django.setup()

from django.db import connection, models  # noqa: E402 - after the settings, in one file
from django.http import HttpRequest, HttpResponse  # noqa: E402
from django.test import Client  # noqa: E402
from django.urls import path  # noqa: E402

from idempotent_bus.celery import setup  # noqa: E402

# --- celery.py --------------------------------------------------------------------------------------------

app = Celery("celery_django", broker=BROKER)
app.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True)
setup(app, inbox="django")  # the record of a task is in Django's database, in the transaction of what it does

# --- models.py --------------------------------------------------------------------------------------------


class Charge(models.Model):
    """Money that was taken."""

    payment_id = models.CharField(max_length=40, unique=True)

    class Meta:
        app_label = "shop"


class Card(models.Model):
    """A membership card. Nothing here forbids two for one payment: the inbox does."""

    payment_id = models.CharField(max_length=40)

    class Meta:
        app_label = "shop"


# --- tasks.py ---------------------------------------------------------------------------------------------


@app.task(scope="cards.issue", biz_id="payment_id")
def issue_card(payment_id: str) -> None:
    """One card for each payment, however often the message comes. It runs in `transaction.atomic`."""
    Card.objects.create(payment_id=payment_id)


# --- views.py and urls.py ---------------------------------------------------------------------------------


def charge(request: HttpRequest, payment_id: str) -> HttpResponse:
    """Charge, and have the card issued: one commit, under ATOMIC_REQUESTS."""
    Charge.objects.create(payment_id=payment_id)
    # Not transaction.on_commit(lambda: issue_card.delay(payment_id)): that message leaves after the commit, and a
    # process that dies between the two has charged a customer who never gets a card.
    issue_card.delay_in_transaction(payment_id)
    return HttpResponse("charged")


urlpatterns = [path("charge/<str:payment_id>/", charge)]

# --- what a day brings ------------------------------------------------------------------------------------


def main() -> None:
    """Ten customers pay; each message is sent once more by somebody who was not sure."""
    call_command("migrate", verbosity=0)
    with connection.schema_editor() as editor:
        editor.create_model(Charge)
        editor.create_model(Card)
    client = Client()
    for payment in PAYMENTS:
        client.get(f"/charge/{payment}/")
        issue_card.delay(payment)
    call_command("relay", once=True)
    worker = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", Path(__file__).stem, "worker", "-P", "solo", "-l", "ERROR"],
        cwd=Path(__file__).parent,
        stdout=subprocess.DEVNULL,
    )
    try:
        give_up = time.monotonic() + 60
        while Card.objects.count() < len(PAYMENTS) and time.monotonic() < give_up:
            time.sleep(0.1)
        time.sleep(1.0)  # what comes now would be a card too many
    finally:
        worker.terminate()
        worker.wait()
    charges, cards = (sorted(kind.objects.values_list("payment_id", flat=True)) for kind in (Charge, Card))
    assert charges == cards == PAYMENTS, "a card too many, or too few"
    print(f"{len(charges)} charges = {len(cards)} cards")


if __name__ == "__main__":
    main()
