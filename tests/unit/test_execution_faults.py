"""Every single fault and every pair of faults, at every named step, in small worlds: nothing is lost, nothing is done
twice beyond what a crash between effect and completion excuses, and all is quiet in the end.

A world is a broker that redelivers, the memory store on a manual clock, and workers that die and are started again. A
plan says which step, by its number in the whole run, goes wrong and how. The checker knows nothing of the plan. It
would be worth nothing if it could not fail: broken executors are its controls.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from fakes import SCOPE, Killed, trouble

from idempotent_bus import claims, execution, executor
from idempotent_bus.execution import LeasedExecution, current_execution
from idempotent_bus.executor import Executor
from idempotent_bus.finishing import Finish
from idempotent_bus.hooks import ACK, CLAIM, CLAIMED, COMPLETE, DEAD_LETTER, DURABLE, HANDLER, RELEASE, RENEW, WAIT
from idempotent_bus.identity import record_key
from idempotent_bus.lease import LeaseKeeper
from idempotent_bus.model import Reason, State
from idempotent_bus.policy import Backoff, Policy
from idempotent_bus.stores.memory import MemoryStore
from idempotent_bus.testing import ManualClock
from idempotent_bus.work import Ended, Ending, Work

MAX_ATTEMPTS = 3
KINDS = ("crash before", "crash after", "reply lost", "error")

#: step number -> kind
Plan = Mapping[int, str]


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of scripted failures, each logged with its traceback, would take longer than the runs."""
    for module in (claims, execution, executor):
        monkeypatch.setattr(module.log, "disabled", True)


class Violation(BaseException):
    """An invariant does not hold. Not an Exception: found in a handler, it must not pass for the handler's failure."""


@dataclass(eq=False)
class Copy:
    """A message in the broker."""

    biz_id: str
    ready_at: float = 0.0
    redelivered: bool = False


@dataclass(frozen=True)
class Scenario:
    """What is published, and how it is worked on. fails: how many runs of a biz-id raise, before any effect.

    streaming: completions are not waited for one by one.
    """

    copies: str
    window: int = 1
    manual: bool = False
    fails: Mapping[str, int] = field(default_factory=dict)
    streaming: bool = False


SCENARIOS = {
    "one": Scenario("a"),
    "one, manual": Scenario("a", manual=True),
    "one that fails once": Scenario("a", fails={"a": 1}),
    "one that always fails": Scenario("a", fails={"a": 99}),
    "two copies of one": Scenario("aa"),
    "window of three": Scenario("abc", window=3),
    "window of three, manual": Scenario("abc", window=3, manual=True),
    "window with two copies of one": Scenario("aba", window=3),
    "window with one that fails once": Scenario("abc", window=3, fails={"b": 1}),
    "window with one that always fails": Scenario("ab", window=2, fails={"a": 99}),
    "streamed window": Scenario("aba", window=3, streaming=True),
    "streamed window with one that fails once": Scenario("abc", window=3, fails={"b": 1}, streaming=True),
}


class World:
    """One run: broker, store, workers, effects, and what must hold all the time."""

    def __init__(self, scenario: Scenario, plan: Plan, executor: type[Executor] = Executor) -> None:
        self.scenario = scenario
        self.plan = plan
        self.executor_class = executor
        self.clock = ManualClock()
        self.store = MemoryStore(self.clock)
        self.queue = [Copy(biz_id) for biz_id in scenario.copies]
        self.unacked: list[Copy] = []
        self.dead_letters: Counter[str] = Counter()
        self.effects: Counter[str] = Counter()
        self.runs: Counter[str] = Counter()
        self.excused: Counter[str] = Counter()
        self.unsure: set[str] = set()
        self.passed: list[str] = []
        self.killed = False
        self.half = False
        #: A successor is a new message to its broker: False shows what happens where nobody says that it was here.
        self.tells_successors = True

    # the steps

    def step(self, name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if self.killed:
            raise Killed
        self.passed.append(name)
        kind = self.plan.get(len(self.passed))
        if kind == "crash before":
            self.die()
        if kind == "error":
            raise trouble(name)
        # A move whose reply is lost is one whose second half, the ack, did not happen.
        self.half = kind == "reply lost" and name in (WAIT, DEAD_LETTER)
        result = function(*args, **kwargs)
        self.half = False
        if kind == "crash after":
            self.die()
        if kind == "reply lost":
            if name == HANDLER:  # the handler raised after its effect: its own doing
                self.excuse()
            raise trouble(name)
        return result

    def die(self) -> None:
        self.excuse()
        self.killed = True
        raise Killed

    def excuse(self) -> None:
        for biz_id in self.unsure:
            self.excused[biz_id] += self.state(biz_id) is not State.COMPLETED
        self.unsure.clear()

    def state(self, biz_id: str) -> State | None:
        record = self.store.lookup(record_key(SCOPE, biz_id))
        return None if record is None else record.state

    # the broker

    def settled(self, copy: Copy) -> None:
        if copy not in self.unacked:
            raise ConnectionError("the channel of this delivery is closed")
        if not self.half:
            self.unacked.remove(copy)

    def close_channel(self) -> None:
        for copy in self.unacked:
            copy.redelivered = True
        self.queue[:0] = self.unacked
        self.unacked.clear()

    # the worker

    def work(self, copy: Copy) -> Work:
        def run() -> str:
            self.runs[copy.biz_id] += 1
            if self.runs[copy.biz_id] > MAX_ATTEMPTS + self.scenario.copies.count(copy.biz_id):
                raise Violation(f"I12: run {self.runs[copy.biz_id]} of {copy.biz_id}")
            if self.runs[copy.biz_id] <= self.scenario.fails.get(copy.biz_id, 0):
                raise ValueError("fails")
            self.effect(copy.biz_id)
            if self.scenario.manual:
                current_execution().complete("done")
            return "done"

        return Work(
            scope=SCOPE,
            biz_id=copy.biz_id,
            key=record_key(SCOPE, copy.biz_id),
            run=run,
            settle=Answer(self, copy),
            redelivered=copy.redelivered,
        )

    def effect(self, biz_id: str) -> None:
        self.effects[biz_id] += 1
        self.unsure.add(biz_id)

    def start_worker(self) -> Executor:
        self.killed = False
        keeper = LeaseKeeper(lambda: self.store, clock=self.clock, step=self.step, threaded=False)
        return self.executor_class(
            lambda: self.store,
            Policy(lease=60.0, max_attempts=MAX_ATTEMPTS, backoff=Backoff(1.0, 4.0)),
            keeper=keeper,
            manual=self.scenario.manual,
            streaming=self.scenario.streaming,
            clock=self.clock,
            sleep=self.clock.sleep,
            draw=lambda: 0.5,
            step=self.step,
        )

    def run(self) -> World:
        """Consume until the broker is empty, then check. A dead worker is replaced at once, before its leases end."""
        executor = self.start_worker()
        for _ in range(200):
            now = self.clock()
            batch = [copy for copy in self.queue if copy.ready_at <= now][: self.scenario.window]
            if not batch:
                if not self.queue:
                    self.check()
                    return self
                self.clock.advance(min(copy.ready_at for copy in self.queue) - now)
                continue
            for copy in batch:
                self.queue.remove(copy)
            self.unacked.extend(batch)
            works = [self.work(copy) for copy in batch]
            try:
                if self.scenario.window == 1:
                    executor.handle(works[0])
                else:
                    executor.handle_window(works)
            except Killed:
                self.close_channel()
                executor = self.start_worker()
            except ConnectionError:
                self.close_channel()
            if self.unacked:
                raise Violation("I13: a delivery was neither answered nor given back")
        raise Violation("I13: it never becomes quiet")

    def check(self) -> None:
        """What must hold in the end."""
        for biz_id in set(self.scenario.copies):
            fails = self.scenario.fails.get(biz_id, 0)
            state = self.state(biz_id)
            if state is not State.COMPLETED and not self.dead_letters[biz_id]:
                raise Violation(f"I1: {biz_id} is lost")
            if self.dead_letters[biz_id] and fails + len(self.plan) < MAX_ATTEMPTS:
                raise Violation(f"I12: {biz_id} was given up after {fails} failures and {len(self.plan)} faults")
            if state is State.COMPLETED and not self.effects[biz_id]:
                raise Violation(f"I1: {biz_id} is completed without an effect")
            if self.effects[biz_id] > 1 + self.excused[biz_id]:
                raise Violation(f"I2: {self.effects[biz_id]} effects of {biz_id}, {self.excused[biz_id]} excused")
            if not self.plan and self.effects[biz_id] != (fails < MAX_ATTEMPTS):
                raise Violation(f"I2: {self.effects[biz_id]} effects of {biz_id} without any fault")


@dataclass(eq=False)
class Answer:
    """A settlement over the world's broker."""

    world: World
    copy: Copy

    def ack(self) -> None:
        if self.world.state(self.copy.biz_id) is not State.COMPLETED:
            raise Violation(f"I4: {self.copy.biz_id} is acked before it is completed")
        self.world.settled(self.copy)

    def wait(self, delay: float) -> None:
        world = self.world
        if self.copy not in world.unacked:
            raise ConnectionError("the channel of this delivery is closed")
        world.queue.append(Copy(self.copy.biz_id, world.clock() + delay, world.tells_successors))
        world.settled(self.copy)

    def dead_letter(self, reason: Reason, error: str, attempts: int) -> bool:
        if self.copy not in self.world.unacked:
            raise ConnectionError("the channel of this delivery is closed")
        self.world.dead_letters[self.copy.biz_id] += 1
        self.world.settled(self.copy)
        return True


def singles(scenario: Scenario, executor: type[Executor] = Executor) -> Iterator[World]:
    """The run without a fault, then one for each kind of fault at each of its steps."""
    plain = World(scenario, {}, executor).run()
    yield plain
    for number in range(1, len(plain.passed) + 1):
        for kind in KINDS:
            yield World(scenario, {number: kind}, executor).run()


def pairs(scenario: Scenario) -> Iterator[World]:
    """For each single fault, each further fault at each step that is passed after it."""
    for one in singles(scenario):
        for first, kind in one.plan.items():
            for second in range(first + 1, len(one.passed) + 1):
                for other in KINDS:
                    yield World(scenario, {first: kind, second: other}).run()


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_single_fault(name: str) -> None:
    """I1, I2, I4, I12, I13: whatever one step does, nothing is lost, doubled without excuse, or left hanging."""
    assert sum(1 for _ in singles(SCENARIOS[name])) > len(KINDS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_pair_of_faults(name: str) -> None:
    """The same for every two faults, the second while the first is being mended."""
    assert sum(1 for _ in pairs(SCENARIOS[name])) > len(KINDS) ** 2


def test_the_faults_reach_every_step() -> None:
    """The scenarios pass every step that the core has: a step that none of them reached would not be tested."""
    passed = {step for name in SCENARIOS for world in singles(SCENARIOS[name]) for step in world.passed}
    assert passed == {CLAIM, CLAIMED, HANDLER, RENEW, COMPLETE, DURABLE, RELEASE, DEAD_LETTER, WAIT, ACK}


def test_an_excuse_is_really_needed() -> None:
    """I2 is no better than it says: a crash between effect and completion of an external effect does repeat it."""
    worlds = list(singles(SCENARIOS["one"]))
    assert max(world.effects["a"] for world in worlds) == 2
    assert {world.passed[number - 1] for world in worlds for number in world.plan if world.effects["a"] == 2} == {
        HANDLER,
        COMPLETE,
    }


# --- controls: what the checker must catch -------------------------------------------------------------


class AcksFirst(Executor):
    """Acks, then completes: the message of a worker that dies between is gone."""

    def finish(self, execution: LeasedExecution, value: Any) -> Ending:
        self._step(ACK, execution.work.settle.ack)
        return self._complete(execution.work, execution, value)


class AcksInDoubt(Executor):
    """Takes an unknown outcome for a good one."""

    def _wait(self, work: Work, how: Ended, delay: float) -> Ending:
        if how is Ended.IN_DOUBT:
            work.settle.world.settled(work.settle.copy)  # type: ignore[attr-defined]
            return Ending(how)
        return super()._wait(work, how, delay)


class MarksFirst(Executor):
    """Completes before the handler runs: what raises then is never done."""

    def _run(self, work: Work, execution: LeasedExecution, finish: Finish) -> Ending:
        self._step(COMPLETE, self._claims.store().complete, execution.hold, result=None, retention=600.0)
        return super()._run(work, execution, finish)


class RunsInDoubt(Executor):
    """Runs the handler where the store's answer to the completion is in doubt, once more."""

    def _complete(self, work: Work, execution: LeasedExecution, value: Any) -> Ending:
        passed = work.settle.world.passed  # type: ignore[attr-defined]
        before = passed.count(COMPLETE)
        ending = super()._complete(work, execution, value)
        if passed.count(COMPLETE) > before + 1:
            work.run()
        return ending


class ForgetsToRelease(Executor):
    """Never answers a message that failed."""

    def fail(self, execution: LeasedExecution, error: BaseException) -> Ending:
        return Ending(Ended.FAILED)


@pytest.mark.parametrize(
    ("broken", "scenario", "found"),
    [
        (AcksFirst, "one", "I4"),
        (AcksFirst, "window of three", "I4"),
        (AcksInDoubt, "one that fails once", "I1"),
        (MarksFirst, "one that fails once", "I1"),
        (RunsInDoubt, "one", "I2"),
        (ForgetsToRelease, "one that fails once", "I13"),
    ],
)
def test_the_checker_catches_a_broken_executor(broken: type[Executor], scenario: str, found: str) -> None:
    """The control: with a protection taken out, the same faults and the same checker show the damage."""
    with pytest.raises(Violation, match=found):
        for _ in all_faults(SCENARIOS[scenario], broken):
            pass


def all_faults(scenario: Scenario, executor: type[Executor]) -> Iterator[World]:
    """Singles, and two of the same kind in a row: what is tried twice must fail twice to be in doubt."""
    yield from singles(scenario, executor)
    for number, kind in itertools.product(range(1, 8), KINDS):
        yield World(scenario, {number: kind, number + 1: kind}, executor).run()


# --- poison ---------------------------------------------------------------------------------------------


class PoisonedWorld(World):
    """The handler of `p` kills its worker, every time."""

    def effect(self, biz_id: str) -> None:
        if biz_id == "p":
            self.die()
        super().effect(biz_id)

    def check(self) -> None:
        good = set(self.scenario.copies) - {"p"}
        if self.dead_letters != Counter("p"):
            raise Violation(f"I12: {self.dead_letters} in the dead letter")
        if any(self.effects[biz_id] != 1 or self.state(biz_id) is not State.COMPLETED for biz_id in good):
            raise Violation(f"I1: a neighbour suffered: {self.effects}")


POISONED: Sequence[Scenario] = [
    Scenario("p"),
    Scenario("apb", window=1),
    Scenario("pab", window=3),
    Scenario("apb", window=3),
    Scenario("abpcd", window=3),
]


@pytest.mark.parametrize("scenario", POISONED, ids=lambda s: f"{s.copies}, {s.window} at a time")
def test_poison_ends_in_the_dead_letter(scenario: Scenario) -> None:
    """I12: a message that kills its worker runs at most max + 1 times, then is given up; its neighbours run once."""
    world = PoisonedWorld(scenario, {}).run()
    assert world.runs["p"] <= MAX_ATTEMPTS + 1
    assert all(world.runs[biz_id] == 1 for biz_id in set(scenario.copies) - {"p"})


@pytest.mark.parametrize("scenario", POISONED[2:4], ids=lambda s: f"{s.copies}, {s.window} at a time")
def test_a_successor_must_be_told_from_a_first_delivery(scenario: Scenario) -> None:
    """The control of `Work.redelivered`: waiting for the dead holder's lease makes a new message of the poison; if that
    passes for a first delivery, it runs on a reservation, uncounted, and kills workers for ever."""
    world = PoisonedWorld(scenario, {})
    world.tells_successors = False
    with pytest.raises(Violation, match="I12"):
        world.run()
