"""The messages of a cell: what each is, what its handler does, and what must have become of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

__all__ = ["BLOCK", "bodies", "expected", "kind_of", "outbox_fed", "queue_of"]

#: Messages are published, or committed to the outbox, in blocks of so many.
BLOCK: Final = 20
_KINDS: Final = {
    3: "fails", 13: "never", 23: "doubt", 33: "asked", 41: "chain", 53: "never", 63: "doubt", 73: "asked", 83: "fails",
    91: "chain",
}  # fmt: skip


def kind_of(number: int) -> str:
    """good: done. fails: raises the first time. never: permanently. doubt and asked: cannot tell, the first time.

    slow: takes so long that its lease is renewed. chain: in the inbox, adds a message to the outbox in its transaction.
    """
    return "slow" if number % 250 == 99 else _KINDS.get(number % 100, "good")


def outbox_fed(block: int) -> bool:
    """Whether this block's messages go through the outbox; the others are published directly."""
    return block % 2 == 1


def bodies(block: int, *, plain: bool = False) -> Iterator[dict[str, Any]]:
    """The bodies of a block, one in ten of them twice: the business publishes it again, under another inner-msg-id.

    plain: for a control; all are good, and none is published twice.
    """
    for number in range(block * BLOCK, (block + 1) * BLOCK):
        body = {"id": f"m{number}", "kind": "good" if plain else kind_of(number), "after": number % 200 >= 100}
        yield body
        if number % 10 == 5 and not plain:
            yield body


def queue_of(kind: str, mode: str) -> str:
    """Which queue, and scope: one for each policy on what was abandoned."""
    return {"doubt": "quarantine", "asked": "probe"}.get(kind, "rerun") if mode == "store" else "rerun"


def expected(blocks: int, mode: str, *, plain: bool = False) -> dict[str, str]:
    """Every biz-id that there must be, with its kind."""
    found = {body["id"]: body["kind"] for block in range(blocks) for body in bodies(block, plain=plain)}
    if mode == "inbox":
        found.update({f"n{biz_id}": "good" for biz_id, kind in list(found.items()) if kind == "chain"})
    return found
