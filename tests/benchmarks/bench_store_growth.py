"""Does a store get slower as it fills? claim + complete on fresh keys, beside few and beside many old records:
one by one, and as a window does it (100 claims in one round trip, completions streamed where the store can).

    python tests/benchmarks/bench_store_growth.py --stores sqlite,redis --sizes 10000,1000000

Stores: sqlite (as opened by default), sqlite-normal (?synchronous=NORMAL), redis (a server of its own), postgresql,
mariadb. The old records are written in bulk in the store's own layout (on PostgreSQL each is inserted and then updated,
as a claim and its completion do, since that is what decides its size); what is measured are the public verbs. Small and
large stores take turns, round by round, so that a busy machine slows both. Prints a table and writes
`reports/store_growth.md`. Exit code 1 if the largest store costs more than `--bound` times the smallest, one by one or
in windows.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import servers
from idempotent_bus.model import Claimed, ClaimRequest, Completion, Hold, State
from idempotent_bus.stores import open_store

REPORT = Path(__file__).parent / "reports" / "store_growth.md"
DAY = 86400.0
BLOCK = 5000
WINDOW = 100
#: Completions of a window that may be under way, as in the executor's.
UNDER_WAY = 50


@dataclass
class Filled:
    """A store with so many old records. size_of: bytes that all of them take. version: the server's or library's."""

    store: Any
    size_of: Callable[[], int]
    version: str


def ask() -> ClaimRequest:
    return ClaimRequest(os.urandom(16), os.urandom(16), 60.0, DAY, os.urandom(8))


def pair(store: Any) -> None:
    """The work that is measured: one claim that wins, and its completion."""
    request = ask()
    claimed = store.claim(request)
    assert isinstance(claimed, Claimed)
    assert store.complete(Hold(request.key, claimed.token, request.nonce), result=None, retention=DAY)


def window(store: Any, stream: Any) -> None:
    """The same for a window: claims in one round trip, each completion sent at once, the acks' answers awaited."""
    requests = [ask() for _ in range(WINDOW)]
    settled = []
    for request, claimed in zip(requests, store.claim_many(requests), strict=True):
        assert isinstance(claimed, Claimed)
        hold = Hold(request.key, claimed.token, request.nonce)
        if not stream.survives:  # the consumer does not trust it either
            assert store.complete(hold, result=None, retention=DAY)
            continue
        if stream.pending >= UNDER_WAY:
            settled += stream.settle()
        stream.begin(Completion(hold, None, DAY))
    settled += stream.settle()
    assert all(one.durable for one in settled)


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text.endswith("000 records") or ": round 1 of" in text:
        print(text, file=sys.stderr, flush=True)


def blocks(count: int, what: str) -> Iterator[int]:
    for done in range(0, count, BLOCK):
        progress(f"{what}: {done:,} of {count:,}" if done else f"{what}: {round(count, -3):,} records")
        yield min(BLOCK, count - done)
    progress("")


# --- filling -----------------------------------------------------------------------------------------------------


def fill_sql(store: Any, count: int, what: str) -> None:
    """Completed records by plain INSERTs: keys at random, times as if they had come one after another."""
    from idempotent_bus import schema

    pair(store)
    table = schema.records(store._tables)
    now = time.time_ns() // 1000
    number = 0
    with store._engine.connect() as connection:
        connection = connection.execution_options(isolation_level="SERIALIZABLE")
        for size in blocks(count - 1, what):
            rows = []
            for _ in range(size):
                number += 1
                kept = now + int(DAY * 1e6) + number
                rows.append(
                    {
                        "record_key": os.urandom(16),
                        "nonce": os.urandom(16),
                        "token": number,
                        "lease_ends": now + 60_000_000 + number,
                        "kept_until": kept,
                        "purge_after": kept,
                        "redrive": 0,
                        "attempts": 1,
                        "state": int(State.COMPLETED),
                        "flags": 0,
                        "fingerprint": os.urandom(8),
                    }
                )
            with connection.begin():
                connection.execute(table.insert(), rows)


#: A window's claims are inserted together and committed; then each is updated as completed, and committed by itself.
_FILL_POSTGRESQL = """
DO $$
DECLARE
  done bigint := 0; keys uuid[]; one uuid;
  now_us bigint := extract(epoch FROM clock_timestamp()) * 1000000;
BEGIN
  WHILE done < {count} LOOP
    WITH fresh AS (
      INSERT INTO {records}
        (record_key, nonce, token, state, flags, attempts, redrive, lease_ends, kept_until, purge_after, fingerprint,
         result)
      SELECT gen_random_uuid(), gen_random_uuid(), n, 2, 0, 1, 0, now_us + n + 60000000, now_us + n + 60000000 + {kept},
             now_us + n + {kept}, substring(uuid_send(gen_random_uuid()) FROM 1 FOR 8), ''
      FROM generate_series(done + 1, least(done + {window}, {count})) AS n
      RETURNING record_key)
    SELECT array_agg(record_key) INTO keys FROM fresh;
    COMMIT;
    FOREACH one IN ARRAY keys LOOP
      UPDATE {records} SET state = 3, kept_until = purge_after WHERE record_key = one;
      COMMIT;
    END LOOP;
    done := done + {window};
  END LOOP;
END $$
"""


#: The same in one statement, without the traces of a second version of each record.
_FILL_QUICKLY = """
INSERT INTO {records}
  (record_key, nonce, token, state, flags, attempts, redrive, lease_ends, kept_until, purge_after, fingerprint, result)
SELECT gen_random_uuid(), gen_random_uuid(), n, 3, 0, 1, 0, now_us + n + 60000000, now_us + n + {kept},
       now_us + n + {kept}, substring(uuid_send(gen_random_uuid()) FROM 1 FOR 8), ''
FROM generate_series(1, {count}) AS n, (SELECT CAST(extract(epoch FROM now()) * 1000000 AS bigint) AS now_us) AS clock
"""

#: Set by --quick-fill.
quick_fill = False


def fill_postgresql(store: Any, count: int, what: str) -> None:
    """The same on PostgreSQL, by the server itself."""
    import sqlalchemy as sa

    from idempotent_bus import schema

    pair(store)
    progress(f"{what}: {count:,} records")
    name = schema.records(store._tables).name
    # Not the store's own engine, which takes a server that does not answer for so long for one that has fallen silent.
    engine = sa.create_engine(store._engine.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        # Nothing here need survive a crash; and a new table looks small enough to be read from end to end.
        connection.exec_driver_sql("SET synchronous_commit = off; SET enable_seqscan = off; SET statement_timeout = 0")
        done = 1
        while done < count:
            # As autovacuum does at a table's `autovacuum_vacuum_scale_factor` of 0.05, which this is too fast for.
            piece = count - done if quick_fill else min(count - done, max(1000, done // 20))
            fill = _FILL_QUICKLY if quick_fill else _FILL_POSTGRESQL
            text = fill.format(records=name, count=piece, kept=int(DAY * 1e6), window=WINDOW)
            connection.exec_driver_sql(text)
            connection.exec_driver_sql(f"VACUUM {name}")
            done += piece


@contextlib.contextmanager
def sqlite(count: int, query: str = "") -> Iterator[Filled]:
    import sqlite3

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "store.db"
        with contextlib.closing(open_store(f"sqlite:///{file}?synchronous=NORMAL")) as filler:
            fill_sql(filler, count, "filling SQLite")
        store = open_store(f"sqlite:///{file}{query}")
        yield Filled(store, lambda: file.stat().st_size, f"SQLite {sqlite3.sqlite_version}")
        store.close()


@contextlib.contextmanager
def server(url: str, sizes: str) -> Iterator[Callable[[int], Any]]:
    import sqlalchemy as sa

    prefix = f"b{secrets.token_hex(6)}_"
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    store = open_store(url, table_prefix=prefix)

    def filled(count: int) -> Filled:
        fill = fill_postgresql if engine.dialect.name == "postgresql" else fill_sql
        fill(store, count, f"filling {engine.dialect.name}")
        with engine.connect() as connection:
            if engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"VACUUM ANALYZE {prefix}records")
            else:
                connection.exec_driver_sql(f"ANALYZE TABLE {prefix}records").close()
            version = connection.exec_driver_sql("SHOW server_version" if "postgres" in url else "SELECT version()")
            name = f"{engine.dialect.name} {str(version.scalar()).split('-')[0].split(' ')[0]}"

        def size() -> int:
            with engine.connect() as connection:
                return int(connection.exec_driver_sql(sizes.format(f"{prefix}records")).scalar() or 0)

        return Filled(store, size, name)

    try:
        yield filled
    finally:
        store.close()
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP TABLE IF EXISTS {prefix}records")
            connection.exec_driver_sql(f"DROP SEQUENCE IF EXISTS {prefix}tokens")
        engine.dispose()


@contextlib.contextmanager
def postgresql(count: int) -> Iterator[Filled]:
    with server(servers.POSTGRESQL, "SELECT pg_total_relation_size('{}')") as filled:
        yield filled(count)


@contextlib.contextmanager
def mariadb(count: int) -> Iterator[Filled]:
    size = "SELECT data_length + index_length FROM information_schema.tables WHERE table_name = '{}'"
    with server(servers.MARIADB, size) as filled:
        yield filled(count)


@contextlib.contextmanager
def redis(count: int) -> Iterator[Filled]:
    """A server of its own, so that a million keys are in nobody's way; persistence off, as it is not what is asked."""
    import redis as driver

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [shutil.which("redis-server") or "redis-server", "--port", str(port), "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        client = driver.Redis(port=port)
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(driver.ConnectionError):
                client.ping()
                break
            assert time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.05)
        store: Any = open_store(f"redis://127.0.0.1:{port}/0")
        empty = int(client.info("memory")["used_memory"])
        request = ask()
        claimed = store.claim(request)
        assert store.complete(Hold(request.key, claimed.token, request.nonce), result=None, retention=DAY)
        # A completed record in the short form as the store itself writes it; the key is not part of it. As many buckets
        # as the store would have come to by itself, and each filled at once, with keys that belong there.
        record = client.hget(store._places.of(request.key)[2], request.key[1:])
        assert record is not None
        number = 1 << max(0, round(math.log2(count / 256 / 64)))
        client.flushdb()
        for slot in range(256):
            client.set(store._places.slots[slot] + b"buckets", number)
            store._places.learn(slot, number)
        bits, left = number.bit_length() - 1, count
        for done in range(256 * number):
            if done % 1000 == 0:
                progress(
                    f"filling Redis: {count - left:,} of {count:,}" if done else f"filling Redis: {count:,} records"
                )
            slot, bucket = done % 256, done // 256
            size = left // (256 * number - done)
            left -= size
            name, heads = (
                store._places.bucket(slot, bucket),
                [secrets.randbits(32 - bits) << bits | bucket for _ in range(size)],
            )
            if size:
                fields = {head.to_bytes(4, "big") + os.urandom(11): record for head in heads}
                client.hset(name, mapping=fields)
                client.pexpire(name, int(DAY * 1000 * 1.125))
        version = f"Redis {client.info('server')['redis_version']}"
        yield Filled(store, lambda: int(client.info("memory")["used_memory"]) - empty, version)
        store.close()
        client.close()
    finally:
        process.terminate()
        process.wait(10)


STORES: dict[str, Callable[[int], contextlib.AbstractContextManager[Filled]]] = {
    "sqlite": sqlite,
    "sqlite-normal": lambda count: sqlite(count, "?synchronous=NORMAL"),
    "redis": redis,
    "postgresql": postgresql,
    "mariadb": mariadb,
}


# --- measuring ---------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """microseconds: of one claim + complete, one figure a round; windowed: the same in a window. bytes_each: per old
    record."""

    size: int
    microseconds: list[float]
    windowed: list[float]
    bytes_each: float
    version: str

    @property
    def median(self) -> float:
        return statistics.median(self.microseconds)

    def cost(self, other: Measured) -> float:
        """The median of this one's rounds over the other's, pair by pair: what slowed a round slowed both."""
        return statistics.median(a / b for a, b in zip(self.microseconds, other.microseconds, strict=True))

    def window_cost(self, other: Measured) -> float:
        """The same of windows."""
        return statistics.median(a / b for a, b in zip(self.windowed, other.windowed, strict=True))


def measure(name: str, sizes: list[int], *, rounds: int = 45, pairs: int = 100, before: int = 0) -> list[Measured]:
    """Fill one store of each size, then let them take turns. before: ids that each gets in windows before that."""
    with contextlib.ExitStack() as stack:
        filled = [stack.enter_context(STORES[name](size)) for size in sizes]
        bytes_each = [one.size_of() / size for one, size in zip(filled, sizes, strict=True)]
        figures: list[list[float]] = [[] for _ in sizes]
        windowed: list[list[float]] = [[] for _ in sizes]
        streams = [one.store.stream() for one in filled]
        for one, stream in zip(filled, streams, strict=True):
            for _ in range(0, before, WINDOW):
                window(one.store, stream)
        for number in range(rounds + 1):
            progress(f"{name}: round {number} of {rounds}")
            order = list(range(len(sizes)))[:: 1 if number % 2 else -1]
            for at in order:
                began = time.perf_counter()
                for _ in range(pairs):
                    pair(filled[at].store)
                between = time.perf_counter()
                for _ in range(0, pairs, WINDOW):
                    window(filled[at].store, streams[at])
                ended = time.perf_counter()
                if number:  # the first round warms caches and connections
                    figures[at].append((between - began) / pairs * 1e6)
                    windowed[at].append((ended - between) / (math.ceil(pairs / WINDOW) * WINDOW) * 1e6)
        progress("")
        for stream in streams:
            stream.close()
        return [
            Measured(size, figure, inside, each, one.version)
            for size, figure, inside, each, one in zip(sizes, figures, windowed, bytes_each, filled, strict=True)
        ]


def table(results: dict[str, list[Measured]]) -> str:
    lines = [
        "| store | records | claim + complete, us: median (min to max) | pairs/s | rate, fewest = 1 "
        "| in a window, us: median (min to max) | pairs/s | rate, fewest = 1 | bytes a record |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, measured in results.items():
        for one in measured:
            cells = []
            for figures, cost in (
                (one.microseconds, one.cost(measured[0])),
                (one.windowed, one.window_cost(measured[0])),
            ):
                middle = statistics.median(figures)
                cells.append(f"{middle:,.0f} ({min(figures):,.0f} to {max(figures):,.0f})")
                cells += [f"{1e6 / middle:,.0f}", f"{1 / cost:.2f}"]
            lines.append(f"| {name} | {one.size:,} | {' | '.join(cells)} | {one.bytes_each:,.0f} |")
    return "\n".join(lines)


def report(results: dict[str, list[Measured]], options: argparse.Namespace) -> str:
    import sqlalchemy

    rounds, pairs = options.rounds, options.pairs
    more = f" --before {options.before}" if options.before else ""
    more += " --quick-fill" if options.quick_fill else ""

    versions = sorted({one.version for measured in results.values() for one in measured})
    return f"""# Growth of the stores

`python tests/benchmarks/bench_store_growth.py --stores {",".join(results)} --sizes \
{",".join(str(one.size) for one in next(iter(results.values())))} --rounds {rounds}{more}`

{table(results)}

One client; {rounds} rounds of {pairs} pairs and as many in windows for each size, the sizes taking turns; fresh random
keys; the old records are completed ones, with fingerprint and without result. The rate is the median of the rounds'
ratios, each round's neighbours compared.

`sqlite` commits durably (synchronous=FULL), `sqlite-normal` does not wait for the disk; Redis runs without
persistence. Servers and client share the machine: {os.cpu_count()} cores, {platform.system()}, Python
{platform.python_version()}, SQLAlchemy {sqlalchemy.__version__}, {", ".join(versions)}.
{datetime.now(timezone.utc):%Y-%m-%d}. Load average {os.getloadavg()[1]:.1f}: where it is above the number of cores,
other work ran at the same time, and only the ratios are of use.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", default="sqlite,redis", help=f"of: {', '.join(STORES)}")
    parser.add_argument("--sizes", default="10000,1000000")
    parser.add_argument("--rounds", type=int, default=45)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--before", type=int, default=0, help="ids that each store gets before it is measured")
    parser.add_argument("--quick-fill", action="store_true", help="PostgreSQL: in one statement, bytes not as in use")
    parser.add_argument("--bound", type=float, default=1.25)
    parser.add_argument("--report", type=Path, default=REPORT)
    global quick_fill
    options = parser.parse_args()
    quick_fill = options.quick_fill
    sizes = sorted(int(size) for size in options.sizes.split(","))
    results = {
        name: measure(name, sizes, rounds=options.rounds, pairs=options.pairs, before=options.before)
        for name in options.stores.split(",")
    }
    print(table(results))
    options.report.parent.mkdir(exist_ok=True)
    options.report.write_text(report(results, options), "utf-8")
    slow = [
        name
        for name, (fewest, *_, most) in results.items()
        if max(most.cost(fewest), most.window_cost(fewest)) > options.bound
    ]
    if slow:
        print(f"more than {options.bound} times the cost: {', '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
