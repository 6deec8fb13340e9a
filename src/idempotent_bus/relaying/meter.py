"""What the commands that run a relay share: `idempotent-bus relay`, and Django's `manage.py relay`.

Counting what it does, ending on signals, one pass over what is due. No terminal is known here.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final, Protocol

import sqlalchemy as sa

from .rows import Backlog

__all__ = ["LEFT_BEHIND", "Meter", "Running", "ending_on_signals", "send_once"]

#: Exit code where a single pass leaves rows behind that could not be sent.
LEFT_BEHIND: Final = 3
#: Seconds between two counts of the table, or so many times what the last one took.
_COUNT_EVERY: Final = 2.0
_COUNT_SHARE: Final = 20


class Running(Protocol):
    """What is used of `relay.Relay`, which stands above."""

    def run_once(self) -> Any:
        """One batch; its `RelayCounts`."""
        ...

    def backlog(self) -> Backlog:
        """Count the table."""
        ...

    def stop(self) -> None:
        """End after the batch that is under way."""
        ...

    @property
    def stopping(self) -> bool:
        """True once `stop` was called."""
        ...


def send_once(relay: Running, show: Callable[[Any], None]) -> bool:
    """Send what is due now. False: some of it could not be sent."""
    while not relay.stopping:
        counts = relay.run_once()
        show(counts)
        if counts.away:
            return False
        if counts.exhausted:
            break
    left = relay.backlog()
    return not left.dead and not left.failing


@contextlib.contextmanager
def ending_on_signals(relay: Running) -> Iterator[None]:
    """SIGTERM and SIGINT stop the relay. Elsewhere than in the main thread, which alone may say so, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        relay.stop()
        signal.signal(number, signal.SIG_DFL)  # whoever asks twice does not want to wait

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Meter:
    """Counts what was sent, and now and then what is left."""

    def __init__(self, relay: Running) -> None:
        self._relay = relay
        self._began = self._last = time.monotonic()
        self._next_count = 0.0
        self._last_sent = 0
        self._sent = self._duplicates = 0
        self._rate = 0.0
        self._away = False
        self._backlog = relay.backlog()

    def add(self, counts: Any) -> bool:
        """Take in one pass. True: the table was counted, so there is something to show."""
        self._sent += counts.sent
        self._duplicates += counts.duplicates
        self._away = counts.away
        now = time.monotonic()
        if now < self._next_count:
            return False
        with contextlib.suppress(sa.exc.SQLAlchemyError):  # the relay itself says so
            self._backlog = self._relay.backlog()
        took = time.monotonic() - now
        self._next_count = now + max(_COUNT_EVERY, took * _COUNT_SHARE)
        self._rate = (self._sent - self._last_sent) / max(now - self._last, 0.001)
        self._last, self._last_sent = now, self._sent
        return True

    def line(self) -> str:
        """All of it in one line."""
        left = self._backlog
        text = f"sent {self._sent} ({self._rate:.0f}/s), pending {left.pending}, oldest {left.oldest:.0f} s"
        if left.failing:
            text += f", failing {left.failing}"
        if left.dead:
            text += f", dead {left.dead}"
        if self._duplicates:
            text += f", refused at the edge {self._duplicates}"
        return text + (", the broker does not answer" if self._away else "")

    def last_line(self) -> str:
        """The same at the end, over the whole time. Counts the table once more."""
        with contextlib.suppress(sa.exc.SQLAlchemyError):  # it has ended as asked, whatever the database says by now
            self._backlog = self._relay.backlog()
        took = max(time.monotonic() - self._began, 0.001)
        self._rate = self._sent / took
        return f"ended after {took:.1f} s: {self.line()}"
