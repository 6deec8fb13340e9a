"""The pytest plug-in of idempotent-bus: fixtures for tests of handlers. Nothing changes for a test that asks for none.

A package beside `idempotent_bus`, and not in it: pytest imports plug-ins before it does anything else, in every project
that has this one installed, and to import a module of `idempotent_bus` is to import kombu. It also would be too late
for coverage to see that import.

* `deliver(handler, *bodies)`: the test is run four times, and each time the messages are delivered another way: every
  one twice, late once more, out of order, and concurrently.
* `crashes(handler, body, outside=[(bank, "charge")])`: gives one run for each crash before and after each step.
* `manual_clock`, `faulty_store`, `faulty_broker`: time that passes only when told; on that clock, a store that fails
  as it is told, and a broker in memory.

`idempotent_bus.testing.assert_idempotent` needs no fixture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from idempotent_bus.testing import FaultyStore, ManualClock, MemoryBroker
    from idempotent_bus.testing.delivering import Crash, Delivered

# What they assert is told as pytest tells it in a test of one's own. Nothing is imported by this.
pytest.register_assert_rewrite(
    "idempotent_bus.testing.store_capabilities",
    "idempotent_bus.testing.store_contract",
    "idempotent_bus.testing.transport_contract",
)

_WAYS = ("twice", "late", "out of order", "concurrently")


@pytest.fixture
def manual_clock() -> ManualClock:
    """A clock whose time passes only when told."""
    from idempotent_bus.testing import ManualClock

    return ManualClock()


@pytest.fixture
def faulty_store(manual_clock: ManualClock) -> FaultyStore:
    """A store in memory, on `manual_clock`, that fails as it is told."""
    from idempotent_bus.stores.memory import MemoryStore
    from idempotent_bus.testing import FaultyStore

    return FaultyStore(MemoryStore(manual_clock))


@pytest.fixture
def faulty_broker(manual_clock: ManualClock) -> MemoryBroker:
    """A broker in memory, on `manual_clock`: redelivery, delays, dead letter, an edge, and acks that get lost."""
    from idempotent_bus.testing import MemoryBroker

    return MemoryBroker(manual_clock)


@pytest.fixture(params=_WAYS)
def deliver(request: pytest.FixtureRequest) -> Callable[..., Delivered]:
    """Delivers messages to a handler in one of four ways; the test runs once for each. See `testing.delivering`."""
    from idempotent_bus.testing.delivering import Way, deliver

    def delivered(handler: Callable[..., Any], *bodies: Any, **options: Any) -> Delivered:
        return deliver(handler, *bodies, way=Way(request.param), **options)

    return delivered


@pytest.fixture
def crashes() -> Callable[..., Iterator[Crash]]:
    """Gives one run of a handler for each crash before and after each of its steps. See `testing.delivering`."""
    from idempotent_bus.testing.delivering import crashes

    return crashes
