"""One run of the canvas matrix: a worker, and a process that sends all canvases, undisturbed or under kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from kombu import Connection
from redis import Redis

import servers
from idempotent_bus.delays import return_queue

FOLDER = Path(__file__).parent
BROKERS = {"redis": servers.real_redis, "rabbitmq": servers.rabbitmq}


class Run:
    """One worker, and one process that sends all canvases and waits for what they give."""

    def __init__(self, name: str, kind: str, broker: str, **environment: object) -> None:
        self.name = name
        self.redis = Redis.from_url(servers.real_redis(), decode_responses=True)
        self.environment = {
            **os.environ,
            "CANVAS_NAME": name,
            "CANVAS_KIND": kind,
            "CANVAS_BROKER": BROKERS[broker](),
            "CANVAS_REDIS": servers.REDIS,
            **{f"CANVAS_{name.upper()}": str(value) for name, value in environment.items()},
        }
        self.broker = broker
        self.kills = 0
        self.parents = 0
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
        self.parents += 1
        self.kills += 3  # each of its three children may have been between an effect and its completion
        self.worker = self._worker()

    def killed(self, draw: random.Random) -> dict[str, Any]:
        """Send all canvases, kill children at random moments and the parent once; what the canvases gave."""
        sender = self.send()
        give_up = time.monotonic() + 40
        while sender.poll() is None and time.monotonic() < give_up and self.kills < 8:
            time.sleep(draw.uniform(0.1, 0.6))
            self.kill_child()
            if self.kills >= 2 and not self.parents:
                self.kill_parent()
        return self.given(sender)

    def given(self, sender: subprocess.Popen[str]) -> dict[str, Any]:
        said, _ = sender.communicate(timeout=300)
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

    def runs(self) -> dict[str, Counter[str]]:
        """How often which task has begun to run, by the canvas that it belongs to."""
        found: dict[str, Counter[str]] = {}
        for name, number in self.redis.hgetall(f"{self.name}:runs").items():
            canvas, _, task = name.rpartition("/")
            found.setdefault(canvas, Counter())[task] += int(number)
        return found

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
