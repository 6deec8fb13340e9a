"""The Celery application of the tests: guarded tasks that note each run in a file, and the same tasks as plain ones.

Made from settings (`celery_rig.py`), in the test's own process to send, and by `celery -A celery_tasks worker`.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from celery import Celery, Task, chain, chord, group
from celery._state import get_current_worker_task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from kombu import Exchange, Queue
from sqlalchemy.orm import sessionmaker

from idempotent_bus import INNER_MSG_ID, InDoubt, Transient, open_store
from idempotent_bus.celery import setup
from idempotent_bus.inbox import Inbox

VARIABLE = "CELERY_TASKS"


def make(settings: dict[str, Any]) -> Celery:
    """An application with tasks as `settings` say; its tasks are also `app.t`."""
    name, guarded = settings["name"], settings["guarded"]
    app = Celery(name, broker=settings["broker"], backend=settings["backend"], set_as_current=False)
    app.conf.update(
        task_default_queue=name,
        task_queues=[Queue(name, Exchange(name), name, queue_arguments=settings["arguments"])],
        task_default_exchange=name,
        task_default_routing_key=name,
        broker_transport_options=settings["options"],
        broker_connection_retry_on_startup=True,
        result_backend_transport_options={"global_keyprefix": f"{name}:"},
        result_expires=600,
        worker_prefetch_multiplier=settings.get("prefetch", 4),
        task_acks_late=not guarded,
        task_reject_on_worker_lost=not guarded,
        task_track_started=True,
        **settings.get("conf", {}),
    )
    if guarded:
        store = functools.partial(open_store, settings["store"], **settings["store_options"])
        app.said = setup(app, store=store, lease=settings["lease"], **settings.get("setup", {}))
    app.t = _tasks(app, settings)
    return app


def _tasks(app: Celery, settings: dict[str, Any]) -> Any:
    log = os.open(settings["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def note(*words: object) -> None:
        os.write(log, (" ".join(str(word) for word in words) + "\n").encode())

    def runs(word: str, pid: str) -> int:
        return Path(settings["log"]).read_text().count(f"{word} {pid}\n")

    def task(**options: Any) -> Any:
        """Declare a task; with a scope if the application is guarded, of Celery's own class if not."""

        def declare(function: Any) -> Any:
            word = function.__name__
            if settings["guarded"]:
                guard = {"scope": f"{settings['name']}.{word}", "biz_id": "pid", **options}
            else:
                guards = ("on_abandoned", "max_attempts", "max_result", "inbox")
                guard = {k: v for k, v in options.items() if k not in guards}
                guard["base"] = Task
            made = app.task(name=f"{settings['name']}.{word}", **guard)(function)
            setattr(tasks, word, made)
            return made

        return declare

    class Tasks:
        """The tasks, by their names."""

    tasks: Any = Tasks()

    @task()
    def add(pid: str, x: int = 0, y: int = 0) -> int:
        note("add", pid)
        return x + y

    @task()
    def slow(pid: str, seconds: float) -> str:
        note("slow", pid)
        time.sleep(seconds if runs("slow", pid) == 1 else 0.1)
        note("slept", pid)
        return pid

    @task()
    def total(numbers: list[int], pid: str) -> int:
        note("total", pid)
        return sum(numbers)

    @task(bind=True, max_retries=9)
    def again(self: Any, pid: str, times: int) -> int:
        note("again", pid)
        if self.request.retries < times:
            raise self.retry(countdown=0.05)
        note("at-last", pid)
        return int(self.request.retries)

    @task(bind=True)
    def quietly(self: Any, pid: str) -> str:
        note("quietly", pid)
        if not self.request.retries:
            self.retry(countdown=0.05, throw=False)
            return "not yet"
        note("quiet-last", pid)
        return "done"

    @task(autoretry_for=(KeyError,), default_retry_delay=0, retry_backoff=False, max_retries=5)
    def auto(pid: str, times: int) -> str:
        note("auto", pid)
        if runs("auto", pid) <= times:
            raise KeyError(pid)
        return "ok"

    @task(bind=True, max_retries=1)
    def gives_up(self: Any, pid: str) -> None:
        note("gives_up", pid)
        try:
            raise ValueError(pid)
        except ValueError as error:
            raise self.retry(exc=error, countdown=0) from error

    @task()
    def fails(pid: str) -> None:
        note("fails", pid)
        raise ValueError("no")

    @task(bind=True)
    def replaced(self: Any, pid: str, kind: str) -> None:
        note("replaced", pid)
        one, two = tasks.add.si(f"{pid}-1", 1, 2), tasks.add.si(f"{pid}-2", 3, 4)
        parts = {
            "task": one,
            "chain": chain(one, two),
            "group": group([one, two], app=app),
            "chord": chord([one, two], tasks.total.s(pid=f"{pid}-sum"), app=app),
        }
        raise self.replace(parts[kind])

    @task(soft_time_limit=1)
    def soft(pid: str, catch: bool) -> str:
        note("soft", pid)
        try:
            time.sleep(20)
        except SoftTimeLimitExceeded:
            if not catch:
                raise
        return "caught"

    @task(time_limit=1)
    def hard(pid: str) -> str:
        note("hard", pid)
        if runs("hard", pid) == 1:
            time.sleep(20)
        return "ended"

    @task(time_limit=1, acks_on_timeout=False)
    def hard_again(pid: str) -> str:
        note("hard_again", pid)
        if runs("hard_again", pid) == 1:
            time.sleep(20)
        return "ended"

    @task()
    def ignored(pid: str) -> None:
        note("ignored", pid)
        raise Ignore

    @task()
    def rejected(pid: str, requeue: bool) -> str:
        note("rejected", pid)
        if runs("rejected", pid) == 1:
            raise Reject("not here", requeue=requeue)
        return "taken"

    def died(word: str, pid: str, times: int) -> str:
        note(word, pid)
        if runs(word, pid) <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return "lived"

    @task(max_attempts=3)
    def dies(pid: str, times: int) -> str:
        return died("dies", pid, times)

    @task(on_abandoned="quarantine")
    def dies_quarantined(pid: str) -> str:
        return died("dies_quarantined", pid, 1)

    def was_done(record: Any) -> bool:
        note("asked", record.biz_id)
        return bool(record.biz_id.endswith("-done"))

    @task(on_abandoned=was_done)
    def dies_probed(pid: str) -> str:
        return died("dies_probed", pid, 1)

    @task()
    def transient(pid: str) -> str:
        note("transient", pid)
        if runs("transient", pid) == 1:
            raise Transient("in a moment", retry_after=0.3)
        return "ok"

    @task()
    def doubtful(pid: str) -> str:
        note("doubtful", pid)
        if runs("doubtful", pid) == 1:
            raise InDoubt("no answer")
        return "ok"

    @task(max_result=1000)
    def big(pid: str) -> str:
        note("big", pid)
        return "x" * 2000

    @task(biz_id=INNER_MSG_ID)
    def caused(pid: str, name: str) -> None:
        note("caused", f"{pid}-{name}")

    @task()
    def mother(pid: str, once: bool) -> str:
        note("mother", pid)
        for name in ("one", "two"):
            tasks.caused.apply_async((pid, name), **({"once": name} if once else {}))
        if runs("mother", pid) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return "sent"

    if "inbox" in settings:
        _inbox_tasks(settings, task, note, runs)
    if "django" in settings:
        _django_task(settings, task, note, runs)

    def plain(word: str, function: Any) -> None:
        setattr(tasks, word, app.task(name=f"{settings['name']}.{word}")(function))

    def double(x: int) -> int:
        return x * 2

    def plain_note(pid: str, *_: Any) -> str:
        note("plain_note", pid)
        return pid

    def told(pid: str) -> None:
        note("told", pid)

    def trace_path() -> list[object]:
        this = get_current_worker_task()
        return [type(this).__call__ is Task.__call__, this.Request, this.Strategy]

    for word, function in (
        ("double", double), ("plain_note", plain_note), ("told", told), ("trace_path", trace_path),
    ):  # fmt: skip
        plain(word, function)
    return tasks


def _inbox_tasks(settings: dict[str, Any], task: Any, note: Any, runs: Any) -> None:
    """Tasks whose effect is a row, in one commit with their record."""
    engine = sa.create_engine(settings["inbox"])
    with engine.begin() as connection:
        connection.execute(sa.text(f"CREATE TABLE IF NOT EXISTS {settings['name']}_rows (pid text)"))
    engine.dispose()  # nothing of it may come through a fork
    row = sa.text(f"INSERT INTO {settings['name']}_rows (pid) VALUES (:pid)")
    prefix = f"{settings['name']}_"

    @task(inbox=Inbox(engine, table_prefix=prefix))
    def pay(pid: str, how: str, connection: Any) -> str:
        connection.execute(row, {"pid": pid})
        note("pay", pid)
        first = runs("pay", pid) == 1
        if how == "raise" and first:
            raise ValueError(pid)
        if how == "die" and first:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "meet" and first:
            connection.execute(sa.text("DO $$ BEGIN RAISE EXCEPTION 'met' USING ERRCODE = '40001'; END $$"))
        return f"paid {pid}"

    @task(bind=True, inbox=Inbox(sessionmaker(engine), table_prefix=prefix))
    def pay_in_session(self: Any, pid: str, times: int, session: Any) -> int:
        session.execute(row, {"pid": pid})
        note("pay_in_session", pid)
        if self.request.retries < times:
            raise self.retry(countdown=0)
        return int(self.request.retries)


def _django_task(settings: dict[str, Any], task: Any, note: Any, runs: Any) -> None:
    """A task whose effect is a row written by Django's ORM, in one commit with its record."""
    alias = settings["django"]
    from django_rig import Card
    from idempotent_bus.django import outbox

    @task(inbox="django" if alias == "default" else f"django:{alias}")
    def issue(pid: str, how: str) -> str:
        Card.objects.using(alias).create(payment_id=pid)
        if settings["guarded"]:  # without the inbox there is no transaction to add it to
            outbox.add({"payment_id": pid}, routing_key="issued", using=alias)
        note("issue", pid)
        if runs("issue", pid) == 1:
            if how == "raise":
                raise ValueError(pid)
            if how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
        return f"issued {pid}"


if VARIABLE in os.environ:
    app = make(json.loads(os.environ[VARIABLE]))
