"""The library's tables as Django's models, for the admin and for queries of your own.

`idempotent_bus.schema` is the truth: the migrations run its DDL, and a test compares the two. Rows are written by the
inbox, the outbox, the relay and the store, never through these models; times are microseconds since the epoch.
"""

from __future__ import annotations

import datetime
from typing import Any

from django.db import models

from ..model import FINGERPRINT_BYTES, KEY_BYTES, NONCE_BYTES
from ..relaying.words import RowState
from .conf import table_name
from .fields import DigestField

__all__ = [
    "DeadLetterQueue",
    "DeadMessage",
    "InboxRecord",
    "OutboxMessage",
    "QuarantinedRecord",
    "StoreRecord",
    "moment",
]


def moment(microseconds: int | None) -> datetime.datetime | None:
    """A time as it is stored, as a datetime. None for what lies beyond the years that Python knows."""
    if microseconds is None:
        return None
    try:
        return datetime.datetime.fromtimestamp(microseconds / 1_000_000, datetime.timezone.utc)
    except (OverflowError, ValueError, OSError):
        return None


class InboxRecord(models.Model):
    """A biz-id that was handled in a transaction, or (completed 0) whose attempts are counted."""

    record_key = DigestField(primary_key=True, length=KEY_BYTES)
    kept_until = models.BigIntegerField()
    redrive = models.BigIntegerField()
    attempts = models.IntegerField()
    completed = models.SmallIntegerField()
    fingerprint = DigestField(null=True, length=FINGERPRINT_BYTES)
    result = models.BinaryField(null=True)

    class Meta:
        """For people to look at."""

        db_table = table_name("inbox")
        default_permissions = ("view",)
        verbose_name = "inbox record"

    def __str__(self) -> str:
        return str(self.record_key)


class OutboxMessage(models.Model):
    """A message that is to be sent; deleted once the broker has confirmed it."""

    id = models.BigAutoField(primary_key=True)
    inner_msg_id = DigestField(length=16)
    order_key = DigestField(null=True, length=16)
    owner = DigestField(null=True, length=16)
    made_at = models.BigIntegerField()
    due_at = models.BigIntegerField()
    lease_ends = models.BigIntegerField()
    attempts = models.IntegerField()
    state = models.SmallIntegerField()  # RowState
    exchange = models.CharField(max_length=255)
    routing_key = models.CharField(max_length=255)
    content_type = models.CharField(max_length=255)
    content_encoding = models.CharField(max_length=255)
    headers = models.TextField()
    options = models.TextField()
    last_error = models.TextField(null=True)
    body = models.BinaryField()

    class Meta:
        """For people to look at."""

        db_table = table_name("outbox")
        default_permissions = ("view",)
        verbose_name = "outbox message"

    def __str__(self) -> str:
        return str(self.pk)


class _Dead(models.Manager[Any]):
    def get_queryset(self) -> Any:
        return super().get_queryset().filter(state=RowState.DEAD.value)


class DeadMessage(OutboxMessage):
    """A message of the outbox that was given up: it waits for a person, and the later ones of its order key with it."""

    objects = _Dead()

    class Meta:
        """change: redrive. delete: discard."""

        proxy = True
        default_permissions = ("view", "change", "delete")
        verbose_name = "dead outbox message"


class DeadLetterQueue(OutboxMessage):
    """Stands for the broker's dead letters, which are in no table: it has permissions and a page."""

    class Meta:
        """change: redrive."""

        proxy = True
        default_permissions = ("view", "change")
        verbose_name = "broker dead letter"


class StoreRecord(models.Model):
    """A record of the dedup store, where that is in this database."""

    record_key = DigestField(primary_key=True, length=KEY_BYTES)
    nonce = DigestField(length=NONCE_BYTES)
    token = models.BigIntegerField()
    lease_ends = models.BigIntegerField()
    kept_until = models.BigIntegerField()
    purge_after = models.BigIntegerField()
    redrive = models.BigIntegerField()
    attempts = models.IntegerField()
    state = models.SmallIntegerField()  # State
    flags = models.SmallIntegerField()
    fingerprint = DigestField(null=True, length=FINGERPRINT_BYTES)
    result = models.BinaryField(null=True)

    class Meta:
        """For people to look at."""

        db_table = table_name("records")
        default_permissions = ("view",)
        verbose_name = "store record"

    def __str__(self) -> str:
        return str(self.record_key)


class QuarantinedRecord(StoreRecord):
    """Stands for what is in quarantine, wherever the dedup store is: it has permissions and a page."""

    class Meta:
        """change: resolve."""

        proxy = True
        default_permissions = ("view", "change")
        verbose_name = "quarantined record"
