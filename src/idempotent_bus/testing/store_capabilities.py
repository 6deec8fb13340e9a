"""The parts of the Store contract that only some stores can be held to: each class belongs to one capability."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..errors import StoreUnavailable
from ..model import (
    Busy,
    Claimed,
    ClaimOutcome,
    ClaimRequest,
    Completed,
    Completion,
    Conflict,
    Hold,
    Quarantined,
    Record,
    State,
)
from ..store import (
    BatchCompletionStore,
    BatchStore,
    ClaimingStream,
    ForgetStore,
    LookupStore,
    PurgeStore,
    QuarantineStore,
    StreamStore,
)
from .store_contract import (
    LONG,
    ROUNDING,
    SHORT,
    Subject,
    abandon,
    ask,
    complete,
    new_key,
    race,
    release,
    renew,
    stale,
    take,
    won,
)

__all__ = [
    "BatchContract",
    "CompletionsContract",
    "ForgetContract",
    "LookupContract",
    "PurgeContract",
    "QuarantineContract",
    "SharedContract",
]

A, B = b"\0finger\0", b"\0fingeR\0"


class BatchContract:
    """Many in one round trip, each by itself."""

    def test_it_is_a_batch_store(self, contract_store: Subject) -> None:
        """The capability is declared by its methods."""
        assert isinstance(contract_store.store, BatchStore)

    def test_a_batch_agrees_with_the_single_verbs(self, contract_store: Subject) -> None:
        """Over records in every state, `claim_many` answers as `claim` does, entry by entry, and leaves the same."""
        store = contract_store.store
        singly = _records_in_every_state(contract_store)
        together = _records_in_every_state(contract_store)
        single = [store.claim(request) for request in singly]
        batch = store.claim_many(together)
        assert [_shape(outcome) for outcome in batch] == [_shape(outcome) for outcome in single]
        kinds = {type(outcome) for outcome in batch}
        assert kinds == {Claimed, Busy, Completed, Conflict}
        after = [_shape(store.claim(ask(request.key))) for request in together]
        assert after == [_shape(store.claim(ask(request.key))) for request in singly]

    def test_a_claim_in_a_batch_is_owned(self, contract_store: Subject) -> None:
        """What a batch won is held like any other claim, repeated like any other, and busy for others."""
        store = contract_store.store
        requests = [ask(new_key(), reserve=number % 2 == 0) for number in range(50)]
        claims = [won(outcome) for outcome in store.claim_many(requests)]
        assert store.claim_many(requests) == claims
        assert all(isinstance(store.claim(ask(request.key)), Busy) for request in requests[:5])
        for request, claimed in zip(requests, claims, strict=True):
            assert complete(store, Hold(request.key, claimed.token, request.nonce), request.key)
        assert store.claim_many(requests) == [Completed(request.key) for request in requests]

    def test_one_racer_wins_each_key_of_overlapping_batches(self, contract_store: Subject) -> None:
        """Batches that race over the same keys, in different orders: each key has exactly one winner."""
        store = contract_store.store
        keys = [new_key() for _ in range(20)]

        def claim_all(number: int) -> list[tuple[bytes, ClaimOutcome]]:
            order = keys[number:] + keys[:number]
            if number % 2:
                order = order[::-1]
            return list(zip(order, store.claim_many([ask(key) for key in order]), strict=True))

        winners: dict[bytes, int] = defaultdict(int)
        for outcomes in race([lambda number=number: claim_all(number) for number in range(8)]):  # type: ignore[misc]
            for key, outcome in outcomes:
                winners[key] += isinstance(outcome, Claimed)
        assert sorted(winners.values()) == [1] * len(keys)

    def test_renewals_stand_alone(self, contract_store: Subject) -> None:
        """`renew_many` answers for each hold by itself, and really renews the good ones."""
        store = contract_store.store
        good = [take(store, new_key(), lease=SHORT)[0] for _ in range(3)]
        done, _ = take(store, new_key())
        assert complete(store, done)
        holds = [
            good[0],
            good[1]._replace(token=good[1].token + 1),
            Hold(new_key(), 1, os.urandom(16)),
            good[1],
            done,
            good[2]._replace(nonce=os.urandom(16)),
            good[2],
        ]
        expected = [True, False, False, True, False, False, True]
        assert store.renew_many(holds, lease=LONG, retention=LONG) == expected
        contract_store.outlast(SHORT)
        assert all(isinstance(store.claim(ask(hold.key)), Busy) for hold in good)

    def test_an_empty_batch_is_nothing(self, contract_store: Subject) -> None:
        """No entries, no answers, no error."""
        assert contract_store.store.claim_many([]) == []
        assert contract_store.store.renew_many([], lease=LONG, retention=LONG) == []

    def test_a_large_batch(self, contract_store: Subject) -> None:
        """A thousand entries in one call come back in their order."""
        store = contract_store.store
        requests = [ask(new_key(), redrive=number) for number in range(1000)]
        claims = [won(outcome) for outcome in store.claim_many(requests)]
        holds = [Hold(request.key, claim.token, request.nonce) for request, claim in zip(requests, claims, strict=True)]
        assert len({hold.token for hold in holds}) <= len(holds)
        assert store.renew_many(holds, lease=LONG, retention=LONG) == [True] * 1000
        assert complete(store, holds[617], b"617")
        again = store.claim_many([ask(request.key) for request in requests])
        assert [number for number, outcome in enumerate(again) if outcome == Completed(b"617")] == [617]


class CompletionsContract:
    """Many completions at once, or sent without waiting; each by itself."""

    def test_it_declares_itself(self, contract_store: Subject) -> None:
        """The capabilities are declared by their methods."""
        assert isinstance(contract_store.store, BatchCompletionStore)
        assert isinstance(contract_store.store, StreamStore)

    def test_completions_together_agree_with_single_ones(self, contract_store: Subject) -> None:
        """Over holds of every kind `complete_many` answers as `complete` does, entry by entry, and leaves the same."""
        store = contract_store.store
        for size in (1, 100):
            singly, together = _holds_of_every_kind(contract_store, size), _holds_of_every_kind(contract_store, size)
            single = [store.complete(one.hold, result=one.result, retention=one.retention) for one in singly]
            assert set(single) == {True, False}
            if size == 1:
                assert [store.complete_many([one]) for one in together] == [[answer] for answer in single]
            else:
                assert store.complete_many(together) == single
            assert store.complete_many(together) == single  # a repeat tells the outcome of the first
            left = [[_shape(store.claim(ask(one.hold.key))) for one in group] for group in (singly, together)]
            assert left[0] == left[1]

    def test_no_completions_are_nothing(self, contract_store: Subject) -> None:
        """No entries, no answers, no error."""
        assert contract_store.store.complete_many([]) == []

    def test_completions_together_keep_their_retention(self, contract_store: Subject) -> None:
        """Each entry's own retention counts."""
        store = contract_store.store
        holds = [take(store, new_key())[0] for _ in range(6)]
        asked = [Completion(hold, None, SHORT if number % 2 else LONG) for number, hold in enumerate(holds)]
        assert store.complete_many(asked) == [True] * 6
        contract_store.outlast(SHORT)
        found = [isinstance(store.claim(ask(hold.key)), Completed) for hold in holds]
        assert found == [True, False] * 3

    def test_completions_together_race_with_takeovers(self, contract_store: Subject) -> None:
        """Late completions of two batches in different orders, racing claims: each record goes to one of them."""
        store = contract_store.store
        holds = [take(store, new_key(), lease=SHORT)[0] for _ in range(30)]
        contract_store.outlast(SHORT)
        asked = [Completion(hold, b"late", LONG) for hold in holds]
        calls: list[Any] = [
            lambda: store.complete_many(asked),
            lambda: store.complete_many(asked[::-1])[::-1],
            lambda: store.claim_many([ask(hold.key) for hold in holds]),
        ]
        one, other, claims = race(calls)
        assert one == other, "a completion and its repeat hear the same"
        assert [not isinstance(claim, Claimed) for claim in claims] == one

    def test_a_stream_tells_of_each_in_order(self, contract_store: Subject) -> None:
        """Tickets count from 1, and are told once each, in their order, with the answer that `complete` would give."""
        store = contract_store.store
        singly, streamed = (_holds_of_every_kind(contract_store, 40) for _ in range(2))
        expected = [store.complete(one.hold, result=one.result, retention=one.retention) for one in singly]
        stream = store.stream()
        assert stream.pending == 0
        assert stream.poll() == stream.settle() == []
        told: list[Any] = []
        for number, one in enumerate(streamed, 1):
            assert stream.begin(one) == number
            assert stream.pending == number - len(told)
            if number % 7 == 0:
                told += stream.poll()
        told += stream.settle()
        assert stream.pending == 0
        assert [settled.ticket for settled in told] == list(range(1, len(streamed) + 1))
        assert [settled.durable for settled in told] == expected
        for one in streamed:  # what was begun is found at once by everybody
            assert stream.begin(one)
        assert [settled.durable for settled in stream.settle()] == expected
        stream.close()
        stream.close()
        left = [[_shape(store.claim(ask(one.hold.key))) for one in group] for group in (singly, streamed)]
        assert left[0] == left[1]

    def test_what_is_told_is_durable(self, contract_store: Subject) -> None:
        """I4: when a stream tells True, another store object finds the record completed."""
        store = contract_store.store
        stream, other = store.stream(), contract_store.open()
        holds = {}
        for _ in range(50):
            hold, _ = take(store, new_key())
            holds[stream.begin(Completion(hold, hold.key, LONG))] = hold
            for settled in stream.poll():
                assert settled.durable is True
                assert other.claim(ask(holds.pop(settled.ticket).key)).result is not None
        while holds:
            for settled in stream.poll(10.0):
                assert other.claim(ask(holds[settled.ticket].key)) == Completed(holds.pop(settled.ticket).key)
        stream.close()
        if other is not store:
            other.close()

    def test_many_streams_at_once(self, contract_store: Subject) -> None:
        """Streams of several threads, beside single completions: each is told of its own."""
        store = contract_store.store

        def work(number: int) -> bool:
            stream = store.stream()
            wrong, told = set(), {}
            for place in range(60):
                hold, _ = take(store, new_key())
                if place % 5 == number % 5:
                    hold = hold._replace(nonce=os.urandom(16))
                    wrong.add(place + 1)
                stream.begin(Completion(hold, None, LONG))
                told.update({settled.ticket: settled.durable for settled in stream.poll()})
            told.update({settled.ticket: settled.durable for settled in stream.settle()})
            stream.close()
            return told == {place: place not in wrong for place in range(1, 61)}

        assert race([lambda number=number: work(number) for number in range(5)]) == [True] * 5  # type: ignore[misc]

    def test_a_claim_goes_along_with_a_completion(self, contract_store: Subject) -> None:
        """Where a stream can: a claim behind a completion answers as `claim` does, however the completion ends."""
        store = contract_store.store
        stream = store.stream()
        if not isinstance(stream, ClaimingStream):
            stream.close()
            return
        singly, along = (_holds_of_every_kind(contract_store, 40) for _ in range(2))
        for one, other in zip(singly, along, strict=True):
            store.complete(one.hold, result=one.result, retention=one.retention)
            expected = [store.claim(ask(new_key())), store.claim(ask(one.hold.key))]
            asked = [ask(new_key()), ask(other.hold.key)]
            answers = []
            for request in asked:
                stream.begin(other, request)
                answers.append(stream.claimed(request))
                assert stream.claimed(request) is None, "it is told once"
            assert [_shape(answer) for answer in answers] == [_shape(outcome) for outcome in expected]
            assert store.claim(asked[0]) == answers[0], "it is the same claim"
        stream.begin(along[0], asked[0])
        stream.begin(along[0])
        assert stream.claimed(asked[0]) is None, "it did not leave with the last one"
        assert [settled.ticket for settled in stream.settle()] == list(range(1, 2 * len(along) + 3))
        stream.close()


def _holds_of_every_kind(subject: Subject, size: int) -> list[Completion]:
    """Completions that are right, late, repeated, of another hold, and of records that are over."""
    store = subject.store
    holds: list[Hold] = []
    for number in range(max(size // 10, 1)):
        late, _ = take(store, new_key(), lease=SHORT)
        lost, _ = take(store, new_key(), lease=SHORT)
        holds += [late, lost]
        done, _ = take(store, new_key(), fingerprint=A)
        assert complete(store, done, None if number % 2 else b"first")
        others, _ = take(store, new_key(), fingerprint=A)
        assert complete(store, others, None if number % 2 else b"first")
        holds += [others._replace(nonce=os.urandom(16))]
        given, _ = take(store, new_key())
        assert release(store, given)
        mine, _ = take(store, new_key(), fingerprint=B, redrive=number % 2)
        reserved, _ = take(store, new_key(), reserve=True)
        good, _ = take(store, new_key())
        wrong, _ = take(store, new_key())
        holds += [done, given, mine, reserved, good, wrong._replace(token=wrong.token + 1)]
        holds += [Hold(new_key(), 1, os.urandom(16)), take(store, new_key())[0]._replace(nonce=os.urandom(16))]
    subject.outlast(SHORT)
    for lost in holds[1::11]:
        take(store, lost.key)
    results = [None, b"", b"\0\xffresult", None]
    return [Completion(hold, results[number % 4], LONG) for number, hold in enumerate(holds)]


def _records_in_every_state(subject: Subject) -> list[ClaimRequest]:
    """Records, absent to completed, and for each the claims that tell the rules apart."""
    store = subject.store
    requests = [ask(new_key()), ask(new_key(), reserve=True), ask(new_key(), redrive=3, fingerprint=A)]
    lapsed = []
    left, _ = take(store, new_key())
    assert abandon(store, left, attempts=1)
    passed, _ = take(store, new_key())
    assert abandon(store, passed, attempts=1)
    take(store, passed.key, lease=SHORT, reserve=True)
    lapsed += [ask(left.key), ask(passed.key)]
    for fingerprint in (None, A, B):
        for reserve in (False, True):
            for redrive in (0, 2):
                changes: dict[str, Any] = {"fingerprint": fingerprint, "reserve": reserve, "redrive": redrive}
                held, _ = take(store, new_key(), fingerprint=A)
                requests += [ask(held.key, **changes)]
                mine, _ = take(store, new_key(), fingerprint=A, reserve=reserve)
                requests += [ask(mine.key, nonce=mine.nonce, **changes)]
                done, _ = take(store, new_key(), fingerprint=A)
                assert complete(store, done, b"result")
                requests += [ask(done.key, **changes)]
                given, _ = take(store, new_key(), fingerprint=A, redrive=1)
                assert release(store, given, attempts=4)
                requests += [ask(given.key, **changes)]
                for started in (True, False):
                    old, _ = take(store, new_key(), lease=SHORT, fingerprint=A, reserve=not started)
                    lapsed += [ask(old.key, **changes)]
    subject.outlast(SHORT)
    return requests + lapsed


def _shape(outcome: ClaimOutcome) -> object:
    """An outcome without what differs between two runs: the token and the moment."""
    if isinstance(outcome, Claimed):
        return outcome._replace(token=0)
    return Busy if isinstance(outcome, Busy) else outcome


class LookupContract:
    """What a person or a tool sees."""

    def test_it_shows_each_state(self, contract_store: Subject) -> None:
        """A look-up shows state, token, attempts, redrive, fingerprint, result and the times that are left."""
        store, key = contract_store.store, new_key()
        assert isinstance(store, LookupStore)
        assert store.lookup(key) is None
        nonce = os.urandom(16)
        hold, claimed = take(store, key, nonce=nonce, reserve=True, fingerprint=A, redrive=2, lease=60.0)
        record = store.lookup(key)
        assert _still(record) == (key, State.RESERVED, claimed.token, 0, 2, A, None)
        assert 30 < record.lease_left <= 60 + ROUNDING
        assert 60 < record.retention_left <= 60 + LONG + ROUNDING
        assert release(store, hold, attempts=3)
        record = store.lookup(key)
        assert _still(record) == (key, State.RELEASED, claimed.token, 3, 2, A, None)
        assert record.lease_left == 0
        hold, claimed = take(store, key)
        assert _still(store.lookup(key)) == (key, State.IN_PROGRESS, claimed.token, 4, 2, None, None)
        assert complete(store, hold, b"\0\xffresult")
        record = store.lookup(key)
        assert _still(record) == (key, State.COMPLETED, claimed.token, 4, 2, None, b"\0\xffresult")
        assert record.lease_left == 0
        assert LONG / 2 < record.retention_left <= LONG + ROUNDING

    def test_it_changes_nothing(self, contract_store: Subject) -> None:
        """A look-up neither renews, nor counts, nor takes over, nor brings back what was forgotten."""
        store = contract_store.store
        live, _ = take(store, new_key())
        lapsing, _ = take(store, new_key(), lease=SHORT)
        forgotten, _ = take(store, new_key())
        assert complete(store, forgotten, retention=SHORT)
        for _ in range(3):
            assert _still(store.lookup(live.key)) == _still(store.lookup(live.key))
            store.lookup(lapsing.key)
            store.lookup(forgotten.key)
        contract_store.outlast(SHORT)
        record = store.lookup(lapsing.key)
        assert (record.state, record.lease_left, record.attempts) == (State.IN_PROGRESS, 0, 1)
        assert store.lookup(forgotten.key) is None
        assert renew(store, live)
        assert take(store, lapsing.key)[1].taken_over
        assert take(store, forgotten.key)[1].attempt == 1

    def test_an_empty_result_is_not_none(self, contract_store: Subject) -> None:
        """A look-up tells an empty result from no result."""
        store = contract_store.store
        for result in (b"", None):
            hold, _ = take(store, new_key())
            assert complete(store, hold, result)
            assert store.lookup(hold.key).result == result


def _still(record: Record | None) -> tuple[object, ...]:
    """A record without what the clock changes."""
    assert record is not None
    return (
        record.key,
        record.state,
        record.token,
        record.attempts,
        record.redrive,
        record.fingerprint,
        record.result,
    )


class PurgeContract:
    """Records that do not vanish by themselves are swept."""

    def test_it_deletes_what_is_over_and_nothing_else(self, contract_store: Subject) -> None:
        """A purge stops at its limit, ends at 0, and leaves live, abandoned and kept records alone."""
        store = contract_store.store
        assert isinstance(store, PurgeStore)
        while store.purge():
            pass
        over = []
        for _ in range(5):
            hold, claimed = take(store, new_key())
            assert complete(store, hold, retention=SHORT)
            over.append(claimed.token)
        live, _ = take(store, new_key(), retention=0.01)
        kept, _ = take(store, new_key())
        assert complete(store, kept)
        abandoned, _ = take(store, new_key(), lease=SHORT)
        last, last_claim = take(store, new_key())
        assert release(store, last, retention=SHORT)
        contract_store.outlast(SHORT)

        assert store.purge(limit=2) == 2
        assert [store.purge(limit=3), store.purge(limit=3), store.purge()] == [3, 1, 0]
        assert isinstance(store.claim(ask(live.key)), Busy)
        assert store.claim(ask(kept.key)) == Completed(b"done")
        assert take(store, abandoned.key)[1].taken_over
        _, again = take(store, last.key)
        assert again.token > last_claim.token, "a purge must not make tokens start again"
        assert again.attempt == 1


class ForgetContract:
    """A person takes a record back: its biz-id may run again, and nothing else is loosened."""

    def test_it_is_a_forget_store(self, contract_store: Subject) -> None:
        """The capability is declared by its methods."""
        assert isinstance(contract_store.store, ForgetStore)

    def test_what_is_over_is_forgotten(self, contract_store: Subject) -> None:
        """Completed, released or abandoned: absent afterwards; the next claim is attempt 1, with any body."""
        store = contract_store.store
        done, _ = take(store, new_key(), fingerprint=A, redrive=4)
        assert complete(store, done, b"result")
        bare, _ = take(store, new_key(), fingerprint=A)
        assert complete(store, bare, None)
        given, _ = take(store, new_key(), fingerprint=A, redrive=4)
        assert release(store, given, attempts=5)
        left, _ = take(store, new_key(), fingerprint=A, redrive=4)
        assert abandon(store, left, attempts=5)
        lapsed, _ = take(store, new_key(), lease=SHORT, fingerprint=A)
        contract_store.outlast(SHORT)
        for hold in (done, bare, given, left, lapsed):
            assert store.forget(hold.key)
            if isinstance(store, LookupStore):
                assert store.lookup(hold.key) is None
            new, claimed = take(store, hold.key, fingerprint=B)
            assert (claimed.attempt, claimed.taken_over) == (1, False)
            assert claimed.token > hold.token, "tokens must go on growing past what was forgotten"
            assert complete(store, new, b"again")
            assert store.claim(ask(hold.key, fingerprint=B)) == Completed(b"again")

    def test_what_is_held_is_not_forgotten(self, contract_store: Subject) -> None:
        """Held, and its lease not lapsed: refused, and the holder goes on as if nobody had asked."""
        store = contract_store.store
        for reserve in (False, True):
            hold, _ = take(store, new_key(), reserve=reserve)
            assert not store.forget(hold.key)
            assert isinstance(store.claim(ask(hold.key)), Busy)
            assert renew(store, hold)
            assert not store.forget(hold.key)
            assert complete(store, hold)
            assert store.claim(ask(hold.key)) == Completed(b"done")

    def test_a_quarantined_record_is_not_forgotten(self, contract_store: Subject) -> None:
        """Rule 5: only `resolve` ends a quarantine; what was resolved may be forgotten."""
        store = contract_store.store
        hold, _ = take(store, new_key(), lease=SHORT)
        assert store.quarantine(hold, note=b"note")
        contract_store.outlast(SHORT)
        assert not store.forget(hold.key)
        assert store.claim(ask(hold.key)) == Quarantined()
        assert store.resolve(hold.key, completed=True, retention=LONG)
        assert store.forget(hold.key)
        assert take(store, hold.key)[1].attempt == 1

    def test_what_is_absent_is_forgotten_already(self, contract_store: Subject) -> None:
        """An absent or forgotten key, and one past its retention, is True: a repeat tells the outcome of the first."""
        store = contract_store.store
        assert store.forget(new_key())
        past, _ = take(store, new_key())
        assert complete(store, past, retention=SHORT)
        done, _ = take(store, new_key())
        assert complete(store, done)
        contract_store.outlast(SHORT)
        assert store.forget(past.key)
        for _ in range(2):
            assert store.forget(done.key)
        assert take(store, past.key)[1].token > past.token

    def test_who_held_what_was_forgotten_has_no_say(self, contract_store: Subject) -> None:
        """I2: a holder that comes back, before or after the next claim, can do nothing."""
        store = contract_store.store
        left, _ = take(store, new_key())
        assert abandon(store, left)
        done, _ = take(store, new_key())
        assert complete(store, done)
        for hold in (left, done):
            assert store.forget(hold.key)
            for _ in range(2):
                assert not renew(store, hold)
                assert not complete(store, hold, b"late")
                assert not release(store, hold)
                assert not abandon(store, hold)
                new, _ = take(store, hold.key)
                assert not complete(store, hold, b"late")
                assert release(store, new)

    def test_forgetting_and_claiming_exclude_each_other(self, contract_store: Subject) -> None:
        """Claims racing with a forgetting: one winner at most, tokens still grow, a winner is never forgotten."""
        store = contract_store.store
        for _ in range(10):
            hold, _ = take(store, new_key())
            assert complete(store, hold)
            requests = [ask(hold.key) for _ in range(4)]
            calls: list[Any] = [lambda request=request: store.claim(request) for request in requests]
            calls.insert(2, lambda hold=hold: store.forget(hold.key))
            outcomes = race(calls)
            del outcomes[2]
            winners = [
                Hold(hold.key, outcome.token, request.nonce)
                for outcome, request in zip(outcomes, requests, strict=True)
                if isinstance(outcome, Claimed)
            ]
            assert len(winners) <= 1
            for winner in winners:
                assert winner.token > hold.token
                assert not store.forget(hold.key)
                assert complete(store, winner)


class QuarantineContract:
    """What was abandoned in the middle is kept for a person, and nothing runs until the person has decided."""

    def test_it_is_a_quarantine_store(self, contract_store: Subject) -> None:
        """The capability is declared by its methods."""
        assert isinstance(contract_store.store, QuarantineStore)

    def test_nothing_runs_over_a_quarantined_record(self, contract_store: Subject) -> None:
        """Rule 5: no claim wins it, whatever its redrive number, its nonce, or the time; another body conflicts."""
        store, key = contract_store.store, new_key()
        hold = quarantine(store, key, lease=SHORT, fingerprint=A)
        for _ in range(2):
            asked = [ask(key, redrive=9), ask(key, reserve=True), ask(key, nonce=hold.nonce), ask(key, fingerprint=A)]
            other = ask(key, fingerprint=B, nonce=hold.nonce)
            assert [store.claim(request) for request in asked] == [Quarantined()] * 4
            assert store.claim(other) == Conflict(State.QUARANTINED)
            if isinstance(store, BatchStore):
                assert store.claim_many([ask(new_key()), asked[0]])[1] == Quarantined()
                assert store.claim_many([other]) == [Conflict(State.QUARANTINED)]
            contract_store.outlast(SHORT)

    def test_its_holder_can_do_nothing(self, contract_store: Subject) -> None:
        """Who put it there cannot complete, renew, release or abandon it any more, nor take its note back."""
        store, key = contract_store.store, new_key()
        hold = quarantine(store, key)
        assert not complete(store, hold)
        assert not renew(store, hold)
        assert not release(store, hold)
        assert not abandon(store, hold)
        if isinstance(store, BatchStore):
            assert store.renew_many([hold], lease=LONG, retention=LONG) == [False]
        assert store.claim(ask(key)) == Quarantined()
        assert shown(store)[key].result == b"note"

    def test_it_is_kept_until_it_is_resolved(self, contract_store: Subject) -> None:
        """I1: neither the claim's retention nor a purge ends it."""
        store, key = contract_store.store, new_key()
        quarantine(store, key, lease=SHORT / 2, retention=SHORT / 2)
        contract_store.outlast(2 * SHORT)
        if isinstance(store, PurgeStore):
            while store.purge():
                pass
        assert store.claim(ask(key)) == Quarantined()
        assert shown(store)[key].retention_left > 10 * 365 * 86_400

    def test_a_record_is_shown_with_its_note(self, contract_store: Subject) -> None:
        """The list, and a look-up, show the record as it was held, and the note byte for byte."""
        store = contract_store.store
        notes = [b"note", b"", b"\0\xff' %s", os.urandom(100_000)]
        keys = [new_key() for _ in notes]
        for key, note in zip(keys, notes, strict=True):
            hold, claimed = take(store, key, fingerprint=A, redrive=3)
            assert store.quarantine(hold, note=note)
            record = shown(store)[key]
            assert _still(record) == (key, State.QUARANTINED, claimed.token, 1, 3, A, note)
            assert record.lease_left == 0
            if isinstance(store, LookupStore):
                assert store.lookup(key) == record

    def test_who_may_quarantine(self, contract_store: Subject) -> None:
        """The holder of a claim or a reservation, late or abandoned too, again and again; nobody else."""
        store = contract_store.store
        reserved, _ = take(store, new_key(), reserve=True)
        late, _ = take(store, new_key(), lease=SHORT)
        lost, _ = take(store, new_key(), lease=SHORT)
        forgotten, _ = take(store, new_key(), lease=SHORT / 2, retention=SHORT / 2)
        left, _ = take(store, new_key())
        assert abandon(store, left)
        contract_store.outlast(SHORT)
        new, _ = take(store, lost.key)
        done, _ = take(store, new_key())
        assert complete(store, done)
        given, _ = take(store, new_key())
        assert release(store, given)
        for hold in (reserved, late, left):
            for other in stale(hold):
                assert not store.quarantine(other, note=b"stale")
            assert store.quarantine(hold, note=b"first")
            assert store.quarantine(hold, note=b"again")
            for other in stale(hold):
                assert not store.quarantine(other, note=b"stale")
            assert shown(store)[hold.key].result == b"first"
        for hold in (lost, forgotten, done, given, Hold(new_key(), 1, os.urandom(16))):
            assert not store.quarantine(hold, note=b"not yours")
        assert renew(store, new)
        assert store.claim(ask(done.key)) == Completed(b"done")
        assert not take(store, given.key)[1].taken_over
        assert take(store, forgotten.key)[1].attempt == 1

    def test_a_quarantine_and_a_takeover_exclude_each_other(self, contract_store: Subject) -> None:
        """A late quarantine racing claims: either it stands and nobody runs, or one took over and it is told no."""
        store = contract_store.store
        holds = [take(store, new_key(), lease=SHORT)[0] for _ in range(10)]
        contract_store.outlast(SHORT)
        for hold in holds:
            calls: list[Any] = [lambda hold=hold: store.quarantine(hold, note=b"note")]
            requests = [ask(hold.key) for _ in range(3)]
            calls += [lambda request=request: store.claim(request) for request in requests]
            stands, *outcomes = race(calls)
            assert sum(isinstance(outcome, Claimed) for outcome in outcomes) == (not stands)
            assert {type(outcome) for outcome in outcomes} <= ({Quarantined} if stands else {Claimed, Busy})

    def test_the_list_is_in_order_and_in_pages(self, contract_store: Subject) -> None:
        """Page by page, each behind the last key of the one before: every quarantined record once, in key order."""
        store = contract_store.store
        base = new_key()
        near = [base[:-1] + bytes([byte]) for byte in (0, 1, 127, 128, 255)]
        keys = sorted({bytes(16), b"\xff" * 16, *near, *(new_key() for _ in range(12))})
        for key in keys:
            quarantine(store, key)
        others = [take(store, new_key())[0] for _ in range(3)]
        assert complete(store, others[0])
        assert release(store, others[1])
        for size in (1, 5, 1000):
            found = list(shown(store, size))
            assert found == sorted(set(found))
            assert set(keys) <= set(found)
            assert not {hold.key for hold in others} & set(found)
        assert store.quarantined(limit=0) == []
        assert store.quarantined(after=b"\xff" * 16) == []
        assert [record.key for record in store.quarantined(limit=2, after=near[1])] == _next(found, near[1], 2)
        assert [record.key for record in store.quarantined(limit=2, after=base[:1])] == _next(found, base[:1], 2)
        for key in keys:
            assert store.resolve(key, completed=True, retention=SHORT)
        assert not set(keys) & set(shown(store))
        # These two are the same in every run.
        contract_store.outlast(SHORT)

    def test_resolved_as_done(self, contract_store: Subject) -> None:
        """The effect is there: every copy is a duplicate from now on, without a result, for the retention given."""
        store = contract_store.store
        keys = [new_key(), new_key()]
        for key, retention in zip(keys, (LONG, SHORT), strict=True):
            quarantine(store, key, redrive=3, fingerprint=A)
            assert store.resolve(key, completed=True, retention=retention)
            assert key not in shown(store)
        # Of the second one that cannot be said: on a slow machine its retention is over by now.
        assert store.claim(ask(keys[0], redrive=9)) == Completed(None)
        assert store.claim(ask(keys[0], fingerprint=B)) == Conflict(State.COMPLETED)
        contract_store.outlast(SHORT)
        assert store.claim(ask(keys[0])) == Completed(None)
        assert take(store, keys[1])[1].attempt == 1

    def test_resolved_as_not_done(self, contract_store: Subject) -> None:
        """The effect is not there: the next claim runs, as attempt 1, without a doubt, with a larger token."""
        store = contract_store.store
        keys = [new_key(), new_key()]
        for key, retention in zip(keys, (LONG, SHORT), strict=True):
            left, _ = take(store, key, redrive=3)
            assert abandon(store, left, attempts=5)
            hold = quarantine(store, key, fingerprint=A)
            assert store.resolve(key, completed=False, retention=retention)
            assert key not in shown(store)
        contract_store.outlast(SHORT)
        if isinstance(store, LookupStore):
            record = store.lookup(keys[0])
            assert (record.state, record.attempts, record.redrive, record.result) == (State.RELEASED, 0, 3, None)
            assert store.lookup(keys[1]) is None
        new, claimed = take(store, keys[0], redrive=1, fingerprint=B)
        assert (claimed.attempt, claimed.taken_over) == (1, False)
        assert release(store, new, attempts=1)
        assert take(store, keys[0], redrive=3)[1].attempt == 2  # the redrive number stayed
        assert take(store, keys[1])[1].token > hold.token

    def test_only_what_is_quarantined_is_resolved(self, contract_store: Subject) -> None:
        """In any other state it is False and changes nothing; True comes once, also to two persons at once."""
        store = contract_store.store
        live, _ = take(store, new_key())
        reserved, _ = take(store, new_key(), reserve=True)
        done, _ = take(store, new_key())
        assert complete(store, done)
        given, _ = take(store, new_key())
        assert release(store, given, attempts=6)
        left, _ = take(store, new_key())
        assert abandon(store, left, attempts=2)
        absent = new_key()
        for key in (live.key, reserved.key, done.key, given.key, left.key, absent):
            for completed in (True, False):
                assert not store.resolve(key, completed=completed, retention=SHORT)
        contract_store.outlast(SHORT)
        assert renew(store, live)
        assert renew(store, reserved)
        assert store.claim(ask(done.key)) == Completed(b"done")
        assert take(store, given.key)[1].attempt == 7
        assert take(store, left.key)[1].taken_over
        assert take(store, absent)[1].attempt == 1
        for _ in range(5):
            key = new_key()
            quarantine(store, key)
            answers = race(
                [lambda done=done: store.resolve(key, completed=done, retention=LONG) for done in (True, False)]  # type: ignore[misc]  # noqa: B023
            )
            assert sorted(answers) == [False, True]
            assert isinstance(store.claim(ask(key)), Completed if answers[0] else Claimed)

    def test_after_a_person_decided_the_old_holder_has_no_say(self, contract_store: Subject) -> None:
        """A holder that comes back after all neither completes, releases, abandons nor quarantines it again."""
        store = contract_store.store
        for completed in (True, False):
            hold = quarantine(store, new_key())
            assert store.resolve(hold.key, completed=completed, retention=LONG)
            assert not complete(store, hold, b"late")
            assert not release(store, hold, attempts=9)
            assert not renew(store, hold)
            assert not abandon(store, hold, attempts=9)
            assert not store.quarantine(hold, note=b"again")
            outcome = store.claim(ask(hold.key))
            assert outcome == Completed(None) if completed else won(outcome).attempt == 1

    def test_what_was_resolved_is_purged_in_time(self, contract_store: Subject) -> None:
        """A purge finds a resolved record once its retention is over, and not before."""
        store = contract_store.store
        if not isinstance(store, PurgeStore):
            return  # its records vanish by themselves
        while store.purge():
            pass
        brief, long = new_key(), new_key()
        for key, completed, retention in ((brief, True, SHORT), (long, False, LONG)):
            quarantine(store, key)
            assert store.resolve(key, completed=completed, retention=retention)
        contract_store.outlast(SHORT)
        assert store.purge() == 1
        assert store.purge() == 0


def quarantine(store: Any, key: bytes, **changes: Any) -> Hold:
    """Claim `key` and put it into quarantine; the hold that did."""
    hold, _ = take(store, key, **changes)
    assert store.quarantine(hold, note=b"note")
    return hold


def shown(store: Any, size: int = 1000) -> dict[bytes, Record]:
    """All quarantined records, in pages of that size."""
    found: dict[bytes, Record] = {}
    after = b""
    while page := store.quarantined(limit=size, after=after):
        assert len(page) <= size
        assert all(record.state is State.QUARANTINED for record in page)
        found |= {record.key: record for record in page}
        after = page[-1].key
    return found


def _next(keys: list[bytes], after: bytes, count: int) -> list[bytes]:
    return [key for key in keys if key > after][:count]


class SharedContract:
    """Stores that other processes reach, and that can be down."""

    def test_one_racing_process_wins_each_key(self, contract_store: Subject) -> None:
        """8 processes over 40 keys: one winner each, and after 160 claim-and-release rounds every attempt is counted.

        The tokens of one key are all different, and they grow in the order of the attempts.
        """
        keys = [new_key().hex() for _ in range(40)]
        rounds = [new_key().hex() for _ in range(4)]
        work = {"claim": keys, "rounds": rounds, "count": 5}
        with _racers(contract_store, [work] * 8) as answers:
            pass
        winners: dict[str, int] = dict.fromkeys(keys, 0)
        attempts: dict[str, list[tuple[int, int]]] = {key: [] for key in rounds}
        for answer in answers:
            for key in answer["won"]:
                winners[key] += 1
            for key, token, attempt in answer["rounds"]:
                attempts[key].append((token, attempt))
        assert set(winners.values()) == {1}, winners
        for key in rounds:
            assert [attempt for _, attempt in sorted(attempts[key])] == list(range(1, 8 * 5 + 1))
            assert len({token for token, _ in attempts[key]}) == 8 * 5
            _, claimed = take(contract_store.store, bytes.fromhex(key))
            assert claimed.attempt == 8 * 5 + 1
            assert claimed.token > max(token for token, _ in attempts[key])

    def test_a_callers_clock_changes_nothing(self, contract_store: Subject) -> None:
        """I7: a process whose clocks are a year ahead, or behind, sees and makes the same leases as all others."""
        store = contract_store.store
        for shift in (365 * 86400.0, -365 * 86400.0):
            held, lapsed, kept = (take(store, new_key(), lease=lease)[0] for lease in (LONG, SHORT, LONG))
            assert complete(store, kept)
            contract_store.outlast(SHORT)
            short, long, brief = (new_key().hex() for _ in range(3))
            work = {
                "shift": shift,
                "claim": [held.key.hex(), lapsed.key.hex(), kept.key.hex()],
                "leases": {short: SHORT, long: LONG},
                "complete": {brief: SHORT},
                "purge": True,
            }
            with _racers(contract_store, [work]) as answers:
                pass
            assert answers[0]["won"] == [lapsed.key.hex()]
            assert renew(store, held)
            assert store.claim(ask(kept.key)) == Completed(b"done")
            contract_store.outlast(SHORT)
            assert take(store, bytes.fromhex(short))[1].taken_over
            assert isinstance(store.claim(ask(bytes.fromhex(long))), Busy)
            assert take(store, bytes.fromhex(brief))[1].attempt == 1

    def test_a_store_that_is_down_says_so(self, contract_store: Subject) -> None:
        """I9: every verb of a store that cannot be reached raises StoreUnavailable, with the driver's error chained."""
        assert contract_store.open_down is not None
        store: Any = contract_store.open_down()
        hold = Hold(new_key(), 1, os.urandom(16))
        calls = [
            lambda: store.claim(ask(new_key())),
            lambda: renew(store, hold),
            lambda: complete(store, hold),
            lambda: release(store, hold),
            lambda: abandon(store, hold),
            lambda: store.quarantine(hold, note=b""),
            lambda: store.quarantined(),
            lambda: store.resolve(hold.key, completed=True, retention=LONG),
            lambda: store.claim_many([ask(new_key())]),
            lambda: store.renew_many([hold], lease=LONG, retention=LONG),
            lambda: store.lookup(hold.key),
            lambda: store.forget(hold.key),
            lambda: store.complete_many([Completion(hold, None, LONG)]),
        ]
        for call in calls:
            with pytest.raises(StoreUnavailable) as caught:
                call()
            assert caught.value.__cause__ is not None
            assert hold.key.hex() not in str(caught.value)
        store.close()
        store.close()


@contextlib.contextmanager
def _racers(subject: Subject, works: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Run one process per piece of work, all let go at once; their answers are in the list at the end of the block."""
    assert subject.url is not None
    script = Path(__file__).with_name("store_racer.py")
    processes = []
    for work in works:
        task = json.dumps({"url": subject.url, "options": dict(subject.options), **work})
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), task], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
    answers: list[dict[str, Any]] = []
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        yield answers
        for process in processes:
            out, _ = process.communicate(timeout=120)
            assert process.returncode == 0
            answers.append(json.loads(out))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
