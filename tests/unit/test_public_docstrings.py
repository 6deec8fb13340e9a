"""Whatever is public says what it means: each module, each name in its `__all__`, each public method of a class."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import types
from collections.abc import Iterator
from typing import Any

import pytest

import idempotent_bus
from idempotent_bus import execution, store


def modules() -> Iterator[types.ModuleType]:
    """Every module that can be imported here: those whose driver is not installed are left out."""
    yield idempotent_bus
    with contextlib.suppress(ModuleNotFoundError):
        import django_rig  # noqa: F401 - Django's models can be imported only where a project is configured
    for info in pkgutil.walk_packages(idempotent_bus.__path__, "idempotent_bus.", onerror=lambda name: None):
        try:
            yield importlib.import_module(info.name)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("idempotent_bus"):
                raise


def methods(kind: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class defines itself."""
    for name, member in vars(kind).items():
        if name.startswith("_"):
            continue
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if inspect.isfunction(function) or isinstance(function, property):
            yield name, function


#: A method that the core explains needs no second explanation where it is done, or asked for, once more.
EXPLAINED = {
    name
    for module in (store, execution)
    for kind in vars(module).values()
    if inspect.isclass(kind) and kind.__module__ == module.__name__
    for name, member in methods(kind)
    if inspect.getdoc(member)
}


def is_anothers(kind: type, name: str) -> bool:
    """True if the method is one that kombu calls: what it means is kombu's to say, even where kombu does not."""
    return any(name in vars(base) and not base.__module__.startswith("idempotent_bus") for base in kind.__mro__)


def undocumented(module: types.ModuleType) -> list[str]:
    missing = [] if module.__doc__ else [module.__name__]
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if getattr(value, "__module__", None) != module.__name__:
            continue  # re-exported, and looked at where it is defined; or a plain value
        if inspect.isfunction(value) and not value.__doc__:
            missing.append(f"{module.__name__}.{name}")
        if inspect.isclass(value):
            # A dataclass without a docstring gets its signature as one.
            if not value.__doc__ or value.__doc__.startswith(f"{name}("):
                missing.append(f"{module.__name__}.{name}")
            missing += [
                f"{module.__name__}.{name}.{method}"
                for method, function in methods(value)
                # getdoc of the attribute: an override is explained where its base class does so
                if not inspect.getdoc(getattr(value, method))
                and method not in EXPLAINED
                and not is_anothers(value, method)
            ]
    return missing


@pytest.mark.parametrize("module", list(modules()), ids=lambda module: module.__name__)
def test_all_that_is_public_is_documented(module: types.ModuleType) -> None:
    """No public name without a sentence that says what it means."""
    assert not undocumented(module)


def test_each_name_in_all_exists() -> None:
    """`__all__` names only what is there."""
    gone = [f"{m.__name__}.{name}" for m in modules() for name in getattr(m, "__all__", ()) if not hasattr(m, name)]
    assert gone == []


def test_what_is_undocumented_is_found() -> None:
    """The control: a module, a function, a class, a method and a property without a docstring are each found."""
    module = types.ModuleType("idempotent_bus.sample")
    code = """
from dataclasses import dataclass
__all__ = ["function", "Kind", "Fine", "Data"]
def function(): ...
class Kind:
    def method(self): ...
    @property
    def shown(self): ...
    @classmethod
    def made(cls): ...
    def _own(self): ...
    def claim(self): ...
class Fine:
    "Fine."
    def good(self): "Good."
@dataclass
class Data:
    x: int
def private(): ...
"""
    exec(compile(code, "sample", "exec", dont_inherit=True), vars(module))
    assert set(undocumented(module)) == {
        "idempotent_bus.sample",
        "idempotent_bus.sample.function",
        "idempotent_bus.sample.Kind",
        "idempotent_bus.sample.Kind.method",
        "idempotent_bus.sample.Kind.shown",
        "idempotent_bus.sample.Kind.made",
        "idempotent_bus.sample.Data",
    }
