"""A poison message does not hold up its neighbours: a thousand good messages behind it flow as if it were not there."""

from __future__ import annotations

import statistics
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu.message import Message

import servers
from consumer_rig import make_broker, poll
from idempotent_bus import IdempotentConsumer, IdempotentProducer, idempotent_consumer, open_store

GOOD = 1000
#: Seconds that a good message takes. A handler that does nothing would measure the noise of the machine.
WORK = 0.002
#: Seconds that the poison takes until it raises.
POISONS = {"fails-at-once": 0.0, "fails-slowly": 0.05}


def rate(name: str, folder: Path, poison: float | None, **options: Any) -> tuple[float, int]:
    """Good messages in a second, with a poison message in front of them or without; and how often that one ran."""
    unique = f"t{uuid.uuid4().hex[:12]}"
    broker = make_broker(name, unique, folder)
    queue, ran, times = broker.queue(), 0, []
    store: Any = open_store(servers.real_redis(), prefix=f"{unique}:")

    @idempotent_consumer(store, scope=unique, biz_id="id", **options)
    def handle(body: Any, message: Message) -> None:
        nonlocal ran
        times.append(time.monotonic())
        if body["id"] == "poison":
            ran += 1
            time.sleep(poison or 0.0)
            raise ValueError("always")
        time.sleep(WORK)

    bodies = [{"id": f"good{number}"} for number in range(GOOD)]
    with IdempotentProducer(broker.connect()) as producer:
        if poison is not None:
            producer.publish({"id": "poison"}, routing_key=queue.name, declare=[queue])
        producer.publish_many(bodies, routing_key=queue.name, declare=[queue])
    consumer = IdempotentConsumer(broker.connect(), {queue: handle})
    thread = threading.Thread(target=consumer.run, daemon=True)
    thread.start()
    try:
        assert poll(lambda: len(times) - ran >= GOOD, 120), f"only {len(times) - ran} were handled"
        return GOOD / (times[-1] - times[0]), ran
    finally:
        consumer.stop()
        thread.join(10)
        store.close()
        broker.clean_up()
        with redis.Redis.from_url(servers.real_redis()) as client:
            for key in client.scan_iter(f"{unique}:*", count=1000):
                client.delete(key)


def median_ratio(name: str, folder: Path, poison: float, rounds: int = 3, **options: Any) -> tuple[float, list[str]]:
    """The median over rounds of the rate with the poison to the rate without it, measured one after the other."""
    ratios, told = [], []
    for _ in range(rounds):
        alone, _ = rate(name, folder, None)
        behind, ran = rate(name, folder, poison, **options)
        ratios.append(behind / alone)
        told.append(f"{alone:.0f}/s alone, {behind:.0f}/s behind a poison that ran {ran} times: {behind / alone:.2f}")
    return statistics.median(ratios), told


@pytest.mark.slow  # six drains of a thousand messages
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", ["rabbitmq-quorum", "ours-redis"])
def test_good_messages_flow_behind_a_poison_one(name: str, poison: str, tmp_path: Path) -> None:
    """I12: at no less than 0.8 of their rate without it."""
    ratio, told = median_ratio(name, tmp_path, POISONS[poison])
    for _ in range(2):
        if ratio >= 0.8:
            break
        # The machine is shared, with other tests too: as many again, and the median of all.
        _, more = median_ratio(name, tmp_path, POISONS[poison])
        told += more
        ratio = statistics.median(float(line.rpartition(" ")[2]) for line in told)
    print(*told, sep="\n")
    assert ratio >= 0.8, told


@pytest.mark.slow  # it sleeps three backoffs
@pytest.mark.parametrize("name", ["rabbitmq-quorum", "ours-redis"])
def test_the_control_sleeping_in_the_handler_holds_them_up(name: str, tmp_path: Path) -> None:
    """The control: a handler that sleeps the backoff itself, three times, and then gives up, is far below."""
    ratio, told = median_ratio(name, tmp_path, 1.0 + 2.0 + 4.0, rounds=1, max_attempts=1)
    print(*told, sep="\n")
    assert ratio < 0.5, told
