"""A task's call in the caller's transaction: `delay_in_transaction` and `apply_in_transaction`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery, chain
from celery.contrib.testing.worker import start_worker

from idempotent_bus import ConfigurationError, Inbox, Outbox, Relay
from idempotent_bus.celery import setup


class Shop:
    """An app on files alone: broker, effects, inbox and outbox."""

    def __init__(self, folder: Path) -> None:
        self.broker = f"idempotent-sqla+sqlite:///{folder}/broker.db"
        self.engine = sa.create_engine(f"sqlite:///{folder}/shop.db")
        with self.engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE card (payment_id TEXT)"))
        self.app = Celery("shop", broker=self.broker, backend=f"db+sqlite:///{folder}/results.db", set_as_current=False)
        setup(self.app, inbox=Inbox(self.engine), outbox=Outbox(self.engine))

        @self.app.task(shared=False, name="charge", scope="charge", biz_id="payment_id")
        def charge(payment_id: str, connection: Any) -> str:
            self.issue.delay_in_transaction(payment_id)
            if payment_id == "fails":
                raise ValueError(payment_id)
            return payment_id

        @self.app.task(shared=False, name="issue", scope="cards.issue", biz_id="payment_id")
        def issue(payment_id: str, connection: sa.Connection) -> str:
            connection.execute(sa.text("INSERT INTO card VALUES (:id)"), {"id": payment_id})
            return f"a card for {payment_id}"

        self.charge, self.issue = charge, issue

    @property
    def cards(self) -> list[str]:
        with self.engine.begin() as connection:
            return list(connection.execute(sa.text("SELECT payment_id FROM card ORDER BY 1")).scalars())

    @property
    def waiting(self) -> int:
        with self.engine.begin() as connection:
            return int(connection.execute(sa.text("SELECT count(*) FROM idempotent_bus_outbox")).scalar_one())

    def relay(self) -> int:
        with Relay(self.engine, self.broker) as relay:
            return int(relay.run_once().sent)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    made = Shop(tmp_path)
    yield made
    made.engine.dispose()


def test_a_call_is_made_if_and_only_if_its_transaction_is_committed(shop: Shop) -> None:
    """I3: rolled back, nothing waits and nothing runs; committed, the relay sends it, to a queue that nobody made."""
    with shop.engine.connect() as connection, connection.begin() as transaction:
        shop.issue.apply_in_transaction(connection, ("rolled-back",))
        transaction.rollback()
    assert shop.waiting == 0
    with shop.engine.begin() as connection:
        result = shop.issue.apply_in_transaction(connection, ("p-1",))
    assert shop.waiting == 1
    assert shop.relay() == 1
    with start_worker(shop.app, pool="solo", perform_ping_check=False):
        assert result.get(timeout=20) == "a card for p-1"
    assert shop.cards == ["p-1"]


def test_a_task_calls_another_in_its_own_transaction(shop: Shop) -> None:
    """I3: what a task with an inbox calls so is committed with its record; of a task that raised, nothing is sent."""
    with start_worker(shop.app, pool="solo", perform_ping_check=False):
        good, bad = shop.charge.delay("p-1"), shop.charge.delay("fails")
        assert good.get(timeout=20) == "p-1"
        with pytest.raises(ValueError, match="fails"):
            bad.get(timeout=20)
        assert shop.waiting == 1
        assert shop.charge.delay("p-1").get(timeout=20) == "p-1"  # a copy: replayed, and calls nothing again
        assert shop.waiting == 1


def test_a_chain_goes_into_the_outbox_as_one_message(shop: Shop) -> None:
    """A signature is called as a task is; the rest of the chain travels in the first one's message."""
    from idempotent_bus.celery.transaction import apply_in_transaction

    both = chain(shop.issue.si("p-1"), shop.issue.si("p-2"))
    with shop.engine.begin() as connection:
        apply_in_transaction(both, connection, outbox=Outbox())
    assert shop.waiting == 1


def test_without_a_transaction_there_is_an_error_that_says_what_to_do(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of any transaction `delay_in_transaction` refuses: it would be a publish without its effect."""
    monkeypatch.setitem(sys.modules, "django.db", None)  # other tests of this process may have configured a project
    with pytest.raises(ConfigurationError, match="apply_in_transaction"):
        shop.issue.delay_in_transaction("p-1")


def test_eager_calls_run_at_once(shop: Shop) -> None:
    """With task_always_eager a call in a transaction runs at once, guarded as everywhere."""
    shop.app.conf.task_always_eager = True
    assert shop.issue.apply_in_transaction(None, ("p-1",)).get() == "a card for p-1"
    assert shop.issue.apply_in_transaction(None, ("p-1",)).get() == "a card for p-1"
    assert shop.cards == ["p-1"]
