"""Celery's way of sending a task message, with an inner-msg-id put on each: the upper half inside Celery.

It is put on where the message is made, outside of Celery's and kombu's loops of resends, so that every resend carries
the same id; and not in a signal, whose errors Celery swallows. What a task publishes by `retry` or `replace` leaves
only after its claim was given back (`holding_back`): the new message would find it busy.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final

from celery import Celery
from celery._state import get_current_worker_task
from celery.app.amqp import AMQP
from kombu.exceptions import OperationalError

from ..errors import ConfigurationError, PublishError
from ..headers import INNER_MSG_ID
from ..kombu_message import is_of_the_broker
from .confirming import ConfirmingPool
from .ids import frozen, id_of
from .outcomes import PutOff

__all__ = ["Held", "StampingAMQP", "has_succeeded", "holding_back", "install"]

#: Ours, and true of one message only: a retry copies the headers of the message that it repeats.
_OF_ONE_MESSAGE: Final = "idempotent-bus-"
#: What Celery puts on every task message: most messages have no other headers to look at.
# fmt: off
_OF_CELERY: Final = {
    "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id",
    "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers",
    "stamps",
}
# fmt: on
#: Seconds after which a task whose follow-up could not be sent is looked at again.
_AGAIN: Final = 5.0

#: A task message that was not sent: a function that sends it, with a producer or, given None, with one of the app's.
Held = Callable[[Any], Any]

_held: ContextVar[list[Held] | None] = ContextVar("idempotent_bus_held", default=None)
#: Set on the request of a guarded task that has succeeded: what is published from then on follows from it.
_DONE: Final = "_idempotent_bus_done"


@contextlib.contextmanager
def holding_back(messages: list[Held]) -> Iterator[None]:
    """Task messages that are sent here are kept as functions that send them."""
    token = _held.set(messages)
    try:
        yield
    finally:
        _held.reset(token)


def has_succeeded(request: Any) -> None:
    """What is published for this request from now on follows from a guarded task that has succeeded.

    If it cannot be sent, the task's message is kept and comes back, and then its stored result is sent on: Celery would
    call the task failed, and the chain would end although the effect is there.
    """
    setattr(request, _DONE, True)


class StampingAMQP(AMQP):
    """Celery's own, and each task message gets an inner-msg-id. See `install`.

    confirms: on AMQP each message is confirmed by its own number before `apply_async` returns.
    """

    confirms = False
    _producer_pool: Any

    def _create_task_sender(self) -> Callable[..., Any]:
        send = super()._create_task_sender()
        app = self.app

        @functools.wraps(send)
        def send_task_message(producer: Any, name: str, message: Any, **options: Any) -> Any:
            options, message = _stamped(message, options)
            if "once" in options:
                raise ConfigurationError(f"once is an option of tasks with a scope; {name} has none")
            held = _held.get()
            if held is not None:
                held.append(functools.partial(_send_later, app, send, name, message, options))
                return None
            try:
                return send(producer, name, message, **options)
            except (OperationalError, PublishError, OSError) as error:
                parent = get_current_worker_task()
                if parent is None or not getattr(parent.request, _DONE, False):
                    raise
                why = f"{name}, which follows from it, could not be sent ({type(error).__name__})"
                raise PutOff(why, _AGAIN) from error

        return send_task_message

    @property
    def producer_pool(self) -> Any:
        """Celery's, or with `confirms` one whose producers wait for the confirm."""
        if self._producer_pool is None and self.confirms:
            pool = self.app.pool
            self._producer_pool = ConfirmingPool(pool, limit=pool.limit)
        return super().producer_pool

    publisher_pool = producer_pool


def install(app: Celery, *, confirms: bool = False) -> None:
    """Have this app stamp its task messages. Called again, it only adds the confirms."""
    amqp = app.amqp
    if not isinstance(amqp, StampingAMQP):
        cls = type(amqp)
        stamping = StampingAMQP if cls is AMQP else type(f"Stamping{cls.__name__}", (StampingAMQP, cls), {})
        # The object stays: queues and routes that were set on it are the user's. Its class's name goes to copies of
        # the app.
        amqp.__class__ = stamping
        app.amqp_cls = stamping
        amqp.__dict__.pop("send_task_message", None)
    if confirms and not amqp.confirms:
        amqp.confirms = True
        amqp._producer_pool = None


def _stamped(message: Any, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    headers = {**message.headers, **(options.get("headers") or {})}
    about = message.headers if "id" in message.headers else message.body  # protocol 1 has it in the body
    inner_msg_id = id_of(str(about["id"]), int(about.get("retries") or 0), int(about.get("replaced_task_nesting") or 0))
    for name in headers.keys() - _OF_CELERY:
        if is_of_the_broker(name) or name.startswith(_OF_ONE_MESSAGE):
            del headers[name]
    headers[INNER_MSG_ID] = inner_msg_id
    body = message.body
    if isinstance(body, tuple) and isinstance(body[2], Mapping) and (body[2]["callbacks"] or body[2]["errbacks"]):
        embed = dict(body[2])
        for name in ("callbacks", "errbacks"):
            if embed[name]:
                embed[name] = [frozen(one) if isinstance(one, Mapping) else one for one in embed[name]]
        message = message._replace(body=(*body[:2], embed))
    # A derived id tells no time, and a consumer must know how old a message is.
    options = {**options, "headers": None, "timestamp": int(time.time())}
    return options, message._replace(headers=headers)


def _send_later(
    app: Celery, send: Callable[..., Any], name: str, message: Any, options: dict[str, Any], producer: Any
) -> None:
    with app.producer_or_acquire(producer) as acquired:
        send(acquired, name, message, **options)
