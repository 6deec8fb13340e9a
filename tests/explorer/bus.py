"""The whole way over a real kombu connection: a charge, its outbox row, the relay, the broker, the guarded consumer.

One script numbers the steps of all: the producer (worker 0), the relay (1) and the consumer (2), which are called in
turn until all is quiet. Their code is what users run: `Outbox`, `Relay`, `IdempotentProducer`, and an
`IdempotentHandler` that is given kombu messages, a window at a time. Waits cost no time: what is to come back later
comes back at once, and the store is made older by as much.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from kombu import Connection, Queue
from places import Place
from world import AS_IT_IS, MAX_ATTEMPTS, Run, Variant, Violation

from idempotent_bus import Outbox, PublishUnknown, Relay, ResendPolicy, schema
from idempotent_bus.execution import current_execution
from idempotent_bus.handler import IdempotentHandler
from idempotent_bus.headers import INNER_MSG_ID
from idempotent_bus.hooks import CLAIM, CLAIMED, COMPLETE, DURABLE, HANDLER, MARK, READ
from idempotent_bus.identity import record_key
from idempotent_bus.lease import LeaseKeeper
from idempotent_bus.model import Completed, Completion, Hold, Reason
from idempotent_bus.policy import Policy
from idempotent_bus.producer import IdempotentProducer
from idempotent_bus.testing.faults import FaultyStep, Killed, Plan, Script, Watch, error_of
from idempotent_bus.work import Work

PRODUCER, RELAY, CONSUMER = range(3)
_AT_ONCE = ResendPolicy(sleep=lambda seconds: None)
_LEASE = 30.0


class Bus:
    """A broker and a database with an outbox, for many runs. Each has a queue of its own."""

    def __init__(self, name: str, url: str, database: str, **options: Any) -> None:
        self.name = name
        self.url = url
        self.options = options
        self.prefix = f"x{uuid.uuid4().hex[:10]}_"
        self.engine = sa.create_engine(database)
        if self.engine.dialect.name == "sqlite":

            @sa.event.listens_for(self.engine, "connect")
            def quick(connection: Any, entry: object) -> None:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=OFF")

        self.outbox = Outbox(self.engine, table_prefix=self.prefix)
        self.table = schema.outbox(schema.metadata(self.prefix, parts=("outbox",)))
        self.charges = f"{self.prefix}charges"
        with self.engine.begin() as connection:
            connection.exec_driver_sql(f"CREATE TABLE {self.charges} (scope VARCHAR(40), biz_id VARCHAR(40))")

    @property
    def has_edge(self) -> bool:
        return self.url.startswith("idempotent-")

    def connect(self) -> Connection:
        return Connection(self.url, transport_options=dict(self.options))

    def age(self) -> None:
        """Let a relay's lease, and a row's pause, be over."""
        columns = self.table.c
        with self.engine.begin() as connection:
            connection.execute(
                sa.update(self.table).values(
                    lease_ends=columns.lease_ends - 1_000_000_000, due_at=columns.due_at - 1_000_000_000
                )
            )

    def left(self) -> int:
        with self.engine.connect() as connection:
            return int(connection.scalar(sa.select(sa.func.count()).select_from(self.table)) or 0)

    def close(self) -> None:
        with self.engine.begin() as connection:
            for table in ("outbox", "charges"):
                connection.exec_driver_sql(f"DROP TABLE IF EXISTS {self.prefix}{table}")
        self.engine.dispose()
        self._forget_broker()

    def _forget_broker(self) -> None:
        """Remove what the broker keeps on a server that is shared."""
        if prefix := self.options.get("global_keyprefix"):
            import redis

            with redis.Redis.from_url(self.url.removeprefix("idempotent-")) as client:
                for name in client.scan_iter(match=f"{prefix}*", count=1000):
                    client.delete(name)
        elif mark := self.options.get("message_tablename"):
            engine = sa.create_engine(self.url.removeprefix("idempotent-sqla+"))
            tables = sa.MetaData()
            tables.reflect(engine, only=lambda name, _: mark.removesuffix("_message") in name)
            tables.drop_all(engine)
            engine.dispose()


class _Shortened:
    """A settlement whose waits are over at once, for the broker; for the store and the worker the time passes."""

    def __init__(self, settle: Any, world: BusWorld) -> None:
        self._settle = settle
        self._world = world

    def ack(self) -> None:
        self._world.check_ack(self)
        self._settle.ack()
        self._world.left -= 1

    def wait(self, delay: float) -> None:
        self._settle.wait(0.0)
        self._world.age(delay)

    def dead_letter(self, reason: Reason, error: str, attempts: int) -> bool:
        moved: bool = self._settle.dead_letter(reason, error, attempts)
        return moved


def _error(step: str) -> Exception:
    if step in (READ, MARK):
        cause = ConnectionError("injected: the connection is gone")
        return sa.exc.OperationalError("injected", {}, cause, connection_invalidated=True)
    return error_of(step)


class BusWorld(Watch):
    """One run: a charge through the outbox ("o") and one published directly ("d"). See `world.World`."""

    _numbers = itertools.count(1)

    def __init__(self, plan: Plan, place: Place, bus: Bus, variant: Variant = AS_IT_IS) -> None:
        place.begin()
        self.place, self.bus, self.variant = place, bus, variant
        self.scope = f"b{next(self._numbers)}.{bus.prefix}"
        self.queue = Queue(f"q{self.scope}", routing_key=f"q{self.scope}")
        self.keys = {biz_id: record_key(self.scope, biz_id) for biz_id in "od"}
        self.script = Script(plan, error=_error, watch=self)
        self.runs: list[Run] = []
        self.completed: set[str] = set()
        self.names = {key: biz_id for biz_id, key in self.keys.items()}
        #: Completions that are under way: by worker and ticket.
        self.begun: dict[tuple[int, Any], Hold] = {}
        self.left_under_way: list[Hold] = []
        self.arrived: defaultdict[str, set[str]] = defaultdict(set)
        self.doubtful = False
        self.left = 0  # messages in the broker
        self.parked: list[Any] = []
        self.biz_ids: dict[int, str] = {}
        self.steps: dict[int, FaultyStep] = {}

    def age(self, seconds: float) -> None:
        self.place.advance(seconds, list(self.keys.values()))

    # --- the three ------------------------------------------------------------------------------------------

    def _publish(self, connection: Connection) -> None:
        """The caller resends what is unknown under its id; one that dies begins anew, with a fresh id."""
        while True:
            step = self.script.worker(PRODUCER)
            producer = IdempotentProducer(connection, declare=[self.queue], retry=_AT_ONCE, step=step)
            known: str | None = None
            try:
                while True:
                    try:
                        producer.publish({"id": "d"}, routing_key=self.queue.name, inner_msg_id=known)
                    except PublishUnknown as unknown:
                        known = unknown.inner_msg_id
                    else:
                        return
            except Killed:
                self.doubtful = True  # the first may have landed, under another id
            finally:
                producer.close()

    def _relay(self, connection: Connection) -> None:
        while True:
            relay = Relay(
                self.bus.engine,
                connection,
                table_prefix=self.bus.prefix,
                lease=_LEASE,
                declare=[self.queue],
                create=False,
                step=self.script.worker(RELAY),
                draw=lambda: 0.0,
            )
            relay._producer._policy = dataclasses.replace(relay._producer._policy, sleep=lambda seconds: None)
            try:
                for _ in range(50):
                    with contextlib.suppress(sa.exc.SQLAlchemyError):  # `run` waits, and goes on
                        relay.run_once()
                    if not self.bus.left() and not relay._unmarked:
                        return
                    self.bus.age()
                raise Violation("I13: the outbox is never empty")
            except (Killed, ConnectionError):
                self.bus.age()
            finally:
                relay.close()

    def _handler(self, step: FaultyStep) -> IdempotentHandler:
        place = self.place
        store = self.variant.store(place.store)
        keeper = LeaseKeeper(lambda: store, clock=self._now, step=step, threaded=False)
        executor = self.variant.executor(
            lambda: store,
            Policy(max_attempts=MAX_ATTEMPTS + 4),
            keeper=keeper,
            clock=self._now,
            sleep=self.age,
            draw=lambda: 0.5,
            step=step,
        )
        return IdempotentHandler(
            self._handle, executor, scope=self.scope, biz_id="id", fingerprint=True, dead_letter=None
        )

    def _now(self) -> float:
        return self.place.clock()

    def _handle(self, body: Any, message: Any) -> str:
        run = Run(body["id"], current_execution().token, CONSUMER, effect=True)  # type: ignore[attr-defined]
        self.runs.append(run)
        return "done"

    def _consume(self) -> None:
        for _ in range(50):
            handler = self._handler(self.script.worker(CONSUMER))
            connection = self.bus.connect()
            try:
                if self._consume_until_empty(connection, handler):
                    return
            except (Killed, ConnectionError):
                continue
            finally:
                self.parked.clear()
                if self.bus.url.startswith("memory"):
                    connection.default_channel.basic_recover(requeue=True)  # a channel there forgets what is unacked
                connection.close()
        raise Violation("I13: the queue is never empty")

    def _consume_until_empty(self, connection: Connection, handler: IdempotentHandler) -> bool:
        channel = connection.default_channel
        self.queue(channel).declare()
        give_up = time.monotonic() + 20.0
        while self.left:
            messages = [*self.parked, *self._fetch(channel)]
            self.parked.clear()
            if not messages:
                if time.monotonic() > give_up:
                    raise Violation(f"I1: {self.left} messages never come back")
                time.sleep(0.002)  # the transport looks after what waits from time to time
                continue
            works: list[Work] = []
            for message in messages:
                settle = handler.settlement(message, self.queue.name, lambda delay, m=message: self.parked.append(m))  # type: ignore[misc]
                work = handler.receive(message, settle)
                assert work is not None
                self.arrived[work.biz_id].add(str(message.headers[INNER_MSG_ID]))
                shortened = _Shortened(settle, self)
                self.biz_ids[id(shortened)] = work.biz_id
                work.settle = shortened
                works.append(work)
            handler.executor.handle_window(works)
        return True

    def _fetch(self, channel: Any) -> Iterator[Any]:
        for _ in range(10):
            message = channel.basic_get(self.queue.name)
            if message is None:
                return
            yield message

    # --- what the steps did -----------------------------------------------------------------------------------

    def done(self, worker: int, step: str, arguments: Sequence[Any], result: Any) -> None:
        if step in (CLAIM, CLAIMED):
            outcomes = result if isinstance(result, list) else [result]
            requests = arguments[0] if isinstance(result, list) else [arguments[0]]
            arrived = {
                request.key for request, outcome in zip(requests, outcomes, strict=True) if type(outcome) is Completed
            }
            # One that was under way, its worker dead or not yet told: by this the store tells that it arrived.
            for hold in [hold for hold in (*self.left_under_way, *self.begun.values()) if hold.key in arrived]:
                self._completed(hold)
        elif step == COMPLETE and isinstance(arguments[0], Completion):
            self.begun[worker, result] = arguments[0].hold
        elif step == COMPLETE and result:
            self._completed(arguments[0])
        elif step == DURABLE:
            for one in result:
                hold = self.begun.pop((worker, one.ticket), None)
                if hold is not None and one.durable:
                    self._completed(hold)

    def _completed(self, hold: Hold) -> None:
        biz_id = self.names[hold.key]
        self.completed.add(biz_id)
        for run in self.runs:
            if run.biz_id == biz_id and run.token == hold.token:
                run.completed = True

    def check_ack(self, settle: Any) -> None:
        if self.biz_ids[id(settle)] not in self.completed and self.variant is AS_IT_IS:
            raise Violation("I4: acked before it is completed")

    def crashed(self, worker: int) -> None:
        mine = [ticket for ticket in self.begun if ticket[0] == worker]  # the next one's begin with 1 again
        self.left_under_way += [self.begun.pop(ticket) for ticket in mine]
        self._excuse(worker)

    def raised(self, worker: int, step: str) -> None:
        if step == HANDLER:
            self._excuse(worker)

    def _excuse(self, worker: int) -> None:
        if worker == CONSUMER:
            for run in self.runs:
                if not run.over:
                    run.over = True
                    run.excuse = "" if run.completed else "cut off"

    # --- one run ------------------------------------------------------------------------------------------------

    def play(self) -> BusWorld:
        """Publish, relay and consume until all is quiet; check."""
        bus = self.bus
        try:
            with bus.engine.begin() as transaction:
                transaction.exec_driver_sql(f"INSERT INTO {bus.charges} VALUES ('{self.scope}', 'o')")
                bus.outbox.add(transaction, {"id": "o"}, routing_key=self.queue.name)
            with bus.connect() as connection:
                self.queue(connection.default_channel).declare()
                self._publish(connection)
                self._relay(connection)
                landed = connection.default_channel._size(self.queue.name)
                self.left = landed
                if bus.has_edge and not self.doubtful and landed != 2:
                    raise Violation(f"I1, I5: {landed} messages landed of 2")
            self._consume()
            self.check()
        except Violation as found:
            raise AssertionError(str(found)) from found
        finally:
            with bus.connect() as connection:
                connection.default_channel.queue_delete(self.queue.name)
        return self

    def check(self) -> None:
        effects = Counter(run.biz_id for run in self.runs)
        for biz_id in "od":
            excused = sum(1 for run in self.runs if run.biz_id == biz_id and run.excuse and not run.completed)
            if biz_id not in self.completed or not effects[biz_id]:
                raise Violation(f"I1: {biz_id} is lost")
            if effects[biz_id] > 1 + excused:
                raise Violation(f"I2: {effects[biz_id]} effects of {biz_id}, {excused} excused")
            if len(self.arrived[biz_id]) > 1 + (biz_id == "d" and len(self.script.applied)):
                raise Violation(f"one publish of {biz_id} has {len(self.arrived[biz_id])} inner-msg-ids")


@contextlib.contextmanager
def opened_bus(name: str, folder: str, redis: str = "", postgresql: str = "") -> Iterator[Bus]:
    """A broker and an outbox by name: memory, sqlite, redis, postgresql."""
    sqlite = f"sqlite:///{folder}/outbox.db"
    if name == "memory":
        bus = Bus(name, "memory://", sqlite)
    elif name == "sqlite":
        bus = Bus(name, f"idempotent-sqla+sqlite:///{folder}/broker.db?synchronous=NORMAL", sqlite)
    elif name == "redis":
        prefix = f"x{uuid.uuid4().hex[:10]}:"
        bus = Bus(name, redis.replace("redis://", "idempotent-redis://"), sqlite, global_keyprefix=prefix)
    else:
        mark = f"x{uuid.uuid4().hex[:10]}"
        names = {"queue_tablename": f"{mark}_queue", "message_tablename": f"{mark}_message"}
        bus = Bus(name, f"idempotent-sqla+{postgresql}", postgresql, **names)
    try:
        yield bus
    finally:
        bus.close()
