"""What a row's payload says: kombu's JSON, and the marks of a redelivery in it.

The count of deliveries travels in the payload, because a message that is back in kombu's table has no other place
for it. It is a property of ours; the header `x-delivery-count`, which RabbitMQ's quorum queues use, is written when
a message is handed out, and both are taken off when somebody publishes the message anew.
"""

from __future__ import annotations

import base64
import json
from typing import Any, Final
from uuid import uuid4

DELIVERIES: Final = "idempotent-bus-deliveries"
DELIVERY_COUNT: Final = "x-delivery-count"


def encode(message: dict[str, Any]) -> str:
    """The payload as kombu's own transport writes it, under a delivery tag of its own."""
    properties = {**message["properties"], "delivery_tag": str(uuid4())}
    return json.dumps({**message, "properties": properties})


def forget_deliveries(message: dict[str, Any]) -> None:
    """A publish is a new message, also where its headers and properties were copied from a delivered one."""
    message.pop("redelivered", None)
    properties = message["properties"]
    properties.pop(DELIVERIES, None)
    properties["delivery_info"].pop("redelivered", None)
    headers = message.get("headers")
    if headers and DELIVERY_COUNT in headers:
        message["headers"] = {name: value for name, value in headers.items() if name != DELIVERY_COUNT}


def decode(payload: str) -> tuple[dict[str, Any], int]:
    """The raw message and how often it was given back before. Raises ValueError for what kombu could not have written.

    A message that a plain worker restored counts as given back once.
    """
    try:
        message = json.loads(payload)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(message, dict) or not isinstance(message.get("properties"), dict):
        raise ValueError("not a kombu message")
    properties = message["properties"]
    info = properties.setdefault("delivery_info", {})
    if not isinstance(info, dict) or not isinstance(message.get("headers") or {}, dict):
        raise ValueError("not a kombu message")
    _check_body(message.get("body"), properties.get("body_encoding"))
    redelivered = bool(message.get("redelivered") or info.get("redelivered"))
    if redelivered:
        message["redelivered"] = info["redelivered"] = True
    count = properties.get(DELIVERIES)
    return message, count if isinstance(count, int) else int(redelivered)


def _check_body(body: Any, encoding: Any) -> None:
    """Raise ValueError for a body of which kombu cannot even make a message."""
    if not body or not encoding or (isinstance(encoding, str) and encoding.lower() == "utf-8"):
        return
    if encoding != "base64" or not isinstance(body, str):
        raise ValueError("not a body of kombu's")
    base64.b64decode(body)


def hand_out(message: dict[str, Any], tag: str, deliveries: int) -> dict[str, Any]:
    """The raw message as the consumer gets it: with its tag, and how often it was given back before."""
    message["properties"]["delivery_tag"] = tag
    if deliveries:
        message["headers"] = {**(message.get("headers") or {}), DELIVERY_COUNT: deliveries}
    return message


def mark_redelivered(payload: str, deliveries: int) -> str:
    """The payload with its count."""
    message, _ = decode(payload)
    message["redelivered"] = True
    message["properties"]["delivery_info"]["redelivered"] = True
    message["properties"][DELIVERIES] = deliveries
    return json.dumps(message, separators=(",", ":"))
