"""Quarantine, from the kill in the middle of the handler to the person's word, from code and from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from click.testing import CliRunner
from kombu import Connection, Queue

from idempotent_bus import (
    ConfigurationError,
    IdempotentConsumer,
    IdempotentProducer,
    idempotent_consumer,
    open_store,
    quarantined,
    record_of,
    resolve,
)
from idempotent_bus.cli import main
from idempotent_bus.work import Ended

VICTIM = """
import os, sys
from kombu import Connection, Queue
from idempotent_bus import IdempotentConsumer, idempotent_consumer

@idempotent_consumer(sys.argv[2], scope=sys.argv[3], biz_id="payment_id", lease=0.5, on_abandoned="quarantine")
def issue(body, message):
    os.kill(os.getpid(), 9)

with Connection(sys.argv[1], transport_options={"visibility_timeout": 1}) as connection:
    IdempotentConsumer(connection, {Queue("cards", routing_key="cards"): issue}).run(idle_timeout=20)
"""


@pytest.fixture
def urls(tmp_path: Path) -> tuple[str, str, str]:
    """A broker, a store and a scope in which one message was abandoned by a real SIGKILL."""
    broker = f"idempotent-sqla+sqlite:///{tmp_path}/broker.db"
    store, scope = f"sqlite:///{tmp_path}/dedup.db", f"cards.{uuid.uuid4().hex[:8]}"
    queue = Queue("cards", routing_key="cards")
    with Connection(broker, transport_options={"visibility_timeout": 1}) as connection:
        with IdempotentProducer(connection, routing_key="cards", declare=[queue]) as producer:
            producer.publish({"payment_id": "p-1"})
        victim = subprocess.run([sys.executable, "-c", VICTIM, broker, store, scope], timeout=60, check=False)
        assert victim.returncode == -9

        @idempotent_consumer(store, scope=scope, biz_id="payment_id", lease=0.5, on_abandoned="quarantine")
        def issue(body: dict[str, str], message: object) -> None:
            pytest.fail("ran although its effect may be there")

        consumer = IdempotentConsumer(connection, {queue: issue})
        for _ in range(20):
            consumer.run(idle_timeout=2)
            if consumer.endings[Ended.DEAD]:
                break
        assert consumer.endings[Ended.DEAD] == 1
    return broker, store, scope


def test_from_the_kill_to_the_persons_word(urls: tuple[str, str, str]) -> None:
    """I2, I12: a SIGKILL in the handler quarantines; listed, resolved and redriven by command, it runs; once."""
    broker, store, scope = urls
    runner = CliRunner()
    listed = runner.invoke(main, ["quarantine", "--store", store, "--json"], catch_exceptions=False)
    shown = json.loads(listed.output)
    assert (shown["scope"], shown["biz_id"], shown["record"]) == (scope, "p-1", record_of(scope, "p-1"))
    assert scope in runner.invoke(main, ["quarantine", "--store", store], env={"COLUMNS": "200"}).output
    early = runner.invoke(main, ["redrive", "--broker", broker, "--store", store, f"{scope}.dead"])
    assert early.exit_code == 0, early.output
    named = ["--scope", scope, "--biz-id", "p-1"]
    assert runner.invoke(main, ["resolve", "--store", store, "--not-done", *named]).exit_code == 0
    assert "not in quarantine" in runner.invoke(main, ["resolve", "--store", store, "--done", *named]).output
    moved = runner.invoke(main, ["redrive", "--broker", broker, "--store", store, f"{scope}.dead"])
    assert moved.exit_code == 0, moved.output
    ran: list[str] = []

    @idempotent_consumer(store, scope=scope, biz_id="payment_id", on_abandoned="quarantine")
    def issue(body: dict[str, str], message: object) -> None:
        ran.append(body["payment_id"])

    with Connection(broker) as connection:
        IdempotentConsumer(connection, {Queue("cards", routing_key="cards"): issue}).run(idle_timeout=1)
    assert ran == ["p-1"]


def test_resolved_as_done_from_code(urls: tuple[str, str, str]) -> None:
    """I8: the person says that the effect is there: a redriven copy is a replay."""
    broker, store, scope = urls
    (found,) = quarantined(store)
    assert (found.biz_id, found.attempts) == ("p-1", 1)
    assert resolve(store, found.record, completed=True)
    assert not resolve(store, found.record, completed=False)
    assert list(quarantined(store)) == []
    keeper = open_store(store)
    record = keeper.lookup(bytes.fromhex(found.record))  # type: ignore[attr-defined]
    keeper.close()
    assert record.state.name == "COMPLETED"
    again = CliRunner().invoke(main, ["redrive", "--broker", broker, "--store", store, f"{scope}.dead"])
    assert again.exit_code == 0
    assert "completed" in again.output


def test_what_cannot_be_resolved_says_why(tmp_path: Path) -> None:
    """Wrong words from a person get a sentence, and change nothing."""
    with pytest.raises(ConfigurationError, match="hexadecimal"):
        resolve("memory://", "p-1", completed=True)
    store = f"sqlite:///{tmp_path}/dedup.db"
    runner = CliRunner()
    for wrong in (["--done"], ["--scope", "s", "--done"], ["--record", "00", "--done"], ["--record", "0" * 32]):
        answer = runner.invoke(main, ["resolve", "--store", store, *wrong])
        assert answer.exit_code == 2, answer.output
    unknown = runner.invoke(main, ["resolve", "--store", store, "--done", "--record", "0" * 32])
    assert unknown.exit_code == 1
    assert "not in quarantine" in unknown.output
    assert runner.invoke(main, ["quarantine", "--store", "nonsense://x"]).exit_code == 2
