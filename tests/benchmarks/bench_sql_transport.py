"""How fast the SQL transport publishes and drains, beside kombu's own over the same kind of database.

    python tests/benchmarks/bench_sql_transport.py [--messages 1000] [--rounds 5] [--url sqlite | postgresql://...]

Each round runs kombu's transport and ours right after one another; the table shows the medians and the median of the
rounds' ratios. Publishing carries an inner-msg-id on our side, so each of ours lands with its mark in one durable
commit; draining acks each message singly. kombu's consumer marks and never deletes, and loses messages at a kill.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sql_bus import Bus, drop

BODY = {"payment_id": "p-0123456789", "amount": "9.90", "note": "x" * 150}


def publish(bus: Bus, connection: Any, messages: int, ids: bool) -> float:
    producer = connection.Producer()
    arguments = {"exchange": bus.exchange, "routing_key": "paid", "declare": [bus.queue], "retry": False}
    producer.publish(BODY, **arguments)
    began = time.perf_counter()
    for _ in range(messages):
        headers = {"inner-msg-id": str(uuid.uuid4())} if ids else {}
        producer.publish(BODY, headers=headers, **arguments)
    return messages / (time.perf_counter() - began)


def drain(bus: Bus, connection: Any, messages: int, prefetch: int) -> float:
    left = messages
    channel = connection.channel()
    channel.basic_qos(0, prefetch, False)

    def handle(body: Any, message: Any) -> None:
        nonlocal left
        message.ack()
        left -= 1

    with connection.Consumer([bus.queue], channel=channel, callbacks=[handle]):
        connection.drain_events(timeout=5)
        began, start = time.perf_counter(), left
        while left:
            connection.drain_events(timeout=5)
        return start / (time.perf_counter() - began)


def measure(bus: Bus, messages: int, ours: bool) -> dict[str, float]:
    with bus.connect() if ours else bus.plain() as connection:
        result = {"publish": publish(bus, connection, 2 * messages - 1, ours)}
        for prefetch in (1, 100):
            result[f"drain, prefetch {prefetch}"] = drain(bus, connection, messages, prefetch)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--url", default="sqlite")
    options = parser.parse_args()
    rounds = []
    # kombu keeps the first table names that a process used, so each side has one pair of tables for all rounds.
    names = [f"bench{uuid.uuid4().hex[:8]}_{side}" for side in ("kombu", "ours")]
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/bus.db" if options.url == "sqlite" else options.url
        sides = [Bus(url, {"queue_tablename": f"{name}_q", "message_tablename": f"{name}_m"}) for name in names]
        for number in range(options.rounds):
            rounds.append([measure(bus, options.messages, bus is sides[1]) for bus in sides])
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        for bus in sides:
            drop(bus)
    print(f"{'':22}{'kombu/s':>10}{'ours/s':>10}{'ratio':>8}")
    for name in rounds[0][0]:
        theirs, own = ([pair[side][name] for pair in rounds] for side in (0, 1))
        ratio = statistics.median(b / a for a, b in zip(theirs, own, strict=True))
        print(f"{name:22}{statistics.median(theirs):10.0f}{statistics.median(own):10.0f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
