"""A pool of threads that can be told to start nothing more, and to be left behind if a task never ends.

Neither is possible with concurrent.futures: its shutdown waits, and so does the interpreter's end.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

__all__ = ["Pool"]

log = logging.getLogger(__name__)

_numbers = itertools.count(1)


class Pool:
    """Runs tasks in `size` daemon threads, in the order in which they came. Safe for threads.

    A task takes no arguments and must not raise. Threads are started at the first task that needs them.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._waiting: deque[Callable[[], None]] = deque()
        self._running: dict[int, float] = {}
        self._idle = 0
        self._threads = 0
        self._numbers = itertools.count()
        self._closed = False
        self._changed = threading.Condition()

    def submit(self, task: Callable[[], None]) -> None:
        """Run it as soon as a thread is free. Nothing once the pool is closed."""
        with self._changed:
            if self._closed:
                return
            self._waiting.append(task)
            if self._idle >= len(self._waiting):
                self._changed.notify()
            elif self._threads < self.size:
                thread = threading.Thread(target=self._work, name=f"idempotent-bus-{next(_numbers)}", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system has none left
                    if not self._threads:
                        raise
                else:
                    self._threads += 1

    @property
    def waiting(self) -> int:
        """How many tasks have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many tasks have begun and not ended."""
        return len(self._running)

    @property
    def oldest(self) -> float:
        """How many seconds ago the task began that has been running for longest; 0 if none is."""
        begun = min(list(self._running.values()), default=None)
        return 0.0 if begun is None else time.monotonic() - begun

    @property
    def newest(self) -> float:
        """How many seconds ago the task began that has been running for the shortest time; 0 if none is."""
        begun = max(list(self._running.values()), default=None)
        return 0.0 if begun is None else time.monotonic() - begun

    def clear(self) -> list[Callable[[], None]]:
        """Forget the tasks that have not begun, and return them."""
        with self._changed:
            tasks = list(self._waiting)
            self._waiting.clear()
        return tasks

    def close(self) -> None:
        """Forget what has not begun, and let the threads end after what they are doing. Waits for nothing."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def wait(self, timeout: float) -> bool:
        """Wait until nothing runs. False: it still does."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, max(timeout, 0.0))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._idle -= 1
                if not self._waiting:
                    self._threads -= 1
                    return
                task = self._waiting.popleft()
                number = next(self._numbers)
                self._running[number] = time.monotonic()
            try:
                task()
            except BaseException:  # a thread that ended would be missed
                log.exception("a task raised")
            finally:
                with self._changed:
                    del self._running[number]
                    self._changed.notify_all()
