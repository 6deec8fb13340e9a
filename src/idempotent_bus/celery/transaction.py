"""A task's call in the caller's transaction: committed with its effect, or not made at all.

`transaction.on_commit(lambda: task.delay(...))` loses the call if the process dies between the commit and the send.
Here the message is a row of the outbox in the same commit, and a relay sends it, under one inner-msg-id, until the
broker confirms it: `idempotent-bus relay`, or Django's `manage.py relay`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from celery.canvas import Signature
from kombu import Queue

from ..errors import ConfigurationError
from ..headers import INNER_MSG_ID
from .call import running_call
from .settings import option
from .stamping import Held, holding_back, install

__all__ = ["apply_in_transaction", "delay_in_transaction"]

#: What Celery tells its producer that is the relay's own matter.
_OF_THE_RELAY: Final = frozenset({"retry", "retry_policy", "timeout", "confirm_timeout", "delivery_mode", "mandatory"})


def apply_in_transaction(
    task: Any,
    connection: Any,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    outbox: Any = None,
    **options: Any,
) -> Any:
    """Call a task, or a signature, by the outbox in the transaction that is open on `connection`.

    connection: what `Outbox.add` takes: a SQLAlchemy connection or session, a Django connection, a driver's own.
    outbox: an `Outbox`; else that of the task or of `setup`, or one with the usual table. options: as for
        `apply_async`. A queue that the call is routed to is declared by the relay.

    Returns Celery's result. With `task_always_eager` the task is run at once, as everywhere. Raises what `apply_async`
    and `Outbox.add` raise; no broker is needed.
    """
    app = task.app
    if app.conf.task_always_eager:
        return task.apply_async(args, kwargs, **options)
    install(app)
    messages: list[Held] = []
    with holding_back(messages):
        result = task.apply_async(args, kwargs, **options)
    box = outbox or _outbox_of(task)
    for send in messages:
        send(_Adding(box, connection))
    return result


def delay_in_transaction(task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The same in the transaction of the task that is running here, or else in Django's."""
    call = running_call()
    if call is not None and call.handed is not None:
        return apply_in_transaction(task, call.handed, args, kwargs)
    try:
        from django.db import connections

        from ..django.conf import bus_settings
        from ..django.databases import check_atomic

        settings = bus_settings()
    except (ImportError, ConfigurationError) as error:
        raise _no_transaction() from error
    except Exception as error:
        if type(error).__name__ != "ImproperlyConfigured":
            raise
        raise _no_transaction() from error
    connection = connections[settings.database]
    check_atomic(connection, "a task's call in a transaction")
    return apply_in_transaction(task, connection, args, kwargs, outbox=option(task, "outbox") or _django_outbox())


class _Adding:
    """Stands in for a producer: what is published is a row of the outbox."""

    def __init__(self, outbox: Any, connection: Any) -> None:
        self._outbox = outbox
        self._connection = connection
        self.connection = self  # Celery asks it to translate a driver's errors; here there are none
        self.serializer = None

    def _reraise_as_library_errors(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def publish(self, body: Any, *, headers: dict[str, Any], declare: Any = None, **options: Any) -> None:
        """As kombu's, as far as Celery asks."""
        for name in _OF_THE_RELAY & options.keys():
            del options[name]
        queues = [entity for entity in declare or () if isinstance(entity, Queue)]
        if len(queues) == 1:
            options["declare"] = queues[0]
        inner_msg_id = headers.pop(INNER_MSG_ID)
        # kombu's entities cannot be compared with a text.
        given = {name: value for name, value in options.items() if value is not None and not _is_empty(value)}
        self._outbox.add(self._connection, body, headers=headers, inner_msg_id=inner_msg_id, **given)


def _is_empty(value: Any) -> bool:
    return isinstance(value, str) and not value


def _outbox_of(task: Any) -> Any:
    from ..outbox import Outbox

    own = None if isinstance(task, Signature) else option(task, "outbox")
    return own or Outbox()


def _django_outbox() -> Any:
    from ..django.outbox import add

    return _DjangoOutbox(add)


class _DjangoOutbox:
    def __init__(self, add: Any) -> None:
        self._add = add

    def add(self, _connection: Any, body: Any, **options: Any) -> Any:
        """On Django's connection, with the table prefix and defaults of its settings."""
        return self._add(body, **options)


def _no_transaction() -> ConfigurationError:
    return ConfigurationError(
        "no transaction is open here: call this within a task that has an inbox, or in Django's transaction.atomic, or "
        "give the connection: task.apply_in_transaction(connection, args, kwargs)"
    )
