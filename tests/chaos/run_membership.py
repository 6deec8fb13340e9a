"""The long form of examples/membership_card: 5,000 payments, 100 kills over all of its processes, a broker restart.

    python tests/chaos/run_membership.py      # SQLite alone, then PostgreSQL and a RabbitMQ of its own; ~10 minutes

The short form is tests/integration/test_examples.py. Writes tests/chaos/reports/membership.md; exits with 1 unless
there is one charge and one card for every payment.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import sqlalchemy as sa

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import servers  # noqa: E402 - found through the line above
from private_rabbitmq import PrivateRabbitMQ  # noqa: E402

EXAMPLE = HERE.parents[1] / "examples" / "membership_card"
REPORT = HERE / "reports" / "membership.md"


def play(folder: Path, payments: int, kills: int, seed: int, **environment: str) -> tuple[int, str, float]:
    """One run of the whole shop: its exit code, what it said, and how long it took in seconds."""
    command = [sys.executable, str(EXAMPLE / "run.py"), "--payments", str(payments), "--kills", str(kills)]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--seed", str(seed), "--patience", "900"],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=(folder / "errors.log").open("w"),
        text=True,
        check=False,
    )
    return done.returncode, " ".join(done.stdout.split("\n")[:2]), time.monotonic() - began


def restart(broker: PrivateRabbitMQ, after: float, stopped: threading.Event) -> None:
    """Kill the broker once in the middle, and start it again."""
    if not stopped.wait(after):
        broker.kill()
        broker.start()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payments", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--restart-after", type=float, default=20.0, help="Seconds until the broker is killed.")
    options = parser.parse_args()
    lines = ["| where | broker restarts | what was counted | seconds | verdict |", "|---|---|---|---|---|"]
    print(*lines, sep="\n")
    failed = 0
    for where in ("SQLite alone", "PostgreSQL and RabbitMQ"):
        with tempfile.TemporaryDirectory() as name:
            folder, restarts, environment = Path(name), 0, {}
            broker, stopped = None, threading.Event()
            if where != "SQLite alone":
                home = folder / "rabbitmq"
                home.mkdir()
                broker, restarts = PrivateRabbitMQ(home), 1
                threading.Thread(target=restart, args=(broker, options.restart_after, stopped), daemon=True).start()
                database = servers.POSTGRESQL
                environment = {
                    "CHARGES_DATABASE": database,
                    "CARDS_DATABASE": database,
                    "BROKER": broker.url,
                    "MEMBERSHIP_NAME": f"shop{uuid.uuid4().hex[:8]}",
                }
            try:
                code, said, seconds = play(folder, options.payments, options.kills, options.seed, **environment)
            finally:
                stopped.set()
                if broker is not None:
                    broker.stop()
                    _drop(environment["MEMBERSHIP_NAME"])
        failed += code != 0
        lines.append(f"| {where} | {restarts} | {said} | {seconds:.0f} | {'holds' if code == 0 else 'FAILED'} |")
        print(lines[-1], flush=True)
    REPORT.write_text(
        "# One charge, one card: the example under kills\n\n"
        f"`python tests/chaos/run_membership.py --payments {options.payments} --kills {options.kills} "
        f"--seed {options.seed}`\n\n" + "\n".join(lines) + "\n"
    )
    return 1 if failed else 0


def _drop(name: str) -> None:
    engine, tables = sa.create_engine(servers.POSTGRESQL), sa.MetaData()
    tables.reflect(engine, only=lambda table, _: table.startswith(name))
    tables.drop_all(engine)
    engine.dispose()


if __name__ == "__main__":
    sys.exit(main())
