"""`IdempotentConsumer`: a consumer that owns its channel, and handles a window of messages at a time.

It connects, and connects again; what happens on one connection is `session.py`. A single message in a bare kombu
callback (`handler.py`) takes the same path through `executor.py`.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kombu import Connection, Queue

from .errors import ConfigurationError
from .frames import read_everything
from .handler import IdempotentHandler, WorkExecutor, idempotent_consumer
from .pool import Pool
from .sending.lane import private_copy
from .session import Session
from .settlement import let_go
from .stopping import Stopped, Stopping
from .work import Ended

__all__ = ["IdempotentConsumer", "IdempotentHandler", "WorkExecutor", "idempotent_consumer"]

log = logging.getLogger(__name__)

_FIRST_RECONNECT_PAUSE: Final = 0.1
_LONGEST_RECONNECT_PAUSE: Final = 5.0
#: AMQP's methods that declare an exchange or a queue, and its answer if there is another one of that name.
_DECLARING: Final = ((40, 10), (50, 10))
_PRECONDITION: Final = 406


class IdempotentConsumer:
    """Consumes queues over a channel of its own, with a window of messages at a time, until stopped or idle.

    connection: a kombu Connection, a pool of them, or a URL; it is copied, so that nobody else's consumers are run
        from here.
    handlers: which guarded handler takes which queue. The queues are declared.
    prefetch: how many unacked messages the broker may have on their way to this consumer, over all queues, but at
        least one for each. Where the broker has no delays, those that wait for their next attempt come on top.
    accept: content types, as kombu's Consumer takes them.
    threads: handlers run in so many threads, for handlers that wait for something; heartbeats go on meanwhile. 0: in
        the thread that calls `run`, a window at a time, which is fastest for short handlers.
    stop_timeout: seconds that `stop` gives the handlers that run in threads; None: as long as they take. What runs
        longer is left behind: its message goes back to the broker, its lease is renewed while this process lives.

    `run` belongs to one thread; `stop` and `health` may be called from any thread or a signal handler. `endings` counts
    what became of the deliveries (those of a window that an error or `stop` broke off are not counted). Connection
    errors are ridden out: reconnecting, with a pause of at most 5 seconds. So is, once it has consumed, what the broker
    refuses or takes back: a channel that RabbitMQ closed, a node or a permission that is missing for a while.

    An execution that is still open (`manual=True`) when `run` ends is left as it is: its message goes back to the
    broker unacked, and its claim is neither completed nor released. If it is completed while this process lives, that
    counts, and the message is answered from its record; if not, its lease lapses with the process.
    """

    def __init__(
        self,
        connection: Connection | str | Any,
        handlers: Mapping[Queue, IdempotentHandler],
        *,
        prefetch: int = 100,
        accept: Sequence[str] | None = None,
        threads: int = 0,
        stop_timeout: float | None = None,
    ) -> None:
        if not handlers:
            raise ConfigurationError("IdempotentConsumer needs at least one queue with its guarded handler")
        if prefetch < 1:
            raise ConfigurationError("prefetch must be at least 1: without a bound a dead worker takes all with it")
        if type(threads) is not int or threads < 0:
            raise ConfigurationError("threads must be a whole number, 0 for none")
        if stop_timeout is not None and not stop_timeout >= 0:
            raise ConfigurationError("stop_timeout must be a number of seconds, or None to wait as long as it takes")
        for queue, handler in handlers.items():
            if not isinstance(queue, Queue) or not isinstance(handler, IdempotentHandler):
                raise ConfigurationError(
                    "handlers maps a kombu Queue to a function decorated with @idempotent_consumer "
                    "or @transactional_consumer"
                )
        names = [queue.name for queue in handlers if queue.name]
        if len(set(names)) < len(names):
            raise ConfigurationError("two handlers for one queue: its messages would go to either of them")
        self.endings: Counter[Ended] = Counter()
        self._connection = connection
        self._handlers = dict(handlers)
        self._prefetch = prefetch
        self._accept = accept
        self._threads = threads
        #: How many handlers the last `run` left behind because they outlived the stop_timeout.
        self.left_behind = 0
        self._stopping = Stopping(stop_timeout)
        self._is_running = False
        self._session: Session | None = None
        self._has_consumed = False
        self._pool: Pool | None = None
        self._looped_at: float | None = None
        self._said_retention = False

    def stop(self) -> None:
        """Let `run` return after the handlers that are running now; what has not started goes back to the broker.

        Without a `run` that is under way, the next one returns at once.
        """
        self._stopping.requested = True
        session = self._session
        if session is not None:
            session.wake()

    def health(self) -> dict[str, Any]:
        """What this consumer is doing, in plain values. Times are seconds since the epoch.

        `waiting` messages have been brought and have not begun, `in_flight` ones are being handled, `open` ones were
        left to be completed later (`manual=True`), `parked` ones wait here for their next attempt. `last_loop`: when
        this thread last looked at the broker; without threads a handler holds that up, for `oldest_running` seconds.
        `store`: whether the last claim or completion had a clear answer.
        """
        pool, session = self._pool, self._session
        since = None if session is None else session.handling_since
        down = None if session is None else session.store_down_since
        on_hand = 0 if session is None else len(session.on_hand)
        if pool is None:
            waiting, running = 0, 0 if since is None else 1
            oldest = 0.0 if since is None else time.monotonic() - since
        else:
            waiting, running, oldest = pool.waiting, pool.running, pool.oldest
        connected = session is not None and session.is_running
        state = "stopped" if not self._is_running else "running" if connected else "connecting"
        return {
            "state": "stopping" if self._stopping.requested and self._is_running else state,
            "pid": os.getpid(),
            "connected": connected,
            "last_loop": self._looped_at,
            "waiting": waiting,
            "in_flight": running,
            "open": 0 if pool is None and since is not None else max(0, on_hand - waiting - running),
            "parked": 0 if session is None else len(session.parked),
            "endings": {how.value: self.endings[how] for how in Ended if self.endings[how]},
            "oldest_running": round(oldest, 3),
            "store": {"ok": down is None, "unavailable_since": down},
        }

    def run(self, *, idle_timeout: float | None = None) -> int:
        """Consume until `stop`, or until nothing arrived for `idle_timeout` seconds. Returns how many were settled.

        It is not idle while a handler runs, or an execution is open. Raises what cannot be ridden out: wrong settings,
        a queue that is declared otherwise.
        """
        before = self.endings.total()
        pause = _FIRST_RECONNECT_PAUSE
        self.left_behind = 0
        self._has_consumed = False
        pool = self._pool = Pool(self._threads) if self._threads else None
        self._is_running = True
        try:
            while not self._stopping.requested:
                connection = private_copy(self._connection)
                read_everything(connection)
                started = time.monotonic()
                try:
                    connection.ensure_connection(self._on_no_connection, None, 1, 1, 2, self._stopping.check)
                    with connection:
                        self._consume(connection, idle_timeout)
                    break
                except Stopped:
                    break
                except Exception as error:
                    if not self._may_pass(connection, error):
                        raise
                    if time.monotonic() - started > 2 * _LONGEST_RECONNECT_PAUSE:
                        pause = _FIRST_RECONNECT_PAUSE  # it had gone well for a while
                    log.warning("consumer lost its connection (%s), reconnecting", type(error).__name__)
                    self._stopping.rest(pause, self._note_loop)
                    pause = min(pause * 2, _LONGEST_RECONNECT_PAUSE)
                finally:
                    let_go(connection)
            if pool is not None:
                self._await_handlers(pool)
        finally:
            if pool is not None:
                pool.close()
                self.left_behind = pool.running
                self._pool = None
            self._is_running = False
            self._stopping.reset()
        return self.endings.total() - before

    def _may_pass(self, connection: Connection, error: Exception) -> bool:
        """True if reconnecting may help.

        What the broker refuses at the start is for whoever set it up to mend. Once this has consumed it is trouble that
        passes: a message was held for longer than RabbitMQ's consumer_timeout, a queue's node is down. Only a queue
        that was declared otherwise meanwhile stays so.
        """
        if isinstance(
            error, (OSError, *connection.recoverable_connection_errors, *connection.recoverable_channel_errors)
        ):
            return True
        if not isinstance(error, (*connection.connection_errors, *connection.channel_errors)):
            return False
        refused, code = getattr(error, "method_sig", None), getattr(error, "reply_code", None)
        return self._has_consumed and not (refused in _DECLARING and code == _PRECONDITION)

    def _consume(self, connection: Connection, idle_timeout: float | None) -> None:
        session = self._session = Session(
            connection,
            self._handlers,
            prefetch=self._prefetch,
            accept=self._accept,
            pool=self._pool,
            endings=self.endings,
            stopping=self._stopping,
            on_channel=self._check_retention,
            looped=self._note_loop,
        )
        try:
            session.run(idle_timeout)
        finally:
            self._has_consumed = self._has_consumed or session.is_running
            self._session = None

    def _await_handlers(self, pool: Pool) -> None:
        """After the connection is gone: what still runs may complete its record."""
        pool.clear()
        while pool.running and self._stopping.seconds_left > 0:
            pool.wait(min(self._stopping.seconds_left, 0.5))
        if pool.running:
            log.warning("%d handlers did not end in time, and are left behind", pool.running)

    def _note_loop(self) -> None:
        self._looped_at = time.time()

    def _on_no_connection(self, error: BaseException, interval: float) -> None:
        self._note_loop()
        log.warning("consumer cannot reach the broker (%s), next try in %.0f s", type(error).__name__, interval)

    def _check_retention(self, channel: Any) -> None:
        """Raise ConfigurationError where a record would be forgotten before the broker brings its message back (I11).

        RabbitMQ and most others have no time that could be asked for: there it is said what is relied on, once.
        """
        timeout = getattr(channel, "visibility_timeout", getattr(channel, "_visibility_timeout", None))
        if not isinstance(timeout, (int, float)):
            if not self._said_retention:
                self._said_retention = True
                for handler in self._handlers.values():
                    log.info(
                        "scope %s: how long this broker may keep a message cannot be known here; one that comes more "
                        "than %.1f days after its publish (retention) goes to the dead letter, if it tells its time",
                        handler.scope,
                        handler.executor.policy.retention / 86_400,
                    )
            return
        for handler in self._handlers.values():
            retention = handler.executor.policy.retention
            if timeout >= retention:
                raise ConfigurationError(
                    f"scope {handler.scope}: the broker brings the message of a dead consumer back after up to "
                    f"{timeout:.0f} s (visibility_timeout), but its record is forgotten after {retention:.0f} s "
                    "(retention), and then it would run again: make the retention longer"
                )
