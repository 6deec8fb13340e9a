"""The store's answers to a claim: rules 1 to 7 of `store.py`, on a record of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from . import words as w
from .broker import Bounds, Entry, State
from .explore import Violation

__all__ = ["BUSY", "CLAIMED", "COMPLETED_BEFORE", "CONFLICT", "IN_QUARANTINE", "Answer", "Rules"]

CLAIMED: Final = 0
BUSY: Final = 1
COMPLETED_BEFORE: Final = 2
CONFLICT: Final = 3
IN_QUARANTINE: Final = 4


#: Where a superseded holder's next step is refused, whatever happens first.
_TOLD_NO: Final = (w.SENT, w.RELEASE, w.ABANDON, w.GIVE_UP, w.QUARANTINE)


class Answer(NamedTuple):
    """One possible answer. after: the state with it (and the claimer's entry as it was). fault: it needed one."""

    kind: int
    after: Any
    fault: bool = False
    attempt: int = 0
    taken_over: int = 0
    violation: Violation | None = None


class Rules:
    """The claim, atomically, with everything that it can find."""

    def __init__(self, bounds: Bounds) -> None:
        self._keys = bounds.keys
        self._bodies = bounds.bodies
        self._policy = bounds.policy
        self._mutant = bounds.mutant

    def claim(self, state: State, number: int, at: int, entry: Entry, reserve: bool) -> Iterator[Answer]:
        recs = state[0]
        key = self._keys[entry[1]]
        st, att, rdv, fp, tov, effect, starts = recs[key]
        mutant = self._mutant
        held = st in (w.RESERVED, w.IN_PROGRESS)
        if st == w.ABSENT:
            yield self._take(state, number, at, entry, reserve, 0, entry[3], 0, False)
            return
        if held and entry[4] == w.OWNER and mutant != "no nonce":
            yield Answer(CLAIMED, state, False, att + (st == w.RESERVED), tov)
            return
        body = self._bodies[entry[1]]
        if fp != body and st != w.RELEASED and mutant != "conflict taken for a duplicate":
            yield Answer(CONFLICT, state)
            return
        if st == w.COMPLETED:
            if fp != body:
                text = "another body with this biz-id is told that it is done"
                yield Answer(COMPLETED_BEFORE, state, violation=Violation("I8", text))
            elif mutant == "completed is not final":
                yield self._take(state, number, at, entry, reserve, att, rdv, 0, False)
            else:
                yield Answer(COMPLETED_BEFORE, state)
            return
        if st == w.QUARANTINED:
            yield Answer(IN_QUARANTINE, state)
            return
        if not held:
            yield self._take(state, number, at, entry, reserve, att, rdv, 0, False)
            return
        # Held by another nonce: its lease has lapsed, or has not.
        if mutant == "busy is an attempt":
            counted = (st, att + 1, rdv, fp, tov, effect, starts)
            yield Answer(BUSY, ((*recs[:key], counted, *recs[key + 1 :]), *state[1:]))
        elif mutant != "busy is acked":
            yield Answer(BUSY, state)
        else:
            yield Answer(COMPLETED_BEFORE, state)
        if mutant == "leases never end":
            return
        abandoned = int(st == w.IN_PROGRESS or bool(tov))
        stalled = self._is_alive(state, number, at, key)
        yield self._take(state, number, at, entry, reserve, att, rdv, abandoned, stalled)

    def _is_alive(self, state: State, number: int, at: int, key: int) -> bool:
        """True if the record's holder is there and renews: only a stall can have let its lease lapse."""
        for worker in (0, 1):
            for place, e in enumerate(state[2 + worker][0]):
                if e[4] == w.OWNER and self._keys[e[1]] == key and (worker, place) != (number, at):
                    return e[0] not in (w.RESERVATION, w.RESERVE_LOST)
        return False

    def _superseded(self, e: Entry) -> Entry:
        """A holder whose record was taken. Where it could only find that out and put the message off, it has."""
        if self._mutant or e[0] not in _TOLD_NO:
            return *e[:4], w.SUPERSEDED, *e[5:]  # type: ignore[return-value]
        return w.PUT_OFF, e[1], 1, e[3], w.NO_HOLD, 0, e[6] & w.DETACHED

    def _take(
        self,
        state: State,
        number: int,
        at: int,
        entry: Entry,
        reserve: bool,
        att: int,
        rdv: int,
        abandoned: int,
        stalled: bool,
    ) -> Answer:
        """A new token, this nonce, this fingerprint."""
        recs = state[0]
        key = self._keys[entry[1]]
        effect, starts = recs[key][5], recs[key][6]
        if entry[3] > rdv:
            starts = 0
            if self._mutant != "redrive starts nothing afresh":
                att = 0
        rdv = max(rdv, entry[3])
        workers = []
        violation: Violation | None = None
        for worker in (0, 1):
            entries, mem = state[2 + worker]
            changed = list(entries)
            for place, e in enumerate(entries):
                if not e[4] or self._keys[e[1]] != key or (worker, place) == (number, at):
                    continue
                if self._mutant == "tokens start anew" and recs[key][0] == w.ABSENT:
                    violation = Violation("I6", "the new token is not larger than one that is still in use")
                if e[4] != w.OWNER:
                    continue
                changed[place] = self._superseded(e)
                if not stalled:
                    continue
                if e[0] == w.SENT and self._policy == "rerun" and self._mutant != "the worker's clock":
                    effect = 0  # made by one whose lease lapsed: excused
                if e[0] in (w.CLAIM_LOST, w.PROBE, w.QUARANTINE):
                    starts += 1
            if mem[key] >> 1 & 3 == w.OWNER and not mem[key] & 1:
                starts += 1  # counted in doubt, and now nobody will begin it
            workers.append((tuple(changed), (*mem[:key], 0, *mem[key + 1 :])))
        made = (
            w.RESERVED if reserve else w.IN_PROGRESS,
            att if reserve else att + 1,
            rdv,
            self._bodies[entry[1]],
            abandoned,
            effect,
            starts,
        )
        after = ((*recs[:key], made, *recs[key + 1 :]), state[1], workers[0], workers[1], state[4])
        return Answer(CLAIMED, after, stalled, att + 1, abandoned, violation)
