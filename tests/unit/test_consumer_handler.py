"""The guarded handler as an object: what it wraps, how it is bound, and what it refuses to wrap."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection, Consumer, Queue
from kombu.message import Message

from idempotent_bus import (
    INNER_MSG_ID,
    Backoff,
    ConfigurationError,
    Ended,
    IdempotentConsumer,
    InvalidScope,
    current_execution,
    idempotent_consumer,
)
from idempotent_bus.handler import IdempotentHandler
from idempotent_bus.stores.memory import MemoryStore


def guard(**options: Any) -> Any:
    return idempotent_consumer(MemoryStore(), **{"scope": "cards.issue", "biz_id": "id", **options})


@pytest.fixture
def deliver(unique: str) -> Iterator[Any]:
    """Publishes bodies on a memory broker and lets a callback have them."""
    connection = Connection("memory://", transport_options={"polling_interval": 0.0})
    queue = Queue(unique)

    def deliver(callback: Any, *bodies: Any) -> list[Any]:
        answers: list[Any] = []
        producer = connection.Producer()
        for body in bodies:
            producer.publish(body, routing_key=unique, declare=[queue])
        with Consumer(connection, [queue], callbacks=[lambda b, m: answers.append(callback(b, m))]):
            for _ in bodies:
                connection.drain_events(timeout=1)
        return answers

    yield deliver
    connection.channel().queue_delete(unique)
    connection.release()


def test_it_looks_like_what_it_wraps() -> None:
    """Name, docstring, module and signature are the handler's; `__wrapped__` is the handler itself."""

    def issue(body: dict[str, Any], message: Message) -> str:
        """Issues a card."""
        return "card"

    issue.owner = "team cards"  # type: ignore[attr-defined]
    guarded = guard()(issue)
    assert guarded.__wrapped__ is issue
    assert (guarded.__name__, guarded.__doc__, guarded.__module__) == ("issue", "Issues a card.", __name__)
    assert guarded.owner == "team cards"
    assert inspect.signature(guarded) == inspect.signature(issue)
    assert guarded.__wrapped__({}, None) == "card"
    assert callable(guarded)
    assert guarded.scope == "cards.issue"
    assert guarded.dead_letter == "cards.issue.dead"


class Cards:
    """A service with guarded methods of every kind."""

    made: list[Any] = []  # noqa: RUF012 - emptied by the test

    @guard(scope="s.method")
    def method(self, body: Any, message: Message) -> Any:
        self.made.append((self, body["id"]))
        return "method"

    @guard(scope="s.class.under")
    @classmethod
    def class_under(cls, body: Any, message: Message) -> Any:
        cls.made.append((cls, body["id"]))
        return "class"

    @guard(scope="s.static.under")
    @staticmethod
    def static_under(body: Any, message: Message) -> Any:
        Cards.made.append((None, body["id"]))
        return "static"

    @staticmethod
    @guard(scope="s.static.over")
    def static_over(body: Any, message: Message) -> Any:
        Cards.made.append((None, body["id"]))
        return "static"


def test_methods_are_bound_as_python_binds_them(deliver: Any) -> None:
    """Two instances each run with their own self; class and static methods get what they would get unguarded."""
    Cards.made.clear()
    one, two = Cards(), Cards()
    assert deliver(one.method, {"id": "1"}) == ["method"]
    assert deliver(two.method, {"id": "2"}, {"id": "1"}) == ["method", "method"]
    assert deliver(one.class_under, {"id": "3"}) == ["class"]
    assert deliver(Cards.class_under, {"id": "4"}) == ["class"]
    assert deliver(one.static_under, {"id": "5"}) == ["static"]
    assert deliver(Cards.static_over, {"id": "6"}) == ["static"]
    assert Cards.made == [(one, "1"), (two, "2"), (Cards, "3"), (Cards, "4"), (None, "5"), (None, "6")]
    assert isinstance(one.method, IdempotentHandler)
    assert one.method.__wrapped__ is Cards.method.__wrapped__
    assert Cards.method is Cards.__dict__["method"]


def test_a_callable_object_and_a_partial_work(deliver: Any) -> None:
    """What is callable with (body, message) can be guarded, with or without a name of its own."""

    class Issuer:
        def __call__(self, body: Any, message: Message) -> str:
            return "object"

    def issue(prefix: str, body: Any, message: Message) -> str:
        return prefix + body["id"]

    assert deliver(guard()(Issuer()), {"id": "a"}) == ["object"]
    assert deliver(guard()(functools.partial(issue, "card ")), {"id": "a"}) == ["card a"]


async def _coroutine(body: Any, message: Any) -> None: ...


async def _async_generator(body: Any, message: Any) -> Any:
    yield


def _generator(body: Any, message: Any) -> Any:
    yield


class _AsyncCallable:
    async def __call__(self, body: Any, message: Any) -> None: ...


@pytest.mark.parametrize(
    "handler",
    [
        _coroutine,
        _async_generator,
        _generator,
        _AsyncCallable(),
        functools.partial(_coroutine, {}),
        classmethod(_coroutine),
    ],
)
def test_what_runs_nothing_when_called_is_refused(handler: Any) -> None:
    """A coroutine function would be acked without its effect, so it cannot be guarded."""
    with pytest.raises(ConfigurationError, match="plain function"):
        guard()(handler)


def test_a_coroutine_that_comes_back_is_a_failure(deliver: Any) -> None:
    """A lambda can hide a coroutine function: what it returns has not run, and is not acked as if it had."""
    handle = guard(max_attempts=1)(lambda body, message: _coroutine(body, message))
    assert deliver(handle, {"id": "a"}) == [None]
    with Connection("memory://") as connection:
        message = connection.channel().basic_get("cards.issue.dead")
        assert message.headers["idempotent-bus-dead-reason"] == "permanent"
        message.ack()
        connection.channel().queue_delete("cards.issue.dead")


def test_a_cancelled_task_is_a_failure(unique: str) -> None:
    """I12: asyncio's CancelledError is no Exception, but it ends the handler's own event loop, and not the consumer."""
    attempts: list[int] = []

    async def give_up() -> None:
        raise asyncio.CancelledError

    @guard(scope=unique, max_attempts=2, backoff=Backoff(0.001, 0.001))
    def handler(body: Any, message: Message) -> None:
        attempts.append(current_execution().attempt)
        asyncio.run(give_up())

    connection, queue = Connection("memory://", transport_options={"polling_interval": 0.0}), Queue(unique)
    connection.Producer().publish({"id": "a"}, routing_key=unique, declare=[queue])
    made = IdempotentConsumer(connection, {queue: handler})
    made.run(idle_timeout=0.01)
    assert attempts == [1, 2]
    assert made.endings == {Ended.FAILED: 1, Ended.DEAD: 1}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"biz_id": ""}, ConfigurationError),
        ({"biz_id": 7}, ConfigurationError),
        ({"biz_id": None}, ConfigurationError),
        ({"scope": ""}, InvalidScope),
        ({"scope": "a\nb"}, InvalidScope),
        ({"dead_letter": ""}, ConfigurationError),
        ({"dead_letter": 7}, ConfigurationError),
        ({"fingerprint": 7}, ConfigurationError),
        ({"max_attempts": 0}, ConfigurationError),
        ({"lease": 0}, ConfigurationError),
        ({"permanent": ValueError}, ConfigurationError),
    ],
)
def test_wrong_settings_are_refused_when_the_handler_is_made(options: dict[str, Any], error: type[Exception]) -> None:
    """Nobody has to publish a message to learn that a setting cannot be right."""
    with pytest.raises(error):
        guard(**options)(lambda body, message: None)


def test_a_guarded_handler_is_not_guarded_again() -> None:
    """Two scopes on one function would settle one message twice."""
    with pytest.raises(ConfigurationError, match="guarded already"):
        guard()(guard()(lambda body, message: None))


def test_calling_it_by_hand_says_how() -> None:
    """Without a kombu message there is nothing to ack: the error names `__wrapped__`."""
    with pytest.raises(ConfigurationError, match="__wrapped__"):
        guard()(lambda body, message: None)({"id": "a"}, None)


def test_the_inner_msg_id_may_be_the_id(deliver: Any, unique: str) -> None:
    """biz_id=INNER_MSG_ID takes the bus's own id; a message without one goes to the dead letter."""
    ran: list[Any] = []
    handle = guard(scope=unique, biz_id=INNER_MSG_ID)(lambda body, message: ran.append(body))
    deliver(handle, {"x": 1})
    assert ran == []
    with Connection("memory://") as connection:
        message = connection.channel().basic_get(f"{unique}.dead")
        assert "inner-msg-id" in message.headers["idempotent-bus-dead-error"]
        message.ack()
        connection.channel().queue_delete(f"{unique}.dead")


@pytest.mark.parametrize(
    ("handlers", "options"),
    [
        ({}, {}),
        ({Queue("q"): print}, {}),
        ({"q": guard()(lambda body, message: None)}, {}),
        ({Queue("q"): guard()(lambda body, message: None)}, {"prefetch": 0}),
    ],
)
def test_a_consumer_refuses_what_it_cannot_serve(handlers: Any, options: dict[str, Any]) -> None:
    """No queue, an unguarded handler, a name instead of a queue, no prefetch: refused with the reason."""
    with pytest.raises(ConfigurationError):
        IdempotentConsumer(Connection("memory://"), handlers, **options)


def test_a_consumer_refuses_two_handlers_for_one_queue() -> None:
    """kombu would give each message to one of the two."""
    handle = guard()(lambda body, message: None)
    with pytest.raises(ConfigurationError, match="two handlers"):
        IdempotentConsumer("memory://", {Queue("q"): handle, Queue("q", routing_key="other"): handle})
