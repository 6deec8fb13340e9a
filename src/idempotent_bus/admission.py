"""What a message must show before anything is run for it: that it can be read, whose it is, and its biz-id.

What is refused here has no usable identity, so no record is touched: it goes to the dead letter with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from kombu.message import Message

from .errors import ConfigurationError, InvalidBizId, InvalidBody, InvalidMessage
from .headers import DEAD_AT, REDRIVE, UNREADABLE
from .headers import INNER_MSG_ID as INNER_MSG_ID_HEADER
from .identity import (
    INNER_MSG_ID,
    BizIdSpec,
    FingerprintSpec,
    canonical_biz_id,
    check_scope,
    check_tenant,
    extract_biz_id,
    fingerprint,
    record_key,
)
from .kombu_message import redrives
from .msgid import published_at_of
from .signing import Trust

__all__ = ["MAX_BODY", "Admission", "Identity"]

#: The longest body that is looked at unless the consumer says otherwise, in bytes.
MAX_BODY: Final = 16 * 2**20


@dataclass(slots=True)  # not frozen: one is made for each message, and that takes twice as long
class Identity:
    """Who a message is, and what else its record needs; see `work.Work`."""

    biz_id: str
    key: bytes
    fingerprint: bytes | None
    inner_msg_id: str | None
    redrive: int
    published_at: float | None


@dataclass(frozen=True, slots=True)
class Admission:
    """The conditions of one scope, as `idempotent_consumer` takes them. Raises ConfigurationError if one is wrong."""

    scope: str
    biz_id: BizIdSpec
    fingerprint: FingerprintSpec = True
    tenant: str = ""
    trust: Trust | None = None
    max_body: int | None = MAX_BODY

    def __post_init__(self) -> None:
        biz_id = self.biz_id
        if not (isinstance(biz_id, str) and biz_id) and not callable(biz_id) and biz_id is not INNER_MSG_ID:
            raise ConfigurationError(
                "biz_id must be a path such as 'payment_id', a function of the body, or INNER_MSG_ID"
            )
        if not isinstance(self.fingerprint, (bool, str, Sequence)):
            raise ConfigurationError("fingerprint must be True, False, or names of fields of the body")
        if self.trust is not None and not isinstance(self.trust, Trust):
            raise ConfigurationError("trust must be a Trust, made with the producers' keys")
        if self.max_body is not None and (type(self.max_body) is not int or self.max_body < 1):
            raise ConfigurationError("max_body must be a number of bytes, or None for no limit")
        check_scope(self.scope)
        check_tenant(self.tenant)

    def producer_of(self, message: Message) -> str:
        """Whose records the message belongs to: a trusted producer's, or everybody's (""). Its body is not decoded.

        Raises InvalidMessage if it is too large or cannot be read, and Untrusted.
        """
        self._check_size(message)
        if message.errors:  # kombu has not decompressed it, so that nobody can see what was signed
            error = message.errors[0][1]
            raise (
                error
                if isinstance(error, InvalidMessage)
                else InvalidBody(f"cannot be decoded: {type(error).__name__}")
            )
        if UNREADABLE in message.headers:
            raise InvalidMessage("the message's properties could not be read")
        if self.trust is None:
            return ""
        producer = self.trust.verify(message.headers, message.body, message.content_type, message.content_encoding)
        return producer if self.trust.separate else ""

    def identify(self, body: Any, message: Message, producer: str) -> Identity:
        """The identity of a message. producer: as `producer_of` says. Raises InvalidMessage if it has none."""
        inner_msg_id = message.headers.get(INNER_MSG_ID_HEADER)
        if self.biz_id is INNER_MSG_ID:
            if inner_msg_id is None:
                raise InvalidBizId(f"the message has no header {INNER_MSG_ID_HEADER!r}, which is this scope's id")
            biz_id = canonical_biz_id(inner_msg_id)
        else:
            biz_id = extract_biz_id(self.biz_id, body)  # type: ignore[arg-type]  # INNER_MSG_ID is handled above
        digest = fingerprint(body, self.fingerprint)
        redrive = redrives(message.headers)
        if redrive is None:
            raise InvalidMessage(f"the header {REDRIVE!r} is not a number of redrives")
        return Identity(
            biz_id=biz_id,
            key=record_key(self.scope, biz_id, tenant=self.tenant, producer=producer),
            fingerprint=digest,
            inner_msg_id=inner_msg_id if isinstance(inner_msg_id, str) else None,
            redrive=redrive,
            published_at=_in_the_bus_since(message, redrive),
        )

    def _check_size(self, message: Message) -> None:
        limit, body = self.max_body, message.body
        if limit is None or not isinstance(body, (bytes, bytearray, str)):
            return
        size = len(body)
        if isinstance(body, str) and size <= limit < 4 * size:  # py-amqp decodes what it can
            size = len(body.encode(errors="surrogatepass"))
        if size > limit:
            raise InvalidBody(f"the body is too large: {size} bytes, and max_body is {limit}")


def _in_the_bus_since(message: Message, redrive: int) -> float | None:
    """When the message was published, or died if it was redriven since; see `Work.published_at`."""
    published = published_at_of(message.headers.get(INNER_MSG_ID_HEADER), message.properties.get("timestamp"))
    died = published_at_of(None, message.headers.get(DEAD_AT)) if redrive else None  # a header can say anything
    if published is None or died is None:
        return died if published is None else published
    return max(published, died)
