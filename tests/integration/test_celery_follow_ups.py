"""What follows from a task that is delivered several times follows once; the control shows what does without ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord
from celery.exceptions import ChordError
from celery_rig import Place, on, place, site, until
from kombu.exceptions import OperationalError

from idempotent_bus import ConfigurationError
from idempotent_bus.celery import stamping
from idempotent_bus.msgid import new_inner_msg_id

__all__ = ["site"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

ON_BOTH = on("ours-redis:prefork", "rabbitmq:threads")


def of(site: Place, unique: str) -> dict[str, Any]:
    """Each kind of follow-up of one task, which tells that it ran: by its name, the call that is to be copied."""
    t = site.t
    told = {name: t.told.si(pid=f"{unique}-{name}") for name in ("chain", "link", "link_error", "chord")}
    return {
        "chain": chain(t.add.si(f"{unique}-c", 1, 2), told["chain"]),
        "link": t.add.si(f"{unique}-l", 1, 2).set(link=told["link"]),
        "link_error": t.fails.si(f"{unique}-e").set(link_error=told["link_error"]),
        "chord": chord([t.add.si(f"{unique}-p", 1, 2)], told["chord"]),
    }


@on("ours-redis:prefork")
def test_a_task_delivered_three_times_is_followed_once(site: Place, unique: str) -> None:
    """The message of a chain's first task, of one with a link, with an errback, of a chord's part comes three times:
    what follows lands once, although what follows has no biz-id of its own."""
    for call in of(site, unique).values():
        with site.copied(3):
            call.apply_async()
    for kind in ("chain", "link", "chord"):
        site.stays("told", f"{unique}-{kind}", seconds=0.7)
    # A failed task is run again, and has the same errback.
    until(lambda: site.runs("fails", f"{unique}-e") == 3)
    site.stays("told", f"{unique}-link_error", seconds=0.7)


@on("rabbitmq:threads")
def test_on_rabbitmq_a_guarded_follow_up_runs_once(site: Place, unique: str) -> None:
    """RabbitMQ has no edge: the copies of a follow-up arrive, and its record refuses them, by its biz-id."""
    t = site.t
    follow = {name: t.add.si(f"{unique}-{name}", 3, 4) for name in ("chain", "link", "chord", "error")}
    for call in (
        chain(t.add.si(f"{unique}-c", 1, 2), follow["chain"]),
        t.add.si(f"{unique}-l", 1, 2).set(link=follow["link"]),
        chord([t.add.si(f"{unique}-p", 1, 2)], follow["chord"]),
        t.fails.si(f"{unique}-e").set(link_error=follow["error"]),
    ):
        with site.copied(3):
            call.apply_async()
    for kind in follow:
        site.stays("add", f"{unique}-{kind}", seconds=0.5)


@ON_BOTH
def test_a_copy_goes_on_with_the_stored_result(site: Place, unique: str) -> None:
    """I8: a chain, a link and a chord of a copy (another call, another task id) go on as if it had run."""
    t = site.t
    assert t.add.delay(unique, 1, 2).get(timeout=30) == 3
    assert chain(t.add.si(unique, 1, 2), t.double.s()).delay().get(timeout=30) == 6
    parts = [t.add.si(unique, 1, 2), t.add.si(f"{unique}-2", 2, 2)]
    assert chord(parts, t.total.s(pid=f"{unique}-t")).delay().get(timeout=30) == 7
    t.add.apply_async((unique, 1, 2), link=t.told.si(pid=f"{unique}-linked"))
    site.stays("told", f"{unique}-linked", seconds=0.2)
    site.stays("add", unique, seconds=0)


@on("ours-redis:prefork")
def test_a_rerun_names_its_calls(site: Place, unique: str) -> None:
    """A task that dies after it has called others calls them again: with `once` they land once; without, twice."""
    for once, number in ((True, 1), (False, 2)):
        pid = f"{unique}-{once}"
        assert site.t.mother.delay(pid, once).get(timeout=30) == "sent"
        for name in ("one", "two"):
            site.stays("caused", f"{pid}-{name}", number, seconds=0.3)


def test_once_is_not_for_tasks_without_a_scope(here: Place, unique: str) -> None:
    """A plain task would swallow `once` silently, and be called twice by a rerun: it is refused."""
    with pytest.raises(ConfigurationError, match="scope"):
        here.t.double.apply_async((1,), once="name")


# --- controls -----------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Place]:
    """A worker in this process, so that its parts can be replaced."""
    with place("ours-redis", tmp_path) as made:
        yield made


def in_thread(here: Place) -> Any:
    from celery.contrib.testing.worker import start_worker

    return start_worker(here.app, pool="solo", perform_ping_check=False, shutdown_timeout=30)


@pytest.mark.parametrize("derived", [True, False])
def test_without_derived_ids_follow_ups_multiply(
    here: Place, unique: str, monkeypatch: pytest.MonkeyPatch, derived: bool
) -> None:
    """The control of the first test: with fresh ids each delivery of the cause brings its follow-up along."""
    if not derived:
        monkeypatch.setattr(stamping, "id_of", lambda *_: new_inner_msg_id())
    with in_thread(here):
        for call in of(here, unique).values():
            with here.copied(3):
                call.apply_async()
        for kind in ("chain", "link", "link_error"):
            if derived:
                here.stays("told", f"{unique}-{kind}", seconds=0.5)
            else:
                until(lambda kind=kind: here.runs("told", f"{unique}-{kind}") > 1)


def test_a_follow_up_that_cannot_be_sent_is_sent_later(
    here: Place, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain does not end because its broker was away for a moment after its first task had its effect."""
    monkeypatch.setattr(stamping, "_AGAIN", 0.2)
    failures = iter([True, True, False])
    publish = here.app.amqp.Producer.publish

    def fail(self: Any, *arguments: Any, **options: Any) -> Any:
        if options["headers"]["task"].endswith(".told") and next(failures, False):
            raise OperationalError("away")
        return publish(self, *arguments, **options)

    monkeypatch.setattr(here.app.amqp.Producer, "publish", fail)
    with in_thread(here):
        call = of(here, unique)["chain"].apply_async()
        here.stays("told", f"{unique}-chain", seconds=0.5)
        assert call.parent.get(timeout=10, disable_sync_subtasks=False) == 3
    here.stays("add", f"{unique}-c", seconds=0)


def test_a_chord_whose_body_cannot_be_sent_fails_for_all_to_see(
    here: Place, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I1: Celery's Redis backend sends a chord's body itself, and answers for it: beyond the retries of the publish the
    chord is failed, with a ChordError and its errback, and nothing sends its body later. Called again it is only the
    body that runs: the parts give what they gave."""
    publish, away = here.app.amqp.Producer.publish, [True]

    def fail(self: Any, *arguments: Any, **options: Any) -> Any:
        if options["headers"]["task"].endswith(".total") and away:
            raise OperationalError("away")
        return publish(self, *arguments, **options)

    monkeypatch.setattr(here.app.amqp.Producer, "publish", fail)
    t, pids = here.t, [f"{unique}-1", f"{unique}-2"]

    def call() -> Any:
        body = t.total.s(pid=f"{unique}-t").on_error(t.told.si(pid=f"{unique}-error"))
        return chord([t.add.si(pid, 1, 2) for pid in pids], body).apply_async()

    with in_thread(here):
        with pytest.raises(ChordError, match="could not be sent"):
            call().get(timeout=30, disable_sync_subtasks=False)
        here.stays("told", f"{unique}-error")
        away.clear()
        here.stays("total", f"{unique}-t", 0, seconds=1)
        assert call().get(timeout=30, disable_sync_subtasks=False) == 6
    here.stays("total", f"{unique}-t", seconds=0)
    for pid in pids:
        here.stays("add", pid, seconds=0)
