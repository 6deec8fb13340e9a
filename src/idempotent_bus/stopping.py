"""Being told to stop: the request, the error that ends what is under way, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import overload

from .work import Work

__all__ = ["Stopped", "Stopping", "UntilStopped"]

_STEP = 0.1


class Stopped(Exception):
    """Not an error: the consumer was told to stop."""


class Stopping:
    """Whether a consumer is to stop. Safe for threads and signal handlers.

    timeout: seconds that the handlers have from the first look at what is left; None: as long as they take.
    """

    def __init__(self, timeout: float | None) -> None:
        # Not an Event: its lock is not safe in a signal handler that interrupts the thread which holds it.
        self.requested = False
        self._timeout = timeout
        self._by: float | None = None

    def reset(self) -> None:
        """Forget the request."""
        self.requested, self._by = False, None

    def check(self) -> None:
        """Raise Stopped if it was requested."""
        if self.requested:
            raise Stopped

    @property
    def seconds_left(self) -> float:
        """Of the timeout, which runs from the first look."""
        if self._timeout is None:
            return float("inf")
        if self._by is None:
            self._by = time.monotonic() + self._timeout
        return self._by - time.monotonic()

    def rest(self, seconds: float, meanwhile: Callable[[], None]) -> None:
        """Sleep, but not longer than until the request. meanwhile: called every tenth of a second."""
        end = time.monotonic() + seconds
        while not self.requested and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _STEP))
            meanwhile()


class UntilStopped(Sequence[Work]):
    """The works of a window. Going through them ends with Stopped once the consumer was told to stop.

    The executor then gives back the claims of those that have not started.
    """

    def __init__(self, works: Sequence[Work], stopping: Stopping) -> None:
        #: The one that was begun last.
        self.current: Work | None = None
        self._works = works
        self._check = stopping.check

    def __len__(self) -> int:
        return len(self._works)

    @overload
    def __getitem__(self, index: int) -> Work: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Work]: ...
    def __getitem__(self, index: int | slice) -> Work | Sequence[Work]:
        return self._works[index]

    def __iter__(self) -> Iterator[Work]:
        for work in self._works:
            self._check()
            self.current = work
            yield work
