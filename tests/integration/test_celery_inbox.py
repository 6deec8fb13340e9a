"""A task's effect and its record in one commit: on PostgreSQL and SQLite, with a connection and with a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from celery_rig import Place, place

import servers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(params=["postgresql", "sqlite"], scope="module")
def paying(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """An application with an inbox, and its worker."""
    folder = tmp_path_factory.mktemp("paying")
    url = servers.postgresql() if request.param == "postgresql" else f"sqlite:///{folder}/business.db"
    with place("ours-redis", folder, inbox=url) as made:
        made.start("prefork", 3)
        yield made
        engine, tables = sa.create_engine(url), sa.MetaData()
        tables.reflect(engine, only=lambda table, _: table.startswith(made.name))
        tables.drop_all(engine)
        engine.dispose()


def rows(paying: Place, pid: str) -> int:
    engine = sa.create_engine(paying.settings["inbox"])
    with engine.connect() as connection:
        count = connection.execute(sa.text(f"SELECT count(*) FROM {paying.name}_rows WHERE pid = :pid"), {"pid": pid})
        number = int(count.scalar_one())
    engine.dispose()
    return number


def test_copies_at_once_write_one_row(paying: Place, unique: str) -> None:
    """I2: ten calls at once, one row, one result. The transaction is no argument of the callers."""
    calls = [paying.t.pay.delay(unique, "well") for _ in range(10)]
    assert {call.get(timeout=40) for call in calls} == {f"paid {unique}"}
    assert rows(paying, unique) == 1
    with pytest.raises(TypeError):
        paying.t.pay.delay(unique, "well", connection=1)


def test_a_task_that_raises_leaves_neither_row_nor_record(paying: Place, unique: str) -> None:
    """I3: it fails as in Celery, its row is rolled back, and the next call does it."""
    with pytest.raises(ValueError, match=unique):
        paying.t.pay.delay(unique, "raise").get(timeout=30)
    assert rows(paying, unique) == 0
    assert paying.t.pay.delay(unique, "raise").get(timeout=30) == f"paid {unique}"
    assert rows(paying, unique) == 1


def test_a_child_that_dies_before_the_commit_leaves_nothing(paying: Place, unique: str) -> None:
    """I2/I3: killed after the insert, before the commit: the message comes back at once, and there is one row."""
    assert paying.t.pay.delay(unique, "die").get(timeout=40) == f"paid {unique}"
    assert (paying.runs("pay", unique), rows(paying, unique)) == (2, 1)


def test_a_serialization_failure_is_repeated_and_is_no_failure(paying: Place, unique: str) -> None:
    """A transaction that met another one (40001) is run again by itself: no FAILURE, no retry of Celery's."""
    if not paying.settings["inbox"].startswith("postgresql"):
        unique = f"{unique}-well"  # SQLite has no such failure: its writers wait
    call = paying.t.pay.delay(unique, "well" if unique.endswith("well") else "meet")
    assert call.get(timeout=30) == f"paid {unique}"
    assert rows(paying, unique) == 1


def test_a_retry_in_a_session_rolls_back_and_leaves_afterwards(paying: Place, unique: str) -> None:
    """I3: what a task has written before it retries is rolled back; its retry is sent after that, and done once."""
    assert paying.t.pay_in_session.delay(unique, 3).get(timeout=40) == 3
    assert paying.t.pay_in_session.delay(unique, 3).get(timeout=30) == 3
    assert (paying.runs("pay_in_session", unique), rows(paying, unique)) == (4, 1)
