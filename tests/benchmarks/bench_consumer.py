"""A guarded consumer against kombu's plain one, and against other guards, on RabbitMQ and on Redis.

    python tests/benchmarks/bench_consumer.py [--broker redis] [--store postgresql] [--messages 10000] [--report]

With `--report` the table goes into `reports/consumer.md`, and is drawn.

200-byte JSON messages, a handler that does nothing, manual acks, prefetch 100. Each round drains the same number of
messages in each way, in rotated order; the table shows medians, least and most, and the medians of the ratios to that
round's plain kombu. CPU is this process's own, user and system, for each message.

plain      kombu's Consumer, a callback that acks
set nx     the same, with redis-py's SET NX before and an ack after: the guard that most people write
tuned      our consumer's loop and acks, with no guard at all: no id is looked for, nothing is claimed, nobody compares
           bodies. What the guard itself costs is the difference to `window`
two pings  kombu's Consumer, with two PINGs to Redis over a bare socket before the ack: what a guard can reach at most
           that waits for two answers
singly     the guarded handler as a bare kombu callback: it has returned, and acked, before the next one is called
in turn    IdempotentConsumer where messages are not claimed together (`on_abandoned="quarantine"`): each is claimed in
           its turn, with the completion before it, and waits for one answer
window     the guarded handler in IdempotentConsumer, as its defaults are
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import charts
from kombu import Connection, Consumer, Queue
from redis import Redis

import servers
from idempotent_bus import Ended, IdempotentConsumer, IdempotentProducer, idempotent_consumer, open_store
from idempotent_bus.work import Ending, Work

PREFETCH = 100
BODY = {"payment_id": "p-" + "1" * 36, "text": "x" * 132}
assert len(json.dumps(BODY)) == 200


class Unguarded:
    """Stands in for the executor: each message is run and acked, and nobody looks whether it was done before."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def handle(self, work: Work) -> Ending:
        """Run and ack."""
        value = work.run()
        work.settle.ack()
        return Ending(Ended.COMPLETED, value)

    def handle_window(self, works: Any) -> list[Ending]:
        """The same for several."""
        return [self.handle(work) for work in works]


class Bench:
    """One broker and one store."""

    def __init__(self, broker: str, store: str) -> None:
        self.plain_url = servers.rabbitmq() if broker == "rabbitmq" else servers.real_redis()
        self.url = self.plain_url if broker == "rabbitmq" else self.plain_url.replace("redis://", "idempotent-redis://")
        self.redis = Redis.from_url(servers.real_redis())
        self.store = open_store(servers.postgresql() if store == "postgresql" else servers.real_redis())
        self.scope = f"bench.{uuid.uuid4().hex}"
        self.ways: dict[str, Callable[[str, int], None]] = {
            "plain": self.plain,
            "set nx": self.set_nx,
            "two pings": self.two_pings,
            "tuned": self.tuned,
            "singly": self.singly,
            "in turn": self.in_turn,
            "window": self.window,
        }

    def fill(self, queue: str, count: int) -> None:
        """Publish so many messages, each with an id of its own."""
        bodies = [{**BODY, "payment_id": uuid.uuid4().hex + "-pay"} for _ in range(count)]
        with IdempotentProducer(self.url, declare=[Queue(queue, durable=True)]) as producer:
            producer.publish_many(bodies, routing_key=queue)

    def plain(self, queue: str, count: int, guard: Callable[[Any], bool] | None = None) -> None:
        """kombu's Consumer."""
        left = count

        def handle(body: Any, message: Any) -> None:
            nonlocal left
            if guard is None or guard(body):
                noop(body, message)
            message.ack()
            left -= 1

        with Connection(self.plain_url) as connection:
            consumer = Consumer(connection, [Queue(queue, durable=True)], callbacks=[handle], prefetch_count=PREFETCH)
            with consumer:
                while left:
                    connection.drain_events(timeout=10)

    def set_nx(self, queue: str, count: int) -> None:
        """A mark first, then the handler: what loses a message if the worker dies in between."""
        self.plain(queue, count, lambda body: bool(self.redis.set(body["payment_id"], 1, nx=True, ex=600)))

    def two_pings(self, queue: str, count: int) -> None:
        """Two round trips, and nothing else."""
        connection = self.redis.connection_pool.get_connection()
        sock = connection._sock

        def ping(body: Any) -> bool:
            for _ in range(2):
                sock.sendall(b"*1\r\n$4\r\nPING\r\n")
                sock.recv(100)
            return True

        self.plain(queue, count, ping)
        self.redis.connection_pool.release(connection)

    def handler(self, **more: Any) -> Any:
        """The guarded handler that does nothing."""
        return idempotent_consumer(self.store, scope=self.scope, biz_id="payment_id", **more)(noop)

    def in_turn(self, queue: str, count: int) -> None:
        """IdempotentConsumer, claiming one by one."""
        self.window(queue, count, self.handler(on_abandoned="quarantine"))

    def singly(self, queue: str, count: int) -> None:
        """The guarded handler as a bare callback."""
        handler, left = self.handler(), count

        def handle(body: Any, message: Any) -> None:
            nonlocal left
            assert handler.handle(body, message).how is Ended.COMPLETED
            left -= 1

        with Connection(self.url) as connection:
            consumer = Consumer(connection, [Queue(queue, durable=True)], callbacks=[handle], prefetch_count=PREFETCH)
            with consumer:
                while left:
                    connection.drain_events(timeout=10)

    def window(self, queue: str, count: int, handler: Any = None) -> None:
        """IdempotentConsumer."""
        handler = handler or self.handler()
        consumer = IdempotentConsumer(self.url, {Queue(queue, durable=True): handler}, prefetch=PREFETCH)
        seen = 0
        run = handler._handler

        def counted(body: Any, message: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == count:
                consumer.stop()
            return run(body, message)

        handler._handler = counted
        consumer.run(idle_timeout=10)
        assert seen == count

    def tuned(self, queue: str, count: int) -> None:
        """The same loop, unguarded."""
        handler = self.handler()
        handler.executor = Unguarded(handler.executor.policy)

        def receive(message: Any, settle: Any) -> Work:
            return Work("", "", b"", functools.partial(handler._run, message.decode(), message), settle)

        handler.receive = receive
        self.window(queue, count, handler)


def noop(body: Any, message: Any) -> None:
    """The handler."""


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", choices=("rabbitmq", "redis"), default="rabbitmq")
    parser.add_argument("--store", choices=("redis", "postgresql"), default="redis")
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default="plain,set nx,two pings,tuned,singly,in turn,window")
    parser.add_argument("--report", action="store_true", help="put the table into reports/consumer.md, and draw it")
    options = parser.parse_args()
    bench = Bench(options.broker, options.store)
    names = options.ways.split(",")
    rates: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            queue = f"bench.{uuid.uuid4().hex[:12]}"
            bench.fill(queue, options.messages)
            before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            bench.ways[name](queue, options.messages)
            took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
            rates[name].append(options.messages / took)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            cpu[name].append(used / options.messages * 1e6)
            with Connection(bench.url) as connection:
                connection.default_channel.queue_delete(queue)
                if options.broker == "rabbitmq":  # our consumer has declared the queue by which messages come back
                    connection.default_channel.queue_delete(f"{queue}.back")
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    for key in bench.redis.scan_iter("*-pay", count=1000):
        bench.redis.delete(key)
    print(f"{options.broker}, store {options.store}, {options.messages:,} messages, {options.rounds} rounds\n")
    table = ["| way | messages/s | least to most | ratio to plain | least to most | CPU us a message |"]
    table.append("|---|---:|---|---:|---|---:|")
    for name in names:
        each = [a / b for a, b in zip(rates[name], rates[names[0]], strict=True)]
        table.append(
            f"| {name} | {statistics.median(rates[name]):,.0f} | {min(rates[name]):,.0f} to {max(rates[name]):,.0f} | "
            f"{statistics.median(each):.2f} | {min(each):.2f} to {max(each):.2f} | {statistics.median(cpu[name]):.0f} |"
        )
    print("\n".join(table))
    if options.report:
        heading = "## RabbitMQ, " if options.broker == "rabbitmq" else "## `idempotent-redis` and"
        charts.put_table("consumer", heading, "\n".join(table))


if __name__ == "__main__":
    main()
