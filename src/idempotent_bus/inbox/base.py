"""`Inbox`: the records of what was handled, in the database where the effects are."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite

from .. import schema
from ..connections import Link, driver_errors, link_to, read_committed
from ..errors import ConfigurationError, FingerprintConflict
from ..identity import canonical_biz_id, check_scope, check_tenant, record_key
from ..identity import fingerprint as digest_of
from ..policy import DAY
from ..work import Work
from .records import Records
from .transaction import Opened, opened, translated

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, sessionmaker

__all__ = ["Inbox"]

_DIALECTS: Final[dict[str, Any]] = {
    "postgresql": postgresql.dialect,
    "mysql": mysql.dialect,
    "sqlite": sqlite.dialect,
}
#: How a database says that there is no such table.
_NO_TABLE: Final = frozenset({"42P01"})
_NO_TABLE_NUMBERS: Final = frozenset({1146})


class Inbox:
    """The records of what was handled, in the database where the effects are.

    source: your Engine, and handlers get a Connection; or a sessionmaker that is bound to one, and they get a Session.
        Each message, or each window of messages, takes one connection of it for one transaction. None: for `record`
        only, which uses connections of yours.
    table_prefix, database_schema: where the table is.
    create: make the table at the first use of the engine; switch it off where `idempotent-bus schema create` or your
        migrations do that (`schema.metadata`).

    Safe for threads. PostgreSQL, MariaDB, MySQL 8 and SQLite 3.35, in any isolation level that has transactions.
    """

    def __init__(
        self,
        source: sa.Engine | sessionmaker[Any] | None = None,
        *,
        table_prefix: str = schema.PREFIX,
        database_schema: str | None = None,
        create: bool = True,
    ) -> None:
        self._engine, self._make_session = _engine_of(source)
        if self._engine is not None and self._engine.dialect.name not in (*_DIALECTS, "mariadb"):
            raise ConfigurationError(
                f"the inbox works on PostgreSQL, MariaDB, MySQL and SQLite, not on {self._engine.dialect.name}"
            )
        self._tables = schema.metadata(table_prefix, database_schema, parts=("inbox",))
        self._makes = create
        self._there = False
        self._making = threading.Lock()
        self._records: Records | None = None
        self._foreign: dict[str, Records] = {}

    @property
    def engine(self) -> sa.Engine:
        """The engine. Raises ConfigurationError for an inbox without one."""
        if self._engine is None:
            raise ConfigurationError("this inbox has no engine: give it one, or a sessionmaker that is bound to one")
        return self._engine

    def create(self) -> None:
        """Make the table if it is missing, on a connection of the inbox's own. Any number of processes may do so."""
        with self._making:
            schema.create(self.engine, self._tables)
            self._there = True

    # --- in a transaction of the user's ---------------------------------------------------------------------

    def record(
        self,
        connection: Any,
        scope: str,
        biz_id: Any,
        *,
        fingerprint: Any = None,
        tenant: str = "",
        retention: float = 7 * DAY,
    ) -> bool:
        """Insert the record in the transaction that is open on `connection`. True: go on. False: it was done before.

        connection: a SQLAlchemy Connection or Session, a Django connection, or a driver's own (psycopg, sqlite3,
            PyMySQL). It is neither committed nor rolled back here: commit, and effect and record are there; roll back,
            and neither is.
        scope, biz_id, tenant: as `transactional_consumer` makes them of a message.
        fingerprint: the body, or what else a copy must have in common with the first; None: nothing is compared.
        retention: seconds that it is remembered.

        If another transaction is inserting the same record, this waits for its end, as any INSERT of a key does, and
        then knows; for how long is your connection's matter (`SET LOCAL lock_timeout`, `innodb_lock_wait_timeout`, the
        busy timeout). In REPEATABLE READ and SERIALIZABLE the database may refuse instead (40001): repeat your
        transaction as a whole.

        Raises FingerprintConflict if the biz-id was done with another fingerprint; ConfigurationError if the
        connection is in autocommit, or the table is missing or (MySQL, MariaDB) in an engine without transactions;
        InvalidScope, InvalidBizId or InvalidBody before anything is done; and what the connection raises.
        """
        link = link_to(connection)
        link.check_transaction()
        key = record_key(check_scope(scope), canonical_biz_id(biz_id), tenant=check_tenant(tenant))
        digest = None if fingerprint is None else digest_of(fingerprint)
        records = self._for_link(link)
        try:
            if records.record(link, key, digest, retention):
                return True
            if digest is not None:
                seen = records.seen(link, [key]).get(key)
                if seen is not None and seen.fingerprint not in (None, digest):
                    raise FingerprintConflict(f"in scope {scope!r} this biz-id was done before, with another body")
        except FingerprintConflict:
            raise
        except Exception as error:
            if _is_missing(error):
                raise ConfigurationError(
                    f"the table {records.name} is missing: run `idempotent-bus schema create`, call inbox.create(), or "
                    "let your migrations make it. It is not made here, since that could commit your transaction"
                ) from error
            raise
        return False

    def _for_link(self, link: Link) -> Records:
        database = link.database
        made = self._foreign.get(database)
        if made is None:
            if database == "mysql":
                schema.refuse_engines(link.run(schema.engines_query(self._tables), {})[0])
            made = self._foreign[database] = Records(self._tables, _DIALECTS[database]())
        return made

    # --- in a transaction of the inbox's --------------------------------------------------------------------

    @property
    def records(self) -> Records:
        """The statements for the engine's database, which has been connected to."""
        if self._records is None:
            self._records = Records(self._tables, self.engine.dialect)
        return self._records

    def transaction(self, *, apart: bool = False) -> contextlib.AbstractContextManager[Opened]:
        """A transaction that is rolled back at the end unless it was committed; at the first the table is created.

        apart: without a handler, so READ COMMITTED will do, whatever the engine's level is. Raises
        ConfigurationError if the engine commits each statement by itself.
        """
        connection = self._connect()
        return self._apart(connection) if apart else opened(connection, self.records, self._make_session)

    @contextlib.contextmanager
    def _apart(self, connection: sa.Connection) -> Iterator[Opened]:
        # When it is closed, the level is taken back, and that may fail too.
        with driver_errors(connection.dialect), opened(read_committed(connection), self.records) as made:
            yield made

    def _connect(self) -> sa.Connection:
        engine = self.engine
        if not self._there:
            with self._making:
                if not self._there:
                    if self._makes:
                        schema.create(engine, self._tables)
                    else:
                        with engine.connect() as connection:
                            schema.check_engines(connection, self._tables)
                    self._there = True
        return engine.connect()

    def count_attempt(self, work: Work, retention: float, least: int = 1) -> int:
        """Count an attempt, durably: their number, at least `least`. 0: completed in the meantime."""
        with self.transaction(apart=True) as made:
            with translated(made.connection):
                counted = self.records.count(made.link, work, retention, least)
            made.commit_plainly()
        return counted

    def is_done(self, scope: str, biz_id: Any, *, tenant: str = "") -> bool | None:
        """Whether this biz-id's effect is committed; None: there is no record. On a connection of the inbox's own.

        Decides nothing: it may be stale at once. Raises InvalidScope, InvalidBizId, and what SQLAlchemy raises.
        """
        key = record_key(check_scope(scope), canonical_biz_id(biz_id), tenant=check_tenant(tenant))
        with self.transaction(apart=True) as made, translated(made.connection):
            seen = self.records.seen(made.link, [key]).get(key)
        return None if seen is None else seen.completed

    def forget(self, scope: str, biz_id: Any, *, tenant: str = "") -> bool:
        """Delete the record of a biz-id, so that it may run again; True if there was one. Waits for who holds it.

        Raises as `is_done` does.
        """
        key = record_key(check_scope(scope), canonical_biz_id(biz_id), tenant=check_tenant(tenant))
        with self.transaction(apart=True) as made:
            with translated(made.connection):
                forgotten = self.records.forget(made.link, key)
            made.commit_plainly()
        return forgotten

    def purge(self, *, limit: int = 1000) -> int:
        """Delete at most `limit` records whose retention is over; returns how many. Repeat it until 0 comes back.

        Each call is one short transaction, which locks rows and never the table; rows in use are passed over.
        """
        with self.transaction(apart=True) as made:
            with translated(made.connection):
                purged = self.records.purge(made.link, limit)
            made.commit_plainly()
        return purged


def _engine_of(source: Any) -> tuple[sa.Engine | None, Callable[..., Session] | None]:
    if source is None or isinstance(source, sa.Engine):
        return source, None
    options = getattr(source, "kw", None)
    if not isinstance(options, dict) or not callable(source):
        raise ConfigurationError(f"Inbox takes an Engine or a sessionmaker, not a {type(source).__name__}")
    engine = options.get("bind")
    if not isinstance(engine, sa.Engine):
        raise ConfigurationError("the sessionmaker must be bound to an Engine: sessionmaker(engine)")
    if options.get("binds") or options.get("twophase"):
        raise ConfigurationError("a session with several binds, or in two phases, is not one transaction")
    return engine, source


def _is_missing(error: BaseException) -> bool:
    """True if the table is not there, as any kind of connection says it."""
    candidate: BaseException | None = error
    while candidate is not None:
        state = getattr(candidate, "sqlstate", None) or getattr(candidate, "pgcode", None)
        number = candidate.args[0] if candidate.args else None
        if state in _NO_TABLE or number in _NO_TABLE_NUMBERS or "no such table" in str(candidate):
            return True
        candidate = getattr(candidate, "orig", None) or candidate.__cause__
    return False
