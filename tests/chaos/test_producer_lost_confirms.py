"""A proxy forwards every publish and eats the answer. IDEMPOTENT_BUS_LONG=1 does it a thousand times."""

from __future__ import annotations

import os

from kombu import Connection, Producer, Queue

import servers
from idempotent_bus.headers import INNER_MSG_ID
from idempotent_bus.producer import IdempotentProducer, ResendPolicy
from proxy import Proxy, through

TIMES = 1000 if os.environ.get("IDEMPOTENT_BUS_LONG") else 100


def test_every_confirm_eaten_once_leaves_one_id_for_each_publish(unique: str) -> None:
    """Each publish loses its first confirm: all copies in the queue carry the ids of the receipts, one for each (I1).

    The control is kombu's confirm_publish with retry under the same loss: as many copies, and nothing tells them apart.
    """
    url = servers.rabbitmq()
    policy = ResendPolicy(base=0.001, cap=0.002)
    with Connection(url) as looking_on, Proxy(url=url) as proxy:
        channel = looking_on.default_channel
        ours, kombus = Queue(f"{unique}.ours", durable=True)(channel), Queue(f"{unique}.kombu", durable=True)(channel)
        ours.queue_declare()
        kombus.queue_declare()
        try:
            receipts = []
            with IdempotentProducer(through(proxy, url), retry=policy) as producer:
                for number in range(TIMES):
                    proxy.lose_reply(INNER_MSG_ID.encode())
                    receipts.append(producer.publish({"n": number}, routing_key=ours.name))
            assert proxy.done["lose_reply"] == TIMES
            assert {receipt.sends for receipt in receipts} == {2}
            messages = [channel.basic_get(ours.name, no_ack=True) for _ in range(2 * TIMES)]
            ids = [channel.message_to_python(message).headers[INNER_MSG_ID] for message in messages]
            assert channel.basic_get(ours.name) is None
            assert set(ids) == {receipt.inner_msg_id for receipt in receipts}
            assert len(set(ids)) == TIMES

            with Connection(through(proxy, url), transport_options={"confirm_publish": True}) as connection:
                plain = Producer(connection)
                for number in range(TIMES):
                    proxy.lose_reply(b"control-")
                    plain.publish(
                        {"n": f"control-{number}"},
                        routing_key=kombus.name,
                        retry=True,
                        retry_policy={"interval_start": 0, "interval_step": 0, "interval_max": 0},
                    )
            copies = kombus.queue_declare(passive=True).message_count
            assert copies > TIMES
            assert INNER_MSG_ID not in channel.message_to_python(channel.basic_get(kombus.name, no_ack=True)).headers
        finally:
            ours.delete()
            kombus.delete()
