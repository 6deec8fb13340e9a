"""A worker for `idempotent-bus worker worker_app:worker`. Its settings are a JSON object in the environment."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import sqlalchemy as sa
from kombu import Connection, Exchange, Queue
from kombu.message import Message

from idempotent_bus import Backoff, IdempotentWorker, Inbox, idempotent_consumer
from idempotent_bus import transactional_consumer as transactional
from idempotent_bus.session import Session

VARIABLE = "IDEMPOTENT_BUS_TEST_WORKER"


def worker() -> IdempotentWorker:
    """mode: store, inbox, or early (a store, and acks before anything is run). seconds: how long a handler takes."""
    settings = json.loads(os.environ[VARIABLE])
    log = os.open(settings["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(word: str, body: Any) -> None:
        os.write(log, f"{word} {body['id']} {os.getpid()}\n".encode())  # one call, so that a kill cannot tear it

    options: dict[str, Any] = {
        "scope": settings["scope"], "biz_id": "id", "backoff": Backoff(0.05, 0.1), "busy_delay": 0.1,
        "max_attempts": 20, **settings.get("policy", {}),
    }  # fmt: skip
    handle: Any
    if settings["mode"] == "inbox":
        inbox = Inbox(sa.create_engine(settings["database"]), table_prefix=settings["scope"] + "_")

        @transactional(inbox, **options)
        def handle(body: Any, message: Message, connection: sa.Connection) -> None:
            write("begun", body)
            connection.execute(
                sa.text(f"INSERT INTO {settings['scope']}_cards (card) VALUES (:id)"), {"id": body["id"]}
            )
            time.sleep(settings["seconds"])
            write("done", body)

    else:

        @idempotent_consumer(settings["store"], **{"lease": 1.0, **options})
        def handle(body: Any, message: Message) -> None:
            write("begun", body)
            time.sleep(settings["seconds"])
            write("done", body)

    if settings["mode"] == "early":
        _ack_early()
    arguments = {"x-queue-type": "quorum"} if settings["quorum"] else None
    queue = Queue(settings["queue"], Exchange(""), durable=True, queue_arguments=arguments)
    connection = Connection(settings["broker"], transport_options=settings["options"])
    return IdempotentWorker(connection, {queue: handle}, **settings.get("worker", {}))


def _ack_early() -> None:
    real = Session.work

    class Settled:
        def ack(self) -> None: ...

        def wait(self, delay: float) -> None: ...

        def dead_letter(self, *args: Any) -> bool:
            return True

    def work(self: Any, entry: Any) -> Any:
        made = real(self, entry)
        if made is not None:
            made.settle.ack()
            made.settle = Settled()
        return made

    Session.work = work  # type: ignore[method-assign]
