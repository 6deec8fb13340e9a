"""50 concurrent copies of one message over 8 processes: one effect, all acked, none before it is durable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from copies_rig import Scene, place

from consumer_rig import make_broker, poll

COPIES, PROCESSES = 50, 8
BROKERS = ("rabbitmq-quorum", "ours-redis")

pytestmark = pytest.mark.slow  # eight processes that start on two cores


@pytest.fixture
def scene(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Scene]:
    broker_name, store_name = request.param
    broker = make_broker(broker_name, unique, tmp_path)
    with place(store_name) as store:
        made = Scene(broker, store, tmp_path, lease=1.5)
        try:
            yield made
        finally:
            made.stop()
            broker.clean_up()


def on(*pairs: tuple[str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scene", pairs, indirect=True, ids="-".join)


def run(scene: Scene) -> None:
    """All copies are there, and all processes, before the first one begins."""
    scene.publish(COPIES, slow=1.0)
    scene.start(PROCESSES)
    scene.go()
    assert poll(lambda: len(scene.of("acked")) >= COPIES, 60), f"only {len(scene.of('acked'))} were acked"
    scene.stop()


def acked_too_early(scene: Scene) -> list[str]:
    """What was acked before its completion was durable, as the log's order tells and as the store itself was seen."""
    early, completed = [], False
    for line in scene.log():
        completed = completed or line[:2] == ["complete", "True"]
        if line[0] == "ack" and (line[1] != "COMPLETED" or not completed):
            early.append(" ".join(line))
    return early


@on(*((broker, store) for broker in BROKERS for store in ("redis", "postgresql")))
def test_one_effect_and_every_copy_is_acked_after_it(scene: Scene) -> None:
    """I2, I4: 50 copies at once: the handler runs once, and each copy is acked, after the completion is durable."""
    run(scene)
    assert len(scene.of("started")) == len(scene.of("effect")) == 1
    assert len(scene.table("unfenced")) == 1
    assert len(scene.of("ack")) == len(scene.of("acked")) == COPIES
    assert acked_too_early(scene) == []
    assert len({line[-1] for line in scene.of("claim")}) >= PROCESSES - 1, "the copies did not meet"
    assert sum("Busy" in line[1] for line in scene.of("claim")) >= 10, "the copies did not meet"
    assert scene.broker.is_empty(scene.settings["queue"])
    assert scene.broker.is_empty(scene.broker.dead)


@on((BROKERS[0], "redis"), (BROKERS[1], "redis"))
def test_the_control_without_a_guard_has_many_effects(scene: Scene) -> None:
    """The control: the same copies and processes with kombu alone."""
    scene.settings["mode"] = "plain"
    scene.publish(COPIES, slow=0.1)
    scene.start(PROCESSES)
    scene.go()
    assert poll(lambda: len(scene.of("acked")) >= COPIES, 60)
    assert len(scene.table("unfenced")) == COPIES


@on((BROKERS[0], "redis"))
def test_the_control_acked_before_completed_is_seen(scene: Scene) -> None:
    """The control: a library that acks first and completes then is caught by the order of the log."""
    scene.settings["mode"] = "early"
    run(scene)
    assert len(acked_too_early(scene)) == 1
