"""Publishing on RabbitMQ with a confirm: singly, in a stream, in a list, against kombu's confirm_publish=True.

    python tests/benchmarks/bench_publish_rabbitmq.py [--rounds 5] [--single 1000] [--stream 5000]

Everybody publishes the same 200-byte JSON to a durable queue, persistent, and knows at the end that the broker has it.
Each run uses a fresh queue, each round another order, and the two single runs take turns every hundred messages, so
that whatever else the machine does meets both. The table gives the median of the rounds with the least and the most;
the ratio is to the same round's baseline.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import uuid
from collections.abc import Callable

from kombu import Connection, Producer, Queue

from idempotent_bus.producer import IdempotentProducer

URL = os.environ.get("IDEMPOTENT_BUS_TEST_RABBITMQ", "amqp://guest:guest@127.0.0.1:5672//")
BODY = {"payment_id": "p-" + "1" * 30, "amount": "9.90", "note": "x" * 120}
CHUNK = 100
BASELINE = "kombu, confirm_publish"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--single", type=int, default=1000, help="messages of each single run")
    parser.add_argument("--stream", type=int, default=5000, help="messages of each stream")
    options = parser.parse_args()

    with (
        Connection(URL) as looking_on,
        Connection(URL, transport_options={"confirm_publish": True}) as confirming,
        IdempotentProducer(URL) as ours,
    ):
        kombus = Producer(confirming.channel())
        queue = ""

        def kombu_single(count: int) -> None:
            for _ in range(count):
                kombus.publish(BODY, routing_key=queue, mandatory=True)

        def single(count: int) -> None:
            for _ in range(count):
                ours.publish(BODY, routing_key=queue)

        def stream(count: int) -> None:
            ours.publish_many((BODY for _ in range(count)), routing_key=queue)

        def batch(count: int) -> None:
            ours.publish_many([BODY] * count, routing_key=queue)

        runs: list[tuple[str, Callable[[int], None], int]] = [
            (BASELINE, kombu_single, options.single),
            ("ours, singly", single, options.single),
            ("ours, stream of 500", stream, options.stream),
            ("ours, list, 500", batch, options.stream),
        ]
        rates: dict[str, list[float]] = {name: [] for name, _, _ in runs}

        def measure(group: list[tuple[str, Callable[[int], None], int]]) -> None:
            nonlocal queue
            queue = f"bench.{uuid.uuid4().hex[:12]}"
            bound = Queue(queue, durable=True)(looking_on.default_channel)
            bound.queue_declare()
            spent = dict.fromkeys((name for name, _, _ in group), 0.0)
            for _, run, _ in group:
                run(10)
            pieces = group[0][2] // CHUNK if len(group) > 1 else 1
            for piece in range(pieces):
                for name, run, count in group if piece % 2 else reversed(group):
                    began = time.perf_counter()
                    run(count // pieces)
                    spent[name] += time.perf_counter() - began
            for name, _, count in group:
                rates[name].append(count / spent[name])
            expected = sum(count // pieces * pieces + 10 for _, _, count in group)
            stored = bound.queue_declare(passive=True).message_count
            assert stored == expected, f"{stored} of {expected} messages are in the queue"
            bound.delete()

        groups = [runs[:2], runs[2:3], runs[3:]]
        for number in range(options.rounds):
            turn = number % len(groups)
            for group in groups[turn:] + groups[:turn]:
                measure(group)
            print(f"round {number + 1} of {options.rounds}", flush=True)

    print(f"\n{'':26}{'median/s':>10}{'least':>8}{'most':>8}{'ratio':>8}{'least':>8}{'most':>8}")
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, rates[BASELINE], strict=True)]
        print(
            f"{name:26}{statistics.median(values):10.0f}{min(values):8.0f}{max(values):8.0f}"
            f"{statistics.median(ratios):8.2f}{min(ratios):8.2f}{max(ratios):8.2f}"
        )


if __name__ == "__main__":
    main()
