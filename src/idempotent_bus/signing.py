"""Signatures: which producer a message is from, and that its id and its body are the ones that it sent.

Without them whoever may publish can send a message under somebody else's inner-msg-id or biz-id, and the real one is
then taken for a copy of it. A producer with a `Signer` signs each message; a consumer with a `Trust` runs only what a
producer of its list has signed, and puts the rest into the dead letter before any record is touched.

Signed (HMAC-SHA256, with a key that producer and consumer share): the producer's name, the inner-msg-id, the body as
serialised, before compression, with the content type and encoding by which it is read: the same bytes read in another
way may show another biz-id.

What this cannot do:

* At a broker's edge that the client itself runs (Redis, SQL, memory) nobody checks anything: who may write to that
  Redis may write a mark, and the message of that id is then refused there as a duplicate. It may delete messages, too.
  Keep such brokers to those whom you trust.
* Other headers and properties (redrive number, priority, timestamp) and the exchange, routing key and queue are not
  signed. A signed message that is sent again, or into another queue, is a copy, as a broker's own are: a consumer of
  its scope takes it for what it is, a duplicate, and a consumer with another scope runs it. Who can alter the redrive
  number can have a message that failed tried again. One key for each audience keeps them apart.
* The key is shared: a consumer could sign too. A producer that is trusted can name any biz-id; `Trust(separate=True)`
  keeps the records of one apart from those of another.
* It is no encryption.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Any, Final

from .errors import ConfigurationError, InvalidBody, Untrusted
from .headers import INNER_MSG_ID, PRODUCER, SIGNATURE
from .identity import check_name
from .msgid import is_inner_msg_id

__all__ = ["Signer", "Trust", "raw_body"]

#: Part of what is signed, and in front of the signature: another encoding is another version.
_VERSION: Final = "1"
_DOMAIN: Final = b"idempotent-bus/signature/" + _VERSION.encode()

#: A key that can be guessed is none.
MIN_KEY_BYTES: Final = 16


class Signer:
    """Signs what a producer publishes. Safe for threads; the key is never shown.

    producer: the name under which consumers know the key. key: a secret of at least 16 bytes, better 32 random ones.
    Raises ConfigurationError.
    """

    __slots__ = ("_key", "producer")

    def __init__(self, producer: str, key: bytes) -> None:
        self.producer = check_name(producer, "a signer's producer")
        self._key = _checked_key(key)

    def __repr__(self) -> str:
        return f"Signer({self.producer!r})"

    def headers(
        self, inner_msg_id: str, body: Any, content_type: str | None, content_encoding: str | None
    ) -> dict[str, str]:
        """The two headers to send along. body: serialised, not compressed: bytes, or a text that is yet to be encoded.

        Raises InvalidBody if the body cannot be signed: it would not arrive as the same bytes everywhere.
        """
        raw = raw_body(body, content_encoding)
        _check_arrives(raw, content_encoding)
        signed = _signed(self.producer, inner_msg_id, raw, content_type, content_encoding)
        return {PRODUCER: self.producer, SIGNATURE: f"{_VERSION}.{hmac.digest(self._key, signed, 'sha256').hex()}"}


class Trust:
    """Whose messages a consumer runs. Safe for threads; the keys are never shown.

    producers: for each producer's name its key, or several while keys are being changed: give the consumers the new
        one first, then the producers, then take the old one away.
    separate: each producer has records of its own, so that one cannot suppress another's id. Otherwise several
        producers of one business fact count as one.
    Raises ConfigurationError.
    """

    __slots__ = ("_keys", "separate")

    def __init__(self, producers: Mapping[str, bytes | Sequence[bytes]], separate: bool = False) -> None:
        if not isinstance(producers, Mapping) or not producers:
            raise ConfigurationError("trust needs at least one producer: a mapping of names to keys")
        self._keys = {check_name(name, "a trusted producer"): _checked_keys(keys) for name, keys in producers.items()}
        if not isinstance(separate, bool):
            raise ConfigurationError("separate must be True or False")
        self.separate = separate

    def __repr__(self) -> str:
        return f"Trust({sorted(self._keys)!r}, separate={self.separate})"

    def verify(
        self, headers: Mapping[str, Any], body: Any, content_type: str | None, content_encoding: str | None
    ) -> str:
        """The name of the producer that signed the message. body: as it arrived, decompressed. Raises Untrusted."""
        producer, signature, inner_msg_id = headers.get(PRODUCER), headers.get(SIGNATURE), headers.get(INNER_MSG_ID)
        if producer is None or signature is None:
            raise Untrusted("the message is not signed")
        if not isinstance(signature, str) or not signature.startswith(f"{_VERSION}."):
            raise Untrusted("the signature is not of a form that this version of the library knows")
        if not isinstance(producer, str) or producer not in self._keys:
            raise Untrusted("the message is signed by a producer that is not trusted here")
        if not isinstance(inner_msg_id, str) or not is_inner_msg_id(inner_msg_id):
            raise Untrusted("the message is signed, but has no inner-msg-id that could be signed")
        try:
            given = bytes.fromhex(signature[len(_VERSION) + 1 :])
            raw = raw_body(body, content_encoding)
            signed = _signed(producer, inner_msg_id, raw, content_type, content_encoding)
        except Exception as error:  # some brokers deliver headers and a content type of any type
            raise Untrusted("the signature is wrong") from error
        matches = False
        for key in self._keys[producer]:  # all of them: which of the keys it was is nobody's business
            matches |= hmac.compare_digest(hmac.digest(key, signed, "sha256"), given)
        if not matches:
            raise Untrusted("the signature is wrong: the id or the body was changed, or the key is another")
        return producer


def raw_body(body: Any, content_encoding: str | None) -> bytes:
    """The bytes of a body that a driver may have decoded already, or that it is yet to encode. Raises InvalidBody."""
    if isinstance(body, (bytes, bytearray, memoryview)):
        return bytes(body)
    if body is None:
        return b""
    if not isinstance(body, str):
        raise InvalidBody("the raw body is neither bytes nor text")
    encoding = content_encoding or "utf-8"
    try:
        return body.encode("utf-8" if encoding.lower() == "binary" else encoding)
    except Exception as error:  # a codec may raise anything
        raise InvalidBody("the body cannot be encoded as its content encoding says") from error


def _check_arrives(raw: bytes, content_encoding: str | None) -> None:
    # py-amqp decodes a body by its content encoding where it can, and what is checked is that text encoded again. A
    # few encodings (utf-7, unicode_escape) have several ways to write the same text.
    encoding = content_encoding or "utf-8"
    try:
        text = raw.decode(encoding)
    except Exception:  # noqa: BLE001 - a codec may raise anything; what cannot be decoded stays bytes
        return
    if raw_body(text, encoding) != raw:
        raise InvalidBody("the content encoding is one that does not give back the same bytes: it cannot be signed")


def _signed(
    producer: str, inner_msg_id: str, raw: bytes, content_type: str | None, content_encoding: str | None
) -> bytes:
    """What the HMAC is over. Each part is preceded by its length, which makes the encoding injective."""
    parts = [
        _DOMAIN,
        producer.encode(),
        inner_msg_id.encode(),
        # As kombu reads what is not said.
        (content_type or "application/data").encode("utf-8", "surrogatepass"),
        (content_encoding or "utf-8").lower().encode("utf-8", "surrogatepass"),
        hashlib.sha256(raw).digest(),
    ]
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def _checked_key(key: object) -> bytes:
    if not isinstance(key, (bytes, bytearray)):
        raise ConfigurationError("a signing key must be bytes")
    if len(key) < MIN_KEY_BYTES:
        raise ConfigurationError(f"a signing key must have at least {MIN_KEY_BYTES} bytes: secrets.token_bytes(32)")
    return bytes(key)


def _checked_keys(keys: object) -> tuple[bytes, ...]:
    if isinstance(keys, (bytes, bytearray)):
        return (_checked_key(keys),)
    if not isinstance(keys, Sequence) or isinstance(keys, str) or not keys:
        raise ConfigurationError("a trusted producer needs a key, or a sequence of keys, of bytes")
    return tuple(_checked_key(key) for key in keys)
