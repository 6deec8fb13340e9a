"""How often a message is sent, and what may be claimed once it was sent several times."""

from __future__ import annotations

import enum
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import ConfigurationError, PublishError, PublishUnknown, Rejected, Unroutable

__all__ = ["Known", "NotConfirmed", "ResendPolicy", "Sends"]


@dataclass(frozen=True, slots=True)
class ResendPolicy:
    """When a publish is sent again, and when it is given up.

    max_sends: how often one message is sent at most.
    patience: seconds after which no further send is begun; it also bounds how long a broker that cannot be reached
        is tried again, since such a try sends nothing and does not count as a send.
    base, cap: the pause before send n + 1 is a random part of min(cap, base * 2 ** (n - 1)) seconds (full jitter).
    clock, sleep, draw: for tests; draw gives a number from 0 to 1.
    """

    max_sends: int = 5
    patience: float = 30.0
    base: float = 0.1
    cap: float = 5.0
    clock: Callable[[], float] = field(default=time.monotonic, repr=False, compare=False)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)
    draw: Callable[[], float] = field(default=random.random, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_sends < 1:
            raise ConfigurationError("max_sends must be at least 1")
        if self.patience < 0 or not 0 < self.base <= self.cap:
            raise ConfigurationError("a resend policy needs patience >= 0 and 0 < base <= cap, in seconds")

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures (from 1)."""
        return min(self.cap, self.base * 2.0 ** min(failures - 1, 62)) * self.draw()


class Known(enum.IntEnum):
    """What is known of one send that was not confirmed. The larger the number, the weaker the claim."""

    NOT_SENT = 0
    """Nothing left this process: the broker could not be reached."""
    UNROUTABLE = 1
    """The broker said that no queue, or no such exchange, is there: nothing was stored."""
    REFUSED = 2
    """The broker said no. Where a message goes to several queues, some of them may have taken it."""
    UNKNOWN = 3
    """Sent, or perhaps sent, and no answer came."""


class NotConfirmed(Exception):
    """One send that did not end as landed; it never leaves the library. final: sending again cannot help."""

    def __init__(self, known: Known, text: str, *, final: bool = False) -> None:
        super().__init__(text)
        self.known = known
        self.text = text
        self.final = final


class Sends:
    """All sends of one message: counts them, and knows the strongest claim that all of them together allow.

    Of several sends each may have landed, so the weakest of them decides: a message that was returned as unroutable
    after a send without an answer is *unknown*, not unroutable.
    """

    __slots__ = ("_began", "_failures", "_policy", "_weakest", "_weakest_text", "count")

    def __init__(self, policy: ResendPolicy) -> None:
        self._policy = policy
        self._began = policy.clock()
        self._failures = 0
        self._weakest = Known.NOT_SENT
        self._weakest_text = ""
        self.count = 0

    @property
    def in_doubt(self) -> bool:
        """True if a send may have landed although nobody confirmed it."""
        return self._weakest >= Known.REFUSED

    def failed(self, failure: NotConfirmed) -> float | None:
        """Note a send that was not confirmed. Returns the seconds to pause before the next, or None: give up."""
        policy = self._policy
        self._failures += 1
        if failure.known is not Known.NOT_SENT:
            self.count += 1
        if failure.known >= self._weakest:
            self._weakest, self._weakest_text = failure.known, failure.text
        if failure.final or self.count >= policy.max_sends:
            return None
        left = self._began + policy.patience - policy.clock()
        if left <= 0:
            return None
        return min(policy.pause(self._failures), left)

    def error(self, failure: NotConfirmed, inner_msg_id: str) -> PublishError:
        """What is raised after the last failure; it claims no more than all sends together allow."""
        weakest, text = self._weakest, self._weakest_text
        if weakest is Known.UNROUTABLE:
            return Unroutable(text if "nothing was stored" in text else f"{text}; nothing was stored", inner_msg_id)
        if weakest is Known.REFUSED:
            return Rejected(f"{text}; sends: {self.count}", inner_msg_id)
        again = "publish again with inner_msg_id=error.inner_msg_id to resend the very same message"
        if weakest is Known.NOT_SENT:
            return PublishUnknown(f"never sent, {text}; {again}", inner_msg_id)
        if failure.text != text:
            text = f"{text}, later {failure.text}"
        return PublishUnknown(f"it may or may not have landed ({text}; sends: {self.count}); {again}", inner_msg_id)
