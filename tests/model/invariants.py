"""Which invariants of the design the model checks, where, and which it cannot say anything about."""

from __future__ import annotations

from typing import Final

__all__ = ["COVERED", "NOT_COVERED"]

COVERED: Final[dict[str, str]] = {
    "I1": "at each ack, requeue, redrive and receipt: the message is completed, or the broker has another copy of it",
    "I2": "at each effect. Inbox: at most one is committed. Store: a second needs a crash, a lapsed lease or a silent "
    "store between effect and completion; the fence refuses older tokens; with a probe or a quarantine no crash "
    "excuses it",
    "I3": "at each crash: effects, outgoing messages and completed records are equal in number",
    "I4": "at each ack, as I1",
    "I5": "at each marking of an outbox row: the broker has it",
    "I6": "at each claim the token is new, and at each completion and release a completed record stays",
    "I7": "no step reads a worker's clock but one, which begins on a stale reservation, by a fault; I2 holds all the "
    "same. In the inbox there is no clock at all",
    "I8": "at each answer `completed`: it is of the same body; another body is a conflict",
    "I9": "a claim or completion without an answer leads to neither a handler nor an ack",
    "I11": "records are forgotten once their messages are older than the retention, and I2 holds; that nobody redrives "
    "what came back as too old without a look at whether it was done is assumed, and a mutant shows why",
    "I12": "at each start: no more than max + 1 for each copy that is a first delivery, and no more attempts are "
    "counted than began (or were cut short by a fault); at each giving up: they did begin; a redrive starts them "
    "afresh",
    "I13": "when the frontier is empty: from each state a path without faults leads to rest. How soon, in seconds, "
    "it does not say: there are no clocks",
    "I14": "the half that says `suppress or complete`: two scopes of one biz-id are two keys, as in the configurations "
    "with two keys; a mutant shares one. Reading another's is not modelled",
    "I15": "each lost reply is settled by the same step again; a COMMIT may still be under way",
}
NOT_COVERED: Final[dict[str, str]] = {
    "I10": "keys are numbers here: that distinct identities get distinct ones is the encoding's matter "
    "(`tests/unit/test_identity.py`)",
}
