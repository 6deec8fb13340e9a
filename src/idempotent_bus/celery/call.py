"""One run of a guarded task's function, and what its executor wants done with the message."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

from kombu.utils import json

from ..model import Reason
from .outcomes import Refused, ResultNotStored
from .stamping import Held, holding_back

__all__ = ["Call", "RetriedAndReturned", "Settled", "held_back", "is_running", "restored", "running_call"]

#: What a result is stored as that cannot be.
_NOT_STORED: Final = ""

_running: ContextVar[Call | None] = ContextVar("idempotent_bus_call", default=None)


@dataclass(slots=True)
class Settled:
    """What the executor wants done with the message: Celery, or the parent, does it once the task has ended."""

    delay: float = 0.0
    refused: Refused | None = None

    def ack(self) -> None:
        """Celery acks late."""

    def wait(self, delay: float) -> None:
        """Let it come back after so many seconds."""
        self.delay = delay

    def dead_letter(self, reason: Reason, error: str, attempts: int) -> bool:
        """Refuse it."""
        self.refused = Refused(error, reason, attempts)
        return True


class RetriedAndReturned(Exception):
    """The task called `retry(throw=False)` and went on: it is not done, another message will do it."""


@dataclass(slots=True, eq=False)
class Call:
    """One delivery's call of the task's function.

    transaction: the parameter that takes the transaction. limit: how long a result's JSON may be that is stored.
    value, error: what the last run returned, or raised. messages: what it has sent by retry or replace, which is held
    back until its claim is given back. handed: the transaction that the last run was given.
    """

    run_task: Callable[..., Any]
    request: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    transaction: str | None
    limit: int
    value: Any = None
    error: BaseException | None = None
    messages: list[Held] = field(default_factory=list)
    handed: Any = None

    def run(self, *handed: Any) -> str | None:
        """Call it; gives its result as it is stored. Called again if a transaction met another one."""
        kwargs = {**self.kwargs, self.transaction: handed[0]} if self.transaction and handed else self.kwargs
        self.handed = handed[0] if handed else None
        self.messages.clear()
        self.value = self.error = None
        token = _running.set(self)
        try:
            self.value = self.run_task(*self.args, **kwargs)
        except BaseException as error:
            self.error = error
            raise
        finally:
            _running.reset(token)
        if self.messages:
            raise RetriedAndReturned
        return None if self.value is None else self._stored()

    def _stored(self) -> str:
        try:
            text = str(json.dumps(self.value))  # kombu's: what comes back is what a message would bring
        except Exception:  # noqa: BLE001 - the effect has happened: whatever a result raises must not repeat it
            return _NOT_STORED
        return text if len(text) <= self.limit else _NOT_STORED


def restored(stored: Any) -> Any:
    """The result that a copy gets. Raises ResultNotStored."""
    if stored is None:
        return None
    if not isinstance(stored, str) or stored == _NOT_STORED:
        raise ResultNotStored(
            "the task was done before, but its result was too large or not serialisable, so there is none to go on with"
        )
    return json.loads(stored)


def is_running(request: Any) -> bool:
    """True within the function that is being run for this request."""
    call = _running.get()
    return call is not None and call.request is request


def running_call() -> Call | None:
    """The call whose function is being run here."""
    return _running.get()


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within it task messages of the running call are kept; outside of a call they are sent."""
    call = _running.get()
    with contextlib.nullcontext() if call is None else holding_back(call.messages):
        yield
