"""The upper half with an outbox: two rows, two relays, the broker and its edge.

What each action mirrors: `commit` (late ones too): `outbox.py`; `claim`, with the lease and what is still to be marked
from before: `relaying/claiming.py`, `relay._claim`; `send`, with the resends of one stream: `relaying/sending.py`; the
write-down after it in one commit: `relay._mark`; `let go`: `relay._send`'s end.

A row is (what it is, its owner, refusals, copies that landed, whether the edge remembers it). A relay has, for each
row, what it is about to do with it, and which rows it knows to be confirmed from before a lost reply. A lease has no
clock: a row whose owner is not at it any more may be taken by anybody, one whose owner is at it by a fault.

The two rows are alike, and so are the two relays. The lower half sees nothing of all this but the copies that land, and
the upper half nothing of the lower: so each is explored by itself, the lower half with every number of copies that this
one can make for its faults (`copies_by_faults`).
"""

from __future__ import annotations

import itertools
from typing import Any, Final

from .explore import State, Step, Violation

__all__ = ["OutboxMode", "copies_by_faults"]

_OPEN: Final = 0  # inserted, its transaction is open
_THERE: Final = 1
_SENT: Final = 2  # deleted
_DEAD: Final = 3

_NOT: Final = 0
_TO_SEND: Final = 1
_CONFIRMED: Final = 2
_NO_ANSWER: Final = 3
_REFUSED: Final = 4

_MOST_REFUSALS: Final = 2
_IDLE: Final = ((_NOT, _NOT), (0, 0))


class OutboxMode:
    """See the module. edge: whether the broker has one. redrives: how often dead rows are redriven."""

    def __init__(self, name: str, *, faults: int = 4, edge: bool = True, redrives: int = 1, mutant: str = "") -> None:
        self.name = name
        self.faults = faults
        self._edge = edge
        self._redrives = redrives
        self._mutant = mutant

    # --- the model --------------------------------------------------------------------------------------

    def initial(self) -> State:
        return ((_OPEN, 0, 0, 0, 0),) * 2, _IDLE, _IDLE, (self._redrives, 0)

    def is_final(self, state: State) -> bool:
        rows, one, other, _ = state
        return all(row[0] in (_SENT, _DEAD) for row in rows) and one == other == _IDLE

    @property
    def actions(self) -> frozenset[str]:
        more = {"the business commits", "claim", "claim: reply lost", "take over from a stalled", "send", "mark"}
        more |= {"confirm lost, sent again", "no answer, but landed", "no answer", "refused", "let go", "crash"}
        more |= {"mark: reply lost, but done", "mark: reply lost, not done", "mark what was confirmed before"}
        if self._edge:
            more |= {"the edge's window ends"}
        if self._redrives:
            more |= {"redrive a dead row"}
        return frozenset(more)

    def tell(self, step: Step) -> str:
        return f"{step.action} ({step.who})" if step.who else step.action

    def canonical(self, state: State) -> State:
        best: State | None = None
        rows, one, other, rest = state
        for swap_rows, swap_relays in itertools.product((False, True), repeat=2):
            candidate = self._swapped(rows, one, other, rest, swap_rows, swap_relays)
            if best is None or candidate < best:
                best = candidate
        assert best is not None
        return best

    def _swapped(self, rows: Any, one: Any, other: Any, rest: Any, swap_rows: bool, swap_relays: bool) -> State:
        if swap_relays:
            rows = tuple([(r[0], r[1] and 3 - r[1], *r[2:]) for r in rows])
            one, other = other, one
        if swap_rows and self._mutant != "skips what committed late":
            rows = rows[::-1]
            one, other = ((a[::-1], b[::-1]) for a, b in (one, other))
        return rows, one, other, rest

    def all_steps(self, state: State) -> list[Step]:
        return self._steps(state, faults=True)

    def steps(self, state: State, *, faults: bool) -> list[Step]:
        return [
            step if isinstance(step.after, Violation) else step._replace(after=self.canonical(step.after))
            for step in self._steps(state, faults=faults)
        ]

    # --- steps ------------------------------------------------------------------------------------------

    def _steps(self, state: State, *, faults: bool) -> list[Step]:
        out: list[Step] = []
        rows, one, other, rest = state
        for at, row in enumerate(rows):
            who = f"row {at + 1}"
            if row[0] == _OPEN:
                after = self._with_row(state, at, (_THERE, *row[1:]))
                out.append(Step("the business commits", who, 0, after))
            if row[4] and faults:
                out.append(Step("the edge's window ends", who, 1, self._with_row(state, at, (*row[:4], 0))))
            if row[0] == _DEAD and rest[0]:
                changed = self._with_row(state, at, (_THERE, 0, 0, *row[3:]))
                out.append(Step("redrive a dead row", who, 0, (*changed[:3], (rest[0] - 1, *rest[1:]))))
        for number in (0, 1):
            relay = (one, other)[number]
            if relay[0] == (_NOT, _NOT):
                self._claim(out, state, number, faults)
            else:
                self._work(out, state, number, faults)
            if faults and relay != _IDLE:
                out.append(Step("crash", f"relay {'AB'[number]}", 1, self._with_relay(state, number, _IDLE)))
        return out

    @staticmethod
    def _with_row(state: State, at: int, row: Any) -> State:
        rows = state[0]
        return ((*rows[:at], row, *rows[at + 1 :]), *state[1:])

    @staticmethod
    def _with_relay(state: State, number: int, relay: Any) -> State:
        return (state[0], relay, *state[2:]) if number == 0 else (state[0], state[1], relay, state[3])

    def _claim(self, out: list[Step], state: State, number: int, faults: bool) -> None:
        """One short transaction: what was confirmed before goes, and free rows become ours for a lease."""
        me, who = number + 1, f"relay {'AB'[number]}"
        relays = state[1:3]
        confirmed = relays[number][1]
        rows, seen = list(state[0]), state[3][1]
        for at in (0, 1):
            if confirmed[at] and rows[at][0] == _THERE:
                rows[at] = (_SENT, 0, *rows[at][2:])
        free = [at for at in (0, 1) if rows[at][0] == _THERE and not (seen and at + 1 < seen)]
        chosen = [picked for size in (1, 2) for picked in itertools.combinations(free, size)]
        if any(confirmed):
            chosen.append(())
        for picked in chosen:
            cost, mine, taken = 0, [_NOT, _NOT], list(rows)
            relays_now = [state[1], state[2]]
            for at in picked:
                owner = rows[at][1]
                if owner and self._mutant == "leases of rows never end":
                    cost = 9
                elif owner and owner != me and relays[owner - 1][0][at] != _NOT:
                    cost += 1  # it is at it: only a stall lets its lease lapse
                mine[at] = _TO_SEND
                taken[at] = (_THERE, me, *rows[at][2:])
            if cost > (2 if faults else 0):
                continue
            highest = max([seen, *(at + 1 for at in picked)]) if self._mutant == "skips what committed late" else 0
            relays_now[number] = (tuple(mine), (0, 0))
            told = f"{who}: " + " and ".join(f"row {at + 1}" for at in picked)
            after = (tuple(taken), *relays_now, (state[3][0], highest))
            action = "take over from a stalled" if cost else "claim" if picked else "mark what was confirmed before"
            out.append(Step(action, told if picked else who, cost, after))
            if faults and not cost and picked:
                unknowing = list(relays_now)
                unknowing[number] = ((_NOT, _NOT), confirmed)
                out.append(Step("claim: reply lost", told, 1, (tuple(taken), *unknowing, (state[3][0], highest))))

    def _work(self, out: list[Step], state: State, number: int, faults: bool) -> None:
        doing, _ = state[1 + number]
        name = f"relay {'AB'[number]}"
        for at in (0, 1):
            if doing[at] != _TO_SEND:
                continue
            who = f"{name}, row {at + 1}"
            row = state[0][at]
            landed = (*row[:3], *self._land(row[3], row[4]))
            now = self._with_row(state, at, landed)
            out.append(Step("send", who, 0, self._doing(now, number, at, _CONFIRMED)))
            if faults:
                out.append(Step("confirm lost, sent again", who, 1, self._doing(now, number, at, _TO_SEND)))
                out.append(Step("no answer, but landed", who, 1, self._doing(now, number, at, _NO_ANSWER)))
                unsent = state
                if self._mutant == "marks before landing":
                    unsent = self._with_row(state, at, (*row[:4], 1))
                answer = _CONFIRMED if self._mutant == "marks before the confirm" else _NO_ANSWER
                out.append(Step("no answer", who, 1, self._doing(unsent, number, at, answer)))
                out.append(Step("refused", who, 1, self._doing(state, number, at, _REFUSED)))
        if _TO_SEND in doing:
            released = state
            for at in (0, 1):
                if doing[at] == _TO_SEND:
                    released = self._doing(self._released(released, number, at), number, at, _NOT)
            out.append(Step("let go", name, 0, released))
        if any(what not in (_NOT, _TO_SEND) for what in doing):
            self._mark(out, state, number, faults)

    def _land(self, copies: int, mark: int) -> tuple[int, int]:
        """Land and mark, in one step; a second copy within the window does not land."""
        return (copies, mark) if mark else (min(copies + 1, 3), int(self._edge))

    def _doing(self, state: State, number: int, at: int, what: int) -> State:
        doing, confirmed = state[1 + number]
        changed = (*doing[:at], what, *doing[at + 1 :])
        return self._with_relay(state, number, (changed, confirmed))

    def _released(self, state: State, number: int, at: int) -> State:
        """Given back, if it is still ours."""
        row = state[0][at]
        if row[0] != _THERE or row[1] != number + 1:
            return state
        return self._with_row(state, at, (_THERE, 0, *row[2:]))

    def _mark(self, out: list[Step], state: State, number: int, faults: bool) -> None:
        """What came of the rows that were sent, in one commit."""
        doing, _ = state[1 + number]
        who = f"relay {'AB'[number]}"
        done, undone = state, state
        kept = [0, 0]
        for at in (0, 1):
            what, row = doing[at], state[0][at]
            if what in (_NOT, _TO_SEND):
                continue
            done, undone = self._doing(done, number, at, _NOT), self._doing(undone, number, at, _NOT)
            if what == _CONFIRMED:
                kept[at] = 1
                if not row[3]:
                    text = f"row {at + 1} is marked as sent, and the broker never confirmed it (I1: lost)"
                    out.append(Step("mark", who, 0, Violation("I5", text)))
                    return
                if row[0] == _THERE:
                    done = self._with_row(done, at, (_SENT, 0, *row[2:]))
            elif what == _NO_ANSWER:
                done = self._released(done, number, at)
            elif row[0] == _THERE and row[1] == number + 1:
                refusals = row[2] + 1
                state_now = _DEAD if refusals >= _MOST_REFUSALS else _THERE
                done = self._with_row(done, at, (state_now, 0, refusals, *row[3:]))
        out.append(Step("mark", who, 0, done))
        if faults:
            # What was confirmed is remembered, and marked with the next claim; the rest is sent again.
            rest = tuple([what if what == _TO_SEND else _NOT for what in doing])
            remembering = (rest, tuple(kept))
            if _TO_SEND not in doing:
                for action, so_far in (("but done", done), ("not done", undone)):
                    after = self._with_relay(so_far, number, remembering)
                    out.append(Step(f"mark: reply lost, {action}", who, 1, after))


def copies_by_faults(model: OutboxMode) -> dict[tuple[int, int], int]:
    """The fewest faults after which so many copies of the two messages have landed."""
    fewest: dict[tuple[int, int], int] = {}
    layer, seen = [model.initial()], {model.initial()}
    for cost in range(model.faults + 1):
        following: list[State] = []
        while layer:
            state = layer.pop()
            copies = tuple(sorted((state[0][0][3], state[0][1][3])))
            fewest.setdefault(copies, cost)  # type: ignore[arg-type]  # two of them
            for step in model.steps(state, faults=True):
                if isinstance(step.after, Violation) or step.after in seen:
                    continue
                if step.fault == 0:
                    seen.add(step.after)
                    layer.append(step.after)
                elif step.fault == 1:
                    following.append(step.after)
        layer = [state for state in dict.fromkeys(following) if state not in seen]
        seen.update(layer)
    return fewest
