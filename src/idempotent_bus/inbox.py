"""The transactional lower half: the record is inserted in the same transaction as the handler's writes.

Effect and record commit together or not at all (I3), so a copy finds either both or neither: one effect, exactly
(I2). The transaction is the lock: a copy that arrives meanwhile waits for it briefly, and then comes back later. A
COMMIT whose reply was lost is settled by inserting again, which waits for the first and then meets its record, never
by a SELECT, which could look too early (I15).

Attempts are counted in a transaction of their own: after a handler raised, and before a message is run that the
broker says was delivered before, since then the last run may have died.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from . import schema
from .dialects import NOW_US, is_contention
from .errors import ConfigurationError, HandlerAcknowledged, Permanent
from .handler import MAX_BODY, HandlerP, HandlerR, IdempotentHandler
from .hooks import ACK, CLAIM, COMMIT, DEAD_LETTER, HANDLER, RELEASE, WAIT, Step, direct
from .identity import BizIdSpec, FingerprintSpec
from .model import Reason
from .policy import DAY, Backoff, Policy
from .results import decode_result, encode_result, last_line
from .signing import Trust
from .work import Ended, Ending, Settlement, Work

__all__ = ["Inbox", "transactional_consumer"]

log = logging.getLogger(__name__)

#: How often a transaction is repeated at once, after a deadlock, a serialization failure or an unknown COMMIT.
_TRIES: Final = 4
#: How long a copy waits in the database for the transaction that holds its record, before it comes back later.
_LOCK_WAIT_MS: Final = 1000

# As libpq numbers the states of a transaction.
_IDLE: Final = 0
_IN_ERROR: Final = 3

# The earlier value comes back from the statement that sets the new one: it may be the session's, not the server's.
_LIMIT_WAIT: Final = sa.text(
    "WITH earlier AS MATERIALIZED (SELECT current_setting('lock_timeout') AS wait) "
    "SELECT wait FROM earlier WHERE set_config('lock_timeout', :wait, true) IS NOT NULL"
)
_RESTORE_WAIT: Final = sa.text("SELECT set_config('lock_timeout', :wait, true)")

# Both have INSERT ... ON CONFLICT, each under a class of its own.
_INSERTS: Final[dict[str, Any]] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}


class Inbox:
    """The records of what was handled, in the database where the effects are.

    engine: yours; each message takes one connection of it for one transaction. create: make the table at the first
    use; switch it off where your migrations do that (`schema.metadata`). Safe for threads. SQLite and PostgreSQL.
    """

    def __init__(
        self,
        engine: sa.Engine,
        *,
        table_prefix: str = schema.PREFIX,
        database_schema: str | None = None,
        create: bool = True,
    ) -> None:
        if engine.dialect.name not in _INSERTS:
            raise ConfigurationError(f"the inbox works on SQLite and PostgreSQL, not yet on {engine.dialect.name}")
        self.engine = engine
        self._tables = schema.metadata(table_prefix, database_schema, parts=("inbox",))
        self._table = schema.inbox(self._tables)
        self._insert = _INSERTS[engine.dialect.name]
        self._now = sa.literal_column(NOW_US[engine.dialect.name], sa.BigInteger)
        self._created = not create
        self._creating = threading.Lock()

    def connect(self) -> sa.Connection:
        """A connection for one transaction; at the first call the table is created."""
        if not self._created:
            with self._creating:
                if not self._created:
                    schema.create(self.engine, self._tables)
                    self._created = True
        return self.engine.connect()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[tuple[sa.Connection, sa.RootTransaction]]:
        """A transaction that is rolled back at the end unless it was committed. Raises ConfigurationError if the
        engine commits each statement by itself, since record and effect would not be one commit.
        """
        with self.connect() as connection:
            transaction = connection.begin()
            try:
                driver = connection.connection.dbapi_connection
                if _commits_by_itself(connection, driver):
                    raise ConfigurationError(
                        "the inbox needs transactions, and this engine is in autocommit: a record would be durable "
                        "without its effect. Give it an engine without isolation_level='AUTOCOMMIT'"
                    )
                yield connection, transaction
            finally:
                if transaction.is_active:
                    with contextlib.suppress(sa.exc.DBAPIError):  # a dead connection: the server rolls back by itself
                        transaction.rollback()

    @contextlib.contextmanager
    def briefly(self, connection: sa.Connection) -> Iterator[None]:
        """Within it a statement waits only briefly for another transaction. The handler's locks are its own matter."""
        if self.engine.dialect.name != "postgresql":  # SQLite has the engine's own timeout
            yield
            return
        earlier = connection.execute(_LIMIT_WAIT, {"wait": f"{_LOCK_WAIT_MS}ms"}).scalar_one()
        yield
        connection.execute(_RESTORE_WAIT, {"wait": earlier})

    def insert(self, connection: sa.Connection, work: Work, retention: float) -> bool:
        """Insert the record. True: it is ours. False: the biz-id was completed before, by a commit.

        Waits for a transaction that is inserting the same record, and sees how it ended.
        """
        table = self._table
        kept_until = self._now + int(retention * 1_000_000)
        statement = self._insert(table).values(
            record_key=work.key,
            completed=1,
            fingerprint=work.fingerprint,
            attempts=0,
            redrive=work.redrive,
            kept_until=kept_until,
        )
        statement = statement.on_conflict_do_update(
            index_elements=[table.c.record_key],
            # A record whose retention is over may have a result, which is not this run's.
            set_={
                "completed": 1,
                "fingerprint": statement.excluded.fingerprint,
                "result": sa.null(),
                "kept_until": kept_until,
            },
            where=sa.or_(table.c.completed == 0, table.c.kept_until <= self._now),
        ).returning(table.c.completed)
        with self.briefly(connection):
            # The row itself, not a row count: for an INSERT SQLAlchemy keeps none unless asked to, and says -1.
            return connection.execute(statement).first() is not None

    def completed(self, connection: sa.Connection, work: Work) -> tuple[bytes | None, bytes | None]:
        """The fingerprint and the result of a completed record."""
        table = self._table
        mine = sa.and_(table.c.record_key == work.key, table.c.completed == 1)
        query = sa.select(table.c.fingerprint, table.c.result).where(mine)
        row = connection.execute(query).one()
        return row.fingerprint, row.result

    def store_result(self, connection: sa.Connection, work: Work, result: bytes) -> None:
        """Keep the handler's result with its record. Raises Permanent if the record is not there any more."""
        table = self._table
        statement = sa.update(table).where(table.c.record_key == work.key).values(result=result)
        if connection.execute(statement).rowcount != 1:
            raise Permanent("the record is gone: the handler ended the transaction by a statement of its own")

    def count_attempt(self, work: Work, retention: float) -> int:
        """Count an attempt, durably, before the handler runs or after it raised. 0: completed in the meantime."""
        table = self._table
        kept_until = self._now + int(retention * 1_000_000)
        statement = self._insert(table).values(
            record_key=work.key,
            completed=0,
            fingerprint=work.fingerprint,
            attempts=1,
            redrive=work.redrive,
            kept_until=kept_until,
        )
        excluded = statement.excluded
        over = table.c.kept_until <= self._now
        statement = statement.on_conflict_do_update(
            index_elements=[table.c.record_key],
            set_={
                "completed": 0,
                "attempts": sa.case((sa.or_(excluded.redrive > table.c.redrive, over), 1), else_=table.c.attempts + 1),
                "redrive": sa.case((excluded.redrive > table.c.redrive, excluded.redrive), else_=table.c.redrive),
                "kept_until": kept_until,
            },
            where=sa.or_(table.c.completed == 0, over),
        ).returning(table.c.attempts)
        with self.transaction() as (connection, transaction):
            with self.briefly(connection):
                counted = connection.execute(statement).scalar_one_or_none()
            transaction.commit()
        return int(counted or 0)

    def purge(self, *, limit: int = 1000) -> int:
        """Delete at most `limit` records whose retention is over; returns how many."""
        table = self._table
        over = sa.select(table.c.record_key).where(table.c.kept_until <= self._now).limit(limit)
        with self.connect() as connection, connection.begin():
            # The time is looked at again for the row that is deleted: it may have been claimed anew in between.
            statement = sa.delete(table).where(table.c.record_key.in_(over), table.c.kept_until <= self._now)
            return connection.execute(statement).rowcount


class _HandlerRaised(Exception):
    """Carries what a handler raised past the handling of database errors."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class _Unfinished(Exception):
    """The handler ran, but it is not known whether its transaction was committed, or it must be repeated as a whole."""

    def __init__(self, error: sa.exc.DBAPIError) -> None:
        super().__init__()
        self.error = error


class _Transactions:
    """Runs work in transactions: the counterpart of `execution.Executor`. Safe for threads.

    The database decides first, and only then the broker is answered: an error of the one is never taken for an error
    of the other, also where both are SQL databases.
    """

    def __init__(
        self, inbox: Inbox, policy: Policy, *, draw: Callable[[], float] = random.random, step: Step = direct
    ) -> None:
        self.policy = policy
        self._inbox = inbox
        self._draw = draw
        self._step = step
        self._permanent: tuple[type[BaseException], ...] = (Permanent, HandlerAcknowledged, *policy.permanent)

    def handle(self, work: Work) -> Ending:
        """Handle one delivery; settles it, whatever happens, unless the broker's connection fails."""
        try:
            answer = self._decide(work)
        except sa.exc.SQLAlchemyError as error:
            if _is_lock_timeout(error):
                answer = functools.partial(self._wait, work, Ended.BUSY)
            else:
                reason = f"{type(error).__name__}: {str(getattr(error, 'orig', error)).partition(chr(10))[0]}"
                log.warning("the inbox of scope %s is in doubt, nothing is acked (%s)", work.scope, reason)
                answer = functools.partial(self._wait, work, Ended.IN_DOUBT)
        return answer()

    def handle_window(self, works: Sequence[Work]) -> list[Ending]:
        """One transaction for each."""
        return [self.handle(work) for work in works]

    def refuse(self, scope: str, settle: Settlement, reason: Reason, error: str) -> Ending:
        """Dead-letter a message that has no usable identity, and therefore no record."""
        moved = self._step(DEAD_LETTER, settle.dead_letter, reason, error, 0)
        return Ending(Ended.DEAD if moved else Ended.HELD)

    def _decide(self, work: Work) -> Callable[[], Ending]:
        """What to answer the broker. Raises SQLAlchemyError if the database does not tell."""
        counted = 0
        if work.redelivered:
            counted = self._step(CLAIM, self._inbox.count_attempt, work, self.policy.retention)
            if counted > self.policy.max_attempts:
                return functools.partial(self._bury, work, Reason.ATTEMPTS, "the attempts are used up", counted - 1)
        ran = False
        for _ in range(_TRIES):
            try:
                return self._transact(work)
            except _HandlerRaised as raised:
                return self._failed(work, raised.error, counted)
            except _Unfinished as unfinished:
                ran, error = True, unfinished.error
            except sa.exc.DBAPIError as before_any_handler:
                if not _is_worth_repeating(before_any_handler):
                    raise
                error = before_any_handler
        if ran:
            # It ran, and never came to its end: an attempt, or else this could go on for ever. To count it is to
            # insert, which waits for a COMMIT that is still under way, and counts nothing after it.
            attempt = self._step(RELEASE, self._inbox.count_attempt, work, self.policy.retention)
            if attempt >= self.policy.max_attempts:
                return functools.partial(self._bury, work, Reason.ATTEMPTS, last_line(error), attempt)
        raise error

    def _transact(self, work: Work) -> Callable[[], Ending]:
        with self._inbox.transaction() as (connection, transaction):
            if not self._step(CLAIM, self._inbox.insert, connection, work, self.policy.retention):
                seen, result = self._inbox.completed(connection, work)
                if None not in (seen, work.fingerprint) and seen != work.fingerprint:
                    return functools.partial(
                        self._bury, work, Reason.CONFLICT, "the biz-id is completed with another body", 0
                    )
                return functools.partial(self._ack, work, Ended.REPLAYED, decode_result(result))
            value = self._run(work, connection, transaction)
            try:
                self._step(COMMIT, transaction.commit)
            except sa.exc.OperationalError as error:
                if _is_lock_timeout(error):
                    raise  # SQLite: readers are in the way, nothing was committed
                raise _Unfinished(error) from error
            except sa.exc.DBAPIError as error:
                if error.connection_invalidated:
                    raise _Unfinished(error) from error
                raise _HandlerRaised(error) from error  # a deferred constraint: the database said no
        return functools.partial(self._ack, work, Ended.COMPLETED, value)

    def _run(self, work: Work, connection: sa.Connection, transaction: sa.RootTransaction) -> Any:
        try:
            value = self._step(HANDLER, work.run, connection)
            _check_still_open(connection, transaction)
            result = encode_result(value, work.scope)
            if result is not None:
                self._inbox.store_result(connection, work, result)
        except sa.exc.DBAPIError as error:
            if error.orig is not None and is_contention(error.orig):
                raise _Unfinished(error) from error  # the whole transaction is repeated
            raise _HandlerRaised(error) from error
        except Exception as error:
            raise _HandlerRaised(error) from error
        return value

    def _failed(self, work: Work, error: Exception, counted: int) -> Callable[[], Ending]:
        attempt = counted or self._step(RELEASE, self._inbox.count_attempt, work, self.policy.retention)
        log.warning("handler in scope %s raised %s, rolled back", work.scope, type(error).__name__, exc_info=error)
        if isinstance(error, self._permanent):
            return functools.partial(self._bury, work, Reason.PERMANENT, last_line(error), attempt)
        if attempt >= self.policy.max_attempts:
            return functools.partial(self._bury, work, Reason.ATTEMPTS, last_line(error), attempt)
        delay = self.policy.backoff.delay(max(attempt, 1), self._draw)
        return functools.partial(self._wait_for, work, Ended.FAILED, delay)

    # --- answering the broker -------------------------------------------------------------------------

    def _ack(self, work: Work, how: Ended, value: Any) -> Ending:
        self._step(ACK, work.settle.ack)
        return Ending(how, value)

    def _bury(self, work: Work, reason: Reason, error: str, attempts: int) -> Ending:
        moved = self._step(DEAD_LETTER, work.settle.dead_letter, reason, error, attempts)
        return Ending(Ended.DEAD if moved else Ended.HELD)

    def _wait(self, work: Work, how: Ended) -> Ending:
        return self._wait_for(work, how, self.policy.busy_delay * (1 + self._draw() / 2))

    def _wait_for(self, work: Work, how: Ended, delay: float) -> Ending:
        self._step(WAIT, work.settle.wait, delay)
        return Ending(how)


def _commits_by_itself(connection: sa.Connection, driver: Any) -> bool:
    """True if no transaction is open, although one was begun: the driver ends it with each statement."""
    if getattr(driver, "in_transaction", False):
        return False  # SQLite with a BEGIN of the engine's own
    detect = getattr(connection.dialect, "detect_autocommit_setting", None)
    if detect is not None:
        with contextlib.suppress(NotImplementedError):
            return bool(detect(driver))
    if connection.dialect.name == "sqlite":
        return getattr(driver, "isolation_level", "") is None
    return getattr(driver, "autocommit", False) is True


def _check_still_open(connection: sa.Connection, transaction: sa.RootTransaction) -> None:
    """Raise if the transaction is not as the handler got it: open, and fit for a COMMIT.

    PostgreSQL answers COMMIT of an aborted transaction with a quiet ROLLBACK, and psycopg raises nothing: the
    message would be acked without its effect.
    """
    ended = Permanent("the handler committed or rolled back the transaction, which is the library's to end")
    if not transaction.is_active:
        raise ended
    driver = connection.connection.dbapi_connection
    if getattr(driver, "in_transaction", True) is False:
        raise ended  # SQLite, by a statement of its own
    if connection.dialect.name != "postgresql":
        return
    status = getattr(getattr(driver, "info", None), "transaction_status", None)
    if status is None:
        connection.execute(sa.text("SELECT 1"))  # another driver: an aborted transaction refuses this
    elif status == _IDLE:
        raise ended
    elif status == _IN_ERROR:
        raise sa.exc.InvalidRequestError(
            "a statement of the handler failed and the handler went on: PostgreSQL will not commit this transaction; "
            "let the error out, or use connection.begin_nested() around what may fail"
        )


def _is_worth_repeating(error: sa.exc.DBAPIError) -> bool:
    """True where the same may go well at once: a pooled connection that was dead, a meeting with somebody."""
    return error.connection_invalidated or (error.orig is not None and is_contention(error.orig))


def _is_lock_timeout(error: BaseException) -> bool:
    driver_error = getattr(error, "orig", None)
    state = getattr(driver_error, "sqlstate", None) or getattr(driver_error, "pgcode", None)
    return state == "55P03" or "database is locked" in str(driver_error)


def transactional_consumer(
    inbox: Inbox,
    *,
    scope: str,
    biz_id: BizIdSpec,
    fingerprint: FingerprintSpec = True,
    retention: float = 7 * DAY,
    max_attempts: int = 8,
    backoff: Backoff = Backoff(),  # noqa: B008 - frozen
    permanent: tuple[type[BaseException], ...] = (),
    busy_delay: float = 1.0,
    dead_letter: str | None = None,
    tenant: str = "",
    trust: Trust | None = None,
    max_body: int | None = MAX_BODY,
    step: Step = direct,
) -> Callable[[Callable[HandlerP, HandlerR]], IdempotentHandler[HandlerP, HandlerR]]:
    """Run the handler once for each business id, in one transaction with the record; ack after the commit.

    The handler is called with `(body, message, connection)` and writes with that connection; it must neither commit
    nor roll it back. What it raises rolls back its writes and the record alike. Everything else is as in
    `idempotent_consumer`; there is no lease, since the transaction ends with its connection.
    """
    policy = Policy(
        retention=retention,
        max_attempts=max_attempts,
        backoff=backoff,
        busy_delay=busy_delay,
        permanent=permanent,
    )
    executor = _Transactions(inbox, policy, step=step)

    def decorate(handler: Callable[HandlerP, HandlerR]) -> IdempotentHandler[HandlerP, HandlerR]:
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
