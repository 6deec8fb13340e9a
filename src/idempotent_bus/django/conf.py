"""The settings: one dictionary, `IDEMPOTENT_BUS`, read and checked here and nowhere else.

    IDEMPOTENT_BUS = {
        "DATABASE": "default",              # the alias of the database where effects, inbox and outbox are
        "BROKER": "amqp://...",             # for `manage.py relay` and the admin; None: say it there
        "TABLE_PREFIX": "idempotent_bus_",  # before the first migration, and never changed after it
        "RETENTION_DAYS": 7,                # how long a record is remembered, unless a consumer says otherwise
        "STORE": None,                      # the dedup store's URL; None: it is in DATABASE
        "DEAD_LETTERS": [],                 # queues, or scopes, that the admin shows and redrives
        "OUTBOX": {"EXCHANGE": None, "ROUTING_KEY": None, "SERIALIZER": None, "BIZ_ID": None},
        "RELAY": {"BATCH": 500, "LEASE": 30, "POLL_INTERVAL": 1, "MAX_ATTEMPTS": 20, "CONFIRM_TIMEOUT": 5},
    }

All of it may be left out.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from django.conf import settings as django_settings

from .. import schema
from ..errors import ConfigurationError
from ..policy import DAY

__all__ = ["NAME", "BusSettings", "bus_settings", "problems", "table_name"]

NAME: Final = "IDEMPOTENT_BUS"


@dataclass(frozen=True)
class BusSettings:
    """The settings, with what was left out. retention: seconds. outbox, relay: keywords of `Outbox` and `Relay`."""

    database: str = "default"
    broker: str | None = None
    table_prefix: str = schema.PREFIX
    retention: float = 7 * DAY
    store: str | None = None
    dead_letters: tuple[str, ...] = ()
    outbox: dict[str, Any] = field(default_factory=dict)
    relay: dict[str, Any] = field(default_factory=dict)


def bus_settings() -> BusSettings:
    """The settings as they are now. Raises ConfigurationError with all that is wrong with them."""
    global _read
    given = getattr(django_settings, NAME, None)
    earlier, read = _read
    if read is None or earlier is not given:  # `override_settings` puts another dictionary there
        wrong = problems(given)
        if wrong:
            raise ConfigurationError("; ".join(wrong))
        _read = given, (read := _settings(given or {}))
    return read


_read: tuple[Any, BusSettings | None] = (None, None)


def table_name(part: str) -> str:
    """The name of a table: `inbox`, `outbox` or `records`. With wrong settings the usual one: the check tells."""
    given = getattr(django_settings, NAME, None)
    prefix = given.get("TABLE_PREFIX", schema.PREFIX) if isinstance(given, Mapping) else schema.PREFIX
    return f"{schema.PREFIX if _prefix(prefix) else prefix}{part}"


def problems(given: Any) -> list[str]:
    """All that is wrong, each in a sentence without the value: a broker's URL holds a password."""
    if given is None:
        return []
    if not isinstance(given, Mapping):
        return [f"{NAME} must be a dictionary, not of type {type(given).__name__}"]
    return list(_problems(given, _KEYS, NAME))


def _problems(given: Mapping[Any, Any], keys: Mapping[str, Any], where: str) -> Iterator[str]:
    for key, value in given.items():
        if key not in keys:
            near = difflib.get_close_matches(str(key).upper(), keys, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(map(repr, keys))}"
            yield f"{where} has no key {key!r}: {hint}"
            continue
        check = keys[key]
        if isinstance(check, Mapping):
            if isinstance(value, Mapping):
                yield from _problems(value, check, f"{where}[{key!r}]")
            else:
                yield f"{where}[{key!r}] must be a dictionary"
        elif wrong := check(value):
            yield f"{where}[{key!r}] {wrong}"


def _settings(given: Mapping[str, Any]) -> BusSettings:
    outbox = {key.lower(): value for key, value in given.get("OUTBOX", {}).items()}
    relay = {key.lower(): value for key, value in given.get("RELAY", {}).items()}
    return BusSettings(
        database=given.get("DATABASE", "default"),
        broker=given.get("BROKER"),
        table_prefix=given.get("TABLE_PREFIX", schema.PREFIX),
        retention=given.get("RETENTION_DAYS", 7) * DAY,
        store=given.get("STORE"),
        dead_letters=tuple(given.get("DEAD_LETTERS", ())),
        outbox=outbox,
        relay=relay,
    )


def _alias(value: Any) -> str:
    if not isinstance(value, str):
        return "must be the alias of a database"
    return "" if value in django_settings.DATABASES else "names no database of DATABASES"


def _prefix(value: Any) -> str:
    try:
        schema.metadata(value, parts=())
    except (ConfigurationError, TypeError):
        return "must be a name of at most 40 letters, digits and _"
    return "must be a text" if value is None else ""


def _text(value: Any) -> str:
    return "" if value is None or (isinstance(value, str) and value) else "must be a text that is not empty, or None"


def _url(value: Any) -> str:
    # Its value is not shown.
    return "" if value is None or (isinstance(value, str) and ":" in value) else "must be a URL, or None"


def _path(value: Any) -> str:
    return "" if value is None or callable(value) or (isinstance(value, str) and value) else "must be a path, or None"


def _names(value: Any) -> str:
    fine = isinstance(value, (list, tuple)) and all(isinstance(name, str) and name for name in value)
    return "" if fine else "must be a list of names of queues or scopes"


def _number(least: float, most: float = float("inf"), *, whole: bool = False) -> Callable[[Any], str]:
    """A check: least < value <= most, for whole numbers least <= value."""

    def check(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            return f"must be a {'whole ' if whole else ''}number"
        fine = (least <= value if whole else least < value) and value <= most
        return (
            ""
            if fine
            else f"must be {'at least' if whole else 'more than'} {least}"
            + (f" and at most {most}" if most < float("inf") else "")
        )

    return check


_KEYS: Final[dict[str, Any]] = {
    "DATABASE": _alias,
    "BROKER": _url,
    "TABLE_PREFIX": _prefix,
    "RETENTION_DAYS": _number(0, 3650),
    "STORE": _url,
    "DEAD_LETTERS": _names,
    "OUTBOX": {"EXCHANGE": _text, "ROUTING_KEY": _text, "SERIALIZER": _text, "BIZ_ID": _path},
    "RELAY": {
        "BATCH": _number(1, 5000, whole=True),
        "LEASE": _number(0.999),
        "POLL_INTERVAL": _number(0),
        "MAX_ATTEMPTS": _number(1, whole=True),
        "CONFIRM_TIMEOUT": _number(0),
    },
}
