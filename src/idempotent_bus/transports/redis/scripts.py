"""The Lua scripts, loaded once from the files beside this module."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

# Scripts that only move what is stored already must run when memory is full, or a full server could not be drained.
# Redis before 7.0 does not know the line; there they are refused like any write, before they have popped anything.
_MAY_RUN_WHEN_FULL = b"#!lua flags=allow-oom\n"


@dataclass(frozen=True, slots=True)
class Form:
    """A script as one kind of server takes it."""

    text: bytes
    sha: bytes


@dataclass(frozen=True, slots=True)
class Script:
    """One script. flagged: for servers that know script flags (Redis 7.0 and later); plain: for the others."""

    name: str
    flagged: Form
    plain: Form


def _form(text: bytes) -> Form:
    # SHA-1 is how Redis names scripts; nothing here rests on its strength.
    return Form(text, hashlib.sha1(text, usedforsecurity=False).hexdigest().encode())


def _read(name: str) -> bytes:
    return (files(__package__) / "lua" / f"{name}.lua").read_bytes()


def _moving(name: str) -> Script:
    text = _read("_text") + _read(name)
    return Script(name, _form(_MAY_RUN_WHEN_FULL + text), _form(text))


#: The only one that adds a message, and so the only one that a full server must refuse.
LAND: Final = Script("land", _form(_read("land")), _form(_read("land")))
FETCH: Final = _moving("fetch")
TEND: Final = _moving("tend")
GIVEBACK: Final = _moving("giveback")
DELAY: Final = _moving("delay")
BURY: Final = _moving("bury")
RENEW: Final = _moving("renew")
REVIVE: Final = _moving("revive")
