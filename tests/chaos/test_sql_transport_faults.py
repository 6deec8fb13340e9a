"""The SQL transport under kills, stops, lost answers and restarts, beside kombu's own as the control."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from kombu import Connection, Queue

from idempotent_bus.model import Landing
from idempotent_bus.transports.sql.database import Database, open_database
from idempotent_bus.transports.sql.lease import LeaseKeeper
from sql_bus import DIALECTS, Bus, deliveries, drop, eventually, lines, open_bus

LONG = bool(os.environ.get("IDEMPOTENT_BUS_LONG"))


@pytest.fixture(params=DIALECTS)
def bus(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Bus]:
    bus = open_bus(request.param, unique, tmp_path, visibility_timeout=1.0)
    yield bus
    drop(bus)


@pytest.fixture
def sqlite(unique: str, tmp_path: Path) -> Iterator[Bus]:
    bus = open_bus("sqlite", unique, tmp_path, visibility_timeout=1.0)
    yield bus
    drop(bus)


def kill(program: subprocess.Popen[str]) -> None:
    program.send_signal(signal.SIGKILL)
    program.communicate()


def until_it_prints(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    return program.stdout.readline().strip()


HOLD = """
with {connect} as connection:
    for message in deliveries(connection, bus.queue, prefetch=10, idle=10):
        print(message.payload)
        time.sleep({hold})
        message.ack()
        print("acked")
"""
OURS, PLAIN = "bus.connect()", "bus.plain()"


def test_a_killed_consumer_loses_nothing(bus: Bus) -> None:
    """After SIGKILL what was delivered and what was taken ahead come back, once each."""
    with bus.connect() as connection:
        for n in range(8):
            bus.publish(connection, n, str(n))
        consumer = bus.program(HOLD.format(connect=OURS, hold=60))
        assert until_it_prints(consumer) == "0"
        kill(consumer)
        redelivered = {}
        for message in deliveries(connection, bus.queue, idle=4):
            assert message.payload not in redelivered
            redelivered[message.payload] = message.delivery_info.get("redelivered", False)
            message.ack()
        assert sorted(redelivered) == [*range(8)]
        assert redelivered[0] is True


def test_control_plain_kombu_loses_it(sqlite: Bus) -> None:
    """The control: with kombu's own transport the message of a killed consumer never comes back."""
    sqlite.options.clear()
    # Each in a process of its own: kombu keeps the first table names that a process used, for all its connections.
    publish = "with bus.plain() as connection:\n    for n in range(3): bus.publish(connection, n)"
    assert lines(sqlite.program(publish)) == []
    consumer = sqlite.program(HOLD.format(connect=PLAIN, hold=60))
    assert until_it_prints(consumer) == "0"
    kill(consumer)
    time.sleep(2)
    read = "with bus.plain() as connection:\n    for m in deliveries(connection, bus.queue, idle=2): print(m.payload)"
    assert lines(sqlite.program(read)) == ["1", "2"]


def _lose_answers(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, every: int) -> list[int]:
    """Of the commits on this engine every n-th is done, and its answer lost."""
    commits = [0]
    real, failure = engine.dialect.do_commit, engine.dialect.import_dbapi().OperationalError

    def do_commit(connection: Any) -> None:
        real(connection)
        commits[0] += 1
        if commits[0] % every == 0:
            raise failure("the answer to COMMIT was lost")

    monkeypatch.setattr(engine.dialect, "do_commit", do_commit)
    return commits


RETRY = {"retry": True, "retry_policy": {"max_retries": 5, "interval_start": 0, "interval_step": 0}}


def test_lost_commit_answers_land_once(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishes whose first COMMIT succeeded without an answer, resent by kombu's own retry: one message each."""
    times = 1000 if LONG else 200
    with bus.connect() as connection:
        bus.publish(connection, -1, "first")
        commits = _lose_answers(open_database(bus.url, bus.options).engine, monkeypatch, 2)
        for n in range(times):
            commits[0] = 1
            assert bus.publish(connection, n, str(n), **RETRY) is Landing.DUPLICATE
        monkeypatch.undo()
        assert bus.count("message") == times + 1


def test_control_lost_commit_answers_double_in_kombu(sqlite: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same with kombu's own transport leaves more messages than publishes."""
    sqlite.options.clear()
    with sqlite.plain() as connection:
        sqlite.publish(connection, -1)
        engine, _ = connection.default_channel._open()
        commits = _lose_answers(engine, monkeypatch, 2)
        for n in range(200):
            commits[0] = 1
            sqlite.publish(connection, n, **RETRY)
        monkeypatch.undo()
        assert connection.default_channel._size("cards") == 401


def test_a_fetch_whose_answer_was_lost_strands_nothing(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch that was committed without an answer: its messages are delivered by the same consumer at the next try."""
    with bus.connect() as connection:
        for n in range(5):
            bus.publish(connection, n, str(n))
        channel = connection.channel()
        engine = open_database(bus.url, bus.options)._lax  # what fetches run on
        got = []
        for held in (1, 2):  # before the lease is known to be written, and after
            _lose_answers(engine, monkeypatch, 1)
            with pytest.raises(connection.connection_errors):
                channel.basic_get("cards")
            monkeypatch.undo()
            assert bus.count("held") == held
            got.append(channel.basic_get("cards"))
            assert bus.count("held") == held
        got += [channel.basic_get("cards") for _ in range(3)]
        assert channel.basic_get("cards") is None
        assert sorted(message.payload for message in got) == [*range(5)]
        assert not any(message.delivery_info.get("redelivered") for message in got)


def test_resends_from_many_processes_land_once(bus: Bus) -> None:
    """Eight processes create the tables at once and publish the same 50 ids: each id lands exactly once.

    The short form on servers: four.
    """
    processes = 8 if LONG or bus.url.startswith("sqlite") else 4
    code = """
with bus.connect() as connection:
    print(sum(bus.publish(connection, n, str(n), retry=True).value == "landed" for n in range(50)))
"""
    programs = [bus.program(code) for _ in range(processes)]
    assert sum(map(int, lines(*programs))) == 50
    assert bus.count("message") == 50


DRAIN = """
with bus.connect() as connection:
    for message in deliveries(connection, bus.queue, prefetch=20, idle=2):
        os.write(1, b"%d\\n" % message.payload)
        message.ack()
"""


def _fill(bus: Bus, total: int) -> None:
    with bus.connect() as connection:
        for n in range(total):
            bus.publish(connection, n, str(n))


def test_many_consumers_share_without_loss_or_double(bus: Bus) -> None:
    """Eight consumers in eight processes drain 2,000 messages: each message once, and more than one consumer works.

    The short form on servers: four and 400.
    """
    total, consumers = (2000, 8) if LONG or bus.url.startswith("sqlite") else (400, 4)
    _fill(bus, total)
    programs = [bus.program(DRAIN) for _ in range(consumers)]
    shares = [lines(program) for program in programs]
    assert Counter(int(line) for share in shares for line in share) == Counter(range(total))
    if total == 2000:  # 400 may be gone before the second process has started
        assert sum(bool(share) for share in shares) > 1
    assert bus.count("held") == bus.count("message") == 0


def test_killed_consumers_lose_nothing_under_load(bus: Bus) -> None:
    """Consumers are killed at random while messages flow: every message is handled, a few more than once."""
    total, kills = (5000, 50) if LONG else (400, 4)
    _fill(bus, total)
    slow = DRAIN.replace("message.ack()", "time.sleep(0.002); message.ack()")
    programs = [bus.program(slow) for _ in range(3)]
    handled: list[str] = []
    for number in range(kills):
        time.sleep(0.9)
        victim = programs.pop(number % 3)
        victim.send_signal(signal.SIGKILL)
        out, _ = victim.communicate()
        handled += [line for line in out.split("\n") if line]
        programs.append(bus.program(slow))
    handled += lines(*programs)
    times = Counter(map(int, handled))
    assert set(times) == {*range(total)}
    # A kill may cut the ack of one message; what was only taken ahead was not handled.
    assert sum(times.values()) - total <= kills
    eventually(lambda: bus.count("held") == bus.count("message") == 0)


def test_a_slow_handler_keeps_its_message(bus: Bus) -> None:
    """A handler of more than three visibility timeouts is not overtaken, although another consumer waits."""
    with bus.connect() as connection:
        bus.publish(connection, 1, "a")
        slow = bus.program(HOLD.format(connect=OURS, hold=3.5))
        assert until_it_prints(slow) == "1"
        assert list(deliveries(connection, bus.queue, idle=3.2)) == []
        assert until_it_prints(slow) == "acked"
        assert list(deliveries(connection, bus.queue, idle=1.5)) == []
        kill(slow)


def test_control_without_renewal_a_slow_handler_is_overtaken(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: if nobody renews the lease, the other consumer gets the message while the first one works."""
    monkeypatch.setattr(LeaseKeeper, "add", lambda self, lease: None)
    with bus.connect() as first, bus.connect() as second:
        bus.publish(first, 1, "a")
        held = next(deliveries(first, bus.queue))
        [overtaken] = deliveries(second, bus.queue, idle=3)
        held.ack()
        assert bus.count("held") == 1
        overtaken.ack()
        assert bus.count("held") == 0


QUICK_THEN_SLOW = """
with bus.connect() as connection:
    for message in deliveries(connection, bus.queue, prefetch=100, idle=20):
        slow = message.payload >= 10
        if slow:
            print(message.payload)
            time.sleep(1)
        message.ack()
        if slow:
            print("acked")
"""


def test_a_stopped_consumer_cannot_ack_what_another_has(bus: Bus) -> None:
    """SIGSTOP past the timeout: the message goes to another consumer, and the sleeper's late ack leaves it there.

    What the sleeper had taken ahead it does not run when it wakes up; what it takes then is protected anew.
    """
    _fill(bus, 30)
    with bus.connect() as connection:
        sleeper = bus.program(QUICK_THEN_SLOW)
        assert until_it_prints(sleeper) == "10"
        assert bus.count("held") > 1
        sleeper.send_signal(signal.SIGSTOP)
        got = list(deliveries(connection, bus.queue, idle=2.5))
        assert sorted(message.payload for message in got) == [*range(10, 30)]
        sleeper.send_signal(signal.SIGCONT)
        assert until_it_prints(sleeper) == "acked"
        assert bus.count("held") == 20
        for message in got:
            message.ack()
        assert bus.count("held") == 0
        bus.publish(connection, 99, "last")
        assert until_it_prints(sleeper) == "99"
        kill(sleeper)
        [message] = deliveries(connection, bus.queue, idle=2.5)
        assert message.payload == 99
        message.ack()


def test_whoever_polls_next_restores_to_the_right_queue(bus: Bus) -> None:
    """A process that knows neither exchange nor bindings brings a dead consumer's message back, to its queue only."""
    with bus.connect() as connection:
        bus.publish(connection, 1, "a", declare=[bus.queue, bus.other])
        consumer = bus.program(HOLD.format(connect=OURS, hold=60))
        assert until_it_prints(consumer) == "1"
        kill(consumer)
    with bus.connect() as stranger:
        [message] = deliveries(stranger, Queue("cards", no_declare=True), idle=3)
        message.ack()
        [message] = deliveries(stranger, Queue("mails", no_declare=True))
        message.ack()


def test_a_delay_survives_the_death_of_everybody(bus: Bus) -> None:
    """A delayed message is kept by the database: its consumer is killed, and another gets it when it is due."""
    with bus.connect() as connection:
        bus.publish(connection, 1, "a")
    code = """
with bus.connect() as connection:
    message = next(deliveries(connection, bus.queue, idle=10))
    message.channel.basic_delay(message.delivery_tag, 1.5)
    print("delayed")
    time.sleep(60)
"""
    consumer = bus.program(code)
    assert until_it_prints(consumer) == "delayed"
    began = time.monotonic()
    kill(consumer)
    with bus.connect() as connection:
        message = next(deliveries(connection, bus.queue, idle=5))
        assert message.payload == 1
        assert time.monotonic() - began > 1.2
        message.ack()


def test_a_message_that_kills_its_consumers_does_not_take_its_neighbours_along(sqlite: Bus) -> None:
    """A poison message ends in the dead table after its bound; the messages fetched together with it are handled."""
    sqlite.options.update(visibility_timeout=0.4, max_deliveries=3)
    _fill(sqlite, 30)
    code = """
with bus.connect() as connection:
    for message in deliveries(connection, bus.queue, prefetch=30, idle=2):
        if message.payload == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        message.ack()
        os.write(1, b"%d\\n" % message.payload)
"""
    handled: list[str] = []
    deaths = 0
    while deaths < 10:
        program = sqlite.program(code)
        out, _ = program.communicate(timeout=60)
        handled += out.split("\n")[:-1]
        if program.returncode == 0:
            break
        deaths += 1
    assert deaths == 3
    assert sorted(map(int, handled)) == [n for n in range(30) if n != 7]
    assert sqlite.count("dead") == 1


def test_a_forked_child_leaves_its_parents_messages_alone(bus: Bus) -> None:
    """A child closes and uses what it inherited: the parent's message stays the parent's, and both can publish."""
    code = """
connection = bus.connect()
bus.publish(connection, 1, "a")
[message] = deliveries(connection, bus.queue, idle=1)
child = os.fork()
if child == 0:
    bus.publish(connection, 2, "b")
    connection.release()
    with bus.connect() as own:
        bus.publish(own, 3, "c")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(bus.count("held"), bus.count("message"))
bus.publish(connection, 4, "d")
time.sleep(2.5)
print(bus.count("held"))
message.ack()
print(sorted(m.payload for m in deliveries(connection, bus.queue)), bus.count("dead"))
"""
    assert lines(bus.program(code)) == ["1 2", "1", "[2, 3, 4] 0"]


def test_a_child_inherits_no_open_sqlite_file(sqlite: Bus) -> None:
    """SQLite connections must not cross a fork: ours are closed before, and both sides open their own after."""
    code = """
def open_files():
    return [name for fd in os.listdir("/proc/self/fd") if (name := _target(fd)).startswith(bus.url[10:])]

def _target(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""

connection = bus.connect()
bus.publish(connection, 1, "a")
assert open_files()
child = os.fork()
if child == 0:
    os._exit(len(open_files()))
assert os.waitpid(child, 0)[1] == 0
bus.publish(connection, 2, "b")
"""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    assert lines(sqlite.program(code)) == []


def test_a_cut_session_is_an_error_that_can_be_retried(unique: str, tmp_path: Path) -> None:
    """PostgreSQL ends all our sessions: a publish resends and lands once, a consumer goes on, an ack is not lost."""
    bus = open_bus("postgresql", unique, tmp_path, visibility_timeout=1.0, connect_args={"application_name": unique})
    cut = sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = :name")
    server = sa.create_engine(bus.url, isolation_level="AUTOCOMMIT")

    def cut_all() -> None:
        with server.connect() as connection:
            connection.execute(cut, {"name": unique})

    try:
        with bus.connect() as connection, bus.connect() as producer:
            for n in range(20):
                bus.publish(producer, n, str(n), **RETRY)
                cut_all()
            assert bus.count("message") == 20
            seen: list[int] = []

            def handle(body: int, message: Any) -> None:
                seen.append(body)
                cut_all()
                message.ack()

            _consume_with_reconnects(connection, bus.queue, handle, lambda: len(set(seen)) == 20)
            assert bus.count("held") == bus.count("message") == 0
            assert len(seen) == 20
    finally:
        server.dispose()
        drop(bus)


@pytest.mark.parametrize("looks", [True, False])
def test_an_ack_that_the_server_forgot_brings_the_message_back(
    unique: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: bool
) -> None:
    """I1: a server that crashes forgets the acks of the last moment, and the consumer goes on over new sessions. Its
    message must not stay with it, unknown, for as long as it lives. The control: without the look it does."""
    if not looks:
        monkeypatch.setattr(Database, "_note_cut", lambda self, context: None)
    bus = open_bus("postgresql", unique, tmp_path, visibility_timeout=0.5, connect_args={"application_name": unique})
    cut = sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = :name")
    server = sa.create_engine(bus.url, isolation_level="AUTOCOMMIT")
    held = bus.tables().held
    try:
        with bus.connect() as connection:
            bus.publish(connection, 1, "a")
            channel = connection.channel()
            message = channel.basic_get(bus.queue.name)
            with server.connect() as other:
                row = other.execute(sa.select(held)).mappings().one()
                message.ack()
                assert bus.count("held") == 0
                other.execute(sa.insert(held).values(**row))
                other.execute(cut, {"name": unique})
            # A renewal or another ack meets the cut, and is repeated: the fetch has no error of its own.
            open_database(bus.url, bus.options).run(lambda connection: connection.execute(sa.select(held)), again=True)
            again = None
            deadline = time.monotonic() + 2.0
            while again is None and time.monotonic() < deadline:
                again = channel.basic_get(bus.queue.name)
            assert (again is not None) is looks
            if again is not None:
                assert again.payload == 1
                again.ack()
            assert bus.count("held") == (0 if looks else 1)
    finally:
        server.dispose()
        drop(bus)


def _consume_with_reconnects(connection: Connection, queue: Queue, handle: Any, done: Any) -> None:
    """What kombu's ConsumerMixin does: an error of the connection opens a new one."""
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        try:
            with connection.Consumer([queue], callbacks=[handle]):
                while not done():
                    connection.drain_events(timeout=5)
        except connection.connection_errors:
            connection.collect()
