"""`celery -A app idempotency ...`, on an app in memory."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from click.testing import CliRunner

from idempotent_bus.celery import setup
from idempotent_bus.celery.command import idempotency
from idempotent_bus.identity import record_key
from idempotent_bus.model import Claimed, ClaimRequest, Hold
from idempotent_bus.stores.memory import MemoryStore
from idempotent_bus.testing import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> MemoryStore:
    return MemoryStore(clock=clock)


@pytest.fixture
def app(store: MemoryStore, unique: str) -> Celery:
    app = Celery(unique, broker="memory://", set_as_current=False)
    setup(app, store=store)

    @app.task(shared=False, name="issue", scope="cards.issue", biz_id="payment_id")
    def issue(payment_id: str) -> None:
        """Issue a card."""

    @app.task(shared=False, name="plain")
    def plain() -> None:
        """Nothing that anybody guards."""

    return app


def run(app: Celery, *arguments: str) -> Any:
    return CliRunner().invoke(idempotency, arguments, obj=SimpleNamespace(app=app))


def claimed(store: MemoryStore, biz_id: str) -> Hold:
    request = ClaimRequest(record_key("cards.issue", biz_id), os.urandom(16), 60.0, 600.0)
    outcome = store.claim(request)
    assert isinstance(outcome, Claimed)
    return Hold(request.key, outcome.token, request.nonce)


def test_guarded_tasks_are_listed_and_others_are_not(app: Celery) -> None:
    """`inspect` shows each guarded task, with its scope and its dead letter, and no plain one."""
    rows = [json.loads(line) for line in run(app, "inspect", "--json").output.splitlines()]
    # Celery gives every app the shared tasks of all others in this process, so those of other tests too.
    mine = [row for row in rows if row["task"] in ("issue", "plain")]
    assert [(row["task"], row["scope"], row["dead letter"]) for row in mine] == [
        ("issue", "cards.issue", "cards.issue.dead")
    ]


def test_a_record_is_shown_by_its_state(app: Celery, store: MemoryStore, clock: ManualClock) -> None:
    """`inspect TASK BIZ_ID`: absent, in progress, abandoned once its lease is over, completed."""

    def state() -> str:
        return str(json.loads(run(app, "inspect", "issue", "p-1", "--json").output)["state"])

    assert state() == "absent"
    hold = claimed(store, "p-1")
    assert state() == "in progress"
    clock.advance(61)
    assert state() == "abandoned"
    assert store.complete(hold, result=b"1", retention=600.0)
    assert state() == "completed"


def test_a_completed_record_is_forgotten_and_a_held_one_is_not(app: Celery, store: MemoryStore) -> None:
    """`forget` lets a biz-id run again; never while somebody runs it; and only after a yes."""
    hold = claimed(store, "p-1")
    refused = run(app, "forget", "issue", "p-1", "--yes")
    assert refused.exit_code == 1
    assert "is being run" in refused.output
    store.complete(hold, result=None, retention=600.0)
    assert run(app, "forget", "issue", "p-1").exit_code == 1  # nobody said yes
    assert store.lookup(hold.key) is not None
    assert run(app, "forget", "cards.issue", "p-1", "--yes").exit_code == 0
    assert store.lookup(hold.key) is None


def test_a_quarantined_record_is_resolved(app: Celery, store: MemoryStore) -> None:
    """`inspect TASK` lists the quarantine, `resolve --done` ends it, once."""
    assert store.quarantine(
        claimed(store, "p-1"), note=b'{"scope":"cards.issue","biz_id":"p-1","attempts":1,"since":1}'
    )
    listed = [json.loads(line) for line in run(app, "inspect", "issue", "--json").output.splitlines()]
    assert [row["biz_id"] for row in listed] == ["p-1"]
    assert run(app, "resolve", "issue", "p-1").exit_code == 2  # neither done nor not done
    assert run(app, "resolve", "issue", "p-1", "--done").exit_code == 0
    assert run(app, "resolve", "issue", "p-1", "--done").exit_code == 1
    assert json.loads(run(app, "inspect", "issue", "p-1", "--json").output)["state"] == "completed"


def test_what_is_over_is_purged(app: Celery, store: MemoryStore, clock: ManualClock) -> None:
    """`purge` deletes the records whose retention is over, and says how many."""
    for number in range(3):
        store.complete(claimed(store, f"p-{number}"), result=None, retention=600.0)
    assert "0 records" in run(app, "purge").output
    clock.advance(601)
    assert "3 records" in run(app, "purge").output


def test_an_unknown_task_is_named(app: Celery) -> None:
    """A name that no guarded task has is an error that lists those there are."""
    said = run(app, "inspect", "plain")
    assert said.exit_code == 2
    assert "issue" in said.output
