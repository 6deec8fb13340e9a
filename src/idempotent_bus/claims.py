"""Asking a store for the right to run. What it does not answer clearly is in doubt, and is asked again the same way."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from .errors import ConfigurationError, StoreError
from .failing import Silence
from .hooks import ABANDON, CLAIM, RELEASE, Step
from .model import NONCE_BYTES, Claimed, ClaimOutcome, ClaimRequest, Hold
from .policy import Policy
from .store import BatchStore, QuarantineStore, Store
from .work import Work

__all__ = ["Claim", "Claims"]

log = logging.getLogger(__name__)

#: A store error at a claim is answered by asking again, so many times in all; then the message is put off.
_TRIES: Final = 2
#: How many nonces of claims in doubt are remembered.
_MOST_DOUBTFUL: Final = 10_000


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim that was asked for: its request, the answer (None: in doubt), and when, by the worker's clock."""

    request: ClaimRequest
    outcome: ClaimOutcome | None
    asked_at: float

    @property
    def hold(self) -> Hold:
        """The proof of ownership of a claim that won."""
        assert isinstance(self.outcome, Claimed)
        return Hold(self.request.key, self.outcome.token, self.request.nonce)


class Claims:
    """The claims of one executor. Safe for threads."""

    def __init__(self, store: Callable[[], Store], policy: Policy, clock: Callable[[], float], step: Step) -> None:
        self._open = store
        self._policy = policy
        self._clock = clock
        self._step = step
        self._lock = threading.Lock()
        #: By key and fingerprint: the nonce, and whether it was a reservation. The store recognises a nonce whatever
        #: the body, so another body's claim must never carry it: it would run in the place of this one.
        self._doubtful: dict[tuple[bytes, bytes | None], tuple[bytes, bool]] = {}
        self.silence = Silence(policy, clock)

    def store(self) -> Store:
        """The store. Raises ConfigurationError if it cannot do what the policy needs."""
        store = self._open()
        if self._policy.on_abandoned == "quarantine" and not isinstance(store, QuarantineStore):
            raise ConfigurationError(f'{type(store).__name__} has no quarantine, which on_abandoned="quarantine" needs')
        return store

    def singly(self, work: Work, request: ClaimRequest | None = None, *, reserve: bool = False) -> Claim:
        """Claim one message now. request: a claim made before, whose answer was lost or is getting old.

        reserve: without counting an attempt, for what may not be run.
        """
        if request is None:
            request = self.request(work, reserve=reserve)
        late: Claim | None = None
        doubt: object = None
        for _ in range(_TRIES):
            asked_at = self._clock()
            try:
                outcome = self._step(CLAIM, self.store().claim, request)
            except StoreError as error:
                doubt = error
                continue
            claim = Claim(request, outcome, asked_at)
            if not self.is_late(claim):
                self.silence.end()
                return claim
            # Its lease may be over before the handler is: asking again renews it, or shows that it is gone.
            doubt, late = "the store took more than half a lease to answer", claim
        log.warning("claim in scope %s is in doubt, nothing is run: %s", work.scope, doubt)
        self.silence.begin()
        if late is None:
            self.remember(request)
        else:
            self.give_back(late)
        return Claim(request, None, self._clock())

    def together(self, works: Sequence[Work]) -> dict[int, Claim]:
        """Claim first deliveries ahead of their turn, in one round trip; by their place in `works`.

        Only under the policy `rerun`, and only where at least two can be claimed so: see the design's window.
        """
        if len(works) < 2 or self._policy.on_abandoned != "rerun":
            return {}
        try:
            store = self.store()
        except StoreError:
            return {}  # claiming singly will meet the same error, and answers it
        if not isinstance(store, BatchStore):
            return {}
        first: dict[bytes, int] = {}
        for index, work in enumerate(works):
            first.setdefault(work.key, index)
        # Not where an earlier copy in the window is claimed singly: it would find our own reservation in its way.
        chosen = [index for index in first.values() if not works[index].redelivered]
        if len(chosen) < 2:
            return {}
        asked = [self.request(works[index], reserve=True) for index in chosen]
        asked_at = self._clock()
        outcomes: Sequence[ClaimOutcome | None]
        try:
            outcomes = self._step(CLAIM, store.claim_many, asked)
            self.silence.end()
        except StoreError as error:
            # In doubt, so nobody runs on it. Each is claimed singly, with its reservation's nonce: if the
            # reservation was made and only its reply was lost, it is recognised instead of blocking for a lease.
            log.warning("claiming %d messages together failed, claiming them singly: %s", len(asked), error)
            outcomes = [None] * len(asked)
        return {
            index: Claim(request, outcome, asked_at)
            for index, request, outcome in zip(chosen, asked, outcomes, strict=True)
        }

    def remember(self, request: ClaimRequest) -> None:
        """For a message that is put off in doubt: the claim may be ours without our knowing.

        Asked with the same nonce when the message comes back here, it is recognised, instead of blocking for a lease
        and then counting as an attempt.
        """
        with self._lock:
            if len(self._doubtful) < _MOST_DOUBTFUL:
                self._doubtful[request.key, request.fingerprint] = request.nonce, request.reserve

    def give_back(self, claim: Claim) -> bool:
        """Give back a claim whose handler never started: it costs no attempt. False: in doubt."""
        if not isinstance(claim.outcome, Claimed):
            return claim.outcome is not None
        return self.release(claim.hold, claim.outcome.attempt - 1, abandoned=claim.outcome.taken_over) is not None

    def let_go(self, claim: Claim) -> None:
        """Give back the claim of a message that goes back to the broker; what is in doubt is remembered.

        Not one that took over: abandoned again it keeps its nonce, and recognised by that it would count no attempt.
        """
        taken_over = isinstance(claim.outcome, Claimed) and claim.outcome.taken_over
        if not self.give_back(claim) and not taken_over:
            self.remember(claim.request)

    def release(self, hold: Hold, attempts: int, *, abandoned: bool = False) -> bool | None:
        """Give a claim back. abandoned: without saying that nothing was done. None: in doubt, it lapses by itself."""
        try:
            store = self.store()
            name, verb = (ABANDON, store.abandon) if abandoned else (RELEASE, store.release)
            return self._step(name, verb, hold, attempts=attempts, retention=self._policy.retention)
        except StoreError as error:
            # Not needed for safety: the lease lapses by itself, and the attempt was counted at the claim.
            log.warning("could not release a claim, its lease will lapse: %s", error)
            return None

    def is_late(self, claim: Claim) -> bool:
        """True if a claim that won may be over before its handler is: half of its lease has gone by."""
        return isinstance(claim.outcome, Claimed) and self._clock() - claim.asked_at > self._policy.lease / 2

    def request(self, work: Work, *, reserve: bool = False) -> ClaimRequest:
        """What to ask for a message; with the nonce of its claim that was in doubt, if there was one."""
        nonce = None
        if self._doubtful:
            with self._lock:
                nonce, reserve = self._doubtful.pop((work.key, work.fingerprint), (None, reserve))
        return ClaimRequest(
            work.key,
            nonce or work.nonce or os.urandom(NONCE_BYTES),
            self._policy.lease,
            self._policy.retention,
            work.fingerprint,
            work.redrive,
            reserve,
        )
