"""Renewal of the leases of all handlers that are running, by one background thread per store and process.

The thread sleeps until the next renewal is due, so a short handler costs one entry in a dict and no switch of
threads. `tick` does one round; a test calls it with a clock of its own, without the thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

from .errors import StoreError
from .hooks import RENEW, Step, direct
from .model import Hold
from .store import BatchStore, Store

__all__ = ["LeaseKeeper", "Renewable"]

log = logging.getLogger(__name__)


class Renewable(Protocol):
    """What the keeper needs of a running execution."""

    hold: Hold
    lease: float
    retention: float
    renewed_at: float

    def on_lease_lost(self) -> None:
        """Called once when the store says that somebody else owns the record now."""
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

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._running: dict[Hold, Renewable] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._shortest = float("inf")

    def add(self, execution: Renewable) -> None:
        """Keep this execution's lease alive from now on."""
        if self._pid != os.getpid():
            self._reset()
        self._running[execution.hold] = execution
        if execution.lease < self._shortest:
            with self._lock:
                self._shortest = execution.lease
                self._wake.set()
        if self._threaded and self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._loop, name="idempotent-bus-leases", daemon=True)
                    self._thread.start()

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
            try:
                kept = self._renew([e.hold for e in group], lease, retention)
            except StoreError as error:
                # The lease still runs; the next round tries again. If it lapses, the token decides.
                log.warning("could not renew %d leases: %s", len(group), error)
                continue
            for execution, still_ours in zip(group, kept, strict=True):
                if still_ours:
                    execution.renewed_at = now
                elif self._running.pop(execution.hold, None) is not None:
                    execution.on_lease_lost()

    def _renew(self, holds: list[Hold], lease: float, retention: float) -> list[bool]:
        store = self._store()
        if len(holds) > 1 and isinstance(store, BatchStore):
            return self._step(RENEW, store.renew_many, holds, lease=lease, retention=retention)
        return [self._step(RENEW, store.renew, hold, lease=lease, retention=retention) for hold in holds]

    def _loop(self) -> None:
        while True:
            self._wake.wait(min(self._shortest / 6, 60.0))
            self._wake.clear()
            if self._running:
                try:
                    self.tick()
                except Exception:  # the thread must outlive any surprise: without it every long handler is run twice
                    log.exception("a round of lease renewals failed")
