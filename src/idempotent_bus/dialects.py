"""What differs between SQL databases: column types, the clock, the errors, and SQL files filled in for one of them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.engine import Dialect

__all__ = ["NOW_US", "NO_LOITERING", "Blob", "Digest", "Statement", "compiled", "is_contention", "is_read_only"]
__all__ += ["load_texts", "quoted"]

#: The database's own clock, as whole microseconds since the epoch, read at the moment of evaluation. By file name.
NOW_US: Final = {
    # now() and statement_timestamp() are older than a lock that the statement waited for; clock_timestamp() is not.
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)",
    # SYSDATE(), unlike NOW(), is read when it is evaluated. It is in the session's time zone, whose distance from UTC
    # is taken from two values of one moment: right in any zone, in the hour that daylight saving repeats as well.
    "mysql": (
        "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', SYSDATE(6)) - TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), NOW(6)))"
    ),
    # Read once per statement, after the lock was taken. In steps of a millisecond: unixepoch('now', 'subsec') is no
    # finer, and SQLite before 3.42 does not have it.
    "sqlite": "(CAST((julianday('now') - 2440587.5) * 86400000 + 0.5 AS INTEGER) * 1000)",
}

#: Errors that say "you met somebody; do it again": serialization failures and deadlocks.
_CONTENTION_STATES: Final = frozenset({"40001", "40P01"})
_CONTENTION_NUMBERS: Final = frozenset({1213, 1020})
#: Errors that say "here nothing can be written": a standby, most often one that was the primary a moment ago.
_READ_ONLY_STATE: Final = "25006"
_READ_ONLY_NUMBERS: Final = frozenset({1290, 1792, 1836})

#: A process that was stopped, or whose machine vanished, inside a transaction must not keep its rows locked. Ours are
#: over in milliseconds and wait for nothing outside. MySQL has no such setting and reads a comment.
NO_LOITERING: Final = {
    "postgresql": "SET SESSION idle_in_transaction_session_timeout = 30000",
    "mysql": "SET @idempotent_bus = 1 /*M! , SESSION idle_transaction_timeout = 30 */",
    "mariadb": "SET @idempotent_bus = 1 /*M! , SESSION idle_transaction_timeout = 30 */",
}


class Digest(sa.types.TypeDecorator[bytes]):
    """A fixed-length binary value: `bytes` in Python, the smallest exact type in the database.

    Binary, because text is folded, padded or refused somewhere: `utf8mb4_bin` pads spaces, PostgreSQL has no NUL.
    On PostgreSQL 16 bytes are a `uuid`: 8 bytes less in an index entry than a `bytea`, and it compares faster.
    """

    impl = sa.LargeBinary
    cache_ok = True

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length

    def load_dialect_impl(self, dialect: Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(mysql.BINARY(self.length))
        if dialect.name == "postgresql" and self.length == 16:
            return dialect.type_descriptor(postgresql.UUID(as_uuid=True))
        return dialect.type_descriptor(sa.LargeBinary(self.length))

    def process_bind_param(self, value: bytes | None, dialect: Dialect) -> Any:
        if value is not None and dialect.name == "postgresql" and self.length == 16:
            return uuid.UUID(bytes=value)
        return value

    def process_result_value(self, value: Any, dialect: Dialect) -> bytes | None:
        if isinstance(value, uuid.UUID):
            return value.bytes
        return None if value is None else bytes(value)


#: Bytes of any length; MySQL's plain BLOB would end at 64 KiB.
Blob: Final = sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")


class Statement(NamedTuple):
    """One statement in a driver's own text. positions: the parameters' order where the driver takes no names."""

    text: str
    positions: tuple[str, ...] | None

    def arguments(self, parameters: Mapping[str, Any]) -> Any:
        """The parameters as the driver wants them."""
        return parameters if self.positions is None else tuple(map(parameters.__getitem__, self.positions))


def load_texts(package: str, path: str, fill: Mapping[str, str]) -> dict[str, str]:
    """The blocks of an SQL file that begin with `-- name: x`, by name.

    `{word}` becomes `fill[word]`, or the block of that name, so that a part can be shared; an unknown word is left for
    the caller to fill.
    """
    source = files(package).joinpath(path).read_text("utf-8")
    blocks = {}
    for block in re.split(r"^-- name: ", source, flags=re.MULTILINE)[1:]:
        name, _, body = block.partition("\n")
        blocks[name.strip()] = " ".join(re.sub(r"--.*$", "", body, flags=re.MULTILINE).split()).rstrip(";")

    def put(match: re.Match[str]) -> str:
        word = match.group(1)
        found = blocks.get(word, fill.get(word))
        return match.group() if found is None else re.sub(r"\{(\w+)\}", put, found)

    return {name: re.sub(r"\{(\w+)\}", put, body) for name, body in blocks.items()}


def compiled(text: str, dialect: Dialect) -> Statement:
    """A text with `:word` parameters, in the driver's own style."""
    made = sa.text(text).compile(dialect=dialect)
    order = getattr(made, "positiontup", None)
    return Statement(str(made), None if order is None else tuple(order))


def quoted(dialect: Dialect, item: sa.Table | sa.Sequence) -> str:
    """The name of a table or a sequence as it must be written in SQL, with its schema."""
    preparer = dialect.identifier_preparer
    return preparer.format_table(item) if isinstance(item, sa.Table) else preparer.format_sequence(item)


def is_contention(error: BaseException) -> bool:
    """True for a deadlock or a serialization failure: nothing was done, the same may be asked again at once."""
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return state in _CONTENTION_STATES or (bool(error.args) and error.args[0] in _CONTENTION_NUMBERS)


def is_read_only(error: BaseException) -> bool:
    """True if the server, or this session of it, takes no writes: after a failover another connection may."""
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return state == _READ_ONLY_STATE or (bool(error.args) and error.args[0] in _READ_ONLY_NUMBERS)
