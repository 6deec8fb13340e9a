"""The Redis store over Redis Cluster: two nodes of the test's own, half of the slots each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from private_redis import PrivateRedis
from redis.cluster import RedisCluster

from idempotent_bus.errors import ConfigurationError, StoreUnavailable
from idempotent_bus.stores.redis import RedisStore
from idempotent_bus.testing import store_capabilities as capabilities
from idempotent_bus.testing import store_contract as suite
from idempotent_bus.testing.store_contract import Subject, ask, complete, new_key, take, won

HALF = 8192


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[PrivateRedis]]:
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
    nodes = [PrivateRedis(tmp_path_factory.mktemp("node"), *options) for _ in range(2)]
    try:
        first, second = nodes
        first.client.execute_command("CLUSTER ADDSLOTSRANGE", 0, HALF - 1)
        second.client.execute_command("CLUSTER ADDSLOTSRANGE", HALF, 2 * HALF - 1)
        first.client.execute_command("CLUSTER SET-CONFIG-EPOCH", 1)
        second.client.execute_command("CLUSTER SET-CONFIG-EPOCH", 2)
        second.client.execute_command("CLUSTER MEET", "127.0.0.1", first.port)
        deadline = time.monotonic() + 30
        while any(_state(node) != ("ok", "2") for node in nodes):
            assert time.monotonic() < deadline, "the two nodes did not become a cluster"
            time.sleep(0.05)
        yield nodes
    finally:
        for node in nodes:
            node.stop()


def _state(node: PrivateRedis) -> tuple[str, str]:
    info: Any = node.client.cluster("info")
    return info["cluster_state"], info["cluster_size"]


def connect(nodes: list[PrivateRedis]) -> RedisStore:
    return RedisStore(RedisCluster(host="127.0.0.1", port=nodes[0].port, socket_timeout=5))


@pytest.fixture(scope="module")
def contract_store(nodes: list[PrivateRedis]) -> Iterator[Subject]:
    subject = Subject(lambda: connect(nodes))
    yield subject
    subject.close()


class TestStore(suite.StoreContract):
    """Every rule, with keys all over the cluster."""


class TestBatch(capabilities.BatchContract):
    """Batches are one script per slot here."""


class TestCompletions(capabilities.CompletionsContract):
    """Completions go one by one here."""


class TestLookup(capabilities.LookupContract):
    """Look-ups."""


class TestForget(capabilities.ForgetContract):
    """Forgetting touches one slot."""


class TestQuarantine(capabilities.QuarantineContract):
    """The indexes lie beside their records; a list goes from slot to slot."""


def test_both_nodes_are_used(nodes: list[PrivateRedis], contract_store: Subject) -> None:
    """Records spread over the nodes, each beside its counter; nothing is refused as crossing slots."""
    before = [node.client.dbsize() for node in nodes]
    requests = [ask(new_key()) for _ in range(200)]
    for outcome in contract_store.store.claim_many(requests):
        won(outcome)
    grown = [node.client.dbsize() - size for node, size in zip(nodes, before, strict=True)]
    assert min(grown) >= 40
    for node in nodes:
        for name in node.client.scan_iter(match="*:token", count=1000):
            assert node.client.cluster("keyslot", name) == node.client.cluster("keyslot", name[: -len("token")])


def test_one_node_that_evicts_is_refused(nodes: list[PrivateRedis]) -> None:
    """Every primary is asked for its policy."""
    nodes[1].client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(ConfigurationError, match="allkeys-lru"):
            connect(nodes).claim(ask(new_key()))
    finally:
        nodes[1].client.config_set("maxmemory-policy", "noeviction")


def test_a_dead_node_is_said(nodes: list[PrivateRedis]) -> None:
    """I9: with a node gone its slots are in doubt: StoreUnavailable, with the driver's error chained. Runs last."""
    store = connect(nodes)
    slot_of = nodes[0].client.cluster
    there = [bytes([slot]) for slot in range(256) if slot_of("keyslot", f"idempotent-bus:{{{slot:02x}}}:") >= HALF]
    holds = [take(store, first + new_key()[1:])[0] for first in there[:2]]
    nodes[1].kill()
    for call in (lambda: complete(store, holds[0]), lambda: store.claim(ask(holds[1].key))):
        with pytest.raises(StoreUnavailable) as caught:
            call()
        assert caught.value.__cause__ is not None
