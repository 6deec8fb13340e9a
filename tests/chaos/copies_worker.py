"""A consumer in a process of its own that writes all that it does into one log. Arguments: one JSON object.

mode: "guarded", "plain" (no guard at all), "early" (guarded, but acks before it completes). The log is a file that all
processes append to, a line in one system call: what is further up happened earlier, whichever process it was.

Every message has the id of its record as `id`; "slow" in the body is how many seconds its handler takes. The effect
goes to a resource of two tables (`resource`, SQLite): `unfenced` takes every write, `taken` only those that `fenced`
lets through, which refuses a token that is smaller than the largest it has seen.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kombu import Connection, Exchange, Queue
from kombu.message import Message

from idempotent_bus import Backoff, IdempotentConsumer, current_execution, idempotent_consumer, open_store
from idempotent_bus.hooks import ACK, CLAIM, COMPLETE, HANDLER
from idempotent_bus.identity import record_key


def main(settings: dict[str, Any]) -> None:
    log = os.open(settings["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    watch: Any = open_store(settings["store"], **settings["store_options"])

    def write(*words: Any) -> None:
        os.write(log, f"{' '.join(map(str, words))} pid={os.getpid()}\n".encode())

    def step(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if name == ACK:  # asked of the store over another connection than the worker's own
            record = watch.lookup(record_key(settings["scope"], settings["id"]))
            write("ack", record.state.name)
        if name == HANDLER:
            write("handler")
        result = function(*args, **kwargs)
        if name == COMPLETE:
            write("complete", result)
        if name == CLAIM:
            write("claim", ",".join(type(one).__name__ for one in (result if isinstance(result, list) else [result])))
        if name == ACK:
            write("acked")
        return result

    def handle(body: Any, message: Message) -> str:
        token = current_execution().token if settings["mode"] != "plain" else 0
        write("started", token)
        end = time.monotonic() + body.get("slow", 0.0)
        while time.monotonic() < end:
            time.sleep(0.02)
        stored = effect(settings["resource"], token)
        write("effect", token, *stored)
        return f"done with {token}"

    queue_arguments = {"x-queue-type": "quorum"} if settings["broker"].startswith("amqp") else None
    queue = Queue(settings["queue"], Exchange(""), durable=True, queue_arguments=queue_arguments)
    connection = Connection(settings["broker"], transport_options=settings["options"])
    write("ready")
    while not Path(settings["go"]).exists():
        time.sleep(0.01)
    if settings["mode"] == "plain":
        return run_plainly(connection, queue, handle, write, settings)
    if settings["mode"] == "early":
        ack_early()
    guarded = idempotent_consumer(
        lambda: open_store(settings["store"], **settings["store_options"]), scope=settings["scope"], biz_id="id",
        lease=settings["lease"], busy_delay=0.1, backoff=Backoff(0.05, 0.1), step=step,
    )(handle)  # fmt: skip
    consumer = IdempotentConsumer(connection, {queue: guarded}, prefetch=settings["prefetch"])
    signal.signal(signal.SIGTERM, lambda *_: consumer.stop())
    consumer.run()
    write("ended", json.dumps({how.name: number for how, number in consumer.endings.items()}, separators=(",", ":")))
    return None


def effect(resource: str, token: int) -> list[str]:
    """Write to both tables; says where it was taken."""
    with sqlite3.connect(resource, timeout=30, isolation_level=None) as tables:
        tables.execute("CREATE TABLE IF NOT EXISTS unfenced (token INTEGER)")
        tables.execute("CREATE TABLE IF NOT EXISTS fenced (one INTEGER PRIMARY KEY CHECK (one = 1), token INTEGER)")
        tables.execute("CREATE TABLE IF NOT EXISTS taken (token INTEGER)")
        tables.execute("BEGIN IMMEDIATE")
        tables.execute("INSERT INTO unfenced VALUES (?)", (token,))
        won = tables.execute(
            "INSERT INTO fenced VALUES (1, ?) ON CONFLICT (one) DO UPDATE SET token = excluded.token "
            "WHERE excluded.token >= token",
            (token,),
        ).rowcount
        if won:
            tables.execute("INSERT INTO taken VALUES (?)", (token,))
        tables.execute("COMMIT")
    return ["taken"] if won else ["refused"]


def ack_early() -> None:
    """The mutant of the table of the lower half, in this process."""
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "integration")]
    import pytest
    from lower_half_mutants import MUTANTS

    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == "acked before completed")
    mutant.apply(pytest.MonkeyPatch())


def run_plainly(connection: Connection, queue: Queue, handle: Any, write: Any, settings: dict[str, Any]) -> None:
    """The control: kombu alone; every copy is run, then acked."""

    def callback(body: Any, message: Message) -> None:
        handle(body, message)
        message.ack()
        write("acked")

    consumer = connection.Consumer([queue], callbacks=[callback])
    consumer.qos(prefetch_count=settings["prefetch"])
    going = [True]
    signal.signal(signal.SIGTERM, lambda *_: going.clear())
    with consumer:
        while going:
            try:
                connection.drain_events(timeout=0.2)
            except TimeoutError:
                continue


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
