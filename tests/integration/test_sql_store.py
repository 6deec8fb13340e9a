"""The SQL store against real servers, real processes and a bad network."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import servers
from idempotent_bus import dialects, schema
from idempotent_bus.errors import StoreUnavailable
from idempotent_bus.model import Busy, Claimed, ClaimRequest, Completed, Completion, Hold
from idempotent_bus.stores.sql import SQLStore, open_sql
from idempotent_bus.watchdog import Watchdog
from proxy import Proxy, through

SERVERS = ("postgresql", "mariadb")
DATABASES = ("sqlite", *SERVERS)


def ask(key: bytes | None = None, **changes: Any) -> ClaimRequest:
    values: dict[str, Any] = {"nonce": os.urandom(16), "lease": 60.0, "retention": 3600.0}
    return ClaimRequest(key or os.urandom(16), **(values | changes))


def take(store: SQLStore, request: ClaimRequest) -> Hold:
    claimed = store.claim(request)
    assert isinstance(claimed, Claimed)
    return Hold(request.key, claimed.token, request.nonce)


@pytest.fixture
def prefix() -> str:
    return f"t{uuid.uuid4().hex[:12]}_"


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path, prefix: str) -> Iterator[str]:
    """The database under test, cleaned up afterwards."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/store.db"
        return
    there = servers.postgresql() if request.param == "postgresql" else servers.mariadb()
    yield there
    engine = sa.create_engine(there, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        if request.param == "postgresql":
            connection.exec_driver_sql("SET lock_timeout = '5s'")
        connection.exec_driver_sql(f"DROP TABLE IF EXISTS {prefix}records")
        connection.exec_driver_sql(f"DROP SEQUENCE IF EXISTS {prefix}tokens")
    engine.dispose()


def over(*databases: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("url", databases, indirect=True)


@contextlib.contextmanager
def opened(url: str, prefix: str, **options: Any) -> Iterator[SQLStore]:
    store = open_sql(url, table_prefix=prefix, **options)
    try:
        yield store
    finally:
        store.close()


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# --- many processes -----------------------------------------------------------------------------------------

RACER = """
    import sys, hashlib, os
    from idempotent_bus.model import Claimed, ClaimRequest, Hold
    from idempotent_bus.stores.sql import open_sql
    store = open_sql(sys.argv[1], table_prefix=sys.argv[2])
    for number in range(int(sys.argv[3])):
        key = hashlib.sha256(f"{sys.argv[2]}{number}".encode()).digest()[:16]
        nonce = os.urandom(16)
        outcome = store.claim(ClaimRequest(key, nonce, 60, 3600))
        if isinstance(outcome, Claimed):
            print(number, outcome.token, flush=True)
            assert store.complete(Hold(key, outcome.token, nonce), result=str(os.getpid()).encode(), retention=3600)
    print("done", flush=True)
"""


@over(*DATABASES)
def test_eight_processes_start_on_an_empty_database_and_share_the_work(url: str, prefix: str) -> None:
    """I2: eight processes create the tables at once and race for 60 keys: no error, one winner each, no token twice."""
    racers = [start(RACER, url, prefix, "60") for _ in range(8)]
    wins: list[tuple[int, int]] = []
    for racer in racers:
        output, _ = racer.communicate(timeout=60)
        lines = output.split("\n")
        assert racer.returncode == 0, output
        wins += [tuple(map(int, line.split())) for line in lines if line[:1].isdigit()]  # type: ignore[misc]
    assert sorted(number for number, _ in wins) == list(range(60))
    assert len({token for _, token in wins}) == 60


@over("sqlite")
def test_what_was_reported_completed_survives_sigkill(url: str, prefix: str) -> None:
    """I4: a process is killed in the middle of its work; every completion that it reported is there."""
    code = RACER.replace("print(number, outcome.token, flush=True)", "pass")
    code = code.replace("retention=3600)\n", "retention=3600)\n            print(number, flush=True)\n")
    worker = start(code, url, prefix, "100000")
    assert worker.stdout is not None
    reported = [
        int(line) for line, _ in zip(iter(worker.stdout.readline, ""), range(51), strict=False) if line[0].isdigit()
    ]
    worker.send_signal(signal.SIGKILL)
    reported += [int(line) for line in worker.stdout.read().split("\n") if line.isdigit()]
    worker.wait(10)
    with opened(url, prefix) as store:
        for number in reported:
            key = hashlib.sha256(f"{prefix}{number}".encode()).digest()[:16]
            assert store.claim(ask(key)) == Completed(str(worker.pid).encode())
    assert len(reported) >= 50


FORK = """
    import os, sys
    from idempotent_bus.model import Busy, Claimed, ClaimRequest, Completed, Completion, Hold
    from idempotent_bus.stores.sql import open_sql
    store = open_sql(sys.argv[1], table_prefix=sys.argv[2])
    mine = ClaimRequest(os.urandom(16), os.urandom(16), 60, 3600)
    held = store.claim(mine)
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            assert isinstance(store.claim(ClaimRequest(mine.key, os.urandom(16), 60, 3600)), Busy)
            for _ in range(20):
                nonce = os.urandom(16)
                claimed = store.claim(ClaimRequest(nonce, nonce, 60, 3600))
                assert store.complete(Hold(nonce, claimed.token, nonce), result=b"child", retention=60)
                assert store.lookup(nonce).result == b"child"
            sys.exit(0)     # with all that an exit closes and collects
        pids.append(pid)
    for _ in range(50):
        assert store.renew(Hold(mine.key, held.token, mine.nonce), lease=60, retention=60)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert store.complete(Hold(mine.key, held.token, mine.nonce), result=b"parent", retention=60)
    assert store.lookup(mine.key).result == b"parent"
    print("done")
"""


@over(*DATABASES)
def test_a_store_that_was_used_survives_a_fork(url: str, prefix: str) -> None:
    """Children forked from a process with open connections use their own; the parent's go on working."""
    process = start(FORK, url, prefix)
    output, _ = process.communicate(timeout=60)
    assert output.strip().endswith("done"), output


# --- a database that is busy, full or read-only --------------------------------------------------------------


@over("sqlite")
def test_a_locked_file_is_waited_for_and_then_unavailable(url: str, prefix: str) -> None:
    """`database is locked` is not an outcome: a short lock is waited for, a long one is StoreUnavailable in time."""
    with opened(url, prefix, timeout=0.5) as store:
        hold = take(store, ask())
        other = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        for call in (lambda: store.claim(ask()), lambda: store.renew_many([hold, hold], lease=1, retention=1)):
            with pytest.raises(StoreUnavailable) as caught:
                call()
            assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
        assert 0.9 < time.monotonic() - began < 5
        assert store.lookup(hold.key) is not None  # readers do not wait for the writer
        threading.Timer(0.2, other.execute, ("ROLLBACK",)).start()
        assert isinstance(store.claim(ask()), Claimed)
        other.close()


@over("sqlite")
def test_a_full_disk_is_unavailable_and_leaves_nothing_half_done(url: str, prefix: str) -> None:
    """I9: with no page left, claims and completions are refused loudly; with room again, the same calls succeed."""
    with opened(url, prefix) as store:
        limit = [2**30]
        sa.event.listen(
            store._engine, "checkout", lambda connection, *_: connection.execute(f"PRAGMA max_page_count={limit[0]}")
        )
        hold = take(store, ask())
        limit[0] = 1  # SQLite makes it the present size
        asked: list[ClaimRequest] = []

        def fill() -> None:
            for _ in range(1000):
                asked.append(ask())
                store.claim(asked[-1])

        with pytest.raises(StoreUnavailable) as caught:
            fill()
        assert "full" in str(caught.value.__cause__)
        with pytest.raises(StoreUnavailable):
            store.complete(hold, result=os.urandom(100_000), retention=60)
        record = store.lookup(hold.key)
        assert record is not None
        assert record.result is None
        assert store.lookup(asked[-1].key) is None
        limit[0] = 2**30
        assert store.complete(hold, result=b"r" * 100_000, retention=60)
        assert store.claim(ask(hold.key)) == Completed(b"r" * 100_000)
        take(store, asked[-1])


@over("postgresql")
def test_a_read_only_server_is_unavailable(url: str, prefix: str) -> None:
    """A standby that takes no writes (after a failover) refuses a claim loudly."""
    with opened(url, prefix) as store:
        take(store, ask())
    options = {"options": "-c default_transaction_read_only=on"}
    with opened(url, prefix, connect_args=options) as store, pytest.raises(StoreUnavailable) as caught:
        store.claim(ask())
    assert type(caught.value.__cause__).__name__ == "ReadOnlySqlTransaction"


@contextlib.contextmanager
def row_locked(url: str, prefix: str, key: bytes) -> Iterator[sa.Connection]:
    engine = sa.create_engine(url)
    records = schema.records(schema.metadata(prefix))
    with engine.connect() as connection:
        connection.execute(sa.select(records.c.token).where(records.c.record_key == key).with_for_update())
        yield connection
    engine.dispose()


@over(*SERVERS)
def test_a_lock_that_stays_is_unavailable_in_time(url: str, prefix: str) -> None:
    """A stalled transaction of somebody else's cannot hang a consumer; other records are not concerned."""
    with opened(url, prefix, timeout=1) as store:
        hold = take(store, ask())
        with row_locked(url, prefix, hold.key):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable):
                store.claim(ask(hold.key))
            assert time.monotonic() - began < 4
            take(store, ask())
            assert store.purge() == 0
        assert isinstance(store.claim(ask(hold.key)), Busy)


@over(*SERVERS)
def test_a_purge_passes_over_what_is_in_use(url: str, prefix: str) -> None:
    """A record that somebody has locked is neither deleted nor waited for."""
    with opened(url, prefix, timeout=1) as store:
        holds = [take(store, ask()) for _ in range(3)]
        assert all(store.release(hold, attempts=1, retention=0) for hold in holds)
        with row_locked(url, prefix, holds[1].key):
            assert store.purge() == 2
        assert store.purge() == 1


def late_claim(url: str, prefix: str) -> float:
    """The lease that is left of a 3 s claim which had to wait 1 s for its record's lock."""
    with opened(url, prefix) as store:
        hold = take(store, ask())
        assert store.release(hold, attempts=1, retention=60)
        with row_locked(url, prefix, hold.key) as other:
            threading.Timer(1, other.rollback).start()
            take(store, ask(hold.key, lease=3.0))
        record = store.lookup(hold.key)
        assert record is not None
        return record.lease_left


@over(*SERVERS)
def test_a_lease_begins_after_the_wait_for_the_lock(url: str, prefix: str) -> None:
    """The clock is read once the record is ours: a claim that waited has its whole lease."""
    assert 2.5 < late_claim(url, prefix) <= 3


@pytest.mark.parametrize(
    ("url", "old", "new"),
    [
        ("postgresql", "clock_timestamp()", "now()"),
        ("mariadb", "SYSDATE(6)", "NOW(6)"),
    ],
    indirect=["url"],
)
def test_the_transactions_clock_would_shorten_it(
    url: str, prefix: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: with the clock of the statement's start, the wait is missing from the lease."""
    for name, text in dialects.NOW_US.items():
        monkeypatch.setitem(dialects.NOW_US, name, text.replace(old, new))
    assert late_claim(url, prefix) < 2.3


@over("mariadb")
def test_sessions_in_different_time_zones_agree(url: str, prefix: str) -> None:
    """The clock does not depend on the session's zone, not even on a user's engine."""
    with opened(url, prefix) as store:
        hold = take(store, ask(lease=60.0))
        for zone in ("+13:00", "-11:00"):
            engine = sa.create_engine(url, connect_args={"init_command": f"SET time_zone = '{zone}'"})
            busy = SQLStore(engine, table_prefix=prefix).claim(ask(hold.key))
            assert isinstance(busy, Busy)
            assert 50 < busy.retry_after <= 60
            engine.dispose()


# --- the network -----------------------------------------------------------------------------------------------


def kill_sessions(url: str, store: SQLStore) -> int:
    """End the store's sessions from the server's side, as an idle timeout or a restart does."""
    postgresql = url.startswith("postgresql")
    pooled = [store._engine.raw_connection() for _ in range(store._engine.pool.checkedin())]  # type: ignore[attr-defined]
    numbers = [
        (one.driver_connection.info.backend_pid if postgresql else one.driver_connection.thread_id())  # type: ignore[union-attr]
        for one in pooled
    ]
    for one in pooled:
        one.close()
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for number in numbers:
            connection.exec_driver_sql(f"SELECT pg_terminate_backend({number})" if postgresql else f"KILL {number}")
    engine.dispose()
    time.sleep(0.1)
    return len(numbers)


def warm(store: SQLStore, connections: int) -> None:
    """Let the pool have so many idle connections that have worked."""
    barrier = threading.Barrier(connections)
    original = store._engine.raw_connection

    def meet() -> Any:
        connection = original()
        barrier.wait(20)
        return connection

    take(store, ask())
    store._engine.raw_connection = meet  # type: ignore[method-assign]
    threads = [threading.Thread(target=store.claim, args=(ask(),)) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    del store._engine.raw_connection  # type: ignore[method-assign]


@over(*SERVERS)
def test_sessions_that_the_server_closed_cost_nothing(url: str, prefix: str) -> None:
    """A pool full of dead connections: the next call succeeds all the same, without a ping before each."""
    with opened(url, prefix) as store:
        warm(store, 4)
        assert kill_sessions(url, store) == 4
        take(store, ask())


@over(*SERVERS)
def test_without_the_second_try_it_would_cost_a_message(url: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a store that takes the first error as its answer fails on the same pool."""
    with opened(url, prefix) as store:
        warm(store, 2)
        kill_sessions(url, store)
        monkeypatch.setattr(store, "_is_lost", lambda *_: False)
        with pytest.raises(StoreUnavailable):
            store.claim(ask())


@over(*SERVERS)
def test_a_lost_reply_is_settled_by_asking_again(url: str, prefix: str) -> None:
    """I15: the answer to a claim, a completion and a release is lost with its connection; each is told rightly."""
    with opened(url, prefix) as direct, Proxy(url=url) as proxy, opened(through(proxy, url), prefix) as store:
        take(direct, ask())
        proxy.lose_reply(b"INSERT INTO")
        hold = take(store, ask())
        record = direct.lookup(hold.key)
        assert record is not None
        assert (record.token, record.attempts) == (hold.token, 1)
        proxy.lose_reply(b"UPDATE")
        assert store.release(hold, attempts=1, retention=60)
        again = ask(hold.key)
        outcome = store.claim(again)
        assert isinstance(outcome, Claimed)
        assert outcome.attempt == 2
        assert outcome.token > hold.token
        hold = take(store, again)
        proxy.lose_reply(b"UPDATE")
        assert store.complete(hold, result=b"r", retention=60)
        assert proxy.done["lose_reply"] == 3
        assert store.claim(ask(hold.key)) == Completed(b"r")


@over(*SERVERS)
def test_a_server_that_falls_silent_is_unavailable_in_time(url: str, prefix: str) -> None:
    """Frozen, not closed: no error comes. The call ends within the timeout and a little; later all is well again."""
    with Proxy(url=url) as proxy, opened(through(proxy, url), prefix, timeout=1) as store:
        hold = take(store, ask())
        proxy.stall()
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.complete(hold, result=None, retention=60)
        assert time.monotonic() - began < 8
        proxy.resume()
        assert store.complete(hold, result=None, retention=60)


@over(*DATABASES)
def test_many_completions_with_long_results(url: str, prefix: str) -> None:
    """More than a packet of MariaDB's holds (16 MiB): it cut the connection, each time."""
    with opened(url, prefix) as store:
        requests = [ask() for _ in range(300)]
        outcomes = store.claim_many(requests)
        result = b'"' + b"\\" * 60_000 + b'"'
        holds = [
            Hold(request.key, claimed.token, request.nonce)
            for request, claimed in zip(requests, outcomes, strict=True)
            if isinstance(claimed, Claimed)
        ]
        assert all(store.complete_many([Completion(hold, result, 60) for hold in holds]))
        assert store.claim(ask(holds[-1].key)) == Completed(result)


def claiming(store: SQLStore) -> tuple[threading.Thread, list[StoreUnavailable]]:
    """A thread that claims, and what it was told if it was told that the store is unavailable."""
    errors: list[StoreUnavailable] = []

    def claim() -> None:
        try:
            store.claim(ask())
        except StoreUnavailable as error:
            errors.append(error)

    caller = threading.Thread(target=claim)
    caller.start()
    return caller, errors


@over("postgresql")
def test_without_the_watchdog_it_would_hang(url: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: libpq itself waits on and on."""
    monkeypatch.setattr(Watchdog, "start", lambda *_: 0)
    with Proxy(url=url) as proxy, opened(through(proxy, url), prefix, timeout=1) as store:
        take(store, ask())
        proxy.stall()
        caller, errors = claiming(store)
        caller.join(4)
        assert caller.is_alive()
        proxy.refuse()
        proxy.cut()
        proxy.resume()
        caller.join(10)
        assert errors


@over("postgresql")
@pytest.mark.parametrize("asked", [b"set_config", b"pg_catalog.version", b"CREATE TABLE"])
@pytest.mark.parametrize("watched", [True, False])
def test_a_server_that_falls_silent_behind_its_greeting(
    url: str, prefix: str, monkeypatch: pytest.MonkeyPatch, asked: bytes, watched: bool
) -> None:
    """While a connection is set up, or the tables are made: unavailable in time too. The control: else it hangs."""
    if not watched:
        monkeypatch.setattr(Watchdog, "start", lambda *_: 0)
    with Proxy(url=url) as proxy, opened(through(proxy, url), prefix, timeout=1) as store:
        proxy.lose_reply(asked, cut=False)
        caller, errors = claiming(store)
        caller.join(8 if watched else 4)
        assert caller.is_alive() is not watched
        if not watched:
            proxy.refuse()
            proxy.cut()
            caller.join(10)
            assert errors
            return
        assert proxy.done["lose_reply"] == 1
        assert errors
        time.sleep(1.1)  # the failure to open is shared for a second
        assert isinstance(store.claim(ask()), Claimed)


@pytest.mark.parametrize("scheme", ["postgresql", "mysql"])
def test_a_server_that_never_greets_is_unavailable_in_time(scheme: str, prefix: str) -> None:
    """Something accepts the connection and says nothing: threads that use the store together fail together."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with opened(f"{scheme}://user@127.0.0.1:{port}/x", prefix, timeout=1) as store:
            errors: list[BaseException] = []

            def claim() -> None:
                try:
                    store.claim(ask())
                except StoreUnavailable as error:
                    errors.append(error)

            began = time.monotonic()
            threads = [threading.Thread(target=claim) for _ in range(10)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert time.monotonic() - began < 10
            assert len(errors) == 10
            assert all(error.__cause__ is not None for error in errors)


@over("postgresql")
def test_an_interrupted_call_does_not_poison_the_pool(url: str, prefix: str) -> None:
    """A time limit that strikes in the middle of a call leaves no connection that would answer out of turn."""

    class Limit(Exception):
        pass

    def strike(*_: Any) -> None:
        raise Limit

    with opened(url, prefix, pool_size=1, max_overflow=0) as store:
        hold = take(store, ask())
        with row_locked(url, prefix, hold.key):
            before = signal.signal(signal.SIGALRM, strike)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            try:
                with pytest.raises(Limit):
                    store.claim(ask(hold.key))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
        for _ in range(3):
            assert isinstance(store.claim(ask(hold.key)), Busy)
        assert store.complete(hold, result=b"r", retention=60)


# --- the schema ---------------------------------------------------------------------------------------------------


@over(*DATABASES)
def test_tables_that_are_there_are_not_created_again(url: str, prefix: str) -> None:
    """With the tables in place no right to create is needed: no DDL is sent."""
    with opened(url, prefix) as store:
        take(store, ask())
    sent: list[str] = []
    with opened(url, prefix) as store:
        sa.event.listen(store._engine, "before_cursor_execute", lambda c, cursor, statement, *_: sent.append(statement))
        take(store, ask())
    assert sent
    assert not [statement for statement in sent if statement.upper().startswith("CREATE")]


@over("postgresql")
def test_a_completion_is_updated_in_place(url: str, prefix: str) -> None:
    """Claim and completion cost two index entries, not four: PostgreSQL counts nearly all updates as HOT."""
    with opened(url, prefix, pool_size=1, max_overflow=0) as store:
        for _ in range(200):
            assert store.complete(take(store, ask()), result=None, retention=3600)
    engine = sa.create_engine(url)
    query = f"SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = '{prefix}records'"
    deadline = time.monotonic() + 15
    while True:
        with engine.connect() as connection:
            updated, in_place = connection.exec_driver_sql(query).one()
        if updated >= 200 or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    engine.dispose()
    assert updated == 200
    assert in_place >= 190


@over("postgresql")
def test_rows_of_earlier_versions_have_no_result(url: str, prefix: str) -> None:
    """A completed row without a result costs no map of its NULLs, and one that was written with NULL says the same."""
    with opened(url, prefix) as store:
        held, done = take(store, ask()), take(store, ask())
        assert store.complete(done, result=None, retention=3600)
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            query = f"SELECT count(*) FROM {prefix}records WHERE result IS NULL"
            assert connection.exec_driver_sql(query).scalar() == 0
            connection.exec_driver_sql(f"UPDATE {prefix}records SET result = NULL")
        engine.dispose()
        assert store.claim(ClaimRequest(done.key, os.urandom(16), 60, 3600)) == Completed(None)
        for hold in (held, done):
            record = store.lookup(hold.key)
            assert record is not None
            assert record.result is None
        assert store.complete(held, result=b"", retention=3600)
        assert store.claim(ClaimRequest(held.key, os.urandom(16), 60, 3600)) == Completed(b"")
