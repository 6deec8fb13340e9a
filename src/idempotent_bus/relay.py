"""The relay: it sends what was committed to the outbox, and forgets a row only after the broker's confirm (I5).

Relay(engine, "amqp://...").run()

Any number of relays may run at once: each claims a batch for the length of a lease, sends it, and deletes what was
confirmed. A relay that dies leaves its claims to lapse, and whoever sends those rows again does it under the same
inner-msg-id, which the broker's edge or the consumer refuses.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from kombu import Connection
from typing_extensions import Self

from . import schema
from .connections import read_committed
from .dialects import NO_LOITERING
from .errors import ConfigurationError
from .hooks import CONFIRM, MARK, READ, Step, direct
from .producer import IdempotentProducer, ResendPolicy
from .relaying.claiming import Batch, Claimer
from .relaying.entities import Described
from .relaying.rows import Backlog, DeadRow, OutboxRow, Rows
from .relaying.sending import Outcome, send
from .relaying.wakeup import Wakeup
from .watchdog import Watchdog, spare_socket

__all__ = ["Relay", "RelayCounts", "redrive_outbox"]

log = logging.getLogger(__name__)

#: Seconds: the longest pause while the broker, or the database, is away.
_LONGEST_PAUSE: Final = 30.0
#: Seconds: the pauses of a row that was refused, from its first failure to the longest.
_FIRST_RETRY: Final = 1.0
_LONGEST_RETRY: Final = 300.0
#: Seconds: how long a relay sleeps that writers do not wake, as long as some of them have not committed yet.
_FIRST_NAP: Final = 0.01
_LONGEST_NAP: Final = 1.0
#: The part of a lease after which no further send is begun.
_USABLE: Final = 0.5
#: A stream ends after about this part of a lease, so that the time is looked at again.
_STREAM: Final = 0.1
_SECOND: Final = 1_000_000
#: For this transaction only: behind a pooler the session is shared.
_NO_LOITERING: Final = NO_LOITERING["postgresql"].replace("SESSION", "LOCAL")
#: Seconds: an answer of the database is waited for during a lease, but for so long at the least.
_PATIENCE: Final = 10.0
#: Seconds: the same where the whole table is counted.
_LONGEST_COUNT: Final = 600.0


@dataclass(frozen=True, slots=True)
class RelayCounts:
    """What one pass did, or many together. sent: confirmed, and gone from the outbox; `duplicates` of them the broker's
    edge had already.

    refused: the broker said no, or the row cannot be a message; tried again later, or dead. unknown: no answer came.
    away: the broker does not answer. exhausted: nothing else is due, as far as can be seen.
    """

    claimed: int = 0
    sent: int = 0
    duplicates: int = 0
    refused: int = 0
    unknown: int = 0
    away: bool = False
    exhausted: bool = True

    def __add__(self, other: RelayCounts) -> RelayCounts:
        return RelayCounts(
            self.claimed + other.claimed,
            self.sent + other.sent,
            self.duplicates + other.duplicates,
            self.refused + other.refused,
            self.unknown + other.unknown,
            other.away,
            other.exhausted,
        )


class Relay:
    """Moves rows of one outbox to one broker.

    engine: of the outbox's database; one connection is kept, and on PostgreSQL a second one to be woken. Without
        psycopg 3, and elsewhere, the table is polled. A server that falls silent on them is given up after a lease (10
        seconds at the least); how long a new connection may take is your engine's matter (`connect_timeout`).
    connection: the broker, as IdempotentProducer takes it.
    table_prefix, database_schema: the outbox's. The table must be there, or `create` makes it.
    declare: exchanges and queues to declare at every new connection.
    batch: how many rows are claimed at once.
    lease: seconds for which they are; a relay that dies holds them up for so long. It must be longer than a batch
        takes, else rows are sent twice (and land once).
    poll_interval: seconds between two looks at an outbox that was empty.
    max_attempts: a row that the broker has refused so often is dead: it is not sent any more, and stays until it is
        redriven or discarded. A broker that cannot be reached counts no attempt.
    confirm_timeout: seconds to wait for the confirm of one send.
    step: performs READ (a claim), PUBLISH (each send), CONFIRM (a stream of sends until all are confirmed) and MARK.

    `run` and `run_once` take turns; `stop` may be called from any thread or from a signal's handler. A relay is not
    taken over a fork: make it in the child.
    """

    def __init__(
        self,
        engine: sa.Engine,
        connection: Connection | str | Any,
        *,
        table_prefix: str = schema.PREFIX,
        database_schema: str | None = None,
        declare: Iterable[Any] = (),
        batch: int = 500,
        lease: float = 30.0,
        poll_interval: float = 1.0,
        max_attempts: int = 20,
        confirm_timeout: float = 5.0,
        create: bool = True,
        step: Step = direct,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        if not 1 <= batch <= 5000:
            raise ConfigurationError("batch must be from 1 to 5000 rows")
        if lease < 1 or poll_interval <= 0 or max_attempts < 1:
            raise ConfigurationError("a relay needs lease >= 1, poll_interval > 0 (seconds) and max_attempts >= 1")
        self._engine = engine
        self._tables = schema.metadata(table_prefix, database_schema, parts=("outbox",))
        self._create = create
        self._batch = batch
        self._lease = lease
        self._poll_interval = poll_interval
        self._max_attempts = max_attempts
        self._step = step
        self._clock = clock
        self._draw = draw
        self._producer = IdempotentProducer(
            connection,
            declare=declare,
            # All of a stream's patience must end well within the lease.
            confirm_timeout=min(confirm_timeout, lease / 6),
            retry=ResendPolicy(max_sends=3, patience=lease / 6, cap=min(1.0, lease / 6), base=min(0.1, lease / 6)),
            step=step,
        )
        self._entities = Described()
        self._watchdog = Watchdog(max(lease, _PATIENCE))
        self._wakeup = Wakeup(engine, self._tables, watchdog=self._watchdog, clock=clock)
        self._stopping = False
        self._lock = threading.Lock()
        self._connection: sa.Connection | None = None
        self._socket: socket.socket | None = None
        self._rows: Rows | None = None
        self._claimer: Claimer | None = None
        #: Confirmed, but not known to be deleted: the answer was lost, and deleting can be repeated. Ids by number.
        self._unmarked: dict[int, str] = {}
        #: Claimed and not sent, when the database failed: their owner, and their numbers.
        self._owed: tuple[bytes, set[int]] = (b"", set())
        #: Rows without an answer, and how often: it counts against them once the broker has taken others.
        self._suspects: dict[int, int] = {}
        self._broker_failures = 0
        self._rate = 500.0

    # --- running ----------------------------------------------------------------------------------------

    def run(
        self, idle_timeout: float | None = None, *, progress: Callable[[RelayCounts], None] | None = None
    ) -> RelayCounts:
        """Send whatever comes, until `stop`, or until nothing was due for `idle_timeout` seconds.

        progress: called after every pass with its counts, and at least once in a poll interval. Errors of the database
        and of the broker are logged and waited out. Returns all counts. Raises ConfigurationError.
        """
        total = RelayCounts()
        idle_since = self._clock()
        failures = 0
        nap = _FIRST_NAP
        while not self._stopping:
            try:
                counts = self.run_once()
                failures = 0
            except sa.exc.SQLAlchemyError as error:
                failures += 1
                log.warning("the outbox cannot be read (%s), trying again", _first_line(error))
                counts = RelayCounts(exhausted=False)
                self._sleep(self._pause(failures))
            total += counts
            if progress is not None:
                progress(counts)
            if counts.away:
                idle_since = self._clock()
                self._wakeup.unguard()
                self._sleep(self._pause(self._broker_failures))
            elif counts.claimed or not counts.exhausted:
                idle_since = self._clock()
                nap = _FIRST_NAP
                self._wakeup.unguard()
            else:
                left = self._poll_interval
                if idle_timeout is not None:
                    left = idle_since + idle_timeout - self._clock()
                    if left <= 0:
                        break
                if not self._wakeup.guarded and self._wakeup.guard():
                    continue  # once more, now that nothing can be committed without our hearing of it
                pause = nap if self._wakeup.listening and not self._wakeup.guarded else self._poll_interval
                self._wakeup.wait(min(pause, left))
                nap = min(2 * nap, _LONGEST_NAP, self._poll_interval)
        return total

    def stop(self) -> None:
        """End `run` after the batch that is under way; at once while it sleeps. For good."""
        self._stopping = True
        self._wakeup.stop()

    @property
    def stopping(self) -> bool:
        """True once `stop` was called."""
        return self._stopping

    def run_once(self) -> RelayCounts:
        """Claim one batch of what is due, send it, delete what was confirmed.

        Raises SQLAlchemy's error if the database does not answer; what was claimed then comes back after its lease.
        """
        with self._lock:
            began = self._clock()
            limit = 1 if self._broker_failures else self._batch  # while the broker is away one row is enough to see
            batch = self._step(READ, self._claim, limit)
            if not len(batch):
                return RelayCounts(exhausted=batch.exhausted)
            left = {row.id: row for sequence in batch.sequences for row in sequence}
            try:
                return self._send(batch, left, until=began + self._lease * _USABLE)
            except sa.exc.SQLAlchemyError:
                self._owed = (batch.owner, set(left) - set(self._unmarked))
                raise

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            self._disconnect()
            self._producer.close()
            self._wakeup.close()
            self._watchdog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- looking, and deciding ----------------------------------------------------------------------------

    def backlog(self) -> Backlog:
        """Count what is in the outbox. Reads the whole table: not for every second on a large one."""
        with self._lock, self._transaction(_LONGEST_COUNT) as connection:
            return self._table.backlog(connection)

    def dead(self, *, after: int = 0, limit: int = 100) -> list[DeadRow]:
        """Rows that were given up, by their numbers from `after` on."""
        with self._lock, self._transaction() as connection:
            return self._table.dead(connection, after=after, limit=limit)

    def redrive(self, ids: Iterable[int] | None = None) -> int:
        """Send dead rows again, with fresh attempts: these, or all. Returns how many."""
        return self._decide(ids, lambda connection, some: self._table.redrive(connection, some))

    def discard(self, ids: Iterable[int]) -> int:
        """Delete these dead rows: they will never be sent, and what waits behind them goes on. Returns how many."""
        return self._decide(ids, lambda connection, some: self._table.discard(connection, some))

    def _decide(self, ids: Iterable[int] | None, do: Callable[[sa.Connection, list[int]], int]) -> int:
        chosen = None if ids is None else sorted(set(ids))
        done = after = 0
        while True:
            with self._lock, self._transaction() as connection:
                if chosen is None:
                    some = [row.id for row in self._table.dead(connection, after=after, limit=500)]
                else:
                    some = [identity for identity in chosen if identity > after][:500]
                if not some:
                    return done
                done += do(connection, some)
                after = some[-1]

    # --- one batch ----------------------------------------------------------------------------------------

    def _claim(self, limit: int) -> Batch:
        with self._transaction() as connection:
            if self._unmarked:
                self._table.sent_before(connection, self._unmarked)
            owner, ids = self._owed
            if ids:
                self._table.release(connection, ids, owner)
            assert self._claimer is not None
            batch = self._claimer.claim(connection, limit, self._lease)
        self._unmarked = {}
        self._owed = (b"", set())
        return batch

    def _send(self, batch: Batch, left: dict[int, OutboxRow], *, until: float) -> RelayCounts:
        counts = RelayCounts(claimed=len(batch), exhausted=False)
        fresh = [sequence for sequence in batch.sequences if not sequence[0].attempts]
        # What failed before, or was under way when a relay died, goes by itself: it takes no neighbour along. Shuffled,
        # so that one which kills its relay does not do so before the same others each time.
        alone = [sequence for sequence in batch.sequences if sequence[0].attempts]
        random.shuffle(alone)
        for sequences in [fresh, *([sequence] for sequence in alone)]:
            while sequences:
                part = [sequence.pop(0) for sequence in sequences[: self._stream_length()]]
                if self._clock() >= until or counts.away or (self._stopping and part[0].attempts):
                    sequences = []
                    continue
                outcome = self._publish(part)
                counts += self._settle(batch, outcome, left)
                landed = {row.id for row in outcome.sent}
                # The next of each key, if this one landed; what comes after a failure stays.
                going_on = [rest for row, rest in zip(part, sequences, strict=False) if rest and row.id in landed]
                sequences = [*sequences[len(part) :], *going_on]
        if left:
            with self._transaction() as connection:
                self._table.release(connection, left, batch.owner)
        return counts

    def _stream_length(self) -> int:
        """How many rows are sent at once: as many as the broker takes in a small part of the lease."""
        return min(self._batch, max(10, int(self._rate * self._lease * _STREAM)))

    def _publish(self, part: list[OutboxRow]) -> Outcome:
        began = self._clock()
        outcome: Outcome = self._step(CONFIRM, send, self._producer, part, self._entities, window=min(500, self._batch))
        if outcome.sent:
            self._rate = len(outcome.sent) / max(self._clock() - began, 0.001)
        return outcome

    def _settle(self, batch: Batch, outcome: Outcome, left: dict[int, OutboxRow]) -> RelayCounts:
        """Write down what came of these rows, in one commit; they are settled then, whatever it says."""
        # Neither a row that is suspected already nor an error that is not the broker's tells of the broker: it must not
        # hold up others.
        new = [row for row, _ in outcome.unknown if row.id not in self._suspects]
        away = bool(new) and not outcome.sent and not outcome.strange
        if outcome.sent:
            self._broker_failures = 0
        elif away:
            self._broker_failures += 1
        self._unmarked = {row.id: row.inner_msg_id for row in outcome.sent}
        self._step(MARK, self._mark, batch.owner, outcome)
        for row in (*outcome.sent, *(row for row, _ in (*outcome.refused, *outcome.unknown))):
            left.pop(row.id, None)
        self._unmarked = {}
        if outcome.sent:
            self._suspects = {}
        for row, _ in outcome.unknown:
            self._suspects[row.id] = self._suspects.get(row.id, 0) + 1
        for row, text in outcome.refused:
            log.warning("message %s of the outbox was refused: %s", row.inner_msg_id, text)
        if away:
            log.warning("the broker does not answer: %s", outcome.unknown[0][1])
        return RelayCounts(
            sent=len(outcome.sent),
            duplicates=outcome.duplicates,
            refused=len(outcome.refused),
            unknown=len(outcome.unknown),
            away=away,
            exhausted=False,
        )

    def _mark(self, owner: bytes, outcome: Outcome) -> None:
        table, most = self._table, self._max_attempts
        with self._transaction() as connection:
            if outcome.sent:
                table.sent(connection, [row.id for row in outcome.sent])
                if self._suspects:
                    table.count(connection, self._suspects, most)
            for row, text in outcome.refused:
                later = self._retry_after(row.attempts)
                table.fail(connection, row.id, owner=owner, later=later, most=most, error=text)
            for row, text in outcome.unknown:
                later = self._retry_after(row.attempts + self._suspects.get(row.id, 0))
                table.postpone(connection, row.id, owner=owner, later=later, error=text)

    def _retry_after(self, attempts: int) -> int:
        """Microseconds until a row that failed is tried again."""
        pause = min(_LONGEST_RETRY, _FIRST_RETRY * 2.0 ** min(attempts, 30))
        return round(pause * (0.5 + self._draw() / 2) * _SECOND)

    def _pause(self, failures: int) -> float:
        """Seconds until a server that did not answer is asked again."""
        return min(_LONGEST_PAUSE, 0.25 * 2.0 ** min(failures, 30)) * (0.5 + self._draw() / 2)

    def _sleep(self, seconds: float) -> None:
        until = self._clock() + seconds
        while not self._stopping and (left := until - self._clock()) > 0:
            self._wakeup.wait(left)

    # --- the database ---------------------------------------------------------------------------------------

    @property
    def _table(self) -> Rows:
        assert self._rows is not None
        return self._rows

    @contextlib.contextmanager
    def _transaction(self, limit: float | None = None) -> Iterator[sa.Connection]:
        """A transaction on the relay's own connection, committed at the end. After an error the connection is new.

        limit: seconds that it may take, if not those of the watchdog.
        """
        if self._connection is None:
            self._connect()
        connection = self._connection
        assert connection is not None
        try:
            with self._watched(limit), connection.begin():
                if connection.dialect.name == "postgresql":
                    connection.exec_driver_sql(_NO_LOITERING)
                if connection.dialect.name == "sqlite":
                    driver = connection.connection.dbapi_connection
                    if not getattr(driver, "in_transaction", False):
                        # The write lock first: a transaction that begins by reading may find that it cannot write.
                        connection.exec_driver_sql("BEGIN IMMEDIATE")
                yield connection
        except BaseException:
            self._disconnect()
            raise

    def _connect(self) -> None:
        if self._create:
            schema.create(self._engine, self._tables)
            self._create = False
        elif self._rows is None:
            with self._engine.connect() as connection:
                schema.check_engines(connection, self._tables)
        connection = self._engine.connect()
        self._socket = spare_socket(connection.connection.driver_connection)
        try:
            with self._watched():
                # Others than this lock the gaps in which rows are being added, or refuse what was changed meanwhile.
                self._connection = connection = read_committed(connection)
                if connection.dialect.name in ("mysql", "mariadb"):
                    connection.exec_driver_sql(NO_LOITERING[connection.dialect.name])
                    connection.commit()
        except BaseException:
            self._disconnect()
            raise
        if self._rows is None:
            self._rows = Rows(self._tables, connection.dialect)
            self._claimer = Claimer(self._rows, clock=self._clock)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                # Not for others, nor for us again: after an error it may lead to what is a standby since a failover,
                # and keeps on refusing; and it has settings of ours.
                if connection.dialect.name != "sqlite":
                    connection.invalidate()
                connection.close()
        spare, self._socket = self._socket, None
        if spare is not None:
            spare.close()

    @contextlib.contextmanager
    def _watched(self, limit: float | None = None) -> Iterator[None]:
        if self._socket is None:
            yield
            return
        ticket = self._watchdog.start(self._socket, limit)
        try:
            yield
        finally:
            self._watchdog.stop(ticket)


def redrive_outbox(
    engine: sa.Engine,
    ids: Iterable[int] | None = None,
    *,
    table_prefix: str = schema.PREFIX,
    database_schema: str | None = None,
) -> int:
    """Let dead rows of an outbox be sent again, with fresh attempts: these, or all. Returns how many."""
    with Relay(engine, "memory://", table_prefix=table_prefix, database_schema=database_schema, create=False) as relay:
        return relay.redrive(ids)


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error
    return f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
