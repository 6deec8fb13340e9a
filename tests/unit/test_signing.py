"""Signatures: what was signed verifies however it travelled, and nothing else does; the keys are never shown."""

from __future__ import annotations

import copy
import hashlib
import hmac
import logging
import pickle
import secrets
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.serialization import dumps

from idempotent_bus import signing
from idempotent_bus.errors import ConfigurationError, InvalidBody, InvalidMessage, Untrusted
from idempotent_bus.headers import INNER_MSG_ID, PRODUCER, SIGNATURE
from idempotent_bus.identity import record_key
from idempotent_bus.msgid import derived_inner_msg_id
from idempotent_bus.signing import Signer, Trust, raw_body

ID = "017f22e2-79b0-7cc3-98c4-dc0c0c07398f"
KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))
BODY = b'{"payment_id": "p-1"}'
JSON = ("application/json", "utf-8")

SHOP = Signer("shop", KEY)
TRUST = Trust({"shop": KEY})


def signed(signer: Signer = SHOP, *, id: str = ID, body: Any = BODY, how: tuple[Any, Any] = JSON) -> dict[str, Any]:
    """The headers of a signed message."""
    return {INNER_MSG_ID: id, **signer.headers(id, body, *how)}


def test_golden_signatures() -> None:
    """A signature never changes between versions: what is queued across an upgrade still verifies."""
    assert signed()[SIGNATURE] == "1.fc1059403cbd7a00877d4d0989543f06651bd664ccbbb93047dbb27af8ae05ba"
    derived = derived_inner_msg_id(record_key("s", "b"), "receipt")
    other = signed(Signer("m\u00fcller", OTHER_KEY), id=derived, body=b"\0\xff", how=(None, None))
    assert other[SIGNATURE] == "1.eadf213a4ea19a3398b37d7b8180174da42786108ced4a2e13503edff7322460"
    assert other[PRODUCER] == "m\u00fcller"


def test_the_encoding_as_it_is_written_down() -> None:
    """Another implementation can be written from this: each part after its length in 8 bytes, HMAC-SHA256, in hex."""
    parts = [b"idempotent-bus/signature/1", b"shop", ID.encode(), b"application/json", b"utf-8"]
    parts.append(hashlib.sha256(BODY).digest())
    text = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    assert signed()[SIGNATURE] == "1." + hmac.new(KEY, text, hashlib.sha256).hexdigest()


def test_what_was_signed_verifies() -> None:
    """The producer's name comes back, and other headers are no matter."""
    assert TRUST.verify({**signed(), "x": [1]}, BODY, *JSON) == "shop"


CHANGED: dict[str, tuple[dict[str, Any], Any, tuple[Any, Any]]] = {
    "another id": ({INNER_MSG_ID: ID[:-1] + "e"}, BODY, JSON),
    "no id": ({INNER_MSG_ID: None}, BODY, JSON),
    "an id of another form": ({INNER_MSG_ID: 5}, BODY, JSON),
    "a list as id": ({INNER_MSG_ID: [ID]}, BODY, JSON),
    "another body": ({}, BODY.replace(b"1", b"2"), JSON),
    "a shorter body": ({}, BODY[:-1], JSON),
    "no body": ({}, b"", JSON),
    "None as body": ({}, None, JSON),
    "a list as body": ({}, [BODY], JSON),
    "another content type": ({}, BODY, ("text/plain", "utf-8")),
    "another encoding": ({}, BODY, ("application/json", "latin-1")),
    "an unknown encoding for a text": ({}, BODY.decode(), ("application/json", "no-such")),
    "a number as content type": ({}, BODY, (5, "utf-8")),
    "a number as encoding": ({}, BODY.decode(), ("application/json", 5)),
    "no signature": ({SIGNATURE: None}, BODY, JSON),
    "no producer": ({PRODUCER: None}, BODY, JSON),
    "an unknown producer": ({PRODUCER: "shop2"}, BODY, JSON),
    "a producer with another key": ({PRODUCER: "cards"}, BODY, JSON),
    "a number as producer": ({PRODUCER: 5}, BODY, JSON),
    "a list as producer": ({PRODUCER: ["shop"]}, BODY, JSON),
    "a number as signature": ({SIGNATURE: 5}, BODY, JSON),
    "an empty signature": ({SIGNATURE: ""}, BODY, JSON),
    "a version without a signature": ({SIGNATURE: "1."}, BODY, JSON),
    "another version": ({SIGNATURE: "2." + "00" * 32}, BODY, JSON),
    "zeros": ({SIGNATURE: "1." + "00" * 32}, BODY, JSON),
    "a signature cut short": ({SIGNATURE: signed()[SIGNATURE][:-2]}, BODY, JSON),
    "a signature beyond ASCII": ({SIGNATURE: "1.\u0661" * 64}, BODY, JSON),
    "a huge signature": ({SIGNATURE: "1." + "ab" * 100_000}, BODY, JSON),
    "bytes as signature": ({SIGNATURE: signed()[SIGNATURE].encode()}, BODY, JSON),
}


@pytest.mark.parametrize("change", CHANGED)
def test_what_was_changed_is_not_trusted(change: str) -> None:
    """I14: every change of what is signed is found; only Untrusted comes out, with nothing of the message in it."""
    headers, body, how = CHANGED[change]
    with pytest.raises(Untrusted) as caught:
        Trust({"shop": KEY, "cards": OTHER_KEY}).verify({**signed(), **headers}, body, *how)
    assert isinstance(caught.value, InvalidMessage)
    assert not any(word in str(caught.value) for word in ("p-1", "shop", ID, KEY.hex(), signed()[SIGNATURE]))


parts = st.tuples(
    st.text("ab", min_size=1, max_size=2),
    st.sampled_from([ID, ID[:-1] + "e"]),
    st.binary(max_size=2),
    st.sampled_from([None, "application/data", "a", "au"]),
    st.sampled_from([None, "utf-8", "UTF-8", "tf-8", "binary"]),
)


def _meaning(part: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*part[:3], part[3] or "application/data", (part[4] or "utf-8").lower())


@given(parts, parts)
def test_distinct_messages_have_distinct_signatures(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    """The encoding is injective: moving bytes from one part to the next is found, what means the same is the same."""
    texts = [signing._signed(*part) for part in (one, other)]
    assert (texts[0] == texts[1]) is (_meaning(one) == _meaning(other))


@pytest.mark.parametrize("compared", [True, False])
def test_the_signature_is_what_decides(compared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with the comparison taken out a forged body is trusted."""
    if not compared:
        monkeypatch.setattr(signing.hmac, "compare_digest", lambda one, other: True)
        assert TRUST.verify(signed(), b"forged", *JSON) == "shop"
    else:
        with pytest.raises(Untrusted):
            TRUST.verify(signed(), b"forged", *JSON)


def test_a_key_is_changed_without_a_gap() -> None:
    """Rotation: with both keys at the consumer messages of before and after verify; then the old key is taken away."""
    old, new = signed(Signer("shop", KEY)), signed(Signer("shop", OTHER_KEY))
    both = Trust({"shop": [KEY, OTHER_KEY]})
    assert both.verify(old, BODY, *JSON) == both.verify(new, BODY, *JSON) == "shop"
    after = Trust({"shop": (OTHER_KEY,)})
    assert after.verify(new, BODY, *JSON) == "shop"
    with pytest.raises(Untrusted):
        after.verify(old, BODY, *JSON)


def test_a_change_of_the_mapping_afterwards_changes_nothing() -> None:
    """Whom a consumer trusts is settled when it is set up."""
    keys = [KEY]
    producers: dict[str, Any] = {"shop": keys}
    trust = Trust(producers)
    keys[0] = OTHER_KEY
    producers["evil"] = OTHER_KEY
    assert trust.verify(signed(), BODY, *JSON) == "shop"
    with pytest.raises(Untrusted):
        trust.verify(signed(Signer("evil", OTHER_KEY)), BODY, *JSON)


@pytest.mark.parametrize("serializer", ["json", "raw", None, "bytes"])
@pytest.mark.parametrize("text", ["p-1", "\u00e9\u4e2d\U0001f4b3"], ids=["ascii", "unicode"])
def test_every_serializer_as_it_arrives(serializer: str | None, text: str) -> None:
    """What is signed before sending verifies as bytes (our transports) and as the text that py-amqp makes of it."""
    body: Any = {"json": {"id": text}, "bytes": text.encode("utf-16") + b"\0\xff"}.get(str(serializer), text)
    content_type, encoding, sent = dumps(body, serializer=None if serializer == "bytes" else serializer)
    headers = signed(body=sent, how=(content_type, encoding))
    raw = sent.encode() if isinstance(sent, str) else bytes(sent)
    assert TRUST.verify(headers, raw, content_type, encoding) == "shop"
    try:
        arrived: Any = raw.decode(encoding)
    except (LookupError, UnicodeError):
        arrived = bytearray(raw)
    assert TRUST.verify(headers, arrived, content_type, encoding) == "shop"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "UTF-8", "utf-16", "latin-1", "ascii", "binary", "base64", "no-such", ""]
)
def test_a_body_decoded_on_the_way(encoding: str) -> None:
    """py-amqp decodes by the content encoding where it can: the same bytes are found again."""
    raw = "text".encode("utf-16") if encoding == "utf-16" else b"text"
    headers = signed(body=raw, how=("text/plain", encoding))
    try:
        arrived: Any = raw.decode(encoding)
    except (LookupError, UnicodeError):
        arrived = raw
    assert TRUST.verify(headers, arrived, "text/plain", encoding) == "shop"


@pytest.mark.parametrize(("raw", "encoding"), [(b"\\u0041", "unicode_escape"), (b"+AEE-", "utf-7")])
def test_what_would_not_arrive_as_the_same_bytes_is_not_signed(raw: bytes, encoding: str) -> None:
    """An encoding with several forms of one text is refused by the signer, rather than by every consumer."""
    with pytest.raises(InvalidBody, match="cannot be signed"):
        SHOP.headers(ID, raw, "text/plain", encoding)


def test_raw_bodies() -> None:
    """Bytes of every kind are taken as they are, a text is encoded as its content encoding says."""
    assert raw_body(b"a", None) == raw_body(bytearray(b"a"), "x") == raw_body(memoryview(b"a"), "x") == b"a"
    assert raw_body("\u00e9", None) == raw_body("\u00e9", "binary") == b"\xc3\xa9"
    assert raw_body("\u00e9", "latin-1") == b"\xe9"
    assert raw_body(None, None) == b""
    for body, encoding in (("\ud800", "utf-8"), ("\u00e9", "ascii"), ("a", "no-such"), (5, "utf-8"), ({}, None)):
        with pytest.raises(InvalidBody):
            raw_body(body, encoding)


@pytest.mark.parametrize("key", [b"", b"x" * 15, "x" * 32, None, 5, [1] * 32])
def test_keys_that_are_refused(key: Any) -> None:
    """A key that is short or no bytes at all is found when it is given, and is not in the error."""
    with pytest.raises(ConfigurationError) as caught:
        Signer("shop", key)
    assert "xxxx" not in str(caught.value)
    with pytest.raises(ConfigurationError):
        Trust({"shop": key})
    with pytest.raises(ConfigurationError):
        Trust({"shop": [KEY, key]})


@pytest.mark.parametrize("producers", [{}, None, [("shop", KEY)], {"": KEY}, {5: KEY}, {"a\n": KEY}, {"shop": []}])
def test_trusts_that_are_refused(producers: Any) -> None:
    """A trust in nobody, or in a name that cannot be one, is found when it is made."""
    with pytest.raises(ConfigurationError):
        Trust(producers)


def test_the_keys_are_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    """Neither repr, nor a log with the objects in it, nor an error has a key; the names help to find one's way."""
    secret = secrets.token_bytes(32)
    signer, trust = Signer("shop", secret), Trust({"shop": [secret]}, separate=True)
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("test").warning("%r %s %r %s", signer, signer, trust, trust)
        with pytest.raises(Untrusted) as caught:
            trust.verify(signed(), BODY, *JSON)
    shown = [repr(signer), str(trust), caplog.text, repr(caught.value), repr(vars(caught.value))]
    assert not any(secret.hex() in text or repr(secret)[2:-1] in text for text in shown)
    assert repr(signer) == "Signer('shop')"
    assert repr(trust) == "Trust(['shop'], separate=True)"


def test_they_can_be_copied_into_another_process() -> None:
    """A pool of processes that is spawned gets its settings pickled, and these with them."""
    assert pickle.loads(pickle.dumps(SHOP)).headers(ID, BODY, *JSON) == SHOP.headers(ID, BODY, *JSON)
    assert copy.deepcopy(TRUST).verify(signed(), BODY, *JSON) == "shop"
