"""A real Celery application under kills and cuts: the long form of test_celery_kills.py.

    python tests/chaos/run_celery.py                       # 20,000 calls, 60 kills, 10 cuts on each of four: an hour
    python tests/chaos/run_celery.py --on redis:prefork    # one of them

For each broker and pool the same run twice: guarded, and with Celery's own tasks, which must show damage, or the run
proves nothing. Adds its lines to tests/chaos/reports/celery.md; exits with 1 unless all is right.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from pathlib import Path

from rich.console import Console

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))

from celery_storm import CALLS, Outcome, storm  # noqa: E402 - found through the lines above

REPORT = HERE / "reports" / "celery.md"
PLACES = ("redis:prefork", "redis:threads", "rabbitmq:prefork", "rabbitmq:threads")
COLUMNS = (
    "date", "where", "tasks", "calls", "kills", "cuts", "seconds", "inbox: missing / twice", "outside: missing / twice",
    "cut off", "not SUCCESS", "verdict",
)  # fmt: skip
HEAD = f"""# A Celery application under kills and cuts

`python tests/chaos/run_celery.py`: charges, a chain, a chord, an autoretry ({CALLS} calls a unit) and a beat entry; two
workers and beat killed with SIGKILL, all connections to the broker cut by a proxy, for workers and sender alike.
"redis" is `idempotent-redis://` when guarded, kombu's transport for Celery's own tasks. Half of the tasks write through
the inbox to PostgreSQL, in a table without a unique constraint; half have an effect outside, with the dedup store
alone. "Cut off": executions that had their effect outside, but whose process was killed before the completion: each may
cost one double.

| {" | ".join(COLUMNS)} |
|---|---|---|---:|---|---:|---:|---|---|---:|---|---|
"""


def line(where: str, outcome: Outcome, *, guarded: bool) -> tuple[str, bool]:
    """A line of the report, and whether the run says what it must."""
    holds = outcome.is_right if guarded else outcome.is_damaged
    verdict = ("holds" if holds else "FAILED") if guarded else ("damage" if holds else "VOID: no damage")
    kills = ", ".join(f"{number} {kind}" for kind, number in sorted(outcome.kills.items()))
    stuck = ", ".join(f"{number} {state}" for state, number in sorted(outcome.states.items()) if state != "SUCCESS")
    made = outcome
    cells = (
        datetime.date.today().isoformat(), where, "guarded" if guarded else "Celery's own", made.calls, kills,
        made.cuts, f"{made.seconds:.0f}", f"{made.inside_missing} / {made.inside_doubled}",
        f"{made.outside_missing} / {made.outside_doubled}", made.cut_off if guarded else "", stuck or "0", verdict,
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |", holds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", action="append", choices=PLACES, help="Broker and pool; all of them if not given.")
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--control-calls", type=int, default=4_000, help="For Celery's own tasks, with as many kills.")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    console = Console()
    if not REPORT.exists():
        REPORT.write_text(HEAD)
    failed = 0
    for where in options.on or PLACES:
        broker, _, pool = where.partition(":")
        for guarded in (True, False):
            name = f"{where}, {'guarded' if guarded else 'control'}"
            with tempfile.TemporaryDirectory() as folder, console.status(name) as status:
                units = max(1, (options.calls if guarded else options.control_calls) // CALLS)

                def say(text: str, name: str = name, status: object = status) -> None:
                    status.update(f"{name}: {text}")  # type: ignore[attr-defined]
                    if not console.is_terminal:
                        console.print(f"{name}: {text}")

                shape = {"guarded": guarded, "units": units, "work": 0.01, "seed": options.seed}
                with storm(broker, pool, Path(folder), say=say, **shape) as run:
                    outcome = run.run(options.kills, options.cuts)
            text, holds = line(where, outcome, guarded=guarded)
            failed += not holds
            console.print(text, soft_wrap=True)
            with REPORT.open("a") as report:
                report.write(text + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
