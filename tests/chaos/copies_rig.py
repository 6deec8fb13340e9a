"""Processes of `copies_worker.py`, and their common log."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import servers
from consumer_rig import Broker, poll
from idempotent_bus import IdempotentProducer

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from stores import drop_tables

WORKER = Path(__file__).with_name("copies_worker.py")


@contextmanager
def place(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A store's URL and options, for a place of its own that is cleaned up."""
    prefix = f"t{uuid.uuid4().hex[:12]}"
    if name == "redis":
        import redis

        url = servers.real_redis()
        yield url, {"prefix": f"{prefix}:"}
        with redis.Redis.from_url(url) as client:
            for key in client.scan_iter(match=f"{prefix}:*", count=1000):
                client.delete(key)
    else:
        url = servers.postgresql()
        yield url, {"table_prefix": f"{prefix}_"}
        drop_tables(url, f"{prefix}_")


class Scene:
    """One queue, one store, one log, one resource, and the processes that work on them."""

    def __init__(self, broker: Broker, store: tuple[str, dict[str, Any]], folder: Path, **more: Any) -> None:
        self.broker = broker
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.settings: dict[str, Any] = {
            "mode": "guarded", "broker": broker.url, "options": broker.options, "queue": broker.queue().name,
            "scope": broker.unique, "id": "one", "store": store[0], "store_options": store[1], "lease": 20.0,
            "prefetch": 7, "log": str(folder / "log"), "go": str(folder / "go"),
            "resource": str(folder / "resource.db"), **more,
        }  # fmt: skip

    def publish(self, copies: int, **body: Any) -> None:
        queue = self.broker.queue()
        with IdempotentProducer(self.broker.connect()) as producer:
            bodies = [{"id": self.settings["id"], **body}] * copies
            producer.publish_many(bodies, routing_key=queue.name, declare=[queue])

    def start(self, number: int = 1) -> None:
        """Start processes; they wait for `go`."""
        before = len(self.of("ready"))
        for _ in range(number):
            command = [sys.executable, str(WORKER), json.dumps(self.settings)]
            self.processes.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        assert poll(lambda: len(self.of("ready")) == before + number, 60), "the processes did not start"

    def go(self) -> None:
        Path(self.settings["go"]).touch()

    def log(self) -> list[list[str]]:
        """The lines: what happened, what was said of it, and in which process."""
        path = Path(self.settings["log"])
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def of(self, *names: str) -> list[list[str]]:
        return [line for line in self.log() if line[0] in names]

    def table(self, name: str) -> list[int]:
        with contextlib.closing(sqlite3.connect(self.settings["resource"], timeout=30)) as tables:
            return [row[0] for row in tables.execute(f"SELECT token FROM {name} ORDER BY rowid")]

    def stop(self) -> None:
        """Ask all to stop, and wait for that."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
