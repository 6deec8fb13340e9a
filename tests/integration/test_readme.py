"""The README stays true: its Python blocks run as they are printed, one after another, in an empty folder."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_python_blocks_run(tmp_path: Path) -> None:
    """What a newcomer types in from the README works: one publish lands, one card is issued, once, and
    a Celery task runs once."""
    exactly = """
with Connection("idempotent-sqla+sqlite:///broker.db") as connection:
    with IdempotentProducer(connection, exchange=paid, routing_key="paid", declare=[cards]) as producer:
        producer.publish({"payment_id": "p-2", "amount": "9.90"})
        producer.publish({"payment_id": "p-2", "amount": "9.90"})
    IdempotentConsumer(connection, {cards: issue_card_exactly}).run(idle_timeout=1)

app.conf.task_always_eager = True
assert print_card.delay("p-3").get() == print_card.delay("p-3").get() == "card of p-3"
"""
    script = tmp_path / "readme.py"
    script.write_text("\n".join([*_blocks("python"), exactly]))
    run = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["landed", "a card for p-1", "printed p-3"]
    with sqlite3.connect(tmp_path / "cards.db") as connection:
        assert connection.execute("SELECT payment_id FROM card").fetchall() == [("p-2",)]


def test_the_two_commands_are_one_line_each() -> None:
    """Two commands do everything on a machine with only Python, and CI runs the second as it is printed."""
    demo, tests = _blocks("bash")
    assert demo.strip().endswith("idempotent-bus demo")
    assert tests.strip().endswith("pytest")
    assert len(demo.splitlines()) == len(tests.splitlines()) == 1


def test_the_example_runs() -> None:
    """The example in one file shows what it says: three cards for three payments that were sent three times."""
    example = README.parent / "examples" / "membership_card" / "one_file.py"
    run = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert "cards: ['p-1', 'p-2', 'p-3']" in run.stdout
    assert "'completed': 3" in run.stdout
    assert "'dead': 1" in run.stdout
