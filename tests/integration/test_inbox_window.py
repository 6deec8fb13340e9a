"""Many messages in one commit: one COMMIT for all, and one failing handler takes nobody along."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker
from test_inbox import DATABASES, MEDDLERS, Bench, answers, database_url, lost

from idempotent_bus import Ended, Inbox, Permanent, current_execution
from idempotent_bus.hooks import CLAIM, COMMIT
from idempotent_bus.inbox.running import Transactions
from idempotent_bus.model import Reason
from idempotent_bus.work import Ending, Work

KINDS = (*DATABASES, "session")


class WindowBench(Bench):
    """As a Bench; the cards carry the biz-id, and handlers write with what they are given."""

    def put(self, handed: sa.Connection | Session, card: str) -> str:
        handed.execute(sa.insert(self.table).values(card=card))
        return f"card {card}"

    def works(self, count: int = 6, **handlers: Callable[..., Any]) -> list[Work]:
        """w0 to w5; a keyword names a work whose handler is another."""
        return [self.one(f"w{number}", handlers.get(f"w{number}")) for number in range(count)]

    def one(self, name: str, handler: Callable[..., Any] | None = None, **values: Any) -> Work:
        return self.work(handler or (lambda handed: self.put(handed, name)), name, **values)

    def all_cards(self) -> list[str]:
        with self.engine.connect() as connection:
            return sorted(connection.execute(sa.select(self.table.c.card)).scalars())

    @property
    def commits(self) -> int:
        return self.log.events.count("commit")


def make(kind: str, unique: str, tmp_path: Path, **options: Any) -> WindowBench:
    bench = WindowBench(database_url("postgresql" if kind == "session" else kind, tmp_path), unique, **options)
    if kind == "session":
        bench.inbox = Inbox(sessionmaker(bench.engine), table_prefix=f"{unique}_")
    return bench


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[WindowBench]:
    made = make(request.param, unique, tmp_path)
    yield made
    made.close()


@pytest.fixture
def postgresql(unique: str, tmp_path: Path) -> Iterator[WindowBench]:
    made = make("postgresql", unique, tmp_path)
    yield made
    made.close()


def hows(endings: list[Ending]) -> list[Ended]:
    return [ending.how for ending in endings]


def test_one_commit_for_all_and_then_the_acks_in_order(bench: WindowBench) -> None:
    """I3, I4: every effect and record is in one commit; each ack comes after it; copies get the stored results (I8)."""
    made, works = bench.transactions(), bench.works()
    endings = made.handle_window(works)
    assert endings == [Ending(Ended.COMPLETED, f"card w{number}") for number in range(6)]
    assert [work.settle.answers for work in works] == [[("ack", 6)]] * 6  # type: ignore[attr-defined]
    assert bench.commits == 1
    assert bench.log.order("handler", "commit", "ack") == ["handler"] * 6 + ["commit"] + ["ack"] * 6
    again = bench.works()
    assert made.handle_window(again) == [Ending(Ended.REPLAYED, f"card w{number}") for number in range(6)]
    assert made.handle(bench.one("w3")) == Ending(Ended.REPLAYED, "card w3")
    assert bench.all_cards() == [f"w{number}" for number in range(6)]


def raises(handed: Any) -> None:
    raise ValueError("no")


def test_a_failing_handler_takes_nobody_along(bench: WindowBench) -> None:
    """Its savepoint is rolled back, it is counted in the same commit (I12) and put off; the others are committed."""

    def writes_then_raises(handed: Any) -> None:
        bench.put(handed, "half")
        raise ValueError("no")

    def bad_sql(handed: Any) -> None:
        bench.put(handed, "half")
        handed.execute(sa.text("SELECT * FROM no_such_table"))

    def swallows_in_a_savepoint(handed: Any) -> str:
        with contextlib.suppress(sa.exc.DBAPIError), handed.begin_nested():
            handed.execute(sa.text("SELECT * FROM no_such_table"))
        return bench.put(handed, "w4")

    def permanent(handed: Any) -> None:
        raise Permanent("never")

    made = bench.transactions()
    works = bench.works(w0=writes_then_raises, w2=bad_sql, w3=permanent, w4=swallows_in_a_savepoint)
    expected = [Ended.FAILED, Ended.COMPLETED, Ended.FAILED, Ended.DEAD, Ended.COMPLETED, Ended.COMPLETED]
    assert hows(made.handle_window(works)) == expected
    assert bench.commits == 1
    assert bench.all_cards() == ["w1", "w4", "w5"]
    for name in ("w0", "w2", "w3"):
        assert (bench.record(name).completed, bench.record(name).attempts, bench.record(name).result) == (0, 1, None)
    assert [answers(work) for work in works] == [["wait"], ["ack"], ["wait"], ["dead"], ["ack"], ["ack"]]
    assert works[3].settle.answers[0] == ("dead", Reason.PERMANENT, "idempotent_bus.errors.Permanent: never", 1)  # type: ignore[attr-defined]
    # The next attempt is counted from there, singly.
    again = bench.one("w0", raises, redelivered=True)
    made.handle_window([again, bench.one("x")])
    assert bench.record("w0").attempts == 2
    assert made.handle(bench.one("w0", redelivered=True)).how is Ended.COMPLETED


def test_a_handler_that_fails_as_the_last_one_takes_nobody_along(bench: WindowBench) -> None:
    """One commit for the others: they are not run again singly, whichever place the one that raises has."""
    made = bench.transactions()
    works = [bench.one(f"w{number}", raises if number == 11 else None) for number in range(12)]
    assert hows(made.handle_window(works)) == [Ended.COMPLETED] * 11 + [Ended.FAILED]
    assert bench.commits == 1
    assert len(bench.all_cards()) == 11
    assert hows(made.handle_window([bench.one("x"), bench.one("y")])) == [Ended.COMPLETED] * 2
    assert bench.commits == 2


def test_a_savepoint_that_a_handler_left_open_is_kept_or_undone_with_it(bench: WindowBench) -> None:
    """begin_nested() without an end: what succeeded is kept, what raised is undone, and the next one is not touched."""

    def left_open(handed: Any) -> None:
        handed.begin_nested()
        bench.put(handed, "kept")

    def left_open_and_raises(handed: Any) -> None:
        handed.begin_nested()
        bench.put(handed, "lost")
        raise ValueError

    endings = bench.transactions().handle_window(bench.works(4, w0=left_open, w1=left_open_and_raises))
    assert hows(endings) == [Ended.COMPLETED, Ended.FAILED, Ended.COMPLETED, Ended.COMPLETED]
    assert bench.all_cards() == ["kept", "w2", "w3"]
    assert bench.commits == 1


@pytest.mark.parametrize("mode", ["ORACLE", "ANSI", "TRADITIONAL"])
def test_on_mariadb_in_any_sql_mode(unique: str, mode: str, tmp_path: Path) -> None:
    """The compound statement between two handlers is understood: one commit, nobody taken along."""
    bench = make("mariadb", unique, tmp_path, connect_args={"init_command": f"SET SESSION sql_mode='{mode}'"})
    try:
        endings = hows(bench.transactions().handle_window(bench.works(w1=raises)))
        assert endings == [Ended.COMPLETED, Ended.FAILED, *[Ended.COMPLETED] * 4]
        assert bench.commits == 1
        assert bench.all_cards() == ["w0", "w2", "w3", "w4", "w5"]
    finally:
        bench.close()


def test_redelivered_messages_and_second_copies_are_handled_singly(bench: WindowBench) -> None:
    """What may have died is counted before it runs (I12); a copy within the window meets the commit of the first."""
    made = bench.transactions()
    works = [
        bench.one("a"),
        bench.one("b", redelivered=True),
        bench.one("c"),
        bench.one("a"),
        bench.one("c", body={"id": "c", "sum": 2}),
    ]
    expected = [Ended.COMPLETED, Ended.COMPLETED, Ended.COMPLETED, Ended.REPLAYED, Ended.DEAD]
    assert hows(made.handle_window(works)) == expected
    assert bench.all_cards() == ["a", "b", "c"]
    assert bench.commits == 2
    assert bench.record("b").attempts == 1
    assert works[4].settle.answers[0][1] is Reason.CONFLICT  # type: ignore[attr-defined]


def test_a_busy_record_is_left_out(bench: WindowBench) -> None:
    """Its message is put off, uncounted; its neighbours are handled in one commit, without a long wait."""
    inside, go_on = threading.Event(), threading.Event()

    def slow(handed: Any) -> str:
        bench.put(handed, "w2")
        inside.set()
        go_on.wait(20)
        return "card w2"

    made = bench.transactions()
    runner = threading.Thread(target=made.handle, args=(bench.one("w2", slow),))
    runner.start()
    assert inside.wait(10)
    works, began = bench.works(), time.monotonic()
    endings = hows(made.handle_window(works))
    took = time.monotonic() - began
    go_on.set()
    runner.join(10)
    if bench.engine.dialect.name == "sqlite":  # one writer at a time: there they all are
        assert endings == [Ended.BUSY] * 6
    else:
        expected = [Ended.COMPLETED] * 6
        expected[2] = Ended.BUSY
        assert endings == expected
    assert took < 4.0
    assert poll_all(made, bench)
    assert bench.all_cards() == [f"w{number}" for number in range(6)]
    assert bench.record("w2").attempts == 0


def poll_all(made: Transactions, bench: WindowBench) -> bool:
    """Until every message is answered with an ack."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if set(hows(made.handle_window(bench.works()))) <= {Ended.COMPLETED, Ended.REPLAYED}:
            return True
    return False


@pytest.mark.parametrize("after", [True, False])
def test_a_commit_of_a_window_with_an_unknown_outcome(bench: WindowBench, after: bool) -> None:
    """I15: the messages are handled singly, which tells: one effect and one ack each."""
    made = bench.transactions()
    made.step = lost(bench, after=after)
    works = bench.works(w1=raises)
    endings = hows(made.handle_window(works))
    done = Ended.REPLAYED if after else Ended.COMPLETED
    assert endings == [done, Ended.FAILED, done, done, done, done]
    assert bench.all_cards() == ["w0", "w2", "w3", "w4", "w5"]
    assert all(len(work.settle.answers) == 1 for work in works)  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("name", MEDDLERS)
def test_a_handler_that_ends_the_transaction_takes_nobody_along(bench: WindowBench, name: str, place: int) -> None:
    """I1, I2: nothing is lost for those that had not run, nothing doubled for those that had; the meddler is dead."""
    for goes_on in (False, True):
        prefix = f"g{goes_on:d}"

        def meddle(handed: Any, prefix: str = prefix, goes_on: bool = goes_on) -> None:
            connection = handed.connection() if isinstance(handed, Session) else handed
            bench.put(handed, f"{prefix}m")
            MEDDLERS[name](connection)
            if goes_on:
                with contextlib.suppress(sa.exc.SQLAlchemyError):
                    bench.put(handed, "more")

        works = [bench.one(f"{prefix}{number}") for number in range(6)]
        works[place] = bench.one(f"{prefix}m", meddle)
        mariadb = bench.engine.dialect.name == "mysql" and name in ("raw rollback", "driver's rollback")
        made = bench.transactions(max_attempts=1 if mariadb else 3)
        endings = hows(made.handle_window(works))
        # psycopg refuses a rollback here with an error of its own: then it is a handler that raised.
        refused = name == "driver's rollback" and made.inbox.engine.dialect.name == "postgresql"
        assert endings[place] is Ended.DEAD or (refused and endings[place] is Ended.FAILED)
        assert set(endings[:place] + endings[place + 1 :]) <= {Ended.COMPLETED, Ended.REPLAYED}
        cards = [card for card in bench.all_cards() if card.startswith(prefix)]
        others = [f"{prefix}{number}" for number in range(6) if number != place]
        assert [card for card in cards if card != f"{prefix}m"] == others
        assert cards.count(f"{prefix}m") <= 1


def test_a_meeting_beyond_a_savepoint_repeats_all_singly(postgresql: WindowBench) -> None:
    """A deadlock ends the whole transaction: nothing of the window has happened, and each message is handled singly."""
    bench, met = postgresql, []

    def meets(handed: sa.Connection) -> str:
        if not met:
            met.append(1)
            handed.execute(sa.text("DO $$ BEGIN RAISE EXCEPTION 'meeting' USING ERRCODE = '40P01'; END $$"))
        return bench.put(handed, "w2")

    made = bench.transactions()
    assert hows(made.handle_window(bench.works(w2=meets))) == [Ended.COMPLETED] * 6
    assert bench.all_cards() == [f"w{number}" for number in range(6)]
    assert bench.commits == 6


def test_what_failed_before_is_no_first_delivery(bench: WindowBench) -> None:
    """I12: a record with attempts is run singly, whatever the broker says, and buried when they are used up."""
    made = bench.transactions(max_attempts=2)
    made.handle(bench.one("w1", raises))
    assert hows(made.handle_window(bench.works(3, w1=raises))) == [Ended.COMPLETED, Ended.DEAD, Ended.COMPLETED]
    assert bench.commits == 1
    assert bench.all_cards() == ["w0", "w2"]


def test_a_consumer_that_is_told_to_stop_breaks_a_window_off(bench: WindowBench) -> None:
    """Nothing of it has happened, and nothing is answered: the broker brings it again."""

    class Stopped(BaseException):
        pass

    class Works(list[Work]):
        def __iter__(self) -> Iterator[Work]:
            for number in range(len(self)):
                if number == 3:
                    raise Stopped
                yield self[number]

    works = Works(bench.works())
    with pytest.raises(Stopped):
        bench.transactions().handle_window(works)
    assert bench.all_cards() == []
    assert all(not works[number].settle.answers for number in range(6))  # type: ignore[attr-defined]
    assert set(hows(bench.transactions().handle_window(bench.works()))) == {Ended.COMPLETED}


def test_a_database_that_is_away_is_not_asked_for_each(bench: WindowBench) -> None:
    """I9: nothing runs and nothing is acked; after the first answer is missing the rest is put off at once."""
    made = bench.transactions()
    tries: list[int] = []

    def away(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if name in (CLAIM, COMMIT):
            tries.append(1)
            raise sa.exc.OperationalError("claim", {}, Exception("server is away"))
        return bench.log(name, function, *args, **kwargs)

    made.step = away
    works = bench.works()
    assert hows(made.handle_window(works)) == [Ended.IN_DOUBT] * 6
    assert [answers(work) for work in works] == [["wait"]] * 6
    assert len(tries) == 2


def test_handlers_know_their_execution(bench: WindowBench) -> None:
    """current_execution() is each handler's own, also in a window."""
    seen: list[tuple[str, int]] = []

    def looks(handed: Any) -> None:
        execution = current_execution()
        seen.append((execution.biz_id, execution.attempt))

    bench.transactions().handle_window([bench.one("a", looks), bench.one("b", looks)])
    assert seen == [("a", 1), ("b", 1)]


def test_two_windows_over_the_same_messages(bench: WindowBench) -> None:
    """I2: two consumers with the same 40 messages in opposite order, at once: one effect each, none stuck."""
    names = [f"n{number:02}" for number in range(40)]
    results: list[set[Ended]] = []

    def consume(order: list[str]) -> None:
        made = bench.transactions(busy_delay=0.01)
        left = order
        deadline = time.monotonic() + 60
        while left and time.monotonic() < deadline:
            endings = []
            for begin in range(0, len(left), 10):
                endings += made.handle_window([bench.one(name) for name in left[begin : begin + 10]])
            done = [ending.how in (Ended.COMPLETED, Ended.REPLAYED) for ending in endings]
            left = [name for name, finished in zip(left, done, strict=True) if not finished]
        results.append(set(left))  # type: ignore[arg-type]

    bench.transactions().handle(bench.one("warm-up"))
    threads = [threading.Thread(target=consume, args=(order,)) for order in (names, names[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert results == [set(), set()]
    assert bench.all_cards() == [*names, "warm-up"]
