"""Deliveries that are read past py-amqp are what py-amqp and kombu would have made of them."""

from __future__ import annotations

import json
from struct import pack
from types import SimpleNamespace
from typing import Any

import amqp
import pytest
from amqp.method_framing import frame_handler
from amqp.serialization import dumps
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu import Consumer
from kombu.exceptions import DecodeError
from kombu.message import Message
from kombu.serialization import registry
from kombu.transport.pyamqp import Channel

from idempotent_bus.deliveries import Deliveries
from idempotent_bus.kombu_message import decoded

TAG = "None1"
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=20)
SHORT = st.text(max_size=20).filter(lambda text: len(text.encode("utf-8", "surrogatepass")) < 256)
NUMBERS = st.integers(0, 2**31 - 1)
VALUES = st.recursive(
    st.one_of(st.text(max_size=40), NUMBERS, st.booleans(), st.none(), st.floats(allow_nan=False)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
PROPERTIES = st.fixed_dictionaries(
    {},
    optional={
        "content_type": st.sampled_from(["application/json", "text/plain", ""]),
        "content_encoding": st.sampled_from(["utf-8", "binary", "utf-16", "no such", ""]),
        "application_headers": st.dictionaries(NAMES, st.text(max_size=40), max_size=4)
        | st.dictionaries(NAMES, VALUES),
        "delivery_mode": st.sampled_from([1, 2]),
        "priority": st.integers(0, 255),
        "timestamp": st.integers(0, 2**40),
        **dict.fromkeys(("correlation_id", "reply_to", "expiration", "message_id", "type", "user_id", "app_id"), SHORT),
    },
)


class Rig:
    """A channel without a broker, read by both: py-amqp with kombu, and `Deliveries`."""

    def __init__(self, accept: Any = None) -> None:
        self.connection = SimpleNamespace(channels={}, bytes_recv=0, confirm_publish=False)
        self.connection._used_channel_ids = []
        self.connection._claim_channel_id = lambda number: None
        self.channel = Channel(self.connection, 1)
        self.messages: list[Message] = []
        consumer = SimpleNamespace(
            accept=accept,
            on_message=self.messages.append,
            on_decode_error=None,
            channel=self.channel,
            _active_tags={"q": TAG},
        )
        self.channel.callbacks[TAG] = lambda raw: Consumer._receive_callback(consumer, raw)
        self.deliveries = Deliveries(self.channel, [consumer])

    def by_amqp(self, frames: list[tuple[int, bytes]]) -> Message:
        """What py-amqp and kombu make of it."""
        handle = frame_handler(
            self.connection, lambda _, *args: self.channel.dispatch_method(args[0], args[1], args[2])
        )
        for kind, payload in frames:
            handle((kind, 1, payload))
        return self.messages.pop()

    def at_once(self, buffer: bytes, at: int = 0) -> Message | None:
        """What `Deliveries` makes of it."""
        found = self.deliveries.read(buffer, at)
        if found is None:
            return None
        end, on_message, message = found
        assert end == len(buffer)
        on_message(message)
        return self.messages.pop()


def delivery(
    properties: dict[str, Any], body: bytes, *, number: int = 7, redelivered: bool = False, exchange: str = "",
    routing_key: str = "q", tag: str = TAG, pieces: int = 1,
) -> list[tuple[int, bytes]]:  # fmt: skip
    """The frames of a delivery, kind and payload."""
    method = pack(">HH", 60, 60) + dumps("sLbss", (tag, number, redelivered, exchange, routing_key))
    header = pack(">HHQ", 60, 0, len(body)) + amqp.Message(**properties)._serialize_properties()
    size = -(-len(body) // pieces) or 1
    return [(1, method), (2, header), *((3, body[at : at + size]) for at in range(0, len(body), size))]


def joined(frames: list[tuple[int, bytes]]) -> bytes:
    """The frames as the broker sends them."""
    return b"".join(pack(">BHI", kind, 1, len(payload)) + payload + b"\xce" for kind, payload in frames)


def shown(message: Message) -> dict[str, Any]:
    """All that a message tells."""
    names = ("body", "delivery_tag", "content_type", "content_encoding", "delivery_info", "headers", "properties")
    more = {"class": type(message), "state": message._state, "channel": message.channel, "accept": message.accept}
    return {**{name: getattr(message, name) for name in names}, **more, "errors": message.errors}


@settings(deadline=None)
@given(PROPERTIES, st.binary(max_size=300), st.integers(1, 2**63 - 1), st.booleans(), SHORT, SHORT)
def test_a_delivery_is_what_py_amqp_and_kombu_would_have_made(
    properties: dict[str, Any], body: bytes, number: int, redelivered: bool, exchange: str, routing_key: str
) -> None:
    """Every property, header, body and delivery info is the same, and so is the count of frames; else it is left."""
    rig = Rig()
    frames = delivery(
        properties, body, number=number, redelivered=redelivered, exchange=exchange, routing_key=routing_key
    )
    mine = rig.at_once(joined(frames))
    if mine is None:
        assert rig.connection.bytes_recv == 0
        return
    assert rig.connection.bytes_recv == 3
    assert shown(mine) == shown(rig.by_amqp(frames))


@pytest.mark.parametrize("accept", [None, {"application/json"}])
def test_a_plain_delivery_is_read_at_once(accept: Any) -> None:
    """What our producers send is not left to py-amqp: else nothing here would be tested."""
    rig = Rig(accept)
    headers = {"inner-msg-id": "0190a000-0000-7000-8000-000000000000", "x-deduplication-header": "a"}
    properties = {
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "application_headers": headers,
        "delivery_mode": 2,
        "priority": 0,
    }
    frames = delivery(properties, b'{"a": 1}')
    mine = rig.at_once(joined(frames))
    assert mine is not None
    assert mine.headers == headers
    assert shown(mine) == shown(rig.by_amqp(frames))
    assert rig.at_once(b"before" + joined(frames), 6) is not None


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param(delivery({}, b""), id="no body"),
        pytest.param(delivery({}, b"body", pieces=2), id="a body in two frames"),
        pytest.param(delivery({"application_headers": {"compression": "gzip"}}, b"x"), id="compressed"),
        pytest.param(delivery({"application_headers": {"n": 1}}, b"x"), id="a header that is no text"),
        pytest.param(delivery({}, b"x", tag="other"), id="a consumer that is not known"),
        pytest.param(delivery({}, b"x")[:2], id="the body has not come"),
        pytest.param([(1, pack(">HH", 60, 30) + dumps("sb", (TAG, False)))], id="another method"),
        pytest.param([(8, b"")], id="a heartbeat"),
    ],
)
def test_what_is_not_plain_is_left_to_py_amqp(frames: list[tuple[int, bytes]]) -> None:
    """Nothing is taken, and nothing is counted."""
    rig = Rig()
    assert rig.at_once(joined(frames)) is None
    assert rig.connection.bytes_recv == 0


def test_a_cancelled_consumer_and_a_closing_channel_get_nothing() -> None:
    """py-amqp gives the messages of a cancelled consumer back, and ignores those of a channel that closes."""
    frames = joined(delivery({}, b"x"))
    rig = Rig()
    assert rig.at_once(frames) is not None  # so that what is remembered of the consumer does not decide
    del rig.channel.callbacks[TAG]
    assert rig.at_once(frames) is None
    rig = Rig()
    rig.channel.is_closing = True
    assert rig.at_once(frames) is None
    rig = Rig()
    rig.channel.channel_id = 2
    assert rig.at_once(frames) is None


def test_a_cut_delivery_is_left_at_every_length() -> None:
    """What has not arrived as a whole stays where it is."""
    properties = {"content_type": "text/plain", "application_headers": {"a": "b"}, "timestamp": 5}
    buffer = joined(delivery(properties, b"body"))
    rig = Rig()
    assert all(rig.at_once(buffer[:end]) is None for end in range(len(buffer)))
    assert rig.at_once(buffer) is not None


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_damaged_delivery_raises_nothing(data: st.DataObject) -> None:
    """It is left to py-amqp, or py-amqp would have read the same."""
    frames = delivery({"content_type": "text/plain", "application_headers": {"a": "b", "c": "d"}}, b"body")
    buffer = bytearray(joined(frames))
    at = data.draw(st.integers(0, len(buffer) - 1))
    buffer[at] = data.draw(st.integers(0, 255))
    rig = Rig()
    mine = rig.deliveries.read(bytes(buffer), 0)
    if mine is None:
        return
    damaged, place = [], 0
    for kind, payload in frames:
        damaged.append((kind, bytes(buffer[place + 7 : place + 7 + len(payload)])))
        place += len(payload) + 8
    assert shown(mine[2]) == shown(rig.by_amqp(damaged))


# --- the body ------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.text(max_size=20)
    | VALUES.map(json.dumps)
    | VALUES.map(lambda value: json.dumps(value, ensure_ascii=False, indent=1) + " ")
    | st.sampled_from(
        [
            '{"__type__": "uuid", "__value__": {"hex": "0190a00000007000800000000000000a"}}',
            '{"\\u005f_type__": "decimal", "__value__": "1.5"}',
            '{"a": {"__type__": "bytes", "__value__": "x"}}',
            '{"__type__": "nothing known", "__value__": 1}',
            "[1, 2",
            "NaN",
            " 1",
            "1 2",
            "[" * 5000,
        ]
    ),
    st.sampled_from([None, {"application/json"}, {"text/plain"}]),
)
def test_a_body_is_decoded_as_kombu_decodes_it(body: str, accept: Any) -> None:
    """The same value or the same error, whatever is in it: typed values, escapes, rubbish, what is not accepted."""

    def outcome(decode: Any, given: Any) -> Any:
        message = Message(given, content_type="application/json", content_encoding="utf-8", accept=accept)
        try:
            return repr(decode(message)), repr(message.payload)
        except Exception as error:  # noqa: BLE001 - compared
            return type(error)

    encoded = body.encode("utf-8", "surrogatepass")
    for one in (body, encoded, bytearray(encoded)):
        assert outcome(decoded, one) == outcome(Message.decode, one)


def test_another_json_is_used_where_the_user_has_registered_one() -> None:
    """kombu's registry has the last word: a serializer that was replaced, or disabled, is honoured."""
    message = Message('{"a": 1}', content_type="application/json", content_encoding="utf-8")
    known = registry._decoders["application/json"]
    registry._decoders["application/json"] = lambda text: ["mine", text]
    try:
        assert decoded(message) == ["mine", '{"a": 1}']
    finally:
        registry._decoders["application/json"] = known

    def refuse(text: str) -> Any:
        raise ValueError

    registry._decoders["application/json"] = refuse
    try:
        with pytest.raises(DecodeError):
            decoded(Message("1", content_type="application/json", content_encoding="utf-8"))
    finally:
        registry._decoders["application/json"] = known
