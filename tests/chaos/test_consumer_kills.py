"""SIGKILL at every named step of the lower half, in real processes: nothing lost, doubles only where they must be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import servers
from consumer_rig import Broker, make_broker
from idempotent_bus import IdempotentProducer
from idempotent_bus.headers import DEAD_REASON

VICTIM = Path(__file__).with_name("consumer_victim.py")
TIMES = 5 if os.environ.get("IDEMPOTENT_BUS_LONG") else 1

#: Rare steps first, while there are messages that take them.
STEPS = ("release", "wait", "dead_letter", "claim", "handler", "complete", "ack")
INBOX_STEPS = ("release", "wait", "dead_letter", "claim", "handler", "commit", "ack")
#: The external effect has happened, and its completion has not.
BETWEEN = [["handler", "after"], ["complete", "before"]]


@dataclass
class Scene:
    broker: Broker
    settings: dict[str, Any]

    def publish(self, ids: list[str]) -> None:
        queue = self.broker.queue()
        with IdempotentProducer(self.broker.connect()) as producer:
            producer.publish_many([{"id": biz_id} for biz_id in ids], routing_key=queue.name, declare=[queue])

    def run(self, kill: list[str] | None, idle: float) -> int:
        """One process; its exit code."""
        settings = {**self.settings, "kill": kill, "idle": idle}
        command = [sys.executable, str(VICTIM), json.dumps(settings)]
        return subprocess.run(command, timeout=120, check=False, stderr=subprocess.DEVNULL).returncode

    def log(self) -> list[list[str]]:
        return [line.split() for line in Path(self.settings["log"]).read_text().splitlines()]


COMBINATIONS = ("rabbitmq-quorum+redis", "ours-sqlite+sqlite", "ours-redis+redis")


@pytest.fixture(params=COMBINATIONS)
def scene(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Scene]:
    name, _, store = request.param.partition("+")
    broker = make_broker(name, unique, tmp_path)
    broker.options["visibility_timeout"] = 2
    yield Scene(
        broker,
        {
            "mode": "store", "broker": broker.url, "options": broker.options, "queue": broker.queue().name,
            "scope": unique, "folder": str(tmp_path), "log": str(tmp_path / "log"),
            "store": servers.redis() if store == "redis" else f"sqlite:///{tmp_path}/store.db",
            "database": f"sqlite:///{tmp_path}/cards.db" if store == "sqlite" else servers.postgresql(),
        },
    )  # fmt: skip
    broker.clean_up()


def ids() -> list[str]:
    """Messages of every kind, interleaved: enough for each kill to find one that takes its step."""
    rounds = 12 * TIMES
    return [f"{kind}{number}" for number in range(rounds) for kind in ("fails", "dies", "good", "fine", "well")]


def kills(steps: tuple[str, ...]) -> list[list[str]]:
    return [[step, when] for _ in range(TIMES) for step in steps for when in ("before", "after")]


def test_the_store_mode_survives_a_kill_at_every_step(scene: Scene) -> None:
    """I1, I2: all that was published is done or dead; an effect repeats at most once per kill before its completion."""
    published = ids()
    scene.publish(published)
    for kill in kills(STEPS):
        assert scene.run(kill, idle=4.0) == -9, f"the kill at {kill} never came"
    assert scene.run(None, idle=6.0) == 0
    log = scene.log()
    happened = [line[1:] for line in log if line[0] == "killed"]
    assert happened == kills(STEPS)
    effects = Counter(line[1] for line in log if line[0] == "effect")
    living = [biz_id for biz_id in published if not biz_id.startswith("dies")]
    assert set(effects) == set(living), "an effect is missing"
    doubles = sum(effects.values()) - len(living)
    assert doubles <= sum(kill in BETWEEN for kill in happened), "more doubles than kills between effect and completion"
    dead = scene.broker.take(scene.broker.dead, 10_000, timeout=1.0)
    assert {message.payload["id"] for message in dead} == {biz_id for biz_id in published if biz_id.startswith("dies")}
    assert {message.headers[DEAD_REASON] for message in dead} == {"permanent"}
    assert scene.broker.is_empty(scene.settings["queue"])


def test_the_inbox_is_exact_at_every_step(scene: Scene) -> None:
    """I2, I3: with the effect in the database's own transaction there is one card for each, whatever is killed when."""
    engine, scope = sa.create_engine(scene.settings["database"]), scene.settings["scope"]
    with engine.begin() as connection:
        connection.execute(sa.text(f"CREATE TABLE {scope}_cards (card varchar(50))"))
    scene.settings["mode"] = "inbox"
    published = ids()
    scene.publish(published)
    try:
        for kill in kills(INBOX_STEPS):
            assert scene.run(kill, idle=4.0) == -9, f"the kill at {kill} never came"
        assert scene.run(None, idle=6.0) == 0
        with engine.connect() as connection:
            cards = Counter(connection.execute(sa.text(f"SELECT card FROM {scope}_cards")).scalars())
        assert cards == Counter(biz_id for biz_id in published if not biz_id.startswith("dies"))
        dead = scene.broker.take(scene.broker.dead, 10_000, timeout=1.0)
        assert {message.payload["id"] for message in dead} == {name for name in published if name.startswith("dies")}
        assert scene.broker.is_empty(scene.settings["queue"])
    finally:
        with engine.begin() as connection:
            connection.execute(sa.text(f"DROP TABLE {scope}_cards"))
            if engine.dialect.name == "postgresql":
                connection.execute(sa.text(f"DROP TABLE IF EXISTS {scope}_inbox"))
        engine.dispose()


@pytest.mark.parametrize("mode", ["store", "inbox"])
def test_a_message_that_kills_its_worker_ends_in_the_dead_letter(scene: Scene, mode: str) -> None:
    """I12: a poison message takes at most max_attempts + 1 workers along, and its neighbours are handled."""
    engine, scope = sa.create_engine(scene.settings["database"]), scene.settings["scope"]
    with engine.begin() as connection:
        connection.execute(sa.text(f"CREATE TABLE {scope}_cards (card varchar(50))"))
    scene.settings.update(mode=mode, max_attempts=3)
    scene.publish(["poison", *(f"good{number}" for number in range(6))])
    try:
        for _ in range(8):
            if scene.run(None, idle=4.0) == 0:
                break
        started = [line for line in scene.log() if line[0] == "started"]
        assert len(started) <= 4, started
        (dead,) = scene.broker.take(scene.broker.dead, 2, timeout=1.0)
        assert dead.payload["id"] == "poison"
        assert dead.headers[DEAD_REASON] == "attempts"
        assert scene.broker.is_empty(scene.settings["queue"])
        with engine.connect() as connection:
            cards = Counter(connection.execute(sa.text(f"SELECT card FROM {scope}_cards")).scalars())
        effects = cards if mode == "inbox" else Counter(line[1] for line in scene.log() if line[0] == "effect")
        assert effects == Counter(f"good{number}" for number in range(6))
    finally:
        with engine.begin() as connection:
            connection.execute(sa.text(f"DROP TABLE {scope}_cards"))
            if engine.dialect.name == "postgresql":
                connection.execute(sa.text(f"DROP TABLE IF EXISTS {scope}_inbox"))
        engine.dispose()


@pytest.mark.parametrize("scene", COMBINATIONS[:2], indirect=True)  # our Redis sends its acks a little later
def test_the_control_an_early_ack_loses(scene: Scene) -> None:
    """The control: acked before the handler, a kill in between loses the message for good."""
    scene.settings["mode"] = "naive"
    published = [f"good{number}" for number in range(10)]
    scene.publish(published)
    assert scene.run(["handler", "before"], idle=1.0) == -9
    scene.run(None, idle=1.0)
    effects = {line[1] for line in scene.log() if line[0] == "effect"}
    assert len(effects) < len(published)
