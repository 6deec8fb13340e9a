"""A consumer in a process of its own that kills itself at a named step. Arguments: one JSON object, see `main`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from kombu import Connection, Exchange, Queue
from kombu.message import Message

from idempotent_bus import (
    Backoff,
    IdempotentConsumer,
    Inbox,
    Permanent,
    idempotent_consumer,
    transactional_consumer,
)


def main(settings: dict[str, Any]) -> None:
    """mode: store, inbox, or naive (acks before it runs). kill: [step, "before" or "after"], or null."""
    log = os.open(settings["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(*words: str) -> None:
        os.write(log, (" ".join(words) + "\n").encode())  # one system call, so that a kill cannot tear it

    def die() -> None:
        write("killed", *settings["kill"])
        os.kill(os.getpid(), signal.SIGKILL)

    def step(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        here = settings["kill"] and settings["kill"][0] == name
        if here and settings["kill"][1] == "before":
            die()
        result = function(*args, **kwargs)
        if here:
            die()
        return result

    def tried(biz_id: str) -> bool:
        """True at every call for this id but the first, in whichever process."""
        try:
            os.close(os.open(f"{settings['folder']}/tried-{biz_id}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return True
        return False

    def business(biz_id: str) -> None:
        if biz_id.startswith("poison"):
            write("started", biz_id)
            os.kill(os.getpid(), signal.SIGKILL)
        if biz_id.startswith("fails") and not tried(biz_id):
            raise ValueError("the first time it fails")
        if biz_id.startswith("dies"):
            raise Permanent("never")

    queue_arguments = {"x-queue-type": "quorum"} if settings["broker"].startswith("amqp") else None
    queue = Queue(settings["queue"], Exchange(""), durable=True, queue_arguments=queue_arguments)
    options = {
        "scope": settings["scope"], "biz_id": "id", "busy_delay": 0.1, "backoff": Backoff(0.05, 0.1), "step": step,
        "max_attempts": settings.get("max_attempts", 8),
    }  # fmt: skip
    handle: Any
    if settings["mode"] == "inbox":
        engine = sa.create_engine(settings["database"])

        @transactional_consumer(Inbox(engine, table_prefix=settings["scope"] + "_"), **options)
        def handle(body: Any, message: Message, connection: sa.Connection) -> None:
            connection.execute(
                sa.text(f"INSERT INTO {settings['scope']}_cards (card) VALUES (:id)"), {"id": body["id"]}
            )
            business(body["id"])

    else:

        @idempotent_consumer(settings["store"], lease=1.0, **options)
        def handle(body: Any, message: Message) -> None:
            business(body["id"])
            write("effect", body["id"])

    connection = Connection(settings["broker"], transport_options=settings["options"])
    if settings["mode"] == "naive":
        run_naively(connection, queue, step, write)
    else:
        IdempotentConsumer(connection, {queue: handle}, prefetch=20).run(idle_timeout=settings["idle"])
    write("finished")


def run_naively(connection: Connection, queue: Queue, step: Any, write: Any) -> None:
    """The control: acked first, then run."""
    with connection.Consumer(
        [queue], callbacks=[lambda body, m: (m.ack(), step("handler", write, "effect", body["id"]))]
    ):
        for _ in range(1000):
            connection.drain_events(timeout=1)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
