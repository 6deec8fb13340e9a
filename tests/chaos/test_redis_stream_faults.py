"""Windows over a Redis stream whose sends and replies go wrong at random, in every way that a connection can."""

from __future__ import annotations

import random
import uuid
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from redis import Redis
from redis import exceptions as redis_errors

import servers
from idempotent_bus.executor import Executor
from idempotent_bus.hooks import CLAIMED
from idempotent_bus.identity import record_key
from idempotent_bus.model import Busy, Claimed, Completed, State
from idempotent_bus.policy import Policy
from idempotent_bus.replies import Replies
from idempotent_bus.stores import redis_stream
from idempotent_bus.stores.redis import RedisStore
from idempotent_bus.work import Ended, Work

SCOPE = "stream.faults"
WINDOWS = 150


class Answer:
    """How one delivery was answered."""

    def __init__(self) -> None:
        self.answers: list[str] = []

    def ack(self) -> None:
        """It is done."""
        self.answers.append("ack")

    def wait(self, delay: float) -> None:
        """It comes back."""
        self.answers.append("wait")

    def dead_letter(self, reason: Any, error: str, attempts: int) -> bool:
        """It died."""
        self.answers.append("dead")
        return True


@pytest.fixture
def store() -> Iterator[RedisStore]:
    """A store under a prefix of its own."""
    client = Redis.from_url(servers.real_redis(), socket_timeout=2)
    prefix = f"faults{uuid.uuid4().hex}:"
    store = RedisStore(client, prefix=prefix)
    yield store
    for key in client.scan_iter(f"{prefix}*", count=1000):
        client.delete(key)
    store.close()


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_a_connection_does_each_runs_once(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """I2, I4, I9, I12: sends that fail before, in the middle and after, replies that are late or lost, with completions
    and claims on their way: no second run, no ack without its record, no claim that is left behind, no wrong result."""
    dice = random.Random(seed)
    struck: Counter[str] = Counter()

    class Faulty(Replies):
        __slots__ = ()

        def send(self, packed: bytes) -> None:
            chance = dice.random()
            if chance < 0.05:
                struck["before"] += 1
                raise redis_errors.ConnectionError
            if chance < 0.1:
                struck["in the middle"] += 1
                self._sock.sendall(packed[: dice.randrange(len(packed) + 1)])
                raise OSError
            super().send(packed)
            if chance < 0.15:
                struck["after"] += 1
                raise redis_errors.ConnectionError

        def reply(self) -> Any:
            chance = dice.random()
            if chance < 0.07:
                struck["late"] += 1
                raise redis_errors.TimeoutError
            reply = super().reply()
            if chance < 0.15:
                struck["lost"] += 1
                raise redis_errors.ConnectionError
            return reply

    monkeypatch.setattr(redis_stream, "replies_of", lambda connection: Faulty(connection._sock))
    answered: Counter[type] = Counter()

    def step(name: str, function: Any, /, *args: Any, **settings: Any) -> Any:
        result = function(*args, **settings)
        answered[type(result)] += name == CLAIMED
        return result

    executor = Executor(lambda: store, Policy(), step=step)
    runs: Counter[str] = Counter()

    def run(biz_id: str) -> str | None:
        runs[biz_id] += 1
        return biz_id * 3 if len(biz_id) % 2 else None

    for number in range(WINDOWS):
        works = [
            Work(
                scope=SCOPE,
                biz_id=biz_id,
                key=record_key(SCOPE, biz_id),
                run=partial(run, biz_id),
                settle=Answer(),
                redelivered=dice.random() < 0.7,
                fingerprint=b"f" * 8,
            )
            for biz_id in [f"{number}-{dice.randrange(6)}" for _ in range(dice.randrange(2, 12))]
        ]
        for work, ending in zip(works, executor.handle_window(works), strict=True):
            record = store.lookup(work.key)
            assert record is not None
            assert (record.state, runs[work.biz_id]) == (State.COMPLETED, 1)
            assert record.attempts <= 1
            assert ending.how in (Ended.COMPLETED, Ended.REPLAYED)
            assert ending.value == (work.biz_id * 3 if len(work.biz_id) % 2 else None)
            assert work.settle.answers == ["ack"]  # type: ignore[attr-defined]
    assert set(struck) == {"before", "in the middle", "after", "late", "lost"}
    assert {type(None), Claimed, Completed, Busy} >= {kind for kind, times in answered.items() if times}
    assert min(answered[kind] for kind in (type(None), Claimed, Completed)) > 10, "claims went along, and had answers"
