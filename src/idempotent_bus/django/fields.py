"""The one kind of column that Django has no field for."""

from __future__ import annotations

import uuid
from typing import Any

from django.core.exceptions import ValidationError
from django.db import models

__all__ = ["DigestField"]


class DigestField(models.Field):
    """Bytes of a fixed length, in Python their hexadecimal digits. On PostgreSQL 16 of them are a uuid."""

    description = "Digest"

    def __init__(self, *args: Any, length: int = 16, **kwargs: Any) -> None:
        self.length = length
        super().__init__(*args, **kwargs)

    def deconstruct(self) -> Any:
        """As Django's: the length is part of it."""
        name, path, args, kwargs = super().deconstruct()
        return name, path, args, {**kwargs, "length": self.length}

    def db_type(self, connection: Any) -> str:
        """As `schema.metadata` makes it; the migrations do not ask."""
        if connection.vendor == "mysql":
            return f"binary({self.length})"
        if connection.vendor == "postgresql":
            return "uuid" if self.length == 16 else "bytea"
        return "BLOB"

    def to_python(self, value: Any) -> str | None:
        """The digits. Takes bytes and UUIDs, and digits with hyphens."""
        if value is None:
            return None
        if isinstance(value, uuid.UUID):
            return value.hex
        if isinstance(value, (bytes, bytearray, memoryview)):
            return bytes(value).hex()
        digits = str(value).strip().replace("-", "").lower()
        try:
            fine = len(bytes.fromhex(digits)) == self.length
        except ValueError:
            fine = False
        if not fine:
            raise ValidationError(f"{2 * self.length} hexadecimal digits are wanted here")
        return digits

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> str | None:
        """The digits."""
        return self.to_python(value)

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        """What the driver takes."""
        digits = self.to_python(value)
        if digits is None:
            return None
        if connection.vendor == "postgresql" and self.length == 16:
            return uuid.UUID(digits)
        return bytes.fromhex(digits)
