"""Workers in processes of their own, for the tests: started with the command, watched through log and health file."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import servers
import worker_app
from consumer_rig import Broker, fill, poll


@dataclass
class Scene:
    """One queue, one log, and the settings of the workers that share them."""

    broker: Broker
    folder: Path
    settings: dict[str, Any]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def health_file(self) -> Path:
        return self.folder / "health.json"

    @property
    def errors(self) -> str:
        return (self.folder / "stderr").read_text()

    def publish(self, ids: list[str]) -> None:
        fill(self.broker, self.broker.queue(), ids)

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """`idempotent-bus worker` in a process group of its own."""
        command = [sys.executable, "-m", "idempotent_bus.cli", "worker", "worker_app:worker"]
        environment = {**os.environ, worker_app.VARIABLE: json.dumps(self.settings)}
        with (self.folder / "stderr").open("ab") as errors:
            process = subprocess.Popen(
                [*command, "--health-file", str(self.health_file), *options],
                cwd=Path(__file__).parent,
                env=environment,
                stderr=errors,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def log(self, word: str) -> list[tuple[str, int]]:
        """The lines that begin with this word: id and process."""
        path = Path(self.settings["log"])
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(line[1], int(line[2])) for line in lines if line[0] == word]

    def health(self) -> dict[str, Any]:
        """What the health file says; empty if there is none."""
        with contextlib.suppress(FileNotFoundError):
            return dict(json.loads(self.health_file.read_text()))
        return {}

    def left(self, number: int) -> list[str]:
        """Take what is in the queue, up to so many; their ids."""
        taken = self.broker.take(self.settings["queue"], number, timeout=3.0)
        return [message.payload["id"] for message in taken]

    def end(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        self.broker.clean_up()


def scene(broker: Broker, folder: Path, *, seconds: float, mode: str = "store", **worker: Any) -> Scene:
    """seconds: how long a handler takes. worker: settings of IdempotentWorker."""
    broker.options.setdefault("visibility_timeout", 2)
    is_sqlite = broker.name == "ours-sqlite"
    return Scene(
        broker,
        folder,
        {
            "mode": mode, "broker": broker.url, "options": broker.options, "queue": broker.queue().name,
            "quorum": broker.name == "rabbitmq-quorum", "scope": broker.unique, "log": str(folder / "log"),
            "store": f"sqlite:///{folder}/store.db" if is_sqlite else servers.redis(),
            "seconds": seconds, "worker": {"threads": 2, "stop_timeout": 10.0, **worker},
        },
    )  # fmt: skip


@contextlib.contextmanager
def ending(made: Scene) -> Iterator[Scene]:
    """Ends what the test started, whatever happened."""
    try:
        yield made
    finally:
        made.end()


def is_running(pid: int) -> bool:
    """Whether there is such a process that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_begun(made: Scene, number: int, timeout: float = 20.0) -> None:
    assert poll(lambda: len(made.log("begun")) >= number, timeout), made.errors
    time.sleep(0.1)
