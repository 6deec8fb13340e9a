"""The store on PostgreSQL: a window beside one transaction per operation, in the same run.

    python tests/benchmarks/bench_pg_window.py [--rounds 15] [--messages 300]

one by one           each message claimed and completed, each in one transaction of its own: the base
window, waited for   100 claimed together, each completion waited for (`stream_connections=0`)
window               100 claimed together, completions sent at once and not waited for, as is the default
gathered             100 claimed and completed together by a thread: nothing of it survives a kill, no consumer uses it

Each at the store alone, and the first three also with all of the guard around a function that does nothing (identity,
fingerprint, lease, context, events; no broker). Rounds in rotated order, ratios to the same round's one by one; beside
each rate this process's own CPU time a message. Writes `reports/pg_window.md`; ends with 1 if the window at the store
is below `--bound` times one by one.
"""

from __future__ import annotations

import argparse
import functools
import os
import secrets
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import sqlalchemy as sa
from facts import LoadWatch, facts, spread

import servers
from idempotent_bus.executor import Executor
from idempotent_bus.identity import extract_biz_id, fingerprint, record_key
from idempotent_bus.model import Claimed, ClaimRequest, Completion, Hold
from idempotent_bus.policy import Policy
from idempotent_bus.stores import open_store
from idempotent_bus.stores.sql import STREAM_CONNECTIONS
from idempotent_bus.work import Ended, Work

REPORT = Path(__file__).parent / "reports" / "pg_window.md"
WINDOW = 100
#: Completions under way at most, and seconds until answers are looked for, as in a consumer's window.
UNDER_WAY, LOOK = 50, 0.001
DAY = 86400.0
BASE, GUARDED_BASE = "one by one", "guarded, one by one"
NOW = "window"


def ask() -> ClaimRequest:
    return ClaimRequest(os.urandom(16), os.urandom(16), 60.0, DAY, os.urandom(8))


def windows(store: Any, count: int) -> Iterator[list[Hold]]:
    """So many claims, a hundred in one round trip and one commit."""
    for start in range(0, count, WINDOW):
        requests = [ask() for _ in range(min(WINDOW, count - start))]
        outcomes = store.claim_many(requests)
        assert all(isinstance(outcome, Claimed) for outcome in outcomes)
        yield [Hold(request.key, outcome.token, request.nonce) for request, outcome in zip(requests, outcomes)]  # noqa: B905


def one_by_one(store: Any, count: int) -> None:
    for _ in range(count):
        request = ask()
        outcome = store.claim(request)
        assert store.complete(Hold(request.key, outcome.token, request.nonce), result=None, retention=DAY)


def waited_for(store: Any, count: int) -> None:
    for holds in windows(store, count):
        for hold in holds:
            assert store.complete(hold, result=None, retention=DAY)


def streamed(stream: Any, store: Any, count: int) -> None:
    told = []
    for holds in windows(store, count):
        looked_at = time.monotonic()
        for hold in holds:  # as the executor does it, see `finishing.py`
            if stream.pending >= UNDER_WAY:
                told += stream.settle()
            elif time.monotonic() - looked_at >= LOOK:
                told += stream.poll()
                looked_at = time.monotonic()
            stream.begin(Completion(hold, None, DAY))
        told += stream.settle()
    assert len(told) == count
    assert all(one.durable for one in told)


def gathered(store: Any, count: int) -> None:
    for holds in windows(store, count):
        assert all(store.complete_many([Completion(hold, None, DAY) for hold in holds]))


class _NoBroker:
    """Nobody to answer."""

    def ack(self) -> None:
        pass

    def wait(self, delay: float) -> None:
        raise AssertionError("nothing waits here")

    def dead_letter(self, reason: Any, error: str, attempts: int) -> bool:
        raise AssertionError("nothing dies here")


def works(count: int) -> list[Work]:
    """Messages as a consumer makes them of 200 bytes of JSON."""
    made = []
    for _ in range(count):
        body = {"payment_id": uuid.uuid4().hex, "text": "x" * 134}
        biz_id = extract_biz_id("payment_id", body)
        key = record_key("cards.issue", biz_id)
        made.append(Work("cards.issue", biz_id, key, functools.partial(issue, body), _NoBroker(), fingerprint(body)))
    return made


def issue(body: Any) -> None:
    """The handler."""


def guarded_one_by_one(executor: Executor, count: int) -> None:
    for work in works(count):
        assert executor.handle(work).how is Ended.COMPLETED


def guarded_window(executor: Executor, count: int) -> None:
    for start in range(0, count, WINDOW):
        endings = executor.handle_window(works(min(WINDOW, count - start)))
        assert all(ending.how is Ended.COMPLETED for ending in endings)


def main() -> int:
    """Measure, print, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--messages", type=int, default=300)
    parser.add_argument("--connections", type=int, default=STREAM_CONNECTIONS)
    parser.add_argument("--bound", type=float, default=10.0)
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args()
    url, prefix = servers.postgresql(), f"b{secrets.token_hex(6)}_"
    store: Any = open_store(url, table_prefix=prefix, stream_connections=options.connections)
    waiting: Any = open_store(url, table_prefix=prefix, stream_connections=0)
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    policy = Policy(retention=DAY)
    guarded, guarded_waiting = Executor(lambda: store, policy), Executor(lambda: waiting, policy)
    ways: dict[str, Callable[[int], None]] = {
        BASE: functools.partial(one_by_one, store),
        "window, waited for": functools.partial(waited_for, store),
        NOW: functools.partial(streamed, store.stream(), store),
        "gathered": functools.partial(gathered, store),
        GUARDED_BASE: functools.partial(guarded_one_by_one, guarded),
        "guarded, window, waited for": functools.partial(guarded_window, guarded_waiting),
        "guarded, window": functools.partial(guarded_window, guarded),
    }
    base_of = {name: GUARDED_BASE if name.startswith("guarded") else BASE for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    commits: list[float] = []
    load = LoadWatch()
    names = list(ways)
    try:
        with engine.connect() as connection:
            setting, version = (
                connection.exec_driver_sql(f"SHOW {what}").scalar_one()
                for what in ("synchronous_commit", "server_version")
            )
            for number in range(options.rounds + 1):
                began = time.perf_counter()
                for _ in range(20):
                    connection.exec_driver_sql("SELECT pg_current_xact_id()")  # makes a commit that is waited for
                if number:
                    commits.append((time.perf_counter() - began) / 20 * 1e6)
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    count = options.messages if number else WINDOW
                    began, before = time.perf_counter(), time.process_time()
                    ways[name](count)
                    took, used = time.perf_counter() - began, time.process_time() - before
                    if number:  # the first round warms connections and statements
                        rates[name].append(count / took)
                        cpu[name].append(used / count * 1e6)
                load.look()
                print(f"round {number} of {options.rounds}", file=sys.stderr)
    finally:
        store.close()
        waiting.close()
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP TABLE IF EXISTS {prefix}records")
            connection.exec_driver_sql(f"DROP SEQUENCE IF EXISTS {prefix}tokens")
        engine.dispose()
    ratios = {
        name: [mine / base for mine, base in zip(rates[name], rates[base_of[name]], strict=True)] for name in names
    }
    lines = ["| way | messages/s | to one by one | client's CPU, us a message |", "|---|---:|---:|---:|"]
    lines += [
        f"| {name} | {spread(rates[name], ',.0f')} | {spread(ratios[name], '.1f')} | {spread(cpu[name], '.0f')} |"
        for name in names
    ]
    judged = statistics.median(ratios[NOW])
    text = f"""# A window on PostgreSQL

`python tests/benchmarks/bench_pg_window.py --rounds {options.rounds} --messages {options.messages} \
--connections {options.connections}`

{chr(10).join(lines)}

One client, {options.connections} connections for completions; medians of {options.rounds} rounds of {options.messages}
messages of each way in rotated order, least and most; ratios round by round, the guarded ones to guarded one by one.
`synchronous_commit` is `{setting}`, as the server has it, for every transaction. A statement that does nothing but
commit took {spread(commits, ",.0f")} us: the dearer a commit, the larger the ratio. `gathered` is what could be had if
a kill might lose the whole window; no consumer uses it.

Issue 8 asks for at least {options.bound:g} times one by one with the window, at the store: **{judged:.1f}**, \
{"held" if judged >= options.bound else "not held"}.

{facts(load, ("psycopg", "sqlalchemy"), (f"PostgreSQL {str(version).split(' ')[0]}",))}
"""
    print(text)
    options.report.write_text(text, "utf-8")
    return 0 if judged >= options.bound else 1


if __name__ == "__main__":
    sys.exit(main())
