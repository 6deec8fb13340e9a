"""A worker that is stopped in mid-handler for three leases, and goes on: the fence and the token decide."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from copies_rig import Scene, place

from consumer_rig import make_broker, poll

LEASE = 1.0

pytestmark = pytest.mark.slow  # it waits for three leases


@pytest.fixture(params=["redis", "postgresql"])
def scene(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Scene]:
    broker = make_broker("rabbitmq-quorum", unique, tmp_path)
    with place(request.param) as store:
        made = Scene(broker, store, tmp_path, lease=LEASE, prefetch=1)
        try:
            yield made
        finally:
            made.stop()
            broker.clean_up()


def endings(scene: Scene) -> dict[str, int]:
    """How all deliveries ended, over the processes."""
    total: dict[str, int] = {}
    for line in scene.of("ended"):
        for how, number in json.loads(line[1]).items():
            total[how] = total.get(how, 0) + number
    return total


def stop_in_mid_handler(scene: Scene) -> int:
    """The first worker has begun, and is stopped. Gives its pid."""
    scene.publish(1, slow=0.5)
    scene.start()
    scene.go()
    assert poll(lambda: len(scene.of("started")) == 1, 20)
    pid = scene.processes[0].pid
    os.kill(pid, signal.SIGSTOP)
    return pid


def test_somebody_took_over(scene: Scene) -> None:
    """I2, I6: a fenced resource has one effect, that of the newest token; the old worker's completion is refused.

    The control is in the same run: a resource without a fence has both.
    """
    pid = stop_in_mid_handler(scene)
    stopped = time.monotonic()
    scene.publish(1, slow=0.5)  # another copy: the first is with the stopped worker
    scene.start()
    assert poll(lambda: len(scene.of("effect")) == 1, 20), "nobody took over"
    time.sleep(max(0.0, stopped + 3 * LEASE - time.monotonic()))
    os.kill(pid, signal.SIGCONT)
    assert poll(lambda: len(scene.of("acked")) == 2, 30), "both copies are acked in the end"
    scene.stop()
    first, second = (int(line[1]) for line in scene.of("started"))
    assert second > first
    assert scene.table("taken") == scene.table("fenced") == [second]
    assert scene.of("effect")[-1][:3] == ["effect", str(first), "refused"], "the stopped worker came last"
    assert sorted(scene.table("unfenced")) == [first, second], (
        "the control: without the fence the effect is there twice"
    )
    assert [(line[1], line[-1]) for line in scene.of("complete")][-1] == ("False", f"pid={pid}")
    assert [line[1] for line in scene.of("ack")] == ["COMPLETED", "COMPLETED"]
    assert endings(scene)["LEASE_LOST"] == 1
    assert endings(scene)["COMPLETED"] == 1
    assert scene.broker.is_empty(scene.settings["queue"])


def test_nobody_took_over(scene: Scene) -> None:
    """I6: the same stop, and nobody else: the late completion is accepted, with one effect, and no rerun."""
    pid = stop_in_mid_handler(scene)
    time.sleep(3 * LEASE)
    os.kill(pid, signal.SIGCONT)
    assert poll(lambda: len(scene.of("acked")) == 1, 20)
    scene.stop()
    assert len(scene.of("started")) == 1
    assert scene.table("taken") == scene.table("unfenced") == [int(scene.of("started")[0][1])]
    assert [line[1] for line in scene.of("complete")] == ["True"]
    assert endings(scene) == {"COMPLETED": 1}
    assert scene.broker.is_empty(scene.settings["queue"])
