"""The ground of our Redis channel: its options, its keys, and connections that are made once and kept."""

from __future__ import annotations

import os
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kombu.transport import redis as kombu_redis
from redis import exceptions

from .keeper import Keeper
from .keys import QueueKeys, queue_keys
from .wire import Command, Wire

if TYPE_CHECKING:
    from collections.abc import Iterator


class BaseChannel(kombu_redis.Channel):
    """kombu's channel with options of ours (see `redis`), one client object, and wires."""

    dedup_window: float = 3600
    visibility_timeout: float = 60
    max_deliveries: int = 20
    keep_rejected: bool = True
    fetch_limit: int = 100
    ack_limit: int = 50
    ack_delay: float = 0.1

    from_transport_options = (
        *kombu_redis.Channel.from_transport_options,
        "dedup_window",
        "max_deliveries",
        "keep_rejected",
        "fetch_limit",
        "ack_limit",
        "ack_delay",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._begin()
        super().__init__(*args, **kwargs)

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._wires: deque[Wire] = deque()
        self._plain_client: Any = None
        self._keys: dict[str, QueueKeys] = {}
        #: Who holds this channel's messages, for the server. Never used again by another channel or process.
        self.owner = uuid.uuid4().hex
        #: Queues that messages were taken from.
        self.joined: set[str] = set()
        #: queue -> what takes its messages; a channel's own, where kombu has one table per connection.
        self.callbacks: dict[str, Callable[[dict[str, Any]], Any]] = {}
        #: Fanout messages that were requeued.
        self.again: deque[tuple[dict[str, Any], str]] = deque()
        self._left = False
        self.keeper = Keeper(self)

    # --- values in the form that scripts want --------------------------------------------------------

    @property
    def lease(self) -> float:
        """The visibility timeout, in seconds: how long a silent consumer keeps its messages."""
        return float(self.visibility_timeout)

    @property
    def lease_ms(self) -> int:
        return max(1, int(self.visibility_timeout * 1000))

    @property
    def window_ms(self) -> int:
        return max(1, int(self.dedup_window * 1000))

    @property
    def renew_every(self) -> float:
        every = self.lease / 3
        if self._expires:  # a queue that expires must not do so while somebody works on its messages
            every = min(every, min(self._expires.values()) / 3000)
        return max(every, 0.05)

    def expiry_of(self, queue: str) -> int:
        """The queue's `x-expires` in ms, 0 if it has none."""
        return int(self._expires.get(queue, 0)) if self._expires else 0

    def keys_of(self, queue: str) -> QueueKeys:
        keys = self._keys.get(queue)
        if keys is None:
            lists = {str(self.priority(step)): self._q_for_pri(queue, step) for step in self.priority_steps}
            keys = self._keys[queue] = queue_keys(queue, prefix=self.global_keyprefix, lists=lists)
        return keys

    @property
    def holds(self) -> bool:
        return bool(self.qos.places)

    def holding(self) -> list[str]:
        """The queues that unsettled messages came from. Any thread."""
        return sorted({queue for queue, _ in list(self.qos.places.values())})

    def queues_seen(self) -> list[str]:
        return sorted(self.joined.union(self.active_queues))

    # --- connections --------------------------------------------------------------------------------

    def call(self, commands: Sequence[Command], timeout: float | None = None) -> list[Any]:
        """Send commands together on a connection of their own. Any thread. See `Wire.call`."""
        wire = self._borrow()
        try:
            return wire.call(commands, timeout)
        finally:
            self._put_away(wire)

    def _borrow(self) -> Wire:
        if self._pid != os.getpid():
            self._after_fork()  # a bare os.fork(), of which kombu is not told
        try:
            return self._wires.pop()
        except IndexError:
            return Wire(self.pool)

    def _put_away(self, wire: Wire) -> None:
        if self.closed:
            wire.close()
        else:
            self._wires.append(wire)

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        """kombu makes a new client object at every use; one is enough, and it may be shared by threads."""
        if client is None:
            client = self._plain_client
            if client is None:
                client = self._plain_client = self._create_client()
        yield client

    def _create_client(self, asynchronous: bool = False) -> Any:
        # kombu's second pool is for the connection that waits in BRPOP; there is none here.
        return super()._create_client(asynchronous=False)

    @property
    def subclient(self) -> Any:
        """The connection for fanout: from kombu's second pool, whose connections tell the poller when they end."""
        found = self.__dict__.get("subclient")
        if found is None:
            found = self.__dict__["subclient"] = super()._create_client(asynchronous=True).pubsub()
        return found

    def _disconnect_pools(self) -> None:
        wires, self._wires = self._wires, deque()
        for wire in wires:
            wire.close()
        self._plain_client = None
        super()._disconnect_pools()

    def _after_fork(self) -> None:
        """In the child: what the parent holds is the parent's. The child may publish; to consume it must reconnect."""
        self._begin()
        super()._after_fork()

    def forget_socket(self) -> None:
        if self.connection is not None:
            self.connection.cycle.forget(self)

    def wake(self) -> None:
        """Any thread: have the consuming thread look again."""
        connection = self.connection
        if connection is not None:
            connection.cycle.ring()

    # --- declaring while the server is full -----------------------------------------------------------------

    def _size(self, queue: str) -> int:
        """Ready messages. Not in a transaction, which a full server refuses: a consumer must be able to start."""
        sizes = self.call([("LLEN", name) for name in self.keys_of(queue).lists])
        return sum(size for size in sizes if isinstance(size, int))

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str | None, queue: str) -> None:
        try:
            super()._queue_bind(exchange, routing_key, pattern, queue)
        except exceptions.OutOfMemoryError:
            # What is bound already need not be added again, and then a full server can be drained.
            member = self.sep.join([routing_key or "", pattern or "", queue or ""])
            tables = [self.keyprefix_queue % (exchange,)]
            if queue not in self._expires:
                tables.append(self.keyprefix_binding_permanent % (exchange,))
            bound = self.call([("SISMEMBER", self.global_keyprefix + table, member) for table in tables])
            if bound != [1] * len(tables):
                raise
