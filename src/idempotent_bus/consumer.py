"""`IdempotentConsumer`: a consumer that owns its channel, and handles a window of messages at a time.

It claims all messages that prefetch has already brought in one round trip. A single message in a bare kombu callback
(`handler.py`) takes the same path through `execution.py`.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import logging
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, overload

from kombu import Connection, Consumer, Queue
from kombu.message import Message

from .errors import ConfigurationError
from .execution import Ended, Work
from .handler import IdempotentHandler, WorkExecutor, idempotent_consumer
from .sending.lane import private_copy
from .settlement import let_go

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

_Arrived = tuple[IdempotentHandler, str, Message]


class IdempotentConsumer:
    """Consumes queues over a channel of its own, with a window of messages at a time, until stopped or idle.

    connection: a kombu Connection, a pool of them, or a URL; it is copied, so that nobody else's consumers are run
        from here.
    handlers: which guarded handler takes which queue. The queues are declared.
    prefetch: how many unacked messages the broker may have on their way to this consumer, over all queues, but at
        least one for each. Where the broker has no delays, those that wait for their next attempt come on top.
    accept: content types, as kombu's Consumer takes them.

    `run` belongs to one thread; `stop` may be called from any thread or a signal handler. `endings` counts what
    became of the deliveries (those of a window that an error or `stop` broke off are not counted). Connection errors
    are ridden out: reconnecting, with a pause of at most 5 seconds.
    """

    def __init__(
        self,
        connection: Connection | str | Any,
        handlers: Mapping[Queue, IdempotentHandler],
        *,
        prefetch: int = 100,
        accept: Sequence[str] | None = None,
    ) -> None:
        if not handlers:
            raise ConfigurationError("IdempotentConsumer needs at least one queue with its guarded handler")
        if prefetch < 1:
            raise ConfigurationError("prefetch must be at least 1: without a bound a dead worker takes all with it")
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
        # Not an Event: its lock is not safe in a signal handler that interrupts the thread which holds it.
        self._stopping = False
        self._reset()

    def _reset(self) -> None:
        self._channel: Any = None
        self._at_once = 0.0
        self._has_more: Callable[[], bool] = _always
        self._arrived: list[_Arrived] = []
        self._parked: list[tuple[float, int, _Arrived]] = []
        self._order = itertools.count()
        self._seconds_each = _WINDOW_SECONDS  # so that the first window is of one message

    def stop(self) -> None:
        """Let `run` return after the handler that is running now; what has not started goes back to the broker.

        Without a `run` that is under way, the next one returns at once.
        """
        self._stopping = True

    def run(self, *, idle_timeout: float | None = None) -> int:
        """Consume until `stop`, or until nothing arrived for `idle_timeout` seconds. Returns how many were settled.

        Raises what cannot be ridden out: wrong settings, a queue that is declared otherwise.
        """
        before = self.endings.total()
        pause = _FIRST_RECONNECT_PAUSE
        try:
            while not self._stopping:
                self._reset()
                connection = private_copy(self._connection)
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
                    if time.monotonic() - started > 2 * _LONGEST_RECONNECT_PAUSE:
                        pause = _FIRST_RECONNECT_PAUSE  # it had gone well for a while
                    log.warning("consumer lost its connection (%s), reconnecting", type(error).__name__)
                    self._rest(pause)
                    pause = min(pause * 2, _LONGEST_RECONNECT_PAUSE)
                finally:
                    let_go(connection)
        finally:
            self._stopping = False
            self._reset()
        return self.endings.total() - before

    def _check_stopped(self) -> None:
        if self._stopping:
            raise _Stopped

    def _on_no_connection(self, error: BaseException, interval: float) -> None:
        log.warning("consumer cannot reach the broker (%s), next try in %.0f s", type(error).__name__, interval)

    def _rest(self, seconds: float) -> None:
        """Sleep, but not longer than until `stop`."""
        end = time.monotonic() + seconds
        while not self._stopping and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    # --- on one connection ----------------------------------------------------------------------------

    def _consume(self, connection: Connection, idle_timeout: float | None) -> None:
        channel = self._channel = connection.channel()
        try:
            consumers = self._open_consumers(connection, channel)
            with contextlib.suppress(_Stopped):
                self._loop(connection, idle_timeout)
            sock = getattr(connection.connection, "sock", None)
            if sock is not None:
                sock.settimeout(_GOODBYE_SECONDS)
            for consumer in consumers:
                consumer.cancel()
        finally:
            if connection.transport.driver_type == "memory":
                # kombu's memory transport forgets what is unacked when its channel closes.
                channel.basic_recover(requeue=True)
        channel.close()  # what is here and not settled goes back to the broker

    def _open_consumers(self, connection: Connection, channel: Any) -> list[Consumer]:
        amqp = connection.transport.driver_type == "amqp"
        if amqp:
            # In the middle of a frame py-amqp spins on a socket that does not block; to wait where nothing has come
            # at all would cost a millisecond for each window.
            self._at_once = 0.001
            sock = getattr(connection.connection, "sock", None)  # librabbitmq shows none
            self._has_more = _always if sock is None else functools.partial(_has_arrived, sock)
        # AMQP counts the prefetch for each consumer, quorum queues allow nothing else; kombu's own for the channel.
        channel.basic_qos(0, max(1, self._prefetch // len(self._handlers)) if amqp else self._prefetch, False)
        consumers = []
        for queue, handler in self._handlers.items():
            consumer = Consumer(channel, [queue], accept=self._accept, no_ack=False)
            name = consumer.queues[0].name  # the broker may have named it only now
            consumer.on_message = functools.partial(self._on_message, handler, name)
            consumer.on_decode_error = functools.partial(self._on_decode_error, handler, name)
            consumers.append(consumer)
        for consumer in consumers:
            consumer.consume()
        return consumers

    def _loop(self, connection: Connection, idle_timeout: float | None) -> None:
        quiet_since = last_beat = time.monotonic()
        beat = float(connection.get_heartbeat_interval() or 0)
        while not self._stopping:
            now = time.monotonic()
            wait = 1.0
            if beat:
                wait = min(wait, beat / 4)
                if now - last_beat >= beat / 2:
                    connection.heartbeat_check(rate=2)
                    last_beat = now
            if self._parked:
                wait = min(wait, self._parked[0][0] - now)
            if idle_timeout is not None:
                wait = min(wait, quiet_since + idle_timeout - now)
            self._gather(connection, wait)
            now = time.monotonic()
            self._wake_parked(now)
            if self._arrived:
                self._handle_arrived()
                quiet_since = time.monotonic()
            elif idle_timeout is not None and now - quiet_since >= idle_timeout and not self._parked:
                return

    def _gather(self, connection: Connection, wait: float) -> None:
        """Wait for a message, then take what else has already arrived, up to the window."""
        window = self._window()
        try:
            connection.drain_events(timeout=max(wait, 0.001))
            while len(self._arrived) < window and self._has_more():
                connection.drain_events(timeout=self._at_once)
        except (socket.timeout, TimeoutError):  # noqa: UP041 - not the same class in Python 3.10's ssl module
            pass

    def _window(self) -> int:
        return max(1, min(self._prefetch, int(_WINDOW_SECONDS / max(self._seconds_each, 1e-6))))

    def _on_message(self, handler: IdempotentHandler, queue: str, message: Message) -> None:
        self._arrived.append((handler, queue, message))

    def _on_decode_error(self, handler: IdempotentHandler, queue: str, message: Message, error: Exception) -> None:
        # Not from here: what fails now would fail in the middle of taking messages off the connection.
        self._arrived.append((handler, queue, message))

    # --- handling -------------------------------------------------------------------------------------

    def _handle_arrived(self) -> None:
        arrived, self._arrived = self._arrived, []
        by_handler: dict[IdempotentHandler, list[_Arrived]] = {}
        for entry in arrived:
            by_handler.setdefault(entry[0], []).append(entry)
        window = self._window()
        for handler, entries in by_handler.items():
            for begin in range(0, len(entries), window):
                self._handle_window(handler, entries[begin : begin + window])

    def _handle_window(self, handler: IdempotentHandler, entries: Sequence[_Arrived]) -> None:
        started = time.monotonic()
        works = [work for entry in entries if (work := self._work(entry)) is not None]
        if not works:
            return
        endings = handler.executor.handle_window(_UntilStopped(works, self._check_stopped))
        each = (time.monotonic() - started) / len(works)
        self._seconds_each = 0.7 * self._seconds_each + 0.3 * each if each > self._seconds_each / 8 else each
        self.endings.update(ending.how for ending in endings)
        if any(ending.how is Ended.IN_DOUBT for ending in endings):
            self._rest(handler.executor.policy.busy_delay)  # the store is down: do not spin on it

    def _work(self, entry: _Arrived) -> Work | None:
        self._check_stopped()
        handler, queue, message = entry
        settle = handler.settlement(message, queue, functools.partial(self._park, entry))
        try:
            if message.errors:
                message._reraise_error()
            body = message.decode()
        except Exception as error:  # noqa: BLE001 - a body that cannot be decoded must neither be lost nor end the consumer
            handler.refuse_undecodable(error, settle)
            work = None
        else:
            work = handler.work(body, message, settle)
        if work is None:
            self.endings[Ended.DEAD] += 1
        return work

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
