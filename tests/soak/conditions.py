"""The README's table of conditions: what each store, with each broker, in each mode, has been seen to keep.

What was soaked is taken from the reports; what cannot be soaked is said with the reason, and where it is tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from .cells import BROKERS, CELLS, Cell
from .report import Gathered, most_gathered

__all__ = ["BEGIN", "END", "README", "table", "write_table"]

README: Final = Path(__file__).parents[2] / "README.md"
BEGIN: Final = "<!-- the conditions: made by `python -m tests.soak conditions` -->"
END: Final = "<!-- end of the conditions -->"

_ELSEWHERE: Final = "conditional, as on the right"
_NAMES: Final = {"redis": "Redis", "postgresql": "PostgreSQL", "mariadb": "MariaDB", "sqlite": "SQLite"}

#: Each store, with its mode, and what it is conditional on wherever it is soaked.
_ROWS: Final[list[tuple[str, Any]]] = [
    *(
        (f"{name}, dedup store", lambda cell, s=store: _plain(cell) and (cell.store, cell.mode) == (s, "store"))
        for store, name in _NAMES.items()
    ),
    ("Redis, dedup store, `streaming` off", lambda cell: cell.waits),
    ("Redis, dedup store, a replica promoted", lambda cell: cell.failover),
    *(
        (f"{name}, inbox", lambda cell, s=store: (cell.store, cell.mode) == (s, "inbox"))
        for store, name in _NAMES.items()
        if store != "redis"
    ),
]

_REST: Final = """\
A single RabbitMQ node that is killed may damage a quorum queue (2 of 82 restarts here, one of them declared a moment
before), and what waits behind it stays there: declare queues before there is trouble, and run more than one node.
Conditional: kombu's own `redis://` and `sqla+...` (they may lose a message; what arrives is handled once); `memory://`
(one process); Kafka, Pub/Sub, Azure Service Bus and SQS (tested on stand-ins, not soaked). Refused, at the first use or
before: Redis with an evicting `maxmemory-policy`, MariaDB and MySQL tables that are not InnoDB, SQLite in memory as a
store, a connection in autocommit for the inbox or the outbox, a `visibility_timeout` beyond the retention,
`no_ack=True`."""


def _plain(cell: Cell) -> bool:
    return not (cell.waits or cell.failover)


def _entry(found: Gathered, cell: Cell) -> str:
    mine = [one for one in found.cells if one["cell"] == cell.name]
    if not mine:
        return "not soaked"
    messages = found.total("messages", mine)
    kills = sum(sum(one["kills"].values()) for one in mine)
    if any(one["verdict"].startswith("BROKEN") for one in mine):
        return f"**broken** ({messages:,} messages)"
    if cell.failover:
        doubles = found.total("unexcused", mine) + sum(one["doubled_by"].get("forgotten", 0) for one in mine)
        times = found.total("failovers", mine)
        return f"conditional: replication is asynchronous; {times} failovers made {doubles} run again, and lost none"
    if any(one["verdict"] == "conditional" for one in mine):
        return f"conditional ({messages:,} messages)"
    behind = found.total("lost", [one for one in mine if one["verdict"].startswith("RABBITMQ DAMAGED")])
    if behind:
        return f"proven ({messages:,}, {kills:,}), but for {behind} behind a quorum queue that RabbitMQ 3.10.8 damaged"
    return f"proven ({messages:,}, {kills:,})"


def table(found: Gathered) -> str:
    """What stands between the marks."""
    lines = [
        "What the [soak](tests/soak/reports/soak.md) has shown, with the numbers of messages and of SIGKILLs (source",
        f"`{found.source}`). Proven: none lost; with the inbox none doubled; with a dedup store doubled only where a",
        "worker was killed, or stopped for longer than its lease, between an effect and its completion. Half of the",
        "messages came through an outbox and its relay.",
        "",
        "| records | RabbitMQ | `idempotent-redis` | `idempotent-sqla` |",
        "|---|---|---|---|",
    ]
    for name, belongs in _ROWS:
        cells = {cell.broker: cell for cell in CELLS if belongs(cell)}
        entries = [_entry(found, cells[broker]) if broker in cells else _ELSEWHERE for broker in BROKERS]
        lines.append(f"| {name} | {' | '.join(entries)} |")
    return "\n".join([*lines, "", _REST])


def write_table() -> None:
    """Put the table of what was gathered most into the README, between its marks."""
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise LookupError(f"README.md has no marks: {BEGIN} and {END}")
    README.write_text(f"{before}{BEGIN}\n{table(most_gathered())}\n{END}{after}")
