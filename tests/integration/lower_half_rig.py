"""What the table of the lower half needs: real stores and brokers, workers in threads, a tape of all outside steps."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from amqp.exceptions import MessageNacked
from kombu.message import Message

import servers
from consumer_rig import Broker, consume, poll
from idempotent_bus import Backoff, IdempotentConsumer, current_execution, idempotent_consumer, open_store, session
from idempotent_bus.errors import StoreUnavailable
from idempotent_bus.headers import INNER_MSG_ID
from idempotent_bus.hooks import ACK, DEAD_LETTER, HANDLER, WAIT
from idempotent_bus.identity import fingerprint, record_key
from idempotent_bus.model import ClaimRequest, Record
from idempotent_bus.msgid import new_inner_msg_id
from idempotent_bus.redrive import redrive
from idempotent_bus.stores.memory import MemoryStore
from idempotent_bus.work import Ended, Ending

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from stores import drop_tables

STORES = ("memory", "sqlite", "redis", "postgresql", "mariadb")
BROKERS = ("rabbitmq-quorum", "ours-redis", "ours-sqlite")

#: The steps that ask the store.
STORE_STEPS = ("claim", "renew", "complete", "release", "abandon", "quarantine")


@dataclass
class Places:
    """One place in each store for all tests of a process: the scopes, which are unique, keep these apart."""

    directory: Path

    def __post_init__(self) -> None:
        self._options: dict[str, tuple[str, dict[str, Any]]] = {}
        self._memory = MemoryStore()

    def opener(self, name: str) -> Callable[[], Any]:
        """A function that opens the store of that name; each call gives one with connections of its own."""
        if name == "memory":
            return lambda: self._memory
        if name not in self._options:
            prefix = f"t{uuid.uuid4().hex[:12]}"
            self._options[name] = {
                "sqlite": lambda: (f"sqlite:///{self.directory}/store.db", {}),
                "redis": lambda: (servers.redis(), {"prefix": f"{prefix}:"}),
                "postgresql": lambda: (servers.postgresql(), {"table_prefix": f"{prefix}_"}),
                "mariadb": lambda: (servers.mariadb(), {"table_prefix": f"{prefix}_"}),
            }[name]()
        url, options = self._options[name]
        return partial(open_store, url, **options)

    def clean_up(self) -> None:
        for name, (url, options) in self._options.items():
            if name == "redis":
                import redis

                with redis.Redis.from_url(url) as client:
                    for key in client.scan_iter(match=f"{options['prefix']}*", count=1000):
                        client.delete(key)
            elif name != "sqlite":
                drop_tables(url, options["table_prefix"])


@dataclass(frozen=True)
class Heard:
    """One entry of the tape. key: the record's, in hex. said: the record's state at the step, or what came back."""

    name: str
    key: str
    at: float
    said: Any = None


class Tape:
    """The `step` of one worker: notes every outside step, what the record looked like, and can make steps fail.

    lose: by the step's name, what becomes of its next calls: "request" (never arrives), "reply" (arrives, its answer is
    lost), "" (all is well). deaf: names of steps that never get through; a set, to be changed at any time.
    """

    def __init__(self, look: Callable[[str], str]) -> None:
        self.heard: list[Heard] = []
        self.lose: dict[str, deque[str]] = defaultdict(deque)
        self.deaf: set[str] = set()
        self._look = look

    def __call__(self, name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        key = _key_of(function, args)
        self._note(name, key, self._look(key) if name in (ACK, WAIT, DEAD_LETTER, HANDLER) else None)
        trouble = self.lose[name].popleft() if self.lose[name] else ""
        if trouble == "request" or name in self.deaf:
            raise StoreUnavailable("the request was lost")
        result = function(*args, **kwargs)
        if trouble == "reply":
            raise StoreUnavailable("the reply was lost")
        self._note(f"{name} done", key, result)
        return result

    def _note(self, name: str, key: str, said: Any) -> None:
        self.heard.append(Heard(name, key, time.monotonic(), said))

    def of(self, *names: str, key: str | None = None) -> list[Heard]:
        return [entry for entry in self.heard if entry.name in names and key in (None, entry.key)]

    def order(self, *names: str, key: str | None = None) -> list[str]:
        return [entry.name for entry in self.of(*names, key=key)]


def _key_of(function: Any, args: tuple[Any, ...]) -> str:
    """Which record a step is about, as far as it can be told."""
    settle = getattr(function, "__self__", None)
    for _ in range(3):  # a settlement may be wrapped
        record = getattr(settle, "record", None)
        if isinstance(record, bytes):
            return record.hex()
        settle = getattr(settle, "_settle", None)
    about = getattr(args[0], "hold", args[0]) if args else None  # a completion that is under way
    key = getattr(about, "key", None)
    return key.hex() if isinstance(key, bytes) else ""


@dataclass(frozen=True)
class Run:
    """One start of a handler."""

    id: str
    attempt: int
    token: int
    at: float


class Worker:
    """One IdempotentConsumer in a thread of its own, with its own connections to broker and store."""

    def __init__(self, rig: Rig, business: Callable[[Any], Any], prefetch: int, options: dict[str, Any]) -> None:
        self.tape = Tape(rig.look)
        self.runs: list[Run] = []
        self.error: BaseException | None = None
        self._rig = rig
        self._store: Any = None
        more = {
            "lease": 20.0, "backoff": Backoff(0.3, 0.3), "busy_delay": 0.2, "biz_id": "id",
            "dead_letter": rig.broker.dead, **options,
        }  # fmt: skip

        @idempotent_consumer(self._open, scope=rig.scope, step=self.tape, **more)
        def handle(body: Any, message: Message) -> Any:
            execution = current_execution()
            self.runs.append(Run(body["id"], execution.attempt, execution.token, time.monotonic()))
            return business(body)

        self.handler: Any = handle
        handle.executor._failing._draw = lambda: 1.0  # type: ignore[attr-defined]  # no jitter: waits can be told
        rig.patch.setattr(session, "_LONGEST_WAIT", 0.1)  # so that it stops soon on brokers that are polled
        self.consumer = IdempotentConsumer(rig.broker.connect(), {rig.queue: handle}, prefetch=prefetch)
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _open(self) -> Any:
        self._store = self._rig.open()
        return self._store

    def _run(self) -> None:
        try:
            self.consumer.run()
        except BaseException as error:  # noqa: BLE001 - a test may want to see it
            self.error = error

    def stop(self) -> None:
        self.consumer.stop()
        self.thread.join(10)
        assert not self.thread.is_alive(), "run did not return after stop"

    def close(self) -> None:
        if self.thread.is_alive():
            self.stop()
        if self._store is not None and not isinstance(self._store, MemoryStore):
            self._store.close()

    def ended(self, how: Ended) -> int:
        return self.consumer.endings[how]

    def is_connected(self) -> bool:
        return self.consumer._session is not None and self.consumer._session.channel is not None

    def ran(self, biz_id: str) -> list[Run]:
        return [run for run in self.runs if run.id == biz_id]


class Rig:
    """One store, one broker, one queue and one scope, for one row of the table.

    patience: seconds that a condition may take to become true.
    """

    def __init__(
        self, broker: Broker, opener: Callable[[], Any], patch: pytest.MonkeyPatch, patience: float = 15.0
    ) -> None:
        self.broker = broker
        self.scope = broker.unique
        self.queue = broker.queue()
        self.open = opener
        self.patch = patch
        self.patience = patience
        self.store = opener()
        self._gates: list[threading.Event] = []

    # --- the bus --------------------------------------------------------------------------------------

    def publish(self, biz_id: str, **more: Any) -> str:
        """One message with an inner-msg-id of its own, and a body that no encoder of ours would make."""
        inner_msg_id = new_inner_msg_id()
        self.publish_raw(_body(biz_id, more), headers={INNER_MSG_ID: inner_msg_id})
        return inner_msg_id

    def publish_raw(self, body: bytes, **options: Any) -> None:
        """These bytes. Confirmed: a quorum queue may lose what comes, unconfirmed, in its first moments."""
        with self.broker.connect() as connection:
            connection.transport_options["confirm_publish"] = True
            for last in (False, False, True):
                try:
                    connection.Producer().publish(
                        body, routing_key=self.queue.name, declare=[self.queue], content_type="application/json",
                        **options,
                    )  # fmt: skip
                except MessageNacked:  # so do they, when they are not quite there: nothing was stored
                    if last:
                        raise
                    time.sleep(0.3)
                else:
                    return

    def dead(self, count: int = 1) -> list[Message]:
        """What is in the dead letter, taken from there."""
        return self.broker.take(self.broker.dead, count, timeout=self.patience)

    def nothing_is_left(self) -> None:
        assert self.broker.is_empty(self.queue.name), "the message is still in its queue"

    def redrive(self) -> int:
        return redrive(self.broker.connect(), self.broker.dead).moved

    def bare(self, handler: Any) -> Ending:
        """Handle one message with a plain kombu callback; gives what the handler says of it."""
        endings: list[Ending] = []
        came = consume(
            self.broker,
            self.queue,
            lambda body, message: endings.append(handler.handle(body, message)),
            lambda: bool(endings),
            self.patience,
        )
        assert came, "the message never came"
        return endings[0]

    # --- the store ------------------------------------------------------------------------------------

    def key(self, biz_id: str) -> bytes:
        return record_key(self.scope, biz_id)

    def record(self, biz_id: str) -> Record:
        record: Record | None = self.store.lookup(self.key(biz_id))
        assert record is not None, "there is no record"
        return record

    def look(self, key: str) -> str:
        record = self.store.lookup(bytes.fromhex(key)) if key else None
        return "" if record is None else record.state.name

    def dead_holder(self, biz_id: str, **more: Any) -> int:
        """A worker has claimed it, started the handler, and is gone, and so is its lease. Gives its token."""
        digest = fingerprint(json.loads(_body(biz_id, more)), True)
        claimed = self.store.claim(ClaimRequest(self.key(biz_id), os.urandom(16), 0.2, 600.0, digest))
        time.sleep(0.25)
        token: int = claimed.token
        return token

    # --- workers --------------------------------------------------------------------------------------

    @contextmanager
    def worker(
        self, business: Callable[[Any], Any] = lambda body: None, *, prefetch: int = 10, **options: Any
    ) -> Iterator[Worker]:
        made = Worker(self, business, prefetch, options)
        made.thread.start()
        try:
            yield made
        finally:
            for gate in self._gates:
                gate.set()
            made.tape.deaf.clear()
            made.close()

    def gate(self) -> threading.Event:
        """An event for a handler to wait for; set when the row is over, however it ended."""
        gate = threading.Event()
        self._gates.append(gate)
        return gate

    def until(self, condition: Callable[[], bool], claim: str, within: float | None = None) -> None:
        assert poll(condition, min(self.patience, within or self.patience)), claim

    def close(self) -> None:
        if not isinstance(self.store, MemoryStore):
            with contextlib.suppress(Exception):
                self.store.close()
        self.broker.clean_up()


def _body(biz_id: str, more: dict[str, Any]) -> bytes:
    fields = "".join(f', "{name}" : {value}' for name, value in more.items())
    return f'{{  "id" :"{biz_id}"{fields} }}'.encode()
