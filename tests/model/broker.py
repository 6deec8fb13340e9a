"""What both modes share: two workers, the broker with its copies, and how one delivery is answered.

Mirrors `settlement.py` (ack, put off, bury), `redrive.py`, and of `consumer.py` the window and the reconnect.

Why the model is small, and loses nothing by it:

* An outside step is done and answered in one step of the model. A crash may come before any step, and after a step is
  before the next one. A lost reply is a step of its own: the other side did it, and the worker asks again.
* A copy that waits in a delay queue, and one whose publish is still under way, are as one that nobody has fetched yet:
  workers fetch or do not. So landing, waiting and redelivery need no clock.
* The two workers are alike, and so are two messages with two keys: of states that differ by an exchange one is kept.
* Putting a successor and acking are one step, with the crash, the cut and the lost confirm in between as faults of
  that step. What others do meanwhile commutes: a successor only adds to what may be fetched, and an ack only takes
  away what nobody else can see. For the same reason nothing else happens before it (a persistent set of one; it goes
  forward, so nothing is put off for ever). A crash just before it leaves the same as one just after it: a copy that
  may have been delivered before.
* A worker whose messages nobody else can reach (no copy of theirs is in a queue, none is with the other worker) goes
  first: whatever the other does without it commutes with its steps, its crash and its cut. It, too, goes forward.
* A delivery whose channel is gone settles nothing. That it may still write a successor or a dead letter over another
  connection leaves what a cut just after that write leaves.
* What is left of a completed message (further copies, an ack still to come) can only be acked, and changes no record:
  it is taken away at once, except a handler that still runs. A configuration without this shows the acks and replays.
* A delivery whose hold was superseded, and whose next step is only told so, has been told.

`reduced=False` switches off who goes first, and what is taken away at once: a check of these two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from . import words as w
from .explore import Step, Violation

__all__ = ["AGE_BY_REDRIVE", "Bounds", "Entry", "Lower", "Record", "State", "Worker", "off"]

#: (phase, message, redelivered, redriven, hold, attempt, flags); redriven: 2 if it died when the messages were old
Entry = tuple[int, int, int, int, int, int, int]
Record = tuple[int, int, int, int, int, int, int]
#: The deliveries in their order, and a remembered nonce for each key.
Worker = tuple[tuple[Entry, ...], tuple[int, ...]]
State = tuple[Any, ...]
Steps = Iterator[tuple[str, bool, Any]]

_NOTHING: Final[Record] = (w.ABSENT, 0, 0, 0, 0, 0, 0)
#: A copy in the queue is destroyed by the broker's delivery limit after so many requeues.
_DELIVERY_LIMIT: Final = 3


#: The mutant of a redrive that says when it was, instead of when the message died.
AGE_BY_REDRIVE: Final = "redriven later than it is remembered"


@dataclass(frozen=True, slots=True)
class Bounds:
    """A configuration, within named bounds.

    keys, bodies: of the two messages: the number of the record's key, and of the fingerprint.
    policy: `on_abandoned`. most: attempts. raises: how a handler may fail.
    extras: how often further copies land in the queue (no edge, or its window is over), each time by a fault.
    redrives: how often the operator moves a dead letter back.
    ages: the messages grow older than the retention, and records are forgotten.
    mutant: the protocol's broken variant, "" for none. reduced: see the module.
    """

    name: str
    faults: int = 4
    keys: tuple[int, int] = (0, 1)
    bodies: tuple[int, int] = (0, 0)
    messages: int = 2
    policy: str = "rerun"
    most: int = 2
    extras: int = 0
    redrives: int = 0
    ages: bool = False
    raises: tuple[str, ...] = ("again", "in doubt", "for good")
    mutant: str = ""
    reduced: bool = True


class Lower:
    """The lower half. A state is (records, copies in the broker, worker, worker, (done, extras, redrives, old)).

    A mode adds the records and what is done with them: `_do`, `_outside`, `_crashed`, `_reserve`, `_completed`.
    """

    _do: dict[int, Callable[[State, int, int, Entry], Steps]]

    def __init__(self, bounds: Bounds) -> None:
        self.name = bounds.name
        self.faults = bounds.faults
        self.bounds = bounds
        self._keys = bounds.keys
        self._mutant = bounds.mutant
        self._telling = False
        self._reduced = bounds.reduced and not bounds.mutant and not bounds.ages
        self._number = 1 + max(bounds.keys[: bounds.messages])
        self._together = bounds.policy == "rerun" and self._number > 1
        self._symmetric = bounds.messages == 2 and bounds.keys == (0, 1) and bounds.bodies[0] == bounds.bodies[1]
        self._free: Worker = ((), (0,) * self._number)
        alike = bounds.keys[0] == bounds.keys[1] and bounds.bodies[0] == bounds.bodies[1]
        self._done_by = (3, 3) if alike and bounds.mutant != "scopes share a key" else (1, 2)

    def initial(self) -> State:
        bag = (0, w.SECOND)[: self.bounds.messages]
        return (_NOTHING,) * self._number, bag, self._free, self._free, (0, self.bounds.extras, self.bounds.redrives, 0)

    # --- steps ------------------------------------------------------------------------------------------

    def all_steps(self, state: State) -> list[Step]:
        self._telling = True
        try:
            return self.steps(state, faults=True)
        finally:
            self._telling = False

    def steps(self, state: State, *, faults: bool) -> list[Step]:
        _, _, one, other, _ = state
        out: list[Step] = []
        if self.bounds.reduced and not self._telling and self._alone(out, state, faults):
            return out
        for number in (0, 1):
            if number and one == other and not self._telling:
                break  # the workers are alike
            entries = state[2 + number][0]
            if entries:
                self._of_worker(out, state, number, faults)
                if faults:
                    self._accidents(out, state, number)
            else:
                self._fetch(out, state, number)
                if faults and any(state[2 + number][1]):
                    self._accidents(out, state, number)
        self._outside(out, state, faults)
        return out

    def _alone(self, out: list[Step], state: State, faults: bool) -> bool:
        """The steps of a persistent set, if there is one that is smaller than all; see the module."""
        for number in (0, 1):
            for at, entry in enumerate(state[2 + number][0]):
                if entry[0] == w.PUT_OFF:
                    self._of_entry(out, state, number, at, faults)
                    return True
                if entry[0] not in (w.SENT, w.ACK):
                    break
        for number in (0, 1):
            if self._is_alone(state, number):
                self._of_worker(out, state, number, faults)
                if faults:
                    self._accidents(out, state, number)
                return True
        return False

    def _is_alone(self, state: State, number: int) -> bool:
        """True if nothing that happens without this worker can touch what it has under way."""
        recs, bag, one, other, aux = state
        entries = (one, other)[number][0]
        if not entries or aux[1] or self.bounds.ages:
            return False
        keys = set()
        for e in entries:
            keys.add(self._keys[e[1]])
            if e[0] not in (w.SENT, w.ACK):
                if e is entries[0] and e[0] == w.FETCHED and self._reservable(entries):
                    continue
                break  # what waits behind it has no step, and is as good as nobody's
        if any(recs[key][0] == w.QUARANTINED for key in keys):
            return False
        reached = {self._keys[e[1]] for e in (other, one)[number][0]}
        reached.update(self._keys[copy & w.SECOND and 1] for copy in bag if aux[2] or not copy & w.DEAD)
        return not keys & reached

    def _of_worker(self, out: list[Step], state: State, number: int, faults: bool) -> None:
        entries = state[2 + number][0]
        for at, entry in enumerate(entries):
            phase = entry[0]
            if phase == w.SENT or phase == w.ACK:
                self._of_entry(out, state, number, at, faults)
                continue
            # The current one; what is behind it waits for its turn.
            if phase == w.FETCHED and at == 0 and self._reservable(entries):
                self._reserve(out, state, number, faults)
            else:
                self._of_entry(out, state, number, at, faults)
            return

    def _of_entry(self, out: list[Step], state: State, number: int, at: int, faults: bool) -> None:
        entry = state[2 + number][0][at]
        who = f"worker {'AB'[number]}, message {entry[1] + 1}"
        for action, fault, after in self._do[entry[0]](state, number, at, entry):
            if faults or not fault:
                out.append(Step(action, who, fault, after))

    def _made(self, recs: Any, bag: Any, one: Any, other: Any, aux: Any) -> State:
        """A state; in its canonical form, unless a trace is being told."""
        if self._telling:
            return recs, bag, one, other, aux
        return self.canonical((recs, bag, one, other, aux))

    def canonical(self, state: State) -> State:
        recs, bag, one, other, aux = state
        if self._reduced:
            for key, rec in enumerate(recs):
                if rec[0] == w.COMPLETED:
                    bag, one, other = self._without_leftovers(bag, one, other, aux[0], key)
        if other < one:
            one, other = other, one
        if not self._symmetric or recs[0] < recs[1]:
            return recs, bag, one, other, aux
        swapped = self._swapped(recs, bag, one, other, aux)
        return swapped if recs[1] < recs[0] else min(swapped, (recs, bag, one, other, aux))

    def _without_leftovers(self, bag: Any, one: Any, other: Any, done: int, key: int) -> tuple[Any, Any, Any]:
        """What is left of a completed message can only be acked; a handler that still runs is kept."""
        gone = [m for m in range(self.bounds.messages) if self._keys[m] == key and done >> m & 1]
        bag = tuple([copy for copy in bag if (copy & w.SECOND and 1) not in gone])
        left = []
        for entries, mem in (one, other):
            kept = tuple(
                [
                    e if e[1] not in gone else (*e[:6], e[6] | w.DETACHED)
                    for e in entries
                    if e[1] not in gone or e[0] == w.RUNNING
                ]
            )
            left.append((kept, (*mem[:key], 0, *mem[key + 1 :])))
        return bag, left[0], left[1]

    @staticmethod
    def _swapped(recs: Any, bag: Any, one: Any, other: Any, aux: Any) -> State:
        a, b = ((tuple([(e[0], 1 - e[1], *e[2:]) for e in worker[0]]), worker[1][::-1]) for worker in (one, other))
        if b < a:
            a, b = b, a
        done = aux[0]
        return (
            recs[::-1],
            tuple(sorted([copy ^ w.SECOND for copy in bag])),
            a,
            b,
            ((done >> 1) | ((done & 1) << 1), *aux[1:]),
        )

    def _put(self, state: State, number: int, at: int, entry: Entry | None, **other: Any) -> State:
        """The state with one entry changed, or gone. other: recs, bag, aux, mem, workers."""
        recs, bag, one, two, aux = state
        workers = other.get("workers") or (one, two)
        entries, mem = workers[number]
        mem = other.get("mem", mem)
        entries = entries[:at] + (() if entry is None else (entry,)) + entries[at + 1 :]
        mine = (entries, mem)
        pair = (mine, workers[1]) if number == 0 else (workers[0], mine)
        return self._made(other.get("recs", recs), other.get("bag", bag), pair[0], pair[1], other.get("aux", aux))

    def _fetch(self, out: list[Step], state: State, number: int) -> None:
        _, bag, one, other, _ = state
        ready = [copy for copy in bag if not copy & w.DEAD]
        if not ready:
            return
        mem = (one, other)[number][1]
        seen: set[tuple[int, ...]] = set()
        for i, first in enumerate(ready):
            for picked in [(first,), *((first, ready[j]) for j in range(len(ready)) if j != i)]:
                if picked in seen:
                    continue
                seen.add(picked)
                rest = list(bag)
                for copy in picked:
                    rest.remove(copy)
                entries = tuple([_delivered(copy) for copy in picked])
                mine = (entries, mem)
                pair = (mine, other) if number == 0 else (one, mine)
                told = " and ".join(f"message {(copy & w.SECOND and 1) + 1}" for copy in picked)
                after = self._made(state[0], tuple(rest), pair[0], pair[1], state[4])
                out.append(Step("fetch", f"worker {'AB'[number]}: {told}", False, after))

    def _with_entries(self, state: State, number: int, entries: tuple[Entry, ...], **other: Any) -> State:
        recs, bag, one, two, aux = state
        mine = (entries, (one, two)[number][1])
        pair = (mine, two) if number == 0 else (one, mine)
        return self._made(other.get("recs", recs), other.get("bag", bag), pair[0], pair[1], other.get("aux", aux))

    def _acked(self, state: State, number: int, at: int, entry: Entry, after: Entry | None, **other: Any) -> Any:
        if not entry[6] & w.DETACHED:
            m = entry[1]
            if not state[4][0] >> m & 1 and not self._elsewhere(state, number, at, m):
                return Violation(
                    "I4", f"message {m + 1} is acked: neither completed, nor in the dead letter, nor put off (I1: lost)"
                )
        return self._put(state, number, at, after, **other)

    def _elsewhere(self, state: State, number: int, at: int, m: int) -> bool:
        """True if the broker has another copy of the message."""
        if any((copy & w.SECOND) == w.SECOND * m for copy in state[1]):
            return True
        for worker in (0, 1):
            for place, e in enumerate(state[2 + worker][0]):
                if e[1] == m and not e[6] & w.DETACHED and (worker, place) != (number, at):
                    return True
        return False

    @staticmethod
    def _after_settling(entry: Entry) -> Entry | None:
        return (w.RELEASE_DEAD, *entry[1:6], w.DETACHED) if entry[6] & w.THEN_RELEASE else None

    def _requeued(self, state: State, number: int, at: int, entry: Entry) -> Any:
        _, m, red, rdv, *_ = entry
        count = (red >> 1) + 1  # the mutant's deliveries carry it
        bag = state[1]
        if count < _DELIVERY_LIMIT:
            copy = w.REDELIVERED | _moved(rdv) | (m and w.SECOND) | w.COUNTED * count
            bag = tuple(sorted((*bag, copy)))
        elif not state[4][0] >> m & 1 and not self._elsewhere(state, number, at, m):
            return Violation("I1", f"the broker destroys message {m + 1}: it was requeued once more than its limit")
        return self._put(state, number, at, None, bag=bag)

    @staticmethod
    def _taken_back(state: State, number: int) -> tuple[int, ...]:
        back = [_returned(e) for e in state[2 + number][0] if not e[6] & w.DETACHED]
        return tuple(sorted([*state[1], *back]))

    def _accidents(self, out: list[Step], state: State, number: int) -> None:
        who = f"worker {'AB'[number]}"
        out.append(Step("crash", who, True, self._crashed(state, number)))
        if any(not e[6] & w.DETACHED for e in state[2 + number][0]):
            out.append(Step("cut", who, True, self._cut(state, number)))

    def _cut(self, state: State, number: int) -> State:
        """The worker's connection to the broker is gone: its messages come back, while its handlers go on."""
        recs, _, one, other, aux = state
        entries, mem = (one, other)[number]
        cut = (tuple([(*e[:6], e[6] | w.DETACHED) for e in entries if e[0] != w.FETCHED]), mem)
        pair = (cut, other) if number == 0 else (one, cut)
        return self._made(recs, self._taken_back(state, number), pair[0], pair[1], aux)

    def tell(self, step: Step) -> str:
        who = step.who
        return f"{step.action} ({who})" if who else step.action

    def is_final(self, state: State) -> bool:
        _, bag, one, other, _ = state
        return not one[0] and not other[0] and all(copy & w.DEAD for copy in bag)

    def _put_off(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        """The confirmed successor, then the ack. A transport's own delay is both in one step: one of the orders."""
        mutant = self._mutant
        _, m, _, rdv, *_ = entry
        if entry[6] & w.DETACHED:
            yield "let go", False, self._put(state, number, at, self._after_settling(entry))
            return
        copy = w.REDELIVERED | _moved(rdv) | (m and w.SECOND)
        put = (state[0], tuple(sorted((*state[1], copy))), *state[2:])
        if mutant == "requeues":
            yield "requeue", False, self._requeued(state, number, at, entry)
            return
        if mutant == "acks the original first":
            yield "ack", False, self._acked(state, number, at, entry, None)
            return
        yield "put off", False, self._acked(put, number, at, entry, self._after_settling(entry))
        yield "put off: killed before the ack", True, self._crashed(put, number)
        yield "put off: cut before the ack", True, self._cut(put, number)
        if entry[6] & w.THEN_RELEASE:
            held = (w.RELEASE_DEAD, *entry[1:6], w.KEPT)
        else:
            held = (w.FETCHED, m, 1, rdv, w.NO_HOLD, 0, w.SINGLY)
        yield "put off: unconfirmed, but there", True, self._put(put, number, at, held)
        yield "put off: unconfirmed", True, self._put(state, number, at, held)

    def _bury(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        _, m, _, rdv, *_ = entry
        flags = entry[6] & (w.DETACHED | w.THEN_RELEASE)
        if flags & w.DETACHED:
            # As with `put off`: what a write before the cut leaves, is found by cutting after the write.
            yield "let go", False, self._put(state, number, at, None)
            return
        if self._mutant == "acks before the dead letter":
            yield "ack", False, self._acked(state, number, at, entry, None)
            return
        copy = w.DEAD | (rdv and w.REDRIVEN) | (m and w.SECOND) | (state[4][3] and w.RECENT)
        put = (state[0], tuple(sorted((*state[1], copy))), *state[2:])
        yield "bury", False, self._acked(put, number, at, entry, self._after_settling(entry))
        yield "bury: killed before the ack", True, self._crashed(put, number)
        yield "bury: cut before the ack", True, self._cut(put, number)
        # It could not be written, as far as is known: put off, and if the record is ours, it does not run again.
        again = (w.PUT_OFF, *entry[1:5], max(entry[5], self.bounds.most), flags | self._unmoved(entry))
        yield "bury: unconfirmed, but there", True, self._put(put, number, at, again)
        yield "bury: unconfirmed", True, self._put(state, number, at, again)

    def _ack(self, state: State, number: int, at: int, entry: Entry) -> Steps:
        after = None
        if self._mutant == "acks beyond the prefix" and at:
            before = state[2 + number][0][0]
            if not before[6] & w.DETACHED and before[0] != w.ACK:
                first = self._acked(state, number, 0, before, (*before[:6], before[6] | w.DETACHED))
                yield "ack all up to this one", False, first
        yield "ack", False, self._acked(state, number, at, entry, after)

    def _redrive(self, out: list[Step], state: State, faults: bool) -> None:
        recs, bag, one, other, aux = state
        done, extras, redrives, old = aux
        left = (done, extras, redrives - 1, old)
        for copy in sorted(set(bag)):
            if not copy & w.DEAD or recs[self._keys[copy & w.SECOND and 1]][0] == w.QUARANTINED:
                continue
            rec = recs[self._keys[copy & w.SECOND and 1]]
            if copy & w.RECENT and rec[5] and rec[0] != w.COMPLETED and self._mutant != "redrives unseen":
                continue  # who redrives what came back as too old has looked whether it was done
            who = f"message {(copy & w.SECOND and 1) + 1}"
            moved = (copy & (w.SECOND | w.RECENT)) | w.REDRIVEN | w.REDELIVERED
            if old and self._mutant == AGE_BY_REDRIVE:
                moved |= w.RECENT
            rest = list(bag)
            rest.remove(copy)
            if self._mutant == "redrive refused as a duplicate":
                m = copy & w.SECOND and 1
                if not done >> m & 1 and not any((c & w.SECOND) == (copy & w.SECOND) for c in rest):
                    text = f"message {m + 1} is moved out of the dead letter, and the edge refuses it as a duplicate"
                    out.append(Step("redrive", who, False, Violation("I1", text)))
                continue
            after = self._made(recs, tuple(sorted([*rest, moved])), one, other, left)
            out.append(Step("redrive", who, False, after))
            if faults:
                after = self._made(recs, tuple(sorted([*bag, moved])), one, other, left)
                out.append(Step("redrive: killed in between", who, True, after))

    def _is_kept(self, state: State, key: int) -> bool:
        """True if the record cannot be forgotten yet, since retention is longer than what may still come (I11).

        While a copy is there that died when the messages were old already, in the dead letter or out of it again; and
        in the moment between two questions of a worker: it does not rest for a whole retention there.
        """
        asking = (w.CLAIM_LOST, w.GIVE_BACK)
        if any(copy & w.RECENT and self._keys[copy & w.SECOND and 1] == key for copy in state[1]):
            return True
        return any(
            self._keys[e[1]] == key and (e[3] > 1 or e[6] & w.BEGUN or e[0] in asking)
            for x in (state[2], state[3])
            for e in x[0]
        )

    def _of_broker(self, out: list[Step], state: State, faults: bool) -> None:
        """Further copies, redrives, and time."""
        recs, bag, one, other, aux = state
        done, extras, redrives, old = aux
        if faults and extras:
            # One fault of the upper half may send both again: see `outbox_mode.copies_by_faults`.
            both = (0, w.SECOND)[: self.bounds.messages]
            for landed in {both[:1], both[1:], both} - {()}:
                more = tuple(sorted((*bag, *landed)))
                after = self._made(recs, more, one, other, (done, extras - 1, redrives, old))
                told = " and ".join(f"message {(copy & w.SECOND and 1) + 1}" for copy in landed)
                out.append(Step("a further copy lands", told, True, after))
        if redrives:
            self._redrive(out, state, faults)
        if self.bounds.ages and not old:
            out.append(Step("grow old", "", False, self._made(recs, bag, one, other, (done, extras, redrives, 1))))

    def _unmoved(self, entry: Entry) -> int:
        """Flags of a delivery whose dead letter could not be written."""
        return 0

    # --- of a mode --------------------------------------------------------------------------------------

    def _outside(self, out: list[Step], state: State, faults: bool) -> None:
        raise NotImplementedError

    def _crashed(self, state: State, number: int) -> State:
        raise NotImplementedError

    def _reservable(self, entries: tuple[Entry, ...]) -> bool:
        raise NotImplementedError

    def _reserve(self, out: list[Step], state: State, number: int, faults: bool) -> None:
        raise NotImplementedError


def _delivered(copy: int) -> Entry:
    red = (copy & w.REDELIVERED) | (copy // w.COUNTED << 1)
    redriven = (copy & w.REDRIVEN and 1) + (copy & w.RECENT and 1)
    return w.FETCHED, (copy & w.SECOND) and 1, red, redriven, w.NO_HOLD, 0, 0


def _moved(redriven: int) -> int:
    """The bits of a copy: 0, or 1 if it was redriven, or 2 if it died when the messages were old already."""
    return (0, w.REDRIVEN, w.REDRIVEN | w.RECENT)[redriven]


def _returned(entry: Entry) -> int:
    return w.REDELIVERED | _moved(entry[3]) | (entry[1] and w.SECOND) | w.COUNTED * (entry[2] >> 1)


def off(entry: Entry) -> Entry:
    """To be put off, and nothing is held any more."""
    return w.PUT_OFF, entry[1], entry[2] | 1, entry[3], w.NO_HOLD, 0, entry[6] & w.DETACHED
