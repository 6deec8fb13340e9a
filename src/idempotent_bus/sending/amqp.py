"""The lane to an AMQP broker: every message mandatory, every send confirmed by its own delivery tag."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

from amqp.method_framing import frame_writer
from kombu import Connection

from ..model import Landing
from .confirms import ConfirmChannel, Ticket
from .lane import Lane
from .outgoing import Outgoing
from .resend import Known, NotConfirmed

__all__ = ["AmqpLane"]

#: After so many idle seconds the lane looks whether its connection was closed meanwhile: that is no doubt, while a
#: message written into a closed connection is one.
_LOOK_AFTER_IDLE: Final = 1.0


#: How many bytes of frames are gathered before they are written at once.
_GATHERED: Final = 32 * 1024


class _Writer:
    """Stands between py-amqp's frames and its socket, so that the frames of a stream can leave in larger pieces."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._frames = bytearray()
        self.gathering = False

    def write(self, frames: bytes) -> None:
        self._frames += frames
        if not self.gathering or len(self._frames) >= _GATHERED:
            self.flush()

    def flush(self) -> None:
        if self._frames:
            frames, self._frames = self._frames, bytearray()
            self._transport.write(frames)


class AmqpLane(Lane):
    """See Lane. `post` and `wait` are the two halves of a send, for a window of messages under way."""

    def __init__(
        self, connection: Connection, source: Connection | None, *, timeout: float, clock: Callable[[], float]
    ) -> None:
        super().__init__(connection, source, timeout=timeout, clock=clock)
        self._confirms: ConfirmChannel | None = None
        self._writer: _Writer | None = None
        self._last_used = 0.0
        self._exchanges: set[str] = {""}
        connection.transport_options["confirm_publish"] = False
        # Against a broker that stops reading, which would hold the sender for ever (py-amqp's own guard is Linux's).
        connection.transport_options.setdefault("write_timeout", timeout)
        # Nobody would answer heartbeats between two publishes, and the broker would close the connection.
        connection.heartbeat = 0
        connection.transport_options["frame_writer"] = self._make_frame_writer

    def post(self, outgoing: Outgoing, *, gather: bool = False) -> Ticket:
        """Send on the open channel without waiting. The ticket is settled by a later `wait`.

        gather: the message may wait for more to come, until the next `wait` at the latest, and leave with them.
        """
        assert self._confirms is not None
        assert self._writer is not None
        message = self._channel.prepare_message(
            outgoing.body,
            outgoing.priority,
            outgoing.content_type,
            outgoing.content_encoding,
            outgoing.headers,
            outgoing.properties,
        )
        self._writer.gathering = gather
        try:
            return self._confirms.send(message, outgoing.exchange, outgoing.routing_key, outgoing.inner_msg_id)
        finally:
            self._writer.gathering = False

    def wait(self, ticket: Ticket) -> None:
        """Wait until the ticket is settled. Raises NotConfirmed if the broker stays silent."""
        assert self._confirms is not None
        assert self._writer is not None
        self._writer.flush()
        self._confirms.wait(ticket)
        self._last_used = self._clock()

    def is_ready_for(self, outgoing: Outgoing) -> bool:
        """True if this message needs neither an exchange's check nor a declaration first."""
        declared = self._declared
        return outgoing.exchange in self._exchanges and all(id(entity) in declared for entity in outgoing.declare)

    def check_exchange(self, name: str) -> None:
        """Ask, once per connection, whether an exchange is there. Raises NotConfirmed(UNROUTABLE) if not.

        With several messages under way nobody could tell which of them a missing exchange's error was meant for.
        """
        if name in self._exchanges:
            return
        with self._limited():
            channel = self._connection.channel()  # another one: the error would close it
            try:
                channel.exchange_declare(name, "direct", passive=True)
            except self.channel_errors() as error:
                text = f"the exchange is missing ({error})"
                raise NotConfirmed(Known.UNROUTABLE, text, final=True) from error
            finally:
                channel.close()
        self._exchanges.add(name)

    def open(self) -> None:
        confirms = self._confirms
        if confirms is not None and not confirms.outstanding and self._clock() - self._last_used > _LOOK_AFTER_IDLE:
            self._last_used = self._clock()
            try:
                confirms.read_pending()
            except (*self.connection_errors(), *self.channel_errors()):
                self.discard()
        super().open()

    def close(self) -> None:
        with contextlib.suppress(Exception):  # nothing is under way, so nothing can be lost by it
            if self._channel is not None:
                connection = self._channel.connection
                connection.transport.sock.settimeout(self._timeout)
                connection.close()
        super().close()

    def _deliver(self, outgoing: Outgoing) -> Landing:
        ticket = self.post(outgoing)
        self.wait(ticket)
        if ticket.failure is not None:
            raise ticket.failure
        return Landing.LANDED

    def _make_frame_writer(self, connection: Any, transport: Any) -> Any:
        self._writer = _Writer(transport)
        return frame_writer(connection, self._writer)

    def _prepare_channel(self) -> None:
        self._confirms = ConfirmChannel(self._channel, timeout=self._timeout, clock=self._clock)
        self._last_used = self._clock()

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        sock: Any = self._connection.connection.sock
        sock.settimeout(self._timeout)
        try:
            yield
        finally:
            sock.settimeout(None)

    def _forget(self) -> None:
        super()._forget()
        self._confirms = None
        self._exchanges = {""}
