"""Real applications on the SQL transport: a Celery worker that is killed, and a ConsumerMixin over a restart."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from kombu.mixins import ConsumerMixin

from sql_bus import Bus, eventually, open_bus

APP = """
import idempotent_bus, time
from celery import Celery
app = Celery("app", broker={broker!r})
app.conf.update(task_acks_late=True, broker_transport_options={{"visibility_timeout": 1}}, worker_prefetch_multiplier=4,
                broker_connection_retry_on_startup=True)

@app.task
def note(number):
    with open({done!r}, "a") as file:
        file.write(f"{{number}}\\n")
    time.sleep(0.02)
"""


def test_a_celery_worker_that_is_killed_loses_no_task(tmp_path: Path) -> None:
    """Tasks sent by Celery over SQLite; the worker dies twice by SIGKILL; every task ran, at most two ran again."""
    pytest.importorskip("celery")
    done = tmp_path / "done"
    done.touch()
    broker = f"idempotent-sqla+sqlite:///{tmp_path}/bus.db"
    (tmp_path / "app.py").write_text(APP.format(broker=broker, done=str(done)))
    send = "import app\nfor number in range(120): app.note.delay(number)"
    subprocess.run([sys.executable, "-c", send], cwd=tmp_path, check=True, timeout=60)
    command = [sys.executable, "-m", "celery", "-A", "app", "worker", "-P", "solo", "-l", "WARNING"]

    def ran() -> list[int]:
        return [int(line) for line in done.read_text().split()]

    for at_least in (20, 60, 120):
        worker = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            eventually(lambda least=at_least: len(set(ran())) >= least, timeout=60)
            if at_least == 120:
                time.sleep(0.3)
        finally:
            worker.send_signal(signal.SIGKILL if at_least < 120 else signal.SIGTERM)
            worker.wait(timeout=30)
    assert set(ran()) == {*range(120)}
    assert len(ran()) <= 122
    bus = Bus(f"sqlite:///{tmp_path}/bus.db", {})
    assert bus.count("message") == bus.count("held") == bus.count("dead") == 0


class _Worker(ConsumerMixin):
    def __init__(self, bus: Bus) -> None:
        self.bus, self.connection, self.seen = bus, bus.connect(), []

    def get_consumers(self, consumer: Any, channel: Any) -> list[Any]:
        return [consumer([self.bus.queue], callbacks=[self.handle], prefetch_count=10)]

    def handle(self, body: int, message: Any) -> None:
        self.seen.append(body)
        message.ack()


def test_a_consumer_mixin_survives_a_database_that_is_away(tmp_path: Path, unique: str) -> None:
    """The database fails for a while: the mixin reconnects and handles what came before and after."""
    import sqlite3

    bus = open_bus("sqlite", unique, tmp_path)
    worker = _Worker(bus)
    with bus.connect() as connection:
        bus.publish(connection, 1, "a")
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        eventually(lambda: worker.seen == [1])
        from idempotent_bus.transports.sql.database import open_database

        database = open_database(bus.url, bus.options)
        real, failures = database.change_token, [0]

        def away() -> object:
            failures[0] += 1
            raise sqlite3.OperationalError("disk I/O error")

        database.change_token = away  # type: ignore[method-assign]  # the fault
        eventually(lambda: failures[0] >= 1)
        database.change_token = real  # type: ignore[method-assign]
        with bus.connect() as connection:
            bus.publish(connection, 2, "b")
        eventually(lambda: worker.seen == [1, 2])
    finally:
        worker.should_stop = True
        thread.join(timeout=15)
    assert bus.count("held") == bus.count("message") == 0
