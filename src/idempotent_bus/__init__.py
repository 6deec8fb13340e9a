"""idempotent-bus: in a system that must not lose messages, nothing is ever done twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .consumer import IdempotentConsumer, IdempotentHandler, idempotent_consumer
from .errors import (
    ConfigurationError,
    HandlerAcknowledged,
    IdempotentBusError,
    InvalidBizId,
    InvalidBody,
    InvalidMessage,
    InvalidScope,
    NoExecution,
    Permanent,
    PublishError,
    PublishUnknown,
    Rejected,
    StoreError,
    StoreUnavailable,
    Unroutable,
)
from .execution import Ended, Execution, current_execution
from .identity import INNER_MSG_ID
from .model import Edge, Landing, Reason, Receipt
from .policy import Backoff
from .producer import IdempotentProducer, PublishManyError, ResendPolicy, idempotent_producer
from .store import Store
from .stores import open_store
from .transports import register as _register

if TYPE_CHECKING:
    from .inbox import Inbox, transactional_consumer

__all__ = [
    "INNER_MSG_ID",
    "Backoff",
    "ConfigurationError",
    "Edge",
    "Ended",
    "Execution",
    "HandlerAcknowledged",
    "IdempotentBusError",
    "IdempotentConsumer",
    "IdempotentHandler",
    "IdempotentProducer",
    "Inbox",
    "InvalidBizId",
    "InvalidBody",
    "InvalidMessage",
    "InvalidScope",
    "Landing",
    "NoExecution",
    "Permanent",
    "PublishError",
    "PublishManyError",
    "PublishUnknown",
    "Reason",
    "Receipt",
    "Rejected",
    "ResendPolicy",
    "Store",
    "StoreError",
    "StoreUnavailable",
    "Unroutable",
    "current_execution",
    "idempotent_consumer",
    "idempotent_producer",
    "open_store",
    "transactional_consumer",
]

_register()


def __getattr__(name: str) -> Any:
    # These two need SQLAlchemy, which is an extra: imported when they are asked for.
    if name in ("Inbox", "transactional_consumer"):
        try:
            from . import inbox
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("idempotent_bus"):
                raise
            raise ConfigurationError(f"{name} needs SQLAlchemy: pip install 'idempotent-bus[sql]'") from error
        return getattr(inbox, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
