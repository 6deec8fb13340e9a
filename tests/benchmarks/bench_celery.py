"""What a guarded Celery task costs: running it and sending it, beside plain Celery, celery-once and celery-singleton.

    python tests/benchmarks/bench_celery.py [--rounds 5] [--tasks 1500] [--sends 1000] [--peers FOLDER]

**Running.** Every way has a worker and a queue of its own: the solo pool, a task that does nothing, acks late, no
results, Celery's own settings otherwise. A first task holds the worker until its queue is full; the worker itself then
measures from the 100th task to the last. Every round measures all ways one after the other, in another order.

**Sending.** `apply_async` of the same task from one process, in pieces of a hundred; the ways take turns, each piece in
another order, and nobody's piece begins before the broker has stored what came before.

A ratio is to the same round's baseline: plain Celery on the same broker, which on Redis is kombu's `redis://`. Before
anything counts, the queues must be empty (running) or hold every message (sending), and the store must hold one record
for every guarded task. Ends with 1 if the median ratio of a way is below its floor.

celery-once and celery-singleton are measured if they can be imported; in a folder of their own they disturb nothing:

    pip install --no-deps --target FOLDER celery-once celery-singleton
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from celery import Celery, Task
from kombu import Connection
from redis import Redis

import servers
from idempotent_bus.celery import IdempotentTask, setup
from idempotent_bus.stores.redis import open_redis

WARM: Final = 100
PIECE: Final = 100
RATE: Final = "tasks a second:"
BROKERS: Final = {"redis": servers.REDIS, "rabbitmq": servers.RABBITMQ}


@dataclass(frozen=True, slots=True)
class Way:
    """kind: plain, guarded, once or singleton. baseline: the way that its ratio is to. floor: of that ratio; 0: none.

    confirms: of `setup`. confirm_publish: kombu's own. package: what must be installed.
    """

    title: str
    broker: str
    kind: str
    baseline: str = ""
    floor: float = 0.0
    confirms: bool = True
    confirm_publish: bool = False

    @property
    def package(self) -> str:
        return {"once": "celery_once", "singleton": "celery_singleton"}.get(self.kind, "")

    @property
    def installed(self) -> bool:
        return not self.package or importlib.util.find_spec(self.package) is not None


RUNNING: Final = (
    Way("plain, Redis", "redis", "plain"),
    Way("guarded, idempotent-redis", "redis", "guarded", "plain, Redis", 1.0),
    Way("celery-once, Redis", "redis", "once", "plain, Redis"),
    Way("celery-singleton, Redis", "redis", "singleton", "plain, Redis"),
    Way("plain, RabbitMQ", "rabbitmq", "plain"),
    Way("guarded, RabbitMQ", "rabbitmq", "guarded", "plain, RabbitMQ", 0.5),
    Way("celery-once, RabbitMQ", "rabbitmq", "once", "plain, RabbitMQ"),
    Way("celery-singleton, RabbitMQ", "rabbitmq", "singleton", "plain, RabbitMQ"),
)
SENDING: Final = (
    Way("plain, Redis", "redis", "plain"),
    Way("guarded, idempotent-redis", "redis", "guarded", "plain, Redis", 0.9),
    Way("celery-once, Redis", "redis", "once", "plain, Redis"),
    Way("celery-singleton, Redis", "redis", "singleton", "plain, Redis"),
    Way("plain, RabbitMQ", "rabbitmq", "plain"),
    Way("guarded, RabbitMQ, confirms=False", "rabbitmq", "guarded", "plain, RabbitMQ", 0.9, confirms=False),
    Way("guarded, RabbitMQ", "rabbitmq", "guarded", "plain, RabbitMQ"),
    Way("celery-once, RabbitMQ", "rabbitmq", "once", "plain, RabbitMQ"),
    Way("celery-singleton, RabbitMQ", "rabbitmq", "singleton", "plain, RabbitMQ"),
    Way("plain, RabbitMQ, confirm_publish", "rabbitmq", "plain", confirm_publish=True),
    Way("guarded, RabbitMQ (confirmed)", "rabbitmq", "guarded", "plain, RabbitMQ, confirm_publish", 0.9),
)


class Counter:
    """Tells the parent the rate of the tasks from the 100th to the last."""

    def __init__(self, total: int) -> None:
        self.left, self.total, self.began = total, total, 0.0

    def again(self) -> None:
        self.left = self.total

    def __call__(self) -> None:
        self.left -= 1
        if self.left == self.total - WARM:
            self.began = time.perf_counter()
        elif not self.left:
            rate = (self.total - WARM) / (time.perf_counter() - self.began)
            print(RATE, rate, file=sys.__stdout__, flush=True)  # Celery has taken sys.stdout for its log


def application(way: Way, name: str, tasks: int = 0) -> tuple[Celery, Any]:
    """An app and its one task. name: of its queue, and of what it keeps in Redis."""
    app = Celery(name, broker=BROKERS[way.broker], set_as_current=False)
    app.conf.update(
        task_default_queue=name,
        task_ignore_result=True,
        task_acks_late=True,
        broker_connection_retry_on_startup=True,
        broker_transport_options={"confirm_publish": True} if way.confirm_publish else {},
        ONCE={"backend": "celery_once.backends.Redis", "settings": {"url": servers.REDIS, "default_timeout": 3600}},
        singleton_backend_url=servers.REDIS,
        singleton_key_prefix=f"{name}:lock:",
    )
    base: type[Any] = Task
    options: dict[str, Any] = {}
    if way.kind == "guarded":
        setup(app, store=lambda: open_redis(servers.REDIS, prefix=f"{name}:store:"), confirms=way.confirms)
        base, options = IdempotentTask, {"scope": name, "biz_id": "payment_id"}
    elif way.kind == "once":
        from celery_once import QueueOnce

        base = QueueOnce
    elif way.kind == "singleton":
        from celery_singleton import Singleton

        base = Singleton
    count = Counter(tasks)

    @app.task(base=base, name=f"{name}.nothing", **options)
    def nothing(payment_id: str) -> None:
        count()

    @app.task(name=f"{name}.hold")
    def hold(path: str) -> None:
        while not os.path.exists(path):
            time.sleep(0.005)
        count.again()

    return app, nothing


def work(way: Way, name: str, tasks: int) -> None:
    """The worker's process."""
    app, _ = application(way, name, tasks)
    quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "ERROR")
    app.worker_main(["worker", "-P", "solo", "-n", f"{name}@localhost", *quiet])


def send(task: Any, count: int) -> None:
    for _ in range(count):
        task.apply_async((uuid.uuid4().hex,))


# --- what is in the broker and in the store -------------------------------------------------------------


def client() -> Redis:
    return Redis.from_url(servers.REDIS)


def stored(way: Way, name: str) -> int:
    """Messages in the queue."""
    if way.broker == "redis":
        return int(client().llen(name))
    with Connection(BROKERS["rabbitmq"]) as connection:
        return int(connection.default_channel.queue_declare(name, passive=True).message_count)


def records(name: str) -> int:
    """Completed records have no result here, so they lie in the store's buckets, a field each."""
    redis = client()
    return sum(int(redis.hlen(key)) for key in redis.scan_iter(f"{name}:store:*", count=1000, _type="HASH"))


def clean(way: Way, name: str) -> None:
    redis = client()
    keys = list(redis.scan_iter(f"*{name}*", count=1000))  # celery-once's locks have the task's name
    for begin in range(0, len(keys), 1000):
        redis.unlink(*keys[begin : begin + 1000])
    if way.broker == "rabbitmq":
        with Connection(BROKERS["rabbitmq"]) as connection:
            connection.default_channel.queue_delete(name)
            connection.default_channel.exchange_delete(name)


# --- the rounds -----------------------------------------------------------------------------------------


class Worker:
    """The worker of a way, from the first round to the last."""

    def __init__(self, number: int, way: Way, tasks: int) -> None:
        self.way, self.tasks, self.done = way, tasks, 0
        self.name = f"bench-{uuid.uuid4().hex[:12]}"
        self.app, self.task = application(way, self.name)
        command = [sys.executable, __file__, "--worker", str(number), "--name", self.name, "--tasks", str(tasks)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def run(self) -> float:
        """Fill the queue, and let it be worked off: tasks a second."""
        assert self.process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            gate = Path(folder) / "open"
            self.app.tasks[f"{self.name}.hold"].delay(str(gate))
            send(self.task, self.tasks)
            time.sleep(0.5)  # the worker holds, with what it has prefetched
            gate.touch()
            # Not the worker's banner.
            said = next((line for line in self.process.stdout if line.startswith(RATE)), "")
        self.done += self.tasks
        until(self.way, self.name, 0)
        kept = records(self.name)
        expected = self.done if self.way.kind == "guarded" else 0
        assert kept == expected, f"{self.way.title}: {kept} records of {self.done} tasks"
        return float(said.removeprefix(RATE))

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)
        clean(self.way, self.name)


def send_round(ways: Sequence[tuple[int, Way]], sends: int) -> dict[str, float]:
    """Calls of apply_async a second."""
    made = {number: (f"bench-{uuid.uuid4().hex[:12]}", way) for number, way in ways}
    calls = {number: application(way, name)[1] for number, (name, way) in made.items()}
    spent = dict.fromkeys(made, 0.0)
    sent = dict.fromkeys(made, 0)
    try:
        order = list(made)
        for piece in range(-1, sends // PIECE):  # the first one opens the connections, and does not count
            for number in order:
                name, way = made[number]
                began = time.perf_counter()
                send(calls[number], PIECE)
                if piece >= 0:
                    spent[number] += time.perf_counter() - began
                sent[number] += PIECE
                until(way, name, sent[number])
            order = order[1:] + order[:1]
    finally:
        for name, way in made.values():
            clean(way, name)
    return {way.title: sends // PIECE * PIECE / spent[number] for number, (_, way) in made.items()}


def until(way: Way, name: str, count: int) -> None:
    give_up = time.monotonic() + 10
    while (found := stored(way, name)) != count:
        assert time.monotonic() < give_up, f"{way.title}: {found} of {count} messages are in the queue"
        time.sleep(0.01)


def rotated(ways: Sequence[tuple[int, Way]], number: int) -> list[tuple[int, Way]]:
    turn = number * 3 % len(ways)  # by three, so that neighbours of the table change too
    order = [*ways[turn:], *ways[:turn]]
    return order[::-1] if number % 2 else order


def table(title: str, ways: Sequence[Way], rates: Mapping[str, Sequence[float]]) -> int:
    """Print it; how many are below their floors."""
    print(f"\n| {title} | a second, median (min..max) | ratio, median (min..max) | baseline | floor |")
    print("|---|---:|---:|---|---:|")
    below = 0
    for way in ways:
        if not way.installed:
            print(f"| {way.title} | not installed | | | |")
            continue
        own = rates[way.title]
        line = f"| {way.title} | {statistics.median(own):,.0f} ({min(own):,.0f}..{max(own):,.0f}) |"
        if way.baseline:
            ratios = [one / base for one, base in zip(own, rates[way.baseline], strict=True)]
            ratio = statistics.median(ratios)
            line += f" {ratio:.2f} ({min(ratios):.2f}..{max(ratios):.2f}) | {way.baseline} | {way.floor or ''} |"
            below += ratio < way.floor
        else:
            line += " 1 | | |"
        print(line)
    return below


def measure(what: str, ways: Sequence[Way], rounds: int, count: int) -> int:
    installed = [(number, way) for number, way in enumerate(ways) if way.installed]
    rates: dict[str, list[float]] = {way.title: [] for _, way in installed}
    workers = {number: Worker(number, way, count) for number, way in installed} if what == "running" else {}
    try:
        for number in range(-1 if workers else 0, rounds):  # the first one starts the workers, and does not count
            ways_now = rotated(installed, number)
            if workers:
                found = {way.title: workers[index].run() for index, way in ways_now}
            else:
                found = send_round(ways_now, count)
            for title, rate in found.items() if number >= 0 else ():
                rates[title].append(rate)
            load = os.getloadavg()[0]
            said = ", ".join(f"{title} {rate:.0f}" for title, rate in found.items())
            print(
                f"{what}: round {number + 1} of {rounds}, load average {load:.1f}: {said}", file=sys.stderr, flush=True
            )
    finally:
        for worker in workers.values():
            worker.close()
    below = table(f"{what}, {count} tasks, {rounds} rounds", ways, rates)
    once, guarded = (rates.get(f"{kind}, RabbitMQ") for kind in ("celery-once", "guarded"))
    if what == "running" and once and guarded:
        ratios = [one / other for one, other in zip(guarded, once, strict=True)]
        ratio = statistics.median(ratios)
        print(f"\nguarded on RabbitMQ beside celery-once there: {ratio:.2f} ({min(ratios):.2f}..{max(ratios):.2f})")
        below += ratio <= 1.0
    return below


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=1500, help="of each run of a worker")
    parser.add_argument("--sends", type=int, default=1000, help="of each way and round")
    parser.add_argument("--only", choices=("running", "sending"))
    parser.add_argument("--peers", help="a folder with celery-once and celery-singleton")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peers:
        sys.path.append(options.peers)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), options.peers)))
    if options.worker is not None:
        work(RUNNING[options.worker], options.name, options.tasks)
        return 0
    below = 0
    if options.only != "sending":
        below += measure("running", RUNNING, options.rounds, options.tasks)
    if options.only != "running":
        below += measure("sending", SENDING, options.rounds, options.sends)
    if not all(way.installed for way in RUNNING):
        print("\nto install: pip install --no-deps --target FOLDER celery-once celery-singleton, then --peers FOLDER")
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
