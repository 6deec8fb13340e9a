"""The Store contract: what a dedup store must do, in prose and types. `tests/contract` holds every store to it.

A store keeps one record per key. It is right if, and only if:

* `claim` is one atomic step: of any number of racers, in any number of processes, exactly one gets `Claimed`.
* Every `Claimed.token` is larger than every token its key had before, even if the record was forgotten between.
* `renew`, `complete`, `release`, `abandon` and `quarantine` compare key, token *and* nonce inside their atomic step.
* Time is the store's own clock, read inside the atomic step; nothing a caller says about the time is used.
* Repeating any call with the same arguments is safe and tells the outcome of the first (a reply may get lost):
  `claim` with a nonce that already holds the record returns the same token and attempt and renews the lease;
  `complete`, `release`, `abandon` and `quarantine` that already happened by the same hold return True again.
* When in doubt it raises `StoreUnavailable`, with the driver's error chained. It never guesses.

The claim's rules, in this order, on the record of the key (a record past its retention counts as absent):

1. absent: insert `RESERVED` if `reserve` else `IN_PROGRESS`, a new token, attempts 0 or 1 -> `Claimed`.
2. held (reserved or in progress) by the same nonce: renew the lease -> the same `Claimed` again (a reservation
   stays a reservation: no attempt is counted).
3. fingerprints differ (both given) and the record is not released -> `Conflict`.
4. completed -> `Completed` with the stored result. Completed is final: nothing but its retention ends it.
5. quarantined -> `Quarantined`; only `resolve` ends it, whatever the redrive number.
6. held by another nonce, lease not lapsed -> `Busy`; costs no attempt and changes nothing.
7. released, or held with a lapsed lease: take it over with a new token, this nonce and this fingerprint;
   attempts start at 0 if `redrive` is larger than the record's; then, unless `reserve`, attempts + 1
   -> `Claimed`, with `taken_over` if it was IN_PROGRESS, or a reservation that had itself taken over such a record and
   never started (not if it was released, or merely reserved): that somebody may have done it is not forgotten.

A claim's `attempt` is the record's attempts, plus one for a reservation. The redrive number of a record only
grows. A claim sets the retention to at least lease + retention from now, so that no live record is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from .model import ClaimOutcome, ClaimRequest, Completion, Hold, Record, Settled

__all__ = [
    "BatchCompletionStore",
    "BatchStore",
    "ClaimingStream",
    "CompletionStream",
    "ForgetStore",
    "LookupStore",
    "PurgeStore",
    "QuarantineStore",
    "Store",
    "StreamStore",
]


class Store(Protocol):
    """Five verbs and a close. Every method is safe to call from several threads at once.

    All durations are seconds. Every method raises `StoreUnavailable` when its outcome is unknown.
    """

    def claim(self, request: ClaimRequest, /) -> ClaimOutcome:
        """Ask for the right to run. See the rules in this module's docstring."""
        ...

    def renew(self, hold: Hold, /, *, lease: float, retention: float) -> bool:
        """Let the lease end `lease` seconds from now. False: ownership was lost; stop, another one may be running.

        A lapsed lease that nobody took over is renewed all the same.
        """
        ...

    def complete(self, hold: Hold, /, *, result: bytes | None, retention: float) -> bool:
        """Make the record completed, for `retention` seconds from now. True only when that is durable.

        A late completion succeeds if nobody took over, and fails (False) if somebody did.
        """
        ...

    def release(self, hold: Hold, /, *, attempts: int, retention: float) -> bool:
        """Give the claim back, with `attempts` as the number counted so far. False: ownership was lost before.

        A handler that raised: the claim's attempt. One that never started: the claim's attempt - 1.
        """
        ...

    def abandon(self, hold: Hold, /, *, attempts: int, retention: float) -> bool:
        """End the lease now, without saying that nothing was done: IN_PROGRESS, lapsed, `attempts` counted.

        For a holder that died in the middle, as its parent saw, or that cannot tell: the next claim takes over, and
        is told so (`taken_over`). False: ownership was lost before, or the record is completed.
        """
        ...

    def close(self) -> None:
        """Let go of connections. May be called twice."""
        ...


@runtime_checkable
class BatchStore(Protocol):
    """A store that does many in one round trip. Each entry stands alone: no entry's failure touches another."""

    def claim_many(self, requests: Sequence[ClaimRequest], /) -> list[ClaimOutcome]:
        """As `claim`, one outcome per request in their order. The keys must differ."""
        ...

    def renew_many(self, holds: Sequence[Hold], /, *, lease: float, retention: float) -> list[bool]:
        """As `renew`, one answer per hold in their order."""
        ...


@runtime_checkable
class BatchCompletionStore(Protocol):
    """A store that makes many records completed in one round trip, or one commit."""

    def complete_many(self, completions: Sequence[Completion], /) -> list[bool]:
        """As `complete`, one answer per completion in their order. The keys must differ.

        Raises StoreUnavailable if the outcome of any is unknown: ask again with all of them, or singly.
        """
        ...


class CompletionStream(Protocol):
    """Completions that are sent at once and not waited for. For one thread at a time.

    It is made for a consumer's window: a completion leaves as soon as its handler has returned, so that the time
    between an effect and its completion does not grow, and the ack follows when it is told to be durable. The tickets
    are 1, 2, 3, ... in the order in which they were begun, and are settled in that order: the first that is not durable
    ends the prefix that may be acked in bulk. Whoever begins them bounds how many are under way (`pending`, and their
    age) before another handler starts. The rules of `complete` hold for each by itself, whatever its neighbours do.

    survives: a completion that was begun arrives although the process is killed at once: it is done, or it has left.
        Where it is not so, a kill may repeat all effects whose completions are under way, and not only the one that it
        struck: so a consumer's window waits for each instead.
    """

    survives: bool

    @property
    def pending(self) -> int:
        """How many were begun and not told of yet by `poll` or `settle`."""
        ...

    def begin(self, completion: Completion, /) -> int:
        """Send a completion, and give its ticket. Raises nothing that the store does: that is told of the ticket.

        It waits only where the store does not keep up at all, or cannot stream.
        """
        ...

    def poll(self, timeout: float = 0.0) -> list[Settled]:
        """Those that have ended since the last time, in the order of their tickets, each told once.

        timeout: seconds to wait for one if none has. Never raises for the store: None is told of the ticket instead,
        and then of every later one that was under way on the same connection.
        """
        ...

    def settle(self) -> list[Settled]:
        """As `poll`, for all that are under way; waits until each of them has ended, well or in doubt."""
        ...

    def close(self) -> None:
        """Let go of the connection. What is under way stays so, and is never told of: `settle` first."""
        ...


@runtime_checkable
class ClaimingStream(CompletionStream, Protocol):
    """A stream that can carry a claim along with a completion, which spares the next message a round trip."""

    def begin(self, completion: Completion, claim: ClaimRequest | None = None, /) -> int:
        """As `CompletionStream.begin`. claim: made in the same step, behind the completion, as `Store.claim` does."""
        ...

    def claimed(self, request: ClaimRequest, /) -> ClaimOutcome | None:
        """The answer to the claim that left with the last completion, told once; waits for it.

        None: nothing is known of its outcome, so ask again with the same request.
        """
        ...


@runtime_checkable
class StreamStore(Protocol):
    """A store that takes completions without making anybody wait for each."""

    def stream(self) -> CompletionStream:
        """A stream of its own, with its own connection. Nothing is connected before the first completion."""
        ...


@runtime_checkable
class ForgetStore(Protocol):
    """A store in which a person can take a record back, so that its biz-id may run again."""

    def forget(self, key: bytes, /) -> bool:
        """Make the key absent: what was completed, released or abandoned is forgotten, with its result and attempts.

        True: there is no record any more, forgotten now or absent before; so a repeat is True too. False: it stays,
        for it is held and its lease has not lapsed (wait for the holder, or for its lease), or it is in quarantine,
        which only `resolve` ends. Whoever held a forgotten record has no say any more, and the next claim's token is
        larger than all before.
        """
        ...


@runtime_checkable
class LookupStore(Protocol):
    """A store that can show a record."""

    def lookup(self, key: bytes, /) -> Record | None:
        """The record, or None if there is none or its retention is over. Decides nothing: it may be stale at once."""
        ...


@runtime_checkable
class PurgeStore(Protocol):
    """A store whose records do not vanish by themselves."""

    def purge(self, *, limit: int = 1000) -> int:
        """Delete at most `limit` records whose retention is over; returns how many. Call until it returns 0."""
        ...


@runtime_checkable
class QuarantineStore(Protocol):
    """A store that can keep an abandoned record for a person: what `on_abandoned="quarantine"` needs."""

    def quarantine(self, hold: Hold, /, *, note: bytes) -> bool:
        """Make a held record QUARANTINED, kept until it is resolved, with a note for the person.

        False: ownership was lost before.
        """
        ...

    def quarantined(self, *, limit: int = 100, after: bytes = b"") -> list[Record]:
        """Quarantined records in the order of their keys, those behind the key `after`; `result` is the note."""
        ...

    def resolve(self, key: bytes, /, *, completed: bool, retention: float) -> bool:
        """A person has decided. True if the record was quarantined and now is not; a repeat is False.

        completed: the effect is there: COMPLETED, without a result, for `retention` seconds. Else it is not: RELEASED,
        with no attempts counted, so that the message runs when it is redriven. Token and redrive number stay; the nonce
        is a new one, so that whoever held the record has no say any more.
        """
        ...
