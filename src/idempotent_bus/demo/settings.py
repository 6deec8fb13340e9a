"""What one run of the demo is told, in one value that travels to its processes."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCOPE = "cards.issue"

#: Short, so that the demo shows recoveries in seconds. An application keeps the library's defaults.
LEASE = 2.0
VISIBILITY_TIMEOUT = 2.0
#: A consumer that saw nothing for so long has nothing more to expect: all leases and timeouts are over.
IDLE = LEASE + VISIBILITY_TIMEOUT + 2.0


class Mode(str, enum.Enum):
    """How the card service protects itself."""

    NAIVE = "naive"
    STORE = "store"
    INBOX = "inbox"


@dataclass(frozen=True)
class Settings:
    """One mode's run.

    broker, store: URLs (naive: the broker's plain form). cards: the SQLAlchemy URL of the database with the cards.
    exchange, queue: of this run alone. rows: what is published, one message each. folder: where histories go.
    """

    mode: Mode
    broker: str
    store: str
    cards: str
    exchange: str
    queue: str
    rows: tuple[dict[str, Any], ...]
    biz_id: str
    consumers: int
    kills: int
    seed: int
    folder: Path

    @property
    def transport_options(self) -> dict[str, Any]:
        """kombu's options for the broker connection."""
        if self.broker.startswith(("amqp", "pyamqp", "memory")):
            return {}
        if "sqla" in self.broker.partition(":")[0]:
            # kombu's own would hand anything that it does not know to SQLAlchemy, which refuses it.
            return {"visibility_timeout": VISIBILITY_TIMEOUT} if self.broker.startswith("idempotent-") else {}
        return {"visibility_timeout": VISIBILITY_TIMEOUT, "polling_interval": 0.05}
