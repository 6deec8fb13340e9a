"""Up to where a Kafka consumer may commit: in each partition, the offset before which everything is done."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

__all__ = ["Fetched", "Offsets"]


class _Partition:
    """One partition for as long as it is assigned to us. open: what was fetched, in order; done: what of it is done."""

    __slots__ = ("done", "open", "position")

    def __init__(self) -> None:
        self.open: deque[int] = deque()
        self.done: set[int] = set()
        self.position: int | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """A record that was fetched and is not done."""

    topic: str
    partition: int
    offset: int
    value: bytes
    assignment: _Partition


class Offsets:
    """All partitions of one channel. One thread.

    A partition that was taken away and came back is another assignment: what was fetched before is not ours any more,
    because the group's own offset decides where the new one begins.
    """

    def __init__(self) -> None:
        self._partitions: dict[tuple[str, int], _Partition] = {}

    def began(self, topic: str, partition: int, offset: int, value: bytes) -> Fetched:
        """A record was fetched."""
        assignment = self._partitions.setdefault((topic, partition), _Partition())
        assignment.open.append(offset)
        return Fetched(topic, partition, offset, value, assignment)

    def done(self, fetched: Fetched) -> int | None:
        """A record is done. Returns the offset to commit, if it is a new one: that after the last one of the prefix."""
        if not self.is_ours(fetched):
            return None
        assignment = fetched.assignment
        assignment.done.add(fetched.offset)
        # Offsets have gaps (compaction, transactions): the order in which they came is what counts.
        position = None
        while assignment.open and assignment.open[0] in assignment.done:
            offset = assignment.open.popleft()
            assignment.done.discard(offset)
            position = assignment.position = offset + 1
        return position

    def is_ours(self, fetched: Fetched) -> bool:
        """False once its partition was taken away."""
        return self._partitions.get((fetched.topic, fetched.partition)) is fetched.assignment

    def position(self, topic: str, partition: int) -> int | None:
        """The offset before which all that was fetched is done; None if nothing is."""
        assignment = self._partitions.get((topic, partition))
        return None if assignment is None else assignment.position

    def partitions(self, topic: str) -> list[tuple[str, int]]:
        """The partitions of a topic that something was fetched from."""
        return [key for key in self._partitions if key[0] == topic]

    def forget(self, topic: str, partition: int) -> None:
        """The partition was taken away."""
        self._partitions.pop((topic, partition), None)
