"""Kills and cuts over `celery_app.py`, and what was left of its work: for test_celery_kills.py and run_celery.py."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
import sqlalchemy as sa
from kombu.exceptions import OperationalError

import servers
from idempotent_bus import PublishError, delays, schema
from proxy import Proxy, through

HERE = Path(__file__).parent
#: The calls of one unit: a charge, a chain of two, a chord of three and its body, and one that is retried.
CALLS = 8
#: What each kind of task must have had once for each unit.
INSIDE, OUTSIDE = {"charge": 2, "part": 3, "flaky": 1}, ("card", "bill")
LEASE = 4.0
#: Nothing has happened for so long: what is not done now never will be. Lease, visibility, backoffs and a start.
QUIET = 120.0


@dataclass
class Outcome:
    """What was found once all was quiet."""

    calls: int
    seconds: float
    kills: Counter[str] = field(default_factory=Counter)
    cuts: int = 0
    inside_missing: int = 0
    inside_doubled: int = 0
    outside_missing: int = 0
    outside_doubled: int = 0
    #: Executions with an effect outside that did not reach their end, and how many of those had their process killed.
    cut_off: int = 0
    cut_off_by_kills: int = 0
    #: Biz-ids with more effects than one for each such execution and one.
    unexplained: int = 0
    ticks: int = 0
    states: Counter[str] = field(default_factory=Counter)
    #: What was not there, by task and biz-id.
    missing: list[str] = field(default_factory=list)
    #: What the sender met, and sent again.
    send_errors: Counter[str] = field(default_factory=Counter)

    @property
    def is_right(self) -> bool:
        """With the inbox once each; with the store none missing, and each double explained by a death."""
        wrong = (self.inside_missing, self.inside_doubled, self.outside_missing, self.unexplained)
        return not any(wrong) and self.cut_off == self.cut_off_by_kills and set(self.states) == {"SUCCESS"}

    @property
    def is_damaged(self) -> bool:
        """Something is missing, twice, or stuck."""
        wrong = (self.inside_missing, self.inside_doubled, self.outside_missing, self.outside_doubled)
        return any(wrong) or set(self.states) != {"SUCCESS"}


class Storm:
    """One application, its workers and its beat, under fire."""

    def __init__(
        self, broker: str, pool: str, folder: Path, *, guarded: bool, units: int, workers: int = 2, work: float = 0.004,
        say: Callable[[str], None] = lambda _: None, seed: int = 1,
    ) -> None:  # fmt: skip
        self.name = f"cc{uuid.uuid4().hex[:10]}"
        self.pool, self.units, self.folder, self.guarded = pool, units, folder, guarded
        self.is_amqp, self.say, self.random = broker == "rabbitmq", say, random.Random(seed)
        url = servers.rabbitmq() if self.is_amqp else servers.real_redis()
        self.proxy = Proxy(url=url)
        self.concurrency = 4 if pool == "threads" else 2
        options = {} if self.is_amqp else {"global_keyprefix": f"{self.name}:", "visibility_timeout": 6}
        self.settings = {
            "name": self.name, "guarded": guarded, "broker": through(self.proxy, url), "backend": servers.real_redis(),
            "database": servers.postgresql(), "options": options, "lease": LEASE, "work": work,
            "schedule": str(folder / "schedule"), "threads": self.concurrency,
        }  # fmt: skip
        self.environment = {**os.environ, "CELERY_CHAOS": json.dumps(self.settings)}
        self.engine = sa.create_engine(servers.postgresql())
        with self.engine.begin() as connection:
            connection.execute(sa.text(f"CREATE TABLE {self.name}_effects (task text, pid text)"))
        self.tables = schema.metadata(f"{self.name}_", None, parts=("inbox",))
        self.tables.create_all(self.engine)
        self.client = redis.Redis.from_url(servers.real_redis())
        self.outcome = Outcome(units * CALLS, 0.0)
        self.killed: set[int] = set()
        self.ids: list[str] = []
        self.workers = [self._worker() for _ in range(workers)]
        self.beat = self._start("beat", "-l", "ERROR", "--pidfile", "")

    # --- processes ------------------------------------------------------------------------------------

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "celery_app", *arguments],
                cwd=HERE, env=self.environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _worker(self) -> subprocess.Popen[bytes]:
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "WARNING")
        node = f"{uuid.uuid4().hex[:8]}@{self.name}"
        return self._start("worker", "-P", self.pool, "-c", str(self.concurrency), "-n", node, *quiet)

    def kill(self) -> None:
        """A child, a parent alone (whose children live on for a moment), or both at once."""
        at = self.random.randrange(len(self.workers))
        worker = self.workers[at]
        children = _children(worker.pid)
        kind = self.random.choice(["child", "child", "parent", "all"]) if self.pool == "prefork" else "parent"
        if kind == "child" and children:
            self._end(self.random.choice(children))
        else:
            victims = [worker.pid, *children] if kind == "all" else [worker.pid]
            for pid in victims:
                self._end(pid)
            worker.wait()
            self.workers[at] = self._worker()
        self.outcome.kills[kind] += 1

    def kill_beat(self) -> None:
        self._end(self.beat.pid)
        self.beat.wait()
        self.beat = self._start("beat", "-l", "ERROR", "--pidfile", "")
        self.outcome.kills["beat"] += 1

    def _end(self, pid: int) -> None:
        self.killed.add(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    # --- the work -------------------------------------------------------------------------------------

    def send(self) -> None:
        """Call everything, in this process; what could not be sent for sure is called again."""
        os.environ["CELERY_CHAOS"] = json.dumps(self.settings)
        sys.modules.pop("celery_app", None)
        chaos = importlib.import_module("celery_app")
        from celery import chain, chord

        def call(make: Callable[[], Any]) -> Any:
            while True:
                try:
                    return make()
                except (OperationalError, PublishError, OSError) as error:
                    self.outcome.send_errors[type(error).__name__] += 1
                    time.sleep(0.2)

        for n in range(self.units):
            self.ids.append(call(lambda n=n: chaos.charge.delay(f"{n}")).id)
            made = call(lambda n=n: chain(chaos.charge.s(f"c{n}"), chaos.card.s()).delay())
            self.ids += [made.id, made.parent.id]
            parts = [chaos.part.s(f"{n}-{at}", at) for at in range(3)]
            made = call(lambda n=n, parts=parts: chord(parts, chaos.bill.s(f"{n}")).delay())
            self.ids += [made.id, *(one.id for one in made.parent.results)]
            self.ids.append(call(lambda n=n: chaos.flaky.delay(f"{n}")).id)
        chaos.engine.dispose()
        chaos.app.close()

    def states(self) -> Counter[str]:
        """The states of all calls that were sent so far."""
        found: Counter[str] = Counter()
        ids = list(self.ids)
        for start in range(0, len(ids), 1000):
            metas = self.client.mget([f"{self.name}:celery-task-meta-{one}" for one in ids[start : start + 1000]])
            found.update("PENDING" if meta is None else json.loads(meta)["status"] for meta in metas)
        return found

    def run(self, kills: int, cuts: int, beat_kills: int = 2, quiet: float = QUIET) -> Outcome:
        """All of it; returns when all is done, or when nothing has happened for `quiet` seconds."""
        began = changed = time.monotonic()
        until_sent = threading.Thread(target=self.send)
        until_sent.start()
        plan = [self.kill] * kills + [self._cut] * cuts + [self.kill_beat] * beat_kills
        self.random.shuffle(plan)
        total, before, done, counted = self.units * CALLS, -1, 0, 0.0
        for_each = total // (len(plan) + 2)
        while time.monotonic() - changed < quiet:
            if time.monotonic() - counted > (0.3 if plan else 1.0):
                counted = time.monotonic()
                done = self.states()["SUCCESS"]
            if done != before:
                before, changed = done, time.monotonic()
            if plan and done >= total - len(plan) * for_each - for_each:
                plan.pop()()
                if len(plan) % 10 == 0:
                    self.say(f"{done} of {total} done, {dict(self.outcome.kills)}, {self.outcome.cuts} cuts")
                time.sleep(0.2)
            if done == total and not plan:
                break
            time.sleep(0.02)
        until_sent.join(60)
        self.outcome.seconds = time.monotonic() - began
        self.say(f"{done} of {total} done after {self.outcome.seconds:.0f} s: waiting for what is late")
        self._end(self.beat.pid)
        self.beat.wait()
        self._settle()
        return self._count()

    def _cut(self) -> None:
        self.proxy.cut()
        self.outcome.cuts += 1

    def _settle(self) -> None:
        """Wait until no more copies are on their way, so that a late double is seen."""
        deadline, last, since = time.monotonic() + 60, -1, time.monotonic()
        while time.monotonic() < deadline and time.monotonic() - since < 2 * LEASE + 4:
            now = self.client.llen(f"{self.name}:history") + self._rows()
            if now != last:
                last, since = now, time.monotonic()
            time.sleep(0.2)

    def _rows(self) -> int:
        with self.engine.connect() as connection:
            return int(connection.execute(sa.text(f"SELECT count(*) FROM {self.name}_effects")).scalar_one())

    # --- the verdict ----------------------------------------------------------------------------------

    def _count(self) -> Outcome:
        made = self.outcome
        made.states = self.states()
        with self.engine.connect() as connection:
            rows = connection.execute(sa.text(f"SELECT task, count(*) FROM {self.name}_effects GROUP BY task, pid"))
            counts = [tuple(row) for row in rows]
        made.inside_doubled = sum(number - 1 for _, number in counts)
        made.inside_missing = sum(INSIDE.values()) * self.units - len(counts)
        effects: dict[tuple[str, str], list[tuple[str, str, int]]] = defaultdict(list)
        ended: set[tuple[str, str]] = set()
        last: dict[int, int] = {}
        where: dict[tuple[str, str], int] = {}
        for at, line in enumerate(self.client.lrange(f"{self.name}:history", 0, -1)):
            words = line.decode().split()
            last[int(words[-1])] = at
            if words[0] == "effect":
                effects[words[1], words[2]].append((words[3], words[4], int(words[5])))
                where[words[3], words[4]] = at
            else:
                ended.add((words[1], words[2]))
        made.ticks = sum(len(all_) for (task, _), all_ in effects.items() if task == "tick")
        ours = {one: all_ for one, all_ in effects.items() if self.guarded or one[0] != "tick"}
        made.outside_doubled = sum(len(all_) - 1 for all_ in ours.values())
        wanted = [("card", f"c{n}") for n in range(self.units)] + [("bill", f"{n}") for n in range(self.units)]
        made.missing = [" ".join(one) for one in wanted if one not in effects]
        made.outside_missing = len(made.missing)
        if self.guarded:
            for all_ in effects.values():
                # A killed child is in our list; one that Celery has ended, because its connection was lost, did nothing
                # after that effect.
                open_ = [(record, token, pid) for record, token, pid in all_ if (record, token) not in ended]
                made.cut_off += len(open_)
                made.cut_off_by_kills += sum(
                    pid in self.killed or last[pid] == where[record, token] for record, token, pid in open_
                )
                made.unexplained += len(all_) > len(open_) + 1
        return made

    def close(self) -> None:
        for process in (*self.workers, self.beat):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.tables.drop_all(self.engine)
        with self.engine.begin() as connection:
            connection.execute(sa.text(f"DROP TABLE {self.name}_effects"))
        self.engine.dispose()
        if self.is_amqp:
            from kombu import Connection

            with Connection(servers.RABBITMQ) as connection:
                channel = connection.channel()
                names = [self.name, *(f"{self.name}.{task}.dead" for task in (*INSIDE, *OUTSIDE, "tick"))]
                for name in names:
                    channel.queue_delete(name)
                    channel.queue_delete(delays.return_queue(name).name)
                channel.exchange_delete(self.name)
        for key in self.client.scan_iter(f"*{self.name}*", count=5000):
            self.client.delete(key)
        self.client.close()
        self.proxy.close()


@contextlib.contextmanager
def storm(*arguments: Any, **options: Any) -> Iterator[Storm]:
    """A storm whose processes, tables, keys and queues are gone afterwards."""
    made = Storm(*arguments, **options)
    try:
        yield made
    finally:
        made.close()


def _children(parent: int) -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except OSError:
        return []
