"""The Celery application that is killed: charges and cards, a chain, a chord, an autoretry and a beat entry.

Half of its tasks write to PostgreSQL through the inbox, in a table without a unique constraint; the other half have an
effect outside (here a line in Redis), with the dedup store alone. Every effect is followed by a history line of the
execution's end, so that an effect without one was cut off there. Without a guard: the same tasks as Celery's own.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import redis
import sqlalchemy as sa
from celery import Celery
from kombu import Exchange, Queue

from idempotent_bus import INNER_MSG_ID, EventKind, current_execution, open_store
from idempotent_bus.celery import setup
from idempotent_bus.inbox import Inbox

S: dict[str, Any] = json.loads(os.environ["CELERY_CHAOS"])
NAME, GUARDED = S["name"], S["guarded"]
#: Seconds that a task takes, half of them before its effect and half after.
WORK = S["work"]

app = Celery(NAME, broker=S["broker"], backend=S["backend"])
app.conf.update(
    task_default_queue=NAME,
    task_queues=[Queue(NAME, Exchange(NAME), NAME)],
    task_default_exchange=NAME,
    task_default_routing_key=NAME,
    broker_transport_options=S["options"],
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    result_backend_transport_options={"global_keyprefix": f"{NAME}:"},
    result_expires=3600,
    task_track_started=True,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=4,
    beat_schedule={"tick": {"task": f"{NAME}.tick", "schedule": 0.5}},
    beat_schedule_filename=S["schedule"],
    beat_max_loop_interval=0.5,
)
engine = sa.create_engine(S["database"], pool_size=S["threads"], max_overflow=0)
outside = redis.Redis.from_url(S["backend"])
PID = os.getpid


def note(*words: object) -> None:
    outside.rpush(f"{NAME}:history", " ".join(map(str, words)))


class Ends:
    """Notes when an execution of the dedup store has ended: the line that must follow its effect."""

    def on_event(self, event: Any) -> None:
        if event.kind in (EventKind.COMPLETED, EventKind.RELEASED, EventKind.LEASE_LOST):
            note("end", event.record, event.token, PID())


if GUARDED:
    said = setup(
        app,
        store=lambda: open_store(S["backend"], prefix=f"{NAME}:dedup:"),
        lease=S["lease"],
        busy_delay=0.5,
        listener=Ends(),
    )
inbox = Inbox(engine, table_prefix=f"{NAME}_", create=False)


def task(biz_id: Any = "pid", *, inside: bool = False, **options: Any) -> Any:
    """Declare a task. inside: its effect is in the database, in one commit with its record."""

    def declare(function: Any) -> Any:
        guard: dict[str, Any] = {}
        if GUARDED:
            guard = {"scope": f"{NAME}.{function.__name__}", "biz_id": biz_id}
            if inside:
                guard["inbox"] = inbox
        return app.task(name=f"{NAME}.{function.__name__}", **guard, **options)(function)

    return declare


def effect_inside(connection: Any, name: str, pid: str) -> None:
    time.sleep(WORK / 2)
    row = sa.text(f"INSERT INTO {NAME}_effects (task, pid) VALUES (:task, :pid)")
    if connection is not None:
        connection.execute(row, {"task": name, "pid": pid})
    else:
        with engine.begin() as own:
            own.execute(row, {"task": name, "pid": pid})
    time.sleep(WORK / 2)


def effect_outside(name: str, pid: str) -> None:
    time.sleep(WORK / 2)
    if GUARDED:
        execution = current_execution()
        note("effect", name, pid, execution.idempotency_key, execution.token, PID())
    else:
        note("effect", name, pid, "-", 0, PID())
    time.sleep(WORK / 2)


@task(inside=True)
def charge(pid: str, connection: Any = None) -> str:
    effect_inside(connection, "charge", pid)
    return pid


@task()
def card(pid: str) -> str:
    effect_outside("card", pid)
    return f"card {pid}"


@task(inside=True)
def part(pid: str, number: int, connection: Any = None) -> int:
    effect_inside(connection, "part", pid)
    return number


@task()
def bill(numbers: list[int], pid: str) -> int:
    effect_outside("bill", pid)
    return sum(numbers)


@task(inside=True, bind=True, autoretry_for=(ConnectionError,), default_retry_delay=0, retry_backoff=False)
def flaky(self: Any, pid: str, connection: Any = None) -> str:
    if GUARDED or self.request.retries:  # Celery alone has nothing that takes an effect back
        effect_inside(connection, "flaky", pid)
    if not self.request.retries:
        raise ConnectionError(pid)
    return pid


@task(INNER_MSG_ID)
def tick() -> None:
    effect_outside("tick", current_execution().idempotency_key if GUARDED else "-")
