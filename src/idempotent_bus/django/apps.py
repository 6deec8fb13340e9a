"""What Django is told about this app."""

from __future__ import annotations

from django.apps import AppConfig

__all__ = ["IdempotentBusConfig"]


class IdempotentBusConfig(AppConfig):
    """The app `idempotent_bus`, whose models, migrations and permissions have that label."""

    name = "idempotent_bus.django"
    label = "idempotent_bus"
    verbose_name = "Idempotent bus"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the checks."""
        from . import checks  # noqa: F401 - importing it registers them
