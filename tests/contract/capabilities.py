"""The parts of the Store contract that only some stores can be held to: each class belongs to one capability."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from suite import LONG, ROUNDING, SHORT, Subject, ask, complete, new_key, race, release, renew, take, won

from idempotent_bus.errors import StoreUnavailable
from idempotent_bus.model import Busy, Claimed, ClaimOutcome, ClaimRequest, Completed, Conflict, Hold, Record, State
from idempotent_bus.store import BatchStore, LookupStore, PurgeStore

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
            replace(good[1], token=good[1].token + 1),
            Hold(new_key(), 1, os.urandom(16)),
            good[1],
            done,
            replace(good[2], nonce=os.urandom(16)),
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


def _records_in_every_state(subject: Subject) -> list[ClaimRequest]:
    """Records, absent to completed, and for each the claims that tell the rules apart."""
    store = subject.store
    requests = [ask(new_key()), ask(new_key(), reserve=True), ask(new_key(), redrive=3, fingerprint=A)]
    lapsed = []
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
        return replace(outcome, token=0)
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
            lambda: store.claim_many([ask(new_key())]),
            lambda: store.renew_many([hold], lease=LONG, retention=LONG),
            lambda: store.lookup(hold.key),
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
    script = Path(__file__).with_name("racer.py")
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
