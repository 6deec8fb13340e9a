"""Breadth-first exploration of a protocol, until nothing new is found, with faults as the outer measure.

States are reached with as few faults as they can be, and among these in as few steps. So a state is visited once, with
the largest number of faults still to come: whatever could happen after it with fewer is a part of that. A trace is
therefore the shortest of those with the fewest faults.

What a protocol refuses in a step, or in a state, is a `Violation`. After the frontier is empty, every state is checked
for the way on (I13): there must be a path without any further fault to a state in which all is quiet. The graph is
finite, so a system in which whatever can happen for ever again does happen at last gets there.
"""

from __future__ import annotations

import itertools
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

__all__ = ["Explored", "Found", "Model", "Step", "Violation", "explore"]

State = tuple[Any, ...]


class Violation(NamedTuple):
    """What a step broke: the invariant's number, and how, in words."""

    invariant: str
    text: str


class Step(NamedTuple):
    """One step out of a state. fault: how many of the faults it costs. after: the next state, or what it broke."""

    action: str
    who: str
    fault: int
    after: State | Violation


class Model(Protocol):
    """A protocol within bounds. States are tuples, in a canonical form."""

    name: str
    faults: int

    def initial(self) -> State:
        """Where it begins."""
        ...

    def steps(self, state: State, *, faults: bool) -> list[Step]:
        """All steps out of a state. faults: those that are faults as well."""
        ...

    def all_steps(self, state: State) -> list[Step]:
        """All steps, without any reduction, to states that are not in the canonical form: for telling a trace."""
        ...

    def canonical(self, state: State) -> State:
        """The state that stands for all that are like this one. A violation stays as it is."""
        ...

    def is_final(self, state: State) -> bool:
        """True if all is quiet here."""
        ...

    def tell(self, step: Step) -> str:
        """The step in words."""
        ...

    @property
    def actions(self) -> frozenset[str]:
        """Everything that can happen: each must have happened when the frontier is empty."""
        ...


@dataclass(slots=True)
class Found:
    """A violation with the way to it, in words."""

    violation: Violation
    trace: list[str]
    faults: int

    def text(self) -> str:
        """The trace, one numbered step a line."""
        lines = [f"{number:3}. {step}" for number, step in enumerate(self.trace, 1)]
        return "\n".join([*lines, f"  => {self.violation.invariant}: {self.violation.text}"])


@dataclass(slots=True)
class Explored:
    """What an exploration has shown. finished: the frontier was empty; found: the first violation, if any.

    seconds: by the clock; processor: those that it computed. never: actions that never happened.
    """

    name: str
    faults: int
    states: int
    steps: int
    seconds: float
    processor: float
    depth: int
    finished: bool
    found: Found | None = None
    taken: Counter[str] = field(default_factory=Counter)
    by_faults: list[int] = field(default_factory=list)
    never: frozenset[str] = frozenset()


class _Search:
    def __init__(self, model: Model) -> None:
        self.model = model
        first = model.initial()
        self.index: dict[State, int] = {first: 0}
        self.states: list[State] = [first]
        self.parents = array("l", [-1])
        self.costs = bytearray([0])
        self.edges_from = array("l")
        self.edges_to = array("l")
        self.final = bytearray([model.is_final(first)])
        self.taken: Counter[str] = Counter()
        self.depth = 0
        self.count = 0

    def add(self, state: State, parent: int, cost: int) -> int:
        at = len(self.states)
        self.index[state] = at
        self.states.append(state)
        self.parents.append(parent)
        self.costs.append(cost)
        self.final.append(self.model.is_final(state))
        return at

    def way_to(self, at: int) -> list[int]:
        way = [at]
        while self.parents[way[-1]] >= 0:
            way.append(self.parents[way[-1]])
        way.reverse()
        return way

    def found(self, at: int, violation: Violation, last: Step | None) -> Found:
        model, way = self.model, self.way_to(at)
        trace = []
        here = model.initial()
        for one, other in itertools.pairwise(way):
            fault, goal = self.costs[other] - self.costs[one], self.states[other]
            step = next(s for s in model.all_steps(here) if s.fault == fault and _is_like(model, s.after, goal))
            trace.append(_told(model, step))
            here = step.after
        cost = self.costs[at]
        if last is not None:
            # The same but for names: here the first message may be the second.
            broken = (s for s in model.all_steps(here) if s.action == last.action and type(s.after) is Violation)
            step = next(s for s in broken if s.after[0] == violation.invariant)
            violation = Violation(*step.after)
            trace.append(_told(model, step))
            cost += last.fault
        return Found(violation, trace, cost)


def _is_like(model: Model, after: State | Violation, goal: State) -> bool:
    return type(after) is not Violation and model.canonical(after) == goal


def _told(model: Model, step: Step) -> str:
    return f"{'FAULT: ' if step.fault else ''}{model.tell(step)}"


def explore(
    model: Model,
    *,
    most_states: int = 20_000_000,
    liveness: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Explored:
    """Explore until the frontier is empty, a violation is found, or `most_states` were visited."""
    began, computed = time.monotonic(), time.process_time()
    search = _Search(model)
    by_faults: list[int] = []
    found: Found | None = None
    finished = False
    # Those found by a fault wait for the next layer, by depth: (state, parent).
    layers: list[dict[int, list[tuple[State, int]]]] = [{} for _ in range(model.faults + 3)]
    buckets: dict[int, list[int]] = {0: [0]}
    #: The first violation that a fault leads to, by the layer: (depth, state, step). Fewer faults come first.
    broken: dict[int, tuple[int, int, Step]] = {}
    for layer in range(model.faults + 1):
        before = len(search.states) if layer else 0
        if layer:
            buckets = {}
        found = _layer(search, layer, buckets, layers, broken, most_states, progress)
        by_faults.append(len(search.states) - before)
        if found is not None or len(search.states) >= most_states:
            break
    else:
        finished = True
    if finished and liveness:
        stuck = _stuck(search)
        if stuck is not None:
            violation = Violation("I13", "from here nothing leads to rest, even if no more faults happen")
            found = search.found(stuck, violation, None)
    never = model.actions - set(search.taken) if finished else frozenset()
    return Explored(
        model.name,
        model.faults,
        len(search.states),
        search.count,
        time.monotonic() - began,
        time.process_time() - computed,
        search.depth,
        finished,
        found,
        search.taken,
        by_faults,
        never,
    )


def _layer(
    search: _Search,
    layer: int,
    buckets: dict[int, list[int]],
    layers: list[dict[int, list[tuple[State, int]]]],
    broken: dict[int, tuple[int, int, Step]],
    most: int,
    progress: Callable[[str], None] | None,
) -> Found | None:
    """All states that are reached with `layer` faults and no fewer."""
    model, index, states, taken = search.model, search.index, search.states, search.taken
    arriving, room = layers[layer], model.faults - layer
    more = layer < model.faults
    steps_of, add = model.steps, search.add
    edges_from, edges_to = search.edges_from, search.edges_to
    depth = 0
    while buckets or arriving:
        depth = min(min(buckets, default=1 << 30), min(arriving, default=1 << 30))
        if layer in broken and broken[layer][0] <= depth:
            break
        todo = buckets.pop(depth, [])
        for state, parent in arriving.pop(depth, ()):
            if state not in index:
                todo.append(add(state, parent, layer))
        following: list[int] = buckets.setdefault(depth + 1, [])
        later = [layers[layer + cost].setdefault(depth + 1, []) for cost in (0, 1, 2)]
        for at in todo:
            for step in steps_of(states[at], faults=more):
                action, _, fault, after = step
                taken[action] += 1
                if type(after) is Violation:
                    if not fault:
                        search.depth = max(search.depth, depth + 1)
                        return search.found(at, after, step)
                    if fault <= room and depth + 1 < broken.get(layer + fault, (1 << 30,))[0]:
                        broken[layer + fault] = depth + 1, at, step
                    continue
                known = index.get(after)
                if fault:
                    if known is None and fault <= room:
                        later[fault].append((after, at))
                    continue
                if known is None:
                    known = add(after, at, layer)
                    following.append(known)
                edges_from.append(at)
                edges_to.append(known)
        search.count = sum(taken.values())
        if not following:
            del buckets[depth + 1]
        for cost, found in enumerate(later):
            if not found:
                del layers[layer + cost][depth + 1]
        if todo:
            search.depth = max(search.depth, depth)
        if progress is not None and todo:
            progress(f"{model.name}: faults {layer}, depth {depth}, {len(states)} states")
        if len(states) >= most:
            return None
    if layer not in broken:
        return None
    depth, at, step = broken[layer]
    search.depth = max(search.depth, depth)
    return search.found(at, step.after, step)  # type: ignore[arg-type]  # a violation


def _stuck(search: _Search) -> int | None:
    """A state from which no path without faults leads to a final one, the first found; None if there is none."""
    size = len(search.states)
    starts = array("l", bytes(8 * (size + 1)))
    for target in search.edges_to:
        starts[target + 1] += 1
    for at in range(size):
        starts[at + 1] += starts[at]
    places = starts[:]
    sources = array("l", bytes(8 * len(search.edges_to)))
    for source, target in zip(search.edges_from, search.edges_to, strict=True):
        sources[places[target]] = source
        places[target] += 1
    good = bytearray(search.final)
    todo = [at for at in range(size) if good[at]]
    while todo:
        at = todo.pop()
        for place in range(starts[at], starts[at + 1]):
            source = sources[place]
            if not good[source]:
                good[source] = 1
                todo.append(source)
    return next((at for at in range(size) if not good[at]), None)
