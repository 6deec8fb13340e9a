"""Streams of completions for stores that cannot send without waiting: at once, or on a thread of the stream's own."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress

from ..errors import StoreError
from ..model import ClaimOutcome, ClaimRequest, Completion, Settled
from ..store import BatchCompletionStore, Store

__all__ = ["DirectStream", "GatheringStream"]

#: Completions that one call takes at most: what came meanwhile goes with the next one.
_MOST = 100
#: Seconds without any after which the thread ends.
_IDLE = 1.0


class DirectStream:
    """Each completion is done while `begin` waits: for stores in this process, or without another way."""

    survives = True

    def __init__(self, store: Store) -> None:
        self._store = store
        self._begun = 0
        self._ended: list[Settled] = []
        #: The claim that went with the last completion, and its answer.
        self._last: tuple[ClaimRequest, ClaimOutcome] | None = None

    @property
    def pending(self) -> int:
        return len(self._ended)

    def begin(self, completion: Completion, claim: ClaimRequest | None = None, /) -> int:
        self._begun += 1
        durable: bool | None
        try:
            durable = self._store.complete(completion.hold, result=completion.result, retention=completion.retention)
        except StoreError:
            durable = None
        self._ended.append(Settled(self._begun, durable))
        self._last = None
        if claim is not None:
            with suppress(StoreError):
                self._last = claim, self._store.claim(claim)
        return self._begun

    def claimed(self, request: ClaimRequest, /) -> ClaimOutcome | None:
        last, self._last = self._last, None
        return last[1] if last is not None and last[0] is request else None

    def poll(self, timeout: float = 0.0) -> list[Settled]:
        ended, self._ended = self._ended, []
        return ended

    def settle(self) -> list[Settled]:
        return self.poll()

    def close(self) -> None:
        """Nothing to let go of."""


class GatheringStream:
    """A thread that completes whatever has been begun since its last commit, in one: a commit of one's own while it is
    quiet, a shared one when many come.

    A completion is on its way as soon as the commit before it is over. The thread starts with the first one and ends
    when it has had nothing to do for a second, with `close`, or with the process; a fork does not inherit it.
    """

    survives = False  # what waits for the thread goes with the process

    def __init__(self, store: BatchCompletionStore) -> None:
        self._store = store
        self._begun = 0
        self._told = 0
        self._waiting: deque[tuple[int, Completion]] = deque()
        self._ended: deque[Settled] = deque()
        self._work = threading.Condition()
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def pending(self) -> int:
        return self._begun - self._told

    def begin(self, completion: Completion, /) -> int:
        self._begun += 1
        with self._work:
            self._waiting.append((self._begun, completion))
            if self._thread is None or not self._thread.is_alive():
                self._closed = False
                self._thread = threading.Thread(target=self._run, name="idempotent-bus-completions", daemon=True)
                self._thread.start()
            self._work.notify()
        return self._begun

    def poll(self, timeout: float = 0.0) -> list[Settled]:
        with self._news:
            if not self._ended and timeout > 0 and self.pending:
                self._news.wait_for(lambda: self._ended, timeout)
            ended = list(self._ended)
            self._ended.clear()
        self._told += len(ended)
        return ended

    def settle(self) -> list[Settled]:
        ended: list[Settled] = []
        while self.pending:
            ended += self.poll(1.0)
            if self._thread is None or not self._thread.is_alive():  # after a fork: nobody else will do it
                self._do([*self._waiting])
                self._waiting.clear()
        return ended

    def close(self) -> None:
        with self._work:
            self._closed = True
            self._work.notify()

    def _run(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self._waiting or self._closed, _IDLE)
                if not self._waiting:
                    self._thread = None  # under the lock: the next one to come starts another
                    return
                some = [self._waiting.popleft() for _ in range(min(len(self._waiting), _MOST))]
            self._do(some)

    def _do(self, some: list[tuple[int, Completion]]) -> None:
        durable: list[bool | None]
        try:
            durable = [*self._store.complete_many([completion for _, completion in some])]
        except Exception:  # noqa: BLE001  # whatever it was, the outcome is unknown, and is told as that
            durable = [None] * len(some)
        with self._news:
            self._ended.extend(Settled(ticket, ours) for (ticket, _), ours in zip(some, durable, strict=True))
            self._news.notify()
