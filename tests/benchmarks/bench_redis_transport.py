"""Throughput of our Redis transport against kombu's in the same run. A command, not a test:

    python tests/benchmarks/bench_redis_transport.py [--messages 3000] [--rounds 5]

200-byte JSON messages on a real Redis (IDEMPOTENT_BUS_TEST_REDIS). Each round measures kombu and ours in turn, so
that the machine's moods fall on both; a line shows the medians and the median of the paired ratios. Ends with 1 if a
ratio is below its bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from kombu import Connection, Consumer, Exchange, Queue

import servers
from idempotent_bus.transports import register

register()

BODY = {"payment_id": "p-1", "text": "x" * 167}
assert len(json.dumps(BODY)) == 200

Measure = Callable[[str, int], float]


def _name() -> str:
    return f"bench-{uuid.uuid4().hex}"


def _ids(url: str, count: int) -> list[dict[str, str]]:
    """Ours is measured with what it is for; making the ids is the producer wrapper's cost, not the transport's."""
    return [{"inner-msg-id": uuid.uuid4().hex} if url.startswith("idempotent") else {} for _ in range(count)]


def _clean(connection: Any, name: str) -> None:
    client = connection.default_channel.client
    for key in client.scan_iter(f"*{name}*", count=1000):
        client.delete(key)


def publish(url: str, count: int, batch: int = 0) -> float:
    """Messages published a second."""
    name, headers = _name(), _ids(url, count)
    with Connection(url, transport_options={"dedup_window": 60}) as connection:
        producer = connection.Producer(serializer="json")
        producer.publish(BODY, exchange="", routing_key=name)
        started = time.perf_counter()
        if batch:
            with producer.batch(max_size=batch):
                for header in headers:
                    producer.publish(BODY, exchange="", routing_key=name, headers=header)
        else:
            for header in headers:
                producer.publish(BODY, exchange="", routing_key=name, headers=header)
        rate = count / (time.perf_counter() - started)
        _clean(connection, name)
    return rate


def drain(url: str, count: int, prefetch: int) -> float:
    """Messages received and acked one by one a second, through kombu's Consumer. Filled by a plain producer."""
    name = _name()
    with Connection(url.removeprefix("idempotent-")) as plain:
        producer = plain.Producer(serializer="json")
        with producer.batch(max_size=100):
            for _ in range(count):
                producer.publish(BODY, exchange="", routing_key=name)
    done = 0

    def handle(body: Any, message: Any) -> None:
        nonlocal done
        done += 1
        message.ack()

    with Connection(url) as connection:
        queue = Queue(name, Exchange(""), name)
        with Consumer(connection.channel(), [queue], callbacks=[handle], prefetch_count=prefetch, auto_declare=False):
            started = time.perf_counter()
            while done < count:
                connection.drain_events(timeout=10)
            rate = count / (time.perf_counter() - started)
        _clean(connection, name)
    return rate


WORK: list[tuple[str, Measure, float]] = [
    ("publish singly", publish, 1.3),
    ("publish in batches of 100", lambda url, count: publish(url, count * 3, 100), 0.65),
    ("drain, prefetch 100", lambda url, count: drain(url, count, 100), 10.0),
    ("drain, prefetch 1", lambda url, count: drain(url, count, 1), 1.5),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    plain, ours = servers.REDIS, f"idempotent-{servers.REDIS}"
    below = 0
    for title, measure, bound in WORK:
        pairs = [
            (measure(plain, arguments.messages), measure(ours, arguments.messages)) for _ in range(arguments.rounds)
        ]
        ratio = statistics.median(mine / theirs for theirs, mine in pairs)
        theirs, mine = (statistics.median(side) for side in zip(*pairs, strict=True))
        below += ratio < bound
        print(f"{title:26} kombu {theirs:7.0f}/s   ours {mine:7.0f}/s   ratio {ratio:5.2f}   bound {bound}", flush=True)
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
