"""The Celery application of test_redis_transport_celery: each task notes in Redis that it ran."""

from __future__ import annotations

import os
import time

from celery import Celery
from redis import Redis

from idempotent_bus.transports import register

register()

NAME = os.environ["REDIS_TRANSPORT_QUEUE"]
notes = Redis(port=int(os.environ["REDIS_TRANSPORT_PORT"]))
app = Celery("redis_transport_app", broker=os.environ["REDIS_TRANSPORT_BROKER"])
app.conf.update(
    task_default_queue=NAME,
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=4,
    broker_connection_retry_on_startup=True,
    broker_transport_options={
        "visibility_timeout": 3,
        # kombu's own restore, made as eager as ours, so that the control is judged fairly
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    },
)


@app.task
def work(number: int) -> None:
    time.sleep(0.002)
    pipe = notes.pipeline()
    pipe.sadd(f"done:{NAME}", number)
    pipe.incr(f"runs:{NAME}")
    pipe.execute()
