"""kombu transports of ours, and what the rest of the library may ask of their channels.

A channel of ours (`idempotent_edge` is True) does three things that kombu's own do not:

* `basic_publish(...)` returns a `model.Landing`: LANDED, or DUPLICATE if every queue that it was routed to had a
  message with this `inner-msg-id` within the window; and raises `errors.Unroutable` if `mandatory` is set and no
  queue is bound. Land first, then mark, or both in one atomic step.
* fetching and registering as unacked is one atomic step; an unacked message whose consumer died comes back after
  the visibility timeout, to the queue that it came from, as one copy; a live consumer's messages do not.
* `basic_delay(delivery_tag, delay)`: one atomic step that settles the delivery and makes the message come back to
  the queue that it came from no sooner than `delay` seconds from now, kept by the broker.

Over SQS, Service Bus, Kafka and Pub/Sub our channels (`confirmed.py`) do as much of it as the broker allows: a publish
is LANDED when the broker has it, `edge_of(exchange, routing_key)` says whether it would refuse a copy, fetching and
restoring are the broker's own, and each module says how its delay is kept.

`register()` names them in kombu's table, as strings, so that a driver is imported only when a URL asks for it.
"""

from __future__ import annotations

from kombu.transport import TRANSPORT_ALIASES

__all__ = ["register"]

_ALIASES = {
    "idempotent-redis": "idempotent_bus.transports.redis.transport:Transport",
    "idempotent-rediss": "idempotent_bus.transports.redis.transport:SecureTransport",
    "idempotent-sentinel": "idempotent_bus.transports.redis.transport:SentinelTransport",
    "idempotent-sqla": "idempotent_bus.transports.sql.transport:Transport",
    "idempotent-sqs": "idempotent_bus.transports.sqs:Transport",
    "idempotent-azureservicebus": "idempotent_bus.transports.azureservicebus:Transport",
    "idempotent-kafka": "idempotent_bus.transports.kafka:Transport",
    "idempotent-gcpubsub": "idempotent_bus.transports.gcpubsub:Transport",
}


def register() -> None:
    """Make our URL schemes known to kombu. Idempotent."""
    TRANSPORT_ALIASES.update(_ALIASES)
