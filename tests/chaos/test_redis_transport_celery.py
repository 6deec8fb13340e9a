"""W5: real Celery workers, killed with SIGKILL while tasks flow, over kombu's Redis transport and over ours.

Short form: 2,000 tasks, 6 kills. Long form (IDEMPOTENT_BUS_LONG=1): 20,000 tasks, 50 kills.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

from redis_transport_rig import PrivateServer, one_server, server, until

__all__ = ["one_server", "server"]

LONG = bool(os.environ.get("IDEMPOTENT_BUS_LONG"))
TASKS, KILLS = (20_000, 50) if LONG else (2_000, 6)
QUIET = 12.0  # four visibility timeouts without any progress: what is not done now never will be


class Run:
    """Two workers, one of which is killed and replaced each time that another part of the tasks is done."""

    def __init__(self, server: PrivateServer, kind: str, name: str, *, pool: str = "prefork", workers: int = 2) -> None:
        self.pool = pool
        self.client, self.name, self.kind = server.client, name, kind
        self.environment = {
            **os.environ,
            "REDIS_TRANSPORT_QUEUE": name,
            "REDIS_TRANSPORT_PORT": str(server.port),
            "REDIS_TRANSPORT_BROKER": server.url(kind),
        }
        self.workers = [self._worker(number) for number in range(workers)]

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "celery", "-A", "redis_transport_app", *arguments]

    def _worker(self, number: int) -> subprocess.Popen[bytes]:
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "ERROR")
        return subprocess.Popen(
            self._command(
                "worker", "-c", "2", "-P", self.pool, "-n", f"{self.kind}-{number}-{time.monotonic_ns()}", *quiet
            ),
            cwd=Path(__file__).parent,
            env=self.environment,
            start_new_session=True,  # so that its children die with it
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def send(self) -> None:
        """Publish all tasks, by a process of its own."""
        code = f"from redis_transport_app import work\nfor n in range({TASKS}): work.delay(n)"
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=self.environment, check=True)

    @property
    def done(self) -> int:
        return int(self.client.scard(f"done:{self.name}"))

    def kill(self, at: int) -> None:
        worker = self.workers[at]
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
        self.workers[at] = self._worker(at)

    def run(self) -> int:
        """How many tasks were lost."""
        sender = threading.Thread(target=self.send)
        sender.start()
        kills, changed, before = 0, time.monotonic(), -1
        while (done := self.done) < TASKS and time.monotonic() - changed < QUIET:
            if done != before:
                before, changed = done, time.monotonic()
            if kills < KILLS and done >= (kills + 1) * TASKS // (KILLS + 1):
                self.kill(kills % 2)
                kills += 1
                if LONG:
                    print(f"{self.kind}: {kills} kills, {done} of {TASKS} done", flush=True)
                time.sleep(0.3)
            time.sleep(0.01)
        sender.join()
        assert kills == KILLS, f"only {kills} kills: the tasks were done too soon, or nothing moved"
        return TASKS - self.done

    def close(self) -> None:
        for worker in self.workers:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


def lost(server: PrivateServer, kind: str, name: str) -> int:
    run = Run(server, kind, name)
    try:
        missing = run.run()
        runs = int(server.client.get(f"runs:{name}") or 0)
        print(f"{kind}: {TASKS} tasks, {KILLS} kills, {missing} lost, {runs - (TASKS - missing)} run again", flush=True)
        return missing
    finally:
        run.close()


@pytest.mark.slow
@pytest.mark.timeout(3000 if LONG else 300)
def test_w5_kills_lose_no_task(server: PrivateServer, unique: str) -> None:
    """I1: workers killed again and again while tasks flow: every task is done. kombu's transport loses some."""
    assert lost(server, "ours", f"{unique}-ours") == 0
    # The control: a kill hits kombu's window about every second to third time; a short run may be lucky.
    assert any(lost(server, "plain", f"{unique}-plain-{attempt}") for attempt in range(4))


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["prefork", "solo", "threads"])
def test_cut_connections_stop_no_worker(server: PrivateServer, unique: str, pool: str) -> None:
    """I1/I13: all connections of a worker and of the sender are cut three times while tasks flow; every task is done,
    and nothing stays held. In Celery's event loop, with each pool."""
    run = Run(server, "ours", unique, pool=pool, workers=1)
    try:
        until(lambda: server.client.sismember(f"_kombu.binding.{unique}", f"{unique}\x06\x16\x06\x16{unique}"), 30)
        code = (
            "import time\nfrom redis_transport_app import work\n"
            "for n in range(600): work.apply_async((n,), retry=True), time.sleep(0.004)"
        )
        sender = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, env=run.environment)
        for done in (100, 250, 400):
            until(lambda done=done: run.done >= done, 30)
            server.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert sender.wait(60) == 0
        until(lambda: run.done == 600, 30, "the last task")
        run.workers[0].terminate()
        assert run.workers[0].wait(30) == 0
        assert server.held() == 0
    finally:
        run.close()
