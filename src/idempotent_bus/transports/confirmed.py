"""What our transports over SQS, Service Bus, Kafka and Pub/Sub share: a publish returns when the broker has it.

Their channels are kombu's with `ConfirmedChannel` before them. A `_put` gets `edge_id`, the text that the broker's
own deduplication is to compare, or None: kombu's and our own ways past the edge (requeues, dead letters) give none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from kombu.exceptions import ChannelError, OperationalError

from ..errors import Unroutable
from ..headers import INNER_MSG_ID, REDRIVE
from ..model import Edge, Landing
from ..msgid import is_inner_msg_id

__all__ = ["PUBLISH_TIMEOUT", "ConfirmedChannel", "edge_id_of", "refused", "unknown", "unroutable"]

#: Seconds to wait for the broker's answer to one publish, where `publish_timeout` is not set.
PUBLISH_TIMEOUT: Final = 30.0

_REFUSED: Final = "406"


def edge_id_of(headers: Mapping[str, Any]) -> str | None:
    """What the broker compares: the inner-msg-id, with the redrive's number if there is one. None without an id.

    At most 128 characters, as SQS and Service Bus want it: an id that is not of our own form is hashed.
    """
    inner_msg_id = headers.get(INNER_MSG_ID)
    if not isinstance(inner_msg_id, str) or not inner_msg_id:
        return None
    if not is_inner_msg_id(inner_msg_id):
        inner_msg_id = hashlib.sha256(inner_msg_id.encode("utf-8", "surrogatepass")).hexdigest()
    redrive = headers.get(REDRIVE)
    return f"{inner_msg_id}:{redrive}" if isinstance(redrive, int) and redrive > 0 else inner_msg_id


def refused(text: str, *, final: bool = True) -> Exception:
    """The broker said no, and nothing was stored. final: it would say no to a resend too."""
    return ChannelError(text, reply_code=_REFUSED if final else None)


def unknown(text: str) -> Exception:
    """No answer, or one that leaves open whether the message was stored."""
    return OperationalError(text)


def unroutable(text: str) -> Unroutable:
    """Nothing was stored, for want of a queue."""
    return Unroutable(f"{text}, so nothing was stored; declare the queue first")


class ConfirmedChannel:
    """Before one of kombu's virtual channels: publishing is confirmed, routed once, and says where its edge is."""

    #: A channel of ours, see `idempotent_bus.transports`; `edge_of` says where the edge is.
    idempotent_edge: ClassVar[bool] = True

    def refuses_copies(self, queue: str) -> bool:
        """True if this queue refuses a second copy with the same edge_id. Never raises."""
        return False

    def edge_of(self, exchange: str, routing_key: str) -> Edge:
        """Where a second copy of a message that is routed so would be refused. Never raises."""
        queues = self.routes(exchange, routing_key)
        return Edge.BROKER if queues and all(map(self.refuses_copies, queues)) else Edge.CONSUMER

    def routes(self: Any, exchange: str, routing_key: str) -> list[str]:
        """The queues that a message goes to, as far as this process knows: bindings live in its memory."""
        if not exchange:
            return [routing_key] if routing_key else []
        try:
            found = self.typeof(exchange).lookup(self.get_table(exchange), exchange, routing_key, None)
        except KeyError:
            found = ()
        return sorted({queue for queue in found if queue})

    def basic_publish(
        self: Any, message: dict[str, Any], exchange: str, routing_key: str, mandatory: bool = False, **kwargs: Any
    ) -> Landing | None:
        """Store the message in every queue that it is routed to, one after the other; return when the broker has it.

        LANDED says that it is there; these brokers do not say whether it was there before. None: no route, or a
        fanout, and not mandatory. Raises Unroutable, what `refused` makes, or what `unknown` makes: then the same
        message with the same inner-msg-id may be sent again, which completes what is missing.
        """
        exchange, routing_key = exchange or "", routing_key or ""
        if exchange and self.typeof(exchange).type == "fanout":
            if mandatory:
                raise unroutable(f"exchange {exchange!r} is a fanout, and nobody can say who has subscribed to it")
            super().basic_publish(message, exchange, routing_key)  # type: ignore[misc]  # kombu's channel
            return None
        queues = self.routes(exchange, routing_key)
        if not queues and mandatory:
            raise unroutable(f"no queue is bound to exchange {exchange!r} with routing key {routing_key!r}")
        if not queues and self.deadletter_queue:
            queues = [self.deadletter_queue]
        self._inplace_augment_message(message, exchange, routing_key)
        edge_id = edge_id_of(message.get("headers") or {})
        for queue in queues:
            self._put(queue, message, edge_id=edge_id)
        return Landing.LANDED if queues else None

    def basic_get(self: Any, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """One message, or None. With no_ack it is done at once; kombu's transports hand it out again later."""
        message = super().basic_get(queue, no_ack=False, **kwargs)  # type: ignore[misc]  # kombu's channel
        if message is not None and no_ack:
            self.basic_ack(message.delivery_tag)
        return message

    def unsettled(self: Any, delivery_tag: str) -> Any:
        """The message that was delivered under this tag and not settled since, or None. For kombu's own QoS."""
        qos = self.qos
        return None if delivery_tag in qos._dirty else qos._delivered.get(delivery_tag)

    @property
    def publish_timeout(self: Any) -> float:
        """Seconds to wait for the broker's answer: the transport option `publish_timeout`."""
        return float(self.connection.client.transport_options.get("publish_timeout", PUBLISH_TIMEOUT))
