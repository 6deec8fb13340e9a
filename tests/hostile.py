"""Messages that nobody should send: generated ones, the same in every run, and a list of old acquaintances.

They are sent below every producer, as raw as the transport lets through.
"""

from __future__ import annotations

import base64
import bz2
import functools
import json
import lzma
import random
import unicodedata
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import amqp
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from kombu import Connection

from idempotent_bus.headers import DEAD_AT, INNER_MSG_ID, ORIGIN_QUEUE, PRODUCER, REDRIVE, SIGNATURE
from idempotent_bus.model import Landing

#: Scopes that run into each other where somebody joins the parts of a key by a separator.
SCOPES = ("s", "s:a", "s:a:b")

#: The longest body that the consumers take.
LARGE = 1 << 20


@dataclass(frozen=True)
class Raw:
    """One message as it goes to the transport. scope: which of SCOPES it is for."""

    scope: int
    body: Any
    content_type: Any = "application/json"
    content_encoding: Any = "utf-8"
    headers: dict[str, Any] = field(default_factory=dict)
    properties: dict[str, Any] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """True if only the id in the body is of interest: JSON, with nothing odd around it."""
        usual = (self.content_type, self.content_encoding) == ("application/json", "utf-8")
        return usual and set(self.headers) <= {INNER_MSG_ID} and not self.properties


def canonical(value: Any) -> str | None:
    """What an id of a body counts as, written down a second time: its text, or None where it cannot be an id."""
    if type(value) is int:
        value = str(value) if abs(value) < 10**512 else None
    elif isinstance(value, uuid.UUID):
        value = str(value)
    if not isinstance(value, str) or not 0 < len(value) <= 512:
        return None
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
        return None
    return value if len(value.encode()) <= 512 else None


def expected(raw: Raw) -> tuple[int, str] | None:
    """The scope and canonical id of a plain message, by the test's own reading; None where it must be refused."""
    if raw.body is None or len(raw.body) > LARGE:
        return None
    try:
        value = json.loads(raw.body.decode() if isinstance(raw.body, bytes) else raw.body)["id"]
        if isinstance(value, dict) and set(value) == {"__type__", "__value__"} and value["__type__"] == "uuid":
            value = uuid.UUID(**value["__value__"])  # as kombu writes a UUID
    except Exception:  # noqa: BLE001 - whatever it is, it has no id
        return None
    text = canonical(value)
    return None if text is None else (raw.scope, text)


# --- ids -------------------------------------------------------------------------------------------------

#: Ids that look, fold, trim, join or print alike.
ALIKE: list[Any] = [
    *(1, "1", 1.0, True, "1.0", "True", "true", " 1", "1 ", "01", "+1", "\uff11", "\u0661", 10**20, str(10**20)),
    *(0, -0.0, False, None, "None", "null", "", " ", "nan", float("nan"), float("inf")),
    *("\u00e9", "e\u0301", "E\u0301", "\u00c9", "\ufb01", "fi", "\u212b", "\u00c5", "A\u030a", "\u1e9b\u0323"),
    *("a", "a:b", "a:b:c", "b", ":", "::", "a/b", "a|b", "a,b", "a\u001fb", "b:c", "a:", ":a", "a\u200b", "a\u00a0"),
    *("A", "a ", "\ta", "a\n", "a\0", "\0", "a\0b", "\x7f", "\x85", "\ud800", "a\udfff", "\ud83d\ude00", "\U0001f600"),
    *("\u2028", "\ufeff", "\ufeffa", "\u202e1", "x" * 512, "x" * 513, "\u00e9" * 256, "\u00e9" * 257, "x" * 100_000),
    *(
        [],
        {},
        [1],
        ["a"],
        {"a": 1},
        {"id": "1"},
        [[]],
        "[]",
        "{}",
        "['a']",
        10**511,
        10**600,
        -1,
        "-1",
        2**63,
        -(2**64),
    ),
    {"__type__": "uuid", "__value__": {"hex": "0190b4d27c1e7a3b8f000123456789ab"}},
    *(
        "0190b4d2-7c1e-7a3b-8f00-0123456789ab",
        "0190B4D2-7C1E-7A3B-8F00-0123456789AB",
        "0190b4d27c1e7a3b8f000123456789ab",
    ),
    {"__type__": "uuid", "__value__": {"hex": "nonsense"}},
    {"__type__": "uuid", "__value__": 5},
    {"__type__": ["uuid"], "__value__": 5},
    {"__type__": "no-such", "__value__": 5},
    {"__type__": "decimal", "__value__": "1E+999999"},
    {"__type__": "datetime", "__value__": "9999-12-31T23:59:59"},
    {"__type__": "base64", "__value__": "*"},
    {"__type__": "bytes", "__value__": "1"},
]

_text = st.text(st.sampled_from("aAb:1 \u00e9e\u0301\u212b\0\n\ud800\u200b/|\U0001f600"), max_size=4)
_ids = (
    st.sampled_from(ALIKE)
    | _text
    | st.text(max_size=20)
    | st.integers(-3, 12)
    | st.integers()
    | st.floats()
    | st.booleans()
    | st.uuids().map(str)
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=5,
)


def _dumps(value: Any, ascii: bool = True) -> bytes:
    return json.dumps(value, ensure_ascii=ascii).encode("utf-8", "surrogatepass")


def nested(depth: int, kind: str, id: Any = "deep") -> bytes:
    """A JSON body of that depth; written by hand, since json.dumps has a limit of its own."""
    opening, closing = ("[", "]") if kind == "list" else ('{"a":', "}")
    inner = "1" if kind != "list" else ""
    return b'{"id": %s, "x": %s}' % (_dumps(id), (opening * depth + inner + closing * depth).encode())


# --- what lies around the body --------------------------------------------------------------------------

_ODD_VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        5,
        2**31,
        2**63,
        2**70,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "x",
        "1",
        "\0",
        "\ud800",
    ),
    *("\u00e9", "x" * 300, "x" * 70_000, b"", b"\xff\x00", [], [1, "a"], {}, {"a": {"b": [1]}}, [[[[]]]]),
]
_odd = st.sampled_from(_ODD_VALUES)
_names = st.sampled_from(
    [
        *(INNER_MSG_ID, INNER_MSG_ID, REDRIVE, REDRIVE, DEAD_AT, ORIGIN_QUEUE, PRODUCER, SIGNATURE, "compression"),
        *(
            "x-death",
            "x-delivery-count",
            "x-deduplication-header",
            "x-first-death-queue",
            "CC",
            "BCC",
            "x" * 255,
            "\u00e9",
        ),
    ]
)
_inner_ids = st.sampled_from([f"017f22e2-79b0-7cc3-98c4-{number:012x}" for number in range(3000)])
_COMPRESSIONS = ["gzip", "zlib", "application/x-gzip", "bzip2", "lzma", "application/x-bz2", "no-such", "GZIP", "xz"]
_CONTENT_TYPES = [
    *("application/json", "application/json", "text/plain", "application/data", "application/x-python-serialize"),
    *("application/x-yaml", "application/x-msgpack", "application/x-no-such", "APPLICATION/JSON", "", None, "x" * 255),
    "application/json; charset=utf-8",
]
_ENCODINGS = [
    *("utf-8", "UTF-8", "utf8", "binary", "us-ascii", "latin-1", "utf-16", "utf-16-be", "utf-32", "utf-7", "utf-8-sig"),
    *(
        "base64",
        "hex",
        "rot13",
        "zlib",
        "idna",
        "punycode",
        "unicode_escape",
        "raw_unicode_escape",
        "undefined",
        "cp037",
    ),
    *("no-such", "", None, "\u00e9", "x" * 255, "../../etc/passwd", "os", "mbcs"),
]
_bytes = st.binary(max_size=40) | st.sampled_from(
    [
        *(b"", b"\0", b"null", b"[]", b"{}", b'"id"', b"1", b"true", b"NaN", b'{"id"', b'{"id": }', b'{"id": "a"} x'),
        *(b"\xff\xfe", b"\xef\xbb\xbf{}", b'\xef\xbb\xbf{"id": "bom"}', b'{"id": "\xff"}', b'{"id": "\xed\xa0\x80"}'),
        *(
            b'{"id": "twice", "id": "once"}',
            b'{"\\u0069d": "escaped"}',
            b'{"id": 1e400}',
            b'{"id": 1E2}',
            b'{"id": -0}',
        ),
        *(b'{"id": ' + b"9" * 5000 + b"}", b'{"id": 1' + b"0" * 511 + b"}", b'{"id": "\\ud83d"}', b"\x80\x04N."),
        *(
            b"cos\nsystem\n(S'true'\ntR.",
            b"!!python/object/apply:os.system ['true']",
            b"{'id': 'a'}",
            b"\x78\x9c",
            b"BZh9",
        ),
    ]
)


@st.composite
def _plain(draw: st.DrawFn) -> Raw:
    body = {"id": draw(_ids)}
    if draw(st.integers(0, 3)) == 0:
        body["x"] = draw(_json)
    headers = {INNER_MSG_ID: draw(_inner_ids)} if draw(st.booleans()) else {}
    return Raw(draw(st.integers(0, 2)), _dumps(body, draw(st.booleans())), headers=headers)


@st.composite
def _odd_body(draw: st.DrawFn) -> Raw:
    body = draw(_bytes | _json.map(_dumps))
    return Raw(draw(st.integers(0, 2)), body, draw(st.sampled_from(_CONTENT_TYPES)), draw(st.sampled_from(_ENCODINGS)))


@st.composite
def _odd_surroundings(draw: st.DrawFn) -> Raw:
    plain = draw(_plain())
    headers = dict(plain.headers)
    for _ in range(draw(st.integers(1, 2))):
        headers[draw(_names)] = draw(_odd)
    properties = draw(
        st.dictionaries(
            # Not the expiration: a broker that is told to forget a message may.
            st.sampled_from(["timestamp", "correlation_id", "reply_to", "type", "app_id", "message_id"]),
            _odd,
            max_size=1,
        )
    )
    encoding = draw(st.sampled_from(_ENCODINGS)) if draw(st.booleans()) else "utf-8"
    return Raw(plain.scope, plain.body, "application/json", encoding, headers, properties)


@st.composite
def _compressed(draw: st.DrawFn) -> Raw:
    body = draw(_plain()).body
    squeeze = draw(st.sampled_from([zlib.compress, bz2.compress, lzma.compress, bytes]))
    body = squeeze(body)
    damage = draw(st.integers(0, 3))
    if damage == 1:
        body = body[: draw(st.integers(0, len(body)))]
    elif damage == 2:
        body = body[:5] + b"\0" + body[6:]
    name = draw(st.sampled_from(_COMPRESSIONS) | _odd)
    return Raw(draw(st.integers(0, 2)), body, headers={"compression": name})


_messages = st.one_of(
    _plain(), _plain(), _plain(), _odd_body(), _odd_surroundings(), _odd_surroundings(), _compressed()
)

LARGE = 1 << 20
#: Of one run of Hypothesis, which begins with the simplest each time.
_EXAMPLES = 3_000


def fixed() -> list[Raw]:
    """The list: ids that look like others, in every scope; depths; sizes around `max_body=LARGE`; odd surroundings."""
    raws = [Raw(scope, _dumps({"id": value}), headers={}) for scope in range(3) for value in ALIKE]
    raws += [Raw(0, b'{"id": "\xed\xa0\x80"}'), Raw(0, _dumps({"id": "\u00e9"}, False)), Raw(0, "text"), Raw(0, None)]
    for depth in (10, 100, 300, 900, 1_000, 3_000, 10_000, 100_000):
        raws += [Raw(1, nested(depth, kind, f"deep {depth} {kind}")) for kind in ("list", "dict")]
        raws += [Raw(1, b'{"id": ' + b"[" * depth + b"]" * depth + b"}"), Raw(1, b"[" * depth)]
    for size in (LARGE - 1, LARGE, LARGE + 1, 3 * LARGE):
        head = b'{"id": "size %d", "x": "' % size
        raws.append(Raw(2, head + b"x" * (size - len(head) - 2) + b'"}'))
        raws.append(Raw(2, "\u00e9".encode() * (size // 2), "text/plain"))
    raws += [
        Raw(0, _dumps({"id": f"header {n}"}), headers={name: odd})
        for n, odd in enumerate(_ODD_VALUES)
        for name in (INNER_MSG_ID, REDRIVE, DEAD_AT, "x-death", "compression")
    ]
    raws += [
        Raw(0, _dumps({"id": f"property {n}"}), properties={"timestamp": odd}) for n, odd in enumerate(_ODD_VALUES)
    ]
    raws += [Raw(0, _dumps({"id": f"encoding {encoding}"}), content_encoding=encoding) for encoding in _ENCODINGS]
    raws += [Raw(0, _dumps({"id": f"type {kind}"}), content_type=kind) for kind in _CONTENT_TYPES]
    raws += [Raw(0, _dumps({"id": f"odd type {n}"}), content_type=odd) for n, odd in enumerate(_ODD_VALUES)]
    raws += [Raw(0, _dumps({"id": f"odd encoding {n}"}), content_encoding=odd) for n, odd in enumerate(_ODD_VALUES)]
    return raws


@functools.cache
def generate(count: int) -> Sequence[Raw]:
    """The fixed list, as many generated messages as it takes, a tenth of copies; mixed, the same ones in every run."""
    raws = fixed()
    seen = {repr(raw) for raw in raws}

    def collect(raw: Raw) -> None:
        if len(raws) < distinct and repr(raw) not in seen:
            seen.add(repr(raw))
            raws.append(raw)

    distinct = count - count // 10
    for number in range(1000):
        if len(raws) >= distinct:
            break
        settled = settings(
            max_examples=_EXAMPLES,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        seed(number)(settled(given(_messages)(collect)))()
    raws += random.Random(0).choices(raws, k=count - distinct)  # and copies of some
    return random.Random(1).sample(raws, count)


# --- what somebody can put into the storage of a virtual transport ------------------------------------------


def _payload(**changes: Any) -> dict[str, Any]:
    properties = {
        "body_encoding": "base64",
        "delivery_info": {"exchange": "", "routing_key": "q"},
        "delivery_mode": 2,
        "delivery_tag": "tag",
        "priority": 0,
    }
    payload = {
        "body": base64.b64encode(b'{"id": "stored"}').decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {},
        "properties": {**properties, **changes.pop("properties", {})},
    }
    return {name: value for name, value in {**payload, **changes}.items() if value is not ...}


_NOT: list[Any] = [None, ..., 5, "x", [1], {}, True]
#: Texts in the place of kombu's: most are no message at all.
STORED: list[str] = [
    *(json.dumps(_payload(properties={"delivery_tag": number})) for number in range(3)),
    *(json.dumps(_payload(headers=value)) for value in _NOT),
    *(json.dumps(_payload(body=value)) for value in [*_NOT, {"id": 1}, "***", "\ud800", ""]),
    *(json.dumps(_payload(**{"content-type": value})) for value in _NOT),
    *(json.dumps(_payload(**{"content-encoding": value})) for value in _NOT),
    *(
        json.dumps(_payload(properties={name: value}))
        for name in ("body_encoding", "delivery_info", "delivery_tag", "priority", "correlation_id", "reply_to")
        for value in _NOT
        if value is not ...
    ),
    *(json.dumps(_payload(properties={"body_encoding": encoding})) for encoding in ("rot13", "utf-8", "BASE64")),
    *(json.dumps(_payload(properties={"delivery_info": {"exchange": 5, "routing_key": [1], "queue": "x"}})),),
    *(json.dumps({**_payload(), "properties": value}) for value in (None, [], {}, "x", 5)),
    *(json.dumps(value) for value in (None, 5, "x", [], {}, {"properties": {}})),
    *("", "{", "\0", "[" * 5_000, '{"a":' * 5_000, "nonsense", "NaN"),
]


# --- what only RabbitMQ lets through ---------------------------------------------------------------------


def _item(kind: str, value: bytes = b"") -> bytes:
    return kind.encode() + value


def _table(*items: tuple[bytes, bytes]) -> bytes:
    body = b"".join(bytes([len(name)]) + name + value for name, value in items)
    return len(body).to_bytes(4, "big") + body


def _nested_tables(depth: int) -> bytes:
    table = _table((b"a", _item("t", b"\1")))
    for _ in range(depth):
        table = _table((b"", _item("F", table)))
    return table


def _header(value: bytes, name: bytes = b"h") -> bytes:
    return b"\x20\x00" + _table((name, value))


#: Properties of messages, byte by byte, as a client in another language can send them.
PROPERTIES: dict[str, bytes] = {
    "content type": b"\x80\x00\x02\xff\xfe",
    "content encoding": b"\x40\x00\x02\xff\x00",
    "correlation id": b"\x04\x00\x01\xff",
    "message id": b"\x00\x80\x01\xff",
    "timestamp": b"\x00\x40" + b"\xff" * 8,
    "timestamp 0": b"\x00\x40" + bytes(8),
    "a name that is no text": _header(_item("t", b"\1"), b"\xff\xfe"),
    "a name of ours": _header(_item("S", _table((b"x", b""))), b"idempotent-bus-redrive"),
    "a long name": _header(_item("t", b"\1"), b"n" * 255),
    "a text that is none": _header(_item("S", b"\0\0\0\2\xff\xfe"), b"inner-msg-id"),
    "time beyond time": _header(_item("T", b"\xff" * 8)),
    "time after 9999": _header(_item("T", (2**40).to_bytes(8, "big"))),
    "tables 100 deep": b"\x20\x00" + _nested_tables(100),
    **{f"tables {depth} deep": b"\x20\x00" + _nested_tables(depth) for depth in range(200, 1000, 100)},
    "tables 5,000 deep": b"\x20\x00" + _nested_tables(5_000),
    "a table cut short": b"\x20\x00\0\0\0\x09\1hS",
    "an unknown type": _header(_item("Z", b"1")),
    **{
        f"type {kind}": _header(_item(kind, b"\xff" * size))
        for kind, size in zip("bBsuIilLfd", (1, 1, 2, 2, 4, 4, 8, 8, 4, 8), strict=True)
    },
    "type D": _header(_item("D", b"\xff\x7f\xff\xff\xff")),
    "type V": _header(_item("V")),
    "type x": _header(_item("x", b"\0\0\0\1\xff")),
    "type A": _header(_item("A", b"\0\0\0\3V" + b"t\1")),
}


class _Crafted(amqp.Message):
    """A message with properties of one's own."""

    def __init__(self, body: bytes, properties: bytes) -> None:
        super().__init__(body)
        self.crafted = properties

    def _serialize_properties(self) -> bytes:
        return self.crafted


def send_crafted(connection: Connection, exchange: str, routing_key: Any, body: bytes, properties: bytes) -> bool:
    """Send one message with these properties to RabbitMQ. False: it refused it, and the connection is another one."""
    try:
        channel = connection.default_channel
        channel.basic_publish_confirm(_Crafted(body, properties), exchange=exchange, routing_key=routing_key)
    except Exception:  # noqa: BLE001 - RabbitMQ closes the connection
        connection.collect()
        return False
    return True


def send(connection: Connection, queues: Sequence[str], raws: Sequence[Raw]) -> list[tuple[Raw, str]]:
    """Put them on the queues of their scopes. Returns those that were refused, with the error's name or "duplicate"."""
    refused = []
    channel = connection.channel()
    amqp_ = connection.transport.driver_type == "amqp"
    for raw in raws:
        try:
            message = channel.prepare_message(
                raw.body, None, raw.content_type, raw.content_encoding, dict(raw.headers), dict(raw.properties)
            )
            publish = channel.basic_publish_confirm if amqp_ else channel.basic_publish
            landing = publish(message, exchange="", routing_key=queues[raw.scope])
            if landing is Landing.DUPLICATE:
                refused.append((raw, landing.value))
        except Exception as error:  # noqa: BLE001 - what a transport cannot send is refused before it is sent
            refused.append((raw, type(error).__name__))
            if amqp_:
                connection.collect()
                channel = connection.channel()
    return refused
