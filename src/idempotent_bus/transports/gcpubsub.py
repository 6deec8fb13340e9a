"""`idempotent-gcpubsub://projects/<project>`: kombu's Pub/Sub transport that waits for the answer to a publish.

* A publish waits for its future, at most `publish_timeout` (seconds, 30), and raises what it says. Pub/Sub does not
  drop copies that are published twice, so receipts say that the edge is at the consumer. The inner-msg-id is an
  attribute of the message too.
* A message goes once to each topic. kombu publishes once for every queue that is bound, and every queue of the
  exchange then gets all of these copies.
* A queue must be declared in this process before it can be published to. Through the default exchange it must be bound
  with its own name as routing key: a subscription filters by the key, and would drop another one silently. A dead
  letter needs an exchange too: declare `Queue("cards.dead", Exchange("cards.dead"), routing_key="cards.dead")`.
* A requeue gives the message back to its own subscription at once, a reject drops it, a delay (at most 600 seconds,
  Pub/Sub's longest) makes it come back after that time. kombu's transport publishes a requeued message anew to all
  subscriptions, and keeps the old one, like a rejected one, from everybody for as long as the process lives.

kombu keeps a message for `expiration_seconds`, one day unless set; set it longer than your longest outage. Every
delivery is marked as redelivered, since Pub/Sub does not say which is the first. All other options are kombu's.
"""

from __future__ import annotations

import logging
import math
from typing import Any, ClassVar, Final

try:
    from google.api_core import exceptions as api_errors
    from google.api_core.retry import Retry
except ModuleNotFoundError as error:
    text = "idempotent-gcpubsub:// needs its SDK: pip install 'idempotent-bus[gcpubsub]'"
    raise ModuleNotFoundError(text, name=error.name) from error
from concurrent.futures import TimeoutError as NoAnswer

from kombu.exceptions import OperationalError
from kombu.transport import gcpubsub as kombu_pubsub
from kombu.transport import virtual
from kombu.utils.json import dumps

from ..headers import INNER_MSG_ID
from .confirmed import ConfirmedChannel, refused, unknown, unroutable

__all__ = ["Channel", "Transport"]

logger = logging.getLogger(__name__)

#: Pub/Sub's longest acknowledgement deadline, in seconds.
LONGEST_DELAY: Final = 600

_REFUSED: Final = (
    api_errors.InvalidArgument,
    api_errors.PermissionDenied,
    api_errors.Unauthenticated,
    api_errors.FailedPrecondition,
)


class Channel(ConfirmedChannel, kombu_pubsub.Channel):
    """A channel of ours."""

    #: The routing key that a queue's subscription lets pass; shared by all channels, as kombu's `_queue_cache` is.
    _filters: ClassVar[dict[str, str]] = {}

    # --- publishing -------------------------------------------------------------------------------

    def _queue_bind(self, exchange: str, routing_key: str, pattern: Any, queue: str) -> None:
        super()._queue_bind(exchange, routing_key, pattern, queue)
        self._filters[self.entity_name(queue)] = routing_key

    def routes(self, exchange: str, routing_key: str) -> list[str]:
        """One queue for each topic that the message goes to: a topic hands it to all of its queues."""
        queues = super().routes(exchange, routing_key)
        by_topic: dict[str, str] = {}
        for queue in queues:
            described = self._queue_cache.get(self.entity_name(queue))
            if described is not None:
                by_topic.setdefault(described.topic_path, queue)
        return list(by_topic.values())

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        name = self.entity_name(queue)
        described = self._queue_cache.get(name)
        routing_key = self._get_routing_key(message)
        if described is None:
            raise unroutable(f"this process has declared no queue {queue!r}")
        if self._filters.get(name, routing_key) != routing_key:
            raise unroutable(f"queue {queue!r} lets no message with routing key {routing_key!r} pass")
        self._publish(described.topic_path, message, routing_key=routing_key)

    def _put_fanout(self, exchange: str, message: dict[str, Any], routing_key: str, **kwargs: Any) -> None:
        self._lookup(exchange, routing_key)
        self._publish(self.publisher.topic_path(self.project_id, exchange), message)

    def _publish(self, topic: str, message: dict[str, Any], **attributes: str) -> None:
        inner_msg_id = (message.get("headers") or {}).get(INNER_MSG_ID)
        if isinstance(inner_msg_id, str):
            attributes[INNER_MSG_ID] = inner_msg_id
        seconds = self.publish_timeout
        try:
            future = self.publisher.publish(
                topic, dumps(message).encode(), retry=Retry(deadline=seconds), timeout=seconds, **attributes
            )
            future.result(timeout=seconds)
        except api_errors.NotFound as error:
            raise unroutable("Pub/Sub knows no such topic") from error
        except _REFUSED as error:
            raise refused(f"Pub/Sub refused the message ({type(error).__name__})") from error
        except NoAnswer as error:
            raise unknown(f"Pub/Sub gave no answer within {seconds:g} s") from error
        except Exception as error:
            # The SDK raises errors of several libraries here; each leaves open whether the message was stored.
            raise unknown(f"Pub/Sub did not confirm the message ({type(error).__name__})") from error

    # --- consuming --------------------------------------------------------------------------------

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        return _marked(super()._get(queue, timeout), queue)

    def _get_bulk(self, queue: str, timeout: float) -> Any:
        queue, payloads = super()._get_bulk(queue, timeout)
        return queue, [_marked(payload, queue) for payload in payloads]

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Requeue: back to its own subscription at once. Else it is dropped."""
        if requeue:
            self.basic_delay(delivery_tag, 0)
        else:
            self.basic_ack(delivery_tag)

    def basic_delay(self, delivery_tag: str, delay: float) -> bool:
        """Settle the delivery; Pub/Sub delivers it again `delay` seconds from now, at most 600."""
        message = self.unsettled(delivery_tag)
        if message is None:
            return False
        held = message.delivery_info["gcpubsub_message"]
        # First out of kombu's list, whose thread would prolong the deadline.
        described = self._queue_cache.get(held["queue"])
        if described is not None:
            described.unacked_ids.remove(held["ack_id"])
        try:
            self.subscriber.modify_ack_deadline(
                request={
                    "subscription": held["subscription_path"],
                    "ack_ids": [held["ack_id"]],
                    "ack_deadline_seconds": min(math.ceil(max(delay, 0.0)), LONGEST_DELAY),
                }
            )
        except api_errors.GoogleAPICallError as error:
            # Nobody prolongs it any more, so it comes back when its present deadline is over.
            logger.warning("a delay was not taken, the message comes back by itself: %s", error)
        self.qos._quick_ack(delivery_tag)
        return True


class Transport(kombu_pubsub.Transport):
    """`idempotent-gcpubsub://`."""

    Channel = Channel
    connection_errors: ClassVar[Any] = (
        *kombu_pubsub.Transport.connection_errors,
        OperationalError,
        api_errors.GoogleAPICallError,
    )
    # A lost answer is no refusal: kombu counts the publisher's timeouts among these.
    channel_errors: ClassVar[Any] = virtual.Transport.channel_errors

    @staticmethod
    def limit_publish(options: dict[str, Any], seconds: float) -> None:
        """For a connection that only publishes: an answer is awaited so long."""
        options.setdefault("publish_timeout", seconds)


def _marked(payload: dict[str, Any], queue: str) -> dict[str, Any]:
    payload["properties"]["delivery_info"].update(queue=queue, redelivered=True)
    return payload
