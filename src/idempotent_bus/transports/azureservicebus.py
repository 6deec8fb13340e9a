"""`idempotent-azureservicebus://`: kombu's Service Bus transport with the inner-msg-id as message id.

Queues that this transport creates have duplicate detection on: Service Bus drops a second message with the same
message id within `edge_window` (seconds, 3600; from 20 seconds to 7 days; a longer one costs throughput). That is the
edge. It does not say that it dropped a copy, so a receipt says `landed`: the message is there, once. Detection is
fixed when a queue is created, and the Basic tier has none: over a queue without it, or where this connection may not
ask, a warning is logged once and receipts say that the edge is at the consumer.

A live consumer's messages stay locked: `use_lock_renewal` is on here, for `max_lock_renewal_duration` (seconds, 3600).
A requeue gives the message back at once, which Service Bus counts as a delivery (`max_delivery_count`, after which it
goes to the queue's own dead-letter subqueue); a reject moves it to that subqueue, where kombu's transport does nothing.
A delay is a scheduled copy, confirmed, and then the original's completion; the copy's message id is made of the
original's sequence number, so that a delay that is asked for again after a crash makes no second one.

`publish_timeout` (seconds, 30): how long to wait for the answer to one publish. All other options are kombu's.
"""

from __future__ import annotations

import datetime
import logging
import uuid
from typing import Any, ClassVar, Final

try:
    from azure.core.exceptions import AzureError, ResourceExistsError
    from azure.servicebus import ServiceBusMessage
    from azure.servicebus import exceptions as bus_errors
except ModuleNotFoundError as error:
    text = "idempotent-azureservicebus:// needs its SDK: pip install 'idempotent-bus[azure]'"
    raise ModuleNotFoundError(text, name=error.name) from error
from kombu.exceptions import OperationalError
from kombu.transport import azureservicebus as kombu_azure
from kombu.transport import virtual
from kombu.utils.json import dumps

from .confirmed import ConfirmedChannel, refused, unknown, unroutable

__all__ = ["Channel", "QoS", "Transport"]

logger = logging.getLogger(__name__)

EDGE_WINDOW: Final = 3600.0

_MESSAGE: Final = "azure_message"
_QUEUE: Final = "azure_queue_name"

#: The service said no, and would again. A full queue is the one no that may end by itself.
_REFUSALS: Final = (
    bus_errors.MessageSizeExceededError,
    bus_errors.MessagingEntityDisabledError,
    bus_errors.ServiceBusAuthenticationError,
    bus_errors.ServiceBusAuthorizationError,
)
#: The SDK lets some errors of its AMQP library through; kombu knows which.
_NO_ANSWER: Final = (AzureError, OSError, *getattr(kombu_azure, "_CONNECTION_LOST_ERRORS", ()))


class QoS(virtual.QoS):
    """What was delivered and not settled."""

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        message = self.channel.unsettled(delivery_tag)
        if message is not None:
            self.channel.give_back(message, dead=not requeue)
        self._quick_ack(delivery_tag)


class Channel(ConfirmedChannel, kombu_azure.Channel):
    """A channel of ours."""

    QoS = QoS
    default_use_lock_renewal = True

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self._detects: dict[str, bool] = {}

    # --- queues -----------------------------------------------------------------------------------

    def _try_parse_connection_string(self) -> None:
        # kombu's looks for its own scheme only.
        client = self.connection.client
        given, client.hostname = client.hostname, client.hostname.removeprefix("idempotent-")
        try:
            super()._try_parse_connection_string()
        finally:
            client.hostname = given

    def _new_queue(self, queue: str, **kwargs: Any) -> Any:
        """Ensure that a queue exists; one that is made here detects duplicates."""
        name = self._name(queue)
        if name not in self._queue_cache:
            try:
                self.queue_mgmt_service.create_queue(
                    queue_name=name,
                    lock_duration=datetime.timedelta(seconds=self.peek_lock_seconds),
                    requires_duplicate_detection=True,
                    duplicate_detection_history_time_window=datetime.timedelta(seconds=self.edge_window),
                )
                self._detects[name] = True
            except ResourceExistsError:
                self.refuses_copies(queue)  # to warn when it is declared rather than when it is used
            self._add_queue_to_cache(name)
        return self._queue_cache[name]

    def refuses_copies(self, queue: str) -> bool:
        """True if the queue was made with duplicate detection; asked once."""
        name = self._name(queue)
        if name not in self._detects:
            try:
                self._detects[name] = bool(self.queue_mgmt_service.get_queue(name).requires_duplicate_detection)
                why = "it was created without duplicate detection, which cannot be turned on later"
            except AzureError as error:
                self._detects[name] = False
                why = f"this connection may not ask whether it detects duplicates ({type(error).__name__})"
            if not self._detects[name]:
                logger.warning("queue %s refuses no second copy of a message: %s", name, why)
        return self._detects[name]

    def _delete(self, queue: str, *args: Any, **kwargs: Any) -> None:
        self._detects.pop(self._name(queue), None)
        super()._delete(queue, *args, **kwargs)

    def _name(self, queue: str) -> str:
        return str(self.entity_name(self.queue_name_prefix + queue))

    @property
    def edge_window(self) -> float:
        """How long a queue that is created here remembers a message id, in seconds: the option `edge_window`."""
        return float(self.transport_options.get("edge_window", EDGE_WINDOW))

    # --- publishing -------------------------------------------------------------------------------

    def _put(self, queue: str, message: dict[str, Any], *, edge_id: str | None = None, **kwargs: Any) -> None:
        # Never without an id: what a detecting queue takes two messages without one for is the service's to choose.
        self._send(self._name(queue), ServiceBusMessage(dumps(message), message_id=edge_id or uuid.uuid4().hex))

    def _send(self, name: str, message: Any) -> None:
        try:
            self._get_asb_sender(name).sender.send_messages(message, timeout=self.publish_timeout)
        except bus_errors.MessagingEntityNotFoundError as error:
            self._forget_sender(name)
            raise unroutable(f"Service Bus knows no queue {name!r}") from error
        except (*_REFUSALS, bus_errors.ServiceBusQuotaExceededError) as error:
            self._forget_sender(name)
            text = f"Service Bus refused the message ({type(error).__name__})"
            raise refused(text, final=isinstance(error, _REFUSALS)) from error
        except _NO_ANSWER as error:
            # Also a lost connection: that nothing of this message had left by then is more than is known here.
            self._forget_sender(name)
            raise unknown(f"Service Bus gave no answer ({type(error).__name__})") from error

    def _forget_sender(self, name: str) -> None:
        held = self._queue_cache.get(name)
        sender = None if held is None else held.sender
        if sender is not None:
            held.sender = None
            try:
                sender.close()
            except Exception:
                logger.debug("a broken sender could not be closed", exc_info=True)

    # --- consuming --------------------------------------------------------------------------------

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        payload: dict[str, Any] = super()._get(queue, timeout)
        properties = payload["properties"]
        # The sender's tag is shared by a redelivery, which would then be settled in the first delivery's place.
        properties["delivery_tag"] = self._next_delivery_tag()
        info = properties["delivery_info"]
        info["queue"] = queue
        info["redelivered"] = bool(info.get("redelivered") or info[_MESSAGE].delivery_count)
        return payload

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        """The message is done. An error of the connection is raised, where kombu logs it and rejects."""
        message = self.unsettled(delivery_tag)
        if message is not None and _MESSAGE in message.delivery_info:
            self._settle(message.delivery_info, "complete_message")
        self.qos.ack(delivery_tag)

    def basic_delay(self, delivery_tag: str, delay: float) -> bool:
        """Settle the delivery; a copy comes to the same queue `delay` seconds from now.

        The copy is confirmed before the original is completed. False: the original's lock was lost before; it comes
        back beside the copy.
        """
        message = self.unsettled(delivery_tag)
        if message is None:
            return False
        info = message.delivery_info
        portable = {name: value for name, value in info.items() if name not in (_MESSAGE, _QUEUE)}
        properties = {**message._raw["properties"], "delivery_info": {**portable, "redelivered": True}}
        original = info[_MESSAGE]
        copy = ServiceBusMessage(
            dumps({**message._raw, "properties": properties}),
            message_id=f"idempotent-bus-delay-{original.sequence_number}",
            scheduled_enqueue_time_utc=_now() + datetime.timedelta(seconds=max(delay, 0.0)),
        )
        self._send(info[_QUEUE], copy)
        done = self._settle(info, "complete_message")
        self.qos._quick_ack(delivery_tag)
        return done

    def give_back(self, message: Any, *, dead: bool) -> None:
        """Hand a delivery back to its queue at once, or to that queue's dead-letter subqueue."""
        if _MESSAGE in message.delivery_info:
            if dead:
                self._settle(message.delivery_info, "dead_letter_message", reason="rejected")
            else:
                self._settle(message.delivery_info, "abandon_message")

    def _settle(self, info: dict[str, Any], how: str, **details: Any) -> bool:
        receiver = self._get_asb_receiver(info[_QUEUE]).receiver
        try:
            getattr(receiver, how)(info[_MESSAGE], **details)
        except (bus_errors.MessageLockLostError, bus_errors.MessageAlreadySettled) as error:
            logger.warning("%s came too late, the message is not held any more (%s)", how, type(error).__name__)
            return False
        return True


class Transport(kombu_azure.Transport):
    """`idempotent-azureservicebus://`."""

    Channel = Channel
    connection_errors: ClassVar[Any] = (*virtual.Transport.connection_errors, OperationalError, *_NO_ANSWER)

    @staticmethod
    def parse_uri(uri: str) -> Any:
        """The namespace and the credential that a URL of ours, or of kombu's, names."""
        return kombu_azure.Transport.parse_uri(uri.removeprefix("idempotent-"))

    @classmethod
    def as_uri(cls, uri: str, include_password: bool = False, mask: str = "**") -> str:
        return f"idempotent-{kombu_azure.Transport.as_uri(uri.removeprefix('idempotent-'), include_password, mask)}"

    @staticmethod
    def limit_publish(options: dict[str, Any], seconds: float) -> None:
        """For a connection that only publishes: an answer is awaited so long."""
        options.setdefault("publish_timeout", seconds)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
