"""A lane: the producer's private connection, on which it sends and learns what came of it.

Private, so that waiting for a confirm never runs the user's consumers, and so that it can be thrown away: after any
doubt a lane closes its connection before the next send, which makes it impossible that a late answer to the first
send is taken for an answer to the second. A lane is not safe for threads; the producer holds a lock around it.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from kombu import Connection
from kombu.common import maybe_declare
from kombu.exceptions import OperationalError
from typing_extensions import Self

from ..errors import ConfigurationError, Unroutable
from ..model import Edge, Landing
from ..transports import register
from .outgoing import Outgoing
from .resend import Known, NotConfirmed

__all__ = ["Lane", "private_copy"]

#: Declared entities are remembered by object; somebody who makes new ones all the time must not fill the memory.
_MOST_REMEMBERED = 1000

#: Connections of the parent process, kept for ever: their destructors might talk over a socket that is not ours.
_inherited: list[Connection] = []


def private_copy(connection: Any) -> Connection:
    """An unconnected copy of a Connection, of the connection that a pool copies, or of what a URL names."""
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
    # A copy: kombu's retry writes its policy into the options of every connection that shares them.
    options["transport_options"] = dict(options.get("transport_options") or {})
    return Connection(**options)


class Lane(ABC):
    """Sends over a connection of its own, opened at the first send and again after every doubt.

    connection: a `private_copy`. source: the user's own connection, for its bindings, if there is one.
    timeout: seconds to wait for an answer of the broker.
    """

    #: Where a second copy of a message that went through here is refused.
    edge = Edge.CONSUMER

    def __init__(
        self, connection: Connection, source: Connection | None, *, timeout: float, clock: Callable[[], float]
    ) -> None:
        self._connection = connection
        # A weak reference: the lane must not keep the user's connection alive.
        self._source = None if source is None else weakref.ref(source)
        self._timeout = timeout
        self._clock = clock
        self._is_open = False
        self._channel: Any = None
        self._declared: dict[int, Any] = {}

    # --- what each kind of broker does in its own way -------------------------------------------------

    @abstractmethod
    def _deliver(self, outgoing: Outgoing) -> Landing:
        """Send once on the open channel, and wait for the answer."""

    @abstractmethod
    def _prepare_channel(self) -> None:
        """Make a new channel ready for sending."""

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        """Within it a request to the broker raises an error where it would wait for its answer for ever."""
        yield

    # --- sending --------------------------------------------------------------------------------------

    def send(self, outgoing: Outgoing) -> Landing:
        """Send once and wait for the answer. Raises NotConfirmed, or what `judge` turns into one."""
        self.open()
        if outgoing.declare:
            self.declare(outgoing.declare)
        return self._deliver(outgoing)

    def edge_of(self, outgoing: Outgoing) -> Edge:
        """Where a second copy of this message, which was just sent, is refused. Never raises."""
        return self.edge

    def declare(self, entities: Iterable[Any]) -> None:
        """Declare exchanges and queues, each once per connection. Nothing is sent while this fails."""
        for entity in entities:
            if id(entity) in self._declared:
                continue
            try:
                with self._limited():
                    maybe_declare(entity.bind(self._channel), self._channel)
            except self.connection_errors() as error:
                self.discard()
                raise NotConfirmed(Known.NOT_SENT, "the connection broke while declaring") from error
            except self.channel_errors() as error:
                self.discard()
                raise ConfigurationError(
                    f"the broker refused to declare {type(entity).__name__.lower()} {entity.name!r} "
                    f"({type(error).__name__}): declare it as it is there, or remove it from declare="
                ) from error
            if entity.can_cache_declaration:
                if len(self._declared) >= _MOST_REMEMBERED:
                    self._declared.clear()
                self._declared[id(entity)] = entity  # the object itself too, so that its id stays its own

    def judge(self, error: Exception) -> NotConfirmed | None:
        """What an exception of a send means; None: it is no broker's error. Afterwards the lane can be used again."""
        if isinstance(error, NotConfirmed):
            if error.known is Known.UNKNOWN or error.known is Known.NOT_SENT:
                self.discard()
            return error
        if isinstance(error, Unroutable):
            return NotConfirmed(Known.UNROUTABLE, str(error), final=True)
        self.discard()
        if isinstance(error, self.channel_errors()):
            return _refusal(error)
        if isinstance(error, self.connection_errors()):
            return NotConfirmed(Known.UNKNOWN, f"the connection broke ({type(error).__name__})")
        return None

    # --- the connection -------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect and open the channel, if need be. Raises NotConfirmed(NOT_SENT) if the broker cannot be reached."""
        if self._is_open:
            return
        connection = self._connection
        self._is_open = True
        try:
            # Each host once, without pauses: those between the rounds are the resend policy's.
            connection.ensure_connection(
                max_retries=max(0, len(connection.alt) - 1), interval_start=0, interval_step=0, interval_max=0
            )
            with self._limited():
                self._channel = connection.channel()
                self._prepare_channel()
        except (*self.connection_errors(), *self.channel_errors()) as error:
            self.discard()
            raise NotConfirmed(Known.NOT_SENT, f"the broker cannot be reached ({type(error).__name__})") from error
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Throw the connection away, at once and without a word to the broker. The next send opens a new one."""
        if not self._is_open:
            return
        self._forget()
        with contextlib.suppress(Exception):  # it is thrown away because it is broken
            if hasattr(self._connection._transport, "_collect"):
                self._connection.collect()
            else:
                self._connection.close()

    def close(self) -> None:
        """Close the connection properly. A later send opens a new one."""
        self.discard()

    def inherit(self) -> Self:
        """In a forked child: a new lane in place of this one; the socket is the parent's and stays untouched."""
        if self._is_open:
            _inherited.append(self._connection)
            with contextlib.suppress(Exception):
                transport = self._connection._connection._transport
                # Only this process's descriptor: a shutdown, as py-amqp's close does, would cut off the parent.
                os.close(transport.sock.detach())
                transport.sock = None
                transport.connected = False
        return self.twin()

    def twin(self) -> Self:
        """Another lane to the same broker, not yet open."""
        source = None if self._source is None else self._source()
        return type(self)(private_copy(self._connection), source, timeout=self._timeout, clock=self._clock)

    def connection_errors(self) -> tuple[type[BaseException], ...]:
        """What the driver raises when the connection is lost or cannot be made."""
        return (*self._connection.connection_errors, OperationalError, OSError, EOFError)

    def channel_errors(self) -> tuple[type[BaseException], ...]:
        """What the driver raises when the broker says no."""
        return tuple(self._connection.channel_errors)

    def _forget(self) -> None:
        self._is_open = False
        self._channel = None
        self._declared = {}

    def _share_bindings(self) -> None:
        # Some virtual transports keep exchanges and bindings in the connection's own memory: what the user has
        # declared there counts here too.
        source = None if self._source is None else self._source()
        if source is not None and source.get_transport_cls() is self._connection.get_transport_cls():
            state = getattr(source.transport, "state", None)
            if state is not None:
                self._connection.transport.state = state


def _refusal(error: Exception) -> NotConfirmed:
    code = str(getattr(error, "reply_code", None) or "")
    if code == "404":
        return NotConfirmed(Known.UNROUTABLE, f"the exchange is missing ({error})", final=True)
    if not code:
        return NotConfirmed(Known.REFUSED, f"the broker refused the message ({type(error).__name__})")
    return NotConfirmed(Known.REFUSED, f"the broker refused the message ({error})", final=True)
