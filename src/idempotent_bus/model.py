"""Words and values that the halves share: records, claims, receipts. Nothing here does anything.

What is made for each message that runs is a named tuple: as frozen as a dataclass, made and hashed in a third of the
time.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

#: The length of a record's key and of a nonce, in bytes. Fixed, so that no collation or padding can fold two keys.
KEY_BYTES = 16
NONCE_BYTES = 16
FINGERPRINT_BYTES = 8


class State(enum.IntEnum):
    """The state of a record. The numbers are stored: they never change their meaning."""

    RESERVED = 1
    """Claimed ahead of its turn: no attempt is counted, no handler has started."""
    IN_PROGRESS = 2
    """Claimed, the attempt counted. When its lease lapses, it was abandoned."""
    COMPLETED = 3
    """Final. The stored result answers every later copy."""
    RELEASED = 4
    """Given back; the next claim may run. Its attempts stay counted."""
    QUARANTINED = 5
    """Abandoned in the middle of its handler, so its effect is not known: nothing runs until a person decides."""


class Hold(NamedTuple):
    """Proof of ownership: the key, and the token and nonce that the owner's claim got. All three are compared."""

    key: bytes
    token: int
    nonce: bytes


class ClaimRequest(NamedTuple):
    """What a claimer asks for.

    key: KEY_BYTES bytes. nonce: NONCE_BYTES random bytes of this claim; asking again with the same nonce is
    recognised. lease and retention: seconds. fingerprint: FINGERPRINT_BYTES bytes, or None where it is off.
    redrive: a number larger than the record's starts the attempts afresh. reserve: claim ahead of its turn,
    without counting an attempt.
    """

    key: bytes
    nonce: bytes
    lease: float
    retention: float
    fingerprint: bytes | None = None
    redrive: int = 0
    reserve: bool = False


class Claimed(NamedTuple):
    """The claim won.

    token: larger than every token that this key ever had. attempt: the number of this run, from 1 (for a
    reservation: the number that it will have once it starts). taken_over: an earlier holder had started, and its
    lease lapsed or was ended as abandoned, so its effect may or may not exist.
    """

    token: int
    attempt: int
    taken_over: bool = False


@dataclass(frozen=True, slots=True)
class Busy:
    """Somebody else holds it. retry_after: seconds until its lease would lapse, by the store's clock."""

    retry_after: float


@dataclass(frozen=True, slots=True)
class Completed:
    """It was done before; result is what `complete` stored."""

    result: bytes | None


@dataclass(frozen=True, slots=True)
class Conflict:
    """The same biz-id with another fingerprint: not a duplicate. state: that of the record it conflicts with."""

    state: State


class Completion(NamedTuple):
    """What is asked of a store when a handler has succeeded. retention: seconds from now."""

    hold: Hold
    result: bytes | None
    retention: float


class Settled(NamedTuple):
    """How a streamed completion ended. ticket: its number.

    durable: True, it is durable: the message may be acked. False: ownership was lost, as `complete` says it. None: in
    doubt; ask `complete` with the same hold, which tells.
    """

    ticket: int
    durable: bool | None


@dataclass(frozen=True, slots=True)
class Quarantined:
    """It was abandoned in the middle of its handler and waits for a person's decision: nothing may run."""


ClaimOutcome = Claimed | Busy | Completed | Conflict | Quarantined


@dataclass(frozen=True, slots=True)
class Record:
    """A record as a look-up shows it. lease_left and retention_left: seconds by the store's clock, never below 0.

    result: what `complete` stored, or of a quarantined record its note. token: 0 where a store no longer keeps it; it
    need not once the record is completed.
    """

    key: bytes
    state: State
    token: int
    attempts: int
    redrive: int
    lease_left: float
    retention_left: float
    fingerprint: bytes | None
    result: bytes | None


class Landing(str, enum.Enum):
    """How a publish ended at the broker's edge."""

    LANDED = "landed"
    DUPLICATE = "duplicate"


class Edge(str, enum.Enum):
    """Where a second copy with the same inner-msg-id is refused."""

    BROKER = "broker"
    CONSUMER = "consumer"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is known of a publish: only what the broker confirmed.

    sends: how often the message was sent (1 unless a confirm was late or lost).
    """

    inner_msg_id: str
    landing: Landing
    edge: Edge
    sends: int = 1

    @property
    def landed(self) -> bool:
        """True if this publish put the message there, False if it was there already."""
        return self.landing is Landing.LANDED


class Reason(str, enum.Enum):
    """Why a message went to the dead letter."""

    INVALID = "invalid"
    """No usable biz-id, or a body that cannot be decoded."""
    CONFLICT = "conflict"
    """The biz-id is known with another fingerprint."""
    ATTEMPTS = "attempts"
    """The attempts are used up."""
    PERMANENT = "permanent"
    """The handler raised an error that no rerun can mend."""
    ABANDONED = "abandoned"
    """A worker died in the middle of the handler, and the record is in quarantine: resolve it, then redrive."""
    TOO_OLD = "too old"
    """Older than the retention: its record may have been forgotten, so that it is in doubt whether it was done."""
    UNTRUSTED = "untrusted"
    """The signature is missing or wrong: the message is not from a producer that this consumer trusts."""
    NO_ACK = "no-ack"
    """The consumer was opened with no_ack=True, so the broker had already forgotten the message."""
