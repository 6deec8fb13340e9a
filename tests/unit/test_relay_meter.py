"""What the relay commands show."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from idempotent_bus.relaying.meter import Meter
from idempotent_bus.relaying.rows import Backlog


class _Relay:
    down = False

    def backlog(self) -> Backlog:
        if self.down:
            raise sa.exc.OperationalError("count", None, Exception("the server is away"))
        return Backlog(pending=3, delayed=0, failing=0, dead=0, oldest=1.0)


def test_a_relay_that_is_stopped_while_the_database_is_away_has_ended_as_asked() -> None:
    """The last line is the last that is known: it raised, and the command's exit code said that it could not run."""
    relay: Any = _Relay()
    meter = Meter(relay)
    relay.down = True
    assert "pending 3" in meter.last_line()
