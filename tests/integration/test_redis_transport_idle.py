"""An idle consumer of ours: how soon it gets a message, and what it costs while nothing comes."""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

import pytest
from kombu import Consumer
from redis_transport_rig import PrivateServer, connect, consuming, declare, drain, one_server, server

__all__ = ["one_server", "server"]


def latencies(server: PrivateServer, kind: str, name: str, count: int) -> list[float]:
    """Seconds from just before a publish until the idle consumer's callback runs; publisher and clock are one."""
    with connect(server.url(kind)) as connection, connect(server.plain) as sender:
        queue = declare(connection, name)
        arrived = threading.Semaphore(0)
        at: list[float] = []

        def handle(message: Any) -> None:
            at.append(time.perf_counter())
            message.ack()
            arrived.release()

        stop = threading.Event()

        def consume() -> None:
            with Consumer(connection.channel(), [queue], on_message=handle, prefetch_count=10):
                while not stop.is_set():
                    drain(connection, 0.1)

        thread = threading.Thread(target=consume)
        thread.start()
        producer, found = sender.Producer(), []
        time.sleep(0.3)
        for _ in range(count):
            time.sleep(0.02)  # idle again, and waiting
            started = time.perf_counter()
            producer.publish("now", exchange="", routing_key=name)
            assert arrived.acquire(timeout=5)
            found.append(at[-1] - started)
        stop.set()
        thread.join()
        return found


def test_a_message_to_an_idle_consumer_takes_no_longer_than_with_kombu(server: PrivateServer, unique: str) -> None:
    """Median of 60 arrivals within 1.5 times kombu's, paired, best of three rounds against the machine's noise. The
    messages come from a plain producer: the wake-up needs nothing of ours on the other side."""
    ratios = []
    for attempt in range(3):
        plain = statistics.median(latencies(server, "plain", f"{unique}-p{attempt}", 60))
        ours = statistics.median(latencies(server, "ours", f"{unique}-o{attempt}", 60))
        ratios.append(ours / plain)
        print(f"idle latency: kombu {plain * 1000:.2f} ms, ours {ours * 1000:.2f} ms, ratio {ratios[-1]:.2f}")
        if ratios[-1] <= 1.5:
            return
    pytest.fail(f"ratios {ratios}")


@pytest.mark.parametrize("queues", [1, 5])
def test_an_idle_consumer_sends_a_few_commands_a_second(server: PrivateServer, unique: str, queues: int) -> None:
    """At the default visibility timeout: counted by the server over six seconds, all connections of the consumer."""
    with connect(server.ours, visibility_timeout=60) as connection:
        declared = [declare(connection, f"{unique}-{number}") for number in range(queues)]
        channel = connection.channel()
        with Consumer(channel, declared, on_message=lambda message: message.ack(), prefetch_count=10):
            drain(connection, 0.5)
            before = _calls(server)
            drain(connection, 6)  # longer than its longest sleep
            sent = _calls(server) - before
        print(f"idle, {queues} queue(s): {sent / 6:.1f} commands a second")
        assert 0 < sent / 6 <= 3


def _calls(server: PrivateServer) -> int:
    """Commands that clients sent. (`total_commands_processed` would count calls inside scripts too.)"""
    stats = server.client.info("commandstats")
    names = ("evalsha", "eval", "hdel", "brpop", "exists", "hello", "client|tracking", "ping", "hkeys")
    return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in names)


def test_many_idle_consumers_are_woken_and_one_gets_the_message(server: PrivateServer, unique: str) -> None:
    """Every idle consumer of the queue is told; exactly one takes the message and the others sleep on."""
    connections = [connect(server.ours) for _ in range(5)]
    declared = declare(connections[0], unique)
    with connections[0]:
        managers = [consuming(connection, declared) for connection in connections]
        boxes = [manager.__enter__() for manager in managers]
        for connection in connections:
            drain(connection, 0.1)
        connections[0].Producer().publish("one", exchange="", routing_key=unique)
        for connection in connections:
            drain(connection, 0.3)
        assert sum(map(len, boxes)) == 1
        for manager in managers:
            manager.__exit__(None, None, None)
    for connection in connections[1:]:
        connection.release()
