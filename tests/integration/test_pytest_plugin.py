"""The pytest plug-in, in a pytest of its own: its fixtures, and that it costs nothing where none is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src"

HANDLERS = """
from idempotent_bus import idempotent_consumer

cards = []

class Printer:
    def print_card(self, payment_id):
        cards.append(payment_id)

printer = Printer()

@idempotent_consumer("memory://", scope="cards.issue", biz_id="payment_id")
def issue_card(body, message):
    printer.print_card(body["payment_id"])
"""

TESTS = """
import pytest
from handlers import cards, issue_card, printer
from idempotent_bus.errors import StoreUnavailable

def test_one_card(deliver):
    cards.clear()
    delivered = deliver(issue_card, {"payment_id": "p-1"}, {"payment_id": "p-2"})
    assert sorted(cards) == ["p-1", "p-2"] and delivered.runs == 2

def test_crashes(crashes):
    doubled = [
        crash.title
        for crash in crashes(issue_card, {"payment_id": "p"}, outside=[(printer, "print_card")])
        if cards.count(crash.body["payment_id"]) != 1
    ]
    assert doubled == [
        "a crash after handler (step 2)",
        "a crash after Printer.print_card (step 3)",
        "a crash before complete (step 4)",
    ]

def test_clock_store_broker(manual_clock, faulty_store, faulty_broker):
    faulty_store.fail("claim")
    with pytest.raises(StoreUnavailable):
        faulty_store.claim(None)
    faulty_broker.publish("a", delay=5)
    assert faulty_broker.receive() == []
    manual_clock.advance(5)
    assert len(faulty_broker.receive()) == 1
"""

NOTHING = """
import sys

def test_nothing():
    assert not [name for name in sys.modules if name.partition(".")[0] in ("idempotent_bus", "kombu", "redis")]
"""


def run(folder: Path, *arguments: str, installed: bool = False) -> subprocess.CompletedProcess[str]:
    """pytest in a folder without any setting of ours. installed: the plug-in is found by its entry point."""
    path = [str(SOURCES)]
    if installed:
        metadata = folder / "site" / "the_plugin-1.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: the-plugin\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text("[pytest11]\nidempotent_bus_pytest = idempotent_bus_pytest\n")
        path.append(str(folder / "site"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "handlers.py").write_text(HANDLERS)
    (tmp_path / "test_handlers.py").write_text(TESTS)
    (tmp_path / "test_nothing.py").write_text(NOTHING)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "installed"),
    [((), True), (("-p", "idempotent_bus_pytest"), False), (("-p", "idempotent_bus_pytest"), True)],
    ids=["installed", "named", "installed and named"],
)
def test_the_fixtures_are_there_however_it_is_loaded(
    project: Path, arguments: tuple[str, ...], installed: bool
) -> None:
    """By its entry point, by `-p`, and by both, which is one registration: its name is that of its module."""
    result = run(project, *arguments, "test_handlers.py", installed=installed)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 passed" in result.stdout  # four ways of delivery, the crashes, and the rest


def test_nothing_is_imported_where_no_fixture_is_asked_for(project: Path) -> None:
    """A project that has the library installed pays nothing for the plug-in in its other tests."""
    result = run(project, "-p", "idempotent_bus_pytest", "test_nothing.py", installed=True)
    assert result.returncode == 0, result.stdout + result.stderr
