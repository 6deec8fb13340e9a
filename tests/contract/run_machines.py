"""The state machines, long form: 2,000 examples of up to 100 steps on each store and each transport with an edge.

    python tests/contract/run_machines.py                              # everything; writes reports/machines.md
    python tests/contract/run_machines.py --only memory,sqlite --examples 200

Each example is a random story, played to a store (or a transport) and to a dictionary, which must agree on all answers.
The seeds are new each time. A story in which they do not agree is shrunk and printed. In the same run a store with one
protection taken out, and kombu's memory transport, which has no edge, must be found out, or the run is void. The short
form is test_state_machine.py and test_transport_machine.py. Exits with 1 if anything disagrees.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import os
import platform
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["IDEMPOTENT_BUS_LONG"] = "1"  # other examples each time
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import redis
import sqlalchemy
import stores
import test_state_machine as store_machine
import test_transport_machine as transport_machine
import transports
from hypothesis import Phase
from kombu import Connection

import servers
from idempotent_bus.testing.transport_contract import TransportSubject

REPORT = Path(__file__).parent / "reports" / "machines.md"
#: So many examples at a time, with progress in between.
CHUNK = 50


def outlast(seconds: float) -> None:
    """The stores' clocks tick in milliseconds, and nothing here needs more: a hundred times a story it adds up."""
    time.sleep(seconds + 0.004)


def without_bound(connect: Callable[[], Connection]) -> Callable[[], Connection]:
    """In a hundred steps a message is given back more often than a transport puts up with; the model knows no bound."""

    def opened() -> Connection:
        connection = connect()
        connection.transport_options["max_deliveries"] = 1_000_000
        return connection

    return opened


def places(directory: Path) -> Iterator[tuple[str, Any, Callable[..., None]]]:
    """Each store and each transport, opened, with what plays stories to it."""
    for name, place in stores.STORES.items():
        with place(directory) as subject:
            if name != "memory":
                subject.outlast = outlast
            yield name, subject, store_machine.agree
            subject.close()
    for name, transport in transports.TRANSPORTS.items():
        with transport(directory) as subject:
            subject.connect = without_bound(subject.connect)
            yield f"{name} transport", subject, transport_machine.agree


def play(name: str, subject: Any, agree: Callable[..., None], examples: int, steps: int) -> tuple[int, str]:
    """So many stories, unless one disagrees. Gives how many agreed, and what was found."""
    done = 0
    while done < examples:
        some = min(CHUNK, examples - done)
        try:
            agree(subject, some, steps=steps)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
            traceback.print_exc()
            return done, f"{type(error).__name__}: {error}".partition("\n")[0]
        done += some
        print(f"  {name}: {done} examples", flush=True)
    return done, ""


def controls() -> list[tuple[str, bool]]:
    """What must be found out."""
    mutant = next(mutant for mutant in store_machine.MEMORY if mutant.name == "token not compared")
    found = []
    for name, call in (
        ("a store that compares no token", lambda: store_machine.agree(store_machine.mutated_memory(mutant), 200)),
        (
            "a transport without an edge",
            lambda: transport_machine.agree(
                TransportSubject(lambda: Connection("memory://"), patience=0.2), 50, phases=(Phase.generate,)
            ),
        ),
    ):
        try:
            with contextlib.redirect_stdout(None):
                call()
        except AssertionError:
            found.append((name, True))
        else:
            found.append((name, False))
    return found


def versions() -> str:
    """Of the servers and of the libraries on the way to them."""
    names = ("hypothesis", "kombu", "redis", "SQLAlchemy", "psycopg", "PyMySQL")
    found = [f"{name} {importlib.metadata.version(name)}" for name in names]
    found.append(f"SQLite {sqlite3.sqlite_version}")
    for name, url, ask in (
        ("PostgreSQL", servers.POSTGRESQL, "SHOW server_version"),
        ("MariaDB", servers.MARIADB, "SELECT VERSION()"),
    ):
        engine = sqlalchemy.create_engine(url)
        with engine.connect() as connection:
            found.append(f"{name} {str(connection.exec_driver_sql(ask).scalar()).split()[0]}")
        engine.dispose()
    with redis.Redis.from_url(servers.REDIS) as client:
        found.append(f"Redis {client.info('server')['redis_version']}")
    return ", ".join(found)


def write(report: Path, lines: list[str]) -> None:
    report.parent.mkdir(exist_ok=True)
    report.write_text("\n".join(lines) + "\n")
    print(f"wrote {report}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of stores, and of transports as 'sqlite transport', with commas")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--report", type=Path, default=REPORT)
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    store_machine.LONGER = 1  # the number of examples is said here
    only = given.only and {name.strip() for name in given.only.split(",")}
    lines = [
        "# The state machines, long form",
        "",
        f"{time.strftime('%Y-%m-%d')}, {platform.system()}, Python {platform.python_version()}. Made by "
        f"`{' '.join(['python tests/contract/run_machines.py', *sys.argv[1:]])}`.",
        "",
        f"{versions()}.",
        "",
        "| store or transport | examples | steps in each, at most | seconds | found |",
        "|---|---|---|---|---|",
    ]
    bad = False
    with tempfile.TemporaryDirectory() as directory:
        for name, subject, agree in places(Path(directory)):
            if only and name not in only:
                continue
            began = time.monotonic()
            done, found = play(name, subject, agree, given.examples, given.steps)
            bad |= bool(found)
            seconds = time.monotonic() - began
            lines.append(f"| {name} | {done} | {given.steps} | {seconds:.0f} | {found or 'they agree'} |")
            write(given.report, lines)
    lines += ["", "Controls:", ""]
    for name, caught in controls():
        bad |= not caught
        lines.append(f"* {name}: {'found out' if caught else 'NOT found out: the run is void'}")
    write(given.report, lines)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
