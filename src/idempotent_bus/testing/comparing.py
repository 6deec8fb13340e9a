"""What two cases left, compared: what differs from run to run for no reason is masked, and order is not looked at."""

from __future__ import annotations

import re
from typing import Any, Final

__all__ = ["VARIES", "effects", "in_no_order", "is_less", "masked", "published", "under", "varies_by_chance"]

_MESSAGE: Final = re.compile(r"<biz-id \d+>")
#: Stands where two clean runs differ.
VARIES: Final = "<varies>"


def effects(shown: Any) -> Any:
    """What `observe` showed, of what a case left."""
    return shown["effects"] if isinstance(shown, dict) and set(shown) == {"effects", "published"} else shown


def published(shown: Any) -> list[Any]:
    """What was published, of what a case left."""
    found = shown["published"] if isinstance(shown, dict) and set(shown) == {"effects", "published"} else []
    return list(found)


def in_no_order(shown: Any) -> Any:
    """The entries of lists in an order of their own: in which order effects come is not looked at."""
    if isinstance(shown, dict):
        return {key: in_no_order(value) for key, value in shown.items()}
    return sorted(shown, key=_place) if isinstance(shown, list) else shown


def _place(entry: Any) -> tuple[list[str], str]:
    # First by what messages it is of: the rest may vary, as a row's own number does.
    text = repr(entry)
    return _MESSAGE.findall(text), text


def masked(one: Any, other: Any) -> Any:
    """What two runs have in common; where they differ for no reason, `VARIES`."""
    if type(one) is type(other):
        if isinstance(one, dict) and one.keys() == other.keys():
            return {key: masked(one[key], other[key]) for key in one}
        if isinstance(one, list) and len(one) == len(other):
            return [masked(a, b) for a, b in zip(one, other, strict=True)]
    return one if one == other else VARIES


def under(template: Any, shown: Any) -> Any:
    """The same with what varies masked, as far as its shape is that of the template."""
    if template == VARIES:
        return VARIES
    if isinstance(template, dict) and isinstance(shown, dict):
        return {key: under(template[key], value) if key in template else value for key, value in shown.items()}
    if isinstance(template, list) and isinstance(shown, list) and len(template) == len(shown):
        return [under(a, b) for a, b in zip(template, shown, strict=True)]
    return shown


def varies_by_chance(template: Any, shown: Any) -> bool:
    """True if a text or a fraction differs between two runs. Whole numbers do where rows are numbered."""
    if template == VARIES:
        return not isinstance(shown, int)
    if isinstance(template, dict) and isinstance(shown, dict):
        return any(varies_by_chance(value, shown.get(key)) for key, value in template.items())
    if isinstance(template, list) and isinstance(shown, list) and len(template) == len(shown):
        return any(varies_by_chance(a, b) for a, b in zip(template, shown, strict=True))
    return False


def _size(shown: Any) -> float:
    if isinstance(shown, dict):
        return sum(map(_size, shown.values()))
    if isinstance(shown, list):
        return len(shown)
    return abs(shown) if isinstance(shown, (int, float)) else (shown is not None)


def is_less(shown: Any, expected: Any) -> bool:
    """True if there is less of it than there should be."""
    return _size(shown) < _size(expected)
