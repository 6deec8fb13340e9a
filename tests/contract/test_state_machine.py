"""Any order of verbs by three workers on two keys: a store and a dictionary must agree on every answer.

Time is made certain: a lease or retention is either long, and never ends, or a millisecond, and is outlasted at
once; so the model needs no clock, and no answer depends on how quick the machine is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from test_mutants import MEMORY, mutated_memory

from idempotent_bus.model import (
    NONCE_BYTES,
    Busy,
    Claimed,
    ClaimRequest,
    Completed,
    Conflict,
    Hold,
    Quarantined,
    State,
)
from idempotent_bus.testing.store_contract import LONG, Subject, new_key

TINY = 0.001
HELD = (State.RESERVED, State.IN_PROGRESS)

WORKERS = st.integers(0, 2)
# Who acts on a claim: mostly the last who won (or asked for) the key, -1, so that long stories are told; else anybody.
ACTORS = st.sampled_from([-1, -1, -1, 0, 1, 2])
KEYS = st.sampled_from([0, 0, 1])
# A lease is as often short as long; what is forgotten ends a story, so a retention is mostly long.
LEASES = st.sampled_from([LONG, TINY])
DURATIONS = st.sampled_from([LONG, LONG, LONG, TINY])
FINGERPRINTS = st.sampled_from([None, b"finger A", b"finger A", b"finger B"])
NOTES = st.sampled_from([b"", b"\0note\xff"])
RESULTS = st.sampled_from([None, b"", b"\0result\xff"])


@dataclass
class Entry:
    """What the model knows of a record."""

    state: State
    nonce: bytes
    token: int
    attempts: int
    redrive: int
    fingerprint: bytes | None
    lapsed: bool
    taken_over: bool
    result: bytes | None = None


class Agreement(RuleBasedStateMachine):
    """A store beside its model. `subject` is set by the test."""

    subject: Subject

    @initialize()
    def begin(self) -> None:
        self.store: Any = self.subject.store
        self.keys = [new_key(), new_key()]
        self.entries: dict[int, Entry] = {}
        self.tokens = {0: 0, 1: 0}
        # Each worker's latest claim of each key: what it would repeat, renew or complete, however stale by now.
        self.requests: dict[tuple[int, int], ClaimRequest] = {}
        self.holds: dict[tuple[int, int], Hold] = {}

    @rule(
        worker=WORKERS,
        key=KEYS,
        lease=LEASES,
        retention=DURATIONS,
        fingerprint=FINGERPRINTS,
        redrive=st.integers(0, 2),
        reserve=st.booleans(),
        batch=st.booleans(),
    )
    def claim(self, worker: int, key: int, batch: bool, **values: Any) -> None:
        self.requests[worker, key] = self.requests[-1, key] = ClaimRequest(self.keys[key], os.urandom(16), **values)
        self._claim(worker, key, batch)

    @precondition(lambda self: self.requests)
    @rule(worker=ACTORS, key=KEYS, batch=st.booleans())
    def claim_again(self, worker: int, key: int, batch: bool) -> None:
        if (worker, key) in self.requests:
            self._claim(worker, key, batch)

    def _claim(self, worker: int, key: int, batch: bool) -> None:
        request = self.requests[worker, key]
        outcome = self.store.claim_many([request])[0] if batch else self.store.claim(request)
        entry = self.entries.get(key)
        if entry and entry.state in HELD and entry.nonce == request.nonce:
            assert outcome == Claimed(entry.token, self._attempt(entry), entry.taken_over)
        elif entry and entry.state is not State.RELEASED and self._differ(entry, request):
            assert outcome == Conflict(entry.state)
            return
        elif entry and entry.state is State.COMPLETED:
            assert outcome == Completed(entry.result)
            return
        elif entry and entry.state is State.QUARANTINED:
            assert outcome == Quarantined()
            return
        elif entry and entry.state in HELD and not entry.lapsed:
            assert isinstance(outcome, Busy)
            assert 0 < outcome.retry_after <= LONG + 1e-6  # a float's rounding
            return
        else:
            assert isinstance(outcome, Claimed)
            assert outcome.token > self.tokens[key]
            self.tokens[key] = outcome.token
            taken_over = entry is not None and (
                entry.state is State.IN_PROGRESS or (entry.state is State.RESERVED and entry.taken_over)
            )
            attempts = entry.attempts if entry and request.redrive <= entry.redrive else 0
            self.entries[key] = entry = Entry(
                state=State.RESERVED if request.reserve else State.IN_PROGRESS,
                nonce=request.nonce,
                token=outcome.token,
                attempts=attempts + (not request.reserve),
                redrive=max(request.redrive, entry.redrive if entry else 0),
                fingerprint=request.fingerprint,
                lapsed=False,
                taken_over=taken_over,
            )
            assert outcome == Claimed(entry.token, self._attempt(entry), taken_over)
            self.holds[worker, key] = self.holds[-1, key] = Hold(self.keys[key], outcome.token, request.nonce)
        self._hold_for(key, request.lease, request.retention)

    @staticmethod
    def _attempt(entry: Entry) -> int:
        return entry.attempts + (entry.state is State.RESERVED)

    @staticmethod
    def _differ(entry: Entry, request: ClaimRequest) -> bool:
        return None not in (entry.fingerprint, request.fingerprint) and entry.fingerprint != request.fingerprint

    def _hold_for(self, key: int, lease: float, retention: float) -> None:
        self.entries[key].lapsed = lease == TINY
        self._keep_for(key, lease + retention)

    def _keep_for(self, key: int, seconds: float) -> None:
        if seconds < LONG:
            self.subject.outlast(2 * TINY)
            del self.entries[key]
        elif key in self.entries and self.entries[key].lapsed:
            self.subject.outlast(TINY)

    def _owned(self, worker: int, key: int, *states: State) -> Entry | None:
        entry, hold = self.entries.get(key), self.holds[worker, key]
        if entry and entry.state in states and (entry.token, entry.nonce) == (hold.token, hold.nonce):
            return entry
        return None

    @precondition(lambda self: self.holds)
    @rule(worker=ACTORS, key=KEYS, lease=LEASES, retention=DURATIONS, batch=st.booleans())
    def renew(self, worker: int, key: int, batch: bool, lease: float, retention: float) -> None:
        if (worker, key) not in self.holds:
            return
        hold, entry = self.holds[worker, key], self._owned(worker, key, *HELD)
        if batch:
            answer = self.store.renew_many([hold], lease=lease, retention=retention)[0]
        else:
            answer = self.store.renew(hold, lease=lease, retention=retention)
        assert answer is (entry is not None)
        if entry:
            self._hold_for(key, lease, retention)

    @precondition(lambda self: self.holds)
    @rule(worker=ACTORS, key=KEYS, result=RESULTS, retention=DURATIONS)
    def complete(self, worker: int, key: int, result: bytes | None, retention: float) -> None:
        if (worker, key) not in self.holds:
            return
        entry = self._owned(worker, key, *HELD, State.COMPLETED)
        answer = self.store.complete(self.holds[worker, key], result=result, retention=retention)
        assert answer is (entry is not None)
        if entry and entry.state is not State.COMPLETED:
            entry.state, entry.result, entry.lapsed = State.COMPLETED, result, False
            self._keep_for(key, retention)

    @precondition(lambda self: self.holds)
    @rule(worker=ACTORS, key=KEYS, attempts=st.integers(0, 5), retention=DURATIONS)
    def release(self, worker: int, key: int, attempts: int, retention: float) -> None:
        if (worker, key) not in self.holds:
            return
        entry = self._owned(worker, key, *HELD, State.RELEASED)
        answer = self.store.release(self.holds[worker, key], attempts=attempts, retention=retention)
        assert answer is (entry is not None)
        if entry:
            entry.state, entry.attempts, entry.lapsed = State.RELEASED, attempts, False
            self._keep_for(key, retention)

    @precondition(lambda self: self.holds)
    @rule(worker=ACTORS, key=KEYS, attempts=st.integers(0, 5), retention=DURATIONS)
    def abandon(self, worker: int, key: int, attempts: int, retention: float) -> None:
        if (worker, key) not in self.holds:
            return
        entry = self._owned(worker, key, *HELD)
        answer = self.store.abandon(self.holds[worker, key], attempts=attempts, retention=retention)
        assert answer is (entry is not None)
        if entry:
            entry.state, entry.attempts, entry.lapsed = State.IN_PROGRESS, attempts, True
            self._keep_for(key, retention)

    @precondition(lambda self: self.holds)
    @rule(worker=ACTORS, key=KEYS, note=NOTES)
    def quarantine(self, worker: int, key: int, note: bytes) -> None:
        if (worker, key) not in self.holds:
            return
        entry = self._owned(worker, key, *HELD, State.QUARANTINED)
        answer = self.store.quarantine(self.holds[worker, key], note=note)
        assert answer is (entry is not None)
        if entry and entry.state is not State.QUARANTINED:
            entry.state, entry.result, entry.lapsed = State.QUARANTINED, note, False

    @precondition(lambda self: any(entry.state is State.QUARANTINED for entry in self.entries.values()))
    @rule(key=KEYS, completed=st.booleans(), retention=DURATIONS)
    def resolve(self, key: int, completed: bool, retention: float) -> None:
        entry = self.entries.get(key)
        there = entry is not None and entry.state is State.QUARANTINED
        assert self.store.resolve(self.keys[key], completed=completed, retention=retention) is there
        if entry and there:
            entry.state, entry.result = (State.COMPLETED if completed else State.RELEASED), None
            entry.attempts = entry.attempts if completed else 0
            entry.nonce = b"nobody's".ljust(NONCE_BYTES)
            self._keep_for(key, retention)

    def teardown(self) -> None:
        for key in getattr(self, "keys", ()):
            self.store.resolve(key, completed=True, retention=TINY)  # so that lists stay short

    @rule(key=KEYS, older=st.booleans(), lease=LEASES, retention=DURATIONS)
    def meddle(self, key: int, older: bool, lease: float, retention: float) -> None:
        """With the right nonce and an older token, or the right token and another nonce, nothing is to be had."""
        if entry := self.entries.get(key):
            token, nonce = (entry.token - 1, entry.nonce) if older else (entry.token, os.urandom(16))
            hold = Hold(self.keys[key], token, nonce)
            assert not self.store.renew(hold, lease=lease, retention=retention)
            assert not self.store.complete(hold, result=b"meddled", retention=retention)
            assert not self.store.release(hold, attempts=0, retention=retention)
            assert not self.store.abandon(hold, attempts=0, retention=retention)
            assert not self.store.quarantine(hold, note=b"meddled")
            if entry.state is not State.QUARANTINED:
                assert not self.store.resolve(self.keys[key], completed=older, retention=retention)

    @rule(sweep=st.booleans())
    def look(self, sweep: bool) -> None:
        if sweep and hasattr(self.store, "purge"):
            self.store.purge()
        listed = {record.key: record.result for record in self.store.quarantined(limit=1000)}
        for key, name in enumerate(self.keys):
            record, entry = self.store.lookup(name), self.entries.get(key)
            assert (record is None) is (entry is None)
            assert (name in listed) is (entry is not None and entry.state is State.QUARANTINED)
            if entry:
                seen = (record.state, record.token, record.attempts, record.redrive, record.fingerprint, record.result)
                # A store may keep a completed record without its token, which nobody needs any more.
                bare = entry.state is State.COMPLETED and record.token == 0
                token = 0 if bare else entry.token
                expected = (entry.state, token, entry.attempts, entry.redrive, entry.fingerprint, entry.result)
                assert seen == expected
                assert listed.get(name, entry.result) == entry.result
                assert (record.lease_left > 0) is (entry.state in HELD and not entry.lapsed)


EXAMPLES = {"memory": 200, "sqlite": 30, "redis": 30, "postgresql": 5, "mariadb": 5}
LONGER = 20 if os.environ.get("IDEMPOTENT_BUS_LONG") else 1


def agree(subject: Subject, examples: int, phases: tuple[Phase, ...] = tuple(Phase), steps: int = 40) -> None:
    machine = type("Machine", (Agreement,), {"subject": subject})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=examples * LONGER,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=not os.environ.get("IDEMPOTENT_BUS_LONG"),
            report_multiple_bugs=False,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("contract_store", EXAMPLES, indirect=True)
def test_a_store_agrees_with_its_model(contract_store: Subject, request: pytest.FixtureRequest) -> None:
    """Whatever is asked in whatever order, the store answers as the contract's rules say."""
    name = request.node.callspec.params["contract_store"]
    agree(contract_store, EXAMPLES[name])


@pytest.mark.parametrize(
    "name",
    [
        "token not compared",
        "nonce not compared",
        "takeover not told",
        "no conflicts",
        "the doubt ends with a reservation",
        "a release does not end the doubt",
        "abandon releases",
        "abandon for anybody",
        "abandon waits for the lease",
        "a claim runs over a quarantined record",
        "quarantine for anybody",
        "a purge takes what is quarantined",
        "resolve does not look at the state",
        "resolve leaves the old holder its hold",
        "resolve keeps the attempts",
    ],
)
def test_the_model_notices(name: str) -> None:
    """Control: without a protection the store and the model disagree."""
    mutant = next(mutant for mutant in MEMORY if mutant.name == name)
    with pytest.raises(AssertionError):
        agree(mutated_memory(mutant), EXAMPLES["memory"], (Phase.generate,))
