"""Small parts of the Redis transport that need no server: names of keys, bytes on the wire, the message's text."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis import exceptions

from idempotent_bus.transports.redis import scripts as redis_scripts
from idempotent_bus.transports.redis.fetch import message_of
from idempotent_bus.transports.redis.keys import mark_key, queue_keys, queue_of
from idempotent_bus.transports.redis.wire import Wire, pack

names = st.text(min_size=1, max_size=20)


@given(queue=names, prefix=st.text(max_size=10))
def test_every_key_of_a_queue_names_its_queue(queue: str, prefix: str) -> None:
    """restore finds the queue of a key again, whatever braces and colons its name or the prefix has."""
    keys = queue_keys(queue, prefix=prefix, lists={"0": queue, "3": f"{queue}+3"})
    assert keys.lists == (prefix + queue, f"{prefix}{queue}+3")
    for key in (keys.owners, keys.delayed, keys.dead, keys.held("a1b2")):
        assert queue_of(key, prefix=prefix) == queue


@given(first=names, second=names, one=names, two=names)
def test_marks_of_different_messages_or_lists_differ(first: str, second: str, one: str, two: str) -> None:
    """I10/I14: another list, id or redrive is another mark, whatever the names are made of."""
    if (first, one) != (second, two):
        assert mark_key(first, one, None, prefix="") != mark_key(second, two, None, prefix="")
        assert mark_key(f"{first}}}:{one}", two, None, prefix="") != mark_key(first, f"{one}}}:{two}", None, prefix="")
    assert mark_key(first, f"{one}:r1", None, prefix="") != mark_key(first, one, 1, prefix="")
    assert mark_key(first, one, 1, prefix="") != mark_key(first, one, 2, prefix="")


def test_marks_and_foreign_keys_belong_to_no_queue() -> None:
    """They are left alone by restore."""
    assert queue_of(mark_key("q", "m-1", None, prefix=""), prefix="") is None
    assert queue_of("celery", prefix="") is None
    assert queue_of("idempotent-bus:dead:{other:q}", prefix="app:") is None


def test_scripts_say_what_they_take_and_fit_both_kinds_of_server() -> None:
    """Each script has its header, and a form without the line that old servers do not know; only landing obeys a full
    server in both forms."""
    for script in vars(redis_scripts).values():
        if isinstance(script, redis_scripts.Script):
            for word in (b"KEYS", b"ARGV", b"returns"):
                assert word in script.plain.text, script.name
            assert not script.plain.text.startswith(b"#!")
            assert script.flagged.text.startswith(b"#!lua flags=allow-oom\n") is (script.name != "land")


def test_a_message_that_came_back_says_so() -> None:
    """The count in front of the text becomes part of the delivery info and leaves the message."""
    text = b'{"idempotent-bus-deliveries": 3, "body": "x", "properties": {}}'
    info = {"x-delivery-count": 3, "redelivered": True}
    assert message_of(text) == {"body": "x", "properties": {"delivery_info": info}}
    assert message_of(b'{"body": "x", "properties": {}}')["properties"]["delivery_info"] == {}
    for wrong in (b"\xff", b"[]", b"1", b"{}", b'{"properties": 1}'):
        with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
            message_of(wrong)


# --- bytes --------------------------------------------------------------------------------------------------


class FakeConnection:
    """What a pool gives: a connection that is open on one end of a socket pair."""

    socket_timeout = 5

    def __init__(self, end: socket.socket) -> None:
        self._sock = end

    def connect(self) -> None: ...

    def disconnect(self) -> None:
        self._sock.close()


class FakePool:
    def __init__(self, end: socket.socket) -> None:
        self._connection = FakeConnection(end)

    def get_connection(self) -> FakeConnection:
        return self._connection

    def release(self, connection: Any) -> None: ...


HELLO = b"%2\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$6\r\n7.0.15\r\n"


@pytest.fixture
def ends() -> Iterator[tuple[Wire, socket.socket]]:
    """A wire, and the server's end of it; the greeting is answered."""
    near, far = socket.socketpair()
    far.sendall(HELLO + b"+OK\r\n")
    yield Wire(FakePool(near), tracking=True), far
    near.close()
    far.close()


def test_commands_are_packed_as_the_server_reads_them() -> None:
    assert pack(("SET", "ключ", b"\x00\r\n", 7)) == (
        b"*4\r\n$3\r\nSET\r\n$8\r\n" + "ключ".encode() + b"\r\n$3\r\n\x00\r\n\r\n$1\r\n7\r\n"
    )


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (b":7\r\n", 7),
        (b"$-1\r\n", None),
        (b"_\r\n", None),
        (b"*-1\r\n", None),
        (b"$4\r\n\r\n\r\n\r\n", b"\r\n\r\n"),
        (b"*2\r\n:1\r\n*1\r\n$1\r\na\r\n", [1, [b"a"]]),
        (b"~1\r\n#t\r\n", [True]),
        (b"%1\r\n+a\r\n:1\r\n", [b"a", 1]),
        (b"=5\r\ntxt:a\r\n", b"a"),
        (b",1.5\r\n", b"1.5"),
    ],
)
def test_replies_are_read_however_they_arrive(ends: tuple[Wire, socket.socket], sent: bytes, read: Any) -> None:
    """Every kind of reply, also with news of changes before it: the news is noted, the reply is the command's."""
    wire, far = ends
    news = b">2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\nq\r\n"
    far.sendall(news + sent)
    assert wire.one("ANY") == read
    assert wire.changed == [b"q"]
    assert wire.tracking


def test_errors_are_redis_pys_and_do_not_lose_the_place(ends: tuple[Wire, socket.socket]) -> None:
    """An error in the middle of a pipeline is returned in its place; the kinds are those that kombu knows."""
    wire, far = ends
    far.sendall(b":1\r\n-OOM command not allowed when used memory > 'maxmemory'.\r\n!8\r\nERR oops\r\n:2\r\n")
    replies = wire.call([("A",), ("B",), ("C",), ("D",)])
    assert replies[0] == 1
    assert replies[3] == 2
    assert isinstance(replies[1], exceptions.OutOfMemoryError)
    assert isinstance(replies[2], exceptions.ResponseError)


@pytest.mark.parametrize("gone", [False, True])
def test_an_idle_connection_is_looked_at_however_many_files_are_open(gone: bool) -> None:
    """Its number may be one that `select` does not know, from 1,024 on: no error comes out, and an end is noticed."""
    fcntl = pytest.importorskip("fcntl")
    near, far = socket.socketpair()
    far.sendall(HELLO + b"+PONG\r\n")
    try:
        number = fcntl.fcntl(near.detach(), fcntl.F_DUPFD, 1024)
    except OSError:
        pytest.skip("the process may not open so many files")
    wire = Wire(FakePool(socket.socket(fileno=number)))
    assert wire.one("PING") == b"PONG"
    before, wire._used_at = wire.sock, 0.0
    if gone:
        far.close()
        with pytest.raises(OSError, match="Bad file"):  # what the pool gives again is this very socket, closed
            wire.one("PING")
    else:
        wire._reopen_if_stale()
        assert wire.sock is before


def test_a_closed_connection_is_an_error_and_the_wire_is_dropped(ends: tuple[Wire, socket.socket]) -> None:
    """I15: after half an answer nothing is guessed, and no later reply can be taken for this one."""
    wire, far = ends
    far.sendall(b"$10\r\nhalf")
    far.shutdown(socket.SHUT_WR)
    with pytest.raises(exceptions.ConnectionError):
        wire.one("ANY")
    assert wire.sock is None


def test_a_flushed_database_counts_as_any_change(ends: tuple[Wire, socket.socket]) -> None:
    """The server names no key then; the consumer must look at all its queues."""
    wire, far = ends
    wire.connect()
    far.sendall(b">2\r\n$10\r\ninvalidate\r\n_\r\n")
    wire.listen()
    assert wire.changed == [b""]


def test_a_reply_that_nobody_waits_for_ends_the_connection(ends: tuple[Wire, socket.socket]) -> None:
    """It could only be taken for the next command's: better no connection than a wrong answer."""
    wire, far = ends
    wire.connect()
    far.sendall(b":1\r\n")
    with pytest.raises(exceptions.ConnectionError):
        wire.listen()
