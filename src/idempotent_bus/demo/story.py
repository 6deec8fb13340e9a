"""One mode of the demo from beginning to end: start the processes, kill them, wait until all is quiet, count."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import signal
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from kombu import Connection, Queue

from . import cards, receiver, sender
from .faults import is_between, plan_death, read_history
from .settings import IDLE, SCOPE, Mode, Settings

#: Beyond this many seconds without a new card, what has not come is missing.
_PATIENCE = 4 * IDLE


@dataclass
class Result:
    """What one mode came to."""

    mode: Mode
    payments: int = 0
    cards: int = 0
    too_many: int = 0
    missing: int = 0
    kills: int = 0
    kills_between: int = 0
    acks_lost: int = 0
    resends: int = 0
    refused_at_edge: int = 0
    refused_at_handler: int = 0
    dead: int = 0
    seconds: float = 0.0
    examples: list[str] = field(default_factory=list)

    @property
    def failure(self) -> str | None:
        """Why this run disproves what is claimed of its mode, or None."""
        if self.mode is Mode.NAIVE:
            if not self.too_many and not self.missing:
                return "the unprotected run shows no damage, so this demo proves nothing"
            return None
        if self.missing:
            return f"{self.missing} cards are missing"
        allowed = self.kills_between if self.mode is Mode.STORE else 0
        if self.too_many > allowed:
            return f"{self.too_many} cards too many, at most {allowed} can be explained"
        return None


def play(settings: Settings, progress: Callable[[int, int], None]) -> Result:
    """Play one mode. progress: called now and then with the payments that have a card and the kills so far."""
    started = time.monotonic()
    # A fork server that has everything imported makes a new consumer in milliseconds, with no threads inherited.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["idempotent_bus.demo.receiver", "idempotent_bus.demo.sender"])
    engine = cards.open_cards(settings.cards)
    cards.create(engine)
    _declare(settings)
    random_deaths = random.Random(f"{settings.seed}/deaths/{settings.mode.value}")  # noqa: S311 - repeatable
    each = max(1, len(settings.rows) // max(1, settings.kills))
    doomed: set[BaseProcess] = set()
    incarnations = kills = 0

    def start() -> BaseProcess:
        nonlocal incarnations
        death = None
        if kills + len(doomed) < settings.kills:
            death = plan_death(settings.mode.value, each, random_deaths)
        incarnations += 1
        process = context.Process(target=receiver.receive, args=(settings, incarnations, death), daemon=True)
        process.start()
        if death is not None:
            doomed.add(process)
        return process

    sending = context.Process(target=sender.send, args=(settings,), daemon=True)
    consumers: list[BaseProcess] = []
    try:
        sending.start()
        consumers = [start() for _ in range(settings.consumers)]
        cards_seen, last_news = -1, time.monotonic()
        while consumers:
            time.sleep(0.1)
            for process in [process for process in consumers if not process.is_alive()]:
                consumers.remove(process)
                doomed.discard(process)
                if process.exitcode == -signal.SIGKILL:
                    kills += 1
                elif process.exitcode == 0 and not sending.is_alive():
                    continue  # idle long enough: there is nothing more to come
                elif process.exitcode:
                    raise RuntimeError(f"a consumer of the demo failed with exit code {process.exitcode}, see above")
                consumers.append(start())
            issued = cards.issued(engine, settings.queue)
            if issued != cards_seen or sending.is_alive():
                cards_seen, last_news = issued, time.monotonic()
            elif time.monotonic() - last_news > _PATIENCE:
                break
            progress(issued, kills)
        sending.join()
        if sending.exitcode:
            raise RuntimeError(f"the sender of the demo failed with exit code {sending.exitcode}, see above")
        return _count(settings, cards.count(engine, settings.queue), kills, time.monotonic() - started)
    finally:
        for process in (sending, *consumers):
            if process.is_alive():
                process.kill()
                process.join()
        cards.forget(engine, settings.queue)
        engine.dispose()
        _remove(settings)


def _count(settings: Settings, found: Counter[str], kills: int, seconds: float) -> Result:
    history = Counter[str]()
    between = 0
    for event in read_history(settings.folder / "history"):
        history[event["event"]] += 1
        between += event["event"] == "killed" and is_between(event)
    expected = {str(row[settings.biz_id]) for row in settings.rows}
    missing = [payment for payment in expected if not found[payment]]
    doubled = [payment for payment, number in found.items() if number > 1]
    return Result(
        mode=settings.mode,
        payments=len(expected),
        cards=found.total(),
        too_many=sum(found[payment] - 1 for payment in doubled),
        missing=len(missing),
        kills=kills,
        kills_between=between,
        acks_lost=history["ack lost"],
        resends=history["confirm lost"],
        refused_at_edge=history["refused at the edge"],
        refused_at_handler=history["replayed"],
        dead=history["dead"],
        seconds=seconds,
        examples=[*doubled[:3], *missing[:3]],
    )


def _declare(settings: Settings) -> None:
    with _connection(settings) as connection:
        sender.topology(settings)[1](connection).declare()


def _remove(settings: Settings) -> None:
    """Leave nothing of this run in the broker."""
    with contextlib.suppress(Exception), _connection(settings) as connection:
        for name in (settings.queue, f"{SCOPE}{settings.queue}.dead", f"{settings.queue}.back"):
            with contextlib.suppress(Exception):
                Queue(name)(connection.channel()).delete()
        with contextlib.suppress(Exception):
            sender.topology(settings)[0](connection.channel()).delete()


def _connection(settings: Settings) -> Connection:
    return Connection(settings.broker, transport_options=settings.transport_options)


def prepare(
    mode: Mode,
    *,
    broker: str,
    store: str | None,
    rows: tuple[dict[str, object], ...],
    biz_id: str,
    consumers: int,
    kills: int,
    seed: int,
    folder: Path,
) -> Settings:
    """The settings of one mode, with files and names of its own.

    broker, store: URLs, or the embedded default where None or "sqlite". Without the library, a broker of ours is
    used in kombu's plain form.
    """
    own = folder / mode.value
    own.mkdir(parents=True, exist_ok=True)
    if broker == "sqlite":
        file = own / "broker.db"
        # For the naive run, so that kombu's transport fails by what it does, not for want of a setting.
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        broker = f"idempotent-sqla+sqlite:///{file}?timeout=20"
    if mode is Mode.NAIVE:
        broker = broker.removeprefix("idempotent-")
    sql_store = store is not None and store.startswith(("sqlite", "postgresql", "mysql", "mariadb"))
    name = f"demo.{mode.value}.{uuid.uuid4().hex[:8]}"
    return Settings(
        mode=mode,
        broker=broker,
        store=store or f"sqlite:///{own / 'store.db'}",
        cards=store if sql_store and store else f"sqlite:///{own / 'cards.db'}",
        exchange=name,
        queue=name,
        rows=rows,
        biz_id=biz_id,
        consumers=consumers,
        kills=kills,
        seed=seed,
        folder=own,
    )
