"""Which schedules to run: each single action at each step, then each pair, then seeded random ones beyond.

A schedule is a plan, see `faults.py`. A run is a function that takes a plan, plays it, checks what must hold, and gives
the names of the steps that were passed; the second action of a pair is put at each step that the first one's run passed
after it, so that also what mends the first fault is met by a second.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .faults import FAULTS, Action, Plan, text_of

__all__ = ["Coverage", "Failure", "explore", "pairs", "random_plans", "singles", "triples"]

#: Plays a plan and gives the names of the steps passed. Raises what it finds wrong.
Run = Callable[[Plan], Sequence[str]]


class Failure(AssertionError):
    """A schedule after which something does not hold. plan: the schedule; cause: what was found, chained."""

    def __init__(self, plan: Plan, cause: BaseException) -> None:
        super().__init__(f"schedule {text_of(plan) or 'without a fault'}: {cause}")
        self.plan = dict(plan)
        self.cause = cause


@dataclass
class Coverage:
    """What was run. schedules: by how many actions. steps: the names passed. met: (step, action) -> how often."""

    schedules: Counter[int] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    met: Counter[tuple[str, Action]] = field(default_factory=Counter)

    def note(self, plan: Plan, passed: Sequence[str]) -> None:
        """One schedule was run."""
        self.schedules[len(plan)] += 1
        for number, action in plan.items():
            if number <= len(passed):
                self.met[passed[number - 1], action] += 1

    def add(self, other: Coverage) -> None:
        """All that another one has, too."""
        self.schedules += other.schedules
        self.steps += other.steps
        self.met += other.met

    def missing(self, steps: Sequence[str], actions: Sequence[Action] = FAULTS) -> list[tuple[str, str]]:
        """The pairs of a step and an action that never came together."""
        return [(step, action.value) for step in steps for action in actions if not self.met[step, action]]


def play(run: Run, plan: Plan, coverage: Coverage) -> Sequence[str]:
    """Run one schedule, and note it. Raises Failure."""
    try:
        passed = run(plan)
    except Exception as error:
        raise Failure(plan, error) from error
    coverage.note(plan, passed)
    return passed


def singles(run: Run, coverage: Coverage, actions: Sequence[Action] = FAULTS) -> Iterator[tuple[Plan, Sequence[str]]]:
    """The run without a fault, then one for each action at each of its steps."""
    plain = play(run, {}, coverage)
    coverage.steps.update(set(plain))
    yield {}, plain
    for number in range(1, len(plain) + 1):
        for action in actions:
            plan = {number: action}
            yield plan, play(run, plan, coverage)


def pairs(run: Run, coverage: Coverage, actions: Sequence[Action] = FAULTS) -> Iterator[tuple[Plan, Sequence[str]]]:
    """The singles, and for each of them every further action at every step that is passed after it."""
    for plan, passed in singles(run, coverage, actions):
        coverage.steps.update(set(passed))
        yield plan, passed
        for first in plan:
            for second in range(first + 1, len(passed) + 1):
                for action in actions:
                    two = {**plan, second: action}
                    yield two, play(run, two, coverage)


def triples(run: Run, coverage: Coverage, actions: Sequence[Action] = FAULTS) -> Iterator[tuple[Plan, Sequence[str]]]:
    """The pairs, and for each every third action after it. For small scenarios: there are many."""
    for plan, passed in pairs(run, coverage, actions):
        yield plan, passed
        if len(plan) == 2:
            for third in range(max(plan) + 1, len(passed) + 1):
                for action in actions:
                    three = {**plan, third: action}
                    yield three, play(run, three, coverage)


def random_plans(
    seed: int, steps: int, actions: Sequence[Action] = FAULTS, *, least: int = 3, most: int = 5
) -> Iterator[Plan]:
    """Plans without end, the same ones for the same seed. steps: how many a run has; some plans reach a bit beyond."""
    draw = random.Random(seed)  # noqa: S311 - repeatable on purpose
    while True:
        number = draw.randint(least, most)
        span = max(steps + 2 * number, number)
        yield {place: draw.choice(actions) for place in sorted(draw.sample(range(1, span + 1), number))}


def explore(
    run: Run,
    *,
    actions: Sequence[Action] = FAULTS,
    depth: int = 2,
    beyond: int = 0,
    seed: int = 0,
    coverage: Coverage | None = None,
    on_progress: Callable[[], Any] = lambda: None,
) -> Coverage:
    """Run all schedules with up to `depth` actions (1, 2 or 3), then `beyond` random ones with more.

    Gives what was run. on_progress: called after every schedule. Raises Failure at the first schedule after which
    something does not hold.
    """
    coverage = Coverage() if coverage is None else coverage
    steps = 0
    for plan, passed in (singles, pairs, triples)[depth - 1](run, coverage, actions):
        steps = max(steps, len(passed) if not plan else 0)
        on_progress()
    plans = random_plans(seed, steps, actions, least=depth + 1, most=depth + 3)
    for _ in range(beyond):
        plan = next(plans)
        coverage.steps.update(set(play(run, plan, coverage)))
        on_progress()
    return coverage
