"""What the tests of the SQL transport share: databases to run on, and small kombu programs in other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from kombu import Connection, Exchange, Queue

import servers
from idempotent_bus import transports
from idempotent_bus.headers import INNER_MSG_ID

transports.register()

DIALECTS = ("sqlite", "postgresql", "mariadb")


class Bus:
    """One set of tables in one database, and connections to it."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self.url = url
        self.options = options
        self.programs: list[subprocess.Popen[str]] = []
        self.exchange = Exchange("paid", "direct")
        self.queue = Queue("cards", self.exchange, routing_key="paid")
        self.other = Queue("mails", self.exchange, routing_key="paid")

    def connect(self, **options: Any) -> Connection:
        return Connection(f"idempotent-sqla+{self.url}", transport_options={**self.options, **options})

    def plain(self) -> Connection:
        """kombu's own transport over the same tables."""
        return Connection(f"sqla+{self.url}", transport_options=dict(self.options))

    def publish(self, connection: Connection, body: Any, msg_id: str | None = None, **kwargs: Any) -> Any:
        arguments = {"exchange": self.exchange, "routing_key": "paid", "declare": [self.queue], **kwargs}
        headers = {} if msg_id is None else {INNER_MSG_ID: msg_id}
        return connection.Producer().publish(body, headers=headers, **arguments)

    def tables(self) -> Any:
        from idempotent_bus.transports.sql.database import open_database

        return open_database(self.url, self.options).tables

    def count(self, name: str) -> int:
        """Rows of one of our tables, by its name in `Tables`; for `message` the ready ones."""
        table = getattr(self.tables(), name)
        query = sa.select(sa.func.count()).select_from(table)
        if name == "message":
            query = query.where(table.c.visible == sa.true())
        return int(self.execute(query) or 0)

    def execute(self, query: Any) -> Any:
        from idempotent_bus.transports.sql.database import open_database

        return open_database(self.url, self.options).read(lambda connection: connection.scalar(query))

    def program(self, code: str, **kwargs: Any) -> subprocess.Popen[str]:
        """Python in another process, with `bus` set up like this one."""
        program = subprocess.Popen(
            [sys.executable, "-u", "-c", _PRELUDE.format(here=str(Path(__file__).parent)) + code],
            env={**os.environ, "BUS": json.dumps([self.url, self.options])},
            stdout=subprocess.PIPE,
            text=True,
            **kwargs,
        )
        self.programs.append(program)
        return program


_PRELUDE = """
import json, os, signal, sys, time
sys.path.insert(0, {here!r})
from sql_bus import Bus, deliveries
bus = Bus(*json.loads(os.environ["BUS"]))
"""


def open_bus(dialect: str, unique: str, tmp_path: Path, **options: Any) -> Bus:
    if dialect == "sqlite":
        return Bus(f"sqlite:///{tmp_path}/bus.db", options)
    url = servers.postgresql() if dialect == "postgresql" else servers.mariadb()
    # Plain kombu takes the first table names that a process used, so these tests share kombu's names only on SQLite.
    names = {"queue_tablename": f"{unique}_queue", "message_tablename": f"{unique}_message"}
    return Bus(url, {**names, **options})


def drop(bus: Bus) -> None:
    """End the programs that a failed test left, and remove its tables from a shared server."""
    for program in bus.programs:
        if program.poll() is None:
            program.kill()
            program.wait()
    from idempotent_bus.transports.sql.database import open_database

    if bus.url.startswith("sqlite"):
        return
    database = open_database(bus.url, bus.options)
    names = database.tables
    with database.engine.begin() as connection:
        for table in (names.landed, names.held, names.lease, names.dead, names.message, names.queue):
            connection.execute(sa.text(f"DROP TABLE IF EXISTS {table.name}"))
    database.dispose()


def lines(*programs: subprocess.Popen[str], timeout: float = 150) -> list[str]:
    """What these programs printed, in order of the programs; each must end well."""
    printed = []
    for program in programs:
        out, _ = program.communicate(timeout=timeout)
        assert program.returncode == 0, out
        printed += out.split("\n")[:-1]
    return printed


def eventually(condition: Callable[[], Any], timeout: float = 15.0) -> Any:
    """Wait until the condition holds and return its value."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "not within the deadline"
        time.sleep(0.02)


def deliveries(connection: Connection, *queues: Queue, prefetch: int = 0, idle: float = 0.25) -> Iterator[Any]:
    """Messages as they come, until nothing came for `idle` seconds."""
    channel = connection.channel()
    if prefetch:
        channel.basic_qos(0, prefetch, False)
    got: list[Any] = []
    with connection.Consumer(list(queues), channel=channel, on_message=got.append):
        while True:
            try:
                connection.drain_events(timeout=idle)
            except TimeoutError:
                return
            while got:
                yield got.pop(0)
