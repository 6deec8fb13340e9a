"""A consumer that stands still gives back what it has not begun.

Our transports keep what a consumer holds for as long as its process lives, so that no handler is too slow for them. But
a handler that never returns would keep from everybody what came along with its own message, for ever. Nobody can tell
it from a slow one; but what has not begun may be given back at any time, since its record guards it should it begin
here all the same. What runs is kept. Other brokers take back by themselves: RabbitMQ by its consumer_timeout, kombu's
own transports by their visibility timeout.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

__all__ = ["PATIENCE", "Standstill"]

log = logging.getLogger(__name__)

#: Seconds for which nothing new begins before what waits is given back.
PATIENCE: Final = 30.0


class Standstill:
    """Watches a thread that handles one message after another. Within it, as a context manager, it does so.

    doing: what is being handled now, another object for each message; None: nothing. give_back: called once for each
    standstill, in another thread; raises if it has to be called again.
    """

    def __init__(self, doing: Callable[[], object], give_back: Callable[[], None]) -> None:
        self._doing = doing
        self._give_back = give_back
        self._seen: object = None
        self._since = 0.0
        self._is_over = threading.Event()

    def look(self, now: float) -> None:
        """Look once. now: monotonic seconds."""
        doing = self._doing()
        if doing is not self._seen:
            self._seen, self._since = doing, now
        elif doing is not None and now - self._since >= PATIENCE:
            self._give_back()
            self._since = float("inf")

    def __enter__(self) -> None:
        threading.Thread(target=self._watch, name="idempotent-bus-standstill", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()

    def _watch(self) -> None:
        while not self._is_over.wait(PATIENCE / 6):
            try:
                self.look(time.monotonic())
            except Exception as error:  # noqa: BLE001 - whatever it is, the next look tries again
                log.warning("messages that wait behind a slow handler could not be given back: %r", error)
