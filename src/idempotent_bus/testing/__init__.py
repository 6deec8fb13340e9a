"""What a user's own tests need: faults at every step, a clock, a broker and a store that can fail, and a judge.

`assert_idempotent(handler, message, observe=...)` runs a handler as an at-least-once bus does, and says what is wrong
with it. `FaultyStore` and `MemoryBroker` are for tests of your own; `explorer` runs every schedule of anything whose
outside steps go through a `Step`.
"""

from __future__ import annotations

from .broker import BrokerMessage, DeadLetter, Delivery, MemoryBroker
from .clock import ManualClock
from .delivering import Crash, Delivered, Way, crashes, deliver
from .faults import FAULTS, Action, FaultyStep, Killed, Plan, Script, Watch, error_of, plan_of, text_of
from .faulty_store import FaultyStore
from .flaws import Finding, NotIdempotent, Reason
from .idempotence import assert_idempotent, find_flaws

__all__ = [
    "FAULTS",
    "Action",
    "BrokerMessage",
    "Crash",
    "DeadLetter",
    "Delivered",
    "Delivery",
    "FaultyStep",
    "FaultyStore",
    "Finding",
    "Killed",
    "ManualClock",
    "MemoryBroker",
    "NotIdempotent",
    "Plan",
    "Reason",
    "Script",
    "Watch",
    "Way",
    "assert_idempotent",
    "crashes",
    "deliver",
    "error_of",
    "find_flaws",
    "plan_of",
    "text_of",
]
