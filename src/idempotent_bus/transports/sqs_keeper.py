"""Keeps what a live SQS consumer holds invisible: a thread per channel that asks again in time."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Held", "Keeper"]

logger = logging.getLogger(__name__)

#: SQS takes so many messages in one request.
_BATCH: Final = 10
_LONGEST: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Held:
    """A message that was received and not settled.

    tag: its receipt handle, which is kombu's delivery tag too. timeout: its queue's visibility timeout, in seconds.
    """

    queue: str
    url: str
    tag: str
    timeout: int
    since: float = field(default_factory=time.monotonic)

    def age(self) -> float:
        """Seconds since it was received."""
        return time.monotonic() - self.since


class Keeper:
    """Renews everything that it was given every third of the shortest visibility timeout. Safe for threads.

    renew: renews up to 10 messages of one queue; a weak reference, whose end ends the thread. lock: held while it is
    called, so that who holds it can change a message's visibility without being overtaken by a renewal.
    """

    def __init__(self, renew: weakref.WeakMethod[Callable[[list[Held]], None]]) -> None:
        self.lock = threading.RLock()
        self._renew = renew
        self._interval = _LONGEST
        self._held: dict[str, Held] = {}
        self._stopped = False
        self._woken = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, held: Held) -> None:
        """Keep this one from now on. The first one starts the thread."""
        with self.lock:
            self._held[held.tag] = held
            if held.timeout / 3 < self._interval:
                self._interval = max(held.timeout / 3, 0.1)
                self._woken.set()
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(target=self._run, name="idempotent-bus-sqs-keeper", daemon=True)
                self._thread.start()

    def get(self, tag: str) -> Held | None:
        """The message with this tag, if it is still kept."""
        return self._held.get(tag)

    def remove(self, tag: str) -> None:
        """Forget one. Waits while a renewal is under way, so that none comes after it."""
        with self.lock:
            self._held.pop(tag, None)

    def stop(self) -> None:
        """Renew nothing from now on; what is held can still be looked up."""
        self._stopped = True
        self._woken.set()

    def renew_all(self) -> None:
        """One round: renew everything once. An error is logged; the next round tries again."""
        with self.lock:
            queues: dict[str, list[str]] = {}
            for held in self._held.values():
                queues.setdefault(held.url, []).append(held.tag)
        for tags in queues.values():
            for start in range(0, len(tags), _BATCH):
                self._renew_batch(tags[start : start + _BATCH])

    def _renew_batch(self, tags: list[str]) -> None:
        with self.lock:  # a batch at a time, so that an ack waits for one request at most
            batch = [self._held[tag] for tag in tags if tag in self._held]
            renew = self._renew()
            if not batch or renew is None or self._stopped:
                return
            try:
                renew(batch)
            except Exception as error:  # noqa: BLE001 - tried again at the next round
                logger.warning("messages of queue %s could not be kept invisible yet: %r", batch[0].queue, error)

    def _run(self) -> None:
        while not self._stopped and self._renew() is not None:
            if self._woken.wait(self._interval):
                self._woken.clear()  # another interval, or the end
            else:
                self.renew_all()
