"""A proxy forwards every publish and eats the answer. IDEMPOTENT_BUS_LONG=1 does it a thousand times."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from kombu import Connection, Producer, Queue

import servers
from idempotent_bus import Edge, IdempotentConsumer, Landing, idempotent_consumer
from idempotent_bus.headers import INNER_MSG_ID
from idempotent_bus.producer import IdempotentProducer, ResendPolicy
from proxy import Proxy, through

TIMES = 1000 if os.environ.get("IDEMPOTENT_BUS_LONG") else 100


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_every_confirm_eaten_once_is_handled_once(unique: str, kind: str, tmp_path: Path) -> None:
    """Each publish loses its first confirm: the copies carry one id for each receipt, and each is handled once (I1).

    The control is kombu's confirm_publish with retry under the same loss: as many copies, and nothing tells them apart.
    """
    url = servers.rabbitmq()
    policy = ResendPolicy(base=0.001, cap=0.002)
    with Connection(url) as looking_on, Proxy(url=url) as proxy:
        channel = looking_on.default_channel
        arguments = {"x-queue-type": kind}
        ours = Queue(f"{unique}.ours", durable=True, queue_arguments=arguments)
        ours, kombus = ours(channel), Queue(f"{unique}.kombu", durable=True, queue_arguments=arguments)(channel)
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
            look = looking_on.channel()
            messages = [look.basic_get(ours.name) for _ in range(2 * TIMES)]
            ids = [channel.message_to_python(message).headers[INNER_MSG_ID] for message in messages]
            assert look.basic_get(ours.name) is None
            look.close()  # nothing was acked: all of them are there again
            assert set(ids) == {receipt.inner_msg_id for receipt in receipts}
            assert len(set(ids)) == TIMES

            handled: list[int] = []

            @idempotent_consumer(f"sqlite:///{tmp_path}/dedup.db", scope=unique, biz_id="n")
            def handle(body: Any, message: Any) -> None:
                handled.append(body["n"])

            IdempotentConsumer(looking_on, {Queue(ours.name, durable=True, no_declare=True): handle}).run(
                idle_timeout=2
            )
            assert sorted(handled) == list(range(TIMES))

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


def test_every_commit_answer_eaten_once_lands_once_on_postgresql(unique: str) -> None:
    """The broker in PostgreSQL, each publish's first COMMIT answer eaten by the proxy: TIMES publishes, TIMES messages.

    The control is kombu's own SQLAlchemy transport and retry under the same loss.
    """
    url = servers.postgresql()
    names = {"queue_tablename": f"{unique}_queue", "message_tablename": f"{unique}_message"}
    retry = {"retry": True, "retry_policy": {"max_retries": 5, "interval_start": 0, "interval_step": 0}}
    with Proxy(url=url) as proxy:
        kinds = {"ours": f"idempotent-sqla+{through(proxy, url)}", "kombu": f"sqla+{through(proxy, url)}"}
        queues = {name: Queue(f"{unique}.{name}") for name in kinds}
        try:
            with Connection(kinds["ours"], transport_options=names) as connection:
                with IdempotentProducer(
                    connection, retry=ResendPolicy(base=0.001, cap=0.002), declare=[queues["ours"]]
                ) as producer:
                    producer.publish({"n": -1}, routing_key=queues["ours"].name)
                    for number in range(TIMES):
                        proxy.lose_reply(b"COMMIT")
                        receipt = producer.publish({"n": number}, routing_key=queues["ours"].name)
                        assert (receipt.landing, receipt.edge) == (Landing.LANDED, Edge.BROKER)
                assert queues["ours"](connection.channel()).queue_declare(passive=True).message_count == TIMES + 1
            assert proxy.done["lose_reply"] == TIMES

            with Connection(kinds["kombu"], transport_options=names) as connection:
                plain = Producer(connection)
                plain.publish({"n": -1}, routing_key=queues["kombu"].name, declare=[queues["kombu"]])
                for number in range(20):
                    proxy.lose_reply(b"COMMIT")
                    plain.publish({"n": number}, routing_key=queues["kombu"].name, **retry)
                assert queues["kombu"](connection.channel()).queue_declare(passive=True).message_count > 21
        finally:
            _drop(url, unique)


def _drop(url: str, prefix: str) -> None:
    engine = sa.create_engine(url)
    tables = sa.MetaData()
    tables.reflect(engine, only=lambda name, _: prefix in name)
    tables.drop_all(engine)
    engine.dispose()
