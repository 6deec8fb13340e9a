"""`@transactional_consumer`: a guarded handler whose effect and record are one commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..admission import MAX_BODY
from ..errors import ConfigurationError
from ..events import Listener, notifier
from ..handler import HandlerP, HandlerR, IdempotentHandler
from ..hooks import Step, direct
from ..identity import BizIdSpec, FingerprintSpec
from ..policy import DAY, Backoff, Policy
from ..results import MAX_RESULT_BYTES
from ..signing import Trust
from .base import Inbox
from .running import Transactions

__all__ = ["transactional_consumer"]


def transactional_consumer(
    inbox: Inbox,
    *,
    scope: str,
    biz_id: BizIdSpec,
    fingerprint: FingerprintSpec = True,
    retention: float = 7 * DAY,
    max_attempts: int = 8,
    backoff: Backoff = Backoff(),  # noqa: B008 - frozen
    permanent: tuple[type[BaseException], ...] = (),
    busy_delay: float = 1.0,
    dead_letter: str | None = None,
    backoffs: Mapping[type[BaseException], Backoff] | None = None,
    max_result: int = MAX_RESULT_BYTES,
    listener: Listener | None = None,
    tenant: str = "",
    trust: Trust | None = None,
    max_body: int | None = MAX_BODY,
    step: Step = direct,
) -> Callable[[Callable[HandlerP, HandlerR]], IdempotentHandler[HandlerP, HandlerR]]:
    """Run the handler once for each business id, in one transaction with the record; ack after the commit.

    The handler is called with `(body, message, connection)`, or `(body, message, session)` for an inbox with a
    sessionmaker, and writes with that; it must neither commit nor roll it back, but may use `begin_nested()`. What it
    raises rolls back its writes and the record alike. After a deadlock or a serialization failure it is called again,
    in a new transaction, so what it does elsewhere may be repeated.

    Everything else is as in `idempotent_consumer`; there is no lease, since the transaction ends with its connection,
    and so no policy for what is abandoned. `IdempotentConsumer` handles the messages that have arrived together in one
    commit, each in a savepoint; a bare callback one by one.

    Raises InvalidScope or ConfigurationError at once if something cannot be right.
    """
    if not isinstance(inbox, Inbox):
        raise ConfigurationError(f"transactional_consumer takes an Inbox, not a {type(inbox).__name__}")
    _ = inbox.engine  # it needs one: said here, not at the first message
    policy = Policy(
        retention=retention,
        max_attempts=max_attempts,
        backoff=backoff,
        busy_delay=busy_delay,
        permanent=permanent,
        backoffs=backoffs or {},
    )
    executor = Transactions(inbox, policy, notify=notifier(listener), max_result=max_result, step=step)

    def decorate(handler: Callable[HandlerP, HandlerR]) -> IdempotentHandler[HandlerP, HandlerR]:
        return IdempotentHandler(
            handler,
            executor,
            scope=scope,
            biz_id=biz_id,
            fingerprint=fingerprint,
            dead_letter=dead_letter,
            tenant=tenant,
            trust=trust,
            max_body=max_body,
        )

    return decorate
