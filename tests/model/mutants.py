"""Broken protocols, each of which the model must catch: a model that cannot fail shows nothing.

Some are what other libraries do, some are what this one did until the model found it (`found=True`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from .broker import AGE_BY_REDRIVE, Bounds
from .explore import Explored, Model, explore
from .inbox_mode import InboxMode
from .outbox_mode import OutboxMode
from .publishing import Publishing
from .store_mode import AGE_BY_ATTEMPT, NONCE_BY_KEY, StoreMode

__all__ = ["MUTANTS", "Mutant", "hunt"]


@dataclass(frozen=True, slots=True)
class Mutant:
    """about: what it does. breaks: the invariant that it breaks; seen: how that shows, where another number tells.

    found: the library did this when it was first modelled.
    """

    name: str
    about: str
    breaks: str
    make: Callable[[str], Model]
    seen: str = ""
    found: bool = False

    def is_killed_by(self, explored: Explored) -> bool:
        """True if it was caught by the invariant that it breaks."""
        return explored.found is not None and explored.found.violation.invariant in (self.breaks, self.seen)


def hunt(mutant: Mutant) -> Explored:
    """Explore until it is caught."""
    return explore(mutant.make(mutant.name))


_ONE: Final = {"messages": 1, "keys": (0, 0)}


def _of(kind: Callable[[Bounds], Model], mutant: str, faults: int = 3, **bounds: Any) -> Callable[[str], Model]:
    return lambda name: kind(Bounds(name, faults=faults, mutant=mutant, reduced=False, **bounds))


def _store(name: str, about: str, breaks: str, *, seen: str = "", found: bool = False, **bounds: Any) -> Mutant:
    return Mutant(f"store: {name}", about, breaks, _of(StoreMode, name, **bounds), seen, found)


def _inbox(name: str, about: str, breaks: str, *, seen: str = "", found: bool = False, **bounds: Any) -> Mutant:
    return Mutant(f"inbox: {name}", about, breaks, _of(InboxMode, name, **bounds), seen, found)


def _relay(name: str, about: str, breaks: str) -> Mutant:
    return Mutant(f"outbox: {name}", about, breaks, lambda told: OutboxMode(told, faults=2, mutant=name))


def _publish(name: str, about: str, breaks: str) -> Mutant:
    return Mutant(f"publish: {name}", about, breaks, lambda told: Publishing(told, faults=2, mutant=name))


MUTANTS: Final = (
    _store("no token check", "a completion is taken from whoever comes", "I6", seen="I2", **_ONE),
    _store("unowned release", "a release is taken from whoever comes", "I6", seen="I2", **_ONE),
    _store("completed is not final", "a completed record can be claimed", "I6", seen="I2", **_ONE),
    _store("tokens start anew", "the counter is lost with the record", "I6", ages=True, **_ONE),
    _store("acks before complete", "the ack goes out before the completion is durable", "I4", **_ONE),
    _store("acks beyond the prefix", "acks all up to a durable completion, not only the durable prefix", "I4"),
    _store("acks the original first", "the ack goes out before the successor is confirmed", "I4", **_ONE),
    _store("acks before the dead letter", "the ack goes out before the dead letter is confirmed", "I4", **_ONE),
    _store("busy is acked", "a copy that meets a running one is acked", "I4", **_ONE),
    _store("requeues", "what must wait is requeued, until the delivery limit destroys it", "I1", **_ONE),
    _store("redrive refused as a duplicate", "the edge refuses what is moved back", "I1", redrives=1, **_ONE),
    _store("no nonce", "a claimer whose reply was lost is not recognised", "I12", **_ONE),
    _store("busy is an attempt", "meeting a running copy counts", "I12", **_ONE),
    _store("reserves redelivered", "redelivered messages run on uncounted reservations", "I12", most=1),
    _store("redrive starts nothing afresh", "attempts go on where they ended", "I12", redrives=1, **_ONE),
    _store("conflict taken for a duplicate", "fingerprints are not compared", "I8", keys=(0, 0), bodies=(0, 1)),
    _store(
        NONCE_BY_KEY,
        "after a silent claim its nonce is used for any message of that key, whatever its body",
        "I8",
        seen="I4",
        found=True,
        keys=(0, 0),
        bodies=(0, 1),
    ),
    _store("the worker's clock", "a fast worker sees leases end that have not", "I7", seen="I2", **_ONE),
    _store("no fence", "the resource takes any token", "I2", **_ONE),
    _store("leases never end", "a dead worker's claim stays", "I13", **_ONE),
    _store("fails open", "the store is silent: run all the same", "I9", **_ONE),
    _store("doubt taken for done", "a completion without an answer is acked", "I15", seen="I4", **_ONE),
    _store(
        "retention too short",
        "a record is forgotten while its message can still come",
        "I11",
        seen="I2",
        ages=True,
        **_ONE,
    ),
    _store(
        "redrives unseen",
        "a dead letter that is too old is redriven, and nobody looks whether it was done",
        "I11",
        seen="I2",
        ages=True,
        redrives=1,
        **_ONE,
    ),
    _store(
        AGE_BY_REDRIVE,
        "a redrive starts a message's age afresh: a dead copy of what was done and forgotten runs again",
        "I11",
        seen="I2",
        found=True,
        ages=True,
        redrives=1,
        **_ONE,
    ),
    _store(
        AGE_BY_ATTEMPT,
        "an old message's claim counts an attempt; if its worker dies, the next claim is no first one, and runs",
        "I11",
        seen="I2",
        found=True,
        ages=True,
        **_ONE,
    ),
    _store("scopes share a key", "one id, two scopes, one record", "I14", keys=(0, 0)),
    _inbox("effect and record apart", "two commits, called one", "I3", **_ONE),
    _inbox("sends before the commit", "the outgoing message does not go through the outbox", "I3", **_ONE),
    _inbox("no record", "nothing is looked up", "I2", **_ONE),
    _inbox("looks instead of inserting", "a SELECT decides, and nothing is locked", "I2", **_ONE),
    _inbox("doubt settled by a look", "a COMMIT without an answer is looked up, not repeated", "I15", **_ONE),
    _inbox("counts nothing", "what was delivered before runs without being counted", "I12", **_ONE),
    _inbox(
        AGE_BY_ATTEMPT,
        "an old message's attempt is counted before its record is looked at",
        "I11",
        seen="I2",
        found=True,
        ages=True,
        **_ONE,
    ),
    _relay("marks before the confirm", "a row is deleted once it is sent", "I5"),
    _relay("marks before landing", "the edge marks first, then the broker stores", "I5"),
    _relay("skips what committed late", "nothing below the highest number seen is looked at", "I13"),
    _relay("leases of rows never end", "a dead relay's rows stay its own", "I13"),
    _publish("marks before landing", "the edge marks first, then the broker stores", "I1"),
    _publish("a timeout is taken for landed", "no answer counts as yes", "I1"),
    _publish("the last send decides", "an earlier send without an answer is forgotten", "I15"),
    _publish("a fresh id for each send", "a resend is a new message", "I15"),
)
