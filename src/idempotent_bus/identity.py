"""Who a message is: the scope, the biz-id and its canonical text, the record's key, the body's fingerprint.

The key is a hash over an injective encoding, so distinct identities never share a record (I10): `"a"` and `"a "`,
`("a", "b:c")` and `("a:b", "c")`, NFC and NFD forms all differ. Nothing is trimmed, folded or normalised: a biz-id
is opaque to the bus.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import json
import unicodedata
import uuid
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Final

from .errors import ConfigurationError, InvalidBizId, InvalidBody, InvalidScope
from .model import FINGERPRINT_BYTES, KEY_BYTES

__all__ = ["INNER_MSG_ID", "BizIdSpec", "FingerprintSpec", "canonical_biz_id", "check_name", "check_scope"]
__all__ += ["check_tenant", "extract_biz_id", "fingerprint", "record_key"]

MAX_BIZ_ID_BYTES: Final = 512
MAX_SCOPE_BYTES: Final = 200

#: Part of every key: a change of the encoding changes it, so that old and new records never mix.
_KEY_VERSION: Final = b"idempotent-bus/1"
_FINGERPRINT_VERSION: Final = b"idempotent-bus/f"
#: What the fingerprints of each kind of body begin with; to be copied.
_BYTES: Final = blake2b(b"b", digest_size=FINGERPRINT_BYTES, person=_FINGERPRINT_VERSION)
_JSON: Final = blake2b(b"j", digest_size=FINGERPRINT_BYTES, person=_FINGERPRINT_VERSION)


class _InnerMsgId:
    def __repr__(self) -> str:
        return "INNER_MSG_ID"


#: Give this as `biz_id` where the business has no id of its own: the bus's own id then decides what is a duplicate.
INNER_MSG_ID: Final = _InnerMsgId()

#: A path into the body (`"payment_id"`, `"order.id"`), a function of the body, or INNER_MSG_ID.
BizIdSpec = str | Callable[[Any], Any] | _InnerMsgId

#: True: the whole body; a name or a sequence of names: those top-level fields only; False: off.
FingerprintSpec = bool | Sequence[str]


def check_scope(scope: object) -> str:
    """The scope, if it can be one. Raises InvalidScope."""
    if not isinstance(scope, str) or not scope:
        raise InvalidScope("scope must be a non-empty text that names the business scenario, such as 'cards.issue'")
    if not _is_name(scope):
        raise InvalidScope(f"scope must be at most {MAX_SCOPE_BYTES} bytes of UTF-8 without control characters")
    return scope


def check_tenant(tenant: object) -> str:
    """The tenant, if it can be one: as a scope, or empty for none. Raises ConfigurationError."""
    return "" if tenant == "" else check_name(tenant, "tenant")


def check_name(name: object, what: str) -> str:
    """A name of the configuration that goes into keys, if it can be one: as a scope. Raises ConfigurationError."""
    if not isinstance(name, str) or not _is_name(name):
        raise ConfigurationError(
            f"{what} must be a non-empty text of at most {MAX_SCOPE_BYTES} bytes of UTF-8 without control characters"
        )
    return name


def canonical_biz_id(value: object) -> str:
    """The canonical text of a biz-id: a text as it is, an int or a UUID as its usual text.

    Producers differ in how they write the same id, hence int and UUID. Everything else (bool, float, None, empty,
    over 512 bytes of UTF-8, control characters, lone surrogates) raises InvalidBizId, without the value in its text.
    """
    if isinstance(value, str):
        text = value
    elif isinstance(value, int) and not isinstance(value, bool):
        if value.bit_length() > MAX_BIZ_ID_BYTES * 4:  # also keeps clear of Python's limit on int to text
            raise InvalidBizId(f"the biz-id is longer than {MAX_BIZ_ID_BYTES} bytes")
        text = int.__repr__(value)  # not str(): Python 3.10 and 3.11 differ in how they write an IntEnum
    elif isinstance(value, uuid.UUID):
        text = str(value)
    else:
        raise InvalidBizId(f"the biz-id is of type {type(value).__name__}: it must be a text, an int or a UUID")
    if not text:
        raise InvalidBizId("the biz-id is empty")
    if text.isascii():
        if len(text) > MAX_BIZ_ID_BYTES:
            raise InvalidBizId(f"the biz-id is longer than {MAX_BIZ_ID_BYTES} bytes")
        if not text.isprintable():
            raise InvalidBizId("the biz-id has control characters")
        return text
    encoded = _utf8(text)
    if encoded is None:
        raise InvalidBizId("the biz-id has a lone surrogate, which is not text")
    if len(encoded) > MAX_BIZ_ID_BYTES:
        raise InvalidBizId(f"the biz-id is longer than {MAX_BIZ_ID_BYTES} bytes")
    if _has_control(text):
        raise InvalidBizId("the biz-id has control characters")
    return text


def extract_biz_id(spec: str | Callable[[Any], Any], body: Any) -> str:
    """The canonical biz-id of a body, by a path or a callable. Raises InvalidBizId, never anything else."""
    if isinstance(spec, str):
        value = body
        for name in spec.split("."):
            if type(value) is not dict and not isinstance(value, Mapping):  # the latter takes ten times as long
                raise InvalidBizId(f"no biz-id at {spec!r}: the body has no mapping where {name!r} is looked up")
            if name not in value:
                raise InvalidBizId(f"no biz-id at {spec!r}: {name!r} is missing")
            value = value[name]
    else:
        try:
            value = spec(body)
        except Exception as error:  # a user's function may raise anything on a strange body
            raise InvalidBizId(f"the biz_id function raised {type(error).__name__} on this body") from error
    return canonical_biz_id(value)


def record_key(scope: str, biz_id: str, *, tenant: str = "", producer: str = "") -> bytes:
    """The key of a record: KEY_BYTES bytes, the same in every version of the library that reads this encoding.

    tenant: of the consumer's configuration. producer: of a verified signature, where each producer's ids are its own.
    Each part is preceded by its length, which makes the encoding injective; the hash fixes the length, so that no
    database's collation, padding or key limit can merge two identities.
    """
    digest = _begun(tenant, scope).copy()
    digest.update(_part(biz_id))
    # Without a producer the encoding ends a part earlier: since each part tells its length, no two are the same.
    if producer:
        digest.update(_part(producer))
    return digest.digest()


@functools.lru_cache(maxsize=256)
def _begun(tenant: str, scope: str) -> blake2b:
    """What all keys of one scope begin with; to be copied."""
    return blake2b(_part(tenant) + _part(scope), digest_size=KEY_BYTES, person=_KEY_VERSION)


def _part(text: str) -> bytes:
    encoded = text.encode()
    return len(encoded).to_bytes(4, "big") + encoded


def fingerprint(body: Any, spec: FingerprintSpec = True) -> bytes | None:
    """A digest of the body's meaning (FINGERPRINT_BYTES bytes), or None where it is switched off.

    A JSON-like body counts by its canonical JSON, whatever the order of its keys; bytes and text count as they are.
    What kombu's JSON gives back typed (UUID, Decimal, dates) counts as its text: other producers send it so.
    Raises InvalidBody, never anything else, if the body is nested too deeply, has values that have no such form, or
    lacks a named field.
    """
    if spec is False:
        return None
    if spec is not True:
        if isinstance(spec, str):
            spec = (spec,)
        if not isinstance(body, Mapping):
            raise InvalidBody("the fingerprint names fields, but the body is not a mapping")
        missing = [name for name in spec if name not in body]
        if missing:
            raise InvalidBody(f"the body lacks the fingerprint's field {missing[0]!r}")
        body = {name: body[name] for name in spec}
    if isinstance(body, (bytes, bytearray, memoryview)):
        digest, data = _BYTES.copy(), bytes(body)
    else:
        digest = _JSON.copy()
        try:
            data = _canonical(body).encode("utf-8", "surrogatepass")
        except RecursionError as error:
            raise InvalidBody("the body is nested too deeply") from error
        except Exception as error:  # other decoders than JSON bring objects whose code runs here
            raise InvalidBody(f"no fingerprint can be made of this body: {type(error).__name__}") from error
    digest.update(data)
    return digest.digest()


def _plain(value: Any) -> Any:
    # What kombu's JSON, msgpack and YAML give back beyond JSON's own types.
    if isinstance(value, (uuid.UUID, decimal.Decimal)):
        return str(value)
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"__bytes__": bytes(value).hex()}
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(type(value).__name__)


_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain).encode


@functools.lru_cache(maxsize=256)
def _is_name(text: str) -> bool:
    encoded = _utf8(text)
    return encoded is not None and 0 < len(encoded) <= MAX_SCOPE_BYTES and not _has_control(text)


def _utf8(text: str) -> bytes | None:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return None


def _has_control(text: str) -> bool:
    return any(unicodedata.category(character) == "Cc" for character in text)
