"""A redis-server of a test's own, to be filled, paused, killed and started again."""

from __future__ import annotations

import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import RedisError

import servers


def free_port() -> int:
    """A port that is free, and so is the one 10,000 above it, where a cluster's nodes talk to each other."""
    while True:
        port = random.randrange(20_000, 30_000)
        try:
            for candidate in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", candidate))
        except OSError:
            continue
        return port


class PrivateRedis:
    """Starts in the constructor; `stop` ends it. The port and the files stay the same over restarts."""

    def __init__(self, directory: Path, *options: str) -> None:
        if shutil.which("redis-server") is None:
            if servers.IN_CI:
                pytest.fail("no redis-server binary: in CI it must be there", pytrace=False)
            servers.left_out.add("redis-server (private)")
            pytest.skip("no redis-server binary")
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.directory = directory
        self.options = options
        self.client = Redis(port=self.port, socket_timeout=10)
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        self.process = subprocess.Popen([*command, "--save", "", *self.options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.client.ping()
            except RedisError:
                assert time.monotonic() < deadline, "the private redis-server did not come up"
                time.sleep(0.02)
            else:
                return

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.resume()
        self.kill()
        self.client.close()
