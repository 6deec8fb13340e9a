"""Frames that have arrived are taken from py-amqp's buffer, whole ones only."""

from __future__ import annotations

from struct import pack
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from idempotent_bus.buffered import BufferedReads


def frame(channel: int, payload: bytes, end: int = 0xCE) -> bytes:
    return pack(">BHI", 1, channel, len(payload)) + payload + bytes([end])


def reading(buffer: bytes) -> tuple[BufferedReads, list[Any], Any]:
    taken: list[Any] = []
    transport = SimpleNamespace(_read_buffer=buffer, _quick_recv=lambda wanted: wanted)
    amqp = SimpleNamespace(transport=transport, on_inbound_frame=taken.append)
    reads = BufferedReads(SimpleNamespace(connection=amqp))  # type: ignore[arg-type]
    return reads, taken, transport


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(0, 60))
def test_whole_frames_are_taken_and_a_part_is_left(payloads: list[bytes], cut: int) -> None:
    """However the bytes were cut on their way, each whole frame is handed on once, in order, and no byte is lost."""
    all_bytes = b"".join(frame(number, payload) for number, payload in enumerate(payloads))
    buffer = all_bytes[: max(0, len(all_bytes) - cut)]
    reads, taken, transport = reading(buffer)
    assert reads.has_message == (len(payloads) > 0 and len(buffer) >= len(frame(0, payloads[0])))
    reads.take(lambda: True)
    assert [payload for _, _, payload in taken] == payloads[: len(taken)]
    assert transport._read_buffer == buffer[sum(len(frame(0, payload)) for payload in payloads[: len(taken)]) :]
    rest = payloads[len(taken) :]
    assert not rest or len(transport._read_buffer) < len(frame(0, rest[0]))


def test_no_more_is_taken_than_is_wanted() -> None:
    """A full window leaves the rest in the buffer, for the next one."""
    reads, taken, transport = reading(frame(1, b"a") * 3)
    reads.take(lambda: len(taken) < 2)
    assert len(taken) == 2
    assert transport._read_buffer == frame(1, b"a")


def test_a_broken_frame_is_left_to_py_amqp() -> None:
    """What does not end as a frame must is not handed on: py-amqp finds it, and says so."""
    reads, taken, transport = reading(frame(1, b"a", end=0))
    reads.take(lambda: True)
    assert taken == []
    assert transport._read_buffer == frame(1, b"a", end=0)


def test_an_error_while_a_frame_is_taken_loses_only_that_frame() -> None:
    """What a receiver raises comes out, and the frames behind are still there."""
    reads, _, transport = reading(frame(1, b"a") + frame(1, b"b"))

    def fail(_: Any) -> None:
        raise ValueError

    reads._amqp.on_inbound_frame = fail
    try:
        reads.take(lambda: True)
    except ValueError:
        assert transport._read_buffer == frame(1, b"b")
    else:
        raise AssertionError("the error was swallowed")


def test_what_takes_a_frame_may_read_on() -> None:
    """py-amqp answers a channel's close and waits for the next frame: it finds what lies behind, and nothing again."""
    reads, taken, transport = reading(frame(1, b"a") + frame(1, b"close") + frame(1, b"b") + frame(1, b"c"))
    take = reads._amqp.on_inbound_frame

    def read_on(found: Any) -> None:
        take(found)
        if found[2] == b"close":
            size = len(frame(1, b"b"))
            assert transport._read_buffer[:size] == frame(1, b"b")
            transport._read_buffer = transport._read_buffer[size:] + frame(1, b"d")

    reads._amqp.on_inbound_frame = read_on
    reads.take(lambda: True)
    assert [payload for _, _, payload in taken] == [b"a", b"close", b"c", b"d"]
    assert transport._read_buffer == b""


def test_more_is_read_than_was_asked_for() -> None:
    """The socket is asked for kilobytes at a time, and for more only if one piece is longer."""
    _, _, transport = reading(b"")
    assert transport._quick_recv(7) == 65_536
    assert transport._quick_recv(100_000) == 100_000
