"""How each database claims: the SQL lies in `sql/*.sql`, here is only what must happen around it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Dialect

from .. import schema
from ..dialects import NOW_US, Statement, compiled, load_texts, quoted
from ..model import (
    KEY_BYTES,
    Busy,
    Claimed,
    ClaimOutcome,
    ClaimRequest,
    Completed,
    Completion,
    Conflict,
    Hold,
    Quarantined,
    State,
)

__all__ = ["Flavour", "Unsettled", "Work", "choose", "microseconds"]

#: How often a refused claim looks again when the reason is gone by the time it looks.
_ROUNDS: Final = 20
#: The end of time, in microseconds: a quarantined record is kept until then, by both of its columns. No retention comes
#: near it, so that the purge index finds the quarantined ones too.
FAR: Final = 2**62
#: Claims per statement on MariaDB and MySQL, far below any limit of a packet.
_CHUNK: Final = 200
#: Bytes of results per statement there: escaped they may be twice as many, and a packet has 16 MiB by default.
_CHUNK_BYTES: Final = 2 * 1024 * 1024


class Unsettled(Exception):
    """A claim met others so often that it could neither win nor see why it did not."""


def microseconds(seconds: float) -> int:
    """Seconds as the stores keep them."""
    return round(seconds * 1_000_000)


class Work:
    """One borrowed connection, for one verb. Not for several threads."""

    __slots__ = ("_explicit", "_own", "_texts", "driver")

    def __init__(self, driver: Any, texts: dict[str, Statement], *, own: bool) -> None:
        self.driver = driver
        self._texts = texts
        # On an engine of our own every statement commits itself; on a user's engine nobody knows.
        self._own = own
        self._explicit = False

    def rows(self, name: str | Statement, /, **parameters: Any) -> list[Sequence[Any]]:
        """Run a statement that gives rows."""
        cursor = self._run(name, parameters)
        found: list[Sequence[Any]] = cursor.fetchall()
        cursor.close()
        return found

    def count(self, name: str | Statement, /, **parameters: Any) -> int:
        """Run a statement that changes rows; how many met its condition."""
        cursor = self._run(name, parameters)
        changed: int = cursor.rowcount
        cursor.close()
        return changed

    def begin(self, how: str = "BEGIN") -> None:
        """Open a transaction; `finish` commits it."""
        # A user's engine may have opened one (sqlite3 with autocommit=False does so at once).
        if not getattr(self.driver, "in_transaction", False):
            self._plain(how)
            self._explicit = True

    def finish(self) -> None:
        """Commit what is open."""
        if self._explicit and (self._own or getattr(self.driver, "autocommit", None) is True):
            self._plain("COMMIT")  # a driver in autocommit mode may take commit() for nothing to do
        elif not self._own:
            self.driver.commit()

    def _run(self, name: str | Statement, parameters: dict[str, Any]) -> Any:
        statement = self._texts[name] if isinstance(name, str) else name
        cursor = self.driver.cursor()
        try:
            cursor.execute(statement.text, statement.arguments(parameters))
        except BaseException:
            cursor.close()
            raise
        return cursor

    def _plain(self, text: str) -> None:
        cursor = self.driver.cursor()
        cursor.execute(text)
        cursor.close()


class Flavour:
    """One kind of database. Knows its statements; holds no connection."""

    file = ""

    def __init__(self, dialect: Dialect, tables: sa.MetaData) -> None:
        self.dialect = dialect
        self.texts = self._load(tables)
        self.statements = {name: compiled(text, dialect) for name, text in self.texts.items() if "{" not in text}

    def _load(self, tables: sa.MetaData, **fill: str) -> dict[str, str]:
        records = quoted(self.dialect, schema.records(tables))
        tokens = quoted(self.dialect, schema.tokens(tables, self.dialect))
        fill = {"records": records, "tokens": tokens, "now": NOW_US[self.file], "far": str(FAR), **fill}
        return load_texts(__package__, f"sql/{self.file}.sql", fill)

    def digest(self, value: bytes) -> Any:
        """A key or a nonce as this database takes it."""
        return value

    def hold(self, hold: Hold) -> dict[str, Any]:
        """The parameters that prove ownership."""
        return {"key": self.digest(hold.key), "token": hold.token, "nonce": self.digest(hold.nonce)}

    def claim(self, work: Work, requests: Sequence[ClaimRequest]) -> list[ClaimOutcome]:
        """As `BatchStore.claim_many`."""
        outcomes: dict[bytes, ClaimOutcome] = {}
        # Sorted by key: two batches then lock their common records in the same order and cannot deadlock.
        left = {request.key: request for request in sorted(requests, key=lambda request: request.key)}
        for _ in range(_ROUNDS):
            for key, claimed in self._take(work, list(left.values())):
                outcomes[key] = claimed
                del left[key]
            if not left:
                return [outcomes[request.key] for request in requests]
            for key, state, fingerprint, result, lease_left, nonce in self._seen(work, list(left)):
                refused = _refusal(left[key], state, fingerprint, result, lease_left, nonce)
                if refused is not None:
                    outcomes[key] = refused
                    del left[key]
            if not left:
                return [outcomes[request.key] for request in requests]
        raise Unsettled

    def _take(self, work: Work, requests: list[ClaimRequest]) -> Iterable[tuple[bytes, Claimed]]:
        raise NotImplementedError

    def _seen(self, work: Work, keys: list[bytes]) -> Iterable[Sequence[Any]]:
        raise NotImplementedError

    def renew(self, work: Work, holds: Sequence[Hold], lease: int, retention: int) -> list[bool]:
        """As `BatchStore.renew_many`: one transaction, in key order."""
        if len(holds) > 1:
            self._begin(work)
        kept = {
            hold: work.count("renew", **self.hold(hold), lease=lease, retention=retention) == 1
            for hold in sorted(holds, key=lambda hold: hold.key)
        }
        return [kept[hold] for hold in holds]

    def complete(self, work: Work, hold: Hold, result: bytes | None, retention: int) -> bool:
        """As `Store.complete`."""
        mine = self.hold(hold)
        # Second step only if the first met nothing: a repeat, or a hold that was lost. Completed is final, so that
        # looking afterwards tells the truth.
        changed = work.count("complete", **mine, result=result, retention=retention)
        return changed == 1 or bool(work.rows("completed", **mine))

    def complete_many(self, work: Work, completions: Sequence[Completion]) -> list[bool]:
        """As `BatchCompletionStore.complete_many`: one transaction, in key order."""
        if len(completions) > 1:
            self._begin(work)
        done = {
            one.hold: self.complete(work, one.hold, one.result, microseconds(one.retention))
            for one in sorted(completions, key=lambda one: one.hold.key)
        }
        return [done[one.hold] for one in completions]

    def quarantined(self, work: Work, limit: int, after: bytes) -> list[tuple[bytes, Sequence[Any]]]:
        """As `QuarantineStore.quarantined`: each key, and the columns that `lookup` gives."""
        first = _behind(after)
        if first is None or limit <= 0:
            return []
        rows = work.rows("quarantined", first=self.digest(first), limit=limit)
        return [(_bytes(row[8]), row[:8]) for row in rows]

    def forget(self, work: Work, key: bytes) -> bool:
        """As `ForgetStore.forget`: one statement where it applies, and a look where it does not."""
        for _ in range(_ROUNDS):
            if work.count("forget", key=self.digest(key)) == 1:
                return True
            rows = work.rows("lookup", key=self.digest(key))
            if not rows:
                return True
            state, lease_left = rows[0][0], rows[0][4]
            if state == State.QUARANTINED or (state in (State.RESERVED, State.IN_PROGRESS) and lease_left > 0):
                return False
        raise Unsettled

    def purge(self, work: Work, limit: int) -> int:
        """As `PurgeStore.purge`."""
        return work.count("purge", limit=limit)

    def _begin(self, work: Work) -> None:
        work.begin()

    def _asked(self, request: ClaimRequest) -> dict[str, Any]:
        return {
            "key": self.digest(request.key),
            "nonce": self.digest(request.nonce),
            "state": int(State.RESERVED if request.reserve else State.IN_PROGRESS),
            "counts": 0 if request.reserve else 1,
            "redrive": request.redrive,
            "lease": microseconds(request.lease),
            "retention": microseconds(request.retention),
            "fingerprint": request.fingerprint,
        }


class SQLite(Flavour):
    """SQLite: one writer at a time, so a transaction that begins IMMEDIATE is alone."""

    file = "sqlite"

    def _load(self, tables: sa.MetaData, **fill: str) -> dict[str, str]:
        counter = quoted(self.dialect, schema.tokens(tables, self.dialect))
        fill["next_token"] = f"(SELECT value + 1 FROM {counter} WHERE id = 1)"  # noqa: S608  # our own, quoted, name
        return super()._load(tables, **fill)

    def claim(self, work: Work, requests: Sequence[ClaimRequest]) -> list[ClaimOutcome]:
        self._begin(work)
        return super().claim(work, requests)

    def _begin(self, work: Work) -> None:
        # A transaction that reads first and writes later may find that it cannot write any more, at once and whatever
        # the busy timeout is. IMMEDIATE takes the write lock first, and waits for it.
        work.begin("BEGIN IMMEDIATE")

    def _take(self, work: Work, requests: list[ClaimRequest]) -> Iterable[tuple[bytes, Claimed]]:
        for request in requests:
            for row in work.rows("claim", **self._asked(request)):
                work.count("draw", token=row[1])
                yield request.key, _claimed(row)

    def _seen(self, work: Work, keys: list[bytes]) -> Iterable[Sequence[Any]]:
        for key in keys:
            yield from work.rows("seen", key=key)


class PostgreSQL(Flavour):
    """PostgreSQL: one statement, one round trip, one commit; many claims are one statement too."""

    file = "postgresql"

    def _load(self, tables: sa.MetaData, **fill: str) -> dict[str, str]:
        sequence = quoted(self.dialect, schema.tokens(tables, self.dialect))
        told = "CASE WHEN r.result = '' AND r.state <> 5 AND r.flags < 2 THEN NULL ELSE r.result END"
        return super()._load(tables, next_token=f"nextval('{sequence}')", told=told, **fill)

    def digest(self, value: bytes) -> str:
        return value.hex()  # a uuid's text; cheaper to make than a UUID

    def _take(self, work: Work, requests: list[ClaimRequest]) -> Iterable[tuple[bytes, Claimed]]:
        if len(requests) == 1:
            rows = work.rows("claim", **self._asked(requests[0]))
        else:
            asked = [self._asked(request) for request in requests]
            names = {
                "keys": "key",
                "nonces": "nonce",
                "states": "state",
                "counts": "counts",
                "redrives": "redrive",
                "leases": "lease",
                "retentions": "retention",
                "fingerprints": "fingerprint",
            }
            rows = work.rows("claim_many", **{many: [one[name] for one in asked] for many, name in names.items()})
        for row in rows:
            yield _bytes(row[0]), _claimed(row)

    def _seen(self, work: Work, keys: list[bytes]) -> Iterable[Sequence[Any]]:
        for row in work.rows("seen", keys=[key.hex() for key in keys]):
            yield _bytes(row[0]), *row[1:5], _bytes(row[5])

    def renew(self, work: Work, holds: Sequence[Hold], lease: int, retention: int) -> list[bool]:
        if len(holds) == 1:
            return super().renew(work, holds, lease, retention)
        rows = work.rows(
            "renew_many",
            keys=[hold.key.hex() for hold in holds],
            tokens=[hold.token for hold in holds],
            nonces=[hold.nonce.hex() for hold in holds],
            lease=lease,
            retention=retention,
        )
        kept = {Hold(_bytes(row[0]), row[1], _bytes(row[2])) for row in rows}
        return [hold in kept for hold in holds]

    def complete_many(self, work: Work, completions: Sequence[Completion]) -> list[bool]:
        if len(completions) == 1:
            return super().complete_many(work, completions)
        rows = work.rows(
            "complete_many",
            keys=[one.hold.key.hex() for one in completions],
            tokens=[one.hold.token for one in completions],
            nonces=[one.hold.nonce.hex() for one in completions],
            results=[one.result for one in completions],
            retentions=[microseconds(one.retention) for one in completions],
        )
        changed = {_bytes(row[0]) for row in rows}
        # What was not changed was completed before by the same hold, or is another's: completed is final, so that
        # looking afterwards tells the truth.
        return [one.hold.key in changed or bool(work.rows("completed", **self.hold(one.hold))) for one in completions]


class MariaDB(Flavour):
    """MariaDB: one statement that answers with the record, whoever holds it now."""

    file = "mysql"
    returning = True

    def __init__(self, dialect: Dialect, tables: sa.MetaData) -> None:
        super().__init__(dialect, tables)
        self._by_size: dict[tuple[str, int], Statement] = {}

    def _load(self, tables: sa.MetaData, **fill: str) -> dict[str, str]:
        if "next_token" not in fill:
            fill["next_token"] = f"NEXTVAL({quoted(self.dialect, schema.tokens(tables, self.dialect))})"
        returning = "RETURNING {outcome}" if self.returning else ""
        return super()._load(tables, returning=returning, **fill)

    def claim(self, work: Work, requests: Sequence[ClaimRequest]) -> list[ClaimOutcome]:
        asked = sorted(requests, key=lambda request: request.key)
        rows: dict[bytes, Sequence[Any]] = {}
        for start in range(0, len(asked), _CHUNK):
            for row in self._upsert(work, asked[start : start + _CHUNK]):
                rows[_bytes(row[0])] = row
        return [self._outcome(request, rows[request.key]) for request in requests]

    def _upsert(self, work: Work, requests: list[ClaimRequest]) -> list[Sequence[Any]]:
        return work.rows(self._sized("claim", len(requests)), **self._numbered(requests))

    def _numbered(self, requests: list[ClaimRequest]) -> dict[str, Any]:
        numbered = enumerate(self._asked(request) for request in requests)
        return {f"{name}_{number}": value for number, asked in numbered for name, value in asked.items()}

    def _sized(self, name: str, size: int) -> Statement:
        """A statement for so many rows or keys."""
        found = self._by_size.get((name, size))
        if found is None:
            text = self.texts[name]
            text = text.replace("{rows}", ", ".join(self.texts["row"].replace("#", str(i)) for i in range(size)))
            text = text.replace("{keys}", ", ".join(f":key_{i}" for i in range(size)))
            for word, block, between in (("{asked}", "asked_one", " UNION ALL "), ("{holds}", "one_hold", ", ")):
                text = text.replace(word, between.join(self.texts[block].replace("#", str(i)) for i in range(size)))
            found = self._by_size[name, size] = compiled(text, self.dialect)
        return found

    @staticmethod
    def _outcome(request: ClaimRequest, row: Sequence[Any]) -> ClaimOutcome:
        _, _, _, state, flags, fingerprint, result, lease_left = row
        if flags >= 2:
            return _claimed(row)
        # The verdict was made under the lock: whatever the clock says by now, somebody else held it.
        refused = _refusal(request, state, fingerprint, result, max(lease_left, 1), None)
        if refused is None:
            raise Unsettled
        return refused

    def complete_many(self, work: Work, completions: Sequence[Completion]) -> list[bool]:
        if len(completions) == 1:
            return super().complete_many(work, completions)
        asked = sorted(completions, key=lambda one: one.hold.key)
        work.begin()
        done: set[bytes] = set()
        for some in _chunks(asked):
            numbered: dict[str, Any] = {}
            for number, one in enumerate(some):
                mine = {**self.hold(one.hold), "result": one.result, "retention": microseconds(one.retention)}
                numbered |= {f"{name}_{number}": value for name, value in mine.items()}
            work.count(self._sized("complete_many", len(some)), **numbered)
            holds = {name: value for name, value in numbered.items() if name.startswith(("key_", "token_", "nonce_"))}
            done |= {_bytes(row[0]) for row in work.rows(self._sized("completed_many", len(some)), **holds)}
        return [one.hold.key in done for one in completions]

    def purge(self, work: Work, limit: int) -> int:
        work.begin()
        keys = [_bytes(row[0]) for row in work.rows("expired", limit=limit)]
        deleted = 0
        for start in range(0, len(keys), _CHUNK):
            part = keys[start : start + _CHUNK]
            deleted += work.count(self._sized("purge", len(part)), **{f"key_{i}": key for i, key in enumerate(part)})
        return deleted


class MySQL(MariaDB):
    """MySQL: no sequence and no RETURNING, so the claim is a transaction of three statements."""

    returning = False

    def _load(self, tables: sa.MetaData, **fill: str) -> dict[str, str]:
        fill |= {"next_token": "LAST_INSERT_ID()"}
        return super()._load(tables, **fill)

    def _upsert(self, work: Work, requests: list[ClaimRequest]) -> list[Sequence[Any]]:
        work.begin()
        if work.count("draw") != 1:
            raise Unsettled  # no counter: never hand out a token that might have been another's
        work.count(self._sized("claim", len(requests)), **self._numbered(requests))
        keys = {f"key_{i}": request.key for i, request in enumerate(requests)}
        return work.rows(self._sized("outcomes", len(requests)), **keys)


def choose(dialect: Dialect, tables: sa.MetaData) -> Flavour:
    """The flavour for a dialect whose engine has connected once (before, MySQL and MariaDB look alike)."""
    kinds: dict[str, type[Flavour]] = {"sqlite": SQLite, "postgresql": PostgreSQL}
    kind = kinds.get(dialect.name, MariaDB if schema.has_sequences(dialect) else MySQL)
    return kind(dialect, tables)


def _chunks(completions: Sequence[Completion]) -> Iterator[list[Completion]]:
    """As many of them as fit into one statement."""
    chunk: list[Completion] = []
    size = 0
    for one in completions:
        more = len(one.result or b"")
        if chunk and (len(chunk) == _CHUNK or size + more > _CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(one)
        size += more
    if chunk:
        yield chunk


def _claimed(row: Sequence[Any]) -> Claimed:
    _, token, attempts, state, flags = row[:5]
    return Claimed(token, attempts + (state == State.RESERVED), bool(flags & 1))


def _refusal(
    request: ClaimRequest, state: int, fingerprint: Any, result: Any, lease_left: int, nonce: bytes | None
) -> ClaimOutcome | None:
    """Why a claim was refused, by the record; None if the record would let it in: ask again."""
    held = state in (State.RESERVED, State.IN_PROGRESS)
    if state == State.RELEASED or (held and nonce == request.nonce):
        return None
    if None not in (fingerprint, request.fingerprint) and _bytes(fingerprint) != request.fingerprint:
        return Conflict(State(state))
    if state == State.COMPLETED:
        return Completed(None if result is None else bytes(result))
    if state == State.QUARANTINED:
        return Quarantined()
    return Busy(lease_left / 1_000_000) if lease_left > 0 else None


def _behind(after: bytes) -> bytes | None:
    """The first possible key behind `after`, which may be shorter than a key; None if there is none."""
    if len(after) < KEY_BYTES:
        return after.ljust(KEY_BYTES, b"\0")
    number = int.from_bytes(after[:KEY_BYTES], "big") + 1
    return number.to_bytes(KEY_BYTES, "big") if number < 1 << 8 * KEY_BYTES else None


def _bytes(value: Any) -> bytes:
    """A digest as bytes: drivers give bytes, a memoryview or a UUID."""
    return value.bytes if hasattr(value, "bytes") else bytes(value)
