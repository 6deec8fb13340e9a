"""The short form of `run_relay.py`: two relays, killed at each of read, publish, confirm and mark."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_relay import CONTROL, RUNS, STEPS, play


@pytest.mark.parametrize("run", RUNS)
def test_every_committed_row_lands_once_whatever_is_killed(run: str, tmp_path: Path) -> None:
    """I1, I3, I5, I15: what was committed lands once on an edge or is handled once; what was rolled back never."""
    result = play(run, kills=8, folder=tmp_path)
    assert result.failure == ""
    assert len(result.committed) > 50
    assert result.kills == {f"{step} {when}": 4 for step in STEPS for when in ("before", "after")}


def test_the_control_a_relay_that_marks_before_the_confirm_loses(tmp_path: Path) -> None:
    """The control of I5, in the same harness: marked first, then sent, rows are lost."""
    result = play(CONTROL, kills=8, naive=True, folder=tmp_path)
    assert result.missing
