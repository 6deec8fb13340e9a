"""Faults at the named steps: a `Step` that does what a plan says, at the steps whose numbers it says it of.

The steps of a run are numbered from 1 in the order in which they are passed, over all its workers. A plan says what
happens at which of them:

=============  ======================================================================================
crash-before   the worker dies before the step is done
crash-after    it dies after the step was done, before it hears of it
reply-lost     the step is done, and then raises as if it had failed
error          the step is not done, and raises
switch         another worker goes on first; `switch-2`: the one after that
stall          the worker stands still until all that others can do is done, leases and timeouts included
=============  ======================================================================================

After a crash every later step of that worker raises `Killed` too: what a `finally` does on its way out must not pass
for something that a dead process did.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from .. import hooks
from ..errors import StoreUnavailable

__all__ = ["FAULTS", "Action", "FaultyStep", "Killed", "Plan", "Script", "Watch", "error_of", "plan_of", "text_of"]

T = TypeVar("T")

#: The steps that ask a dedup store.
_STORE_STEPS: Final = frozenset(
    {
        *(hooks.CLAIM, hooks.RENEW, hooks.COMPLETE, hooks.DURABLE, hooks.CLAIMED),
        *(hooks.RELEASE, hooks.ABANDON, hooks.QUARANTINE),
    }
)
#: The steps that run code of the user's.
_USERS_STEPS: Final = frozenset({hooks.HANDLER, hooks.PROBE})


class Action(str, enum.Enum):
    """What a plan may say of one step."""

    CRASH_BEFORE = "crash-before"
    CRASH_AFTER = "crash-after"
    REPLY_LOST = "reply-lost"
    ERROR = "error"
    SWITCH = "switch"
    SWITCH_2 = "switch-2"
    STALL = "stall"


#: Those that a single worker can meet.
FAULTS: Final = (Action.CRASH_BEFORE, Action.CRASH_AFTER, Action.REPLY_LOST, Action.ERROR)
#: Those that need a second worker.
_HANDOVERS: Final = frozenset({Action.SWITCH, Action.SWITCH_2, Action.STALL})

#: Step number -> what happens there.
Plan = Mapping[int, Action]


class Killed(BaseException):
    """The worker's process is gone. Not an Exception: no handler, and nobody else, may take it for a failure."""


def error_of(step: str) -> Exception:
    """The error that this step's outside would give: the store's, the handler's, or the broker's connection's."""
    if step in _STORE_STEPS:
        return StoreUnavailable("injected: no answer")
    if step in _USERS_STEPS:
        return RuntimeError("injected: the handler failed")
    return ConnectionError("injected: the connection is gone")


def text_of(plan: Plan) -> str:
    """A plan in one line: "3:crash-before,7:stall". Nothing for none."""
    return ",".join(f"{number}:{Action(plan[number]).value}" for number in sorted(plan))


def plan_of(text: str) -> dict[int, Action]:
    """The plan that such a line says. Raises ValueError for anything else."""
    plan: dict[int, Action] = {}
    for part in filter(None, text.split(",")):
        number, _, action = part.partition(":")
        plan[int(number)] = Action(action)
    return plan


class Watch:
    """Is told what the steps of a run do. Override what is needed; nothing is done here."""

    def done(self, worker: int, step: str, arguments: Sequence[Any], result: Any) -> None:
        """The step was really done, whether its worker hears of it or not."""

    def losing(self, worker: int, step: str) -> None:
        """The step is about to be done, and will raise all the same."""

    def crashed(self, worker: int) -> None:
        """The worker is about to die."""

    def raised(self, worker: int, step: str) -> None:
        """The step was done, and is about to raise as if it had failed."""

    def hand_over(self, worker: int, action: Action) -> None:
        """Another worker goes on; returns when it is this one's turn again."""


class Script:
    """One run's plan, and what was passed. For one run; its workers may be threads of which one runs at a time.

    plan: see above. error: gives the error of a step, `error_of` unless told otherwise. watch: is told what happens.
    passed: the names of the steps passed so far. applied: the numbers of the plan's actions that have come.
    """

    def __init__(
        self, plan: Plan | None = None, *, error: Callable[[str], Exception] = error_of, watch: Watch | None = None
    ) -> None:
        self.plan: Plan = {} if plan is None else plan
        self.passed: list[str] = []
        self.applied: list[int] = []
        self.error = error
        self.watch = Watch() if watch is None else watch

    def worker(self, number: int = 0) -> FaultyStep:
        """The `step` of one worker. A worker that is started again after a crash gets another one."""
        return FaultyStep(self, number)


class FaultyStep:
    """A `hooks.Step` that goes by a script. killed: its worker has died."""

    __slots__ = ("_script", "killed", "number")

    def __init__(self, script: Script, number: int) -> None:
        self._script = script
        self.number = number
        self.killed = False

    def __call__(self, name: str, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Perform the step, or what the plan says instead."""
        if self.killed:
            raise Killed
        script = self._script
        script.passed.append(name)
        number = len(script.passed)
        action = script.plan.get(number)
        watch = script.watch
        if action is None:
            result = function(*args, **kwargs)
            watch.done(self.number, name, args, result)
            return result
        script.applied.append(number)
        if action in _HANDOVERS:
            watch.hand_over(self.number, action)
            result = function(*args, **kwargs)
            watch.done(self.number, name, args, result)
            return result
        if action is Action.CRASH_BEFORE:
            self.kill()
        if action is Action.ERROR:
            raise script.error(name)
        if action is Action.REPLY_LOST:
            watch.losing(self.number, name)
        result = function(*args, **kwargs)
        watch.done(self.number, name, args, result)
        if action is Action.CRASH_AFTER:
            self.kill()
        watch.raised(self.number, name)
        raise script.error(name)

    def kill(self) -> None:
        """Let the worker die here. Always raises Killed."""
        self._script.watch.crashed(self.number)
        self.killed = True
        raise Killed
