"""What a person does about abandoned records: look at them, find out what happened, and say so.

for record in quarantined(store):
    resolve(store, record.record, completed=cards.was_issued(record.biz_id))

A record that is resolved as completed makes every copy a replay. One that is not runs when its message is moved back
from the dead letter (`redrive`).
"""

from __future__ import annotations

from collections.abc import Iterator

from .abandoned import QuarantinedRecord, quarantined_record
from .errors import ConfigurationError
from .identity import canonical_biz_id, check_scope, record_key
from .model import KEY_BYTES
from .policy import DAY
from .store import QuarantineStore
from .stores import StoreSource, store_source

__all__ = ["QuarantinedRecord", "quarantined", "record_of", "resolve"]

_PAGE = 500


def quarantined(store: StoreSource) -> Iterator[QuarantinedRecord]:
    """All quarantined records, in the order of their keys. store: a Store, a URL, or a function that gives a Store.

    Raises ConfigurationError if the store has no quarantine, and StoreUnavailable.
    """
    keeper, after = _open(store), b""
    while page := keeper.quarantined(limit=_PAGE, after=after):
        yield from map(quarantined_record, page)
        after = page[-1].key


def resolve(store: StoreSource, record: str, *, completed: bool, retention: float = 7 * DAY) -> bool:
    """Say what was found: the effect of this record is there (completed), or it is not.

    record: `QuarantinedRecord.record`, or `record_of(scope, biz_id)`. retention: seconds that the answer is remembered.
    False: it was not in quarantine. Raises ConfigurationError and StoreUnavailable as `quarantined` does.
    """
    try:
        key = bytes.fromhex(record)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigurationError(f"a record is written as {2 * KEY_BYTES} hexadecimal digits")
    return _open(store).resolve(key, completed=completed, retention=retention)


def record_of(scope: str, biz_id: str, *, tenant: str = "") -> str:
    """How the record of a biz-id is written in headers, logs and commands. Raises InvalidScope or InvalidBizId."""
    return record_key(check_scope(scope), canonical_biz_id(biz_id), tenant=tenant).hex()


def _open(store: StoreSource) -> QuarantineStore:
    opened = store_source(store)()
    if not isinstance(opened, QuarantineStore):
        raise ConfigurationError(f"{type(opened).__name__} has no quarantine")
    return opened
