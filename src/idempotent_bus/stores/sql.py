"""The dedup store in a SQL database: a SQLite file (nothing to install or run), PostgreSQL, MariaDB or MySQL.

    open_store("sqlite:///dedup.db")
    open_store("postgresql://user@host/db")
    SQLStore(engine)                         # an engine that you have already

A claim is one atomic statement whose update applies only if the record may be claimed; see `sql/*.sql`.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.pool import PoolProxiedConnection

from .. import schema as schema_module
from ..dialects import is_contention
from ..errors import StoreUnavailable
from ..model import NONCE_BYTES, ClaimOutcome, ClaimRequest, Completion, Hold, Record, State
from ..schema import PREFIX
from ..store import CompletionStream
from ..watchdog import SOCKET, Watchdog, watch
from .sql_engine import open_engine
from .sql_flavours import Flavour, Unsettled, Work, choose, microseconds
from .streams import GatheringStream

__all__ = ["SQLStore", "open_sql"]

T = TypeVar("T")

#: In a pooled connection's info: it has worked before, so that its loss says nothing about the server now.
_PROVEN: Final = "idempotent_bus_proven"
_CONTENTION_TRIES: Final = 8
#: Connections of a stream of completions, unless the user says otherwise.
STREAM_CONNECTIONS: Final = 8
#: The dialect and the driver that can stream.
_STREAMING: Final = ("postgresql", "psycopg")
#: Seconds for which a failure to open the store is told to others without trying again.
_FAILURE_SHARED: Final = 0.25


def open_sql(
    url: str,
    *,
    table_prefix: str = PREFIX,
    schema: str | None = None,
    create: bool = True,
    timeout: float = 5.0,
    stream_connections: int = STREAM_CONNECTIONS,
    **engine_options: Any,
) -> SQLStore:
    """Open the dedup store in the database that `url` names. Nothing is connected before the first use.

    `sqlite:///file`, `postgresql://` (psycopg 3), `mysql://` and `mariadb://` (PyMySQL), or with a driver named. SQLite
    commits survive a power cut; `?synchronous=NORMAL` trades that for speed (the newest completions may then be lost
    with the power, and their messages run again).
    table_prefix, schema: where the tables are. create: make them at first use if they are missing.
    timeout: seconds that a call may wait for a lock or for a silent server before it raises StoreUnavailable.
    stream_connections: as for `SQLStore`.
    engine_options: for SQLAlchemy's `create_engine`, such as `pool_size` (one connection serves one call at a time).

    Raises ConfigurationError for a URL or a name that cannot be used. SQLite in memory is refused: use `memory://`.
    """
    engine, timeout = open_engine(url, timeout=timeout, options=engine_options)
    return SQLStore(
        engine,
        table_prefix=table_prefix,
        schema=schema,
        create=create,
        timeout=timeout,
        stream_connections=stream_connections,
        _own=True,
    )


class SQLStore:
    """A store in a SQL database; safe for threads, processes and forks.

    engine: yours; its settings are left alone, each call takes a connection from its pool and gives it back. It must
    not be in memory, and your engine's own timeouts decide how long a lock or a silent server may be waited for.
    After a fork the child drops the pool's connections without closing them, as it must.
    table_prefix, schema, create: as for `open_sql`. timeout: seconds within which a call may be tried again.
    stream_connections: with PostgreSQL and psycopg 3 a window's completions are sent without waiting for each, over at
    most so many connections beside the pool's, for each thread that has windows, opened when commits do not keep up.
    0: none, and each completion of a window is waited for, as on the other databases.

    It is a BatchStore, a ForgetStore, a LookupStore, a PurgeStore and a QuarantineStore too. Quarantined records stand
    together at the end of the purge index: finding them reads nothing else, and needs no index of its own. Each verb is
    one statement.
    """

    _stream_connections = 0

    def __init__(
        self,
        engine: Engine,
        *,
        table_prefix: str = PREFIX,
        schema: str | None = None,
        create: bool = True,
        timeout: float = 5.0,
        stream_connections: int = STREAM_CONNECTIONS,
        _own: bool = False,
    ) -> None:
        self._engine = engine
        self._tables = schema_module.metadata(table_prefix, schema, parts=("store",))
        self._create = create
        self._timeout = timeout
        dialect = engine.dialect
        self._stream_connections = stream_connections if (dialect.name, dialect.driver) == _STREAMING else 0
        self._streams: weakref.WeakSet[CompletionStream] = weakref.WeakSet()
        self._own = _own
        self._errors = (engine.dialect.loaded_dbapi.Error, sa.exc.SQLAlchemyError, OSError, Unsettled)
        self._flavour: Flavour | None = None
        self._failure: tuple[float, Exception] | None = None
        self._watchdog = Watchdog(timeout + 1)
        self._after_fork()
        if _own and dialect.name == "postgresql":
            watch(engine, self._watchdog)
        _stores.add(self)

    # --- the verbs -----------------------------------------------------------------------------------

    def claim(self, request: ClaimRequest, /) -> ClaimOutcome:
        """As `Store.claim`."""
        return self._perform(lambda flavour, work: flavour.claim(work, (request,)))[0]

    def claim_many(self, requests: Sequence[ClaimRequest], /) -> list[ClaimOutcome]:
        """As `BatchStore.claim_many`; one transaction (on MariaDB and MySQL one per 200)."""
        if not requests:
            return []
        return self._perform(lambda flavour, work: flavour.claim(work, requests))

    def renew(self, hold: Hold, /, *, lease: float, retention: float) -> bool:
        """As `Store.renew`."""
        return self.renew_many((hold,), lease=lease, retention=retention)[0]

    def renew_many(self, holds: Sequence[Hold], /, *, lease: float, retention: float) -> list[bool]:
        """As `BatchStore.renew_many`; one transaction."""
        if not holds:
            return []
        lasting = microseconds(lease), microseconds(retention)
        return self._perform(lambda flavour, work: flavour.renew(work, holds, *lasting))

    def complete(self, hold: Hold, /, *, result: bytes | None, retention: float) -> bool:
        """As `Store.complete`."""
        kept = microseconds(retention)

        return self._perform(lambda flavour, work: flavour.complete(work, hold, result, kept))

    def complete_many(self, completions: Sequence[Completion], /) -> list[bool]:
        """As `BatchCompletionStore.complete_many`; one transaction."""
        if not completions:
            return []
        return self._perform(lambda flavour, work: flavour.complete_many(work, completions))

    def stream(self) -> CompletionStream:
        """As `StreamStore.stream`; with psycopg 3 a few connections of its own, else a thread that shares commits."""
        if self._stream_connections < 1:
            return GatheringStream(self)
        from .pg_stream import PgStream

        stream = PgStream(
            self._connection_of_its_own,
            lambda: (self._flavour or self._prepare()).texts["complete"],
            lambda one: self.complete(one.hold, result=one.result, retention=one.retention),
            most=self._stream_connections,
            limit=self._timeout + 1,
        )
        self._streams.add(stream)
        return stream

    def release(self, hold: Hold, /, *, attempts: int, retention: float) -> bool:
        """As `Store.release`."""
        kept = microseconds(retention)
        return self._perform(
            lambda flavour, work: work.count("release", **flavour.hold(hold), attempts=attempts, retention=kept) == 1
        )

    def abandon(self, hold: Hold, /, *, attempts: int, retention: float) -> bool:
        """As `Store.abandon`."""
        kept = microseconds(retention)
        return self._perform(
            lambda flavour, work: work.count("abandon", **flavour.hold(hold), attempts=attempts, retention=kept) == 1
        )

    def quarantine(self, hold: Hold, /, *, note: bytes) -> bool:
        """As `QuarantineStore.quarantine`."""
        return self._perform(lambda flavour, work: work.count("quarantine", **flavour.hold(hold), note=note) == 1)

    def quarantined(self, *, limit: int = 100, after: bytes = b"") -> list[Record]:
        """As `QuarantineStore.quarantined`."""
        rows = self._perform(lambda flavour, work: flavour.quarantined(work, limit, after))
        return [_record(key, row) for key, row in rows]

    def resolve(self, key: bytes, /, *, completed: bool, retention: float) -> bool:
        """As `QuarantineStore.resolve`. Asked again by itself after a lost connection, it knows its own work."""
        state = int(State.COMPLETED if completed else State.RELEASED)
        nonce, kept = os.urandom(NONCE_BYTES), microseconds(retention)

        def act(flavour: Flavour, work: Work) -> bool:
            named = {"key": flavour.digest(key), "nonce": flavour.digest(nonce)}
            return work.count("resolve", **named, state=state, retention=kept) == 1

        return self._perform(act)

    def forget(self, key: bytes, /) -> bool:
        """As `ForgetStore.forget`. The row itself goes with a purge, when it would have gone anyway."""
        return self._perform(lambda flavour, work: flavour.forget(work, key))

    def lookup(self, key: bytes, /) -> Record | None:
        """As `LookupStore.lookup`."""
        rows = self._perform(lambda flavour, work: work.rows("lookup", key=flavour.digest(key)))
        return _record(key, rows[0]) if rows else None

    def purge(self, *, limit: int = 1000) -> int:
        """As `PurgeStore.purge`; a record that somebody is using is passed over where the database can (not SQLite)."""
        return self._perform(lambda flavour, work: flavour.purge(work, limit))

    def close(self) -> None:
        """Close the connections of an engine of our own; a user's engine is left open. It may be used again."""
        for stream in list(self._streams):
            stream.close()
        if self._own:
            self._engine.dispose()
            self._watchdog.close()

    # --- around every verb ---------------------------------------------------------------------------

    def _perform(self, act: Callable[[Flavour, Work], T]) -> T:
        """Do it on a pooled connection. Every verb may be repeated: that is the answer to a deadlock or a stale one."""
        tries = 0
        gives_up = time.monotonic() + self._timeout
        while True:
            tries += 1
            try:
                flavour = self._flavour or self._prepare()
                connection = self._engine.raw_connection()
            except self._errors as error:
                raise StoreUnavailable(_explain(error)) from _root(error)
            proven = connection.info.get(_PROVEN, False)
            watched = connection.info.get(SOCKET)
            ticket = self._watchdog.start(watched) if watched is not None else 0
            try:
                work = Work(connection.driver_connection, flavour.statements, own=self._own)
                answer = act(flavour, work)
                work.finish()
            except self._errors as error:
                lost = self._is_lost(error, connection)
                _drop(connection)
                again = (is_contention(error) and tries < _CONTENTION_TRIES) or (lost and (proven or tries == 1))
                if not again or time.monotonic() > gives_up:
                    raise StoreUnavailable(_explain(error)) from _root(error)
                if not lost:
                    time.sleep(random.random() * 0.01 * tries)  # noqa: S311  # spreads retries, hides nothing
            except BaseException:
                # A time limit or a signal came in the middle: what the connection would say next is unknown.
                _drop(connection)
                raise
            else:
                connection.info[_PROVEN] = True
                connection.close()
                return answer
            finally:
                if watched is not None:
                    self._watchdog.stop(ticket)

    def _is_lost(self, error: BaseException, connection: PoolProxiedConnection) -> bool:
        """Whether the connection broke, rather than the statement."""
        dialect = self._engine.dialect
        if isinstance(error, OSError):
            return True
        return isinstance(error, dialect.loaded_dbapi.Error) and dialect.is_disconnect(
            error, connection.driver_connection, None
        )

    def _connection_of_its_own(self) -> Any:
        """The driver's connection, set up as the pool's are, and no longer one of them."""
        try:
            if self._flavour is None:
                self._prepare()
            pooled = self._engine.raw_connection()
            connection, spare = pooled.driver_connection, pooled.info.get(SOCKET)
            pooled.detach()
        except self._errors as error:
            raise StoreUnavailable(_explain(error)) from _root(error)
        if spare is not None:
            spare.close()  # the watchdog's: who asks for this connection looks at the time itself
        return connection

    def _prepare(self) -> Flavour:
        """Before the first use: learn what server it is, and make the tables."""
        # Threads that waited while one failed share its failure: each trying by itself would wait in a long row.
        if not self._lock.acquire(timeout=self._timeout + 1):
            raise TimeoutError("another thread is still opening the store")
        try:
            if self._flavour is None:
                if self._failure is not None and time.monotonic() < self._failure[0] + _FAILURE_SHARED:
                    raise self._failure[1]
                self._flavour = self._learn()
            return self._flavour
        finally:
            self._lock.release()

    def _learn(self) -> Flavour:
        try:
            if self._create:
                schema_module.create(self._engine, self._tables)
            else:
                with self._engine.connect() as connection:
                    schema_module.check_engines(connection, self._tables)
            return choose(self._engine.dialect, self._tables)
        except self._errors as error:
            self._failure = (time.monotonic(), error)
            raise

    def _after_fork(self) -> None:
        """What must not be shared with a parent: a lock that one of its threads may hold."""
        self._lock = threading.Lock()

    def _forked(self) -> None:
        # Closing an inherited connection would end the parent's session (or, for SQLite, clean up its log): they are
        # kept, unused, for as long as this process lives.
        _inherited.append(self._engine.pool)
        self._streams = weakref.WeakSet()
        self._engine.dispose(close=False)
        self._after_fork()


_stores: weakref.WeakSet[SQLStore] = weakref.WeakSet()
_inherited: list[Any] = []


def _in_child() -> None:
    for store in list(_stores):
        store._forked()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_in_child)


def _record(key: bytes, row: Sequence[Any]) -> Record:
    state, token, attempts, redrive, lease_left, retention_left, fingerprint, result = row
    held = state in (State.RESERVED, State.IN_PROGRESS)
    return Record(
        key=key,
        state=State(state),
        token=token,
        attempts=attempts,
        redrive=redrive,
        lease_left=max(0.0, lease_left / 1_000_000) if held else 0.0,
        retention_left=math.inf if state == State.QUARANTINED else max(0.0, retention_left / 1_000_000),
        fingerprint=None if fingerprint is None else bytes(fingerprint),
        result=None if result is None else bytes(result),
    )


def _drop(connection: PoolProxiedConnection) -> None:
    """Close a connection whose state is unknown, instead of giving it back."""
    spare: socket.socket | None = connection.info.get(SOCKET)
    if getattr(connection.driver_connection, "in_transaction", False):
        # SQLite closes a connection only when its last statement is forgotten, and an error that somebody keeps may
        # keep one: the file would stay locked for as long.
        with contextlib.suppress(Exception):
            connection.rollback()
    connection.invalidate()
    if spare is not None:
        spare.close()


def _root(error: BaseException) -> BaseException:
    """The driver's own error: SQLAlchemy's wrapper may print parameters."""
    return getattr(error, "orig", None) or error


def _explain(error: BaseException) -> str:
    """What happened, without a value in it, and what to do."""
    root = _root(error)
    name = type(root).__name__
    if isinstance(root, Unsettled):
        return "the record is claimed and given up too often at this moment; try again"
    if name in ("UndefinedTable", "ProgrammingError") or "no such table" in str(root):
        return f"the SQL store's tables cannot be used ({name}): are they created, and is the right to use them given?"
    if isinstance(root, sa.exc.TimeoutError):
        return "no connection to the SQL store became free in time; raise pool_size to the number of threads"
    return f"the SQL store did not answer as it should ({name}); the outcome is unknown, ask again"
