"""A handler's own outside steps: what it calls in other systems, put through the hooks while a case is run."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..execution import current_execution
from ..hooks import Step
from ..model import Edge, Landing, Receipt
from ..msgid import new_inner_msg_id

__all__ = ["Call", "Outside", "OutsideStep"]

#: An object and the name of what is called on it: (bank, "charge").
OutsideStep = tuple[Any, str]


@dataclass(frozen=True, slots=True)
class Call:
    """One call that a handler made. changed: it changed what `observe` shows."""

    name: str
    arguments: str
    changed: bool


class Outside:
    """Lets the handler's calls go through `step` of the worker in whose thread they are made.

    look: what `observe` shows now; compared before and after each call. published: what the handler published, by its
    inner-msg-id, which is what a broker's edge would keep of it.
    """

    def __init__(self, steps: Sequence[OutsideStep], look: Callable[[], Any]) -> None:
        self._steps = steps
        self._look = look
        self._here = threading.local()
        self.calls: list[Call] = []
        self.published: dict[str, Any] = {}
        self.anew: set[str] = set()

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """While the cases are run."""
        from ..producer import IdempotentProducer

        with contextlib.ExitStack() as stack:
            for target, name in self._steps:
                stack.enter_context(_replaced(target, name, self._around(target, name)))
            publish = self._publish
            stack.enter_context(
                _replaced(IdempotentProducer, "publish", lambda _, body, **options: publish(body, **options))
            )
            yield

    @contextlib.contextmanager
    def worker(self, step: Step) -> Iterator[None]:
        """This thread's calls are that worker's."""
        self._here.step = step
        try:
            yield
        finally:
            self._here.step = None

    def _around(self, target: Any, name: str) -> Callable[..., Any]:
        original = getattr(target, name)
        title = f"{getattr(target, '__name__', type(target).__name__)}.{name}"

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            step: Step | None = getattr(self._here, "step", None)
            if step is None:
                return original(*args, **kwargs)
            # The handler is told of the call only what it would be told; what it did is seen from outside.
            return step(title, self._watched, title, original, args, kwargs)

        static = isinstance(inspect.getattr_static(target, name), (staticmethod, classmethod))
        return staticmethod(call) if static and isinstance(target, type) else call

    def _watched(self, title: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        before = self._look()
        shown = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
        try:
            return original(*args, **kwargs)
        finally:
            self.calls.append(Call(title, shown, self._look() != before))

    def _publish(self, body: Any, **options: Any) -> Receipt:
        """Instead of `IdempotentProducer.publish`: nothing is sent, and the id is the one that would be."""
        step: Step | None = getattr(self._here, "step", None)
        once, known = options.get("once"), options.get("inner_msg_id")
        identity = known or (current_execution().derived_id(once) if once is not None else new_inner_msg_id())

        def land() -> Receipt:
            landing = Landing.DUPLICATE if identity in self.published else Landing.LANDED
            self.published.setdefault(identity, body)
            if once is None and known is None:
                self.anew.add(identity)
            return Receipt(identity, landing, Edge.BROKER)

        return land() if step is None else step("publish", land)


@contextlib.contextmanager
def _replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(target).get(name, _replaced) if hasattr(target, "__dict__") else _replaced
    setattr(target, name, value)
    try:
        yield
    finally:
        if own is _replaced:
            delattr(target, name)
        else:
            setattr(target, name, own)
