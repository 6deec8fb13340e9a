"""idempotent-bus inside Celery: one line for one task of an app, and another for all of them.

from idempotent_bus.celery import IdempotentTask, setup

setup(app, store="redis://localhost:6379/1")

@app.task(base=IdempotentTask, scope="cards.issue", biz_id="payment_id")
def issue_card(payment_id, amount): ...
"""

from __future__ import annotations

try:
    from .outcomes import PutOff, Refused, ResultNotStored
    from .setup import Setup, setup
    from .task import IdempotentTask
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("celery", "billiard"):
        raise
    from ..errors import ConfigurationError

    raise ConfigurationError("idempotent_bus.celery needs Celery: pip install 'idempotent-bus[celery]'") from error

__all__ = ["IdempotentTask", "PutOff", "Refused", "ResultNotStored", "Setup", "setup"]
