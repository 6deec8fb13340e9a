"""The fixture that the contract's classes run over."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import stores

from idempotent_bus.testing.store_contract import Subject


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Subject]]:
    """One place per store for the whole run: keys are random, so that tests need no place of their own."""
    opened: dict[str, Subject] = {}
    with contextlib.ExitStack() as stack:

        class Places(dict[str, Subject]):
            def __missing__(self, name: str) -> Subject:
                place = stack.enter_context(stores.STORES[name](tmp_path_factory.mktemp(name)))
                return self.setdefault(name, place)

        opened = Places()
        yield opened
        for place in opened.values():
            place.close()


@pytest.fixture
def contract_store(request: pytest.FixtureRequest, places: dict[str, Subject]) -> Subject:
    """The store under test, by its name in the table; a server that is missing skips it, or fails it in CI."""
    if gap := stores.KNOWN_GAPS.get((request.param, request.node.originalname)):
        request.applymarker(pytest.mark.xfail(reason=gap, strict=True))
    return places[request.param]
