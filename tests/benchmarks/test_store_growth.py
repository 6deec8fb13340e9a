"""The short form of `bench_store_growth.py`: an early warning that a verb has begun to look at all records."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import bench_store_growth as bench

import servers
from idempotent_bus.stores import sql_flavours

#: Generous, for machines that do other things too; a scan of all records would cost many times more.
BOUND = 2.5


@pytest.mark.parametrize("store", ["sqlite-normal", "redis"])
def test_a_store_with_ten_times_the_records_costs_the_same(store: str) -> None:
    """claim + complete beside 100,000 records costs about what it costs beside 10,000."""
    if store == "redis":
        servers.real_redis()  # if there is a server here, so is its program
        if not shutil.which("redis-server"):
            pytest.skip("no redis-server to start")
    few, many = bench.measure(store, [10_000, 100_000], rounds=7, pairs=100)
    assert many.cost(few) < BOUND


def test_a_scan_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a store that finds its record without the index costs many times more."""
    load = sql_flavours.load_texts

    def scanning(package: str, path: str, fill: dict[str, str]) -> dict[str, str]:
        texts = load(package, path, fill)
        texts["complete"] = texts["complete"].replace("record_key = :key", "+record_key = :key")
        return texts

    monkeypatch.setattr(sql_flavours, "load_texts", scanning)
    few, many = bench.measure("sqlite-normal", [2_000, 20_000], rounds=3, pairs=20)
    assert many.cost(few) > BOUND
