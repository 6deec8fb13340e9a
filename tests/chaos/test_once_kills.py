"""`publish(..., once=...)`: a handler that dies after it has published, and runs again, has published once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from kombu.message import Message

from consumer_rig import Broker, make_broker
from idempotent_bus import INNER_MSG_ID, IdempotentConsumer, idempotent_consumer
from idempotent_bus.stores.memory import MemoryStore

VICTIM = Path(__file__).with_name("once_victim.py")
DEATHS = 1


def run_and_kill(broker: Broker, folder: Path, once: str | None, inbox: bool) -> list[str]:
    """What the receipts said: of the runs that died, and of the one that lived."""
    queue = broker.queue()
    broker.publish(queue, {"id": "p-1"})
    settings = {
        "broker": broker.url, "options": broker.options, "queue": queue.name, "receipts": broker.queue("receipts").name,
        "folder": str(folder), "store": f"sqlite:///{folder}/store.db", "once": once, "deaths": DEATHS, "idle": 4.0,
        "inbox": inbox,
    }  # fmt: skip
    for death in range(DEATHS + 1):
        ended = subprocess.run([sys.executable, str(VICTIM), json.dumps(settings)], timeout=100, check=False)
        assert ended.returncode == (-9 if death < DEATHS else 0)
    assert broker.is_empty(queue.name)
    return (folder / "landings").read_text().split()


@pytest.mark.slow  # processes that die, and leases that lapse in between
@pytest.mark.parametrize("once", ["receipt", None], ids=["once", "control"])
@pytest.mark.parametrize(
    ("name", "inbox"),
    [("ours-redis", False), ("ours-sqlite", False), ("rabbitmq-classic", False), ("ours-redis", True)],
    ids=["redis", "sqlite", "rabbitmq", "redis+inbox"],
)
def test_a_receipt_is_sent_once(name: str, once: str | None, inbox: bool, unique: str, tmp_path: Path) -> None:
    """I2: on a broker with an edge the second publish is a duplicate, and one message is in the queue; on
    RabbitMQ both arrive, and a consumer that is guarded by the inner-msg-id runs one. The control: without `once` both
    land, and both run.
    """
    broker = make_broker(name, unique, tmp_path)
    broker.options["visibility_timeout"] = 2
    try:
        landings = run_and_kill(broker, tmp_path, once, inbox)
        refused = once is not None and not broker.is_rabbitmq
        assert landings == ["landed", *["duplicate" if refused else "landed"] * DEATHS]

        ran: list[Any] = []

        @idempotent_consumer(MemoryStore(), scope="mails", biz_id=INNER_MSG_ID)
        def handle(body: Any, message: Message) -> None:
            ran.append((body["id"], "timestamp" in message.properties))

        consumer = IdempotentConsumer(broker.connect(), {broker.queue("receipts"): handle})
        consumer.run(idle_timeout=1.5)
        assert consumer.endings.total() == (1 if refused else DEATHS + 1)
        assert Counter(ran) == {("p-1", once is not None): 1 if once else DEATHS + 1}
    finally:
        broker.clean_up()
