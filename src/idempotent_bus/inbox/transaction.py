"""One transaction around a handler, or around a window of them: opened, watched over, and committed in one step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from ..connections import Link, commits_by_itself, link_to, link_to_driver
from ..dialects import is_read_only
from ..errors import ConfigurationError, Permanent
from .records import Records

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["HandlerEndedIt", "HookRaised", "Opened", "opened"]

# As libpq numbers the states of a transaction.
_IDLE: Final = 0
_IN_ERROR: Final = 3
#: A copy waits in SQLite for other writers no longer than this, in milliseconds, unless the engine says less.
_SQLITE_WAIT: Final = 1000
#: The savepoint that is there as long as the transaction is.
_MARK: Final = "idempotent_bus"
#: What PostgreSQL says in any language if the transaction is another one than that of the record.
_ENDED: Final = "idempotent-bus: another transaction"


class HandlerEndedIt(Permanent):
    """The handler committed or rolled back the transaction, which is the library's to end.

    surely: False where the database may have done it by itself: MySQL rolls all of it back at a deadlock.
    """

    def __init__(self, *, surely: bool = True) -> None:
        super().__init__("the handler committed or rolled back the transaction, which is the library's to end")
        self.surely = surely


class HookRaised(Exception):
    """A listener of the user's raised around a commit (`before_commit`, `after_commit`); `__cause__` says what.

    Whether the transaction was committed, `Opened.was_committed` tells.
    """


class Opened:
    """A transaction that is open. For one thread.

    link: runs our statements, on the driver's connection where that is known: the handler's own go through SQLAlchemy.
    """

    __slots__ = (
        "_below",
        "_committed",
        "_driver",
        "_earlier_wait",
        "_number",
        "_records",
        "connection",
        "link",
        "session",
        "transaction",
    )

    def __init__(
        self, connection: sa.Connection, records: Records, make_session: Callable[..., Session] | None
    ) -> None:
        driver: Any = connection.connection.driver_connection
        self.connection = connection
        self._earlier_wait: int | None = None
        #: Below SQLAlchemy, which would have begun a transaction with the first statement. None: an unknown driver.
        self._below = link_to_driver(connection)
        if records.database == "sqlite":
            # What waits there is the first statement that writes, or the engine's own BEGIN. No round trip.
            earlier = self._busy_timeout()
            if earlier > _SQLITE_WAIT:
                self._set_busy_timeout(_SQLITE_WAIT)
                self._earlier_wait = earlier
        try:
            self.transaction = connection.begin()
        except BaseException:
            self._wait_as_before()  # the connection goes back to a pool that is the user's
            raise
        self.session: Session | None = None
        self._records = records
        self._number = ""
        self._committed = False
        #: psycopg 3, which can send several statements in one round trip.
        self._driver: Any = driver if type(driver).__module__.partition(".")[0] == "psycopg" else None
        self.link: Link = self._below or link_to(connection)
        if make_session is not None:
            # Its commit is the commit, so that its events are told at the right moment.
            self.session = make_session(bind=connection, join_transaction_mode="control_fully")

    @property
    def handed(self) -> sa.Connection | Session:
        """What the handler writes with."""
        return self.connection if self.session is None else self.session

    @property
    def is_quick(self) -> bool:
        """True if several statements can be sent together."""
        return self._driver is not None

    def run_together(self, *texts: str) -> None:
        """Several statements without parameters, in one round trip. Only if it `is_quick`."""
        self.check_ours()
        with translated(self.connection):
            self._driver.execute("; ".join(texts), prepare=False)

    def driver_block(self) -> contextlib.AbstractContextManager[Any]:
        """A block in which psycopg itself refuses to commit or roll back. Only if it `is_quick`."""
        block: contextlib.AbstractContextManager[Any] = self._driver.transaction()
        return block

    def run(self, text: str) -> None:
        """One statement without parameters."""
        self.check_ours()
        with translated(self.connection):
            self.link.tell(text)

    def mark_before(self) -> None:
        """Before the record is inserted. A savepoint: any end of the transaction removes it."""
        if self._records.database == "mysql":
            self.run(f"SAVEPOINT {_MARK}")

    def mark_after(self, number: str) -> None:
        """After it was. number: the transaction's, where it has one that can be compared."""
        self._number = number
        if self._records.database == "sqlite":  # not before: an outermost savepoint would be the transaction
            self._wait_as_before()
            self.run(f"SAVEPOINT {_MARK}")

    def check_ours(self) -> None:
        """Raise if the handler closed the connection: the driver's is the pool's again, and may be another's by now."""
        if self.connection.closed:
            raise HandlerEndedIt

    def check_open(self) -> None:
        """Raise if the transaction is seen to be ended or aborted. Asks nobody: `commit` does.

        PostgreSQL answers COMMIT of an aborted transaction with a quiet ROLLBACK, and psycopg raises nothing: the
        message would be acked without its effect.
        """
        if not self.transaction.is_active:
            raise HandlerEndedIt
        driver = self.connection.connection.dbapi_connection
        if getattr(driver, "in_transaction", True) is False:
            raise HandlerEndedIt  # SQLite, by a statement of its own
        if self._records.database != "postgresql":
            return
        told_by = getattr(driver, "pgconn", None) or getattr(driver, "info", None)
        status = getattr(told_by, "transaction_status", None)
        if status is None:
            self.run("SELECT 1")  # another driver: an aborted transaction refuses this
        elif status == _IDLE:
            raise HandlerEndedIt
        elif status == _IN_ERROR:
            raise sa.exc.InvalidRequestError(
                "a statement of the handler failed and the handler went on: PostgreSQL will not commit this "
                "transaction; let the error out, or use begin_nested() around what may fail"
            )

    def flush(self) -> None:
        """Send what the handler's session still has to write."""
        if self.session is not None:
            self.session.flush()

    def commit(self, results: Mapping[bytes, bytes], then: Sequence[str] = ()) -> None:
        """Store the results, check that this is still the transaction in which the records were inserted, commit.

        Raises HandlerEndedIt, and what SQLAlchemy raises; then nothing was committed, unless the connection broke; and
        HookRaised. With psycopg 3 all of it is one round trip. then: statements to send before the COMMIT, if it
        `is_quick`.
        """
        self.check_ours()
        records = self._records
        if self._driver is None:
            with translated(self.connection):
                for key, result in results.items():
                    records.store(self.link, key, result)
            if records.database == "postgresql":
                self._ask(self._check())
            else:
                self._ask(f"RELEASE SAVEPOINT {_MARK}")
        else:
            texts = [*records.store_texts(results), *then, self._check()]
            if self.session is None:
                texts.append("COMMIT")  # SQLAlchemy's own then finds nothing to do, and only tells its listeners
            self._ask("; ".join(texts))
        try:
            if self.session is not None:
                self.session.commit()
            if self.transaction.is_active:
                self.transaction.commit()
        except sa.exc.DBAPIError:
            raise
        except Exception as error:
            raise HookRaised from error
        self._committed = True

    def commit_plainly(self) -> None:
        """Commit what no handler had its hands on."""
        self.transaction.commit()
        self._committed = True

    def was_committed(self, key: bytes) -> bool:
        """After the handler raised, or the transaction was found ended: whether it was committed, by the handler.

        Rolls back what is left of it first. Raises what SQLAlchemy raises if nobody can tell. True also if the handler
        closed the connection.
        """
        if self.connection.closed:
            return True
        if not self._number:
            try:
                self._ask(f"RELEASE SAVEPOINT {_MARK}")
            except HandlerEndedIt:
                pass
            else:
                return False
        self.roll_back()
        with self.connection.begin(), translated(self.connection):
            if self._number:
                text = f"SELECT pg_xact_status(CAST('{self._number}' AS xid8))"
                return bool(self.link.run(text, {})[0][0][0] == "committed")
            seen = self._records.seen(self.link, [key]).get(key)
        return seen is not None and seen.completed

    def roll_back(self) -> None:
        """Roll back what is left of it. Never raises for a connection that is dead: the server rolls back by itself."""
        with contextlib.suppress(sa.exc.DBAPIError):
            if self.session is not None:
                self.session.close()
            if self.transaction.is_active:
                self.transaction.rollback()
            elif not self._committed and not self.connection.closed and not self.connection.invalidated:
                # The handler ended ours, or tried to and was refused, and may have begun another since. SQLAlchemy
                # would hand a connection whose commit was refused back to its pool as it is.
                self.connection.rollback()
                with translated(self.connection):
                    self.connection.connection.rollback()
            self._wait_as_before()

    def _wait_as_before(self) -> None:
        earlier, self._earlier_wait = self._earlier_wait, None
        if earlier is not None and not self.connection.invalidated:
            self._set_busy_timeout(earlier)

    def _busy_timeout(self) -> int:
        if self._below is not None:
            return int(self._below.run("PRAGMA busy_timeout", {})[0][0][0])
        driver: Any = self.connection.connection.driver_connection
        return int(driver.execute("PRAGMA busy_timeout").fetchone()[0])

    def _set_busy_timeout(self, milliseconds: int) -> None:
        text = f"PRAGMA busy_timeout={milliseconds}"
        if self._below is not None:
            self._below.tell(text)
            return
        driver: Any = self.connection.connection.driver_connection
        driver.execute(text)

    def _check(self) -> str:
        return (
            f"SELECT CASE WHEN CAST(pg_current_xact_id() AS text) = '{self._number}' THEN 0 "
            f"ELSE CAST('{_ENDED}' || pg_current_xact_id() AS integer) END"
        )

    def _ask(self, text: str) -> None:
        try:
            if self._driver is not None:
                self.run_together(text)
            else:
                self.run(text)
        except sa.exc.DBAPIError as error:
            if _is_ended(error):
                raise HandlerEndedIt(surely=self._records.database != "mysql") from error
            raise


@contextlib.contextmanager
def opened(
    connection: sa.Connection, records: Records, make_session: Callable[..., Session] | None = None
) -> Iterator[Opened]:
    """A transaction that is rolled back at the end unless it was committed. The connection is closed.

    Raises ConfigurationError if the engine commits each statement by itself: record and effect were not one commit.
    """
    with connection:
        made = Opened(connection, records, make_session)
        try:
            if commits_by_itself(connection):
                raise ConfigurationError(
                    "the inbox needs transactions, and this engine is in autocommit: a record would be durable "
                    "without its effect. Give it an engine without isolation_level='AUTOCOMMIT'"
                )
            yield made
        finally:
            made.roll_back()


class translated:  # noqa: N801 - used as a function
    """Turn the driver's errors into SQLAlchemy's, as its own statements would, with nothing of their parameters.

    A context manager, and a class since it is entered several times for each message.
    """

    __slots__ = ("_connection",)

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            return
        connection = self._connection
        dialect = connection.dialect
        driver_error = dialect.loaded_dbapi.Error
        if not isinstance(error, driver_error):
            return
        driver = connection.connection.dbapi_connection if not connection.invalidated else None
        # After a failover one to what is a standby by now is as good as lost: the pool would lend it for ever.
        gone = dialect.is_disconnect(error, driver, None) or is_read_only(error)
        if gone and not connection.invalidated:
            connection.invalidate(error)
        raise sa.exc.DBAPIError.instance(
            "a statement of the inbox",
            None,
            error,
            driver_error,
            hide_parameters=True,
            connection_invalidated=gone,
            dialect=dialect,
        ) from error


def _is_ended(error: sa.exc.DBAPIError) -> bool:
    text = str(error.orig)
    if _ENDED in text:
        return True
    # SQLite, and MySQL's 1305: the mark is gone.
    return "no such savepoint" in text or (error.orig is not None and error.orig.args[:1] == (1305,))
