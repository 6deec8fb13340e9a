"""How a guarded task's message ends, whatever Celery or the task does: on real brokers, in real workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import celery_tasks
import pytest
from celery.exceptions import Reject, SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded
from celery_rig import HERE, Place, on, site, until

from idempotent_bus import InvalidBizId
from idempotent_bus.celery import Refused, ResultNotStored

__all__ = ["site"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

#: Prefork has all that Celery can do: time limits, revoke with terminate, children that die.
PREFORK = on("ours-redis:prefork", "rabbitmq:prefork")
#: Each broker that waits in its own way, and each of the pools that are always there.
ALL = on("ours-redis:prefork", "rabbitmq:prefork", "rabbitmq-quorum:threads", "redis:threads", "ours-redis:solo")


@ALL
def test_two_calls_with_one_biz_id_have_one_effect_and_one_result(site: Place, unique: str) -> None:
    """I2/I8: what was done is not done again, and whoever asked again has the same result."""
    calls = [site.t.add.delay(unique, 1, 2) for _ in range(3)]
    assert [call.get(timeout=30) for call in calls] == [3, 3, 3]
    assert len({call.id for call in calls}) == 3
    site.stays("add", unique, seconds=0.3)


@ALL
def test_a_task_id_given_from_outside_swallows_no_call(site: Place, unique: str) -> None:
    """A nightly `apply_async(task_id=...)` is another message every night: both land, and only the biz-id says what is
    a duplicate."""
    for night in ("monday", "tuesday", "tuesday"):
        result = site.t.add.apply_async((f"{unique}-{night}", 1, 2), task_id=unique)
        assert result.get(timeout=30) == 3
        site.t.plain_note.apply_async((f"{unique}-{night}",), task_id=f"{unique}-plain")
    site.stays("add", f"{unique}-monday", seconds=0)
    until(lambda: site.runs("plain_note", f"{unique}-tuesday") == 2)  # a plain task has no biz-id: all three landed
    site.stays("add", f"{unique}-tuesday", seconds=0.3)


@PREFORK
def test_two_processes_call_at_once(site: Place, unique: str) -> None:
    """I2: apply_async with one biz-id from two processes at once has one effect."""
    code = f"import celery_tasks as c\nfor n in range(20): c.app.t.add.delay(f'{unique}-{{n}}', n, 1)"
    environment = {**os.environ, celery_tasks.VARIABLE: json.dumps(site.settings)}
    callers = [subprocess.Popen([sys.executable, "-c", code], cwd=HERE, env=environment) for _ in range(2)]
    assert [caller.wait(60) for caller in callers] == [0, 0]
    until(lambda: all(site.runs("add", f"{unique}-{n}") for n in range(20)))
    assert site.t.add.delay(f"{unique}-19", 19, 1).get(timeout=30) == 20
    time.sleep(1)
    assert [site.runs("add", f"{unique}-{n}") for n in range(20)] == [1] * 20


@ALL
def test_retry_five_times(site: Place, unique: str) -> None:
    """A task that retries itself five times ran six times, and was done once."""
    call = site.t.again.delay(unique, 5)
    assert call.get(timeout=60) == 5
    assert (site.runs("again", unique), site.runs("at-last", unique)) == (6, 1)
    assert site.t.again.delay(unique, 5).get(timeout=30) == 5
    assert site.runs("again", unique) == 6


@ALL
def test_retry_without_throw_is_not_done(site: Place, unique: str) -> None:
    """A task that called retry(throw=False) and returned is done when its retry is, not before."""
    site.t.quietly.delay(unique)
    until(lambda: site.runs("quiet-last", unique))
    assert site.t.quietly.delay(unique).get(timeout=30) == "done"
    assert (site.runs("quietly", unique), site.runs("quiet-last", unique)) == (2, 1)


@ALL
def test_autoretry_and_giving_up(site: Place, unique: str) -> None:
    """autoretry_for runs within the guard; when max_retries are used up the task fails, with its dead letter."""
    assert site.t.auto.delay(unique, 2).get(timeout=30) == "ok"
    assert site.runs("auto", unique) == 3
    with pytest.raises(ValueError, match=unique):
        site.t.gives_up.delay(unique).get(timeout=30)
    assert site.runs("gives_up", unique) == 2
    dead = site.dead("gives_up")
    assert dead is not None
    assert dead.headers["idempotent-bus-dead-reason"] == "permanent"


@PREFORK
@pytest.mark.parametrize("kind", ["task", "chain", "group", "chord"])
def test_replace(site: Place, unique: str, kind: str) -> None:
    """A task that is replaced ends with what it was replaced by; each part of that runs once."""
    assert (
        site.t.replaced.delay(unique, kind).get(timeout=30)
        == {"task": 3, "chain": 7, "group": [3, 7], "chord": 10}[kind]
    )
    assert site.runs("replaced", unique) == 1
    site.stays("add", f"{unique}-1", seconds=0.2)


@PREFORK
def test_time_limits(site: Place, unique: str) -> None:
    """A soft limit that is not caught and a hard one in mid-effect end as Celery says (FAILURE), with a dead letter.

    The next call is another attempt. With acks_on_timeout=False the message itself comes back, at once.
    """
    caught, soft = site.t.soft.delay(f"{unique}-c", True), site.t.soft.delay(f"{unique}-s", False)
    hard = site.t.hard.delay(unique)
    site.t.hard_again.delay(unique)
    assert caught.get(timeout=30) == "caught"
    with pytest.raises(SoftTimeLimitExceeded):
        soft.get(timeout=30)
    with pytest.raises(TimeLimitExceeded):
        hard.get(timeout=30)
    assert site.dead("soft") is not None
    assert site.dead("hard") is not None
    began = time.monotonic()
    assert site.t.hard.delay(unique).get(timeout=30) == "ended"
    # Not by its state: Celery's parent process may store the failure of the first run after the success of the second.
    until(lambda: site.runs("hard_again", unique) == 2, 12)
    assert time.monotonic() - began < 12, "it waited for a lease of 60 s"
    assert (site.runs("hard", unique), site.runs("hard_again", unique)) == (2, 2)


@PREFORK
def test_revoke(site: Place, unique: str) -> None:
    """Revoked before its start a task never runs; terminated in mid-effect its claim ends at once, as abandoned."""
    waiting = site.t.add.apply_async((unique, 1, 2), countdown=2)
    running = site.t.slow.delay(unique, 30)
    until(lambda: site.runs("slow", unique))
    site.app.control.revoke(waiting.id)
    site.app.control.revoke(running.id, terminate=True, signal="SIGKILL")
    with pytest.raises(TaskRevokedError):
        running.get(timeout=30)
    with pytest.raises(TaskRevokedError):
        waiting.get(timeout=30)
    assert not site.runs("add", unique)
    began = time.monotonic()
    # The same arguments: it is a copy, and whoever claims it is the first that completes.
    site.t.slow.delay(unique, 30)
    until(lambda: site.runs("slow", unique) == 2, 15, "another attempt")
    assert time.monotonic() - began < 15
    site.app.control.revoke(site.t.slow.delay(unique, 30).id)


@ALL
def test_expires(site: Place, unique: str) -> None:
    """What has expired never runs, and takes no claim: a later call does."""
    call = site.t.add.apply_async((unique, 1, 2), countdown=1, expires=0.3)
    with pytest.raises(TaskRevokedError):
        call.get(timeout=30)
    assert site.t.add.delay(unique, 1, 2).get(timeout=30) == 3
    site.stays("add", unique, seconds=0.2)


@ALL
def test_ignore_and_reject(site: Place, unique: str) -> None:
    """Ignore and Reject are neither done nor failed: the claim is given back, and Celery does what it always does."""
    site.t.ignored.delay(unique)
    until(lambda: site.runs("ignored", unique) == 1)
    site.t.ignored.delay(unique)
    until(lambda: site.runs("ignored", unique) == 2)
    assert site.t.rejected.delay(f"{unique}-back", True).get(timeout=30) == "taken"
    assert site.runs("rejected", f"{unique}-back") == 2
    with pytest.raises(Reject):
        site.t.rejected.delay(f"{unique}-gone", False).get(timeout=30)
    assert site.runs("rejected", f"{unique}-gone") == 1


@PREFORK
def test_a_child_that_dies(site: Place, unique: str) -> None:
    """I12: a child that dies in the handler leaves an abandoned claim, and the policy decides at once.

    Rerun, quarantine or probe; and not only after the lease of 60 seconds.
    """
    began = time.monotonic()
    rerun = site.t.dies.delay(unique, 1)
    site.t.dies_quarantined.delay(unique)
    undone, done = (site.t.dies_probed.delay(f"{unique}-{how}") for how in ("undone", "done"))
    assert rerun.get(timeout=30) == "lived"
    assert site.runs("dies", unique) == 2
    assert undone.get(timeout=30) == "lived"
    assert done.get(timeout=30) is None
    assert (site.runs("dies_probed", f"{unique}-undone"), site.runs("dies_probed", f"{unique}-done")) == (2, 1)
    dead = site.dead("dies_quarantined")
    assert dead is not None
    assert dead.headers["idempotent-bus-dead-reason"] == "abandoned"
    assert site.runs("dies_quarantined", unique) == 1
    assert time.monotonic() - began < 40


@PREFORK
def test_a_poison_task_ends(site: Place, unique: str) -> None:
    """I12: a task that always kills its child is run max_attempts times; then it fails, and is in the dead letter."""
    call = site.t.dies.delay(unique, 99)
    with pytest.raises(Exception, match="attempts") as caught:
        call.get(timeout=60)
    assert isinstance(caught.value, Refused)
    assert 3 <= site.runs("dies", unique) <= 4
    dead = site.dead("dies")
    assert dead is not None
    assert dead.headers["idempotent-bus-dead-reason"] == "attempts"


@ALL
def test_another_body_under_one_biz_id_is_a_conflict(site: Place, unique: str) -> None:
    """I8: the same biz-id with other arguments is no duplicate: it fails, visibly, with its dead letter."""
    assert site.t.add.delay(unique, 1, 2).get(timeout=30) == 3
    with pytest.raises(Refused, match="another body"):
        site.t.add.delay(unique, 1, 3).get(timeout=30)
    dead = site.dead("add")
    assert dead is not None
    assert dead.headers["idempotent-bus-dead-reason"] == "conflict"
    site.stays("add", unique, seconds=0.2)


@ALL
def test_an_invalid_biz_id_is_refused_where_it_is_sent_and_where_it_arrives(site: Place, unique: str) -> None:
    """A call that no worker would run is not sent; by a producer that knows nothing of this it fails in the worker."""
    for wrong in ("", True, None, "x" * 600):
        with pytest.raises(InvalidBizId):
            site.t.add.delay(wrong, 1, 2)
    with pytest.raises(TypeError, match="nonsense"):
        site.t.fails.apply_async((), {"nonsense": 1})
    plain = site.app.send_task(f"{site.name}.transient", ("",))
    with pytest.raises(Refused):
        plain.get(timeout=30)
    dead = site.dead("transient")
    assert dead is not None
    assert dead.headers["idempotent-bus-dead-reason"] == "invalid"
    assert not site.runs("transient", "")


@ALL
def test_transient_and_in_doubt_come_back(site: Place, unique: str) -> None:
    """The library's own errors are no failures: the message itself comes back, when they say."""
    first, second = site.t.transient.delay(unique), site.t.doubtful.delay(unique)
    assert (first.get(timeout=40), second.get(timeout=40)) == ("ok", "ok")
    assert (site.runs("transient", unique), site.runs("doubtful", unique)) == (2, 2)


@ALL
def test_a_failing_task_fails_as_ever(site: Place, unique: str) -> None:
    """What a task raises is Celery's to answer for; the next call is another attempt."""
    for number in (1, 2):
        with pytest.raises(ValueError, match="no"):
            site.t.fails.delay(unique).get(timeout=30)
        assert site.runs("fails", unique) == number
        assert site.dead("fails") is not None


@ALL
def test_a_result_that_is_too_large_is_not_given_to_copies(site: Place, unique: str) -> None:
    """A copy of a task whose result could not be stored fails with the reason, and the effect is not repeated."""
    assert len(site.t.big.delay(unique).get(timeout=30)) == 2000
    with pytest.raises(ResultNotStored):
        site.t.big.delay(unique).get(timeout=30)
    site.stays("big", unique, seconds=0.2)


@PREFORK
def test_plain_tasks_are_untouched(site: Place) -> None:
    """A task without a scope runs on Celery's own way: Celery's __call__, Request and strategy."""
    path = site.t.trace_path.delay().get(timeout=30)
    assert path == [True, "celery.worker.request:Request", "celery.worker.strategy:default"]
    assert site.t.double.delay(4).get(timeout=30) == 8
