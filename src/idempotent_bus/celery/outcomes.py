"""What a guarded task raises towards Celery when it has not simply returned: how the child tells its parent."""

from __future__ import annotations

from typing import Any

from celery.exceptions import Reject

from ..errors import IdempotentBusError
from ..model import Reason

__all__ = ["PutOff", "Refused", "ResultNotStored"]


class PutOff(Reject):
    """Nothing was done, or it is not known: the message is kept by the broker, and comes back after `delay` seconds.

    To Celery it is a Reject with requeue, so that no state, no errback and no result is written for it; the parent
    (`request.py`) puts the message off rather than requeueing it in a tight loop.
    """

    def __init__(self, why: str, delay: float) -> None:
        super().__init__(why, requeue=True)
        self.delay = delay

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.delay)


class Refused(IdempotentBusError):
    """The task was not run and never will be, unless a person redrives it; its message goes to the dead letter.

    reason: why. attempts: how many had been started.
    """

    def __init__(self, text: str, reason: Reason | str = Reason.INVALID, attempts: int = 0) -> None:
        # All of them as arguments that are JSON: a result backend makes it again of its class and these.
        self.reason = Reason(reason)
        self.attempts = attempts
        super().__init__(text, self.reason.value, attempts)

    def __str__(self) -> str:
        return str(self.args[0])


class ResultNotStored(IdempotentBusError):
    """A copy of a task that was done before, whose result could not be stored: there is nothing to give to callbacks.

    The effect is there, and is not repeated. Return something smaller, or that the serializer knows, or raise
    `max_result`.
    """
