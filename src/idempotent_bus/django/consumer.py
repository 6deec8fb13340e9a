"""`@transactional_consumer`: a guarded handler in `transaction.atomic`, whose effect and record are one commit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from django.db import connections
from django.db.utils import Error as DjangoError
from kombu.message import Message

from ..admission import MAX_BODY
from ..events import Listener, notifier
from ..handler import HandlerR, IdempotentHandler
from ..hooks import Step, direct
from ..identity import BizIdSpec, FingerprintSpec
from ..inbox import Inbox
from ..inbox.records import Records
from ..inbox.running import Transactions
from ..inbox.transaction import Opened, opened
from ..policy import Backoff, Policy
from ..results import MAX_RESULT_BYTES
from ..signing import Trust
from ..work import Ending, Work
from .borrowed import Borrowed, Handed
from .conf import bus_settings
from .databases import dialect_of, known

_OURS = "connecting"

__all__ = ["DjangoInbox", "transactional_consumer"]


class DjangoInbox(Inbox):
    """The inbox in a database of a Django project, on the connection that this thread has there.

    using: its alias. Its table is made by the migrations. Safe for threads.
    """

    #: What runs work in it.
    transactions: type[Transactions]

    def __init__(self, using: str, table_prefix: str) -> None:
        super().__init__(None, table_prefix=table_prefix, create=False)
        self.using = using
        self._learning = threading.Lock()

    @property
    def records(self) -> Records:
        """The statements for the database, which has been connected to."""
        return self._learn()[1]

    @contextlib.contextmanager
    def transaction(self, *, apart: bool = False) -> Iterator[Opened]:
        """As `Inbox.transaction`: an outermost atomic block, rolled back at the end unless it was committed."""
        dialect, records = self._learn()
        borrowed: Any = Borrowed(self.using, dialect)
        make: Any = Handed
        with opened(borrowed, records, make) as made:
            yield made

    def _learn(self) -> tuple[Any, Records]:
        found = self.__dict__.get("_known")
        if found is None:
            with self._learning:
                connection = connections[self.using]
                try:
                    dialect = dialect_of(connection)
                except DjangoError as error:  # the inbox knows SQLAlchemy's: nothing runs, nothing is acked
                    raise sa.exc.OperationalError(_OURS, None, error, hide_parameters=True) from error
                found = self.__dict__["_known"] = dialect, Records(self._tables, dialect)
        return found


class _Transactions(Transactions):
    """With Django's housekeeping around each message, or each window, as it is around each request."""

    def handle(self, work: Work) -> Ending:
        with _housekeeping():
            return super().handle(work)

    def handle_window(self, works: Sequence[Work]) -> list[Ending]:
        with _housekeeping():
            return super().handle_window(works)

    def call(self, work: Work, opened: Opened, attempt: int) -> Any:
        run = functools.partial(_run, work.run)
        return super().call(dataclasses.replace(work, run=run), opened, attempt)


DjangoInbox.transactions = _Transactions


def _run(run: Callable[[], Any], handed: Handed) -> Any:
    """Run a handler that writes with the ORM, in the transaction that is open."""
    try:
        value = run()
    except DjangoError as error:
        ended = handed.pass_on(error)
        if ended is None:
            raise
        raise ended from error
    handed.check_usable()
    return value


@contextlib.contextmanager
def _housekeeping() -> Iterator[None]:
    _leave_inherited()
    _close_old_connections()
    try:
        yield
    finally:
        _close_old_connections()


def _close_old_connections() -> None:
    """As Django's; but one in which a block is open, a test's for instance, is not closed under its feet."""
    for connection in connections.all(initialized_only=True):
        if not connection.in_atomic_block:
            connection.close_if_unusable_or_obsolete()


#: The process that this thread's connections belong to, and those of a parent's: they must not even be closed here.
_process = os.getpid()
_inherited: list[Any] = []


def _leave_inherited() -> None:
    """After a fork (the worker's, say): a connection that the parent had opened is the parent's."""
    global _process
    if _process == os.getpid():
        return
    _process = os.getpid()
    for connection in connections.all(initialized_only=True):
        if connection.connection is not None:
            _inherited.append(connection.connection)
            connection.connection = None


def transactional_consumer(
    *,
    scope: str,
    biz_id: BizIdSpec,
    using: str | None = None,
    fingerprint: FingerprintSpec = True,
    retention: float | None = None,
    max_attempts: int = 8,
    backoff: Backoff = Backoff(),  # noqa: B008 - frozen
    permanent: tuple[type[BaseException], ...] = (),
    busy_delay: float = 1.0,
    dead_letter: str | None = None,
    backoffs: Mapping[type[BaseException], Backoff] | None = None,
    max_result: int = MAX_RESULT_BYTES,
    listener: Listener | None = None,
    tenant: str = "",
    trust: Trust | None = None,
    max_body: int | None = MAX_BODY,
    step: Step = direct,
) -> Callable[[Callable[[Any, Message], HandlerR]], IdempotentHandler[[Any, Message], HandlerR]]:
    """Run the handler once for each business id, in `transaction.atomic(using)` with the record; ack after the commit.

    The handler is called with `(body, message)` and writes with the ORM. What it raises rolls back its rows, its
    messages in the outbox and the record alike. Its `on_commit` hooks run after the commit and before the ack; what
    must not be lost between the two belongs into the outbox. It must not be durable itself: `atomic(durable=True)`
    refuses to be within another block. After a deadlock or a serialization failure it is called again, in a new
    transaction.

    using: the alias of the database where its effect is; `IDEMPOTENT_BUS["DATABASE"]` if not given. retention: seconds;
    `IDEMPOTENT_BUS["RETENTION_DAYS"]` if not given. All else is as in `idempotent_bus.transactional_consumer`. Old
    connections are closed around each message or window, as Django does around each request: with CONN_MAX_AGE 0 that
    is a new connection each time.

    Raises InvalidScope or ConfigurationError at once if something cannot be right.
    """
    settings = bus_settings()
    alias = settings.database if using is None else using
    known(alias)
    policy = Policy(
        retention=settings.retention if retention is None else retention,
        max_attempts=max_attempts,
        backoff=backoff,
        busy_delay=busy_delay,
        permanent=permanent,
        backoffs=backoffs or {},
    )
    inbox = DjangoInbox(alias, settings.table_prefix)
    executor = inbox.transactions(inbox, policy, notify=notifier(listener), max_result=max_result, step=step)

    def decorate(handler: Callable[[Any, Message], HandlerR]) -> IdempotentHandler[[Any, Message], HandlerR]:
        return IdempotentHandler(
            handler,
            executor,
            scope=scope,
            biz_id=biz_id,
            fingerprint=fingerprint,
            dead_letter=dead_letter,
            tenant=tenant,
            trust=trust,
            max_body=max_body,
        )

    return decorate
