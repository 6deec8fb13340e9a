"""A Django project in one file: whoever pays gets one membership card, and never two.

    pip install 'idempotent-bus[django]'
    python examples/django_app.py

The view charges and adds the message to the outbox: ATOMIC_REQUESTS makes the two one commit. The relay brings it to
the broker. The consumer issues the card, with its record in the same transaction. All of it is in two SQLite files;
with PostgreSQL and RabbitMQ only DATABASES and BROKER change, and the three parts run as processes of their own:
`manage.py runserver`, `manage.py relay`, and `idempotent-bus worker` with a module that calls django.setup() first.
"""

from __future__ import annotations

import logging
import random
import tempfile
from typing import Any

import django
from django.conf import settings
from django.core.management import call_command

FOLDER = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # removed at the end
BROKER = f"idempotent-sqla+sqlite:///{FOLDER.name}/broker.db"
PAYMENTS = [f"p-{number:02}" for number in range(20)]

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
            "NAME": f"{FOLDER.name}/shop.db",
            "ATOMIC_REQUESTS": True,
            # The write lock first: Django 5.1 and later.
            "OPTIONS": {"transaction_mode": "IMMEDIATE"} if django.VERSION >= (5, 1) else {},
        }
    },
    IDEMPOTENT_BUS={"BROKER": BROKER, "OUTBOX": {"ROUTING_KEY": "cards", "BIZ_ID": "payment_id"}},
)
django.setup()

from django.db import connection, models  # noqa: E402 - after the settings, in one file
from django.http import HttpRequest, HttpResponse  # noqa: E402
from django.test import Client  # noqa: E402
from django.urls import path  # noqa: E402
from kombu import Connection, Exchange, Queue  # noqa: E402

from idempotent_bus import IdempotentConsumer  # noqa: E402
from idempotent_bus.django import outbox, transactional_consumer  # noqa: E402

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


# --- views.py and urls.py ---------------------------------------------------------------------------------


def charge(request: HttpRequest, payment_id: str) -> HttpResponse:
    """Charge, and say so to the card service: both are committed at the request's end, or neither."""
    Charge.objects.create(payment_id=payment_id)
    outbox.add({"payment_id": payment_id})
    if "fail" in request.GET:
        raise RuntimeError("the last line of the view failed")
    return HttpResponse("charged")


urlpatterns = [path("charge/<str:payment_id>/", charge)]

# --- consumers.py -----------------------------------------------------------------------------------------

CARDS = Queue("cards", Exchange(""), durable=True)


@transactional_consumer(scope="cards.issue", biz_id="payment_id", max_attempts=20)
def issue_card(body: Any, message: Any) -> None:
    """One card for each payment, however often the message comes."""
    Card.objects.create(payment_id=body["payment_id"])
    if random.random() < 0.2:
        raise RuntimeError("the handler failed after it had issued the card")  # which is rolled back


# --- what a day brings ------------------------------------------------------------------------------------


def main() -> None:
    """Pay, some of it twice, some of it in vain; relay; issue."""
    logging.disable()  # what fails here fails on purpose
    call_command("migrate", verbosity=0)
    with connection.schema_editor() as editor:
        editor.create_model(Charge)
        editor.create_model(Card)
    client = Client(raise_request_exception=False)
    for payment in PAYMENTS:
        if random.random() < 0.3:
            client.get(f"/charge/{payment}/?fail")  # rolled back: neither charge nor message
        client.get(f"/charge/{payment}/")
        client.get(f"/charge/{payment}/")  # the customer clicks twice: charged before
    with Connection(BROKER) as broker:
        CARDS(broker.channel()).declare()
        call_command("relay", once=True)
        for payment in PAYMENTS[:5]:
            broker.Producer().publish({"payment_id": payment}, routing_key="cards")  # somebody sends it once more
        # Until nothing has come for a while: what failed comes again after its backoff.
        consumer = IdempotentConsumer(broker, {CARDS: issue_card})
        while Card.objects.count() < len(PAYMENTS):
            consumer.run(idle_timeout=0.2)
        consumer.run(idle_timeout=0.2)
    charges, cards = (sorted(kind.objects.values_list("payment_id", flat=True)) for kind in (Charge, Card))
    assert charges == cards == PAYMENTS, "a card too many, or too few"
    print(f"{len(charges)} charges = {len(cards)} cards")


if __name__ == "__main__":
    main()
