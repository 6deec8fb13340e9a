"""`idempotent-kafka://`: kombu's Kafka transport that reports what was not delivered and commits only what is done.

* A publish waits for its delivery report and raises if it says no or does not come; `acks=all` and
  `enable.idempotence=true` are always on. How many replicas that is, topics decide (`replication_factor`, and
  `min.insync.replicas` in `topic_config`; kombu creates topics with one replica).
* Kafka's idempotent producer drops only its own repetitions within one session. A resend of ours after a doubt is a
  second record, so receipts say that the edge is at the consumer. The inner-msg-id is a record header too.
* An ack commits the offset up to which everything of its partition is done, and no further. Whoever gets the
  partition next gets the rest again, what was done out of order included: the consumer's record refuses that. kombu's
  own commits the position of the last poll, and so loses what was fetched and not handled.
* A delay or a requeue keeps the message in this consumer's memory until it is due, with its offset uncommitted: no
  neighbour waits, nothing is lost, and if the process dies it comes back sooner. Long delays make long repetitions.

Every delivery is marked as redelivered, since Kafka does not say which is the first. A handler must return within
`max.poll.interval.ms` (5 minutes unless set in `kafka_consumer_config`), or the partition goes to somebody else.

`publish_timeout` (seconds, 30): how long to wait for a delivery report. All other options are kombu's.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from queue import Empty
from typing import Any, ClassVar, Final

try:
    from confluent_kafka import KafkaError, KafkaException, TopicPartition
except ModuleNotFoundError as error:
    text = "idempotent-kafka:// needs confluent-kafka: pip install 'idempotent-bus[kafka]'"
    raise ModuleNotFoundError(text, name=error.name) from error
from kombu.exceptions import OperationalError
from kombu.transport import confluentkafka as kombu_kafka
from kombu.transport import virtual
from kombu.utils.encoding import str_to_bytes
from kombu.utils.json import dumps, loads

from ..headers import INNER_MSG_ID
from .confirmed import ConfirmedChannel, refused, unknown, unroutable
from .kafka_offsets import Fetched, Offsets

__all__ = ["Channel", "QoS", "Transport"]

logger = logging.getLogger(__name__)

_UNROUTABLE: Final = ("UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_TOPIC")
#: What a broker, or the library before it sent anything, can only have answered without storing the record.
_REFUSED: Final = (
    "MSG_SIZE_TOO_LARGE",
    "RECORD_LIST_TOO_LARGE",
    "INVALID_MSG",
    "INVALID_RECORD",
    "POLICY_VIOLATION",
    "TOPIC_AUTHORIZATION_FAILED",
    "TOPIC_EXCEPTION",
)
#: Settings of the user's that would take back the promise, and other names of ours.
_OURS: Final = ("acks", "request.required.acks", "enable.idempotence", "message.timeout.ms", "delivery.timeout.ms")
#: How much longer than the library's own time limit its report is awaited, in seconds.
_GRACE: Final = 1.0


class QoS(kombu_kafka.QoS):
    """What was delivered and not settled; kombu's count, our offsets."""

    def ack(self, delivery_tag: str) -> None:
        if self._not_yet_acked.pop(delivery_tag, None) is not None:
            self.channel.done(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if self._not_yet_acked.pop(delivery_tag, None) is not None:
            if requeue:
                self.channel.put_off(delivery_tag, 0.0)
            else:
                self.channel.done(delivery_tag)


class Channel(ConfirmedChannel, kombu_kafka.Channel):
    """A channel of ours, for one thread."""

    QoS = QoS

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        self._offsets = Offsets()
        self._fetched: dict[str, Fetched] = {}
        self._later: dict[str, list[tuple[float, int, Fetched]]] = {}
        self._order = itertools.count()
        self._repeated = False
        self._no_ack: set[str] = set()
        super().__init__(connection, **kwargs)

    # --- publishing -------------------------------------------------------------------------------

    def _get_producer(self, queue: str) -> Any:
        topic = self.sanitize_queue_name(queue)
        producer = self._kafka_producers.get(topic)
        if producer is None:
            given = {**self.common_config, **(self.options.get("kafka_producer_config") or {})}
            config = {name: value for name, value in given.items() if name not in _OURS}
            config |= {
                "acks": "all",
                "enable.idempotence": True,
                "message.timeout.ms": max(1, int(self.publish_timeout * 1000)),
            }
            producer = self._kafka_producers[topic] = kombu_kafka.Producer(config)
        return producer

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        topic = self.sanitize_queue_name(queue)
        producer = self._get_producer(topic)
        reports: list[Any] = []
        inner_msg_id = (message.get("headers") or {}).get(INNER_MSG_ID)
        headers = {"headers": [(INNER_MSG_ID, inner_msg_id.encode())]} if isinstance(inner_msg_id, str) else {}
        try:
            producer.produce(
                topic, str_to_bytes(dumps(message)), on_delivery=lambda error, _: reports.append(error), **headers
            )
        except BufferError as error:
            raise refused("the producer's own queue is full: nothing was sent", final=False) from error
        except KafkaException as error:
            raise _judged(topic, error.args[0]) from error
        producer.flush(self.publish_timeout + _GRACE)
        if not reports:
            # It must not be sent later on: whoever is told "unknown" sends it again.
            self._kafka_producers.pop(topic, None)
            producer.purge()
            raise unknown("Kafka sent no delivery report")
        if reports[0] is not None:
            raise _judged(topic, reports[0]) from KafkaException(reports[0])

    # --- consuming --------------------------------------------------------------------------------

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        (self._no_ack.add if no_ack else self._no_ack.discard)(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def _get_consumer(self, queue: str) -> Any:
        topic = self.sanitize_queue_name(queue)
        known = topic in self._kafka_consumers
        consumer = super()._get_consumer(topic)
        if not known:
            consumer.subscribe([topic], on_revoke=self._on_revoke, on_lost=self._on_lost)
        return consumer

    def _get(self, queue: str, timeout: float | None = None, **kwargs: Any) -> dict[str, Any]:
        topic = self.sanitize_queue_name(queue)
        # What was put off takes turns with what is new: neither may starve the other.
        fetched = None if self._repeated else self._due(topic)
        if fetched is None:
            self._repeated = False
            fetched = self._poll_topic(topic) or self._due(topic)
        else:
            self._repeated = True
        if fetched is None:
            raise Empty
        payload: dict[str, Any] = {**loads(fetched.value), "topic": topic}
        tag = payload["properties"]["delivery_tag"] = self._next_delivery_tag()
        info = payload["properties"].setdefault("delivery_info", {})
        info.update(queue=queue, redelivered=True)
        self._fetched[tag] = fetched
        if queue in self._no_ack:
            self.done(tag)
        return payload

    def _poll_topic(self, topic: str) -> Fetched | None:
        later = self._later.get(topic)
        wait = self.wait_time_seconds
        if later:
            wait = min(wait, max(0.0, later[0][0] - time.monotonic()))
        record = self._get_consumer(topic).poll(wait)
        if not record:
            return None
        if record.error():
            logger.error("Kafka: %s", record.error())
            return None
        # Noted before it is read: a record that is no message of kombu's stops the commits instead of being skipped.
        return self._offsets.began(record.topic(), record.partition(), record.offset(), record.value())

    def _due(self, topic: str) -> Fetched | None:
        later = self._later.get(topic)
        while later and later[0][0] <= time.monotonic():
            fetched = heapq.heappop(later)[2]
            if self._offsets.is_ours(fetched):
                return fetched
        return None

    def basic_delay(self, delivery_tag: str, delay: float) -> bool:
        """Settle the delivery; this consumer delivers the message again `delay` seconds from now.

        False: the partition was taken away meanwhile, and whoever has it now gets the message.
        """
        if self.qos._not_yet_acked.pop(delivery_tag, None) is None:
            return False
        return self.put_off(delivery_tag, delay)

    def put_off(self, delivery_tag: str, delay: float) -> bool:
        """Keep a fetched message for later, its offset uncommitted. False: it is not ours any more."""
        fetched = self._fetched.pop(delivery_tag, None)
        if fetched is None or not self._offsets.is_ours(fetched):
            return False
        due = time.monotonic() + max(delay, 0.0)
        heapq.heappush(self._later.setdefault(fetched.topic, []), (due, next(self._order), fetched))
        return True

    def done(self, delivery_tag: str) -> None:
        """A fetched message is done: commit what is done before it and next to it, if that is more than before."""
        fetched = self._fetched.pop(delivery_tag, None)
        offset = None if fetched is None else self._offsets.done(fetched)
        consumer = None if fetched is None else self._kafka_consumers.get(fetched.topic)
        if fetched is not None and offset is not None and consumer is not None:
            # Without waiting: a commit that is lost means a repetition, and the next one says more.
            position = TopicPartition(fetched.topic, fetched.partition, offset)
            consumer.commit(offsets=[position], asynchronous=True)

    def _on_revoke(self, consumer: Any, partitions: list[Any]) -> None:
        self._commit_now(consumer, [(partition.topic, partition.partition) for partition in partitions])
        self._on_lost(consumer, partitions)

    def _on_lost(self, consumer: Any, partitions: list[Any]) -> None:
        for partition in partitions:
            self._offsets.forget(partition.topic, partition.partition)

    def _commit_now(self, consumer: Any, partitions: list[tuple[str, int]]) -> None:
        offsets = [
            TopicPartition(topic, partition, offset)
            for topic, partition in partitions
            if (offset := self._offsets.position(topic, partition)) is not None
        ]
        if offsets:
            try:
                consumer.commit(offsets=offsets, asynchronous=False)
            except KafkaException as error:
                logger.warning("offsets could not be committed; the next consumer gets more again: %s", error)

    def close(self) -> None:
        """Commit what is done, and leave the group. What is not done goes to the next consumer."""
        if not self.closed:
            for topic, consumer in self._kafka_consumers.items():
                self._commit_now(consumer, self._offsets.partitions(topic))
        super().close()


class Transport(kombu_kafka.Transport):
    """`idempotent-kafka://`."""

    Channel = Channel
    connection_errors: ClassVar[Any] = (
        *virtual.Transport.connection_errors,
        OperationalError,
        KafkaException,
        OSError,
    )

    @staticmethod
    def limit_publish(options: dict[str, Any], seconds: float) -> None:
        """For a connection that only publishes: a report is awaited so long."""
        options.setdefault("publish_timeout", seconds)


def _judged(topic: str, error: Any) -> Exception:
    """What a delivery report means. Everything that is not known to be a refusal may have been stored."""
    code = error.code()
    if code in _codes(_UNROUTABLE):
        return unroutable(f"Kafka knows no topic {topic!r}")
    if code in _codes(_REFUSED):
        return refused(f"Kafka refused the record ({error})")
    return unknown(f"Kafka did not confirm the record ({error})")


def _codes(names: tuple[str, ...]) -> set[int]:
    return {getattr(KafkaError, name) for name in names if hasattr(KafkaError, name)}
