"""The words of the lower half's model: places of a copy, states of a record, and where a worker is with a delivery.

All are small integers, since millions of states are made of them.
"""

from __future__ import annotations

from typing import Final

# --- a copy of a message, held by the broker and by no worker: one integer ------------------------------------------

#: It may have been delivered before: by the broker's word, from a delay queue, or out of the dead letter.
REDELIVERED: Final = 1
#: It was moved back from the dead letter.
REDRIVEN: Final = 2
#: It is of the second message, not of the first.
SECOND: Final = 4
#: It is in the dead letter.
DEAD: Final = 8
#: It died, or came out of the dead letter where it had died, when the messages were old already: its death is no older
#: than the retention.
RECENT: Final = 16
#: Requeues, counted by the broker: used by the mutant that requeues.
COUNTED: Final = 32

# --- a record: (state, attempts, redrive, fingerprint, taken over, effect, starts) ----------------------------------

ABSENT: Final = 0
RESERVED: Final = 1
IN_PROGRESS: Final = 2
COMPLETED: Final = 3
RELEASED: Final = 4
QUARANTINED: Final = 5
RECORD_STATES: Final = ("absent", "reserved", "in progress", "completed", "released", "quarantined")

# --- a hold: what a worker's token and nonce are worth ----------------------------------------------------------------

NO_HOLD: Final = 0
#: Somebody else has claimed the record since.
SUPERSEDED: Final = 1
#: The record carries this token and this nonce.
OWNER: Final = 2

# --- where a worker is with a delivery: the next outside step ---------------------------------------------------------

FETCHED: Final = 0  # claim
RESERVATION: Final = 1  # its turn: begin, or ask again
RESERVE_LOST: Final = 2  # its turn: ask again, the reply was lost
CLAIM_LOST: Final = 3  # ask again at once, with the same nonce
GIVE_BACK: Final = 4  # a reservation that is no first delivery: give it back, then claim singly
RUNNING: Final = 5  # the handler runs, its effect comes next
SENT: Final = 7  # the effect is made, the completion is on its way; neighbours may begin
ACK: Final = 8  # durable, or a confirmed successor or dead letter is there
RELEASE: Final = 9  # the handler raised
ABANDON: Final = 10  # the handler raised, and cannot tell
PUT_OFF: Final = 11  # put the successor
GIVE_UP: Final = 12  # is it still ours? then the dead letter
BURY: Final = 13  # write the dead letter
RELEASE_DEAD: Final = 14  # acked after the dead letter: release the record
QUARANTINE: Final = 15
PROBE: Final = 16

# Transactional mode.
TAKE: Final = 20  # the attempt is counted, or is the first: insert the record
IN_TRANSACTION: Final = 21  # record, effect and outgoing message are written; commit
FAILED: Final = 22  # in a window: it raised, and its savepoint is undone; commit with the others
COUNT_FAILED: Final = 23  # it raised, and is rolled back: count the attempt
HALF_COMMITTED: Final = 24  # a mutant's: the effect is committed, the record is not

#: Flags of an entry. Claimed singly, whatever comes.
SINGLY: Final = 1
#: The broker has its copy back.
DETACHED: Final = 2
#: Its hold is to be released after the ack.
THEN_RELEASE: Final = 4
#: It was not acked, and is to be looked at again.
KEPT: Final = 8
#: The resource has seen a newer token.
FENCED_OFF: Final = 16
#: It has begun before, as its record says: to be claimed as an attempt, however old it is.
BEGUN: Final = 32

#: In one transaction with its neighbour.
TOGETHER: Final = 64
#: The transaction is repeated: no attempt of its own.
REPEATED: Final = 128

#: A nonce that a worker remembers: twice the hold, plus one for a reservation's, plus this for the second body.
OF_SECOND_BODY: Final = 8
