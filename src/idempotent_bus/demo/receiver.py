"""The card service in its three forms. The naive one is what the documentation of kombu suggests: effect, then ack."""

from __future__ import annotations

import logging
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from kombu import Connection, Consumer
from kombu.message import Message

from ..consumer import IdempotentConsumer, IdempotentHandler, idempotent_consumer
from ..hooks import ACK, HANDLER
from ..inbox import Inbox, transactional_consumer
from ..policy import Backoff
from ..work import Ended
from .cards import issue, open_cards
from .faults import Death, Faults, History
from .sender import topology
from .settings import IDLE, LEASE, SCOPE, Mode, Settings


def receive(settings: Settings, number: int, death: Death | None) -> None:
    """Consume until nothing has come for a while: the process's main function. number: of this incarnation."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor ends us
    logging.disable(logging.WARNING)  # the trouble is made on purpose: it would only tear the progress bar
    history = History(settings.folder / "history")
    rng = random.Random(f"{settings.seed}/receiver/{number}")  # noqa: S311 - repeatable trouble
    faults = Faults(history, rng, death)
    connection = Connection(settings.broker, transport_options=settings.transport_options)
    if settings.mode is Mode.NAIVE:
        _receive_naively(connection, settings, faults)
        return
    handler = _store_handler(settings, faults) if settings.mode is Mode.STORE else _inbox_handler(settings, faults)
    consumer = IdempotentConsumer(connection, {topology(settings)[1]: handler}, prefetch=20)
    consumer.endings = _Told(history)
    consumer.run(idle_timeout=IDLE)


class _Told(Counter[Ended]):
    """Counts endings, and writes each that the table shows down at once, since a kill takes the count along."""

    def __init__(self, history: History) -> None:
        super().__init__()
        self._history = history

    def update(self, endings: Iterable[Ended] | None = None) -> None:  # type: ignore[override]  # fed with endings only
        for how in endings or ():
            self[how] += 1
            if how is not Ended.COMPLETED:
                self._history(how.value)


def _store_handler(settings: Settings, faults: Faults) -> IdempotentHandler:
    engine = open_cards(settings.cards)

    @idempotent_consumer(
        settings.store,
        scope=SCOPE + settings.queue,
        biz_id=settings.biz_id,
        lease=LEASE,
        busy_delay=0.25,
        backoff=Backoff(base=0.25, cap=1.0),
        step=faults,
    )
    def issue_card(body: dict[str, Any], message: Message) -> None:
        with engine.begin() as connection:
            issue(connection, settings.queue, str(body[settings.biz_id]))

    return issue_card


def _inbox_handler(settings: Settings, faults: Faults) -> IdempotentHandler:
    @transactional_consumer(
        Inbox(open_cards(settings.cards)),
        scope=SCOPE + settings.queue,
        biz_id=settings.biz_id,
        busy_delay=0.25,
        backoff=Backoff(base=0.25, cap=1.0),
        step=faults,
    )
    def issue_card(body: dict[str, Any], message: Message, connection: Any) -> None:
        issue(connection, settings.queue, str(body[settings.biz_id]))

    return issue_card


def _receive_naively(connection: Connection, settings: Settings, faults: Faults) -> None:
    engine = open_cards(settings.cards)
    queue = topology(settings)[1]
    last = time.monotonic()

    def effect(body: dict[str, Any]) -> None:
        with engine.begin() as database:
            issue(database, settings.queue, str(body[settings.biz_id]))

    def issue_card(body: dict[str, Any], message: Message) -> None:
        nonlocal last
        faults(HANDLER, effect, body)
        faults(ACK, message.ack)
        last = time.monotonic()

    while time.monotonic() - last < IDLE:
        try:
            with (
                connection.clone() as fresh,
                Consumer(fresh.channel(), [queue], callbacks=[issue_card], prefetch_count=20),
            ):
                while time.monotonic() - last < IDLE:
                    try:
                        fresh.drain_events(timeout=0.5)
                    except (socket.timeout, TimeoutError):  # noqa: UP041 - two classes in Python 3.10's ssl module
                        continue
        except (OSError, *connection.recoverable_connection_errors):
            continue
