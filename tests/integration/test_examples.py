"""The membership card as a small application: it runs, the wrong ways go wrong, and kills change nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from kombu import Connection

import servers
from idempotent_bus.delays import return_queue

EXAMPLE = Path(__file__).parents[2] / "examples" / "membership_card"


def run(script: str, *arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE / script), *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.fixture
def on_servers() -> Iterator[dict[str, str]]:
    """PostgreSQL and RabbitMQ under names of their own, which are removed afterwards."""
    database, broker, name = servers.postgresql(), servers.rabbitmq(), f"shop{uuid.uuid4().hex[:8]}"
    yield {"CHARGES_DATABASE": database, "CARDS_DATABASE": database, "BROKER": broker, "MEMBERSHIP_NAME": name}
    engine = sa.create_engine(database)
    tables = sa.MetaData()
    tables.reflect(engine, only=lambda table, _: table.startswith(name))
    tables.drop_all(engine)
    engine.dispose()
    with Connection(broker) as connection:
        channel = connection.channel()
        for queue in (f"{name}.cards", f"{name}.issue.dead", return_queue(f"{name}.cards").name):
            channel.queue_delete(queue)
        channel.exchange_delete(f"{name}.payments")


def test_the_shop_on_sqlite_alone(tmp_path: Path) -> None:
    """I2, I3: one charge and one card for every payment, whichever of the three processes is killed, on files alone."""
    done = run("run.py", "--payments", "150", "--kills", "5", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kills; 150 charges, 150 cards for 150 payments" in done.stdout


@pytest.mark.slow
def test_the_shop_on_servers(tmp_path: Path, on_servers: dict[str, str]) -> None:
    """I2, I3: the same on PostgreSQL and RabbitMQ."""
    done = run("run.py", "--payments", "300", "--kills", "8", folder=tmp_path, **on_servers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300 charges, 300 cards for 300 payments" in done.stdout


def test_each_service_runs_by_itself(tmp_path: Path) -> None:
    """As a reader tries them: charge twice, relay, issue; the second charge is known to be one."""
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"payment_id": "p-1", "cents": 990}\n' * 2)
    with asked.open() as lines:
        charged = subprocess.run(
            [sys.executable, str(EXAMPLE / "charge_service.py")],
            cwd=tmp_path,
            stdin=lines,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    assert charged.stdout.splitlines() == ["p-1 charged", "p-1 was charged before"]
    for script in ("relay_service.py", "card_service.py"):
        assert run(script, "1", folder=tmp_path).returncode == 0
    engine = sa.create_engine(f"sqlite:///{tmp_path}/cards.db")
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT payment_id FROM membership_card")).fetchall() == [("p-1",)]
    engine.dispose()


def test_the_wrong_ways_go_wrong(tmp_path: Path) -> None:
    """The control: each of the four ways that look right loses a card or issues one too many, and says which."""
    shown = run("wrong_ways.py", folder=tmp_path).stdout.splitlines()
    assert [" ".join(line.split()[:5]).rstrip(":") for line in shown] == [
        "publish-after-commit charges 1, cards 0",
        "publish-before-commit charges 0, cards 1",
        "mark-then-effect charges 1, cards 0",
        "effect-then-mark charges 1, cards 2",
    ]


@pytest.mark.parametrize(
    ("example", "said"),
    [("celery_app.py", "20 clicks, 10 charges, 10 cards\n"), ("celery_django.py", "10 charges = 10 cards\n")],
)
def test_the_celery_apps(example: str, said: str) -> None:
    """I2: one file with tasks, their worker and what calls them, run as a reader does: no card and no charge twice."""
    script = EXAMPLE.parent / example
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == said, done.stderr


def test_the_django_app() -> None:
    """I2, I3: one file with view, relay and consumer, run as a reader runs it: as many cards as charges."""
    example = EXAMPLE.parent / "django_app.py"
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "20 charges = 20 cards\n", done.stderr
