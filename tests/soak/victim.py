"""One life of a producer, a relay or a consumer, which may end by SIGKILL at a named step. A fork of the zygote.

settings["plan"]: {"step", "side", "nth"}: die before or after the n-th time of that step; {"step", "stop"}: SIGSTOP
itself there, once. None: it lives until it is told to stop by SIGTERM.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pymysql
import sqlalchemy as sa
from kombu import Connection, Exchange, Queue
from kombu.transport import pyamqp
from sqlalchemy.dialects import mysql, postgresql, sqlite

from idempotent_bus import (
    Backoff,
    IdempotentConsumer,
    IdempotentProducer,
    Inbox,
    InDoubt,
    Outbox,
    Permanent,
    PublishError,
    Relay,
    current_execution,
    hooks,
    idempotent_consumer,
    open_store,
    transactional_consumer,
    transports,
)
from idempotent_bus.abandoned import AbandonedRecord
from idempotent_bus.executor import Executor
from idempotent_bus.model import Completed, Completion
from idempotent_bus.msgid import new_inner_msg_id
from idempotent_bus.stores import redis as redis_store
from idempotent_bus.stores import sql as sql_store
from idempotent_bus.transports import redis as redis_transport
from idempotent_bus.transports.sql import transport as sql_transport

from .controls import AcksEarly, DedupeOff, TokenCheckOff
from .history import History
from .messages import bodies, outbox_fed, queue_of

__all__ = ["EFFECTS", "effects_file", "live", "open_database"]

#: Imported here so that no life has to.
_LOADED = (psycopg, pymysql, pyamqp, mysql, postgresql, sqlite, redis_store, sql_store, redis_transport, sql_transport)

#: No unique constraint: a double must show.
EFFECTS = "(biz VARCHAR(40), run VARCHAR(16), life INTEGER)"

transports.register()


def effects_file(folder: str | Path) -> sqlite3.Connection:
    """Where the effects of the mode `store` are: another system, as far as the library is concerned."""
    connection = sqlite3.connect(f"{folder}/effects.db", timeout=60, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL").close()
    connection.execute("PRAGMA synchronous=OFF").close()
    return connection


def open_database(url: str) -> sa.Engine:
    """The business's own database, with timeouts that a business would have."""
    if url.startswith("sqlite"):
        return sa.create_engine(url, connect_args={"timeout": 30})
    times = {"connect_timeout": 5}
    if url.startswith("mysql"):
        times |= {"read_timeout": 10, "write_timeout": 10}
    return sa.create_engine(url, connect_args=times)


class Steps:
    """The hook: writes down what the steps did, and dies where the plan says."""

    def __init__(self, plan: dict[str, Any] | None, life: int, write: Callable[..., None]) -> None:
        self._plan = plan or {}
        self._left = self._plan.get("nth", 1)
        self._life = life
        self._write = write
        self._under_way: dict[tuple[int, int], Any] = {}

    def __call__(self, name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        here = self._plan.get("step") == name
        if here:
            self._left -= 1
            if self._left <= 0 and self._plan.get("side") == "before":
                self._die()
        if name == hooks.ACK:
            self._write("acking", _record_of(function), self._life)
        asked = time.monotonic()
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            if name == hooks.COMPLETE:
                hold = args[0].hold if isinstance(args[0], Completion) else args[0]
                self._write("unclear", hold.key.hex(), hold.token, f"{asked:.3f}", type(error).__name__, self._life)
            raise
        self._note(name, function, args, result)
        # A claim that found nothing is no kill worth counting.
        if here and self._left <= 0 and (name != hooks.READ or len(result)):
            if "stop" in self._plan:
                self._plan = {}
                self._write("stopping", self._life)
                os.kill(os.getpid(), signal.SIGSTOP)
            elif self._plan.get("side") == "after":
                self._die()
        return result

    def _die(self) -> None:
        self._write("die", self._life, self._plan["step"], self._plan["side"])
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # it may take a moment, in which nothing more must be done

    def _note(self, name: str, function: Any, args: Any, result: Any) -> None:
        write, life = self._write, self._life
        if name == hooks.COMPLETE:
            if isinstance(args[0], Completion):
                hold = args[0].hold
                self._under_way[threading.get_ident(), result] = hold
                write("begun", hold.key.hex(), hold.token, life)
            else:
                write("completed" if result else "refused", args[0].key.hex(), args[0].token, life)
        elif name == hooks.DURABLE:
            for one in result:
                hold = self._under_way.pop((threading.get_ident(), one.ticket), None)
                if hold is not None and one.durable is not None:
                    write("completed" if one.durable else "refused", hold.key.hex(), hold.token, life)
        elif name in (hooks.CLAIM, hooks.CLAIMED):
            outcomes, requests = (result, args[0]) if isinstance(result, list) else ([result], args[:1])
            if any(type(outcome) is Completed for outcome in outcomes):
                for request, outcome in zip(requests, outcomes, strict=True):
                    if type(outcome) is Completed:
                        write("replayed", request.key.hex(), life)
        elif name == hooks.DEAD_LETTER and result:
            write("dead", _record_of(function), life)


def _record_of(settles: Any) -> str:
    """The key of the message that this method of a settlement answers for."""
    settle = settles.__self__
    record: bytes = getattr(settle, "_settle", settle).record
    return record.hex()


def live(settings: dict[str, Any]) -> None:
    """One life, to its natural end."""
    logging.disable(logging.CRITICAL)
    write = History(settings["history"]).write
    step = Steps(settings["plan"], settings["life"], write)
    {"consumer": _consume, "relay": _relay, "producer": _produce}[settings["role"]](settings, write, step)


def _queues(settings: dict[str, Any]) -> dict[str, Queue]:
    arguments = {"x-queue-type": "quorum"} if settings["quorum"] else None
    return {
        kind: Queue(name, Exchange(""), routing_key=name, durable=True, queue_arguments=arguments)
        for kind, name in settings["queues"].items()
    }


def _connect(settings: dict[str, Any]) -> Connection:
    return Connection(settings["broker"], transport_options=settings["options"])


# --- the consumer -----------------------------------------------------------------------------------------


def _consume(settings: dict[str, Any], write: Callable[..., None], step: Steps) -> None:
    queues, life, control = _queues(settings), settings["life"], settings["control"]
    policy = {
        "biz_id": "id", "max_attempts": 40, "backoff": Backoff(0.05, 0.3), "busy_delay": 0.2, "step": step,
        "dead_letter": settings["dead"],
    }  # fmt: skip
    handlers: dict[Queue, Any] = {}
    if settings["mode"] == "inbox":
        engine = open_database(settings["database"])
        outside = effects_file(settings["folder"]) if control else None
        outbox = Outbox(engine, table_prefix=settings["prefix"], create=False)
        insert = sa.text(f"INSERT INTO {settings['prefix']}effects VALUES (:biz, :run, :life)")

        @transactional_consumer(Inbox(engine, table_prefix=settings["prefix"]), scope=settings["unique"], **policy)
        def in_transaction(body: Any, message: Any, connection: sa.Connection) -> None:
            def effect(biz_id: str, run: str) -> None:
                if outside is not None:
                    outside.execute("INSERT INTO effects VALUES (?, ?, ?)", (biz_id, run, life)).close()
                else:
                    connection.execute(insert, {"biz": biz_id, "run": run, "life": life})

            _business(settings, body, write, effect, "-")
            if body["kind"] == "chain":
                following = {"id": f"n{body['id']}", "kind": "good", "after": False}
                outbox.add(connection, following, routing_key=settings["queues"]["rerun"], once="next")

        handlers[queues["rerun"]] = in_transaction
    else:
        effects = effects_file(settings["folder"])

        def effect(biz_id: str, run: str) -> None:
            effects.execute("INSERT INTO effects VALUES (?, ?, ?)", (biz_id, run, life)).close()

        def handle(body: Any, message: Any) -> None:
            _business(settings, body, write, effect, current_execution().token)

        def is_done(record: AbandonedRecord) -> bool:
            return bool(effects.execute("SELECT 1 FROM effects WHERE biz = ?", (record.biz_id,)).fetchall())

        store = once(lambda: _store(settings))
        for kind, queue in queues.items():
            on_abandoned: Any = {"probe": is_done}.get(kind, kind)
            scope = f"{settings['unique']}.{kind}"
            made = idempotent_consumer(
                store, scope=scope, lease=settings["lease"], on_abandoned=on_abandoned, **policy
            )(handle)
            if control == "early ack":
                made.executor = AcksEarly(store, made.executor.policy, step=step)
            assert isinstance(made.executor, Executor)
            if settings["waits"]:
                made.executor._streaming = False
            handlers[queue] = made
    consumer = IdempotentConsumer(_connect(settings), handlers, prefetch=8 * len(handlers))
    signal.signal(signal.SIGTERM, lambda *_: consumer.stop())
    consumer.run()


def once(make: Callable[[], Any]) -> Callable[[], Any]:
    """One store for all scopes."""
    made: list[Any] = []

    def get() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return get


def _store(settings: dict[str, Any]) -> Any:
    store = open_store(settings["store"], **settings["store_options"])
    if settings["control"] == "dedupe off":
        return DedupeOff(store)
    if settings["control"] == "token check off":
        return TokenCheckOff(store, Path(settings["folder"]) / "holders")
    return store


def _business(
    settings: dict[str, Any], body: Any, write: Callable[..., None], effect: Callable[[str, str], None], token: Any
) -> None:
    execution, kind, biz_id = current_execution(), body["kind"], body["id"]
    run, first = uuid.uuid4().hex[:12], execution.attempt == 1
    write("attempt", biz_id, execution.idempotency_key, token, run, settings["life"])
    if kind == "never":
        raise Permanent("never")
    if kind == "slow":
        time.sleep(settings["lease"] / 3 + 0.4)
    if kind == "fails" and first:
        raise ValueError("the first time it fails")
    unclear = first and kind in ("doubt", "asked")
    if unclear and not body["after"]:
        raise InDoubt("nobody can tell")
    effect(biz_id, run)
    if settings["pause"]:
        time.sleep(settings["pause"])
    if unclear:
        raise InDoubt("nobody can tell")


# --- the relay, and the producer --------------------------------------------------------------------------


def _relay(settings: dict[str, Any], write: Callable[..., None], step: Steps) -> None:
    relay = Relay(
        open_database(settings["database"]), _connect(settings), table_prefix=settings["prefix"], batch=40,
        declare=list(_queues(settings).values()), lease=2.0, poll_interval=0.1, create=False, step=step,
        max_attempts=1000, confirm_timeout=1.0,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: relay.stop())
    relay.run()


def _produce(settings: dict[str, Any], write: Callable[..., None], step: Steps) -> None:
    """todo: [block, ids or None]: the ids of a block that an earlier life may have sent, in part."""
    engine = open_database(settings["database"])
    outbox = Outbox(engine, table_prefix=settings["prefix"], create=False)
    queues, names = _queues(settings), settings["queues"]
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    with IdempotentProducer(
        _connect(settings), declare=list(queues.values()), biz_id="id", confirm_timeout=1.0, step=step
    ) as producer:
        for block, known in settings["todo"]:
            made = list(bodies(block, plain=bool(settings["control"])))
            routed = [names[queue_of(body["kind"], settings["mode"])] for body in made]
            if not outbox_fed(block):
                ids = known or [new_inner_msg_id() for _ in made]
                if not known:
                    write("intent", block, *ids)
                messages = [
                    (body, {"routing_key": queue, "inner_msg_id": one})
                    for body, queue, one in zip(made, routed, ids, strict=True)
                ]
            for tries in itertools.count():
                if stopping:
                    return
                try:
                    if not outbox_fed(block):
                        producer.publish_many(messages)
                    else:
                        _commit(engine, outbox, made, routed, block)
                    break
                except (PublishError, OSError, sa.exc.SQLAlchemyError) as error:
                    write("again", block, type(error).__name__, settings["life"])
                    time.sleep(min(1.0, 0.05 * 2**tries))
            write("landed", block)


def _commit(engine: sa.Engine, outbox: Outbox, made: list[Any], routed: list[str], block: int) -> None:
    """The block in one transaction; now and then after one that is rolled back, whose messages must never be seen."""
    if block % 6 == 5:
        with contextlib.suppress(_Changed), engine.begin() as connection:
            for body, queue in zip(made, routed, strict=True):
                outbox.add(connection, {**body, "id": f"r{body['id']}"}, routing_key=queue)
            raise _Changed
    with engine.begin() as connection:
        for body, queue in zip(made, routed, strict=True):
            outbox.add(connection, body, routing_key=queue)


class _Changed(Exception):
    """The business has changed its mind."""
