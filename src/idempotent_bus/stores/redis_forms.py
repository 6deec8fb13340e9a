"""How requests, holds and completions are packed for the Lua scripts, and what their replies mean."""

from __future__ import annotations

import hashlib
import math
import struct
from functools import lru_cache

from ..model import (
    FINGERPRINT_BYTES,
    NONCE_BYTES,
    Busy,
    Claimed,
    ClaimOutcome,
    ClaimRequest,
    Completed,
    Conflict,
    Hold,
    Quarantined,
    Record,
    State,
)

__all__ = ["completion", "count", "microseconds", "milliseconds", "outcome", "owner", "record", "request"]

_HEADER = struct.Struct(">BQ16s8sII")  # as record.lua says
_REQUEST = struct.Struct(">16s8sIQQBI")  # as claim.lua says
_COMPLETION = struct.Struct(">24s6sQI?")  # as complete.lua says
_CLAIMED = struct.Struct(">QI")
_HAS_FINGERPRINT, _HAS_RESULT = 8, 16
_OWNER_BYTES = 8 + NONCE_BYTES
_MAX_COUNT = 2**32 - 1
# Longer durations are cut to 30 years: now + lease + retention must stay exact in Lua's doubles.
_MAX_SECONDS = 30 * 365 * 86400.0
_DIGEST_BYTES = 6


def request(asked: ClaimRequest, buckets: int) -> bytes:
    """The value of claim.lua. buckets: as many as the caller knows. Raises ValueError."""
    mark = asked.fingerprint
    if len(asked.nonce) != NONCE_BYTES or (mark is not None and len(mark) != FINGERPRINT_BYTES):
        raise ValueError(f"a nonce has {NONCE_BYTES} bytes, a fingerprint {FINGERPRINT_BYTES}")
    return _REQUEST.pack(
        asked.nonce,
        mark or b"",
        count(asked.redrive) if asked.redrive else 0,
        microseconds(asked.lease),
        milliseconds(asked.lease + asked.retention),
        asked.reserve + (mark is not None) * _HAS_FINGERPRINT,
        buckets,
    )


def completion(hold: Hold, retention: float, buckets: int, *, short: bool) -> bytes:
    """The first value of complete.lua. short: the record may go into a bucket."""
    holder = owner(hold)
    if len(holder) != _OWNER_BYTES:
        holder = bytes(_OWNER_BYTES)  # nobody's: no token is 0
    digest = hashlib.blake2b(holder, digest_size=_DIGEST_BYTES).digest()
    return _COMPLETION.pack(holder, digest, milliseconds(retention), buckets, short)


@lru_cache(maxsize=256)
def microseconds(seconds: float) -> int:
    """Rounded up."""
    return max(0, math.ceil(min(seconds, _MAX_SECONDS) * 1_000_000))


@lru_cache(maxsize=256)
def milliseconds(seconds: float) -> int:
    """For an expiry: at least one, since Redis refuses 0; rounded up, so that it never ends before its lease."""
    return max(1, math.ceil(min(seconds, 2 * _MAX_SECONDS) * 1_000))


def count(number: int) -> int:
    """As a script takes it: what is out of its bounds lies on them."""
    return min(max(number, 0), _MAX_COUNT)


def owner(hold: Hold) -> bytes:
    """What a record tells its owner by."""
    # Concatenated, not packed: a nonce of another length must never be padded or cut into somebody's hold.
    return hold.token.to_bytes(8, "big") + hold.nonce if 0 <= hold.token < 2**64 else b"nobody's"


def outcome(reply: bytes) -> ClaimOutcome:
    """What claim.lua says of one entry; not `M`, which says nothing yet."""
    kind = reply[:1]
    if kind in (b"C", b"T"):
        token, attempt = _CLAIMED.unpack_from(reply, 1)
        return Claimed(token, attempt, kind == b"T")
    if kind == b"B":
        return Busy(int.from_bytes(reply[1:], "big") / 1_000_000)
    if kind == b"X":
        return Conflict(State(reply[1]))
    if kind == b"Q":
        return Quarantined()
    return Completed(reply[1:] if kind == b"R" else None)


def record(key: bytes, text: bytes, left: int, now: int) -> Record:
    """A record as it lies under a key of its own. left: of its expiry, ms. now: the server's time, us."""
    flags, token, _nonce, fingerprint, attempts, redrive = _HEADER.unpack_from(text)
    state = State(flags % 8)
    held = state in (State.RESERVED, State.IN_PROGRESS)
    lease_left = (int.from_bytes(text[_HEADER.size :], "big") - now) / 1_000_000 if held else 0.0
    return Record(
        key=key,
        state=state,
        token=token,
        attempts=attempts,
        redrive=redrive,
        lease_left=max(0.0, lease_left),
        retention_left=left / 1_000 if left >= 0 else math.inf,
        fingerprint=fingerprint if flags & _HAS_FINGERPRINT else None,
        result=text[_HEADER.size :] if flags & _HAS_RESULT else None,
    )
