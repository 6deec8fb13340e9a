"""The inner-msg-id of each task message: fresh, or derived from what caused it where a rerun publishes it again.

A task that is delivered twice publishes twice what follows from it: its retry, its replacement, the next task of its
chain, its callbacks and errbacks, the body of its chord. These have task ids that the first message brought along, so
the second publish is known to be the same one, and its id is derived from the cause and that task id. The cause is the
inner-msg-id of the message that is being run (of a chord's body: the chord, whichever task is its last). Everything
else is a publish of its own and gets a fresh id, also where a caller chose its task id: a nightly
`apply_async(task_id="report")` is another message every night.

Signatures in `link` and `link_error` get their task ids only when they are sent, which would be others each time. So
they are frozen when the message that brings them is published.
"""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final

from celery._state import get_current_worker_task

from ..headers import INNER_MSG_ID
from ..msgid import derived_inner_msg_id, is_inner_msg_id, new_inner_msg_id

__all__ = ["frozen", "frozen_replacement", "id_of", "sent_as"]

_UNLOCK: Final = "celery.chord_unlock"
#: Where a request keeps what it knows of the task ids that follow from it.
_KNOWN: Final = "_idempotent_bus_known"

#: The id of the next task message of this context, where no running task is its cause, or the caller has named it.
_chosen: ContextVar[str | None] = ContextVar("idempotent_bus_chosen", default=None)


@contextlib.contextmanager
def sent_as(inner_msg_id: str) -> Iterator[None]:
    """The next task message that is published here gets this id."""
    token = _chosen.set(inner_msg_id)
    try:
        yield
    finally:
        _chosen.reset(token)


def id_of(task_id: str, retries: int, nesting: int) -> str:
    """The inner-msg-id for the task message that is about to be published.

    nesting: how often the task was replaced, as Celery counts.
    """
    chosen = _chosen.get()
    if chosen is not None:
        _chosen.set(None)  # for one message
        return chosen
    parent = get_current_worker_task()
    request = None if parent is None else parent.request
    if request is None:
        return new_inner_msg_id()
    name = f"celery:{retries}:{nesting}:{task_id}"
    chord = _chord_of(parent.name, request)
    if chord is not None and chord[1] == task_id:
        return derived_inner_msg_id(f"chord:{chord[0]}".encode(), name)
    caused = getattr(request, INNER_MSG_ID, None)
    if not is_inner_msg_id(caused) or (task_id != request.id and task_id not in _known(request)):
        return new_inner_msg_id()
    return derived_inner_msg_id(str(caused).encode(), name)


def frozen(signature: Mapping[str, Any], new_id: Callable[[], str] = lambda: str(uuid.uuid4())) -> dict[str, Any]:
    """A copy of a signature in which it and all its parts have task ids: those that they had, or new ones."""
    copy = dict(signature)
    options = copy["options"] = dict(signature.get("options") or {})
    options.setdefault("task_id", new_id())
    kwargs = signature.get("kwargs")
    kind = signature.get("subtask_type")
    if kind and isinstance(kwargs, Mapping):
        kwargs = copy["kwargs"] = dict(kwargs)
        for name in ("tasks", "header"):
            part = kwargs.get(name)
            if isinstance(part, Mapping):
                kwargs[name] = frozen(part, new_id)
            elif isinstance(part, (list, tuple)):
                kwargs[name] = [frozen(one, new_id) if isinstance(one, Mapping) else one for one in part]
        if isinstance(kwargs.get("body"), Mapping):
            kwargs["body"] = frozen(kwargs["body"], new_id)
    return copy


def frozen_replacement(signature: Mapping[str, Any], request: Any) -> Mapping[str, Any]:
    """A copy of what a task is replaced by, whose inner parts have the same task ids whenever it is replaced again.

    Not its last part, which Celery gives the task's own id. As it is, if nothing tells what caused the task.
    """
    caused, kind = getattr(request, INNER_MSG_ID, None), signature.get("subtask_type")
    if not is_inner_msg_id(caused) or kind not in ("chain", "group", "chord"):
        return signature
    numbers = itertools.count()
    made: set[str] = set()

    def new_id() -> str:
        made.add(one := derived_inner_msg_id(str(caused).encode(), f"celery:replacement:{next(numbers)}"))
        return one

    kwargs = dict(signature["kwargs"])
    name = "header" if kind == "chord" else "tasks"
    parts = kwargs[name]
    if isinstance(parts, Mapping):
        kwargs[name] = frozen(parts, new_id)
    else:
        last = len(parts) - 1 if kind == "chain" else len(parts)
        kwargs[name] = [frozen(part, new_id) if at < last else part for at, part in enumerate(parts)]
    setattr(request, _KNOWN, _known(request) | made)
    return {**signature, "kwargs": kwargs}


def _known(request: Any) -> frozenset[str]:
    """The task ids that the message which is being run brought along."""
    found: frozenset[str] | None = getattr(request, _KNOWN, None)
    if found is None:
        ids: set[str] = set()
        for part in (request.chain, request.callbacks, request.errbacks, request.chord):
            _collect(part, ids)
        found = frozenset(ids)
        setattr(request, _KNOWN, found)
    return found


def _collect(part: Any, ids: set[str]) -> None:
    if isinstance(part, Mapping):
        task_id = (part.get("options") or {}).get("task_id")
        if isinstance(task_id, str):
            ids.add(task_id)
        for inner in ("options", "kwargs"):
            for value in (part.get(inner) or {}).values():
                if isinstance(value, (Mapping, list, tuple)):
                    _collect(value, ids)
    elif isinstance(part, (list, tuple)):
        for one in part:
            if isinstance(one, (Mapping, list, tuple)):
                _collect(one, ids)


def _chord_of(name: str, request: Any) -> tuple[str, str] | None:
    """The chord that this task is a part of, or waits for: its group's id, and its body's task id."""
    group, body = request.group, request.chord
    if name == _UNLOCK and request.args and len(request.args) > 1:
        group, body = request.args[:2]
    if not isinstance(group, str) or not isinstance(body, Mapping):
        return None
    task_id = (body.get("options") or {}).get("task_id")
    return (group, task_id) if isinstance(task_id, str) else None
