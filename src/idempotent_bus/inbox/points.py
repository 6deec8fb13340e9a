"""The savepoint around each message of a window: begun with the mark on its record, kept, or taken back.

With psycopg 3 several messages can share one, which spares a round trip for each: then their records are marked at its
end, and nothing may commit in between. `guarded` sees to that. On MariaDB each message has its own, with one round trip
for all there is to say between two handlers.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Final

import sqlalchemy as sa

from .records import Records
from .transaction import HandlerEndedIt, Opened, translated

__all__ = ["Point", "Quick", "guarded", "point_for"]

_NAME: Final = "idempotent_bus_message"
_numbers = itertools.count()
#: A statement that ends a transaction, and not only goes back to a savepoint.
_ENDS = re.compile(
    r"(?:\s|/\*.*?\*/|--[^\n]*\n)*(?:commit|end|abort|prepare\s+transaction|rollback(?!\s+(?:(?:work|transaction)\s+)?to\b))\b",
    re.IGNORECASE | re.DOTALL,
)


#: What most statements begin with, and none that ends a transaction.
_HARMLESS: Final = frozenset("IUDSWiudsw")


class Point(ABC):
    """One savepoint at a time, in a transaction that is open. What it raises is SQLAlchemy's."""

    def __init__(self, opened: Opened, records: Records) -> None:
        self._opened = opened
        self._records = records

    @abstractmethod
    def begin(self, key: bytes) -> None:
        """Begin it, and mark the record of this key as completed within it."""

    @abstractmethod
    def keep(self) -> None:
        """The handler succeeded."""

    @abstractmethod
    def undo(self) -> None:
        """The handler raised."""

    @property
    def last_words(self) -> tuple[str, ...]:
        """What is to be sent before the COMMIT."""
        return ()

    def _mark(self, key: bytes) -> None:
        with translated(self._opened.connection):
            self._records.begin(self._opened.link, key)


class _Plain(Point):
    """For any driver: a round trip for each statement."""

    def begin(self, key: bytes) -> None:
        self._opened.check_ours()
        with translated(self._opened.connection):
            link = self._opened.link
            link.tell(f"SAVEPOINT {_NAME}")
            self._records.begin(link, key)

    def keep(self) -> None:
        for nested in _left_open(self._opened.connection):
            nested.commit()
        self._opened.run(f"RELEASE SAVEPOINT {_NAME}")

    def undo(self) -> None:
        for nested in _left_open(self._opened.connection):
            nested.rollback()
        self._opened.run(f"ROLLBACK TO SAVEPOINT {_NAME}")
        self._opened.run(f"RELEASE SAVEPOINT {_NAME}")


class _Compound(_Plain):
    """On MariaDB: the end of one, the beginning of the next and the mark are one compound statement, one round trip.

    So that a savepoint which is gone, since the handler has ended the transaction, is noticed a little later: before
    the next handler, or at the commit.
    """

    def __init__(self, opened: Opened, records: Records) -> None:
        super().__init__(opened, records)
        self._pending = ""

    def begin(self, key: bytes) -> None:
        mark = self._records.begin_text(key)
        self._opened.run(f"BEGIN NOT ATOMIC {self._pending} SAVEPOINT {_NAME}; {mark}; END")
        self._pending = f"RELEASE SAVEPOINT {_NAME};"

    def keep(self) -> None:
        for nested in _left_open(self._opened.connection):
            nested.commit()

    def undo(self) -> None:
        super().undo()
        self._pending = ""


class Quick(Point):
    """With psycopg 3: the end of one, the beginning of the next and the mark are one round trip.

    The mark is a prepared statement of PostgreSQL's own, which need not be planned for each message.
    """

    def __init__(self, opened: Opened, records: Records) -> None:
        super().__init__(opened, records)
        self._pending: tuple[str, ...] = ()
        self._prepared = ""
        self._undone = False

    def begin(self, key: bytes) -> None:
        first = () if self._prepared else self._prepare()
        execute = f"EXECUTE {self._prepared}('{key.hex()}')"
        try:
            self._opened.run_together(*self._pending, *first, f"SAVEPOINT {_NAME}", execute)
        except sa.exc.DBAPIError as error:
            # psycopg forgets all prepared statements of its connection whenever something was rolled back.
            if getattr(error.orig, "sqlstate", None) != "26000":
                raise
            again = self._prepare()
            execute = f"EXECUTE {self._prepared}('{key.hex()}')"
            self._opened.run_together(f"ROLLBACK TO SAVEPOINT {_NAME}", *again, execute)
        self._pending = (f"RELEASE SAVEPOINT {_NAME}",)

    def begin_shared(self) -> None:
        """Begin one for several messages."""
        self._opened.run_together(*self._pending, f"SAVEPOINT {_NAME}")
        self._pending = (f"RELEASE SAVEPOINT {_NAME}",)

    def keep_shared(self, keys: Sequence[bytes]) -> None:
        """They all succeeded: their records are marked."""
        self._pending = (*self._records.begin_texts(keys), f"RELEASE SAVEPOINT {_NAME}")

    def keep(self) -> None:
        for nested in _left_open(self._opened.connection):
            nested.commit()

    def undo(self) -> None:
        for nested in _left_open(self._opened.connection):
            nested.rollback()
        self._opened.run_together(f"ROLLBACK TO SAVEPOINT {_NAME}", f"RELEASE SAVEPOINT {_NAME}")
        self._pending = ()
        self._undone = True

    @property
    def last_words(self) -> tuple[str, ...]:
        # psycopg's block, in which it refuses to commit, has ended by then, and our savepoint with it.
        marks = tuple(text for text in self._pending if not text.startswith("RELEASE"))
        return (*marks, f"DEALLOCATE {self._prepared}") if self._is_prepared() else marks

    def _is_prepared(self) -> bool:
        if not self._prepared or not self._undone:
            return bool(self._prepared)
        # To deallocate what psycopg has forgotten would be an error, and take the whole window along.
        text = f"SELECT count(*) FROM pg_prepared_statements WHERE name = '{self._prepared}'"  # noqa: S608 - ours
        with translated(self._opened.connection):
            return bool(self._opened.link.run(text, {})[0][0][0])

    def _prepare(self) -> tuple[str, ...]:
        self._prepared = f"idempotent_bus_begin_{next(_numbers)}"
        update = f"UPDATE {self._records.name} SET completed = 1 WHERE record_key = $1"  # noqa: S608 - a name of ours
        return (f"PREPARE {self._prepared} (uuid) AS {update}",)


class _OfSession(Point):
    """With a Session: its own savepoints, so that what it remembers is what is there."""

    def begin(self, key: bytes) -> None:
        session = self._opened.session
        assert session is not None
        self._nested = session.begin_nested()
        session.connection()  # now, not at the handler's first statement: the mark belongs into the savepoint
        self._mark(key)

    def keep(self) -> None:
        session = self._opened.session
        assert session is not None
        while (inner := session.get_nested_transaction()) is not None and inner is not self._nested:
            inner.commit()
        self._nested.commit()

    def undo(self) -> None:
        session = self._opened.session
        assert session is not None
        while (inner := session.get_nested_transaction()) is not None and inner is not self._nested:
            inner.rollback()
        self._nested.rollback()


def point_for(opened: Opened, records: Records) -> Point:
    """The quickest way there is."""
    if opened.session is not None:
        return _OfSession(opened, records)
    if opened.is_quick:
        return Quick(opened, records)
    return _Compound(opened, records) if records.is_mariadb else _Plain(opened, records)


@contextlib.contextmanager
def guarded(opened: Opened) -> Iterator[None]:
    """Within it neither the driver nor SQLAlchemy commits or rolls back the transaction: whoever tries gets an error.

    Only for psycopg 3. What remains is the word COMMIT, given to the driver itself.
    """
    connection = opened.connection

    def refuse(*_: Any) -> None:
        raise HandlerEndedIt

    def look(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement[:1] not in _HARMLESS and _ENDS.match(statement):
            raise HandlerEndedIt

    listeners = (("commit", refuse), ("rollback", refuse), ("before_cursor_execute", look))
    for name, listener in listeners:
        sa.event.listen(connection, name, listener)
    try:
        with translated(connection), opened.driver_block():
            yield
    finally:
        for name, listener in listeners:
            sa.event.remove(connection, name, listener)


def _left_open(connection: sa.Connection) -> list[sa.NestedTransaction]:
    """Savepoints that the handler has begun and not ended, the innermost first."""
    found = []
    nested = connection.get_nested_transaction()
    while nested is not None:
        found.append(nested)
        nested = nested._previous_nested
    return found
