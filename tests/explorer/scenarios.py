"""What is explored: small stories, each with a way of the protocol that no other one takes."""

from __future__ import annotations

from world import Scenario

from idempotent_bus.testing.faults import FAULTS, Action

#: With one worker, on every store.
ALONE: dict[str, Scenario] = {
    "one": Scenario("a"),
    "one, in a window": Scenario("a", window=10),
    "one, manual": Scenario("a", manual=True),
    "one that fails once": Scenario("a", fails={"a": 1}),
    "one that always fails": Scenario("a", fails={"a": 99}),
    "one that fails, redriven": Scenario("a", fails={"a": 3}, redrive=True),
    "one that can never be done": Scenario("a", forbidden="a"),
    "one older than the retention": Scenario("a", stale="a"),
    "one whose lease is renewed": Scenario("a", slow="a"),
    "two copies": Scenario("aa"),
    "two bodies of one id": Scenario("aA"),
    "window of three": Scenario("abc", window=3),
    "window with a copy": Scenario("aba", window=3),
    "window with one that fails once": Scenario("abc", window=3, fails={"b": 1}),
    "window with one that always fails": Scenario("ab", window=2, fails={"a": 99}),
    "window, manual": Scenario("ab", window=2, manual=True),
    "streamed window of three": Scenario("abc", window=3, streaming=True),
    "streamed window with a copy": Scenario("aba", window=3, streaming=True),
    "streamed window with one that fails once": Scenario("abc", window=3, fails={"b": 1}, streaming=True),
    "streamed window, claimed in turn": Scenario("abc", window=3, on_abandoned="probe", streaming=True),
    "streamed window, claimed in turn, with a copy": Scenario(
        "aba", window=3, on_abandoned="quarantine", streaming=True
    ),
    "streamed window, claimed in turn, with one that fails once": Scenario(
        "ab", window=2, fails={"a": 1}, on_abandoned="probe", streaming=True
    ),
    "quarantine": Scenario("a", on_abandoned="quarantine"),
    "quarantine, two copies": Scenario("aa", window=2, on_abandoned="quarantine"),
    "one that cannot tell": Scenario("a", doubts={"a": 1}),
    "one that cannot tell, quarantine": Scenario("a", doubts={"a": 1}, on_abandoned="quarantine"),
    "one that cannot tell, probe": Scenario("a", doubts={"a": 1}, on_abandoned="probe"),
    "probe": Scenario("a", on_abandoned="probe"),
    "probe, window": Scenario("ab", window=2, on_abandoned="probe"),
}
#: With two and three workers, that hand over to each other.
TOGETHER: dict[str, Scenario] = {
    "two workers, two copies": Scenario("aa", workers=2),
    "two workers, one that fails once, and a copy": Scenario("aa", workers=2, fails={"a": 1}),
    "two workers, windows with copies": Scenario("abab", workers=2, window=2),
    "two workers, streamed windows with copies": Scenario("abab", workers=2, window=2, streaming=True),
    "two workers, streamed windows, claimed in turn": Scenario(
        "abab", workers=2, window=2, on_abandoned="probe", streaming=True
    ),
    "two workers, a renewed lease and a copy": Scenario("aa", workers=2, slow="a"),
    "two workers, probe": Scenario("aa", workers=2, on_abandoned="probe"),
    "three workers, three copies": Scenario("aaa", workers=3),
}
#: Where record and effect are one commit. There is no lease, no token, nothing manual and nothing that is abandoned.
INBOX: dict[str, Scenario] = {
    "one": Scenario("a"),
    "one that fails once": Scenario("a", fails={"a": 1}),
    "one that always fails": Scenario("a", fails={"a": 99}),
    "one that fails, redriven": Scenario("a", fails={"a": 3}, redrive=True),
    "one that can never be done": Scenario("a", forbidden="a"),
    "one older than the retention": Scenario("a", stale="a"),
    "two copies": Scenario("aa"),
    "two bodies of one id": Scenario("aA"),
    "window of three": Scenario("abc", window=3),
    "window with a copy": Scenario("aba", window=3),
    "window with one that fails once": Scenario("abc", window=3, fails={"b": 1}),
}
#: Only where a worker that waits for another's lock gives up at once: SQLite without a busy timeout.
INBOX_TOGETHER: dict[str, Scenario] = {
    "two workers, two copies": Scenario("aa", workers=2),
    "two workers, windows with copies": Scenario("abab", workers=2, window=2),
}

TWO = (*FAULTS, Action.SWITCH, Action.STALL)
THREE = (*TWO, Action.SWITCH_2)


def actions_for(scenario: Scenario, *, transactional: bool = False) -> tuple[Action, ...]:
    """What may happen at a step of this scenario.

    A worker that stands still within its transaction holds its database's locks, and keeps all others waiting for as
    long: with the inbox nobody stalls, and a transaction ends with its connection.
    """
    if transactional and scenario.workers > 1:
        return (*FAULTS, Action.SWITCH)
    return {1: FAULTS, 2: TWO, 3: THREE}[scenario.workers]
