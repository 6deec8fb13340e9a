"""The configurations that are explored: what each covers, and within which bounds.

The three with four faults, two workers or relays, two messages and a window of two are the claim; the others add what
would be too much at once. `short` is what the default test suite explores of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from .broker import Bounds
from .explore import Model
from .inbox_mode import InboxMode
from .outbox_mode import OutboxMode
from .publishing import Publishing
from .store_mode import StoreMode

__all__ = ["CONFIGURATIONS", "Configuration"]

_Make = Callable[[str, int], Model]


@dataclass(frozen=True, slots=True)
class Configuration:
    """about: what it shows. faults: of the long form; short: of the short one. missing: actions that cannot be seen."""

    name: str
    about: str
    make: _Make
    faults: int
    short: int
    missing: frozenset[str] = frozenset()

    def model(self, faults: int) -> Model:
        """The model within so many faults."""
        return self.make(self.name, faults)


def _lower(kind: Callable[[Bounds], Model], **bounds: Any) -> _Make:
    return lambda name, faults: kind(Bounds(name, faults=faults, **bounds))


#: Where what is left of a completed message is taken away at once, no ack and no replay is left to be seen.
_ACK: Final = frozenset({"ack"})
_ONE: Final = {"messages": 1, "keys": (0, 0)}

CONFIGURATIONS: Final = (
    Configuration("outbox, with an edge", "two relays, two rows", lambda n, f: OutboxMode(n, faults=f), 4, 3),
    Configuration(
        "outbox, without an edge", "two relays, two rows", lambda n, f: OutboxMode(n, faults=f, edge=False), 4, 3
    ),
    Configuration("publish, with an edge", "two producers", lambda n, f: Publishing(n, faults=f), 4, 4),
    Configuration("publish, without an edge", "two producers", lambda n, f: Publishing(n, faults=f, edge=False), 4, 4),
    Configuration("store", "two workers, two keys, a window of two", _lower(StoreMode), 4, 2, _ACK),
    Configuration("store, unreduced", "the same, without the reductions", _lower(StoreMode, reduced=False), 2, 1),
    Configuration("store, one key", "two messages with one biz-id", _lower(StoreMode, keys=(0, 0)), 4, 2, _ACK),
    Configuration(
        "store, conflict",
        "two bodies with one biz-id",
        _lower(StoreMode, keys=(0, 0), bodies=(0, 1)),
        4,
        2,
        _ACK,
    ),
    Configuration("store, redrive", "a dead letter is moved back", _lower(StoreMode, redrives=1), 3, 2, _ACK),
    Configuration("store, further copies", "no edge", _lower(StoreMode, extras=1), 3, 1, _ACK),
    Configuration(
        "store, quarantine",
        "abandoned records wait for a person; redrive",
        _lower(StoreMode, policy="quarantine", redrives=1),
        3,
        2,
        _ACK,
    ),
    Configuration("store, probe", "abandoned records are probed", _lower(StoreMode, policy="probe"), 4, 2, _ACK),
    Configuration(
        "store, age", "one message; records are forgotten", _lower(StoreMode, **_ONE, ages=True, redrives=1), 4, 2
    ),
    Configuration("inbox", "two workers, two keys, a window of two in one commit", _lower(InboxMode), 4, 2, _ACK),
    Configuration("inbox, unreduced", "the same, without the reductions", _lower(InboxMode, reduced=False), 3, 2),
    Configuration("inbox, one key", "two messages with one biz-id", _lower(InboxMode, keys=(0, 0)), 3, 2, _ACK),
    Configuration(
        "inbox, conflict",
        "two bodies with one biz-id",
        _lower(InboxMode, keys=(0, 0), bodies=(0, 1)),
        3,
        2,
        _ACK,
    ),
    Configuration("inbox, redrive", "a dead letter is moved back", _lower(InboxMode, redrives=1), 3, 2, _ACK),
    Configuration("inbox, further copies", "no edge", _lower(InboxMode, extras=1), 3, 1, _ACK),
    Configuration(
        "inbox, age", "one message; records are forgotten", _lower(InboxMode, **_ONE, ages=True, redrives=1), 4, 2
    ),
)
