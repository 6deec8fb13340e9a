"""idempotent-bus: in a system that must not lose messages, nothing is ever done twice."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .abandoned import AbandonedRecord
from .consumer import IdempotentConsumer, IdempotentHandler, idempotent_consumer
from .errors import (
    ConfigurationError,
    FingerprintConflict,
    HandlerAcknowledged,
    IdempotentBusError,
    InDoubt,
    InvalidBizId,
    InvalidBody,
    InvalidMessage,
    InvalidScope,
    LeaseLost,
    NoExecution,
    Permanent,
    PublishError,
    PublishUnknown,
    Rejected,
    StoreError,
    StoreUnavailable,
    Transient,
    Unroutable,
    Untrusted,
)
from .events import Event, EventKind, Listener
from .execution import Execution, current_execution
from .identity import INNER_MSG_ID
from .model import Edge, Landing, Reason, Receipt
from .policy import Backoff
from .producer import IdempotentProducer, PublishManyError, ResendPolicy, idempotent_producer
from .quarantine import QuarantinedRecord, quarantined, record_of, resolve
from .signing import Signer, Trust
from .store import Store
from .stores import open_store
from .transports import register as _register
from .work import Ended, Ending
from .worker import IdempotentWorker

if TYPE_CHECKING:
    from .inbox import Inbox, transactional_consumer
    from .outbox import Outbox
    from .relay import Relay

__all__ = [
    "INNER_MSG_ID",
    "AbandonedRecord",
    "Backoff",
    "ConfigurationError",
    "Edge",
    "Ended",
    "Ending",
    "Event",
    "EventKind",
    "Execution",
    "FingerprintConflict",
    "HandlerAcknowledged",
    "IdempotentBusError",
    "IdempotentConsumer",
    "IdempotentHandler",
    "IdempotentProducer",
    "IdempotentWorker",
    "InDoubt",
    "Inbox",
    "InvalidBizId",
    "InvalidBody",
    "InvalidMessage",
    "InvalidScope",
    "Landing",
    "LeaseLost",
    "Listener",
    "NoExecution",
    "Outbox",
    "Permanent",
    "PublishError",
    "PublishManyError",
    "PublishUnknown",
    "QuarantinedRecord",
    "Reason",
    "Receipt",
    "Rejected",
    "Relay",
    "ResendPolicy",
    "Signer",
    "Store",
    "StoreError",
    "StoreUnavailable",
    "Transient",
    "Trust",
    "Unroutable",
    "Untrusted",
    "current_execution",
    "idempotent_consumer",
    "idempotent_producer",
    "open_store",
    "quarantined",
    "record_of",
    "resolve",
    "transactional_consumer",
]

_register()


#: These need SQLAlchemy, which is an extra: imported when they are asked for.
_LATE = {"Inbox": "inbox", "transactional_consumer": "inbox", "Outbox": "outbox", "Relay": "relay"}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        try:
            module = import_module(f".{_LATE[name]}", __name__)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("idempotent_bus"):
                raise
            raise ConfigurationError(f"{name} needs SQLAlchemy: pip install 'idempotent-bus[sql]'") from error
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
