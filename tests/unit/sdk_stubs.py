"""Stand-ins for vendors' SDKs, so that a transport is tested at its boundary whether or not the SDK is installed."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, ClassVar

import kombu.transport

from idempotent_bus.transports import register


class StubModule(ModuleType):
    """A module that has every name: an exception class of that name, unless something else was set."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (Exception,), {})
        setattr(self, name, made)
        return made


def stub(*names: str, **contents: Any) -> dict[str, ModuleType]:
    """Stub modules of these dotted names, each an attribute of its parent. contents: set on the first."""
    modules = {name: StubModule(name) for name in names}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent in modules:
            setattr(modules[parent], child, module)
    for name, value in contents.items():
        setattr(modules[names[0]], name, value)
    return modules


@contextlib.contextmanager
def loaded(name: str, kombu_name: str, stubs: dict[str, ModuleType]) -> Iterator[ModuleType]:
    """Our transport module `name` and kombu's, freshly imported on top of the stubs; afterwards all is as it was."""
    ours, kombus = f"idempotent_bus.transports.{name}", f"kombu.transport.{kombu_name}"
    fresh = {ours, kombus}
    before = {key: sys.modules.get(key) for key in (*fresh, *stubs)}
    attributes = {key: getattr(_parent(key), key.rpartition(".")[2], None) for key in fresh}
    _forget(fresh)
    sys.modules.update(stubs)
    register()
    kombu.transport._transport_cache.clear()
    try:
        yield importlib.import_module(ours)
    finally:
        _forget({*fresh, *stubs})
        sys.modules.update({key: module for key, module in before.items() if module is not None})
        for key, module in attributes.items():
            if module is not None:
                setattr(_parent(key), key.rpartition(".")[2], module)
        kombu.transport._transport_cache.clear()


def _parent(name: str) -> ModuleType:
    return importlib.import_module(name.rpartition(".")[0])


def _forget(names: set[str]) -> None:
    for name in names:
        sys.modules.pop(name, None)
        with contextlib.suppress(AttributeError, ImportError):
            if name.startswith(("kombu.", "idempotent_bus.")):
                delattr(_parent(name), name.rpartition(".")[2])
