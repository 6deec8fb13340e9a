"""The library with one protection taken out. What the soak does to all must show the damage here."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from idempotent_bus.execution import LeasedExecution
from idempotent_bus.executor import Executor
from idempotent_bus.finishing import Finish
from idempotent_bus.hooks import ACK
from idempotent_bus.model import Claimed, ClaimOutcome, ClaimRequest, Hold
from idempotent_bus.work import Ending, Work

__all__ = ["AcksEarly", "DedupeOff", "TokenCheckOff", "damaged"]


class _Around:
    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class DedupeOff(_Around):
    """Every claim wins, and every completion is welcome."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self._tokens = itertools.count(time.time_ns())

    def claim(self, request: ClaimRequest, /) -> ClaimOutcome:
        return Claimed(next(self._tokens), 1)

    def claim_many(self, requests: Iterable[ClaimRequest], /) -> list[ClaimOutcome]:
        return [self.claim(request) for request in requests]

    def complete(self, hold: Hold, /, **_: Any) -> bool:
        return True

    def release(self, hold: Hold, /, **_: Any) -> bool:
        return True

    renew = abandon = release


class TokenCheckOff(_Around):
    """Whoever asks is taken for the holder: neither token nor nonce is compared. The holders are in a folder."""

    def __init__(self, store: Any, folder: Path) -> None:
        super().__init__(store)
        self._folder = folder

    def claim(self, request: ClaimRequest, /) -> ClaimOutcome:
        outcome: ClaimOutcome = self._store.claim(request)
        if isinstance(outcome, Claimed):
            (self._folder / request.key.hex()).write_text(f"{outcome.token} {request.nonce.hex()}")
        return outcome

    def claim_many(self, requests: Iterable[ClaimRequest], /) -> list[ClaimOutcome]:
        return [self.claim(request) for request in requests]

    def _holder(self, hold: Hold) -> Hold:
        token, nonce = (self._folder / hold.key.hex()).read_text().split()
        return Hold(hold.key, int(token), bytes.fromhex(nonce))

    def complete(self, hold: Hold, /, **how: Any) -> bool:
        return bool(self._store.complete(self._holder(hold), **how))

    def release(self, hold: Hold, /, **how: Any) -> bool:
        return bool(self._store.release(self._holder(hold), **how))


class _Acked:
    """What is left of a settlement whose message the broker has forgotten."""

    def __init__(self, settle: Any) -> None:
        self._settle = getattr(settle, "_settle", settle)

    def ack(self) -> None: ...

    def wait(self, delay: float) -> None: ...

    def dead_letter(self, *_: Any) -> bool:
        return True


class AcksEarly(Executor):
    """Acks, then runs."""

    def _run(self, work: Work, execution: LeasedExecution, finish: Finish) -> Ending:
        self._step(ACK, work.settle.ack)
        work.settle = _Acked(work.settle)
        return super()._run(work, execution, finish)


def damaged(control: str, found: dict[str, Any]) -> int:
    """How much damage this control has done, as the checker of all cells has counted it."""
    if control == "early ack":
        return int(found["lost"])
    if control == "token check off":
        return int(found["superseded"] + found["unexcused"])
    return int(found["unexcused"])
