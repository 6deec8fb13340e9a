"""Canvases of guarded tasks give what plain Celery's give: chain, group, chord, map, starmap, chunks, three deep in
each other, with link and link_error, on both brokers, with Redis as the result backend; undisturbed and killed.

The oracle is plain Celery, undisturbed, in the same test: `celery_canvas_app.py` as a worker of its own, with the same
canvases. Compared are each canvas's result, the traces that links and errbacks have left, and, where nothing is killed,
how often each task ran. The long form, ten rounds of kills and a report, is `python tests/integration/run_canvas.py`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from canvas_rig import BROKERS, Run


@pytest.fixture(params=list(BROKERS))
def broker(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    BROKERS[name]()
    return name


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    made: list[Run] = []
    yield made
    for run in made:
        run.close()


def test_canvases_give_what_plain_celery_gives(unique: str, broker: str, runs: list[Run]) -> None:
    """Nothing is killed: the same results, every link and errback, and every task's run as often as in plain Celery."""
    plain, guarded = Run(f"{unique}p", "plain", broker), Run(f"{unique}g", "guarded", broker)
    runs += [plain, guarded]
    senders = [run.send() for run in runs]
    oracle, ours = (run.given(sender) for run, sender in zip(runs, senders, strict=True))
    assert ours == oracle
    left = plain.notes(1)
    assert guarded.notes(left.total()) == left
    assert guarded.runs() == plain.runs()
    assert plain.runs().keys() == oracle.keys()


@pytest.mark.timeout(300)
def test_canvases_are_killed(unique: str, broker: str, runs: list[Run]) -> None:
    """I1, I2: every fourth child dies when its task has succeeded, others and the parent at random moments; the results
    are still those of plain Celery undisturbed, no link and no errback is missing, and none is there once more than
    executions were killed."""
    plain, run = Run(f"{unique}p", "plain", broker), Run(f"{unique}k", "guarded", broker, deaths=4)
    runs += [plain, run]
    calm = plain.send()
    ours = run.killed(random.Random(f"{broker}0"))
    oracle, left = plain.given(calm), plain.notes(1)
    notes = run.notes(left.total())
    assert ours == oracle
    assert not left - notes, "a link or an errback is missing"
    assert (notes - left).total() <= run.kills
    assert run.deaths, "nobody died"
    assert run.parents, "no parent was killed: the canvases were done too soon"


@pytest.mark.parametrize("kind", ["plain", "guarded"])
def test_a_link_after_a_death(unique: str, broker: str, runs: list[Run], kind: str) -> None:
    """I2: a child dies when its task's links are sent and its result is not stored: the links come again. Each runs
    once; the control: in plain Celery twice."""
    run = Run(unique, kind, broker, deaths=1, when="before", only="link,two links")
    runs.append(run)
    assert run.given(run.send()) == {"link": 3, "two links": 4}
    times = 1 if kind == "guarded" else 2
    assert run.notes(3 * times) == {"link: 3": times, "one: 4": times, "two: 4": times}
    assert run.deaths == 2


@pytest.mark.parametrize("kind", ["plain", "guarded"])
def test_a_chord_after_a_death(unique: str, broker: str, runs: list[Run], kind: str) -> None:
    """I1: a child dies when its task's result is stored and its chord has not counted it. The chord is finished; the
    control: Celery takes the task for done, and its chord waits for ever."""
    run = Run(unique, kind, broker, deaths=1, when="after", only="chord", patience=40 if kind == "guarded" else 6)
    runs.append(run)
    assert run.given(run.send()) == {"chord": 12 if kind == "guarded" else "raises TimeoutError"}
    assert run.deaths == 3
