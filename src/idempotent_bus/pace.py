"""How many messages a window has: as many as are through in a quarter of a second.

A slow handler shrinks it to one message, so that it never holds claims that others could run; a fast one lets it grow
to all that prefetch brings.
"""

from __future__ import annotations

from typing import Final

__all__ = ["Pace"]

_WINDOW_SECONDS: Final = 0.25
#: What a message is believed to take before one was seen: so long that the first window is of one message.
_FIRST_SECONDS_EACH: Final = _WINDOW_SECONDS


class Pace:
    """The size of the next window. For one thread. most: the prefetch."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._seconds_each = _FIRST_SECONDS_EACH

    @property
    def window(self) -> int:
        """How many messages the next window may have, at least one."""
        return max(1, min(self._most, int(_WINDOW_SECONDS / max(self._seconds_each, 1e-6))))

    def note(self, seconds: float, messages: int) -> None:
        """A window of so many messages took so long. The mean moves slowly, but at once to what is far quicker."""
        each = seconds / messages
        self._seconds_each = 0.7 * self._seconds_each + 0.3 * each if each > self._seconds_each / 8 else each
