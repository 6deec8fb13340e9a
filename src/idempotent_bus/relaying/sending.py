"""A batch of rows through the producer, and what came of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kombu.utils import json

from ..errors import PublishError, PublishUnknown
from ..model import Landing, Receipt
from ..producer import IdempotentProducer, PublishManyError
from .entities import Described
from .rows import OutboxRow

__all__ = ["Outcome", "send"]


@dataclass(slots=True)
class Outcome:
    """What came of each row. sent: confirmed; `duplicates` of them the edge had already.

    refused: the broker said no, or the row cannot be made a message; with the reason. unknown: no answer came, or the
    send raised something strange; it may be the broker's fault or the row's. strange: it was the latter. untouched:
    never sent, the stream ended before.
    """

    sent: list[OutboxRow] = field(default_factory=list)
    duplicates: int = 0
    refused: list[tuple[OutboxRow, str]] = field(default_factory=list)
    unknown: list[tuple[OutboxRow, str]] = field(default_factory=list)
    strange: bool = False
    untouched: list[OutboxRow] = field(default_factory=list)


def send(producer: IdempotentProducer, rows: Sequence[OutboxRow], entities: Described, *, window: int) -> Outcome:
    """Publish these rows, in no order among themselves. Raises nothing that the broker or a row could be the cause of.

    entities: those that rows want declared; kept by the caller, so that each is declared once.
    """
    outcome = Outcome()
    messages: list[tuple[bytes, dict[str, Any]]] = []
    made: list[OutboxRow] = []
    for row in rows:
        try:
            messages.append(_message(row, entities))
            made.append(row)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the row
            outcome.refused.append((row, f"it cannot be made a message: {type(error).__name__}"))
    if not messages:
        return outcome
    results: Sequence[Receipt | PublishError]
    strange: BaseException | None = None
    try:
        results = producer.publish_many(messages, window=window)
    except PublishManyError as error:
        results = error.results
        if not isinstance(error.__cause__, PublishError):
            strange = error.__cause__
    for row, result in zip(made, results, strict=False):
        if isinstance(result, Receipt):
            outcome.sent.append(row)
            outcome.duplicates += result.landing is Landing.DUPLICATE
        elif isinstance(result, PublishUnknown):
            outcome.unknown.append((row, str(result)))
        else:
            outcome.refused.append((row, str(result)))
    outcome.strange = strange is not None
    rest = made[len(results) :]
    if strange is not None and rest and not outcome.unknown:
        # It was raised while the next message was made or sent: that row's doing, or the broker's.
        outcome.unknown.append((rest.pop(0), f"sending it raised {type(strange).__name__}"))
    outcome.untouched = rest
    return outcome


def _message(row: OutboxRow, entities: Described) -> tuple[bytes, dict[str, Any]]:
    keywords: dict[str, Any] = {
        "inner_msg_id": row.inner_msg_id,
        "exchange": row.exchange,
        "routing_key": row.routing_key,
        "content_type": row.content_type,
        "content_encoding": row.content_encoding,
    }
    if row.headers != "{}":
        keywords["headers"] = json.loads(row.headers)
    if row.options != "{}":
        options: Mapping[str, Any] = json.loads(row.options)
        keywords.update(options.get("properties", {}))
        keywords.update({name: options[name] for name in ("priority", "expiration") if name in options})
        if "exchange" in options:
            keywords["exchange"] = entities.exchange(row.exchange, options["exchange"])
        if "queue" in options:
            keywords["declare"] = (entities.queue(options["queue"]),)
    return row.body, keywords
