"""The reply to COMMIT eaten by a proxy, again and again: no effect missing, none twice (I1, I2, I15).

    python tests/chaos/inbox_lost_commits.py [--times 500] [--url postgresql | mariadb]

Every message's first COMMIT reaches the server, and its reply does not come back. Guarded: the inbox settles it by
inserting again. Two controls run beside it, each with the same losses: `retry` repeats the handler without any record,
and must double; `ack` takes the error for done, and loses whatever the COMMIT itself never reached the server for
(here: every third one is cut off on its way there). Prints one line for each; exits with 1 if one is not as it must be.
"""

from __future__ import annotations

import argparse
import functools
import sys
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sqlalchemy as sa

import servers
from idempotent_bus import Inbox
from idempotent_bus.identity import record_key
from idempotent_bus.inbox.running import Transactions
from idempotent_bus.policy import Policy
from idempotent_bus.work import Ended, Work
from proxy import Proxy, through


class Settled:
    def __init__(self) -> None:
        self.acks = 0

    def ack(self) -> None:
        self.acks += 1

    def wait(self, delay: float) -> None: ...

    def dead_letter(self, *_: Any) -> bool:
        raise AssertionError("nothing here is dead")


class Losses:
    """One database behind a proxy, and a table of effects without a unique constraint."""

    def __init__(self, url: str, times: int) -> None:
        self.times = times
        self.unique = f"t{uuid.uuid4().hex[:10]}_"
        self.direct = sa.create_engine(url)
        self.cards = sa.Table(f"{self.unique}cards", sa.MetaData(), sa.Column("card", sa.String(20)))
        self.cards.create(self.direct)
        self.proxy = Proxy(url=url)
        self.engine = sa.create_engine(through(self.proxy, url))
        self.inbox = Inbox(self.engine, table_prefix=self.unique)
        # MariaDB's driver says AUTOCOMMIT when it connects: there a command begins with its number.
        self.commit = b"COMMIT" if self.direct.dialect.name == "postgresql" else b"\x03COMMIT"

    def close(self) -> None:
        self.engine.dispose()
        self.proxy.close()
        with self.direct.begin() as connection:
            connection.execute(sa.text(f"DROP TABLE IF EXISTS {self.unique}cards, {self.unique}inbox"))
        self.direct.dispose()

    def eat(self, number: int) -> None:
        """The next COMMIT is done and its reply lost; every third is lost on its way there."""
        if number % 3:
            self.proxy.lose_reply(self.commit)
        else:
            self.proxy.lose_request(self.commit)

    def issue(self, connection: sa.Connection, card: str) -> None:
        connection.execute(sa.insert(self.cards).values(card=card))

    def guarded(self) -> tuple[int, int]:
        made = Transactions(self.inbox, Policy(busy_delay=0.05))
        with self.engine.connect():
            self.inbox.create()
        settled = Settled()
        for number in range(self.times):
            card = f"g{number}"
            run = functools.partial(self.issue, card=card)
            work = Work("cards", card, record_key("cards", card), run, settled)
            self.eat(number)
            while made.handle(work).how not in (Ended.COMPLETED, Ended.REPLAYED):
                work.redelivered = True
        assert settled.acks == self.times
        return self.damage("g")

    def retry(self) -> tuple[int, int]:
        for number in range(self.times):
            self.eat(number)
            for _ in range(5):
                try:
                    with self.engine.begin() as connection:
                        self.issue(connection, f"r{number}")
                    break
                except sa.exc.OperationalError:
                    continue
        return self.damage("r")

    def ack(self) -> tuple[int, int]:
        for number in range(self.times):
            self.eat(number)
            try:
                with self.engine.begin() as connection:
                    self.issue(connection, f"a{number}")
            except sa.exc.OperationalError:
                continue
        return self.damage("a")

    def damage(self, prefix: str) -> tuple[int, int]:
        """Effects that are missing, and effects too many."""
        with self.direct.connect() as connection:
            found = Counter(connection.execute(sa.select(self.cards.c.card)).scalars())
        counts = [found[f"{prefix}{number}"] for number in range(self.times)]
        return counts.count(0), sum(count - 1 for count in counts if count > 1)

    def eaten(self) -> int:
        return self.proxy.done["lose_reply"] + self.proxy.done["lose_request"]


def run(url: str, times: int) -> dict[str, tuple[int, int]]:
    """Missing and doubled effects of each way."""
    losses = Losses(url, times)
    try:
        found = {}
        for name in ("guarded", "retry", "ack"):
            before = losses.eaten()
            found[name] = getattr(losses, name)()
            assert losses.eaten() - before == times, "the proxy did not eat what it should"
            print(f"{name:8} {times} COMMITs eaten: {found[name][0]} missing, {found[name][1]} twice", flush=True)
        return found
    finally:
        losses.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=500)
    parser.add_argument("--url", default="postgresql", choices=("postgresql", "mariadb"))
    options = parser.parse_args()
    found = run(servers.POSTGRESQL if options.url == "postgresql" else servers.MARIADB, options.times)
    ok = found["guarded"] == (0, 0) and found["retry"][1] > 0 and found["ack"][0] > 0
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
