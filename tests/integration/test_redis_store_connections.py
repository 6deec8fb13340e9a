"""The Redis store over every kind of connection that redis-py makes: TLS, passwords, Sentinel, bounded, odd ones."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakeredis import FakeRedis
from redis import BlockingConnectionPool, Connection, ConnectionPool, Redis
from redis.sentinel import Sentinel
from redis_transport_rig import PrivateServer, one_server, server, until
from test_redis_transport_schemes import Sentinels, secure, sentinels

from idempotent_bus import open_store
from idempotent_bus.errors import StoreUnavailable
from idempotent_bus.model import Claimed, ClaimRequest, Completed, Completion, Hold, Settled
from idempotent_bus.stores.redis import RedisStore, open_redis

__all__ = ["one_server", "secure", "sentinels", "server"]


def ask(number: int, place: int = 0) -> ClaimRequest:
    key = bytes([place]) + number.to_bytes(15, "big")
    return ClaimRequest(key, number.to_bytes(16, "big"), 60.0, 600.0, b"finger A")


def work(store: Any, numbers: range) -> None:
    """Claim, complete and see a few, singly and by stream."""
    stream = store.stream()
    for number in numbers:
        request = ask(number)
        claimed = store.claim(request)
        assert isinstance(claimed, Claimed)
        hold = Hold(request.key, claimed.token, request.nonce)
        if number % 2:
            assert store.complete(hold, result=None, retention=600.0)
        else:
            assert stream.begin(Completion(hold, None, 600.0))
    assert all(settled.durable for settled in stream.settle())
    stream.close()
    assert seen(store, numbers)


def seen(store: Any, numbers: range) -> bool:
    return all(store.claim(ask(number)) == Completed(None) for number in numbers)


def test_over_tls(secure: tuple[int, Path]) -> None:
    """A certificate that cannot be verified is refused; with one that can, the store and its stream work."""
    port, certificate = secure
    with pytest.raises(StoreUnavailable):
        open_redis(f"rediss://127.0.0.1:{port}/0").claim(ask(1))
    work(open_redis(f"rediss://127.0.0.1:{port}/0", ssl_ca_certs=str(certificate)), range(40))


@pytest.mark.parametrize("url", ["unix://{path}?db=3", "redis+socket://{path}?virtual_host=3"])
def test_over_a_unix_socket(url: str, tmp_path: Path) -> None:
    """A server's socket file, in redis-py's words and in kombu's, the database included, and after the server's end."""
    with tempfile.TemporaryDirectory() as short:  # such a path has a hundred bytes at most, and pytest's are long
        path = f"{short}/r.sock"
        own = PrivateServer(tmp_path, "--unixsocket", path)
        try:
            store = open_store(url.format(path=path))
            work(store, range(40))
            assert Redis(port=own.port, db=3).dbsize() > 0
            own.stop()
            with pytest.raises(StoreUnavailable):
                store.claim(ask(1))
            own.start()
            work(store, range(100, 140))
        finally:
            own.stop()


def test_with_a_password(server: PrivateServer) -> None:
    """A password in the URL reaches every connection, also one that is opened after a cut; a wrong one is refused."""
    server.client.acl_setuser("worker", enabled=True, passwords=["+geheim"], keys=["*"], commands=["+@all"])
    port = server.client.connection_pool.connection_kwargs["port"]
    store = open_redis(f"redis://worker:geheim@127.0.0.1:{port}/0")
    work(store, range(20))
    server.client.client_kill_filter(_type="normal", skipme=True)
    work(store, range(20, 40))
    with pytest.raises(StoreUnavailable):
        open_redis(f"redis://worker:falsch@127.0.0.1:{port}/0").claim(ask(1))


def test_through_sentinel_it_goes_on_after_a_failover(sentinels: Sentinels) -> None:
    """The master is killed: in doubt until the failover, then the store goes on with the new one, by itself."""
    client = Sentinel([("127.0.0.1", sentinels.sentinel)], socket_timeout=1).master_for("mymaster", socket_timeout=1)
    store = RedisStore(client)
    work(store, range(20))
    stream = store.stream()
    with Redis(port=sentinels.replica) as replica:
        until(lambda: replica.dbsize() == Redis(port=sentinels.master).dbsize(), 30, "the replication")
        sentinels.processes["master"].kill()
        with pytest.raises(StoreUnavailable):
            store.claim(ask(20))
        until(lambda: replica.info("replication")["role"] == "master", 60, "the failover")
    until(lambda: _answers(lambda: store.lookup(ask(1).key)), 30, "the store's way to the new master")
    assert seen(store, range(20))
    work(store, range(21, 40))
    claimed: Any = store.claim(ask(20))
    assert stream.begin(Completion(Hold(ask(20).key, claimed.token, ask(20).nonce), None, 600.0)) == 1
    assert stream.settle() == [Settled(1, True)]


def _answers(call: Callable[[], object]) -> bool:
    try:
        call()
    except StoreUnavailable:
        return False
    return True


@pytest.mark.parametrize("most", [1, 2, 50])
def test_a_bounded_pool_is_shared(server: PrivateServer, most: int) -> None:
    """The user's own calls over the same bounded pool never wait for what the store keeps at hand."""
    port = server.client.connection_pool.connection_kwargs["port"]
    client = Redis(connection_pool=BlockingConnectionPool(max_connections=most, timeout=5, port=port))
    store = RedisStore(client)
    errors: list[BaseException] = []

    def both(number: int) -> None:
        try:
            for at in range(10):
                request = ask(at, number)
                claimed = store.claim(request)
                assert isinstance(claimed, Claimed)
                assert client.ping()
                assert store.complete(Hold(request.key, claimed.token, request.nonce), result=None, retention=600.0)
        except BaseException as error:  # noqa: BLE001 - carried into the test's own thread below
            errors.append(error)

    threads = [threading.Thread(target=both, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []


@pytest.mark.parametrize("most", [1, 3, 8])
def test_a_bounded_pool_is_shared_by_streams(server: PrivateServer, most: int) -> None:
    """As many streams as a pool has connections, or more, leave some for the claims: no consumer waits for ever."""
    port = server.client.connection_pool.connection_kwargs["port"]
    store = RedisStore(Redis(connection_pool=BlockingConnectionPool(max_connections=most, timeout=5, port=port)))
    streams = [store.stream() for _ in range(most)]
    for at in range(3):
        for number, stream in enumerate(streams):
            request = ask(at, number)
            claimed = store.claim(request)
            assert isinstance(claimed, Claimed)
            stream.begin(Completion(Hold(request.key, claimed.token, request.nonce), None, 600.0))
        assert all(settled.durable for stream in streams for settled in stream.settle())


def test_odd_clients(server: PrivateServer) -> None:
    """A client of one connection, one that speaks RESP2, and fakeredis' own client."""
    port = server.client.connection_pool.connection_kwargs["port"]
    for number, client in enumerate((Redis(port=port, single_connection_client=True), Redis(port=port, protocol=2))):
        work(RedisStore(client, prefix=f"odd{number}:"), range(20))
    work(RedisStore(FakeRedis()), range(20))


class ReadsInItsOwnWay(Connection):
    """A user's own class."""

    reads = 0

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """Counted."""
        ReadsInItsOwnWay.reads += 1
        return super().read_response(*args, **kwargs)


@pytest.mark.parametrize("kind", ["own class", "health checks", "fakeredis"])
def test_replies_are_redis_pys_to_read_where_it_has_another_way(server: PrivateServer, kind: str) -> None:
    """Single commands and streams: the connection's own `read_response` is asked, and all is told as it is (I4)."""
    port = server.client.connection_pool.connection_kwargs["port"]
    client = {
        "own class": lambda: Redis(connection_pool=ConnectionPool(port=port, connection_class=ReadsInItsOwnWay)),
        "health checks": lambda: Redis(port=port, health_check_interval=1),
        "fakeredis": FakeRedis,
    }[kind]()
    store = RedisStore(client, prefix=f"{kind}:")
    stream, tickets = store.stream(), {}
    before = ReadsInItsOwnWay.reads
    for number in range(20):
        request = ask(number)
        claimed = store.claim(request)
        assert isinstance(claimed, Claimed)
        nonce = request.nonce if number % 2 else b"nobody's".ljust(16)
        tickets[stream.begin(Completion(Hold(request.key, claimed.token, nonce), None, 600.0))] = bool(number % 2)
    assert {one.ticket: one.durable for one in stream.settle()} == tickets
    assert seen(store, range(1, 20, 2))
    if kind == "own class":
        assert ReadsInItsOwnWay.reads - before >= 40  # of each claim and each completion
    store.close()


def test_streams_of_threads_that_are_over_give_their_connections_back(server: PrivateServer) -> None:
    """Each thread that handles windows has a stream, which nobody closes when the thread ends: fifty threads, one after
    the other, take no more connections than one; what a thread had sent last arrives all the same."""
    port = server.client.connection_pool.connection_kwargs["port"]
    store = RedisStore(Redis(connection_pool=ConnectionPool(port=port, max_connections=3)))
    local = threading.local()

    def handle(number: int) -> None:
        local.stream = store.stream()
        request = ask(number)
        claimed = store.claim(request)
        assert isinstance(claimed, Claimed)
        local.stream.begin(Completion(Hold(request.key, claimed.token, request.nonce), None, 600.0))

    for number in range(50):
        thread = threading.Thread(target=handle, args=(number,))
        thread.start()
        thread.join()
        until(lambda number=number: seen(store, range(number, number + 1)))
    assert seen(store, range(50))
