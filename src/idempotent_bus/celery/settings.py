"""What a guarded task was told: the options of its decorator, and behind them those of `setup`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from celery import Celery

from ..errors import ConfigurationError

__all__ = ["OPTIONS", "inbox_of", "option", "remember"]

#: The options of `IdempotentTask`, and of `setup` for all tasks, with what they are if nobody says.
OPTIONS: Final[Mapping[str, Any]] = {
    "scope": None,
    "biz_id": None,
    "store": None,
    "inbox": None,
    "outbox": None,
    "fingerprint": True,
    "lease": 60.0,
    "retention": 7 * 86_400.0,
    "max_attempts": 8,
    "backoff": None,
    "backoffs": None,
    "busy_delay": 1.0,
    "on_abandoned": "rerun",
    "in_doubt": (),
    "max_result": 65_536,
    "dead_letter": None,
    "tenant": "",
    "listener": None,
}
_ATTRIBUTE: Final = "_idempotent_bus_defaults"


def remember(app: Celery, options: Mapping[str, Any]) -> None:
    """Make these the options of all tasks of this app that do not say otherwise."""
    unknown = set(options) - set(OPTIONS)
    if unknown:
        raise ConfigurationError(
            f"setup() knows no {', '.join(sorted(unknown))}; it knows {', '.join(sorted(OPTIONS))}"
        )
    setattr(app, _ATTRIBUTE, {**getattr(app, _ATTRIBUTE, {}), **options})


def option(task: Any, name: str) -> Any:
    """One option of a task: its own, or the app's, or the default."""
    # Not getattr: a function that is an attribute of a class would come back as a method.
    value = inspect.getattr_static(task, name, None)
    if isinstance(value, staticmethod):
        value = value.__func__
    if value is None:
        value = getattr(task.app, _ATTRIBUTE, {}).get(name)
    return OPTIONS[name] if value is None else value


def inbox_of(inbox: Any) -> Any:
    """The inbox that an option means: an `Inbox`, or "django", "django:alias" for the one in a Django database."""
    if inbox is None:
        return None
    if isinstance(inbox, str):
        kind, _, alias = inbox.partition(":")
        if kind != "django":
            raise ConfigurationError('inbox must be an Inbox, or "django" or "django:<alias>" for Django\'s database')
        from ..django.conf import bus_settings
        from ..django.consumer import DjangoInbox

        settings = bus_settings()
        return DjangoInbox(alias or settings.database, settings.table_prefix)
    if not hasattr(inbox, "count_attempt"):
        raise ConfigurationError(f"inbox must be an Inbox, not a {type(inbox).__name__}")
    return inbox
