"""What is special to a window's completions on PostgreSQL: a process that is killed, a session that ends, a commit that
fails behind a statement that did not, too few connections, and a fork.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from stores import drop_tables

import servers
from idempotent_bus.errors import StoreUnavailable
from idempotent_bus.model import Completed, Completion, Hold, Settled, State
from idempotent_bus.stores import open_store
from idempotent_bus.stores.pg_stream import PgStream, _Lane
from idempotent_bus.stores.sql import SQLStore
from idempotent_bus.stores.streams import GatheringStream
from idempotent_bus.testing.store_contract import ask, complete, new_key, take
from proxy import Proxy, through

LONG = 600.0
MANY = 8


@pytest.fixture
def prefix() -> Iterator[str]:
    url, prefix = servers.postgresql(), f"t{uuid.uuid4().hex[:12]}_"
    yield prefix
    drop_tables(url, prefix)


@pytest.fixture
def open_here(prefix: str) -> Iterator[Callable[..., SQLStore]]:
    with contextlib.ExitStack() as stack:

        def opened(url: str = "", **options: Any) -> SQLStore:
            store: Any = open_store(url or servers.postgresql(), table_prefix=prefix, **options)
            stack.callback(store.close)
            return store  # type: ignore[no-any-return]

        yield opened


@contextlib.contextmanager
def plain() -> Iterator[psycopg.Connection[Any]]:
    url = sa.make_url(servers.postgresql()).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


@contextlib.contextmanager
def locked(prefix: str, holds: list[Hold]) -> Iterator[None]:
    """Somebody has these rows locked, so that a completion stays under way at the server."""
    with plain() as connection, connection.transaction():
        keys = [str(uuid.UUID(bytes=hold.key)) for hold in holds]
        connection.execute(f"SELECT 1 FROM {prefix}records WHERE record_key = ANY (%s::uuid[]) FOR UPDATE", [keys])  # type: ignore[arg-type]
        yield


def sessions(name: str) -> int:
    with plain() as connection:
        row = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", [name]).fetchone()
    assert row is not None
    return int(row[0])


def end_sessions(name: str) -> None:
    """As an administrator does, or a server that is stopped."""
    with plain() as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s", [name])
    until(lambda: sessions(name) == 0)


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def named(name: str, url: str = "") -> str:
    return (
        sa.make_url(url or servers.postgresql()).update_query_dict({"application_name": name}).render_as_string(False)
    )


# --- a process that is killed --------------------------------------------------------------------------------

#: Begins its completions, and is killed by nobody's leave as soon as the last `begin` has returned.
VICTIM = textwrap.dedent("""
    import json, os, signal, sys
    from idempotent_bus.model import Completion, Hold
    from idempotent_bus.stores import open_store
    from idempotent_bus.stores.pg_stream import _Lane, _numbered

    url, prefix, connections, way, holds = sys.argv[1:]
    store = open_store(url, table_prefix=prefix, timeout=60, stream_connections=int(connections))
    holds = [Hold(bytes.fromhex(key), token, bytes.fromhex(nonce)) for key, token, nonce in json.loads(holds)]
    if way == "stream":
        stream = store.stream()
        for hold in holds:
            stream.begin(Completion(hold, b"done", 600.0))
    else:  # all of them over one connection, one behind the other
        store.lookup(bytes(16))
        text = _numbered(store.stream()._text())
        lane = _Lane(store._connection_of_its_own(), text, 60)
        lane._pgconn.enter_pipeline_mode()
        for number, hold in enumerate(holds):
            lane.begin(number, Completion(hold, b"done", 600.0))
            lane._pgconn.pipeline_sync()
            lane._flush()
    os.kill(os.getpid(), signal.SIGKILL)
""")


def completed_by_the_killed(prefix: str, store: SQLStore, *, connections: int, way: str = "stream") -> int:
    """How many of a killed process's completions are done when the last session of it is over.

    Their records are locked until it is dead, so that none is done before.
    """
    holds = [take(store, new_key(), lease=LONG)[0] for _ in range(MANY)]
    told = json.dumps([(hold.key.hex(), hold.token, hold.nonce.hex()) for hold in holds])
    name = f"victim-{prefix}"
    with locked(prefix, holds):
        command = [sys.executable, "-c", VICTIM, named(name), prefix, str(connections), way, told]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == -9, done.stderr
        found = [store.lookup(hold.key) for hold in holds]
        assert [record.state for record in found if record] == [State.IN_PROGRESS] * MANY
    until(lambda: sessions(name) == 0)
    found = [store.lookup(hold.key) for hold in holds]
    return sum(record is not None and record.result == b"done" for record in found)


def test_what_was_begun_survives_a_kill(prefix: str, open_here: Callable[..., SQLStore]) -> None:
    """I4: `survives` is true. A process is killed right after `begin` has returned; all that it began is completed."""
    store = open_here()
    assert store.stream().survives
    assert completed_by_the_killed(prefix, store, connections=MANY) == MANY


def test_what_a_thread_gathers_does_not(prefix: str, open_here: Callable[..., SQLStore]) -> None:
    """Control: what waits in the process for another commit goes with it. That stream does not say `survives`."""
    store = open_here(stream_connections=0)
    assert not store.stream().survives
    assert completed_by_the_killed(prefix, store, connections=0) < MANY


def test_what_waits_behind_another_does_not(prefix: str, open_here: Callable[..., SQLStore]) -> None:
    """Control: several over one connection (a pipeline) have all left, and the server drops the later ones. It ends a
    session whose client it cannot answer. That is why a connection carries one at a time.
    """
    assert completed_by_the_killed(prefix, open_here(), connections=1, way="pipeline") < MANY


# --- what ends without a clear answer ------------------------------------------------------------------------


def test_sessions_that_end_are_in_doubt(prefix: str, open_here: Callable[..., SQLStore]) -> None:
    """I9, I15: completions whose sessions were ended are told as in doubt, in their order; the stream then goes on."""
    name = f"stream-{prefix}"
    store = open_here(named(name))
    stream = store.stream()
    holds = [take(store, new_key(), lease=LONG)[0] for _ in range(6)]
    assert stream.begin(Completion(holds[0], None, LONG)) == 1
    assert stream.settle() == [Settled(1, True)]
    with locked(prefix, holds[1:4]):
        for hold in holds[1:4]:
            stream.begin(Completion(hold, b"done", LONG))
        assert stream.poll() == []
        assert stream.pending == 3
        end_sessions(name)
        assert stream.settle() == [Settled(ticket, None) for ticket in (2, 3, 4)]
    assert [complete(store, hold) for hold in holds[1:4]] == [True] * 3
    assert stream.begin(Completion(holds[4], None, LONG)) == 5
    assert stream.settle() == [Settled(5, True)]
    assert stream.pending == 0


def test_idle_sessions_that_ended_cost_one_answer(prefix: str, open_here: Callable[..., SQLStore]) -> None:
    """After a restart of the server one completion is in doubt, not one for each connection that went with it."""
    name = f"stream-{prefix}"
    store = open_here(named(name))
    stream = store.stream()
    holds = [take(store, new_key(), lease=LONG)[0] for _ in range(6)]
    with locked(prefix, holds[:3]):  # so that three are opened
        for hold in holds[:3]:
            stream.begin(Completion(hold, None, LONG))
    assert [one.durable for one in stream.settle()] == [True] * 3
    end_sessions(name)
    told: list[Settled] = []
    for hold in holds[3:]:
        stream.begin(Completion(hold, None, LONG))
        told += stream.settle()
    assert [one.durable for one in told][1:] == [True, True]
    assert told[0].durable is None
    assert complete(store, holds[3], None)


def test_an_answer_that_does_not_come_is_in_doubt(open_here: Callable[..., SQLStore]) -> None:
    """I9, I15: the server has done it and its answer is lost: None within the time limit, and `complete` tells True."""
    with Proxy(url=servers.postgresql()) as proxy:
        store = open_here(through(proxy, servers.postgresql()), timeout=2.0)
        stream = store.stream()
        holds = [take(store, new_key(), lease=LONG)[0] for _ in range(2)]
        stream.begin(Completion(holds[0], None, LONG))
        assert stream.settle() == [Settled(1, True)]
        proxy.lose_reply(b"idempotent_bus_complete", cut=False)
        stream.begin(Completion(holds[1], b"done", LONG))
        assert stream.poll(0.1) == []
        began = time.monotonic()
        assert stream.settle() == [Settled(2, None)]
        assert time.monotonic() - began < 10
        assert proxy.done["lose_reply"] == 1
        assert complete(store, holds[1], b"done")


def test_a_server_that_is_down_is_in_doubt(open_here: Callable[..., SQLStore]) -> None:
    """I9: where no connection can be had, `begin` raises nothing and the ticket is told as in doubt."""
    with Proxy(url=servers.postgresql()) as proxy:
        store = open_here(through(proxy, servers.postgresql()), timeout=2.0)
        hold = take(store, new_key(), lease=LONG)[0]
        stream = store.stream()
        proxy.refuse()
        proxy.cut()
        assert stream.begin(Completion(hold, None, LONG)) == 1
        assert stream.settle() == [Settled(1, None)]
        proxy.accept_again()
        assert stream.begin(Completion(hold, None, LONG)) == 2
        assert stream.settle() == [Settled(2, True)]


def test_a_commit_that_fails_is_not_durable(prefix: str, open_here: Callable[..., SQLStore]) -> None:
    """I4: the statement's answer is not the commit's. A check that runs at the commit refuses: never told True."""
    store = open_here()
    hold = take(store, new_key(), lease=LONG)[0]
    stream = store.stream()
    with plain() as connection:
        connection.execute(
            f"CREATE FUNCTION {prefix}no() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'no'; END$$"  # type: ignore[arg-type]
        )
        connection.execute(
            f"CREATE CONSTRAINT TRIGGER no AFTER UPDATE ON {prefix}records DEFERRABLE INITIALLY DEFERRED "  # type: ignore[arg-type]
            f"FOR EACH ROW EXECUTE FUNCTION {prefix}no()"
        )
        try:
            stream.begin(Completion(hold, b"done", LONG))
            assert stream.settle() == [Settled(1, None)]
        finally:
            connection.execute(f"DROP FUNCTION {prefix}no() CASCADE")  # type: ignore[arg-type]
    record = store.lookup(hold.key)
    assert record is not None
    assert record.state is State.IN_PROGRESS
    stream.begin(Completion(hold, b"done", LONG))
    assert stream.settle() == [Settled(2, True)]


def test_a_stream_that_takes_a_statement_for_a_commit_is_noticed(
    prefix: str, open_here: Callable[..., SQLStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: a lane that looks at the statement's answer only says True where the commit failed."""
    over = _Lane.over

    def hasty(self: _Lane) -> bool:
        ended = over(self)
        self.durable = self.durable or self._failed
        return ended

    monkeypatch.setattr(_Lane, "over", hasty)
    with pytest.raises(AssertionError):
        test_a_commit_that_fails_is_not_durable(prefix, open_here)


def test_a_stream_that_takes_silence_for_success_is_noticed(
    prefix: str, open_here: Callable[..., SQLStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: with a stream that tells True of what was under way, the checks above fail."""
    broken = PgStream._broken

    def careless(self: PgStream, lane: _Lane) -> None:
        broken(self, lane)
        self._ended[lane.ticket] = True

    monkeypatch.setattr(PgStream, "_broken", careless)
    with pytest.raises(AssertionError):
        test_sessions_that_end_are_in_doubt(prefix, open_here)
    with pytest.raises(AssertionError):
        test_an_answer_that_does_not_come_is_in_doubt(open_here)


# --- several at once -----------------------------------------------------------------------------------------


def test_one_that_waits_holds_up_no_other(prefix: str, open_here: Callable[..., SQLStore]) -> None:
    """A completion that waits for a lock delays what is told, not what is done: the others are durable beside it."""
    store = open_here()
    stream = store.stream()
    holds = [take(store, new_key(), lease=LONG)[0] for _ in range(20)]
    with locked(prefix, holds[:1]):
        for hold in holds:
            stream.begin(Completion(hold, b"done", LONG))

        def done() -> bool:
            assert stream.poll() == []  # in the order of the tickets: nothing before the first
            records = [store.lookup(hold.key) for hold in holds[1:]]
            return all(record is not None and record.state is State.COMPLETED for record in records)

        until(done)
        assert stream.pending == 20
    assert stream.settle() == [Settled(ticket, True) for ticket in range(1, 21)]


def test_fewer_connections_will_do(
    prefix: str, open_here: Callable[..., SQLStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that gives no further connection slows a stream down; nothing is in doubt by that."""
    store = open_here()
    connect, opened = store._connection_of_its_own, []

    def few() -> Any:
        if len(opened) == 2:
            raise StoreUnavailable("sorry, too many clients already")
        opened.append(connect())
        return opened[-1]

    monkeypatch.setattr(store, "_connection_of_its_own", few)
    holds = [take(store, new_key(), lease=LONG)[0] for _ in range(12)]
    stream = store.stream()
    with locked(prefix, holds[:1]):
        for hold in holds:
            stream.begin(Completion(hold, None, LONG))
    assert [one.durable for one in stream.settle()] == [True] * 12
    assert len(opened) == 2


def test_quick_commits_need_one_connection(open_here: Callable[..., SQLStore]) -> None:
    """Another connection is opened only while those that there are have something under way."""
    store = open_here()
    stream: Any = store.stream()
    for number in range(1, 11):
        stream.begin(Completion(take(store, new_key())[0], None, LONG))
        assert stream.poll(10.0) == [Settled(number, True)]
    assert len(stream._idle) == 1


def test_a_store_that_is_closed_has_no_connections(prefix: str, open_here: Callable[..., SQLStore]) -> None:
    """`close` closes a stream's connections too; a stream that is let go of closes its own. Both may be used again."""
    name = f"stream-{prefix}"
    store = open_here(named(name))
    stream = store.stream()
    assert sessions(name) == 0
    hold = take(store, new_key())[0]
    stream.begin(Completion(hold, None, LONG))
    stream.settle()
    assert sessions(name) == 1  # the one that the claim had, out of the pool
    store.close()
    until(lambda: sessions(name) == 0)
    stream.begin(Completion(hold, None, LONG))
    assert stream.settle() == [Settled(2, True)]  # used again; and a repeat of the same hold hears the same
    del stream
    gc.collect()
    until(lambda: sessions(name) == 1)  # the pool's, for the repeat


def test_without_named_statements(prefix: str, open_here: Callable[..., SQLStore]) -> None:
    """Where psycopg is told to name no statements (a pooler keeps none), a stream names none either."""
    with Proxy(url=servers.postgresql()) as proxy:
        proxy.lose_request(b"idempotent_bus_complete", times=100)
        store = open_here(through(proxy, servers.postgresql()), connect_args={"prepare_threshold": None})
        holds = [take(store, new_key())[0] for _ in range(5)]
        stream = store.stream()
        for hold in holds:
            stream.begin(Completion(hold, b"done", LONG))
        assert [one.durable for one in stream.settle()] == [True] * 5
        assert store.claim(ask(holds[0].key)) == Completed(b"done")


def test_a_child_leaves_its_parents_connections_alone(open_here: Callable[..., SQLStore]) -> None:
    """A fork in the middle: the child lets go of the stream and opens one of its own; the parent's goes on."""
    store = open_here()
    stream = store.stream()
    holds = [take(store, new_key(), lease=LONG)[0] for _ in range(4)]
    stream.begin(Completion(holds[0], None, LONG))
    stream.settle()
    stream.begin(Completion(holds[1], None, LONG))
    child = os.fork()
    if child == 0:
        try:
            stream.close()
            stream = store.stream()
            gc.collect()
            stream.begin(Completion(holds[2], None, LONG))
            os._exit(0 if stream.settle() == [Settled(1, True)] else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    stream.begin(Completion(holds[3], None, LONG))
    assert stream.settle() == [Settled(2, True), Settled(3, True)]


def test_other_drivers_gather() -> None:
    """Only psycopg 3 on PostgreSQL streams; and nobody is made to."""
    assert isinstance(open_store("sqlite:///x.db").stream(), GatheringStream)  # type: ignore[attr-defined]
    assert isinstance(open_store("postgresql://x/y").stream(), PgStream)  # type: ignore[attr-defined]
    assert isinstance(open_store("postgresql://x/y", stream_connections=0).stream(), GatheringStream)  # type: ignore[attr-defined]
