"""The README's table of room for remembered ids is the one that the committed reports give."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import capacity

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_has_the_measured_figures() -> None:
    """Every line of the table is in the README, in this order."""
    assert capacity.table(capacity.bytes_each()) in README.read_text("utf-8")


def test_another_measurement_is_noticed() -> None:
    """Control: with a tenth more for an id the README would be found wrong."""
    for name in capacity.COLUMNS.values():
        each = capacity.bytes_each()
        each[name] *= 1.1
        assert capacity.table(each) not in README.read_text("utf-8")


@pytest.mark.parametrize(
    ("total", "words"),
    [(3_140_000, "3.2 MB"), (31_400_000, "32 MB"), (314_000_000, "320 MB"), (3.14e9, "3.2 GB"), (66e9, "66 GB")],
)
def test_room_is_rounded_up(total: float, words: str) -> None:
    """Two digits, never less than was measured."""
    assert capacity.room(total) == words


def test_the_largest_store_of_a_kind_counts(tmp_path: Path) -> None:
    """A small store's bytes an id are not those of a large one; Redis's are the most of its own report."""
    row = "| {} | {} | 1 (1 to 2) | 9 | 1.00 | {} |\n"
    growth = row.format("sqlite", "10,000", 150) + row.format("sqlite", "1,000,000", 130)
    (tmp_path / "store_growth.md").write_text("| store | records | bytes |\n|---|---|---|\n" + growth)
    (tmp_path / "store_growth_more.md").write_text(row.format("postgresql", "10,000,000", 215))
    (tmp_path / "redis_store.md").write_text(
        "| bytes an id at 10,000 | 41.07 | 48 | yes |\n| bytes an id after 2.5 turns | 45.50 | 48 | yes |\n"
    )
    assert capacity.bytes_each(tmp_path) == {"sqlite": 130, "postgresql": 215, "redis": 45.5}
