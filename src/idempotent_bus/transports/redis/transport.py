"""kombu's Redis transport without its windows for loss and doubling.

Schemes: `idempotent-redis://`, `idempotent-rediss://` (TLS, certificates verified unless the connection's `ssl` says
otherwise) and `idempotent-sentinel://`. Ready messages lie in kombu's own lists in kombu's own form, so plain
producers and consumers share the queues. Exchanges, bindings, priorities, `x-expires`, `global_keyprefix`, fanout and
the connection options are kombu's. Options of ours, in `transport_options`:

* `dedup_window` (seconds, 3600): how long a list remembers an inner-msg-id; about 150 bytes each.
* `visibility_timeout` (seconds, 60): a message comes back this long after its consumer was last heard of. A live
  consumer keeps its messages for as long as it works on them, so this need not exceed the longest task.
* `max_deliveries` (20; 0 is no bound): deliveries that ended without a settlement (consumer died, or `requeue`)
  before a message goes to the dead list. A delay is not counted, nor a consumer that closes in an orderly way.
* `keep_rejected` (true): `reject` without requeue moves to the dead list; false deletes, as kombu does.
* `fetch_limit` (100): most messages in one fetch; never more than prefetch allows.
* `ack_limit` (50; if not given, a guarded consumer's prefetch where that is more), `ack_delay` (seconds, 0.1): how many
  acks are sent together, and how late at most.

What is not promised: a fanout message reaches who listens at that moment, as in kombu; requeued, it is handed to the
same consumer again. The server must not evict keys (`maxmemory-policy noeviction`), and what a failover of Redis
loses is lost here too. Redis Cluster does not work, as it does not with kombu's transport: one step touches the
lists of several priorities and queues. Redis 6.0 or later; on 7.0 and later a full server can still be drained.
"""

from __future__ import annotations

import os
import ssl
import threading
from typing import Any

from kombu.log import get_logger
from kombu.transport import redis as kombu_redis
from redis import exceptions

from .consume import ConsumingChannel
from .poll import Poller
from .wire import Command

__all__ = ["Channel", "SecureTransport", "SentinelChannel", "SentinelTransport", "Transport"]

logger = get_logger(__name__)


class Channel(ConsumingChannel):
    """A channel of ours. One thread consumes; publishing, acks, rejects and delays may come from any thread."""

    def leave(self) -> None:
        """Send the acks that wait and give back what is held. Never raises: what fails lapses with the lease."""
        if self._left or self._pid != os.getpid():
            return
        self._left = True
        self.keeper.close()
        hold = self.qos
        commands: list[Command] = []
        with hold.sending:
            _, commands = hold.take_acks()
            unread: dict[str, list[int]] = {}
            for queue, number, _ in self.line.buffer:
                unread.setdefault(queue, []).append(number)
            for queue in sorted(self.joined):
                if queue in unread:
                    commands.append(
                        self.giveback_command(queue, self.owner, "some", how=0, head=True, numbers=unread[queue])
                    )
                if self.do_restore and hold.restore_at_shutdown:
                    commands.append(self.giveback_command(queue, self.owner, "all", how=1, head=True))
            self.line.buffer.clear()
            hold.forget()
            try:
                self._settle_all(commands)
            except Exception as error:  # noqa: BLE001  # closing goes on; the lease sees to the rest
                logger.warning("could not give messages back; they come back when the lease lapses: %r", error)
            finally:
                self.line.close()

    def _settle_all(self, commands: list[Command]) -> None:
        if not commands:
            return
        limit = min(self.lease, 10.0)
        try:
            replies = self.call(commands, limit)
        except exceptions.ConnectionError:
            # The connection is often why we leave. Every one of these steps may be repeated; a new one may do it.
            replies = self.call(commands, limit)
        for reply in replies:
            self._settled(reply)

    def close(self) -> None:
        if not self.closed:
            self._closing = True
            self.leave()
        super().close()

    def _restore(self, message: Any, leftmost: bool = False) -> None:
        """kombu's way back through the exchange is not taken: a message goes back to the queue that it came from."""
        self.qos.reject(message.delivery_tag, requeue=True)

    def _delete(self, queue: str, *args: Any, **kwargs: Any) -> None:
        """Delete a queue with what waits for it; what is dead stays visible, what is held stays its holder's."""
        super()._delete(queue, *args, **kwargs)
        self.call([("DEL", self.keys_of(queue).delayed)])


class Transport(kombu_redis.Transport):
    """`idempotent-redis://`."""

    Channel = Channel
    supports_batch_publish = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        self.cycle.join_loop(loop)
        super().register_with_event_loop(connection, loop)


class SecureTransport(Transport):
    """`idempotent-rediss://`: TLS, and the server's certificate is verified unless `ssl` says otherwise."""

    def __init__(self, client: Any, **kwargs: Any) -> None:
        if not client.ssl:
            client.ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
        super().__init__(client, **kwargs)


_alt_lock = threading.Lock()


class SentinelChannel(Channel, kombu_redis.SentinelChannel):
    """A channel that asks Sentinel for the master. Options as in kombu (`master_name` and the others)."""

    from_transport_options = tuple(
        dict.fromkeys((*Channel.from_transport_options, *kombu_redis.SentinelChannel.from_transport_options))
    )

    def _sentinel_managed_pool(self, asynchronous: bool = False) -> Any:
        # kombu takes only URLs whose scheme is exactly "sentinel" as further sentinels.
        client = self.connection.client
        with _alt_lock:
            alt = client.alt
            client.alt = [url.removeprefix("idempotent-") for url in alt]
            try:
                return super()._sentinel_managed_pool(asynchronous)
            finally:
                client.alt = alt


class SentinelTransport(Transport):
    """`idempotent-sentinel://`."""

    default_port = kombu_redis.SentinelTransport.default_port
    Channel = SentinelChannel
