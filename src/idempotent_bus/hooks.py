"""Named steps: every outside step of the library goes through one function that a test can replace.

A step function takes the step's name, then the callable and its arguments, and returns what the callable
returns. The default calls straight through. A fault injector may raise before the call (crash before), after it
(crash after, reply lost), or instead of it (error).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

T = TypeVar("T")

#: Every step's name, in the order of a message's life. Fault injection goes through all of them.
PUBLISH: Final = "publish"
CLAIM: Final = "claim"
HANDLER: Final = "handler"
RENEW: Final = "renew"
COMPLETE: Final = "complete"
#: A window's completions are sent by COMPLETE without waiting, and their answers read by this.
DURABLE: Final = "durable"
#: The answer to a claim that went along with a completion, by COMPLETE; None if nothing is known of it.
CLAIMED: Final = "claimed"
RELEASE: Final = "release"
DEAD_LETTER: Final = "dead_letter"
WAIT: Final = "wait"
ACK: Final = "ack"
COMMIT: Final = "commit"
#: What becomes of a record whose holder died in the middle.
ABANDON: Final = "abandon"
PROBE: Final = "probe"
QUARANTINE: Final = "quarantine"
#: The relay's: rows are claimed, then sent and confirmed (PUBLISH is each send within it), then marked as sent.
READ: Final = "read"
CONFIRM: Final = "confirm"
MARK: Final = "mark"
STEPS: Final = (
    PUBLISH,
    CLAIM,
    HANDLER,
    RENEW,
    COMPLETE,
    DURABLE,
    CLAIMED,
    RELEASE,
    DEAD_LETTER,
    WAIT,
    ACK,
    COMMIT,
    ABANDON,
    PROBE,
    QUARANTINE,
    READ,
    CONFIRM,
    MARK,
)


class Step(Protocol):
    """Performs one named outside step."""

    def __call__(self, name: str, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T: ...


def direct(name: str, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """The step that is used outside tests: call the function."""
    return function(*args, **kwargs)
