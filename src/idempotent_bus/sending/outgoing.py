"""One logical publish, serialised once: every resend of it is the same bytes under the same inner-msg-id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kombu import Exchange, Queue
from kombu.compression import compress
from kombu.exceptions import EncodeError
from kombu.serialization import dumps

from ..errors import ConfigurationError, InvalidBody
from ..headers import INNER_MSG_ID
from ..signing import Signer, raw_body

__all__ = ["Outgoing", "prepare", "serialised"]

_PERSISTENT: Final = 2

# What kombu's publish takes and this one decides itself. As message properties they would be silently ignored.
_NOT_PROPERTIES: Final = {
    "confirm_timeout": "give it to IdempotentProducer",
    "delivery_mode": "messages are always persistent",
    "immediate": "RabbitMQ has no immediate publishing",
    "mandatory": "it is always on",
    "retry": "resending is always on; give retry=ResendPolicy(...) to IdempotentProducer",
    "retry_policy": "give retry=ResendPolicy(...) to IdempotentProducer",
    "timeout": "give confirm_timeout to IdempotentProducer",
}


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message ready to be sent, as often as it takes. inner_msg_id: what its header says; None if it has none."""

    inner_msg_id: str | None
    body: Any
    content_type: str | None
    content_encoding: str | None
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    priority: int
    exchange: str
    routing_key: str
    declare: tuple[Any, ...]


def serialised(body: Any, serializer: str | None) -> tuple[str, str, Any]:
    """Content type, content encoding and the body as kombu's serializer of that name, or its default, makes it.

    Raises InvalidBody if it cannot.
    """
    try:
        made: tuple[str, str, Any] = dumps(body, serializer=serializer)
    except EncodeError as error:
        raise InvalidBody(f"the body cannot be serialised: {type(error.__cause__ or error).__name__}") from error
    return made


def prepare(
    body: Any,
    *,
    inner_msg_id: str | None,
    exchange: Exchange | str | None,
    routing_key: str | None,
    headers: Mapping[str, Any] | None,
    declare: Iterable[Any],
    serializer: str | None,
    content_type: str | None,
    content_encoding: str | None,
    compression: str | None,
    priority: int | None,
    expiration: float | None,
    properties: dict[str, Any],
    signer: Signer | None = None,
) -> Outgoing:
    """Serialise, sign and check. Raises InvalidBody if the body cannot be serialised, ConfigurationError for bad
    options. signer: signs it, which needs an inner_msg_id; None: headers that came along stay.
    """
    for name in properties:
        if name in _NOT_PROPERTIES:
            raise ConfigurationError(f"publish() takes no {name}: {_NOT_PROPERTIES[name]}")
    all_headers = dict(headers) if headers else {}
    if inner_msg_id is not None:
        # Always overwritten: headers that were copied from another message bring that message's id along.
        all_headers[INNER_MSG_ID] = inner_msg_id
    if content_type is None:
        content_type, content_encoding, body = serialised(body, serializer)
    elif isinstance(body, str):
        content_encoding = content_encoding or "utf-8"
        body = raw_body(body, content_encoding)
    else:
        content_encoding = content_encoding or "binary"
    if signer is not None and inner_msg_id is not None:
        all_headers.update(signer.headers(inner_msg_id, body, content_type, content_encoding))
    if compression is not None:
        try:
            body, all_headers["compression"] = compress(body, compression)
        except KeyError:
            raise ConfigurationError(f"kombu knows no compression {compression!r}") from None
    properties["delivery_mode"] = _PERSISTENT
    if expiration is not None:
        properties["expiration"] = str(int(expiration * 1000))
    if isinstance(properties.get("reply_to"), Queue):
        properties["reply_to"] = properties["reply_to"].name
    entities = tuple(declare)
    if isinstance(exchange, Exchange):
        if exchange.name:
            entities = (exchange, *entities)
        exchange = exchange.name
    return Outgoing(
        inner_msg_id=inner_msg_id,
        body=body,
        content_type=content_type,
        content_encoding=content_encoding,
        headers=all_headers,
        properties=properties,
        priority=priority or 0,
        exchange=exchange or "",
        routing_key=routing_key or "",
        declare=entities,
    )
