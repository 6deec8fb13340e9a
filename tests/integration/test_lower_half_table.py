"""Every row of the design's lower half, on every store and on every broker.

The product of both is run where IDEMPOTENT_BUS_LONG is set; otherwise pairs that bring every row to every store
and to every broker. That each row fails when its protection is taken out is shown in `test_lower_half_mutants.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from lower_half_rig import BROKERS, STORES, Places, Rig
from lower_half_rows import ROWS

from consumer_rig import make_broker

PAIRS = [
    ("memory", "ours-redis"),
    ("sqlite", "rabbitmq-quorum"),
    ("redis", "rabbitmq-quorum"),
    ("postgresql", "ours-redis"),
    ("mariadb", "ours-sqlite"),
]
if os.environ.get("IDEMPOTENT_BUS_LONG"):
    PAIRS = [(store, broker) for store in STORES for broker in BROKERS]


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    made = Places(tmp_path_factory.mktemp("stores"))
    yield made
    made.clean_up()


@pytest.mark.parametrize(("store", "broker"), PAIRS, ids=lambda name: name)
@pytest.mark.parametrize("row", ROWS)
def test_the_row_holds(
    row: str, store: str, broker: str, places: Places, unique: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I1, I2, I4, I6, I8, I9, I11, I12, I15: see the row's own docstring."""
    rig = Rig(make_broker(broker, unique, tmp_path), places.opener(store), monkeypatch)
    try:
        ROWS[row](rig)
    finally:
        rig.close()


def test_every_store_and_every_broker_is_there() -> None:
    """The pairs leave none out."""
    assert {store for store, _ in PAIRS} == set(STORES)
    assert {broker for _, broker in PAIRS} == set(BROKERS)
