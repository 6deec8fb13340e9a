"""What is special to the Redis store: a server full, paused, read-only, killed or forgetful, and redis-py's retries."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from private_redis import PrivateRedis
from redis import Connection, ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, OutOfMemoryError, ReadOnlyError, ResponseError, TimeoutError
from redis.retry import Retry

import servers
from idempotent_bus.errors import ConfigurationError, StoreUnavailable
from idempotent_bus.model import Busy, Completed, Completion, Hold, Quarantined, Settled, State
from idempotent_bus.stores import open_store
from idempotent_bus.stores.redis import RedisStore, open_redis
from idempotent_bus.stores.redis_stream import RedisStream
from idempotent_bus.testing.store_contract import abandon, ask, complete, new_key, release, renew, take, won


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateRedis]:
    server = PrivateRedis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def store(server: PrivateRedis) -> Iterator[RedisStore]:
    store = open_redis(server.url)
    yield store
    store.close()


# --- how it is opened ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["a{b", "a}b", "{a}"])
def test_braces_in_the_prefix_are_refused(prefix: str) -> None:
    """Braces would move the cluster slot of every key."""
    with pytest.raises(ConfigurationError, match="braces"):
        open_store("redis://127.0.0.1:1/0", prefix=prefix)


def test_a_decoding_client_is_refused() -> None:
    """A client that decodes replies cannot carry results that are bytes."""
    with pytest.raises(ConfigurationError, match="decode_responses"):
        RedisStore(Redis(decode_responses=True))
    with pytest.raises(ConfigurationError, match="decode_responses"):
        open_store("redis://127.0.0.1:1/0?decode_responses=yes")


def test_timeouts_by_default_and_by_url() -> None:
    """A stalled server cannot hang a consumer for ever; the URL's own timeout wins."""
    plain: Any = open_store("redis://127.0.0.1:1/0")
    told: Any = open_store("redis://127.0.0.1:1/0?socket_timeout=17", socket_connect_timeout=19)
    settings = plain._client.get_connection_kwargs()
    assert 0 < settings["socket_timeout"] <= 5
    assert 0 < settings["socket_connect_timeout"] <= 5
    assert told._client.get_connection_kwargs()["socket_timeout"] == 17
    assert told._client.get_connection_kwargs()["socket_connect_timeout"] == 19


def test_prefixes_share_nothing(unique: str) -> None:
    """I14: the same key under two prefixes is two records, and neither sees the other."""
    left, right = (open_store(servers.redis(), prefix=f"{unique}{side}:") for side in "ab")
    key = new_key()
    hold, _ = take(left, key)
    take(right, key)
    assert not complete(right, hold)
    assert complete(left, hold)
    assert isinstance(right.claim(ask(key)), Busy)
    with Redis.from_url(servers.redis()) as client:
        assert client.delete(*client.scan_iter(match=f"{unique}*", count=1000)) == 4  # a record and a counter each


def test_neither_key_nor_password_is_in_the_error() -> None:
    """Errors carry no credential and no key; the driver's error is chained."""
    store = open_store("redis://:geheim@127.0.0.1:1/0")
    key = new_key()
    with pytest.raises(StoreUnavailable) as caught:
        store.claim(ask(key))
    assert "geheim" not in str(caught.value)
    assert repr(key)[2:-1] not in str(caught.value)
    assert caught.value.__cause__ is not None


# --- records and tokens ------------------------------------------------------------------------------------


def test_a_completed_record_with_a_key_of_its_own_is_small(server: PrivateRedis) -> None:
    """The docstring's number of bytes for a completed record that is not in the short form holds."""
    store = open_redis(server.url, short=False)
    hold, _ = take(store, new_key(), fingerprint=b"8 bytes!")
    assert complete(store, hold, None)
    name = b"idempotent-bus:{%02x}:%s" % (hold.key[0], hold.key)
    assert server.client.object("encoding", name) == b"embstr"
    assert server.client.memory_usage(name) <= 136


def test_every_record_expires_and_no_counter_does(server: PrivateRedis, store: RedisStore) -> None:
    """A renewed, a completed, a released and an abandoned record all have an expiry, so that no purge is needed."""
    server.client.flushall()
    for number in range(20):
        hold, _ = take(store, new_key())
        (renew, complete, release, abandon)[number % 4](store, hold)
    for _ in range(20):
        complete(store, take(store, new_key())[0], None)
    for name in server.client.scan_iter(count=1000):
        assert (server.client.pttl(name) == -1) is name.endswith((b"token", b"buckets"))


def test_tokens_grow_past_a_lost_counter_and_a_clock_that_went_back(server: PrivateRedis, store: RedisStore) -> None:
    """I6: without its counter a token follows the clock; with a counter ahead of the clock, the counter."""
    key = new_key()
    counter = b"idempotent-bus:{%02x}:token" % key[0]
    hold, first = take(store, key)
    assert release(store, hold)
    server.client.delete(counter)  # what a flush or a failover does
    hold, second = take(store, key)
    assert second.token > first.token
    assert release(store, hold)
    ahead = second.token + 3_600_000_000  # as if the clock had gone back by an hour since
    server.client.set(counter, ahead)
    tokens = []
    for _ in range(3):
        hold, claimed = take(store, key)
        tokens.append(claimed.token)
        assert release(store, hold)
    assert tokens == [ahead + 1, ahead + 2, ahead + 3]


def test_a_batch_is_one_command(server: PrivateRedis, store: RedisStore) -> None:
    """A hundred claims are one EVALSHA, and so are a hundred renewals."""
    store.claim(ask(new_key()))
    requests = [ask(new_key()) for _ in range(100)]
    before = server.client.info("commandstats")["cmdstat_evalsha"]["calls"]
    claims = store.claim_many(requests)
    holds = [
        Hold(request.key, won(claim).token, request.nonce) for request, claim in zip(requests, claims, strict=True)
    ]
    assert store.renew_many(holds, lease=600.0, retention=600.0) == [True] * 100
    calls = server.client.info("commandstats")["cmdstat_evalsha"]["calls"] - before
    assert calls - server.client.info("commandstats")["cmdstat_evalsha"]["failed_calls"] <= 2


def test_a_quarantined_record_and_its_index(server: PrivateRedis, store: RedisStore) -> None:
    """The record does not expire, its index lies in its cluster slot, and goes with its last entry."""
    server.client.flushall()
    hold, _ = take(store, new_key())
    assert store.quarantine(hold, note=b"note")
    slot = b"idempotent-bus:{%02x}:" % hold.key[0]
    names = set(server.client.keys())
    assert names == {slot + hold.key, slot + b"token", slot + b"quarantine"}
    assert {server.client.pttl(name) for name in names} == {-1}
    assert store.resolve(hold.key, completed=False, retention=600.0)
    assert set(server.client.keys()) == {slot + hold.key, slot + b"token"}
    assert 0 < server.client.pttl(slot + hold.key) <= 600_000


def test_entries_without_a_quarantined_record_are_passed_over_and_cleaned(
    server: PrivateRedis, store: RedisStore
) -> None:
    """An index may know more than there is (records deleted by hand); the list is right, and full."""
    server.client.flushall()
    gone, held, done, kept, last = sorted(b"\0" + os.urandom(15) for _ in range(5))
    for key in (gone, kept, last):
        assert store.quarantine(take(store, key)[0], note=b"note")
    take(store, held)
    assert complete(store, take(store, done)[0])
    index = b"idempotent-bus:{00}:quarantine"
    server.client.zadd(index, {held: 0, done: 0})
    server.client.delete(b"idempotent-bus:{00}:" + gone)
    assert [record.key for record in store.quarantined(limit=1)] == [kept]
    assert [record.key for record in store.quarantined(limit=9)] == [kept, last]
    assert server.client.zrange(index, 0, -1) == [kept, last]
    assert isinstance(store.claim(ask(held)), Busy)
    assert store.claim(ask(done)) == Completed(b"done")
    server.client.zadd(index, {gone: 0})
    assert not store.resolve(gone, completed=True, retention=600.0)
    assert server.client.zrange(index, 0, -1) == [kept, last]


def test_a_record_whose_entry_was_lost_is_entered_again(server: PrivateRedis, store: RedisStore) -> None:
    """Without its entry nobody sees it in the list, but nothing runs; asking again enters it."""
    server.client.flushall()
    hold, _ = take(store, new_key())
    assert store.quarantine(hold, note=b"note")
    server.client.delete(b"idempotent-bus:{%02x}:quarantine" % hold.key[0])
    assert store.quarantined() == []
    assert store.claim(ask(hold.key)) == Quarantined()
    assert store.quarantine(hold, note=b"another")
    assert [(record.state, record.result) for record in store.quarantined()] == [(State.QUARANTINED, b"note")]


def test_the_list_never_scans(server: PrivateRedis, store: RedisStore) -> None:
    """Among 5,000 records the 20 that are quarantined are found by two scripts."""
    server.client.flushall()
    for _ in range(5):
        store.claim_many([ask(new_key()) for _ in range(1000)])
    kept = [take(store, new_key())[0] for _ in range(20)]
    for hold in kept:
        assert store.quarantine(hold, note=b"note")
    store.quarantined()
    before = server.client.info("commandstats")
    assert [record.key for record in store.quarantined(limit=20)] == sorted(hold.key for hold in kept)
    after = server.client.info("commandstats")
    assert after["cmdstat_evalsha"]["calls"] - before["cmdstat_evalsha"]["calls"] == 2
    assert after["cmdstat_get"]["calls"] - before["cmdstat_get"]["calls"] == 20
    assert {"cmdstat_keys", "cmdstat_scan"} & {name for name in after if after[name] != before.get(name)} == set()


# --- a server in trouble -------------------------------------------------------------------------------------


def test_flushed_scripts_are_sent_again(server: PrivateRedis, store: RedisStore) -> None:
    """After SCRIPT FLUSH, or on a new server, every verb goes on without anybody noticing."""
    hold, _ = take(store, new_key())
    for verb in (renew, complete):
        server.client.script_flush()
        assert verb(store, hold)
    server.client.script_flush()
    record = store.lookup(hold.key)
    assert record is not None
    server.client.script_flush()
    hold, _ = take(store, new_key())
    server.client.script_flush()
    assert release(store, hold)
    hold, _ = take(store, new_key())
    server.client.script_flush()
    assert abandon(store, hold)
    server.client.script_flush()
    assert store.quarantine(hold, note=b"note")
    server.client.script_flush()
    assert hold.key in [record.key for record in store.quarantined(limit=1000)]
    server.client.script_flush()
    assert store.resolve(hold.key, completed=True, retention=600.0)
    server.client.script_flush()
    assert len(store.claim_many([ask(new_key()), ask(new_key())])) == 2


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl", "volatile-random"])
def test_a_server_that_evicts_is_refused(server: PrivateRedis, policy: str) -> None:
    """A server that may drop records silently is refused at the first use, unless the user takes the risk."""
    server.client.config_set("maxmemory-policy", policy)
    try:
        store = open_store(server.url)
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="noeviction"):
                store.claim(ask(new_key()))
        take(open_store(server.url, allow_eviction=True), new_key())
        server.client.config_set("maxmemory-policy", "noeviction")
        take(store, new_key())
    finally:
        server.client.config_set("maxmemory-policy", "noeviction")


def test_where_the_server_does_not_tell_the_check_is_skipped(server: PrivateRedis) -> None:
    """A user without the right to ask about the server's memory can still use the store."""
    server.client.acl_setuser("limited", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-info", "-config"])
    with pytest.raises(NoPermissionError):
        Redis(port=server.port, username="limited", password="x").info("memory")
    take(open_store(f"redis://limited:x@127.0.0.1:{server.port}/0"), new_key())


def test_a_full_server_lets_running_work_end(server: PrivateRedis, store: RedisStore) -> None:
    """Out of memory: new claims are refused as unavailable; what runs can end, in every way, and be resolved."""
    server.client.flushall()
    first, second, third = (take(store, new_key())[0] for _ in range(3))
    server.client.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreUnavailable) as caught:
            store.claim(ask(new_key()))
        assert isinstance(caught.value.__cause__, OutOfMemoryError)
        assert renew(store, first)
        assert complete(store, first, b"done")
        assert release(store, second)
        assert store.claim(ask(first.key)) == Completed(b"done")  # reads, so it is allowed
        assert abandon(store, third)
        assert store.quarantine(third, note=b"note" * 1000)
        assert [record.key for record in store.quarantined()] == [third.key]
        assert store.resolve(third.key, completed=True, retention=600.0)
        assert store.quarantined() == []
        with pytest.raises(OutOfMemoryError):  # control: a plain SET of the same size is refused
            server.client.set(b"x" * 36, b"y" * 45)
    finally:
        server.client.config_set("maxmemory", 0)


def test_a_replica_refuses(server: PrivateRedis, store: RedisStore) -> None:
    """I9: a server that became a replica does nothing and says so."""
    hold, _ = take(store, new_key())
    server.client.replicaof("127.0.0.1", "1")
    try:
        for call in (lambda: store.claim(ask(new_key())), lambda: complete(store, hold)):
            with pytest.raises(StoreUnavailable) as caught:
                call()
            assert isinstance(caught.value.__cause__, ReadOnlyError)
    finally:
        server.client.replicaof("NO", "ONE")
    assert complete(store, hold)


@pytest.mark.parametrize("known", [False, True], ids=["a record it does not know", "a record of an earlier holder"])
def test_a_replica_that_lags_does_not_say_that_ownership_was_lost(
    server: PrivateRedis, store: RedisStore, known: bool
) -> None:
    """I9: a connection that was open before a failover may lead to the former master, which does not know yet what the
    new one holds. "Lost" would let the consumer give up a completion, and its effect would be repeated."""
    earlier, _ = take(store, new_key())
    hold = Hold(earlier.key if known else new_key(), earlier.token + 1, os.urandom(16))
    server.client.replicaof("127.0.0.1", "1")
    try:
        for call in (
            lambda: complete(store, hold),
            lambda: complete(store, hold, None),
            lambda: renew(store, hold),
            lambda: release(store, hold),
            lambda: abandon(store, hold),
            lambda: store.quarantine(hold, note=b""),
        ):
            with pytest.raises(StoreUnavailable) as caught:
                call()
            assert isinstance(caught.value.__cause__, ReadOnlyError)
        stream = store.stream()
        stream.begin(Completion(hold, None, 600.0))
        assert stream.settle() == [Settled(1, None)]
        stream.close()
    finally:
        server.client.replicaof("NO", "ONE")
    assert not complete(store, hold)
    assert not renew(store, hold)
    assert complete(store, earlier)


def test_a_record_of_another_make_is_not_guessed_at(server: PrivateRedis, store: RedisStore) -> None:
    """I9: where a key holds something that is no record, the outcome is unknown."""
    key = new_key()
    server.client.rpush(b"idempotent-bus:{%02x}:%s" % (key[0], key), "a list")
    with pytest.raises(StoreUnavailable) as caught:
        store.claim(ask(key))
    assert isinstance(caught.value.__cause__, ResponseError)


def test_a_stalled_server_does_not_hang_and_the_repeat_is_recognised(server: PrivateRedis) -> None:
    """A server that stops answering raises within the timeouts; asked again afterwards, the same claim is attempt 1."""
    store = open_store(server.url + "?socket_timeout=0.2")
    take(store, new_key())
    request = ask(new_key())
    server.pause()
    try:
        began = time.monotonic()
        with pytest.raises(StoreUnavailable) as caught:
            store.claim(request)
        assert time.monotonic() - began < 5
        assert isinstance(caught.value.__cause__, TimeoutError)
    finally:
        server.resume()
    claimed = won(store.claim(request))
    assert claimed.attempt == 1
    assert complete(store, Hold(request.key, claimed.token, request.nonce))


def test_a_stream_over_a_stalled_server_is_in_doubt(server: PrivateRedis) -> None:
    """I9, I15: replies that do not come are told as in doubt, never as durable; `complete` then tells the outcome."""
    store = open_store(server.url + "?socket_timeout=0.2")
    stream = store.stream()
    holds = [take(store, new_key())[0] for _ in range(6)]
    assert stream.begin(Completion(holds[0], None, 600.0)) == 1
    assert stream.settle() == [Settled(1, True)]
    server.pause()
    try:
        for hold in holds[1:4]:
            stream.begin(Completion(hold, b"done", 600.0))
        assert stream.poll() == []
        assert stream.settle() == [Settled(ticket, None) for ticket in (2, 3, 4)]
    finally:
        server.resume()
    # The server did get to them, or will when they are repeated: either way the same hold hears True.
    assert [complete(store, hold) for hold in holds[1:4]] == [True] * 3
    assert store.claim(ask(holds[1].key)) == Completed(b"done")
    # And the stream goes on, over a new connection.
    assert stream.begin(Completion(holds[4], None, 600.0)) == 5
    assert stream.settle() == [Settled(5, True)]
    stream.close()


def test_a_stream_whose_connection_is_cut_is_in_doubt(server: PrivateRedis) -> None:
    """A connection cut under a stream: what was under way is in doubt, one after the other, and nothing is lost."""
    store = open_store(server.url)
    stream = store.stream()
    holds = [take(store, new_key())[0] for _ in range(20)]
    for hold in holds[:10]:
        stream.begin(Completion(hold, None, 600.0))
    assert [settled.durable for settled in stream.settle()] == [True] * 10
    server.client.client_kill_filter(_type="normal", skipme=True)
    for hold in holds[10:]:
        stream.begin(Completion(hold, None, 600.0))
    told = stream.settle()
    assert [settled.ticket for settled in told] == list(range(11, 21))
    assert told[0].durable is None
    assert all(complete(store, hold, None) for hold in holds)
    assert stream.pending == 0
    stream.close()


def test_a_stream_without_its_script_or_its_memory(server: PrivateRedis, store: RedisStore) -> None:
    """A refusal proves that it was not done: after SCRIPT FLUSH, or on a full server, each is completed anyway."""
    stream = store.stream()
    holds = [take(store, new_key())[0] for _ in range(6)]
    server.client.script_flush()
    for hold in holds[:3]:
        stream.begin(Completion(hold, None, 600.0))
    assert [settled.durable for settled in stream.settle()] == [True] * 3
    server.client.config_set("maxmemory", 1)
    try:
        for hold in holds[3:]:
            stream.begin(Completion(hold, b"result", 600.0))
        assert [settled.durable for settled in stream.settle()] == [True] * 3
    finally:
        server.client.config_set("maxmemory", 0)
    stream.close()


#: Begins its completions, says so of each when `begin` has returned, and is killed when it says no more.
_VICTIM = textwrap.dedent("""
    import json, os, sys
    from idempotent_bus.model import Completion, Hold
    from idempotent_bus.stores import open_store, redis_stream

    url, size, most, holds = sys.argv[1:]
    redis_stream._MOST_BYTES = int(most) or redis_stream._MOST_BYTES
    holds = [Hold(bytes.fromhex(key), token, bytes.fromhex(nonce)) for key, token, nonce in json.loads(holds)]
    stream = open_store(url + "?socket_timeout=60").stream()
    stream.begin(Completion(holds[0], b"done", 600.0))
    stream.settle()
    print("ready", flush=True)
    sys.stdin.readline()
    for hold in holds[1:]:
        stream.begin(Completion(hold, b"x" * int(size), 600.0))
        os.write(1, b".")
    sys.stdin.read()
""")


def _begun_and_completed(server: PrivateRedis, size: int, most: int = 0) -> tuple[int, int]:
    """How many completions a process began before it was killed, and how many of them the server has done.

    The server stands still from before the first until the process is dead. most: bytes under way, if not the usual.
    """
    store = open_store(server.url)
    holds = [take(store, new_key(), lease=600.0)[0] for _ in range(51)]
    told = json.dumps([(hold.key.hex(), hold.token, hold.nonce.hex()) for hold in holds])
    command = [sys.executable, "-c", _VICTIM, server.url, str(size), str(most), told]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as victim:
        assert victim.stdout is not None
        assert victim.stdin is not None
        assert victim.stdout.readline() == b"ready\n"
        server.pause()
        try:
            victim.stdin.write(b"go\n")
            victim.stdin.flush()
            began = 0
            while began < 50 and select.select([victim.stdout], [], [], 1.0)[0]:
                began += len(os.read(victim.stdout.fileno(), 100))
            victim.kill()
            victim.wait()
        finally:
            server.resume()
    time.sleep(0.2)
    records = [store.lookup(hold.key) for hold in holds[1:]]
    return began, sum(record is not None and record.state is State.COMPLETED for record in records)


@pytest.mark.parametrize("size", [10, 1000, 40_000])
def test_what_was_begun_survives_a_kill(server: PrivateRedis, size: int) -> None:
    """I4: `survives` is true, however long the results: what a killed process had begun is completed."""
    began, completed = _begun_and_completed(server, size)
    assert began
    assert completed == began


@pytest.mark.parametrize("trouble", ["new server", "moved buckets"])
def test_what_was_begun_is_done_though_nobody_reads_the_answer(server: PrivateRedis, trouble: str) -> None:
    """I4: the server refuses nothing that a client which is dead by then would have to ask again."""
    store, other = open_store(server.url), open_store(server.url)

    def key_of_one_slot() -> bytes:
        return b"\0" + new_key()[1:]

    holds = [take(store, key_of_one_slot(), lease=600.0)[0] for _ in range(30)]
    if trouble == "moved buckets":
        for _ in range(300):
            other.complete(take(other, key_of_one_slot())[0], result=None, retention=600.0)
        assert other._places.buckets[0] > 1  # type: ignore[attr-defined]
    else:
        server.client.script_flush()
    stream = store.stream()  # type: ignore[attr-defined]
    for hold in holds:
        stream.begin(Completion(hold, None, 600.0))
    give_up = time.monotonic() + 2.0
    left = holds
    while left and time.monotonic() < give_up:
        left = [hold for hold in left if other.lookup(hold.key).state is not State.COMPLETED]  # type: ignore
    assert left == []
    assert [one.durable for one in stream.settle()] == [True] * len(holds)
    assert all(isinstance(store.claim(ask(hold.key)), Completed) for hold in holds)
    stream.close()


def test_a_stream_that_may_not_load_its_script_says_so(server: PrivateRedis) -> None:
    """I4: nothing is lost where SCRIPT is forbidden, and the next window waits for each: `survives` is False."""
    server.client.acl_setuser("narrow", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all", "-script"])
    store = open_store(server.url.replace("redis://", "redis://narrow:secret@"))
    stream = store.stream()  # type: ignore[attr-defined]
    hold = take(store, new_key())[0]
    stream.begin(Completion(hold, None, 600.0))
    assert [one.durable for one in stream.settle()] == [None]
    assert not stream.survives
    assert store.complete(hold, result=None, retention=600.0)
    stream.close()


def test_what_is_more_than_the_server_reads_at_once_does_not(server: PrivateRedis) -> None:
    """Control: with no bound of the bytes under way the server drops what it had not read of a dead client."""
    began, completed = _begun_and_completed(server, 4000, most=10**9)
    assert began == 50
    assert completed < began


def test_a_stream_that_takes_silence_for_success_is_noticed(
    server: PrivateRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: with a stream that tells True of what was under way, the two checks above fail."""

    def careless(self: RedisStream) -> None:
        under_way, self._connection = list(self._under_way), None
        self._under_way.clear()
        self._ended += [Settled(ticket, True) for ticket, *_ in under_way]

    monkeypatch.setattr(RedisStream, "_broken", careless)
    for check in (
        test_a_stream_over_a_stalled_server_is_in_doubt,
        test_a_stream_whose_connection_is_cut_is_in_doubt,
    ):
        with pytest.raises(AssertionError):
            check(server)


# --- redis-py's own retries, and forks -------------------------------------------------------------------------


class LostReplies(Connection):
    """Loses the reply of every first send of a command on a script: the server has done it, the client cannot know."""

    lost = 0
    armed = False

    def send_packed_command(self, command: Any, *args: Any, **kwargs: Any) -> Any:
        text = command if isinstance(command, bytes) else b"".join(command)
        self.on_a_script = any(name in text for name in (b"EVAL", b"INCRBY"))
        return super().send_packed_command(command, *args, **kwargs)

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        reply = super().read_response(*args, **kwargs)
        if LostReplies.armed and self.on_a_script:
            LostReplies.armed = False
            LostReplies.lost += 1
            raise TimeoutError("the reply was lost")
        return reply


def test_silent_retries_of_the_driver_are_harmless(server: PrivateRedis) -> None:
    """I15: redis-py resends a command whose reply was lost. Every verb then tells the outcome of the first send."""
    pool = ConnectionPool.from_url(server.url, connection_class=LostReplies, retry=Retry(NoBackoff(), 1))
    client = Redis(connection_pool=pool)
    store = RedisStore(client)

    def losing(call: Any) -> Any:
        LostReplies.armed = True
        before = LostReplies.lost
        answer = call()
        assert LostReplies.lost == before + 1
        return answer

    assert losing(lambda: client.incr("control")) == 2  # control: a verb that may not be repeated is done twice
    for _ in range(2):  # the first round sends the scripts' texts too
        request = ask(new_key())
        claimed = won(losing(lambda: store.claim(request)))  # noqa: B023 - called at once
        assert claimed.attempt == 1
        hold = Hold(request.key, claimed.token, request.nonce)
        assert losing(lambda: renew(store, hold))  # noqa: B023 - called at once
        assert losing(lambda: release(store, hold, attempts=1))  # noqa: B023 - called at once
        hold, again = take(store, request.key)
        assert again.attempt == 2
        assert losing(lambda: complete(store, hold, b"result"))  # noqa: B023 - called at once
        assert losing(lambda: store.claim(ask(request.key))) == Completed(b"result")  # noqa: B023 - called at once
        for completed in (True, False):
            hold, _ = take(store, new_key())
            assert losing(lambda: abandon(store, hold))  # noqa: B023 - called at once
            assert losing(lambda: store.quarantine(hold, note=b"note"))  # noqa: B023 - called at once
            assert losing(lambda: store.resolve(hold.key, completed=completed, retention=9.0))  # noqa: B023 - called at once
            assert not store.resolve(hold.key, completed=completed, retention=9.0)
            assert hold.key not in [one.key for one in store.quarantined()]  # a neighbour may have left some
        hold, _ = take(store, new_key())
        assert complete(store, hold)
        batch = [ask(new_key()) for _ in range(10)]
        assert [won(outcome).attempt for outcome in losing(lambda: store.claim_many(batch))] == [1] * 10  # noqa: B023
        assert losing(lambda: store.renew_many([hold], lease=9.0, retention=9.0)) == [False]  # noqa: B023
    client.close()


def test_completions_under_way_when_the_client_is_closed_are_never_taken_for_durable(server: PrivateRedis) -> None:
    """I4: redis-py opens a closed connection again by itself; its replies are not those of the completions before."""
    client = Redis.from_url(server.url)
    store = RedisStore(client)
    hold, _ = take(store, new_key())
    stream = store.stream()
    nobodys = stream.begin(Completion(hold._replace(nonce=os.urandom(16)), None, 600.0))
    client.close()
    ours = stream.begin(Completion(hold, None, 600.0))
    told = {one.ticket: one.durable for one in stream.settle()}
    assert told[nobodys] is not True
    assert told[ours] is not False
    assert complete(store, hold)
    again = stream.begin(Completion(hold, None, 600.0))
    assert stream.settle() == [Settled(again, True)]
    stream.close()


def test_a_forked_process_uses_connections_of_its_own(server: PrivateRedis) -> None:
    """Parent and children go on with the store that was opened, and used, before the fork; no answer is mixed up."""
    script = textwrap.dedent("""
        import os, sys
        from idempotent_bus.model import ClaimRequest, Claimed, Completed, Hold
        from idempotent_bus.stores import open_store

        store = open_store(sys.argv[1])
        def work(times):
            for _ in range(times):
                key, nonce = os.urandom(16), os.urandom(16)
                claimed = store.claim(ClaimRequest(key, nonce, 60.0, 60.0))
                assert isinstance(claimed, Claimed), claimed
                assert store.complete(Hold(key, claimed.token, nonce), result=key, retention=60.0)
                assert store.claim(ClaimRequest(key, os.urandom(16), 60.0, 60.0)) == Completed(key)
        work(1)
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                try:
                    work(200)
                except BaseException as error:
                    print(repr(error), file=sys.stderr, flush=True)
                    os._exit(1)
                os._exit(0)
            children.append(child)
        work(200)
        sys.exit(max(os.waitpid(child, 0)[1] for child in children))
    """)
    done = subprocess.run([sys.executable, "-c", script, server.url], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- death of the server ---------------------------------------------------------------------------------------


def test_records_and_tokens_survive_the_death_of_the_server(tmp_path: Path) -> None:
    """AOF, everysec, SIGKILL in the middle of writes: whatever was answered is still so, and tokens go on growing.

    What the server wrote to its file before answering survives the death of the process, also before it is synced to
    the disk; a power cut could cost the last second, which no test on one machine can show.
    """
    server = PrivateRedis(tmp_path, "--appendonly", "yes", "--appendfsync", "everysec")
    try:
        store = open_store(server.url)
        for _ in range(3):
            done = [take(store, new_key())[0] for _ in range(200)]
            assert all(complete(store, hold, hold.key) for hold in done)
            held, claimed = take(store, new_key())
            given, _ = take(store, new_key())
            assert release(store, given, attempts=3)
            kept, _ = take(store, new_key())
            assert store.quarantine(kept, note=b"note")
            server.kill()
            with pytest.raises(StoreUnavailable):
                store.claim(ask(new_key()))
            server.start()
            for hold in done:
                assert store.claim(ask(hold.key)) == Completed(hold.key)
            assert isinstance(store.claim(ask(held.key)), Busy)
            assert complete(store, held)
            assert [(record.key, record.result) for record in store.quarantined()] == [(kept.key, b"note")]
            assert store.resolve(kept.key, completed=True, retention=600.0)
            _, again = take(store, given.key)
            assert again.attempt == 4
            assert again.token > given.token
            _, fresh = take(store, held.key[:1] + os.urandom(15))  # the same counter
            assert fresh.token > claimed.token
    finally:
        server.stop()


def test_without_persistence_a_death_forgets(tmp_path: Path) -> None:
    """Control: without the append-only file the same death loses every record; only the clock keeps tokens growing."""
    server = PrivateRedis(tmp_path)
    try:
        store = open_store(server.url)
        hold, first = take(store, new_key())
        assert complete(store, hold)
        server.kill()
        server.start()
        _, again = take(store, hold.key)
        assert again.attempt == 1
        assert again.token > first.token
    finally:
        server.stop()
