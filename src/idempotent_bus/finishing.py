"""A window's completions: sent at once, not waited for, and acked once they are durable.

A handler's completion leaves as soon as it has returned, so the time between an effect and its completion being on its
way is what it is for a single message. What is not waited for is the answer: it is read when the window is through, or
before another handler starts while too many are under way. Only then is the message acked (I4). What the stream cannot
tell clearly is asked again the ordinary way, which repeats `complete` with the same hold until it tells (I15).

Where messages are claimed singly, the next one's claim goes along with a completion, so that each message waits for one
answer and not for two.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, Final

from .claims import Claim
from .errors import StoreError
from .execution import LeasedExecution
from .hooks import CLAIMED, COMPLETE, DURABLE, Step
from .model import ClaimOutcome, ClaimRequest, Completion, Settled
from .store import ClaimingStream, CompletionStream, StreamStore
from .work import Ended, Ending, Work

__all__ = ["UNDER_WAY", "Finish", "Finishing", "Streams"]

#: What a handler's run ends with while its completion is under way.
UNDER_WAY: Final = Ending(Ended.OPEN)
#: No handler starts with more completions under way, or with one that is under way for so many seconds.
_MOST: Final = 50
_LONGEST: Final = 1.0
#: Seconds after which it is looked whether answers have come: a store that refuses must be noticed soon.
_LOOK: Final = 0.001

Finish = Callable[[LeasedExecution, Any], Ending]


class Streams:
    """The streams of one executor: one for each thread of each process. Safe for threads."""

    def __init__(self) -> None:
        self._local = threading.local()

    def of(self, store: object) -> tuple[CompletionStream, ClaimingStream | None] | None:
        """This thread's stream, and again if it carries claims.

        None if the store has none, or one whose completions may die with this process.
        """
        mine = getattr(self._local, "mine", None)
        if mine is None or mine[0] != os.getpid() or mine[1] is not store:
            if not isinstance(store, StreamStore):
                return None
            stream = store.stream()
            mine = self._local.mine = (
                os.getpid(),
                store,
                stream,
                stream if isinstance(stream, ClaimingStream) else None,
            )
        return mine[2:] if mine[2].survives else None


class Finishing:
    """The completions of one window. For one thread.

    claiming: the stream again, if it carries claims. completion: what is sent for an execution that returned this, once
    it is renewed no more. conclude: notes that it is durable, and acks. finish: completes and acks the ordinary way.
    request: for the claim of `next_up`, or None if it is to be asked for in its turn.
    """

    def __init__(
        self,
        stream: CompletionStream,
        claiming: ClaimingStream | None,
        *,
        completion: Callable[[LeasedExecution, Any], Completion],
        conclude: Finish,
        finish: Finish,
        request: Callable[[Work], ClaimRequest | None],
        clock: Callable[[], float],
        step: Step,
    ) -> None:
        self._stream = stream
        self._claiming = claiming
        self._completion = completion
        self._conclude = conclude
        self._finish = finish
        self._request = request
        self._clock = clock
        self._step = step
        #: By ticket, in their order: the execution, what it returned, and when its completion left.
        self._under_way: dict[int, tuple[LeasedExecution, Any, float]] = {}
        self._keys: set[bytes] = set()
        self._looked_at = clock()
        #: True once the store gave no clear answer to a completion of this window.
        self.in_doubt = False
        self._ended: dict[Work, Ending] = {}
        #: The message behind the one that is handled, where its claim may go along with this one's completion.
        self.next_up: Work | None = None
        #: That claim, and when it left.
        self._asked: tuple[ClaimRequest, float] | None = None

    def begin(self, execution: LeasedExecution, value: Any, /) -> Ending:
        """Send the completion. UNDER_WAY, or how it ended if that is known at once."""
        with execution.lock:
            if execution.completed is not None:  # by the handler itself
                return self._finish(execution, value)
            left = self._clock()
            completion, request = self._completion(execution, value), self._along(execution.hold.key)
            try:
                if request is None or self._claiming is None:
                    ticket = self._step(COMPLETE, self._stream.begin, completion)
                else:
                    self._asked = request, left
                    ticket = self._step(COMPLETE, self._claiming.begin, completion, request)
            except StoreError:  # an injected fault: a stream raises nothing
                return self._finish(execution, value)
        self._under_way[ticket] = execution, value, left
        self._keys.add(execution.hold.key)
        return UNDER_WAY

    def _along(self, key: bytes) -> ClaimRequest | None:
        work, self.next_up = self.next_up, None
        if work is None or self._claiming is None:
            return None
        if work.key == key or work.key in self._keys:
            return None  # a copy: its claim must wait until that completion is told to be done
        return self._request(work)

    def claimed(self) -> Claim | None:
        """The claim that went along with the last completion, and its answer; waits for it. None: none went."""
        if self._asked is None or self._claiming is None:
            return None
        request, left = self._asked
        outcome: ClaimOutcome | None
        try:
            outcome = self._step(CLAIMED, self._claiming.claimed, request)
        except StoreError:  # an injected fault: a stream raises nothing
            outcome = None
        self._asked = None
        return Claim(request, outcome, left)

    def make_room(self, key: bytes) -> None:
        """Before a message is handled: wait until few enough completions are under way, and none for long.

        key: the message's record. If its own completion is under way, the claim would find it busy.
        """
        while self._under_way:
            now = self._clock()
            since = next(iter(self._under_way.values()))[2]
            if len(self._under_way) >= _MOST or now - since >= _LONGEST or key in self._keys:
                self._take(self._answers(self._stream.settle))
                continue
            if now - self._looked_at >= _LOOK:
                self._looked_at = now
                self._take(self._answers(self._stream.poll), all_of_them=False)
            return

    def settle(self) -> None:
        """Wait for all that are under way, and ack what is durable."""
        while self._under_way:
            self._take(self._answers(self._stream.settle))

    def ended(self, work: Work) -> Ending:
        """How one that was under way has ended, after `settle`."""
        return self._ended[work]

    def leave(self) -> None:
        """The window was ended by an error: ack what is durable, if the broker is there, and leave nothing unread."""
        with contextlib.suppress(Exception):  # what ended the window is what counts
            self.settle()
        self._under_way.clear()
        self._stream.settle()

    def _answers(self, ask: Callable[[], list[Settled]]) -> list[Settled]:
        try:
            return self._step(DURABLE, ask)
        except StoreError:  # an injected fault: a stream raises nothing
            return []

    def _take(self, settled: list[Settled], *, all_of_them: bool = True) -> None:
        for one in settled:
            known = self._under_way.pop(one.ticket, None)
            if known is None:
                continue  # its `begin` was reported as failed, and it was finished the ordinary way
            execution, value, _ = known
            self._keys.discard(execution.hold.key)
            act = self._conclude if one.durable else self._finish
            self._note(execution.work, act(execution, value))
        if not settled and all_of_them:
            # It tells nothing of them: nothing may be taken for durable.
            for execution, value, _ in list(self._under_way.values()):
                self._note(execution.work, self._finish(execution, value))
            self._under_way.clear()
            self._keys.clear()

    def _note(self, work: Work, ending: Ending) -> None:
        self._ended[work] = ending
        self.in_doubt = self.in_doubt or ending.how is Ended.IN_DOUBT
