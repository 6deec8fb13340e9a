"""Store mode: two workers, two messages, a window of two, a dedup store, and a broker that redelivers.

What each action mirrors: `fetch`, `reserve`, the order within a window: `executor.handle_window`, `claims.together`;
`claim`, `ask again`, doubt and the remembered nonce: `claims.singly`, `claims.remember`; what follows from an answer:
`executor._dispatch`, `executor._claimed`; `complete`: `executor._complete`, streamed as the design's window wants it
(the code, which waits for each, is one of its orders); `ack`, `put off`, `bury`: `settlement.py`; `redrive`:
`redrive.py`; the store's answers: `records.py` here, `store.py` there.

Beside what `broker.py` says of the size:

* Tokens are not numbers here. All that is ever done with one is to compare it with the record's (equal or not), so a
  hold is the owner's or superseded; token and nonce are given together and fall together. That new tokens are larger
  than old ones is checked where one is given.
* A lapsed lease shows only when somebody claims. So there is no clock: a claim that meets a held record is answered
  busy, or takes over. If its holder is gone, or is a reservation waiting for its turn (nobody renews these), both are
  possible without a fault; if it is alive, taking over is a fault: its renewals stalled for a whole lease.
* What a worker does between two outside steps is part of the first.

At most one effect (I2) is checked by what excuses a second: a crash, a lapsed lease or a silent store between an effect
and its completion, and nothing else. With a probe or a quarantine nothing excuses it but a holder that runs on past its
lease after somebody has looked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from . import words as w
from .broker import Bounds, Entry, Lower, State, Steps, off
from .explore import Step, Violation
from .records import BUSY, CLAIMED, COMPLETED_BEFORE, CONFLICT, Answer, Rules

__all__ = ["AGE_BY_ATTEMPT", "NONCE_BY_KEY", "StoreMode"]

#: A holder in these has not made its effect, and may, even with a lease that is over.
_BEFORE_EFFECT: Final = (w.RESERVATION, w.RUNNING)
#: What the library did when it was first modelled; see `mutants.py`.
NONCE_BY_KEY: Final = "a nonce is remembered by its key only"
AGE_BY_ATTEMPT: Final = "too old only at the first attempt"

#: What can happen in every configuration.
_EVERY: Final = """
fetch, claim, ask again, effect, effect refused by the fence, complete, ack, put off, let go, crash, cut,
take over a stalled, claim: reply lost, claim: silent, claim: silent, but done, complete: reply lost,
complete: silent, complete: silent, but done, put off: killed before the ack, put off: cut before the ack,
put off: unconfirmed, put off: unconfirmed, but there
"""


def _listed(text: str) -> set[str]:
    """The names in a list with commas; a name may have a comma of its own, before "but"."""
    return set(" ".join(text.split()).replace(", but", "; but").split(", "))


class StoreMode(Lower):
    """See the module. A record is (state, attempts, redrive, fingerprint, taken over, effect, starts)."""

    def __init__(self, bounds: Bounds) -> None:
        super().__init__(bounds)
        self._rules = Rules(bounds)
        fast = bounds.mutant == "the worker's clock"
        self._taking_over = "take over, by a clock that is fast" if fast else "take over a stalled"
        # Each copy that is a first delivery may begin once without being counted.
        self._most_starts = bounds.most + bounds.messages - self._number + bounds.extras + 1
        self._do = {
            w.FETCHED: self._claim,
            w.RESERVATION: self._turn,
            w.RESERVE_LOST: self._ask_again,
            w.CLAIM_LOST: self._ask_again,
            w.GIVE_BACK: self._give_back,
            w.RUNNING: self._run,
            w.SENT: self._complete,
            w.ACK: self._ack,
            w.RELEASE: self._release,
            w.ABANDON: self._release,
            w.PUT_OFF: self._put_off,
            w.GIVE_UP: self._give_up,
            w.BURY: self._bury,
            w.RELEASE_DEAD: self._release_dead,
            w.QUARANTINE: self._quarantine,
            w.PROBE: self._probe,
        }

    # --- the model --------------------------------------------------------------------------------------

    @property
    def actions(self) -> frozenset[str]:
        b = self.bounds
        more = {name.replace("; but", ", but") for name in _listed(_EVERY)}
        if self._together:
            more |= {"reserve", "reserve: reply lost", "reserve: silent", "begin", "begin on a stale clock"}
            more |= {"give back"}
        if b.extras:
            more |= {"a further copy lands"}
        if b.redrives:
            more |= {"redrive", "redrive: killed in between"}
        if b.ages:
            more |= {"grow old", "forget", "give back"}
        more |= {f"raise {how}" for how in b.raises}
        if "again" in b.raises:
            more |= {"release", "release: silent"}
        if "in doubt" in b.raises:
            more |= {"abandon", "abandon: silent"}
        if b.raises:
            more |= {"give up", "give up: silent", "bury", "bury: unconfirmed, but there", "bury: unconfirmed"}
            more |= {"release a dead one", "bury: killed before the ack", "bury: cut before the ack"}
        if b.policy == "quarantine":
            more |= {"quarantine", "quarantine: silent", "a person says: done", "a person says: not done"}
        if b.policy == "probe":
            more |= {"probe: done", "probe: not done", "probe: raised", "quarantine", "quarantine: silent"}
            more |= {"a person says: done", "a person says: not done"}
        return frozenset(more)

    # --- taking deliveries --------------------------------------------------------------------------------

    def _reservable(self, entries: tuple[Entry, ...]) -> bool:
        if not self._together or len(entries) < 2:
            return False
        return (
            all(
                e[0] == w.FETCHED and not e[6] & w.SINGLY and (not e[2] or self._mutant == "reserves redelivered")
                for e in entries
            )
            and self._keys[entries[0][1]] != self._keys[entries[1][1]]
        )

    def _reserve(self, out: list[Step], state: State, number: int, faults: bool) -> None:
        """Both at once; each has its own answer."""
        who = f"worker {'AB'[number]}, both"
        entries, mem = state[2 + number]
        if any(mem):
            if any(hold and not hold & 1 for hold in mem):
                self._of_entry(out, state, number, 0, faults)  # its nonce was of no reservation: singly
                return
            entries = tuple([(*e[:4], mem[self._keys[e[1]]] >> 1 & 3, *e[5:]) for e in entries])
            mine = (entries, (0,) * self._number)
            state = (*state[:2], mine, state[3], state[4]) if number == 0 else (*state[:3], mine, state[4])
        for first in self._answers(state, number, 0, entries[0], reserve=True):
            middle = (*first.after[:2], *first.after[2:4], first.after[4])
            for second in self._answers(middle, number, 1, entries[1], reserve=True):
                cost = first.fault + second.fault
                if cost and not faults:
                    continue
                action = self._taking_over if cost else "reserve"
                st: Any = second.after
                mine = [
                    _reserved(entry, answer) for entry, answer in zip(st[2 + number][0], (first, second), strict=True)
                ]
                out.append(Step(action, who, cost, self._with_entries(st, number, tuple(mine))))
                if faults and not cost and (first.kind == CLAIMED or second.kind == CLAIMED):
                    lost = [
                        (w.RESERVE_LOST, *e[1:4], w.OWNER if a.kind == CLAIMED else w.NO_HOLD, 0, e[6])
                        for e, a in zip(st[2 + number][0], (first, second), strict=True)
                    ]
                    after = self._with_entries(st, number, tuple(lost))
                    out.append(Step("reserve: reply lost", who, True, after))
        if faults:
            silent = tuple([(w.RESERVE_LOST, *e[1:4], w.NO_HOLD, 0, e[6]) for e in entries])
            out.append(Step("reserve: silent", who, True, self._with_entries(state, number, silent)))

    def _answers(self, state: State, number: int, at: int, entry: Entry, *, reserve: bool) -> Iterator[Answer]:
        return self._rules.claim(state, number, at, entry, reserve)

    # --- claiming -----------------------------------------------------------------------------------------

    def _claim(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        key = self._keys[entry[1]]
        mem = state[2 + number][1]
        noted = mem[key]
        # What may have been done and forgotten is no attempt before its record was looked at.
        reserve = bool(state[4][3] and entry[3] < 2 and not entry[6] & w.BEGUN and self._mutant != AGE_BY_ATTEMPT)
        if noted and (self._is_of(noted, entry[1]) or self._mutant == NONCE_BY_KEY):
            remembered, reserve = noted >> 1 & 3, bool(noted & 1)
            left = (*mem[:key], 0, *mem[key + 1 :])
            pair = ((state[2][0], left), state[3]) if number == 0 else (state[2], (state[3][0], left))
            state = (state[0], state[1], pair[0], pair[1], state[4])
            entry = (*entry[:4], remembered, *entry[5:])
        yield from self._ask(state, number, at, entry, "claim", reserve)

    def _is_of(self, noted: int, m: int) -> bool:
        return (noted >= w.OF_SECOND_BODY) == bool(self.bounds.bodies[m])

    def _note(self, m: int, reserve: bool) -> int:
        return (w.OWNER << 1) | reserve | (w.OF_SECOND_BODY if self.bounds.bodies[m] else 0)

    def _ask(self, state: State, number: int, at: int, entry: Entry, action: str, reserve: bool) -> Steps:
        key = self._keys[entry[1]]
        for answer in self._answers(state, number, at, entry, reserve=reserve):
            name = self._taking_over if answer.fault else action
            yield name, answer.fault, self._dispatched(answer, number, at, entry, reserve)
            if answer.kind == CLAIMED and not answer.fault:
                after, entry_now = answer.after, answer.after[2 + number][0][at]
                if entry[0] != w.CLAIM_LOST:
                    lost = (w.RESERVE_LOST if reserve else w.CLAIM_LOST, *entry_now[1:4], w.OWNER, 0, entry_now[6])
                    yield "claim: reply lost", True, self._put(after, number, at, lost)
                mem = after[2 + number][1]
                noted = (*mem[:key], self._note(entry[1], reserve), *mem[key + 1 :])
                yield "claim: silent, but done", True, self._put(after, number, at, off(entry_now), mem=noted)
        # Nothing arrived at the store.
        if self._mutant == "fails open":
            yield "claim: silent", True, Violation("I9", "the store is silent, and the handler runs all the same")
            return
        mem = state[2 + number][1]
        if entry[4] == w.OWNER:
            mem = (*mem[:key], self._note(entry[1], reserve), *mem[key + 1 :])
        yield "claim: silent", True, self._put(state, number, at, off(entry), mem=mem)

    @staticmethod
    def _excused(recs: Any, key: int) -> Any:
        """An attempt that was counted and will not begin, by a fault."""
        st, att, rdv, fp, tov, effect, starts = recs[key]
        return (*recs[:key], (st, att, rdv, fp, tov, effect, starts + 1), *recs[key + 1 :])

    def _dispatched(self, answer: Answer, number: int, at: int, entry: Entry, reserve: bool) -> Any:
        """What follows from an answer, up to the next outside step. Mirrors `executor._dispatch`."""
        state = answer.after
        now = state[2 + number][0][at]
        if isinstance(answer.violation, Violation):
            return answer.violation
        if answer.kind == COMPLETED_BEFORE and not state[4][0] >> now[1] & 1 and self._mutant == "scopes share a key":
            return Violation("I14", "a message of one scope is told that it is done, since another scope's is")
        if answer.kind != CLAIMED:
            return self._put(state, number, at, self._refused(answer, now))
        got = (w.RESERVATION, *now[1:4], w.OWNER, answer.attempt, now[6])
        return self._begun(state, number, at, got, answer.taken_over, reserve)

    def _refused(self, answer: Answer, entry: Entry) -> Entry:
        """The entry after an answer that is not a claim."""
        if answer.kind == COMPLETED_BEFORE:
            return (w.ACK, *entry[1:4], w.NO_HOLD, 0, entry[6] & w.DETACHED)
        if answer.kind == BUSY:
            return off(entry)
        return (w.BURY, *entry[1:4], w.NO_HOLD, 0, entry[6] & w.DETACHED)

    def _begun(self, state: State, number: int, at: int, entry: Entry, taken_over: int, reserve: bool) -> Any:
        """A claim that is ours. Mirrors `executor._claimed`."""
        _, m, red, rdv, hold, attempt, flags = entry
        flags &= w.DETACHED
        b, key = self.bounds, self._keys[m]
        old = state[4][3] and rdv < 2
        if taken_over and b.policy != "rerun":
            phase = w.PROBE if b.policy == "probe" else w.QUARANTINE
            return self._put(state, number, at, (phase, m, red, rdv, hold, attempt, flags))
        if old and attempt == 1 and not taken_over:
            return self._put(state, number, at, (w.BURY, m, 1, rdv, hold, 0, flags | w.THEN_RELEASE))
        if attempt > b.most:
            if state[0][key][6] < b.most and not b.ages:
                return Violation("I12", f"given up for its attempts, of which only {state[0][key][6]} began")
            return self._put(state, number, at, (w.BURY, m, 1, rdv, hold, attempt - 1, flags | w.THEN_RELEASE))
        if reserve and (attempt > 1 or red) and self._mutant != "reserves redelivered":
            return self._put(state, number, at, (w.GIVE_BACK, m, red, rdv, hold, attempt, flags))
        return self._started(state, number, at, (w.RUNNING, m, red | 1, rdv, hold, attempt, flags))

    def _started(self, state: State, number: int, at: int, entry: Entry) -> Any:
        """The handler begins."""
        recs, key = state[0], self._keys[entry[1]]
        if entry[4] == w.OWNER:
            st, att, rdv, fp, tov, effect, starts = recs[key]
            tov = 0  # it has been looked at
            starts += 1
            if starts > self._most_starts and not self.bounds.ages:
                return Violation("I12", f"the handler begins for the {starts}th time, {self.bounds.most} are allowed")
            if att > starts and not self.bounds.ages:  # there an old message's claim ends unbegun
                return Violation("I12", f"{att} attempts are counted, and the handler begins for the {starts}th time")
            recs = (*recs[:key], (st, att, rdv, fp, tov, effect, starts), *recs[key + 1 :])
        return self._put(state, number, at, entry, recs=recs)

    def _turn(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        """A reservation's turn has come: begin, or if its lease may be over, ask again."""
        if entry[4] == w.OWNER:
            st, att, *_ = state[0][self._keys[entry[1]]]
            tov = state[0][self._keys[entry[1]]][4]
            if st == w.RESERVED:
                yield "begin", False, self._begun(state, number, at, (*entry[:5], att + 1, entry[6]), tov, True)
                return
        yield from self._ask(state, number, at, entry, "ask again", True)
        if entry[4] == w.SUPERSEDED and not entry[2]:
            stale = (w.RUNNING, entry[1], 1, *entry[3:5], 1, entry[6] & (w.DETACHED | w.FENCED_OFF))
            yield "begin on a stale clock", True, self._started(state, number, at, stale)

    def _ask_again(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        yield from self._ask(state, number, at, entry, "ask again", entry[0] == w.RESERVE_LOST)

    def _give_back(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        recs, key = state[0], self._keys[entry[1]]
        if entry[4] == w.OWNER:
            rec = recs[key]
            back = (w.IN_PROGRESS if rec[4] else w.RELEASED, entry[5] - 1, *rec[2:])
            recs = (*recs[:key], back, *recs[key + 1 :])
        again = (w.FETCHED, *entry[1:4], w.NO_HOLD, 0, (entry[6] & w.DETACHED) | w.SINGLY | w.BEGUN)
        yield "give back", False, self._put(state, number, at, again, recs=recs)

    # --- the handler ----------------------------------------------------------------------------------------

    def _run(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        """The effect, and what follows at once: the completion is sent, or the handler raises."""
        bounds = self.bounds
        made = self._effect(state, entry)
        if isinstance(made, Violation):
            yield "effect", False, made
        elif made is None:
            # The resource refuses its token: as if the handler had raised, and its release is refused too.
            yield "effect refused by the fence", False, self._put(state, number, at, (w.RELEASE, *entry[1:]))
        else:
            recs, workers = made
            sent = (w.SENT, *entry[1:])
            if self._mutant == "acks before complete":
                acked = self._acked(state, number, at, entry, (*sent[:6], w.DETACHED), recs=recs, workers=workers)
                yield "effect, and an ack before the completion", False, acked
            else:
                yield "effect", False, self._put(state, number, at, sent, recs=recs, workers=workers)
            if "in doubt" in bounds.raises:
                last = entry[5] >= bounds.most and bounds.policy == "rerun"
                after = (w.GIVE_UP if last else w.ABANDON, *entry[1:])
                excused = self._excuse(recs, entry)
                yield "raise in doubt", True, self._put(state, number, at, after, recs=excused, workers=workers)
        if "again" in bounds.raises:
            phase = w.RELEASE if entry[5] < bounds.most else w.GIVE_UP
            yield "raise again", True, self._put(state, number, at, (phase, *entry[1:]))
        if "for good" in bounds.raises:
            yield "raise for good", True, self._put(state, number, at, (w.GIVE_UP, *entry[1:]))

    def _effect(self, state: State, entry: Entry) -> tuple[Any, Any] | Violation | None:
        """The records and workers with the effect made; None if the resource refuses it."""
        recs, key = state[0], self._keys[entry[1]]
        st, att, rdv, fp, tov, effect, starts = recs[key]
        workers: Any = (state[2], state[3])
        made = (*recs[:key], (st, att, rdv, fp, tov, 1, starts), *recs[key + 1 :])
        if entry[4] != w.OWNER:
            if entry[6] & w.FENCED_OFF:
                if self._mutant != "no fence":
                    return None
                return Violation("I2", "the resource took a superseded holder's write after a newer holder's")
            if self.bounds.policy == "rerun" or self._was_looked_at(state, key):
                made = recs  # its lapsed lease excuses it
            return made, workers
        if st == w.COMPLETED:
            return Violation("I2", "a holder that never lost its lease makes the effect after another one completed")
        if effect:
            return Violation("I2", "the effect is made twice, and no crash and no lapsed lease excuses it")
        return made, self._fence_off(workers, key)

    def _was_looked_at(self, state: State, key: int) -> bool:
        """True if a person or a probe has looked already: what a superseded holder does then, its lapse excuses."""
        rec = state[0][key]
        if rec[0] == w.RELEASED:
            return True
        if rec[4] or rec[0] != w.IN_PROGRESS:
            return False
        return any(
            any(e[4] == w.OWNER and self._keys[e[1]] == key for e in entries) or mem[key] >> 1 & 3 == w.OWNER
            for entries, mem in (state[2], state[3])
        )

    def _fence_off(self, workers: Any, key: int) -> Any:
        """The resource has seen the newest token: older ones that still run will be refused."""
        out = []
        for entries, mem in workers:
            marked = tuple(
                [
                    (*e[:6], e[6] | w.FENCED_OFF)
                    if e[0] in _BEFORE_EFFECT and e[4] == w.SUPERSEDED and self._keys[e[1]] == key
                    else e
                    for e in entries
                ]
            )
            out.append((marked, mem))
        return tuple(out)

    def _excuse(self, recs: Any, entry: Entry) -> Any:
        """An effect that is there, without a completion, by a fault: the next one is excused, unless somebody asks."""
        key = self._keys[entry[1]]
        if entry[4] != w.OWNER or self.bounds.policy != "rerun" or recs[key][0] == w.COMPLETED:
            return recs
        rec = recs[key]
        return (*recs[:key], (*rec[:5], 0, rec[6]), *recs[key + 1 :])

    # --- the ends of an execution ---------------------------------------------------------------------------

    def _complete(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        recs, aux, key = state[0], state[4], self._keys[entry[1]]
        rec = recs[key]
        owner = entry[4] == w.OWNER or (self._mutant == "no token check" and entry[4])
        ours = owner and rec[0] in (w.RESERVED, w.IN_PROGRESS, w.COMPLETED)
        if rec[0] == w.COMPLETED and entry[4] == w.SUPERSEDED and owner:
            yield "complete", False, Violation("I6", "a superseded holder's completion overwrites a completed record")
            return
        done_recs, done_aux = recs, aux
        if ours and rec[0] != w.COMPLETED:
            done_recs, done_aux = self._completed(recs, aux, key, entry[1])
        flags = entry[6] & (w.DETACHED | w.THEN_RELEASE)
        acked = (w.ACK, *entry[1:4], w.NO_HOLD, 0, flags)
        waiting = (w.PUT_OFF, *entry[1:4], w.NO_HOLD, 0, flags)
        if self._mutant == "acks before complete" and flags & w.DETACHED:
            yield "complete", False, self._put(state, number, at, None, recs=done_recs, aux=done_aux)
            return
        after = acked if ours else waiting
        yield "complete", False, self._put(state, number, at, after, recs=done_recs, aux=done_aux)
        if ours and rec[0] != w.COMPLETED:
            yield "complete: reply lost", True, self._put(state, number, at, entry, recs=done_recs, aux=done_aux)
            silent = waiting
            yield (
                "complete: silent, but done",
                True,
                self._put(state, number, at, silent, recs=done_recs, aux=done_aux),
            )
        silent = acked if self._mutant == "doubt taken for done" else waiting
        yield "complete: silent", True, self._put(state, number, at, silent, recs=self._excuse(recs, entry))

    def _completed(self, recs: Any, aux: Any, key: int, m: int) -> tuple[Any, Any]:
        rec = recs[key]
        done = (w.COMPLETED, 0, rec[2], rec[3], 0, 1, 0)
        return (*recs[:key], done, *recs[key + 1 :]), (aux[0] | self._done_by[m], *aux[1:])

    def _release(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        action = "release" if entry[0] == w.RELEASE else "abandon"
        recs, key = state[0], self._keys[entry[1]]
        rec = recs[key]
        owner = entry[4] == w.OWNER or (self._mutant == "unowned release" and entry[4])
        if owner and rec[0] in (w.RESERVED, w.IN_PROGRESS):
            kind = w.RELEASED if entry[0] == w.RELEASE else w.IN_PROGRESS
            back = (kind, entry[5], rec[2], rec[3], 0, *rec[5:])
            recs = (*recs[:key], back, *recs[key + 1 :])
        elif owner and rec[0] == w.COMPLETED and self._mutant == "unowned release":
            yield action, False, Violation("I6", "a release ends a completed record")
            return
        yield action, False, self._put(state, number, at, off(entry), recs=recs)
        yield f"{action}: silent", True, self._put(state, number, at, off(entry))

    def _give_up(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        if entry[4] == w.OWNER and state[0][self._keys[entry[1]]][0] != w.COMPLETED:
            after = (w.BURY, *entry[1:6], (entry[6] & w.DETACHED) | w.THEN_RELEASE)
            yield "give up", False, self._put(state, number, at, after)
        else:
            yield "give up", False, self._put(state, number, at, off(entry))
        yield "give up: silent", True, self._put(state, number, at, off(entry))

    def _release_dead(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        recs, key = state[0], self._keys[entry[1]]
        rec = recs[key]
        if entry[4] == w.OWNER and rec[0] in (w.RESERVED, w.IN_PROGRESS):
            # Ended by its own dead letter: what is counted now began, or must not begin.
            back = (w.RELEASED, entry[5], rec[2], rec[3], 0, rec[5], max(rec[6], entry[5]))
            recs = (*recs[:key], back, *recs[key + 1 :])
        after: Entry | None = None
        if entry[6] & w.KEPT:
            after = (w.FETCHED, entry[1], 1, entry[3], w.NO_HOLD, 0, (entry[6] & w.DETACHED) | w.SINGLY)
        yield "release a dead one", False, self._put(state, number, at, after, recs=recs)

    # --- abandoned records ------------------------------------------------------------------------------------

    def _quarantine(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        recs, key = state[0], self._keys[entry[1]]
        flags = entry[6] & w.DETACHED
        waiting = (w.PUT_OFF, *entry[1:4], w.NO_HOLD, 0, flags)
        if entry[4] == w.OWNER and recs[key][0] == w.IN_PROGRESS:
            rec = recs[key]
            kept = (w.QUARANTINED, rec[1], rec[2], rec[3], 0, rec[5], rec[6])
            bury = (w.BURY, *entry[1:4], w.NO_HOLD, 0, flags)
            recs = (*recs[:key], kept, *recs[key + 1 :])
            yield "quarantine", False, self._put(state, number, at, bury, recs=recs)
            yield "quarantine: silent", True, self._put(state, number, at, waiting, recs=self._excused(state[0], key))
        else:
            yield "quarantine", False, self._put(state, number, at, waiting)

    def _probe(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        recs, key = state[0], self._keys[entry[1]]
        if recs[key][5]:
            yield "probe: done", False, self._put(state, number, at, (w.SENT, *entry[1:]))
        elif entry[5] > self.bounds.most:
            after = (w.BURY, *entry[1:5], entry[5] - 1, entry[6] | w.THEN_RELEASE)
            yield "probe: not done", False, self._put(state, number, at, after)
        else:
            yield "probe: not done", False, self._started(state, number, at, (w.RUNNING, *entry[1:]))
        if entry[5] < self.bounds.most:
            if entry[4] == w.OWNER:
                recs = self._excused(recs, key)
            yield "probe: raised", True, self._put(state, number, at, (w.ABANDON, *entry[1:]), recs=recs)
        else:
            yield "probe: raised", True, self._put(state, number, at, (w.QUARANTINE, *entry[1:]))

    # --- accidents, and what happens by itself ------------------------------------------------------------------

    def _crashed(self, state: State, number: int) -> State:
        """The process is gone, with all that it knew; the broker has its messages again."""
        recs, _, one, other, aux = state
        entries, mem = (one, other)[number]
        for e in entries:
            if e[0] == w.SENT:
                recs = self._excuse(recs, e)
            if e[4] == w.OWNER and e[0] in (w.CLAIM_LOST, w.PROBE, w.QUARANTINE):
                recs = self._excused(recs, self._keys[e[1]])
        for key, hold in enumerate(mem):
            if hold >> 1 & 3 == w.OWNER and not hold & 1:
                recs = self._excused(recs, key)  # counted, and now nobody will begin it
        pair = (self._free, other) if number == 0 else (one, self._free)
        return self._made(recs, self._taken_back(state, number), pair[0], pair[1], aux)

    def _outside(self, out: list[Step], state: State, faults: bool) -> None:
        self._of_broker(out, state, faults)
        if self.bounds.ages and (state[4][3] or self._mutant == "retention too short"):
            self._forget(out, state)
        if self.bounds.policy in ("quarantine", "probe"):
            for key, rec in enumerate(state[0]):
                if rec[0] == w.QUARANTINED:
                    self._resolve(out, state, key)

    def _forget(self, out: list[Step], state: State) -> None:
        recs, bag, one, other, aux = state
        for key, rec in enumerate(recs):
            if rec[0] in (w.ABSENT, w.QUARANTINED):
                continue
            held = rec[0] in (w.RESERVED, w.IN_PROGRESS)
            if held and any(e[4] == w.OWNER and self._keys[e[1]] == key for x in (one, other) for e in x[0]):
                continue  # it is renewed
            if self._is_kept(state, key):
                continue
            fresh = (w.ABSENT, 0, 0, 0, 0, rec[5], 0)
            workers = []
            for entries, mem in (one, other):
                mem = (*mem[:key], 0, *mem[key + 1 :])
                workers.append((entries, mem))
            after = self._made((*recs[:key], fresh, *recs[key + 1 :]), bag, workers[0], workers[1], aux)
            out.append(Step("forget", f"the record of key {key + 1}", False, after))

    def _resolve(self, out: list[Step], state: State, key: int) -> None:
        recs, bag, one, other, aux = state
        rec = recs[key]
        if rec[5]:
            m = self._keys.index(key)
            done_recs, done_aux = self._completed(recs, aux, key, m)
            after = self._made(done_recs, bag, one, other, done_aux)
            out.append(Step("a person says: done", f"key {key + 1}", False, after))
        else:
            back = (w.RELEASED, 0, rec[2], rec[3], 0, rec[5], 0)
            after = self._made((*recs[:key], back, *recs[key + 1 :]), bag, one, other, aux)
            out.append(Step("a person says: not done", f"key {key + 1}", False, after))


def _reserved(entry: Entry, answer: Answer) -> Entry:
    """One of the window after the answer to its reservation. What is no claim is looked at in its turn."""
    if answer.kind == CLAIMED:
        return w.RESERVATION, *entry[1:4], w.OWNER, answer.attempt, entry[6]
    if answer.kind == COMPLETED_BEFORE:
        return w.ACK, *entry[1:4], w.NO_HOLD, 0, entry[6] & w.DETACHED
    if answer.kind == CONFLICT:
        return w.BURY, *entry[1:4], w.NO_HOLD, 0, entry[6] & w.DETACHED
    if answer.kind == BUSY:
        return off(entry)
    return w.BURY, *entry[1:4], w.NO_HOLD, 0, entry[6] & w.DETACHED
