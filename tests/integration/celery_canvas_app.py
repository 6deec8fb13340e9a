"""The canvas matrix as an application: its worker, and `main`, which sends all canvases and prints what they give.

With CANVAS_KIND=plain it is Celery alone on kombu's transport: the oracle. With CANVAS_KIND=guarded every task has a
scope, and the bus's own id as its biz-id. Both have acks_late and reject_on_worker_lost for the whole app: without them
Celery's own `celery.map` and `celery.starmap`, which no base class reaches, are lost with their child.

CANVAS_DEATHS=n: of every n-th run of `add` the child kills itself when the task has succeeded and Celery has sent what
follows from it: with CANVAS_WHEN=before before its result is stored, so that its callbacks are sent again; with "after"
after that and before its chord has counted it, where Celery takes it for done and acks; else by turns.
"""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

from celery import Celery, Task, chain, chord, current_task, group
from celery.backends.redis import RedisBackend
from celery.signals import before_task_publish, task_prerun
from celery.states import SUCCESS
from redis import Redis

from idempotent_bus import INNER_MSG_ID
from idempotent_bus.celery import setup
from idempotent_bus.stores.redis import open_redis

NAME, BROKER, REDIS = (os.environ[f"CANVAS_{name}"] for name in ("NAME", "BROKER", "REDIS"))
GUARDED = os.environ["CANVAS_KIND"] == "guarded"
DEATHS, WHEN = int(os.environ.get("CANVAS_DEATHS", "0")), os.environ.get("CANVAS_WHEN", "")
ONLY = os.environ.get("CANVAS_ONLY", "")
PATIENCE = float(os.environ.get("CANVAS_PATIENCE", "60"))

#: Which canvas is being sent, or a part of it run, in this process: a header that each message hands to what it causes.
canvas = ""
notes = Redis.from_url(REDIS)
app = Celery("celery_canvas_app", broker=BROKER, backend=REDIS)
app.conf.update(
    task_default_queue=NAME,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=4,
    broker_connection_retry_on_startup=True,
    result_expires=300,
    result_backend_transport_options={"global_keyprefix": f"{NAME}:"},
    broker_transport_options={} if BROKER.startswith("amqp") else {"visibility_timeout": 4},
)
if GUARDED:
    setup(app, store=lambda: open_redis(REDIS, prefix=f"{NAME}:store:"), lease=4, retention=600, max_attempts=50)


def task(function: Any) -> Any:
    if not GUARDED:
        return app.task(base=Task, name=function.__name__)(function)
    return app.task(name=function.__name__, scope=f"{NAME}.{function.__name__}", biz_id=INNER_MSG_ID)(function)


@before_task_publish.connect
def hand_on(headers: Any = None, **_: Any) -> None:
    headers["canvas"] = canvas


@task_prerun.connect
def begin(task: Any = None, **_: Any) -> None:
    global canvas
    canvas = getattr(task.request, "canvas", "")


def works(name: str) -> None:
    notes.hincrby(f"{NAME}:runs", f"{canvas}/{name}", 1)
    # Whom a test kills in the middle of something. Not Celery's own map and starmap: they are no guarded tasks, and
    # Celery's way of stopping a chord (see "after") stays with them.
    if not current_task.name.startswith("celery."):
        notes.set(f"{NAME}:busy", os.getpid())
    time.sleep(0.02)


@task
def add(x: Any, y: Any) -> Any:
    works("add")
    return x + y


@task
def mul(x: Any, y: Any) -> Any:
    works("mul")
    return x * y


@task
def total(numbers: Any) -> Any:
    works("total")
    return sum(sum(one) if isinstance(one, list) else one for one in numbers)


@task
def twice(x: Any) -> Any:
    works("twice")
    return x * 2


@task
def boom(x: Any) -> Any:
    works("boom")
    raise ValueError(f"no {x}")


@task
def note(result: Any, where: str) -> Any:
    """What a link is: it leaves a trace."""
    works("note")
    notes.rpush(f"{NAME}:notes", f"{where}: {json.dumps(result)}")
    return result


@task
def errback(task_id: str, *, where: str) -> None:
    """What a link_error is, in Celery's newer form: it gets the failed task's id, in a message of its own."""
    works("errback")
    notes.rpush(f"{NAME}:notes", f"{where}: failed")


def dying(store_result: Any) -> Any:
    def store(
        backend: Any, task_id: str, result: Any, state: str, *more: Any, request: Any = None, **options: Any
    ) -> Any:
        def stored() -> Any:
            return store_result(backend, task_id, result, state, *more, request=request, **options)

        if state != SUCCESS or getattr(request, "task", "") != "add" or not chosen(task_id):
            return stored()
        notes.incr(f"{NAME}:deaths")
        if WHEN == "after" or (not WHEN and int(notes.get(f"{NAME}:deaths") or 0) % 2):
            stored()
        arrived()
        return os.kill(os.getpid(), signal.SIGKILL)

    return store


def arrived() -> None:
    """Wait until the broker has what was sent from here: RabbitMQ may drop what a channel has not come to when its
    connection dies, and then nobody could tell how often a link was sent."""
    if BROKER.startswith("amqp"):
        with app.producer_pool.acquire(block=True) as producer:
            producer.channel.queue_declare(NAME, passive=True)  # answered after what came before it on this channel


def chosen(task_id: str) -> bool:
    """Every n-th task, and each once."""
    if notes.incr(f"{NAME}:successes") % DEATHS:
        return False
    return bool(notes.set(f"{NAME}:died:{task_id}", 1, nx=True))


if DEATHS:
    RedisBackend.store_result = dying(RedisBackend.store_result)


def canvases() -> dict[str, Any]:
    """Every kind of canvas, nested up to three deep in each other, some with link and link_error."""

    def three() -> Any:
        return [add.s(1, 1), add.s(2, 2), add.s(3, 3)]

    return {
        "task": add.s(1, 2),
        "chain": chain(add.s(1, 2), mul.s(3), add.s(4), mul.s(5)),
        "group": group(three()),
        "chord": chord(three(), total.s()),
        "map": twice.map([1, 2, 3]),
        "starmap": add.starmap([(1, 2), (3, 4)]),
        "chunks": add.chunks([(n, n) for n in range(6)], 2).group(),
        "group in a chain": chain(add.s(1, 1), group(mul.s(2), mul.s(3), add.s(4)), total.s()),
        "chain ends in a group": chain(add.s(1, 1), group(mul.s(2), mul.s(3))),
        "groups in a chain": chain(group(add.s(1, 1), add.s(2, 2)), group(total.s(), total.s()), total.s()),
        "chains in a group": group(chain(add.s(n, 1), mul.s(2), add.s(3)) for n in range(3)),
        "chains in a chord": chord([chain(add.s(n, 1), mul.s(2)) for n in range(3)], chain(total.s(), add.s(1))),
        "chord in a chain": chain(add.s(1, 1), chord([mul.s(2), mul.s(3)], total.s()), add.s(10)),
        "chords in a group": group(chord(three(), total.s()), chord(three(), total.s())),
        "chord in a chord in a chord": chord(
            [chord([chord(three(), total.s()), add.s(3, 3)], total.s()), add.s(4, 4)], total.s()
        ),
        "group in a chain in a chord": chord(
            [chain(add.s(1, 1), group(mul.s(2), mul.s(3)), total.s()), add.s(5, 5)], total.s()
        ),
        "chord in a chain in a group": group(
            chain(add.s(1, 1), chord([mul.s(2), add.s(3)], total.s()), mul.s(2)), add.s(7, 7)
        ),
        "map and starmap in a chord": chord([twice.map([1, 2]), add.starmap([(1, 2), (3, 4)])], total.s()),
        "chunks in a chain": chain(add.chunks([(n, n) for n in range(4)], 2).group(), total.s()),
        "link": add.s(1, 2).on_error(errback.s(where="never")).set(link=note.s("link")),
        "two links": add.s(2, 2).set(link=[note.s("one"), note.s("two")]),
        "link in a link": add.s(3, 3).set(link=note.s("outer").set(link=note.s("inner"))),
        "link to a chain": add.s(4, 4).set(link=chain(add.s(1), note.s("end of a chain"))),
        "link to a chord": add.s(5, 5).set(link=chord([add.s(1), add.s(2)], chain(total.s(), note.s("body")))),
        "links in a chain": chain(add.s(1, 1).set(link=note.s("first")), mul.s(2).set(link=note.s("second")), add.s(1)),
        "links in a chord": chord(
            [add.s(1, 1).set(link=note.s("header")), add.s(2, 2)], total.s().set(link=note.s("of the body"))
        ),
        "link of a map": twice.map([4, 5]).set(link=note.s("map")),
        "link_error": boom.s(1).set(link_error=errback.s(where="link_error")),
        "link_error in a chain": chain(add.s(1, 1), boom.s(), add.s(1)).on_error(errback.s(where="in a chain")),
        "link_error of a chord": chord([add.s(1, 1), boom.s(2)], total.s().on_error(errback.s(where="of a chord"))),
        "link_error in a group in a chain": chain(
            add.s(1, 1), group(mul.s(2), boom.s().set(link_error=errback.s(where="in a group"))), total.s()
        ),
        "link_error to a chain": boom.s(3).set(link_error=chain(errback.s(where="to a chain"), note.si(1, "after it"))),
    }


def main() -> None:
    global canvas
    results = {}
    for canvas, made in canvases().items():
        if not ONLY or canvas in ONLY.split(","):
            results[canvas] = made.apply_async()
    given = {}
    for name, result in results.items():
        try:
            given[name] = result.get(timeout=PATIENCE)
        except Exception as error:  # noqa: BLE001 - an error is what a canvas may give: its class is compared
            given[name] = f"raises {type(error).__name__}"
    print(json.dumps(given))
