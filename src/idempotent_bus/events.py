"""What happens to messages, told to a listener: for metrics, traces and audits. No biz-id is in it, only its digest."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from .errors import ConfigurationError

__all__ = ["Event", "EventKind", "Listener", "Notify", "notifier"]

log = logging.getLogger(__name__)


class EventKind(str, Enum):
    """What happened."""

    CLAIMED = "claimed"
    """The handler is about to run."""
    COMPLETED = "completed"
    """The handler succeeded, and that is durable."""
    REPLAYED = "replayed"
    """A copy of what was done before."""
    BUSY = "busy"
    """A copy of what is being done elsewhere; it waits."""
    CONFLICTED = "conflicted"
    """The same biz-id with another body."""
    RELEASED = "released"
    """The handler raised, and will run again after its backoff."""
    ABANDONED = "abandoned"
    """An earlier holder died in the middle; `on_abandoned` decides."""
    QUARANTINED = "quarantined"
    """It waits for a person's decision."""
    DEAD_LETTERED = "dead-lettered"
    """`reason` says why."""
    LEASE_LOST = "lease lost"
    """Another claim took over, or the lease ran out unrenewed: the handler should stop."""
    STORE_UNAVAILABLE = "store unavailable"
    """In doubt: nothing ran and nothing was acked."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    record: the record's key in hex, the same for every message of one biz-id and scope; empty if there is no id.
    attempt, token: of the claim, 0 where there is none. reason: of a dead letter, a word of `model.Reason`; of a
    release, the class of what was raised. seconds: how long the handler ran, where it did.
    """

    kind: EventKind
    scope: str
    record: str = ""
    attempt: int = 0
    token: int = 0
    reason: str = ""
    seconds: float = 0.0


class Listener(Protocol):
    """Told of every event, in the thread where it happens: be quick. What it raises is logged and changes nothing."""

    def on_event(self, event: Event, /) -> None:
        """Something happened."""
        ...


Notify = Callable[[Event], None]


def notifier(listener: Listener | None) -> Notify | None:
    """A function that tells the listener and swallows its errors; None if nobody listens.

    Raises ConfigurationError for what is no listener: since errors are swallowed, nobody would ever be told.
    """
    if listener is None:
        return None
    tell: Any = getattr(listener, "on_event", None)
    if not callable(tell):
        hint = ", not a function of its own" if inspect.isroutine(listener) else ""
        raise ConfigurationError(
            f"listener must be an object with a method on_event(event){hint}; see idempotent_bus.Listener"
        )
    if inspect.iscoroutinefunction(tell):
        raise ConfigurationError("the listener's on_event must not be async: it is called, and never awaited")
    try:
        inspect.signature(tell).bind(None)
    except TypeError:
        hint = ": give an instance, not its class" if inspect.isclass(listener) else ""
        raise ConfigurationError(f"the listener's on_event must take the event, and nothing else{hint}") from None
    except ValueError:  # one that is not written in Python may not say what it takes
        pass

    def notify(event: Event) -> None:
        try:
            tell(event)
        except Exception:  # who only watches must not change what happens
            log.exception("a listener failed on %s in scope %s", event.kind.value, event.scope)

    return notify
