"""What the tests of the Redis transport share: a server of their own, consumers that can be killed, short helpers."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Consumer, Exchange, Queue
from redis import Redis
from redis.exceptions import RedisError

import servers
from idempotent_bus.transports import register

register()

HERE = Path(__file__).parent
FAST = {"max_retries": 5, "interval_start": 0, "interval_step": 0.01, "interval_max": 0.01}


def until(condition: Callable[[], Any], seconds: float = 10.0, what: str = "it") -> Any:
    """Poll for a condition; its value, or a failure after the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class PrivateServer:
    """A redis-server that a test may flush, fill, pause and stop. Its port stays."""

    def __init__(self, directory: Path, *options: str) -> None:
        if shutil.which("redis-server") is None:
            if servers.IN_CI:
                pytest.fail("no redis-server binary: in CI it must be there", pytrace=False)
            servers.left_out.add("redis-server (private)")
            pytest.skip("no redis-server binary")
        self.port = free_port()
        self.plain = f"redis://127.0.0.1:{self.port}/0"
        self.ours = f"idempotent-{self.plain}"
        self.client = Redis(port=self.port, socket_timeout=10)
        self._command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(directory)]
        self._command += ["--save", "", *options]
        self.start()

    def url(self, kind: str) -> str:
        return self.ours if kind == "ours" else self.plain

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        until(self._answers, 20, "redis-server")

    def _answers(self) -> bool:
        with suppress(RedisError):
            return bool(self.client.ping())
        return False

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        self.signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def held(self) -> int:
        """How many messages our transport holds as unacked, on all queues."""
        return sum(int(self.client.hlen(key)) for key in self.client.scan_iter("*idempotent-bus:held:*"))


def declare(
    connection: Any, name: str, *, exchange: Exchange | None = None, key: str | None = None, **kwargs: Any
) -> Queue:
    """Declare a queue (by default bound to an exchange of its own name) on a connection."""
    queue = Queue(name, exchange or Exchange(name), key or name, **kwargs)
    queue(connection.default_channel).declare()
    return queue


def send(connection: Any, queue: Queue, body: Any, **kwargs: Any) -> Any:
    return connection.Producer().publish(body, exchange=queue.exchange, routing_key=queue.routing_key, **kwargs)


def take(channel: Any, name: str, seconds: float = 0.5) -> Any:
    """One message of a queue by basic_get, or None if none comes within the time."""
    deadline = time.monotonic() + seconds
    while True:
        message = channel.basic_get(name)
        if message is not None or time.monotonic() > deadline:
            return message
        time.sleep(0.02)


@contextmanager
def consuming(connection: Any, queue: Queue, prefetch: int = 1, **kwargs: Any) -> Iterator[list[Any]]:
    """A Consumer that only collects messages; acks are the test's."""
    got: list[Any] = []
    channel = connection.channel()
    consumer = Consumer(channel, [queue], on_message=got.append, prefetch_count=prefetch, **kwargs)
    with consumer:
        yield got
    with suppress(Exception):
        channel.close()


def drain(connection: Any, seconds: float = 0.5, enough: Callable[[], Any] = lambda: False) -> None:
    """Drain events until enough was seen or the time is over."""
    deadline = time.monotonic() + seconds
    while not enough() and (left := deadline - time.monotonic()) > 0:
        with suppress(TimeoutError):
            connection.drain_events(timeout=min(left, 0.2))


class Holder:
    """A process that takes messages of queues and works on them for ever, until it is killed."""

    def __init__(
        self, url: str, *queues: str, prefetch: int = 1, ack: str = "", visibility: float = 1.0, die: str = ""
    ) -> None:
        arguments = [url, ",".join(queues), str(prefetch), ack, str(visibility), die]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "redis_transport_holder.py"), *arguments], stdout=subprocess.PIPE, text=True
        )

    def got(self) -> str:
        """Wait for its next message; its body, or "" if the process has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateServer]:
    server = PrivateServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def server(one_server: PrivateServer) -> PrivateServer:
    """A real Redis for this test alone, empty."""
    one_server.client.flushall()
    return one_server


def connect(url: str, **options: Any) -> Connection:
    return Connection(url, transport_options={"visibility_timeout": 1, "unacked_restore_throttle": 1, **options})
