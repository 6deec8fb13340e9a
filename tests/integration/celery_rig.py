"""Celery workers in processes of their own, for the tests of the Celery integration: one queue, log and store each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import celery_tasks
import pytest
import redis
from celery import Celery
from kombu import Connection
from kombu.message import Message

import servers
from idempotent_bus import delays
from idempotent_bus.headers import INNER_MSG_ID
from sql_bus import Bus, drop

HERE = Path(__file__).parent
#: Where a test's application lives: broker, kind of queue, pool.
RABBITMQ = ("rabbitmq", "rabbitmq-quorum")


def until(condition: Callable[[], Any], seconds: float = 20.0, what: str = "it") -> Any:
    """Poll for a condition; its value, or a failure after the deadline."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.03)
    return value


@dataclass
class Place:
    """One application on one broker, and its workers.

    kind: "ours-redis", "redis" (kombu's), "rabbitmq", "rabbitmq-quorum" or "ours-postgresql". guarded: False: the same
    tasks as Celery's own, acked late, for the controls. environment: what its workers have, besides this process's.
    """

    kind: str
    folder: Path
    guarded: bool = True
    more: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    name: str = field(default_factory=lambda: f"ct{uuid.uuid4().hex[:10]}")
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        url = servers.rabbitmq() if self.kind in RABBITMQ else servers.real_redis()
        options: dict[str, Any] = {}
        if self.kind == "ours-postgresql":
            url = f"sqla+{servers.postgresql()}"
            names = {"queue_tablename": f"{self.name}_queue", "message_tablename": f"{self.name}_message"}
            options = {**names, "visibility_timeout": 20}
        elif self.kind not in RABBITMQ:
            options = {"global_keyprefix": f"{self.name}:", "visibility_timeout": 20}
        self.settings: dict[str, Any] = {
            "name": self.name, "guarded": self.guarded, "broker": url, "options": options,
            "arguments": {"x-queue-type": "quorum"} if self.kind == "rabbitmq-quorum" else {},
            "backend": servers.real_redis(), "store": servers.real_redis(), "lease": 60.0,
            "store_options": {"prefix": f"{self.name}:"}, "log": str(self.folder / "log"),
        }  # fmt: skip
        options.update(self.more.pop("options", {}))
        self.settings.update(self.more)
        if self.kind == "redis":  # stays kombu's own
            self.settings["setup"] = {"edge": False, **self.settings.get("setup", {})}
        self.folder.mkdir(exist_ok=True)
        Path(self.settings["log"]).touch()
        self.app: Celery = celery_tasks.make(self.settings)
        self.t: Any = self.app.t

    # --- workers --------------------------------------------------------------------------------------

    def start(self, pool: str = "prefork", concurrency: int = 4, *options: str) -> subprocess.Popen[bytes]:
        """One worker more, in a process group of its own; returns when it consumes."""
        node = f"{uuid.uuid4().hex[:8]}@{self.name}"
        command = [
            sys.executable, "-m", "celery", "-A", "celery_tasks", "worker", "-P", pool, "-c", str(concurrency),
            "-n", node, "-l", "INFO", "--without-gossip", "--without-mingle", "--without-heartbeat", *options,
        ]  # fmt: skip
        said = self.folder / f"{node}.txt"
        with said.open("wb") as output:
            worker = subprocess.Popen(
                command,
                cwd=HERE,
                env={**os.environ, **self.environment, celery_tasks.VARIABLE: json.dumps(self.settings)},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        worker.said = said  # type: ignore[attr-defined]
        self.workers.append(worker)
        until(lambda: " ready." in said.read_text() or worker.poll() is not None, 40, "the worker's start")
        assert worker.poll() is None, said.read_text()[-3000:]
        return worker

    def stop(self, worker: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
        """End a worker: SIGKILL for all its processes, anything else for the parent only."""
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(worker.pid, number)
            else:
                worker.send_signal(number)
        worker.wait(30)

    def said(self) -> str:
        """What the workers have logged."""
        return "".join(worker.said.read_text() for worker in self.workers)  # type: ignore[attr-defined]

    # --- what happened --------------------------------------------------------------------------------

    def runs(self, word: str, pid: str) -> int:
        """How often a task has noted this."""
        return Path(self.settings["log"]).read_text().splitlines().count(f"{word} {pid}")

    def stays(self, word: str, pid: str, number: int = 1, seconds: float = 1.5) -> None:
        """It was noted so often, and is not noted again."""
        until(lambda: self.runs(word, pid) >= number, what=f"{word} {pid}")
        time.sleep(seconds)
        assert self.runs(word, pid) == number

    def dead(self, word: str, timeout: float = 10.0) -> Message | None:
        """Take one message out of a task's dead letter."""
        with self.connect() as connection:
            deadline = time.monotonic() + timeout
            while True:
                channel = connection.channel()
                try:
                    message = channel.basic_get(f"{self.name}.{word}.dead", no_ack=True)
                except connection.channel_errors:  # no such queue yet
                    message = None
                if message is not None:
                    return message if isinstance(message, Message) else channel.message_to_python(message)
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.05)

    # --- messages -------------------------------------------------------------------------------------

    def connect(self) -> Connection:
        """The application's broker, by a plain kombu connection."""
        conf = self.app.conf
        return Connection(conf.broker_url, transport_options=dict(conf.broker_transport_options))

    @contextlib.contextmanager
    def copied(self, copies: int, *, same_id: bool = True) -> Iterator[None]:
        """What is sent here is sent so often, past the edge: as a broker does that has lost an ack.

        same_id: with the same inner-msg-id; otherwise each copy gets a fresh one, as a sender who knows no edge.
        """
        sent: list[tuple[Any, ...]] = []
        original = self.app.amqp.__dict__.get("send_task_message")
        send = self.app.amqp.send_task_message

        def record(producer: Any, name: str, message: Any, **options: Any) -> Any:
            with self.app.connection_for_write() as connection:
                catching = _Catching(connection)
                result = send(catching, name, message, **options)
                sent.extend(catching.sent)
            return result

        self.app.amqp.__dict__["send_task_message"] = record
        try:
            yield
        finally:
            self.app.amqp.__dict__.pop("send_task_message", None)
            if original is not None:
                self.app.amqp.__dict__["send_task_message"] = original
        with self.connect() as connection:
            channel = connection.channel()
            for body, options in sent:
                for number in range(copies):
                    headers = dict(options["headers"])
                    if not same_id and number:
                        headers[INNER_MSG_ID] = celery_id(number, headers[INNER_MSG_ID])
                    _put(channel, self.name, body, {**options, "headers": headers})

    def clean_up(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                self.stop(worker)
        self.app.close()
        if self.kind in RABBITMQ:
            names = [self.name, *(f"{task}.dead" for task in self.app.tasks if task.startswith(self.name))]
            with self.connect() as connection:
                channel = connection.channel()
                for name in names:
                    channel.queue_delete(name)
                    channel.queue_delete(delays.return_queue(name).name)
                channel.exchange_delete(self.name)
        if self.kind == "ours-postgresql":
            drop(Bus(servers.postgresql(), self.settings["options"]))
        client = redis.Redis.from_url(servers.real_redis())
        for key in client.scan_iter(f"*{self.name}*", count=1000):
            client.delete(key)
        client.close()


def celery_id(number: int, source: str) -> str:
    from idempotent_bus.msgid import derived_inner_msg_id

    return derived_inner_msg_id(source.encode(), f"copy {number}")


class _Catching:
    """A kombu producer that keeps what it would publish."""

    def __init__(self, connection: Connection) -> None:
        self._producer = connection.Producer(auto_declare=False)
        self.sent: list[tuple[Any, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def publish(self, body: Any, **options: Any) -> None:
        self.sent.append((body, options))


def _put(channel: Any, queue: str, body: Any, options: dict[str, Any]) -> None:
    """Publish as Celery would, but into the queue itself: past the edge of a transport of ours."""
    from kombu.serialization import dumps

    content_type, encoding, data = dumps(body, serializer=options.get("serializer"))
    known = ("correlation_id", "reply_to", "timestamp", "priority")
    properties = {name: options[name] for name in known if options.get(name) is not None}
    message = channel.prepare_message(
        data,
        properties.pop("priority", 0),
        content_type,
        encoding,
        options["headers"],
        {**properties, "delivery_mode": 2},
    )
    if hasattr(channel, "_put"):
        channel._inplace_augment_message(message, queue, queue)
        channel._put(queue, message)
    else:
        channel.basic_publish(message, exchange="", routing_key=queue)


@contextlib.contextmanager
def place(
    kind: str, folder: Path, *, guarded: bool = True, environment: dict[str, str] | None = None, **more: Any
) -> Iterator[Place]:
    """An application that is cleaned up, with its workers, whatever happens."""
    made = Place(kind, folder, guarded, more, environment or {})
    try:
        yield made
    finally:
        made.clean_up()


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A guarded application with one worker, shared by the tests of a module: `@on("ours-redis:prefork", ...)`."""
    kind, _, pool = request.param.partition(":")
    with place(kind, tmp_path_factory.mktemp("site")) as made:
        made.start(pool or "prefork")
        yield made


def on(*names: str) -> pytest.MarkDecorator:
    """Run the test over these applications."""
    return pytest.mark.parametrize("site", names, indirect=True, scope="module")
