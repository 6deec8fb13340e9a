"""Dedup stores, and the one function that opens any of them by URL.

A third party adds a store through the entry point group `idempotent_bus.stores`: the entry's name is a URL scheme,
its value a function `(url: str, **options) -> Store`.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any
from weakref import WeakValueDictionary

from ..errors import ConfigurationError
from ..store import Store

__all__ = ["StoreSource", "open_store", "store_source"]

#: What a user may give where a store is wanted.
StoreSource = Store | str | Callable[[], Store]

_GROUP = "idempotent_bus.stores"
# Which extra brings the driver of a scheme; for the error text only.
_EXTRAS = {
    "sqlite": "sql",
    "postgresql": "postgresql",
    "mysql": "mysql",
    "mariadb": "mysql",
}


def open_store(url: str, **options: Any) -> Store:
    """Open the dedup store that `url` names, for example `sqlite:///dedup.db` or `redis://localhost:6379/0`.

    The scheme up to a `+` chooses the store (`postgresql+psycopg://...` is `postgresql`); options go to it.
    Nothing is connected before the first use.

    Raises ConfigurationError for an unknown scheme or a missing driver, with what to install.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9.-]*)(\+[^:]*)?:", url)
    if not match:
        raise ConfigurationError("not a store URL: it must begin with a scheme, such as sqlite:///dedup.db")
    scheme = match.group(1).lower()
    known = {entry.name: entry for entry in entry_points(group=_GROUP)}
    if scheme not in known:
        raise ConfigurationError(f"no dedup store for the scheme {scheme!r}; there are: {', '.join(sorted(known))}")
    try:
        opener: Callable[..., Store] = known[scheme].load()
        return opener(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        if extra:
            hint = f"pip install 'idempotent-bus[{extra}]'"
        else:
            hint = f"install the package {error.name!r}" if error.name else str(error)
        raise ConfigurationError(f"the store {scheme!r} needs a package that is not installed: {hint}") from error


def store_source(store: StoreSource) -> Callable[[], Store]:
    """A function that gives the store: opened at its first call, and once per process.

    A process that was forked opens its own: connections must not be shared across a fork. A Store that was
    passed in as an object is used as it is. The same URL, object or function gives the same store, as long as somebody
    uses it: its connections, and the renewal of its leases, are shared.

    Raises ConfigurationError for what is none of the three.
    """
    if not isinstance(store, str) and not callable(store) and not hasattr(store, "claim"):
        raise ConfigurationError(
            f"store must be a Store, a URL such as sqlite:///dedup.db, or a function that gives a Store; "
            f"this is of type {type(store).__name__}"
        )
    if isinstance(store, str) and store == "memory://":
        return _source(store)  # each is a store of its own
    # An object by its id: a source keeps it alive, so an id that is found here is still the same object's.
    identity = store if isinstance(store, str) else id(store)
    with _sharing:
        source = _sources.get(identity)
        if source is None:
            source = _sources[identity] = _source(store)
        return source


_sources: WeakValueDictionary[str | int, Callable[[], Store]] = WeakValueDictionary()
_sharing = threading.Lock()


def _source(store: StoreSource) -> Callable[[], Store]:
    if not isinstance(store, str) and not callable(store):
        return lambda: store
    opener: Callable[[], Store] = (lambda: open_store(store)) if isinstance(store, str) else store
    # A lock for each process: in a forked child the parent's may be held by a thread that is not there.
    locks: dict[int, threading.Lock] = {}
    opened: dict[int, Store] = {}
    inherited: list[Store] = []

    def get() -> Store:
        pid = os.getpid()
        found = opened.get(pid)
        if found is None:
            with locks.setdefault(pid, threading.Lock()):
                found = opened.get(pid)
                if found is None:
                    found = opener()
                    # A parent's store must not be used here, nor closed, as letting go of it might do.
                    inherited.extend(opened.values())
                    opened.clear()
                    opened[pid] = found
        return found

    return get


def _after_fork() -> None:
    global _sharing
    _sharing = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
