"""A dedup store that is stopped, stalled, read-only or full: in doubt nothing runs and nothing is acked.

Twice each: in the middle of the work, where it is mostly a completion that gets no answer and is asked for again until
there is one; and while the consumer is idle, where all that arrives then meets it at its claim.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kombu.message import Message
from store_troubles import TROUBLES

from consumer_rig import make_broker, poll
from idempotent_bus import IdempotentConsumer, IdempotentProducer, idempotent_consumer
from idempotent_bus.errors import StoreUnavailable
from idempotent_bus.hooks import ACK, CLAIM, CLAIMED, COMPLETE, DURABLE, HANDLER
from idempotent_bus.identity import record_key
from idempotent_bus.model import Claimed, Completed, Completion

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

from lower_half_mutants import MUTANTS

MESSAGES, OUTAGE, PREFETCH = 150, 3.0, 20
#: Seconds after which no handler starts any more on what was claimed before: the design's one second, and a handler.
EXPOSED = 1.3
#: Seconds after which all is done once the store is back. What is in doubt is put off for as long as the silence has
#: lasted (15 s at most), and half as much again: after this outage 4.5 s, on RabbitMQ 8 s (the next delay queue);
#: then what was put off is handled. The rest is room for a busy machine.
STATED = 20.0
BROKERS = ("rabbitmq-quorum", "ours-sqlite")

pytestmark = pytest.mark.slow  # an outage of three seconds, and what was put off for its sake


class Truth:
    """A `step` that knows what the store has clearly answered, and notes what was done without that.

    handlers, acks: when they began. lies: what ran without a claim that was answered, or was
    acked without a completion. doubts: how many claims and completions got no answer, or one that was long in coming.
    """

    def __init__(self, scope: str) -> None:
        self.handlers: list[float] = []
        self.acks: list[float] = []
        self.lies: list[str] = []
        self.doubts = 0
        self._scope = scope
        self._ours: set[str] = set()
        self._done: set[str] = set()
        self._under_way: dict[int, str] = {}

    def __call__(self, name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if name == HANDLER:
            self.handlers.append(time.monotonic())
            key = record_key(self._scope, function.args[0]["id"]).hex()  # type: ignore[attr-defined]
            if key not in self._ours:
                self.lies.append("a handler ran without a clear claim")
        if name == ACK:
            self.acks.append(time.monotonic())
            settle: Any = function.__self__  # type: ignore[attr-defined]
            if getattr(settle, "_settle", settle).record.hex() not in self._done:
                self.lies.append("an ack without a clear completion")
        asked = time.monotonic()
        try:
            result = function(*args, **kwargs)
        except StoreUnavailable:
            self.doubts += name in (CLAIM, COMPLETE)
            raise
        # A completion that is under way in an outage which ends before its answer is given up is not in doubt.
        self.doubts += name in (CLAIM, CLAIMED, COMPLETE, DURABLE) and time.monotonic() - asked > OUTAGE / 2
        if name in (CLAIM, CLAIMED):
            several = isinstance(result, list)
            for request, outcome in zip(args[0] if several else args, result if several else [result], strict=False):
                if isinstance(outcome, Claimed):
                    self._ours.add(request.key.hex())
                if isinstance(outcome, Completed):
                    self._done.add(request.key.hex())
        if name == COMPLETE and isinstance(args[0], Completion):
            self._under_way[result] = args[0].hold.key.hex()
        elif name == COMPLETE and result:
            self._is_done(args[0].key.hex())
        if name == DURABLE:
            for one in result:
                key = self._under_way.pop(one.ticket, None)
                if key is not None and one.durable:
                    self._is_done(key)
        return result

    def _is_done(self, key: str) -> None:
        self._done.add(key)
        self._ours.discard(key)

    @staticmethod
    def between(times: list[float], begin: float, end: float) -> int:
        return sum(begin < when < end for when in times)


def run(trouble_name: str, broker_name: str, idle: bool, unique: str, folder: Path) -> None:
    """One outage, with all checks. idle: it comes while nothing is to be done, and most messages come during it."""
    broker = make_broker(broker_name, unique, folder)
    queue, effects, truth = broker.queue(), Counter[str](), Truth(unique)
    ids = [str(number) for number in range(MESSAGES)]
    now, later = (ids[:40], ids[40:]) if idle else (ids, [])

    def publish(some: list[str]) -> None:
        with IdempotentProducer(broker.connect()) as producer:
            producer.publish_many([{"id": biz_id} for biz_id in some], routing_key=queue.name, declare=[queue])

    with TROUBLES[trouble_name](folder) as trouble:

        @idempotent_consumer(trouble.store, scope=unique, biz_id="id", step=truth, lease=20.0)
        def handle(body: Any, message: Message) -> None:
            effects[body["id"]] += 1
            time.sleep(0.01)

        publish(now)
        consumer = IdempotentConsumer(broker.connect(), {queue: handle}, prefetch=PREFETCH)
        thread = threading.Thread(target=consumer.run, daemon=True)
        thread.start()
        try:
            assert poll(lambda: len(truth.acks) >= 40, timeout=30)
            time.sleep(0.2 if idle else 0.0)
            trouble.begin()
            begun = time.monotonic()
            publish(later)
            ended = begun + OUTAGE  # some end by themselves, soon after it
            time.sleep(max(0.0, ended - time.monotonic()))
            trouble.end()
            back = time.monotonic()
            late = truth.between(truth.handlers, begun + EXPOSED, ended)
            during = (truth.between(truth.handlers, begun, ended), truth.between(truth.acks, begun, ended))
            done = poll(lambda: len(truth.acks) >= MESSAGES, STATED)
            took = time.monotonic() - back
        finally:
            consumer.stop()
            thread.join(30)
        print(
            f"{trouble_name} on {broker_name}: {during} in the outage, {truth.doubts} doubts, done after {took:.1f} s"
        )
        assert truth.lies == [], "nothing runs or is acked in doubt"
        # On what the store had said just before: a window has been claimed, whose handlers start until one completion
        # is without an answer for a second; of the acks one or two may be on their way.
        assert not trouble.total or during[0] <= (0 if idle else PREFETCH), f"in doubt nothing runs: {during}"
        assert not trouble.total or late == 0, f"in doubt nothing runs: {late} handlers after the first second"
        assert not trouble.total or during[1] <= (0 if idle else 2), f"in doubt nothing is acked: {during}"
        assert not trouble.total or truth.doubts > 0, "the outage was not felt"
        assert done, f"{len(truth.acks)} of {MESSAGES} are acked {took:.0f} s after the store came back"
        assert set(effects) == set(ids)
        assert set(effects.values()) == {1}, "each has one effect"
        assert broker.is_empty(broker.dead)
        assert broker.is_empty(queue.name)
    broker.clean_up()


def pairs() -> list[tuple[str, str]]:
    """Each trouble on one broker, in turn; on both where IDEMPOTENT_BUS_LONG is set."""
    both = bool(os.environ.get("IDEMPOTENT_BUS_LONG"))
    return [
        (trouble, broker)
        for number, trouble in enumerate(TROUBLES)
        for place, broker in enumerate(BROKERS)
        if both or place == number % 2
    ]


@pytest.mark.parametrize("idle", [False, True], ids=["busy", "idle"])
@pytest.mark.parametrize(("trouble", "broker"), pairs())
def test_in_doubt_nothing_runs_and_nothing_is_acked(
    trouble: str, broker: str, idle: bool, unique: str, tmp_path: Path
) -> None:
    """I9, I13, I15: no handler without a clear claim, no ack without a clear completion; then all is done, once."""
    run(trouble, broker, idle, unique, tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # a mutant may break the consumer
@pytest.mark.parametrize(
    ("mutant", "idle"),
    [("run in doubt", True), ("acked in doubt", True), ("guessed", False)],
    ids=lambda value: str(value),
)
def test_the_control_failing_open_is_seen(
    mutant: str, idle: bool, unique: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: mutants of the table that run, ack or guess in doubt are caught by the very same checks."""
    (found,) = (one for one in MUTANTS if one.name == mutant)
    found.apply(monkeypatch)
    with pytest.raises(AssertionError, match="in doubt"):
        run("redis-no-replicas", "ours-sqlite", idle, unique, tmp_path)
