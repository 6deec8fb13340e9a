"""`IdempotentConsumer`: a consumer that owns its channel, and handles a window of messages at a time.

Without threads it claims all messages that prefetch has already brought in one round trip. With threads each message is
claimed, run and completed in a thread of a pool, and this one only talks to the broker: acks, waits and dead letters
come home to it (`home.py`), and heartbeats go on while handlers run. A single message in a bare kombu callback
(`handler.py`) takes the same path through `executor.py`.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import logging
import os
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, overload

from kombu import Connection, Consumer, Queue
from kombu.message import Message

from . import delays
from .acks import BulkAcks
from .bell import Bell
from .buffered import BufferedReads
from .errors import ConfigurationError
from .frames import read_everything
from .handler import IdempotentHandler, WorkExecutor, idempotent_consumer
from .home import HandedOver, HomeThread
from .inflating import limit_inflation
from .pool import Pool
from .sending.lane import private_copy
from .settlement import let_go
from .work import Ended, Work

__all__ = ["IdempotentConsumer", "IdempotentHandler", "WorkExecutor", "idempotent_consumer"]

log = logging.getLogger(__name__)

#: A window is kept so small that it is through in about this many seconds: a slow handler shrinks it to one message,
#: so that it never holds claims that others could run.
_WINDOW_SECONDS: Final = 0.25
_FIRST_RECONNECT_PAUSE: Final = 0.1
_LONGEST_RECONNECT_PAUSE: Final = 5.0
#: How long the broker may take to answer the goodbye of a consumer that stops.
_GOODBYE_SECONDS: Final = 5.0
#: How much the prefetch may grow, where nothing but holding them makes messages wait, so that they block nobody.
_MOST_PARKED: Final = 10

#: How long an answer that comes home may wait for its way to the broker, where nothing wakes the loop.
_ANSWER_SECONDS: Final = 0.05

_Arrived = tuple[IdempotentHandler, str, Message]


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
    errors are ridden out: reconnecting, with a pause of at most 5 seconds.

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
        self._stop_timeout = stop_timeout
        #: How many handlers the last `run` left behind because they outlived the stop_timeout.
        self.left_behind = 0
        self._state = "stopped"
        self._looped_at: float | None = None
        self._pool: Pool | None = None
        # Not an Event: its lock is not safe in a signal handler that interrupts the thread which holds it.
        self._said_retention = False
        self._stopping = False
        self._reset()

    def _reset(self) -> None:
        self._channel: Any = None
        self._acks: BulkAcks | None = None
        self._reads: BufferedReads | None = None
        self._home: HomeThread | None = None
        self._bell: Bell | None = None
        self._on_hand: set[HandedOver] = set()
        self._handling_since: float | None = None
        self._doubtful: dict[WorkExecutor, float] = {}
        self._store_down_since: float | None = None
        self._stop_by: float | None = None
        self._beat = 0.0
        self._last_beat = 0.0
        self._at_once = 0.0
        self._has_more: Callable[[], bool] = _always
        self._arrived: list[_Arrived] = []
        self._parked: list[tuple[float, int, _Arrived]] = []
        self._order = itertools.count()
        self._seconds_each = _WINDOW_SECONDS  # so that the first window is of one message

    def stop(self) -> None:
        """Let `run` return after the handlers that are running now; what has not started goes back to the broker.

        Without a `run` that is under way, the next one returns at once.
        """
        self._stopping = True
        bell = self._bell
        if bell is not None:
            bell.ring()

    def health(self) -> dict[str, Any]:
        """What this consumer is doing, in plain values. Times are seconds since the epoch.

        `waiting` messages have been brought and have not begun, `in_flight` ones are being handled, `open` ones were
        left to be completed later (`manual=True`), `parked` ones wait here for their next attempt. `last_loop`: when
        this thread last looked at the broker; without threads a handler holds that up, for `oldest_running` seconds.
        `store`: whether the last claim or completion had a clear answer.
        """
        pool, since, down = self._pool, self._handling_since, self._store_down_since
        on_hand = len(self._on_hand)
        if pool is None:
            waiting, running = 0, 0 if since is None else 1
            oldest = 0.0 if since is None else time.monotonic() - since
        else:
            waiting, running, oldest = pool.waiting, pool.running, pool.oldest
        return {
            "state": "stopping" if self._stopping and self._state != "stopped" else self._state,
            "pid": os.getpid(),
            "connected": self._state == "running",
            "last_loop": self._looped_at,
            "waiting": waiting,
            "in_flight": running,
            "open": 0 if pool is None and since is not None else max(0, on_hand - waiting - running),
            "parked": len(self._parked),
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
        pool = self._pool = Pool(self._threads) if self._threads else None
        try:
            while not self._stopping:
                self._reset()
                self._state = "connecting"
                connection = private_copy(self._connection)
                read_everything(connection)
                started = time.monotonic()
                try:
                    connection.ensure_connection(self._on_no_connection, None, 1, 1, 2, self._check_stopped)
                    with connection:
                        self._consume(connection, idle_timeout)
                    break
                except _Stopped:
                    break
                except (
                    OSError,
                    *connection.recoverable_connection_errors,
                    *connection.recoverable_channel_errors,
                ) as error:
                    self._state = "connecting"
                    if time.monotonic() - started > 2 * _LONGEST_RECONNECT_PAUSE:
                        pause = _FIRST_RECONNECT_PAUSE  # it had gone well for a while
                    log.warning("consumer lost its connection (%s), reconnecting", type(error).__name__)
                    self._rest(pause)
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
            self._state = "stopped"
            self._stopping = False
            self._reset()
        return self.endings.total() - before

    def _await_handlers(self, pool: Pool) -> None:
        """After the connection is gone: what still runs may complete its record."""
        pool.clear()
        while pool.running and self._time_to_stop() > 0:
            pool.wait(min(self._time_to_stop(), 0.5))
        if pool.running:
            log.warning("%d handlers did not end in time, and are left behind", pool.running)

    def _time_to_stop(self) -> float:
        """Seconds that are left of the stop_timeout, which runs from the first call."""
        if self._stop_timeout is None:
            return float("inf")
        if self._stop_by is None:
            self._stop_by = time.monotonic() + self._stop_timeout
        return self._stop_by - time.monotonic()

    def _check_stopped(self) -> None:
        if self._stopping:
            raise _Stopped

    def _on_no_connection(self, error: BaseException, interval: float) -> None:
        self._looped_at = time.time()
        log.warning("consumer cannot reach the broker (%s), next try in %.0f s", type(error).__name__, interval)

    def _rest(self, seconds: float) -> None:
        """Sleep, but not longer than until `stop`."""
        end = time.monotonic() + seconds
        while not self._stopping and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
            self._looped_at = time.time()
            if self._home is not None:
                self._home.run_pending()
                self._flush_acks()

    # --- on one connection ----------------------------------------------------------------------------

    def _consume(self, connection: Connection, idle_timeout: float | None) -> None:
        channel = self._channel = connection.channel()
        self._check_retention(channel)
        amqp = connection.transport.driver_type == "amqp"
        sock = getattr(connection.connection, "sock", None) if amqp else None  # librabbitmq shows none
        bell = self._bell = Bell(sock)
        home = self._home = HomeThread(bell.ring)
        try:
            consumers = self._open_consumers(connection, channel)
            self._state = "running"
            with contextlib.suppress(_Stopped):
                self._loop(connection, idle_timeout)
            if sock is not None:
                sock.settimeout(_GOODBYE_SECONDS)
            for consumer in consumers:
                consumer.cancel()
            self._finish(connection)
        finally:
            home.close()
            self._acks = None  # what it held goes with the channel
            self._bell = None
            bell.close()
            if connection.transport.driver_type == "memory":
                # kombu's memory transport forgets what is unacked when its channel closes.
                channel.basic_recover(requeue=True)
        channel.close()  # what is here and not settled goes back to the broker

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

    def _finish(self, connection: Connection) -> None:
        """No more messages come: send what has come home, and let the handlers in threads end."""
        pool, home, bell = self._pool, self._home, self._bell
        assert home is not None
        assert bell is not None
        if pool is not None:
            pool.clear()
            while pool.running and self._time_to_stop() > 0:
                self._send_heartbeat(connection, time.monotonic())
                if bell.wait(min(self._time_to_stop(), max(self._beat / 4, _ANSWER_SECONDS))):
                    with contextlib.suppress(socket.timeout, TimeoutError):
                        connection.drain_events(timeout=0.001)
                self._looped_at = time.time()
                home.run_pending()
                self._flush_acks()
        home.run_pending()
        self._flush_acks()

    def _flush_acks(self) -> None:
        if self._acks is not None:
            self._acks.flush()

    def _open_consumers(self, connection: Connection, channel: Any) -> list[Consumer]:
        amqp = connection.transport.driver_type == "amqp"
        if amqp:
            self._acks = BulkAcks(channel)
            self._reads = BufferedReads(connection) if BufferedReads.fits(connection) else None
            # In the middle of a frame py-amqp spins on a socket that does not block; to wait where nothing has come
            # at all would cost a millisecond for each window.
            self._at_once = 0.001
            sock = getattr(connection.connection, "sock", None)
            self._has_more = _always if sock is None else functools.partial(_has_arrived, sock)
        # AMQP counts the prefetch for each consumer, quorum queues allow nothing else; kombu's own for the channel.
        channel.basic_qos(0, max(1, self._prefetch // len(self._handlers)) if amqp else self._prefetch, False)
        limits = [handler.max_body for handler in self._handlers.values()]
        limit_inflation(channel, None if None in limits else max(limit for limit in limits if limit is not None))
        consumers = []
        for queue, handler in self._handlers.items():
            consumer = Consumer(channel, [queue], accept=self._accept, no_ack=False)
            name = consumer.queues[0].name  # the broker may have named it only now
            consumer.on_message = functools.partial(self._on_message, handler, name)
            consumer.on_decode_error = functools.partial(self._on_decode_error, handler, name)
            consumers.append(consumer)
            # Not at the first need: a quorum queue that was declared just before its broker died may lose messages.
            delays.declare(connection, handler.executor.policy.longest_wait, [name])
        for consumer in consumers:
            consumer.consume()
        return consumers

    def _loop(self, connection: Connection, idle_timeout: float | None) -> None:
        home, pool = self._home, self._pool
        assert home is not None
        quiet_since = self._last_beat = time.monotonic()
        self._beat = float(connection.get_heartbeat_interval() or 0)
        while not self._stopping:
            now = time.monotonic()
            self._looped_at = time.time()
            wait = 1.0
            if self._beat:
                wait = min(wait, self._beat / 4)
                self._send_heartbeat(connection, now)
            if self._parked:
                wait = min(wait, self._parked[0][0] - now)
            if idle_timeout is not None:
                wait = min(wait, quiet_since + idle_timeout - now)
            self._gather(connection, wait)
            home.run_pending()
            self._flush_acks()
            now = time.monotonic()
            self._wake_parked(now)
            if self._arrived:
                self._handle_arrived()
                quiet_since = time.monotonic()
            elif self._on_hand or (pool is not None and pool.running):
                quiet_since = now
            elif idle_timeout is not None and now - quiet_since >= idle_timeout and not self._parked:
                return

    def _send_heartbeat(self, connection: Connection, now: float) -> None:
        if self._beat and now - self._last_beat >= self._beat / 2:
            connection.heartbeat_check(rate=2)
            self._last_beat = now

    def _gather(self, connection: Connection, wait: float) -> None:
        """Wait for a message, then take what else has already arrived, up to the window."""
        window = self._window()
        wait = max(wait, 0.001)
        reads = self._reads
        try:
            if reads is not None and reads.has_message:
                wait = 0.0
            elif self._on_hand:  # others may want something done here meanwhile
                wait = self._await_bell(connection, wait)
            if wait:
                connection.drain_events(timeout=wait)
            while len(self._arrived) < window:
                if reads is not None:
                    reads.take(lambda: len(self._arrived) < window)
                if len(self._arrived) >= window or not self._has_more():
                    break
                connection.drain_events(timeout=self._at_once)
        except (socket.timeout, TimeoutError):  # noqa: UP041 - not the same class in Python 3.10's ssl module
            pass

    def _await_bell(self, connection: Connection, wait: float) -> float:
        """Wait so that an answer that comes home ends it. Returns how long the broker's messages may be waited for."""
        assert self._bell is not None
        if self._has_more is not _always:
            return 0.001 if self._bell.wait(wait) else 0.0
        wait = min(wait, _ANSWER_SECONDS)
        if len(self._on_hand) < self._prefetch:
            return wait  # here only the transport itself can tell that a message has come
        self._bell.wait(wait)
        return 0.001

    def _window(self) -> int:
        if self._pool is not None:
            return self._prefetch
        return max(1, min(self._prefetch, int(_WINDOW_SECONDS / max(self._seconds_each, 1e-6))))

    def _on_message(self, handler: IdempotentHandler, queue: str, message: Message) -> None:
        if self._acks is not None:
            self._acks.arrived(message.delivery_tag)
        self._arrived.append((handler, queue, message))

    def _on_decode_error(self, handler: IdempotentHandler, queue: str, message: Message, error: Exception) -> None:
        # Not from here: what fails now would fail in the middle of taking messages off the connection.
        self._on_message(handler, queue, message)

    # --- handling -------------------------------------------------------------------------------------

    def _handle_arrived(self) -> None:
        arrived, self._arrived = self._arrived, []
        if self._pool is not None:
            assert self._home is not None
            for entry in arrived:
                work = self._work(entry)
                if work is not None:
                    self._pool.submit(functools.partial(self._run_in_thread, entry[0], work, self._home))
            return
        by_handler: dict[IdempotentHandler, list[_Arrived]] = {}
        for entry in arrived:
            by_handler.setdefault(entry[0], []).append(entry)
        window = self._window()
        for handler, entries in by_handler.items():
            for begin in range(0, len(entries), window):
                self._handle_window(handler, entries[begin : begin + window])

    def _handle_window(self, handler: IdempotentHandler, entries: Sequence[_Arrived]) -> None:
        started = self._handling_since = time.monotonic()
        works = [work for entry in entries if (work := self._work(entry)) is not None]
        if not works:
            self._handling_since = None
            self._flush_acks()
            return
        try:
            endings = handler.executor.handle_window(_UntilStopped(works, self._check_stopped))
        except _Stopped:
            self._flush_acks()
            raise
        self._flush_acks()
        each = (time.monotonic() - started) / len(works)
        self._seconds_each = 0.7 * self._seconds_each + 0.3 * each if each > self._seconds_each / 8 else each
        self._handling_since = None
        for ending in endings:
            self._count(ending.how)
        if any(ending.how is Ended.IN_DOUBT for ending in endings):
            self._rest(handler.executor.policy.busy_delay)  # the store is down: do not spin on it

    def _work(self, entry: _Arrived) -> Work | None:
        self._check_stopped()
        handler, queue, message = entry
        ack = None if self._acks is None else self._acks.ack
        settle = handler.settlement(message, queue, functools.partial(self._park, entry), ack)
        if settle.renew():
            return None
        work = handler.receive(message, settle)
        if work is None:
            self.endings[Ended.DEAD] += 1
            return None
        assert self._home is not None
        work.settle = handed = HandedOver(settle, self._home, on_settled=self._on_hand.discard)
        self._on_hand.add(handed)
        return work

    def _count(self, how: Ended) -> None:
        self.endings[how] += 1
        if how is Ended.IN_DOUBT:
            if self._store_down_since is None:
                self._store_down_since = time.time()
        elif how is not Ended.DEAD and how is not Ended.HELD:  # for those it may not have been asked
            self._store_down_since = None

    # --- in a thread of the pool ----------------------------------------------------------------------

    def _run_in_thread(self, handler: IdempotentHandler, work: Work, home: HomeThread) -> None:
        executor = handler.executor
        try:
            while (left := self._doubtful.get(executor, 0.0) - time.monotonic()) > 0 and not self._is_over(home):
                time.sleep(min(left, 0.1))  # the store is down: do not spin on it
            if self._is_over(home):
                return  # the broker has the message again, or gets it back
            how = executor.handle(work).how
        except BaseException as error:  # noqa: BLE001 - it is not this thread's: whatever it is comes out of `run`
            if home.is_closed:
                log.warning("a handler in scope %s ended after its connection (%s)", work.scope, type(error).__name__)
            home.post(_raise, error)
            return
        if how is Ended.IN_DOUBT:
            self._doubtful[executor] = time.monotonic() + executor.policy.busy_delay
        home.post(self._count, how)

    def _is_over(self, home: HomeThread) -> bool:
        return self._stopping or home.is_closed

    # --- what waits here, where the broker has no delays ----------------------------------------------

    def _park(self, entry: _Arrived, delay: float) -> None:
        heapq.heappush(self._parked, (time.monotonic() + delay, next(self._order), entry))
        self._make_room()

    def _wake_parked(self, now: float) -> None:
        if self._parked and self._parked[0][0] <= now:
            while self._parked and self._parked[0][0] <= now:
                self._arrived.append(heapq.heappop(self._parked)[2])
            self._make_room()

    def _make_room(self) -> None:
        """Let as many more messages come as are parked, so that these do not keep their neighbours from coming."""
        if self._channel.connection.client.transport.driver_type != "amqp":  # there the delay queue holds them
            room = min(len(self._parked), _MOST_PARKED * self._prefetch)
            self._channel.basic_qos(0, self._prefetch + room, False)


def _always() -> bool:
    return True


def _raise(error: BaseException) -> None:
    raise error


def _has_arrived(sock: Any) -> bool:
    """Whether there is something to read, or it cannot be told without reading."""
    if getattr(sock, "pending", int)():  # TLS: decrypted already
        return True
    try:
        return bool(select.select((sock,), (), (), 0)[0])
    except ValueError:  # more open files than select can name, or the socket is closed
        return True


class _Stopped(Exception):
    """Not an error: the consumer was told to stop."""


class _UntilStopped(Sequence[Work]):
    """The works of a window. Going through them ends with an error once the consumer was told to stop.

    The executor then gives back the claims of those that have not started.
    """

    def __init__(self, works: Sequence[Work], check: Callable[[], None]) -> None:
        self._works = works
        self._check = check

    def __len__(self) -> int:
        return len(self._works)

    @overload
    def __getitem__(self, index: int) -> Work: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Work]: ...
    def __getitem__(self, index: int | slice) -> Work | Sequence[Work]:
        return self._works[index]

    def __iter__(self) -> Iterator[Work]:
        for work in self._works:
            self._check()
            yield work
