"""What can be wrong with a handler: the reasons, what to do about each, and how a finding is said."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Finding", "NotIdempotent", "Reason"]


class Reason(str, enum.Enum):
    """Why a handler is not idempotent. The value is how it is called in a report."""

    REPEATED = "effect repeated after a crash between the effect and its completion"
    CHECKED_LATE = "effect before check"
    UNSTABLE = "clock or random in what identifies the effect"
    SWALLOWED = "swallowed error"
    COMMITTED = "commits by itself"
    NOT_ATOMIC = "non-atomic read-modify-write"
    PUBLISHED_ANEW = "publishes without once="
    ORDER = "depends on order"
    MUTATED = "mutates the body"
    ACKED = "acks by itself"
    FAILED = "fails without any fault"
    LOST = "effect lost"


#: What to do about it.
HINTS = {
    Reason.REPEATED: (
        "no library can know that an effect in another system happened: give that system "
        "current_execution().idempotency_key or the biz-id to dedupe by, write with a unique key (INSERT ... ON "
        "CONFLICT DO NOTHING), let it compare current_execution().token, or put the effect into the inbox's transaction"
    ),
    Reason.CHECKED_LATE: "look before the effect, or better: let effect and check be one atomic write",
    Reason.UNSTABLE: (
        "derive the key from the message: the biz-id, or current_execution().idempotency_key, which is the same on "
        "every attempt"
    ),
    Reason.SWALLOWED: (
        "let the error out: returning means success, so the message is acked and nothing will do the rest; the library "
        "runs it again"
    ),
    Reason.COMMITTED: "leave COMMIT and ROLLBACK to the library: record and effect are one commit; use begin_nested()",
    Reason.NOT_ATOMIC: (
        "let the database do it in one statement (UPDATE ... SET n = n + 1), lock the row (SELECT ... FOR UPDATE), or "
        "compare a version when writing"
    ),
    Reason.PUBLISHED_ANEW: (
        "publish(..., once='a name'): its id is then derived from this execution, and a rerun's copy is refused"
    ),
    Reason.ORDER: (
        "order is not promised: let the message carry a version or a time of the business, and ignore what is older "
        "than what is there"
    ),
    Reason.MUTATED: "copy the body before changing it: a retry within this process is given the same object",
    Reason.ACKED: "remove ack, reject and requeue: the library acks after the completion is durable",
    Reason.FAILED: "the handler raised although nothing went wrong around it: mend that first",
    Reason.LOST: "the message was acked, but its effect is not there",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One flaw. case: what was done to the handler. expected, got: what `observe` showed. detail: what else was."""

    reason: Reason
    case: str
    expected: Any = None
    got: Any = None
    detail: str = ""

    @property
    def hint(self) -> str:
        """What to do about it."""
        return HINTS[self.reason]

    def __str__(self) -> str:
        lines = [f"{self.reason.value}: {self.case}"]
        if self.expected != self.got:
            lines += [f"    expected: {self.expected!r}", f"    got:      {self.got!r}"]
        if self.detail:
            lines.append(f"    {self.detail}")
        lines.append(f"    {self.hint}")
        return "\n".join(lines)


class NotIdempotent(AssertionError):
    """The handler does not do the same when it is run as an at-least-once bus does. findings: one for each reason."""

    def __init__(self, name: str, findings: Sequence[Finding]) -> None:
        super().__init__(f"{name} is not idempotent:\n" + "\n".join(f"  {finding}" for finding in findings))
        self.findings = list(findings)

    @property
    def reasons(self) -> set[Reason]:
        """Why."""
        return {finding.reason for finding in self.findings}
