"""A Django transaction, as the inbox wants one: Django opens and ends it, the inbox watches over it.

The inbox speaks to SQLAlchemy's Connection and Session. What it uses of the two is small, and made here of Django's
connection: so one and the same code settles lost COMMITs, deadlocks and handlers that end their transaction (see
`inbox/running.py` and `inbox/transaction.py`), with what Django's users expect: `transaction.atomic` around the
handler, a savepoint for each block within, `on_commit` hooks that run after the commit and never without it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import sqlalchemy as sa
from django.db import connections, transaction
from django.db.utils import Error as DjangoError
from sqlalchemy.engine import Dialect
from typing_extensions import Self

from ..errors import ConfigurationError
from ..inbox.records import is_meeting

__all__ = ["Borrowed", "Handed", "as_sqlalchemy"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Driver:
    """Django's driver connection under the names that it has in SQLAlchemy's pool; None while there is none."""

    driver_connection: Any

    @property
    def dbapi_connection(self) -> Any:
        """The same."""
        return self.driver_connection

    def rollback(self) -> None:
        """What is open is ended by its own block, which leaves the connection in autocommit, or closed."""


class _RolledBack(Exception):
    """Tells `atomic` to roll back."""


class Borrowed:
    """This thread's Django connection, as far as the inbox needs it to be SQLAlchemy's.

    Connects. Raises SQLAlchemy's OperationalError if that fails, and ConfigurationError where Django would not commit.
    """

    def __init__(self, alias: str, dialect: Dialect) -> None:
        self.alias = alias
        self.dialect = dialect
        self.django: Any = connections[alias]
        if self.django.errors_occurred:
            self.django.close_if_unusable_or_obsolete()
        try:
            self.django.ensure_connection()
        except DjangoError as error:
            raise as_sqlalchemy(error, self) from error
        self._check_usable()

    def _check_usable(self) -> None:
        django = self.django
        if django.in_atomic_block:
            if not all(getattr(block, "_from_testcase", False) for block in django.atomic_blocks):
                raise ConfigurationError(
                    f"a consumer was called within transaction.atomic(using={self.alias!r}): "
                    "its commit would not be one, and the message would be acked before it"
                )
        elif not django.get_autocommit():
            raise ConfigurationError(
                f"the database {self.alias!r} has AUTOCOMMIT False, where transaction.atomic() does not commit: the "
                "message would be acked, and its effect never be there"
            )

    # --- what SQLAlchemy's Connection has -------------------------------------------------------------------

    @property
    def connection(self) -> _Driver:
        """The driver's own connection."""
        return _Driver(self.django.connection)

    @property
    def info(self) -> dict[str, Any]:
        """Empty: nothing is kept with the driver's connection."""
        return {}

    @property
    def invalidated(self) -> bool:
        """True once the connection is known to be lost."""
        return self.django.connection is None or bool(self.django.closed_in_transaction)

    @property
    def closed(self) -> bool:
        """False: a connection that the handler closes goes to no pool, its transaction is gone, and Django knows."""
        return False

    def invalidate(self, error: BaseException | None = None) -> None:
        """It is lost: Django connects again after the transaction's end."""
        self.django.close()

    def begin(self) -> _Transaction:
        """An outermost atomic block."""
        return _Transaction(self)

    def in_transaction(self) -> bool:
        """False: what is open here is ended by its own block."""
        return False

    def rollback(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """It stays open: Django's own rules say when it is closed."""


class _Transaction:
    """`transaction.atomic(durable=True)`, begun, and ended by `commit` or `rollback`."""

    def __init__(self, owner: Borrowed) -> None:
        self._owner = owner
        self._committed = False
        self._atomic = transaction.atomic(using=owner.alias, durable=True)
        try:
            self._atomic.__enter__()
        except DjangoError as error:
            raise as_sqlalchemy(error, owner) from error
        self.is_active = True
        # The first hook: it runs once the commit has succeeded, before any of the handler's can raise.
        transaction.on_commit(self._note, using=owner.alias)

    def _note(self) -> None:
        self._committed = True

    def commit(self) -> None:
        """Commit, and run the handler's `on_commit` hooks. What a hook raises is logged: the effect is there."""
        self.is_active = False
        try:
            self._atomic.__exit__(None, None, None)
        except Exception as error:
            if self._committed:
                log.exception("an on_commit hook raised, after the commit: the hooks after it were not run")
            elif isinstance(error, DjangoError):
                raise as_sqlalchemy(error, self._owner) from error
            else:
                raise

    def rollback(self) -> None:
        """Roll back. Never raises for a connection that is lost."""
        self.is_active = False
        try:
            self._atomic.__exit__(_RolledBack, _RolledBack(), None)
        except DjangoError as error:
            raise as_sqlalchemy(error, self._owner) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.commit()
        else:
            self.rollback()


class Handed:
    """Stands where a Session would: handlers write with Django's ORM, and a window's savepoints are Django's own."""

    def __init__(self, *, bind: Borrowed, **_: Any) -> None:
        self._owner = bind
        self._nested: _Nested | None = None

    def connection(self) -> None:
        """A savepoint is there as soon as it is begun."""

    def flush(self) -> None:
        """Django has written everything."""

    def commit(self) -> None:
        """The transaction itself is committed next."""

    def close(self) -> None:
        """Nothing is kept."""

    def begin_nested(self) -> _Nested:
        """A nested atomic block, so that hooks of a handler that raises go with its rows."""
        self._nested = _Nested(self._owner)
        return self._nested

    def get_nested_transaction(self) -> _Nested | None:
        """The one that was begun last: a handler leaves none of its own behind."""
        return self._nested

    def check_usable(self) -> None:
        """Raise if Django would now roll back instead of committing, which it does without a word."""
        if self._owner.django.needs_rollback:
            raise transaction.TransactionManagementError(
                "the handler went on after a database error, or called set_rollback(True), so Django would roll its "
                "transaction back: let the error out, or use an atomic block of its own around what may fail"
            )

    def pass_on(self, error: DjangoError) -> sa.exc.DBAPIError | None:
        """A handler's error as the inbox must see it, if it is the end of the whole transaction; else None."""
        made = as_sqlalchemy(error, self._owner)
        if isinstance(made, sa.exc.DBAPIError) and (made.connection_invalidated or is_meeting(made)):
            return made
        return None


class _Nested:
    """A savepoint."""

    def __init__(self, owner: Borrowed) -> None:
        self._owner = owner
        self._atomic = transaction.atomic(using=owner.alias)
        try:
            self._atomic.__enter__()
        except DjangoError as error:
            raise as_sqlalchemy(error, owner) from error

    def commit(self) -> None:
        """Release it."""
        self._end()

    def rollback(self) -> None:
        """Roll back to it."""
        self._end(_RolledBack, _RolledBack())
        if self._owner.django.needs_rollback:
            # Django keeps quiet about a savepoint that is not there any more.
            raise sa.exc.InvalidRequestError("a savepoint could not be rolled back to: the whole window must be")

    def _end(self, *how: Any) -> None:
        try:
            self._atomic.__exit__(*(how or (None, None)), None)
        except DjangoError as error:
            raise as_sqlalchemy(error, self._owner) from error


_OURS: Final = "a statement of the inbox"


def as_sqlalchemy(error: BaseException, borrowed: Borrowed) -> sa.exc.StatementError:
    """Django's error as SQLAlchemy's, with the driver's in it, and without parameters.

    A connection that is found to be lost is given up.
    """
    dialect: Any = borrowed.dialect
    driver_error = dialect.loaded_dbapi.Error
    cause = error.__cause__ if isinstance(error.__cause__, driver_error) else error
    gone = False
    if isinstance(cause, driver_error) and borrowed.django.connection is not None:
        gone = bool(dialect.is_disconnect(cause, borrowed.django.connection, None))
        if gone and not borrowed.invalidated:
            borrowed.invalidate(cause)
    gone = gone or bool(borrowed.django.closed_in_transaction)
    instance: Any = sa.exc.DBAPIError.instance  # typed for one class of errors, and it takes several
    made: sa.exc.StatementError = instance(
        _OURS,
        None,
        cause,
        (driver_error, DjangoError),
        hide_parameters=True,
        connection_invalidated=gone,
        dialect=dialect,
    )
    return made
