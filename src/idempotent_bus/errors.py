"""Every error of the library, on one screen. An error's docstring says what it means and what to do.

Messages never carry a biz-id or a credential in clear; driver errors are chained (`__cause__`).
"""

from __future__ import annotations


class IdempotentBusError(Exception):
    """The base of all errors that this library raises."""


class ConfigurationError(IdempotentBusError):
    """The library was set up in a way that could not keep its promise; the text says what to change."""


# --- identities -------------------------------------------------------------------------------------


class InvalidMessage(IdempotentBusError):
    """A message cannot be handled safely: it goes to the dead letter with this reason and is never run."""


class InvalidBizId(InvalidMessage):
    """The biz-id is missing, empty, too long, of a wrong type or has control characters."""


class InvalidBody(InvalidMessage):
    """The body cannot be decoded, is too large, or no fingerprint can be made of it."""


class Untrusted(InvalidMessage):
    """The signature is missing or wrong: the message is not from a producer that this consumer trusts."""


class InvalidScope(ConfigurationError):
    """A scope must be a non-empty text of at most 200 bytes without control characters."""


# --- stores -----------------------------------------------------------------------------------------


class StoreError(IdempotentBusError):
    """A dedup store could not do what it was asked."""


class StoreUnavailable(StoreError):
    """The store is down, full, slow, or its reply was lost: the outcome is unknown, so nothing is run or acked.

    Every store operation may be repeated with the same arguments to learn the outcome.
    """


# --- publishing -------------------------------------------------------------------------------------


class PublishError(IdempotentBusError):
    """A publish did not end as `landed` or `duplicate`.

    `inner_msg_id` is the id of the message; publish again with `inner_msg_id=error.inner_msg_id` to resend
    the very same message, which lands once however often it is sent.
    """

    def __init__(self, text: str, inner_msg_id: str = "") -> None:
        super().__init__(text)
        self.inner_msg_id = inner_msg_id


class Unroutable(PublishError):
    """No queue is bound for this exchange and routing key: nothing was stored. Declare the queue first."""


class Rejected(PublishError):
    """The broker refused the message (nack: queue full, reject-publish, no space): nothing is promised as stored."""


class PublishUnknown(PublishError):
    """The confirm did not come within the retry policy: the message may or may not have landed. Resend the same id."""


# --- handlers ---------------------------------------------------------------------------------------


class Permanent(IdempotentBusError):
    """Raise this, or a subclass, from a handler when a rerun cannot help: the message is dead-lettered at once."""


class Transient(IdempotentBusError):
    """Raise this, or a subclass, from a handler when a rerun will help: `retry_after` seconds replace the backoff.

    They are 30 days at most, and half of the retention. It counts as an attempt like any other failure.
    """

    retry_after: float | None = None  # for a subclass that does not call this one's __init__

    def __init__(self, text: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(text)
        if retry_after is not None and not 0 <= retry_after < float("inf"):
            raise ValueError("retry_after must be a number of seconds, at least 0 and finite")
        self.retry_after = retry_after


class InDoubt(IdempotentBusError):
    """Raise this, or a subclass, from a handler that cannot tell whether its effect happened (a call timed out).

    The claim is ended as abandoned, and the consumer's `on_abandoned` decides: run again, quarantine, or probe.
    """


class FingerprintConflict(IdempotentBusError):
    """`Inbox.record`: the biz-id was done before, with another body. It is no duplicate: one of the two is wrong."""


class LeaseLost(IdempotentBusError):
    """The execution's lease is over, and another one may have taken over: stop, and change nothing more."""


class HandlerAcknowledged(IdempotentBusError):
    """A guarded handler called ack, reject or requeue itself. Remove that call: the library acks after success."""


class NoExecution(IdempotentBusError):
    """`current_execution()` was called outside a guarded handler."""
