"""One delivery as the core sees it: an identity, a function to run, how to answer the broker, and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, NamedTuple, Protocol

from .model import Reason

__all__ = ["Ended", "Ending", "Passing", "Settlement", "Work"]


class Settlement(Protocol):
    """How one delivery is answered. Each method may raise the broker's connection errors; then nothing is settled."""

    def ack(self) -> None:
        """The message is done: the broker may forget it."""
        ...

    def wait(self, delay: float) -> None:
        """Let the message come back no sooner than `delay` seconds from now, kept by the broker, as one copy."""
        ...

    def dead_letter(self, reason: Reason, error: str, attempts: int) -> bool:
        """Put the message into the dead letter; once that is confirmed, ack it.

        False: it could not be written there. The message is not acked, and is looked at again.
        """
        ...


@dataclass(slots=True, eq=False)
class Work:
    """One delivery, as the core sees it.

    redelivered: it may have been delivered before. It must be True for whatever the broker delivers again, and for
    what comes back after `Settlement.wait`, even as a new message: a first delivery may run on a reservation, which
    counts no attempt if its worker dies, so a message that looked like one each time could kill workers for ever.
    published_at: when it was published or, if it was redriven since, died; seconds since the epoch; None if unknown.
    nonce: what it is claimed with; None: a fresh one. Whoever chose it can end the claim for a process that died.
    """

    scope: str
    biz_id: str = field(repr=False)  # neither the id nor the body, which `run` may show, belongs into a log
    key: bytes
    run: Callable[..., Any] = field(repr=False)
    settle: Settlement
    fingerprint: bytes | None = None
    inner_msg_id: str | None = None
    redelivered: bool = False
    redrive: int = 0
    published_at: float | None = None
    nonce: bytes | None = None


#: How a claim ends whose handler raised what somebody else answers for: given back without counting the attempt, or
#: abandoned, since nobody knows whether the effect is there. None: the library answers for it.
Passing = Literal["released", "abandoned"] | None


class Ended(str, Enum):
    """How the handling of one delivery ended."""

    COMPLETED = "completed"
    REPLAYED = "replayed"
    """It was done before: acked without running, or found done by the probe."""
    BUSY = "busy"
    FAILED = "failed"
    DEAD = "dead"
    HELD = "held"
    """It belongs into the dead letter, which could not be written: not acked, and looked at again."""
    IN_DOUBT = "in doubt"
    LEASE_LOST = "lease lost"
    PASSED = "passed"
    """The handler raised what somebody else answers for, `value`: the claim is ended, and nothing was settled."""
    OPEN = "open"
    """manual=True, and the handler returned before the business had succeeded."""


class Ending(NamedTuple):
    """How it ended, with the handler's result or the stored one."""

    how: Ended
    value: Any = None
