"""A relay that is killed again and again, each time at a named step. Arguments: one JSON object, see `main`.

The modules are loaded once; each life is a fork made before any connection was opened.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from kombu import Connection, Queue

from idempotent_bus import Relay, hooks, schema


def main(settings: dict[str, Any]) -> None:
    """plans: [step, "before" or "after", which time], one for each life; a plan of null is a life to its natural end.

    mode: relay, or naive (the control: rows are marked before they are sent).
    """
    for plan in settings["plans"]:
        child = os.fork()
        if child == 0:
            try:
                live(settings, plan)
            finally:
                os._exit(3)
        _, status = os.waitpid(child, 0)
        if plan is not None and not os.WIFSIGNALED(status):
            sys.exit(f"it was not killed at {plan}, but ended with {status}")


def live(settings: dict[str, Any], plan: list[Any] | None) -> None:
    """One life."""
    log = os.open(settings["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    engine = sa.create_engine(settings["database"])
    table = schema.outbox(schema.metadata(settings["prefix"], parts=("outbox",)))
    left = plan[2] if plan else 0

    def die() -> None:
        os.write(log, f"{' '.join(map(str, plan or ()))}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def step(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if settings["mode"] == "naive" and name == hooks.CONFIRM:
            with engine.begin() as connection:
                connection.execute(sa.delete(table).where(table.c.id.in_([row.id for row in args[1]])))
        here = plan is not None and plan[0] == name
        if here:
            left -= 1
            if left <= 0 and plan[1] == "before":
                die()
        result = function(*args, **kwargs)
        # A claim that found nothing is no kill worth counting.
        if here and left <= 0 and (name != hooks.READ or len(result)):
            die()
        return result

    broker = Connection(settings["broker"], transport_options=settings["options"])
    queue = Queue(settings["queue"], durable=True)
    relay = Relay(
        engine, broker, table_prefix=settings["prefix"], declare=[queue], batch=20, lease=1.0, poll_interval=0.05,
        create=False, step=step, max_attempts=1000,
    )  # fmt: skip
    relay.run(idle_timeout=None if plan else 3.0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
