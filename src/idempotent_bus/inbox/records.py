"""The records in SQL: every statement a method, run through a `Link` in a transaction that somebody else has opened."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Dialect

from .. import schema
from ..connections import Link, is_duplicate
from ..dialects import NOW_US, is_contention, load_texts, quoted
from ..work import Work

__all__ = ["Records", "Seen", "Taken", "is_lock_timeout", "is_meeting"]

#: How long a copy waits in the database for the transaction that holds its record, before it comes back later.
_WAIT: Final = "1s"
#: The same for each message of a window, once it is known that the window has met somebody.
_WAIT_IN_WINDOW: Final = "50ms"
_POINT: Final = "idempotent_bus_record"
#: After so many busy records in a row the rest of a window is put off too.
_MOST_BUSY: Final = 3
#: MariaDB counts in seconds.
_MARIADB_WAIT: Final = "SET STATEMENT innodb_lock_wait_timeout={} FOR"


class Taken(NamedTuple):
    """A record that is ours. attempts: counted before. transaction: its number on PostgreSQL, else empty."""

    attempts: int
    transaction: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """A record that was there before."""

    completed: bool
    fingerprint: bytes | None
    result: bytes | None


class Records:
    """The statements for one kind of database. Holds no connection; safe for threads.

    dialect: one that has connected knows its server, and then waits for other transactions are brief. With one that has
    not, only `record`, `seen` and what changes a known record may be used.
    """

    def __init__(self, tables: sa.MetaData, dialect: Dialect) -> None:
        self.database = "mysql" if dialect.name == "mariadb" else dialect.name
        mariadb = bool(getattr(dialect, "is_mariadb", False))
        self.is_mariadb = mariadb
        self.name = quoted(dialect, schema.inbox(tables))
        self._sets_wait = self.database == "mysql" and not mariadb
        fill = {"inbox": self.name, "now": NOW_US[self.database], "wait": _WAIT, "briefly": ""}
        at_once = {**fill, "wait": _WAIT_IN_WINDOW}
        if mariadb:
            fill["briefly"], at_once["briefly"] = _MARIADB_WAIT.format(1), _MARIADB_WAIT.format(0)
        path = f"sql/{self.database}.sql"
        self._texts, self._window = (load_texts(__package__, path, words) for words in (fill, at_once))

    # --- taking a record ------------------------------------------------------------------------------

    def take(self, link: Link, work: Work, retention: float) -> Taken | None:
        """Insert the record as completed. None: it was, by an earlier commit.

        Waits briefly for a transaction that is inserting the same record, and sees how it ended.
        """
        return self._take(link, self._texts, "take", _row(self.database, work, retention), completed=1)

    def record(self, link: Link, key: bytes, fingerprint: bytes | None, retention: float) -> bool:
        """The same in the user's transaction, who says how long statements wait there. False: completed before."""
        values = {
            "key": _key(self.database, key),
            "fingerprint": fingerprint,
            "retention": _us(retention),
            "redrive": 0,
        }
        if self.database != "mysql":
            return link.run(self._texts["record"], values, fetch=False)[1] > 0
        return self._take(link, self._texts, "record", values, completed=1) is not None

    def take_many(self, link: Link, works: Sequence[Work], retention: float) -> dict[bytes, Taken]:
        """Insert the records of a window, in the order of their keys, not completed yet; those that are ours now.

        Raises the driver's error if another transaction holds one of them for longer than briefly.
        """
        works = sorted(works, key=lambda work: work.key)
        if self.database == "postgresql":
            values = {
                "keys": [work.key.hex() for work in works],
                "redrives": [work.redrive for work in works],
                "fingerprints": [work.fingerprint for work in works],
                "retention": _us(retention),
            }
            earlier = self._wait_briefly(link, self._texts)
            found, _ = link.run(self._texts["take_many"], values)
            self._wait_as_before(link, earlier)
            return {_bytes(row[0]): Taken(row[1], row[2]) for row in found}
        if self.database == "mysql":
            text, values = self._many_rows(works, retention)
            try:
                link.run(text, values)
            except Exception as error:
                if not is_duplicate(error):
                    raise
            else:
                return {work.key: Taken(0) for work in works}
        if self.database == "sqlite":
            rows = [_row(self.database, work, retention) for work in works]
            if link.run_many(self._texts["take_new"], rows) == len(rows):
                return {work.key: Taken(0) for work in works}
            # Some were there. Those that are ours by now are taken once more, which changes nothing.
        each = {work.key: self.take_one(link, work, retention) for work in works}
        return {key: taken for key, taken in each.items() if taken is not None}

    def take_one(self, link: Link, work: Work, retention: float) -> Taken | None:
        """One record of a window."""
        return self._take(link, self._window, "take_one", _row(self.database, work, retention), completed=0)

    def take_each(self, link: Link, works: Sequence[Work], retention: float) -> tuple[dict[bytes, Taken], set[bytes]]:
        """As `take_many`, where that met somebody: those that are ours, and the keys of those that others hold.

        One by one, with hardly a wait. After some busy ones in a row the rest counts as busy too: somebody else is at
        the same window.
        """
        taken: dict[bytes, Taken] = {}
        busy: set[bytes] = set()
        in_a_row = 0
        savepoints = self.database == "postgresql"  # elsewhere an error of one statement ends no transaction
        earlier = self._wait_briefly(link, self._window) if savepoints else None
        for work in sorted(works, key=lambda work: work.key):
            if in_a_row >= _MOST_BUSY:
                busy.add(work.key)
                continue
            if savepoints:
                link.run(f"SAVEPOINT {_POINT}", {})
            try:
                found = self.take_one(link, work, retention)
            except Exception as error:
                if not is_lock_timeout(error):
                    raise
                busy.add(work.key)
                in_a_row = _MOST_BUSY if self.database == "sqlite" else in_a_row + 1  # there it is the whole file
                if savepoints:
                    link.run(f"ROLLBACK TO SAVEPOINT {_POINT}", {})
                continue
            in_a_row = 0
            if savepoints:
                link.run(f"RELEASE SAVEPOINT {_POINT}", {})
            if found is not None:
                taken[work.key] = found
        if savepoints:
            self._wait_as_before(link, earlier)
        return taken, busy

    # --- a record that is there -----------------------------------------------------------------------

    def seen(self, link: Link, keys: Sequence[bytes]) -> dict[bytes, Seen]:
        """What is there, by key."""
        if self.database == "postgresql":
            rows = link.run(self._texts["seen"], {"keys": [key.hex() for key in keys]})[0]
        else:
            rows = [row for key in keys for row in link.run(self._texts["seen"], {"key": key})[0]]
        return {_bytes(row[0]): Seen(bool(row[1]), _maybe(row[2]), _maybe(row[3])) for row in rows}

    def count(self, link: Link, work: Work, retention: float, least: int = 1) -> int:
        """Count an attempt, up to `least` at the least; their number. 0: the record is completed."""
        values = {**_row(self.database, work, retention), "least": least}
        if self.database != "mysql":
            if self.database == "postgresql":
                self._wait_briefly(link, self._texts)  # for this transaction, which is our own
            rows = link.run(self._texts["count"], values)[0]
            return int(rows[0][0]) if rows else 0
        self._wait(link, "wait_briefly")
        try:
            link.run(self._texts["count"], values)
        except Exception as error:
            if not is_duplicate(error):
                raise
            changed = link.run(self._texts["count_again"], values)[1]
            return self._attempts(link, values["key"]) if changed else 0
        finally:
            self._wait(link, "wait_as_before")
        return least

    def begin(self, link: Link, key: bytes) -> None:
        """In a window: its handler begins, so from here on a commit of this transaction completes it."""
        link.run(self._texts["begin"], {"key": _key(self.database, key)}, fetch=False)

    def begin_text(self, key: bytes) -> str:
        """The same on MariaDB, as a statement without parameters."""
        return f"UPDATE {self.name} SET completed = 1 WHERE record_key = x'{key.hex()}'"  # noqa: S608 - digits only

    def begin_texts(self, keys: Sequence[bytes]) -> list[str]:
        """The same for several on PostgreSQL, to be sent with others."""
        listed = ", ".join(f"'{key.hex()}'" for key in keys)  # hexadecimal digits only
        return [f"UPDATE {self.name} SET completed = 1 WHERE record_key IN ({listed})"] if keys else []  # noqa: S608

    def failed(self, link: Link, key: bytes, attempts: int) -> None:
        """In a window: its handler has raised, and its savepoint was rolled back."""
        link.run(self._texts["failed"], {"key": _key(self.database, key), "attempts": attempts})

    def store(self, link: Link, key: bytes, result: bytes) -> None:
        """Keep the handler's result with its record."""
        link.run(self._texts["store"], {"key": _key(self.database, key), "result": result})

    def store_texts(self, results: Mapping[bytes, bytes]) -> list[str]:
        """The same for several on PostgreSQL, as statements without parameters, to be sent with others."""
        if not results:
            return []
        # Hexadecimal digits only: nothing in them could end a literal.
        rows = ", ".join(f"(CAST('{key.hex()}' AS uuid), '{result.hex()}')" for key, result in results.items())
        return [
            f"UPDATE {self.name} AS r SET result = decode(v.result, 'hex') "  # noqa: S608
            f"FROM (VALUES {rows}) AS v (record_key, result) WHERE r.record_key = v.record_key"
        ]

    def forget(self, link: Link, key: bytes) -> bool:
        """Delete the record; True if there was one."""
        return link.run(self._texts["forget"], {"key": _key(self.database, key)})[1] > 0

    def purge(self, link: Link, limit: int) -> int:
        """Delete at most `limit` records whose retention is over; returns how many were looked at.

        Only rows are locked, never a table, and only one by one where a database would lock the gaps between them.
        """
        if self.database != "mysql":
            return link.run(self._texts["purge"], {"limit": limit})[1]
        rows = link.run(self._texts["over"], {"limit": limit})[0]
        # Looked at again: a record may have been taken anew in between.
        return sum(link.run(self._texts["purge"], {"key": row[0]})[1] for row in rows)

    def _wait_briefly(self, link: Link, texts: Mapping[str, str]) -> Any:
        """On PostgreSQL: from now on, in this transaction. Gives what it was before."""
        return link.run(texts["wait_briefly"], {})[0][0][0]

    def _wait_as_before(self, link: Link, earlier: Any) -> None:
        link.run(self._texts["wait_as_before"], {"wait": earlier})

    # --- MySQL's way ------------------------------------------------------------------------------------

    def _take(
        self, link: Link, texts: Mapping[str, str], name: str, values: dict[str, Any], *, completed: int
    ) -> Taken | None:
        if self.database != "mysql":
            rows = link.run(texts[name], values)[0]
            if not rows:
                return None
            return Taken(rows[0][0], rows[0][1] if len(rows[0]) > 1 else "")
        if name != "record":
            self._wait(link, "wait_briefly")
        try:
            link.run(texts[name], values)
        except Exception as error:
            # It ends the statement only, and leaves the row locked for reading.
            if not is_duplicate(error):
                raise
            again = "record_again" if name == "record" else "take_again"
            if not link.run(texts[again], {**values, "completed": completed})[1]:
                return None
            return Taken(self._attempts(link, values["key"]))
        finally:
            if name != "record":
                self._wait(link, "wait_as_before")
        return Taken(0)

    def _many_rows(self, works: Sequence[Work], retention: float) -> tuple[str, dict[str, Any]]:
        head, tail = self._texts["take_one"].split("VALUES", 1)
        rows: list[str] = []
        values: dict[str, Any] = {"retention": _us(retention)}
        for number, work in enumerate(works):
            row = tail
            for name, value in (("key", work.key), ("redrive", work.redrive), ("fingerprint", work.fingerprint)):
                row = row.replace(f":{name}", f":{name}{number}")
                values[f"{name}{number}"] = value
            rows.append(row)
        return f"{head}VALUES{','.join(rows)}", values

    def _attempts(self, link: Link, key: Any) -> int:
        return int(link.run(self._texts["attempts"], {"key": key})[0][0][0])

    def _wait(self, link: Link, name: str) -> None:
        if self._sets_wait:
            link.run(self._texts[name], {})


def is_lock_timeout(error: BaseException) -> bool:
    """True if another transaction held what a statement wanted for longer than it was told to wait."""
    driver_error = getattr(error, "orig", None) or error
    if driver_error.args[:1] == (1205,):
        return True
    state = getattr(driver_error, "sqlstate", None) or getattr(driver_error, "pgcode", None)
    return state == "55P03" if state is not None else "database is locked" in str(driver_error)


def is_meeting(error: sa.exc.DBAPIError) -> bool:
    """True for a deadlock, a serialization failure, or MySQL's own lock timeout: nothing is committed, do it again."""
    if error.orig is None:
        return False
    return is_contention(error.orig) or error.orig.args[:1] == (1205,)


def _row(database: str, work: Work, retention: float) -> dict[str, Any]:
    return {
        "key": _key(database, work.key),
        "fingerprint": work.fingerprint,
        "redrive": work.redrive,
        "retention": _us(retention),
    }


def _us(seconds: float) -> int:
    return int(seconds * 1_000_000)


def _key(database: str, key: bytes) -> Any:
    return key.hex() if database == "postgresql" else key  # 16 bytes are a uuid there


def _bytes(key: Any) -> bytes:
    if isinstance(key, str):
        key = uuid.UUID(key)
    return key.bytes if isinstance(key, uuid.UUID) else bytes(key)


def _maybe(value: Any) -> bytes | None:
    return None if value is None else bytes(value)
