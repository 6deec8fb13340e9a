"""Worker processes killed in the middle of their handlers: nothing lost, and in a transaction nothing twice."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa

import servers
from consumer_rig import make_broker, poll
from worker_rig import Scene, ending, is_running, scene

MESSAGES = 500
KILLS = 10


def kill_in_the_middle(made: Scene, number: int) -> int:
    """SIGKILL so many processes, each in the middle of a handler; how many handlers that met."""
    torn, victims, deadline = 0, set(), time.monotonic() + 60
    while len(victims) < number:
        assert time.monotonic() < deadline, "no handler is left to be met"
        open_now: dict[int, int] = {}
        done = Counter(made.log("done"))
        for entry in made.log("begun"):
            if done[entry]:
                done[entry] -= 1
            elif is_running(entry[1]):
                open_now[entry[1]] = open_now.get(entry[1], 0) + 1
        if not open_now:
            time.sleep(0.02)
            continue
        pid = max(open_now, key=lambda one: open_now[one])
        os.kill(pid, signal.SIGKILL)
        victims.add(pid)
        torn += open_now[pid]
        time.sleep(0.5)
    return torn


@pytest.mark.slow  # ten processes have to be started again, with a pause that grows
@pytest.mark.parametrize("name", ["rabbitmq-quorum", "ours-redis"])
def test_killed_processes_lose_nothing_and_double_nothing(name: str, unique: str, tmp_path: Path) -> None:
    """I1, I2, I3: 500 messages, 2 processes of 4 threads, 10 SIGKILLs: 500 rows in a table that would take doubles."""
    engine = sa.create_engine(servers.postgresql())
    with engine.begin() as connection:
        connection.execute(sa.text(f"CREATE TABLE {unique}_cards (card varchar(50))"))
    made = scene(make_broker(name, unique, tmp_path), tmp_path, seconds=0.1, mode="inbox", processes=2, threads=4)
    made.settings["database"] = servers.postgresql()
    ids = [f"card{number}" for number in range(MESSAGES)]

    def cards() -> Counter[str]:
        with engine.connect() as connection:
            return Counter(connection.execute(sa.text(f"SELECT card FROM {unique}_cards")).scalars())

    try:
        with ending(made):
            made.publish(ids)
            process = made.start()
            torn = kill_in_the_middle(made, KILLS)
            assert poll(lambda: cards().total() >= MESSAGES, timeout=60), (cards().total(), made.errors[-2000:])
            time.sleep(3)  # longer than the visibility timeout: what was not acked comes back
            assert poll(lambda: not sum(one.get("in_flight", 1) for one in made.health()["processes"]))
            assert made.health()["restarts"] == KILLS
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            assert made.left(1) == []
        assert torn >= KILLS, "the kills did not meet any handler: the test proves nothing"
        assert len(made.log("begun")) > MESSAGES, "nothing was run again: the test proves nothing"
        assert cards() == Counter(ids)
    finally:
        with engine.begin() as connection:
            for table in (f"{unique}_cards", f"{unique}_inbox"):
                connection.execute(sa.text(f"DROP TABLE IF EXISTS {table}"))
        engine.dispose()


def test_the_control_acks_before_completion_lose(unique: str, tmp_path: Path) -> None:
    """The control: the same worker, acking as a message arrives, loses what was on hand at each kill."""
    made = scene(make_broker("rabbitmq-quorum", unique, tmp_path), tmp_path, seconds=0.1, mode="early", processes=2)
    ids = [f"card{number}" for number in range(100)]
    with ending(made):
        made.publish(ids)
        process = made.start()
        kill_in_the_middle(made, 1)  # it has taken half of the messages by then, and acked them
        assert poll(lambda: made.broker.is_empty(made.settings["queue"]), timeout=30)
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        assert len({biz_id for biz_id, _ in made.log("done")}) < len(ids), "nothing was lost: the test above is blind"
