"""A chord whose body nobody sends: what a copy of its last part must wait for.

From Celery 5.7 on, whoever counts the last part on the Redis backend first claims the right to send the body, for some
seconds. If it is killed before it has sent it and its message is back within that time, the next one finds the claim,
sends nothing, and is acked: the chord stands still for ever.

A body that cannot be sent is another matter. The result backend sends it, with `task_publish_retry_policy`,
and answers for it: beyond them it fails the chord, whose body's result is then a ChordError and whose errbacks are
called, and forgets what it had collected, so a later delivery could not send it. What else follows from a guarded task,
by a chain or a link, waits for the broker instead. Call the chord again: its parts give their stored results.
"""

from __future__ import annotations

from typing import Any

__all__ = ["claimed_for"]


def claimed_for(task: Any, request: Any) -> float:
    """Seconds for which somebody, who may be dead, has claimed to send the body of this part's chord; 0.0: nobody has.

    Raises what the result backend's driver raises.
    """
    backend = task.backend
    if not request.chord or not request.group or not hasattr(backend, "_chord_part_return_script"):
        return 0.0
    left: int = backend.client.pttl(backend.get_key_for_group(request.group, ".c"))
    return max(left, 0) / 1000
