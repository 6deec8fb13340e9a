"""The lower half with one protection taken out: each as a replacement in the library's own text.

One that no longer applies is an error, so that a protection that moved does not leave its mutant behind, unnoticed.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

import pytest

from idempotent_bus import moving
from idempotent_bus.claims import Claims
from idempotent_bus.execution import LeasedExecution
from idempotent_bus.executor import Executor
from idempotent_bus.failing import Failing
from idempotent_bus.lease import LeaseKeeper
from idempotent_bus.settlement import MessageSettlement
from idempotent_bus.stores.memory import MemoryStore


@dataclass(frozen=True)
class Mutant:
    """name: the protection that is missing. row: which must fail. says: the claim that is then untrue.

    owner, method: what is replaced; changes: old text and new, in this order.
    """

    row: str
    name: str
    says: str
    owner: Any
    method: str
    changes: tuple[tuple[str, str], ...]

    def apply(self, patch: pytest.MonkeyPatch) -> None:
        rewrite(patch, self.owner, self.method, *self.changes)


def rewrite(patch: pytest.MonkeyPatch, owner: Any, name: str, *changes: tuple[str, str]) -> None:
    """Replace a function by its own text with changes."""
    static = inspect.getattr_static(owner, name)
    text = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    for old, new in changes:
        if text.count(old) != 1:
            raise LookupError(f"the mutant does not apply: {old!r} is there {text.count(old)} times")
        text = text.replace(old, new)
    module = owner if inspect.ismodule(owner) else sys.modules[owner.__module__]
    made: dict[str, Any] = {}
    # The module's own names, so that what a test replaces there is replaced here too.
    exec(compile(f"from __future__ import annotations\n{text}", f"<mutant of {name}>", "exec"), module.__dict__, made)
    patch.setattr(owner, name, staticmethod(made[name]) if isinstance(static, staticmethod) else made[name])


ACK = "self._step(ACK, work.settle.ack)"
NO_RENEWAL = (("now - e.renewed_at >= e.lease / 3", "False"),)

MUTANTS = [
    # completed
    Mutant(
        "a_completed_copy", "replays are not looked up", "a copy is acked as a replay",
        MemoryStore, "_claim", (("if entry.state is State.COMPLETED:", "if False:"),),
    ),
    Mutant(
        "a_completed_copy", "the result is not stored", "the copy gets the stored result",
        Executor, "_complete", (("encode_result(value, work.scope, self._max_result)", "None"),),
    ),
    Mutant(
        "a_completed_copy", "acked before completed", "acked only after the completion is durable",
        Executor, "finish", (
            ("return self._ack(execution, execution.completed)", "return execution.completed"),
            ("if execution.completed is None:", "self._step(ACK, execution.work.settle.ack)\n        if True:"),
        ),
    ),
    Mutant(
        "a_completed_copy", "a replay is not acked", "still in its queue",
        Executor, "_dispatch", ((ACK, "pass"),),
    ),
    Mutant(
        "completed_stays_completed", "the redrive number is not looked at", "a redriven message runs again",
        MemoryStore, "_claim", (("0 if request.redrive > entry.redrive else entry.attempts", "entry.attempts"),),
    ),
    Mutant(
        "completed_stays_completed", "a redrive reopens", "the other copy is a replay",
        MemoryStore, "_claim", (
            ("if entry.state is State.COMPLETED:", "if entry.state is State.COMPLETED and not request.redrive:"),
        ),
    ),
    # busy, failed
    Mutant(
        "a_busy_copy_waits", "busy runs", "the copy is found busy",
        MemoryStore, "_claim", (("if held and entry.lease_ends > now:", "if False:"),),
    ),
    Mutant(
        "a_busy_copy_waits", "busy costs an attempt", "busy costs no attempt",
        MemoryStore, "_claim", (("return Busy(", "entry.attempts += 1; return Busy("),),
    ),
    Mutant(
        "a_busy_copy_waits", "a tight loop", "tight loop",
        Executor, "_wait", (("self._failing.spread(how, delay)", "0.0"),),
    ),
    Mutant(
        "a_busy_copy_waits", "busy is acked", "the copy is answered later",
        Executor, "_dispatch", (
            ("return self._wait(work, Ended.BUSY, outcome.retry_after)", f"{ACK}; return Ending(Ended.BUSY)"),
        ),
    ),
    Mutant(
        "a_failure_is_tried_again", "not released", "it runs again, and completes",
        Executor, "fail", (("self._claims.release(execution.hold, attempt, abandoned=doubtful)", "None"),),
    ),
    Mutant(
        "a_failure_is_tried_again", "no backoff", "not before its backoff",
        Executor, "_wait", (("self._failing.spread(how, delay)", "0.0"),),
    ),
    Mutant(
        "a_failure_is_tried_again", "the attempt is not counted", "the failed attempt is counted",
        Executor, "fail", (("release(execution.hold, attempt,", "release(execution.hold, attempt - 1,"),),
    ),
    Mutant(
        "a_failure_is_tried_again", "acked instead of put off", "it runs again, and completes",
        Executor, "_wait", (("self._step(WAIT, work.settle.wait, self._failing.spread(how, delay))", ACK),),
    ),
    Mutant(
        "a_wait_is_confirmed_before_the_ack", "acked although it could not be put off", "is not lost",
        MessageSettlement, "wait", (
            (
                "channel.basic_delay(message.delivery_tag, delay)",
                "try:\n            channel.basic_delay(message.delivery_tag, delay)\n"
                "        except OSError:\n            self.ack()",
            ),
        ),
    ),
    Mutant(
        "the_attempts_are_used_up", "the last failure does not tell", "the headers say why",
        Failing, "reason", (("Reason.ATTEMPTS if attempt >=", "Reason.ATTEMPTS if attempt - 1 >="),),
    ),
    Mutant(
        "the_attempts_are_used_up", "no headers", "the headers say why",
        MessageSettlement, "rescue", (("self._dead_letter, known,", "self._dead_letter, {},"),),
    ),
    Mutant(
        "the_attempts_are_used_up", "the body is made anew", "the body is untouched",
        moving, "put", (
            (
                "message.channel, content_of(message)",
                "message.channel, __import__('dataclasses').replace(content_of(message), "
                "body=__import__('json').dumps(message.payload).encode())",
            ),
        ),
    ),
    Mutant(
        "a_permanent_error", "permanent errors are as others", "a permanent error is not tried again",
        Failing, "reason", (("if isinstance(error, self._permanent):", "if False:"),),
    ),
    Mutant(
        "a_dead_letter_is_confirmed_before_the_ack", "acked although it could not be written", "in the dead letter",
        MessageSettlement, "dead_letter", (("self.wait(_DEAD_LETTER_AGAIN)", "self.ack()"),),
    ),
    Mutant(
        "a_dead_letter_is_confirmed_before_the_ack", "what is held may run", "it does not run again",
        Executor, "_bury", (("max(attempts, self.policy.most_attempts)", "attempts"),),
    ),
    Mutant(
        "a_conflict", "fingerprints are not compared", "a conflict is dead-lettered",
        MemoryStore, "_claim", (("if differs and", "if False and"),),
    ),
    Mutant(
        "what_has_no_id_or_no_body", "acked into nothing", "the dead letter has them",
        Executor, "refuse", (
            ("self._step(DEAD_LETTER, settle.dead_letter, reason, error, 0)", "not self._step(ACK, settle.ack)"),
        ),
    ),
    # abandoned, too old
    Mutant(
        "abandoned_is_run_again", "taken for done", "it runs again",
        Executor, "_claimed", (
            ("if outcome.taken_over:", f"if outcome.taken_over:\n        return {ACK} or Ending(Ended.REPLAYED)"),
        ),
    ),
    Mutant(
        "abandoned_is_run_again", "what died does not count", "the attempt that died is counted",
        MemoryStore, "_take", (("if request.reserve else attempts + 1", "if request.reserve else 1"),),
    ),
    Mutant(
        "abandoned_is_run_again", "leases never lapse", "it runs again",
        MemoryStore, "_claim", (("if held and entry.lease_ends > now:", "if held:"),),
    ),
    Mutant(
        "abandoned_is_run_again", "tokens do not grow", "tokens only grow",
        MemoryStore, "_take", (("token=next(self._tokens)", "token=1"),),
    ),
    Mutant(
        "abandoned_is_quarantined", "it is run again", "it is dead-lettered",
        Executor, "_claimed", (('if self.policy.on_abandoned != "rerun":', "if False:"),),
    ),
    Mutant(
        "abandoned_is_quarantined", "no record is kept", "the record is kept for a person",
        Executor, "_quarantine", (("if isinstance(store, QuarantineStore):", "if False:"),),
    ),
    Mutant(
        "abandoned_is_quarantined", "a quarantined record may be claimed", "a copy is dead-lettered too",
        MemoryStore, "_claim", (("if entry.state is State.QUARANTINED:", "if False:"),),
    ),
    Mutant(
        "abandoned_is_probed", "the probe is not asked", "what is there is acked",
        Executor, "_claimed", (('if self.policy.on_abandoned != "rerun":', "if False:"),),
    ),
    Mutant(
        "abandoned_is_probed", "its yes is not heard", "what is there is acked",
        Executor, "_abandoned", (("if done:", "if False:"),),
    ),
    Mutant(
        "abandoned_is_probed", "its yes is not recorded", "what is there is completed",
        Executor, "_abandoned", (
            ("ending = self.finish(execution, None)", f"ending = {ACK} or Ending(Ended.COMPLETED)"),
        ),
    ),
    Mutant(
        "a_handler_that_cannot_tell", "a doubt is a failure like others", "nothing runs before a person",
        Executor, "fail", (("abandoned=doubtful", "abandoned=False"),),
    ),
    Mutant(
        "told_to_stop_in_the_middle", "the lease is kept", "another worker runs it at once",
        Executor, "_run", (
            (
                "execution.ending = Ending(Ended.FAILED)\n"
                "                self._claims.release(execution.hold, execution.attempt, abandoned=True)",
                "execution.ending = Ending(Ended.FAILED)",
            ),
        ),
    ),
    Mutant(
        "told_to_stop_in_the_middle", "released as if nothing had been done", "not as if nothing had been done",
        Executor, "_run", (("execution.attempt, abandoned=True)", "execution.attempt)"),),
    ),
    Mutant(
        "too_old", "age is not looked at", "an old one is dead-lettered",
        Failing, "is_too_old", (("return work", "return False and work"),),
    ),
    # leases and tokens
    Mutant(
        "a_long_handler_keeps_its_lease", "leases are not renewed", "it completes|its copy is a replay|nobody takes",
        LeaseKeeper, "tick", NO_RENEWAL,
    ),
    Mutant(
        "a_late_completion_that_nobody_overtook", "refused by the worker's clock", "a late completion counts",
        Executor, "_complete", (("if ours:", "if ours and not execution.lease_lost:"),),
    ),
    Mutant(
        "a_late_completion_that_was_overtaken", "neither token nor nonce are compared",
        "a superseded completion is refused",
        MemoryStore, "_owned", (("or entry.token != hold.token\n        or entry.nonce != hold.nonce", ""),),
    ),
    Mutant(
        "a_late_completion_that_was_overtaken", "the refusal is not heard", "a superseded completion is refused",
        Executor, "_complete", (("if ours:", "if True:"),),
    ),
    Mutant(
        "a_late_completion_that_was_overtaken", "refused, but acked", "the refused copy comes back",
        Executor, "_lost", (
            ("return self._wait(work, Ended.LEASE_LOST, self.policy.busy_delay)",
             f"{ACK}; return Ending(Ended.LEASE_LOST)"),
        ),
    ),
    # replies that get lost
    Mutant(
        "a_claim_whose_reply_was_lost", "asked again with another nonce", "a claim that was made is recognised",
        Claims, "singly", (("self.store().claim, request)", "self.store().claim, self.request(work))"),),
    ),
    Mutant(
        "a_claim_whose_reply_was_lost", "the nonce in doubt is forgotten", "a claim that was in doubt is recognised",
        Claims, "remember",
        (("self._doubtful[request.key, request.fingerprint] = request.nonce, request.reserve", "pass"),),
    ),
    Mutant(
        "a_claim_whose_reply_was_lost", "the nonce is not compared", "a claim that was made is recognised",
        MemoryStore, "_claim", (("if held and entry.nonce == request.nonce:", "if False:"),),
    ),
    Mutant(
        "a_completion_whose_reply_was_lost", "not asked again", "both are completed in the end",
        Executor, "_complete", (("if self._clock() + pause >= give_up:", "if True:"),),
    ),
    Mutant(
        "a_completion_whose_reply_was_lost", "guessed", "acked only after the completion is durable",
        Executor, "_complete", (
            ("if self._clock() + pause >= give_up:", "ours = True; break\n            if False:"),
        ),
    ),
    Mutant(
        "in_doubt_neither_run_nor_acked", "run in doubt", "nothing runs in doubt",
        Executor, "_dispatch", (
            (
                "return self._in_doubt(work)",
                "won = Claimed(1, 1); return self._claimed(work, Claim(claim.request, won, 0.0), won, finish)",
            ),
        ),
    ),
    Mutant(
        "in_doubt_neither_run_nor_acked", "acked in doubt", "nothing is acked in doubt",
        Executor, "_in_doubt", (("return self._wait(", f"return {ACK} or Ending(Ended.IN_DOUBT) or self._wait("),),
    ),
    Mutant(
        "in_doubt_neither_run_nor_acked", "given up in doubt", "nothing is given up for a doubt",
        Executor, "_in_doubt", (
            (
                "return self._wait(",
                "work.settle.dead_letter(Reason.ATTEMPTS, '', 0); return Ending(Ended.IN_DOUBT) or self._wait(",
            ),
        ),
    ),
    # manual, windows
    Mutant(
        "manual_completion", "returning is success", "returning acks nothing",
        Executor, "_run", (("if self._manual and execution.completed is None:", "if False:"),),
    ),
    Mutant(
        "manual_completion", "not renewed after returning", "the lease is renewed meanwhile",
        LeaseKeeper, "tick", NO_RENEWAL,
    ),
    Mutant(
        "manual_completion", "complete does not ack", "complete acks",
        Executor, "_ack", (("self._step(ACK, execution.work.settle.ack)", "pass"),),
    ),
    Mutant(
        "manual_completion", "a failure is forgotten", "fail lets it run again",
        LeasedExecution, "fail", (("self._finisher.fail(self, error)", "pass"),),
    ),
    Mutant(
        "a_reservation_is_given_back", "kept", "what never started blocks nobody",
        Executor, "handle_window", (("for claim in ahead.values():", "for claim in ():"),),
    ),
    Mutant(
        "a_reservation_is_given_back", "given back with an attempt", "what never started blocks nobody",
        Claims, "give_back", (("claim.outcome.attempt - 1", "claim.outcome.attempt"),),
    ),
    Mutant(
        "one_failure_touches_no_other", "a failure ends its window", "the good ones are handled",
        Executor, "fail", (("self._keeper.remove(execution)\n", "raise error\n"),),
    ),
]  # fmt: skip
