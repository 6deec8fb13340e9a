"""`idempotent-sqla+sqlite:///bus.db`, `idempotent-sqla+postgresql+psycopg://...`, `idempotent-sqla+mysql+pymysql://...`

A subclass of kombu's SQLAlchemy transport that keeps the promises of this package's docstring and shares kombu's
tables with plain `sqla+...` producers and consumers. Transport options, besides kombu's `queue_tablename`,
`message_tablename` and the engine's own:

* `visibility_timeout` (60 s): how long a dead consumer's messages stay invisible. A live one renews in the background.
* `edge_window` (7 days): how long, at least, a second copy of a publish is refused.
* `max_deliveries` (20, as RabbitMQ's quorum queues): a message that was delivered this often without being settled
  goes to the dead table, where it is kept; None for no bound. `basic_delay` does not count.
* `polling_interval`: 0.05 s on SQLite, where a look that finds nothing new is one PRAGMA, 0.1 s on servers.
* `fetch_size` (100): how many messages one transaction takes at most, if prefetch allows and they are handled fast.
* `table_prefix`: the beginning of our own tables' names.
* `answer_timeout` (60 s; not on SQLite): how long a server's answer is waited for. One that falls silent is a lost
  connection then. Raise it where the first start must make an index of millions of kombu's old rows.

In the URL of SQLite, `?synchronous=NORMAL` lets a power cut (not a crash) undo the last publishes.

`reject(requeue=False)` deletes, as in AMQP; `x-dead-letter-*` arguments are not looked at. Bindings live in the
process, as with kombu's transport: a publisher declares the queues that it publishes to.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection
from multiprocessing.util import Finalize
from queue import Empty
from typing import Any, Final

import sqlalchemy as sa
from kombu.exceptions import ChannelError
from kombu.transport import sqlalchemy as kombu_sqla
from kombu.transport import virtual
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from ...errors import Unroutable
from ...headers import INNER_MSG_ID
from ...model import Landing
from . import payload as sql_payload
from .database import ERRORS, Database, open_database
from .edge import WINDOW, Edge
from .fetch import Delivery, Fetcher, LeaseGone
from .lease import Lease, keeper_of, renew
from .leave import DeadLetter, dead_letters, restore
from .restore import Restorer

__all__ = ["Channel", "DeadLetter", "QoS", "Transport", "dead_letters", "restore"]

logger = logging.getLogger(__name__)

VISIBILITY_TIMEOUT: Final = 60.0
MAX_DELIVERIES: Final = 20
FETCH_SIZE: Final = 100


class QoS(virtual.QoS):
    """What was delivered and not settled. Settling goes to the database first, then to this list."""

    def __init__(self, channel: Channel, prefetch_count: int = 0) -> None:
        super().__init__(channel, prefetch_count)
        # kombu's finalizer would keep the channel, and with it the lease, alive for as long as the process runs.
        self._on_collect.cancel()

    def ack(self, delivery_tag: str) -> None:
        self.channel._settled(self.channel._fetcher.ack(delivery_tag), "ack")
        super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if requeue:
            self.channel._settled(self.channel._restorer.give_back([delivery_tag], keep_place=False) > 0, "requeue")
        else:
            self.channel._settled(self.channel._fetcher.ack(delivery_tag), "reject")
        self._quick_ack(delivery_tag)

    def delay(self, delivery_tag: str, seconds: float) -> bool:
        """Settle a delivery by letting it come back in so many seconds. False: the lease had lapsed, it is back."""
        done = self.channel._fetcher.delay(delivery_tag, seconds)
        self.channel._settled(done, "delay")
        self._quick_ack(delivery_tag)
        return bool(done)

    def unsettled(self) -> list[str]:
        """The tags of what was delivered and is neither acked nor given back."""
        self._flush()
        return list(self._delivered)

    def forget(self) -> None:
        """Drop the list: what was on it belongs to others now, or has been given back."""
        self._dirty.clear()
        self._delivered.clear()

    def restore_unacked(self) -> list[Any]:
        self.channel._restorer.give_back(self.unsettled(), keep_place=True)
        self.forget()
        return []

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Nothing: the channel gives everything back when it closes, and a dead process's lease lapses."""


class Channel(kombu_sqla.Channel):
    """A channel of ours. Publishing, consuming and closing belong to one thread; acks may come from others."""

    idempotent_edge = True
    QoS = QoS

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        virtual.Channel.__init__(self, connection, **kwargs)
        options = connection.client.transport_options or {}
        self._database: Database = open_database(connection.client.hostname, options)
        self._visibility_timeout = float(options.get("visibility_timeout", VISIBILITY_TIMEOUT))
        self._fetch_size = max(1, int(options.get("fetch_size", FETCH_SIZE)))
        self._edge = Edge(self._database, float(options.get("edge_window", WINDOW)))
        self._restorer = Restorer(self._database, options.get("max_deliveries", MAX_DELIVERIES))
        self._fetcher = Fetcher(self._database, self._restorer)
        self._pid = os.getpid()
        self._lease: Lease | None = None
        self._in_doubt = False
        self._cuts = self._database.cuts
        self._buffers: dict[str, deque[Delivery]] = {}
        self._given_up: set[str] = set()
        self._no_ack: set[str] = set()
        self._empty_at: dict[str, object] = {}
        self._batch, self._taken_at = 1, 0.0
        self._at_exit = Finalize(self, _close, (weakref.ref(self),), exitpriority=1)

    # --- publishing -------------------------------------------------------------------------------

    def basic_publish(
        self, message: dict[str, Any], exchange: str, routing_key: str, mandatory: bool = False, **kwargs: Any
    ) -> Landing | None:
        """Land one message in every queue that it is routed to, in one commit. None: no route, and not mandatory."""
        inner_msg_id = (message.get("headers") or {}).get(INNER_MSG_ID)
        queues = self._routes(exchange or "", routing_key or "", mandatory)
        if not queues:
            if mandatory:
                raise Unroutable(
                    "no queue is bound for this exchange and routing key: declare one first", _text(inner_msg_id)
                )
            return None
        self._inplace_augment_message(message, exchange, routing_key)
        sql_payload.forget_deliveries(message)
        return self._edge.land(message, queues, _text(inner_msg_id) or None)

    def _routes(self, exchange: str, routing_key: str, mandatory: bool) -> set[str]:
        if not exchange:
            return {routing_key} if routing_key and (not mandatory or self._has_queue(routing_key)) else set()
        try:
            found = self.typeof(exchange).lookup(self.get_table(exchange), exchange, routing_key, None)
        except KeyError:
            found = ()
        queues = {queue for queue in found if queue}
        return queues or ({self.deadletter_queue} if self.deadletter_queue and not mandatory else set())

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        """kombu's own way in, without the edge."""
        self._edge.land(message, [queue], None)

    # --- consuming --------------------------------------------------------------------------------

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> None:
        (self._no_ack.add if no_ack else self._no_ack.discard)(queue)
        super().basic_consume(queue, no_ack, *args, **kwargs)

    def basic_cancel(self, consumer_tag: str) -> None:
        queue = self._tag_to_queue.get(consumer_tag)
        super().basic_cancel(consumer_tag)
        if queue in self._buffers and queue not in self._active_queues:
            self._return_buffers()

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """One message, or None."""
        try:
            raw = self._take_one(queue, no_ack)
        except Empty:
            return None
        message = self.Message(raw, channel=self)
        if not no_ack:
            self.qos.append(message, message.delivery_tag)
        return message

    def basic_delay(self, delivery_tag: str, delay: float) -> bool:
        """Settle the delivery; the message comes back to its queue no sooner than `delay` seconds from now.

        False: the message had gone back to its queue before (its lease lapsed), and stays there.
        """
        return bool(self.qos.delay(delivery_tag, delay))

    def give_up(self, keep: Collection[str]) -> None:
        """Give all that is held back, but for these tags, as if it had never been. Any thread.

        For a consumer that stands still. What it has in hand is not its own any more, and must be safe to run twice.
        """
        buffered = {tag for buffer in list(self._buffers.values()) for tag, _ in list(buffer)}
        delivered = [tag for tag in self.qos.unsettled() if tag not in keep]
        self._restorer.give_back([*buffered, *delivered], keep_place=True, counted=False)
        self._given_up = buffered
        for tag in delivered:
            self.qos._quick_ack(tag)

    def put_back(self) -> None:
        """Give all that was handed out and not settled back, as if it had never been: in its place, not counted."""
        self._restorer.give_back(self.qos.unsettled(), keep_place=True, counted=False)
        self.qos.forget()

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        return self._take_one(queue, queue in self._no_ack, ahead=True)

    def _take_one(self, queue: str, no_ack: bool, ahead: bool = False) -> dict[str, Any]:
        self._check_process()
        self._check_lease()
        buffer = self._buffers.get(queue)
        while buffer:
            tag, message = buffer.popleft()
            if tag not in self._given_up:
                return message
        self._restorer.now_and_then()
        if self._cuts != self._database.cuts:
            # A message whose ack the server forgot would stay this owner's, unknown here, for as long as it lives.
            self._cuts, self._in_doubt = self._database.cuts, True
        token = self._database.change_token()
        if token is not None and not self._in_doubt:
            # SQLite: nothing was committed since this queue was empty, or nothing for it.
            if self._empty_at.get(queue) == token:
                raise Empty
            if queue in self._empty_at and not self._fetcher.any_ready(queue):
                self._empty_at[queue] = token
                raise Empty
        taken = self._fetcher.take_unheld(queue) if no_ack else self._take(queue, self._most() if ahead else 1)
        if not taken:
            self._empty_at[queue] = token
            raise Empty
        self._empty_at.pop(queue, None)
        first, *rest = taken
        self._buffers[queue] = deque(rest)
        return first[1]

    def _take(self, queue: str, most: int) -> list[Delivery]:
        if self._in_doubt:
            self._settle_doubt()
        for _ in range(2):
            if self._lease is None:
                self._lease = Lease(self._visibility_timeout)
            try:
                taken = self._fetcher.take(queue, most, self._lease)
            except LeaseGone:
                self._lose()
                continue
            except BaseException:
                # It may have been committed: then this owner holds messages whose tags nobody knows.
                self._in_doubt = True
                raise
            if taken:
                keeper_of(self._database).add(self._lease)
                self._taken_at = time.monotonic()
            return taken
        return []

    def _most(self) -> int:
        """As many as prefetch allows; more at a time while they are handled fast, one while they are slow."""
        took = time.monotonic() - self._taken_at
        if took < 0.25:
            self._batch = min(self._batch * 2, self._fetch_size)
        elif took > 1.0:
            self._batch = max(1, self._batch // 2)
        allowed = self.qos.can_consume_max_estimate()
        if allowed is None:
            return self._batch
        return max(1, min(self._batch, allowed - sum(map(len, self._buffers.values()))))

    # --- ownership --------------------------------------------------------------------------------

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            # A forked child: what the parent holds is the parent's.
            self._pid = os.getpid()
            self._lease, self._in_doubt = None, False
            self._buffers.clear()
            self._empty_at.clear()
            self.qos.forget()

    def _check_lease(self) -> None:
        lease = self._lease
        if lease is None or not (lease.lost or (lease.written and lease.doubtful)):
            return  # one that was never written holds nothing; writing it is the fetch's, in its own commit
        if lease.lost or not self._database.run(
            lambda connection: renew(connection, self._database, lease), again=True
        ):
            self._lose()

    def _lose(self) -> None:
        """This process was away for longer than the timeout: others have what it held, and it must not run that."""
        logger.warning("the lease lapsed: messages that this consumer held have gone back to their queues")
        self._lease = None
        self._buffers.clear()

    def _settle_doubt(self) -> None:
        if self._lease is not None:
            known = {tag for buffer in self._buffers.values() for tag, _ in buffer} | set(self.qos.unsettled())
            self._restorer.release(self._lease.owner, (), keep=known, end=not self._lease.written)
            if not self._lease.written:
                self._lease = None
        self._in_doubt = False

    def _return_buffers(self) -> None:
        """Give back what was taken ahead for queues that have no consumer any more; it was never delivered."""
        for queue in [queue for queue in self._buffers if queue not in self._active_queues]:
            del self._buffers[queue]
            self._in_doubt = True
        if self._in_doubt and self._lease is not None and self._pid == os.getpid():
            try:
                self._settle_doubt()
            except ERRORS:
                logger.warning("messages taken ahead could not be given back yet", exc_info=True)

    def _settled(self, done: bool, what: str) -> None:
        if not done:
            logger.warning("%s came too late: the message had gone back to its queue and stays there", what)

    def close(self) -> None:
        """Give everything back at once. If the database is down the lease lapses, which does the same later."""
        if not self.closed:
            self._at_exit.cancel()
            self._check_process()
            lease, self._lease = self._lease, None
            delivered = self.qos.unsettled()
            self._buffers.clear()
            self.qos.forget()
            if lease is not None:
                keeper_of(self._database).remove(lease)
                try:
                    self._restorer.release(lease.owner, delivered)
                except ERRORS:
                    logger.warning(
                        "held messages could not be given back; they come back when the lease lapses", exc_info=True
                    )
        super().close()

    # --- queues -----------------------------------------------------------------------------------

    def _new_queue(self, queue: str, **kwargs: Any) -> None:
        if not self._has_queue(queue):
            self._edge.declare(queue)

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:
        names = self._database.tables
        query = sa.select(names.queue.c.id).where(names.queue.c.name == queue)
        return self._database.read(lambda connection: connection.scalar(query)) is not None

    def _ready(self, queue: str) -> Any:
        names = self._database.tables
        queue_id = sa.select(names.queue.c.id).where(names.queue.c.name == queue).scalar_subquery()
        return sa.and_(names.message.c.queue_id == queue_id, names.message.c.visible == sa.true())

    def _size(self, queue: str) -> int:
        """Ready messages, as AMQP counts: not those that consumers hold, nor delayed ones."""
        query = sa.select(sa.func.count()).select_from(self._database.tables.message).where(self._ready(queue))
        return int(self._database.read(lambda connection: connection.scalar(query)) or 0)

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: Any) -> None:
        """Delete the queue. With `if_empty` not while anything of it is held or delayed either."""
        held = self._database.tables.held
        query = sa.select(sa.func.count()).select_from(held).where(held.c.queue == queue)
        if if_empty and self._database.read(lambda connection: connection.scalar(query)):
            return
        super().queue_delete(queue, if_unused=if_unused, if_empty=if_empty, **kwargs)

    def _purge(self, queue: str) -> int:
        """Delete what is ready or delayed and say how many; what consumers hold stays theirs, as in AMQP."""
        names = self._database.tables
        delayed = sa.and_(names.held.c.queue == queue, names.held.c.owner.is_(None))

        def work(connection: sa.Connection) -> int:
            ready = connection.execute(sa.delete(names.message).where(self._ready(queue))).rowcount
            return int(ready + connection.execute(sa.delete(names.held).where(delayed)).rowcount)

        return self._database.run(work, durable=True)


class Transport(kombu_sqla.Transport):
    """kombu's SQLAlchemy transport with our channel."""

    Channel = Channel
    polling_interval = 0.1

    # InternalError: PostgreSQL ended a session that stood still in a transaction. sqlite3's own: raised by a PRAGMA.
    connection_errors = (OperationalError, InterfaceError, InternalError, PoolTimeout, sqlite3.OperationalError)
    channel_errors = (ChannelError,)
    recoverable_connection_errors = connection_errors
    recoverable_channel_errors = channel_errors

    def __init__(self, client: Any, **kwargs: Any) -> None:
        if str(client.hostname).startswith("sqlite"):
            self.polling_interval = 0.05
        super().__init__(client, **kwargs)


def _close(reference: Callable[[], Channel | None]) -> None:
    """At the end of a program that closed nothing: what it held need not wait for its lease to lapse."""
    channel = reference()
    if channel is not None and not channel.closed:
        channel.close()


def _text(inner_msg_id: object) -> str:
    return "" if inner_msg_id is None else str(inner_msg_id)
