"""Celery's producers on AMQP, where `publish` returns when the broker has confirmed that very message.

py-amqp's own `confirm_publish` waits for any confirm: after a timeout it takes the late one of the first message for
the second. Here each message is confirmed by its own number, on a channel that nothing else uses, and after any doubt
the connection is thrown away before Celery's retry policy sends the message again, under the same inner-msg-id.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final
from weakref import WeakKeyDictionary

from kombu import Producer
from kombu.pools import ProducerPool

from ..errors import Rejected, Unroutable
from ..headers import INNER_MSG_ID
from ..sending.confirms import ConfirmChannel
from ..sending.resend import Known, NotConfirmed

__all__ = ["ConfirmingPool", "ConfirmingProducer"]

#: Seconds for one confirm, unless the call says another confirm_timeout.
_TIMEOUT: Final = 5.0


class ConfirmingProducer(Producer):
    """kombu's Producer; on AMQP a publish with an inner-msg-id is mandatory and confirmed. For one thread at a time.

    `publish` raises Unroutable if there is no queue for the message, Rejected if the broker refused it, both final, and
    what kombu's raises: where no confirm came a ConnectionResetError, or with `retry`, after the last try, an
    OperationalError.
    """

    def _publish(self, *arguments: Any) -> Any:
        connection = self.connection
        if (
            INNER_MSG_ID not in arguments[4]  # Celery's own, such as a broadcast to nobody
            or connection.transport.driver_type != "amqp"
            or connection.transport_options.get("confirm_publish")
            or getattr(self._batch_local, "current", None) is not None
        ):
            return super()._publish(*arguments)
        # As kombu's `publish` gives them.
        body, priority, content_type, content_encoding, headers, properties, routing_key = arguments[:7]
        exchange, declare = arguments[9:11]
        retry, retry_policy = arguments[13:15]
        for entity in declare or ():
            self.maybe_declare(entity, retry=retry, **(retry_policy or {}))
        message = self.channel.prepare_message(body, priority, content_type, content_encoding, headers, properties)
        try:
            confirms = _confirms_of(connection)
            ticket = confirms.send(message, exchange or "", routing_key or "", headers[INNER_MSG_ID])
            confirms.wait(ticket)
        except NotConfirmed as silence:
            self._throw_away(connection)
            raise ConnectionResetError(f"the publish is in doubt: {silence}") from silence
        except BaseException:
            self._throw_away(connection)  # a late answer must not meet the next message
            raise
        if ticket.failure is not None:
            kind = Unroutable if ticket.failure.known is Known.UNROUTABLE else Rejected
            raise kind(str(ticket.failure), headers[INNER_MSG_ID])
        return None

    def _throw_away(self, connection: Any) -> None:
        with contextlib.suppress(Exception):  # it is of no use any more, whatever its goodbye says
            connection.collect()


class ConfirmingPool(ProducerPool):
    """Celery's pool of producers, of ConfirmingProducers."""

    Producer = ConfirmingProducer


#: The channel for confirms of each open AMQP connection; a connection that is thrown away takes its own along.
_channels: WeakKeyDictionary[Any, ConfirmChannel] = WeakKeyDictionary()


def _confirms_of(connection: Any) -> ConfirmChannel:
    amqp = connection.connection  # connects if need be
    confirms = _channels.get(amqp)
    if confirms is None:
        confirms = _channels[amqp] = ConfirmChannel(amqp.channel(), timeout=_TIMEOUT)
    return confirms
