"""The short form of the protocol model: fewer faults, every mutant. The long form is `python -m tests.model`."""

from __future__ import annotations

import pytest

from .configurations import CONFIGURATIONS, Configuration
from .explore import State, Step, Violation, explore
from .invariants import COVERED, NOT_COVERED
from .mutants import MUTANTS, Mutant, hunt
from .outbox_mode import OutboxMode, copies_by_faults


def _name(value: Configuration | Mutant) -> str:
    return value.name


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=_name)
def test_no_schedule_within_the_bounds_breaks_an_invariant(configuration: Configuration) -> None:
    """I1 to I9, I11 to I15: every state within the short bounds is visited, none is wrong, and each leads to rest."""
    explored = explore(configuration.model(configuration.short))
    assert explored.found is None, explored.found.text()
    assert explored.finished


@pytest.mark.parametrize("mutant", MUTANTS, ids=_name)
def test_a_broken_protocol_is_caught(mutant: Mutant) -> None:
    """The control: each mutant is caught by the invariant that it breaks, and the way there is told step by step."""
    explored = hunt(mutant)
    assert mutant.is_killed_by(explored), explored
    assert explored.found is not None
    assert len(explored.found.trace) == explored.found.text().count("\n")


def test_every_invariant_that_is_covered_has_a_mutant() -> None:
    """No check stands here that nothing has ever failed; and what is not covered is said."""
    assert {mutant.breaks for mutant in MUTANTS} == set(COVERED)
    assert {*COVERED, *NOT_COVERED} == {f"I{number}" for number in range(1, 16)}
    assert len(MUTANTS) >= 15


def test_a_configuration_names_all_that_can_happen_in_it() -> None:
    """What is taken is what is declared, so that `never taken` means something. The other way round: the long form."""
    for configuration in CONFIGURATIONS:
        explored = explore(configuration.model(1), liveness=False)
        assert set(explored.taken) <= configuration.model(1).actions, configuration.name


def test_the_upper_half_sends_no_more_copies_than_the_lower_half_is_explored_with() -> None:
    """The halves meet in the copies that land: none extra without a fault, with an edge none with one fault."""
    with_edge = copies_by_faults(OutboxMode("with an edge", faults=2))
    without = copies_by_faults(OutboxMode("without", faults=2, edge=False))
    assert with_edge[1, 1] == without[1, 1] == 0
    assert min(cost for copies, cost in with_edge.items() if max(copies) > 1) == 2
    assert min(cost for copies, cost in without.items() if max(copies) > 1) == 1
    assert min(cost for copies, cost in without.items() if max(copies) > 2) == 2


class _Counter:
    """Counts to three, with a fault that goes back by two, and perhaps a hole in which it stays."""

    name = "counter"
    faults = 1
    actions = frozenset({"up", "back", "fall"})

    def __init__(self, *, hole: bool) -> None:
        self._hole = hole

    def initial(self) -> State:
        return (0,)

    def is_final(self, state: State) -> bool:
        return bool(state[0] == 3)

    def steps(self, state: State, *, faults: bool) -> list[Step]:
        at = state[0]
        steps = [Step("up", "", 0, (at + 1,))] if 0 <= at < 3 else []
        if faults and at >= 2:
            steps.append(Step("back", "", 1, (at - 2,)))
        if faults and at == 1 and self._hole:
            steps.append(Step("fall", "", 1, (-1,)))
        return steps

    def all_steps(self, state: State) -> list[Step]:
        return self.steps(state, faults=True)

    def canonical(self, state: State) -> State:
        return state

    def tell(self, step: Step) -> str:
        return step.action


def test_the_explorer_finds_a_state_from_which_nothing_leads_on() -> None:
    """I13's check can fail, and says the shortest way there; where it holds, states and actions are counted rightly."""
    well = explore(_Counter(hole=False))
    assert (well.states, well.finished, well.found, well.depth) == (4, True, None, 3)
    assert well.never == {"fall"}
    stuck = explore(_Counter(hole=True)).found
    assert stuck is not None
    assert stuck.trace == ["up", "FAULT: fall"]
    assert stuck.violation.invariant == "I13"


def test_a_trace_is_the_shortest_with_the_fewest_faults() -> None:
    """A violation that a longer way reaches without a fault is told that way."""

    class Broken(_Counter):
        def steps(self, state: State, *, faults: bool) -> list[Step]:
            if state[0] == 3:
                return [Step("up", "", 0, Violation("I1", "gone"))]
            if faults and state[0] == 0:
                return [*super().steps(state, faults=faults), Step("fall", "", 1, Violation("I1", "gone"))]
            return super().steps(state, faults=faults)

    found = explore(Broken(hole=False)).found
    assert found is not None
    assert (found.trace, found.faults) == (["up"] * 4, 0)
