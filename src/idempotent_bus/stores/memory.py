"""The reference store: the contract in plain Python, for one process. It forgets everything at its end."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..model import (
    NONCE_BYTES,
    Busy,
    Claimed,
    ClaimOutcome,
    ClaimRequest,
    Completed,
    Completion,
    Conflict,
    Hold,
    Quarantined,
    Record,
    State,
)
from .streams import DirectStream

__all__ = ["MemoryStore", "open_memory"]

_HELD = (State.RESERVED, State.IN_PROGRESS)


@dataclass(slots=True)
class _Entry:
    state: State
    token: int
    nonce: bytes
    attempts: int
    redrive: int
    fingerprint: bytes | None
    lease_ends: float
    kept_until: float
    taken_over: bool
    result: bytes | None = None

    def claimed(self) -> Claimed:
        return Claimed(self.token, self.attempts + (self.state is State.RESERVED), self.taken_over)


class MemoryStore:
    """A store within this process; safe for threads, useless after a restart.

    clock: gives seconds; only its differences matter. It is the store's time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[bytes, _Entry] = {}
        self._tokens = itertools.count(1)
        self._lock = threading.Lock()

    def claim(self, request: ClaimRequest, /) -> ClaimOutcome:
        with self._lock:
            return self._claim(request, self._clock())

    def claim_many(self, requests: Sequence[ClaimRequest], /) -> list[ClaimOutcome]:
        with self._lock:
            now = self._clock()
            return [self._claim(request, now) for request in requests]

    def _claim(self, request: ClaimRequest, now: float) -> ClaimOutcome:
        entry = self._entries.get(request.key)
        if entry is None or entry.kept_until <= now:
            return self._take(request, now, attempts=0, redrive=request.redrive, taken_over=False)
        held = entry.state in _HELD
        if held and entry.nonce == request.nonce:
            self._extend(entry, now, request.lease, request.retention)
            return entry.claimed()
        differs = None not in (entry.fingerprint, request.fingerprint) and entry.fingerprint != request.fingerprint
        if differs and entry.state is not State.RELEASED:
            return Conflict(entry.state)
        if entry.state is State.COMPLETED:
            return Completed(entry.result)
        if entry.state is State.QUARANTINED:
            return Quarantined()
        if held and entry.lease_ends > now:
            return Busy(entry.lease_ends - now)
        return self._take(
            request,
            now,
            attempts=0 if request.redrive > entry.redrive else entry.attempts,
            redrive=max(request.redrive, entry.redrive),
            # A reservation that lapsed never started, but what it had taken over may have been done.
            taken_over=entry.state is State.IN_PROGRESS or (entry.state is State.RESERVED and entry.taken_over),
        )

    def _take(self, request: ClaimRequest, now: float, *, attempts: int, redrive: int, taken_over: bool) -> Claimed:
        entry = _Entry(
            state=State.RESERVED if request.reserve else State.IN_PROGRESS,
            token=next(self._tokens),
            nonce=request.nonce,
            attempts=attempts if request.reserve else attempts + 1,
            redrive=redrive,
            fingerprint=request.fingerprint,
            lease_ends=now + request.lease,
            kept_until=now + request.lease + request.retention,
            taken_over=taken_over,
        )
        self._entries[request.key] = entry
        return entry.claimed()

    @staticmethod
    def _extend(entry: _Entry, now: float, lease: float, retention: float) -> None:
        entry.lease_ends = now + lease
        entry.kept_until = now + lease + retention

    def _owned(self, hold: Hold, now: float, *states: State) -> _Entry | None:
        entry = self._entries.get(hold.key)
        if (
            entry is None
            or entry.kept_until <= now
            or entry.token != hold.token
            or entry.nonce != hold.nonce
            or entry.state not in states
        ):
            return None
        return entry

    def renew(self, hold: Hold, /, *, lease: float, retention: float) -> bool:
        with self._lock:
            now = self._clock()
            entry = self._owned(hold, now, *_HELD)
            if entry is None:
                return False
            self._extend(entry, now, lease, retention)
            return True

    def renew_many(self, holds: Sequence[Hold], /, *, lease: float, retention: float) -> list[bool]:
        return [self.renew(hold, lease=lease, retention=retention) for hold in holds]

    def complete(self, hold: Hold, /, *, result: bytes | None, retention: float) -> bool:
        with self._lock:
            now = self._clock()
            entry = self._owned(hold, now, *_HELD, State.COMPLETED)
            if entry is None:
                return False
            if entry.state is not State.COMPLETED:  # a repeat changes nothing: completed is final
                entry.state = State.COMPLETED
                entry.result = result
                entry.kept_until = now + retention
            return True

    def complete_many(self, completions: Sequence[Completion], /) -> list[bool]:
        return [self.complete(one.hold, result=one.result, retention=one.retention) for one in completions]

    def stream(self) -> DirectStream:
        return DirectStream(self)

    def release(self, hold: Hold, /, *, attempts: int, retention: float) -> bool:
        with self._lock:
            now = self._clock()
            entry = self._owned(hold, now, *_HELD, State.RELEASED)
            if entry is None:
                return False
            entry.state = State.RELEASED
            entry.attempts = attempts
            entry.kept_until = now + retention
            return True

    def abandon(self, hold: Hold, /, *, attempts: int, retention: float) -> bool:
        with self._lock:
            now = self._clock()
            entry = self._owned(hold, now, *_HELD)
            if entry is None:
                return False
            entry.state = State.IN_PROGRESS
            entry.attempts = attempts
            entry.lease_ends = now
            entry.kept_until = now + retention
            return True

    def quarantine(self, hold: Hold, /, *, note: bytes) -> bool:
        with self._lock:
            entry = self._owned(hold, self._clock(), *_HELD, State.QUARANTINED)
            if entry is None:
                return False
            if entry.state is not State.QUARANTINED:
                entry.state = State.QUARANTINED
                entry.result = note
                entry.kept_until = math.inf
            return True

    def quarantined(self, *, limit: int = 100, after: bytes = b"") -> list[Record]:
        with self._lock:
            now = self._clock()
            waiting = (key for key, entry in self._entries.items() if entry.state is State.QUARANTINED)
            return [self._record(key, now) for key in sorted(key for key in waiting if key > after)[: max(limit, 0)]]

    def resolve(self, key: bytes, /, *, completed: bool, retention: float) -> bool:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.state is not State.QUARANTINED:
                return False
            entry.state = State.COMPLETED if completed else State.RELEASED
            entry.nonce = os.urandom(NONCE_BYTES)  # whoever put it there has no say any more
            entry.attempts = entry.attempts if completed else 0
            entry.result = None
            entry.kept_until = self._clock() + retention
            return True

    def forget(self, key: bytes, /) -> bool:
        with self._lock:
            now = self._clock()
            entry = self._entries.get(key)
            if entry is not None and entry.kept_until > now:
                if entry.state is State.QUARANTINED or (entry.state in _HELD and entry.lease_ends > now):
                    return False
                del self._entries[key]
            return True

    def lookup(self, key: bytes, /) -> Record | None:
        with self._lock:
            now = self._clock()
            entry = self._entries.get(key)
            return None if entry is None or entry.kept_until <= now else self._record(key, now)

    def _record(self, key: bytes, now: float) -> Record:
        entry = self._entries[key]
        return Record(
            key=key,
            state=entry.state,
            token=entry.token,
            attempts=entry.attempts,
            redrive=entry.redrive,
            lease_left=max(0.0, entry.lease_ends - now) if entry.state in _HELD else 0.0,
            retention_left=entry.kept_until - now,
            fingerprint=entry.fingerprint,
            result=entry.result,
        )

    def purge(self, *, limit: int = 1000) -> int:
        with self._lock:
            now = self._clock()
            over = (key for key, entry in self._entries.items() if entry.kept_until <= now)
            keys = list(itertools.islice(over, limit))
            for key in keys:
                del self._entries[key]
            return len(keys)

    def close(self) -> None:
        """Nothing to let go of: the records stay for whoever still has this object."""


_named: dict[str, MemoryStore] = {}


def open_memory(url: str) -> MemoryStore:
    """`memory://` gives a store of its own; `memory://name` the same store for the same name in this process."""
    name = url.partition("://")[2]
    return _named.setdefault(name, MemoryStore()) if name else MemoryStore()
