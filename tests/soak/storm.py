"""One cell under fire: the supervisor of its producers, relays and consumers, and of everything that befalls them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from consumer_rig import Broker
from idempotent_bus import delays, hooks, schema
from idempotent_bus.headers import DEAD_REASON
from idempotent_bus.identity import record_key
from idempotent_bus.policy import LONGEST_SPREAD
from proxy import Proxy, through

from .cells import Cell
from .checker import Life, check
from .controls import damaged
from .ground import Ground, restart
from .history import Tail
from .messages import BLOCK, expected, queue_of
from .victim import EFFECTS, effects_file, open_database

__all__ = ["Doses", "Storm", "Zygote"]

#: Steps that a life meets often: it gets through some of its work before it dies.
_OFTEN = (
    hooks.CLAIM,
    hooks.HANDLER,
    hooks.COMPLETE,
    hooks.ACK,
    hooks.COMMIT,
    hooks.PUBLISH,
    hooks.DURABLE,
    hooks.CLAIMED,
)
#: An hour fast, an hour slow: on the wall clock of some processes.
_SHIFTS = (0.0, 0.0, 0.0, 3600.0, -3600.0)
#: Seconds without anything new, after which what is not done never will be.
_STUCK = 60.0
#: Seconds after which our transports bring back what a silent consumer has.
_VISIBILITY = 2
#: So many processes that end by themselves: something is wrong with all of them.
_MOST_FAILURES = 10


@dataclass(frozen=True)
class Doses:
    """How much of what befalls a cell. kills: at named steps; random_kills: at any moment, from outside.

    stops: SIGSTOP, one in three for longer than a lease. faults: of the network, by way of the proxies.
    """

    messages: int = 4000
    kills: int = 100
    random_kills: int = 10
    stops: int = 6
    broker_restarts: int = 4
    store_restarts: int = 2
    faults: int = 20
    consumers: int = 3
    lease: float = 4.0

    def scaled(self, part: float) -> Doses:
        """The same in small."""
        return Doses(
            messages=max(BLOCK * 4, ceil(self.messages * part)), kills=ceil(self.kills * part),
            random_kills=ceil(self.random_kills * part), stops=ceil(self.stops * part),
            broker_restarts=ceil(self.broker_restarts * part), store_restarts=ceil(self.store_restarts * part),
            faults=ceil(self.faults * part), consumers=self.consumers, lease=self.lease,
        )  # fmt: skip


class Zygote:
    """The process that forks the victims, see `zygote.py`. Use as a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            bufsize=0,
        )  # fmt: skip
        self._rest = b""
        self._lives = itertools.count(1)

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def next_life(self) -> int:
        """A number that no other life of this zygote has."""
        return next(self._lives)

    def fork(self, settings: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(settings).encode() + b"\n")

    def news(self, timeout: float) -> list[list[str]]:
        """What has started and ended since."""
        assert self._process.stdout is not None
        file = self._process.stdout.fileno()
        if not select.select([file], [], [], timeout)[0]:
            return []
        data = os.read(file, 1 << 20)
        if not data:
            raise RuntimeError("the zygote has died")
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode().split() for line in lines]


@dataclass
class _Alive(Life):
    plan: dict[str, Any] | None = None
    pid: int = 0
    ended: bool = False
    stopped_at: float | None = None
    stop_for: float = 0.0


class Storm:
    """Plays one cell to its end; `play` returns its report. history and effects stay in the folder."""

    def __init__(
        self, cell: Cell, doses: Doses, zygote: Zygote, ground: Ground, folder: Path, *, seed: int = 1,
        say: Callable[[str], None] = lambda _: None, over: threading.Event | None = None,
    ) -> None:  # fmt: skip
        self.over = threading.Event() if over is None else over
        self.cell, self.doses, self.zygote, self.ground, self.folder = cell, doses, zygote, ground, folder
        self.say, self.draw = say, random.Random(f"{seed} {cell.name}")
        self.unique = f"k{uuid.uuid4().hex[:10]}"
        self.blocks = max(1, doses.messages // BLOCK)
        self.lives: dict[int, _Alive] = {}
        self.done: set[str] = set()
        self.landed: set[int] = set()
        self.intents: dict[int, list[str]] = {}
        self.counts: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.skewed = 0
        self.trouble: threading.Thread | None = None
        self.trouble_error = ""
        self.quorum = cell.store in ("redis", "sqlite")
        self._places()
        self._plans()

    # --- where everything is ------------------------------------------------------------------------------

    def _places(self) -> None:
        cell, ground, folder, unique = self.cell, self.ground, self.folder, self.unique
        (folder / "holders").mkdir(parents=True, exist_ok=True)
        self.prefix = f"{unique}_"
        url = f"sqlite:///{folder}/data.db" if cell.database == "sqlite" else ground.sql(cell.database).url
        self.database = url
        if cell.store == "redis":
            self.store_server: Any = ground.redis_pair() if cell.failover else ground.redis("store")
            self.store = f"{self.store_server.url}?socket_timeout=1"
            self.store_options: dict[str, Any] = {"prefix": f"{unique}:"}
        else:
            self.store_server = None if cell.store == "sqlite" else ground.sql(cell.store)
            self.store = f"sqlite:///{folder}/store.db" if cell.store == "sqlite" else url
            self.store_options = {"table_prefix": self.prefix, "timeout": 1.5}
        options: dict[str, Any] = {}
        if cell.broker == "rabbitmq":
            self.broker_server: Any = ground.rabbitmq()
            name, self.broker = f"rabbitmq-{'quorum' if self.quorum else 'classic'}", self.broker_server.url
        elif cell.broker == "redis":
            self.broker_server = ground.redis("broker")
            name, self.broker = "ours-redis", f"idempotent-{self.broker_server.url}"
            options = {"global_keyprefix": f"{unique}:", "visibility_timeout": _VISIBILITY}
        else:
            kind = cell.database
            self.broker_server = None if kind == "sqlite" else ground.sql(kind)
            name = f"ours-{kind}"
            self.broker = f"idempotent-sqla+{f'sqlite:///{folder}/bus.db' if kind == 'sqlite' else url}"
            options = {"visibility_timeout": _VISIBILITY}
            if kind != "sqlite":
                options |= {"queue_tablename": f"{unique}_queue", "message_tablename": f"{unique}_message"}
        self.bus = Broker(name, self.broker, unique, options)
        kinds = ("rerun", "quarantine", "probe") if cell.mode == "store" else ("rerun",)
        self.queues = {kind: self.bus.queue(kind).name for kind in kinds}
        self.proxies: dict[str, Proxy] = {}
        if self.broker_server is not None:
            self.proxies["broker"] = Proxy(port=self.broker_server.port)
        if self.store_server is not None:
            self.proxies["store"] = self.store_server.proxy if cell.failover else Proxy(port=self.store_server.port)
        if cell.store != "redis" and self.store_server is not None:
            self.proxies["database"] = Proxy(port=self.store_server.port)
            if cell.mode == "inbox":
                del self.proxies["store"]
        engine = open_database(self.database)
        schema.create(engine, schema.metadata(self.prefix, parts=("outbox",)))
        with engine.begin() as connection:
            connection.exec_driver_sql(f"CREATE TABLE {self.prefix}effects {EFFECTS}")
        engine.dispose()
        with contextlib.closing(effects_file(folder)) as effects:
            effects.execute(f"CREATE TABLE effects {EFFECTS}")
        self.tail = Tail(folder / "history")
        self.wanted = expected(self.blocks, cell.mode, plain=bool(cell.control))
        self.keys: dict[str, str] = {}
        for biz_id, kind in self.wanted.items():
            scope = f"{unique}.{queue_of(kind, 'store')}" if cell.mode == "store" else unique
            self.keys[record_key(scope, biz_id).hex()] = biz_id

    def _settings(self, role: str, life: int, plan: dict[str, Any] | None) -> dict[str, Any]:
        urls = {"broker": self.broker, "store": self.store, "database": self.database}
        if self.draw.random() < 0.3 and self.doses.faults:
            for name, proxy in self.proxies.items():
                if not (self.cell.failover and name == "store"):  # which is behind one anyway
                    urls[name] = _through(proxy, urls[name])
        shift = 0.0 if self.cell.control else self.draw.choice(_SHIFTS)
        self.skewed += bool(shift)
        made: dict[str, Any] = {
            "role": role, "life": life, "plan": plan, "shift": shift, **urls, "options": self.bus.options,
            "store_options": self.store_options, "queues": self.queues, "dead": self.bus.dead, "mode": self.cell.mode,
            "quorum": self.bus.name == "rabbitmq-quorum", "unique": self.unique, "prefix": self.prefix,
            "folder": str(self.folder), "history": str(self.folder / "history"), "lease": self.doses.lease,
            "errors": str(self.folder / "errors"), "control": self.cell.control, "waits": self.cell.waits,
            "pause": 0.02 if self.cell.control else 0.0,
        }  # fmt: skip
        if role == "producer":
            made["todo"] = [[n, self.intents.get(n)] for n in range(self.blocks) if n not in self.landed]
        return made

    # --- what befalls it ----------------------------------------------------------------------------------

    def _plans(self) -> None:
        doses, draw, steps = self.doses, self.draw, self.cell.steps
        places = [(role, step, side) for role in steps for step in steps[role] for side in ("before", "after")]
        # Nowhere else is there this step, and nowhere else is that one so delicate.
        places += 4 * [place for place in places if self.cell.streams and place[1] in (hooks.DURABLE, hooks.COMPLETE)]
        draw.shuffle(places)
        self.plans: dict[str, list[dict[str, Any]]] = {role: [] for role in steps}
        often = max(10, doses.messages // max(1, doses.kills))  # so that they are spread over the messages
        for number in range(doses.kills):
            role, step, side = places[number % len(places)]
            nth = draw.randint(1, often if role == "consumer" else 8) if step in _OFTEN else 1
            self.plans[role].append({"step": step, "side": side, "nth": nth})
        if self.cell.control == "token check off":
            stop = {"step": hooks.HANDLER, "stop": True}
            self.plans["consumer"] = [{**stop, "nth": draw.randint(1, 6)} for _ in range(8)]
        elif self.cell.control:
            where = {"early ack": (hooks.HANDLER, "before"), "effect outside the transaction": (hooks.COMMIT, "before")}
            step, side = where.get(self.cell.control, (hooks.ACK, "before"))
            self.plans["consumer"] = [{"step": step, "side": side, "nth": draw.randint(1, 6)} for _ in range(8)]
        happenings: list[Callable[[], None]] = [self._kill_somebody] * doses.random_kills + [self._stop] * doses.stops
        if self.broker_server is not None:
            happenings += [self._restart_broker] * doses.broker_restarts
        if self.store_server is not None:
            happenings += [self._restart_store] * doses.store_restarts
        if self.proxies:
            happenings += [self._disturb] * doses.faults
        draw.shuffle(happenings)
        total = len(self.wanted)
        self.happenings = [(int(total * (n + 0.5) / len(happenings)), what) for n, what in enumerate(happenings)]

    def _target(self) -> _Alive | None:
        some = [one for one in self.lives.values() if one.pid and one.stopped_at is None and not one.killed]
        return self.draw.choice(some) if some else None

    def _kill_somebody(self) -> None:
        if (life := self._target()) is not None:
            self._end(life, "any moment")

    def _end(self, life: _Alive, why: str) -> None:
        life.killed = True
        self.kills[why] += 1
        os.kill(life.pid, signal.SIGKILL)

    def _stop(self) -> None:
        if (life := self._target()) is not None:
            long = self.draw.random() < 0.34
            life.stop_for = self.doses.lease * 1.3 if long else self.draw.uniform(0.1, 0.6)
            life.stopped_at = time.monotonic()
            self.counts["long stops" if long else "short stops"] += 1
            os.kill(life.pid, signal.SIGSTOP)

    def _in_background(self, what: Callable[[], None]) -> None:
        def act() -> None:
            try:
                what()
            except BaseException as error:  # noqa: BLE001 - pytest's own too; told where the cell is judged
                self.trouble_error = f"{type(error).__name__}: {error}"

        self.trouble = threading.Thread(target=act, daemon=True)
        self.trouble.start()

    def _restart_broker(self) -> None:
        self.counts["broker restarts"] += 1
        self._in_background(lambda: restart(self.broker_server))

    def _restart_store(self) -> None:
        self.counts["failovers" if self.cell.failover else "store restarts"] += 1
        self._in_background(self.store_server.fail_over if self.cell.failover else lambda: restart(self.store_server))

    def _disturb(self) -> None:
        name = self.draw.choice(sorted(self.proxies))
        proxy = self.proxies[name]
        kinds: dict[str, Callable[[], None]] = {
            "reply eaten": lambda: proxy.lose_reply(b""),
            "request lost": lambda: proxy.lose_request(b""),
            "request cut in half": lambda: proxy.cut_request(b""),
            "cut": proxy.cut,
            "delayed": lambda: proxy.delay_reply(b"", 0.3),
            # After its asker has given up: on a connection that is used again it would answer the next command.
            "answers the next command": lambda: proxy.delay_reply(b"", 2.0),
        }
        if name == "store":  # which has a timeout of its own; that of a business's connection is the business's matter
            kinds["silent for ever"] = lambda: proxy.lose_reply(b"", cut=False)
        kind = self.draw.choice(sorted(kinds))
        kinds[kind]()
        self.faults[f"{name}: {kind}"] += 1

    # --- the run ------------------------------------------------------------------------------------------

    def play(self) -> dict[str, Any]:
        """Until all is done and quiet, or stuck; then the verdict."""
        began = self._changed = time.monotonic()
        said = 0.0
        why = ""
        try:
            while True:
                if self.over.is_set():
                    raise RuntimeError("broken off")
                self._listen()
                self._read()
                self._thaw()
                self._keep_up()
                if self.trouble is not None and not self.trouble.is_alive():
                    self.trouble = None
                if self.trouble_error:
                    break
                if self.happenings and len(self.done) >= self.happenings[0][0] and self.trouble is None:
                    self.happenings.pop(0)[1]()
                if sum(bool(alive.status) for alive in self.lives.values()) > _MOST_FAILURES:
                    why = "one process after the other ends by itself"
                    break
                now = time.monotonic()
                if now - said > 10.0:
                    said = now
                    self.say(f"{self.cell.name}: {len(self.done)} of {len(self.wanted)}, {self._killed()} kills")
                quiet = now - self._changed
                is_done = len(self.landed) == self.blocks and self._is_done()
                if is_done and quiet > LONGEST_SPREAD * self.doses.lease + 2.0 and self.trouble is None:
                    break
                if quiet > _STUCK and self.trouble is None:
                    why = "stuck"
                    break
            if self.trouble_error:
                raise RuntimeError(f"{self.cell.name}: a server did not come back: {self.trouble_error}")
            self._say_goodbye()
            return self._judge(time.monotonic() - began, why)
        finally:
            self._clean_up()

    def _is_done(self) -> bool:
        return len(self.done) >= len(self.wanted)

    def _killed(self) -> int:
        return sum(self.kills.values())

    def _listen(self) -> None:
        for word, life, value in self.zygote.news(0.01):
            alive = self.lives.get(int(life))
            if alive is None:
                continue  # of the cell before this one
            if word == "started":
                alive.pid = int(value)
            else:
                alive.pid, alive.ended, status = 0, True, int(value)
                if os.WIFSIGNALED(status):
                    alive.killed = True
                else:
                    alive.status = os.waitstatus_to_exitcode(status)

    def _read(self) -> None:
        for line in self.tail.read():
            self._changed = time.monotonic()
            what = line[0]
            if what in ("acking", "dead"):
                biz_id = self.keys.get(line[1])
                if biz_id is not None:
                    self.done.add(biz_id)
            elif what == "landed":
                self.landed.add(int(line[1]))
            elif what == "intent":
                self.intents[int(line[1])] = line[2:-1]
            elif what == "die":
                self.lives[int(line[1])].killed = True
                self.kills[f"{line[2]} {line[3]}"] += 1
            elif what == "stopping":
                alive = self.lives[int(line[1])]
                alive.stopped_at, alive.stop_for = time.monotonic(), 2 * self.doses.lease + _VISIBILITY
                self.counts["long stops"] += 1

    def _thaw(self) -> None:
        now = time.monotonic()
        for alive in self.lives.values():
            if alive.stopped_at is not None and now - alive.stopped_at >= alive.stop_for:
                alive.stopped = max(alive.stopped, now - alive.stopped_at)
                alive.stopped_at = None
                if alive.pid:
                    os.kill(alive.pid, signal.SIGCONT)

    def _keep_up(self) -> None:
        """So many of each role are alive; each life has the next plan, as long as there are any."""
        number = Counter(alive.role for alive in self.lives.values() if not alive.ended)
        wanted = {"consumer": self.doses.consumers, "relay": 2, "producer": 1}
        if len(self.landed) == self.blocks:
            wanted["producer"] = 0
        for role, many in wanted.items():
            if number[role] < many:
                self._start(role)

    def _start(self, role: str) -> None:
        life = self.zygote.next_life()
        plans = self.plans[role]
        plan = plans.pop() if plans else None
        self.lives[life] = _Alive(role, plan=plan)
        self.zygote.fork(self._settings(role, life, plan))

    def _say_goodbye(self) -> None:
        """The last ones end by themselves: what they have under way is finished."""
        for proxy in self.proxies.values():
            proxy.resume()
        deadline = time.monotonic() + 30
        told = False
        while not all(alive.ended for alive in self.lives.values()) and time.monotonic() < deadline:
            self._listen()
            self._thaw()
            if not told or time.monotonic() > deadline - 15:
                told = True
                for alive in self.lives.values():
                    if alive.pid and alive.stopped_at is None:
                        os.kill(alive.pid, signal.SIGTERM)
                time.sleep(0.1)
        for alive in self.lives.values():
            if alive.pid:
                self._end(alive, "at the end")
        self._read()

    # --- the verdict --------------------------------------------------------------------------------------

    def _judge(self, seconds: float, why: str) -> dict[str, Any]:
        cell, doses = self.cell, self.doses
        dead: dict[str, list[str]] = {}
        for message in self.bus.take(self.bus.dead, 1_000_000, 1.0):
            dead.setdefault(message.payload["id"], []).append(str(message.headers[DEAD_REASON]))
        left = [m.payload["id"] for name in self.queues.values() for m in self.bus.take(name, 100_000, 0.5)]
        effects = self._effects()
        found = check(
            self.tail.lines, effects, dead, self.lives, self.wanted, mode=cell.mode, lease=doses.lease,
forgets=cell.failover, left=left,
        )  # fmt: skip
        if why:
            found["wrong"].insert(0, why)
            found["unexpected"] += 1
        report = {
            "cell": cell.name, "messages": len(self.wanted), "kills": dict(sorted(self.kills.items())),
            "stops": {name: self.counts[f"{name} stops"] for name in ("short", "long")},
            "broker_restarts": self.counts["broker restarts"], "store_restarts": self.counts["store restarts"],
            "failovers": self.counts["failovers"], "faults": dict(sorted(self.faults.items())),
            "lives": len(self.lives), "wrong_clocks": self.skewed, **found, "seconds": round(seconds, 1),
        }  # fmt: skip
        log = self.broker_server.log.read_text(errors="replace") if cell.broker == "rabbitmq" else ""
        hurt = damaged_queues(log, self.unique)
        report["damaged_queues"] = len(hurt)
        report["wrong"] += [f"by RabbitMQ's own log this queue was damaged: {name}" for name in hurt]
        if cell.control:
            report["damage"] = damaged(cell.control, report)
            report["verdict"] = "damage, as expected" if report["damage"] else "VOID: no damage"
        else:
            report["verdict"] = verdict(cell, report)
        return report

    def _effects(self) -> list[Any]:
        if self.cell.mode == "store" or self.cell.control:
            with contextlib.closing(effects_file(self.folder)) as file:
                return file.execute("SELECT biz, run, life FROM effects").fetchall()
        engine = open_database(self.database)
        try:
            with engine.connect() as connection:
                return [tuple(row) for row in connection.execute(sa.text(f"SELECT * FROM {self.prefix}effects"))]
        finally:
            engine.dispose()

    def _clean_up(self) -> None:
        deadline = time.monotonic() + 20
        while not all(alive.ended for alive in self.lives.values()) and time.monotonic() < deadline:
            for alive in self.lives.values():
                if alive.pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(alive.pid, signal.SIGKILL)
            self._listen()
        if self.trouble is not None:
            self.trouble.join(60)
        for proxy in self.proxies.values():
            if not (self.cell.failover and proxy is self.store_server.proxy):
                proxy.close()
        self.tail.close()
        if self.cell.broker == "rabbitmq":
            with contextlib.suppress(Exception), self.bus.connect() as connection:
                channel = connection.channel()
                for name in self.queues.values():
                    channel.queue_delete(name)
                    channel.queue_delete(delays.return_queue(name).name)
                channel.queue_delete(self.bus.dead)
        elif self.cell.broker == "redis":
            with contextlib.suppress(Exception):
                self.broker_server.client.flushall()
        if self.cell.store == "redis" and not self.cell.failover:
            with contextlib.suppress(Exception):
                self.store_server.client.flushall()


def verdict(cell: Cell, report: dict[str, Any]) -> str:
    """`held`, `conditional` (a failover made something run again), or what is broken; if it is the broker, that."""
    broken = [name for name in ("lost", "acked_early", "unexpected", "superseded", "unexcused") if report[name]]
    if cell.mode == "inbox" and report["doubled"]:
        broken.append("doubled")
    if cell.failover and set(broken) <= {"superseded", "unexcused"}:
        return "conditional" if broken or report["doubled_by"].get("forgotten") else "held"
    if broken and set(broken) <= {"lost", "unexpected"} and report["damaged_queues"]:
        return f"RABBITMQ DAMAGED: {', '.join(broken)}"
    return f"BROKEN: {', '.join(broken)}" if broken else "held"


def damaged_queues(log: str, prefix: str) -> list[str]:
    """Quorum queues of one cell that do not work since RabbitMQ was killed, by its own log.

    Seen with 3.10.8: the process of a queue crashes over messages that its log does not have any more; a queue that was
    declared just before the kill finds no leader again. The delay queues are shared: what waits for others stops too.
    """
    crashed = set(re.findall(rf"\*\* State machine '%2F_({prefix}[^']*)' terminating", log))
    _, started, since = log.rpartition("Starting RabbitMQ ")
    led = rf"queue '({prefix}[^']*)' in vhost '/': candidate -> leader"
    leaderless = set(re.findall(rf"'%2F_({prefix}[^']*)'.*leader not known", since)) - set(re.findall(led, since))
    return sorted(crashed | (leaderless if started else set()))


def _through(proxy: Proxy, url: str) -> str:
    """Where a scheme stands before another one, only the last is a URL of its own."""
    head, plus, rest = url.rpartition("sqla+") if url.startswith("idempotent-sqla+") else ("", "", url)
    return f"{head}{plus}{through(proxy, rest)}"
