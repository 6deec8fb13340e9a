"""The upper half without an outbox: two producers, each with a message, that resend until they know.

Mirrors `producer.py` and `sending/resend.py`: a send that was not confirmed is repeated under the same inner-msg-id,
and what is claimed in the end is no more than all sends together allow. The edge is one atomic step: land and mark.

A message is (what its producer knows, copies that landed, whether the edge remembers it, whether a send is in doubt).
"""

from __future__ import annotations

from typing import Any, Final

from .explore import State, Step, Violation

__all__ = ["Publishing"]

_SENDING: Final = 0
_LANDED: Final = 1
_UNKNOWN: Final = 2
_REFUSED: Final = 3
_GONE: Final = 4  # the producer died: nothing was promised


class Publishing:
    """See the module. edge: whether the broker has one. mutant: a broken variant."""

    def __init__(self, name: str, *, faults: int = 4, edge: bool = True, mutant: str = "") -> None:
        self.name = name
        self.faults = faults
        self._edge = edge
        self._mutant = mutant

    def initial(self) -> State:
        return ((_SENDING, 0, 0, 0),) * 2

    def is_final(self, state: State) -> bool:
        return all(message[0] not in (_SENDING, _UNKNOWN) for message in state)

    @property
    def actions(self) -> frozenset[str]:
        told = {"send", "send again after `unknown`", "confirm lost", "send lost", "send lost: told `unknown`"}
        told |= {"confirm lost: told `unknown`", "refused", "the producer dies"}
        return frozenset(told | ({"the edge's window ends"} if self._edge else set()))

    def tell(self, step: Step) -> str:
        return f"{step.action} ({step.who})"

    def canonical(self, state: State) -> State:
        return tuple(sorted(state))

    def all_steps(self, state: State) -> list[Step]:
        return self._steps(state, faults=True)

    def steps(self, state: State, *, faults: bool) -> list[Step]:
        return [
            step if isinstance(step.after, Violation) else step._replace(after=self.canonical(step.after))
            for step in self._steps(state, faults=faults)
        ]

    def _steps(self, state: State, *, faults: bool) -> list[Step]:
        out: list[Step] = []
        for number, (knows, copies, mark, doubt) in enumerate(state):
            who = f"message {number + 1}"

            def add(action: str, fault: int, after: Any, number: int = number, who: str = who) -> None:
                if faults or not fault:
                    whole = after if isinstance(after, Violation) else (*state[:number], after, *state[number + 1 :])
                    out.append(Step(action, who, fault, whole))

            if knows == _UNKNOWN:
                add("send again after `unknown`", 0, (_SENDING, copies, mark, doubt))
            if knows == _SENDING:
                landed, marked = self._land(copies, mark)
                known = self._knows(_LANDED, landed, doubt)
                add("send", 0, known if isinstance(known, Violation) else (known, landed, marked, 0))
                add("confirm lost", 1, (_SENDING, landed, marked, 1))
                add("confirm lost: told `unknown`", 1, (_UNKNOWN, landed, marked, 1))
                lost_mark = 1 if self._mutant == "marks before landing" else mark
                told = _LANDED if self._mutant == "a timeout is taken for landed" else _UNKNOWN
                after: Any = self._knows(told, copies, 1)
                add("send lost: told `unknown`", 1, after if isinstance(after, Violation) else (after, copies, mark, 1))
                add("send lost", 1, (_SENDING, copies, lost_mark, 1))
                after = self._knows(_REFUSED, copies, doubt)
                add("refused", 1, after if isinstance(after, Violation) else (after, copies, mark, doubt))
                add("the producer dies", 1, (_GONE, copies, mark, 0))
            if mark:
                add("the edge's window ends", 1, (knows, copies, 0, doubt))
        return out

    def _land(self, copies: int, mark: int) -> tuple[int, int]:
        """Land and mark, in one step; a second copy within the window does not land."""
        if self._mutant == "a fresh id for each send":
            mark = 0
        return (copies, mark) if mark else (min(copies + 1, 3), int(self._edge))

    def _knows(self, claim: int, copies: int, doubt: int) -> int | Violation:
        """What the producer is told: no more than all its sends together allow."""
        if claim == _REFUSED and doubt and self._mutant != "the last send decides":
            claim = _UNKNOWN
        if claim == _LANDED and not copies:
            return Violation("I1", "the receipt says that it landed, and the broker does not have it")
        if claim == _REFUSED and copies:
            return Violation("I15", "the producer is told that nothing was stored, and an earlier send was")
        if self._mutant == "a fresh id for each send" and copies > 1:
            return Violation("I15", "two copies of one publish landed within the edge's window")
        return claim
