"""The short form of the soak, and the README's table of conditions."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cells import SHORT
from .conditions import BEGIN, END, README, table
from .report import line, most_gathered
from .runs import play
from .storm import Doses

#: What a minute or so has room for.
DOSES = Doses(messages=400, kills=24, random_kills=3, stops=3, broker_restarts=1, store_restarts=1, faults=6, lease=2.5)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_nothing_is_lost_and_each_double_is_explained(tmp_path: Path) -> None:
    """I1, I2, I4, I6: producers, relays and consumers are killed and stopped, their servers restarted, their clocks and
    network wrong: in each mode nothing is lost, with the inbox nothing doubled, with a store only what a death
    explains; and each control shows damage."""
    reports = list(play(SHORT, DOSES, tmp_path, seed=1))
    told = "\n".join([*map(line, reports), *(text for one in reports for text in one["wrong"] if "damage" not in one)])
    assert [one for one in reports if one["verdict"].startswith(("BROKEN", "VOID"))] == [], told
    cells = [one for one in reports if "damage" not in one]
    assert {one["verdict"] for one in cells} == {"held"}
    assert len(reports) - len(cells) == 4
    # It was no fair weather.
    assert all(sum(one["kills"].values()) >= 12 for one in cells), told  # some plans never come to their turn
    assert sum(sum(one["kills"].values()) for one in cells) >= 50, told
    assert sum(one["broker_restarts"] + one["store_restarts"] for one in cells) >= 4
    assert sum(one["recovered"] for one in cells) >= 30


def test_the_table_of_conditions_is_what_the_reports_say() -> None:
    """The README's table is generated, from the reports that are kept here: nothing in it is from memory."""
    text = README.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    between = text.partition(BEGIN)[2].partition(END)[0]
    assert between.strip() == table(most_gathered()).strip(), "run `python -m tests.soak conditions`"
