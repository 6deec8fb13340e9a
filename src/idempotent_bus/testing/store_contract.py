"""The Store contract as tests: every rule of `idempotent_bus.store`, over one fixture, `contract_store`.

The classes know no particular store. To hold a store of your own to the contract, subclass those that apply and give
a fixture `contract_store` that yields a `Subject`. A check takes nothing but the subject, so that it can be called by
hand too: `StoreContract().test_...(subject)`; that is how the mutants are judged.

Where time matters, a short lease is one that may lapse at any moment and is then outlasted, and a long one never
lapses during a test: no check depends on being quick.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from ..model import Busy, Claimed, ClaimOutcome, ClaimRequest, Completed, Conflict, Hold, State
from ..store import Store

__all__ = ["StoreContract", "Subject"]

T = TypeVar("T")

#: Seconds. A lease or a retention that a test outlasts, and one that no test outlives.
SHORT = 0.2
LONG = 600.0
#: What the subtraction of two large floats may add to a duration.
ROUNDING = 1e-6


def sleep_past(seconds: float) -> None:
    """Outlast a duration on a store with a clock of its own. The margin covers clocks that tick in milliseconds."""
    time.sleep(seconds + 0.05)


@dataclass
class Subject:
    """A store to be held to the contract.

    open: gives a Store over the same records each time, as another process would have it. outlast: lets more than
    so many seconds pass by the store's clock. url, options: what `open_store` takes in another process, if records
    can be reached from there. open_down: gives a store whose server is not there.
    """

    open: Callable[[], Store]
    outlast: Callable[[float], None] = sleep_past
    url: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    open_down: Callable[[], Store] | None = None

    @cached_property
    def store(self) -> Any:
        """The store that most checks use."""
        # Any: the capabilities beyond `Store` are reached through it too.
        return self.open()

    def close(self) -> None:
        """Close it, if it was opened."""
        if "store" in self.__dict__:
            self.store.close()


def new_key() -> bytes:
    return os.urandom(16)


def ask(key: bytes, **changes: Any) -> ClaimRequest:
    """A claim of `key` with a nonce of its own, a long lease and a long retention, unless told otherwise."""
    values: dict[str, Any] = {"nonce": os.urandom(16), "lease": LONG, "retention": LONG}
    return ClaimRequest(key, **(values | changes))


def won(outcome: ClaimOutcome) -> Claimed:
    assert isinstance(outcome, Claimed), f"expected a won claim, got {outcome}"
    return outcome


def take(store: Store, key: bytes, **changes: Any) -> tuple[Hold, Claimed]:
    """Claim `key`, insist on winning, and give the hold."""
    request = ask(key, **changes)
    claimed = won(store.claim(request))
    return Hold(key, claimed.token, request.nonce), claimed


def complete(store: Store, hold: Hold, result: bytes | None = b"done", retention: float = LONG) -> bool:
    return store.complete(hold, result=result, retention=retention)


def release(store: Store, hold: Hold, attempts: int = 1, retention: float = LONG) -> bool:
    return store.release(hold, attempts=attempts, retention=retention)


def abandon(store: Store, hold: Hold, attempts: int = 1, retention: float = LONG) -> bool:
    return store.abandon(hold, attempts=attempts, retention=retention)


def renew(store: Store, hold: Hold, lease: float = LONG, retention: float = LONG) -> bool:
    return store.renew(hold, lease=lease, retention=retention)


def race(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run all calls at once, each in a thread of its own that waits for all others; their results, in order."""
    barrier = threading.Barrier(len(calls))
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(number: int, call: Callable[[], T]) -> None:
        try:
            barrier.wait(60)
            results[number] = call()
        except BaseException as error:  # noqa: BLE001 - carried into the test's own thread below
            errors.append(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    assert len(results) == len(calls), "a racer never came back"
    return [results[number] for number in range(len(calls))]


def claim_race(store: Store, key: bytes, racers: int) -> list[ClaimOutcome]:
    requests = [ask(key) for _ in range(racers)]
    return race([lambda request=request: store.claim(request) for request in requests])  # type: ignore[misc]


def only_winner(outcomes: Sequence[ClaimOutcome]) -> Claimed:
    winners = [outcome for outcome in outcomes if isinstance(outcome, Claimed)]
    assert len(winners) == 1, f"{len(winners)} of {len(outcomes)} racers won"
    assert all(isinstance(outcome, Claimed | Busy) for outcome in outcomes)
    return winners[0]


def stale(hold: Hold) -> list[Hold]:
    """Holds that are wrong in one thing only: an older or newer token, and nonces that a collation might fold."""
    swapped = hold.nonce.swapcase() if hold.nonce.swapcase() != hold.nonce else hold.nonce[::-1]
    return [
        Hold(hold.key, hold.token - 1, hold.nonce),
        Hold(hold.key, hold.token + 1, hold.nonce),
        Hold(hold.key, hold.token, os.urandom(16)),
        Hold(hold.key, hold.token, swapped),
        Hold(hold.key, hold.token, hold.nonce[:-1] + bytes([hold.nonce[-1] ^ 1])),
    ]


class ClaimContract:
    """Who wins, and what the others hear."""

    def test_first_claim_wins_as_attempt_one(self, contract_store: Subject) -> None:
        """Rule 1: an absent record is claimed, as attempt 1, taken over from nobody."""
        _, claimed = take(contract_store.store, new_key())
        assert (claimed.attempt, claimed.taken_over) == (1, False)

    def test_one_of_100_racing_threads_wins(self, contract_store: Subject) -> None:
        """Of 100 racing threads exactly one gets the claim; the others are told that it is busy."""
        assert only_winner(claim_race(contract_store.store, new_key(), 100)).attempt == 1

    def test_one_racer_takes_over_a_lapsed_lease(self, contract_store: Subject) -> None:
        """Of racers for a lapsed lease exactly one takes it over."""
        key = new_key()
        take(contract_store.store, key, lease=SHORT)
        contract_store.outlast(SHORT)
        claimed = only_winner(claim_race(contract_store.store, key, 20))
        assert (claimed.attempt, claimed.taken_over) == (2, True)

    def test_one_racer_takes_a_released_record(self, contract_store: Subject) -> None:
        """Of racers for a released record exactly one gets it."""
        key = new_key()
        hold, _ = take(contract_store.store, key)
        assert release(contract_store.store, hold)
        claimed = only_winner(claim_race(contract_store.store, key, 20))
        assert (claimed.attempt, claimed.taken_over) == (2, False)

    def test_late_completion_and_takeover_exclude_each_other(self, contract_store: Subject) -> None:
        """A late completion racing a takeover: exactly one of the two happens, and both sides know which."""
        store = contract_store.store
        keys = [new_key() for _ in range(10)]
        holds = [take(store, key, lease=SHORT)[0] for key in keys]
        contract_store.outlast(SHORT)
        for hold in holds:
            request = ask(hold.key)
            calls: list[Callable[[], object]] = [
                lambda hold=hold: complete(store, hold),  # type: ignore[misc]
                lambda request=request: store.claim(request),  # type: ignore[misc]
            ]
            done, outcome = race(calls)
            assert isinstance(outcome, Completed if done else Claimed)

    def test_the_same_nonce_is_recognised(self, contract_store: Subject) -> None:
        """Rule 2: a claimer that asks again gets the same token and attempt, and no attempt is counted."""
        store, key = contract_store.store, new_key()
        request = ask(key)
        first = won(store.claim(request))
        assert store.claim(request) == first
        assert store.claim(request) == first
        assert release(store, Hold(key, first.token, request.nonce), attempts=first.attempt)
        assert take(store, key)[1].attempt == 2

    def test_the_same_nonce_is_recognised_in_a_race_with_itself(self, contract_store: Subject) -> None:
        """A claim sent several times at once by one claimer (a driver's silent retry) is one claim."""
        store, request = contract_store.store, ask(new_key())
        outcomes = race([lambda: store.claim(request)] * 10)
        assert len(set(outcomes)) == 1
        assert won(outcomes[0]).attempt == 1

    def test_a_takeover_asked_again_is_still_a_takeover(self, contract_store: Subject) -> None:
        """Rule 2: a takeover whose reply was lost is told again as one: a quarantine depends on it."""
        store, key = contract_store.store, new_key()
        take(store, key, lease=SHORT)
        contract_store.outlast(SHORT)
        request = ask(key)
        first = won(store.claim(request))
        assert first.taken_over
        assert store.claim(request) == first
        assert renew(store, Hold(key, first.token, request.nonce))
        assert store.claim(request) == first

    def test_the_same_nonce_renews_the_lease(self, contract_store: Subject) -> None:
        """Rule 2: asking again renews the lease, from now."""
        store, key = contract_store.store, new_key()
        nonce = os.urandom(16)
        take(store, key, nonce=nonce, lease=SHORT)
        take(store, key, nonce=nonce, lease=LONG)
        contract_store.outlast(SHORT)
        assert isinstance(store.claim(ask(key)), Busy)

    def test_the_same_nonce_keeps_a_lapsed_lease(self, contract_store: Subject) -> None:
        """Rule 2 comes before rule 6: a late repeat of the same claim is not a takeover and counts no attempt."""
        store, key = contract_store.store, new_key()
        nonce = os.urandom(16)
        _, first = take(store, key, nonce=nonce, lease=SHORT)
        contract_store.outlast(SHORT)
        assert take(store, key, nonce=nonce)[1] == first
        assert isinstance(store.claim(ask(key)), Busy)

    def test_nonces_that_look_alike_are_different(self, contract_store: Subject) -> None:
        """A nonce is compared byte by byte: no case, no padding, no end at a NUL."""
        store = contract_store.store
        tail = os.urandom(8)
        pairs = [(b"a", b"A"), (b"a ", b"a\0"), (b"\0a", b"\0b"), (b"\xe9", b"e"), (b"%", b"_")]
        for left, right in pairs:
            for one, other in (
                (left.ljust(8) + tail, right.ljust(8) + tail),
                (tail + left.rjust(8), tail + right.rjust(8)),
            ):
                key = new_key()
                take(store, key, nonce=one)
                assert isinstance(store.claim(ask(key, nonce=other)), Busy)

    def test_busy_says_when_and_changes_nothing(self, contract_store: Subject) -> None:
        """Rule 5: busy tells the time until the lease ends, costs no attempt, and leaves the holder in place."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key, lease=60.0, redrive=1)
        for _ in range(5):
            outcome = store.claim(ask(key, lease=LONG * 2, redrive=7))
            assert isinstance(outcome, Busy)
            assert 30.0 < outcome.retry_after <= 60.0 + ROUNDING
        assert release(store, hold, attempts=1)
        assert take(store, key, redrive=1)[1].attempt == 2  # had a busy claim left its redrive, it would be 1

    def test_busy_does_not_lengthen_a_lease(self, contract_store: Subject) -> None:
        """A duplicate that asks again and again cannot keep an abandoned claim alive."""
        store, key = contract_store.store, new_key()
        take(store, key, lease=SHORT)
        store.claim(ask(key))
        contract_store.outlast(SHORT)
        assert take(store, key)[1].taken_over

    def test_a_lapsed_lease_is_taken_over(self, contract_store: Subject) -> None:
        """Rule 6: a lapsed lease goes to the next claim, with a higher token, the next attempt, and `taken_over`."""
        store, key = contract_store.store, new_key()
        _, first = take(store, key, lease=SHORT)
        contract_store.outlast(SHORT)
        _, second = take(store, key)
        assert second.token > first.token
        assert (second.attempt, second.taken_over) == (2, True)

    def test_the_new_holder_is_protected(self, contract_store: Subject) -> None:
        """After a takeover the record is busy for everybody but the new holder, the old one included."""
        store, key = contract_store.store, new_key()
        nonce = os.urandom(16)
        take(store, key, nonce=nonce, lease=SHORT)
        contract_store.outlast(SHORT)
        hold, _ = take(store, key)
        assert isinstance(store.claim(ask(key, nonce=nonce)), Busy)
        assert complete(store, hold)

    def test_attempts_are_counted_by_the_claim(self, contract_store: Subject) -> None:
        """I12: an attempt that dies without a word has been counted, because the claim itself counts."""
        store, key = contract_store.store, new_key()
        for attempt in (1, 2, 3):
            assert take(store, key, lease=SHORT)[1].attempt == attempt
            contract_store.outlast(SHORT)

    def test_tokens_only_grow(self, contract_store: Subject) -> None:
        """I6: every claim of a key gets a larger token, however the claim before it ended."""
        store, key = contract_store.store, new_key()
        tokens = []
        for _ in range(20):
            hold, claimed = take(store, key)
            tokens.append(claimed.token)
            assert release(store, hold, attempts=0)
        assert tokens == sorted(set(tokens))

    def test_several_stores_share_the_records(self, contract_store: Subject) -> None:
        """Two stores opened on the same place see one another's records."""
        other = contract_store.open()
        try:
            key = new_key()
            hold, _ = take(contract_store.store, key)
            assert isinstance(other.claim(ask(key)), Busy)
            assert complete(other, hold, b"by the other")
            assert contract_store.store.claim(ask(key)) == Completed(b"by the other")
        finally:
            if other is not contract_store.store:
                other.close()

    def test_many_threads_do_not_mix_up_answers(self, contract_store: Subject) -> None:
        """20 threads with keys of their own through one store object: each gets its own answers."""
        store = contract_store.store

        def work() -> list[bool]:
            good = []
            for _ in range(10):
                key = new_key()
                hold, _ = take(store, key)
                good.append(renew(store, hold) and complete(store, hold, key))
                good.append(store.claim(ask(key)) == Completed(key))
            return good

        assert all(all(good) for good in race([work] * 20))


class ReservationContract:
    """Claims ahead of their turn."""

    def test_a_reservation_counts_no_attempt(self, contract_store: Subject) -> None:
        """A reservation tells the number that its run would have, and counts nothing; starting it counts one."""
        store, key = contract_store.store, new_key()
        hold, reserved = take(store, key, reserve=True)
        assert (reserved.attempt, reserved.taken_over) == (1, False)
        assert release(store, hold, attempts=reserved.attempt - 1)
        hold, reserved = take(store, key, reserve=True)
        assert reserved.attempt == 1
        assert release(store, hold, attempts=reserved.attempt)  # it was started, and raised
        assert take(store, key, reserve=True)[1].attempt == 2

    def test_a_lapsed_reservation_is_not_taken_over(self, contract_store: Subject) -> None:
        """A reservation that lapsed had not started: the next claim has a higher token but no doubt, no attempt."""
        store, key = contract_store.store, new_key()
        _, reserved = take(store, key, lease=SHORT, reserve=True)
        contract_store.outlast(SHORT)
        _, claimed = take(store, key)
        assert claimed.token > reserved.token
        assert (claimed.attempt, claimed.taken_over) == (1, False)

    def test_a_reservation_of_an_abandoned_record_says_so(self, contract_store: Subject) -> None:
        """Reserving a record that was abandoned in the middle of its run reports `taken_over`."""
        store, key = contract_store.store, new_key()
        take(store, key, lease=SHORT)
        contract_store.outlast(SHORT)
        _, reserved = take(store, key, reserve=True)
        assert (reserved.attempt, reserved.taken_over) == (2, True)

    def test_a_reservation_that_lapsed_passes_the_doubt_on(self, contract_store: Subject) -> None:
        """Rule 7: abandoned, then only reserved, and again, and again as a repeat: the next claim still hears of it."""
        store, key = contract_store.store, new_key()
        take(store, key, lease=SHORT)
        contract_store.outlast(SHORT)
        for _ in range(2):
            hold, reserved = take(store, key, lease=SHORT, reserve=True)
            assert (reserved.attempt, reserved.taken_over) == (2, True)
            assert take(store, key, nonce=hold.nonce, lease=SHORT)[1] == reserved
            assert renew(store, hold, lease=SHORT)
            contract_store.outlast(SHORT)
        _, claimed = take(store, key)
        assert (claimed.attempt, claimed.taken_over) == (2, True)

    def test_the_doubt_ends_with_a_release_or_with_the_record(self, contract_store: Subject) -> None:
        """A reservation that took over and was released, or was forgotten, leaves no doubt to later reservations."""
        store, released, forgotten = contract_store.store, new_key(), new_key()
        for key in (released, forgotten):
            assert abandon(store, take(store, key)[0])
        hold, reserved = take(store, released, reserve=True)
        assert reserved.taken_over
        assert release(store, hold, attempts=1)
        take(store, forgotten, reserve=True, lease=SHORT / 2, retention=SHORT / 2)
        contract_store.outlast(SHORT)
        for key in (released, forgotten):
            assert not take(store, key, reserve=True, lease=SHORT)[1].taken_over
        contract_store.outlast(SHORT)
        for key in (released, forgotten):
            assert not take(store, key)[1].taken_over

    def test_a_reservation_repeated_stays_one(self, contract_store: Subject) -> None:
        """Rule 2: the same nonce again, even as a full claim, finds the reservation as it was: no attempt counted."""
        store, key = contract_store.store, new_key()
        nonce = os.urandom(16)
        _, reserved = take(store, key, nonce=nonce, lease=SHORT, reserve=True)
        assert take(store, key, nonce=nonce, lease=SHORT)[1] == reserved
        contract_store.outlast(SHORT)
        assert not take(store, key)[1].taken_over

    def test_a_reservation_is_busy_for_others_and_can_complete(self, contract_store: Subject) -> None:
        """A reservation holds the record as a claim does: others are busy, its owner renews and completes."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key, reserve=True)
        assert isinstance(store.claim(ask(key)), Busy)
        assert isinstance(store.claim(ask(key, reserve=True)), Busy)
        assert renew(store, hold)
        assert complete(store, hold)
        assert store.claim(ask(key, reserve=True)) == Completed(b"done")


class AbandonContract:
    """The lease ends at once, and nobody says that nothing was done."""

    def test_an_abandoned_claim_is_taken_over_at_once(self, contract_store: Subject) -> None:
        """A long lease that is abandoned keeps nobody waiting; of racers one takes over, and is told so."""
        store, key = contract_store.store, new_key()
        hold, first = take(store, key)
        assert abandon(store, hold, attempts=first.attempt)
        claimed = only_winner(claim_race(store, key, 10))
        assert (claimed.attempt, claimed.taken_over) == (2, True)
        assert claimed.token > first.token

    def test_abandoning_writes_the_count(self, contract_store: Subject) -> None:
        """As a release does, it decides what was counted, of a claim and of a reservation."""
        store, key = contract_store.store, new_key()
        for attempts, reserve in ((0, False), (7, False), (0, True), (1000, True)):
            hold, _ = take(store, key, reserve=reserve)
            assert abandon(store, hold, attempts=attempts)
            hold, claimed = take(store, key)
            assert (claimed.attempt, claimed.taken_over) == (attempts + 1, True)
            assert release(store, hold, attempts=0)

    def test_an_abandoned_reservation_is_in_doubt(self, contract_store: Subject) -> None:
        """Given back without being started, but the doubt that it found is there for the next."""
        store, key = contract_store.store, new_key()
        assert abandon(store, take(store, key)[0], attempts=1)
        hold, reserved = take(store, key, reserve=True)
        assert (reserved.attempt, reserved.taken_over) == (2, True)
        assert abandon(store, hold, attempts=reserved.attempt - 1)
        _, claimed = take(store, key)
        assert (claimed.attempt, claimed.taken_over) == (2, True)

    def test_abandon_repeated_returns_true(self, contract_store: Subject) -> None:
        """Its reply may be lost; asked again it is True, until somebody took over: then it changes nothing."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key)
        assert [abandon(store, hold) for _ in range(3)] == [True] * 3
        new, _ = take(store, key)
        assert not abandon(store, hold, attempts=9)
        assert isinstance(store.claim(ask(key)), Busy)
        assert release(store, new, attempts=2)
        assert not abandon(store, hold)
        assert take(store, key)[1].attempt == 3

    def test_what_was_abandoned_may_still_be_completed(self, contract_store: Subject) -> None:
        """The holder was thought dead and was not: its late completion, or renewal, stands if nobody took over."""
        store = contract_store.store
        done, _ = take(store, new_key())
        assert abandon(store, done)
        assert complete(store, done, b"late")
        assert not abandon(store, done)
        assert store.claim(ask(done.key)) == Completed(b"late")
        alive, _ = take(store, new_key())
        assert abandon(store, alive)
        assert renew(store, alive)
        assert isinstance(store.claim(ask(alive.key)), Busy)

    def test_what_was_given_back_is_not_abandoned(self, contract_store: Subject) -> None:
        """After a release it is said that nothing was done: abandoning comes too late."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key)
        assert release(store, hold)
        assert not abandon(store, hold)
        assert not take(store, key)[1].taken_over

    def test_abandoning_sets_the_retention(self, contract_store: Subject) -> None:
        """Its own retention counts, from now: neither what is left of the claim's, nor for ever."""
        store = contract_store.store
        kept, _ = take(store, new_key(), lease=SHORT, retention=0.01)
        brief, _ = take(store, new_key())
        assert abandon(store, kept, retention=LONG)
        assert abandon(store, brief, retention=SHORT)
        contract_store.outlast(SHORT + 0.01)
        assert take(store, kept.key)[1].taken_over
        assert not abandon(store, brief)
        _, again = take(store, brief.key)
        assert (again.attempt, again.taken_over) == (1, False)

    def test_what_is_abandoned_keeps_its_fingerprint_and_redrive(self, contract_store: Subject) -> None:
        """Another body cannot have it; a copy from before the redrive does not start the count afresh."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key, fingerprint=b"finger A", redrive=2)
        assert abandon(store, hold, attempts=4)
        assert store.claim(ask(key, fingerprint=b"finger B")) == Conflict(State.IN_PROGRESS)
        _, claimed = take(store, key, fingerprint=b"finger A", redrive=2)
        assert claimed.attempt == 5


class OwnershipContract:
    """renew, complete, release and abandon are for the owner: token and nonce, each alone."""

    def test_a_stale_hold_can_do_nothing(self, contract_store: Subject) -> None:
        """A hold with only the token wrong, or only the nonce, neither renews, completes, releases nor abandons."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key)
        for other in stale(hold):
            assert not renew(store, other)
            assert not complete(store, other, b"stale")
            assert not release(store, other, attempts=9)
            assert not abandon(store, other, attempts=9)
        assert isinstance(store.claim(ask(key)), Busy)
        assert complete(store, hold, b"owner")
        assert store.claim(ask(key)) == Completed(b"owner")

    def test_the_superseded_holder_can_do_nothing(self, contract_store: Subject) -> None:
        """A holder whose lapsed lease was taken over can neither renew, nor complete, nor release (a zombie)."""
        store, key = contract_store.store, new_key()
        old, _ = take(store, key, lease=SHORT)
        contract_store.outlast(SHORT)
        new, _ = take(store, key)
        assert not renew(store, old)
        assert not complete(store, old, b"zombie")
        assert not release(store, old)
        assert not abandon(store, old)
        assert renew(store, new)
        assert complete(store, new, b"owner")
        assert not release(store, old)
        assert store.claim(ask(key)) == Completed(b"owner")

    def test_a_nonce_used_again_does_not_revive_an_old_token(self, contract_store: Subject) -> None:
        """The token alone must tell two claims apart that came with the same nonce."""
        store, key = contract_store.store, new_key()
        nonce = os.urandom(16)
        old, _ = take(store, key, nonce=nonce)
        assert release(store, old)
        new, _ = take(store, key, nonce=nonce)
        assert new.token > old.token
        assert not renew(store, old)
        assert not complete(store, old, b"old")
        assert not release(store, old)
        assert not abandon(store, old)
        assert complete(store, new, b"new")
        assert not complete(store, old, b"old")

    def test_an_unknown_record_belongs_to_nobody(self, contract_store: Subject) -> None:
        """Without a record no hold is good, and asking makes none."""
        store, key = contract_store.store, new_key()
        hold = Hold(key, 1, os.urandom(16))
        assert not renew(store, hold)
        assert not complete(store, hold)
        assert not release(store, hold)
        assert not abandon(store, hold)
        assert take(store, key)[1].attempt == 1

    def test_renew_lengthens_the_lease(self, contract_store: Subject) -> None:
        """A renewed lease ends `lease` seconds from the renewal."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key, lease=SHORT)
        assert renew(store, hold, lease=LONG)
        contract_store.outlast(SHORT)
        outcome = store.claim(ask(key))
        assert isinstance(outcome, Busy)
        assert LONG / 2 < outcome.retry_after <= LONG + ROUNDING

    def test_renew_may_shorten_the_lease(self, contract_store: Subject) -> None:
        """A renewal counts from now: it can end a lease early, and the record is then abandoned."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key)
        assert renew(store, hold, lease=SHORT)
        contract_store.outlast(SHORT)
        assert take(store, key)[1].taken_over

    def test_a_lapsed_lease_that_nobody_took_is_renewed(self, contract_store: Subject) -> None:
        """A late renewal succeeds if nobody took over."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key, lease=SHORT)
        contract_store.outlast(SHORT)
        assert renew(store, hold)
        assert isinstance(store.claim(ask(key)), Busy)

    def test_a_late_completion_succeeds_if_nobody_took_over(self, contract_store: Subject) -> None:
        """The lease lapsed, nobody came: the completion stands."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key, lease=SHORT)
        contract_store.outlast(SHORT)
        assert complete(store, hold, b"late")
        assert store.claim(ask(key)) == Completed(b"late")

    def test_a_late_release_succeeds_if_nobody_took_over(self, contract_store: Subject) -> None:
        """The lease lapsed, nobody came: the record is released and the next claim is not in doubt."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key, lease=SHORT)
        contract_store.outlast(SHORT)
        assert release(store, hold)
        assert not take(store, key)[1].taken_over

    def test_repeats_return_true(self, contract_store: Subject) -> None:
        """A completion or release whose reply was lost is asked again and returns True again."""
        store = contract_store.store
        done, _ = take(store, new_key())
        assert [complete(store, done, b"x") for _ in range(3)] == [True] * 3
        given, _ = take(store, new_key())
        assert [release(store, given) for _ in range(3)] == [True] * 3
        assert take(store, given.key)[1].attempt == 2
        assert not release(store, given)  # it was true until somebody else took it

    def test_completed_is_final(self, contract_store: Subject) -> None:
        """I6: nothing that even its own holder does changes a completed record, nor does a redrive."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key)
        assert complete(store, hold, b"first")
        assert complete(store, hold, b"second")
        assert not release(store, hold)
        assert not abandon(store, hold)
        assert not renew(store, hold)
        assert store.claim(ask(key, redrive=9)) == Completed(b"first")
        assert store.claim(ask(key, nonce=hold.nonce)) == Completed(b"first")
        assert store.claim(ask(key, reserve=True)) == Completed(b"first")

    def test_a_completion_repeated_does_not_shorten_the_retention(self, contract_store: Subject) -> None:
        """A repeat of a completion leaves the retention that the first one set."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key)
        assert complete(store, hold)
        complete(store, hold, retention=SHORT)
        contract_store.outlast(SHORT)
        assert store.claim(ask(key)) == Completed(b"done")

    def test_a_released_record_is_not_completed_or_renewed(self, contract_store: Subject) -> None:
        """What was given back cannot be completed or renewed: a claim must come first."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key)
        assert release(store, hold)
        assert not complete(store, hold)
        assert not renew(store, hold)
        assert take(store, key)[1].attempt == 2

    def test_release_writes_the_count(self, contract_store: Subject) -> None:
        """A release decides what was counted: the next claim is one more than that, also after several rounds."""
        store, key = contract_store.store, new_key()
        for attempts, expected in ((1, 2), (0, 1), (7, 8), (1000, 1001)):
            hold, _ = take(store, key)
            assert release(store, hold, attempts=attempts)
            hold, claimed = take(store, key)
            assert (claimed.attempt, claimed.taken_over) == (expected, False)
            assert release(store, hold, attempts=claimed.attempt)


class FingerprintContract:
    """The same biz-id with another body."""

    A, B = b"\0finger\0", b"\0fingeR\0"

    def test_another_fingerprint_conflicts(self, contract_store: Subject) -> None:
        """Rule 3: in progress, reserved, abandoned or completed, another fingerprint is a conflict, with the state."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key, fingerprint=self.A)
        assert store.claim(ask(key, fingerprint=self.B)) == Conflict(State.IN_PROGRESS)
        assert isinstance(store.claim(ask(key, fingerprint=self.A)), Busy)
        assert complete(store, hold)
        assert store.claim(ask(key, fingerprint=self.B)) == Conflict(State.COMPLETED)
        assert store.claim(ask(key, fingerprint=self.A)) == Completed(b"done")

        reserved = new_key()
        take(store, reserved, fingerprint=self.A, reserve=True)
        assert store.claim(ask(reserved, fingerprint=self.B)) == Conflict(State.RESERVED)

    def test_an_abandoned_record_still_conflicts(self, contract_store: Subject) -> None:
        """Another body cannot take over a lapsed lease, and its attempt leaves no trace."""
        store, key = contract_store.store, new_key()
        take(store, key, lease=SHORT, fingerprint=self.A)
        contract_store.outlast(SHORT)
        assert store.claim(ask(key, fingerprint=self.B, redrive=5)) == Conflict(State.IN_PROGRESS)
        assert take(store, key, fingerprint=self.A)[1].attempt == 2

    def test_a_released_record_takes_the_newest(self, contract_store: Subject) -> None:
        """A released record conflicts with nothing; it takes the fingerprint of the claim that gets it."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key, fingerprint=self.A)
        assert release(store, hold)
        assert take(store, key, fingerprint=self.B)[1].attempt == 2
        assert store.claim(ask(key, fingerprint=self.A)) == Conflict(State.IN_PROGRESS)
        assert isinstance(store.claim(ask(key, fingerprint=self.B)), Busy)

    def test_without_a_fingerprint_nothing_conflicts(self, contract_store: Subject) -> None:
        """None on either side compares with nothing."""
        store = contract_store.store
        for first, second in ((None, self.A), (self.A, None), (None, None)):
            key = new_key()
            hold, _ = take(store, key, fingerprint=first)
            assert isinstance(store.claim(ask(key, fingerprint=second)), Busy)
            assert complete(store, hold)
            assert store.claim(ask(key, fingerprint=second)) == Completed(b"done")

    def test_a_takeover_takes_the_new_fingerprint(self, contract_store: Subject) -> None:
        """Rule 6: the record of a takeover has the fingerprint of the claim that took it."""
        store, key = contract_store.store, new_key()
        take(store, key, lease=SHORT)
        contract_store.outlast(SHORT)
        take(store, key, fingerprint=self.A)
        assert store.claim(ask(key, fingerprint=self.B)) == Conflict(State.IN_PROGRESS)
        assert isinstance(store.claim(ask(key, fingerprint=self.A)), Busy)

    def test_the_holder_itself_does_not_conflict(self, contract_store: Subject) -> None:
        """Rule 2 comes before rule 3: the holder's own nonce is recognised whatever it says of the body."""
        store, key = contract_store.store, new_key()
        nonce = os.urandom(16)
        _, first = take(store, key, nonce=nonce, fingerprint=self.A)
        assert take(store, key, nonce=nonce, fingerprint=self.B)[1] == first

    def test_zero_bytes_are_a_fingerprint_too(self, contract_store: Subject) -> None:
        """Eight zero bytes are not the same as none, nor are spaces the same as zeros."""
        store, key = contract_store.store, new_key()
        take(store, key, fingerprint=bytes(8))
        assert store.claim(ask(key, fingerprint=b" " * 8)) == Conflict(State.IN_PROGRESS)


class RedriveContract:
    """A person moved the message back from the dead letter."""

    def test_a_larger_redrive_starts_afresh(self, contract_store: Subject) -> None:
        """I12: a redrive number above the record's starts the attempts again; the same number goes on counting."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key)
        assert release(store, hold, attempts=5)
        hold, claimed = take(store, key, redrive=1)
        assert claimed.attempt == 1
        assert release(store, hold, attempts=claimed.attempt)
        hold, claimed = take(store, key, redrive=1)
        assert claimed.attempt == 2
        assert release(store, hold, attempts=claimed.attempt)
        assert take(store, key, redrive=2, reserve=True)[1].attempt == 1

    def test_the_redrive_number_only_grows(self, contract_store: Subject) -> None:
        """A copy from before the redrive neither resets the count nor takes the number back."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key, redrive=3)
        assert release(store, hold, attempts=1)
        hold, claimed = take(store, key, redrive=1)
        assert claimed.attempt == 2
        assert release(store, hold, attempts=2)
        assert take(store, key, redrive=3)[1].attempt == 3

    def test_a_redrive_waits_for_a_live_holder(self, contract_store: Subject) -> None:
        """In progress stays busy, whatever the redrive; abandoned, it is taken over as attempt 1, in doubt."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key)
        assert isinstance(store.claim(ask(key, redrive=1)), Busy)
        assert renew(store, hold, lease=SHORT)
        contract_store.outlast(SHORT)
        _, claimed = take(store, key, redrive=1)
        assert (claimed.attempt, claimed.taken_over) == (1, True)


class RetentionContract:
    """What is forgotten, and what never."""

    def test_a_completed_record_is_forgotten_after_its_retention(self, contract_store: Subject) -> None:
        """Past its retention a completed record counts as absent, but tokens go on: the next one is larger."""
        store, key = contract_store.store, new_key()
        hold, first = take(store, key, fingerprint=bytes(8), redrive=4)
        assert complete(store, hold, retention=SHORT)
        contract_store.outlast(SHORT)
        assert not complete(store, hold)
        request = ask(key, fingerprint=b"another!")
        again = won(store.claim(request))
        assert again.token > first.token
        assert (again.attempt, again.taken_over) == (1, False)
        assert not renew(store, hold)
        assert complete(store, Hold(key, again.token, request.nonce))

    def test_a_released_record_is_forgotten_after_its_retention(self, contract_store: Subject) -> None:
        """Past its retention a released record counts as absent: attempts start at 1 with a larger token."""
        store, key = contract_store.store, new_key()
        hold, first = take(store, key)
        assert release(store, hold, attempts=5, retention=SHORT)
        contract_store.outlast(SHORT)
        assert not release(store, hold)
        _, again = take(store, key)
        assert again.attempt == 1
        assert again.token > first.token

    def test_an_abandoned_record_is_kept_for_its_retention(self, contract_store: Subject) -> None:
        """A lapsed lease is not a forgotten record: attempts and doubt last for the retention after the lease."""
        store, key = contract_store.store, new_key()
        take(store, key, lease=SHORT, retention=LONG)
        contract_store.outlast(SHORT)
        assert take(store, key)[1].taken_over
        brief = new_key()
        _, first = take(store, brief, lease=SHORT / 2, retention=SHORT / 2)
        contract_store.outlast(SHORT)
        _, again = take(store, brief)
        assert again.token > first.token
        assert (again.attempt, again.taken_over) == (1, False)

    def test_a_live_record_is_never_forgotten(self, contract_store: Subject) -> None:
        """A retention shorter than the lease does not end a running claim; neither does a renewal's."""
        store = contract_store.store
        claimed, _ = take(store, new_key(), lease=LONG, retention=0.01)
        renewed, _ = take(store, new_key())
        assert renew(store, renewed, lease=LONG, retention=0.01)
        repeated, _ = take(store, new_key())
        take(store, repeated.key, nonce=repeated.nonce, lease=LONG, retention=0.01)
        contract_store.outlast(SHORT)
        for hold in (claimed, renewed, repeated):
            assert isinstance(store.claim(ask(hold.key)), Busy)
            assert complete(store, hold)

    def test_completion_sets_the_retention(self, contract_store: Subject) -> None:
        """The completion's own retention counts, not what is left of the claim's."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key, lease=SHORT, retention=0.01)
        assert complete(store, hold, retention=LONG)
        contract_store.outlast(SHORT + 0.01)
        assert store.claim(ask(key)) == Completed(b"done")

    def test_release_sets_the_retention(self, contract_store: Subject) -> None:
        """The release's own retention counts, so that attempts are not forgotten before the retry comes."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key, lease=SHORT, retention=0.01)
        assert release(store, hold, attempts=3, retention=LONG)
        contract_store.outlast(SHORT + 0.01)
        assert take(store, key)[1].attempt == 4

    def test_renew_sets_the_retention(self, contract_store: Subject) -> None:
        """A renewal keeps the record for lease + retention from then on."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key, lease=SHORT, retention=0.01)
        assert renew(store, hold, lease=SHORT, retention=LONG)
        contract_store.outlast(SHORT + 0.01)
        assert take(store, key)[1].taken_over


class WithoutResultContract:
    """Completed without a result: most records end so, and a store may keep them in a shorter form."""

    def test_completed_without_a_result_is_final(self, contract_store: Subject) -> None:
        """I6: nothing that even its own holder does changes it, nor does a redrive; nor is a result put in later."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key)
        assert complete(store, hold, None)
        assert not release(store, hold)
        assert not abandon(store, hold)
        assert not renew(store, hold)
        assert complete(store, hold, b"second")
        for changes in ({"redrive": 9}, {"nonce": hold.nonce}, {"reserve": True}, {}):
            assert store.claim(ask(key, **changes)) == Completed(None)

    def test_only_its_hold_repeats_a_completion_without_a_result(self, contract_store: Subject) -> None:
        """A completion whose reply was lost is True again; for a hold that is wrong in one thing it is False."""
        store = contract_store.store
        for fingerprint in (None, bytes(8)):
            hold, _ = take(store, new_key(), fingerprint=fingerprint)
            assert [complete(store, hold, None) for _ in range(3)] == [True] * 3
            for other in stale(hold):
                assert not complete(store, other, None)
                assert not complete(store, other, b"stale")
            assert complete(store, hold, None)

    def test_the_superseded_holder_does_not_repeat_it(self, contract_store: Subject) -> None:
        """I2: who was taken over hears False before and after the new holder completed, and changes nothing."""
        store, key = contract_store.store, new_key()
        old, _ = take(store, key, lease=SHORT)
        contract_store.outlast(SHORT)
        new, claimed = take(store, key)
        assert claimed.taken_over
        assert not complete(store, old, None)
        assert complete(store, new, None)
        for call in (complete, renew, release, abandon):
            assert not call(store, old)
        assert complete(store, new, None)
        assert store.claim(ask(key)) == Completed(None)

    def test_its_body_is_compared(self, contract_store: Subject) -> None:
        """I8: the same body is a duplicate, another is a conflict; None compares with nothing; zeros are a body."""
        store = contract_store.store
        for fingerprint, conflicts in ((b"\0finger\0", True), (bytes(8), True), (None, False)):
            hold, _ = take(store, new_key(), fingerprint=fingerprint)
            assert complete(store, hold, None)
            other = store.claim(ask(hold.key, fingerprint=b"\0fingeR\0"))
            assert other == (Conflict(State.COMPLETED) if conflicts else Completed(None))
            assert store.claim(ask(hold.key, fingerprint=fingerprint)) == Completed(None)
            assert store.claim(ask(hold.key)) == Completed(None)

    def test_it_is_kept_whatever_it_went_through(self, contract_store: Subject) -> None:
        """Reserved, late, after a thousand attempts, or redriven: completed is completed."""
        store = contract_store.store
        reserved, _ = take(store, new_key(), reserve=True)
        late, _ = take(store, new_key(), lease=SHORT)
        contract_store.outlast(SHORT)
        many, _ = take(store, new_key())
        assert release(store, many, attempts=1000)
        many, _ = take(store, many.key)
        redriven, _ = take(store, new_key(), redrive=1_000_000)
        for hold in (reserved, late, many, redriven):
            assert complete(store, hold, None)
            assert complete(store, hold, None)
            assert store.claim(ask(hold.key, redrive=2_000_000)) == Completed(None)

    def test_it_is_forgotten_after_its_retention(self, contract_store: Subject) -> None:
        """Past its retention it counts as absent, and the next token is larger."""
        store = contract_store.store
        hold, _ = take(store, new_key())
        assert complete(store, hold, None, retention=SHORT)
        contract_store.outlast(SHORT)
        assert not complete(store, hold, None)
        new, claimed = take(store, hold.key)
        assert claimed.attempt == 1
        assert new.token > hold.token


class ValuesContract:
    """Bytes go in and come out as they were."""

    def test_results_come_back_as_they_were(self, contract_store: Subject) -> None:
        """Every byte value, nothing, None, text that looks like a number, and a megabyte."""
        store = contract_store.store
        megabyte = os.urandom(1024) * 1024
        for result in (None, b"", b"\0", bytes(range(256)), b"0", b"17", b" x ", b"%s \\ ' \"", b"\xff\xfe", megabyte):
            hold, _ = take(store, new_key())
            assert complete(store, hold, result)
            outcome = store.claim(ask(hold.key))
            assert isinstance(outcome, Completed)
            assert outcome.result == result
            assert (outcome.result is None) is (result is None)

    def test_keys_never_fold(self, contract_store: Subject) -> None:
        """I10: keys that differ in one byte are different, at either end: case, NUL, spaces, every byte value."""
        store = contract_store.store
        middle = os.urandom(14)
        keys = [bytes([byte]) + middle + b"." for byte in range(256)] + [
            b"." + middle + bytes([byte]) for byte in range(256) if byte != ord(".")
        ]
        assert len(set(keys)) == len(keys)
        tokens = []
        for key in keys:
            hold, claimed = take(store, key)  # a fold would be Busy or Completed
            tokens.append((claimed.attempt, claimed.taken_over))
            assert complete(store, hold, key)
        assert set(tokens) == {(1, False)}
        for key in keys[::7]:
            assert store.claim(ask(key)) == Completed(key)

    def test_large_numbers_are_kept(self, contract_store: Subject) -> None:
        """Attempts and redrives of a million survive, and so does a lease of many years."""
        store, key = contract_store.store, new_key()
        hold, _ = take(store, key, lease=3e8, retention=3e8, redrive=1_000_000)
        outcome = store.claim(ask(key))
        assert isinstance(outcome, Busy)
        assert 2.9e8 < outcome.retry_after <= 3e8 + ROUNDING
        assert release(store, hold, attempts=1_000_000)
        assert take(store, key, redrive=1_000_000)[1].attempt == 1_000_001

    def test_close_twice(self, contract_store: Subject) -> None:
        """A store may be closed twice, and its records outlive it."""
        store, key = contract_store.open(), new_key()
        hold, _ = take(store, key)
        assert complete(store, hold)
        store.close()
        store.close()
        assert contract_store.store.claim(ask(key)) == Completed(b"done")


class StoreContract(
    ClaimContract,
    ReservationContract,
    AbandonContract,
    OwnershipContract,
    FingerprintContract,
    RedriveContract,
    RetentionContract,
    WithoutResultContract,
    ValuesContract,
):
    """What every store must do. The capabilities have classes of their own in `capabilities`."""
