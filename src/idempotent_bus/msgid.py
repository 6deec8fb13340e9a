"""The inner-msg-id: a UUIDv7 (RFC 9562), so that ids sort by the time they were made.

Layout of the 128 bits: 48 of milliseconds since the epoch, the version, 42 of a counter that starts at a random
place in every millisecond, 32 of randomness; the variant's two bits lie within the counter. The counter makes the
ids of one process strictly increasing, also when its clock is set back.
"""

from __future__ import annotations

import os
import re
import threading
import time
from hashlib import blake2b
from typing import Final

__all__ = ["derived_inner_msg_id", "is_inner_msg_id", "new_inner_msg_id", "published_at", "published_at_of"]

_COUNTER_BITS: Final = 42
_COUNTER_LIMIT: Final = 1 << _COUNTER_BITS
_VERSION_7: Final = 0x7 << 76
_VERSION_8: Final = 0x8 << 76
#: Part of every derived id: a change of what it is made of changes it.
_DERIVED: Final = b"idempotent-bus/d"
_VARIANT: Final = 0b10 << 62
_YEAR_10000: Final = 253_402_300_800

# Version 8 is for ids that are derived from what caused a message, so that a rerun makes the same id again.
_FORM: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[78][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")

_lock = threading.Lock()
_milliseconds = 0
_counter = 0


def new_inner_msg_id() -> str:
    """A fresh id, larger than every id that this process made before. Safe for threads and after a fork."""
    global _milliseconds, _counter
    noise = int.from_bytes(os.urandom(10), "big")
    now = time.time_ns() // 1_000_000
    with _lock:
        if now > _milliseconds:
            _milliseconds = now
            _counter = _start(noise >> 32)
        else:
            _counter += 1
            if _counter >= _COUNTER_LIMIT:
                _milliseconds += 1
                _counter = _start(noise >> 32)
        milliseconds, counter = _milliseconds, _counter
    number = (
        (milliseconds & 0xFFFF_FFFF_FFFF) << 80
        | _VERSION_7
        | (counter >> 30) << 64
        | _VARIANT
        | (counter & 0x3FFF_FFFF) << 32
        | (noise & 0xFFFF_FFFF)
    )
    text = f"{number:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def derived_inner_msg_id(key: bytes, name: str) -> str:
    """The id of what is published under `name` by the execution whose record has `key`: the same on every run.

    Injective but for the hash: the key is preceded by its length, and the name is all that follows it.
    """
    encoded = name.encode("utf-8", "surrogatepass")
    source = len(key).to_bytes(4, "big") + key + encoded
    digest = int.from_bytes(blake2b(source, digest_size=16, person=_DERIVED).digest(), "big")
    number = digest & ~(0xF << 76 | 0b11 << 62) | _VERSION_8 | _VARIANT
    text = f"{number:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def is_inner_msg_id(value: object) -> bool:
    """True for an id of our own form: a UUID of version 7 (fresh) or 8 (derived), in lower case."""
    return isinstance(value, str) and _FORM.fullmatch(value) is not None


def published_at(inner_msg_id: object) -> float | None:
    """When a fresh id was made: seconds since the epoch by the sender's clock. None for anything else.

    Only to the millisecond, and a sender that makes very many ids at once, or whose clock was set back, runs ahead.
    """
    if not isinstance(inner_msg_id, str) or inner_msg_id[14:15] != "7" or not is_inner_msg_id(inner_msg_id):
        return None
    return int(inner_msg_id[:8] + inner_msg_id[9:13], 16) / 1000


def published_at_of(inner_msg_id: object, timestamp: object) -> float | None:
    """When a message was published, seconds since the epoch by its sender's clock: as its id says, or its timestamp.

    timestamp: the message property of that name, whatever it is; a derived id tells no time, so a producer sets it.
    None: neither tells, or the timestamp is no time after 1970 and before the year 10000.
    """
    made = published_at(inner_msg_id)
    if made is not None:
        return made
    if isinstance(timestamp, (int, float)) and not isinstance(timestamp, bool) and 0 < timestamp < _YEAR_10000:
        return float(timestamp)
    return None


def _start(noise: int) -> int:
    # The top bit stays clear, so that half of the counter is always left for the rest of the millisecond.
    return noise & (_COUNTER_LIMIT // 2 - 1)


def _start_afresh_after_fork() -> None:
    # Only the forking thread lives on in the child: another one may have held the lock. The next millisecond with a
    # new start keeps the child's ids apart from its parent's and above all that it inherited.
    global _lock, _milliseconds, _counter
    _lock = threading.Lock()
    _milliseconds += 1
    _counter = _start(int.from_bytes(os.urandom(6), "big"))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh_after_fork)
