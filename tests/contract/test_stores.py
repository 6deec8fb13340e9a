"""Every store is held to the contract. Which capabilities apply is said in the table, not found out."""

from __future__ import annotations

import pytest
from stores import STORES, WITHOUT

from idempotent_bus.testing import store_capabilities as capabilities
from idempotent_bus.testing import store_contract as suite


def over(capability: str = "") -> pytest.MarkDecorator:
    names = [name for name in STORES if name not in WITHOUT.get(capability, set())]
    return pytest.mark.parametrize("contract_store", names, indirect=True)


@over()
class TestStore(suite.StoreContract):
    """The five verbs."""


@over("batch")
class TestBatch(capabilities.BatchContract):
    """claim_many and renew_many."""


@over("completions")
class TestCompletions(capabilities.CompletionsContract):
    """complete_many and stream."""


@over("lookup")
class TestLookup(capabilities.LookupContract):
    """lookup."""


@over("purge")
class TestPurge(capabilities.PurgeContract):
    """purge."""


@over("forget")
class TestForget(capabilities.ForgetContract):
    """forget."""


@over("quarantine")
class TestQuarantine(capabilities.QuarantineContract):
    """quarantine, quarantined and resolve."""


@over("shared")
class TestShared(capabilities.SharedContract):
    """Other processes, and a server that is down."""
