"""What the Redis store's short form must keep: completed records that lie together in buckets, which split and merge.

As the classes of `suite`: over one subject, whose `open` gives another store object, with nothing learnt, each time.
The checks choose keys of one slot, so that its buckets fill, split and merge within a few hundred records.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from idempotent_bus.model import Claimed, ClaimRequest, Completed, Completion, Hold, State
from idempotent_bus.stores.memory import MemoryStore
from idempotent_bus.testing.store_contract import LONG, Subject, abandon, ask, complete, release, take

T = TypeVar("T")


def another(made: list[T], make: Callable[[], T]) -> T:
    """The first that was made ahead, then new ones."""
    return made.pop() if made else make()


def in_slot(slot: int) -> bytes:
    return bytes([slot]) + os.urandom(15)


def completed(store: Any, count: int, slot: int, retention: float = LONG) -> list[Hold]:
    """So many records of one slot, completed without a result."""
    requests = [ask(in_slot(slot), fingerprint=b"finger A") for _ in range(count)]
    holds = []
    for request, outcome in zip(requests, store.claim_many(requests), strict=True):
        assert isinstance(outcome, Claimed)
        holds.append(Hold(request.key, outcome.token, request.nonce))
        assert complete(store, holds[-1], None, retention=retention)
    return holds


def remembered(store: Any, holds: list[Hold]) -> bool:
    requests = [ask(hold.key, fingerprint=b"finger A") for hold in holds]
    return all(outcome == Completed(None) for outcome in store.claim_many(requests))


def fast(store: Any) -> Any:
    """The same records by a store whose short form counts in quarters of a second, so that a retention can pass."""
    plain = store._scripts
    since = int(time.time()) - 1000
    # The very scripts, but for their unit of time.
    store._scripts = lambda verb: _with_units(plain(verb), since)
    store._short_from = 0.0
    return store


def _with_units(script: Any, since: int) -> Any:
    return type(script)(script.text.replace("= 4, 1750000000,", f"= 0.25, {since},"))


class ShortFormContract:
    """Nothing is lost, forgotten early or done by the wrong one, wherever a record lies."""

    def test_nothing_is_lost_while_buckets_split(self, contract_store: Subject) -> None:
        """1,000 completions of one slot: its buckets split many times, and every record is found after it."""
        store, slot = contract_store.store, random.randrange(256)
        holds = completed(store, 1000, slot)
        assert store._places.buckets[slot] > 8
        assert remembered(store, holds)
        assert all(complete(store, hold, None) for hold in holds)
        for hold in holds[::50]:
            record = store.lookup(hold.key)
            assert record is not None
            assert (record.state, record.attempts, record.fingerprint) == (State.COMPLETED, 1, b"finger A")
            assert LONG - 60 < record.retention_left <= LONG + 4

    def test_another_process_is_told_where_a_record_went(self, contract_store: Subject) -> None:
        """A store that knows one bucket, or far too many, finds, completes, shows and forgets what others moved."""
        store, slot = contract_store.store, random.randrange(256)
        holds = completed(store, 600, slot)
        assert store._places.buckets[slot] > 4
        for known in (1, 2, 3, 1000):
            other: Any = contract_store.open()
            assert other is not store
            other._places.buckets = dict.fromkeys(range(256), known)
            assert remembered(other, holds)
            for verb in range(4):
                for hold in holds[verb:40:4]:
                    other._places.buckets = dict.fromkeys(range(256), known)
                    if verb == 0:
                        assert complete(other, hold, None)
                    elif verb == 1:
                        assert not complete(other, Hold(hold.key, hold.token, os.urandom(16)), None)
                    elif verb == 2:
                        assert other.lookup(hold.key).state is State.COMPLETED
                    else:
                        fresh, _ = take(other, in_slot(slot))
                        assert complete(other, fresh, None)
                        assert store.claim(ask(fresh.key)) == Completed(None)
            other._places.buckets = dict.fromkeys(range(256), known)
            gone = holds.pop()
            assert other.forget(gone.key)
            assert store.lookup(gone.key) is None
            assert take(store, gone.key)[0].token > gone.token

    def test_a_lost_reply_and_a_moved_record(self, contract_store: Subject) -> None:
        """A completion is asked again after its record has moved to another bucket: True for its hold, and only it."""
        store, slot = contract_store.store, random.randrange(256)
        early = completed(store, 50, slot)
        other: Any = contract_store.open()
        assert remembered(other, early)
        completed(store, 800, slot)
        for hold in early:
            assert not complete(other, Hold(hold.key, hold.token + 1, hold.nonce), None)
            assert complete(other, hold, None)
            assert complete(store, hold, None)

    def test_a_split_sent_twice_is_one_split(self, contract_store: Subject) -> None:
        """A driver's silent resend of a split, or a merge, finds that it was done, and does not do the next one."""
        store, slot = contract_store.store, random.randrange(256)
        holds = completed(store, 30, slot)
        before = store._places.buckets.get(slot, 1)
        for _ in range(3):
            store._places.buckets[slot] = before
            store._make_room(slot, fewer=False)
            assert store._places.buckets[slot] == before + 1
        for _ in range(3):
            store._places.buckets[slot] = before + 1
            store._make_room(slot, fewer=True)
            assert store._places.buckets[slot] == before
        assert remembered(store, holds)

    def test_nothing_is_lost_while_buckets_merge(self, contract_store: Subject) -> None:
        """When most of a slot is over its buckets become fewer, and what is left is found."""
        store, slot = contract_store.store, random.randrange(256)
        holds = completed(store, 800, slot)
        most = store._places.buckets[slot]
        left = holds[::20]
        for number, hold in enumerate(holds):
            if number % 20:
                assert store.forget(hold.key)
        left += completed(store, 60, slot)
        assert store._places.buckets[slot] < most / 2
        assert remembered(store, left)
        assert remembered(contract_store.open(), left)
        assert all(complete(store, hold, None) for hold in left)

    def test_several_ask_for_the_same_merge(self, contract_store: Subject) -> None:
        """Completions under way together all say that two buckets are one too many: one merge, and no error."""
        store, slot = contract_store.store, random.randrange(256)
        store._make_room(slot, fewer=False)
        assert store._places.buckets[slot] == 2
        asked = [ask(in_slot(slot)) for _ in range(5)]
        holds = [Hold(one.key, store.claim(one).token, one.nonce) for one in asked]
        stream = store.stream()
        for hold in holds:
            stream.begin(Completion(hold, None, LONG))
        settled = stream.settle()
        stream.close()
        assert [one.durable for one in settled] == [True] * 5
        assert store._places.buckets[slot] == 1
        assert all(store.claim(ask(hold.key)) == Completed(None) for hold in holds)

    def test_another_thread_has_seen_the_last_merge(self, contract_store: Subject) -> None:
        """What is known of a slot may change at any moment: no error comes out of a completion that is durable."""
        store, slot = contract_store.store, random.randrange(256)
        places = store._places
        places.learn(slot, 2)
        plain = places.count

        def count(slot: int) -> int:
            known: int = plain(slot)
            places.learn(slot, 1)  # by another thread, as soon as this one has looked
            return known

        places.count = count
        store._make_room(slot, fewer=True)
        assert places.buckets[slot] == 1

    def test_retentions_of_the_short_form_are_kept(self, contract_store: Subject) -> None:
        """Two scopes in one bucket, one remembered briefly and one for long: neither is forgotten early or too late."""
        store, slot = fast(contract_store.open()), random.randrange(256)
        brief = completed(store, 10, slot, retention=1.0)
        long = completed(store, 10, slot, retention=60.0)
        briefest = completed(store, 10, slot, retention=0.5)
        late = completed(store, 10, slot, retention=4.0)
        assert remembered(store, brief)
        assert remembered(store, briefest)
        contract_store.outlast(1.25)
        for hold in brief + briefest:
            assert store.lookup(hold.key) is None
            assert not complete(store, hold, None)
            new, claimed = take(store, hold.key, fingerprint=b"finger B")
            assert claimed.attempt == 1
            assert new.token > hold.token
        assert remembered(store, long + late)
        contract_store.outlast(3.0)
        assert remembered(store, long)
        assert not any(store.lookup(hold.key) for hold in late)

    def test_a_turn_leaves_nothing(self, contract_store: Subject) -> None:
        """What is over goes out as new records come in: three turns of a retention need no more buckets than two."""
        store, slot = fast(contract_store.open()), random.randrange(256)
        keep = completed(store, 20, slot, retention=60.0)
        for _ in range(5):
            completed(store, 60, slot, retention=0.25)
            contract_store.outlast(0.5)
        assert store._places.buckets.get(slot, 1) == 1
        assert store._client.hlen(store._places.bucket(slot, 0)) < 20 + 60 + 8
        assert remembered(store, keep)

    def test_it_agrees_with_the_memory_store(self, contract_store: Subject, steps: int = 2_000) -> None:
        """Any verbs in any order on the keys of a slot, whose buckets split and merge: as the reference store says."""
        dice, slot = random.Random(7), random.randrange(256)
        clock = [0.0]
        mine, model = contract_store.store, MemoryStore(lambda: clock[0])
        keys = [in_slot(slot) for _ in range(steps // 10)]
        holds: dict[bytes, list[tuple[Hold, Hold]]] = {key: [] for key in keys}
        for step in range(steps):
            # Young keys again and again, old ones now and then.
            key = keys[min(int(dice.expovariate(0.05)) + step // 12, len(keys) - 1) if dice.random() < 0.7 else 0]
            key = key if dice.random() < 0.8 else dice.choice(keys)
            own = dice.choice(holds[key][-2:]) if holds[key] else None
            verb = dice.choice(["claim", "claim", "complete", "complete", "release", "abandon", "renew", "forget"])
            if verb == "claim":
                mark = dice.choice([None, b"finger A", b"finger A", b"finger B"])
                request = ask(key, fingerprint=mark, redrive=dice.choice([0, 0, 0, 1]), reserve=dice.random() < 0.2)
                ours, theirs = mine.claim(request), model.claim(request)
                assert type(ours) is type(theirs), step
                if isinstance(ours, Claimed):
                    assert (ours.attempt, ours.taken_over) == (theirs.attempt, theirs.taken_over)
                    holds[key].append((_hold(request, ours), _hold(request, theirs)))
                elif not hasattr(ours, "retry_after"):
                    assert ours == theirs
            elif verb == "forget":
                if dice.random() < 0.2:
                    assert mine.forget(key) == model.forget(key)
            elif own is not None:
                result = dice.choice([None, None, None, b"result"])
                calls: dict[str, Callable[[Any, Hold], bool]] = {
                    "complete": lambda store, hold: complete(store, hold, result),  # noqa: B023 - called at once
                    "release": lambda store, hold: release(store, hold),
                    "abandon": lambda store, hold: abandon(store, hold),
                    "renew": lambda store, hold: store.renew(hold, lease=LONG, retention=LONG),
                }
                assert calls[verb](mine, own[0]) == calls[verb](model, own[1]), step
        for key in keys:
            ours, theirs = mine.lookup(key), model.lookup(key)
            assert (ours is None) is (theirs is None)
            if ours is not None:
                names = ("state", "attempts", "redrive", "fingerprint", "result")
                assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]


def _hold(request: ClaimRequest, claimed: Claimed) -> Hold:
    return Hold(request.key, claimed.token, request.nonce)
