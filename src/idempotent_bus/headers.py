"""The names that travel with a message. Changing one breaks what is already queued."""

from __future__ import annotations

from typing import Final

#: The bus's own id of one logical publish: the same on every resend, unknown to business code.
INNER_MSG_ID: Final = "inner-msg-id"

#: What RabbitMQ's deduplication plugin looks at; set on request only, to the inner-msg-id.
DEDUPLICATION: Final = "x-deduplication-header"

#: How often a person moved the message back from the dead letter; a larger number starts the attempts afresh.
REDRIVE: Final = "idempotent-bus-redrive"

#: Why a message is in the dead letter: one of the words of `model.Reason`.
DEAD_REASON: Final = "idempotent-bus-dead-reason"
#: The last line of the traceback, which is the handler's own text, or that of the refusal, which has no biz-id in it.
DEAD_ERROR: Final = "idempotent-bus-dead-error"
#: How many attempts were counted before the message was given up.
DEAD_ATTEMPTS: Final = "idempotent-bus-dead-attempts"
#: The scope of the consumer that gave the message up.
DEAD_SCOPE: Final = "idempotent-bus-dead-scope"
#: When it died, in whole seconds since the epoch, by the consumer's clock. Kept by a redrive: what lay dead for longer
#: than the retention may have been done by another copy, and forgotten.
DEAD_AT: Final = "idempotent-bus-dead-at"
#: The queue that the message was consumed from; a redrive moves it back there.
ORIGIN_QUEUE: Final = "idempotent-bus-origin-queue"
#: The record that the message belongs to, in hex: tells a redrive whether it has been completed meanwhile.
DEAD_RECORD: Final = "idempotent-bus-dead-record"
#: The fingerprint of the dead message, in hex: the record may have been completed with another body.
DEAD_FINGERPRINT: Final = "idempotent-bus-dead-fingerprint"

#: The producer that signed the message, and its signature: see `signing.py`.
PRODUCER: Final = "idempotent-bus-producer"
SIGNATURE: Final = "idempotent-bus-signature"

#: The properties of a message as they came, in hex, where the driver could not read them: see `frames.py`.
UNREADABLE: Final = "idempotent-bus-unreadable"
