"""What the protocol model (`tests/model`) found in the library, as it happened, on the real executor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from idempotent_bus import admission
from idempotent_bus.celery import guard as celery_guard
from idempotent_bus.errors import StoreUnavailable
from idempotent_bus.execution import current_execution
from idempotent_bus.executor import Executor
from idempotent_bus.headers import DEAD_AT
from idempotent_bus.hooks import CLAIM, DEAD_LETTER, HANDLER
from idempotent_bus.inbox.base import Inbox
from idempotent_bus.inbox.running import Transactions
from idempotent_bus.model import Reason
from idempotent_bus.policy import Backoff, Policy
from idempotent_bus.stores.memory import MemoryStore
from idempotent_bus.testing import ManualClock
from idempotent_bus.work import Work

POLICY = Policy(lease=60.0, retention=1000.0, backoff=Backoff(cap=10.0))
NOW = 1_000_000.0
KEY = b"k" * 16


class _Killed(BaseException):
    """The process is gone."""


class _Told:
    """What the broker is told of one message."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name = name
        self._log = log

    def ack(self) -> None:
        self._log.append(f"{self._name}: acked")

    def wait(self, delay: float) -> None:
        self._log.append(f"{self._name}: put off")

    def dead_letter(self, reason: Reason, error: str, attempts: int) -> bool:
        self._log.append(f"{self._name}: {reason.value}")
        return True


class _World:
    """A store, and workers of it. silent: so many claims are done without a reply. deadly: a step that kills."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.clock = ManualClock()
        self.store = MemoryStore(clock=self.clock)
        self.policy = POLICY
        self.silent = 0
        self.deadly = ""

    def worker(self) -> Executor:
        return Executor(
            lambda: self.store,
            self.policy,
            clock=self.clock,
            wall=lambda: NOW,
            sleep=lambda _: None,
            step=self._step,
        )

    def _step(self, name: str, do: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
        if name == self.deadly:
            raise _Killed
        done = do(*args, **keywords)
        if name == CLAIM and self.silent:
            self.silent -= 1
            raise StoreUnavailable("its reply was lost")
        return done

    def _counted(self) -> int:
        record = self.store.lookup(KEY)
        assert record is not None
        return record.attempts

    def work(self, name: str, *, body: bytes = b"body one", redelivered: bool = False, age: float = 0.0) -> Work:
        return Work(
            scope="cards",
            biz_id="p-1",
            key=KEY,
            run=lambda: self.log.append(f"{name}: attempt {self._counted()}"),
            settle=_Told(name, self.log),
            fingerprint=body,
            redelivered=redelivered,
            published_at=NOW - age,
        )


def _in_transactions(path: Path, deadly: str) -> tuple[Callable[[], Transactions], list[str], dict[str, str]]:
    """A maker of workers with an inbox, what happened, and the step that kills, which can be taken away."""
    engine = sa.create_engine(f"sqlite:///{path}")
    log: list[str] = []
    dying = {"at": deadly}

    def step(name: str, do: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
        if name == dying["at"]:
            raise _Killed
        return do(*args, **keywords)

    return lambda: Transactions(Inbox(engine), POLICY, wall=lambda: NOW, step=step), log, dying


def _work(log: list[str], name: str, age: float) -> Work:
    return Work(
        scope="cards",
        biz_id="p-1",
        key=KEY,
        run=lambda connection: log.append(f"{name}: attempt {current_execution().attempt}"),
        settle=_Told(name, log),
        redelivered=True,
        published_at=NOW - age,
    )


@pytest.mark.parametrize("deadly", [CLAIM, DEAD_LETTER])
def test_what_may_be_forgotten_stays_in_doubt_in_transactions_too(tmp_path: Path, deadly: str) -> None:
    """I11, I2: the attempt of an old message is not counted before its record was looked at."""
    worker, log, dying = _in_transactions(tmp_path / "inbox.db", deadly)
    with pytest.raises(_Killed):
        worker().handle(_work(log, "old", 2000.0))
    dying["at"] = ""
    worker().handle(_work(log, "old", 2000.0))
    assert log == [f"old: {Reason.TOO_OLD.value}"]


def test_what_has_begun_before_is_run_in_transactions_however_old_it_is(tmp_path: Path) -> None:
    """I1, I12: a counted attempt shows that the message was never completed: it is run, and counted."""
    worker, log, dying = _in_transactions(tmp_path / "inbox.db", HANDLER)
    with pytest.raises(_Killed):
        worker().handle(_work(log, "young", 0.0))
    dying["at"] = ""
    worker().handle(_work(log, "old", 2000.0))
    assert log == ["old: attempt 2", "old: acked"]


def test_a_claim_in_doubt_is_not_taken_for_another_body_s() -> None:
    """I8, I1: after a silent claim another body with the same biz-id is a conflict, and does not run in its place."""
    world = _World()
    worker = world.worker()
    world.silent = 2
    worker.handle(world.work("first"))
    worker.handle(world.work("other", body=b"body two"))
    worker.handle(world.work("first again", redelivered=True))
    assert world.log == ["first: put off", "other: conflict", "first again: attempt 1", "first again: acked"]


@pytest.mark.parametrize("redelivered", [False, True])
def test_what_may_be_forgotten_stays_in_doubt_when_a_worker_dies_over_it(redelivered: bool) -> None:
    """I11: a worker that dies before an old message's dead letter leaves nothing by which the next one would run it."""
    world = _World()
    world.deadly = DEAD_LETTER
    with pytest.raises(_Killed):
        world.worker().handle(world.work("old", redelivered=redelivered, age=2000.0))
    world.deadly = ""
    world.clock.advance(POLICY.lease + 1)
    world.worker().handle(world.work("old", redelivered=True, age=2000.0))
    assert world.log == [f"old: {Reason.TOO_OLD.value}"]


@pytest.mark.parametrize("on_abandoned", ["rerun", lambda record: False], ids=["rerun", "probe"])
def test_what_has_begun_before_is_run_however_old_it_is(on_abandoned: Any) -> None:
    """I1, I12: a record of an attempt shows that the message was never completed: it is run, as a counted attempt."""
    world = _World()
    world.policy = dataclasses.replace(POLICY, on_abandoned=on_abandoned)
    world.deadly = HANDLER
    with pytest.raises(_Killed):
        world.worker().handle(world.work("young"))
    world.deadly = ""
    world.clock.advance(POLICY.lease + 1)
    world.worker().handle(world.work("old", redelivered=True, age=2000.0))
    assert world.log == ["old: attempt 2", "old: acked"]


@pytest.mark.parametrize(
    ("published", "died", "redriven", "since"),
    [
        (100, None, 0, 100.0),
        (100, 900, 1, 900.0),
        (100, 900, 0, 100.0),  # a header that says so is not believed of what was never redriven
        (None, 900, 1, 900.0),
        (100, None, 1, 100.0),
        (None, None, 1, None),
        (100, "soon", 1, 100.0),
    ],
)
def test_a_redriven_message_is_as_old_as_its_death(published: Any, died: Any, redriven: int, since: Any) -> None:
    """I11: its record is remembered from then on, whenever it is redriven; for kombu's messages and for Celery's."""
    headers = {} if died is None else {DEAD_AT: died}
    properties = {} if published is None else {"timestamp": published}
    message: Any = SimpleNamespace(headers=headers, properties=properties)
    assert admission._in_the_bus_since(message, redriven) == since
    request = SimpleNamespace(eta=None, **headers)
    assert celery_guard._in_the_bus_since(request, properties, redriven) == since
