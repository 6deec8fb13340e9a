"""Several workers of which one runs at a time: threads that hand over where they are told to, and nowhere else.

So a run with two or three workers is as repeatable as a run with one. The threads are kept for the next run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Abandoned", "Turns"]


class Abandoned(BaseException):
    """The run is over: a worker that had handed over unwinds, and must do nothing more."""


class _Seat:
    __slots__ = ("body", "error", "go", "paused", "thread", "why")

    def __init__(self) -> None:
        self.go = threading.Lock()
        self.go.acquire()
        self.body: Callable[[], None] | None = None
        self.paused = False
        self.why: Any = None
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None


class Turns:
    """So many workers. `resume` and `abandon` are for the thread that made it, `pause` for a worker's own."""

    def __init__(self, workers: int) -> None:
        self._seats = [_Seat() for _ in range(workers)]
        self._back = threading.Lock()
        self._back.acquire()
        self._over = False
        for number, seat in enumerate(self._seats):
            seat.thread = threading.Thread(target=self._live, args=(seat,), name=f"worker-{number}", daemon=True)
            seat.thread.start()

    @property
    def workers(self) -> int:
        """How many there are."""
        return len(self._seats)

    def is_paused(self, worker: int) -> bool:
        """True if it has handed over in the middle of something."""
        return self._seats[worker].paused

    def resume(self, worker: int, body: Callable[[], None] | None = None) -> Any:
        """Let a worker go on, or begin with `body`, until it hands over or ends.

        Returns what it gave to `pause`, or None if it has ended. Raises what came out of its body.
        """
        seat = self._seats[worker]
        if not seat.paused:
            seat.body = body
        seat.paused = False
        seat.go.release()
        self._back.acquire()
        if seat.error is not None:
            error, seat.error = seat.error, None
            raise error
        return seat.why if seat.paused else None

    def pause(self, worker: int, why: Any) -> None:
        """Hand over, and wait for the next turn. Raises Abandoned if there will be none."""
        seat = self._seats[worker]
        seat.why = why
        seat.paused = True
        self._back.release()
        seat.go.acquire()
        if self._over:
            raise Abandoned

    def abandon(self) -> None:
        """End what is in the middle of something: for a run that is over before its workers are."""
        self._over = True
        try:
            for number, seat in enumerate(self._seats):
                while seat.paused:
                    try:
                        self.resume(number)
                    except BaseException:  # noqa: BLE001, S112 - whatever it meets on its way out
                        continue
        finally:
            self._over = False

    def close(self) -> None:
        """End the threads."""
        self.abandon()
        for seat in self._seats:
            seat.body = None
            seat.go.release()
            assert seat.thread is not None
            seat.thread.join(10)

    def _live(self, seat: _Seat) -> None:
        while True:
            seat.go.acquire()
            body, seat.body = seat.body, None
            if body is None:
                return
            try:
                body()
            except BaseException as error:  # noqa: BLE001 - it is raised again where the turn was given
                seat.error = error
            seat.paused = False
            self._back.release()
