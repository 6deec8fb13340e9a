"""The kit for users: faults, broker, store, observing, and the judge's finer points; ten handlers are an example."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest

from idempotent_bus import ConfigurationError, StoreUnavailable, current_execution, idempotent_consumer
from idempotent_bus.hooks import ACK, CLAIM, COMPLETE, HANDLER
from idempotent_bus.model import Claimed, ClaimRequest, Landing, Reason
from idempotent_bus.store import BatchStore, QuarantineStore
from idempotent_bus.testing import (
    Action,
    FaultyStore,
    Killed,
    ManualClock,
    MemoryBroker,
    NotIdempotent,
    Script,
    Watch,
    Way,
    assert_idempotent,
    crashes,
    deliver,
    find_flaws,
    plan_of,
    text_of,
)
from idempotent_bus.testing import Reason as Flaw
from idempotent_bus.testing.explorer import Coverage, Failure, explore
from idempotent_bus.testing.interleaving import Turns
from idempotent_bus.testing.observing import Ids, biz_id_path, difference, normal

# --- faults ---------------------------------------------------------------------------------------------


def test_each_fault_does_what_it_says() -> None:
    """Before: not done. After, and reply lost: done. Error: not done, and the error is one of that step's."""
    done: list[str] = []

    def step(action: str) -> BaseException | None:
        done.clear()
        try:
            Script(plan_of(f"1:{action}")).worker()(CLAIM, done.append, "x")
        except BaseException as error:  # noqa: BLE001 - Killed is one
            return error
        return None

    assert isinstance(step("crash-before"), Killed)
    assert done == []
    assert isinstance(step("crash-after"), Killed)
    assert done == ["x"]
    assert isinstance(step("reply-lost"), StoreUnavailable)
    assert done == ["x"]
    assert isinstance(step("error"), StoreUnavailable)
    assert done == []


def test_after_a_crash_every_later_step_of_that_worker_fails() -> None:
    """A `finally` is not a crash: what it would do outside is not done. Another worker goes on."""
    script = Script(plan_of("1:crash-before"))
    dead, alive = script.worker(0), script.worker(1)
    with pytest.raises(Killed):
        dead(CLAIM, pytest.fail)
    with pytest.raises(Killed):
        dead(ACK, pytest.fail)
    assert alive(ACK, lambda: 7) == 7
    assert script.passed == [CLAIM, ACK]


def test_a_plan_is_one_line_and_back() -> None:
    """What is printed is what is read."""
    plan = {3: Action.CRASH_BEFORE, 12: Action.STALL, 7: Action.SWITCH_2}
    assert text_of(plan) == "3:crash-before,7:switch-2,12:stall"
    assert plan_of(text_of(plan)) == plan
    assert plan_of("") == {}
    with pytest.raises(ValueError, match="boom"):
        plan_of("1:boom")


def test_workers_hand_over_only_where_they_are_told_to() -> None:
    """Of several threads one runs, until it hands over, ends or raises."""
    turns, said = Turns(2), []

    def body() -> None:
        said.append("a")
        turns.pause(0, "why")
        said.append("c")
        raise KeyError("d")

    try:
        assert turns.resume(0, body) == "why"
        assert turns.resume(1, lambda: said.append("b")) is None
        with pytest.raises(KeyError):
            turns.resume(0)
        assert said == ["a", "b", "c"]
        assert not turns.is_paused(0)
    finally:
        turns.close()


def test_the_explorer_runs_each_schedule_once_and_says_which_failed() -> None:
    """Singles, pairs and what lies beyond; the failing plan is in the error."""
    seen: list[str] = []

    def run(plan: Any) -> list[str]:
        seen.append(text_of(plan))
        return [CLAIM, HANDLER, ACK]

    coverage = explore(run, depth=2, beyond=5)
    assert coverage.schedules[0] == 1
    assert coverage.schedules[1] == 3 * 4
    assert coverage.schedules[2] == 3 * 4 * 4
    assert len(set(seen[:61])) == 61
    assert coverage.missing([CLAIM, HANDLER, ACK]) == []
    assert coverage.missing([COMPLETE], [Action.ERROR]) == [(COMPLETE, "error")]

    def broken(plan: Any) -> list[str]:
        assert plan != {2: Action.ERROR}, "I1: lost"
        return [CLAIM, HANDLER]

    with pytest.raises(Failure, match="schedule 2:error: I1: lost") as failure:
        explore(broken, coverage=Coverage())
    assert failure.value.plan == {2: Action.ERROR}


def test_a_watch_hears_what_was_really_done() -> None:
    """A lost reply was done; an error was not."""
    heard: list[str] = []

    class Ears(Watch):
        def done(self, worker: int, step: str, arguments: Any, result: Any) -> None:
            heard.append(step)

    step = Script(plan_of("1:reply-lost,2:error"), watch=Ears()).worker()
    for name in (CLAIM, COMPLETE):
        with pytest.raises(StoreUnavailable):
            step(name, lambda: None)
    assert heard == [CLAIM]


# --- broker and store -----------------------------------------------------------------------------------


def test_the_broker_keeps_what_is_not_settled() -> None:
    """I1: delivered, redelivered, delayed, dead, redriven; an answer on a closed channel changes nothing."""
    clock = ManualClock()
    broker = MemoryBroker(clock)
    assert broker.publish("a", inner_msg_id="1") is Landing.LANDED
    assert broker.publish("a", inner_msg_id="1") is Landing.DUPLICATE
    (first,) = broker.receive("w", 10)
    assert broker.receive("w", 10) == []
    broker.close_channel("w")
    with pytest.raises(ConnectionError):
        first.ack()
    (again,) = broker.receive("w")
    assert again.message.redelivered
    again.wait(5.0)
    assert not broker.has_ready
    assert broker.next_ready == clock() + 5.0
    clock.advance(5.0)
    (late,) = broker.receive("w")
    broker.dead_letter_full = True
    assert late.dead_letter(Reason.ATTEMPTS, "no", 3) is False
    broker.dead_letter_full = False
    clock.advance(1.0)
    (late,) = broker.receive("w")
    assert late.dead_letter(Reason.ATTEMPTS, "no", 3) is True
    assert broker.redrive() == 1
    (last,) = broker.receive("w")
    assert (last.message.redrive, last.message.inner_msg_id, last.message.redelivered) == (1, "1", False)
    broker.lose_acks = True
    last.ack()
    broker.lose_acks = False
    last.ack()
    assert (broker.queue, broker.unacked, broker.dead) == ([], [], [])


def test_a_store_fails_as_it_is_told() -> None:
    """Not done, done with its reply lost, or down; and it has the capabilities of the one it is around."""
    store = FaultyStore()
    request = ClaimRequest(bytes(16), b"n" * 16, 60.0, 600.0)
    store.fail("claim")
    store.lose_reply("claim")
    with pytest.raises(StoreUnavailable):
        store.claim(request)
    assert store.lookup(bytes(16)) is None
    with pytest.raises(StoreUnavailable):
        store.claim(request)
    assert store.lookup(bytes(16)).token == 1
    assert isinstance(store.claim(request), Claimed)
    store.down = True
    with pytest.raises(StoreUnavailable):
        store.claim_many([request])
    assert store.calls == ["claim", "lookup", "claim", "lookup", "claim", "claim_many"]
    assert isinstance(store, BatchStore)
    assert isinstance(store, QuarantineStore)
    with pytest.raises(ValueError, match="no verb"):
        store.fail("clam")


# --- observing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "came"),
    [
        (1, 3, 2),
        (["a"], ["a", "b", "a"], ["a", "b"]),
        (["a", "b"], ["b"], {"came": [], "went": ["a"]}),
        ({"a": 1, "b": 2}, {"a": 4, "c": 1}, {"a": 3, "c": 1, "b": None}),
        (([1], 1), ([1, 2], 2), {1: [2], 2: 1}),
        ({1}, {1, 2}, [2]),
        (False, True, True),
        ("a", "b", "b"),
    ],
)
def test_the_difference_of_two_observations(before: Any, after: Any, came: Any) -> None:
    """What a case has left, whatever was there before."""
    assert difference(before, after) == came


def test_ids_are_fresh_and_taken_out_again() -> None:
    """Each case has a biz-id of its own, of the same type, and what it left is comparable all the same."""
    for value in ("p-1", 17, uuid.uuid4()):
        ids = Ids("order.id")
        bodies = [ids.fresh({"order": {"id": value}, "n": 1}) for _ in range(3)]
        found = [ids.of(body) for body in bodies]
        assert len(set(found)) == 3
        assert {type(one) for one in found} == {type(value)}
        assert normal([{"card": f"for {found[0]}"}, found[0]], {str(found[0]): "<id>"}) == [
            {"card": "for <id>"},
            "<id>",
        ]
    assert biz_id_path({"payment_id": 1, "amount": 2}) == "payment_id"
    with pytest.raises(ConfigurationError, match="biz_id="):
        biz_id_path({"payment_id": 1, "order_id": 2})


# --- the judge ------------------------------------------------------------------------------------------


class Rows:
    """A table with a unique key."""

    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}

    def insert(self, key: str, value: Any) -> None:
        self.rows.setdefault(key, value)

    def put(self, key: str, value: Any) -> None:
        self.rows[key] = value


def flaws(handler: Callable[..., Any], message: Any, rows: Rows, **more: Any) -> set[Flaw]:
    outside = [(rows, "insert"), (rows, "put")]
    return {f.reason for f in find_flaws(handler, message, observe=lambda: rows.rows, outside=outside, **more)}


def test_a_unique_key_is_enough() -> None:
    """A function that inserts under the message's own key passes, guarded or not; what was patched is given back."""
    rows = Rows()
    before = rows.insert
    assert flaws(lambda body: rows.insert(body["id"], body["v"]), {"id": "a", "v": 1}, rows) == set()
    guarded = idempotent_consumer("memory://", scope="s", biz_id="id")(lambda body, message: rows.insert(body["id"], 1))
    assert flaws(guarded, {"id": "a"}, rows) == set()
    assert rows.insert == before


def test_what_depends_on_order_is_found() -> None:
    """Two messages of one thing: the last one wins, whichever that is. With a version the same handler passes."""
    rows = Rows()
    messages = [{"id": "e1", "account": "a", "status": "open"}, {"id": "e2", "account": "a", "status": "closed"}]

    def set_status(body: Any) -> None:
        rows.put(body["account"], body["status"])

    options = {"biz_id": "id", "concurrently": False}
    assert flaws(set_status, messages, rows, reset=rows.rows.clear, **options) == {Flaw.ORDER}
    with pytest.raises(ConfigurationError, match="reset="):  # a status is no difference
        flaws(set_status, messages, rows, **options)

    versions = Rows()

    def set_newer(body: Any) -> None:
        if versions.rows.get(body["account"], ("", ""))[0] < body["id"][:2]:
            versions.put(body["account"], (body["id"][:2], body["status"]))

    assert flaws(set_newer, messages, versions, reset=versions.rows.clear, **options) == set()


def test_a_handler_that_answers_the_broker_is_found() -> None:
    """The ack is the library's."""
    rows = Rows()

    def acks(body: Any, message: Any) -> None:
        rows.insert(body["id"], 1)
        message.ack()

    assert flaws(acks, {"id": "a"}, rows) == {Flaw.ACKED}


def test_a_handler_that_fails_by_itself_is_not_judged_further() -> None:
    """It says what was raised."""

    def fails(body: Any) -> None:
        raise LookupError("no such customer")

    with pytest.raises(NotIdempotent, match="LookupError: no such customer") as flawed:
        assert_idempotent(fails, {"id": "a"}, observe=lambda: 0)
    assert flawed.value.reasons == {Flaw.FAILED}


def test_a_row_number_is_no_flaw_and_a_restart_is_a_restart() -> None:
    """What differs between two clean runs for no reason is not compared; a check in the process's memory is none."""
    table: list[tuple[int, str]] = []
    seen: set[str] = set()

    def insert(body: Any) -> None:
        if body["id"] not in seen:
            table.append((len(table) + 1, body["id"]))
            seen.add(body["id"])

    def judged(**more: Any) -> set[Flaw]:
        return {f.reason for f in find_flaws(insert, {"id": "a"}, observe=lambda: table, **more)}

    assert judged() == set()
    assert judged(restart=seen.clear) == {Flaw.REPEATED}


def test_an_observation_that_shows_nothing_is_refused() -> None:
    """A judge that cannot find anything is none."""
    with pytest.raises(ConfigurationError, match="no effect"):
        assert_idempotent(lambda body: None, {"id": "a"}, observe=lambda: [1, 2])


def test_what_goes_down_twice_is_not_lost_but_repeated() -> None:
    """A balance from which is taken shrinks."""
    balance = {"a": 100}

    def take(body: Any) -> None:
        balance["a"] -= 10

    found = find_flaws(take, {"id": "a"}, observe=lambda: balance)
    assert {finding.reason for finding in found} == {Flaw.REPEATED}


def test_methods_manual_completion_quarantine_and_probes_are_judged_as_they_run() -> None:
    """With its own policy: what goes to a person, or is found by a probe, is not run again."""
    cards: list[str] = []
    outside: list[Any] = []

    class Service:
        @idempotent_consumer("memory://", scope="s", biz_id="id", manual=True)
        def naive(self, body: Any, message: Any) -> None:
            cards.append(body["id"])
            current_execution().complete("done")

        @idempotent_consumer("memory://", scope="s", biz_id="id", on_abandoned="quarantine", max_attempts=1)
        def looked_at(self, body: Any, message: Any) -> None:
            cards.append(body["id"])

        @idempotent_consumer("memory://", scope="s", biz_id="id", on_abandoned=lambda record: record.biz_id in cards)
        def probed(self, body: Any, message: Any) -> None:
            if body["id"] not in cards:  # for what raises after its effect nobody is asked
                cards.append(body["id"])

    def judged(handler: Any) -> set[Flaw]:
        found = find_flaws(handler, {"id": "a"}, observe=lambda: cards, outside=outside, concurrently=False)
        return {finding.reason for finding in found}

    service = Service()
    assert judged(service.naive) == {Flaw.REPEATED}
    assert judged(service.probed) == set()
    assert judged(service.looked_at) <= {Flaw.FAILED}


def test_a_handler_that_cannot_run_in_threads_says_so() -> None:
    """It is not silently judged by less."""
    import threading

    rows, home = Rows(), threading.get_ident()

    def only_here(body: Any) -> None:
        assert threading.get_ident() == home
        rows.insert(body["id"], 1)

    with pytest.raises(ConfigurationError, match="concurrently=False"):
        flaws(only_here, {"id": "a"}, rows)
    assert flaws(only_here, {"id": "a"}, rows, concurrently=False) == set()


# --- deliveries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", Way)
def test_each_way_of_delivery_runs_each_message_once(way: Way) -> None:
    """The guard answers the copies; out of order, the last message comes first."""
    order: list[str] = []
    delivered = deliver(lambda body: order.append(body["id"]), {"id": "a"}, {"id": "b"}, way=way)
    assert sorted(order) == ["a", "b"]
    assert (delivered.acked, delivered.dead, delivered.runs) == ({"a", "b"}, {}, 2)
    if way is Way.OUT_OF_ORDER:
        assert order == ["b", "a"]


def test_a_crash_at_each_step() -> None:
    """Before and after each step of the library's and of the handler's; the message is acked in the end, always."""
    rows: list[str] = []

    class Bank:
        def charge(self, key: str) -> None:
            rows.append(key)

    bank, titles, doubled = Bank(), [], 0
    for crash in crashes(lambda body: bank.charge(body["id"]), {"id": "a"}, outside=[(bank, "charge")]):
        titles.append(crash.title)
        assert crash.delivered.acked == {crash.body["id"]}
        doubled += rows.count(crash.body["id"]) == 2
    assert titles[0] == "no crash"
    assert "a crash after Bank.charge (step 3)" in titles
    assert len(titles) == 1 + 2 * len((CLAIM, HANDLER, "Bank.charge", COMPLETE, ACK))
    assert doubled == 3  # after the charge, after the handler, before the completion
