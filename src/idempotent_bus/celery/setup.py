"""`setup`: one line that makes an app's tasks idempotent which name a scope, and its broker safe where it can be."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from celery import Celery, Task
from celery.signals import beat_init
from celery.utils.imports import symbol_by_name

from ..errors import ConfigurationError
from ..msgid import derived_inner_msg_id
from ..transports import register
from .ids import sent_as
from .settings import remember
from .stamping import install
from .task import IdempotentTask, guard_of

__all__ = ["Setup", "setup"]

log = logging.getLogger(__name__)

#: kombu's schemes that have one of ours in their place, which shares its queues both ways.
_OURS: Final = {
    "redis": "idempotent-redis",
    "rediss": "idempotent-rediss",
    "sentinel": "idempotent-sentinel",
    "sqla": "idempotent-sqla",
    "sqlalchemy": "idempotent-sqla",
}
_URLS: Final = ("broker_url", "broker_read_url", "broker_write_url")
_SCHEME: Final = re.compile(r"(^|;)([A-Za-z][A-Za-z0-9-]*)(?=\+|://)")


@dataclass(frozen=True, slots=True)
class Setup:
    """What `setup` has set, in words, for a person."""

    did: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.did)


def setup(
    app: Celery, *, store: Any = None, inbox: Any = None, edge: bool = True, confirms: bool = True, **options: Any
) -> Setup:
    """Make the tasks of this app idempotent that name a scope; the others stay as they are.

    Call it after the app is configured and before its tasks are declared. Then a task needs only its scope and its
    biz-id: `@app.task(scope="cards.issue", biz_id="payment_id")`.

    store, inbox, and other options of `IdempotentTask`: for all tasks that do not say otherwise.
    edge: a broker URL of kombu's Redis or SQLAlchemy transport is replaced by ours, which refuses a second copy of a
        publish and closes kombu's windows for loss. It shares its queues with kombu's.
    confirms: on AMQP `apply_async` returns when the broker has confirmed the message, and is not left in doubt.

    All task messages of the app get an inner-msg-id, those of beat's entries one that is derived from the entry and its
    last run. Guarded tasks ack late, and are delivered again if their worker is lost, unless they say otherwise.
    Returns what it has set, and logs it. Called again, it adds to it.

    Raises ConfigurationError for options that nobody knows, and for tasks with a scope that were declared before
    without `base=IdempotentTask`: they would run unguarded.
    """
    register()
    given = {name: value for name, value in (("store", store), ("inbox", inbox)) if value is not None}
    remember(app, {**given, **options})
    did = []
    if edge:
        did += _set_edges(app)
    install(app, confirms=confirms)
    did.append("every task message carries an inner-msg-id")
    if confirms and str(_first(app.conf.broker_url) or "amqp://").partition("://")[0] in ("amqp", "amqps", "pyamqp"):
        did.append("publishes wait for the broker's confirm")
    _guard_scoped_tasks(app)
    did.append("tasks with a scope are guarded: acks_late and reject_on_worker_lost, unless they say otherwise")
    made = Setup(tuple(did))
    log.info("idempotent-bus: %s", made)
    return made


def _set_edges(app: Celery) -> list[str]:
    did = []
    for name in _URLS:
        url = getattr(app.conf, name, None)
        changed = [_with_our_scheme(one) for one in url] if isinstance(url, (list, tuple)) else _with_our_scheme(url)
        if changed != (list(url) if isinstance(url, (list, tuple)) else url):
            setattr(app.conf, name, changed)
            schemes = _SCHEME.search(_first(changed) or "")
            did.append(f"{name} uses the transport {schemes.group(2) if schemes else 'of ours'}")
    if did and app.conf.broker_transport in _OURS:
        app.conf.broker_transport = None
    if did:
        app.amqp._producer_pool = None
        app.__dict__["_pool"] = None
    return did


def _with_our_scheme(url: Any) -> Any:
    if not isinstance(url, str):
        return url
    return _SCHEME.sub(lambda found: found.group(1) + _OURS.get(found.group(2), found.group(2)), url)


def _first(url: Any) -> str | None:
    if isinstance(url, (list, tuple)):
        url = url[0] if url else None
    return url.split(";")[0] if isinstance(url, str) else None


def _guard_scoped_tasks(app: Celery) -> None:
    """From now on a task that names a scope has our base class; one that was declared otherwise ends the start."""
    make: Callable[..., Any] = app._task_from_fun
    if getattr(make, "_idempotent_bus", False):
        return

    @functools.wraps(make)
    def task_from_fun(fun: Any, name: str | None = None, base: Any = None, **options: Any) -> Any:
        if base is None and options.get("scope") is not None:
            base = _base_of(app)
        task = make(fun, name, base, **options)
        _check_task(task)
        return task

    task_from_fun._idempotent_bus = True  # type: ignore[attr-defined]  # for a second call of setup
    app._task_from_fun = task_from_fun
    beat_init.connect(_name_beats_messages)
    finalize: Callable[..., None] = app.finalize

    @functools.wraps(finalize)
    def finalize_and_check(auto: bool = False) -> None:
        finalize(auto=auto)
        _check_tasks(app)

    app.finalize = finalize_and_check  # not on_after_finalize: a signal swallows what its receivers raise
    if app.finalized:
        _check_tasks(app)


def _base_of(app: Celery) -> type[IdempotentTask]:
    """IdempotentTask, on top of the app's own base class if it has one."""
    own = symbol_by_name(app.task_cls)
    if own is Task or issubclass(own, IdempotentTask):
        return IdempotentTask if own is Task else own
    return type("IdempotentTask", (IdempotentTask, own), {"abstract": True})


def _check_tasks(app: Celery) -> None:
    for task in app._tasks.values():
        _check_task(task)
        if isinstance(task, IdempotentTask):
            guard_of(task)


def _check_task(task: Any) -> None:
    if getattr(task, "scope", None) is not None and not isinstance(task, IdempotentTask):
        raise ConfigurationError(
            f"the task {task.name} names a scope, but would run unguarded: call setup(app, ...) before its tasks "
            "are declared, or give it base=IdempotentTask"
        )


def _name_beats_messages(sender: Any, **_: Any) -> None:
    """Give the message of each due entry the id that the entry and its last run give.

    A beat that died before it had noted the run sends the same entry again when it is back; then it lands once.
    """
    scheduler = sender.scheduler
    if not hasattr(scheduler.app.amqp, "confirms"):  # an app that is not set up
        return
    send = scheduler.apply_async

    @functools.wraps(send)
    def apply_async(entry: Any, *args: Any, **kwargs: Any) -> Any:
        last_run = getattr(entry, "last_run_at", None)
        if last_run is None:
            return send(entry, *args, **kwargs)
        key = f"beat:{entry.name}".encode()
        with sent_as(derived_inner_msg_id(key, f"{last_run.isoformat()}:{getattr(entry, 'total_run_count', 0)}")):
            return send(entry, *args, **kwargs)

    scheduler.apply_async = apply_async
