"""Identities: distinct ones never share a key (I10), unusable ones are refused without showing their value."""

from __future__ import annotations

import datetime
import decimal
import enum
import types
import uuid
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idempotent_bus.errors import ConfigurationError, IdempotentBusError, InvalidBizId, InvalidBody, InvalidScope
from idempotent_bus.identity import (
    INNER_MSG_ID,
    canonical_biz_id,
    check_scope,
    check_tenant,
    extract_biz_id,
    fingerprint,
    record_key,
)

ID = uuid.UUID("0190b4d2-7c1e-7a3b-8f00-0123456789ab")

# --- the record's key -----------------------------------------------------------------------------------

GOLDEN_KEYS = {
    ("", "cards.issue", "p-1"): "a48dc9eb90d8734b973d103c4ed3f478",
    ("", "cards.issue", "p-1 "): "29ffe2fb9140f974dcd9a8b78e9321ef",
    ("", "a", "b:c"): "ac9edd9594ba11904c9f6f3b868e48e8",
    ("", "a:b", "c"): "908521484adca20e1616d28973268135",
    ("tenant", "cards.issue", "p-1"): "49806833c1904874130404886e86a53a",
    ("", "карты", "платёж-1"): "9de001f4cd6756eeb2f8dbdc78f6a083",
}


@pytest.mark.parametrize(("identity", "expected"), GOLDEN_KEYS.items())
def test_golden_keys(identity: tuple[str, str, str], expected: str) -> None:
    """A record's key never changes between versions: records of today are found by the library of tomorrow."""
    tenant, scope, biz_id = identity
    assert record_key(scope, biz_id, tenant=tenant).hex() == expected


GOLDEN_KEYS_OF_PRODUCERS = {
    ("", "cards.issue", "p-1", "shop"): "8099241813aa8709c90e690721cec3a9",
    ("tenant", "cards.issue", "p-1", "shop"): "0316c8a3a59b32f9946b3ea50b07ede1",
    ("shop", "cards.issue", "p-1", ""): "3eb223a5a8d1d98271cadbf580411554",
}


@pytest.mark.parametrize(("identity", "expected"), GOLDEN_KEYS_OF_PRODUCERS.items())
def test_golden_keys_of_producers(identity: tuple[str, str, str, str], expected: str) -> None:
    """The same where each producer's ids are its own: also these keys never change."""
    tenant, scope, biz_id, producer = identity
    assert record_key(scope, biz_id, tenant=tenant, producer=producer).hex() == expected


texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)
# Few letters and separators, so that the parts can be cut at many places.
cuttable = st.text("ab:/\u0301\u00e1 ", max_size=5)
identities = st.tuples(texts | cuttable, texts | cuttable, texts | cuttable, texts | cuttable)


@given(identities, identities)
@settings(max_examples=500)
def test_distinct_identities_have_distinct_keys(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    """I10, I14: (tenant, scope, biz_id, producer) differ exactly if their keys do."""
    keys = [
        record_key(scope, biz_id, tenant=tenant, producer=producer) for tenant, scope, biz_id, producer in (one, other)
    ]
    assert (keys[0] == keys[1]) is (one == other)


@given(cuttable, st.data())
def test_moving_text_between_the_parts_changes_the_key(text: str, data: st.DataObject) -> None:
    """I10: the same letters cut at another place are another identity."""
    cuts = st.tuples(*[st.integers(0, len(text))] * 3).map(sorted)
    one, other = data.draw(cuts), data.draw(cuts)
    keys = [record_key(text[a:b], text[b:c], tenant=text[:a], producer=text[c:]) for a, b, c in (one, other)]
    assert (keys[0] == keys[1]) is (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("s", "a"), ("s", "a ")),
        (("s", "a"), ("s", " a")),
        (("s", "a"), ("s", "A")),
        (("a", "b:c"), ("a:b", "c")),
        (("s", "\u00e9"), ("s", "e\u0301")),  # NFC and NFD of the same letter
        (("s", "1"), ("s", "01")),
        (("s", "1"), ("s", "1.0")),
        (("s", "a"), ("s", "a\u200b")),
        (("s", "\ufb01"), ("s", "fi")),
    ],
)
def test_nothing_is_trimmed_folded_or_normalised(one: tuple[str, str], other: tuple[str, str]) -> None:
    """I10: ids that look alike, or that a database's collation would merge, have keys of their own."""
    assert record_key(one[0], canonical_biz_id(one[1])) != record_key(other[0], canonical_biz_id(other[1]))


# --- the biz-id -----------------------------------------------------------------------------------------


def test_int_and_uuid_equal_their_texts() -> None:
    """On purpose: producers differ in how they write the same id."""
    assert canonical_biz_id(1) == canonical_biz_id("1") == "1"
    assert canonical_biz_id(-7) == "-7"
    assert canonical_biz_id(ID) == canonical_biz_id(str(ID)) == str(ID)


def test_an_int_enum_is_its_number_in_every_python() -> None:
    """Python 3.10 writes an IntEnum by its name and 3.11 by its number: an upgrade must not run everything again."""

    class Wrong(int):
        def __str__(self) -> str:
            return "Payment.FIRST"

    assert canonical_biz_id(Wrong(1)) == "1"
    assert canonical_biz_id(enum.IntEnum("Payment", {"FIRST": 1})(1)) == "1"


SECRET = "s3cret"
REFUSED = {
    "bool": True,
    "float": 1.0,
    "none": None,
    "list": [SECRET],
    "dict": {SECRET: SECRET},
    "bytes": SECRET.encode(),
    "decimal": decimal.Decimal("7.25"),
    "empty": "",
    "513 bytes": SECRET + "x" * (513 - len(SECRET)),
    "513 bytes in two-byte letters": SECRET + "\u00e9" * 253 + "x",
    "NUL": f"{SECRET}\0",
    "newline": f"{SECRET}\n",
    "tab": f"\t{SECRET}",
    "DEL": f"{SECRET}\x7f",
    "C1 control": f"{SECRET}\x80",
    "C1 control NEL": f"{SECRET}\x85",
    "control beside a letter beyond ASCII": f"{SECRET}\u00e9\x1f",
    "lone surrogate": f"{SECRET}\ud800",
    "int of 600 digits": 10**599,
    "huge int": 1 << 1_000_000,
}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED)
def test_refused_biz_ids(value: object) -> None:
    """What cannot be an id is refused loudly, and the refusal, which goes into logs and headers, has no value in it."""
    with pytest.raises(InvalidBizId) as caught:
        canonical_biz_id(value)
    assert SECRET not in str(caught.value)
    assert "7.25" not in str(caught.value)


@pytest.mark.parametrize("value", ["x" * 512, "\u00e9" * 256, "\U0001f4b3" * 128, " ", "a b", "\u2028", 10**511])
def test_the_longest_and_oddest_biz_ids_that_are_taken(value: object) -> None:
    """512 bytes of UTF-8 fit, and everything that is text and no control character is opaque to the bus."""
    assert canonical_biz_id(value) == str(value)


@given(st.text(max_size=600))
@settings(max_examples=300)
def test_any_text_is_taken_as_it_is_or_refused(text: str) -> None:
    """No text is changed on the way, and none raises anything but InvalidBizId."""
    try:
        assert canonical_biz_id(text) == text
    except InvalidBizId:
        encoded = text.encode("utf-8", "surrogatepass")
        bad = not text or len(encoded) > 512 or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)
        assert bad or any(0xD800 <= ord(c) < 0xE000 for c in text)


@pytest.mark.parametrize(
    ("spec", "body", "expected"),
    [
        ("payment_id", {"payment_id": "p-1"}, "p-1"),
        ("order.id", {"order": {"id": 7}}, "7"),
        ("order.id", types.MappingProxyType({"order": types.MappingProxyType({"id": 7})}), "7"),
        ("a.b.c", {"a": {"b": {"c": ID}}}, str(ID)),
        (lambda body: body["x"] + "/" + body["y"], {"x": "1", "y": "2"}, "1/2"),
        (lambda body: body, "plain", "plain"),
    ],
)
def test_extraction(spec: Any, body: Any, expected: str) -> None:
    """A path goes through mappings; a function may do as it likes."""
    assert extract_biz_id(spec, body) == expected


def _raises(body: Any) -> Any:
    raise KeyError(body[SECRET])


@pytest.mark.parametrize(
    ("spec", "body"),
    [
        ("payment_id", {}),
        ("payment_id", {"payment_id": None}),
        ("payment_id", {"payment_id": [SECRET]}),
        ("payment_id", SECRET),
        ("payment_id", None),
        ("payment_id", [SECRET]),
        ("payment_id", 5),
        ("order.id", {"order.id": SECRET}),
        ("order.id", {"order": SECRET}),
        ("order.id", {"order": {SECRET: 1}}),
        ("order..id", {"order": {"id": SECRET}}),
        ("", {"payment_id": SECRET}),
        (lambda body: body["x"], {SECRET: SECRET}),
        (lambda body: body.id, {SECRET: SECRET}),
        (lambda body: None, {SECRET: SECRET}),
        (_raises, {SECRET: SECRET}),
    ],
)
def test_bodies_without_a_usable_id(spec: Any, body: Any) -> None:
    """Whatever a body looks like, only InvalidBizId comes out, and its text has nothing of the body."""
    with pytest.raises(InvalidBizId) as caught:
        extract_biz_id(spec, body)
    assert SECRET not in str(caught.value)


def test_inner_msg_id_has_a_name() -> None:
    """The marker can be told in a message or a log."""
    assert repr(INNER_MSG_ID) == "INNER_MSG_ID"


@pytest.mark.parametrize("scope", ["cards.issue", "x" * 200, "карты", "a b"])
def test_scopes_that_are_taken(scope: str) -> None:
    """A scope is a name that the user chose, given back as it is."""
    assert check_scope(scope) == scope


@pytest.mark.parametrize("scope", ["", None, 5, b"cards", "x" * 201, "\u00e9" * 101, "a\n", "a\0", "\x85", "\ud800"])
def test_scopes_that_are_refused(scope: object) -> None:
    """A wrong scope is found when the consumer is set up, not at its first message."""
    with pytest.raises(InvalidScope):
        check_scope(scope)


def test_tenants() -> None:
    """A tenant is checked like a scope when the consumer is set up; none at all is the default."""
    assert check_tenant("") == ""
    assert check_tenant("\u0444\u0438\u0440\u043c\u0430 1") == "\u0444\u0438\u0440\u043c\u0430 1"
    for wrong in (None, 5, b"shop", "x" * 201, "\u00e9" * 101, "a\n", "a\0", "\x85", "\ud800", ["a"]):
        with pytest.raises(ConfigurationError, match="tenant"):
            check_tenant(wrong)


# --- the fingerprint ------------------------------------------------------------------------------------

GOLDEN_FINGERPRINTS: list[tuple[Any, str]] = [
    ({"payment_id": "p-1", "amount": "9.90"}, "c0f9943e72aa993e"),
    ({"b": [1, 1.0, True, None, "1"], "a": {"d": "\u00e9", "c": "\ud800"}}, "1b3e1ab802f094e7"),
    ("text", "a8a4befbe0070e74"),
    (b"text", "7bb6cb284f177eab"),
    (
        {"id": ID, "at": datetime.datetime(2026, 1, 2, 3, 4, 5), "sum": decimal.Decimal("9.90"), "raw": b"\0"},
        "376389b454b8605a",
    ),
]


@pytest.mark.parametrize(("body", "expected"), GOLDEN_FINGERPRINTS)
def test_golden_fingerprints(body: Any, expected: str) -> None:
    """A fingerprint never changes between versions: a copy across an upgrade is no conflict."""
    digest = fingerprint(body)
    assert digest is not None
    assert digest.hex() == expected


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=6), st.randoms())
def test_key_order_is_irrelevant(body: dict[str, Any], random: Any) -> None:
    """Two serialisers that write the same body in another order send the same message."""
    items = list(body.items())
    random.shuffle(items)
    assert fingerprint({"x": body, "y": 1}) == fingerprint({"y": 1, "x": dict(items)})


json_bodies = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([0.0, 1.0, 1.5])
    | st.text("a1,:[]{}\"'\\", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("a1", max_size=2), inner, max_size=3),
    max_leaves=6,
)


def _typed(value: Any) -> Any:
    # Python says 1 == 1.0 == True; the fingerprint must not.
    if isinstance(value, dict):
        return ("dict", frozenset((key, _typed(inner)) for key, inner in value.items()))
    if isinstance(value, list):
        return ("list", tuple(_typed(inner) for inner in value))
    return (type(value).__name__, value)


@given(json_bodies, json_bodies)
@settings(max_examples=500)
def test_json_bodies_differ_exactly_if_their_fingerprints_do(one: Any, other: Any) -> None:
    """Every difference that JSON can tell counts, and nothing else."""
    assert (fingerprint(one) == fingerprint(other)) is (_typed(one) == _typed(other))


def test_alike_but_not_the_same() -> None:
    """1, 1.0, True and "1" are four bodies, and so are text and bytes, null and its text, a list and its text."""
    bodies: list[Any] = [1, 1.0, True, "1", b"1", None, "null", "None", [], "[]", {}, {"": None}, [None], "", b""]
    bodies += [float("nan"), "NaN", float("inf"), -1, 0, 0.0, False, "\ud800", "\\ud800", "\ufffd", ["\udcff"], [[]]]
    digests = [fingerprint(body) for body in bodies]
    assert len(set(digests)) == len(bodies)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"id": ID}, {"id": str(ID)}),
        ({"sum": decimal.Decimal("9.90")}, {"sum": "9.90"}),
        ({"at": datetime.datetime(2026, 1, 2, 3, 4)}, {"at": "2026-01-02T03:04:00"}),
        ({"on": datetime.date(2026, 1, 2)}, {"on": "2026-01-02"}),
        ({"at": datetime.time(3, 4)}, {"at": "03:04:00"}),
        ({"n": {1: "x"}}, {"n": {"1": "x"}}),
        ([1, 2], (1, 2)),
        ({"tags": {"b", "a"}}, {"tags": ["a", "b"]}),
        (b"raw", bytearray(b"raw")),
        (b"raw", memoryview(b"raw")),
        ({"a": 1}, types.MappingProxyType({"a": 1})),
    ],
)
def test_the_same_body_as_another_serialiser_writes_it(one: Any, other: Any) -> None:
    """On purpose: what one producer sends typed and another as text is the same body, so a copy is no conflict."""
    assert fingerprint(one) == fingerprint(other)


def test_values_beyond_json_are_told_apart() -> None:
    """Bytes within a body, dates, decimals and ids count by their value."""
    bodies = [
        {"x": b"a"},
        {"x": b"b"},
        {"x": "a"},
        {"x": decimal.Decimal("1")},
        {"x": decimal.Decimal("1.0")},
        {"x": datetime.datetime(2026, 1, 2)},
        {"x": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)},
        {"x": datetime.date(2026, 1, 2)},
        {"x": ID},
        {"x": {1, 2}},
        {"x": {1, 3}},
    ]
    assert len({fingerprint(body) for body in bodies}) == len(bodies)


def _nested(depth: int, kind: str) -> Any:
    body: Any = "x"
    for _ in range(depth):
        body = [body] if kind == "list" else {"a": body}
    return body


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_a_body_nested_100_000_deep_is_refused(kind: str) -> None:
    """Hostile nesting ends in a refusal, not in a crash of the interpreter."""
    body = _nested(100_000, kind)
    try:
        with pytest.raises(InvalidBody):
            fingerprint(body)
    finally:
        while not isinstance(body, str):  # taken apart by hand: freeing it in one go recurses too
            body = body[0] if kind == "list" else body["a"]


class _Hostile:
    def __repr__(self) -> str:
        raise RuntimeError(SECRET)


class _HostileDict(dict):  # type: ignore[type-arg]
    def items(self) -> Any:
        raise LookupError(SECRET)


_circular: list[Any] = []
_circular.append(_circular)


@pytest.mark.parametrize(
    "body",
    [
        {"x": object()},
        {(1, 2): SECRET},
        {1: SECRET, "1": SECRET},
        {None: 1, "a": 2},
        {"x": 1j},
        {"x": {_Hostile(), _Hostile()}},
        _HostileDict(a=1),
        _circular,
        {"x": 10**5000},
    ],
    ids=["object", "tuple key", "int and text key", "null key", "complex", "bad repr", "bad dict", "circular", "huge"],
)
def test_bodies_without_a_fingerprint_are_refused(body: Any) -> None:
    """Only InvalidBody comes out, whatever a body does when it is read, and its text has nothing of the body."""
    with pytest.raises(InvalidBody) as caught:
        fingerprint(body)
    assert SECRET not in str(caught.value)


def test_named_fields_only() -> None:
    """With named fields the rest of the body may change; a field that is missing is a refusal, not a null."""
    spec = ["payment_id", "amount"]
    body = {"payment_id": "p-1", "amount": 5, "sent_at": 1}
    assert fingerprint(body, spec) == fingerprint({**body, "sent_at": 2}, spec)
    assert fingerprint(body, spec) == fingerprint(body, tuple(reversed(spec)))
    assert fingerprint(body, spec) != fingerprint({**body, "amount": 6}, spec)
    assert fingerprint({**body, "amount": None}, spec) != fingerprint(body, spec)
    with pytest.raises(InvalidBody, match="amount"):
        fingerprint({"payment_id": SECRET}, spec)
    for other in ([SECRET], SECRET, None, 5, b""):
        with pytest.raises(InvalidBody) as caught:
            fingerprint(other, spec)
        assert SECRET not in str(caught.value)


def test_one_name_is_one_field() -> None:
    """`fingerprint="amount"` means that field, not the six fields a, m, o, u, n, t: every message would be refused."""
    assert fingerprint({"amount": 5, "sent_at": 1}, "amount") == fingerprint({"amount": 5}, ["amount"])


def test_off() -> None:
    """Switched off, nothing of the body is looked at."""
    assert fingerprint(object(), False) is None


@given(st.recursive(st.binary(max_size=3) | st.text(max_size=3) | st.floats(), lambda x: st.lists(x) | st.tuples(x)))
def test_any_body_has_a_fingerprint_or_is_refused(body: Any) -> None:
    """Nothing but InvalidBody comes out of a fingerprint."""
    digest = fingerprint(body)
    assert digest is not None
    assert len(digest) == 8


def test_errors_have_one_base() -> None:
    """One `except IdempotentBusError` catches every refusal."""
    assert issubclass(InvalidBizId, IdempotentBusError)
    assert issubclass(InvalidBody, IdempotentBusError)
