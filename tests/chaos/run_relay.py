"""Two relays, killed with SIGKILL at each of read, publish, confirm and mark, while rows are being added.

    python tests/chaos/run_relay.py                      # 200 kills at each step, about 10 minutes, writes a report
    python tests/chaos/run_relay.py --kills 20 --runs postgresql+ours-redis

The short form is tests/chaos/test_relay_kills.py. Of the transactions some are rolled back, and some overlap so that
the rows with the smaller numbers are committed last. What must hold: every committed row lands once on a broker with an
edge and is handled once by a guarded consumer on RabbitMQ; no row of a rolled-back transaction ever lands; nothing is
left in the table. The control, a relay that marks before the confirm, must lose. Exits with 1 if any of it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import sqlalchemy as sa
from kombu import Queue

import servers
from consumer_rig import Broker, make_broker
from idempotent_bus import IdempotentConsumer, Outbox, idempotent_consumer, schema

VICTIM = Path(__file__).with_name("relay_victim.py")
REPORT = Path(__file__).parent / "reports" / "relay.md"
STEPS = ("read", "publish", "confirm", "mark")
RUNS = ("postgresql+ours-redis", "sqlite+ours-sqlite", "mariadb+rabbitmq-classic")
#: The control loses wherever it runs; one place is enough.
CONTROL = "sqlite+ours-sqlite"


@dataclass
class Result:
    """What came of one run. landed: how often each number lies in the queue; handled: by a guarded consumer."""

    committed: set[int]
    rolled_back: set[int]
    landed: Counter[int]
    handled: Counter[int] | None
    left: int
    kills: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def missing(self) -> set[int]:
        return self.committed - set(self.landed)

    @property
    def failure(self) -> str:
        """What does not hold; empty if all does."""
        once = self.landed if self.handled is None else self.handled
        if self.missing:
            return f"{len(self.missing)} committed rows never landed"
        if set(self.landed) & self.rolled_back:
            return "rows of rolled-back transactions landed"
        if twice := [number for number, count in once.items() if count != 1]:
            return f"{len(twice)} rows more than once"
        if set(once) != self.committed:
            return "what was handled is not what was committed"
        return f"{self.left} rows are left in the table" if self.left else ""


def play(run: str, *, kills: int, seed: int = 1, naive: bool = False, folder: Path) -> Result:
    """One run: `kills` kills at each step, half of them before it and half after."""
    database, _, broker_name = run.partition("+")
    unique = f"t{uuid.uuid4().hex[:12]}"
    broker = make_broker(broker_name, unique, folder)
    url = f"sqlite:///{folder}/outbox.db" if database == "sqlite" else getattr(servers, database)()
    engine = sa.create_engine(url)
    prefix = f"{unique}_"
    outbox = Outbox(engine, table_prefix=prefix)
    table = schema.outbox(schema.metadata(prefix, parts=("outbox",)))
    queue = broker.queue()
    log = folder / "kills"
    log.touch()
    draw = random.Random(seed)
    plans = [
        [step, when, draw.randint(1, 6) if step == "publish" else draw.randint(1, 2)]
        for step in STEPS for when in ("before", "after") for _ in range(kills // 2)
    ]  # fmt: skip
    draw.shuffle(plans)
    settings = {
        "mode": "naive" if naive else "relay", "database": url, "prefix": prefix, "broker": broker.url,
        "options": broker.options, "queue": queue.name, "log": str(log),
    }  # fmt: skip
    began = time.monotonic()
    relays = [
        subprocess.Popen([sys.executable, str(VICTIM), json.dumps({**settings, "plans": plans[half::2]})])
        for half in (0, 1)
    ]
    committed: set[int] = set()
    rolled_back: set[int] = set()
    try:
        for numbers, commits in _transactions(engine, outbox, queue.name, draw, overlapping=database != "sqlite"):
            (committed if commits else rolled_back).update(numbers)
            if all(relay.poll() is not None for relay in relays):
                break
            time.sleep(0.03)
        failed = [relay.returncode for relay in relays if relay.returncode]
        last = subprocess.run(
            [sys.executable, str(VICTIM), json.dumps({**settings, "plans": [None]})], timeout=300, check=True
        )
        assert not failed, f"a victim did not die as planned: {failed}"
        assert last.returncode == 0
        with engine.connect() as connection:
            left = connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
        landed, handled = _look(broker, queue, unique, folder)
    finally:
        for relay in relays:
            relay.kill()
            relay.wait()
        broker.clean_up()
        table.drop(engine)
        engine.dispose()
    happened = Counter(" ".join(line.split()[:2]) for line in log.read_text().splitlines())
    return Result(committed, rolled_back, landed, handled, left, happened, time.monotonic() - began)


def _transactions(
    engine: sa.Engine, outbox: Outbox, queue: str, draw: random.Random, *, overlapping: bool
) -> Iterator[tuple[list[int], bool]]:
    """Transactions without end: of several rows, some rolled back, some of two that commit in the reverse order."""
    number = 0

    def add(connection: sa.Connection) -> list[int]:
        nonlocal number
        numbers = list(range(number, number + draw.randint(1, 4)))
        number += len(numbers)
        for one in numbers:
            order_by = one % 5 if draw.random() < 0.3 else None
            outbox.add(connection, {"payment_id": one}, routing_key=queue, order_by=order_by)
        return numbers

    while True:
        first = engine.connect()
        numbers = add(first)
        if overlapping and draw.random() < 0.3:
            with engine.begin() as second:
                others = add(second)
            yield others, True
        commits = draw.random() < 0.9
        (first.commit if commits else first.rollback)()
        first.close()
        yield numbers, commits


def _look(broker: Broker, queue: Queue, unique: str, folder: Path) -> tuple[Counter[int], Counter[int] | None]:
    """What lies in the queue and, where a copy is refused only there, what a guarded consumer does with it."""
    if not broker.is_rabbitmq:
        return Counter(message.payload["payment_id"] for message in broker.take(queue.name, 10**6, 1.0)), None
    handled: Counter[int] = Counter()

    @idempotent_consumer(f"sqlite:///{folder}/store.db?synchronous=NORMAL", scope=unique, biz_id="payment_id")
    def handle(body: Any, message: Any) -> None:
        handled[body["payment_id"]] += 1

    with broker.connect() as connection:
        IdempotentConsumer(connection, {queue: handle}, prefetch=100).run(idle_timeout=3)
    return handled, handled


def main() -> int:
    """Play all runs, show each line as it is done, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="at each of the four steps")
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args()
    lines = [
        "| outbox + broker | relay | kills | committed | rolled back | landed | never landed | seconds | verdict |",
        "|---" * 9 + "|",
    ]
    print(*lines, sep="\n")
    failures = 0
    for run, naive in [*((run, False) for run in options.runs.split(",")), (CONTROL, True)]:
        with tempfile.TemporaryDirectory() as folder:
            result = play(run, kills=options.kills, seed=options.seed, naive=naive, folder=Path(folder))
        if naive:
            failed = not result.missing
            verdict = "FAILED: the control lost nothing" if failed else "loses, as expected"
        else:
            failed = bool(result.failure)
            verdict = f"FAILED: {result.failure}" if failed else "held"
        failures += failed
        cells: list[Any] = [
            run,
            "marks first" if naive else "ours",
            sum(result.kills.values()),
            len(result.committed),
            len(result.rolled_back),
            len(set(result.landed)),
            len(result.missing),
            round(result.seconds),
            verdict,
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        print(lines[-1], flush=True)
    machine = f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    report = [
        "# The relay, long form",
        "",
        f"{time.strftime('%Y-%m-%d')}, {machine}. Made by `python tests/chaos/run_relay.py`.",
        "",
        f"Two relays at once, {options.kills} kills at each of read, publish, confirm and mark, half before the step",
        'and half after it. On brokers with an edge "landed" is counted in the queue, once each; on RabbitMQ by a',
        "guarded consumer, which handled each once.",
        "",
        *lines,
        "",
    ]
    options.report.write_text("\n".join(report))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
