"""What the Redis stream makes of the bytes that a server answers with."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from redis.connection import Connection

from idempotent_bus.model import Busy, ClaimOutcome, ClaimRequest, Completion, Hold, Settled
from idempotent_bus.stores.redis_lean import Lean
from idempotent_bus.stores.redis_stream import RedisStream, Share

ONE = Completion(Hold(b"k" * 16, 1, b"n" * 16), None, 60.0)
NEXT = ClaimRequest(b"l" * 16, b"n" * 16, 60.0, 600.0)


class FakeConnection(Connection):
    """One that is open: what is sent goes to the other end, and redis-py reads as always."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._sock = server.sock
        self._parser.on_connect(self)
        self.server = server

    def send_command(self, *args: Any, **kwargs: Any) -> None:
        """Answered at once."""
        self.server.end.sendall(b"+OK\r\n")

    def disconnect(self, *args: Any, **kwargs: Any) -> None:
        """Counted; the socket stays."""
        self.server.broken += 1


class Server:
    """One end of a socket pair for the server, and the other as a connection that redis-py would have opened."""

    def __init__(self) -> None:
        self.max_connections = 4
        self.share = Share(self)  # type: ignore[arg-type]
        self.end, self.sock = socket.socketpair()
        self.sock.settimeout(0.2)
        self.singly: list[Completion] = []
        self.broken = 0

    def get_connection(self) -> Any:
        """As a pool."""
        self.connection = FakeConnection(self)  # kept: at its end redis-py disconnects it too
        return self.connection

    def release(self, connection: Any) -> None:
        """As a pool."""

    def ask(self, completion: Completion) -> bool:
        """The ordinary way."""
        self.singly.append(completion)
        return True

    def stream(self, under_way: int) -> RedisStream:
        """A stream with so many completions under way."""

        def outcome(request: ClaimRequest, reply: bytes) -> ClaimOutcome | None:
            return Busy(float(reply)) if reply != b"M" else None

        stream = RedisStream(
            self,  # type: ignore[arg-type]
            self.share,
            "",
            lambda _: b"command",
            lambda _, reply: reply > 0,
            self.ask,
            lambda _: b" and claim",
            outcome,
        )
        for _ in range(under_way):
            stream.begin(ONE)
        return stream


def test_replies_are_told_in_their_order_however_they_are_cut() -> None:
    """A reply that has come in part is waited for, and those behind it keep their places (I4)."""
    server = Server()
    stream = server.stream(4)
    assert stream.poll() == []
    server.end.sendall(b":1\r\n:0\r\n:1")
    assert stream.poll() == [Settled(1, True), Settled(2, False)]
    server.end.sendall(b"\r\n:1\r\n")
    assert stream.settle() == [Settled(3, True), Settled(4, True)]
    assert server.broken == 0


def test_a_part_of_a_reply_is_never_a_reply() -> None:
    """`:1` may be the beginning of `:10`, and `-` of an error: nothing is durable before the line is whole (I4)."""
    server = Server()
    stream = server.stream(1)
    server.end.sendall(b":1")
    assert stream.settle() == [Settled(1, None)]  # the rest has not come within the socket's timeout
    assert server.broken == 1


def test_an_error_is_asked_singly_and_its_neighbours_are_not() -> None:
    """A refusal proves that this one was not done."""
    server = Server()
    stream = server.stream(3)
    server.end.sendall(b":1\r\n-NOSCRIPT No matching script.\r\n:1\r\n")
    assert stream.settle() == [Settled(1, True), Settled(2, True), Settled(3, True)]
    assert server.singly == [ONE]
    assert server.broken == 0


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"-READONLY You can't write against a read only replica.\r\n", id="a master that is none now"),
        pytest.param(b"$1\r\n1\r\n", id="another type"),
        pytest.param(b"\r\n", id="an empty line"),
        pytest.param(b":one\r\n", id="no number"),
        pytest.param(b"-MOVED nowhere\r\n", id="an error that redis-py cannot read"),
        pytest.param(b"", id="the end"),
    ],
)
def test_what_is_no_reply_leaves_all_in_doubt(answer: bytes) -> None:
    """Nothing is taken for durable, the connection goes, and the next completion opens another (I4)."""
    server = Server()
    stream = server.stream(3)
    server.end.sendall(b":1\r\n" + answer)
    if not answer:
        server.end.close()
    assert stream.settle() == [Settled(1, True), Settled(2, None), Settled(3, None)]
    assert server.broken == 1
    assert stream.pending == 0


def test_news_of_the_server_is_skipped() -> None:
    """RESP3: what the server tells by itself is no reply, whatever is in it, and disturbs none (I4)."""
    server = Server()
    stream = server.stream(3)
    server.end.sendall(b":0\r\n>3\r\n$6\r\nMOVING\r\n:1\r\n:30\r\n:1\r\n:0\r\n")
    assert stream.settle() == [Settled(1, False), Settled(2, True), Settled(3, False)]
    assert server.broken == 0


@pytest.mark.parametrize("then", ["begin", "poll", "settle"])
def test_a_client_that_is_closed_leaves_all_in_doubt(then: str) -> None:
    """Somebody closes the client while completions are under way: no reply of another connection is taken for theirs,
    and no error comes out (I4)."""
    server = Server()
    stream = server.stream(2)
    server.connection._sock = None  # as redis-py's `disconnect`
    server.sock.close()
    if then == "begin":
        assert stream.begin(ONE) == 3
        assert stream.poll() == [Settled(1, None), Settled(2, None), Settled(3, None)]
    else:
        assert getattr(stream, then)() == [Settled(1, None), Settled(2, None)]
    server.__init__()  # type: ignore[misc]  # the pool opens another
    ticket = stream.begin(ONE)
    server.end.sendall(b":1\r\n")
    assert stream.settle() == [Settled(ticket, True)]


def test_a_claim_leaves_in_the_same_send_and_is_answered_behind(server: Server) -> None:
    """One `sendall` for both; the reply behind the completion's is the claim's, and the next completion's follows."""
    stream = server.stream(1)
    stream.begin(ONE, NEXT)
    stream.begin(ONE)
    assert server.end.recv(100) == b"commandcommand and claimcommand"
    assert stream.claimed(NEXT) is None  # its answer is not for one that came later


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        pytest.param(b"$1\r\n7\r\n", Busy(7.0), id="an answer"),
        pytest.param(b"$1\r\nM\r\n", None, id="nothing yet"),
        pytest.param(b"-NOSCRIPT No matching script.\r\n", None, id="refused"),
        pytest.param(b":1\r\n", None, id="another type"),
    ],
)
def test_a_claims_reply_touches_no_completion(server: Server, reply: bytes, outcome: ClaimOutcome | None) -> None:
    """I9: what is no clear answer is none. The completions beside it are told of as ever."""
    stream = server.stream(1)
    stream.begin(ONE, NEXT)
    server.end.sendall(b":1\r\n:1\r\n" + reply)
    assert stream.claimed(NEXT) == outcome
    stream.begin(ONE)
    server.end.sendall(b":0\r\n")
    assert stream.settle() == [Settled(1, True), Settled(2, True), Settled(3, False)]
    assert server.broken == 0


def test_a_claim_whose_reply_does_not_come_is_in_doubt(server: Server) -> None:
    """I9, I4: the connection goes, and nothing that it might still say is taken for an answer."""
    stream = server.stream(0)
    stream.begin(ONE, NEXT)
    server.end.sendall(b":1\r\n$1\r\n7")
    assert stream.claimed(NEXT) is None
    assert stream.settle() == [Settled(1, None)]
    assert server.broken == 1


def test_where_the_pool_is_too_small_nothing_is_held(server: Server) -> None:
    """Streams take a quarter of a pool at most: what one may not hold a connection for is done while `begin` waits, and
    the claim is left to be asked for. One that is closed, or whose connection breaks, makes room for another."""
    first, second = server.stream(1), server.stream(0)
    second.begin(ONE, NEXT)
    assert server.singly == [ONE]
    assert second.settle() == [Settled(1, True)]
    assert second.claimed(NEXT) is None
    server.end.sendall(b"no reply\r\n")
    assert first.settle() == [Settled(1, None)]
    second.begin(ONE)
    first.begin(ONE)
    assert server.singly == [ONE, ONE]
    second.close()
    first.begin(ONE)
    assert first.pending == 2
    assert server.singly == [ONE, ONE]


def test_the_last_spare_connection_goes_to_another_thread(server: Server) -> None:
    """Threads that all met a broken connection give back what is at hand at once: none of them ends with an error."""

    class Taken(list[Any]):
        def pop(self, *at: Any) -> Any:
            super().clear()  # by another thread, after this one has seen that there is one
            return super().pop(*at)

    lean = Lean(server)  # type: ignore[arg-type]
    lean._spare = Taken([object()])
    lean.close()
    assert lean._spare == []


@pytest.fixture
def server() -> Server:
    """A server of one's own."""
    return Server()
