"""The charge service: publishes one message per payment and loses some of the confirms."""

from __future__ import annotations

import contextlib
import functools
import random
from typing import Any

import sqlalchemy as sa
from kombu import Connection, Exchange, Producer, Queue
from kombu.exceptions import OperationalError as KombuOperationalError

from ..hooks import PUBLISH
from ..producer import IdempotentProducer
from .faults import Faults, History
from .settings import Mode, Settings

ROUTING_KEY = "paid"


def topology(settings: Settings) -> tuple[Exchange, Queue]:
    """The exchange and the queue of this run."""
    exchange = Exchange(settings.exchange, type="direct", durable=True)
    return exchange, Queue(settings.queue, exchange=exchange, routing_key=ROUTING_KEY, durable=True)


def send(settings: Settings) -> None:
    """Publish every row: the process's main function."""
    rng = random.Random(f"{settings.seed}/sender")  # noqa: S311 - repeatable trouble
    faults = Faults(History(settings.folder / "history"), rng)
    with Connection(settings.broker, transport_options=settings.transport_options) as connection:
        if settings.mode is Mode.NAIVE:
            _send_naively(connection, settings, faults)
        else:
            _send_guarded(connection, settings, faults)


def _send_guarded(connection: Connection, settings: Settings, faults: Faults) -> None:
    exchange, queue = topology(settings)
    with IdempotentProducer(
        connection, exchange=exchange, routing_key=ROUTING_KEY, declare=[queue], biz_id=settings.biz_id, step=faults
    ) as producer:
        for row in settings.rows:
            producer.publish(row)


def _send_naively(connection: Connection, settings: Settings, faults: Faults) -> None:
    """As kombu's users do it today: confirms on, and kombu's own retry when the connection fails."""
    exchange, queue = topology(settings)
    if settings.broker.startswith(("amqp", "pyamqp")):
        connection.transport_options["confirm_publish"] = True
    sqla = "sqla" in settings.broker
    producer = _LosingProducer(connection, exchange=exchange, routing_key=ROUTING_KEY)
    producer.lose = functools.partial(_lose, faults, sqla)
    policy = {"max_retries": 10, "interval_start": 0, "interval_step": 0.05}
    rows = list(reversed(settings.rows))
    while rows:
        # kombu gives up on some transports when a second try fails too; a sender that must not lose tries again.
        with contextlib.suppress(KombuOperationalError, sa.exc.OperationalError, OSError):
            producer.publish(rows[-1], declare=[queue], retry=True, retry_policy=policy)
            rows.pop()


class _LosingProducer(Producer):  # type: ignore[misc]  # kombu has no types
    """kombu's producer, over a network that loses confirms. kombu's own `retry` answers them."""

    lose: Any = None

    def _publish(self, *args: Any, **kwargs: Any) -> Any:
        return self.lose(super()._publish, *args, **kwargs)


def _lose(faults: Faults, sqla: bool, publish: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return faults(PUBLISH, publish, *args, **kwargs)
    except ConnectionResetError:
        if not sqla:
            raise
        # The only error that kombu's SQLAlchemy transport takes for a lost connection.
        raise sa.exc.OperationalError("commit", None, ConnectionResetError()) from None
