"""IdempotentWorker and `idempotent-bus worker`: signals, processes that die, health; as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from kombu import Queue

from consumer_rig import Broker, broker_of, fill, make_broker, on, poll
from idempotent_bus import ConfigurationError, IdempotentWorker, idempotent_consumer
from idempotent_bus.cli import main
from idempotent_bus.worker import is_alive, write_atomically
from worker_rig import ending, is_running, scene, wait_until_begun

broker = pytest.fixture(broker_of)

EVERYWHERE = ("rabbitmq-quorum", "ours-redis", "ours-sqlite")


@on(*EVERYWHERE)
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_lets_what_runs_end_and_gives_the_rest_back(broker: Broker, processes: int, tmp_path: Path) -> None:
    """I1, I4: all that had begun is done and acked, nothing begins any more, the rest is in the queue; exit code 0."""
    ids = [str(number) for number in range(14)]
    with ending(scene(broker, tmp_path, seconds=1.5, processes=processes)) as made:
        made.publish(ids)
        process = made.start()
        wait_until_begun(made, 2 * processes)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0, made.errors
        done = made.log("done")
        assert Counter(made.log("begun")) == Counter(done)
        assert 2 * processes <= len(done) < len(ids)
        assert len({pid for _, pid in done}) == processes
        assert sorted([*(biz_id for biz_id, _ in done), *made.left(len(ids))]) == sorted(ids)
        assert "Traceback" not in made.errors
        assert made.health()["state"] == "stopped"


@on("rabbitmq-quorum")
def test_ctrl_c_reaches_all_and_counts_once(broker: Broker, tmp_path: Path) -> None:
    """A terminal sends SIGINT to supervisor and processes alike: still a graceful end."""
    with ending(scene(broker, tmp_path, seconds=1.0, processes=2)) as made:
        made.publish([str(number) for number in range(10)])
        process = made.start()
        wait_until_begun(made, 4)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(15) == 0, made.errors
        assert Counter(made.log("begun")) == Counter(made.log("done"))


@on("rabbitmq-quorum")
def test_a_whole_group_that_gets_sigterm_ends_gracefully(broker: Broker, tmp_path: Path) -> None:
    """As systemd does it: the processes get the signal twice, directly and from the supervisor."""
    with ending(scene(broker, tmp_path, seconds=1.0, processes=2)) as made:
        made.publish([str(number) for number in range(10)])
        process = made.start()
        wait_until_begun(made, 4)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(15) == 0, made.errors
        assert Counter(made.log("begun")) == Counter(made.log("done"))


@on("rabbitmq-quorum")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_signal_ends_at_once(broker: Broker, processes: int, tmp_path: Path) -> None:
    """I1: handlers that would take a minute are cut off; their messages are the broker's again."""
    with ending(scene(broker, tmp_path, seconds=60, processes=processes, stop_timeout=60.0)) as made:
        made.publish(["a", "b"])
        process = made.start()
        wait_until_begun(made, 2)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == (143 if processes == 1 else 1), made.errors
        assert sorted(made.left(2)) == ["a", "b"]


@on("rabbitmq-quorum", "ours-sqlite")
@pytest.mark.parametrize("processes", [1, 2])
def test_what_outlives_the_stop_timeout_is_cut_off(broker: Broker, processes: int, tmp_path: Path) -> None:
    """I1: exit code 1 shortly after the stop_timeout, and the message is the broker's again."""
    with ending(scene(broker, tmp_path, seconds=60, processes=processes, stop_timeout=0.5)) as made:
        made.publish(["a"])
        process = made.start()
        wait_until_begun(made, 1)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 1, made.errors
        assert time.monotonic() - started > 0.5
        assert made.left(1) == ["a"]


@on(*EVERYWHERE)
def test_a_process_that_is_killed_is_started_again_and_its_message_runs_again(broker: Broker, tmp_path: Path) -> None:
    """I1: SIGKILL in the middle of a handler; another process runs the message when its lease is over."""
    with ending(scene(broker, tmp_path, seconds=1.0, processes=2)) as made:
        made.publish(["a"])
        process = made.start()
        wait_until_begun(made, 1)
        ((_, victim),) = made.log("begun")
        os.kill(victim, signal.SIGKILL)
        assert poll(lambda: len(made.log("done")) == 1, timeout=20), made.errors
        assert poll(lambda: made.health()["restarts"] == 1)
        assert poll(lambda: sum(one.get("connected", False) for one in made.health()["processes"]) == 2)
        assert victim not in {one["pid"] for one in made.health()["processes"]}
        assert not made.errors.count("Traceback")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert [biz_id for biz_id, _ in made.log("begun")] == ["a", "a"]
        assert made.left(1) == []


@on("rabbitmq-quorum")
def test_processes_do_not_outlive_their_supervisor(broker: Broker, tmp_path: Path) -> None:
    """The supervisor is killed: the processes end what they are doing, and go."""
    with ending(scene(broker, tmp_path, seconds=0.5, processes=2)) as made:
        made.publish([str(number) for number in range(4)])
        process = made.start()
        wait_until_begun(made, 4)
        pids = {pid for _, pid in made.log("begun")}
        process.kill()
        assert poll(lambda: not any(is_running(pid) for pid in pids)), made.errors
        assert Counter(made.log("begun")) == Counter(made.log("done"))


@on("ours-redis")
@pytest.mark.parametrize("processes", [1, 2])
def test_wrong_settings_end_the_worker_with_their_sentence(broker: Broker, processes: int, tmp_path: Path) -> None:
    """I11: not a circle of restarts: exit code 2, and what is wrong on the screen."""
    broker.options["visibility_timeout"] = 900
    with ending(scene(broker, tmp_path, seconds=0, processes=processes)) as made:
        made.settings["policy"] = {"retention": 600.0}
        assert made.start().wait(20) == 2
        assert "visibility_timeout" in made.errors.splitlines()[-1] + made.errors
        assert "starting another" not in made.errors


@on("rabbitmq-quorum")
def test_health_tells_what_it_does(broker: Broker, tmp_path: Path) -> None:
    """The file is written about every second while the loop turns, with the counts; `--processes` overrides."""
    with ending(scene(broker, tmp_path, seconds=3.0)) as made:
        process = made.start("--processes", "2", "--threads", "1")
        assert poll(lambda: [one["connected"] for one in made.health().get("processes", [])] == [True, True])
        times = set()
        for _ in range(30):
            times.add(made.health_file.stat().st_mtime_ns)
            time.sleep(0.1)
        assert len(times) >= 3
        made.publish(["a", "b", "c"])
        assert poll(lambda: sum(one.get("in_flight", 0) for one in made.health()["processes"]) == 2)
        assert poll(lambda: max(one["oldest_running"] for one in made.health()["processes"]) > 1)
        assert poll(lambda: sum(one["endings"].get("completed", 0) for one in made.health()["processes"]) == 3)
        health = made.health()
        assert health["pid"] == process.pid
        assert {one["state"] for one in health["processes"]} == {"running"}
        assert all(one["store"] == {"ok": True, "unavailable_since": None} for one in health["processes"])
        assert all(abs(one["last_loop"] - time.time()) < 5 for one in health["processes"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert not list(made.folder.glob(".health*")), "a half-written file is left"


def test_a_worker_in_a_thread_and_again(unique: str, tmp_path: Path) -> None:
    """Embedded, without signals: `run` returns after `stop`, and may be called again; signal handlers are as before."""
    made = make_broker("ours-sqlite", unique, tmp_path)
    queue, ran = made.queue(), []
    handle = idempotent_consumer("memory://", scope=unique, biz_id="id")(lambda body, message: ran.append(body["id"]))
    worker = IdempotentWorker(made.connect(), {queue: handle}, threads=2)
    before = signal.getsignal(signal.SIGTERM)
    for expected in (["a"], ["a", "b"]):
        fill(made, queue, [expected[-1]])
        thread = threading.Thread(target=worker.run)
        thread.start()
        assert poll(lambda: ran == expected)  # noqa: B023 - called at once
        assert poll(lambda: worker.health()["processes"][0]["in_flight"] == 0)
        assert worker.health()["state"] == "running"
        with pytest.raises(ConfigurationError, match="runs already"):
            worker.run()
        worker.stop()
        thread.join(10)
        assert not thread.is_alive()
        assert worker.health()["state"] == "stopped"
    assert signal.getsignal(signal.SIGTERM) is before


def test_stop_before_run(unique: str) -> None:
    """A worker that was stopped before it ran returns at once, once."""
    handle = idempotent_consumer("memory://", scope=unique, biz_id="id")(lambda body, message: None)
    for processes in (1, 2):
        worker = IdempotentWorker("memory://", {Queue(unique): handle}, processes=processes)
        worker.stop()
        assert worker.run() is True


@pytest.mark.parametrize(
    "options",
    [{"threads": -1}, {"threads": "8"}, {"processes": 0}, {"processes": 1.5}, {"stop_timeout": float("inf")},
     {"stop_timeout": -1}, {"prefetch": 0}],
    ids=["threads", "text", "no-process", "half", "for-ever", "negative", "prefetch"],
)  # fmt: skip
def test_wrong_settings_are_refused_at_once(options: dict[str, Any], unique: str) -> None:
    """ConfigurationError when the worker is made, before anything is forked."""
    handle = idempotent_consumer("memory://", scope=unique, biz_id="id")(lambda body, message: None)
    with pytest.raises(ConfigurationError):
        IdempotentWorker("memory://", {Queue(unique): handle}, **options)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("worker_app", "write it as module:worker"), (":worker", "write it as"), ("no_such.module:worker", "no module"),
        ("worker_app:nothing", "has no 'nothing'"), ("worker_app:VARIABLE", "of type str"),
        ("os:getcwd", "of type str"),
    ],
    ids=["no-colon", "no-module", "unknown-module", "unknown-name", "a-text", "another-function"],
)  # fmt: skip
def test_a_wrong_path_is_said_clearly(where: str, says: str) -> None:
    """Exit code 2 and one sentence, no traceback."""
    result = CliRunner().invoke(main, ["worker", where])
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", "").split())


def test_a_loop_that_stands_still_is_not_alive() -> None:
    """A liveness probe looks at the file's time: it is not renewed for a loop that stopped turning for no reason."""
    now = time.time()
    turning = {"last_loop": now, "oldest_running": 0.0}
    for process, alive in (
        (turning, True),
        ({"last_loop": None, "oldest_running": 0.0}, True),
        ({"pid": None, "state": "dead"}, True),
        ({"last_loop": now - 60, "oldest_running": 59.0}, True),
        ({"last_loop": now - 60, "oldest_running": 0.0}, False),
        ({"last_loop": now, "oldest_running": 9.0, "reported": now - 60}, False),
    ):
        assert is_alive({"processes": [turning, process]}) is alive, process


def test_the_health_file_is_replaced_in_one_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A reader never sees half of it; a folder that is not there is logged, and does not end the worker."""
    path, stop = tmp_path / "health", threading.Event()
    write_atomically(path, {"number": 0})

    def write() -> None:
        for number in range(500):
            write_atomically(path, {"number": number, "filling": "x" * 2000})
        stop.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not stop.is_set():
        json.loads(path.read_text())
    thread.join()
    write_atomically(tmp_path / "no" / "health", {})
    assert "cannot write the health file" in caplog.text
