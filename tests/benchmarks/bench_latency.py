"""How long a message takes from its publish to its handler: a guarded consumer beside kombu's plain one, on RabbitMQ.

    python tests/benchmarks/bench_latency.py [--messages 20000] [--rounds 5] [--store redis]

Each round first measures what each side can do at most (a full queue, drained); then a process of its own publishes
`--messages` messages at half of that rate, evenly, to a consumer that waits for them, and each handler notes how old
its message is. Both sides get the same 200-byte messages from the same publisher, prefetch 100, manual acks. The order
rotates, and a ratio is to the same round's plain kombu. Writes `reports/latency.md`; ends with 1 if the median of the
ratios of the 99th percentiles is above `--bound`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import amqp
import charts
from bench_consumer import PREFETCH, Bench
from facts import LoadWatch, facts, spread
from kombu import Connection, Consumer, Queue

from idempotent_bus import IdempotentConsumer, idempotent_consumer

REPORT = Path(__file__).parent / "reports" / "latency.md"
FULL = 10_000


def body(at: float) -> str:
    text = json.dumps({"payment_id": uuid.uuid4().hex + "-pay", "at": at, "text": ""})
    return text[:-2] + "x" * (200 - len(text)) + text[-2:]


def publish(url: str, queue: str, rate: float, count: int) -> None:
    """Send `count` messages, `rate` a second, each with the moment at which it was sent. A process of its own."""
    with Connection(url) as connection:
        channel = connection.default_channel
        time.sleep(0.5)  # the consumer is there by then
        began = time.monotonic()
        for number in range(count):
            due = began + number / rate
            while (now := time.monotonic()) < due:
                time.sleep(min(0.001, due - now))
            message = amqp.Message(body(now), content_type="application/json", content_encoding="utf-8")
            channel.basic_publish(message, exchange="", routing_key=queue)
        print(count / (time.monotonic() - began))


class Side:
    """One way to consume. ages: how old each message was, in seconds."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.ages: list[float] = []

    def note(self, body: Any, message: Any) -> None:
        """The handler."""
        at = body.get("at")
        if at is not None:
            self.ages.append(time.monotonic() - at)

    def consume(self, queue: str, count: int) -> None:
        raise NotImplementedError


class Plain(Side):
    """kombu's Consumer, with a callback that acks."""

    name = "plain kombu"

    def consume(self, queue: str, count: int) -> None:
        left = count

        def handle(body: Any, message: Any) -> None:
            nonlocal left
            self.note(body, message)
            message.ack()
            left -= 1

        with Connection(self.bench.plain_url) as connection:
            consumer = Consumer(connection, [Queue(queue, durable=True)], callbacks=[handle], prefetch_count=PREFETCH)
            with consumer:
                while left:
                    connection.drain_events(timeout=20)


class Guarded(Side):
    """The guarded handler in IdempotentConsumer, as its defaults are."""

    name = "guarded"

    def consume(self, queue: str, count: int) -> None:
        seen = 0

        def handle(body: Any, message: Any) -> None:
            nonlocal seen
            self.note(body, message)
            seen += 1
            if seen == count:
                consumer.stop()

        handler = idempotent_consumer(self.bench.store, scope=self.bench.scope, biz_id="payment_id")(handle)
        consumer = IdempotentConsumer(self.bench.url, {Queue(queue, durable=True): handler}, prefetch=PREFETCH)
        consumer.run(idle_timeout=20)
        assert seen == count


def timed(side: Side, queue: str, count: int) -> tuple[float, float]:
    """Seconds, and this process's CPU seconds."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    side.consume(queue, count)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def on_a_queue(bench: Bench, act: Callable[[str], Any]) -> Any:
    queue = f"bench.{uuid.uuid4().hex[:12]}"
    with Connection(bench.plain_url) as connection:
        Queue(queue, durable=True)(connection.default_channel).declare()
        try:
            return act(queue)
        finally:
            connection.default_channel.queue_delete(queue)


def full_load(side: Side) -> float:
    """Messages a second from a full queue."""

    def act(queue: str) -> float:
        side.bench.fill(queue, FULL)
        return FULL / timed(side, queue, FULL)[0]

    return float(on_a_queue(side.bench, act))


def half_load(side: Side, rate: float, count: int) -> tuple[list[float], float, float]:
    """The ages in order, the rate at which the publisher really sent, CPU us a message."""

    def act(queue: str) -> tuple[list[float], float, float]:
        side.ages = []
        command = [sys.executable, __file__, "--publish", json.dumps([side.bench.plain_url, queue, rate, count])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as publisher:
            _, cpu = timed(side, queue, count)
            sent, _ = publisher.communicate(timeout=60)
        assert len(side.ages) == count
        return sorted(side.ages), float(sent), cpu / count * 1e6

    found: tuple[list[float], float, float] = on_a_queue(side.bench, act)
    return found


def percentile(ages: list[float], share: float) -> float:
    """In milliseconds."""
    return ages[min(len(ages) - 1, int(len(ages) * share))] * 1000


def main() -> int:
    """Measure, print, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("redis", "postgresql"), default="redis")
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bound", type=float, default=1.5)
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--publish", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.publish:
        publish(*json.loads(options.publish))
        return 0
    bench = Bench("rabbitmq", options.store)
    sides: list[Side] = [Plain(bench), Guarded(bench)]
    load = LoadWatch()
    names = ("full", "sent", "p50", "p99", "most", "cpu")
    figures: dict[Side, dict[str, list[float]]] = {side: {name: [] for name in names} for side in sides}
    for number in range(options.rounds):
        for side in sides[number % 2 :] + sides[: number % 2]:
            full = full_load(side)
            ages, sent, cpu = half_load(side, full / 2, options.messages)
            values = (full, sent, percentile(ages, 0.5), percentile(ages, 0.99), ages[-1] * 1000, cpu)
            for name, value in zip(names, values, strict=True):
                figures[side][name].append(value)
        load.look()
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    for key in bench.redis.scan_iter("*-pay", count=1000):
        bench.redis.delete(key)
    plain, guarded = (figures[side] for side in sides)
    ratios = {name: [ours / theirs for ours, theirs in zip(guarded[name], plain[name], strict=True)] for name in names}
    lines = ["| | " + " | ".join(side.name for side in sides) + " | ratio |", "|---|---:|---:|---:|"]
    for name, words, form in (
        ("full", "full load, messages/s", ",.0f"),
        ("sent", "sent at, messages/s", ",.0f"),
        ("p50", "publish to handler, ms: half of them within", ".2f"),
        ("p99", "**99 of 100 within**", ".2f"),
        ("most", "all within", ".1f"),
        ("cpu", "the consumer's CPU at half load, us a message", ".0f"),
    ):
        cells = [spread(figures[side][name], form) for side in sides]
        lines.append(f"| {words} | {' | '.join(cells)} | {spread(ratios[name], '.2f')} |")
    with Connection(bench.plain_url) as connection:
        connection.connect()
        rabbitmq = f"RabbitMQ {connection.connection.server_properties['version']}"
    judged = statistics.median(ratios["p99"])
    text = f"""# From publish to handler

`python tests/benchmarks/bench_latency.py --messages {options.messages} --rounds {options.rounds} --store \
{options.store}`

![ratios, with their spread](latency.svg)

{chr(10).join(lines)}

{options.messages:,} messages of 200 bytes a round and side, published by another process at half of the rate that the
same side drained a full queue with just before; no-op handler, prefetch {PREFETCH}, one consumer; medians of
{options.rounds} rounds in rotated order, least and most; ratios round by round. Issue 8 asks for at most
{options.bound:g} at the 99th percentile: **{judged:.2f}**, {"held" if judged <= options.bound else "not held"}.

{facts(load, ("kombu", "amqp", "redis"), (rabbitmq, f"store {options.store}"))}
"""
    print(text)
    options.report.write_text(text, "utf-8")
    if options.report == REPORT:
        charts.write("latency")
    return 0 if judged <= options.bound else 1


if __name__ == "__main__":
    sys.exit(main())
