"""A handler that publishes a receipt, in a process that kills itself after that. Arguments: one JSON object."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from kombu import Connection, Exchange, Queue
from kombu.message import Message

from idempotent_bus import (
    IdempotentConsumer,
    IdempotentProducer,
    Inbox,
    idempotent_consumer,
    transactional_consumer,
)


def main(settings: dict[str, Any]) -> None:
    """once: the name to publish under, or null. deaths: how many runs die between the publish and the completion."""
    folder = Path(settings["folder"])
    connection = Connection(settings["broker"], transport_options=settings["options"])
    incoming, receipts = (Queue(settings[name], Exchange(""), durable=True) for name in ("queue", "receipts"))
    producer = IdempotentProducer(connection)

    def business(body: Any) -> None:
        options = {"once": settings["once"]} if settings["once"] else {}
        receipt = producer.publish({"id": body["id"]}, routing_key=receipts.name, declare=[receipts], **options)
        with (folder / "landings").open("a") as file:
            file.write(f"{receipt.landing.value}\n")
        if len((folder / "landings").read_text().split()) <= settings["deaths"]:
            os.kill(os.getpid(), signal.SIGKILL)

    handle: Any
    if settings["inbox"]:

        @transactional_consumer(Inbox(sa.create_engine(settings["store"])), scope="charge", biz_id="id", busy_delay=0.1)
        def handle(body: Any, message: Message, connection: Any) -> None:
            business(body)

    else:

        @idempotent_consumer(settings["store"], scope="charge", biz_id="id", lease=1.0, busy_delay=0.1)
        def handle(body: Any, message: Message) -> None:
            business(body)

    IdempotentConsumer(connection, {incoming: handle}).run(idle_timeout=settings["idle"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
