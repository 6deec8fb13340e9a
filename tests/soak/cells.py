"""What is soaked: every store with every broker in both modes, and the controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from idempotent_bus import hooks

__all__ = ["BROKERS", "CELLS", "CONTROLS", "SHORT", "STORES", "Cell", "cell_of"]

STORES: Final = ("redis", "postgresql", "mariadb", "sqlite")
BROKERS: Final = ("rabbitmq", "redis", "sql")

_STORE_STEPS: Final = (
    hooks.CLAIM, hooks.HANDLER, hooks.RENEW, hooks.COMPLETE, hooks.RELEASE, hooks.DEAD_LETTER, hooks.WAIT, hooks.ACK,
    hooks.ABANDON, hooks.PROBE, hooks.QUARANTINE,
)  # fmt: skip
_INBOX_STEPS: Final = (
    hooks.CLAIM, hooks.HANDLER, hooks.COMMIT, hooks.RELEASE, hooks.DEAD_LETTER, hooks.WAIT, hooks.ACK,
)  # fmt: skip
_RELAY_STEPS: Final = (hooks.READ, hooks.PUBLISH, hooks.CONFIRM, hooks.MARK)


@dataclass(frozen=True)
class Cell:
    """store: where the records are; in the mode `inbox` the database of the effects. broker: `sql`, our SQL transport.

    waits: for each completion, where the default is to stream those of a window. failover: the store is a Redis with a
    replica, which is promoted again and again. control: which protection is taken out.
    """

    store: str
    broker: str
    mode: str
    waits: bool = False
    failover: bool = False
    control: str = ""

    @property
    def name(self) -> str:
        """What it is called on the command line and in reports."""
        extra = "-waiting" if self.waits else "-failover" if self.failover else ""
        made = f"{self.mode}{extra}:{self.store}+{self.broker}"
        return f"control {self.control}" if self.control else made

    @property
    def database(self) -> str:
        """The kind of the SQL database in which the outbox is, and the effects in the mode `inbox`."""
        return "sqlite" if self.store == "redis" else self.store

    @property
    def streams(self) -> bool:
        """Whether a window's completions are not waited for one by one."""
        return self.store in ("redis", "postgresql") and self.mode == "store" and not self.waits

    @property
    def steps(self) -> dict[str, tuple[str, ...]]:
        """The named steps at which each role is killed."""
        consumer = _INBOX_STEPS if self.mode == "inbox" else _STORE_STEPS
        if self.streams:
            consumer = (*consumer, hooks.DURABLE, hooks.CLAIMED)
        return {"consumer": consumer, "relay": _RELAY_STEPS, "producer": (hooks.PUBLISH,)}


CELLS: Final = (
    *(Cell(store, broker, "store") for store in STORES for broker in BROKERS),
    *(Cell(store, broker, "inbox") for store in STORES if store != "redis" for broker in BROKERS),
    *(Cell("redis", broker, "store", waits=True) for broker in BROKERS),
    Cell("redis", "sql", "store", failover=True),
)

#: On SQLite, which needs no server: what is shown is the damage, and that the checker sees it.
CONTROLS: Final = (
    Cell("sqlite", "sql", "store", control="dedupe off"),
    Cell("sqlite", "sql", "store", control="token check off"),
    Cell("sqlite", "sql", "store", control="early ack"),
    Cell("sqlite", "sql", "inbox", control="effect outside the transaction"),
)

#: The short form: each store but MariaDB, each broker, both modes.
SHORT: Final = (
    Cell("redis", "rabbitmq", "store"),
    Cell("postgresql", "redis", "inbox"),
    Cell("sqlite", "sql", "store"),
)


def cell_of(name: str) -> Cell:
    """The cell of that name. Raises LookupError."""
    for cell in (*CELLS, *CONTROLS):
        if cell.name == name:
            return cell
    raise LookupError(f"no cell {name!r}; there are: {', '.join(cell.name for cell in CELLS)}")
