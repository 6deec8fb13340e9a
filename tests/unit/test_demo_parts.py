"""The demo's own judgement: what makes a run fail, which input it takes, and that its history survives a kill."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from idempotent_bus.demo.faults import Faults, History, is_between, plan_death, read_history
from idempotent_bus.demo.input import BadInput, made_up, read_rows
from idempotent_bus.demo.settings import Mode
from idempotent_bus.demo.story import Result


@pytest.mark.parametrize(
    ("result", "fails"),
    [
        (Result(Mode.NAIVE), True),
        (Result(Mode.NAIVE, too_many=1), False),
        (Result(Mode.NAIVE, missing=1), False),
        (Result(Mode.STORE), False),
        (Result(Mode.STORE, missing=1), True),
        (Result(Mode.STORE, too_many=2, kills_between=2), False),
        (Result(Mode.STORE, too_many=3, kills_between=2), True),
        (Result(Mode.INBOX), False),
        (Result(Mode.INBOX, missing=1), True),
        (Result(Mode.INBOX, too_many=1, kills_between=9), True),
    ],
)
def test_verdict(result: Result, fails: bool) -> None:
    """The inbox may have no card too many or too few, the store as many doubles as kills explain, naive must hurt."""
    assert bool(result.failure) is fails


def test_rows_of_a_csv_and_of_json_lines(tmp_path: Path) -> None:
    """A user's own payments are published as they stand, from either form."""
    csv = tmp_path / "payments.csv"
    csv.write_text("\ufefforder,amount\no-1,9.90\no-2,5.00\n", encoding="utf-8")
    assert read_rows(csv, "order") == ({"order": "o-1", "amount": "9.90"}, {"order": "o-2", "amount": "5.00"})
    lines = tmp_path / "payments.jsonl"
    lines.write_text('{"order": 1}\n\n{"order": 2}\n')
    assert read_rows(lines, "order") == ({"order": 1}, {"order": 2})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no rows"),
        ("amount\n9.90\n", "no usable id"),
        ("payment_id\n\n", "no rows"),
        ('{"payment_id": 1}\n{broken\n', "line 2"),
        ('{"payment_id": true}\n', "row 1"),
        ('{"payment_id": 1}\n[2]\n', "not a JSON object"),
    ],
)
def test_unusable_input_is_refused(tmp_path: Path, text: str, says: str) -> None:
    """A file that cannot be used is refused before anything runs, with the line and the reason."""
    path = tmp_path / "bad"
    path.write_text(text)
    with pytest.raises(BadInput, match=says):
        read_rows(path, "payment_id")


def test_made_up_payments_are_the_same_for_a_seed() -> None:
    """The same seed gives the same payments, each with an id of its own."""
    rows = made_up(500, 7)
    assert rows == made_up(500, 7) != made_up(500, 8)
    assert len({row["payment_id"] for row in rows}) == 500


def test_planned_deaths_cover_every_place() -> None:
    """Deaths fall on every named place of a mode, so that no step is spared."""
    rng = random.Random(1)
    places = {(death.step, death.after) for death in (plan_death("store", 40, rng) for _ in range(400))}
    assert len(places) == 8
    assert any(is_between({"step": step, "after": after}) for step, after in places)


def test_lost_ack_and_lost_confirm_are_written_down(tmp_path: Path) -> None:
    """A lost ack is never performed; a lost confirm is lost after the publish was performed."""
    history = History(tmp_path / "history")
    faults = Faults(history, random.Random(1))
    done = {"ack": 0, "publish": 0}

    def perform(name: str) -> None:
        done[name] += 1

    lost = {"ack": 0, "publish": 0}
    for name in lost:
        for _ in range(2000):
            try:
                faults(name, perform, name)
            except ConnectionResetError:
                lost[name] += 1
    assert lost["ack"] > 0
    assert lost["publish"] > 0
    assert done == {"ack": 2000 - lost["ack"], "publish": 2000}
    events = [event["event"] for event in read_history(tmp_path / "history")]
    assert events.count("ack lost") == lost["ack"]
    assert events.count("confirm lost") == lost["publish"]
    assert json.dumps(events)
