"""What the tests of the consumers share: a table of brokers, small helpers to fill and look into their queues."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Consumer, Exchange, Queue
from kombu.message import Message

import servers
from idempotent_bus import IdempotentConsumer, IdempotentProducer, delays, transports

transports.register()

#: Every broker that a consumer is tested on. The last two are ours; RabbitMQ has two kinds of queue.
BROKERS = ("memory", "redis", "sqla", "rabbitmq-classic", "rabbitmq-quorum", "ours-sqlite", "ours-redis")
RABBITMQ = ("rabbitmq-classic", "rabbitmq-quorum")
OURS = ("ours-sqlite", "ours-redis")


@dataclass
class Broker:
    """One broker with names of its own for one test."""

    name: str
    url: str
    unique: str
    options: dict[str, Any] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)

    @property
    def is_rabbitmq(self) -> bool:
        return self.name.startswith("rabbitmq")

    def connect(self) -> Connection:
        connection = Connection(self.url, transport_options=dict(self.options))
        if self.name == "sqla":
            connection.transport.polling_interval = 0.01  # it takes no such option
        return connection

    def queue(
        self, name: str = "q", exchange: Exchange | None = None, routing_key: str = "", **arguments: Any
    ) -> Queue:
        full = f"{self.unique}.{name}"
        self.extra.append(full)
        if self.name == "rabbitmq-quorum":
            arguments.setdefault("x-queue-type", "quorum")
        if exchange is None:
            return Queue(full, exchange=Exchange(""), durable=True, queue_arguments=arguments or None)
        return Queue(full, exchange, routing_key=routing_key, durable=True, queue_arguments=arguments or None)

    @property
    def dead(self) -> str:
        return f"{self.unique}.dead"

    def publish(self, queue: Queue, body: Any, **options: Any) -> str:
        """Publish one message with an inner-msg-id; returns that."""
        with IdempotentProducer(self.connect()) as producer:
            return producer.publish(body, routing_key=queue.name, declare=[queue], **options).inner_msg_id

    def publish_raw(self, queue: Queue, body: bytes, **options: Any) -> None:
        """Publish bytes as they are, with kombu's own producer."""
        with self.connect() as connection:
            connection.Producer().publish(
                body, routing_key=queue.name, declare=[queue], **{"content_type": "application/json", **options}
            )

    def take(self, name: str, count: int = 1, timeout: float = 5.0) -> list[Message]:
        """Fetch and ack up to `count` messages of a queue; waits for them, and returns what came."""
        found: list[Message] = []
        deadline = time.monotonic() + timeout
        with self.connect() as connection:
            channel = connection.channel()
            while len(found) < count:
                try:
                    message = channel.basic_get(name, no_ack=False)
                except Exception:  # noqa: BLE001 - the queue is not there yet
                    channel = connection.channel()
                    message = None
                if message is None:
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.02)
                    continue
                python = message if isinstance(message, Message) else channel.message_to_python(message)
                python.ack()
                found.append(python)
        return found

    def is_empty(self, name: str) -> bool:
        """True if nothing is ready in the queue (or it does not exist)."""
        return not self.take(name, timeout=0.0 if not self.is_rabbitmq else 0.2)

    def clean_up(self) -> None:
        if self.is_rabbitmq:
            with self.connect() as connection:
                channel = connection.channel()
                for name in (*self.extra, *(delays.return_queue(name).name for name in self.extra), self.dead):
                    channel.queue_delete(name)
        elif "redis" in self.name:
            import redis

            client = redis.Redis.from_url(servers.redis())
            for key in client.scan_iter(f"*{self.unique}*", count=1000):
                client.delete(key)
            client.close()


def make_broker(name: str, unique: str, tmp_path: Path) -> Broker:
    if name == "memory":
        return Broker(name, "memory://", unique, {"polling_interval": 0.01})
    if name == "redis":
        return Broker(name, servers.redis(), unique, {"global_keyprefix": unique})
    if name == "sqla":
        return Broker(name, f"sqla+sqlite:///{tmp_path}/plain.db", unique)
    if name == "ours-sqlite":
        return Broker(name, f"idempotent-sqla+sqlite:///{tmp_path}/bus.db", unique, {"polling_interval": 0.01})
    if name == "ours-redis":
        return Broker(name, f"idempotent-{servers.real_redis()}", unique, {"global_keyprefix": unique})
    return Broker(name, servers.rabbitmq(), unique)


def broker_of(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Broker]:
    """A fixture's body: the broker that the test names with `@on(*BROKERS)`."""
    made = make_broker(request.param, unique, tmp_path)
    yield made
    made.clean_up()


def on(*names: str) -> pytest.MarkDecorator:
    """Run the test over these brokers."""
    return pytest.mark.parametrize("broker", names, indirect=True)


def drain(connection: Connection, until: Callable[[], bool], timeout: float = 10.0) -> bool:
    """Let kombu deliver until the condition holds. False: it did not in time."""
    deadline = time.monotonic() + timeout
    while not until():
        if time.monotonic() > deadline:
            return False
        try:
            connection.drain_events(timeout=0.05)
        except (socket.timeout, TimeoutError):  # noqa: UP041 - not the same class in Python 3.10's ssl module
            continue
    return True


def consume(
    broker: Broker, queue: Queue, callback: Any, until: Callable[[], bool], timeout: float = 10.0, **options: Any
) -> bool:
    """A plain kombu Consumer with one callback, until the condition holds."""
    with broker.connect() as connection, Consumer(connection, [queue], callbacks=[callback], **options):
        return drain(connection, until, timeout)


def fill(broker: Broker, queue: Queue, ids: Any, **body: Any) -> None:
    """Publish one message for each id."""
    with IdempotentProducer(broker.connect()) as producer:
        producer.publish_many([{"id": biz_id, **body} for biz_id in ids], routing_key=queue.name, declare=[queue])


@contextmanager
def running(made: IdempotentConsumer, join: float = 10.0, **options: Any) -> Iterator[threading.Thread]:
    """`run` in a thread of its own; stopped and joined at the end."""
    thread = threading.Thread(target=made.run, kwargs=options, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        made.stop()
        thread.join(join)
        assert not thread.is_alive(), "run did not return after stop"


def poll(until: Callable[[], bool], timeout: float = 10.0) -> bool:
    """Wait for a condition that somebody else makes true."""
    deadline = time.monotonic() + timeout
    while not until():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Log:
    """What happened, in order: a `step` for the decorators, and a list for the handlers."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.fail: dict[str, list[BaseException | None]] = {}

    def __call__(self, name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.events.append(name)
        after = self.fail.get(name)
        error = after.pop(0) if after else None
        result = function(*args, **kwargs)
        if error is not None:
            raise error
        self.events.append(f"{name} done")
        return result

    def order(self, *names: str) -> list[str]:
        """The events, reduced to these."""
        return [event for event in self.events if event in names]
