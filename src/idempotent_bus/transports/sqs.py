"""`idempotent-sqs://`: kombu's SQS transport with the inner-msg-id as the FIFO queues' deduplication id.

* FIFO queues (`*.fifo`): SQS accepts a second send with the same id within 5 minutes and drops it. That is the edge;
  SQS fixes the 5 minutes and does not say that it dropped a copy, so a receipt says `landed`: the message is there,
  once. A resend after 5 minutes is stored again and refused by the guarded consumer's record.
* Standard queues refuse nothing: the receipt says that the edge is at the consumer.
* `MessageGroupId`: the sender's, given as a message property; else every message is a group of its own, because SQS
  hands out a group's messages one after the other. No order is promised then, and none is lost: kombu's own default
  (one group for all) makes one slow or failing message hold up the whole queue.

A message that is delivered and not settled is kept invisible for as long as this process lives: the queue's visibility
timeout is renewed every third of it, so it may be much shorter than the longest task (`visibility_timeout`, 1800
seconds unless set, is what a queue gets that is created here). SQS itself ends that 12 hours after the receive. A
requeue makes the message visible at once. A delay is a visibility timeout too, so it ends at those 12 hours, and SQS
counts it as a receive: a redrive policy's `maxReceiveCount` must allow for the retries. In a group of several messages
SQS keeps the later ones back while an earlier one is held or delayed.

All other options are kombu's. A queue that is not there is created, as kombu does.
"""

from __future__ import annotations

import logging
import math
import uuid
import weakref
from typing import Any, ClassVar, Final

try:
    from botocore.exceptions import BotoCoreError, ClientError
except ModuleNotFoundError as error:
    text = "idempotent-sqs:// needs boto3: pip install 'idempotent-bus[sqs]'"
    raise ModuleNotFoundError(text, name=error.name) from error
from kombu.exceptions import OperationalError
from kombu.transport import SQS as kombu_sqs  # noqa: N811 - kombu's module has this name
from kombu.transport import virtual

from ..errors import ConfigurationError
from .confirmed import ConfirmedChannel, refused, unknown, unroutable
from .sqs_keeper import Held, Keeper

__all__ = ["Channel", "QoS", "Transport"]

logger = logging.getLogger(__name__)

#: SQS keeps a message invisible for at most 12 hours after it was received; some seconds are left for the way.
LONGEST_HOLD: Final = 12 * 3600 - 10

#: What SQS gives a queue that was made without a visibility timeout, in seconds.
SQS_TIMEOUT: Final = 30

_DEDUPLICATION: Final = "MessageDeduplicationId"
_GROUP: Final = "MessageGroupId"
_GONE: Final = frozenset({"AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist"})
_TRY_AGAIN: Final = ("Throttl", "RequestLimitExceeded", "OverLimit", "TooManyRequests")


class QoS(kombu_sqs.QoS):
    """What was delivered and not settled; each of them is kept invisible until it is."""

    def append(self, message: Any, delivery_tag: str) -> None:
        super().append(message, delivery_tag)
        info = message.delivery_info
        if "sqs_queue" in info:
            url = info["sqs_queue"]
            self.channel.keeper.add(Held(info["queue"], url, delivery_tag, self.channel.timeout_of(info["queue"], url)))

    def ack(self, delivery_tag: str) -> None:
        self.channel.keeper.remove(delivery_tag)
        super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        super().reject(delivery_tag, requeue=requeue)
        self.channel.keeper.remove(delivery_tag)


class Channel(ConfirmedChannel, kombu_sqs.Channel):
    """A channel of ours. Publishing and consuming belong to one thread; acks, rejects, delays may come from others."""

    QoS = QoS

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        # Weakly: the keeper's thread must not keep a channel alive that somebody forgot to close.
        self.keeper = Keeper(weakref.WeakMethod(self._renew))
        self._timeouts: dict[str, int] = {}

    # --- publishing -------------------------------------------------------------------------------

    def refuses_copies(self, queue: str) -> bool:
        """True for FIFO queues."""
        return queue.endswith(".fifo")

    def _put(self, queue: str, message: dict[str, Any], *, edge_id: str | None = None, **kwargs: Any) -> None:
        properties = dict(message["properties"])  # kombu takes its message attributes out of it
        if queue.endswith(".fifo"):
            if edge_id is not None and properties.setdefault(_DEDUPLICATION, edge_id) != edge_id:
                raise ConfigurationError(f"leave {_DEDUPLICATION} out: over this transport it is the inner-msg-id")
            properties.setdefault(_GROUP, edge_id or uuid.uuid4().hex)
        try:
            super()._put(queue, {**message, "properties": properties})
        except ClientError as error:
            raise self._judged(queue, error) from error

    def _judged(self, queue: str, error: ClientError) -> Exception:
        code = str(error.response.get("Error", {}).get("Code"))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _GONE:
            self._queue_cache.pop(self.canonical_queue_name(queue), None)
            return unroutable(f"SQS knows no queue {queue!r}")
        if status >= 500:
            return unknown(f"SQS answered {code} ({status})")
        return refused(f"SQS refused the message: {error}", final=not any(word in code for word in _TRY_AGAIN))

    # --- consuming --------------------------------------------------------------------------------

    def basic_delay(self, delivery_tag: str, delay: float) -> bool:
        """Settle the delivery; SQS makes the message visible in its queue again `delay` seconds from now.

        At most 12 hours after it was received. False: the message had gone back to its queue before, and stays there.
        """
        with self.keeper.lock:
            held = self.keeper.get(delivery_tag)
            if held is None:
                return False
            seconds = min(math.ceil(max(delay, 0.0)), max(0, int(LONGEST_HOLD - held.age())))
            done = self._change_visibility(held, seconds)
            self.keeper.remove(delivery_tag)
        self.qos._quick_ack(delivery_tag)
        return done

    def _message_to_python(self, message: Any, queue_name: str, q_url: str) -> Any:
        payload = super()._message_to_python(message, queue_name, q_url)
        info = payload.get("properties", {}).get("delivery_info")
        if info is not None and "sqs_queue" in info:
            info["queue"] = queue_name
            info["redelivered"] = int(message.get("Attributes", {}).get("ApproximateReceiveCount", 1)) > 1
        return payload

    def _delete_message(self, queue_name: str, message: Any) -> None:
        # kombu's goes through an event loop that nobody may be running.
        client = self.sqs(queue=self.canonical_queue_name(queue_name))
        client.delete_message(QueueUrl=self._new_queue(queue_name), ReceiptHandle=message["ReceiptHandle"])

    def _restore(self, message: Any, *args: Any, **kwargs: Any) -> None:
        """Back to the queue that it came from, at once; kombu looks for queues of the exchange, and waits 10 s."""
        with self.keeper.lock:
            held = self.keeper.get(message.delivery_tag)
            if held is not None:
                self._change_visibility(held, 0)
                self.keeper.remove(message.delivery_tag)

    def _change_visibility(self, held: Held, seconds: int) -> bool:
        client = self.sqs(queue=self.canonical_queue_name(held.queue))
        try:
            client.change_message_visibility(QueueUrl=held.url, ReceiptHandle=held.tag, VisibilityTimeout=seconds)
        except ClientError as error:
            logger.warning("a message of queue %s was not held any more: %s", held.queue, error)
            return False
        return True

    def timeout_of(self, queue: str, url: str) -> int:
        """The visibility timeout of the queue itself, in seconds; asked once. The option holds for new queues only."""
        if url not in self._timeouts:
            client, name = self.sqs(queue=self.canonical_queue_name(queue)), "VisibilityTimeout"
            try:
                answer = client.get_queue_attributes(QueueUrl=url, AttributeNames=[name])
                self._timeouts[url] = int(answer["Attributes"][name])
            except ClientError as error:
                logger.warning("assuming SQS's own visibility timeout for queue %s: %s", queue, error)
                self._timeouts[url] = SQS_TIMEOUT
        return self._timeouts[url]

    def _renew(self, batch: list[Held]) -> None:
        """Keep up to 10 messages of one queue invisible. The keeper's thread, which holds its lock."""
        entries = [
            {"Id": str(at), "ReceiptHandle": held.tag, "VisibilityTimeout": held.timeout}
            for at, held in enumerate(batch)
        ]
        client = self.sqs(queue=self.canonical_queue_name(batch[0].queue))
        answer = client.change_message_visibility_batch(QueueUrl=batch[0].url, Entries=entries)
        for failure in answer.get("Failed", ()):
            held = batch[int(failure["Id"])]
            if failure.get("SenderFault"):  # gone, or held for 12 hours: asking again cannot help
                self.keeper.remove(held.tag)
            logger.warning("a message of queue %s could not be kept invisible: %s", held.queue, failure.get("Message"))

    def close(self) -> None:
        if not self.closed:
            self.keeper.stop()
        super().close()


class Transport(kombu_sqs.Transport):
    """`idempotent-sqs://`."""

    Channel = Channel
    # A lost answer is no refusal: kombu counts botocore's errors as both.
    connection_errors: ClassVar[Any] = (*virtual.Transport.connection_errors, OperationalError, BotoCoreError, OSError)
    channel_errors: ClassVar[Any] = virtual.Transport.channel_errors

    @staticmethod
    def limit_publish(options: dict[str, Any], seconds: float) -> None:
        """For a connection that only publishes: an answer is awaited so long, and resending is left to the caller."""
        config = dict(options.get("client-config") or {})
        config.setdefault("connect_timeout", seconds)
        config.setdefault("read_timeout", seconds)
        config.setdefault("retries", {"total_max_attempts": 1})
        options["client-config"] = config
