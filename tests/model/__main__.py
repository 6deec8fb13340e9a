"""The long form: `python -m tests.model`, from the top of the repository. About four minutes on two cores.

Explores every configuration to its end, hunts every mutant, prints progress, and writes `tests/model/reports/model.md`.
Ends with 1 if anything is broken, unfinished, never taken, or alive.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

from .configurations import CONFIGURATIONS
from .explore import Explored
from .mutants import MUTANTS, hunt
from .report import failures, report
from .runs import run

_REPORT = Path(__file__).parent / "reports" / "model.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--faults", type=int, help="at most so many, for a shorter run without a report")
    chosen = parser.parse_args()
    began = time.monotonic()
    jobs = [(number, chosen.faults) for number in range(len(CONFIGURATIONS))]
    jobs.sort(key=lambda job: -_WEIGHTS.get(CONFIGURATIONS[job[0]].name, 0))
    explored: dict[str, Explored] = {}
    # A process for each: the memory of a large one is given back.
    with multiprocessing.get_context("spawn").Pool(chosen.processes, maxtasksperchild=1) as pool:
        for one in pool.imap_unordered(run, jobs):
            verdict = "held" if one.found is None else f"BROKEN: {one.found.violation.invariant}"
            print(
                f"{one.name}: {one.states:,} states, {one.seconds:.0f} s ({one.processor:.0f} computed), {verdict}",
                flush=True,
            )
            explored[one.name] = one
    mutants = []
    for mutant in MUTANTS:
        mutants.append(hunt(mutant))
        print(f"mutant {mutant.name}: {'killed' if mutant.is_killed_by(mutants[-1]) else 'LIVES'}", flush=True)
    ordered = [explored[configuration.name] for configuration in CONFIGURATIONS]
    seconds = time.monotonic() - began
    if chosen.faults is None:
        _REPORT.parent.mkdir(exist_ok=True)
        _REPORT.write_text(report(ordered, mutants, seconds, chosen.processes))
        print(f"written: {_REPORT}")
    wrong = failures(ordered if chosen.faults is None else [], mutants)
    print(f"{sum(one.states for one in ordered):,} states in {seconds:.0f} s", *wrong, sep="\n")
    return 1 if wrong else 0


#: The large ones first, so that both cores end at about the same time.
_WEIGHTS = {"store": 9, "store, further copies": 8, "inbox": 7, "store, age": 6, "inbox, one key": 5}

if __name__ == "__main__":
    sys.exit(main())
