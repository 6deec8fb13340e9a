"""The long form. One run of about twenty minutes, with its controls, is added to what was gathered before:

    python -m tests.soak --minutes 20
    python -m tests.soak --cell store:redis+rabbitmq --messages 2000
    python -m tests.soak report
    python -m tests.soak conditions

Prints progress. Ends with 1 if anything was lost, doubled without excuse or unexpected, or a control shows no damage.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from . import report
from .cells import CELLS, cell_of
from .conditions import README, write_table
from .runs import play
from .source import source
from .storm import Doses


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["run", "report", "conditions"], default="run")
    parser.add_argument("--minutes", type=float, help="go on for so long; without it every cell is played once")
    parser.add_argument("--cell", action="append", help="only this cell; may be given several times")
    parser.add_argument("--messages", type=int, default=Doses.messages, help="of a cell; all else goes with it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=2, help="cells at once, each on servers of its own")
    parser.add_argument("--folder", type=Path, help="where servers and histories lie meanwhile; where it is fast")
    chosen = parser.parse_args()
    if chosen.what == "report":
        return report.write()
    if chosen.what == "conditions":
        write_table()
        print(f"written: {README}")
        return 0
    cells = [cell_of(name) for name in chosen.cell or ()] or random.Random(chosen.seed).sample(CELLS, len(CELLS))
    doses = Doses().scaled(chosen.messages / Doses.messages)
    folder = Path(tempfile.mkdtemp(prefix="soak", dir=chosen.folder))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))  # so that all is stopped that was started
    wrong = 0
    began = time.monotonic()
    report.FOLDER.mkdir(exist_ok=True)
    path = report.FOLDER / f"{source()}.jsonl"
    print(f"source {source()}, in {folder}, reports go to {path.name}", flush=True)
    for one in play(
        cells, doses, folder, seed=chosen.seed, parallel=chosen.parallel, minutes=chosen.minutes,
        say=lambda text: print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True),
    ):  # fmt: skip
        with path.open("a") as file:
            file.write(json.dumps(one) + "\n")
        wrong += one["verdict"].startswith(("BROKEN", "VOID"))
        print(report.line(one), *one["wrong"][: 0 if "damage" in one else 20], sep="\n    ", flush=True)
    if not wrong:
        for left in sorted(folder.rglob("*"), reverse=True):
            left.rmdir() if left.is_dir() else left.unlink()
        os.rmdir(folder)
    print(f"{time.monotonic() - began:.0f} s, {wrong} wrong", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
