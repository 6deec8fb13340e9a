"""A server that ends a session just when its isolation level is set, or taken back: SQLAlchemy translates neither."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from test_inbox import Bench

import servers
from idempotent_bus import Ended, Outbox, Relay, schema


class Killer:
    """Ends the next sessions that a pool gives out, by way of another engine."""

    def __init__(self, engine: sa.Engine) -> None:
        self.left = 0
        self._server = sa.create_engine(engine.url, isolation_level="AUTOCOMMIT")
        sa.event.listen(engine, "checkout", self._end)

    def _end(self, session: Any, *_: Any) -> None:
        if self.left:
            self.left -= 1
            with self._server.connect() as connection:
                connection.exec_driver_sql(f"KILL CONNECTION {session.thread_id()}")

    def close(self) -> None:
        self._server.dispose()


@pytest.fixture
def bench(unique: str) -> Iterator[Bench]:
    made = Bench(servers.mariadb(), unique)
    yield made
    made.close()


def test_the_inbox_takes_it_for_any_other_lost_connection(bench: Bench) -> None:
    """I9, I13: the attempt is counted on another connection, or the message waits; the consumer goes on. Found by the
    soak: the driver's own error came out of `run`, and ended the consumer."""
    transactions = bench.transactions()
    bench.inbox.create()
    killer = Killer(bench.engine)
    try:
        killer.left = 1
        ending = transactions.handle(bench.work(redelivered=True))
        assert (ending.how, bench.cards(), killer.left) == (Ended.COMPLETED, 1, 0)
        killer.left = 100
        other = bench.work(biz_id="b", redelivered=True)
        assert transactions.handle(other).how is Ended.IN_DOUBT
        killer.left = 0
        assert transactions.handle(other).how is Ended.COMPLETED
        assert bench.cards() == 2
    finally:
        killer.close()


def test_the_relay_takes_it_for_any_other_lost_connection(bench: Bench) -> None:
    """I1, I13: what the relay cannot read now it reads later; `run` waits after SQLAlchemy's errors, and no others."""
    prefix = f"{bench.unique}_"
    outbox = Outbox(bench.engine, table_prefix=prefix)
    with bench.engine.begin() as connection:
        outbox.add(connection, {"id": "a"}, routing_key=bench.unique)
    killer = Killer(bench.engine)
    relay = Relay(bench.engine, "memory://", table_prefix=prefix, create=False, poll_interval=0.05)
    try:
        relay.backlog()  # the tables have been looked at
        relay._disconnect()
        killer.left = 1
        with pytest.raises(sa.exc.DBAPIError):
            relay.backlog()
        assert killer.left == 0
        assert relay.backlog().pending == 1
    finally:
        relay.close()
        killer.close()
        schema.metadata(prefix, parts=("outbox",)).drop_all(bench.engine)
