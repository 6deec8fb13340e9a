"""Messages that wait here for their next attempt, where the broker has no delays."""

from __future__ import annotations

import heapq
import itertools
import time
from typing import Generic, TypeVar

__all__ = ["Parked"]

T = TypeVar("T")


class Parked(Generic[T]):
    """What is parked, by when it is due. For one thread; others may ask how many there are."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, entry: T, delay: float) -> None:
        """Keep it for so many seconds."""
        heapq.heappush(self._heap, (time.monotonic() + delay, next(self._order), entry))

    def take_due(self, now: float) -> list[T]:
        """Take out what is due, the earliest first. now: monotonic seconds."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        return due

    def wait(self, now: float) -> float:
        """Seconds until the next one is due; infinite if there is none."""
        return self._heap[0][0] - now if self._heap else float("inf")
