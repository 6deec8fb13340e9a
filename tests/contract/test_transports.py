"""Every transport with an edge is held to the contract; kombu's own, which has none, is its control."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kombu import Connection
from transports import TRANSPORTS

from idempotent_bus.testing.transport_contract import TransportContract, TransportSubject


@pytest.fixture(scope="module", params=TRANSPORTS)
def contract_transport(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TransportSubject]:
    """The transport under test; a server that is missing skips it, or fails it in CI."""
    with TRANSPORTS[request.param](tmp_path_factory.mktemp("transport")) as subject:
        yield subject


class TestTransport(TransportContract):
    """The edge, and that nothing is lost."""


@pytest.mark.parametrize("check", ["test_a_publish_lands_once", "test_what_is_not_settled_comes_back"])
def test_the_contract_notices(check: str) -> None:
    """The control: kombu's memory transport lands copies, and forgets what a channel had when it closes."""
    subject = TransportSubject(lambda: Connection("memory://"), patience=0.3)
    with pytest.raises(AssertionError):
        getattr(TransportContract(), check)(subject)
