"""Transactional mode: two workers, two messages, a window of two in one commit, and the records beside the effects.

What each action mirrors: `take`, `commit`, doubt: `inbox/running.py` (`_transact`, `_decide`); `count`: `_count`, with
`inbox/records.py`; `take together` and `commit together`: `inbox/window.py`; ack, put off and bury: `settlement.py`.

Beside what `broker.py` says of the size: taking a record, running the handler and writing the outgoing message are one
step, since nobody sees them before the COMMIT; what others see is the record's lock. There is no lease and no clock,
hence nothing for a clock error to break (I7). A COMMIT whose reply is lost was done, was not done, or is *under way*:
its transaction holds the locks, and ends at any later time, by itself. Who inserts meanwhile waits, or is told after a
while that the record is busy.

One thing is excused that the library could do better: what came back is counted before it is known whether another
delivery is in its way. Two that count in the moment between the other's count and its insert both pay for an attempt,
and one of them only to hear that the record is busy (I12). Nothing is lost by it but an attempt.

A record is (state, attempts, redrive, fingerprint, lock, effects, outgoing, starts). Effects and outgoing messages are
counted without any bound, so that a double shows.
"""

from __future__ import annotations

from typing import Any, Final

from . import words as w
from .broker import Bounds, Entry, Lower, State, Steps, off
from .explore import Step, Violation
from .store_mode import AGE_BY_ATTEMPT

__all__ = ["InboxMode"]

#: Locks: of an open transaction; of one whose COMMIT is under way, alone (by body) or with the neighbour's: completing,
#: or counting a failed attempt.
_FREE: Final = 0
_OPEN: Final = 1
_UNDER_WAY: Final = (2, 3)
_BOTH: Final = 4
_BOTH_COUNTING: Final = 5

_NOTHING: Final = (w.ABSENT, 0, 0, 0, _FREE, 0, 0, 0)
_EVERY: Final = frozenset(
    {"fetch", "take", "commit", "ack", "put off", "let go", "crash", "cut", "count", "count: reply lost"}
    | {"count: silent", "count: silent, but done", "take: silent", "commit: reply lost, not done"}
    | {"commit: reply lost, but done", "commit: under way", "crash: the COMMIT under way", "its COMMIT is done"}
    | {"its COMMIT is rolled back", "put off: killed before the ack", "put off: cut before the ack"}
    | {"put off: unconfirmed", "put off: unconfirmed, but there", "never well: count it"}
)
_WINDOW: Final = frozenset(
    {"take together", "commit together", "commit together: not done", "commit together: reply lost"}
    | {"commit together: under way", "take together: silent"}
)
_DYING: Final = frozenset(
    {"bury", "bury: killed before the ack", "bury: cut before the ack", "bury: unconfirmed"}
    | {"bury: unconfirmed, but there", "exhaust"}
)


class InboxMode(Lower):
    """See the module."""

    def __init__(self, bounds: Bounds) -> None:
        super().__init__(bounds)
        self._do = {
            w.FETCHED: self._begin,
            w.TAKE: self._take,
            w.IN_TRANSACTION: self._commit,
            w.FAILED: self._commit,
            w.HALF_COMMITTED: self._commit_record,
            w.COUNT_FAILED: self._count_failed,
            w.ACK: self._ack,
            w.PUT_OFF: self._put_off,
            w.BURY: self._bury,
            w.RELEASE_DEAD: self._exhaust,
        }

    def initial(self) -> State:
        _, bag, one, other, aux = super().initial()
        return (_NOTHING,) * self._number, bag, one, other, aux

    @property
    def actions(self) -> frozenset[str]:
        b = self.bounds
        more = set(_EVERY) | {f"raise {how}" for how in b.raises}
        if self._together:
            more |= _WINDOW | {"raise in the window"}
        if b.raises:
            more |= _DYING | {"count a failure", "count a failure: silent", "count a failure: reply lost"}
        if b.extras:
            more |= {"a further copy lands"}
        if b.redrives:
            more |= {"redrive", "redrive: killed in between"}
        if b.ages:
            more |= {"grow old", "forget", "look"}
        return frozenset(more)

    # --- one by one ---------------------------------------------------------------------------------------

    def _is_alone(self, state: State, number: int) -> bool:
        return super()._is_alone(state, number) and all(rec[4] <= _OPEN for rec in state[0])

    def _with(self, state: State, key: int, rec: Any) -> Any:
        return (*state[0][:key], rec, *state[0][key + 1 :])

    def _begin(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        """A first delivery is taken at once. What came back is counted before, since its last run may have died."""
        if not entry[2] or self._mutant == "counts nothing":
            yield from self._take(state, number, at, entry)
            return
        key = self._keys[entry[1]]
        st, att, rdv, fp, lock, *counts = state[0][key]
        old = state[4][3] and entry[3] < 2
        if old and not entry[6] & w.BEGUN and self._mutant != AGE_BY_ATTEMPT and st != w.COMPLETED and lock == _FREE:
            # What may have been done and forgotten is not counted before its record was looked at.
            unknown = not att or entry[3] > rdv
            after = (w.BURY, *entry[1:]) if unknown else (*entry[:6], entry[6] | w.BEGUN)
            yield "look", False, self._put(state, number, at, after)
            return
        if lock != _FREE:
            yield "count", False, self._put(state, number, at, off(entry))
            return
        counting = (w.TAKE, *entry[1:4], 0, 0, entry[6] & w.DETACHED)
        if st == w.COMPLETED:
            yield "count", False, self._put(state, number, at, counting)
            return
        att = 1 if entry[3] > rdv else att + 1
        if entry[3] > rdv:
            counts[-1] = 0
        recs = self._with(state, key, (w.RELEASED, att, max(rdv, entry[3]), fp, lock, *counts))
        after = (*counting[:5], att, counting[6])
        if att > self.bounds.most:
            begun = counts[-1] + self._counted_now(state, key)
            if begun < self.bounds.most and not self.bounds.ages:
                text = f"given up for its attempts, of which only {begun} began"
                yield "count", False, Violation("I12", text)
                return
            after = (w.BURY, *after[1:])
        yield "count", False, self._put(state, number, at, after, recs=recs)
        # An attempt that is counted and does not begin, by a fault, counts as begun.
        lost = (*recs[key][:7], recs[key][7] + 1)
        recs = self._with(state, key, lost)
        yield "count: reply lost", True, self._put(state, number, at, entry, recs=recs)
        yield "count: silent, but done", True, self._put(state, number, at, off(entry), recs=recs)
        yield "count: silent", True, self._put(state, number, at, off(entry))

    def _counted_now(self, state: State, key: int) -> int:
        """Deliveries that have counted an attempt which is about to begin."""
        return sum(e[0] == w.TAKE and e[5] > 0 and self._keys[e[1]] == key for x in (state[2], state[3]) for e in x[0])

    def _is_kept(self, state: State, key: int) -> bool:
        """As for the store; and no worker rests for a whole retention in the middle of a transaction."""
        return super()._is_kept(state, key) or any(
            e[0] != w.FETCHED and self._keys[e[1]] == key for x in (state[2], state[3]) for e in x[0]
        )

    def _take(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        """Insert the record, and run the handler, in one transaction. Mirrors `_transact`."""
        key = self._keys[entry[1]]
        rec = state[0][key]
        st, att, rdv, fp, lock, effects, outgoing, starts = rec
        mutant = self._mutant
        flags = entry[6] & (w.DETACHED | w.REPEATED)
        if flags & w.REPEATED and mutant == "doubt settled by a look" and st != w.COMPLETED and lock in _UNDER_WAY:
            yield "look", False, Violation("I15", "a COMMIT that is still under way is taken for one that failed")
            return
        if lock != _FREE and mutant != "looks instead of inserting":
            recs = state[0]
            if entry[5] and not flags & w.REPEATED:
                # It was counted, and then met another delivery, which had counted just before: see the module.
                recs = self._with(state, key, (*rec[:7], starts + 1))
            yield "take", False, self._put(state, number, at, off(entry), recs=recs)
        elif st == w.COMPLETED and mutant != "no record":
            yield "take", False, self._put(state, number, at, self._replayed(entry, fp))
        else:
            attempt = entry[5] or (0 if entry[3] > rdv else att) + 1
            refusal = self._refusal(state, attempt, entry)
            if refusal is not None:
                yield "take", False, self._put(state, number, at, refusal)
            else:
                starts += not flags & w.REPEATED
                if entry[2] and not entry[5]:
                    text = "what was delivered before begins without being counted: nothing bounds its attempts"
                    yield "take", False, Violation("I12", text)
                    return
                outgoing += mutant == "sends before the commit"
                running = (w.IN_TRANSACTION, *entry[1:5], entry[5], flags)
                recs = self._with(state, key, (st, att, rdv, fp, _OPEN, effects, outgoing, starts))
                yield "take", False, self._put(state, number, at, running, recs=recs)
        recs = state[0]
        if entry[5] and not flags & w.REPEATED:
            recs = self._with(state, key, (*rec[:7], rec[7] + 1))
        yield "take: silent", True, self._put(state, number, at, off(entry), recs=recs)
        if flags & w.REPEATED:
            again = (w.COUNT_FAILED, *entry[1:6], flags & w.DETACHED)
            yield "never well: count it", True, self._put(state, number, at, again)

    def _replayed(self, entry: Entry, fp: int) -> Entry:
        if fp != self.bounds.bodies[entry[1]]:
            return w.BURY, *entry[1:4], 2, 0, entry[6] & w.DETACHED
        return w.ACK, *entry[1:4], 0, 0, entry[6] & w.DETACHED

    def _refusal(self, state: State, attempt: int, entry: Entry) -> Entry | None:
        old = state[4][3] and entry[3] < 2 and attempt == 1
        if attempt > self.bounds.most or old:
            return w.BURY, *entry[1:4], 0, attempt - 1, entry[6] & w.DETACHED
        return None

    def _commit(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        """Record, effect and outgoing message become durable, all or none of them."""
        if entry[6] & w.TOGETHER:
            yield from self._commit_together(state, number)
            return
        key, flags = self._keys[entry[1]], entry[6] & w.DETACHED
        acked = (w.ACK, *entry[1:4], 0, 0, flags)
        if self._mutant == "effect and record apart":
            st, att, rdv, fp, _, effects, outgoing, starts = state[0][key]
            recs = self._with(state, key, (st, att, rdv, fp, _OPEN, effects + 1, outgoing + 1, starts))
            half = (w.HALF_COMMITTED, *entry[1:])
            yield "commit the effect", False, self._put(state, number, at, half, recs=recs)
            return
        done = self._done(state, key, entry[1])
        if isinstance(done, Violation):
            yield "commit", False, done
            return
        recs, aux = done
        yield "commit", False, self._put(state, number, at, acked, recs=recs, aux=aux)
        again = (w.TAKE, *entry[1:5], entry[5], flags | w.REPEATED)
        yield "commit: reply lost, but done", True, self._put(state, number, at, again, recs=recs, aux=aux)
        back = self._unlocked(state, key)
        yield "commit: reply lost, not done", True, self._put(state, number, at, again, recs=back)
        rec = state[0][key]
        limbo = self._with(state, key, (*rec[:4], _UNDER_WAY[self.bounds.bodies[entry[1]]], *rec[5:]))
        yield "commit: under way", True, self._put(state, number, at, again, recs=limbo)
        gone = self._changed(state, number, at, again, limbo)
        yield "crash: the COMMIT under way", True, self._crashed(gone, number)
        for how in self.bounds.raises:
            failed = (w.COUNT_FAILED, *entry[1:4], int(how == "for good"), entry[5], flags)
            yield f"raise {how}", True, self._put(state, number, at, failed, recs=back)

    def _changed(self, state: State, number: int, at: int, entry: Entry, recs: Any) -> State:
        """As `_put`, but not in the canonical form."""
        entries, mem = state[2 + number]
        mine = ((*entries[:at], entry, *entries[at + 1 :]), mem)
        pair = (mine, state[3]) if number == 0 else (state[2], mine)
        return recs, state[1], pair[0], pair[1], state[4]

    def _commit_record(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        key = self._keys[entry[1]]
        rec = state[0][key]
        recs = self._with(state, key, (w.COMPLETED, 0, rec[2], rec[3], _FREE, *rec[5:7], 0))
        aux = (state[4][0] | self._done_by[entry[1]], *state[4][1:])
        acked = (w.ACK, *entry[1:4], 0, 0, entry[6] & w.DETACHED)
        yield "commit the record", False, self._put(state, number, at, acked, recs=recs, aux=aux)

    def _unlocked(self, state: State, key: int) -> Any:
        rec = state[0][key]
        return self._with(state, key, (*rec[:4], _FREE, *rec[5:]))

    def _done(self, state: State, key: int, m: int) -> tuple[Any, Any] | Violation:
        """The records and the rest after a commit."""
        _, _, rdv, _, _, effects, outgoing, _ = state[0][key]
        if effects:
            return Violation("I2", "a second effect is committed for one biz-id")
        rec = (w.COMPLETED, 0, rdv, self.bounds.bodies[m], _FREE, effects + 1, max(outgoing, effects + 1), 0)
        return self._with(state, key, rec), (state[4][0] | self._done_by[m], *state[4][1:])

    def _count_failed(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        """It was rolled back: count the attempt, unless that was done before, and decide."""
        key = self._keys[entry[1]]
        st, att, rdv, fp, lock, *counts = state[0][key]
        name = "count a failure"
        if entry[5]:
            yield name, False, self._put(state, number, at, self._after_failure(entry, entry[5]))
            return
        if lock != _FREE or st == w.COMPLETED:
            yield name, False, self._put(state, number, at, off(entry))
            return
        att = 1 if entry[3] > rdv else att + 1
        recs = self._with(state, key, (w.RELEASED, att, max(rdv, entry[3]), fp, lock, *counts))
        yield name, False, self._put(state, number, at, self._after_failure(entry, att), recs=recs)
        yield f"{name}: silent", True, self._put(state, number, at, off(entry))
        counts[-1] += 1
        recs = self._with(state, key, (w.RELEASED, att, max(rdv, entry[3]), fp, lock, *counts))
        yield f"{name}: reply lost", True, self._put(state, number, at, entry, recs=recs)

    def _after_failure(self, entry: Entry, attempt: int) -> Entry:
        if entry[4] == 1 or attempt >= self.bounds.most:
            return w.BURY, *entry[1:4], 0, attempt, entry[6] & w.DETACHED
        return off(entry)

    def _unmoved(self, entry: Entry) -> int:
        return 0 if entry[4] == 2 else w.THEN_RELEASE  # of a conflict the record is another's

    def _exhaust(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        """What could not be moved must not run when it is looked at again."""
        key = self._keys[entry[1]]
        st, att, rdv, fp, lock, effects, outgoing, starts = state[0][key]
        recs = state[0]
        if st != w.COMPLETED and lock == _FREE:
            att = entry[5] if entry[3] > rdv else max(att + 1, entry[5])
            rdv = max(rdv, entry[3])
            recs = self._with(state, key, (w.RELEASED, att, rdv, fp, lock, effects, outgoing, max(starts, att)))
        after: Entry | None = None
        if entry[6] & w.KEPT:
            after = (w.FETCHED, entry[1], 1, entry[3], 0, 0, (entry[6] & w.DETACHED) | w.SINGLY)
        yield "exhaust", False, self._put(state, number, at, after, recs=recs)

    # --- a window in one commit -------------------------------------------------------------------------------

    def _reservable(self, entries: tuple[Entry, ...]) -> bool:
        if not self._together or len(entries) < 2 or self._keys[entries[0][1]] == self._keys[entries[1][1]]:
            return False
        return all(e[0] == w.FETCHED and not e[6] & w.SINGLY and not e[2] for e in entries)

    def _reserve(self, out: list[Step], state: State, number: int, faults: bool) -> None:
        who = f"worker {'AB'[number]}, both"
        recs, mine = state[0], []
        for entry in state[2 + number][0]:
            key = self._keys[entry[1]]
            st, att, rdv, fp, lock, effects, outgoing, starts = recs[key]
            if lock != _FREE:
                mine.append(off(entry))
            elif st == w.COMPLETED:
                mine.append(self._replayed(entry, fp))
            elif att:
                mine.append((*entry[:6], entry[6] | w.SINGLY))  # it has failed before
            elif state[4][3]:
                mine.append((w.BURY, *entry[1:4], 0, 0, entry[6]))
            else:
                rec = (st, att, rdv, fp, _OPEN, effects, outgoing, starts + 1)
                recs = (*recs[:key], rec, *recs[key + 1 :])
                mine.append((w.IN_TRANSACTION, *entry[1:5], 0, entry[6] | w.TOGETHER))
        out.append(Step("take together", who, 0, self._with_entries(state, number, tuple(mine), recs=recs)))
        if faults:
            silent = tuple([(*e[:6], e[6] | w.SINGLY) for e in state[2 + number][0]])
            out.append(Step("take together: silent", who, 1, self._with_entries(state, number, silent)))

    def _of_worker(self, out: list[Step], state: State, number: int, faults: bool) -> None:
        """While a window's transaction is open, nothing else is done."""
        for at, entry in enumerate(state[2 + number][0]):
            if entry[6] & w.TOGETHER:
                return self._of_entry(out, state, number, at, faults)
        return super()._of_worker(out, state, number, faults)

    def _commit_together(self, state: State, number: int) -> Steps:
        entries = state[2 + number][0]
        joint = [at for at, e in enumerate(entries) if e[6] & w.TOGETHER]
        committed: Any = state
        mine, singly = list(entries), list(entries)
        back: Any = state[0]
        limbo: Any = state[0]
        for at in joint:
            e = entries[at]
            key, flags = self._keys[e[1]], e[6] & w.DETACHED
            singly[at] = (w.FETCHED, *e[1:4], 0, 0, flags | w.SINGLY)
            rec = state[0][key]
            back = (*back[:key], (*rec[:4], _FREE, *rec[5:]), *back[key + 1 :])
            code = _BOTH if e[0] == w.IN_TRANSACTION else _BOTH_COUNTING
            limbo = (*limbo[:key], (*rec[:4], code, *rec[5:]), *limbo[key + 1 :])
            if e[0] == w.IN_TRANSACTION:
                done = self._done(committed, key, e[1])
                if isinstance(done, Violation):
                    yield "commit together", False, done
                    return
                committed = (done[0], *committed[1:4], done[1])
                mine[at] = (w.ACK, *e[1:4], 0, 0, flags)
            else:
                recs = (*committed[0][:key], self._counted(rec), *committed[0][key + 1 :])
                committed = (recs, *committed[1:])
                mine[at] = self._after_failure(e, 1)
        ended = {"recs": committed[0], "aux": committed[4]}
        yield "commit together", False, self._with_entries(state, number, tuple(mine), **ended)
        yield "commit together: reply lost", True, self._with_entries(state, number, tuple(singly), **ended)
        yield "commit together: not done", True, self._with_entries(state, number, tuple(singly), recs=back)
        yield "commit together: under way", True, self._with_entries(state, number, tuple(singly), recs=limbo)
        for at in joint:
            e = entries[at]
            if e[0] == w.IN_TRANSACTION and self.bounds.raises:
                failed = (w.FAILED, *e[1:])
                yield "raise in the window", True, self._put(state, number, at, failed)

    @staticmethod
    def _counted(rec: Any) -> Any:
        return w.RELEASED, 1, rec[2], rec[3], _FREE, rec[5], rec[6], rec[7]

    # --- accidents, and what happens by itself ------------------------------------------------------------------

    def _crashed(self, state: State, number: int) -> Any:
        recs, _, one, other, aux = state
        for e in (one, other)[number][0]:
            key = self._keys[e[1]]
            rec = recs[key]
            if e[0] in (w.IN_TRANSACTION, w.FAILED, w.HALF_COMMITTED) and rec[4] == _OPEN:
                recs = (*recs[:key], (*rec[:4], _FREE, *rec[5:]), *recs[key + 1 :])
            if e[0] == w.TAKE and e[5]:
                recs = (*recs[:key], (*rec[:7], rec[7] + 1), *recs[key + 1 :])  # counted, and now nobody begins it
        for rec in recs:
            if not rec[5] == rec[6] == (rec[0] == w.COMPLETED) and not self.bounds.ages:
                text = f"effects {rec[5]}, outgoing messages {rec[6]}, completed records {int(rec[0] == w.COMPLETED)}"
                return Violation("I3", f"a crash leaves what belongs together apart: {text}")
        pair = (self._free, other) if number == 0 else (one, self._free)
        return self._made(recs, self._taken_back(state, number), pair[0], pair[1], aux)

    def _outside(self, out: list[Step], state: State, faults: bool) -> None:
        self._of_broker(out, state, faults)
        recs = state[0]
        joint = [key for key, rec in enumerate(recs) if rec[4] in (_BOTH, _BOTH_COUNTING)]
        alone = [key for key, rec in enumerate(recs) if rec[4] in _UNDER_WAY]
        for keys in [joint, *([key] for key in alone)]:
            if not keys:
                continue
            landed: Any = state
            for key in keys:
                rec = recs[key]
                if rec[4] == _BOTH_COUNTING:
                    landed = (self._with(landed, key, self._counted(rec)), *landed[1:])
                    continue
                done = self._done(landed, key, self._message(key, rec[4]))
                if isinstance(done, Violation):
                    out.append(Step("its COMMIT is done", f"key {key + 1}", 0, done))
                    return
                landed = (done[0], *landed[1:4], done[1])
            who = "both keys" if len(keys) > 1 else f"key {keys[0] + 1}"
            out.append(Step("its COMMIT is done", who, 0, self._made(*landed)))
            back: Any = recs
            for key in keys:
                back = (*back[:key], (*recs[key][:4], _FREE, *recs[key][5:]), *back[key + 1 :])
            out.append(Step("its COMMIT is rolled back", who, 0, self._made(back, *state[1:])))
        if self.bounds.ages and state[4][3]:
            for key, rec in enumerate(recs):
                if rec[0] != w.ABSENT and rec[4] == _FREE and not self._is_kept(state, key):
                    after = self._with(state, key, (w.ABSENT, 0, 0, 0, _FREE, *rec[5:7], 0))
                    out.append(Step("forget", f"the record of key {key + 1}", 0, self._made(after, *state[1:])))

    def _message(self, key: int, lock: int) -> int:
        """The message whose COMMIT is under way."""
        for m in range(self.bounds.messages):
            if self._keys[m] == key and (lock == _BOTH or _UNDER_WAY[self.bounds.bodies[m]] == lock):
                return m
        raise AssertionError
