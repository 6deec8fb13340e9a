"""A clock for tests: no test has to wait."""

from __future__ import annotations

import threading

__all__ = ["ManualClock"]


class ManualClock:
    """Seconds that pass only when told. Give it where a `clock` is taken, and its `sleep` where a `sleep` is.

    start: the first reading, in seconds. Safe for threads.
    """

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start
        self._lock = threading.Lock()

    def __call__(self) -> float:
        """The reading, in seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass. Raises ValueError if they are negative: time does not run back."""
        if not seconds >= 0:
            raise ValueError("a clock cannot be advanced by a negative number of seconds")
        with self._lock:
            self._now += seconds

    def sleep(self, seconds: float) -> None:
        """Instead of `time.sleep`: returns at once, with so many seconds passed."""
        self.advance(seconds)
