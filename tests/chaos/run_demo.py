"""The long form of the demo: 5,000 payments, 50 kills, three seeds, on each broker; writes a report.

    python tests/chaos/run_demo.py                      # SQLite and RabbitMQ, about 15 minutes
    python tests/chaos/run_demo.py --brokers redis://127.0.0.1:6379/7 --seeds 1

The short form is tests/integration/test_demo.py. Exits with 1 if a run does not hold what is claimed of it; a broker
of kombu's own that loses messages (its plain Redis transport) is reported and does not count.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from idempotent_bus.demo.input import made_up
from idempotent_bus.demo.settings import Mode
from idempotent_bus.demo.show import loses
from idempotent_bus.demo.story import Result, play, prepare

REPORT = Path(__file__).parent / "reports" / "demo.md"
COLUMNS = (
    "payments",
    "cards",
    "too_many",
    "missing",
    "kills",
    "kills_between",
    "acks_lost",
    "resends",
    "refused_at_edge",
    "refused_at_handler",
    "seconds",
)


def main() -> int:
    """Play everything, show each line as it is done, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brokers", default="sqlite,amqp://guest:guest@127.0.0.1:5672//")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--payments", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--report", type=Path, default=REPORT)
    arguments = parser.parse_args()
    lines = ["| broker | seed | mode | " + " | ".join(COLUMNS) + " | verdict |", "|---" * (len(COLUMNS) + 4) + "|"]
    print(*lines, sep="\n")
    failures = 0
    for broker in arguments.brokers.split(","):
        name = urlsplit(broker).scheme or broker
        for seed in map(int, arguments.seeds.split(",")):
            for mode in Mode:
                with tempfile.TemporaryDirectory() as folder:
                    settings = prepare(
                        mode,
                        broker=broker,
                        store=None,
                        rows=made_up(arguments.payments, seed),
                        biz_id="payment_id",
                        consumers=4,
                        kills=arguments.kills,
                        seed=seed,
                        folder=Path(folder),
                    )
                    result = play(settings, _progress)
                verdict = _verdict(result, name)
                failures += verdict.startswith("FAILED")
                values = " | ".join(str(round(getattr(result, column))) for column in COLUMNS)
                lines.append(f"| {name} | {seed} | {mode.value} | {values} | {verdict} |")
                print("\r" + lines[-1], flush=True)
    machine = f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    title = (
        f"# The demo, long form\n\n{time.strftime('%Y-%m-%d')}, {machine}. Made by `python tests/chaos/run_demo.py`."
    )
    arguments.report.write_text("\n".join([title, "", *lines, ""]))
    print(f"written to {arguments.report.name}; {failures} failed")
    return 1 if failures else 0


def _verdict(result: Result, broker: str) -> str:
    if not result.failure:
        return "damage, as expected" if result.mode is Mode.NAIVE else "held"
    if result.missing and loses(broker):
        return "the broker loses messages"
    return f"FAILED: {result.failure}"


def _progress(done: int, kills: int) -> None:
    print(f"\r{done} cards, {kills} kills ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
