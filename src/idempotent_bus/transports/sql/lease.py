"""A live consumer's lease: while it is renewed, everything that its owner holds stays invisible to others.

One row a channel, whatever it holds, so renewing costs one UPDATE a database and process. A thread renews every third
of the shortest timeout, so a slow handler keeps its message; a process that died or was stopped does not renew, and
whoever polls next moves its messages back.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
import weakref
from typing import Any
from uuid import uuid4

import sqlalchemy as sa

from .database import ERRORS, Database
from .tables import affected

logger = logging.getLogger(__name__)


class Lease:
    """One owner's lease as its process knows it. `lost` is final: what it held belongs to others."""

    def __init__(self, timeout: float) -> None:
        self.owner = uuid4().hex
        self.timeout = timeout
        self.lost = False
        self.written = False
        # Taken before the statement that renews, so that it can only be too early.
        self.renewed_at = time.monotonic()

    @property
    def doubtful(self) -> bool:
        """It may have lapsed by this process's own clock: ask the database before acting on it."""
        return time.monotonic() - self.renewed_at > self.timeout * 0.9


@functools.cache
def _statements(database: Database) -> tuple[Any, Any]:
    """To renew and to write a lease; built once, because they are part of every fetch."""
    table = database.tables.lease
    owner = sa.bindparam("my_owner", type_=sa.String())
    timeout: Any = sa.bindparam("my_timeout", type_=sa.Double())
    until = database.now + timeout
    update = sa.update(table).where(table.c.owner == owner).values(until=until)
    return update, sa.insert(table).values(owner=owner, until=until, timeout=timeout)


def renew(connection: sa.Connection, database: Database, lease: Lease) -> bool:
    """Renew in the caller's transaction; the first time writes the row. False: it lapsed and was taken apart."""
    if lease.lost:
        return False
    before = time.monotonic()
    update, insert = _statements(database)
    done = connection.execute(
        update if lease.written else insert, {"my_owner": lease.owner, "my_timeout": lease.timeout}
    )
    if lease.written and not affected(done):
        lease.lost = True
        return False
    lease.renewed_at = before
    return True


class LeaseKeeper:
    """Renews the leases of one database in the background, in a thread that lives as long as there are any."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._mutex = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, lease: Lease) -> None:
        """Keep this lease from now on. Cheap where it is kept already: waking the thread costs a switch of threads."""
        if lease in self._leases:
            return
        with self._mutex:
            self._leases.add(lease)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="idempotent-bus-leases", daemon=True)
                self._thread.start()
            else:
                self._wake.set()

    def remove(self, lease: Lease) -> None:
        with self._mutex:
            self._leases.discard(lease)
        self._wake.set()

    def _run(self) -> None:
        pause = 0.0
        while True:
            self._wake.wait(pause)
            with self._mutex:
                self._wake.clear()
                leases = [lease for lease in self._leases if not lease.lost]
                if not leases:
                    self._thread = None
                    return
            pause = min(lease.timeout for lease in leases) / 3
            due = [lease for lease in leases if time.monotonic() - lease.renewed_at >= lease.timeout / 3.1]
            try:
                if due:
                    self._renew(due)
            except ERRORS:
                logger.warning("leases could not be renewed; trying again", exc_info=True)
                pause = min(pause / 4, 1.0)

    def _renew(self, leases: list[Lease]) -> None:
        table = self._database.tables.lease
        owners = [lease.owner for lease in leases]

        def work(connection: sa.Connection) -> set[str]:
            until = self._database.now + table.c.timeout
            connection.execute(sa.update(table).where(table.c.owner.in_(owners)).values(until=until))
            return set(connection.scalars(sa.select(table.c.owner).where(table.c.owner.in_(owners))))

        before = time.monotonic()
        alive = self._database.run(work, again=True)
        for lease in leases:
            if lease.owner in alive:
                lease.renewed_at = before
            elif lease.written:
                lease.lost = True


_keepers: weakref.WeakKeyDictionary[Database, LeaseKeeper] = weakref.WeakKeyDictionary()
_mutex = threading.Lock()


def keeper_of(database: Database) -> LeaseKeeper:
    """The one keeper of this database in this process."""
    with _mutex:
        if database not in _keepers:
            _keepers[database] = LeaseKeeper(database)
        return _keepers[database]


def _after_fork_in_child() -> None:
    # A child has neither the thread nor the leases of its parent, and a lock may have been held by a thread it lacks.
    global _mutex
    _mutex = threading.Lock()
    _keepers.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
