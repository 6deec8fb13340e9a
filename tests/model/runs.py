"""One configuration in a process of its own."""

from __future__ import annotations

import time
from typing import Final

from .configurations import CONFIGURATIONS
from .explore import Explored, explore

__all__ = ["run"]

#: Seconds between two lines of progress from one process.
_EVERY: Final = 10.0


class _Progress:
    def __init__(self) -> None:
        self._next = time.monotonic() + _EVERY

    def __call__(self, text: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _EVERY
            print(f"  {text}", flush=True)


def run(job: tuple[int, int | None]) -> Explored:
    """Explore a configuration, by its number; within fewer faults than its own, if that is asked for."""
    configuration = CONFIGURATIONS[job[0]]
    faults = configuration.faults if job[1] is None else min(job[1], configuration.faults)
    return explore(configuration.model(faults), progress=_Progress())
