"""What a run has shown, as Markdown."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Final

from .configurations import CONFIGURATIONS
from .explore import Explored
from .invariants import COVERED, NOT_COVERED
from .mutants import MUTANTS

__all__ = ["failures", "report"]


_FOUND: Final = """\
## What the model has found

* A nonce that was remembered after a claim in doubt was used for any message of that key: another body ran in the
  place of the first, which was then acked unrun (I8, I1). Mended; `tests/unit/test_found_by_the_model.py`.
* A worker that died over a message older than the retention left a counted attempt, and the next one ran the message
  although its record may have been forgotten, in both modes (I11, I2). Mended; the same tests.
* A dead letter that was redriven later than its record is kept, and whose message was completed by another copy, ran
  again (I11). Mended: its age is counted from its death, so it comes back as too old, and a person looks before the
  next redrive; `tests/integration/test_redrive.py`.
* In the inbox two deliveries that come back at once may both be charged an attempt, of which one only hears that the
  record is busy (I12). Not mended; excused in the model.
"""


def failures(explored: Iterable[Explored], mutants: Sequence[Explored]) -> list[str]:
    """What must not be: a violation, an exploration that was not ended, an action never taken, a mutant that lives."""
    wrong = []
    missing = {configuration.name: configuration.missing for configuration in CONFIGURATIONS}
    for one in explored:
        if one.found is not None:
            wrong.append(f"{one.name}: {one.found.violation.invariant} is broken:\n{one.found.text()}")
        elif not one.finished:
            wrong.append(f"{one.name}: not finished")
        elif one.never != missing[one.name]:
            wrong.append(f"{one.name}: never seen: {', '.join(sorted(one.never ^ missing[one.name]))}")
    wrong += [
        f"{mutant.name} lives" for mutant, one in zip(MUTANTS, mutants, strict=True) if not mutant.is_killed_by(one)
    ]
    return wrong


def report(explored: Sequence[Explored], mutants: Sequence[Explored], seconds: float, processes: int) -> str:
    """The report."""
    about = {configuration.name: configuration.about for configuration in CONFIGURATIONS}
    wrong = failures(explored, mutants)
    lines = [
        "# The protocol model, long form",
        "",
        f"{date.today().isoformat()}, {processes} processes, {platform.system()}, "
        f"{platform.python_implementation()} {platform.python_version()}. Made by `python -m tests.model`, "
        f"in {seconds:.0f} seconds.",
        "",
        f"**{sum(one.states for one in explored):,} states, {sum(one.steps for one in explored):,} steps; "
        f"every frontier empty: {'yes' if all(one.finished for one in explored) else 'NO'}; violations: "
        f"{sum(one.found is not None for one in explored)}; mutants killed: "
        f"{sum(m.is_killed_by(one) for m, one in zip(MUTANTS, mutants, strict=True))} of {len(mutants)}.**",
        "",
        "What is modelled, and why so few states are enough, is said in the modules: `broker.py`, `store_mode.py`,",
        "`inbox_mode.py`, `outbox_mode.py`, `publishing.py`. A state is visited once, with the fewest faults.",
        "",
        "| configuration | what it shows | faults | states (by faults) | steps | deepest | actions "
        "| seconds (of a processor) | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in explored:
        verdict = "held" if one.found is None and one.finished else "BROKEN"
        by_faults = " + ".join(f"{count:,}" for count in one.by_faults)
        lines.append(
            f"| {one.name} | {about[one.name]} | {one.faults} | {one.states:,} ({by_faults}) | {one.steps:,} "
            f"| {one.depth} | {len(one.taken)} | {one.seconds:.0f} ({one.processor:.0f}) | {verdict} |"
        )
    lines += ["", "## What went wrong", "", *(f"* {text}" for text in wrong)] if wrong else []
    lines += [
        "",
        *_FOUND.splitlines(),
        "",
        "## Invariants",
        "",
        "| invariant | where it is checked | mutants that it catches |",
        "|---|---|---|",
    ]
    for number, where in COVERED.items():
        caught = ", ".join(mutant.name for mutant in MUTANTS if mutant.breaks == number)
        lines.append(f"| {number} | {where} | {caught} |")
    lines += [f"| {number} | not here: {why} | |" for number, why in NOT_COVERED.items()]
    lines += ["", "## Mutants", ""]
    for mutant, one in zip(MUTANTS, mutants, strict=True):
        lines.append(f"### {mutant.name}")
        note = " The library did this when it was first modelled." if mutant.found else ""
        lines += ["", f"{mutant.about[0].upper()}{mutant.about[1:]}. Breaks {mutant.breaks}.{note}", "", "```"]
        lines += [one.found.text() if one.found is not None else "LIVES", "```", ""]
    lines += ["## How often each action was taken", ""]
    for one in explored:
        taken = ", ".join(f"{name} {count:,}" for name, count in sorted(one.taken.items()))
        lines.append(f"* **{one.name}**: {taken}")
    return "\n".join(lines) + "\n"
