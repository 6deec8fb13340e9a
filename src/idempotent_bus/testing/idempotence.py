"""`assert_idempotent`: runs a handler as an at-least-once bus does, under every single fault, and says what differed.

The handler runs under the real executor, over a store and a broker in memory (a transactional one in its inbox). Each
case has a message with a biz-id of its own, so that nothing need be undone between two cases.

    assert_idempotent(issue_card, {"payment_id": "p-1"}, observe=lambda: list(cards), outside=[(bank, "charge")])

The cases: one delivery; the same message again; a crash before and after each outside step, and between the handler and
its completion; a lost reply, and an error, at each of them; a worker that stands still at each of them until its lease
is over, and then goes on beside the one that took over; two messages that take turns; given several messages, another
order of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ConfigurationError
from ..hooks import ACK, CLAIM, CLAIMED, COMPLETE, DURABLE, HANDLER
from .clock import ManualClock
from .comparing import VARIES, effects, in_no_order, is_less, masked, published, under, varies_by_chance
from .faults import FAULTS, Action, Plan, Script
from .flaws import Finding, NotIdempotent, Reason
from .observing import Observe, difference, frozen, normal
from .outside import Call, OutsideStep
from .trial import Case, Subject, TrialRun

__all__ = ["assert_idempotent", "find_flaws"]


def assert_idempotent(
    handler: Callable[..., Any],
    message: Any,
    *,
    observe: Observe,
    outside: Sequence[OutsideStep] = (),
    biz_id: str | None = None,
    restart: Callable[[], object] | None = None,
    reset: Callable[[], object] | None = None,
    concurrently: bool = True,
) -> None:
    """Raise NotIdempotent, with the reasons, unless the handler does the same whatever happens around it.

    handler: a guarded one, or a plain function `(body, message)` or `(body)`.
    message: the body of a message, or a list of bodies that belong together: then their order is changed too.
    observe: gives what the handler's effects are seen by: rows, a list, a number; several in a tuple or a dict. What
        differs from run to run for no reason of the handler's (a row's own number) is found out, and not compared.
    outside: what the handler calls in other systems, each as an object and the name of the method: (bank, "charge").
        The handler is crashed before and after each such call; without them, only around it as a whole. What it
        publishes with an IdempotentProducer is an outside step by itself; nothing is sent.
    biz_id: the path of the biz-id in the body; a guarded handler's own, or the only field named so, unless given.
    restart: called after each crash: let it forget what a process forgets.
    reset: called before each case: undoes all effects. Needed only where they show in what other messages share, and
        not as a difference: a status, say. Numbers and collections are compared by what came to them.
    concurrently: False for a handler that cannot be called in other threads than this one.

    Raises ConfigurationError if it cannot find the biz-id, or what it would have to compare. Not safe for threads: what
    is in `outside` is replaced meanwhile.
    """
    findings = find_flaws(
        handler,
        message,
        observe=observe,
        outside=outside,
        biz_id=biz_id,
        restart=restart,
        reset=reset,
        concurrently=concurrently,
    )
    if findings:
        raise NotIdempotent(getattr(handler, "__name__", type(handler).__name__), findings)


def find_flaws(
    handler: Callable[..., Any],
    message: Any,
    *,
    observe: Observe,
    outside: Sequence[OutsideStep] = (),
    biz_id: str | None = None,
    restart: Callable[[], object] | None = None,
    reset: Callable[[], object] | None = None,
    concurrently: bool = True,
) -> list[Finding]:
    """As `assert_idempotent`, but gives the findings, at most one for each reason, instead of raising."""
    bodies = list(message) if isinstance(message, (list, tuple)) else [message]
    trial = _Trial(handler, bodies, observe, outside, biz_id, restart, reset)
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # every injected failure would be logged with its traceback
    try:
        with trial.outside.patched():
            trial.run_cases(concurrently)
    finally:
        logging.disable(disabled)
    return list(trial.findings.values())


class _Trial:
    """All cases of one handler."""

    def __init__(
        self,
        handler: Callable[..., Any],
        bodies: Sequence[Any],
        observe: Observe,
        outside: Sequence[OutsideStep],
        biz_id: str | None,
        restart: Callable[[], object] | None,
        reset: Callable[[], object] | None,
    ) -> None:
        self.reset = reset
        self.subject = Subject(handler, bodies, observe, outside, biz_id, restart)
        self.bodies = bodies
        self.outside = self.subject.outside
        self.findings: dict[Reason, Finding] = {}
        self.template: Any = None
        self.shown_once: Any = None
        self.stops_early = False

    # --- the cases ------------------------------------------------------------------------------------------

    def run_cases(self, concurrently: bool) -> None:
        first = self._play("one delivery", {}, self.bodies[:1])
        if not first.finished:
            self._note_failure(first)
            return
        if not first.changed:
            raise ConfigurationError(
                "observe shows no effect of one delivery, so no flaw could ever be seen: observe more; or, if effects "
                "show in what several messages share, give reset=, which undoes them"
            )
        self.template = self._common(first, self._play("one delivery", {}, self.bodies[:1]))
        self._note_habits(first)
        self._run_again_unguarded()
        self._compare(self._play("the same message twice", {}, self.bodies[:1], copies=2))
        passed = first.script.passed
        for number, step in enumerate(passed, 1):
            for action in FAULTS:
                if step in (HANDLER, ACK) and action in (Action.ERROR, Action.CRASH_BEFORE):
                    continue  # nothing was done yet, or the broker's own
                self._compare(self._play(_said(action, step, number, passed), {number: action}, self.bodies[:1]))
        if concurrently and self.subject.inbox is None:
            self._run_late(first)
            self._run_in_turns(first)
        if len(self.bodies) > 1:
            self._run_out_of_order()

    def _run_again_unguarded(self) -> None:
        """What the handler does of itself when it is called again: whether it looks, and when."""
        if self.subject.inbox is not None:
            return
        case = self._play("the same message again, unguarded", {}, self.bodies[:1], copies=2, guarded=False)
        if len(case.attempts) == 2:
            once, again = (attempt.calls for attempt in case.attempts)
            # It found that it was done before, but not before it had done something again.
            self.stops_early = len(again) < len(once) and any(call.changed for call in again)

    def _run_late(self, first: Case) -> None:
        for number in range(1, len(first.script.passed) + 1):
            step = first.script.passed[number - 1]
            title = f"its worker stands still before {step} until its lease is over, then goes on beside the next one"
            case = self._play(title, {number: Action.STALL}, self.bodies[:1], workers=2)
            expected = self._expected(case)
            if not case.finished:
                self._note_failure(case)
                continue
            if case.shown == expected:
                continue
            known = {Reason.REPEATED, Reason.UNSTABLE, Reason.CHECKED_LATE}
            if effects(case.shown) == effects(expected):
                known = {Reason.PUBLISHED_ANEW}
            if not known & set(self.findings):  # else it is the same flaw once more
                why = "what it looks at may have changed by the time it writes"
                self._find(Reason.NOT_ATOMIC, case, why, expected=expected, got=case.shown)

    def _run_in_turns(self, first: Case) -> None:
        """Two messages with ids of their own, whose handlers take turns at each step."""
        two = [self.bodies[0], self.bodies[1] if len(self.bodies) > 1 else self.bodies[0]]
        after = self._play("two messages, one after the other", {}, two, workers=2)
        again = self._play("two messages, one after the other", {}, two, workers=2)
        if len(after.finished) < 2:
            error = next((attempt.error for attempt in after.attempts if attempt.error is not None), None)
            raise ConfigurationError(
                f"the handler fails in another thread ({type(error).__name__}: {error}); if it cannot be called there, "
                "say concurrently=False"
            ) from error
        template = self._common(after, again)
        for number in range(1, len(after.script.passed) + 1):
            step = after.script.passed[number - 1]
            title = f"another message is handled while it stands before {step}"
            case = self._play(title, {number: Action.SWITCH}, two, workers=2)
            shown = under(template, case.shown)
            if len(case.finished) < len(two):
                self._note_failure(case)
            elif shown != template:
                self._find(Reason.NOT_ATOMIC, case, expected=template, got=shown)

    def _run_out_of_order(self) -> None:
        in_order = self._play("in order", {}, self.bodies)
        template = self._common(in_order, self._play("in order", {}, self.bodies))
        case = self._play("the last message first", {}, self.bodies, backwards=True)
        shown = under(template, case.shown)
        if shown != template:
            self._find(Reason.ORDER, case, expected=template, got=shown)

    def _common(self, one: Case, other: Case) -> Any:
        """What two clean runs have left alike. Raises ConfigurationError if that is nothing that could be compared."""
        template = masked(one.shown, other.shown)
        if template == VARIES:
            raise ConfigurationError(
                f"nothing can be compared: {one.title} left {one.shown!r}, and once more {other.shown!r}. If effects "
                "show in what several messages share, give reset=, which undoes them; if not, observe less"
            )
        return template

    # --- what is found ------------------------------------------------------------------------------------------

    def _note_failure(self, case: Case) -> None:
        error = next((attempt.error for attempt in case.attempts if attempt.error is not None), None)
        why = next(iter(case.given_up.values()), "")
        if case.answered:
            self._find(Reason.ACKED, case)
        elif "HandlerEndedIt" in why:
            self._find(Reason.COMMITTED, case, why)
        else:
            self._find(Reason.FAILED, case, f"{type(error).__name__}: {error}" if error else why)

    def _note_habits(self, case: Case) -> None:
        if case.mutated:
            self._find(Reason.MUTATED, case, case.mutated)

    def _expected(self, case: Case) -> Any:
        case.shown = under(self.template, case.shown)
        return self.template

    def _compare(self, case: Case) -> None:
        self._note_habits(case)
        expected = self._expected(case)
        if case.finished and case.shown == expected:
            return
        if not case.finished:
            if self.subject.policy.on_abandoned == "quarantine" and not is_less(expected, case.shown):
                return  # a person decides, and nothing was done twice
            self._note_failure(case)
            return
        if len(published(case.shown)) > len(published(expected)) and self.outside.anew:
            self._find(Reason.PUBLISHED_ANEW, case, expected=expected, got=case.shown)
            if effects(case.shown) == effects(expected):
                return
        if any(attempt.how == "returned" for attempt in case.attempts[:-1] or case.attempts) and is_less(
            case.shown, expected
        ):
            swallowed = case.attempts[0].how == "returned" and bool(case.script.applied)
            self._find(Reason.SWALLOWED if swallowed else Reason.LOST, case, expected=expected, got=case.shown)
            return
        self._find(self._why_repeated(case), case, self._calls_that_differ(case), expected=expected, got=case.shown)

    def _why_repeated(self, case: Case) -> Reason:
        if self._calls_that_differ(case) or varies_by_chance(self.template, self.shown_once):
            return Reason.UNSTABLE
        return Reason.CHECKED_LATE if self.stops_early else Reason.REPEATED

    def _calls_that_differ(self, case: Case) -> str:
        """The first call that two attempts for the same message made with other arguments."""
        by_name: dict[str, str] = {}
        for attempt in case.attempts:
            for call in attempt.calls:
                if call.changed or call.name in by_name:
                    known = by_name.setdefault(call.name, call.arguments)
                    if known != call.arguments:
                        return f"{call.name} was called with ({known}), then with ({call.arguments})"
        return ""

    def _find(self, reason: Reason, case: Case, detail: str = "", *, expected: Any = None, got: Any = None) -> None:
        self.findings.setdefault(reason, Finding(reason, case.title, expected, got, detail))

    # --- one case -------------------------------------------------------------------------------------------------

    def _play(
        self,
        title: str,
        plan: Plan,
        bodies: Sequence[Any],
        *,
        copies: int = 1,
        workers: int = 1,
        guarded: bool = True,
        backwards: bool = False,
    ) -> Case:
        case = Case(title)
        case.script = Script(plan, error=self.subject.error, watch=case)
        fresh = [self.subject.ids.fresh(body) for body in bodies]
        names = {str(self.subject.ids.of(body)): f"<biz-id {number}>" for number, body in enumerate(fresh, 1)}
        clock = ManualClock()
        run = TrialRun(self.subject, case, clock, {str(self.subject.ids.of(body)): body for body in fresh})
        self.outside.published.clear()
        if self.reset is not None:
            self.reset()
        before = frozen(self.subject.observe())
        if guarded:
            for body in reversed(fresh) if backwards else fresh:
                for _ in range(copies):
                    run.broker.publish(body)
            run.drain(workers)
        else:
            run.call_unguarded(fresh[0], copies)
        for biz_id, key in run.keys.items():
            names[key.hex()] = f"<key of {names[biz_id]}>"
        after = frozen(self.subject.observe())
        case.changed = after != before or bool(self.outside.published)
        shown = normal(difference(before, after), names)
        published = normal(list(self.outside.published.values()), names)
        case.shown = in_no_order({"effects": shown, "published": published} if published else shown)
        if not plan and len(fresh) == 1 and guarded:
            self.shown_once = case.shown
        for attempt in case.attempts:
            attempt.calls = [Call(call.name, normal(call.arguments, names), call.changed) for call in attempt.calls]
        return case


def _said(action: Action, step: str, number: int, passed: Sequence[str]) -> str:
    """A case in words. What is called several times is numbered."""
    names = {HANDLER: "the handler", CLAIM: "the claim", ACK: "the ack"}
    names |= {COMPLETE: "the completion", DURABLE: "the completion's answer", CLAIMED: "the claim's answer"}
    name = names.get(step, step)
    if passed.count(step) > 1:
        name += f" (call {passed[:number].count(step)})"
    return {
        Action.CRASH_BEFORE: f"a crash just before {name}",
        Action.CRASH_AFTER: f"a crash just after {name}",
        Action.REPLY_LOST: f"{name} is done, but its reply is lost",
        Action.ERROR: f"{name} fails",
    }[action]
