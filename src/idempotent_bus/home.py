"""The consuming thread's mailbox: a kombu channel belongs to one thread, and all answers to the broker go through it.

Handlers that run in other threads, and executions that are completed later by some callback's thread, settle their
messages here. There is one mailbox for each connection: it is closed with it, so that nothing that was meant for an old
channel is ever done on a new one. What was dropped so is no loss: the broker delivers the message again, and its record
answers it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # another class before Python 3.11
from functools import partial
from typing import Any, TypeVar

from .model import Reason
from .work import Settlement

__all__ = ["HandedOver", "HomeThread"]

T = TypeVar("T")


class HomeThread:
    """What other threads want done by the thread that made this object. Safe for threads.

    wake: called, from the thread that posted, after something came in: it should end the owner's wait.
    """

    __slots__ = ("_closed", "_lock", "_owner", "_pending", "_wake")

    def __init__(self, wake: Callable[[], None] | None = None) -> None:
        # The object, not its number: numbers are given again to later threads.
        self._owner = threading.current_thread()
        self._pending: deque[tuple[Callable[[], Any], Future[Any] | None]] = deque()
        self._lock = threading.Lock()
        self._closed = False
        self._wake = wake

    @property
    def is_here(self) -> bool:
        """True in the owner's thread."""
        return threading.current_thread() is self._owner

    @property
    def is_closed(self) -> bool:
        """True once the connection is gone: nothing is done any more."""
        return self._closed

    def post(self, function: Callable[..., Any], /, *args: Any) -> None:
        """Have it done later, and do not wait. Dropped if the connection goes first."""
        self._put(partial(function, *args), None)

    def ask(self, function: Callable[..., T], /, *args: Any, timeout: float | None = None) -> T:
        """Have it done and wait for the result; raises what it raised. In the owner's thread it is done at once.

        Raises ConnectionResetError if the connection is gone, or goes before it was done, and after `timeout` seconds
        in which the owner did not begin: then it is not done later either.
        """
        if self.is_here:
            if self._closed:
                raise _gone()
            return function(*args)
        answer: Future[T] = Future()
        self._put(partial(function, *args), answer)
        try:
            return answer.result(timeout)
        except (TimeoutError, FutureTimeout):
            if not answer.cancel():
                return answer.result()  # it has begun, or it raised this error itself
            raise ConnectionResetError("the thread that consumes did not settle this message in time") from None

    def run_pending(self) -> None:
        """For the owner: do all that has come in. What a posted function raises comes out; the rest stays for later."""
        while self._pending:
            function, answer = self._pending.popleft()
            if answer is None:
                function()
                continue
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                result = function()
            except Exception as error:  # noqa: BLE001 - it is the asker's
                answer.set_exception(error)
            except BaseException:
                answer.set_exception(_gone())
                raise
            else:
                answer.set_result(result)

    def close(self) -> None:
        """For the owner: the connection is gone. What was posted is dropped, who waits for an answer gets an error."""
        with self._lock:
            self._closed = True
            pending, self._pending = self._pending, deque()
        for _, answer in pending:
            if answer is not None and answer.set_running_or_notify_cancel():
                answer.set_exception(_gone())

    def _put(self, function: Callable[[], Any], answer: Future[Any] | None) -> None:
        with self._lock:  # so that nothing comes in behind the back of `close`, where nobody would answer it
            if self._closed:
                if answer is not None:
                    raise _gone()
                return
            self._pending.append((function, answer))
        if self._wake is not None:
            self._wake()


def _gone() -> ConnectionResetError:
    return ConnectionResetError(
        "the connection that brought this message is gone: nothing was settled, the broker delivers it again"
    )


class HandedOver:
    """A settlement that any thread may use: `ack` and `wait` are posted home, for `dead_letter` it waits.

    is_live: asked at home before what another thread wanted is done; False: the message's channel is closed, so it is
    not. on_settled: called at home with this object once the message was acked, put off or moved. patience: seconds
    that `dead_letter` waits for the home thread, if nothing else tells that this one will never come. tag: by which the
    broker knows the delivery.
    """

    __slots__ = ("_home", "_is_live", "_on_settled", "_patience", "_settle", "tag")

    def __init__(
        self,
        settle: Settlement,
        home: HomeThread,
        *,
        is_live: Callable[[], bool] | None = None,
        on_settled: Callable[[HandedOver], None] | None = None,
        patience: float | None = None,
        tag: Any = None,
    ) -> None:
        self.tag = tag
        self._settle = settle
        self._home = home
        self._is_live = is_live
        self._on_settled = on_settled
        self._patience = patience

    def ack(self) -> None:
        """The message is done: the broker may forget it."""
        self._hand(self._settle.ack)

    def wait(self, delay: float) -> None:
        """Let the message come back no sooner than `delay` seconds from now."""
        self._hand(self._settle.wait, delay)

    def dead_letter(self, reason: Reason, error: str, attempts: int) -> bool:
        """Put the message into the dead letter; True once that is confirmed and the message is acked.

        Raises ConnectionResetError if the message's connection is gone: it is the broker's again.
        """
        return self._home.ask(self._move, reason, error, attempts, timeout=self._patience)

    def _hand(self, settle: Callable[..., None], *args: Any) -> None:
        home = self._home
        if not home.is_here:
            home.post(self._do_if_live, settle, *args)
        elif not home.is_closed:
            self._do(settle, *args)  # a closed channel is the caller's to hear of

    def _do_if_live(self, settle: Callable[..., None], *args: Any) -> None:
        if self._is_live is None or self._is_live():
            self._do(settle, *args)

    def _do(self, settle: Callable[..., None], *args: Any) -> None:
        settle(*args)
        self._settled()

    def _move(self, reason: Reason, error: str, attempts: int) -> bool:
        if self._is_live is not None and not self._is_live():
            raise _gone()
        moved = self._settle.dead_letter(reason, error, attempts)
        self._settled()
        return moved

    def _settled(self) -> None:
        if self._on_settled is not None:
            self._on_settled(self)
