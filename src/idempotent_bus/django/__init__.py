"""A Django app: inbox, outbox and dedup store in the databases of a Django project.

    INSTALLED_APPS += ["idempotent_bus.django"]
    IDEMPOTENT_BUS = {"BROKER": "amqp://...", "OUTBOX": {"EXCHANGE": "payments"}}

    from idempotent_bus.django import inbox, outbox, transactional_consumer

    with transaction.atomic():
        Charge.objects.create(payment_id=payment_id)
        outbox.add({"payment_id": payment_id}, routing_key="paid")

    @transactional_consumer(scope="cards.issue", biz_id="payment_id")
    def issue_card(body, message):
        Card.objects.create(payment_id=body["payment_id"])

conf.py: the settings. consumer.py, inbox.py, outbox.py, stores.py: what your code calls. databases.py: what SQLAlchemy
must know of a Django database. borrowed.py: a Django transaction, as the inbox wants one. The rest is where Django
looks for it.
"""

from __future__ import annotations

try:
    import django as _django  # noqa: F401 - asked for here, so that a missing one is said in one sentence
except ModuleNotFoundError as error:
    hint = "idempotent_bus.django needs Django: pip install 'idempotent-bus[django]'"
    raise ModuleNotFoundError(hint, name=error.name) from error

from . import inbox, outbox
from .consumer import transactional_consumer
from .stores import store

__all__ = ["inbox", "outbox", "store", "transactional_consumer"]
