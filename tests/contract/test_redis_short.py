"""The short form on a server of the test's own: what it must keep, what it costs, and what was there before it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import redis_short
from private_redis import PrivateRedis
from redis_short import completed, fast, in_slot, remembered

from idempotent_bus.model import Completed, Hold
from idempotent_bus.stores.redis import open_redis
from idempotent_bus.testing.store_contract import LONG, Subject, ask, complete, new_key, take


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateRedis]:
    server = PrivateRedis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def contract_store(server: PrivateRedis) -> Subject:
    server.client.flushall()
    return Subject(lambda: open_redis(server.url))


class TestShortForm(redis_short.ShortFormContract):
    """Every rule of the short form."""

    def test_ten_thousand_steps(self, contract_store: Subject) -> None:
        """The long form of the comparison with the reference store."""
        self.test_it_agrees_with_the_memory_store(contract_store, steps=10_000)


#: What MEMORY USAGE leaves out for a key that expires: its entry in the table of expiries, and the tables' places.
UNSEEN = 48


def memory(server: PrivateRedis) -> int:
    """Bytes that the keys take, with what the allocator adds. (All that the server uses is for the benchmark: among so
    few records a client's buffers are too many.)"""
    return sum(server.client.memory_usage(name) + UNSEEN for name in server.client.scan_iter(count=1000))


@pytest.mark.parametrize("count", [2_000, 20_000])
def test_a_completed_record_costs_48_bytes(server: PrivateRedis, contract_store: Subject, count: int) -> None:
    """Issue 8: at most 48 bytes an id, its fingerprint kept, at either size."""
    store: Any = contract_store.store
    slots = (7, 8) if count > 2_000 else (7,)
    for slot in slots:
        for _ in range(count // len(slots) // 500):
            completed(store, 500, slot)
    assert memory(server) / count <= 48


def test_turn_after_turn_costs_no_more(server: PrivateRedis, contract_store: Subject) -> None:
    """While old records go out and new ones come in, the memory of those remembered stays the same."""
    store = fast(contract_store.store)
    kept = completed(store, 300, 9, retention=LONG)  # so that no bucket goes as a whole
    before = memory(server)
    turns: list[int] = []
    for _ in range(3):
        completed(store, 1000, 9, retention=2.0)
        turns.append(memory(server) - before)
        contract_store.outlast(2.25)
    assert max(turns) <= 1.25 * turns[0]
    assert remembered(store, kept)


def test_the_short_form_is_one_packed_list(server: PrivateRedis, contract_store: Subject) -> None:
    """Every bucket stays in the compact encoding: one that grew out of it would cost four times as much."""
    completed(contract_store.store, 2_000, 11)
    buckets = list(server.client.scan_iter(match="*{0b}:#*", count=1000))
    assert len(buckets) > 16
    for name in buckets:
        assert server.client.object("encoding", name) in (b"listpack", b"ziplist")
        assert server.client.pttl(name) > 0
        assert server.client.hlen(name) <= 126


def test_a_full_bucket_is_no_obstacle(server: PrivateRedis, contract_store: Subject) -> None:
    """Keys of one hash cannot be split: what does not fit keeps a key of its own, and is as completed as all others."""
    store = contract_store.store
    head = os.urandom(5)
    holds = [take(store, head + os.urandom(11), fingerprint=b"finger A")[0] for _ in range(300)]
    assert all(complete(store, hold, None) for hold in holds)
    assert remembered(store, holds)
    assert all(complete(store, hold, None) for hold in holds)
    assert all(store.forget(hold.key) for hold in holds)
    assert not any(store.lookup(hold.key) for hold in holds)


def test_records_of_earlier_versions_are_honoured(server: PrivateRedis, contract_store: Subject) -> None:
    """What was completed before there was a short form, or by a process that does not write it, is completed."""
    old, new = open_redis(server.url, short=False), contract_store.store
    holds = completed(old, 300, 12)
    assert server.client.keys("*{0c}:#*") == []
    assert remembered(new, holds)
    assert all(complete(new, hold, None) for hold in holds)
    assert not complete(new, Hold(holds[0].key, holds[0].token, os.urandom(16)), None)
    # And the other way round: told not to write it, a process of this version still reads it.
    short = completed(new, 300, 12)
    assert remembered(old, short)
    assert all(complete(old, hold, None) for hold in short)


def test_a_result_has_a_key_of_its_own(server: PrivateRedis, contract_store: Subject) -> None:
    """Only what has no result is moved; and a record is never in both forms."""
    store = contract_store.store
    with_result, _ = take(store, in_slot(1))
    without, _ = take(store, in_slot(1))
    brief, _ = take(store, in_slot(1))
    assert complete(store, with_result, b"")
    assert complete(store, without, None)
    assert complete(store, brief, None, retention=5.0)
    assert set(server.client.keys()) == {
        b"idempotent-bus:{01}:" + name for name in (with_result.key, brief.key, b"token", b"#0")
    }
    assert store.claim(ask(with_result.key)) == Completed(b"")


def test_a_server_that_lost_everything_starts_again(server: PrivateRedis, contract_store: Subject) -> None:
    """After a flush a store that remembers many buckets learns that there is one, and goes on."""
    store = contract_store.store
    completed(store, 600, 13)
    server.client.flushall()
    again = completed(store, 100, 13)
    assert remembered(store, again)
    assert store._places.buckets[13] < 5


def test_a_split_that_fails_is_nobodys_trouble(server: PrivateRedis, contract_store: Subject) -> None:
    """A completion is durable before its bucket is split: an error there is not the completion's."""
    store: Any = contract_store.store
    plain = store._run

    def failing(verb: str, *arguments: Any) -> Any:
        if verb == "split":
            server.client.script_flush()
            return plain("no such verb", *arguments)
        return plain(verb, *arguments)

    scripts = store._scripts
    store._scripts = lambda verb: type(scripts("claim"))("error('broken')") if verb == "no such verb" else scripts(verb)
    store._run = failing
    holds = completed(store, 300, 14)
    assert remembered(store, holds)


def test_a_window_is_one_script(server: PrivateRedis, contract_store: Subject) -> None:
    """A hundred claims that find their records in the short form are one command."""
    store = contract_store.store
    holds = completed(store, 100, 15)
    assert remembered(store, holds)
    before = server.client.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert remembered(store, holds)
    assert server.client.info("commandstats")["cmdstat_evalsha"]["calls"] == before + 1
    assert take(store, new_key())[1].attempt == 1


def test_a_clock_that_went_back_forgets_nothing(server: PrivateRedis, contract_store: Subject) -> None:
    """I7: where the server's clock goes back by an hour a record is remembered for longer, and tokens still grow."""
    store = contract_store.store
    holds = completed(store, 50, 16, retention=120.0)
    plain = store._scripts
    # Seen from an hour ago: every end of a retention is an hour further away.
    store._scripts = lambda verb: type(plain(verb))(plain(verb).text.replace("1750000000", "1750003600"))
    assert remembered(store, holds)
    assert all(complete(store, hold, None) for hold in holds)
    assert store.lookup(holds[0].key).retention_left > 3600
    assert store.forget(holds[0].key)
    new, _ = take(store, holds[0].key)
    assert new.token > holds[0].token
    assert complete(store, new, None)


def test_a_clock_from_before_the_format_keeps_the_long_form(server: PrivateRedis, contract_store: Subject) -> None:
    """A server whose clock is years behind cannot write the short form's time, and writes none."""
    store = contract_store.store
    plain = store._scripts
    store._scripts = lambda verb: type(plain(verb))(plain(verb).text.replace("1750000000", "7750000000"))
    holds = completed(store, 20, 17)
    assert list(server.client.scan_iter(match="*{11}:#*")) == []
    assert remembered(store, holds)
