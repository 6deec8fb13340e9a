"""The consuming thread's mailbox, the pool and the bell: no sleeping, other threads are joined or met at events."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from idempotent_bus.bell import Bell
from idempotent_bus.home import HandedOver, HomeThread
from idempotent_bus.model import Reason
from idempotent_bus.pool import Pool


def elsewhere(function: Callable[[], Any]) -> Any:
    """Run it in another thread; its result, or the exception that it raised."""
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(function())
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            out.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), "it hangs"
    return out[0]


class Asking:
    """A thread that asks home; `answer` waits for it."""

    def __init__(self, home: HomeThread, function: Callable[..., Any], **options: Any) -> None:
        self._out: list[Any] = []

        def run() -> None:
            try:
                self._out.append(home.ask(function, **options))
            except BaseException as error:  # noqa: BLE001 - it is the caller's
                self._out.append(error)

        posted = threading.Event()
        home._wake = posted.set
        self._thread = threading.Thread(target=run)
        self._thread.start()
        assert posted.wait(5)

    def answer(self) -> Any:
        self._thread.join(5)
        assert not self._thread.is_alive(), "it hangs"
        return self._out[0]


class Settles:
    """A settlement that writes down what it was told, and in which thread."""

    def __init__(self, moved: bool = True, error: BaseException | None = None) -> None:
        self.told: list[Any] = []
        self.threads: set[threading.Thread] = set()
        self._moved = moved
        self._error = error

    def _tell(self, *what: Any) -> None:
        if self._error is not None:
            raise self._error
        self.told.append(what)
        self.threads.add(threading.current_thread())

    def ack(self) -> None:
        self._tell("ack")

    def wait(self, delay: float) -> None:
        self._tell("wait", delay)

    def dead_letter(self, reason: Reason, error: str, attempts: int) -> bool:
        self._tell("dead", reason, error, attempts)
        return self._moved


def test_at_home_it_is_done_at_once() -> None:
    """In the owner's thread nothing waits, and what is raised comes out."""
    home = HomeThread()
    assert home.ask(len, "abc") == 3
    with pytest.raises(ZeroDivisionError):
        home.ask(lambda: 1 / 0)


def test_from_elsewhere_it_waits_for_the_owner() -> None:
    """What others post is done by the owner, in the order in which it came, and the owner is woken."""
    woken: list[int] = []
    home, done = HomeThread(lambda: woken.append(1)), []
    elsewhere(lambda: [home.post(done.append, number) for number in range(3)])
    assert done == []
    assert len(woken) == 3
    home.run_pending()
    assert done == [0, 1, 2]


def test_an_answer_goes_back_to_who_asked() -> None:
    """The result, or the exception; and the owner goes on with the rest."""
    home = HomeThread()
    good, bad = Asking(home, lambda: threading.current_thread()), Asking(home, lambda: 1 / 0)
    home.run_pending()
    assert good.answer() is threading.current_thread()
    assert isinstance(bad.answer(), ZeroDivisionError)


def test_what_was_posted_and_raises_comes_out_at_home_and_the_rest_stays() -> None:
    """The owner hears of a lost connection; what else was posted is done by the next call."""
    home, done = HomeThread(), []

    def lose() -> None:
        raise ConnectionResetError("cut")

    elsewhere(lambda: (home.post(lose), home.post(done.append, 1)))
    with pytest.raises(ConnectionResetError):
        home.run_pending()
    assert done == []
    home.run_pending()
    assert done == [1]


def test_closed_drops_posts_and_answers_askers() -> None:
    """Nothing hangs and nothing is done once the connection is gone: before, and after, and at home."""
    home, done = HomeThread(), []
    asking = Asking(home, lambda: done.append("asked"))
    elsewhere(lambda: home.post(done.append, "posted"))
    home.close()
    assert isinstance(asking.answer(), ConnectionResetError)
    elsewhere(lambda: home.post(done.append, "late"))
    assert isinstance(elsewhere(lambda: home.ask(done.append, "late")), ConnectionResetError)
    with pytest.raises(ConnectionResetError):
        home.ask(done.append, "at home")
    home.run_pending()
    assert done == []


def test_an_end_at_home_does_not_leave_the_asker_hanging() -> None:
    """SystemExit in the owner's thread goes on its way, and who asked gets an error."""

    def leave() -> None:
        raise SystemExit

    home = HomeThread()
    asking = Asking(home, leave)
    with pytest.raises(SystemExit):
        home.run_pending()
    assert isinstance(asking.answer(), ConnectionResetError)


def test_who_gives_up_waiting_is_not_served_later() -> None:
    """An ask that ran into its timeout raises, and what it asked for is not done behind its back."""
    home, done = HomeThread(), []
    assert isinstance(Asking(home, lambda: done.append(1), timeout=0).answer(), ConnectionResetError)
    home.run_pending()
    assert done == []


def test_many_threads_and_a_close_in_the_middle() -> None:
    """Every asker gets an answer, whenever the connection goes: none hangs."""
    home, answers = HomeThread(), []

    def ask() -> None:
        for number in range(200):
            try:
                answers.append(home.ask(lambda number=number: number))
            except ConnectionResetError:
                answers.append(None)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(answers) < 300:
        home.run_pending()
    home.close()
    for thread in threads:
        thread.join(5)
    assert len(answers) == 800
    assert None in answers


def test_a_settlement_from_elsewhere_acts_at_home() -> None:
    """Acks and waits are posted, a dead letter is waited for; each is done by the owner, and reported once."""
    home, settled = HomeThread(), []
    settle = Settles()
    handed = HandedOver(settle, home, on_settled=settled.append)
    elsewhere(handed.ack)
    elsewhere(lambda: handed.wait(2.5))
    assert settle.told == []
    home.run_pending()
    asking = Asking(home, lambda: None)
    moving = threading.Thread(target=lambda: settle.told.append(handed.dead_letter(Reason.INVALID, "no", 3)))
    moving.start()
    while len(settle.told) < 4:
        home.run_pending()
    moving.join(5)
    asking.answer()
    assert settle.told == [("ack",), ("wait", 2.5), ("dead", Reason.INVALID, "no", 3), True]
    assert settle.threads == {threading.current_thread()}
    assert settled == [handed, handed, handed]


@pytest.mark.parametrize("moved", [True, False], ids=["moved", "held"])
def test_a_dead_letter_says_whether_it_was_written(moved: bool) -> None:
    """The answer of the real settlement is the answer."""
    home = HomeThread()
    assert HandedOver(Settles(moved), home).dead_letter(Reason.INVALID, "no", 0) is moved


def test_an_old_settlement_never_acts_on_a_new_connection() -> None:
    """After a reconnect the old mailbox is closed: posted or later acks are dropped, whoever sends them."""
    old, settle = HomeThread(), Settles()
    handed = HandedOver(settle, old)
    elsewhere(handed.ack)
    old.close()
    elsewhere(handed.ack)
    handed.ack()
    handed.wait(1.0)
    old.run_pending()
    HomeThread().run_pending()
    assert isinstance(elsewhere(lambda: handed.dead_letter(Reason.INVALID, "no", 0)), ConnectionResetError)
    assert settle.told == []


def test_without_a_loop_a_closed_channel_is_left_alone() -> None:
    """A bare callback has no mailbox per connection: what others wanted on a closed channel is not done."""
    home, settle = HomeThread(), Settles()
    handed = HandedOver(settle, home, is_live=lambda: False)
    elsewhere(handed.ack)
    home.run_pending()
    assert settle.told == []
    handed.ack()  # at home the error of the channel itself is the caller's to hear
    assert settle.told == [("ack",)]


def test_what_failed_is_not_reported_as_settled() -> None:
    """A lost connection at the ack: nothing was settled."""
    settled: list[Any] = []
    handed = HandedOver(Settles(error=ConnectionResetError("cut")), HomeThread(), on_settled=settled.append)
    with pytest.raises(ConnectionResetError):
        handed.ack()
    with pytest.raises(ConnectionResetError):
        handed.dead_letter(Reason.INVALID, "no", 0)
    assert settled == []


# --- the pool ---------------------------------------------------------------------------------------


def test_the_pool_runs_as_many_at_once_as_it_has_threads() -> None:
    """Three threads: three tasks meet each other, the fourth waits; the same threads serve what comes later."""
    pool, meet, go_on, names = Pool(3), threading.Barrier(4), threading.Event(), set()

    def task() -> None:
        names.add(threading.current_thread().name)
        meet.wait(5)
        go_on.wait(5)

    for _ in range(3):
        pool.submit(task)
    meet.wait(5)
    fourth = threading.Event()
    pool.submit(fourth.set)
    assert (pool.running, pool.waiting) == (3, 1)
    assert pool.oldest > 0
    go_on.set()
    assert fourth.wait(5)
    assert pool.wait(5)
    assert (pool.running, pool.waiting, pool.oldest) == (0, 0, 0.0)
    assert len(names) == 3
    pool.close()


def test_a_closed_pool_starts_nothing_and_waits_for_nobody() -> None:
    """What runs goes on, what waits is forgotten, what comes is ignored; its threads end."""
    pool, begun, go_on, ran = Pool(1), threading.Event(), threading.Event(), []
    pool.submit(lambda: (begun.set(), go_on.wait(5)))
    assert begun.wait(5)
    (thread,) = [thread for thread in threading.enumerate() if thread.name.startswith("idempotent-bus-")][-1:]
    pool.submit(lambda: ran.append(1))
    pool.close()
    pool.submit(lambda: ran.append(2))
    assert not pool.wait(0)
    go_on.set()
    assert pool.wait(5)
    thread.join(5)
    assert not thread.is_alive()
    assert ran == []


def test_a_task_that_raises_does_not_cost_the_pool_its_thread() -> None:
    """A task must not raise; if one does all the same, it is not counted as running for ever, and others follow."""
    pool = Pool(1)
    pool.submit(lambda: 1 / 0)
    assert pool.wait(5)
    done = threading.Event()
    pool.submit(done.set)
    assert done.wait(5), "the pool has lost its thread"
    pool.close()


# --- the bell ---------------------------------------------------------------------------------------


def test_a_ring_ends_the_wait_and_is_heard_once() -> None:
    """Any number of rings end one wait; data on the socket is told apart, and stays there."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        bell = Bell(ours)
        for _ in range(100_000):
            bell.ring()
        assert bell.wait(5) is False
        theirs.send(b"x")
        assert bell.wait(5) is True
        assert bell.wait(5) is True
        assert ours.recv(1) == b"x"
        bell.ring()
        assert bell.wait(5) is False
        bell.close()
        bell.ring()


def test_a_ring_from_another_thread_is_never_missed() -> None:
    """What is posted before a ring is there after the wait that it ended."""
    bell = Bell()
    home, done = HomeThread(bell.ring), []

    def post() -> None:
        for number in range(2000):
            home.post(done.append, number)

    thread = threading.Thread(target=post)
    thread.start()
    while len(done) < 2000:
        bell.wait(5)
        home.run_pending()
    thread.join()
    assert done == list(range(2000))
    bell.close()
