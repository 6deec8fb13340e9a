"""What a handler did: the difference between two observations, with the message's own id made unrecognisable.

Each case is run with a biz-id of its own, so that nothing has to be undone between two of them, on whatever system the
effects are; then what they left is the same only if the id is taken out of it.
"""

from __future__ import annotations

import copy
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigurationError

__all__ = ["Ids", "biz_id_path", "difference", "frozen", "normal"]


def biz_id_path(body: Any) -> str:
    """The path of the one field that looks like a biz-id: "id", or a name that ends so. Raises ConfigurationError."""
    if isinstance(body, Mapping):
        names = [name for name in body if isinstance(name, str) and (name == "id" or name.endswith("_id"))]
        if len(names) == 1:
            return names[0]
    raise ConfigurationError('say where the biz-id is: biz_id="payment_id"')


class Ids:
    """Gives a body a biz-id that no case before had. path: where it is."""

    def __init__(self, path: str) -> None:
        self._path = path.split(".")
        self._number = 0
        self._run = uuid.uuid4().hex[:8]

    def of(self, body: Any) -> Any:
        """The biz-id in a body."""
        for name in self._path:
            body = body[name]
        return body

    def fresh(self, body: Any) -> Any:
        """A copy of the body, with a fresh biz-id of the same type."""
        body = copy.deepcopy(body)
        self._number += 1
        place = body
        for name in self._path[:-1]:
            place = place[name]
        old = place[self._path[-1]]
        if isinstance(old, int):
            place[self._path[-1]] = int(self._run, 16) % 1_000_000_000 + self._number  # fits a column of 32 bits
        elif isinstance(old, uuid.UUID):
            place[self._path[-1]] = uuid.uuid4()
        else:
            place[self._path[-1]] = f"{old}-{self._run}-{self._number}"
        return body


def frozen(value: Any) -> Any:
    """A copy that later effects do not change."""
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - rows of a driver, say
        return repr(value)


def normal(value: Any, names: Mapping[str, str]) -> Any:
    """The same value with these texts replaced, wherever they are in it. Tuples, sets and rows become lists."""
    if isinstance(value, str):
        for text, name in names.items():
            value = value.replace(text, name)
        return value
    if isinstance(value, Mapping):
        return {
            normal(key, names) if isinstance(key, str) else key: normal(entry, names) for key, entry in value.items()
        }
    if isinstance(value, (set, frozenset)):
        return sorted((normal(entry, names) for entry in value), key=repr)
    if _is_sequence(value):
        return [normal(entry, names) for entry in value]
    is_number = isinstance(value, (int, uuid.UUID)) and not isinstance(value, bool)
    return names.get(str(value), value) if is_number else value


def difference(before: Any, after: Any) -> Any:
    """What came to `before`, and what went: numbers are subtracted, entries of collections compared.

    A tuple or a dict is several observations, each by itself.
    """
    if type(before) is tuple and type(after) is tuple and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True), 1)
        return {number: difference(*pair) for number, pair in pairs}
    if isinstance(before, bool) or isinstance(after, bool):
        return after
    if isinstance(before, (int, float)) and isinstance(after, (int, float)):
        return after - before
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        changed = {key: difference(before.get(key), after[key]) for key in after if before.get(key) != after[key]}
        gone = {key: None for key in before if key not in after}
        return {**changed, **gone}
    if _is_collection(before) and _is_collection(after):
        had, has = Counter(map(repr, before)), Counter(map(repr, after))
        more, less = has - had, had - has
        came = [entry for entry in after if _take(more, repr(entry))]
        went = [entry for entry in before if _take(less, repr(entry))]
        return came if not went else {"came": came, "went": went}
    return after


def _take(left: Counter[str], entry: str) -> bool:
    if left[entry] <= 0:
        return False
    left[entry] -= 1
    return True


def _is_sequence(value: Any) -> bool:
    # Rows of SQLAlchemy and of drivers are tuples of a kind.
    return isinstance(value, (list, tuple)) or (hasattr(value, "_mapping") and hasattr(value, "__iter__"))


def _is_collection(value: Any) -> bool:
    return _is_sequence(value) or isinstance(value, (set, frozenset))


#: Gives what is to be compared.
Observe = Callable[[], Any]
