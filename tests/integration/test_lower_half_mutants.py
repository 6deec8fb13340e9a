"""No row without a test that fails when its protection is taken out: the rows, on mutants of the library."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from lower_half_mutants import MUTANTS, Mutant, rewrite
from lower_half_rig import Rig
from lower_half_rows import ROWS

from consumer_rig import make_broker
from idempotent_bus.executor import Executor
from idempotent_bus.stores.memory import MemoryStore

#: Seconds; the rows need less, as the control shows, so a mutant does not fail merely for want of time.
PATIENCE = 4.0


def run(row: str, unique: str, tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    """One row on the cheapest pair."""
    store = MemoryStore()
    rig = Rig(make_broker("ours-sqlite", unique, tmp_path), lambda: store, patch, PATIENCE)
    try:
        ROWS[row](rig)
    finally:
        rig.close()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.row}-{mutant.name}".replace(" ", "_"))
def test_each_row_fails_without_its_protection(
    mutant: Mutant, unique: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of every row: with one protection taken out, that very row fails, and says what is untrue."""
    mutant.apply(monkeypatch)
    for attempt in range(3):
        # On a machine that is busy a row may miss the moment that it is about (a window that is still of one message).
        folder = tmp_path / str(attempt)
        folder.mkdir()
        try:
            run(mutant.row, f"{unique}{attempt}", folder, monkeypatch)
        except AssertionError as error:
            if not re.search(mutant.says, str(error)):
                raise
            return
    pytest.fail("the mutant survives")


@pytest.mark.parametrize("row", ROWS)
def test_with_them_each_row_holds(row: str, unique: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the control: the same pair and patience, and nothing taken out."""
    run(row, unique, tmp_path, monkeypatch)


def test_every_row_has_a_mutant() -> None:
    """No row without one."""
    assert {mutant.row for mutant in MUTANTS} == set(ROWS)


def test_a_replacement_that_does_not_apply_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A protection that moved must not leave its mutant behind."""
    with pytest.raises(LookupError):
        rewrite(monkeypatch, Executor, "_wait", ("no such text", ""))
