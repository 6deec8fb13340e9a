"""A dedup store that is killed, paused and started again under a running consumer."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu.message import Message

from consumer_rig import Broker, make_broker, poll
from idempotent_bus import Backoff, IdempotentConsumer, IdempotentProducer, idempotent_consumer

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from private_redis import PrivateRedis


@pytest.fixture(params=["rabbitmq-quorum", "ours-sqlite"])
def broker(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Broker]:
    made = make_broker(request.param, unique, tmp_path)
    yield made
    made.clean_up()


@pytest.mark.parametrize("trouble", ["killed", "paused"])
def test_a_redis_store_that_goes_and_comes_back(broker: Broker, tmp_path: Path, trouble: str) -> None:
    """I9, I13: while the store is away no handler starts and nothing is acked; then all are handled, once each."""
    server = PrivateRedis(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    queue, started = broker.queue(), []
    ids = [str(number) for number in range(150)]

    @idempotent_consumer(
        server.url + "?socket_timeout=1", scope=broker.unique, biz_id="id", busy_delay=0.2, backoff=Backoff(0.1, 0.2),
        lease=5.0,
    )  # fmt: skip
    def handle(body: Any, message: Message) -> None:
        started.append((time.monotonic(), body["id"]))
        time.sleep(0.01)

    with IdempotentProducer(broker.connect()) as producer:
        producer.publish_many([{"id": biz_id} for biz_id in ids], routing_key=queue.name, declare=[queue])
    consumer = IdempotentConsumer(broker.connect(), {queue: handle}, prefetch=20)
    thread = threading.Thread(target=consumer.run, daemon=True)
    thread.start()
    try:
        assert poll(lambda: len(started) >= 40, timeout=30)
        server.kill() if trouble == "killed" else server.pause()
        gone = time.monotonic()
        time.sleep(3.0)
        # What was claimed before may still run; a claim that is in doubt runs nothing.
        late = [biz_id for when, biz_id in started if when > gone + 1.5]
        assert late == []
        server.start() if trouble == "killed" else server.resume()
        assert poll(lambda: len({biz_id for _, biz_id in started}) == len(ids), timeout=60), len(started)
    finally:
        consumer.stop()
        thread.join(30)
        server.kill()
    assert not thread.is_alive()
    counts = Counter(biz_id for _, biz_id in started)
    # A completion that was in doubt when the store went may be repeated once: that is all.
    assert sum(counts.values()) - len(ids) <= 1
    assert broker.is_empty(broker.dead)
