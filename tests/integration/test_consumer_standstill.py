"""A handler that hangs keeps its own message, and not those that came with it."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from typing import Any

import pytest
from kombu.message import Message

from consumer_rig import OURS, Broker, broker_of, fill, on, poll, running
from idempotent_bus import Ended, IdempotentConsumer, idempotent_consumer, standstill
from idempotent_bus.stores.memory import MemoryStore
from idempotent_bus.transports.sql.transport import Channel as SqlChannel

broker = pytest.fixture(broker_of)


@on(*OURS)
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("late", [True, False], ids=["", "control-a-patient-consumer"])
def test_what_waits_behind_a_handler_that_hangs_is_handled_elsewhere(
    broker: Broker, threads: int, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I13: 19 messages were brought with one whose handler hangs: another consumer has them soon, and each runs once.

    The control, a consumer with more patience: they are kept although its lease is over many times.
    """
    monkeypatch.setattr(standstill, "PATIENCE", 0.5 if late else 60.0)
    monkeypatch.setattr(SqlChannel, "_most", lambda channel: 20)  # it fetches fewer after a pause
    broker.options["visibility_timeout"] = 0.5
    queue, store, ran = broker.queue(), MemoryStore(), Counter[str]()
    elsewhere = Counter[str]()
    at_the_gate, filled, go_on = threading.Event(), threading.Event(), threading.Event()
    hung = [f"hangs{number}" for number in range(max(1, threads))]
    others = [str(number) for number in range(19)]

    def consumer(hangs: bool, **options: Any) -> IdempotentConsumer:
        @idempotent_consumer(store, scope=broker.unique, biz_id="id", lease=0.5, busy_delay=0.1)
        def handle(body: Any, message: Message) -> None:
            if body["id"] == "gate":
                at_the_gate.set()
                filled.wait(10)  # so that those that hang and the others come together
            if hangs and body["id"] in hung:
                go_on.wait(30)
            ran[body["id"]] += 1
            if not hangs:
                elsewhere[body["id"]] += 1

        return IdempotentConsumer(broker.connect(), {queue: handle}, prefetch=20, **options)

    first, second = consumer(True, threads=threads), consumer(False)
    with running(first), contextlib.ExitStack() as over:
        over.callback(go_on.set)
        fill(broker, queue, [f"quick{number}" for number in range(200)])  # so that the next window is a large one
        assert poll(lambda: first.endings[Ended.COMPLETED] == 200)
        fill(broker, queue, ["gate"])
        assert at_the_gate.wait(10)
        fill(broker, queue, [*hung, *others])
        filled.set()
        assert poll(lambda: first.health()["oldest_running"] > 0.2)
        with running(second):
            done = poll(lambda: len(elsewhere) >= 18, timeout=5.0 if late else 2.0)
            assert done is late
            go_on.set()
            assert poll(lambda: len(ran) == 201 + len(hung) + len(others))
    assert set(ran.values()) == {1}
    assert not late or not set(hung) & set(elsewhere)
    assert broker.is_empty(queue.name)
