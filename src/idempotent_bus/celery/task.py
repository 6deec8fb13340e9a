"""`IdempotentTask`: the base class that makes a Celery task run once for each business id."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from celery import Celery, Task
from celery.canvas import Signature, maybe_signature

from ..errors import ConfigurationError
from ..execution import current_execution
from ..handler import check_plain
from .arguments import Arguments
from .call import held_back, is_running
from .guard import Guard
from .ids import frozen_replacement, sent_as
from .settings import option
from .stamping import install
from .transaction import apply_in_transaction, delay_in_transaction

__all__ = ["IdempotentTask", "guard_of"]


class IdempotentTask(Task):
    """A Celery task that is run once for each business id. Without a scope it is as Celery's own.

        @app.task(base=IdempotentTask, scope="cards.issue", biz_id="payment_id")
        def issue_card(payment_id, amount): ...

    scope: the name of the business scenario within which a biz-id is unique; two tasks that take one id need two.
    biz_id: the name of an argument, a path into one ("order.id"), a function that gets the arguments as a mapping by
        their names, or INNER_MSG_ID. `apply_async` refuses a call without a valid one (InvalidBizId).
    store: as for `idempotent_consumer`; usually given once, to `setup`.
    outbox: the `Outbox` for `delay_in_transaction`; with Django, none is needed.
    inbox: instead of a store: an `Inbox` in the database of the effect; the task then takes its transaction as a
        parameter named `connection` or `session`, which callers leave out, and effect and record are one commit.
        "django", or "django:<alias>": in `transaction.atomic` of that database.
    fingerprint: True compares all arguments of a copy with the first's, names compare those, False nothing.
    lease, retention, busy_delay, on_abandoned, in_doubt, tenant, listener: as for `idempotent_consumer`; seconds.
    max_attempts: after so many runs that died with their worker the message goes to the dead letter. What a task
        raises is Celery's to answer for (FAILURE, autoretry, max_retries), and counts no attempt, but for `Transient`
        and `InDoubt`: these count, and the message itself comes back after `backoff`, or `backoffs` by class.
    max_result: the longest result that is stored, in characters of JSON. A copy of a task with a longer one fails with
        ResultNotStored.
    dead_letter: the queue for what is given up, FAILURE included; `<scope>.dead` if not given; False: none.

    acks_late and reject_on_worker_lost are on unless the decorator says otherwise.
    """

    abstract = True
    Request = "idempotent_bus.celery.request:GuardedRequest"
    Strategy = "idempotent_bus.celery.request:strategy"
    acks_late = True
    reject_on_worker_lost = True

    scope: ClassVar[Any] = None
    biz_id: ClassVar[Any] = None
    store: ClassVar[Any] = None
    inbox: ClassVar[Any] = None
    outbox: ClassVar[Any] = None

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        """Celery calls it when the task is bound to its app: checks what can be known now."""
        super().on_bound(app)
        if option(cls, "scope") is None:
            return
        install(app)
        run, bound = _function_of(cls)
        check_plain(run)
        transactional = option(cls, "inbox") is not None
        head = None if transactional else getattr(cls, "__header__", None)
        if head is None:
            head = Arguments(run, bound=bound, transactional=transactional).check
        # A partial, as Celery's of a bound task: an errback of one is sent as a message. Others with several parameters
        # are called on the spot by whoever has failed, without a guard, and again at each delivery of the failed task.
        cls.__header__ = staticmethod(functools.partial(head))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = self.request
        if request.called_directly or is_running(request):
            return super().__call__(*args, **kwargs)
        guard = guard_of(self)
        return self.run(*args, **kwargs) if guard is None else guard.run(request, args, kwargs)

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        task_id: str | None = None,
        *more: Any,
        once: str | None = None,
        **options: Any,
    ) -> Any:
        """As Celery's. once: inside a guarded task, a name for this call: a rerun makes the very same call again.

        Its message then has the same inner-msg-id and task id each time, and lands once. Raises InvalidBizId for a call
        without one, NoExecution for `once` outside an execution; nothing is sent.
        """
        guard = guard_of(self)
        if guard is not None:
            if self.typing:
                self.__header__(*(args or ()), **(kwargs or {}))  # TypeError, as without us
            guard.check(args or (), kwargs or {})
        if once is None:
            return super().apply_async(args, kwargs, task_id, *more, **options)
        if task_id is not None:
            raise ConfigurationError("give once or task_id, not both: each of them says which call it is")
        derived = current_execution().derived_id(once)
        with sent_as(derived):
            return super().apply_async(args, kwargs, derived, *more, **options)

    def delay_in_transaction(self, *args: Any, **kwargs: Any) -> Any:
        """As `delay`, by the outbox: the call is made if and only if the transaction is committed that is open here.

        That is the one that this task was given by its inbox, or Django's `transaction.atomic` block; see
        `apply_in_transaction`. Raises ConfigurationError if there is none.
        """
        return delay_in_transaction(self, args, kwargs)

    def apply_in_transaction(
        self,
        connection: Any,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """As `apply_async`, by the outbox, in the transaction that is open on `connection`; see `transaction.py`."""
        return apply_in_transaction(self, connection, args, kwargs, **options)

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """As Celery's; the message leaves once the claim is given back, or it would find its own task busy."""
        with held_back():
            return super().retry(*args, **kwargs)

    def replace(self, sig: Signature) -> Any:
        """As Celery's; the messages leave once the claim is given back."""
        return super().replace(maybe_signature(frozen_replacement(sig, self.request), app=self.app))

    def on_replace(self, sig: Signature) -> Any:
        """Celery calls it for what it has made of the replacement."""
        with held_back():
            return super().on_replace(sig)


def guard_of(task: Any) -> Guard | None:
    """The guard of a task; None if it names no scope. Raises ConfigurationError if its options cannot be right."""
    guard: Guard | None = task.__dict__.get("_idempotent_bus_guard")
    if guard is None and option(task, "scope") is not None:
        run, bound = _function_of(type(task))
        # Two threads at once may make two; both do the same.
        guard = task.__dict__["_idempotent_bus_guard"] = Guard(task, run, bound=bound)
    return guard


def _function_of(cls: Any) -> tuple[Any, bool]:
    """What the user wrote, and whether it takes the task first."""
    run = inspect.getattr_static(cls, "run")
    if isinstance(run, staticmethod):
        return run.__func__, False
    return run, True
