"""Celery without processes: what an app publishes is caught, and each message is run as often as a test likes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import fakeredis
import pytest
from celery import Celery
from celery.app.trace import build_tracer
from kombu import Producer

from idempotent_bus.celery import PutOff, setup
from idempotent_bus.headers import INNER_MSG_ID
from idempotent_bus.stores.memory import MemoryStore

#: What `publish` got: the body (args, kwargs, embedded), and the options with the headers.
Sent = tuple[Any, dict[str, Any]]


@dataclass
class Wire:
    """An app, and all that it has published. edge: a second message with the same inner-msg-id is not taken."""

    app: Celery
    sent: list[Sent] = field(default_factory=list)
    refused: int = 0
    runs: Counter[str] = field(default_factory=Counter)

    def take(self, body: Any, options: dict[str, Any]) -> None:
        """Take a publish, as a broker does that has an edge."""
        if "task" not in options["headers"] and "task" not in body:
            return  # a result, or an event
        inner_msg_id = options["headers"][INNER_MSG_ID]
        if any(one["headers"][INNER_MSG_ID] == inner_msg_id for _, one in self.sent):
            self.refused += 1
            return
        self.sent.append((json.loads(json.dumps(body)), options))

    def deliver(self, sent: Sent) -> float | None:
        """Run one message as a worker does. Returns the seconds for which it is put off, if it is."""
        (args, kwargs, embedded), options = sent
        headers = options["headers"]
        task = self.app.tasks[headers["task"]]
        request = {**headers, **embedded, "args": args, "kwargs": kwargs, "is_eager": False, "called_directly": False}
        request.update(delivery_info={}, properties={"timestamp": options.get("timestamp")}, hostname="here")
        trace = build_tracer(task.name, task, app=self.app, propagate=False)
        outcome = trace(headers["id"], args, kwargs, request)
        error = getattr(outcome.retval, "exception", None)
        error = getattr(error, "exc", error)
        return error.delay if isinstance(error, PutOff) else None

    def flow(self, copies: int) -> None:
        """Run everything that was published, and what follows from it, each message so often."""
        at = 0
        while at < len(self.sent):
            for _ in range(copies):
                self.deliver(self.sent[at])
            at += 1
            assert at < 200, "it does not end"

    @property
    def ids(self) -> list[str]:
        return [options["headers"][INNER_MSG_ID] for _, options in self.sent]

    @property
    def tasks(self) -> Counter[str]:
        return Counter(options["headers"]["task"] for _, options in self.sent)


def make_wire(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Wire:
    """An app with a store in memory, no broker and a result backend in memory."""
    app = Celery("wire", broker="memory://", backend="redis://nowhere.invalid")  # the current one, as in a worker
    app.backend.__dict__["client"] = fakeredis.FakeRedis()
    app.backend.result_consumer = _NobodyWaits()
    wire = Wire(app)

    def publish(self: Producer, body: Any, **given: Any) -> None:
        wire.take(body, given)

    monkeypatch.setattr(Producer, "publish", publish)
    setup(app, store=MemoryStore(), **options)
    return wire


class _NobodyWaits:
    """No results are waited for."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self
