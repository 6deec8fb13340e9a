"""Controls: the code with one protection taken out. The same schedules and the same checker must show the damage."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

from places import Place
from scenarios import actions_for
from world import Scenario, Variant, World

from idempotent_bus.errors import StoreError
from idempotent_bus.execution import LeasedExecution
from idempotent_bus.executor import Executor
from idempotent_bus.finishing import Finish
from idempotent_bus.hooks import ACK, COMPLETE
from idempotent_bus.inbox.running import Transactions
from idempotent_bus.model import Claimed, ClaimOutcome, ClaimRequest, Hold
from idempotent_bus.stores.streams import DirectStream
from idempotent_bus.testing.explorer import Coverage, pairs
from idempotent_bus.testing.faults import Plan
from idempotent_bus.work import Ending, Work


class Around:
    """A store around another one; what is not overridden goes through."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def stream(self) -> DirectStream:
        """Over its own `complete`."""
        return DirectStream(self)  # type: ignore[arg-type]  # the rest is there by __getattr__


class DedupeOff(Around):
    """Every claim wins, and every completion is welcome."""

    _tokens = itertools.count(2**40)

    def claim(self, request: ClaimRequest, /) -> ClaimOutcome:
        return Claimed(next(self._tokens), 1)

    def claim_many(self, requests: Iterable[ClaimRequest], /) -> list[ClaimOutcome]:
        return [self.claim(request) for request in requests]

    def complete(self, hold: Hold, /, *, result: bytes | None, retention: float) -> bool:
        return True

    def release(self, hold: Hold, /, **_: Any) -> bool:
        return True

    renew = abandon = release


class TokenCheckOff(Around):
    """Whoever asks is taken for the holder: neither token nor nonce is compared."""

    holders: dict[bytes, Hold] = {}  # noqa: RUF012 - of all workers, as the store is

    def claim(self, request: ClaimRequest, /) -> ClaimOutcome:
        outcome: ClaimOutcome = self._store.claim(request)
        if isinstance(outcome, Claimed):
            self.holders[request.key] = Hold(request.key, outcome.token, request.nonce)
        return outcome

    def claim_many(self, requests: Iterable[ClaimRequest], /) -> list[ClaimOutcome]:
        return [self.claim(request) for request in requests]

    def complete(self, hold: Hold, /, **how: Any) -> bool:
        return bool(self._store.complete(self.holders[hold.key], **how))

    def release(self, hold: Hold, /, **how: Any) -> bool:
        return bool(self._store.release(self.holders[hold.key], **how))


class AcksEarly(Executor):
    """Acks, then completes."""

    def _streamed(self) -> None:
        return None  # what is overridden here is the ordinary way

    def finish(self, execution: LeasedExecution, value: Any, /) -> Ending:
        self._step(ACK, execution.work.settle.ack)
        ending = self._complete(execution.work, execution, value)
        execution.ending = ending
        return ending


class MarksFirst(Executor):
    """Completes, then runs the handler."""

    def _run(self, work: Work, execution: LeasedExecution, finish: Finish) -> Ending:
        lasting = {"result": None, "retention": execution.retention}
        with contextlib.suppress(StoreError):
            self._step(COMPLETE, self._claims.store().complete, execution.hold, **lasting)
        return super()._run(work, execution, finish)


class AcksBeforeTheCommit(Transactions):
    """The inbox, but the broker is answered first."""

    def handle(self, work: Work) -> Ending:
        self.step(ACK, work.settle.ack)
        work.settle = _Nothing()
        return super().handle(work)


class _Nothing:
    def ack(self) -> None: ...

    def wait(self, delay: float) -> None: ...

    def dead_letter(self, *_: Any) -> bool:
        return True


#: The invariant that must be seen broken, the code, and the scenario in which it is.
CONTROLS: dict[str, tuple[str, Variant, Scenario]] = {
    "dedupe off": ("I2", Variant(store=DedupeOff), Scenario("aa")),
    "token check off": ("I2", Variant(store=TokenCheckOff), Scenario("aa", workers=2)),
    "early ack": ("I1", Variant(executor=AcksEarly), Scenario("a")),
    "marked before the handler": ("I1", Variant(executor=MarksFirst), Scenario("a", fails={"a": 1})),
}
INBOX_CONTROLS: dict[str, tuple[str, Variant, Scenario]] = {
    "effect outside the transaction": ("I2", Variant(outside=True), Scenario("a")),
    "early ack": ("I1", Variant(transactions=AcksBeforeTheCommit), Scenario("a")),
}


def damage(name: str, place: Place) -> tuple[Counter[str], int]:
    """Run a control's schedules, up to two actions each: how often which invariant broke, and how many schedules."""
    _, variant, scenario = (INBOX_CONTROLS if place.transactional else CONTROLS)[name]
    found: Counter[str] = Counter()
    number = itertools.count()

    def run(plan: Plan) -> list[str]:
        next(number)
        world = World(scenario, plan, place, variant)
        try:
            world.play()
        except AssertionError as broken:
            found[str(broken).partition(":")[0]] += 1
        return world.script.passed

    for _ in pairs(run, Coverage(), actions_for(scenario)):
        pass
    return found, next(number)
