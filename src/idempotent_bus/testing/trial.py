"""One case of a handler: its messages, the workers that take them, and what came of it."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import HandlerAcknowledged
from ..executor import Executor
from ..handler import IdempotentHandler, WorkExecutor
from ..headers import INNER_MSG_ID
from ..hooks import CLAIM, COMMIT, RELEASE
from ..identity import fingerprint, record_key
from ..lease import LeaseKeeper
from ..policy import Policy
from ..stores.memory import MemoryStore
from ..work import Work
from .broker import Delivery, MemoryBroker
from .clock import ManualClock
from .driving import Driver
from .faults import Action, FaultyStep, Killed, Script, Watch, error_of
from .interleaving import Turns
from .observing import Ids, Observe, biz_id_path, frozen
from .outside import Call, Outside, OutsideStep

__all__ = ["Attempt", "Case", "HandedMessage", "Subject", "TrialRun"]


class HandedMessage:
    """Stands in for kombu's message: a handler may read it, and must not answer it."""

    def __init__(self, body: Any, inner_msg_id: str, redelivered: bool, on_answer: Callable[[], None]) -> None:
        self.body = self.payload = body
        self.headers: dict[str, Any] = {INNER_MSG_ID: inner_msg_id}
        self.properties: dict[str, Any] = {}
        self.delivery_info: dict[str, Any] = {"redelivered": redelivered}
        self.content_type, self.content_encoding = "application/json", "utf-8"
        self.acknowledged = False
        self._on_answer = on_answer

    def ack(self, *_: Any, **__: Any) -> None:
        """Not a handler's to do. Raises HandlerAcknowledged."""
        self._on_answer()
        raise HandlerAcknowledged("the library acks after the handler succeeded")

    reject = requeue = ack_log_error = reject_log_error = ack


@dataclass
class Attempt:
    """One run of the handler. calls: what it called outside. how: "", "returned", "raised", or "crashed"."""

    biz_id: str
    calls: list[Call] = field(default_factory=list)
    how: str = ""
    error: BaseException | None = None


@dataclass
class Case(Watch):
    """One case as it is run, and what came of it.

    finished: the biz-ids whose messages were acked. given_up: those in the dead letter, and why. answered: the handler
    tried to ack by itself. changed: it has left anything.
    """

    title: str
    script: Script = field(init=False)
    attempts: list[Attempt] = field(default_factory=list)
    shown: Any = None
    finished: set[str] = field(default_factory=set)
    given_up: dict[str, str] = field(default_factory=dict)
    answered: bool = False
    changed: bool = False
    mutated: str = ""
    turns: Turns | None = None

    def hand_over(self, worker: int, action: Action) -> None:
        """Another worker's turn."""
        if self.turns is not None:
            self.turns.pause(worker, action)


class Subject:
    """The handler under test, and what is known of it."""

    def __init__(
        self,
        handler: Callable[..., Any],
        bodies: Sequence[Any],
        observe: Observe,
        outside: Sequence[OutsideStep] = (),
        biz_id: str | None = None,
        restart: Callable[[], object] | None = None,
    ) -> None:
        self.plain = handler
        self.policy = Policy()
        self.manual = False
        self.inbox: Any = None
        self.fingerprint: Any = True
        if isinstance(handler, IdempotentHandler):
            self.plain = handler._handler  # of a method, the bound one
            self.policy = handler.executor.policy
            self.manual = bool(getattr(handler.executor, "_manual", False))
            self.inbox = getattr(handler.executor, "inbox", None)
            self.fingerprint = handler._admission.fingerprint
            own = handler._admission.biz_id
            biz_id = biz_id or (own if isinstance(own, str) else None)
        self.ids = Ids(biz_id or biz_id_path(bodies[0]))
        self.observe = observe
        self.outside = Outside(outside, lambda: frozen(observe()))
        self.restart = restart
        self.takes_message = takes_message(self.plain)

    def error(self, step: str) -> Exception:
        """What an injected fault raises at this step."""
        if self.inbox is not None and step in (CLAIM, COMMIT, RELEASE):
            from sqlalchemy.exc import OperationalError

            cause = ConnectionError("injected: the connection is gone")
            return OperationalError("injected", {}, cause, connection_invalidated=True)
        return error_of(step)


class TrialRun:
    """The worker side of one case."""

    def __init__(self, subject: Subject, case: Case, clock: ManualClock, bodies: dict[str, Any]) -> None:
        self.subject, self.case, self.clock, self.bodies = subject, case, clock, bodies
        self.broker = MemoryBroker(clock, on_answer=self._answered)
        self.store = MemoryStore(clock)
        self.keys = {biz_id: record_key("assert_idempotent", biz_id) for biz_id in bodies}
        self.steps: dict[int, FaultyStep] = {}
        self.executors: dict[int, WorkExecutor] = {}

    def drain(self, workers: int) -> None:
        """Let so many workers take what is there until all is quiet."""
        turns = self.case.turns = Turns(workers) if workers > 1 else None
        visibility = 2 * self.subject.policy.lease
        try:
            Driver(self.broker, self._settle, self.clock.advance, turns=turns, visibility=visibility).drain()
        finally:
            if turns is not None:
                turns.close()

    def call_unguarded(self, body: Any, times: int) -> None:
        """Call the plain handler so often, in a run of the executor's of its own each, so that it has an execution."""
        for _ in range(times):
            self.store = MemoryStore(self.clock)
            self.executors.clear()
            self.broker.publish(body)
            self.drain(1)

    def _executor(self, worker: int) -> WorkExecutor:
        made = self.executors.get(worker)
        if made is not None:
            return made
        step = self.steps[worker] = self.case.script.worker(worker)
        subject, clock = self.subject, self.clock
        if subject.inbox is not None:
            from ..inbox.running import Transactions

            made = Transactions(
                subject.inbox, subject.policy, wall=clock, sleep=clock.sleep, draw=lambda: 0.5, step=step
            )
        else:
            keeper = LeaseKeeper(lambda: self.store, clock=clock, step=step, threaded=False)
            made = Executor(
                lambda: self.store,
                subject.policy,
                keeper=keeper,
                manual=subject.manual,
                clock=clock,
                wall=clock,
                sleep=clock.sleep,
                draw=lambda: 0.5,
                step=step,
            )
        self.executors[worker] = made
        return made

    def _settle(self, worker: int, deliveries: Sequence[Delivery]) -> None:
        (delivery,) = deliveries
        executor = self._executor(worker)
        with self.subject.outside.worker(self.steps[worker]):
            try:
                executor.handle(self._work(delivery))
            except Killed:
                self.broker.close_channel(worker)
                del self.executors[worker]
                if self.subject.restart is not None:
                    self.subject.restart()
            except ConnectionError:
                self.broker.close_channel(worker)

    def _work(self, delivery: Delivery) -> Work:
        message = delivery.message
        # As it came over the wire: the next delivery is decoded anew, but for a retry within this process.
        body = copy.deepcopy(message.body)
        biz_id = str(self.subject.ids.of(body))
        return Work(
            scope="assert_idempotent",
            biz_id=biz_id,
            key=self.keys[biz_id],
            run=lambda *handed: self._run(biz_id, body, delivery, *handed),
            settle=delivery,
            fingerprint=fingerprint(body, self.subject.fingerprint),
            inner_msg_id=message.inner_msg_id,
            redelivered=message.redelivered,
            redrive=message.redrive,
            published_at=message.published_at,
        )

    def _run(self, biz_id: str, body: Any, delivery: Delivery, *handed: Any) -> Any:
        case, subject = self.case, self.subject
        attempt = Attempt(biz_id)
        case.attempts.append(attempt)
        before = copy.deepcopy(body)
        with _calls_of(subject.outside, attempt):
            try:
                message = HandedMessage(
                    body,
                    delivery.message.inner_msg_id,
                    delivery.message.redelivered,
                    lambda: setattr(case, "answered", True),
                )
                value = subject.plain(body, message, *handed) if subject.takes_message else subject.plain(body)
                attempt.how = "returned"
            except Exception as error:
                attempt.how, attempt.error = "raised", error
                raise
            except BaseException:
                attempt.how = "crashed"
                raise
            finally:
                if body != before:
                    case.mutated = f"it was {before!r}, and after the handler {body!r}"
        return value

    def _answered(self, delivery: Delivery, answer: str) -> None:
        biz_id = str(self.subject.ids.of(delivery.message.body))
        if answer == "ack":
            self.case.finished.add(biz_id)
        elif answer == "dead_letter":
            self.case.given_up[biz_id] = self.broker.dead[-1].error


@contextlib.contextmanager
def _calls_of(outside: Outside, attempt: Attempt) -> Iterator[None]:
    began = len(outside.calls)
    try:
        yield
    finally:
        attempt.calls = outside.calls[began:]


def takes_message(handler: Callable[..., Any]) -> bool:
    """True if it is called with the message too, and not with the body alone."""
    try:
        parameters = inspect.signature(handler).parameters.values()
    except (TypeError, ValueError):
        return True
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind is p.VAR_POSITIONAL for p in parameters) or sum(p.kind in kinds for p in parameters) > 1
