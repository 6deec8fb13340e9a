"""One connection of a consumer, from its channel to its goodbye: messages come, are handled, and are answered here.

Without threads a window of messages is handled in this thread. With threads each message is claimed, run and completed
in a thread of a pool, and this one only talks to the broker: acks, waits and dead letters come home to it (`home.py`),
and heartbeats go on while handlers run. Nothing of a session outlives its connection: what it had not settled is the
broker's again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final, cast

from kombu import Connection, Consumer, Queue
from kombu.message import Message

from . import delays, standstill
from .acks import BulkAcks
from .arrivals import ANSWER_SECONDS, Arrivals
from .bell import Bell
from .handler import IdempotentHandler, WorkExecutor
from .home import HandedOver, HomeThread
from .inflating import limit_inflation
from .pace import Pace
from .parking import Parked
from .pool import Pool
from .standstill import Standstill
from .stopping import Stopped, Stopping, UntilStopped
from .work import Ended, Work

__all__ = ["Session"]

log = logging.getLogger(__name__)

#: How long it waits for a message at most. Where the transport polls, nothing ends that wait, not even `stop`.
_LONGEST_WAIT: Final = 1.0
#: How long the broker may take to answer while the consuming begins: it may have quorum queues to make.
_GREETING_SECONDS: Final = 60.0
#: And how long it may take to answer a goodbye, also where it has fallen silent.
_GOODBYE_SECONDS: Final = 5.0
#: How much the prefetch may grow, where nothing but holding them makes messages wait, so that they block nobody.
_MOST_PARKED: Final = 10

_how = attrgetter("how")
_Arrived = tuple[IdempotentHandler, str, Message]


class Session:
    """The consuming of some queues over one open connection. `run` belongs to one thread; the rest may be looked at.

    pool: where handlers run in threads; None: in the thread that calls `run`. endings: counts what became of the
    deliveries. on_channel: called with the channel before anything is consumed. looped: called whenever this thread
    looks at the broker. The others as for `IdempotentConsumer`.
    """

    def __init__(
        self,
        connection: Connection,
        handlers: Mapping[Queue, IdempotentHandler],
        *,
        prefetch: int,
        accept: Sequence[str] | None,
        pool: Pool | None,
        endings: Counter[Ended],
        stopping: Stopping,
        on_channel: Callable[[Any], None],
        looped: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._handlers = handlers
        self._prefetch = prefetch
        self._accept = accept
        self._pool = pool
        self._endings = endings
        self._stopping = stopping
        self._on_channel = on_channel
        self._looped = looped
        #: None before it was opened.
        self.channel: Any = None
        #: True while messages are consumed.
        self.is_running = False
        #: Messages that have begun and are not settled.
        self.on_hand: set[HandedOver] = set()
        #: When the window began that is handled in this thread, monotonic seconds.
        self.handling_since: float | None = None
        #: Since when the store gives no clear answer, seconds since the epoch.
        self.store_down_since: float | None = None
        self.parked: Parked[_Arrived] = Parked()
        self._arrived: list[_Arrived] = []
        self._window: UntilStopped | None = None
        self._is_narrow = False
        self._pace = Pace(prefetch)
        self._acks: BulkAcks | None = None
        self._is_amqp = connection.transport.driver_type == "amqp"
        # Of the executors that run in threads: until when nothing is asked of a store that is down.
        self._doubtful: dict[WorkExecutor, float] = {}
        self._sock = getattr(connection.connection, "sock", None) if self._is_amqp else None
        self._bell = Bell(self._sock)
        self._home = HomeThread(self._bell.ring)
        self._beat = self._last_beat = 0.0

    def wake(self) -> None:
        """End this thread's wait for a message. For any thread and any signal handler."""
        self._bell.ring()

    # --- opening and closing --------------------------------------------------------------------------

    def run(self, idle_timeout: float | None) -> None:
        """Consume until the consumer is told to stop, or until it was idle for so many seconds.

        Raises the connection's errors, and ConfigurationError.
        """
        try:
            self._consume(idle_timeout)
        finally:
            self._home.close()
            self._acks = None  # what it held goes with the channel
            self._bell.close()
            self._limit_answers(_GOODBYE_SECONDS)
        self.channel.close()  # what is here and not settled goes back to the broker

    def _consume(self, idle_timeout: float | None) -> None:
        self._limit_answers(_GREETING_SECONDS)
        channel = self.channel = self._connection.channel()
        self._on_channel(channel)
        try:
            consumers = self._open_consumers()
            self._limit_answers(None)
            self.is_running = True
            with contextlib.suppress(Stopped), self._watching():
                self._loop(Arrivals(self._connection, self._bell, channel, consumers), idle_timeout)
            self._limit_answers(_GOODBYE_SECONDS)
            for consumer in consumers:
                consumer.cancel()
            self._finish()
        finally:
            if self._connection.transport.driver_type == "memory":
                # kombu's memory transport forgets what is unacked when its channel closes.
                channel.basic_recover(requeue=True)

    def _limit_answers(self, seconds: float | None) -> None:
        """From now on what waits for RabbitMQ's answer waits for so long at most: py-amqp would wait for ever."""
        if self._sock is not None:
            with contextlib.suppress(OSError):  # closed already
                self._sock.settimeout(seconds)

    def _open_consumers(self) -> list[Consumer]:
        channel = self.channel
        if self._is_amqp:
            self._acks = BulkAcks(channel)
        # AMQP counts the prefetch for each consumer, quorum queues allow nothing else; kombu's own for the channel.
        each = max(1, self._prefetch // len(self._handlers)) if self._is_amqp else self._prefetch
        channel.basic_qos(0, each, False)
        if "ack_limit" not in vars(channel) and hasattr(channel, "ack_limit"):  # of our Redis transport, if not told
            # So that a window's acks go with the next fetch. A copy whose ack was lost is answered by its record.
            channel.ack_limit = max(channel.ack_limit, self._prefetch + 1)
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
            delays.declare(self._connection, handler.executor.policy.longest_wait, [name])
        for consumer in consumers:
            consumer.consume()
        return consumers

    def _finish(self) -> None:
        """No more messages come: send what has come home, and let the handlers in threads end."""
        pool, stopping = self._pool, self._stopping
        if pool is not None:
            pool.clear()
            while pool.running and stopping.seconds_left > 0:
                self._send_heartbeat(time.monotonic())
                if self._bell.wait(min(stopping.seconds_left, max(self._beat / 4, ANSWER_SECONDS))):
                    with contextlib.suppress(socket.timeout, TimeoutError):
                        self._connection.drain_events(timeout=0.001)
                self._answer()
        self._answer()

    # --- the loop -------------------------------------------------------------------------------------

    def _loop(self, arrivals: Arrivals, idle_timeout: float | None) -> None:
        pool = self._pool
        quiet_since = self._last_beat = time.monotonic()
        self._beat = float(self._connection.get_heartbeat_interval() or 0)
        self._looped()
        while not self._stopping.requested:
            now = time.monotonic()
            wait = min(_LONGEST_WAIT, self.parked.wait(now))
            if self._beat:
                wait = min(wait, self._beat / 4)
                self._send_heartbeat(now)
            if idle_timeout is not None:
                wait = min(wait, quiet_since + idle_timeout - now)
            window = self._pace.window if pool is None else self._prefetch
            arrivals.gather(self._arrived, window, wait, on_hand=self.on_hand, prefetch=self._prefetch)
            self._answer()
            now = time.monotonic()
            self._wake_parked(now)
            if pool is not None:
                self._relieve(pool)
            if self._arrived:
                self._handle_arrived()
                quiet_since = time.monotonic()
            elif self.on_hand or (pool is not None and pool.running):
                quiet_since = now
            elif idle_timeout is not None and now - quiet_since >= idle_timeout and not self.parked:
                return

    def _answer(self) -> None:
        """Do what has come home, and send the acks."""
        self._looped()
        self._home.run_pending()
        self._flush_acks()

    def _flush_acks(self) -> None:
        if self._acks is not None:
            self._acks.flush()

    def _send_heartbeat(self, now: float) -> None:
        if self._beat and now - self._last_beat >= self._beat / 2:
            self._connection.heartbeat_check(rate=2)
            self._last_beat = now

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
            for entry in arrived:
                work = self.work(entry)
                if work is not None:
                    self._pool.submit(functools.partial(self._run_in_thread, entry[0], work))
            return
        by_handler: dict[IdempotentHandler, list[_Arrived]] = {}
        for entry in arrived:
            by_handler.setdefault(entry[0], []).append(entry)
        window = self._pace.window
        for handler, entries in by_handler.items():
            for begin in range(0, len(entries), window):
                self._handle_window(handler, entries[begin : begin + window])

    def _handle_window(self, handler: IdempotentHandler, entries: Sequence[_Arrived]) -> None:
        self._window = None
        started = self.handling_since = time.monotonic()
        works = [work for entry in entries if (work := self.work(entry)) is not None]
        if not works:
            self.handling_since = None
            self._flush_acks()
            return
        window = self._window = UntilStopped(works, self._stopping)
        try:
            endings = handler.executor.handle_window(window)
        except Stopped:
            self._flush_acks()
            raise
        self._flush_acks()
        self._pace.note(time.monotonic() - started, len(works))
        self.handling_since = None
        for how, alike in itertools.groupby(endings, key=_how):
            self._count(how, sum(1 for _ in alike))
        if any(ending.how is Ended.IN_DOUBT for ending in endings):
            # The store is down: do not spin on it.
            self._stopping.rest(handler.executor.policy.busy_delay, self._answer)

    def work(self, entry: _Arrived) -> Work | None:
        """A message that has arrived, as work; None if it was refused or put off. Raises Stopped."""
        self._stopping.check()
        handler, queue, message = entry
        ack = None if self._acks is None else self._acks.ack
        settle = handler.settlement(message, queue, functools.partial(self._park, entry), ack)
        if settle.renew():
            return None
        work = handler.receive(message, settle)
        if work is None:
            self._endings[Ended.DEAD] += 1
            return None
        work.settle = handed = HandedOver(settle, self._home, on_settled=self.on_hand.discard, tag=message.delivery_tag)
        self.on_hand.add(handed)
        return work

    def _count(self, how: Ended, times: int = 1) -> None:
        self._endings[how] += times
        if how is Ended.IN_DOUBT:
            if self.store_down_since is None:
                self.store_down_since = time.time()
        elif how is not Ended.DEAD and how is not Ended.HELD:  # for those it may not have been asked
            self.store_down_since = None

    # --- what cannot begin, because handlers do not return: see `standstill.py` ----------------------

    def _watching(self) -> contextlib.AbstractContextManager[None]:
        if self._pool is None and hasattr(self.channel, "give_up"):
            return Standstill(self._doing, self._give_up_the_rest)
        return contextlib.nullcontext()

    def _doing(self) -> object:
        since, window = self.handling_since, self._window
        return since if since is None or window is None else window.current or window

    def _give_up_the_rest(self) -> None:
        window = self._window
        current = None if window is None else window.current
        self.channel.give_up(() if current is None else (_tag_of(current),))

    def _relieve(self, pool: Pool) -> None:
        """While all threads have been busy for long, nothing waits here for them."""
        if self._is_narrow:
            if pool.running < pool.size:
                self._is_narrow = False
                self.channel.basic_qos(0, self._prefetch, False)
        elif pool.waiting and pool.newest >= standstill.PATIENCE and hasattr(self.channel, "give_up"):
            for task in pool.clear():
                self.on_hand.discard(cast("functools.partial[None]", task).args[1].settle)
            self._is_narrow = True
            self.channel.basic_qos(0, max(1, len(self.on_hand)), False)
            self.channel.give_up([handed.tag for handed in self.on_hand])

    # --- in a thread of the pool ----------------------------------------------------------------------

    def _run_in_thread(self, handler: IdempotentHandler, work: Work) -> None:
        executor, home = handler.executor, self._home
        try:
            while (left := self._doubtful.get(executor, 0.0) - time.monotonic()) > 0 and not self._is_over():
                time.sleep(min(left, 0.1))  # the store is down: do not spin on it
            if self._is_over():
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

    def _is_over(self) -> bool:
        return self._stopping.requested or self._home.is_closed

    # --- what waits here, where the broker has no delays ----------------------------------------------

    def _park(self, entry: _Arrived, delay: float) -> None:
        self.parked.add(entry, delay)
        self._make_room()

    def _wake_parked(self, now: float) -> None:
        due = self.parked.take_due(now)
        if due:
            self._arrived += due
            self._make_room()

    def _make_room(self) -> None:
        """Let as many more messages come as are parked, so that these do not keep their neighbours from coming."""
        if not self._is_amqp:  # there the delay queue holds them
            room = min(len(self.parked), _MOST_PARKED * self._prefetch)
            self.channel.basic_qos(0, self._prefetch + room, False)


def _tag_of(work: Work) -> Any:
    return work.settle.tag if isinstance(work.settle, HandedOver) else None


def _raise(error: BaseException) -> None:
    raise error
