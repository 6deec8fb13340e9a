"""Messages delivered to a handler as a bus may deliver them, under the guard, over a store and a broker in memory."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .clock import ManualClock
from .faults import Action, Plan, Script
from .outside import OutsideStep
from .trial import Case, Subject, TrialRun

__all__ = ["Crash", "Delivered", "Way", "crashes", "deliver"]

#: More steps than any run has: workers that hand over at each of these hand over at each step.
_EVERY_STEP = range(1, 500)


class Way(str, enum.Enum):
    """How the messages are delivered."""

    TWICE = "twice"
    """Each one two times, one right after the other."""
    LATE = "late"
    """Each one once more, after its lease and the broker's timeout are over."""
    OUT_OF_ORDER = "out of order"
    """The last one first."""
    CONCURRENTLY = "concurrently"
    """Each one two times, to two workers that take turns at each step, in threads of their own."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """What came of it. acked: biz-ids of the messages that were. dead: those in the dead letter, and why.

    runs: how often the handler was called.
    """

    acked: frozenset[str]
    dead: dict[str, str]
    runs: int


@dataclass(frozen=True, slots=True)
class Crash:
    """One run in which the worker died, was started again, and ended its work. body: with a biz-id of its own."""

    title: str
    body: Any
    delivered: Delivered


def deliver(
    handler: Callable[..., Any],
    *bodies: Any,
    way: Way = Way.TWICE,
    biz_id: str | None = None,
    outside: Sequence[OutsideStep] = (),
) -> Delivered:
    """Deliver these messages to a guarded or a plain handler in this way, until all is quiet.

    biz_id: the path of the biz-id; a guarded handler's own, or the only field named so, unless given. outside: as for
    `assert_idempotent`; where workers can take turns within the handler.
    """
    subject = Subject(handler, bodies, lambda: None, outside, biz_id)
    plan: Plan = dict.fromkeys(_EVERY_STEP, Action.SWITCH) if way is Way.CONCURRENTLY else {}

    def publish(run: TrialRun) -> None:
        for body in reversed(bodies) if way is Way.OUT_OF_ORDER else bodies:
            run.broker.publish(body)
            if way is not Way.OUT_OF_ORDER:
                run.broker.publish(body, delay=3 * subject.policy.lease if way is Way.LATE else 0.0)

    with subject.outside.patched():
        return _run(subject, bodies, plan, publish, workers=2 if way is Way.CONCURRENTLY else 1)[0]


def crashes(
    handler: Callable[..., Any],
    body: Any,
    *,
    outside: Sequence[OutsideStep] = (),
    biz_id: str | None = None,
    restart: Callable[[], object] | None = None,
) -> Iterator[Crash]:
    """Deliver the message again and again, with another biz-id each time: first undisturbed, then with a crash before
    and after each step, those in `outside` among them. Gives each run after its worker was started again and all is
    quiet; look then what the handler has done.
    """
    subject = Subject(handler, [body], lambda: None, outside, biz_id, restart)
    plans: list[tuple[str, Plan]] = [("no crash", {})]
    for title, plan in plans:
        fresh = subject.ids.fresh(body)
        with subject.outside.patched():
            delivered, passed = _run(subject, [fresh], plan, lambda run, one=fresh: run.broker.publish(one))  # type: ignore[misc]
        if not plan:
            plans += [
                (f"a crash {when} {step} (step {number})", {number: action})
                for number, step in enumerate(passed, 1)
                for when, action in (("before", Action.CRASH_BEFORE), ("after", Action.CRASH_AFTER))
            ]
        yield Crash(title, fresh, delivered)


def _run(
    subject: Subject, bodies: Sequence[Any], plan: Plan, publish: Callable[[TrialRun], object], workers: int = 1
) -> tuple[Delivered, list[str]]:
    case = Case("")
    case.script = Script(plan, error=subject.error, watch=case)
    run = TrialRun(subject, case, ManualClock(), {str(subject.ids.of(body)): body for body in bodies})
    publish(run)
    run.drain(workers)
    delivered = Delivered(frozenset(case.finished), dict(case.given_up), len(case.attempts))
    return delivered, case.script.passed
