"""What is stored of a handler's result, and what is written of its error. JSON only: a stored pickle would be code."""

from __future__ import annotations

import json
import logging
import traceback
from typing import Any, Final

__all__ = ["decode_result", "encode_result", "last_line"]

log = logging.getLogger(__name__)

#: A result whose JSON is longer is not stored; its duplicates then get None.
MAX_RESULT_BYTES: Final = 65_536


def encode_result(value: Any, scope: str, limit: int = MAX_RESULT_BYTES) -> bytes | None:
    """What is stored of a handler's result: its JSON, or None if it has none or one longer than `limit` bytes."""
    if value is None:
        return None
    try:
        encoded = json.dumps(value, separators=(",", ":")).encode()
    except Exception:  # noqa: BLE001 - the effect has happened: whatever a result's own code raises must not repeat it
        encoded = None
    if encoded is None or len(encoded) > limit:
        # The effect has happened: failing now would only repeat it.
        log.warning("a result in scope %s is not JSON of at most %d bytes: it is not stored", scope, limit)
        return None
    return encoded


def decode_result(result: bytes | None) -> Any:
    """The result that a duplicate gets."""
    if result is None:
        return None
    try:
        return json.loads(result)
    except (ValueError, RecursionError):
        log.warning("a stored result is not JSON that can be read: a duplicate gets None instead")
        return None


def last_line(error: BaseException) -> str:
    """The last line of a traceback, for the dead letter."""
    formatted = traceback.TracebackException(type(error), error, None)
    formatted.__notes__ = None  # they come after the line that says what was raised
    return list(formatted.format_exception_only())[-1].strip()
