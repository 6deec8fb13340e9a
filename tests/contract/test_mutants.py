"""Does the contract notice? Stores with one protection taken out, and the checks that must fail on each of them.

A mutant is a replacement in a store's own text. One that no longer applies is an error, so that a protection which
moved is not left unguarded. A check kills a mutant only with an AssertionError: a mutant that merely breaks does not
count. That the same checks pass on the store as it is, is what `test_stores.py` shows.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import time
import types
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis_short
import stores

import servers
from idempotent_bus.model import ClaimOutcome, ClaimRequest
from idempotent_bus.stores import memory, redis, redis_scripts
from idempotent_bus.testing import store_capabilities as capabilities
from idempotent_bus.testing import store_contract as suite
from idempotent_bus.testing.store_contract import Subject

CHECKS = (
    suite.StoreContract,
    capabilities.BatchContract,
    capabilities.CompletionsContract,
    capabilities.LookupContract,
    capabilities.PurgeContract,
    capabilities.ForgetContract,
    capabilities.QuarantineContract,
    redis_short.ShortFormContract,
)


def check(name: str) -> Callable[[Subject], None]:
    """The contract's check of that name, wherever it is."""
    owner = next(owner for owner in CHECKS if hasattr(owner, name))
    found: Callable[[Subject], None] = getattr(owner(), name)
    return found


def replaced(text: str, old: str, new: str) -> str:
    """`text` with every `old` replaced; that there is none is an error."""
    if old not in text:
        raise LookupError(f"the mutant does not apply: {old!r} is not there any more")
    return text.replace(old, new)


@dataclass(frozen=True)
class Mutant:
    """name: the protection that is missing. where: the script, if there are several. old, new: the replacement.

    killers: the checks that must fail, each of them.
    """

    name: str
    where: str
    old: str
    new: str
    killers: tuple[str, ...]


def survivors(subject: Subject, killers: tuple[str, ...]) -> list[str]:
    """The checks that pass although they should not."""
    alive = []
    for name in killers:
        with contextlib.suppress(AssertionError):
            check(name)(subject)
            alive.append(name)
    return alive


# --- memory -------------------------------------------------------------------------------------------

MEMORY = [
    Mutant(
        "token not compared", "", "or entry.token != hold.token", "",
        ("test_a_stale_hold_can_do_nothing", "test_a_nonce_used_again_does_not_revive_an_old_token"),
    ),
    Mutant("nonce not compared", "", "or entry.nonce != hold.nonce", "", ("test_a_stale_hold_can_do_nothing",)),
    Mutant(
        "neither compared", "", "or entry.token != hold.token\n            or entry.nonce != hold.nonce", "",
        ("test_the_superseded_holder_can_do_nothing", "test_renewals_stand_alone"),
    ),
    Mutant(
        "attempts not counted", "", "else attempts + 1,", "else attempts,",
        ("test_attempts_are_counted_by_the_claim", "test_a_lapsed_lease_is_taken_over"),
    ),
    Mutant(
        "reservations counted", "", "attempts=attempts if request.reserve else", "attempts=",
        ("test_a_reservation_counts_no_attempt", "test_a_lapsed_reservation_is_not_taken_over"),
    ),
    Mutant(
        "lease not looked at", "", "if held and entry.lease_ends > now:", "if False:",
        ("test_one_of_100_racing_threads_wins", "test_busy_says_when_and_changes_nothing"),
    ),
    Mutant("lease never lapses", "", "entry.lease_ends > now", "True", ("test_a_lapsed_lease_is_taken_over",)),
    Mutant(
        "completed not final for claims", "", "if entry.state is State.COMPLETED:\n            return",
        "if False:\n            return",
        ("test_completed_is_final", "test_results_come_back_as_they_were"),
    ),
    Mutant(
        "completed not final for its holder", "", "_owned(hold, now, *_HELD, State.RELEASED)",
        "_owned(hold, now, *State)", ("test_completed_is_final",),
    ),
    Mutant(
        "a repeat completes again", "", "if entry.state is not State.COMPLETED:  #", "if True:  #",
        ("test_completed_is_final", "test_a_completion_repeated_does_not_shorten_the_retention"),
    ),
    Mutant(
        "a repeated completion fails", "", "_owned(hold, now, *_HELD, State.COMPLETED)", "_owned(hold, now, *_HELD)",
        ("test_repeats_return_true",),
    ),
    Mutant(
        "a repeated release fails", "", "_owned(hold, now, *_HELD, State.RELEASED)", "_owned(hold, now, *_HELD)",
        ("test_repeats_return_true",),
    ),
    Mutant(
        "no conflicts", "", "if differs and", "if False and",
        ("test_another_fingerprint_conflicts", "test_an_abandoned_record_still_conflicts"),
    ),
    Mutant(
        "a released record conflicts", "", "if differs and entry.state is not State.RELEASED:", "if differs:",
        ("test_a_released_record_takes_the_newest",),
    ),
    Mutant(
        "None conflicts", "", "None not in (entry.fingerprint, request.fingerprint) and ", "",
        ("test_without_a_fingerprint_nothing_conflicts",),
    ),
    Mutant(
        "nonce not recognised", "", "if held and entry.nonce == request.nonce:", "if False:",
        ("test_the_same_nonce_is_recognised", "test_the_same_nonce_keeps_a_lapsed_lease"),
    ),
    Mutant(
        "a repeat does not renew", "",
        "            self._extend(entry, now, request.lease, request.retention)\n            return entry.claimed()",
        "            return entry.claimed()", ("test_the_same_nonce_renews_the_lease",),
    ),
    Mutant(
        "busy lengthens the lease", "", "return Busy(entry.lease_ends - now)",
        "entry.lease_ends += request.lease; return Busy(entry.lease_ends - now)",
        ("test_busy_does_not_lengthen_a_lease", "test_busy_says_when_and_changes_nothing"),
    ),
    Mutant(
        "redrive not looked at", "", "attempts=0 if request.redrive > entry.redrive else entry.attempts",
        "attempts=entry.attempts", ("test_a_larger_redrive_starts_afresh",),
    ),
    Mutant(
        "redrive shrinks", "", "redrive=max(request.redrive, entry.redrive)", "redrive=request.redrive",
        ("test_the_redrive_number_only_grows",),
    ),
    Mutant(
        "every redrive starts afresh", "", "request.redrive > entry.redrive", "request.redrive >= entry.redrive",
        ("test_a_larger_redrive_starts_afresh", "test_attempts_are_counted_by_the_claim"),
    ),
    Mutant(
        "takeover not told", "", "taken_over=entry.state is State.IN_PROGRESS", "taken_over=False",
        ("test_a_lapsed_lease_is_taken_over", "test_a_reservation_of_an_abandoned_record_says_so"),
    ),
    Mutant(
        "a repeat forgets the takeover", "",
        "            self._extend(entry, now, request.lease, request.retention)\n            return entry.claimed()",
        "            self._extend(entry, now, request.lease, request.retention); entry.taken_over = False\n"
        "            return entry.claimed()",
        ("test_a_takeover_asked_again_is_still_a_takeover",),
    ),
    Mutant(
        "reservation taken over", "", "taken_over=entry.state is State.IN_PROGRESS", "taken_over=held",
        ("test_a_lapsed_reservation_is_not_taken_over",),
    ),
    Mutant(
        "release does not write the count", "", "            entry.attempts = attempts\n", "",
        ("test_release_writes_the_count",),
    ),
    Mutant(
        "tokens end with the record", "", "token=next(self._tokens)",
        "token=self._entries[request.key].token + 1 if taken_over or attempts else 1",
        ("test_a_completed_record_is_forgotten_after_its_retention",),
    ),
    Mutant(
        "nothing is forgotten", "", "entry.kept_until <= now", "False",
        ("test_a_completed_record_is_forgotten_after_its_retention",),
    ),
    Mutant(
        "a live record is forgotten", "", "kept_until=now + request.lease + request.retention",
        "kept_until=now + request.retention", ("test_a_live_record_is_never_forgotten",),
    ),
    Mutant(
        "completion keeps the claim's retention", "", "                entry.kept_until = now + retention\n", "",
        ("test_completion_sets_the_retention", "test_a_completed_record_is_forgotten_after_its_retention"),
    ),
    Mutant(
        "a lapsed lease cannot complete", "", "entry.token != hold.token", "entry.lease_ends <= now",
        ("test_a_late_completion_succeeds_if_nobody_took_over", "test_a_lapsed_lease_that_nobody_took_is_renewed"),
    ),
    Mutant(
        "results are texts", "", "entry.result = result", "entry.result = result or None",
        ("test_results_come_back_as_they_were", "test_an_empty_result_is_not_none"),
    ),
    Mutant(
        "the doubt ends with a reservation", "", " or (entry.state is State.RESERVED and entry.taken_over)", "",
        ("test_a_reservation_that_lapsed_passes_the_doubt_on",),
    ),
    Mutant(
        "a release does not end the doubt", "", "(entry.state is State.RESERVED and entry.taken_over)",
        "entry.taken_over", ("test_the_doubt_ends_with_a_release_or_with_the_record",),
    ),
    Mutant(
        "abandon releases", "", "            entry.state = State.IN_PROGRESS\n",
        "            entry.state = State.RELEASED\n",
        ("test_an_abandoned_claim_is_taken_over_at_once", "test_an_abandoned_reservation_is_in_doubt"),
    ),
    Mutant(
        "abandon for anybody", "",
        "entry = self._owned(hold, now, *_HELD)\n            if entry is None:\n                return False\n"
        "            entry.state = State.IN_PROGRESS",
        "entry = self._entries.get(hold.key)\n            if entry is None:\n                return False\n"
        "            entry.state = State.IN_PROGRESS",
        ("test_a_stale_hold_can_do_nothing", "test_abandon_repeated_returns_true", "test_completed_is_final"),
    ),
    Mutant(
        "abandon waits for the lease", "", "            entry.lease_ends = now\n", "",
        ("test_an_abandoned_claim_is_taken_over_at_once",),
    ),
    Mutant(
        "abandon does not write the count", "",
        "entry.attempts = attempts\n            entry.lease_ends", "entry.lease_ends",
        ("test_abandoning_writes_the_count",),
    ),
    Mutant(
        "abandon keeps the claim's retention", "",
        "entry.lease_ends = now\n            entry.kept_until = now + retention", "entry.lease_ends = now",
        ("test_abandoning_sets_the_retention",),
    ),
    Mutant(
        "a claim runs over a quarantined record", "", "if entry.state is State.QUARANTINED:\n            return Q",
        "if False:\n            return Q",
        ("test_nothing_runs_over_a_quarantined_record", "test_it_is_kept_until_it_is_resolved"),
    ),
    Mutant(
        "a redrive runs over a quarantined record", "", "if entry.state is State.QUARANTINED:\n            return Q",
        "if entry.state is State.QUARANTINED and request.redrive <= entry.redrive:\n            return Q",
        ("test_nothing_runs_over_a_quarantined_record",),
    ),
    Mutant(
        "a quarantine expires", "", "entry.kept_until = math.inf", "pass", ("test_it_is_kept_until_it_is_resolved",),
    ),
    Mutant(
        "a purge takes what is quarantined", "", "if entry.kept_until <= now)",
        "if entry.kept_until <= now or entry.kept_until == math.inf)", ("test_it_is_kept_until_it_is_resolved",),
    ),
    Mutant(
        "quarantine for anybody", "", "self._owned(hold, self._clock(), *_HELD, State.QUARANTINED)",
        "self._entries.get(hold.key)",
        ("test_who_may_quarantine", "test_after_a_person_decided_the_old_holder_has_no_say"),
    ),
    Mutant(
        "a repeated quarantine fails", "", "self._owned(hold, self._clock(), *_HELD, State.QUARANTINED)",
        "self._owned(hold, self._clock(), *_HELD)", ("test_who_may_quarantine",),
    ),
    Mutant(
        "a repeat writes the note again", "", "if entry.state is not State.QUARANTINED:\n                entry",
        "if True:\n                entry", ("test_who_may_quarantine",),
    ),
    Mutant(
        "a quarantined record is completed by its holder", "", "_owned(hold, now, *_HELD, State.COMPLETED)",
        "_owned(hold, now, *_HELD, State.COMPLETED, State.QUARANTINED)", ("test_its_holder_can_do_nothing",),
    ),
    Mutant(
        "resolve does not look at the state", "", "if entry is None or entry.state is not State.QUARANTINED:",
        "if entry is None:", ("test_only_what_is_quarantined_is_resolved",),
    ),
    Mutant(
        "resolve leaves the old holder its hold", "", "entry.nonce = os.urandom(NONCE_BYTES)", "pass",
        ("test_after_a_person_decided_the_old_holder_has_no_say",),
    ),
    Mutant(
        "resolve keeps the attempts", "", "entry.attempts if completed else 0", "entry.attempts",
        ("test_resolved_as_not_done",),
    ),
    Mutant(
        "resolve keeps the note as a result", "", "            entry.result = None\n", "", ("test_resolved_as_done",),
    ),
    Mutant(
        "resolve keeps for ever", "", "entry.kept_until = self._clock() + retention", "pass",
        ("test_resolved_as_done", "test_what_was_resolved_is_purged_in_time"),
    ),
    Mutant(
        "completions together stop at the first that is lost", "",
        "return [self.complete(one.hold, result=one.result, retention=one.retention) for one in completions]",
        "done = [self.complete(one.hold, result=one.result, retention=one.retention) for one in completions]\n"
        "        return [answer and all(done[:at]) for at, answer in enumerate(done)]",
        ("test_completions_together_agree_with_single_ones",),
    ),
    Mutant(
        "what is held is forgotten", "", "(entry.state in _HELD and entry.lease_ends > now)", "False",
        ("test_what_is_held_is_not_forgotten", "test_forgetting_and_claiming_exclude_each_other"),
    ),
    Mutant(
        "what is in quarantine is forgotten", "",
        "if entry.state is State.QUARANTINED or (entry.state in _HELD and", "if (entry.state in _HELD and",
        ("test_a_quarantined_record_is_not_forgotten",),
    ),
    Mutant(
        "nothing is deleted", "", "                del self._entries[key]\n            return True",
        "            return True", ("test_what_is_over_is_forgotten", "test_who_held_what_was_forgotten_has_no_say"),
    ),
    Mutant(
        "keys fold", "", "request.key", "request.key.lower().rstrip(b' \\0')", ("test_keys_never_fold",),
    ),
    Mutant(
        "claims are not atomic", "",
        "with self._lock:\n            return self._claim(request, self._clock())",
        "return self._claim(request, self._clock())",
        ("test_one_of_100_racing_threads_wins", "test_one_racer_takes_a_released_record"),
    ),
    Mutant(
        "a look-up renews", "", "entry = self._entries[key]\n        return Record(",
        "entry = self._entries[key]; entry.lease_ends = now + 600\n        return Record(",
        ("test_it_changes_nothing",),
    ),
    Mutant(
        "a purge takes what is live", "", "if entry.kept_until <= now)", "if entry.lease_ends <= now + 1e9)",
        ("test_it_deletes_what_is_over_and_nothing_else",),
    ),
]  # fmt: skip


def mutated_memory(mutant: Mutant) -> Subject:
    text = replaced(inspect.getsource(memory), mutant.old, mutant.new)
    if mutant.name == "claims are not atomic":
        # A pause between reading and writing, so that the race is lost for sure and not once in a while.
        text = replaced(text, "        entry = _Entry(\n", "        time.sleep(0.01)\n        entry = _Entry(\n")
    module = types.ModuleType("idempotent_bus.stores.mutated_memory")
    module.__package__ = "idempotent_bus.stores"
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(text, mutant.name, "exec"), module.__dict__)
        clock = stores.ManualClock()
        store = module.MemoryStore(clock)
    finally:
        del sys.modules[module.__name__]
    return Subject(lambda: store, clock.outlast)


@pytest.mark.parametrize("mutant", MEMORY, ids=lambda mutant: mutant.name)
def test_memory_mutants_are_killed(mutant: Mutant) -> None:
    """Each check named for a mutant of the memory store fails on it."""
    assert survivors(mutated_memory(mutant), mutant.killers) == []


# --- Redis ----------------------------------------------------------------------------------------------

HELD = "(state_of(record) == RESERVED or state_of(record) == IN_PROGRESS)"
REDIS = [
    Mutant(
        "token not compared", "record", "string.sub(record, 2, 25) == hold",
        "string.sub(record, 10, 25) == string.sub(hold, 9)",
        ("test_a_stale_hold_can_do_nothing", "test_a_nonce_used_again_does_not_revive_an_old_token"),
    ),
    Mutant(
        "nonce not compared", "record", "string.sub(record, 2, 25) == hold",
        "string.sub(record, 2, 9) == string.sub(hold, 1, 8)", ("test_a_stale_hold_can_do_nothing",),
    ),
    *(
        Mutant(
            f"ownership not compared by {verb}", verb, f"owned(record, {hold})", "record",
            ("test_a_stale_hold_can_do_nothing", "test_the_superseded_holder_can_do_nothing"),
        )
        for verb, hold in (
            ("renew", "ARGV[entry + 2]"), ("complete", "string.sub(ARGV[1], 1, 24)"),
            ("release", "ARGV[1]"), ("abandon", "ARGV[1]"),
        )
    ),
    Mutant(
        "attempts not counted", "claim", "attempts = attempt\n", "attempts = attempts\n",
        ("test_attempts_are_counted_by_the_claim", "test_a_lapsed_lease_is_taken_over"),
    ),
    Mutant(
        "reservations counted", "claim", "if not reserve then", "if true then",
        ("test_a_lapsed_reservation_is_not_taken_over",),
    ),
    Mutant(
        "lease not looked at", "claim", "if left > 0 then", "if false then",
        ("test_one_of_100_racing_threads_wins", "test_busy_says_when_and_changes_nothing"),
    ),
    Mutant(
        "lease never lapses", "claim", "number8(record, 42) - now", "600000000", ("test_a_lapsed_lease_is_taken_over",),
    ),
    Mutant(
        "completed not final for claims", "claim", "if state == COMPLETED then", "if false then",
        ("test_completed_is_final", "test_results_come_back_as_they_were"),
    ),
    Mutant(
        "completed not final for its holder", "release", "or state_of(record) == COMPLETED", "",
        ("test_completed_is_final",),
    ),
    Mutant("a completed record is renewed", "renew", f"and {HELD}", "", ("test_completed_is_final",)),
    Mutant(
        "a released record completes", "complete", "or state_of(record) == RELEASED", "",
        ("test_a_released_record_is_not_completed_or_renewed",),
    ),
    Mutant(
        "a repeat completes again", "complete", "if state_of(record) == COMPLETED then", "if false then",
        ("test_completed_is_final", "test_a_completion_repeated_does_not_shorten_the_retention"),
    ),
    Mutant(
        "a repeated completion fails", "complete", "== RELEASED or", "~= IN_PROGRESS or",
        ("test_repeats_return_true", "test_a_reservation_is_busy_for_others_and_can_complete"),
    ),
    Mutant(
        "a repeated release fails", "release", "== COMPLETED or", "~= IN_PROGRESS or",
        ("test_repeats_return_true",),
    ),
    Mutant(
        "no conflicts", "claim", "if comparable and", "if false and",
        ("test_another_fingerprint_conflicts", "test_an_abandoned_record_still_conflicts"),
    ),
    Mutant(
        "a released record conflicts", "claim", "and state ~= RELEASED then", "then",
        ("test_a_released_record_takes_the_newest",),
    ),
    Mutant(
        "None conflicts", "claim", "marked and has(record, HAS_FINGERPRINT)", "true",
        ("test_without_a_fingerprint_nothing_conflicts",),
    ),
    Mutant(
        "the new fingerprint is not kept", "claim", ".. nonce .. fingerprint",
        ".. nonce .. (record and string.sub(record, 26, 33) or fingerprint)",
        ("test_a_released_record_takes_the_newest", "test_a_takeover_takes_the_new_fingerprint"),
    ),
    Mutant(
        "nonce not recognised", "claim", "string.sub(record, 10, 25) == nonce", "false",
        ("test_the_same_nonce_is_recognised", "test_the_same_nonce_keeps_a_lapsed_lease"),
    ),
    Mutant(
        "nonce recognised after the end", "claim", "if held and string.sub(record, 10, 25) == nonce",
        "if string.sub(record, 10, 25) == nonce",
        ("test_completed_is_final", "test_a_nonce_used_again_does_not_revive_an_old_token"),
    ),
    Mutant(
        "a repeat does not renew", "claim", "string.sub(record, 1, 41) .. tail", "record",
        ("test_the_same_nonce_renews_the_lease",),
    ),
    Mutant(
        "a repeat forgets the takeover", "claim", "has(record, TAKEN_OVER)", "false",
        ("test_a_takeover_asked_again_is_still_a_takeover",),
    ),
    Mutant(
        "busy lengthens the lease", "claim", "return 'B' ..",
        "redis.call('SET', key, string.sub(record, 1, 41) .. tail, 'PX', keep) return 'B' ..",
        ("test_busy_does_not_lengthen_a_lease", "test_busy_says_when_and_changes_nothing"),
    ),
    Mutant(
        "redrive not looked at", "claim", "attempts = 0\n", "attempts = attempts\n",
        ("test_a_larger_redrive_starts_afresh",),
    ),
    Mutant(
        "redrive shrinks", "claim", "redrive = redriven", "redrive = redrive", ("test_the_redrive_number_only_grows",),
    ),
    Mutant(
        "every redrive starts afresh", "claim", "redrive > redriven", "redrive >= redriven",
        ("test_a_larger_redrive_starts_afresh", "test_attempts_are_counted_by_the_claim"),
    ),
    Mutant(
        "takeover not told", "claim", "won = 'T'", "won = 'C'",
        ("test_a_lapsed_lease_is_taken_over", "test_a_reservation_of_an_abandoned_record_says_so"),
    ),
    Mutant(
        "reservation taken over", "claim", "if state == IN_PROGRESS or (held and has(record, TAKEN_OVER)) then",
        "if held then", ("test_a_lapsed_reservation_is_not_taken_over",),
    ),
    Mutant(
        "the doubt ends with a reservation", "claim", "or (held and has(record, TAKEN_OVER)) then", "then",
        ("test_a_reservation_that_lapsed_passes_the_doubt_on",),
    ),
    Mutant(
        "a renewal ends the doubt", "renew", "string.sub(record, 1, 41)",
        "string.char(state_of(record)) .. string.sub(record, 2, 41)",
        ("test_a_reservation_that_lapsed_passes_the_doubt_on", "test_a_takeover_asked_again_is_still_a_takeover"),
    ),
    Mutant(
        "abandon releases", "abandon", "- state_of(record) + IN_PROGRESS", "- state_of(record) + RELEASED",
        ("test_an_abandoned_claim_is_taken_over_at_once", "test_an_abandoned_reservation_is_in_doubt"),
    ),
    Mutant(
        "abandon waits for the lease", "abandon", "bytes8(server_time())", "string.sub(record, 42)",
        ("test_an_abandoned_claim_is_taken_over_at_once",),
    ),
    Mutant(
        "abandon does not write the count", "abandon", "bytes4(tonumber(ARGV[3]))", "string.sub(record, 34, 37)",
        ("test_abandoning_writes_the_count",),
    ),
    Mutant(
        "abandon ends what is over", "abandon", f"or not {HELD}", "",
        ("test_completed_is_final", "test_what_was_given_back_is_not_abandoned", "test_its_holder_can_do_nothing"),
    ),
    Mutant(
        "abandon keeps the claim's expiry", "abandon", "'PX', ARGV[2]", "'KEEPTTL'",
        ("test_abandoning_sets_the_retention",),
    ),
    Mutant(
        "a claim runs over a quarantined record", "claim", "if state == QUARANTINED then", "if false then",
        ("test_nothing_runs_over_a_quarantined_record", "test_it_is_kept_until_it_is_resolved"),
    ),
    Mutant(
        "a redrive runs over a quarantined record", "claim", "if state == QUARANTINED then",
        "if state == QUARANTINED and redrive <= number4(record, 38) then",
        ("test_nothing_runs_over_a_quarantined_record",),
    ),
    Mutant(
        "a quarantine expires", "quarantine", "string.sub(record, 2, 41) .. ARGV[3])",
        "string.sub(record, 2, 41) .. ARGV[3], 'KEEPTTL')", ("test_it_is_kept_until_it_is_resolved",),
    ),
    Mutant(
        "quarantine for anybody", "quarantine", "owned(record, ARGV[1])", "record", ("test_who_may_quarantine",),
    ),
    Mutant(
        "what is over is quarantined", "quarantine", "or state_of(record) == COMPLETED or state_of(record) == RELEASED",
        "", ("test_who_may_quarantine",),
    ),
    Mutant(
        "a repeat writes the note again", "quarantine", "if state_of(record) ~= QUARANTINED then", "if true then",
        ("test_who_may_quarantine",),
    ),
    *(
        Mutant(
            f"a quarantined record is its holder's to {verb}", verb, "or state_of(record) == QUARANTINED", "",
            ("test_its_holder_can_do_nothing",),
        )
        for verb in ("complete", "release")
    ),
    Mutant(
        "resolve does not look at the state", "resolve", "record and state_of(record) == QUARANTINED", "record",
        ("test_only_what_is_quarantined_is_resolved",),
    ),
    Mutant(
        "resolve leaves the old holder its hold", "resolve", "string.sub(record, 2, 9) .. ARGV[4]",
        "string.sub(record, 2, 25)", ("test_after_a_person_decided_the_old_holder_has_no_say",),
    ),
    Mutant(
        "resolve keeps the attempts", "resolve", "RELEASED, bytes4(0)", "RELEASED, string.sub(record, 34, 37)",
        ("test_resolved_as_not_done",),
    ),
    Mutant(
        "resolve keeps for ever", "resolve", ", 'PX', ARGV[3])", ")",
        ("test_resolved_as_done", "test_resolved_as_not_done"),
    ),
    Mutant(
        "release does not write the count", "release", "bytes4(tonumber(ARGV[3]))", "string.sub(record, 34, 37)",
        ("test_release_writes_the_count",),
    ),
    Mutant(
        "release loses the redrive", "release", "string.sub(record, 38, 41)", "bytes4(0)",
        ("test_the_redrive_number_only_grows", "test_it_shows_each_state"),
    ),
    Mutant(
        "tokens end with the record", "claim", "bytes8(next_token(counter, last))",
        "bytes8(record and number8(record, 2) + 1 or 1)",
        (
            "test_a_completed_record_is_forgotten_after_its_retention",
            "test_an_abandoned_record_is_kept_for_its_retention",
        ),
    ),
    Mutant(
        "tokens stand still", "claim", "or '0') + 1, math.min(now, 2 ^ 52))",
        "or '1'), 1)",
        ("test_tokens_only_grow", "test_a_lapsed_lease_is_taken_over"),
    ),
    *(
        Mutant(f"{verb} loses the expiry", verb, f", 'PX', {keep})", ")", (killer,))
        for verb, keep, killer in (
            ("claim", "keep", "test_an_abandoned_record_is_kept_for_its_retention"),
            (
                "complete", "string.format('%.0f', retention)",
                "test_a_completed_record_is_forgotten_after_its_retention",
            ),
            ("release", "ARGV[2]", "test_a_released_record_is_forgotten_after_its_retention"),
        )
    ),
    *(
        Mutant(f"{verb} keeps the claim's expiry", verb, f"'PX', {keep}", "'KEEPTTL'", (killer,))
        for verb, keep, killer in (
            ("renew", "ARGV[2]", "test_renew_sets_the_retention"),
            ("complete", "string.format('%.0f', retention)", "test_completion_sets_the_retention"),
            ("release", "ARGV[2]", "test_release_sets_the_retention"),
        )
    ),
    Mutant(
        "an empty result is none", "complete", "(ARGV[2] and HAS_RESULT or 0)",
        "(ARGV[2] and ARGV[2] ~= '' and HAS_RESULT or 0)",
        ("test_results_come_back_as_they_were", "test_an_empty_result_is_not_none"),
    ),
    Mutant(
        "a batch shares one answer", "claim", "KEYS[at], ARGV[entry]", "KEYS[at], ARGV[1]",
        ("test_a_batch_agrees_with_the_single_verbs", "test_a_claim_in_a_batch_is_owned"),
    ),
    Mutant(
        "a batch stops at the first that is lost", "renew", "renewed[entry] = '0'",
        "return table.concat(renewed) .. string.rep('0', #KEYS - entry + 1)", ("test_renewals_stand_alone",),
    ),
    Mutant(
        "a claim does not see the short form", "claim", "if short then", "if false then",
        ("test_completed_without_a_result_is_final", "test_it_is_kept_whatever_it_went_through"),
    ),
    Mutant(
        "the short form loses the body", "complete", "short = short .. string.sub(record, 26, 33)", "short = short",
        ("test_its_body_is_compared",),
    ),
    Mutant(
        "no body conflicts in the short form", "claim", "marked and #short > 10", "marked",
        ("test_its_body_is_compared",),
    ),
    Mutant(
        "the short form does not know its hold", "complete", "== string.sub(ARGV[1], 25, 30)", "== nil",
        ("test_only_its_hold_repeats_a_completion_without_a_result", "test_a_lost_reply_and_a_moved_record"),
    ),
    Mutant(
        "any hold repeats the short form", "complete",
        "short and string.sub(short, 5, 10) == string.sub(ARGV[1], 25, 30)", "short",
        ("test_only_its_hold_repeats_a_completion_without_a_result", "test_the_superseded_holder_does_not_repeat_it"),
    ),
    Mutant(
        "the long record stays beside the short one", "complete", "redis.call('DEL', KEYS[1])", "",
        ("test_completed_without_a_result_is_final",),
    ),
    Mutant(
        "short records are not forgotten", "forget", "redis.call('HDEL', KEYS[3], field_of(key))", "",
        ("test_what_is_over_is_forgotten",),
    ),
    Mutant(
        "nobody is told that a bucket moved", "buckets", "if buckets ~= believed and", "if false and",
        ("test_another_process_is_told_where_a_record_went", "test_a_lost_reply_and_a_moved_record"),
    ),
    Mutant(
        "a split forgets", "split", "redis.call('HSET', KEYS[3], unpack(going))", "",
        ("test_nothing_is_lost_while_buckets_split",),
    ),
    Mutant(
        "a split is done twice", "split", "if buckets ~= tonumber(ARGV[1]) then", "if false then",
        ("test_a_split_sent_twice_is_one_split",),
    ),
    Mutant(
        "a merge forgets", "merge", "redis.call('HSET', KEYS[2], unpack(going))", "",
        ("test_nothing_is_lost_while_buckets_merge",),
    ),
    Mutant(
        "a short record is forgotten early", "complete", "math.ceil((now / 1000000 + retention / 1000 - SINCE) / UNIT)",
        "math.ceil((now / 1000000 - SINCE) / UNIT)", ("test_retentions_of_the_short_form_are_kept",),
    ),
    Mutant(
        "a short record is remembered for ever", "buckets", "if short_until(short) > now then", "if true then",
        ("test_retentions_of_the_short_form_are_kept",),
    ),
    Mutant(
        "a bucket expires with its first record", "buckets", "if redis.call('PTTL', bucket) < ms then",
        "if redis.call('PTTL', bucket) < 0 then", ("test_retentions_of_the_short_form_are_kept",),
    ),
    Mutant(
        "what is over stays in its bucket", "buckets", "over[#over + 1] = all[at]", "", ("test_a_turn_leaves_nothing",),
    ),
    Mutant(
        "what is held is forgotten", "forget", "(held and number8(record, 42) > server_time())", "false",
        ("test_what_is_held_is_not_forgotten", "test_forgetting_and_claiming_exclude_each_other"),
    ),
    Mutant(
        "what is in quarantine is forgotten", "forget", "state == QUARANTINED or", "",
        ("test_a_quarantined_record_is_not_forgotten",),
    ),
    Mutant(
        "nothing is deleted", "forget", "redis.call('DEL', KEYS[1])", "",
        ("test_what_is_over_is_forgotten", "test_who_held_what_was_forgotten_has_no_say"),
    ),
    Mutant(
        "a lapsed lease cannot be forgotten", "forget", "> server_time()", "> 0", ("test_what_is_over_is_forgotten",),
    ),
    Mutant(
        "a look-up renews", "lookup", "return {record,", "redis.call('SET', KEYS[1], record) return {record,",
        ("test_it_changes_nothing",),
    ),
]  # fmt: skip


class MutatedRedis(redis.RedisStore):
    """The Redis store with one script's text replaced."""

    mutant: Mutant

    def _scripts(self, verb: str) -> redis_scripts.Script:
        text = super()._scripts(verb).text
        if self.mutant.where not in ("record", verb) and (
            self.mutant.where != "buckets" or verb not in redis_scripts._LOOKS_IN_BUCKETS
        ):
            return redis_scripts.Script(text)
        return redis_scripts.Script(replaced(text, self.mutant.old, self.mutant.new))


class ReadThenWrite(redis.RedisStore):
    """A claim that looks first and writes in a second step: what `SET NX` guards do, spelled with these scripts."""

    def claim(self, request: ClaimRequest, /) -> ClaimOutcome:
        record = self.lookup(request.key)
        if record is not None:
            return super().claim(request)
        time.sleep(0.005)
        self._client.delete(self._places.record(request.key))
        return super().claim(request)


class KeysFold(redis.RedisStore):
    """Keys as a case-insensitive, space-padding collation would have them."""

    def _key(self, key: bytes) -> bytes:
        return super()._key(key.lower().rstrip(b" \0"))

    def _places(self, key: bytes) -> Any:
        return super()._places(key.lower().rstrip(b" \0").ljust(16))

    def _claim(self, requests: Any) -> list[ClaimOutcome]:
        folded = [request.key.lower().rstrip(b" \0").ljust(16) for request in requests]
        return super()._claim([_with_key(request, key) for request, key in zip(requests, folded, strict=True)])


def _with_key(request: ClaimRequest, key: bytes) -> ClaimRequest:
    return ClaimRequest(key, request.nonce, request.lease, request.retention, request.fingerprint)


@contextlib.contextmanager
def redis_subject(kind: type[redis.RedisStore]) -> Iterator[Subject]:
    prefix = f"t{uuid.uuid4().hex[:12]}:"
    # With the retries that the store itself would have, and room for a mutant that uses the client beside it.
    client: Any = redis.open_redis(servers.redis(), max_connections=500)._client
    stores = [kind(client, prefix=prefix)]
    yield Subject(lambda: redis_short.another(stores, lambda: kind(client, prefix=prefix)))
    for name in client.scan_iter(match=f"{prefix}*", count=1000):
        client.delete(name)
    client.close()


@pytest.mark.parametrize("mutant", REDIS, ids=lambda mutant: mutant.name)
def test_redis_mutants_are_killed(mutant: Mutant) -> None:
    """Each check named for a mutant of a Lua script fails on it."""
    kind = type("Mutated", (MutatedRedis,), {"mutant": mutant})
    with redis_subject(kind) as subject:
        assert survivors(subject, mutant.killers) == []


@pytest.mark.parametrize(
    ("kind", "killers"),
    [
        (ReadThenWrite, ("test_one_of_100_racing_threads_wins",)),
        (KeysFold, ("test_keys_never_fold",)),
    ],
)
def test_redis_mutants_in_python_are_killed(kind: type[redis.RedisStore], killers: tuple[str, ...]) -> None:
    """A claim in two steps is won by several; folded keys are noticed."""
    with redis_subject(kind) as subject:
        assert survivors(subject, killers) == []


def test_an_unmutated_copy_survives(tmp_path: Path) -> None:
    """Control: through the same machinery, with nothing replaced, every killer named above passes."""
    nothing = Mutant("nothing", "record", "local RESERVED", "local RESERVED", ())
    with redis_subject(type("Same", (MutatedRedis,), {"mutant": nothing})) as subject:
        killers = sorted({name for mutant in REDIS for name in mutant.killers})
        assert survivors(subject, tuple(killers)) == killers
    same = mutated_memory(Mutant("nothing", "", "class MemoryStore:", "class MemoryStore:", ()))
    killers = sorted({name for mutant in MEMORY for name in mutant.killers})
    assert survivors(same, tuple(killers)) == killers


def test_a_replacement_that_does_not_apply_is_an_error() -> None:
    """A protection that moved must not leave its mutant behind, unnoticed."""
    with pytest.raises(LookupError):
        mutated_memory(Mutant("gone", "", "no such line", "", ()))
