"""The names under which our Redis transport keeps what kombu's does not have.

Ready messages lie in kombu's own lists, as kombu writes them. Everything that we hold lies under keys that begin
with `idempotent-bus:`, so that a plain worker beside ours can never restore what ours is working on, and a person can
see what is there:

| key | type | what |
|---|---|---|
| `...:held:{queue}:<owner>` | hash | delivered, not settled: number of the delivery -> priority and message |
| `...:owners:{queue}` | sorted set | who holds messages, by the end of the lease (server's clock, ms) |
| `...:delayed:{queue}` | sorted set | waiting, by due time (ms) |
| `...:dead:{queue}` | list | given up: time (ms), reason, priority and message; never deleted by us |
| `...:watch:{queue}` | hash | since when the queue has been looked after without a gap |
| `...:mark:<n>:{list}:<id>` | string | a message with this inner-msg-id landed on this list within the window |

The braces are hash tags: list, marks and holdings of a queue without priorities share a slot.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

SPACE: Final = "idempotent-bus:"


@dataclass(frozen=True, slots=True)
class QueueKeys:
    """Every key of one queue, prefix included. lists: one per priority, the one to be served first in front."""

    queue: str
    owners: str
    watch: str
    delayed: str
    dead: str
    lists: tuple[str, ...]
    #: What the lists are called in an entry: "0" for the plain one, else the priority.
    priorities: tuple[str, ...]
    held_prefix: str = field(repr=False)

    def held(self, owner: str) -> str:
        return self.held_prefix + owner


def queue_keys(queue: str, *, prefix: str, lists: dict[str, str]) -> QueueKeys:
    """The keys of a queue. prefix: kombu's global_keyprefix; lists: name of the priority -> list, without prefix."""
    base = f"{prefix}{SPACE}"
    tag = f"{{{prefix}{queue}}}"
    return QueueKeys(
        queue=queue,
        owners=f"{base}owners:{tag}",
        watch=f"{base}watch:{tag}",
        delayed=f"{base}delayed:{tag}",
        dead=f"{base}dead:{tag}",
        lists=tuple(prefix + name for name in lists.values()),
        priorities=tuple(lists),
        held_prefix=f"{base}held:{tag}:",
    )


def mark_key(list_key: str, inner_msg_id: str, redrive: object, *, prefix: str) -> str:
    """The mark of one message on one list (list_key includes the prefix).

    A redrive is a move that a person asked for: each of its numbers lands once more, and only once.
    """
    number = redrive if isinstance(redrive, int) and not isinstance(redrive, bool) else 0
    # The length says where the list's name ends, so that no name and id can be put together to another's mark.
    return f"{prefix}{SPACE}mark:{number}.{len(list_key)}:{{{list_key}}}:{inner_msg_id}"


def our_keys_pattern(prefix: str) -> str:
    """A SCAN pattern that finds every key of ours, marks included."""
    return re.sub(r"([\\*?\[\]])", r"\\\1", prefix) + SPACE + "*"


_NAMED = re.compile(r"(owners|delayed|dead|held):\{(.*)\}(?::[^:{}]*)?\Z", re.DOTALL)


def queue_of(key: str, *, prefix: str) -> str | None:
    """The queue that a key of ours belongs to; None for a mark or a foreign key."""
    start = prefix + SPACE
    if not key.startswith(start):
        return None
    match = _NAMED.match(key[len(start) :])
    if not match or not match.group(2).startswith(prefix):
        return None
    return match.group(2)[len(prefix) :]
