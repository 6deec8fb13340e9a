"""A run: some cells, several at once, and the controls, without which it counts for nothing."""

from __future__ import annotations

import itertools
import queue
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .cells import CONTROLS, Cell
from .ground import Ground
from .source import source
from .storm import Doses, Storm, Zygote

__all__ = ["CONTROL_DOSES", "doses_for", "play"]

#: How often a control is played until it shows damage: three times without is no accident.
_TRIES = 3

CONTROL_DOSES = Doses(
    messages=120, kills=0, random_kills=0, stops=0, broker_restarts=0, store_restarts=0, faults=0, lease=2.0
)


def doses_for(cell: Cell, doses: Doses) -> Doses:
    """RabbitMQ takes five seconds to start; a Redis is there again at once."""
    if cell.control:
        return CONTROL_DOSES
    if cell.broker == "rabbitmq":
        return replace(doses, broker_restarts=(doses.broker_restarts + 1) // 2)
    if cell.broker == "redis":
        return replace(doses, broker_restarts=2 * doses.broker_restarts)
    return doses


def play(
    cells: Sequence[Cell], doses: Doses, folder: Path, *, seed: int, parallel: int = 2, minutes: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Reports as they come: of the controls first, then of the cells; with minutes again and again until they are over.

    What a cell leaves behind (history, effects, errors) is kept in the folder where it was not as it should be. A
    control that showed no damage, since nobody was stopped in the wrong moment, is played again.
    """
    run, of_source = uuid.uuid4().hex[:12], source()
    rounds = itertools.count() if minutes is not None else range(1)
    jobs = itertools.chain(((cell, 0) for cell in CONTROLS), ((cell, number) for number in rounds for cell in cells))
    until = time.monotonic() + (minutes or 0) * 60
    lock, reports, over = threading.Lock(), queue.SimpleQueue[Any](), threading.Event()

    def next_job() -> tuple[Cell, int] | None:
        with lock:
            job = next(jobs, None)
        late = minutes is not None and time.monotonic() > until
        return None if job is None or over.is_set() or (late and not job[0].control) else job

    def work(mine: Path) -> None:
        try:
            mine.mkdir()
            with Zygote() as zygote, Ground(mine) as ground:
                while (job := next_job()) is not None:
                    cell, number = job
                    for again in range(_TRIES):
                        place = mine / uuid.uuid4().hex[:8]
                        place.mkdir()
                        seeds = {"seed": seed * 1000 + number + 500 * again}
                        storm = Storm(cell, doses_for(cell, doses), zygote, ground, place, **seeds, say=say, over=over)
                        report = storm.play()
                        if not report["verdict"].startswith("VOID"):
                            break
                    if report["verdict"].startswith(("BROKEN", "VOID")):
                        report["kept"] = str(place)
                    else:
                        shutil.rmtree(place)
                    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
                    reports.put({"run": run, "source": of_source, "date": date, "seed": seed, **report})
        except BaseException as error:  # noqa: BLE001 - raised by whoever takes the reports
            reports.put(error)
        reports.put(None)

    threads = [
        threading.Thread(target=work, args=(folder / f"place{number}",), daemon=True) for number in range(parallel)
    ]
    for thread in threads:
        thread.start()
    ended = 0
    try:
        while ended < parallel:
            report = reports.get()
            if report is None:
                ended += 1
            elif isinstance(report, BaseException):
                raise report
            else:
                yield report
    finally:  # also where it is broken off: no process and no server is left
        over.set()
        for thread in threads:
            thread.join(120)
