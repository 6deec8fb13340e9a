"""Renewal of the leases of all running handlers, by one background thread for each store and process.

The thread sleeps until the next renewal is due, so a short handler costs one entry in a dict and no switch of
threads. `tick` does one round; a test calls it with a clock of its own, without the thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol
from weakref import WeakSet, WeakValueDictionary

from .hooks import RENEW, Step, direct
from .model import Hold
from .store import BatchStore, Store

__all__ = ["LeaseKeeper", "Renewable", "keeper_for"]

log = logging.getLogger(__name__)


class Renewable(Protocol):
    """What the keeper needs of a running execution."""

    hold: Hold
    lease: float
    retention: float
    renewed_at: float

    def on_lease_lost(self, *, taken: bool) -> None:
        """Called when the store says that somebody else owns the record (taken), or when renewals stall too long."""
        ...


class LeaseKeeper:
    """Renews what is added until it is removed. Safe for threads; a forked child starts with an empty keeper.

    clock: monotonic seconds; it decides only when to renew. When a lease ends is the store's to say.
    """

    def __init__(
        self,
        store: Callable[[], Store],
        *,
        clock: Callable[[], float] = time.monotonic,
        step: Step = direct,
        threaded: bool = True,
    ) -> None:
        self._store = store
        self._clock = clock
        self._step = step
        self._threaded = threaded
        self._reset()
        _keepers.add(self)

    def _reset(self) -> None:
        self._running: dict[Hold, Renewable] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._shortest = float("inf")

    def add(self, execution: Renewable) -> None:
        """Keep this execution's lease alive from now on."""
        self._running[execution.hold] = execution
        if execution.lease < self._shortest:
            with self._lock:
                self._shortest = execution.lease
                self._wake.set()
        if self._threaded and self._thread is None:
            with self._lock:
                if self._thread is None:
                    thread = threading.Thread(target=self._loop, name="idempotent-bus-leases", daemon=True)
                    thread.start()
                    self._thread = thread  # only once it runs: if it cannot start now, the next `add` tries again

    def remove(self, execution: Renewable) -> None:
        """Stop renewing it; harmless if it is not there."""
        self._running.pop(execution.hold, None)

    def tick(self) -> None:
        """Renew every execution whose last renewal is a third of its lease ago or more, in as few steps as can be."""
        now = self._clock()
        due = [e for e in list(self._running.values()) if now - e.renewed_at >= e.lease / 3]
        groups: dict[tuple[float, float], list[Renewable]] = {}
        for execution in due:
            groups.setdefault((execution.lease, execution.retention), []).append(execution)
        for (lease, retention), group in groups.items():
            holds = [e.hold for e in group]
            for execution, still_ours in zip(group, self._renew(holds, lease, retention), strict=True):
                if still_ours:
                    execution.renewed_at = now
                elif still_ours is None:
                    # Not known: the next round asks again. If it lapses, the token decides; the handler is told.
                    # Not one that is being ended: whoever ends it may hold its lock for as long as the store is silent.
                    if self._clock() - execution.renewed_at >= lease and execution.hold in self._running:
                        execution.on_lease_lost(taken=False)
                elif self._running.pop(execution.hold, None) is not None:
                    execution.on_lease_lost(taken=True)

    def _renew(self, holds: list[Hold], lease: float, retention: float) -> Sequence[bool | None]:
        try:
            store = self._store()
            if len(holds) > 1 and isinstance(store, BatchStore):
                return self._step(RENEW, store.renew_many, holds, lease=lease, retention=retention)
        except Exception as error:  # noqa: BLE001 - an error that a store let out must not cost other groups their leases
            log.warning("could not renew %d leases: %s", len(holds), error)
            return [None] * len(holds)
        return [self._renew_one(store, hold, lease, retention) for hold in holds]

    def _renew_one(self, store: Store, hold: Hold, lease: float, retention: float) -> bool | None:
        try:
            return self._step(RENEW, store.renew, hold, lease=lease, retention=retention)
        except Exception as error:  # noqa: BLE001 - one record out of reach must not cost the others their leases
            log.warning("could not renew a lease: %s", error)
            return None

    def _loop(self) -> None:
        while True:
            self._wake.wait(min(self._shortest / 6, 60.0))
            self._wake.clear()
            if self._running:
                try:
                    self.tick()
                except Exception:  # the thread must outlive any surprise: without it every long handler is run twice
                    log.exception("a round of lease renewals failed")


_shared: WeakValueDictionary[int, LeaseKeeper] = WeakValueDictionary()
_sharing = threading.Lock()


def keeper_for(store: Callable[[], Store]) -> LeaseKeeper:
    """The keeper that all executors on this store share, so that their leases are renewed together."""
    with _sharing:
        # By its id: a keeper keeps its store's function alive, so an id that is found here is still that function's.
        keeper = _shared.get(id(store))
        if keeper is None:
            keeper = _shared[id(store)] = LeaseKeeper(store)
        return keeper


#: All keepers of this process. A forked child has their objects, but not their thread, and none of what they renew
#: runs in it. They are emptied in the fork itself: later, two threads of the child could get into each other's way.
_keepers: WeakSet[LeaseKeeper] = WeakSet()


def _empty_all() -> None:
    global _sharing
    _sharing = threading.Lock()
    for keeper in list(_keepers):
        keeper._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_empty_all)
