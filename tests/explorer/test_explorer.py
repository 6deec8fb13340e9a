"""The short form of `run.py`: the same worlds, the same checker and the same controls, with fewer schedules."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from bus import BusWorld, opened_bus
from controls import CONTROLS, INBOX_CONTROLS, damage
from places import opened
from scenarios import ALONE, INBOX, TOGETHER, actions_for
from world import Scenario, World

from idempotent_bus import hooks
from idempotent_bus.testing.explorer import Coverage, Failure, explore
from idempotent_bus.testing.faults import FAULTS, Plan, plan_of, text_of

#: Every second fault too, where it takes no more than a second or two.
PAIRS = (
    "one",
    "one that fails once",
    "one older than the retention",
    "two copies",
    "two bodies of one id",
    "quarantine",
    "streamed window, claimed in turn, with one that fails once",
)


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """Thousands of scripted failures, each logged with its traceback, would take longer than the runs."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def explored(place: str, scenarios: dict[str, Scenario], *, depth: int = 1, beyond: int = 0) -> Coverage:
    coverage = Coverage()
    with opened(place) as there:
        for scenario in scenarios.values():

            def run(plan: Plan, scenario: Scenario = scenario) -> list[str]:
                return World(scenario, plan, there).play().script.passed

            actions = actions_for(scenario, transactional=there.transactional)
            explore(run, actions=actions, depth=depth, beyond=beyond, coverage=coverage)
    return coverage


@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_of_faults_in_memory(name: str) -> None:
    """I1, I2, I4, I6, I8, I11, I12, I13: whatever two steps do, nothing is lost, nor done twice without an excuse."""
    coverage = explored("memory", {name: ALONE[name]}, depth=2)
    assert coverage.schedules[2] > 16


@pytest.mark.parametrize("name", TOGETHER)
def test_workers_in_turns(name: str) -> None:
    """The same with two and three workers that hand over, or stand still past their lease, at any step."""
    coverage = explored("memory", {name: TOGETHER[name]}, beyond=250)
    assert coverage.schedules[1] > 16


@pytest.mark.parametrize("place", ["sqlite", "redis", "postgresql"])
def test_every_single_fault_on_a_real_store(place: str) -> None:
    """The same on the stores themselves: each fault at each step, one worker and several."""
    scenarios = {**ALONE, **TOGETHER}
    if place != "sqlite":
        more = ("window with a copy", "streamed window, claimed in turn", "two workers, two copies")
        scenarios = {name: scenarios[name] for name in (*PAIRS, *more)}
    coverage = explored(place, scenarios)
    assert coverage.schedules[1] > 150


@pytest.mark.parametrize("place", ["sqlite inbox", "postgresql inbox"])
def test_every_single_fault_with_the_inbox(place: str) -> None:
    """I2, I3: record and effect are one commit, so that no crash excuses a second effect."""
    names = list(INBOX) if place.startswith("sqlite") else ["one", "one that fails once", "window of three"]
    coverage = explored(place, {name: INBOX[name] for name in names})
    assert coverage.schedules[1] > 80


@pytest.mark.parametrize("broker", ["memory", "sqlite"])
def test_every_single_fault_on_the_whole_way(broker: str, tmp_path: Path) -> None:
    """I1, I5: from the charge's commit through outbox, relay and broker to the card, over a kombu connection."""
    coverage = Coverage()
    with opened(broker) as place, opened_bus(broker, str(tmp_path)) as bus:
        explore(lambda plan: BusWorld(plan, place, bus).play().script.passed, depth=1, coverage=coverage)
    assert coverage.missing(("publish", "read", "confirm", "mark", "claim", "handler", "complete", "ack")) == []


def test_all_named_steps_meet_all_faults(tmp_path: Path) -> None:
    """Each of the hooks is reached, and each of the four faults is injected there: no name is an empty one."""
    coverage = explored("memory", ALONE)
    # A probe, and a quarantine, come only after a first fault.
    coverage.add(explored("memory", {name: ALONE[name] for name in ("probe", "quarantine")}, depth=2))
    coverage.add(explored("sqlite inbox", {"one": INBOX["one"]}))
    with opened("memory") as place, opened_bus("memory", str(tmp_path)) as bus:
        explore(lambda plan: BusWorld(plan, place, bus).play().script.passed, depth=1, coverage=coverage)
    assert coverage.missing(hooks.STEPS) == []
    assert set(hooks.STEPS) == {
        value for name, value in vars(hooks).items() if name.isupper() and isinstance(value, str)
    }


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_shows_damage(name: str) -> None:
    """The control: with one protection off, the same schedules and the same checker find what it protects from."""
    with opened("memory") as place:
        found, schedules = damage(name, place)
    assert found[CONTROLS[name][0]], f"{schedules} schedules, and nothing was found"


@pytest.mark.parametrize("name", INBOX_CONTROLS)
def test_a_control_of_the_inbox_shows_damage(name: str) -> None:
    """The same for the transaction."""
    with opened("sqlite inbox") as place:
        found, schedules = damage(name, place)
    assert found[INBOX_CONTROLS[name][0]], f"{schedules} schedules, and nothing was found"


def test_a_failing_schedule_is_a_line_that_replays_it() -> None:
    """What a failure says is enough to run the very same schedule again, and to find the same."""
    _, variant, scenario = CONTROLS["early ack"]
    with opened("memory") as place:

        def run(plan: Plan) -> list[str]:
            return World(scenario, plan, place, variant).play().script.passed

        with pytest.raises(Failure) as failure:
            explore(run, actions=FAULTS, depth=1)
        line = text_of(failure.value.plan)
        assert line in str(failure.value)
        with pytest.raises(AssertionError, match="I1"):
            run(plan_of(line))


def test_a_run_is_repeatable() -> None:
    """The same plan gives the same steps, in the same order, also where workers are threads."""
    scenario = TOGETHER["three workers, three copies"]
    plan = plan_of("2:switch,5:stall,9:switch-2,12:crash-after")
    with opened("memory") as place:
        histories = {tuple(map(str, World(scenario, plan, place).play().history)) for _ in range(20)}
    assert len(histories) == 1
