"""The three schemes: found by kombu through failover and by Celery, with TLS verified, and through Sentinel."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import Connection
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError
from redis_transport_rig import (
    PrivateServer,
    connect,
    consuming,
    declare,
    drain,
    free_port,
    one_server,
    send,
    server,
    take,
    until,
)

import servers
from idempotent_bus.model import Landing
from idempotent_bus.transports.redis import transport as ours

__all__ = ["one_server", "server"]

ID = {"inner-msg-id": "m-1"}


@pytest.mark.parametrize(
    ("scheme", "transport"),
    [
        ("idempotent-redis", ours.Transport),
        ("idempotent-rediss", ours.SecureTransport),
        ("idempotent-sentinel", ours.SentinelTransport),
    ],
)
def test_schemes_are_known_to_kombu_and_celery(scheme: str, transport: Any) -> None:
    """Each name gives our transport, in Celery's broker_url too; the driver type stays redis, which Celery asks for."""
    assert type(Connection(f"{scheme}://h").transport) is transport
    with Celery(broker=f"{scheme}://h").connection() as connection:
        assert type(connection.transport) is transport
        assert connection.transport.driver_type == "redis"


def test_failover_keeps_our_transport(server: PrivateServer, unique: str) -> None:
    """I1: the first address is dead; after kombu's failover the connection is still one of ours."""
    dead = f"idempotent-redis://127.0.0.1:{free_port()}/0"
    with Connection(f"{dead};{server.ours}") as connection:
        connection.ensure_connection(max_retries=3, interval_start=0)
        assert type(connection.transport) is ours.Transport
        assert send(connection, declare(connection, unique), 1, headers=ID) is Landing.LANDED


# --- TLS ------------------------------------------------------------------------------------------------------


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A Redis that speaks TLS only: its port and its certificate."""
    if shutil.which("openssl") is None:
        servers.left_out.add("openssl")
        pytest.skip("no openssl binary to make a certificate")
    key, certificate, port = tmp_path / "key.pem", tmp_path / "cert.pem", free_port()
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    options = ["--port", "0", "--tls-port", str(port), "--tls-cert-file", str(certificate)]
    options += ["--tls-key-file", str(key), "--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no"]
    process = subprocess.Popen(["redis-server", *options, "--save", "", "--dir", str(tmp_path)], stdout=subprocess.PIPE)
    try:
        until(lambda: process.poll() is not None or _answers_tls(port, certificate), 10, "redis-server with TLS")
        if process.poll() is not None:
            servers.left_out.add("Redis with TLS")
            pytest.skip("this redis-server was built without TLS")
        yield port, certificate
    finally:
        process.kill()
        process.wait()


def _answers_tls(port: int, certificate: Path) -> bool:
    with suppress(RedisError), Redis(port=port, ssl=True, ssl_ca_certs=str(certificate)) as client:
        return bool(client.ping())
    return False


def test_tls_is_verified_by_default_and_carries_messages(secure: tuple[int, Path], unique: str) -> None:
    """idempotent-rediss refuses a certificate that it cannot verify (kombu's rediss takes any), and works with one
    that it can, waiting included."""
    port, certificate = secure
    url = f"idempotent-rediss://127.0.0.1:{port}/0"
    with pytest.raises(OperationalError, match="CERTIFICATE_VERIFY_FAILED"), Connection(url) as connection:
        connection.default_channel.client.ping()
    with Connection(f"rediss://127.0.0.1:{port}/0") as plain:
        assert plain.default_channel.client.ping()
    verified = {"ssl_ca_certs": str(certificate), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    with Connection(url, ssl=verified) as connection:
        queue = declare(connection, unique)
        with consuming(connection, queue, prefetch=10) as got:
            drain(connection, 0.3)
            for number in range(30):
                send(connection, queue, number)
            drain(connection, 3, enough=lambda: len(got) == 10)
            for message in got:
                message.ack()
            drain(connection, 3, enough=lambda: len(got) == 20)
            assert [message.payload for message in got] == list(range(20))


# --- Sentinel ---------------------------------------------------------------------------------------------------


class Sentinels:
    """A master, a replica and a sentinel that watches them."""

    def __init__(self, directory: Path) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.master, self.replica, self.sentinel = free_port(), free_port(), free_port()
        self._start(directory, "master", self.master)
        self._start(directory, "replica", self.replica, "--replicaof", f"127.0.0.1 {self.master}")
        lines = [
            f"sentinel monitor mymaster 127.0.0.1 {self.master} 1",
            "sentinel down-after-milliseconds mymaster 500",
            "sentinel failover-timeout mymaster 2000",
        ]
        configuration = directory / "sentinel.conf"
        configuration.write_text("\n".join([f"port {self.sentinel}", f"dir {directory}", *lines]) + "\n")
        command = ["redis-server", str(configuration), "--sentinel"]
        self.processes["sentinel"] = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def wait(self) -> None:
        until(lambda: self._replicas() == 1, 30, "the sentinel's view of the replica")

    def _start(self, directory: Path, name: str, port: int, *options: str) -> None:
        (directory / name).mkdir()
        command = ["redis-server", "--port", str(port), "--dir", str(directory / name), "--save", "", *options]
        self.processes[name] = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def _replicas(self) -> int:
        with suppress(RedisError), Redis(port=self.sentinel) as client:
            return int(client.sentinel_masters()["mymaster"]["num-slaves"])
        return 0

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Sentinels]:
    if shutil.which("redis-server") is None:
        servers.left_out.add("redis-server (private)")
        pytest.skip("no redis-server binary")
    found = Sentinels(tmp_path)
    try:
        found.wait()
        yield found
    finally:
        found.stop()


def test_through_sentinel_messages_go_on_after_a_failover(sentinels: Sentinels, unique: str) -> None:
    """I1: the master is killed; publishing with kombu's retry and consuming go on with the new one. What the dead
    master had replicated is there, and a resend of what had landed is refused there too."""
    dead_sentinel = f"idempotent-sentinel://127.0.0.1:{free_port()}"
    url = f"idempotent-sentinel://127.0.0.1:{sentinels.sentinel};{dead_sentinel}/0"
    options = {"master_name": "mymaster", "visibility_timeout": 1, "socket_timeout": 2}
    with Connection(url, transport_options=options) as connection:
        queue = declare(connection, unique)
        assert send(connection, queue, 1, headers=ID) is Landing.LANDED
        with Redis(port=sentinels.replica) as replica:
            until(lambda: replica.llen(unique) == 1, 30, "the replication")
            sentinels.processes["master"].kill()
            until(lambda: replica.info("replication")["role"] == "master", 60, "the failover")
        policy = {"max_retries": 20, "interval_start": 0.1, "interval_max": 0.5}
        for headers, expected in ((ID, Landing.DUPLICATE), ({"inner-msg-id": "m-2"}, Landing.LANDED)):
            assert send(connection, queue, 2, headers=headers, retry=True, retry_policy=policy) is expected
        bodies = []
        while (message := take(connection.default_channel, unique, 0.3)) is not None:
            bodies.append(message.payload)
            message.ack()
        assert bodies == [1, 2]


def test_a_bare_connection_says_what_is_there(server: PrivateServer) -> None:
    """Connecting costs nothing unusual: a channel opens, pings and closes without leaving a key behind."""
    with connect(server.ours) as connection:
        assert connection.default_channel.client.ping()
    assert server.client.dbsize() == 0
