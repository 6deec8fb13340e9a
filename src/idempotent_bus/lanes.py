"""A lane: the producer's private connection, on which it sends one message at a time and learns what came of it.

Private, so that waiting for a confirm never runs the user's consumers, and so that it can be thrown away: after any
doubt a lane closes its connection before the next send, which makes it impossible that a late answer to the first
send is taken for an answer to the second. A lane is not safe for threads; the producer holds a lock around it.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from kombu import Connection
from kombu.common import maybe_declare
from kombu.exceptions import OperationalError as KombuOperationalError
from kombu.transport.virtual import Channel as VirtualChannel

from .confirms import ConfirmChannel, Ticket
from .errors import ConfigurationError, Unroutable
from .model import Edge, Landing
from .outgoing import Outgoing
from .resend import Known, NotConfirmed
from .transports import register

__all__ = ["Lane", "template_of"]

#: After so many idle seconds a lane looks whether its connection was closed meanwhile: that is no doubt, while a
#: message written into a closed connection is one.
_LOOK_AFTER_IDLE: Final = 1.0

#: kombu's transports that return before the broker has answered and report no failure: a receipt would be a guess.
_REPORT_NOTHING: Final = {
    "kafka": "kombu's Kafka transport does not report failed deliveries",
    "gcpubsub": "kombu's Pub/Sub transport does not wait for the publish's answer",
    "qpid": "kombu's Qpid transport does not confirm",
}

#: Virtual transports that store a broadcast for every queue that is bound, whether or not anybody reads it now.
_STORE_BROADCASTS: Final = ("memory", "filesystem")


#: Connections of the parent process, kept for ever: their destructors might talk over a socket that is not ours.
_inherited: list[Connection] = []


def template_of(connection: Any) -> Connection:
    """A private, unconnected copy of a Connection, of a pool's connection, or of what a URL names."""
    register()
    if isinstance(connection, str):
        try:
            connection = Connection(connection)
        except (ValueError, KeyError):
            # Not chained: the parser's text may hold a part of the password.
            scheme = connection.partition("://")[0]
            raise ConfigurationError(f"kombu cannot read this broker URL (scheme {scheme!r})") from None
    elif not isinstance(connection, Connection):
        pool = getattr(connection, "connections", connection)  # a ProducerPool has a pool of connections
        connection = getattr(pool, "connection", None)
        if not isinstance(connection, Connection):
            raise ConfigurationError("a producer needs a kombu Connection, a pool of them, or a URL")
    # Not clone(): that of a pooled connection wants its pool.
    options = dict(connection.info())
    if connection.transport_cls == "pyamqp":
        options["transport"] = "pyamqp"  # info() resolves it to "amqp", which may be librabbitmq
    options["transport_options"] = dict(options.get("transport_options") or {})
    return Connection(**options)


class Lane:
    """Sends over a connection of its own, opened at the first send and again after every doubt.

    source: what the user gave; template: its copy by `template_of`. timeout: seconds to wait for the broker.
    """

    def __init__(self, source: Any, template: Connection, *, timeout: float, clock: Callable[[], float]) -> None:
        self._template = template
        self._timeout = timeout
        self._clock = clock
        self._is_open = False
        self._channel: Any = None
        self._confirms: ConfirmChannel | None = None
        self._send: Callable[[Outgoing], Landing] = self._send_confirmed
        self._edge = Edge.CONSUMER
        self._declared: dict[int, Any] = {}
        self._last_used = 0.0
        # A weak reference: the lane must not keep the user's connection alive.
        self._source = weakref.ref(source) if isinstance(source, Connection) else None

    # --- one send -------------------------------------------------------------------------------------

    def send(self, outgoing: Outgoing) -> tuple[Landing, Edge]:
        """Send once and wait for the answer. Raises NotConfirmed, or what `judge` turns into one."""
        if not self._is_open:
            self.open()
        elif self._confirms is not None and self._clock() - self._last_used > _LOOK_AFTER_IDLE:
            self._look()
        if outgoing.declare:
            self.declare(outgoing.declare)
        landing = self._send(outgoing)
        self._last_used = self._clock()
        return landing, self._edge

    def post(self, outgoing: Outgoing) -> Ticket:
        """AMQP only: send without waiting. The ticket is settled by a later `wait`."""
        assert self._confirms is not None
        message = self._channel.prepare_message(
            outgoing.body,
            outgoing.priority,
            outgoing.content_type,
            outgoing.content_encoding,
            outgoing.headers,
            outgoing.properties,
        )
        return self._confirms.send(message, outgoing.exchange, outgoing.routing_key, outgoing.inner_msg_id)

    def wait(self, ticket: Ticket) -> None:
        """AMQP only: wait until the ticket is settled. Raises NotConfirmed if the broker stays silent."""
        assert self._confirms is not None
        self._confirms.wait(ticket)

    def _send_confirmed(self, outgoing: Outgoing) -> Landing:
        ticket = self.post(outgoing)
        self.wait(ticket)
        if ticket.failure is not None:
            raise ticket.failure
        return Landing.LANDED

    def _send_to_edge(self, outgoing: Outgoing) -> Landing:
        landing: Landing = self._channel.basic_publish(
            self._virtual_message(outgoing),
            exchange=outgoing.exchange,
            routing_key=outgoing.routing_key,
            mandatory=True,
        )
        return landing

    def _send_virtual(self, outgoing: Outgoing) -> Landing:
        channel, exchange = self._channel, outgoing.exchange
        if exchange:
            if channel.typeof(exchange).type == "fanout":
                self._check_broadcast(outgoing)
        elif not outgoing.routing_key:
            raise _unroutable("", "")
        channel.basic_publish(self._virtual_message(outgoing), exchange=exchange, routing_key=outgoing.routing_key)
        return Landing.LANDED

    def _virtual_message(self, outgoing: Outgoing) -> Any:
        # A new one for every send: publishing writes into it.
        return self._channel.prepare_message(
            outgoing.body,
            outgoing.priority,
            outgoing.content_type,
            outgoing.content_encoding,
            dict(outgoing.headers),
            dict(outgoing.properties),
        )

    def _check_broadcast(self, outgoing: Outgoing) -> None:
        driver = self.driver_type
        if driver not in _STORE_BROADCASTS or not self._channel.supports_fanout:
            raise NotConfirmed(
                Known.UNROUTABLE,
                f"exchange {outgoing.exchange!r} is a fanout, and over {driver} kombu stores no broadcast for a "
                "subscriber that is absent: bind queues to a direct or topic exchange instead",
                final=True,
            )
        if not self._channel.get_table(outgoing.exchange):
            raise _unroutable(outgoing.exchange, outgoing.routing_key)

    # --- declaring ------------------------------------------------------------------------------------

    def declare(self, entities: Iterable[Any]) -> None:
        """Declare exchanges and queues, each once per connection. Nothing is sent while this fails."""
        for entity in entities:
            if id(entity) in self._declared:
                continue
            try:
                with self._limited():
                    maybe_declare(entity.bind(self._channel), self._channel)
            except self._connection_errors() as error:
                raise NotConfirmed(Known.NOT_SENT, "the connection broke while declaring") from error
            except self._channel_errors() as error:
                self.discard()
                raise ConfigurationError(
                    f"the broker refused to declare {type(entity).__name__.lower()} {entity.name!r}: "
                    f"{type(error).__name__}; declare it as it is, or remove it from declare="
                ) from error
            if entity.can_cache_declaration:
                if len(self._declared) >= 1000:  # somebody makes new objects all the time: do not keep them all
                    self._declared.clear()
                self._declared[id(entity)] = entity  # the object itself too, so that its id stays its own

    # --- the connection -------------------------------------------------------------------------------

    @property
    def driver_type(self) -> str:
        """kombu's name for the kind of broker."""
        return str(self._template.transport.driver_type)

    def open(self) -> None:
        """Connect and open the channel. Raises NotConfirmed(NOT_SENT) if the broker cannot be reached."""
        if self._is_open:
            return
        connection = self._template
        prepare_channel = self._choose()
        self._is_open = True
        try:
            # One round over all hosts; pauses between rounds are the resend policy's.
            connection.ensure_connection(
                max_retries=max(1, len(connection.alt)), interval_start=0, interval_step=0, interval_max=0
            )
            with self._limited():
                self._channel = connection.channel()
                prepare_channel()
        except (*self._connection_errors(), *self._channel_errors()) as error:
            self.discard()
            raise NotConfirmed(Known.NOT_SENT, f"the broker cannot be reached ({type(error).__name__})") from error
        except BaseException:
            self.discard()
            raise
        self._last_used = self._clock()

    def _choose(self) -> Callable[[], None]:
        """Choose by the transport how to send. Returns what makes a new channel ready for that."""
        connection, driver = self._template, self.driver_type
        options = connection.transport_options
        if driver == "amqp":
            options["confirm_publish"] = False
            # Without it a broker that stops reading holds the sender for ever.
            options.setdefault("write_timeout", self._timeout)
            # Nobody would answer heartbeats between two publishes, and the broker would close the connection.
            connection.heartbeat = 0
            self._send = self._send_confirmed
            return self._start_confirms
        if driver in _REPORT_NOTHING:
            raise ConfigurationError(f"{_REPORT_NOTHING[driver]}, so no receipt could be truthful")
        if driver == "redis":
            options.setdefault("socket_timeout", self._timeout)
            options.setdefault("socket_connect_timeout", self._timeout)
        channel_class = getattr(connection.transport, "Channel", None)
        if getattr(channel_class, "idempotent_edge", False):
            self._send, self._edge = self._send_to_edge, Edge.BROKER
            return self._share_bindings
        if isinstance(channel_class, type) and issubclass(channel_class, VirtualChannel):
            self._send = self._send_virtual
            return self._forbid_dropping
        raise ConfigurationError(f"kombu's {driver} transport is not supported: how it confirms is not known")

    def _start_confirms(self) -> None:
        self._confirms = ConfirmChannel(self._channel, timeout=self._timeout, clock=self._clock)

    def _forbid_dropping(self) -> None:
        # kombu drops what it cannot route, or puts it into one queue for all. Here both become an error.
        self._share_bindings()
        channel = self._channel
        channel.deadletter_queue = None
        look_up = channel._lookup

        def routed(exchange: str, routing_key: str, default: str | None = None) -> Any:
            queues = look_up(exchange, routing_key, default)
            if not queues:
                raise _unroutable(exchange, routing_key)
            return queues

        channel._lookup = routed

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        """Within it an AMQP request raises TimeoutError where py-amqp would wait for its answer for ever."""
        if self.driver_type != "amqp":
            yield
            return
        sock = self._template.connection.sock
        sock.settimeout(self._timeout)
        yield  # after an error the connection is discarded, and its socket with it
        sock.settimeout(None)

    def _share_bindings(self) -> None:
        # Some virtual transports keep exchanges and bindings in the connection's own memory: what the user has
        # declared there counts here too.
        source = None if self._source is None else self._source()
        if source is not None and source.get_transport_cls() is self._template.get_transport_cls():
            state = getattr(source.transport, "state", None)
            if state is not None:
                self._template.transport.state = state

    def _look(self) -> None:
        assert self._confirms is not None
        try:
            self._confirms.read_pending()
        except (*self._connection_errors(), *self._channel_errors()):
            self.discard()
            self.open()

    def judge(self, error: Exception) -> NotConfirmed | None:
        """What an exception of `send` means; None: it is no broker's error. Discards the connection where needed."""
        if isinstance(error, NotConfirmed):
            if error.known is Known.UNKNOWN or error.known is Known.NOT_SENT:
                self.discard()
            return error
        if isinstance(error, Unroutable):
            return NotConfirmed(Known.UNROUTABLE, str(error), final=True)
        if isinstance(error, ConfigurationError):
            return None
        channel_error = isinstance(error, self._channel_errors())
        lost = isinstance(error, self._connection_errors())
        self.discard()
        if channel_error:
            return _refusal(error)
        if lost:
            return NotConfirmed(Known.UNKNOWN, f"the connection broke ({type(error).__name__})")
        return None

    def discard(self) -> None:
        """Throw the connection away, at once and without a word to the broker. The next send opens a new one."""
        if not self._is_open:
            return
        self._forget()
        connection = self._template
        with contextlib.suppress(Exception):  # it is thrown away because it is broken
            if hasattr(connection._transport, "_collect"):
                connection.collect()
            else:
                connection.close()

    def close(self) -> None:
        """Say goodbye to the broker, if it listens, and close."""
        with contextlib.suppress(Exception):  # nothing is outstanding, so nothing can be lost by it
            if self._confirms is not None:
                self._channel.connection.transport.sock.settimeout(2.0)
                self._channel.connection.close()
        self.discard()

    def inherit(self) -> Lane:
        """In a forked child: a new lane in place of this one; the socket is the parent's and stays untouched."""
        if self._is_open:
            _inherited.append(self._template)
            with contextlib.suppress(Exception):
                transport = self._template._connection._transport
                # Only this process's descriptor: a shutdown, as py-amqp's close does, would cut off the parent.
                os.close(transport.sock.detach())
                transport.sock = None
                transport.connected = False
        source = None if self._source is None else self._source()
        return Lane(source, template_of(self._template), timeout=self._timeout, clock=self._clock)

    def _forget(self) -> None:
        self._is_open = False
        self._channel = self._confirms = None
        self._declared = {}

    def _connection_errors(self) -> tuple[type[BaseException], ...]:
        return (*self._template.connection_errors, KombuOperationalError, OSError, EOFError)

    def _channel_errors(self) -> tuple[type[BaseException], ...]:
        return tuple(self._template.channel_errors)


def _unroutable(exchange: str, routing_key: str) -> NotConfirmed:
    text = f"no queue is bound to exchange {exchange!r} with routing key {routing_key!r}, as far as this process knows"
    return NotConfirmed(Known.UNROUTABLE, text, final=True)


def _refusal(error: Exception) -> NotConfirmed:
    code = getattr(error, "reply_code", None)
    if str(code) == "404":
        return NotConfirmed(Known.UNROUTABLE, f"the exchange is missing ({error})", final=True)
    if code is None:
        return NotConfirmed(Known.REFUSED, f"the broker refused the message ({type(error).__name__})")
    return NotConfirmed(Known.REFUSED, f"the broker refused the message ({error})", final=True)
