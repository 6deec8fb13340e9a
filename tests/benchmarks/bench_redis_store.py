"""The Redis store: its speed beside a naive guard, Powertools and idemkit, and its memory per id. A command, no test:

    python tests/benchmarks/bench_redis_store.py [--rounds 7] [--calls 400] [--plan 100000] [--turns 64]

Starts a redis-server of its own. Speed: a no-op function, guarded in each way, called with fresh payments and again
with one that was done; each round measures all ways in rotated order, and a ratio is to the same round's SET NX + SET.
Client and server are each tied to a core: first to two, as if they were two machines, then to one. Left alone the
scheduler decides that, and a round trip takes 55 us or 19, so that ways which wait equally long seem to differ.
Memory: all that the server uses beyond what it used when empty (`used_memory`, so with what the allocator adds; a
client's buffers taken off), per remembered id, at a tenth of, once and ten times the plan, through the public verbs;
and over two and a half turns of a retention of `--turns` seconds (0: left out). Writes `reports/redis_store.md`; ends
with 1 if a bound of issue 8 is not held. Powertools (aws-lambda-powertools with boto3) and idemkit are measured where
they are installed; a line says so where they are not.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import redis

sys.path.insert(0, str(Path(__file__).parent))

import charts

from idempotent_bus.executor import Executor
from idempotent_bus.identity import extract_biz_id, fingerprint, record_key
from idempotent_bus.model import Claimed, ClaimRequest, Completed, Completion, Hold
from idempotent_bus.policy import Policy
from idempotent_bus.stores.redis import open_redis
from idempotent_bus.work import Ended, Work

REPORT = Path(__file__).parent / "reports" / "redis_store.md"
HOUR = 3600.0
BASE = "SET NX + SET"

Payment = dict[str, Any]
#: A way to guard: called with a payment; True if the function ran.
Way = Callable[[Payment], bool]


def payment() -> Payment:
    return {"payment_id": uuid.uuid4().hex, "text": "x" * 134}  # 200 bytes of JSON


@contextlib.contextmanager
def server(cores: str) -> Iterator[str]:
    """A redis-server of its own. cores: "apart", this process and the server each on one of their own; "together"."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [shutil.which("redis-server") or "redis-server", "--port", str(port), "--save", "", "--appendonly", "no"]
    process = subprocess.Popen([*command, "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL)
    everywhere = os.sched_getaffinity(0)
    mine, another = min(everywhere), max(everywhere)
    os.sched_setaffinity(0, {mine})
    os.sched_setaffinity(process.pid, {another if cores == "apart" else mine})
    try:
        deadline = time.monotonic() + 10
        with redis.Redis(port=port) as client:
            while True:
                with contextlib.suppress(redis.ConnectionError):
                    client.ping()
                    break
                assert time.monotonic() < deadline, "redis-server did not start"
                time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        os.sched_setaffinity(0, everywhere)
        process.terminate()
        process.wait(10)


# --- the ways -----------------------------------------------------------------------------------------------------


def naive(url: str) -> Way:
    """What people write: no lease is renewed, no body compared, no owner known, a crash in between loses it."""
    client = redis.Redis.from_url(url)

    def guarded(body: Payment) -> bool:
        key = f"naive:{body['payment_id']}"
        if not client.set(key, "in progress", nx=True, px=60_000):
            return False
        client.set(key, "completed", px=int(HOUR * 1000))
        return True

    return guarded


def pings(url: str) -> Way:
    """No guard: two bare round trips for a fresh id, one for a duplicate, which is the least that a guard waits for."""
    client = redis.Redis.from_url(url)
    sock = client.connection_pool.get_connection()._sock
    seen: set[str] = set()

    def guarded(body: Payment) -> bool:
        fresh = body["payment_id"] not in seen
        seen.add(body["payment_id"])
        for _ in range(2 if fresh else 1):
            sock.sendall(b"*1\r\n$4\r\nPING\r\n")
            sock.recv(100)
        return fresh

    guarded.client = client  # type: ignore[attr-defined]  # it would close its connections when it goes
    return guarded


def store_alone(url: str) -> Way:
    """Claim and complete, the key and the fingerprint of a payment included."""
    store: Any = open_redis(url, prefix="alone:")

    def guarded(body: Payment) -> bool:
        key = record_key("cards.issue", body["payment_id"])
        request = ClaimRequest(key, os.urandom(16), 60.0, HOUR, fingerprint(body))
        outcome = store.claim(request)
        if isinstance(outcome, Completed):
            return False
        assert isinstance(outcome, Claimed)
        assert store.complete(Hold(key, outcome.token, request.nonce), result=None, retention=HOUR)
        return True

    return guarded


class _NoBroker:
    """Nobody to answer: a plain function has no message."""

    def ack(self) -> None:
        pass

    def wait(self, delay: float) -> None:
        raise AssertionError("nothing waits here")

    def dead_letter(self, reason: Any, error: str, attempts: int) -> bool:
        raise AssertionError("nothing dies here")


def guarded_function(url: str) -> Way:
    """All of the guard around a plain function: identity, fingerprint, claim, lease, context, completion."""
    store = open_redis(url, prefix="guarded:")
    executor = Executor(lambda: store, Policy(retention=HOUR))
    settle = _NoBroker()

    def guarded(body: Payment) -> bool:
        biz_id = extract_biz_id("payment_id", body)
        key = record_key("cards.issue", biz_id)
        work = Work("cards.issue", biz_id, key, functools.partial(issue_card, body), settle, fingerprint(body))
        return executor.handle(work).how is Ended.COMPLETED

    return guarded


def issue_card(body: Payment) -> None:
    """The function: nothing, so that only the guard is measured."""


class _Context:
    """What Lambda would tell: without it Powertools warns at every call."""

    def get_remaining_time_in_millis(self) -> int:
        return 60_000


def powertools(url: str) -> Way:
    """Bodies are not compared: with its payload validation an identical replay raises (checked with 3.37.0)."""
    os.environ.setdefault("AWS_DEFAULT_REGION", "eu-west-1")
    from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig, idempotent_function
    from aws_lambda_powertools.utilities.idempotency.persistence.redis import CachePersistenceLayer

    ran: list[bool] = []

    config = IdempotencyConfig(event_key_jmespath="payment_id", expires_after_seconds=int(HOUR))
    config.register_lambda_context(_Context())
    layer = CachePersistenceLayer(client=redis.Redis.from_url(url, decode_responses=True))

    @idempotent_function(data_keyword_argument="body", persistence_store=layer, config=config)
    def guarded(body: Payment) -> None:
        ran.append(True)

    def call(body: Payment) -> bool:
        ran.clear()
        guarded(body=body)
        return bool(ran)

    return call


def idemkit(url: str) -> Way:
    import idemkit as kit
    import redis.asyncio

    ran: list[bool] = []

    @kit.idempotent_sync(
        backend=kit.RedisBackend(redis.asyncio.Redis.from_url(url)),
        config=kit.MethodConfig(key_fields=["payment_id"], expires_after_seconds=HOUR),
    )
    def guarded(payment_id: str, text: str) -> None:
        ran.append(True)

    def call(body: Payment) -> bool:
        ran.clear()
        guarded(payment_id=body["payment_id"], text=body["text"])
        return bool(ran)

    return call


WAYS: dict[str, Callable[[str], Way]] = {
    BASE: naive,
    "no guard, as many bare PINGs": pings,
    "this store, claim + complete": store_alone,
    "this guard around a plain function": guarded_function,
    "Powertools, body not compared": powertools,
    "idemkit, synchronous": idemkit,
}


def speed(url: str, rounds: int, calls: int) -> tuple[dict[tuple[str, str], list[float]], list[str]]:
    """Calls a second, one figure a round, by way and kind (fresh, duplicate); and who is not here."""
    ways: dict[str, Way] = {}
    missing: list[str] = []
    for name, make in WAYS.items():
        try:
            ways[name] = make(url)
        except ImportError as error:
            missing.append(f"{name}: not measured, {error.name} is not installed here")
    figures: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in ways for kind in ("fresh", "duplicate")}
    done = payment()
    for way in ways.values():  # connections, scripts, caches
        assert way(done)
        for _ in range(50):
            assert way(payment())
            assert not way(done)
    names = list(ways)
    for number in range(rounds):
        progress(f"speed: round {number + 1} of {rounds}")
        for name in names[number % len(names) :] + names[: number % len(names)]:
            way = ways[name]
            fresh = [payment() for _ in range(calls)]
            began = time.perf_counter()
            for body in fresh:
                way(body)
            between = time.perf_counter()
            for _ in range(calls):
                way(done)
            ended = time.perf_counter()
            figures[name, "fresh"].append(calls / (between - began))
            figures[name, "duplicate"].append(calls / (ended - between))
    return figures, missing


# --- memory -----------------------------------------------------------------------------------------------------


def used(client: redis.Redis) -> int:
    facts: Any = client.info("memory")
    return int(facts["used_memory"]) - int(facts["mem_clients_normal"])


def remember(store: Any, stream: Any, count: int, retention: float) -> None:
    """So many ids, completed without a result, with fingerprints, through the public verbs."""
    requests = [ClaimRequest(os.urandom(16), os.urandom(16), 60.0, retention, os.urandom(8)) for _ in range(count)]
    for request, outcome in zip(requests, store.claim_many(requests), strict=True):
        assert isinstance(outcome, Claimed)
        hold = Hold(request.key, outcome.token, request.nonce)
        stream.begin(Completion(hold, None, retention))
    assert all(settled.durable for settled in stream.settle())


def memory(url: str, sizes: list[int]) -> dict[int, float]:
    """Bytes an id at each size, on an empty server each time."""
    each = {}
    with redis.Redis.from_url(url) as client:
        for size in sizes:
            client.flushall()
            store: Any = open_redis(url)
            stream = store.stream()
            remember(store, stream, 1, HOUR)
            client.flushall()
            empty = used(client)
            for at in range(0, size, 500):
                if at % 10_000 == 0:
                    progress(f"memory: {at:,} of {size:,}")
                remember(store, stream, min(500, size - at), HOUR)
            stream.close()
            store.close()
            each[size] = (used(client) - empty) / size
    return each


def turns(url: str, size: int, retention: float) -> list[tuple[float, int, float]]:
    """A steady stream of `size` ids per retention: after each half turn, the turns, the ids remembered, bytes each."""
    rows = []
    with redis.Redis.from_url(url) as client:
        client.flushall()
        store: Any = open_redis(url)
        stream = store.stream()
        empty = used(client)
        began = time.monotonic()
        came: list[tuple[float, int]] = []
        told = 0
        batch = 100
        while told < 5:
            now = time.monotonic() - began
            due = int(now / retention * size) - sum(count for _, count in came)
            if due >= batch:
                remember(store, stream, batch, retention)
                came.append((time.monotonic() - began, batch))
            else:
                time.sleep(0.01)
            if now >= (told + 1) * retention / 2:
                told += 1
                progress(f"turns: {told / 2} of 2.5")
                live = sum(count for at, count in came if at > now - retention)
                rows.append((told / 2, live, (used(client) - empty) / live))
        stream.close()
        store.close()
    return rows


# --- telling -----------------------------------------------------------------------------------------------------


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def ratios(figures: dict[tuple[str, str], list[float]], name: str, to: str, kind: str) -> list[float]:
    return [mine / theirs for mine, theirs in zip(figures[name, kind], figures[to, kind], strict=True)]


def speed_table(figures: dict[tuple[str, str], list[float]]) -> str:
    lines = [
        f"| guard | fresh ids/s | to {BASE} | duplicates/s | to {BASE} |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(name for name, _ in figures):
        cells = []
        for kind in ("fresh", "duplicate"):
            cells += [spread(figures[name, kind], ",.0f"), spread(ratios(figures, name, BASE, kind), ".2f")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(
    figures: dict[tuple[str, str], list[float]], each: dict[int, float], rows: list[tuple[float, int, float]]
) -> list[tuple[str, float, float, bool]]:
    """What issue 8 asks for: the words, what was measured, the bound, and whether it is held."""
    ours = "this guard around a plain function"
    theirs = "Powertools, body not compared"
    found = [(f"{ours} to {BASE}, fresh", statistics.median(ratios(figures, ours, BASE, "fresh")), 1.0, True)]
    if (theirs, "fresh") in figures:
        found += [
            ("to Powertools, fresh", statistics.median(ratios(figures, ours, theirs, "fresh")), 2.0, True),
            ("to Powertools, duplicates", statistics.median(ratios(figures, ours, theirs, "duplicate")), 4.0, True),
        ]
    found += [(f"bytes an id at {size:,}", value, 48.0, False) for size, value in each.items()]
    found += [
        (f"bytes an id after {turn} turns", value, 48.0, False) for turn, _, value in rows if turn in (1.0, 2.0, 2.5)
    ]
    return [(text, value, bound, value >= bound if least else value <= bound) for text, value, bound, least in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--plan", type=int, default=100_000)
    parser.add_argument("--turns", type=float, default=64.0)
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args()
    if 0 < options.turns < 60:
        parser.error("--turns: a retention below 60 s has no short form, which is what is measured; 0: left out")
    with server("together") as url:
        together, _ = speed(url, options.rounds, options.calls)
    with server("apart") as url:
        figures, missing = speed(url, options.rounds, options.calls)
        sizes = [options.plan // 10, options.plan, options.plan * 10]
        each = memory(url, sizes)
        rows = turns(url, options.plan, options.turns) if options.turns else []
        with redis.Redis.from_url(url) as client:
            facts: Any = client.info("server")
    progress("")
    judged = verdicts(figures, each, rows)
    bytes_table = "\n".join(
        ["| ids | bytes an id |", "|---:|---:|", *(f"| {size:,} | {value:.1f} |" for size, value in each.items())]
    )
    turn_table = "\n".join(
        ["| turns | ids remembered | bytes an id |", "|---:|---:|---:|"]
        + [f"| {turn} | {live:,} | {value:.1f} |" for turn, live, value in rows]
    )
    told = "\n".join(
        f"| {text} | {value:.2f} | {bound:g} | {'yes' if held else '**no**'} |" for text, value, bound, held in judged
    )
    text = f"""# The Redis store: speed and memory

`python tests/benchmarks/bench_redis_store.py --rounds {options.rounds} --calls {options.calls} --plan {options.plan} \
--turns {options.turns:g}`

![ratios, with their spread](redis_store.svg)

{speed_table(figures)}

A no-op function, one client, one connection each, 200-byte JSON; medians of {options.rounds} rounds of \
{options.calls} calls in rotated order, least and most;
ratios to the same round's {BASE}. Client and server each have a core. {" ".join(missing)}

Both on one core, where nobody is woken on another:

{speed_table(together)}

{bytes_table}

Completed without a result, fingerprint kept; all memory of the server beyond its empty one, a client's buffers taken
off. A key of its own costs 136 bytes and its entry among the expiries.

{turn_table}

A steady stream of {options.plan:,} ids per retention of {options.turns:g} s: after so many turns, per id whose
retention is not over.

| issue 8 | measured | bound | held |
|---|---:|---:|---|
{told}

{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, redis-py {version("redis")}, Redis \
{facts["redis_version"]} on the same machine, persistence off. {datetime.now(timezone.utc):%Y-%m-%d}.
Load average {os.getloadavg()[1]:.1f}: where it is above the number of cores, other work ran at the same time, and only
the ratios are of use.
"""
    print(text)
    options.report.write_text(text, "utf-8")
    if options.report == REPORT:
        charts.write("redis_store")
    return 0 if all(held for *_, held in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
