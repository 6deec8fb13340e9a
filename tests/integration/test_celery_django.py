"""A Celery task whose inbox is Django's, in real workers: its rows, record and outgoing messages are one commit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery_rig import Place, place
from django.db import connections

import django_rig
from django_rig import Card, environment
from idempotent_bus.django.models import InboxRecord, OutboxMessage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

project = pytest.fixture(scope="session")(django_rig.project)


@pytest.fixture(params=django_rig.ALIASES, scope="module")
def issuing(
    request: pytest.FixtureRequest, project: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Place, str]]:
    """An application with `inbox="django"` or `inbox="django:<alias>"`, its worker, and the database's alias."""
    alias: str = request.param
    django_rig.make(alias)
    folder = tmp_path_factory.mktemp("issuing")
    with place("ours-redis", folder, django=alias, environment=environment()) as made:
        made.start("prefork", 3)
        yield made, alias
    connections[alias].close()


def written(alias: str, pid: str) -> tuple[int, int]:
    """How many cards and how many outgoing messages there are of a payment."""
    messages = [bytes(row.body).decode() for row in OutboxMessage.objects.using(alias).all()]
    return Card.objects.using(alias).filter(payment_id=pid).count(), sum(pid in body for body in messages)


def test_copies_at_once_write_one_row_with_django(issuing: tuple[Place, str], unique: str) -> None:
    """I2: ten calls at once in three processes: one card, one outgoing message, one result for all."""
    made, alias = issuing
    calls = [made.t.issue.delay(unique, "well") for _ in range(10)]
    assert {call.get(timeout=40) for call in calls} == {f"issued {unique}"}
    assert (made.runs("issue", unique), written(alias, unique)) == (1, (1, 1))


def test_a_task_that_raises_leaves_nothing_in_django(issuing: tuple[Place, str], unique: str) -> None:
    """I3: card, record and outgoing message are rolled back together; the next call does it."""
    made, alias = issuing
    before = InboxRecord.objects.using(alias).filter(completed=True).count()
    with pytest.raises(ValueError, match=unique):
        made.t.issue.delay(unique, "raise").get(timeout=30)
    assert written(alias, unique) == (0, 0)
    assert InboxRecord.objects.using(alias).filter(completed=True).count() == before
    assert made.t.issue.delay(unique, "raise").get(timeout=30) == f"issued {unique}"
    assert written(alias, unique) == (1, 1)


def test_a_child_that_dies_before_djangos_commit_leaves_nothing(issuing: tuple[Place, str], unique: str) -> None:
    """I1, I2, I3: killed after its rows and before the commit: the message comes back, and there is one of each."""
    made, alias = issuing
    assert made.t.issue.delay(unique, "die").get(timeout=40) == f"issued {unique}"
    assert (made.runs("issue", unique), written(alias, unique)) == (2, (1, 1))


def test_the_same_task_without_the_inbox_writes_too_much(
    project: None, tmp_path_factory: pytest.TempPathFactory, unique: str
) -> None:
    """The control: Celery's own task leaves a card when it raises, one more when it dies, and one for every copy."""
    django_rig.make("default")
    folder = tmp_path_factory.mktemp("control")
    with place("ours-redis", folder, guarded=False, django="default", environment=environment()) as made:
        made.start("prefork", 3)
        with pytest.raises(ValueError, match=unique):
            made.t.issue.delay(f"{unique}-1", "raise").get(timeout=30)
        assert made.t.issue.delay(f"{unique}-1", "raise").get(timeout=30)
        made.t.issue.delay(f"{unique}-2", "die").get(timeout=40)
        calls = [made.t.issue.delay(f"{unique}-3", "well") for _ in range(10)]
        assert all(call.get(timeout=40) for call in calls)
    assert [written("default", f"{unique}-{number}")[0] for number in (1, 2, 3)] == [2, 2, 10]
    connections["default"].close()
