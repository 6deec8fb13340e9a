"""The inbox on SQLite and PostgreSQL: effect and record in one commit, whatever happens around it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import servers
from consumer_rig import Log, poll
from idempotent_bus import Backoff, ConfigurationError, Ended, Inbox, Permanent, schema
from idempotent_bus.hooks import COMMIT
from idempotent_bus.identity import fingerprint, record_key
from idempotent_bus.inbox.running import Transactions
from idempotent_bus.model import Reason
from idempotent_bus.policy import Policy
from idempotent_bus.work import Ending, Work
from proxy import Proxy, through

DATABASES = ("sqlite", "postgresql", "mariadb")


class Delivery:
    """How one delivery was answered, and what was committed at that moment."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.answers: list[tuple[Any, ...]] = []

    def ack(self) -> None:
        self.answers.append(("ack", self.bench.cards()))

    def wait(self, delay: float) -> None:
        self.answers.append(("wait", delay))

    def dead_letter(self, reason: Reason, error: str, attempts: int) -> bool:
        self.answers.append(("dead", reason, error, attempts))
        return True


#: A policy whose records are soon forgotten.
BRIEF: Any = {"lease": 0.05, "retention": 0.09, "busy_delay": 0.01, "backoff": Backoff(0.01, 0.02)}


class Bench:
    """One database with a table of cards without a unique constraint, so that a double shows."""

    def __init__(self, url: str, unique: str, **options: Any) -> None:
        self.url, self.unique = url, unique
        self.engine = sa.create_engine(url, **options)
        self.table = sa.Table(
            f"{unique}_cards", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("card", sa.Text)
        )
        self.table.create(self.engine, checkfirst=True)
        self.inbox = Inbox(self.engine, table_prefix=f"{unique}_")
        self.log = Log()

    def transactions(self, **policy: Any) -> Transactions:
        made = Policy(**{"max_attempts": 3, "backoff": Backoff(0.1, 0.1), "busy_delay": 0.1, **policy})
        return Transactions(self.inbox, made, draw=lambda: 0.5, step=self.log)

    def work(self, run: Callable[[sa.Connection], Any] | None = None, biz_id: str = "a", **values: Any) -> Work:
        """A delivery; by default its handler issues a card. body: what the fingerprint is made of."""
        body = values.pop("body", {"id": biz_id})
        return Work(
            scope="cards", biz_id=biz_id, key=record_key("cards", biz_id), run=run or self.issue,
            settle=Delivery(self), fingerprint=fingerprint(body), **values,
        )  # fmt: skip

    def issue(self, connection: sa.Connection) -> str:
        connection.execute(sa.insert(self.table).values(card="a"))
        return "card"

    def cards(self) -> int:
        with self.engine.connect() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(self.table)).scalar_one())

    def record(self, biz_id: str = "a") -> Any:
        with self.engine.connect() as connection:
            table = schema.inbox(self.inbox._tables)
            return connection.execute(sa.select(table).where(table.c.record_key == record_key("cards", biz_id))).first()

    def close(self) -> None:
        if self.engine.dialect.name != "sqlite":
            with self.engine.begin() as connection:
                connection.execute(sa.text(f"DROP TABLE IF EXISTS {self.unique}_cards, {self.unique}_inbox"))
        self.engine.dispose()


def database_url(name: str, tmp_path: Path) -> str:
    if name == "sqlite":
        return f"sqlite:///{tmp_path}/cards.db?timeout=0.5"
    return servers.postgresql() if name == "postgresql" else servers.mariadb()


@pytest.fixture(params=DATABASES)
def bench(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(database_url(request.param, tmp_path), unique)
    yield made
    made.close()


@pytest.fixture
def postgresql(unique: str) -> Iterator[Bench]:
    made = Bench(servers.postgresql(), unique)
    yield made
    made.close()


def answers(work: Work) -> list[str]:
    return [answer[0] for answer in work.settle.answers]  # type: ignore[attr-defined]


# --- the happy path and its copies ---------------------------------------------------------------------


def test_record_and_effect_commit_together_and_then_the_ack(bench: Bench) -> None:
    """I3, I4: when the broker is answered, both are committed; a copy is acked with the stored result (I8)."""
    work, copy = bench.work(), bench.work()
    made = bench.transactions()
    assert made.handle(work) == Ending(Ended.COMPLETED, "card")
    assert work.settle.answers == [("ack", 1)]  # type: ignore[attr-defined]
    assert made.handle(copy) == Ending(Ended.REPLAYED, "card")
    assert copy.settle.answers == [("ack", 1)]  # type: ignore[attr-defined]
    assert bench.log.order("claim done", "handler", "commit done", "ack") == [
        "claim done", "handler", "commit done", "ack", "claim done", "ack",
    ]  # fmt: skip


def test_a_raising_handler_leaves_neither(bench: Bench) -> None:
    """I3: what a handler raises rolls back its writes and the record; the attempt is counted apart (I12)."""

    def fail(connection: sa.Connection) -> None:
        bench.issue(connection)
        raise ValueError("no")

    made = bench.transactions(max_attempts=2)
    first, second = bench.work(fail), bench.work(fail)
    assert made.handle(first).how is Ended.FAILED
    assert answers(first) == ["wait"]
    assert (bench.cards(), bench.record().completed, bench.record().attempts) == (0, 0, 1)
    assert made.handle(second).how is Ended.DEAD
    assert second.settle.answers == [("dead", Reason.ATTEMPTS, "ValueError: no", 2)]  # type: ignore[attr-defined]
    assert bench.cards() == 0
    redriven = bench.work(redrive=1)
    assert made.handle(redriven).how is Ended.COMPLETED
    assert bench.cards() == 1


def test_a_permanent_error_is_dead_at_once(bench: Bench) -> None:
    """No rerun can mend it, so there is none."""

    def fail(connection: sa.Connection) -> None:
        raise Permanent("never")

    work = bench.work(fail)
    assert bench.transactions().handle(work).how is Ended.DEAD
    assert work.settle.answers[0][:2] == ("dead", Reason.PERMANENT)  # type: ignore[attr-defined]


def test_another_body_is_a_conflict(bench: Bench) -> None:
    """I8: completed with another fingerprint: the dead letter, and no effect."""
    made = bench.transactions()
    made.handle(bench.work())
    other = bench.work(body={"id": "a", "sum": 2})
    assert made.handle(other).how is Ended.DEAD
    assert other.settle.answers[0][:2] == ("dead", Reason.CONFLICT)  # type: ignore[attr-defined]
    assert bench.cards() == 1


def test_after_its_retention_a_record_is_forgotten_with_its_result(bench: Bench) -> None:
    """A biz-id that comes again after the retention runs again, and leaves no result of the earlier run behind."""
    made = bench.transactions(**BRIEF)
    assert made.handle(bench.work()).value == "card"
    time.sleep(0.15)
    assert made.handle(bench.work(lambda connection: None)).how is Ended.COMPLETED
    assert bench.record().result is None
    longer = bench.transactions()
    time.sleep(0.15)
    longer.handle(bench.work(lambda connection: None))
    assert longer.handle(bench.work()) == Ending(Ended.REPLAYED, None)


def test_purge_deletes_what_is_over_and_nothing_else(bench: Bench) -> None:
    """In bounded batches, until 0 comes back."""
    brief, long = bench.transactions(**BRIEF), bench.transactions()
    for number in range(5):
        brief.handle(bench.work(biz_id=f"old{number}"))
    long.handle(bench.work(biz_id="new"))
    time.sleep(0.15)
    assert [bench.inbox.purge(limit=3), bench.inbox.purge(limit=3), bench.inbox.purge(limit=3)] == [3, 2, 0]
    assert bench.record("new") is not None


def test_a_purge_spares_a_record_that_is_being_used_again(postgresql: Bench) -> None:
    """I2: a record that is over is being completed anew: a purge neither waits for it nor deletes it."""
    bench = postgresql
    bench.transactions(**BRIEF).handle(bench.work())
    time.sleep(0.15)
    inside, go_on = threading.Event(), threading.Event()

    def slow(connection: sa.Connection) -> None:
        bench.issue(connection)
        inside.set()
        go_on.wait(10)

    runner = threading.Thread(target=bench.transactions().handle, args=(bench.work(slow),))
    runner.start()
    assert inside.wait(10)
    purged = bench.inbox.purge()
    go_on.set()
    runner.join(10)
    assert purged == 0, "what is in use is passed over"
    assert bench.inbox.purge() == 0
    copy = bench.work()
    assert bench.transactions().handle(copy).how is Ended.REPLAYED


# --- copies at the same time ---------------------------------------------------------------------------


def test_a_copy_waits_briefly_and_is_then_put_off(bench: Bench) -> None:
    """I2: while the first holds its record a copy is busy: no effect, no attempt, no long wait. Then it is a replay."""
    inside, go_on = threading.Event(), threading.Event()

    def slow(connection: sa.Connection) -> str:
        bench.issue(connection)
        inside.set()
        go_on.wait(20)
        return "card"

    made, first = bench.transactions(), bench.work(slow)
    runner = threading.Thread(target=made.handle, args=(first,))
    runner.start()
    assert inside.wait(10)
    for redelivered in (False, True):
        copy = bench.work(redelivered=redelivered)
        started = time.monotonic()
        assert made.handle(copy).how is Ended.BUSY
        assert time.monotonic() - started < 3.0
        assert answers(copy) == ["wait"]
    go_on.set()
    runner.join(10)
    late = bench.work(redelivered=True)
    assert made.handle(late) == Ending(Ended.REPLAYED, "card")
    assert bench.cards() == 1
    assert bench.record().attempts == 0, "being busy is no attempt"


def test_eight_processes_one_effect_each(bench: Bench, tmp_path: Path) -> None:
    """I2: eight processes, each with the same 40 messages, tables made in a race: 40 effects, 320 answers."""
    results = race(bench, 8, 40)
    assert sum(result["completed"] for result in results) == 40
    assert sum(result["completed"] + result["replayed"] for result in results) == 320
    assert bench.cards() == 40


RACER = """
import json, sys, time
from collections import Counter
sys.path[:0] = {path!r}
from test_inbox import Bench
from idempotent_bus.work import Ended
bench = Bench({url!r}, {unique!r})
made = bench.transactions()
while time.time() < {start}: time.sleep(0.001)
counts = Counter()
for number in range({messages}):
    while True:
        ending = made.handle(bench.work(biz_id=str(number)))
        if ending.how in (Ended.COMPLETED, Ended.REPLAYED):
            counts[ending.how.value] += 1
            break
print(json.dumps({{"completed": counts["completed"], "replayed": counts["replayed"]}}))
"""


def race(bench: Bench, processes: int, messages: int) -> list[dict[str, int]]:
    import json

    path = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script = RACER.format(path=path, url=bench.url, unique=bench.unique, start=time.time() + 2.0, messages=messages)
    racers = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    return [json.loads(racer.communicate(timeout=120)[0]) for racer in racers]


# --- a COMMIT whose outcome is not known ----------------------------------------------------------------


def lost(bench: Bench, *, after: bool, times: int = 1) -> Callable[..., Any]:
    """A step whose COMMITs are done, or not, and then look as if the connection had broken."""
    left = [times]

    def step(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if name != COMMIT or not left[0]:
            return bench.log(name, function, *args, **kwargs)
        left[0] -= 1
        if after:
            function(*args, **kwargs)
        raise sa.exc.OperationalError("COMMIT", {}, Exception("server closed the connection"))

    return step


@pytest.mark.parametrize("after", [True, False])
def test_a_commit_with_an_unknown_outcome_is_settled_by_inserting_again(bench: Bench, after: bool) -> None:
    """I15: whether the COMMIT was done or not, the outcome is learnt, and there is one effect and one ack."""
    made = bench.transactions()
    made.step = lost(bench, after=after)
    work = bench.work()
    ending = made.handle(work)
    assert ending == Ending(Ended.REPLAYED if after else Ended.COMPLETED, "card")
    assert work.settle.answers == [("ack", 1)]  # type: ignore[attr-defined]
    assert bench.cards() == 1


def test_a_commit_that_never_succeeds_is_an_attempt(bench: Bench) -> None:
    """I12: a handler whose transaction never ends well (an idle timeout of the server, say) is not run for ever."""
    made = bench.transactions(max_attempts=2)
    made.step = lost(bench, after=False, times=100)
    first, second = bench.work(), bench.work()
    assert made.handle(first).how is Ended.IN_DOUBT
    assert answers(first) == ["wait"]
    assert made.handle(second).how is Ended.DEAD
    assert bench.cards() == 0


def test_a_run_whose_commit_stays_unclear_is_one_attempt(bench: Bench) -> None:
    """I12: a redelivered message is counted before it runs, and not again after it; at the last one it is dead."""
    made = bench.transactions(max_attempts=3)
    answers = []
    for _ in range(3):
        made.step = lost(bench, after=False, times=4)
        answers.append(made.handle(bench.work(redelivered=True)).how)
        assert bench.record().attempts == len(answers) or answers[-1] is Ended.DEAD
    assert answers == [Ended.IN_DOUBT, Ended.IN_DOUBT, Ended.DEAD]
    assert bench.cards() == 0


def test_the_last_run_whose_commit_stays_unclear_but_was_done_is_no_dead_letter(bench: Bench) -> None:
    """I4, I15: counting it meets the record, so it comes back, and then it is a replay."""
    made = bench.transactions(max_attempts=1)
    steps = iter([False, False, False, True])

    def step(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if name != COMMIT:
            return bench.log(name, function, *args, **kwargs)
        return lost(bench, after=next(steps))(name, function, *args, **kwargs)

    made.step = step
    assert made.handle(bench.work(redelivered=True)).how is Ended.IN_DOUBT
    made.step = bench.log
    assert made.handle(bench.work(redelivered=True)).how is Ended.REPLAYED
    assert bench.cards() == 1


def test_a_deferred_constraint_is_the_handlers_failure(postgresql: Bench) -> None:
    """What the database refuses at COMMIT is known not to be committed: an attempt, not a doubt for ever."""
    bench = postgresql
    name = f"{bench.unique}_child"
    with bench.engine.begin() as connection:
        connection.execute(
            sa.text(
                f"CREATE TABLE {name} (parent int REFERENCES {bench.unique}_cards (id) DEFERRABLE INITIALLY DEFERRED)"
            )
        )

    def orphan(connection: sa.Connection) -> None:
        connection.execute(sa.text(f"INSERT INTO {name} VALUES (7)"))

    try:
        made = bench.transactions(max_attempts=2)
        assert made.handle(bench.work(orphan)).how is Ended.FAILED
        last = bench.work(orphan)
        assert made.handle(last).how is Ended.DEAD
        assert "IntegrityError" in last.settle.answers[0][2]  # type: ignore[attr-defined]
    finally:
        with bench.engine.begin() as connection:
            connection.execute(sa.text(f"DROP TABLE {name}"))


def test_a_commit_reply_that_the_network_lost(unique: str) -> None:
    """I2, I15 through a real socket: the reply to COMMIT is swallowed twenty times; one effect and one ack each."""
    direct = Bench(servers.postgresql(), unique)
    with Proxy(url=servers.postgresql()) as proxy:
        bench = Bench(through(proxy, servers.postgresql()), unique)
        made = bench.transactions()
        made.handle(bench.work(biz_id="warm-up"))
        for number in range(20):
            proxy.lose_reply(b"COMMIT")
            work = bench.work(biz_id=str(number))
            work.settle = Delivery(direct)
            while made.handle(work).how not in (Ended.COMPLETED, Ended.REPLAYED):
                pass
            assert work.settle.answers[-1] == ("ack", number + 2)
        assert proxy.done["lose_reply"] == 20
        bench.engine.dispose()
    assert direct.cards() == 21
    direct.close()


# --- transactions that meet ------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_deadlocks_and_serialization_failures_repeat_the_whole_transaction(unique: str, level: str) -> None:
    """Two handlers that lock each other's rows, eight times over: one effect each, nobody fails."""
    bench = Bench(servers.postgresql(), unique, isolation_level=level)
    with bench.engine.begin() as connection:
        connection.execute(sa.insert(bench.table), [{"card": "x"}, {"card": "y"}])
    endings: list[Ending] = []
    runs: list[int] = []

    def handler(order: tuple[int, int]) -> Callable[[sa.Connection], None]:
        def run(connection: sa.Connection) -> None:
            runs.append(1)
            for row in order:
                connection.execute(
                    sa.update(bench.table).where(bench.table.c.id == row).values(card=bench.table.c.card + "+")
                )
                time.sleep(0.02)

        return run

    def handle_all(name: str, order: tuple[int, int]) -> None:
        made = bench.transactions(max_attempts=50)
        for number in range(8):
            work = bench.work(handler(order), biz_id=f"{name}{number}")
            while (ending := made.handle(work)).how in (Ended.BUSY, Ended.IN_DOUBT, Ended.FAILED):
                pass
            endings.append(ending)

    try:
        threads = [threading.Thread(target=handle_all, args=args) for args in (("p", (1, 2)), ("q", (2, 1)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [ending.how for ending in endings] == [Ended.COMPLETED] * 16
        with bench.engine.connect() as connection:
            values = connection.execute(sa.select(bench.table.c.card).order_by(bench.table.c.id)).scalars().all()
        assert values == ["x" + "+" * 16, "y" + "+" * 16]
        assert len(runs) > 16, "they never met: nothing was shown"
    finally:
        bench.close()


# --- handlers that meddle ---------------------------------------------------------------------------------


def test_a_swallowed_error_is_not_taken_for_success(postgresql: Bench) -> None:
    """PostgreSQL would answer COMMIT with a quiet ROLLBACK: nothing is acked, and the handler's error is named."""
    bench = postgresql

    def swallow(connection: sa.Connection) -> str:
        bench.issue(connection)
        with contextlib.suppress(sa.exc.DBAPIError):
            connection.execute(sa.text("SELECT 1 / 0"))
        return "all is well"

    work = bench.work(swallow)
    assert bench.transactions().handle(work).how is Ended.FAILED
    assert answers(work) == ["wait"]
    assert bench.cards() == 0
    # The control: the same in a transaction of one's own. Nothing is raised, and nothing is there.
    with bench.engine.begin() as connection:
        swallow(connection)
    assert bench.cards() == 0


def test_a_savepoint_around_what_may_fail_is_fine(bench: Bench) -> None:
    """An error inside begin_nested() is the handler's to swallow."""

    def careful(connection: sa.Connection) -> str:
        try:
            with connection.begin_nested():
                connection.execute(sa.text("SELECT * FROM no_such_table"))
        except sa.exc.DBAPIError:
            pass
        return bench.issue(connection)

    assert bench.transactions().handle(bench.work(careful)).how is Ended.COMPLETED
    assert bench.cards() == 1


MEDDLERS: dict[str, Callable[[sa.Connection], Any]] = {
    "commit": lambda connection: connection.commit(),
    "rollback": lambda connection: connection.rollback(),
    "close": lambda connection: connection.close(),
    "raw commit": lambda connection: connection.exec_driver_sql("COMMIT"),
    "raw rollback": lambda connection: connection.exec_driver_sql("ROLLBACK"),
    "driver's rollback": lambda connection: connection.connection.dbapi_connection.rollback(),  # type: ignore[union-attr]
}


def returns_a_result(bench: Bench, connection: sa.Connection) -> str:
    return "card"


def returns_nothing(bench: Bench, connection: sa.Connection) -> None:
    return None


def goes_on(bench: Bench, connection: sa.Connection) -> None:
    """Into a transaction of its own, which looks like the one that it was given."""
    with contextlib.suppress(sa.exc.InvalidRequestError):  # a closed connection
        connection.execute(sa.text(f"UPDATE {bench.unique}_cards SET card = card"))


AFTERWARDS = (returns_a_result, returns_nothing, goes_on)


@pytest.mark.parametrize("afterwards", AFTERWARDS, ids=[each.__name__ for each in AFTERWARDS])
@pytest.mark.parametrize("name", MEDDLERS)
def test_ending_the_transaction_is_refused_loudly(bench: Bench, name: str, afterwards: Callable[..., Any]) -> None:
    """The transaction is the library's to end: a handler that does so finds its message in the dead letter."""

    def run(connection: sa.Connection) -> Any:
        bench.issue(connection)
        MEDDLERS[name](connection)
        return afterwards(bench, connection)

    work = bench.work(run)
    # MariaDB rolls all of it back at a deadlock: a roll-back there may not be the handler's doing.
    by_itself = bench.engine.dialect.name == "mysql" and name in ("raw rollback", "driver's rollback")
    made = bench.transactions(max_attempts=1 if by_itself else 3)
    assert made.handle(work).how is Ended.DEAD
    reason = Reason.ATTEMPTS if by_itself else Reason.PERMANENT
    assert work.settle.answers[0][:2] == ("dead", reason)  # type: ignore[attr-defined]
    assert "transaction" in work.settle.answers[0][2]  # type: ignore[attr-defined]
    copy = bench.work(redrive=1)
    bench.transactions().handle(copy)
    assert bench.cards() == 1, "at most one effect, whatever the handler did"


def test_a_handler_that_commits_half_and_then_raises_is_found_out(bench: Bench) -> None:
    """I2: what it committed is there, and the rest is not: the dead letter, not a quiet replay."""

    def run(connection: sa.Connection) -> None:
        bench.issue(connection)
        connection.exec_driver_sql("COMMIT")
        connection.execute(sa.text("SELECT * FROM no_such_table"))

    work = bench.work(run)
    assert bench.transactions().handle(work).how is Ended.DEAD
    assert work.settle.answers[0][:2] == ("dead", Reason.PERMANENT)  # type: ignore[attr-defined]
    assert bench.cards() == 1


def test_an_engine_in_autocommit_is_refused(unique: str, tmp_path: Path) -> None:
    """I3: there record and effect would be two commits; refused before anything is written."""
    for name in DATABASES:
        bench = Bench(database_url(name, tmp_path), unique)
        engine = sa.create_engine(bench.url, isolation_level="AUTOCOMMIT")
        bench.inbox = Inbox(engine, table_prefix=f"{unique}_")
        with pytest.raises(ConfigurationError, match="autocommit"):
            bench.transactions().handle(bench.work())
        assert (bench.cards(), bench.record()) == (0, None)
        engine.dispose()
        bench.close()


def test_sqlite_with_a_begin_of_its_own_works(unique: str, tmp_path: Path) -> None:
    """SQLAlchemy's recipe for SQLite (no implicit BEGIN, one of the engine's own) is no autocommit."""
    bench = Bench(database_url("sqlite", tmp_path), unique)

    @sa.event.listens_for(bench.engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(bench.engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    assert bench.transactions().handle(bench.work()).how is Ended.COMPLETED

    def fail(connection: sa.Connection) -> None:
        bench.issue(connection)
        raise ValueError

    assert bench.transactions().handle(bench.work(fail, biz_id="b")).how is Ended.FAILED
    assert bench.cards() == 1
    bench.close()


def test_the_sessions_own_settings_stay(postgresql: Bench) -> None:
    """The handler meets the lock_timeout that the engine set for its sessions, and so does whoever comes after it."""
    bench, seen = postgresql, []

    @sa.event.listens_for(bench.engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.execute("SET lock_timeout = '7s'")
        connection.commit()

    bench.engine.dispose()

    def look(connection: sa.Connection) -> None:
        seen.append(connection.execute(sa.text("SHOW lock_timeout")).scalar())

    assert bench.transactions().handle(bench.work(look)).how is Ended.COMPLETED
    with bench.engine.connect() as connection:
        look(connection)
    assert seen == ["7s", "7s"]


# --- deaths and doubt ----------------------------------------------------------------------------------------


def test_deaths_are_counted_and_bounded(bench: Bench) -> None:
    """I12: a message that kills its worker is run max_attempts + 1 times, then it is in the dead letter."""

    class Killed(BaseException):
        pass

    runs = []

    def die(connection: sa.Connection) -> None:
        runs.append(1)
        bench.issue(connection)
        raise Killed

    made = bench.transactions(max_attempts=3)
    with pytest.raises(Killed):
        made.handle(bench.work(die))
    for _ in range(3):
        with pytest.raises(Killed):
            made.handle(bench.work(die, redelivered=True))
    last = bench.work(die, redelivered=True)
    assert made.handle(last).how is Ended.DEAD
    assert last.settle.answers == [("dead", Reason.ATTEMPTS, "the attempts are used up", 3)]  # type: ignore[attr-defined]
    assert len(runs) == 4
    assert bench.cards() == 0


def test_a_redelivery_of_what_is_done_is_not_counted(bench: Bench) -> None:
    """A completed record stays as it is however often its message comes back."""
    made = bench.transactions()
    made.handle(bench.work())
    for _ in range(5):
        assert made.handle(bench.work(redelivered=True)) == Ending(Ended.REPLAYED, "card")
    assert (bench.record().completed, bench.record().attempts) == (1, 0)


def test_a_database_that_is_away_means_no_run_and_no_ack(unique: str) -> None:
    """I9: refused, stalled or cut: nothing runs, nothing is acked; when it is back the message is handled once."""
    with Proxy(url=servers.postgresql()) as proxy:
        url = through(proxy, servers.postgresql()) + "?connect_timeout=2"
        bench = Bench(url, unique)
        made = bench.transactions()
        made.handle(bench.work(biz_id="warm-up"))
        proxy.refuse()
        proxy.cut()
        ran: list[int] = []
        for redelivered in (False, True):
            work = bench.work(lambda connection: ran.append(1), redelivered=redelivered)
            assert made.handle(work).how is Ended.IN_DOUBT
            assert answers(work) == ["wait"]
        assert not ran
        proxy.accept_again()
        assert made.handle(bench.work()).how is Ended.COMPLETED
        assert bench.cards() == 2
        bench.close()


def test_a_backend_that_is_terminated_in_the_handler(postgresql: Bench) -> None:
    """pg_terminate_backend in mid-handler: rolled back, tried again, one effect."""
    bench = postgresql
    times = [1]

    def run(connection: sa.Connection) -> None:
        bench.issue(connection)
        if times:
            times.pop()
            pid = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar()
            with bench.engine.connect() as other:
                other.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
            connection.execute(sa.text("SELECT 1"))

    made = bench.transactions()
    assert made.handle(bench.work(run)).how is Ended.FAILED
    assert made.handle(bench.work(run)).how is Ended.COMPLETED
    assert bench.cards() == 1


def test_a_pooled_connection_that_died_meanwhile_is_no_failure(postgresql: Bench) -> None:
    """A database restart between two messages: the dead connection in the pool is replaced at once."""
    bench = postgresql
    made = bench.transactions()
    made.handle(bench.work(biz_id="warm-up"))
    other = sa.create_engine(bench.url)
    with bench.engine.connect() as mine, other.connect() as killer:
        pid = mine.execute(sa.text("SELECT pg_backend_pid()")).scalar()
        mine.rollback()
        killer.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    other.dispose()
    time.sleep(0.15)
    assert made.handle(bench.work()).how is Ended.COMPLETED


@pytest.mark.parametrize("bench", [name for name in DATABASES if name != "sqlite"], indirect=True)
def test_a_pooled_connection_to_what_became_a_standby_is_replaced(bench: Bench) -> None:
    """After a failover: it would refuse all writes for ever, and a new one may lead to the new primary."""
    read_only = "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"
    if bench.engine.dialect.name == "mysql":
        read_only = "SET SESSION TRANSACTION READ ONLY"
    made = bench.transactions()
    made.handle(bench.work(biz_id="warm-up"))
    with bench.engine.connect() as mine:
        mine.exec_driver_sql(read_only)
        mine.commit()
    assert made.handle(bench.work()).how is Ended.COMPLETED


def test_brokers_errors_are_not_taken_for_the_databases(bench: Bench) -> None:
    """Where broker and inbox are both SQL databases: an ack that fails is the broker's trouble, and comes out."""
    made = bench.transactions()

    class Broken(Delivery):
        def ack(self) -> None:
            raise sa.exc.OperationalError("ack", {}, Exception("database is locked"))

    work = bench.work()
    work.settle = Broken(bench)
    with pytest.raises(sa.exc.OperationalError):
        made.handle(work)
    assert work.settle.answers == [], "it was committed: neither busy nor in doubt"
    assert bench.cards() == 1


def test_sqlite_under_contention_handles_all(unique: str, tmp_path: Path) -> None:
    """Somebody writes to the same SQLite file all the time: busy is put off, everything is handled once."""
    bench = Bench(database_url("sqlite", tmp_path), unique)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            with bench.engine.begin() as connection:
                connection.execute(sa.text(f"UPDATE {bench.unique}_cards SET card = card"))
                time.sleep(0.02)
            time.sleep(0.005)  # SQLite's lock has no queue: a writer without any pause can starve others for long

    writer = threading.Thread(target=write)
    writer.start()
    made = bench.transactions()
    try:
        for number in range(10):
            work = bench.work(biz_id=str(number))
            assert poll(lambda: made.handle(work).how is Ended.COMPLETED, timeout=20)  # noqa: B023 - called at once
    finally:
        stop.set()
        writer.join(10)
    assert bench.cards() == 10
    bench.close()
