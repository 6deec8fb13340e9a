"""Explore the real code: every fault at every named step, every pair of them, workers in turns, and random ones beyond.

    python tests/explorer/run.py                       # everything, with progress; writes reports/explorer.md
    python tests/explorer/run.py --places memory,sqlite --worlds stores --random 200
    python tests/explorer/run.py --places redis,postgresql --worlds stores --depth 1 --at-least 10000
    python tests/explorer/run.py --worlds stores --streaming    # where several messages are taken at once
    python tests/explorer/run.py --replay 'memory|two copies|3:crash-before,7:error'

After each schedule the faults stop, workers are started again, all is drained, and the history is checked. A schedule
after which something does not hold is printed as a line that replays it. In the same run controls, the code with one
protection taken out, must show damage, or the run is void. Exits with 1 if either fails. The short form is
tests/explorer/test_explorer.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import logging
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from bus import Bus, BusWorld, opened_bus
from controls import CONTROLS, INBOX_CONTROLS, damage
from places import FOLDER, Place, opened
from scenarios import ALONE, INBOX, INBOX_TOGETHER, TOGETHER, actions_for
from world import Scenario, World

import servers
from idempotent_bus import hooks
from idempotent_bus.testing.explorer import Coverage, Failure, explore, random_plans
from idempotent_bus.testing.faults import FAULTS, Action, Plan, plan_of, text_of

REPORT = Path(__file__).parent / "reports" / "explorer.md"
PLACES = ("memory", "sqlite", "redis", "postgresql")
#: How many random schedules beyond the pairs each scenario gets, where `--random` does not say.
BEYOND = {"memory": 3000, "sqlite": 1000, "sqlite inbox": 500, "redis": 50, "postgresql": 30, "postgresql inbox": 10}
#: The scenarios that are so small that every third fault can be tried too, in memory.
SMALL = ("one", "one, in a window", "one, manual", "two copies", "quarantine", "probe")
#: On PostgreSQL, where a run takes longest, these have their singles only; and in its inbox all others have.
LONG = ("one that fails, redriven", "window with one that always fails", "window with one that fails once", *TOGETHER)
SHORT_INBOX = ("one", "one that fails once", "two copies")
#: How far the whole way over kombu goes: pairs where a run is quick, else singles.
BUS_DEPTH = {"memory": 2, "sqlite": 2, "redis": 1, "postgresql": 1}


@dataclass
class Row:
    """What came of one place's scenarios together."""

    name: str
    coverage: Coverage = field(default_factory=Coverage)
    scenarios: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def schedules(self) -> int:
        return self.coverage.schedules.total()


#: What marks a scenario that is another one with streaming on.
STREAMED = ", streamed"


def scenarios_of(place: Place, streaming: bool = False) -> dict[str, Scenario]:
    """All scenarios of a place. streaming: only those in which completions can be streamed, and are."""
    if place.transactional:
        return {**INBOX, **(INBOX_TOGETHER if place.name.startswith("sqlite") else {})}
    every = {**ALONE, **TOGETHER}
    if not streaming:
        return every
    return {
        title + STREAMED: dataclasses.replace(scenario, streaming=True)
        for title, scenario in every.items()
        if scenario.window > 1 and len(scenario.copies) > 1 and not scenario.streaming
    } | {title: scenario for title, scenario in every.items() if scenario.streaming}


def depth_of(place: str, title: str) -> int:
    """How many actions are tried together, everywhere where they can be."""
    if place == "memory" and title in SMALL:
        return 3
    if place == "postgresql":
        return 1 if title in LONG else 2
    if place == "postgresql inbox":
        return 2 if title in SHORT_INBOX else 1
    return 2


def run_one(
    row: Row,
    name: str,
    run: Callable[[Plan], list[str]],
    actions: tuple[Action, ...],
    depth: int,
    beyond: int,
    seed: int,
) -> None:
    """One scenario. A failure is printed as the line that replays it, and ends this scenario only."""
    began, shown = time.monotonic(), time.monotonic()
    coverage = Coverage()

    def progress() -> None:
        nonlocal shown
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"    {row.name}, {name}: {coverage.schedules.total()} schedules", flush=True)

    try:
        explore(run, actions=actions, depth=depth, beyond=beyond, seed=seed, coverage=coverage, on_progress=progress)
    except Failure as failure:
        line = f"python tests/explorer/run.py --replay '{row.name}|{name}|{text_of(failure.plan)}'"
        row.failures.append(f"{failure.cause}: `{line}`")
        print(f"FAILED {failure.cause}\n  {line}", flush=True)
    row.coverage.add(coverage)
    row.scenarios += 1
    row.seconds += time.monotonic() - began
    total = coverage.schedules.total()
    print(f"  {row.name}, {name}: {total} schedules, {total / (time.monotonic() - began):.0f}/s", flush=True)


def more_plans(row: Row, place: Place, scenarios: dict[str, Scenario], at_least: int, seed: int) -> None:
    """Random schedules, each with two to six actions, in every scenario by turns, until the place has had so many."""
    began, coverage, lengths = time.monotonic(), Coverage(), dict[str, int]()
    shown = began
    chosen = random.Random(seed)
    before, broken = row.schedules, set[str]()
    titles = itertools.cycle(scenarios)
    while before + coverage.schedules.total() < at_least and len(broken) < len(scenarios):
        if (title := next(titles)) in broken:
            continue
        scenario = scenarios[title]
        actions = actions_for(scenario, transactional=place.transactional)
        if title not in lengths:
            lengths[title] = len(World(scenario, {}, place).play().script.passed)
        plan = next(random_plans(chosen.getrandbits(60), lengths[title], actions, least=2, most=6))
        try:
            passed = World(scenario, plan, place).play().script.passed
        except AssertionError as cause:
            broken.add(title)
            line = f"python tests/explorer/run.py --replay '{row.name}|{title}|{text_of(plan)}'"
            row.failures.append(f"{cause}: `{line}`")
            print(f"FAILED {cause}\n  {line}", flush=True)
            continue
        coverage.steps.update(set(passed))
        coverage.note(plan, passed)
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"    {row.name}, random: {before + coverage.schedules.total()} of {at_least}", flush=True)
    row.coverage.add(coverage)
    row.seconds += time.monotonic() - began


def explore_place(name: str, given: argparse.Namespace) -> tuple[Row, list[str], list[str]]:
    """All scenarios of a place, then its controls. Gives the row, the controls' lines, and what voids the run."""
    row, lines, void = Row(name), [], []
    beyond = BEYOND[name] if given.random is None else given.random
    with opened(name) as place:
        scenarios = scenarios_of(place, given.streaming)
        for title, scenario in scenarios.items():
            actions = actions_for(scenario, transactional=place.transactional)

            def run(plan: Plan, scenario: Scenario = scenario) -> list[str]:
                return World(scenario, plan, place).play().script.passed

            depth = min(depth_of(name, title), given.depth)
            run_one(row, title, run, actions, depth, beyond, given.seed)
        more_plans(row, place, scenarios, given.at_least, given.seed)
        for title in INBOX_CONTROLS if place.transactional else CONTROLS:
            expected = (INBOX_CONTROLS if place.transactional else CONTROLS)[title][0]
            found, number = damage(title, place)
            broken = ", ".join(f"{invariant} in {count}" for invariant, count in sorted(found.items())) or "nothing"
            lines.append(f"| {name} | {title} | {number} | {expected} | {broken} |")
            print(f"  {name}, control {title}: {broken} of {number} schedules", flush=True)
            if not found[expected]:
                void.append(f"{name}: the control {title!r} shows no damage")
    return row, lines, void


@contextlib.contextmanager
def _opened_bus(name: str) -> Iterator[tuple[Place, Bus]]:
    urls = {"redis": servers.REDIS, "postgresql": servers.POSTGRESQL}
    with (
        tempfile.TemporaryDirectory(dir=FOLDER) as folder,
        opened(name) as place,
        opened_bus(name, folder, **urls) as bus,
    ):
        yield place, bus


def explore_bus(name: str, given: argparse.Namespace) -> Row:
    """The whole way over a kombu connection."""
    row = Row(f"{name} bus")
    urls = {"redis": servers.REDIS, "postgresql": servers.POSTGRESQL}
    with (
        tempfile.TemporaryDirectory(dir=FOLDER) as folder,
        opened(name) as place,
        opened_bus(name, folder, **urls) as bus,
    ):

        def run(plan: Plan) -> list[str]:
            return BusWorld(plan, place, bus).play().script.passed

        beyond = (300 if BUS_DEPTH[name] == 2 else 0) if given.random is None else given.random // 10
        depth = min(BUS_DEPTH[name], given.depth)
        run_one(row, "outbox, relay, broker, consumer", run, FAULTS, depth, beyond, given.seed)
    return row


def replay(line: str) -> int:
    """Run one schedule again and show what happened."""
    where, name, plan = line.split("|")
    if where.endswith(" bus"):
        with _opened_bus(where.removesuffix(" bus")) as (place, bus):
            return _show(BusWorld(plan_of(plan), place, bus))
    with opened(where) as place:
        return _show(World(scenarios_of(place, name.endswith(STREAMED))[name], plan_of(plan), place))


def _show(world: World | BusWorld) -> int:
    code = 0
    try:
        world.play()
    except AssertionError as found:
        print("found:", found)
        code = 1
    for number, step in enumerate(world.script.passed, 1):
        action = world.script.plan.get(number)
        print(f"{number:4} {step:12} {action.value if action else ''}")
    for entry in getattr(world, "history", ()):
        print("    ", *entry)
    return code


def write(path: Path, rows: list[Row], controls: list[str], void: list[str], seconds: float) -> None:
    everything = Coverage()
    for row in rows:
        everything.add(row.coverage)
    steps = [step for step in hooks.STEPS if everything.steps[step] or any(everything.met[step, a] for a in FAULTS)]
    met = sum(1 for step in hooks.STEPS for action in FAULTS if everything.met[step, action])
    total, pairs = everything.schedules.total(), len(hooks.STEPS) * len(FAULTS)
    lines = [
        "# The explorer, long form",
        "",
        f"{time.strftime('%Y-%m-%d')}, {platform.system()}, Python {platform.python_version()}. Made by "
        f"`{' '.join(['python tests/explorer/run.py', *sys.argv[1:]])}`.",
        "",
        f"{total:,} schedules in {seconds:.0f} s; {met} of {pairs} pairs of a named step and a fault; violations: "
        f"{sum(len(row.failures) for row in rows)}.",
        "",
        "`bus`: the whole way over a real kombu connection (outbox, relay, producer, broker, consumer). The others",
        "run the executor over a broker in memory; the store, or the inbox, is the real one. SQLite lies in memory,",
        "PostgreSQL commits without waiting for the disk: explored is what is written when, not what a disk keeps.",
        "",
        "| place | scenarios | no fault | singles | pairs | triples | more | schedules | seconds | a second | broken |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        count = row.coverage.schedules
        more = sum(number for actions, number in count.items() if actions > 3)
        rate = f"{row.schedules / max(row.seconds, 0.001):.0f}"
        cells: list[object] = [row.name, row.scenarios, *(count[actions] for actions in range(4)), more]
        cells += [row.schedules, f"{row.seconds:.0f}", rate, len(row.failures)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "How often each step met each action:", "", "| step | " + " | ".join(a.value for a in Action) + " |"]
    lines.append("|---" * (len(Action) + 1) + "|")
    lines += [f"| {step} | " + " | ".join(str(everything.met[step, a]) for a in Action) + " |" for step in steps]
    missing = everything.missing(hooks.STEPS)
    lines += ["", f"Never met: {missing or 'none'}.", ""]
    lines += ["Controls, of which each must show its damage:", ""]
    lines += ["| place | without | schedules | must break | broken |", "|---|---|---|---|---|", *controls, ""]
    if void:
        lines += ["**Void:** " + "; ".join(void), ""]
    failures = [failure for row in rows for failure in row.failures]
    lines += [f"* {failure}" for failure in failures]
    path.write_text("\n".join(lines).rstrip() + "\n")
    print(f"wrote {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", default=",".join(PLACES), help="of memory, sqlite, redis, postgresql")
    parser.add_argument("--worlds", default="stores,inbox,bus", help="of stores, inbox, bus")
    parser.add_argument("--random", type=int, help="random schedules beyond, for each scenario")
    parser.add_argument("--depth", type=int, default=3, help="at most so many actions tried together everywhere")
    parser.add_argument("--at-least", type=int, default=0, help="random schedules until a place has had so many")
    parser.add_argument("--streaming", action="store_true", help="completions are streamed, where they can be")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--replay", help="place|scenario|plan, as a failure prints it")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)  # thousands of scripted failures, each logged with its traceback
    if given.replay:
        return replay(given.replay)
    began = time.monotonic()
    rows: list[Row] = []
    controls: list[str] = []
    void: list[str] = []
    kinds, worlds = given.places.split(","), given.worlds.split(",")
    names = list(kinds) if "stores" in worlds else []
    if "inbox" in worlds:
        names += [f"{kind} inbox" for kind in kinds if kind in ("sqlite", "postgresql")]
    for name in names:
        print(name, flush=True)
        row, lines, problems = explore_place(name, given)
        rows.append(row)
        controls += lines
        void += problems
        write(given.report, rows, controls, void, time.monotonic() - began)
    for kind in kinds if "bus" in worlds else ():
        rows.append(explore_bus(kind, given))
        write(given.report, rows, controls, void, time.monotonic() - began)
    for problem in void:
        print("VOID", problem)
    return 1 if void or any(row.failures for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
