"""What a user may set about one consumer, in one frozen value, checked when it is made."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import ConfigurationError

__all__ = ["Backoff", "Policy"]

DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with full jitter: a random delay between 0 and min(cap, base * 2 ** (n - 1)) seconds."""

    base: float = 1.0
    cap: float = 300.0

    def __post_init__(self) -> None:
        if not 0 < self.base <= self.cap < math.inf:
            raise ConfigurationError("a backoff needs 0 < base <= cap, in seconds, and a finite cap")

    def delay(self, attempt: int, draw: Callable[[], float] = random.random) -> float:
        """Seconds to wait after the attempt with this number (from 1). draw: gives a number from 0 to 1."""
        return min(self.cap, self.base * 2.0 ** min(attempt - 1, 62)) * draw()


@dataclass(frozen=True, slots=True)
class Policy:
    """How one scope is guarded.

    lease: seconds that a claim lives without being renewed; a running handler's lease is renewed every third of it,
        and a handler whose worker died is run again after it.
    retention: seconds that a completed record is remembered. It must exceed the longest time after which the broker,
        the retries or a redrive can still bring the message back (I11).
    max_attempts: after so many counted attempts the message goes to the dead letter. A first attempt whose worker
        died before it was counted may add one (I12).
    backoff: the delay after a handler that raised.
    busy_delay: the least number of seconds before a copy looks again while another one is being handled.
    permanent: exception classes that no rerun can mend, beside errors.Permanent.
    """

    lease: float = 60.0
    retention: float = 7 * DAY
    max_attempts: int = 8
    backoff: Backoff = field(default_factory=Backoff)
    busy_delay: float = 1.0
    permanent: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        # Each is said as what must hold, so that NaN, which fails every comparison, is refused too.
        if not 0.05 <= self.lease < math.inf:
            raise ConfigurationError("lease must be at least 0.05 seconds, and finite")
        if not self.lease <= self.retention < math.inf:
            raise ConfigurationError("retention must be at least as long as the lease, and finite")
        if not isinstance(self.max_attempts, int) or self.max_attempts < 1:
            raise ConfigurationError("max_attempts must be a whole number of at least 1")
        if not 0 < self.busy_delay < math.inf:
            raise ConfigurationError("busy_delay must be more than 0 seconds, and finite")
        if not isinstance(self.permanent, tuple) or not all(
            isinstance(kind, type) and issubclass(kind, BaseException) for kind in self.permanent
        ):
            # Found out only when a handler raised, it would end the consumer in the middle of a failure.
            raise ConfigurationError("permanent must be a tuple of exception classes")
