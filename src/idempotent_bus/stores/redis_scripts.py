"""The Lua scripts of the Redis store, and how they are put together."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from typing import Final

__all__ = ["Script", "script"]

_LOOKS_IN_BUCKETS: Final = {"claim", "complete", "lookup", "forget", "split", "merge"}


class Script:
    """A Lua script and the digest that EVALSHA knows it by."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.name = self.sha.encode()


@cache
def script(name: str) -> Script:
    """The script of a verb: the helpers over records, those over buckets where it looks there, the verb's own file."""
    folder = resources.files(__package__) / "lua"
    parts = ("record", "buckets", name) if name in _LOOKS_IN_BUCKETS else ("record", name)
    return Script("".join((folder / f"{part}.lua").read_text("utf-8") for part in parts))
