"""Where a record lies in Redis: its slot, the keys of that slot, and the bucket of its short form.

How many buckets a slot has is the server's to say (`lua/buckets.lua`). Here is what was last heard of it; a script that
is given the wrong bucket says so, and nothing is done.
"""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["Places"]

_PLACE: Final = struct.Struct(">BI")  # of a key: its slot, and what its bucket is chosen by


class Places:
    """The keys of one store. Safe for threads: what is written is one entry at a time, and any of them may be old.

    prefix: of all its keys. buckets: how many each slot has, as last heard. usual: until something is heard of a slot,
    what another one has.
    """

    def __init__(self, prefix: bytes) -> None:
        self.slots = [b"%s{%02x}:" % (prefix, slot) for slot in range(256)]
        self.counters = [slot + b"token" for slot in self.slots]
        self.layouts = [slot + b"buckets" for slot in self.slots]
        self.buckets: dict[int, int] = {}
        self.usual = 1

    def record(self, key: bytes) -> bytes:
        """The record's own key."""
        return self.slots[key[0]] + key

    def index(self, slot: int) -> bytes:
        """The key of a slot's quarantined ones."""
        return self.slots[slot] + b"quarantine"

    def bucket(self, slot: int, number: int) -> bytes:
        """The key of a bucket."""
        return b"%b#%d" % (self.slots[slot], number)

    def of(self, key: bytes) -> tuple[bytes, bytes, bytes, int]:
        """A record's own key, the key of its slot's number of buckets, its bucket, and that number as far as known."""
        slot, hashed = _PLACE.unpack_from(key)
        prefix = self.slots[slot]
        buckets = self.count(slot)
        size = 1 << buckets.bit_length()
        number = hashed & (size - 1)
        if number >= buckets:
            number -= size >> 1
        return prefix + key, self.layouts[slot], b"%b#%d" % (prefix, number), buckets

    def count(self, slot: int) -> int:
        """How many buckets a slot has, as far as known."""
        return self.buckets.get(slot, self.usual)

    def learn(self, slot: int, buckets: int) -> None:
        """A slot was heard to have so many."""
        self.buckets[slot] = self.usual = buckets

    def turn(self, slot: int, *, fewer: bool) -> tuple[list[bytes], int] | None:
        """The keys for split.lua, or for merge.lua which makes it one bucket fewer, and how many the slot has.

        None: it has only one, and none can be taken away.
        """
        buckets = self.count(slot)  # once: another thread may learn another number at any time
        if fewer and buckets < 2:
            return None
        last = buckets - 1 if fewer else buckets
        turn = last - (1 << (last.bit_length() - 1))
        return [self.layouts[slot], self.bucket(slot, turn), self.bucket(slot, last)], buckets
