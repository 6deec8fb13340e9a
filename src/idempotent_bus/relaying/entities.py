"""Exchanges and queues as a row of the outbox describes them, so that the relay can declare them before it sends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kombu import Exchange, Queue

__all__ = ["Described", "described", "described_exchange"]

_OF_EXCHANGE: Final = ("type", "durable", "auto_delete", "arguments", "passive", "no_declare")
_OF_QUEUE: Final = (
    "routing_key",
    "durable",
    "exclusive",
    "auto_delete",
    "no_declare",
    "expires",
    "message_ttl",
    "max_length",
    "max_length_bytes",
    "max_priority",
    "queue_arguments",
    "binding_arguments",
)


def described_exchange(exchange: Exchange) -> dict[str, Any]:
    """What the relay declares an exchange by, beside its name."""
    return {name: getattr(exchange, name) for name in _OF_EXCHANGE}


def described(queue: Queue) -> dict[str, Any]:
    """What the relay declares a queue by, with its exchange."""
    exchange = queue.exchange
    own = {name: getattr(queue, name) for name in _OF_QUEUE}
    return {"name": queue.name, "exchange": {"name": exchange.name, **described_exchange(exchange)}, **own}


class Described:
    """Makes each entity that rows describe once, so that a producer declares it once. For one thread at a time."""

    def __init__(self) -> None:
        self._exchanges: dict[str, Exchange] = {}
        self._queues: dict[str, Queue] = {}

    def exchange(self, name: str, values: Mapping[str, Any]) -> Exchange:
        """The exchange of this name."""
        known_as = f"{name} {sorted(values.items())}"
        if known_as not in self._exchanges:
            self._exchanges[known_as] = Exchange(name, **values)
        return self._exchanges[known_as]

    def queue(self, values: Mapping[str, Any]) -> Queue:
        """The queue."""
        known_as = repr(sorted(values.items()))
        if known_as not in self._queues:
            own = {name: values[name] for name in _OF_QUEUE if name in values}
            exchange = dict(values["exchange"])
            self._queues[known_as] = Queue(values["name"], self.exchange(exchange.pop("name"), exchange), **own)
        return self._queues[known_as]
