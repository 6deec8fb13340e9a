"""kombu's JSON, read without what it does anew for each text.

`kombu.utils.json.loads` has a decoder made for each text and its hook called for each object. The hook changes only
objects that are marked by a name, so a text without that name needs none.
"""

from __future__ import annotations

import json
from typing import Any, Final

from kombu.utils import json as kombus

__all__ = ["loads"]

#: What kombu marks objects of further types by.
_MARK: Final = "__type__"
_read: Final = json.JSONDecoder().raw_decode
_read_marked: Final = json.JSONDecoder(object_hook=kombus.object_hook).raw_decode


def loads(text: str) -> Any:
    """As `kombu.utils.json.loads`: the same value or the same error."""
    read = _read_marked if _MARK in text or "\\" in text else _read  # any letter may be written as an escape
    try:
        value, end = read(text)
    except ValueError:  # white space comes first, or it is no JSON
        return kombus.loads(text)
    return value if end == len(text) else kombus.loads(text)
