"""The inner-msg-id: its form, its order, and that no two are the same."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idempotent_bus import msgid
from idempotent_bus.msgid import (
    derived_inner_msg_id,
    is_inner_msg_id,
    new_inner_msg_id,
    published_at,
    published_at_of,
)


def test_it_is_a_uuid_of_version_7() -> None:
    """An id is a canonical RFC 9562 UUID of version 7, so that any tool can read it."""
    text = new_inner_msg_id()
    parsed = uuid.UUID(text)
    assert str(parsed) == text
    assert parsed.version == 7
    assert parsed.variant == uuid.RFC_4122
    assert is_inner_msg_id(text)


def test_published_at_reads_the_time_from_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """`published_at` gives the millisecond in which the id was made."""
    later = time.time_ns() + 10**12
    monkeypatch.setattr(msgid.time, "time_ns", lambda: later)
    assert published_at(new_inner_msg_id()) == (later // 1_000_000) / 1000


def test_the_example_of_the_rfc() -> None:
    """The example of RFC 9562, appendix A.6, is read as the time that the RFC says."""
    assert published_at("017f22e2-79b0-7cc3-98c4-dc0c0c07398f") == 1645557742.0


_FOREIGN = (
    "x",
    "017F22E2-79B0-7CC3-98C4-DC0C0C07398F",
    "017f22e279b07cc398c4dc0c0c07398f",
    "017f22e2-79b0-4cc3-98c4-dc0c0c07398f",
    "017f22e2-79b0-7cc3-c8c4-dc0c0c07398f",
)


@pytest.mark.parametrize("value", [None, 7, "", "017f22e2-79b0-7cc3-98c4-dc0c0c07398f\n", *_FOREIGN])
def test_other_forms_are_not_ours(value: object) -> None:
    """Anything but the canonical form is neither accepted nor dated."""
    assert not is_inner_msg_id(value)
    assert published_at(value) is None


def test_a_derived_id_is_accepted_but_has_no_time() -> None:
    """A version 8 UUID, derived from what caused the message, is an id of ours that tells no time."""
    derived = "017f22e2-79b0-8cc3-98c4-dc0c0c07398f"
    assert is_inner_msg_id(derived)
    assert published_at(derived) is None


GOLDEN_DERIVED = {
    (bytes(16), "receipt"): "18e26c31-4c6f-83a1-8da9-5431784f2d7f",
    (bytes(range(16)), "receipt"): "88b3e7a3-069a-87c2-b281-699c6bee69a6",
    (bytes(range(16)), "receipt "): "f756e7db-3564-8d25-91e1-44f85f5797e6",
    (bytes(range(16)), "Beleg \u00fc"): "c2d7de84-3db5-88b3-9e0b-3d2e789113a3",
    (b"", "receipt"): "92587aef-6ecd-88c9-9b07-8b7cf6eed475",
}


@pytest.mark.parametrize(("source", "expected"), GOLDEN_DERIVED.items())
def test_golden_derived_ids(source: tuple[bytes, str], expected: str) -> None:
    """A derived id never changes between versions: a rerun across an upgrade publishes the same message."""
    assert derived_inner_msg_id(*source) == expected
    assert is_inner_msg_id(expected)
    assert uuid.UUID(expected).version == 8
    assert uuid.UUID(expected).variant == uuid.RFC_4122


_sources = st.tuples(st.binary(max_size=4) | st.binary(min_size=16, max_size=16), st.text("ab\0\u00e9", max_size=4))


@given(_sources, _sources)
def test_distinct_sources_have_distinct_ids(one: tuple[bytes, str], other: tuple[bytes, str]) -> None:
    """I10: two executions, or two names in one, never share a derived id, also where the joined bytes would agree."""
    assert (derived_inner_msg_id(*one) == derived_inner_msg_id(*other)) is (one == other)
    moved = (one[0] + one[1][:1].encode(), one[1][1:])
    assert (derived_inner_msg_id(*one) == derived_inner_msg_id(*moved)) is (one == moved)


def test_when_a_message_was_published() -> None:
    """A fresh id tells the time itself, a derived or foreign one leaves it to the timestamp; no other value is time."""
    fresh = "017f22e2-79b0-7cc3-98c4-dc0c0c07398f"
    derived = derived_inner_msg_id(bytes(16), "receipt")
    assert published_at_of(fresh, 5) == 1645557742.0
    assert published_at_of(derived, 1645557742) == 1645557742.0
    assert published_at_of(None, 1645557742.5) == 1645557742.5
    wrong: list[object] = [None, True, "1645557742", -1, 0, float("nan"), float("inf"), 10**400, [], b"5"]
    assert [published_at_of(derived, value) for value in wrong] == [None] * len(wrong)


def test_ids_increase_strictly() -> None:
    """Within a process every id is larger than the one before, many in each millisecond."""
    ids = [new_inner_msg_id() for _ in range(20_000)]
    assert ids == sorted(set(ids))


def test_ids_increase_although_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps back by an hour does not bring an id below an earlier one."""
    before = new_inner_msg_id()
    hour_ago = time.time_ns() - 3_600 * 10**9
    monkeypatch.setattr(msgid.time, "time_ns", lambda: hour_ago)
    ids = [before, *(new_inner_msg_id() for _ in range(100))]
    assert ids == sorted(set(ids))


def test_a_full_counter_borrows_the_next_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the counter of a millisecond is used up, the ids still increase."""
    before = new_inner_msg_id()
    monkeypatch.setattr(msgid.time, "time_ns", lambda: 0)
    monkeypatch.setattr(msgid, "_counter", msgid._COUNTER_LIMIT - 2)
    ids = [new_inner_msg_id() for _ in range(4)]
    assert ids == sorted(set(ids))
    assert min(ids) > before


def test_threads_never_share_an_id() -> None:
    """Eight threads make ids at once: all differ, and each thread sees its own increase."""
    made: list[list[str]] = [[] for _ in range(8)]
    barrier = threading.Barrier(8)

    def make(into: list[str]) -> None:
        barrier.wait()
        into.extend(new_inner_msg_id() for _ in range(2_000))

    threads = [threading.Thread(target=make, args=(into,)) for into in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(ids == sorted(ids) for ids in made)
    assert len({one for ids in made for one in ids}) == 16_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_makes_other_ids_even_if_the_lock_was_held() -> None:
    """A child starts afresh: another thread's lock does not hold it up, its ids are above those it inherited."""
    before = new_inner_msg_id()
    reader, writer = os.pipe()
    with msgid._lock:  # as if another thread were in the middle of making an id
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # a child that hangs must end too
            ids = [new_inner_msg_id() for _ in range(100)]
            os.write(writer, "\n".join(ids).encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        child = pipe.read().decode().split("\n")
    assert os.waitpid(pid, 0)[1] == 0
    parent = [new_inner_msg_id() for _ in range(100)]
    assert len(child) == 100
    assert min(child) > before
    assert not set(child) & set(parent)
