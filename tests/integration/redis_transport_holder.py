"""Run as a process: takes messages and works on them for ever. See Holder in redis_transport_rig.

Arguments: URL, queues, prefetch, the queue whose messages are acked, visibility timeout, where to die.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Any

from kombu import Connection, Consumer, Queue

from idempotent_bus.transports import register
from idempotent_bus.transports.redis import fetch as redis_fetch


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    url, queues, prefetch, ack, visibility, where = sys.argv[1:]
    # Whoever started the tests in the background may have had it ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    register()
    if where == "fetched":  # the reply with the message is here, nothing else has happened
        from kombu.transport.redis import QoS

        QoS.append = die
        items = redis_fetch.Line._items
        redis_fetch.Line._items = staticmethod(lambda groups, names: die() if groups else items(groups, names))
    options = {"visibility_timeout": float(visibility)}
    connection = Connection(url, transport_options=options)

    def work(message: Any) -> None:
        info = message.delivery_info
        if (ack and info.get("routing_key") == ack) or message.payload == ack:
            message.ack()
        print(message.payload, flush=True)
        if where == "handling":
            die()

    with Consumer(
        connection.channel(), [Queue(name) for name in queues.split(",")], on_message=work, auto_declare=False
    ) as consumer:
        consumer.qos(prefetch_count=int(prefetch))
        while True:
            with suppress(TimeoutError):
                connection.drain_events(timeout=0.5)


main()
