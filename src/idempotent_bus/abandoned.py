"""What to do about a record whose holder died in the middle of the handler: its effect may or may not be there.

* `"rerun"` (the default): run the handler again. Right where the effect is idempotent, or fenced, or where twice is
  better than not at all.
* `"quarantine"`: nothing runs. The record is kept for a person, and the message goes to the dead letter. The person
  looks, says what was found (`idempotent-bus resolve`), and redrives the message if it is to run.
* a probe: a function that is called with the `AbandonedRecord` and says whether the effect is there: True completes the
  record without running, False runs the handler. What it raises counts as a failed attempt; once these are used up the
  record goes to quarantine, or where the store has none, the message to the dead letter, to be probed when redriven.

A handler that cannot tell whether its effect happened (a call timed out) raises `InDoubt`, or an exception of the
classes that the consumer was given as `in_doubt`, and leaves the record just so.

A claim that was only made ahead of its turn, and whose handler never started, is not abandoned.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .model import Record
from .work import Work

__all__ = ["AbandonedRecord", "OnAbandoned", "QuarantinedRecord", "note_of", "quarantined_record"]


@dataclass(frozen=True, slots=True)
class AbandonedRecord:
    """What a probe is told. attempts: how often the handler was started. token: larger than every earlier holder's."""

    scope: str
    biz_id: str
    idempotency_key: str
    inner_msg_id: str | None
    attempts: int
    token: int


OnAbandoned = Literal["rerun", "quarantine"] | Callable[[AbandonedRecord], bool]


@dataclass(frozen=True, slots=True)
class QuarantinedRecord:
    """What a person is shown. record: the key in hex. attempts: how often the handler was started.

    since: seconds since the epoch, by the worker's clock.
    """

    record: str
    scope: str
    biz_id: str
    inner_msg_id: str | None
    attempts: int
    since: float


def note_of(work: Work, attempts: int) -> bytes:
    """What is kept with a quarantined record, so that a person knows what it is about."""
    note: dict[str, Any] = {
        "scope": work.scope,
        "biz_id": work.biz_id,
        "inner_msg_id": work.inner_msg_id,
        "attempts": attempts,
        "since": round(time.time(), 3),
    }
    return json.dumps(note, separators=(",", ":")).encode()


def quarantined_record(record: Record) -> QuarantinedRecord:
    """A record with its note, read. A note that cannot be read leaves its fields empty."""
    try:
        note = json.loads(record.result or b"{}")
    except ValueError:
        note = {}
    if not isinstance(note, dict):
        note = {}
    return QuarantinedRecord(
        record=record.key.hex(),
        scope=str(note.get("scope", "")),
        biz_id=str(note.get("biz_id", "")),
        inner_msg_id=note.get("inner_msg_id"),
        attempts=int(note.get("attempts", record.attempts)),
        since=float(note.get("since", 0.0)),
    )
