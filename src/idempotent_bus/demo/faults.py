"""The trouble of the demo: lost confirms, lost acks and SIGKILL at a named step, each written down before it happens.

One injector serves the guarded and the naive processes alike: the same steps, the same probabilities.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..hooks import ACK, CLAIM, COMMIT, COMPLETE, HANDLER, PUBLISH
from ..model import Landing

T = TypeVar("T")

LOST_CONFIRMS = 0.03
LOST_ACKS = 0.01


@dataclass(frozen=True)
class Death:
    """Die by SIGKILL at the nth pass of a step, before or after it is done."""

    step: str
    after: bool
    nth: int


#: After the effect and before its completion: only here may an external effect come twice.
BETWEEN = (Death(HANDLER, True, 0), Death(COMPLETE, False, 0))

_PLACES = {
    "naive": ((HANDLER, False), (HANDLER, True), (ACK, False), (ACK, True)),
    "store": (
        (CLAIM, False),
        (CLAIM, True),
        (HANDLER, False),
        (HANDLER, True),
        (COMPLETE, False),
        (COMPLETE, True),
        (ACK, False),
        (ACK, True),
    ),
    "inbox": (
        (CLAIM, False),
        (CLAIM, True),
        (HANDLER, False),
        (HANDLER, True),
        (COMMIT, False),
        (COMMIT, True),
        (ACK, False),
        (ACK, True),
    ),
}


def plan_death(mode: str, messages: int, rng: random.Random) -> Death:
    """A death at a random step, within the next `messages` messages."""
    step, after = rng.choice(_PLACES[mode])
    if step in (CLAIM, COMMIT):
        messages //= 10  # one claim takes a window of messages, and so does the inbox's commit
    return Death(step, after, rng.randint(1, max(1, messages)))


class History:
    """An append-only file of events, one JSON line each, written with one system call so that a kill cannot tear it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def __call__(self, event: str, **details: Any) -> None:
        """Write an event down."""
        os.write(self._fd, json.dumps({"event": event, **details}).encode() + b"\n")


def read_history(path: Path) -> list[dict[str, Any]]:
    """All events so far."""
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


class Faults:
    """A step function (see `hooks`) that makes trouble."""

    def __init__(self, history: History, rng: random.Random, death: Death | None = None) -> None:
        self._history = history
        self._rng = rng
        self._death = death
        self._passes = 0

    def __call__(self, name: str, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        death = self._death
        here = death is not None and death.step == name
        if here:
            self._passes += 1
            if not death.after:  # type: ignore[union-attr]  # `here` says that there is a death
                self._die(death)
        if name == ACK and self._rng.random() < LOST_ACKS:
            self._history("ack lost")
            raise ConnectionResetError("the demo loses this ack")
        result = function(*args, **kwargs)
        if here and death.after:  # type: ignore[union-attr]
            self._die(death)
        if result is Landing.DUPLICATE:
            self._history("refused at the edge")
        if name == PUBLISH and self._rng.random() < LOST_CONFIRMS:
            self._history("confirm lost")
            raise ConnectionResetError("the demo loses this confirm")
        return result

    def _die(self, death: Death | None) -> None:
        if death is None or self._passes < death.nth:
            return
        self._history("killed", step=death.step, after=death.after)
        os.kill(os.getpid(), signal.SIGKILL)


def is_between(event: dict[str, Any]) -> bool:
    """True for a kill that came after the effect and before its completion."""
    return any((event["step"], event["after"]) == (place.step, place.after) for place in BETWEEN)
