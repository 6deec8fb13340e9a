"""The canvas matrix, long form: every canvas on both brokers, undisturbed and under kills, beside plain Celery.

    python tests/integration/run_canvas.py                 # ten rounds of kills on each broker: ten minutes
    python tests/integration/run_canvas.py --rounds 2

Writes tests/integration/reports/celery_canvas.md, a line for each canvas, broker, and undisturbed or killed. The
control, plain Celery under the same kills, must give another result somewhere, or the run is void. Exits with 1 unless
all is right. The short form is test_celery_canvas.py.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))

from canvas_rig import BROKERS, Run  # noqa: E402 - found through the lines above

REPORT = HERE / "reports" / "celery_canvas.md"
COLUMNS = ("canvas", "broker", "killed", "plain's result", "ours", "plain's runs", "our runs", "verdict")
HEAD = """# Canvases, beside plain Celery

{date}, {system}, Python {python}, Celery {celery}, kombu {kombu}. Made by `python tests/integration/run_canvas.py` in
{seconds:.0f} seconds.

The oracle is plain Celery, undisturbed, in the same run. "Killed: no": nothing is, and every task must run as often as
in plain Celery. "Killed: yes": {rounds} rounds; of every fourth run of `add` the child dies when the task has
succeeded, other children and once the whole worker at random moments. Then the results must be plain's; what was cut
off in the middle runs again, in all of a round's canvases together at most as often as something was killed. What
Celery's own map, starmap and chunks call is not guarded and not counted there. Runs: how often each task began, over
the rounds the least and the most.

{summary}

| {columns} |
|{lines}|
"""


@dataclass
class Round:
    """What one worker's canvases gave, and what it cost."""

    given: dict[str, Any]
    runs: dict[str, Counter[str]]
    notes: Counter[str]
    deaths: int = 0
    kills: int = 0

    @property
    def total(self) -> int:
        """Runs of guarded tasks: not what Celery's own map, starmap and chunks call."""
        return sum(
            tasks.total() for canvas, tasks in self.runs.items() if "map" not in canvas and "chunks" not in canvas
        )


@dataclass
class Matrix:
    """One broker's."""

    broker: str
    plain: Round
    calm: Round
    killed: list[Round] = field(default_factory=list)
    control: Round | None = None

    def faults(self) -> list[str]:
        """What is not as it must be."""
        found = []
        if self.calm.runs != self.plain.runs:
            found.append("undisturbed, tasks ran more or less often than in plain Celery")
        for number, one in enumerate((self.calm, *self.killed)):
            what = f"round {number}" if number else "undisturbed"
            found += [f"{what}: {canvas} gave {one.given[canvas]!r}" for canvas in self.others(one)]
            if missing := self.plain.notes - one.notes:
                found.append(f"{what}: links missing: {dict(missing)}")
            # A death after success repeats nothing of the task's own: its record is completed. Only what a kill at a
            # random moment cut off may run again.
            if one.total - self.plain.total > one.kills:
                found.append(f"{what}: {one.total - self.plain.total} runs too many, and {one.kills} kills")
            if number and not (one.deaths and one.kills):
                found.append(f"{what}: void, {one.deaths} deaths and {one.kills} kills")
        if self.control is not None and not self.others(self.control):
            found.append("void: plain Celery gives the same under kills")
        return [f"{self.broker}, {one}" for one in found]

    def others(self, one: Round) -> list[str]:
        """The canvases that gave something else than plain Celery's."""
        return [canvas for canvas, result in self.plain.given.items() if one.given.get(canvas) != result]

    def rows(self) -> list[str]:
        made = []
        for canvas, result in self.plain.given.items():
            for killed, rounds in (("no", [self.calm]), ("yes", self.killed)):
                ours = [one.given[canvas] for one in rounds]
                equal = sum(one == result for one in ours)
                same_runs = all(one.runs.get(canvas) == self.plain.runs.get(canvas) for one in rounds)
                right = equal == len(ours) and (killed == "yes" or same_runs)
                said = _cell(result) if equal == len(ours) else " / ".join(sorted({_cell(one) for one in ours}))
                cells = (
                    canvas, self.broker, killed, _cell(result), said,
                    _runs([self.plain], canvas), _runs(rounds, canvas),
                    f"equal in {equal} of {len(ours)}" if right else f"**{equal} of {len(ours)}**",
                )  # fmt: skip
                made.append(f"| {' | '.join(cells)} |")
        return made

    def summary(self) -> str:
        assert self.control is not None
        usual = self.plain.total
        again = [one.total - usual for one in self.killed]
        return (
            f"* {self.broker}: {len(self.plain.given)} canvases, {usual} runs of guarded tasks. "
            f"Undisturbed: {len(self.others(self.calm))} other results, {self.calm.total - usual} runs more. "
            f"Killed, {len(self.killed)} rounds: {sum(one.deaths for one in self.killed)} deaths after success, "
            f"{sum(one.kills for one in self.killed)} executions that kills may have hit; "
            f"{sum(len(self.others(one)) for one in self.killed)} other results, {sum(again)} runs again, "
            f"{sum((self.plain.notes - one.notes).total() for one in self.killed)} links missing. The control, plain "
            f"Celery under one such round: {len(self.others(self.control))} canvases gave something else or nothing, "
            f"{(self.control.notes - self.plain.notes).total()} links ran twice."
        )


def _cell(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _runs(rounds: Sequence[Round], canvas: str) -> str:
    tasks = sorted({task for one in rounds for task in one.runs.get(canvas, ())})
    counts = {task: [one.runs.get(canvas, Counter())[task] for one in rounds] for task in tasks}
    return ", ".join(f"{task} {min(n)}" + (f" to {max(n)}" if max(n) > min(n) else "") for task, n in counts.items())


def undisturbed(kind: str, broker: str) -> Round:
    run = Run(_name(), kind, broker)
    try:
        given = run.given(run.send())
        notes = run.notes(sum("link" in canvas for canvas in given))
        return Round(given, run.runs(), notes)
    finally:
        run.close()


def killed(kind: str, broker: str, number: int, expected: int, **environment: object) -> Round:
    run = Run(_name(), kind, broker, deaths=4, **environment)
    try:
        given = run.killed(random.Random(f"{broker}{number}"))
        notes = run.notes(expected)
        return Round(given, run.runs(), notes, run.deaths, run.kills)
    finally:
        run.close()


def _name() -> str:
    return f"cv{uuid.uuid4().hex[:10]}"


def play(broker: str, rounds: int) -> Matrix:
    matrix = Matrix(broker, undisturbed("plain", broker), undisturbed("guarded", broker))
    expected = matrix.plain.notes.total()
    for number in range(rounds):
        one = killed("guarded", broker, number, expected)
        matrix.killed.append(one)
        print(
            f"{broker}, round {number + 1} of {rounds}: {one.deaths} deaths, {one.kills} kills, "
            f"{len(matrix.others(one))} other results, {one.total - matrix.plain.total} runs again, "
            f"{(matrix.plain.notes - one.notes).total()} links missing",
            flush=True,
        )
    matrix.control = killed("plain", broker, 0, expected, patience=4)
    print(f"{broker}, the control: {len(matrix.others(matrix.control))} other results", flush=True)
    return matrix


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--report", type=Path, default=REPORT)
    given = parser.parse_args()
    began = time.monotonic()
    matrices = [play(broker, given.rounds) for broker in BROKERS]
    faults = [fault for matrix in matrices for fault in matrix.faults()]
    verdict = "* Not as it must be: " + "; ".join(faults) if faults else "* All is as it must be."
    head = HEAD.format(
        date=datetime.date.today().isoformat(),
        system=platform.system(),
        python=platform.python_version(),
        celery=importlib.metadata.version("celery"),
        kombu=importlib.metadata.version("kombu"),
        seconds=time.monotonic() - began,
        rounds=given.rounds,
        summary="\n".join([*(matrix.summary() for matrix in matrices), verdict]),
        columns=" | ".join(COLUMNS),
        lines="|".join("---" for _ in COLUMNS),
    )
    given.report.parent.mkdir(exist_ok=True)
    given.report.write_text(head + "\n".join(row for matrix in matrices for row in matrix.rows()) + "\n")
    print(f"wrote {given.report}", *faults, sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
