"""Where the real servers are, and what happens where one is missing.

Locally a missing server skips its tests with one clear line; with CI set it fails them. Redis has a stand-in:
fakeredis' TCP server (with Lua), used where no real one answers and CI is not set. SQLite needs nothing.
"""

from __future__ import annotations

import functools
import os
import socket
import threading
from urllib.parse import urlsplit

import pytest

REDIS = os.environ.get("IDEMPOTENT_BUS_TEST_REDIS", "redis://127.0.0.1:6379/9")
RABBITMQ = os.environ.get("IDEMPOTENT_BUS_TEST_RABBITMQ", "amqp://guest:guest@127.0.0.1:5672//")
POSTGRESQL = os.environ.get("IDEMPOTENT_BUS_TEST_POSTGRESQL", "postgresql+psycopg://postgres@127.0.0.1:5432/test")
MARIADB = os.environ.get("IDEMPOTENT_BUS_TEST_MARIADB", "mysql+pymysql://root@127.0.0.1:3306/test")

IN_CI = bool(os.environ.get("CI"))
left_out: set[str] = set()


def _answers(url: str) -> bool:
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 0), timeout=2).close()
    except OSError:
        return False
    return True


def _need(name: str, url: str) -> str:
    if _answers(url):
        return url
    message = f"no {name} at {urlsplit(url).hostname}:{urlsplit(url).port}"
    if IN_CI:
        pytest.fail(f"{message}: in CI every server must be there", pytrace=False)
    left_out.add(name)
    pytest.skip(message)


def rabbitmq() -> str:
    return _need("RabbitMQ", RABBITMQ)


def postgresql() -> str:
    return _need("PostgreSQL", POSTGRESQL)


def mariadb() -> str:
    return _need("MariaDB", MARIADB)


def redis() -> str:
    """A URL that other processes can use too: the real server's, or else that of a stand-in in this process."""
    if _answers(REDIS) or IN_CI:
        return _need("Redis", REDIS)
    left_out.add("Redis (fakeredis stands in)")
    return _fake_redis()


def real_redis() -> str:
    """For what only a real server does: persistence, out of memory, CLIENT PAUSE, our transport's client tracking."""
    return _need("Redis", REDIS)


@functools.cache
def _fake_redis() -> str:
    from fakeredis import TcpFakeServer

    server = TcpFakeServer(("127.0.0.1", 0), server_type="redis", server_version=(7, 0))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"redis://127.0.0.1:{server.server_address[1]}/0"
