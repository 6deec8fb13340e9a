"""Canvases of guarded tasks give what plain Celery's give: chain, group, chord, map, starmap, chunks, three deep in
each other, with link and link_error, on both brokers, with Redis as the result backend; undisturbed and killed.

The oracle is plain Celery, undisturbed, in the same test: `celery_canvas_app.py` as a worker of its own, with the same
canvases. Compared are each canvas's result, and the traces that links and errbacks have left.

Long form, ten rounds of kills with a report (tests/integration/reports/celery_canvas.md):

    IDEMPOTENT_BUS_LONG=1 .venv/bin/pytest -n 0 -s tests/integration/test_celery_canvas.py
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection
from redis import Redis

import servers
from idempotent_bus.delays import return_queue

LONG = bool(os.environ.get("IDEMPOTENT_BUS_LONG"))
ROUNDS = 10 if LONG else 1
FOLDER = Path(__file__).parent


class Run:
    """One worker, and one process that sends all canvases and waits for what they give."""

    def __init__(self, name: str, kind: str, broker: str, **environment: object) -> None:
        self.name = name
        self.redis = Redis.from_url(servers.real_redis(), decode_responses=True)
        self.environment = {
            **os.environ,
            "CANVAS_NAME": name,
            "CANVAS_KIND": kind,
            "CANVAS_BROKER": {"redis": servers.real_redis, "rabbitmq": servers.rabbitmq}[broker](),
            "CANVAS_REDIS": servers.REDIS,
            **{f"CANVAS_{name.upper()}": str(value) for name, value in environment.items()},
        }
        self.broker = broker
        self.kills = 0
        self.worker = self._worker()

    def _worker(self) -> subprocess.Popen[bytes]:
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "CRITICAL")
        command = [sys.executable, "-m", "celery", "-A", "celery_canvas_app", "worker", "-c", "3", *quiet]
        return subprocess.Popen(
            [*command, "-n", f"{self.name}-{time.monotonic_ns()}@localhost"],
            cwd=FOLDER,
            env=self.environment,
            start_new_session=True,  # so that its children die with it
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def send(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", "import celery_canvas_app; celery_canvas_app.main()"],
            cwd=FOLDER,
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    def kill_child(self) -> None:
        """The child that has begun a task last, whatever it does now."""
        busy = self.redis.getdel(f"{self.name}:busy")
        if busy is not None:
            with suppress(ProcessLookupError):
                os.kill(int(busy), signal.SIGKILL)
                self.kills += 1

    def kill_parent(self) -> None:
        """The whole worker; another one starts."""
        os.killpg(self.worker.pid, signal.SIGKILL)
        self.worker.wait()
        self.kills += 3  # each of its three children may have been between an effect and its completion
        self.worker = self._worker()

    def given(self, sender: subprocess.Popen[str]) -> dict[str, Any]:
        said, _ = sender.communicate(timeout=200)
        assert sender.returncode == 0, said
        given: dict[str, Any] = json.loads(said)
        return given

    def notes(self, expected: int) -> Counter[str]:
        """What links and errbacks have left, once there are so many and no more come."""
        give_up = time.monotonic() + 20
        while time.monotonic() < give_up and self.redis.llen(f"{self.name}:notes") < expected:
            time.sleep(0.05)
        before = -1
        while (now := self.redis.llen(f"{self.name}:notes")) != before:
            before = now
            time.sleep(1.0)
        return Counter(self.redis.lrange(f"{self.name}:notes", 0, -1))

    @property
    def deaths(self) -> int:
        return int(self.redis.get(f"{self.name}:deaths") or 0)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.worker.pid, signal.SIGKILL)
        self.worker.wait()
        raw = Redis.from_url(servers.REDIS)  # the store's keys are no text
        for key in raw.scan_iter(f"*{self.name}*", count=1000):
            raw.delete(key)
        if self.broker == "rabbitmq":
            with Connection(servers.RABBITMQ) as connection:
                channel = connection.default_channel
                for queue in (self.name, return_queue(self.name).name):
                    channel.queue_delete(queue)
                for scope in ("add", "mul", "total", "twice", "boom", "note", "errback"):
                    channel.queue_delete(f"{self.name}.{scope}.dead")


@pytest.fixture(params=["redis", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    {"redis": servers.real_redis, "rabbitmq": servers.rabbitmq}[name]()
    return name


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    made: list[Run] = []
    yield made
    for run in made:
        run.close()


def test_canvases_give_what_plain_celery_gives(unique: str, broker: str, runs: list[Run]) -> None:
    """Nothing is killed: the same results, and every link and errback as often as in plain Celery."""
    plain, guarded = Run(f"{unique}p", "plain", broker), Run(f"{unique}g", "guarded", broker)
    runs += [plain, guarded]
    senders = [run.send() for run in runs]
    oracle, ours = (run.given(sender) for run, sender in zip(runs, senders, strict=True))
    assert ours == oracle
    left = plain.notes(1)
    assert guarded.notes(left.total()) == left


@pytest.mark.timeout(1800 if LONG else 300)
def test_canvases_are_killed(unique: str, broker: str, runs: list[Run]) -> None:
    """I1, I2: every fourth child dies when its task has succeeded, others and the parent at random moments; the results
    are still those of plain Celery undisturbed, no link and no errback is missing, and none is there once more than
    executions were killed."""
    plain = Run(f"{unique}p", "plain", broker)
    runs.append(plain)
    calm = plain.send()
    oracle: dict[str, Any] = {}
    for number in range(ROUNDS):
        draw = random.Random(f"{broker}{number}")
        run = Run(f"{unique}k{number}", "guarded", broker, deaths=4)
        runs.append(run)
        sender = run.send()
        parents, give_up = 0, time.monotonic() + 40
        while sender.poll() is None and time.monotonic() < give_up and run.kills < 8:
            time.sleep(draw.uniform(0.1, 0.6))
            run.kill_child()
            if run.kills >= 2 and not parents:
                parents += 1
                run.kill_parent()
        if not oracle:  # beside the first round
            oracle = plain.given(calm)
            left = plain.notes(1)
        ours = run.given(sender)
        notes = run.notes(left.total())
        doubles = notes - left
        print(
            f"{broker}, round {number + 1} of {ROUNDS}: {run.deaths} deaths after success, {run.kills} kills, "
            f"{len(ours)} canvases, {sum(ours[one] != oracle[one] for one in oracle)} other than plain's, "
            f"{doubles.total()} links twice, {(left - notes).total()} missing",
            flush=True,
        )
        assert ours == oracle
        assert not left - notes, "a link or an errback is missing"
        assert doubles.total() <= run.kills
        assert run.deaths, "nobody died"
        assert parents, "no parent was killed: the canvases were done too soon"
        run.close()


@pytest.mark.parametrize("kind", ["plain", "guarded"])
def test_a_link_after_a_death(unique: str, broker: str, runs: list[Run], kind: str) -> None:
    """I2: a child dies when its task's links are sent and its result is not stored: the links come again. Each runs
    once; the control: in plain Celery twice."""
    run = Run(unique, kind, broker, deaths=1, when="before", only="link,two links")
    runs.append(run)
    assert run.given(run.send()) == {"link": 3, "two links": 4}
    times = 1 if kind == "guarded" else 2
    assert run.notes(3 * times) == {"link: 3": times, "one: 4": times, "two: 4": times}
    assert run.deaths == 2


@pytest.mark.parametrize("kind", ["plain", "guarded"])
def test_a_chord_after_a_death(unique: str, broker: str, runs: list[Run], kind: str) -> None:
    """I1: a child dies when its task's result is stored and its chord has not counted it. The chord is finished; the
    control: Celery takes the task for done, and its chord waits for ever."""
    run = Run(unique, kind, broker, deaths=1, when="after", only="chord", patience=40 if kind == "guarded" else 6)
    runs.append(run)
    assert run.given(run.send()) == {"chord": 12 if kind == "guarded" else "raises TimeoutError"}
    assert run.deaths == 3
