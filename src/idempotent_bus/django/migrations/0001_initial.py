"""The tables, as this release has them; what is there already is passed over.

A later release adds a migration that takes the step from here, and passes over what a fresh table has already.
"""

from __future__ import annotations

from typing import Any, ClassVar

from django.db import migrations, models

from ...model import FINGERPRINT_BYTES, KEY_BYTES, NONCE_BYTES
from ..conf import table_name
from ..fields import DigestField
from ..operations import BusTables


def _proxy(name: str, base: str, verbose_name: str, *permissions: str) -> Any:
    return migrations.CreateModel(
        name=name,
        fields=[],
        options={"proxy": True, "default_permissions": permissions, "verbose_name": verbose_name},
        bases=(f"idempotent_bus.{base}",),
    )


class Migration(migrations.Migration):
    """Inbox, outbox and dedup store."""

    initial = True
    dependencies: ClassVar[list[Any]] = []
    operations: ClassVar[list[Any]] = [
        migrations.SeparateDatabaseAndState(
            database_operations=[BusTables()],
            state_operations=[
                migrations.CreateModel(
                    name="InboxRecord",
                    fields=[
                        ("record_key", DigestField(length=KEY_BYTES, primary_key=True, serialize=False)),
                        ("kept_until", models.BigIntegerField()),
                        ("redrive", models.BigIntegerField()),
                        ("attempts", models.IntegerField()),
                        ("completed", models.SmallIntegerField()),
                        ("fingerprint", DigestField(length=FINGERPRINT_BYTES, null=True)),
                        ("result", models.BinaryField(null=True)),
                    ],
                    options={
                        "db_table": table_name("inbox"),
                        "default_permissions": ("view",),
                        "verbose_name": "inbox record",
                    },
                ),
                migrations.CreateModel(
                    name="OutboxMessage",
                    fields=[
                        ("id", models.BigAutoField(primary_key=True, serialize=False)),
                        ("inner_msg_id", DigestField(length=16)),
                        ("order_key", DigestField(length=16, null=True)),
                        ("owner", DigestField(length=16, null=True)),
                        ("made_at", models.BigIntegerField()),
                        ("due_at", models.BigIntegerField()),
                        ("lease_ends", models.BigIntegerField()),
                        ("attempts", models.IntegerField()),
                        ("state", models.SmallIntegerField()),
                        ("exchange", models.CharField(max_length=255)),
                        ("routing_key", models.CharField(max_length=255)),
                        ("content_type", models.CharField(max_length=255)),
                        ("content_encoding", models.CharField(max_length=255)),
                        ("headers", models.TextField()),
                        ("options", models.TextField()),
                        ("last_error", models.TextField(null=True)),
                        ("body", models.BinaryField()),
                    ],
                    options={
                        "db_table": table_name("outbox"),
                        "default_permissions": ("view",),
                        "verbose_name": "outbox message",
                    },
                ),
                migrations.CreateModel(
                    name="StoreRecord",
                    fields=[
                        ("record_key", DigestField(length=KEY_BYTES, primary_key=True, serialize=False)),
                        ("nonce", DigestField(length=NONCE_BYTES)),
                        ("token", models.BigIntegerField()),
                        ("lease_ends", models.BigIntegerField()),
                        ("kept_until", models.BigIntegerField()),
                        ("purge_after", models.BigIntegerField()),
                        ("redrive", models.BigIntegerField()),
                        ("attempts", models.IntegerField()),
                        ("state", models.SmallIntegerField()),
                        ("flags", models.SmallIntegerField()),
                        ("fingerprint", DigestField(length=FINGERPRINT_BYTES, null=True)),
                        ("result", models.BinaryField(null=True)),
                    ],
                    options={
                        "db_table": table_name("records"),
                        "default_permissions": ("view",),
                        "verbose_name": "store record",
                    },
                ),
                _proxy("DeadMessage", "outboxmessage", "dead outbox message", "view", "change", "delete"),
                _proxy("DeadLetterQueue", "outboxmessage", "broker dead letter", "view", "change"),
                _proxy("QuarantinedRecord", "storerecord", "quarantined record", "view", "change"),
            ],
        )
    ]
