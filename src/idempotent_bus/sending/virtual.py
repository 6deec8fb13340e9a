"""The lanes over kombu's virtual transports (Redis, SQL, memory, files, ...): theirs, and ours with an edge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from kombu import Connection
from kombu.transport.virtual import Channel as VirtualChannel

from ..errors import ConfigurationError
from ..model import Edge, Landing
from .amqp import AmqpLane
from .lane import Lane, private_copy
from .outgoing import Outgoing
from .resend import Known, NotConfirmed

__all__ = ["EdgeLane", "VirtualLane", "make_lane"]

#: kombu's transports that return before the broker has answered and report no failure: a receipt would be a guess.
_REPORT_NOTHING: Final = {
    "kafka": "kombu's Kafka transport does not report failed deliveries (idempotent-kafka:// does)",
    "gcpubsub": "kombu's Pub/Sub transport does not wait for the publish's answer (idempotent-gcpubsub:// does)",
}

#: Virtual transports that store a broadcast for every queue that is bound, whether or not anybody reads it now.
_STORE_BROADCASTS: Final = ("memory", "filesystem")


def make_lane(connection: Any, *, timeout: float, clock: Callable[[], float]) -> Lane:
    """The lane for what the user gave: a connection, a pool, a URL. Raises ConfigurationError if none fits."""
    copy = private_copy(connection)
    source = connection if isinstance(connection, Connection) else None
    return _kind_of(copy)(copy, source, timeout=timeout, clock=clock)


def _kind_of(connection: Connection) -> type[Lane]:
    transport = connection.transport
    if transport.driver_type == "amqp":
        return AmqpLane
    channel = getattr(transport, "Channel", None)
    if getattr(channel, "idempotent_edge", False):
        return EdgeLane
    if transport.driver_type in _REPORT_NOTHING:
        raise ConfigurationError(f"{_REPORT_NOTHING[transport.driver_type]}, so no receipt could be truthful")
    if isinstance(channel, type) and issubclass(channel, VirtualChannel):
        return VirtualLane
    raise ConfigurationError(f"kombu's {transport.driver_type} transport is not supported: how it confirms is unknown")


class _KombuLane(Lane):
    def __init__(
        self, connection: Connection, source: Connection | None, *, timeout: float, clock: Callable[[], float]
    ) -> None:
        super().__init__(connection, source, timeout=timeout, clock=clock)
        if connection.transport.driver_type == "redis":
            # Without them a server that stopped answering holds the sender for ever.
            connection.transport_options.setdefault("socket_timeout", timeout)
            connection.transport_options.setdefault("socket_connect_timeout", timeout)
        limit_publish = getattr(connection.transport, "limit_publish", None)
        if limit_publish is not None:  # our transports over other drivers set what theirs understands
            limit_publish(connection.transport_options, timeout)


class VirtualLane(_KombuLane):
    """Over kombu's own virtual transports: what cannot be routed is an error here, where kombu drops it."""

    def _prepare_channel(self) -> None:
        self._share_bindings()
        channel = self._channel
        channel.deadletter_queue = None  # kombu would put all that has no route into this one queue
        look_up = channel._lookup

        def routed(exchange: str, routing_key: str, default: str | None = None) -> Any:
            queues = look_up(exchange, routing_key, default)
            if not queues:
                raise _unroutable(exchange, routing_key)
            return queues

        # Within the publish rather than before it: one look at the bindings, which may be a round trip, serves both.
        channel._lookup = routed

    def _deliver(self, outgoing: Outgoing) -> Landing:
        channel, exchange = self._channel, outgoing.exchange
        if exchange:
            if channel.typeof(exchange).type == "fanout":
                self._check_broadcast(exchange, outgoing.routing_key)
        elif not outgoing.routing_key:
            raise _unroutable("", "")
        channel.basic_publish(_message(channel, outgoing), exchange=exchange, routing_key=outgoing.routing_key)
        return Landing.LANDED

    def _check_broadcast(self, exchange: str, routing_key: str) -> None:
        driver = self._connection.transport.driver_type
        if driver not in _STORE_BROADCASTS:
            raise NotConfirmed(
                Known.UNROUTABLE,
                f"exchange {exchange!r} is a fanout, and over {driver} kombu stores no broadcast for a subscriber "
                "that is absent: bind the queues to a direct or topic exchange",
                final=True,
            )
        if not self._channel.get_table(exchange):
            raise _unroutable(exchange, routing_key)


class EdgeLane(_KombuLane):
    """Over a transport of ours: it refuses a second copy itself, or says that its broker does not."""

    edge = Edge.BROKER

    def _prepare_channel(self) -> None:
        self._share_bindings()

    def edge_of(self, outgoing: Outgoing) -> Edge:
        edge_of = getattr(self._channel, "edge_of", None)
        return self.edge if edge_of is None else edge_of(outgoing.exchange, outgoing.routing_key)

    def _deliver(self, outgoing: Outgoing) -> Landing:
        channel = self._channel
        landing: Landing = channel.basic_publish(
            _message(channel, outgoing), exchange=outgoing.exchange, routing_key=outgoing.routing_key, mandatory=True
        )
        return landing


def _message(channel: Any, outgoing: Outgoing) -> Any:
    # A new one for every send: publishing writes into it.
    return channel.prepare_message(
        outgoing.body,
        outgoing.priority,
        outgoing.content_type,
        outgoing.content_encoding,
        dict(outgoing.headers),
        dict(outgoing.properties),
    )


def _unroutable(exchange: str, routing_key: str) -> NotConfirmed:
    text = f"no queue is bound to exchange {exchange!r} with routing key {routing_key!r}, as far as this process knows"
    return NotConfirmed(Known.UNROUTABLE, text, final=True)
