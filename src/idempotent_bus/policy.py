"""What a user may set about one consumer, in one frozen value, checked when it is made."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .abandoned import OnAbandoned
from .errors import ConfigurationError

__all__ = ["Backoff", "Policy"]

DAY = 86_400.0
#: Waits for a busy record are spread over up to half as much again.
LONGEST_SPREAD = 1.5


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with full jitter: a random delay between 0 and min(cap, base * 2 ** (n - 1)) seconds.

    max_attempts: after so many attempts that ended so the message goes to the dead letter; None: as the policy says.
    """

    base: float = 1.0
    cap: float = 300.0
    max_attempts: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.base <= self.cap < math.inf:
            raise ConfigurationError("a backoff needs 0 < base <= cap, in seconds, and a finite cap")
        if self.max_attempts is not None:
            _check_attempts(self.max_attempts)

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
    backoffs: other backoffs for classes of exceptions; the first class in the exception's own order that is named
        here decides.
    busy_delay: the least number of seconds before a copy looks again while another one is being handled.
    permanent: exception classes that no rerun can mend, beside errors.Permanent.
    on_abandoned: what to do when a worker died in the middle of the handler: "rerun", "quarantine", or a probe; see
        `abandoned.py`.
    in_doubt: exception classes, beside errors.InDoubt, after which nobody knows whether the effect happened, such as
        the timeout of a call: they leave the record abandoned too.
    """

    lease: float = 60.0
    retention: float = 7 * DAY
    max_attempts: int = 8
    backoff: Backoff = field(default_factory=Backoff)
    busy_delay: float = 1.0
    permanent: tuple[type[BaseException], ...] = ()
    backoffs: Mapping[type[BaseException], Backoff] = field(default_factory=dict)
    on_abandoned: OnAbandoned = "rerun"
    in_doubt: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        # Each is said as what must hold, so that NaN, which fails every comparison, is refused too.
        if not 0.05 <= self.lease < math.inf:
            raise ConfigurationError("lease must be at least 0.05 seconds, and finite")
        if not self.lease <= self.retention < math.inf:
            raise ConfigurationError("retention must be at least as long as the lease, and finite")
        _check_attempts(self.max_attempts)
        if not 0 < self.busy_delay < math.inf:
            raise ConfigurationError("busy_delay must be more than 0 seconds, and finite")
        for name in ("permanent", "in_doubt"):
            classes = getattr(self, name)
            if not isinstance(classes, tuple) or not all(map(_is_exception, classes)):
                # Found out only when a handler raised, it would end the consumer in the middle of a failure.
                raise ConfigurationError(f"{name} must be a tuple of exception classes")
        if not isinstance(self.backoffs, Mapping) or not all(
            _is_exception(kind) and isinstance(backoff, Backoff) for kind, backoff in self.backoffs.items()
        ):
            raise ConfigurationError("backoffs must map exception classes to Backoff(...)")
        if self.on_abandoned not in ("rerun", "quarantine") and not callable(self.on_abandoned):
            raise ConfigurationError('on_abandoned must be "rerun", "quarantine", or a probe: a function')
        if self.longest_wait >= self.retention:
            raise ConfigurationError(
                f"retention ({self.retention:.0f} s) must exceed the longest wait between two attempts "
                f"({self.longest_wait:.0f} s): the record would be forgotten before the message comes back"
            )

    @property
    def longest_wait(self) -> float:
        """The longest time for which a message is put off: after a failure, or while another one is being handled."""
        caps = (self.backoff.cap, *(backoff.cap for backoff in self.backoffs.values()))
        return max(*caps, LONGEST_SPREAD * max(self.lease, self.busy_delay))

    @property
    def most_attempts(self) -> int:
        """The largest number of attempts that any kind of failure allows."""
        own = (backoff.max_attempts or 0 for backoff in self.backoffs.values())
        return max(self.max_attempts, self.backoff.max_attempts or 0, *own, 0)

    def backoff_for(self, error: BaseException) -> Backoff:
        """The backoff after this error."""
        if self.backoffs:
            for kind in type(error).__mro__:
                if kind in self.backoffs:
                    return self.backoffs[kind]
        return self.backoff

    def attempts_for(self, error: BaseException) -> int:
        """How many attempts an error of this kind may use up."""
        own = self.backoff_for(error).max_attempts
        return self.max_attempts if own is None else own


def _is_exception(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseException)


def _check_attempts(number: object) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ConfigurationError("max_attempts must be a whole number of at least 1")
