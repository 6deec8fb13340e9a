"""Lets workers take from a broker in memory until all is quiet, alone or in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from .broker import Delivery, MemoryBroker
from .faults import Action
from .interleaving import Turns

__all__ = ["Driver", "NeverQuiet"]

_MOST_ROUNDS: Final = 300


class NeverQuiet(AssertionError):
    """Messages keep coming back, round after round: it never becomes quiet (I13)."""


class Driver:
    """Gives what is ready to workers that have nothing to do, and lets time pass where nobody has.

    settle: called with a worker's number and its deliveries, at most `most`; with several workers in a thread of
    theirs, where `turns.pause` hands over. advance: lets so many seconds pass. visibility: seconds after which the
    broker takes back what a worker that stands still has.
    """

    def __init__(
        self,
        broker: MemoryBroker,
        settle: Callable[[int, Sequence[Delivery]], None],
        advance: Callable[[float], None],
        *,
        turns: Turns | None = None,
        most: int = 1,
        visibility: float = 100.0,
    ) -> None:
        self._broker = broker
        self._settle = settle
        self._advance = advance
        self._turns = turns
        self._most = most
        self._visibility = visibility
        self._stalled: set[int] = set()

    def drain(self) -> None:
        """Until nothing is ready, delayed, or in the middle of something. Raises NeverQuiet."""
        if self._turns is None:
            self._drain_alone()
        else:
            self._drain_in_turns(self._turns)

    def _drain_alone(self) -> None:
        broker = self._broker
        for _ in range(_MOST_ROUNDS):
            deliveries = broker.receive(0, self._most)
            if deliveries:
                self._settle(0, deliveries)
                continue
            ready = broker.next_ready
            if ready is None:
                return
            self._advance(ready - broker.clock())
        raise NeverQuiet("I13: it never becomes quiet")

    def _drain_in_turns(self, turns: Turns) -> None:
        broker, workers = self._broker, turns.workers
        current = 0
        for _ in range(_MOST_ROUNDS):
            order = [(current + offset) % workers for offset in range(workers)]
            chosen = next((worker for worker in order if self._may_go_on(turns, worker)), None)
            if chosen is None:
                ready = broker.next_ready
                if ready is not None and ready > broker.clock():
                    self._advance(ready - broker.clock())
                    continue
                if not self._stalled:
                    return
                # Nothing else can be done: it goes on where it stood still.
                chosen = min(self._stalled)
                self._stalled.discard(chosen)
            current = self._give_turn(turns, chosen)
        raise NeverQuiet("I13: it never becomes quiet")

    def _may_go_on(self, turns: Turns, worker: int) -> bool:
        if turns.is_paused(worker):
            return worker not in self._stalled
        return self._broker.has_ready

    def _give_turn(self, turns: Turns, worker: int) -> int:
        """Let a worker go on, or begin. Returns whose turn is next, if that one can do anything."""
        if turns.is_paused(worker):
            why = turns.resume(worker)
        else:
            deliveries = self._broker.receive(worker, self._most)
            why = turns.resume(worker, lambda: self._settle(worker, deliveries))
        if why is Action.STALL:
            self._stalled.add(worker)
            self._broker.close_channel(worker, after=self._visibility)
        steps = {Action.SWITCH: 1, Action.SWITCH_2: 2, Action.STALL: 1}.get(why, 0)
        return (worker + steps) % turns.workers
