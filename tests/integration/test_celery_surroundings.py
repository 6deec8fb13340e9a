"""The pools and result backends that a guarded task may meet; taking the library out again; beat."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import celery_tasks
import pytest
from celery import chain, chord
from celery.beat import PersistentScheduler
from celery_rig import HERE, Place, place, until

from idempotent_bus.celery.setup import _name_beats_messages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_green_pools(pool: str, unique: str, tmp_path: Path) -> None:
    """I2/I12: greenlets: copies at once have one effect, a busy copy waits, a neighbour passes, a retry is one."""
    pytest.importorskip(pool)
    with place("ours-redis", tmp_path) as made:
        made.start(pool, 4)
        slow = [made.t.slow.delay(unique, 3) for _ in range(3)]
        until(lambda: made.runs("slow", unique))
        calls = [made.t.add.delay(unique, 1, 2) for _ in range(10)]
        assert [one.get(timeout=30) for one in calls] == [3] * 10
        assert not made.runs("slept", unique), "the neighbours waited"
        assert made.t.again.delay(unique, 2).get(timeout=30) == 2
        assert [one.get(timeout=40) for one in slow] == [unique] * 3
        assert (made.runs("slow", unique), made.runs("add", unique), made.runs("at-last", unique)) == (1, 1, 1)


@pytest.mark.parametrize("backend", ["database", "rpc", "none"])
def test_result_backends(backend: str, unique: str, tmp_path: Path) -> None:
    """I8: whatever keeps Celery's results, a copy has the first one's, and chains and chords go on."""
    urls = {"database": f"db+sqlite:///{tmp_path}/results.db", "rpc": "rpc://", "none": None}
    with place("rabbitmq" if backend == "rpc" else "ours-redis", tmp_path, backend=urls[backend]) as made:
        made.start("threads", 4)
        t = made.t
        if backend != "none":
            first = t.add.delay(unique, 1, 2)
            assert first.get(timeout=30) == 3
            assert t.add.delay(unique, 1, 2).get(timeout=30) == 3
        else:
            for _ in range(2):
                t.add.delay(unique, 1, 2)
        chain(t.add.si(unique, 1, 2), t.told.si(pid=f"{unique}-chain")).delay()
        until(lambda: made.runs("told", f"{unique}-chain"))
        if backend == "database":
            done = chord([t.add.si(unique, 1, 2), t.add.si(f"{unique}-2", 2, 2)], t.total.s(pid=unique)).delay()
            assert done.get(timeout=40) == 7
        made.stays("add", unique, seconds=0.3)


def test_the_library_can_be_taken_out_again(unique: str, tmp_path: Path) -> None:
    """I1: what was queued with it is done by a worker that knows nothing of it, and the other way round."""
    with place("ours-redis", tmp_path / "a") as guarded:
        for n in range(5):
            guarded.t.add.delay(f"{unique}-{n}", n, 1)
        chain(guarded.t.add.si(f"{unique}-c", 1, 1), guarded.t.told.si(pid=f"{unique}-told")).delay()
        options = {"options": guarded.settings["options"]}
        with place("redis", tmp_path / "b", guarded=False, **options) as plain:
            rename(plain, guarded)
            worker = plain.start("threads", 2)
            until(lambda: all(plain.runs("add", f"{unique}-{n}") for n in range(5)))
            until(lambda: plain.runs("told", f"{unique}-told"))
            plain.stop(worker, signal.SIGTERM)
            plain.t.add.delay(f"{unique}-back", 1, 1)
            guarded.start("threads", 2)
            guarded.stays("add", f"{unique}-back", seconds=0.3)


def rename(plain: Place, guarded: Place) -> None:
    """Let one application have the queue and the task names of another."""
    plain.app.close()
    plain.name = plain.settings["name"] = guarded.name
    plain.app = celery_tasks.make(plain.settings)
    plain.t = plain.app.t


def test_a_beat_that_died_before_it_noted_the_run(unique: str, tmp_path: Path) -> None:
    """An entry that is sent again, by a beat with yesterday's schedule file, lands once; two runs of it land twice."""
    with place("ours-redis", tmp_path) as made:
        made.app.conf.beat_schedule = {
            "nightly": {"task": f"{made.name}.plain_note", "schedule": 3600.0, "args": (unique,)}
        }

        def beat(path: Path) -> None:
            """Send the entry, as a beat does whose time has come."""
            scheduler = PersistentScheduler(app=made.app, schedule_filename=str(path), lazy=False)
            _name_beats_messages(type("Beat", (), {"scheduler": scheduler})())
            entry = scheduler.schedule["nightly"]
            scheduler.reserve(entry)
            scheduler.apply_entry(entry, producer=scheduler.producer)
            scheduler.close()

        before, file = tmp_path / "before", tmp_path / "schedule"
        beat(file)
        before.mkdir()
        for name in tmp_path.glob("schedule*"):
            shutil.copy(name, before / name.name)
        beat(file)
        made.start("threads", 2)
        made.stays("plain_note", unique, 2, seconds=0.3)  # two runs
        beat(before / "schedule")
        made.stays("plain_note", unique, 2, seconds=1)  # the second again


def test_setup_says_what_it_has_set(tmp_path: Path) -> None:
    """A person sees it in the worker's log."""
    with place("ours-redis", tmp_path) as made:
        said = str(made.app.said)
        assert "broker_url uses the transport idempotent-redis" in said
        assert "acks_late" in said


def test_two_apps_in_one_process(unique: str, tmp_path: Path) -> None:
    """Setting up one application changes nothing in another."""
    with place("ours-redis", tmp_path / "a") as one, place("redis", tmp_path / "b", guarded=False) as other:
        assert one.app.conf.broker_url != other.app.conf.broker_url
        assert type(other.app.amqp).__name__ == "AMQP"


def test_a_worker_with_wrong_options_does_not_start(tmp_path: Path) -> None:
    """ConfigurationError, in words, before any message is taken."""
    with place("ours-redis", tmp_path) as made:
        settings: dict[str, Any] = {**made.settings, "setup": {"max_attempts": 0}}
        done = subprocess.run(
            [sys.executable, "-m", "celery", "-A", "celery_tasks", "worker", "-P", "solo"],
            cwd=HERE,
            env={**os.environ, celery_tasks.VARIABLE: json.dumps(settings)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode
        assert "max_attempts must be" in done.stderr
