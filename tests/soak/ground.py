"""The servers of a run: its own, started when a cell first needs them, killed and started again at will.

A kill is a SIGKILL (PostgreSQL: an immediate shutdown) of the whole server, and it comes back with what it had written.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from private_redis import PrivateRedis
from redis.exceptions import RedisError

from private_rabbitmq import PrivateRabbitMQ
from private_sql import PrivateMariaDB, PrivatePostgreSQL
from proxy import Proxy

__all__ = ["Ground", "RedisPair", "restart"]

#: Seconds for which a primary goes on without its replica.
_PARTED = 0.3
#: Redis keeps every write before it answers.
_DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


class RedisPair:
    """A primary and a replica, behind one address. `fail_over` promotes the replica, which was cut off for a moment."""

    def __init__(self, directory: Path) -> None:
        folders = [directory / name for name in ("one", "two")]
        for folder in folders:
            folder.mkdir()
        self._primary, self._replica = (
            PrivateRedis(folder, *_DURABLE, "--repl-diskless-sync-delay", "0") for folder in folders
        )
        self._between = Proxy(port=self._primary.port)
        self._follow()
        self.proxy = Proxy(port=self._primary.port)
        self.url = f"redis://127.0.0.1:{self.proxy.port}/0"

    def _follow(self) -> None:
        self._replica.client.replicaof("127.0.0.1", self._between.port)
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(RedisError):
                if self._replica.client.info("replication").get("master_link_status") == "up":
                    return
            if time.monotonic() > deadline:
                raise TimeoutError("the replica does not follow")
            time.sleep(0.02)

    def fail_over(self) -> None:
        """The primary loses its replica, goes on alone for a moment, and is killed: what it answered then is gone."""
        self._between.refuse()
        self._between.cut()
        time.sleep(_PARTED)
        self._primary.kill()
        self._replica.client.replicaof("NO", "ONE")
        self._primary, self._replica = self._replica, self._primary
        self.proxy.forward_to("127.0.0.1", self._primary.port)
        self.proxy.cut()
        self._replica.start()
        self._between.forward_to("127.0.0.1", self._primary.port)
        self._between.accept_again()
        self._follow()

    def stop(self) -> None:
        self.proxy.close()
        self._between.close()
        self._primary.stop()
        self._replica.stop()


class Ground:
    """Gives servers by name. Use as a context manager: at the end all are stopped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers: dict[str, Any] = {}

    def __enter__(self) -> Ground:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.stop()

    def _get(self, name: str, make: Callable[[Path], Any]) -> Any:
        if name not in self._servers:
            folder = self._folder / name
            folder.mkdir()
            self._servers[name] = make(folder)
        return self._servers[name]

    def redis(self, purpose: str) -> PrivateRedis:
        """One for the broker, and another for the store."""
        return self._get(f"redis-{purpose}", lambda folder: PrivateRedis(folder, *_DURABLE))  # type: ignore[no-any-return]

    def redis_pair(self) -> RedisPair:
        return self._get("redis-pair", RedisPair)  # type: ignore[no-any-return]

    def rabbitmq(self) -> PrivateRabbitMQ:
        return self._get("rabbitmq", PrivateRabbitMQ)  # type: ignore[no-any-return]

    def sql(self, kind: str) -> PrivatePostgreSQL | PrivateMariaDB:
        make = PrivatePostgreSQL if kind == "postgresql" else PrivateMariaDB
        return self._get(kind, make)  # type: ignore[no-any-return]


def restart(server: Any) -> None:
    """Kill it, and start it again."""
    server.kill()
    server.start()
