"""What follows from a failure, from age and from doubt: the same rules for the dedup store and for the inbox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .errors import HandlerAcknowledged, Permanent, Transient
from .model import Reason
from .policy import DAY, LONGEST_SPREAD, Policy
from .work import Ended, Work

__all__ = ["Failing", "Silence"]

#: While the store gives no answer, messages are put off for longer and longer, up to so many seconds.
_LONGEST_DOUBT: Final = 15.0
#: A handler may ask for a longer wait (a `Retry-After` that is a date); RabbitMQ has none of more than 49 days.
_LONGEST_ASKED: Final = 30 * DAY


class Failing:
    """The rules of one policy. Safe for threads.

    draw: gives a random number in [0, 1). wall: seconds since the epoch.
    """

    __slots__ = ("_draw", "_longest", "_permanent", "_policy", "_wall")

    def __init__(self, policy: Policy, draw: Callable[[], float], wall: Callable[[], float]) -> None:
        self._policy = policy
        self._draw = draw
        self._wall = wall
        # The record, which counts the attempts, must still be there: what is asked for may become twice as long.
        self._longest = max(policy.longest_wait, min(policy.retention / 2, _LONGEST_ASKED))
        self._permanent: tuple[type[BaseException], ...] = (Permanent, HandlerAcknowledged, *policy.permanent)

    def reason(self, error: BaseException, attempt: int) -> Reason | None:
        """Why what raised this at this attempt goes to the dead letter; None: it is tried again."""
        if isinstance(error, self._permanent):
            return Reason.PERMANENT
        return Reason.ATTEMPTS if attempt >= self._policy.attempts_for(error) else None

    def delay(self, error: BaseException, attempt: int) -> float:
        """Seconds until it is tried again."""
        asked = error.retry_after if isinstance(error, Transient) else None
        if isinstance(asked, (int, float)) and asked >= 0:  # a subclass may have set anything
            return min(asked, self._longest)
        return self._policy.backoff_for(error).delay(max(attempt, 1), self._draw)

    def spread(self, how: Ended, delay: float) -> float:
        """How long a message that ended so waits, in seconds.

        Spread over half as much again, so that copies which met once do not meet again at the same moment; a failure's
        backoff has its own jitter.
        """
        if how is Ended.FAILED:
            return delay
        return max(delay, self._policy.busy_delay) * (1 + self._draw() * (LONGEST_SPREAD - 1))

    def is_too_old(self, work: Work) -> bool:
        """True if a message without a record may have been done and forgotten (I11)."""
        return work.published_at is not None and self._wall() - work.published_at > self._policy.retention


class Silence:
    """How long a store has given no clear answer, and so how long what is in doubt is put off. Safe for threads.

    As long as the silence has lasted so far, so that each message asks about twice as late as the time before,
    however many messages ask. clock: monotonic seconds.
    """

    __slots__ = ("_clock", "_policy", "_since")

    def __init__(self, policy: Policy, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        self._since: float | None = None

    def __bool__(self) -> bool:
        return self._since is not None

    def begin(self) -> None:
        """The store gave no clear answer."""
        if self._since is None:
            self._since = self._clock()

    def end(self) -> None:
        """It gave one."""
        self._since = None

    def pause(self) -> float:
        """Seconds to wait before the next question: at least the policy's busy delay, at most 15 or that."""
        since, shortest = self._since, self._policy.busy_delay
        lasted = 0.0 if since is None else self._clock() - since
        return min(max(shortest, lasted), max(shortest, _LONGEST_DOUBT))
